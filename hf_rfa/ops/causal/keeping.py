"""Kept keys around the chunked form: the gate behind evicted keys, and the kept keys of the final state."""

import dataclasses

import torch
import torch.nn.functional as F

from hf_rfa.ops.causal.exact_pass import Choice
from hf_rfa.ops.causal.pass_inputs import PassInputs
from hf_rfa.ops.causal.pool import Pool
from hf_rfa.ops.layout import Plan
from hf_rfa.ops.state import RFAState


def decay_of_evicted(choice: Choice, decay: torch.Tensor, state: RFAState, plan: Plan) -> torch.Tensor:
    """(A, n, C) log g summed from behind each evicted key up to the chunk after which it is evicted.

    decay: (B, Hk, n, C), log g summed from the first slot of each chunk.
    """
    starts, whole = _gate_sums(decay, state, plan)
    before = starts[..., :-1].flatten(0, 1).unsqueeze(-1)
    whole = whole.flatten(0, 1).unsqueeze(1).expand(-1, before.shape[1], -1)
    return (before - whole.gather(2, choice.evicted)).to(decay.dtype)


def with_kept_keys(
    final: RFAState, last: torch.Tensor, mass: torch.Tensor, inputs: PassInputs, state: RFAState, plan: Plan
) -> RFAState:
    """The final state with its kept keys, after a call that continued `state`; `last`, `mass`: see `Choice`."""
    assert inputs.kept_key is not None
    assert inputs.kept_value is not None
    _, _, kept_position, kept_decay, _ = state.kept
    batch, heads = inputs.kept_key.shape[:2]
    there, index = last >= 0, last.clamp_min(0)

    def taken(of_state: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        rows = Pool(of_state, tokens, plan.history).take(index.unsqueeze(1)).squeeze(1)
        return rows.masked_fill(~there.unsqueeze(-1), 0.0).unflatten(0, (batch, heads))

    chunk = plan.token_mask.shape[-1]
    places = (plan.rank.unsqueeze(-1) * chunk + torch.arange(chunk, device=index.device)).flatten(1)
    places = torch.cat([kept_position, places.unsqueeze(1).expand(batch, heads, -1)], dim=2).flatten(0, 1)
    position = torch.where(there, places.gather(1, index), -1).unflatten(0, (batch, heads))
    decay = torch.zeros_like(kept_decay)
    if inputs.decay is not None:
        starts, whole = _gate_sums(inputs.decay, state, plan)
        behind = starts[..., -1].flatten(0, 1).unsqueeze(-1) - whole.flatten(0, 1).gather(1, index)
        decay = behind.masked_fill(~there, 0.0).to(decay.dtype).unflatten(0, (batch, heads))
    return dataclasses.replace(
        final, kept_key=taken(inputs.kept_key, inputs.key), kept_value=taken(inputs.kept_value, inputs.value),
        kept_position=position, kept_decay=decay, mass=_final_mass(last, mass, plan, batch, heads),
    )  # fmt: skip


def _final_mass(last: torch.Tensor, mass: torch.Tensor, plan: Plan, batch: int, heads: int) -> torch.Tensor:
    """Mass (B, Hk, G, K + 2C) of the kept keys, then of the chunks c0 - 1 and c0."""
    chunk, count = plan.token_mask.shape[-1], last.shape[1]
    kept = mass[..., :count].masked_fill((last < 0).unsqueeze(1), 0.0).unflatten(0, (batch, heads))
    tokens = mass[..., count:].unflatten(0, (batch, heads)).unflatten(3, (-1, chunk))
    end = plan.last[:, None]
    both = torch.cat([end - 1, end], dim=1)
    belongs = (both >= 0) & (plan.segment_ids.gather(1, both.clamp_min(0)) == plan.segment_ids.gather(1, end))
    filled = plan.token_mask.gather(1, both.clamp_min(0).unsqueeze(-1).expand(-1, -1, chunk)) & belongs.unsqueeze(-1)
    both = both.clamp_min(0).expand(batch, -1)[:, None, None, :, None].expand(-1, heads, tokens.shape[2], -1, chunk)
    near = tokens.gather(3, both).masked_fill(~filled[:, None, None], 0.0)
    return torch.cat([kept, near.flatten(3)], dim=3)


def _gate_sums(decay: torch.Tensor, state: RFAState, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """log g summed up to each chunk and to the end (B, Hk, n + 1), and up to each token of the pool (B, Hk, P).

    In float64, since callers subtract sums over the whole text. Documents do not mix, because only differences within
    one document are ever taken.
    """
    wide = decay.double()
    starts = F.pad(wide[..., -1].cumsum(-1), (1, 0))
    tokens = starts[..., :-1].unsqueeze(-1) + wide
    each = wide - F.pad(wide[..., :-1], (1, 0))
    remembered = (plan.token_mask & ~plan.asked).unsqueeze(1)  # the decay in a state is relative to the last of these
    already = each.masked_fill(~remembered, 0.0).sum((-2, -1))
    kept = already.unsqueeze(-1) - state.kept[3].double()
    return starts, torch.cat([kept, tokens.flatten(2)], dim=2)
