"""What `grad_tolerance` changes: RPO exact, and with 1e-3 and 1e-2 of the gradient left out.

    sums      `displacement`'s setting: fine-tuned on sums, pairs are its own sampled answers, and
              whether it answers right afterwards is checked
    recipe    the trainer's default recipe, as it stands

Three seeds each: an order of the pairs. A tolerance does no harm where its curves lie within the
spread of the exact ones, and is of use where steps are shorter.

    python -m benchmarks.experiments.tolerance --output_dir outputs/displacement

What is finished is not repeated, so the same command resumes a stopped experiment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.experiments.displacement import METHODS, Experiment, share_right, slug
from trainer.config.recipe import parse_config
from trainer.evaluation.models import Source
from trainer.evaluation.records import write_json
from trainer.run import run

TOLERANCES = (0.0, 1e-3, 1e-2)
SETTINGS = ("sums", "recipe")
PANELS = {
    "eval/loss": "loss",
    "eval/rewards/accuracies": "accuracy",
    "eval/logps/chosen_delta": "chosen log-prob, change in nats",
}
STYLES = {  # curves may coincide: wide ones below, narrow ones above
    0.0: {"color": "C0", "linewidth": 7, "alpha": 0.4},
    1e-3: {"color": "C1", "linewidth": 3.5},
    1e-2: {"color": "black", "linewidth": 1},
}


def one(experiment: Experiment, setting: str, tolerance: float, seed: int) -> dict[str, object]:
    """One run's rows, and its share of right answers on sums; kept in `result.json`."""
    folder = experiment.root / slug(f"tolerance-{setting}-{tolerance:g}-{seed}")
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    varied = {"grad_tolerance": tolerance, "seed": seed}
    if setting == "sums":
        fields = experiment.model("sums") | experiment.pairs("sums") | METHODS["RPO, sum"]
        rows = experiment.train(folder, **fields, eval_steps=11, **varied)
    else:
        words = [f"--{name}={value}" for name, value in varied.items()]
        rows = run(parse_config([*words, f"--output_dir={folder}", "--overwrite_output_dir=true"]))
    result = {"setting": setting, "tolerance": tolerance, "seed": seed, "rows": rows}
    if setting == "sums":
        result["right"] = share_right(Source(str(folder / "model")))
    shutil.rmtree(folder / "model")  # half a gigabyte
    write_json(kept, result)
    return result


def summary(runs: list[dict]) -> dict[str, object]:
    """Means and standard deviations over seeds: of what stands at the end, of the steps' time."""
    values: dict[str, list[float]] = {}
    for found in runs:
        last = [row for row in found["rows"] if "eval/loss" in row][-1]
        steps = [row for row in found["rows"] if "loss" in row]
        own = {name: last[name] for name in PANELS}
        own["step_seconds"] = statistics.fmean(row["step_seconds"] for row in steps)
        own["grad/skipped"] = statistics.fmean(row.get("grad/skipped", 0.0) for row in steps)
        own |= {"right": found["right"]} if "right" in found else {}
        for name, value in own.items():
            values.setdefault(name, []).append(value)
    spread = {k: statistics.stdev(v) if len(v) > 1 else 0.0 for k, v in values.items()}
    return {k: [statistics.fmean(v), spread[k]] for k, v in values.items()}


def text(groups: dict[tuple[str, float], list[dict]]) -> str:
    """A Markdown table: a row for each setting and tolerance, ± standard deviation over seeds."""
    names = {"eval/loss": "loss", "eval/rewards/accuracies": "accuracy", "right": "right answers"}
    names |= {"eval/logps/chosen_delta": "chosen, nats", "grad/skipped": "left out"}
    names["step_seconds"] = "s / step"
    lines = [
        "| setting | τ | " + " | ".join(names.values()) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for (setting, tolerance), runs in groups.items():
        found = summary(runs)
        cells = [
            f"{found[name][0]:.4g} ± {found[name][1]:.2g}" if name in found else "–"
            for name in names
        ]
        lines.append(f"| {setting} | {tolerance:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(groups: dict[tuple[str, float], list[dict]]) -> list[dict[str, object]]:
    """What every run logged of `PANELS`, and its share of right answers."""
    return [
        {name: found[name] for name in ("setting", "tolerance", "seed", "right") if name in found}
        | {"step": [row["step"] for row in found["rows"] if "eval/loss" in row]}
        | {name: [row[name] for row in found["rows"] if name in row] for name in PANELS}
        for runs in groups.values()
        for found in runs
    ]


def draw(groups: dict[tuple[str, float], list[dict]], path: Path) -> None:
    """A row of panels for each setting: every seed a line, every tolerance a color."""
    settings = list(dict.fromkeys(setting for setting, _ in groups))
    figure = Figure(figsize=(14, 3.6 * len(settings)), layout="constrained")
    axes = figure.subplots(len(settings), len(PANELS), squeeze=False)
    for (setting, tolerance), runs in groups.items():
        for axis, (name, title) in zip(axes[settings.index(setting)], PANELS.items(), strict=True):
            for seed, found in enumerate(runs):
                rows = [row for row in found["rows"] if "eval/loss" in row]
                axis.plot(
                    [row["step"] for row in rows], [row[name] for row in rows],
                    **STYLES[tolerance], label=f"τ = {tolerance:g}" if seed == 0 else None,
                )  # fmt: skip
            axis.set(title=f"{setting}: {title}", xlabel="step")
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle("held-out pairs, a line for every seed")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run what is missing; write table, figure and `tolerance.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/displacement", help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="runs per tolerance [%(default)s]")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {args.seeds}")
    experiment, groups = Experiment(args.output_dir), {}
    for setting in args.settings:
        for seed in range(args.seeds):
            for tolerance in TOLERANCES:
                found = one(experiment, setting, tolerance, seed)
                groups.setdefault((setting, tolerance), []).append(found)
    rows = [{"setting": k[0], "tolerance": k[1], **summary(v)} for k, v in groups.items()]
    write_json(experiment.root / "tolerance.json", {"summary": rows, "runs": curves(groups)})
    draw(groups, experiment.root / "tolerance.png")
    print(text(groups))


if __name__ == "__main__":
    main()
