"""What the coverage of stated intervals is measured on: laws with a known log Z, and estimators.

The last three problems were not used when the estimators were made.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from laws_with_log_z import three_modes, tilted

from pyro_ebm import EnergyDistribution, LogNormalizer
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc.targets.distribution_target import DistributionTarget
from pyro_ebm.normalizers import (
    ais,
    anchored,
    bridge,
    evidence,
    from_uniform,
    importance,
    nce,
    quadrature,
    smc,
)
from pyro_ebm.normalizers.tempered import tempered
from pyro_ebm.normalizers.thermodynamic import stepping_stones, thermodynamic

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """A law with its log Z, and what gives exact draws of it, where something does."""

    law: Any
    log_z: float
    draw: Any = None


def _gaussian():
    law, log_z = tilted(dim=4)
    return Problem(law, log_z, lambda num: torch.randn(*num, 4, dtype=F64) / 10.0**0.5)


def _modes():
    centres = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]], dtype=F64)

    def draw(num):
        which = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), num[0] * num[1], replacement=True)
        return (centres[which] + torch.randn(len(which), 2, dtype=F64)).reshape(*num, 2)

    return Problem(three_modes(), 0.0, draw)


def _student():
    """A Gaussian tilt of a Student t in three dimensions: the base has the heavier tails."""
    base = dist.StudentT(torch.tensor(5.0, dtype=F64), torch.zeros(3, dtype=F64), 1.0).to_event(1)
    law = EnergyDistribution(lambda x: 2.0 * (x - 0.5).square().sum(-1), base)
    return Problem(law, float(quadrature(law).value), _by_rejection(law))


def _banana():
    """A ridge that is bent twice, on a normal base in three dimensions."""

    def energy(x):
        a, b, c = x.unbind(-1)
        return 2.0 * (b - 0.5 * a.square()).square() + 0.5 * (c - b).square()

    law = EnergyDistribution(energy, dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
    return Problem(law, float(quadrature(law).value), _by_rejection(law))


def _by_rejection(law):
    """Exact draws where the energy is not negative: of the base, kept with probability exp(-E)."""

    def draw(num):
        wanted, kept, have = num[0] * num[1], [], 0
        while have < wanted:
            x = law.base.sample((4 * wanted,))
            kept.append(x[torch.rand(len(x), dtype=F64).log() < -law.energy(x)])
            have += len(kept[-1])
        return torch.cat(kept)[:wanted].reshape(*num, -1)

    return draw


def _lattice():
    """Spins with a field, between two couplings."""
    return Problem(Ising(0.0, (5, 5), field=0.0, periodic=False), _lattice_change())


START, END = torch.tensor([0.2, 0.1], dtype=F64), torch.tensor([0.25, 0.14], dtype=F64)


def _lattice_change():
    both = torch.stack([START, END])
    z = Ising(both[:, 0], (5, 5), field=both[:, 1], periodic=False).log_normalizer()
    return float(z[1] - z[0])


def _spins_alone():
    """The second of these couplings, without the first."""
    family = Ising(END[0], (5, 5), field=END[1], periodic=False)
    law = EnergyDistribution(family)
    return Problem(law, float(family.log_normalizer()), lambda num: law.sample(torch.Size(num)))


def _model():
    """Normal rows whose precision has a Gamma prior; what is drawn is the posterior."""
    x = torch.linspace(-1.0, 1.5, 20, dtype=F64)
    shape, rate = torch.tensor(12.0, dtype=F64), 1.0 + x.square().sum() / 2

    def model():
        theta = pyro.sample("theta", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(0.0, theta.rsqrt()), obs=x)

    log_z = shape.lgamma() - shape * rate.log() - 10.0 * math.log(2 * math.pi)
    return Problem(model, float(log_z), lambda num: dist.Gamma(shape, rate).sample(num))


PROBLEMS = {
    "gaussian": _gaussian,
    "three modes": _modes,
    "student tilt": _student,
    "banana": _banana,
    "spins": _lattice,
    "spins alone": _spins_alone,
    "model": _model,
}
# problems that are no density on the reals have estimators of their own
OWN = {
    "spins": ("anchored",),
    "spins alone": ("from uniform", "bridge"),
    "model": ("evidence", "evidence, stones", "evidence, path"),
}


def _anchored(family, size):
    log_z = anchored(family, START[None], num_draws=size)
    values = torch.stack([f(END) - f(START) for f in log_z.bootstrap(40)])
    ess = float(log_z.effective_size(END))
    return LogNormalizer(log_z(END) - log_z(START), values.std(), "anchored", ess=ess)


def _run(law, size):
    """Replicas that change places forget where they started later than chains that are held."""
    warmup_steps = 120 if DistributionTarget(law).prior is None else 480
    return tempered(law, num_rungs=10, num_chains=40, num_samples=size, warmup_steps=warmup_steps)


# estimator: a function of problem and size, and the sizes
ESTIMATORS = {
    "importance": (lambda p, size: importance(p.law, num_samples=size), (2000, 20_000)),
    "ais": (lambda p, size: ais(p.law, num_chains=size, num_rungs=60), (200, 800)),
    "smc": (lambda p, size: smc(p.law, num_particles=size, num_runs=20), (100, 300)),
    "bridge": (lambda p, size: bridge(p.law, p.draw((20, size))), (20, 100)),
    "thermodynamic": (lambda p, size: thermodynamic(p.law, _run(p.law, size)), (60, 200)),
    "stepping stones": (lambda p, size: stepping_stones(p.law, _run(p.law, size)), (60, 200)),
    "anchored": (lambda p, size: _anchored(p.law, size), (300, 2000)),
    "nce": (lambda p, size: nce(p.law, p.draw((1, size))[0]), (300, 2000)),
    "evidence": (
        lambda p, size: evidence(p.law, posterior={"theta": p.draw((20, size))}),
        (20, 100),
    ),
    # the size of these is not to be chosen
    "evidence, stones": (lambda p, _: evidence(p.law, method="stepping_stones"), (3840,)),
    "evidence, path": (lambda p, _: evidence(p.law, method="thermodynamic"), (3840,)),
    "from uniform": (lambda p, size: from_uniform(p.law, num_chains=size), (200, 800)),
}


def pairs():
    """All pairs of a problem and an estimator that fits it."""
    special = {e for own in OWN.values() for e in own} - {"bridge"}
    general = [e for e in ESTIMATORS if e not in special]
    return [(problem, e) for problem in PROBLEMS for e in OWN.get(problem, general)]


@dataclass(frozen=True)
class Coverage:
    """Of the runs that state an interval: how many, their median ESS, the share that covers."""

    num_stated: int
    num_runs: int
    ess: float
    share: float

    @property
    def error(self):
        return (self.share * (1.0 - self.share) / max(self.num_stated, 1)) ** 0.5


def coverage(problem, estimator, size, num_runs):
    """Runs an estimator many times at one size."""
    made, (estimate, _) = PROBLEMS[problem](), ESTIMATORS[estimator]
    runs = [estimate(made, size) for _ in range(num_runs)]
    stated = [run for run in runs if run.is_trusted]
    inside = [_covers(run.interval(), made.log_z) for run in stated]
    ess = [run.ess for run in stated if run.ess is not None]
    return Coverage(
        len(stated),
        num_runs,
        statistics.median(ess) if ess else float("nan"),
        sum(inside) / len(inside) if inside else float("nan"),
    )


def _covers(interval, log_z):
    return bool(interval[0] <= log_z <= interval[1])
