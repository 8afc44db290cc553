"""`RFAAdapter`: all that a converted attention module owns: omega and its draw, the far kernel, the exact heads."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from hf_rfa.config import AUTO_MAPS, RFAConfig
from hf_rfa.errors import ConfigError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.features.maps import FEATURE_MAPS, codes_of_maps, maps_of_codes, optimal_proposal
from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.runtime.fingerprint import digest_of
from hf_rfa.runtime.float32 import Float32Module
from hf_rfa.runtime.newer_tensors import newer_tensors
from hf_rfa.runtime.trainable import freeze, make_parameters, unfreeze

#: The name under which an adapter hangs in its attention module, and so the prefix of its tensors in a state dict.
ADAPTER_NAME = "rfa"
#: The tensors that are Parameters, which any optimiser trains, once omega is learned: the geometry and omega itself.
GEOMETRY = ("query_center", "key_center", "query_transform", "key_transform")
LEARNED = ("omega", *GEOMETRY)
#: Those of the forget gate, which is never random.
GATE = ("gate_weight", "gate_bias")
#: Its bias before training: sigmoid(8) forgets 28 % in a thousand tokens, and still has a gradient.
OPEN_GATE = 8.0
#: How a layer attends; `hf_rfa.runtime.attention` has a function for each.
LayerKind = Literal["linear", "softmax", "masked", "cross"]


class RFAAdapter(Float32Module):
    """Random features of one attention layer. Its tensors stay float32 whatever the model is cast to.

    Attributes:
        omega: (key_heads, rows, head_dim) rows N(0, I), a function of (config.seed, layer, draw); or centroids.
        alpha, gamma, proposal: (key_heads,) the far kernel (see `FarKernel`); calibration sets them.
        query_center, key_center: (key_heads, head_dim) subtracted by the far kernel; calibration sets them.
        query_transform, key_transform: (key_heads, head_dim, head_dim) its change of variable; calibration sets them.
        query_radius, key_radius: (key_heads,) its bounds, 0 (none) before calibration.
        far_limit: (key_heads,) the limit of its weight, 0 (none) before calibration.
        map_codes: (key_heads,) uint8, each head's map as its place in `FEATURE_MAPS`; see `feature_maps`.
        gate_weight, gate_bias: (key_heads, head_dim), (key_heads,) Parameters of the forget gate, if there is one.
        softmax_mask: (key_heads,) bool, True for key heads that stay exact softmax.
        draw: () int64, the number of the draw that omega came from.
        statistics: Counts dropped far parts, which only `signed` maps have.
        cross, masked: Whether the layer is cross-attention, or has a mask of its own: softmax with the cache it had.
    """

    omega: torch.Tensor
    alpha: torch.Tensor
    gamma: torch.Tensor
    proposal: torch.Tensor
    query_center: torch.Tensor
    key_center: torch.Tensor
    query_transform: torch.Tensor
    key_transform: torch.Tensor
    query_radius: torch.Tensor
    key_radius: torch.Tensor
    far_limit: torch.Tensor
    map_codes: torch.Tensor
    softmax_mask: torch.Tensor
    draw: torch.Tensor

    def __init__(
        self, config: RFAConfig, layer: int, key_heads: int, head_dim: int, *, converted: bool, cross: bool = False,
        masked: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.layer, self.converted, self.cross, self.masked = config, layer, converted, cross, masked
        # Explicit, so that the caller's default dtype and device do not matter.
        like: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        ones, eye = torch.ones(key_heads, **like), torch.eye(head_dim, **like)
        self.register_buffer("omega", torch.empty(key_heads, config.omega_rows(layer), head_dim, **like))
        self.register_buffer("alpha", ones * config.alpha)
        self.register_buffer("gamma", ones * config.gamma)
        self.register_buffer("proposal", ones * optimal_proposal(torch.tensor(head_dim / 2, **like), head_dim))
        self.register_buffer("query_center", torch.zeros(key_heads, head_dim, **like))
        self.register_buffer("key_center", torch.zeros(key_heads, head_dim, **like))
        self.register_buffer("query_transform", eye.repeat(key_heads, 1, 1))
        self.register_buffer("key_transform", eye.repeat(key_heads, 1, 1))
        self.register_buffer("query_radius", ones * 0)
        self.register_buffer("key_radius", ones * 0)
        self.register_buffer("far_limit", ones * 0)
        name = AUTO_MAPS[0] if config.feature_map == "auto" else config.feature_map
        codes = codes_of_maps([name] * key_heads)
        self.register_buffer("map_codes", torch.tensor(codes, dtype=torch.uint8, device="cpu"))
        self.register_buffer("softmax_mask", torch.full((key_heads,), not converted, dtype=torch.bool, device="cpu"))
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64, device="cpu"))
        if config.gate and converted:
            self.gate_weight = nn.Parameter(torch.zeros(key_heads, head_dim, **like))
            self.gate_bias = nn.Parameter(ones * OPEN_GATE)
        self.statistics = FarStatistics()
        self.attends_twice = False  # per forward of its module, as the dry run counts
        self.backend = "auto"  # see `hf_rfa.set_backend`; a property of the machine, so not saved
        self.traced_call: Any = None  # set only under a tracer, see `hf_rfa.runtime.calls`
        self._python: dict[str, Any] = {}
        self._known_kernel: tuple[FarKernel, tuple[tuple[str, torch.Tensor], ...]] | None = None
        self._resting: set[str] = set()  # Parameters that are frozen only because every key head is exact
        self.omega.copy_(self.drawn(0))
        if config.omega == "learned" and converted:
            self.learn()

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        return self.omega.shape[0]

    @property
    def kind(self) -> LayerKind:
        """How the layer attends: "softmax" as soon as every key head is exact."""
        if "kind" not in self._python:
            own: LayerKind = "softmax" if len(self.softmax_heads) == self.key_heads else "linear"
            self._python["kind"] = "cross" if self.cross else "masked" if self.masked else own
        return self._python["kind"]

    @property
    def kernel(self) -> FarKernel:
        """The far kernel of all key heads: one object until a method of the adapter changes its tensors.

        It holds the adapter's own tensors, Parameters with their gradients. If others take their place (sharding,
        `torch.func.functional_call`), it is made anew.
        """
        if torch.compiler.is_compiling():  # the tensors are the tracer's
            return self._make_kernel()
        known = self._known_kernel
        if known is None or any(getattr(self, name) is not tensor for name, tensor in known[1]):
            kernel = self._make_kernel()
            known = self._known_kernel = kernel, tuple(kernel.tensors().items())
        return known[0]

    def _make_kernel(self) -> FarKernel:
        names = ["omega", "alpha", "gamma", "proposal", "query_center", "key_center"]
        if self._calibrated:
            names += ["query_transform", "key_transform", "query_radius", "key_radius", "far_limit"]
        if self.config.gate and self.converted:
            names += GATE
        return FarKernel(self.feature_maps, **{name: getattr(self, name) for name in names})

    def kernel_of(self, draw: int | None) -> FarKernel:
        """`kernel` with omega of draw number `draw`: a layer may be redrawn before it runs again (backward pass)."""
        if draw is None or draw == self.draw_number or not self.converted:
            return self.kernel
        return dataclasses.replace(self.kernel, omega=self.drawn(draw))

    @property
    def fingerprint(self) -> str:
        """A digest of tensors, window, sinks and kept keys: adapters that share it can continue each other's states.

        A cache remembers it, also in another process. Computed again only after a change.
        """
        known = self._python.get("fingerprint")
        if known is not None and torch.compiler.is_compiling():  # a graph cannot ask which tensors these are
            return known[1]
        own = (*self._parameters.values(), *self._buffers.values())
        versions = tuple((id(t), t._version) for t in own if t is not None and not t.is_inference())
        if known is None or known[0] != versions:
            known = self._python["fingerprint"] = versions, digest_of(self)
        return known[1]

    @property
    def kept_keys(self) -> int | tuple[int, ...]:
        """The number of far keys that stay exact, or that of each key head where they differ."""
        if "kept" not in self._python:
            self._python["kept"] = self.config.kept_of(self.layer, self.key_heads)
        return self._python["kept"]

    @property
    def feature_maps(self) -> tuple[str, ...]:
        """The map of each key head."""
        if "maps" not in self._python:  # read once: a GPU would wait for it in every forward
            self._python["maps"] = maps_of_codes(self.map_codes.tolist(), self.config.feature_map)
        return self._python["maps"]

    @property
    def signed(self) -> bool:
        """Whether a head's estimates can be negative, so that far parts may be dropped."""
        if "signed" not in self._python:
            self._python["signed"] = any(FEATURE_MAPS[name].signed for name in self.feature_maps)
        return self._python["signed"]

    @property
    def _calibrated(self) -> bool:
        """Whether any change of variable or bound is set; if not, the kernel leaves them out and saves their cost."""
        if isinstance(self.query_transform, nn.Parameter):
            return True
        if "calibrated" not in self._python:
            eye = torch.eye(self.omega.shape[2], device=self.omega.device)
            identity = all(bool((m == eye).all()) for m in (self.query_transform, self.key_transform))
            free = not any(bool(r.any()) for r in (self.query_radius, self.key_radius, self.far_limit))
            self._python["calibrated"] = not (identity and free)
        return self._python["calibrated"]

    def set_kernel(self, feature_maps: Sequence[str], **tensors: torch.Tensor) -> None:
        """Replace the far kernel: each key head's map, and any of the tensors by name."""
        self.map_codes.copy_(torch.tensor(codes_of_maps(feature_maps)))
        with torch.no_grad():
            for name, tensor in tensors.items():
                getattr(self, name).copy_(tensor)
        self._read()

    def learn(self) -> None:
        """Make the tensors of `LEARNED` Parameters, so that fine-tuning trains them with the model."""
        make_parameters(self, LEARNED)
        self._known_kernel = None
        self._train_what_acts()

    @property
    def softmax_heads(self) -> tuple[int, ...]:
        """Key heads that stay exact softmax."""
        if "softmax_heads" not in self._python:
            self._python["softmax_heads"] = tuple(self.softmax_mask.nonzero().flatten().tolist())
        return self._python["softmax_heads"]

    def set_kept_keys(self, config: RFAConfig) -> None:
        """Keep as many far keys as `config` says, which differs from the layer's own in nothing else."""
        self.config = config
        self._read()

    @property
    def linear_heads(self) -> list[int]:
        """The other key heads in order of the layer's state: by the number of keys that they keep, then by head."""
        kept = self.kept_keys
        numbers = (kept,) * self.key_heads if isinstance(kept, int) else kept
        linear = [head for head in range(self.key_heads) if head not in self.softmax_heads]
        return sorted(linear, key=lambda head: (numbers[head], head))

    @property
    def draw_number(self) -> int:
        """The number of omega's draw."""
        if "draw" not in self._python:
            self._python["draw"] = int(self.draw)
        return self._python["draw"]

    def set_softmax_heads(self, heads: tuple[int, ...]) -> None:
        """Keep exactly these key heads as softmax."""
        wrong = [head for head in heads if not 0 <= head < self.key_heads]
        if wrong:
            raise ConfigError(
                f"Layer {self.layer} has key heads 0..{self.key_heads - 1}. Got {wrong}. Correct `softmax_heads`."
            )
        mask = torch.zeros_like(self.softmax_mask)
        mask[list(heads)] = True
        self.softmax_mask.copy_(mask)
        self._read()

    def _read(self) -> None:
        """Refresh the Python values that are read from tensors, at once: a graph cannot read them."""
        self._python.clear()
        self._known_kernel = None
        if not self.omega.is_meta:
            _ = self.kernel, self.draw_number
            self._train_what_acts()

    def _train_what_acts(self) -> None:
        """Freeze the Parameters while every key head is exact: they would get no gradient, an error to DDP."""
        if len(self.softmax_heads) == self.key_heads:
            self._resting |= freeze(self)
        else:
            unfreeze(self, self._resting)
            self._resting = set()

    def drawn(self, draw: int) -> torch.Tensor:
        """omega of draw number `draw`, for all key heads."""
        heads, rows, dim = self.omega.shape
        config = self.config
        omega = draw_omega(heads, rows, dim, kind=config.omega, seed=config.seed, layer=self.layer, draw=draw)
        return omega.to(self.omega.device)

    def redraw(self, draw: int) -> None:
        """Set omega to draw number `draw`. A cache filled with another draw is refused from then on."""
        with torch.inference_mode(False):  # an omega that can be trained with afterwards
            self.omega = self.drawn(draw)
            self.draw = torch.full_like(self.draw, draw)
        self._python.pop("fingerprint", None)
        self._python["draw"], self._known_kernel = draw, None

    def extra_repr(self) -> str:
        heads = f", softmax_heads={list(self.softmax_heads)}" if self.softmax_heads else ""
        return (
            f"{'/'.join(sorted(set(self.feature_maps)))}, num_features={self.config.features_of(self.layer)}, "
            f"window={self.config.window}, key_heads={self.key_heads}, draw={self.draw_number}{heads}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "RFAAdapter":
        super()._apply(fn, recurse)
        self._known_kernel = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes a kernel of its own; tensors that stand in for the adapter's may not allow copying.
        return {**self.__dict__, "_known_kernel": None}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict |= newer_tensors(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read()
