"""`save_pretrained` of a converted model, and so what a `Trainer` writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_rfa.pair import write_pair
from hf_rfa.record import RECORD

#: Arguments of a model's `save_pretrained` that concern the upload.
_UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "tags")


def save_with_pair(
    model: Any, own: Callable[..., Any], save_directory: str | Path, is_main_process: bool = True,
    push_to_hub: bool = False, **kwargs: Any,
) -> None:  # fmt: skip
    """`save_pretrained` of a converted model: its class's own, then the pair of files beside it."""
    record = model.__dict__.get(RECORD)
    if record is None:  # a part of a converted model, saved alone
        own(save_directory, is_main_process=is_main_process, push_to_hub=push_to_hub, **kwargs)
        return
    upload = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs}
    own(save_directory, is_main_process=is_main_process, **kwargs)
    if not is_main_process:
        return
    write_pair(model, record.config, Path(save_directory), record.report, record.scope)
    if push_to_hub:  # only now: the class's own upload would leave the pair behind
        model.push_to_hub(upload.pop("repo_id", Path(save_directory).name), **upload)
