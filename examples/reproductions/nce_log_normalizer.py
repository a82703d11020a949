r"""NCE learns log Z: the c of noise-contrastive estimation beside the exact normalizer.

Two laws whose normalizer is known: a standard normal, energy a x^2 / 2 + b x with noise
N(0.5, 1.5^2), and an Ising model of ten 0/1 bits in a ring, where log Z is a sum over 1024 states
and noise is uniform. Energy and c are learned together from n data and nu n draws of noise, by
Newton's method to the minimum of the loss, n = 200 000. The table has the worst |c - log Z| of the
seeds, at the true energy and at the learned one, whose log Z is what c stands for::

    python examples/reproductions/nce_log_normalizer.py            # two minutes
    python examples/reproductions/nce_log_normalizer.py --smoke    # few data, two seeds
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.infer import NCE

RATIOS = (0.5, 1, 10)
NUM_BITS = 10


class Problem(NamedTuple):
    """A law with a known log Z: data, the distribution at parameters, noise, the truth."""

    name: str
    draw: Callable[[int], Tensor]
    law: Callable[[Tensor], ebm.EnergyDistribution]
    noise: dist.TorchDistribution
    truth: Tensor
    log_z: Callable[[Tensor], Tensor]


def gaussian() -> Problem:
    """A standard normal, two parameters."""

    def law(theta: Tensor) -> ebm.EnergyDistribution:
        return ebm.EnergyDistribution(
            lambda x: 0.5 * theta[0] * x**2 + theta[1] * x, event_shape=()
        )

    return Problem(
        "Gaussian",
        lambda n: torch.randn(n),
        law,
        dist.Normal(torch.tensor(0.5), 1.5),
        torch.tensor([1.0, 0.0]),
        lambda theta: 0.5 * (torch.log(2 * math.pi / theta[0]) + theta[1] ** 2 / theta[0]),
    )


def ising() -> Problem:
    """Ten 0/1 bits in a ring, one field and one coupling; 1024 states."""
    truth = torch.tensor([-0.4, 0.9])
    noise = dist.Bernoulli(torch.full((NUM_BITS,), 0.5)).to_event(1)

    def log_weight(theta: Tensor, x: Tensor) -> Tensor:
        return theta[0] * x.sum(-1) + theta[1] * (x * x.roll(1, -1)).sum(-1)

    def law(theta: Tensor) -> ebm.EnergyDistribution:
        return ebm.EnergyDistribution(
            lambda x: -log_weight(theta, x), support=noise.support, event_shape=(NUM_BITS,)
        )

    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * NUM_BITS)

    def draw(n: int) -> Tensor:
        return states[dist.Categorical(logits=log_weight(truth, states)).sample((n,))]

    def log_z(theta: Tensor) -> Tensor:
        return log_weight(theta, states).logsumexp(0)

    return Problem("Ising, 10 bits", draw, law, noise, truth, log_z)


def learn(problem: Problem, ratio: float, num_rows: int) -> Tensor:
    """Returns the energy's two parameters and c at the minimum of the loss."""
    x, nce = problem.draw(num_rows), NCE(num_noise=ratio, noise=problem.noise)
    contrast = nce.draw(problem.law(problem.truth).expand([num_rows]), x, None)

    def loss(theta: Tensor) -> Tensor:
        return nce.per_datum(problem.law(theta), x, contrast, theta[2]).mean()

    theta = torch.cat([problem.truth, problem.log_z(problem.truth)[None]])
    for _ in range(6):
        theta = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(theta), theta)
        if gradient.abs().max() < 1e-9:
            return theta.detach()
        theta = theta - torch.linalg.solve(torch.autograd.functional.hessian(loss, theta), gradient)
    raise RuntimeError(f"Newton's method did not converge on {problem.name}, nu = {ratio}")


def row(problem: Problem, ratio: float, num_rows: int, num_seeds: int) -> dict[str, str]:
    """Returns c over the seeds, and its distance from log Z."""
    found = []
    for seed in range(num_seeds):
        pyro.set_rng_seed(seed)
        found.append(learn(problem, ratio, num_rows))
    c = torch.stack(found)[:, 2]
    exact = problem.log_z(problem.truth)
    own = torch.stack([problem.log_z(theta) for theta in found])
    return {
        "law": problem.name,
        "nu": f"{ratio:g}",
        "log Z": f"{exact:.4f}",
        "mean c": f"{c.mean():.4f}",
        "sd": f"{c.std():.4f}",
        "worst gap": f"{(c - exact).abs().max():.4f}",
        "at learned": f"{(c - own).abs().max():.4f}",
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-rows", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/reproductions"))
    parser.add_argument("--smoke", action="store_true", help="few data, two seeds")
    return parser.parse_args()


def main() -> None:
    """Prints a row for each law and ratio of noise to data, and writes them to a file."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args = parse_arguments()
    num_rows, seeds = (500, 2) if args.smoke else (args.num_rows, args.seeds)
    problems = (gaussian(), ising())
    rows = [row(problem, ratio, num_rows, seeds) for problem in problems for ratio in RATIOS]

    widths = (16, 5, 8, 8, 8, 10, 11)
    for line in (dict.fromkeys(rows[0]), *rows):
        cells = [key if value is None else value for key, value in line.items()]
        print("".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "nce_log_normalizer.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
