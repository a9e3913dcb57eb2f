"""The package's PyTorch operators: what `torch.compile`, autograd and autocast see.

    linear_logprobs    hidden, weight, bias, targets -> log-probs             backward: recompute
    sequence_sums      log-probs -> one sum per sequence                      backward: expand
    preference_loss    hidden, weight, bias, labels -> loss, table of pairs   backward: recompute,
                                                              or scale in place if streamed

Every operator drops ignored rows, picks the backend and walks panels inside, opaque to the
compiler.

An operator's schema knows tensors, numbers and strings, no structures. `Settings` and `Objective`
therefore cross its border unpacked (``*settings``) and are put together again inside; their part
of the schema is read from their fields (`spec.schema`), so that a new field is written once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rpo_kernels.backends import choose_backend
from rpo_kernels.engines import recompute, streaming
from rpo_kernels.engines.skipping import mask_shape
from rpo_kernels.engines.terms import Saved
from rpo_kernels.losses import total_terms
from rpo_kernels.rows import check_offsets, keep_rows, send, sum_sequences
from rpo_kernels.spec import ACCUMULATOR, Objective, Settings, schema

ONCE = (
    "second derivatives are not implemented: the gradient of rpo_kernels functions is not itself "
    "differentiable"
)
LAYER = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"


def operator(name: str, arguments: str, results: int):
    """Register a function as ``rpo_kernels::name``, of `arguments` in the language of schemas, with
    `results` tensors; none of them aliases an argument.

    Its body runs outside autocast, which would cast whole operands of its matmuls.
    """

    def register(function):
        @functools.wraps(function)
        def outside_autocast(*args):
            device = next(x for x in args if isinstance(x, Tensor)).device
            with torch.autocast(device.type, enabled=False):
                return function(*args)

        returns = ", ".join(["Tensor"] * results)
        wanted = f"({arguments}) -> " + (f"({returns})" if results > 1 else returns)
        return torch.library.custom_op(
            f"rpo_kernels::{name}",
            outside_autocast,
            mutates_args=(),
            schema=wanted,
            tags=(torch.Tag.cudagraph_unsafe,),  # it waits for the device: see `keep_rows`
        )

    return register


def times(grads: Sequence[Tensor | None], factor: Tensor, backend: str) -> list[Tensor | None]:
    """``factor ()`` times every gradient that a backward pass saved, in place where that pass is
    the graph's last (`retain_graph` is False) and neither traced nor batched: a second copy of dW
    costs time and memory, and where the factor is 1 there is nothing to do.
    """
    # no public function tells these two; without them every backward would have to copy
    plain = type(factor) is Tensor and "Batched" not in str(torch._C._dispatch_keys(factor))
    last = plain and not torch._C._autograd._get_current_graph_task_keep_graph()
    if not last:
        return [x if x is None else x * factor for x in grads]
    for x in grads:
        if x is not None and x.numel():
            choose_backend(backend, x).scale_(x, factor)
    return list(grads)


def _empty_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    inputs = zip((hidden, weight, bias), needs, strict=True)
    return [
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for x, need in inputs
    ]


def _input_grads(ctx, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """For autograd, a gradient or None for each input of an operator: its first three have one."""
    grads = [x if need else None for x, need in zip(found, ctx.settings.needs, strict=True)]
    return *grads, *[None] * (ctx.inputs - 3)


def _log_probs(hidden, rows, offsets, head, backend, settings):
    """Forward of the recompute engine: ``logps (N,)``, ``norm (N, 2)``, the mask of kept entries,
    masses.
    """
    sequences, vocab = len(offsets) - 1, head.weight.shape[0]
    shape = mask_shape(hidden.shape[0], sequences, vocab, settings.tolerance)
    keep = hidden.new_zeros(shape, dtype=torch.bool)
    if not settings.tolerance:
        return *recompute.forward(hidden, rows, head, backend, settings.max_bytes), keep, None
    *found, kept, mass = recompute.forward_skipping(
        hidden, rows, head, backend, settings.max_bytes, settings.tolerance, offsets
    )
    if kept is None:
        keep[-1] = True  # a row that no block uses: backward is exact
    else:
        keep[: kept.shape[0]] = kept
    return *found, keep, mass


@operator("linear_logprobs", f"{LAYER}, Tensor? cu_seqlens, {schema(Settings)}", results=3)
def linear_logprobs(hidden, weight, bias, targets, cu_seqlens, *given):
    """Log-probs of `targets` (M,) under ``softmax(transform(hidden (M, D) @ weight (V, D)^T))``.

    Returns ``logps (M,)`` and ``norm (M, 2)`` (see `recompute`), both 0 where ignored, and the
    vocabulary entries that backward keeps, chosen per sequence of `cu_seqlens` (S + 1,) if given.
    """
    settings = Settings(*given)
    backend, head = choose_backend(settings.backend, hidden), settings.head(weight, bias)
    rows, offsets = keep_rows(
        targets, weight.shape[0], settings.ignore_index, settings.validate, cu_seqlens
    )
    logps, norm, keep, _ = _log_probs(hidden, rows, offsets, head, backend, settings)
    return rows.spread(logps, targets.shape[0]), rows.spread(norm, targets.shape[0]), keep


@linear_logprobs.register_fake
def _(hidden, weight, bias, targets, cu_seqlens, *given):
    settings = Settings(*given)
    logps = hidden.new_empty(targets.shape, dtype=ACCUMULATOR[settings.dtype])
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = mask_shape(hidden.shape[0], sequences, weight.shape[0], settings.tolerance)
    norm = logps.new_empty(*targets.shape, 2)
    return logps, norm, hidden.new_empty(shape, dtype=torch.bool)


@operator(
    "linear_logprobs_backward",
    "Tensor grad, Tensor logps, Tensor norm, Tensor keep, "
    f"{LAYER}, Tensor? cu_seqlens, {schema(Settings)}",
    results=3,
)
def linear_logprobs_backward(
    grad, logps, norm, keep, hidden, weight, bias, targets, cu_seqlens, *given
):
    """Gradients for hidden, weight and bias (empty where not needed); rows without gradient cost
    nothing.

    Args:
        grad: (M,) upstream gradient.
        logps, norm, keep: what `linear_logprobs` returned for the arguments that follow.
    """
    settings = Settings(*given)
    backend, head = choose_backend(settings.backend, hidden), settings.head(weight, bias)
    vocab, ignore_index = weight.shape[0], settings.ignore_index
    saved = Saved(grad, logps, norm)
    if settings.tolerance and not keep[-1, 0]:
        rows, offsets = keep_rows(targets, vocab, ignore_index, False, cu_seqlens)
        found = recompute.backward_skipping(
            saved, hidden, rows, head, backend, settings.needs, offsets, keep
        )
    else:
        masked = torch.where(grad != 0, targets, ignore_index)
        rows, _ = keep_rows(masked, vocab, ignore_index, validate=False)
        found = recompute.backward(
            saved, hidden, rows, head, backend, settings.needs, settings.max_bytes
        )
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


@linear_logprobs_backward.register_fake
def _(grad, logps, norm, keep, hidden, weight, bias, targets, cu_seqlens, *given):
    return tuple(_empty_grads(hidden, weight, bias, Settings(*given).needs))


def _save_logprobs(ctx, inputs, output):
    tensors, ctx.inputs = inputs[:5], len(inputs)
    ctx.settings = Settings(*inputs[5:])
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad_logprobs(ctx, grad, *_):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(ONCE)
    found = (None, None, None)
    if grad is not None:
        found = linear_logprobs_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return _input_grads(ctx, found)


linear_logprobs.register_autograd(_grad_logprobs, setup_context=_save_logprobs)


@operator("sequence_sums", "Tensor logps, Tensor cu_seqlens", results=1)
def sequence_sums(logps, cu_seqlens):
    """Sum `logps` (M,) over each of the sequences that `cu_seqlens` (S + 1,) delimits: (S,), in a
    fixed order.
    """
    offsets = cu_seqlens.long()
    check_offsets(offsets.tolist(), logps.shape[0])  # beyond them lies foreign memory
    return sum_sequences(logps, offsets)


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


def _objective_and_settings(given: Sequence) -> tuple[Objective, Settings]:
    count = len(Objective._fields)
    return Objective(*given[:count]), Settings(*given[count:])


@operator(
    "preference_loss",
    f"{LAYER}, Tensor cu_seqlens, Tensor? ref_logps, {schema(Objective)}, {schema(Settings)}",
    results=7,
)
def preference_loss(hidden, weight, bias, labels, cu_seqlens, ref_logps, *given):
    """``loss``, ``terms (3,)`` (preference, SFT, skipped share), ``pairs (B, 6)``, and four tensors
    for backward.

    These are the gradients for hidden, weight and bias (empty where not needed) and an empty one if
    streamed; else, to recompute from, ``logps (M,)``, ``norm (M, 2)``, ``d loss / d logps`` (M,),
    and the vocabulary entries that backward keeps.
    """
    objective, settings = _objective_and_settings(given)
    backend, head = choose_backend(settings.backend, hidden), settings.head(weight, bias)
    rows, offsets = keep_rows(
        labels, weight.shape[0], settings.ignore_index, settings.validate, cu_seqlens
    )
    count = len(offsets) // 2
    objective = objective.normalized(count, chosen_tokens=offsets[count])

    def loss_of_pairs(first: int, last: int, logps: Tensor) -> tuple[Tensor, Tensor]:
        """`streaming.PairLoss`: the backend's tail on a part of the pairs, rows renumbered."""
        chosen = [x - offsets[first] for x in offsets[first : last + 1]]
        ends = offsets[count + first + 1 : count + last + 1]
        rejected = [x - offsets[count + first] + chosen[-1] for x in ends]
        refs = ref_logps
        if refs is not None:
            refs = torch.cat([refs[first:last], refs[count + first : count + last]])
        return backend.tail(logps, send(chosen + rejected, logps.device), refs, objective)

    if settings.strategy == "stream":
        pairs, skipped, *grads = streaming.loss_and_grads(
            hidden, rows, offsets, head, backend, loss_of_pairs, settings
        )
        saved = [hidden.new_empty(0) if x is None else x for x in (*grads, None)]
    else:
        logps, norm, keep, mass = _log_probs(hidden, rows, offsets, head, backend, settings)
        pairs, coef = loss_of_pairs(0, count, logps)
        skipped = recompute.skipped_share(coef, offsets, mass)
        saved = [*(rows.spread(x, labels.shape[0]) for x in (logps, norm, coef)), keep]
    terms = total_terms(pairs, objective)
    loss = terms[0] + objective.sft_weight * terms[1]
    return loss, torch.cat([terms, skipped.view(1)]), pairs, *saved


@preference_loss.register_fake
def _(hidden, weight, bias, labels, cu_seqlens, ref_logps, *given):
    _, settings = _objective_and_settings(given)
    sequences = cu_seqlens.shape[0] - 1
    pairs = hidden.new_empty(sequences // 2, 6, dtype=ACCUMULATOR[settings.dtype])
    if settings.strategy == "stream":
        saved = [*_empty_grads(hidden, weight, bias, settings.needs), hidden.new_empty(0)]
    else:
        shape = mask_shape(hidden.shape[0], sequences, weight.shape[0], settings.tolerance)
        saved = [pairs.new_empty(*labels.shape, *more) for more in ((), (2,), ())]
        saved.append(hidden.new_empty(shape, dtype=torch.bool))
    return pairs.new_empty(()), pairs.new_empty(3), pairs, *saved


def _save_loss(ctx, inputs, output):
    tensors, ctx.inputs = inputs[:5], len(inputs)
    _, ctx.settings = _objective_and_settings(inputs[6:])
    streamed = ctx.settings.strategy == "stream"
    ctx.save_for_backward(*output[3:], *(() if streamed else tensors))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grad_loss(ctx, grad, *_):
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError(ONCE)
    found: Sequence[Tensor | None] = (None, None, None)
    if grad is not None and ctx.settings.strategy == "stream":
        found = times(ctx.saved_tensors[:3], grad, ctx.settings.backend)
    elif grad is not None:
        logps, norm, coef, *again = ctx.saved_tensors
        found = linear_logprobs_backward(coef * grad, logps, norm, *again, *ctx.settings)
    return _input_grads(ctx, found)


preference_loss.register_autograd(_grad_loss, setup_context=_save_loss)
