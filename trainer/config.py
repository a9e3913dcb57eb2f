"""Everything a run depends on: one frozen dataclass, from a YAML file and command-line overrides.

    accelerate launch trainer/run.py --config my.yaml --learning_rate 1e-5

Without `--config` the default recipe is read. Names are Hugging Face's where Hugging Face has one.
A value is checked when the config is built, wherever it comes from; an unknown key is an error that
names the nearest valid one.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = ROOT / "trainer" / "recipes" / "smollm2-cpu.yaml"
DATA = (
    "train_file", "eval_file", "dataset_name", "dataset_config", "dataset_train_split",
    "dataset_test_split", "train_weights", "eval_split_ratio", "sample_prompts",
)  # fmt: skip
# Overriding the first on the command line drops what the recipe says of the old one.
DESCRIBED_BY = {
    "model_name_or_path": ("gguf_file", "logit_scale", "logit_softcap"),
    "train_file": DATA,
    "dataset_name": DATA,
}

TRACKERS = ("tensorboard", "wandb", "trackio")


class InputError(ValueError):
    """The user gave something wrong; the message says what was expected, what came, what to do."""


@dataclass(frozen=True)
class RunConfig:
    """One training run. Lengths count tokens, batch sizes pairs, intervals optimizer steps."""

    model_name_or_path: str
    """Folder or hub id of the policy, or `package:NAME`, the folder of a Python package."""
    gguf_file: str | None = None
    """Name of a GGUF file inside the model folder; its weights are dequantized."""
    logit_scale: float | None = None
    """Factor on lm_head's output, for an architecture that the trainer does not know."""
    logit_softcap: float | None = None
    """Softcap of lm_head's output, for an architecture that the trainer does not know."""

    train_file: tuple[str, ...] = ()
    """JSONL, Parquet or CSV files of training pairs, from the working folder or the repository."""
    eval_file: tuple[str, ...] = ()
    """JSONL, Parquet or CSV files of held-out pairs."""
    dataset_name: tuple[str, ...] = ()
    """Hub data sets of training pairs, or folders laid out like one; added to `train_file`."""
    dataset_config: str | None = None
    """Configuration of the data sets, where they have several."""
    dataset_train_split: str = "train"
    """Split of the data sets to train on."""
    dataset_test_split: str | None = None
    """Split of the data sets to evaluate on; added to `eval_file`."""
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
    """Names of the layers that get adapters; `all-linear` is every one but lm_head."""
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
    learning_rate: float = 5e-6
    """Learning rate after the warm-up, the largest of the run."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """Schedule of the learning rate over the run, after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
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

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the matmuls; bfloat16 is autocast, which keeps weights and sums as they are."""
    model_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the loaded weights, their gradients and moments; adapters are float32 beside any."""
    prefix_sharing: bool = True
    """Whether tokens that both sequences of a pair begin with are computed once; same loss."""
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
    max_workspace_mb: float | None = None
    """Bound on the fused head's temporary memory in MiB; null is the package's default."""
    cpu_threads: int = 0
    """Threads per process on a CPU; 0 shares all cores (`accelerate launch` would use one)."""

    logging_steps: int = 1
    """Steps between two rows of `metrics.jsonl`, which are means over these steps."""
    eval_steps: int = 0
    """Steps between evaluations; 0 evaluates before and after training only."""
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
    """Folder of a checkpoint to go on from, or `auto`: the newest in `output_dir`, if any."""
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
        """Convert every value to its field's type, then check its range."""
        for field, kind in _kinds().items():
            object.__setattr__(self, field, _convert(field, getattr(self, field), kind))
        for field, (expected, holds) in _RANGES.items():
            value = getattr(self, field)
            if value is not None and not holds(value):
                raise InputError(f"{field}: expected {expected}, got {value}")
        for field in ("model_name_or_path", "output_dir", "lora_target_modules"):
            if not getattr(self, field):
                raise InputError(f"{field}: expected a value, got an empty one")
        for message, holds in _IMPOSSIBLE.items():
            if holds(self):
                raise InputError(message.format(**vars(self)))

    def to_yaml(self) -> str:
        """Every field and its value, readable by `--config`."""
        values = dataclasses.asdict(self)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return yaml.safe_dump(values, sort_keys=False)


_RANGES = {
    "logit_scale": ("null or a number > 0", lambda x: 0 < x < float("inf")),
    "logit_softcap": ("null or a number > 0", lambda x: 0 < x < float("inf")),
    "train_weights": ("numbers > 0", lambda x: all(0 < y < float("inf") for y in x)),
    "eval_split_ratio": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "max_length": ("an integer >= 8", lambda x: x >= 8),
    "max_prompt_length": ("null or an integer >= 1", lambda x: x >= 1),
    "beta": ("a number > 0", lambda x: 0 < x < float("inf")),
    "eta": ("a number >= 0", lambda x: 0 <= x < float("inf")),
    "label_smoothing": ("a number in [0, 0.5)", lambda x: 0 <= x < 0.5),
    "lora_r": ("an integer >= 1", lambda x: x >= 1),
    "lora_alpha": ("a number > 0", lambda x: 0 < x < float("inf")),
    "lora_dropout": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "max_steps": ("-1 or an integer >= 1", lambda x: x == -1 or x >= 1),
    "num_train_epochs": ("a number > 0", lambda x: 0 < x < float("inf")),
    "per_device_train_batch_size": ("an integer >= 1", lambda x: x >= 1),
    "gradient_accumulation_steps": ("an integer >= 1", lambda x: x >= 1),
    "max_tokens_per_batch": ("null or an integer >= 8", lambda x: x >= 8),
    "per_device_eval_batch_size": ("an integer >= 1", lambda x: x >= 1),
    "learning_rate": ("a number > 0", lambda x: 0 < x < float("inf")),
    "warmup_ratio": ("a number in [0, 1]", lambda x: 0 <= x <= 1),
    "min_lr_rate": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "adam_beta1": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "adam_beta2": ("a number in [0, 1)", lambda x: 0 <= x < 1),
    "adam_epsilon": ("a number > 0", lambda x: 0 < x < float("inf")),
    "weight_decay": ("a number >= 0", lambda x: 0 <= x < float("inf")),
    "max_grad_norm": ("a number >= 0", lambda x: 0 <= x < float("inf")),
    "seed": ("an integer in [0, 2^32)", lambda x: 0 <= x < 2**32),
    "max_workspace_mb": ("null or a number > 0", lambda x: 0 < x < float("inf")),
    "cpu_threads": ("an integer >= 0", lambda x: x >= 0),
    "logging_steps": ("an integer >= 1", lambda x: x >= 1),
    "eval_steps": ("an integer >= 0", lambda x: x >= 0),
    "sample_prompts": ("an integer >= 0", lambda x: x >= 0),
    "max_new_tokens": ("an integer >= 1", lambda x: x >= 1),
    "report_to": (
        f"some of {', '.join(TRACKERS)}",
        lambda x: len({*x}) == len(x) and {*x} <= {*TRACKERS},
    ),
    "save_steps": ("an integer >= 0", lambda x: x >= 0),
    "save_total_limit": ("null or an integer >= 1", lambda x: x >= 1),
}
# Combinations that make no sense, by what is said of them.
_IMPOSSIBLE: dict[str, typing.Callable[[RunConfig], bool]] = {
    "train_file: expected training data, got none; give train_file or dataset_name": lambda c: (
        not (c.train_file or c.dataset_name)
    ),
    "dataset_config: {dataset_config!r} is of no data set; give dataset_name": lambda c: (
        c.dataset_config is not None and not c.dataset_name
    ),
    "dataset_test_split: {dataset_test_split!r} is of no data set; give dataset_name, or eval_file "
    "for files": lambda c: c.dataset_test_split is not None and not c.dataset_name,
    "train_weights: expected one weight per train_file and dataset_name, got {train_weights}": (
        lambda c: len(c.train_weights) not in (0, len(c.train_file) + len(c.dataset_name))
    ),
    "eval_split_ratio: expected 0 where eval_file or dataset_test_split holds the evaluation's "
    "pairs, got {eval_split_ratio}": lambda c: (
        c.eval_split_ratio > 0 and bool(c.eval_file or c.dataset_test_split)
    ),
    "sample_prompts: expected 0 without held-out pairs, got {sample_prompts}; give eval_file, "
    "dataset_test_split or eval_split_ratio": lambda c: (
        c.sample_prompts > 0 and not (c.eval_file or c.dataset_test_split or c.eval_split_ratio)
    ),
    "ref_model_name_or_path: expected null with reference {reference}, got "
    "{ref_model_name_or_path}": lambda c: (
        c.reference in ("adapter", "none") and c.ref_model_name_or_path is not None
    ),
    "reference: expected precomputed or online where use_peft is false, got adapter": lambda c: (
        c.reference == "adapter" and not c.use_peft
    ),
    "use_peft: expected true where a lora_ field is given, got false": lambda c: (
        not c.use_peft and _given(c, "lora_")
    ),
    "load_in_4bit: expected false without use_peft, as 4-bit weights cannot be trained": lambda c: (
        c.load_in_4bit and not c.use_peft
    ),
    "load_in_4bit: expected false with gguf_file, whose weights are dequantized": lambda c: (
        c.load_in_4bit and c.gguf_file is not None
    ),
    "optim: expected adamw_torch or adamw_8bit where an adam_ field is given, got {optim}": (
        lambda c: "adamw" not in c.optim and _given(c, "adam_")
    ),
    "min_lr_rate: expected 0 with lr_scheduler_type {lr_scheduler_type}, as only cosine ends "
    "there, got {min_lr_rate}": lambda c: c.min_lr_rate > 0 and c.lr_scheduler_type != "cosine",
    "model_dtype: expected float32 with dtype float32, got {model_dtype}": lambda c: (
        c.dtype == "float32" and c.model_dtype != "float32"
    ),
    "resume_from_checkpoint: expected null with overwrite_output_dir, which removes the run to go "
    "on with; drop one of the two": lambda c: (
        c.resume_from_checkpoint is not None and c.overwrite_output_dir
    ),
    "hub_model_id: expected a repository to push to, got null": lambda c: (
        c.push_to_hub and not c.hub_model_id
    ),
    "max_prompt_length: expected less than max_length ({max_length}), so that responses keep some "
    "tokens; got {max_prompt_length}": lambda c: (c.max_prompt_length or 0) >= c.max_length,
}


def _given(config: RunConfig, prefix: str) -> bool:
    """Whether any field of that prefix is not at its default."""
    fields = [f for f in dataclasses.fields(config) if f.name.startswith(prefix)]
    return any(getattr(config, f.name) != f.default for f in fields)


def _kinds() -> dict[str, object]:
    return typing.get_type_hints(RunConfig)


def _convert(field: str, value: object, kind: object) -> object:
    """`value` as the field's type, from YAML's types or the command line's (or `1e-5`'s) text."""
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("null", "none")):
            return None
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise InputError(f"{field}: expected one of {', '.join(choices)}, got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        values = [] if value is None else value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(field, v, typing.get_args(kind)[0]) for v in values)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    try:
        return _scalar(value, kind)
    except (ValueError, TypeError):
        raise InputError(f"{field}: expected {words[kind]}, got {value!r}") from None


def _scalar(value: object, kind: type) -> object:
    if kind is bool:
        if isinstance(value, str):
            return (
                {"true": True, "false": False}[value.lower()]
                if value.lower() in ("true", "false")
                else _refuse()
            )
        return value if isinstance(value, bool) else _refuse()
    if kind is str:
        return value if isinstance(value, str) else _refuse()
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _refuse()
    if kind is int and isinstance(value, float):
        return int(value) if value.is_integer() else _refuse()
    return kind(value)


def _refuse() -> None:
    raise ValueError


def field_docs() -> dict[str, str]:
    """Every field of `RunConfig` and the sentence beneath it, in order."""
    body = ast.parse(inspect.getsource(RunConfig)).body[0].body
    pairs = zip(body, body[1:], strict=False)
    return {
        a.target.id: b.value.value
        for a, b in pairs
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    }


def check_keys(keys: typing.Iterable[str], source: str) -> None:
    """Raise `InputError` for the first key that is no field, naming the nearest field."""
    valid = list(_kinds())
    for key in keys:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists all of them"
            raise InputError(f"{source}: unknown key {key!r}; {hint}")


def find_file(path: str) -> Path:
    """`path` in the working directory, else in the repository: recipes work from anywhere."""
    candidates = [Path(path), ROOT / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = " and ".join(dict.fromkeys(str(c.resolve()) for c in candidates))
    raise InputError(f"{path}: no such file (looked for {tried})")


def _read_yaml(path: Path) -> dict[str, object]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'field: value' lines, got {type(values).__name__}")
    check_keys(values, str(path))
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainer/run.py",
        description="Fine-tune a language model on preference pairs with RPO.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help=f"recipe to start from (default: {DEFAULT_RECIPE.name})",
    )
    docs, kinds = field_docs(), _kinds()
    for field in dataclasses.fields(RunConfig):
        default = "" if field.default is dataclasses.MISSING else f" [{field.default}]"
        many = typing.get_origin(kinds[field.name]) is tuple
        how = (
            {"nargs": "*"}
            if many
            else {"nargs": "?", "const": "true"}
            if kinds[field.name] is bool
            else {}
        )
        parser.add_argument(
            f"--{field.name}",
            default=argparse.SUPPRESS,
            metavar="X",
            help=(docs[field.name] + default).replace("%", "%%"),
            **how,
        )
    return parser


def parse_config(argv: list[str]) -> RunConfig:
    """Read the recipe and apply the overrides of the command line.

    Args:
        argv: arguments after the program's name; `--help` prints every field and exits.

    Raises:
        InputError: unknown key, wrong type, value out of range, or missing file.
    """
    given, unknown = _parser().parse_known_args(argv)
    overrides = vars(given)
    recipe = overrides.pop("config")
    for word in unknown:
        if not word.startswith("--"):
            raise InputError(f"command line: expected --field value, got {word!r}")
        check_keys([word[2:].partition("=")[0]], "command line")
    values = _read_yaml(DEFAULT_RECIPE if recipe is None else find_file(recipe))
    for owner in DESCRIBED_BY.keys() & overrides.keys():
        for field in DESCRIBED_BY[owner]:
            values.pop(field, None)
    values.update(overrides)
    for field in dataclasses.fields(RunConfig):
        if field.default is dataclasses.MISSING and field.name not in values:
            raise InputError(f"{field.name}: no value; give it in the recipe or as --{field.name}")
    return RunConfig(**values)
