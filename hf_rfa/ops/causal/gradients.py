"""The backward pass of one block of the causal operator, see `causal_block`.

With dN = do / Z and dZ = -do.o / Z, the far part's gradient is that of linear attention with [do, -do.o] b / Z. The
forward pass leaves o, L and b / Z of each query; features and sums are made again.
"""

from dataclasses import dataclass

import torch

from hf_rfa.ops.causal.block import Block, Features, Sums, exact_rows, extend, intra_chunk
from hf_rfa.ops.causal.near import near_gradients, split_windows
from hf_rfa.ops.causal.scratch import Scratch


@dataclass(frozen=True)
class Answered:
    """What the forward pass answered to the queries of a block: output (A, n, R, M), and, (A, n, R), L and b / Z."""

    output: torch.Tensor
    log_total: torch.Tensor
    far_weight: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients with respect to the fields of `Block`, to psi and to the state before the block; that with respect to
    log gamma is the one of psi's query_scale, summed."""

    value: torch.Tensor
    near: "NearGradients | None"
    psi: Features
    decay: torch.Tensor | None
    sink_logits: torch.Tensor | None
    kv_state: torch.Tensor
    log_max: torch.Tensor | None
    kept: "KeptGradients | None" = None


@dataclass(frozen=True)
class KeptGradients:
    """Those of `KeptRows`, but for `far_key`, which psi has."""

    key: torch.Tensor
    value: torch.Tensor
    far_value: torch.Tensor


@dataclass(frozen=True)
class NearGradients:
    """What the exact part gives to the fields of `Block`, but for `value`."""

    query: torch.Tensor
    key: torch.Tensor
    sink_key: torch.Tensor
    sink_value: torch.Tensor


def block_gradients(
    block: Block, psi: Features, sums: Sums, answered: Answered, kv_state: torch.Tensor, gradient: torch.Tensor,
    kv_state_gradient: torch.Tensor, log_max_gradient: torch.Tensor, scratch: Scratch,
) -> Gradients:  # fmt: skip
    """Backward pass of a block that began with the sums `kv_state`, from the gradients of its output and of the state
    after it."""
    inner = (gradient * answered.output).sum(-1)
    far = scratch("far", gradient, *gradient.shape[:-1], gradient.shape[-1] + 1)
    torch.mul(gradient, answered.far_weight.unsqueeze(-1), out=far[..., :-1])
    torch.mul(inner, answered.far_weight, out=far[..., -1]).neg_()
    sink_logits = None
    if block.sink_logits is not None:
        sink_logits = -inner * (block.sink_logits - answered.log_total).exp()
    own = None if block.delay else intra_chunk(block, psi, sums)
    read = far if own is None else far * own.lifted.unsqueeze(-1)
    # Everything about sums is transposed, (M + 1, F), as the features are where `BoundedMap` makes them.
    from_reads = scratch("from reads", kv_state, *psi.query.shape[:2], kv_state.shape[2], kv_state.shape[1])
    _product(read.mT, psi.query, from_reads)
    states = _states(psi, sums, kv_state, scratch)
    # The state's gradient after each chunk, from the last one to the first.
    flow, forgotten = kv_state_gradient.mT, [log_max_gradient]
    added = scratch("added", kv_state, *from_reads.shape)
    for i in reversed(range(block.query.shape[1])):
        added[:, i] = flow
        flow = torch.addcmul(from_reads[:, i], added[:, i], sums.shrink[:, i, None, None])
        if block.decay is not None:
            forgotten.append((flow * states[:, i]).sum((-2, -1)))
    query_psi = _product(states.mT, read.mT, scratch("query psi", kv_state, *psi.query.mT.shape)).mT
    key_psi = _product(added.mT, sums.extended.mT, scratch("key psi", kv_state, *psi.key.mT.shape)).mT
    pushed = _product(psi.key, added.mT, scratch("pushed", kv_state, *sums.extended.shape))
    key_scale = (pushed * sums.extended).sum(-1)
    near = None
    if own is not None:
        values = extend(block.value[:, 1:], None, scratch)
        weights = (far @ values.mT).mul_(own.weights)
        query_psi += weights @ psi.key
        key_psi += weights.mT @ psi.query
        key_scale += (weights * own.scores).sum(-2)
        value = torch.zeros_like(block.value)
        value[:, 1:] = ((own.weights * own.scores).mT @ far)[..., :-1]
    else:
        assert block.mask is not None
        keys, values = exact_rows(block, scratch)
        query, key, near_value = near_gradients(
            gradient, block.query, keys, values, answered.output, answered.log_total, block.mask, block.scaling
        )
        sinks, count = block.sink_key.shape[2], 0 if block.kept is None else block.kept.index.shape[2]
        kept_key, key = key.split([count, key.shape[2] - count], dim=2)
        kept_value, near_value = near_value.split([count, near_value.shape[2] - count], dim=2)
        key, sink_key = split_windows(key, sinks, scratch, "keys")
        value, sink_value = split_windows(near_value, sinks, scratch, "values")
        near = NearGradients(query, key, sink_key, sink_value)
    kept = None
    if block.kept is None:
        value[:, block.far].addcmul_(pushed[..., :-1], sums.weights.unsqueeze(-1))
    else:
        kept = KeptGradients(kept_key, kept_value, pushed[..., :-1] * sums.weights.unsqueeze(-1))
    # num and den are linear in psi(q), so that q's factor sees the same sum.
    shares = scratch("shares", kv_state, *psi.query.mT.shape)
    query_scale = torch.mul(query_psi.mT, psi.query.mT, out=shares).sum(-2)
    psi_gradients = Features(query_psi, query_scale, key_psi, key_scale)
    decay = None if block.decay is None else _decay_gradient(block, psi_gradients, forgotten)
    log_max = None if block.decay is None else forgotten[-1]
    return Gradients(value, near, psi_gradients, decay, sink_logits, flow.mT, log_max, kept)


def _states(psi: Features, sums: Sums, kv_state: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The S^T (A, n, M + 1, F) that each chunk reads."""
    states = scratch("states", kv_state, *psi.query.shape[:2], kv_state.shape[2], kv_state.shape[1])
    state = kv_state.mT.clone(memory_format=torch.contiguous_format)
    steps = zip(
        states.unbind(1),
        sums.shrink[..., None, None].unbind(1),
        sums.extended.mT.unbind(1),
        psi.key.unbind(1),
        strict=True,
    )
    for number, (read, factor, new, key) in enumerate(steps):
        read.copy_(state)
        if number + 1 < states.shape[1]:
            state.mul_(factor).baddbmm_(new, key)  # in one piece: into a slice it would be a product a row
    return states


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """left @ right, of (A, n, ..), into `out`, whose first two dimensions are contiguous."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _decay_gradient(block: Block, psi: Features, forgotten: list[torch.Tensor]) -> torch.Tensor:
    """Gradient of `decay`; `forgotten`: of the sum of log g over each chunk, from the last one to before the first."""
    assert block.decay is not None
    gradient = torch.zeros_like(block.decay)
    gradient[:, 1:] = psi.query_scale.unflatten(2, (block.groups, -1)).sum(2)
    if block.kept is None:
        gradient[:, block.far] -= psi.key_scale
        if block.delay:
            gradient[:, :-1, -1] += psi.key_scale.sum(-1)
    gradient[:, 1:, -1] += torch.stack(forgotten[-2::-1], dim=1)
    return gradient
