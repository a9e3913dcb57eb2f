"""What the tests share: random problems, the float64 truth, derived budgets, poisoned memory.

Every budget is derived and none chosen, so that it holds on a processor that sums in another order:

    plain budget      ||out - truth|| / ||truth|| is at most twice that of the plain same-dtype
                      PyTorch expression, plus one eps. For problems so large that its error is no
                      matter of luck. For a single number, what the errors of the plain log-probs
                      amount to in it, in absolute values.
    rounding bounds   elementwise, from a count of roundings: |fl(a . b) - a . b| <= n u |a| . |b|
                      for n terms. For the tiny shapes that hypothesis draws, and for float64.

Two computations of the same are both measured against the truth, not against each other. Equality
to the bit is asked only where the very same operations run on the very same shapes.

Key: M rows given, N rows kept, D hidden size, V vocabulary, B pairs, T positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor
from torch.utils import deterministic

from rpo_kernels import oracle
from rpo_kernels.doctor.budgets import logit_errors
from rpo_kernels.engines.panel import capacity
from rpo_kernels.spec import ACCUMULATOR, Transform

ROOT = Path(__file__).resolve().parents[1]
IGNORE = -100
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def examples(count: int) -> settings:
    """Hypothesis settings: the same examples in every run, so that a red test stays red."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an element nobody wrote shows."""
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small problems take longer to wake threads than to compute, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Problem(NamedTuple):
    """hidden (..., D), weight (V, D), labels (...), bias (V,) or None, ref_logps (2B,) or None."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    ref_logps: Tensor | None = None


def tokens(
    seed: int,
    shape: tuple[int, ...],
    width: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    ignored: float = 0.25,
    spread: float = 2.0,
) -> Problem:
    """For `linear_logprobs`: logits of deviation `spread`, a share `ignored` of labels masked."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=make, dtype=torch.float64)
    weight = torch.randn(vocab, width, generator=make, dtype=torch.float64) * spread / width**0.5
    labels = torch.randint(vocab, shape, generator=make)
    labels[torch.rand(shape, generator=make) < ignored] = IGNORE
    offset = torch.randn(vocab, generator=make, dtype=torch.float64) if bias else None
    return Problem(
        hidden.to(dtype), weight.to(dtype), labels, None if offset is None else offset.to(dtype)
    )


def pairs(
    seed: int,
    count: int = 3,
    length: int = 29,
    width: int = 72,
    vocab: int = 701,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = False,
    reference_model: bool = True,
    spread: float = 2.0,
) -> Problem:
    """For `fused_rpo_loss`: ragged prompts and padding masked; references near the policy's."""
    shape = (2 * count, length)
    made = tokens(seed, shape, width, vocab, dtype, bias=bias, ignored=0, spread=spread)
    make = torch.Generator().manual_seed(seed + 1)
    for row in made.labels:
        prompt = int(torch.randint(1, max(length // 3, 2), (), generator=make))
        padding = int(torch.randint(0, max(length // 3, 1), (), generator=make))
        row[:prompt] = IGNORE
        row[length - padding :] = IGNORE
    if not reference_model:
        return made
    noise = 3 * torch.randn(2 * count, generator=make, dtype=torch.float64)
    return made._replace(ref_logps=(exact_logprobs(made).sum(1) + noise).to(ACCUMULATOR[dtype]))


def pack(problem: Problem) -> tuple[Problem, Tensor]:
    """The sequences without their masked ends: hidden (N, D), labels (N,); cu_seqlens (2B + 1,)."""
    kept = [(row != IGNORE).nonzero()[:, 0] for row in problem.labels]
    spans = [slice(int(k.min()), int(k.max()) + 1) if len(k) else slice(0, 0) for k in kept]
    hidden = torch.cat([h[span] for h, span in zip(problem.hidden, spans, strict=True)])
    labels = torch.cat([row[span] for row, span in zip(problem.labels, spans, strict=True)])
    ends = torch.tensor([0] + [span.stop - span.start for span in spans]).cumsum(0)
    return problem._replace(hidden=hidden, labels=labels), ends.int()


def exact_logprobs(problem: Problem, **options) -> Tensor:
    """The truth: `oracle.linear_logprobs` in float64."""
    bias = None if problem.bias is None else problem.bias.double()
    return oracle.linear_logprobs(
        problem.hidden.double(), problem.weight.double(), problem.labels, bias=bias, **options
    )


# the plain expression in the dtype of its inputs; `exact_logprobs` has the truth
plain_logprobs, plain_rpo_loss = oracle.linear_logprobs, oracle.rpo_loss


def loss_of_logps(logps: Tensor, problem: Problem, **options) -> Tensor:
    """The oracle's loss from log-probs (2B, T) of tokens."""
    with mock.patch.object(oracle, "linear_logprobs", lambda *_, **__: logps):
        return oracle.rpo_loss(
            problem.hidden, problem.weight, problem.labels, problem.ref_logps, **options
        )


def workspace_for(rows: int, problem: Problem) -> float:
    """The smallest `max_workspace_mb` (to 16 bytes) whose streaming panel holds `rows` rows."""
    (vocab, width), size = problem.weight.shape, problem.weight.dtype.itemsize
    low, high = 0, 2**34
    while high - low > 1:
        middle = (low + high) // 2
        fits = capacity(vocab, width, size, 16 * middle) >= rows
        low, high = (low, middle) if fits else (middle, high)
    return 16 * high / 2**20


Result = dict[str, Tensor]


def differentiate(
    function: Callable, problem: Problem, upstream: Tensor | None = None, frozen: str = ""
) -> Result:
    """Call ``function(problem)`` on fresh leaves; its value as "out" and the gradients by name.

    Args:
        function: gets the problem and returns a tensor.
        upstream: gradient of the value; ones by default.
        frozen: names, separated by spaces, that take no gradient.
    """
    leaves = {
        name: tensor.detach().clone().requires_grad_(name not in frozen.split())
        for name, tensor in problem._asdict().items()
        if tensor is not None and name in ("hidden", "weight", "bias")
    }
    out = function(problem._replace(**leaves))
    if out.requires_grad:
        out.backward(torch.ones_like(out) if upstream is None else upstream.to(out.dtype))
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"out": out.detach(), **found}


def double(problem: Problem) -> Problem:
    """The same values in float64."""
    return Problem(*(x.double() if x is not None and x.is_floating_point() else x for x in problem))


def gpu_product(a: Tensor, b: Tensor) -> Tensor:
    """``a (m, k) @ b (k, n)`` in float32, in the coarsest order that a GPU sums exact products in.

    float32 ones are added one after the other; matrix units add eight half-precision ones at a time
    and cut off what does not fit.
    """
    step = 1 if a.dtype == torch.float32 else 8
    total = torch.zeros(a.shape[0], b.shape[1], device=a.device)
    for k in range(0, a.shape[1], step):
        exact = total.double() + a[:, k : k + step].double() @ b[k : k + step].double()
        total = exact.float()
        if step > 1:
            above = total.double().abs() > exact.abs()
            total = torch.where(above, total.nextafter(torch.zeros_like(total)), total)
    return total


def relative_error(out: Tensor, truth: Tensor) -> float:
    """``||out - truth|| / ||truth||``; inf for NaN; 0 where both are zero."""
    norm, gap = truth.double().norm().item(), (out.double() - truth.double()).norm().item()
    if not math.isfinite(gap):
        return math.inf
    return gap / norm if norm else (math.inf if gap else 0.0)


def assert_within_plain_budget(found: Result, plain: Result, truth: Result) -> None:
    """Every tensor within twice the plain expression's error plus one eps of its dtype."""
    assert found.keys() == truth.keys() == plain.keys()
    for name, out in found.items():
        assert out.shape == truth[name].shape, name
        error, own = relative_error(out, truth[name]), relative_error(plain[name], truth[name])
        budget = 2 * own + torch.finfo(out.dtype).eps
        assert error <= budget, f"{name}: error {error:.3e}, budget {budget:.3e}, plain {own:.3e}"


def assert_close_bits(one: Result, two: Result) -> None:
    """Bit-identical results."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


def assert_within_roundings(
    found: Tensor, want: Tensor | float, count: int, size: Tensor | float | None = None
) -> None:
    """Every element within `count` roundings of `size`, the largest intermediate; by default its
    own. A rounding here is one eps, twice what a correctly rounded operation may be off by.
    """
    want = torch.as_tensor(want, dtype=torch.float64)
    limit = count * torch.finfo(found.dtype).eps * (want.abs() if size is None else size)
    gap = (found.double() - want).abs()
    assert (gap <= limit).all(), f"off by {gap.max():.3e}, {count} roundings: {limit.max():.3e}"


def value_budget(
    function: Callable[..., Tensor], errors: Tensor, exact: Tensor, *others: Tensor
) -> float:
    """What errors of log-probs amount to in a number, plus one eps of its terms.

    It sums ``|d number / d logp| error`` over tokens: errors that cancel by luck do not shrink it.

    Args:
        function: from log-probs and `others` to a number.
        errors: how far each log-prob may be off, as `token_budgets` gives it.
        exact: the true log-probs, float64.
        others: what else the number is a sum of, exact: reference log-probs.
    """
    leaves = [x.detach().double().requires_grad_() for x in (exact, *others)]
    number = function(*leaves)
    slopes = torch.autograd.grad(number, leaves, materialize_grads=True)
    terms = number.abs() + sum((s * x).abs().sum() for s, x in zip(slopes, leaves, strict=True))
    off = (slopes[0].abs() * errors.double()).sum()
    return (off + torch.finfo(errors.dtype).eps * terms).item()


def token_budgets(problem: Problem, **heads) -> Tensor:
    """How far each log-prob may be off: twice the plain error; float64's rounding bound.

    In the accumulators' dtype, which tells how sums of them are rounded.
    """
    if problem.hidden.dtype == torch.float64:
        return rounding_bounds(problem, torch.zeros(problem.labels.shape), **heads)["out"]
    plain = plain_logprobs(
        problem.hidden, problem.weight, problem.labels, bias=problem.bias, **heads
    )
    return (2 * (plain.double() - exact_logprobs(problem, **heads)).abs()).float()


def loss_budget(problem: Problem, **options) -> float:
    """`value_budget` of `oracle.rpo_loss`."""
    heads = {k: options[k] for k in ("logit_scale", "logit_softcap") if k in options}
    rest = {k: v for k, v in options.items() if k not in heads}

    def loss(logps, refs=None):
        return loss_of_logps(logps, double(problem)._replace(ref_logps=refs), **rest)

    refs = () if problem.ref_logps is None else (problem.ref_logps,)
    return value_budget(
        loss, token_budgets(problem, **heads), exact_logprobs(problem, **heads), *refs
    )


def loss_bounds(problem: Problem, loss: Callable[[Tensor], Tensor], **heads) -> Result:
    """Elementwise bounds for a loss of float64 log-probs and its gradients, a count of roundings.

    The gradient of the loss by a log-prob is taken where log-probs are and where their rounding
    puts them, chosen up and rejected down, or the other way round.
    """
    exact, off = exact_logprobs(problem, **heads), token_budgets(problem, **heads)
    side = torch.ones(len(off), *[1] * (off.dim() - 1), dtype=torch.float64)
    side[len(off) // 2 :] = -1

    def slope(logps):
        leaf = logps.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    upstream = slope(exact)
    spread = torch.stack([(slope(exact + k * side * off) - upstream).abs() for k in (1, -1)])
    bounds = rounding_bounds(
        problem, upstream, **heads, upstream_error=spread.amax(0) + 16 * 2**-52 * upstream.abs()
    )
    return bounds | {"out": torch.tensor(value_budget(loss, off, exact))}


def rounding_bounds(
    problem: Problem,
    upstream: Tensor,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    upstream_error: Tensor | None = None,
) -> Result:
    """Elementwise bounds for the error of log-probs and gradients, for any order of summation.

    A logit is off by `logit_errors`, a log-prob by twice that plus the sums' own roundings, a
    probability by the exponential of that. An entry of the gradient sums products of factors that
    were rounded a few times each.
    """
    p = double(problem)
    acc = torch.finfo(ACCUMULATOR[problem.hidden.dtype]).eps
    own = torch.finfo(problem.hidden.dtype).eps
    kept = (problem.labels != IGNORE).reshape(-1)
    h, g = p.hidden.reshape(-1, p.hidden.shape[-1]), upstream.double().reshape(-1) * kept
    rows, vocab = h.shape[0], p.weight.shape[0]
    x = h @ p.weight.T + (0 if p.bias is None else p.bias)
    z, slope, bend = x * logit_scale, torch.full_like(x, logit_scale), 0.0
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
        slope, bend = logit_scale * (1 - (z / logit_softcap) ** 2), 2 * logit_scale / logit_softcap
    top = z.abs().amax(1)
    transform = Transform(logit_scale, logit_softcap)
    off = logit_errors(h, p.weight, p.bias, transform, acc, own)
    logps = 2 * off + (16 + vocab) * acc * (top + math.log(vocab) + 1)
    prob = z.softmax(1)
    hot = F.one_hot(torch.where(kept, problem.labels.reshape(-1), 0), vocab)
    delta, terms = (hot - prob).abs(), vocab + rows + 16
    factor = torch.expm1((off + logps).clamp(max=50))[:, None]
    wrong = slope.abs() * (prob + hot * prob.clamp(min=1e-30)).mul(factor).clamp(max=1)
    wrong += delta * (bend * off[:, None] + 8 * acc * logit_scale).clamp(max=logit_scale)
    # sums of `terms` products of factors rounded a few times; no probability is below exp(-60)
    wrong += 2 * delta * slope.abs() * (4 * own + terms * acc) + slope.abs() * 2e-26
    wrong *= g.abs()[:, None]
    if upstream_error is not None:
        wrong += delta * slope.abs() * (upstream_error.reshape(-1) * kept)[:, None]
    tiny = torch.finfo(problem.hidden.dtype).tiny
    bounds = {
        "out": (logps * kept).view(problem.labels.shape),
        "hidden": (wrong @ p.weight.abs()).view(problem.hidden.shape) + tiny,
        "weight": wrong.T @ h.abs() + tiny,
    }
    if problem.bias is not None:
        bounds["bias"] = wrong.sum(0) + tiny
    return bounds


def assert_within_bounds(found: Result, truth: Result, bounds: Result) -> None:
    """Every element within its bound."""
    assert found.keys() == truth.keys() == bounds.keys()
    for name, out in found.items():
        assert out.shape == truth[name].shape, name
        assert not out.isnan().any(), name
        gap = (out.double() - truth[name]).abs()
        worst = (gap - bounds[name]).amax().item() if gap.numel() else 0.0
        assert worst <= 0, f"{name}: an element is {worst:.3e} beyond its rounding bound"
