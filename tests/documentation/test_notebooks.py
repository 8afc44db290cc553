"""The notebooks of examples/notebooks run to their end, without Jupyter, and are committed with what they show."""

import base64
import json
import re
import struct
import sys
import types
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from paths import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
PNG = b"\x89PNG\r\n\x1a\n"
LARGEST = 400_000  # bytes of a notebook


def cells_of(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def code_cells(name: str) -> list[dict]:
    return [cell for cell in cells_of(name) if cell["cell_type"] == "code"]


def images(cell: dict) -> list[bytes]:
    """The PNG images of a cell's committed outputs."""
    found = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    return [base64.b64decode("".join(image)) for image in found if image]


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """The files that a notebook has shown by IPython's Image, which comes with Jupyter and not with the tests."""
    files: list[str] = []

    def show(path: str, **size: int) -> None:
        assert Path(path).read_bytes().startswith(PNG)
        files.append(path)

    display = types.ModuleType("IPython.display")
    display.Image = show
    # Not its package: Matplotlib would take this for a session of IPython.
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return files


@pytest.mark.default_kept_keys
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_and_its_plots_are_committed(name, shown, monkeypatch, tmp_path):
    """In a folder that lies as the notebooks' own does, one cell after the other; a cell that plots has an image."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "stdlib-llama").symlink_to(ROOT / "examples" / "stdlib-llama")
    monkeypatch.chdir(tmp_path / "notebooks")
    plt.switch_backend("Agg")
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "__main__"}
    plots = 0
    for number, cell in enumerate(code_cells(name), start=1):
        exec(compile("".join(cell["source"]), f"{name}.ipynb, code cell {number}", "exec"), namespace)
        drawn = len(plt.get_fignums()) + len(shown)
        plt.close("all")
        shown.clear()
        assert len(images(cell)) == drawn, f"code cell {number} draws {drawn} plots"
        plots += drawn
    assert plots


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_is_committed_as_it_ran(name):
    """From the first cell to the last, in one go, without errors, with images that are some and not too large."""
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
    for image in (image for cell in cells for image in images(cell)):
        assert image.startswith(PNG)
        assert min(struct.unpack(">II", image[16:24])) > 100  # width and height
    size = (FOLDER / f"{name}.ipynb").stat().st_size
    assert size < LARGEST
    assert str(ROOT) not in (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_first_cell_says_what_it_takes(name):
    first = cells_of(name)[0]
    text = "".join(first["source"])
    assert first["cell_type"] == "markdown"
    assert text.startswith("# ")
    for what in ("minute", "core", "GB of memory", "no network", "parameters", "pip install"):
        assert what in text


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_its_links_lead_somewhere(name):
    text = "\n".join("".join(cell["source"]) for cell in cells_of(name) if cell["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert targets
    assert [target for target in targets if not (FOLDER / target).exists()] == []


def test_the_readme_names_all_of_them():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 4
    assert all(f"({name}.ipynb)" in text for name in NOTEBOOKS)
