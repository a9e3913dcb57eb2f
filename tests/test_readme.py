"""README stays true: its Python runs, its commands exist, its links lead somewhere."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


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
    (command,) = [b.strip() for b in blocks("bash") if b.startswith("python -m rpo_kernels.plan")]
    words = shlex.split(command)
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "stream" in result.stdout and "fits" in result.stdout


def test_the_two_commands_are_marked_for_ci():
    for name, last in (("train", "accelerate launch trainer/run.py"), ("test", "pytest")):
        found = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, re.DOTALL)
        assert found and found.group(1).strip().endswith(last)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()


def test_no_figure_without_a_file():
    section = README.split("<!-- performance:begin -->")[1].split("<!-- performance:end -->")[0]
    names = re.findall(r"benchmarks/results/[\w.-]+\.json", section)
    assert all((ROOT / name).exists() for name in names)
    assert names or not re.search(r"\d", section), "figures must name the file that backs them"
