"""`save_pretrained` of a converted model, which a `Trainer` calls too."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_rfa.runtime.adapter import ADAPTER_NAME
from hf_rfa.runtime.record import RECORD
from hf_rfa.saving.base_model import describe_base, not_in_base, saved_nowhere
from hf_rfa.saving.conversion_files import write_conversion
from hf_rfa.saving.saved_files import forget_conversion, remove_lora

#: Arguments of a model's `save_pretrained` that concern the upload.
_UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "tags")


def save_with_conversion(
    model: Any, own: Callable[..., Any], save_directory: str | Path, *args: Any, **kwargs: Any
) -> None:  # fmt: skip
    """`save_pretrained` of a converted model: its class's own, then the conversion's files beside them."""
    kwargs |= dict(zip(list(inspect.signature(own).parameters)[1:], args, strict=False))  # given by position
    is_main_process, push_to_hub = kwargs.pop("is_main_process", True), kwargs.pop("push_to_hub", False)
    record, folder = model.__dict__.get(RECORD), Path(save_directory)
    if record is None:  # a part of a converted model, saved alone
        own(save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs)
        return
    upload = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs}
    if is_main_process:
        forget_conversion(folder)
    gathered = _of_adapters(kwargs.get("state_dict"))  # before saving, in which Transformers empties the dictionary
    own(save_directory, is_main_process=is_main_process, **kwargs)
    if not is_main_process:
        return
    only_lora = getattr(model, "_hf_peft_config_loaded", False)  # by `model.add_adapter`: no weights were written
    if not only_lora:
        remove_lora(folder)
    base = describe_base(model, folder) if only_lora else None
    weights = None if base is None else saved_nowhere(model, folder, not_in_base(model, base, folder))
    write_conversion(model, record, folder, base=base, weights=weights, state_dict=gathered)
    if push_to_hub:  # last: the class's own upload would leave the conversion out
        model.push_to_hub(upload.pop("repo_id", folder.name), **upload)


def _of_adapters(state_dict: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: tensor for name, tensor in (state_dict or {}).items() if f".{ADAPTER_NAME}." in name}
