"""From which share of kept entries on a tolerance costs time: `python -m benchmarks.break_even`.

For a panel of the streaming engine the two exact matmuls are timed, the choice of entries, and the
matmuls on shares of the entries (`kept_products`), interleaved. The break-even is the share at
which choosing and the matmuls on what is kept take as long as the exact ones: what
`engines.skipping.CPU_BREAK_EVEN` is at most.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from rpo_kernels.backends import torch_backend
from rpo_kernels.engines import skipping
from rpo_kernels.engines.panel import matmul_into

SHAPES = ((1024, 576, 49_152), (512, 2048, 32_768), (512, 64, 65_536))  # n, D, V
SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6)


def seconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians of interleaved calls."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def measure(n: int, width: int, vocab: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Times relative to the exact matmuls: of choosing, and of the matmuls on every share."""
    torch.manual_seed(0)
    panel = torch.rand(vocab, n).pow_(8).to(dtype)
    weight, scaled = torch.randn(vocab, width, dtype=dtype), torch.randn(n, width, dtype=dtype)
    sums, ones = torch.full((n,), float(vocab)), torch.ones(n)
    targets = torch.randint(vocab, (n,))
    d_rows, d_weight = torch.empty(n, width), torch.zeros(vocab, width)
    blocks = skipping.split_rows([0, n])

    def exact() -> None:
        matmul_into(d_rows, panel.t(), weight, accumulate=False)
        matmul_into(d_weight, panel, scaled, accumulate=True)

    def kept(keep: torch.Tensor) -> None:
        torch_backend.kept_products(
            panel, skipping.BLOCK, keep, weight, scaled, ones,
            d_rows=d_rows, d_weight=d_weight, d_bias=None, scale=1.0,
        )  # fmt: skip

    def choose() -> None:
        skipping.choose_entries(panel, sums, targets, ones, 1e-3, blocks, together=True)

    def estimate() -> None:
        skipping.pays(panel, sums, targets, ones, 1e-3, 0.5)

    masks = {share: torch.rand(len(blocks), vocab) < share for share in SHARES}
    calls: dict[str, Callable[[], object]] = {
        "exact": exact, "choose": choose, "estimate": estimate,
    }  # fmt: skip
    calls |= {f"{share}": lambda mask=mask: kept(mask) for share, mask in masks.items()}
    found = seconds(calls, rounds)
    return {name: value / found["exact"] for name, value in found.items()}


def break_even(found: dict[str, float]) -> float:
    """The share where choosing and what is kept cost 1, between or beyond the two nearest."""
    points = [(share, found["choose"] + found[f"{share}"]) for share in SHARES]
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if a <= 1 <= b:
            return low + (high - low) * (1 - a) / (b - a)
    return 0.0 if points[0][1] > 1 else SHARES[-1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args(arguments)
    torch.set_num_threads(a.threads)
    for dtype in (torch.float32, torch.bfloat16):
        for n, width, vocab in SHAPES:
            found = measure(n, width, vocab, dtype, a.rounds)
            times = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            shape = f"{dtype}, n {n}, D {width}, V {vocab}"
            print(f"{shape}: break-even {break_even(found):.2f} ({times})", flush=True)


if __name__ == "__main__":
    main()
