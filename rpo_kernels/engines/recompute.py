"""Log-probs of tokens, and their gradient by recomputation: 4U exact, for any upstream gradient (design of the engine).

Forward, 1U: the backend walks the vocabulary in tiles and keeps two numbers a row, log-sum-exp and the target's logit.

Backward, 3U, for ``g = d loss / d logp``, one number a row. With ``P`` the softmax,

    dlogits = g * (onehot - P),    dH = dlogits @ W,    dW = dlogits^T @ H.

Walk the vocabulary in panels; recompute ``Q = P - onehot`` of the panel, vocabulary-major; `g` never touches the panel: it
scales rows of ``H`` before, and rows of ``dH`` after the matmuls, which are N x D instead of N x V:

    dW[panel] = Q @ (-g * H)            one matmul over all N rows of a chunk, written once
    dH       += Q^T @ W[panel]          then scaled by -g

`g` is divided by a power of two first (exactly, the one above its largest magnitude), so that fp16 does not underflow and no denormals arise. The target's entry
``p - 1`` is placed as ``expm1(logp)``, accurate where ``p`` is close to 1.

Memory: the panel with its operands within `max_bytes`, and `dH` in float32 (N x D, an accumulator) where hidden is half.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rpo_kernels.engines.matmul import matmul_into, put_targets_
from rpo_kernels.rows import Rows
from rpo_kernels.spec import Head, accumulator_dtype


def forward(
    hidden: Tensor, rows: Rows, head: Head, backend: ModuleType, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """Return ``(logps, lse)``, each (N,), of the kept rows of `hidden` (M, D)."""
    total, width = rows.targets.shape[0], hidden.shape[1]
    logps = hidden.new_empty(total, dtype=accumulator_dtype(head.dtype))
    lse = torch.empty_like(logps)
    size = max(1, max_bytes // (4 * width * head.dtype.itemsize))
    for start, stop in rows.chunks(size):
        h, targets = rows.take(hidden, start, stop).to(head.dtype), rows.targets[start:stop]
        found = picked = None
        for v0, weight, bias in head.panels():
            inside = targets - v0
            inside = torch.where((inside >= 0) & (inside < weight.shape[0]), inside, -1)
            part, logit = backend.lse_and_target(
                h, weight, bias, inside, head.transform, max_bytes // 2
            )
            found = part if found is None else torch.logaddexp(found, part)
            picked = logit if picked is None else picked + logit
        lse[start:stop] = found
        logps[start:stop] = picked - found
    return logps, lse


def _shape(
    total: int, vocab: int, width: int, itemsize: int, max_bytes: int, on_cpu: bool
) -> tuple[int, int]:
    """Rows and vocabulary entries of a panel, so that the panel and its operands fit `max_bytes`.

    A CPU wants panels that stay in its cache; a GPU wants them as large as the budget allows.
    """
    acc = max(4, itemsize)
    per_row = width * (2 * itemsize + acc)  # H chunk, g * H chunk, the product for dH
    n = max(1, min(total, 4096 if on_cpu else 65536, max_bytes // 3 // per_row))
    per_entry = n * (itemsize + (0 if on_cpu else acc)) + width * (itemsize + 2 * acc)
    p = max(1, (max_bytes - n * per_row) // per_entry)
    if on_cpu and itemsize >= 4:
        p = min(p, 1024)
    return n, min(vocab, p)


def backward(
    grad: Tensor,
    logps: Tensor,
    lse: Tensor,
    hidden: Tensor,
    rows: Rows,
    head: Head,
    backend: ModuleType,
    max_bytes: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum(grad * logps)`` for hidden, weight and bias, where `needs` asks for them.

    Args:
        grad, logps, lse: (M,) upstream gradient, and what `forward` found.
        hidden: (M, D); rows: the kept ones, those whose gradient is not 0.
        head: output layer. backend: tile arithmetic. max_bytes: workspace.
        needs: for hidden, weight, bias.
    """
    need_h, need_w, need_b = needs
    (total, width), vocab = (rows.targets.shape[0], hidden.shape[1]), head.weight.shape[0]
    acc_dtype = accumulator_dtype(head.dtype)
    grad, logps, lse = (rows.take(x, 0, total) for x in (grad, logps, lse))
    top = torch.exp2(grad.abs().amax().log2().ceil()) if total else grad.new_ones(())
    unit = -grad / top
    coef = torch.where(unit.abs() < 1e-20, 0, unit)  # for H rows in matmuls: no denormals
    target_entry = torch.expm1(logps) * head.transform.slope(logps + lse)
    n, p = _shape(total, vocab, width, head.dtype.itemsize, max_bytes, hidden.device.type == "cpu")
    d_rows = hidden.new_zeros(total, width, dtype=acc_dtype) if need_h else None
    blank = torch.empty_like if total else torch.zeros_like
    d_weight = blank(head.weight) if need_w else None
    d_bias = blank(head.bias) if need_b else None
    panel_buffer = hidden.new_empty(p * n, dtype=head.dtype)
    chunks = list(rows.chunks(n))
    direct = len(chunks) == 1 and (head.weight.dtype == head.dtype)  # one matmul makes dW[panel]
    dw_buffer = hidden.new_empty(p if need_w and not direct else 0, width, dtype=acc_dtype)
    operands = None
    for v0, weight, bias in head.panels(p) if total else ():
        db = hidden.new_zeros(weight.shape[0], 1, dtype=acc_dtype)
        for start, stop in chunks:
            if operands is None or len(chunks) > 1:
                h = rows.take(hidden, start, stop).to(head.dtype)
                operands = h, (h * coef[start:stop, None]).to(head.dtype) if need_w else None
            h, scaled = operands
            targets = rows.targets[start:stop]
            panel = panel_buffer[: weight.shape[0] * (stop - start)].view(
                weight.shape[0], stop - start
            )
            backend.exp_panel(h, weight, bias, lse[start:stop], targets, v0, head.transform, panel)
            put_targets_(panel, targets, v0, target_entry[start:stop])
            if need_h:
                matmul_into(d_rows[start:stop], panel.t(), weight, accumulate=v0 > 0)
            if need_w:
                dw = d_weight[v0 : v0 + p] if direct else dw_buffer[: weight.shape[0]]
                matmul_into(dw, panel, scaled, accumulate=start > 0)
            if need_b:
                matmul_into(db, panel, coef[start:stop, None].to(head.dtype), accumulate=start > 0)
        if need_w:
            torch.mul(dw, top, out=d_weight[v0 : v0 + p])
        if need_b:
            torch.mul(db[:, 0], top, out=d_bias[v0 : v0 + p])
    d_hidden = None if d_rows is None else rows.put(hidden, d_rows.mul_(-grad[:, None]))
    return d_hidden, d_weight, d_bias
