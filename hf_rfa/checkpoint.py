"""Saving and loading a converted model. What was added to it has a small pair of files of its own (see `pair`), beside
or without the model's weights; a converted model's own `save_pretrained`, and so a `Trainer`, writes the pair too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from hf_rfa.adapter import ADAPTER_NAME, named_adapters
from hf_rfa.convert import swap_attention
from hf_rfa.devices import execution_device
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.example_inputs import rebuild
from hf_rfa.pair import (
    CONFIG_FIELD,
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_tensors,
    find_file,
    read_pair,
    write_pair,
)
from hf_rfa.record import base_model, conversion_config, store_report, stored_report, stored_scope

_PEFT_FILE = "adapter_config.json"


def save_pretrained(model: nn.Module, folder: str | Path, *, adapter_only: bool = False) -> None:
    """Save a converted model so that `hf_rfa.from_pretrained(folder)` gives identical logits.

    Args:
        model: A converted model. Of a PEFT model the LoRA is saved beside the conversion, not the base weights.
        folder: Made if it does not exist.
        adapter_only: Only the conversion's pair of files (a few kB a layer); the base model is then found again under
            the name or path that it was loaded from.

    Raises:
        UnsupportedModelError: The model is not converted.
        CheckpointError: `adapter_only` for a model that was not loaded from anywhere, or the folder cannot be written.

    Example:
        >>> import tempfile, torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False).eval()
        >>> ids = torch.ones(1, 300, dtype=torch.long)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     hf_rfa.save_pretrained(model, folder)
        ...     again = hf_rfa.from_pretrained(folder).eval()
        >>> torch.equal(again(ids).logits, model(ids).logits)
        True
    """
    config = conversion_config(model)
    base = base_model(model)
    folder = Path(folder)
    origin = getattr(base.config, "_name_or_path", "") or None
    is_peft = model is not base and hasattr(model, "peft_config")
    if (adapter_only or is_peft) and origin is None:
        raise CheckpointError(
            "Without the weights, the base model must be found again, but this one was not loaded from a folder or "
            "the hub. Save the whole model: `save_pretrained(model, folder)`, for PEFT after `merge_and_unload()`."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_peft:
            model.save_pretrained(folder)  # type: ignore[operator]
        elif not adapter_only:
            type(base).save_pretrained(base, folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write to {str(folder)!r}: {error}. Free some space or choose another folder."
        ) from error
    write_pair(base, config, folder, stored_report(base), stored_scope(base))


def from_pretrained(folder_or_id: str | Path, **kwargs: Any) -> Any:
    """Load a model with its conversion, from a folder or the hub.

    Args:
        folder_or_id: What `hf_rfa.save_pretrained`, `model.save_pretrained` or a `Trainer` wrote.
        kwargs: Passed to the model class's `from_pretrained` (dtype, device_map, revision, ...).

    Returns:
        The converted model, of its own class; a PEFT model if the folder holds a LoRA.

    Raises:
        CheckpointError: No conversion there, or it is damaged, does not fit the model, or is newer than this hf_rfa.

    Example: see `save_pretrained`.
    """
    name = str(folder_or_id)
    pair = read_pair(name)
    source = name if find_file(name, "config.json") is not None else pair.origin
    if source is None:
        raise CheckpointError(
            f"{name!r} holds a conversion without weights and does not say which base model it belongs to. Load that "
            "model yourself and call `hf_rfa.convert`."
        )
    model_class = getattr(transformers, pair.architecture, None)
    if model_class is None:
        raise CheckpointError(
            f"{name!r} was saved from a {pair.architecture}, which this version of Transformers does not have. "
            "Upgrade Transformers."
        )
    model = _load_base(model_class, source, kwargs)
    try:
        given = pair.scope.get("example_inputs")
        inputs = None if given is None else rebuild(given, execution_device(model))
        swap_attention(model, pair.config, example_inputs=inputs, parts=pair.scope.get("parts"))
    except ConfigError as error:
        raise CheckpointError(f"The conversion in {name!r} does not fit the model: {error}") from error
    _load_adapters(model, pair.tensors, name)
    store_report(model, pair.report)
    if find_file(name, _PEFT_FILE) is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, name)
    return model


def holds_conversion(folder_or_id: str | Path) -> bool:
    """Whether there is a conversion in a folder or hub repository."""
    return find_file(str(folder_or_id), CONFIG_FILE) is not None


def load_any(folder_or_id: str | Path, **kwargs: Any) -> Any:
    """A causal LM, with its conversion where there is one; `kwargs` go to `from_pretrained`.

    Raises:
        CheckpointError: the conversion is damaged, or the config names one whose files are not there.

    Example:
        >>> from hf_rfa.evaluation.compare import default_model
        >>> type(load_any(default_model())).__name__
        'LlamaForCausalLM'
    """
    if holds_conversion(folder_or_id):
        return from_pretrained(folder_or_id, **kwargs)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder_or_id, **kwargs)
    if hasattr(model.config, CONFIG_FIELD):
        raise CheckpointError(
            f"{str(folder_or_id)!r} was converted, but {CONFIG_FILE} is not there: it would run softmax attention. "
            f"Copy {CONFIG_FILE} and {WEIGHTS_FILE} beside the weights, or save the model again."
        )
    return model.eval()


def _load_base(model_class: type[PreTrainedModel], source: str, kwargs: dict[str, Any]) -> PreTrainedModel:
    try:
        with _expecting_adapters(model_class):
            return model_class.from_pretrained(source, **kwargs).eval()
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of the model in {source!r} cannot be read: {error}. A file is truncated or damaged: copy "
            "or save it again."
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The base model {source!r} cannot be loaded: {error}") from error


def _load_adapters(model: PreTrainedModel, tensors: dict[str, torch.Tensor], name: str) -> None:
    wanted = adapter_tensors(model)
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f"The conversion in {name!r} does not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(extra)} do not belong there {extra[:3]}. Load it with the base model that it was saved from."
        )
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise CheckpointError(
                f"{key} in {name!r} has shape {tuple(tensor.shape)}; the model needs {tuple(wanted[key].shape)}. "
                "Load it with the base model that it was saved from."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{key} in {name!r} holds values that are not finite. The file is damaged: save the model again."
            )
    for module_name, _, adapter in named_adapters(model):
        prefix = f"{module_name}.{ADAPTER_NAME}."
        adapter.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})


@contextmanager
def _expecting_adapters(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """While the base weights load, adapter tensors among them are no surprise to be warned about."""
    before = model_class.__dict__.get("_keys_to_ignore_on_load_unexpected")
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), rf"\.{ADAPTER_NAME}\."]
    try:
        yield
    finally:
        if before is None:
            del model_class._keys_to_ignore_on_load_unexpected
        else:
            model_class._keys_to_ignore_on_load_unexpected = before
