"""One token of each of many sequences, computed where their states lie: no page is copied.

`ops.recurrent` is the same step on tables of its own; its definitions of what a token sees and of the sums are used
here. Steps that end a chunk, in which a state changes as a whole, are left to the operator.
"""

from collections.abc import Sequence

import torch

from hf_rfa.ops.combine import Part, combine
from hf_rfa.ops.kept_keys import least_distance
from hf_rfa.ops.recurrent import seen_slots
from hf_rfa.vllm.linear_part import LinearPart
from hf_rfa.vllm.pages import HeadPages


def decodes_in_place(part: LinearPart, count: int) -> bool:
    """Whether `decode` can compute token number `count` of a sequence."""
    window = part.settings.window
    return window > 0 and count > 0 and (count + 1) % window != 0 and part.kernel.gate_weight is None


def decode(
    part: LinearPart, tokens: tuple[torch.Tensor, ...], counts: Sequence[int], heads: Sequence[HeadPages],
    places: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The output (B, Hk, G, M) for one more token of B sequences; it is written into their pages.

    Args:
        tokens: q (B, Hk, G, D), k (B, Hk, D), v (B, Hk, M), float32.
        counts: Tokens of each sequence before this one.
        heads: The pages of each head.
        places: For each head (B,) int64, the page of each sequence.
    """
    query, key, value = tokens
    layout, settings, device = part.layout, part.settings, query.device
    window, sinks, kept = layout.window, layout.sinks, layout.kept
    _write(layout.kept + sinks + window, window, sinks, kept, (key, value), counts, heads, places)
    first, end = zip(*(seen_slots(count, window, sinks, kept) for count in counts), strict=True)
    low, high = min(first), max(end)
    slots = torch.arange(low, high, device=device)
    visible = (slots >= _column(first, device)) & (slots < _column(end, device))

    features, log_scale = part.features(query, settings.scaling)
    scores = query.new_empty(*query.shape[:3], high - low)
    products = query.new_empty(*query.shape[:3], value.shape[-1] + 1)
    scaled = query * settings.scaling
    pairs = [(row, head) for head in range(len(heads)) for row in range(len(counts))]
    pages = [place.tolist() for place in places]
    for row, head in pairs:
        page = pages[head][row]
        torch.mm(scaled[row, head], _wide(heads[head].key[page, low:high]).mT, out=scores[row, head])
        torch.mm(features[row, head], heads[head].sums[page], out=products[row, head])
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    highest = scores.amax(-1)
    weights = (scores - highest.unsqueeze(-1)).exp()
    sums = query.new_empty(*query.shape[:3], value.shape[-1])
    for row, head in pairs:
        torch.mm(weights[row, head], _wide(heads[head].value[pages[head][row], low:high]), out=sums[row, head])
    near = Part(sums, weights.sum(-1), highest)
    log_max = torch.stack([head.log_max[place] for head, place in zip(heads, places, strict=True)], dim=1)
    log_scale = log_scale + (log_max + part.log_gamma).unsqueeze(-1)
    far = Part(products[..., :-1], products[..., -1], log_scale)
    if kept:
        counted = slots < _column([stop - least_distance(window) for stop in end], device)
        given = (weights / near.denominator.unsqueeze(-1)).masked_fill(~counted[:, None, None], 0.0)
        _receive(given, low, kept, sinks, heads, places)
    return combine(near, far, log_limit=part.log_limit)


def _write(
    own: int, window: int, sinks: int, kept: int, new: tuple[torch.Tensor, torch.Tensor], counts: Sequence[int],
    heads: Sequence[HeadPages], places: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    """Write the tokens to their places among the near keys, and among the sinks where they are the first ones."""
    device = new[0].device
    slots = torch.tensor([own + count % window for count in counts], device=device)
    first = [row for row, count in enumerate(counts) if count < sinks]
    sink_slots = torch.tensor([kept + counts[row] for row in first], device=device)
    for number, (head, place) in enumerate(zip(heads, places, strict=True)):
        for table, tokens in zip((head.key, head.value), new, strict=True):
            table[place, slots] = tokens[:, number].to(table.dtype)
            if first:
                table[place[first], sink_slots] = tokens[first, number].to(table.dtype)


def _receive(
    given: torch.Tensor, low: int, kept: int, sinks: int, heads: Sequence[HeadPages], places: Sequence[torch.Tensor]
) -> None:
    """Add the attention (B, Hk, G, slots from `low` on) to the mass of the kept and the near keys."""
    for number, (head, place) in enumerate(zip(heads, places, strict=True)):
        assert head.mass is not None
        mass = head.mass[place]
        of_kept, of_near = given[:, number, :, : max(0, kept - low)], given[:, number, :, max(0, kept + sinks - low) :]
        start = max(kept, low - sinks)
        mass[..., low:kept] += of_kept
        mass[..., start : start + of_near.shape[-1]] += of_near
        head.mass[place] = mass


def _wide(table: torch.Tensor) -> torch.Tensor:
    return table if table.dtype == torch.float32 else table.float()


def _column(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, device=device).unsqueeze(-1)
