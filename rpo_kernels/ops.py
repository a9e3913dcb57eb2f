"""The package's PyTorch operators: what `torch.compile`, autograd and autocast see.

    linear_logprobs    hidden, weight, targets -> log-probs             backward: recompute
    sequence_sums      log-probs -> one sum per sequence                backward: expand
    preference_loss    hidden, weight, labels -> loss, table of pairs   backward: recompute, or
                                                                        scale in place if streamed

Every operator drops ignored rows, picks the backend and walks panels inside, opaque to the
compiler.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rpo_kernels.backends import choose_backend
from rpo_kernels.engines import recompute, streaming
from rpo_kernels.engines.skipping import BLOCK
from rpo_kernels.losses import total_terms
from rpo_kernels.rows import check_offsets, keep_rows
from rpo_kernels.spec import Head, Transform, accumulator_dtype

ONCE = (
    "second derivatives are not implemented: the gradient of rpo_kernels functions is not itself "
    "differentiable"
)


def no_autocast(function):
    """Run an operator's body outside autocast, which would cast whole operands of its matmuls."""

    @functools.wraps(function)
    def inner(*args, **kwargs):
        device = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return inner


def times(grads: Sequence[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """``factor ()`` times every gradient that a backward pass saved, in place where that pass is
    the graph's last (`retain_graph` is False) and neither traced nor batched: a second copy of dW
    costs time and memory.
    """
    plain = type(factor) is Tensor and "Batched" not in str(torch._C._dispatch_keys(factor))
    last = plain and not torch._C._autograd._get_current_graph_task_keep_graph()
    return [x if x is None else x.mul_(factor) if last else x * factor for x in grads]


def kept_shape(rows: int, sequences: int, vocab: int, tolerance: float) -> tuple[int, int]:
    """Shape of the mask that `recompute.forward_skipping` leaves for backward; room for any rows
    kept.
    """
    return (rows // BLOCK + sequences + 1, vocab) if tolerance else (0, vocab)


def _empty_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    inputs = zip((hidden, weight, bias), needs, strict=True)
    return [
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for x, need in inputs
    ]


def _log_probs(hidden, rows, offsets, head, module, max_bytes, tolerance, sequences):
    """Forward of the recompute engine: ``logps (N,)``, ``norm (N, 2)``, the mask of kept entries,
    masses.
    """
    total, vocab = hidden.shape[0], head.weight.shape[0]
    keep = hidden.new_zeros(kept_shape(total, sequences, vocab, tolerance), dtype=torch.bool)
    if not tolerance:
        return *recompute.forward(hidden, rows, head, module, max_bytes), keep, None
    *found, kept, mass = recompute.forward_skipping(
        hidden, rows, head, module, max_bytes, tolerance, offsets
    )
    keep[: kept.shape[0]] = kept
    return *found, keep, mass


@torch.library.custom_op("rpo_kernels::linear_logprobs", mutates_args=())
@no_autocast
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
    tolerance: float,
    max_bytes: int,
    backend: str,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of `targets` (M,) under ``softmax(transform(hidden (M, D) @ weight (V, D)^T))``.

    Returns ``logps (M,)`` and ``norm (M, 2)`` (see `recompute`), both 0 where ignored, and the
    vocabulary entries that backward keeps, chosen per sequence of `cu_seqlens` (S + 1,) if given.
    """
    module = choose_backend(backend, hidden)
    rows, offsets = keep_rows(targets, weight.shape[0], ignore_index, validate, cu_seqlens)
    head = Head(weight, bias, Transform(scale, softcap), dtype, max_bytes // 8)
    logps, norm, keep, _ = _log_probs(
        hidden, rows, offsets, head, module, max_bytes, tolerance, len(offsets) - 1
    )
    return rows.spread(logps, targets.shape[0]), rows.spread(norm, targets.shape[0]), keep


@linear_logprobs.register_fake
def _(
    hidden, weight, targets, bias, ignore_index, scale, softcap, dtype, validate, tolerance,
    max_bytes, backend, cu_seqlens=None,
):  # fmt: skip
    logps = hidden.new_empty(targets.shape, dtype=accumulator_dtype(dtype))
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = kept_shape(hidden.shape[0], sequences, weight.shape[0], tolerance)
    norm = logps.new_empty(*targets.shape, 2)
    return logps, norm, hidden.new_empty(shape, dtype=torch.bool)


@torch.library.custom_op("rpo_kernels::linear_logprobs_backward", mutates_args=())
@no_autocast
def linear_logprobs_backward(
    grad: Tensor,
    logps: Tensor,
    norm: Tensor,
    keep: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    tolerance: float,
    max_bytes: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden, weight and bias (empty where not needed); rows without gradient cost
    nothing.
    """
    module = choose_backend(backend, hidden)
    head = Head(weight, bias, Transform(scale, softcap), dtype, max_bytes // 8)
    wanted = (needs[0], needs[1], needs[2])
    if tolerance:
        rows, offsets = keep_rows(targets, weight.shape[0], ignore_index, False, cu_seqlens)
        found = recompute.backward_skipping(
            grad, logps, norm, hidden, rows, head, module, wanted, offsets, keep
        )
    else:
        masked = torch.where(grad != 0, targets, ignore_index)
        rows, _ = keep_rows(masked, weight.shape[0], ignore_index, validate=False)
        found = recompute.backward(grad, logps, norm, hidden, rows, head, module, max_bytes, wanted)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) if x is None else x for x in found)
    return d_hidden, d_weight, d_bias


@linear_logprobs_backward.register_fake
def _(grad, logps, norm, keep, hidden, weight, targets, bias, *rest):
    return tuple(_empty_grads(hidden, weight, bias, rest[-1]))


def _save_logprobs(ctx, inputs, output):
    hidden, weight, targets, bias, ignore_index, scale, softcap, dtype, _, *rest, ends = inputs
    ctx.rest = (ignore_index, scale, softcap, dtype, *rest)
    ctx.save_for_backward(*output, hidden, weight, targets, bias, ends)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad_logprobs(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(ONCE)
    if grad is None:
        return (None,) * 13
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
    found = linear_logprobs_backward(grad, *ctx.saved_tensors, *ctx.rest, needs)
    grads = [x if need else None for x, need in zip(found, needs, strict=True)]
    return grads[0], grads[1], None, grads[2], *[None] * 9


linear_logprobs.register_autograd(_grad_logprobs, setup_context=_save_logprobs)


@torch.library.custom_op("rpo_kernels::sequence_sums", mutates_args=())
def sequence_sums(logps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum `logps` (M,) over each of the sequences that `cu_seqlens` (S + 1,) delimits: (S,), in a
    fixed order.
    """
    offsets = cu_seqlens.long()
    check_offsets(offsets.tolist(), logps.shape[0])  # beyond them lies foreign memory
    return torch.segment_reduce(logps.double(), "sum", offsets=offsets, initial=0.0).to(logps.dtype)


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
@no_autocast
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
    strategy: str,
    needs: list[bool],
    tolerance: float,
    max_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``terms (3,)`` (preference, SFT, skipped share), ``pairs (B, 6)``, and four tensors
    for backward.

    These are the gradients for hidden, weight and bias (empty where not needed) and an empty one if
    streamed; else, to recompute from, ``logps (M,)``, ``norm (M, 2)``, ``d loss / d logps`` (M,),
    and the vocabulary entries that backward keeps.
    """
    module = choose_backend(backend, hidden)
    rows, offsets = keep_rows(labels, weight.shape[0], ignore_index, validate, cu_seqlens)
    count = len(offsets) // 2
    norms = (float(num_pairs or max(count, 1)), float(num_chosen_tokens or max(offsets[count], 1)))
    head = Head(weight, bias, Transform(scale, softcap), dtype, max_bytes // 8)

    def settle(first: int, last: int, logps: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [x - offsets[first] for x in offsets[first : last + 1]]
        ends = offsets[count + first + 1 : count + last + 1]
        rejected = [x - offsets[count + first] + chosen[-1] for x in ends]
        refs = ref_logps
        if refs is not None:
            refs = torch.cat([refs[first:last], refs[count + first : count + last]])
        loss = (loss_type, beta, epsilon, gamma, sft_weight, sft_reduction)
        return module.tail(logps, labels.new_tensor(chosen + rejected), refs, *loss, *norms)

    if strategy == "stream":
        pairs, skipped, *grads = streaming.loss_and_grads(
            hidden, rows, offsets, head, module, settle, max_bytes,
            (needs[0], needs[1], needs[2]), tolerance,
        )  # fmt: skip
        saved = [hidden.new_empty(0) if x is None else x for x in (*grads, None)]
    else:
        logps, norm, keep, mass = _log_probs(
            hidden, rows, offsets, head, module, max_bytes, tolerance, len(offsets) - 1
        )
        pairs, coef = settle(0, count, logps)
        skipped = recompute.skipped_share(coef, offsets, mass)
        saved = [*(rows.spread(x, labels.shape[0]) for x in (logps, norm, coef)), keep]
    terms = total_terms(pairs, sft_reduction, *norms)
    loss = terms[0] + sft_weight * terms[1]
    first, second, third, fourth = saved
    return loss, torch.cat([terms, skipped.view(1)]), pairs, first, second, third, fourth


@preference_loss.register_fake
def _(
    hidden, weight, labels, cu_seqlens, ref_logps, bias, ignore_index, scale, softcap, dtype, *rest
):
    strategy, needs, tolerance, _, _ = rest[-5:]
    sequences = cu_seqlens.shape[0] - 1
    pairs = hidden.new_empty(sequences // 2, 6, dtype=accumulator_dtype(dtype))
    if strategy == "stream":
        saved = [*_empty_grads(hidden, weight, bias, needs), hidden.new_empty(0)]
    else:
        shape = kept_shape(hidden.shape[0], sequences, weight.shape[0], tolerance)
        saved = [pairs.new_empty(*labels.shape, *more) for more in ((), (2,), ())]
        saved.append(hidden.new_empty(shape, dtype=torch.bool))
    return pairs.new_empty(()), pairs.new_empty(3), pairs, *saved


def _save_loss(ctx, inputs, output):
    hidden, weight, labels, cu_seqlens, _, bias, ignore_index, scale, softcap, dtype, *rest = inputs
    strategy, needs, tolerance, max_bytes, backend = rest[-5:]
    ctx.stream, ctx.needs = strategy == "stream", needs
    ctx.rest = (ignore_index, scale, softcap, dtype, tolerance, max_bytes, backend)
    again = () if ctx.stream else (hidden, weight, labels, bias, cu_seqlens)
    ctx.save_for_backward(*output[3:], *again)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad_loss(ctx, grad, *_):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(ONCE)
    if grad is None:
        return (None,) * 24
    if ctx.stream:
        found = times(ctx.saved_tensors[:3], grad)
    else:
        logps, norm, coef, *again = ctx.saved_tensors
        found = linear_logprobs_backward(coef * grad, logps, norm, *again, *ctx.rest, ctx.needs)
    grads = [x if need else None for x, need in zip(found, ctx.needs, strict=True)]
    return grads[0], grads[1], None, None, None, grads[2], *[None] * 18


preference_loss.register_autograd(_grad_loss, setup_context=_save_loss)
