"""Tables on the CPU of which tokens of a batch belong to which document; layouts are planned from them."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Documents:
    """The documents of a batch in order, row by row; a row without tokens has one empty document.

    Attributes:
        rows: B.
        slots: N, slots of a row, padding included.
        token: (T,) row * N + slot of every token, document by document; padding is left out.
        row: (d,) the row of each document.
        number: (d,) its number within the row, from 0.
        begin: (d,) its first entry in `token`.
        length: (d,) its number of tokens.
        last: (d,) whether it is the last one of its row.
    """

    rows: int
    slots: int
    token: np.ndarray
    row: np.ndarray
    number: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    last: np.ndarray

    @classmethod
    def find(cls, rows: int, slots: int, token_mask: np.ndarray | None, segment_ids: np.ndarray | None) -> "Documents":
        """The documents given by `token_mask` (B, N) bool and `segment_ids` (B, N), which differ between neighbours.

        Without a mask there is no padding; without segment ids there is one document per row.
        """
        token = np.arange(rows * slots) if token_mask is None else np.flatnonzero(token_mask)
        row = token // slots
        begins = np.ones(len(token), dtype=bool)
        begins[1:] = row[1:] != row[:-1]
        if segment_ids is not None:
            number = segment_ids.reshape(-1)[token]
            begins[1:] |= number[1:] != number[:-1]
        begin = np.flatnonzero(begins)
        return cls._of(rows, slots, token, row[begin], begin, np.diff(begin, append=len(token)))

    @classmethod
    def _of(
        cls, rows: int, slots: int, token: np.ndarray, row: np.ndarray, begin: np.ndarray, length: np.ndarray
    ) -> "Documents":
        missing = np.flatnonzero(np.bincount(row, minlength=rows) == 0)
        if len(missing):
            order = np.argsort(np.concatenate([row, missing]), kind="stable")
            nothing = np.zeros(len(missing), dtype=np.int64)
            row = np.concatenate([row, missing])[order]
            begin, length = (np.concatenate([x, nothing])[order] for x in (begin, length))
        first = np.ones(len(row), dtype=bool)
        first[1:] = row[1:] != row[:-1]
        number = np.arange(len(row)) - np.flatnonzero(first)[row]
        return cls(rows, slots, token, row, number, begin, length, np.append(first[1:], True))

    def select(self, which: np.ndarray) -> "Documents":
        """The documents `which` (d,) bool, with their present numbers; rows left without one get an empty document,
        number 0."""
        row, begin, length = self.row[which], self.begin[which], self.length[which]
        some = Documents._of(self.rows, self.slots, self.token, row, begin, length)
        numbers = some.number.copy()
        numbers[np.isin(some.row, row)] = self.number[which]
        return Documents(**{**vars(some), "number": numbers})

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The first slot of each token's document (B, N), 0 for a row's first one, and that behind its last (B, N).

        For padding they enclose the slot itself.
        """
        first = np.tile(np.arange(self.slots), self.rows)
        stop = first + 1
        filled = self.length > 0
        owner = np.repeat(np.arange(np.count_nonzero(filled)), self.length[filled])
        begin, end = self.begin[filled], self.begin[filled] + self.length[filled]
        token = self.tokens()
        first[token] = np.where(self.number[filled] == 0, 0, self.token[begin] % self.slots)[owner]
        stop[token] = (self.token[end - 1] % self.slots + 1)[owner]
        return first.reshape(self.rows, -1), stop.reshape(self.rows, -1)

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """(document, position in it) of every token, document by document."""
        owner = np.repeat(np.arange(len(self.length)), self.length)
        return owner, np.arange(len(owner)) - np.repeat(self.length.cumsum() - self.length, self.length)

    def tokens(self) -> np.ndarray:
        """row * N + slot of the tokens, in the order of `entries`."""
        owner, place = self.entries()
        return self.token[self.begin[owner] + place]
