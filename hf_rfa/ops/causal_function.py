"""The causal operator as a differentiable function: its backward pass walks the blocks again, from the last one on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hf_rfa.feature_maps import FarKernel
from hf_rfa.ops.causal_block import Features, block_gradients, block_parts, combine_block
from hf_rfa.ops.causal_walk import Walk, WalkInputs
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import Plan

#: Tensors of a `FarKernel` that its features depend on; the gate's come in as `decay`.
KERNEL = tuple(
    f.name for f in dataclasses.fields(FarKernel) if f.name not in ("feature_maps", "gate_weight", "gate_bias")
)


@dataclasses.dataclass(frozen=True)
class WalkSettings:
    """What a walk depends on besides tensors with gradients."""

    far: FarKernel
    plan: Plan
    window: int
    scaling: float
    statistics: FarStatistics | None


def causal_attention(inputs: WalkInputs, settings: WalkSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal RFA of aligned tokens: output (B, Hk, G, T, M), far sums and their log-scale after the last chunk."""
    tensors = [getattr(inputs, f.name) for f in dataclasses.fields(inputs)]
    tensors += [getattr(settings.far, name) for name in KERNEL]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _CausalAttention.apply(settings, *tensors)
    walk = Walk(inputs, settings.far, settings.plan, settings.window, settings.scaling)
    with torch.no_grad():
        output, _, _, carry, peak = _run(walk, settings.statistics, keep=False)
    return output, carry, peak


def _run(walk: Walk, statistics: FarStatistics | None, keep: bool) -> tuple[Any, ...]:
    """Output, log of the denominators, the states at the start of each block (the last two if wanted), last state."""
    inputs = walk.inputs
    batch, heads, groups, length, _ = inputs.query.shape
    spans = walk.spans()
    output = inputs.query.new_empty(batch, heads, groups, length, inputs.value.shape[-1])
    carry, peak = inputs.carry.flatten(0, 1), inputs.carry_peak.flatten(0, 1)
    count = len(spans) if keep else 0
    carries, peaks = carry.new_empty(count, *carry.shape), peak.new_empty(count, *peak.shape)
    for number, (span, block, parts) in enumerate(walk.forward()):
        if keep and number + 1 < len(spans):
            carries[number + 1], peaks[number + 1] = parts.carry, parts.carry_peak
        combined = combine_block(block, parts)
        if statistics is not None:
            walk.count(combined, span, statistics)
        walk.put(output, combined.output, span)
    if keep:
        carries[0], peaks[0] = carry, peak
    return output, carries, peaks, parts.carry.view_as(inputs.carry), parts.carry_peak.view_as(inputs.carry_peak)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: WalkSettings, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.settings = settings
        walk = _walk(settings, tensors)
        output, carries, peaks, carry, peak = _run(walk, settings.statistics, keep=True)
        ctx.save_for_backward(*tensors, carries, peaks)
        ctx.set_materialize_grads(False)
        if walk.inputs.decay is None:
            ctx.mark_non_differentiable(peak)
        return output, carry, peak

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output: torch.Tensor | None, carry: torch.Tensor | None, peak: torch.Tensor | None) -> Any:
        *tensors, carries, peaks = ctx.saved_tensors
        walk = _walk(ctx.settings, tensors)
        carry = torch.zeros_like(carries[0]) if carry is None else carry.flatten(0, 1)
        peak = torch.zeros_like(peaks[0]) if peak is None else peak.flatten(0, 1)
        with torch.autocast(carries.device.type, enabled=False):
            back = _Backward(walk, ctx.needs_input_grad[-len(KERNEL) :], carry, peak)
            for number, span in reversed(list(enumerate(walk.spans()))):
                back.step(span, carries[number], peaks[number], output)
        return None, *back.gradients()


def _walk(settings: WalkSettings, tensors: Any) -> Walk:
    count = len(dataclasses.fields(WalkInputs))
    inputs = WalkInputs(*tensors[:count])
    far = dataclasses.replace(settings.far, **dict(zip(KERNEL, tensors[count:], strict=True)))
    return Walk(inputs, far, settings.plan, settings.window, settings.scaling)


class _Backward:
    """The gradients of a walk's tensors, gathered from its last block to the first."""

    def __init__(self, walk: Walk, wanted: Sequence[bool], carry: torch.Tensor, peak: torch.Tensor) -> None:
        inputs = walk.inputs
        self.walk, self.carry, self.peak = walk, carry, peak
        self.query = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
        self.key, self.value, self.sink_key, self.sink_value = (
            torch.zeros(x.shape, dtype=x.dtype, device=x.device).flatten(0, 1)
            for x in (inputs.key, inputs.value, inputs.sink_key, inputs.sink_value)
        )
        self.decay = None if inputs.decay is None else torch.zeros_like(inputs.decay).flatten(0, 1)
        self.logits = None if inputs.sink_logits is None else torch.zeros_like(inputs.sink_logits)
        self.log_gamma = torch.zeros_like(walk.far.gamma)
        # gamma has no part in the features.
        names = [name for name, need in zip(KERNEL, wanted, strict=True) if need and name != "gamma"]
        self.leaves = {name: getattr(walk.far, name).detach().requires_grad_() for name in names}
        self.far = dataclasses.replace(walk.far, **self.leaves)
        self.kernel = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}

    def step(self, span: slice, carry: torch.Tensor, peak: torch.Tensor, output: torch.Tensor | None) -> None:
        """Go back over one block, which began with the state (carry, peak)."""
        walk, block = self.walk, self.walk.block(span)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (block.query, block.key)]
            recorded = walk.psi(dataclasses.replace(block, query=leaves[0], key=leaves[1]), self.far)
        psi = Features(*(x.detach() for x in _tensors(recorded)))
        parts = block_parts(block, psi, carry, peak, keep_states=True)
        combined = combine_block(block, parts)
        above = torch.zeros_like(combined.output) if output is None else walk.queries(output, span)
        gradients = block_gradients(block, psi, parts, combined, above, self.carry, self.peak)
        self.carry = gradients.carry
        query, key, *kernel = torch.autograd.grad(
            _tensors(recorded), [*leaves, *self.leaves.values()], _tensors(gradients.psi), allow_unused=True
        )
        for name, gradient in zip(self.leaves, kernel, strict=True):
            if gradient is not None:
                self.kernel[name] += gradient
        if gradients.near is not None:
            near = gradients.near
            query, key = query + near.query, key + near.key
            walk.add_sinks(self.key, self.sink_key, near.sink_key, span)
            walk.add_sinks(self.value, self.sink_value, near.sink_value, span)
        walk.put(self.query, query, span)
        walk.add(self.key, key, span)
        walk.add(self.value, gradients.value, span)
        self.log_gamma += gradients.psi.query_scale.sum((1, 2)).view(-1, len(self.log_gamma)).sum(0)
        if self.decay is not None and gradients.decay is not None and gradients.carry_peak is not None:
            first = max(span.start - 1, 0)
            self.decay[:, first : span.stop] += gradients.decay[:, first - span.stop :]
            self.peak = gradients.carry_peak
        if self.logits is not None and gradients.sink_logits is not None:
            rows = gradients.sink_logits.sum(1).view(-1, *self.logits.shape, walk.chunk)
            self.logits += rows.sum((0, 3))

    def gradients(self) -> list[torch.Tensor | None]:
        """In the order of `WalkInputs`, then of `KERNEL`."""
        inputs, alive = self.walk.inputs, self.walk.far.alive()
        self.kernel["gamma"] = torch.where(alive, self.log_gamma / self.walk.far.gamma, 0.0)
        flat = (self.key, self.value, self.sink_key, self.sink_value)
        whole = (inputs.key, inputs.value, inputs.sink_key, inputs.sink_value)
        decay = peak = None
        if self.decay is not None and inputs.decay is not None:
            decay, peak = self.decay.view_as(inputs.decay), self.peak.view_as(inputs.carry_peak)
        return [
            self.query, *(x.view_as(y) for x, y in zip(flat, whole, strict=True)), decay, self.logits,
            self.carry.view_as(inputs.carry), peak, *(self.kernel.get(name) for name in KERNEL),
        ]  # fmt: skip


def _tensors(psi: Features) -> list[torch.Tensor]:
    return [psi.query, psi.query_scale, psi.key, psi.key_scale]
