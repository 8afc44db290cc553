"""Rows of .jsonl and .parquet files and of hub datasets, each with its place, and the text in one of their columns."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_rfa.errors import ConfigError
from hf_rfa.text_files import numbered_lines

ROW_SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        place: The file or dataset and the row's place in it, for messages.
        values: By the names of their columns.
    """

    place: str
    values: dict[str, Any]

    def value(self, column: str, option: str) -> Any:
        """What is in a column, which is chosen by `option`."""
        if column not in self.values:
            raise ConfigError(
                f"{self.place} has no column {column!r}. Its columns are {', '.join(map(repr, self.values)) or 'none'}"
                f". Set `{option}` to one of them."
            )
        return self.values[column]

    def text(self, column: str, option: str = "text_column") -> str:
        """The text in a column.

        Raises:
            ConfigError: There is no such column, or no text in it.
        """
        text = self.value(column, option)
        if not isinstance(text, str):
            raise ConfigError(
                f"Column {column!r} of {self.place} must be text. Got {type(text).__name__}. Leave such rows out, or "
                f"set `{option}` to another column."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON may escape what is no character; tokenizers refuse it
            raise ConfigError(
                f"Column {column!r} of {self.place} must be text. Got {text[error.start]!r}, half of a surrogate "
                "pair. Correct it, or leave the row out."
            ) from None
        return text


def rows_of(file: Path) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file.

    Raises:
        ConfigError: The file is damaged.
        ImportError: A .parquet file without the `datasets` package.
    """
    return _jsonl_rows(file) if file.suffix == ".jsonl" else _parquet_rows(file)


def datasets_library() -> Any:
    """`datasets`, which `hf_rfa` itself does not need."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Parquet and hub datasets need `datasets`: `pip install 'hf_rfa[train]'`.") from error
    return datasets


def _jsonl_rows(file: Path) -> Iterator[Row]:
    for number, line in numbered_lines(file):
        if line.isspace():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{place} must be one JSON object. It is not: {error.msg} behind {error.pos} characters. Correct the "
                "line, or remove it."
            ) from error
        except (ValueError, RecursionError) as error:  # a number of too many digits; lists in lists without end
            raise ConfigError(f"{place} cannot be read: {error}. Correct the line, or remove it.") from error
        if not isinstance(row, dict):
            raise ConfigError(
                f'{place} must be one JSON object. Got {line[:60]!r}. Write lines such as {{"text": "..."}}.'
            )
        yield Row(place, row)


def _parquet_rows(file: Path) -> Iterator[Row]:
    library = datasets_library()
    try:
        # Streaming leaves no copy in the datasets cache.
        rows = library.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield Row(f"{file}, row {number}", row)
    except (OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"{file} cannot be read as Parquet: {reason}. The file is damaged or has no rows: write it again, or "
            "leave it out."
        ) from error
