"""The kernels of the exact part of a call that keeps keys: all chunks are independent once the keys are chosen.

A *pool* per row and key head holds the state's s sinks and K kept keys (E entries), then the T aligned tokens. A chunk
sees its own keys and those of the chunk before it, and the entries of the pool that are `listed` for it: its sinks and
kept keys, -1 in empty places.

1. `exact_outputs`: softmax over these keys, and the log of its normaliser;
2. `exact_query_gradients`: added to the far part's gradient of the queries;
3. `exact_key_gradients`: added to the pool's gradient; many chunks may list the same key, hence atomically.

Tiles of a list without any key are passed over: those of the first chunks of a text, and of heads that keep fewer keys
than others of their layer.
"""

import triton
import triton.language as tl

from hf_rfa.ops.triton.pieces import (
    attend,
    dot,
    near_masks,
    numbers,
    put,
    put_numbers,
    share_gradients,
    slot_codes,
    tile,
)


@triton.jit
def pool_places(start, rows, length, E, C: tl.constexpr):
    """The entries of the pool that are the tokens start .. start + C; -1 outside the sequence."""
    inside = (rows < C) & (start + rows >= 0) & (start + rows < length)
    return tl.where(inside, E + start + rows, -1)


@triton.jit
def pool_tile(of_state, tokens, index, E, stride, D: tl.constexpr, BD: tl.constexpr):
    """Load entries of the pool, `of_state` (E, D) and then tokens (T, D); zeros where `index` is -1."""
    columns = tl.arange(0, BD)
    wanted = (columns < D)[None, :]
    place = index.to(tl.int64)[:, None]
    is_old, is_new = ((index >= 0) & (index < E))[:, None], (index >= E)[:, None]
    old = tl.load(of_state + place * D + columns[None, :], mask=is_old & wanted, other=0.0)
    new = tl.load(tokens + (place - E) * stride + columns[None, :], mask=is_new & wanted, other=0.0)
    return tl.where(is_new, new, old)


@triton.jit
def listed_tiles(
    listed, slots, count, state_key, key, state_value, value, E, key_t, value_t, D: tl.constexpr, BD: tl.constexpr,
    M: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The entries of the pool in `slots` of a list that are below `count`, their keys and their values."""
    index = tl.load(listed + slots, mask=slots < count, other=-1)
    keys = pool_tile(state_key, key, index, E, key_t, D, BD)
    return index, keys, pool_tile(state_value, value, index, E, value_t, M, BM)


@triton.jit
def exact_outputs(
    query, key, value, state_key, state_value, listed, codes, flags, output, log,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, value_b, value_h, value_t, code_row, flag_row, heads,
    groups, length, chunks, E, scaling,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, A * G)."""
    step, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    a, g = each // groups, each % groups
    row, head = a // heads, a % heads
    rows, slots = tl.arange(0, BC), tl.arange(0, BN)
    key, value = key + row * key_b + head * key_h, value + row * value_b + head * value_h
    state_key, state_value = state_key + a * E * D, state_value + a * E * M
    codes, flags = codes + row * code_row, flags + row * flag_row
    listed += (a * (chunks + 1) + step) * N
    start = step * C
    queries = tile(query + row * query_b + head * query_h + g * query_g, start, rows, length, query_t, D, BD, C)
    _sinks, sees_before, sees_own = near_masks(
        slot_codes(codes, step, chunks, rows, C), slot_codes(codes, step - 1, chunks, rows, C), tl.load(flags + step),
        rows, rows, C, 0,
    )  # fmt: skip
    # Every query sees a key of its own chunk, so that the maximum is finite from here on.
    top, mass = tl.full((BC,), float("-inf"), tl.float32), tl.zeros((BC,), tl.float32)
    keys, values = tile(key, start, rows, length, key_t, D, BD, C), tile(value, start, rows, length, value_t, M, BM, C)
    top, mass, result = attend(
        queries, keys, values, sees_own, scaling, top, mass, tl.zeros((BC, BM), tl.float32), PRECISION
    )
    keys = tile(key, start - C, rows, length, key_t, D, BD, C)
    values = tile(value, start - C, rows, length, value_t, M, BM, C)
    top, mass, result = attend(queries, keys, values, sees_before, scaling, top, mass, result, PRECISION)
    for part in range(0, N // BN * BN, BN):
        if tl.max(tl.load(listed + part + slots), 0) >= 0:
            index, listed_keys, listed_values = listed_tiles(
                listed + part, slots, BN, state_key, key, state_value, value, E, key_t, value_t, D, BD, M, BM
            )  # fmt: skip
            top, mass, result = attend(
                queries, listed_keys, listed_values, (index >= 0)[None, :], scaling, top, mass, result, PRECISION
            )  # fmt: skip
    if N % BN:
        index, listed_keys, listed_values = listed_tiles(
            listed + N // BN * BN, tl.arange(0, BR), N % BN, state_key, key, state_value, value, E, key_t, value_t, D,
            BD, M, BM,
        )  # fmt: skip
        top, mass, result = attend(
            queries, listed_keys, listed_values, (index >= 0)[None, :], scaling, top, mass, result, PRECISION
        )  # fmt: skip
    put(output + each * length * M, start, rows, length, M, result / mass[:, None], M, BM, C)
    put_numbers(log + each * length, start, rows, length, top + tl.log(mass), C)


@triton.jit
def exact_query_gradients(
    query, key, value, state_key, state_value, gradient, listed, codes, flags, inner, log_total, far, d_query,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, value_b, value_h, value_t, gradient_b, gradient_h,
    gradient_g, gradient_t, d_b, d_h, d_g, d_t, code_row, flag_row, heads, groups, length, chunks, E, scaling,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, A * G); far (A * G, T, D) is the far part's gradient of the queries."""
    step, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    a, g = each // groups, each % groups
    row, head = a // heads, a % heads
    rows, slots = tl.arange(0, BC), tl.arange(0, BN)
    key, value = key + row * key_b + head * key_h, value + row * value_b + head * value_h
    state_key, state_value = state_key + a * E * D, state_value + a * E * M
    codes, flags = codes + row * code_row, flags + row * flag_row
    listed += (a * (chunks + 1) + step) * N
    start = step * C
    queries = tile(query + row * query_b + head * query_h + g * query_g, start, rows, length, query_t, D, BD, C)
    gradient += row * gradient_b + head * gradient_h + g * gradient_g
    above = tile(gradient, start, rows, length, gradient_t, M, BM, C)
    inners = numbers(inner + each * length, start, rows, length, C)
    total = numbers(log_total + each * length, start, rows, length, C)
    result = tile(far + each * length * D, start, rows, length, D, D, BD, C)
    _sinks, sees_before, sees_own = near_masks(
        slot_codes(codes, step, chunks, rows, C), slot_codes(codes, step - 1, chunks, rows, C), tl.load(flags + step),
        rows, rows, C, 0,
    )  # fmt: skip
    keys, values = tile(key, start, rows, length, key_t, D, BD, C), tile(value, start, rows, length, value_t, M, BM, C)
    _, d_scores = share_gradients(queries, above, inners, total, keys, values, sees_own, scaling, PRECISION)
    result += dot(d_scores, keys, keys.dtype, PRECISION)
    keys = tile(key, start - C, rows, length, key_t, D, BD, C)
    values = tile(value, start - C, rows, length, value_t, M, BM, C)
    _, d_scores = share_gradients(queries, above, inners, total, keys, values, sees_before, scaling, PRECISION)
    result += dot(d_scores, keys, keys.dtype, PRECISION)
    for part in range(0, N // BN * BN, BN):
        if tl.max(tl.load(listed + part + slots), 0) >= 0:
            index, listed_keys, listed_values = listed_tiles(
                listed + part, slots, BN, state_key, key, state_value, value, E, key_t, value_t, D, BD, M, BM
            )  # fmt: skip
            sees = (index >= 0)[None, :]
            _listed, d_listed = share_gradients(
                queries, above, inners, total, listed_keys, listed_values, sees, scaling, PRECISION
            )  # fmt: skip
            result += dot(d_listed, listed_keys, listed_keys.dtype, PRECISION)
    if N % BN:
        index, listed_keys, listed_values = listed_tiles(
            listed + N // BN * BN, tl.arange(0, BR), N % BN, state_key, key, state_value, value, E, key_t, value_t, D,
            BD, M, BM,
        )  # fmt: skip
        sees = (index >= 0)[None, :]
        _listed, d_listed = share_gradients(
            queries, above, inners, total, listed_keys, listed_values, sees, scaling, PRECISION
        )  # fmt: skip
        result += dot(d_listed, listed_keys, listed_keys.dtype, PRECISION)
    put(d_query + row * d_b + head * d_h + g * d_g, start, rows, length, d_t, result, D, BD, C)


@triton.jit
def add_gradients(
    query, gradient, inner, log_total, keys, values, sees, index, d_key, d_value, start, rows, length, groups,
    query_g, query_t, gradient_g, gradient_t, scaling, D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr,
    BM: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a tile of keys and values, from a chunk's queries, to entries `index` of the pool's."""
    d_keys, d_values = tl.zeros(keys.shape, tl.float32), tl.zeros(values.shape, tl.float32)
    for g in range(groups):
        queries = tile(query + g * query_g, start, rows, length, query_t, D, BD, C)
        above = tile(gradient + g * gradient_g, start, rows, length, gradient_t, M, BM, C)
        inners = numbers(inner + g * length, start, rows, length, C)
        total = numbers(log_total + g * length, start, rows, length, C)
        shares, d_scores = share_gradients(queries, above, inners, total, keys, values, sees, scaling, PRECISION)
        d_values += dot(tl.trans(shares), above, values.dtype, PRECISION)
        d_keys += dot(tl.trans(d_scores), queries, keys.dtype, PRECISION)
    there, place = (index >= 0)[:, None], index.to(tl.int64)[:, None]
    columns = tl.arange(0, BD)[None, :]
    tl.atomic_add(d_key + place * D + columns, d_keys, mask=there & (columns < D), sem="relaxed")
    columns = tl.arange(0, BM)[None, :]
    tl.atomic_add(d_value + place * M + columns, d_values, mask=there & (columns < M), sem="relaxed")


@triton.jit
def exact_key_gradients(
    query, key, value, state_key, state_value, gradient, listed, codes, flags, inner, log_total, d_key, d_value,
    query_b, query_h, query_g, query_t, key_b, key_h, key_t, value_b, value_h, value_t, gradient_b, gradient_h,
    gradient_g, gradient_t, code_row, flag_row, heads, groups, length, chunks, E, scaling,
    D: tl.constexpr, BD: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, BC: tl.constexpr,
    N: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, A); d_key (A, E + T, D) and d_value (A, E + T, M) are float32."""
    step, a = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, head = a // heads, a % heads
    rows, slots = tl.arange(0, BC), tl.arange(0, BN)
    query, gradient = query + row * query_b + head * query_h, gradient + row * gradient_b + head * gradient_h
    key, value = key + row * key_b + head * key_h, value + row * value_b + head * value_h
    inner, log_total = inner + a * groups * length, log_total + a * groups * length
    state_key, state_value = state_key + a * E * D, state_value + a * E * M
    d_key, d_value = d_key + a * (E + length) * D, d_value + a * (E + length) * M
    codes, flags = codes + row * code_row, flags + row * flag_row
    listed += (a * (chunks + 1) + step) * N
    start = step * C
    _sinks, sees_before, sees_own = near_masks(
        slot_codes(codes, step, chunks, rows, C), slot_codes(codes, step - 1, chunks, rows, C), tl.load(flags + step),
        rows, rows, C, 0,
    )  # fmt: skip
    keys, values = tile(key, start, rows, length, key_t, D, BD, C), tile(value, start, rows, length, value_t, M, BM, C)
    add_gradients(
        query, gradient, inner, log_total, keys, values, sees_own, pool_places(start, rows, length, E, C), d_key,
        d_value, start, rows, length, groups, query_g, query_t, gradient_g, gradient_t, scaling, D, BD, M, BM, C,
        PRECISION,
    )  # fmt: skip
    keys = tile(key, start - C, rows, length, key_t, D, BD, C)
    values = tile(value, start - C, rows, length, value_t, M, BM, C)
    add_gradients(
        query, gradient, inner, log_total, keys, values, sees_before, pool_places(start - C, rows, length, E, C),
        d_key, d_value, start, rows, length, groups, query_g, query_t, gradient_g, gradient_t, scaling, D, BD, M, BM,
        C, PRECISION,
    )  # fmt: skip
    for part in range(0, N // BN * BN, BN):
        if tl.max(tl.load(listed + part + slots), 0) >= 0:
            index, listed_keys, listed_values = listed_tiles(
                listed + part, slots, BN, state_key, key, state_value, value, E, key_t, value_t, D, BD, M, BM
            )  # fmt: skip
            add_gradients(
                query, gradient, inner, log_total, listed_keys, listed_values, (index >= 0)[None, :], index, d_key,
                d_value, start, rows, length, groups, query_g, query_t, gradient_g, gradient_t, scaling, D, BD, M, BM,
                C, PRECISION,
            )  # fmt: skip
    if N % BN:
        index, listed_keys, listed_values = listed_tiles(
            listed + N // BN * BN, tl.arange(0, BR), N % BN, state_key, key, state_value, value, E, key_t, value_t, D,
            BD, M, BM,
        )  # fmt: skip
        add_gradients(
            query, gradient, inner, log_total, listed_keys, listed_values, (index >= 0)[None, :], index, d_key,
            d_value, start, rows, length, groups, query_g, query_t, gradient_g, gradient_t, scaling, D, BD, M, BM, C,
            PRECISION,
        )  # fmt: skip
