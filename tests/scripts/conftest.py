"""Fixtures of the tests of scripts."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import paths
import pytest
import torch


@pytest.fixture
def imported(monkeypatch) -> Iterator[Callable[..., ModuleType]]:
    """A function that imports a script as it is when it is run: from its own folder. The next test finds it new."""
    threads = torch.get_num_threads()

    def load(name: str, folder: Path = paths.SCRIPTS) -> ModuleType:
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)
    for name, module in list(sys.modules.items()):
        if paths.SCRIPTS in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]
