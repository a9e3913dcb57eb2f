"""DPO, RPO and SFT on a real model: what becomes of the chosen responses' log-probs.

Three settings, each with several methods and seeds, from the default recipe's model:

    sums              fine-tuned on demonstrations; pairs are its own sampled answers to sums, right
                      over wrong (`arithmetic`)
    written           fine-tuned on the chosen responses; pairs are those of the default recipe
    written, no SFT   the same pairs, from the model as it comes

All methods of a setting start from the same weights and see the same pairs; a seed is an order.

    python -m trainer.experiments.displacement --output_dir outputs/displacement

What is finished is not repeated, so a stopped experiment goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from trainer.config import RunConfig
from trainer.evaluation.models import Source, open_model
from trainer.evaluation.records import open_folder, write_json, write_rows
from trainer.experiments import arithmetic
from trainer.experiments.displacement_report import report
from trainer.recipe import parse_config
from trainer.run import run

SFT_ALONE = 1e4  # this eta leaves the preference term less than a thousandth of the gradient
METHODS = {
    "DPO": {"eta": 0.0},
    "RPO, sum": {"eta": 1.0, "sft_reduction": "sum"},
    "RPO, sequence mean": {"eta": 1.0, "sft_reduction": "sequence_mean"},
    "SFT": {"eta": SFT_ALONE, "sft_reduction": "sum"},
}
SETTINGS = {
    "sums": tuple(METHODS),
    "written": ("DPO", "RPO, sum"),
    "written, no SFT": ("DPO",),
}
TRAINING = {  # of every run; the learning rate is that of the preference stage
    "beta": 0.1,
    "learning_rate": 1e-5,
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "overwrite_output_dir": True,
}
EVALUATIONS = {"sums": 11, "written": 13, "written, no SFT": 13}  # steps between two
TRAIN_PAIRS, TEST_PAIRS = 256, 64
DEMONSTRATIONS, TEST_QUESTIONS = 384, 128
QUESTIONS = 512  # sampled at a time, until there are enough pairs


class Experiment:
    """The output folder, and the shared start of every setting."""

    def __init__(self, output_dir: str, **options: object) -> None:
        """Open the folder; `options` go into every run's config."""
        self.root, self.options = open_folder(output_dir), options
        base = parse_config([])
        self.base = {"model_name_or_path": base.model_name_or_path, "gguf_file": base.gguf_file}
        self.written = {"train_file": base.train_file, "eval_file": base.eval_file}

    def train(self, folder: Path, **fields: object) -> list[dict[str, float]]:
        """One run of the trainer; the rows of its `metrics.jsonl`."""
        config = RunConfig(
            output_dir=str(folder),
            ref_cache_dir=str(self.root / "reference_cache"),
            **TRAINING | self.options | fields,
        )
        return run(config)

    def start(self, setting: str) -> tuple[dict[str, object], dict[str, object]]:
        """Model and data fields of a setting's runs; made at the first call."""
        if setting == "written, no SFT":
            return self.base, self.written
        folder = self.root / f"{setting}-start"
        sums = {k: str(self.root / f"sums-{k}.jsonl") for k in ("demonstrations", "train", "test")}
        if not (folder / "model").exists():
            data = {"train_file": self.written["train_file"]}
            if setting == "sums":
                data = {"train_file": sums["demonstrations"]}
                asked = arithmetic.questions(DEMONSTRATIONS, seed=0)
                write_rows(Path(sums["demonstrations"]), arithmetic.demonstrations(asked, seed=0))
            sft = {"num_train_epochs": 2, "learning_rate": 5e-5 if setting == "sums" else 2e-5}
            self.train(folder, **self.base, **data, **METHODS["SFT"], **sft)
        model = {"model_name_or_path": str(folder / "model")}
        if setting == "written":
            return model, self.written
        if not Path(sums["test"]).exists():
            rows = sample_pairs(folder / "model", TRAIN_PAIRS + TEST_PAIRS)
            write_rows(Path(sums["train"]), rows[:TRAIN_PAIRS])
            write_rows(Path(sums["test"]), rows[TRAIN_PAIRS:])
        return model, {"train_file": sums["train"], "eval_file": sums["test"]}

    def one(self, setting: str, method: str, seed: int) -> dict[str, object]:
        """One run's curves and its share of right answers, kept in `result.json`."""
        name = f"{setting}-{method}-{seed}".replace(", ", "-").replace(" ", "-")
        kept = self.root / name / "result.json"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        model, data = self.start(setting)
        plan = {"eval_steps": EVALUATIONS[setting], "seed": seed}
        rows = self.train(self.root / name, **model, **data, **METHODS[method], **plan)
        result = {"setting": setting, "method": method, "seed": seed, "rows": rows}
        if setting == "sums":
            result["right_before"] = self.right_before()
            result["right"] = share_right(self.root / name / "model")
        shutil.rmtree(self.root / name / "model")  # half a gigabyte
        write_json(kept, result)
        return result

    def right_before(self) -> float:
        """The share of right answers of the model that `sums` starts from."""
        kept = self.root / "sums-start" / "right.json"
        if not kept.exists():
            write_json(kept, share_right(self.root / "sums-start" / "model"))
        return json.loads(kept.read_text(encoding="utf-8"))


def sample_pairs(model: Path, count: int) -> list[dict]:
    """Pairs of a model's own answers; questions of one part are in no other part."""
    policy, tokenizer = open_model(Source(str(model)), "questions")
    first, found = DEMONSTRATIONS + TEST_QUESTIONS, []
    while len(found) < count:
        asked = arithmetic.questions(first + QUESTIONS, seed=0)[first:]
        drawn = arithmetic.answers(policy, tokenizer, asked, samples=4, temperature=1.0, seed=first)
        new = arithmetic.pairs(asked, drawn, seed=first)
        if not new:
            raise RuntimeError(f"no question of {len(asked)} was answered both right and wrong")
        found += new
        first += QUESTIONS
    return found[:count]


def share_right(model: Path) -> float:
    """Share of the test questions that a model's greedy answers get right."""
    policy, tokenizer = open_model(Source(str(model)), "questions")
    asked = arithmetic.questions(DEMONSTRATIONS + TEST_QUESTIONS, seed=0)[DEMONSTRATIONS:]
    drawn = arithmetic.answers(policy, tokenizer, asked, samples=1, temperature=0.0, seed=0)
    right = [
        arithmetic.is_right(answer or "", question.result) is True
        for question, (answer,) in zip(asked, drawn, strict=True)
    ]
    return sum(right) / len(right)


def main() -> None:
    """Run what is missing; write table and figure."""
    parser = argparse.ArgumentParser(description="Chosen log-probs under DPO, RPO and SFT.")
    parser.add_argument("--output_dir", default="outputs/displacement", help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method [%(default)s]")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {args.seeds}")
    experiment = Experiment(args.output_dir)
    results = [
        experiment.one(setting, method, seed)
        for seed in range(args.seeds)
        for setting in args.settings
        for method in SETTINGS[setting]
    ]
    print(report(results, experiment.root))


if __name__ == "__main__":
    main()
