"""Time and peak memory against tokens, and against vocabulary, on log axes: one results file."""

from __future__ import annotations

from pathlib import Path

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


def _panel(axes, series: dict, which: int, title: str, size: str, unit: str) -> None:
    for label, points in series.items():
        xy = [(n, p[which]) for n, p in sorted(points.items()) if p[which]]
        ours = any(p[2] for p in points.values())
        if xy:
            style = (
                {"linewidth": 2.2, "marker": "o"} if ours else {"linestyle": "--", "marker": "."}
            )
            axes.plot(*zip(*xy, strict=True), label=label, **style)
    label = {"tokens": "response tokens", "vocab": "vocabulary"}[size]
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.3)


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(groups), 2, figsize=(12, 4.2 * len(groups)), squeeze=False, layout="constrained"
    )
    for row, ((title, size), runs) in zip(axes, groups.items(), strict=True):
        series = _series(runs, size)
        _panel(row[0], series, 0, title, size, "seconds, forward + backward")
        _panel(row[1], series, 1, title, size, "peak bytes beyond inputs and gradients")
        handles, labels = row[0].get_legend_handles_labels()
        row[1].legend(handles, labels, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    commit = (document["commit"] or "unknown")[:10]
    figure.suptitle(f"{document['device']['name']}, commit {commit}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
