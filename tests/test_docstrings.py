"""Every public name explains itself by an example. (The examples run as doctests, see conftest.py.)"""

import doctest
import inspect

import pytest

import hf_rfa

# Raised or returned, not called by a user.
WITHOUT_EXAMPLE = {"CalibrationReport", "KeptTokens", *(name for name in hf_rfa.__all__ if name.endswith("Error"))}


def examples(name):
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(getattr(hf_rfa, name), name=name, globs={}) if test.examples]


@pytest.mark.parametrize("name", sorted(set(hf_rfa.__all__) - WITHOUT_EXAMPLE))
def test_a_public_name_has_an_example(name):
    thing = getattr(hf_rfa, name)
    # `from_pretrained` is shown where the folder is made.
    shown = examples(name) or (
        name == "from_pretrained" and "hf_rfa.from_pretrained(" in hf_rfa.save_pretrained.__doc__
    )
    assert shown, f"hf_rfa.{name} has no example"
    assert callable(thing)


@pytest.mark.parametrize("name", hf_rfa.__all__)
def test_every_public_name_is_documented(name):
    thing = getattr(hf_rfa, name)
    assert inspect.getdoc(thing), name
    assert thing.__doc__ is not None, f"{name} inherits its docstring"


def test_errors_can_be_caught_by_their_common_class_and_by_pythons_own():
    kinds = {"ConfigError": ValueError, "CheckpointError": OSError, "UnsupportedModelError": NotImplementedError,
             "StaleStateError": RuntimeError}  # fmt: skip
    for name, builtin in kinds.items():
        assert issubclass(getattr(hf_rfa, name), hf_rfa.RFAError)
        assert issubclass(getattr(hf_rfa, name), builtin)


def test_public_names_are_sorted_and_exist():
    assert hf_rfa.__all__ == sorted(hf_rfa.__all__)
    assert all(hasattr(hf_rfa, name) for name in hf_rfa.__all__)
