"""The forward pass of one block of chunks of the causal operator; `causal.gradients` has the backward pass.

Autograd records nothing here. Rows and key heads share one dimension A = B * Hk; a block has n chunks of C tokens,
each with R = G * C queries, F features and s sinks. `delay` is 1 with a window, 0 without: once chunk i has read the
far sums, chunk i - delay is added to them. The far sums are S (A, F, M + 1), divided by exp(m), m (A).

    far:   num_i = psi(q_i)^T S_i,    S_{i+1} = e_i S_i + psi(K)^T diag(w) [V, 1],    e_i, w <= 1
    out_i = (a_i near_i + b_i num_i) / Z_i,  Z_i the sum of both denominators (and exp(sink logit))
"""

from dataclasses import dataclass

import torch

from hf_rfa.ops.causal.narrow_products import narrowed, product, read_states
from hf_rfa.ops.causal.near import near_attention, windows
from hf_rfa.ops.causal.pool import Pool
from hf_rfa.ops.causal.scratch import Scratch
from hf_rfa.ops.combine import far_excess, smallest_denominator


@dataclass(frozen=True)
class Block:
    """The inputs of a block.

    Attributes:
        query: (A, n, R, D).
        key, value: (A, n + 1, C, D or M): the chunk before the block (zeros before the first) and its own chunks.
        sink_key, sink_value: (A, n, s, D or M), the sinks of the document of each chunk.
        mask: (1 or A, 1 or n, R, W), 0 or -inf, over the near keys; None without a window, or if that part is known.
        fold: (1 or A, n, C) bool: which keys of chunk i - delay are added to the far sums.
        keep: (1 or A, n) bool: whether chunk i continues the document of the chunk before it.
        decay: (A, n + 1, C), log g summed from the first slot of each chunk; None without a gate.
        sink_logits: (A, 1, R) or None.
        log_gamma: (A, 1, 1), -inf where gamma is 0.
        log_limit: (A, 1, 1), log of the kernel's `far_limit`, inf for none; or None.
        steady: Whether `keep` is known to be all True.
        narrow: Whether products are bfloat16, see `narrow_products`.
        kept: The far keys that the chunks see exactly, and those that they evict; None if none are kept.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sink_key: torch.Tensor
    sink_value: torch.Tensor
    mask: torch.Tensor | None
    fold: torch.Tensor
    keep: torch.Tensor
    decay: torch.Tensor | None
    sink_logits: torch.Tensor | None
    log_gamma: torch.Tensor
    log_limit: torch.Tensor | None
    scaling: float
    delay: int
    steady: bool
    narrow: bool = False
    kept: "KeptRows | None" = None

    @property
    def groups(self) -> int:
        """G, query heads per key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def far(self) -> slice:
        """The chunks of `key` that the block adds to the far sums if no keys are kept."""
        return slice(1 - self.delay, 1 - self.delay + self.query.shape[1])

    @property
    def far_key(self) -> torch.Tensor:
        """(A, n, C, D), the keys added to the far sums after each chunk."""
        return self.key[:, self.far] if self.kept is None else self.kept.far_key

    @property
    def far_value(self) -> torch.Tensor:
        """(A, n, C, M), the values of `far_key`."""
        return self.value[:, self.far] if self.kept is None else self.kept.far_value


@dataclass(frozen=True)
class KeptRows:
    """The kept keys of a block's chunks.

    Attributes:
        index, mask: (A, n, K) int64 and bool: the rows of the `pools` of keys and values that each chunk sees.
        far_key, far_value: (A, n, C, D or M), the keys and values evicted after each chunk.
        far_decay: (A, n, C), log g summed from behind each of those up to the chunk; None without a gate.
    """

    pools: tuple[Pool, Pool]
    index: torch.Tensor
    mask: torch.Tensor
    far_key: torch.Tensor
    far_value: torch.Tensor
    far_decay: torch.Tensor | None


@dataclass(frozen=True)
class Features:
    """psi of a block's queries (A, n, R, F) and far keys (A, n, C, F), with log-scales (A, n, R) and (A, n, C)."""

    query: torch.Tensor
    query_scale: torch.Tensor
    key: torch.Tensor
    key_scale: torch.Tensor


@dataclass(frozen=True)
class Sums:
    """The terms that a block adds to the far sums, chunk by chunk.

    Attributes:
        weights: (A, n, C) w of the far keys.
        shrink: (A, n) e.
        extended: (A, n, C, M + 1), w [v, 1].
        key_scale: (A, n, C), the log-scale of the far keys, -inf for keys that are not added.
        read_log_max: (A, n), m as each chunk reads it.
        query_scale: (A, n, R), the log-scale of the queries' features.
        end_log_max: (A), m after the block.
    """

    weights: torch.Tensor
    shrink: torch.Tensor
    extended: torch.Tensor
    key_scale: torch.Tensor
    read_log_max: torch.Tensor
    query_scale: torch.Tensor
    end_log_max: torch.Tensor


@dataclass(frozen=True)
class Parts:
    """The near and the far part of a block before they are combined.

    Attributes:
        near, near_log: (A, n, R, M), (A, n, R): near softmax and its log-normaliser; None without a window.
        far: (A, n, R, M + 1), the far numerator and denominator.
        far_log: (A, n, R), log of the factor that `far` was divided by; -inf where there are no far keys.
    """

    near: torch.Tensor | None
    near_log: torch.Tensor | None
    far: torch.Tensor
    far_log: torch.Tensor


@dataclass(frozen=True)
class IntraChunk:
    """Weights of a chunk's own keys without a window: exp(scale_j - base_r) and psi(q_r).psi(k_j), both (A, n, R, C),
    base (A, n, R), and exp(m - base) (A, n, R), the factor of what is read from the state."""

    weights: torch.Tensor
    scores: torch.Tensor
    base: torch.Tensor
    lifted: torch.Tensor


@dataclass(frozen=True)
class Combined:
    """Per query (A, n, R): L, the log of the whole denominator; b / Z; the log-scale of its far sums (-inf if it has
    no far keys); whether their estimate is dropped."""

    log_total: torch.Tensor
    far_weight: torch.Tensor
    far_log: torch.Tensor
    dropped: torch.Tensor


def finite(x: torch.Tensor) -> torch.Tensor:
    """Replace -inf (no key) by 0, so that differences stay defined."""
    return x.masked_fill(x == -torch.inf, 0.0)


def block_sums(block: Block, psi: Features, log_max: torch.Tensor, scratch: Scratch) -> Sums:
    """The terms that the block adds to far sums divided by exp(log_max)."""
    key_scale, query_scale = psi.key_scale, psi.query_scale
    if block.decay is not None:  # relative to the first slot of the chunk that adds the key
        if block.kept is not None:
            assert block.kept.far_decay is not None
            key_scale = key_scale + block.kept.far_decay
        else:
            key_scale = key_scale - block.decay[:, block.far]
            if block.delay:
                key_scale = key_scale + block.decay[:, :-1, -1:]
        query_scale = query_scale + block.decay[:, 1:].repeat(1, 1, block.groups)
    key_scale = key_scale.masked_fill(~block.fold, -torch.inf)
    read_log_max, after, end_log_max = _running_max(block, key_scale.amax(-1), log_max)
    base = finite(after)
    shrink = (read_log_max - base).exp_()
    weights = (key_scale - base.unsqueeze(-1)).exp_()
    extended = extend(block.far_value, weights, scratch)
    return Sums(weights, shrink, extended, key_scale, read_log_max, query_scale, end_log_max)


def block_parts(
    block: Block, psi: Features, sums: Sums, state: torch.Tensor, scratch: Scratch,
    near: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Parts:  # fmt: skip
    """Both parts of every query; advances the state S^T (A, M + 1, F) in place. near: The near part, if known."""
    rows, chunks, queries = psi.query.shape[:3]
    if block.narrow:
        states = narrow_scratch(scratch, "states", psi.query, state)
        states = read_states(narrowed(psi.key), sums.extended, sums.shrink, state, states)
        far = scratch("far", state, rows, chunks, queries, state.shape[1])
        product(narrowed(psi.query), states.mT, far)
    else:
        far = scratch("far", state, chunks, rows, queries, state.shape[1]).transpose(0, 1)  # contiguous per chunk
        steps = (psi.query, psi.key, sums.extended.mT, sums.shrink[..., None, None], far)
        for query, key, new, factor, read in zip(*(x.unbind(1) for x in steps), strict=True):
            torch.bmm(query, state.mT, out=read)
            state.mul_(factor).baddbmm_(new, key)
    if block.delay:
        if near is None:
            assert block.mask is not None
            near = near_attention(block.query, *exact_rows(block, scratch), block.mask, block.scaling)
        return Parts(*near, far, sums.query_scale + sums.read_log_max.unsqueeze(-1))
    own = intra_chunk(block, psi, sums)
    far.mul_(own.lifted.unsqueeze(-1))
    far += (own.weights * own.scores) @ extend(block.value[:, 1:], None, scratch)
    return Parts(None, None, far, sums.query_scale + own.base)


def narrow_scratch(scratch: Scratch, name: str, query: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """A buffer (A, n, M + 1, F) in bfloat16, for query features (A, n, R, F) and sums S^T (A, M + 1, F)."""
    return scratch(f"narrow {name}", state[:0].to(torch.bfloat16), *query.shape[:2], *state.shape[1:])


def exact_rows(block: Block, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (A, n, W, D or M) that each chunk sees exactly, in the order of the block's mask."""
    key = windows(block.key, block.sink_key, scratch, "near keys")
    value = windows(block.value, block.sink_value, scratch, "near values")
    if block.kept is None:
        return key, value
    kept_key, kept_value = (pool.take(block.kept.index) for pool in block.kept.pools)
    return _beside(kept_key, key, scratch, "exact keys"), _beside(kept_value, value, scratch, "exact values")


def _beside(kept: torch.Tensor, near: torch.Tensor, scratch: Scratch, name: str) -> torch.Tensor:
    count = kept.shape[2]
    rows = scratch(name, near, *near.shape[:2], count + near.shape[2], near.shape[3])
    rows[:, :, :count], rows[:, :, count:] = kept, near
    return rows


def _running_max(
    block: Block, log_maxima: torch.Tensor, log_max: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m as each chunk reads it (A, n), m after each addition (A, n), and m after the block (A)."""
    if block.steady and block.decay is None:
        running = torch.cat([log_max.unsqueeze(1), log_maxima], dim=1).cummax(1).values
        return running[:, :-1], running[:, 1:], running[:, -1]
    read, after = [], []
    for i in range(log_maxima.shape[1]):
        read.append(log_max.masked_fill(~block.keep[:, i], -torch.inf))
        after.append(torch.maximum(read[-1], log_maxima[:, i]))
        log_max = after[-1] if block.decay is None else after[-1] + block.decay[:, i + 1, -1]
    return torch.stack(read, 1), torch.stack(after, 1), log_max


def extend(value: torch.Tensor, weights: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
    """w [v, 1], so that one product gives numerators and denominators together."""
    name = "values" if weights is None else "weighted values"
    whole = scratch(name, value, *value.shape[:-1], value.shape[-1] + 1)
    if weights is None:
        whole[..., :-1], whole[..., -1] = value, 1.0
    else:
        torch.mul(value, weights.unsqueeze(-1), out=whole[..., :-1])
        whole[..., -1] = weights
    return whole


def intra_chunk(block: Block, psi: Features, sums: Sums) -> IntraChunk:
    """Weights of a chunk's own keys. The maximum runs up to each query, so that later keys change nothing."""
    key_scale, read_log_max = sums.key_scale, sums.read_log_max
    chunk, groups = key_scale.shape[-1], block.groups
    base = torch.maximum(key_scale.cummax(-1).values, read_log_max.unsqueeze(-1))
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=base.device).tril()
    weights = key_scale.unsqueeze(-2) - finite(base).unsqueeze(-1)
    weights = weights.masked_fill_(~causal, -torch.inf).exp_()
    lifted = (read_log_max.unsqueeze(-1) - finite(base)).exp()
    if groups > 1:
        weights, base, lifted = weights.repeat(1, 1, groups, 1), base.repeat(1, 1, groups), lifted.repeat(1, 1, groups)
    return IntraChunk(weights, psi.query @ psi.key.mT, base, lifted)


def combine_block(block: Block, parts: Parts, output: torch.Tensor) -> Combined:
    """Both parts under one normaliser, into output (A, n, R, M); `ops.combine` says when the far part is dropped."""
    far_log, denominator = parts.far_log + block.log_gamma, parts.far[..., -1]
    dropped = ~(denominator > smallest_denominator(denominator.dtype))
    log_scale = far_log.masked_fill(dropped, -torch.inf)
    total = log_scale + denominator.masked_fill(dropped, 1.0).log_()
    if block.log_limit is not None and parts.near_log is not None:
        above = far_excess(total, parts.near_log, block.sink_logits, block.log_limit)
        log_scale -= above
        total -= above
    if parts.near_log is not None:
        total = torch.maximum(total, parts.near_log)
    if block.sink_logits is not None:
        total = torch.maximum(total, block.sink_logits)
    if parts.near_log is None:
        total = finite(total)
    far_weight = (log_scale - total).exp_()
    mass = far_weight * denominator
    if parts.near_log is not None:
        near_weight = (parts.near_log - total).exp_()
        mass += near_weight
    if block.sink_logits is not None:
        mass += (block.sink_logits - total).exp_()
    share = mass.reciprocal()
    if parts.near_log is None:  # zero where neither part has weight
        share.masked_fill_(mass == 0, 0.0)
    far_weight *= share
    torch.mul(parts.far[..., :-1], far_weight.unsqueeze(-1), out=output)
    if parts.near is not None:
        output.addcmul_(parts.near, (near_weight * share).unsqueeze(-1))
    return Combined(total + mass.log_(), far_weight, far_log, dropped)
