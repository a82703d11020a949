r"""Marriages of Florentine families: wealth, triangles, and how well either explains the network.

Sixteen families of Florence around 1430, twenty marriages between them, and their wealth in
thousands of lira (Padgett, Ansell, American Journal of Sociology 98, 1993). An exponential random
graph says how likely a network is by what is counted in it:

    p(x) = exp(theta . T(x)) / Z(theta),   a sum over 2^120 networks.

1. *Edges and wealth.* No marriage depends on another, log Z is a sum over pairs, and the model is a
   logistic regression. HMC goes through the gradient of log Z.
2. *Edges and triangles.* log Z is out of reach. Exchange draws a network at every proposal, by
   sweeps that start at the data; twice as many show what the sweeps leave out.
3. *Goodness of fit* by what the model does not count: degrees, shared partners of the married,
   distances.

Where triangles are worth much, this model is degenerate: the complete network outweighs all others,
but what lies between is worth less than either, and sweeps from the data hardly ever get across. As
long as auxiliary networks stay sparse, exchange takes the sum over sparse ones for log Z, and keeps
coefficients that the posterior excludes. This is double Metropolis-Hastings, not the sweeps: with
six nodes, where all networks can be enumerated, thirty sweeps agree with the exact answer.

So the posterior of part 2 is wrong in its upper tail. Printed are the share of draws there, and
what the posterior is by log Z on a grid: annealed importance sampling for sparse networks, and a
lower bound by those that lack little of the complete one. With more sweeps the mean of triangles
falls towards it, but hundreds are not enough. Trust the grid, or a prior that keeps out of there.

Run it; the figure and the draws, for ArviZ, go to results/florentine_families::

    python examples/florentine_families.py            # about a minute
    python examples/florentine_families.py --smoke    # a few seconds, chains too short to trust
"""

from __future__ import annotations

import argparse
import math
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
from pyro_ebm.energies.graph_statistics import (
    Edges,
    NodeCovariate,
    Triangles,
    adjacency_of,
    ties_of,
)
from pyro_ebm.mcmc import HMC, MCMC, Exchange, Sweeps, exchange_diagnostics
from pyro_ebm.plots import PALETTE

WEALTH = {
    "Acciaiuoli": 10,
    "Albizzi": 36,
    "Barbadori": 55,
    "Bischeri": 44,
    "Castellani": 20,
    "Ginori": 32,
    "Guadagni": 8,
    "Lamberteschi": 42,
    "Medici": 103,
    "Pazzi": 48,
    "Peruzzi": 49,
    "Pucci": 3,
    "Ridolfi": 27,
    "Salviati": 10,
    "Strozzi": 146,
    "Tornabuoni": 48,
}
MARRIAGES = {
    "Acciaiuoli": "Medici",
    "Albizzi": "Ginori Guadagni Medici",
    "Barbadori": "Castellani Medici",
    "Bischeri": "Guadagni Peruzzi Strozzi",
    "Castellani": "Peruzzi Strozzi",
    "Guadagni": "Lamberteschi Tornabuoni",
    "Medici": "Ridolfi Salviati Tornabuoni",
    "Pazzi": "Salviati",
    "Peruzzi": "Strozzi",
    "Ridolfi": "Strozzi Tornabuoni",
}
PUBLISHED = {  # maximum likelihood, the tutorial of R's ergm; the last line by simulation there
    "edges": (-1.609,),
    "edges, wealth": (-2.594929, 0.010546),
    "edges, triangles": (-1.675, 0.158),
}
NUM_NODES = len(WEALTH)
WEALTH_TERM = NodeCovariate([float(wealth) for wealth in WEALTH.values()])
SCALE = 10.0  # of the normal priors, as Bergm and ergmx take it


def marriages() -> Tensor:
    """Returns the network as its dyads."""
    names = list(WEALTH)
    adjacency = torch.zeros(NUM_NODES, NUM_NODES, dtype=torch.bool)
    for name, others in MARRIAGES.items():
        for other in others.split():
            i, j = names.index(name), names.index(other)
            adjacency[i, j] = adjacency[j, i] = True
    return ties_of(adjacency)


# --- 1. edges and wealth: log Z is known


def logistic_regression(x: Tensor, changes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the maximum likelihood estimate and its standard errors, by Newton steps."""
    theta = torch.zeros(changes.shape[1])
    for _ in range(25):
        p = (changes @ theta).sigmoid()
        covariance = torch.linalg.inv(changes.T @ (changes * (p * (1.0 - p)).unsqueeze(-1)))
        theta = theta + covariance @ (changes.T @ (x - p))
    return theta, covariance.diagonal().sqrt()


def of_wealth(x: Tensor) -> None:
    """Marriages are more likely between the rich."""
    edges = pyro.sample("edges", dist.Normal(torch.zeros(()), SCALE))
    wealth = pyro.sample("wealth", dist.Normal(torch.zeros(()), SCALE))
    energy = ExponentialRandomGraph(torch.stack([edges, wealth]), NUM_NODES, [Edges(), WEALTH_TERM])
    pyro.sample("x", ebm.EnergyDistribution(energy), obs=x)


def wealth_explains(x: Tensor, args: argparse.Namespace) -> MCMC:
    """Prints the estimates beside the published ones and returns the posterior by HMC."""
    print(f"{'maximum likelihood':<28} {'here':>10} {'published':>10} {'std. error':>10}")
    for name, terms in (("edges", [Edges()]), ("edges, wealth", [Edges(), WEALTH_TERM])):
        family = ExponentialRandomGraph(torch.zeros(len(terms)), NUM_NODES, terms)
        theta, errors = logistic_regression(x, family.change_statistics(x))
        rows = zip(name.split(", "), theta.tolist(), PUBLISHED[name], errors.tolist(), strict=True)
        for label, here, there, error in rows:
            title = f"{label} of {name}" if label != name else label
            print(f"{title:<28} {here:>10.6f} {there:>10.6f} {error:>10.6f}")
    num = 30 if args.smoke else 200
    starts = theta + errors * torch.randn(64, 2)
    mcmc = MCMC(HMC(of_wealth), num, num, num_chains=64, disable_progbar=True)
    mcmc.run(x, initial_params=dict(zip(("edges", "wealth"), starts.T, strict=True)))
    print_summary("edges and wealth, HMC through log Z", mcmc)
    return mcmc


# --- 2. edges and triangles: log Z is out of reach


def of_triangles(x: Tensor) -> None:
    """Families that are tied to the same ones marry more often, or less."""
    edges = pyro.sample("edges", dist.Normal(torch.zeros(()), SCALE))
    triangles = pyro.sample("triangles", dist.Normal(torch.zeros(()), SCALE))
    pyro.sample("x", ebm.EnergyDistribution(network(torch.stack([edges, triangles]))), obs=x)


def network(theta: Tensor) -> ExponentialRandomGraph:
    """Returns the energy with these coefficients."""
    return ExponentialRandomGraph(theta, NUM_NODES, [Edges(), Triangles()])


def maximum_likelihood(x: Tensor, num_graphs: int) -> Tensor:
    """Returns the estimate by Newton steps on simulated moments, averaged over the last half."""
    observed = network(torch.zeros(2)).statistics(x)
    theta, graphs, passed = torch.tensor([-1.6, 0.0]), x.expand(num_graphs, -1), []
    for _ in range(30):
        graphs = network(theta).sweep(graphs, 5)
        counts = network(theta).statistics(graphs)
        theta = theta + torch.linalg.solve(counts.T.cov(), observed - counts.mean(0))
        passed.append(theta)
    return torch.stack(passed[15:]).mean(0)


def run_exchange(x: Tensor, num_sweeps: int, args: argparse.Namespace) -> MCMC:
    """Runs exchange with this many sweeps from the data to each auxiliary network."""
    num_chains, warmup, num = (16, 20, 20) if args.smoke else (64, 150, 500)
    kernel = Exchange(of_triangles, auxiliary=Sweeps(num_sweeps), target_accept_prob=0.3)
    mcmc = MCMC(kernel, num, warmup, num_chains=num_chains, disable_progbar=True)
    # Far from the data every auxiliary network is empty or full, and no chain would come back.
    starts = {"edges": -1.6 + 0.3 * torch.randn(num_chains), "triangles": torch.zeros(num_chains)}
    mcmc.run(x, initial_params=starts)
    return mcmc


def triangles_explain(x: Tensor, args: argparse.Namespace) -> Record:
    """Prints two posteriors, the second with twice the sweeps, and returns it with its verdict."""
    theta = maximum_likelihood(x, 200 if args.smoke else 2000)
    there = PUBLISHED["edges, triangles"]
    print(f"\n{'maximum likelihood':<28} {'here':>10} {'published':>10}")
    for k, name in enumerate(("edges", "triangles")):
        print(f"{name:<28} {float(theta[k]):>10.3f} {there[k]:>10.3f}")
    runs = {num: run_exchange(x, num, args) for num in (4, 8)}
    for num, mcmc in runs.items():
        print_summary(f"edges and triangles, exchange with {num} sweeps", mcmc)
        better = Sweeps(10 if args.smoke else 50)
        verdict = exchange_diagnostics(mcmc, auxiliary=better, num_auxiliary=8, max_draws=256)
        print(verdict)
    return verdict.attached_to(runs[8].record)


def print_summary(title: str, mcmc: MCMC) -> None:
    """Prints what ArviZ says of a run."""
    table = mcmc.summary()[["mean", "sd", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]]
    print(f"\n{title}\n{table.to_string(float_format='{:.4f}'.format)}")


def log_normalizers(edges: Tensor, triangles: Tensor, num_each: int) -> Tensor:
    """Returns log Z by annealing from networks without worth of triangles, ``(edges, triangles)``.

    Args:
        edges: Coefficients, ``(K,)``.
        triangles: The other, from 0 on in even steps up or down.
        num_each: Networks for each of the first.
    """
    first = edges.repeat_interleave(num_each)
    x = torch.rand(len(first), NUM_NODES * (NUM_NODES - 1) // 2) < first.sigmoid()[:, None]
    log_weights, log_z = torch.zeros(len(edges), num_each), []
    for now, to in zip(triangles, [*triangles[1:], triangles[-1]], strict=True):
        log_z.append(log_weights.logsumexp(1) - math.log(num_each))
        there = network(torch.stack([first, to.expand_as(first)], -1))
        log_weights = log_weights + (to - now) * there.statistics(x)[:, 1].view_as(log_weights)
        x = there.sweep(x, 1)
    size = NUM_NODES * (NUM_NODES - 1) // 2
    return torch.stack(log_z, 1) + size * edges.exp().log1p()[:, None]


def log_normalizer_grid(x: Tensor, num_each: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns edges, triangles and log Z on a grid: the larger of annealing and a lower bound.

    A network that lacks k ties of the complete one lacks at most 14 k of its 560 triangles.
    """
    edges, up = torch.linspace(-4.0, 0.5, 46), torch.arange(0.0, 1.6, 0.04)
    down = -torch.arange(0.0, 4.0, 0.04)
    below, above = (log_normalizers(edges, steps, num_each) for steps in (down, up))
    triangles = torch.cat([down.flip(0)[:-1], up])
    e, t = torch.meshgrid(edges, triangles, indexing="ij")
    ties, closed = network(torch.zeros(2)).statistics(torch.ones_like(x))
    lacking = torch.nn.functional.softplus(-e - (NUM_NODES - 2) * t)
    bound = torch.where(t > 0, ties * (e + lacking) + closed * t, -torch.inf)
    return e, t, torch.cat([below.flip(1)[:, :-1], above], 1).maximum(bound)


def print_grid(x: Tensor, args: argparse.Namespace) -> None:
    """Prints the posterior by log Z on a grid."""
    e, t, log_z = log_normalizer_grid(x, 5 if args.smoke else 100)
    ties, closed = network(torch.zeros(2)).statistics(x)
    log_p = ties * e + closed * t - log_z - (e**2 + t**2) / (2 * SCALE**2)
    p = log_p.flatten().softmax(0).view_as(log_p)
    print(f"\n{'edges and triangles, log Z on a grid':<38} {'mean':>8} {'sd':>8}")
    for name, value in (("edges", e), ("triangles", t)):
        mean = (p * value).sum()
        print(f"{name:<38} {mean:>8.3f} {(p * (value - mean) ** 2).sum().sqrt():>8.3f}")


# --- 3. goodness of fit


def predicted(posterior: Record, x: Tensor, num: int) -> Tensor:
    """Returns adjacency matrices of posterior predictive networks, ``(num, n, n)``."""
    draws = torch.stack([torch.tensor(v).flatten() for v in posterior.draws.values()], -1)
    theta = draws[torch.randperm(len(draws))[:num]]
    graphs = network(theta).sweep(x.expand(len(theta), -1), 20)
    return adjacency_of(graphs.double(), NUM_NODES)


def print_degenerate(posterior: Record) -> None:
    """Prints how many draws lie where the complete network is likelier than the sparse ones.

    These weigh about as much together as networks of independent marriages, triangles not counted.
    """
    edges, triangles = (torch.tensor(v).flatten() for v in posterior.draws.values())
    everyone = torch.ones(NUM_NODES * (NUM_NODES - 1) // 2)
    ties, closed = network(torch.zeros(2)).statistics(everyone)
    lead = edges * ties + triangles * closed - ties * edges.exp().log1p()
    share = float((lead > 0).double().mean())
    print(f"\nshare of draws where the complete network outweighs sparse ones: {share:.4f}")


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
        (degree_counts, 9, "families by number of marriages"),
        (shared_partner_counts, 6, "marriages by shared partners"),
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
    parser.add_argument("--out", type=Path, default=Path("results/florentine_families"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Estimates, samples, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    torch.set_default_dtype(torch.float64)
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    x = marriages()
    wealth_explains(x.double(), args)
    posterior = triangles_explain(x, args)
    print_degenerate(posterior)
    print_grid(x, args)
    graphs = predicted(posterior, x, 100 if args.smoke else 1000)
    draw_goodness_of_fit(args.out / "goodness_of_fit.png", x, graphs)
    ebm.to_arviz(posterior).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'goodness_of_fit.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
