"""Train a language model on preference pairs with RPO.

accelerate launch trainer/run.py                                  the default recipe
accelerate launch trainer/run.py --config FILE.yaml --beta 0.05   another one, with an override
accelerate launch trainer/run.py --dry_run                        samples and plan only
python trainer/run.py --help                                      every field
"""

import ctypes
import os
import sys
import time
from pathlib import Path

# Threads that wait must not spin: on shared cores they would take the time of those at work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if not __package__:  # run as a script: import from the repository, not from this folder
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(p for p in sys.path if Path(p or ".").resolve() != folder)]

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, set_seed

from trainer import card, checkpoint, distributed, preview, report
from trainer.adapters import add_adapters
from trainer.config import InputError, RunConfig, parse_config
from trainer.encoding import Split, encode_rows, use_chat_template
from trainer.loop import (
    Training,
    evaluate,
    evaluation_step,
    make_optimizer,
    make_schedule,
    train,
)
from trainer.model import (
    PreferenceModel,
    check_layers,
    check_model,
    compile_layers,
    load_model,
    load_tokenizer,
    locate_model,
    loss_options,
    save_model,
)
from trainer.packing import Step, plan_training, regroup, share_prefixes
from trainer.reference import Reference, check_reference
from trainer.samples import take_samples
from trainer.sources import read_splits
from trainer.stop import Stopped
from trainer.truncation import Limits


def run(config: RunConfig) -> list[dict[str, float]]:
    """Run a config from files to a saved model; returns the rows of `metrics.jsonl`."""
    started = time.perf_counter()
    report.check_trackers(config)
    sharded = distributed.take_request(config)
    accelerator = start(config)

    resumed = None
    if not config.dry_run:
        resumed = checkpoint.find_checkpoint(config)
        report.check_output_dir(config, resumed)
    check_reference(config)
    check_layers(config)
    options, source = loss_options(config), locate_model(config)
    limits = Limits(config.max_length, config.max_prompt_length, config.truncation_mode)
    tokenizer = load_tokenizer(source, config.gguf_file)
    use_chat_template(tokenizer, config.chat_template_path)
    splits = {
        name: encode_rows(rows, tokenizer, limits, bad)
        for name, (rows, bad) in read_splits(config).items()
    }
    if config.prefix_sharing:
        for split in splits.values():
            split.pairs = share_prefixes(split.pairs)
    plans = plan(config, splits, accelerator.num_processes)
    if config.dry_run:
        preview.show(config, source, tokenizer, splits, plans)
        return []
    fingerprint = checkpoint.fingerprint(config, splits, plans["train"])
    earlier: dict[str, list[dict]] = {}
    if resumed:
        checkpoint.check_fingerprint(resumed, fingerprint)
        earlier = checkpoint.read_progress(resumed)
    reports = {name: split.report for name, split in splits.items()}
    log = report.RunLog(config, reports, earlier, accelerator)
    if accelerator.is_main_process:
        checkpoint.clear(log.folder, resuming=resumed is not None)

    model = load_model(source, config)
    model = PreferenceModel(model, options, config.activation_offloading).to(accelerator.device)
    check_model(model, splits["train"].pairs[0])
    if config.torch_compile:
        compile_layers(model)
    reference = Reference(config, model, accelerator)
    if config.use_peft:
        model.model = add_adapters(model.model, config)
    if sharded:
        model = distributed.shard(model, accelerator)
        optimizer = make_optimizer(model, config)
    else:
        model, optimizer = accelerator.prepare(model, make_optimizer(model, config))
    reference.attach(model, splits, plans)
    schedule = make_schedule(optimizer, config, len(plans["train"]))
    training = Training(model, optimizer, schedule, log)

    def evaluate_now() -> None:
        if "eval" in splits:
            values = evaluate(model, splits["eval"], plans["eval"][0], accelerator)
            log.write({"step": training.step} | values)
            if config.sample_prompts:
                answers = take_samples(model, tokenizer, splits["eval"], config, accelerator)
                log.write_samples(training.step, answers)

    def save_now() -> Path:
        limit = config.save_total_limit
        return checkpoint.save(training, log.folder, fingerprint, limit, accelerator)

    if resumed:
        checkpoint.load(training, resumed, accelerator)
        report.say(f"goes on after step {training.step} of {len(plans['train'])}, from {resumed}")
    else:
        evaluate_now()
    train(training, splits["train"], plans["train"], config, accelerator, evaluate_now, save_now)
    evaluate_now()

    weights = distributed.whole_weights(model)
    if accelerator.is_main_process:
        save_model(accelerator.unwrap_model(model).model, tokenizer, log.model_folder, weights)
    log.finish(time.perf_counter() - started)
    if accelerator.is_main_process:
        card.write_card(config, log.rows, log.samples, log.model_folder)
        if config.push_to_hub:
            card.push(config, log.model_folder)
    accelerator.wait_for_everyone()
    return log.rows


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
    budget = config.max_tokens_per_batch
    if budget is None:
        return steps
    tokens = {name: [pair.packed_tokens for pair in split.pairs] for name, split in splits.items()}
    longest = max(max(counts) for counts in tokens.values())
    if longest > budget:
        raise InputError(
            f"max_tokens_per_batch: expected at least {longest}, the tokens of the longest pair, "
            f"got {budget}; raise it, or lower max_length"
        )
    return {
        name: [regroup(step, tokens[name], budget, ranks) for step in whole]
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
    precision = "bf16" if config.dtype == "bfloat16" else "no"
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=not torch.cuda.is_available(),
        log_with=list(config.report_to) or None,
        project_dir=config.output_dir,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise InputError(
            "DeepSpeed: the trainer shards with FSDP2 only, as trainer/accelerate/fsdp2.yaml does"
        )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise InputError(f"{asked} processes were asked for, {accelerator.num_processes} started")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(config.cpu_threads or max(1, share))
    set_seed(config.seed)
    return accelerator


def main() -> None:
    """Read the command line and run; what the user got wrong is one message, not a traceback."""
    try:
        run(parse_config(sys.argv[1:]))
        PartialState().destroy_process_group()  # after the model is gone: DDP's end waits for ranks
    except InputError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        report.say(f"{stopped}; go on with --resume_from_checkpoint auto")
        sys.exit(128 + stopped.number)


if __name__ == "__main__":
    main()
