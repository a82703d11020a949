"""All states of small lattices."""

import itertools
import math

import torch


def all_lattices(shape):
    """Every lattice of -1 and +1, ``(2^(n m), n, m)``, in float64."""
    states = itertools.product([-1.0, 1.0], repeat=math.prod(shape))
    return torch.tensor(list(states), dtype=torch.float64).reshape(-1, *shape)


def cell_of(x):
    """The number of each lattice in the order of :func:`all_lattices`."""
    bits = (x.flatten(-2) > 0).long()
    return bits @ (2 ** torch.arange(bits.shape[-1] - 1, -1, -1))
