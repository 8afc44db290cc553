"""The backward pass of one block of the causal operator; `causal.block` has the forward pass.

With dN = do / Z and dZ = -do.o / Z, the far part's gradient is that of linear attention with [do, -do.o] b / Z. The
forward pass leaves o, L and b / Z per query; features and sums are recomputed.
"""

from dataclasses import dataclass

import torch

from hf_rfa.ops.causal import narrow_products
from hf_rfa.ops.causal.block import Block, Features, Sums, exact_rows, extend, intra_chunk, narrow_scratch
from hf_rfa.ops.causal.narrow_products import narrowed, product, read_states
from hf_rfa.ops.causal.near import near_gradients, split_windows
from hf_rfa.ops.causal.scratch import Scratch


@dataclass(frozen=True)
class Answered:
    """Results of the forward pass for a block's queries: output (A, n, R, M), L and b / Z (A, n, R)."""

    output: torch.Tensor
    log_total: torch.Tensor
    far_weight: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    """Gradients of the fields of `Block`, of psi and of the state before the block. That of log gamma is the sum of
    that of psi's query_scale."""

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
    """Gradients of the fields of `KeptRows`, except `far_key`, whose gradient comes through psi."""

    key: torch.Tensor
    value: torch.Tensor
    far_value: torch.Tensor


@dataclass(frozen=True)
class NearGradients:
    """The exact part's gradients of the fields of `Block`, except `value`."""

    query: torch.Tensor
    key: torch.Tensor
    sink_key: torch.Tensor
    sink_value: torch.Tensor


def block_gradients(
    block: Block, psi: Features, sums: Sums, answered: Answered, kv_state: torch.Tensor, gradient: torch.Tensor,
    kv_state_gradient: torch.Tensor, log_max_gradient: torch.Tensor, scratch: Scratch,
) -> Gradients:  # fmt: skip
    """Backward pass of a block that began with the sums `kv_state`, given the gradients of its output and of the state
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
    # All sums are transposed, (M + 1, F), like the features that `BoundedMap` computes.
    from_reads = scratch("from reads", kv_state, *psi.query.shape[:2], kv_state.shape[2], kv_state.shape[1])
    narrow, multiply = block.narrow, product if block.narrow else _product
    query_features, key_features, reads, extended = (
        narrowed(x) if narrow else x for x in (psi.query, psi.key, read, sums.extended)
    )
    multiply(reads.mT, query_features, from_reads)
    if narrow:
        state = kv_state.mT.clone(memory_format=torch.contiguous_format)
        buffer = narrow_scratch(scratch, "states", psi.query, state)
        states = read_states(key_features, sums.extended, sums.shrink, state, buffer)
    else:
        states = _states(psi, sums, kv_state, scratch)
    # The state's gradient after each chunk, from the last one to the first.
    flow, forgotten = kv_state_gradient.mT, [log_max_gradient]
    added = narrow_scratch(scratch, "added", psi.query, flow) if narrow else scratch("added", flow, *from_reads.shape)
    for i in reversed(range(block.query.shape[1])):
        added[:, i] = flow
        flow = torch.addcmul(from_reads[:, i], flow if narrow else added[:, i], sums.shrink[:, i, None, None])
        if block.decay is not None:
            forgotten.append((flow * states.view_as(from_reads)[:, i]).sum((-2, -1)))
    added = added.flatten(0, 1) if narrow else added
    query_psi = multiply(states.mT, reads.mT, scratch("query psi", kv_state, *psi.query.mT.shape)).mT
    key_psi = multiply(added.mT, extended.mT, scratch("key psi", kv_state, *psi.key.mT.shape)).mT
    pushed = multiply(key_features, added.mT, scratch("pushed", kv_state, *sums.extended.shape))
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
        query, key, near_value = (narrow_products.near_gradients if narrow else near_gradients)(
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
    # Numerator and denominator are linear in psi(q), so the gradient of q's log-scale is this sum.
    shares = scratch("shares", kv_state, *psi.query.mT.shape)
    query_scale = torch.mul(query_psi.mT, psi.query.mT, out=shares).sum(-2)
    psi_gradients = Features(query_psi, query_scale, key_psi, key_scale)
    decay = None if block.decay is None else _decay_gradient(block, psi_gradients, forgotten)
    log_max = None if block.decay is None else forgotten[-1]
    return Gradients(value, near, psi_gradients, decay, sink_logits, flow.mT, log_max, kept)


def _states(psi: Features, sums: Sums, kv_state: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """S^T (A, n, M + 1, F) as each chunk reads it."""
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
            state.mul_(factor).baddbmm_(new, key)  # contiguous: into a slice it would run one product per row
    return states


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """left @ right, both (A, n, ...), into `out`, whose first two dimensions are contiguous."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _decay_gradient(block: Block, psi: Features, forgotten: list[torch.Tensor]) -> torch.Tensor:
    """Gradient of `decay`; `forgotten` holds those of each chunk's sum of log g, from the last to before the first."""
    assert block.decay is not None
    gradient = torch.zeros_like(block.decay)
    gradient[:, 1:] = psi.query_scale.unflatten(2, (block.groups, -1)).sum(2)
    if block.kept is None:
        gradient[:, block.far] -= psi.key_scale
        if block.delay:
            gradient[:, :-1, -1] += psi.key_scale.sum(-1)
    gradient[:, 1:, -1] += torch.stack(forgotten[-2::-1], dim=1)
    return gradient
