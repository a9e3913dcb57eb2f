"""Everything a run depends on: one frozen dataclass, a sentence under each field.

Names are Hugging Face's where Hugging Face has one. Values are converted and checked when the
config is built, wherever they come from.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

import yaml

from trainer.config import values
from trainer.errors import InputError

# Metrics of an evaluation by which models are compared: the lower loss, or the higher of another.
Best = Literal["loss", "loss/dpo", "loss/sft", "rewards/accuracies", "rewards/margins",
               "rewards/chosen", "logps/chosen"]  # fmt: skip

# What fields are about, by the first of each group, for `--help` and the README.
GROUPS = {
    "model_name_or_path": "model",
    "train_file": "data",
    "loss_type": "loss",
    "reference": "reference model",
    "use_peft": "adapters (LoRA)",
    "max_steps": "steps and batches",
    "optim": "optimizer",
    "dtype": "precision, memory and speed",
    "logging_steps": "logging and evaluation",
    "save_steps": "checkpoints",
    "dry_run": "output",
}


@dataclass(frozen=True)
class RunConfig:
    """One training run. Lengths count tokens, batch sizes pairs, intervals optimizer steps."""

    model_name_or_path: str
    """Folder or hub id of the policy, or `package:NAME`, the folder of a Python package."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the model folder; its weights are dequantized."""

    train_file: tuple[str, ...] = ()
    """JSONL, JSON, CSV or Parquet files of training pairs, globs, or folders of such files, from
    the working folder or the repository; all but Parquet may be gzipped."""
    eval_file: tuple[str, ...] = ()
    """Files of held-out pairs, likewise."""
    dataset_name: tuple[str, ...] = ()
    """Hub data sets of training pairs, or folders laid out like one; added to `train_file`."""
    dataset_config: str | None = None
    """Configuration of the data sets, where they have several."""
    dataset_train_split: str = "train"
    """Split of the data sets to train on."""
    dataset_test_split: str | None = None
    """Split of the data sets to evaluate on; added to `eval_file`."""
    prompt_column: tuple[str, ...] = ("prompt",)
    """Columns that hold the prompt, joined line by line where there are several, as instruction and
    input; `a.b` and `a.0` reach into column a."""
    chosen_column: str = "chosen"
    """Column that holds the preferred response."""
    rejected_column: str = "rejected"
    """Column that holds the other response."""
    implicit_prompt: bool = False
    """Whether two strings without a prompt are cut after the words that both begin with; two
    message lists always are, after their common messages."""
    train_weights: tuple[float, ...] = ()
    """How often an epoch takes each source's rows, files before data sets: 0.25 is a quarter of
    them, 2 every row twice; none means all once."""
    eval_split_ratio: float = 0.0
    """Share of the training prompts to hold out for evaluation, with all their rows; by `seed`."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What an unusable row does: stop the run before it starts, or be left out and counted."""
    max_length: int = 1024
    """Most tokens of a sequence; a longer pair loses prompt tokens, then the responses' ends."""
    max_prompt_length: int | None = None
    """Prompt tokens that a longer pair keeps in any case; null is half of `max_length`."""
    truncation_mode: Literal["keep_end", "keep_start", "drop"] = "keep_end"
    """Which end of a cut prompt remains; `drop` leaves pairs over a limit out and counts them."""
    chat_template_path: str | None = None
    """Jinja file that stands in for the tokenizer's chat template, and is saved with the model."""
    chat_template_kwargs: dict[str, object] | None = None
    """Variables that the chat template reads, as {enable_thinking: false}; JSON on the command
    line."""
    date: str | None = None
    """Day, as 2026-11-26, that a chat template is told which asks for it; null is the day on which
    the run starts, and stays it when the run is resumed."""

    loss_type: str = "sigmoid"
    """Preference term, any of `rpo_kernels.losses.LOSSES`."""
    beta: float = 0.1
    """Strength of the KL regularization towards the reference; scales the implicit rewards."""
    eta: float = 0.005
    """Coefficient of the SFT term on the chosen response; 0 is the preference term alone (DPO)."""
    sft_reduction: Literal["sum", "sequence_mean", "token_mean"] = "sum"
    """SFT term: log-probs summed per response, averaged per response, or over a step's tokens."""
    scale_eta_by_beta: bool | None = None
    """Whether the SFT weight is eta times beta; null means for `sum` only, as its authors do."""
    label_smoothing: float = 0.0
    """Assumed share of flipped preferences, for the losses that define it."""
    simpo_gamma: float | None = None
    """SimPO's target margin, for `loss_type: simpo` alone; null is `rpo_kernels`' default."""
    reference: Literal["precomputed", "online", "adapter", "none"] = "precomputed"
    """Reference log-probs: computed once and kept on disk, by a second model beside the policy, by
    the policy without its adapters, or none, for the reference-free losses."""
    ref_model_name_or_path: str | None = None
    """Folder or hub id of another reference model, with the policy's tokenizer; null is the policy
    as it is at the start."""
    ref_cache_dir: str | None = None
    """Folder of precomputed log-probs, for any number of runs; null is
    `reference_cache` beside `output_dir`."""

    use_peft: bool = False
    """Whether LoRA adapters are trained in place of the weights, which are frozen."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32.0
    """Scale of the adapters: their product counts lora_alpha / lora_r times."""
    lora_dropout: float = 0.0
    """Dropout on what the adapters read, in training only; the model's own dropout is off."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the layers that get adapters; `all-linear` is every linear module but lm_head."""
    lora_modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole, as copies that are saved with the adapters."""
    load_in_4bit: bool = False
    """Whether the frozen weights are stored in 4 bits (QLoRA's NF4, by bitsandbytes)."""

    max_steps: int = -1
    """Optimizer steps; -1 means as many as `num_train_epochs` takes."""
    num_train_epochs: float = 1.0
    """Passes over the training pairs, where `max_steps` is -1."""
    per_device_train_batch_size: int = 4
    """Pairs in one forward and backward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Passes per optimizer step; the gradient does not depend on how a step is split."""
    max_tokens_per_batch: int | None = None
    """Cut each step, still of as many pairs as the two above say, into passes of so many tokens."""
    per_device_eval_batch_size: int = 4
    """Pairs in one evaluation pass of one process, without `max_tokens_per_batch`."""
    optim: Literal["adamw_torch", "adamw_8bit", "adafactor", "sgd"] = "adamw_torch"
    """AdamW; AdamW with 8-bit moments, by bitsandbytes; Adafactor, which keeps a row and a column
    per matrix and no mean; or plain gradient descent, which keeps nothing."""
    learning_rate: float = 1e-6
    """Learning rate after the warm-up, the largest of the run."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Schedule of the learning rate over the run, after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises from 0; `constant` has no warm-up."""
    min_lr_rate: float = 0.0
    """Share of the peak at which `cosine` ends."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: float = 1e-8
    """AdamW's addend to the root of the mean squared gradient."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    seed: int = 42
    """Seed of the order of the pairs and of every other random choice."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matmuls; `auto` is bfloat16 on GPUs that have it or beside such weights, else
    float32. The half types are autocast, which keeps weights and sums as they are, and float16, for
    GPUs without bfloat16, scales the loss and skips steps that overflow."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the loaded weights, their gradients and moments; adapters are float32 beside any."""
    packing: Literal["auto", True, False] = "auto"
    """Whether a batch is one packed row, without padding, or every sequence a row of its own, as a
    recurrent model needs it; `auto` packs where that is measured to change nothing, and says so."""
    prefix_sharing: bool = True
    """Whether tokens that both sequences of a pair begin with are computed once, in packed rows;
    same loss."""
    gradient_checkpointing: bool = False
    """Whether backward computes every layer again instead of keeping its activations."""
    activation_offloading: bool = False
    """Whether the layer inputs that checkpointing keeps wait in CPU memory; GPUs only."""
    use_liger_kernel: bool = False
    """Whether norms, rotary positions and MLPs run on Liger's kernels; GPUs only."""
    torch_compile: bool = False
    """Whether every layer is compiled around its attention; not with gradient_checkpointing."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Backend of the fused head: `auto` is Triton on GPUs and PyTorch elsewhere."""
    strategy: Literal["auto", "stream", "recompute"] = "auto"
    """How the fused head computes: `stream` makes gradients in the forward pass (3 passes over the
    vocabulary), `recompute` in the backward one (4, with less memory); `auto` streams."""
    grad_tolerance: float = 0.0
    """Share of the head's gradient, of its L1 mass, that may be left out to save time; 0 is exact,
    1e-3 is below what bfloat16 rounds off."""
    max_workspace_mb: float | None = None
    """Bound on the fused head's temporary memory in MiB; null is the package's default."""
    cpu_threads: int = 0
    """CPU threads per process; 0 shares all cores (`accelerate launch` would use one)."""
    ddp_timeout: int = 1800
    """Seconds that a process waits for the others, also while the main one saves and uploads."""

    logging_steps: int = 1
    """Steps between two rows of `metrics.jsonl`, which are means over these steps."""
    eval_steps: int = 0
    """Steps between evaluations; 0 evaluates before and after training only."""
    metric_for_best_model: Best | None = None
    """Metric of the evaluations by which the best model is kept and becomes `model/`; null is the
    model after the last step."""
    early_stopping_patience: int | None = None
    """Evaluations without a better `metric_for_best_model` after which the run ends; null is
    never."""
    sample_prompts: int = 0
    """Prompts of held-out pairs that are answered, greedily, at every evaluation; 0 is none."""
    max_new_tokens: int = 64
    """Most tokens of such an answer."""
    report_to: tuple[str, ...] = ()
    """Trackers beside `metrics.jsonl`: any of `tensorboard`, `wandb`, `trackio`."""
    save_steps: int = 0
    """Steps between checkpoints; 0 writes one only when the run is told to stop (SIGTERM)."""
    save_total_limit: int | None = None
    """Checkpoints that are kept, the newest; null keeps all."""
    resume_from_checkpoint: str | None = None
    """Folder of a checkpoint to resume from, or `auto`: the newest in `output_dir`, if any."""
    dry_run: bool = False
    """Whether to print samples, lengths and the plan of steps and memory, and end before training;
    no weights are loaded, no file is written."""
    push_to_hub: bool = False
    """Whether the model folder is uploaded to the hub when the run has finished."""
    hub_model_id: str | None = None
    """Repository on the hub to upload to; a new one is private."""
    output_dir: str = "outputs/run"
    """Where metrics, plot, resolved config and model go."""
    overwrite_output_dir: bool = False
    """Whether a run that `output_dir` already holds may be replaced."""

    def __post_init__(self) -> None:
        """Convert every value to its field's type, then check values and combinations."""
        for field, kind in typing.get_type_hints(RunConfig).items():
            try:
                value = values.convert(getattr(self, field), kind)
            except ValueError as error:
                raise InputError(f"{field}: {error}") from None
            object.__setattr__(self, field, value)
        for message in values.problems(self):
            raise InputError(message)

    def to_yaml(self) -> str:
        """Every field and its value, readable by `--config`."""
        values = dataclasses.asdict(self)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return yaml.safe_dump(values, sort_keys=False)
