"""Table, statistical test and figures of the controlled experiment.

The test: eta is chosen on the first third of the seeds, by mean true reward; on the other seeds,
which had no part in the choice, RPO with this eta is compared with DPO seed by seed (same pairs,
same initial weights) by Wilcoxon's signed-rank test, one-sided: RPO's true reward is higher.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student
from scipy.stats import wilcoxon

from benchmarks.experiments.bandit_world import Outcome, Setting, grid, true_reward

METRICS = ("true_reward", "final_chosen_logp", "uncovered", "implicit_gap")


def report(settings: list[Setting], seeds: list[int], out: Outcome, folder: Path) -> str:
    """Write `bandit.json`, `bandit.png` and `bandit_sweep.png`; returns the table as text."""
    values = by_setting(settings, seeds, out)
    claims = [claim(settings, values, beta, coverage) for beta, coverage in cells(settings)]
    rows = [vars(s) | describe(values, k) for k, s in enumerate(settings)]
    result = {"seeds": len(seeds), "claims": claims, "settings": rows}
    (folder / "bandit.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shown = headline(claims)
    plot_headline(settings, seeds, out, shown, folder / "bandit.png")
    plot_sweep(settings, values, claims, folder / "bandit_sweep.png")
    return f"{to_text(claims)}\nwritten: {folder}/bandit.json, bandit.png, bandit_sweep.png"


def cells(settings: list[Setting]) -> list[tuple[float, float]]:
    """Every (beta, coverage)."""
    return list(dict.fromkeys((s.beta, s.coverage) for s in settings))


def by_setting(settings: list[Setting], seeds: list[int], out: Outcome) -> dict[str, np.ndarray]:
    """Each metric as (settings, seeds)."""
    tensors = {
        "true_reward": out.true_reward,
        "final_chosen_logp": out.chosen_logp[:, -1],
        "uncovered": out.uncovered,
        "implicit_gap": out.implicit_gap,
    }
    return {k: v.view(len(settings), len(seeds)).double().numpy() for k, v in tensors.items()}


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the last axis and the half width of its 95 % confidence interval."""
    count = values.shape[-1]
    width = student.ppf(0.975, count - 1) * values.std(-1, ddof=1) / np.sqrt(count)
    return values.mean(-1), width


def describe(values: dict[str, np.ndarray], k: int) -> dict[str, float]:
    """Mean and half width of every metric of the k-th setting."""
    row = {}
    for name in METRICS:
        mean, width = band(values[name][k])
        row |= {name: round(float(mean), 4), f"{name}_ci": round(float(width), 4)}
    return row


def claim(
    settings: list[Setting], values: dict[str, np.ndarray], beta: float, coverage: float
) -> dict[str, object]:
    """Choose eta on the first third of the seeds, and test it on the others."""
    places = {s.eta: k for k, s in enumerate(settings) if (s.beta, s.coverage) == (beta, coverage)}
    rewards = values["true_reward"]
    third = rewards.shape[1] // 3
    etas = [eta for eta in places if eta > 0]
    first = {eta: rewards[places[eta], :third] for eta in etas}
    best = max(etas, key=lambda eta: first[eta].mean())
    slack = first[best].std(ddof=1) / np.sqrt(third)
    rpo, dpo = (rewards[places[eta], third:] for eta in (best, 0.0))
    differs = bool((rpo != dpo).any())
    return {
        "beta": beta,
        "coverage": coverage,
        "best_eta": best,
        "etas_within_one_standard_error": [
            eta for eta in etas if first[eta].mean() >= first[best].mean() - slack
        ],
        "dpo_true_reward": float(dpo.mean()),
        "rpo_true_reward": float(rpo.mean()),
        "dpo_uncovered": float(values["uncovered"][places[0.0], third:].mean()),
        "rpo_uncovered": float(values["uncovered"][places[best], third:].mean()),
        "test_seeds": len(rpo),
        "rpo_higher_on": int((rpo > dpo).sum()),
        "p_value": float(wilcoxon(rpo, dpo, alternative="greater").pvalue) if differs else 1.0,
    }


def headline(claims: list[dict]) -> dict[str, object]:
    """The cell of the first figure: partial coverage, where the pairs reach the peak."""
    middle = sorted({c["coverage"] for c in claims})[-2]
    return next(c for c in claims if c["coverage"] == middle)


def to_text(claims: list[dict]) -> str:
    """One line per beta and coverage."""
    head = f"{'beta':>5}{'coverage':>10}{'best eta':>10}{'DPO reward':>12}{'RPO reward':>12}"
    lines = [f"{head}{'uncovered: DPO':>16}{'RPO':>7}{'higher on':>12}{'p':>10}"]
    for c in claims:
        lines.append(
            f"{c['beta']:>5}{c['coverage']:>10}{c['best_eta']:>10}{c['dpo_true_reward']:>12.2f}"
            f"{c['rpo_true_reward']:>12.2f}{c['dpo_uncovered']:>16.1%}{c['rpo_uncovered']:>7.1%}"
            f"{c['rpo_higher_on']:>9}/{c['test_seeds']}{c['p_value']:>10.1e}"
        )
    lines.append(f"{len(claims)} tests: at 5 % after Bonferroni, p < {0.05 / len(claims):.1e}")
    return "\n".join(lines)


def plot_headline(
    settings: list[Setting], seeds: list[int], out: Outcome, shown: dict, path: Path
) -> None:
    """Where the policies go, what they believe, and what happens to the chosen responses."""
    beta, coverage, n = shown["beta"], shown["coverage"], len(seeds)
    pair = {"DPO": 0.0, f"RPO, η = {shown['best_eta']:g}": shown["best_eta"]}
    figure = Figure(figsize=(14, 4), layout="constrained")
    policies, rewards, training = figure.subplots(1, 3)
    x = grid().numpy()
    rewards.plot(x, true_reward(), "k", lw=2, label="true reward")
    for color, (name, eta) in zip(("C3", "C0"), pair.items(), strict=True):
        k = [(s.beta, s.eta, s.coverage) for s in settings].index((beta, eta, coverage))
        rows = slice(k * n, (k + 1) * n)
        logps = out.log_policy[rows].double()
        draw_band(policies, x, logps.exp().T.numpy(), color, name)
        implicit = beta * (logps - logps[:, grid() < coverage].mean(1, keepdim=True))
        draw_band(
            rewards, x, implicit.T.numpy() + covered_mean(coverage), color, f"implicit, {name}"
        )
        draw_band(training, out.moments, out.chosen_logp[rows].T.double().numpy(), color, name)
    for axes in (policies, rewards):
        axes.axvspan(0, coverage, color="0.92", zorder=0)
        axes.text(coverage / 2, 0.02, "covered by pairs", ha="center", color="0.4",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    policies.set(title="where the policy goes", xlabel="response", ylabel="probability")
    rewards.set(title="what it believes", xlabel="response", ylabel="reward",
                ylim=(-5, 3 + float(true_reward().max())))  # fmt: skip
    training.set(title="chosen responses over training", xlabel="step", ylabel="log-prob (nats)")
    for axes in (policies, rewards, training):
        axes.legend(fontsize="small")
    figure.suptitle(f"β = {beta:g}, {n} seeds, bands: 95 % confidence of the mean")
    figure.savefig(path, dpi=110)


def covered_mean(coverage: float) -> float:
    """Mean true reward of covered responses: implicit rewards are known up to a constant."""
    return float(true_reward()[grid() < coverage].mean())


def draw_band(axes: Axes, x: object, values: np.ndarray, color: str, label: str) -> None:
    """Mean over the last axis, and its confidence band."""
    mean, width = band(values)
    axes.plot(x, mean, color, label=label)
    axes.fill_between(x, mean - width, mean + width, color=color, alpha=0.25, lw=0)


def plot_sweep(
    settings: list[Setting], values: dict[str, np.ndarray], claims: list[dict], path: Path
) -> None:
    """True reward and chosen log-prob over eta, one column per coverage, one line per beta."""
    coverages = list(dict.fromkeys(s.coverage for s in settings))
    betas = list(dict.fromkeys(s.beta for s in settings))
    figure = Figure(figsize=(4.6 * len(coverages), 7), layout="constrained")
    panels = figure.subplots(2, len(coverages), sharey="row", squeeze=False)
    names = {"true_reward": "true reward", "final_chosen_logp": "chosen log-prob (nats)"}
    for (row, metric), (column, coverage) in (
        (a, b) for a in enumerate(names) for b in enumerate(coverages)
    ):
        axes = panels[row][column]
        for i, beta in enumerate(betas):
            places = [k for k, s in enumerate(settings) if (s.beta, s.coverage) == (beta, coverage)]
            places.sort(key=lambda k: settings[k].eta)
            etas = [str(settings[k].eta or "DPO").removesuffix(".0") for k in places]
            draw_band(axes, etas, values[metric][places], f"C{i}", f"β = {beta:g}")
            for c in claims if metric == "true_reward" else ():
                if (c["beta"], c["coverage"]) == (beta, coverage):
                    good = [j for j, k in enumerate(places)
                            if settings[k].eta in c["etas_within_one_standard_error"]]  # fmt: skip
                    means = values[metric][places].mean(-1)[good]
                    axes.plot([etas[j] for j in good], means, f"C{i}o")
        axes.set(xlabel="η", title=f"pairs cover {coverage:.0%} of the responses")
        if column == 0:
            axes.set_ylabel(names[metric])
            axes.legend(fontsize="small")
    figure.suptitle("dots: best η and those within one standard error")
    figure.savefig(path, dpi=110)
