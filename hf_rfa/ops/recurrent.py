"""One token at a time: the decoding step, whose time and memory do not depend on how many tokens came before."""

import dataclasses

import torch

from hf_rfa.feature_maps import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics, Part, combine, near_part
from hf_rfa.ops.scan import chunk_sums, merge_states
from hf_rfa.ops.state import RFAState


def recurrent_step(call: OperatorCall, statistics: FarStatistics | None) -> tuple[torch.Tensor, RFAState]:
    """RFA of one new token, whose call has a state, in float32 or float64; output (B, Hk, G, 1, M).

    Rows whose token is padding (`layout.valid`) get zeros and keep their state.
    """
    assert call.state is not None
    query, key, value, far, window, scaling, state = (
        call.query, call.key, call.value, call.far, call.window, call.scaling, call.state,
    )  # fmt: skip
    sink_logits = call.sink_logits
    valid = call.layout.valid.to(query.device) if call.layout.valid is not None else None
    present = torch.ones(1, 1, dtype=torch.bool, device=query.device) if valid is None else valid
    log_gate = far.log_gate(key)
    if log_gate is not None:  # what is far counts from the new token on
        forgotten = torch.where(present, log_gate.squeeze(-1), 0.0)
        state = dataclasses.replace(state, log_max=state.log_max.to(query.dtype) + forgotten)
    if window:
        state = _write(state, key, value, window, present)
        near = _near(query, state, window, scaling)
    else:
        state = _fold(state, key, value, present, far, scaling)
        near = None
    features, log_scale = far.query_features(query, scaling)
    products = features @ state.kv_state.to(query.dtype).unsqueeze(2)
    log_scale = log_scale + (state.log_max.to(query.dtype) + far.log_gamma())[:, :, None, None]
    far_part = Part(products[..., :-1], products[..., -1], log_scale)
    if sink_logits is not None:
        sink_logits = sink_logits.unsqueeze(-1).to(query.dtype)
    counted = present.view(-1, 1, 1, 1)
    output = combine(near, far_part, far.alive().view(-1, 1, 1), sink_logits, statistics, counted)
    steps = torch.ones_like(state.count) if valid is None else valid[:, 0].to(state.count)
    state = dataclasses.replace(state, count=state.count + steps)
    if window:
        state = _roll(state, window, far, scaling, moved=steps > 0)
    return output * counted.unsqueeze(-1), state


def _write(state: RFAState, key: torch.Tensor, value: torch.Tensor, window: int, present: torch.Tensor) -> RFAState:
    """Put the new token into its place among the near keys, and among the sinks if it is one of the first."""
    count = state.count.to(key.device)
    slot = window + count % window
    near = [_put(t, new, slot, present) for t, new in ((state.near_key, key), (state.near_value, value))]
    sinks = [state.sink_key, state.sink_value]
    size = state.sink_key.shape[2]
    if size and int(state.count.min()) < size:
        first = present & (count < size).unsqueeze(-1)
        sinks = [_put(t, new, count.clamp_max(size - 1), first) for t, new in zip(sinks, (key, value), strict=True)]
    return dataclasses.replace(state, near_key=near[0], near_value=near[1], sink_key=sinks[0], sink_value=sinks[1])


def _put(table: torch.Tensor, new: torch.Tensor, slot: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """table (B, H, S, D) with new (B, H, 1, D) at `slot` (B,), in the rows that are present (B or 1, 1)."""
    index = slot.view(-1, 1, 1, 1).expand(-1, table.shape[1], 1, table.shape[3])
    new = new.to(table.dtype)
    return table.scatter(2, index, torch.where(present[:, :, None, None], new, table.gather(2, index)))


def _near(query: torch.Tensor, state: RFAState, window: int, scaling: float) -> Part:
    count = state.count.to(query.device)[:, None]
    slots = torch.arange(2 * window, device=query.device)
    own = slots <= window + count % window
    previous = (slots >= window) | (count >= window)
    sinks = (count >= 2 * window).expand(-1, state.sink_key.shape[2])
    visible = torch.cat([sinks, own & previous], dim=-1)[:, None, None, None, :]
    keys = torch.cat([state.sink_key, state.near_key], dim=2).to(query.dtype).unsqueeze(2)
    values = torch.cat([state.sink_value, state.near_value], dim=2).to(query.dtype).unsqueeze(2)
    return near_part((query * scaling) @ keys.mT, values, visible)


def _fold(
    state: RFAState, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, far: FarKernel, scaling: float,
    behind: torch.Tensor | None = None,
) -> RFAState:  # fmt: skip
    """Add keys (B, H, C, D) to the far sums; keep (B or 1, C) bool; behind (B, H, C), log g summed behind each."""
    features, log_scale = far.key_features(key.unsqueeze(2), scaling)
    if behind is not None:
        log_scale = log_scale + behind.unsqueeze(2)
    added, peak = chunk_sums(features, log_scale, value.unsqueeze(2), keep.unsqueeze(1))
    sums, maximum = merge_states(
        (state.kv_state.to(key.dtype), state.log_max.to(key.dtype)), (added.squeeze(2), peak.squeeze(2))
    )
    return dataclasses.replace(state, kv_state=sums, log_max=maximum)


def _roll(state: RFAState, window: int, far: FarKernel, scaling: float, moved: torch.Tensor) -> RFAState:
    """Where a chunk has just been filled, the chunk before it becomes far."""
    full = (state.count % window == 0) & moved  # on the CPU: no waiting for a GPU
    if not bool(full.any()):
        return state
    device = state.near_key.device
    chunk = (state.count // window - 2).to(device).unsqueeze(-1)  # the one that becomes far; -1 if there is none yet
    slots = torch.arange(window, device=device)
    keep = (chunk >= 0) & ~((chunk == 0) & (slots < state.sink_key.shape[2])) & full.to(device).unsqueeze(-1)
    keys, values = (t.to(far.omega.dtype) for t in (state.near_key, state.near_value))
    log_gate, behind = far.log_gate(keys), None
    if log_gate is not None:
        behind = log_gate[..., 1:].flip(-1).cumsum(-1).flip(-1)[..., :window]
    state = _fold(state, keys[:, :, :window], values[:, :, :window], keep, far, scaling, behind)
    rows = full.to(device).view(-1, 1, 1, 1)

    def shift(table: torch.Tensor) -> torch.Tensor:
        return torch.where(rows, torch.cat([table[:, :, window:], torch.zeros_like(table[:, :, window:])], 2), table)

    return dataclasses.replace(state, near_key=shift(state.near_key), near_value=shift(state.near_value))
