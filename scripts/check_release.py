"""What a release must pass besides `.ci/run`: built, checked, installed in a fresh environment, and used there.

    pip install ".[release]" && python scripts/check_release.py
    python scripts/check_release.py --built dist      # what lies there already

Builds sdist and wheel into `dist/`, which must be empty; `twine check --strict`; installs the wheel with the versions
of constraints.txt; runs the Python code of the README and of docs/index.md in an empty folder beside `examples`, and
`hf-rfa supported llama`.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md")
TORCH = "torch==2.13.0"


def run(*command: str | Path, folder: Path = ROOT) -> None:
    """A command that has to succeed, without this checkout on its path."""
    print("+", *command, flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=folder, env={**environment, "HF_HUB_OFFLINE": "1"}, check=True)


def build(folder: Path) -> None:
    """sdist and wheel of this checkout."""
    others = [path.name for path in folder.glob("*")]
    if others:
        sys.exit(f"{folder} must be empty, so that nothing old is uploaded. Got {others}. Empty it.")
    run(sys.executable, "-m", "build", "--outdir", folder)


def python_of(page: Path) -> str:
    """The Python code of a page."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))


def try_wheel(wheel: Path) -> None:
    """Install the wheel in a fresh environment and use it as the first pages do."""
    with TemporaryDirectory() as place:
        environment, folder = Path(place) / "venv", Path(place) / "work"
        venv.create(environment, with_pip=True)
        python = environment / "bin" / "python"
        for what in (TORCH, wheel):  # torch first and alone, as in .ci/run
            run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", what)
        folder.mkdir()
        (folder / "examples").symlink_to(ROOT / "examples")
        where = "import hf_rfa, sys; print(hf_rfa.__file__); sys.exit(not hf_rfa.__file__.startswith(sys.prefix))"
        run(python, "-c", where, folder=folder)
        for page in PAGES:
            (folder / "page.py").write_text(python_of(ROOT / page), encoding="utf-8")
            run(python, "page.py", folder=folder)
        run(environment / "bin" / "hf-rfa", "supported", "llama", folder=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--built", type=Path, help="Folder with an sdist and a wheel; by default they are built.")
    options = parser.parse_args()
    dist = options.built or ROOT / "dist"
    if options.built is None:
        build(dist)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    wheels, sources = list(dist.glob(f"hf_rfa-{version}-*.whl")), list(dist.glob(f"hf_rfa-{version}.tar.gz"))
    if len(wheels) != 1 or len(sources) != 1:
        sys.exit(
            f"{dist} must hold one wheel and one sdist of {version}. Got {sorted(p.name for p in dist.iterdir())}."
        )
    run(sys.executable, "-m", "twine", "check", "--strict", *wheels, *sources)
    try_wheel(wheels[0].resolve())
    print(f"hf_rfa {version} can be released: {wheels[0].name}, {sources[0].name}")


if __name__ == "__main__":
    main()
