"""The near part of a call, once, and its far part for any number of far kernels: what `calibrate` tries kernels on.

Rows and key heads share one dimension A = B * Hk; a call has n chunks with R queries each, for each of the G query
heads of a key head. Only some queries of each chunk are computed, the same places in every chunk: the far sums are
those at chunk boundaries, whoever reads them.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.bidirectional import BidirectionalPass
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.block import Block, exact_rows
from hf_rfa.ops.causal.chunked import align
from hf_rfa.ops.causal.near import near_attention
from hf_rfa.ops.causal.pass_inputs import PassInputs
from hf_rfa.ops.causal.passes import ChunkedPass
from hf_rfa.ops.chunks import queries_to_chunks, take
from hf_rfa.ops.layout import Plan
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import RFAAdapter

#: A block's chunks; its far numerators and denominators (A, n, G * R, M + 1); the log of what these were divided by
#: (A, n, G * R), -inf where nothing is far.
FarBlock = tuple[slice, torch.Tensor, torch.Tensor]


def linear_settings(adapter: RFAAdapter, settings: AttentionSettings) -> AttentionSettings:
    """How a layer attends with every key head linear, made of the settings of its exact call."""
    config = adapter.config
    return settings.replace(
        window=config.window, sink_tokens=config.sink_tokens, kept_keys=adapter.kept_keys, softmax_heads=(),
        sliding_window=None,
    )  # fmt: skip


class CallParts:
    """The parts of one call, whose heads keep the same number of keys; in float32, without gradients.

    Attributes:
        near, near_log: (A, n, G * R, M), (A, n, G * R): softmax over the exact keys, and its log-normaliser; None
            without a window.
        asked: (1 or A, n, R) bool: whether a query is that of a token.
    """

    near: torch.Tensor | None = None
    near_log: torch.Tensor | None = None
    asked: torch.Tensor

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """What is given for each query, (B, Hk, G, N, D), as (A, n, G * R, D)."""
        raise NotImplementedError

    def far(self, kernel: FarKernel) -> Iterator[FarBlock]:
        """The far part with a far kernel, without its gamma, block by block; the next block overwrites it."""
        raise NotImplementedError


def parts_of(call: OperatorCall, every: int) -> CallParts:
    """The parts of a call for every `every`-th query of a chunk; for all if it is not causal or has no window."""
    return CausalParts(call, every if call.window else 1) if call.causal else BidirectionalParts(call)


class CausalParts(CallParts):
    """Those of a causal call."""

    def __init__(self, call: OperatorCall, every: int) -> None:
        aligned = align(call)
        self._plan, inputs = aligned.plan, aligned.inputs
        self._pass = _SampledPass(inputs, call.far, self._plan, call.window, call.scaling, every=every)
        if call.window:
            self.near, self.near_log = self._near(inputs)
            inputs = dataclasses.replace(inputs, near=self.near, near_log=self.near_log)
            self._pass = _SampledPass(inputs, call.far, self._plan, call.window, call.scaling, every=every)
        self.asked = _of_heads(self._plan.asked[..., _places(every)], inputs.key.shape[1])

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        if not self._plan.identity:
            x = take(x.flatten(1, 2), self._plan.source).unflatten(1, x.shape[1:3])
        return self._pass.queries(x, slice(0, self._plan.token_mask.shape[1]))

    def far(self, kernel: FarKernel) -> Iterator[FarBlock]:
        for span, _, parts, _, _ in dataclasses.replace(self._pass, far=kernel).forward():
            yield span, parts.far, parts.far_log

    def _near(self, inputs: PassInputs) -> tuple[torch.Tensor, torch.Tensor]:
        if inputs.near is not None and inputs.near_log is not None:  # with kept keys it comes with their choice
            return self._pass.sampled(inputs.near), self._pass.sampled(inputs.near_log.unsqueeze(-1)).squeeze(-1)
        found = []
        for span in self._pass.spans():
            block = self._pass.block(span)
            assert block.mask is not None
            keys, values = exact_rows(block, self._pass.scratch)
            found.append(near_attention(block.query, keys, values, block.mask, block.scaling))
        near, near_log = (torch.cat(x, dim=1) for x in zip(*found, strict=True))
        return near, near_log


@dataclass
class _SampledPass(ChunkedPass):
    """A pass that computes some queries of each chunk; its blocks, which no kernel changes, are kept."""

    every: int = 1
    blocks: dict[int, Block] = field(default_factory=dict)

    def sampled(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows (..., G * C, D) those that are computed."""
        if self.every == 1:
            return rows
        return rows.unflatten(-2, (-1, self.chunk))[..., _places(self.every), :].flatten(-3, -2)

    def queries(self, query: torch.Tensor, span: slice) -> torch.Tensor:
        return self.sampled(super().queries(query, span))

    def block(self, span: slice) -> Block:
        if span.start not in self.blocks:
            self.blocks[span.start] = super().block(span)
        return self.blocks[span.start]

    def _mask(self, span: slice) -> torch.Tensor | None:
        mask = super()._mask(span)
        return None if mask is None else self.sampled(mask)


class BidirectionalParts(CallParts):
    """Those of a call that sees both sides."""

    def __init__(self, call: OperatorCall) -> None:
        self._call, self._first = call, BidirectionalPass(call)
        plan: Plan = self._first.plan
        self._plan, self.asked = plan, _of_heads(plan.asked, call.key.shape[1])
        near = [part for _, part, _ in self._first.blocks() if part is not None]
        if near:
            output, log = (
                torch.cat([x.flatten(0, 1) for x in parts], dim=1)
                for parts in (
                    [part.numerator / part.denominator.unsqueeze(-1) for part in near],
                    [part.log_scale + part.denominator.log() for part in near],
                )
            )
            self.near, self.near_log = output, log

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return queries_to_chunks(x, self._plan).flatten(0, 1)

    def far(self, kernel: FarKernel) -> Iterator[FarBlock]:
        run = BidirectionalPass(self._call.replace(far=kernel), same=self._first)
        for span, _, far in run.blocks(near=False):
            sums = torch.cat([far.numerator, far.denominator.unsqueeze(-1)], dim=-1)
            yield span, sums.flatten(0, 1), far.log_scale.flatten(0, 1)


def _places(every: int) -> slice:
    """The places in a chunk of the queries that are computed."""
    return slice(every // 2, None, every)


def _of_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(R, n, C) of rows as (1 or A, n, C) of rows and key heads."""
    return x.repeat_interleave(heads, 0) if len(x) > 1 else x
