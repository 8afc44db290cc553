"""Sums of far keys over chunks: the linear-time heart of the operator, with a running maximum."""

import torch


def append_ones(value: torch.Tensor) -> torch.Tensor:
    """[v, 1]: one product then gives S and z together."""
    return torch.cat([value, value.new_ones(*value.shape[:-1], 1)], dim=-1)


def chunk_sums(
    features: torch.Tensor, log_scale: torch.Tensor, value: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of psi(k_j) [v_j, 1] over each chunk, and the maximum they were divided by.

    Args:
        features: (B, H, n, C, F); log_scale: (B, H, n, C); value: (B, H, n, C, M); keep: (R, n, C) bool.

    Returns:
        sums (B, H, n, F, M + 1), divided by exp(peak), and peak (B, H, n), -inf for chunks that keep nothing.
    """
    log_scale = log_scale.masked_fill(~keep.unsqueeze(1), -torch.inf)
    peak = log_scale.detach().amax(-1)
    weights = (log_scale - _finite(peak).unsqueeze(-1)).exp()
    return (features * weights.unsqueeze(-1)).mT @ append_ones(value), peak


def scan_chunks(
    sums: torch.Tensor,
    peak: torch.Tensor,
    member: torch.Tensor,
    carry: torch.Tensor,
    carry_peak: torch.Tensor,
    keep: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running sums over a block of n chunks, each divided by a running maximum of its own.

    Args:
        sums, peak: (B, H, m, F, M + 1), (B, H, m): what each of m chunks adds (`chunk_sums`).
        member: (R, n, m) bool: which chunks add to the state that chunk i reads.
        carry, carry_peak: (B, H, F, M + 1), (B, H): the state before the block. A gate's gradient flows through peaks.
        keep: (R, n) bool: whether the state before the block belongs to the document of chunk i.

    Returns:
        states (B, H, n, F, M + 1), divided by exp(maximum), and maximum (B, H, n), -inf where there is nothing.
    """
    member, keep = member.unsqueeze(1), keep.unsqueeze(1)
    added = peak.unsqueeze(-2).masked_fill(~member, -torch.inf)
    carried = carry_peak.unsqueeze(-1).masked_fill(~keep, -torch.inf)
    maximum = torch.maximum(added.detach().amax(-1), carried.detach())
    base = _finite(maximum)
    weights = (added - base.unsqueeze(-1)).exp()
    states = torch.einsum("bhij,bhjfm->bhifm", weights, sums)
    states = states + (carried - base).exp()[..., None, None] * carry.unsqueeze(2)
    return states, maximum


def merge_states(
    one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two (sums, maximum) pairs of equal shapes (..., F, M + 1) and (...)."""
    maximum = torch.maximum(one[1], two[1]).detach()
    base = _finite(maximum)
    weigh = [(m - base).exp()[..., None, None] * sums for sums, m in (one, two)]
    return weigh[0] + weigh[1], maximum


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """-inf (no key yet) replaced by 0, so that differences stay defined."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)
