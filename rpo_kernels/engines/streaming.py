"""Loss and gradient in one sweep: 3U exact, 2U with a frozen head (gradient in forward).

The loss depends on *sequence* log-probs, so ``g = d loss / d logp`` is one number per sequence. A
chunk of rows therefore needs its logits once: `panel.fill_panel` turns them, vocabulary-major, into
``E = S * (P - onehot) * dz/dx``, and

    dH_i = -(g_i / S_i) * (E^T @ W)_i         1U
    dW   = E @ (-(g / S) * H)                 1U

as soon as `g` is known, which is when the chunk that completes a pair is filled. So pairs are
grouped into chunks as large as the workspace holds. Only a pair longer than that is split; then the
chunks before its last leave ``A = E @ (H / S)`` in one float32 accumulator per side, (V, D) each,
which `g` scales later.

With ``grad_tolerance`` the two matmuls run on the vocabulary entries that matter (`skipping`); the
weights are ``|g|`` where a group is whole, and ones within a side of a split pair, where `g` is
constant anyway. The first panel decides whether that pays (`skipping.pays`); if not, the call is
exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels.backends import Backend
from rpo_kernels.engines import skipping
from rpo_kernels.engines.panel import (
    Panel,
    capacity,
    fill_panel,
    matmul_into,
    overflowed,
    row_factors,
    row_sizes,
    scale_of,
    starts_exact,
    stride,
)
from rpo_kernels.rows import Rows
from rpo_kernels.spec import ACCUMULATOR, Head, Settings

# ``(first, last, logps (n,)) -> (pairs (last - first, k), coef (n,))``: the losses of pairs `first`
# to `last` from the log-probs of their rows (chosen rows, then rejected), and d loss / d logp of
# each of these rows
PairLoss = Callable[[int, int, Tensor], tuple[Tensor, Tensor]]


class Group(NamedTuple):
    """Pairs `first` to `last` and the row ranges, chunk by chunk, that cover them."""

    first: int
    last: int
    chunks: list[list[tuple[int, int]]]


def group_pairs(offsets: list[int], size: int) -> list[Group]:
    """Cut the pairs into groups of at most `size` rows; a longer pair is split into chunks, chosen
    rows first.
    """
    pairs = len(offsets) // 2
    lengths = [
        offsets[b + 1] - offsets[b] + offsets[pairs + b + 1] - offsets[pairs + b]
        for b in range(pairs)
    ]
    groups, first = [], 0
    while first < pairs:
        last, rows = first + 1, lengths[first]
        while last < pairs and rows + lengths[last] <= size:
            rows += lengths[last]
            last += 1
        sides = [(offsets[first], offsets[last]), (offsets[pairs + first], offsets[pairs + last])]
        if rows <= size:
            groups.append(Group(first, last, [sides]))
        else:
            chunks = []
            for start, stop in sides:
                parts = math.ceil((stop - start) / size)
                edges = [start + (stop - start) * k // max(parts, 1) for k in range(parts + 1)]
                chunks += [[(edges[k], edges[k + 1])] for k in range(parts)]
            groups.append(Group(first, last, chunks))
        first = last
    return groups


class Sum:
    """A parameter's gradient as a sum of products, float32 unless it is a single one."""

    def __init__(self, like: Tensor, single: bool, dtype: torch.dtype):
        self.dtype, self.used = like.dtype, False
        acc = ACCUMULATOR[dtype]
        self.total = torch.empty_like(like, dtype=like.dtype if single else acc)

    def add(self, a: Tensor, b: Tensor, scale: float) -> None:
        """Add ``scale * a @ b``."""
        matmul_into(self.total, a, b, accumulate=self.used, scale=scale)
        self.used = True

    def add_scaled(self, tensor: Tensor, factor: Tensor) -> None:
        """Add ``factor * tensor``."""
        if self.used:
            self.total.addcmul_(tensor, factor)
        else:
            torch.mul(tensor, factor, out=self.total)
        self.used = True

    def dense(self) -> Tensor:
        """The sum so far, to be added to in place."""
        if not self.used:
            self.total.zero_()
        self.used = True
        return self.total


class Sums(NamedTuple):
    """The sums for weight (V, D) and bias (V, 1), None where no gradient is wanted."""

    weight: Sum | None
    bias: Sum | None


class Sweep:
    """The state of one call: inputs, the panel buffer, the gradients as they grow, and the
    certificate. Each of `whole_pairs` and `long_pair` takes one `Group`.
    """

    def __init__(
        self,
        hidden: Tensor,
        rows: Rows,
        head: Head,
        backend: Backend,
        chunks: list[list[tuple[int, int]]],
        settings: Settings,
        exact: bool,
    ):
        if rows.positions is None and len(chunks) > 1:
            numbers = torch.arange(rows.targets.shape[0], device=hidden.device)
            rows = rows._replace(positions=numbers)
        self.hidden, self.rows, self.head, self.backend = hidden, rows, head, backend
        self.max_bytes, self.exact = settings.max_bytes, exact
        self.needs, self.tolerance = settings.needs, settings.tolerance
        self.most = 0.0  # share of entries kept from which on skipping does not pay
        if self.tolerance:
            count = rows.targets.shape[0]
            self.most = skipping.break_even(head.weight, head.dtype, count, settings.needs)
            self.tolerance = self.tolerance if self.most > 0 else 0.0
        self.decided = not self.tolerance
        longest = max((sum(stop - start for start, stop in chunk) for chunk in chunks), default=0)
        self.acc = ACCUMULATOR[head.dtype]
        size = head.weight.shape[0] * stride(longest, hidden.device)
        self.buffer = hidden.new_empty(size, dtype=head.dtype)
        self.d_hidden = torch.zeros_like(hidden) if self.needs[0] else None
        self.single = len(chunks) == 1
        self.totals = self.new_sums(self.single and not self.tolerance)
        self.sums: list[Tensor] = []  # of every panel
        self.mass = hidden.new_zeros(2, dtype=self.acc)  # dropped, total

    def decide(self, panel: Panel, coef: Tensor) -> None:
        """On the first panel with rows: keep to exact products where skipping does not pay."""
        if self.decided or not coef.numel():
            return
        self.decided = True
        values, sums, targets = panel.values, panel.sums, panel.rows.targets
        if not skipping.pays(values, sums, targets, coef.abs(), self.tolerance, self.most):
            self.tolerance, self.totals = 0.0, Sums(None, None)  # freed before the next are made
            self.totals = self.new_sums(self.single)

    def new_sums(self, single: bool = False) -> Sums:
        """Empty sums for what needs a gradient."""
        weight, bias = self.head.weight, self.head.bias
        return Sums(
            Sum(weight, single, self.head.dtype) if self.needs[1] else None,
            Sum(bias[:, None], single, self.head.dtype)
            if self.needs[2] and bias is not None
            else None,
        )

    def fill(self, chunk: list[tuple[int, int]]) -> Panel:
        """Fill the panel for the rows in `chunk`."""
        rows = self.rows
        if sum(stop - start for start, stop in chunk) < rows.targets.shape[0]:
            rows = rows.ranges(chunk)
        panel = fill_panel(
            self.hidden, rows, self.head, self.backend, self.max_bytes, self.exact, self.buffer
        )
        self.sums.append(panel.sums)
        return panel

    def matmuls(self, panel: Panel, coef: Tensor, sums: Sums) -> tuple[Tensor | None, Tensor]:
        """Add ``E @ (-coef / S * H)`` to `sums`; return ``E^T @ W``, (n, D), if hidden needs it,
        and the ``-coef / S`` (n,) that its rows are still to be multiplied by: 2U.
        """
        factor = -coef / panel.sums
        factors, scale, sizes, dtype = factor, 1.0, row_sizes(panel.h, self.head), panel.h.dtype
        if sizes is not None or coef.device.type == "cpu":  # it synchronizes GPUs: only for fp16
            scale = scale_of(coef, sizes).item()
            factors = row_factors(coef, scale, panel.sums)
        scaled = torch.mul(panel.h, factors[:, None], out=torch.empty_like(panel.h))
        d_rows = self.hidden.new_empty(panel.h.shape, dtype=self.acc) if self.needs[0] else None
        if self.tolerance and coef.numel():
            keep = self.kept_entries(panel, coef)
            self.backend.kept_products(
                panel.values, skipping.BLOCK, keep, self.head.weight, scaled, factors,
                d_rows=d_rows,
                d_weight=None if sums.weight is None else sums.weight.dense(),
                d_bias=None if sums.bias is None else sums.bias.dense()[:, 0],
                scale=scale,
            )  # fmt: skip
        else:
            if d_rows is not None:
                for v0, weight, _ in self.head.panels():
                    part = panel.values[v0 : v0 + weight.shape[0]]
                    matmul_into(d_rows, part.t(), weight, accumulate=v0 > 0)
            if sums.weight is not None:
                sums.weight.add(panel.values, scaled, scale)
            if sums.bias is not None:
                sums.bias.add(panel.values, factors[:, None].to(dtype), scale)
        return d_rows, factor

    def kept_entries(self, panel: Panel, coef: Tensor) -> Tensor:
        """The entries (blocks, V) that matter for a panel; adds to the certificate."""
        keep, *masses = skipping.choose_entries(
            panel.values, panel.sums, panel.rows.targets, coef.abs(), self.tolerance,
            blocks=skipping.split_rows([0, coef.shape[0]]), together=True,
        )  # fmt: skip
        self.mass = self.mass + torch.stack([mass.sum() for mass in masses])
        return keep

    def put_hidden(self, rows: Rows, d_rows: Tensor | None, factor: Tensor) -> None:
        """Write ``factor (n,) * d_rows (n, D)`` to the rows' places in the gradient of hidden."""
        if d_rows is None or self.d_hidden is None:
            return
        same = d_rows.dtype == self.d_hidden.dtype
        out = d_rows if same else torch.empty_like(d_rows, dtype=self.d_hidden.dtype)
        values = torch.mul(d_rows, factor[:, None], out=out)
        if rows.positions is None:
            self.d_hidden.copy_(values)
        else:
            self.d_hidden.index_copy_(0, rows.positions, values)

    def whole_pairs(self, group: Group, pair_loss: PairLoss) -> Tensor:
        """Pairs that fit the panel: fill it, their losses, two matmuls. Returns their table."""
        panel = self.fill(group.chunks[0])
        pairs, coef = pair_loss(group.first, group.last, panel.logps)
        if any(self.needs):
            self.decide(panel, coef)
            self.put_hidden(panel.rows, *self.matmuls(panel, coef, self.totals))
        return pairs

    def long_pair(self, group: Group, pair_loss: PairLoss, chosen_rows: int) -> Tensor:
        """One pair longer than the panel: every side gathers in an accumulator until its `g` is
        known, which takes the log-probs of both.
        """
        sides = (self.new_sums(), self.new_sums())
        parts, at, masses = [], 0, [self.mass]
        for chunk in group.chunks:
            panel = self.fill(chunk)
            self.mass = torch.zeros_like(self.mass)
            d_rows = None
            if any(self.needs):
                ones = torch.ones_like(panel.logps)
                self.decide(panel, ones)
                d_rows, factor = self.matmuls(panel, ones, sides[at >= chosen_rows])
            if d_rows is not None and d_rows.dtype == self.hidden.dtype:
                self.put_hidden(panel.rows, d_rows, factor)  # waits there
                d_rows = None
            elif d_rows is not None:
                d_rows.mul_(factor[:, None])
            parts.append((panel.rows, d_rows, panel.logps, self.mass))
            at += panel.logps.shape[0]
        pairs, coef = pair_loss(group.first, group.last, torch.cat([part[2] for part in parts]))
        at = 0
        for rows, d_rows, logps, mass in parts:
            masses.append(mass * coef[at].abs())
            if d_rows is None and self.d_hidden is not None:
                d_rows = rows.take(self.d_hidden, 0, len(logps))
            self.put_hidden(rows, d_rows, coef[at : at + len(logps)])
            at += len(logps)
        self.mass = torch.stack(masses).sum(0)
        for side, row in zip(sides, (0, chosen_rows), strict=True):
            for total, part in zip(self.totals, side, strict=True):
                if total is not None and part is not None and part.used:
                    total.add_scaled(part.total, coef[row])
        return pairs


def loss_and_grads(
    hidden: Tensor,
    rows: Rows,
    offsets: list[int],
    head: Head,
    backend: Backend,
    pair_loss: PairLoss,
    settings: Settings,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One sweep over all pairs.

    Args:
        hidden: (M, D); rows: the kept ones; offsets: 2B + 1 row offsets of the sequences among the
            kept rows.
        head: output layer. backend: tile arithmetic.
        pair_loss: see `PairLoss`.
        settings: the workspace, which gradients are wanted, and the share of their L1 mass that may
            be skipped.
        exact: take every row's exact log-sum-exp as shift (one more U).

    Returns:
        pairs (B, k); the share of the L1 mass skipped, (); and the gradients: hidden (M, D), weight
        (V, D), bias (V,), None where not needed.
    """
    exact = exact or starts_exact(head.dtype)
    (vocab, width), pairs = head.weight.shape, len(offsets) // 2
    room = capacity(vocab, width, head.dtype.itemsize, settings.max_bytes)
    groups = group_pairs(offsets, room)
    chunks = [chunk for group in groups for chunk in group.chunks]
    sweep = Sweep(hidden, rows, head, backend, chunks, settings, exact)
    tables = []
    for group in groups:
        if len(group.chunks) == 1:
            tables.append(sweep.whole_pairs(group, pair_loss))
        else:
            chosen_rows = offsets[group.last] - offsets[group.first]
            tables.append(sweep.long_pair(group, pair_loss, chosen_rows))
    # one look for the whole sweep: a look at every panel would wait for the GPU each time
    if not exact and rows.targets.shape[0] and overflowed(torch.cat(sweep.sums)):
        del sweep
        return loss_and_grads(hidden, rows, offsets, head, backend, pair_loss, settings, exact=True)
    if not tables:
        tables.append(pair_loss(0, pairs, hidden.new_empty(0, dtype=sweep.acc))[0])
    d_weight, d_bias = (None if x is None else x.dense().to(x.dtype) for x in sweep.totals)
    share = sweep.mass[0] / sweep.mass[1].clamp(min=1e-37)
    d_bias = None if d_bias is None else d_bias[:, 0]
    return torch.cat(tables), share, sweep.d_hidden, d_weight, d_bias
