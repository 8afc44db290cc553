"""Which keys each chunk of the causal operator keeps: a pass over the chunks that needs no values and no features.

The choice goes from chunk to chunk, but it is light: the logits of C queries per chunk against their exact keys, and a
number per key. Given the choices, the outputs of all chunks are independent of each other. Choices are indices into a
*pool* per row and key head: the K kept keys of the state that the call continues, then the aligned tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hf_rfa.ops import kept_keys
from hf_rfa.ops.causal.near import windows
from hf_rfa.ops.causal.passes import ChunkedPass, PassInputs
from hf_rfa.ops.chunks import take
from hf_rfa.ops.recomputing import Flags, recomputing
from hf_rfa.ops.state import RFAState


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a call keeps, A = B * Hk rows, n chunks of C tokens, K kept keys.

    Attributes:
        kept, kept_mask: (A, n, K) int64 and bool: what the queries of each chunk see, in order, the last places filled
            first.
        evicted, evicted_mask: (A, n, C): what is added to the far sums once each chunk has been answered.
        last: (A, K) int64: what is kept in the end, -1 where nothing is.
        mass: (A, K + n * C): what the keys in `last`, then the tokens, have received.
    """

    kept: torch.Tensor
    kept_mask: torch.Tensor
    evicted: torch.Tensor
    evicted_mask: torch.Tensor
    last: torch.Tensor
    mass: torch.Tensor


def choose_keys(chunked: ChunkedPass, state: RFAState, history: bool) -> Choice:
    """The choices of a pass that continues `state`, whose near keys precede the new tokens if there is `history`."""
    inputs, plan = chunked.inputs, chunked.plan
    heads = inputs.key.shape[1]
    _, _, position, _, mass = state.kept
    kept_count = position.shape[2]
    remembered = plan.token_mask & ~plan.asked
    token_mass = mass.new_zeros(len(mass), heads, plan.token_mask[0].numel())
    if history:
        near = mass[..., kept_count:].unsqueeze(-1)
        slots = plan.source.clamp_max(near.shape[2] - 1)
        token_mass = take(near, slots).squeeze(-1).masked_fill(~remembered.flatten(1).unsqueeze(1), 0.0)
    made = recomputing(
        _Selection(chunked), inputs.query, inputs.key, inputs.value, inputs.sink_key, inputs.sink_logits,
        inputs.kept_key, inputs.kept_value,
        position, torch.cat([mass[..., :kept_count], token_mass], -1),
    )  # fmt: skip
    return Choice(*made)


@dataclasses.dataclass(frozen=True)
class _Selection:
    """See `ops.recomputing`; nothing of it has a gradient."""

    chunked: ChunkedPass
    outputs: int = 6
    constant: tuple[int, ...] = tuple(range(6))

    def forward(self, tensors: Sequence[Any], followed: Flags) -> tuple[torch.Tensor, ...]:
        query, key, value, sink_key, sink_logits, kept_key, kept_value, position, mass = tensors
        whole = self.chunked
        # What has no part in a choice may belong to a transform, which is off in here.
        wide, nothing = whole.inputs.wide, query.new_zeros(0, dtype=whole.inputs.wide)
        inputs = PassInputs(
            query, key, key, sink_key, sink_key, decay=None, sink_logits=sink_logits, kv_state=nothing, log_max=nothing
        )
        far = dataclasses.replace(whole.far, gamma=query.new_ones(query.shape[1], dtype=wide))
        chunked = ChunkedPass(inputs, far, whole.plan, whole.window, whole.scaling, may_bound=False)
        missing = chunked.plan.token_mask[0].numel() - value.shape[2]
        lengths = [
            torch.linalg.vector_norm(x, dim=-1, dtype=wide) for x in (kept_value, F.pad(value, (0, 0, 0, missing)))
        ]
        per_key = (x.flatten(0, 1) for x in (position, mass, torch.cat(lengths, dim=2)))
        return _Chooser(chunked, kept_key.flatten(0, 1).to(wide), *per_key).run()

    def backward(self, *_: object) -> Sequence[torch.Tensor | None]:
        raise AssertionError("a choice has no gradient")


class _Chooser:
    """Goes through the chunks and takes down what each keeps."""

    def __init__(
        self, chunked: ChunkedPass, key: torch.Tensor, position: torch.Tensor, mass: torch.Tensor, length: torch.Tensor
    ) -> None:
        self.chunked, self.plan, plan = chunked, chunked.plan, chunked.plan
        self.count, self.heads = key.shape[1], chunked.inputs.key.shape[1]
        continues = self._rows(plan.segment_ids[:, :1] == 0)
        self.position = torch.where(continues, position, -1)
        self.key = key
        self.index = torch.arange(self.count, device=key.device).expand_as(position)
        self.mass, tokens = mass.split([self.count, mass.shape[1] - self.count], dim=1)
        self.token_mass = tokens.clone().unflatten(1, (-1, chunked.chunk))
        self.length, tokens = length.split([self.count, length.shape[1] - self.count], dim=1)
        self.token_length = tokens.unflatten(1, (-1, chunked.chunk))
        sinks = chunked.inputs.sink_key.shape[2]
        slots = torch.arange(chunked.chunk, device=key.device)
        places = plan.rank.unsqueeze(-1) * chunked.chunk + slots
        rival = plan.token_mask & ((plan.rank > 0).unsqueeze(-1) | (slots >= sinks))
        self.token_position = self._rows(torch.where(rival, places, -1)).expand(len(key), -1, -1)
        self.asked = self._rows(plan.asked).repeat(1, 1, chunked.inputs.query.shape[2]).to(self.key)
        self.counted = self._counted()
        self.found: list[tuple[torch.Tensor, ...]] = []

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """(R, ...) as (1 or A, ...)."""
        return x.repeat_interleave(self.heads, 0) if len(x) > 1 else x

    def _counted(self) -> torch.Tensor:
        """(R, W) 1 where the queries of a chunk count for its near keys, which are far enough from them, else 0."""
        size, sinks = self.chunked.chunk, self.chunked.inputs.sink_key.shape[2]
        slots = torch.arange(size, device=self.key.device)
        distance = slots[:, None] - slots
        least, of_sinks = kept_keys.least_distance(size), distance.new_zeros(size, sinks)
        counted = torch.cat([of_sinks, distance + size >= least, of_sinks, distance >= least], dim=1)
        return counted.repeat(self.chunked.inputs.query.shape[2], 1).to(self.key)

    def run(self) -> tuple[torch.Tensor, ...]:
        """The fields of `Choice`."""
        some = bool((self.position >= 0).any())
        advances, begins = self._rows(self.plan.boundaries.advances), self._rows(self.plan.boundaries.begins)
        for span in self.chunked.spans():
            near = self._near(span)
            for chunk in range(span.start, span.stop):
                kept, kept_mask = self.index, self.position >= 0
                some = self._receive(chunk, some, *(x[:, chunk - span.start] for x in near))
                evicted = self._advance(chunk, advances[:, chunk], begins[:, chunk])
                some = some or self.plan.boundaries.any_advances[chunk]
                self.found.append((kept, kept_mask, *evicted))
        made = [torch.stack(x, dim=1) for x in zip(*self.found, strict=True)]
        last = torch.where(self.position >= 0, self.index, -1)
        return *made, last, torch.cat([self.mass, self.token_mass.flatten(1)], dim=1)

    def _near(self, span: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (A, n, R, D) of a block, exp(logit - m) (A, n, R, W) of its near keys, m and their sum (A, n, R)."""
        block, scratch = self.chunked.block(span), self.chunked.scratch
        assert block.mask is not None
        keys, query = windows(block.key, block.sink_key, scratch, "near keys"), block.query * block.scaling
        weights = scratch("near weights", query, *query.shape[:3], keys.shape[2])
        torch.matmul(query, keys.mT, out=weights)
        weights += block.mask
        largest = weights.amax(-1)
        if block.sink_logits is not None:
            largest = torch.maximum(largest, block.sink_logits)
        weights.sub_(largest.unsqueeze(-1)).exp_()
        total = weights.sum(-1)
        if block.sink_logits is not None:
            total += (block.sink_logits - largest).exp()
        weights *= self.counted
        return query, weights, largest, total

    def _receive(
        self, chunk: int, some: bool, query: torch.Tensor, weights: torch.Tensor, largest: torch.Tensor,
        total: torch.Tensor,
    ) -> bool:  # fmt: skip
        """Add what the queries of a chunk give to its exact keys, those that are kept being `some` or none."""
        share = self.asked[:, chunk]
        if some:
            logits = (query @ self.key.mT).masked_fill_((self.position < 0).unsqueeze(1), -torch.inf)
            highest = torch.maximum(largest, logits.amax(-1))
            logits.sub_(highest.unsqueeze(-1)).exp_()
            lowered = (largest - highest).exp_()
            share = share / (total * lowered).add_(logits.sum(-1))
            self.mass = self.mass + (share.unsqueeze(1) @ logits).squeeze(1)
            share = share * lowered
        else:
            share = share / total
        given = (share.unsqueeze(1) @ weights).squeeze(1)
        size, sinks = self.chunked.chunk, self.chunked.inputs.sink_key.shape[2]
        if chunk:
            self.token_mass[:, chunk - 1] += given[:, sinks : sinks + size]
        self.token_mass[:, chunk] += given[:, 2 * sinks + size :]
        return some

    def _advance(self, chunk: int, advances: torch.Tensor, begins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose anew where the next chunk goes on with the document; what goes, and whether it is a key."""
        size, window = self.chunked.chunk, self.chunked.window
        boundaries = self.plan.boundaries
        if not boundaries.any_advances[chunk]:
            nothing = self.index.new_zeros(len(self.index), size)
            if boundaries.any_begins[chunk]:
                self.position = self.position.masked_fill(begins.unsqueeze(-1), -1)
                self.mass = self.mass.masked_fill(begins.unsqueeze(-1), 0.0)
            return nothing, nothing.bool()
        before = max(chunk - 1, 0)
        leaving = self.token_position[:, before]
        if not chunk or not boundaries.all_advance[before]:  # nothing leaves where a document has just begun
            joined = self._rows(boundaries.advances[:, before : before + 1]) if chunk else leaving[:1, :1] < -1
            leaving = leaving.masked_fill(~joined, -1)
        slots = torch.arange(size, device=leaving.device) + self.count + before * size
        index = torch.cat([self.index, slots.expand_as(leaving)], dim=1)
        position = torch.cat([self.position, leaving], dim=1)
        mass = torch.cat([self.mass, self.token_mass[:, before]], dim=1)
        length = torch.cat([self.length, self.token_length[:, before]], dim=1)
        key = torch.cat([self.key, self._keys(before)], dim=1)
        count = (self._rows(self.plan.rank[:, chunk : chunk + 1]) + 1) * window
        score = kept_keys.scores(mass, length, position, count, window)
        if not boundaries.all_advance[chunk]:  # other rows stay as they are
            still = torch.arange(score.shape[1], device=score.device) < self.count
            still = torch.where(still, 0.0, kept_keys.NOTHING)
            score = torch.where(advances.unsqueeze(-1), score, still)
            position = torch.where(advances.unsqueeze(-1) | (still == 0), position, -1)
        going, staying = kept_keys.split(score, self.count)
        self.index, self.position, self.mass, self.length = (
            x.gather(1, staying) for x in (index, position, mass, length)
        )
        self.key = key.gather(1, staying.unsqueeze(-1).expand(-1, -1, key.shape[2]))
        evicted = index.gather(1, going), position.gather(1, going) >= 0
        if boundaries.any_begins[chunk]:
            self.position = self.position.masked_fill(begins.unsqueeze(-1), -1)
            self.mass = self.mass.masked_fill(begins.unsqueeze(-1), 0.0)
        return evicted

    def _keys(self, chunk: int) -> torch.Tensor:
        """The keys (A, C, D) of a chunk that is full."""
        size = self.chunked.chunk
        keys = self.chunked.inputs.key.flatten(0, 1)[:, chunk * size : (chunk + 1) * size]
        return keys.to(self.key)
