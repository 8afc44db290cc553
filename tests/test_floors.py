"""No import runs up: the floors that docs/architecture.md lists, read from there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import paths
import pytest

import hf_rfa

PACKAGE = Path(hf_rfa.__file__).parent
ARCHITECTURE = paths.ROOT / "docs" / "architecture.md"


def floors() -> dict[str, int]:
    """Module or folder of the package -> its floor, from the ground up; "hf_rfa" is the package itself."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    listed = re.search(r"from the ground up:\n\n((?:    .+\n)+)", text)
    assert listed is not None
    names = [line.strip().split("  ")[0].split(", ") for line in listed[1].splitlines()]
    return {name: floor for floor, row in enumerate(names) for name in row}


def imported(path: Path) -> Iterator[str]:
    """Modules and folders of the package that a file imports, within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            rooms = {other.stem for other in PACKAGE.iterdir()}
            found = [node.module or ""]
            if node.module == "hf_rfa":
                found = [f"hf_rfa.{a.name}" if a.name in rooms else "hf_rfa" for a in node.names]
        for name in found:
            parts = name.split(".")
            if parts[0] == "hf_rfa":
                yield parts[1] if parts[1:] else "hf_rfa"


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_no_import_runs_up(name):
    known = floors()
    room = name.split("/")[0].removesuffix(".py")
    room = "hf_rfa" if room == "__init__" else room
    assert room in known, f"docs/architecture.md lists no floor for {room}"
    up = [other for other in imported(PACKAGE / name) if known[other] > known[room]]
    assert not up, f"{name} is on floor {known[room]} and imports {up}"


def test_every_listed_floor_is_there():
    there = {"hf_rfa", "scripts", *(name.split("/")[0].removesuffix(".py") for name in FILES)}
    assert set(floors()) <= there
