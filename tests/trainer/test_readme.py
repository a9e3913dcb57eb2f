"""trainer/README.md stays true: what it follows a batch through exists, and so do its links."""

import importlib
import re

import pytest

from tests.trainer.walk import walk
from trainer.paths import ROOT

FOLDER = ROOT / "trainer"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
BATCH, WALK = README.split("## One batch, from file to gradient\n")[1].split(
    "### The walk of a step\n"
)
BATCH, WALK = BATCH.split("\n## ")[0], WALK.split("\n## ")[0]
STOPS = [x for x in re.findall(r"`(\w+)\.([A-Za-z_.]+)`", BATCH) if x != ("metrics", "jsonl")]


@pytest.mark.parametrize(("module", "name"), STOPS)
def test_the_way_of_a_batch_leads_through_what_exists(module, name):
    path = module if module == "rpo_kernels" else f"trainer.{module}"
    found = importlib.import_module(path)
    for attribute in name.split("."):
        path = f"{path}.{attribute}"
        found = getattr(found, attribute, None) or importlib.import_module(path)
    assert callable(found)


def test_a_step_walks_through_the_files_that_are_listed():
    """In this order, and through no more of them, and between them no more often, than it did."""
    found = walk()
    assert re.findall(r"\| `([\w/.]+\.py)` \|", WALK) == list(found.functions)
    assert len(found.functions) < 19 and found.moves < 151


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(target):
    assert (FOLDER / target).exists()


def test_the_lora_commands_are_marked_for_ci():
    found = re.search(r"<!-- command: lora -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert "--use_peft true" in found[1] and "python -m trainer.merge outputs/lora" in found[1]
    assert found[1].strip().endswith("--output_dir outputs/lora-scores")
