"""The causal operator as one pass over blocks of chunks: forward, and backward with everything recomputed.

Memory besides inputs and outputs: the far sums at the start of each block, and the features and scores of one block.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.causal.block import Block, Combined, Features, KeptRows, Parts, block_parts, block_sums
from hf_rfa.ops.causal.bounded_features import MAPS, BoundedFeatures, BoundedMap
from hf_rfa.ops.causal.masks import ExactMasks
from hf_rfa.ops.causal.pass_inputs import PassInputs
from hf_rfa.ops.causal.pool import Pool
from hf_rfa.ops.causal.scratch import Scratch
from hf_rfa.ops.chunks import take
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import Plan

#: Chunks per block: their features and scores, over all heads, must fit into the CPU's cache.
BLOCK_CHUNKS = 8


@dataclass
class ChunkedPass:
    """The blocks of a call, read from its inputs one by one; autograd records nothing."""

    inputs: PassInputs
    far: FarKernel
    plan: Plan
    window: int
    scaling: float
    may_bound: bool = True  # whether `BoundedMap` may be used: it gives no gradients of the kernel
    narrow: bool = False  # whether products are bfloat16, see `narrow_products`; needs `BoundedMap`
    scratch: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        plan, heads = self.plan, self.inputs.key.shape[1]
        self.delay = 1 if self.window else 0
        groups, sinks = self.inputs.query.shape[2], self.inputs.sink_key.shape[2]
        self.masks = ExactMasks(plan, sinks, heads, groups, self.inputs.wide)
        fold = plan.fold
        if self.delay:
            fold = F.pad(plan.fold[:, :-1], (0, 0, 1, 0)) & self.masks.follows.unsqueeze(-1)
        keep = torch.cat([plan.segment_ids[:, :1] == 0, self.masks.follows[:, 1:]], dim=1)
        self.fold, self.keep = (x.repeat_interleave(heads, 0) if len(x) > 1 else x for x in (fold, keep))
        batch = len(self.inputs.key)
        self.log_gamma = self.far.log_gamma().repeat(batch).view(-1, 1, 1)
        limit = self.far.log_limit()
        self.log_limit = None if limit is None else limit.repeat(batch).view(-1, 1, 1)
        self.pools = self._pools()

    @property
    def chunk(self) -> int:
        """C, the chunk size."""
        return self.plan.token_mask.shape[-1]

    @functools.cached_property
    def sink_rows(self) -> list[torch.Tensor]:
        """The sinks (A, n, s, D or M) that each chunk sees: keys, values."""
        pairs = (self.inputs.key, self.inputs.sink_key), (self.inputs.value, self.inputs.sink_value)
        return [self._sink_rows(x, of_state) for x, of_state in pairs]

    @functools.cached_property
    def _bounded(self) -> tuple[BoundedMap, BoundedMap] | None:
        # Large exponents are looked up on the host, which would make a GPU wait.
        maps, device = set(self.far.feature_maps), self.far.gamma.device.type
        if not (self.may_bound and len(maps) == 1 and maps <= set(MAPS) and device == "cpu"):
            return None
        batch = len(self.inputs.key)
        options = self.far, self.scaling, batch
        query, key = (BoundedMap(*options, keys, self.scratch, self.narrow) for keys in (False, True))
        return query, key

    def spans(self) -> list[slice]:
        """The chunks of each block, first of those whose exact part is known and which have no far keys.

        An empty last chunk, which only marks where the next token belongs, is left out.
        """
        count, first = self.plan.token_mask.shape[1], self._known_chunks()
        if self.plan.identity and count > 1 and self.inputs.key.shape[2] <= (count - 1) * self.chunk:
            count -= 1
        return [
            slice(i, min(i + BLOCK_CHUNKS, stop))
            for start, stop in ((0, min(first, count)), (first, count))
            for i in range(start, stop, BLOCK_CHUNKS)
        ]

    def complete_chunks(self, kept_keys: int) -> int:
        """The number of first chunks that see every token of their document exactly, known only for simple layouts."""
        return min(self.plan.token_mask.shape[1], self._complete(kept_keys))

    def _complete(self, kept_keys: int) -> int:
        """The same of a document without an end; after all of these but the last, nothing is evicted."""
        plan, sinks = self.plan, self.inputs.sink_key.shape[2]
        simple = plan.identity and not plan.history and not any(plan.boundaries.any_begins)
        if not (self.window and simple and self.inputs.key.shape[2]):
            return 0
        return (kept_keys + sinks) // self.chunk + 2

    def block(self, span: slice) -> Block:
        """The block that consists of the chunks in a span."""
        inputs = self.inputs
        decay = None
        if inputs.decay is not None:
            decay = inputs.decay[:, :, max(span.start - 1, 0) : span.stop].flatten(0, 1)
            decay = decay if span.start else F.pad(decay, (0, 0, 1, 0))
        kept = self._kept_rows(span)
        fold = self.fold if inputs.evicted_mask is None else inputs.evicted_mask
        return Block(
            query=self.queries(inputs.query, span).to(inputs.wide),
            key=self._chunks(inputs.key, span).to(inputs.wide),
            value=self._chunks(inputs.value, span).to(inputs.wide),
            sink_key=self.sink_rows[0][:, span],
            sink_value=self.sink_rows[1][:, span],
            mask=self._mask(span),
            fold=fold[:, span],
            keep=self.keep[:, span],
            decay=decay,
            sink_logits=self._logits(),
            log_gamma=self.log_gamma,
            log_limit=self.log_limit,
            scaling=self.scaling,
            delay=self.delay,
            steady=all(self.plan.regular[span]),
            narrow=self.narrow,
            kept=kept,
        )

    def psi(self, query: torch.Tensor, key: torch.Tensor, far: FarKernel) -> Features:
        """The features of a block's queries and far keys."""
        heads = self.inputs.key.shape[1]
        query, key = (x.unflatten(0, (-1, heads)) for x in (query, key))
        made = (*far.query_features(query, self.scaling), *far.key_features(key, self.scaling))
        return Features(*(x.flatten(0, 1) for x in made))

    def bounded_psi(self, block: Block) -> tuple[BoundedFeatures, BoundedFeatures] | None:
        """The same by the faster `BoundedMap`; None if the feature maps do not allow it."""
        if self._bounded is None:
            return None
        return self._bounded[0](block.query), self._bounded[1](block.far_key)

    def bounded_gradients(
        self, made: tuple[BoundedFeatures, BoundedFeatures], psi: Features
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of a block's queries and far keys from those of `bounded_psi`."""
        assert self._bounded is not None
        query = self._bounded[0].gradient(made[0], psi.query, psi.query_scale)
        return query, self._bounded[1].gradient(made[1], psi.key, psi.key_scale)

    def _known_chunks(self) -> int:
        """The number of first chunks whose exact part is known, without far keys before or after them."""
        inputs = self.inputs
        if inputs.evicted is None or inputs.kept_key is None:
            return 0
        return max(0, self._complete(inputs.kept_key.shape[2]) - 1)

    def exact_blocks(self) -> int:
        """The number of first blocks of such chunks."""
        return -(-min(self._known_chunks(), self.spans()[-1].stop) // BLOCK_CHUNKS)

    def exact_answer(self, span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (A, n, R, M) of a block without far keys, and the log of its normaliser (A, n, R)."""
        near, log, logits = self.inputs.near, self.inputs.near_log, self._logits()
        assert near is not None
        assert log is not None
        near, log = near[:, span], log[:, span]
        if logits is None:
            return near, log
        total = torch.logaddexp(log, logits.expand_as(log))
        return near * (log - total).exp_().unsqueeze(-1), total

    def forward(self, first: int = 0) -> Iterator[tuple[slice, Block, Parts, torch.Tensor, torch.Tensor]]:
        """Per block from `first` on: both parts, in buffers that the next block reuses, and S^T and m after it.

        No far keys may come before `first`.
        """
        kv_state, log_max = (x.flatten(0, 1) for x in (self.inputs.kv_state, self.inputs.log_max))
        state = kv_state.mT.clone(memory_format=torch.contiguous_format)
        for span in self.spans()[first:]:
            block = self.block(span)
            made = self.bounded_psi(block)
            psi = self.psi(block.query, block.far_key, self.far) if made is None else features_of(made)
            sums = block_sums(block, psi, log_max, self.scratch)
            near = self.inputs.near, self.inputs.near_log
            known = None if near[0] is None or near[1] is None else (near[0][:, span], near[1][:, span])
            parts = block_parts(block, psi, sums, state, self.scratch, known)
            log_max = sums.end_log_max
            yield span, block, parts, state, log_max

    def count(self, combined: Combined, span: slice, statistics: FarStatistics) -> None:
        """Add a block's dropped far parts to the statistics, without padding."""
        heads, groups = self.inputs.query.shape[1:3]
        asked = self.plan.asked[:, span].repeat(1, 1, groups)
        asked = asked.repeat_interleave(heads, 0) if len(asked) > 1 else asked
        seen = (combined.far_log > -torch.inf) & asked
        statistics.add(seen & combined.dropped, seen)

    def target(self, whole: torch.Tensor, span: slice) -> torch.Tensor:
        """A buffer for a block's rows (A, n, G * C, M), to be passed to `put`: a view of `whole` if possible."""
        batch, heads, groups, length, dim = whole.shape
        count = span.stop - span.start
        if groups == 1 and span.stop * self.chunk <= length and whole.dtype == self.inputs.wide:
            return self.queries(whole, span)
        return self.scratch("rows", self.inputs.kv_state, batch * heads, count, groups * self.chunk, dim)

    def put(self, whole: torch.Tensor, rows: torch.Tensor, span: slice) -> None:
        """Write the rows (A, n, G * C, M) of a block's queries to whole (B, Hk, G, T, M)."""
        batch, heads, groups, length, dim = whole.shape
        if rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
            return
        tokens = rows.view(batch, heads, -1, groups, self.chunk, dim).transpose(2, 3).flatten(3, 4)
        start = span.start * self.chunk
        whole[:, :, :, start : start + tokens.shape[3]] = tokens[:, :, :, : length - start]

    def put_keys(self, whole: torch.Tensor, chunks: torch.Tensor, span: slice, begun: bool) -> None:
        """Write a block's gradients of chunks (A, n + 1, C, D), the first before the span, to whole (A, T, D).

        Call it from the last block to the first: the following block has already written to this one's last chunk.
        `begun`: All of `whole` holds a part of the gradient already.
        """
        count, tokens = self.spans()[-1].stop, chunks.flatten(1, 2)
        first, stop = (span.start - 1) * self.chunk, min(span.stop * self.chunk, whole.shape[1])
        low, written = max(first, 0), min((span.stop - (span.stop < count)) * self.chunk, stop)
        if begun:
            whole[:, low:stop] += tokens[:, low - first : stop - first]
            return
        whole[:, low:written] = tokens[:, low - first : written - first]
        whole[:, written:stop] += tokens[:, written - first : stop - first]

    def add_sinks(self, whole: torch.Tensor, of_state: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the gradient of `sink_rows` (A, n, s, D) to the keys (A, T, D) or the state's sinks (A, s, D)."""
        if not rows.shape[2]:
            return
        index, from_state = self._sink_index(rows.shape[2])
        batch, heads = self.inputs.key.shape[:2]
        split = rows.unflatten(0, (batch, heads))
        stored = from_state[:, None, :, None, None]
        of_state += torch.where(stored, split, 0.0).sum(2).flatten(0, 1)
        split = torch.where(stored, 0.0, split).flatten(2, 3)
        index = index.flatten(1)[:, None, :, None].expand(split.shape)
        whole.view(batch, heads, *whole.shape[1:]).scatter_add_(2, index, split)

    def queries(self, query: torch.Tensor, span: slice) -> torch.Tensor:
        """The rows (A, n, G * C, D) of a block in query (B, Hk, G, T, D), or in any tensor of that shape."""
        batch, heads, groups, length, dim = query.shape
        start, stop = span.start * self.chunk, span.stop * self.chunk
        tokens = query[:, :, :, start:stop]
        if stop > length:
            tokens = F.pad(tokens, (0, 0, 0, stop - length))
        chunks = tokens.unflatten(3, (-1, self.chunk)).transpose(2, 3)
        return chunks.reshape(batch * heads, span.stop - span.start, groups * self.chunk, dim)

    def _logits(self) -> torch.Tensor | None:
        """The sink logits (A, 1, R), or None."""
        logits = self.inputs.sink_logits
        if logits is None:
            return None
        return logits.repeat_interleave(self.chunk, dim=1).repeat(len(self.inputs.key), 1).unsqueeze(1)

    def _chunks(self, x: torch.Tensor, span: slice) -> torch.Tensor:
        """The chunks of a span and the one before it (A, n + 1, C, D), which is zero if there is none."""
        length = x.shape[2]
        start, stop = (span.start - 1) * self.chunk, span.stop * self.chunk
        tokens = x[:, :, max(start, 0) : stop]
        if start < 0 or stop > length:
            tokens = F.pad(tokens, (0, 0, max(-start, 0), max(stop - length, 0)))
        return tokens.reshape(-1, span.stop - span.start + 1, self.chunk, x.shape[3])

    def _sink_index(self, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens (R, n, s) that are the sinks of each chunk, and (R, n) whether the state holds them instead."""
        chunks = self.plan.sink_chunk
        slots = torch.arange(sinks, device=chunks.device)
        index = chunks.clamp_min(0).unsqueeze(-1) * self.chunk + slots
        return index.clamp_max(self.inputs.key.shape[2] - 1), chunks < 0

    def _sink_rows(self, x: torch.Tensor, of_state: torch.Tensor) -> torch.Tensor:
        """The sinks (A, n, s, D) that each chunk sees, from keys or values x (B, Hk, T, D)."""
        sinks, chunks = of_state.shape[2], self.plan.token_mask.shape[1]
        if not sinks:
            return self.inputs.kv_state.new_zeros(x.shape[0] * x.shape[1], chunks, 0, x.shape[3])
        index, from_state = self._sink_index(sinks)
        found = take(x, index.flatten(1)).unflatten(2, index.shape[1:])
        rows = torch.where(from_state[:, None, :, None, None], of_state.unsqueeze(2), found)
        return rows.flatten(0, 1).to(self.inputs.wide)

    def _mask(self, span: slice) -> torch.Tensor | None:
        inputs = self.inputs
        if not self.window or inputs.near is not None:  # no exact part, or it is already known
            return None
        return self.masks.near(span) if inputs.kept_mask is None else self.masks.exact(span, inputs.kept_mask[:, span])

    def _pools(self) -> tuple[Pool, Pool] | None:
        inputs = self.inputs
        if inputs.kept is None:
            return None
        assert inputs.kept_key is not None
        assert inputs.kept_value is not None
        continues = self.plan.history
        return Pool(inputs.kept_key, inputs.key, continues), Pool(inputs.kept_value, inputs.value, continues)

    def _kept_rows(self, span: slice) -> KeptRows | None:
        inputs = self.inputs
        if self.pools is None or inputs.kept is None or inputs.kept_mask is None or inputs.evicted is None:
            return None
        far_key, far_value = (pool.take(inputs.evicted[:, span]).to(inputs.wide) for pool in self.pools)
        decay = None if inputs.far_decay is None else inputs.far_decay[:, span]
        kept = inputs.kept[:, span], inputs.kept_mask[:, span]
        return KeptRows(self.pools, *kept, far_key, far_value, decay)


def features_of(made: tuple[BoundedFeatures, BoundedFeatures]) -> Features:
    """The features of queries and keys as one object."""
    query, key = made
    return Features(query.features, query.log_scale, key.features, key.log_scale)
