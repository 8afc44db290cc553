"""What pages hold that is made from the source: lists of messages, tables of options, formulae as MathML."""

import ast
import html
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from pages.messages import Message, messages, shared_constants, template

#: `<!-- options: hf_rfa/config.py RFAConfig -->`
OPTIONS = re.compile(r"^<!-- options: (\S+) (\w+) -->$", re.MULTILINE)
#: `<!-- messages -->`
MESSAGES = re.compile(r"^<!-- messages -->$", re.MULTILINE)
#: `<!-- architectures -->` and `<!-- architectures: summary -->`
ARCHITECTURES = re.compile(r"<!-- architectures(: summary)? -->")
#: What `pymdownx.arithmatex` leaves of a formula.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
#: x' and x_i' as the converter writes them, with a prime that is raised twice: by its place and by its glyph.
_PRIMED = re.compile(r"<msup>(<mi>[^<]+</mi>)<mi>&#x02032;</mi></msup>")
_PRIME_BELOW = re.compile(r"<msubsup>(<mi>[^<]+</mi>)(<mi>[^<]+</mi>)<mi>&#x02032;</mi></msubsup>")
_PRIME = '<mo lspace="0" rspace="0">&#x02032;</mo></mrow>'
#: Functions whose call makes a field of settings: (help, default) and (default=None, help) alike.
FIELD_MAKERS = {"option", "_help"}
KINDS = {"warning": "Warning", "log": "Log, at the level WARNING"}


def filled_in(markdown: str, root: Path) -> str:
    """A page with its comments replaced by what they ask for."""
    markdown = MESSAGES.sub(lambda _: all_messages(root / "hf_rfa"), markdown)
    markdown = ARCHITECTURES.sub(lambda match: architectures(root / "hf_rfa", summary=bool(match[1])), markdown)
    return OPTIONS.sub(lambda match: options_table(root / match[1], match[2]), markdown)


def all_messages(package: Path) -> str:
    """Every message of the package, under a heading for each of its rooms."""
    parts = []
    for room, found in groupby(messages(package), key=lambda message: message.file.split("/")[1]):
        parts.append(f"### {room.removesuffix('.py')}\n\n{_summary(package / room)}\n")
        parts.append("\n".join(["<dl>", *(_entry(message) for message in found), "</dl>\n"]))
    return "\n".join(parts)


def _summary(room: Path) -> str:
    file = room / "__init__.py" if room.is_dir() else room
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ")


def _entry(message: Message) -> str:
    place = f"{message.file}, {message.place}" if message.place else message.file
    kind = KINDS.get(message.kind, message.kind)
    return f"<dt>{kind} <small>{html.escape(place)}</small></dt><dd>{as_html(message.text)}</dd>"


def as_html(text: str) -> str:
    """A message with its `code` as <code>."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def architectures(package: Path, *, summary: bool) -> str:
    """The recorded matrix of architectures as a table, or how many of them convert."""
    matrix = json.loads((package / "supported.json").read_text(encoding="utf-8"))
    rows, version = matrix["architectures"], matrix["transformers"]
    if summary:
        converts = sum(row["outcome"] == "converts" for row in rows)
        return f"{converts} of the {len(rows)} entries of its tables of classes convert (Transformers {version})."
    lines = [
        f"| {row['model_class']} | {row['model_type']} | {row['outcome']} | {_cell(as_html(row['reason']))} |"
        for row in rows
    ]
    return "\n".join(["| class | model type | outcome | reason |", "|---|---|---|---|", *lines])


def options_table(file: Path, name: str) -> str:
    """The fields of a dataclass of settings as a table: name, default, meaning."""
    rows = [f"| `{field}` | {default} | {help_text} |" for field, default, help_text in fields_of(file, name)]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def fields_of(file: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """(field, default, help) of a dataclass in a file that is read, not imported."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = next(parent for parent in file.parents if parent.name == "hf_rfa")
    constants = shared_constants(ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            call = node.value
            if ast.unparse(call.func) in FIELD_MAKERS:
                default = f"`{ast.unparse(call.args[1])}`" if len(call.args) > 1 else "required"
                choices = any(keyword.arg == "choices" for keyword in call.keywords)
                text = template(call.args[0], constants) + (f" {_feature_maps(package)}" if choices else "")
                yield node.target.id, default, _cell(text)


def _feature_maps(package: Path) -> str:
    """The maps that features/maps.py registers, with their summaries: the only choices that are a table of its own."""
    tree = ast.parse((package / "features" / "maps.py").read_text(encoding="utf-8"))
    table = next(
        node.args[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "FEATURE_MAPS.update"
    )
    assert isinstance(table, ast.Dict)
    maps = zip(table.keys, table.values, strict=True)
    return ", ".join(f"{ast.unparse(name)} ({ast.literal_eval(made.args[2])})" for name, made in maps) + "."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")


def with_mathml(page: str) -> str:
    """A page's HTML with its formulae as MathML, which browsers show without a script."""
    from latex2mathml.converter import convert as mathml  # of the extra docs, which nothing else here needs

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[2] == "[" else "inline"
        written = mathml(html.unescape(match[3]).strip(), display=display)
        return _PRIME_BELOW.sub(r"<mrow><msub>\1\2</msub>" + _PRIME, _PRIMED.sub(r"<mrow>\1" + _PRIME, written))

    return FORMULA.sub(formula, page)
