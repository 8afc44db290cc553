"""Links from pages to other files of the repository, which are relative to the page's own file, as on a code host."""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

FENCE = re.compile(r"^( *)(```|~~~)")
#: Text and target of a link or an image; titles are not used here.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")


def is_relative(target: str) -> bool:
    """Whether a link names a file of the repository."""
    return not re.match(r"[a-z]+:|#", target)


def links(markdown: str) -> Iterator[re.Match[str]]:
    """The links of a page, but for those in blocks of code."""
    for start, end in _prose(markdown):
        yield from LINK.finditer(markdown, start, end)


def replace_links(markdown: str, new: Callable[[re.Match[str]], str]) -> str:
    """The page with each link as `new` writes it."""
    done, parts = 0, []
    for match in links(markdown):
        parts += [markdown[done : match.start()], new(match)]
        done = match.end()
    return "".join([*parts, markdown[done:]])


def _prose(markdown: str) -> Iterator[tuple[int, int]]:
    start = position = 0
    fence = None
    for line in markdown.splitlines(keepends=True):
        mark = FENCE.match(line)
        if mark and fence in (None, mark[2]):
            if fence is None:
                yield start, position
            fence = None if fence else mark[2]
            start = position + len(line)
        position += len(line)
    if fence is None:
        yield start, position


def target_of(page: str, target: str) -> tuple[str, str]:
    """(path in the repository, anchor with its #) of a relative link on a page, itself a path in the repository."""
    path, sharp, anchor = target.partition("#")
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    return joined, sharp + anchor


class Site:
    """Which files of the repository become files of the site, and under which path.

    Pages are those in `docs` and, under `repository/`, the texts and pictures outside of it that any page links to.
    """

    BROUGHT = (".md", ".png", ".svg")

    def __init__(self, root: Path, pages: list[str]) -> None:
        """`pages`: paths in the repository with which to begin."""
        self.root = root
        self.places: dict[str, str] = {}
        waiting = list(pages)
        while waiting:
            page = waiting.pop()
            if page in self.places:
                continue
            self.places[page] = page.removeprefix("docs/") if page.startswith("docs/") else f"repository/{page}"
            if page.endswith(".md"):
                found = (target_of(page, m[3])[0] for m in links(self.text(page)) if is_relative(m[3]))
                waiting += [path for path in found if self.brings(path)]

    def text(self, page: str) -> str:
        """The Markdown of a page."""
        return (self.root / page).read_text(encoding="utf-8")

    def brings(self, path: str) -> bool:
        """Whether a linked file becomes a file of the site."""
        return path.endswith(self.BROUGHT) and not path.startswith("..") and (self.root / path).is_file()

    def with_links(self, page: str, markdown: str, repository: str | None) -> str:
        """The page with links to places of the site; other files are linked to at `repository`, or only named."""
        here = posixpath.dirname(self.places[page])

        def new(match: re.Match[str]) -> str:
            picture, text, target = match.groups()
            if not is_relative(target):
                return match[0]
            path, anchor = target_of(page, target)
            if path in self.places:
                return f"{picture}[{text}]({posixpath.relpath(self.places[path], here or '.')}{anchor})"
            if not (self.root / path).exists():
                return match[0]  # MkDocs complains of it
            return f"[{text}]({repository}/blob/main/{path}{anchor})" if repository else text

        return replace_links(markdown, new)
