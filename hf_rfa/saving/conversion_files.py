"""The two files that hold a conversion, and nothing else of the model.

| file                    | holds                                                                             |
|-------------------------|-----------------------------------------------------------------------------------|
| `rfa_config.json`       | format version, the `RFAConfig`, the model's class, where its weights are, what    |
|                         | calibration found, what the dry run was told, which files lay beside              |
| `rfa_model.safetensors` | the adapters: omega, its draw number, alpha, gamma, proposal, exact heads; where   |
|                         | the weights lie elsewhere also those that are not there (new heads, resized        |
|                         | embeddings)                                                                        |

Format 2. A folder never answers with something that was not saved last, and never as softmax in silence:

- *Whole model*: both files beside `config.json` and weights. In `config.json` the field `rfa_config` repeats the
  conversion and names the digest of its tensors, so that a config which Transformers wrote later (of a reverted
  model) shows that the conversion is stale. Marks that no other program knows stand there too (`saving.marks`).
- *Without weights*, alone or beside a LoRA: `base` says where the base model is and what its config must be when it is
  built again; `beside` holds the hashes of a LoRA and of a whole model's config that lay there at the time.
- `rfa_config.json` is removed before anything is written and written last, so that an interrupted save leaves no
  conversion.

Format 1 had neither `base`, `beside`, `digest` nor the marks; folders of format 2 from before `saving.marks` have
`attn_implementation: "rfa"` alone. Both are read as they were.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_rfa.config import FORMAT_VERSION, RFAConfig
from hf_rfa.errors import CheckpointError
from hf_rfa.report import CalibrationReport
from hf_rfa.runtime.adapter import ADAPTER_NAME
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.record import CONFIG_FIELD
from hf_rfa.saving.marks import MARK, marked, marked_lora, names_conversion, write_code
from hf_rfa.saving.saved_files import (
    CONFIG_FILE,
    MODEL_CONFIG,
    PEFT_CONFIG,
    WEIGHTS_FILE,
    digest,
    fingerprints,
    forget_conversion,
    naming,
    read_json,
    read_tensors,
    write_json,
    write_whole,
)
from hf_rfa.saving.source import Source

#: Within that field: the digest of the conversion's tensors.
DIGEST_FIELD = "pair"
#: Before the names of the base model's own weights in the tensors' file.
WEIGHT_PREFIX = "base_model:"


@dataclass(frozen=True)
class Base:
    """Where a model without weights of its own gets them, and what its config must be then.

    Attributes:
        name: A folder or hub id; "." for the folder of the conversion; None if the model was not loaded from anywhere.
        config: As in `config.json`; None in format 1, which did not keep it.
    """

    name: str | None
    revision: str | None = None
    subfolder: str | None = None
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class SavedConversion:
    """The contents of the two files.

    Attributes:
        architecture, module: The model's class and the module that defines it ("" in format 1).
        tensors: The adapters', named as in the model's state dict.
        weights: Those of the model's own that its base model does not have, named in the same way.
        scope: What the caller of `convert` said of its dry run.
        base: Where the weights are; None: beside the conversion.
        beside: SHA-256 of the files that were saved with the conversion or lay there, by name; None in format 1.
        noted: The conversion as JSON.
        digest: Of the tensors; None in format 1.
    """

    config: RFAConfig
    architecture: str
    module: str
    tensors: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    report: CalibrationReport | None
    scope: dict[str, Any]
    base: Base | None
    beside: dict[str, str] | None
    noted: dict[str, Any]
    digest: str | None

    @property
    def is_whole(self) -> bool:
        """Whether the tensors are those that were saved with the config."""
        named = {f"{WEIGHT_PREFIX}{name}": tensor for name, tensor in self.weights.items()}
        return self.digest in (None, digest({**self.tensors, **named}))


def write_conversion(
    model: PreTrainedModel,
    record: Any,
    folder: Path,
    *,
    base: Base | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Write the conversion of a model into an existing folder, after all other files.

    Args:
        record: The model's `Conversion`.
        base: Where the weights are, if they are not in the folder.
        weights: Those that are not there either.
        state_dict: The gathered tensors of a model that is spread over processes.

    Raises:
        CheckpointError: The folder cannot be written, or the adapters are spread and `state_dict` lacks them.
    """
    tensors = adapter_tensors(model, state_dict)
    for name, tensor in (weights or {}).items():
        whole = _whole(name, tensor, state_dict or {})
        tensors[f"{WEIGHT_PREFIX}{name}"] = whole.detach().cpu().contiguous().clone()  # two of them may be tied
    found = digest(tensors)
    noted = record.config.to_dict()
    elsewhere = base is not None and base.name != "."
    with naming(folder):
        forget_conversion(folder)
        if base is not None and (folder / PEFT_CONFIG).exists():
            write_json(folder / PEFT_CONFIG, marked_lora(read_json(folder / PEFT_CONFIG)))
        write_whole(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        if base is None:
            config = read_json(folder / MODEL_CONFIG)
            config = {**config, CONFIG_FIELD: {**noted, DIGEST_FIELD: found}}
            write_json(folder / MODEL_CONFIG, marked(config, model.config))
            write_code(folder)
        described = {
            "format_version": FORMAT_VERSION,
            "rfa": noted,
            "digest": found,
            "architecture": type(model).__name__,
            "module": type(model).__module__,
            "base": None if base is None else vars(base),
            "beside": fingerprints(Source(str(folder)), model=elsewhere),
            "calibration": None if record.report is None else record.report.to_dict(),
            "scope": record.scope,
        }
        write_json(folder / CONFIG_FILE, described)


def adapter_tensors(model: PreTrainedModel, state_dict: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Every adapter's tensors, named as in the model's state dict; those that are spread out of `state_dict`."""
    return {
        name: _whole(name, tensor, state_dict or {}).detach().cpu().contiguous()
        for module, _, adapter in named_adapters(model)
        for key, tensor in adapter.state_dict().items()
        for name in (f"{module}.{ADAPTER_NAME}.{key}",)
    }


def read_conversion(source: Source) -> tuple[SavedConversion, Source]:
    """The conversion in `source`, and the source at the commit that it is of.

    Raises:
        CheckpointError: It is missing, damaged, newer, or not what was saved there last.
    """
    path = source.find(CONFIG_FILE)
    if path is None:
        raise CheckpointError(f"{source} holds no conversion: {CONFIG_FILE} is not there. {_advice(source)}")
    source = source.pinned(path)
    values = read_json(path)
    version = values.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{str(path)!r} has no `format_version`. Got {version!r}. Save the model again.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{str(path)!r} has format version {version}; this hf_rfa reads up to {FORMAT_VERSION}. Upgrade with `pip "
            "install -U hf_rfa`."
        )
    needed = ("rfa", "architecture") if version == 1 else ("rfa", "architecture", "digest", "base", "beside")
    missing = [key for key in needed if key not in values]
    if missing:
        raise CheckpointError(f"{str(path)!r} lacks {missing}. Got {sorted(values)}. Save the model again.")
    try:
        config = RFAConfig.from_dict(values["rfa"])
        found = values.get("calibration")
        report = None if found is None else CalibrationReport.from_dict(found)
        base = _base(values, source)
    except (TypeError, ValueError, AttributeError, KeyError) as error:  # ConfigError is a ValueError
        raise CheckpointError(f"The conversion in {str(path)!r} cannot be read: {error}") from error
    file = source.find(WEIGHTS_FILE)
    if file is None:
        raise CheckpointError(f"{source} lacks {WEIGHTS_FILE}, which holds the conversion. Save the model again.")
    tensors = read_tensors(file)
    names = [name for name in tensors if name.startswith(WEIGHT_PREFIX)]
    weights = {name.removeprefix(WEIGHT_PREFIX): tensors.pop(name) for name in names}
    saved = SavedConversion(
        config, values["architecture"], values.get("module", ""), tensors, weights, report, values.get("scope", {}),
        base, values.get("beside"), values["rfa"], values.get("digest"),
    )  # fmt: skip
    _refuse_stale(saved, source)
    return saved, source


def _base(values: dict[str, Any], source: Source) -> Base | None:
    if values["format_version"] > 1:
        return None if values["base"] is None else Base(**values["base"])
    return None if source.find(MODEL_CONFIG) is not None else Base(values.get("base_model_name_or_path"))


def _refuse_stale(saved: SavedConversion, source: Source) -> None:
    """Refuse a conversion beside which other files lie than those it was saved with."""
    if saved.base is None:
        path = source.find(MODEL_CONFIG)
        config = {} if path is None else read_json(path)
        field = dict(config.get(CONFIG_FIELD) or {})
        named = field.pop(DIGEST_FIELD, None)
        if path is None:
            raise CheckpointError(f"{source} lacks {MODEL_CONFIG} and so its model. Copy it there or save again.")
        if named is None:  # format 1, or `model.config.save_pretrained` of the converted model
            current = field == saved.noted or (saved.digest is None and not field)
        else:  # without the mark, Transformers loaded the model as softmax and saved it here
            current = named == saved.digest and all(config.get(key) == value for key, value in MARK.items())
        if not current:
            raise CheckpointError(
                f"{MODEL_CONFIG} in {source} does not belong to the conversion there: another model was saved over "
                f"it later. Load that one with its own class (remove {CONFIG_FILE} and {WEIGHTS_FILE}), or save the "
                "converted model again."
            )
    if saved.beside is not None:
        now = fingerprints(source, model=saved.base is not None and saved.base.name != ".")
        changed = sorted(name for name in {*now, *saved.beside} if now.get(name) != saved.beside.get(name))
        if changed:
            raise CheckpointError(
                f"{changed} in {source} changed after the conversion was saved there, so {CONFIG_FILE} and "
                f"{WEIGHTS_FILE} do not belong to it. Save the converted model again, or remove what is not wanted."
            )


def _advice(source: Source) -> str:
    inner = sorted(path.parent.name for path in source.folder.glob(f"*/{CONFIG_FILE}")) if source.folder else []
    if inner:
        return f"Its sub-folders {inner} do: pass one of them."
    config = source.find(MODEL_CONFIG)
    if config is not None and names_conversion(config):
        return (
            f"Its {MODEL_CONFIG} names one: copy {CONFIG_FILE} and {WEIGHTS_FILE} beside it, or save the model again."
        )
    return "Load the model with its own class and call `hf_rfa.convert(model)`."


def _whole(name: str, tensor: torch.Tensor, state_dict: dict[str, Any]) -> torch.Tensor:
    """The tensor, or its gathered twin where this process has only a part of it."""
    if not isinstance(tensor, DTensor):
        return tensor
    for key in (name, f"base_model.model.{name}"):
        twin = state_dict.get(key)
        if isinstance(twin, torch.Tensor) and not isinstance(twin, DTensor):
            return twin
    raise CheckpointError(
        f"{name} is spread over the processes. Got no gathered tensor of it. Pass `state_dict=` with all tensors, for "
        "example of `hf_rfa.training.sharded.full_state_dict(model)`."
    )


def as_json(config: Any) -> dict[str, Any]:
    """A model's config as `config.json` would hold it, without what hf_rfa notes there."""
    values: dict[str, Any] = json.loads(config.to_json_string())
    values.pop(CONFIG_FIELD, None)
    return values
