"""Every message of the package that a user can get, read from its source: errors, refusals and warnings.

A message is a template: its own words, with `{name}` where a value stands. Functions that raise with their own
parameters in the message (`check_int`, `check_choice`) are followed to the calls that name them, so that `num_features
must be a positive integer` is found and not only "`{name}` must be {what}".
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORD = re.compile(r"[A-Za-z]{3}")
#: What is raised for a programmer of the package, or caught and told otherwise before a user sees it.
INTERNAL = {"AssertionError", "NotImplementedError", "AttributeError", "KeyError", "TypeError"}


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: The exception, "warning" or "log".
        text: Its template.
        file: Where it is made, relative to the package's parent.
        place: The function or class around it.
    """

    kind: str
    text: str
    file: str
    place: str


def messages(package: Path) -> list[Message]:
    """All messages of a package, in the order of its files."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    callers = _calls_by_name(trees)
    everywhere = shared_constants(trees.values())
    found: list[Message] = []
    for path, tree in trees.items():
        constants = {**everywhere, **string_constants(tree)}
        for place, function, (kind, argument) in _made(tree):
            text = template(argument, constants)
            if not any(WORD.search(part) for part in _words(argument, constants)):
                continue  # a bare value: the caller says what was wrong with it
            if kind == "ValueError" and text[0].islower():
                continue  # part of another message
            file = path.relative_to(package.parent).as_posix()
            for filled in _filled(text, function, callers, constants):
                found.append(Message(kind, filled, file, place))
    return list(dict.fromkeys(found))


def shared_constants(trees: Iterable[ast.Module]) -> dict[str, ast.expr]:
    """The strings that modules name at their top, for those that import them."""
    return {name: value for tree in trees for name, value in string_constants(tree).items()}


def _made(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | None, tuple[str, ast.expr]]]:
    """(place, function around it, (kind, message)) of every exception made and every warning given."""

    def walk(node: ast.AST, place: str, function: ast.FunctionDef | None) -> Iterator[Any]:
        for child in ast.iter_child_nodes(node):
            inner, within = place, function
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = child.name if not place else f"{place}.{child.name}"
                within = child if isinstance(child, ast.FunctionDef) else function
            if isinstance(child, ast.Call):
                made = _message_of(child)
                if made is not None:
                    yield place, function, made
            yield from walk(child, inner, within)

    yield from walk(tree, "", None)


def _message_of(call: ast.Call) -> tuple[str, ast.expr] | None:
    match call:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="warnings"), attr="warn"), args=[message, *_]):
            return "warning", message
        case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr="warning"), args=[message, *_]):
            return "log", message
        case ast.Call(func=ast.Name(id="invalid"), args=[message, *_]):
            return "RequestError", message
        case ast.Call(func=ast.Name(id="RequestError"), args=[_, message, *_]):
            return "RequestError", message
        case ast.Call(func=ast.Name(id=name), args=[message, *_]) if name.endswith("Error") and name not in INTERNAL:
            return name, message
    return None


def string_constants(tree: ast.Module) -> dict[str, ast.expr]:
    """Strings that a module names at its top."""
    found: dict[str, ast.expr] = {}
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            pairs = zip(node.targets[0].elts, node.value.elts, strict=True)
        elif isinstance(node, ast.Assign):
            pairs = zip(node.targets, [node.value], strict=False)
        else:
            continue
        found |= {name.id: value for name, value in pairs if isinstance(name, ast.Name) and _is_text(value)}
    return found


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def template(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """The text of an expression, with `{...}` for what is not known before it runs."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=values):
            return "".join(template(value, constants) for value in values)
        case ast.FormattedValue(value=ast.Name(id=name)) if name in constants:
            return template(constants[name], constants)
        case ast.FormattedValue(value=ast.IfExp() as choice):
            return template(choice, constants)
        case ast.FormattedValue(value=ast.BoolOp(values=values)):
            return f"[{' | '.join(template(value, constants) for value in values)}]"
        case ast.FormattedValue(value=value):
            return "{" + _short(value) + "}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left, constants) + template(right, constants)
        case ast.BinOp(left=left, op=ast.Mod()):
            return template(left, constants)
        case ast.IfExp(body=body, orelse=other):
            ways = [text for text in (template(body, constants), template(other, constants)) if text]
            return ways[0] if len(ways) == 1 else f"[{' | '.join(ways)}]"
        case ast.Name(id=name) if name in constants:
            return template(constants[name], constants)
        case _:
            return "{" + _short(node) + "}"


def _words(node: ast.expr, constants: Mapping[str, ast.expr]) -> Iterator[str]:
    """The literal parts of a template."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        elif isinstance(child, ast.Name) and child.id in constants and child is not node:
            yield from _words(constants[child.id], constants)
    if isinstance(node, ast.Name) and node.id in constants:
        yield from _words(constants[node.id], constants)


def _short(node: ast.expr) -> str:
    """A name for a value: the last word of what it is read from."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr="__name__", value=ast.Call(func=ast.Name(id="type"), args=[value])):
            return f"class of {_short(value)}"
        case ast.Attribute(attr="__name__", value=value):
            return _short(value)
        case ast.Attribute(attr=name):
            return name.lstrip("_")
        case ast.Call(func=ast.Name(id="str" | "repr" | "sorted" | "list" | "tuple" | "len" as how), args=[value, *_]):
            return f"number of {_short(value)}" if how == "len" else _short(value)
        case ast.Call(func=ast.Attribute(attr="join"), args=[value]):
            return _short(value)
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name.lstrip("_").replace("_", " ")
        case ast.Subscript(value=value):
            return _short(value)
        case ast.GeneratorExp(elt=value) | ast.ListComp(elt=value):
            return _short(value)
        case ast.BinOp() | ast.UnaryOp():
            return "number"
        case _:
            return "..."


def _calls_by_name(trees: Mapping[Path, ast.Module]) -> dict[str, list[tuple[ast.Call, dict[str, ast.expr]]]]:
    """Every call of the package by the name that is called, with the strings of its module."""
    calls: dict[str, list[tuple[ast.Call, dict[str, ast.expr]]]] = {}
    for tree in trees.values():
        constants = string_constants(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls.setdefault(node.func.id, []).append((node, constants))
    return calls


def _filled(
    text: str,
    function: ast.FunctionDef | None,
    callers: Mapping[str, list[tuple[ast.Call, dict[str, ast.expr]]]],
    constants: Mapping[str, ast.expr],
) -> list[str]:
    """The template once for each call whose strings fill in its `{parameter}`; as it is if there are none."""
    if function is None:
        return [text]
    parameters = [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]
    used = [name for name in parameters if "{" + name + "}" in text]
    filled = []
    for call, strings in callers.get(function.name, ()) if used else ():
        given = dict(zip(parameters, call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        fitted = text
        for name in used:
            value = given.get(name)
            if _is_text(value) or (isinstance(value, ast.Name) and value.id in strings):
                fitted = fitted.replace("{" + name + "}", template(value, {**constants, **strings}))
        if fitted != text:
            filled.append(fitted)
    return list(dict.fromkeys(filled)) or [text]
