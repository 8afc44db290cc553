"""Values of an annotated type: check them, read them from text, describe the type, make them ready for JSON.

Known are bool, int, float, str, Path, None, `Literal`, unions of these, `tuple[X, ...]` or `Sequence[X]`, pairs
`tuple[X, Y]` and `Mapping[X, Y]`. As text a list has commas, a pair a colon, and a mapping is a list of pairs:
`3:1,2:0` is ((3, 1), (2, 0)) or {3: 1, 2: 0}; a pair within a pair has another colon: `3:1:512` is {(3, 1): 512}.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import GenericAlias, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "none"}
_MANY = {bool: "truth values", int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


def convert(kind: Any, value: Any, *, text: bool) -> Any:
    """`value` as a value of the type `kind`: lists become tuples, whole numbers floats where a float is wanted.

    Args:
        text: Read strings, as from a command line; otherwise a string is a string.

    Raises:
        ValueError: The value is not of that type.
    """
    origin, inner = _taken_apart(kind)
    if origin in (Union, UnionType):
        if text and value == "" and str not in inner:  # an empty list has to be asked for in words
            raise ValueError(value)
        return _first(sorted(inner, key=_order), value, text)
    if origin is Literal:
        for choice in inner:
            if (type(choice) is type(value) and choice == value) or (text and str(choice) == value):
                return choice
        raise ValueError(value)
    if origin is tuple:
        return _sequence(inner, value, text)
    if origin is Mapping:
        pairs = tuple(value.items()) if isinstance(value, Mapping) else value if text else None
        return dict(_sequence((GenericAlias(tuple, inner), Ellipsis), pairs, text))
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
    """The narrowest member of a union reads a text; a str takes any."""
    order = [NoneType, bool, int, float, tuple, Mapping, Path, str]
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
        value = value if many or not value else _regrouped(inner, value)
    if not isinstance(value, (list, tuple)) or not (many or len(value) == len(inner)):
        raise ValueError(value)
    kinds = [inner[0]] * len(value) if many else inner
    return tuple(convert(kind, each, text=text) for kind, each in zip(kinds, value, strict=True))


def _regrouped(inner: tuple[Any, ...], words: list[str]) -> list[str]:
    """The words between colons, put together again for each member that is a pair itself."""
    found = []
    for kind in inner:
        size = len(get_args(kind)) if get_origin(kind) is tuple else 1
        found.append(":".join(words[:size]))
        words = words[size:]
    return [*found, *words]


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
    """The type in words, or abbreviated for the command line."""
    origin, inner = _taken_apart(kind)
    if origin in (Union, UnionType):
        members = [describe(each, bounds, short=short) for each in inner if not (each is Path and str in inner)]
        members = list(dict.fromkeys(members))  # as text, a mapping and a list of pairs are the same
        return "|".join(members) if short else " or ".join(members)
    if origin is Literal:
        return "|".join(map(str, inner)) if short else f"one of {list(inner)}" if inner[1:] else repr(inner[0])
    if origin is Mapping:
        return describe(GenericAlias(tuple, (GenericAlias(tuple, inner), Ellipsis)), bounds, short=short)
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
    """Whether a value is or may be a list of any length."""
    origin, inner = _taken_apart(kind)
    if origin in (Union, UnionType):
        return any(holds_list(each) for each in inner)
    return origin is Mapping or (origin is tuple and inner[-1] is Ellipsis)


def plain(value: Any) -> Any:
    """JSON-ready: tuples become lists, paths strings."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, os.PathLike) else value
