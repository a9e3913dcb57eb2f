"""Training and evaluation: passes over a `Step`, however it is split."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from rpo_kernels import RPOOutput
from trainer.config import RunConfig
from trainer.encoding import Split
from trainer.packing import Step, pack, plan_pass
from trainer.report import RunLog, progress

METRICS = (
    "loss", "loss/dpo", "loss/sft", "rewards/accuracies", "rewards/margins",
    "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
)  # fmt: skip


def metric_shares(out: RPOOutput, num_pairs: int) -> Tensor:
    """`METRICS` (9,) of a batch as its share of `num_pairs` pairs; a step's shares add up."""
    sums = [
        x.sum() / num_pairs
        for x in (out.chosen_rewards, out.rejected_rewards, out.chosen_logps, out.rejected_logps)
    ]
    scalars = [out.loss.detach(), out.dpo_loss, out.sft_loss, out.accuracy, out.margin]
    return torch.stack([x.float() for x in (*scalars, *sums)])


def run_step(
    model: nn.Module, split: Split, step: Step, accelerator: Accelerator, *, train: bool
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

    Returns:
        `METRICS` (9,) of the step, the same on every rank.
    """
    pairs, num_pairs = split.pairs, len(step.indices)
    num_chosen_tokens = sum(pairs[i].chosen.trained_tokens for i in step.indices)

    shares = torch.zeros(len(METRICS), device=accelerator.device)
    for k, ranks in enumerate(step.micro_batches, 1):
        batch = pack(pairs, ranks[accelerator.process_index]).to(accelerator.device)
        ref = None if split.reference is None else split.reference(batch)
        waits = train and k < len(step.micro_batches)
        with accelerator.no_sync(model) if waits else contextlib.nullcontext():
            out = model(batch, ref, num_pairs, num_chosen_tokens)
            if train:  # DDP takes the mean over ranks where the step's gradient is their sum
                accelerator.backward(out.loss * accelerator.num_processes)
        shares += metric_shares(out, num_pairs)
    return accelerator.reduce(shares, "sum")


def evaluation_step(num_pairs: int, batch_size: int, ranks: int) -> Step:
    """All pairs of a held-out set as one step."""
    rounds = math.ceil(num_pairs / (batch_size * ranks))
    return plan_pass(list(range(num_pairs)), num_pairs, ranks, rounds)[0]


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, step: Step, accelerator: Accelerator
) -> dict[str, float]:
    """Means over a held-out set, as `eval/...`."""
    started = time.perf_counter()
    values = run_step(model, split, step, accelerator, train=False).tolist()
    row = {f"eval/{name}": value for name, value in zip(METRICS, values, strict=True)}
    return row | {"eval/seconds": time.perf_counter() - started}


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay spares vectors (norms and biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    steps: list[Step],
    config: RunConfig,
    accelerator: Accelerator,
    log: RunLog,
    evaluate_now: Callable[[int], None],
) -> None:
    """Take every step of the plan, and log it.

    Args:
        model, optimizer: as `accelerator.prepare` returns them.
        split: the training set.
        steps: the plan of the run.
        config: schedule, clipping and logging.
        accelerator: gives rank, device and the reductions over ranks.
        log: receives a row every `logging_steps`.
        evaluate_now: ``(step) -> None``, called every `eval_steps` but not after the last step.

    Raises:
        FloatingPointError: the loss or the gradient is not finite.
    """
    warmup = math.ceil(config.warmup_ratio * len(steps))
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, warmup, len(steps))
    max_norm = config.max_grad_norm or math.inf
    window = Window()
    for number, step in enumerate(bar := progress(steps, "training"), 1):
        started, learning_rate = time.perf_counter(), schedule.get_last_lr()[0]
        values = run_step(model, split, step, accelerator, train=True)
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
        check_finite(number, float(values[0]), float(norm))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(split.pairs[i].tokens for i in step.indices)
        window.add(values, float(norm), tokens, time.perf_counter() - started)
        if number % config.logging_steps == 0 or number == len(steps):
            row = {"step": number, **window.means(), "learning_rate": learning_rate}
            window = Window()
            log.write(row)
            bar.set_postfix(shown(row), refresh=False)
        if config.eval_steps and number % config.eval_steps == 0 and number < len(steps):
            evaluate_now(number)


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Stop before a NaN reaches the weights."""
    if not math.isfinite(loss + grad_norm):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; lower learning_rate, "
            "or use dtype float32 if it is not"
        )


class Window:
    """The steps since the last logged row."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.norms: list[float] = []
        self.tokens, self.seconds = 0, 0.0

    def add(self, values: Tensor, grad_norm: float, tokens: int, seconds: float) -> None:
        """Note one step."""
        self.values.append(values)
        self.norms.append(grad_norm)
        self.tokens += tokens
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        """The row of these steps."""
        count = len(self.values)
        row = dict(zip(METRICS, torch.stack(self.values).mean(0).tolist(), strict=True))
        row["grad_norm"] = sum(self.norms) / count
        row["tokens_per_second"] = self.tokens / self.seconds
        row["step_seconds"] = self.seconds / count
        return row


def shown(row: dict[str, float]) -> dict[str, str]:
    """What the progress bar has room for."""
    return {
        "loss": f"{row['loss']:.3f}",
        "margin": f"{row['rewards/margins']:.3f}",
        "acc": f"{row['rewards/accuracies']:.2f}",
        "tok/s": f"{row['tokens_per_second']:.0f}",
    }
