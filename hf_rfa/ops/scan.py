"""Sums over the far keys, chunk by chunk, with a running maximum: the linear-time core of the operator."""

import torch


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


def scan_chunks(
    sums: torch.Tensor,
    log_max: torch.Tensor,
    member: torch.Tensor,
    kv_state: torch.Tensor,
    kv_log_max: torch.Tensor,
    keep: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Running sums over a block of n chunks, each divided by exp of its own running maximum.

    Args:
        sums, log_max: (B, H, m, F, M + 1), (B, H, m): the sums of each of m chunks (`chunk_sums`).
        member: (R, n, m) bool: which chunks add to the state that chunk i reads.
        kv_state, kv_log_max: (B, H, F, M + 1), (B, H): the state before the block. A gate's gradient flows
            through the maxima.
        keep: (R, n) bool: whether the state before the block belongs to the document of chunk i.

    Returns:
        states (B, H, n, F, M + 1), divided by exp(running_max), and running_max (B, H, n), -inf without keys.
    """
    member, keep = member.unsqueeze(1), keep.unsqueeze(1)
    added = log_max.unsqueeze(-2).masked_fill(~member, -torch.inf)
    carried = kv_log_max.unsqueeze(-1).masked_fill(~keep, -torch.inf)
    running_max = torch.maximum(added.detach().amax(-1), carried.detach())
    base = _finite(running_max)
    weights = (added - base.unsqueeze(-1)).exp()
    states = torch.einsum("bhij,bhjfm->bhifm", weights, sums)
    states = states + (carried - base).exp()[..., None, None] * kv_state.unsqueeze(2)
    return states, running_max


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
