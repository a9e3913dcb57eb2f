"""README stays true: its Python runs, its commands exist, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT

README = (ROOT / "README.md").read_text()
KERNELS = (ROOT / "rpo_kernels" / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_examples_run():
    ran = 0
    for block in blocks("python"):
        if "# before" in block or ".integrations." in block:  # no program; run by their own tests
            continue
        scope: dict = {}
        exec(compile(block, "README.md", "exec"), scope)
        assert scope["out"].loss.isfinite() and scope["weight"].grad.isfinite().all()
        ran += 1
    assert ran >= 1


def test_plan_command_runs():
    found = [block.strip() for block in blocks("bash", KERNELS)]
    (command,) = [block for block in found if block.startswith("python -m rpo_kernels.plan")]
    words = shlex.split(command)
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "recompute  " in result.stdout and "It fits: strategy=" in result.stdout


def command(name: str) -> str:
    """The code block that follows the marker that `.ci/run` looks for."""
    found = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert found, name
    return found.group(1).strip().replace("\\\n", "")


COMMANDS = {"train": "accelerate launch trainer/run.py", "test": "pytest"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_two_commands_are_marked_for_ci(name):
    assert command(name).endswith(COMMANDS[name])


def installs(name: str) -> list[list[str]]:
    """The words after `pip install`, of each of a command's."""
    steps = [shlex.split(step) for step in command(name).split("&&")]
    return [words[2:] for words in steps if words[:2] == ["pip", "install"]]


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def requirements(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, its own extras followed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    for extra in extras:
        for one in map(Requirement, project["optional-dependencies"][extra]):
            found += requirements(*one.extras) if one.name == project["name"] else [one]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_two_commands_install_what_was_tested(name):
    """Every package they name is held to one version, and one that pyproject.toml allows."""
    pins, words = constraints(), installs(name)
    asked = [Requirement(word) for line in words for word in line if "==" in word]
    for line in words:
        assert line[:2] == ["-c", ".ci/constraints.txt"] or line[0] == "--no-deps"
        if "-e" in line:
            asked += requirements(*Requirement(f"rpo-kernels{line[-1].removeprefix('.')}").extras)
    assert len(asked) > 10
    for one in asked:
        (pin,) = pins[canonicalize_name(one.name)].specifier
        assert pin.operator == "==" and one.specifier.contains(pin.version), one
    assert not [pin for pin in pins.values() if "+" in str(pin.specifier)]  # no local build


def test_the_newest_releases_are_tried_by_the_same_commands():
    """`.ci/newest` edits README's commands: no constraints, another environment, any torch."""

    def shown(*words: str) -> str:
        run = {"cwd": ROOT, "env": os.environ | {"README_SHOW": "1"}, "check": True}
        return subprocess.run(words, stdout=subprocess.PIPE, text=True, **run).stdout

    today = shown(".ci/run")
    assert [today.count(line) for line in COMMANDS.values()] == [1, 1]
    newest = today.replace(" -c .ci/constraints.txt", "").replace(".venv", ".ci/.venv")
    assert shown(".ci/newest") == newest != today
    torch = re.compile(r"torch==[\d.]+")
    assert shown(".ci/newest", "torch<2.12") == torch.sub("'torch<2.12'", newest) != newest


DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for folder in (".", "rpo_kernels", "trainer", "benchmarks", "benchmarks/experiments")
    for path in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files(document):
    text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / document).read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert not [target for target in targets if not (ROOT / document.parent / target).exists()]
    assert targets or document.name not in ("README.md", "FIELDS.md")


def test_a_stranger_finishes_the_readme_in_three_minutes():
    """250 words a minute of prose; code, tables and pictures are looked at."""
    prose = re.sub(
        r"```.*?```|^\|.*?$|!\[.*?\)|<!--.*?-->", "", README, flags=re.DOTALL | re.MULTILINE
    )
    assert len(prose.split()) <= 750


@pytest.mark.parametrize("text", [README, BENCHMARKS], ids=["README", "benchmarks/README"])
def test_no_figure_without_a_file(text):
    section = text.split("<!-- performance:begin -->")[1].split("<!-- performance:end -->")[0]
    names = re.findall(r"benchmarks/results/[\w.-]+\.json", section)
    assert all((ROOT / name).exists() for name in names)
    assert names or not re.search(r"\d", section), "figures must name the file that backs them"
