"""Functions that the kernels share: loading tokens, features, scores of near keys, the update of the far sums.

A tile holds one chunk of one head: BC >= C rows (slots), padded to a power of two of at least 16, as tensor cores
need.
Feature maps are numbers here: every map has `P` projected features with one or two components each.
"""

import triton
import triton.language as tl

#: exp of one projection (positive, optimal_positive); exp of plus and minus (hyperbolic); sine and cosine
#: (trigonometric); the latter two, chosen by each head's code; exp for queries and softmax for keys (clustered).
EXP, PAIR, WAVE, MIXED, CLUSTER = (tl.constexpr(n) for n in range(5))
#: The least positive far denominator: `ops.combine.smallest_denominator` of float32.
TINY = tl.constexpr(1.1754943508222875e-38 * 2**24)

#: Bits of a slot: it holds a token; its key is ever added to the far sums; its query is asked for.
VALID, FOLD, ASKED = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
#: Bits of a chunk: it continues the state; the previous chunk is of its document; sinks lie before its window; its
#: document goes on in the next chunk.
KEEP, FOLLOWS, BEHIND_SINKS, ADVANCES = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)


@triton.jit
def tile(base, start, rows, length, stride, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """Load the first BD of D numbers of the tokens start .. start + C; zeros elsewhere."""
    columns = tl.arange(0, BD)
    inside = (rows < C) & (start + rows >= 0) & (start + rows < length)
    pointers = base + (start + rows).to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def put(base, start, rows, length, stride, x, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """Store a tile; the inverse of `tile`."""
    columns = tl.arange(0, BD)
    inside = (rows < C) & (start + rows >= 0) & (start + rows < length)
    pointers = base + (start + rows).to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def numbers(base, start, rows, length, C: tl.constexpr):
    """Load one number per token of a chunk; 0 elsewhere."""
    inside = (rows < C) & (start + rows >= 0) & (start + rows < length)
    return tl.load(base + start + rows, mask=inside, other=0.0)


@triton.jit
def put_numbers(base, start, rows, length, x, C: tl.constexpr):
    inside = (rows < C) & (start + rows >= 0) & (start + rows < length)
    tl.store(base + start + rows, x, mask=inside)


@triton.jit
def weights(w, b, h, head, D: tl.constexpr, BD: tl.constexpr, P: tl.constexpr, BP: tl.constexpr):
    """W^T (BD, BP), b and h (BP) of a head: a feature's argument is r (W x + b) + h."""
    features, columns = tl.arange(0, BP), tl.arange(0, BD)
    wanted = features < P
    pointers = w + head.to(tl.int64) * P * D + features[None, :] * D + columns[:, None]
    matrix = tl.load(pointers, mask=wanted[None, :] & (columns < D)[:, None], other=0.0)
    bias = tl.load(b + head * P + features, mask=wanted, other=0.0)
    shift = tl.load(h + head * P + features, mask=wanted, other=0.0)
    return matrix, bias, shift


@triton.jit
def features(argument, code, P: tl.constexpr, BP: tl.constexpr, MAP: tl.constexpr, KEYS: tl.constexpr):
    """First and second components (rows, BP) of psi (the first twice if there is only one), and the log-scale."""
    wanted = (tl.arange(0, BP) < P)[None, :]
    peak = tl.zeros_like(tl.max(argument, 1))
    if MAP == WAVE:
        first = tl.where(wanted, tl.sin(argument), 0.0)
        second = tl.where(wanted, tl.cos(argument), 0.0)
    elif MAP == EXP or MAP == CLUSTER:
        argument = tl.where(wanted, argument, float("-inf"))
        peak = tl.max(argument, 1)
        first = tl.exp(argument - peak[:, None])
        if MAP == CLUSTER and KEYS:
            first = first / tl.sum(first, 1)[:, None]
            peak = tl.zeros_like(peak)
        second = first
    else:
        peak = tl.max(tl.where(wanted, tl.abs(argument), 0.0), 1)
        first = tl.where(wanted, tl.exp(argument - peak[:, None]), 0.0)
        second = tl.where(wanted, tl.exp(-argument - peak[:, None]), 0.0)
        if MAP == MIXED:
            wave = code == 1
            first = tl.where(wave & wanted, tl.sin(argument), first)
            second = tl.where(wave & wanted, tl.cos(argument), second)
            peak = tl.where(wave, 0.0, peak)
    return first, second, peak


@triton.jit
def argument_gradient(first, second, d_first, d_second, code, MAP: tl.constexpr, KEYS: tl.constexpr):
    """Gradient of the arguments, given those of the components; the peaks are constants that cancel."""
    if MAP == WAVE:
        result = d_first * second - d_second * first
    elif MAP == CLUSTER and KEYS:
        result = first * (d_first - tl.sum(d_first * first, 1)[:, None])
    elif MAP == EXP or MAP == CLUSTER:
        result = d_first * first
    else:
        result = d_first * first - d_second * second
        if MAP == MIXED:
            result = tl.where(code == 1, d_first * second - d_second * first, result)
    return result


@triton.jit
def decay(older, newer):
    """exp(older - newer) of two peaks; 0 if the older one is -inf (no keys)."""
    safe = tl.where(newer == float("-inf"), 0.0, newer)
    return tl.exp(older - safe)


@triton.jit
def dot(x, y, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """x @ y with operands in TYPE, accumulated in float32."""
    return tl.dot(x.to(TYPE), y.to(TYPE), input_precision=PRECISION)


@triton.jit
def attend(queries, keys, values, sees, scaling, top, mass, result, PRECISION: tl.constexpr):
    """Add a tile of keys to a softmax: its running maximum, its weights relative to it, and their sum of values."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scaling
    scores = tl.where(sees, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    shares, shrink = tl.exp(scores - new_top[:, None]), tl.exp(top - new_top)
    result = result * shrink[:, None] + dot(shares, values, values.dtype, PRECISION)
    return new_top, mass * shrink + tl.sum(shares, 1), result


@triton.jit
def share_gradients(
    queries, above, inners, total, keys, values, sees, scaling, PRECISION: tl.constexpr
):  # fmt: skip
    """The weights of a tile of keys under the whole normaliser, and the gradient of their scores q.k."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scaling - total[:, None]
    shares = tl.exp(tl.where(sees, scores, float("-inf")))
    d_shares = dot(above, tl.trans(values), values.dtype, PRECISION) - inners[:, None]
    return shares, shares * d_shares * scaling


@triton.jit
def near_masks(own_code, before_code, flags, rows, sinks, C: tl.constexpr, S: tl.constexpr):
    """Which sinks (1, BS), keys of the chunk before (1, BC) and of the own chunk (BC, BC) each query sees."""
    sink = ((flags & BEHIND_SINKS) != 0) & (sinks < S)
    before = ((flags & FOLLOWS) != 0) & ((before_code & VALID) != 0)
    # Padding sees itself, so that no row is empty; no other token sees padding.
    filled = ((own_code & VALID) != 0)[None, :]
    own = (rows[None, :] <= rows[:, None]) & (filled | (rows[None, :] == rows[:, None]))
    return sink[None, :], before[None, :], own


@triton.jit
def slot_codes(codes, chunk, chunks, rows, C: tl.constexpr):
    """Load the bits of a chunk's slots; 0 outside the sequence."""
    index = chunk * C + rows
    return tl.load(codes + index, mask=(rows < C) & (index >= 0) & (index < chunks * C), other=0).to(tl.int32)


@triton.jit
def own_weights(scale, peak, rows):
    """Without a window: exp(scale_j - base_i) (BC, BC) for keys j up to query i, exp(peak - base), base (BC).

    The maximum runs over the keys up to each query, so that later keys change nothing.
    """
    causal = rows[None, :] <= rows[:, None]
    running = tl.max(tl.where(causal, scale[None, :], float("-inf")), 1)
    base = tl.maximum(running, peak)
    safe = tl.where(base == float("-inf"), 0.0, base)
    return tl.where(causal, tl.exp(scale[None, :] - safe[:, None]), 0.0), tl.exp(peak - safe), base


@triton.jit
def sums(
    base, half, P: tl.constexpr, BP: tl.constexpr, M: tl.constexpr, MV: tl.constexpr, BV: tl.constexpr,
    F: tl.constexpr, column,
):  # fmt: skip
    """Load MV columns of S (BP, BV), from `column` on, and z (BP), of one half of the F components of [S, z]."""
    components, columns = tl.arange(0, BP), tl.arange(0, BV)
    wanted = components < P
    pointers = base + column + (half * P + components)[:, None] * M + columns[None, :]
    whole = tl.load(pointers, mask=wanted[:, None] & (columns < MV)[None, :], other=0.0)
    return whole, tl.load(base + F * M + half * P + components, mask=wanted, other=0.0)


@triton.jit
def put_sums(
    base, half, S, z, P: tl.constexpr, BP: tl.constexpr, M: tl.constexpr, MV: tl.constexpr, BV: tl.constexpr,
    F: tl.constexpr, column,
):  # fmt: skip
    """Store S and z of one half; the inverse of `sums`."""
    components, columns = tl.arange(0, BP), tl.arange(0, BV)
    wanted = components < P
    pointers = base + column + (half * P + components)[:, None] * M + columns[None, :]
    tl.store(pointers, S, mask=wanted[:, None] & (columns < MV)[None, :])
    tl.store(base + F * M + half * P + components, z, mask=wanted)


@triton.jit
def fold_in(
    S1, z1, S2, z2, first, second, values, shrink, weight, TWO: tl.constexpr, STATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Scale both halves of the far sums by `shrink` and add a chunk's keys, each value with its `weight`."""
    new = values.to(tl.float32) * weight[:, None]
    S1 = S1 * shrink + dot(tl.trans(first), new, STATE, PRECISION)
    z1 = z1 * shrink + tl.sum(first * weight[:, None], 0)
    if TWO:
        S2 = S2 * shrink + dot(tl.trans(second), new, STATE, PRECISION)
        z2 = z2 * shrink + tl.sum(second * weight[:, None], 0)
    return S1, z1, S2, z2


@triton.jit
def sink_tiles(
    key, value, sink_key, sink_value, sink_chunk, sinks, length, key_t, value_t, D: tl.constexpr, BD: tl.constexpr,
    M: tl.constexpr, MV: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Load keys and values of the sinks: the first tokens of chunk `sink_chunk`, or the state's if that is < 0.
    MV of the M numbers of a value are loaded, from where the pointers point to."""
    if sink_chunk < 0:
        keys = tile(sink_key, 0, sinks, S, D, D, BD, S)
        values = tile(sink_value, 0, sinks, S, M, MV, BM, S)
    else:
        keys = tile(key, sink_chunk * C, sinks, length, key_t, D, BD, S)
        values = tile(value, sink_chunk * C, sinks, length, value_t, MV, BM, S)
    return keys, values
