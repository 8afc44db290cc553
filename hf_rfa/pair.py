"""The pair of files that holds a conversion, and nothing else of the model.

| file                    | holds                                                                             |
|-------------------------|-----------------------------------------------------------------------------------|
| `rfa_config.json`       | format version, the `RFAConfig`, the model's class, where the base model is from,  |
|                         | what calibration found, what the dry run was told                                  |
| `rfa_model.safetensors` | the adapters: omega, its draw number, alpha, gamma, proposal, exact heads         |
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import cached_file

from hf_rfa.adapter import ADAPTER_NAME, named_adapters
from hf_rfa.calibration.report import CalibrationReport
from hf_rfa.config import FORMAT_VERSION, RFAConfig
from hf_rfa.errors import CheckpointError

CONFIG_FILE, WEIGHTS_FILE = "rfa_config.json", "rfa_model.safetensors"
#: Where the conversion is noted in the model's own config, which its `save_pretrained` writes.
CONFIG_FIELD = "rfa_config"


@dataclass(frozen=True)
class SavedPair:
    """What the pair says: the conversion, the model's class, the base model's name, the adapters' tensors, and what
    the caller of `convert` said of its dry run."""

    config: RFAConfig
    architecture: str
    origin: str | None
    tensors: dict[str, torch.Tensor]
    report: CalibrationReport | None
    scope: dict[str, Any]


def write_pair(
    model: PreTrainedModel, config: RFAConfig, folder: Path, report: CalibrationReport | None, scope: dict[str, Any]
) -> None:
    """Write the pair of files of a converted model into an existing folder."""
    described = {
        "format_version": FORMAT_VERSION,
        "rfa": config.to_dict(),
        "architecture": type(model).__name__,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "calibration": None if report is None else report.to_dict(),
        "scope": scope,
    }
    try:
        save_file(adapter_tensors(model), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot write to {str(folder)!r}: {error}. Free some space or choose another folder."
        ) from error


def adapter_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every adapter's tensors, named as in the model's state dict."""
    return {
        f"{name}.{ADAPTER_NAME}.{key}": tensor.detach().cpu().contiguous()
        for name, _, adapter in named_adapters(model)
        for key, tensor in adapter.state_dict().items()
    }


def read_pair(name: str) -> SavedPair:
    """The pair of files in a folder or hub repository; `CheckpointError` if it is missing, damaged or newer."""
    path = find_file(name, CONFIG_FILE)
    if path is None:
        raise CheckpointError(
            f"{name!r} holds no conversion: {CONFIG_FILE} is not there. Load the model with its own class and call "
            "`hf_rfa.convert(model)`."
        )
    values = _read_json(path)
    version = values.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{str(path)!r} has no `format_version`. Got {version!r}. Save the model again.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format version {version}; this hf_rfa reads up to {FORMAT_VERSION}. Upgrade with `pip "
            "install -U hf_rfa`."
        )
    missing = [key for key in ("rfa", "architecture") if key not in values]
    if missing:
        raise CheckpointError(f"{str(path)!r} lacks {missing}. Got {sorted(values)}. Save the model again.")
    try:
        parsed = RFAConfig.from_dict(values["rfa"])
        found = values.get("calibration")
        report = None if found is None else CalibrationReport.from_dict(found)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # ConfigError is a ValueError
        raise CheckpointError(f"The conversion in {str(path)!r} cannot be read: {error}") from error
    weights = find_file(name, WEIGHTS_FILE)
    if weights is None:
        raise CheckpointError(f"{name!r} lacks {WEIGHTS_FILE}, which holds the conversion. Save the model again.")
    return SavedPair(
        parsed, values["architecture"], values.get("base_model_name_or_path"), _read_tensors(weights), report,
        values.get("scope", {}),
    )  # fmt: skip


def find_file(name: str, file: str) -> Path | None:
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


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error}. The file is truncated or damaged: copy or save it again."
        ) from error
