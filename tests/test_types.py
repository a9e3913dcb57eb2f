"""Types: mypy finds nothing in either package, and looks at every file of both."""

import importlib.metadata
import re
import sys

import pytest

from tests import background
from tests.support import ROOT

PACKAGES = ("rpo_kernels", "trainer")
MYPY = background.Command((sys.executable, "-m", "mypy"))
TYPED = ("torch", "transformers", "accelerate", "peft", "mypy")


def other_versions() -> str:
    """What is installed in other versions than the pinned: its annotations may be others, too."""
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / ".ci/constraints.txt").read_text(), re.M))
    found = {name: importlib.metadata.version(name).split("+")[0] for name in TYPED}
    return ", ".join(f"{k} {v}" for k, v in found.items() if v != pinned[k])


def commands(item):
    return () if other_versions() else (MYPY,)


@pytest.mark.skipif(bool(other_versions()), reason=f"annotations of {other_versions()}")
def test_mypy_is_content():
    """As pyproject.toml configures it: its cache makes later runs short."""
    done = background.result(MYPY)
    files = sum(len([*(ROOT / name).rglob("*.py")]) for name in PACKAGES)
    assert done.stdout.splitlines()[-1:] == [f"Success: no issues found in {files} source files"], (
        done.stdout + done.stderr
    )
