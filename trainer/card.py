"""The model folder's README, a model card of the hub, and its way there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shutil
import textwrap
from pathlib import Path

import torch
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, try_to_load_from_cache

from trainer.config.fields import RunConfig
from trainer.console import say
from trainer.model.adapters import ADAPTER_FILE
from trainer.output import PLOT_FILE, SHOWN, summary

# Fields that say where and how a run took place, not what was trained.
OF_THE_PLACE = (
    "ref_cache_dir", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub",
    "hub_model_id", "report_to", "cpu_threads", "ddp_timeout", "save_steps", "save_total_limit",
    "dry_run",
)  # fmt: skip
LIBRARIES = ("rpo-kernels", "torch", "transformers", "accelerate", "peft", "datasets")


def write_card(
    config: RunConfig, rows: list[dict[str, float]], samples: list[dict], folder: Path
) -> None:
    """Write README.md and the plot beside the saved model.

    Args:
        config: the run, of which the fields that were set are given as a recipe.
        rows: its metrics, up to the model that is saved.
        samples: its rows of `samples.jsonl`.
        folder: the model folder, in the output folder that holds the plot.
    """
    shutil.copy(folder.parent / PLOT_FILE, folder / PLOT_FILE)
    adapter = (folder / ADAPTER_FILE).exists()
    title = (config.hub_model_id or folder.parent.name).split("/")[-1]
    steps, table = max((row["step"] for row in rows), default=0), summary(rows)
    data = ModelCardData(
        base_model=config.model_name_or_path if _on_hub(config.model_name_or_path) else None,
        datasets=[name for name in config.dataset_name if _on_hub(name)] or None,
        license=licence(config.model_name_or_path),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["rpo", "preference-optimization", "generated_from_trainer"],
    )
    parts = (
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"`{public(config.model_name_or_path)}` after {steps:.0f} optimizer steps of Regularized "
        "Preference Optimization ([arXiv 2405.16436](https://arxiv.org/abs/2405.16436)), "
        f"{'as an adapter, ' if adapter else ''}with rpo_kernels.",
        f"## Use\n\n```python\n{usage(config.hub_model_id or 'PATH/TO/THIS/FOLDER', adapter)}```",
        f"## Training\n\n![log-probs, rewards and loss over the steps]({PLOT_FILE})",
        f"Held-out pairs:\n\n```text\n{table}\n```" if table else "",
        show_samples(samples),
        "## Recipe\n\nThe fields that were set, files by their names.\n\n"
        f"```yaml\n{recipe(config)}```",
        f"Versions: {versions()}.",
    )
    ModelCard("\n\n".join(part for part in parts if part) + "\n").save(folder / "README.md")


def _on_hub(name: str) -> bool:
    """Whether a name can only be a hub's id, as it is none of this machine."""
    return name.count("/") < 2 and not name.startswith("package:") and not Path(name).exists()


def public(name: str) -> str:
    """A model's or file's name without the folders that it is in here."""
    return name if _on_hub(name) or name.startswith("package:") else Path(name).resolve().name


def licence(name: str) -> str | None:
    """The licence that the base model's own card states, where it is on this machine."""
    file = Path(name) / "README.md"
    if _on_hub(name):
        file = Path(str(try_to_load_from_cache(name, "README.md") or ""))
    try:
        return ModelCard.load(file).data.license if file.is_file() else None
    except (ValueError, yaml.YAMLError, OSError):  # a card that cannot be read says nothing
        return None


def usage(place: str, adapter: bool) -> str:
    """How the model is loaded and asked."""
    library, kind = (
        ("peft", "AutoPeftModelForCausalLM")
        if adapter
        else ("transformers", "AutoModelForCausalLM")
    )
    imports = f"from {library} import {kind}\nfrom transformers import AutoTokenizer\n"
    if not adapter:
        imports = f"from transformers import {kind}, AutoTokenizer\n"
    return (
        f"{imports}\n"
        f'model = {kind}.from_pretrained("{place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n'
    )


def recipe(config: RunConfig) -> str:
    """The fields that are not at their defaults and mean something elsewhere, as YAML."""
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in OF_THE_PLACE or value == field.default:
            continue
        if field.name.endswith(("_file", "_path")) and field.name != "gguf_file":
            value = tuple(map(public, value)) if isinstance(value, tuple) else public(value)
        fields[field.name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(fields, sort_keys=False)


def versions() -> str:
    """What the run was made with, of what is installed."""
    found = []
    for name in LIBRARIES:
        try:
            build = torch.__version__ if name == "torch" else importlib.metadata.version(name)
            found.append(f"{name} {build}")  # torch's own names the CUDA it is built for
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            pass
    return ", ".join(found)


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
    assert config.hub_model_id is not None
    api = HfApi()
    api.create_repo(config.hub_model_id, private=True, exist_ok=True)
    done = api.upload_folder(repo_id=config.hub_model_id, folder_path=folder)
    say(f"pushed to the hub: {done}")
