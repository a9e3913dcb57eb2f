"""The kept products against float64, and through the loss; interpreted without a GPU.

Key: n rows, g row blocks, D hidden size, V vocabulary.
"""

import json
import math

import pytest
import torch

pytest.importorskip("triton")

from rpo_kernels import fused_rpo_loss, oracle
from rpo_kernels.backends import tiles, torch_backend, triton_sparse
from rpo_kernels.backends import triton_backend as backend
from rpo_kernels.spec import ACCUMULATOR
from tests.support import (
    IGNORE,
    assert_within_plain_budget,
    assert_within_roundings,
    differentiate,
    double,
    gpu_product,
    loss_budget,
    pairs,
    plain_rpo_loss,
    relative_error,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILY = tiles.of_device(torch.device(DEVICE))[0]
V, D = 517, 104


def tiles_of(dtype):
    """The tiles of `kept_rows` and `kept_weight`."""
    return tiles.KEPT[FAMILY, tiles.dtype_class(dtype.itemsize)]


def smallest(dtype):
    """The fewest rows of a block: those of a tile."""
    return max(tile.block_n for tile in tiles_of(dtype))


def size_of(dtype):
    """Rows of a block."""
    return max(64, smallest(dtype))


def make(n=None, vocab=V, width=D, dtype=torch.float32, size=None, share=0.2, seed=0):
    """A panel of positive entries, and for each block of rows the entries it keeps; five blocks,
    the last one shorter, if nothing else is said.
    """
    size = size_of(dtype) if size is None else size
    n = 4 * size + 44 if n is None else n
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE, dtype)  # noqa: E731
    panel = torch.rand(vocab, n, generator=g).to(DEVICE, dtype)
    keep = (torch.rand(-(-n // size), vocab, generator=g) < share).to(DEVICE)
    return panel, keep, rand(vocab, width), rand(n, width), rand(n).float()


def run(panel, keep, weight, scaled, coef, size=None, scale=1.0, how=backend):
    """``d_rows`` from NaN, ``d_weight`` and ``d_bias`` from ones."""
    (vocab, width), acc = weight.shape, ACCUMULATOR[panel.dtype]
    size = size_of(panel.dtype) if size is None else size
    d_rows = torch.full((panel.shape[1], width), math.nan, dtype=acc, device=DEVICE)
    d_weight = torch.ones(vocab, width, dtype=acc, device=DEVICE)
    d_bias = torch.ones(vocab, dtype=acc, device=DEVICE)
    how.kept_products(panel, size, keep, weight, scaled, coef, d_rows, d_weight, d_bias, scale)
    return d_rows, d_weight, d_bias


def computed(keep, dtype=torch.float32, block_v=None):
    """What the tiles of `triton_sparse.plan` cover: at least `keep`, (g, V) bool."""
    block_v = tiles_of(dtype)[1].block_v if block_v is None else block_v
    covered = torch.zeros_like(keep)
    for first in range(0, keep.shape[0], tiles.SPAN):
        order, walks, counts = triton_sparse.plan(keep[first : first + tiles.SPAN], block_v)
        for tile, (walk, count) in enumerate(zip(walks.tolist(), counts.tolist(), strict=True)):
            blocks = [first + (walk >> 4 * k & 15) for k in range(count)]
            assert blocks == sorted(set(blocks))
            entries = order[tile * block_v : (tile + 1) * block_v].long()
            covered[torch.tensor(blocks, dtype=torch.long)[:, None], entries] = True
    return covered


def products(panel, keep, weight, scaled, coef, covered, size=None, scale=1.0, dtype=None):
    """The products, plainly: operands are exact in `dtype`, or the panel's own; float64 is true."""
    own, dtype = panel.dtype, panel.dtype if dtype is None else dtype
    size = size_of(own) if size is None else size
    rows, more = (
        panel.to(dtype) * x.repeat_interleave(size, 0)[: panel.shape[1]].t()
        for x in (keep, covered)
    )
    if dtype == torch.float32:  # kernels round the factors and each product of the bias' sum
        d_bias = (rows * coef.to(own).to(dtype)).to(own).to(dtype).sum(1)
        d_rows = gpu_product(rows.t().to(own), weight.to(own))
        d_weight = gpu_product(more.to(own), scaled.to(own))
    else:
        d_bias = rows @ coef.to(dtype)
        d_rows, d_weight = rows.t() @ weight.to(own).to(dtype), more @ scaled.to(dtype)
    return (
        d_rows,
        1 + scale * d_weight.to(ACCUMULATOR[dtype]),
        1 + scale * d_bias.to(ACCUMULATOR[dtype]),
    )


NAMES = ("d_rows", "d_weight", "d_bias")


def assert_products(found, inputs, covered, dtype=torch.float32, **options):
    """Within the plain budget of sums in `dtype`: float32 in kernels, whatever the operands."""
    plain, truth = (products(*inputs, covered, **options, dtype=x) for x in (dtype, torch.float64))
    assert_within_plain_budget(*(dict(zip(NAMES, x, strict=False)) for x in (found, plain, truth)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "blocks, vocab, width", [(None, V, D), (1, 64, 64), (0.1, 3, 5), (2, 200, 576)]
)
def test_products(dtype, blocks, vocab, width):
    n = None if blocks is None else round(blocks * size_of(dtype))
    inputs = make(n, vocab, width, dtype)
    covered = computed(inputs[1], dtype)
    assert (covered | ~inputs[1]).all()
    found = run(*inputs, scale=0.5)
    assert_products(found, inputs, covered, scale=0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, run(*inputs, scale=0.5), strict=True))


def test_more_blocks_than_one_pass_takes():
    size = smallest(torch.float32)
    inputs = make(n=9 * size + 12, size=size, share=0.05)
    assert inputs[1].shape[0] > tiles.SPAN
    found = run(*inputs, size=size)
    assert_products(found, inputs, computed(inputs[1]), size=size)


def test_sixteen_blocks_in_one_pass(monkeypatch):
    monkeypatch.setattr(tiles, "SPAN", 16)
    size = smallest(torch.float32)
    inputs = make(n=16 * size - 12, size=size, share=0.1)
    assert inputs[1].shape[0] == 16
    found = run(*inputs, size=size)
    assert_products(found, inputs, computed(inputs[1]), size=size)


def test_split_lists(monkeypatch):
    """With more multiprocessors than tiles every list is cut; some parts are empty."""
    monkeypatch.setattr(tiles, "of_device", lambda device: (FAMILY, 999))
    inputs = make(n=70, width=40)
    inputs[1][1, 20:] = False
    assert_products(run(*inputs), inputs, computed(inputs[1]))


def test_nothing_kept():
    panel, keep, *rest = make()
    keep[2] = False
    d_rows, *_ = run(panel, keep, *rest)
    size = size_of(panel.dtype)
    assert (d_rows[2 * size : 3 * size] == 0).all() and d_rows.isfinite().all()
    keep[:] = False
    d_rows, d_weight, d_bias = run(panel, keep, *rest)
    assert (d_rows == 0).all() and (d_weight == 1).all() and (d_bias == 1).all()
    empty = panel[:, :0], keep[:0], rest[0], rest[1][:0], rest[2][:0]
    d_rows, d_weight, d_bias = run(*empty)
    assert d_rows.shape == (0, D) and (d_weight == 1).all() and (d_bias == 1).all()


def test_everything_kept_is_the_dense_product():
    inputs = make()
    inputs[1][:] = True
    found = dict(zip(NAMES, run(*inputs), strict=True))

    def dense(dtype):
        panel, weight, scaled, coef = (x.to(dtype) for x in (inputs[0], *inputs[2:]))
        product = gpu_product if dtype == torch.float32 else torch.mm
        dense = product(panel.t(), weight), 1 + product(panel, scaled), 1 + panel @ coef
        return dict(zip(NAMES, dense, strict=True))

    assert_within_plain_budget(found, dense(torch.float32), dense(torch.float64))


@pytest.mark.parametrize("padding", [4, 20], ids=["aligned", "ragged"])
def test_nothing_else_is_read(padding):
    """NaN beyond the rows, in rows of W that nobody keeps, and in tiles that are skipped."""
    panel, keep, weight, scaled, coef = make()
    n = panel.shape[1]
    keep[:, 7], keep[1] = False, False
    buffer = torch.full((V + 1, n + padding), math.nan, device=DEVICE)
    buffer[:V, :n] = panel
    covered, clean = computed(keep), (panel, keep, weight.clone(), scaled, coef)
    skipped = ~covered.repeat_interleave(size_of(panel.dtype), 0)[:n].t()
    assert skipped.any()
    buffer[:V, :n][skipped] = math.nan
    weight[7] = math.nan
    found = run(buffer[:V, :n], keep, weight, scaled, coef)
    assert_products(found, clean, covered)


def test_weight_is_cast_in_the_kernel():
    """Under autocast the weight is float32, the panel half precision."""
    panel, keep, weight, scaled, coef = make(dtype=torch.bfloat16)
    wide = weight.float() * (1 + 2**-12)  # rounds back; the interpreter truncates
    found = run(panel, keep, wide, scaled, coef)
    assert_products(found, (panel, keep, wide, scaled, coef), computed(keep, panel.dtype))
    assert torch.equal(found[0], run(panel, keep, wide.bfloat16(), scaled, coef)[0])


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_torch_backend(dtype):
    """The same products; on a CPU, half-precision ones are rounded part by part."""
    inputs = make(dtype=dtype, vocab=5000, share=0.6)
    found = run(*inputs, scale=0.5, how=torch_backend)
    if dtype == torch.float64:  # n products of a count of roundings each
        panel, keep, weight, scaled, coef = inputs
        truth = products(*inputs, keep, scale=0.5, dtype=dtype)
        sizes = products(panel, keep, *(x.abs() for x in inputs[2:]), keep, scale=0.5, dtype=dtype)
        for one, two, size in zip(found, truth, sizes, strict=True):
            assert_within_roundings(one, two, panel.shape[0], size)
    else:
        assert_products(found, inputs, inputs[1], dtype, scale=0.5)


def test_entries_of_the_same_blocks_share_tiles():
    keep = torch.zeros(8, 4096, dtype=torch.bool)
    bits = torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0))
    keep[:] = (bits[None] >> torch.arange(8)[:, None] & 1).bool()
    few = keep[:, bits.bitwise_and(0b10110010) == bits]  # 16 patterns
    assert computed(few, block_v=8).sum() < 1.2 * few.sum()
    assert sorted(triton_sparse.plan(keep, 128)[0].tolist()) == list(range(4096))


def rpo(function):
    return lambda p: function(*p[:3], p.ref_logps, bias=p.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_loss_with_tolerance(bias):
    """Both backends leave out at most what the certificate says, and agree within that."""
    tolerance = 0.02
    problem = pairs(3, 3, 101, 40, 701, bias=bias, spread=4.0)
    results = {}
    for name, share in (("exact", 0.0), ("torch", tolerance), ("triton", tolerance)):
        given = [problem.hidden, problem.weight, *[problem.bias] * bias]
        leaves = [x.to(DEVICE, copy=True).requires_grad_() for x in given]
        out = fused_rpo_loss(
            *leaves[:2],
            problem.labels.to(DEVICE),
            problem.ref_logps.to(DEVICE),
            bias=leaves[2] if bias else None,
            grad_tolerance=share,
            strategy="stream",
            backend="torch" if name == "exact" else name,
        )
        out.loss.backward()
        results[name] = out, [x.grad.cpu() for x in leaves]
    dense, sparse = results["torch"], results["triton"]
    budget, truth = loss_budget(problem), differentiate(rpo(oracle.rpo_loss), double(problem))
    plain = differentiate(rpo(plain_rpo_loss), problem)
    for out, _ in results.values():
        assert abs(out.loss.detach().cpu().double() - truth["out"]) <= budget
    assert 0 < sparse[0].skipped <= tolerance
    # shares of a sum over rows of sums over the vocabulary
    terms = sum(problem.weight.shape[:1]) + int((problem.labels != IGNORE).sum())
    assert_within_roundings(sparse[0].skipped, dense[0].skipped, terms)
    names = list(plain)[1:]
    for name, one, two in zip(names, sparse[1], dense[1], strict=True):
        rounding = 2 * relative_error(plain[name], truth[name]) + torch.finfo(torch.float32).eps
        left_out = relative_error(two, truth[name])
        assert left_out > 2 * rounding
        assert relative_error(one, truth[name]) <= left_out + rounding  # no more than is kept
        if name == "hidden":  # of the very same entries
            assert relative_error(one, two) <= 2 * rounding


@pytest.mark.skipif(DEVICE == "cuda", reason="its toy size runs in Triton's interpreter")
def test_autotune_writes_timings_and_winners(tmp_path):
    """The tool that fills `tiles.py`, at toy size; it puts the tiles back."""
    from benchmarks import autotune
    from rpo_kernels import tuning

    before = tuning.kernels(torch.device("cpu"), torch.bfloat16)
    found = json.loads(autotune.main(["--smoke", "--output_dir", str(tmp_path)]).read_text())
    assert tuning.kernels(torch.device("cpu"), torch.bfloat16) == before and not tuning.is_trial()
    assert not [entry for entry in found["timings"] if "error" in entry]
    parts = {"lse_and_target", "exp_panel", "kept rows", "kept weight"}
    assert parts <= found["winners"]["best"].keys()
    assert parts | {"rows dense", "weight gathered"} <= {x["part"] for x in found["timings"]}
    assert len(found["winners"]["tiles.py"]) == 3
