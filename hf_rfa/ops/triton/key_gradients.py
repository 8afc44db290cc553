"""Backward pass: each block in reverse, for the gradients of keys and values; see `flows`."""

import triton
import triton.language as tl

from hf_rfa.ops.triton.flows import put_weights, query_psi
from hf_rfa.ops.triton.forward import folded_keys
from hf_rfa.ops.triton.pieces import (
    KEEP,
    argument_gradient,
    decay,
    dot,
    near_masks,
    numbers,
    own_weights,
    put,
    put_numbers,
    slot_codes,
    sums,
    tile,
    weights,
)


@triton.jit
def key_gradients(
    query, key, value, gradient, query_r, key_r, key_scale, inner, log_total, log_weight, query_w, query_bias,
    query_shift, key_w, key_bias, key_shift, map_codes, codes, flags, flow, peaks,
    d_key, d_value, d_r, d_scale, d_w, d_bias, d_shift,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, value_b, value_h, value_t, gradient_b, gradient_h,
    gradient_g, gradient_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, code_row, flag_row, heads, groups, length, chunks,
    flow_blocks, blocks, L, scaling,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, DELAY: tl.constexpr, MAP: tl.constexpr, TWO: tl.constexpr,
    NEAR: tl.constexpr, LEARNED: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks that cover steps 0 .. chunks - 1 + DELAY, A); step i handles the keys of chunk i - DELAY."""
    F: tl.constexpr = P * (1 + TWO)
    block, a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = a // heads, a % heads
    rows = tl.arange(0, BC)
    query, gradient = query + row * query_b + head * query_h, gradient + row * gradient_b + head * gradient_h
    key, value = key + row * key_b + head * key_h, value + row * value_b + head * value_h
    d_key, d_value = d_key + row * dk_b + head * dk_h, d_value + row * dv_b + head * dv_h
    key_r, key_scale, d_r, d_scale = key_r + a * length, key_scale + a * length, d_r + a * length, d_scale + a * length
    tokens = a * groups * length
    query_r, inner = query_r + tokens, inner + tokens
    log_total, log_weight = log_total + tokens, log_weight + tokens
    codes, flags, peaks = codes + row * code_row, flags + row * flag_row, peaks + a * (chunks + 1)
    code = tl.load(map_codes + head)
    S1, z1 = tl.zeros((BP, BM), tl.float32), tl.zeros((BP,), tl.float32)
    S2, z2 = tl.zeros((BP, BM), tl.float32), tl.zeros((BP,), tl.float32)
    if block < flow_blocks:
        base = flow + (a * flow_blocks + block) * (F * M + F)
        S1, z1 = sums(base, 0, P, BP, M, M, BM, F, 0)
        if TWO:
            S2, z2 = sums(base, 1, P, BP, M, M, BM, F, 0)
    dw, db, dh = tl.zeros((BP, BD), tl.float32), tl.zeros((BP,), tl.float32), tl.zeros((BP,), tl.float32)
    for back in range(L):
        step = block * L + L - 1 - back
        if step < chunks + DELAY:
            start = (step - DELAY) * C
            flag = tl.full((), 0, tl.int32)
            peak, new_peak = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
            if step < chunks:
                flag = tl.load(flags + step)
                peak, new_peak = tl.load(peaks + step), tl.load(peaks + step + 1)
                if (flag & KEEP) == 0:
                    peak = tl.full((), float("-inf"), tl.float32)
            keys = tile(key, start, rows, length, key_t, D, BD, C)
            values = tile(value, start, rows, length, value_t, M, BM, C)
            # Gradients from the far sums; a step behind the last chunk adds nothing to them.
            size = numbers(key_r, start, rows, length, C)
            w, bias, _shift = weights(key_w, key_bias, key_shift, head, D, BD, P, BP)
            projection = tl.dot(keys, w, input_precision=PRECISION) + bias[None, :]
            first, second, log_scale = folded_keys(
                key, key_scale, codes, flag, step, chunks, length, key_t, key_r, rows, key_w, key_bias, key_shift,
                head, code, D, BD, P, BP, C, DELAY, MAP, PRECISION,
            )  # fmt: skip
            fold = decay(log_scale, new_peak)
            d_first = (dot(values, tl.trans(S1), STATE, PRECISION) + z1[None, :]) * fold[:, None]
            d_second = d_first
            d_values = dot(first * fold[:, None], S1, STATE, PRECISION)
            if TWO:
                d_second = (dot(values, tl.trans(S2), STATE, PRECISION) + z2[None, :]) * fold[:, None]
                d_values += dot(second * fold[:, None], S2, STATE, PRECISION)
            d_keys = tl.zeros((BC, BD), tl.float32)
            shrink = decay(peak, new_peak)
            S1, z1, S2, z2 = S1 * shrink, z1 * shrink, S2 * shrink, z2 * shrink
            if NEAR:
                own_code = slot_codes(codes, step - 1, chunks, rows, C)
                _sinks, sees_before, sees_own = near_masks(own_code, own_code, flag, rows, rows, C, 0)
            if not DELAY:
                own, lifted, _base = own_weights(log_scale, peak, rows)
            for g in range(groups):
                if NEAR:  # queries of the keys' own chunk
                    queries = tile(query + g * query_g, start, rows, length, query_t, D, BD, C)
                    above = tile(gradient + g * gradient_g, start, rows, length, gradient_t, M, BM, C)
                    inners = numbers(inner + g * length, start, rows, length, C)
                    total = numbers(log_total + g * length, start, rows, length, C)
                    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scaling - total[:, None]
                    shares = tl.exp(tl.where(sees_own, scores, float("-inf")))
                    d_values += dot(tl.trans(shares), above, values.dtype, PRECISION)
                    shares *= (dot(above, tl.trans(values), values.dtype, PRECISION) - inners[:, None]) * scaling
                    d_keys += dot(tl.trans(shares), queries, keys.dtype, PRECISION)
                if step < chunks:
                    queries, _projection, _size, first_q, second_q, weight = query_psi(
                        query + g * query_g, query_r + g * length, log_weight + g * length, step * C, rows, length,
                        query_t, query_w, query_bias, query_shift, head, code, D, BD, P, BP, C, MAP, PRECISION,
                    )  # fmt: skip
                    above = tile(gradient + g * gradient_g, step * C, rows, length, gradient_t, M, BM, C)
                    inners = numbers(inner + g * length, step * C, rows, length, C)
                    read = weight
                    if NEAR:  # queries of the chunk behind the keys
                        total = numbers(log_total + g * length, step * C, rows, length, C)
                        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scaling - total[:, None]
                        shares = tl.exp(tl.where(sees_before, scores, float("-inf")))
                        d_values += dot(tl.trans(shares), above, values.dtype, PRECISION)
                        shares *= (dot(above, tl.trans(values), values.dtype, PRECISION) - inners[:, None]) * scaling
                        d_keys += dot(tl.trans(shares), queries, keys.dtype, PRECISION)
                    if not DELAY:
                        read = weight * lifted
                        lift = own * weight[:, None]
                        shares = dot(above, tl.trans(values), STATE, PRECISION) - inners[:, None]
                        shares = shares * lift
                        scores = dot(first_q, tl.trans(first), STATE, PRECISION)
                        d_first += dot(tl.trans(shares), first_q, STATE, PRECISION)
                        if TWO:
                            scores += dot(second_q, tl.trans(second), STATE, PRECISION)
                            d_second += dot(tl.trans(shares), second_q, STATE, PRECISION)
                        d_values += dot(tl.trans(scores * lift), above, STATE, PRECISION)
                    weighed = above.to(tl.float32) * read[:, None]
                    whole = -read * inners
                    S1 += dot(tl.trans(first_q), weighed, STATE, PRECISION)
                    z1 += tl.sum(first_q * whole[:, None], 0)
                    if TWO:
                        S2 += dot(tl.trans(second_q), weighed, STATE, PRECISION)
                        z2 += tl.sum(second_q * whole[:, None], 0)
            if step < chunks:
                if (flag & KEEP) == 0:
                    S1, z1, S2, z2 = S1 * 0.0, z1 * 0.0, S2 * 0.0, z2 * 0.0
            d_log = tl.sum(d_first * first, 1)
            if TWO:
                d_log += tl.sum(d_second * second, 1)
            d_argument = argument_gradient(first, second, d_first, d_second, code, MAP, True)
            put_numbers(d_scale, start, rows, length, d_log, C)
            put_numbers(d_r, start, rows, length, tl.sum(d_argument * projection, 1), C)
            d_projection = d_argument * size[:, None]
            w, _bias, _shift = weights(key_w, key_bias, key_shift, head, D, BD, P, BP)
            d_keys += dot(d_projection, tl.trans(w), w.dtype, PRECISION)
            if LEARNED:
                dw += dot(tl.trans(d_projection), keys, STATE, PRECISION)
                db += tl.sum(d_projection, 0)
                dh += tl.sum(d_argument, 0)
            put(d_key, start, rows, length, dk_t, d_keys, D, BD, C)
            put(d_value, start, rows, length, dv_t, d_values, M, BM, C)
    if LEARNED:
        put_weights(d_w, d_bias, d_shift, a * blocks + block, dw, db, dh, D, BD, P, BP)
