"""The batches of calibration as a model's arguments: repeats planted, rows in groups that fit into memory, seeds."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rfa.calibration.batches import ModelInput, call_arguments
from hf_rfa.runtime.arguments import accepts

#: Rows of token ids go through the model together if they have at most so many tokens, else one by one.
GROUP_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Text:
    """One batch as the model gets it.

    Attributes:
        inputs: Keyword arguments of the model.
        planted: How many tokens at the end of each row repeat earlier ones.
        tokens: Tokens (or other places) of all rows, as far as the arguments tell.
        length: Of these, in each row.
        number: Of the batch.
    """

    inputs: Mapping[str, Any]
    planted: int
    tokens: int
    length: int
    number: int

    def seeds(self, rows: int) -> list[int]:
        """A seed for each row, for rows of ids a function of these: who else is in the batch does not matter."""
        ids = self.inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.shape[:1] != (rows,) or ids.dim() != 2:
            return [self.number * rows + row for row in range(rows)]
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return ((ids + 1) * places % 1_000_003).sum(1).tolist()


def texts_of(model: PreTrainedModel, batches: list[ModelInput], plant_repeats: bool) -> Iterator[Text]:
    """The batches, rows of plain token ids in groups."""
    number = 0
    for batch in batches:
        for group in _groups(batch):
            span = group.shape[1] // 8 if plant_repeats and isinstance(group, torch.Tensor) else 0
            planted = _plant(group, span) if span and isinstance(group, torch.Tensor) else group
            inputs = call_arguments(model, planted)
            if accepts(model, "use_cache"):  # layers run again in the backward pass would fill it twice
                inputs["use_cache"] = False
            yield Text(inputs, span, *_size(group), number)
            number += 1


def count(batch: ModelInput) -> int:
    """Tokens of all rows of a batch; of dictionaries the places of the first tensor that has rows and places."""
    return _size(batch)[0]


def _size(batch: ModelInput) -> tuple[int, int]:
    """Tokens of all rows, and of each."""
    given = {"": batch} if isinstance(batch, torch.Tensor) else batch
    shapes = [t.shape for t in given.values() if isinstance(t, torch.Tensor) and t.dim() > 1]
    return (shapes[0][0] * shapes[0][1], shapes[0][1]) if shapes else (1, 1)


def first_tokens(texts: Iterable[Text], tokens: int) -> Iterator[Text]:
    """The first texts that hold so many tokens."""
    for text in texts:
        if tokens <= 0:
            return
        yield text
        tokens -= text.tokens


def _groups(batch: ModelInput) -> Iterator[ModelInput]:
    if not isinstance(batch, torch.Tensor):
        yield batch
        return
    yield from batch.split(max(1, GROUP_TOKENS // batch.shape[1]))


def _plant(ids: torch.Tensor, span: int) -> torch.Tensor:
    """The rows with `span` tokens of their first half once more at their end."""
    start = ids.shape[1] // 4
    return torch.cat([ids[:, :-span], ids[:, start : start + span]], dim=1)
