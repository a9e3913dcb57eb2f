"""What went wrong in a run, read from its `metrics.jsonl`: a finding, its evidence, a remedy.

python trainer/examples/what_went_wrong.py outputs/run
"""

import json
import sys
from pathlib import Path

import yaml


def findings(rows: list[dict], config: dict) -> list[str]:
    """What the rows of `metrics.jsonl` show, worst first; empty where all went as it should."""
    steps = [row for row in rows if "loss" in row]
    tests = [row for row in rows if "eval/loss" in row]
    rules = (unfinished, overflowed, always_clipped, overoptimized, overfitted, nothing_learned)
    return [text for rule in rules if (text := rule(steps, tests, config))]


def unfinished(steps: list[dict], _tests: list[dict], config: dict) -> str | None:
    """The rows end before the run was to."""
    last = steps[-1]["step"] if steps else 0
    if last < config["max_steps"] and config["early_stopping_patience"] is None:
        return (
            f"it ends after step {last} of {config['max_steps']}: killed, or a value was not "
            "finite; resume with --resume_from_checkpoint auto, or lower learning_rate"
        )
    return None


def overflowed(steps: list[dict], _tests: list[dict], _config: dict) -> str | None:
    """float16 skipped many steps."""
    skipped = sum(row.get("skipped_steps", 0) for row in steps)
    if skipped > 0.1 * max((row["step"] for row in steps), default=0):
        return f"{skipped:.0f} steps were skipped, as float16 overflowed; use dtype bfloat16"
    return None


def always_clipped(steps: list[dict], _tests: list[dict], config: dict) -> str | None:
    """Every gradient is scaled down, so the learning rate is not what it says."""
    norms = [row["grad_norm"] for row in steps if "grad_norm" in row]
    limit = config["max_grad_norm"]
    if limit and len(norms) >= 5 and min(norms) > 4 * limit:
        return (
            f"every gradient is clipped, from {min(norms):.3g} or more to a norm of {limit:g}: "
            "sums of log-probs are long; lower beta and eta, or use sft_reduction sequence_mean"
        )
    return None


def overoptimized(_steps: list[dict], tests: list[dict], config: dict) -> str | None:
    """Margins grow while good answers become less likely, which the SFT term is there to stop."""
    if len(tests) < 2 or "eval/logps/chosen_delta" not in tests[-1]:
        return None
    lost = tests[-1]["eval/logps/chosen_delta"] - tests[0]["eval/logps/chosen_delta"]
    if lost < -10 and tests[-1]["eval/rewards/margins"] > tests[0]["eval/rewards/margins"]:
        return (
            f"overoptimization: chosen answers lose {-lost:.1f} nats against the reference while "
            f"the margin grows; raise eta ({config['eta']:g}) or beta ({config['beta']:g})"
        )
    return None


def overfitted(_steps: list[dict], tests: list[dict], _config: dict) -> str | None:
    """The held-out loss rises again."""
    best = min(tests, key=lambda row: row["eval/loss"], default=None)
    if best and best is not tests[-1] and tests[-1]["eval/loss"] > 1.05 * best["eval/loss"]:
        return (
            f"overfitting: the held-out loss was {best['eval/loss']:.4f} after step "
            f"{best['step']} and ends at {tests[-1]['eval/loss']:.4f}; set metric_for_best_model "
            "loss, with early_stopping_patience"
        )
    return None


def nothing_learned(_steps: list[dict], tests: list[dict], config: dict) -> str | None:
    """The pairs are told apart no better than before."""
    if len(tests) >= 2 and abs(tests[-1]["eval/rewards/margins"]) < 1e-3:
        return (
            f"nothing learned: the held-out margin is {tests[-1]['eval/rewards/margins']:.1e}; "
            f"raise learning_rate ({config['learning_rate']:g}) or train longer"
        )
    return None


def main(folder: str) -> list[str]:
    """The findings of a run's folder."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    config = yaml.safe_load((Path(folder) / "config.yaml").read_text(encoding="utf-8"))
    return findings([json.loads(line) for line in lines], config)


if __name__ == "__main__":
    found = main(sys.argv[1])
    print("\n".join(f"- {text}" for text in found) or "nothing conspicuous")
