"""Train a language model on preference pairs with RPO.

accelerate launch trainer/run.py                                  the default recipe
accelerate launch trainer/run.py --config FILE.yaml --beta 0.05   another one, with an override
accelerate launch trainer/run.py --dry_run                        samples and plan only
python trainer/run.py --help                                      every field
"""

import ctypes
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

# Threads that wait must not spin: on shared cores they would take the time of those at work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if not __package__:  # run as a script: import from the repository, not from this folder
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(p for p in sys.path if Path(p or ".").resolve() != folder)]

if __name__ == "__main__":
    from trainer import signals

    signals.end_at_once()

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer import best, card, checkpoint, console, output, preview
from trainer.config.fields import RunConfig
from trainer.config.recipe import parse_config
from trainer.data.batches import Split, share_prefixes
from trainer.data.chat import ChatOptions
from trainer.data.clock import today
from trainer.data.encoding import encode_rows, use_chat_template
from trainer.data.sources import read_splits
from trainer.data.steps import Step, cost, plan_training, regroup, spread
from trainer.data.truncation import Limits
from trainer.errors import InputError
from trainer.loop import Training, evaluate, evaluation_due, evaluation_step, train
from trainer.model.adapters import add_adapters
from trainer.model.fit import check_answers, check_fit
from trainer.model.generate import first_prompts, take_samples
from trainer.model.loading import check_layers, load_model, load_tokenizer, locate_model, save_model
from trainer.model.policy import PreferenceModel, compile_layers, loss_options
from trainer.model.probe import check_architecture, check_model
from trainer.optimizer import check_optimizer, make_optimizer, make_schedule
from trainer.parallel.request import handlers, requested_sharding
from trainer.parallel.ways import WAYS, Replicated, way_of
from trainer.reference.modes import Reference
from trainer.stop import Stopped, StopSignal


def run(config: RunConfig) -> list[dict[str, float]]:
    """Run a config from files to a saved model; returns the rows of `metrics.jsonl`."""
    config = with_dtype(config)
    if config.dry_run:
        return run_locked(config)
    with output.only_writer(config.output_dir):
        return run_locked(config)


def run_locked(config: RunConfig) -> list[dict[str, float]]:
    """`run`, once no other process writes to `output_dir`."""
    started = time.perf_counter()
    resumed = check(config)
    way = WAYS[requested_sharding(config)]
    accelerator = start(config)
    config = dated(config, resumed)
    options, source = loss_options(config), locate_model(config)
    alone = check_architecture(preview.skeleton(source, config), config.packing)

    tokenizer, splits = read_data(config, source)
    plans = plan(config, splits, accelerator.num_processes)
    if config.dry_run:
        console.say(f"packing: {alone or 'measured when the weights are loaded'}")
        preview.show(config, source, tokenizer, splits, plans)
        return []

    policy = PreferenceModel(load_model(source, config), options, config.activation_offloading)
    pairs = [pair for split in splits.values() for pair in split.pairs]
    check_fit(policy.language_model, pairs)
    if "eval" in splits and config.sample_prompts:
        asked = first_prompts(splits["eval"].pairs, config.sample_prompts)
        check_answers(policy.language_model, asked, config.max_new_tokens)
    policy.to(way.check_device(config, accelerator))
    alone = check_model(policy, pairs, config.packing)
    console.say(f"packing: {alone or 'yes'}")
    if alone and config.prefix_sharing:
        forget_prefixes(splits)
        plans = plan(config, splits, accelerator.num_processes)
    reference = Reference(config, policy, tokenizer, splits, accelerator)
    models = {"model_name_or_path": policy, "ref_model_name_or_path": reference.model}
    fingerprint = checkpoint.fingerprint(config, splits, plans["train"], models)
    if resumed:
        checkpoint.check_fingerprint(resumed, fingerprint)
    model, optimizer = prepare(policy, config, way, accelerator)
    reference.attach(model, splits, plans)
    log = open_log(config, splits, resumed, accelerator)  # the last check is passed
    schedule = make_schedule(optimizer, config, len(plans["train"]))
    training = Training(model, optimizer, schedule, log)

    def evaluate_now() -> None:
        if "eval" in splits:
            split, steps = splits["eval"], plans["eval"]
            values = evaluate(model, split, steps[0], accelerator, training.untrained)
            log.write({"step": training.step} | values)
            best.keep(log.rows, config, save_model_in, checkpoint.newest_step(log.folder))
            if config.sample_prompts:
                answers = take_samples(model, tokenizer, splits["eval"], config, accelerator)
                log.write_samples(training.step, answers)

    def save_model_in(folder: Path) -> None:
        save(training, tokenizer, folder, accelerator)

    def save_now() -> Path:
        limit = config.save_total_limit
        return checkpoint.save(training, log.folder, fingerprint, limit, accelerator)

    if resumed:
        checkpoint.load(training, resumed, accelerator)
        console.say(f"resumes after step {training.step} of {len(plans['train'])}, from {resumed}")
    if evaluation_due(training, config, len(plans["train"])):
        evaluate_now()
    todo = (training, splits["train"], plans["train"])
    with StopSignal(accelerator) as stop:
        train(*todo, config, accelerator, evaluate_now, save_now, stop)
        finish(training, tokenizer, config, started, accelerator)
    return log.rows


def with_dtype(config: RunConfig) -> RunConfig:
    """The config with the type that `dtype: auto` stands for on this machine."""
    if config.dtype != "auto":
        return config
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    half = half or config.model_dtype == "bfloat16"
    return replace(config, dtype="bfloat16" if half else "float32")


def check(config: RunConfig) -> Path | None:
    """Refuse what cannot run, before any work; returns the checkpoint to resume from, if any."""
    output.check_trackers(config)
    check_layers(config)
    check_optimizer(config)
    resumed = checkpoint.find_checkpoint(config)
    if not config.dry_run:
        output.check_output_dir(config, resumed)
    return resumed


def dated(config: RunConfig, resumed: Path | None) -> RunConfig:
    """The config with the run's day: as given, as the run began on, or today, on every rank."""
    if config.date is not None:
        return config
    [date] = broadcast_object_list([today()])  # rank 0's: ranks may start around midnight
    if resumed:
        date = checkpoint.read_progress(resumed)["fingerprint"]["date"]
    return replace(config, date=date)


def read_data(config: RunConfig, source: str) -> tuple[PreTrainedTokenizerBase, dict[str, Split]]:
    """The tokenizer, and the training and held-out pairs as its tokens; prints their counts."""
    tokenizer = load_tokenizer(source, config.gguf_file)
    use_chat_template(tokenizer, config.chat_template_path)
    options = ChatOptions(config.chat_template_kwargs or {}, config.date)
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    splits = {}
    for name, (rows, bad) in read_splits(config).items():
        splits[name] = encode_rows(rows, tokenizer, limits, bad, options)
        console.say(output.split_report(name, splits[name].report))
        if config.prefix_sharing:
            splits[name].pairs = share_prefixes(splits[name].pairs)
    return tokenizer, splits


def forget_prefixes(splits: dict[str, Split]) -> None:
    """Count what both sequences of a pair begin with twice, as it is computed twice."""
    for split in splits.values():
        split.pairs = [replace(pair, shared=0) for pair in split.pairs]


def open_log(
    config: RunConfig, splits: dict[str, Split], resumed: Path | None, accelerator: Accelerator
) -> output.RunLog:
    """The output folder, emptied of another run, with the rows of the checkpoint to resume from."""
    earlier: Mapping[str, Any] = checkpoint.read_progress(resumed) if resumed else {}
    reports = {name: split.report for name, split in splits.items()}
    log = output.RunLog(config, reports, earlier, accelerator)
    if accelerator.is_main_process:
        checkpoint.clear(log.folder, resuming=resumed is not None)
        if not resumed:
            best.remove(log.folder)
    if resumed:
        best.take_over(log.rows, config, resumed)
    return log


def prepare(
    policy: PreferenceModel, config: RunConfig, way: type[Replicated], accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model to train, with adapters, compiled, under DDP or sharded, and its optimizer."""
    if config.torch_compile:
        compile_layers(policy)
    if config.use_peft:
        policy.model = add_adapters(policy.language_model, config)
    return way.prepare(policy, config, make_optimizer, accelerator)


def save(
    training: Training, tokenizer: PreTrainedTokenizerBase, folder: Path, accelerator: Accelerator
) -> None:
    """Write the model as it is into a folder, complete once it is there; every rank calls it."""
    weights = way_of(training.model, accelerator).whole_weights()
    if accelerator.is_main_process:
        draft = folder.with_name(f".{folder.name}")
        for path in (draft, folder):
            shutil.rmtree(path, ignore_errors=True)
        save_model(accelerator.unwrap_model(training.model).model, tokenizer, draft, weights)
        draft.rename(folder)
    accelerator.wait_for_everyone()


def finish(
    training: Training,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    started: float,
    accelerator: Accelerator,
) -> None:
    """Save the model, draw the plot, write the model card, and upload them if asked to."""
    log = training.log
    draft = log.model_folder.with_name(f".{log.model_folder.name}")
    kept = config.metric_for_best_model and best.best_row(log.rows, config.metric_for_best_model)
    if kept and accelerator.is_main_process:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(best.folder_of(int(kept["step"]), log.folder), draft)
    elif not kept:
        save(training, tokenizer, draft, accelerator)
    log.finish(time.perf_counter() - started, kept or None)
    if accelerator.is_main_process:
        last = kept["step"] if kept else math.inf
        rows = [row for row in log.rows if row["step"] <= last]
        samples = [row for row in log.samples if row["step"] <= last]
        card.write_card(config, rows, samples, draft)
        shutil.rmtree(log.model_folder, ignore_errors=True)  # of the run that was resumed
        draft.rename(log.model_folder)
        best.remove(log.folder)
        if config.push_to_hub:
            card.push(config, log.model_folder)
    accelerator.wait_for_everyone()


def plan(config: RunConfig, splits: dict[str, Split], ranks: int) -> dict[str, list[Step]]:
    """Which pairs every training step sees, and the held-out set as one step."""
    steps = {
        "train": plan_training(
            len(splits["train"].pairs),
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            ranks=ranks,
            epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            seed=config.seed,
        )
    }
    if "eval" in splits:
        batch_size = config.per_device_eval_batch_size
        steps["eval"] = [evaluation_step(len(splits["eval"].pairs), batch_size, ranks)]
    costs = {name: [cost(pair) for pair in split.pairs] for name, split in splits.items()}
    budget = config.max_tokens_per_batch
    if budget is None:
        limits = {
            "train": config.per_device_train_batch_size,
            "eval": config.per_device_eval_batch_size,
        }
        return {
            name: [spread(step, costs[name], limits[name]) for step in whole]
            for name, whole in steps.items()
        }
    tokens = {name: [pair.packed_tokens for pair in split.pairs] for name, split in splits.items()}
    pairs = [pair for split in splits.values() for pair in split.pairs]
    longest = max(pairs, key=lambda pair: pair.packed_tokens)
    if longest.packed_tokens > budget:
        raise InputError(
            f"max_tokens_per_batch: expected at least {longest.packed_tokens}, the tokens of the "
            f"longest pair{longest.place}, got {budget}; raise it, or lower max_length"
        )
    return {
        name: [regroup(step, tokens[name], costs[name], budget, ranks) for step in whole]
        for name, whole in steps.items()
    }


def keep_freed_memory() -> None:
    """Let the C library reuse freed blocks of any size instead of giving them back to the system.

    Activations are freed and allocated again at every step, and fresh pages cost time.
    """
    try:
        tune = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    m_trim_threshold, m_mmap_max = -1, -4  # names and numbers of malloc.h
    tune(m_mmap_max, 0)
    tune(m_trim_threshold, -1)


def start(config: RunConfig) -> Accelerator:
    """Seed everything, choose precision and CPU threads."""
    accelerator = Accelerator(
        mixed_precision={"bfloat16": "bf16", "float16": "fp16"}.get(config.dtype, "no"),
        cpu=not torch.cuda.is_available(),
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
        kwargs_handlers=handlers(config),
    )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise InputError(f"{asked} processes were asked for, {accelerator.num_processes} started")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", accelerator.mixed_precision):
        raise InputError(
            f"mixed_precision: expected no, as dtype is {config.dtype}, got {launched}; set it to "
            "no in accelerate's config, and the precision by dtype"
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.cpu_threads or max(1, share))  # torchrun would have one
    set_seed(config.seed)
    return accelerator


def main(argv: list[str] | None = None, prog: str = "trainer/run.py") -> None:
    """Read the command line and run; what the user got wrong is one message, not a traceback."""
    try:
        run(parse_config(sys.argv[1:] if argv is None else argv, prog))
        PartialState().destroy_process_group()  # after the model is gone: DDP's end waits for ranks
    except InputError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        console.say(f"{stopped}; resume with --resume_from_checkpoint auto")
        sys.exit(128 + stopped.number)


if __name__ == "__main__":
    main()
