"""Values of an annotated type: checked, read from text, described, and made ready for JSON.

Known are bool, int, float, str, Path, None, `Literal`, unions of these, `tuple[X, ...]` or `Sequence[X]`, and pairs
`tuple[X, Y]`. A list is written with commas, a pair with a colon: `3:1,2:0` is ((3, 1), (2, 0)).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "none"}
_MANY = {bool: "truth values", int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


def convert(kind: Any, value: Any, *, text: bool) -> Any:
    """`value` as `kind` has it: lists become tuples, whole numbers floats.

    Args:
        text: Strings are read, as from a command line; otherwise they are strings.

    Raises:
        ValueError: It is none of the kind.
    """
    origin, inner = _taken_apart(kind)
    if origin in (Union, UnionType):
        if text and value == "" and str not in inner:  # of no member: an empty list is asked for in words
            raise ValueError(value)
        return _first(sorted(inner, key=_order), value, text)
    if origin is Literal:
        for choice in inner:
            if (type(choice) is type(value) and choice == value) or (text and str(choice) == value):
                return choice
        raise ValueError(value)
    if origin is tuple:
        return _sequence(inner, value, text)
    if text and isinstance(value, str):
        return _read(kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, os.PathLike):
        return Path(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(value)
    return value


def _taken_apart(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    origin, inner = get_origin(kind), get_args(kind)
    return (tuple, (*inner, Ellipsis)) if origin is Sequence else (origin, inner)


def _order(kind: Any) -> int:
    """In a union a text is what the narrowest of its members makes of it; any text is a str."""
    order = [NoneType, bool, int, float, tuple, Path, str]
    origin, _ = _taken_apart(kind)
    return -1 if origin is Literal else order.index(origin or kind)


def _first(kinds: list[Any], value: Any, text: bool) -> Any:
    for kind in kinds:
        if kind is Path and isinstance(value, str) and str in kinds:
            continue  # a text that may be a str stays one
        try:
            return convert(kind, value, text=text)
        except ValueError:
            continue
    raise ValueError(value)


def _sequence(inner: tuple[Any, ...], value: Any, text: bool) -> tuple[Any, ...]:
    many = len(inner) == 2 and inner[1] is Ellipsis
    if text and isinstance(value, str):
        value = [each.strip() for each in value.split("," if many else ":")] if value.strip() else []
    if not isinstance(value, (list, tuple)) or not (many or len(value) == len(inner)):
        raise ValueError(value)
    kinds = [inner[0]] * len(value) if many else inner
    return tuple(convert(kind, each, text=text) for kind, each in zip(kinds, value, strict=True))


def _read(kind: Any, text: str) -> Any:
    if kind is NoneType:
        if text.lower() in ("none", "null"):
            return None
    elif kind is bool:
        if text.lower() in TRUTHS:
            return TRUTHS[text.lower()]
    else:
        return kind(text)
    raise ValueError(text)


def describe(kind: Any, bounds: str = "", *, short: bool = False) -> str:
    """The kind in words, or in a few letters for the command line."""
    origin, inner = _taken_apart(kind)
    if origin in (Union, UnionType):
        members = [describe(each, bounds, short=short) for each in inner if not (each is Path and str in inner)]
        return "|".join(members) if short else " or ".join(members)
    if origin is Literal:
        return "|".join(map(str, inner)) if short else f"one of {list(inner)}" if inner[1:] else repr(inner[0])
    if origin is tuple:
        each = ":".join(describe(member, short=True) for member in inner if member is not Ellipsis)
        if inner[-1] is not Ellipsis:
            return each
        if short:
            return f"{each},..."
        several = f"some of {list(get_args(inner[0]))}" if get_origin(inner[0]) is Literal else describe(inner[0])
        return f"{_MANY.get(inner[0], several)} with commas between"
    if short:
        return "none" if kind is NoneType else kind.__name__
    return f"{_ONE[kind]} {bounds}".rstrip() if kind in (int, float) else _ONE[kind]


def holds_list(kind: Any) -> bool:
    """Whether a value is a list of any length."""
    origin, inner = _taken_apart(kind)
    return origin is tuple and inner[-1] is Ellipsis


def plain(value: Any) -> Any:
    """JSON-ready: tuples become lists, paths texts."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, os.PathLike) else value
