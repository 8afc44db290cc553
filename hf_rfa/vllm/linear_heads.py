"""The linear heads of a step: the states of its sequences out of their pages, the operator, and back."""

from collections.abc import Sequence

import torch

from hf_rfa.ops.attention import attend
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.vllm.conversion import LinearPart
from hf_rfa.vllm.state_pages import PageMetadata, StatePages

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def advance(
    part: LinearPart, tokens: Tokens, output: torch.Tensor, pages: Sequence[StatePages],
    metadata: Sequence[PageMetadata],
) -> None:  # fmt: skip
    """Write the output of a part's heads for the tokens of a step, and their pages.

    Args:
        tokens: q (T, Hk, G, D), k (T, Hk, D), v (T, Hk, M) of these heads, the sequences one after the other.
        output: (T, Hk, G, M), written in place.
        pages, metadata: Of each head. Heads of different groups have their pages in different places.
    """
    step = metadata[0]
    single = [row for row, length in enumerate(step.lengths) if length == 1]
    if single:
        index = torch.tensor([step.starts[row] for row in single], device=output.device)
        query, key, value = (x.index_select(0, index).unsqueeze(-2) for x in tokens)
        answers = _attend(part, (query.flatten(1, 2), key, value), pages, metadata, single)
        output[index] = answers.squeeze(2).unflatten(1, output.shape[1:3])
    for row, (start, length) in enumerate(zip(step.starts, step.lengths, strict=True)):
        if length > 1:
            query, key, value = (x[start : start + length].movedim(0, -2).unsqueeze(0) for x in tokens)
            answers = _attend(part, (query.flatten(1, 2), key, value), pages, metadata, [row])
            output[start : start + length] = answers[0].movedim(1, 0).unflatten(1, output.shape[1:3])


def _attend(
    part: LinearPart, tokens: Tokens, pages: Sequence[StatePages], metadata: Sequence[PageMetadata], rows: list[int]
) -> torch.Tensor:
    """The output (B, H, N, M) of the next N tokens of some sequences; their pages hold the state after them."""
    layout, seen = part.layout, [metadata[0].seen[row] for row in rows]
    places = [own.state_indices_tensor[rows].long() for own in metadata]
    words = layout.words
    before = torch.stack([head.pages[place, :words] for head, place in zip(pages, places, strict=True)], dim=1)
    for number, count in enumerate(seen):
        if count == 0:  # the page is that of a sequence which has ended
            before[number] = layout.empty.to(before.device)
    state = layout.state(before, seen)
    output, state = attend(
        *tokens, part.kernel, part.settings, TokenLayout(), state, output_final_state=True,
    )  # fmt: skip
    assert state is not None
    after = layout.pages(state)
    for number, (head, place) in enumerate(zip(pages, places, strict=True)):
        head.pages[place, :words] = after[:, number]
    return output
