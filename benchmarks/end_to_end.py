"""Whole training steps against TRL: `python -m benchmarks.end_to_end [--steps 6] [--smoke]`.

SmolLM2-135M-Instruct, AdamW, two pairs a step, sequences cut to 512 tokens, DPO plus the token-mean
SFT term (TRL: ``loss_type=["sigmoid", "sft"]``), on the GPU if there is one. `--model_folder` takes
another model: a tokenizer and a config.json, weights at random. Every trainer runs in a process of
its own, on the same pairs in the same order; the first step, which warms up, is not timed. Losses
must agree before a time counts (`agrees`). Writes one JSON file to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.environment import ROOT, describe
from benchmarks.inputs import FALLBACK, PAIRS

BETA, LEARNING_RATE, MAX_LENGTH = 0.1, 1e-6, 512
PER_STEP = 2  # pairs
LOSS_TOLERANCE = 1e-3  # relative
DTYPES = ("float32", "bfloat16")
LOW = {
    "gradient_checkpointing": True,
    "max_workspace_mb": 64.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
}
OURS: dict[str, dict] = {
    "ours, prefix sharing": {"prefix_sharing": True},
    "ours, separate sequences": {"prefix_sharing": False},
    "ours, low memory": {"prefix_sharing": True} | LOW,
    "ours, low memory, Adafactor": {"prefix_sharing": True, "optim": "adafactor"} | LOW,
}
BASE = "TRL, reference precomputed"
TRL: dict[str, bool] = {BASE: True, "TRL, reference online": False}


def prepare(
    folder: Path, steps: int, smoke: bool, pairs: int = PER_STEP, model_folder: Path | None = None
) -> None:
    """The model as a folder; the pairs as two files: ours, and TRL's in the order of our plan."""
    import transformers

    from trainer.config.recipe import parse_config
    from trainer.data.steps import plan_training
    from trainer.model.loading import load_model, load_tokenizer, locate_model, save_model

    if model_folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
        sizes = transformers.AutoConfig.from_pretrained(model_folder)
    else:
        config = parse_config([])  # the default recipe's model
        place = locate_model(config)
        tokenizer = load_tokenizer(place, config.gguf_file)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes = transformers.LlamaConfig(vocab_size=len(tokenizer), **shape, **heads)
    tokenizer.chat_template = end_at_end_token(tokenizer.chat_template)
    if smoke or model_folder:
        transformers.set_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = transformers.AutoModelForCausalLM.from_config(sizes)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    else:
        save_model(load_model(place, config), tokenizer, folder / "model")
    source = PAIRS if PAIRS.exists() else FALLBACK
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    rows = [
        {key: row[key] for key in ("prompt", "chosen", "rejected")}
        for row in rows
        if row.get("turn", 1) == 1
        and all(message["content"].strip() for message in row["chosen"] + row["rejected"])
    ][: pairs * steps]
    plan = plan_training(
        len(rows), batch_size=pairs, accumulation=1, ranks=1, epochs=1, max_steps=-1, seed=0
    )
    order = [index for step in plan for index in step.indices]
    for name, indices in (("ours", range(len(rows))), ("trl", order)):
        lines = [json.dumps(rows[i]) + "\n" for i in indices]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def end_at_end_token(template: str) -> str:
    """SmolLM2's chat template without the line feed behind the last answer.

    TRL trains on it as on a token of the answer; our trainer ends an answer at its end token.
    """
    old, new = "'<|im_end|>' + '\n'}}", "'<|im_end|>' + ('' if loop.last and answer else '\n')}}"
    if template.count(old) != 1:
        raise ValueError(f"chat template: expected {old} once in {template}")
    return template.replace(old, new.replace("answer", "message['role'] == 'assistant'"))


def run_ours(
    name: str, dtype: str, folder: Path, threads: int, pairs: int, length: int
) -> tuple[list[float], list[float]]:
    """``(seconds, losses)`` of every step of our trainer."""
    from trainer.config.fields import RunConfig
    from trainer.run import run

    options = {"per_device_train_batch_size": pairs} | OURS[name]
    if "gradient_accumulation_steps" in options:
        options["gradient_accumulation_steps"] = pairs
    with tempfile.TemporaryDirectory() as output:
        config = RunConfig(
            model_name_or_path=str(folder / "model"),
            train_file=(str(folder / "ours.jsonl"),),
            max_length=length,
            truncation_mode="keep_start",
            beta=BETA,
            eta=1.0,
            sft_reduction="token_mean",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_ratio=0.0,
            dtype=dtype,
            seed=0,
            cpu_threads=threads,
            ref_cache_dir=str(Path(output) / "cache"),
            output_dir=str(Path(output) / "run"),
            **options,
        )
        rows = [row for row in run(config) if "loss" in row]
    return [row["step_seconds"] for row in rows], [row["loss"] for row in rows]


def run_trl(
    name: str, dtype: str, folder: Path, threads: int, pairs: int, length: int
) -> tuple[list[float], list[float]]:
    """``(seconds, losses)`` of every step of TRL's trainer."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(threads)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as output:
        arguments = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=pairs,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=length,
            truncation_mode="keep_start",
            beta=BETA,
            loss_type=["sigmoid", "sft"],
            loss_weights=[1.0, 1.0],
            precompute_ref_log_probs=TRL[name],
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            bf16=dtype == "bfloat16",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
            args=arguments,
            train_dataset=datasets.Dataset.from_json(
                str(folder / "trl.jsonl"), cache_dir=str(Path(output) / "cache")
            ),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def measure(name: str, dtype: str, folder: Path, threads: int, pairs: int, length: int) -> dict:
    """One trainer in a fresh process: seconds of its steps after the first, losses, peak memory."""
    words = ["--worker", name, "--dtypes", dtype, "--folder", str(folder)]
    words += ["--threads", str(threads), "--pairs", str(pairs), "--max_length", str(length)]
    command = [sys.executable, "-m", "benchmarks.end_to_end", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"status": "failed", "reason": done.stderr.strip()[-400:]}
    found = json.loads(done.stdout.splitlines()[-1])
    timed = found["seconds"][1:]
    found["median_s"] = statistics.median(timed)
    found["pairs_per_second"] = pairs * len(timed) / sum(timed)
    return {"status": "ok"} | found


def worker(name: str, dtype: str, folder: Path, threads: int, pairs: int, length: int) -> None:
    """Train, and print the record as the last line."""
    run = run_ours if name in OURS else run_trl
    seconds, losses = run(name, dtype, folder, threads, pairs, length)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak}))


def agreement(document: dict[str, dict[str, dict]]) -> None:
    """Note how far every run's losses are from TRL's, at most, relative.

    `first_difference`: the first step, before any update, to TRL in the same dtype.
    `loss_difference`: all steps, to TRL in float32; bfloat16 rounds there and here, and from the
    second step on each trainer's updates carry on its own roundings. Another optimizer's later
    losses are its own.
    """
    exact = document.get("float32", {}).get(BASE, {}).get("losses")
    for runs in document.values():
        first = runs.get(BASE, {}).get("losses", [None])[0]
        for name, run in runs.items():
            if run["status"] != "ok":
                continue
            if first is not None:
                run["first_difference"] = abs(run["losses"][0] / first - 1)
            if exact and "optim" not in OURS.get(name, {}):
                pairs = zip(run["losses"], exact, strict=True)
                run["loss_difference"] = max(abs(a / b - 1) for a, b in pairs)


def agrees(run: dict, base: dict) -> bool:
    """Whether a run trains on TRL's loss: the same at first, then no further from float32 than
    twice TRL's own distance.
    """
    limit = max(LOSS_TOLERANCE, 2 * base.get("loss_difference", 0.0))
    first, later = run.get("first_difference", 0.0), run.get("loss_difference", 0.0)
    return first <= LOSS_TOLERANCE and later <= limit


def table(runs: dict[str, dict], dtype: str) -> str:
    """A line for every trainer."""
    head = f"{dtype:28}{'s/step':>8}{'pairs/s':>9}{'of TRL':>8}{'peak GB':>9}"
    lines = [f"{head}{'first loss':>12}{'all losses':>12}"]
    base = runs.get(BASE, {})
    for name, run in runs.items():
        if run["status"] != "ok":
            lines.append(f"{name:28}{run['status']}: {run['reason'][-150:]}")
            continue
        speed = run["pairs_per_second"]
        of_trl = speed / base["pairs_per_second"] if base.get("status") == "ok" else float("nan")
        differences = (run.get("first_difference"), run.get("loss_difference"))
        peak = run["peak_bytes"] / 1e9
        lines.append(
            f"{name:28}{run['median_s']:8.2f}{speed:9.3f}{of_trl:8.2f}{peak:9.2f}"
            + "".join(f"{'' if d is None else f'{d:.1e}':>12}" for d in differences)
            + ("" if agrees(run, base) else " DISAGREES")
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--only", nargs="+", choices=[*TRL, *OURS])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=PER_STEP, help="pairs of a step")
    parser.add_argument("--max_length", type=int, default=MAX_LENGTH, help="tokens of a sequence")
    parser.add_argument(
        "--model_folder", type=Path, help="config.json and a tokenizer; weights at random"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, two steps")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=[*TRL, *OURS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.worker:
        worker(a.worker, a.dtypes[0], a.folder, a.threads, a.pairs, a.max_length)
        return None
    steps = 3 if a.smoke else a.steps
    if steps < 2:
        parser.error(f"--steps: expected at least 2 (the first is not timed), got {steps}")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = a.output_dir / f"{device}-{stamp}-end_to_end{'-smoke' if a.smoke else ''}.json"
    document = {"schema": 1, "case": "end_to_end", "smoke": a.smoke, **describe(device)}
    document |= {"settings": {"steps": steps, "pairs": a.pairs, "max_length": a.max_length}}
    if a.model_folder:
        document["model"] = json.loads((a.model_folder / "config.json").read_text())
    document["runs"] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), steps, a.smoke, a.pairs, a.model_folder)
        for dtype in a.dtypes:
            runs = document["runs"][dtype] = {}
            for name in a.only or [*TRL, *OURS]:
                work = name, dtype, Path(folder), a.threads, a.pairs, a.max_length
                runs[name] = measure(*work)
                agreement(document["runs"])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(document, indent=1) + "\n")
            print(table(runs, dtype), flush=True)
    print(path)
    return path


if __name__ == "__main__":
    main()
