"""energy_factor: minus the energy enters the joint density, once, and every misuse has a sentence.

What the guard of the normalizer says of factors is tested with the guard.
"""

from __future__ import annotations

import warnings

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from pyro.infer.mcmc.util import initialize_model
from torch import nn

from pyro_ebm import EnergyDistribution, energy_factor
from pyro_ebm.distributions import sites
from pyro_ebm.errors import EnergyShapeError


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(sites, "_warned", set())


def close(x, y):
    """A soft equality: the joint of two standard normals becomes a Gaussian with this precision."""
    return 2.0 * (x - y) ** 2


PRECISION = torch.tensor([[5.0, -4.0], [-4.0, 5.0]], dtype=torch.float64)


def coupled():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.Normal(0.0, 1.0))
    energy_factor("close", close, x, y)


def test_the_joint_has_minus_the_energy():
    trace = poutine.trace(poutine.condition(coupled, {"x": torch.tensor(1.0)})).get_trace()
    x, y = trace.nodes["x"]["value"], trace.nodes["y"]["value"]
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["close"]["log_prob"], -close(x, y))
    _, potential, _, _ = initialize_model(coupled)
    points = torch.randn(6, 2)
    values = torch.stack([potential({"x": a, "y": b}) for a, b in points])
    truth = 0.5 * torch.einsum("ni,ij,nj->n", points, PRECISION, points)
    torch.testing.assert_close(values - values[0], truth - truth[0])


@pytest.mark.slow
def test_nuts_samples_the_coupled_gaussian():
    mcmc = MCMC(NUTS(coupled), num_samples=1500, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    product = (draws["x"] * draws["y"]).numpy()[None]
    assert az.ess(product).item() >= 400
    truth = torch.linalg.inv(PRECISION)[0, 1].item()
    assert abs(product.mean() - truth) < 5 * az.mcse(product).item()
    assert abs(product.mean()) > 5 * az.mcse(product).item()  # the factor left out


def test_svi_sees_the_factor():
    guide = AutoMultivariateNormal(coupled)
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(coupled, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(250):
        svi.step()
    found = guide.get_posterior().covariance_matrix.detach()
    torch.testing.assert_close(found, torch.linalg.inv(PRECISION), atol=0.1, rtol=0)


def field(num=4):
    """A chain of latents in a plate, one factor per neighbouring pair in a plate of its own."""

    def model():
        with pyro.plate("sites", num):
            x = pyro.sample("x", dist.Normal(0.0, 10.0))
        with pyro.plate("pairs", num - 1):
            energy_factor("smooth", lambda a, b: 0.5 * (a - b) ** 2, x[..., :-1], x[..., 1:])

    return model


def test_factors_in_plates_and_particles():
    trace = poutine.trace(field()).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["smooth"]["log_prob"].shape == (3,)
    particles = pyro.plate("particles", 7, dim=-2)
    trace = poutine.trace(particles(field())).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    torch.testing.assert_close(trace.nodes["smooth"]["log_prob"], -0.5 * x.diff(dim=-1) ** 2)


def test_subsampled_plates_scale_the_factor():
    data = torch.arange(6.0)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 6, subsample_size=2) as i:
            energy_factor("fit", lambda m, d: (m - d) ** 2, m, data[i])

    trace = poutine.trace(model).get_trace()
    m, i = trace.nodes["m"]["value"], trace.nodes["rows"]["value"]
    trace.compute_log_prob()
    total = trace.nodes["fit"]["log_prob_sum"]
    torch.testing.assert_close(total, -3 * ((m - data[i]) ** 2).sum())


@pytest.mark.parametrize("particles", [False, True])
def test_a_forgotten_squeeze_is_named(particles):
    """Pyro's ELBOs notice the extra dim; under MCMC it would silently count the factor n times."""
    net = nn.Linear(2, 1)

    def model():
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            energy_factor("f", net, x)

    model = pyro.plate("particles", 5, dim=-2)(model) if particles else model
    with pytest.raises(EnergyShapeError, match=r"'f'.*3, 1\).*squeeze\(-1\)"):
        poutine.trace(model).get_trace()


def test_values_that_broadcast_over_a_plate_are_legal():
    """A global latent's energy inside a plate: one value, and particles on its left."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            energy_factor("f", lambda x: x**2, x)

    poutine.trace(model).get_trace()
    trace = poutine.trace(pyro.plate("particles", 3, dim=-2)(model)).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["f"]["log_prob"].shape == (3, 3)


@pytest.mark.parametrize(
    ("energy", "inputs", "match"),
    [
        (torch.ones(3), (torch.ones(3),), "'f': energy must be callable"),
        (close, (1.0, torch.ones(3)), "'f': inputs must be tensors, got float"),
        (lambda x: 3.0, (torch.ones(3),), "'f': energy returned float"),
        (lambda x: None, (torch.ones(3),), "'f': energy returned NoneType"),
    ],
)
def test_bad_kinds(energy, inputs, match):
    with pytest.raises(TypeError, match=match):
        energy_factor("f", energy, *inputs)


@pytest.mark.parametrize("parallel", [False, True])
def test_simulation_from_the_prior_warns_once(parallel):
    with pytest.warns(UserWarning, match=r"'close' is ignored .*posterior_samples="):
        Predictive(coupled, num_samples=4, parallel=parallel)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Predictive(coupled, num_samples=4, parallel=parallel)()


@pytest.mark.parametrize("parallel", [False, True])
def test_prediction_from_posterior_draws_is_silent(parallel):
    draws = {"x": torch.zeros(4), "y": torch.zeros(4)}
    Predictive(coupled, posterior_samples=draws, parallel=parallel)()


def test_global_and_local_normalization_differ_by_log_z_of_the_parent():
    """exp(-x^2 / 2 s^2) as a factor pulls s down; as a site with its log Z it does not."""

    def as_factor():
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        x = pyro.sample("x", dist.Normal(0.0, 100.0))
        energy_factor("f", lambda x, s: 0.5 * (x / s) ** 2, x, s)

    def as_site():
        s = pyro.sample("s", dist.Gamma(2.0, 1.0))
        pyro.sample(
            "x",
            EnergyDistribution(
                lambda x: 0.5 * (x / s) ** 2, event_shape=(), log_normalizer=lambda: s.log()
            ),
        )

    at = {"x": torch.tensor(0.7), "s": torch.tensor(1.3)}
    totals = [
        poutine.trace(poutine.condition(model, at)).get_trace().log_prob_sum()
        for model in (as_factor, as_site)
    ]
    base = dist.Normal(0.0, 100.0).log_prob(at["x"])
    torch.testing.assert_close(totals[0] - totals[1], base + at["s"].log())


def test_the_site_is_tagged():
    trace = poutine.trace(coupled).get_trace()
    assert trace.nodes["close"]["infer"]["energy_factor"]
    assert trace.nodes["close"]["infer"]["is_auxiliary"]
    assert trace.nodes["close"]["is_observed"]
