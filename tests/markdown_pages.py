"""The Markdown files of the repository, and the blocks of code in them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from paths import ROOT

#: Markdown that is no page: what the repository's own commands write.
_NOT_PAGES = ("site/", "hf-rfa-report/", "node_modules/", "build/", ".")
PAGES = sorted(
    path
    for path in (file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.md"))
    if not path.startswith(_NOT_PAGES) and "/results/" not in path and "/." not in path
)
_BLOCK = re.compile(
    r"^(?P<note><!-- not run: .+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: Its file, relative to the repository's root.
        line: The number of its first line there.
        note: Why it is not run; "" if it is.
    """

    page: str
    line: int
    language: str
    code: str
    note: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, *languages: str) -> Iterator[Block]:
    """The blocks of a page in some languages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        if match["language"] in languages:
            line = text.count("\n", 0, match.start("code")) + 1
            yield Block(page, line, match["language"], match["code"], (match["note"] or "").strip())
