"""Backward pass: the forward pass again, for the gradients of the queries and the sinks; see `flows`."""

import triton
import triton.language as tl

from hf_rfa.ops.triton.flows import put_weights, query_psi
from hf_rfa.ops.triton.forward import folded_keys
from hf_rfa.ops.triton.pieces import (
    KEEP,
    argument_gradient,
    decay,
    dot,
    fold_in,
    near_masks,
    numbers,
    own_weights,
    put,
    put_numbers,
    share_gradients,
    sink_tiles,
    slot_codes,
    sums,
    tile,
    weights,
)


@triton.jit
def query_gradients(
    query, key, value, gradient, query_r, key_r, key_scale, inner, log_total, log_weight, query_w, query_bias,
    query_shift, key_w, key_bias, key_shift, map_codes, sink_key, sink_value, codes, flags, sink_chunks, state, peaks,
    d_query, d_r, d_scale, d_sink_key, d_sink_value, d_w, d_bias, d_shift,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, value_b, value_h, value_t, gradient_b, gradient_h,
    gradient_g, gradient_t, d_b, d_h, d_g, d_t, code_row, flag_row, heads, groups, length, chunks, blocks, L, scaling,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, P: tl.constexpr, BP: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, DELAY: tl.constexpr, MAP: tl.constexpr,
    TWO: tl.constexpr, NEAR: tl.constexpr, LEARNED: tl.constexpr, STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    F: tl.constexpr = P * (1 + TWO)
    block, a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = a // heads, a % heads
    rows, sinks = tl.arange(0, BC), tl.arange(0, BS)
    query, gradient = query + row * query_b + head * query_h, gradient + row * gradient_b + head * gradient_h
    key, value = key + row * key_b + head * key_h, value + row * value_b + head * value_h
    d_query += row * d_b + head * d_h
    key_r, key_scale = key_r + a * length, key_scale + a * length
    tokens = a * groups * length
    query_r, inner, d_r, d_scale = query_r + tokens, inner + tokens, d_r + tokens, d_scale + tokens
    log_total, log_weight = log_total + tokens, log_weight + tokens
    sink_key, sink_value = sink_key + a * S * D, sink_value + a * S * M
    codes, flags, sink_chunks = codes + row * code_row, flags + row * flag_row, sink_chunks + row * flag_row
    peaks += a * (chunks + 1)
    code = tl.load(map_codes + head)
    base = state + (a * blocks + block) * (F * M + F)
    S1, z1 = sums(base, 0, P, BP, M, M, BM, F, 0)
    S2, z2 = S1, z1
    if TWO:
        S2, z2 = sums(base, 1, P, BP, M, M, BM, F, 0)
    dw, db, dh = tl.zeros((BP, BD), tl.float32), tl.zeros((BP,), tl.float32), tl.zeros((BP,), tl.float32)
    for step in range(block * L, tl.minimum(block * L + L, chunks)):
        flag = tl.load(flags + step)
        peak = tl.load(peaks + step)
        if (flag & KEEP) == 0:
            S1, z1, S2, z2 = S1 * 0.0, z1 * 0.0, S2 * 0.0, z2 * 0.0
            peak = tl.full((), float("-inf"), tl.float32)
        start = step * C
        if NEAR:
            if S:
                d_sink_keys, d_sink_values = tl.zeros((BS, BD), tl.float32), tl.zeros((BS, BM), tl.float32)
        if not DELAY:
            first_k, second_k, log_scale = folded_keys(
                key, key_scale, codes, flag, step, chunks, length, key_t, key_r, rows, key_w, key_bias, key_shift,
                head, code, D, BD, P, BP, C, DELAY, MAP, PRECISION,
            )  # fmt: skip
            own, lifted, _ = own_weights(log_scale, peak, rows)
        for g in range(groups):
            queries, projection, size, first, second, weight = query_psi(
                query + g * query_g, query_r + g * length, log_weight + g * length, start, rows, length, query_t,
                query_w, query_bias, query_shift, head, code, D, BD, P, BP, C, MAP, PRECISION,
            )  # fmt: skip
            above = tile(gradient + g * gradient_g, start, rows, length, gradient_t, M, BM, C)
            inners = numbers(inner + g * length, start, rows, length, C)
            read = weight
            if not DELAY:
                read = weight * lifted
            d_first = (dot(above, tl.trans(S1), STATE, PRECISION) - inners[:, None] * z1[None, :]) * read[:, None]
            d_second = d_first
            if TWO:
                d_second = dot(above, tl.trans(S2), STATE, PRECISION) - inners[:, None] * z2[None, :]
                d_second = d_second * read[:, None]
            if not DELAY:
                values = tile(value, start, rows, length, value_t, M, BM, C)
                shares = dot(above, tl.trans(values), STATE, PRECISION) - inners[:, None]
                shares = shares * own * weight[:, None]
                d_first += dot(shares, first_k, STATE, PRECISION)
                if TWO:
                    d_second += dot(shares, second_k, STATE, PRECISION)
            d_log = tl.sum(d_first * first, 1)
            if TWO:
                d_log += tl.sum(d_second * second, 1)
            d_argument = argument_gradient(first, second, d_first, d_second, code, MAP, False)
            put_numbers(d_scale + g * length, start, rows, length, d_log, C)
            put_numbers(d_r + g * length, start, rows, length, tl.sum(d_argument * projection, 1), C)
            d_projection = d_argument * size[:, None]
            w, _bias, _shift = weights(query_w, query_bias, query_shift, head, D, BD, P, BP)
            result = dot(d_projection, tl.trans(w), w.dtype, PRECISION)
            if LEARNED:
                dw += dot(tl.trans(d_projection), queries, STATE, PRECISION)
                db += tl.sum(d_projection, 0)
                dh += tl.sum(d_argument, 0)
            if NEAR:
                # What is not needed yet is not loaded yet: tiles that wait in registers displace others.
                sees_sink, sees_before, sees_own = near_masks(
                    slot_codes(codes, step, chunks, rows, C), slot_codes(codes, step - 1, chunks, rows, C), flag,
                    rows, sinks, C, S,
                )  # fmt: skip
                total = numbers(log_total + g * length, start, rows, length, C)
                keys = tile(key, start, rows, length, key_t, D, BD, C)
                values = tile(value, start, rows, length, value_t, M, BM, C)
                _shares, d_scores = share_gradients(
                    queries, above, inners, total, keys, values, sees_own, scaling, PRECISION
                )  # fmt: skip
                result += dot(d_scores, keys, keys.dtype, PRECISION)
                keys = tile(key, start - C, rows, length, key_t, D, BD, C)
                values = tile(value, start - C, rows, length, value_t, M, BM, C)
                _shares, d_scores = share_gradients(
                    queries, above, inners, total, keys, values, sees_before, scaling, PRECISION
                )  # fmt: skip
                result += dot(d_scores, keys, keys.dtype, PRECISION)
                if S:
                    keys, values = sink_tiles(
                        key, value, sink_key, sink_value, tl.load(sink_chunks + step), sinks, length, key_t, value_t,
                        D, BD, M, M, BM, C, S,
                    )  # fmt: skip
                    shares, d_scores = share_gradients(
                        queries, above, inners, total, keys, values, sees_sink, scaling, PRECISION
                    )  # fmt: skip
                    d_sink_values += dot(tl.trans(shares), above, values.dtype, PRECISION)
                    result += dot(d_scores, keys, keys.dtype, PRECISION)
                    d_sink_keys += dot(tl.trans(d_scores), queries, keys.dtype, PRECISION)
            put(d_query + g * d_g, start, rows, length, d_t, result, D, BD, C)
        if NEAR and S:
            place = a * chunks + step
            put(d_sink_key + place * S * D, 0, sinks, S, D, d_sink_keys, D, BD, S)
            put(d_sink_value + place * S * M, 0, sinks, S, M, d_sink_values, M, BM, S)
        if DELAY:
            first_k, second_k, log_scale = folded_keys(
                key, key_scale, codes, flag, step, chunks, length, key_t, key_r, rows, key_w, key_bias, key_shift,
                head, code, D, BD, P, BP, C, DELAY, MAP, PRECISION,
            )  # fmt: skip
        values = tile(value, start - DELAY * C, rows, length, value_t, M, BM, C)
        new_peak = tl.load(peaks + step + 1)
        shrink, fold = decay(peak, new_peak), decay(log_scale, new_peak)
        S1, z1, S2, z2 = fold_in(S1, z1, S2, z2, first_k, second_k, values, shrink, fold, TWO, STATE, PRECISION)
    if LEARNED:
        put_weights(d_w, d_bias, d_shift, a * blocks + block, dw, db, dh, D, BD, P, BP)
