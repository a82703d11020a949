"""What objectives cost and what they know, measured at the truth of two problems: one table.

    python tests/benchmarks/which_objective.py

*Gaussian*: five parameters of a law in the plane. *Spins*: coupling and field of eight spins on a
ring, summed over all 256 states. An estimate is one Newton step from the truth on the objective's
own equation (the rest of its error is of the order of one over the number of rows), and the rows'
influences give its variance. Draws beside a datum are made once.

bias      estimate minus truth, in standard errors of maximum likelihood with 1000 rows, with its
          Monte Carlo error: of the parameter that is off by most errors. It grows as the square
          root of the number of rows. The estimate of maximum likelihood on the same rows, which is
          right on average, is subtracted
variance  of the estimate, relative to maximum likelihood: the mean over parameters
weight    the same for the weight of a mode: of N(-4, 1) and N(4, 1), mixed .3 to .7, or of eight
          bits that are 1 with probability .03 and those with .97; "blind" beyond 100, "biased"
          where it is wrong by more than five errors
energies  evaluations of the energy per datum and step, those along derivatives counted once
slopes    backward passes in x per datum and step

Processor seconds are in brackets.

Objectives that pool rows or compare them are measured on batches of 100 rows. MMD and KALE in a
kernel's space train what draws: a Gaussian by its mean and Cholesky factor. A critic estimates no
law.
"""

from __future__ import annotations

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
    MMD,
    NCE,
    BernoulliFlips,
    ConditionalNCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    DiscreteEnergyDiscrepancy,
    DiscreteFisher,
    DonskerVaradhan,
    EnergyDiscrepancy,
    FlowContrastive,
    HeatKernel,
    KernelKALE,
    KernelStein,
    MaskedSite,
    MinimumProbabilityFlow,
    PersistentContrastiveDivergence,
    PseudoLikelihood,
    RankingNCE,
    RatioMatching,
    RecoveryLikelihood,
    ScoreMatching,
    SelfNormalized,
    SiteFlip,
    SlicedScoreMatching,
    TelescopingNCE,
    WassersteinCritic,
    geometric_levels,
)
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
    moved: Any = None  # (theta, x, keep, spread): minus the log density of keep x + spread noise
    exact: Any = None  # the truth as a distribution

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

    def moved(theta: Tensor, x: Tensor, keep: Any, spread: Any) -> Tensor:
        a, off, d, b, c = theta[..., :5].unbind(-1)
        scale, noise = keep**2 / (a * d - off**2), spread**2
        first, cross, second = scale * d + noise, -scale * off, scale * a + noise
        det = first * second - cross**2
        u = x[..., 0] - keep * (d * b - off * c) / (a * d - off**2)
        v = x[..., 1] - keep * (a * c - off * b) / (a * d - off**2)
        squares = (second * u**2 - 2 * cross * u * v + first * v**2) / det
        return 0.5 * squares + 0.5 * det.log() + math.log(2 * math.pi)

    truth = torch.tensor([1.4, -0.5, 0.8, 0.4, -0.2], dtype=torch.float64)
    return Problem(potential, truth, lambda n: law.sample((n,)), log_z, base, None, moved, law)


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

    def moved(theta: Tensor, x: Tensor, keep: Any, spread: Any) -> Tensor:
        variance, odds = keep**2 + spread**2, theta[..., 0]
        first, second = (-0.5 * (x[..., 0] - m * keep) ** 2 / variance for m in (-4.0, 4.0))
        of_first, of_second = (torch.nn.functional.logsigmoid(sign * odds) for sign in (1, -1))
        mixed = torch.logaddexp(first + of_first, second + of_second)
        return 0.5 * (2 * math.pi * torch.as_tensor(variance)).log() - mixed

    base = dist.Normal(torch.zeros(1, dtype=torch.float64), 5.0).to_event(1)
    truth = torch.tensor([math.log(0.3 / 0.7)], dtype=torch.float64)
    weights = dist.Categorical(torch.tensor([0.3, 0.7], dtype=torch.float64))
    modes = dist.Normal(torch.tensor([[-4.0], [4.0]], dtype=torch.float64), 1.0).to_event(1)
    exact = dist.MixtureSameFamily(weights, modes)
    return Problem(potential, truth, draw, log_z, base, None, moved, exact)


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


def two_modes_of_bits() -> Problem:
    """One parameter: the log odds of eight bits that are mostly 0 against mostly 1."""
    share = math.log(0.03 / 0.97)

    def potential(theta: Tensor, x: Tensor) -> Tensor:
        ones = x.sum(-1)
        return -torch.logaddexp(share * ones + theta[..., 0], share * (8 - ones))

    def draw(num: int) -> Tensor:
        ones = torch.where(torch.rand(num, 1) < 0.3, 0.03, 0.97)
        return (torch.rand(num, 8) < ones).double()

    def log_z(theta: Tensor) -> Tensor:
        return torch.nn.functional.softplus(theta[..., 0]) - 8 * math.log(0.97)

    options = {"event_shape": (8,), "support": constraints.independent(constraints.boolean, 1)}
    truth = torch.tensor([math.log(0.3 / 0.7)], dtype=torch.float64)
    return Problem(potential, truth, draw, log_z, None, options)


def fair_coins() -> Any:
    """Every state of eight bits alike."""
    return dist.Bernoulli(0.5 * torch.ones(8, dtype=torch.float64)).to_event(1)


# --- models other than the plain one


def knows_the_level(problem: Problem, theta: Tensor, count: Any) -> EnergyDistribution:
    """The law of noised data at every level of noise."""

    def energy(x: Tensor, noise_std: Any = 0.0) -> Tensor:
        count(x)
        return problem.moved(theta, x, 1.0, noise_std) + problem.base.log_prob(x)

    return EnergyDistribution(energy, problem.base)


WAYMARKS = (0.4, 0.7, 0.9, 1.0)


class Bridges:
    """Log ratios of the laws at neighbouring waymarks, each free by a constant."""

    def __init__(self, problem: Problem, theta: Tensor, count: Any) -> None:
        self.problem, self.count = problem, count
        size = len(problem.truth)
        self.shared, self.constants = theta[..., :size], theta[..., size:].movedim(-1, 0)
        self.scale = problem.base.base_dist.scale.max()

    def bridges(self, x: Tensor) -> Tensor:
        self.count(x)
        laws = torch.stack(
            [
                self.problem.moved(self.shared, x, (1 - w**2) ** 0.5, w * self.scale)
                for w in (0.0, *WAYMARKS)
            ]
        )
        steps = laws[:-1] - laws[1:]
        constants = self.constants
        while constants.dim() < steps.dim():
            constants = constants.unsqueeze(1)
        return steps + constants

    def __call__(self, x: Tensor) -> Tensor:
        return self.bridges(x).sum(0)


def bridged(problem: Problem, theta: Tensor, count: Any) -> EnergyDistribution:
    return EnergyDistribution(Bridges(problem, theta, count), problem.base)


# --- estimates at the truth


@dataclass
class Row:
    """An objective, and what of the model or the guide is its own."""

    make: Callable[[], Any]
    law: Callable[[Problem, Tensor, Any], EnergyDistribution] = Problem.law
    guided: bool = False  # the guide holds the truth
    constants: int = 0  # parameters beside those of the problem
    warmup: int = 0  # uses of chains before the one that counts


@dataclass
class Estimate:
    """Influences of the rows, ``(R, p)``, and those under maximum likelihood; costs per datum."""

    influence: Tensor
    likelihood: Tensor
    energies: float
    slopes: float


MOVING = (ContrastiveDivergence, PersistentContrastiveDivergence, RecoveryLikelihood)


def estimate(problem: Problem, row: Row, num_rows: int) -> Estimate:
    x = problem.draw(num_rows)
    objective, size = row.make(), len(problem.truth)
    counter = Counter(num_rows)
    theta = torch.cat([problem.truth, torch.zeros(row.constants)])
    law = row.law(problem, theta, counter).expand([num_rows])
    noise = problem.exact if row.guided else None
    with torch.no_grad():
        for _ in range(row.warmup):
            objective.draw(law, x, noise)
        counter.restart()
        contrast = objective.draw(law, x, noise)
    has_constant = objective.learns_log_normalizer and not row.constants
    if has_constant:
        theta = torch.cat([theta, problem.log_z(theta)[None]])

    def rows(theta: Tensor) -> Tensor:
        c = theta[..., -1] if has_constant else torch.zeros(())
        law = row.law(problem, theta, counter).expand([num_rows])
        return objective.per_datum(law, x, contrast, c)

    each = theta.expand(num_rows, -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(each).sum(), each)
    cost = counter.energies, counter.slopes
    if isinstance(objective, MOVING):
        hessian = slope_with_moving_draws(problem, x, scores)
    else:
        hessian = torch.autograd.functional.hessian(lambda t: rows(t).mean(), theta)
    influence = -(scores @ torch.linalg.pinv(hessian, hermitian=True, rtol=1e-12))[:, :size]
    return Estimate(influence, likelihood(problem, x), *cost)


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


def likelihood(problem: Problem, x: Tensor) -> Tensor:
    """Influences of rows under maximum likelihood, ``(R, p)``."""
    each = problem.truth.expand(len(x), -1).clone().requires_grad_()
    loss = problem.potential(each, x) + problem.log_z(each)
    (scores,) = torch.autograd.grad(loss.sum(), each)
    return -scores @ torch.linalg.inv(information(problem, x))


class Counter:
    """Counts points given to the energy, and those of them whose slope in x is asked for."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.restart()

    def restart(self) -> None:
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


STEP = partial(MALA, step_size=0.7)

CONTINUOUS: dict[str, Row] = {
    "NCE(1)": Row(partial(NCE, 1)),
    "NCE(10)": Row(partial(NCE, 10)),
    "FlowContrastive, flow at optimum": Row(FlowContrastive, guided=True),
    "TelescopingNCE(4)": Row(
        partial(TelescopingNCE, 4, waymarks=WAYMARKS), law=bridged, constants=4
    ),
    "RankingNCE(10)": Row(partial(RankingNCE, 10)),
    "SelfNormalized(10)": Row(partial(SelfNormalized, 10)),
    "KALE": Row(KALE),
    "ConditionalNCE(10)": Row(partial(ConditionalNCE, 10, scale=1.0, unit=1.0)),
    "EnergyDiscrepancy(t=1, M=16)": Row(partial(EnergyDiscrepancy, 1.0, 16)),
    "EnergyDiscrepancy(t=16, M=16)": Row(partial(EnergyDiscrepancy, 16.0, 16)),
    "ScoreMatching": Row(ScoreMatching),
    "ScoreMatching(hutchinson)": Row(partial(ScoreMatching, trace="hutchinson")),
    "SlicedScoreMatching": Row(SlicedScoreMatching),
    "DenoisingScoreMatching(.1)": Row(partial(DenoisingScoreMatching, 0.1, control_variate=True)),
    "DenoisingScoreMatching(.1 to 8)": Row(
        partial(
            DenoisingScoreMatching,
            geometric_levels(0.1, 8.0, 6),
            conditioning="argument",
            control_variate=True,
        ),
        law=knows_the_level,
    ),
    "ContrastiveDivergence(1)": Row(partial(ContrastiveDivergence, 1, kernel=STEP)),
    "ContrastiveDivergence(20)": Row(partial(ContrastiveDivergence, 20, kernel=STEP)),
    "PersistentContrastiveDivergence(1)": Row(
        partial(PersistentContrastiveDivergence, 1, kernel=STEP), warmup=50
    ),
    "RecoveryLikelihood(1)": Row(partial(RecoveryLikelihood, 1.0)),
}

DISCRETE: dict[str, Row] = {
    "PseudoLikelihood": Row(PseudoLikelihood),
    "RatioMatching": Row(RatioMatching),
    "DiscreteFisher": Row(DiscreteFisher),
    "MinimumProbabilityFlow": Row(MinimumProbabilityFlow),
    "DiscreteED(flips .1, M=32)": Row(partial(DiscreteEnergyDiscrepancy, BernoulliFlips(0.1), 32)),
    "DiscreteED(one site, M=32)": Row(partial(DiscreteEnergyDiscrepancy, SiteFlip(), 32)),
    "DiscreteED(masked, M=32)": Row(partial(DiscreteEnergyDiscrepancy, MaskedSite(), 32)),
    "DiscreteED(heat .3, M=32)": Row(
        partial(DiscreteEnergyDiscrepancy, HeatKernel("uniform", 0.3), 32)
    ),
    "DiscreteED(heat 1, M=32)": Row(
        partial(DiscreteEnergyDiscrepancy, HeatKernel("uniform", 1.0), 32)
    ),
    "NCE(10), fair coins": Row(lambda: NCE(10, fair_coins())),
    "RankingNCE(10), fair coins": Row(lambda: RankingNCE(10, fair_coins())),
    "ContrastiveDivergence(1)": Row(ContrastiveDivergence),
    "ContrastiveDivergence(10)": Row(partial(ContrastiveDivergence, 10)),
    "PersistentContrastiveDivergence(1)": Row(
        partial(PersistentContrastiveDivergence, 1), warmup=30
    ),
}


# --- estimates on batches, for objectives that pool rows or compare them

BATCH, EPSILON = 100, 1e-3
Loss = Callable[[Any, Tensor, Tensor, Any], Tensor]


@dataclass
class Compared:
    """An objective of many rows at once, its loss per datum, and the family of laws it learns."""

    make: Callable[[], Any]
    loss: Loss
    law: Callable[[Tensor], Any]
    truth: Tensor


def of_energy(objective: Any, theta: Tensor, x: Tensor, count: Any) -> Tensor:
    law = PLANE.law(theta, count).expand([len(x)])
    with torch.no_grad():
        contrast = objective.draw(law, x, None)
    return objective.per_datum(law, x, contrast, torch.zeros(())).mean()


def of_generator(objective: Any, theta: Tensor, x: Tensor, count: Any) -> Tensor:
    law = PLANE.law(PLANE.truth, count).expand([len(x)])
    contrast = objective.draw(law, x, by_factor(theta))
    return objective.per_datum(law, x, contrast, torch.zeros(())).mean()


def by_energy(theta: Tensor) -> Any:
    """A Gaussian by its precision and linear term."""
    a, off, d, b, c = theta
    precision = torch.stack([a, off, off, d]).reshape(2, 2)
    return dist.MultivariateNormal(
        torch.linalg.solve(precision, torch.stack([b, c])), precision_matrix=precision
    )


def by_factor(theta: Tensor) -> Any:
    """A Gaussian by its mean and Cholesky factor."""
    factor = torch.stack([theta[2], torch.zeros(()), theta[3], theta[4]]).reshape(2, 2)
    return dist.MultivariateNormal(theta[:2], scale_tril=factor)


def gradients(row: Compared, data: list[Tensor], theta: Tensor, count: Any) -> Tensor:
    """Gradients of the loss on all batches, ``(B, p)``, with the same draws at every theta."""
    objective, found = row.make(), []
    for seed, x in enumerate(data):
        torch.manual_seed(seed)
        count.restart()
        moved = theta.clone().requires_grad_()
        found.append(torch.autograd.grad(row.loss(objective, moved, x, count), moved)[0])
    return torch.stack(found)


def judged_on_batches(row: Compared, num_batches: int) -> Judged:
    """Newton steps of batches, their slope by differences."""
    data, counter = [PLANE.draw(BATCH) for _ in range(num_batches)], Counter(BATCH)
    scores = gradients(row, data, row.truth, counter)
    cost = counter.energies, counter.slopes

    def moved(step: Tensor) -> Tensor:
        return gradients(row, data[: num_batches // 5], row.truth + step, counter).mean(0)

    steps = EPSILON * torch.eye(len(row.truth))
    slope = torch.stack([(moved(e) - moved(-e)) / (2 * EPSILON) for e in steps])
    influence = -torch.linalg.solve(0.5 * (slope + slope.T), scores.T).T
    return Judged.of(influence, exact_influence(row, data), *cost, rows=BATCH)


def exact_influence(row: Compared, data: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Newton steps of batches under maximum likelihood, and the variance of a row's."""

    def loss(theta: Tensor, x: Tensor) -> Tensor:
        return -row.law(theta).log_prob(x).mean()

    hessian = torch.autograd.functional.hessian(partial(loss, x=torch.cat(data)), row.truth)
    each = [torch.autograd.functional.jacobian(partial(loss, x=x), row.truth) for x in data]
    inverse = torch.linalg.inv(hessian)
    return -torch.stack(each) @ inverse, inverse.diagonal()


def true_factor() -> Tensor:
    factor = PLANE.exact.scale_tril
    return torch.stack([*PLANE.exact.loc, factor[0, 0], factor[1, 0], factor[1, 1]])


PLANE = gaussian()

BATCHED: dict[str, Compared] = {
    "DonskerVaradhan": Compared(DonskerVaradhan, of_energy, by_energy, PLANE.truth),
    "KernelStein": Compared(KernelStein, of_energy, by_energy, PLANE.truth),
    "MMD": Compared(MMD, of_generator, by_factor, true_factor()),
    "KernelKALE": Compared(KernelKALE, of_generator, by_factor, true_factor()),
}


# --- the table

ROWS_OF_BIAS = 1000
HEAD = f"{'bias':>14s} {'variance':>9s} {'weight':>8s} {'energies':>9s} slopes"


@dataclass
class Judged:
    """The bias that is most of its errors, the error, the relative variance, and costs."""

    bias: float
    error: float
    variance: float
    energies: float
    slopes: float

    @classmethod
    def of(
        cls, found: Tensor, best: tuple[Tensor, Tensor], energies: float, slopes: float, rows: int
    ) -> Judged:
        """Judges influences of groups of ``rows`` rows by those under maximum likelihood."""
        exact, variance = best
        unit = (variance / ROWS_OF_BIAS).sqrt()
        off = (found - exact) / unit
        error = off.std(0) / len(off) ** 0.5
        worst = (off.mean(0) / error).abs().argmax()
        relative = float((rows * found.var(0) / variance).mean())
        return cls(float(off.mean(0)[worst]), float(error[worst]), relative, energies, slopes)


def judged(problem: Problem, row: Row, rows: int, repeats: int) -> Judged:
    found = [estimate(problem, row, rows) for _ in range(repeats)]
    influence = torch.cat([f.influence for f in found])
    exact = torch.cat([f.likelihood for f in found])
    variance = torch.linalg.inv(information(problem, problem.draw(rows))).diagonal()
    return Judged.of(influence, (exact, variance), found[0].energies, found[0].slopes, rows=1)


def weight_of_modes(problem: Problem, row: Row, rows: int) -> str:
    try:
        found = judged(problem, row, rows, 2)
    except (ValueError, RuntimeError, torch.linalg.LinAlgError):
        return "n/a"
    if abs(found.bias) > 5 * found.error:
        return "biased"
    return f"{found.variance:.2f}" if found.variance < 100 else "blind"


def line(found: Judged, weight: str) -> str:
    bias = f"{found.bias:6.2f} +-{found.error:5.2f} {found.variance:9.2f}"
    return f"{bias} {weight:>8s} {found.energies:9.1f} {found.slopes:6.1f}"


def cost_of_critic(rows: int) -> str:
    """A critic estimates no law: what its step costs."""
    counter, objective, x = Counter(rows), WassersteinCritic(), PLANE.draw(rows)
    law = PLANE.law(PLANE.truth, counter).expand([rows])
    with torch.no_grad():
        contrast = objective.draw(law, x, None)
    objective.per_datum(law, x, contrast, torch.zeros(()))
    return f"{'-':>14s} {'-':>9s} {'-':>8s} {counter.energies:9.1f} {counter.slopes:6.1f}"


def lines(options: Any) -> dict[str, dict[str, Callable[[], str]]]:
    """What makes every line of the two tables, by its name."""
    rows, repeats = options.rows, options.repeats

    def plain(problem: Problem, modes: Problem, row: Row) -> str:
        return line(judged(problem, row, rows, repeats), weight_of_modes(modes, row, rows))

    continuous = {n: partial(plain, PLANE, two_modes(), row) for n, row in CONTINUOUS.items()}
    for name, compared in BATCHED.items():
        num = rows * repeats // (2 * BATCH)
        continuous[name] = partial(lambda c, n: line(judged_on_batches(c, n), "n/a"), compared, num)
    continuous["WassersteinCritic"] = partial(cost_of_critic, rows)
    spins = {n: partial(plain, ring(), two_modes_of_bits(), row) for n, row in DISCRETE.items()}
    return {"Gaussian": continuous, "spins": spins}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--objective", default="", help="only objectives with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for title, makers in lines(options).items():
        print(f"\n{title:34s} {HEAD}")
        for name, make in makers.items():
            if options.objective not in name:
                continue
            pyro.set_rng_seed(20_260)
            started = time.process_time()
            text = make()
            print(f"{name:34s} {text}  ({time.process_time() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
