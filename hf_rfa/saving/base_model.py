"""The model under a conversion: its weights beside the conversion, or those of a base model found elsewhere."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from hf_rfa.errors import CheckpointError
from hf_rfa.runtime.adapter import ADAPTER_NAME
from hf_rfa.runtime.record import original_class
from hf_rfa.saving.conversion_files import Base, SavedConversion, as_json
from hf_rfa.saving.marks import restored
from hf_rfa.saving.model_class import find_class
from hf_rfa.saving.plain import plain_loading
from hf_rfa.saving.saved_files import MODEL_CONFIG, PEFT_WEIGHTS, read_json
from hf_rfa.saving.source import HUB_OPTIONS, Source

#: The attribute of a model that `hf_rfa.from_pretrained` built: the revision and sub-folder of its weights.
_PLACE = "_rfa_base_place"
#: Fields of a config that can differ from the original's without changing any weight's name or shape.
_HARMLESS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache", "attn_implementation"}


@dataclass(frozen=True)
class Loaded:
    """A model as it was before its conversion, Transformers' loading info, and where the weights were."""

    model: PreTrainedModel
    info: dict[str, Any]
    weights: Source


def load_base(
    saved: SavedConversion, source: Source, model_class: type[PreTrainedModel] | None, kwargs: Any
) -> Loaded:
    """The model that the conversion in `source` belongs to, in evaluation mode, not converted yet.

    Raises:
        CheckpointError: The class or the weights cannot be found or read, or the base model lacks weights that were
            not saved either.
    """
    weights = _weights(saved, source)
    cls: Any = find_class(saved.architecture, saved.module, weights) if model_class is None else model_class
    options = {key: value for key, value in kwargs.items() if key not in HUB_OPTIONS}
    options.setdefault("attn_implementation", None)  # config.json may say "rfa", which needs adapters
    code = {key: weights.code[key] for key in ("trust_remote_code",) if key in weights.code}
    rebuilt = saved.base is not None and saved.base.config is not None
    with plain_loading(), _naming(weights), _expecting_adapters(cls), _unreported() if rebuilt else nullcontext():
        if rebuilt and "config" not in options:
            config, options = _config(cls, saved, weights, options)
            options["config"] = config
            options.setdefault("ignore_mismatched_sizes", True)  # `_refuse_lacking` checks what that leaves out
        model, info = cls.from_pretrained(weights.name, **weights.options, **code, **options, output_loading_info=True)
    if rebuilt:
        _refuse_lacking(model, info, saved, weights, source)
    setattr(model, _PLACE, {key: weights.options.get(key) for key in ("revision", "subfolder")})
    return Loaded(model.eval(), info, weights)


def describe_base(model: PreTrainedModel, folder: Path, revision: str | None = None) -> Base:
    """Where the weights of a model that is saved without them are, and the config that they need.

    Args:
        folder: Where the conversion will be.
        revision: Of the base model; None: the one that it was loaded from, as far as it is known.
    """
    name = getattr(model.config, "_name_or_path", "") or None
    place = getattr(model, _PLACE, {})
    config = {**as_json(model.config), "dtype": str(model.dtype).removeprefix("torch.")}
    if name is not None and Path(name).is_dir():
        inner = Path(name) / (place.get("subfolder") or "")
        if inner.resolve() == folder.resolve():
            return Base(".", config=config)
    known = place.get("revision") or getattr(model.config, "_commit_hash", None)
    return Base(name, revision or known, place.get("subfolder"), config)


def not_in_base(model: PreTrainedModel, base: Base, folder: Path) -> set[str]:
    """Names of the model's parameters that its base model lacks: new heads, resized embeddings.

    Only names and shapes are compared, on the meta device, and only if the class or the config suggests any. Empty if
    the base model cannot be found: loading will say so.
    """
    if base.name is None:
        return set()
    weights = Source(str(folder) if base.name == "." else base.name, _place(base))
    try:
        path = weights.find(MODEL_CONFIG)
    except CheckpointError:
        return set()
    if path is None or not _may_differ(model, base.config or {}, restored(read_json(path))):
        return set()
    cls = original_class(model)
    config = cls.config_class.from_dict({**(base.config or {})})
    options: dict[str, Any] = {"ignore_mismatched_sizes": True, "device_map": "meta", "output_loading_info": True}
    with plain_loading(), _expecting_adapters(cls), _unreported():
        _, info = cls.from_pretrained(weights.name, config=config, **weights.options, **options)
    return _lacking(info)


def saved_nowhere(model: PreTrainedModel, folder: Path, lacking: set[str]) -> dict[str, torch.Tensor]:
    """Weights that neither the base model nor PEFT's files in the folder hold."""
    wanted = lacking - _in_lora(Source(str(folder)), lacking)
    return {name: tensor for name, tensor in _named_weights(model).items() if name in wanted}


def restore_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Load weights that were saved with the conversion into the model.

    Raises:
        CheckpointError: The model does not have such weights, or they are offloaded.
    """
    named = _named_weights(model)
    for name, tensor in weights.items():
        ours = named.get(name)
        if ours is None or ours.shape != tensor.shape or ours.is_meta:
            found = "none" if ours is None else "an offloaded one" if ours.is_meta else f"shape {tuple(ours.shape)}"
            raise CheckpointError(
                f"{name} was saved with the conversion, of shape {tuple(tensor.shape)}. Got {found} in the model. "
                "Load it with the base model that it was saved from, in memory."
            )
        with torch.no_grad():
            ours.copy_(tensor)


def _named_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors under their names without PEFT's layers around them."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def _in_lora(source: Source, names: set[str]) -> set[str]:
    """Those of `names` that PEFT has saved beside its adapters (embeddings, `modules_to_save`)."""
    path = source.find(PEFT_WEIGHTS[0])
    if path is None or not names:
        return set()
    with safe_open(path, "pt") as file:
        held = list(file.keys())
    keys = {key.replace(".base_layer.", ".").replace(".modules_to_save.", ".") for key in held}
    return {name for name in names if {f"base_model.model.{name}", f"base_model.{name}"} & keys}


def _weights(saved: SavedConversion, source: Source) -> Source:
    if saved.base is None or saved.base.name == ".":
        return source
    if saved.base.name is None:
        raise CheckpointError(
            f"{source} holds a conversion without weights and does not say which base model it belongs to. Load that "
            "model yourself and call `hf_rfa.convert`; `PeftModel.from_pretrained` then takes the saved draw over."
        )
    return source.elsewhere(saved.base.name, saved.base.revision, saved.base.subfolder)


def _place(base: Base) -> dict[str, str]:
    return {key: value for key in ("revision", "subfolder") if (value := getattr(base, key))}


def _config(cls: Any, saved: SavedConversion, weights: Source, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of the model as it was saved, but with the quantisation of the base model."""
    assert saved.base is not None
    values = dict(saved.base.config or {})
    values.pop("quantization_config", None)
    path = weights.find(MODEL_CONFIG)
    original = {} if path is None else read_json(path)
    if "quantization_config" in original:
        values["quantization_config"] = original["quantization_config"]
    dtype = {key: options.pop(key) for key in ("dtype", "torch_dtype") if key in options}
    config, unused = cls.config_class.from_dict(values, return_unused_kwargs=True, **options)
    return config, {**unused, **dtype}


def _may_differ(model: PreTrainedModel, ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if type(model).__name__ not in (theirs.get("architectures") or []):
        return True
    shown = as_json(type(model.config).from_dict(dict(theirs)))
    names = {*ours, *shown} - _HARMLESS
    return any(ours.get(name) != shown.get(name) for name in names)


def _lacking(info: dict[str, Any]) -> set[str]:
    return {*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])}


def _refuse_lacking(
    model: PreTrainedModel, info: dict[str, Any], saved: SavedConversion, weights: Source, source: Source
) -> None:
    """Refuse weights that the base model lacks and so were initialised at random, unless they were saved elsewhere."""
    lost = _lacking(info) - set(saved.weights)
    lost -= _in_lora(source, lost)
    if lost:
        raise CheckpointError(
            f"The base model {weights} does not have {sorted(lost)[:5]} as the converted {type(model).__name__} had "
            "them. It is not the one that the conversion was saved from: name its `base_revision` when saving, or "
            "save the whole model (for PEFT after `merge_and_unload()`)."
        )


@contextmanager
def _naming(weights: Source) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of the model in {weights} cannot be read: {error}. A file is truncated or damaged: copy "
            "or save it again."
        ) from error
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"The base model {weights} cannot be loaded: {error}") from error


@contextmanager
def _expecting_adapters(model_class: type[PreTrainedModel]) -> Iterator[None]:
    """Load the base weights without warnings about adapter tensors among them."""
    before = model_class.__dict__.get("_keys_to_ignore_on_load_unexpected")
    model_class._keys_to_ignore_on_load_unexpected = [*(before or []), rf"\.{ADAPTER_NAME}\."]
    try:
        yield
    finally:
        if before is None:
            del model_class._keys_to_ignore_on_load_unexpected
        else:
            model_class._keys_to_ignore_on_load_unexpected = before


@contextmanager
def _unreported() -> Iterator[None]:
    """Silence Transformers' report of weights that the base model lacks; `_refuse_lacking` checks them."""
    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(_is_no_report)
    try:
        yield
    finally:
        reporter.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
