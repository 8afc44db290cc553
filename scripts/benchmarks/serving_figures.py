"""The figures of the server's benchmark: printed as they come, kept in a folder, parts of several runs together."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_rfa.errors import ConfigError

TITLES = (
    "prompt", "requests", "", "seconds", "prompt tokens/s", "tokens/s", "per token, all together",
    "first token, wall", "KiB a sequence",
)  # fmt: skip
_LOAD = ("prompt", "requests", "model")


class Figures:
    """Rows of figures, and the settings that all of them were measured with.

    Attributes:
        rows: JSON-ready, one for each load and model.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], command: str) -> None:
        """Go on with the rows in `folder`, if it has some; nothing is kept without a folder.

        Raises:
            ConfigError: Those were measured with other settings.
        """
        self._folder, self._settings, self._command = folder, dict(settings), command
        self.rows: list[dict[str, Any]] = []
        before = None if folder is None else folder / "serving.json"
        if before is not None and before.exists():
            found = json.loads(before.read_text())
            other = {key: value for key, value in found["settings"].items() if settings.get(key) != value}
            if other:
                raise ConfigError(
                    f"The figures in {str(before)!r} were measured with other settings, so that these cannot stand "
                    f"beside them. Got {other} there. Choose another --output."
                )
            self.rows = found["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """Print and keep a row; one of the same load and model from before makes way for it."""
        print(_line(row), flush=True)
        self.rows = [each for each in self.rows if any(each[key] != row[key] for key in _LOAD)]
        self.rows.append({**row, "command": self._command})
        self.rows.sort(key=lambda each: (each["prompt"], each["requests"]))  # stable: the original comes first
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            kept = {"settings": self._settings, "rows": self.rows}
            (self._folder / "serving.json").write_text(json.dumps(kept, indent=1) + "\n")
            (self._folder / "serving.md").write_text(self._page())

    def head(self) -> str:
        """What the table begins with."""
        return f"| {' | '.join(TITLES)} |\n|---:|---:|---|{'---:|' * (len(TITLES) - 3)}"

    def _page(self) -> str:
        said = ", ".join(f"{key} {value}" for key, value in self._settings.items() if value is not None)
        commands = dict.fromkeys(row["command"] for row in self.rows)
        lines = [*(f"    {command}" for command in commands), "", said, "", self.head()]
        return "\n".join([*lines, *(_line(row) for row in self.rows), ""])


def _line(row: Mapping[str, Any]) -> str:
    cells = [row["prompt"], row["requests"], row["model"]]
    if "seconds" in row:
        together = row["together"]
        cells += [
            f"{row['seconds']:.1f}", f"{row['prompt_tokens_per_second']:.0f}", f"{row['tokens_per_second']:.2f}",
            "" if together is None else f"{together:.3f}", f"{row['first_token']:.1f}",
        ]  # fmt: skip
    else:
        cells += ["does not fit", "", "", "", ""]
    return "| " + " | ".join(map(str, [*cells, f"{row['bytes'] / 1024:.0f}"])) + " |"
