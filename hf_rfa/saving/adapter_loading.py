"""Loading saved tensors into the adapters of a model: all of them, or an error that says what does not fit."""

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rfa.errors import CheckpointError
from hf_rfa.runtime.adapter import ADAPTER_NAME
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.newer_tensors import newer_tensors
from hf_rfa.runtime.record import conversion_config, store_config, store_report
from hf_rfa.saving.base_model import restore_weights
from hf_rfa.saving.conversion_files import SavedConversion, adapter_tensors
from hf_rfa.saving.saved_files import digest
from hf_rfa.saving.source import Source


def load_adapters(model: PreTrainedModel, saved: SavedConversion, source: Source) -> None:
    """Load the saved tensors and calibration report into a model that was converted with the saved config.

    Raises:
        CheckpointError: The tensors are not those of this model, or not those that the conversion was saved with.
    """
    wanted = adapter_shapes(model)
    tensors = _named_for(model, _completed(saved.tensors), wanted)
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise CheckpointError(
            f"The conversion in {source} does not fit the model: {len(missing)} tensors are missing {missing[:3]}, "
            f"{len(extra)} do not belong there {extra[:3]}. Load it with the base model that it was saved from."
        )
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key]:
            raise CheckpointError(
                f"{key} in {source} has shape {tuple(tensor.shape)}; the model needs {tuple(wanted[key])}. "
                "Load it with the base model that it was saved from."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{key} in {source} holds values that are not finite. The file is damaged: save the model again."
            )
    if not saved.is_whole:
        raise CheckpointError(
            f"The two files of the conversion in {source} are of different saves, or damaged: the digest of the "
            "tensors is another one. Copy both again, or save the model again."
        )
    for module_name, _, adapter in named_adapters(model):
        prefix = f"{module_name}.{ADAPTER_NAME}."
        adapter.load_state_dict({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    restore_weights(model, saved.weights)
    store_report(model, saved.report)


def take_over(model: PreTrainedModel, saved: SavedConversion, source: Source, *, replace: bool) -> None:
    """Load the draw, the kernel and the exact heads that a LoRA was saved with into a converted model.

    Args:
        replace: Whether the model's own may be replaced. If not, because other LoRAs rely on them, they must be equal.

    Raises:
        CheckpointError: The LoRA was trained on another conversion. The model is then as it was.
    """
    ours, theirs = (dataclasses.asdict(config) for config in (conversion_config(model), saved.config))
    differing = [name for name in ours if ours[name] != theirs[name] and name != "softmax_heads"]
    if differing:
        raise CheckpointError(
            f"{source} was trained on another conversion: {_listed(differing, theirs)}; the model has "
            f"{_listed(differing, ours)}. Load it with `hf_rfa.from_pretrained`, or convert with the same config."
        )
    if not replace and digest(_completed(saved.tensors)) != digest(adapter_tensors(model)):
        raise CheckpointError(
            f"{source} was trained with another draw, kernel or other exact heads than the adapters that the model "
            "has already, and they share one conversion. Load it alone."
        )
    load_adapters(model, saved, source)
    store_config(model, saved.config)


def _completed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with those that adapters did not have yet when they were saved."""
    prefixes = {key.rpartition(".")[0] + "." for key in tensors}
    return tensors | {key: t for prefix in prefixes for key, t in newer_tensors(tensors, prefix).items()}


def _named_for(model: PreTrainedModel, tensors: dict[str, torch.Tensor], wanted: Collection[str]) -> Any:
    """The tensors as they are called in this class: a model without its head drops the prefix that the others have."""
    prefix = f"{model.base_model_prefix}."
    shorter = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    longer = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
    return next((each for each in (tensors, shorter, longer) if set(each) == set(wanted)), tensors)


def adapter_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """The shape of every adapter's tensors by their names in the model's state dict."""
    return {
        f"{name}.{ADAPTER_NAME}.{key}": tensor.shape
        for name, _, adapter in named_adapters(model)
        for key, tensor in adapter.state_dict().items()
    }


def _listed(names: list[str], values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {values[name]!r}" for name in names)
