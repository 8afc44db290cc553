"""With hf_rfa imported, `from_pretrained` of Transformers' own classes loads converted models.

All of them (`AutoModelForCausalLM`, `LlamaForCausalLM`, a pipeline, lm-evaluation-harness, SentenceTransformers, ...)
end in `PreTrainedModel.from_pretrained`, which `teach_transformers` wraps once per process: a folder whose
`config.json` names a conversion is loaded as `hf_rfa.from_pretrained` does; others as before.
"""

import functools
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from hf_rfa.checkpoint import load_converted
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.record import IMPLEMENTATION, ORIGINAL
from hf_rfa.saving.config_json import teach_configs
from hf_rfa.saving.marks import names_conversion
from hf_rfa.saving.peft_files import teach_peft
from hf_rfa.saving.plain import loads_plainly
from hf_rfa.saving.saved_files import CONFIG_FILE, MODEL_CONFIG, PEFT_CONFIG
from hf_rfa.saving.source import Source


def teach_transformers() -> None:
    """Wrap what reads and writes models, if it is not wrapped yet."""
    teach_configs()
    taught: Any = PreTrainedModel
    if not hasattr(taught.from_pretrained, "_hf_rfa"):
        taught.from_pretrained = classmethod(_loading(taught.from_pretrained.__func__))


def _loading(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path
        if name is None or loads_plainly() or kwargs.get("gguf_file") is not None:
            return original(cls, name, *model_args, **kwargs)
        if "peft" in sys.modules:  # whoever loads a base may load a LoRA next
            teach_peft()
        lora = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")  # Auto classes look for one themselves
        _refuse_lora(Source.of(name if lora is None else lora, kwargs))
        source = Source.of(name, kwargs)
        if not _is_converted(source):
            return original(cls, name, *model_args, **kwargs)
        return _load(getattr(cls, ORIGINAL, cls), source, model_args, kwargs)

    from_pretrained._hf_rfa = True  # type: ignore[attr-defined]
    return from_pretrained


def _load(cls: Any, source: Source, model_args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if model_args:
        raise ConfigError(
            f"{source} holds a converted model, which takes options by name. Got {len(model_args)} arguments by "
            "position. Name them."
        )
    config = kwargs.get("config")
    asked = {kwargs.get("attn_implementation"), getattr(config, "_attn_implementation", None)}
    other = asked - {None, IMPLEMENTATION}
    if other:
        raise CheckpointError(
            f"{source} holds a converted model, which attends by random features. Got attn_implementation="
            f"{other.pop()!r}. Leave it out; `hf_rfa.revert(model)` gives softmax back."
        )
    if config is not None and not isinstance(config, PreTrainedConfig):  # the name of another folder
        kwargs["config"] = cls.config_class.from_pretrained(config)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("adapter_kwargs", "attn_implementation")}
    wants_info = kwargs.pop("output_loading_info", False)
    model, info, _ = load_converted(source, cls, kwargs)
    return (model, info) if wants_info else model


def _is_converted(source: Source) -> bool:
    """Whether the `config.json` in `source` names a conversion."""
    try:
        path = source.find(MODEL_CONFIG) if source.folder else _cached(source, MODEL_CONFIG)
    except OSError:
        return False  # Transformers says what is wrong with such a name
    return path is not None and names_conversion(path)


def _refuse_lora(source: Source) -> None:
    """Refuse a LoRA of a converted model: Transformers would put it on the softmax model that it was made from.

    Folders of this version say so themselves, those of older ones do not.
    """
    folder = source.folder
    if folder is not None and (folder / PEFT_CONFIG).exists() and (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{source} holds a LoRA of a converted model. Load it with `hf_rfa.from_pretrained`, which also finds its "
            "base."
        )


def _cached(source: Source, file: str) -> Path | None:
    found = cached_file(
        source.name, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False, **source.options,
    )  # fmt: skip
    return Path(found) if found else None
