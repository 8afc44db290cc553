"""A page: what one linear key head remembers of one sequence, as a row of float32 numbers of constant length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hf_rfa.ops.state import RFAState

#: Bytes of the unit in which pages are measured.
WORD = 4


@dataclass(frozen=True)
class PageLayout:
    """Where the fields of a head's `RFAState` lie in a page.

    Attributes:
        components: F, the length of psi.
        dim, value_dim: D and M.
        window, sinks, kept: C, s and K.
        groups: G, the query heads of the key head.
        dtype: Of the exact keys and values; everything else is float32, positions are int32.
    """

    components: int
    dim: int
    value_dim: int
    window: int
    sinks: int
    kept: int
    groups: int
    dtype: torch.dtype

    @cached_property
    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, slice]]:
        """Shape, type and place (in words) of each field, by its name in `RFAState`."""
        near, kept, wide = 2 * self.window, self.kept, torch.float32
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "kv_state": ((self.components, self.value_dim + 1), wide),
            "log_max": ((), wide),
        }
        if kept:
            shapes |= {
                "kept_position": ((kept,), torch.int32),
                "kept_decay": ((kept,), wide),
                "mass": ((self.groups, kept + near), wide),
            }
        for name, dim in (("key", self.dim), ("value", self.value_dim)):
            if kept:
                shapes[f"kept_{name}"] = ((kept, dim), self.dtype)
            shapes[f"sink_{name}"] = ((self.sinks, dim), self.dtype)
            shapes[f"near_{name}"] = ((near, dim), self.dtype)
        placed: dict[str, tuple[tuple[int, ...], torch.dtype, slice]] = {}
        start = 0
        for field, (shape, dtype) in shapes.items():
            stop = start + -(-math.prod(shape) * dtype.itemsize // WORD)
            placed[field] = shape, dtype, slice(start, stop)
            start = stop
        return placed

    @property
    def words(self) -> int:
        """Length of the page in words of 4 bytes."""
        return max(place.stop for _, _, place in self.fields.values())

    @cached_property
    def empty(self) -> torch.Tensor:
        """The page (words,) of a sequence that has not begun."""
        page = torch.zeros(self.words)
        page[self.fields["log_max"][2]] = -torch.inf
        if self.kept:
            page[self.fields["kept_position"][2]].view(torch.int32).fill_(-1)
        return page

    def state(self, pages: torch.Tensor, counts: Sequence[int]) -> RFAState:
        """The state of B sequences after `counts` tokens, from pages (B, Hk, >= words); views where they can be."""
        parts: dict[str, Any] = {name: self.field(pages, name) for name in self.fields}
        if self.kept:
            parts["kept_position"] = parts["kept_position"].long()
        return RFAState(**parts, count=torch.tensor(counts))

    def pages(self, state: RFAState) -> torch.Tensor:
        """Pages (B, Hk, words) of the state."""
        pages = state.kv_state.new_empty(*state.log_max.shape, self.words, dtype=torch.float32)
        for name in self.fields:
            self.field(pages, name).copy_(getattr(state, name))
        return pages

    def table(self, pages: torch.Tensor, name: str) -> torch.Tensor:
        """The exact "key"s or "value"s (pages, K + s + 2C, D or M) of all pages: kept, sinks, the two last chunks."""
        first = self.fields[f"kept_{name}" if self.kept else f"sink_{name}"][2].start
        place = slice(first, self.fields[f"near_{name}"][2].stop)
        dim = self.dim if name == "key" else self.value_dim
        return self._view(pages, self.dtype, place, (self.kept + self.sinks + 2 * self.window, dim))

    def field(self, pages: torch.Tensor, name: str) -> torch.Tensor:
        """A field of all pages, a view."""
        shape, dtype, place = self.fields[name]
        return self._view(pages, dtype, place, shape)

    @staticmethod
    def _view(pages: torch.Tensor, dtype: torch.dtype, place: slice, shape: tuple[int, ...]) -> torch.Tensor:
        part = pages[..., place]
        part = part if dtype == torch.float32 else part.view(dtype)
        part = part[..., : math.prod(shape)]
        return part.unflatten(-1, shape) if shape else part.squeeze(-1)


class HeadPages:
    """The pages of one head, and views of what a decoding step reads and writes in them.

    Attributes:
        pages: (number of pages, words or more) float32.
        key, value: (pages, K + s + 2C, D or M), see `PageLayout.table`.
        sums: (pages, F, M + 1); log_max (pages,).
        mass: (pages, G, K + 2C); None without kept keys.
    """

    def __init__(self, pages: torch.Tensor, layout: PageLayout) -> None:
        self.pages = pages
        self.key, self.value = layout.table(pages, "key"), layout.table(pages, "value")
        self.sums, self.log_max = layout.field(pages, "kv_state"), layout.field(pages, "log_max")
        self.mass = layout.field(pages, "mass") if layout.kept else None
