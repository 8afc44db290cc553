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
from hf_rfa.ops.causal.exact_attention import ExactAttention
from hf_rfa.ops.causal.passes import ChunkedPass
from hf_rfa.ops.causal.rivals import mass_so_far
from hf_rfa.ops.recomputing import Flags, recomputing
from hf_rfa.ops.state import RFAState

LN2 = math.log(2)


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


class _ExactPass(ExactAttention):
    """Goes through the chunks in order, and chooses behind each which keys are kept.

    While a text is so short that nothing is evicted, nothing is chosen either, and no table is filled.
    """

    def run(self) -> tuple[torch.Tensor, ...]:
        """The fields of `Choice`."""
        near = self.asked.new_empty(*self.tokens.shape[:2], self.asked.shape[2], self._read[1].shape[-1])
        spans, near_log = self.chunked.spans(), near.new_zeros(near.shape[:-1])
        complete = min(self.chunked.complete_chunks(self.count), self.last + 1)
        near[:, self.last + 1 :] = 0.0
        index, there, evicted, evicted_mask = self._nothing_evicted(complete)
        for span in spans:
            query = self.chunked.queries(self.chunked.inputs.query, span).to(self.wide)
            for i, chunk in enumerate(range(span.start, span.stop)):
                if chunk >= complete:
                    self._enter(chunk)
                if self.any_asked[chunk]:
                    attend = self._attend_to_all if chunk < complete else self._attend
                    near_log[:, chunk] = attend(query[:, i], chunk, near[:, chunk])
                else:  # empty, or only the state's
                    near[:, chunk] = 0.0
                if chunk < complete - 1:
                    continue
                if chunk < complete:
                    self._take_over(chunk)
                first = self.count - self.width
                index[:, chunk, first:], there[:, chunk, first:] = self.entries[:, 0], self._there
                going, gone = self._advance(chunk)
                first = evicted.shape[2] - going.shape[1]
                evicted[:, chunk, first:], evicted_mask[:, chunk, first:] = going, gone
        last = torch.where(self.entries[:, 1] >= 0, self.entries[:, 0], -1).long()
        floats = self._floats(self.entries), self._floats(self.tokens).transpose(1, 2).flatten(2)
        empty = self.count - self.width
        mass = F.pad(torch.cat(floats, dim=2)[:, 1:], (empty, 0))
        return index, there, evicted, evicted_mask, near, near_log.mul_(LN2), F.pad(last, (empty, 0), value=-1), mass

    def _nothing_evicted(self, complete: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The first fields of `Choice`, filled for the chunks before `complete`, which keep every far key."""
        rows, chunks, size = len(self.tokens), self.tokens.shape[1], self.chunked.chunk
        places = torch.arange(self.count, device=self.tokens.device)
        index = places.new_zeros(rows, chunks, self.count)
        there, evicted = torch.zeros_like(index, dtype=torch.bool), places.new_zeros(rows, chunks, size)
        if complete:
            widths = torch.tensor(self._widths[:complete], device=places.device).unsqueeze(-1)
            number = places - self.count + widths  # among the kept keys, the first of which is behind the sinks
            index[:, :complete] = self.count + self.sinks + number.clamp_min(0)
            there[:, :complete] = number >= 0
        return index, there, evicted, torch.zeros_like(evicted, dtype=torch.bool)

    def _take_over(self, chunk: int) -> None:
        """Fill tables and entries as they are before the choice after `chunk`, the last that sees everything."""
        self.width = self._widths[chunk]
        stop = self.sinks + self.width
        self.entries = self.tokens[:, : max(chunk - 1, 0)].transpose(1, 2).flatten(2)[:, :, self.sinks : stop].clone()
        self._look()
        if chunk == self.last:
            return
        for table, tokens in zip(self.tables, self._read, strict=True):
            sinks = tokens[: self.sinks]
            table[self.count - self.width : self.count] = tokens[self.sinks : stop]
            table[self.count : self.count + len(sinks)] = sinks
        for entered in range(max(chunk - 1, 0), chunk + 1):
            self._enter(entered)

    def _advance(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose again where the next chunk continues the document; the evicted indices, and whether each is a key.

        Of places that no row has filled, none are returned: (A, L), L <= C.
        """
        window, boundaries, width = self.chunked.window, self.plan.boundaries, self.width
        if not boundaries.any_advances[chunk]:
            self._begin(chunk)
            return self._nothing
        before = max(chunk - 1, 0)
        ordinary = self.full and self.plan.regular[chunk] and boundaries.all_advance[before]
        ordinary = ordinary and boundaries.all_advance[chunk]
        whole, advances = torch.cat([self.entries, self.tokens[:, before]], dim=2), self._advances[:, chunk, None]
        if ordinary and self._widths[chunk + 1] == width + window:  # there is place for all
            staying = self._slot[: width + window].expand(len(whole), -1)
            self.width, self.entries = width + window, whole
            self._move(staying, width, chunk)
            self._look()
            return self._nothing[0][:, :0], self._nothing[1][:, :0]
        position, floats = whole[:, 1], self._floats(whole)
        if not chunk or not boundaries.all_advance[before]:  # nothing is evicted where a document has just begun
            leaving = position[:, width:]
            leaving.masked_fill_(~self._advances[:, before, None] if chunk else leaving > -2, -1)
        score = kept_keys.scores(floats[:, 1:], floats[:, 0], position, self._ends[:, chunk, None], window)
        if not boundaries.all_advance[chunk]:  # other rows do not change
            still = self._slot[: width + window] < width
            score = torch.where(advances, score, torch.where(still, 0.0, kept_keys.NOTHING))
            position.masked_fill_(~(advances | still), -1)
        # Never fewer than before: the rows whose document goes on have not begun another one yet.
        self.width = max(width, self._widths[chunk + 1])
        going, staying = kept_keys.split(score, self.width, all_keys=ordinary)
        gone = self._all[:, : going.shape[1]] if ordinary else position.gather(1, going) >= 0
        evicted = whole[:, 0].gather(1, going), gone
        self.entries = whole.gather(2, staying.unsqueeze(1).expand(-1, whole.shape[1], -1))
        self._move(staying, width, chunk)
        self._begin(chunk)
        self._look()
        return evicted

    def _move(self, staying: torch.Tensor, width: int, chunk: int) -> None:
        """Write the keys and values `staying`, of the `width` kept ones and the chunk before, to their slots."""
        if chunk == self.last:
            return
        first = self.count - width
        shift = self.sinks + max(chunk - 1, 0) % 2 * self.chunked.chunk
        slots = torch.where(staying < width, staying, staying + shift) + first
        rows = (slots * len(staying) + self._places.unsqueeze(1)).T.flatten()
        for table in self.tables:  # they are still in the CPU's cache, unlike the call's keys and values
            kept = table[self.count - self.width : self.count]
            kept.view(-1, table.shape[2]).copy_(table.view(-1, table.shape[2]).index_select(0, rows))

    def _begin(self, chunk: int) -> None:
        """Forget everything in rows where the next chunk belongs to another document."""
        if self.plan.boundaries.any_begins[chunk]:
            begins = self._begins[:, chunk, None]
            self.entries[:, 1].masked_fill_(begins, -1)
            self._floats(self.entries)[:, 1:].masked_fill_(begins.unsqueeze(1), 0.0)
            self.full = False
        # Filled places are the last ones.
        first = max(0, self.width - self._widths[chunk + 1])
        self.entries, self.width = self.entries[:, :, first:], self.width - first
        if not self.full:
            self._there = self.entries[:, 1] >= 0
