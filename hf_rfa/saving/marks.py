"""What the files of a converted model say of it to programs that do not know hf_rfa: that they cannot load it.

`config.json` names an architecture of its own, so that whoever has no code for it refuses it instead of running
softmax attention with the weights that it recognises:

    "model_type": "hf_rfa"                  nobody else's: the Auto classes, vLLM, llama.cpp, MLX, ... stop here
    "auto_map": {"AutoConfig": ...}         with `trust_remote_code=True` the Auto classes run CODE_FILE, which imports
                                            hf_rfa; Transformers says `pip install hf_rfa` if that cannot be imported
    "attn_implementation": "rfa"            a model class named by hand (`LlamaForCausalLM`) does not know it either
    "rfa_original": {"type": "llama", ...}  what the first two were, for `restored`

`adapter_config.json` of a LoRA (any PEFT adapter) that belongs to a converted model has a sentence for a task type,
which PEFT shows when it refuses it.
"""

import json
from pathlib import Path
from typing import Any

from hf_rfa.runtime.record import CONFIG_FIELD, IMPLEMENTATION

MODEL_TYPE = "hf_rfa"
#: Where `config.json` keeps what it said before. (No key "model_type" in it: Transformers looks for a nested config
#: of the wanted type under that name.)
ORIGINAL_FIELD = "rfa_original"
#: What `config.json` says that the model attends with: the name of hf_rfa's attention function.
MARK = {"attn_implementation": IMPLEMENTATION}
CODE_FILE = "hf_rfa_conversion.py"
CODE = '''"""The attention of this model was converted by hf_rfa, which runs it: `pip install hf_rfa`.

With `import hf_rfa` the folder loads by `hf_rfa.from_pretrained` and by every class of Transformers; without that
line by the Auto classes with `trust_remote_code=True`, which read this file.
"""

from hf_rfa.remote_code import ConvertedConfig  # noqa: F401
'''
_REFERENCE = f"{CODE_FILE.removesuffix('.py')}.ConvertedConfig"
_TASK_TYPE = (
    "(of a model that hf_rfa converted: `pip install hf_rfa`, then load this folder by "
    "`hf_rfa.from_pretrained(folder)`)"
)
_TASK_FIELD = "hf_rfa_task_type"


def attends_by_rfa(config: Any) -> bool:
    """Whether a config is that of a converted model in memory, or was read from a folder of one."""
    return hasattr(config, CONFIG_FIELD) and any(
        part._attn_implementation == IMPLEMENTATION for part in (config, *_parts(config).values())
    )


def marked(values: dict[str, Any], config: Any) -> dict[str, Any]:
    """The content of `config.json` with the marks of a converted model; doing it again changes nothing."""
    values = {**values, **MARK}
    for name, part in _parts(config).items():  # a class for one part alone (text without images) reads its part
        if part._attn_implementation == IMPLEMENTATION and isinstance(values.get(name), dict):
            values[name] = {**values[name], **MARK}
    if values.get("model_type") == MODEL_TYPE:
        return values
    references = dict(values.get("auto_map") or {})
    original = {"type": values.get("model_type"), "AutoConfig": references.get("AutoConfig")}
    references["AutoConfig"] = _REFERENCE
    return {**values, "model_type": MODEL_TYPE, "auto_map": references, ORIGINAL_FIELD: original}


def restored(values: dict[str, Any]) -> dict[str, Any]:
    """The content of `config.json` as hf_rfa reads it: of the original's type; what it says of its attention stays."""
    if values.get("model_type") != MODEL_TYPE:
        return values
    values = dict(values)
    original = values.pop(ORIGINAL_FIELD)
    references = {key: value for key, value in values.pop("auto_map").items() if key != "AutoConfig"}
    if original["AutoConfig"] is not None:
        references["AutoConfig"] = original["AutoConfig"]
    values["model_type"] = original["type"]
    return {**values, "auto_map": references} if references else values


def write_code(folder: Path) -> None:
    """Write the file that `trust_remote_code=True` runs."""
    (folder / CODE_FILE).write_text(CODE, encoding="utf-8")


def marked_lora(values: dict[str, Any]) -> dict[str, Any]:
    """The content of `adapter_config.json` with the mark of a LoRA of a converted model."""
    if values.get("task_type") == _TASK_TYPE:
        return values
    mapping = {**(values.get("auto_mapping") or {}), _TASK_FIELD: values.get("task_type")}
    return {**values, "task_type": _TASK_TYPE, "auto_mapping": mapping}


def restored_lora(values: dict[str, Any]) -> dict[str, Any]:
    """The content of `adapter_config.json` as PEFT wrote it."""
    if values.get("task_type") != _TASK_TYPE:
        return values
    mapping = dict(values["auto_mapping"])
    return {**values, "task_type": mapping.pop(_TASK_FIELD), "auto_mapping": mapping or None}


def names_conversion(path: Path) -> bool:
    """Whether a `config.json` is that of a converted model, of this or an older version of hf_rfa."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # Transformers says what is wrong with it
    return isinstance(values, dict) and CONFIG_FIELD in values


def _parts(config: Any) -> dict[str, Any]:
    """The config objects inside one, one level deep, by the names that they have there."""
    named = {name: getattr(config, name, None) for name in config.sub_configs}
    return {name: part for name, part in named.items() if part is not None}
