"""`push_to_hub` of a converted model: all its files, and a model card that says how to load it."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi

from hf_rfa.runtime.record import RECORD
from hf_rfa.saving.card import CARD_FILE, write_card

#: Arguments of `push_to_hub` that describe the commit.
_COMMIT = ("commit_message", "commit_description", "create_pr")


def push_with_conversion(model: Any, own: Callable[..., Any], repo_id: str, **kwargs: Any) -> Any:
    """`push_to_hub` of a converted model, with the arguments and the answer of its class's own.

    Transformers would write a card of its own over ours. One that is in the repository already stays as it is.
    """
    if RECORD not in model.__dict__:  # a part of a converted model
        return own(repo_id, **kwargs)
    api = HfApi(library_name="hf_rfa", token=kwargs.pop("token", None))
    revision, tags = kwargs.pop("revision", None), kwargs.pop("tags", None) or []
    tags = [*(model.model_tags or []), *([tags] if isinstance(tags, str) else tags)]
    repo = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id=repo, branch=revision, exist_ok=True)
    commit: dict[str, Any] = {"commit_message": "Upload converted model"}
    commit |= {name: kwargs.pop(name) for name in _COMMIT if kwargs.get(name) is not None}
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, **kwargs)
        if not api.file_exists(repo, CARD_FILE, revision=revision):
            write_card(model, Path(folder), name=repo, tags=tags)
        return api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, **commit)
