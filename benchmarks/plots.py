"""Time and peak memory against tokens on log axes, from one results file."""

from __future__ import annotations

from pathlib import Path


def _series(runs: list[dict]) -> dict[str, dict[int, tuple[float, float | None, bool]]]:
    """By implementation: tokens -> (seconds, bytes beyond inputs and gradients, ours)."""
    series: dict[str, dict[int, tuple[float, float | None, bool]]] = {}
    for run in runs:
        for entry in run["results"].values():
            if "seconds" in entry:
                point = entry["seconds"]["median"], entry.get("memory", {}).get("beyond")
                lines = series.setdefault(entry["label"], {})
                lines[run["tokens"]] = (*point, entry["ours"])
    return series


def _panel(axes, series: dict, which: int, title: str, unit: str) -> None:
    for label, points in series.items():
        xy = [(n, p[which]) for n, p in sorted(points.items()) if p[which]]
        ours = any(p[2] for p in points.values())
        if xy:
            style = (
                {"linewidth": 2.2, "marker": "o"} if ours else {"linestyle": "--", "marker": "."}
            )
            axes.plot(*zip(*xy, strict=True), label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="response tokens", ylabel=unit)
    axes.set_title(title, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.grid(True, which="both", alpha=0.3)


def draw(document: dict, path: Path) -> bool:
    """One row of panels (seconds, bytes) per dtype, shape and head; False if nothing has two
    points.
    """
    groups: dict[str, list[dict]] = {}
    for run in document["runs"]:
        spec = run["spec"]
        if not spec["timed"] or (document["case"] != "gpu" and spec["vocab"] is not None):
            continue
        head = "frozen head" if spec["frozen"] else "full"
        key = f"{spec['dtype']}, D = {run['width']:,}, V = {run['vocab']:,}, {head}"
        groups.setdefault(key, []).append(run)
    groups = {key: runs for key, runs in groups.items() if len({r["tokens"] for r in runs}) > 1}
    if not groups:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(groups), 2, figsize=(12, 4.2 * len(groups)), squeeze=False, layout="constrained"
    )
    for row, (title, runs) in zip(axes, groups.items(), strict=True):
        series = _series(runs)
        _panel(row[0], series, 0, title, "seconds, forward + backward")
        _panel(row[1], series, 1, title, "peak bytes beyond inputs and gradients")
        handles, labels = row[0].get_legend_handles_labels()
        row[1].legend(handles, labels, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    commit = (document["commit"] or "unknown")[:10]
    figure.suptitle(f"{document['device']['name']}, commit {commit}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
