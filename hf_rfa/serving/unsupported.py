"""Fields that this server does not have: refused, unless they ask for nothing."""

import reprlib
from typing import Any

from hf_rfa.serving.faults import FieldError

_SHORT = reprlib.Repr()  # bounded in depth too: the plain `repr` of deeply nested lists fails
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...], advice: str) -> None:
    """Raise `FieldError` unless a field's value is null or one of `neutral`; true is not 1."""
    if value is not None and not any(
        isinstance(value, bool) == isinstance(each, bool) and value == each for each in neutral
    ):
        raise FieldError(name, f"`{name}` is not supported. Got {short(value)}. {advice}")


def short(value: Any) -> str:
    """A value as messages show it."""
    return _SHORT.repr(value)
