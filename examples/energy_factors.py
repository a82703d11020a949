r"""Energies inside ordinary Pyro models: as factors, as priors, and the difference a log Z makes.

1. *A soft constraint.* Responses at six doses, partially pooled; `energy_factor` says that the
   response should hardly fall as the dose rises. Nothing else in the model changes.
2. *A smoothness prior on a field.* Rates of coal mining disasters in Britain, by decade.
   The energy of a field f is lambda/2 sum (f_i - f_{i-1})^2 and lambda is inferred. As a factor the
   joint density is normalized once, over f and lambda together (global); as a sample site f is
   normalized given lambda (local). The two differ by Z(lambda), hence in their prior of lambda.
3. *A learned energy as prior.* A network learns by NCE that points lie on a ring, is frozen, and
   helps to find points of which only noisy readings are given; the noise level is inferred too.

Run it; the figure goes to results/energy_factors::

    python examples/energy_factors.py            # under a minute
    python examples/energy_factors.py --smoke    # a few seconds, chains too short to trust
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from pyro.infer import MCMC
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.datasets import ring
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer import NCE
from pyro_ebm.mcmc import RecordingNUTS
from pyro_ebm.plots import PALETTE, plot_density

# On a machine with few cores Pyro runs the chains one after the other, and says so every time.
warnings.filterwarnings("ignore", "num_chains=")

Model = Callable[..., None]
Draws = dict[str, Tensor]


def run_nuts(name: str, model: Model, *data: Any, args: argparse.Namespace) -> Draws:
    """Runs two chains, prints a line of diagnostics and returns the draws."""
    pyro.set_rng_seed(args.seed)
    num_samples, warmup_steps = (20, 20) if args.smoke else (100, 80)
    kernel = RecordingNUTS(model, max_tree_depth=4 if args.smoke else 10)
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=2, disable_progbar=args.smoke)
    mcmc.run(*data)
    found = ebm.diagnose(mcmc)
    print(
        f"{name:<42} R-hat {found.rhat.value:.3f}   bulk ESS {found.ess_bulk.value:4.0f}   "
        f"divergences {found.num_divergences}"
    )
    return mcmc.get_samples()


def quantiles(draws: Tensor) -> Tensor:
    """Returns the ends of 90 % intervals."""
    return torch.quantile(draws, torch.tensor([0.05, 0.95]), dim=0)


def interval(ax: Axes, x: Tensor, draws: Tensor, color: str, label: str) -> None:
    """Draws posterior means and 90 % intervals."""
    ax.fill_between(x, *quantiles(draws), color=color, alpha=0.2, linewidth=0)
    ax.plot(x, draws.mean(0), color=color, marker=".", label=label)


# --- 1. a soft constraint

ANIMALS = torch.tensor(12.0)  # at each dose
RESPONDED = torch.tensor([1.0, 0.0, 3.0, 2.0, 7.0, 6.0])  # made-up counts


def falls(logits: Tensor) -> Tensor:
    """Energy of a dose-response curve: half a nat for a fall of 0.3, four times that for 0.6."""
    return 0.5 * (torch.relu(-logits.diff(dim=-1)) / 0.3).square().sum(-1)


def dose_response(responded: Tensor) -> None:
    """A hierarchical logistic model with the wish for a rising curve."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.LogNormal(0.5, 0.5))
    logits = pyro.sample("logits", dist.Normal(mean, spread).expand([6]).to_event(1))
    # All inputs are latent: the factor reweights their joint prior, and no log Z is missing.
    ebm.energy_factor("rising", falls, logits)
    with pyro.plate("doses", 6):
        pyro.sample("responded", dist.Binomial(ANIMALS, logits=logits), obs=responded)


def soft_constraint(ax: Axes, args: argparse.Namespace) -> None:
    """Draws the response curve beside what each dose says on its own."""
    dose = torch.arange(1, 7)
    draws = run_nuts("dose response, energy_factor", dose_response, RESPONDED, args=args)
    jeffreys = dist.Beta(0.5 + RESPONDED, 0.5 + ANIMALS - RESPONDED).sample((4000,))
    interval(ax, dose, draws["logits"].sigmoid(), PALETTE[0], "pooled and rising")
    low, high = quantiles(jeffreys)
    ax.vlines(dose, low, high, color="black", linewidth=0.8, label="each dose on its own")
    ax.plot(dose, RESPONDED / ANIMALS, "kx", label="observed")
    ax.set(xlabel="dose level", ylabel="share responding", title="1. soft constraint")
    ax.legend()


# --- 2. a smoothness prior whose strength is inferred

PERIOD = 10  # years
FIRST_YEAR = 1852
# Explosions in coal mines with ten or more deaths, 1852 to 1961 (Jarrett, Biometrika 66, 1979).
# fmt: off
DISASTERS = torch.tensor([
    5, 4, 0, 1, 4, 3, 4, 0, 6, 3,  3, 4, 0, 2, 6, 3, 3, 5, 4, 5,  3, 1, 4, 4, 1, 5, 5, 3, 4, 2,
    5, 2, 2, 3, 4, 2, 1, 3, 2, 2,  1, 1, 1, 1, 3, 0, 0, 1, 0, 1,  1, 0, 0, 3, 1, 0, 3, 2, 2, 0,
    1, 1, 1, 0, 1, 0, 1, 0, 0, 0,  2, 1, 0, 0, 0, 1, 1, 0, 2, 3,  3, 1, 1, 2, 1, 1, 1, 1, 2, 4,
    2, 0, 0, 1, 4, 0, 0, 0, 1, 0,  0, 0, 0, 0, 1, 0, 0, 1, 0, 1,
]).reshape(-1, PERIOD).sum(-1).float()
# fmt: on
N = len(DISASTERS)
FIRST_SD = 2.0  # of the first log rate, which pins down the level


def walk_energy(field: Tensor, smoothness: Tensor) -> Tensor:
    """Energy of a random walk with steps of variance 1 / smoothness."""
    steps = 0.5 * smoothness * field.diff(dim=-1).square().sum(-1)
    return steps + 0.5 * (field[..., 0] / FIRST_SD) ** 2


def walk_log_normalizer(smoothness: Tensor) -> Tensor:
    """Log Z of that energy: N - 1 Gaussian integrals over the steps and one over the level."""
    log_two_pi = math.log(2 * math.pi)
    return 0.5 * (N * log_two_pi - (N - 1) * smoothness.log()) + math.log(FIRST_SD)


def smoothness_prior() -> dist.Gamma:
    """Expects steps of about 0.15 to 0.4 in the log rate."""
    return dist.Gamma(2.0, 0.05)


def local_rates(counts: Tensor) -> None:
    """Given its smoothness, the field is normalized: smoothness keeps the prior written here."""
    smoothness = pyro.sample("smoothness", smoothness_prior())
    walk = ebm.EnergyDistribution(
        lambda field: walk_energy(field, smoothness),
        event_shape=(N,),
        log_normalizer=lambda: walk_log_normalizer(smoothness),
    )
    field = pyro.sample("field", walk)
    pyro.sample("counts", dist.Poisson(PERIOD * field.exp()).to_event(1), obs=counts)


def global_rates(counts: Tensor) -> None:
    """Normalized over both at once: the prior of smoothness is now the one written, times Z."""
    smoothness = pyro.sample("smoothness", smoothness_prior())
    # A masked site has no density of its own, so that the factor alone speaks about the field.
    flat = dist.Normal(0.0, 1.0).expand([N]).to_event(1).mask(mask=False)
    field = pyro.sample("field", flat)
    ebm.energy_factor("walk", walk_energy, field, smoothness)
    pyro.sample("counts", dist.Poisson(PERIOD * field.exp()).to_event(1), obs=counts)


def smooth_field(rate_ax: Axes, smoothness_ax: Axes, args: argparse.Namespace) -> None:
    """Samples the same energy normalized both ways; draws rates and the posterior of lambda."""
    year = FIRST_YEAR + PERIOD * (torch.arange(N) + 0.5)
    models = {"local, log Z known": local_rates, "global, factor": global_rates}
    rate_ax.plot(year, DISASTERS / PERIOD, "kx", label="observed")
    for color, (name, model) in zip(PALETTE, models.items(), strict=False):
        draws = run_nuts(f"coal mines, {name}", model, DISASTERS, args=args)
        print(f"{'':<42} mean smoothness {float(draws['smoothness'].mean()):.2f}")
        interval(rate_ax, year, draws["field"].exp(), color, name)
        log_smoothness = draws["smoothness"].log10()
        smoothness_ax.hist(log_smoothness, 20, density=True, color=color, alpha=0.4, label=name)
    draw_smoothness_prior(smoothness_ax)
    rate_ax.set(xlabel="year", ylabel="disasters per year", title="2. smoothness prior on a field")
    rate_ax.legend()


def draw_smoothness_prior(ax: Axes) -> None:
    """Draws the prior that both models write down; only one of them has it."""
    log_smoothness = torch.linspace(-1.5, 2.5, 200)
    smoothness = 10.0**log_smoothness
    density = smoothness_prior().log_prob(smoothness).exp() * smoothness * math.log(10.0)
    ax.plot(log_smoothness, density, "k--", label="prior as written")
    ax.set(xlabel=r"$\log_{10} \lambda$", ylabel="posterior density", title="2. how smooth?")
    ax.legend()


# --- 3. a learned energy as prior

BASE_SD = 1.2
NOISE, READINGS = 0.4, 3


def learn_ring(args: argparse.Namespace) -> ebm.EnergyDistribution:
    """Learns the law of points on a ring by NCE and freezes the network."""
    energy = MLPEnergy(2, hidden=(64, 64))
    law = ebm.EnergyDistribution(energy, dist.Normal(0.0, BASE_SD).expand([2]).to_event(1))

    def model(x: Tensor) -> None:
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    ebm.fit(
        model,
        ring(4000, radii=(1.5,)),
        NCE(num_noise=8),
        lr=1e-2,
        batch_size=256,
        num_steps=100 if args.smoke else 600,
        disable_progbar=args.smoke,
    )
    energy.requires_grad_(requires_grad=False)
    return law


def denoise(readings: Tensor, law: ebm.EnergyDistribution) -> None:
    """Points of the learned law, each read several times with noise of unknown size.

    The weights are fixed, so log Z is a constant and no posterior depends on it. A Gaussian site
    followed by an `energy_factor` would be the same model.
    """
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("points", readings.shape[1], dim=-1):
        x = pyro.sample("x", law)
        with pyro.plate("repeats", len(readings), dim=-2):
            pyro.sample("readings", dist.Normal(x, noise).to_event(1), obs=readings)


def learned_prior(ax: Axes, args: argparse.Namespace) -> None:
    """Denoises points with the learned prior, beside the best that a Gaussian prior can do."""
    pyro.set_rng_seed(args.seed)
    law, clean = learn_ring(args), ring(25, radii=(1.5,))
    readings = clean + NOISE * torch.randn(READINGS, 25, 2)
    draws = run_nuts("ring, learned prior", denoise, readings, law, args=args)
    noisy, denoised = readings.mean(0), draws["x"].mean(0)
    shrunk = noisy / (1 + NOISE**2 / READINGS / clean.var())
    errors = {"readings": noisy, "Gaussian prior": shrunk, "learned prior": denoised}
    shown = [f"{name} {rmse(clean, x):.3f}" for name, x in errors.items()]
    print(f"{'':<42} RMSE: {', '.join(shown)}")
    print(f"{'':<42} noise {float(draws['noise'].mean()):.3f}, in truth {NOISE}")
    plot_density(ax, law, ((-2.8, 2.8), (-2.2, 2.2)), colorbar=False)
    ax.plot(*torch.stack([noisy, denoised]).unbind(-1), color="white", linewidth=0.8)
    ax.scatter(*noisy.T, color="white", marker="x", s=20, label=f"mean of {READINGS} readings")
    ax.scatter(*denoised.T, color=PALETTE[1], s=14, label="posterior mean", zorder=3)
    ax.set(title="3. learned energy as prior")
    ax.legend(loc="center", fontsize="small", labelcolor="white", frameon=False)


def rmse(truth: Tensor, guess: Tensor) -> float:
    """Root mean squared distance per coordinate."""
    return float((truth - guess).square().mean().sqrt())


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/energy_factors"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Runs the three models and draws them into one figure."""
    # Threads gain nothing on tensors this small, and cost much on a machine with other work to do.
    torch.set_num_threads(1)
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    soft_constraint(axes[0, 0], args)
    smooth_field(axes[1, 0], axes[1, 1], args)
    learned_prior(axes[0, 1], args)
    figure.savefig(args.out / "energy_factors.png", dpi=130)
    print(f"figure: {args.out / 'energy_factors.png'}")


if __name__ == "__main__":
    main()
