"""The bidirectional operator in chunks, for encoders: far keys lie on both sides.

Chunk c attends exactly to chunks c - 1, c, c + 1, to the sinks and to the keys that its document keeps. Far sums are
prefix plus suffix sums: subtracting the near chunks from a total would lose digits to cancellation.
"""

from collections.abc import Iterator

import torch

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
from hf_rfa.ops.scan import chunk_sums, merge_states, scan_chunks
from hf_rfa.ops.state import RFAState
from hf_rfa.ops.tiles import ShortRule

Sums = tuple[torch.Tensor, torch.Tensor]


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
        nothing = (torch.zeros_like(self.start[0]), torch.full_like(self.start[1], -torch.inf))
        near_chunks = 1 if call.window else -1  # exact chunks on each side; -1: not even its own
        log_scale = self.log_scale if self.kept is None else self.kept.without(self.log_scale)
        sums = chunk_sums(self.features, log_scale, self.values, plan.fold)
        before = _running(sums, plan.segment_ids, near_chunks + 1, self.start)
        after = _running(_flip(sums), plan.segment_ids.flip(1), max(near_chunks + 1, 1), nothing)
        states, log_max = merge_states(before, _flip(after))
        if exact:
            near_keys = _neighbourhood(self.keys, self.sink_keys, plan).split(BLOCK_CHUNKS, dim=2)
            near_values = _neighbourhood(self.values, self.sink_values, plan).split(BLOCK_CHUNKS, dim=2)
        # Split, not sliced: the gradient of a slice is as long as the whole sequence, and there is one per block.
        parts = zip(*(x.split(BLOCK_CHUNKS, dim=2) for x in (queries, states, log_max)), strict=True)
        begin = 0
        for number, (block_queries, block_states, block_maxima) in enumerate(parts):
            span = slice(begin, begin + block_queries.shape[2])
            part = None
            if exact:
                scores = (block_queries * call.scaling) @ near_keys[number].mT
                visible = _visible(plan, span, self.sinks, call.query.shape[2])
                part = near_part(scores, near_values[number], visible)
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
        kv_state, log_max = (t[:, :, -1] for t in _running(whole, plan.segment_ids, 0, self.start))
        single = plan.segment_ids[:, -1].cpu() == 0
        count = plan.count + torch.where(single, state.count, torch.zeros_like(state.count))
        kept = (state.near_key, state.near_value, state.sink_key, state.sink_value)
        return RFAState(kv_state, log_max, *kept, count)


def _running(sums: Sums, segment_ids: torch.Tensor, lag: int, start: Sums) -> Sums:
    """Per chunk, the sums over the chunks of its document that are at least `lag` chunks earlier."""
    states, first, kv_state = [], 0, start
    lead_sums, lead_log_max = sums[0][:, :, :0], sums[1][:, :, :0]
    for block_sums, block_log_max in zip(*(x.split(BLOCK_CHUNKS, dim=2) for x in sums), strict=True):
        last = first + block_log_max.shape[2]
        all_sums, all_log_max = torch.cat([lead_sums, block_sums], 2), torch.cat([lead_log_max, block_log_max], 2)
        low, count = max(0, first - lag), max(0, last - lag) - max(0, first - lag)
        # At least one chunk, even if none is read, so that the maximum is over a non-empty set.
        added = torch.arange(low, low + max(1, count), device=segment_ids.device)
        readers = torch.arange(first, last, device=segment_ids.device)
        member = (added <= readers[:, None] - lag) & (segment_ids[:, first:last, None] == segment_ids[:, None, added])
        before = segment_ids[:, first - 1 : first] if first else segment_ids[:, :1]
        keep = segment_ids[:, first:last] == before
        states.append(
            scan_chunks(all_sums[:, :, : len(added)], all_log_max[:, :, : len(added)], member, *kv_state, keep)
        )
        kv_state = (states[-1][0][:, :, -1], states[-1][1][:, :, -1])
        if lag:
            lead_sums, lead_log_max = all_sums[:, :, -lag:], all_log_max[:, :, -lag:]
        first = last
    return torch.cat([s for s, _ in states], 2), torch.cat([m for _, m in states], 2)


def _flip(sums: Sums) -> Sums:
    return sums[0].flip(2), sums[1].flip(2)


def _neighbourhood(chunks: torch.Tensor, sink_table: torch.Tensor, plan: Plan) -> torch.Tensor:
    """(B, H, n, s + 3 C, D): the sinks, the previous chunk, the chunk itself and the next one."""
    before, behind = (
        torch.cat([chunks[:, :, :1], chunks[:, :, :-1]], 2),
        torch.cat([chunks[:, :, 1:], chunks[:, :, -1:]], 2),
    )
    return torch.cat([take(sink_table, plan.sink_chunk + 1), before, chunks, behind], dim=3)


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
