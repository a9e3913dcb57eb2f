"""Preference loss and its gradient in one sweep: 3U exact, 2U with a frozen head (gradient in forward).

The loss depends on *sequence* log-probs, so ``d loss / d logp`` is one number per sequence. A chunk of rows therefore needs
its logits once. For a chunk of n rows, vocabulary-major,

    E[v, i]  = exp(z[v, i] - c_i)                 while the logits are in cache; c_i a cheap guess of the largest logit
    S_i      = sum_v E[v, i],   logp_i = z[t_i, i] - c_i - log S_i
    E[t_i,i] = S_i * expm1(logp_i)                now E = S * (P - onehot), never normalized elementwise
    dH_i     = -(g_i / S_i) * (E^T @ W)_i         1U
    dW       = E @ (-(g / S) * H)                 1U

and `g` is known as soon as the chunk that completes a pair is filled. So pairs are grouped into chunks as large as the
workspace holds. Only a pair longer than that is split; then the chunks before its last leave ``A = E @ (H / S)`` in one
float32 accumulator per side, (V, D) each, which `g` scales later.

``c`` is the log-sum-exp over the first `PROBE` vocabulary entries. A row whose largest logit lies more than about 60 above it
would overflow: that is detected, and the sweep repeated with the exact log-sum-exp of every row (4U). fp16 starts there,
because its exponents are too short for anything but probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels.engines.matmul import matmul_into, put_targets_
from rpo_kernels.rows import Rows
from rpo_kernels.spec import Head, accumulator_dtype

PROBE = 512  # vocabulary entries that the guess of the largest logit looks at
MAX_SUM = 2.0**86  # of exp(z - c): beyond, the guess was too low
Settle = Callable[[int, int, Tensor], tuple[Tensor, Tensor]]


class Group(NamedTuple):
    """Pairs `first` to `last` and the row ranges, chunk by chunk, that cover them."""

    first: int
    last: int
    chunks: list[list[tuple[int, int]]]


def capacity(vocab: int, width: int, itemsize: int, max_bytes: int) -> int:
    """Rows of a chunk whose panel over the whole vocabulary, with its operands, fits `max_bytes`; may be 0."""
    slack = min(max_bytes // 4, 2**24)  # cache tiles of the backend
    return (max_bytes - slack) // (vocab * itemsize + width * (2 * itemsize + 16) + 64)


def group_pairs(offsets: list[int], size: int) -> list[Group]:
    """Cut the pairs into groups of at most `size` rows; a longer pair is split into chunks, chosen rows first."""
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


class _Sum:
    """A parameter's gradient as a sum of products: float32 while several are added, the parameter's own dtype for one."""

    def __init__(self, like: Tensor, products: int, dtype: torch.dtype):
        self.dtype, self.used = like.dtype, False
        self.total = torch.empty_like(
            like, dtype=like.dtype if products == 1 else accumulator_dtype(dtype)
        )

    def add(self, a: Tensor, b: Tensor, scale: float) -> None:
        matmul_into(self.total, a, b, accumulate=self.used, scale=scale)
        self.used = True

    def add_scaled(self, tensor: Tensor, factor: Tensor) -> None:
        torch.mul(tensor, factor, out=self.total) if not self.used else self.total.addcmul_(
            tensor, factor
        )
        self.used = True

    def result(self) -> Tensor:
        return self.total.to(self.dtype) if self.used else self.total.zero_().to(self.dtype)


class _Chunk(NamedTuple):
    """Rows in flight: their `rows` and `h` (n, D), ``panel (V, n) = S * (P - onehot) * dz/dx``, `logps` and `sums` S, (n,)."""

    rows: Rows
    h: Tensor
    panel: Tensor
    logps: Tensor
    sums: Tensor


class Sweep:
    """The state of one call: inputs, the panel buffer, and the gradients as they grow."""

    def __init__(
        self,
        hidden: Tensor,
        rows: Rows,
        head: Head,
        backend: ModuleType,
        max_bytes: int,
        needs,
        groups,
    ):
        self.hidden, self.rows, self.head, self.backend, self.max_bytes = (
            hidden,
            rows,
            head,
            backend,
            max_bytes,
        )
        vocab, dtype = head.weight.shape[0], head.dtype
        chunks = [chunk for group in groups for chunk in group.chunks]
        longest = max((sum(stop - start for start, stop in chunk) for chunk in chunks), default=0)
        self.acc = accumulator_dtype(dtype)
        self.buffer = hidden.new_empty(vocab * longest, dtype=dtype)
        self.d_hidden = torch.zeros_like(hidden) if needs[0] else None
        self.d_weight = _Sum(head.weight, len(chunks), dtype) if needs[1] else None
        self.d_bias = _Sum(head.bias[:, None], len(chunks), dtype) if needs[2] else None
        self.worst = hidden.new_zeros((), dtype=self.acc)

    def fill(self, chunk: list[tuple[int, int]], exact: bool) -> _Chunk:
        """Logits, log-probs and the panel of the rows in `chunk`: 1U (2U if `exact`)."""
        head, backend = self.head, self.backend
        whole = sum(stop - start for start, stop in chunk) == self.rows.targets.shape[0]
        device = self.hidden.device
        rows = self.rows
        if not whole:
            rows = rows.subset(
                torch.cat([torch.arange(start, stop, device=device) for start, stop in chunk])
            )
        n = rows.targets.shape[0]
        h = rows.take(self.hidden, 0, n).to(head.dtype)
        panel = (
            self.buffer[: head.weight.shape[0] * n].view(-1, n)
            if n
            else self.buffer.view(head.weight.shape[0], 0)
        )
        none, shift = torch.full_like(rows.targets, -1), None
        for _, weight, bias in head.panels() if exact else [next(head.panels(PROBE))]:
            part, _ = backend.lse_and_target(
                h, weight, bias, none, head.transform, self.max_bytes // 8
            )
            shift = part if shift is None else torch.logaddexp(shift, part)
        sums, picked = torch.zeros_like(shift), torch.zeros_like(shift)
        for v0, weight, bias in head.panels():
            part = panel[v0 : v0 + weight.shape[0]]
            backend.exp_panel(
                h, weight, bias, shift, rows.targets, v0, head.transform, part, sums, picked
            )
        logps = picked - shift - sums.log()
        put_targets_(
            panel, rows.targets, 0, sums * torch.expm1(logps) * head.transform.slope(picked)
        )
        self.worst = torch.maximum(self.worst, sums.amax()) if n else self.worst
        return _Chunk(rows, h, panel, logps, sums)

    def hidden_rows(self, chunk: _Chunk) -> Tensor:
        """``((P - onehot) * dz/dx)^T @ W``, (n, D), not yet multiplied by ``-d loss / d logp``: 1U."""
        out = self.hidden.new_empty(chunk.h.shape, dtype=self.acc)
        for v0, weight, _ in self.head.panels():
            matmul_into(out, chunk.panel[v0 : v0 + weight.shape[0]].t(), weight, accumulate=v0 > 0)
        return out.div_(chunk.sums[:, None])

    def put_hidden(self, rows: Rows, values: Tensor) -> None:
        """Write ``values (n, D)`` to the rows' places in the gradient of hidden."""
        if rows.index is None:
            self.d_hidden.copy_(values)
        else:
            self.d_hidden.index_copy_(0, rows.index, values.to(self.d_hidden.dtype))

    def add_weight(
        self, chunk: _Chunk, coef: Tensor, weight: _Sum | None, bias: _Sum | None
    ) -> None:
        """Add ``panel @ (-coef / S * H)`` to a sum for the weight, and the same without H to one for the bias: 1U."""
        scale = 1.0
        if (
            coef.device.type == "cpu" and coef.numel()
        ):  # an exact power of two; on a GPU reading it would synchronize
            scale = 2.0 ** math.frexp(max(coef.abs().amax().item(), 1e-300))[1]
        unit = -coef / scale
        unit = torch.where(unit.abs() < 1e-20, 0, unit) / chunk.sums
        if weight is not None:
            weight.add(chunk.panel, (chunk.h * unit[:, None]).to(chunk.h.dtype), scale)
        if bias is not None:
            bias.add(chunk.panel, unit[:, None].to(chunk.h.dtype), scale)

    def whole(self, group: Group, settle: Settle, exact: bool) -> Tensor:
        """Pairs that fit the panel: fill, settle, two matmuls. Returns the group's table of pairs."""
        chunk = self.fill(group.chunks[0], exact)
        pairs, coef = settle(group.first, group.last, chunk.logps)
        if self.d_hidden is not None:
            self.put_hidden(chunk.rows, self.hidden_rows(chunk).mul_(-coef[:, None]))
        self.add_weight(chunk, coef, self.d_weight, self.d_bias)
        return pairs

    def split(self, group: Group, settle: Settle, exact: bool, chosen_rows: int) -> Tensor:
        """One pair longer than the panel: chunks before the last go to one float32 accumulator per side."""
        like_w, like_b = self.head.weight, self.head.bias
        sides = []
        for _ in range(2):
            sides.append(
                (
                    None
                    if self.d_weight is None
                    else _Sum(torch.empty_like(like_w, dtype=self.acc), 2, self.acc),
                    None
                    if self.d_bias is None
                    else _Sum(torch.empty_like(like_b[:, None], dtype=self.acc), 2, self.acc),
                )
            )
        done, kept, at = [], [], 0
        for chunk_range in group.chunks:
            chunk = self.fill(chunk_range, exact)
            d_rows = None if self.d_hidden is None else self.hidden_rows(chunk)
            done.append((chunk.rows, d_rows, chunk.logps))
            if chunk_range is not group.chunks[-1]:
                side = sides[0 if at < chosen_rows else 1]
                self.add_weight(chunk, torch.ones_like(chunk.logps), *side)
            kept.append(at)
            at += chunk.logps.shape[0]
        pairs, coef = settle(group.first, group.last, torch.cat([logps for _, _, logps in done]))
        for (rows, d_rows, logps), at in zip(done, kept, strict=True):
            if d_rows is not None:
                self.put_hidden(rows, d_rows.mul_(-coef[at : at + logps.shape[0], None]))
        self.add_weight(chunk, coef[kept[-1] :], self.d_weight, self.d_bias)
        for (weight, bias), row in zip(sides, (0, chosen_rows), strict=True):
            if weight is not None and weight.used:
                self.d_weight.add_scaled(weight.total, coef[row])
            if bias is not None and bias.used:
                self.d_bias.add_scaled(bias.total, coef[row])
        return pairs


def loss_and_grads(
    hidden: Tensor,
    rows: Rows,
    offsets: list[int],
    head: Head,
    backend: ModuleType,
    settle: Settle,
    max_bytes: int,
    needs: tuple[bool, bool, bool],
    exact: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One sweep over all pairs.

    Args:
        hidden: (M, D); rows: the kept ones; offsets: 2B + 1 row offsets of the sequences among the kept rows.
        head: output layer. backend: tile arithmetic.
        settle: ``(first, last, logps (n,)) -> (pairs (last - first, k), coef (n,))``: the loss of pairs `first` to `last` from
            the log-probs of their rows (chosen rows, then rejected), and ``d loss / d logp`` of each of these rows.
        max_bytes: workspace. needs: gradients wanted for hidden, weight, bias.
        exact: take every row's exact log-sum-exp as shift (one more U).

    Returns:
        pairs (B, k), and the gradients: hidden (M, D), weight (V, D), bias (V,), None where not needed.
    """
    exact = exact or head.dtype == torch.float16
    (vocab, width), pairs = head.weight.shape, len(offsets) // 2
    groups = group_pairs(offsets, capacity(vocab, width, head.dtype.itemsize, max_bytes))
    sweep = Sweep(hidden, rows, head, backend, max_bytes, needs, groups)
    tables = []
    for group in groups:
        if len(group.chunks) == 1:
            tables.append(sweep.whole(group, settle, exact))
        else:
            chosen_rows = offsets[group.last] - offsets[group.first]
            tables.append(sweep.split(group, settle, exact, chosen_rows))
    if not exact and rows.targets.shape[0] and not bool(sweep.worst <= MAX_SUM):
        del sweep
        return loss_and_grads(
            hidden, rows, offsets, head, backend, settle, max_bytes, needs, exact=True
        )
    table = (
        torch.cat(tables)
        if tables
        else settle(0, pairs, rows.targets.new_empty(0, dtype=sweep.acc))[0]
    )
    d_weight = None if sweep.d_weight is None else sweep.d_weight.result()
    d_bias = None if sweep.d_bias is None else sweep.d_bias.result()[:, 0]
    return table, sweep.d_hidden, d_weight, d_bias
