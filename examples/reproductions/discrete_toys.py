r"""Densities of the plane written as bits, learned without log Z: six toys with a known floor.

A point becomes 2 B bits: the sign of each coordinate, and its magnitude in B - 1 bits of Gray code,
where the largest magnitude of 5000 draws, plus two, is the end of the scale. Nothing tells the
network which bits belong together. The laws are those of FFJORD's toys but for the pinwheel, whose
density is no short sum; their probabilities per state are exact here, so that every number can be
held against the entropy of the data, the least negative log-likelihood there is.

``--bits 16``, as published: 2^32 states, energy discrepancy with bit flips of probability 0.1, M =
32, w = 1, three layers of 256 units, batches of 128 fresh draws, 100 000 steps; learning rate 2e-3,
gradients clipped at norm 5 and weights averaged with decay 0.999 are from the notebook of Schröder,
Ou, Li and Duncan (arXiv:2307.07595), whose text has 1e-4. Negative log-likelihoods in nats on 10 x
4000 test points, printed beside ours, are those of Zhang et al. (EB-GFN, ICML 2022,
arXiv:2202.01361), who compare with PCD and ALOE+; log Z there is an importance estimate.

Here log Z is a stratified estimate: the leading c bits of both coordinates (``--cell-bits``) split
the plane into 4^c cells, every cell is given ``--draws`` uniform settings of the other bits, and

    Z = sum over cells of 4^(B - c) * mean of exp(-U), se from the variances within the cells.

It is unbiased for Z, knows nothing of the data, and no region goes unseen. ``ess`` is (sum w)^2 /
sum w^2 of all draws as if they were independent uniform ones. The estimate of a known log Z, that
of the law itself, stands in the heading of every density. ``behind`` is the mean of log p_data -
log p_model at the test points, an estimate of the divergence in which the noise of the test set
mostly cancels. The end of the scale depends on 5000 draws, whose seed the published code ignores
for some laws: that moves published numbers by a few hundredths of a nat against the entropy.

A CPU does with fewer steps of a smaller network and fewer negatives, at a larger rate that falls to
0 by a cosine, with an average of fewer weights.

``--bits 6`` or less (4096 states): the divergence from the data is a sum over all states, for
energy discrepancy and five objectives beside it and for the exact likelihood, at equal steps::

    cd examples/reproductions
    python discrete_toys.py --bits 16 --density 2spirals --device cuda --mmd         # as published
    python discrete_toys.py --bits 16 --density 2spirals 8gaussians checkerboard --width 128 \
        --objective flips --negatives 8 --steps 6000 --lr 0.01 --anneal --decay 0.99 \
        --cell-bits 8 --draws 4
    python discrete_toys.py --bits 6 --density 2spirals 8gaussians checkerboard --width 64 \
        --negatives 16 --steps 1000 --lr 0.02 --anneal --decay 0.99                  # exact
    python discrete_toys.py --smoke                                                  # seconds
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer import (
    NCE,
    BernoulliFlips,
    DiscreteEnergyDiscrepancy,
    MaskedSite,
    PersistentContrastiveDivergence,
    PseudoLikelihood,
    RatioMatching,
    fit,
)
from pyro_ebm.infer.scoring.deterministic import DeterministicObjective

SUPPORT = constraints.independent(constraints.boolean, 1)
BATCH = 128
MAX_STATES = 4096
CHUNK = 2**17

# --- laws in the plane


class Toy(NamedTuple):
    """A point is a corner, uniform in K, plus a uniform draw on a square, plus Gaussian noise.

    Args:
        corners: Lower left corners, ``(K, 2)``, so many that curves are smooth under the noise.
        side: Side of the square, 0 for none.
        std: Standard deviation of the noise, 0 for none.
        largest: Largest magnitude of a coordinate among 5000 draws, which sets the scale.
        published: Negative log-likelihood of EB-GFN in nats at 16 bits.
    """

    corners: Tensor
    side: float
    std: float
    largest: float
    published: float

    @property
    def end(self) -> float:
        """The magnitude that the scale ends at."""
        return self.largest + 2

    def draw(self, num: int) -> Tensor:
        """Returns points ``(num, 2)`` in the plane."""
        at = self.corners[torch.randint(len(self.corners), (num,), device=self.corners.device)]
        return at + self.side * torch.rand_like(at) + self.std * torch.randn_like(at)

    def below(self, edges: Tensor) -> Tensor:
        """Returns how much of every corner's law lies below ``edges``, both ``(..., 1 or K)``."""
        if not self.std:
            return (edges / self.side).clamp(0, 1)
        if not self.side:
            return torch.special.ndtr(edges / self.std)
        upper, lower = edges / self.std, (edges - self.side) / self.std
        return (_ramp(upper) - _ramp(lower)) * self.std / self.side


def _ramp(z: Tensor) -> Tensor:
    """The integral of the normal distribution function up to z."""
    return z * torch.special.ndtr(z) + torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _middles(num: int) -> Tensor:
    return (torch.arange(num, dtype=torch.double) + 0.5) / num


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def two_spirals() -> Toy:
    """Two spiral arms of squares, each arm the other turned by half a circle."""
    n = 3 * math.pi * _middles(500).sqrt()
    arm = torch.stack([-n.cos() * n, n.sin() * n], -1)
    return Toy(torch.cat([arm, -arm - 0.5]) / 3, 0.5 / 3, 0.1, 3.48, 20.050)


def eight_gaussians() -> Toy:
    """Eight Gaussians on a circle."""
    return Toy(_polar(4 / 1.414, 2 * math.pi * _middles(8)), 0.0, 0.5 / 1.414, 4.19, 19.982)


def circles() -> Toy:
    """Two circles, one in the other."""
    ring = _polar(3.0, 2 * math.pi * _middles(250))
    return Toy(torch.cat([ring, ring / 2]), 0.0, 0.24, 3.78, 20.546)


def moons() -> Toy:
    """Two half circles that interleave."""
    outer = _polar(2.0, math.pi * _middles(250))
    inner = torch.tensor([2.0, 1.0], dtype=torch.double) - outer
    shift = torch.tensor([-1.0, -0.2], dtype=torch.double)
    return Toy(torch.cat([outer, inner]) + shift, 0.0, 0.2, 3.67, 19.732)


def swissroll() -> Toy:
    """One spiral of one and a half turns."""
    angle = 1.5 * math.pi * (1 + 2 * _middles(500))
    return Toy(_polar(angle / 5, angle), 0.0, 0.2, 3.27, 20.146)


def checkerboard() -> Toy:
    """Eight of the sixteen squares of a board, without noise."""
    ticks = torch.arange(-4.0, 4.0, 2.0, dtype=torch.double)
    squares = torch.cartesian_prod(ticks, ticks)
    return Toy(squares[(squares.sum(-1) / 2) % 2 == 0], 2.0, 0.0, 4.0, 20.696)


DENSITIES: dict[str, Callable[[], Toy]] = {
    "2spirals": two_spirals,
    "8gaussians": eight_gaussians,
    "circles": circles,
    "moons": moons,
    "swissroll": swissroll,
    "checkerboard": checkerboard,
}


# --- their bits


class Coded:
    """A toy in B bits for each coordinate; states are the integers below 2^(2B).

    Args:
        toy: The law.
        bits: B.
    """

    def __init__(self, toy: Toy, bits: int) -> None:
        self.toy, self.bits = toy, bits
        self.cell = toy.end / 2 ** (bits - 1)
        device = toy.corners.device
        places = torch.arange(2 * bits - 1, -1, -1, device=device)
        self.places = places

    def draw(self, num: int) -> Tensor:
        """Returns states ``(num,)`` drawn from the law."""
        return torch.cat([self.states(self.toy.draw(n)) for n in _sizes(num, 2**20)])

    def states(self, x: Tensor) -> Tensor:
        """Returns the states of points ``(num, 2)``.

        Raises:
            ValueError: If a point lies beyond the end of the scale.
        """
        size = (x.abs() / self.cell).long()
        if bool((size >= 2 ** (self.bits - 1)).any()):
            raise ValueError(f"a draw lies beyond the end of the scale at {self.toy.end}")
        sign = (x < 0).long() << (self.bits - 1)
        code = sign | (size ^ (size >> 1))
        return code[:, 0] << self.bits | code[:, 1]

    def to_bits(self, states: Tensor) -> Tensor:
        """Returns bits 0 and 1, ``states.shape + (2 B,)``, the first coordinate first."""
        return (states[..., None] >> self.places & 1).float()

    def log_prob(self, states: Tensor) -> Tensor:
        """Returns exact log probabilities of states ``(num,)`` in doubles."""
        return torch.cat([self._log_prob(part) for part in states.split(2**13)])

    def _log_prob(self, states: Tensor) -> Tensor:
        codes = (states >> self.bits, states & 2**self.bits - 1)
        masses = [self._masses(code, axis) for axis, code in enumerate(codes)]
        return (masses[0] * masses[1]).mean(-1).log()

    def _masses(self, codes: Tensor, axis: int) -> Tensor:
        """Returns the mass of a coordinate's cells under every corner's law, ``(num, K)``."""
        size, sign = self._magnitudes(codes), (codes >> (self.bits - 1)).double()
        low = self.cell * torch.where(sign > 0, -size - 1, size).double()
        edges = low[:, None] - self.toy.corners[:, axis]
        return (self.toy.below(edges + self.cell) - self.toy.below(edges)).clamp_min(0)

    def _magnitudes(self, codes: Tensor) -> Tensor:
        """Undoes the Gray code."""
        size = codes & 2 ** (self.bits - 1) - 1
        for shift in (1, 2, 4, 8):
            size = size ^ (size >> shift)
        return size


def _sizes(num: int, most: int) -> list[int]:
    return [most] * (num // most) + [num % most] * bool(num % most)


# --- learning


class ExactLikelihood(DeterministicObjective):
    """Minus the log-likelihood with log Z as a sum over all states."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def row_losses(self, p: EnergyDistribution, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns it per row, in nats."""
        return p.potential(x) + torch.logsumexp(-p.energy_function(self.states), 0)


def objectives(coded: Coded, negatives: int) -> dict[str, tuple[Callable[[], Any], bool]]:
    """Returns makers by name, and whether steps can be replayed as a graph."""
    ed = partial(DiscreteEnergyDiscrepancy, num_negatives=negatives)
    flips: dict[str, tuple[Callable[[], Any], bool]] = {
        "ED, flips of .1": (partial(ed, BernoulliFlips(0.1)), True),
        "ED, masked bit": (partial(ed, MaskedSite()), True),
    }
    num = 2 * coded.bits
    if 2**num > MAX_STATES:
        return flips
    device = coded.places.device
    states = coded.to_bits(torch.arange(2**num, device=device))
    uniform = dist.Bernoulli(torch.full((num,), 0.5, device=device)).to_event(1)
    return flips | {
        "exact likelihood": (partial(ExactLikelihood, states), True),
        "pseudo-likelihood": (PseudoLikelihood, True),
        "ratio matching": (RatioMatching, True),
        "NCE, uniform noise": (partial(NCE, num_noise=negatives, noise=uniform), True),
        "PCD, 5 sweeps": (partial(PersistentContrastiveDivergence, 5), False),
    }


def learn(name: str, coded: Coded, seed: int, args: argparse.Namespace) -> tuple[MLPEnergy, float]:
    """Returns an energy with averaged weights, and seconds per step."""
    make, can_capture = objectives(coded, args.negatives)[name]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    num = 2 * coded.bits
    energy = MLPEnergy(num, hidden=(args.width,) * 3, activation="silu").to(args.device)

    def model(states: Tensor) -> None:
        pyro.module("energy", energy)
        law = EnergyDistribution(energy, support=SUPPORT, event_shape=(num,), conditional=False)
        with pyro.plate("rows", len(states)):
            pyro.sample("x", law, obs=coded.to_bits(states))

    falling = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.steps)
    result = fit(
        model,
        coded.draw(args.steps * BATCH),
        make(),
        lr=args.lr,
        lr_schedule=falling if args.anneal else None,
        batch_size=BATCH,
        num_steps=args.steps,
        ema=args.decay,
        grad_clip=5.0,
        capture=args.capture and can_capture,
        disable_progbar=True,
    )
    result.use_average()
    return energy, result.seconds / args.steps


# --- log Z


class Estimate(NamedTuple):
    """An estimate of log Z in nats with its standard error, and effective draws."""

    value: float
    stderr: float
    ess: float


@torch.no_grad()
def stratified(
    weigh: Callable[[Tensor], Tensor], coded: Coded, cell_bits: int, draws: int
) -> Estimate:
    """Returns log Z by uniform draws within cells.

    Args:
        weigh: Log weights in doubles of states ``(num,)``.
        coded: What the states mean.
        cell_bits: Leading bits of each coordinate that name a cell.
        draws: Draws in each of the cells, at least two.
    """
    free = max(0, coded.bits - cell_bits)  # bits of a coordinate that a cell leaves open
    cells = torch.arange(2 ** (2 * (coded.bits - free)), device=coded.places.device)
    first, second = cells >> (coded.bits - free), cells & 2 ** (coded.bits - free) - 1
    corner = (first << (coded.bits + free) | second << free)[:, None]
    moments = [_within(weigh, part, coded.bits, free, draws) for part in _parts(corner, draws)]
    means, variances, squares = (torch.cat(part) for part in zip(*moments, strict=True))
    top = means.amax()
    total = (means - top).exp().sum()
    error = (variances - 2 * top).exp().sum().div(draws).sqrt() / total
    ess = draws * total.square() / (squares - 2 * top).exp().sum()
    return Estimate(float(top + total.log() + 2 * free * math.log(2)), float(error), float(ess))


def _parts(corner: Tensor, draws: int) -> tuple[Tensor, ...]:
    return corner.split(max(1, CHUNK // draws))


def _within(
    weigh: Callable[[Tensor], Tensor], corner: Tensor, bits: int, free: int, draws: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logs of the mean, variance and mean square of the weights in every cell."""
    shape = (len(corner), draws)
    open_bits = [torch.randint(2**free, shape, device=corner.device) for _ in range(2)]
    states = corner | open_bits[0] << bits | open_bits[1]
    w = weigh(states.flatten()).reshape(shape)
    top = w.amax(-1).clamp_min(torch.finfo(w.dtype).min)  # a cell may have no mass at all
    scaled = (w - top[:, None]).exp()
    variance, square = scaled.var(-1), scaled.square().mean(-1)
    return scaled.mean(-1).log() + top, variance.log() + 2 * top, square.log() + 2 * top


# --- the comparison


@torch.no_grad()
def log_weights(energy: MLPEnergy, coded: Coded, states: Tensor) -> Tensor:
    """Returns minus the energies of states in doubles, a part at a time."""
    parts = (coded.to_bits(part) for part in states.split(CHUNK))
    return torch.cat([-energy(part).double() for part in parts])


def judged_exactly(energy: MLPEnergy, coded: Coded) -> dict[str, float]:
    """Returns the negative log-likelihood and the divergence as sums over all states."""
    states = torch.arange(4**coded.bits, device=coded.places.device)
    truth = coded.log_prob(states)
    model = log_weights(energy, coded, states).log_softmax(0)
    seen = truth.exp() > 0
    p, apart = truth[seen].exp(), truth[seen] - model[seen]
    return {"NLL": -float(p @ model[seen]), "behind": float(p @ apart)}


def judged_by_draws(energy: MLPEnergy, coded: Coded, args: argparse.Namespace) -> dict[str, float]:
    """Returns estimates on fresh test points."""
    test = coded.draw(args.test)
    log_z = stratified(partial(log_weights, energy, coded), coded, args.cell_bits, args.draws)
    model = log_weights(energy, coded, test) - log_z.value
    apart = coded.log_prob(test) - model
    error = math.hypot(float(apart.std()) / math.sqrt(args.test), log_z.stderr)
    found = {"NLL": -float(model.mean()), "behind": float(apart.mean()), "se": error}
    found |= {"log Z": log_z.value, "se Z": log_z.stderr, "ess": log_z.ess}
    if args.mmd:
        found["1e4 MMD"] = 1e4 * discrepancy(gibbs(energy, coded, 4000), coded.draw(4000), coded)
    return found


@torch.no_grad()
def gibbs(energy: MLPEnergy, coded: Coded, num: int, rounds: int = 50) -> Tensor:
    """Returns bits after sweeps from uniform ones, ``(num, 2 B)``."""
    x = torch.randint(2, (num, 2 * coded.bits), device=coded.places.device).float()
    for _ in range(rounds):
        for site in range(x.shape[1]):
            pair = x.expand(2, *x.shape).clone()
            pair[0, :, site], pair[1, :, site] = 0.0, 1.0
            off, on = energy(pair)
            x[:, site] = (torch.rand_like(on) < torch.sigmoid(off - on)).float()
    return x


def discrepancy(ours: Tensor, states: Tensor, coded: Coded) -> float:
    """Returns the unbiased squared MMD with the kernel exp(-0.1 Hamming distance)."""
    x, y = ours.double(), coded.to_bits(states).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.1 * torch.cdist(a, b, p=1))

    def within(a: Tensor) -> Tensor:
        return (kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


# --- the table


def heading(name: str, coded: Coded, args: argparse.Namespace) -> str:
    """Returns the entropy of the data, and what checks it and log Z."""
    if 4**coded.bits <= MAX_STATES:
        states = torch.arange(4**coded.bits, device=coded.places.device)
        p = coded.log_prob(states).exp()
        entropy = -float(torch.special.xlogy(p, p).sum())
        return f"{name}, {coded.bits} bits: entropy {entropy:.4f}, total mass {p.sum():.10f}"
    values = -coded.log_prob(coded.draw(args.test))
    error = float(values.std()) / math.sqrt(args.test)
    own = stratified(coded.log_prob, coded, args.cell_bits, 2)
    return (
        f"{name}, {coded.bits} bits: entropy {values.mean():.4f} (se {error:.4f}), EB-GFN "
        f"{coded.toy.published:.3f}; log Z of the law itself {own.value:+.4f} (se {own.stderr:.4f})"
    )


def table(name: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """Prints and returns the lines of a density."""
    toy = DENSITIES[name]()
    coded = Coded(toy._replace(corners=toy.corners.to(args.device)), args.bits)
    pyro.set_rng_seed(0)
    print(heading(name, coded, args), flush=True)
    lines: list[dict[str, str]] = []
    for objective in objectives(coded, args.negatives):
        if not any(part in objective for part in args.objective):
            continue
        for seed in range(args.seed_from, args.seed_from + args.seeds):
            energy, seconds = learn(objective, coded, seed, args)
            pyro.set_rng_seed(10_000 + seed)
            is_exact = 4**coded.bits <= MAX_STATES
            found = (
                judged_exactly(energy, coded) if is_exact else judged_by_draws(energy, coded, args)
            )
            line = {"density": name, "learned by": objective, "seed": str(seed)}
            line |= {key: f"{value:.4f}" for key, value in found.items()}
            lines.append(line | {"ms": f"{1000 * seconds:.2f}"})
            if len(lines) == 1:
                print(formatted({key: key for key in lines[0]}))
            print(formatted(lines[-1]), flush=True)
        if args.seeds > 1:
            print("\n".join(map(formatted, summaries(lines[-args.seeds :]))), flush=True)
    return lines


def summaries(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    """Returns means over seeds and standard deviations."""
    keys = [key for key in lines[0] if key not in ("density", "learned by", "seed")]
    values = torch.tensor([[float(line[key]) for key in keys] for line in lines]).double()
    found = {"mean": values.mean(0), "sd": values.std(0)}
    return [
        lines[0] | {"seed": name} | {k: f"{float(x):.4f}" for k, x in zip(keys, row, strict=True)}
        for name, row in found.items()
    ]


def formatted(line: dict[str, str]) -> str:
    """Returns a line in columns."""
    widths = {"density": 13, "learned by": 20, "seed": 6, "ess": 13}
    return "".join(f"{value:>{widths.get(key, 10)}}" for key, value in line.items())


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=6, help="per coordinate; published: 16")
    parser.add_argument("--density", nargs="+", choices=DENSITIES, default=["2spirals", "moons"])
    parser.add_argument("--objective", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-from", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=None, help="20 000; 100 000 at 16 bits")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--anneal", action="store_true", help="lower the rate to 0 by a cosine")
    parser.add_argument("--decay", type=float, default=0.999, help="of the average of the weights")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--negatives", type=int, default=32, help="M, and noise points of NCE")
    parser.add_argument("--cell-bits", type=int, default=9, help="log Z has 4 to this power cells")
    parser.add_argument("--draws", type=int, default=16, help="in each of the cells, for log Z")
    parser.add_argument("--test", type=int, default=40_000, help="test points at 16 bits")
    parser.add_argument("--mmd", action="store_true", help="at 16 bits: MMD of Gibbs draws")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("results/reproductions"))
    parser.add_argument("--smoke", action="store_true", help="4 bits, one seed, few steps")
    args = parser.parse_args()
    args.steps = args.steps or (100_000 if args.bits > 6 else 20_000)
    if args.smoke:
        args.bits, args.density, args.seeds, args.steps = 4, ["2spirals"], 1, 3
        args.width, args.capture = 16, False
    return args


def main() -> None:
    """Prints a table for every density and writes them to a file."""
    torch.set_num_threads(1)
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for name in args.density:
        lines = table(name, args)
        kept = args.out / f"discrete_toys_{args.bits}_{name}_{args.seed_from}.csv"
        with kept.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0].keys())
            writer.writeheader()
            writer.writerows(lines)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
