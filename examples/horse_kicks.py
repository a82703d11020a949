r"""Fourteen army corps with a random effect on an energy parameter, with log Z and without it.

The data are Bortkiewicz's: deaths by horse kick in 14 corps of the Prussian army in each of the
twenty years 1875 to 1894 (L. von Bortkiewicz, Das Gesetz der kleinen Zahlen, 1898). They are the
textbook's Poisson counts. Are they, and do the corps differ? With a Conway-Maxwell-Poisson law,

    p(y | corps g) = exp(r_g y - nu log y!) / Z(r_g, nu),    r_g ~ Normal(mean, spread),

nu = 1 is Poisson and nu > 1 narrower; exp(r_g) is how much likelier one death is than none. Z
depends on r_g and nu, so that there are fourteen of them at every draw.

1. *Three ways to pool*: one law for all corps, one for each, and the hierarchy between them.
2. *The hierarchy twice.* HMC goes through the gradient of all log Z's. Exchange sees none of them:
   it draws twenty years anew for every corps, and accepts corps by corps. Both must agree.
3. *Calibration*, with `--calibrate`: counts are drawn from the model a thousand times, and the
   parameters they were drawn with must lie anywhere in the posteriors by exchange, equally often.

Run it; the figure and the draws, for ArviZ, go to results/horse_kicks::

    python examples/horse_kicks.py             # about a minute and a half
    python examples/horse_kicks.py --calibrate # some minutes
    python examples/horse_kicks.py --smoke     # a few seconds, chains too short to trust
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
from pyro_ebm.mcmc import HMC, MCMC, GroupedExchange, Kernel
from pyro_ebm.plots import PALETTE
from pyro_ebm.testing import simulation_based_calibration

CORPS = {
    "G": "02210011030210010101",
    "I": "00020302000111020310",
    "II": "00020200110021100200",
    "III": "00011120200010121000",
    "IV": "01011110000100001100",
    "V": "00002100100101111110",
    "VI": "00102001201131110300",
    "VII": "10100010110020021020",
    "VIII": "10001001000010001101",
    "IX": "00000211102110120100",
    "X": "00110102020000213011",
    "XI": "00002401301111213131",
    "XIV": "11211304010321021100",
    "XV": "01000001011000220000",
}
DEATHS = torch.tensor([[float(y) for y in row] for row in CORPS.values()], dtype=torch.float64).T
LEVELS = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
NUM_TERMS = 128  # of the sum for log Z: enough for these counts and dispersions from .1 on


class WithoutLogZ(ConwayMaxwellPoisson):
    """The same energy, which keeps its log Z to itself."""

    is_tractable = False


def counts(family: type[ConwayMaxwellPoisson], rate: Tensor, nu: Tensor, deaths: Tensor) -> None:
    """The rows of all corps, ``(years, corps)``."""
    with pyro.plate("years", len(deaths), dim=-2):
        energy = family(rate, nu, num_terms=NUM_TERMS)
        pyro.sample("deaths", ebm.EnergyDistribution(energy), obs=deaths)


def dispersion(deaths: Tensor) -> Tensor:
    """The prior of nu: around Poisson, and seldom beyond a third or three."""
    return pyro.sample("nu", dist.LogNormal(deaths.new_zeros(()), 0.5))


def hierarchy(family: type[ConwayMaxwellPoisson], deaths: Tensor) -> None:
    """Corps are draws of one population."""
    nu = dispersion(deaths)
    mean = pyro.sample("mean", dist.Normal(-0.5 + 0.0 * nu, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(0.5 + 0.0 * nu))
    with pyro.plate("corps", deaths.shape[1], dim=-1):
        rate = pyro.sample("rate", dist.Normal(mean, spread))
        counts(family, rate, nu, deaths)


def one_for_all(family: type[ConwayMaxwellPoisson], deaths: Tensor) -> None:
    """The limit of no spread."""
    nu = dispersion(deaths)
    rate = pyro.sample("rate", dist.Normal(-0.5 + 0.0 * nu, 1.0))
    with pyro.plate("corps", deaths.shape[1], dim=-1):
        counts(family, rate, nu, deaths)


def one_for_each(family: type[ConwayMaxwellPoisson], deaths: Tensor) -> None:
    """The limit of a wide spread: every corps has a prior of its own."""
    nu = dispersion(deaths)
    with pyro.plate("corps", deaths.shape[1], dim=-1):
        rate = pyro.sample("rate", dist.Normal(-0.5 + 0.0 * nu, 1.0))
        counts(family, rate, nu, deaths)


def starts(kernel: Kernel, num_chains: int) -> dict[str, Tensor]:
    """Unconstrained values around Poisson laws of corps that hardly differ."""
    corps = () if kernel.given is one_for_all else (len(CORPS),)
    shapes = {"nu": (), "rate": corps, "mean": (), "spread": ()}
    centres = {"nu": 0.0, "rate": -0.5, "mean": -0.5, "spread": -1.0}
    names = shapes if kernel.given is hierarchy else ("nu", "rate")
    return {
        name: centres[name] + 0.2 * torch.randn(num_chains, *shapes[name], dtype=torch.float64)
        for name in names
    }


def run(kernel: Kernel, family: type[ConwayMaxwellPoisson], num: int, *, smoke: bool) -> MCMC:
    """Runs 32 chains in one batch."""
    num_chains = 16 if smoke else 32
    mcmc = MCMC(kernel, num, min(num, 300), num_chains=num_chains, disable_progbar=smoke)
    mcmc.run(family, DEATHS, initial_params=starts(kernel, num_chains))
    return mcmc


def all_ways(args: argparse.Namespace) -> dict[str, MCMC]:
    """Samples three models by their gradients, and the hierarchy without log Z."""
    pyro.set_rng_seed(args.seed)
    num = 20 if args.smoke else 300
    models: dict[str, Callable[..., None]] = {
        "hierarchy": hierarchy,
        "one for all": one_for_all,
        "one for each": one_for_each,
    }
    runs = {
        name: run(HMC(model), ConwayMaxwellPoisson, num, smoke=args.smoke)
        for name, model in models.items()
    }
    by_draws = GroupedExchange(hierarchy, "corps", num_shared_moves=2)
    # A random walk needs more iterations, of which each costs less.
    runs["exchange"] = run(by_draws, WithoutLogZ, 5 * num, smoke=args.smoke)
    return runs


def print_side_by_side(runs: dict[str, MCMC]) -> None:
    """Prints mean, sd, R-hat and effective sample size of the hierarchy, found both ways."""
    titles = {"hierarchy": "HMC through log Z", "exchange": "exchange without it"}
    tables = [runs[name].summary() for name in titles]
    print(f"{'the hierarchy':<14}" + "".join(f" {title:>32}" for title in titles.values()))
    print(f"{'':<14}" + f" {'mean':>8} {'sd':>7} {'R-hat':>7} {'ESS':>7}" * len(tables))
    for site in tables[0].index:
        cells = (table.loc[site, ["mean", "sd", "r_hat", "ess_bulk"]] for table in tables)
        shown = (f" {m:>8.3f} {s:>7.3f} {r:>7.3f} {e:>7.0f}" for m, s, r, e in cells)
        print(f"{_label(site):<14}" + "".join(shown))


def _label(site: str) -> str:
    if not site.startswith("rate["):
        return site
    return f"corps {list(CORPS)[int(site[5:-1])]}"


def print_answers(runs: dict[str, MCMC]) -> None:
    """Prints what was asked."""
    print(f"\n{'nu':<14} {'mean':>8} {'sd':>7} {'P(nu > 1)':>10}")
    for name, mcmc in runs.items():
        nu = mcmc.get_samples()["nu"]
        print(f"{name:<14} {nu.mean():>8.3f} {nu.std():>7.3f} {(nu > 1.0).double().mean():>10.3f}")


def draw_corps(ax: Axes, runs: dict[str, MCMC]) -> None:
    """Draws every corps' interval under the three ways of pooling."""
    places = torch.arange(float(len(CORPS)))
    for k, name in enumerate(("one for each", "hierarchy", "exchange")):
        rate = runs[name].get_samples()["rate"].flatten(0, 1)
        low, middle, high = torch.quantile(rate, LEVELS, dim=0)
        ax.errorbar(
            places + 0.2 * (k - 1),
            middle,
            torch.stack([middle - low, high - middle]),
            fmt="o",
            ms=4,
            color=PALETTE[k],
            label=name,
        )
    ax.axhline(float(runs["one for all"].get_samples()["rate"].median()), color="gray", ls="--")
    ax.set_xticks(places, list(CORPS))
    ax.set(xlabel="corps", ylabel="log rate, median and 90 %", title="pulled towards each other")
    ax.legend()


def draw_shared(ax: Axes, runs: dict[str, MCMC]) -> None:
    """Draws the posterior of nu, with log Z and without it, and of one law for all."""
    for k, name in enumerate(("one for all", "hierarchy", "exchange")):
        nu = runs[name].get_samples()["nu"].flatten()
        ax.hist(nu, 60, density=True, histtype="step", color=PALETTE[k], label=name)
    ax.axvline(1.0, color="black", ls=":", label="Poisson")
    ax.set(xlabel=r"$\nu$", ylabel="posterior density", title="dispersion")
    ax.legend()


# --- calibration


def calibrate() -> None:
    """Prints what simulation-based calibration says of exchange in the hierarchy."""

    def without_data() -> None:
        nu = dispersion(DEATHS)
        mean = pyro.sample("mean", dist.Normal(-0.5 + 0.0 * nu, 1.0))
        spread = pyro.sample("spread", dist.HalfNormal(0.5 + 0.0 * nu))
        with pyro.plate("corps", len(CORPS), dim=-1):
            rate = pyro.sample("rate", dist.Normal(mean, spread))
            with pyro.plate("years", len(DEATHS), dim=-2):
                energy = WithoutLogZ(rate, nu, num_terms=NUM_TERMS)
                pyro.sample("deaths", ebm.EnergyDistribution(energy))

    result = simulation_based_calibration(
        without_data,
        ["deaths"],
        lambda model: GroupedExchange(model, "corps", num_shared_moves=2),
        num_simulations=1000,
        warmup_steps=600,
    )
    print(f"\n{result}")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/horse_kicks"))
    parser.add_argument("--calibrate", action="store_true", help="1000 simulations, some minutes")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Samples, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = all_ways(args)
    print_side_by_side(runs)
    print_answers(runs)
    if args.calibrate:
        calibrate()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(3, 2))
    draw_corps(axes[0], runs)
    draw_shared(axes[1], runs)
    figure.savefig(args.out / "horse_kicks.png", dpi=130)
    corps = {"coords": {"corps": list(CORPS)}, "dims": {"rate": ["corps"]}}
    ebm.to_arviz(runs["exchange"], **corps).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'horse_kicks.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
