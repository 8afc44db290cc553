"""Transformers' config classes read and write the `config.json` of converted models, once they have been taught.

Two methods of `PreTrainedConfig` are wrapped, once per process; for other models they work as before. Reading gives
the original's type, so that everything that looks at it (Auto classes, tokenizers, pipelines) finds what it knows.
Writing sets the marks again, so that a config which is saved alone does not pass for one of softmax attention.
"""

import functools
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hf_rfa.saving.marks import attends_by_rfa, marked, restored, write_code


def teach_configs() -> None:
    """Wrap the two methods, if they are not wrapped yet."""
    taught: Any = PreTrainedConfig
    if not hasattr(taught.to_json_file, "_hf_rfa"):
        taught.get_config_dict = classmethod(_reading(taught.get_config_dict.__func__))
        taught.to_json_file = _writing(taught.to_json_file)


def _reading(original: Any) -> Any:
    @functools.wraps(original)
    def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        values, unused = original(cls, *args, **kwargs)
        return restored(values), unused

    return get_config_dict


def _writing(original: Any) -> Any:
    @functools.wraps(original)
    def to_json_file(self: Any, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
        original(self, json_file_path, *args, **kwargs)
        if attends_by_rfa(self):
            path = Path(json_file_path)
            values = marked(json.loads(path.read_text(encoding="utf-8")), self)
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            write_code(path.parent)

    to_json_file._hf_rfa = True  # type: ignore[attr-defined]
    return to_json_file
