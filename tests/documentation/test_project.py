"""The files that a project has agree with each other."""

import re
import subprocess
import tomllib

import pytest
from markdown_pages import PAGES
from paths import ROOT


def test_one_version_everywhere():
    yaml = pytest.importorskip("yaml")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest, date = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
    assert (newest, date) == (version, str(citation["date-released"])) == (citation["version"], date)


def test_the_navigation_has_every_page():
    named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert named == {
        *(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")),
        *(f"repository/{name}" for name in ("CHANGELOG.md", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "SECURITY.md")),
    }


def test_issue_templates_ask_for_something():
    yaml = pytest.importorskip("yaml")
    for name in ("bug", "feature"):
        template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(template)
        assert any(part.get("validations", {}).get("required") for part in template["body"])


def test_the_check_builds_the_site_with_warnings_as_errors():
    assert re.search(r"^NO_MKDOCS_2_WARNING=1 mkdocs build --strict", (ROOT / ".ci" / "run").read_text(), re.M)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_the_release_check_reads_the_code_of_a_page(imported, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nx = 1\n```\nb\n```bash\nls\n```\n```python\ny = x\n```\n")
    assert imported("check_release").python_of(page) == "x = 1\n\ny = x\n"
