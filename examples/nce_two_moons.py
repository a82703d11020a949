r"""One energy, three objectives: the two moons learned by NCE, KALE and energy discrepancy.

The model is p(x) = exp(-E(x)) base(x) / Z in the plane, E a small network, base a Gaussian. No
objective needs Z while it learns. NCE and KALE learn c, an estimate of log Z, beside the energy;
energy discrepancy never sees it. In two dimensions log Z can be had by quadrature, so that c can be
checked and held-out likelihoods are exact up to the grid.

Run it; the figure goes to results/nce_two_moons::

    python examples/nce_two_moons.py            # under a minute
    python examples/nce_two_moons.py --smoke    # a few seconds, half-learned energies
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.datasets import two_moons
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer import KALE, NCE, EnergyDiscrepancy, FitResult, Objective
from pyro_ebm.plots import PALETTE, plot_density, plot_training

NOISE = 0.1  # around the arcs of the moons
BOUNDS = ((-2.2, 2.2), (-1.6, 1.6))


def base() -> dist.TorchDistribution:
    """A Gaussian as wide as the data: it keeps the density proper, NCE and KALE draw from it."""
    return dist.Normal(torch.zeros(2), torch.tensor([1.0, 0.7])).to_event(1)


def objectives() -> dict[str, Objective]:
    """The three ways of learning, with about the same number of energies evaluated per step."""
    return {
        "NCE": NCE(num_noise=8),
        # Many base draws: the moons cover little of the base, and few draws would make c noisy.
        "KALE": KALE(num_base=2048),
        # The perturbation must be as small as the arcs are thin, and as wide as they are apart.
        "energy discrepancy": EnergyDiscrepancy(time=(0.01, 1.0), num_negatives=8),
    }


class Learned(NamedTuple):
    """A fitted model with what the fit left behind."""

    p: ebm.EnergyDistribution
    c: float | None
    result: FitResult


def learn(objective: Objective, train: Tensor, args: argparse.Namespace) -> Learned:
    """Fits a fresh network; all objectives start from the same weights."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    energy = MLPEnergy(2, hidden=(64, 64, 64))
    p = ebm.EnergyDistribution(energy, base())

    def model(x: Tensor) -> None:
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    steps = 100 if args.smoke else args.steps
    result = ebm.fit(
        model, train, objective, lr=1e-2, batch_size=256, num_steps=steps, ema=0.99, seed=args.seed
    )
    result.use_average()
    c = float(objective.log_normalizer("x").value) if objective.learns_log_normalizer else None
    return Learned(p, c, result)


@torch.no_grad()
def quadrature(p: ebm.EnergyDistribution, resolution: int = 400, radius: float = 5.0) -> Tensor:
    """Returns log Z in nats by the midpoint rule on a square that holds the base up to 1e-6."""
    side = 2 * radius / resolution
    ticks = -radius + side * (torch.arange(resolution) + 0.5)
    log_density = p.unnormalized_log_prob(torch.cartesian_prod(ticks, ticks))
    return log_density.double().logsumexp(0) + 2 * math.log(side)


def true_log_density(x: Tensor, num_angles: int = 500) -> Tensor:
    """Returns the log density the data come from: Gaussian noise around evenly covered arcs."""
    angle = math.pi * (torch.arange(num_angles) + 0.5) / num_angles
    arc = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
    centres = torch.cat([arc, -arc])
    squared = torch.cdist(x, centres).square()
    log_kernel = -squared / (2 * NOISE**2) - math.log(2 * math.pi * NOISE**2)
    return log_kernel.logsumexp(-1) - math.log(len(centres))


@torch.no_grad()
def print_table(learned: dict[str, Learned], test: Tensor) -> None:
    """Prints the held-out likelihood, normalized by quadrature, and c beside log Z."""
    print(f"\n{'':<20} {'held-out log lik.':>18} {'c':>8} {'log Z':>8} {'c - log Z':>10}")
    for name, (p, c, _) in learned.items():
        log_z = float(quadrature(p))
        line = f"{name:<20} {float(p.unnormalized_log_prob(test).mean()) - log_z:>18.3f}"
        c_text = ("none", "") if c is None else (f"{c:.3f}", f"{c - log_z:+.3f}")
        print(f"{line} {c_text[0]:>8} {log_z:>8.3f} {c_text[1]:>10}")
    print(f"{'base alone':<20} {float(base().log_prob(test).mean()):>18.3f}")
    print(f"{'law of the data':<20} {float(true_log_density(test).mean()):>18.3f}")
    print("nats; likelihoods are means over test points, normalized by quadrature\n")


def draw_figure(path: Path, learned: dict[str, Learned], data: Tensor) -> None:
    """Draws data and truth, the three learned densities on one scale, and the training curves."""
    figure, axes = plt.subplots(2, 4, figsize=(15, 6), layout="constrained")
    maps = {"density of the data": true_log_density}
    for name, (p, _, _) in learned.items():
        maps[name] = p.with_log_normalizer(float(quadrature(p))).log_prob
    for ax, (name, log_density) in zip(axes[0], maps.items(), strict=True):
        plot_density(ax, log_density, BOUNDS, colorbar=ax is axes[0, -1]).set_title(name)
    axes[1, 0].scatter(*data.T, s=2, color="black")
    axes[1, 0].set(xlim=BOUNDS[0], ylim=BOUNDS[1], aspect="equal", title="data")
    axes[1, 0].set(xlabel="$x_1$", ylabel="$x_2$")
    for ax, color, (name, fitted) in zip(axes[1, 1:], PALETTE, learned.items(), strict=False):
        plot_training(ax, fitted.result, color=color).set_title(f"loss of {name}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="training steps per objective")
    parser.add_argument("--out", type=Path, default=Path("results/nce_two_moons"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few steps")
    return parser.parse_args()


def main() -> None:
    """Learns the moons three times and compares."""
    # Threads gain nothing on tensors this small, and cost much on a machine with other work to do.
    torch.set_num_threads(1)
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    train, test = two_moons(6000, noise=NOISE).split([4000, 2000])
    learned = {name: learn(objective, train, args) for name, objective in objectives().items()}
    print_table(learned, test)
    draw_figure(args.out / "two_moons.png", learned, train[:1500])
    print(f"figure: {args.out / 'two_moons.png'}")


if __name__ == "__main__":
    main()
