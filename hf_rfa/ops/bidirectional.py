"""The bidirectional operator in chunks, for encoders: far keys lie on both sides.

Chunk c attends exactly to chunks c - 1, c, c + 1, to the sinks and to the keys that its document keeps; its far sums
are those of `ops.both_sides`.
"""

from collections.abc import Iterator

import torch

from hf_rfa.ops.both_sides import far_states
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
from hf_rfa.ops.combine import Part, near_part
from hf_rfa.ops.encoder_selection import choose_encoder_keys
from hf_rfa.ops.kept_part import KeptPart
from hf_rfa.ops.layout import Plan, PlanSpec
from hf_rfa.ops.scan import chunk_sums, sums_of_members
from hf_rfa.ops.state import RFAState
from hf_rfa.ops.tiles import ShortRule


def chunked_bidirectional(call: OperatorCall, short: ShortRule | None = None) -> tuple[torch.Tensor, RFAState | None]:
    """Bidirectional RFA of a call in float32 or float64; output (B, Hk, G, N, M), zero for the `short`
    documents.

    The keys of the initial state are far keys of the row's first document; the sums of the final state hold
    all keys of the row's last document, kept keys included (and those of the initial state, if that document is the
    first). Such a state has no near keys.
    """
    run = BidirectionalPass(call, short)
    outputs = [finish(near, far, call, run.plan, span) for span, near, far in run.blocks()]
    output = from_chunks(torch.cat(outputs, dim=2), run.plan, call.query.shape[2], call.query.shape[3])
    return output, run.final_state() if call.output_final_state else None


class BidirectionalPass:
    """One pass over the chunks of a call: `blocks` yields both parts of each block, `final_state` gives the state."""

    def __init__(
        self, call: OperatorCall, short: ShortRule | None = None, same: "BidirectionalPass | None" = None
    ) -> None:
        """same: A pass over the same tokens with another far kernel, which keeps the same keys."""
        batch, sinks = len(call.query), call.sink_tokens if call.window else 0
        state = call.state or call.empty_state()
        spec = PlanSpec(call.window or PURE_CHUNK, sinks, history=False, final=False, short=short)
        plan = call.layout.plan(call.query.shape[3], spec, torch.zeros_like(state.count), call.query.device)
        self.call, self.plan, self.state, self.sinks = call, plan, state, sinks
        self.keys, self.values = to_chunks(call.key, plan), to_chunks(call.value, plan)
        heads, dim, value_dim = self.keys.shape[1], self.keys.shape[-1], self.values.shape[-1]
        self.sink_keys = sink_table(self.keys, self.keys.new_zeros(batch, heads, sinks, dim), sinks)
        self.sink_values = sink_table(self.values, self.values.new_zeros(batch, heads, sinks, value_dim), sinks)
        self.features, self.log_scale = call.far.key_features(self.keys, call.scaling)
        self.kept: KeptPart | None
        if same is not None:
            self.kept = same.kept
        else:
            choice = choose_encoder_keys(call)
            self.kept = None if choice is None else KeptPart(call, plan, choice)
        self.start = (state.kv_state.to(self.keys.dtype), state.log_max.to(self.keys.dtype))

    def blocks(self, near: bool = True) -> Iterator[tuple[slice, Part | None, Part]]:
        """Yield (chunks, near part, far part without gamma) block by block, (B, Hk, n, G * C [, M]).

        near: False to leave the near part out.
        """
        call, plan = self.call, self.plan
        exact = bool(call.window) and near
        queries = queries_to_chunks(call.query, plan)
        near_chunks = 1 if call.window else -1  # exact chunks on each side; -1: not even its own
        log_scale = self.log_scale if self.kept is None else self.kept.without(self.log_scale)
        sums = chunk_sums(self.features, log_scale, self.values, plan.fold)
        states_of_blocks = far_states(sums, plan.segment_ids, near_chunks, self.start)
        if exact:
            near_keys = _neighbourhoods(self.keys, self.sink_keys, plan)
            near_values = _neighbourhoods(self.values, self.sink_values, plan)
        # Split, not sliced: the gradient of a slice is as long as the whole sequence, and there is one per block.
        parts = zip(queries.split(BLOCK_CHUNKS, dim=2), states_of_blocks, strict=True)
        begin = 0
        for block_queries, (block_states, block_maxima) in parts:
            span = slice(begin, begin + block_queries.shape[2])
            part = None
            if exact:
                scores = (block_queries * call.scaling) @ next(near_keys).mT
                visible = _visible(plan, span, self.sinks, call.query.shape[2])
                part = near_part(scores, next(near_values), visible)
                if self.kept is not None:
                    part = self.kept.joined(part, block_queries, span)
            features, log_scale = call.far.query_features(block_queries, call.scaling)
            products = features @ block_states
            yield span, part, Part(products[..., :-1], products[..., -1], log_scale + block_maxima.unsqueeze(-1))
            begin = span.stop

    def final_state(self) -> RFAState:
        """The sums of all keys, including sinks and near keys, of the last document in each row."""
        plan, state = self.plan, self.state
        whole = chunk_sums(self.features, self.log_scale, self.values, plan.token_mask)
        documents = torch.cat([plan.segment_ids[:, :1], plan.segment_ids], dim=1)  # the start is of the first
        start = (self.start[0].unsqueeze(2), self.start[1].unsqueeze(2))
        kv_state, log_max = sums_of_members([start, whole], (documents == documents[:, -1:]).unsqueeze(1))
        single = plan.segment_ids[:, -1].cpu() == 0
        count = plan.count + torch.where(single, state.count, torch.zeros_like(state.count))
        kept = (state.near_key, state.near_value, state.sink_key, state.sink_value)
        return RFAState(kv_state.squeeze(2), log_max.squeeze(2), *kept, count)


def _neighbourhoods(chunks: torch.Tensor, sink_table: torch.Tensor, plan: Plan) -> Iterator[torch.Tensor]:
    """(B, H, n, s + 3 C, D) of each block: the sinks, the previous chunk, the chunk itself and the next one."""
    sinks = take(sink_table, plan.sink_chunk + 1).split(BLOCK_CHUNKS, dim=2)
    blocks = chunks.split(BLOCK_CHUNKS, dim=2)
    # At both ends a chunk stands in for the missing one; `_visible` hides it.
    before = [blocks[0][:, :, :1], *(block[:, :, -1:] for block in blocks[:-1])]
    behind = [*(block[:, :, :1] for block in blocks[1:]), blocks[-1][:, :, -1:]]
    for sink, first, block, last in zip(sinks, before, blocks, behind, strict=True):
        around = torch.cat([first, block, last], dim=2)
        yield torch.cat([sink, around[:, :, :-2], block, around[:, :, 2:]], dim=3)


def _visible(plan: Plan, span: slice, sinks: int, groups: int) -> torch.Tensor:
    """(R, 1, n, G * C, s + 3 C) bool: which of its neighbourhood the queries of each chunk see."""
    total, chunk = plan.token_mask.shape[1:]
    center = torch.arange(span.start, span.stop, device=plan.token_mask.device)
    visible = [(plan.rank[:, span] > 1).unsqueeze(-1).expand(-1, -1, sinks)]
    for step in (-1, 0, 1):
        other = (center + step).clamp(0, total - 1)
        inside = (center + step == other) & (plan.segment_ids[:, other] == plan.segment_ids[:, span])
        visible.append(plan.token_mask[:, other] & inside.unsqueeze(-1))
    # A chunk that is all padding sees itself, so that no row is empty; its output is discarded.
    visible[2] = visible[2] | ~plan.token_mask[:, span].any(-1, keepdim=True)
    return torch.cat(visible, dim=-1)[:, None, :, None, :].expand(-1, -1, -1, groups * chunk, -1)
