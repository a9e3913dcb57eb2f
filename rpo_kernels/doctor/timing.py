"""Clocks: interleaved rounds, and the matmul rate of the same shapes.

N response tokens, D hidden, V vocabulary; U = 2 N V D FLOP
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

TILE = 2**20  # elements of a cache-sized tile of logits


def synchronize(device: str) -> None:
    """Wait for the work on a "cuda" device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall-clock time of one call, work on the device included; what the call returns is freed
    inside.
    """
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def summary(samples: list[float]) -> dict:
    """Median, range and every sample, for a results file."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "rounds": len(samples),
        "samples": samples,
    }


def interleave(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    failed: Callable[[str, Exception], None],
    deadline: float = float("inf"),
    doing: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Time every call once per round, in an order drawn anew each round, the same in every session:
    drift of the machine, and memory that the call before gave back, hit all alike.

    A call that raises is reported to `failed` and left out from then on; at the deadline (of
    `time.monotonic`) it stops.
    """
    calls = dict(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            if time.monotonic() > deadline:
                return {name: found for name, found in samples.items() if found}
            doing(name)
            try:
                samples[name].append(seconds(calls[name], device))
            except Exception as error:
                del calls[name], samples[name]
                failed(name, error)
    return samples


def matmuls(n: int, width: int, vocab: int, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """The three matmuls of the loss as bare calls with outputs allocated beforehand: 1U each.

    ``whole``: one matmul of the full shapes (reads and writes N x V). ``tiled`` (CPU): tile by tile
    down the vocabulary, the N x p tile staying in cache, as an engine uses them. Data are random,
    never zeros.
    """
    g = torch.Generator(device=device).manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, device=device).to(dtype)  # noqa: E731
    h, w = make(n, width), make(vocab, width)
    panel = torch.empty(vocab, n, dtype=dtype, device=device)
    for v in range(0, vocab, 4096):
        panel[v : v + 4096] = make(min(4096, vocab - v), n)
    dh, dw = torch.empty_like(h), torch.empty_like(w)
    calls: dict[str, Callable] = {
        "whole logits": lambda: torch.mm(w, h.t(), out=panel),
        "whole dh": lambda: torch.mm(panel.t(), w, out=dh),
        "whole dw": lambda: torch.mm(panel, h, out=dw),
    }
    if device == "cpu":
        step = max(64, TILE // n // 64 * 64)
        tile = make(step, n)
        part = torch.empty_like(dh)

        def tiles(work: Callable[[slice, int], object]) -> Callable[[], object]:
            spans = [(v, min(step, vocab - v)) for v in range(0, vocab, step)]
            return lambda: [work(slice(v, v + p), p) for v, p in spans][-1]

        calls |= {
            "tiled logits": tiles(lambda s, p: torch.mm(w[s], h.t(), out=tile[:p])),
            "tiled dh": tiles(lambda s, p: torch.mm(tile[:p].t(), w[s], out=part)),
            "tiled dw": tiles(lambda s, p: torch.mm(tile[:p], h, out=dw[s])),
        }
    return calls
