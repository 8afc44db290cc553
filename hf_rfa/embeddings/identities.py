"""Texts and the identities that they belong to: passages of one chapter or document, or rows with a label.

FaceNet's identities are persons and its texts their photos. Here two passages of one chapter are a pair. Held-out
identities are never seen in training.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_rfa.data.documents import SPLITS, Document, load_documents, local_files
from hf_rfa.data.rows import ROW_SUFFIXES, rows_of
from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, option

#: Of the standard library and of labelled rows without a validation file, every fifth identity is held out.
EVERY_HELD_OUT = 5
#: A heading on a line of its own: CHAPTER IV, BOOK ONE: 1805, ADVENTURE I. A SCANDAL, VII. THE BLUE CARBUNCLE.
_HEADING = re.compile(
    r"^[ \t]*(?:(?:CHAPTER|Chapter|BOOK|PART|VOLUME|LETTER|ADVENTURE|STAVE)\b[^\n]{0,100}"
    r"|[IVXLC]+\.[ \t]+[A-Z][A-Z' \-,]{4,80})[ \t]*$",
    re.MULTILINE,
)
_MARKDOWN_HEADING = re.compile(r"^#{1,3} [^\n]+$", re.MULTILINE)


@dataclass(frozen=True)
class PassageSettings(Settings):
    """What becomes a text and what an identity."""

    identity: Literal["chapter", "document"] = option(
        "What two passages have in common to be a pair; a document without headings is one chapter.", "chapter"
    )
    passage_characters: int = option("Length of a passage.", 500, least=20)
    identity_passages: int = option("Passages of an identity, at most, evenly over it.", 4, least=2)
    text_column: str = option("Column of the text in .jsonl and .parquet.", "text")
    label_column: str | None = option(
        "Column of the identity in .jsonl and .parquet, whose rows are whole texts then; by default, documents.",
        None,
    )


@dataclass(frozen=True)
class Passages:
    """Texts with the identity of each.

    Attributes:
        texts: In the order of their identities.
        labels: The number of each text's identity in `names`.
        names: Of the identities.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]

    def share(self, share: float, least: int = 2) -> "Passages":
        """A part of the identities, evenly over them; at least `least` (FaceNet's table 6)."""
        count = min(len(self.names), max(least, round(share * len(self.names))))
        kept = [number * len(self.names) // count for number in range(count)]
        return _numbered((self.names[label], text) for label in kept for text in self.of(label))

    def first(self, count: int | None) -> "Passages":
        """At most `count` identities, evenly over them."""
        return self if count is None or count >= len(self.names) else self.share(count / len(self.names), count)

    def of(self, label: int) -> list[str]:
        """The texts of an identity."""
        return [text for text, own in zip(self.texts, self.labels, strict=True) if own == label]


def load_passages(source: str | Path, split: str, settings: PassageSettings | None = None) -> Passages:
    """The texts of one split of a source of `hf_rfa.data.load_documents`, with their identities.

    The standard library's modules and labelled rows without a validation file are split by identity: every fifth is
    held out. Other sources are split by document as `load_documents` splits them. Identities with a single text are
    left out.

    Raises:
        ConfigError: Fewer than two identities with two texts, a missing column, an unknown split.
        FileNotFoundError, ConnectionError, ImportError: as `load_documents`.

    Example:
        >>> from hf_rfa.embeddings import load_passages
        >>> held_out = load_passages("stdlib", "validation")
        >>> len(held_out.names) > 50, min(held_out.labels.count(label) for label in range(9)) >= 2
        (True, True)
    """
    settings = settings or PassageSettings()
    if split not in SPLITS:
        raise ConfigError(f"`split` must be one of {', '.join(SPLITS)}. Got {split!r}.")
    rows: Iterable[tuple[str, str]]
    if settings.label_column is not None:
        rows, apart = _labelled(Path(source), split, settings.text_column, settings.label_column)
    elif str(source) == "stdlib":
        documents = [document for part in SPLITS for document in load_documents(source, part)]
        rows, apart = _cut(sorted(documents, key=lambda document: document.name), settings), False
    else:
        rows, apart = _cut(load_documents(source, split, text_column=settings.text_column), settings), True
    found = _numbered(rows, at_least=2)
    if not apart:
        out = [number % EVERY_HELD_OUT == EVERY_HELD_OUT - 1 for number in range(len(found.names))]
        wanted = [label for label, held in enumerate(out) if held == (split == "validation")]
        found = _numbered((found.names[label], text) for label in wanted for text in found.of(label))
    if len(found.names) < 2:
        raise ConfigError(
            f"The {split} split of {str(source)!r} must have two identities with two texts each. Got "
            f"{len(found.names)}. "
            + (
                "Pass rows of more identities: every fifth is held out, unless a file is named for validation."
                if settings.label_column is not None
                else "Lower `passage_characters`, or choose another `identity`."
            )
        )
    return found


def _cut(documents: Iterable[Document], settings: PassageSettings) -> Iterator[tuple[str, str]]:
    """(identity, passage), the passages of a chapter evenly over it."""
    for document in documents:
        parts = _chapters(document) if settings.identity == "chapter" else [document.text]
        for number, part in enumerate(parts):
            name = document.name if len(parts) == 1 else f"{document.name}#{number}"
            pieces = _pieces(part, settings.passage_characters)
            count = min(len(pieces), settings.identity_passages)
            yield from ((name, pieces[i * len(pieces) // count]) for i in range(count))


def _chapters(document: Document) -> list[str]:
    """The texts between headings, without them; tables of contents leave nothing."""
    heading = _MARKDOWN_HEADING if document.name.endswith(".md") else _HEADING
    parts = [part.strip() for part in heading.split(document.text)]
    return [part for part in parts if part] or [document.text]


def _pieces(text: str, characters: int) -> list[str]:
    """Whole words of `text` in pieces of about `characters`; a rest of less than that is left out."""
    pieces, start = [], 0
    while len(text) - start >= characters:
        end = text.find(" ", start + characters)
        end = len(text) if end < 0 else end
        piece = text[start:end].strip()
        if piece:
            pieces.append(piece)
        start = end
    return pieces


def _labelled(path: Path, split: str, text: str, label: str) -> tuple[list[tuple[str, str]], bool]:
    if not path.exists():
        raise FileNotFoundError(
            f"No file or folder at {str(path)!r}. With `label_column`, pass .jsonl or .parquet files."
        )
    files, _, apart = local_files(path, split, ROW_SUFFIXES)
    found: list[tuple[str, str]] = []
    for file in files:
        for row in rows_of(file):
            identity, words = row.value(label, "label_column"), row.value(text, "text_column")
            if identity is None or words is None or (isinstance(words, str) and not words.strip()):
                raise ConfigError(
                    f"{row.place} must have a label in {label!r} and words in {text!r}. Got {identity!r} and "
                    f"{words!r}. Leave such rows out, or name other columns by `label_column` and `text_column`."
                )
            found.append((str(identity), row.text(text)))
    return found, apart


def _numbered(rows: Iterable[tuple[str, str]], at_least: int = 1) -> Passages:
    """(identity, text) as `Passages`; identities with fewer texts than `at_least` are left out."""
    groups: dict[str, list[str]] = {}
    for name, text in rows:
        groups.setdefault(name, []).append(text)
    kept = {name: texts for name, texts in groups.items() if len(texts) >= at_least}
    texts = [text for group in kept.values() for text in group]
    labels = [label for label, group in enumerate(kept.values()) for _ in group]
    return Passages(texts, labels, list(kept))
