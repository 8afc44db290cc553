"""What every form chooses kept keys by: the attention that they received before a call, their places, |v|."""

import torch
import torch.nn.functional as F

from hf_rfa.ops.chunks import take
from hf_rfa.ops.layout import Plan
from hf_rfa.ops.state import RFAState


def mass_so_far(state: RFAState, plan: Plan) -> torch.Tensor:
    """Attention (B, Hk, G, K + n * C) that the state's kept keys, then the aligned tokens, received before a pass."""
    _, _, position, _, mass = state.kept
    kept_count = position.shape[2]
    token_mass = mass.new_zeros(*mass.shape[:3], plan.token_mask[0].numel())
    if plan.history:
        near = mass[..., kept_count:].transpose(2, 3)
        remembered = (plan.token_mask & ~plan.asked).flatten(1)[:, None, None]
        near = take(near, plan.source.clamp_max(near.shape[2] - 1)).transpose(2, 3)
        token_mass = near.masked_fill(~remembered, 0.0)
    return torch.cat([mass[..., :kept_count], token_mass], dim=-1)


def value_lengths(kept_value: torch.Tensor, value: torch.Tensor, plan: Plan, wide: torch.dtype) -> torch.Tensor:
    """|v| (B, Hk, K + n * C) of the state's kept keys (B, Hk, K, M), then of the aligned tokens (B, Hk, T, M)."""
    missing = plan.token_mask[0].numel() - value.shape[2]
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=wide) for x in (kept_value, value)]
    return F.pad(torch.cat(norms, dim=2), (0, missing))


def places_of_rivals(plan: Plan, sinks: int) -> torch.Tensor:
    """(R, n, C) int64: each token's number in its document; -1 for padding and sinks, which never compete."""
    size = plan.token_mask.shape[-1]
    slots = torch.arange(size, device=plan.rank.device)
    rival = plan.token_mask & ((plan.rank > 0).unsqueeze(-1) | (slots >= sinks))
    return torch.where(rival, plan.rank.unsqueeze(-1) * size + slots, -1)
