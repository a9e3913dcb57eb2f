"""Table and figure of the real-model experiment; changes are against the start, in nats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.evaluation.records import write_json

COLORS = {"DPO": "C3", "RPO, sum": "C0", "RPO, sequence mean": "C1", "SFT": "C2"}
PANELS = {
    "chosen_train": "chosen, training pairs",
    "chosen": "chosen, held-out pairs",
    "rejected": "rejected, held-out pairs",
}
MAIN = ("sums", "sums, no SFT", "written")  # of the main figure; the others are in the appendix's
Curves = dict[str, tuple[list[float], list[float]]]  # steps and values by panel
Groups = dict[tuple[str, str], list[Curves]]  # of every seed by setting and method


def curves(rows: list[dict[str, float]]) -> Curves:
    """Steps and changes of log-probs by panel; of training pairs, means over a quarter epoch."""
    seen = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval/loss" in row]
    width = max(1, len(seen) // 8)
    parts = [seen[k : k + width] for k in range(0, len(seen) - width + 1, width)]
    steps, first = [row["step"] for row in held_out], held_out[0]["eval/logps/rejected"]
    return {
        "chosen_train": (
            [float(np.mean([row["step"] for row in part])) for part in parts],
            [float(np.mean([row["logps/chosen_delta"] for row in part])) for part in parts],
        ),
        "chosen": (steps, [row["eval/logps/chosen_delta"] for row in held_out]),
        "rejected": (steps, [row["eval/logps/rejected"] - first for row in held_out]),
    }


def report(results: list[dict], folder: Path) -> str:
    """Write `displacement.json`, `displacement.png` (what happens in a few settings) and
    `displacement_all.png` (in all of them); returns the table as text.

    Args:
        results: `setting`, `method`, `seed`, `rows` of every run, and `right`, `right_before`:
            shares of right answers, where questions have them.
        folder: where the files go.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["setting"], result["method"]), []).append(result)
    summaries = [summary(setting, method, runs) for (setting, method), runs in groups.items()]
    small = [
        {k: result[k] for k in ("setting", "method", "seed")} | {"curves": curves(result["rows"])}
        for result in results
    ]
    write_json(folder / "displacement.json", {"summary": summaries, "runs": small})
    found = {group: [curves(run["rows"]) for run in runs] for group, runs in groups.items()}
    draw_both(found, folder)
    written = f"written: {folder}/displacement.json, displacement.png, displacement_all.png"
    return f"{to_text(summaries)}\n{written}"


def summary(setting: str, method: str, runs: list[dict]) -> dict[str, object]:
    """Means over a group's seeds, and their standard deviations."""
    ends = [{name: y[-1] for name, (_, y) in curves(run["rows"]).items()} for run in runs]
    last = [next(r for r in reversed(run["rows"]) if "eval/loss" in r) for run in runs]
    values = {name: [end[name] for end in ends] for name in PANELS}
    values["accuracy"] = [row["eval/rewards/accuracies"] for row in last]
    values["margin"] = [row["eval/rewards/margins"] for row in last]
    if "right" in runs[0]:
        values["right"] = [run["right"] for run in runs]
    found: dict[str, object] = {"setting": setting, "method": method, "seeds": len(runs)}
    for name, numbers in values.items():
        found[name] = round(float(np.mean(numbers)), 3)
        found[f"{name}_sd"] = round(float(np.std(numbers, ddof=1)), 3) if len(runs) > 1 else None
    if "right" in runs[0]:
        found["right_before"] = runs[0]["right_before"]
    return found


def to_text(summaries: list[dict]) -> str:
    """A line for every setting and method: mean, and standard deviation over seeds."""
    names = ("chosen_train", "chosen", "rejected", "accuracy", "margin", "right")
    lines = [f"{'setting':<17}{'method':<20}" + "".join(f"{name:>16}" for name in names)]
    for found in summaries:
        cells = []
        for name in names:
            spread = found.get(f"{name}_sd")
            text = f"{found[name]:+.2f}" if name in found else ""
            cells.append(f"{text + (f' ± {spread:.2f}' if spread is not None else ''):>16}")
        lines.append(f"{found['setting']:<17}{found['method']:<20}" + "".join(cells))
    before = {f["setting"]: f["right_before"] for f in summaries if "right_before" in f}
    lines += [f"right answers at the start of {k}: {share:.2f}" for k, share in before.items()]
    return "\n".join(lines)


def draw_both(groups: Groups, folder: Path) -> None:
    """The main figure, of the held-out pairs in at most three settings, and that of everything."""
    settings = list(dict.fromkeys(setting for setting, _ in groups))
    main = [setting for setting in MAIN if setting in settings] or settings[:3]
    draw(groups, main, ("chosen", "rejected"), folder / "displacement.png")
    draw(groups, settings, tuple(PANELS), folder / "displacement_all.png")


def draw(groups: Groups, settings: list[str], names: tuple[str, ...], path: Path) -> None:
    """A row of panels for every setting, a line for every method; the legend beside them."""
    with rc_context({"font.size": 13}):
        figure = Figure(figsize=(5.5 * len(names), 4 * len(settings)), layout="constrained")
        panels = figure.subplots(len(settings), len(names), squeeze=False)
        for (setting, method), found in groups.items():
            if setting not in settings:
                continue
            for axes, name in zip(panels[settings.index(setting)], names, strict=True):
                draw_line(axes, [lines[name] for lines in found], method)
                axes.set(title=f"{setting}: {PANELS[name]}", xlabel="optimizer step")
        for row in panels:
            row[0].set_ylabel("change of log-prob, nats")
            for axes in row:
                axes.axhline(0, color="0.6", lw=0.8, zorder=0)
        shown = {
            label: handle
            for axes in panels.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=len(shown))
        figure.suptitle("log-probs against the reference: means over seeds, bands their range")
        figure.savefig(path, dpi=100)


def draw_line(axes: Axes, lines: list[tuple[list[float], list[float]]], method: str) -> None:
    """The mean of several runs, and their range."""
    steps, values = lines[0][0], np.array([y for _, y in lines])
    axes.plot(steps, values.mean(0), f"{COLORS[method]}o-", ms=3, label=method)
    axes.fill_between(steps, values.min(0), values.max(0), color=COLORS[method], alpha=0.2, lw=0)
