"""Short documents in tiles: many documents side by side, since each alone would waste most of a chunk.

A tile is a row of T slots. Documents of at most T tokens and more than T / 2 (of any length, if T is the least) fill
the tiles of size T in order, and none crosses a border, so that each document lies within one tile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_rfa.ops.documents import Documents

#: Slots of the smallest tile: even smaller tiles would make the products smaller, but save no time.
SMALLEST_TILE = 32
#: Slots of the tiles in one block: their data, over all heads, must fit into a CPU's cache. A GPU takes many times as
#: many, so that the products fill it.
BLOCK_SLOTS, TIMES_ON_GPU = 1024, 8


@dataclass(frozen=True)
class ShortRule:
    """Which documents are short.

    Args:
        longest: The largest number of tokens of a short document.
        first, last: Whether a row's first and last document may be short: not if one continues a state, or leaves one.
    """

    longest: int
    first: bool = True
    last: bool = True

    def apply(self, documents: Documents) -> np.ndarray:
        """(d,) bool: which documents are short."""
        short = (documents.length > 0) & (documents.length <= self.longest)
        if not self.first:
            short &= documents.number > 0
        return short if self.last else short & ~documents.last


@dataclass(frozen=True)
class Tiles:
    """The tiles of one size.

    Attributes:
        source: (t, T) row * N + slot of the token in each slot; for empty slots, that of another token in the tile.
        target: (t, T) the same, but B * N for empty slots.
        segment_ids: (t, T) number of the token's document; -1 for empty slots.
    """

    source: torch.Tensor
    target: torch.Tensor
    segment_ids: torch.Tensor

    def split(self) -> "list[Tiles]":
        """The tiles in blocks of a few each."""
        slots = BLOCK_SLOTS if self.source.device.type == "cpu" else TIMES_ON_GPU * BLOCK_SLOTS
        count = max(1, slots // self.source.shape[1])
        parts = zip(*(x.split(count) for x in (self.source, self.target, self.segment_ids)), strict=True)
        return [Tiles(*part) for part in parts]

    def visible(self, causal: bool) -> torch.Tensor:
        """(t, T, T) bool: whether a slot's query sees a slot's key. Empty slots see only each other."""
        same = self.segment_ids.unsqueeze(2) == self.segment_ids.unsqueeze(1)
        return same.tril() if causal else same


@dataclass(frozen=True)
class ShortPlan:
    """Layout of the short documents of a batch in tiles.

    Attributes:
        tiles: The tiles of each size, ascending.
        everything: Whether all tokens belong to short documents.
    """

    tiles: tuple[Tiles, ...]
    everything: bool


def short_plan(documents: Documents, rule: ShortRule, device: torch.device) -> ShortPlan | None:
    """The short documents of a batch in tiles; None if there are none."""
    short = rule.apply(documents)
    if not short.any():
        return None
    others = bool((documents.length[~short] > 0).any())
    tiles, size, smaller = [], SMALLEST_TILE, 0
    while smaller < rule.longest:
        size = min(size, rule.longest)
        which = short & (documents.length > smaller) & (documents.length <= size)
        if which.any():
            tiles.append(_tiles(documents, which, size, device))
        smaller, size = size, 2 * size
    return ShortPlan(tuple(tiles), not others)


def _tiles(documents: Documents, which: np.ndarray, size: int, device: torch.device) -> Tiles:
    lengths = documents.length[which]
    start = np.array(_next_fit(lengths.tolist(), size))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(owner)) - np.repeat(lengths.cumsum() - lengths, lengths)
    slot = start[owner] + place
    token = documents.token[documents.begin[which][owner] + place]
    count = int(start[-1]) // size + 1
    nothing = documents.rows * documents.slots
    target = np.full(count * size, nothing)
    segment_ids = np.full(count * size, -1)
    target[slot], segment_ids[slot] = token, owner
    tiles = target.reshape(count, size)
    source = np.where(tiles == nothing, tiles[:, :1], tiles)  # the first slot of a tile is never empty
    return Tiles(*(torch.from_numpy(x).to(device) for x in (source, tiles, segment_ids.reshape(count, size))))


def _next_fit(lengths: list[int], size: int) -> list[int]:
    """The first slot of each document in turn: in the tile of the previous document if it fits."""
    starts, end = [], 0
    for length in lengths:
        if end % size + length > size:
            end = -(-end // size) * size
        starts.append(end)
        end += length
    return starts


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, Hk, N, D) -> (B * N * Hk, D)."""
    return x.transpose(1, 2).reshape(-1, x.shape[-1])


def zero_rows(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros (B, Hk, N, D), and the (B * N + 1) * Hk rows that they are a view of, the last ones for empty slots."""
    batch, heads, length, dim = shape
    whole = like.new_zeros((batch * length + 1) * heads, dim, dtype=dtype)
    return whole, whole[:-heads].view(batch, length, heads, dim).transpose(1, 2)


def rows_of_heads(index: torch.Tensor, heads: int) -> torch.Tensor:
    """The row numbers (t, Hk, T) of tokens (t, T) for every key head."""
    return index.unsqueeze(1) * heads + torch.arange(heads, device=index.device)[:, None]


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows (t, Hk, T, D) at `index` (t, Hk, T) of rows (n, D)."""
    return rows.index_select(0, index.flatten()).view(*index.shape, rows.shape[1])


def put_rows(whole: torch.Tensor, x: torch.Tensor, tiles: Tiles) -> None:
    """Write x (t, Hk, T, D), or (t, Hk, T * G, D) with the queries of a group side by side, to its tokens' rows."""
    index = rows_of_heads(tiles.target, x.shape[1])
    whole.index_copy_(0, index.flatten(), x.reshape(index.numel(), -1).to(whole.dtype))


def taken_blocks(
    plan: ShortPlan, rows: Sequence[torch.Tensor], heads: int
) -> Iterator[tuple[Tiles, list[torch.Tensor]]]:
    """Blocks of a few tiles, and their rows (t, Hk, T, D) of all `rows` (n, D); differentiable."""
    for tiles in plan.tiles:
        # All at once: the gradient of one part would be as long as the whole.
        taken = [take_rows(x, rows_of_heads(tiles.source, heads)) for x in rows]
        parts = tiles.split()
        pieces = (x.split([len(part.source) for part in parts]) for x in taken)
        yield from ((part, list(own)) for part, *own in zip(parts, *pieces, strict=True))


def put_blocks(blocks: Sequence[tuple[Tiles, torch.Tensor]], shape: tuple[int, ...]) -> torch.Tensor:
    """(B, Hk, G, N, M) = `shape`, zero except where blocks (t, Hk, T * G, M) fill it; differentiable."""
    batch, heads, groups, length, dim = shape
    target = torch.cat([rows_of_heads(tiles.target, heads).flatten() for tiles, _ in blocks])
    answers = torch.cat([answer.reshape(-1, groups * dim) for _, answer in blocks])
    whole = answers.new_zeros((batch * length + 1) * heads, groups * dim).index_copy(0, target, answers)
    return whole[:-heads].view(batch, length, heads, groups, dim).permute(0, 2, 3, 1, 4)
