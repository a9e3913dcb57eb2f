"""DPO, RPO and SFT on a real model: what becomes of the chosen responses' log-probs.

From the default recipe's model, several methods and seeds in every setting (`SETTINGS`):

    sums              fine-tuned on demonstrations; pairs are its own sampled answers to sums, right
                      over wrong (`arithmetic`)
    sums, β = 0.5     the same with a larger β
    sums, new style   the same start; the chosen answers are written in a style that it never uses
    sums, no SFT      the pairs of sums, answers of another model then, from the untuned model
    written           fine-tuned on the chosen responses; pairs are those of the default recipe
    written, no SFT   the same pairs, from the untuned model

All methods of a setting start from the same weights and see the same pairs; a seed is an order.

    python -m benchmarks.experiments.displacement --output_dir outputs/displacement

What is finished is not repeated, so the same command resumes a stopped experiment.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.experiments import arithmetic
from benchmarks.experiments.displacement_report import report
from trainer.config.fields import RunConfig
from trainer.config.recipe import parse_config
from trainer.errors import InputError
from trainer.evaluation.models import Source, open_model
from trainer.evaluation.records import read_jsonl, write_json, write_rows
from trainer.paths import open_folder
from trainer.run import run

SFT_ALONE = 1e4  # this eta leaves the preference term less than a thousandth of the gradient
METHODS = {
    "DPO": {"eta": 0.0},
    "RPO, sum": {"eta": 1.0, "sft_reduction": "sum"},
    "RPO, sequence mean": {"eta": 1.0, "sft_reduction": "sequence_mean"},
    "SFT": {"eta": SFT_ALONE, "sft_reduction": "sum"},
}


@dataclass(frozen=True)
class Setting:
    """What a run starts from, its pairs, and the methods that are compared."""

    pairs: str
    """"sums", "restyled" (sums in a new style) or "written"."""
    sft: bool = True
    """Whether the model is fine-tuned first, on demonstrations of sums, or on those written."""
    methods: tuple[str, ...] = ("DPO", "RPO, sum")
    beta: float = 0.1


SETTINGS = {
    "sums": Setting("sums", methods=tuple(METHODS)),
    "sums, β = 0.5": Setting("sums", beta=0.5),
    "sums, new style": Setting("restyled"),
    "sums, no SFT": Setting("sums", sft=False),
    "written": Setting("written"),
    "written, no SFT": Setting("written", sft=False),
}
TRAINING = {  # of every run; the learning rate is that of the preference stage
    "learning_rate": 1e-5,
    "warmup_ratio": 0.1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "overwrite_output_dir": True,
}
EVALUATIONS = {"sums": 11, "restyled": 11, "written": 13}  # steps between two
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

    def model(self, kind: str | None) -> dict[str, object]:
        """Fields of the model fine-tuned on demonstrations of a kind, made at the first call; of
        the recipe's own for None.
        """
        if kind is None:
            return self.base
        folder, data = self.root / f"{kind}-start", self.written["train_file"]
        if not (folder / "model").exists():
            if kind == "sums":
                asked = arithmetic.questions(DEMONSTRATIONS, seed=0)
                data = str(self.root / "sums-demonstrations.jsonl")
                write_rows(Path(data), arithmetic.demonstrations(asked, seed=0))
            sft = {"num_train_epochs": 2, "learning_rate": 5e-5 if kind == "sums" else 2e-5}
            self.train(folder, **self.base, train_file=data, **METHODS["SFT"], **sft)
        return {"model_name_or_path": str(folder / "model")}

    def pairs(self, kind: str) -> dict[str, object]:
        """Fields of the training and held-out pairs; sums are sampled at the first call."""
        if kind == "written":
            return self.written
        train, test = (self.root / f"{kind}-{split}.jsonl" for split in ("train", "test"))
        if not test.exists():
            if kind == "restyled":
                files = self.pairs("sums")
                both = [read_jsonl(str(files[split])) for split in ("train_file", "eval_file")]
                rows = [arithmetic.restyled(row) for found in both for _, row in found]
            else:
                answering = str(self.model("sums")["model_name_or_path"])
                rows = sample_pairs(Source(answering), TRAIN_PAIRS + TEST_PAIRS)
            write_rows(train, rows[:TRAIN_PAIRS])
            write_rows(test, rows[TRAIN_PAIRS:])
        return {"train_file": str(train), "eval_file": str(test)}

    def one(self, name: str, method: str, seed: int) -> dict[str, object]:
        """One run's curves and its share of right answers, kept in `result.json`."""
        setting, folder = SETTINGS[name], self.root / slug(f"{name}-{method}-{seed}")
        kept = folder / "result.json"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        on_sums = setting.pairs != "written"
        start = ("sums" if on_sums else "written") if setting.sft else None
        fields = self.model(start) | self.pairs(setting.pairs)
        plan = {"eval_steps": EVALUATIONS[setting.pairs], "beta": setting.beta, "seed": seed}
        rows = self.train(folder, **fields, **METHODS[method], **plan)
        result = {"setting": name, "method": method, "seed": seed, "rows": rows}
        if on_sums:
            result["right_before"] = self.right_before(setting.sft)
            result["right"] = share_right(Source(str(folder / "model")))
        shutil.rmtree(folder / "model")  # half a gigabyte
        write_json(kept, result)
        return result

    def right_before(self, sft: bool) -> float:
        """The share of right answers of the model that runs on sums start from."""
        kept = self.root / f"right-{'fine-tuned' if sft else 'as-it-comes'}.json"
        if not kept.exists():
            fields = self.model("sums" if sft else None)
            parts = (fields["model_name_or_path"], fields.get("gguf_file"))
            write_json(kept, share_right(Source("/".join(str(part) for part in parts if part))))
        return json.loads(kept.read_text(encoding="utf-8"))


def slug(name: str) -> str:
    """A folder name."""
    return re.sub(r"[^\w.]+", "-", name)


def sample_pairs(model: Source, count: int) -> list[dict]:
    """Pairs of a model's own answers; questions of one part are in no other part."""
    policy, tokenizer = open_model(model, "questions")
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


def share_right(model: Source) -> float:
    """Share of the test questions that a model's greedy answers get right."""
    policy, tokenizer = open_model(model, "questions")
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
    try:
        experiment = Experiment(args.output_dir)
    except InputError as error:
        parser.error(str(error))
    results = [
        experiment.one(setting, method, seed)
        for seed in range(args.seeds)
        for setting in args.settings
        for method in SETTINGS[setting].methods
    ]
    print(report(results, experiment.root))


if __name__ == "__main__":
    main()
