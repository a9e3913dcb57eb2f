"""The package's PyTorch operators: what `torch.compile`, autograd and autocast see.

    rpo_kernels::linear_logprobs     hidden, weight, targets -> log-probs            (backward: recompute, 3U)
    rpo_kernels::sequence_sums       log-probs -> one sum per sequence               (backward: expand)
    rpo_kernels::preference_loss     hidden, weight, labels -> loss, table of pairs  (backward: recompute, or one product if streamed)

Every operator drops ignored rows, picks the backend and walks panels inside, opaque to the compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rpo_kernels.backends import select
from rpo_kernels.engines import recompute, streaming
from rpo_kernels.losses import total_terms
from rpo_kernels.rows import keep_rows
from rpo_kernels.spec import Head, Transform, accumulator_dtype

ONCE = "second derivatives are not implemented: the gradient of rpo_kernels functions is not itself differentiable"


def _head(
    weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, dtype: torch.dtype
) -> Head:
    return Head(weight, bias, Transform(scale, softcap), dtype)


def _empty_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    inputs = zip((hidden, weight, bias), needs, strict=True)
    return [torch.empty_like(tensor) if need else hidden.new_empty(0) for tensor, need in inputs]


@torch.library.custom_op("rpo_kernels::linear_logprobs", mutates_args=())
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    validate: bool,
    max_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``(logps (M,), lse (M,))`` of `targets` (M,) under ``softmax(transform(hidden (M, D) @ weight (V, D)^T))``; 0 if ignored."""
    module = select(backend, hidden)
    rows, _ = keep_rows(targets, weight.shape[0], ignore_index, validate)
    logps = hidden.new_zeros(targets.shape, dtype=accumulator_dtype(dtype))
    lse = torch.zeros_like(logps)
    if rows.targets.shape[0] == 0:
        return logps, lse
    found = recompute.forward(
        hidden, rows, _head(weight, bias, scale, softcap, dtype), module, max_bytes
    )
    if rows.index is None:
        return found
    return logps.index_copy_(0, rows.index, found[0]), lse.index_copy_(0, rows.index, found[1])


@linear_logprobs.register_fake
def _(
    hidden, weight, targets, bias, ignore_index, scale, softcap, dtype, validate, max_bytes, backend
):
    logps = hidden.new_empty(targets.shape, dtype=accumulator_dtype(dtype))
    return logps, torch.empty_like(logps)


@torch.library.custom_op("rpo_kernels::linear_logprobs_backward", mutates_args=())
def linear_logprobs_backward(
    grad: Tensor,
    logps: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    max_bytes: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden, weight and bias (empty where not needed); rows without upstream gradient cost nothing."""
    masked = torch.where(grad != 0, targets, ignore_index)
    rows, _ = keep_rows(masked, weight.shape[0], ignore_index, validate=False)
    head = _head(weight, bias, scale, softcap, dtype)
    found = recompute.backward(
        grad, logps, lse, hidden, rows, head, select(backend, hidden), max_bytes, tuple(needs)
    )
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


@linear_logprobs_backward.register_fake
def _(
    grad,
    logps,
    lse,
    hidden,
    weight,
    targets,
    bias,
    ignore_index,
    scale,
    softcap,
    dtype,
    max_bytes,
    backend,
    needs,
):
    return tuple(_empty_grads(hidden, weight, bias, needs))


def _save_logprobs(ctx, inputs, output):
    hidden, weight, targets, bias, *rest = inputs
    ctx.rest = rest
    ctx.save_for_backward(*output, hidden, weight, targets, bias)
    ctx.set_materialize_grads(False)


def _grad_logprobs(ctx, grad, grad_lse):
    if grad is None:
        return (None,) * 11
    logps, lse, hidden, weight, targets, bias = ctx.saved_tensors
    ignore_index, scale, softcap, dtype, _, max_bytes, backend = ctx.rest
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    d_hidden, d_weight, d_bias = linear_logprobs_backward(
        grad,
        logps,
        lse,
        hidden,
        weight,
        targets,
        bias,
        ignore_index,
        scale,
        softcap,
        dtype,
        max_bytes,
        backend,
        needs,
    )
    grads = [
        grad if need else None
        for grad, need in zip((d_hidden, d_weight, d_bias), needs, strict=True)
    ]
    return grads[0], grads[1], None, grads[2], *[None] * 7


linear_logprobs.register_autograd(_grad_logprobs, setup_context=_save_logprobs)


@torch.library.custom_op("rpo_kernels::sequence_sums", mutates_args=())
def sequence_sums(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum `logps` (M,) over each of the sequences that `cu_seqlens` (S + 1,) delimits; (S,), in a fixed order."""
    return torch.segment_reduce(logps.double(), "sum", offsets=cu_seqlens.long(), initial=0.0).to(
        logps.dtype
    )


@sequence_sums.register_fake
def _(logps, cu_seqlens):
    return logps.new_empty(cu_seqlens.shape[0] - 1)


def _save_sums(ctx, inputs, output):
    logps, cu_seqlens = inputs
    ctx.rows = logps.shape[0]
    ctx.save_for_backward(cu_seqlens)


def _grad_sums(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return torch.repeat_interleave(grad, cu_seqlens.diff().long(), output_size=ctx.rows), None


sequence_sums.register_autograd(_grad_sums, setup_context=_save_sums)


@torch.library.custom_op("rpo_kernels::preference_loss", mutates_args=())
def preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    loss_type: str,
    beta: float,
    epsilon: float,
    gamma: float,
    sft_weight: float,
    sft_reduction: str,
    num_pairs: float | None,
    num_chosen_tokens: float | None,
    validate: bool,
    max_bytes: int,
    backend: str,
    strategy: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``terms (2,)`` (preference, SFT), ``pairs (B, 6)``, and three tensors for backward.

    These are the gradients for hidden, weight and bias (empty where not needed) if streamed, and ``logps``, ``lse`` and
    ``d loss / d logps``, each (M,), to recompute from otherwise.
    """
    module = select(backend, hidden)
    rows, offsets = keep_rows(labels, weight.shape[0], ignore_index, validate, cu_seqlens)
    count = len(offsets) // 2
    norms = (float(num_pairs or max(count, 1)), float(num_chosen_tokens or max(offsets[count], 1)))
    head = _head(weight, bias, scale, softcap, dtype)

    def settle(first: int, last: int, logps: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [x - offsets[first] for x in offsets[first : last + 1]]
        rejected = [
            x - offsets[count + first] + chosen[-1]
            for x in offsets[count + first + 1 : count + last + 1]
        ]
        refs = (
            None
            if ref_logps is None
            else torch.cat([ref_logps[first:last], ref_logps[count + first : count + last]])
        )
        return module.tail(
            logps,
            labels.new_tensor(chosen + rejected),
            refs,
            loss_type,
            beta,
            epsilon,
            gamma,
            sft_weight,
            sft_reduction,
            *norms,
        )

    if strategy == "stream":
        pairs, *grads = streaming.loss_and_grads(
            hidden, rows, offsets, head, module, settle, max_bytes, tuple(needs)
        )
        saved = [hidden.new_empty(0) if grad is None else grad for grad in grads]
    else:
        found = recompute.forward(hidden, rows, head, module, max_bytes)
        pairs, coef = settle(0, count, found[0])
        saved = [*found, coef]
        if rows.index is not None:
            saved = [x.new_zeros(labels.shape).index_copy_(0, rows.index, x) for x in saved]
    terms = total_terms(pairs, sft_reduction, *norms)
    return terms[0] + sft_weight * terms[1], terms, pairs, *saved


@preference_loss.register_fake
def _(
    hidden, weight, labels, cu_seqlens, ref_logps, bias, ignore_index, scale, softcap, dtype, *rest
):
    *_, strategy, needs = rest
    pairs = hidden.new_empty((cu_seqlens.shape[0] - 1) // 2, 6, dtype=accumulator_dtype(dtype))
    if strategy == "stream":
        saved = _empty_grads(hidden, weight, bias, needs)
    else:
        saved = [pairs.new_empty(labels.shape) for _ in range(3)]
    return pairs.new_empty(()), pairs.new_empty(2), pairs, *saved


def _save_loss(ctx, inputs, output):
    hidden, weight, labels, _, _, bias, ignore_index, scale, softcap, dtype, *rest = inputs
    *_, max_bytes, backend, strategy, needs = rest
    ctx.stream, ctx.needs = strategy == "stream", needs
    ctx.rest = (ignore_index, scale, softcap, dtype, max_bytes, backend)
    ctx.save_for_backward(*output[3:], *(() if ctx.stream else (hidden, weight, labels, bias)))
    ctx.set_materialize_grads(False)


def _grad_loss(ctx, grad, *others):
    if any(other is not None for other in others):
        raise RuntimeError(ONCE)
    if grad is None:
        return (None,) * 23
    if ctx.stream:
        grads = [
            x * grad if need else None for x, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
    else:
        logps, lse, coef, hidden, weight, labels, bias = ctx.saved_tensors
        found = linear_logprobs_backward(
            coef * grad, logps, lse, hidden, weight, labels, bias, *ctx.rest, ctx.needs
        )
        grads = [x if need else None for x, need in zip(found, ctx.needs, strict=True)]
    return grads[0], grads[1], None, None, None, grads[2], *[None] * 17


preference_loss.register_autograd(_grad_loss, setup_context=_save_loss)
