"""The Gluon kernels for Hopper: results within rounding bounds, when they are chosen, and that the
emulator sees what would break them.

What launches needs a Hopper GPU, or the emulator of one:

    python -m pytest -p tests.gpu_emulator.plugin --sm 90 tests/triton/test_gluon.py
"""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from rpo_kernels import fused_rpo_loss, oracle
from rpo_kernels.backends import choose_backend, gluon_hopper, tiles
from rpo_kernels.backends import triton_backend as backend
from rpo_kernels.backends import triton_kernels as kernels
from rpo_kernels.spec import Transform
from tests.support import (
    Problem,
    assert_within_plain_budget,
    differentiate,
    double,
    loss_budget,
    pairs,
    plain_rpo_loss,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = torch.finfo(torch.float32).eps
LOG2E = math.log2(math.e)
PLAIN, SCALED, CAPPED = Transform(), Transform(0.7), Transform(1.3, 30.0)
HOPPER = not kernels.INTERPRETED.value and tiles.of_device(DEVICE)[0] == "sm_90"
launches = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU or the emulator of one")


@pytest.fixture
def gluon(monkeypatch):
    """The Gluon kernels are asked for; the names of those that ran."""
    monkeypatch.setenv(gluon_hopper.VARIABLE, "gluon")
    ran, module = [], gluon_hopper.kernels()

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            ran.append(self.name)
            return getattr(module, self.name)[grid]

    names = ("exp_fused_hopper", "lse_partials_hopper")
    stand_in = SimpleNamespace(**{name: Recorder(name) for name in names})
    monkeypatch.setattr(gluon_hopper, "kernels", lambda: stand_in)
    return ran


@pytest.fixture
def two_programs(monkeypatch):
    """A chip of two multiprocessors: each program walks over several tiles."""
    monkeypatch.setattr(tiles, "of_device", lambda device: ("sm_90", 2))


def make(n, vocab, width, dtype, bias=True, seed=0):
    """Hidden states, weight, bias and targets; rows lie further apart than they are wide."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width + 8, generator=g).to(DEVICE, dtype)[:, :width]
    weight = (3 * torch.randn(vocab, width + 16, generator=g) / width**0.5).to(DEVICE, dtype)
    offset = torch.randn(vocab, generator=g).to(DEVICE, dtype) if bias else None
    targets = torch.randint(vocab, (n,), generator=g).to(DEVICE)
    return hidden, weight[:, :width], offset, targets


def exact(hidden, weight, bias, transform):
    """Base-2 logits ``y (n, V)`` in float64, ``dz/dx``, and how far rounding may put a ``y`` off.

    A product of D terms is off by at most D roundings of ``|h| |w|``, each of them one eps since
    matrix units cut off; the bias, the scale and the hyperbolic tangent add a few.
    """
    h, w = hidden.double(), weight.double()
    size = h.abs() @ w.abs().t()
    x = h @ w.t()
    if bias is not None:
        x, size = x + bias.double(), size + bias.double().abs()
    scale, cap = transform
    off = abs(scale) * (h.shape[1] + 8) * EPS * size
    z = scale * x
    slope = torch.full_like(z, scale)
    if cap is not None:
        z = cap * torch.tanh(z / cap)
        slope, off = scale * (1 - (z / cap) ** 2), off + 8 * EPS * cap
    return LOG2E * z, slope, LOG2E * (off + 4 * EPS * z.abs())


def assert_within(found, truth, limit):
    gap = (found.double() - truth).abs()
    assert not found.isnan().any()
    assert (gap <= limit).all(), f"{(gap - limit).max():.3e} beyond the bound"


def check_panel(n, p, width, dtype, transform, bias, v0=131):
    """`exp_panel` of p entries from v0 on into a strided buffer, whose surroundings stay, but for
    the padding of its rows.
    """
    hidden, weight, offset, targets = make(n, v0 + p + 50, width, dtype, bias)
    y, slope, off = (x[:, v0 : v0 + p] for x in exact(hidden, weight, offset, transform))
    shift = y.amax(1).float() - 1
    wide = -(-n // 16) * 16
    buffer = torch.full((p + 2, wide), math.nan, dtype=dtype, device=DEVICE)
    sums, picked = torch.ones(n, device=DEVICE), torch.full((n,), -7.0, device=DEVICE)
    part = None if offset is None else offset[v0 : v0 + p]
    out = buffer[1:-1, :n]
    panel = weight[v0 : v0 + p]
    backend.exp_panel(
        hidden, panel, part, shift, targets, v0, transform, out, sums=sums, target=picked
    )
    assert buffer[[0, -1]].isnan().all()

    exponent = y - shift[:, None].double()
    off = off + 2 * EPS * (y.abs() + shift[:, None].double().abs())
    e, relative = exponent.exp2(), torch.expm1(math.log(2) * off) + 4 * EPS
    bend = 0 if transform.softcap is None else 4 * off / LOG2E / transform.softcap + 8 * EPS
    limit = e * (slope.abs() * (relative + torch.finfo(dtype).eps) + bend)
    assert_within(out.t(), e * slope, limit + torch.finfo(dtype).tiny)
    total = e.sum(1)
    assert_within(sums, 1 + total, (e * relative).sum(1) + (p + 2) * EPS * (1 + total))
    inside = (targets >= v0) & (targets < v0 + p)
    index = (targets - v0)[inside, None]
    assert (picked[~inside] == -7).all()
    assert_within(
        picked[inside], exponent[inside].gather(1, index)[:, 0], off[inside].gather(1, index)[:, 0]
    )


def check_sums(n, vocab, width, dtype, transform, bias, max_bytes=2**20):
    """`lse_and_target`, rows without a target among the others."""
    hidden, weight, offset, targets = make(n, vocab, width, dtype, bias)
    targets[n // 2], targets[n // 3], targets[n // 4] = -1, vocab, vocab + 300
    shift, sums, target = backend.lse_and_target(
        hidden, weight, offset, targets, transform, max_bytes
    )
    y, _, off = exact(hidden, weight, offset, transform)
    worst = off.amax(1) + (vocab + 8) * EPS + 4 * EPS * y.abs().amax(1)
    found = shift.double() + sums.double().log2()
    assert_within(found, (y * math.log(2)).logsumexp(1) * LOG2E, worst)
    rows = ((targets >= 0) & (targets < vocab)).nonzero()[:, 0]
    picked = y[rows, targets[rows]]
    assert_within(target.double()[rows] + shift[rows], picked, 2 * worst[rows])


@launches
@pytest.mark.parametrize(
    "dtype, transform, bias",
    [
        (torch.bfloat16, PLAIN, False),
        (torch.bfloat16, SCALED, True),
        (torch.bfloat16, CAPPED, True),
        (torch.float16, CAPPED, True),
        (torch.float16, SCALED, False),
    ],
)
def test_results(gluon, two_programs, dtype, transform, bias):
    """Ragged rows, entries and columns; several tiles a program."""
    check_panel(530, 331, 328, dtype, transform, bias)
    check_sums(530, 431, 328, dtype, transform, bias)
    assert gluon == ["exp_fused_hopper", "lse_partials_hopper"]


@launches
@pytest.mark.parametrize("width", [8, 128, 136, 576])
def test_every_number_of_steps(gluon, two_programs, width):
    """Tiles shorter than the ring, as long, and longer: neither a deadlock nor a slot mixed up."""
    check_panel(300, 300, width, torch.bfloat16, PLAIN, False)
    check_sums(300, 300, width, torch.bfloat16, PLAIN, False, max_bytes=1)
    assert set(gluon) == {"exp_fused_hopper", "lse_partials_hopper"}


@launches
@pytest.mark.parametrize("n, p", [(1, 1), (128, 128), (257, 129), (16, 31)])
def test_edges(gluon, n, p):
    check_panel(n, p, 64, torch.bfloat16, PLAIN, False)
    check_sums(n, p, 64, torch.bfloat16, PLAIN, False)
    assert len(gluon) == 2


@launches
def test_infinite_and_undefined_logits(gluon):
    """A NaN stays in its row; rows of -inf sum to 0."""
    hidden, weight, _, targets = make(40, 200, 64, torch.bfloat16, False)
    hidden[3] = math.nan
    offset = torch.full((200,), -math.inf, dtype=torch.bfloat16, device=DEVICE)
    for bias, empty in ((None, False), (offset, True)):
        shift, sums, _ = backend.lse_and_target(hidden, weight, bias, targets, PLAIN, 2**20)
        out = torch.zeros(200, 48, dtype=torch.bfloat16, device=DEVICE)[:, :40]
        total = torch.zeros(40, device=DEVICE)
        backend.exp_panel(hidden, weight, bias, shift, targets, 0, PLAIN, out, sums=total)
        for result in (sums, total, out.sum(0)):
            assert result.isnan().nonzero()[:, 0].tolist() == [3]
            assert not empty or (result[result.isfinite()] == 0).all()


def loss_of(function, **options):
    def inner(p):
        out = function(p.hidden, p.weight, p.labels, p.ref_logps, eta=0.5, **options)
        return out.loss if hasattr(out, "loss") else out

    return inner


@launches
@pytest.mark.parametrize("strategy", ["stream", "recompute"])
def test_the_public_loss(gluon, strategy):
    problem = pairs(32, 2, 29, 40, 333, torch.bfloat16)
    problem = Problem(*(x if x is None else x.to(DEVICE) for x in problem))
    found = differentiate(loss_of(fused_rpo_loss, strategy=strategy, backend="triton"), problem)
    plain = differentiate(loss_of(plain_rpo_loss), problem)
    truth = differentiate(loss_of(oracle.rpo_loss), double(problem))
    gap = abs(found.pop("out").double() - truth.pop("out"))
    assert gap <= loss_budget(problem, eta=0.5)
    del plain["out"]
    assert_within_plain_budget(found, plain, truth)
    assert set(gluon) == {"exp_fused_hopper", "lse_partials_hopper"}


def run_panel():
    """A launch whose results nobody looks at: 6 tiles, 2 programs, 4 steps a tile."""
    hidden, weight, _, targets = make(530, 200, 256, torch.bfloat16, False)
    out = torch.zeros(200, 544, dtype=torch.bfloat16)[:, :530]
    backend.exp_panel(hidden, weight, None, torch.zeros(530), targets, 0, PLAIN, out)


# instructions dropped (None), or their immediate shifted; one of the kinds must be seen
PLANTED = {
    "registers are not given back": ("setmaxnreg.dec", None, "DEADLOCK"),
    "an odd number of registers": ("setmaxnreg.inc", 4, "BAD_REGISTERS"),
    "a buffer is not waited for": ("cp.async.bulk.wait_group", None, "STORE_OPERAND"),
    "stores at the end are not waited for": ("cp.async.bulk.wait_group", None, "UNWAITED"),
    "no fence before a store": ("fence.proxy", None, "NO_PROXY_FENCE"),
    "no slot is released": ("mbarrier.arrive.shared", None, "DEADLOCK"),
    "slots are not waited for": ("mbarrier.try_wait", None, "PENDING"),
    "no barriers within a consumer": ("bar.sync", None, "SHARED_RACE_READ"),
    "two barriers share a number": ("barrier.sync", -1, "BAD_BARRIER"),
    "products are not waited for": ("wgmma.wait_group", None, "WGMMA_REGISTER"),
}


@launches
@pytest.mark.parametrize("label", PLANTED)
def test_planted_mistakes_are_seen(gluon, two_programs, request, label):
    if DEVICE.type == "cuda":
        pytest.skip("a GPU would hang, or say nothing")
    from tests.gpu_emulator.bytecode import FAULTS
    from tests.gpu_emulator.check_emulator import planted, take_kinds

    driver = request.getfixturevalue("driver")
    opcode, shift, kind = PLANTED[label]
    run_panel()
    assert not take_kinds(driver)
    with planted(driver, "exp_fused_hopper", opcode, shift is None, shift or 0):
        run_panel()
    assert dict(FAULTS)[kind] in take_kinds(driver)
    run_panel()
    assert not take_kinds(driver)


@launches
def test_a_store_beyond_a_ragged_end_is_seen(gluon, request, monkeypatch):
    """TMA writes whole units of 16 bytes: where a panel is said to end inside of one, what lies
    behind it is overwritten.
    """
    if DEVICE.type == "cuda":
        pytest.skip("a GPU says nothing")
    from tests.gpu_emulator.check_emulator import take_kinds

    driver = request.getfixturevalue("driver")
    hidden, weight, _, targets = make(34, 200, 64, torch.bfloat16, False)
    buffer = torch.full((200, 48), 7, dtype=torch.bfloat16)
    given = hidden, weight, None, torch.zeros(34), targets, 0, PLAIN, buffer[:, :34], None, None
    monkeypatch.setattr(gluon_hopper, "reach_of", lambda out: out.shape[1])
    gluon_hopper.exp_panel(*given)
    assert any("belong to no tensor argument" in kind for kind in take_kinds(driver))
    assert (buffer[:, 34:40] != 7).all() and (buffer[:, 40:] == 7).all()


@launches
def test_the_order_of_warps_does_not_matter(gluon, two_programs):
    """The same bits each time; the emulator lets warps run in another order at every launch."""
    hidden, weight, _, targets = make(530, 300, 256, torch.bfloat16, False)
    results = []
    for _ in range(3):
        shift, sums, target = backend.lse_and_target(hidden, weight, None, targets, PLAIN, 2**20)
        out = torch.zeros(300, 544, dtype=torch.bfloat16, device=DEVICE)[:, :530]
        backend.exp_panel(hidden, weight, None, shift, targets, 0, PLAIN, out)
        results.append((shift, sums, target, out))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_what_stays_with_the_other_kernels(monkeypatch):
    """Misaligned or wider operands, a panel whose padding is another's, a negative scale; all of it
    where that is asked for.
    """

    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.bfloat16, device=DEVICE)

    hidden, weight, out = zeros(64, 40), zeros(64, 40), zeros(64, 64)
    monkeypatch.setenv(gluon_hopper.VARIABLE, "triton")
    assert not gluon_hopper.takes_panel(hidden, weight, out)
    assert not gluon_hopper.takes_sums(hidden, weight, PLAIN)
    monkeypatch.setenv(gluon_hopper.VARIABLE, "gluon")
    assert gluon_hopper.takes_panel(hidden, weight, out)
    assert gluon_hopper.takes_sums(hidden, weight, CAPPED)
    assert not gluon_hopper.takes_sums(hidden, weight, Transform(-1.0))
    assert gluon_hopper.takes_sums(hidden, weight, Transform(-1.0, 30.0))
    assert gluon_hopper.takes_panel(hidden[:50], weight, out[:, :50])
    assert gluon_hopper.takes_panel(hidden[:40], weight, out[:, :40])  # TMA stores end at n
    assert not gluon_hopper.takes_panel(hidden[:34], weight, out[:, :34])
    odd = zeros(64, 44)
    for other in (odd[:, :40], odd[:, 4:], zeros(64, 41)[:, :40]):
        assert not gluon_hopper.takes_sums(other, weight, PLAIN)
        assert not gluon_hopper.takes_panel(hidden, other, out)
        assert not gluon_hopper.takes_panel(hidden, weight, other)
    assert not gluon_hopper.takes_panel(hidden, weight, out.float())
    assert not gluon_hopper.takes_panel(hidden.float(), weight.float(), out.float())
    assert not gluon_hopper.takes_sums(hidden.float(), weight.float(), PLAIN)


def test_a_choice_that_does_not_exist(monkeypatch):
    monkeypatch.setenv(gluon_hopper.VARIABLE, "glueon")
    with pytest.raises(ValueError, match="RPO_KERNELS_HOPPER: .*triton, gluon, got 'glueon'"):
        gluon_hopper.check(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("value", ["", "triton"])
def test_the_default(monkeypatch, value):
    monkeypatch.setenv(gluon_hopper.VARIABLE, value)
    monkeypatch.setattr(tiles, "of_device", lambda device: ("sm_80", 108))
    gluon_hopper.check(torch.zeros(1, device=DEVICE))
    assert not gluon_hopper.wanted()


@pytest.mark.parametrize(
    ("family", "version", "takes"),
    [
        ("sm_90", "3.6.0", True), ("sm_90", "3.8.1+git", True), ("sm_90", "3.5.2", False),
        ("sm_90", "3.9.0", False), ("sm_80", "3.7.1", False),
    ],
)  # fmt: skip
def test_hopper_takes_them_unasked_with_a_triton_they_were_tested_with(
    monkeypatch, family, version, takes
):
    monkeypatch.delenv(gluon_hopper.VARIABLE, raising=False)
    monkeypatch.setattr(tiles, "of_device", lambda device: (family, 132))
    monkeypatch.setattr(gluon_hopper, "tested", gluon_hopper.tested.__wrapped__)
    monkeypatch.setattr(gluon_hopper, "triton", SimpleNamespace(__version__=version))
    half = torch.zeros(64, 64, dtype=torch.bfloat16, device=DEVICE)
    assert gluon_hopper.takes_panel(half, half, half) == takes
    assert gluon_hopper.takes_sums(half, half, PLAIN) == takes
    single = half.float()
    assert not gluon_hopper.takes_panel(single, single, single)


def test_other_devices_are_refused(monkeypatch):
    monkeypatch.setenv(gluon_hopper.VARIABLE, "gluon")
    monkeypatch.setattr(tiles, "of_device", lambda device: ("sm_80", 108))
    with pytest.raises(RuntimeError, match="compute capability 9.0, got sm_80; unset"):
        gluon_hopper.check(torch.zeros(1, device=DEVICE))


def test_another_triton_is_refused_only_where_gluon_is_asked_for(monkeypatch):
    monkeypatch.setattr(tiles, "of_device", lambda device: ("sm_90", 132))
    monkeypatch.setitem(sys.modules, "rpo_kernels.backends.gluon_kernels", None)
    monkeypatch.delattr("rpo_kernels.backends.gluon_kernels", raising=False)
    monkeypatch.setattr(gluon_hopper, "kernels", gluon_hopper.kernels.__wrapped__)
    gluon_hopper.check(torch.zeros(1, device=DEVICE))
    monkeypatch.setenv(gluon_hopper.VARIABLE, "gluon")
    with pytest.raises(RuntimeError, match="expected a Triton with Gluon .* unset"):
        gluon_hopper.check(torch.zeros(1, device=DEVICE))


@pytest.mark.skipif(not kernels.INTERPRETED.value, reason="needs the interpreter")
def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv(gluon_hopper.VARIABLE, "gluon")
    with pytest.raises(RuntimeError, match="got interpreter; unset RPO_KERNELS_HOPPER"):
        choose_backend("triton", torch.zeros(1))
