r"""One lattice of spins, an exact posterior, and what it takes to sample it.

A single 32 x 32 torus is observed. With S = sum of s_i s_j over neighbors, each bond counted once,

    p(s | theta) = exp(theta S) / Z(theta),    theta ~ Uniform(.3, .55),

so that the posterior sees the lattice through S alone. Kaufman's formula (1949) gives Z(theta) of a
torus without a field in closed form: one quadrature is the truth for every sampler. Five lattices,
from one whose theta would like to be below .3 to one at the critical point, log(1 + 2^.5) / 2.

1. *With log Z.* HMC differentiates Kaufman's formula.
2. *Without it.* Exchange draws a lattice at every proposal, here by Swendsen-Wang sweeps from the
   data. They are no exact draws, but turning clusters over they forget where they started.
3. *The trap.* With sweeps that turn over one spin at a time exchange is too wide, by an amount that
   depends on their number, and R-hat does not see it (double Metropolis-Hastings: Liang, 2010).
4. *Is it at the critical point?* One lattice has no rows to leave out, but an evidence: a coupling
   that is free against one that is critical, by a bridge from the draws of 1.

Run it; the figure and the draws, for ArviZ, go to results/ising_field::

    python examples/ising_field.py            # a minute; exchange for one lattice
    python examples/ising_field.py --full     # half an hour; exchange for all five, longer chains
    python examples/ising_field.py --smoke    # a few seconds, chains too short to trust
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc import HMC, MCMC, Exchange, Kernel, Sweeps
from pyro_ebm.normalizers import bayes_factor, evidence
from pyro_ebm.plots import PALETTE

SHAPE = (32, 32)
LOWEST, HIGHEST = 0.3, 0.55
CRITICAL = 0.5 * math.log(1.0 + math.sqrt(2.0))
STATISTICS = (700, 900, 1100, 1300, 1448)  # the last is 2^.5 a site, the mean at the critical point
SHOWN = 1100


class WithoutLogZ(Ising):
    """The same energy, which keeps its log Z to itself. Its sweeps are Swendsen and Wang's."""

    is_tractable = False  # type: ignore[assignment]


class OneByOne(WithoutLogZ):
    """Its sweeps are a heat bath: every spin anew given its four neighbors."""

    def sweep(self, x: Tensor, num_sweeps: int) -> Tensor:
        """Returns lattices after sweeps over the white squares of the board, then the black."""
        n, m = self.event_shape
        white = (torch.arange(n)[:, None] + torch.arange(m)) % 2 == 0
        for _ in range(num_sweeps):
            for color in (white, ~white):
                around = x.roll(1, -1) + x.roll(-1, -1) + x.roll(1, -2) + x.roll(-1, -2)
                up = torch.sigmoid(2.0 * self.coupling[..., None, None] * around)
                x = torch.where(color, torch.where(torch.rand_like(x) < up, 1.0, -1.0), x)
        return x


def model(family: type[Ising], lattice: Tensor) -> None:
    """A uniform coupling and the one lattice."""
    ends = torch.tensor([LOWEST, HIGHEST], dtype=torch.float64)
    coupling = pyro.sample("coupling", dist.Uniform(*ends))
    pyro.sample("lattice", ebm.EnergyDistribution(family(coupling, SHAPE)), obs=lattice)


# --- the truth


@dataclass(frozen=True)
class Exact:
    """The posterior by quadrature of Kaufman's formula."""

    grid: Tensor
    density: Tensor
    mean: float
    sd: float
    log_evidence: float


Truths = dict[int, Exact]


def log_likelihood(coupling: Tensor, statistic: int) -> Tensor:
    """Returns the log probability of a lattice with this S."""
    return coupling * statistic - Ising(coupling, SHAPE).log_normalizer()


def exact_posterior(statistic: int, num_points: int = 20_000) -> Exact:
    """Returns density and moments by the midpoint rule."""
    width = (HIGHEST - LOWEST) / num_points
    grid = LOWEST + width * (torch.arange(num_points, dtype=torch.float64) + 0.5)
    log_p = log_likelihood(grid, statistic)
    weights = log_p.softmax(0)
    mean = float(weights @ grid)
    sd = float(weights @ (grid - mean).square()) ** 0.5
    log_evidence = float(log_p.logsumexp(0)) - math.log(num_points)  # of the uniform prior
    return Exact(grid, weights / width, mean, sd, log_evidence)


def lattice_with(statistic: int) -> Tensor:
    """Returns a lattice that has exactly this S, drawn where the likelihood of S is largest."""
    grid = torch.linspace(0.1, HIGHEST, 2000, dtype=torch.float64)
    law = Ising(grid[log_likelihood(grid, statistic).argmax()].expand(64), SHAPE)
    x = torch.ones(64, *SHAPE, dtype=torch.float64)
    while True:
        x = law.sweep(x, 10)
        found = x[law.statistics(x)[:, 0] == statistic]
        if len(found) > 0:
            return found[0]


# --- the samplers


@dataclass(frozen=True)
class Lengths:
    """Draws of each of 16 chains, and sweeps of an auxiliary lattice."""

    by_gradient: int
    by_draws: int
    num_sweeps: int
    trap: int


DEFAULT = Lengths(by_gradient=400, by_draws=600, num_sweeps=20, trap=1000)
FULL = Lengths(by_gradient=2000, by_draws=3000, num_sweeps=30, trap=5000)
SMOKE = Lengths(by_gradient=16, by_draws=8, num_sweeps=3, trap=16)


class Run(NamedTuple):
    """One sampler on one lattice."""

    statistic: int
    route: str
    kernel: Kernel
    family: type[Ising]
    num_samples: int


def plan(lengths: Lengths, *, full: bool) -> Iterator[Run]:
    """Yields what is run: with log Z, without it, and the trap."""
    for statistic in STATISTICS:
        yield Run(statistic, "HMC through log Z", HMC(model), Ising, lengths.by_gradient)
    for statistic in STATISTICS if full else (SHOWN,):
        kernel = Exchange(model, auxiliary=Sweeps(lengths.num_sweeps))
        route = f"exchange, {lengths.num_sweeps} cluster sweeps"
        yield Run(statistic, route, kernel, WithoutLogZ, lengths.by_draws)
    for num_sweeps, route in (
        (1, "exchange, 1 spinwise sweep"),
        (5, "exchange, 5 spinwise sweeps"),
    ):
        kernel = Exchange(model, auxiliary=Sweeps(num_sweeps))
        yield Run(SHOWN, route, kernel, OneByOne, lengths.trap)


def sample(run: Run, lattice: Tensor) -> MCMC:
    """Runs 16 chains in one batch."""
    mcmc = MCMC(
        run.kernel, run.num_samples, run.num_samples // 4, num_chains=16, disable_progbar=True
    )
    mcmc.run(run.family, lattice)
    return mcmc


def print_head() -> None:
    """Prints the head of the table."""
    print(f"{'S':>5} {'':<27} {'mean':>7} {'exact':>7} {'MCSEs':>5} ", end="")
    print(f"{'sd':>8} {'exact':>7} {'ratio':>6} {'ESS':>6} {'R-hat':>6}")


def print_row(run: Run, mcmc: MCMC, exact: Exact) -> None:
    """Prints mean and standard deviation beside the exact ones."""
    row = mcmc.summary().loc["coupling"]
    z = (row["mean"] - exact.mean) / row["mcse_mean"]
    print(
        f"{run.statistic:>5} {run.route:<27} {row['mean']:>7.5f} {exact.mean:>7.5f} {z:>+5.1f} "
        f"{row['sd']:>8.5f} {exact.sd:>7.5f} {row['sd'] / exact.sd:>6.3f} "
        f"{row['ess_bulk']:>6.0f} {row['r_hat']:>6.3f}"
    )


def print_evidence(runs: dict[int, MCMC], lattices: dict[int, Tensor], truths: Truths) -> None:
    """Prints how much likelier every lattice is under a free coupling than at the critical one."""
    print("\na free coupling against the critical one")
    critical = torch.tensor(CRITICAL, dtype=torch.float64)
    for statistic, mcmc in runs.items():
        fixed = log_likelihood(critical, statistic)
        free = evidence(model, Ising, lattices[statistic], posterior=mcmc)
        found = bayes_factor(free, ebm.LogNormalizer(fixed, torch.zeros_like(fixed)))
        exact = truths[statistic].log_evidence - float(fixed)
        print(f"{statistic:>5} {found}, exactly {exact:.3f}")


# --- the figure


def draw_posteriors(ax: Axes, runs: dict[int, MCMC], truths: dict[int, Exact]) -> None:
    """Draws HMC's draws over the exact densities of all lattices."""
    for color, (statistic, mcmc) in zip(PALETTE, runs.items(), strict=False):
        draws = mcmc.get_samples()["coupling"].flatten()
        exact = truths[statistic]
        ax.hist(draws, 40, density=True, color=color, alpha=0.3, label=f"S = {statistic}")
        ax.plot(exact.grid, exact.density, color=color)
    ax.axvline(CRITICAL, color="black", linestyle=":", label="critical")
    ax.set(xlabel=r"$\theta$", ylabel="posterior density", title="HMC through log Z, exact lines")
    ax.set(ylim=(0.0, 62.0), xlim=(LOWEST, 0.49))
    ax.legend()


def draw_routes(ax: Axes, runs: dict[str, MCMC], exact: Exact) -> None:
    """Draws what exchange makes of one lattice, by the way of its auxiliary draws."""
    ax.plot(exact.grid, exact.density, color="black", label="exact")
    for color, (route, mcmc) in zip(PALETTE, runs.items(), strict=False):
        draws = mcmc.get_samples()["coupling"].flatten()
        ax.hist(draws, 40, density=True, histtype="step", color=color, label=route)
    ax.set(xlabel=r"$\theta$", title=f"without log Z, S = {SHOWN}")
    ax.set(xlim=(0.33, 0.48), ylim=(0.0, 46.0))
    ax.legend()


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/ising_field"))
    parser.add_argument("--full", action="store_true", help="exchange for all lattices, long")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Samples every lattice with log Z and some without, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    lengths = SMOKE if args.smoke else FULL if args.full else DEFAULT
    pyro.set_rng_seed(args.seed)
    truths = {statistic: exact_posterior(statistic) for statistic in STATISTICS}
    lattices = {statistic: lattice_with(statistic) for statistic in STATISTICS}

    print_head()
    by_gradient, without = {}, {}
    for run in plan(lengths, full=args.full):
        mcmc = sample(run, lattices[run.statistic])
        print_row(run, mcmc, truths[run.statistic])
        if run.family is Ising:
            by_gradient[run.statistic] = mcmc
        elif run.statistic == SHOWN:
            without[run.route] = mcmc
    print_evidence(by_gradient, lattices, truths)

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_posteriors(axes[0], by_gradient, truths)
    draw_routes(axes[1], without, truths[SHOWN])
    figure.savefig(args.out / "ising_field.png", dpi=130)
    ebm.to_arviz(by_gradient[SHOWN]).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'ising_field.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
