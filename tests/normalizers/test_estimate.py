"""Which way is taken, and what is said of the agreement of two."""

import math
import re
import sys

import pyro.distributions as dist
import pytest
import torch
from laws_with_log_z import draws_of_tilted, tilted

from pyro_ebm import EnergyDistribution, LogNormalizer
from pyro_ebm.energies import Ising
from pyro_ebm.normalizers import estimate_log_normalizer
from pyro_ebm.normalizers.estimate import METHODS, agreed
from pyro_ebm.normalizers.quadrature import UnresolvedError
from pyro_ebm.ops.constraints import spins

F64 = torch.float64
WIDE = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), event_shape=(6,))


@pytest.mark.parametrize(
    ("law", "method"),
    [
        (EnergyDistribution(Ising(0.3, (32, 32))), "closed form"),
        (EnergyDistribution(lambda x: x.sum(-1), support=spins, event_shape=(4,)), "sum over 16"),
        (EnergyDistribution(lambda x: x**4, event_shape=()), "quadrature"),
        (WIDE, "^bridge, one route only: give draws= from data, or a base, for another$"),
        (tilted()[0], "in agreement with .* from the same start"),
    ],
)
def test_the_best_way_is_taken(law, method):
    estimate = estimate_log_normalizer(law)
    assert estimate.is_trusted
    assert re.search(method, estimate.method)


def test_draws_from_elsewhere_are_another_start():
    law, log_z = tilted()
    estimate = estimate_log_normalizer(law, draws=draws_of_tilted((10, 200)))
    assert "in agreement" in estimate.method
    assert "same start" not in estimate.method
    assert abs(float(estimate.value) - log_z) < 5 * float(estimate.stderr)


def test_draws_are_no_second_route():
    found = estimate_log_normalizer(WIDE, draws=torch.randn(20, 100, 6))
    assert found.method == "bridge, one route only: give a base for another"


@pytest.mark.parametrize("method", [*METHODS, "bridge"])
def test_a_way_can_be_named(method):
    law, log_z = tilted(dim=2, factor=0.5)
    refused = {"exact": "use quadrature", "from_uniform": "with a base use ais"}
    if method in refused:
        with pytest.raises((NotImplementedError, TypeError), match=refused[method]):
            estimate_log_normalizer(law, method)
        return
    estimate = estimate_log_normalizer(law, method)
    assert abs(float(estimate.value) - log_z) < 5 * float(estimate.stderr) + 1e-8


def kinked(batch_shape=()):
    """A tilt of two standard normals whose slope jumps, and its log Z."""
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1).expand(batch_shape)
    tail = float(torch.special.log_ndtr(torch.tensor(-3.0, dtype=F64)))
    return EnergyDistribution(lambda x: 3.0 * x.abs().sum(-1), base), 2 * (math.log(2) + 4.5 + tail)


def test_draws_stand_in_for_a_grid_that_is_too_coarse(monkeypatch):
    monkeypatch.setattr(sys.modules["pyro_ebm.normalizers.quadrature"], "MAX_NODES", 2**14)
    law, log_z = kinked()
    found = estimate_log_normalizer(law)
    assert re.search("ais.*bridge|bridge.*ais", found.method)
    assert found.method.endswith(", for a grid does not resolve the density")
    assert found.is_trusted
    assert abs(float(found.value) - log_z) < 5 * float(found.stderr) < 0.05
    with pytest.raises(UnresolvedError, match="still moves with 16384 nodes: the density is too"):
        estimate_log_normalizer(law, "quadrature")
    with pytest.raises(UnresolvedError):  # chains are of one law
        estimate_log_normalizer(kinked((2,))[0])


def test_disagreement_is_a_doubt():
    one = LogNormalizer(torch.tensor(1.0), torch.tensor(0.1), "one", start="base")
    other = LogNormalizer(torch.tensor(3.0), torch.tensor(0.2), "other", start="draws")
    best = agreed(other, one)
    assert best.method == "one"
    assert best.doubts == ("other gives 3.000 (9 errors away)",)
    near = agreed(LogNormalizer(torch.tensor(1.2), torch.tensor(0.2), "other", start="base"), one)
    assert near.method == "one, in agreement with other from the same start"
    assert near.is_trusted


def test_an_untrusted_estimate_is_not_the_best():
    few = LogNormalizer(torch.tensor(1.0), torch.tensor(0.01), "few", ess=5.0)
    many = LogNormalizer(torch.tensor(1.0), torch.tensor(0.1), "many", ess=500.0)
    assert agreed(few, many).method.startswith("many")


BINARY = {
    "lattice": EnergyDistribution(Ising(0.2, (32, 32), field=0.1)),
    "on a base": EnergyDistribution(
        lambda x: -x.sum(-1), dist.Bernoulli(torch.full((30,), 0.5)).to_event(1)
    ),
}


@pytest.mark.parametrize("law", BINARY)
@pytest.mark.parametrize("method", ["quadrature", "ais"])
def test_what_moves_on_the_reals_names_what_serves_discrete_laws(law, method):
    sentence = r"is for continuous supports, .*exact.*smc.*bridge.*from_uniform.*Exchange"
    with pytest.raises(NotImplementedError, match=sentence):
        estimate_log_normalizer(BINARY[law], method)


def test_bad_input():
    with pytest.raises(ValueError, match="method must be 'auto', 'bridge' or one of"):
        estimate_log_normalizer(WIDE, "magic")
    counts = EnergyDistribution(
        lambda x: x.sum(-1), support=dist.constraints.nonnegative_integer, event_shape=(3,)
    )
    with pytest.raises(NotImplementedError, match="infinitely many states and no base"):
        estimate_log_normalizer(counts)


def narrow_mode(x):
    """At 700 with a width of .002, where no search comes near: log Z = 2.86."""
    return -torch.logaddexp(-0.5 * x**2, -0.5 * ((x - 700.0) / 0.002) ** 2 + 8.0)


def test_draws_are_looked_at_in_few_dims():
    """Draws say where a mode is, and bridge sampling from them says the same of log Z."""
    law = EnergyDistribution(lambda x: x**4 / 4 - x**2 / 2, event_shape=())
    weights = (-law.energy(torch.linspace(-4.0, 4.0, 4001, dtype=F64))).exp()
    at = torch.multinomial(weights, 4000, replacement=True).reshape(10, 400)
    draws = torch.linspace(-4.0, 4.0, 4001, dtype=F64)[at]
    found = estimate_log_normalizer(law, draws=draws)
    assert found.method == "quadrature, in agreement with bridge"
    assert found.is_trusted
    wrong = estimate_log_normalizer(law, draws=1.5 + draws)
    assert any("bridge gives" in doubt for doubt in wrong.doubts)


@pytest.mark.parametrize("method", ["auto", "quadrature"])
def test_a_single_draw_says_where_a_mode_is(method):
    torch.set_default_dtype(F64)
    law = EnergyDistribution(narrow_mode, event_shape=())
    draws = torch.tensor([[0.0, 700.001]], dtype=F64)
    found = estimate_log_normalizer(law, method, draws=draws)
    exact = 0.5 * math.log(2 * math.pi) + math.log(1.0 + 0.002 * math.exp(8.0))
    assert float(found.value) == pytest.approx(exact, abs=1e-6)
