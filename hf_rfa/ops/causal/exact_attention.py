"""The attention of one chunk after the other to its exact keys, and what is known of these keys meanwhile."""

import functools
import math

import torch
import torch.nn.functional as F

from hf_rfa.ops import kept_keys
from hf_rfa.ops.causal.passes import ChunkedPass
from hf_rfa.ops.causal.rivals import places_of_rivals, value_lengths

LOG2E = math.log2(math.e)


class ExactAttention:
    """Attends chunk by chunk, in order, and adds up the attention that each key receives.

    Logits are in base 2, since powers of two take a third of the time of exp.

    The keys and values that a chunk sees lie in tables `[kept | sinks | one chunk | the other chunk]` of W slots:
    chunks alternate between the last two places, so that chunk i overwrites chunk i - 2. What else is known of a key
    is one column of `entries`: index, position, |v|, and the attention from each of the G query heads. Integers and
    floats lie in one tensor, the latter by their bits, so that keys are joined and chosen in one operation each.

    Of the K places only the last `width` are looked at, the most that any row has filled so far.
    """

    def __init__(self, chunked: ChunkedPass, position: torch.Tensor, mass: torch.Tensor) -> None:
        inputs, plan, size = chunked.inputs, chunked.plan, chunked.chunk
        assert inputs.kept_key is not None
        assert inputs.kept_value is not None
        self.chunked, self.plan, self.wide, self._scale = chunked, plan, inputs.wide, chunked.scaling * LOG2E
        self.count, self.heads = inputs.kept_key.shape[2], inputs.key.shape[1]
        self.sinks = inputs.sink_key.shape[2]
        self._read = [x.flatten(0, 1).transpose(0, 1) for x in (inputs.key, inputs.value)]
        self.last = chunked.spans()[-1].stop - 1
        slots = torch.arange(size, device=position.device)
        self._widths = self._most_kept()
        self.width = self._widths[0]
        self.entries, self.tokens = self._entries(position, self._rows(places_of_rivals(plan, self.sinks)), mass)
        self.entries = self.entries[:, :, self.count - self.width :]
        self.asked = self._rows(plan.asked).repeat(1, 1, inputs.query.shape[2]).to(self.wide)
        self.all_asked, self.any_asked = (x.tolist() for x in (plan.asked.all(-1).all(0), plan.asked.any(-1).any(0)))
        self.counted = self._counted(slots)
        nothing = position.new_zeros(len(position), size)
        self._nothing = nothing, torch.zeros_like(nothing, dtype=torch.bool)
        self._all = torch.ones_like(self._nothing[1])
        self._ends = self._rows((plan.rank + 1) * size)
        self._advances, self._begins = self._rows(plan.boundaries.advances), self._rows(plan.boundaries.begins)
        self._longest = chunked.complete_chunks(self.count) * size
        self._causal = self.asked.new_full((size, size), -torch.inf).triu(1)
        #: Of a chunk and the one before it.
        distance = slots[:, None] + size - torch.arange(2 * size, device=slots.device)
        self._all_counted = (distance >= kept_keys.least_distance(size)).to(self.wide)
        self._places = torch.arange(len(position), device=position.device)
        self._slot = torch.arange(self.count + size, device=position.device)
        self.full, self._there = False, self.entries[:, 1] >= 0
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

    @functools.cached_property
    def tables(self) -> list[torch.Tensor]:
        """Keys and values, with those that the state keeps; while a chunk sees all tokens, they are not needed."""
        inputs, slots = self.chunked.inputs, self.count + self.sinks + 2 * self.chunked.chunk
        assert inputs.kept_key is not None
        assert inputs.kept_value is not None
        tables = []
        for of_state in (inputs.kept_key, inputs.kept_value):
            # Slots come first, so that the kept keys are contiguous; zeros, since masked entries must not be NaN.
            table = inputs.kv_state.new_zeros(slots, len(self.tokens), of_state.shape[-1])
            table[: self.count] = of_state.flatten(0, 1).transpose(0, 1)
            tables.append(table)
        return tables

    def _most_kept(self) -> list[int]:
        """The most keys that any row keeps at each chunk, and once more after the last one."""
        plan, size = self.plan, self.chunked.chunk
        ranks = plan.rank.amax(0).tolist()
        ranks[0] += plan.history  # the state before chunk c0 - 1 of a layout is that before chunk c0
        kept = [kept_keys.number_kept(rank * size, size, self.sinks, self.count) for rank in ranks]
        return [*kept, kept[-1]]

    def _floats(self, entries: torch.Tensor) -> torch.Tensor:
        """(..., G + 1, L): |v|, and the attention from each query head."""
        return entries.view(self.wide)[..., 2:, :]

    def _look(self) -> None:
        """Whether each place that is looked at holds a kept key."""
        if not self.full or self._there.shape[1] != self.width:
            self._there = self.entries[:, 1] >= 0
            self.full = bool(self._there.all())

    def _counted(self, slots: torch.Tensor) -> torch.Tensor:
        """(2, R, 2C): 1 where a query of an even or odd chunk is far enough from a near key to count for it."""
        distance, size, least = slots[:, None] - slots, len(slots), kept_keys.least_distance(len(slots))
        own, before = distance >= least, distance + size >= least
        counted = torch.stack([torch.cat([own, before], dim=1), torch.cat([before, own], dim=1)])
        return counted.repeat(1, self.chunked.inputs.query.shape[2], 1).to(self.wide)

    def _attend_to_all(self, query: torch.Tensor, chunk: int, output: torch.Tensor) -> torch.Tensor:
        """`_attend` for a chunk that sees its whole document."""
        size = self.chunked.chunk
        start, stop = chunk * size, min((chunk + 1) * size, len(self._read[0]))
        key, value = (x[:stop].transpose(0, 1).to(self.wide) for x in self._read)
        weights = self._weights(query, stop)
        weights.baddbmm_(query, key.mT, beta=0, alpha=self._scale)
        own = weights.view(len(query), -1, size, stop)[..., start:]
        own.add_(self._causal[:, : stop - start])
        total, share, highest = self._normalise(weights)
        torch.mul(torch.bmm(weights, value), share.unsqueeze(-1), out=output)
        # Weights of queries that are too near to a key do not count.
        behind = max(0, start - size)
        near = weights.view(len(query), -1, size, stop)[..., behind:]
        near.mul_(self._all_counted[:, size - start + behind : size + stop - start])
        given = self._given(weights, total, share, highest, chunk)
        given = F.pad(given, (0, start + size - stop)).unflatten(2, (-1, size)).transpose(1, 2)
        self._floats(self.tokens)[:, : chunk + 1, 1:].add_(given)
        return highest + total.log2()

    def _weights(self, query: torch.Tensor, width: int) -> torch.Tensor:
        """A buffer (A, R, width)."""
        size = query.shape[0] * query.shape[1]
        most = max(self.count + self.sinks + 2 * self.chunked.chunk, self._longest)
        return self.chunked.scratch("exact weights", query, size * most)[: size * width].view(*query.shape[:2], width)

    def _enter(self, chunk: int) -> None:
        """Write a chunk and its sinks to their slots."""
        size = self.chunked.chunk
        first = self.count + self.sinks + chunk % 2 * size
        for table, tokens, sinks in zip(self.tables, self._read, self.chunked.sink_rows, strict=True):
            own = tokens[chunk * size : (chunk + 1) * size]
            table[first : first + len(own)] = own  # leftovers of an older chunk behind it are masked
            if not (chunk and self.plan.regular[chunk] and self.plan.regular[chunk - 1]):  # else they are the same
                table[self.count : self.count + self.sinks] = sinks[:, chunk].transpose(0, 1)

    def _mask(self, chunk: int) -> torch.Tensor:
        """(1 or A, R, W): 0 where a query of the chunk sees a slot, else -inf."""
        near = self.chunked.masks.near(slice(chunk, chunk + 1))[:, 0]
        sinks, before, _, own = near.split([self.sinks, self.chunked.chunk] * 2, dim=-1)
        kept = near.new_zeros(1, 1, self.width)
        if not self.full:
            kept = near.new_zeros(self._there.shape).masked_fill_(~self._there, -torch.inf).unsqueeze(1)
        parts = [kept, sinks, before, own] if chunk % 2 else [kept, sinks, own, before]
        rows = max(len(part) for part in parts)
        return torch.cat([part.expand(rows, near.shape[1], -1) for part in parts], dim=-1)

    def _attend(self, query: torch.Tensor, chunk: int, output: torch.Tensor) -> torch.Tensor:
        """Write a chunk's attention to `output` (A, R, M) and add up the mass it gives; log2 of the normaliser."""
        key, value = (table[self.count - self.width :].transpose(0, 1) for table in self.tables)
        weights = self._weights(query, key.shape[1])
        first, size = self.width + self.sinks, self.chunked.chunk
        if self.full and self.plan.regular[chunk]:  # only later tokens of the chunk are hidden
            weights.baddbmm_(query, key.mT, beta=0, alpha=self._scale)
            own = first + chunk % 2 * size
            weights.view(len(query), -1, size, key.shape[1])[..., own : own + size].add_(self._causal)
        else:
            torch.baddbmm(self._mask(chunk), query, key.mT, alpha=self._scale, out=weights)
        total, share, highest = self._normalise(weights)
        torch.mul(torch.bmm(weights, value), share.unsqueeze(-1), out=output)
        weights[:, :, first:].mul_(self.counted[chunk % 2])
        given = self._given(weights, total, share, highest, chunk)
        kept, _, one, other = given.split([self.width, self.sinks, size, size], dim=2)
        own, before = (other, one) if chunk % 2 else (one, other)
        self._floats(self.entries)[:, 1:].add_(kept)
        self._floats(self.tokens[:, chunk])[:, 1:].add_(own)
        if chunk:
            self._floats(self.tokens[:, chunk - 1])[:, 1:].add_(before)
        return highest + total.log2()

    def _normalise(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn logits (A, R, W) into weights, in place; their sum, its reciprocal, and the largest logit (A, R)."""
        highest = weights.amax(-1)
        weights.sub_(highest.unsqueeze(-1)).exp2_()
        total = weights.sum(-1)
        return total, total.reciprocal(), highest

    def _given(
        self, weights: torch.Tensor, total: torch.Tensor, share: torch.Tensor, highest: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        """The attention (A, G, W) that each key receives from a chunk's queries, of each query head separately."""
        size = self.chunked.chunk
        if self.chunked.inputs.sink_logits is not None:
            share = 1 / (total + (self._sink_logits() - highest).exp2_())
        asked = (share if self.all_asked[chunk] else share * self.asked[:, chunk]).view(-1, 1, size)
        given = torch.bmm(asked, weights.view(-1, size, weights.shape[2]))
        return given.view(len(weights), -1, weights.shape[2])

    def _sink_logits(self) -> torch.Tensor:
        """(A, R), times log2(e)."""
        logits = self.chunked.inputs.sink_logits
        assert logits is not None
        rows = logits.repeat_interleave(self.chunked.chunk, dim=1) * LOG2E
        return rows.repeat(len(self.entries) // len(rows), 1)
