"""Batches of long documents: packed with a reset at each border, or cut with the state carried over.

Nothing leaks between documents: a packed token sees only its own document (`position_ids` start again, by which
Transformers and hf_rfa tell documents apart), a row starts each document with an empty state, and no target lies in
another document.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rfa.errors import ConfigError

#: The target of a position that predicts nothing.
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Token ids and the target of each position.

    Attributes:
        input_ids: (batch, seq) int64.
        targets: (batch, seq) int64, the token after each one, `IGNORED` where there is none.
        position_ids: (batch, seq) int64, position of each token in its document; None for 0, 1, 2, ...
        fresh: (batch,) bool, rows that begin a document; the others continue the same row of the batch before (in the
            same lane). None if nothing is carried.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None = None
    fresh: Tensor | None = None

    @classmethod
    def of(cls, batch: "Tensor | Batch") -> "Batch":
        """Plain token ids (batch, seq) as a batch whose rows predict their own next tokens."""
        if isinstance(batch, Batch):
            return batch
        return cls(batch, torch.cat([batch[:, 1:], torch.full_like(batch[:, :1], IGNORED)], dim=1))


def packed_batches(token_lists: Iterable[Tensor], context: int, batch_size: int, seed: int = 0) -> Iterator[Batch]:
    """Endless batches (batch_size, context) in which documents follow each other and do not see each other.

    A document that reaches the end of a row continues in the next one without its past. A list is shuffled again for
    each pass (`seed`); any other iterable is read in its own order, again and again.

    Raises:
        ConfigError: `context` or `batch_size` out of range, or no document with two tokens.

    Example:
        >>> batch = next(packed_batches([torch.arange(3), torch.arange(10, 14)], context=7, batch_size=1))
        >>> batch.position_ids.tolist() in ([[0, 1, 2, 0, 1, 2, 3]], [[0, 1, 2, 3, 0, 1, 2]])
        True
    """
    _check(context, batch_size)
    return _pack(_endless(token_lists, seed), context, batch_size)


def _pack(documents: Iterator[Tensor], context: int, batch_size: int) -> Iterator[Batch]:
    rest: Tensor | None = None
    while True:
        rows = []
        for _ in range(batch_size):
            pieces: list[tuple[Tensor, Tensor, Tensor]] = []
            room = context
            while room:
                ids = next(documents) if rest is None else rest
                taken = min(room, len(ids))
                after = torch.cat([ids[1 : taken + 1], ids.new_full((max(0, taken + 1 - len(ids)),), IGNORED)])
                pieces.append((ids[:taken], after, torch.arange(taken)))
                rest = ids[taken:] if taken < len(ids) else None
                room -= taken
            rows.append([torch.cat(part) for part in zip(*pieces, strict=True)])
        yield Batch(*(torch.stack(part) for part in zip(*rows, strict=True)))


def carried_batches(
    token_lists: Iterable[Tensor], context: int, batch_size: int, seed: int = 0, lanes: int = 1
) -> Iterator[Batch]:
    """Endless batches for truncated backpropagation: each row walks through one document after the other.

    A document of N tokens becomes ceil(N / context) pieces in consecutive batches of its row. Each piece starts from
    the state after the one before (`hf_rfa.training.carry`), so that memory does not depend on N. The last piece is
    padded with tokens that predict nothing and that no token sees.

    Args:
        lanes: Batches per optimiser step (`FinetuneConfig.batches_per_step`). Batch i continues batch i - lanes, so
            that the batches of a step do not depend on the number of processes that share the lanes.

    Example:
        >>> first, second = itertools.islice(carried_batches([torch.arange(6)], context=4, batch_size=1), 2)
        >>> first.fresh.tolist(), second.fresh.tolist(), second.input_ids[0, :2].tolist()
        ([True], [False], [4, 5])
    """
    _check(context, batch_size)
    if lanes < 1:
        raise ConfigError(f"`lanes` must be at least 1. Got {lanes}. Set it to `batches_per_step`.")
    return _carry(_endless(token_lists, seed), context, batch_size, lanes)


def _carry(documents: Iterator[Tensor], context: int, batch_size: int, lanes: int) -> Iterator[Batch]:
    places: list[list[tuple[Tensor, int]]] = [[(torch.empty(0), 0)] * batch_size for _ in range(lanes)]
    for lane in itertools.cycle(places):
        rows = []
        for row, (ids, begin) in enumerate(lane):
            fresh = begin >= len(ids)
            if fresh:
                ids, begin = next(documents), 0
            piece = ids[begin : begin + context]
            after = ids[begin + 1 : begin + context + 1]
            filled, targets = ids.new_zeros(context), ids.new_full((context,), IGNORED)
            filled[: len(piece)], targets[: len(after)] = piece, after
            rows.append((filled, targets, begin + torch.arange(context), torch.tensor(fresh)))
            # A last token alone would have nothing to predict.
            lane[row] = (ids, len(ids) if begin + context >= len(ids) - 1 else begin + context)
        yield Batch(*(torch.stack(part) for part in zip(*rows, strict=True)))


def _endless(token_lists: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
    """Documents of two tokens or more, endlessly."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order: Iterable[Tensor] = token_lists
        if isinstance(token_lists, Sequence):
            order = [token_lists[i] for i in torch.randperm(len(token_lists), generator=generator).tolist()]
        found = False
        for ids in order:
            if len(ids) > 1:
                found = True
                yield ids
        if not found:
            raise ConfigError(
                "No document has two tokens, one to see and one to predict. Pass documents with text in them."
            )


def _check(context: int, batch_size: int) -> None:
    if context < 2 or batch_size < 1:
        raise ConfigError(
            f"`context` must be at least 2 and `batch_size` at least 1. Got {context} and {batch_size}. Set, for "
            "example, 2048 and 4."
        )
