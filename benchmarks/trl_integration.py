"""Our head in TRL's trainers: `python -m benchmarks.trl_integration [--steps 6] [--smoke]`.

SmolLM2-135M-Instruct, AdamW, two pairs a step, sequences cut to 512 tokens, DPO plus the token-mean
SFT term, reference precomputed: TRL's `DPOTrainer` with ``loss_type=["sigmoid", "sft"]``, the same
after `patch_trl()`, and `RPOTrainer`. TRL's SFT term is a mean over a micro-batch's tokens, so the
losses agree where a step is one micro-batch, as here. Every trainer runs in a process of its own,
on the same pairs in the same order; the first step, which warms up, is not timed. Losses and
gradients must agree before a time counts: with DPOTrainer's in float32, to `ROUNDING`, in bfloat16
to twice what its own logits in bfloat16 are off. Writes one JSON file to benchmarks/results/.
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

from benchmarks.end_to_end import BETA, DTYPES, LEARNING_RATE, MAX_LENGTH, PER_STEP, prepare
from benchmarks.environment import ROOT, describe

BASE = "DPOTrainer"
TRAINERS = (BASE, "DPOTrainer, patch_trl()", "RPOTrainer")
ROUNDING = 1e-5  # relative, of losses and gradients in float32


def run(name: str, dtype: str, folder: Path, threads: int) -> dict[str, list]:
    """Seconds and loss of every step, and the norms of every parameter's first gradient."""
    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from rpo_kernels.integrations.trl import RPOConfig, RPOTrainer, patch_trl

    torch.set_num_threads(threads)
    found: dict[str, list] = {"seconds": [], "losses": [], "gradient_norms": []}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model, **_):
            begin = time.perf_counter()
            if not found["gradient_norms"]:
                found["gradient_norms"] = [p.grad.norm().item() for p in model.parameters()]
            self.start += time.perf_counter() - begin

        def on_step_end(self, args, state, control, **_):
            found["seconds"].append(time.perf_counter() - self.start)

    ours = name == "RPOTrainer"
    if "patch" in name:
        patch_trl()
    loss = {"loss_type": ["sigmoid", "sft"]}
    if ours:
        loss = {"eta": 1.0, "sft_reduction": "token_mean"}
    kind, config = (RPOTrainer, RPOConfig) if ours else (DPOTrainer, DPOConfig)

    class Recorded(kind):
        def training_step(self, *args, **kwargs):
            step = super().training_step(*args, **kwargs)
            found["losses"].append(step.item())
            return step

    with tempfile.TemporaryDirectory() as output:
        arguments = config(
            output_dir=output,
            per_device_train_batch_size=PER_STEP,
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            max_length=MAX_LENGTH,
            beta=BETA,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            use_cpu=not torch.cuda.is_available(),
            bf16=dtype == "bfloat16",
            save_strategy="no",
            report_to=[],
            seed=0,
            **loss,
        )
        trainer = Recorded(
            model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
            args=arguments,
            train_dataset=datasets.Dataset.from_json(
                str(folder / "trl.jsonl"), cache_dir=str(Path(output) / "cache")
            ),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
            callbacks=[Watch()],
        )
        trainer.train()
    return found


def measure(name: str, dtype: str, folder: Path, threads: int) -> dict:
    """One trainer in a fresh process."""
    words = ["--worker", name, "--dtypes", dtype, "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmarks.trl_integration", *words]
    done = subprocess.run(
        [*command, "--threads", str(threads)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        return {"status": "failed", "reason": done.stderr.strip()[-400:]}
    found = json.loads(done.stdout.splitlines()[-1])
    return {"status": "ok", **found, "median_s": statistics.median(found["seconds"][1:])}


def difference(run: dict, truth: dict) -> float:
    """How far a run's losses and first gradient are from another's, at most, relative."""
    losses = [abs(a / b - 1) for a, b in zip(run["losses"], truth["losses"], strict=True)]
    pairs = list(zip(run["gradient_norms"], truth["gradient_norms"], strict=True))
    gap = sum((a - b) ** 2 for a, b in pairs) ** 0.5
    return max(*losses, gap / sum(b * b for _, b in pairs) ** 0.5)


def table(runs: dict[str, dict], dtype: str) -> str:
    """A line for every trainer."""
    lines = [f"{dtype:26}{'s/step':>8}{'of TRL':>8}{'peak GB':>9}{'of TRL':>8}{'difference':>12}"]
    base = runs[BASE]
    for name, found in runs.items():
        if "difference" not in found:
            lines.append(f"{name:26}{found['status']}: {found.get('reason', '')[-150:]}")
            continue
        seconds, peak = found["median_s"], found["peak_bytes"] / 1e9
        share = (seconds / base["median_s"], found["peak_bytes"] / base["peak_bytes"])
        lines.append(
            f"{name:26}{seconds:8.2f}{share[0]:8.2f}{peak:9.2f}{share[1]:8.2f}"
            f"{found['difference']:12.1e}" + ("" if found["agrees"] else " DISAGREES")
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Path | None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, three steps")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=TRAINERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    a = parser.parse_args(arguments)
    if a.worker:
        found = run(a.worker, a.dtypes[0], a.folder, a.threads)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found | {"peak_bytes": peak}))
        return None
    steps = 3 if a.smoke else a.steps
    if steps < 2:
        parser.error(f"--steps: expected at least 2 (the first is not timed), got {steps}")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = a.output_dir / f"cpu-{stamp}-trl_integration{'-smoke' if a.smoke else ''}.json"
    document = {"schema": 1, "case": "trl_integration", "smoke": a.smoke, **describe("cpu")}
    document |= {"settings": {"steps": steps, "pairs": PER_STEP, "max_length": MAX_LENGTH}}
    document["runs"] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), steps, a.smoke)
        truth = measure(BASE, "float32", Path(folder), a.threads)
        for dtype in a.dtypes:
            runs = document["runs"][dtype] = {}
            for name in TRAINERS:
                known = (name, dtype) == (BASE, "float32")
                found = truth if known else measure(name, dtype, Path(folder), a.threads)
                runs[name] = found
                if found["status"] == runs[BASE]["status"] == truth["status"] == "ok":
                    found["difference"] = difference(found, truth)
                    own = runs[BASE]["difference"]
                    found["agrees"] = found["difference"] <= max(ROUNDING, 2 * own)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(document, indent=1) + "\n")
            print(table(runs, dtype), flush=True)
    print(path)
    return path


if __name__ == "__main__":
    main()
