"""The bidirectional operator in chunks, for encoders: far keys lie on both sides.

Chunk c attends exactly to chunks c - 1, c, c + 1 and to the sinks. Far sums are prefix plus suffix sums: subtracting
the near chunks from a total would cancel digits.
"""

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
from hf_rfa.ops.combine import FarStatistics, Part, near_part
from hf_rfa.ops.layout import Plan, PlanSpec
from hf_rfa.ops.scan import chunk_sums, merge_states, scan_chunks
from hf_rfa.ops.state import RFAState

Sums = tuple[torch.Tensor, torch.Tensor]


def chunked_bidirectional(
    call: OperatorCall, output_final_state: bool, statistics: FarStatistics | None
) -> tuple[torch.Tensor, RFAState | None]:
    """Bidirectional RFA of a call in float32 or float64; output (B, Hk, G, N, M).

    The keys of the initial state are far keys of the row's first document; the final state holds all keys of the row's
    last document (and of the initial state, if that is the first) in its sums. Such a state has no near keys.
    """
    query, far, window, scaling = call.query, call.far, call.window, call.scaling
    batch, _, groups, length, _ = query.shape
    chunk = window or PURE_CHUNK
    sinks = call.sink_tokens if window else 0
    state = call.state or call.empty_state()
    spec = PlanSpec(chunk, sinks, lag=0, history=False, final=False)
    plan = call.layout.plan(length, spec, torch.zeros_like(state.count), query.device)
    keys, values = to_chunks(call.key, plan), to_chunks(call.value, plan)
    queries = queries_to_chunks(query, plan)
    sink_keys = sink_table(keys, keys.new_zeros(batch, keys.shape[1], sinks, keys.shape[-1]), sinks)
    sink_values = sink_table(values, values.new_zeros(batch, keys.shape[1], sinks, values.shape[-1]), sinks)

    features, log_scale = far.features(keys, scaling)
    start = (state.kv_state.to(keys.dtype), state.log_max.to(keys.dtype))
    nothing = (torch.zeros_like(start[0]), torch.full_like(start[1], -torch.inf))
    near_chunks = 1 if window else -1  # chunks on each side that are exact; -1: not even the own one
    sums = chunk_sums(features, log_scale, values, plan.fold)
    before = _running(sums, plan.document, near_chunks + 1, start)
    after = _running(_flip(sums), plan.document.flip(1), max(near_chunks + 1, 1), nothing)
    states, maxima = merge_states(before, _flip(after))

    outputs = []
    for first in range(0, keys.shape[2], BLOCK_CHUNKS):
        block = slice(first, min(first + BLOCK_CHUNKS, keys.shape[2]))
        near = _near(queries, keys, values, sink_keys, sink_values, plan, block, scaling) if window else None
        query_features, query_scale = far.features(queries[:, :, block], scaling)
        products = query_features @ states[:, :, block]
        part = Part(products[..., :-1], products[..., -1], query_scale + maxima[:, :, block].unsqueeze(-1))
        outputs.append(finish(near, part, call, plan, block, statistics))
    output = from_chunks(torch.cat(outputs, dim=2), plan, groups, length)
    if not output_final_state:
        return output, None
    # Every key, sinks and near ones too, of the document that each row ends with.
    whole = chunk_sums(features, log_scale, values, plan.valid)
    kv_state, log_max = (t[:, :, -1] for t in _running(whole, plan.document, 0, start))
    single = plan.document[:, -1].cpu() == 0
    count = plan.count + torch.where(single, state.count, torch.zeros_like(state.count))
    final = RFAState(kv_state, log_max, state.near_key, state.near_value, state.sink_key, state.sink_value, count)
    return output, final


def _running(sums: Sums, document: torch.Tensor, lag: int, start: Sums) -> Sums:
    """For every chunk, the sums over the chunks of its document that lie at least `lag` before it."""
    total, states = sums[1].shape[2], []
    carry = start
    for first in range(0, total, BLOCK_CHUNKS):
        last = min(first + BLOCK_CHUNKS, total)
        low, high = max(0, first - lag), max(0, last - lag)
        readers, added = torch.arange(first, last), torch.arange(low, high)
        member = (added <= readers[:, None] - lag).to(document.device)
        member = member & (document[:, first:last, None] == document[:, None, low:high])
        before = document[:, first - 1 : first] if first else document[:, :1]
        keep = document[:, first:last] == before
        if low == high:  # one chunk that nobody reads, so that the maximum is over something
            low, high, member = 0, 1, torch.zeros_like(keep).unsqueeze(-1)
        states.append(scan_chunks(sums[0][:, :, low:high], sums[1][:, :, low:high], member, *carry, keep))
        carry = (states[-1][0][:, :, -1], states[-1][1][:, :, -1])
    return torch.cat([s for s, _ in states], 2), torch.cat([m for _, m in states], 2)


def _flip(sums: Sums) -> Sums:
    return sums[0].flip(2), sums[1].flip(2)


def _near(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sink_keys: torch.Tensor,
    sink_values: torch.Tensor, plan: Plan, block: slice, scaling: float,
) -> Part:  # fmt: skip
    """Exact attention of each chunk over the sinks, the chunks on both sides and itself."""
    total, chunk, device = keys.shape[2], keys.shape[3], keys.device
    groups = queries.shape[3] // chunk
    center = torch.arange(block.start, block.stop, device=device)
    near_keys: list[torch.Tensor] = []
    near_values: list[torch.Tensor] = []
    for table, sink, target in ((keys, sink_keys, near_keys), (values, sink_values, near_values)):
        target.append(take(sink, plan.sink_chunk[:, block] + 1))
        target.extend(table[:, :, (center + step).clamp(0, total - 1)] for step in (-1, 0, 1))
    scores = (queries[:, :, block] * scaling) @ torch.cat(near_keys, dim=3).mT
    rank, document = plan.rank[:, block], plan.document[:, block]
    visible = [(rank > 1).unsqueeze(-1).expand(-1, -1, sink_keys.shape[3])]
    for step in (-1, 0, 1):
        other = (center + step).clamp(0, total - 1)
        inside = (center + step == other) & (plan.document[:, other] == document)
        visible.append(plan.valid[:, other] & inside.unsqueeze(-1))
    # A row without any key (all padding) looks at its own chunk, so that it is not empty; its output is dropped.
    visible[2] = visible[2] | ~plan.valid[:, block].any(-1, keepdim=True)
    mask = torch.cat(visible, dim=-1)[:, None, :, None, :].expand(-1, -1, -1, groups * chunk, -1)
    return near_part(scores, torch.cat(near_values, dim=3), mask)
