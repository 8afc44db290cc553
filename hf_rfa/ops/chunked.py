"""The causal operator in chunks: O(N) time and memory, exactly the reference's numbers.

Chunk c attends exactly to chunks c - 1 and c and to the sinks, and to all earlier keys through a running sum of
features. `window = 0` has no exact part: the own chunk goes through the features too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hf_rfa.feature_maps import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.chunks import (
    BLOCK_CHUNKS,
    PURE_CHUNK,
    finish,
    from_chunks,
    queries_to_chunks,
    sink_table,
    take,
    to_chunks,
)
from hf_rfa.ops.combine import FarStatistics, Part, near_part
from hf_rfa.ops.layout import Plan, PlanSpec
from hf_rfa.ops.scan import append_ones, chunk_sums, scan_chunks
from hf_rfa.ops.state import RFAState


def chunked_causal(
    call: OperatorCall, output_final_state: bool, statistics: FarStatistics | None
) -> tuple[torch.Tensor, RFAState | None]:
    """Causal RFA of a call in float32 or float64.

    Returns the output (B, Hk, G, N, M) and the state after the last token, if wanted.
    """
    run = CausalPass(call, output_final_state)
    outputs = [finish(near, far, call, run.plan, span, statistics) for span, near, far in run.blocks()]
    output = from_chunks(torch.cat(outputs, dim=2), run.plan, call.query.shape[2], call.query.shape[3])
    return output, run.final_state() if output_final_state else None


class CausalPass:
    """One walk over the chunks of a call: `blocks` yields the two parts of each block, `final_state` what remains."""

    def __init__(self, call: OperatorCall, output_final_state: bool) -> None:
        query, key, value, window = call.query, call.key, call.value, call.window
        batch, heads, groups, length, dim = query.shape
        chunk = window or PURE_CHUNK
        sinks = call.sink_tokens if window else 0
        state = call.state or call.empty_state()
        history = bool(window) and call.state is not None
        spec = PlanSpec(chunk, sinks, lag=2 if window else 1, history=history, final=output_final_state)
        plan = call.layout.plan(length, spec, state.count, query.device)
        if history:
            near_key, near_value = state.near_key.to(key.dtype), state.near_value.to(value.dtype)
            key, value = torch.cat([near_key, key], dim=2), torch.cat([near_value, value], dim=2)
            query = torch.cat([query.new_zeros(batch, heads, groups, 2 * chunk, dim), query], dim=3)
        self.call, self.plan, self.state, self.lag = call, plan, state, spec.lag
        self.keys, self.values = to_chunks(key, plan), to_chunks(value, plan)
        self.queries = queries_to_chunks(query, plan)
        self.sink_keys = sink_table(self.keys, state.sink_key, sinks)
        self.sink_values = sink_table(self.values, state.sink_value, sinks)
        self.carry, self.carry_peak = state.kv_state.to(key.dtype), state.log_max.to(key.dtype)
        log_gate = call.far.log_gate(self.keys)
        self.log_gate = None if log_gate is None else log_gate.masked_fill(~plan.valid.unsqueeze(1), 0.0)
        if self.log_gate is not None and history:  # the state counts from its last token, the blocks from their first
            remembered = plan.valid & ~plan.asked
            self.carry_peak = self.carry_peak - torch.where(remembered.unsqueeze(1), self.log_gate, 0.0).sum((-2, -1))

    def blocks(self) -> Iterator[tuple[slice, Part | None, Part]]:
        """(chunks, near part, far part without gamma) of one block after the other, (B, Hk, n, G * C [, M])."""
        far, scaling, plan, groups = self.call.far, self.call.scaling, self.plan, self.call.query.shape[2]
        for block in self._split():
            states, maxima = _far_states(block, far, plan, self.lag, scaling, self.carry, self.carry_peak)
            features, log_scale = far.query_features(block.queries, scaling)
            if block.decay is not None:
                log_scale = log_scale + block.own(block.decay).repeat(1, 1, 1, groups)
            if self.call.window:
                near = _near(block, plan, scaling)
                products = features @ states
                far_part = Part(products[..., :-1], products[..., -1], log_scale + maxima.unsqueeze(-1))
            else:
                near = None
                far_part = _pure_part(block, features, log_scale, states, maxima, far, plan, scaling)
            self.carry, self.carry_peak = states[:, :, -1], maxima[:, :, -1]
            if block.decay is not None:
                self.carry_peak = self.carry_peak + block.decay[:, :, -1, -1]  # the next block counts from here
            yield block.span, near, far_part

    def final_state(self) -> RFAState:
        """The state after the last token, once `blocks` is exhausted."""
        return _final_state(
            self.state, self.plan, self.keys, self.values, self.sink_keys, self.sink_values, self.carry,
            self.carry_peak, self.call.window,
        )  # fmt: skip

    def _split(self) -> Iterator["_Block"]:
        # Split and not sliced: the gradient of a slice is as long as the whole sequence, and there is one a block.
        sink_chunk = self.plan.sink_chunk + 1
        sinks = (take(self.sink_keys, sink_chunk), take(self.sink_values, sink_chunk))
        gate = self.keys[..., :0] if self.log_gate is None else self.log_gate.unsqueeze(-1)
        whole = (self.queries, *sinks, self.keys, self.values, gate)
        leads = [x[:, :, :0] for x in (self.keys, self.values, gate)]
        start = 0
        for q, sink_k, sink_v, *own in zip(*(x.split(BLOCK_CHUNKS, dim=2) for x in whole), strict=True):
            k, v, g = (torch.cat(pair, dim=2) for pair in zip(leads, own, strict=True))
            decay = None if self.log_gate is None else g.squeeze(-1).cumsum(-1)
            yield _Block(slice(start, start + q.shape[2]), q, k, v, sink_k, sink_v, decay)
            leads = [x[:, :, -self.lag :] for x in (k, v, g)]
            start += q.shape[2]


@dataclass(frozen=True)
class _Block:
    """A few chunks that are handled at once: n of their own, t <= lag before them (none before the first block).

    queries (B, H, n, G * C, D); keys, values (B, H, t + n, C, D or M); sink_keys, sink_values (B, H, n, s, D or M);
    decay (B, H, t + n, C), the sum of log g from the chunk's first slot on; None = no gate.
    """

    span: slice
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    decay: torch.Tensor | None

    @property
    def lead(self) -> int:
        """t, the number of chunks before the block's own."""
        return self.keys.shape[2] - self.queries.shape[2]

    @property
    def offset(self) -> torch.Tensor:
        """(B, H, t + n) sum of log g from the block's first own slot to the start of each chunk."""
        # Counted anew in every block, and apart from the chunks' own sums: long sequences then lose no digits.
        assert self.decay is not None
        total = self.decay[..., -1]
        before = total.cumsum(-1) - total
        return before - before[..., self.lead, None]

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """The block's own chunks of `keys` or `values`."""
        return x[:, :, self.lead :]

    def previous(self, x: torch.Tensor) -> torch.Tensor:
        """The chunk before each; the one before the first of all is a stand-in that nobody sees."""
        return x[:, :, self.lead - 1 : -1] if self.lead else torch.cat([x[:, :, :1], x[:, :, :-1]], dim=2)


def _far_states(
    block: _Block, far: FarKernel, plan: Plan, lag: int, scaling: float, carry: torch.Tensor, carry_peak: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each chunk of the block reads: the sums over the chunks up to `lag` before it, as of its first slot."""
    span, document, device = block.span, plan.document, carry.device
    first, last = max(0, span.start - lag), max(0, span.stop - lag)
    # The carry is what the chunk before the block read; before the first block, what the initial state holds.
    before = document[:, span.start - 1 : span.start] if span.start else torch.zeros_like(document[:, :1])
    keep = document[:, span] == before
    if first == last:
        shape = (*carry.shape[:2], span.stop - span.start)
        maximum = carry_peak.unsqueeze(-1).masked_fill(~keep.unsqueeze(1), -torch.inf).expand(shape)
        kept = torch.where(keep[:, None, :, None, None], carry.unsqueeze(2), 0.0)
        if block.decay is not None:
            maximum = maximum + block.own(block.offset)
        return kept.expand(*shape, *carry.shape[2:]), maximum
    keys, values = block.keys[:, :, : last - first], block.values[:, :, : last - first]
    features, log_scale = far.key_features(keys, scaling)
    if block.decay is not None:
        log_scale = log_scale - block.decay[:, :, : last - first]
    sums, peak = chunk_sums(features, log_scale, values, plan.fold[:, first:last])
    if block.decay is not None:
        peak = peak - block.offset[:, :, : last - first]
    readers = torch.arange(span.start, span.stop, device=device)
    added = torch.arange(first, last, device=device)
    member = (added <= readers[:, None] - lag) & (document[:, span, None] == document[:, None, first:last])
    states, maximum = scan_chunks(sums, peak, member, carry, carry_peak, keep)
    return states, maximum if block.decay is None else maximum + block.own(block.offset)


def _near(block: _Block, plan: Plan, scaling: float) -> Part:
    """Exact attention of each chunk over the sinks, the chunk before and itself."""
    keys = torch.cat([block.sink_keys, block.previous(block.keys), block.own(block.keys)], dim=3)
    values = torch.cat([block.sink_values, block.previous(block.values), block.own(block.values)], dim=3)
    scores = (block.queries * scaling) @ keys.mT
    chunk, device, span = block.keys.shape[3], keys.device, block.span
    groups = block.queries.shape[3] // chunk
    document, valid, rank = plan.document[:, span], plan.valid[:, span], plan.rank[:, span]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    # Padding sees itself, so that no row is empty; nobody sees padding.
    own = causal & (valid[:, :, None, :] | torch.eye(chunk, dtype=torch.bool, device=device))
    chunks = torch.arange(span.start, span.stop, device=device)
    before = (chunks - 1).clamp_min(0)
    same = (plan.document[:, before] == document) & (chunks > 0)
    behind = (plan.valid[:, before] & same[..., None])[:, :, None, :].expand(-1, -1, chunk, -1)
    sink = (rank > 1)[:, :, None, None].expand(-1, -1, chunk, block.sink_keys.shape[3])
    visible = torch.cat([sink, behind, own], dim=-1).repeat(1, 1, groups, 1)
    return near_part(scores, values, visible.unsqueeze(1))


def _pure_part(
    block: _Block, features: torch.Tensor, log_scale: torch.Tensor, states: torch.Tensor, maxima: torch.Tensor,
    far: FarKernel, plan: Plan, scaling: float,
) -> Part:  # fmt: skip
    """`window = 0`: the sums of the chunks before, plus the own chunk's keys up to each query.

    The maximum runs over the keys up to each query (not over the whole chunk): a later key changes nothing.
    """
    keys, values = block.own(block.keys), block.own(block.values)
    key_features, key_log_scale = far.key_features(keys, scaling)
    if block.decay is not None:
        key_log_scale = key_log_scale - block.own(block.decay)
    chunk, groups = keys.shape[3], features.shape[3] // keys.shape[3]
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=keys.device).tril()
    key_log_scale = key_log_scale.masked_fill(~plan.valid[:, None, block.span], -torch.inf)
    maximum = torch.maximum(key_log_scale.detach().cummax(-1).values, maxima.unsqueeze(-1))
    base = maximum.masked_fill(maximum == -torch.inf, 0.0)
    exponent = (key_log_scale.unsqueeze(-2) - base.unsqueeze(-1)).masked_fill(~causal, -torch.inf)
    weights = exponent.exp().repeat(1, 1, 1, groups, 1) * (features @ key_features.mT)
    base = base.repeat(1, 1, 1, groups)
    products = weights @ append_ones(values)
    products = products + (maxima.unsqueeze(-1) - base).exp().unsqueeze(-1) * (features @ states)
    return Part(products[..., :-1], products[..., -1], log_scale + maximum.repeat(1, 1, 1, groups))


def _final_state(
    state: RFAState, plan: Plan, keys: torch.Tensor, values: torch.Tensor, sink_keys: torch.Tensor,
    sink_values: torch.Tensor, carry: torch.Tensor, carry_peak: torch.Tensor, window: int,
) -> RFAState:  # fmt: skip
    count = plan.count.expand(carry.shape[0]).clone()
    if not window:
        return RFAState(carry, carry_peak, state.near_key, state.near_value, state.sink_key, state.sink_value, count)
    last = plan.last[:, None]
    both = torch.cat([last - 1, last], dim=1)
    # Slots that hold no token of the document are zero, so that the state is a function of the tokens alone.
    belongs = (both >= 0) & (plan.document.gather(1, both.clamp_min(0)) == plan.document.gather(1, last))
    filled = take(plan.valid.unsqueeze(1), both.clamp_min(0)) & belongs[:, None, :, None]
    first = plan.sink_chunk.gather(1, last) + 1
    given = (torch.arange(sink_keys.shape[3], device=last.device) < plan.count.to(last.device)[:, None])[
        :, None, :, None
    ]

    def near(chunks: torch.Tensor) -> torch.Tensor:
        return torch.where(filled.unsqueeze(-1), take(chunks, both.clamp_min(0)), 0.0).flatten(2, 3)

    def sinks(table: torch.Tensor) -> torch.Tensor:
        return torch.where(given, take(table, first).squeeze(2), 0.0)

    return RFAState(carry, carry_peak, near(keys), near(values), sinks(sink_keys), sinks(sink_values), count)
