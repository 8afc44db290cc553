"""Layout of tokens in chunks, with padding and packed documents.

Near and far are defined by positions within a document, so that a padded or packed row gives the same result as the
bare sequence. The chunked operators therefore work on an *aligned* sequence, in which every document begins at a chunk
boundary and padding is removed; `TokenLayout.plan` says where each token goes. Documents without far keys may be left
out of it: `TokenLayout.short` packs them into tiles instead. All layers of a forward pass share both.
"""

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from hf_rfa.errors import ConfigError
from hf_rfa.ops.documents import Documents
from hf_rfa.ops.recomputing import numbers
from hf_rfa.ops.tiles import ShortPlan, ShortRule, short_plan


@dataclass(frozen=True)
class Plan:
    """Indices of an aligned sequence of n chunks of C slots; R = 1 when all rows are alike, else the batch.

    The source is `cat([near keys of the state (2C, if there is a state and C > 0), new tokens (N)])`.

    Attributes:
        source: (R, n * C) the source slot of each aligned slot (0 if it is empty).
        token_mask: (R, n, C) whether an aligned slot holds a token.
        asked: (R, n, C) whether that token is new, so that its output is wanted.
        fold: (R, n, C) whether its key is ever added to the far sums: no sink, and far from tokens to come.
        segment_ids: (R, n) number of the document that a chunk belongs to; 0 continues the initial state.
        rank: (R, n) number of the chunk within its document.
        sink_chunk: (R, n) aligned chunk that holds the document's first tokens, -1 where only the state has them.
        last: (R,) aligned chunk that the next token would fall into.
        place: (R, N) aligned slot of each token (0 if it has none).
        placed: (R, N) whether a token has one; padding and the documents that are left out have none.
        count: (R,) tokens of the row's last document seen after the call, on the CPU.
        identity: Whether the aligned sequence begins with the source itself, so that no gather is needed.
        history: Whether the source begins with the 2C near slots of a state.
        regular: (n,) whether, in every row, a chunk and the one before it are full, of one document and behind its
            first two chunks: all such chunks have the same mask.
    """

    source: torch.Tensor
    token_mask: torch.Tensor
    asked: torch.Tensor
    fold: torch.Tensor
    segment_ids: torch.Tensor
    rank: torch.Tensor
    sink_chunk: torch.Tensor
    last: torch.Tensor
    place: torch.Tensor
    placed: torch.Tensor
    count: torch.Tensor
    identity: bool
    history: bool
    regular: tuple[bool, ...]

    @functools.cached_property
    def codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The bits defined in `ops.triton.pieces`, of slots (R, n, C) uint8 and chunks (R, n) int32; `sink_chunk`."""
        same = F.pad(self.segment_ids[:, 1:] == self.segment_ids[:, :-1], (1, 0))
        keep = same.clone()
        keep[:, 0] = self.segment_ids[:, 0] == 0
        chunks = keep.int() + 2 * same.int() + 4 * (self.rank > 1).int() + 8 * self._advances().int()
        slots = self.token_mask.to(torch.uint8) + 2 * self.fold.to(torch.uint8) + 4 * self.asked.to(torch.uint8)
        return slots, chunks, self.sink_chunk.int()

    @functools.cached_property
    def boundaries(self) -> "Boundaries":
        """Whether the document continues, or another one begins, after each chunk."""
        advances = self._advances()
        begins = F.pad(self.segment_ids[:, 1:] != self.segment_ids[:, :-1], (0, 1))
        numbers = torch.stack([advances.any(0), advances.all(0), begins.any(0)]).tolist()
        return Boundaries(advances, begins, *(tuple(x) for x in numbers))

    def _advances(self) -> torch.Tensor:
        same = self.segment_ids[:, 1:] == self.segment_ids[:, :-1]
        return F.pad(same & (self.rank[:, 1:] == self.rank[:, :-1] + 1), (0, 1))


@dataclass(frozen=True)
class Boundaries:
    """What follows each chunk: the next chunk of its document, the first of another one, or nothing.

    Attributes:
        advances, begins: (R, n) bool: whether the document continues, or another one begins.
        any_advances, all_advance, any_begins: (n,) whether that is the case in any row, or in all rows.
    """

    advances: torch.Tensor
    begins: torch.Tensor
    any_advances: tuple[bool, ...]
    all_advance: tuple[bool, ...]
    any_begins: tuple[bool, ...]


@dataclass(frozen=True)
class PlanSpec:
    """The settings of a plan.

    Args:
        chunk: Chunk size C, tokens.
        sinks: Number of first tokens of a document that are never added to the far sums.
        history: Whether the source begins with the 2C near slots of a state.
        final: Whether a final state with near keys is wanted, which needs the chunk that the next token falls into.
        short: Which documents are left out, because `ops.linear` computes them separately; None for none.
    """

    chunk: int
    sinks: int
    history: bool
    final: bool
    short: ShortRule | None = None


@dataclass(frozen=True)
class TokenLayout:
    """Padding and packing of the N new tokens of a batch.

    Args:
        token_mask: (B, N) bool, False for padding (left, right or holes); None if there is no padding.
        segment_ids: (B, N) int, equal within a packed document, different between neighbours; None for one per row.
    """

    token_mask: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    _plans: dict[tuple, Plan] = field(default_factory=dict, repr=False, compare=False)
    _short_plans: dict[tuple, ShortPlan | None] = field(default_factory=dict, repr=False, compare=False)
    _documents: dict[tuple[int, int], Documents] = field(default_factory=dict, repr=False, compare=False)
    _ordinals: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("token_mask", "segment_ids"):
            value = getattr(self, name)
            if value is not None and value.dim() != 2:
                raise ConfigError(
                    f"`{name}` must have shape (batch, tokens). Got {tuple(value.shape)}. Pass one entry a token."
                )

    @property
    def is_plain(self) -> bool:
        """Whether there is neither padding nor packing."""
        return self.token_mask is None and self.segment_ids is None

    @property
    def ordinal(self) -> torch.Tensor | None:
        """(B, N) number of each token's document in its row, counted from 0; None for one document per row.

        Padding takes the number of the token before it, so that it never begins a document.
        """
        if self.segment_ids is None:
            return None
        if torch.compiler.is_compiling():  # in a graph, compute it at each use: `cached_property` has a lock
            return self._number_documents(self.segment_ids)
        if not self._ordinals:
            self._ordinals.append(self._number_documents(self.segment_ids))
        return self._ordinals[0]

    def _number_documents(self, segment_ids: torch.Tensor) -> torch.Tensor:
        if self.token_mask is not None:
            slots = torch.arange(segment_ids.shape[1], device=segment_ids.device)
            last_token = torch.where(self.token_mask, slots, -1).cummax(1).values
            first_token = self.token_mask.int().argmax(1, keepdim=True)
            segment_ids = segment_ids.gather(1, torch.where(last_token < 0, first_token, last_token))
        changes = (segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(1)
        return torch.cat([torch.zeros_like(changes[:, :1]) if changes.shape[1] else segment_ids * 0, changes], dim=1)

    def check(self, batch: int, length: int) -> None:
        """Raise `ConfigError` unless the layout describes (batch, length) tokens."""
        for name in ("token_mask", "segment_ids"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (batch, length):
                raise ConfigError(
                    f"`{name}` must have shape (batch, tokens) = {(batch, length)}. Got {tuple(value.shape)}. Pass "
                    "one entry for each new token."
                )

    def plan(self, length: int, spec: "PlanSpec", counts: torch.Tensor, device: torch.device) -> Plan:
        """The aligned layout of `length` new tokens that follow `counts` (B,) earlier ones."""
        before = tuple(counts.tolist())
        if self.is_plain and len(set(before)) == 1:
            return _plain_plan(length, spec, before[0], device)
        key = (length, spec, before, device)
        if key not in self._plans:
            documents = self.documents(len(before), length)
            if spec.short is not None:
                documents = documents.select(~spec.short.apply(documents))
            self._plans[key] = _make_plan(documents, np.array(before), spec, device)
        return self._plans[key]

    def short(self, batch: int, length: int, rule: ShortRule, device: torch.device) -> ShortPlan | None:
        """The documents that `rule` takes out of the plan, packed into tiles; None if there are none."""
        if self.is_plain:
            return _plain_short_plan(batch, length, rule, device) if length <= rule.longest else None
        key = (batch, length, rule, device)
        if key not in self._short_plans:
            self._short_plans[key] = short_plan(self.documents(batch, length), rule, device)
        return self._short_plans[key]

    def documents(self, batch: int, length: int) -> Documents:
        """The documents of all rows; reads the tensors, once for all layers."""
        if (batch, length) not in self._documents:
            token_mask, segment_ids = (None if t is None else numbers(t) for t in (self.token_mask, self.segment_ids))
            self._documents[batch, length] = Documents.find(batch, length, token_mask, segment_ids)
        return self._documents[batch, length]


def _make_plan(documents: Documents, seen: np.ndarray, spec: PlanSpec, device: torch.device) -> Plan:
    """Lay out each document from a chunk boundary on, the first of a row behind the near keys of the state."""
    rows, chunk = documents.rows, spec.chunk
    offset = 2 * chunk if spec.history else 0
    before = np.where(documents.number == 0, seen[documents.row], 0)  # tokens are counted without a window, too
    continues = (documents.number == 0) & spec.history
    first = np.where(continues, before // chunk - 1, 0)  # rank of the first chunk in the layout
    lead = np.where(continues, before - first * chunk, 0)  # slots at its start that the state fills
    filled = lead + documents.length
    # With a final state, up to the chunk of the document's next token.
    chunks = filled // chunk + 1 if spec.final else np.maximum(1, -(-filled // chunk))
    totals = np.bincount(documents.row, chunks, rows).astype(np.int64)
    begin = chunks.cumsum() - chunks - (totals.cumsum() - totals)[documents.row]

    # Per chunk; shorter rows repeat their last chunk.
    of_chunk = np.repeat(np.arange(len(chunks)), chunks)
    within = np.arange(len(of_chunk)) - np.repeat(chunks.cumsum() - chunks, chunks)
    columns = np.minimum(np.arange(totals.max()), totals[:, None] - 1) + (totals.cumsum() - totals)[:, None]
    segment_ids, rank = documents.number[of_chunk][columns], (first[of_chunk] + within)[columns]
    # Chunk 0 of the document, if it is in the layout.
    sink_chunk = np.where(first <= 0, begin - first, -1)[of_chunk][columns]

    # Per slot.
    shape = (*columns.shape, chunk)
    source, token_mask = np.zeros((rows, columns.shape[1] * chunk), dtype=np.int64), np.zeros(shape, dtype=bool)
    flat = token_mask.reshape(rows, -1)
    slots = np.arange(min(2 * chunk, flat.shape[1]))
    led, from_start = np.zeros(rows, dtype=np.int64), np.ones(rows, dtype=bool)
    led[documents.row[continues]], from_start[documents.row[continues]] = lead[continues], first[continues] >= 0
    remembered = slots < led[:, None]
    source[:, : len(slots)][remembered] = np.broadcast_to(slots, remembered.shape)[remembered]
    flat[:, : len(slots)] = remembered & ((slots >= chunk) | from_start[:, None])
    owner, place_in = documents.entries()
    row, slot = np.divmod(documents.tokens(), documents.slots)
    aligned = (begin * chunk + lead)[owner] + place_in
    source[row, aligned], flat[row, aligned] = slot + offset, True
    beginning: np.ndarray = rank == 0
    fold = token_mask & ~(beginning[..., None] & (np.arange(chunk) < spec.sinks))
    if spec.final:
        # These are near to the next token: the final state must not have them in its far sums.
        fold[np.arange(columns.shape[1]) >= totals[:, None] - 2] = False
    place, placed = (np.zeros((rows, documents.slots), dtype=kind) for kind in (np.int64, bool))
    place[row, slot], placed[row, slot] = aligned, True
    full: np.ndarray = np.logical_and.reduce(token_mask, axis=2)
    alike = (rank[:, 1:] > 1) & full[:, 1:] & full[:, :-1] & (segment_ids[:, 1:] == segment_ids[:, :-1])

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Plan(
        put(source),
        put(token_mask),
        put(token_mask & (source.reshape(shape) >= offset)),
        put(fold),
        put(segment_ids),
        put(rank),
        put(sink_chunk),
        put(totals - 1),
        put(place),
        put(placed),
        torch.from_numpy((before + documents.length)[documents.last]),
        identity=rows == 1 and bool(placed.all()) and bool((place[0] == np.arange(documents.slots)).all()),
        history=spec.history,
        regular=(False, *alike.all(0).tolist()),
    )


@functools.lru_cache(maxsize=16)
def _plain_plan(length: int, spec: PlanSpec, seen: int, device: torch.device) -> Plan:
    """The plan for rows that are all alike; cached, since all layers and often the next batch share it."""
    return _make_plan(Documents.find(1, length, None, None), np.array([seen]), spec, device)


@functools.lru_cache(maxsize=16)
def _plain_short_plan(batch: int, length: int, rule: ShortRule, device: torch.device) -> ShortPlan | None:
    """The short plan if the rows themselves are short documents."""
    return short_plan(Documents.find(batch, length, None, None), rule, device)
