"""RPO in TRL: `RPOTrainer` is TRL's `DPOTrainer` on our head, without logits.

    B pairs, 2B sequences (chosen first), T positions, V vocabulary

    from rpo_kernels.integrations.trl import RPOConfig, RPOTrainer

    trainer = RPOTrainer(model, args=RPOConfig(output_dir="out", beta=0.1, eta=0.005), ...)

What differs from `DPOTrainer`:

    loss       `rpo_kernels.fused_rpo_loss` inside the model's forward; no logits
    a step     divided by the pairs and chosen tokens of all its micro-batches and ranks, so that
               the gradient does not depend on how it is split
    metrics    averages over the pairs and tokens since the last log, counted once; `loss/dpo` and
               `loss/sft` besides TRL's
    entropy, logits/chosen, logits/rejected, mean_token_accuracy
               of the steps that are logged: they take a pass of their own over the vocabulary
    a tie of rewards counts half in rewards/accuracies

An option of `DPOTrainer` that does not fit is refused by name. Those who keep their trainer
call `patch_trl`. Everything is built on TRL 1.16; what it takes
from TRL is checked, and a version that moved it is an error (`trl_checks`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from rpo_kernels import checks, linear_logprobs
from rpo_kernels.integrations.transformers import IGNORE, fuse_lm_head, last_positions, shifted
from rpo_kernels.integrations.trl_checks import check_trl
from rpo_kernels.integrations.trl_metrics import COLUMNS, loss_and_table, metrics
from rpo_kernels.integrations.trl_patch import patch_trl, unpatch_trl
from rpo_kernels.losses import LOSSES, sft_weight

__all__ = ["RPOConfig", "RPOTrainer", "patch_trl", "unpatch_trl"]

LOSS_FIELDS = (
    "beta", "eta", "sft_reduction", "scale_eta_by_beta", "label_smoothing", "grad_tolerance",
    "max_workspace_mb", "strategy", "backend",
)  # fmt: skip
# Options of DPOConfig that have no meaning here: the value that leaves each alone, and the reason.
REFUSED = {
    "loss_weights": (None, "the SFT term's weight is eta"),
    "ld_alpha": (None, "the loss takes whole responses"),
    "f_divergence_type": ("reverse_kl", "the losses are defined on log-ratios"),
    "f_alpha_divergence_coef": (0.5, "the losses are defined on log-ratios"),
    "use_weighting": (False, "pairs have no weights"),
    "discopop_tau": (0.05, "there is no discopop loss"),
    "padding_free": (False, "TRL ignores it; this repository's own trainer packs without padding"),
    "use_liger_kernel": (False, "the fused head would be replaced"),
    "label_smoothing_factor": (0.0, "label_smoothing is the preference loss's own"),
    "torch_compile": (False, "the counts of a step would compile anew"),
}


def _refuse(name: str, expected: object, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got!r}")


@dataclass
class RPOConfig(DPOConfig):
    """TRL's `DPOConfig` and the options of `rpo_kernels.fused_rpo_loss`.

    `loss_type` is one loss with a reference (`rpo_kernels.losses`); `label_smoothing` makes
    ``"sigmoid"`` cDPO, where TRL ignores it.
    """

    eta: float = field(
        default=0.005, metadata={"help": "Coefficient of the SFT term; 0 is the loss alone."}
    )
    sft_reduction: str = field(
        default="sum",
        metadata={
            "help": "Form of the SFT term: minus the summed log-probs of a response ('sum'), per "
            "token of the response ('sequence_mean'), or over all chosen tokens of the step "
            "('token_mean').",
            "choices": ["sum", "sequence_mean", "token_mean"],
        },
    )
    scale_eta_by_beta: bool | None = field(
        default=None,
        metadata={"help": "Whether eta is multiplied by beta; by default for 'sum' only."},
    )
    grad_tolerance: float = field(
        default=0.0,
        metadata={"help": "Share of the gradient's L1 mass that may be left out; 0 is exact."},
    )
    max_workspace_mb: float | None = field(
        default=None,
        metadata={"help": "Bound on the head's temporary memory; 512 on CPU, 1024 elsewhere."},
    )
    strategy: str = field(
        default="auto",
        metadata={
            "help": "Of the head: auto, stream or recompute.",
            "choices": [*checks.STRATEGIES],
        },
    )
    backend: str = field(
        default="auto",
        metadata={"help": "Of the head: auto, triton or torch.", "choices": [*checks.BACKENDS]},
    )

    def __post_init__(self) -> None:
        """Refuse what does not fit, by name.

        Raises:
            ValueError, TypeError: an option that `RPOTrainer` does not have, or a value or
                combination that the loss does not define.
        """
        check_trl()
        super().__post_init__()
        for name, (only, reason) in REFUSED.items():
            if getattr(self, name) != only:
                _refuse(name, f"{only!r} ({reason})", getattr(self, name))
        if self.router_aux_loss_coef:
            _refuse(
                "router_aux_loss_coef", "None or 0 (the router's loss is left out)",
                self.router_aux_loss_coef,
            )  # fmt: skip
        known = [name for name, loss in LOSSES.items() if loss.reference]
        if len(self.loss_type) != 1 or self.loss_type[0] not in known:
            expected = f"one of {', '.join(known)} (the SFT term is eta, not 'sft')"
            _refuse("loss_type", expected, self.loss_type)
        loss = (self.eta, self.label_smoothing, self.sft_reduction, self.scale_eta_by_beta)
        checks.check_loss(self.loss_type[0], self.beta, *loss, None)
        run: dict[str, Any] = {"grad_tolerance": self.grad_tolerance, "strategy": self.strategy}
        checks.check_run(self.backend, self.max_workspace_mb, **run)


class RPOTrainer(DPOTrainer):
    """TRL's `DPOTrainer` for Regularized Preference Optimization, without logits.

    Takes what `DPOTrainer` takes, with an `RPOConfig`: text data sets in any of its formats, a
    reference model, a copy, none under peft (the adapter off) or a precomputed one, evaluation.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name: vision-language models and
            data, `compute_metrics` (it needs logits), mixtures of experts with a router loss,
            tensor, context and sequence parallelism, DeepSpeed ZeRO-3, an adapter on lm_head, a
            model that `fuse_lm_head` refuses.
    """

    _tag_names = ["trl", "rpo"]
    _name = "RPO"
    _paper = {
        "title": "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an "
        "Adversarial Regularizer",
        "id": "2405.16436",
    }
    loss_is_scaled_for_ga = True
    args: RPOConfig
    model: Any

    def __init__(self, model, ref_model=None, args=None, **options) -> None:
        """As `DPOTrainer`."""
        check_trl()
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RPOConfig(f"{name.split('/')[-1]}-RPO")
        self._check_arguments(args, options)
        with _replaced(dpo_trainer, "add_fused_lm_head", _add_head):
            super().__init__(model, ref_model, args, **options)
        if self._is_vlm:
            _refuse("processing_class", "a tokenizer (text models only)", self.processing_class)
        if self.aux_loss_enabled:
            _refuse(
                "router_aux_loss_coef", "0 for a mixture of experts (its loss is left out)",
                self.router_aux_loss_coef,
            )  # fmt: skip
        self._loss_options = {name: getattr(args, name) for name in LOSS_FIELDS}
        self._loss_options["loss_type"] = args.loss_type[0]
        self._sums: dict[str, Tensor] = {}
        self.model_accepts_loss_kwargs = True  # before 5.24: `loss_is_scaled_for_ga`

    @staticmethod
    def _check_arguments(args: object, options: dict) -> None:
        if not isinstance(args, RPOConfig):
            raise TypeError(f"args: expected an RPOConfig, got {type(args).__name__}")
        if options.get("compute_metrics") is not None:
            _refuse("compute_metrics", "None (it needs logits)", options["compute_metrics"])
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            _refuse("deepspeed", "ZeRO stage 2 or lower (or FSDP)", 3)
        parallel = args.parallelism_config
        for kind in ("tp", "cp", "sp"):
            if parallel is not None and getattr(parallel, f"{kind}_enabled", False):
                _refuse("parallelism_config", f"no {kind}_size above 1", parallel)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Pairs and chosen tokens of the whole step, over its micro-batches and all ranks."""
        counts = torch.zeros(3, dtype=torch.long)
        for batch in batch_samples:
            chosen = batch["completion_mask"][: len(batch["input_ids"]) // 2, 1:]
            found = (len(chosen), int(chosen.sum()), int(batch["attention_mask"].sum()))
            counts += torch.tensor(found)
        pairs, chosen_tokens, tokens = self.accelerator.reduce(counts.to(device), "sum").tolist()
        self._total_train_tokens += tokens
        return float(pairs), float(max(chosen_tokens, 1))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch as its share of the step's; in evaluation, of its own."""
        if return_outputs:
            raise ValueError("return_outputs: expected False (there are no logits), got True")
        mode = "train" if self.model.training else "eval"
        labels = shifted(_labels(inputs))
        chosen, rejected = self._reference(inputs)
        pairs, tokens = num_items_in_batch if mode == "train" else (None, None)
        run = functools.partial(
            loss_and_table, labels=labels, ref_logps=torch.cat([chosen, rejected]),
            statistics=self._logs_statistics(mode), num_pairs=pairs, num_chosen_tokens=tokens,
            **self._loss_options,
        )  # fmt: skip
        loss, table = model(**_model_inputs(inputs), at_head=last_positions(run, labels.shape[1]))
        if mode == "eval":  # drops what accelerate repeats to fill the last round of ranks
            table = self.accelerator.gather_for_metrics(table)
        sums = table.double().sum(0)
        self._sums[mode] = self._sums[mode] + sums if mode in self._sums else sums
        return loss * self.accelerator.num_processes if mode == "train" else loss

    def _reference(self, inputs: dict) -> tuple[Tensor, Tensor]:
        """Summed reference log-probs (B,), (B,) of chosen and rejected."""
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def compute_ref_log_probs(self, model, inputs):
        """Summed reference log-probs (B,), (B,) of chosen and rejected."""
        labels = shifted(_labels(inputs))
        run = functools.partial(linear_logprobs, targets=labels)
        at_head = last_positions(run, labels.shape[1])
        adapter: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            peft = self.accelerator.unwrap_model(self.model)
            adapter = dpo_trainer.use_adapter(peft, "ref" if "ref" in peft.peft_config else None)
        checkpointing: Any = self.args.gradient_checkpointing_kwargs  # text was parsed at the start
        with (
            torch.no_grad(),
            dpo_trainer.disable_gradient_checkpointing(self.model, checkpointing),
            adapter,
            self.accelerator.autocast(),
        ):
            logps = model(**_model_inputs(inputs), at_head=at_head)
        return logps.sum(1).chunk(2)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """As TRL's, but a log-prob cached for another truncation is not taken for this one's."""
        limits = (self.args.max_length, self.args.truncation_mode)
        if hasattr(dataset, "_fingerprint"):
            dataset = dataset.select(range(len(dataset)))  # a shallow copy
            dataset._fingerprint = Hasher.hash((dataset._fingerprint, *limits))
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _logs_statistics(self, mode: str) -> bool:
        """Whether the step at hand is logged, as far as can be told before it."""
        if mode == "eval" or self.args.logging_strategy == "epoch":
            return True
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step
        steps = self.args.logging_strategy == "steps"
        return steps and (first or step % max(self.state.logging_steps, 1) == 0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's log, with the metrics of all pairs and tokens since the last one."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums.pop(mode, None)
        if sums is not None:
            sums = self.accelerator.reduce(sums, "sum") if mode == "train" else sums
            found = metrics(dict(zip(COLUMNS, sums.tolist(), strict=True)), self.args.sft_reduction)
            found["num_tokens"] = self._total_train_tokens
            self._metrics[mode].update({name: [value] for name, value in found.items()})
            for name in logs if mode == "eval" else ():
                if name.endswith("_loss"):  # all pairs' at once, not an average of batches
                    logs[name] = found["loss/dpo"] + _sft_weight(self.args) * found["loss/sft"]
        super().log(logs, start_time)


def _add_head(model: PreTrainedModel, *_: object, **__: object) -> None:
    """In place of TRL's `add_fused_lm_head`."""
    fuse_lm_head(model)


def _labels(inputs: dict) -> Tensor:
    """Unshifted labels (2B, T) of a batch."""
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)


def _model_inputs(inputs: dict) -> dict:
    ours = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
    return {name: value for name, value in inputs.items() if name not in ours}


def _sft_weight(args: RPOConfig) -> float:
    return sft_weight(args.eta, args.beta, args.sft_reduction, args.scale_eta_by_beta)


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)
