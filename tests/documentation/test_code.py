"""The code of the pages: all of it parses, the Python is run page by page, and commands have the options they name."""

import ast
import re
import shlex
import shutil
import subprocess

import matplotlib.pyplot as plt
import pytest
import torch
import typer
from markdown_pages import PAGES, blocks
from paths import ROOT

import hf_rfa.cli
from hf_rfa.calibration import self_text
from hf_rfa.registry import FEATURE_MAPS

#: Names in capitals that a reader replaces by his own.
PLACEHOLDER = re.compile(r"[\"'](FOLDER|MODEL|FOLDER_OR_HUB_ID|[^\"']*\bNAME\b[^\"']*)[\"']")
#: Pages whose Python is not run.
NOT_RUN = {"docs/triton.md": "needs a GPU"}
PYTHON = [block for page in PAGES for block in blocks(page, "python")]
SHELL = [block for page in PAGES for block in blocks(page, "bash", "sh")]
RUN = sorted(
    {block.page for block in PYTHON if block.page.startswith("docs/") or block.page == "README.md"} - set(NOT_RUN)
)


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_parses(block):
    ast.parse(block.code)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_parses(block):
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)


@pytest.mark.default_kept_keys
@pytest.mark.parametrize("page", RUN)
def test_python_runs(page, monkeypatch, tmp_path):
    """The blocks of a page one after the other, in a folder beside `examples`, as its reader runs them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for name, fewer in {
        "ROWS": 2,
        "LONGEST": 512,
        "PIECE": 128,
    }.items():  # or this takes minutes
        monkeypatch.setattr(self_text, name, fewer)
    maps = dict(FEATURE_MAPS)
    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    try:
        for block in blocks(page, "python"):
            if not block.note and not PLACEHOLDER.search(block.code):
                code = "\n" * (block.line - 1) + block.code
                exec(compile(code, str(ROOT / page), "exec"), namespace)
    finally:
        plt.close("all")
        FEATURE_MAPS.clear()
        FEATURE_MAPS.update(maps)


def commands(code: str) -> list[list[str]]:
    """The words of each command, without comments."""
    joined = code.replace("\\\n", " ")
    lines = [part for line in joined.splitlines() for part in re.split(r"&&|\|\||;|\|", line.split(" #")[0])]
    return [shlex.split(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def options_of_commands() -> dict[str, set[str]]:
    """Command of hf-rfa -> its options."""
    group = typer.main.get_command(hf_rfa.cli.app)
    return {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist_with_their_options(block):
    known = options_of_commands()
    for words in commands(block.code):
        if words[0] == "hf-rfa" and len(words) > 1:
            assert words[1] in known, words
            named = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
            assert named <= known[words[1]] | {"--help"}, words
        scripts = [word for word in words if re.fullmatch(r"(scripts|examples|tests)/[\w./-]+\.py", word)]
        assert all((ROOT / script).exists() for script in scripts), words


def test_what_is_not_run_has_code():
    assert set(NOT_RUN) <= {block.page for block in PYTHON}
    assert shutil.which("bash") is not None
