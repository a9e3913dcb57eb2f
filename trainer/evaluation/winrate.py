"""Win rates of every model against every other, with confidence intervals.

Q questions, C comparisons of one pair of models, S bootstrap samples

Win rate of a against b: percent of comparisons that a wins, a tie counted as half. Confidence
intervals are percentiles over S bootstrap samples of the *questions*: the turns of a question, and
the judgments of several judges on it, are drawn together.

Length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475): how often a would win if both
answers were equally long. A logistic regression explains each comparison by who answered and by how
much longer the answer is,

    P(a wins) = sigmoid(theta + phi * tanh((len_a - len_b) / std(len_a - len_b))),

and the rate is sigmoid(theta). phi has a standard normal prior, so that it stays finite when length
separates wins from losses. AlpacaEval's third term, the difficulty of each instruction, needs its
many models to be estimated and is not here: the two figures are close, not equal.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from trainer.errors import InputError
from trainer.evaluation.answers import Answers, read_answers
from trainer.evaluation.judgments import Comparison, read_judgments
from trainer.evaluation.records import replace_text, write_json
from trainer.paths import open_folder

LEVEL = 95  # percent of the bootstrap samples inside the interval
THETA_PRECISION = 1e-6  # all but flat prior: a model that always wins gets 100 %, not an overflow

Rate = tuple[float, float, float]  # estimate, low, high in percent
Matrix = dict[str, dict[str, float | None]]  # [a][b], in percent; None where the two never met


class WinRates(TypedDict):
    """What `winrates.json` holds."""

    models: list[str]
    matrix: Matrix
    """Win rates."""
    low: Matrix
    high: Matrix
    """The ends of their intervals."""
    length_controlled: Matrix | None
    """None without answers."""
    pairs: list[dict[str, Any]]
    """Of every ordered pair of models: `a`, `b`, counts, and each rate with its interval."""
    mean_scores: dict[str, float]
    """Of every model that was judged alone."""
    malformed: int
    disagreements: int
    bootstrap: dict[str, int]
    files: list[str]


def winrate(
    files: list[str],
    output_dir: str,
    answers: list[str],
    rename: dict[str, str],
    samples: int,
    seed: int,
) -> WinRates:
    """Write `winrates.json`, `.csv` and `.png` for judgment files.

    Args:
        files: judgments in one of FastChat's formats, see `judgments`.
        output_dir: where the three files go.
        answers: answer files of every model, which give the lengths (in characters) for the
            length-controlled rates; empty for none.
        rename: names to show instead of those in the files.
        samples: bootstrap samples, >= 100.
        seed: of the bootstrap.

    Returns:
        What `winrates.json` holds.

    Raises:
        InputError: unusable judgments, or no answer to a question that was judged.
    """
    judgments = read_judgments(files, rename)
    folder = open_folder(output_dir)
    rows = directed_rows(judgments.comparisons)
    draws = question_draws(judgments.comparisons, samples, seed)
    table = {pair: describe(pairs, draws) for pair, pairs in rows.items()}
    if answers:
        by_name = {rename.get(k, k): v for k, v in read_answers(answers).items()}
        for pair, pairs in rows.items():
            gaps = length_gaps(pairs, by_name)
            table[pair] |= named("length_controlled", controlled_rate(pairs, gaps, draws))
    models = judgments.models
    result: WinRates = {
        "models": models,
        "matrix": matrix(models, table, "win_rate"),
        "low": matrix(models, table, "win_rate_low"),
        "high": matrix(models, table, "win_rate_high"),
        "length_controlled": matrix(models, table, "length_controlled") if answers else None,
        "pairs": [{"a": a, "b": b} | values for (a, b), values in table.items()],
        "mean_scores": {name: float(np.mean(x)) for name, x in sorted(judgments.scores.items())},
        "malformed": judgments.malformed,
        "disagreements": judgments.disagreements,
        "bootstrap": {"level": LEVEL, "samples": samples, "seed": seed},
        "files": files,
    }
    write_json(folder / "winrates.json", result)
    replace_text(folder / "winrates.csv", to_csv(result["pairs"]))
    plot_matrix(result, folder / "winrates.png")
    return result


def directed_rows(comparisons: list[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    """The comparisons of every ordered pair of models, each from the first one's side."""
    rows = defaultdict(list)
    for c in comparisons:
        rows[c.a, c.b].append(c)
        rows[c.b, c.a].append(Comparison(c.question, c.turn, c.b, c.a, 1 - c.points))
    return dict(sorted(rows.items()))


def question_draws(comparisons: list[Comparison], samples: int, seed: int) -> dict:
    """How often each bootstrap sample contains each question: question -> (S,) counts."""
    questions = list(dict.fromkeys(c.question for c in comparisons))
    even = np.full(len(questions), 1 / len(questions))
    counts = np.random.default_rng(seed).multinomial(len(questions), even, samples)
    return dict(zip(questions, counts.T, strict=True))


def describe(rows: list[Comparison], draws: dict) -> dict[str, float]:
    """Counts, win rate and its interval for one ordered pair of models."""
    points = np.array([c.points for c in rows])
    weights = np.stack([draws[c.question] for c in rows], 1)  # (S, C)
    drawn = weights.sum(1) > 0  # a sample may miss all questions on which the two met
    sampled = 100 * (weights[drawn] @ points) / weights[drawn].sum(1)
    return {
        "comparisons": len(rows),
        "wins": int((points == 1).sum()),
        "ties": int((points == 0.5).sum()),
        "losses": int((points == 0).sum()),
    } | named("win_rate", (float(100 * points.mean()), *interval(sampled)))


def interval(sampled: np.ndarray) -> tuple[float, float]:
    """The middle `LEVEL` percent of bootstrap values."""
    low, high = np.percentile(sampled, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)


def named(name: str, rate: Rate) -> dict[str, float]:
    """A rate and the ends of its interval as three entries."""
    return {name: rate[0], f"{name}_low": rate[1], f"{name}_high": rate[2]}


def length_gaps(rows: list[Comparison], answers: Answers) -> np.ndarray:
    """By how many characters the first model's answer is longer, (C,)."""

    def length(model: str, c: Comparison) -> int:
        if model not in answers:
            raise InputError(f"answers: no file holds the answers of {model}")
        turns = answers[model].get(c.question, [])
        if not 1 <= c.turn <= len(turns):
            raise InputError(f"answers: {model} has none to question {c.question}, turn {c.turn}")
        return len(turns[c.turn - 1])

    return np.array([length(c.a, c) - length(c.b, c) for c in rows], dtype=float)


def controlled_rate(rows: list[Comparison], gaps: np.ndarray, draws: dict) -> Rate:
    """Length-controlled win rate, see above, by Newton's method on all bootstrap samples at once.

    The samples are the rows of `weights`, the data itself the first; two unknowns each.
    """
    points = np.array([c.points for c in rows])
    weights = np.stack([np.append(1, draws[c.question]) for c in rows], 1)  # (1 + S, C)
    terms = np.stack([np.ones(len(rows)), np.tanh(gaps / (gaps.std() or 1))], 1)  # (C, 2)
    precision = np.array([THETA_PRECISION, 1.0])
    unknowns = np.zeros((len(weights), 2))  # theta, phi
    for _ in range(100):
        p = 1 / (1 + np.exp(-unknowns @ terms.T))
        slope = (weights * (points - p)) @ terms - precision * unknowns
        curved = np.einsum("sc,ci,cj->sij", weights * p * (1 - p), terms, terms)
        step = np.linalg.solve(curved + np.diag(precision), slope[..., None])[..., 0]
        unknowns += np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    rates = 100 / (1 + np.exp(-unknowns[:, 0]))
    drawn = weights[1:].sum(1) > 0
    return float(rates[0]), *interval(rates[1:][drawn])


def matrix(models: list[str], table: dict, key: str) -> Matrix:
    """``matrix[a][b]`` of one column of the table: 50 on the diagonal, None where nothing met."""

    def value(a: str, b: str) -> float | None:
        return 50.0 if a == b else table.get((a, b), {}).get(key)

    return {a: {b: value(a, b) for b in models} for a in models}


def to_csv(pairs: list[dict]) -> str:
    """One line per ordered pair of models."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(pairs[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(pairs)
    return text.getvalue()


def to_text(result: WinRates) -> str:
    """The table for a terminal."""
    pairs, lines = result["pairs"], []
    width = max(len(f"{p['a']} > {p['b']}") for p in pairs) + 2
    controlled = result["length_controlled"] is not None
    lines.append(f"{'':<{width}}{'win rate':>9}  {f'{LEVEL} % interval':<16}{'win/tie/loss':>13}")
    lines[0] += "   length-controlled" if controlled else ""
    for p in pairs:
        ends = f"{p['win_rate_low']:.2f}-{p['win_rate_high']:.2f}"
        counts = f"{p['wins']}/{p['ties']}/{p['losses']}"
        name = f"{p['a']} > {p['b']}"
        line = f"{name:<{width}}{p['win_rate']:>9.2f}  {ends:<16}{counts:>13}"
        lines.append(line + (f"{p['length_controlled']:>20.2f}" if controlled else ""))
    for name, mean in result["mean_scores"].items():
        lines.append(f"mean score of {name}: {mean:.3f}")
    orders, malformed = result["disagreements"], result["malformed"]
    lines.append(f"orders disagree (ties): {orders}; malformed (left out): {malformed}")
    return "\n".join(lines)


def plot_matrix(result: WinRates, path: Path) -> None:
    """Draw the N x N matrix: the row's model against the column's."""
    from matplotlib.figure import Figure

    models, rates = result["models"], result["matrix"]
    values = np.array([[rates[a][b] for b in models] for a in models], dtype=np.float64)
    size = 2.2 + 1.1 * len(models)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=100, cmap="RdBu")
    for i, a in enumerate(models):
        for j, b in enumerate(models):
            if a == b or rates[a][b] is None:
                continue
            text = f"{values[i, j]:.1f}\n[{result['low'][a][b]:.0f}, {result['high'][a][b]:.0f}]"
            dark = abs(values[i, j] - 50) > 30
            axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(models)), models, rotation=25, ha="right")
    axes.set_yticks(range(len(models)), models)
    axes.set(title="win rate of row over column (%)", xlabel="loses", ylabel="wins")
    figure.colorbar(image, shrink=0.8)
    figure.savefig(path, dpi=150)
