"""Batches of token ids in every form that a user may pass, made into arguments of a model; the rest is refused."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.arguments import accepts
from hf_rfa.runtime.devices import execution_device

#: Token ids (batch, seq) int64, or keyword arguments of the model.
ModelInput = torch.Tensor | Mapping[str, Any]

_PASS = (
    "Pass token ids (batch, seq) of integers, a list of such batches, a list of rows of ids, a dataset with a column "
    "`input_ids`, or dictionaries of the model's arguments."
)
_TEXTS = 'Texts have to be tokens first: pass `[tokenizer(text)["input_ids"] for text in texts]`.'


def batches_of(given: Any, model: PreTrainedModel, *, name: str) -> Iterator[ModelInput]:
    """The batches in `given`, one after the other: int64 token ids (batch, seq) or dictionaries of arguments.

    - a tensor or array (batch, seq) of integers, a dictionary of tensors (batch, ...) or of one row: one batch;
    - an iterable of those: as many batches;
    - an iterable of rows (tensors, arrays or lists of ids, or what a `datasets.Dataset` yields: dictionaries with
      `input_ids` of one row): a batch of one row each, because rows may differ in length. Of a dataset's rows
      `input_ids` is read, without what their `attention_mask` calls padding.

    Args:
        model: Its vocabulary bounds the ids, its forward the names of arguments.
        name: The name of `given` in messages.

    Raises:
        ConfigError: No batch, or something else: texts, a single row, numbers that are no ids of this model.
    """
    row = isinstance(given, Mapping) and _is_row(given)
    batch = _row(given, model, name) if row else _whole(given, model, name)
    if batch is not None:
        yield batch
        return
    if isinstance(given, (str, bytes)):
        raise ConfigError(f"`{name}` must be token ids. Got a text: {given[:40]!r}. {_TEXTS}")
    if isinstance(given, nn.Module) or not isinstance(given, Iterable):
        raise ConfigError(f"`{name}` must be token ids. Got {type(given).__name__}: {str(given)[:40]}. {_PASS}")
    number = -1
    for number, item in enumerate(given):
        place = f"{name}[{number}]"
        batch = _row(item, model, place) if _is_row(item) else _whole(item, model, place)
        if isinstance(item, (str, bytes)):
            raise ConfigError(f"`{place}` must be token ids. Got a text: {item[:40]!r}. {_TEXTS}")
        if batch is None:
            alone = isinstance(item, (int, np.integer))
            hint = "A single row of ids is `[ids]`." if alone else _PASS
            raise ConfigError(f"`{place}` must be token ids. Got {type(item).__name__}: {str(item)[:40]}. {hint}")
        yield batch
    if number < 0:
        raise ConfigError(f"`{name}` must hold at least one batch. Got none ({type(given).__name__}). {_PASS}")


def call_arguments(model: PreTrainedModel, batch: ModelInput) -> dict[str, Any]:
    """Arguments of the model's forward: the batch on the model's device, and no cache unless the batch asks for one.

    The model's config has no say in this: a cache that nobody reads costs memory and time.
    """
    device = execution_device(model)
    arguments: dict[str, Any] = {"input_ids": batch} if isinstance(batch, torch.Tensor) else dict(batch)
    if accepts(model, "use_cache"):
        arguments.setdefault("use_cache", False)
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def _whole(given: Any, model: PreTrainedModel, name: str) -> ModelInput | None:
    """`given` as one batch; None if it may be a sequence of batches."""
    if isinstance(given, Mapping):
        return _arguments(given, model, name)
    if not isinstance(given, (torch.Tensor, np.ndarray)):
        return None
    ids = _ids(given, model, name)
    if ids.dim() != 2:
        shown = f"{tuple(ids.shape)}"
        hint = "A single row of ids is `ids[None]`." if ids.dim() == 1 else _PASS
        raise ConfigError(f"`{name}` must be token ids of shape (batch, seq). Got shape {shown}. {hint}")
    return _checked(ids, model, name)


def _is_row(item: Any) -> bool:
    """Whether an item of an iterable is one row: ids, or a dataset's dictionary that holds one row of them."""
    if isinstance(item, Mapping):
        return "input_ids" in item and _is_row(item["input_ids"])
    if isinstance(item, (torch.Tensor, np.ndarray)):
        return item.ndim == 1
    return isinstance(item, (list, tuple)) and all(isinstance(x, (int, np.integer)) for x in item)


def _row(item: Any, model: PreTrainedModel, name: str) -> torch.Tensor:
    if not isinstance(item, Mapping):
        return _checked(_ids(item, model, name)[None], model, name)
    ids, mask = _ids(item["input_ids"], model, f"{name}['input_ids']"), item.get("attention_mask")
    if mask is not None:
        kept = torch.as_tensor(mask).bool()
        if kept.shape != ids.shape:
            raise ConfigError(
                f"`{name}` must have an attention_mask of the shape of its input_ids, {tuple(ids.shape)}. Got "
                f"{tuple(kept.shape)}. Correct it or leave it out."
            )
        ids = ids[kept.to(ids.device)]
    return _checked(ids[None], model, name)


def _arguments(given: Mapping[str, Any], model: PreTrainedModel, name: str) -> dict[str, Any]:
    """Keyword arguments of the model, lists and arrays among them as tensors."""
    parameters = inspect.signature(model.forward).parameters
    free = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [key for key in given if not isinstance(key, str) or not (free or key in parameters)]
    if unknown or not given:
        raise ConfigError(
            f"`{name}` must hold arguments of {type(model).__name__}. Got {unknown or 'an empty dictionary'}. {_PASS}"
        )
    arguments: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, (list, np.ndarray)):
            try:
                value = torch.as_tensor(np.asarray(value))
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"`{name}` holds {key!r}, which is no tensor and cannot be made one: {error}. Pad the rows, "
                    "`tokenizer(texts, padding=True, return_tensors='pt')`."
                ) from error
        if not isinstance(value, (torch.Tensor, bool, int, float)) and value is not None:
            raise ConfigError(
                f"`{name}` must hold tensors and plain values. Got {key!r} of type {type(value).__name__}. {_PASS}"
            )
        arguments[key] = value
    if not any(isinstance(value, torch.Tensor) for value in arguments.values()):
        raise ConfigError(f"`{name}` must hold a tensor. Got {sorted(arguments)}. {_PASS}")
    if "input_ids" in arguments:
        ids = _ids(arguments["input_ids"], model, f"{name}['input_ids']")
        # Beside images and sounds, ids may stand for what is no token.
        alone = not any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in arguments.values())
        arguments["input_ids"] = _checked(ids, model, f"{name}['input_ids']", vocabulary=alone)
    return arguments


def _ids(given: Any, model: PreTrainedModel, name: str) -> torch.Tensor:
    """Integers as int64."""
    array = given if isinstance(given, torch.Tensor) else np.asarray(given)
    if isinstance(array, np.ndarray) and array.dtype.kind not in "iu" and array.size:
        raise ConfigError(f"`{name}` must hold integers. Got {array.dtype}. {_PASS}")
    ids = array if isinstance(array, torch.Tensor) else torch.from_numpy(array.astype(np.int64))
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        own = model.main_input_name
        hint = _PASS if own == "input_ids" else f"Pass it as an argument of the model: {{{own!r}: tensor}}."
        raise ConfigError(f"`{name}` must hold integers. Got {ids.dtype}. {hint}")
    return ids.long()


def _checked(ids: torch.Tensor, model: PreTrainedModel, name: str, *, vocabulary: bool = True) -> torch.Tensor:
    """The ids; refused if there are none or the model does not have them all."""
    if not accepts(model, "input_ids"):
        raise ConfigError(
            f"{type(model).__name__} takes no token ids. Got them as `{name}`. Pass dictionaries of its arguments: "
            f"{{{model.main_input_name!r}: tensor}}."
        )
    if ids.is_meta:
        raise ConfigError(f"`{name}` must hold tokens. Got a tensor on the meta device, which has no values.")
    if not ids.numel():
        raise ConfigError(f"`{name}` must hold tokens. Got shape {tuple(ids.shape)}. Leave empty rows out.")
    size = _vocabulary(model)
    lowest, highest = (int(bound) for bound in ids.aminmax())
    if vocabulary and (lowest < 0 or (size is not None and highest >= size)):
        wrong = lowest if lowest < 0 else highest
        raise ConfigError(
            f"`{name}` must hold ids of this model's tokens, 0 to {'...' if size is None else size - 1}. Got {wrong}. "
            "Tokenise with the model's own tokenizer."
        )
    return ids


def _vocabulary(model: PreTrainedModel) -> int | None:
    """How many tokens the model has; None if it does not say."""
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # Transformers' word for a model without one table of them
        embeddings = None
    if isinstance(embeddings, nn.Embedding):
        return embeddings.num_embeddings
    size: int | None = getattr(model.config.get_text_config(), "vocab_size", None)
    return size
