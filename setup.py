"""Build script; metadata lives in pyproject.toml, but for what has to be made.

The description on an index is README.md without its relative links and pictures, which lead nowhere
there. The source distribution holds all that the tests need.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
BESIDE = ("tests", "benchmarks", "trainer/examples", ".ci")


def description() -> str:
    """README.md as an index shows it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]+\)\n?", "", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)[^)]+\)", r"\1", text)


class WithTests(sdist):
    """A source distribution with tests, benchmarks and what continuous integration runs."""

    def make_distribution(self) -> None:
        """Add the folders beside the packages."""
        for folder in BESIDE:
            self.filelist.graft(folder)
        self.filelist.global_exclude("*.py[co]")
        super().make_distribution()


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    cmdclass={"sdist": WithTests},
)
