"""Supports: their measures, their bijections under Pyro, and draws on each of them.

The strongest check of a bijection has no noise: the density that NUTS sees on the unconstrained
space must integrate to the known Z, and its mean must be the known mean. The statistical runs
repeat it through the sampler: |z| < 5 with an effective sample size of at least 400.
"""

from __future__ import annotations

import math

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints as C
from pyro.distributions.transforms import biject_to
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.util import initialize_model

from pyro_ebm import EnergyDistribution
from pyro_ebm.distributions.supports import same_support
from pyro_ebm.energies import GaussianEnergy
from pyro_ebm.mcmc import RecordingNUTS
from pyro_ebm.ops.constraints import sphere, spins

ALPHA = torch.tensor([1.5, 2.0, 3.5], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def gamma(x):
    return 3 * x - 1.5 * x.log()


def beta(x):
    return -(x.log() + 3 * (1 - x).log())


def dirichlet(x):
    return -((ALPHA - 1) * x.log()).sum(-1)


def half_square(x):
    return 0.5 * x**2


def normal_and_exponential(x):
    return 0.5 * x[..., 0] ** 2 + x[..., 1]


def normal_mass(low, high):
    normal = dist.Normal(0.0, 1.0)
    return normal.cdf(torch.tensor(high)) - normal.cdf(torch.tensor(low))


def truncated_mean(low, high):
    pdf = dist.Normal(0.0, 1.0).log_prob(torch.tensor([low, high])).exp()
    return (pdf[0] - pdf[1]) / normal_mass(low, high)


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# energy with respect to Lebesgue measure (of the first K - 1 coordinates of a simplex), support,
# event shape, log Z, mean
PROBLEMS = {
    "gamma": (gamma, C.positive, (), math.lgamma(2.5) - 2.5 * math.log(3.0), [2.5 / 3]),
    "beta": (
        beta,
        C.unit_interval,
        (),
        math.lgamma(2) + math.lgamma(4) - math.lgamma(6),
        [1 / 3],
    ),
    "dirichlet": (
        dirichlet,
        C.simplex,
        (3,),
        float(torch.lgamma(ALPHA).sum() - torch.lgamma(ALPHA.sum())),
        (ALPHA / ALPHA.sum()).tolist(),
    ),
    "truncated normal": (
        half_square,
        C.interval(-0.5, 2.0),
        (),
        math.log(normal_mass(-0.5, 2.0)) + HALF_LOG_2PI,
        [float(truncated_mean(-0.5, 2.0))],
    ),
    "below": (lambda x: -x, C.less_than(1.0), (), 1.0, [0.0]),
    "half line": (lambda x: x, C.greater_than(2.0), (), -2.0, [3.0]),
    "mixed continuous": (
        normal_and_exponential,
        C.cat([C.real, C.positive], -1, [1, 1]),
        (2,),
        HALF_LOG_2PI,
        [0.0, 1.0],
    ),
    "reals": (half_square, C.real, (), HALF_LOG_2PI, [0.0]),
}


def law(name):
    energy, support, event_shape, _, _ = PROBLEMS[name]
    return EnergyDistribution(energy, support=support, event_shape=event_shape)


def unconstrained_grid(dims):
    ticks = torch.linspace(-40.0, 40.0, 4001 if dims == 1 else 801)
    grid = ticks[:, None] if dims == 1 else torch.cartesian_prod(ticks, ticks)
    return grid, (ticks[1] - ticks[0]) ** dims


def moments_of(log_density, points, cell):
    """Log of the integral, and the mean."""
    weights = log_density.nan_to_num(nan=-torch.inf).softmax(0)
    return log_density.nan_to_num(nan=-torch.inf).logsumexp(0) + cell.log(), weights @ points


def exact_z(name, *, jacobian=True):
    """Deviation of log Z and of the mean of the density that Pyro's kernels see."""
    _, support, event_shape, log_z, mean = PROBLEMS[name]
    transform = biject_to(support)
    dims = max(1, transform.inverse_shape(torch.Size(event_shape)).numel())
    grid, cell = unconstrained_grid(dims)
    u = grid if event_shape else grid.squeeze(-1)
    x = transform(u)
    log_density = law(name).unnormalized_log_prob(x)
    if jacobian:
        log_det = transform.log_abs_det_jacobian(u, x)
        log_density = log_density + log_det.reshape(len(u), -1).sum(-1)
    found_z, found_mean = moments_of(log_density, x.reshape(len(u), -1), cell)
    return float((found_z - log_z).abs()), float((found_mean - torch.tensor(mean)).abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_unconstrained_density_integrates_to_z(name):
    error_z, error_mean = exact_z(name)
    assert error_z < 1e-5
    assert error_mean < 1e-5


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "reals"])
def test_a_missing_jacobian_is_noticed(name):
    assert max(exact_z(name, jacobian=False)) > 0.05


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernels_potential_is_this_density(name):
    """One gradient and one value of the potential that Pyro makes, against energy and Jacobian."""
    d = law(name)
    _, potential, transforms, _ = initialize_model(lambda: pyro.sample("x", d))
    transform = biject_to(d.support)
    u = torch.randn(transform.inverse_shape(d.event_shape), requires_grad=True)
    x = transform(u)
    truth = d.potential(x) - transform.log_abs_det_jacobian(u, x).sum()
    value = potential({"x": u})
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(
        torch.autograd.grad(value, u, retain_graph=True), torch.autograd.grad(truth, u)
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_short_chains_find_the_mean(name):
    """Draws of 1500 chains are independent, so the standard error is sd / sqrt(1500)."""
    draws = law(name).sample((1500,)).reshape(1500, -1)
    z = (draws.mean(0) - torch.tensor(PROBLEMS[name][4])) / draws.std(0) * 1500**0.5
    assert z.abs().max() < 5
    assert law(name).support.check(draws.reshape(1500, *law(name).event_shape)).all()


def nuts_z(d, mean, num_samples, kernel=RecordingNUTS):
    """The worst z of the mean over coordinates; refuses to judge under an ESS of 400."""
    mcmc = MCMC(
        kernel(lambda: pyro.sample("x", d)),
        num_samples=num_samples,
        warmup_steps=200,
        disable_progbar=True,
    )
    mcmc.run()
    draws = mcmc.get_samples()["x"].reshape(num_samples, -1).numpy()
    zs = []
    for column, truth in zip(draws.T, mean, strict=True):
        assert az.ess(column[None]).item() >= 400
        zs.append(abs(column.mean() - truth) / az.mcse(column[None]).item())
    return max(zs)


def test_nuts_on_the_simplex():
    name = "dirichlet"
    assert nuts_z(law(name), PROBLEMS[name][4], 1000) < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_nuts_finds_the_mean(name):
    assert nuts_z(law(name), PROBLEMS[name][4], 2500, NUTS) < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truncated normal", "half line"])
def test_nuts_without_the_support_is_noticed(name):
    """The planted bug: support=real. The half line's energy x has no law on the reals at all."""
    energy, _, event_shape, _, mean = PROBLEMS[name]
    d = EnergyDistribution(energy, event_shape=event_shape)
    if name == "half line":
        d = d.tilt(lambda x: 0.01 * x**2)
    assert nuts_z(d, mean, 2500) > 5


# --- measures ------------------------------------------------------------------------------------

MEASURES = {
    "lebesgue": [
        (C.real, (2,)),
        (C.positive, ()),
        (C.simplex, (3,)),
        (C.interval(0, 1), (2, 2)),
        (C.cat([C.real, C.positive], -1, [1, 1]), (2,)),
        (C.corr_cholesky, (3, 3)),
    ],
    "counting": [
        (C.boolean, (3,)),
        (C.integer_interval(0, 4), ()),
        (C.nonnegative_integer, (2,)),
        (spins, (4, 4)),
        (C.one_hot, (3,)),
        (C.cat([spins, C.boolean], -1, [1, 2]), (3,)),
    ],
    "mixed": [
        (C.cat([C.real, C.boolean], -1, [2, 1]), (3,)),
        (C.cat([C.simplex, C.integer_interval(0, 2)], -1, [3, 1]), (4,)),
    ],
    "surface": [(sphere, (3,)), (sphere, (2, 3))],
}
ALL = [(measure, *case) for measure, cases in MEASURES.items() for case in cases]


@pytest.mark.parametrize(("measure", "support", "event_shape"), ALL)
def test_the_measure_follows_from_the_support(measure, support, event_shape):
    d = EnergyDistribution(lambda x: 0 * x, support=support, event_shape=event_shape)
    assert d.base_measure == measure
    assert d.expand([5]).base_measure == measure
    assert d.tilt(torch.cos).base_measure == measure
    assert d.support.event_dim == len(event_shape)


def test_the_measure_follows_from_a_base():
    def measure(base):
        return EnergyDistribution(lambda x: x, base=base).base_measure

    assert measure(dist.Normal(0.0, 1.0)) == "lebesgue"
    assert measure(dist.Dirichlet(ALPHA)) == "lebesgue"
    assert measure(dist.Bernoulli(0.5)) == "counting"
    assert measure(dist.Categorical(ALPHA).expand([3]).to_event(1)) == "counting"
    parts = dist.Normal(torch.zeros(2), 1.0)
    assert measure(dist.MixtureSameFamily(dist.Categorical(ALPHA[:2]), parts)) == "lebesgue"
    flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.ExpTransform()])
    assert EnergyDistribution(lambda x: x, base=flow).support.check(torch.tensor(1.0))
    assert not EnergyDistribution(lambda x: x, base=flow).support.check(torch.tensor(-1.0))


# --- draws on supports that NUTS cannot move on --------------------------------------------------


def z_of(values, truth):
    return float((values.mean() - truth) / values.std() * len(values) ** 0.5)


def test_draws_of_two_spins():
    """E = -J s t has E[s t] = tanh J."""
    d = EnergyDistribution(lambda s: -0.7 * s[..., 0] * s[..., 1], support=spins, event_shape=(2,))
    s = d.sample((1500,))
    assert spins.check(s).all()
    assert abs(z_of(s[:, 0] * s[:, 1], math.tanh(0.7))) < 5
    assert abs(z_of(s[:, 0] * s[:, 1], math.tanh(1.4))) > 5  # the edge counted twice


def test_draws_of_booleans_categories_and_counts():
    boolean = EnergyDistribution(lambda x: 0.8 * x.sum(-1), support=C.boolean, event_shape=(2,))
    assert abs(z_of(boolean.sample((1500,))[:, 1], 1 / (1 + math.exp(0.8)))) < 5
    values = torch.tensor([0.0, 1.0, -0.5, 2.0])
    category = EnergyDistribution(
        lambda k: values[k.long()], support=C.integer_interval(0, 3), event_shape=()
    )
    seen = category.sample((1500,))
    weights = (-values).softmax(0)
    for k in range(4):
        assert abs(z_of((seen == k).double(), weights[k])) < 5
    tilted = EnergyDistribution(lambda x: -0.4 * x, base=dist.Poisson(torch.tensor(3.0)))
    assert abs(z_of(tilted.sample((1500,)), 3 * math.exp(0.4))) < 5


def test_draws_on_the_sphere():
    """exp(k x_3) on the unit sphere: mean height coth k - 1 / k."""
    d = EnergyDistribution(lambda x: -2.0 * x[..., 2], support=sphere, event_shape=(3,))
    x = d.sample((1500,))
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(1500))
    assert abs(z_of(x[:, 2], 1 / math.tanh(2.0) - 0.5)) < 5
    assert abs(z_of(x[:, 2], 1 / math.tanh(3.0) - 1 / 3)) > 5


def test_draws_of_a_mixed_table():
    """b ~ Bernoulli(.3), x | b ~ N(2 b, 1), as one energy on a real and a boolean column."""

    def energy(x):
        real, b = x.unbind(-1)
        return 0.5 * (real - 2 * b) ** 2 - b * math.log(0.3 / 0.7)

    d = EnergyDistribution(energy, support=C.cat([C.real, C.boolean], -1, [1, 1]), event_shape=(2,))
    x, b = d.sample((1500,)).unbind(-1)
    assert abs(z_of(b, 0.3)) < 5
    assert abs(z_of(x, 0.6)) < 5
    assert abs(z_of(x - 2 * b, 0.0)) < 5


# --- the same set, however it is written ---------------------------------------------------------

SAME = [
    (C.positive, C.nonnegative),
    (C.positive, dist.Gamma(1.0, 1.0).support),
    (C.positive, dist.LogNormal(0.0, 1.0).support),
    (C.positive, dist.HalfNormal(1.0).support),
    (C.unit_interval, dist.Uniform(0.0, 1.0).support),
    (C.unit_interval, C.interval(torch.zeros(3), torch.ones(3))),
    (C.unit_interval, dist.Beta(1.0, 1.0).support),
    (C.real, C.real_vector),
    (C.real, dist.Normal(torch.zeros(2), 1.0).to_event(1).support),
    (C.boolean, dist.Bernoulli(0.5).support),
    (C.boolean, C.integer_interval(0, 1)),
    (C.integer_interval(0, 2), dist.Categorical(torch.ones(3)).support),
    (C.simplex, dist.Dirichlet(torch.ones(3)).support),
    (C.cat([C.real, C.interval(0, 1)], -1, [1, 2]), C.cat([C.real, C.unit_interval], -1, [1, 2])),
    (spins, C.independent(spins, 2)),
]
DIFFERENT = [
    (C.real, C.positive),
    (C.positive, C.greater_than(1.0)),
    (C.positive, C.less_than(0.0)),
    (C.unit_interval, C.interval(0.0, 2.0)),
    (C.unit_interval, C.interval(torch.zeros(2), torch.tensor([1.0, 2.0]))),
    (C.boolean, spins),
    (C.boolean, C.unit_interval),
    (C.integer_interval(0, 2), C.integer_interval(0, 3)),
    (C.simplex, C.real_vector),
    (C.cat([C.real, C.boolean], -1, [1, 2]), C.cat([C.real, C.boolean], -1, [2, 1])),
    (C.cat([C.real, C.boolean], -1, [1, 2]), C.cat([C.real, spins], -1, [1, 2])),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same_sets(a, b):
    assert same_support(a, b)
    assert same_support(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_sets(a, b):
    assert not same_support(a, b)
    assert not same_support(b, a)


CIRCLES = {
    "alone": dist.VonMises(0.0, 1.0),
    "wrapped": dist.VonMises(torch.zeros(2), 1.0).to_event(1).mask(True),
    "scaled": dist.TransformedDistribution(
        dist.VonMises(0.0, 1.0), [dist.transforms.AffineTransform(0.0, 2.0)]
    ),
    "two": dist.SineBivariateVonMises(0.0, 0.0, 1.0, 1.0, 0.5),
    "mixed": dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.VonMises(torch.zeros(2), 1.0)
    ),
}


@pytest.mark.parametrize("name", CIRCLES)
def test_a_periodic_base_is_refused(name):
    """Its density goes on beyond the period that it draws from, and kernels would follow it."""
    with pytest.raises(ValueError, match="is periodic, .*make its density a part of the energy"):
        EnergyDistribution(lambda x: x.cos(), CIRCLES[name])


def test_a_stated_support_may_confirm_the_base():
    d = EnergyDistribution(lambda x: x, base=dist.HalfNormal(1.0), support=C.positive)
    assert d.shares_support_with(dist.Gamma(1.0, 1.0))
    assert not d.shares_support_with(dist.Normal(0.0, 1.0))
    assert EnergyDistribution(GaussianEnergy()).shares_support_with(dist.Normal(0.0, 1.0))
