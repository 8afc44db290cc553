"""PEFT models around a converted base save and load its conversion beside their adapters.

`PeftModel.save_pretrained` and `load_adapter` do not tell the base model the folder, so a `Trainer`, which calls them,
would lose the draw. `teach_peft` wraps them once per process; for other models they work as before.

PEFT that has not been taught refuses a folder that was saved with a conversion, because of the mark in its
`adapter_config.json` (`saving.marks`). Taught, it reads through the mark where the base is converted, and only there.
"""

import functools
import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.record import RECORD, base_model
from hf_rfa.saving.adapter_loading import take_over
from hf_rfa.saving.base_model import describe_base, not_in_base, saved_nowhere
from hf_rfa.saving.conversion_files import read_conversion, write_conversion
from hf_rfa.saving.marks import restored_lora
from hf_rfa.saving.plain import loads_plainly
from hf_rfa.saving.saved_files import CONFIG_FILE, forget_conversion
from hf_rfa.saving.source import Source

_reads_marked: ContextVar[bool] = ContextVar("reads_marked", default=False)


def teach_peft() -> None:
    """Wrap the methods, if PEFT is installed and they are not wrapped yet."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft import PeftConfig, PeftModel

    taught: Any = PeftModel
    if not hasattr(taught.save_pretrained, "_hf_rfa"):
        taught.save_pretrained = _saving(taught.save_pretrained)
        taught.load_adapter = _loading(taught.load_adapter)
        taught.from_pretrained = classmethod(_building(taught.from_pretrained.__func__))
        configs: Any = PeftConfig.__mro__[1]  # PeftConfigMixin, which all of PEFT's configs inherit
        configs.from_json_file = classmethod(_reading(configs.from_json_file.__func__))


@contextmanager
def reading_marked_loras() -> Iterator[None]:
    """Within, PEFT reads the `adapter_config.json` of a LoRA of a converted model: its base is one."""
    token = _reads_marked.set(True)
    try:
        yield
    finally:
        _reads_marked.reset(token)


def load_lora(model: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """`load_adapter` of a converted model itself: the LoRA's conversion replaces its own, as for a `PeftModel`."""
    name = args[0] if args else kwargs.get("peft_model_id")
    if name is None or loads_plainly() or not hasattr(model, RECORD):
        return own(*args, **kwargs)
    source = Source.of(name, {**kwargs, **(kwargs.get("adapter_kwargs") or {})})
    if source.find(CONFIG_FILE) is not None:
        take_over(model, *read_conversion(source), replace=not getattr(model, "_hf_peft_config_loaded", False))
    with reading_marked_loras():
        return own(*args, **kwargs)


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
        if source.find(CONFIG_FILE) is None:
            return original(self, *args, **kwargs)
        base = _require_converted(self, source)
        # The first adapter, and one that is loaded again (a resumed Trainer), replace the model's conversion; any
        # other must have the same one.
        take_over(base, *read_conversion(source), replace=values["adapter_name"] in self.peft_config)
        with reading_marked_loras():
            return original(self, *args, **kwargs)

    return load_adapter


def _building(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(cls, *args, **kwargs).arguments
        source = Source.of(given["model_id"], given.get("kwargs", {}))
        if source.find(CONFIG_FILE) is None:
            return original(cls, *args, **kwargs)
        _require_converted(given["model"], source)
        with reading_marked_loras():
            return original(cls, *args, **kwargs)

    return from_pretrained


def _reading(original: Any) -> Any:
    @functools.wraps(original)
    def from_json_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
        values = original(cls, *args, **kwargs)
        return restored_lora(values) if _reads_marked.get() or loads_plainly() else values

    return from_json_file


def _require_converted(model: Any, source: Source) -> PreTrainedModel:
    base = _converted_base(model)
    if base is None:
        raise CheckpointError(
            f"{source} was trained on a converted model. Got a base that attends by softmax. Load the folder with "
            "`hf_rfa.from_pretrained`, or call `hf_rfa.convert` on the base first."
        )
    return base


def _converted_base(model: Any) -> PreTrainedModel | None:
    try:
        base = base_model(model)
    except ConfigError:  # PEFT around a model that is not of Transformers
        return None
    return base if hasattr(base, RECORD) else None
