"""Files of a saved model: written whole or not at all, identified by their hashes, removed when stale."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_rfa.errors import CheckpointError
from hf_rfa.saving.source import Source

logger = logging.getLogger(__name__)

#: The two files that hold a conversion.
CONFIG_FILE, WEIGHTS_FILE = "rfa_config.json", "rfa_model.safetensors"
#: Files that Transformers writes for a model, and PEFT for an adapter.
MODEL_CONFIG, PEFT_CONFIG = "config.json", "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Failures to write become a `CheckpointError` that names the folder."""
    try:
        yield
    except CheckpointError:  # is an OSError too
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write to {str(folder)!r}: {error}. Free some space or choose another folder."
        ) from error


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write the file under a temporary name and rename it: a crash leaves the old one, never half of a new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may save at once
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: dict[str, Any]) -> None:
    """`values` as a whole file."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error}. The file is damaged: save the model again."
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{str(path)!r} must hold a JSON object. Got a {type(values).__name__}. Save the model again."
        )
    return values


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; `CheckpointError` if it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error}. The file is truncated or damaged: copy or save it again."
        ) from error


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors' names, dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def fingerprints(source: Source, *, model: bool) -> dict[str, str]:
    """SHA-256 by name of the files that decide what loads beside a conversion.

    Args:
        model: Also hash the config of a whole model, if its weights are there. Without weights the config does not
            count: people put one beside a LoRA.
    """
    names = [*PEFT_WEIGHTS]
    if model and any(source.find(name) is not None for name in _MODEL_WEIGHTS):
        names.append(MODEL_CONFIG)
    found = {name: source.find(name) for name in names}
    return {name: _sha256(path) for name, path in found.items() if path is not None}


def forget_conversion(folder: Path) -> None:
    """Remove the conversion from a folder until a new one is whole: an interrupted save leaves none, not a mixture."""
    with naming(folder):
        (folder / CONFIG_FILE).unlink(missing_ok=True)


def remove_lora(folder: Path) -> None:
    """Remove a PEFT adapter from the folder: Transformers would apply it to the whole model that is there now."""
    stale = [folder / name for name in (PEFT_CONFIG, *PEFT_WEIGHTS) if (folder / name).is_file()]
    if stale:
        logger.warning(
            "%s now holds a whole model: removed %s of the PEFT model that was saved there before.",
            folder, ", ".join(path.name for path in stale),
        )  # fmt: skip
    with naming(folder):
        for path in stale:
            path.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
