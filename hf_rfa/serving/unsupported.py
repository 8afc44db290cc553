"""Fields that this server does not have: refused, unless they ask for nothing."""

from typing import Any


def refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...], advice: str) -> None:
    """Raise `ValueError` unless a field's value is null or one of `neutral`; true is not 1."""
    if value is not None and not any(
        isinstance(value, bool) == isinstance(each, bool) and value == each for each in neutral
    ):
        raise ValueError(f"`{name}` is not supported. Got {short(value)}. {advice}")


def short(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
