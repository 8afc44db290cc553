"""The running batch: the rows of one cache, which sequences join and leave between two steps."""

from collections.abc import Sequence as Several

import torch
from transformers.cache_utils import Cache

from hf_rfa.runtime.cache import cache_bytes
from hf_rfa.serving.model import ServedModel
from hf_rfa.serving.sequence import Sequence


class Batch:
    """Sequences whose next tokens are computed together.

    Attributes:
        rows: The sequences, in the order of the cache's rows.
        bytes: Of the cache, when a sequence last joined or left.
    """

    def __init__(self, model: ServedModel) -> None:
        self.rows: list[Sequence] = []
        self.bytes = 0
        self._model = model
        self._cache: Cache | None = None

    def step(self) -> torch.Tensor:
        """Logits (B, V) after the newest token of each row. After an error the batch is of no use, see `clear`."""
        assert self._cache is not None
        logits = self._model.decode(
            self._cache, [row.tokens[-1] for row in self.rows], [row.seen for row in self.rows]
        )
        for row in self.rows:
            row.seen += 1
        return logits

    def join(self, sequences: Several[Sequence]) -> None:
        """Add sequences, whose caches become rows of the batch's own. After an error the batch is as it was."""
        caches = [sequence.cache for sequence in sequences if sequence.cache is not None]
        assert len(caches) == len(sequences)
        joined = self._model.stack(caches if self._cache is None else [self._cache, *caches])
        self._cache, self.bytes = joined, cache_bytes(joined)
        self.rows += sequences
        for sequence in sequences:
            sequence.cache = None

    def leave(self, sequences: Several[Sequence]) -> None:
        """Drop sequences and their rows of the cache."""
        gone = {id(sequence) for sequence in sequences}
        stay = [number for number, row in enumerate(self.rows) if id(row) not in gone]
        if not stay:
            self.clear()
        elif len(stay) < len(self.rows):
            assert self._cache is not None
            self.rows = [self.rows[number] for number in stay]
            self._model.keep(self._cache, stay, max(row.seen for row in self.rows))
            self.bytes = cache_bytes(self._cache)

    def clear(self) -> list[Sequence]:
        """Drop all rows and the cache, and return the sequences."""
        rows, self.rows, self._cache, self.bytes = self.rows, [], None, 0
        return rows
