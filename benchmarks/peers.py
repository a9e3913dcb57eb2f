"""The same loss by every implementation a user can choose today, each as its public API runs it.

    L = mean over pairs of  -log sigmoid(m) + w * (-s(y_c))
    m = beta * [(s(y_c) - ref(y_c)) - (s(y_r) - ref(y_r))]

with s the summed log-probs of a response and w = eta * beta: RPO with the paper's "sum" form. Every
function here takes a `Problem` (hidden (2B, T, D), weight (V, D), labels (2B, T), ref_logps (2B,))
and beta, and returns the scalar loss.

All take the same cached reference log-probs, except Liger's, whose API has no place for them. It
runs in two forms: `liger` without a reference model (ref = 0, and beta = 0.01 so that the margins
do not saturate), which is 3U like the others and the faster one, and `liger_reference` with
reference hidden states and weight, as its users run it (4U; here the policy's own, so m = 0). Its
SFT term is a mean over chosen tokens; alpha = w * tokens / pairs makes it the sum. Each form is
checked against the float64 loss of its own (reference, beta).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.inputs import IGNORE, Problem
from benchmarks.sketch import SketchLogprobs

BETA, ETA = 0.1, 0.005


class Unavailable(Exception):
    """An implementation that cannot run here; the message says why and is recorded."""


class Implementation(NamedTuple):
    """One way to compute the loss."""

    label: str
    run: Callable[[Problem, float], Tensor]
    ours: bool = False
    tolerance: float = 0.0  # > 0: the gradient is approximate by design
    exact: str | None = None  # the one whose gradient it approximates
    reference: str = "cached"  # or "none" (ref = 0), "own" (the policy's log-probs)
    beta: float = BETA
    units: int = 3  # passes of the head in U = 2 N V D with a trainable head, by construction
    all_rows: bool = False  # also computes rows whose label is ignored
    logits_rows: str | None = None  # whose logits it holds at once: "all", "kept", "pair" rows


def rpo_loss(sums: Tensor, ref_logps: Tensor, beta: float = BETA) -> Tensor:
    """The loss from summed log-probs (2B,), chosen first."""
    c, r = (sums - ref_logps).chunk(2)
    return (-F.logsigmoid(beta * (c - r)) - ETA * beta * sums.chunk(2)[0]).mean()


def _masked(logps: Tensor, p: Problem, beta: float) -> Tensor:
    return rpo_loss(torch.where(p.labels != IGNORE, logps.float(), 0).sum(1), p.ref_logps, beta)


def materialized(p: Problem, beta: float, upcast: bool = False) -> Tensor:
    """Logits of all 2B x T rows, log_softmax, gather: every trainer without a fused head."""
    if upcast and p.hidden.dtype == torch.float32:
        raise Unavailable("the same as materialized in float32")
    logits = F.linear(p.hidden, p.weight)
    logps = (logits.float() if upcast else logits).log_softmax(-1)
    return _masked(logps.gather(-1, p.labels.clamp(min=0)[..., None])[..., 0], p, beta)


def materialized_kept(p: Problem, beta: float) -> Tensor:
    """The same on the response rows only."""
    kept = p.labels != IGNORE
    logps = F.linear(p.hidden[kept], p.weight).log_softmax(-1)
    logps = logps.gather(-1, p.labels[kept][:, None])[:, 0].float()
    logps = torch.zeros_like(p.labels, dtype=torch.float32).masked_scatter(kept, logps)
    return _masked(logps, p, beta)


def torch_chunked(p: Problem, beta: float) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` (torch 2.13) with its default chunking options."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    nll = F.linear_cross_entropy(
        p.hidden.flatten(0, 1), p.weight, p.labels.flatten(), reduction="none", ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(),
    )  # fmt: skip
    return _masked(-nll.view(p.labels.shape), p, beta)


def sketch(p: Problem, beta: float) -> Tensor:
    """`benchmarks.sketch` on the response rows."""
    kept = p.labels != IGNORE
    found = SketchLogprobs.apply(p.hidden[kept], p.weight, p.labels[kept])
    logps = torch.zeros_like(p.labels, dtype=torch.float32).masked_scatter(kept, found)
    return _masked(logps, p, beta)


class _HeadOnly(nn.Module):
    """A model whose backbone hands out given hidden states: what TRL's head patches."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: self.config)
        self.base_model = lambda **_: SimpleNamespace(last_hidden_state=hidden)
        self.get_output_embeddings = lambda: SimpleNamespace(weight=weight, bias=None)

    def forward(self, **_):
        raise NotImplementedError


def trl(p: Problem, beta: float) -> Tensor:
    """TRL's fused head with the outputs that its DPOTrainer asks for at every step."""
    from trl.trainer.utils import add_fused_lm_head

    model = _HeadOnly(p.hidden, p.weight)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    output = model.forward(shift_labels=p.labels, fused_lm_head=True)
    return rpo_loss(output.log_probs.sum(1), p.ref_logps, beta)


@functools.cache
def _liger(beta: float, alpha: float, use_ref_model: bool):
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(
        beta=beta, alpha=alpha, compute_nll_loss=True, use_ref_model=use_ref_model
    )


def liger(p: Problem, beta: float, with_reference: bool = False) -> Tensor:
    """Liger's fused linear DPO loss, compiled as by default, one pair a chunk."""
    pairs = len(p.labels) // 2
    tokens = int((p.labels[:pairs] != IGNORE).sum())
    loss = _liger(beta, ETA * beta * tokens / pairs, with_reference)
    ref = (p.hidden.detach(), p.weight.detach()) if with_reference else (None, None)
    return loss(p.weight, p.hidden, p.labels, ref_input=ref[0], ref_weight=ref[1])[0]


def cut_cross_entropy(p: Problem, beta: float, exact: bool = False) -> Tensor:
    """Apple's cut cross-entropy: its kernels on CUDA, its compiled fallback elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    options = {"impl": "cce"} if p.hidden.is_cuda else {"impl": "torch_compile"}
    if exact:
        if not p.hidden.is_cuda:
            raise Unavailable("not on this device: only its CUDA kernels have a filter")
        options["filter_eps"] = None
    nll = linear_cross_entropy(p.hidden, p.weight, p.labels, reduction="none", **options)
    return _masked(-nll, p, beta)


def ours(p: Problem, beta: float, strategy: str, tolerance: float = 0.0) -> Tensor:
    """`rpo_kernels.fused_rpo_loss`; the certified dropped mass, if any, hangs on the loss as
    `certificate`.
    """
    from rpo_kernels import fused_rpo_loss

    options = {}
    if tolerance:
        if "grad_tolerance" not in inspect.signature(fused_rpo_loss).parameters:
            raise Unavailable("fused_rpo_loss has no grad_tolerance yet")
        options["grad_tolerance"] = tolerance
    out = fused_rpo_loss(
        p.hidden, p.weight, p.labels, p.ref_logps, beta=beta, eta=ETA, strategy=strategy, **options
    )
    if tolerance:
        out.loss.certificate = out.skipped
    return out.loss


def _ours(label: str, strategy: str, units: int, tolerance: float = 0.0) -> Implementation:
    run = functools.partial(ours, strategy=strategy, tolerance=tolerance)
    exact = strategy if tolerance else None
    return Implementation(label, run, ours=True, units=units, tolerance=tolerance, exact=exact)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "materialized": Implementation(
        "materialized logits, all rows", materialized, all_rows=True, logits_rows="all"
    ),
    "auto": _ours("rpo_kernels, auto", "auto", 3),
    "stream": _ours("rpo_kernels, stream", "stream", 3),
    "recompute": _ours("rpo_kernels, recompute", "recompute", 4),
    "auto_skip": _ours("rpo_kernels, auto, τ = 1e-3", "auto", 3, 1e-3),
    "stream_skip": _ours("rpo_kernels, stream, τ = 1e-3", "stream", 3, 1e-3),
    "recompute_skip": _ours("rpo_kernels, recompute, τ = 1e-3", "recompute", 4, 1e-3),
    "materialized_kept": Implementation(
        "materialized logits, response rows", materialized_kept, logits_rows="kept"
    ),
    "materialized_upcast": Implementation(
        "materialized logits, softmax in float32", functools.partial(materialized, upcast=True),
        all_rows=True, logits_rows="all",
    ),
    "sketch": Implementation("the plainest chunked program", sketch, units=4),
    "trl": Implementation("TRL chunked head", trl, units=4),
    "torch_chunked": Implementation("torch linear_cross_entropy", torch_chunked, units=4),
    "cut_cross_entropy": Implementation(
        "cut-cross-entropy", cut_cross_entropy, units=4, tolerance=0.04
    ),
    "cut_cross_entropy_exact": Implementation(
        "cut-cross-entropy, no filter", functools.partial(cut_cross_entropy, exact=True), units=4
    ),
    "liger": Implementation(
        "Liger fused DPO, no reference", liger, reference="none", beta=BETA / 10, all_rows=True,
        logits_rows="pair",
    ),
    "liger_reference": Implementation(
        "Liger fused DPO, reference states", functools.partial(liger, with_reference=True),
        reference="own", units=4, all_rows=True, logits_rows="pair",
    ),
}  # fmt: skip


def gradients(
    implementation: Implementation, problem: Problem, frozen: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Forward and backward once: loss (), dH (2B, T, D) and dW (V, D), None for a frozen head."""
    hidden = problem.hidden.detach().requires_grad_()
    weight = problem.weight.detach().requires_grad_(not frozen)
    loss = implementation.run(problem._replace(hidden=hidden, weight=weight), implementation.beta)
    wanted = (hidden,) if frozen else (hidden, weight)
    grads = torch.autograd.grad(loss, wanted)
    return loss, grads[0], None if frozen else grads[1]


def held_bytes(implementation: Implementation, labels: Tensor, vocab: int) -> int:
    """A lower bound on the memory its logits and their gradient need at once, in float32; 0 where
    it is bounded.
    """
    count, length = labels.shape
    kept = int((labels != IGNORE).sum())
    rows = {None: 0, "all": count * length, "kept": kept, "pair": 2 * length}
    return rows[implementation.logits_rows] * vocab * 4 * 2
