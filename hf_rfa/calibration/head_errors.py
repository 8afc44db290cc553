"""The error of a far kernel: the squared error of each key head after the output projection, for all gammas at once.

Let a = n / d be the output of the near part alone, (f, z) the far sums and s = gamma / (d + gamma z). The output is
a + s (f - z a), so the squared error is a quadratic form in s: one run of the operator gives it for every gamma.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hf_rfa.ops.combine import Part, smallest_denominator

#: A layer counts as linear if f(x + y) differs from f(x) + f(y) by at most this share; rounding the inputs to 4 bits
#: makes a difference of a tenth.
NONLINEAR = 0.25
#: Small weights are scaled up by at most the inverse of this share of the bias, the largest power of two in float16.
LEAST_WEIGHT = 2.0**-15


def squared_errors(
    near: Part | None, far: Part, target: torch.Tensor, grams: torch.Tensor, gammas: Sequence[float],
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """|W_head (output - target)|^2 (1 + gammas, B, Hk, N) in float64: first without the far part, then for each gamma.

    Without a near part there is one row only: the far part alone.
    """
    alive = far.denominator > smallest_denominator(far.denominator.dtype)
    if near is None:
        output = torch.where(
            alive.unsqueeze(-1), far.numerator / torch.where(alive, far.denominator, 1.0).unsqueeze(-1), 0
        )
        error = (output - target).transpose(2, 3).flatten(3)
        return ((error @ grams) * error).sum(-1).double().unsqueeze(0)
    log_mass = near.denominator.log() + near.log_scale
    if sink_logits is not None:
        log_mass = torch.logaddexp(log_mass, sink_logits.unsqueeze(-1).to(log_mass))
    alone = near.numerator * (near.log_scale - log_mass).exp().unsqueeze(-1)
    # In units of exp(far.log_scale): the near mass, and the difference between the far sums and the near output.
    ratio = (log_mass - far.log_scale).exp().double()
    push = far.numerator - far.denominator.unsqueeze(-1) * alone
    error = alone - target
    blocks = grams.unflatten(2, (error.shape[2], -1)).unflatten(1, (error.shape[2], -1))  # (Hk, G, M, G, M)
    weighed = torch.einsum("hgmfe,bhfne->bhgnm", blocks, error).double()
    constant = (weighed * error).sum((2, 4))
    linear = (weighed * push).sum(-1)  # (B, Hk, G, N)
    pushed = torch.einsum("hgmfe,bhfne->bhgfnm", blocks, push).double()
    square = (pushed * push.unsqueeze(3)).sum(-1)  # (B, Hk, G, G, N)
    rows = [constant]
    for gamma in gammas:
        share = torch.where(alive, gamma / (ratio + gamma * far.denominator), 0.0)
        both = (share.unsqueeze(2) * share.unsqueeze(3) * square).sum((2, 3))
        rows.append(constant + 2 * (share * linear).sum(2) + both)
    return torch.stack(rows)


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


def grams_of_heads(projection: torch.Tensor | None, heads: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """W_head^T W_head (heads, width, width); the identity if there is no projection."""
    if projection is None:
        return torch.eye(width, device=like.device).expand(heads, width, width)
    columns = projection.to(like.device).unflatten(1, (heads, width)).transpose(0, 1)
    return columns.mT @ columns
