"""Reference log-probs: what the policy is compared with, by `config.reference`.

    precomputed   summed log-probs of every pair, computed before the first step, kept on disk
    online        a second, frozen model runs every batch beside the policy
    adapter       the policy runs every batch once more, its LoRA adapters switched off
    none          nothing, for a loss that is reference-free

A split carries a function from a batch to its log-probs (2B,), chosen first; that training reads
them from a table or runs a model is not visible elsewhere. Every mode runs the training plan's own
batches through the very forward that trains, so where nothing was read from disk policy and
reference agree at step 0 to the last bit, and the DPO loss is ln 2. Numbers from disk may come from
other batches, which moves it by float32 rounding (1e-5), or by that of bfloat16 (some 1e-2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trainer.config.fields import RunConfig
from trainer.console import progress, say
from trainer.data.batches import Batch, Split, named_pairs, pack
from trainer.data.steps import Step, first_visits
from trainer.errors import InputError
from trainer.model import adapters
from trainer.model.fit import check_fit, vocabulary_size
from trainer.model.loading import load_model, load_tokenizer, locate_model, named
from trainer.model.policy import PreferenceModel
from trainer.model.probe import check_model
from trainer.reference import cache

Scorer = Callable[[Batch], Tensor]
SAMPLE = 4  # pairs that are computed again when a table is loaded
# |cached - now| <= tolerance * (1 + |now|): batches differ in rounding, other numerics by more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


class Reference:
    """The reference of a run; made of the policy's first weights, before it is wrapped."""

    def __init__(
        self,
        config: RunConfig,
        policy: PreferenceModel,
        tokenizer: PreTrainedTokenizerBase,
        splits: dict[str, Split],
        accelerator: Accelerator,
    ) -> None:
        """Load the second model, if there is one, and hash the weights, if they name a table.

        Raises:
            InputError: a second model that cannot read the policy's tokens, or cannot be packed.
        """
        self.config, self.accelerator = config, accelerator
        self.model: PreferenceModel | None = None
        """The second model; None where the policy's own start is the reference."""
        if config.ref_model_name_or_path:
            self.model = _other_model(config, policy, tokenizer, splits, accelerator)
        elif config.reference == "online":
            self.model = _second_model(config, policy, accelerator)
            self.model.pack(policy.packed)
        if config.reference == "precomputed":
            source = self.model or policy
            self.key = cache.model_key(source.language_model, config.dtype)

    def attach(self, policy: nn.Module, splits: dict[str, Split], plans: dict[str, list[Step]]):
        """Give every split its `reference`; the policy must still be what it was at the start.

        Args:
            policy: the prepared `PreferenceModel`.
            splits, plans: the data sets, and the plan of each.
        """
        score = scorer(policy if self.model is None else self.model, self.accelerator)
        own = self.config.reference != "none" and not self.config.ref_model_name_or_path
        for name, split in splits.items():
            split.own_reference = own
            if self.config.reference in ("online", "adapter"):
                split.reference = score
            elif self.config.reference == "precomputed":
                logps = self._precomputed(name, split, plans[name], score)
                split.reference = lookup(logps, self.accelerator.device)
        if self.config.reference == "precomputed":
            self.model = None  # a second model is needed no more

    def _precomputed(self, name: str, split: Split, steps: list[Step], score: Scorer) -> Tensor:
        default = Path(self.config.output_dir).parent / "reference_cache"
        folder = self.config.ref_cache_dir or default
        path = Path(folder) / f"{self.key}-{cache.data_key(split.pairs)}.logps"
        [path] = broadcast_object_list([path])  # rank 0's: only there are all weights at hand
        table = cache.Table(path, len(split.pairs), self.accelerator.is_main_process)
        tolerance = TOLERANCE[self.config.dtype]
        fill(table, split, steps, score, self.accelerator, f"ref {name}", tolerance)
        return table.logps


def _second_model(
    config: RunConfig, policy: PreferenceModel, accelerator: Accelerator
) -> PreferenceModel:
    """A frozen model of its own, with the policy's loss."""
    frozen = PreferenceModel(load_model(locate_model(config), config), policy.options)
    return frozen.requires_grad_(False).eval().to(accelerator.device)


def _other_model(
    config: RunConfig,
    policy: PreferenceModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Split],
    accelerator: Accelerator,
) -> PreferenceModel:
    """`ref_model_name_or_path`, checked as the policy is, and to mean the same by every token."""
    with named("ref_model_name_or_path"):
        assert config.ref_model_name_or_path is not None
        own = replace(config, model_name_or_path=config.ref_model_name_or_path, gguf_file=None)
        _check_tokens(tokenizer, load_tokenizer(locate_model(own), None), splits)
        model = _second_model(own, policy, accelerator)
        here, there = (vocabulary_size(m.language_model) for m in (policy, model))
        if here != there:
            raise InputError(
                f"expected a model with the policy's vocabulary of {here} tokens, got {there}"
            )
        pairs = [p for split in splits.values() for p in split.pairs]
        check_fit(model.language_model, pairs)
        check_model(model, pairs, config.packing)
    return model


def _check_tokens(
    policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, splits: dict[str, Split]
) -> None:
    """Refuse a tokenizer to which a token id of the data is another token."""
    pairs = [pair for split in splits.values() for pair in split.pairs]
    ids = np.unique(np.concatenate([s.ids for p in pairs for s in (p.chosen, p.rejected)]))
    for token in ids.tolist():
        here, there = (t.convert_ids_to_tokens(token) for t in (policy, other))
        if here != there:
            raise InputError(
                f"expected a model with the policy's tokenizer, but token {token} is {here!r} to "
                f"the policy and {there!r} to this model"
            )


def scorer(model: nn.Module, accelerator: Accelerator) -> Scorer:
    """A model, without adapters, as a function from a batch to its summed log-probs (2B,).

    Args:
        model: a `PreferenceModel`, prepared or not.
        accelerator: gives the precision.
    """

    @torch.no_grad()
    def score(batch: Batch) -> Tensor:
        zeros = torch.zeros(2 * len(batch.indices), device=batch.labels.device)
        with accelerator.autocast(), adapters.switched_off(model):
            out = model(batch, zeros, 1, 1)
        return torch.cat([out.chosen_logps, out.rejected_logps])

    return score


def lookup(logps: Tensor, device: torch.device | str = "cpu") -> Scorer:
    """A table (pairs, 2) as a function from a batch to its rows (2B,), chosen first."""
    return lambda batch: logps[list(batch.indices)].T.reshape(-1).to(device)


def fill(
    table: cache.Table,
    split: Split,
    steps: list[Step],
    score: Scorer,
    accelerator: Accelerator,
    title: str,
    tolerance: float,
) -> None:
    """Compute what `steps` need and `table` lacks; every batch is on disk before the next begins.

    Args:
        table: log-probs of `split`; only the main process's comes from disk.
        split: the data set.
        steps: a plan over it; every rank computes its own batches.
        score: the reference model.
        accelerator: gives rank, device and the sum over ranks.
        title: name of the progress bar.
        tolerance: largest error of a sampled row, relative to ``1 + |log-prob|``.

    Raises:
        FloatingPointError: a log-prob is not finite.
    """
    device, rank = accelerator.device, accelerator.process_index
    table.receive(broadcast(table.state().to(device)))
    if table.known.any() and (error := _sample_error(table, split, score, device)) > tolerance:
        say(f"warning: {table.path} is off by {error:.1e} (relative); it is computed again")
        table.forget()
    rounds = [ranks for step in first_visits(steps) for ranks in step.micro_batches]
    rounds = [r for r in rounds if not table.known[[i for part in r for i in part]].all()]
    if table.known.any():
        say(f"{title}: {int(table.known.sum())} of {len(split.pairs)} pairs from {table.path}")
    for ranks in progress(rounds, title) if rounds else ():
        indices = [i for part in ranks for i in part]
        start = sum(map(len, ranks[:rank]))
        batch = pack(split.pairs, ranks[rank], ranks).to(device)
        logps = torch.zeros(len(indices), 2, device=device)
        logps[start : start + len(batch.indices)] = score(batch).view(2, -1).T
        logps = accelerator.reduce(logps, "sum").cpu()
        if not logps.isfinite().all():
            finite = logps.isfinite().all(1).tolist()
            bad = [index for index, good in zip(indices, finite, strict=True) if not good]
            raise FloatingPointError(
                f"reference log-probs of pairs are not finite: {named_pairs(split, bad)}"
            )
        table.write(indices, logps)
    accelerator.wait_for_everyone()


def _sample_error(table: cache.Table, split: Split, score: Scorer, device: torch.device) -> float:
    """Largest relative error of a few rows, spread over those that are known."""
    known = table.known.nonzero()[0]
    picked = known[np.linspace(0, len(known) - 1, min(SAMPLE, len(known))).astype(int)]
    batch = pack(split.pairs, tuple(picked.tolist())).to(device)
    now, then = score(batch), lookup(table.logps, device)(batch)
    return ((now - then).abs() / (1 + now.abs())).max().item()
