"""Laws of the toy data sets in coordinates where they are uniform."""

from __future__ import annotations

import math

import pytest
import torch

from pyro_ebm.datasets import checkerboard, ring, two_spirals

NUM = 20_000


def turn(x):
    """The angle as a share of a full turn."""
    return torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi) % 1.0


UNIFORM = {
    "ring, angle": lambda: turn(ring(NUM, noise=0.0)),
    "spirals, squared radius": lambda: two_spirals(NUM, noise=0.0).square().sum(-1) / 9,
    "board, first coordinate": lambda: checkerboard(NUM)[:, 0] / 4 + 0.5,
}


def distance(u):
    """Kolmogorov-Smirnov distance from the uniform law, times the root of the sample's size."""
    ordered = u.double().sort().values
    steps = torch.arange(len(u) + 1) / len(u)
    gap = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return float(gap) * math.sqrt(len(u))


@pytest.mark.parametrize("name", UNIFORM)
def test_is_uniform(name):
    """Below 2.7, the 1e-6 quantile; a law that is off by 3 percent somewhere is above."""
    assert distance(UNIFORM[name]()) < 2.7


@pytest.mark.parametrize("power", [0.9, 0.5, 2.0])
def test_distance_sees_another_power(power):
    """The planted bug: a radius drawn uniformly has a squared radius of power two."""
    assert distance(torch.rand(NUM) ** power) > 2.7
