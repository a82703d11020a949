"""How often 95 % intervals of parameters hold them, by every way to a posterior: one table.

    python tests/benchmarks/posterior_coverage.py --repeats 200

Parameters are drawn from the prior and data from the law that they give, so that the intervals of
an exact posterior hold 95 % of them, whatever the number of rows. A row is a problem, a way and a
parameter: the share of intervals that hold it, the Monte Carlo error of that share, and their mean
width beside that of the first way.

Problems: 100 rows of a Gaussian with its log Z left out; 50 rows of four spins with a field and a
coupling; one 8 x 8 lattice, with its log Z and with that taken away; 30 rows of a Gaussian
graphical model in four dims. Exchange has tests by simulation instead, 10 000 at a time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.infer import posterior
from pyro_ebm.ops.constraints import spins
from pyro_ebm.testing import coverage

RUN = {"num_samples": 100, "warmup_steps": 150, "num_chains": 16}
LEVEL = 0.95
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model and how its data are drawn.

    Args:
        model: Takes the data.
        priors: By parameter.
        simulate: Data of parameters.
        ways: Those of ``infer.posterior`` that serve it.
    """

    model: Callable[[Tensor], None]
    priors: dict[str, Any]
    simulate: Callable[[Values], Tensor]
    ways: tuple[str, ...]


def of(priors: dict[str, Any], law: Callable[..., Any], *, is_one: bool = False) -> Any:
    """Returns the model of rows of a law, or of one observation."""

    def model(x: Tensor) -> None:
        values = {name: pyro.sample(name, prior) for name, prior in priors.items()}
        if is_one:
            pyro.sample("x", law(**values), obs=x)
            return
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law(**values), obs=x)

    return model


def gaussian() -> Problem:
    """Mean and precision of rows."""
    priors = {"mean": dist.Normal(0.0, 1.0), "precision": dist.Gamma(4.0, 4.0)}

    def law(mean: Tensor, precision: Tensor) -> EnergyDistribution:
        return EnergyDistribution(lambda x: 0.5 * precision * (x - mean) ** 2, event_shape=())

    def simulate(values: Values) -> Tensor:
        return dist.Normal(values["mean"], values["precision"].rsqrt()).sample((100,))

    return Problem(of(priors, law), priors, simulate, ("exact", "nce", "generalized"))


def four_spins() -> Problem:
    """A field and a coupling of all pairs."""
    priors = {"field": dist.Normal(0.0, 0.5), "coupling": dist.Normal(0.0, 0.5)}

    def law(field: Tensor, coupling: Tensor) -> EnergyDistribution:
        def energy(s: Tensor) -> Tensor:
            total = s.sum(-1)
            return -field * total - coupling * (total**2 - 4) / 2

        return EnergyDistribution(energy, support=spins, event_shape=(4,))

    states = 2.0 * torch.cartesian_prod(*[torch.arange(2)] * 4) - 1.0

    def simulate(values: Values) -> Tensor:
        chosen = dist.Categorical(logits=-law(**values).energy(states)).sample((50,))
        return states[chosen]

    return Problem(of(priors, law), priors, simulate, ("exact", "generalized"))


class WithoutLogZ(Ising):
    """A lattice that only draws."""

    is_tractable = False


def lattice(energy: type[Ising] = Ising, ways: tuple[str, ...] = ("exact",)) -> Problem:
    """One observation of a lattice."""
    priors = {"coupling": dist.LogNormal(-1.5, 0.5)}

    def law(coupling: Tensor) -> EnergyDistribution:
        return EnergyDistribution(energy(coupling, (8, 8)))

    def simulate(values: Values) -> Tensor:
        return law(**values).sample()

    return Problem(of(priors, law, is_one=True), priors, simulate, ways)


def graphical() -> Problem:
    """A chain of four coordinates: the precision has one off-diagonal number."""
    priors = {"scale": dist.Gamma(4.0, 4.0), "partial": dist.Uniform(-0.5, 0.5)}
    beside = torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)

    def matrix(scale: Tensor, partial: Tensor) -> Tensor:
        return scale * (torch.eye(4) + partial * beside)

    def law(**values: Tensor) -> EnergyDistribution:
        precision = matrix(**values)
        return EnergyDistribution(
            lambda x: 0.5 * ((x @ precision) * x).sum(-1),
            event_shape=(4,),
            support=constraints.real_vector,
        )

    def simulate(values: Values) -> Tensor:
        zero = torch.zeros(4)
        return dist.MultivariateNormal(zero, precision_matrix=matrix(**values)).sample((30,))

    return Problem(of(priors, law), priors, simulate, ("nce", "generalized"))


PROBLEMS = {
    "gaussian": gaussian,
    "four spins": four_spins,
    "lattice": lattice,
    "no log Z": partial(lattice, WithoutLogZ, ("anchored", "generalized")),
    "graphical": graphical,
}


def intervals(problem: Problem, way: str, repeats: int) -> dict[str, Tensor]:
    """Returns lower and upper ends and truths of every parameter, ``(3, repeats)``."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for seed in range(repeats):
        pyro.set_rng_seed(seed)  # the same data for every way
        truth = {name: prior.sample() for name, prior in problem.priors.items()}
        x = problem.simulate(truth)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            draws = posterior(problem.model, x, method=way, **RUN).get_samples()
        ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        for name, value in truth.items():
            found[name].append(torch.cat([draws[name].to(ends).quantile(ends), value[None]]))
    return {name: torch.stack(rows, 1) for name, rows in found.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--problem", default="", help="only problems with this in their name")
    parser.add_argument("--way", default="", help="only ways with this in their name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    print(f"{'problem':12s} {'way':12s} {'parameter':10s} {'share':>14s} {'width':>6s}")
    for name, make in PROBLEMS.items():
        if options.problem in name:
            report(name, make(), options.way, options.repeats)


def report(name: str, problem: Problem, part: str, repeats: int) -> None:
    """Prints the rows of a problem."""
    widths: dict[str, float] = {}
    for way in (way for way in problem.ways if part in way):
        started = time.perf_counter()
        for parameter, (low, high, truth) in intervals(problem, way, repeats).items():
            seen = coverage(low, high, truth, level=LEVEL)
            width = float((high - low).mean())
            first = widths.setdefault(parameter, width)
            print(
                f"{name:12s} {way:12s} {parameter:10s} {seen.share:6.3f} ± {seen.stderr:.3f}"
                f" {width / first:6.2f}",
                flush=True,
            )
        print(f"{'':12s} {(time.perf_counter() - started) / repeats:.1f} s a posterior", flush=True)


if __name__ == "__main__":
    main()
