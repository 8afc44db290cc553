"""The causal operator in chunks: O(N) time and memory, the same numbers as the reference.

Chunk c attends exactly to chunks c - 1 and c, to the sinks and to the keys that it keeps, and to all earlier keys
through a running sum of features. With `window = 0` nothing is exact: the chunk's own keys go through the features,
too. This module aligns the tokens, calls `causal.function` and builds the final state.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.exact_pass import Choice, choose_keys
from hf_rfa.ops.causal.function import PassSettings, causal_attention
from hf_rfa.ops.causal.keeping import decay_of_evicted, with_kept_keys
from hf_rfa.ops.causal.pass_inputs import PassInputs
from hf_rfa.ops.causal.passes import ChunkedPass
from hf_rfa.ops.chunks import PURE_CHUNK, take, tokens_of
from hf_rfa.ops.combine import Part
from hf_rfa.ops.layout import Plan, PlanSpec
from hf_rfa.ops.state import RFAState, accumulation_dtype
from hf_rfa.ops.tiles import ShortRule


def chunked_causal(call: OperatorCall, short: ShortRule | None = None) -> tuple[torch.Tensor, RFAState | None]:
    """Causal RFA of a call with q, k and v in their own dtype and the far kernel in float32 or float64.

    Returns the output (B, Hk, G, N, M), zero for the `short` documents, and the state after the last token, or None
    if it is not wanted.
    """
    aligned = align(call, short)
    settings = PassSettings(call.far, aligned.plan, call.window, call.scaling, call.statistics)
    output, kv_state, log_max = causal_attention(aligned.inputs, settings)
    final = None
    if call.output_final_state:
        final = final_state(aligned, kv_state, log_max, call.window)
        if aligned.choice is not None:
            last, mass = aligned.choice.last, aligned.choice.mass
            final = with_kept_keys(final, last, mass, aligned.inputs, aligned.state, aligned.plan)
    return tokens_of(output, aligned.plan, call.query.shape[3]), final


class CausalPass:
    """The near and the far part of a call before they are combined; without gradients."""

    def __init__(self, call: OperatorCall) -> None:
        aligned = align(call)
        self.plan = aligned.plan
        self._pass = ChunkedPass(aligned.inputs, call.far, self.plan, call.window, call.scaling)

    def blocks(self) -> Iterator[tuple[slice, Part | None, Part]]:
        """Yield (chunks, near part, far part without gamma) block by block, (B, Hk, n, G * C [, M])."""
        heads = self._pass.inputs.key.shape[1]
        for span, _, parts, _, _ in self._pass.forward():
            # Cloned, because the next block overwrites it.
            far, far_log = (x.unflatten(0, (-1, heads)) for x in (parts.far.clone(), parts.far_log))
            near = None
            if parts.near is not None and parts.near_log is not None:
                value, log = (x.unflatten(0, (-1, heads)) for x in (parts.near, parts.near_log))
                near = Part(value, torch.ones_like(log), log)
            yield span, near, Part(far[..., :-1], far[..., -1], far_log)


@dataclass(frozen=True)
class Aligned:
    """The tokens of a call behind the near keys of the state; every document begins at a chunk boundary.

    `inputs` holds the `choice`, too, if there is one.
    """

    inputs: PassInputs
    plan: Plan
    state: RFAState
    choice: Choice | None = None


def align(call: OperatorCall, short: ShortRule | None = None) -> Aligned:
    """`lay_out`, with the keys that each chunk keeps, and the exact part, if the call keeps any."""
    aligned = lay_out(call, short)
    return _with_choice(aligned, call) if call.kept_keys else aligned


def lay_out(call: OperatorCall, short: ShortRule | None = None) -> Aligned:
    """Lay the tokens of a call out in chunks, except for the `short` documents."""
    query, key, value, window = call.query, call.key, call.value, call.window
    batch, heads, groups, length, dim = query.shape
    chunk = window or PURE_CHUNK
    sinks = call.sink_tokens if window else 0
    state = call.state or call.empty_state()
    history = bool(window) and call.state is not None
    spec = PlanSpec(chunk, sinks, history=history, final=bool(window) and call.output_final_state, short=short)
    plan = call.layout.plan(length, spec, state.count, query.device)
    if history:
        near_key, near_value = state.near_key.to(key.dtype), state.near_value.to(value.dtype)
        key, value = torch.cat([near_key, key], dim=2), torch.cat([near_value, value], dim=2)
        query = torch.cat([query.new_zeros(batch, heads, groups, 2 * chunk, dim), query], dim=3)
    if not plan.identity:
        key, value = take(key, plan.source), take(value, plan.source)
        query = take(query.flatten(1, 2), plan.source).unflatten(1, (heads, groups))
    wide = accumulation_dtype(key.dtype)
    decay, log_max = None, state.log_max.to(wide)
    if call.far.gate_weight is not None:
        log_gate = call.far.log_gate(key.to(wide))
        assert log_gate is not None
        log_gate = F.pad(log_gate, (0, plan.token_mask[0].numel() - key.shape[2])).unflatten(
            2, plan.token_mask.shape[1:]
        )
        log_gate = log_gate.masked_fill(~plan.token_mask.unsqueeze(1), 0.0)
        decay = log_gate.cumsum(-1)
        if history:  # log_max is relative to the last token in a state, to the first in a pass
            remembered = plan.token_mask & ~plan.asked
            log_max = log_max - torch.where(remembered.unsqueeze(1), log_gate, 0.0).sum((-2, -1))
    inputs = PassInputs(
        query, key, value, state.sink_key.to(key.dtype), state.sink_value.to(value.dtype), decay, _wide(call),
        state.kv_state.to(wide), log_max,
    )  # fmt: skip
    if call.most_kept:
        assert state.kept_key is not None
        assert state.kept_value is not None
        kept_key, kept_value = state.kept_key.to(key.dtype), state.kept_value.to(value.dtype)
        inputs = dataclasses.replace(inputs, kept_key=kept_key, kept_value=kept_value)
    return Aligned(inputs, plan, state)


def _with_choice(aligned: Aligned, call: OperatorCall) -> Aligned:
    inputs, plan, state = aligned.inputs, aligned.plan, aligned.state
    chunked = ChunkedPass(inputs, call.far, plan, call.window, call.scaling, may_bound=False)
    choice = choose_keys(chunked, state)
    far_decay = None if inputs.decay is None else decay_of_evicted(choice, inputs.decay, state, plan)
    inputs = dataclasses.replace(
        inputs, kept=choice.kept, kept_mask=choice.kept_mask, evicted=choice.evicted,
        evicted_mask=choice.evicted_mask, far_decay=far_decay, near=choice.near, near_log=choice.near_log,
    )  # fmt: skip
    return Aligned(inputs, plan, state, choice)


def _wide(call: OperatorCall) -> torch.Tensor | None:
    return None if call.sink_logits is None else call.sink_logits.to(accumulation_dtype(call.query.dtype))


def final_state(aligned: Aligned, kv_state: torch.Tensor, log_max: torch.Tensor, window: int) -> RFAState:
    """The state after a call, built from the far sums after its last chunk."""
    plan, state, inputs = aligned.plan, aligned.state, aligned.inputs
    count = plan.count.expand(kv_state.shape[0]).clone()
    if not window:
        return RFAState(kv_state, log_max, state.near_key, state.near_value, state.sink_key, state.sink_value, count)
    last = plan.last[:, None]
    both = torch.cat([last - 1, last], dim=1)
    # Slots without a token of the document are zero, so that the state depends on the tokens alone.
    belongs = (both >= 0) & (plan.segment_ids.gather(1, both.clamp_min(0)) == plan.segment_ids.gather(1, last))
    filled = take(plan.token_mask.unsqueeze(1), both.clamp_min(0)) & belongs[:, None, :, None]
    first = plan.sink_chunk.gather(1, last)
    sinks = inputs.sink_key.shape[2]
    slots = torch.arange(sinks, device=last.device)
    given = (slots < plan.count.to(last.device)[:, None])[:, None, :, None]
    near_index, sink_index = _slots(both, window), (first.clamp_min(0) * window + slots)
    stored = (first < 0)[:, None, :, None]

    def near(x: torch.Tensor) -> torch.Tensor:
        return torch.where(filled.flatten(2).unsqueeze(-1), take(x, near_index.clamp_max(x.shape[2] - 1)), 0.0)

    def sink(x: torch.Tensor, of_state: torch.Tensor) -> torch.Tensor:
        new = take(x, sink_index.clamp_max(x.shape[2] - 1))
        return torch.where(given, torch.where(stored, of_state, new), 0.0)

    return RFAState(
        kv_state, log_max, near(inputs.key), near(inputs.value), sink(inputs.key, inputs.sink_key),
        sink(inputs.value, inputs.sink_value), count,
    )  # fmt: skip


def _slots(chunks: torch.Tensor, size: int) -> torch.Tensor:
    """Slots (R, n * C) of the chunks (R, n), which may be -1."""
    slots = chunks.clamp_min(0).unsqueeze(-1) * size + torch.arange(size, device=chunks.device)
    return slots.flatten(1)
