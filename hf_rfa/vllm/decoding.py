"""One token of each of many sequences, computed from where their states lie: what changes is written, no page is.

`ops.recurrent` is the same step on tables of its own; its definitions of what a token sees and of the sums are used
here. Steps that end a chunk, in which a state changes as a whole, are left to the operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_rfa.ops.combine import Part, combine
from hf_rfa.ops.kept_keys import least_distance
from hf_rfa.ops.recurrent import seen_slots
from hf_rfa.vllm.linear_part import LinearPart
from hf_rfa.vllm.pages import HeadPages, PageLayout


def decodes_in_place(part: LinearPart, count: int) -> bool:
    """Whether `decode` can compute token number `count` of a sequence."""
    window = part.settings.window
    return window > 0 and count > 0 and (count + 1) % window != 0 and part.kernel.gate_weight is None


@dataclass(frozen=True)
class Slots:
    """Which slots of their tables B sequences see in a step; the same for all layers with such tables.

    Attributes:
        low, high: All of them see slots of this range only.
        hidden: (B, 1, high - low) bool, which of these a sequence does not see; None if each sees all.
        uncounted: The same for those to which the attention is not counted; None without kept keys.
        own: (B,) int64, the slot of the new token.
        first: The rows whose token is among the sinks.
        sink: (first,) int64, the slots of these.
    """

    low: int
    high: int
    hidden: torch.Tensor | None
    uncounted: torch.Tensor | None
    own: torch.Tensor
    first: list[int]
    sink: torch.Tensor

    @classmethod
    def of(cls, layout: PageLayout, counts: Sequence[int], device: torch.device) -> "Slots":
        """For sequences that have seen `counts` tokens before this one."""
        window, sinks, kept = layout.window, layout.sinks, layout.kept
        first, end = zip(*(seen_slots(count, window, sinks, kept) for count in counts), strict=True)
        low, high = min(first), max(end)
        slots = torch.arange(low, high)
        hidden = uncounted = None
        if min(end) < high or max(first) > low:
            hidden = ((slots < _column(first)) | (slots >= _column(end))).unsqueeze(1).to(device)
        if kept:
            counted = slots < _column([stop - least_distance(window) for stop in end])
            uncounted = ~counted.unsqueeze(1).to(device)
        own = torch.tensor([kept + sinks + window + count % window for count in counts], device=device)
        early = [row for row, count in enumerate(counts) if count < sinks]
        sink = torch.tensor([kept + counts[row] for row in early], device=device)
        return cls(low, high, hidden, uncounted, own, early, sink)


def decode(
    part: LinearPart, tokens: tuple[torch.Tensor, ...], slots: Slots, heads: Sequence[HeadPages],
    places: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The output (B, Hk, G, M) for one more token of B sequences; it is written into their pages.

    Args:
        tokens: q (B, Hk, G, D), k (B, Hk, D), v (B, Hk, M), float32.
        slots: What the sequences see.
        heads: The pages of each head.
        places: For each head (B,) int64, the page of each sequence.
    """
    query, key, value = tokens
    low, high, kept = slots.low, slots.high, part.layout.kept
    _write(slots, (key, value), heads, places)
    features, log_scale = (x.transpose(0, 1) for x in part.features(query, part.settings.scaling))
    scaled = (query * part.settings.scaling).transpose(0, 1)  # (Hk, B, G, D), as all that follows
    size = scaled.shape[:3]
    scores, products = query.new_empty(*size, high - low), query.new_empty(*size, value.shape[-1] + 1)
    for number, (head, place) in enumerate(zip(heads, places, strict=True)):
        torch.bmm(scaled[number], _rows(head.key[:, low:high], place).mT, out=scores[number])
        torch.bmm(features[number], _rows(head.sums, place), out=products[number])
    if slots.hidden is not None:
        scores = scores.masked_fill(slots.hidden, -torch.inf)
    highest = scores.amax(-1)
    weights = (scores - highest.unsqueeze(-1)).exp()
    sums = query.new_empty(*size, value.shape[-1])
    for number, (head, place) in enumerate(zip(heads, places, strict=True)):
        torch.bmm(weights[number], _rows(head.value[:, low:high], place), out=sums[number])
    near = Part(sums, weights.sum(-1), highest)
    log_max = torch.stack([head.log_max[place] for head, place in zip(heads, places, strict=True)])
    far = Part(products[..., :-1], products[..., -1], log_scale + (log_max + part.log_gamma[:, None]).unsqueeze(-1))
    if slots.uncounted is not None:
        given = (weights / near.denominator.unsqueeze(-1)).masked_fill(slots.uncounted, 0.0)
        _receive(given, low, kept, part.layout.sinks, heads, places)
    limit = None if part.log_limit is None else part.log_limit.unsqueeze(-1)
    return combine(near, far, log_limit=limit).transpose(0, 1)


def _rows(table: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """The rows (B, ...) of a table (pages, ...), float32: copied once, which costs less than a product for each."""
    return table.index_select(0, place).float()


def _write(
    slots: Slots, new: tuple[torch.Tensor, torch.Tensor], heads: Sequence[HeadPages], places: Sequence[torch.Tensor]
) -> None:
    """Write the tokens to their places among the near keys, and among the sinks where they are the first ones."""
    first = slots.first
    for number, (head, place) in enumerate(zip(heads, places, strict=True)):
        for table, tokens in zip((head.key, head.value), new, strict=True):
            table[place, slots.own] = tokens[:, number].to(table.dtype)
            if first:
                table[place[first], slots.sink] = tokens[first, number].to(table.dtype)


def _receive(
    given: torch.Tensor, low: int, kept: int, sinks: int, heads: Sequence[HeadPages], places: Sequence[torch.Tensor]
) -> None:
    """Add the attention (Hk, B, G, slots from `low` on) to the mass of the kept and the near keys."""
    for number, (head, place) in enumerate(zip(heads, places, strict=True)):
        assert head.mass is not None
        mass = head.mass[place]
        of_kept, of_near = given[number, :, :, : max(0, kept - low)], given[number, :, :, max(0, kept + sinks - low) :]
        start = max(kept, low - sinks)
        mass[..., low:kept] += of_kept
        mass[..., start : start + of_near.shape[-1]] += of_near
        head.mass[place] = mass


def _column(numbers: Sequence[int]) -> torch.Tensor:
    return torch.tensor(numbers).unsqueeze(-1)
