"""The Python standard library as a corpus: long, real documents that every Python installation carries.

Source files use identifiers hundreds of lines after their definition, so that far context matters more than in
ordinary prose, and no download is needed. Read it by `hf_rfa.data.load_documents("stdlib", ...)`.
"""

import ast
import sysconfig
from pathlib import Path

# Long modules that exist in every Python from 3.10 to 3.14 and of which no other module of the library is a copy.
HELD_OUT_MODULES = (
    "_pydecimal.py",
    "argparse.py",
    "difflib.py",
    "ipaddress.py",
    "mailbox.py",
    "pickletools.py",
    "tarfile.py",
    "typing.py",
)

# Tests repeat each other, `encodings` is tables, and the rest is either not part of the library or has left it.
_SKIPPED_FOLDERS = {
    *("__pycache__", "dist-packages", "encodings", "idlelib", "lib-dynload", "lib2to3", "pydoc_data"),
    *("site-packages", "test", "tests", "turtledemo"),
}


def stdlib_documents(split: str, root: str | Path | None = None) -> list[tuple[str, str]]:
    """Name and text of the standard library's documents, in sorted order.

    The training split holds the `.py` sources (without tests, tables of encodings and what is installed into
    `site-packages`) and the language reference that `pydoc` carries, one document per topic. The validation split
    holds `HELD_OUT_MODULES`, whatever the Python version.

    Args:
        split: "train" or "validation".
        root: folder of the library; by default that of the running interpreter.

    Raises:
        FileNotFoundError: the folder holds no sources (some embedded Pythons ship compiled files only).
    """
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    held_out = [root / name for name in HELD_OUT_MODULES]
    if split == "validation":
        paths = [path for path in held_out if path.is_file()]
    else:
        paths = [path for path in root.rglob("*.py") if path not in held_out and _is_library_source(path, root)]
    documents = [(path.relative_to(root).as_posix(), path.read_text("utf-8", "replace")) for path in paths]
    if split == "train":
        documents += _reference_topics(root / "pydoc_data" / "topics.py")
    documents = sorted((name, text) for name, text in documents if text.strip())
    if not documents:
        raise FileNotFoundError(
            f"The Python standard library at {root} has no {split} sources: this Python carries no .py files there. "
            "Use a Python that does, or pass a folder of text files instead of 'stdlib'."
        )
    return documents


def _is_library_source(path: Path, root: Path) -> bool:
    folders = path.relative_to(root).parts[:-1]
    # `_sysconfigdata*` and `config-*` describe the machine the interpreter was built on, not the library.
    return (
        _SKIPPED_FOLDERS.isdisjoint(folders)
        and not path.name.startswith("_sysconfigdata")
        and not any(folder.startswith("config-") for folder in folders)
    )


def _reference_topics(path: Path) -> list[tuple[str, str]]:
    """The language reference behind `help("topic")`: a dict of strings, read without importing the module."""
    if not path.is_file():  # some distributions package it apart
        return []
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return [(f"pydoc_data/topics/{name}", text) for name, text in topics.items()]
    return []
