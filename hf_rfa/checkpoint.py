"""Saving and loading a conversion: a small pair of files of its own, beside or without the model's weights.

| file                    | holds                                                                             |
|-------------------------|-----------------------------------------------------------------------------------|
| `rfa_config.json`       | format version, the `RFAConfig`, the model's class, where the base model is from  |
| `rfa_model.safetensors` | the adapters: omega, its draw number, alpha, gamma, proposal, exact heads         |

A folder that `model.save_pretrained` or a `Trainer` wrote has the adapters among the model's weights and the config in
`config.json`; `from_pretrained` reads both kinds.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hf_rfa.adapter import ADAPTER_NAME, named_adapters
from hf_rfa.config import FORMAT_VERSION, RFAConfig
from hf_rfa.convert import CONFIG_FIELD, base_model, conversion_config, convert
from hf_rfa.errors import CheckpointError, ConfigError

CONFIG_FILE, WEIGHTS_FILE = "rfa_config.json", "rfa_model.safetensors"
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
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size))).eval()
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
            base.save_pretrained(folder)
        described = {
            "format_version": FORMAT_VERSION,
            "rfa": config.to_dict(),
            "architecture": type(base).__name__,
            "base_model_name_or_path": origin,
        }
        save_file(_adapter_tensors(base), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {str(folder)!r}: {error}. Free some space or choose another folder."
        ) from error


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
    described = _described(name)
    config = described["config"]
    whole = _find(name, "config.json") is not None
    source = name if whole else described["origin"]
    if source is None:
        raise CheckpointError(
            f"{name!r} holds a conversion without weights and does not say which base model it belongs to. Load that "
            "model yourself and call `hf_rfa.convert`."
        )
    model_class = getattr(transformers, described["architecture"], None)
    if model_class is None:
        raise CheckpointError(
            f"{name!r} was saved from a {described['architecture']}, which this version of Transformers does not "
            "have. Upgrade Transformers."
        )
    with _expecting_adapters(model_class):
        model = model_class.from_pretrained(source, **kwargs)
    if model.training:
        model.eval()
    convert(model, config)
    _load_adapters(model, _saved_tensors(name), name)
    if _find(name, _PEFT_FILE) is not None:
        from peft import PeftModel

        return PeftModel.from_pretrained(model, name)
    return model


def _adapter_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every adapter's tensors, named as in the model's state dict."""
    return {
        f"{name}.{ADAPTER_NAME}.{key}": tensor.detach().cpu().contiguous()
        for name, _, adapter in named_adapters(model)
        for key, tensor in adapter.state_dict().items()
    }


def _described(name: str) -> dict[str, Any]:
    """The RFAConfig, the model's class and the base model of a saved conversion."""
    path = _find(name, CONFIG_FILE)
    if path is not None:
        values = _read_json(path)
        version = values.get("format_version")
        if not isinstance(version, int):
            raise CheckpointError(f"{str(path)!r} has no `format_version`. Got {version!r}. Save the model again.")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{str(path)!r} has format version {version}; this hf_rfa reads up to {FORMAT_VERSION}. Upgrade with "
                "`pip install -U hf_rfa`."
            )
        missing = [key for key in ("rfa", "architecture") if key not in values]
        if missing:
            raise CheckpointError(f"{str(path)!r} lacks {missing}. Got {sorted(values)}. Save the model again.")
        config, architecture, origin = values["rfa"], values["architecture"], values.get("base_model_name_or_path")
    else:
        path = _find(name, "config.json")
        values = _read_json(path) if path is not None else {}
        if CONFIG_FIELD not in values:
            raise CheckpointError(
                f"{name!r} holds no conversion: neither {CONFIG_FILE} nor a config.json with `{CONFIG_FIELD}` is "
                "there. Load it with its own class and call `hf_rfa.convert(model)`."
            )
        config, architecture, origin = values[CONFIG_FIELD], (values.get("architectures") or [""])[0], None
    try:
        return {"config": RFAConfig.from_dict(config), "architecture": architecture, "origin": origin}
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The conversion in {str(path)!r} cannot be read: {error}") from error


def _saved_tensors(name: str) -> dict[str, torch.Tensor]:
    """The adapters' tensors, from the pair of files or from among the model's weights."""
    path = _find(name, WEIGHTS_FILE)
    if path is not None:
        return _read_tensors(path, everything=True)
    index = _find(name, "model.safetensors.index.json")
    if index is not None:
        files = {f for key, f in _read_json(index)["weight_map"].items() if f".{ADAPTER_NAME}." in key}
    else:
        files = {"model.safetensors"}
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        path = _find(name, file)
        if path is None:
            raise CheckpointError(f"{name!r} lacks {file}, which should hold the conversion. Save the model again.")
        tensors |= _read_tensors(path, everything=False)
    return tensors


def _load_adapters(model: PreTrainedModel, tensors: dict[str, torch.Tensor], name: str) -> None:
    wanted = _adapter_tensors(model)
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


def _find(name: str, file: str) -> Path | None:
    """The file in a folder or a hub repository, None if it is not there."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.exists() else None
    if Path(name).exists() or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name!r} is not a folder. Pass the folder that `hf_rfa.save_pretrained` wrote, or a hub id."
        )
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise CheckpointError(f"Cannot find {name!r}: there is no such folder, and on the hub: {error}") from error
    return Path(found) if found else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error}. The file is damaged: save the model again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{str(path)!r} must hold a JSON object. Got a {type(values).__name__}. Save the model again."
        )
    return values


def _read_tensors(path: Path, everything: bool) -> dict[str, torch.Tensor]:
    try:
        if everything:
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if f".{ADAPTER_NAME}." in key}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error}. The file is truncated or damaged: copy or save it again."
        ) from error


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
