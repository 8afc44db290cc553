"""One block of chunks of the causal operator: its forward pass, and its backward pass from what the forward made.

Plain tensors, nothing is recorded by autograd. Rows and key heads are one dimension A = B * Hk; a block has n chunks
of C tokens, R = G * C queries each, F features, s sinks. `delay` is 1 beside a window, 0 without: once chunk i has
read the far sums, chunk i - delay is added to them. They are S (A, F, M + 1), divided by exp(m), m (A).

    far:   num_i = psi(q_i)^T S_i,    S_{i+1} = e_i S_i + psi(K)^T diag(w) [V, 1],    e_i, w <= 1
    out_i = (a_i near_i + b_i num_i) / Z_i,  Z_i the sum of both denominators (and exp(sink logit))

With dN = do / Z and dZ = -do.o / Z, the far part's gradient is that of linear attention with [do, -do.o] b / Z.
"""

from dataclasses import dataclass

import torch

from hf_rfa.ops.combine import smallest_denominator
from hf_rfa.ops.near import near_attention, near_gradients, split_windows, windows


@dataclass(frozen=True)
class Block:
    """What a block reads.

    Attributes:
        query: (A, n, R, D).
        key, value: (A, n + 1, C, D or M): chunk start - 1 (zeros before the first) and the block's own.
        sink_key, sink_value: (A, n, s, D or M), the sinks of each chunk's document.
        mask: (1 or A, 1 or n, R, W), 0 or -inf, of the near keys; None without a window.
        fold: (1 or A, n, C) bool: which keys of chunk i - delay go into the far sums.
        keep: (1 or A, n) bool: whether chunk i continues the document of the chunk before it.
        decay: (A, n + 1, C), log g summed from each chunk's first slot; None without a gate.
        sink_logits: (A, 1, R) or None.
        log_gamma, alive: (A, 1, 1): log gamma, and whether gamma is positive.
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
    alive: torch.Tensor
    scaling: float
    delay: int

    @property
    def groups(self) -> int:
        """G, query heads of a key head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def far(self) -> slice:
        """The chunks of `key` that the block adds to the far sums."""
        return slice(1 - self.delay, 1 - self.delay + self.query.shape[1])


@dataclass(frozen=True)
class Features:
    """psi of a block's queries (A, n, R, F) and far keys (A, n, C, F), and their log-scales (A, n, R), (A, n, C)."""

    query: torch.Tensor
    query_scale: torch.Tensor
    key: torch.Tensor
    key_scale: torch.Tensor


@dataclass(frozen=True)
class Parts:
    """Near and far part of a block before they are combined, and what the backward pass needs of them.

    Attributes:
        near, near_log: (A, n, R, M), (A, n, R): softmax over the near keys, log of its normaliser; None if no window.
        far: (A, n, R, M + 1), the far numerator and denominator.
        far_log: (A, n, R), the logarithm of what `far` was divided by; -inf where there are no far keys.
        carry, carry_peak: S and m after the block.
        states: The S (A, F, M + 1) that each chunk reads; empty unless asked for.
        weights, shrink: (A, n, C) w of the far keys, (A, n) e.
        windows: The near keys and values, see `ops.near`.
        own: Without a window, what the own keys add; see `_own_part`.
    """

    near: torch.Tensor | None
    near_log: torch.Tensor | None
    far: torch.Tensor
    far_log: torch.Tensor
    carry: torch.Tensor
    carry_peak: torch.Tensor
    states: list[torch.Tensor]
    weights: torch.Tensor
    shrink: torch.Tensor
    windows: tuple[torch.Tensor, torch.Tensor] | None
    own: "OwnKeys | None"


@dataclass(frozen=True)
class OwnKeys:
    """No window: how a chunk's own keys count. exp(scale_j - base_r) and psi(q_r).psi(k_j), both (A, n, R, C), base
    (A, n, R), and exp(m - base) (A, n, R), with which the state is read."""

    weights: torch.Tensor
    scores: torch.Tensor
    base: torch.Tensor
    lifted: torch.Tensor


@dataclass(frozen=True)
class Combined:
    """Output (A, n, R, M), and of each query (A, n, R): L, the log of the whole denominator, b / Z, whether it has far
    keys, and whether the estimate of their sum is used."""

    output: torch.Tensor
    log_total: torch.Tensor
    far_weight: torch.Tensor
    exists: torch.Tensor
    used: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients with respect to the fields of `Block`, to psi and to the state before the block; that with respect to
    log gamma is the one of psi's query_scale, summed."""

    value: torch.Tensor
    near: "NearGradients | None"
    psi: Features
    decay: torch.Tensor | None
    sink_logits: torch.Tensor | None
    carry: torch.Tensor
    carry_peak: torch.Tensor | None


@dataclass(frozen=True)
class NearGradients:
    """What the exact part gives to the fields of `Block`, but for `value`."""

    query: torch.Tensor
    key: torch.Tensor
    sink_key: torch.Tensor
    sink_value: torch.Tensor


def finite(x: torch.Tensor) -> torch.Tensor:
    """-inf (nothing there) replaced by 0, so that differences stay defined."""
    return x.masked_fill(x == -torch.inf, 0.0)


def block_parts(
    block: Block, psi: Features, carry: torch.Tensor, carry_peak: torch.Tensor, keep_states: bool = False
) -> Parts:
    """Forward pass of a block: both parts of every query, and the state after it."""
    key_scale, query_scale = psi.key_scale, psi.query_scale
    if block.decay is not None:
        key_scale = key_scale - block.decay[:, block.far]
        if block.delay:  # as of the first slot of the chunk that adds it
            key_scale = key_scale + block.decay[:, :-1, -1:]
        query_scale = query_scale + block.decay[:, 1:].repeat(1, 1, block.groups)
    key_scale = key_scale.masked_fill(~block.fold, -torch.inf)
    read_peak, after, end_peak = _running_peak(block, key_scale.amax(-1), carry_peak)
    base = finite(after)
    shrink = (read_peak - base).exp()
    weights = (key_scale - base.unsqueeze(-1)).exp()
    extended = _extended(block.value[:, block.far], weights)
    far = carry.new_empty(*psi.query.shape[:3], carry.shape[-1])
    state, states = carry, []
    steps = zip(*(x.unbind(1) for x in (psi.query, psi.key.mT, extended, shrink[..., None, None], far)), strict=True)
    for query, key, new, factor, read in steps:
        torch.bmm(query, state, out=read)
        if keep_states:
            states.append(state)
        state = (factor * state).baddbmm_(key, new)
    rest = (state, end_peak, states, weights, shrink)
    if block.delay:
        assert block.mask is not None
        near_keys = (windows(block.key, block.sink_key), windows(block.value, block.sink_value))
        near, near_log = near_attention(block.query, *near_keys, block.mask, block.scaling)
        return Parts(near, near_log, far, query_scale + read_peak.unsqueeze(-1), *rest, near_keys, None)
    own = _own_part(block, psi, key_scale, read_peak)
    far.mul_(own.lifted.unsqueeze(-1))
    far += (own.weights * own.scores) @ _extended(block.value[:, 1:], None)
    return Parts(None, None, far, query_scale + own.base, *rest, None, own)


def _running_peak(
    block: Block, peaks: torch.Tensor, peak: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """m as each chunk reads it (A, n), m after each addition (A, n), and m after the block (A)."""
    read, after = [], []
    for i in range(peaks.shape[1]):
        read.append(peak.masked_fill(~block.keep[:, i], -torch.inf))
        after.append(torch.maximum(read[-1], peaks[:, i]))
        peak = after[-1] if block.decay is None else after[-1] + block.decay[:, i + 1, -1]
    return torch.stack(read, 1), torch.stack(after, 1), peak


def _extended(value: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """w [v, 1]: one product then gives numerators and denominators together."""
    whole = value.new_empty(*value.shape[:-1], value.shape[-1] + 1)
    if weights is None:
        whole[..., :-1], whole[..., -1] = value, 1.0
    else:
        torch.mul(value, weights.unsqueeze(-1), out=whole[..., :-1])
        whole[..., -1] = weights
    return whole


def _own_part(block: Block, psi: Features, key_scale: torch.Tensor, read_peak: torch.Tensor) -> OwnKeys:
    """The maximum runs over the keys up to each query (not over the whole chunk): a later key changes nothing."""
    chunk, groups = key_scale.shape[-1], block.groups
    base = torch.maximum(key_scale.cummax(-1).values, read_peak.unsqueeze(-1))
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=base.device).tril()
    exponent = (key_scale.unsqueeze(-2) - finite(base).unsqueeze(-1)).masked_fill(~causal, -torch.inf)
    lifted = (read_peak.unsqueeze(-1) - finite(base)).exp()
    weights = exponent.exp().repeat(1, 1, groups, 1)
    return OwnKeys(weights, psi.query @ psi.key.mT, base.repeat(1, 1, groups), lifted.repeat(1, 1, groups))


def combine_block(block: Block, parts: Parts) -> Combined:
    """Both parts under one normaliser; see `ops.combine` for what is dropped when."""
    far_log = parts.far_log + block.log_gamma
    denominator = parts.far[..., -1]
    exists = (far_log > -torch.inf) & block.alive
    used = exists & (denominator > smallest_denominator(denominator.dtype))
    far_log = far_log.masked_fill(~used, -torch.inf)
    total = far_log + denominator.masked_fill(~used, 1.0).log()
    if parts.near_log is not None:
        total = torch.maximum(total, parts.near_log)
    if block.sink_logits is not None:
        total = torch.maximum(total, block.sink_logits)
    total = finite(total)
    far_weight = (far_log - total).exp()
    mass = far_weight * denominator
    if parts.near_log is not None:
        near_weight = (parts.near_log - total).exp()
        mass = mass + near_weight
    if block.sink_logits is not None:
        mass = mass + (block.sink_logits - total).exp()
    # Zero where nothing answers: no window, and an estimate that is not positive.
    share = mass.reciprocal().masked_fill_(mass == 0, 0.0)
    far_weight *= share
    output = parts.far[..., :-1] * far_weight.unsqueeze(-1)
    if parts.near is not None:
        output.addcmul_(parts.near, (near_weight * share).unsqueeze(-1))
    return Combined(output, total + mass.log(), far_weight, exists, used)


def block_gradients(
    block: Block, psi: Features, parts: Parts, combined: Combined, gradient: torch.Tensor,
    carry_gradient: torch.Tensor, peak_gradient: torch.Tensor,
) -> Gradients:  # fmt: skip
    """Backward pass of a block, from the gradients of its output and of the state after it."""
    inner = (gradient * combined.output).sum(-1)
    far = gradient.new_empty(parts.far.shape)
    torch.mul(gradient, combined.far_weight.unsqueeze(-1), out=far[..., :-1])
    far[..., -1] = -inner * combined.far_weight
    query_scale = (far * parts.far).sum(-1)
    sink_logits = None
    if block.sink_logits is not None:
        sink_logits = -inner * (block.sink_logits - combined.log_total).exp()
    read = far if parts.own is None else far * parts.own.lifted.unsqueeze(-1)
    from_reads = psi.query.mT @ read
    # The state's gradient after each chunk, from the last one to the first.
    flow, after, forgotten = carry_gradient, [], [peak_gradient]
    for i in reversed(range(block.query.shape[1])):
        after.append(flow)
        flow = torch.addcmul(from_reads[:, i], flow, parts.shrink[:, i, None, None])
        if block.decay is not None:
            forgotten.append((flow * parts.states[i]).sum((-2, -1)))
    added = torch.stack(after[::-1], dim=1)
    extended = _extended(block.value[:, block.far], parts.weights)
    query_psi, key_psi = read @ torch.stack(parts.states, dim=1).mT, extended @ added.mT
    pushed = psi.key @ added
    key_scale = (pushed * extended).sum(-1)
    value = gradient.new_zeros(block.value.shape)
    torch.mul(pushed[..., :-1], parts.weights.unsqueeze(-1), out=value[:, block.far])
    near = None
    if parts.own is not None:
        own, values = parts.own, _extended(block.value[:, 1:], None)
        weights = (far @ values.mT) * own.weights
        query_psi += weights @ psi.key
        key_psi += weights.mT @ psi.query
        key_scale += (weights * own.scores).sum(-2)
        value[:, 1:] += ((own.weights * own.scores).mT @ far)[..., :-1]
    else:
        assert parts.windows is not None
        assert block.mask is not None
        query, key, near_value = near_gradients(
            gradient, block.query, *parts.windows, combined.output, combined.log_total, block.mask, block.scaling
        )
        sinks = block.sink_key.shape[2]
        (key, sink_key), (near_value, sink_value) = split_windows(key, sinks), split_windows(near_value, sinks)
        near = NearGradients(query, key, sink_key, sink_value)
        value += near_value
    psi_gradients = Features(query_psi, query_scale, key_psi, key_scale)
    decay = None if block.decay is None else _decay_gradient(block, psi_gradients, forgotten)
    peak = None if block.decay is None else forgotten[-1]
    return Gradients(value, near, psi_gradients, decay, sink_logits, flow, peak)


def _decay_gradient(block: Block, psi: Features, forgotten: list[torch.Tensor]) -> torch.Tensor:
    """Gradient of `decay`; `forgotten`: of the sum of log g over each chunk, from the last one to before the first."""
    assert block.decay is not None
    gradient = torch.zeros_like(block.decay)
    gradient[:, 1:] = psi.query_scale.unflatten(2, (block.groups, -1)).sum(2)
    gradient[:, block.far] -= psi.key_scale
    if block.delay:
        gradient[:, :-1, -1] += psi.key_scale.sum(-1)
    gradient[:, 1:, -1] += torch.stack(forgotten[-2::-1], dim=1)
    return gradient
