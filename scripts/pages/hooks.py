"""What MkDocs calls while it builds the site (`mkdocs.yml`): `mkdocs build --strict`."""

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # mkdocs imports this file alone

from pages.links import Site  # noqa: E402
from pages.rendering import filled_in, with_mathml  # noqa: E402

#: Pages at the root of the repository, which the navigation names as `repository/NAME`.
PROJECT = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"]


def on_files(files: Any, config: Any) -> Any:
    """Bring in what pages link to outside of `docs`."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    config["site_files"] = site = Site(ROOT, pages + [name for name in PROJECT if (ROOT / name).exists()])
    for path, place in site.places.items():
        if not path.startswith("docs/"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links as the site needs them, and what is made from the source."""
    site = config["site_files"]
    path = next(path for path, place in site.places.items() if place == page.file.src_uri)
    return filled_in(site.with_links(path, markdown, config["repo_url"]), ROOT)


def on_page_content(html: str, **_: Any) -> str:
    """Formulae that need no script."""
    return with_mathml(html)
