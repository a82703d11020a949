r"""Three rings: particles carried by the KALE flow end on the target, by the MMD flow many do not.

The target is three rings of 80 points each, the particles start in a small cloud on one of them.
Both laws live on different supports, where the Kullback-Leibler divergence is infinite. The KALE
flow of small lambda follows it nevertheless; that of large lambda is the MMD flow, whose pull
vanishes away from the rings, so that particles are left behind.

Settings are those of Glaser, Arbel and Gretton (KALE flow, NeurIPS 2021, arXiv:2106.08929) and of
the notebook they published: radius 0.3, centres 0.75 apart, a start of standard deviation 0.01
around the lowest point of the first ring, kernel exp(-r^2 / 0.1), which is a Gaussian of length
sqrt(0.05) here, step sizes 1e-4 (lambda = 1e-3) and 1e-3 (lambda = 1e4, MMD) over 50 000 steps,
no noise. To save time steps are five times as long and a fifth as many; the script first runs
both for a while and goes on only if they agree.

Run it; the table is printed, the figure goes to results/kale_flow_rings::

    python examples/reproductions/kale_flow_rings.py            # about five minutes
    python examples/reproductions/kale_flow_rings.py --smoke    # a few seconds, a short flow
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pyro_ebm.infer import ParticleFlow, kale_flow, mmd_flow
from pyro_ebm.ops.kernels import GaussianKernel
from pyro_ebm.plots import PALETTE

RADIUS, SPACING, PER_RING = 0.3, 0.75, 80
KERNEL = GaussianKernel(math.sqrt(0.1 / 2))
PAPER_STEPS = 50_000
SPEED_UP = 5
STRAGGLER = 0.05  # a particle farther from every target point than this is left behind
SHARES = (0.0, 0.02, 0.30, 0.99, 1.0)  # of the run, where snapshots are taken
AGREEMENT = 0.02  # root mean square distance between particles of long and short steps

Run = Callable[..., ParticleFlow]


def flows() -> dict[str, tuple[Run, float]]:
    """Returns each flow with the step size of the paper."""
    return {
        "KALE, lambda 1e-3": (partial(kale_flow, kernel=KERNEL, regularization=1e-3), 1e-4),
        "KALE, lambda 1e4": (partial(kale_flow, kernel=KERNEL, regularization=1e4), 1e-3),
        "MMD": (partial(mmd_flow, kernel=KERNEL), 1e-3),
    }


def rings() -> Tensor:
    """Returns the target: three rings below each other."""
    angle = 2 * math.pi * torch.arange(PER_RING) / PER_RING
    ring = RADIUS * torch.stack([angle.cos(), angle.sin()], -1)
    return torch.cat([ring - torch.tensor([0.0, SPACING * i]) for i in range(3)])


def start(seed: int) -> Tensor:
    """Returns the particles: a small cloud at the lowest point of the first ring."""
    torch.manual_seed(seed)
    return 0.01 * torch.randn(3 * PER_RING, 2) - torch.tensor([0.0, RADIUS])


def distances(particles: Tensor, target: Tensor) -> Tensor:
    """Returns how far each particle is from the nearest target point."""
    return torch.cdist(particles, target).amin(1)


def speed_up(num_steps: int) -> int:
    """Returns by how much steps may be longer, after printing what tells.

    Every flow is run for ``num_steps`` steps of the paper and a fifth as many of five times the
    size, from one start.
    """
    target, agree = rings(), True
    print(f"steps {SPEED_UP} times as long, after {num_steps} steps of the paper:")
    for name, (run, step_size) in flows().items():
        short = run(start(0), target, step_size=step_size, num_steps=num_steps)
        fewer = num_steps // SPEED_UP
        long = run(start(0), target, step_size=SPEED_UP * step_size, num_steps=fewer)
        apart = float((short.particles - long.particles).square().sum(-1).mean().sqrt())
        values = (float(short.values[-SPEED_UP]), float(long.values[-1]))
        print(f"  {name:<18} rms distance {apart:.4f}, divergence {values[0]:.5f} {values[1]:.5f}")
        agree = agree and apart < AGREEMENT
    print(f"  they {'agree' if agree else 'differ: the steps of the paper are taken'}\n")
    return SPEED_UP if agree else 1


def measure(flow: ParticleFlow, target: Tensor) -> dict[str, float]:
    """Returns a row of the table."""
    left = distances(flow.particles, target)
    return {
        "distance": float(left.mean()),
        "stragglers": float((left > STRAGGLER).double().mean()),
        "uncovered": float(distances(target, flow.particles).mean()),
        "gap": float(flow.gaps.max()),
    }


def print_table(rows: dict[str, list[dict[str, float]]]) -> None:
    """Prints every seed and the mean of all."""
    print(f"{'':<22}{'distance':>10}{'stragglers':>12}{'uncovered':>11}{'largest gap':>13}")
    for name, seeds in rows.items():
        keys = seeds[0].keys()
        mean = {k: sum(row[k] for row in seeds) / len(seeds) for k in keys}
        mean["gap"] = max(row["gap"] for row in seeds)
        labels = [*(f"seed {k}" for k in range(len(seeds))), "all"]
        print(name)
        for label, row in zip(labels, [*seeds, mean], strict=True):
            line = f"  {label:<20}{row['distance']:>10.4f}{row['stragglers']:>12.1%}"
            print(f"{line}{row['uncovered']:>11.4f}{row['gap']:>13.1e}")
    print(
        "distance: mean over particles to the nearest target point\n"
        f"stragglers: share of particles beyond {STRAGGLER}\n"
        "uncovered: mean over target points to the nearest particle\ngap: in nats\n"
    )


def draw_figure(path: Path, kept: dict[str, ParticleFlow], target: Tensor) -> None:
    """Draws a row of snapshots for each flow."""
    figure, axes = plt.subplots(len(kept), 4, figsize=(9, 4.2 * len(kept)), layout="constrained")
    for row, color, (name, flow) in zip(axes, PALETTE, kept.items(), strict=False):
        for ax, share, step, cloud in zip(row, SHARES, flow.steps, flow.trajectory, strict=False):
            ax.scatter(*target.T, s=4, color="0.75")
            ax.scatter(*cloud.T, s=4, color=color)
            ax.set(xlim=(-0.7, 0.7), ylim=(-2.0, 0.5), aspect="equal")
            ax.set_title(f"{name}\n{share:.0%}, step {int(step)}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=PAPER_STEPS, help="in steps of the paper")
    parser.add_argument("--out", type=Path, default=Path("results/kale_flow_rings"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, a short flow")
    return parser.parse_args()


def main() -> None:
    """Runs all flows from all starts and compares where their particles end."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    num_seeds, steps = (2, 200) if args.smoke else (args.seeds, args.steps)
    factor = speed_up(20 if args.smoke else 2000)
    target, num_steps = rings(), steps // factor
    snapshots = [round(share * num_steps) for share in SHARES]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in flows()}
    kept = {}
    for name, (run, step_size) in flows().items():
        for seed in range(num_seeds):
            flow = run(
                start(seed),
                target,
                step_size=factor * step_size,
                num_steps=num_steps,
                snapshots=snapshots,
            )
            rows[name].append(measure(flow, target))
            kept.setdefault(name, flow)
    print_table(rows)
    apart = kept["KALE, lambda 1e4"].particles - kept["MMD"].particles
    print(f"KALE of lambda 1e4 and MMD end {float(apart.square().sum(-1).mean().sqrt()):.1e} apart")
    draw_figure(args.out / "kale_flow_rings.png", kept, target)
    print(f"figure: {args.out / 'kale_flow_rings.png'}")


if __name__ == "__main__":
    main()
