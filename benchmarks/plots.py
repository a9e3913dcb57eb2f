"""Time and peak memory against tokens, and against vocabulary, on log axes: one results file."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

Point = tuple[float, float | None, bool]


def _series(runs: list[dict], size: str) -> dict[str, dict[int, Point]]:
    """By implementation: its size -> (seconds, bytes beyond inputs and gradients, ours)."""
    series: dict[str, dict[int, Point]] = {}
    for run in runs:
        for entry in run["results"].values():
            if "seconds" in entry:
                point = entry["seconds"]["median"], entry.get("memory", {}).get("beyond")
                lines = series.setdefault(entry["label"], {})
                lines[run[size]] = (*point, entry["ours"])
    return series


def _endings(runs: list[dict], size: str) -> dict[str, str]:
    """Why an implementation's line ends before the largest size, by its label."""
    found = {}
    for run in sorted(runs, key=lambda run: run[size]):
        for entry in run["results"].values():
            if "seconds" not in entry:
                found.setdefault(entry["label"], f"{run[size]:,}: {entry['status']}")
    return found


def _panel(
    axes, series: dict, which: int, title: str, size: str, unit: str, endings: dict[str, str]
) -> None:
    scale = (1.0, 1e-6)[which]  # seconds; megabytes
    for label, points in series.items():
        xy = [(n, p[which] * scale) for n, p in sorted(points.items()) if p[which]]
        ours = any(p[2] for p in points.values())
        if xy:
            style = (
                {"linewidth": 2.2, "marker": "o"} if ours else {"linestyle": "--", "marker": "."}
            )
            [line] = axes.plot(*zip(*xy, strict=True), label=label, **style)
            if label in endings:
                axes.annotate(
                    endings[label], xy[-1], (2, 9), textcoords="offset points",
                    color=line.get_color(), fontsize=11,
                )  # fmt: skip
    label = {"tokens": "response tokens", "vocab": "vocabulary, tokens"}[size]
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
    axes.set_title(title)
    sizes = sorted({n for points in series.values() for n in points})
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(True, alpha=0.3)


def draw(document: dict, path: Path) -> bool:
    """One row of panels (seconds, bytes) per dtype, shape, head and what grows; False if nothing
    has two points.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in document["runs"]:
        if run["spec"]["timed"]:
            kind = f"{run['spec']['dtype']}, D = {run['width']:,}"
            head = "frozen head" if run["spec"]["frozen"] else "full"
            for size, fixed in (("tokens", "vocab"), ("vocab", "tokens")):
                key = f"{kind}, {fixed} = {run[fixed]:,}, {head}", size
                groups.setdefault(key, []).append(run)
    groups = {key: runs for key, runs in groups.items() if len({r[key[1]] for r in runs}) > 1}
    if not groups:
        return False
    figure = Figure(figsize=(14, 4.8 * len(groups)), layout="constrained")
    axes = figure.subplots(len(groups), 2, squeeze=False)
    for row, ((title, size), runs) in zip(axes, groups.items(), strict=True):
        series = _series(runs, size)
        ends = _endings(runs, size)
        _panel(row[0], series, 0, title, size, "seconds, forward + backward", ends)
        _panel(row[1], series, 1, title, size, "peak memory beyond inputs, MB", ends)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=12)
    figure.suptitle(f"time and memory of the loss on {document['device']['name']}", fontsize=14)
    with rc_context({"font.size": 12}):
        figure.savefig(path, dpi=100)
    return True
