"""The kernels of the forward pass, and the scan over blocks.

A block is a run of L chunks, processed by one program with the far sums in its registers:

1. `block_sums`: the far sums of each block's own keys, under the block's own maximum;
2. `scan_sums`: the far sums at the start of each block, under the running maximum;
3. `block_outputs`: chunk by chunk, near softmax and far part of the queries under one normaliser.

Grids are (parts x blocks, A), A = rows of the batch x key heads; the values' columns are shared out among the parts,
since the far sums of all of them do not fit into the registers. `delay` is 1 with a window, 0 without: once chunk i
has read the far sums, chunk i - delay is added to them.
"""

import triton
import triton.language as tl

from hf_rfa.ops.triton.pieces import (
    FOLD,
    FOLLOWS,
    KEEP,
    TINY,
    attend,
    decay,
    dot,
    features,
    fold_in,
    near_masks,
    numbers,
    own_weights,
    put,
    put_numbers,
    put_sums,
    sink_tiles,
    slot_codes,
    sums,
    tile,
    weights,
)  # fmt: skip


@triton.jit
def folded_keys(
    key, scale, codes, flag, step, chunks, length, stride, r, rows, w, b, h, head, code,
    D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, DELAY: tl.constexpr,
    MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """psi of the keys that step `step` adds to the far sums, and their log-scales, -inf for those it does not add."""
    chunk = step - DELAY
    keys = tile(key, chunk * C, rows, length, stride, D, BD, C)
    w, b, h = weights(w, b, h, head, D, BD, P, BP)
    size = numbers(r, chunk * C, rows, length, C)
    argument = tl.dot(keys, w, input_precision=PRECISION) + b[None, :]
    argument = size[:, None] * argument + h[None, :]
    first, second, peak = features(argument, code, P, BP, MAP, True)
    adds = (slot_codes(codes, chunk, chunks, rows, C) & FOLD) != 0
    if DELAY:
        adds = adds & ((flag & FOLLOWS) != 0)
    log_scale = tl.where(adds, numbers(scale, chunk * C, rows, length, C) + peak, float("-inf"))
    return first, second, log_scale


@triton.jit
def block_sums(
    key, value, r, scale, w, b, h, map_codes, codes, flags, out, out_peak, out_keep,
    key_b, key_h, key_t, value_b, value_h, value_t, code_row, flag_row, heads, length, chunks, blocks, L,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, MV: tl.constexpr, BV: tl.constexpr, P: tl.constexpr,
    BP: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, DELAY: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr,
    STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = P * (1 + TWO)
    PARTS: tl.constexpr = M // MV
    block, a = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) % PARTS * MV
    row, head = a // heads, a % heads
    rows = tl.arange(0, BC)
    key, value = key + row * key_b + head * key_h, value + row * value_b + head * value_h + column
    r, scale, codes, flags = r + a * length, scale + a * length, codes + row * code_row, flags + row * flag_row
    code = tl.load(map_codes + head)
    S1, z1 = tl.zeros((BP, BV), tl.float32), tl.zeros((BP,), tl.float32)
    S2, z2 = tl.zeros((BP, BV), tl.float32), tl.zeros((BP,), tl.float32)
    whole_peak = tl.full((), float("-inf"), tl.float32)
    kept = tl.full((), 1, tl.int32)
    for step in range(block * L, tl.minimum(block * L + L, chunks)):
        flag = tl.load(flags + step)
        if (flag & KEEP) == 0:
            S1, z1, S2, z2 = S1 * 0.0, z1 * 0.0, S2 * 0.0, z2 * 0.0
            whole_peak = tl.full((), float("-inf"), tl.float32)
            kept = tl.full((), 0, tl.int32)
        first, second, log_scale = folded_keys(
            key, scale, codes, flag, step, chunks, length, key_t, r, rows, w, b, h, head, code,
            D, BD, P, BP, C, DELAY, MAP, PRECISION,
        )  # fmt: skip
        values = tile(value, (step - DELAY) * C, rows, length, value_t, MV, BV, C)
        peak = tl.maximum(whole_peak, tl.max(log_scale, 0))
        shrink, weight = decay(whole_peak, peak), decay(log_scale, peak)
        S1, z1, S2, z2 = fold_in(S1, z1, S2, z2, first, second, values, shrink, weight, TWO, STATE, PRECISION)
        whole_peak = peak
    out += (a * blocks + block) * (F * M + F)
    put_sums(out, 0, S1, z1, P, BP, M, MV, BV, F, column)
    if TWO:
        put_sums(out, 1, S2, z2, P, BP, M, MV, BV, F, column)
    tl.store(out_peak + a * 2 * (blocks + 1) + block, whole_peak)
    tl.store(out_keep + a * blocks + block, kept)


@triton.jit
def scan_sums(state, peaks, kept, carry, carry_peak, blocks, E, BE: tl.constexpr, STAGES: tl.constexpr):
    """In place: replace each block's own sums by those before it. `carry` (A, E) is the state before, then after all.

    Grid (tiles of E, A). Every program goes over the peaks: `peaks` (A, 2, blocks + 1) has the blocks' own in row 0
    and gets the running ones in row 1.
    """
    part, a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = part * BE + tl.arange(0, BE)
    inside = index < E
    total = tl.load(carry + a * E + index, mask=inside, other=0.0)
    peak = tl.load(carry_peak + a)
    own_peaks, new_peaks = peaks + a * 2 * (blocks + 1), peaks + (a * 2 + 1) * (blocks + 1)
    for block in tl.range(blocks, num_stages=STAGES):
        place = state + (a * blocks + block) * E + index
        own = tl.load(place, mask=inside, other=0.0)
        tl.store(place, total, mask=inside)
        tl.store(new_peaks + block, peak)
        own_peak = tl.load(own_peaks + block)
        before = tl.where(tl.load(kept + a * blocks + block) != 0, peak, float("-inf"))
        peak = tl.maximum(before, own_peak)
        total = total * decay(before, peak) + own * decay(own_peak, peak)
    tl.store(new_peaks + blocks, peak)
    tl.store(carry + a * E + index, total, mask=inside)


@triton.jit
def block_outputs(
    query, key, value, query_r, query_scale, key_r, key_scale, query_w, query_bias, query_shift, key_w, key_bias,
    key_shift, map_codes, log_limit, sink_logits, sink_key, sink_value, codes, flags, sink_chunks, state, start_peaks,
    near_part, near_log, output, log_total, log_weight, peaks,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, value_b, value_h, value_t, output_b, output_h, output_g,
    output_t, code_row, flag_row, heads, groups, length, chunks, blocks, L, scaling,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, MV: tl.constexpr, BV: tl.constexpr, P: tl.constexpr,
    BP: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, DELAY: tl.constexpr,
    MAP: tl.constexpr, TWO: tl.constexpr, NEAR: tl.constexpr, LOGITS: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = P * (1 + TWO)
    PARTS: tl.constexpr = M // MV
    block, a = tl.program_id(0) // PARTS, tl.program_id(1).to(tl.int64)
    part = tl.program_id(0) % PARTS
    column = part * MV
    row, head = a // heads, a % heads
    rows, sinks = tl.arange(0, BC), tl.arange(0, BS)
    query, output = query + row * query_b + head * query_h, output + row * output_b + head * output_h + column
    key, value = key + row * key_b + head * key_h, value + row * value_b + head * value_h + column
    key_r, key_scale = key_r + a * length, key_scale + a * length
    tokens = a * groups * length
    query_r, query_scale = query_r + tokens, query_scale + tokens
    log_total, log_weight = log_total + tokens, log_weight + tokens
    near_part, near_log = near_part + tokens * M + column, near_log + tokens
    sink_key, sink_value = sink_key + a * S * D, sink_value + a * S * M + column
    codes, flags, sink_chunks = codes + row * code_row, flags + row * flag_row, sink_chunks + row * flag_row
    code, limit = tl.load(map_codes + head), tl.load(log_limit + head)
    base = state + (a * blocks + block) * (F * M + F)
    S1, z1 = sums(base, 0, P, BP, M, MV, BV, F, column)
    S2, z2 = S1, z1
    if TWO:
        S2, z2 = sums(base, 1, P, BP, M, MV, BV, F, column)
    peak = tl.load(start_peaks + (a * 2 + 1) * (blocks + 1) + block)
    for step in range(block * L, tl.minimum(block * L + L, chunks)):
        if part == 0:
            tl.store(peaks + a * (chunks + 1) + step, peak)
        flag = tl.load(flags + step)
        if (flag & KEEP) == 0:
            S1, z1, S2, z2 = S1 * 0.0, z1 * 0.0, S2 * 0.0, z2 * 0.0
            peak = tl.full((), float("-inf"), tl.float32)
        start = step * C
        if not DELAY:
            first_k, second_k, log_scale = folded_keys(
                key, key_scale, codes, flag, step, chunks, length, key_t, key_r, rows, key_w, key_bias, key_shift,
                head, code, D, BD, P, BP, C, DELAY, MAP, PRECISION,
            )  # fmt: skip
            own, lifted, own_base = own_weights(log_scale, peak, rows)
        for g in range(groups):
            # What is not needed yet is not loaded yet: tiles that wait in registers displace others.
            queries = tile(query + g * query_g, start, rows, length, query_t, D, BD, C)
            if NEAR:
                sees_sink, sees_before, sees_own = near_masks(
                    slot_codes(codes, step, chunks, rows, C), slot_codes(codes, step - 1, chunks, rows, C), flag,
                    rows, sinks, C, S,
                )  # fmt: skip
                top, mass = tl.full((BC,), float("-inf"), tl.float32), tl.zeros((BC,), tl.float32)
                keys = tile(key, start, rows, length, key_t, D, BD, C)
                values = tile(value, start, rows, length, value_t, MV, BV, C)
                # Every query sees a key of its own chunk, so that the maximum is finite from here on.
                top, mass, near = attend(
                    queries, keys, values, sees_own, scaling, top, mass, tl.zeros((BC, BV), tl.float32), PRECISION
                )  # fmt: skip
                keys = tile(key, start - C, rows, length, key_t, D, BD, C)
                values = tile(value, start - C, rows, length, value_t, MV, BV, C)
                top, mass, near = attend(
                    queries, keys, values, sees_before, scaling, top, mass, near, PRECISION
                )  # fmt: skip
                if S:
                    keys, values = sink_tiles(
                        key, value, sink_key, sink_value, tl.load(sink_chunks + step), sinks, length, key_t, value_t,
                        D, BD, M, MV, BV, C, S,
                    )  # fmt: skip
                    top, mass, near = attend(
                        queries, keys, values, sees_sink, scaling, top, mass, near, PRECISION
                    )  # fmt: skip
            elif DELAY:
                near = tile(near_part + g * length * M, start, rows, length, M, MV, BV, C)
                top, mass = numbers(near_log + g * length, start, rows, length, C), tl.full((BC,), 1.0, tl.float32)
            size = numbers(query_r + g * length, start, rows, length, C)
            w, bias, shift = weights(query_w, query_bias, query_shift, head, D, BD, P, BP)
            argument = size[:, None] * (tl.dot(queries, w, input_precision=PRECISION) + bias[None, :])
            first, second, feature_peak = features(argument + shift[None, :], code, P, BP, MAP, False)
            log_q = numbers(query_scale + g * length, start, rows, length, C) + feature_peak
            num = dot(first, S1, STATE, PRECISION)
            den = tl.sum(first * z1[None, :], 1)
            if TWO:
                num += dot(second, S2, STATE, PRECISION)
                den += tl.sum(second * z2[None, :], 1)
            if DELAY:
                log_far = log_q + peak
            else:
                log_far = log_q + own_base
                scores = dot(first, tl.trans(first_k), STATE, PRECISION)
                if TWO:
                    scores += dot(second, tl.trans(second_k), STATE, PRECISION)
                scores *= own
                values = tile(value, start, rows, length, value_t, MV, BV, C)
                num = num * lifted[:, None] + dot(scores, values, STATE, PRECISION)
                den = den * lifted + tl.sum(scores, 1)
            exists = log_far > float("-inf")
            used = exists & (den > TINY)
            log_far = tl.where(used, log_far, float("-inf"))
            total = log_far + tl.log(tl.where(used, den, 1.0))
            if LOGITS:
                logit = tl.load(sink_logits + head * groups + g)
            if DELAY:
                log_exact = top + tl.log(mass)
                allowed = log_exact
                if LOGITS:
                    highest = tl.maximum(log_exact, logit)
                    allowed = highest + tl.log(tl.exp(log_exact - highest) + tl.exp(logit - highest))
                above = tl.maximum(total - (allowed + limit), 0.0)
                log_far, total = log_far - above, total - above
                total = tl.maximum(total, log_exact)
            if LOGITS:
                total = tl.maximum(total, logit)
            total = tl.where(total == float("-inf"), 0.0, total)
            whole = tl.exp(log_far - total) * tl.where(used, den, 0.0)
            if DELAY:
                whole += mass * tl.exp(top - total)
            if LOGITS:
                whole += tl.exp(logit - total)
            # Without a window, if the estimate is not positive, nothing has weight: the output is zero.
            total += tl.log(tl.where(whole > 0, whole, 1.0))
            result = num * tl.exp(log_far - total)[:, None]
            if DELAY:
                result += near * tl.exp(top - total)[:, None]
            put(output + g * output_g, start, rows, length, output_t, result, MV, BV, C)
            if part == 0:
                put_numbers(log_total + g * length, start, rows, length, total, C)
                # +inf means that the estimate was dropped, -inf that there was none.
                weight = tl.where(exists & (used == 0), float("inf"), log_far - total)
                put_numbers(log_weight + g * length, start, rows, length, weight, C)
        if DELAY:
            first_k, second_k, log_scale = folded_keys(
                key, key_scale, codes, flag, step, chunks, length, key_t, key_r, rows, key_w, key_bias, key_shift,
                head, code, D, BD, P, BP, C, DELAY, MAP, PRECISION,
            )  # fmt: skip
        values = tile(value, start - DELAY * C, rows, length, value_t, MV, BV, C)
        new_peak = tl.maximum(peak, tl.max(log_scale, 0))
        shrink, weight = decay(peak, new_peak), decay(log_scale, new_peak)
        S1, z1, S2, z2 = fold_in(S1, z1, S2, z2, first_k, second_k, values, shrink, weight, TWO, STATE, PRECISION)
        peak = new_peak
    if (block == blocks - 1) & (part == 0):
        tl.store(peaks + a * (chunks + 1) + chunks, peak)
