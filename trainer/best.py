"""The best model of a run by a metric of its evaluations, and when to end for want of a better.

    output_dir/best-12/     the model as it was evaluated after step 12, while the run trains

Which step is best follows from the rows of metrics alone, so a resumed run agrees with the one that
was killed. What a checkpoint may need again is kept until the next one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from accelerate import PartialState

from trainer.config.fields import RunConfig
from trainer.errors import InputError

Row = dict[str, float]


def evaluations(rows: list[Row]) -> list[Row]:
    """The rows of evaluations during training; the one before it knows no trained model."""
    return [row for row in rows if "eval/loss" in row and row["step"] > 0]


def best_row(rows: list[Row], metric: str) -> Row | None:
    """The evaluation with the best `metric`, the first of equals; None without any."""
    sign = 1 if metric.startswith("loss") else -1
    return min(evaluations(rows), key=lambda row: sign * row[f"eval/{metric}"], default=None)


def out_of_patience(rows: list[Row], config: RunConfig) -> bool:
    """Whether the last `early_stopping_patience` evaluations brought no better model."""
    if config.metric_for_best_model is None or config.early_stopping_patience is None:
        return False
    best = best_row(rows, config.metric_for_best_model)
    later = [row for row in evaluations(rows) if best and row["step"] > best["step"]]
    return len(later) >= config.early_stopping_patience


def folder_of(step: int, output_dir: Path) -> Path:
    """Where the model of a step waits for the end of the run."""
    return output_dir / f"best-{step}"


def keep(
    rows: list[Row], config: RunConfig, save: Callable[[Path], None], checkpoint_step: int
) -> None:
    """Save the model that was evaluated last, if it is the best; every rank must call it.

    Args:
        rows: of the run, the last an evaluation's.
        config: says by which metric.
        save: writes the model into a folder that does not exist yet.
        checkpoint_step: step of the newest checkpoint, 0 without one; the best model up to there
            stays, too, for a run that is resumed from it.
    """
    best = config.metric_for_best_model and best_row(rows, config.metric_for_best_model)
    if not best or best is not rows[-1]:
        return
    folder = folder_of(int(best["step"]), Path(config.output_dir))
    save(folder)
    before = [row for row in rows if row["step"] <= checkpoint_step]
    kept = {folder.name}
    if not PartialState().is_main_process:
        return
    if earlier := best_row(before, str(config.metric_for_best_model)):
        kept.add(folder_of(int(earlier["step"]), folder.parent).name)
    remove(folder.parent, kept)


def take_over(rows: list[Row], config: RunConfig, checkpoint: Path) -> None:
    """Have the best model up to a checkpoint in `output_dir`, copied from beside the checkpoint.

    Raises:
        InputError: it is gone, as after resuming from another checkpoint than the newest.
    """
    best = config.metric_for_best_model and best_row(rows, config.metric_for_best_model)
    if not best:
        return
    folder = folder_of(int(best["step"]), Path(config.output_dir))
    there = folder_of(int(best["step"]), checkpoint.parent)
    if folder.exists():
        return
    if not there.exists():
        raise InputError(
            f"resume_from_checkpoint: {there}, the best model up to {checkpoint.name}, is gone; "
            "resume from a later checkpoint"
        )
    if PartialState().is_main_process:
        shutil.copytree(there, folder)


def remove(output_dir: Path, kept: Collection[str] = ()) -> None:
    """Remove the folders of best models but those named."""
    for folder in output_dir.glob("best-*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)
