"""What a run tells: progress, metrics, samples, plot, summary; only the main process speaks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from filelock import FileLock, Timeout

from trainer.config.fields import RunConfig
from trainer.console import is_first_process, say
from trainer.errors import InputError
from trainer.paths import open_folder

METRICS_FILE, SAMPLES_FILE, CONFIG_FILE, DATA_FILE, PLOT_FILE, MODEL_FOLDER = (
    "metrics.jsonl", "samples.jsonl", "config.yaml", "data_report.json", "logps.png", "model"
)  # fmt: skip
LOCK_FILE = ".lock"
SHOWN = 3  # samples on the console at each evaluation, and in the model card

PROJECT = "rpo_kernels"  # what trackers call the place of all runs


class RunLog:
    """The output folder: resolved config and data report at once, then a row per logged step."""

    def __init__(
        self,
        config: RunConfig,
        data_report: Mapping[str, object],
        earlier: Mapping[str, Any],
        accelerator: Accelerator,
    ) -> None:
        """Open the folder, and empty it of another run; only the main process writes.

        Args:
            config: of the run.
            data_report: what became of the rows of each split.
            earlier: `rows` and `samples` of a resumed run, which are written again.
            accelerator: gives the trackers.
        """
        self.accelerator = accelerator
        self.folder = Path(config.output_dir)
        self.rows: list[dict[str, float]] = earlier.get("rows", [])
        self.samples: list[dict[str, Any]] = earlier.get("samples", [])
        if PartialState().is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
            (self.folder / DATA_FILE).write_text(
                json.dumps(data_report, indent=2) + "\n", encoding="utf-8"
            )
            for name in (METRICS_FILE, SAMPLES_FILE, PLOT_FILE):
                (self.folder / name).unlink(missing_ok=True)
            for events in (self.folder / PROJECT).rglob("events.out.tfevents.*"):  # TensorBoard's
                events.unlink()
            if not earlier and self.model_folder.exists():
                shutil.rmtree(self.model_folder)
        self._append(METRICS_FILE, self.rows)
        self._append(SAMPLES_FILE, self.samples)
        if config.report_to:
            values = dataclasses.asdict(config)
            simple = {k: v if isinstance(v, int | float) else str(v) for k, v in values.items()}
            accelerator.init_trackers(PROJECT, config=simple)
        for row in self.rows:
            self._track(row)

    def write(self, row: dict[str, float]) -> None:
        """Append one row, here and in the trackers."""
        self.rows.append(row)
        self._append(METRICS_FILE, [row])
        self._track(row)

    def write_samples(self, step: int, samples: list[dict[str, str]]) -> None:
        """Append an evaluation's samples, and show a few."""
        rows: list[dict[str, Any]] = [{"step": step, **row} for row in samples]
        self.samples += rows
        self._append(SAMPLES_FILE, rows)
        for row in rows[:SHOWN]:
            prompt, answer = (" ".join(row[name].split()) for name in ("prompt", "answer"))
            say(f"step {step}, sample: ...{prompt[-60:]} => {answer[:100]}")

    def _track(self, row: dict[str, float]) -> None:
        """Send one row to the trackers."""
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def _append(self, name: str, rows: list[dict]) -> None:
        """Append at once, so that an interrupted run keeps what it measured."""
        if rows and PartialState().is_main_process:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

    @property
    def model_folder(self) -> Path:
        """Where the trained model goes."""
        return self.folder / MODEL_FOLDER

    def finish(self, seconds: float, kept: dict[str, float] | None = None) -> None:
        """Draw the plot, and print what changed, and what one may do with the model.

        Args:
            seconds: wall time of the run.
            kept: the evaluation of the model that is saved, if it is not the last.
        """
        if PartialState().is_main_process:
            plot_run(self.rows, self.folder / PLOT_FILE)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        rows = [row for row in self.rows if kept is None or row["step"] <= kept["step"]]
        if kept:
            say(f"the best model is that of step {kept['step']:.0f}")
        say(f"{summary(rows)}\nfinished in {seconds:.0f} s: {self.folder}")
        say(f"talk to it: rpo chat {self.model_folder}\n")


def split_report(name: str, report: dict[str, Any]) -> str:
    """What became of a split's rows: its size, and a line for everything that is not as it was."""
    lines = [
        f"{name:<5}  {report['pairs']:,} pairs, {report['tokens']:,} tokens of which "
        f"{report['trained_tokens']:,} are trained on, longest sequence {report['longest']:,}"
    ]
    if report["truncated_pairs"]:
        lines.append(
            f"{report['truncated_pairs']:,} pairs cut to max_length: "
            f"{report['truncated_prompts']:,} prompts, {report['truncated_responses']:,} responses"
        )
    if report["untrained_turns"]:
        lines.append(f"{report['untrained_turns']:,} assistant turns are read and not trained on")
    for what in ("dropped", "bad_rows", "sources"):
        counts = report[what].items() if what != "sources" or len(report[what]) > 1 else ()
        lines += [f"{what.replace('_', ' ')}, {why}: {count:,}" for why, count in counts]
    return "\n       ".join(lines)


def check_trackers(config: RunConfig) -> None:
    """Refuse a tracker whose package is missing, which accelerate would leave out unsaid.

    Raises:
        InputError: naming the package.
    """
    available = [str(name) for name in get_available_trackers()]
    for name in config.report_to:
        if name not in available:
            raise InputError(f"report_to: {name} is not installed; run: pip install {name}")


@contextlib.contextmanager
def only_writer(output_dir: str) -> Iterator[None]:
    """Inside, the output folder exists, can be written, and no other run writes to it.

    Raises:
        InputError: it cannot be made or written, or another process runs in it.
    """
    folder = open_folder(output_dir)
    if not is_first_process():
        yield
        return
    lock = FileLock(folder / LOCK_FILE)  # the end of the process unlocks, too
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"output_dir: another process is writing to {folder}; wait until it has ended, "
            "or choose another one"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_output_dir(config: RunConfig, checkpoint: Path | None) -> None:
    """Refuse to replace an earlier run unasked.

    The folder of the checkpoint to resume from is no earlier run, nor, for `auto`, is one that was
    stopped before its first checkpoint.

    Raises:
        InputError: the folder holds a run and `overwrite_output_dir` is off, or a model that this
            one starts from.
    """
    folder = Path(config.output_dir)
    metrics, model = folder / METRICS_FILE, folder / MODEL_FOLDER
    resuming = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if resuming or (config.resume_from_checkpoint == "auto" and not model.exists()):
        return
    holds_run = model.exists() or (metrics.exists() and metrics.stat().st_size)
    if holds_run and not config.overwrite_output_dir:
        raise InputError(
            f"output_dir: {folder} already holds a run; choose another one, "
            "or replace it with --overwrite_output_dir"
        )
    for name in ("model_name_or_path", "ref_model_name_or_path"):
        source = getattr(config, name)
        if source and model.exists() and Path(source).resolve().is_relative_to(model.resolve()):
            raise InputError(
                f"output_dir: {folder} holds {name}, which replacing it would remove; "
                "choose another one"
            )


def plot_run(rows: list[dict[str, float]], path: Path) -> None:
    """Draw log-probs, rewards and loss over the steps; the evaluation set's values as dots."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval/loss" in row]
    against = any("logps/chosen_delta" in row for row in training)  # else there is no reference
    panels = (
        ("chosen responses against the reference", "change of log-prob, nats",
         {"logps/chosen_delta": "chosen"})
        if against
        else ("log-probs of responses", "log-prob, nats",
              {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
        ("implicit rewards", "reward",
         {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}),
        ("loss", "loss", {"loss": "whole", "loss/dpo": "preference term"}),
    )  # fmt: skip
    with rc_context({"font.size": 13}):
        figure = Figure(figsize=(16, 5.4), layout="constrained")
        for axes, (title, unit, keys) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for i, (key, name) in enumerate(keys.items()):
                seen, tested = (
                    [(row["step"], row[prefix + key]) for row in found if prefix + key in row]
                    for prefix, found in (("", training), ("eval/", held_out))
                )
                if seen:
                    axes.plot(*zip(*seen, strict=True), f"C{i}", alpha=0.5, label=name)
                if tested:
                    label = f"{name}, evaluation set"
                    axes.plot(*zip(*tested, strict=True), f"C{i}o--", label=label)
            axes.set(title=title, xlabel="optimizer step", ylabel=unit)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=11, ncols=2)
        figure.savefig(path, dpi=100)


def summary(rows: list[dict[str, float]]) -> str:
    """A table of the first and the last evaluation, empty without two of them."""
    held_out = [row for row in rows if "eval/loss" in row]
    if len(held_out) < 2:
        return ""
    before, after = held_out[0], held_out[-1]
    lines = [f"{'held-out':<20}{'before':>12}{'after':>12}{'change':>12}"]
    for key in (k for k in before if k.startswith("eval/") and k != "eval/seconds"):
        name, a, b = key.removeprefix("eval/"), before[key], after[key]
        lines.append(f"{name:<20}{a:>12.4f}{b:>12.4f}{b - a:>+12.4f}")
    return "\n".join(lines)
