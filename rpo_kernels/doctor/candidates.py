"""Every way there is to run the matmul kernels on a device, tried one after the other.

On a GPU a candidate is a tile, who multiplies, and whose kernels (`tuning.Kernels`); on a CPU the
shape of a tile of logits (`tuning.Blocks`). A candidate that does not compile, does not fit, or
misses the limits of `accuracy` is recorded with the reason and left out. The current choice comes
first, and the parts take turns, so that whenever the time is up all have seen about as many.

N rows, D hidden size, V vocabulary; U = 2 N V D FLOP
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels import tuning
from rpo_kernels.backends import Backend, tiles, torch_backend
from rpo_kernels.doctor import accuracy
from rpo_kernels.doctor.timing import seconds
from rpo_kernels.engines import skipping
from rpo_kernels.engines.panel import fill_panel, stride
from rpo_kernels.rows import Rows
from rpo_kernels.spec import Head, Transform

# (block_n, block_v, block_d, num_warps, num_stages, per_sm, tma)
MATMUL: list[tuple] = [
    (256, 128, 64, 8, 3, 1, True), (128, 256, 64, 8, 4, 1, True), (128, 256, 64, 8, 3, 1, True),
    (128, 128, 64, 8, 4, 1, True), (128, 128, 64, 4, 3, 2, True), (128, 128, 128, 8, 3, 1, True),
    (256, 128, 64, 8, 4, 1, False), (128, 128, 64, 4, 3, 2, False),
]  # fmt: skip
ROWS: list[tuple] = [
    (128, 64, 256, 8, 4), (256, 64, 128, 8, 3), (256, 32, 128, 8, 5), (128, 64, 128, 8, 3, 2),
    (128, 64, 128, 4, 3, 2), (128, 128, 128, 8, 3), (128, 64, 256, 8, 3), (256, 128, 128, 8, 2),
]  # fmt: skip
WEIGHT: list[tuple] = [
    (64, 128, 256, 8, 3), (64, 256, 128, 8, 4), (64, 128, 128, 8, 3, 2), (64, 128, 128, 4, 3, 2),
    (128, 128, 128, 8, 3), (32, 128, 256, 8, 5), (64, 64, 256, 4, 4), (128, 128, 256, 8, 2),
]  # fmt: skip
SINGLE: list[tuple] = [
    (64, 64, 32, 4, 3, 2),
    (128, 64, 16, 8, 3),
    (64, 128, 16, 8, 3),
    (128, 128, 16, 8, 3),
]
SMALL: list[tuple] = [(32, 32, 32, 4, 1)]  # for the interpreter
SPANS = (16, 4)
BLOCKS = [(2**e, r) for r in (1024, 512, 2048, 256) for e in (20, 19, 18)]
TOLERANCE = 0.003
PARTS = ("lse_and_target", "exp_panel")
KEPT = ("kept rows", "kept weight")


class Case(NamedTuple):
    """Tensors of one shape, as many rows as fit the workspace."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    values: Tensor
    """(V, N), a panel to fill; for `KEPT` parts a filled one."""
    shift: Tensor
    keep: Tensor | None
    """(blocks, V), the entries worth keeping."""


class Trial(NamedTuple):
    """One candidate for one part of the work."""

    part: str
    choice: tuning.Kernels | tuning.Blocks
    label: str


class Timing(NamedTuple):
    """What became of a trial: its times, or why it has none."""

    trial: Trial
    samples: list[float]
    error: str = ""

    @property
    def median(self) -> float:
        """In seconds."""
        return statistics.median(self.samples)

    def record(self) -> dict:
        """For a JSON file."""
        found: dict = {"part": self.trial.part, "label": self.trial.label}
        found["choice"] = self.trial.choice._asdict()
        return found | ({"error": self.error} if self.error else {"seconds": self.samples})


def make_case(hidden: Tensor, weight: Tensor, targets: Tensor, kept: bool) -> Case:
    """Of hidden (N, D), weight (V, D) and targets (N,); with what skipping would keep if `kept`."""
    n, vocab, device = hidden.shape[0], weight.shape[0], hidden.device
    step = stride(n, device)
    buffer = torch.empty(vocab * step, dtype=hidden.dtype, device=device)
    if not kept:
        values = buffer.view(vocab, step)[:, :n]
        shift = torch_backend.lse_and_target(
            hidden, weight[:512], None, torch.full_like(targets, -1), Transform(), 2**24
        )[0]
        return Case(hidden, weight, targets, values, shift, None)
    head = Head(weight, None, Transform(), hidden.dtype)
    rows = Rows(None, targets)
    panel = fill_panel(hidden, rows, head, torch_backend, 2**30, False, buffer)
    keep, *_ = skipping.choose_entries(
        panel.values, panel.sums, targets, torch.ones_like(panel.sums), TOLERANCE,
        skipping.split_rows([0, n]), True,
    )  # fmt: skip
    return Case(hidden, weight, targets, panel.values, panel.shift, keep)


def random_case(rows: int, width: int, vocab: int, dtype: torch.dtype, device) -> Case:
    """Random operands, never zeros, with logits of deviation 3."""
    make = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=make, device=device).to(dtype)
    weight = torch.empty(vocab, width, dtype=dtype, device=device)
    for part in weight.split(2**14):
        part.copy_(3 / width**0.5 * torch.randn(part.shape, generator=make, device=device))
    targets = torch.randint(vocab, (rows,), generator=make, device=device)
    return make_case(hidden, weight, targets, kept=False)


def run(part: str, backend: Backend, c: Case) -> Tensor:
    """One part of the work; what it returns is freed inside the time."""
    plain = Transform()
    if part == "lse_and_target":
        return backend.lse_and_target(c.hidden, c.weight, None, c.targets, plain, 2**28)[0]
    if part == "exp_panel":
        sums = torch.zeros_like(c.shift)
        backend.exp_panel(
            c.hidden, c.weight, None, c.shift, c.targets, 0, plain, out=c.values, sums=sums
        )
        return sums
    assert c.keep is not None
    like = c.hidden if part == "kept rows" else c.weight
    out = torch.zeros(like.shape, device=like.device)
    rows, weight = (out, None) if part == "kept rows" else (None, out)
    backend.kept_products(
        c.values, skipping.BLOCK, c.keep, c.weight, c.hidden, c.shift,
        d_rows=rows, d_weight=weight, d_bias=None, scale=1.0,
    )  # fmt: skip
    return out


def current(name: str, device: torch.device, dtype: torch.dtype) -> tuning.Kernels | tuning.Blocks:
    """What runs now on `device`."""
    if name == "torch":
        return torch_backend.tile_of(device, dtype)
    return tuning.kernels(device, dtype)


def label_of(choice: tuning.Kernels | tuning.Blocks) -> str:
    """In a few words, what makes the choice."""
    if isinstance(choice, tuning.Blocks):
        return f"tiles of {choice.elements} logits, at most {choice.rows} rows"
    if choice.hopper == "gluon":
        return "Gluon kernels"
    how = "fused" if choice.exp_path == "fused" else "panel by the vendor's matmul, sums"
    tile = choice.tile
    shape = "x".join(map(str, tile[:3]))
    more = f"{tile.num_warps} warps, {tile.num_stages} stages" + (", TMA" if tile.tma else "")
    return f"{how} {shape}, {more}"


def trials(name: str, device: torch.device, dtype: torch.dtype, rows: int) -> list[Trial]:
    """Candidates of the parts `PARTS`, the current one first."""
    own = current(name, device, dtype)
    if isinstance(own, tuning.Blocks):
        found = [own, *(tuning.Blocks(e, r) for e, r in BLOCKS if device.type == "cpu")]
        fit: dict[tuple, tuning.Blocks] = {}  # what is the same for so few rows runs once
        for x in found:
            fit.setdefault((x.elements, min(x.rows, rows)), x)
        return [Trial(part, x, label_of(x)) for x in fit.values() for part in PARTS]
    family = tiles.of_device(device)[0]
    given = MATMUL if dtype.itemsize == 2 else SINGLE
    given = SMALL if family == "interpreter" else given
    default = tuning.default_kernels(device, dtype)
    shapes = dict.fromkeys([own.tile, default.tile, *(tiles.Tile(*x) for x in given)])
    if family not in ("sm_90", "sm_100"):
        shapes = dict.fromkeys(tile._replace(tma=False) for tile in shapes)
    fused = [own._replace(tile=tile, exp_path="fused", hopper="triton") for tile in shapes]
    vendor = own._replace(exp_path="panel", hopper="triton")
    gluon = [own._replace(hopper="gluon")] if family == "sm_90" and dtype.itemsize == 2 else []
    panels = dict.fromkeys([own, vendor, *gluon, *fused])
    sums = dict.fromkeys([own, *gluon, *fused])
    both = itertools.zip_longest(
        (Trial(PARTS[0], x, label_of(x)) for x in sums),
        (Trial(PARTS[1], x, label_of(x)) for x in panels),
    )
    return [trial for pair in both for trial in pair if trial]


def kept_trials(device: torch.device, dtype: torch.dtype) -> list[Trial]:
    """Candidates of the parts `KEPT` on a GPU, the current one first."""
    own = tuning.kernels(device, dtype)
    small = tiles.of_device(device)[0] == "interpreter"
    rows, weight = (SMALL, SMALL) if small else (ROWS, WEIGHT)
    for_rows = [own._replace(kept_rows=tiles.Tile(*x)) for x in rows]
    for_weight = [own._replace(span=span) for span in SPANS]
    for_weight += [own._replace(kept_weight=tiles.Tile(*x)) for x in weight]
    both = itertools.zip_longest(
        (Trial(KEPT[0], x, str(tuple(x.kept_rows))) for x in (own, *for_rows)),
        (Trial(KEPT[1], x, f"{tuple(x.kept_weight)}, span {x.span}") for x in (own, *for_weight)),
    )
    return [trial for pair in both for trial in pair if trial]


CHECKS = {
    "lse_and_target": accuracy.sums,
    "exp_panel": accuracy.panel,
    "kept rows": accuracy.kept_products,
    "kept weight": accuracy.kept_products,
}


def measure(name: str, backend: Backend, trial: Trial, case: Case, rounds: int) -> Timing:
    """Check a candidate at ragged N and V and the hidden size of `case`; then time it."""
    device, (_, width) = case.hidden.device, case.hidden.shape
    with tuning.trying(trial.choice):
        problem = accuracy.make_problem(name, device, case.hidden.dtype, width)
        found = accuracy.compare(trial.part, lambda: CHECKS[trial.part](backend, problem))
        if not found.right:
            wrong = f"an error of {found.share:.3g} times what rounding explains"
            return Timing(trial, [], found.error or wrong)
        try:
            call: Callable[[], object] = lambda: run(trial.part, backend, case)  # noqa: E731
            call()
            return Timing(trial, [seconds(call, device.type) for _ in range(rounds)])
        except Exception as error:  # does not fit, cannot be launched
            return Timing(trial, [], f"{type(error).__name__}: {error}")


def sweep(
    name: str, backend: Backend, candidates: list[Trial], case: Case, deadline: float, rounds: int
) -> Iterator[Timing]:
    """Each candidate in turn until `deadline` (of `time.monotonic`); the first of each part, which
    is the current one, in any case.
    """
    seen = set()
    for trial in candidates:
        if time.monotonic() < deadline or trial.part not in seen:
            yield measure(name, backend, trial, case, rounds)
        seen.add(trial.part)


def fastest(timings: list[Timing]) -> tuning.Kernels | tuning.Blocks | None:
    """The choice whose `PARTS` take least together; None if none has both times.

    With the vendor's matmul, log-sum-exps still run in a tile of their own: the best of any.
    """
    found: dict[str, dict] = {part: {} for part in PARTS}
    for timing in timings:
        if not timing.error and timing.trial.part in found:
            found[timing.trial.part][timing.trial.choice] = timing.median
    sums, panels = (found[part] for part in PARTS)
    total = {choice: sums[choice] + panels[choice] for choice in panels if choice in sums}
    for choice, panel in panels.items():
        if isinstance(choice, tuning.Kernels) and (choice.exp_path, choice.hopper) == (
            "panel", "triton",
        ):  # fmt: skip
            for other, time_of_sums in sums.items():
                if other.hopper == "triton":
                    total[choice._replace(tile=other.tile)] = time_of_sums + panel
    return min(total, key=total.__getitem__) if total else None
