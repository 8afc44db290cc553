"""What a far kernel costs: the squared error of each key head behind the output projection, for all gammas at once.

With the near part alone giving a = n / d, the far sums (f, z) and s = gamma / (d + gamma z), the output is
a + s (f - z a): the squared error is a quadratic form in s, so that every gamma comes for free once an alpha has been
run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from hf_rfa.ops.combine import Part, smallest_denominator


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
    # In units of exp(far.log_scale): the near mass, and how far the far sums lie from what the near part says.
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


def output_projection(module: nn.Module, size: int) -> torch.Tensor | None:
    """The weight (hidden, size) that follows the attention in the same module, if it is there under a usual name."""
    for name in ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj"):
        linear: Any = getattr(module, name, None)
        weight = getattr(linear, "weight", None)
        if (
            isinstance(weight, torch.Tensor)
            and weight.dim() == 2
            and size in weight.shape
            and weight.is_floating_point()
        ):
            with align_module_device(linear):  # it may be offloaded
                weight = linear.weight.detach()
            # GPT-2's Conv1D stores the transpose of a Linear.
            transposed = type(linear).__name__ == "Conv1D"
            weight = weight.T if transposed else weight
            if weight.shape[1] == size:
                return weight.float()
    return None


def grams_of_heads(projection: torch.Tensor | None, heads: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """W_head^T W_head (heads, width, width); the identity where the projection is not known."""
    if projection is None:
        return torch.eye(width, device=like.device).expand(heads, width, width)
    columns = projection.to(like.device).unflatten(1, (heads, width)).transpose(0, 1)
    return columns.mT @ columns
