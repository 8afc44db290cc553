"""Text files, which are UTF-8: others are refused by their name and the line, not read as something else."""

from collections.abc import Iterator
from pathlib import Path

from hf_rfa.errors import ConfigError


def read_text(path: Path) -> str:
    """The text of a file, with `\\n` at the end of its lines, whichever they had, and without a byte order mark.

    Raises:
        ConfigError: It is not UTF-8.
        OSError: It cannot be read.
    """
    return "".join(line for _, line in numbered_lines(path))


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file as `read_text` has them, one after the other, with their numbers from 1 on."""
    # Bytes that are not UTF-8 become half surrogates, which no UTF-8 decodes to: so they are found line by line.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.encode()
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00
                raise ConfigError(
                    f"{path}, line {number} must be UTF-8 text. Got the byte {byte:#04x} behind {error.start} "
                    "characters. Convert the file, for example by `iconv -f ENCODING -t UTF-8`, or leave it out."
                ) from None
            yield number, line
