r"""Three names of one loss: energy discrepancy, conditional NCE and ranking NCE.

With one negative and weight one, energy discrepancy at time t is conditional NCE with noise of
variance 2 t. With M negatives it is ranking NCE on the conditional law p(x | y) ~ exp(-U(x)) rho_y,
where y is the datum with noise of variance t and rho_y = N(y, t) the law of the negatives, less
log M.
Given the same seed the losses agree to rounding, and so do their gradients in the energy's
parameters. The energy is a mixture's, 1000 rows of two coordinates; the table has the largest
difference over rows and seeds, and the loss beside it::

    python examples/reproductions/contrastive_equalities.py            # seconds
    python examples/reproductions/contrastive_equalities.py --smoke    # two seeds
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import ConditionalNCE, EnergyDiscrepancy, Objective, RankingNCE
from pyro_ebm.infer.discrepancy.perturbation_contrast import Negatives
from pyro_ebm.infer.noise.conditional_nce import NoisyCopies
from pyro_ebm.infer.scoring.contrast import Contrast

NUM_ROWS = 1000
TIMES = (0.1, 1.0, 10.0)
NUM_NEGATIVES = 16

Losses = tuple[Tensor, Tensor]
Draws = Contrast | Negatives | NoisyCopies


def energy(theta: Tensor, x: Tensor) -> Tensor:
    """Two modes, theta apart from the origin on either side."""
    return -torch.logsumexp(-0.5 * torch.stack([x - theta, x + theta]).square().sum(-1), 0)


def evaluated(
    objective: Objective, theta: Tensor, x: Tensor, contrast: Draws, **law: object
) -> Losses:
    """Returns the loss per row and the gradient of its mean."""
    p = EnergyDistribution(lambda z: energy(theta, z), **(law or {"event_shape": (2,)}))
    loss = objective.per_datum(p, x, contrast, torch.zeros(()))
    return loss.detach(), torch.autograd.grad(loss.mean(), theta)[0]


def drawn(objective: Objective, theta: Tensor, x: Tensor, law: object, seed: int) -> Draws:
    """Returns what an objective draws when the guide holds the law of the perturbation."""
    p = EnergyDistribution(lambda z: energy(theta, z), event_shape=(2,)).expand([len(x)])
    pyro.set_rng_seed(seed)
    with torch.no_grad():
        return objective.draw(p, x, law)


def with_conditional_nce(theta: Tensor, x: Tensor, time: float, seed: int) -> tuple[Losses, Losses]:
    """Both draw xi and xi' of variance t from the guide's law, in one order."""
    law = dist.Normal(torch.zeros(2), math.sqrt(time)).to_event(1)
    pair = EnergyDiscrepancy(num_negatives=1), ConditionalNCE(num_noise=1)
    one, other = (evaluated(o, theta, x, drawn(o, theta, x, law, seed)) for o in pair)
    return one, other


def with_ranking(theta: Tensor, x: Tensor, time: float, seed: int) -> tuple[Losses, Losses]:
    """The negatives of energy discrepancy, ranked with their density around y."""
    law = dist.Normal(torch.zeros(2), math.sqrt(time)).to_event(1)
    discrepancy = EnergyDiscrepancy(num_negatives=NUM_NEGATIVES)
    points = drawn(discrepancy, theta, x, law, seed).points
    loss, slope = evaluated(discrepancy, theta, x, Negatives(points))
    pyro.set_rng_seed(seed)
    y = x + law.expand([len(x)]).sample()  # the draw that all negatives of a row share
    rho = dist.Normal(y, math.sqrt(time)).to_event(1)
    contrast = Contrast(points, rho.log_prob(points), rho.log_prob(x))
    mirrored = evaluated(RankingNCE(NUM_NEGATIVES), theta, x, contrast, base=rho)
    return (loss + math.log(NUM_NEGATIVES), slope), mirrored


EQUALITIES = {
    "ED(M=1, w=1) = CNCE(2t)": with_conditional_nce,
    f"ED(M={NUM_NEGATIVES}, w=1) = RankingNCE(rho_y)": with_ranking,
}


def row(name: str, time: float, num_seeds: int) -> dict[str, str]:
    """Returns the mean loss over seeds with its spread, and the largest differences."""
    values, losses, slopes = [], [], []
    for seed in range(num_seeds):
        pyro.set_rng_seed(1000 + seed)
        x = 2.0 * torch.randn(NUM_ROWS, 2)
        theta = torch.randn(2, requires_grad=True)
        one, other = EQUALITIES[name](theta, x, time, seed)
        values.append(one[0].mean())
        losses.append((one[0] - other[0]).abs().max())
        slopes.append((one[1] - other[1]).abs().max())
    mean = torch.stack(values)
    return {
        "equality": name,
        "t": f"{time:g}",
        "loss": f"{mean.mean():.4f}",
        "sd": f"{mean.std():.4f}",
        "rows differ": f"{max(losses):.1e}",
        "slopes differ": f"{max(slopes):.1e}",
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/reproductions"))
    parser.add_argument("--smoke", action="store_true", help="two seeds")
    return parser.parse_args()


def main() -> None:
    """Prints the table and writes it to a file."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args = parse_arguments()
    seeds = 2 if args.smoke else args.seeds
    rows = [row(name, time, seeds) for name in EQUALITIES for time in TIMES]

    widths = (34, 5, 9, 8, 13, 15)
    for line in (dict.fromkeys(rows[0]), *rows):
        cells = [key if value is None else value for key, value in line.items()]
        print("".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "contrastive_equalities.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
