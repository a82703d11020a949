r"""Counts narrower than Poisson, and a log Z that is a sum: with it and without it.

The freight data: ten shipments of a thousand ampules each, by how often each was transferred on its
way and how many ampules were found broken (Kutner, Nachtsheim, Neter, Applied Linear Regression
Models). The counts vary less than Poisson counts would. The Conway-Maxwell-Poisson regression is

    p(y | x) = exp(y log lambda(x) - nu log y!) / Z(lambda(x), nu),   log lambda = a + b x.

1. *Maximum likelihood* by L-BFGS through log Z, with standard errors by its second derivatives.
2. *Bayes twice.* HMC goes through the gradient of log Z. Exchange never sees log Z: it draws data
   at every proposal, exactly, and compares. Both must find the same posterior.

Run it; the figure and the draws, for ArviZ, go to results/conway_maxwell_poisson::

    python examples/conway_maxwell_poisson.py            # under a minute
    python examples/conway_maxwell_poisson.py --smoke    # a few seconds, chains too short to trust
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.energies import ConwayMaxwellPoisson
from pyro_ebm.mcmc import HMC, MCMC, Exchange, Kernel
from pyro_ebm.plots import PALETTE

BROKEN = torch.tensor([16, 9, 17, 12, 22, 13, 8, 15, 19, 11], dtype=torch.float64)
TRANSFERS = torch.tensor([1, 0, 2, 0, 3, 1, 0, 1, 2, 0], dtype=torch.float64)
PUBLISHED = (13.8247, 1.4838, 5.7818, -18.6449)
NUM_TERMS = 256  # of the sum for log Z: enough for any mean and dispersions from .25 on


class WithoutLogZ(ConwayMaxwellPoisson):
    """The same energy, which keeps its log Z to itself."""

    is_tractable = False


# --- 1. maximum likelihood


def law(coefficients: Tensor, nu: Tensor) -> ebm.EnergyDistribution:
    """The counts of all shipments, with log lambda = a + b x."""
    a, b = coefficients
    return ebm.EnergyDistribution(ConwayMaxwellPoisson(a + b * TRANSFERS, nu))


def minimize(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Returns where L-BFGS ends."""
    at = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [at],
        max_iter=300,
        tolerance_grad=1e-9,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(at)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    return at.detach()


def maximum_likelihood() -> Tensor:
    """Prints the estimate beside the published one and returns (a, b, nu)."""

    def from_modes(at: Tensor) -> Tensor:
        """(a, b, nu) of log lambda / nu, which hardly depends on nu, and log nu."""
        nu = at[2].exp()
        return torch.cat([nu * at[:2], nu[None]])

    def loss(theta: Tensor) -> Tensor:
        return -law(theta[:2], theta[2]).log_prob(BROKEN).sum()

    start = torch.tensor([2.5, 0.0, 0.0], dtype=torch.float64)
    theta = from_modes(minimize(lambda at: loss(from_modes(at)), start))
    information = torch.autograd.functional.hessian(loss, theta)
    errors = [*information.inverse().diagonal().sqrt().tolist(), float("nan")]
    found = [*theta.tolist(), -float(loss(theta))]
    print(f"{'maximum likelihood':<20} {'here':>10} {'published':>10} {'std. error':>10}")
    for name, *row in zip(
        ("a", "b", "nu", "log-likelihood"), found, PUBLISHED, errors, strict=True
    ):
        print(f"{name:<20} {row[0]:>10.4f} {row[1]:>10.4f} {row[2]:>10.4f}".replace("nan", ""))
    return theta


# --- 2. the posterior, twice


def model(family: type[ConwayMaxwellPoisson], transfers: Tensor, broken: Tensor) -> None:
    """Regression of the log mode at one transfer, log lambda = nu log mode.

    Given the modes, nu only says how far counts scatter around them. The coefficients of log lambda
    would be all but proportional to nu, and no kernel likes that.
    """
    one = torch.ones((), dtype=torch.float64)
    level = pyro.sample("level", dist.Normal(2.5 * one, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0 * one, 1.0))
    nu = pyro.sample("nu", dist.LogNormal(0.0 * one, 1.0))
    log_mode = level + slope * (transfers - 1.0)
    with pyro.plate("shipments", len(broken)):
        energy = family(nu * log_mode, nu, num_terms=NUM_TERMS)
        pyro.sample("broken", ebm.EnergyDistribution(energy), obs=broken)


def starts(num_chains: int) -> dict[str, Tensor]:
    """Unconstrained values around a Poisson law without a slope.

    HMC finds the way from anywhere, but far off its steps are tiny and many.
    """
    spread = 0.3 * torch.randn(3, num_chains, dtype=torch.float64)
    level = BROKEN.mean().log() + spread[0]
    return {"level": level, "slope": spread[1], "nu": spread[2]}


def run(kernel: Kernel, family: type[ConwayMaxwellPoisson], num: int, *, smoke: bool) -> MCMC:
    """Runs 64 chains in one batch."""
    num_chains = 16 if smoke else 64
    mcmc = MCMC(kernel, num, num, num_chains=num_chains, disable_progbar=smoke)
    mcmc.run(family, TRANSFERS, BROKEN, initial_params=starts(num_chains))
    return mcmc


def both_ways(args: argparse.Namespace) -> dict[str, MCMC]:
    """Samples the posterior with log Z and without it."""
    pyro.set_rng_seed(args.seed)
    num = 30 if args.smoke else 300
    by_gradient = run(HMC(model), ConwayMaxwellPoisson, num, smoke=args.smoke)
    # A random walk needs more iterations, of which each costs less.
    by_draws = run(Exchange(model), WithoutLogZ, 5 * num, smoke=args.smoke)
    return {"HMC through log Z": by_gradient, "exchange without it": by_draws}


def print_side_by_side(runs: dict[str, MCMC]) -> None:
    """Prints mean, sd, R-hat and effective sample size of every latent."""
    tables = [mcmc.summary() for mcmc in runs.values()]
    print(f"\n{'posterior':<8}" + "".join(f" {name:>32}" for name in runs))
    print(f"{'':<8}" + f" {'mean':>8} {'sd':>7} {'R-hat':>7} {'ESS':>7}" * len(runs))
    for site in tables[0].index:
        cells = (table.loc[site, ["mean", "sd", "r_hat", "ess_bulk"]] for table in tables)
        shown = (f" {m:>8.3f} {s:>7.3f} {r:>7.3f} {e:>7.0f}" for m, s, r, e in cells)
        print(f"{site:<8}" + "".join(shown))


def draw_counts(ax: Axes, draws: dict[str, Tensor]) -> None:
    """Draws intervals of new counts beside the data."""
    transfers = torch.arange(0.0, 3.01, 0.25, dtype=torch.float64)
    level, slope, nu = (draws[name].flatten()[:, None] for name in ("level", "slope", "nu"))
    new = ConwayMaxwellPoisson(nu * (level + slope * (transfers - 1.0)), nu).sample()
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    low, middle, high = torch.quantile(new, levels, dim=0)
    ax.fill_between(transfers, low, high, color=PALETTE[0], alpha=0.2, label="90 % of new counts")
    ax.plot(transfers, middle, color=PALETTE[0], label="median")
    ax.plot(TRANSFERS, BROKEN, "kx", label="observed")
    ax.set(xlabel="transfers", ylabel="broken ampules", title="posterior predictive")
    ax.legend(loc="upper left")


def draw_dispersion(ax: Axes, runs: dict[str, MCMC], estimate: float) -> None:
    """Draws the two posteriors of nu over each other."""
    for color, (name, mcmc) in zip(PALETTE, runs.items(), strict=False):
        log_nu = mcmc.get_samples()["nu"].flatten().log()
        ax.hist(log_nu, 60, density=True, histtype="step", color=color, label=name)
    for value, style, name in ((1.0, ":", "Poisson"), (estimate, "--", "maximum likelihood")):
        ax.axvline(torch.tensor(value).log(), color="black", linestyle=style, label=name)
    ax.set(xlabel=r"$\log\, \nu$", ylabel="posterior density", title="dispersion")
    ax.legend(loc="upper left")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/conway_maxwell_poisson"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Estimates, samples both ways, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    theta = maximum_likelihood()
    runs = both_ways(args)
    print_side_by_side(runs)

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_counts(axes[0], runs["HMC through log Z"].get_samples())
    draw_dispersion(axes[1], runs, float(theta[2]))
    figure.savefig(args.out / "conway_maxwell_poisson.png", dpi=130)
    ebm.to_arviz(runs["HMC through log Z"]).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'conway_maxwell_poisson.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
