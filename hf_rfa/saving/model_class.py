"""The class of a saved model: Transformers' own, one registered with the Auto classes, or remote code."""

import importlib
import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from hf_rfa.errors import CheckpointError
from hf_rfa.saving.saved_files import MODEL_CONFIG, read_json
from hf_rfa.saving.source import Source


def find_class(architecture: str, module: str, weights: Source) -> type[PreTrainedModel]:
    """The class named `architecture`, defined in `module` ("" if that was not noted), of the model in `weights`.

    Raises:
        CheckpointError: It cannot be found; the message says what to do.
    """
    if not module or module.split(".")[0] == "transformers":
        found = getattr(transformers, architecture, None)
        if found is None and module:
            found = _imported(architecture, module)
        if found is not None:
            return found
    registered = [cls for cls in _registered() if cls.__name__ == architecture]
    for cls in sorted(registered, key=lambda cls: cls.__module__ != module):
        return cls
    reference = _remote_reference(architecture, weights)
    if reference is None:
        name = f"{module}.{architecture}" if module else architecture
        raise CheckpointError(
            f"{weights} was saved from a {name}, which is neither a class of Transformers {transformers.__version__} "
            f"nor registered. If it is yours, pass `from_pretrained(..., model_class={architecture})` or register it "
            f"(`AutoModelForCausalLM.register(YourConfig, {architecture})`). If it is newer, upgrade Transformers."
        )
    if not weights.code.get("trust_remote_code"):
        raise CheckpointError(
            f"{weights} was saved from a {architecture}, whose code lies beside the weights ({reference}). Read it, "
            "then pass `trust_remote_code=True`."
        )
    where = {key: value for key, value in weights.options.items() if key != "subfolder"}
    code = weights.code.get("code_revision")
    return get_class_from_dynamic_module(reference, weights.name, code_revision=code, **where)


def _imported(architecture: str, module: str) -> Any:
    try:
        return getattr(importlib.import_module(module), architecture, None)
    except ModuleNotFoundError:
        return None  # this version of Transformers has no such family: the caller says so


def _registered() -> Iterator[type[PreTrainedModel]]:
    """All classes that users have registered with an Auto class.

    Without those that Transformers registers when it loads remote code: another repository may have a class of the
    same name, and each repository must be trusted separately.
    """
    for name, mapping in vars(modeling_auto).items():
        if re.fullmatch(r"MODEL_.*MAPPING", name):
            for entry in mapping._extra_content.values():
                classes = entry if isinstance(entry, (tuple, list)) else [entry]
                yield from (cls for cls in classes if cls.__module__.split(".")[0] != TRANSFORMERS_DYNAMIC_MODULE_NAME)


def _remote_reference(architecture: str, weights: Source) -> str | None:
    """The entry of `auto_map` that names the class, as "file.Class" or "repository--file.Class"."""
    path = weights.find(MODEL_CONFIG)
    entries = {} if path is None else read_json(path).get("auto_map") or {}
    return next((ref for ref in entries.values() if isinstance(ref, str) and ref.endswith(f".{architecture}")), None)
