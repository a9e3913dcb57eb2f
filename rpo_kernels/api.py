"""The public functions: check the arguments, flatten the layout, choose the strategy, call one
operator.

    linear_logprobs         hidden, weight, targets            -> log-prob of every target
    fused_rpo_loss          hidden, weight, labels, ref_logps  -> preference + w * SFT, metrics
    fused_preference_loss   the same engines for a custom loss function

None of them ever holds logits: memory beyond inputs and gradients is bounded by `max_workspace_mb`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels import checks, ops
from rpo_kernels.custom_loss import CustomLoss
from rpo_kernels.losses import sft_weight
from rpo_kernels.rows import count_tokens
from rpo_kernels.spec import Objective, normalizer
from rpo_kernels.strategy import choose_settings, resolve_strategy


class RPOOutput(NamedTuple):
    """What `fused_rpo_loss` returns: float32 (float64 for float64 inputs), detached but for `loss`.

    Every scalar is a sum over local pairs (tokens) divided by `num_pairs` (`num_chosen_tokens`):
    with global counts, the scalars of the micro-batches and ranks of a step add up to the step's.
    """

    loss: Tensor
    """(), ``dpo_loss + w * sft_loss``, differentiable."""
    dpo_loss: Tensor
    """(), the preference term, whatever `loss_type`."""
    sft_loss: Tensor
    """(), the SFT term before its weight."""
    chosen_logps: Tensor
    """(B,), summed log-probs of the chosen responses, in nats."""
    rejected_logps: Tensor
    """(B,), of the rejected ones."""
    chosen_rewards: Tensor
    """(B,), beta times what the loss compares: the log-ratio to the reference, per token for means.
    """
    rejected_rewards: Tensor
    """(B,), of the rejected ones."""
    accuracy: Tensor
    """(), share of pairs whose chosen reward is the larger; a tie counts half."""
    margin: Tensor
    """(), mean of chosen minus rejected reward."""
    skipped: Tensor
    """(), share of dlogits' L1 mass certified as left out, at most `grad_tolerance`."""


def _flat(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(-1, hidden.shape[-1]).contiguous(), labels.reshape(-1).long()


def _sequences(
    hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten either layout to ``hidden (M, D), labels (M,), cu_seqlens (2B + 1,)``."""
    checks.check_sequences(hidden, cu_seqlens)
    if cu_seqlens is None:
        count, length = hidden.shape[:2]
        cu_seqlens = torch.arange(count + 1, device=hidden.device) * length
    return *_flat(hidden, labels), cu_seqlens


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    validate: bool = True,
    grad_tolerance: float = 0.0,
    max_workspace_mb: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-prob of every target under ``softmax(hidden @ weight^T + bias)``, without logits.

    Costs 1U forward and 3U backward (U = 2 N V D FLOP for N rows that are not ignored). Rows whose
    upstream gradient is 0 cost nothing in backward. Differentiable once, deterministic.

    Args:
        hidden: (..., D), float16, bfloat16, float32 or float64.
        weight: (V, D), hidden's dtype; any floating dtype under `torch.autocast`, cast panel by
            panel.
        targets: (...), int64 or int32 token ids. No shift happens inside: ``targets[i]`` is what
            ``hidden[i]`` predicts.
        bias: (V,), or None.
        ignore_index: label of the positions to leave out: they cost nothing and get log-prob 0.
        logit_scale: factor on the logits (Cohere, Granite), > 0.
        logit_softcap: ``z = cap * tanh(z / cap)`` after the scale (Gemma 2), or None.
        validate: check that targets lie in [0, V), in a device synchronization that a call makes
            anyway.
        grad_tolerance: share of dlogits' L1 mass, for equal upstream gradients, that backward may
            leave out of every block of 256 rows (`rpo_kernels.engines.skipping`); 0 is exact. Above
            0, backward costs 3 s U, s the share of vocabulary entries kept, and takes a float32
            accumulator for half-precision weights; on GPUs, and where s is too large for that to
            pay, it is exact.
        max_workspace_mb: bound on temporary memory in MiB; default a twentieth of a GPU's
            memory (4 GiB of 80), else 512. In backward a float32 accumulator for hidden's gradient
            (N x D) comes on top where hidden is half precision.
        backend: "auto" (Triton on GPUs, else torch), "triton" or "torch"; an explicit one runs or
            raises.

    Returns:
        Log-probs in nats, shape (...), float32 (float64 for float64 inputs). NaN or infinite logits
        give NaN for their row.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range; the message names
            it.
        RuntimeError: ``backend="triton"`` cannot run here.
    """
    head = (hidden, weight, targets, bias, logit_scale, logit_softcap, ignore_index)
    checks.check_head(*head, labels_name="targets")
    checks.check_run(backend, max_workspace_mb, grad_tolerance, validate)
    settings = choose_settings(
        hidden, weight, bias, ignore_index=ignore_index, logit_scale=logit_scale,
        logit_softcap=logit_softcap, validate=validate, grad_tolerance=grad_tolerance,
        max_workspace_mb=max_workspace_mb, strategy="recompute", backend=backend,
    )  # fmt: skip
    rows, labels = _flat(hidden, targets)
    settings = resolve_strategy(settings, weight, rows.shape[0], sequences=1)
    logps, *_ = ops.linear_logprobs(rows, weight, bias, labels, None, *settings)
    return logps.view(targets.shape)


def fused_rpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None,
    *,
    bias: Tensor | None = None,
    beta: float = 0.1,
    eta: float = 0.005,
    sft_reduction: str = "sum",
    scale_eta_by_beta: bool | None = None,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    simpo_gamma: float | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_pairs: float | None = None,
    num_chosen_tokens: float | None = None,
    validate: bool = True,
    grad_tolerance: float = 0.0,
    max_workspace_mb: float | None = None,
    strategy: str = "auto",
    backend: str = "auto",
) -> RPOOutput:
    """Regularized Preference Optimization: a preference loss plus SFT on the chosen response.

    For B pairs, with ``s(y)`` the summed log-probs of a response and ``ref(y)`` the reference
    model's (Liu et al. 2024, arXiv 2405.16436, eq. 4.8, for the default ``loss_type="sigmoid"``)::

        m    = beta * [(s(y_c) - ref(y_c)) - (s(y_r) - ref(y_r))]
        loss = mean over pairs of [-(1 - eps) log sigmoid(m) - eps log sigmoid(-m)]  +  w * sft_loss

    ==================  =======================================  ==================
    sft_reduction       sft_loss                                 w by default
    ==================  =======================================  ==================
    ``"sum"``           mean over pairs of -s(y_c)               eta * beta
    ``"sequence_mean"`` mean over pairs of -s(y_c) / tokens      eta
    ``"token_mean"``    -sum of s(y_c) / sum of chosen tokens    eta
    ==================  =======================================  ==================

    A pair without any response token contributes 0 to everything.

    Args:
        hidden: (2B, T, D), B chosen sequences, then their B rejected ones; or packed (N, D) with
            `cu_seqlens`.
        weight: (V, D), hidden's dtype; any floating dtype under `torch.autocast`.
        labels: (2B, T) or (N,), int64 or int32, aligned: ``labels[i]`` is what ``hidden[i]``
            predicts.
        ref_logps: (2B,) summed reference log-probs in nats, chosen first; None = reference-free
            (ref = 0).
        bias: (V,), or None.
        beta: strength of the KL regularization, > 0.
        eta: coefficient of the SFT term, >= 0; 0 is the preference loss alone.
        sft_reduction: form of the SFT term, see the table.
        scale_eta_by_beta: True or False overrides whether w carries the factor beta.
        label_smoothing: eps in [0, 0.5), for sigmoid (cDPO), robust, exo_pair (> 0), simpo and cpo;
            an error elsewhere.
        loss_type: on sums of log-ratios: sigmoid, robust, hinge, exo_pair, apo_zero, apo_down,
            sppo_hard, nca_pair; on per-token means of them: ipo; reference-free: cpo (sums), simpo
            and orpo (means). `rpo_kernels.losses` has the formulas and their sources.
        simpo_gamma: SimPO's target margin (default 0.5); an error with other losses.
        cu_seqlens: (2B + 1,) int32 or int64 row offsets of packed sequences, chosen first.
        ignore_index: label of prompt and padding positions; they cost nothing.
        logit_scale: as in `linear_logprobs`.
        logit_softcap: as in `linear_logprobs`.
        num_pairs: pairs of the whole optimizer step, where it is split over micro-batches or ranks;
            default B. B may be 0.
        num_chosen_tokens: chosen response tokens of the whole step, for ``"token_mean"``; default
            the local count.
        validate: check labels and offsets, in a device synchronization that a call makes anyway.
        grad_tolerance: share of dlogits' L1 mass, weighted by the loss coefficients, that the
            gradient may leave out (`rpo_kernels.engines.skipping`); 0 is exact. The matmuls of the
            gradient then cost the share of the vocabulary that is kept. `RPOOutput.skipped`
            certifies what was left out. It is leave, not an order: where too much would be kept
            for that to pay, and where a GPU recomputes, the call is exact and `skipped` 0.
            Recomputing keeps a mask, a byte per vocabulary entry and block of at most 256 rows of a
            sequence, and sums dW in float32.
        max_workspace_mb: bound on temporary memory in MiB; default a twentieth of a GPU's
            memory (4 GiB of 80), else 512.
        strategy: "recompute" (4U; backward recomputes), "stream" (3U, or 2U if weight is frozen;
            the gradient is made in forward, so backward needs neither weight nor logits) or "auto".
            Streaming a pair whose rows times V exceed the workspace takes two float32 accumulators
            of (V, D), and one of its rows, (n, D), where hidden is half precision; several groups
            of pairs take one of (V, D) where weight is. Recomputing takes one of all rows, (N, D),
            where hidden is half precision. ``auto`` streams, except: fp16; fewer than 256 rows fit
            the workspace; or the weight needs a gradient, not all rows fit at once, and either two
            accumulators exceed 4 workspaces or the matmuls are half precision on a CPU (which
            rounds each product). Without gradients (`torch.no_grad`) both cost 1U; "stream" then
            gives the same bits as in training.
        backend: "auto", "triton" or "torch"; an explicit one runs or raises.

    Returns:
        `RPOOutput`; ``loss`` is a float32 (float64) scalar. NaN or infinite logits give NaN.

    Raises:
        ValueError, TypeError: an argument of wrong shape, dtype, device or range, or a combination
            that the loss does not define; the message names argument, expectation and value.
        RuntimeError: ``backend="triton"`` cannot run here.
    """
    checks.check_head(hidden, weight, labels, bias, logit_scale, logit_softcap, ignore_index)
    checks.check_run(backend, max_workspace_mb, grad_tolerance, validate, strategy)
    checks.check_normalizers(num_pairs, num_chosen_tokens)
    rows, flat_labels, cu_seqlens = _sequences(hidden, labels, cu_seqlens)
    sequences = cu_seqlens.shape[0] - 1
    checks.check_loss(
        loss_type, beta, eta, label_smoothing, sft_reduction, scale_eta_by_beta, simpo_gamma
    )
    checks.check_reference(loss_type, ref_logps, sequences, hidden)
    settings = choose_settings(
        hidden, weight, bias, ignore_index=ignore_index, logit_scale=logit_scale,
        logit_softcap=logit_softcap, validate=validate, grad_tolerance=grad_tolerance,
        max_workspace_mb=max_workspace_mb, strategy=strategy, backend=backend,
    )  # fmt: skip
    settings = resolve_strategy(settings, weight, rows.shape[0], sequences)
    objective = Objective(
        loss_type=loss_type,
        beta=float(beta),
        epsilon=float(label_smoothing),
        gamma=0.5 if simpo_gamma is None else float(simpo_gamma),
        sft_weight=sft_weight(eta, beta, sft_reduction, scale_eta_by_beta),
        sft_reduction=sft_reduction,
        num_pairs=num_pairs or 0.0,
        num_chosen_tokens=num_chosen_tokens or 0.0,
    )
    loss, terms, pairs, *_ = ops.preference_loss(
        rows, weight, bias, flat_labels, cu_seqlens, ref_logps, *objective, *settings
    )
    dpo_loss, sft_loss, skipped = terms.detach().unbind()
    # columns: losses, SFT losses, log-probs and rewards of chosen and rejected
    table = pairs.detach().unbind(1)
    gap, norm = table[4] - table[5], normalizer(num_pairs, sequences // 2)
    tokens = count_tokens(flat_labels, ignore_index, cu_seqlens).view(2, -1).sum(0)
    tie = (gap == 0) & (tokens > 0)  # a pair without tokens is none
    wins = (gap > 0).to(gap.dtype) + 0.5 * tie.to(gap.dtype)
    metrics = (*table[2:], wins.sum() / norm, gap.sum() / norm, skipped)
    return RPOOutput(loss, dpo_loss, sft_loss, *metrics)


LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_fn: LossFunction,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_pairs: float | None = None,
    validate: bool = True,
    grad_tolerance: float = 0.0,
    max_workspace_mb: float | None = None,
    strategy: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The engines of `fused_rpo_loss` for a custom preference loss.

    Args:
        hidden: (2B, T, D) or packed (N, D); this and every argument not named below as in
            `fused_rpo_loss`.
        weight: (V, D).
        labels: (2B, T) or (N,).
        loss_fn: ``(logps (2, b), counts (2, b), index (b,)) -> losses (b,)``, differentiable
            PyTorch code: summed log-probs and token counts of b pairs, row 0 chosen and row 1
            rejected, and which of the B pairs they are (to index reference log-probs or weights
            with). Pairs must not interact: while streaming it sees a few pairs at a time.
        num_pairs: what the sum of losses is divided by; default B.

    Returns:
        ``loss ()``, differentiable; ``logps (2, B)``, detached.

    Raises:
        ValueError, TypeError, RuntimeError: as `fused_rpo_loss`; ValueError also where `loss_fn`
            returns another shape, or for ``strategy="stream"`` under `torch.compile` (a Python
            function cannot be part of an operator; ``"auto"`` recomputes there).
    """
    checks.check_head(hidden, weight, labels, bias, logit_scale, logit_softcap, ignore_index)
    checks.check_run(backend, max_workspace_mb, grad_tolerance, validate, strategy)
    checks.check_normalizers(num_pairs, None)
    checks.check_loss_fn(loss_fn)
    rows, flat_labels, cu_seqlens = _sequences(hidden, labels, cu_seqlens)
    pairs = (cu_seqlens.shape[0] - 1) // 2
    norm = float(normalizer(num_pairs, pairs))
    if torch.compiler.is_compiling():
        if strategy == "stream":
            raise ValueError(
                "strategy: expected 'recompute' or 'auto' under torch.compile with a loss_fn, "
                "got 'stream'"
            )
        strategy = "recompute"
    settings = choose_settings(
        hidden, weight, bias, ignore_index=ignore_index, logit_scale=logit_scale,
        logit_softcap=logit_softcap, validate=validate, grad_tolerance=grad_tolerance,
        max_workspace_mb=max_workspace_mb, strategy=strategy, backend=backend,
    )  # fmt: skip
    settings = resolve_strategy(settings, weight, rows.shape[0], 2 * pairs)
    if settings.strategy == "stream":
        return CustomLoss.apply(
            rows, weight, bias, flat_labels, cu_seqlens, loss_fn, norm, settings
        )
    logps, *_ = ops.linear_logprobs(rows, weight, bias, flat_labels, cu_seqlens, *settings)
    sums = ops.sequence_sums(logps, cu_seqlens).view(2, pairs)
    counts = count_tokens(flat_labels, ignore_index, cu_seqlens).view(2, pairs).to(sums.dtype)
    index = torch.arange(pairs, device=hidden.device)
    losses = checks.pair_losses(loss_fn, sums, counts, index)
    return losses.sum() / norm, sums.detach()
