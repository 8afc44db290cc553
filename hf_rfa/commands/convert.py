"""`hf-rfa convert`: from a pretrained model to a folder with its conversion."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_rfa
from hf_rfa.commands.settings import ConvertSettings
from hf_rfa.data.documents import check_tokenizer, load_documents
from hf_rfa.data.sampled_rows import sampled_rows
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.devices import chosen_device
from hf_rfa.saving.card import write_card


def convert_folder(settings: ConvertSettings, say: Callable[[str], None]) -> PreTrainedModel:
    """Convert a model and save it with its tokenizer and a model card.

    Args:
        say: Gets a line at each step.

    Raises:
        ConfigError: The output is there already, or an option does not fit the model.
        UnsupportedModelError: The model cannot be converted.
        OSError: The model or the data cannot be read, or the output cannot be written.
    """
    output = Path(settings.output)
    _refuse_used(output)
    _refuse_unwritable(output)
    _refuse_missing(settings.model)
    started = time.monotonic()

    def tell(line: str) -> None:
        say(f"{time.monotonic() - started:6.1f} s  {line}")

    tell(f"Loading {settings.model}")
    model, tokenizer = _load(settings)
    if tokenizer is None:
        tell("There is no tokenizer beside the model, so none is saved.")
    batches: Any = True
    if settings.data is not None:
        tell(f"Reading {settings.data}")
        batches = _batches(settings, model, tokenizer)
    shown = f"{type(model).__name__} of {model.num_parameters() / 1e6:.1f}M parameters"
    tell(f"Converting a {shown}, calibrating on {settings.data or 'a text that it writes itself'}")
    hf_rfa.convert(model, settings.conversion, calibrate=batches, pattern=settings.pattern)
    tell(f"Saving to {output}")
    hf_rfa.save_pretrained(model, output)
    if settings.save_pattern is not None:
        hf_rfa.save_pattern(model, settings.save_pattern)
    if tokenizer is not None:
        tokenizer.save_pretrained(output)
    write_card(model, output, name=output.name)
    tell("Done")
    return model


def how_to_load(model: PreTrainedModel, output: str) -> str:
    """The lines that load what `convert_folder` wrote."""
    return (
        f'import hf_rfa\nmodel = hf_rfa.from_pretrained("{output}")\n'
        f'# or {type(model).__name__}.from_pretrained("{output}"), the Auto classes, a pipeline, ...:\n'
        "# with `import hf_rfa` anywhere in the process; without it the Auto classes with trust_remote_code=True"
    )


def _refuse_missing(model: str) -> None:
    """What can be no hub id and is no folder; Transformers would look for it on the hub, and say so."""
    if not Path(model).is_dir() and (Path(model).exists() or model.startswith((".", "/", "~"))):
        raise ConfigError(
            f"MODEL must be a folder of a pretrained model, or its hub id. Got {model!r}, which is no folder. Correct "
            "the path."
        )


def _refuse_unwritable(output: Path) -> None:
    """Before the model is converted, which may take long, and not after."""
    there = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"OUTPUT must be a folder that can be written. Got {str(output)!r}, and nothing can be written to "
            f"{str(there)!r}. Choose another place."
        )


def _refuse_used(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"OUTPUT must be a folder. Got the file {str(output)!r}. Choose another name.")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(
            f"OUTPUT must be a new or empty folder, so that nothing is overwritten. Got {str(output)!r}, which is not "
            "empty. Choose another name, or empty it."
        )


def _load(settings: ConvertSettings) -> tuple[PreTrainedModel, Any]:
    """The model by the class that it was saved as, and its tokenizer; None if it has none."""
    code, device = {"trust_remote_code": settings.trust_remote_code}, chosen_device(settings.device)
    config = AutoConfig.from_pretrained(settings.model, **code)
    named = (config.architectures or [""])[0]
    # A class of remote code is none of Transformers'.
    model_class: Any = getattr(transformers, named, None) or AutoModelForCausalLM
    options = code if model_class is AutoModelForCausalLM else {}
    model = model_class.from_pretrained(settings.model, dtype=settings.dtype, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model, **code)
    except (OSError, ValueError):
        if settings.data is not None:  # which needs one
            raise
        tokenizer = None
    return model.eval().to(device), tokenizer


def _batches(settings: ConvertSettings, model: PreTrainedModel, tokenizer: Any) -> list[Any]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and settings.context > limit:
        raise ConfigError(
            f"The model's positions end at {limit} (`max_position_embeddings`). Got a context of {settings.context}. "
            f"Set --context {limit}."
        )
    check_tokenizer(tokenizer, model)
    documents = load_documents(str(settings.data), "train", text_column=settings.text_column)
    rows = settings.batch_size * settings.calibration_batches
    drawn = sampled_rows(tokenizer, documents, settings.context, rows, settings.conversion.seed + 1)
    return list(drawn.split(settings.batch_size))
