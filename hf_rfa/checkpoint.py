"""Saving and loading a converted model. What was added to it has two small files of its own (see
`saving.conversion_files`), beside the model's weights or without them; a converted model's own `save_pretrained`, and
so a `Trainer`, writes them too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from hf_rfa.conversion.attach import swap_attention
from hf_rfa.conversion.example_inputs import rebuild
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.devices import execution_device
from hf_rfa.runtime.record import (
    CONFIG_FIELD,
    RECORD,
    base_model,
    conversion_config,
    is_sentence_transformer,
    wrapped_models,
)
from hf_rfa.saving.adapter_loading import load_adapters
from hf_rfa.saving.base_model import describe_base, load_base, not_in_base, saved_nowhere
from hf_rfa.saving.conversion_files import SavedConversion, read_conversion, write_conversion
from hf_rfa.saving.peft_files import save_peft, teach_peft
from hf_rfa.saving.saved_files import CONFIG_FILE, PEFT_CONFIG, WEIGHTS_FILE, naming
from hf_rfa.saving.source import HUB_OPTIONS, Source


def save_pretrained(
    model: nn.Module, folder: str | Path, *, adapter_only: bool = False, base_revision: str | None = None
) -> None:
    """Save a converted model so that `hf_rfa.from_pretrained(folder)` gives identical logits.

    A SentenceTransformer is saved whole, and `SentenceTransformer(folder)` loads it with its conversion
    (`from_pretrained` the Transformers model in it).

    Files of hf_rfa or PEFT in the folder that do not belong to this model are removed or refused.

    Args:
        model: A converted model. Of a PEFT model the LoRA is saved beside the conversion, not the base weights.
        folder: Made if it does not exist.
        adapter_only: Only the conversion's two files (a few kB per layer; with new heads and resized embeddings,
            which the base model does not have, but not with other changes to its weights). The base model is then
            found again under the name or path that it was loaded from.
        base_revision: Of the base model, where the weights are left out: Transformers does not remember which one it
            loaded. None: the one that `hf_rfa.from_pretrained` loaded, that of the PEFT config, or the main one.

    Raises:
        UnsupportedModelError: The model is not converted.
        CheckpointError: The folder cannot be written; or, without the weights, the model was not loaded from anywhere.

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
    conversion_config(model)  # raises if it is not converted
    base, peft, folder = base_model(model), _peft_model(model), Path(folder)
    only_lora = peft is not None or getattr(base, "_hf_peft_config_loaded", False)
    if (adapter_only or only_lora) and not getattr(base.config, "_name_or_path", ""):
        raise CheckpointError(
            "Without the weights, the base model must be found again, but this one was not loaded from a folder or "
            "the hub. Save the whole model: `save_pretrained(model, folder)`, for PEFT after `merge_and_unload()`."
        )
    if adapter_only:
        _save_conversion_alone(base, folder, base_revision)
        return
    pipeline: Any = next((m for m in wrapped_models(model) if is_sentence_transformer(m)), None)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if pipeline is not None:
            pipeline.save_pretrained(str(folder))
        elif peft is None:
            base.save_pretrained(folder)
        else:
            save_peft(peft, folder, base_revision)


def from_pretrained(
    folder_or_id: str | Path,
    *,
    model_class: type[PreTrainedModel] | None = None,
    output_loading_info: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model with its conversion, from a folder or the hub.

    With hf_rfa imported, the classes of Transformers (`AutoModelForCausalLM.from_pretrained`, ...) load a whole model
    in the same way; here a conversion without weights and a LoRA load, too.

    Args:
        folder_or_id: A folder or hub id that `hf_rfa.save_pretrained`, `model.save_pretrained`, a PEFT model or a
            `Trainer` wrote.
        model_class: Of a model whose class is neither of Transformers nor registered with the Auto classes.
        output_loading_info: Return `(model, info)` as Transformers does.
        kwargs: Passed to the model class's `from_pretrained` (dtype, device_map, ...). `revision`, `subfolder`,
            `cache_dir`, `token`, `local_files_only`, `force_download`, `proxies` and `trust_remote_code` hold for
            every file: the conversion, the weights, a LoRA. A base model that lies elsewhere is loaded at the
            revision that was saved.

    Returns:
        The converted model, of its own class; a PEFT model if the folder holds a LoRA.

    Raises:
        CheckpointError: No conversion there, or it is damaged, does not fit the model, is newer than this hf_rfa, or
            something else was saved over it.

    Example: see `save_pretrained`.
    """
    model, info, source = load_converted(Source.of(folder_or_id, kwargs), model_class, kwargs)
    lora = source.find(PEFT_CONFIG)
    if lora is not None and not getattr(model, "_hf_peft_config_loaded", False):
        from peft import PeftModel

        # From the folder that all its files were found in: PEFT's own look-ups do not follow every option.
        model = PeftModel.from_pretrained(model, str(lora.parent))
    return (model, info) if output_loading_info else model


def load_converted(
    source: Source, model_class: type[PreTrainedModel] | None, kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], Source]:
    """The converted model in `source`, Transformers' loading info, and the source at its commit.

    Args:
        model_class: Another class of the same weights (with another head, or without one); None: the saved one.
        kwargs: Those of `from_pretrained`.

    Raises:
        CheckpointError: see `from_pretrained`.
    """
    saved, source = read_conversion(source)
    if source.find(PEFT_CONFIG) is not None:
        teach_peft()
    loaded = load_base(saved, source, model_class, kwargs)
    return _converted(loaded.model, saved, source), loaded.info, source


def holds_conversion(folder_or_id: str | Path, **kwargs: Any) -> bool:
    """Whether there is a conversion in a folder or hub repository; `kwargs`: `revision`, `subfolder`, ..."""
    return Source.of(folder_or_id, kwargs).find(CONFIG_FILE) is not None


def load_any(folder_or_id: str | Path, **kwargs: Any) -> Any:
    """A causal LM, with its conversion where there is one; `kwargs` go to `from_pretrained`.

    Raises:
        CheckpointError: the model cannot be found, the conversion is damaged, or the config names one whose files are
            not there.

    Example:
        >>> from hf_rfa.evaluation.compare import default_model
        >>> type(load_any(default_model())).__name__
        'LlamaForCausalLM'
    """
    if holds_conversion(folder_or_id, **kwargs):
        return from_pretrained(folder_or_id, **kwargs)
    place = {key: value for key, value in kwargs.items() if key in HUB_OPTIONS}
    try:
        config = transformers.AutoConfig.from_pretrained(folder_or_id, **place)
    except OSError as error:
        raise CheckpointError(f"{Source.of(folder_or_id, kwargs)} cannot be loaded: {error}") from error
    if hasattr(config, CONFIG_FIELD):
        raise CheckpointError(
            f"{Source.of(folder_or_id, kwargs)} was converted, but {CONFIG_FILE} is not there: it would run softmax "
            f"attention. Copy {CONFIG_FILE} and {WEIGHTS_FILE} beside the weights, or save the model again."
        )
    return transformers.AutoModelForCausalLM.from_pretrained(folder_or_id, **kwargs).eval()


def load_tokenizer(folder_or_id: str | Path, **kwargs: Any) -> Any:
    """The tokenizer beside a model; `kwargs` go to `AutoTokenizer.from_pretrained`.

    Raises:
        CheckpointError: There is none; `hf_rfa.save_pretrained` writes the model alone.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder_or_id, **kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{Source.of(folder_or_id, kwargs)} has no tokenizer that can be loaded, so that it reads no text. Got: "
            f"{' '.join(str(error).split())} Save the original's beside the model: "
            "`AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER)`."
        ) from error


def _converted(model: PreTrainedModel, saved: SavedConversion, source: Source) -> PreTrainedModel:
    try:
        given = saved.scope.get("example_inputs")
        inputs = None if given is None else rebuild(given, execution_device(model))
        swap_attention(model, saved.config, example_inputs=inputs, submodels=saved.scope.get("parts"))
    except ConfigError as error:
        raise CheckpointError(f"The conversion in {source} does not fit the model: {error}") from error
    load_adapters(model, saved, source)
    return model


def _save_conversion_alone(base: PreTrainedModel, folder: Path, revision: str | None) -> None:
    described = describe_base(base, folder, revision)
    if (folder / PEFT_CONFIG).exists():
        raise CheckpointError(
            f"{str(folder)!r} holds a LoRA, which would not belong to the conversion alone. Choose another folder, or "
            "save the PEFT model."
        )
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        weights = saved_nowhere(base, folder, not_in_base(base, described, folder))
        write_conversion(base, getattr(base, RECORD), folder, base=described, weights=weights)


def _peft_model(model: Any) -> Any:
    """The PEFT model within distributed or compiled wrappers; None if there is none."""
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            return model
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    return None
