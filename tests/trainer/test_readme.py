"""trainer/README.md stays true: what it follows a batch through exists, and so do its links."""

import importlib
import re

import pytest

from trainer.paths import ROOT

FOLDER = ROOT / "trainer"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
BATCH = README.split("## One batch, from file to gradient\n")[1].split("\n## ")[0]
STOPS = [x for x in re.findall(r"`(\w+)\.([A-Za-z_.]+)`", BATCH) if x != ("metrics", "jsonl")]


@pytest.mark.parametrize(("module", "name"), STOPS)
def test_the_way_of_a_batch_leads_through_what_exists(module, name):
    path = module if module == "rpo_kernels" else f"trainer.{module}"
    found = importlib.import_module(path)
    for attribute in name.split("."):
        path = f"{path}.{attribute}"
        found = getattr(found, attribute, None) or importlib.import_module(path)
    assert callable(found)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_to_files(target):
    assert (FOLDER / target).exists()


def test_the_lora_commands_are_marked_for_ci():
    found = re.search(r"<!-- command: lora -->\n```bash\n(.*?)```", README, re.DOTALL)
    assert "--use_peft true" in found[1] and "python -m trainer.merge outputs/lora" in found[1]
    assert found[1].strip().endswith("--output_dir outputs/lora-scores")
