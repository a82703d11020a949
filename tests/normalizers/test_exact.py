"""Sums over finite supports, against closed forms; their slopes; what is too much."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.energies import GaussianEnergy, Ising
from pyro_ebm.normalizers import exact
from pyro_ebm.ops.constraints import spins

F64 = torch.float64


class Lattice(Ising):
    is_tractable = False


def number(value, **options):
    return torch.tensor(value, dtype=F64, **options)


WEIGHTS = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
CASES = {
    "spins": (
        EnergyDistribution(lambda x: -0.7 * x.sum(-1), support=spins, event_shape=(5,)),
        5 * math.log(2 * math.cosh(0.7)),
    ),
    "booleans": (
        EnergyDistribution(lambda x: x.sum((-1, -2)), support=C.boolean, event_shape=(2, 3)),
        6 * math.log1p(math.exp(-1.0)),
    ),
    "integers from 2 to 4": (
        EnergyDistribution(lambda x: x, support=C.integer_interval(2, 4), event_shape=()),
        math.log(sum(math.exp(-k) for k in (2, 3, 4))),
    ),
    "on a base": (
        EnergyDistribution(lambda x: x.to(F64), base=dist.Categorical(WEIGHTS)),
        math.log(sum(float(w) * math.exp(-k) for k, w in enumerate(WEIGHTS))),
    ),
    "one-hot vectors": (
        EnergyDistribution(lambda x: x[..., 1].to(F64), base=dist.OneHotCategorical(WEIGHTS)),
        math.log(0.7 + 0.3 * math.exp(-1.0)),
    ),
    "known": (EnergyDistribution(GaussianEnergy(0.0, 1.0)), 0.5 * math.log(2 * math.pi)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_the_closed_form(name):
    law, log_z = CASES[name]
    estimate = exact(law)
    assert float(estimate.value) == pytest.approx(log_z, rel=1e-6)
    assert float(estimate.stderr) == 0.0
    assert estimate.is_trusted


@pytest.mark.parametrize("chunk", [2**16, 100])
def test_a_batch_and_its_slopes_in_chunks(chunk, monkeypatch):
    """On a 3 by 4 torus; slopes are means of the sum over bonds, curvatures variances."""
    monkeypatch.setattr(sys.modules["pyro_ebm.normalizers.exact"], "CHUNK", chunk)
    coupling = number([0.4, -0.2], requires_grad=True)
    value = exact(EnergyDistribution(Lattice(coupling, (3, 4)), batch_shape=(2,))).value
    known = Ising(coupling, (3, 4)).log_normalizer()
    torch.testing.assert_close(value, known)
    slopes, wanted = (
        torch.autograd.grad(z.sum(), coupling, create_graph=True)[0] for z in (value, known)
    )
    torch.testing.assert_close(slopes, wanted)
    curvatures, wanted = (torch.autograd.grad(s.sum(), coupling)[0] for s in (slopes, wanted))
    torch.testing.assert_close(curvatures, wanted)


def test_under_vmap():
    def log_z(k):
        return exact(EnergyDistribution(Lattice(k, (3, 3)))).value

    couplings = number([0.1, 0.2])
    slopes = torch.vmap(torch.func.grad(log_z))(couplings)
    wanted = torch.vmap(torch.func.grad(lambda k: Ising(k, (3, 3)).log_normalizer()))(couplings)
    torch.testing.assert_close(slopes, wanted)


def test_it_makes_a_model_that_nuts_may_sample():
    """Inference in a parameter through the sum raises nothing, and is right."""

    def model(x):
        coupling = pyro.sample("coupling", dist.Uniform(number(0.0), number(1.0)))
        law = EnergyDistribution(Lattice(coupling, (3, 3)))
        pyro.sample("x", law.with_log_normalizer(exact(law)), obs=x)

    x = torch.ones(3, 3, dtype=F64)
    trace = pyro.poutine.trace(pyro.poutine.condition(model, {"coupling": number(0.3)}))
    want = Ising(number(0.3), (3, 3))
    log_prob = trace.get_trace(x).nodes["x"]["fn"].log_prob(x)
    torch.testing.assert_close(log_prob, -want(x) - want.log_normalizer())
    pyro.infer.NUTS(model).setup(1, x)  # which checks gradients


def test_an_estimate_is_stale_when_its_parameters_move():
    coupling = torch.nn.Parameter(number(0.3))
    estimate = exact(EnergyDistribution(Lattice(coupling, (3, 3))))
    assert estimate.is_trusted
    with torch.no_grad():
        coupling.add_(1.0)
    assert estimate.doubts == ("parameters have changed since",)


BAD = {
    "real": (
        lambda: exact(EnergyDistribution(lambda x: x**2, event_shape=())),
        NotImplementedError,
        r"lives on Real\(\): use quadrature",
    ),
    "counts": (
        lambda: exact(EnergyDistribution(lambda x: x, base=dist.Poisson(1.0))),
        NotImplementedError,
        "exact sums over finite supports",
    ),
    "many": (
        lambda: exact(EnergyDistribution(lambda x: x.sum(-1), support=spins, event_shape=(40,))),
        ValueError,
        r"2\^40 states, more than max_states = 16777216",
    ),
    "normal": (lambda: exact(dist.Normal(0.0, 1.0)), TypeError, "EnergyDistribution, got Normal"),
    "latent": (
        lambda: exact(
            GeneralizedEBM(lambda z: z, dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda x: x)
        ),
        NotImplementedError,
        "exact sums over finite supports",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        make()
