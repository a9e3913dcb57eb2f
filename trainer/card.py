"""The model folder's README with recipe and curves, and its way to the hub."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from trainer.config.fields import RunConfig
from trainer.console import say
from trainer.output import PLOT_FILE, SHOWN, summary


def write_card(
    config: RunConfig, rows: list[dict[str, float]], samples: list[dict], folder: Path
) -> None:
    """Write README.md and the plot beside the saved model.

    Args:
        config: the run, given as a recipe that repeats it.
        rows: its metrics.
        samples: its rows of `samples.jsonl`.
        folder: the model folder, in the output folder that holds the plot.
    """
    name = config.model_name_or_path
    header: dict[str, object] = {"library_name": "transformers"}
    header["tags"] = ["rpo", "preference-optimization"]
    if not Path(name).exists() and not name.startswith("package:"):
        header["base_model"] = name
    shutil.copy(folder.parent / PLOT_FILE, folder / PLOT_FILE)
    steps = max((row["step"] for row in rows), default=0)
    table = summary(rows)
    parts = (
        f"---\n{yaml.safe_dump(header)}---",
        f"# {(config.hub_model_id or folder.parent.name).split('/')[-1]}",
        f"`{name}` after {steps} optimizer steps of Regularized Preference Optimization "
        "([arXiv 2405.16436](https://arxiv.org/abs/2405.16436)) with rpo_kernels.",
        f"![log-probs, rewards and loss over the steps]({PLOT_FILE})",
        f"## Held-out pairs\n\n```text\n{table}\n```" if table else "",
        show_samples(samples),
        f"## Recipe\n\n```yaml\n{config.to_yaml()}```",
    )
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def show_samples(samples: list[dict]) -> str:
    """A section with the first and the last answers to a few prompts, empty without answers."""
    if not samples:
        return ""
    parts = ["## Samples"]
    for prompt in list(dict.fromkeys(row["prompt"] for row in samples))[:SHOWN]:
        rows = [row for row in samples if row["prompt"] == prompt]
        lines = [("prompt", prompt)]
        lines += [(f"step {row['step']}", row["answer"]) for row in (rows[0], rows[-1])]
        lines += [("chosen", rows[-1]["chosen"])]
        text = "\n".join(f"{name}: {text}" for name, text in lines)
        parts.append(textwrap.indent(text, "    ", lambda line: True))  # code, whatever is in it
    return "\n\n".join(parts)


def push(config: RunConfig, folder: Path) -> None:
    """Upload the model folder to `hub_model_id`, which is created as private if need be."""
    api = HfApi()
    api.create_repo(config.hub_model_id, private=True, exist_ok=True)
    done = api.upload_folder(repo_id=config.hub_model_id, folder_path=folder)
    say(f"pushed to the hub: {done}")
