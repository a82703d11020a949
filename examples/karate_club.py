r"""Zachary's karate club: is a friend of a friend a friend?

34 members of a university karate club and the 78 pairs that met outside of it (Zachary, Journal of
Anthropological Research 33, 1977). The exponential random graph

    p(x) = exp(theta . T(x)) / Z(theta),   a sum over 2^561 networks,

counts ties and, geometrically weighted with decay .2, the partners that tied members share: the
first shared partner of a tie is worth 1, every further one .18 of the one before. log Z is out of
reach, and exchange needs none: it draws a network at every proposal, by sweeps that start at the
data. With four of them the curvature of the posterior and a kernel Stein test say not to trust the
draws; of sixteen they say nothing. Networks from the posterior are compared with the data by
degrees, shared partners and distances.

Run it; the figure and the draws, for ArviZ, go to results/karate_club::

    python examples/karate_club.py            # two minutes
    python examples/karate_club.py --smoke    # a few seconds, chains too short to trust
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.chains import Record
from pyro_ebm.energies import ExponentialRandomGraph
from pyro_ebm.energies.graph_goodness_of_fit import (
    degree_counts,
    distance_counts,
    shared_partner_counts,
)
from pyro_ebm.energies.graph_statistics import GWESP, Edges, adjacency_of, ties_of
from pyro_ebm.mcmc import MCMC, Exchange, Sweeps, exchange_diagnostics
from pyro_ebm.plots import PALETTE

NUM_SWEEPS = 16  # from the data to each auxiliary network
NUM_NODES = 34
MET = {  # members from 1 to 34, each with those of higher number
    1: [2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 18, 20, 22, 32],
    2: [3, 4, 8, 14, 18, 20, 22, 31],
    3: [4, 8, 9, 10, 14, 28, 29, 33],
    4: [8, 13, 14],
    5: [7, 11],
    6: [7, 11, 17],
    7: [17],
    9: [31, 33, 34],
    10: [34],
    14: [34],
    15: [33, 34],
    16: [33, 34],
    19: [33, 34],
    20: [34],
    21: [33, 34],
    23: [33, 34],
    24: [26, 28, 30, 33, 34],
    25: [26, 28, 32],
    26: [32],
    27: [30, 34],
    28: [34],
    29: [32, 34],
    30: [33, 34],
    31: [33, 34],
    32: [33, 34],
    33: [34],
}
SCALE = 10.0  # of the normal priors, as Bergm and ergmx take it


def club() -> Tensor:
    """Returns the network as its dyads."""
    adjacency = torch.zeros(NUM_NODES, NUM_NODES, dtype=torch.bool)
    for member, others in MET.items():
        for other in others:
            adjacency[member - 1, other - 1] = adjacency[other - 1, member - 1] = True
    return ties_of(adjacency)


def network(theta: Tensor) -> ExponentialRandomGraph:
    """Returns the energy with these coefficients."""
    return ExponentialRandomGraph(theta, NUM_NODES, [Edges(), GWESP(0.2)])


def model(x: Tensor) -> None:
    """Ties, and ties between those who share partners."""
    edges = pyro.sample("edges", dist.Normal(torch.zeros(()), SCALE))
    gwesp = pyro.sample("gwesp", dist.Normal(torch.zeros(()), SCALE))
    pyro.sample("x", ebm.EnergyDistribution(network(torch.stack([edges, gwesp]))), obs=x)


def pseudo_likelihood(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logistic regression of ties on what they change, and its standard errors."""
    changes, theta = network(torch.zeros(2)).change_statistics(x), torch.zeros(2)
    for _ in range(25):
        p = (changes @ theta).sigmoid()
        covariance = torch.linalg.inv(changes.T @ (changes * (p * (1.0 - p)).unsqueeze(-1)))
        theta = theta + covariance @ (changes.T @ (x.double() - p))
    return theta, covariance.diagonal().sqrt()


def run_exchange(x: Tensor, args: argparse.Namespace) -> Record:
    """Prints where the chains start and what they find, and returns it with the verdict."""
    theta, errors = pseudo_likelihood(x)
    print(
        "pseudo-likelihood: "
        + ", ".join(f"{v:.3f} +- {e:.3f}" for v, e in zip(theta, errors, strict=True))
    )
    num_chains, warmup, num = (16, 20, 20) if args.smoke else (64, 100, 250)
    starts = dict(
        zip(("edges", "gwesp"), (theta + errors * torch.randn(num_chains, 2)).T, strict=True)
    )
    kernel = Exchange(model, auxiliary=Sweeps(NUM_SWEEPS), target_accept_prob=0.3)
    mcmc = MCMC(kernel, num, warmup, num_chains=num_chains, disable_progbar=True)
    mcmc.run(x, initial_params=starts)
    table = mcmc.summary()[["mean", "sd", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]]
    print(f"\nexchange with {NUM_SWEEPS} sweeps\n{table.to_string(float_format='{:.4f}'.format)}")
    better = Sweeps(10 if args.smoke else 50)
    verdict = exchange_diagnostics(mcmc, auxiliary=better, num_auxiliary=8, max_draws=256)
    print(verdict)
    return verdict.attached_to(mcmc.record)


def predicted(posterior: Record, x: Tensor, num: int) -> Tensor:
    """Returns adjacency matrices of posterior predictive networks, ``(num, n, n)``."""
    draws = torch.stack([torch.tensor(v).flatten() for v in posterior.draws.values()], -1)
    theta = draws[torch.randperm(len(draws))[:num]]
    graphs = network(theta).sweep(x.expand(len(theta), -1), 10)
    return adjacency_of(graphs.double(), NUM_NODES)


def draw_fit(ax: Axes, observed: Tensor, simulated: Tensor, names: list[str], title: str) -> None:
    """Draws the observed counts over the middle half and the middle 95 % of simulated ones."""
    levels = torch.tensor([0.025, 0.25, 0.75, 0.975])
    low, first, third, high = torch.quantile(simulated.double(), levels, dim=0)
    places = range(len(names))
    ax.bar(places, high - low, 0.7, low, color=PALETTE[0], alpha=0.25, label="95 % of networks")
    ax.bar(places, third - first, 0.7, first, color=PALETTE[0], alpha=0.5, label="50 %")
    ax.plot(places, observed, "ko-", markersize=4, linewidth=1, label="observed")
    ax.set_xticks(places, names)
    ax.set(title=title)


def draw_goodness_of_fit(path: Path, x: Tensor, graphs: Tensor) -> None:
    """Draws the three distributions."""
    adjacency = adjacency_of(x.double(), NUM_NODES)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = (
        (degree_counts, 19, "members by number of ties"),
        (shared_partner_counts, 11, "ties by shared partners"),
        (distance_counts, 8, "pairs by distance"),
    )
    for ax, (count, shown, title) in zip(axes, panels, strict=True):
        first = 1 if count is distance_counts else 0
        names = [str(k + first) for k in range(shown)]
        at = [*range(shown)]
        if count is distance_counts:  # the last place are the pairs that no path joins
            names, at = [*names, "none"], [*at, NUM_NODES - 1]
        draw_fit(ax, count(adjacency)[at], count(graphs)[:, at], names, title)
    axes[0].legend()
    figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/karate_club"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Samples, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    torch.set_default_dtype(torch.float64)
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    x = club()
    posterior = run_exchange(x, args)
    graphs = predicted(posterior, x, 100 if args.smoke else 500)
    draw_goodness_of_fit(args.out / "goodness_of_fit.png", x, graphs)
    ebm.to_arviz(posterior).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'goodness_of_fit.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
