"""Questions asked on copies of the cache of a document that a model has read once."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_rfa.evaluation.tasks.prompts import TaskDocument
from hf_rfa.runtime.arguments import accepts, cache_argument, cache_of
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.quiet import evaluation_mode

#: Cache layers that a model may fill in pieces of any length, and whose copy is a cache like any other.
_COPIED = (DynamicLayer, DynamicSlidingWindowLayer, RFACacheLayer)


def greedy_answers(model: PreTrainedModel, document: TaskDocument) -> list[list[int]]:
    """The greedy answer to each question, token ids up to the end-of-sequence token, at most `new_tokens` of them.

    The document is read once and each question is asked on a copy of its cache, which gives the answers of reading
    both at once. Where that is not known to be so (the recurrent layers of some models take one token at a time, some
    models have a cache of their own), document and question are read together for each question.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    stop = _end_tokens(model)
    with evaluation_mode(model):
        read = torch.tensor([document.ids])
        split = bool(document.questions) and _may_be_split(model, read[:, :2])
        cache = cache_of(_step(model, read)) if split else None
        answers = []
        for question in document.questions:
            unread = torch.tensor([question.ids if split else document.ids + question.ids])
            answers.append(_generate(model, unread, copy.deepcopy(cache), question.new_tokens, stop))
    return answers


def _may_be_split(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether every layer of the model's cache is of a known kind, by what it makes of a few tokens."""
    layers = list(getattr(cache_of(_step(model, ids)), "layers", ()))
    return bool(layers) and all(type(layer) in _COPIED for layer in layers)


def _generate(model: PreTrainedModel, ids: Tensor, cache: Any, count: int, stop: Sequence[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < count:
        output = _step(model, ids, cache)
        token = int(output.logits[0, -1].argmax())
        if token in stop:
            break
        answer.append(token)
        ids, cache = torch.tensor([[token]]), cache_of(output)
    return answer


def _step(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Any:
    # Logits of a whole document would take more memory than the attention.
    last = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
    given = {} if cache is None else {cache_argument(model): cache}
    output = model(input_ids=ids.to(model.device), use_cache=True, **given, **last)
    if not output.logits[0, -1].amax().isfinite():
        raise FloatingPointError(
            "The logits behind a document of a task are not finite. Check the weights for NaN, and run the model in "
            "float32 or bfloat16 instead of float16."
        )
    return output


def _end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)
