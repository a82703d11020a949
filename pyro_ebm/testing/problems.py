"""Targets whose moments, normalizer and exact draws are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM


@dataclass(frozen=True)
class Problem:
    """A distribution and what is known of it.

    Args:
        name: What it is called.
        dist: The distribution, float64.
        sample: ``n -> n`` exact independent draws, of a generalized EBM in its latent space.
        mean: Exact mean of a draw.
        variance: Exact variances.
        log_normalizer: Log Z in nats, with respect to the distribution's own base.
    """

    name: str
    dist: EnergyDistribution
    sample: Callable[[int], Tensor]
    mean: Tensor
    variance: Tensor
    log_normalizer: float


def gaussian() -> Problem:
    """Two coordinates of standard deviations 1 and 1/2, without a base."""
    scale = torch.tensor([1.0, 0.5], dtype=torch.float64)
    law = EnergyDistribution(
        lambda x: 0.5 * (x / scale).square().sum(-1), event_shape=(2,), sampler=_double
    )
    return Problem(
        "gaussian",
        law,
        lambda n: scale * torch.randn(n, 2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        scale.square(),
        math.log(2.0 * math.pi) + float(scale.log().sum()),
    )


def tilted_gaussian() -> Problem:
    """An energy on a Gaussian base: ``E = x^2/2`` on N(1, 1) is N(1/2, 1/2) with log Z known."""
    base = dist.Normal(torch.ones(3, dtype=torch.float64), 1.0).to_event(1)
    law = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), base)
    mean = torch.full((3,), 0.5, dtype=torch.float64)
    return Problem(
        "tilted gaussian",
        law,
        lambda n: mean + 0.5**0.5 * torch.randn(n, 3, dtype=torch.float64),
        mean,
        mean,
        3.0 * (-0.25 - 0.5 * math.log(2.0)),
    )


def gamma() -> Problem:
    """Gamma(3, 2) on the positive numbers: wrong without the Jacobian of the logarithm."""
    shape, rate = 3.0, 2.0
    law = EnergyDistribution(
        lambda x: rate * x - (shape - 1.0) * x.log(),
        event_shape=(),
        support=constraints.positive,
        sampler=_double,
    )
    exact = dist.Gamma(torch.tensor(shape, dtype=torch.float64), rate)
    log_z = math.lgamma(shape) - shape * math.log(rate)
    return Problem("gamma", law, lambda n: exact.sample((n,)), exact.mean, exact.variance, log_z)


def dirichlet() -> Problem:
    """Dirichlet(2, 3, 4) on the simplex."""
    weights = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    law = EnergyDistribution(
        lambda x: -((weights - 1.0) * x.log()).sum(-1),
        event_shape=(3,),
        support=constraints.simplex,
        sampler=_double,
    )
    exact = dist.Dirichlet(weights)
    log_z = float(weights.lgamma().sum() - weights.sum().lgamma())
    return Problem(
        "dirichlet", law, lambda n: exact.sample((n,)), exact.mean, exact.variance, log_z
    )


def linear_gebm() -> Problem:
    """A linear generator under a quadratic energy: its latent law is a Gaussian."""
    matrix = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.2]], dtype=torch.float64)
    pull = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    prior = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    law = GeneralizedEBM(
        lambda z: z @ matrix.T, prior, lambda x: 0.5 * x.square().sum(-1) - x @ pull
    )
    precision = torch.eye(2, dtype=torch.float64) + matrix.T @ matrix
    covariance = precision.inverse()
    mean = covariance @ matrix.T @ pull
    root = torch.linalg.cholesky(covariance)
    log_z = 0.5 * float(mean @ precision @ mean - torch.logdet(precision))
    return Problem(
        "linear gebm",
        law,
        lambda n: mean + torch.randn(n, 2, dtype=torch.float64) @ root.T,
        mean,
        covariance.diagonal(),
        log_z,
    )


def correlated_gaussian() -> Problem:
    """Five coordinates in a row, each correlated by 0.9 with the next: a valley off the axes."""
    place = torch.arange(5, dtype=torch.float64)
    covariance = 0.9 ** (place[:, None] - place).abs()
    precision, root = covariance.inverse(), torch.linalg.cholesky(covariance)
    law = EnergyDistribution(
        lambda x: 0.5 * (x.unsqueeze(-1) * precision * x.unsqueeze(-2)).sum((-2, -1)),
        event_shape=(5,),
        sampler=_double,
    )
    return Problem(
        "correlated gaussian",
        law,
        lambda n: torch.randn(n, 5, dtype=torch.float64) @ root.T,
        torch.zeros(5, dtype=torch.float64),
        torch.ones(5, dtype=torch.float64),
        2.5 * math.log(2.0 * math.pi) + 0.5 * float(torch.logdet(covariance)),
    )


def banana() -> Problem:
    """A standard normal x, and y = (x^2 - 1) / 2 plus standard normal noise."""

    def energy(x: Tensor) -> Tensor:
        bend = 0.5 * (x[..., 0].square() - 1.0)
        return 0.5 * x[..., 0].square() + 0.5 * (x[..., 1] - bend).square()

    def draw(n: int) -> Tensor:
        x, noise = torch.randn(2, n, dtype=torch.float64)
        return torch.stack([x, 0.5 * (x.square() - 1.0) + noise], -1)

    return Problem(
        "banana",
        EnergyDistribution(energy, event_shape=(2,), sampler=_double),
        draw,
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([1.0, 1.5], dtype=torch.float64),
        math.log(2.0 * math.pi),
    )


def funnel() -> Problem:
    """Neal's funnel with two leaves: v standard normal, and x given v of variance exp(v)."""

    def energy(x: Tensor) -> Tensor:
        v, leaves = x[..., 0], x[..., 1:]
        return 0.5 * v.square() + 0.5 * leaves.square().sum(-1) * (-v).exp() + v

    def draw(n: int) -> Tensor:
        v, leaves = torch.randn(n, 1, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
        return torch.cat([v, leaves * (0.5 * v).exp()], -1)

    return Problem(
        "funnel",
        EnergyDistribution(energy, event_shape=(3,), sampler=_double),
        draw,
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([1.0, math.exp(0.5), math.exp(0.5)], dtype=torch.float64),
        1.5 * math.log(2.0 * math.pi),
    )


def three_modes() -> Problem:
    """A Gaussian base tilted to a mixture of three Gaussians far apart; Z is 1."""
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        tilts = x @ centres.T - 0.5 * centres.square().sum(-1)
        return -torch.logsumexp(tilts + weights.log(), -1)

    def draw(n: int) -> Tensor:
        mode = torch.multinomial(weights, n, replacement=True)
        return centres[mode] + torch.randn(n, 2, dtype=torch.float64)

    base = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    mean = weights @ centres
    return Problem(
        "three modes",
        EnergyDistribution(energy, base),
        draw,
        mean,
        1.0 + weights @ centres.square() - mean.square(),
        0.0,
    )


def wall() -> Problem:
    """A normal cut off at zero by infinite energy: trajectories end in it, and must not count."""

    def energy(x: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 0.0, 0.5 * x.square().sum(-1), torch.inf)

    def draw(n: int) -> Tensor:
        x = torch.randn(n, 2, dtype=torch.float64)
        return torch.cat([x[:, :1].abs(), x[:, 1:]], 1)

    return Problem(
        "wall",
        EnergyDistribution(energy, event_shape=(2,), sampler=_double),
        draw,
        torch.tensor([math.sqrt(2.0 / math.pi), 0.0], dtype=torch.float64),
        torch.tensor([1.0 - 2.0 / math.pi, 1.0], dtype=torch.float64),
        math.log(math.pi),
    )


def _double(law: EnergyDistribution, shape: torch.Size) -> Tensor:
    raise NotImplementedError("a problem is drawn by its own sample")


MAKERS: dict[str, Callable[[], Problem]] = {
    "gaussian": gaussian,
    "tilted gaussian": tilted_gaussian,
    "gamma": gamma,
    "dirichlet": dirichlet,
    "linear gebm": linear_gebm,
    "correlated gaussian": correlated_gaussian,
    "banana": banana,
    "funnel": funnel,
    "three modes": three_modes,
    "wall": wall,
}
