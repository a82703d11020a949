"""Posteriors through anchors on grids, repeated: their errors in the errors that are stated."""

import torch
from families import Precision, log_z_of_precision

from pyro_ebm.energies import Ising
from pyro_ebm.normalizers import anchored
from pyro_ebm.normalizers.anchor_error import mcse_logz

SHAPE = (3, 3)
SUMMARIES = ("mean", "sd", "q05", "q95")


def lattices(natural):
    return Ising(natural[..., 0], SHAPE).log_normalizer()


# name: family, exact log Z, grid of the parameter, n, sum of the statistics, anchors, draws of each
PROBLEMS = {
    "lattices": (Ising(0.0, SHAPE), lattices, (0.0, 0.6), 10, 60.0, (0.25,), 1000),
    "precision": (Precision(1.0), log_z_of_precision, (0.8, 7.0), 40, -7.0, (2.0, 4.0), 300),
}


def grid_of(low, high):
    return torch.linspace(low, high, 801)


def posterior(grid, log_z, num, total):
    """Weights of a grid under a flat prior."""
    return (grid * total - num * log_z(grid[:, None])).nan_to_num(-torch.inf).softmax(0)


def moments(grid, weights):
    mean = (weights * grid).sum()
    sd = (weights * (grid - mean).square()).sum().sqrt()
    return torch.stack([mean, sd, *quantiles(grid, weights)])


def quantiles(grid, weights):
    return [grid[torch.searchsorted(weights.cumsum(0), torch.tensor(q))] for q in (0.05, 0.95)]


def drawn(grid, weights, num=200):
    at = (torch.arange(num) + 0.5) / num
    return grid[torch.searchsorted(weights.cumsum(0), at)][torch.randperm(num)].reshape(10, -1)


def z_of_repeats(problem, num_repeats, num_replicates=20):
    """Errors of mean, sd and quantiles in their stated errors, ``(repeats, 4)``."""
    family, exact, ends, num, total, anchors, num_draws = PROBLEMS[problem]
    grid = grid_of(*ends)
    truth = moments(grid, posterior(grid, exact, num, total))
    rows = []
    for _ in range(num_repeats):
        log_z = anchored(family, torch.tensor(anchors)[:, None], num_draws=num_draws)
        weights = posterior(grid, log_z, num, total)
        draws = {"k": drawn(grid, weights)}
        error = mcse_logz(
            draws, log_z, lambda d: d["k"][:, None], num, num_replicates=num_replicates
        )
        assert not error.doubts
        stated = torch.tensor([float(error.mcse["k"][s]) for s in SUMMARIES])
        rows.append((moments(grid, weights) - truth) / stated)
    return torch.stack(rows)
