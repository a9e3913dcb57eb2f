"""Whether TRL and transformers are as the integration knows them.

`RPOTrainer` overrides methods of `DPOTrainer`, some of them not public, and `patch_trl` replaces a
function. A version in which one of these is gone or takes other arguments must be an error, not
another loss.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields
from importlib.metadata import version
from types import CodeType
from typing import Any

from transformers import TrainingArguments
from trl import DPOConfig
from trl.trainer import utils

BUILT_ON = "1.16"
# What is taken from TRL, by name: the parameters it must have.
PARAMETERS = {
    "trl.trainer.utils.add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
    "trl.trainer.dpo_trainer.add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
    "trl.trainer.sft_trainer.add_fused_lm_head": "model temperature cast_lm_head_to_fp32 outputs",
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction.forward": "ctx hidden weight bias targets "
    "temperature chunk_size final_logit_softcapping logit_scale outputs",
    "trl.kernels.chunked_logprob._use_triton": "device",
    "trl.trainer.dpo_trainer.use_adapter": "model adapter_name",
    "trl.trainer.dpo_trainer.disable_gradient_checkpointing": "model gradient_checkpointing_kwargs",
    "trl.trainer.dpo_trainer.DPOTrainer.__init__": "self model ref_model args data_collator "
    "train_dataset eval_dataset processing_class compute_metrics callbacks optimizers "
    "quantization_config peft_config",
    "trl.trainer.dpo_trainer.DPOTrainer.compute_loss": "self model inputs return_outputs "
    "num_items_in_batch",
    "trl.trainer.dpo_trainer.DPOTrainer.compute_ref_log_probs": "self model inputs",
    "trl.trainer.dpo_trainer.DPOTrainer._precompute_ref_logps": "self dataset name batch_size",
    "trl.trainer.dpo_trainer.DPOTrainer.log": "self logs start_time",
    "transformers.Trainer._get_num_items_in_batch": "self batch_samples device",
}
# Every option of DPOConfig that is TRL's own: one that is new is not known to fit.
OPTIONS = frozenset(
    "model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc "
    "max_length truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs "
    "precompute_ref_batch_size loss_type loss_weights ld_alpha f_divergence_type "
    "f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau activation_offloading "
    "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token".split()
)


def _find(path: str) -> Any:
    """The object at a dotted path."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return getattr(_find(module), name)


def check_trl() -> None:
    """Check that TRL and transformers are as this module knows them.

    Raises:
        RuntimeError: something that is used, replaced or overridden is gone or has changed.
    """
    changed = []
    for path, wanted in PARAMETERS.items():
        try:
            found = " ".join(inspect.signature(_find(path)).parameters)
        except (AttributeError, ImportError):
            found = "nothing"
        if found != wanted:
            changed.append(f"{path}: expected ({wanted}), got ({found})")
    own = {f.name for f in fields(DPOConfig)} - {f.name for f in fields(TrainingArguments)}
    if own != OPTIONS:
        changed.append(f"trl.DPOConfig: options {sorted(own ^ OPTIONS)} came or went")
    head = getattr(utils, "add_fused_lm_head", check_trl)
    names = _names(head.__code__)
    if not {"_ChunkedLogProbFunction", "_use_triton"} <= names:
        changed.append("trl.trainer.utils.add_fused_lm_head: it no longer calls what is patched")
    if changed:
        raise RuntimeError(
            f"rpo_kernels.integrations.trl is built on TRL {BUILT_ON}; TRL {version('trl')} with "
            f"transformers {version('transformers')} differs: " + "; ".join(changed)
        )


def _names(code: CodeType) -> set[str]:
    """Global names that a function's code uses, nested functions included."""
    nested = (_names(x) for x in code.co_consts if isinstance(x, CodeType))
    return set(code.co_names).union(*nested)
