"""Sums over the far keys, chunk by chunk, each beside the log of what it is divided by: the linear-time core."""

import functools
from collections.abc import Sequence

import torch

#: Sums (B, H, n, F, M + 1) of n chunks, and the log of what each is divided by (B, H, n); see `chunk_sums`.
Sums = tuple[torch.Tensor, torch.Tensor]


def append_ones(value: torch.Tensor) -> torch.Tensor:
    """[v, 1], so that one product gives S and z together."""
    return torch.cat([value, value.new_ones(*value.shape[:-1], 1)], dim=-1)


def chunk_sums(
    features: torch.Tensor, log_scale: torch.Tensor, value: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of psi(k_j) [v_j, 1] over each chunk, and the log of what they are divided by.

    Args:
        features: (B, H, n, C, F); log_scale: (B, H, n, C); value: (B, H, n, C, M); keep: (R, n, C) bool.

    Returns:
        sums (B, H, n, F, M + 1), divided by exp(log_max), and log_max (B, H, n), -inf for chunks that keep none.
    """
    log_scale = log_scale.masked_fill(~keep.unsqueeze(1), -torch.inf)
    log_max = log_scale.detach().amax(-1)
    weights = (log_scale - _finite(log_max).unsqueeze(-1)).exp()
    return (features * weights.unsqueeze(-1)).mT @ append_ones(value), log_max


def sums_of_members(parts: Sequence[Sums], member: torch.Tensor) -> Sums:
    """For each of n readers the sum over its members among m sums, divided by exp of their largest log_max.

    Args:
        parts: The m sums in several tables, none of which is copied.
        member: (R, n, m) bool.

    Returns:
        (B, H, n, F, M + 1) and the largest log_max (B, H, n), -inf for readers without members.
    """
    log_max = torch.cat([log for _, log in parts], dim=2)
    added = log_max.unsqueeze(-2).masked_fill(~member.unsqueeze(1), -torch.inf)
    largest = added.detach().amax(-1)
    weights = (added - _finite(largest).unsqueeze(-1)).exp().split([log.shape[2] for _, log in parts], dim=-1)
    products = (w @ sums.flatten(3) for w, (sums, _) in zip(weights, parts, strict=True) if w.shape[-1])
    return functools.reduce(torch.add, products).unflatten(3, parts[0][0].shape[3:]), largest


def merge_states(
    one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two (sums, log_max) pairs of equal shapes (..., F, M + 1) and (...)."""
    running_max = torch.maximum(one[1], two[1]).detach()
    base = _finite(running_max)
    weigh = [(m - base).exp()[..., None, None] * sums for sums, m in (one, two)]
    return weigh[0] + weigh[1], running_max


def _finite(log_max: torch.Tensor) -> torch.Tensor:
    """Replace -inf (no key yet) by 0, so that differences stay defined."""
    return log_max.masked_fill(log_max == -torch.inf, 0.0)
