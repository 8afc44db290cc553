"""The kernel that chooses the kept keys: sequential over chunks, one program per row and key head.

The rule is that of `ops.kept_keys`. Everything is indexed by entries of the pool (see `exact`), so that a key keeps
its entry, and with it the attention that it received, for as long as it is exact. Two passes over the exact keys of a
chunk: the normaliser of each query, then what each key receives; where all kept keys fit into one tile, their scores
stay in registers in between. The keys that stay are those with the K largest (score, place) among the kept ones and
the chunk before.

Since chunks follow one another, what counts is the time that a chunk takes, which is mostly waiting: for memory,
for other threads. So a chunk's keys are loaded once for all query heads.
"""

import triton
import triton.language as tl

from hf_rfa.ops.triton.exact import pool_places, pool_tile
from hf_rfa.ops.triton.pieces import ADVANCES, ASKED, FOLLOWS, near_masks, slot_codes, tile

#: Scores above it are equal: the largest float32.
LARGEST = tl.constexpr(3.4028234663852886e38)
#: Above every number that `order` gives.
MORE_THAN_ANY = tl.constexpr(2**63 - 1)


@triton.jit
def scores_of(queries, keys, sees, scaling, PRECISION: tl.constexpr):
    """s q.k (BC, keys); -inf for keys that a query does not see."""
    return tl.where(sees, tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scaling, float("-inf"))


@triton.jit
def widen(scores, top, total):
    """Add a tile of scores to the maximum, and to the sum relative to it, of each query."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    return new_top, total * tl.exp(top - new_top) + tl.sum(tl.exp(scores - new_top[:, None]), 1)


@triton.jit
def receive(mass, index, weights, counts, share):
    """Add to each key's mass its weights from the queries that count for it, each times its `share`."""
    given = tl.sum(tl.where(counts, weights * share[:, None], 0.0), 0)
    there = index >= 0
    tl.store(mass + index, tl.load(mass + index, mask=there, other=0.0) + given, mask=there)


@triton.jit
def order(score, there, places):
    """One int64 per rival that grows with its score, then with its place; entries without a key come first.

    The bits of a float >= 0, read as an integer, grow with it.
    """
    bits = tl.where(score >= 0, tl.minimum(score, LARGEST).to(tl.int32, bitcast=True), -1)
    return (tl.where(there, bits, -2).to(tl.int64) << 32) | places


@triton.jit
def largest(rivals, places, number, BR: tl.constexpr):
    """Which of BR rivals, as `order` gives them, are the `number` largest; `places` count from 0 to BR."""
    # In ascending order those are the ones from the (BR - number)-th on.
    least = tl.sum(tl.where(places == BR - number, tl.sort(rivals), 0), 0)
    return rivals >= tl.where(number > 0, least, MORE_THAN_ANY)


@triton.jit
def choose(
    query, key, state_key, logits, codes, flags, ranks, numbers, position, size, mass, listed, evicted,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, code_row, flag_row, heads, groups, length, chunks, E,
    entries, scaling, least,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, BS: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, LOGITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (A,). Fills `listed` (A, chunks + 1, S + K) behind its first chunk and `evicted` (A, chunks, C), which
    come filled with the sinks and -1; adds to mass (A, G, entries). A head keeps as many keys as `numbers` (heads,)
    says, at most K. evicted[i] are the keys that leave after chunk i + 1, position and size (A, entries) are each
    key's number in its document and its |v|."""
    a = tl.program_id(0).to(tl.int64)
    N: tl.constexpr = S + K
    ONE: tl.constexpr = BN >= K
    row, head = a // heads, a % heads
    number = tl.load(numbers + head)
    rows, slots, places = tl.arange(0, BC), tl.arange(0, BN), tl.arange(0, BR)
    sink_slots = tl.arange(0, BS)
    query, key = query + row * query_b + head * query_h, key + row * key_b + head * key_h
    state_key, codes = state_key + a * E * D, codes + row * code_row
    flags, ranks = flags + row * flag_row, ranks + row * flag_row
    position, size, mass = position + a * entries, size + a * entries, mass + a * groups * entries
    listed, evicted = listed + a * (chunks + 1) * N, evicted + a * chunks * C
    distance = rows[:, None] - rows[None, :]
    for step in range(chunks):
        flag, start = tl.load(flags + step), step * C
        code = slot_codes(codes, step, chunks, rows, C)
        asked = ((code & ASKED) != 0)[:, None]
        before_code = slot_codes(codes, step - 1, chunks, rows, C)
        _sinks, sees_before, sees_own = near_masks(code, before_code, flag, rows, rows, C, 0)
        own_key = tile(key, start, rows, length, key_t, D, BD, C)
        before_key = tile(key, start - C, rows, length, key_t, D, BD, C)
        own_places, before_places = (
            pool_places(start, rows, length, E, C), pool_places(start - C, rows, length, E, C),
        )  # fmt: skip
        sinks = tl.load(listed + step * N + sink_slots, mask=sink_slots < S, other=-1)
        sink_keys = pool_tile(state_key, key, sinks, E, key_t, D, BD)
        if ONE:
            index = tl.load(listed + step * N + S + slots, mask=slots < K, other=-1)
            kept_keys = pool_tile(state_key, key, index, E, key_t, D, BD)
        for g in range(groups):
            received = mass + g * entries
            queries = tile(query + g * query_g, start, rows, length, query_t, D, BD, C)
            own = scores_of(queries, own_key, sees_own, scaling, PRECISION)
            before = scores_of(queries, before_key, sees_before, scaling, PRECISION)
            sink = scores_of(queries, sink_keys, (sinks >= 0)[None, :], scaling, PRECISION)
            if ONE:
                kept = scores_of(queries, kept_keys, (index >= 0)[None, :], scaling, PRECISION)
            top = tl.maximum(tl.maximum(tl.max(own, 1), tl.max(before, 1)), tl.max(sink, 1))
            if ONE:
                top = tl.maximum(top, tl.max(kept, 1))
                kept = tl.exp(kept - top[:, None])
                total = tl.sum(kept, 1)
            else:
                found, total = top, tl.zeros_like(top)
                for first in range(0, K, BN):
                    index = tl.load(listed + step * N + S + first + slots, mask=first + slots < K, other=-1)
                    if tl.max(index, 0) >= 0:  # empty at the beginning of a text, and where a head keeps fewer
                        kept_keys = pool_tile(state_key, key, index, E, key_t, D, BD)
                        kept = scores_of(queries, kept_keys, (index >= 0)[None, :], scaling, PRECISION)
                        found, total = widen(kept, found, total)
                top = found
            own, before = tl.exp(own - top[:, None]), tl.exp(before - top[:, None])
            total += tl.sum(own, 1) + tl.sum(before, 1) + tl.sum(tl.exp(sink - top[:, None]), 1)
            if LOGITS:
                total += tl.exp(tl.load(logits + head * groups + g) - top)
            share = 1 / total
            receive(received, own_places, own, asked & (distance >= least), share)
            receive(received, before_places, before, asked & (distance + C >= least), share)
            if ONE:
                receive(received, index, kept, asked, share)
            else:
                for first in range(0, K, BN):
                    index = tl.load(listed + step * N + S + first + slots, mask=first + slots < K, other=-1)
                    if tl.max(index, 0) >= 0:
                        kept_keys = pool_tile(state_key, key, index, E, key_t, D, BD)
                        kept = scores_of(queries, kept_keys, (index >= 0)[None, :], scaling, PRECISION)
                        receive(received, index, tl.exp(kept - top[:, None]), asked, share)
        # What this program wrote to memory is read by other threads than those that wrote it.
        tl.debug_barrier()
        next_list = listed + (step + 1) * N + S
        old = tl.load(listed + step * N + S + places, mask=places < K, other=-1)
        if (flag & ADVANCES) != 0:
            left = tl.full((), 0, tl.int32)
            if step > 0:
                left = tl.load(flags + step - 1) & ADVANCES
            leaving = (places >= K) & (places < K + C) & (left != 0)
            entry = tl.where(leaving, E + start - C + places - K, old)
            token = tl.load(position + entry, mask=entry >= 0, other=-1)
            there = token >= 0
            best, broken = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.int32)
            for g in range(groups):
                given = tl.load(mass + g * entries + entry, mask=there, other=0.0)
                best, broken = tl.maximum(best, given), broken | (given != given)
            queries_seen = ((tl.load(ranks + step) + 1) * C - token - least).to(tl.float32)
            score = best * tl.load(size + entry, mask=there, other=0.0) / queries_seen
            score = tl.where((broken != 0) | (score != score), -1.0, score)
            is_among = largest(order(score, there, places), places, number, BR)
            stays, goes = there & is_among, there & (is_among == 0)
            # One running count of both: of those that stay in the low 16 bits.
            both = tl.cumsum(stays.to(tl.int32) + (goes.to(tl.int32) << 16), 0)
            # In the order of the pool, which is that of the text; empty places come first.
            slot = K - tl.sum(stays.to(tl.int32), 0) + (both & 0xFFFF) - 1
            tl.store(next_list + slot, entry, mask=stays)
            tl.store(evicted + start - C + (both >> 16) - 1, entry, mask=goes)
        else:
            follows = tl.full((), FOLLOWS, tl.int32)
            if step + 1 < chunks:
                follows = tl.load(flags + step + 1) & FOLLOWS
            if follows != 0:  # nothing is kept where another document begins
                tl.store(next_list + places, old, mask=places < K)
        tl.debug_barrier()
