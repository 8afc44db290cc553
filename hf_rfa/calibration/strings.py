"""Texts to calibrate on as strings: read by the model's own tokenizer, as the model will read them later."""

from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.arguments import accepts
from hf_rfa.runtime.record import wrapped_models

_IDS = 'pass `[tokenizer(text)["input_ids"] for text in texts]`'


def are_texts(given: Any) -> bool:
    """Whether batches are given as a list of strings."""
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(text, str) for text in given)


def read_texts(given: Any, model: nn.Module, tokenizer: Any = None, *, name: str) -> Any:
    """Batches for `calibration.batches.batches_of`: a list of strings as tokens, anything else as it is.

    A language model gets rows of ids; a text longer than its context becomes several. An encoder gets one dictionary
    of its arguments for each text, with the special tokens, cut where the tokenizer cuts (a SentenceTransformer's
    `max_seq_length`).

    Args:
        model: With a tokenizer of its own (a SentenceTransformer), or loaded from a folder or the hub that has one.
        tokenizer: Instead of it.
        name: The name of `given` in messages.

    Raises:
        ConfigError: There is no tokenizer, or a `tokenizer` and no texts, or the model does not take text alone.
    """
    if not are_texts(given):
        if tokenizer is not None:
            raise ConfigError(
                f"`tokenizer` reads texts. Got {name}={type(given).__name__}, which is no list of them. Leave "
                f"`tokenizer` out, or pass {name}=[text, ...]."
            )
        return given
    *outer, base = wrapped_models(model)
    assert isinstance(base, PreTrainedModel)
    if base.config.is_encoder_decoder or base.main_input_name != "input_ids":
        raise ConfigError(
            f"{type(base).__name__} does not take text alone. Got a text: {given[0][:40]!r}. Pass dictionaries of its "
            f"arguments as `{name}`."
        )
    reader: Any = tokenizer or next((m.tokenizer for m in outer if getattr(m, "tokenizer", None) is not None), None)
    if reader is None:
        reader = _tokenizer_beside(base, given[0], name)
    longest = [reader.model_max_length, getattr(base.config.get_text_config(), "max_position_embeddings", None) or 0]
    limit = min(int(length) for length in longest if length > 0)
    if not base.can_generate():
        rows = [reader(text, truncation=True, max_length=limit, return_tensors="pt") for text in given]
        return [{key: value for key, value in row.items() if accepts(base, key)} for row in rows]
    # `verbose=False`: texts longer than the context are expected.
    ids = [reader(text, verbose=False)["input_ids"] for text in given]
    return [row[start : start + limit] for row in ids for start in range(0, len(row), limit)]


def _tokenizer_beside(base: PreTrainedModel, text: str, name: str) -> Any:
    """The tokenizer in the folder or hub repository that the model was loaded from."""
    source = getattr(base.config, "_name_or_path", "")
    refusal = f"Got a text: {text[:40]!r}. Pass `tokenizer=...`, or {_IDS}."
    if not source:
        raise ConfigError(
            f"`{name}` holds texts, and this {type(base).__name__} was not loaded from anywhere that has a tokenizer. "
            + refusal
        )
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`{name}` holds texts, and there is no tokenizer at {source!r}, where this {type(base).__name__} was "
            f"loaded from ({str(error).splitlines()[0]}). {refusal}"
        ) from error
