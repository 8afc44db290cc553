"""PEFT models around a converted base save and load its conversion beside their adapters.

`PeftModel.save_pretrained` and `load_adapter` do not tell the base model the folder, so a `Trainer`, which calls them,
would lose the draw. `teach_peft` wraps the two once per process; for other models they work as before.
"""

import functools
import importlib.util
import inspect
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.record import RECORD, base_model
from hf_rfa.saving.adapter_loading import take_over
from hf_rfa.saving.base_model import describe_base, not_in_base, saved_nowhere
from hf_rfa.saving.conversion_files import read_conversion, write_conversion
from hf_rfa.saving.saved_files import CONFIG_FILE, forget_conversion
from hf_rfa.saving.source import Source

logger = logging.getLogger(__name__)


def teach_peft() -> None:
    """Wrap the two methods of `PeftModel`, if PEFT is installed and they are not wrapped yet."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft import PeftModel

    taught: Any = PeftModel
    if not hasattr(taught.save_pretrained, "_hf_rfa"):
        taught.save_pretrained = _saving(taught.save_pretrained)
        taught.load_adapter = _loading(taught.load_adapter)


def save_peft(model: Any, folder: Path, base_revision: str | None) -> None:
    """Save a PEFT model around a converted base with its conversion."""
    model.save_pretrained(folder)
    if base_revision is not None:
        _write_conversions(model, base_model(model), _folders(model, folder, None), base_revision, None)


def _folders(model: Any, folder: Path, selected: list[str] | None) -> dict[str, Path]:
    """Where PEFT saves each adapter: "default" in the folder itself, others in sub-folders of their names."""
    names = list(model.peft_config) if selected is None else selected
    return {name: folder if name == "default" else folder / name for name in names}


def _write_conversions(
    model: Any, base: PreTrainedModel, folders: dict[str, Path], revision: str | None, state_dict: Any
) -> None:
    lacking = None
    for name, folder in folders.items():
        whence = describe_base(base, folder, revision or model.peft_config[name].revision)
        if lacking is None:  # the same for all of them
            lacking = not_in_base(base, whence, folder)
        weights = saved_nowhere(base, folder, lacking)
        write_conversion(base, getattr(base, RECORD), folder, base=whence, weights=weights, state_dict=state_dict)


def _saving(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        base = _converted_base(self)
        if base is None or not values["is_main_process"]:
            return original(self, *args, **kwargs)
        folders = _folders(self, Path(values["save_directory"]), values["selected_adapters"])
        for folder in folders.values():
            forget_conversion(folder)
        result = original(self, *args, **kwargs)
        _write_conversions(self, base, folders, None, values["kwargs"].get("state_dict"))
        return result

    save_pretrained._hf_rfa = True  # type: ignore[attr-defined]
    return save_pretrained


def _loading(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        source = Source.of(values["model_id"], values["kwargs"])
        if source.find(CONFIG_FILE) is not None:
            base = _converted_base(self)
            if base is None:
                logger.warning(
                    "%s was trained on a converted model, and this one attends by softmax. Load it with "
                    "`hf_rfa.from_pretrained`.",
                    source,
                )
            else:
                # The first adapter, and one that is loaded again (a resumed Trainer), replace the model's conversion;
                # any other must have the same one.
                take_over(base, *read_conversion(source), replace=values["adapter_name"] in self.peft_config)
        return original(self, *args, **kwargs)

    return load_adapter


def _converted_base(model: Any) -> PreTrainedModel | None:
    try:
        base = base_model(model)
    except ConfigError:  # PEFT around a model that is not of Transformers
        return None
    return base if hasattr(base, RECORD) else None
