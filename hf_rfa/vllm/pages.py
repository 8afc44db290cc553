"""A page: what one linear key head remembers of one sequence, as a row of float32 numbers of constant length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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
        placed, start = {}, 0
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
        parts = {}
        for name, (shape, dtype, place) in self.fields.items():
            parts[name] = self._view(pages, dtype, place, shape)
        if self.kept:
            parts["kept_position"] = parts["kept_position"].long()
        return RFAState(**parts, count=torch.tensor(counts))

    def pages(self, state: RFAState) -> torch.Tensor:
        """Pages (B, Hk, words) of the state."""
        pages = state.kv_state.new_empty(*state.log_max.shape, self.words, dtype=torch.float32)
        for name, (shape, dtype, place) in self.fields.items():
            self._view(pages, dtype, place, shape).copy_(getattr(state, name))
        return pages

    def _view(
        self, pages: torch.Tensor, dtype: torch.dtype, place: slice, shape: tuple[int, ...]
    ) -> torch.Tensor:  # fmt: skip
        part = pages[..., place]
        part = part if dtype == torch.float32 else part.view(dtype)
        part = part[..., : math.prod(shape)]
        return part.unflatten(-1, shape) if shape else part.squeeze(-1)
