"""Types: mypy finds nothing in either package, and looks at every file of both."""

import subprocess
import sys

from tests.support import ROOT

PACKAGES = ("rpo_kernels", "trainer")


def test_mypy_is_content():
    """As pyproject.toml configures it, with what is installed: its cache makes later runs short."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    files = sum(len([*(ROOT / name).rglob("*.py")]) for name in PACKAGES)
    assert done.stdout.splitlines()[-1:] == [f"Success: no issues found in {files} source files"], (
        done.stdout + done.stderr
    )
