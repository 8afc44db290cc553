"""Where tokens lie: padding and packed documents, laid out in chunks.

The definition of near and far counts a document's own tokens, so that a padded or packed row gives what the bare
sequence gives. The chunked operators therefore work on an *aligned* sequence in which every document begins at a chunk
boundary and padding is gone; `TokenLayout.plan` says where each token goes, and all layers of a forward share it.
"""

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from hf_rfa.errors import ConfigError
from hf_rfa.ops.recomputing import numbers


@dataclass(frozen=True)
class Plan:
    """Indices of an aligned sequence of n chunks of C slots; R = 1 when all rows are alike, else the batch.

    The source is `cat([near keys of the state (2C, if there is a state and C > 0), new tokens (N)])`.

    Attributes:
        source: (R, n * C) slot of the source that each aligned slot takes (0 where there is none).
        valid: (R, n, C) whether an aligned slot holds a token.
        asked: (R, n, C) whether that token is a new one, whose output is wanted.
        fold: (R, n, C) whether its key ever moves into the far sums: not a sink, and far to the tokens that follow.
        document: (R, n) number of the document that a chunk belongs to; 0 continues the initial state.
        rank: (R, n) number of the chunk within its document.
        sink_chunk: (R, n) aligned chunk that holds the document's first tokens, -1 where only the state has them.
        last: (R,) aligned chunk that the next token would fall into.
        place: (R, N) aligned slot of each token (0 for padding).
        token_valid: (R, N) whether a token is none of padding.
        count: (R,) tokens seen afterwards in the row's last document, on the CPU.
        identity: Whether the aligned sequence begins with the source itself, so that nothing need be gathered.
        regular: (n,) whether a chunk and the one before it are full, of one document and behind its first two chunks
            in every row: the near keys of such chunks are all alike.
    """

    source: torch.Tensor
    valid: torch.Tensor
    asked: torch.Tensor
    fold: torch.Tensor
    document: torch.Tensor
    rank: torch.Tensor
    sink_chunk: torch.Tensor
    last: torch.Tensor
    place: torch.Tensor
    token_valid: torch.Tensor
    count: torch.Tensor
    identity: bool
    regular: tuple[bool, ...]

    @functools.cached_property
    def codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The bits that `ops.triton.pieces` names, of slots (R, n, C) uint8, of chunks (R, n) int32; `sink_chunk`."""
        same = F.pad(self.document[:, 1:] == self.document[:, :-1], (1, 0))
        keep = same.clone()
        keep[:, 0] = self.document[:, 0] == 0
        chunks = keep.int() + 2 * same.int() + 4 * (self.rank > 1).int()
        slots = self.valid.to(torch.uint8) + 2 * self.fold.to(torch.uint8)
        return slots, chunks, self.sink_chunk.int()


@dataclass(frozen=True)
class PlanSpec:
    """What a plan depends on besides the tokens.

    Args:
        chunk: Chunk size C, tokens.
        sinks: The first tokens of a document that are never folded into the far sums.
        history: Whether the source begins with the 2C near slots of a state.
        final: Whether a final state with near keys is wanted, which needs the chunk that the next token falls into.
    """

    chunk: int
    sinks: int
    history: bool
    final: bool


@dataclass(frozen=True)
class TokenLayout:
    """Padding and packing of the N new tokens of a batch.

    Args:
        valid: (B, N) bool, False for padding (left, right or holes); None if there is none.
        document: (B, N) int, equal within a packed document and different in neighbours; None for one document a row.
    """

    valid: torch.Tensor | None = None
    document: torch.Tensor | None = None
    _plans: dict[tuple, Plan] = field(default_factory=dict, repr=False, compare=False)
    _ordinals: list[torch.Tensor] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("valid", "document"):
            value = getattr(self, name)
            if value is not None and value.dim() != 2:
                raise ConfigError(
                    f"`{name}` must have shape (batch, tokens). Got {tuple(value.shape)}. Pass one entry a token."
                )

    @property
    def is_plain(self) -> bool:
        """No padding, no packing."""
        return self.valid is None and self.document is None

    @property
    def ordinal(self) -> torch.Tensor | None:
        """(B, N) number of each token's document in its row, counted from 0; None for one document a row.

        Padding takes the number of the token before it, so that it begins and ends nothing.
        """
        if self.document is None:
            return None
        if torch.compiler.is_compiling():  # a graph computes it where it is used; `cached_property` has a lock
            return self._number_documents(self.document)
        if not self._ordinals:
            self._ordinals.append(self._number_documents(self.document))
        return self._ordinals[0]

    def _number_documents(self, document: torch.Tensor) -> torch.Tensor:
        if self.valid is not None:
            slots = torch.arange(document.shape[1], device=document.device)
            last_token = torch.where(self.valid, slots, -1).cummax(1).values
            first_token = self.valid.int().argmax(1, keepdim=True)
            document = document.gather(1, torch.where(last_token < 0, first_token, last_token))
        changes = (document[:, 1:] != document[:, :-1]).cumsum(1)
        return torch.cat([torch.zeros_like(changes[:, :1]) if changes.shape[1] else document * 0, changes], dim=1)

    def check(self, batch: int, length: int) -> None:
        """Raise `ConfigError` unless the layout describes (batch, length) tokens."""
        for name in ("valid", "document"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (batch, length):
                raise ConfigError(
                    f"`{name}` must have shape (batch, tokens) = {(batch, length)}. Got {tuple(value.shape)}. Pass "
                    f"one "
                    "entry for each new token."
                )

    def plan(self, length: int, spec: "PlanSpec", counts: torch.Tensor, device: torch.device) -> Plan:
        """The aligned layout of `length` new tokens after `counts` (B,) earlier ones."""
        before = tuple(counts.tolist())
        if self.is_plain and len(set(before)) == 1:
            return _plain_plan(length, spec, before[0], device)
        key = (length, spec, before, device)
        if key not in self._plans:
            documents = [self._documents(row, length) for row in range(len(before))]
            rows = [_align_row(docs, seen, spec) for docs, seen in zip(documents, before, strict=True)]
            self._plans[key] = _make_plan(rows, length, spec, device)
        return self._plans[key]

    def _documents(self, row: int, length: int) -> list[np.ndarray]:
        """The slots of each document of a row, in order, padding left out."""
        slots = np.arange(length) if self.valid is None else np.flatnonzero(numbers(self.valid)[row])
        if self.document is None or len(slots) == 0:
            return [slots]
        document = numbers(self.document)[row, slots]
        return np.split(slots, np.flatnonzero(np.diff(document)) + 1)


@dataclass(frozen=True)
class _Row:
    source: np.ndarray
    valid: np.ndarray
    fold: np.ndarray
    document: np.ndarray
    rank: np.ndarray
    sink_chunk: np.ndarray
    count: int


def _align_row(documents: list[np.ndarray], seen: int, spec: PlanSpec) -> _Row:
    """Lay out one row: each document from a chunk boundary on, the first one behind the near keys of the state."""
    chunk = spec.chunk
    offset = 2 * chunk if spec.history else 0
    sources, valids, ranks, numbers, sink_chunks, begins = [], [], [], [], [], 0
    count = 0
    for number, slots in enumerate(documents):
        continues = spec.history and number == 0
        before = seen if number == 0 else 0  # counts on without a window too, where nothing is aligned to it
        first = before // chunk - 1 if continues else 0  # rank of the first chunk laid out
        lead = before - first * chunk if continues else 0
        count = before + len(slots)
        filled = lead + len(slots)
        chunks = max(1, -(-filled // chunk))
        if spec.final:
            chunks = filled // chunk + 1  # up to the chunk that the document's next token falls into
        source, valid = np.zeros(chunks * chunk, dtype=np.int64), np.zeros(chunks * chunk, dtype=bool)
        source[:lead], valid[:lead] = np.arange(lead), True
        if first < 0:
            valid[:chunk] = False
        source[lead : lead + len(slots)], valid[lead : lead + len(slots)] = slots + offset, True
        sources.append(source)
        valids.append(valid)
        rank = first + np.arange(chunks)
        ranks.append(rank)
        numbers.append(np.full(chunks, number))
        # Chunk 0 of the document, where it is laid out.
        sink_chunks.append(np.full(chunks, begins - first if first <= 0 else -1))
        begins += chunks
    rank = np.concatenate(ranks)
    slots_valid = np.concatenate(valids).reshape(-1, chunk)
    fold = slots_valid & ~((rank[:, None] == 0) & (np.arange(chunk) < spec.sinks))
    return _Row(
        np.concatenate(sources).reshape(-1, chunk),
        slots_valid,
        fold,
        np.concatenate(numbers),
        rank,
        np.concatenate(sink_chunks),
        count,
    )


def _make_plan(rows: list[_Row], length: int, spec: PlanSpec, device: torch.device) -> Plan:
    """The rows as one set of index tensors, padded to the longest row."""
    chunk = spec.chunk
    chunks = max(len(row.rank) for row in rows)
    shape = (len(rows), chunks)
    source = np.zeros((*shape, chunk), dtype=np.int64)
    valid = np.zeros((*shape, chunk), dtype=bool)
    fold = np.zeros((*shape, chunk), dtype=bool)
    document, rank, sink_chunk = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for r, row in enumerate(rows):
        n = len(row.rank)
        source[r, :n], valid[r, :n], fold[r, :n] = row.source, row.valid, row.fold
        if spec.final:
            # These are near to the next token: folding them would put them into the final state.
            fold[r, max(0, n - 2) :] = False
        for whole, part in ((document, row.document), (rank, row.rank), (sink_chunk, row.sink_chunk)):
            whole[r, :n], whole[r, n:] = part, part[-1]
    offset = 2 * chunk if spec.history else 0
    place = np.zeros((len(rows), length), dtype=np.int64)
    token_valid = np.zeros((len(rows), length), dtype=bool)
    asked = valid & (source >= offset)
    for r in range(len(rows)):
        slots = np.flatnonzero(asked[r])
        tokens = source[r].reshape(-1)[slots] - offset
        place[r, tokens], token_valid[r, tokens] = slots, True

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    full = np.logical_and.reduce(valid, axis=2)
    alike = (rank[:, 1:] > 1) & full[:, 1:] & full[:, :-1] & (document[:, 1:] == document[:, :-1])
    last = np.array([len(row.rank) - 1 for row in rows])
    counts = torch.tensor([row.count for row in rows])
    return Plan(
        put(source.reshape(len(rows), -1)),
        put(valid),
        put(asked),
        put(fold),
        put(document),
        put(rank),
        put(sink_chunk),
        put(last),
        put(place),
        put(token_valid),
        counts,
        identity=len(rows) == 1 and bool(token_valid.all()) and bool((place[0] == np.arange(length)).all()),
        regular=(False, *np.logical_and.reduce(alike, axis=0).tolist()),
    )


@functools.lru_cache(maxsize=16)
def _plain_plan(length: int, spec: PlanSpec, seen: int, device: torch.device) -> Plan:
    """The plan of rows that are all alike; the same for every layer, and often for the next batch."""
    return _make_plan([_align_row([np.arange(length)], seen, spec)], length, spec, device)
