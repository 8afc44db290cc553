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
import torch.nn.functional as F

from hf_rfa.ops import kept_keys
from hf_rfa.ops.causal.passes import ChunkedPass
from hf_rfa.ops.causal.pool import Pool
from hf_rfa.ops.chunks import take
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


def choose_keys(chunked: ChunkedPass, state: RFAState, history: bool) -> Choice:
    """The exact part of a pass that continues `state`; with `history`, its near keys precede the new tokens.

    Without gradients: those of the exact part come with the far part's, because the two share a normaliser.
    """
    inputs, plan = chunked.inputs, chunked.plan
    _, _, position, _, mass = state.kept
    kept_count = position.shape[2]
    token_mass = mass.new_zeros(*mass.shape[:3], plan.token_mask[0].numel())
    if history:
        near = mass[..., kept_count:].transpose(2, 3)
        remembered = (plan.token_mask & ~plan.asked).flatten(1)[:, None, None]
        near = take(near, plan.source.clamp_max(near.shape[2] - 1)).transpose(2, 3)
        token_mass = near.masked_fill(~remembered, 0.0)
    tensors = [getattr(inputs, name) for name in _READ]
    mass = torch.cat([mass[..., :kept_count], token_mass], dim=-1)
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
    chunks alternate between the last two places, so that chunk i overwrites chunk i - 2.
    """

    def __init__(self, chunked: ChunkedPass, position: torch.Tensor, mass: torch.Tensor) -> None:
        inputs, plan, size = chunked.inputs, chunked.plan, chunked.chunk
        assert inputs.kept_key is not None
        assert inputs.kept_value is not None
        self.chunked, self.plan, self.wide = chunked, plan, inputs.wide
        self.count, self.heads, self.sinks = inputs.kept_key.shape[2], inputs.key.shape[1], inputs.sink_key.shape[2]
        self.pools = Pool(inputs.kept_key, inputs.key), Pool(inputs.kept_value, inputs.value)
        self.index = torch.arange(self.count, device=position.device).expand_as(position)
        self.position = torch.where(self._rows(plan.segment_ids[:, :1] == 0), position, -1)
        width = self.count + self.sinks + 2 * size
        # Slots come first, so that the kept keys are contiguous; zeros, since masked entries must not be NaN.
        self.tables = [inputs.kv_state.new_zeros(width, len(position), pool.shape[-1]) for pool in self.pools]
        missing = plan.token_mask[0].numel() - inputs.value.shape[2]
        norms = [torch.linalg.vector_norm(x, dim=-1, dtype=self.wide) for x in (inputs.kept_value, inputs.value)]
        lengths = F.pad(torch.cat(norms, dim=2), (0, missing)).flatten(0, 1)
        # Per kept key, and per token of each chunk: the attention from each of the G query heads, and |v|.
        numbers = torch.cat([mass, lengths.unsqueeze(1)], dim=1)
        self.numbers, tokens = numbers[..., : self.count], numbers[..., self.count :]
        self.tokens = tokens.unflatten(2, (-1, size))
        slots = torch.arange(size, device=position.device)
        rival = plan.token_mask & ((plan.rank > 0).unsqueeze(-1) | (slots >= self.sinks))
        places = torch.where(rival, plan.rank.unsqueeze(-1) * size + slots, -1)
        self.places = self._rows(places).expand(len(position), -1, -1)
        self.asked = self._rows(plan.asked).repeat(1, 1, inputs.query.shape[2]).to(self.wide)
        self.counted = self._counted(slots)
        shape = len(position), size
        self._nothing = position.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=position.device)
        self._all = torch.ones_like(self._nothing[1])
        self._slots = (self.count + torch.arange(self.places[0].numel(), device=position.device)).view(1, -1, size)
        self._ends = self._rows((plan.rank + 1) * size)
        self._advances, self._begins = self._rows(plan.boundaries.advances), self._rows(plan.boundaries.begins)
        self.full, self._there = False, self.position >= 0
        self._masks: dict[int, torch.Tensor] = {}
        self._take()

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """(R, ...) expanded to (1 or A, ...)."""
        return x.repeat_interleave(self.heads, 0) if len(x) > 1 else x

    def _take(self) -> None:
        """Write the kept keys and values to their slots."""
        rows = self.pools[0].rows(self.index)
        for pool, table in zip(self.pools, self.tables, strict=True):
            pool.put(rows, table[: self.count])
        if not self.full:
            self._there = self.position >= 0
            self.full = bool(self._there.all())

    def _counted(self, slots: torch.Tensor) -> torch.Tensor:
        """(2, R, 2C): 1 where a query of an even or odd chunk is far enough from a near key to count for it."""
        distance, size, least = slots[:, None] - slots, len(slots), kept_keys.least_distance(len(slots))
        own, before = distance >= least, distance + size >= least
        counted = torch.stack([torch.cat([own, before], dim=1), torch.cat([before, own], dim=1)])
        return counted.repeat(1, self.chunked.inputs.query.shape[2], 1).to(self.wide)

    def run(self) -> tuple[torch.Tensor, ...]:
        """The fields of `Choice`."""
        near = self.asked.new_empty(*self.places.shape[:2], self.asked.shape[2], self.pools[1].shape[-1])
        near_log, lists = near.new_empty(near.shape[:-1]), []
        for span in self.chunked.spans():
            query = self.chunked.queries(self.chunked.inputs.query, span).to(self.wide)
            query = query * (self.chunked.scaling * LOG2E)
            for i, chunk in enumerate(range(span.start, span.stop)):
                self._enter(chunk)
                near_log[:, chunk] = self._attend(query[:, i], chunk, near[:, chunk])
                lists.append((self.index, self._there, *self._advance(chunk)))
        last = torch.where(self.position >= 0, self.index, -1)
        mass = torch.cat([self.numbers, self.tokens.flatten(2)], dim=2)[:, :-1]
        stacked = [torch.stack(x, dim=1) for x in zip(*lists, strict=True)]
        return *stacked, near, near_log.mul_(LN2), last, mass

    def _enter(self, chunk: int) -> None:
        """Write a chunk and its sinks to their slots."""
        size, inputs = self.chunked.chunk, self.chunked.inputs
        first = self.count + self.sinks + chunk % 2 * size
        for table, tokens, sinks in zip(self.tables, (inputs.key, inputs.value), self.chunked.sink_rows, strict=True):
            own = tokens.flatten(0, 1)[:, chunk * size : (chunk + 1) * size].transpose(0, 1)
            table[first : first + len(own)] = own  # leftovers of an older chunk behind it are masked
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
            kept = near.new_zeros(self.position.shape).masked_fill_(self.position < 0, -torch.inf).unsqueeze(1)
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
        weights[:, :, first:] *= self.counted[chunk % 2]
        # Each query head separately.
        asked = (share * self.asked[:, chunk]).view(-1, 1, size)
        given = torch.bmm(asked, weights.view(-1, size, weights.shape[2])).view(len(query), -1, weights.shape[2])
        self.numbers[:, :-1] += given[..., : self.count]
        one, other = given[..., first : first + size], given[..., first + size :]
        own, before = (other, one) if chunk % 2 else (one, other)
        self.tokens[:, :-1, chunk] += own
        if chunk:
            self.tokens[:, :-1, chunk - 1] += before
        return log

    def _sink_logits(self) -> torch.Tensor:
        """(A, R), times log2(e)."""
        logits = self.chunked.inputs.sink_logits
        assert logits is not None
        rows = logits.repeat_interleave(self.chunked.chunk, dim=1) * LOG2E
        return rows.repeat(len(self.position) // len(rows), 1)

    def _advance(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose again where the next chunk continues the document; the evicted indices, and whether each is a key."""
        window, boundaries = self.chunked.window, self.plan.boundaries
        if not boundaries.any_advances[chunk]:
            self._begin(chunk)
            return self._nothing
        before = max(chunk - 1, 0)
        leaving, advances = self.places[:, before], self._advances[:, chunk : chunk + 1]
        ordinary = self.full and chunk > 0 and boundaries.all_advance[before] and boundaries.all_advance[chunk]
        if not chunk or not boundaries.all_advance[before]:  # nothing is evicted where a document has just begun
            leaving = leaving.masked_fill(~self._advances[:, before : before + 1] if chunk else leaving > -2, -1)
        index = torch.cat([self.index, self._slots[:, before].expand_as(leaving)], dim=1)
        position = torch.cat([self.position, leaving], dim=1)
        numbers = torch.cat([self.numbers, self.tokens[:, :, before]], dim=2)
        score = kept_keys.scores(numbers[:, :-1], numbers[:, -1], position, self._ends[:, chunk : chunk + 1], window)
        if not boundaries.all_advance[chunk]:  # other rows do not change
            still = torch.arange(score.shape[1], device=score.device) < self.count
            score = torch.where(advances, score, torch.where(still, 0.0, kept_keys.NOTHING))
            position = torch.where(advances | still, position, -1)
        going, staying = kept_keys.split(score, self.count, all_keys=ordinary)
        evicted = index.gather(1, going), self._all if ordinary else position.gather(1, going) >= 0
        self.index, self.position = index.gather(1, staying), position.gather(1, staying)
        self.numbers = numbers.gather(2, staying.unsqueeze(1).expand(-1, numbers.shape[1], -1))
        self._begin(chunk)
        self._take()
        return evicted

    def _begin(self, chunk: int) -> None:
        """Forget everything in rows where the next chunk belongs to another document."""
        if self.plan.boundaries.any_begins[chunk]:
            begins = self._begins[:, chunk : chunk + 1]
            self.position = self.position.masked_fill(begins, -1)
            self.numbers = self.numbers.masked_fill(begins.unsqueeze(1), 0.0)
            self.full, self._there = False, self.position >= 0
