"""Posterior of a random graph's coefficients by this package, ergmx or stock Pyro, on one core.

python -m peers.graph_samplers NETWORK METHOD NUM_CHAINS WARMUP DRAWS SEED OUT.npz SWEEPS BRIDGES

0 sweeps are ergmx's own default.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

BRIDGES, SWEEPS = int(sys.argv.pop()), int(sys.argv.pop())
from peers.outputs import Run, parsed  # noqa: E402

ARGS = parsed()
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
from pyro.infer.mcmc import MCMC as PyroMCMC  # noqa: E402
from torch import Tensor  # noqa: E402

from peers.networks import FORMULAS, PRIOR_SCALE, Network, load  # noqa: E402
from peers.stock_pyro_exchange import StockExchange  # noqa: E402
from pyro_ebm import EnergyDistribution  # noqa: E402
from pyro_ebm.energies import ExponentialRandomGraph  # noqa: E402
from pyro_ebm.energies.graph_statistics import (  # noqa: E402
    GWESP,
    Edges,
    GraphStatistic,
    NodeMatch,
    Triangles,
    ties_of,
)
from pyro_ebm.mcmc import MCMC, Sweeps  # noqa: E402
from pyro_ebm.mcmc.exchange.resampled import Resampled  # noqa: E402
from pyro_ebm.mcmc.exchange.surrogate_exchange import SurrogateExchange  # noqa: E402

NUM_GRAPHS = 512  # of the pool, which the surrogate is made of as well
NEWTON_SWEEPS = {
    "flomarriage": (3, 3, 3, 3),
    "zach": (3, 3, 3, 3),
    "faux.mesa.high": (4, 4, 4, 4, 8, 8, 16, 16),
}
POOLED = ("zach", "faux.mesa.high")  # auxiliary networks are drawn from the pool
WALKS = 0.05  # share of random-walk moves


def statistics(network: Network) -> list[GraphStatistic]:
    """Returns what the formula of the network names."""
    if network.name == "flomarriage":
        return [Edges(), Triangles()]
    if network.name == "zach":
        return [Edges(), GWESP(0.2)]
    return [Edges(), NodeMatch(network.labels("Grade")), GWESP(0.5)]


def prior(dim: int) -> dist.Distribution:
    """Returns ergmx's default."""
    return dist.Normal(torch.zeros(dim), PRIOR_SCALE).to_event(1)


def logistic_regression(x: Tensor, changes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the pseudo-likelihood estimate and its covariance."""
    theta = torch.zeros(changes.shape[1])
    for _ in range(25):
        p = (changes @ theta).sigmoid()
        covariance = torch.linalg.inv(changes.T @ (changes * (p * (1.0 - p)).unsqueeze(-1)))
        theta = theta + covariance @ (changes.T @ (x.double() - p))
    return theta, covariance


def simulated(
    family: ExponentialRandomGraph, x: Tensor, newton: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Returns about the maximum likelihood estimate and graphs drawn there."""
    graphs, observed = x.expand(NUM_GRAPHS, -1), family.statistics(x)
    for num_sweeps in newton:
        graphs = family.sweep(graphs, num_sweeps)
        counts = family.statistics(graphs)
        theta = family.natural() + torch.linalg.solve(counts.T.cov(), observed - counts.mean(0))
        family = family.with_natural(theta)
    return theta, family.sweep(graphs, newton[-1])


def ours(network: Network) -> Run:
    """Many chains in one batch."""
    terms, n = statistics(network), network.num_nodes
    x = ties_of(torch.as_tensor(network.adjacency()))

    def model(x: Tensor) -> None:
        theta = pyro.sample("theta", prior(len(terms)))
        pyro.sample("x", EnergyDistribution(ExponentialRandomGraph(theta, n, terms)), obs=x)

    begin = time.process_time()
    family = ExponentialRandomGraph(torch.zeros(len(terms)), n, terms)
    estimate, _ = logistic_regression(x, family.change_statistics(x))
    anchor, pool = simulated(family.with_natural(estimate), x, NEWTON_SWEEPS[network.name])
    counts = family.statistics(pool)
    spread = torch.linalg.inv(counts.T.cov())
    start = dist.MultivariateNormal(anchor, spread).sample((ARGS.num_chains,))
    is_pooled = network.name in POOLED
    auxiliary = Resampled(pool, anchor, num_sweeps=SWEEPS) if is_pooled else Sweeps(SWEEPS)
    kernel = SurrogateExchange(
        model,
        surrogate=lambda natural: ((natural - anchor) @ counts.T).logsumexp(-1),
        auxiliary=auxiliary,
        num_bridges=BRIDGES,
        random_walk_share=WALKS,
    )
    sampler = MCMC(
        kernel, ARGS.draws, ARGS.warmup, num_chains=ARGS.num_chains, disable_progbar=True
    )
    sampler.run(x, initial_params={"theta": start})
    seconds = time.process_time() - begin
    return finished(sampler.get_samples()["theta"].numpy(), seconds)


def ergmx(network: Network) -> Run:
    """Its defaults, but for the number of chains and draws."""
    import ergmx

    begin = time.process_time()
    fit = ergmx.bergm(
        network.graph,
        FORMULAS[network.name],
        main_iters=ARGS.draws,
        burn_in=ARGS.warmup,
        nchains=ARGS.num_chains,
        seed=ARGS.seed,
        aux_iters=SWEEPS * network.num_nodes * (network.num_nodes - 1) // 2 or None,
    )
    return finished(fit.chains, time.process_time() - begin)


def stock(network: Network) -> Run:
    """One chain of Pyro's, its kernel in plain torch."""
    terms, adjacency = statistics(network), torch.as_tensor(network.adjacency()).double()

    def change(graph: Tensor, i: int, j: int) -> Tensor:
        ends = torch.tensor([i]), torch.tensor([j])
        return torch.cat([term.change(graph.unsqueeze(0), *ends) for term in terms])

    begin = time.process_time()
    family = ExponentialRandomGraph(torch.zeros(len(terms)), network.num_nodes, terms)
    x = ties_of(adjacency)
    start, covariance = logistic_regression(x, family.change_statistics(x))
    jump = torch.linalg.cholesky(covariance) * 2.4 / len(terms) ** 0.5
    kernel = StockExchange(
        adjacency, change, start, jump, prior=prior(len(terms)), num_toggles=max(1000, len(x))
    )
    sampler = PyroMCMC(kernel, ARGS.draws, ARGS.warmup, disable_progbar=True)
    sampler.run()
    seconds = time.process_time() - begin
    return finished(sampler.get_samples(group_by_chain=True)["theta"].numpy(), seconds)


def finished(draws: np.ndarray, seconds: float) -> Run:
    """Returns a run that is timed as a whole."""
    nan = float("nan")
    return Run(draws, 0.0, 0.0, seconds, nan, nan, nan)


METHODS: dict[str, Callable[[Network], Run]] = {"ours": ours, "ergmx": ergmx, "stock": stock}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(ARGS.seed)
    METHODS[ARGS.method](load(ARGS.target)).save(ARGS.out)
