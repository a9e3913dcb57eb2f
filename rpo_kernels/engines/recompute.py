"""Log-probs of tokens, and their gradient by recomputation: 4U exact, for any upstream gradient.

Forward, 1U: the backend walks the vocabulary in tiles and keeps three numbers a row, the pair
``(c, S)`` of its log-sum-exp (see `panel`) and the target's logit.

Backward, 3U, for ``g = d loss / d logp``, one number a row. With ``P`` the softmax,

    dlogits = g * (onehot - P),    dH = dlogits @ W,    dW = dlogits^T @ H.

Walk the vocabulary in panels; recompute ``E = S * (P - onehot)`` of the panel, vocabulary-major,
with ``c`` so close to the log-sum-exp that S only holds its rounding; `g` and `S` never touch the
panel: they scale rows of ``H`` before, and rows of ``dH`` after the matmuls, which are N x D and
not N x V:

    dW[panel] = E @ (-g / S * H)        one matmul over all N rows of a chunk, written once
    dH       += E^T @ W[panel]          then scaled by -g / S

`g` is divided by a power of two first (exactly, the one above its largest magnitude), so that fp16
does not underflow and no denormals arise. The target's entry ``p - 1`` is placed as
``expm1(logp)``, accurate where ``p`` is close to 1.

Memory: the panel with its operands within `max_bytes`, and `dH` in float32 (N x D, an accumulator)
where hidden is half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_kernels.backends import Backend
from rpo_kernels.engines import skipping
from rpo_kernels.engines.panel import (
    ALIGN,
    capacity,
    empty_sum,
    fill_panel,
    matmul_into,
    merge,
    normalized,
    overflowed,
    slack,
    starts_exact,
    stride,
    with_exact_targets,
)
from rpo_kernels.engines.terms import Saved, terms_of
from rpo_kernels.rows import Rows, send
from rpo_kernels.spec import ACCUMULATOR, LN2, Head, gathered_rows

# rows at most of the panel that tells whether skipping pays: spent in vain where it does not
DECIDING = skipping.BLOCK * 3 // 2


def forward(
    hidden: Tensor, rows: Rows, head: Head, backend: Backend, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Return ``logps (N,)`` and ``norm (N, 2)``, the columns c and S, of the kept rows of `hidden`
    (M, D).
    """
    total, width = rows.targets.shape[0], hidden.shape[1]
    logps = hidden.new_empty(total, dtype=ACCUMULATOR[head.dtype])
    norm = logps.new_empty(total, 2)
    # a quarter of the workspace for the rows' copy, half for the backend's tiles, casts in the rest
    size = max(1, max_bytes // (4 * width * head.dtype.itemsize))
    for start, stop in rows.chunks(size):
        h, targets = rows.take(hidden, start, stop).to(head.dtype), rows.targets[start:stop]
        found, target = empty_sum(logps[start:stop]), torch.zeros_like(logps[start:stop])
        for v0, weight, bias in head.panels():
            local = targets - v0
            inside = (local >= 0) & (local < weight.shape[0])
            shift, sums, y = backend.lse_and_target(
                h, weight, bias, local, head.transform, max_bytes // 2
            )
            # every panel has a shift of its own: bring both to the larger one
            before, found = found, merge(found, (shift, sums))
            target = torch.where(inside, y + (shift - found[0]), target + (before[0] - found[0]))
        sums, target = with_exact_targets(h, targets, head, backend, *found, target, max_bytes // 2)
        logps[start:stop] = (target - sums.log2()) * LN2
        norm[start:stop] = torch.stack(normalized(found[0], sums), 1)
    return logps, norm


def forward_skipping(
    hidden: Tensor,
    rows: Rows,
    head: Head,
    backend: Backend,
    max_bytes: int,
    tolerance: float,
    edges: list[int],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As `forward`, and choose what `backward_skipping` may leave out: at most `tolerance` of every
    block's L1 mass. Where the first panel says that this does not pay, the rest is `forward`.

    Args:
        edges: row numbers (0 to N) that no block crosses: where `g` changes, if that is known.

    Returns:
        ``logps (N,)``, ``norm (N, 2)``, ``keep (blocks, V)`` bool, and ``mass (2, blocks)``:
        dropped and total; these two None where skipping does not pay.
    """
    total, (vocab, width) = rows.targets.shape[0], head.weight.shape
    most = skipping.break_even(head.weight, head.dtype, total, [True, True])
    if most <= 0:
        return *forward(hidden, rows, head, backend, max_bytes), None, None
    room = max(1, capacity(vocab, width, head.dtype.itemsize, max_bytes))
    blocks = skipping.split_rows(edges)
    logps = hidden.new_empty(total, dtype=ACCUMULATOR[head.dtype])
    norm = logps.new_empty(total, 2)
    keep = torch.empty(len(blocks), vocab, dtype=torch.bool, device=hidden.device)
    mass = logps.new_empty(2, len(blocks))
    size = min(room, total)
    together = max(1, size // (skipping.BLOCK // 2))  # 20 bytes an entry and block are taken
    buffer = hidden.new_empty(vocab * stride(size, hidden.device), dtype=head.dtype)
    first = 0
    while first < len(blocks):
        start, last = blocks[first][0], first + 1
        stop, most_rows = min(first + together, len(blocks)), size if first else min(size, DECIDING)
        while last < stop and blocks[last][1] - start <= most_rows:
            last += 1
        stop = blocks[last - 1][1]
        part = rows.subset(torch.arange(start, stop, device=hidden.device))
        exact = starts_exact(head.dtype)
        panel = fill_panel(hidden, part, head, backend, max_bytes, exact, buffer)
        if not exact and overflowed(panel.sums):
            panel = fill_panel(hidden, part, head, backend, max_bytes, True, buffer)
        local = [(a - start, b - start) for a, b in blocks[first:last]]
        ones = torch.ones_like(panel.sums)
        logps[start:stop] = panel.logps
        norm[start:stop] = torch.stack(normalized(panel.shift, panel.sums), 1)
        given = panel.values, panel.sums, part.targets, ones, tolerance
        if first == 0 and not skipping.pays(*given, most):
            del panel, buffer
            rest = rows.subset(torch.arange(stop, total, device=hidden.device))
            logps[stop:], norm[stop:] = forward(hidden, rest, head, backend, max_bytes)
            return logps, norm, None, None
        keep[first:last], *found = skipping.choose_entries(
            panel.values, panel.sums, part.targets, ones, tolerance, local, together=False
        )
        mass[:, first:last] = torch.stack(found)
        first = last
    return logps, norm, keep, mass


def skipped_share(coef: Tensor, offsets: list[int], mass: Tensor | None) -> Tensor:
    """The certificate (): share of the loss gradient's L1 mass that `forward_skipping` leaves out.

    Args:
        coef: (N,) d loss / d logps, constant on every sequence. offsets: the sequences' rows. mass:
            (2, blocks) or None.
    """
    if mass is None:
        return coef.new_zeros(())
    firsts = send([start for start, _ in skipping.split_rows(offsets)], coef.device)
    dropped, total = (mass * coef[firsts].abs()).sum(1)
    return dropped / total.clamp(min=1e-37)


def _shape(
    total: int, vocab: int, width: int, itemsize: int, max_bytes: int, on_cpu: bool
) -> tuple[int, int]:
    """Rows and vocabulary entries of a panel, so that the panel and its operands fit `max_bytes`.

    A CPU wants panels that stay in its cache, and in half precision larger ones, because each
    product is rounded; a GPU wants them as large as the budget allows, and aligned.
    """
    acc, max_bytes = max(4, itemsize), max_bytes - slack(max_bytes)
    per_row = width * (2 * itemsize + acc)  # H chunk, g * H chunk, the product for dH
    n = _aligned(max(1, min(4096 if on_cpu else 65536, max_bytes // 3 // per_row)), total, on_cpu)
    columns = n if on_cpu else -(-n // ALIGN) * ALIGN
    per_entry = columns * (itemsize + (0 if on_cpu else acc)) + width * (itemsize + 2 * acc)
    p = max(1, (max_bytes - n * per_row) // per_entry)
    if on_cpu:
        p = min(p, 1024 if itemsize >= 4 else 8192)
    return n, _aligned(p, vocab, on_cpu)


def _aligned(size: int, whole: int, on_cpu: bool) -> int:
    """At most `size`, so that every part of `whole` begins at a multiple of `ALIGN`: on GPUs."""
    if size >= whole:
        return max(whole, 1)
    return size if on_cpu or size < ALIGN else size // ALIGN * ALIGN


def backward(
    saved: Saved,
    hidden: Tensor,
    rows: Rows,
    head: Head,
    backend: Backend,
    needs: list[bool],
    max_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum(grad * logps)`` for hidden, weight and bias, where `needs` asks for them.

    Args:
        saved: upstream gradient, and what `forward` found.
        hidden: (M, D); rows: the kept ones, those whose gradient is not 0.
        head: output layer. backend: tile arithmetic.
        needs: for hidden, weight, bias.
        max_bytes: workspace.
    """
    need_h, need_w, need_b = needs
    (total, width), vocab = (rows.targets.shape[0], hidden.shape[1]), head.weight.shape[0]
    acc_dtype = ACCUMULATOR[head.dtype]
    terms = terms_of(saved, hidden, rows, head)
    n, p = _shape(total, vocab, width, head.dtype.itemsize, max_bytes, hidden.device.type == "cpu")
    d_rows = rows.accumulator(hidden, acc_dtype) if need_h else None
    blank = torch.empty_like if total else torch.zeros_like
    d_weight = blank(head.weight) if need_w else None
    d_bias = blank(head.bias) if need_b and head.bias is not None else None
    panel_buffer = hidden.new_empty(p * stride(n, hidden.device), dtype=head.dtype)
    chunks = list(rows.chunks(n))
    direct = len(chunks) == 1 and (head.weight.dtype == head.dtype)  # one matmul makes dW[panel]
    dw_buffer = hidden.new_empty(p if need_w and not direct else 0, width, dtype=acc_dtype)
    for v0, weight, bias in head.panels(p) if total else ():
        size = weight.shape[0]
        db = hidden.new_zeros(size, 1, dtype=acc_dtype)
        for start, stop in chunks:
            if v0 == 0 or len(chunks) > 1:  # a single chunk serves all panels
                h = rows.take(hidden, start, stop)
                chunk = terms.chunk(h, slice(start, stop), head.dtype)
            step = stride(stop - start, hidden.device)
            out = panel_buffer[: size * step].view(size, step)[:, : stop - start]
            panel = chunk.panel(
                out, v0, weight, bias, head.transform, backend, max_bytes=slack(max_bytes)
            )
            if d_rows is not None:
                matmul_into(d_rows[start:stop], panel.t(), weight, accumulate=v0 > 0)
            if d_weight is not None:
                dw = d_weight[v0 : v0 + p] if direct else dw_buffer[:size]
                matmul_into(dw, panel, chunk.scaled, accumulate=start > 0)
            if d_bias is not None:
                matmul_into(db, panel, chunk.coef[:, None], accumulate=start > 0)
        if d_weight is not None:
            torch.mul(dw, terms.scale, out=d_weight[v0 : v0 + p])
        if d_bias is not None:
            torch.mul(db[:, 0], terms.scale, out=d_bias[v0 : v0 + p])
    if d_rows is None:
        return None, d_weight, d_bias
    d_rows[:total].mul_(terms.factor[:, None])
    return rows.put(hidden, d_rows), d_weight, d_bias


def backward_skipping(
    saved: Saved,
    hidden: Tensor,
    rows: Rows,
    head: Head,
    backend: Backend,
    needs: list[bool],
    edges: list[int],
    keep: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `backward`, on the vocabulary entries that `keep` (blocks, V) keeps, a share s: 3 s U.

    `rows` are all kept rows; `edges` as in `forward_skipping`. Rows whose gradient is 0 are dropped
    block by block. Here blocks are walked first and the vocabulary within them, the other way round
    than in `backward`: each block gathers entries of its own.
    """
    need_h, need_w, need_b = needs
    acc = ACCUMULATOR[head.dtype]
    size = gathered_rows(hidden.shape[1], head.dtype.itemsize)
    terms = terms_of(saved, hidden, rows, head)
    d_rows = rows.accumulator(hidden, acc) if need_h else None
    d_weight = torch.zeros_like(head.weight, dtype=acc) if need_w else None
    d_bias = torch.zeros_like(head.weight[:, 0], dtype=acc) if need_b else None
    for block, (start, stop) in enumerate(skipping.split_rows(edges)):
        used = start + terms.factor[start:stop].nonzero()[:, 0]
        if used.shape[0] == 0:
            continue
        index = keep[block].nonzero()[:, 0]
        h = rows.subset(used).take(hidden, 0, used.shape[0])
        chunk = terms.chunk(h, used, head.dtype)
        chunk = chunk._replace(targets=torch.searchsorted(index, chunk.targets))  # among the kept
        d_part = hidden.new_zeros(h.shape, dtype=acc)
        for v0 in range(0, index.shape[0], size):
            chosen = index[v0 : v0 + size]
            weight = head.weight.index_select(0, chosen).to(head.dtype)
            bias = None if head.bias is None else head.bias[chosen]
            step = stride(h.shape[0], h.device)
            out = weight.new_empty(chosen.shape[0], step)[:, : h.shape[0]]
            panel = chunk.panel(out, v0, weight, bias, head.transform, backend)
            if d_rows is not None:
                matmul_into(d_part, panel.t(), weight, accumulate=True)
            if d_weight is not None:
                d_weight.index_add_(0, chosen, torch.mm(panel, chunk.scaled).to(acc))
            if d_bias is not None:
                d_bias.index_add_(0, chosen, torch.mv(panel, chunk.coef).to(acc))
        if d_rows is not None:
            d_rows[used] = d_part.mul_(terms.factor[used, None])
    return (
        None if d_rows is None else rows.put(hidden, d_rows),
        None if d_weight is None else d_weight.mul_(terms.scale).to(head.weight.dtype),
        None if d_bias is None else d_bias.mul_(terms.scale).to(head.weight.dtype),
    )
