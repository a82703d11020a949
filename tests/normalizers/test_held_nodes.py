"""Sums over nodes that are held: right where they hold, NaN with a warning where they do not."""

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc import MCMC as Chains
from pyro_ebm.mcmc import RandomWalk
from pyro_ebm.normalizers import find_box, gauss_hermite, quadrature

RULES = ("gauss_hermite", "quadrature")
WARNING = "is NaN there .* A posterior that reaches there is cut off"
OF_THE_PRIOR = f"ignore:.*{WARNING}"  # a model is first run at a draw of its prior
BASE = 1.5  # the standard deviation of a base
NUM_ROWS = 100


@pytest.fixture(autouse=True)
def fresh(fresh_state, monkeypatch):
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    for rule in RULES:  # warned of once, twice, four times, ...
        nodes = sys.modules[f"pyro_ebm.normalizers.{rule}"]._NODES
        monkeypatch.setattr(nodes.beyond, "num_times", 0)


def made(t):
    """N(0, 1) in units of the base, tilted to the precision 1 + 2.25 t in them."""
    return EnergyDistribution(lambda x: 0.5 * t * x**2, dist.Normal(torch.zeros(()), BASE))


def by_few_nodes(law):
    return gauss_hermite(law, num_nodes=32)


def by_many_nodes(law):
    return gauss_hermite(law, num_nodes=120)


def box_at(t, num_halvings):
    box = find_box(made(t))
    for _ in range(num_halvings):
        box = box.refined()
    return lambda law: quadrature(law, box=box)


# what holds around t = 4, and what holds below it only or nowhere near
HOLD = {"gauss_hermite": lambda: by_many_nodes, "quadrature": lambda: box_at(2.0, 1)}
FAIL = {"gauss_hermite": lambda: by_few_nodes, "quadrature": lambda: box_at(0.1, 0)}


def data():
    return torch.randn(NUM_ROWS) / math.sqrt(4.0 + BASE**-2)


def model(x, log_z):
    t = pyro.sample("t", dist.Gamma(torch.tensor(2.0), 0.1))
    law = made(t)
    with pyro.plate("n", len(x)):
        pyro.sample("x", law.with_log_normalizer(log_z(law)), obs=x)


def posterior(x):
    """Mean and standard deviation of t by the trapezoidal rule."""
    t = torch.linspace(1e-3, 30.0, 30_001)
    log_p = t.log() - 0.1 * t + 0.5 * len(x) * (t + BASE**-2).log() - 0.5 * t * x.square().sum()
    p = log_p.softmax(0)
    mean = (p * t).sum()
    return float(mean), float((p * (t - mean).square()).sum().sqrt())


def drawn(x, log_z, start, num_samples):
    kernel = NUTS(lambda x: model(x, log_z))
    at = {"t": torch.tensor(start).log()}
    mcmc = MCMC(kernel, num_samples, num_samples // 2, initial_params=at, disable_progbar=True)
    mcmc.run(x)
    return mcmc.get_samples()["t"]


@pytest.mark.filterwarnings(OF_THE_PRIOR)
@pytest.mark.parametrize("rule", RULES)
def test_a_posterior_by_plain_nuts_is_right_where_the_nodes_hold(rule):
    """Of 80 draws at least 25 count: five errors are a standard deviation."""
    x = data()
    t = drawn(x, HOLD[rule](), 4.0, 80)
    mean, sd = posterior(x)
    assert abs(float(t.mean()) - mean) < sd
    assert 0.4 < float(t.std()) / sd < 2.0


@pytest.mark.parametrize("rule", RULES)
def test_where_they_do_not_it_is_cut_off_with_a_warning(rule):
    """The posterior lies at 4. Without NaN draws went to 865, or fell short in silence."""
    log_z = FAIL[rule]()
    with pytest.warns(UserWarning, match=WARNING):
        t = drawn(data(), log_z, 0.3, 30)
    exact = -0.5 * torch.log1p(BASE**2 * t)
    off = torch.stack([log_z(made(each)).value for each in t]) - exact
    assert float(off.abs().max()) < 1e-3


@pytest.mark.filterwarnings(OF_THE_PRIOR)
@pytest.mark.filterwarnings("ignore:whether every log Z covers")  # at that draw it is NaN
@pytest.mark.parametrize("rule", RULES)
def test_chains_side_by_side_are_cut_off_too(rule):
    """Through vmap and a graph, where nobody can warn, and nothing is evaluated anew."""
    log_z = FAIL[rule]()
    kernel = RandomWalk(lambda x: model(x, log_z), step_size=1.0, adapt_step_size=False)
    chains = Chains(kernel, 20, 20, num_chains=4, disable_progbar=True)
    at = {"t": torch.full((4,), 0.3).log()}
    with pytest.warns(ApproximateSampleWarning, match="the density is NaN at .* may be cut off"):
        chains.run(data(), initial_params=at)
    t = chains.get_samples()["t"].flatten()
    exact = -0.5 * torch.log1p(BASE**2 * t)
    off = torch.stack([log_z(made(each)).value for each in t]) - exact
    assert float(off.abs().max()) < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_value_slope_and_curvature_under_vmap(rule):
    """Exact where the nodes hold, all NaN where not: a slope alone would be followed."""
    log_z, t = FAIL[rule](), torch.tensor([0.15, 40.0])

    def value(t):
        return log_z(made(t)).value

    slope = torch.func.grad(value)
    for function, exact in (
        (value, -0.5 * torch.log1p(BASE**2 * t)),
        (slope, -0.5 / (BASE**-2 + t)),
        (torch.func.grad(slope), 0.5 / (BASE**-2 + t) ** 2),
    ):
        seen = torch.vmap(function)(t)
        assert float(seen[0]) == pytest.approx(float(exact[0]), abs=1e-3)
        assert seen[1].isnan()


@pytest.mark.parametrize("rule", RULES)
def test_a_law_that_asks_gets_nan_and_others_a_remark(rule):
    log_z = FAIL[rule]()
    law = made(torch.tensor(40.0))
    found = log_z(law)
    assert found.value.isfinite()
    assert "its nodes err by" in found.doubts[0]
    with pytest.warns(UserWarning, match=WARNING):
        assert law.with_log_normalizer(lambda: log_z(law)).log_prob(torch.zeros(())).isnan()
    near = made(torch.tensor(0.15))
    seen = near.with_log_normalizer(lambda: log_z(near)).log_normalizer_value()
    torch.testing.assert_close(seen, log_z(near).value, rtol=0, atol=0)


def test_no_mass_at_the_nodes_is_said():
    law = EnergyDistribution(
        lambda x: torch.where(x > 30.0, 0.0, math.inf), dist.Normal(torch.zeros(()), 1.0)
    )
    assert "there is no mass at its nodes: use more nodes" in str(gauss_hermite(law))
