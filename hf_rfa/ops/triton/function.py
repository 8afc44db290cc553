"""The kernels as one differentiable function of aligned tokens; its backward pass computes all features again."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_rfa.ops.triton.launch import INPUTS, Inputs, Launch, Settings
from hf_rfa.ops.triton.launch_gradients import gradients

#: What a launch keeps for its backward pass, beside its inputs.
_KEPT = ("states", "kept", "peaks", "log_total", "log_weight")
#: Inputs whose gradients are those of the far kernel's parameters.
_PARAMETERS = tuple(name for name in INPUTS if name.endswith(("_weight", "_bias", "_shift")))


def causal_attention(inputs: Inputs, settings: Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, Hk, G, T, M) in value's dtype; far sums (B, Hk, F, M + 1) and their log-scale after the last one."""
    return _Causal.apply(settings, *(getattr(inputs, name) for name in INPUTS))


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: Settings, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        launch = Launch(Inputs(*tensors), settings)  # type: ignore[arg-type]
        output, carry, peak = launch.forward()
        ctx.save_for_backward(*tensors, output, *(getattr(launch, name) for name in _KEPT))
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(peak)
        return output, carry, peak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: torch.Tensor | None, d_carry: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        tensors, (output, *kept) = ctx.saved_tensors[: len(INPUTS)], ctx.saved_tensors[len(INPUTS) :]
        launch = Launch(Inputs(*tensors), ctx.settings)
        for name, tensor in zip(_KEPT, kept, strict=True):
            setattr(launch, name, tensor)
        needs = dict(zip(INPUTS, ctx.needs_input_grad[1:], strict=True))
        learned = any(needs[name] for name in _PARAMETERS)
        found = gradients(launch, output, d_output, d_carry, learned)
        return None, *(found.get(name) if needs[name] else None for name in INPUTS)
