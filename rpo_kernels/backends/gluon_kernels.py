"""The two matmul kernels for Hopper in Gluon, Triton's language of explicit layouts and barriers.

`gluon_hopper` launches them; they compute what `exp_fused` and `lse_partials` of `triton_kernels`
do, and share their key, their base-2 logits and their tile, 256 rows x 128 vocabulary entries. One
program an SM walks over many tiles with three kinds of warps, whose only talk is by mbarriers:

    producer, 1 warp, 24 registers      TMA    H rows 0..127 | H rows 128..255 | W   of 64 columns
        │ full[slot]          ▲ empty[slot]                     into a ring of STAGES such slots
        ▼                     │
    consumer 0, 4 warps, 240 registers     wgmma H[:128] · W^T   wgmma ...  | epilogue | wgmma ...
    consumer 1, 4 warps, 240 registers            wgmma H[128:] · W^T   ... wgmma | epilogue | wg
                                           ─ LAG ─▶

Consumer 1 starts a tile LAG slots after consumer 0 (barrier `lead`), so while one is in its
epilogue the other has the tensor cores for itself, and the ring's slack absorbs the difference.
Both read the same slots of W. Two consumers with a tile each, in strict turns, hide the epilogue as
well but load W twice: 64 KiB where this loads 48, for the same 1,024 tensor-core cycles.

An element costs one FFMA and one EX2, and the FADD of the row's sum: ``2^(outer x - c)`` with the
scale folded in. EX2 flushes denormals. What leaves `exp_fused_hopper` goes through a buffer of 32
vocabulary entries and a TMA store, which drops what lies outside of the panel; so nothing but the
row vectors is masked, at any n.

Rows, vocabulary entries and columns beyond the end arrive as zeros.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LOWEST: gl.constexpr = gl.constexpr(-1.0e38)
PARTS: gl.constexpr = gl.constexpr(4)  # of a tile's columns, through the output buffer one by one


@gluon.jit
def _tanh(x):
    square = x * x
    odd = 1.33314422036e-1 + square * (
        -5.37397155531e-2 + square * (2.06390887954e-2 - 5.70498872745e-3 * square)
    )
    near = x + x * square * (-3.33332819422e-1 + square * odd)
    far = 1 - 2 / (gl.exp2(x * (2 * LOG2E)) + 1)
    return gl.where(gl.abs(x) < 0.625, near, far)


@gluon.jit
def _capped(x, v, stop, bias, inner):
    """``tanh(inner * (x + bias))``, or without the tanh, of ``x (n, v)``."""
    if bias is not None:
        columns: gl.constexpr = gl.SliceLayout(0, x.type.layout)
        offs_v = gl.minimum(v + gl.arange(0, x.shape[1], columns), stop - 1)
        x += gl.load(bias + offs_v).to(gl.float32)[None, :]
    if inner is not None:
        x = _tanh(x * inner)
    return x


@gluon.jit
def _halves(x):
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(x, (rows, 2, columns)), (0, 2, 1)))


@gluon.jit
def _quarters(acc):
    left, right = _halves(acc)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@gluon.jit
def _spot(job, blocks_n, splits, ROWS_FIRST: gl.constexpr, GROUP: gl.constexpr):
    """Block of rows and split of job number `job`; GROUP of the one take turns on each other."""
    blocks, others = splits, blocks_n
    if ROWS_FIRST:
        blocks, others = blocks_n, splits
    first = job // (GROUP * others) * GROUP
    size = gl.minimum(blocks - first, GROUP)
    inside = job % (GROUP * others)
    block, other = first + inside % size, inside // size
    if ROWS_FIRST:
        return block, other
    else:
        return other, block


@gluon.jit
def _produce(
    hidden, weight, ring, n, V, span, splits, D: gl.constexpr, ROWS_FIRST: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Load the slots of every job in order, as fast as the consumers empty them."""
    rows0, rows1, entries, full, empty, _ = ring
    BLOCK: gl.constexpr = hidden.block_shape[0]
    BLOCK_D: gl.constexpr = hidden.block_shape[1]
    STAGES: gl.constexpr = full.shape[0]
    blocks_n = gl.cdiv(n, 2 * BLOCK)
    step = 0
    for job in range(gl.program_id(0), blocks_n * splits, gl.num_programs(0)):
        pid_n, split = _spot(job, blocks_n, splits, ROWS_FIRST, GROUP)
        i = pid_n * 2 * BLOCK
        start = split * span
        for v in range(start, gl.minimum(start + span, V), BLOCK):
            for d in range(0, D, BLOCK_D):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), (step // STAGES + 1) & 1)
                bar = full.index(slot)
                mbarrier.expect(bar, 3 * hidden.block_type.nbytes)
                tma.async_copy_global_to_shared(hidden, [i, d], bar, rows0.index(slot))
                tma.async_copy_global_to_shared(weight, [v, d], bar, entries.index(slot))
                tma.async_copy_global_to_shared(hidden, [i + BLOCK, d], bar, rows1.index(slot))
                step += 1


@gluon.jit
def _multiply_span(acc, step, rows, entries, full, empty, d0, d1, BLOCK_D: gl.constexpr):
    """Add columns d0 to d1 to ``acc (n, v)``; one product stays under way."""
    STAGES: gl.constexpr = full.shape[0]
    for d in range(d0, d1, BLOCK_D):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        acc = warpgroup_mma(
            rows.index(slot), entries.index(slot).permute([1, 0]), acc, use_acc=d > 0, is_async=True
        )
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=d > 0)
        step += 1
    return acc, step


@gluon.jit
def _multiply(WHO: gl.constexpr, ring, step, tile, D: gl.constexpr, LAG: gl.constexpr):
    """Products ``H W^T (n, v)`` of consumer `WHO` for the tile number `tile`, and the next step."""
    rows0, rows1, entries, full, empty, lead = ring
    BLOCK: gl.constexpr = rows0.shape[1]
    BLOCK_D: gl.constexpr = rows0.shape[2]
    STAGES: gl.constexpr = full.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    acc = gl.zeros([BLOCK, BLOCK], gl.float32, layout)
    if WHO == 0:
        acc, step = _multiply_span(
            acc, step, rows0, entries, full, empty, 0, LAG * BLOCK_D, BLOCK_D
        )
        if LAG > 0:
            mbarrier.arrive(lead, count=1)
        acc, step = _multiply_span(
            acc, step, rows0, entries, full, empty, LAG * BLOCK_D, D, BLOCK_D
        )
    else:
        if LAG > 0:
            mbarrier.wait(lead, tile & 1)
        acc, step = _multiply_span(acc, step, rows1, entries, full, empty, 0, D, BLOCK_D)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return acc, step


@gluon.jit
def _store_part(x, v, i, low, wanted, any_wanted, bias, out, buffer, p, inner, outer, slope):
    """From ``x (n, v)``, a part of the tile, to its place in the panel; the row sums, and ``y - c``
    of the entry ``wanted (n,)`` where it is here.
    """
    layout: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    low = gl.convert_layout(low, layout, assert_trivial=True)
    capped = _capped(x, v, p, bias, inner)
    exponent = capped * outer - low[:, None]
    offs_v = v + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    if v + x.shape[1] > p:
        exponent = gl.where((offs_v < p)[None, :], exponent, float("-inf"))
    picked = gl.zeros([x.shape[0]], gl.float32, layout)
    if any_wanted:
        here = gl.convert_layout(wanted, layout, assert_trivial=True)[:, None] == offs_v[None, :]
        picked = gl.sum(gl.where(here, exponent, 0.0), 1)
    e = gl.exp2(exponent)
    total = gl.sum(e, 1)
    if inner is not None:
        e = e * (slope * (1 - capped * capped))
    elif slope is not None:
        e = e * slope
    tma.store_wait(1)  # of the two buffers one is still read
    buffer.permute([1, 0]).store(e.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [v, i], buffer)
    return total, picked


@gluon.jit
def _fill(
    WHO: gl.constexpr, ring, buffers, given,
    D: gl.constexpr, LAG: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Consumer `WHO` of `exp_fused_hopper`."""
    out, bias, shift, targets, part_sum, target, n, p, v0, splits, inner, outer, slope = given
    BLOCK: gl.constexpr = buffers.shape[2]
    PART: gl.constexpr = BLOCK // PARTS
    layout: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    )
    blocks_n = gl.cdiv(n, 2 * BLOCK)
    step = 0
    tile = 0
    for job in range(gl.program_id(0), blocks_n * splits, gl.num_programs(0)):
        pid_n, pid_v = _spot(job, blocks_n, splits, False, GROUP)
        v = pid_v * BLOCK
        i = (2 * pid_n + WHO) * BLOCK
        offs_n = i + gl.arange(0, BLOCK, layout)
        mask_n = offs_n < n
        low = gl.load(shift + offs_n, mask=mask_n, other=0.0)
        wanted = gl.full([BLOCK], -1, gl.int32, layout)
        if target is not None:
            wanted = (gl.load(targets + offs_n, mask=mask_n, other=-1) - v0).to(gl.int32)
        acc, step = _multiply(WHO, ring, step, tile, D, LAG)
        tile += 1
        hit = (wanted >= v) & (wanted < gl.minimum(v + BLOCK, p))
        any_hit = False
        if target is not None:
            any_hit = gl.max(hit.to(gl.int32), 0) > 0
        picked = gl.zeros([BLOCK], gl.float32, layout)
        total = gl.zeros([BLOCK], gl.float32, layout)
        quarters = _quarters(acc)
        for k in gl.static_range(PARTS):
            sums, found = _store_part(
                quarters[k], v + k * PART, i, low, wanted, any_hit, bias, out, buffers.index(k % 2),
                p, inner, outer, slope,
            )  # fmt: skip
            total += gl.convert_layout(sums, layout, assert_trivial=True)
            picked += gl.convert_layout(found, layout, assert_trivial=True)
        if target is not None:
            gl.store(target + offs_n, picked, mask=hit)
        if part_sum is not None:
            gl.store(part_sum + pid_v.to(gl.int64) * n + offs_n, total, mask=mask_n)
    tma.store_wait(0)


@gluon.jit
def _add_part(x, v, stop, wanted, running_max, running_sum, picked, bias, inner, outer):
    """The running vectors (n,) after products ``x (n, v)``; a part beyond `stop` adds nothing."""
    rows: gl.constexpr = running_max.type.layout
    layout: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    x = _capped(x, v, stop, bias, inner)
    offs_v = v + gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    here = gl.convert_layout(wanted, layout, assert_trivial=True)
    hit = (wanted >= v) & (wanted < v + x.shape[1])
    if gl.max(hit.to(gl.int32), 0) > 0:
        found = gl.sum(gl.where(here[:, None] == offs_v[None, :], x, 0.0), 1)
        picked += outer * gl.convert_layout(found, rows, assert_trivial=True)
    if v + x.shape[1] > stop:
        x = gl.where((offs_v < stop)[None, :], x, float("-inf"))
    largest = gl.convert_layout(gl.max(x, 1), rows, assert_trivial=True)
    new_max = gl.maximum(running_max, outer * largest)
    shift = gl.convert_layout(new_max, layout, assert_trivial=True)
    part = gl.sum(gl.exp2(x * outer - shift[:, None]), 1)
    part = gl.convert_layout(part, rows, assert_trivial=True)
    return new_max, running_sum * gl.exp2(running_max - new_max) + part, picked


@gluon.jit
def _sum_up(
    WHO: gl.constexpr, ring, given, D: gl.constexpr, LAG: gl.constexpr, GROUP: gl.constexpr
):
    """Consumer `WHO` of `lse_partials_hopper`."""
    bias, targets, partials, target, n, V, span, splits, inner, outer = given
    BLOCK: gl.constexpr = ring[0].shape[1]
    layout: gl.constexpr = gl.SliceLayout(
        1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    )
    blocks_n = gl.cdiv(n, 2 * BLOCK)
    step = 0
    tile = 0
    for job in range(gl.program_id(0), blocks_n * splits, gl.num_programs(0)):
        pid_n, split = _spot(job, blocks_n, splits, True, GROUP)
        offs_n = (2 * pid_n + WHO) * BLOCK + gl.arange(0, BLOCK, layout)
        mask_n = offs_n < n
        wanted = gl.load(targets + offs_n, mask=mask_n, other=-1).to(gl.int32)
        running_max = gl.full([BLOCK], LOWEST, gl.float32, layout)
        running_sum = gl.zeros([BLOCK], gl.float32, layout)
        picked = gl.zeros([BLOCK], gl.float32, layout)
        start = split * span
        stop = gl.minimum(start + span, V)
        for v in range(start, stop, BLOCK):
            acc, step = _multiply(WHO, ring, step, tile, D, LAG)
            tile += 1
            if inner is None:
                running_max, running_sum, picked = _add_part(
                    acc, v, stop, wanted, running_max, running_sum, picked, bias, inner, outer
                )
            else:  # the tanh needs registers: half a tile at a time
                left, right = _halves(acc)
                running_max, running_sum, picked = _add_part(
                    left, v, stop, wanted, running_max, running_sum, picked, bias, inner, outer
                )
                running_max, running_sum, picked = _add_part(
                    right, v + BLOCK // 2, stop, wanted, running_max, running_sum, picked, bias,
                    inner, outer,
                )  # fmt: skip
        row = partials + split.to(gl.int64) * n + offs_n
        gl.store(row, running_max, mask=mask_n)
        gl.store(row + splits.to(gl.int64) * n, running_sum, mask=mask_n)
        gl.store(target + offs_n, picked, mask=mask_n & (wanted >= start) & (wanted < stop))


@gluon.jit
def _make_ring(hidden, weight, STAGES: gl.constexpr):
    """The slots (STAGES, rows or entries, columns) and their barriers; `lead`."""
    shape: gl.constexpr = [STAGES, hidden.block_shape[0], hidden.block_shape[1]]
    rows0 = gl.allocate_shared_memory(hidden.dtype, shape, hidden.layout)
    rows1 = gl.allocate_shared_memory(hidden.dtype, shape, hidden.layout)
    entries = gl.allocate_shared_memory(hidden.dtype, shape, weight.layout)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    lead = gl.allocate_shared_memory(gl.int64, [1], bars)
    for k in gl.static_range(STAGES):
        mbarrier.init(full.index(k), count=1)
        mbarrier.init(empty.index(k), count=2)
    mbarrier.init(lead, count=1)
    return rows0, rows1, entries, full, empty, lead


@gluon.jit(do_not_specialize=["n", "p", "v0", "splits"])
def exp_fused_hopper(
    hidden,  # descriptor of (n, D), block (128, 64)
    weight,  # descriptor of (p, D), block (128, 64)
    out,  # descriptor of (p, n), block (32, 128)
    bias,  # (p,) or None
    shift,  # (n,) float32
    targets,  # (n,) int64
    part_sum,  # (vocabulary blocks, n) float32 or None
    target,  # (n,) float32 or None
    n,
    p,
    v0,
    splits,  # vocabulary blocks
    inner,
    outer,
    slope,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    LAG: gl.constexpr,
):
    """``out[v, i] = 2^(y[v, i] - shift[i]) * dz/dx[v, i]``; its block sums over v, unsloped.

    Grid (programs,), at most one for each tile; GROUP vocabulary blocks take turns on a row block.
    """
    BLOCK: gl.constexpr = hidden.block_shape[0]
    ring = _make_ring(hidden, weight, STAGES)
    shape: gl.constexpr = [2, BLOCK // PARTS, BLOCK]
    buffers0 = gl.allocate_shared_memory(out.dtype, shape, out.layout)
    buffers1 = gl.allocate_shared_memory(out.dtype, shape, out.layout)
    given = (out, bias, shift, targets, part_sum, target, n, p, v0, splits, inner, outer, slope)
    gl.warp_specialize(
        [
            (_fill, (0, ring, buffers0, given, D, LAG, GROUP)),
            (_fill, (1, ring, buffers1, given, D, LAG, GROUP)),
            (_produce, (hidden, weight, ring, n, p, BLOCK, splits, D, False, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit(do_not_specialize=["n", "V", "span", "splits"])
def lse_partials_hopper(
    hidden,  # descriptor of (n, D), block (128, 64)
    weight,  # descriptor of (V, D), block (128, 64)
    bias,  # (V,) or None
    targets,  # (n,) int64
    partials,  # (2, splits, n) float32: running max and sum, in base 2
    target,  # (n,) float32: y[i, targets[i]]
    n,
    V,
    span,  # vocabulary entries of a split, a multiple of 128
    splits,
    inner,
    outer,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    LAG: gl.constexpr,
):
    """``max_v y[i, v]``, ``sum_v 2^(y[i, v] - max)`` over a span of entries; ``y`` of targets.

    `outer` is positive: the largest logit is that of the largest product. Grid (programs,), at most
    one for each row block and split; GROUP row blocks take turns on a split.
    """
    ring = _make_ring(hidden, weight, STAGES)
    given = (bias, targets, partials, target, n, V, span, splits, inner, outer)
    gl.warp_specialize(
        [
            (_sum_up, (0, ring, given, D, LAG, GROUP)),
            (_sum_up, (1, ring, given, D, LAG, GROUP)),
            (_produce, (hidden, weight, ring, n, V, span, splits, D, True, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )
