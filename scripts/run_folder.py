"""The folder of a run: its settings are written once, and another run is not put over them."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.options import Settings

SETTINGS_FILE = "settings.json"


def settle(
    options: Settings, output: Path, *, resume: bool, may_change: Collection[str], missing: Mapping[str, Any]
) -> None:
    """Writes the settings to `output/settings.json`; settings that are there already must be those of the same run.

    Args:
        may_change: Options that may differ when a run is resumed.
        missing: Values of options that an earlier version of the run did not have, where they are not the defaults.

    Raises:
        ConfigError: another run lies in the folder, or this one and `resume` was not set.
        CheckpointError: the folder cannot be written.
    """
    path, settings = output / SETTINGS_FILE, options.to_dict()
    if path.exists():
        if not resume:
            raise ConfigError(
                f"{str(output)!r} holds a run already. Go on with it by resume=true, or choose another `output`."
            )
        # Other options that the version of that run did not have were at their defaults. Strings are read.
        saved = json.loads(path.read_text(encoding="utf-8"))
        before = type(options).from_dict({**missing, **saved}, source=str(path)).to_dict()
        other = {name: before[name] for name in settings if name not in may_change}
        other = {name: value for name, value in other.items() if value != settings[name]}
        if other:
            raise ConfigError(
                f"{str(output)!r} holds a run with other settings: {other}. Got "
                f"{ {name: settings[name] for name in other} }. Resume with its own, or choose another `output`."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {str(output)!r}: {error}. Choose another `output` or get the permission."
        ) from error
