"""Every function of a backend, on this device, against float64 at ragged shapes.

Each element has a limit, counted from roundings (`budgets`); what is reported is the largest error
as a share of it. Outputs start as NaN, so that an element nobody wrote shows. The public functions
are held to twice the error of the plain PyTorch expression on this device (`oracle`).

n rows, D hidden size, V vocabulary, g blocks of rows
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rpo_kernels import fused_rpo_loss, oracle, tuning
from rpo_kernels.backends import Backend, tiles
from rpo_kernels.doctor.budgets import ROUNDINGS, logit_errors, loss_limits
from rpo_kernels.engines.panel import stride
from rpo_kernels.engines.skipping import BLOCK
from rpo_kernels.spec import LN2, Objective, Transform, target_entry

EPS = torch.finfo(torch.float32).eps  # of every sum
TF32 = 2.0**-10  # eps of the operands, where PyTorch may use TF32
ROWS, VOCAB, WIDTH = 300, 1031, 72  # no multiple of a tile; two blocks of rows
LEAST = 3e-26  # nothing below exp(-60) is ever produced
TRANSFORMS = {"": (Transform(), False), "bias, softcap": (Transform(1.3, 30.0), True)}


class Problem(NamedTuple):
    """Inputs of a kernel on the device, and in float64 on the CPU what they make."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    transform: Transform
    logits: Tensor
    """(n, V) float64, natural."""
    exact: Tensor
    """(n,), how far logits may be off where no product is rounded."""
    in_sums: Tensor
    """(n,), the same for the logits of `lse_and_target`."""
    in_panel: Tensor
    """(n,), the same for those of `exp_panel`."""


class Finding(NamedTuple):
    """One comparison; right where `share` is at most 1."""

    name: str
    share: float
    """The largest error as a share of its limit; inf where a result is NaN or missing."""
    error: str = ""
    """What a launch raised, if it did."""

    @property
    def right(self) -> bool:
        """Whether it ran, and every element is within its limit."""
        return not self.error and self.share <= 1


def rounded_parts(name: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether `lse_and_target` and `exp_panel` round products to `dtype`: on a CPU all that torch
    computes, on a GPU panels that the vendor's matmul fills.
    """
    if name == "torch":
        return (device.type == "cpu",) * 2
    own = tuning.kernels(device, dtype)
    return False, own.exp_path == "panel" and own.hopper == "triton"


def make_problem(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int = WIDTH,
    transform: Transform = Transform(),  # noqa: B008
    with_bias: bool = False,
) -> Problem:
    """Rows and entries that fill no tile, in matrices whose rows are longer than they are wide."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, width + 8, generator=make).to(dtype)[:, :width]
    weight = (3 * torch.randn(VOCAB, width + 16, generator=make) / width**0.5).to(dtype)[:, :width]
    bias = torch.randn(VOCAB, generator=make).to(dtype) if with_bias else None
    targets = torch.randint(VOCAB, (ROWS,), generator=make)
    h, w, b = hidden.double(), weight.double(), None if bias is None else bias.double()
    logits = transform.logit(h @ w.T + (0 if b is None else b))
    single = dtype == torch.float32 and device.type != "cpu" and tiles.precision() == "tf32"
    operands = TF32 if single else 0.0
    rounded = [torch.finfo(dtype).eps * part for part in (0, *rounded_parts(name, device, dtype))]
    exact, in_sums, in_panel = (
        logit_errors(h, w, b, transform, EPS, max(operands, own)) for own in rounded
    )
    offset = None if bias is None else bias.to(device)
    placed = on(device, hidden), on(device, weight), offset, targets.to(device)
    return Problem(*placed, transform, logits, exact, in_sums, in_panel)


def on(device: torch.device, matrix: Tensor) -> Tensor:
    """A copy on `device` with the same strides."""
    place = torch.empty_strided(matrix.shape, matrix.stride(), dtype=matrix.dtype, device=device)
    return place.copy_(matrix)


def share(found: Tensor, truth: Tensor, limit: Tensor | float) -> float:
    """The largest ``|found - truth|`` as a share of `limit`."""
    gap = (found.detach().cpu().double() - truth).abs()
    part = torch.where(gap == 0, gap, gap / limit)
    return part.nan_to_num(nan=math.inf).max().item()


def sums(backend: Backend, p: Problem) -> float:
    """`Backend.lse_and_target`."""
    shift, total, target = backend.lse_and_target(
        p.hidden, p.weight, p.bias, p.targets, p.transform, 2**24
    )
    total = total.double()
    lse, logps = LN2 * (shift + total.log2()), LN2 * (target - total.log2())
    truth = p.logits.logsumexp(1)
    top = p.logits.abs().amax(1)
    off = p.in_sums + VOCAB * EPS + 16 * EPS * (top + math.log(VOCAB) + 1)
    picked = p.logits.gather(1, p.targets.cpu()[:, None])[:, 0]
    return max(share(lse, truth, off), share(logps, picked - truth, off + p.in_sums))


def slopes(p: Problem) -> tuple[Tensor, Tensor]:
    """``dz/dx (n, V)``, and how far rounding may put it off."""
    slope = p.transform.slope(p.logits)
    scale, cap = p.transform
    if cap is None:
        return slope, torch.zeros_like(slope)
    return slope, scale * (2 * p.in_panel[:, None] / cap + 8 * EPS).expand_as(slope)


def panel(backend: Backend, p: Problem, v0: int = 5) -> float:
    """`Backend.exp_panel` from `v0` on."""
    shift = (p.logits.logsumexp(1) / LN2).float()
    n, entries, device = ROWS, VOCAB - v0, p.hidden.device
    wide = torch.full((entries, stride(n, device)), math.nan, dtype=p.hidden.dtype, device=device)
    total = torch.zeros(n, device=device)
    target = torch.full((n,), math.nan, device=device)
    backend.exp_panel(
        p.hidden, p.weight[v0:], None if p.bias is None else p.bias[v0:], shift.to(device),
        p.targets, v0, p.transform, out=wide[:, :n], sums=total, target=target,
    )  # fmt: skip
    low = shift.double()[:, None] * LN2
    z, (slope, off_slope) = p.logits[:, v0:], (x[:, v0:] for x in slopes(p))
    off = p.in_panel[:, None] + 8 * EPS * (z.abs() + low.abs() + 1)
    e, spread = (z - low).exp(), torch.expm1(off)
    eps, least = torch.finfo(p.hidden.dtype).eps, torch.finfo(p.hidden.dtype).smallest_normal
    limit = e * (slope.abs() * (spread + 2 * eps + 4 * EPS) + off_slope) + LEAST + eps * least
    picked = p.targets.cpu()
    inside = picked >= v0
    y = (p.logits.gather(1, picked[:, None]) - low)[:, 0] / LN2
    off_y = off.amax(1) / LN2
    return max(
        share(wide[:, :n].T, e * slope, limit),
        share(total, e.sum(1), (e * (spread + (VOCAB + 4) * EPS)).sum(1)),
        share(target[inside.to(device)], y[inside], off_y[inside]),
    )


def target_logits(backend: Backend, p: Problem) -> float:
    """`Backend.target_logits`, whose products are not rounded."""
    found = backend.target_logits(p.hidden, p.targets, p.weight, p.bias, p.transform, 2**20)
    truth = p.logits.gather(1, p.targets.cpu()[:, None])[:, 0] / LN2
    return share(found, truth, (p.exact + 4 * EPS * (truth.abs() + 1)) / LN2)


def filled(p: Problem) -> tuple[Tensor, Tensor]:
    """A panel (V, n) as it is laid out on the device, and log-sum-exps in base 2, (n,) float32."""
    shift = (p.logits.logsumexp(1) / LN2).float()
    values = (p.logits - shift.double()[:, None] * LN2).exp() * p.transform.slope(p.logits)
    step = stride(ROWS, p.hidden.device)
    wide = torch.zeros(VOCAB, step, dtype=p.hidden.dtype, device=p.hidden.device)
    wide[:, :ROWS] = values.T.to(wide)
    return wide[:, :ROWS], shift.to(p.hidden.device)


def put_targets(backend: Backend, p: Problem, v0: int = 5) -> float:
    """`Backend.put_targets_`, to the bit."""
    values, _ = filled(p)
    found, wanted = values[v0:], values[v0:].clone()
    new = torch.arange(ROWS, device=p.hidden.device) % 64 - 32.0
    for row, target in enumerate(p.targets.tolist()):
        if target >= v0:
            wanted[target - v0, row] = new[row]
    backend.put_targets_(found, p.targets, v0, new)
    return 0.0 if torch.equal(found, wanted) else math.inf


def finish(backend: Backend, p: Problem) -> float:
    """`Backend.finish_panel`: log-probs, the targets' entries, and nothing else touched."""
    values, shift = filled(p)
    before, rows, index = values.clone(), torch.arange(ROWS), p.targets.cpu()
    total = torch.linspace(0.5, 2.0, ROWS, device=p.hidden.device)
    y = p.logits.gather(1, index[:, None])[:, 0] / LN2
    target = (y.float() - shift.cpu()).to(p.hidden.device)
    found = backend.finish_panel(values, p.targets, shift, total, target, p.transform)
    c, s, t = (x.cpu().double() for x in (shift, total, target))
    logps = (t - s.log2()) * LN2
    off = 4 * EPS * (t.abs() + s.log2().abs() + 1)
    entries = target_entry(logps, c, s, p.transform)
    eps, least = torch.finfo(values.dtype).eps, torch.finfo(values.dtype).smallest_normal
    logit, scale = logps + (c + s.log2()) * LN2, abs(p.transform.scale)
    bend = 0.0 if p.transform.softcap is None else 2 / p.transform.softcap
    off_slope = scale * (bend * (off + 8 * EPS * (logit.abs() + c.abs())) + 8 * EPS)
    one = torch.expm1(logps).abs()
    limit = s * (scale * torch.expm1(off) * logps.exp() + one * off_slope)
    limit += (2 * eps + 4 * EPS) * entries.abs() + eps * least
    worst = max(share(found, logps, off), share(values.cpu()[index, rows], entries, limit))
    values[p.targets, rows.to(values.device)] = before[p.targets, rows.to(values.device)]
    return worst if torch.equal(values, before) else math.inf


def kept_products(backend: Backend, p: Problem) -> float:
    """`Backend.kept_products` on a panel that is zero where it was not kept: more may be added."""
    values, _ = filled(p)
    make, device = torch.Generator().manual_seed(1), p.hidden.device
    keep = torch.rand(-(-ROWS // BLOCK), VOCAB, generator=make) < 0.3
    of_row = keep.repeat_interleave(BLOCK, 0)[:ROWS].T
    values *= of_row.to(device)
    scaled = torch.randn(ROWS, p.hidden.shape[1], generator=make).to(device, values.dtype)
    coef, begun = torch.randn(ROWS, generator=make), torch.randn(p.weight.shape, generator=make)
    d_rows = torch.full(p.hidden.shape, math.nan, device=device)
    d_weight, d_bias = begun.to(device, copy=True), torch.zeros(VOCAB, device=device)
    backend.kept_products(
        values, BLOCK, keep.to(device), p.weight, scaled, coef.to(device),
        d_rows=d_rows, d_weight=d_weight, d_bias=d_bias, scale=0.5,
    )  # fmt: skip
    e, w, h, g = (x.cpu().double() for x in (values, p.weight, scaled, coef))
    own = torch.finfo(values.dtype).eps + TF32 * (tiles.precision() == "tf32")

    def limit(count: int, size: Tensor) -> Tensor:
        return (count * EPS + 2 * own) * size + EPS

    more = 0.5 * (e.abs() @ h.abs()) + begun.abs()
    return max(
        share(d_rows, e.T @ w, limit(VOCAB + 8, e.T.abs() @ w.abs())),
        share(d_weight, begun + 0.5 * (e @ h), limit(ROWS + 8, more)),
        share(d_bias, 0.5 * (e @ g), limit(ROWS + 8, e.abs() @ g.abs())),
    )


def tail(backend: Backend, p: Problem) -> float:
    """`Backend.tail` of the default loss, with the SFT term's mean over sequences."""
    counts, pairs, weight, beta = (1500, 7, 11, 5, 3, 640), 3, 0.25, 0.125
    make, device = torch.Generator().manual_seed(2), p.hidden.device
    logps = -2 * torch.rand(sum(counts), generator=make) - 0.01
    refs = torch.stack([x.sum() for x in logps.split(counts)]) + torch.randn(6, generator=make)
    objective = Objective("sigmoid", beta, 0.0625, 0.0, weight, "sequence_mean", pairs, 1.0)
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device)
    found, coef = backend.tail(logps.to(device), offsets, refs.to(device), objective)
    x, length = logps.double().requires_grad_(), torch.tensor(counts[:3]).double()
    total = torch.stack([part.sum() for part in x.split(counts)]).float().double()
    (c, r), (s_c, s_r) = (total - refs.double()).view(2, -1), total.view(2, -1)
    value, sft = oracle.preference_losses("sigmoid", c, r, beta, 0.0625, 0.0), -s_c / length
    steep = torch.autograd.grad(value.sum(), (c, r), retain_graph=True)
    (value.sum() + weight * sft.sum()).div(pairs).backward()
    most = (total.abs() + refs.abs()).detach()
    far, truth = most.view(2, -1), (value, *steep)
    limits = loss_limits("sigmoid", far[0], far[1], beta, 0.0625, 0.0, truth, torch.float32)
    others = [2 * EPS * s.abs() for s in (sft, s_c, s_r)] + [4 * EPS * beta * s for s in far]
    table = torch.stack([value, sft, s_c, s_r, beta * c, beta * r], 1).detach()
    each = torch.cat(limits[1:]) / pairs + ROUNDINGS * EPS * weight / pairs
    assert x.grad is not None
    return max(
        share(found, table, torch.stack([limits[0], *others], 1).detach()),
        share(coef, x.grad, each.repeat_interleave(torch.tensor(counts)).detach()),
    )


def scale_in_place(backend: Backend, p: Problem) -> float:
    """`Backend.scale_`: by a power of two to the bit, and 1 changes nothing."""
    found = p.weight.contiguous()
    for factor in (1.0, 0.5):
        backend.scale_(found, torch.tensor(factor, device=found.device))
    return 0.0 if torch.equal(found, 0.5 * p.weight) else math.inf


KERNELS: dict[str, Callable[[Backend, Problem], float]] = {
    "lse_and_target": sums,
    "exp_panel": panel,
    "target_logits": target_logits,
    "put_targets_": put_targets,
    "finish_panel": finish,
    "kept_products": kept_products,
}
ONCE = {"tail": tail, "scale_": scale_in_place}  # whatever the transform is


def whole_loss(name: str, device: torch.device, dtype: torch.dtype, strategy: str) -> float:
    """`fused_rpo_loss` forward and backward: gradients within twice the plain expression's error
    plus one eps, as norms.
    """
    make = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 61, WIDTH, generator=make)
    weight = 2 * torch.randn(VOCAB, WIDTH, generator=make) / WIDTH**0.5
    labels = torch.randint(VOCAB, (6, 61), generator=make)
    labels[:, :7] = labels[2:, 50:] = -100
    refs = (-math.log(VOCAB) * (labels >= 0).sum(1) + torch.randn(6, generator=make)).to(device)
    given = hidden.to(device, dtype), weight.to(device, dtype)

    def gradients(function: Callable, kind: torch.dtype, **options) -> Iterator[Tensor]:
        leaves = [x.detach().to(kind, copy=True).requires_grad_() for x in given]
        out = function(*leaves, labels.to(device), refs.to(kind), eta=0.5, **options)
        loss = out if isinstance(out, Tensor) else out.loss
        return (x.double() for x in torch.autograd.grad(loss, leaves))

    found = gradients(
        lambda h, w, t, r, **more: fused_rpo_loss(h, w, t, r.float(), **more),
        dtype,
        backend=name,
        strategy=strategy,
    )
    plain, truth = (gradients(oracle.rpo_loss, kind) for kind in (dtype, torch.float64))
    worst = 0.0
    for one, other, right in zip(found, plain, truth, strict=True):
        budget = 2 * (other - right).norm() + torch.finfo(dtype).eps * right.norm()
        worst = max(worst, ((one - right).norm() / budget).nan_to_num(nan=math.inf).item())
    return worst


def findings(
    name: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> Iterator[Finding]:
    """Every comparison; one that raises is reported, and the next goes on."""
    for what, (transform, with_bias) in TRANSFORMS.items():
        problem = make_problem(name, device, dtype, WIDTH, transform, with_bias)
        for kernel, run in (KERNELS | (ONCE if not what else {})).items():
            label = f"{kernel} ({what})" if what else kernel
            yield compare(label, functools.partial(run, backend, problem))
    for strategy in ("stream", "recompute"):
        label = f"fused_rpo_loss, strategy {strategy}"
        yield compare(label, functools.partial(whole_loss, name, device, dtype, strategy))


def compare(label: str, run: Callable[[], float]) -> Finding:
    """`run`, or what it raised."""
    try:
        return Finding(label, run())
    except Exception as error:  # does not compile, does not fit, cannot be launched
        return Finding(label, math.inf, f"{type(error).__name__}: {error}")
