"""The linear layer that follows the attention in a module, as a matrix: what `distill` measures errors behind."""

import math
from typing import Any

import torch
from torch import nn

#: A layer counts as linear if f(x + y) differs from f(x) + f(y) by at most this share; rounding the inputs to 4 bits
#: makes a difference of a tenth.
NONLINEAR = 0.25
#: Small weights are scaled up by at most the inverse of this share of the bias, the largest power of two in float16.
LEAST_WEIGHT = 2.0**-15


def output_projection(module: nn.Module, size: int, like: torch.Tensor) -> torch.Tensor | None:
    """W (hidden, size), float32, of the layer that follows the attention in the same module; None if none is found.

    The layer is found by the usual names and its input size, and W by running the layer on a basis: the weight itself
    may be integers with scales, packed, float8, transposed, offloaded, or have a LoRA beside it.

    Args:
        like: An output of the attention: the device to compute on, and the dtype if the weight does not say.
    """
    for name in ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj"):
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Module) and _takes(linear, size):
            weight: Any = getattr(linear, "weight", None)
            plain = isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.element_size() > 1
            return linear_map(linear, size, dtype=weight.dtype if plain else like.dtype, device=like.device)
    return None


def _takes(linear: nn.Module, size: int) -> bool:
    """Whether a layer takes vectors of `size` numbers, by its attributes."""
    width = getattr(linear, "in_features", getattr(linear, "nx", None))  # nx: GPT-2's Conv1D
    if width is None:
        weight = getattr(linear, "weight", None)
        return isinstance(weight, torch.Tensor) and weight.dim() == 2 and size in weight.shape
    return bool(width == size)


@torch.no_grad()
def linear_map(linear: nn.Module, size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """W (out, size), float32, of a layer f(x) = W x + b: column i is (f(s e_i) - f(0)) / s. None if f is not linear.

    The scale s, a power of two, is 1 unless b is larger than W: in 16 bit the sum would then hold little of W.
    """
    # `forward` and not a call: hooks on the layer are meant for the model's own calls.
    probe = torch.arange(size, dtype=torch.float32, device=device).cos().to(dtype)
    rows = torch.cat([torch.eye(size, dtype=dtype, device=device), probe[None], torch.zeros_like(probe)[None]])

    def run(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out = linear.forward((rows * scale)[None])[0].to(device, torch.float32)
        return (out[:-1] - out[-1]) / scale, out[-1]

    scale, wanted = 0.0, 1.0
    while scale < wanted:  # at scale 1 small weights are lost in rounding
        scale = wanted
        columns, bias = run(scale)
        largest, offset = columns[:-1].abs().max().item(), bias.abs().max().item()
        if largest < offset:
            wanted = 2.0 ** math.ceil(math.log2(offset / max(largest, offset * LEAST_WEIGHT)))
    weight, answer = columns[:-1].T, columns[-1]
    expected = weight @ probe.float()
    return weight if (answer - expected).norm() <= NONLINEAR * expected.norm() else None
