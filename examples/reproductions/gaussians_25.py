r"""Density estimation in the plane: 25 Gaussians by energy discrepancy, score matching and CD.

The law has 25 equal Gaussians of standard deviation 0.2 on the grid {-4, -2, 0, 2, 4}^2, all
divided by 1.414. Score matching sees the shape of every mode and not their weights, contrastive
divergence with short chains sees little between modes; energy discrepancy, which perturbs data by
about half the distance of neighbouring modes, sees both.

Settings are those of Schröder, Ou, Lim, Li, Vollmer and Duncan (Energy discrepancies, NeurIPS 2023,
arXiv:2307.06431) and of the code they published: a network of four layers of 128 softplus units,
Adam with learning rate 1e-3, batches of 128 fresh draws, M = 4 negatives, w = 1, perturbations of
standard deviation 1, weights averaged with decay 0.999, 50 000 steps. Score matching has the exact
trace, contrastive divergence ten Langevin steps from the data, of lengths chosen here, with and
without a Metropolis test; all take equally many steps.

The paper shows the mean squared error of log densities at 5000 test points as a curve without
numbers, on which energy discrepancy falls below the other two. Its code normalizes with weights of
the test points themselves; here log Z is a sum over a grid on [-4.5, 4.5]^2, which all of the data
lie in. A network has no reason to fall off outside, so that the density compared is that on the
square; ``rim`` is its mass in the outer tenth, where the law has none. The table has the error at
the test points, their mean log density (the law's own is in the heading), the divergence
KL(law || model) summed over the grid, and milliseconds per step::

    python examples/reproductions/gaussians_25.py                       # five seeds, hours on a CPU
    python examples/reproductions/gaussians_25.py --objective energy --steps 50000
    python examples/reproductions/gaussians_25.py --objective score --steps 5000
    python examples/reproductions/gaussians_25.py --smoke               # seconds
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import torch
from torch import Tensor
from torch.nn.functional import softmax

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer import (
    ContrastiveDivergence,
    EnergyDiscrepancy,
    Objective,
    ScoreMatching,
    fit,
)
from pyro_ebm.mcmc import MALA, ULA

SCALE = 1.414
STD = 0.2 / SCALE
HALF_WIDTH, RIM = 4.5, 4.05
NUM_TEST = 5000
BATCH = 128
DECAY = 0.999

OBJECTIVES: dict[str, tuple[Callable[[], Objective], bool]] = {
    "energy discrepancy": (partial(EnergyDiscrepancy, 1.0, 4), True),
    "score matching": (ScoreMatching, True),
    "CD-10, Langevin": (
        partial(ContrastiveDivergence, 10, kernel=partial(ULA, step_size=0.1)),
        False,
    ),
    "CD-10, MALA": (
        partial(ContrastiveDivergence, 10, kernel=partial(MALA, step_size=0.15)),
        False,
    ),
}
"""Makers, and whether a step can be replayed as a graph: short chains are watched at every step."""


# --- the law


def centers(device: str) -> Tensor:
    """Returns the means, ``(25, 2)``."""
    ticks = torch.arange(-4.0, 5.0, 2.0, device=device) / SCALE
    return torch.cartesian_prod(ticks, ticks)


def draw(num: int, device: str) -> Tensor:
    """Returns draws of the law, ``(num, 2)``."""
    which = torch.randint(25, (num,), device=device)
    return centers(device)[which] + STD * torch.randn(num, 2, device=device)


def log_density(x: Tensor) -> Tensor:
    """Returns the law's log density in doubles, ``(N,)``."""
    apart = torch.cdist(x.double(), centers(str(x.device)).double()).square()
    parts = -0.5 * apart / STD**2 - math.log(2 * math.pi * STD**2)
    return parts.logsumexp(-1) - math.log(25)


# --- learning


def learn(
    name: str, seed: int, num_steps: int, args: argparse.Namespace
) -> tuple[MLPEnergy, float]:
    """Returns an energy with averaged weights, and seconds per step."""
    make, can_capture = OBJECTIVES[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    energy = MLPEnergy(2, hidden=(128,) * 4, activation="softplus").to(args.device)
    if num_steps == 0:
        return energy, 0.0

    def model(x: Tensor) -> None:
        pyro.module("energy", energy)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(energy, event_shape=(2,)), obs=x)

    result = fit(
        model,
        draw(num_steps * BATCH, args.device),
        make(),
        lr=1e-3,
        batch_size=BATCH,
        num_steps=num_steps,
        ema=DECAY,
        capture=args.capture and can_capture,
        disable_progbar=True,
    )
    result.use_average()
    return energy, result.seconds / num_steps


# --- the comparison


def grid(num_ticks: int, device: str) -> Tensor:
    """Returns the middles of the cells of a grid on the square."""
    width = 2 * HALF_WIDTH / num_ticks
    ticks = -HALF_WIDTH + width * (torch.arange(num_ticks, device=device) + 0.5)
    return torch.cartesian_prod(ticks, ticks)


@torch.no_grad()
def negative_energy(energy: MLPEnergy, x: Tensor) -> Tensor:
    """Returns minus the energies in doubles, a part of the points at a time."""
    return torch.cat([-energy(part).double() for part in x.split(2**17)])


def compare(energy: MLPEnergy, test: Tensor, points: Tensor) -> dict[str, float]:
    """Returns how far a density is from the law."""
    weights, truth = negative_energy(energy, points), log_density(points)
    cell = (2 * HALF_WIDTH) ** 2 / len(points)
    log_z = weights.logsumexp(0) + math.log(cell)
    at_test, apart = negative_energy(energy, test) - log_z, truth - (weights - log_z)
    outside = points.abs().amax(-1) > RIM
    return {
        "MSE": float((at_test - log_density(test)).square().mean()),
        "log p": float(at_test.mean()),
        "KL": float(cell * (truth.exp() * apart).sum()),
        "rim": float(softmax(weights, 0)[outside].sum()),
    }


def row(name: str, num_steps: int, args: argparse.Namespace) -> list[dict[str, str]]:
    """Returns a line of the table for every seed."""
    lines = []
    for seed in range(args.seed_from, args.seed_from + args.seeds):
        energy, seconds = learn(name, seed, num_steps, args)
        pyro.set_rng_seed(10_000 + seed)
        found = compare(energy, draw(NUM_TEST, args.device), grid(args.grid, args.device))
        numbers = {key: f"{value:.4f}" for key, value in found.items()}
        line = {"learned by": name, "steps": str(num_steps), "seed": str(seed), **numbers}
        lines.append(line | {"ms": f"{1000 * seconds:.2f}"})
        print(formatted(lines[-1]), flush=True)
    return lines


WIDTHS = {
    "learned by": 20,
    "steps": 8,
    "seed": 6,
    "MSE": 10,
    "log p": 10,
    "KL": 9,
    "rim": 9,
    "ms": 10,
}


def formatted(line: dict[str, str]) -> str:
    """Returns a line in columns."""
    return "".join(f"{line[key]:>{width}}" for key, width in WIDTHS.items())


def summaries(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns means over seeds and standard deviations."""
    keys = ("MSE", "log p", "KL", "rim", "ms")
    values = torch.tensor([[float(line[key]) for key in keys] for line in lines]).double()
    found = {"mean": values.mean(0), "sd": values.std(0)}
    return [
        lines[0] | {"seed": name} | {k: f"{float(x):.4f}" for k, x in zip(keys, row, strict=True)}
        for name, row in found.items()
    ]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="", help="only objectives with this in their name")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-from", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, nargs="+", default=[5000, 50_000])
    parser.add_argument("--grid", type=int, default=720, help="cells along each side of the grid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("results/reproductions"))
    parser.add_argument("--smoke", action="store_true", help="one seed, few steps")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.steps, args.grid, args.capture = 1, [4], 90, False
    return args


def main() -> None:
    """Prints the table and writes it to a file."""
    torch.set_num_threads(1)
    args = parse_arguments()
    pyro.set_rng_seed(0)
    own = log_density(draw(200_000, args.device)).mean()
    print(f"the law's own mean log density: {own:.4f}")
    print(formatted({key: key for key in WIDTHS}))
    lines = row("energy discrepancy", 0, args)  # where all start
    for name in (name for name in OBJECTIVES if args.objective in name):
        for num_steps in args.steps:
            found = row(name, num_steps, args)
            if args.seeds > 1:
                print("\n".join(map(formatted, summaries(found))), flush=True)
            lines += found
    args.out.mkdir(parents=True, exist_ok=True)
    first = f"{args.objective or 'all'}_{args.seed_from}".replace(" ", "_").replace(",", "")
    with (args.out / f"gaussians_25_{first}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0].keys())
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
