"""The law of a generator's output: fresh draws with gradients, shapes, and no density."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints as C
from pyro.infer import Predictive
from torch import nn

from pyro_ebm import PushforwardDistribution


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def standard_normal(dims=2):
    return dist.Normal(torch.zeros(dims), 1.0).to_event(1)


def graph(z):
    """The curve (z, z^2)."""
    return torch.cat([z, z**2], -1)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("sample", [(), (5,), (4, 5)])
def test_shapes(batch, sample):
    law = PushforwardDistribution(graph, standard_normal(1)).expand(batch)
    assert (law.batch_shape, law.event_shape) == (batch, (2,))
    x = law.rsample(sample)
    assert x.shape == sample + batch + (2,)
    torch.testing.assert_close(x[..., 1], x[..., 0] ** 2)
    assert law.sample(sample).shape == x.shape
    assert x.unique().numel() == x.numel()


def test_event_shapes_are_found_and_checked():
    reshapes = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(-1, (3, 4)))
    law = PushforwardDistribution(reshapes, standard_normal().expand([5]))
    assert (law.batch_shape, law.event_shape) == ((5,), (3, 4))
    assert law.support.event_dim == 2
    scalar = PushforwardDistribution(torch.exp, dist.Normal(0.0, 1.0), support=C.positive)
    assert scalar.event_shape == ()
    assert scalar.support is C.positive
    with pytest.raises(ValueError, match=r"expected the leading dims \(5,\) to be kept"):
        PushforwardDistribution(lambda z: z.sum(0), standard_normal().expand([5]))


def test_given_event_shape_spares_the_trial_run():
    rows_only = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    law = PushforwardDistribution(rows_only, standard_normal(), event_shape=(3,))
    assert law.sample((7,)).shape == (7, 3)
    with pytest.raises(ValueError, match="RowWise.network, event_dim. makes it"):
        PushforwardDistribution(rows_only, standard_normal())


def test_finding_the_shape_leaves_no_mark():
    net = nn.Linear(2, 3)

    def registers(z):
        return pyro.module("net", net)(z)

    def model():
        PushforwardDistribution(registers, standard_normal())

    pyro.set_rng_seed(0)
    expected = torch.rand(2)
    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace()
    assert torch.equal(torch.rand(2), expected)
    assert set(trace.nodes) == {"_INPUT", "_RETURN"}


def test_gradients_flow_through_rsample_only():
    generator = nn.Linear(2, 3)
    loc = torch.zeros(2, requires_grad=True)
    law = PushforwardDistribution(generator, dist.Normal(loc, 1.0).to_event(1))
    assert law.has_rsample
    assert not law.sample((4,)).requires_grad
    law.rsample((4,)).sum().backward()
    torch.testing.assert_close(loc.grad, 4 * generator.weight.sum(0))
    assert generator.bias.grad.eq(4.0).all()


def test_a_discrete_prior_draws_without_gradients():
    law = PushforwardDistribution(lambda k: 2 * k - 1, dist.Bernoulli(torch.full((3,), 0.5)))
    assert not law.has_rsample
    assert law.sample((10,)).abs().eq(1).all()


def test_moments_of_a_linear_map():
    matrix = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.2]])
    law = PushforwardDistribution(lambda z: z @ matrix.T, standard_normal())
    x = law.sample((20_000,))
    error = (torch.cov(x.T) - matrix @ matrix.T).abs().max()
    assert error < 5 * 1.8 / 20_000**0.5


def test_fresh_draws_in_a_guide_site_and_in_predictive():
    law = PushforwardDistribution(graph, standard_normal(1))

    def model():
        with pyro.plate("rows", 4):
            return pyro.sample("x", law)

    assert model().unique(dim=0).shape == (4, 2)
    draws = Predictive(model, num_samples=6, parallel=True)()["x"]
    assert draws.shape == (6, 4, 2)
    assert draws.unique().numel() == 48


@pytest.mark.parametrize("remedy", ["likelihood", "TransformedDistribution", "GeneralizedEBM"])
def test_asking_for_a_density_names_the_remedies(remedy):
    law = PushforwardDistribution(graph, standard_normal(1))
    with pytest.raises(NotImplementedError, match=remedy):
        law.log_prob(torch.zeros(2))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"]
)
def test_copies(copied):
    law = copied(PushforwardDistribution(nn.Linear(2, 3), standard_normal()).expand([4]))
    assert law.sample((5,)).shape == (5, 4, 3)
    assert law.expand([7, 4]).shape() == (7, 4, 3)


@pytest.mark.parametrize(
    ("generator", "prior", "error", "match"),
    [
        (3.0, standard_normal(), TypeError, "generator must be callable, z -> x, got float"),
        (torch.tanh, 3.0, TypeError, "prior must be a Pyro distribution"),
        (torch.tanh, dist.Normal, TypeError, "prior must be a Pyro distribution"),
        (lambda z: None, standard_normal(), TypeError, "must return a tensor, got NoneType"),
        (nn.Linear(3, 2), standard_normal(), ValueError, "generator failed on one latent"),
    ],
)
def test_bad_input(generator, prior, error, match):
    with pytest.raises(error, match=match):
        PushforwardDistribution(generator, prior)
