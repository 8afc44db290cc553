"""`ModelSaver`: what stands in for a converted model's own `save_pretrained`."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_rfa.adapter import ADAPTER_NAME
from hf_rfa.base_model import describe_base, not_in_base, saved_nowhere
from hf_rfa.pair import write_pair
from hf_rfa.peft_files import teach_peft
from hf_rfa.saved_files import forget_pair, remove_lora

#: Arguments of a model's `save_pretrained` that concern the upload.
_UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "tags")


class ModelSaver:
    """The class's own `save_pretrained`, then the pair of files beside what it wrote.

    An object and not a closure, so that the model pickles and copies; it does not keep the model alive.
    """

    def __init__(self, model: PreTrainedModel, record: Any) -> None:
        self._model, self.record = weakref.ref(model), record  # `config` and `report` as they will be then
        teach_peft()  # here, because whoever has a converted model has one of these

    @property
    def model(self) -> PreTrainedModel:
        """The converted model."""
        model = self._model()
        if model is None:
            raise ReferenceError("The model whose `save_pretrained` this was is gone. Keep the model, not its method.")
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "record": self.record}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self.record = weakref.ref(state["model"]), state["record"]
        teach_peft()

    def __call__(
        self, save_directory: str | Path, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        model, folder = self.model, Path(save_directory)
        original = type(model).save_pretrained
        upload = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs}
        if is_main_process:
            forget_pair(folder)
        gathered = _of_adapters(kwargs.get("state_dict"))  # now: Transformers empties the dictionary as it saves
        original(model, save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        only_lora = getattr(model, "_hf_peft_config_loaded", False)  # by `model.add_adapter`: no weights were written
        if not only_lora:
            remove_lora(folder)
        base = describe_base(model, folder) if only_lora else None
        weights = None if base is None else saved_nowhere(model, folder, not_in_base(model, base, folder))
        write_pair(model, self.record, folder, base=base, weights=weights, state_dict=gathered)
        if push_to_hub:  # only now: the class's own upload would leave the pair behind
            model.push_to_hub(upload.pop("repo_id", folder.name), **upload)


def _of_adapters(state_dict: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: tensor for name, tensor in (state_dict or {}).items() if f".{ADAPTER_NAME}." in name}
