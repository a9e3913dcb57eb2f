"""Every shipped tile compiles without a GPU, fits the chip, spills nothing, uses matrix units."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from rpo_kernels.backends import tiles
from rpo_kernels.losses import LOSSES
from tests import background

SCRIPT = Path(__file__).with_name("compile_kernels.py")
FAMILIES = sorted(tiles.SHARED_LIMIT)
HOPPER = ("lse_partials_hopper", "exp_fused_hopper")
DOTS = ("lse_partials", "exp_fused", *HOPPER)
KEPT = ("kept_rows", "kept_weight")
SMALL = ("pick_logits", "put_entries", "finish_rows", "scale_in_place")
LANES = {"gfx942": 64}  # threads of a warp


def command(family: str, *flags: str) -> background.Command:
    """`compile_kernels.py`, without the interpreter."""
    words = (sys.executable, "-W", "ignore", str(SCRIPT), family, *flags)
    return background.Command(words, (background.triton_cache(),))


GLUON = command("sm_90", "--gluon")


def commands(item):
    if "hopper" in item.name:
        return [GLUON]
    return [command(item.callspec.params["family"])] if hasattr(item, "callspec") else []


def compiled(family: str, *flags: str) -> list[dict]:
    """What `compile_kernels.py` reports."""
    done = background.result(command(family, *flags))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def problems(result: dict, family: str) -> set[str]:
    found = set()
    if result["shared"] > tiles.SHARED_LIMIT[family]:
        found.add("shared")
    if result["spilled"]:
        found.add("spilled")
    if result["fused"] is not True:  # Triton's default changes
        found.add("fusion")
    half = result["case"].startswith("bf16")
    if result["kernel"] in DOTS + KEPT and half and not result["matrix"]:
        found.add("matrix")
    if "odd rows" in result["case"]:
        (block_n, block_v, warps), lanes = result["tile"], LANES.get(family, 32)
        size = (2 if half else 4) * block_n * block_v // (16 * lanes * warps)
        names = ("stores", "loads") if result["kernel"] == "exp_epilogue" else ("stores",)
        if any(result[name]["16"] < size or result[name]["2"] for name in names):
            found.add("narrow accesses")  # of the panel: 16 bytes of it belong to a thread
    if result["kernel"] in KEPT and result["case"] == "bf16":
        tile = tiles.KEPT[family, "half"][KEPT.index(result["kernel"])]
        stage = 2 * tile.block_n * tile.block_v
        stage += 2 * tile.block_d * (tile.block_v, tile.block_n)[KEPT.index(result["kernel"])]
        if result["shared"] < (tile.num_stages - 1) * stage:
            found.add("not prefetched")  # a gathered operand is loaded when it is needed
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_fits_spills_nothing_and_uses_matrix_units(family):
    results = compiled(family)
    kinds = {(r["kernel"], r["case"].split()[0]) for r in results}
    assert {(k, c) for k in (*DOTS[:2], *KEPT, "exp_epilogue") for c in ("bf16", "fp32")} <= kinds
    assert {"lse_merge", "rpo_tail", *SMALL} <= {r["kernel"] for r in results}
    bad = [(r, problems(r, family)) for r in results if problems(r, family)]
    assert not bad


def test_every_loss_compiles_into_the_tail():
    assert {r["case"] for r in compiled("sm_90") if r["kernel"] == "rpo_tail"} == set(LOSSES)


@pytest.mark.parametrize("family", ["sm_90", "sm_100"])
def test_aligned_operands_go_through_tma(family):
    for result in compiled(family):
        if result["kernel"] in DOTS:
            assert result["tma"] == result["case"].startswith("bf16"), result


def issued(result: dict) -> dict[str, float]:
    """Instructions for each element of a tile; two consumers hold 128 of them a thread."""
    names = ("FFMA", "MUFU.EX2", "FMUL", "F2FP", "FMNMX", "STG")
    return {name: result["instructions"].get(name, 0) / (2 * 128) for name in names}


def test_the_hopper_kernels_cost_what_their_description_says():
    """One FFMA and one EX2 an element, no register spilled, 3 TMA loads a step for 24 products:
    2 blocks of 64 rows x 4 steps of 16 columns, and again for the slots before the other consumer
    begins. What is counted beyond 1 rescales a row's sum, once a tile.
    """
    results = compiled("sm_90", "--gluon")
    assert {r["case"][:4] for r in results} == {"bf16", "fp16"}
    assert sorted({r["kernel"] for r in results}) == sorted(HOPPER)
    for result in results:
        assert not problems({**result, "case": "bf16"}, "sm_90"), result
        assert result["tma"] and result["registers"] <= 65536 // (3 * 128)
        assert result["instructions"]["UTMALDG"] == 3 and result["instructions"]["HGMMA"] == 24
    by_kernel = {r["kernel"]: r for r in results if r["case"] == "bf16"}
    panel, sums = by_kernel["exp_fused_hopper"], by_kernel["lse_partials_hopper"]
    plain = {"FFMA": 1, "MUFU.EX2": 1, "FMUL": 0, "F2FP": 0.5, "FMNMX": 0, "STG": 16 / 256}
    assert issued(panel) == plain
    assert panel["instructions"]["UTMASTG"] == 2 * 4  # the panel leaves by TMA, not by STG
    rows = 4 / 128  # of a thread, an element
    scaled = {"FFMA": 1 + 2 * rows, "MUFU.EX2": 1 + rows, "FMUL": rows, "FMNMX": 1 + 2 * rows}
    assert issued(sums) == {**scaled, "F2FP": 0, "STG": 3 * rows}
    (capped,) = (r for r in results if r["case"] != "bf16" and r["kernel"] == HOPPER[1])
    assert issued(capped) != plain


def test_the_checks_can_fail():
    (huge,) = compiled("sm_90", "--oversized")
    assert problems(huge, "sm_90") == {"shared", "spilled"}
    exact, *_ = (
        r for r in compiled("sm_90") if r["kernel"] == "exp_fused" and r["case"][:4] == "fp32"
    )
    assert problems({**exact, "case": "bf16"}, "sm_90") == {"matrix"}
    (half,) = (r for r in compiled("sm_90") if r["kernel"] == "exp_fused" and r["case"] == "bf16")
    assert "shared" in problems(half, "gfx942")
    (rows,) = (r for r in compiled("sm_90") if r["kernel"] == "kept_rows" and r["case"] == "bf16")
    assert problems({**rows, "shared": 65536}, "sm_90") == {"not prefetched"}
    assert problems({**rows, "fused": None}, "sm_90") == {"fusion"}
    assert problems({**half, "case": "bf16 odd rows", "stores": {"2": 128, "16": 0}}, "sm_90") == {
        "narrow accesses"
    }


def test_families_cover_every_configuration():
    assert tiles.KEPT.keys() == tiles.CONFIGS.keys()
    assert 0 < tiles.SPAN <= 16
    assert {family for family, _ in tiles.CONFIGS} == {*FAMILIES, "interpreter"}
    assert {kind for _, kind in tiles.CONFIGS} == {"half", "single"}
    known = {
        (8, 0): "sm_80",
        (8, 6): "sm_86",
        (8, 9): "sm_86",
        (9, 0): "sm_90",
        (10, 0): "sm_100",
        (10, 3): "sm_100",
    }
    for capability, family in {**known, (12, 0): "sm_86"}.items():
        assert tiles.cuda_family(*capability) == family
