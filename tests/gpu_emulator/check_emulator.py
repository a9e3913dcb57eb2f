"""The emulator itself: right results of small kernels, and a fault for each planted mistake.

    python -m pytest -p tests.gpu_emulator.plugin --sm 90 tests/gpu_emulator/check_emulator.py

A mistake is either in a kernel's source, or made in its bytecode: an instruction is dropped, or its
address shifted.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.gpu_emulator.bytecode import FAULTS, OPS
from tests.gpu_emulator.launcher import LaunchError

KINDS = dict(FAULTS)


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < (n if MASKED else 1 << 30)
    tl.store(out + offs, tl.load(x + offs, mask=mask) + tl.load(y + offs, mask=mask), mask=mask)


@triton.jit
def functions(x, out, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(x + offs)
    i = (a * 100).to(tl.int32)
    halves = a.to(tl.float16).to(tl.float32) + a.to(tl.bfloat16).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32) + tl.sum(a) + tl.max(a) + tl.min(a)
    tl.store(out + offs, tl.exp(a) + tl.log(tl.abs(a) + 1) + tl.sqrt(tl.abs(a)))
    tl.store(out + BLOCK + offs, (i // 7 + i % 5).to(tl.float32))
    tl.store(out + 2 * BLOCK + offs, tl.cumsum(a, 0))
    tl.store(out + 3 * BLOCK + offs, halves)
    tl.store(out + 4 * BLOCK + offs, sums)


@triton.jit
def matmul(
    a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        mask_a = (rows[:, None] < M) & (k[None, :] < K)
        mask_b = (k[:, None] < K) & (columns[None, :] < N)
        left = tl.load(a + rows[:, None] * K + k[None, :], mask=mask_a, other=0.0)
        right = tl.load(b + k[:, None] * N + columns[None, :], mask=mask_b, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(c + rows[:, None] * N + columns[None, :], acc, mask=mask)


@triton.jit
def described_matmul(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """``c (BM, BN) = a (BM, K) @ b (BN, K)^T`` through tensor descriptors."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([0, k]), b.load([0, k]).T, acc)
    tl.store(c + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


@triton.jit
def same_place(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def neighbour(x, out):
    i = tl.program_id(0)
    tl.store(out + i, i.to(tl.float32))
    tl.store(x + i, tl.load(out + (i + 1) % tl.num_programs(0)))


@triton.jit
def claimed_aligned(x, out, shift, BLOCK: tl.constexpr):
    offs = tl.multiple_of(shift + tl.arange(0, BLOCK), BLOCK)
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + offs))


@triton.jit
def described(x, out, M: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + offs, x.load([8, 16]))


def run_add(masked, out=slice(None)):
    add[(8,)](torch.ones(1000), torch.ones(1000), torch.zeros(1000)[out], 1000, 128, masked)


def run_functions():
    functions[(1,)](torch.ones(256), torch.zeros(5, 256), 256)


def run_matmul():
    a, b, c = torch.ones(64, 256).half(), torch.ones(256, 64).half(), torch.zeros(64, 64)
    matmul[(1, 1)](a, b, c, 64, 64, 256, 64, 64, 32, "ieee", num_warps=4, num_stages=3)


def run_described():
    a, b = torch.ones(128, 256).half(), torch.ones(64, 256).half()
    tiles = [TensorDescriptor(x, list(x.shape), [256, 1], [x.shape[0], 64]) for x in (a, b)]
    described_matmul[(1,)](*tiles, torch.zeros(128, 64), 256, 128, 64, 64, num_warps=4)


def take_kinds(driver) -> set[str]:
    """The kinds of the faults seen; forgets them."""
    found = {fault.kind for fault in driver.faults.values()}
    driver.faults.clear()
    return found


@contextlib.contextmanager
def planted(driver, kernel: str, opcode: str, drop: bool = True, shift: int = 0):
    """Drop every instruction of `kernel` that begins with `opcode`, or shift its address."""
    changed = 0
    programs = [f.program for f in driver.kernels.values() if f.name == kernel]
    before = [program.code.copy() for program in programs]
    for program in programs:
        for k, statement in enumerate(program.source):
            if statement.opcode.startswith(opcode):
                # the branch of a wait's loop goes with it
                last = k + 2 if opcode == "mbarrier.try_wait" else k + 1
                if drop:
                    program.code["op"][k:last] = OPS["NOP"]
                program.code["imm"][k] += shift
                changed += 1
    assert changed, f"{kernel} has no {opcode}"
    yield
    for program, code in zip(programs, before, strict=True):
        program.code[:] = code


def test_masked_additions_are_right(driver):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    add[(8,)](x, y, out, 1000, 128, True)
    assert torch.equal(out, x + y)


def test_functions(driver):
    x, out = torch.randn(256), torch.zeros(5, 256)
    functions[(1,)](x, out, 256)
    i = (x * 100).int()
    want = [
        x.exp() + (x.abs() + 1).log() + x.abs().sqrt(),
        (torch.div(i, 7, rounding_mode="trunc") + torch.fmod(i, 5)).float(),
        x.cumsum(0),
        x.half().float() + x.bfloat16().float(),
        (x.sum() + x.max() + x.min()).expand(256),
    ]
    for found, exact in zip(out, want, strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tile, warps, stages", [((64, 64, 32), 4, 3), ((128, 64, 64), 8, 2)])
@pytest.mark.parametrize(
    "dtype, precision, bits",
    [
        (torch.bfloat16, "ieee", 23),
        (torch.float16, "ieee", 23),
        (torch.float32, "ieee", 23),
        (torch.float32, "tf32", 10),
    ],
    ids=str,
)
def test_matmuls(driver, dtype, precision, bits, tile, warps, stages):
    """Operands of `bits` bits; a sum of 200 products, rounded at most 200 times."""
    a, b = torch.randn(150, 200).to(dtype), torch.randn(200, 136).to(dtype)
    c = torch.zeros(150, 136)
    grid = (triton.cdiv(150, tile[0]), triton.cdiv(136, tile[1]))
    matmul[grid](a, b, c, 150, 136, 200, *tile, precision, num_warps=warps, num_stages=stages)
    size = a.double().abs() @ b.double().abs()
    bound = size * (200 * 2.0**-23 + (2 * 2.0**-bits if bits < 23 else 0))
    assert ((c - a.double() @ b.double()).abs() <= bound).all()


def test_descriptors_fill_with_zeros(driver):
    base, out = torch.randn(20, 40).half(), torch.zeros(16, 32).half()
    described[(1,)](TensorDescriptor(base, [20, 40], [40, 1], [16, 32]), out, 16, 32)
    want = torch.zeros(16, 32).half()
    want[:12, :24] = base[8:, 16:]
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    "run, kinds",
    [
        (lambda: run_add(False), {"LOAD_OUTSIDE", "STORE_OUTSIDE"}),
        (lambda: run_add(True, slice(890)), {"STORE_PADDING"}),
        (lambda: same_place[(4,)](torch.zeros(1, dtype=torch.int32)), {"RACE_WRITES"}),
        (lambda: neighbour[(4,)](torch.zeros(4), torch.zeros(4)), {"RACE_READ_WRITE"}),
        (
            lambda: claimed_aligned[(1,)](torch.zeros(600), torch.zeros(512), 3, 512),
            {"LOAD_MISALIGNED"},
        ),
    ],
    ids=["bounds", "padding", "race of writes", "race of a read", "alignment"],
)
def test_mistakes_in_the_source(driver, run, kinds):
    run()
    assert take_kinds(driver) == {KINDS[kind] for kind in kinds}


# what is run; the kernel, its instructions and how far their address is shifted (None: dropped);
# one of the kinds must be seen; the oldest architecture that has them
PLANTED = {
    "missing barrier": (run_functions, "functions", "bar.sync", None, "SHARED_RACE_READ", 80),
    "uninitialized": (run_functions, "functions", "st.shared", None, "UNINITIALISED", 80),
    "shared bounds": (run_functions, "functions", "ld.shared", 2**20, "SHARED_OUTSIDE", 80),
    "shared alignment": (run_functions, "functions", "ld.shared", 1, "SHARED_MISALIGNED", 80),
    "global alignment": (run_functions, "functions", "st.global", 2, "STORE_MISALIGNED", 80),
    "no wait for copies": (run_matmul, "matmul", "cp.async.wait_group", None, "PENDING", 80),
    "matmul barrier": (run_matmul, "matmul", "bar.sync", None, "SHARED_RACE_READ", 80),
    "no wait for TMA": (
        run_described, "described_matmul", "mbarrier.try_wait", None, "PENDING", 90,
    ),
    "nothing arrives": (
        run_described, "described_matmul", "mbarrier.arrive", None, "DEADLOCK", 90,
    ),
    "no wait for products": (
        run_described, "described_matmul", "wgmma.wait_group", None, "WGMMA_REGISTER", 90,
    ),
    "no proxy fence": (run_matmul, "matmul", "fence.proxy", None, "NO_PROXY_FENCE", 90),
}  # fmt: skip


@pytest.mark.parametrize("label", PLANTED)
def test_planted_mistakes(driver, label):
    run, kernel, opcode, shift, kind, oldest = PLANTED[label]
    if driver.sm < oldest:
        pytest.skip(f"sm_{driver.sm} has no {opcode}")
    run()
    assert not take_kinds(driver)
    with planted(driver, kernel, opcode, shift is None, shift or 0):
        run()
    assert KINDS[kind] in take_kinds(driver)
    run()
    assert not take_kinds(driver)


def run_huge_tile():
    a, b, c = torch.zeros(256, 512).half(), torch.zeros(512, 256).half(), torch.zeros(256, 256)
    matmul[(1, 1)](a, b, c, 256, 256, 512, 256, 256, 128, "ieee", num_warps=8, num_stages=4)


@pytest.mark.parametrize(
    "run, words",
    [
        (lambda: same_place[(1, 70000)](torch.zeros(1, dtype=torch.int32)), "grid.y = 70000"),
        (run_huge_tile, "shared memory"),
    ],
    ids=["grid", "shared memory"],
)
def test_launches_that_a_device_refuses(driver, run, words):
    with pytest.raises((LaunchError, triton.runtime.errors.OutOfResources), match=words):
        run()
    take_kinds(driver)
