r"""Which losses see the weights of two modes: score matching is blind to them.

Data from .2 N(-5, 1) + .8 N(5, 1); the model is the same mixture with weight rho for the left mode.
Every loss is a curve over rho. Score matching's is flat: between the modes, where the score would
tell, there are no data. The likelihood's minimum is at .2. Energy discrepancy of time t sees as far
as its perturbations reach, sqrt(2 t): the modes are 10 apart.

The table: where the curve is least (mean and standard deviation over seeds of data and
perturbations), and by how much it moves over rho in [.05, .95], the median over seeds. The argmin
of a flat curve is where noise puts it::

    python examples/reproductions/mode_weights.py            # half a minute
    python examples/reproductions/mode_weights.py --smoke    # a few seconds

Figure 1 of Schröder et al., Energy Discrepancies, NeurIPS 2023, arXiv:2307.06431.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro
import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import EnergyDiscrepancy, ScoreMatching

WEIGHT, MODE = 0.2, 5.0
TIMES = (2.0, 4.0, 8.0, 32.0)
NUM_NEGATIVES = 4

Curve = Callable[[Tensor, Sequence[float]], Tensor]


def mixture(rho: float) -> EnergyDistribution:
    """Returns rho N(-5, 1) + (1 - rho) N(5, 1), known up to its constant."""

    def energy(x: Tensor) -> Tensor:
        left = math.log(rho) - 0.5 * (x + MODE) ** 2
        right = math.log1p(-rho) - 0.5 * (x - MODE) ** 2
        return -torch.logaddexp(left, right)

    return EnergyDistribution(energy, event_shape=())


def draw_data(num: int) -> Tensor:
    """Returns draws of the data."""
    side = torch.where(torch.rand(num) < WEIGHT, -MODE, MODE)
    return side + torch.randn(num)


def score_matching(x: Tensor, grid: Sequence[float]) -> Tensor:
    """Returns the mean loss at every weight."""
    return torch.stack([ScoreMatching().row_losses(mixture(rho), x).mean() for rho in grid])


def likelihood(x: Tensor, grid: Sequence[float]) -> Tensor:
    """Returns the mean negative log likelihood in nats: the mixture's log Z is that of N(0, 1)."""
    log_z = 0.5 * math.log(2 * math.pi)
    return torch.stack([mixture(rho).potential(x).mean() + log_z for rho in grid])


def energy_discrepancy(time: float) -> Curve:
    """Returns the curve of one time; all weights are compared on the same draws."""

    def curve(x: Tensor, grid: Sequence[float]) -> Tensor:
        objective = EnergyDiscrepancy(time, NUM_NEGATIVES)
        drawn = objective.draw(mixture(0.5), x, None)
        no_c = torch.zeros(())
        losses = [objective.per_datum(mixture(rho), x, drawn, no_c).mean() for rho in grid]
        return torch.stack(losses)

    return curve


CURVES: dict[str, Curve] = {
    "score matching": score_matching,
    "likelihood": likelihood,
} | {f"energy discrepancy, t = {t:g}": energy_discrepancy(t) for t in TIMES}


def row(name: str, curves: Tensor, grid: Sequence[float]) -> dict[str, str]:
    """Returns a line of the table from one curve per seed, ``(seeds, grid)``."""
    best = torch.tensor(grid)[curves.argmin(1)]
    inner = [i for i, rho in enumerate(grid) if 0.049 < rho < 0.951]
    ranges = curves[:, inner].amax(1) - curves[:, inner].amin(1)
    return {
        "loss": name,
        "argmin": f"{best.mean():.3f}",
        "sd": f"{best.std():.3f}",
        "least": f"{best.min():.2f}",
        "most": f"{best.max():.2f}",
        "range": f"{ranges.median():.2g}",
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/reproductions"))
    parser.add_argument("--smoke", action="store_true", help="two seeds, few weights and data")
    return parser.parse_args()


def main() -> None:
    """Prints the table and writes it to a file."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args = parse_arguments()
    num, step, seeds = (512, 5, 2) if args.smoke else (4096, 1, args.seeds)
    grid = [k / 100 for k in range(step, 100, step)]
    rows = []
    for name, curve in CURVES.items():
        runs = []
        for seed in range(seeds):
            pyro.set_rng_seed(seed)
            runs.append(curve(draw_data(num), grid))
        rows.append(row(name, torch.stack(runs), grid))

    print(f"{'':<26} {'argmin':>7} {'sd':>6} {'least':>6} {'most':>6} {'range':>9}")
    for line in rows:
        name, *values = line.values()
        widths = (7, 6, 6, 6, 9)
        print(f"{name:<26}", *(f"{v:>{w}}" for v, w in zip(values, widths, strict=True)))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "mode_weights.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
