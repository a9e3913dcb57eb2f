"""What a run would do (`--dry_run`): samples with trained tokens marked, lengths, steps, memory.

Nothing is trained, no weight is loaded, no file is written.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from rpo_kernels import plan as head_plan
from rpo_kernels.api import CPU_WORKSPACE_MB, GPU_WORKSPACE_MB
from trainer.config import InputError, RunConfig
from trainer.packing import Step
from trainer.pairs import IGNORE, Sequence, Split
from trainer.report import say

SAMPLES, BINS, BAR = 2, 10, 40
BEGIN, END = "⟦", "⟧"


def show(
    config: RunConfig,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Split],
    plans: dict[str, list[Step]],
) -> None:
    """Print all of it on the main process.

    Args:
        config: the run's.
        source: folder or hub id of the model, whose config alone is read.
        tokenizer: decodes the samples.
        splits, plans: what would be trained on and evaluated, and in which steps.
    """
    for number, pair in enumerate(splits["train"].pairs[:SAMPLES], 1):
        for side in ("chosen", "rejected"):
            text = marked(getattr(pair, side), tokenizer)
            say(f"\nsample {number}, {side}; {BEGIN}trained on{END}\n{text}")
    say(f"\ntokens of a training sequence\n{histogram(splits['train'])}")
    say(f"\nsteps\n{steps_plan(splits['train'], plans['train'])}")
    say(f"\nmemory\n{memory_plan(config, source, splits['train'], plans['train'])}")


def marked(sequence: Sequence, tokenizer: PreTrainedTokenizerBase) -> str:
    """The sequence's text, with marks around what is trained on."""
    trained = np.concatenate([[False], sequence.labels[:-1] != IGNORE])
    parts = []
    for run in np.split(np.arange(len(trained)), np.flatnonzero(np.diff(trained)) + 1):
        text = tokenizer.decode(sequence.ids[run])
        parts.append(f"{BEGIN}{text}{END}" if trained[run[0]] else text)
    return "".join(parts)


def histogram(split: Split) -> str:
    """How many sequences have how many tokens."""
    lengths = np.array([len(s.ids) for pair in split.pairs for s in (pair.chosen, pair.rejected)])
    edges = np.linspace(lengths.min(), lengths.max() + 1, BINS + 1).astype(int)
    edges = np.unique(edges)
    counts, _ = np.histogram(lengths, edges)
    lines = [
        f"  {low:>7} to {high - 1:<7} {count:>8} {'#' * round(BAR * count / counts.max())}"
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    middle, most = np.percentile(lengths, [50, 95])
    return "\n".join([*lines, f"  half up to {middle:.0f}, 95 % up to {most:.0f}"])


def steps_plan(split: Split, steps: list[Step]) -> str:
    """Steps, their size, and the largest forward pass."""
    pairs = [len(step.indices) for step in steps]
    tokens = [sum(split.pairs[i].tokens for i in step.indices) for step in steps]
    passes = [batch for step in steps for ranks in step.micro_batches for batch in ranks]
    largest = max(sum(split.pairs[i].packed_tokens for i in batch) for batch in passes)
    return (
        f"  {len(steps)} steps of {max(pairs)} pairs, {sum(pairs) / len(split.pairs):.2f} epochs\n"
        f"  {len(steps[0].micro_batches[0])} process(es), {len(steps[0].micro_batches)} pass(es) "
        f"in the first step\n"
        f"  tokens a step: {np.mean(tokens):.0f} on average, {max(tokens)} at most\n"
        f"  largest pass of a process: {largest} packed tokens"
    )


def memory_plan(config: RunConfig, source: str, split: Split, steps: list[Step]) -> str:
    """Bytes of weights and of what is trained with them, and of the head while it runs.

    Raises:
        InputError: the model's config cannot be read.
    """
    try:
        settings = AutoConfig.from_pretrained(source, gguf_file=config.gguf_file)
    except (OSError, ValueError) as error:
        raise InputError(f"model_name_or_path: no config in {source}: {error}") from None
    with torch.device("meta"):  # shapes without numbers
        model = AutoModelForCausalLM.from_config(settings)
    count = sum(parameter.numel() for parameter in model.parameters())
    vocabulary, width = model.get_output_embeddings().weight.shape
    trained = [pair.chosen.trained_tokens + pair.rejected.trained_tokens for pair in split.pairs]
    passes = [batch for step in steps for ranks in step.micro_batches for batch in ranks if batch]
    heaviest = max(passes, key=lambda batch: sum(trained[i] for i in batch))
    rows = sum(trained[i] for i in heaviest)
    workspace = GPU_WORKSPACE_MB if torch.cuda.is_available() else CPU_WORKSPACE_MB
    shape = head_plan.Shape(
        pairs=len(heaviest),
        length=max(split.pairs[i].tokens for i in heaviest),
        response=-(-rows // (2 * len(heaviest))),
        width=width,
        vocab=vocabulary,
        itemsize=head_plan.DTYPES[config.dtype].itemsize,
        frozen=config.use_peft,
        max_bytes=int((config.max_workspace_mb or workspace) * 2**20),
    )
    streaming, recompute = head_plan.streaming(shape), head_plan.recompute(shape)
    gib, mib = head_plan.GIB, 2**20
    kind = "4 bits, the head's more" if config.load_in_4bit else config.model_dtype
    kept = count * (0.5 if config.load_in_4bit else head_plan.DTYPES[config.model_dtype].itemsize)
    state = state_bytes(model, config) / gib
    learned = f"gradients {kept / gib:.2f} GiB, state of {config.optim} {state:.2f} GiB"
    if config.use_peft:
        learned = f"gradients and state of {config.optim} for the adapters only"
    return (
        f"  {count / 1e6:.1f} M parameters: weights {kept / gib:.2f} GiB ({kind}), {learned}\n"
        f"  head, at most {rows} trained tokens in a pass, vocabulary {vocabulary}: "
        f"{streaming.extra / mib:.0f} MiB streaming, {recompute.extra / mib:.0f} MiB recompute "
        f"(logits alone: {rows * vocabulary * shape.itemsize / mib:.0f} MiB)\n"
        "  the activations of the layers come on top"
    )


def state_bytes(model: torch.nn.Module, config: RunConfig) -> int:
    """Bytes that the optimizer keeps beside all of the model's weights and gradients."""
    count = sum(p.numel() for p in model.parameters())
    if config.optim == "adafactor":  # float32: a row and a column per matrix, and all of a vector
        return 4 * sum(
            p.numel() if p.dim() < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]
            for p in model.parameters()
        )
    moment = {
        "sgd": 0,
        "adamw_8bit": 1,
        "adamw_torch": head_plan.DTYPES[config.model_dtype].itemsize,
    }
    return 2 * moment[config.optim] * count
