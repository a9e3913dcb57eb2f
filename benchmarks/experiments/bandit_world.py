"""Overoptimization in a world whose true reward is known: DPO against RPO, hundreds at a time.

    M models (settings x seeds), K responses, P preference pairs, H hidden units

Responses are K points x on a line. Their true reward rises up to `PEAK` and then falls steeply. The
preference pairs compare responses of the covered part, x < coverage, only; labels are drawn from
the Bradley-Terry model of the true reward. The policy is an MLP of x,

    log pi(x) = log ref(x) + f(x) - log sum_x' ref(x') exp f(x'),     ref uniform, f = 0 at first,

and so it generalizes: what it learns on covered responses says something about the others, too.
All models are trained together, with `rpo_kernels.losses` as everywhere in this repository.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from rpo_kernels.losses import sft_weight, sigmoid_loss

K, HIDDEN, PAIRS = 100, 24, 300
PEAK, TOP, END = 0.6, 4.0, -4.0  # where the true reward is highest, its height, its value at x = 1
LEARNING_RATE, STEPS = 0.02, 600
BETAS = (0.1, 0.3, 1.0)
ETAS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
COVERAGES = (0.4, 0.6, 1.0)


@dataclass(frozen=True)
class Setting:
    """One way to train; `eta` 0 is DPO."""

    beta: float
    eta: float
    coverage: float


@dataclass(frozen=True)
class Outcome:
    """What M trained models do; rewards in units of the true reward."""

    log_policy: Tensor
    """(M, K)."""
    true_reward: Tensor
    """(M,), expected under the policy."""
    chosen_logp: Tensor
    """(M, C), mean log-prob of the chosen responses at C moments of training."""
    moments: list[int]
    """The C steps."""
    uncovered: Tensor
    """(M,), probability of responses that no pair contains."""
    implicit_gap: Tensor
    """(M,), mean implicit reward of the policy's own responses minus that of chosen ones."""


def grid() -> Tensor:
    """Where the responses lie, (K,) in (0, 1)."""
    return (torch.arange(K) + 0.5) / K


def true_reward() -> Tensor:
    """(K,): a straight rise from 0 to the peak, and a steep straight fall to the end."""
    x = grid()
    fall = TOP + (END - TOP) * (x - PEAK) / (1 - PEAK)
    return torch.where(x < PEAK, TOP * x / PEAK, fall)


def draw_pairs(coverage: float, seed: int) -> tuple[Tensor, Tensor]:
    """Chosen and rejected responses, (P,) indices each; responses are uniform over x < coverage."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(round(coverage * K), (2, PAIRS), generator=generator)
    second = torch.where(first == second, (second + 1) % round(coverage * K), second)
    reward = true_reward()
    wins = torch.rand(PAIRS, generator=generator) < (reward[first] - reward[second]).sigmoid()
    return torch.where(wins, first, second), torch.where(wins, second, first)


def initial_weights(seed: int) -> list[Tensor]:
    """(H,) slopes, offsets and outputs of the MLP; the output is 0, so the policy is `ref`."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    slopes = 4 * torch.randn(HIDDEN, generator=generator)
    kinks = torch.rand(HIDDEN, generator=generator)
    return [slopes, -slopes * kinks, torch.zeros(HIDDEN)]


def log_policies(weights: list[Tensor]) -> Tensor:
    """Log-probs (M, K) of all responses under all models."""
    slopes, offsets, outputs = (w[:, :, None] for w in weights)  # (M, H, 1)
    f = (outputs * torch.tanh(slopes * grid() + offsets)).sum(1)
    return f.log_softmax(-1)


def train(settings: list[Setting], seeds: list[int], steps: int = STEPS) -> Outcome:
    """Train every setting with every seed, together; rows are setting by setting.

    Args:
        settings: S settings.
        seeds: of data, labels and initial weights; all settings of one coverage share them.
        steps: full-batch Adam steps.

    Returns:
        The outcome, M = S * len(seeds) models.
    """
    models = list(product(settings, seeds))
    initial = zip(*(initial_weights(seed) for _, seed in models), strict=True)
    weights = [torch.stack(w).requires_grad_() for w in initial]  # (M, H) each
    drawn = {key: draw_pairs(*key) for key in {(s.coverage, seed) for s, seed in models}}
    chosen = torch.stack([drawn[s.coverage, seed][0] for s, seed in models])  # (M, P)
    rejected = torch.stack([drawn[s.coverage, seed][1] for s, seed in models])
    beta = torch.tensor([[s.beta] for s, _ in models])
    weight = torch.tensor([sft_weight(s.eta, s.beta, "sum", None) for s, _ in models])
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    history, moments = [], []
    every = max(1, steps // 30)
    for step in range(steps + 1):
        logps = log_policies(weights)
        picked, other = logps.gather(1, chosen), logps.gather(1, rejected)
        if step % every == 0 or step == steps:
            history.append(picked.detach().mean(1))
            moments.append(step)
        if step == steps:
            break
        ref = -math.log(K)
        dpo, _, _ = sigmoid_loss(picked - ref, other - ref, beta, 0.0, 0.0)
        losses = dpo.mean(1) - weight * picked.mean(1)  # one number per model: none sees another
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return measure(logps.detach(), models, chosen, torch.stack(history, 1), moments)


def measure(
    logps: Tensor, models: list, chosen: Tensor, history: Tensor, moments: list[int]
) -> Outcome:
    """Compare the trained policies with the truth."""
    policy, coverage = logps.exp(), torch.tensor([[s.coverage] for s, _ in models])
    implicit = torch.tensor([[s.beta] for s, _ in models]) * (logps + math.log(K))
    return Outcome(
        log_policy=logps,
        true_reward=(policy * true_reward()).sum(1),
        chosen_logp=history,
        moments=moments,
        uncovered=(policy * (grid() >= coverage)).sum(1),
        implicit_gap=(policy * implicit).sum(1) - implicit.gather(1, chosen).mean(1),
    )


def sweep() -> list[Setting]:
    """Every combination of beta, eta and coverage."""
    return [Setting(*values) for values in product(BETAS, ETAS, COVERAGES)]
