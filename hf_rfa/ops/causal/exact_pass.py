"""The exact part of a call that keeps keys: which keys each chunk keeps, and its attention to them and its near keys.

Both are done in one pass, since the choice needs the same logits as the attention: for each chunk in turn, C queries
against 2C near keys, the sinks and K kept keys, and one number per key. The far part then needs only the list of
evicted keys. Choices are indices into a *pool* per row and key head: the K kept keys of the state that the call
continues, then the aligned tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from hf_rfa.ops import kept_keys
from hf_rfa.ops.causal.passes import ChunkedPass
from hf_rfa.ops.causal.rivals import mass_so_far, places_of_rivals, value_lengths
from hf_rfa.ops.recomputing import Flags, recomputing
from hf_rfa.ops.state import RFAState

LOG2E, LN2 = math.log2(math.e), math.log(2)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The keys that a call keeps, and its exact part, for A = B * Hk rows, n chunks of C tokens and R = G * C queries.

    Attributes:
        kept, kept_mask: (A, n, K) int64 and bool: the kept keys that the queries of each chunk see.
        evicted, evicted_mask: (A, n, C): the keys added to the far sums after each chunk.
        near, near_log: (A, n, R, M), (A, n, R): softmax over the exact keys, and its log-normaliser.
        last: (A, K) int64: the keys kept after the last chunk, -1 in empty places.
        mass: (A, G, K + n * C): attention received by the keys in `last`, then by the tokens.
    """

    kept: torch.Tensor
    kept_mask: torch.Tensor
    evicted: torch.Tensor
    evicted_mask: torch.Tensor
    near: torch.Tensor
    near_log: torch.Tensor
    last: torch.Tensor
    mass: torch.Tensor


def choose_keys(chunked: ChunkedPass, state: RFAState) -> Choice:
    """The exact part of a pass that continues `state`, whose near keys precede the new tokens if there was one.

    Without gradients: those of the exact part come with the far part's, because the two share a normaliser.
    """
    tensors = [getattr(chunked.inputs, name) for name in _READ]
    position, mass = state.kept[2], mass_so_far(state, chunked.plan)
    return Choice(*recomputing(_Recipe(chunked), *tensors, position, mass))


#: Inputs that the choice and the exact part depend on.
_READ = ("query", "key", "value", "sink_key", "sink_value", "sink_logits", "kept_key", "kept_value")


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """See `ops.recomputing`; none of the outputs has a gradient."""

    chunked: ChunkedPass
    outputs: int = len(dataclasses.fields(Choice))
    constant: tuple[int, ...] = tuple(range(outputs))
    forward_only: tuple[int, ...] = ()

    def forward(self, tensors: Sequence[Any], followed: Flags) -> tuple[torch.Tensor, ...]:
        *read, position, mass = tensors
        whole = self.chunked
        # Tensors that are not read are replaced: they may belong to a transform, and transforms are off in here.
        nothing = position.new_zeros(0, dtype=whole.inputs.wide)
        given = dict(zip(_READ, read, strict=True))
        inputs = dataclasses.replace(whole.inputs, **given, decay=None, kv_state=nothing, log_max=nothing)
        far = dataclasses.replace(whole.far, gamma=nothing.new_ones(inputs.key.shape[1]))
        chunked = ChunkedPass(inputs, far, whole.plan, whole.window, whole.scaling, may_bound=False)
        return _ExactPass(chunked, position.flatten(0, 1), mass.flatten(0, 1)).run()

    def backward(self, *_: object) -> Sequence[torch.Tensor | None]:
        raise AssertionError("a choice has no gradient")


class _ExactPass:
    """Goes through the chunks in order; logits are in base 2, since powers of two take a third of the time of exp.

    The keys and values that a chunk sees lie in tables `[kept | sinks | one chunk | the other chunk]` of W slots:
    chunks alternate between the last two places, so that chunk i overwrites chunk i - 2. What else is known of a key
    is one column of `entries`: index, position, |v|, and the attention from each of the G query heads. Integers and
    floats lie in one tensor, the latter by their bits, so that keys are joined and chosen in one operation each.
    """

    def __init__(self, chunked: ChunkedPass, position: torch.Tensor, mass: torch.Tensor) -> None:
        inputs, plan, size = chunked.inputs, chunked.plan, chunked.chunk
        assert inputs.kept_key is not None
        assert inputs.kept_value is not None
        kept = inputs.kept_key, inputs.kept_value
        self.chunked, self.plan, self.wide = chunked, plan, inputs.wide
        self.count, self.heads, self.sinks = kept[0].shape[2], inputs.key.shape[1], inputs.sink_key.shape[2]
        width = self.count + self.sinks + 2 * size
        # Slots come first, so that the kept keys are contiguous; zeros, since masked entries must not be NaN.
        self.tables = [inputs.kv_state.new_zeros(width, len(position), of_state.shape[-1]) for of_state in kept]
        for table, of_state in zip(self.tables, kept, strict=True):
            table[: self.count] = of_state.flatten(0, 1).transpose(0, 1)
        slots = torch.arange(size, device=position.device)
        self.entries, self.tokens = self._entries(position, self._rows(places_of_rivals(plan, self.sinks)), mass)
        self.asked = self._rows(plan.asked).repeat(1, 1, inputs.query.shape[2]).to(self.wide)
        self.all_asked = plan.asked.all(-1).all(0).tolist()
        self.counted = self._counted(slots)
        nothing = position.new_zeros(len(position), size)
        self._nothing = nothing, torch.zeros_like(nothing, dtype=torch.bool)
        self._all = torch.ones_like(self._nothing[1])
        self._ends = self._rows((plan.rank + 1) * size)
        self._advances, self._begins = self._rows(plan.boundaries.advances), self._rows(plan.boundaries.begins)
        self._places = torch.arange(len(position), device=position.device)
        self._slot = torch.arange(self.count + size, device=position.device)
        self.full, self._masks = False, dict[int, torch.Tensor]()
        self._look()

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """(R, ...) expanded to (1 or A, ...)."""
        return x.repeat_interleave(self.heads, 0) if len(x) > 1 else x

    def _entries(
        self, position: torch.Tensor, places: torch.Tensor, mass: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`entries` of the kept keys (A, G + 3, K), and of the tokens (A, n, G + 3, C)."""
        inputs, (count, size) = self.chunked.inputs, (self.count, places.shape[2])
        assert inputs.kept_value is not None
        bits = torch.int32 if self.wide == torch.float32 else torch.int64
        rows, chunks = len(position), places.shape[1]
        position = torch.where(self._rows(self.plan.segment_ids[:, :1] == 0), position, -1)
        index = torch.arange(count + chunks * size, device=position.device).expand(rows, -1)
        numbers = torch.cat([position, places.flatten(1).expand(rows, -1)], dim=1)
        length = value_lengths(inputs.kept_value, inputs.value, self.plan, self.wide).flatten(0, 1)
        floats = torch.cat([length.unsqueeze(1), mass], dim=1).view(bits)
        whole = torch.cat([torch.stack([index, numbers], dim=1).to(bits), floats], dim=1)
        tokens = whole[:, :, count:].unflatten(2, (chunks, size)).transpose(1, 2)
        return whole[:, :, :count].contiguous(), tokens.contiguous()

    def _floats(self, entries: torch.Tensor) -> torch.Tensor:
        """(..., G + 1, L): |v|, and the attention from each query head."""
        return entries.view(self.wide)[..., 2:, :]

    def _look(self) -> None:
        """Whether each place holds a kept key, once all do for good."""
        if not self.full:
            self._there = self.entries[:, 1] >= 0
            self.full = bool(self._there.all())

    def _counted(self, slots: torch.Tensor) -> torch.Tensor:
        """(2, R, 2C): 1 where a query of an even or odd chunk is far enough from a near key to count for it."""
        distance, size, least = slots[:, None] - slots, len(slots), kept_keys.least_distance(len(slots))
        own, before = distance >= least, distance + size >= least
        counted = torch.stack([torch.cat([own, before], dim=1), torch.cat([before, own], dim=1)])
        return counted.repeat(1, self.chunked.inputs.query.shape[2], 1).to(self.wide)

    def run(self) -> tuple[torch.Tensor, ...]:
        """The fields of `Choice`."""
        near = self.asked.new_empty(*self.tokens.shape[:2], self.asked.shape[2], self.tables[1].shape[-1])
        near_log, lists = near.new_empty(near.shape[:-1]), []
        for span in self.chunked.spans():
            query = self.chunked.queries(self.chunked.inputs.query, span).to(self.wide)
            query = query * (self.chunked.scaling * LOG2E)
            for i, chunk in enumerate(range(span.start, span.stop)):
                self._enter(chunk)
                near_log[:, chunk] = self._attend(query[:, i], chunk, near[:, chunk])
                lists.append((self.entries[:, 0], self._there, *self._advance(chunk)))
        index, there, evicted, evicted_mask = (torch.stack(x, dim=1) for x in zip(*lists, strict=True))
        last = torch.where(self.entries[:, 1] >= 0, self.entries[:, 0], -1).long()
        floats = self._floats(self.entries), self._floats(self.tokens).transpose(1, 2).flatten(2)
        mass = torch.cat(floats, dim=2)[:, 1:]
        return index.long(), there, evicted.long(), evicted_mask, near, near_log.mul_(LN2), last, mass

    def _enter(self, chunk: int) -> None:
        """Write a chunk and its sinks to their slots."""
        size, inputs = self.chunked.chunk, self.chunked.inputs
        first = self.count + self.sinks + chunk % 2 * size
        for table, tokens, sinks in zip(self.tables, (inputs.key, inputs.value), self.chunked.sink_rows, strict=True):
            own = tokens.flatten(0, 1)[:, chunk * size : (chunk + 1) * size].transpose(0, 1)
            table[first : first + len(own)] = own  # leftovers of an older chunk behind it are masked
            if not (chunk and self.plan.regular[chunk] and self.plan.regular[chunk - 1]):  # else they are the same
                table[self.count : self.count + self.sinks] = sinks[:, chunk].transpose(0, 1)

    def _mask(self, chunk: int) -> torch.Tensor:
        """(1 or A, R, W): 0 where a query of the chunk sees a slot, else -inf."""
        ordinary = self.full and self.plan.regular[chunk]
        if ordinary and chunk % 2 in self._masks:
            return self._masks[chunk % 2]
        near = self.chunked.masks.near(slice(chunk, chunk + 1))[:, 0]
        sinks, before, _, own = near.split([self.sinks, self.chunked.chunk] * 2, dim=-1)
        kept = near.new_zeros(1, 1, self.count)
        if not self.full:
            kept = near.new_zeros(self._there.shape).masked_fill_(~self._there, -torch.inf).unsqueeze(1)
        parts = [kept, sinks, before, own] if chunk % 2 else [kept, sinks, own, before]
        rows = max(len(part) for part in parts)
        mask = torch.cat([part.expand(rows, near.shape[1], -1) for part in parts], dim=-1)
        if ordinary:
            self._masks[chunk % 2] = mask
        return mask

    def _attend(self, query: torch.Tensor, chunk: int, output: torch.Tensor) -> torch.Tensor:
        """Write a chunk's attention to `output` (A, R, M) and add up the mass it gives; log2 of the normaliser."""
        key, value = (table.transpose(0, 1) for table in self.tables)
        weights = self.chunked.scratch("exact weights", query, *query.shape[:2], key.shape[1])
        torch.baddbmm(self._mask(chunk), query, key.mT, out=weights)
        highest = weights.amax(-1)
        weights.sub_(highest.unsqueeze(-1)).exp2_()
        total = weights.sum(-1)
        share = total.reciprocal()
        torch.mul(torch.bmm(weights, value), share.unsqueeze(-1), out=output)
        log = highest + total.log2()
        if self.chunked.inputs.sink_logits is not None:
            share = 1 / (total + (self._sink_logits() - highest).exp2_())
        first, size = self.count + self.sinks, self.chunked.chunk
        weights[:, :, first:].mul_(self.counted[chunk % 2])
        # Each query head separately.
        asked = (share if self.all_asked[chunk] else share * self.asked[:, chunk]).view(-1, 1, size)
        given = torch.bmm(asked, weights.view(-1, size, weights.shape[2])).view(len(query), -1, weights.shape[2])
        kept, _, one, other = given.split([self.count, self.sinks, size, size], dim=2)
        own, before = (other, one) if chunk % 2 else (one, other)
        self._floats(self.entries)[:, 1:].add_(kept)
        self._floats(self.tokens[:, chunk])[:, 1:].add_(own)
        if chunk:
            self._floats(self.tokens[:, chunk - 1])[:, 1:].add_(before)
        return log

    def _sink_logits(self) -> torch.Tensor:
        """(A, R), times log2(e)."""
        logits = self.chunked.inputs.sink_logits
        assert logits is not None
        rows = logits.repeat_interleave(self.chunked.chunk, dim=1) * LOG2E
        return rows.repeat(len(self.entries) // len(rows), 1)

    def _advance(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose again where the next chunk continues the document; the evicted indices, and whether each is a key."""
        window, boundaries = self.chunked.window, self.plan.boundaries
        if not boundaries.any_advances[chunk]:
            self._begin(chunk)
            return self._nothing
        before = max(chunk - 1, 0)
        ordinary = self.full and chunk > 0 and boundaries.all_advance[before] and boundaries.all_advance[chunk]
        whole, advances = torch.cat([self.entries, self.tokens[:, before]], dim=2), self._advances[:, chunk, None]
        position, floats = whole[:, 1], self._floats(whole)
        if not chunk or not boundaries.all_advance[before]:  # nothing is evicted where a document has just begun
            leaving = position[:, self.count :]
            leaving.masked_fill_(~self._advances[:, before, None] if chunk else leaving > -2, -1)
        score = kept_keys.scores(floats[:, 1:], floats[:, 0], position, self._ends[:, chunk, None], window)
        if not boundaries.all_advance[chunk]:  # other rows do not change
            still = self._slot < self.count
            score = torch.where(advances, score, torch.where(still, 0.0, kept_keys.NOTHING))
            position.masked_fill_(~(advances | still), -1)
        going, staying = kept_keys.split(score, self.count, all_keys=ordinary)
        evicted = whole[:, 0].gather(1, going), self._all if ordinary else position.gather(1, going) >= 0
        self.entries = whole.gather(2, staying.unsqueeze(1).expand(-1, whole.shape[1], -1))
        self._move(staying, before)
        self._begin(chunk)
        self._look()
        return evicted

    def _move(self, staying: torch.Tensor, before: int) -> None:
        """Write the keys and values `staying` (A, K), of the kept ones and those of chunk `before`, to their slots."""
        shift = self.sinks + before % 2 * self.chunked.chunk
        slots = torch.where(staying < self.count, staying, staying + shift)
        rows = (slots * len(staying) + self._places.unsqueeze(1)).T.flatten()
        for table in self.tables:  # they are still in the CPU's cache, unlike the call's keys and values
            table[: self.count].view(-1, table.shape[2]).copy_(table.view(-1, table.shape[2]).index_select(0, rows))

    def _begin(self, chunk: int) -> None:
        """Forget everything in rows where the next chunk belongs to another document."""
        if self.plan.boundaries.any_begins[chunk]:
            begins = self._begins[:, chunk, None]
            self.entries[:, 1].masked_fill_(begins, -1)
            self._floats(self.entries)[:, 1:].masked_fill_(begins.unsqueeze(1), 0.0)
            self.full = False
            self._there = self.entries[:, 1] >= 0
