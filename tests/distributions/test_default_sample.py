"""What ``sample()`` promises: it works where Pyro calls it, touches nothing, says what it is."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
)
from torch import nn

from pyro_ebm import (
    ApproximateSampleWarning,
    EnergyDistribution,
    GeneralizedEBM,
    NonFiniteEnergyError,
)
from pyro_ebm.distributions import default_sample
from pyro_ebm.energies import (
    Banana,
    DoubleWell,
    Funnel,
    GaussianEnergy,
    GaussianMixtureEnergy,
    MLPEnergy,
    Quartic,
)


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(default_sample, "_sequential_calls", {})


def quartic(x):
    """Not an exact energy: the same numbers as one, without the knowledge."""
    return x**4


def far_modes(x):
    """Two modes sixty standard deviations apart, which short chains cannot join."""
    return torch.minimum((x - 30.0) ** 2, (x + 30.0) ** 2)


# --- where it is called --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (5, 2)])
def test_modes_and_shapes(mode, shape):
    weight = nn.Parameter(torch.tensor(0.5))
    prior = dist.Normal(torch.zeros(2), 1.0)
    laws = [
        EnergyDistribution(lambda x: weight * x**2, event_shape=(), batch_shape=(4,)),
        EnergyDistribution(lambda x: weight * x**2, base=dist.Gamma(2.0, torch.ones(4))),
        EnergyDistribution(GaussianEnergy(0.0, weight), batch_shape=(4,)),
        GeneralizedEBM(lambda z: weight * z, prior.to_event(1), lambda x: weight * x.sum(-1)),
    ]
    with mode():
        for d in laws:
            x = d.sample(shape)
            assert x.shape == torch.Size(shape) + d.batch_shape + d.event_shape
            assert not x.requires_grad
            assert x.numel() == 0 or d.support.check(x).all()
    assert weight.grad is None
    assert weight.requires_grad


def test_parameters_flags_and_modes_are_left_alone():
    net = MLPEnergy(2, hidden=(8,), spectral_norm=True, confinement=1.0).train()
    net.net[0].bias.requires_grad_(requires_grad=False)
    flags = [p.requires_grad for p in net.parameters()]
    values = [p.detach().clone() for p in net.parameters()]
    EnergyDistribution(net, event_shape=(2,)).sample((5,))
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), values, strict=True))
    assert net.training
    assert torch.is_grad_enabled()


def test_a_latent_drawn_under_inference_mode_may_parametrize_the_energy():
    with torch.inference_mode():
        loc = torch.randn(3)
    draws = EnergyDistribution(lambda x: (x - loc) ** 2, event_shape=(), batch_shape=(3,)).sample()
    assert draws.shape == (3,)


def test_nothing_leaks_into_the_enclosing_trace():
    net = nn.Linear(2, 1)

    def registers(x):
        return pyro.module("net", net)(x).squeeze(-1) + x.square().sum(-1)

    def generator(z):
        return z * pyro.param("scale", torch.tensor(2.0))

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("x", EnergyDistribution(registers, event_shape=(2,)))
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("y", GeneralizedEBM(generator, prior, registers))

    with poutine.trace(param_only=True) as params:
        trace = poutine.trace(model).get_trace()
    assert [name for name in trace.nodes if name[0] != "_"] == ["rows", "x", "y"]
    assert not [n for n, site in params.trace.nodes.items() if site["type"] == "param"]


@pytest.mark.parametrize("seed", [0, 1])
def test_reproducible_under_pyros_seed(seed):
    laws = [
        EnergyDistribution(quartic, event_shape=(), batch_shape=(2,)),
        EnergyDistribution(DoubleWell(4.0)),
        GeneralizedEBM(torch.tanh, dist.Normal(0.0, 1.0), quartic),
    ]
    for d in laws:
        pyro.set_rng_seed(seed)
        first = d.sample((3,))
        pyro.set_rng_seed(seed)
        assert torch.equal(first, d.sample((3,)))
        assert not torch.equal(first, d.sample((3,)))


def test_construction_leaves_the_random_state_alone():
    pyro.set_rng_seed(0)
    untouched = torch.rand(3)
    pyro.set_rng_seed(0)
    GeneralizedEBM(torch.tanh, dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda x: x.sum(-1))
    assert torch.equal(untouched, torch.rand(3))


# --- independence --------------------------------------------------------------------------------


def is_uncorrelated(draws):
    """Columns of (S, K) draws: |z| < 5 for every pair of columns."""
    correlation = torch.corrcoef(draws.T)
    off = correlation - torch.diag(correlation.diag())
    return (off.abs() < 5 / len(draws) ** 0.5).all() and draws.unique().numel() == draws.numel()


@pytest.mark.parametrize(
    "d",
    [
        EnergyDistribution(GaussianEnergy()),
        EnergyDistribution(DoubleWell(4.0)),
        EnergyDistribution(quartic, event_shape=()),
        EnergyDistribution(lambda x: x**2, dist.Normal(0.0, 1.0)),
        GeneralizedEBM(lambda z: z, dist.Normal(0.0, 1.0), quartic),
    ],
    ids=["gaussian", "double well", "short chain", "base", "generator"],
)
def test_expanded_batch_dims_are_independent(d):
    assert is_uncorrelated(d.expand([2, 3]).sample((400,)).reshape(400, 6))
    assert is_uncorrelated(d.expand([6]).expand([1, 6]).sample((400,)).reshape(400, 6))


def test_exact_draws_keep_their_own_batch_apart():
    """Batched parameters (P, 1) and dims that plates added: each draw has its own location."""
    locs = torch.tensor([-1000.0, 0.0, 1000.0]).reshape(3, 1)
    d = EnergyDistribution(GaussianEnergy(locs)).expand([5, 3, 4])
    draws = d.sample((50,))
    assert draws.shape == (50, 5, 3, 4)
    assert ((draws - locs).abs() < 10).all()
    assert (draws - locs).unique().numel() > 0.99 * draws.numel()
    middle = EnergyDistribution(GaussianEnergy(locs.reshape(1, 3, 1))).expand([2, 3, 4])
    assert ((middle.sample((6,)) - locs).abs() < 10).all()


EXACT = {
    "gaussian": GaussianEnergy(torch.tensor([1.0, -2.0]), 0.5, event_dim=1),
    "mixture": GaussianMixtureEnergy.ring_of_gaussians(3),
    "double well": DoubleWell(4.0, event_shape=(2,)),
    "quartic": Quartic(1.0, -1.0, event_shape=(2,)),
    "banana": Banana(),
    "funnel": Funnel(2),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_where_the_energy_can(name):
    """E[U] over exact draws agrees with E[U] weighted from a wide normal (|z| < 5)."""
    d = EnergyDistribution(EXACT[name].double())
    assert d.has_exact_sample
    x = d.sample((4000,))
    scale = 3 * x.std(0)
    wide = dist.StudentT(5.0, x.mean(0), scale).to_event(1)
    y = wide.sample((40_000,))
    weight = (d.log_prob(y) - wide.log_prob(y)).exp()
    f = x[:, 0].tanh() + x[:, 1].cos()
    g = weight * (y[:, 0].tanh() + y[:, 1].cos())
    z = (f.mean() - g.mean()) / (f.var() / len(f) + g.var() / len(g)).sqrt()
    assert abs(z) < 5
    assert abs((weight.mean() - 1) / weight.std() * len(y) ** 0.5) < 5


def test_a_given_sampler_comes_first():
    calls = []

    def sampler(target, shape):
        calls.append((type(target), shape))
        assert not torch.is_grad_enabled()
        return torch.full(shape + target.batch_shape + target.event_shape, 7.0)

    d = EnergyDistribution(GaussianEnergy(), sampler=sampler).expand([2])
    assert not d.has_exact_sample
    assert d.sample((3,)).eq(7.0).all()
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    gebm = GeneralizedEBM(torch.tanh, prior, lambda x: x.sum(-1), sampler=sampler)
    assert gebm.sample((3,)).eq(7.0).all()
    assert calls == [(EnergyDistribution, (3,)), (GeneralizedEBM, (3,))]


def test_a_sampler_is_exact_where_it_says_so():
    """And only of the distribution that it was given to."""

    def draw(target, shape):
        return torch.zeros(shape + target.batch_shape + target.event_shape)

    plain = EnergyDistribution(GaussianEnergy(), sampler=draw)
    assert not plain.has_exact_sample
    assert plain.energy_draws_exactly
    draw.draws_are_exact = True
    exact = EnergyDistribution(GaussianEnergy(), sampler=draw)
    assert exact.has_exact_sample
    assert exact.expand([3]).has_exact_sample
    assert not exact.tilt(lambda x: x.sum(-1)).has_exact_sample
    assert not exact.temper(0.5).has_exact_sample
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    gebm = GeneralizedEBM(torch.tanh, prior, lambda x: x.sum(-1), sampler=draw)
    assert gebm.has_exact_sample
    assert gebm.temper(1).has_exact_sample
    assert not gebm.temper(0.5).has_exact_sample


# --- what it says --------------------------------------------------------------------------------


def test_far_modes_warn():
    d = EnergyDistribution(far_modes, event_shape=())
    with pytest.warns(ApproximateSampleWarning, match=r"has not converged \(rank R-hat"):
        d.sample((10,))


def test_a_base_that_sees_one_mode_only_cannot_warn():
    """No diagnosis of chains that all start in one mode: the documented limit."""
    d = EnergyDistribution(far_modes, base=dist.Normal(30.0, 1.0))
    assert d.sample((10,)).min() > 0


def run_nuts(model):
    MCMC(NUTS(model), num_samples=3, warmup_steps=3, disable_progbar=True).run()


def run_guide(guide, **options):
    def run(model):
        guide_ = guide(model, **options)
        SVI(model, guide_, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()

    return run


SET_UPS = {
    "NUTS": run_nuts,
    "AutoNormal": run_guide(AutoNormal),
    "AutoDelta": run_guide(AutoDelta),
    "AutoMultivariateNormal": run_guide(AutoMultivariateNormal),
    **{
        init.__name__: run_guide(AutoNormal, init_loc_fn=init)
        for init in (
            init_to_feasible,
            init_to_mean,
            init_to_median,
            init_to_sample,
            init_to_uniform,
        )
    },
}


@pytest.mark.parametrize("use", SET_UPS)
def test_silent_where_pyro_only_wants_a_prototype(use):
    """Warnings are errors here: a prototype's convergence is nobody's concern."""

    def model():
        with pyro.plate("rows", 2):
            pyro.sample("x", EnergyDistribution(far_modes, event_shape=()))

    SET_UPS[use](model)


def approximate_model():
    with pyro.plate("rows", 2):
        pyro.sample("x", EnergyDistribution(quartic, event_shape=()))


def test_sequential_predictive_warns_once_and_names_the_way_out():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        draws = Predictive(approximate_model, num_samples=10)()
        Predictive(approximate_model, num_samples=3)()
    found = [str(w.message) for w in seen if w.category is ApproximateSampleWarning]
    assert len(found) == 1
    assert "parallel=True" in found[0]
    assert draws["x"].shape == (10, 2)


def test_parallel_predictive_is_silent():
    draws = Predictive(approximate_model, num_samples=50, parallel=True)()
    assert draws["x"].shape == (50, 2)
    assert draws["x"].unique().numel() == 100


def test_exact_energies_may_be_predicted_one_by_one():
    def model():
        pyro.sample("x", EnergyDistribution(GaussianEnergy()))

    assert Predictive(model, num_samples=30)()["x"].shape == (30,)


def test_a_constant_energy_has_no_law_of_its_own():
    """Without a base it is improper; with one it is the base."""

    def constant(x):
        return torch.zeros(x.shape[:-1])

    with pytest.raises(ValueError, match="does not depend on x"):
        EnergyDistribution(constant, event_shape=(2,)).sample()
    base = dist.Normal(torch.tensor([5.0, -5.0]), 1.0).to_event(1)
    draws = EnergyDistribution(constant, base).sample((200,))
    assert ((draws.mean(0) - torch.tensor([5.0, -5.0])).abs() < 0.5).all()


def test_an_energy_that_is_flat_in_fact_is_noticed_as_not_converged():
    d = EnergyDistribution(lambda x: 0 * x, event_shape=())
    with pytest.warns(ApproximateSampleWarning, match="has not converged"):
        d.sample((16,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_energies_that_are_nowhere_finite_raise(value):
    d = EnergyDistribution(lambda x: 0 * x + value, dist.Normal(0.0, 1.0))
    with pytest.raises(NonFiniteEnergyError, match="not finite at any of the 16 starting points"):
        d.sample()


def test_regions_of_infinite_energy_are_avoided():
    d = EnergyDistribution(
        lambda x: torch.where(x > 0, x**2, torch.inf), base=dist.Normal(0.0, 1.0)
    )
    assert d.sample((50,)).min() > 0
