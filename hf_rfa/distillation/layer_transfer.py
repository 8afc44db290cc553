"""The trainable far kernel of one layer, and its loss against the layer's own softmax."""

import numpy as np
import torch
from torch import nn

from hf_rfa.calibration.output_projection import output_projection
from hf_rfa.distillation.config import DistillConfig
from hf_rfa.distillation.weight_loss import sampled_weight_loss
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.features.maps import FEATURE_MAPS
from hf_rfa.ops.attention import attend
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import GATE, GEOMETRY, RFAAdapter

#: Least alpha and gamma to start from: calibration may have left a head without a far part (gamma = 0), or with the
#: same weight for all far keys (alpha = 0).
LEAST_ALPHA, LEAST_GAMMA = 0.1, 0.01


class LayerTransfer:
    """Observer of one layer (see `runtime.calls.Interception`) that computes the gradient of its loss per forward.

    Attributes:
        tensors: The trained tensors by name; alpha and gamma as logarithms.
        loss: The loss of the last forward.
    """

    def __init__(self, adapter: RFAAdapter, config: DistillConfig) -> None:
        self.adapter, self.settings, self.learn_omega = adapter, config, config.omega == "learned"
        self.named = [*GEOMETRY, *(GATE if adapter.config.gate else ())]  # trained without a change of scale
        start = {name: getattr(adapter, name) for name in self.named}
        start["log_alpha"] = adapter.alpha.clamp_min(LEAST_ALPHA).log()
        start["log_gamma"] = adapter.gamma.clamp_min(LEAST_GAMMA).log()
        if self.learn_omega:
            start["omega"] = adapter.omega
            if config.cluster_scale != 1:
                start |= _scaled_clusters(adapter, config.cluster_scale)
        self.tensors = {name: tensor.detach().clone().requires_grad_() for name, tensor in start.items()}
        self.loss, self.step = float("nan"), 0

    @property
    def positive_heads(self) -> list[int]:
        """Linear key heads whose estimated weights cannot be negative."""
        names, exact = self.adapter.feature_maps, self.adapter.softmax_heads
        return [head for head, name in enumerate(names) if not FEATURE_MAPS[name].signed and head not in exact]

    def begin(self, step: int) -> None:
        """Called before the forward of step `step`; all random choices depend on it."""
        self.step = step

    def __call__(
        self, adapter: RFAAdapter, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        layout: TokenLayout, settings: AttentionSettings, exact: torch.Tensor,
    ) -> None:  # fmt: skip
        with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
            projection = output_projection(module, exact.shape[1] * exact.shape[3], exact)
            query, key, value, exact = (x.detach().float() for x in (query, key, value, exact))
            kernel = self._kernel()
            rng = np.random.default_rng((self.settings.seed, adapter.layer, self.step))
            dropped = rng.random() < self.settings.window_dropout
            own = adapter.config
            window, sinks, kept = (0, 0, 0) if dropped else (own.window, own.sink_tokens, adapter.kept_keys)
            settings = settings.replace(
                window=window, sink_tokens=sinks, kept_keys=kept, softmax_heads=adapter.softmax_heads,
                sliding_window=None,
            )  # fmt: skip
            output, _ = attend(query, key, value, kernel, settings, layout)
            loss = _relative_error(projection, output, exact)
            if self.settings.weight_loss and self.positive_heads:
                rows = rng.choice(query.shape[2], min(self.settings.sampled_queries, query.shape[2]), replace=False)
                linear = settings.replace(softmax_heads=())
                call = OperatorCall.of(query, key, value, kernel, linear, layout).heads(self.positive_heads)
                entropy = sampled_weight_loss(call, torch.as_tensor(np.sort(rows), device=query.device))
                loss = loss + self.settings.weight_loss * entropy
            if loss.requires_grad:
                loss.backward()
        self.loss = loss.item()

    def write_back(self) -> None:
        """Write the trained tensors into the adapter."""
        adapter, kernel = self.adapter, self._kernel(original_draw=True)
        names = [*self.named, "alpha", "gamma", *(["omega"] if self.learn_omega else [])]
        adapter.set_kernel(adapter.feature_maps, **{name: getattr(kernel, name).detach() for name in names})

    def state(self) -> dict[str, torch.Tensor]:
        """The trained tensors, detached."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: It belongs to another kind of layer or run.
        """
        got = {name: tuple(tensor.shape) for name, tensor in state.items()}
        want = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if got != want:
            raise ValueError(f"layer {self.adapter.layer} trains {want}, the checkpoint has {got}.")
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])

    def _kernel(self, original_draw: bool = False) -> FarKernel:
        """The trained far kernel, differentiable."""
        adapter, tensors = self.adapter, self.tensors
        omega = tensors.get("omega", adapter.omega)
        if not self.learn_omega and not original_draw:
            omega = adapter.drawn(self.step + 1)
        return FarKernel(
            adapter.feature_maps, omega, tensors["log_alpha"].exp(), tensors["log_gamma"].exp(), adapter.proposal,
            query_radius=adapter.query_radius, key_radius=adapter.key_radius, far_limit=adapter.far_limit,
            **{name: tensors[name] for name in self.named},
        )  # fmt: skip


def _scaled_clusters(adapter: RFAAdapter, cluster_scale: float) -> dict[str, torch.Tensor]:
    """In clustered heads, scale the distances of keys to centroids by `cluster_scale` and keep the queries' logits."""
    clustered = torch.tensor([name == "clustered" for name in adapter.feature_maps], device=adapter.omega.device)
    scale = torch.where(clustered, cluster_scale, 1.0).view(-1, 1, 1)
    return {
        "omega": adapter.omega * scale,
        "key_transform": adapter.key_transform * scale,
        "query_transform": adapter.query_transform / scale,
    }


def _relative_error(projection: torch.Tensor | None, output: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """sum |W (output - exact)|^2 / sum |W exact|^2 of (B, H, N, M)."""
    error, whole = (x.transpose(1, 2).flatten(2) for x in (output - exact, exact))
    if projection is not None:
        error, whole = error @ projection.T, whole @ projection.T
    return error.square().sum() / whole.square().sum().clamp_min(torch.finfo(whole.dtype).tiny)
