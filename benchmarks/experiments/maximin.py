"""The maximin problem solved as it stands, and the RPO minimizer, on one tabular instance.

    max_pi min_R phi(pi, R),   phi = eta * (E_pi R - E_base R - beta * KL(pi || ref)) + L_D(R)

K responses to one prompt; every one of them occurs in the preference data and under `base`, so that
the minimum over R exists without a bound on R (an uncovered response would get reward -infinity,
and no probability). Three computations that share nothing but phi and the data:

    direct      the saddle point of phi itself, a root of its slopes; no duality, no RPO
    rpo         minimize the RPO loss over pi, with `rpo_kernels.losses`
    gap         max_pi phi(pi, R*) - min_R phi(pi*, R) for the reward that RPO's policy implies:
                0 if and only if (pi*, R*) is a saddle point

    python -m benchmarks.experiments.maximin
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares, minimize
from torch import Tensor

from rpo_kernels.losses import sft_weight, sigmoid_loss


@dataclass(frozen=True)
class Instance:
    """A tabular preference problem in float64."""

    ref: Tensor
    """(K,) reference policy."""
    base: Tensor
    """(K,) distribution that the SFT term imitates."""
    chosen: Tensor
    """(P,) indices."""
    rejected: Tensor
    """(P,) indices."""
    beta: float
    eta: float


def random_instance(seed: int, responses: int = 5, pairs: int = 60) -> Instance:
    """Random reference and preferences; `base` is how often a response was chosen, smoothed."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(responses, generator=generator, dtype=torch.float64).softmax(0)
    reward = 2 * torch.randn(responses, generator=generator, dtype=torch.float64)
    first = torch.arange(pairs) % responses
    shift = torch.randint(1, responses, (pairs,), generator=generator)
    second = (first + shift) % responses
    wins = torch.rand(pairs, generator=generator) < (reward[first] - reward[second]).sigmoid()
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    base = torch.bincount(chosen, minlength=responses).double() + 1
    return Instance(ref, base / base.sum(), chosen, rejected, beta=0.5, eta=0.3)


def phi(instance: Instance, log_policy: Tensor, reward: Tensor) -> Tensor:
    """The maximin objective."""
    policy = log_policy.exp()
    kl = (policy * (log_policy - instance.ref.log())).sum()
    data, _, _ = sigmoid_loss(reward[instance.chosen], reward[instance.rejected], 1.0, 0.0, 0.0)
    gain = ((policy - instance.base) * reward).sum() - instance.beta * kl
    return instance.eta * gain + data.mean()


def solve(function, start: Tensor) -> tuple[float, Tensor]:
    """Minimize a smooth function of a vector by BFGS."""

    def value_and_slope(point: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(point, requires_grad=True)
        value = function(x)
        (slope,) = torch.autograd.grad(value, x)
        return value.item(), slope.numpy()

    found = minimize(value_and_slope, start.numpy(), jac=True, method="BFGS",
                     options={"gtol": 1e-9, "maxiter": 2000})  # fmt: skip
    return float(found.fun), torch.tensor(found.x)


def worst_reward(instance: Instance, log_policy: Tensor) -> tuple[float, Tensor]:
    """Value and argument of min over R for a fixed policy."""
    start = torch.zeros_like(instance.ref)
    return solve(lambda reward: phi(instance, log_policy.detach(), reward), start)


def saddle_point(instance: Instance) -> tuple[Tensor, Tensor]:
    """Log-policy and reward at which phi has no slope in either: Newton-like, from the reference.

    phi is concave in the policy and convex in the reward, so this is the maximin solution. Both
    logits and rewards are determined up to a constant; here each sums to 0.
    """
    size = len(instance.ref)

    def slopes(point: np.ndarray) -> np.ndarray:
        x = torch.tensor(point, requires_grad=True)
        value = phi(instance, x[:size].log_softmax(0), x[size:])
        (slope,) = torch.autograd.grad(value, x)
        return np.append(slope.numpy(), [point[:size].sum(), point[size:].sum()])

    start = torch.cat([instance.ref.log() - instance.ref.log().mean(), torch.zeros(size)])
    found = least_squares(slopes, start.numpy(), method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15)
    if np.abs(found.fun).max() > 1e-9:
        raise RuntimeError(f"no saddle point found: slopes of {np.abs(found.fun).max():.1e} remain")
    x = torch.tensor(found.x)
    return x[:size].log_softmax(0), x[size:]


def rpo_policy(instance: Instance) -> Tensor:
    """Log-policy that minimizes the RPO loss; the SFT term's expectation is over `base`."""
    weight = sft_weight(instance.eta, instance.beta, "sum", None)

    def loss(logits: Tensor) -> Tensor:
        log_policy = logits.log_softmax(0)
        ratio = log_policy - instance.ref.log()
        chosen, rejected = ratio[instance.chosen], ratio[instance.rejected]
        value, _, _ = sigmoid_loss(chosen, rejected, instance.beta, 0.0, 0.0)
        return value.mean() - weight * (instance.base * log_policy).sum()

    return solve(loss, instance.ref.log())[1].log_softmax(0)


def duality_gap(instance: Instance, log_policy: Tensor) -> float:
    """How far (pi, R) is from a saddle point, R being the reward that pi implies."""
    reward = instance.beta * (log_policy - instance.ref.log())
    best_response = (instance.ref.log() + reward / instance.beta).log_softmax(0)
    above = phi(instance, best_response, reward).item()
    return above - worst_reward(instance, log_policy)[0]


def main() -> None:
    """Print the comparison on three instances."""
    np.set_printoptions(precision=5, suppress=True)
    for seed in range(3):
        instance = random_instance(seed)
        direct, _ = saddle_point(instance)
        rpo = rpo_policy(instance)
        print(f"instance {seed}\n  maximin {direct.exp().numpy()}\n  RPO     {rpo.exp().numpy()}")
        distance = (direct.exp() - rpo.exp()).abs().max().item()
        print(f"  largest difference {distance:.1e}, duality gap {duality_gap(instance, rpo):.1e}")


if __name__ == "__main__":
    main()
