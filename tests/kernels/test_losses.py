"""Every loss: value and slopes against float64 autograd of the oracle, extremes, closed values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpo_kernels import oracle
from rpo_kernels.doctor.budgets import QUADRATIC, ROUNDINGS, loss_limits
from rpo_kernels.losses import LOSSES, SFT_REDUCTIONS, sft_weight, total_terms
from rpo_kernels.spec import Objective
from tests.support import assert_within_roundings, examples

LN2 = math.log(2)
MEANS = {"ipo", "simpo", "orpo"}
REFERENCE_FREE = {"simpo", "orpo", "cpo"}
SMOOTHED = {"sigmoid", "robust", "exo_pair", "simpo", "cpo"}
EPS64 = torch.finfo(torch.float64).eps
BOTH = 2 * ROUNDINGS  # of a loss and of its oracle
ORPO_SERIES = 0.05**6 / math.factorial(7)  # the first term left out, where it is the largest


def epsilons(name: str) -> list[float]:
    if name == "exo_pair":
        return [1e-3, 0.1, 0.49]
    return [0.0, 1e-3, 0.1, 0.49] if name in SMOOTHED else [0.0]


def test_the_table_names_what_each_loss_takes():
    assert set(LOSSES) == SMOOTHED | QUADRATIC | REFERENCE_FREE | {
        "hinge", "apo_zero", "apo_down", "nca_pair",
    }  # fmt: skip
    assert {name for name, loss in LOSSES.items() if loss.mean} == MEANS
    assert {name for name, loss in LOSSES.items() if not loss.reference} == REFERENCE_FREE
    assert {name for name, loss in LOSSES.items() if loss.smoothing} == SMOOTHED
    for loss in LOSSES.values():
        assert "arXiv" in loss.pair.__doc__  # each cites its source


def value_and_slopes(name, c, r, beta, epsilon, gamma):
    """Value and slopes of `oracle.preference_losses` by autograd, float64."""
    c, r = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (c, r))
    value = oracle.preference_losses(name, c, r, beta, epsilon, gamma)
    slopes = torch.autograd.grad(value.sum(), (c, r), allow_unused=True)
    return value.item(), *(0.0 if slope is None else slope.item() for slope in slopes)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_slopes_are_those_of_the_oracle(name):
    log_probs = st.floats(-300, -1e-6 if name == "orpo" else 300)
    smoothing = st.sampled_from(epsilons(name))

    @examples(150)
    @given(log_probs, log_probs, st.floats(0.01, 3), smoothing, st.floats(0, 3))
    def check(c, r, beta, epsilon, gamma):
        inputs = [torch.tensor([x], dtype=torch.float64) for x in (c, r)]
        if name == "hinge" and abs(1 - beta * (c - r)) < 1e-9:
            return  # the kink: any slope between is one
        found = [x.item() for x in LOSSES[name].pair(*inputs, beta, epsilon, gamma)]
        truth = value_and_slopes(name, c, r, beta, epsilon, gamma)
        limits = loss_limits(name, c, r, beta, epsilon, gamma, truth, torch.float64, BOTH)
        for out, want, limit in zip(found, truth, limits, strict=True):
            if name == "orpo" and max(c, r) > -0.05:
                limit += ORPO_SERIES * (1 + beta * (abs(c) + abs(r)) + abs(want))
            assert abs(out - want) <= limit, (found, truth, limits)

    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_are_finite(name, dtype):
    """Margins up to 1e4 either way, both log-ratios far off together: finite, slopes bounded."""
    ends = torch.tensor([-1e4, -100, -1, -1e-8, 0, 1e-8, 1, 100, 1e4], dtype=dtype)
    c, r = (x.flatten() for x in torch.meshgrid(ends, ends, indexing="ij"))
    for epsilon in epsilons(name):
        for beta in (0.01, 1.0):
            value, d_c, d_r = LOSSES[name].pair(c, r, beta, epsilon, 0.5)
            for tensor in (value, d_c, d_r):
                assert tensor.dtype == dtype
                assert tensor.isfinite().all()
            if name not in QUADRATIC | {"orpo", "exo_pair", "robust"}:
                assert d_c.abs().max() <= beta and d_r.abs().max() <= beta


def test_saturated_pairs_have_the_limits_of_the_formula():
    c, r = torch.tensor([1e4, -1e4]).double(), torch.zeros(2).double()
    value, d_c, d_r = LOSSES["sigmoid"].pair(c, r, 1.0, 0.0, 0.0)
    assert value.tolist() == [0.0, 1e4]
    assert d_c.tolist() == [0.0, -1.0] and d_r.tolist() == [0.0, 1.0]
    value, d_c, _ = LOSSES["sigmoid"].pair(c, r, 1.0, 0.1, 0.0)
    for found, want in ((value, [0.1e4, 0.9e4]), (d_c, [0.1, -0.9])):
        assert_within_roundings(found, torch.tensor(want, dtype=torch.float64), 2)


BETA, EPS, GAMMA = 0.3, 0.2, 0.7
AT_ZERO = {
    "sigmoid": LN2,
    "cpo": LN2,
    "robust": LN2,
    "hinge": 1.0,
    "ipo": 1 / (4 * BETA**2),
    "exo_pair": -LN2 - 0.5 * math.log(EPS * (1 - EPS)),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo_hard": 0.5 / BETA**2,
    "nca_pair": 2 * LN2,
    "simpo": (1 - EPS) * math.log1p(math.exp(GAMMA)) + EPS * math.log1p(math.exp(-GAMMA)),
}


@pytest.mark.parametrize("name", AT_ZERO)
def test_closed_values_at_zero_margin(name):
    zero = torch.zeros(1, dtype=torch.float64)
    epsilon = EPS if name in SMOOTHED else 0.0
    value, _, _ = LOSSES[name].pair(zero, zero, BETA, epsilon, GAMMA)
    assert value.item() == pytest.approx(AT_ZERO[name], rel=BOTH * EPS64)


@pytest.mark.parametrize("logp", [-1e-5, -0.04, -0.05, -0.06, -0.7, -30.0])
def test_orpo_of_equal_responses_is_beta_ln2(logp):
    same = torch.tensor([logp], dtype=torch.float64)
    value, d_c, d_r = LOSSES["orpo"].pair(same, same, BETA, 0.0, 0.0)
    assert value.item() == pytest.approx(BETA * LN2, rel=BOTH * EPS64)
    # d/dc of log odds is 1 / (1 - p), halved by sigmoid(0)
    error = BOTH * EPS64 + ORPO_SERIES
    assert d_r.item() == pytest.approx(0.5 * BETA / -math.expm1(logp), rel=error)
    assert d_c.item() == -d_r.item()


def test_dpo_slope_is_the_published_gradient():
    """Rafailov et al. 2023, section 4: grad log pi(y_w) weighs -beta sigmoid(r_l - r_w)."""
    c, r = torch.tensor([2.0]).double(), torch.tensor([-1.0]).double()
    _, d_c, d_r = LOSSES["sigmoid"].pair(c, r, 0.5, 0.0, 0.0)
    assert d_c.item() == pytest.approx(-0.5 / (1 + math.exp(1.5)), rel=BOTH * EPS64)
    assert d_r.item() == -d_c.item()


@pytest.mark.parametrize(
    ("reduction", "scaled", "weight"),
    [
        ("sum", None, 0.2 * 0.5),
        ("sum", True, 0.2 * 0.5),
        ("sum", False, 0.2),
        ("sequence_mean", None, 0.2),
        ("sequence_mean", True, 0.2 * 0.5),
        ("sequence_mean", False, 0.2),
        ("token_mean", None, 0.2),
        ("token_mean", True, 0.2 * 0.5),
        ("token_mean", False, 0.2),
    ],
)
def test_sft_weight_is_the_table_of_the_design(reduction, scaled, weight):
    assert sft_weight(0.2, 0.5, reduction, scaled) == weight
    assert sft_weight(0.0, 0.5, reduction, scaled) == 0


@pytest.mark.parametrize("reduction", SFT_REDUCTIONS)
def test_total_terms_divide_by_the_right_count(reduction):
    table = torch.tensor([[1.0, 10.0, 0.0], [2.0, 20.0, 0.0]])
    assert total_terms(
        table, Objective("sigmoid", 0.1, 0.0, 0.5, 1.0, reduction, 4.0, 60.0)
    ).tolist() == [
        0.75,
        0.5 if reduction == "token_mean" else 7.5,
    ]
