"""The kernels of the backward pass: everything is recomputed from the tokens and the far sums of each block.

With o the output, L the log of the whole denominator, dZ_i = -do_i.o_i, and psi_i times its weight in the output
(`log_weight`), the far part's gradient is that of linear attention with [do, dZ]:

1. `inner_products`: do.o per token;
2. `block_flows`: the contribution of each block's queries to the gradient of the far sums before it;
3. `scan_flows`: that gradient at the end of each block, from the last block to the first;
4. `query_gradients.query_gradients`: the forward pass again, for the gradients of queries and sinks;
5. `key_gradients.key_gradients`: each block in reverse, for the gradients of keys and values.

Gradients of W, b and the shifts are returned as one sum per block.
"""

import triton
import triton.language as tl

from hf_rfa.ops.triton.forward import folded_keys
from hf_rfa.ops.triton.pieces import (
    KEEP,
    decay,
    dot,
    features,
    numbers,
    own_weights,
    put_numbers,
    put_sums,
    tile,
    weights,
)


@triton.jit
def inner_products(
    gradient, output, result, gradient_b, gradient_h, gradient_g, gradient_t, output_b, output_h, output_g, output_t,
    heads, groups, length, M: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    part, a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head, g = a // (heads * groups), a // groups % heads, a % groups
    rows = tl.arange(0, BT)
    left = gradient + row * gradient_b + head * gradient_h + g * gradient_g
    right = output + row * output_b + head * output_h + g * output_g
    x = tile(left, part * BT, rows, length, gradient_t, M, BM, BT).to(tl.float32)
    y = tile(right, part * BT, rows, length, output_t, M, BM, BT).to(tl.float32)
    put_numbers(result + a * length, part * BT, rows, length, tl.sum(x * y, 1), BT)


@triton.jit
def query_psi(
    query, r, log_weight, start, rows, length, stride, w, b, h, head, code,
    D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk's queries, their W x + b, r, psi, and the weight of psi.S in the output (0 if it is dropped)."""
    queries = tile(query, start, rows, length, stride, D, BD, C)
    w, b, h = weights(w, b, h, head, D, BD, P, BP)
    size = numbers(r, start, rows, length, C)
    projection = tl.dot(queries, w, input_precision=PRECISION) + b[None, :]
    first, second, _ = features(size[:, None] * projection + h[None, :], code, P, BP, MAP, False)
    inside = (rows < C) & (start + rows < length)
    log = tl.load(log_weight + start + rows, mask=inside, other=float("-inf"))
    return queries, projection, size, first, second, tl.exp(tl.where(log == float("inf"), float("-inf"), log))


@triton.jit
def block_flows(
    query, key, gradient, query_r, key_r, key_scale, inner, log_weight, query_w, query_bias, query_shift, key_w,
    key_bias, key_shift, map_codes, codes, flags, peaks, out,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, gradient_b, gradient_h, gradient_g, gradient_t,
    code_row, flag_row, heads, groups, length, chunks, blocks, L,
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
    query, gradient = query + row * query_b + head * query_h, gradient + row * gradient_b + head * gradient_h + column
    key = key + row * key_b + head * key_h
    tokens = a * groups * length
    query_r, inner, log_weight = query_r + tokens, inner + tokens, log_weight + tokens
    key_r, key_scale = key_r + a * length, key_scale + a * length
    codes, flags, peaks = codes + row * code_row, flags + row * flag_row, peaks + a * (chunks + 1)
    code = tl.load(map_codes + head)
    S1, z1 = tl.zeros((BP, BV), tl.float32), tl.zeros((BP,), tl.float32)
    S2, z2 = tl.zeros((BP, BV), tl.float32), tl.zeros((BP,), tl.float32)
    first_peak = tl.load(peaks + block * L)
    reaches = tl.full((), 1, tl.int32)  # whether no document has begun since the start of the block
    for step in range(block * L, tl.minimum(block * L + L, chunks)):
        flag = tl.load(flags + step)
        reaches = reaches * (flag & KEEP)
        peak = tl.load(peaks + step)
        fade = tl.where(reaches != 0, decay(first_peak, peak), 0.0)
        if not DELAY:
            _, _, log_scale = folded_keys(
                key, key_scale, codes, flag, step, chunks, length, key_t, key_r, rows, key_w, key_bias, key_shift,
                head, code, D, BD, P, BP, C, DELAY, MAP, PRECISION,
            )  # fmt: skip
            _, lifted, _ = own_weights(log_scale, peak, rows)
        for g in range(groups):
            _, _, _, first, second, weight = query_psi(
                query + g * query_g, query_r + g * length, log_weight + g * length, step * C, rows, length, query_t,
                query_w, query_bias, query_shift, head, code, D, BD, P, BP, C, MAP, PRECISION,
            )  # fmt: skip
            weight = weight * fade
            if not DELAY:
                weight = weight * lifted
            above = tile(gradient + g * gradient_g, step * C, rows, length, gradient_t, MV, BV, C).to(tl.float32)
            above = above * weight[:, None]
            whole = -weight * numbers(inner + g * length, step * C, rows, length, C)
            S1 += dot(tl.trans(first), above, STATE, PRECISION)
            z1 += tl.sum(first * whole[:, None], 0)
            if TWO:
                S2 += dot(tl.trans(second), above, STATE, PRECISION)
                z2 += tl.sum(second * whole[:, None], 0)
    out += (a * blocks + block) * (F * M + F)
    put_sums(out, 0, S1, z1, P, BP, M, MV, BV, F, column)
    if TWO:
        put_sums(out, 1, S2, z2, P, BP, M, MV, BV, F, column)


@triton.jit
def scan_flows(flow, fade, last, blocks, E, BE: tl.constexpr, STAGES: tl.constexpr):
    """In place, in reverse: replace each block's own flow by the flow at its end. `last` (A, E) is the flow after the
    last block, then that before the first. fade (A, blocks) is the share of a flow at a block's end that reaches its
    start."""
    part, a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = part * BE + tl.arange(0, BE)
    inside = index < E
    total = tl.load(last + a * E + index, mask=inside, other=0.0)
    for back in tl.range(blocks, num_stages=STAGES):
        block = blocks - 1 - back
        place = flow + (a * blocks + block) * E + index
        own = tl.load(place, mask=inside, other=0.0)
        tl.store(place, total, mask=inside)
        total = own + total * tl.load(fade + a * blocks + block)
    tl.store(last + a * E + index, total, mask=inside)


@triton.jit
def put_weights(w, b, h, place, dw, db, dh, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, BP: tl.constexpr):
    """Store a block's sums of the gradients of W (as (BP, BD)), b and the shifts."""
    features, columns = tl.arange(0, BP), tl.arange(0, BD)
    wanted = features < P
    pointers = w + place * P * D + features[:, None] * D + columns[None, :]
    tl.store(pointers, dw, mask=wanted[:, None] & (columns < D)[None, :])
    tl.store(b + place * P + features, db, mask=wanted)
    tl.store(h + place * P + features, dh, mask=wanted)
