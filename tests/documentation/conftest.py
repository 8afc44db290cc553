"""Fixtures of the tests of pages."""

import importlib
from types import ModuleType

import paths
import pytest


@pytest.fixture
def pages(monkeypatch):
    """A function that imports a module of scripts/pages, as the site's build does."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(paths.SCRIPTS))
        return importlib.import_module(f"pages.{name}")

    return load


@pytest.fixture
def imported_script(monkeypatch):
    """A function that imports a script."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(paths.SCRIPTS))
        return importlib.import_module(name)

    return load
