"""Every relative link of every Markdown file leads to a file, and every anchor to a heading."""

import itertools
import re
from pathlib import Path

import pytest
from markdown_pages import PAGES
from paths import ROOT


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page, imported):
    links = imported("pages.links")
    wrong = []
    for match in links.links((ROOT / page).read_text(encoding="utf-8")):
        if not links.is_relative(match[3]) and not match[3].startswith("#"):
            continue
        path, anchor = links.target_of(page, match[3])
        if not (ROOT / path).exists():
            wrong.append(f"{match[3]}: no such file")
        elif anchor and anchor[1:] not in anchors(ROOT / path):
            wrong.append(f"{match[3]}: no such heading")
    assert not wrong


def test_a_wrong_link_is_found(imported):
    links = imported("pages.links")
    code = "```text\n[b](no-link.md)\n```"
    text = f"[a](docs/nowhere.md)\n\n{code}\n\n![c](docs/cost.png) [d](https://x.y/z.md) [e](#here)\n"
    found = [match[3] for match in links.links(text)]
    assert found == ["docs/nowhere.md", "docs/cost.png", "https://x.y/z.md", "#here"]
    assert [target for target in found if links.is_relative(target)] == ["docs/nowhere.md", "docs/cost.png"]
    assert links.target_of("docs/a.md", "../scripts/b.md#c") == ("scripts/b.md", "#c")


def test_the_site_brings_in_what_pages_link_to(imported, tmp_path):
    for name, text in {
        "docs/index.md": "[a](../more/page.md#top), [b](../code.py), [c](../code.py#L1)",
        "more/page.md": "![p](plot.png) and [back](../docs/index.md)",
        "more/plot.png": "",
        "code.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    site = imported("pages.links").Site(tmp_path, ["docs/index.md"])
    assert site.places == {
        "docs/index.md": "index.md",
        "more/page.md": "repository/more/page.md",
        "more/plot.png": "repository/more/plot.png",
    }
    start = site.with_links("docs/index.md", site.text("docs/index.md"), None)
    assert start == "[a](repository/more/page.md#top), b, c"
    start = site.with_links("docs/index.md", site.text("docs/index.md"), "https://host/x")
    assert start.endswith("[b](https://host/x/blob/main/code.py), [c](https://host/x/blob/main/code.py#L1)")
    assert (
        site.with_links("more/page.md", site.text("more/page.md"), None) == "![p](plot.png) and [back](../../index.md)"
    )


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_lists_begin_behind_an_empty_line(page):
    """Where they do not, the site's Markdown takes them for the end of a paragraph."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    item = re.compile(r"^(- |\d+\. )")
    lines = text.splitlines()
    wrong = [
        line
        for before, line in itertools.pairwise(lines)
        if item.match(line) and before.strip() and not item.match(before) and not before.startswith("  ")
    ]
    assert not wrong
