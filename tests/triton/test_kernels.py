"""The Triton kernels against float64 PyTorch; interpreted without a GPU."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

pytest.importorskip("triton")

from rpo_kernels.backends import gluon_hopper, launch, tiles, torch_backend
from rpo_kernels.backends import triton_backend as backend
from rpo_kernels.backends import triton_kernels as kernels
from rpo_kernels.doctor.budgets import ROUNDINGS, loss_limits
from rpo_kernels.losses import LOSSES, SFT_REDUCTIONS
from rpo_kernels.spec import Objective, Transform
from tests.support import (
    Problem,
    assert_within_roundings,
    gpu_product,
    rounding_bounds,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOG2E = math.log2(math.e)
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN, SCALED, CAPPED = Transform(), Transform(0.7), Transform(1.3, 30.0)
N, V, D = 130, 1031, 576


@pytest.fixture(autouse=True, scope="module")
def poisoned():
    """Whatever a launcher allocates starts as NaN."""

    def poison(function):
        def wrapped(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(gluon_hopper.VARIABLE, "triton")  # the others have tests of their own
        patch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
        patch.setattr(torch, "empty_like", poison(torch.empty_like))
        yield


def make(n=N, vocab=V, width=D, dtype=torch.float32, bias=True, seed=0):
    """Hidden states, weight, bias and targets; row strides larger than the width."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width + 8, generator=g).to(DEVICE, dtype)[:, :width]
    weight = (3 * torch.randn(vocab, width + 16, generator=g) / width**0.5).to(DEVICE, dtype)[
        :, :width
    ]
    offset = torch.randn(vocab, generator=g).to(DEVICE, dtype) if bias else None
    targets = torch.randint(vocab, (n,), generator=g).to(DEVICE)
    return hidden, weight, offset, targets


def logits(hidden, weight, bias, transform, dtype=torch.float64):
    if dtype == torch.float32:  # what kernels sum in, whatever the operands
        x = gpu_product(hidden, weight.t())
    else:
        x = hidden.to(dtype) @ weight.to(dtype).t()
    x = x if bias is None else x + bias.to(dtype)
    scale, cap = transform
    return scale * x if cap is None else cap * torch.tanh(scale * x / cap)


def softmax_of(hidden, weight, bias, targets, transform, max_bytes=2**20):
    """Log-sum-exp and the targets' log-probs, natural, from the backend's base-2 results."""
    shift, sums, target = backend.lse_and_target(
        hidden, weight, bias, targets, transform, max_bytes
    )
    assert shift.dtype == sums.dtype == target.dtype == torch.float32
    return math.log(2) * (shift + sums.log2()), math.log(2) * (target - sums.log2())


def slope(z, transform):
    scale, cap = transform
    return torch.full_like(z, scale) if cap is None else scale * (1 - (z / cap) ** 2)


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def assert_plain(value, plain, truth, dtype=None):
    """Within twice the plain expression's error, plus one eps of the operands' dtype."""
    found, own = error(value, truth), error(plain, truth)
    budget = 2 * own + torch.finfo(plain.dtype if dtype is None else dtype).eps
    assert found <= budget, f"error {found:.3e}, budget {budget:.3e}, plain {own:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform, bias", [(PLAIN, False), (SCALED, True), (CAPPED, True)])
def test_lse_and_target(dtype, transform, bias):
    hidden, weight, offset, targets = make(dtype=dtype, bias=bias)
    targets[5], targets[7], targets[11] = -1, len(weight), len(weight) + 300  # none of the entries
    lse, logps = softmax_of(hidden, weight, offset, targets, transform)
    z = logits(hidden, weight, offset, transform)
    plain = logits(hidden, weight, offset, transform, dtype)
    assert_plain(lse, plain.logsumexp(1), z.logsumexp(1))
    rows = ((targets >= 0) & (targets < len(weight))).nonzero()[:, 0]
    truth, same = (x.log_softmax(1)[rows, targets[rows]] for x in (z, plain))
    assert_plain(logps[rows], same, truth)


def test_lse_within_little_memory_and_one_split():
    hidden, weight, offset, targets = make(width=64)
    plain, truth = (
        logits(hidden, weight, offset, PLAIN, dtype).logsumexp(1)
        for dtype in (torch.float32, torch.float64)
    )
    for max_bytes in (1, 8 * 64, 8 * 64 * 3, 2**30):
        lse, _ = softmax_of(hidden, weight, offset, targets, PLAIN, max_bytes)
        assert_plain(lse, plain, truth)


class Recorder:
    """Stands in for a kernel: keeps the arguments of its launches, and launches it."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(**arguments):
            self.launches.append(arguments)
            return self.kernel[grid](**arguments)

        return launch


def test_outputs_are_aligned_whatever_n(monkeypatch):
    """Triton compiles anew where a pointer's alignment changes."""
    hidden, weight, offset, targets = make(n=N + 1, vocab=300, width=32)
    for name in ("lse_partials", "lse_merge"):
        recorder = Recorder(getattr(kernels, name))
        monkeypatch.setattr(kernels, name, recorder)
    softmax_of(hidden, weight, offset, targets, PLAIN, 1)
    outputs = [kernels.lse_partials.launches, kernels.lse_merge.launches]
    assert len(outputs[0]) > 1
    for name, launches in zip(
        ("target", "shift", "sums"), [outputs[0], *2 * [outputs[1]]], strict=True
    ):
        assert all(launch[name].data_ptr() % 16 == 0 for launch in launches), name


@pytest.fixture
def tf32_allowed():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32_allowed")
def test_sums_agree_with_panels_where_tf32_is_allowed():
    """The vendor's matmul rounds a panel's operands: divided by the sums, columns must add up to 1,
    as they do without TF32, but for errors of both signs.
    """
    hidden, weight, offset, targets = make(width=64)
    lse, _ = softmax_of(hidden, weight, offset, targets, PLAIN)
    z = logits(hidden, weight, offset, PLAIN)
    plain = logits(hidden, weight, offset, PLAIN, torch.float32)
    assert_plain(lse, plain.logsumexp(1), z.logsumexp(1))


def test_a_probability_near_one_keeps_its_accuracy():
    """1 - p = exp(-8) and logits of 1e4: log p must not round to eps * 1e4."""
    hidden = torch.ones(1, 16, device=DEVICE)
    weight = torch.full((300, 16), -625.0, device=DEVICE)
    offset, targets = torch.full((300,), -math.inf, device=DEVICE), torch.tensor([7], device=DEVICE)
    offset[7], offset[205] = 8.0, 0.0
    for v in (7, 205):
        weight[v] *= -1
    _, logps = softmax_of(hidden, weight, offset, targets, PLAIN)
    z = logits(hidden, weight, offset, PLAIN)
    truth = z.log_softmax(1)[:, 7]
    gap = abs(logps.double() - truth)
    # two logits are off by the rounding of their size; what it does is scaled by exp(-8)
    assert logps < 0 and gap <= -truth * math.expm1(2 * EPS * z.abs().max()) + EPS


def test_minus_infinity_bias_removes_entries():
    hidden, weight, offset, targets = make(n=3, vocab=300, width=32)
    offset[:290] = -math.inf
    targets[:] = torch.tensor([295, 3, 299])
    lse, logps = softmax_of(hidden, weight, offset, targets, PLAIN)
    z = logits(hidden, weight, offset, PLAIN)
    plain = logits(hidden, weight, offset, PLAIN, torch.float32)
    assert_plain(lse, plain.logsumexp(1), z.logsumexp(1))
    assert logps[1] == -math.inf and logps[[0, 2]].isfinite().all()
    offset[:] = -math.inf
    lse, _ = softmax_of(hidden, weight, offset, targets, PLAIN)
    assert (lse == -math.inf).all()


def test_nan_stays_in_its_row():
    hidden, weight, offset, targets = make(n=70, vocab=300, width=32)
    hidden[66, 3] = math.nan
    shift, _, target = backend.lse_and_target(hidden, weight, offset, targets, CAPPED, 2**20)
    lse, logps = softmax_of(hidden, weight, offset, targets, CAPPED)
    out, sums = torch.zeros(300, 70, device=DEVICE), torch.zeros(70, device=DEVICE)
    shift = shift.nan_to_num()
    backend.exp_panel(hidden, weight, offset, shift, targets, 0, CAPPED, out, sums)
    for result in (lse, logps, target, out.sum(0), sums):
        assert result.isnan().nonzero()[:, 0].tolist() == [66]
    assert out[:, 66].isnan().all()


FILLS = [backend.exp_panel_fused, backend.exp_panel_matmul]


def fill(how, hidden, weight, bias, shift, targets, v0, transform, out, sums=None, picked=None):
    how(
        hidden,
        weight,
        bias,
        shift,
        targets,
        v0,
        transform,
        out,
        sums,
        picked,
        backend._config(hidden).tile,
    )


@pytest.mark.parametrize("how", FILLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform, bias", [(PLAIN, False), (SCALED, True), (CAPPED, True)])
def test_exp_panel(how, dtype, transform, bias):
    """A panel from the middle of the vocabulary into a strided buffer; `sums` is added to."""
    hidden, weight, offset, targets = make(dtype=dtype, bias=bias)
    v0, p = 131, 777
    panel, part = weight[v0 : v0 + p], None if offset is None else offset[v0 : v0 + p]
    z = logits(hidden, weight, offset, transform)
    shift = (z.logsumexp(1) * LOG2E).float()
    buffer = torch.full((p + 2, N + 6), math.nan, dtype=dtype, device=DEVICE)
    sums, picked = torch.ones(N, device=DEVICE), torch.full((N,), -7.0, device=DEVICE)
    fill(how, hidden, panel, part, shift, targets, v0, transform, buffer[1:-1, :N], sums, picked)
    assert buffer[[0, -1]].isnan().all() and buffer[:, N:].isnan().all()

    z, plain = z[:, v0 : v0 + p], logits(hidden, panel, part, transform, dtype)
    e, rough = z - shift[:, None].double() / LOG2E, plain.float() - shift[:, None] / LOG2E
    truth, same = e.exp() * slope(z, transform), rough.exp() * slope(plain.float(), transform)
    assert_plain(buffer[1:-1, :N], same.t(), truth.t(), dtype)
    assert_plain(sums - 1, rough.exp().sum(1), e.exp().sum(1), dtype)
    inside = (targets >= v0) & (targets < v0 + p)
    index = (targets - v0)[inside, None]
    want, same = (LOG2E * x[inside].gather(1, index) for x in (e, rough))
    assert (picked[~inside] == -7).all()
    assert_plain(picked[inside, None], same, want, dtype)


def padded(rows, n, wide, spare=0, dtype=torch.float32):
    """A panel ``(rows, n)``, rows `wide` apart; the last one has `spare` elements less."""
    size = rows * wide - spare
    buffer = torch.full((size,), math.nan, dtype=dtype, device=DEVICE)
    return buffer.as_strided((rows, n), (wide, 1))


@pytest.mark.parametrize("how", FILLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_padded_panels_have_the_same_bits(how, dtype, monkeypatch):
    """Rows that end at a multiple of 16 are filled to their end, any other panel up to n."""
    product = torch.mm  # may sum in another order where rows are aligned
    monkeypatch.setattr(torch, "mm", lambda a, b, out: out.copy_(product(a, b)))
    hidden, weight, offset, targets = make(n=70, vocab=300, width=40, dtype=dtype)
    shift = (logits(hidden, weight, offset, CAPPED).logsumexp(1) * LOG2E).float()
    results = []
    for wide, spare, reach in ((80, 0, 80), (80, 9, 70), (70, 0, 70), (96, 0, 70)):
        out, sums = padded(300, 70, wide, spare, dtype), torch.zeros(70, device=DEVICE)
        assert launch.reach_of(out) == reach
        fill(how, hidden, weight, offset, shift, targets, 0, CAPPED, out, sums)
        results.append((out, sums))
        if reach == 70:
            rest = torch.ones(300 * wide - spare, dtype=torch.bool, device=DEVICE)
            rest.as_strided((300, 70), (wide, 1)).fill_(False)
            assert out.as_strided(rest.shape, (1,))[rest].isnan().all()
    (first, first_sums), *rest = results
    for out, sums in rest:  # a sum's order may change with what a thread loads
        assert torch.equal(first, out)
        assert_within_roundings(sums, first_sums, 300)


def test_both_fills_agree_and_choose_by_configuration(monkeypatch):
    hidden, weight, offset, targets = make()
    z, plain = (logits(hidden, weight, offset, CAPPED, x) for x in (torch.float64, torch.float32))
    shift = (z.logsumexp(1) * LOG2E).float()
    truth = (z - shift[:, None].double() / LOG2E).exp() * slope(z, CAPPED)
    same = (plain - shift[:, None] / LOG2E).exp() * slope(plain, CAPPED)
    outs = []
    own = backend._config(hidden)
    for path in ("fused", "panel"):
        config = own._replace(exp_path=path)
        monkeypatch.setattr(backend, "_config", lambda hidden, config=config: config)
        outs.append(torch.full((V, N), math.nan, device=DEVICE))
        backend.exp_panel(hidden, weight, offset, shift, targets, 0, CAPPED, outs[-1])
        assert_plain(outs[-1], same.t(), truth.t())
    assert not torch.equal(*outs)


def test_float32_panel_from_half_precision(monkeypatch):
    """An output wider than the operands is always filled by the fused kernel."""
    hidden, weight, _, targets = make(dtype=torch.bfloat16, bias=False)
    config = backend._config(hidden)._replace(exp_path="panel")
    monkeypatch.setattr(backend, "_config", lambda hidden: config)
    z = logits(hidden, weight, None, PLAIN)
    out = torch.full((V, N), math.nan, device=DEVICE)
    shift = (z.logsumexp(1) * LOG2E).float()
    backend.exp_panel(hidden, weight, None, shift, targets, 0, PLAIN, out)
    plain = logits(hidden, weight, None, PLAIN, torch.float32)
    same = (plain - shift[:, None] / LOG2E).exp()  # of the same shift, like the panel
    assert_plain(out, same.t(), z.softmax(1).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform, bias", [(PLAIN, False), (CAPPED, True)])
def test_target_logits(dtype, transform, bias):
    hidden, weight, offset, targets = make(dtype=dtype, bias=bias)
    found = backend.target_logits(hidden, targets, weight, offset, transform, 0)
    plain, truth = (
        logits(hidden, weight, offset, transform, x).gather(1, targets[:, None])[:, 0]
        for x in (torch.float32, torch.float64)
    )
    assert_plain(found, LOG2E * plain, LOG2E * truth)
    empty = backend.target_logits(hidden[:0], targets[:0], weight, offset, transform, 0)
    assert empty.shape == (0,)


def finish(how, dtype, transform):
    """Log-probs from -30 to -1e-7, and a panel with their entries among zeros."""
    wanted = -torch.logspace(-7, math.log10(30), N, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    sums = (torch.rand(N, generator=g) * 4 + 0.5).to(DEVICE)
    target = (wanted.to(DEVICE) * LOG2E + sums.double().log2()).float()
    shift = torch.randn(N, generator=g).to(DEVICE)
    targets = torch.randint(300, (N,), generator=g).to(DEVICE)
    panel = torch.zeros(300, N + 3, dtype=dtype, device=DEVICE)[:, :N]
    given = [x if dtype != torch.float64 else x.double() for x in (shift, sums, target)]
    logps = how.finish_panel(panel, targets, *given, transform)
    return logps, panel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transform", [PLAIN, SCALED, CAPPED])
def test_finished_rows(dtype, transform):
    """Accurate however close p is to 1: every number is a few roundings from the float64 one."""
    logps, panel = finish(backend, dtype, transform)
    want, entries = finish(torch_backend, torch.float64, transform)
    _, steep = finish(torch_backend, torch.float64, Transform(transform.scale))  # before the cap
    # the difference of two logarithms is exact to the rounding of the larger
    assert_within_roundings(logps, want, 2)
    if dtype == torch.float32:
        assert_within_roundings(panel, entries, 8, steep.abs())
    else:  # the interpreter cuts to bfloat16, GPUs round
        assert_within_roundings(panel, entries, 2, steep.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_are_put_where_they_belong(dtype):
    targets = torch.randint(300, (N,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    values = torch.arange(N, device=DEVICE).float()
    results = []
    for how in (backend, torch_backend):
        buffer = torch.full((120, N + 6), -1.0, dtype=dtype, device=DEVICE)
        how.put_targets_(buffer[:, :N], targets, 100, values)
        results.append(buffer)
    assert torch.equal(*results)
    assert (results[0] >= 0).sum() == ((targets >= 100) & (targets < 220)).sum()


def test_nothing_below_exp_minus_60():
    hidden, weight, offset, targets = make(n=4, vocab=40, width=16)
    for how in FILLS:
        out = torch.full((40, 4), math.nan, device=DEVICE)
        shift = torch.full((4,), 1000.0, device=DEVICE)
        fill(how, hidden, weight, offset, shift, targets, 0, PLAIN, out)
        # the exponent, 60 and its logarithm's base, is rounded a few times
        assert_within_roundings(out, torch.full_like(out, math.exp(-60)), 4 * 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_descriptors_and_pointers_give_the_same_bits(monkeypatch, dtype):
    hidden, weight, offset, targets = make(n=70, vocab=300, width=200, dtype=dtype)
    results = []
    for tma in (False, True):
        config = tiles.Config(tiles.Tile(32, 64, 64, 4, 1, 1, tma), "fused")
        monkeypatch.setattr(backend, "_config", lambda hidden, config=config: config)
        assert backend._operands(hidden, weight, config.tile)["TMA"] == tma
        found = backend.lse_and_target(hidden, weight, offset, targets, CAPPED, 2**20)
        out, sums = torch.empty(300, 70, dtype=dtype, device=DEVICE), torch.zeros_like(found[0])
        backend.exp_panel(hidden, weight, offset, found[0], targets, 0, CAPPED, out, sums)
        results.append((*found, out, sums))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    shifted = torch.empty(70 * 200 + 1, dtype=dtype, device=DEVICE)[1:].view(70, 200)
    assert not backend._operands(shifted, weight, config.tile)["TMA"]


def test_reruns_are_bit_identical():
    hidden, weight, offset, targets = make(n=70, vocab=300, width=200, dtype=torch.bfloat16)
    runs = []
    for _ in range(2):
        found = backend.lse_and_target(hidden, weight, offset, targets, CAPPED, 2**20)
        out, sums = torch.empty(300, 70, device=DEVICE), torch.zeros_like(found[0])
        backend.exp_panel(hidden, weight, offset, found[0], targets, 0, CAPPED, out, sums)
        runs.append((*found, out, sums))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    vocab=st.integers(1, 300),
    width=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_any_shape(n, vocab, width, seed):
    hidden, weight, offset, targets = make(n, vocab, width, seed=seed)
    z = logits(hidden, weight, offset, SCALED)
    lse, logps = softmax_of(hidden, weight, offset, targets, SCALED, 2**16)
    problem = Problem(hidden, weight, targets, offset)
    off = rounding_bounds(problem, torch.zeros(n, device=DEVICE), SCALED.scale)["out"]
    assert ((lse.double() - z.logsumexp(1)).abs() <= off).all()
    truth = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    assert ((logps.double() - truth).abs() <= off).all()
    prob, factor = z.softmax(1).t(), torch.expm1(2 * off)  # of a logit, and of the lse
    for how in FILLS:
        out, sums = torch.full((vocab, n), math.nan, device=DEVICE), torch.zeros(n, device=DEVICE)
        again = torch.full((n,), math.nan, device=DEVICE)
        fill(how, hidden, weight, offset, lse * LOG2E, targets, 0, SCALED, out, sums, again)
        assert ((out.double() - 0.7 * prob).abs() <= 0.7 * (prob * factor + math.exp(-60))).all()
        assert ((sums.double() - 1).abs() <= factor + vocab * (EPS + math.exp(-60))).all()
        assert ((again.double() / LOG2E - truth).abs() <= 2 * off).all()


@given(
    rows=st.integers(1, 600),
    vocab=st.integers(1, 2100),
    slots=st.integers(1, 300),
    most=st.integers(1, 400),
)
def test_splits_cover_the_vocabulary_within_bounds(rows, vocab, slots, most):
    splits = tiles.choose_splits(rows, vocab, slots, most)
    assert 1 <= splits <= min(vocab, most)
    assert -(-vocab // splits) * splits >= vocab


def odds(x):
    return x - torch.log1p(-x.exp())


# straight from the papers (cited in `rpo_kernels.losses`), for autograd; b beta, e epsilon, g gamma
PAPERS = {
    "sigmoid": lambda c, r, b, e, g: (
        -(1 - e) * logsigmoid(b * (c - r)) - e * logsigmoid(b * (r - c))
    ),
    "robust": lambda c, r, b, e, g: (
        (-(1 - e) * logsigmoid(b * (c - r)) + e * logsigmoid(b * (r - c))) / (1 - 2 * e)
    ),
    "hinge": lambda c, r, b, e, g: torch.clamp(1 - b * (c - r), min=0),
    "ipo": lambda c, r, b, e, g: (c - r - 1 / (2 * b)) ** 2,
    "exo_pair": lambda c, r, b, e, g: (
        torch.sigmoid(b * (c - r)) * (logsigmoid(b * (c - r)) - math.log(1 - e))
        + torch.sigmoid(b * (r - c)) * (logsigmoid(b * (r - c)) - math.log(e))
    ),
    "apo_zero": lambda c, r, b, e, g: 1 - torch.sigmoid(b * c) + torch.sigmoid(b * r),
    "apo_down": lambda c, r, b, e, g: torch.sigmoid(b * c) + 1 - torch.sigmoid(b * (c - r)),
    "sppo_hard": lambda c, r, b, e, g: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
    "nca_pair": lambda c, r, b, e, g: (
        -logsigmoid(b * c) - 0.5 * logsigmoid(-b * c) - 0.5 * logsigmoid(-b * r)
    ),
    "simpo": lambda c, r, b, e, g: (
        -(1 - e) * logsigmoid(b * (c - r) - g) - e * logsigmoid(g - b * (c - r))
    ),
    "orpo": lambda c, r, b, e, g: -b * logsigmoid(odds(c) - odds(r)),
    "cpo": lambda c, r, b, e, g: -(1 - e) * logsigmoid(b * (c - r)) - e * logsigmoid(b * (r - c)),
}
BETA, EPSILON, GAMMA, WEIGHT, PAIRS, TOKENS = (
    0.125,
    0.0625,
    0.75,
    0.25,
    5.0,
    40.0,
)  # exact in float32


def tail_truth(logps, counts, ref, loss_type, reduction):
    """`pairs`, and by autograd `coef`, in float64; and how far float32 may be off."""
    x = logps.double().requires_grad_()
    sums = torch.stack([part.sum() for part in x.split(counts)]).float().double()
    length = torch.tensor(counts, dtype=torch.float64, device=x.device).clamp(min=1)
    live = torch.tensor(counts, device=x.device).view(2, -1).sum(0) > 0
    q = sums if ref is None else sums - ref.double()
    q = torch.where(live.repeat(2), q, 0.0)
    if loss_type in ("ipo", "simpo", "orpo"):
        q = q / length
    (c, r), (s_c, s_r), half = q.view(2, -1), sums.view(2, -1), len(counts) // 2
    safe = -1.0 - torch.arange(half, dtype=torch.float64, device=x.device)
    c, r = torch.where(live, c, safe), torch.where(live, r, safe)
    value = torch.where(live, PAPERS[loss_type](c, r, BETA, EPSILON, GAMMA), 0.0)
    sft = -s_c / length[:half] if reduction == "sequence_mean" else -s_c
    total = value.sum() / PAIRS + WEIGHT * sft.sum() / (
        TOKENS if reduction == "token_mean" else PAIRS
    )
    slopes = torch.autograd.grad(value.sum(), q, retain_graph=True)[0].view(2, -1)
    total.backward()
    rewards = [torch.where(live, BETA * part, 0.0) for part in (c, r)]
    pairs = torch.stack([value, sft, s_c, s_r, *rewards], 1).detach()
    # sums, in float64, are rounded once; references are taken off, and lengths divided by, after
    most = sums.abs() + (0 if ref is None else ref.double().abs())
    far = (most / length if loss_type in ("ipo", "simpo", "orpo") else most).detach().view(2, -1)
    limits = loss_limits(
        loss_type, *far, BETA, EPSILON, GAMMA, (value.detach(), *slopes), torch.float32
    )
    pair_limits = [limits[0], *(2 * EPS * x.detach().abs() for x in (sft, s_c, s_r))]
    pair_limits += [4 * EPS * BETA * x for x in far]
    share = torch.cat(limits[1:]) / PAIRS + ROUNDINGS * EPS * WEIGHT / PAIRS
    coef_limits = torch.cat([one.expand(count) for one, count in zip(share, counts, strict=True)])
    return (pairs, x.grad), (torch.stack(pair_limits, 1), coef_limits)


def assert_tail(found, truth):
    """`pairs` and `coef` within the roundings of a loss."""
    for one, want, limit in zip(found, *truth, strict=True):
        assert ((one.double() - want).abs() <= limit).all(), (one, want, limit)


def make_tail(counts, seed=0):
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(sum(counts), generator=g).mul(2).to(DEVICE) - 0.01
    ref = torch.stack([part.sum() for part in logps.split(counts)]) + torch.randn(
        len(counts), generator=g
    ).to(DEVICE)
    offsets = torch.tensor([0, *counts], device=DEVICE).cumsum(0)
    return logps, offsets, ref


def run_tail(logps, offsets, ref, loss_type, reduction, pairs=PAIRS, tokens=TOKENS):
    objective = Objective(loss_type, BETA, EPSILON, GAMMA, WEIGHT, reduction, pairs, tokens)
    return backend.tail(logps, offsets, ref, objective)


@pytest.mark.parametrize("with_ref", [True, False])
@pytest.mark.parametrize("reduction", SFT_REDUCTIONS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_tail(loss_type, reduction, with_ref):
    if with_ref and not LOSSES[loss_type].reference:
        pytest.skip("reference-free loss")
    # long, ordinary, empty chosen, empty rejected, empty pair; ORPO's odds need both sides
    counts = [1500, 7, 0, 4, 0, 3, 11, 5, 0, 0] if loss_type != "orpo" else [1500, 7, 0, 3, 11, 0]
    logps, offsets, ref = make_tail(counts)
    ref = ref if with_ref else None
    pairs, coef = run_tail(logps, offsets, ref, loss_type, reduction)
    assert_tail((pairs, coef), tail_truth(logps, counts, ref, loss_type, reduction))
    dead = len(counts) // 2 - 1
    assert (pairs[dead] == 0).all()


@pytest.mark.parametrize("counts", [[3, 2], [1, 1], [0, 0], [1025, 1024], []])
def test_tail_of_one_pair_or_none(counts):
    logps, offsets, ref = (
        make_tail(counts) if counts else (torch.empty(0), torch.zeros(1, dtype=torch.int64), None)
    )
    logps, offsets = logps.to(DEVICE), offsets.to(DEVICE)
    pairs, coef = run_tail(logps, offsets, ref, "sigmoid", "token_mean")
    assert pairs.shape == (len(counts) // 2, 6) and coef.shape == logps.shape
    if counts:
        assert_tail((pairs, coef), tail_truth(logps, counts, ref, "sigmoid", "token_mean"))


@pytest.mark.parametrize("smoothing", [0.0, EPSILON])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_tail_of_impossible_tokens(loss_type, smoothing):
    """A log-prob of -inf, chosen and rejected: what the torch backend says."""
    if (loss_type == "exo_pair" and not smoothing) or (
        smoothing and not LOSSES[loss_type].smoothing
    ):
        pytest.skip("not defined")
    logps, offsets, ref = make_tail([3, 4, 5, 6])
    logps[1], logps[-1] = -math.inf, -math.inf
    ref = ref if LOSSES[loss_type].reference else None
    objective = Objective(loss_type, BETA, smoothing, GAMMA, WEIGHT, "sum", PAIRS, TOKENS)
    found, wanted = (
        module.tail(logps, offsets, ref, objective) for module in (backend, torch_backend)
    )
    both = 2 * ROUNDINGS * EPS  # of either
    torch.testing.assert_close(found, wanted, equal_nan=True, rtol=both, atol=both)


def test_loss_is_exactly_ln_2_against_itself():
    counts = [900, 33, 41, 1200]
    logps, offsets, _ = make_tail(counts)
    pairs, _ = run_tail(logps, offsets, None, "sigmoid", "sum")
    again, _ = run_tail(logps, offsets, pairs[:, 2:4].t().reshape(-1), "sigmoid", "sum")
    assert (again[:, 0] == torch.tensor(math.log(2), dtype=torch.float32, device=DEVICE)).all()
    assert (again[:, 4:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", [backend, torch_backend], ids=["triton", "torch"])
def test_scaling_in_place(how, dtype, monkeypatch):
    """More elements than the programs take at once; 1 changes nothing, NaN everything."""
    monkeypatch.setattr(tiles, "SCALE_BLOCK", 64)
    size = 9 * 8 * tiles.of_device(torch.device(DEVICE))[1] * 64 + 3
    given = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    for factor in (1.0, 0.5, -4.0, 0.0, math.nan):
        found = given.clone()
        how.scale_(found, torch.tensor(factor, device=DEVICE))
        torch.testing.assert_close(found, given * factor, rtol=0, atol=0, equal_nan=True)
    strided = torch.randn(20, 33, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).t()
    found = strided.clone()
    assert not found.is_contiguous()
    how.scale_(found, torch.tensor(2.0, device=DEVICE))
    assert torch.equal(found, 2 * strided)


def test_supports():
    for dtype in DTYPES:
        backend.supports(torch.empty(1, dtype=dtype, device=DEVICE))
    with pytest.raises(RuntimeError, match="float64; pass backend='torch'"):
        backend.supports(torch.empty(1, dtype=torch.float64, device=DEVICE))


def run_python(code, **environment):
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=base | environment, check=True)


def test_cpu_tensors_need_the_interpreter():
    run_python(
        "import torch\n"
        "from rpo_kernels.backends import triton_backend as backend\n"
        "try: backend.supports(torch.empty(1))\n"
        "except RuntimeError as e: assert 'TRITON_INTERPRET=1' in str(e), e\n"
        "else: raise SystemExit('accepted a CPU tensor')"
    )


def test_import_needs_no_triton():
    run_python("import sys; sys.modules['triton'] = None; import rpo_kernels, rpo_kernels.backends")
