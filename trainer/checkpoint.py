"""Checkpoints: all that a run needs to resume as if it had never stopped.

    output_dir/checkpoint-12/
        progress.json    step, rows of metrics and samples so far, steps not yet in a row,
                         fingerprint, sizes of the other files
        weights/         model and optimizer; every rank writes its part, any number can read them
        rank-0.pt, ...   schedule, float16's loss scale, random states of each process

A folder of that name is complete: it is written and flushed under another name, then renamed. The
rest of a run (plan, data, reference) follows from its config and data; a checkpoint holds a
fingerprint of these, and a run that would resume differently is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor

from trainer.config.fields import RunConfig
from trainer.console import say
from trainer.data.batches import Split
from trainer.data.steps import Step
from trainer.errors import InputError
from trainer.loop import Training
from trainer.model.policy import PreferenceModel
from trainer.parallel.ways import way_of
from trainer.reference.cache import data_key, weights_key

# Said at every save of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

PROGRESS_FILE, WEIGHTS_FOLDER = "progress.json", "weights"
# Fields that may differ on resuming: they change no number of the run, or what they change (tokens,
# pairs of each step, with dropout its passes) is in the fingerprint.
FREE = frozenset(
    (
        "train_file", "eval_file", "on_bad_row", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch",
        "ref_cache_dir", "cpu_threads", "ddp_timeout", "sample_prompts", "max_new_tokens",
        "output_dir", "overwrite_output_dir", "report_to", "save_steps", "save_total_limit",
        "resume_from_checkpoint", "push_to_hub", "hub_model_id", "dry_run",
    )
)  # fmt: skip
PLAN = "per_device_train_batch_size * gradient_accumulation_steps * processes"
PASSES = (
    "per_device_train_batch_size, gradient_accumulation_steps, max_tokens_per_batch, processes "
    "(lora_dropout draws anew in every pass)"
)


def find_checkpoint(config: RunConfig) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; None starts from the beginning.

    Where it means `auto`, the newest that is not damaged.

    Raises:
        InputError: it is damaged or none, or was written with other fields.
    """
    if config.resume_from_checkpoint == "auto":
        found = _checkpoints(Path(config.output_dir))
    elif config.resume_from_checkpoint:
        found = [Path(config.resume_from_checkpoint)]
        if not (found[0] / PROGRESS_FILE).is_file():
            raise InputError(
                f"resume_from_checkpoint: expected auto or a folder checkpoint-N, got {found[0]}"
            )
    else:
        return None
    if not found:
        return None
    damaged = {folder: damage for folder in found if (damage := _damage(folder))}
    whole = [folder for folder in found if folder not in damaged]
    if not whole:
        raise InputError(
            f"resume_from_checkpoint: {damaged[found[-1]]}; give another checkpoint, "
            "or start a new run without resume_from_checkpoint"
        )
    for damage in damaged.values():
        say(f"warning: {damage}; this checkpoint is left out")
    check_fingerprint(whole[-1], _fields(config))
    return whole[-1]


class Progress(TypedDict):
    """What a checkpoint holds beside tensors, as JSON."""

    step: int
    rows: list[dict[str, float]]
    """Of `metrics.jsonl`."""
    samples: list[dict[str, Any]]
    """Of `samples.jsonl`."""
    window: list[dict[str, float]]
    """Values of the steps since the last logged row."""
    fingerprint: dict[str, Any]
    """What decides every number of the run (`fingerprint`)."""
    files: dict[str, int]
    """Their sizes in bytes, by path in the checkpoint."""


class RandomState(TypedDict):
    """Where a process' random generators stand."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: Tensor
    cuda: Tensor | None
    """None without a GPU."""


def read_progress(folder: Path) -> Progress:
    """What is known of a checkpoint without its tensors."""
    return json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))


def fingerprint(
    config: RunConfig,
    splits: dict[str, Split],
    steps: list[Step],
    models: dict[str, PreferenceModel | None],
) -> dict[str, object]:
    """What decides every number of a run, by the field that sets it.

    Every rank must call it.

    Args:
        config: of the run.
        splits: the data sets, known by their tokens.
        steps: the plan of training.
        models: what each field loaded, known by its weights.
    """
    plan = {PLAN: _digest([sorted(step.indices) for step in steps])}
    if config.lora_dropout:
        plan[PASSES] = _digest([step.micro_batches for step in steps])
    data = {
        f"{name}_file": data_key(splits[name].pairs) if name in splits else None
        for name in ("train", "eval")
    }
    weights = {
        f"weights of {name}": model and weights_key(model.language_model)
        for name, model in models.items()
    }
    return _fields(config) | data | weights | plan


def check_fingerprint(folder: Path, now: dict[str, object]) -> None:
    """Refuse to resume with what differs from `now`.

    Raises:
        InputError: naming the first field that differs, its old and its new value.
    """
    then = read_progress(folder)["fingerprint"]
    for field, value in now.items():
        if then.get(field) != value:
            raise InputError(
                f"{field}: {folder} was written with {then.get(field)}, got {value}; "
                "set it back, or start a new run without resume_from_checkpoint"
            )


def save(
    training: Training,
    folder: Path,
    fingerprint: dict[str, object],
    limit: int | None,
    accelerator: Accelerator,
) -> Path:
    """Write `folder`/checkpoint-STEP on all ranks; of the others stay the newest `limit` - 1."""
    target = folder / f"checkpoint-{training.step}"
    draft = folder / f".{target.name}"
    if accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    accelerator.wait_for_everyone()
    way = way_of(training.model, accelerator)
    way.save(training.inner_optimizer, draft / WEIGHTS_FOLDER)
    own = {"schedule": training.schedule.state_dict(), "random": _random_state()}
    own |= {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler else {}
    torch.save(own, draft / f"rank-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        progress: Progress = {
            "step": training.step,
            "rows": training.log.rows,
            "samples": training.log.samples,
            "window": training.window,
            "fingerprint": fingerprint,
            "files": {
                str(path.relative_to(draft)): path.stat().st_size
                for path in draft.rglob("*")
                if path.is_file()
            },
        }
        (draft / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        for path in [*draft.rglob("*"), draft]:
            _flush(path)
        if target.exists():  # the same step once more, after resuming from an older checkpoint
            _remove(target)
        draft.rename(target)
        _flush(folder)
        others = [path for path in _checkpoints(folder) if path != target]  # some may be later
        for old in others[: max(0, len(others) + 1 - limit)] if limit else []:
            _remove(old)
    accelerator.wait_for_everyone()
    return target


def load(training: Training, folder: Path, accelerator: Accelerator) -> None:
    """Put a checkpoint's step, weights, moments, schedule and random states into `training`."""
    progress = read_progress(folder)
    training.step, training.window = progress["step"], progress["window"]
    way = way_of(training.model, accelerator)
    way.load(training.inner_optimizer, folder / WEIGHTS_FOLDER)
    own = folder / f"rank-{accelerator.process_index}.pt"
    state = torch.load(own if own.exists() else folder / "rank-0.pt", weights_only=True)
    training.schedule.load_state_dict(state["schedule"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    if own.exists():  # a process that the checkpoint does not know keeps its seed
        _set_random_state(state["random"])


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, 0 without one."""
    found = _checkpoints(folder)
    return int(found[-1].name.removeprefix("checkpoint-")) if found else 0


def clear(folder: Path, resuming: bool) -> None:
    """Remove what a killed process left half-written and, unless resuming, an earlier run's."""
    for path in [*folder.glob(".checkpoint-*"), *([] if resuming else _checkpoints(folder))]:
        shutil.rmtree(path)


def _fields(config: RunConfig) -> dict[str, object]:
    """The fields that may not differ, as JSON gives them back; a day that is not given may."""
    values = dataclasses.asdict(config)
    values = {k: v for k, v in values.items() if k != "date" or v is not None}
    return json.loads(json.dumps({k: v for k, v in values.items() if k not in FREE}))


def _damage(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing or was cut since, in words."""
    try:
        sizes = dict(read_progress(folder)["files"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"{folder / PROGRESS_FILE} is missing or damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} is damaged: expected {size} bytes, got {path.stat().st_size}"
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that were written whole, oldest step first."""
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    numbers = [path.name.removeprefix("checkpoint-") for path in folders]
    return [folder / f"checkpoint-{n}" for n in sorted(int(n) for n in numbers if n.isdigit())]


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves none that looks complete."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}-old")))


def _digest(value: object) -> str:
    return xxhash.xxh3_64(json.dumps(value).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _random_state() -> RandomState:
    numpy = np.random.get_state()
    assert isinstance(numpy, tuple)  # not the dictionary that legacy=False would give
    name, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: RandomState) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
