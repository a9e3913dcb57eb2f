"""The maths of every preference loss, written once.

A loss is a pure function of one pair, elementwise over any number of pairs:

    loss(c, r, beta, epsilon, gamma) -> (value, d value / d c, d value / d r)

`c` and `r` are what the loss compares: for most losses the log-ratio ``s(y) - ref(y)`` of the
chosen and rejected response, ``s(y) = sum_t log pi(y_t | x, y_<t)``; for the losses with
``mean=True`` the same divided by the response's token count; for the reference-free ones ``s(y)``
alone. The value and its two slopes stand side by side because that is all that a training
step needs: every engine multiplies the slopes into the gradient of the log-probs, so no autograd
graph is ever built.

The functions use nothing but arithmetic and the five names imported below (`exp`, `log`, `relu`,
`sigmoid`, `logsigmoid`) plus `where`, so that `backends.triton_tail` compiles *the same source*
into its tail kernel: no loss is written twice. `tests/kernels/test_losses.py` checks every slope
against float64 autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, exp, log, relu, sigmoid, stack, where
from torch.nn.functional import logsigmoid

from rpo_kernels.spec import Objective


def sigmoid_loss(c, r, beta, epsilon, gamma):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7); epsilon > 0 is cDPO (Mitchell 2023).
    RPO's preference term, and, without a reference model, CPO's (Xu et al. 2024, arXiv 2401.08417,
    eq. 5).
    """
    m = beta * (c - r)
    value = -(1 - epsilon) * logsigmoid(m) - epsilon * logsigmoid(-m)
    slope = beta * (epsilon - sigmoid(-m))
    return value, slope, -slope


def robust_loss(c, r, beta, epsilon, gamma):
    """Robust DPO, unbiased under label flips of rate epsilon (Chowdhury et al. 2024, arXiv
    2403.00409, eq. 12).
    """
    m = beta * (c - r)
    value = (-(1 - epsilon) * logsigmoid(m) + epsilon * logsigmoid(-m)) / (1 - 2 * epsilon)
    slope = -beta * ((1 - epsilon) * sigmoid(-m) + epsilon * sigmoid(m)) / (1 - 2 * epsilon)
    return value, slope, -slope


def hinge_loss(c, r, beta, epsilon, gamma):
    """SLiC-HF's hinge on the scaled log-ratio (Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023,
    arXiv 2309.06657).
    """
    gap = 1 - beta * (c - r)
    value = relu(gap)
    slope = where(gap > 0, -beta + 0 * gap, 0 * gap)
    return value, slope, -slope


def ipo_loss(c, r, beta, epsilon, gamma):
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) on per-token means, as its authors advise
    and TRL does.
    """
    gap = c - r - 1 / (2 * beta)
    return gap * gap, 2 * gap, -2 * gap


def exo_pair_loss(c, r, beta, epsilon, gamma):
    """EXO's reverse KL for pairs (Ji et al. 2024, arXiv 2402.00856, eq. 16); epsilon > 0 is
    required.
    """
    m = beta * (c - r)
    win, lose = sigmoid(m), sigmoid(-m)
    up = logsigmoid(m) - log(1 - epsilon + 0 * m)
    down = logsigmoid(-m) - log(epsilon + 0 * m)
    slope = beta * win * lose * (up - down)
    return win * up + lose * down, slope, -slope


def apo_zero_loss(c, r, beta, epsilon, gamma):
    """APO-zero: chosen up, rejected down (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7)."""
    win, lose = sigmoid(beta * c), sigmoid(beta * r)
    return 1 - win + lose, -beta * win * (1 - win), beta * lose * (1 - lose)


def apo_down_loss(c, r, beta, epsilon, gamma):
    """APO-down: both down, rejected faster (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8)."""
    low, gap = sigmoid(beta * c), sigmoid(beta * (c - r))
    slope = beta * gap * (1 - gap)
    return low + 1 - gap, beta * low * (1 - low) - slope, slope


def sppo_hard_loss(c, r, beta, epsilon, gamma):
    """SPPO with hard labels (Wu et al. 2024, arXiv 2405.00675, eq. 4.7)."""
    up, down = c - 0.5 / beta, r + 0.5 / beta
    return up * up + down * down, 2 * up, 2 * down


def nca_pair_loss(c, r, beta, epsilon, gamma):
    """NCA for pairs: absolute likelihoods, not only their gap (Chen et al. 2024, arXiv 2402.05369,
    eq. 11).
    """
    u, v = beta * c, beta * r
    value = -logsigmoid(u) - 0.5 * logsigmoid(-u) - 0.5 * logsigmoid(-v)
    return value, beta * (0.5 * sigmoid(u) - sigmoid(-u)), 0.5 * beta * sigmoid(v)


def simpo_loss(c, r, beta, epsilon, gamma):
    """SimPO with target margin gamma, on means, reference-free (Meng et al. 2024, arXiv 2405.14734,
    eq. 6).
    """
    m = beta * (c - r) - gamma
    value = -(1 - epsilon) * logsigmoid(m) - epsilon * logsigmoid(-m)
    slope = beta * (epsilon - sigmoid(-m))
    return value, slope, -slope


def orpo_loss(c, r, beta, epsilon, gamma):
    """ORPO's odds-ratio term, weight lambda = beta, on means, reference-free (Hong et al. 2024,
    arXiv 2403.07691, eq. 6-7). Means above -1e-6 count as -1e-6: the odds are infinite at 0.
    """
    c, r = where(c < -1e-6, c, -1e-6 + 0 * c), where(r < -1e-6, r, -1e-6 + 0 * r)
    # 1 - exp(x) cancels near 0: six terms of its series there (relative error < 4e-12 in float64)
    near_c = -c * (1 + c / 2 * (1 + c / 3 * (1 + c / 4 * (1 + c / 5 * (1 + c / 6)))))
    near_r = -r * (1 + r / 2 * (1 + r / 3 * (1 + r / 4 * (1 + r / 5 * (1 + r / 6)))))
    miss_c, miss_r = where(c > -0.05, near_c, 1 - exp(c)), where(r > -0.05, near_r, 1 - exp(r))
    log_odds = (c - log(miss_c)) - (r - log(miss_r))
    pull = beta * sigmoid(-log_odds)
    return -beta * logsigmoid(log_odds), -pull / miss_c, pull / miss_r


class Loss(NamedTuple):
    """A loss and what it needs: `mean` per-token means instead of sums, `reference` log-probs,
    `smoothing` (epsilon).
    """

    pair: Callable
    mean: bool = False
    reference: bool = True
    smoothing: bool = False


LOSSES = {
    "sigmoid": Loss(sigmoid_loss, smoothing=True),
    "robust": Loss(robust_loss, smoothing=True),
    "hinge": Loss(hinge_loss),
    "ipo": Loss(ipo_loss, mean=True),
    "exo_pair": Loss(exo_pair_loss, smoothing=True),
    "apo_zero": Loss(apo_zero_loss),
    "apo_down": Loss(apo_down_loss),
    "sppo_hard": Loss(sppo_hard_loss),
    "nca_pair": Loss(nca_pair_loss),
    "simpo": Loss(simpo_loss, mean=True, reference=False, smoothing=True),
    "orpo": Loss(orpo_loss, mean=True, reference=False),
    "cpo": Loss(sigmoid_loss, reference=False, smoothing=True),
}
SFT_REDUCTIONS = ("sum", "sequence_mean", "token_mean")


def total_terms(pairs: Tensor, objective: Objective) -> Tensor:
    """``[preference loss, SFT loss]`` (2,) of a step from its table of pairs ``(B, >= 2)``: sums
    over the normalizers of `objective`.
    """
    preference, sft = pairs[:, :2].sum(0).unbind()
    return stack([preference / objective.num_pairs, sft / objective.sft_normalizer])


def sft_weight(
    eta: float, beta: float, sft_reduction: str, scale_eta_by_beta: bool | None
) -> float:
    """Weight w of the SFT term: eta * beta for "sum" (Liu et al. 2024, arXiv 2405.16436, eq. 4.8),
    eta for the means, unless overridden.
    """
    scaled = sft_reduction == "sum" if scale_eta_by_beta is None else scale_eta_by_beta
    return eta * beta if scaled else eta
