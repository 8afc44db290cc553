"""The kernels of a decoding step: all linear heads of a layer in two launches, of the same shape at every step.

Tables of a row and key head: E slots `[K kept | s sinks | even chunk | odd chunk]` of keys and values. Chunk c lies in
the half c % 2, and kept keys in no order (their position in the document tells which slots hold one), so that at a
chunk's end nothing moves but the keys that are kept anew. The number of tokens so far is read on the device.

1. `decode_step`: one program per query head: exact keys, far sums and the new token under one normaliser; it adds to
   the attention that each exact key received, and writes the new token to its slot;
2. `end_of_chunk`: one program per key head, which counts the token. If a chunk leaves the window now, its keys compete
   with the kept ones; those that lose are added to the far sums.
"""

import triton
import triton.language as tl

from hf_rfa.ops.triton.choice import largest, order
from hf_rfa.ops.triton.pieces import TINY, decay, features, fold_in, put_sums, sums, weights


@triton.jit
def sees(slots, n, position, kept, C: tl.constexpr, S: tl.constexpr, K: tl.constexpr):
    """Which slots token number n of its document sees, and the distance of their tokens (of kept ones: at least C)."""
    is_kept = tl.load(position + slots, mask=slots < kept, other=-1) >= 0
    is_sink = (slots >= K) & (slots < tl.where(n >= 2 * C, K + S, K))
    offset = slots - K - S
    half, place = offset // C, offset % C
    own = half == (n // C) % 2
    number = n // C * C + place - tl.where(own, 0, C)
    near = (offset >= 0) & (offset < 2 * C) & (number >= 0) & (number < n)
    return is_kept | is_sink | near, tl.where(near, n - number, C)


@triton.jit
def decode_step(
    query, key, value, present, head_of, keys, values, sizes, position, kept_of, mass, counts, state, peaks, w, bias,
    shift, center, other, transform, figures, logits, map_codes, scores, output, fate,
    query_b, query_h, query_g, key_b, key_h, value_b, value_h, heads, groups, key_heads, scaling, least,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr,
    TRANSFORM: tl.constexpr, LOGITS: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Grid (A * G,). `fate`: 2 where the far part was dropped, 1 where it was used, 0 where there was none."""
    E: tl.constexpr = K + S + 2 * C
    F: tl.constexpr = P * (1 + TWO)
    each = tl.program_id(0).to(tl.int64)
    a, g = each // groups, each % groups
    row, linear = a // heads, a % heads
    head = tl.load(head_of + linear).to(tl.int64)
    there = tl.full((), 1, tl.int32)
    if PRESENT:
        there = tl.load(present + row).to(tl.int32)
    n, kept = tl.load(counts + a), tl.load(kept_of + linear)
    dims, columns, features_of = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, BP)
    in_d, in_m, in_p = dims < D, columns < M, features_of < P
    keys, values, sizes = keys + a * E * D, values + a * E * M, sizes + a * E
    position, mass, scores = position + a * K, mass + each * E, scores + each * E
    q = tl.load(query + row * query_b + head * query_h + g * query_g + dims, mask=in_d, other=0.0).to(tl.float32)
    new_key = tl.load(key + row * key_b + head * key_h + dims, mask=in_d, other=0.0).to(keys.dtype.element_ty)
    new_value = tl.load(value + row * value_b + head * value_h + columns, mask=in_m, other=0.0)
    new_value = new_value.to(values.dtype.element_ty)
    # Programs of the other query heads do not look at this slot, nor, while it is written, at that of a sink.
    if (g == 0) & (there != 0):
        slot, wide = K + S + n % (2 * C), new_value.to(tl.float32)
        tl.store(keys + slot * D + dims, new_key, mask=in_d)
        tl.store(values + slot * M + columns, new_value, mask=in_m)
        tl.store(sizes + slot, tl.sqrt(tl.sum(wide * wide, 0)))
        if n < S:
            tl.store(keys + (K + n) * D + dims, new_key, mask=in_d)
            tl.store(values + (K + n) * M + columns, new_value, mask=in_m)
    # Exact keys, the new one first.
    top, total = tl.sum(q * new_key.to(tl.float32), 0) * scaling, tl.full((), 1.0, tl.float32)
    result = new_value.to(tl.float32)
    for part in range(0, E, BN):
        slots = part + tl.arange(0, BN)
        seen, _ = sees(slots, n, position, kept, C, S, K)
        rows = tl.load(keys + slots[:, None] * D + dims[None, :], mask=seen[:, None] & in_d[None, :], other=0.0)
        score = tl.where(seen, tl.sum(rows.to(tl.float32) * q[None, :], 1) * scaling, float("-inf"))
        tl.store(scores + slots, score, mask=slots < E)
        new_top = tl.maximum(top, tl.max(score, 0))
        share, shrink = tl.exp(score - new_top), tl.exp(top - new_top)
        rows = tl.load(values + slots[:, None] * M + columns[None, :], mask=seen[:, None] & in_m[None, :], other=0.0)
        result = result * shrink + tl.sum(rows.to(tl.float32) * share[:, None], 0)
        top, total = new_top, total * shrink + tl.sum(share, 0)
    # psi of the query.
    moved = tl.where(in_d, q - tl.load(center + linear * D + dims, mask=in_d, other=0.0), 0.0)
    square = tl.sum(moved * moved, 0)
    if TRANSFORM:
        square = tl.full((), 0.0, tl.float32)
        for part in range(0, D, 16):
            some = part + tl.arange(0, 16)
            inside = (some < D)[:, None] & in_d[None, :]
            rows = tl.load(transform + (linear * D + some)[:, None] * D + dims[None, :], mask=inside, other=0.0)
            length = tl.sum(rows * moved[None, :], 1)
            square += tl.sum(length * length, 0)
    size, sign = tl.load(figures + linear * 5), tl.load(figures + linear * 5 + 1)
    constant, bound = tl.load(figures + linear * 5 + 2), tl.load(figures + linear * 5 + 3)
    r = tl.sqrt(bound / tl.maximum(square, bound))
    inside = in_p[:, None] & in_d[None, :]
    rows = tl.load(w + (linear * P + features_of)[:, None] * D + dims[None, :], mask=inside, other=0.0)
    argument = tl.sum(rows * q[None, :], 1) + tl.load(bias + linear * P + features_of, mask=in_p, other=0.0)
    argument = r * argument + tl.load(shift + linear * P + features_of, mask=in_p, other=0.0)
    first, second, peak = features(argument[None, :], tl.load(map_codes + linear), P, BP, MAP, False)
    exact = tl.sum(q * tl.load(other + linear * D + dims, mask=in_d, other=0.0), 0) * scaling
    log_far = sign * square * size * r * size * r / 2 + exact + constant + tl.max(peak, 0) + tl.load(peaks + a)
    # The far sums.
    base = state + a * (F * M + F)
    S1, z1 = sums(base, 0, P, BP, M, M, BM, F, 0)
    first = tl.sum(first, 0)
    num, den = tl.sum(first[:, None] * S1, 0), tl.sum(first * z1, 0)
    if TWO:
        S2, z2 = sums(base, 1, P, BP, M, M, BM, F, 0)
        second = tl.sum(second, 0)
        num += tl.sum(second[:, None] * S2, 0)
        den += tl.sum(second * z2, 0)
    # One normaliser.
    exists = log_far > float("-inf")
    used = exists & (den > TINY)
    log_far = tl.where(used, log_far, float("-inf"))
    logit, allowed = top, top + tl.log(total)
    if LOGITS:
        logit = tl.load(logits + linear * groups + g)
        highest = tl.maximum(allowed, logit)
        allowed = highest + tl.log(tl.exp(allowed - highest) + tl.exp(logit - highest))
    log_mass = log_far + tl.log(tl.where(used, den, 1.0))
    above = tl.maximum(log_mass - (allowed + tl.load(figures + linear * 5 + 4)), 0.0)
    log_far, log_mass = log_far - above, log_mass - above
    height = tl.maximum(top, log_mass)
    if LOGITS:
        height = tl.maximum(height, logit)
    far_weight, exact_weight = tl.exp(log_far - height), tl.exp(top - height)
    whole = far_weight * tl.where(used, den, 0.0) + exact_weight * total
    exact_whole = total
    if LOGITS:
        whole += tl.exp(logit - height)
        exact_whole += tl.exp(logit - top)
    answer = (num * far_weight + result * exact_weight) / whole
    answer = tl.where(there != 0, answer, 0.0).to(output.dtype.element_ty)
    tl.store(output + ((row * key_heads + head) * groups + g) * M + columns, answer, mask=in_m)
    tl.store(fate + each, tl.where(there != 0, tl.where(exists, tl.where(used, 1, 2), 0), 0).to(tl.int8))
    if K:
        # What this program wrote to memory is read by other threads than those that wrote it.
        tl.debug_barrier()
        if there != 0:
            for part in range(0, E, BN):
                slots = part + tl.arange(0, BN)
                seen, distance = sees(slots, n, position, kept, C, S, K)
                counted = seen & (distance >= least)
                score = tl.load(scores + slots, mask=counted, other=float("-inf"))
                received = tl.load(mass + slots, mask=counted, other=0.0) + tl.exp(score - top) / exact_whole
                tl.store(mass + slots, received, mask=counted)


@triton.jit
def end_of_chunk(
    present, keys, values, sizes, position, kept_of, mass, counts, state, peaks, w, bias, shift, center, other,
    transform, figures, map_codes, lists, heads, groups, scaling, least,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, MAP: tl.constexpr,
    TWO: tl.constexpr, TRANSFORM: tl.constexpr, PRESENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (A,). Rivals are the K kept keys, then the C of the chunk that leaves; `lists` (A, 3, BR) is scratch."""
    E: tl.constexpr = K + S + 2 * C
    F: tl.constexpr = P * (1 + TWO)
    a = tl.program_id(0).to(tl.int64)
    row, linear = a // heads, a % heads
    n = tl.load(counts + a)
    tl.debug_barrier()
    count = n + 1
    if PRESENT:
        count = n + tl.load(present + row).to(tl.int32)
    tl.store(counts + a, count)
    if (count > n) & (count % C == 0) & (count >= 2 * C):
        leaving = count // C - 2  # the chunk that leaves; its slots are those of the one to come
        begin = K + S + (leaving % 2) * C
        kept = tl.load(kept_of + linear)
        keys, values, sizes = keys + a * E * D, values + a * E * M, sizes + a * E
        position, mass, lists = position + a * K, mass + a * groups * E, lists + a * 3 * BR
        places, rows = tl.arange(0, BR), tl.arange(0, BC)
        in_chunk = (places >= K) & (places < K + C)
        number = tl.load(position + places, mask=places < kept, other=-1)
        number = tl.where(in_chunk, leaving * C + places - K, number)
        there = (number >= 0) & ((places < K) | (number >= S))  # sinks never compete
        slot = tl.where(in_chunk, begin + places - K, places)
        score, broken = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.int32)
        if K:
            for g in range(groups):
                given = tl.load(mass + g * E + slot, mask=there, other=0.0)
                score, broken = tl.maximum(score, given), broken | (given != given)
            score *= tl.load(sizes + slot, mask=there, other=0.0) / (count - number - least).to(tl.float32)
            score = tl.where((broken != 0) | (score != score), -1.0, score)
        stays = there & largest(order(score, there, tl.maximum(number, 0)), places, kept, BR)
        goes, comes, free = there & ~stays, stays & in_chunk, (places < kept) & ~stays
        tl.store(lists + tl.cumsum(goes.to(tl.int32), 0) - 1, slot, mask=goes)
        tl.store(lists + BR + tl.cumsum(comes.to(tl.int32), 0) - 1, slot, mask=comes)
        tl.store(lists + 2 * BR + tl.cumsum(free.to(tl.int32), 0) - 1, slot, mask=free)
        going, coming = tl.sum(goes.to(tl.int32), 0), tl.sum(comes.to(tl.int32), 0)
        tl.debug_barrier()
        # Those that go are added to the far sums.
        gone = tl.load(lists + rows, mask=rows < going, other=-1)
        code = tl.load(map_codes + linear)
        dims, columns = tl.arange(0, BD), tl.arange(0, BM)
        in_d, in_m = (dims < D)[None, :], (columns < M)[None, :]
        some = (gone >= 0)[:, None]
        old = tl.load(keys + gone[:, None] * D + dims[None, :], mask=some & in_d, other=0.0).to(tl.float32)
        value = tl.load(values + gone[:, None] * M + columns[None, :], mask=some & in_m, other=0.0).to(tl.float32)
        matrix, b, h = weights(w, bias, shift, linear, D, BD, P, BP)
        argument = tl.dot(old, matrix, input_precision=PRECISION) + b[None, :]
        middle = tl.load(center + linear * D + dims[None, :], mask=in_d, other=0.0)
        moved = tl.where(in_d, old - middle, 0.0)
        exact = tl.sum(moved * tl.load(other + linear * D + dims[None, :], mask=in_d, other=0.0), 1) * scaling
        if TRANSFORM:
            pointers = transform + linear * D * D + dims[None, :] * D + dims[:, None]
            change = tl.load(pointers, mask=in_d & (dims < D)[:, None], other=0.0)
            moved = tl.dot(moved, change, input_precision=PRECISION)
        square = tl.sum(moved * moved, 1)
        size, sign = tl.load(figures + linear * 4), tl.load(figures + linear * 4 + 1)
        constant, bound = tl.load(figures + linear * 4 + 2), tl.load(figures + linear * 4 + 3)
        r = tl.sqrt(bound / tl.maximum(square, bound))
        argument = r[:, None] * argument + h[None, :]
        first, second, height = features(argument, code, P, BP, MAP, True)
        log_scale = sign * square * size * r * size * r / 2 + exact + constant + height
        log_scale = tl.where(gone >= 0, log_scale, float("-inf"))
        peak = tl.load(peaks + a)
        new_peak = tl.maximum(peak, tl.max(log_scale, 0))
        base = state + a * (F * M + F)
        S1, z1 = sums(base, 0, P, BP, M, M, BM, F, 0)
        S2, z2 = S1, z1
        if TWO:
            S2, z2 = sums(base, 1, P, BP, M, M, BM, F, 0)
        shrink, weight = decay(peak, new_peak), decay(log_scale, new_peak)
        S1, z1, S2, z2 = fold_in(S1, z1, S2, z2, first, second, value, shrink, weight, TWO, tl.float32, PRECISION)
        tl.debug_barrier()
        put_sums(base, 0, S1, z1, P, BP, M, M, BM, F, 0)
        if TWO:
            put_sums(base, 1, S2, z2, P, BP, M, M, BM, F, 0)
        tl.store(peaks + a, new_peak)
        if K:
            # Those of the chunk that stay take the places that are free.
            come = tl.load(lists + BR + rows, mask=rows < coming, other=-1)
            goal = tl.load(lists + 2 * BR + rows, mask=rows < coming, other=-1)
            some, there = (come >= 0)[:, None], come >= 0
            stay = tl.load(keys + come[:, None] * D + dims[None, :], mask=some & in_d, other=0.0)
            tl.store(keys + goal[:, None] * D + dims[None, :], stay, mask=some & in_d)
            stay = tl.load(values + come[:, None] * M + columns[None, :], mask=some & in_m, other=0.0)
            tl.store(values + goal[:, None] * M + columns[None, :], stay, mask=some & in_m)
            tl.store(sizes + goal, tl.load(sizes + come, mask=there, other=0.0), mask=there)
            tl.store(position + goal, leaving * C + come - begin, mask=there)
            for g in range(groups):
                tl.store(mass + g * E + goal, tl.load(mass + g * E + come, mask=there, other=0.0), mask=there)
            tl.debug_barrier()
            for g in range(groups):
                tl.store(mass + g * E + begin + rows, tl.zeros((BC,), tl.float32), mask=rows < C)
