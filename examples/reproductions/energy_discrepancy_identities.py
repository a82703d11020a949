r"""Every identity and limit of energy discrepancy, theory beside what the package returns.

Rows without a standard deviation are sums over all states or quadratures: their gap is rounding, or
the distance to a limit that the setting names. The others are Monte Carlo, mean and standard
deviation over five seeds; z is the gap in standard errors of that mean.

A trick makes the mean over M negatives exact: the loss knows importance ratios, so that all states
(or the nodes of a quadrature) can be given as negatives with their probabilities::

    python examples/reproductions/energy_discrepancy_identities.py           # a few seconds
    python examples/reproductions/energy_discrepancy_identities.py --smoke   # less Monte Carlo

Identities are from Schröder et al., arXiv:2307.06431, 2307.07595 and 2412.01019, but for the rows
on the weight w, whose value 1 alone is consistent at finite M.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    BernoulliFlips,
    DiscreteEnergyDiscrepancy,
    EnergyDiscrepancy,
    HeatKernel,
    MaskedSite,
    PseudoLikelihood,
    RankingNCE,
    SiteFlip,
)
from pyro_ebm.infer.discrepancy.perturbation_contrast import Negatives
from pyro_ebm.infer.discrepancy.perturbations import Perturbation
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.ops.heat_kernels import rates

NO_C = torch.zeros(())
NO_WEIGHT = 1e-280  # of the datum itself, in place of 0


class Line(NamedTuple):
    """One identity; ``measured`` has one value, or one per seed."""

    identity: str
    setting: str
    theory: float
    measured: Sequence[float]


def quiet(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Builds an objective whose weight is not 1 on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        return make(*args, **options)


def over_seeds(measure: Callable[[], float], num_seeds: int) -> list[float]:
    """Returns a Monte Carlo value for every seed."""
    values = []
    for seed in range(num_seeds):
        pyro.set_rng_seed(seed)
        values.append(measure())
    return values


# --- real numbers


def gaussian(variance: float) -> EnergyDistribution:
    """Returns U = x^2 / (2 variance)."""
    return EnergyDistribution(lambda x: 0.5 * x**2 / variance, event_shape=())


def normal_nodes(num: int) -> tuple[Tensor, Tensor]:
    """Returns points and weights of a standard normal's expectation."""
    x, w = np.polynomial.hermite_e.hermegauss(num)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def gaussian_value(data: float, model: float, t: float) -> float:
    """Returns ED of N(0, data) from N(0, model) in one dimension."""
    first = data / (2 * model) - (data + t) / (2 * (model + t))
    return first - 0.5 * math.log((model + t) / model)


def estimated_value(data: float, model: float, t: float, num: int) -> float:
    """Returns the same by the objective's own draws, 512 negatives a row."""
    objective = quiet(EnergyDiscrepancy, t, 512, stabilization=1e-12)
    p, total = gaussian(model), 0.0
    for x in (math.sqrt(data) * torch.randn(num)).split(2000):
        total += float(objective.per_datum(p, x, objective.draw(p, x, None), NO_C).sum())
    return total / num


def with_one_negative(p: EnergyDistribution, t: float, weight: float = 1.0) -> float:
    """Returns the expected loss at N(0, 1) data, M = 1: there and back is one normal step."""
    z, w = normal_nodes(120)
    x, step = (part.flatten() for part in torch.meshgrid(z, z, indexing="ij"))
    objective = quiet(EnergyDiscrepancy, t, 1, stabilization=weight)
    rows = objective.per_datum(p, x, Negatives((x + math.sqrt(2 * t) * step)[None]), NO_C)
    return float(torch.outer(w, w).flatten() @ rows)


def with_all_negatives(p: EnergyDistribution, t: float) -> float:
    """Returns ED at N(0, 1) data, the way back integrated on a fine grid."""
    z, w = normal_nodes(24)
    x, xi = (part.flatten() for part in torch.meshgrid(z, z, indexing="ij"))
    back = torch.linspace(-9.0, 9.0, 4001)
    mass = torch.softmax(-0.5 * back**2, 0)
    points = x + math.sqrt(t) * (xi + back[:, None])
    ratio = (mass * len(back)).log()[:, None].expand_as(points)
    objective = quiet(EnergyDiscrepancy, t, len(back), stabilization=NO_WEIGHT)
    rows = objective.per_datum(p, x, Negatives(points, ratio, torch.zeros_like(x)), NO_C)
    return float(torch.outer(w, w).flatten() @ rows)


def fitted_variance(weight: float) -> float:
    """Returns where the expected loss for M = 1 and t = 1 is least."""
    best = min((0.3 + 0.1 * k for k in range(18)), key=lambda s: _at(s, weight))
    for step in (0.05, 0.01, 0.002):
        left, middle, right = (_at(best + k * step, weight) for k in (-1, 0, 1))
        best += 0.5 * step * (left - right) / (left - 2 * middle + right)
    return best


def _at(variance: float, weight: float) -> float:
    return with_one_negative(gaussian(variance), 1.0, weight)


def continuous(num_rows: int, num_seeds: int) -> Iterator[Line]:
    """Yields the identities of the Gaussian perturbation."""
    for setting in ((1.0, 1.0, 0.5), (1.0, 2.0, 0.5), (0.7, 0.4, 1.0)):
        measured = over_seeds(lambda s=setting: estimated_value(*s, num_rows), num_seeds)  # type: ignore[misc]
        name = "N(0, {:g}), model N(0, {:g}), t = {:g}".format(*setting)
        yield Line("Gaussian value", name, gaussian_value(*setting), measured)
    quartic = EnergyDistribution(lambda x: 0.1 * x**4 + 0.3 * x**2 - 0.2 * x, event_shape=())
    z, w = normal_nodes(60)
    curvature, slope = 1.2 * z**2 + 0.6, 0.4 * z**3 + 0.6 * z - 0.2
    score_matching = float(w @ (0.5 * slope**2 - curvature))
    for t in (1e-3, 1e-4, 1e-5):
        value = (with_one_negative(quartic, t) - math.log(2)) * 2 / t
        yield Line(
            "score matching, 2 (L - log 2) / t", f"M = 1, t = {t:g}", score_matching, [value]
        )
    for t in (1.0, 10.0, 100.0):
        log_likelihood = -0.5 * math.log(4 * math.pi) - 0.25
        gap = -(with_all_negatives(gaussian(2.0), t) + log_likelihood) + _entropy_term(t)
        ratio = (1 + t) / (2 + t)
        theory = 0.5 * (ratio - 1 - math.log(ratio))
        bound = (math.sqrt(2) - 1) ** 2 / (2 * t)
        setting = f"t = {t:g}, bound {bound:.2g}"
        yield Line("likelihood less ED = KL(d_t | p_t)", setting, theory, [gap])
    for weight in (0.05, 0.5, 1.0, 2.0, 8.0):
        name = "fitted variance" if weight == 1 else "fitted variance, biased"
        yield Line(name, f"M = 1, t = 1, w = {weight:g}", 1.0, [fitted_variance(weight)])


def _entropy_term(t: float) -> float:
    return -0.5 * math.log(2 * math.pi) - 0.5 * math.log(1 + t) - 0.5


# --- discrete


class Discrete(NamedTuple):
    """All states of d sites, a law of the data and a potential, both random."""

    x: Tensor
    law: Tensor
    potential: Tensor
    num_values: int

    @classmethod
    def draw(cls, num_values: int, num_sites: int) -> Discrete:
        """Draws one."""
        pyro.set_rng_seed(3)
        every = itertools.product(range(num_values), repeat=num_sites)
        x = torch.tensor(list(every), dtype=torch.get_default_dtype())
        return cls(x, torch.softmax(torch.randn(len(x)), 0), torch.randn(len(x)), num_values)

    def ebm(self, potential: Tensor | None = None) -> EnergyDistribution:
        """Returns the EBM that looks its potential up."""
        table = self.potential if potential is None else potential
        strides = self.num_values ** torch.arange(self.x.shape[1] - 1, -1, -1)
        support = constraints.integer_interval(0, self.num_values - 1)
        shape = self.x.shape[1:]
        return EnergyDistribution(
            lambda x: table[(x.long() * strides).sum(-1)], event_shape=shape, support=support
        )

    def product(self, kernel: Tensor) -> Tensor:
        """Returns the kernel of sites that move by themselves."""
        whole = torch.ones(1, 1)
        for _ in range(self.x.shape[1]):
            whole = torch.kron(whole, kernel)
        return whole

    def value(self, kernel: Tensor) -> float:
        """Returns ED with all states as negatives, given q(y | x)."""
        num, d = self.x.shape
        points = self.x[:, None, None].expand(num, num, num, d)
        ratio = (num * kernel).log()[:, None, :].expand(num, num, num)
        objective = quiet(DiscreteEnergyDiscrepancy, SiteFlip(), num, stabilization=NO_WEIGHT)
        contrast = Negatives(points, ratio, torch.zeros(num, num))
        pairs = self.x[:, None].expand(num, num, d)
        rows = objective.per_datum(self.ebm(), pairs, contrast, NO_C)
        return float((self.law[:, None] * kernel * rows).sum())

    def with_one_negative(self, kernel: Tensor, potential: Tensor, weight: float = 1.0) -> Tensor:
        """Returns the expected loss for M = 1, the way back normalized and weighed."""
        num, d = self.x.shape
        mass = kernel.sum(0)
        back = (kernel / mass).T
        log_mass = mass.log()[None, :, None].expand(num, kernel.shape[1], num)
        shape = (num, kernel.shape[1], num, d)
        contrast = Negatives(self.x.expand(shape)[None], log_mass[None], log_mass)
        objective = quiet(DiscreteEnergyDiscrepancy, SiteFlip(), 1, stabilization=weight)
        data = self.x[:, None, None].expand(shape)
        rows = objective.per_datum(self.ebm(potential), data, contrast, NO_C)
        return (self.law[:, None, None] * kernel[:, :, None] * back * rows).sum()

    def fitted(self, kernel: Tensor, weight: float) -> Tensor:
        """Returns the law that the expected loss for M = 1 leads to, by Newton's method."""
        free = torch.zeros(len(self.law) - 1)

        def loss(free: Tensor) -> Tensor:
            potential = torch.cat([torch.zeros(1), free])
            return self.with_one_negative(kernel, potential, weight)

        for _ in range(40):
            slope = torch.autograd.functional.jacobian(loss, free)
            step = torch.linalg.solve(torch.autograd.functional.hessian(loss, free), slope)
            free = free - step * min(1.0, 1.0 / float(step.abs().max()))
            if step.abs().max() < 1e-12:
                break
        return torch.softmax(-torch.cat([torch.zeros(1), free]), 0)

    def estimated(self, perturbation: Perturbation, num: int) -> float:
        """Returns the mean loss for M = 1 by the perturbation's own draws."""
        data = self.x[torch.multinomial(self.law, num, replacement=True)]
        objective, p = DiscreteEnergyDiscrepancy(perturbation, 1), self.ebm()
        return float(objective.per_datum(p, data, objective.draw(p, data, None), NO_C).mean())


def exact_discrete() -> Iterator[Line]:
    """Yields what is true to rounding."""
    bits = Discrete.draw(2, 3)
    law, u, x = bits.law, bits.potential, bits.x
    half = bits.product(torch.full((2, 2), 0.5))
    nll = float(law @ u + torch.logsumexp(-u, 0))
    yield Line("NLL - d log 2", "flips at 1/2, M = inf", nll - 3 * math.log(2), [bits.value(half)])

    model = torch.softmax(-u, 0)
    beside = ((x[:, None] != x).sum(-1) == 1).to(x.dtype) / 3
    gibbs = beside * (model / (model + model[:, None]))
    gibbs = gibbs + torch.diag(1 - gibbs.sum(1))
    cd = float(law @ u - (law @ gibbs) @ u)
    yield Line("CD-1", "q = one Gibbs step of the model, M = inf", cd, [bits.value(gibbs)])

    pyro.set_rng_seed(4)
    skewed = torch.rand(8, 8) ** 2 + 0.1
    skewed = skewed / skewed.sum(1, keepdim=True)
    one, two = law @ skewed, model @ skewed
    kl = law @ (law / model).log() - one @ (one / two).log()
    theory = float(kl - law @ law.log() + one @ one.log())
    yield Line("KL(d|p) - KL(qd|qp) + c(d)", "asymmetric q, M = inf", theory, [bits.value(skewed)])

    for num_values in (2, 4):
        yield masked_line(Discrete.draw(num_values, 3))
    yield ranking_line(Discrete.draw(3, 3))
    for weight in (1.0, 0.3, 3.0):
        name = "largest error of a probability"
        flips = bits.product(torch.tensor([[0.8, 0.2], [0.2, 0.8]]))
        for which, kernel in (("flips at 0.2", flips), ("asymmetric q", skewed)):
            off = float((bits.fitted(kernel, weight) - law).abs().max())
            label = name if weight == 1 else f"{name}, biased"
            yield Line(label, f"M = 1, {which}, w = {weight:g}", 0.0, [off])


def masked_line(setup: Discrete) -> Line:
    """Compares all values of a masked site in turn with the package's pseudo-likelihood."""
    x, p, num = setup.x, setup.ebm(), setup.num_values
    d = x.shape[1]
    values = torch.arange(num, dtype=x.dtype)[:, None, None, None]
    points = torch.where(torch.eye(d, dtype=torch.bool)[:, None], values, x)
    log_mass = torch.full((d, len(x)), math.log(num))
    objective = quiet(DiscreteEnergyDiscrepancy, MaskedSite(), num, stabilization=NO_WEIGHT)
    contrast = Negatives(points, log_mass.expand(num, d, len(x)), log_mass)
    rows = objective.per_datum(p, x.expand(d, len(x), d), contrast, NO_C).mean(0)
    theory = float(setup.law @ PseudoLikelihood().row_losses(p, x)) / d
    setting = f"masked site of {num} values, M = inf"
    return Line("pseudo-likelihood / d", setting, theory, [float(setup.law @ rows)])


def ranking_line(setup: Discrete) -> Line:
    """Compares with ranking NCE on the same draws."""
    objective, x, p = DiscreteEnergyDiscrepancy(HeatKernel(), 6), setup.x, setup.ebm()
    drawn = objective.draw(p, x, None)
    still = Contrast(drawn.points, torch.zeros(6, len(x)), torch.zeros(len(x)))
    ranking = RankingNCE(num_noise=6).per_datum(p, x, still, NO_C).mean() - math.log(6)
    ed = float(objective.per_datum(p, x, drawn, NO_C).mean())
    return Line("ranking NCE - log M", "same draws, M = 6, w = 1", float(ranking), [ed])


def sampled_discrete(num_rows: int, num_seeds: int) -> Iterator[Line]:
    """Yields the expected loss for M = 1: sums over all states against draws."""
    bits, triples = Discrete.draw(2, 3), Discrete.draw(3, 2)
    flip = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
    table: list[tuple[str, Discrete, Perturbation, list[Tensor]]] = [
        ("Bernoulli 0.2", bits, BernoulliFlips(0.2), [bits.product(flip)]),
        ("one flip", bits, SiteFlip(), [((bits.x[:, None] != bits.x).sum(-1) == 1) / 3.0]),
        ("masked site", triples, MaskedSite(), [_masks(triples.x, j) for j in (0, 1)]),
    ]
    for structure, time in (
        ("uniform", 0.5),
        ("cyclic", 0.5),
        ("ordinal", 0.5),
        ("absorbing", 0.5),
    ):
        scale = 9 if structure in ("cyclic", "ordinal") else 1  # the package's unit is S^2
        kernel = torch.matrix_exp(time * rates(structure, 3))[:3]  # type: ignore[arg-type]
        walk = HeatKernel(structure, time / scale)  # type: ignore[arg-type]
        table.append((f"{structure} heat kernel", triples, walk, [triples.product(kernel)]))
    for name, setup, perturbation, kernels in table:
        sums = [setup.with_one_negative(kernel, setup.potential) for kernel in kernels]
        theory = float(torch.stack(sums).mean())
        measured = over_seeds(
            lambda s=setup, q=perturbation: s.estimated(q, num_rows),  # type: ignore[misc]
            num_seeds,
        )
        yield Line("expected loss, M = 1", name, theory, measured)


def _masks(x: Tensor, site: int) -> Tensor:
    """Which states are told apart when a site is hidden, ``(states, what is left)``."""
    return torch.eye(3)[x[:, 1 - site].long()]


# --- the table


def cells(line: Line) -> dict[str, str]:
    """Returns a line as text."""
    measured = torch.tensor(line.measured)
    gap = float(measured.mean()) - line.theory
    spread = float(measured.std()) if len(measured) > 1 else None
    z = None if spread is None else gap / (spread / math.sqrt(len(measured)))
    return {
        "identity": line.identity,
        "setting": line.setting,
        "theory": f"{line.theory:.6f}",
        "measured": f"{measured.mean():.6f}",
        "gap": f"{abs(gap):.1e}",
        "sd": "" if spread is None else f"{spread:.1e}",
        "z": "" if z is None else f"{z:+.1f}",
    }


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/reproductions"))
    parser.add_argument("--smoke", action="store_true", help="two seeds and few draws")
    return parser.parse_args()


def main() -> None:
    """Prints the table and writes it to a file."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args = parse_arguments()
    num_rows, num_seeds = (1000, 2) if args.smoke else (20_000, args.seeds)
    lines = itertools.chain(
        continuous(num_rows, num_seeds), exact_discrete(), sampled_discrete(num_rows, num_seeds)
    )
    rows = [cells(line) for line in lines]
    widths = (40, 44, 10, 10, 8, 8, 6)
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        left, right = list(row.values())[:2], list(row.values())[2:]
        print("".join(f"{v:<{w}}" for v, w in zip(left, widths[:2], strict=True)), end="")
        print("".join(f"{v:>{w}}" for v, w in zip(right, widths[2:], strict=True)))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "energy_discrepancy_identities.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
