"""Where an energy's values may have extra dims, and that every value is the one of a plain loop.

The truth is ``dist.Normal`` evaluated element by element: a Gaussian energy written as an exact
energy, as an energy with a function for log Z, and as an energy on a base must all agree with it.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints as C
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.mcmc.util import initialize_model
from torch.func import grad, grad_and_value, vmap

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import GaussianEnergy, MLPEnergy
from pyro_ebm.errors import EnergyShapeError

P = 4  # particles, or values of an enumerated parent
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def exact(loc, batch):
    return EnergyDistribution(GaussianEnergy(loc), batch_shape=batch)


def with_function(loc, batch):
    return EnergyDistribution(
        lambda x: 0.5 * (x - loc) ** 2,
        event_shape=(),
        batch_shape=batch,
        log_normalizer=lambda: torch.full_like(loc, HALF_LOG_2PI),
    )


def on_base(loc, batch):
    """exp(loc x) on a standard normal: log Z = loc^2 / 2."""
    base = dist.Normal(0.0, 1.0).expand(batch)
    return EnergyDistribution(lambda x: -loc * x, base, log_normalizer=lambda: 0.5 * loc**2)


KINDS = {"exact": exact, "function": with_function, "base": on_base}
CASES = [
    # parameter, batch of the site (without the dims on the left), x, log_prob
    ((), (), (), ()),
    ((), (3,), (3,), (3,)),
    ((), (3,), (), (3,)),
    ((3,), (3,), (3,), (3,)),
    ((3,), (3,), (5, 3), (5, 3)),
    ((3,), (7, 3), (7, 3), (7, 3)),
    ((P, 1), (3,), (3,), (P, 3)),
    ((P, 1), (3,), (P, 3), (P, 3)),
    ((P, 1), (1,), (P, 1), (P, 1)),
    ((P, 1, 1), (7, 3), (7, 3), (P, 7, 3)),
    ((P, 1, 1), (7, 3), (P, 7, 3), (P, 7, 3)),
    ((P, 1, 1), (3,), (P, 7, 3), (P, 7, 3)),
    ((2, P, 1, 1), (7, 3), (P, 7, 3), (2, P, 7, 3)),
]


def by_loop(loc, x, shape):
    """Normal log densities, one Python float at a time."""
    locs, xs = loc.expand(shape).flatten().tolist(), x.expand(shape).flatten().tolist()
    values = [-0.5 * (a - b) ** 2 - HALF_LOG_2PI for a, b in zip(xs, locs, strict=True)]
    return torch.tensor(values).reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("loc", "batch", "x", "expected"), CASES)
def test_log_prob_equals_a_loop(kind, loc, batch, x, expected):
    loc, x = torch.randn(loc), torch.randn(x)
    d = KINDS[kind](loc, batch)
    truth = by_loop(loc, x, expected)
    torch.testing.assert_close(d.log_prob(x), truth, rtol=1e-12, atol=1e-12)
    log_z = d.log_normalizer_value().expand(expected)
    torch.testing.assert_close(d.unnormalized_log_prob(x) - d.log_prob(x), log_z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("loc", "batch", "x", "expected"), CASES)
def test_score_has_the_shape_of_the_density(kind, loc, batch, x, expected):
    loc, x = torch.randn(loc), torch.randn(x)
    score = KINDS[kind](loc, batch).score(x)
    torch.testing.assert_close(score, (loc - x).expand(expected))
    with torch.no_grad():
        torch.testing.assert_close(KINDS[kind](loc, batch).score(x), score)


@pytest.mark.parametrize("x", [(3, 2), (5, 3, 2), (P, 5, 3, 2)])
@pytest.mark.parametrize("loc", [(2,), (3, 2), (P, 1, 1, 2), (P, 5, 1, 2)])
def test_vector_events(loc, x):
    loc, x = torch.randn(loc), torch.randn(x)
    d = EnergyDistribution(GaussianEnergy(loc, event_dim=1), batch_shape=(3,))
    torch.testing.assert_close(d.log_prob(x), dist.Normal(loc, 1.0).to_event(1).log_prob(x))


# --- plates and particles ------------------------------------------------------------------------


def two_level(likelihood, prior):
    """Groups of rows, the columns on the left, with a latent per group."""

    def model(data):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        with pyro.plate("groups", 3, dim=-1):
            loc = pyro.sample("loc", prior())
            with pyro.plate("rows", 5, dim=-2):
                pyro.sample("x", likelihood(loc, scale), obs=data)

    return model


def gaussian_site(loc, scale):
    return EnergyDistribution(GaussianEnergy(loc, scale))


def guide(data):
    a = pyro.param("a", torch.tensor(0.3))
    b = pyro.param("b", torch.tensor([0.1, -0.2, 0.5]))
    pyro.sample("scale", dist.LogNormal(a, 0.2))
    with pyro.plate("groups", 3, dim=-1):
        pyro.sample("loc", dist.Normal(b, 0.3))


def loss_and_grads(elbo, model, guide, *args):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    loss = elbo.differentiable_loss(model, guide, *args)
    loss.backward()
    return [loss, *(p.grad for _, p in sorted(pyro.get_param_store().named_parameters()))]


@pytest.mark.parametrize("particles", [1, P])
@pytest.mark.parametrize("vectorized", [False, True])
def test_elbo_with_plates_and_particles(particles, vectorized):
    data = torch.randn(5, 3)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=vectorized, max_plate_nesting=2)
    ours = two_level(gaussian_site, lambda: EnergyDistribution(GaussianEnergy(0.5, 2.0)))
    plain = two_level(dist.Normal, lambda: dist.Normal(0.5, 2.0))
    for a, b in zip(
        loss_and_grads(elbo, ours, guide, data),
        loss_and_grads(elbo, plain, guide, data),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_shapes_of_sites_under_particles():
    model = two_level(gaussian_site, lambda: EnergyDistribution(GaussianEnergy(0.5, 2.0)))
    particles = pyro.plate("particles", P, dim=-3)
    trace = poutine.trace(particles(model)).get_trace(torch.randn(5, 3))
    trace.compute_log_prob()
    shapes = {name: tuple(trace.nodes[name]["log_prob"].shape) for name in ("scale", "loc", "x")}
    assert shapes == {"scale": (P, 1, 1), "loc": (P, 1, 3), "x": (P, 5, 3)}
    assert trace.nodes["loc"]["value"].shape == (P, 1, 3)
    assert trace.nodes["loc"]["value"].flatten().unique().numel() == P * 3


def test_to_event_inside_plates_and_particles():
    def model_of(law):
        def model(data):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("rows", 5):
                site = law(loc.unsqueeze(-1)).expand(loc.shape[:-1] + (5, 2)).to_event(1)
                pyro.sample("x", site, obs=data)

        return model

    def guide(data):
        pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.2)), 1.0))

    data = torch.randn(5, 2)
    elbo = Trace_ELBO(num_particles=P, vectorize_particles=True, max_plate_nesting=1)
    ours = loss_and_grads(
        elbo, model_of(lambda loc: EnergyDistribution(GaussianEnergy(loc))), guide, data
    )
    plain = loss_and_grads(elbo, model_of(lambda loc: dist.Normal(loc, 1.0)), guide, data)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("subsample", [2, 5])
def test_subsampling_scales_and_masks_hide(subsample):
    data, mask = torch.randn(5), torch.tensor([True, False, True, True, False])

    def model_of(law):
        def model():
            with pyro.plate("rows", 5, subsample_size=subsample) as i:
                pyro.sample("x", law().mask(mask[i]), obs=data[i])
                with poutine.mask(mask=mask[i]), poutine.scale(scale=2.0):
                    pyro.sample("y", law(), obs=data[i])

        return model

    def total(law):
        pyro.set_rng_seed(0)
        return poutine.trace(model_of(law)).get_trace().log_prob_sum()

    ours = total(lambda: EnergyDistribution(GaussianEnergy(1.0, 3.0)))
    torch.testing.assert_close(ours, total(lambda: dist.Normal(1.0, 3.0)))


# --- enumeration ---------------------------------------------------------------------------------

LOCS = [-1.0, 0.5, 2.0]


def enumerated(law, label, beside):
    def model(data):
        locs = pyro.param("locs", lambda: torch.tensor(LOCS))
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5):
            k = pyro.sample("k", label(), infer={"enumerate": "parallel"}).long()
            if beside:
                pyro.sample("seen", dist.Normal(locs[k], 1.0), obs=data)
                pyro.sample("x", law(loc), obs=data)
            else:
                pyro.sample("x", law(locs[k] + loc), obs=data)

    return model


def normal_guide(data):
    pyro.sample("loc", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.5))


WEIGHTS = [0.2, 0.3, 0.5]


def categorical():
    return dist.Categorical(torch.tensor(WEIGHTS))


def categorical_energy():
    """The same law as an energy over the integers 0, 1, 2, with its log Z."""
    energies = -torch.tensor(WEIGHTS).log() + 1.7
    return EnergyDistribution(
        lambda k: energies[k.long()],
        event_shape=(),
        support=C.integer_interval(0, 2),
        log_normalizer=-1.7,
    )


@pytest.mark.parametrize("label", [categorical, categorical_energy])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("particles", [1, P])
def test_enumerated_parent_or_neighbour_of_a_normalized_ebm(label, beside, particles):
    data = torch.randn(5)
    elbo = TraceEnum_ELBO(
        max_plate_nesting=1, num_particles=particles, vectorize_particles=particles > 1
    )
    ours = enumerated(lambda loc: EnergyDistribution(GaussianEnergy(loc)), label, beside)
    plain = enumerated(lambda loc: dist.Normal(loc, 1.0), categorical, beside)
    for a, b in zip(
        loss_and_grads(elbo, ours, normal_guide, data),
        loss_and_grads(elbo, plain, normal_guide, data),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_enumeration_sums_the_density_to_one():
    d = categorical_energy()
    torch.testing.assert_close(d.log_prob(d.enumerate_support()).exp().sum(), torch.tensor(1.0))
    assert d.expand([4]).enumerate_support().shape == (3, 4)
    assert d.expand([4]).enumerate_support(expand=False).shape == (3, 1)


# --- vmap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_points_and_parameters(kind):
    locs, x = torch.randn(P, 3), torch.randn(P, 3)

    def log_prob(loc, x):
        with pyro.validation_enabled(is_validate=False):
            return KINDS[kind](loc, (3,)).log_prob(x)

    truth = torch.stack([log_prob(a, b) for a, b in zip(locs, x, strict=True)])
    torch.testing.assert_close(vmap(log_prob)(locs, x), truth)
    torch.testing.assert_close(vmap(log_prob, (None, 0))(locs[0], x), log_prob(locs[0], x))
    slope = vmap(grad(lambda loc, x: log_prob(loc, x).sum(), 1))(locs, x)
    torch.testing.assert_close(slope, locs - x)


def test_vmapped_gradient_of_a_model_equals_a_loop():
    net = MLPEnergy(2, hidden=(8,), confinement=1.0)
    net.requires_grad_(requires_grad=False)

    def model():
        with pyro.plate("rows", 3):
            x = pyro.sample("x", EnergyDistribution(net, event_shape=(2,)))
            pyro.sample("y", EnergyDistribution(GaussianEnergy(x.sum(-1))), obs=torch.ones(3))

    _, potential, _, _ = initialize_model(model)
    points = torch.randn(P, 3, 2)
    with pyro.validation_enabled(is_validate=False):
        both = grad_and_value(lambda x: potential({"x": x}))
        slopes, values = vmap(both)(points)
        for point, slope, value in zip(points, slopes, values, strict=True):
            one = both(point)
            torch.testing.assert_close((slope, value), one)


# --- wrong shapes --------------------------------------------------------------------------------


def forgot_to_squeeze(x):
    return x.square().sum(-1, keepdim=True)


@pytest.mark.parametrize("x", [(2,), (1, 2), (5, 2), (2, 2), (4, 5, 2)])
@pytest.mark.parametrize("method", ["log_prob", "energy", "potential", "score"])
def test_a_trailing_one_is_an_error_that_says_squeeze(x, method):
    d = EnergyDistribution(forgot_to_squeeze, event_shape=(2,))
    with pytest.raises(EnergyShapeError, match=r"Did you forget \.squeeze\(-1\)\?"):
        getattr(d, method)(torch.randn(x))


def test_a_trailing_one_is_found_where_pyro_works():
    def model():
        with pyro.plate("rows", 5):
            pyro.sample("x", EnergyDistribution(forgot_to_squeeze, event_shape=(2,)))

    with pytest.raises(EnergyShapeError, match=r"squeeze\(-1\)"):
        poutine.trace(model).get_trace()
    conditioned = poutine.condition(model, {"x": torch.zeros(5, 2)})
    svi = SVI(conditioned, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(EnergyShapeError, match=r"squeeze\(-1\)"):
        svi.step()


@pytest.mark.parametrize(
    ("energy", "hint"),
    [
        (lambda x: x.square(), r"\.sum\(-1\)"),
        (lambda x: x.square().sum(), "over the batch"),
        (lambda x: x.square().sum(-1).mean(-1), "over the batch"),
        (lambda x: x.square().sum(-1).T, "belong on the left"),
    ],
)
def test_other_wrong_shapes_have_their_own_hint(energy, hint):
    d = EnergyDistribution(energy, event_shape=(2,), batch_shape=(7, 5))
    with pytest.raises(EnergyShapeError, match=hint):
        d.log_prob(torch.randn(7, 5, 2))


def test_a_forgotten_to_event_is_named():
    d = EnergyDistribution(lambda x: x.sum(-1), base=dist.Normal(torch.zeros(2), 1.0))
    with pytest.raises(EnergyShapeError, match=r"to_event\(1\)"):
        d.log_prob(torch.zeros(2))


@pytest.mark.parametrize("shape", [(5, 1), (2,), (1, 5, 1)])
def test_a_log_normalizer_may_not_add_dims(shape):
    d = EnergyDistribution(
        lambda x: x**2, event_shape=(), batch_shape=(5,), log_normalizer=torch.zeros(shape)
    )
    with pytest.raises(EnergyShapeError, match=r"log_normalizer has shape .*squeeze\(-1\)"):
        d.log_prob(torch.zeros(5))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2,), (1, 2, 1)])
@pytest.mark.parametrize("method", ["log_prob", "energy", "potential", "score"])
def test_events_of_another_shape_are_refused(shape, method):
    d = EnergyDistribution(lambda x: x.sum((-1, -2)), event_shape=(2, 2))
    with pytest.raises(ValueError, match=r"event.shape"):
        getattr(d, method)(torch.zeros(shape))


def test_every_combination_of_plate_particle_and_parameter_dims():
    """A parameter's dims count from the right, whatever stands on the left of x."""
    for rows, particles, own in itertools.product([1, 3], [1, P], [(), (1,), (1, 1)]):
        loc = torch.randn((particles, *own) if own else ())
        x = torch.randn(rows)
        d = exact(loc, (rows,))
        shape = torch.broadcast_shapes(loc.shape, x.shape)
        torch.testing.assert_close(d.log_prob(x), by_loop(loc, x, shape))
        assert d.batch_shape == shape
