"""What objectives cost and what they know, measured at the truth of two problems: one table.

    python tests/benchmarks/which_objective.py

*Gaussian*: five parameters of a law in the plane. *Spins*: coupling and field of eight spins on a
ring, summed over all 256 states. An objective's minimizer is one Newton step from the truth (its
error is of the order of one over the number of rows), the rows' influences give its variance.

bias      the largest error of the minimizer over all rows of all repeats, in its standard errors:
          below 4 where an objective is consistent
variance  of the estimate, relative to maximum likelihood: the mean over parameters
weight    the same for the weight of a mode: of N(-4, 1) and N(4, 1), mixed .3 to .7 (Gaussian
          objectives); "blind" beyond 100
energies  evaluations of the energy per datum and step, those along derivatives counted once
slopes    backward passes in x per datum and step
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import (
    KALE,
    NCE,
    ConditionalNCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    DiscreteEnergyDiscrepancy,
    DiscreteFisher,
    EnergyDiscrepancy,
    MinimumProbabilityFlow,
    PseudoLikelihood,
    RankingNCE,
    RatioMatching,
    RecoveryLikelihood,
    ScoreMatching,
    SelfNormalized,
    SlicedScoreMatching,
)
from pyro_ebm.infer.site_perturbations import BernoulliFlips, HeatKernel, MaskedSite, SiteFlip
from pyro_ebm.mcmc import MALA


@dataclass
class Problem:
    """A family of laws, its truth, exact draws and the exact log Z."""

    potential: Callable[[Tensor, Tensor], Tensor]
    truth: Tensor
    draw: Callable[[int], Tensor]
    log_z: Callable[[Tensor], Tensor]
    base: Any = None
    options: Any = None

    def law(self, theta: Tensor, count: Any = None) -> EnergyDistribution:
        def energy(x: Tensor) -> Tensor:
            if count is not None:
                count(x)
            value = self.potential(theta, x)
            return value if self.base is None else value + self.base.log_prob(x)

        return EnergyDistribution(energy, self.base, **(self.options or {}))


# --- the problems

PRECISION = torch.tensor([[1.4, -0.5], [-0.5, 0.8]], dtype=torch.float64)
LINEAR = torch.tensor([0.4, -0.2], dtype=torch.float64)


def gaussian() -> Problem:
    def potential(theta: Tensor, x: Tensor) -> Tensor:
        a, off, d, b, c = theta[..., :5].unbind(-1)
        squares = 0.5 * (a * x[..., 0] ** 2 + d * x[..., 1] ** 2) + off * x[..., 0] * x[..., 1]
        return squares - b * x[..., 0] - c * x[..., 1]

    def log_z(theta: Tensor) -> Tensor:
        a, off, d, b, c = theta[..., :5].unbind(-1)
        det = a * d - off**2
        quadratic = (d * b**2 - 2 * off * b * c + a * c**2) / det
        return math.log(2 * math.pi) - 0.5 * det.log() + 0.5 * quadratic

    covariance = torch.linalg.inv(PRECISION)
    law = dist.MultivariateNormal(covariance @ LINEAR, covariance)
    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.7).to_event(1)
    truth = torch.tensor([1.4, -0.5, 0.8, 0.4, -0.2], dtype=torch.float64)
    return Problem(potential, truth, lambda n: law.sample((n,)), log_z, base)


def two_modes() -> Problem:
    """One parameter: the log odds of the first of two modes."""

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * (x + 4) ** 2, -0.5 * (x - 4) ** 2

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        first, second = parts(x[..., 0])
        return -torch.logaddexp(first + theta[..., 0], second)

    def draw(num: int) -> Tensor:
        sign = torch.where(torch.rand(num, 1) < 0.3, -1.0, 1.0)
        return 4.0 * sign + torch.randn(num, 1)

    def log_z(theta: Tensor) -> Tensor:
        return 0.5 * math.log(2 * math.pi) + torch.nn.functional.softplus(theta[..., 0])

    base = dist.Normal(torch.zeros(1, dtype=torch.float64), 5.0).to_event(1)
    truth = torch.tensor([math.log(0.3 / 0.7)], dtype=torch.float64)
    return Problem(potential, truth, draw, log_z, base)


def ring() -> Problem:
    """Eight spins on a ring, written as bits."""

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        spin = 2.0 * x - 1.0
        pairs = (spin * spin.roll(1, -1)).sum(-1)
        return -theta[..., 0] * pairs - theta[..., 1] * spin.sum(-1)

    states = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).double()
    truth = torch.tensor([0.35, 0.15], dtype=torch.float64)

    def log_z(theta: Tensor) -> Tensor:
        return torch.logsumexp(-potential(theta.unsqueeze(-2), states), -1)

    weights = (-potential(truth, states)).softmax(0)

    def draw(num: int) -> Tensor:
        return states[torch.multinomial(weights, num, replacement=True)]

    options = {"event_shape": (8,), "support": constraints.independent(constraints.boolean, 1)}
    return Problem(potential, truth, draw, log_z, None, options)


def fair_coins() -> Any:
    """Every state of eight bits alike."""
    return dist.Bernoulli(0.5 * torch.ones(8, dtype=torch.float64)).to_event(1)


# --- estimates at the truth


@dataclass
class Estimate:
    """Influences of the rows, ``(R, p)``, and energy evaluations and slopes per datum."""

    influence: Tensor
    energies: float
    slopes: float


def estimate(problem: Problem, make: Callable[[], Any], num_rows: int) -> Estimate:
    x = problem.draw(num_rows)
    objective, size = make(), len(problem.truth)
    counter = Counter(num_rows)
    theta = problem.truth.clone()
    law = problem.law(theta, counter).expand([num_rows])
    with torch.no_grad():
        contrast = objective.draw(law, x, None)
    if objective.learns_log_normalizer:
        theta = torch.cat([theta, problem.log_z(theta)[None]])

    def rows(theta: Tensor) -> Tensor:
        c = theta[..., -1] if theta.shape[-1] > size else torch.zeros(())
        law = problem.law(theta, counter).expand([num_rows])
        return objective.per_datum(law, x, contrast, c)

    each = theta.expand(num_rows, -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(each).sum(), each)
    cost = counter.energies, counter.slopes
    if objective.is_held_out_criterion:
        hessian = torch.autograd.functional.hessian(lambda t: rows(t).mean(), theta)
    else:
        hessian = slope_with_moving_draws(problem, x, scores)
    influence = -(scores @ torch.linalg.pinv(hessian, hermitian=True, rtol=1e-12))[:, :size]
    return Estimate(influence, *cost)


def slope_with_moving_draws(problem: Problem, x: Tensor, scores: Tensor) -> Tensor:
    """The slope of the expected gradient where draws y come from a kernel that keeps the law.

    With s the gradient of U and data from the law it is Cov(s(x), s(x) - s(y)): the mass that the
    kernel does not carry over is not seen.
    """
    each = problem.truth.expand(len(x), -1).clone().requires_grad_()
    (own,) = torch.autograd.grad(problem.potential(each, x).sum(), each)
    slope = scores.T @ (own - own.mean(0)) / len(x)
    return 0.5 * (slope + slope.T)


def information(problem: Problem, x: Tensor) -> Tensor:
    def mean(theta: Tensor) -> Tensor:
        return problem.potential(theta, x).mean() + problem.log_z(theta)

    return torch.autograd.functional.hessian(mean, problem.truth)


class Counter:
    """Counts points given to the energy, and those of them whose slope in x is asked for."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.points = self.sloped = 0

    def __call__(self, x: Tensor) -> None:
        value = x
        while torch._C._functorch.is_functorch_wrapped_tensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        num = value.numel() // value.shape[-1] if value.dim() else 1
        self.points += num
        self.sloped += num if x.requires_grad or value is not x else 0

    @property
    def energies(self) -> float:
        return self.points / self.num_rows

    @property
    def slopes(self) -> float:
        return self.sloped / self.num_rows


CONTINUOUS: dict[str, Callable[[], Any]] = {
    "NCE(1)": partial(NCE, 1),
    "NCE(10)": partial(NCE, 10),
    "RankingNCE(10)": partial(RankingNCE, 10),
    "ConditionalNCE(10)": partial(ConditionalNCE, 10, scale=1.0, unit=1.0),
    "SelfNormalized(10)": partial(SelfNormalized, 10),
    "KALE": KALE,
    "EnergyDiscrepancy(t=1, M=16)": partial(EnergyDiscrepancy, 1.0, 16),
    "EnergyDiscrepancy(t=16, M=16)": partial(EnergyDiscrepancy, 16.0, 16),
    "ScoreMatching": ScoreMatching,
    "ScoreMatching(hutchinson)": partial(ScoreMatching, trace="hutchinson"),
    "SlicedScoreMatching": SlicedScoreMatching,
    "DenoisingScoreMatching(.1)": partial(DenoisingScoreMatching, 0.1, control_variate=True),
    "ContrastiveDivergence(1)": partial(
        ContrastiveDivergence, 1, kernel=partial(MALA, step_size=0.7)
    ),
    "ContrastiveDivergence(20)": partial(
        ContrastiveDivergence, 20, kernel=partial(MALA, step_size=0.7)
    ),
    "RecoveryLikelihood(1)": partial(RecoveryLikelihood, 1.0),
}

DISCRETE: dict[str, Callable[[], Any]] = {
    "PseudoLikelihood": PseudoLikelihood,
    "RatioMatching": RatioMatching,
    "DiscreteFisher": DiscreteFisher,
    "MinimumProbabilityFlow": MinimumProbabilityFlow,
    "DiscreteED(flips .1, M=32)": partial(DiscreteEnergyDiscrepancy, BernoulliFlips(0.1), 32),
    "DiscreteED(one site, M=32)": partial(DiscreteEnergyDiscrepancy, SiteFlip(), 32),
    "DiscreteED(masked, M=32)": partial(DiscreteEnergyDiscrepancy, MaskedSite(), 32),
    "DiscreteED(heat, M=32)": partial(DiscreteEnergyDiscrepancy, HeatKernel("uniform", 0.3), 32),
    "NCE(10), fair coins": lambda: NCE(10, fair_coins()),
    "RankingNCE(10), fair coins": lambda: RankingNCE(10, fair_coins()),
    "ContrastiveDivergence(1)": ContrastiveDivergence,
    "ContrastiveDivergence(10)": partial(ContrastiveDivergence, 10),
}


# --- the table


def precision_of_likelihood(problem: Problem, num_rows: int) -> Tensor:
    """Variance of a row's influence under maximum likelihood, for every parameter."""
    return torch.linalg.inv(information(problem, problem.draw(num_rows))).diagonal()


def judged(problem: Problem, make: Callable[[], Any], rows: int, repeats: int) -> tuple[Any, ...]:
    """The largest z of the mean influence, the mean relative variance, and the costs."""
    found = [estimate(problem, make, rows) for _ in range(repeats)]
    influence = torch.cat([f.influence for f in found])
    z = influence.mean(0) / (influence.std(0) / len(influence) ** 0.5)
    relative = influence.var(0) / precision_of_likelihood(problem, rows)
    return float(z.abs().max()), float(relative.mean()), found[0].energies, found[0].slopes


def weight_of_modes(make: Callable[[], Any], rows: int, repeats: int) -> str:
    try:
        relative = judged(two_modes(), make, rows, repeats)[1]
    except (ValueError, RuntimeError, torch.linalg.LinAlgError):
        return "n/a"
    return f"{relative:8.2f}" if relative < 100 else "   blind"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--objective", default="", help="only objectives with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for title, problem, objectives in (
        ("Gaussian", gaussian(), CONTINUOUS),
        ("spins", ring(), DISCRETE),
    ):
        print(f"\n{title:32s} {'bias':>6s} {'variance':>9s} {'weight':>8s} {'energies':>9s} slopes")
        for name, make in objectives.items():
            if options.objective not in name:
                continue
            pyro.set_rng_seed(20_260)
            started = time.perf_counter()
            bias, variance, energies, slopes = judged(problem, make, options.rows, options.repeats)
            weight = weight_of_modes(make, options.rows, 2) if title == "Gaussian" else ""
            took = time.perf_counter() - started
            print(
                f"{name:32s} {bias:6.1f} {variance:9.2f} {weight:>8s} {energies:9.1f} {slopes:6.1f}"
                f"  ({took:.0f} s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
