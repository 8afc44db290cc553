"""The linear heads of a step: sequences that decode in their pages, the others by the operator."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hf_rfa.ops.attention import attend
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.vllm.decoding import Slots, decode, decodes_in_place
from hf_rfa.vllm.linear_part import LinearPart
from hf_rfa.vllm.pages import HeadPages, PageLayout

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """The sequences of a step, their tokens one behind the other.

    Attributes:
        starts: The first token of each sequence among those of the step.
        lengths: The number of its tokens in the step; 0 for a place that is not used.
        seen: The number of its tokens before the step.
    """

    starts: Sequence[int]
    lengths: Sequence[int]
    seen: Sequence[int]
    _slots: dict[PageLayout, Slots] = field(default_factory=dict, init=False, repr=False, compare=False)

    def slots(self, layout: PageLayout, rows: Sequence[int], device: torch.device) -> Slots:
        """What the sequences that decode see, the `rows` with the same layout in every layer: found once."""
        if layout not in self._slots:
            self._slots[layout] = Slots.of(layout, [self.seen[row] for row in rows], device)
        return self._slots[layout]


def advance(
    part: LinearPart, tokens: Tokens, output: torch.Tensor, step: Step, heads: Sequence[HeadPages],
    places: Sequence[torch.Tensor],
) -> None:  # fmt: skip
    """Write the output of a part's heads for the tokens of a step, and their pages.

    Args:
        tokens: q (T, Hk, G, D), k (T, Hk, D), v (T, Hk, M) of these heads.
        output: (T, Hk, G, M), written in place.
        heads: The pages of each head.
        places: (sequences,) int64, which page each sequence has there.
    """
    single = [row for row, length in enumerate(step.lengths) if length == 1]
    inside = [row for row in single if decodes_in_place(part, step.seen[row])]
    if len(inside) == len(step.lengths):  # nothing to be picked out
        own = tuple(x[: len(inside)].float() for x in tokens)
        output[: len(inside)] = decode(part, own, step.slots(part.layout, inside, output.device), heads, places)
        return
    if inside:
        index = torch.tensor([step.starts[row] for row in inside], device=output.device)
        own = tuple(x.index_select(0, index).float() for x in tokens)
        slots = step.slots(part.layout, inside, output.device)
        output[index] = decode(part, own, slots, heads, [place[inside] for place in places]).to(output.dtype)
    picked = set(inside)
    others = [row for row in single if row not in picked]
    if others:
        index = torch.tensor([step.starts[row] for row in others], device=output.device)
        query, key, value = (x.index_select(0, index).unsqueeze(-2) for x in tokens)
        answers = _attend(part, (query.flatten(1, 2), key, value), step, others, heads, places)
        output[index] = answers.squeeze(2).unflatten(1, output.shape[1:3])
    for row, (start, length) in enumerate(zip(step.starts, step.lengths, strict=True)):
        if length > 1:
            query, key, value = (x[start : start + length].movedim(0, -2).unsqueeze(0) for x in tokens)
            answers = _attend(part, (query.flatten(1, 2), key, value), step, [row], heads, places)
            output[start : start + length] = answers[0].movedim(1, 0).unflatten(1, output.shape[1:3])


def _attend(
    part: LinearPart, tokens: Tokens, step: Step, rows: list[int], heads: Sequence[HeadPages],
    places: Sequence[torch.Tensor],
) -> torch.Tensor:  # fmt: skip
    """The output (B, H, N, M) of the next N tokens of some sequences; their pages hold the state after them."""
    layout, seen, words = part.layout, [step.seen[row] for row in rows], part.layout.words
    own = [place[rows] for place in places]
    before = torch.stack([head.pages[place, :words] for head, place in zip(heads, own, strict=True)], dim=1)
    for number, count in enumerate(seen):
        if count == 0:  # the page is that of a sequence which has ended
            before[number] = layout.empty.to(before.device)
    output, state = attend(
        *tokens, part.kernel, part.settings, TokenLayout(), layout.state(before, seen), output_final_state=True
    )  # fmt: skip
    assert state is not None
    after = layout.pages(state)
    for number, (head, place) in enumerate(zip(heads, own, strict=True)):
        head.pages[place, :words] = after[:, number]
    return output
