"""The float64 result that every implementation is compared with before it is timed, computed in
chunks of rows.

N response tokens, D hidden, V vocabulary, B pairs

One sweep gives the log-probs. The gradients are then either complete or, for large shapes, evenly
spaced samples: `sample` rows of dH (over the whole vocabulary) and `sample` rows of dW (over all
tokens).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import IGNORE, Problem
from benchmarks.peers import ETA, IMPLEMENTATIONS, Implementation

ELEMENTS = 2**25  # of a chunk of logits: 256 MiB in float64
SANE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
APPROXIMATE = 0.1  # what an implementation that leaves out parts of the gradient may add
SANE_LOSS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
YARDSTICK = 0.5  # the most that rounding may do to materialized logits in half precision


def relative(found: Tensor, expected: Tensor) -> float:
    """``||found - expected|| / ||expected||``; without the divisor where that is 0."""
    gap = (found.double() - expected).norm()
    return float(gap / expected.norm()) if bool(expected.norm() > 0) else float(gap)


class Truth:
    """Exact log-probs of one problem, and loss and gradients for any reference and beta."""

    def __init__(self, problem: Problem, sample: int | None = None):
        self.labels = problem.labels
        self.cached = problem.ref_logps.double()
        self.hidden = problem.hidden.detach().flatten(0, 1)
        self.weight = problem.weight.detach().double()
        self.targets = problem.labels.flatten()
        self.kept = self.targets != IGNORE
        rows, vocab = len(self.hidden), len(self.weight)
        device = self.hidden.device
        pick = lambda n: torch.arange(0, n, max(1, n // sample), device=device)  # noqa: E731
        self.rows = None if sample is None else pick(rows)
        self.entries = None if sample is None else pick(vocab)
        self.chunk = max(1, ELEMENTS // vocab)
        self.lse = torch.zeros(rows, dtype=torch.float64, device=device)
        self.logps = torch.zeros_like(self.lse)
        for index in self.kept.nonzero()[:, 0].split(self.chunk):
            logits = self.hidden[index].double() @ self.weight.t()
            self.lse[index] = logits.logsumexp(1)
            target = logits.gather(1, self.targets[index, None])[:, 0]
            self.logps[index] = target - self.lse[index]
        self.found: dict[tuple[str, float], tuple[Tensor, Tensor, Tensor]] = {}

    def solve(self, reference: str, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """``loss (), dH (rows, D), dW (entries, D)`` for a kind of reference and a beta."""
        if (reference, beta) not in self.found:
            sums = self.logps.view(self.labels.shape).sum(1).requires_grad_()
            ref = {"cached": self.cached, "none": 0.0, "own": sums.detach()}[reference]
            c, r = (sums - ref).chunk(2)
            loss = (-F.logsigmoid(beta * (c - r)) - ETA * beta * sums.chunk(2)[0]).mean()
            (slope,) = torch.autograd.grad(loss, sums)
            slope = slope.repeat_interleave(self.labels.shape[1]) * self.kept
            self.found[reference, beta] = loss.detach(), *self._gradients(slope)
        return self.found[reference, beta]

    def _dlogits(self, rows: Tensor, slope: Tensor, entries: Tensor | None) -> Tensor:
        """``slope * (onehot - P)`` of some rows over all or some vocabulary entries."""
        weight = self.weight if entries is None else self.weight[entries]
        panel = self.hidden[rows].double() @ weight.t()
        panel.sub_(self.lse[rows, None]).exp_().neg_()
        ids = torch.arange(len(self.weight), device=rows.device) if entries is None else entries
        at = torch.searchsorted(ids, self.targets[rows].clamp(min=0)).clamp(max=len(ids) - 1)
        hit = (ids[at] == self.targets[rows]).double()
        panel.scatter_add_(1, at[:, None], hit[:, None])
        return panel.mul_(slope[rows, None])

    def _gradients(self, slope: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept.nonzero()[:, 0]
        width = self.hidden.shape[1]
        d_hidden = self.lse.new_zeros(len(self.hidden), width)
        entries = self.entries
        d_weight = self.lse.new_zeros(len(self.weight) if entries is None else len(entries), width)
        step = self.chunk if entries is None else max(1, ELEMENTS // len(entries))
        for rows in kept.split(step):
            panel = self._dlogits(rows, slope, entries)
            d_weight.addmm_(panel.t(), self.hidden[rows].double())
            if entries is None:
                d_hidden[rows] = panel @ self.weight
        if self.rows is None:
            return d_hidden, d_weight
        for rows in self.rows[self.kept[self.rows]].split(self.chunk):
            d_hidden[rows] = self._dlogits(rows, slope, None) @ self.weight
        return d_hidden[self.rows], d_weight

    def errors(
        self, implementation: Implementation, loss: Tensor, dh: Tensor, dw: Tensor | None
    ) -> dict[str, float | None]:
        """Relative errors ``||out - ref|| / ||ref||`` of loss, dH and dW (None for a frozen
        head).
        """
        want_loss, want_dh, want_dw = self.solve(implementation.reference, implementation.beta)
        dh = dh.flatten(0, 1)
        if self.rows is not None:
            dh = dh[self.rows]
        if dw is not None and self.entries is not None:
            dw = dw[self.entries]
        return {
            "loss": relative(loss.detach(), want_loss),
            "dh": relative(dh, want_dh),
            "dw": None if dw is None else relative(dw, want_dw),
        }


def verdict(
    implementation: Implementation, dtype: torch.dtype, errors: dict, plain: dict | None = None
) -> str | None:
    """Why a result is wrong and must not be timed, or None. NaN is wrong.

    `plain`: the errors of materialized logits in that dtype, if known. In half precision the
    coefficient of a single long pair can be off by a fifth by rounding alone, and every gradient
    with it: then theirs are the measure.
    """
    limit = SANE[dtype] + (APPROXIMATE if implementation.tolerance else 0)
    for name, bound in (("loss", SANE_LOSS[dtype]), ("dh", limit), ("dw", limit)):
        if dtype.itemsize < 4 and implementation is IMPLEMENTATIONS["materialized"]:
            bound = YARDSTICK
        elif dtype.itemsize < 4 and plain is not None:
            bound = max(bound, min(2 * (plain[name] or 0), YARDSTICK))
        value = errors[name]
        if value is not None and not value <= bound:
            return f"relative error of {name} is {value:.2e}, expected at most {bound:.0e}"
    return None


def within_budget(dtype: torch.dtype, errors: dict, plain: dict | None) -> bool | None:
    """Whether gradients are within twice the error of plain PyTorch in the same dtype plus one
    eps; None without `plain`.
    """
    if plain is None:
        return None
    eps = torch.finfo(dtype).eps
    return all(
        errors[k] <= 2 * plain[k] + eps
        for k in ("dh", "dw")
        if errors[k] is not None and plain.get(k) is not None
    )
