r"""Part 2: right support, wrong mass, where an energy is exactly what a generator lacks.

The generators are fixed and reach every point that the data reach, in wrong proportions. The energy
that repairs one is the log ratio of two laws on the same support, so KALE has a finite optimum and
the mass of every mode is known: this part can be checked, not only compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_ebm as ebm
from pyro_ebm.chains import MMDInterval, median_distance, mmd2_difference
from pyro_ebm.datasets import grid_of_gaussians, ring
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer import KALE

STD = 0.15  # of each Gaussian of the grid; their distance is one


class LopsidedRing(nn.Module):
    """A ring of radius 2 with more mass on its right: the direction of an off-centre Gaussian."""

    def forward(self, z: Tensor) -> Tensor:
        """Maps latents ``(..., 3)`` to points ``(..., 2)``."""
        direction = nn.functional.normalize(z[..., :2] + z.new_tensor([0.7, 0.0]), dim=-1)
        return direction * (2.0 + 0.1 * z[..., 2:])


class UnevenGrid(nn.Module):
    """A grid of Gaussians with uneven weights: on each axis the quantile function of a mixture."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.linspace(-3.0, 3.0, 2001, dtype=torch.float64)
        self.register_buffer("x", x)
        self.register_buffer("first", _latent_of(x, [1.0, 2.0, 3.0, 4.0, 5.0]))
        self.register_buffer("second", _latent_of(x, [4.0, 2.0, 1.0, 2.0, 4.0]))

    def forward(self, z: Tensor) -> Tensor:
        """Maps latents ``(..., 2)`` to points ``(..., 2)``."""
        axes = (
            _interpolate(z[..., 0], self.first, self.x),
            _interpolate(z[..., 1], self.second, self.x),
        )
        return torch.stack(axes, -1)


def _latent_of(x: Tensor, weights: list[float]) -> Tensor:
    """The standard normal quantile that goes with each ``x`` of a mixture around -2, ..., 2."""
    w = torch.tensor(weights, dtype=x.dtype)
    centres = torch.arange(-2.0, 3.0, dtype=x.dtype)
    cdf = dist.Normal(centres, STD).cdf(x[:, None]) @ (w / w.sum())
    return torch.special.ndtri(cdf.clamp(1e-15, 1 - 1e-15)).cummax(0).values


def _interpolate(z: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    right = torch.searchsorted(knots, z.detach().double()).clamp(1, len(knots) - 1)
    z0, z1, x0, x1 = knots[right - 1], knots[right], values[right - 1], values[right]
    return (x0 + (z - z0) * (x1 - x0) / (z1 - z0)).to(z.dtype)


@dataclass(frozen=True)
class Problem:
    """A generator, the data it should have produced, and a partition into modes of equal mass."""

    name: str
    generator: nn.Module
    latent_dim: int
    data: Callable[[int], Tensor]
    mode_of: Callable[[Tensor], Tensor]
    num_modes: int


def problems() -> list[Problem]:
    """The ring and the 25 Gaussians."""
    return [
        Problem("ring", LopsidedRing(), 3, ring, _sector, 8),
        Problem("25 Gaussians", UnevenGrid(), 2, _even_grid, _cell, 25),
    ]


def _even_grid(num: int) -> Tensor:
    return grid_of_gaussians(num, spacing=1.0, std=STD)


def _sector(x: Tensor) -> Tensor:
    turn = torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) + 0.5
    return (8 * turn).long().clamp(0, 7)


def _cell(x: Tensor) -> Tensor:
    row, column = (x.round() + 2).clamp(0, 4).long().unbind(-1)
    return 5 * row + column


class TiltModel(nn.Module):
    """A Pyro model with a fixed generator and an energy to be learned."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.generator = problem.generator
        self.energy = MLPEnergy(2, hidden=(64, 64))
        self.prior = dist.Normal(0.0, 1.0).expand([problem.latent_dim]).to_event(1)

    @property
    def gebm(self) -> ebm.GeneralizedEBM:
        """The distribution of one point."""
        return ebm.GeneralizedEBM(self.generator, self.prior, self.energy, event_shape=(2,))

    def forward(self, x: Tensor) -> None:
        """Observes points of shape ``(N, 2)``."""
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.gebm, obs=x)


@dataclass
class Corrected:
    """What an energy made of a generator: draws of both, the gain, the mass of every mode."""

    problem: Problem
    generator_draws: Tensor
    gebm_draws: Tensor
    gain: MMDInterval
    generator_mass: Tensor
    gebm_mass: Tensor

    @property
    def truth(self) -> float:
        """The mass of each mode."""
        return 1.0 / self.problem.num_modes

    def worst_mass(self, mass: Tensor) -> float:
        """The largest error of a mode's mass."""
        return float((mass - self.truth).abs().max())

    @property
    def sampling_error(self) -> float:
        """Standard error of one mode's mass, were the draws from the truth."""
        return math.sqrt(self.truth * (1 - self.truth) / len(self.gebm_draws))


def correct(problem: Problem, *, seed: int, num_steps: int, num_draws: int) -> Corrected:
    """Learns the energy from data, draws from the corrected law, and judges it on fresh points."""
    pyro.set_rng_seed(seed)
    train, test = problem.data(20_000), problem.data(2000)
    model = TiltModel(problem)
    # Both laws share their support, so the bound is finite with next to no penalty.
    objective = KALE(num_base=1024, gradient_penalty=1e-4)
    fitted = ebm.fit(
        model, train, objective, lr=5e-3, batch_size=512, num_steps=num_steps, ema=0.995
    )
    fitted.use_average()
    base, tilted = model.gebm.base.sample((num_draws,)), model.gebm.sample((num_draws,))
    gain = mmd2_difference(tilted, base, test, bandwidth=median_distance(test))
    return Corrected(problem, base, tilted, gain, _masses(problem, base), _masses(problem, tilted))


def _masses(problem: Problem, x: Tensor) -> Tensor:
    return torch.bincount(problem.mode_of(x), minlength=problem.num_modes) / len(x)
