"""Training and evaluation: passes over a `Step`, however it is split."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from trainer import best
from trainer.config.fields import RunConfig
from trainer.console import progress, say
from trainer.data.batches import Split, named_pairs, pack
from trainer.data.steps import Indices, Step, plan_pass
from trainer.model.policy import PolicyOutput
from trainer.output import RunLog
from trainer.parallel.ways import way_of
from trainer.stop import Stopped, StopSignal

METRICS = (
    "loss", "loss/dpo", "loss/sft", "loss/aux", "rewards/accuracies", "rewards/margins",
    "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "logps/chosen_delta",
    "grad/skipped",
)  # fmt: skip


COOLER = "lower learning_rate, or use dtype float32 if it is not"


def metric_shares(out: PolicyOutput, ref_logps: Tensor | None, num_pairs: int) -> Tensor:
    """`METRICS` (12,) of a batch as its share of `num_pairs` pairs; a step's shares add up.

    Without ref_logps (2B,) the chosen log-probs against the reference are NaN; a routers' loss and
    a skipped share of the gradient are 0 where there is none.
    """
    ref = math.nan if ref_logps is None else ref_logps[: len(out.chosen_logps)]
    sums = [
        x.sum() / num_pairs
        for x in (
            out.chosen_rewards, out.rejected_rewards, out.chosen_logps, out.rejected_logps,
            out.chosen_logps - ref, out.skipped.expand(len(out.chosen_logps)),
        )
    ]  # fmt: skip
    aux = out.loss.new_zeros(()) if out.aux_loss is None else out.aux_loss
    scalars = [out.loss.detach(), out.dpo_loss, out.sft_loss, aux, out.accuracy, out.margin]
    return torch.stack([x.float() for x in (*scalars, *sums)])


def named(values: Tensor) -> dict[str, float]:
    """`METRICS` (12,) by name, without those that are not defined."""
    pairs = zip(METRICS, values.tolist(), strict=True)
    missing = dict.fromkeys(("loss/aux", "grad/skipped"), lambda v: v == 0)
    missing["logps/chosen_delta"] = math.isnan
    return {k: v for k, v in pairs if not (k in missing and missing[k](v))}


def run_step(
    model: nn.Module,
    split: Split,
    step: Step,
    accelerator: Accelerator,
    *,
    train: bool,
    untrained: bool = False,
) -> Tensor:
    """Forward, and backward if `train`, over every micro-batch of a step.

    The loss is normalized by the whole step's pairs and chosen tokens, so the gradients of
    micro-batches and ranks add up to the step's gradient, however it is split.

    Args:
        model: the prepared `PreferenceModel`; with `train`, its gradients grow by the step's
            gradient.
        split: the data set; without `reference` for a reference-free loss.
        step: which pairs, and how they are split.
        accelerator: gives rank, device and the reductions over ranks.
        train: whether to compute gradients.
        untrained: whether no update has changed the weights. Where the reference is the policy's
            own start, the two are one function then, and every pair is a tie, whatever the rounding
            of log-probs says that were summed in other batches.

    Returns:
        `METRICS` (12,) of the step, the same on every rank.
    """
    model.train(train)  # for adapters' dropout; the model's own is off
    way = way_of(model, accelerator)
    pairs, num_pairs = split.pairs, len(step.indices)
    num_chosen_tokens = int(split.chosen_tokens[list(step.indices)].sum())

    shares, outcomes = torch.zeros(len(METRICS), device=accelerator.device), []
    for k, ranks in enumerate(step.micro_batches, 1):
        batch = pack(pairs, ranks[accelerator.process_index], ranks).to(accelerator.device)
        ref = None if split.reference is None else split.reference(batch)
        waits = train and k < len(step.micro_batches)
        with way.waiting() if waits else contextlib.nullcontext():
            out = model(batch, ref, num_pairs, num_chosen_tokens)
            if train:
                way.backward(out.loss)
        share = metric_shares(out, ref, num_pairs)
        if untrained and split.own_reference:
            share[METRICS.index("rewards/accuracies")] = 0.5 * len(batch.indices) / num_pairs
        shares += share
        outcomes.append((batch.indices, out.chosen_logps, out.rejected_logps))
    shares = accelerator.reduce(shares, "sum")
    if train and not shares[0].isfinite():
        check_pairs(split, outcomes, shares[0].item())
    return shares


def check_pairs(split: Split, outcomes: list[tuple[Indices, Tensor, Tensor]], loss: float) -> None:
    """Name the pairs whose log-probs are not finite, if it is they; every rank must call it.

    Args:
        split: the data set.
        outcomes: of every pass of this rank, its pairs, and their chosen and rejected log-probs.
        loss: of the step, not finite.

    Raises:
        FloatingPointError: naming them.
    """
    bad = [
        index
        for indices, *sides in outcomes
        for index, *logps in zip(indices, *(side.tolist() for side in sides), strict=True)
        if not all(map(math.isfinite, logps))
    ]
    if bad := gather_object(bad):
        raise FloatingPointError(
            f"loss {loss}, as log-probs are not finite: {named_pairs(split, bad)}; {COOLER}"
        )


def evaluation_step(num_pairs: int, batch_size: int, ranks: int) -> Step:
    """All pairs of a held-out set as one step."""
    rounds = math.ceil(num_pairs / (batch_size * ranks))
    return plan_pass(list(range(num_pairs)), num_pairs, ranks, rounds)[0]


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, step: Step, accelerator: Accelerator, untrained: bool = False
) -> dict[str, float]:
    """Means over a held-out set, as `eval/...`; `untrained` as in `run_step`."""
    started = time.perf_counter()
    values = named(run_step(model, split, step, accelerator, train=False, untrained=untrained))
    row = {f"eval/{name}": value for name, value in values.items()}
    return row | {"eval/seconds": time.perf_counter() - started}


@dataclass
class Training:
    """What changes while a run trains: all of it goes into a checkpoint."""

    model: nn.Module
    """As `accelerator.prepare` returns it, like the optimizer."""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    log: RunLog
    step: int = 0
    """Optimizer steps taken."""
    window: list[dict[str, float]] = field(default_factory=list)
    """Values of the steps since the last logged row."""

    @property
    def untrained(self) -> bool:
        """Whether no update has changed the weights: a warm-up's first has a learning rate of 0."""
        rate = self.schedule.lr_lambdas[0]
        return all(rate(k) == 0 for k in range(self.schedule.last_epoch))

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer below accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)


def train(
    training: Training,
    split: Split,
    steps: list[Step],
    config: RunConfig,
    accelerator: Accelerator,
    evaluate_now: Callable[[], None],
    save_now: Callable[[], Path],
    stop: StopSignal,
) -> None:
    """Take the plan's remaining steps, log and evaluate them.

    Args:
        training: what the steps change.
        split: the training set.
        steps: the plan of the whole run.
        config: clipping and intervals.
        accelerator: gives rank, device and the reductions over ranks.
        evaluate_now: called every `eval_steps` and after the last step.
        save_now: writes a checkpoint; called every `save_steps`, and before stopping.
        stop: asked after every step, before its evaluation, and after the last evaluation.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
        Stopped: SIGTERM or Ctrl-C came; the checkpoint is written.
    """
    last, folder = len(steps), None
    bar = progress(steps, "training", training.step, lines=True)
    for step in steps[training.step :]:
        if best.out_of_patience(training.log.rows, config):
            end_early(training, config)
            break
        take_step(training, split, step, config, accelerator)
        bar.update()
        if training.step % config.logging_steps == 0 or training.step == last:
            row = log_window(training)
            bar.set_postfix(shown(row))
            if bar.disable:
                say(line(row, last))
        if number := stop.received():
            raise Stopped(number, save_now())
        if evaluation_due(training, config, last):
            evaluate_now()
        saved = config.save_steps and training.step % config.save_steps == 0
        folder = save_now() if saved else None
    bar.close()
    if number := stop.received():
        raise Stopped(number, folder or save_now())


def log_window(training: Training) -> dict[str, float]:
    """Write the row of the steps since the last one."""
    row = {"step": training.step} | mean_row(training.window)
    training.log.write(row)
    training.window.clear()
    return row


def end_early(training: Training, config: RunConfig) -> None:
    """Say why no further step is taken, and log those that are not in a row yet."""
    if training.window:
        log_window(training)
    say(
        f"ends early, after step {training.step}: {config.metric_for_best_model} has not improved "
        f"in {config.early_stopping_patience} evaluations"
    )


def evaluation_due(training: Training, config: RunConfig, last: int) -> bool:
    """Whether an evaluation belongs here and is not among the rows.

    It belongs to step 0, every `eval_steps` and the step `last`; a run that was stopped leaves it
    to the one that resumes it.
    """
    step, every = training.step, config.eval_steps
    done = any(row["step"] == step and "eval/loss" in row for row in training.log.rows)
    return not done and (step in (0, last) or bool(every) and step % every == 0)


def take_step(
    training: Training, split: Split, step: Step, config: RunConfig, accelerator: Accelerator
) -> None:
    """Gradient, clipping, update; the step's values go to the window.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the weights are as before.
    """
    started = time.perf_counter()
    try:
        model, untrained = training.model, training.untrained
        values = named(run_step(model, split, step, accelerator, train=True, untrained=untrained))
    except FloatingPointError as error:
        raise FloatingPointError(f"step {training.step + 1}: {error}") from None
    values["learning_rate"] = float(training.schedule.get_last_lr()[0])
    norm = update(training, values["loss"], config.max_grad_norm, accelerator)
    values |= {} if norm is None else {"grad_norm": norm}
    values |= {} if accelerator.scaler is None else {"skipped_steps": float(norm is None)}
    training.step += 1
    values["tokens"] = int(split.tokens[list(step.indices)].sum())
    values["seconds"] = time.perf_counter() - started
    training.window.append(values)


def update(
    training: Training, loss: float, max_norm: float, accelerator: Accelerator
) -> float | None:
    """Clip the gradients, step optimizer and schedule, clear; returns the norm before clipping.

    None, and the schedule waits, where float16's scaled gradient overflowed (`parallel.ways`).
    """

    def check(norm: float) -> None:
        check_finite(training.step + 1, loss, norm)

    way = way_of(training.model, accelerator)
    norm = way.update(training.optimizer, max_norm, check)
    if norm is not None:
        training.schedule.step()
    return norm


def mean_row(window: list[dict[str, float]]) -> dict[str, float]:
    """The row of several steps: means, skipped steps, the last learning rate, and throughput."""
    seconds, row = sum(step["seconds"] for step in window), {}
    for name in (*METRICS, "grad_norm"):  # the last is not defined for a skipped step
        if found := [step[name] for step in window if name in step]:
            row[name] = sum(found) / (len(found) if name == "grad_norm" else len(window))
    if "skipped_steps" in window[0]:
        row["skipped_steps"] = sum(step["skipped_steps"] for step in window)
    return row | {
        "learning_rate": window[-1]["learning_rate"],
        "tokens_per_second": sum(step["tokens"] for step in window) / seconds,
        "step_seconds": seconds / len(window),
        "peak_memory_gb": peak_memory(),
    }


def peak_memory() -> float:
    """Largest memory of this process so far in GiB: of tensors on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Stop before a NaN reaches the weights."""
    if not math.isfinite(loss + grad_norm):
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {grad_norm}; {COOLER}")


def line(row: dict[str, float], last: int) -> str:
    """A logged row where there is no progress bar, with the time that is left."""
    left = timedelta(seconds=round((last - row["step"]) * row["step_seconds"]))
    values = "  ".join(f"{name} {value}" for name, value in shown(row).items())
    return f"step {row['step']:.0f}/{last}  {values}  left {left}"


def shown(row: dict[str, float]) -> dict[str, str]:
    """What the progress bar has room for."""
    return {
        "loss": f"{row['loss']:.3f}",
        "margin": f"{row['rewards/margins']:.3f}",
        "acc": f"{row['rewards/accuracies']:.2f}",
        "tok/s": f"{row['tokens_per_second']:.0f}",
    }
