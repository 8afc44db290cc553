"""Where the tests find what lies outside of them."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPTS = ROOT / "scripts"
#: For measuring only: tests that need it skip where it is absent.
SHARED = ROOT.parent / "shared"
