"""The causal operator as a differentiable function: its backward pass goes over the blocks again in reverse."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.causal.block import Features, block_sums, combine_block
from hf_rfa.ops.causal.gradients import Answered, Gradients, block_gradients
from hf_rfa.ops.causal.narrow_products import narrow_products
from hf_rfa.ops.causal.pass_inputs import PassInputs
from hf_rfa.ops.causal.passes import ChunkedPass, features_of
from hf_rfa.ops.causal.pool import PoolGradient
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import Plan
from hf_rfa.ops.recomputing import Flags, follows, recomputing

#: Tensors of a `FarKernel` that have gradients here; those of the gate enter as `decay`.
_OTHERS = ("feature_maps", "gate_weight", "gate_bias", "far_limit")
KERNEL = tuple(f.name for f in dataclasses.fields(FarKernel) if f.name not in _OTHERS)
#: The backward pass recomputes the exact part together with the far part, since they share a normaliser.
FORWARD_ONLY = tuple(i for i, f in enumerate(dataclasses.fields(PassInputs)) if f.name in ("near", "near_log"))


@dataclasses.dataclass(frozen=True)
class PassSettings:
    """The settings of a pass: all that is not a tensor with a gradient."""

    far: FarKernel
    plan: Plan
    window: int
    scaling: float
    statistics: FarStatistics | None
    narrow: bool = False  # whether products are bfloat16, see `narrow_products`


def causal_attention(inputs: PassInputs, settings: PassSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal RFA of aligned tokens: output (B, Hk, G, T, M), far sums and their log-scale after the last chunk.

    Without gradients the output has value's dtype; with gradients everything is in `PassInputs.wide`.
    """
    tensors = [getattr(inputs, f.name) for f in dataclasses.fields(inputs)]
    kernel = {name: getattr(settings.far, name) for name in KERNEL}
    narrow = narrow_products(inputs.query, inputs.key, inputs.value, settings.far, settings.window)
    settings = dataclasses.replace(settings, narrow=narrow)
    if any(follows([*tensors, *kernel.values()])):
        tensors = [t.to(inputs.wide) if t is not None and t.is_floating_point() else t for t in tensors]
    constant = (2,) if inputs.decay is None else ()
    output, kv_state, log_max = recomputing(_Recipe(settings, constant), *tensors, *kernel.values())
    return output, kv_state, log_max


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Kept for the backward pass: S and m at the start of each block (A, F, M + 1), (A); L and b / Z (A, n, R)."""

    kv_states: torch.Tensor
    log_maxima: torch.Tensor
    log_total: torch.Tensor
    far_weight: torch.Tensor


def _run(
    chunked: ChunkedPass, statistics: FarStatistics | None, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, _Kept | None]:
    """Output, S and m after the last chunk, and what the backward pass needs if `keep`."""
    inputs, plan = chunked.inputs, chunked.plan
    batch, heads, groups, length, _ = inputs.query.shape
    spans = chunked.spans()
    output = inputs.value.new_empty(batch, heads, groups, length, inputs.value.shape[-1])
    kv_state, log_max = inputs.kv_state.flatten(0, 1), inputs.log_max.flatten(0, 1)
    kept = None
    if keep:
        rows = (len(kv_state), plan.token_mask.shape[1], groups * chunked.chunk)
        kept = _Kept(
            kv_state.new_empty(len(spans), *kv_state.shape), log_max.new_empty(len(spans), *log_max.shape),
            kv_state.new_empty(rows), kv_state.new_empty(rows),
        )  # fmt: skip
    exact = chunked.exact_blocks()
    for span in spans[:exact]:
        answer, log_total = chunked.exact_answer(span)
        chunked.put(output, answer, span)
        if kept is not None:
            kept.log_total[:, span], kept.far_weight[:, span] = log_total, 0.0
    if kept is not None:
        kept.kv_states[: exact + 1], kept.log_maxima[: exact + 1] = kv_state, log_max
    if exact == len(spans):
        return output, inputs.kv_state.clone(), inputs.log_max.clone(), kept
    for number, (span, block, parts, state, end_log_max) in enumerate(chunked.forward(exact), exact):
        rows_of_block = chunked.target(output, span)
        combined = combine_block(block, parts, rows_of_block)
        chunked.put(output, rows_of_block, span)
        if kept is not None:
            kept.log_total[:, span], kept.far_weight[:, span] = combined.log_total, combined.far_weight
            if number + 1 < len(spans):
                kept.kv_states[number + 1], kept.log_maxima[number + 1] = state.mT, end_log_max
        if statistics is not None:
            chunked.count(combined, span, statistics)
    final = state.mT.contiguous().view_as(inputs.kv_state)
    return output, final, end_log_max.contiguous().view_as(inputs.log_max), kept


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """Output, S and m after the last chunk, from the tensors of `PassInputs` and `KERNEL`; see `ops.recomputing`."""

    settings: PassSettings
    constant: tuple[int, ...]
    outputs: int = 3
    forward_only: tuple[int, ...] = FORWARD_ONLY

    def forward(self, tensors: Sequence[torch.Tensor | None], followed: Flags) -> tuple[torch.Tensor, ...]:
        output, kv_state, log_max, kept = _run(self._pass(tensors, followed), self.settings.statistics, any(followed))
        return output, kv_state, log_max, *(() if kept is None else vars(kept).values())

    def backward(
        self, tensors: Sequence[Any], outputs: Sequence[Any], kept: Sequence[Any], above: Sequence[Any],
        followed: Flags,
    ) -> list[torch.Tensor | None]:  # fmt: skip
        chunked, answer, (kv_states, log_maxima, log_total, far_weight) = (
            self._pass(tensors, followed),
            outputs[0],
            kept,
        )
        output, kv_state, log_max = above
        kv_state = torch.zeros_like(kv_states[0]) if kv_state is None else kv_state.flatten(0, 1)
        log_max = torch.zeros_like(log_maxima[0]) if log_max is None else log_max.flatten(0, 1)
        with torch.autocast(kv_states.device.type, enabled=False):
            back = _Backward(chunked, followed[-len(KERNEL) :], kv_state, log_max)
            for number, span in reversed(list(enumerate(chunked.spans()))):
                answered = Answered(chunked.queries(answer, span), log_total[:, span], far_weight[:, span])
                back.step(span, kv_states[number], log_maxima[number], answered, output)
        return back.gradients()

    def _pass(self, tensors: Sequence[Any], followed: Flags) -> ChunkedPass:
        count, settings = len(dataclasses.fields(PassInputs)), self.settings
        far = dataclasses.replace(settings.far, **dict(zip(KERNEL, tensors[count:], strict=True)))
        inputs = PassInputs(*tensors[:count])
        learned = any(follow for name, follow in zip(KERNEL, followed[count:], strict=True) if name != "gamma")
        # Signed sums amplify rounding: what is computed without gradients must be what a learned omega gives.
        bound = not learned and (any(followed) or "trigonometric" not in far.feature_maps)
        return ChunkedPass(
            inputs, far, settings.plan, settings.window, settings.scaling, may_bound=bound,
            narrow=settings.narrow and not learned,
        )  # fmt: skip


class _Backward:
    """Gradients of a pass's tensors, accumulated from the last block to the first."""

    def __init__(
        self, chunked: ChunkedPass, wanted: Sequence[bool], kv_state: torch.Tensor, log_max: torch.Tensor
    ) -> None:
        inputs = chunked.inputs
        self.chunked, self.kv_state, self.log_max = chunked, kv_state, log_max
        self.query, key, value, sink_key, sink_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format)
            for x in (inputs.query, inputs.key, inputs.value, inputs.sink_key, inputs.sink_value)
        )
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)
        self.sink_key, self.sink_value = sink_key.zero_().flatten(0, 1), sink_value.zero_().flatten(0, 1)
        self.sink_rows = [torch.zeros_like(rows) for rows in chunked.sink_rows]
        self.pools: list[PoolGradient] | None = None
        if chunked.pools is not None:
            pairs = zip(chunked.pools, (self.key, self.value), strict=True)
            self.pools = [PoolGradient(pool, inputs.wide, tokens) for pool, tokens in pairs]
        self.far_decay = None if inputs.far_decay is None else torch.zeros_like(inputs.far_decay)
        self.decay = None if inputs.decay is None else torch.zeros_like(inputs.decay).flatten(0, 1)
        self.logits = None if inputs.sink_logits is None else torch.zeros_like(inputs.sink_logits)
        self.log_gamma = torch.zeros_like(chunked.far.gamma)
        # The features do not depend on gamma.
        names = [name for name, need in zip(KERNEL, wanted, strict=True) if need and name != "gamma"]
        self.leaves = {name: getattr(chunked.far, name) for name in names}
        self.kernel = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}

    def step(
        self,
        span: slice,
        kv_state: torch.Tensor,
        log_max: torch.Tensor,
        answered: Answered,
        output: torch.Tensor | None,
    ) -> None:
        """Go back over one block that began with the state (kv_state, log_max)."""
        chunked, block = self.chunked, self.chunked.block(span)
        made = chunked.bounded_psi(block)  # as in the forward pass, whose L and b / Z belong to these features
        if made is not None:
            psi = features_of(made)
        else:
            # Not `torch.autograd`, which is switched off inside an operation of a graph (`ops.compiled`).
            tensors = (block.query, block.far_key, *self.leaves.values())
            recorded, pull_back = torch.func.vjp(self._psi, *tensors)[:2]
            psi = Features(*recorded)
        sums = block_sums(block, psi, log_max, chunked.scratch)
        above = torch.zeros_like(answered.output) if output is None else chunked.queries(output, span)
        gradients = block_gradients(
            block, psi, sums, answered, kv_state, above, self.kv_state, self.log_max, chunked.scratch
        )
        self.kv_state = gradients.kv_state
        self.log_gamma += gradients.psi.query_scale.sum((1, 2)).view(-1, len(self.log_gamma)).sum(0)
        if made is not None:
            query, key = chunked.bounded_gradients(made, gradients.psi)
        else:
            query, key, *kernel = pull_back(_tensors(gradients.psi))
            for name, gradient in zip(self.leaves, kernel, strict=True):
                self.kernel[name] += gradient
        if gradients.near is not None:
            near = gradients.near
            rows = chunked.target(self.query, span)
            query = torch.add(query, near.query, out=rows)
            if gradients.kept is None:
                near.key[:, block.far] += key
            else:
                self._step_kept(span, gradients, key)
            key = near.key
            self.sink_rows[0][:, span], self.sink_rows[1][:, span] = near.sink_key, near.sink_value
        else:
            key = F.pad(key, (0, 0, 0, 0, 1, 0))  # for the chunk before the block's own
        chunked.put(self.query, query, span)
        begun = [False] * 2 if self.pools is None else [pool.shared for pool in self.pools]
        chunked.put_keys(self.key, key, span, begun[0])
        chunked.put_keys(self.value, gradients.value, span, begun[1])
        if self.decay is not None and gradients.decay is not None and gradients.log_max is not None:
            first = max(span.start - 1, 0)
            self.decay[:, first : span.stop] += gradients.decay[:, first - span.stop :]
            self.log_max = gradients.log_max
        if self.logits is not None and gradients.sink_logits is not None:
            rows = gradients.sink_logits.sum(1).view(-1, *self.logits.shape, chunked.chunk)
            self.logits += rows.sum((0, 3))

    def _step_kept(self, span: slice, gradients: Gradients, far_key: torch.Tensor) -> None:
        """Add a block's gradients to the keys that it keeps and to those that it evicts."""
        inputs, kept = self.chunked.inputs, gradients.kept
        assert self.pools is not None
        assert kept is not None
        assert inputs.kept is not None
        assert inputs.evicted is not None
        pairs = ((kept.key, far_key), (kept.value, kept.far_value))
        for pool, (of_kept, of_far) in zip(self.pools, pairs, strict=True):
            pool.add(inputs.kept[:, span], of_kept)
            pool.add(inputs.evicted[:, span], of_far)
        if self.far_decay is not None:
            self.far_decay[:, span] = gradients.psi.key_scale

    def _psi(self, query: torch.Tensor, key: torch.Tensor, *kernel: torch.Tensor) -> list[torch.Tensor]:
        changed: dict[str, Any] = dict(zip(self.leaves, kernel, strict=True))
        far = dataclasses.replace(self.chunked.far, **changed)
        return _tensors(self.chunked.psi(query, key, far))

    def gradients(self) -> list[torch.Tensor | None]:
        """All gradients, in the order of `PassInputs`, then of `KERNEL`."""
        inputs, alive = self.chunked.inputs, self.chunked.far.alive()
        self.chunked.add_sinks(self.key, self.sink_key, self.sink_rows[0])
        self.chunked.add_sinks(self.value, self.sink_value, self.sink_rows[1])
        of_kept: list[torch.Tensor | None] = [None, None]
        if self.pools is not None and inputs.kept_key is not None:
            for i, (pool, of_tokens) in enumerate(zip(self.pools, (self.key, self.value), strict=True)):
                of_kept[i] = pool.finish(of_tokens, inputs.kept_key.shape[2])
        self.kernel["gamma"] = torch.where(alive, self.log_gamma / self.chunked.far.gamma, 0.0)
        flat = (self.key, self.value, self.sink_key, self.sink_value)
        whole = (inputs.key, inputs.value, inputs.sink_key, inputs.sink_value)
        decay = log_max = None
        if self.decay is not None and inputs.decay is not None:
            decay, log_max = self.decay.view_as(inputs.decay), self.log_max.view_as(inputs.log_max)
        exact = (x.view_as(y) for x, y in zip(flat, whole, strict=True))
        return [
            self.query, *exact, decay, self.logits, self.kv_state.view_as(inputs.kv_state), log_max, *of_kept, None,
            None, None, None, self.far_decay, None, None, *(self.kernel.get(name) for name in KERNEL),
        ]  # fmt: skip


def _tensors(psi: Features) -> list[torch.Tensor]:
    return [psi.query, psi.query_scale, psi.key, psi.key_scale]
