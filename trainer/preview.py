"""What a run would do (`--dry_run`): samples with trained tokens marked, lengths, steps, memory.

Nothing is trained, no weight is loaded, no file is written.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rpo_kernels import plan as head_plan
from rpo_kernels.strategy import default_workspace_mb
from trainer.config.fields import RunConfig
from trainer.console import say
from trainer.data.batches import Split
from trainer.data.chat import text_of
from trainer.data.pairs import IGNORE, Sequence
from trainer.data.steps import Step
from trainer.model.adapters import add_adapters
from trainer.model.loading import check_weights, locate_model, named, read_config

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
        source: folder or hub id of the model, of which config and weights' names alone are read.
        tokenizer: decodes the samples.
        splits, plans: what would be trained on and evaluated, and in which steps.

    Raises:
        InputError: a model's folder does not hold what its config describes.
    """
    check_weights(source, config)
    if config.ref_model_name_or_path:
        with named("ref_model_name_or_path"):
            check_weights(*second_model(config))
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
        text = text_of(tokenizer, sequence.ids[run])
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
    tokens = [split.tokens[list(step.indices)].sum() for step in steps]
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
        InputError: a model's config cannot be read, or it cannot be adapted as it is asked to be.
    """
    model = skeleton(source, config)
    vocabulary, width = model.get_output_embeddings().weight.shape
    kept = weight_bytes(model, config)
    if config.use_peft:
        add_adapters(model, config)
    count = sum(p.numel() for p in model.parameters())
    learned = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in learned)
    kept += gradients if config.use_peft else 0  # adapters and copies are as large as these
    trained = [pair.chosen.trained_tokens + pair.rejected.trained_tokens for pair in split.pairs]
    passes = [batch for step in steps for ranks in step.micro_batches for batch in ranks if batch]
    heaviest = max(passes, key=lambda batch: sum(trained[i] for i in batch))
    rows = sum(trained[i] for i in heaviest)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = head_plan.Shape(
        pairs=len(heaviest),
        length=max(split.pairs[i].tokens for i in heaviest),
        response=-(-rows // (2 * len(heaviest))),
        width=width,
        vocab=vocabulary,
        itemsize=head_plan.DTYPES[config.dtype].itemsize,
        frozen=not any(p.requires_grad for p in model.get_output_embeddings().parameters()),
        max_bytes=int((config.max_workspace_mb or default_workspace_mb(device)) * 2**20),
    )
    streaming, recompute = head_plan.streaming(shape), head_plan.recompute(shape)
    gib, mib = head_plan.GIB, 2**20
    kind = "4 bits, the head's more" if config.load_in_4bit else config.model_dtype
    state = sum(state_bytes(p, config.optim) for p in learned)
    second = ""
    if config.reference == "online":
        second = f"  reference: weights {second_model_bytes(config, source) / gib:.2f} GiB\n"
    return (
        f"  {count / 1e6:.1f} M parameters, {sum(p.numel() for p in learned) / 1e6:.1f} M trained: "
        f"weights {kept / gib:.2f} GiB ({kind}), gradients {gradients / gib:.2f} GiB, state of "
        f"{config.optim} {state / gib:.2f} GiB\n{second}"
        f"  head, at most {rows} trained tokens in a pass, vocabulary {vocabulary}: "
        f"{streaming.extra / mib:.0f} MiB streaming, {recompute.extra / mib:.0f} MiB recompute "
        f"(logits alone: {rows * vocabulary * shape.itemsize / mib:.0f} MiB)\n"
        "  the activations of the layers come on top"
    )


def skeleton(source: str, config: RunConfig) -> PreTrainedModel:
    """The model of the right shapes and types, without numbers.

    Raises:
        InputError: its config cannot be read.
    """
    settings = read_config(source, config.gguf_file)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, config.model_dtype))


def weight_bytes(model: PreTrainedModel, config: RunConfig) -> float:
    """Bytes of a whole model as it is loaded."""
    size = 0.5 if config.load_in_4bit else head_plan.DTYPES[config.model_dtype].itemsize
    return size * sum(p.numel() for p in model.parameters())


def second_model_bytes(config: RunConfig, source: str) -> float:
    """Bytes of the reference that runs beside the policy."""
    if config.ref_model_name_or_path is None:
        return weight_bytes(skeleton(source, config), config)
    with named("ref_model_name_or_path"):
        return weight_bytes(skeleton(*second_model(config)), config)


def second_model(config: RunConfig) -> tuple[str, RunConfig]:
    """Where `ref_model_name_or_path` is, and the config that loads it."""
    assert config.ref_model_name_or_path is not None
    own = replace(config, model_name_or_path=config.ref_model_name_or_path, gguf_file=None)
    return locate_model(own), own


def state_bytes(parameter: torch.Tensor, optim: str) -> int:
    """Bytes that the optimizer keeps beside a weight and its gradient."""
    count = parameter.numel()
    if optim == "adafactor":  # float32: a row and a column per matrix, and all of a vector
        shape = parameter.shape
        return 4 * (count if len(shape) < 2 else count // shape[-1] + count // shape[-2])
    moment = {"sgd": 0, "adamw_8bit": 1, "adamw_torch": parameter.element_size()}
    return 2 * moment[optim] * count
