"""The kernels as one differentiable function of aligned tokens; its backward pass recomputes all features."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from hf_rfa.ops.recomputing import Flags, recomputing
from hf_rfa.ops.triton.launch import INPUTS, Inputs, Launch, Settings
from hf_rfa.ops.triton.launch_gradients import gradients

#: Buffers that a launch keeps for its backward pass, besides its inputs.
_KEPT = ("states", "kept", "peaks", "log_total", "log_weight")
#: Inputs whose gradients belong to the far kernel's parameters.
_PARAMETERS = tuple(name for name in INPUTS if name.endswith(("_weight", "_bias", "_shift")))


def causal_attention(inputs: Inputs, settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, Hk, G, T, M) in value's dtype; far sums (B, Hk, F, M + 1), their log-scale after the last chunk."""
    output, kv_state, peak = recomputing(_Recipe(settings), *(getattr(inputs, name) for name in INPUTS))
    return output, kv_state, peak


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """See `ops.recomputing`; the tensors are those of `Inputs`."""

    settings: Settings
    outputs: int = 3
    constant: tuple[int, ...] = (2,)
    forward_only: tuple[int, ...] = ()

    def forward(self, tensors: Sequence[Any], followed: Flags) -> tuple[torch.Tensor, ...]:
        launch = Launch(Inputs(*tensors), self.settings)
        outputs = launch.forward()
        return *outputs, *((getattr(launch, name) for name in _KEPT) if any(followed) else ())

    def backward(
        self, tensors: Sequence[Any], outputs: Sequence[Any], kept: Sequence[Any], above: Sequence[Any],
        followed: Flags,
    ) -> list[torch.Tensor | None]:  # fmt: skip
        launch = Launch(Inputs(*tensors), self.settings)
        for name, tensor in zip(_KEPT, kept, strict=True):
            setattr(launch, name, tensor)
        learned = any(follow for name, follow in zip(INPUTS, followed, strict=True) if name in _PARAMETERS)
        found = gradients(launch, outputs[0], above[0], above[1], learned)
        return [found.get(name) for name in INPUTS]
