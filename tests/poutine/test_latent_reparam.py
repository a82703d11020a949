"""LatentReparam: the latent law takes the site's place, in plates, under guides and kernels.

The truth is the linear generator of two latents into three outputs with a quadratic energy, whose
latent law, with or without a Gaussian likelihood after the output, is a known Gaussian; and grids.
"""

from __future__ import annotations

import functools
import math

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints as C
from pyro.distributions import transforms as T
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
    init_to_value,
)
from pyro.infer.mcmc.util import initialize_model

from pyro_ebm import EnergyDistribution, GeneralizedEBM, LatentReparam, LogNormalizer, unwrap
from pyro_ebm.distributions import default_sample
from pyro_ebm.poutine.latent_reparam import PushforwardDelta

A = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.2]], dtype=torch.float64)
H = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _double_and_short(monkeypatch):
    """Prototypes need no converged draws: their chains are cut short."""
    torch.set_default_dtype(torch.float64)
    short = functools.partial(default_sample.short_chain, num_steps=8)
    monkeypatch.setattr(default_sample, "short_chain", short)
    monkeypatch.setattr(default_sample, "MAX_RHAT", math.inf)


def generate(z):
    return z @ A.T


def energy(x):
    return 0.5 * x.square().sum(-1) - x @ H


def gebm(**options):
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return GeneralizedEBM(generate, prior, energy, **options)


def posterior(noise=None, data=None):
    """The latent law, given data = x + noise * N(0, I) if there are any."""
    precision, shift = EYE + A.T @ A, A.T @ H
    if data is not None:
        precision = precision + A.T @ A / noise**2
        shift = shift + A.T @ data / noise**2
    return dist.MultivariateNormal(torch.linalg.solve(precision, shift), precision_matrix=precision)


DATA = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64)


def alone():
    return pyro.sample("x", gebm())


def with_likelihood(data=DATA):
    x = pyro.sample("x", gebm())
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=data)
    return x


def reparam(model, **config):
    return poutine.reparam(model, config or {"x": LatentReparam()})


def sites_of(trace):
    return {
        name: (type(unwrap(s["fn"]) or s["fn"]).__name__, tuple(s["value"].shape))
        for name, s in trace.nodes.items()
        if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"
    }


def assert_potential_is(model, truth, name="x_latent", points=6):
    """The kernel's potential over the latent is minus this log density, up to a constant."""
    _, potential, transforms, trace = initialize_model(model)
    assert list(transforms) == [name]
    z = torch.randn((points, *trace.nodes[name]["value"].shape))
    ours = torch.stack([potential({name: at}) for at in z])
    theirs = -torch.stack([truth(at) for at in z])
    torch.testing.assert_close(ours - ours[0], theirs - theirs[0], rtol=1e-10, atol=1e-10)


# --- what becomes of the site --------------------------------------------------------------------


def test_the_site_becomes_a_latent_and_its_image():
    trace = poutine.trace(reparam(alone)).get_trace()
    assert sites_of(trace) == {
        "x_latent": ("EnergyDistribution", (2,)),
        "x": ("PushforwardDelta", (3,)),
    }
    z, x = trace.nodes["x_latent"]["value"], trace.nodes["x"]["value"]
    torch.testing.assert_close(x, generate(z))
    assert trace.nodes["_RETURN"]["value"] is x
    assert trace.nodes["x"]["is_observed"]
    assert not trace.nodes["x_latent"]["is_observed"]
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"] == 0.0


def test_exact_with_and_without_a_likelihood_after_it():
    assert_potential_is(reparam(alone), posterior().log_prob)
    assert_potential_is(reparam(with_likelihood), posterior(0.5, DATA).log_prob)


def test_a_likelihood_counted_twice_would_be_noticed():
    with pytest.raises(AssertionError):
        assert_potential_is(reparam(with_likelihood), posterior(0.5 / 2**0.5, DATA).log_prob)


def test_tempered_and_normalized_models_keep_their_latent_law():
    def model():
        pyro.sample("x", gebm(inverse_temperature=0.5, log_normalizer=-0.1))

    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    assert_potential_is(reparam(model), lambda z: prior.log_prob(z) - 0.5 * energy(generate(z)))
    trace = poutine.trace(reparam(model)).get_trace()
    assert trace.nodes["x_latent"]["fn"].log_normalizer == -0.1


@pytest.mark.parametrize("expanded", [False, True], ids=["by the plate", "before it"])
def test_plates(expanded):
    def model():
        with pyro.plate("rows", 4):
            x = pyro.sample("x", gebm().expand([4]) if expanded else gebm())
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=DATA.expand(4, 3))

    trace = poutine.trace(reparam(model)).get_trace()
    assert sites_of(trace) == {
        "x_latent": ("EnergyDistribution", (4, 2)),
        "x": ("PushforwardDelta", (4, 3)),
        "y": ("Independent", (4, 3)),
    }
    assert_potential_is(reparam(model), lambda z: posterior(0.5, DATA).log_prob(z).sum())


def test_to_event_where_latent_and_output_differ_in_dims():
    """Scalar outputs of vector latents, three of them as one event; and the other way round."""

    def to_scalar():
        prior = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
        law = GeneralizedEBM(lambda z: z.sum(-1), prior, lambda x: x**2)
        pyro.sample("x", law.to_event(1))

    def to_vector():
        prior = dist.Normal(torch.zeros(3), 1.0)
        law = GeneralizedEBM(lambda z: torch.stack([z, -z], -1), prior, lambda x: x[..., 0] ** 2)
        pyro.sample("x", law.to_event(1))

    for model, latent, image in ((to_scalar, (3, 2), (3,)), (to_vector, (3,), (3, 2))):
        trace = poutine.trace(reparam(model)).get_trace()
        trace.compute_log_prob()
        assert trace.nodes["x_latent"]["value"].shape == latent
        assert trace.nodes["x"]["value"].shape == image
        assert trace.nodes["x_latent"]["log_prob"].shape == ()
        assert trace.nodes["x_latent"]["fn"].event_shape == latent
        assert trace.nodes["x"]["fn"].event_shape == image


def test_masks_and_scales_reach_the_latent():
    mask = torch.tensor([True, False, True, False])

    def model():
        with pyro.plate("rows", 4), poutine.scale(scale=3.0):
            pyro.sample("x", gebm().mask(mask))

    truth = posterior()
    assert_potential_is(reparam(model), lambda z: 3 * truth.log_prob(z)[mask].sum())


def test_vectorized_particles():
    def guide():
        with pyro.plate("rows", 4):
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("x_latent", dist.Normal(loc, 0.5).to_event(1))

    def model():
        with pyro.plate("rows", 4):
            x = pyro.sample("x", gebm())
            pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=DATA.expand(4, 3))

    losses = []
    for vectorized in (True, False):
        elbo = Trace_ELBO(
            num_particles=3000 if vectorized else 5,
            vectorize_particles=vectorized,
            max_plate_nesting=1,
        )
        losses.append(elbo.loss(reparam(model), guide))
    q = dist.Normal(torch.zeros(2), 0.5).to_event(1)
    z = q.sample((20_000,))
    truth = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z) - energy(generate(z))
    truth = truth + dist.Normal(generate(z), 0.5).to_event(1).log_prob(DATA) - q.log_prob(z)
    error = truth.std() * math.sqrt(4 / 3000 + 16 / 20_000)
    assert abs(losses[0] + 4 * truth.mean()) < 5 * error
    assert abs(losses[1] + 4 * truth.mean()) < 5 * truth.std() * math.sqrt(4 / 5)


# --- kernels, guides, predictions ----------------------------------------------------------------


def worst_z(draws, mean):
    columns = draws.reshape(len(draws), -1).numpy().T
    assert min(az.ess(c[None]).item() for c in columns) >= 400
    return max(
        abs(c.mean() - m.item()) / az.mcse(c[None]).item()
        for c, m in zip(columns, mean, strict=True)
    )


@pytest.mark.slow
def test_nuts_with_a_likelihood_and_predictions_after_it():
    mcmc = MCMC(NUTS(reparam(with_likelihood)), num_samples=1500, warmup_steps=200)
    mcmc._disable_progbar = True
    mcmc.run()
    draws = mcmc.get_samples()
    assert list(draws) == ["x_latent"]
    truth = posterior(0.5, DATA)
    assert worst_z(draws["x_latent"], truth.mean) < 5
    assert worst_z(draws["x_latent"], posterior().mean) > 5  # the data left out
    predicted = Predictive(reparam(with_likelihood), draws, parallel=True)(None)
    torch.testing.assert_close(predicted["x"], generate(draws["x_latent"]))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictions_from_latent_draws(parallel):
    """The output is a function of the latent's draws; ``y`` is drawn around it."""
    latent = torch.randn(6, 2)
    predictive = Predictive(
        reparam(with_likelihood),
        {"x_latent": latent},
        return_sites=["x", "y"],
        parallel=parallel,
    )
    draws = predictive(None)
    torch.testing.assert_close(draws["x"], generate(latent))
    assert ((draws["y"] - draws["x"]).abs() < 3).all()


def test_prior_predictions_in_one_batch():
    draws = Predictive(reparam(alone), num_samples=8, parallel=True)()
    torch.testing.assert_close(draws["x"], generate(draws["x_latent"]))


@pytest.mark.parametrize(
    "init",
    [
        init_to_feasible,
        init_to_mean,
        init_to_median,
        init_to_sample,
        init_to_uniform,
        init_to_value(values={"x_latent": torch.zeros(2, dtype=torch.float64)}),
    ],
    ids=lambda init: getattr(init, "__name__", "partial"),
)
def test_init_strategies(init):
    guide = AutoNormal(reparam(with_likelihood), init_loc_fn=init)
    guide()
    assert guide.median()["x_latent"].shape == (2,)
    kernel = NUTS(reparam(with_likelihood), init_strategy=init)
    MCMC(kernel, num_samples=2, warmup_steps=2, disable_progbar=True).run()


def test_the_elbo_at_the_posterior_is_the_evidence_without_noise():
    truth = posterior(0.5, DATA)

    def guide():
        pyro.sample("x_latent", truth)

    z = torch.zeros(2)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    evidence = prior.log_prob(z) + dist.Normal(torch.zeros(3), 0.5).log_prob(DATA).sum()
    evidence = evidence - energy(generate(z)) - truth.log_prob(z)
    losses = [Trace_ELBO().loss(reparam(with_likelihood), guide) for _ in range(3)]
    torch.testing.assert_close(torch.tensor(losses), -evidence.expand(3))


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_autoguides_are_built_on_the_reparametrized_model(guide):
    model = reparam(with_likelihood)
    guide = guide(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(60):
        svi.step()
    assert set(guide.median()) == {"x_latent"}
    torch.testing.assert_close(
        guide.median()["x_latent"], posterior(0.5, DATA).mean, atol=0.3, rtol=0
    )


# --- flows ---------------------------------------------------------------------------------------


def flow_sites():
    spread = [T.AffineTransform(torch.tensor([0.5, -0.5]), torch.tensor([2.0, 0.3]), event_dim=1)]
    lower = torch.tensor([[1.0, 0.0], [0.7, 0.5]])
    normal = dist.Normal(torch.zeros(2), 1.0)
    return {
        "log normal": dist.LogNormal(torch.zeros(2), 0.5).to_event(1),
        "transformed event": dist.TransformedDistribution(normal.to_event(1), spread),
        "elementwise": dist.TransformedDistribution(normal, [T.TanhTransform()]).to_event(1),
        "two steps": dist.TransformedDistribution(
            normal, [T.ExpTransform(), T.AffineTransform(1.0, 2.0)]
        ).to_event(1),
        "lower cholesky": dist.TransformedDistribution(
            normal, [T.LowerCholeskyAffine(torch.ones(2), lower)]
        ),
        "simplex": dist.TransformedDistribution(normal.to_event(1), [T.StickBreakingTransform()]),
    }


FLOWS = list(flow_sites())


def tilted_flow(name, **options):
    return EnergyDistribution(lambda x: (x**2).sum(-1), base=flow_sites()[name], **options)


@pytest.mark.parametrize("name", FLOWS)
def test_flows_are_sampled_before_their_transforms(name):
    """Before the flow the law is the prior times exp(-E), with the same Z."""

    def model():
        pyro.sample("x", tilted_flow(name, log_normalizer=0.3))

    trace = poutine.trace(reparam(model)).get_trace()
    trace.compute_log_prob()
    z, x = trace.nodes["x_latent"]["value"], trace.nodes["x"]["value"]
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    if name == "log normal":
        prior = dist.Normal(torch.zeros(2), 0.5).to_event(1)
    truth = prior.log_prob(z) - x.square().sum(-1) - 0.3
    torch.testing.assert_close(trace.nodes["x_latent"]["log_prob"], truth)
    assert tilted_flow(name).support.check(x)
    flow = trace.nodes["x"]["fn"]
    assert flow.event_shape == tilted_flow(name).event_shape


@pytest.mark.parametrize("name", FLOWS)
def test_the_image_is_that_of_the_whole_flow(name):
    trace = poutine.trace(reparam(lambda: pyro.sample("x", tilted_flow(name)))).get_trace()
    z, x = trace.nodes["x_latent"]["value"], trace.nodes["x"]["value"]
    stick = torch.sigmoid(z - torch.tensor([2.0, 1.0]).log())
    want = {
        "log normal": z.exp(),
        "transformed event": torch.tensor([0.5, -0.5]) + torch.tensor([2.0, 0.3]) * z,
        "elementwise": z.tanh(),
        "two steps": 1 + 2 * z.exp(),
        "lower cholesky": torch.stack([1 + z[0], 1 + 0.7 * z[0] + 0.5 * z[1]]),
        "simplex": torch.stack(
            [stick[0], stick[1] * (1 - stick[0]), (1 - stick[1]) * (1 - stick[0])]
        ),
    }
    torch.testing.assert_close(x, want[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FLOWS)
def test_flows_in_plates(name):
    def model():
        with pyro.plate("rows", 5):
            pyro.sample("x", tilted_flow(name))

    trace = poutine.trace(reparam(model)).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x_latent"]["value"].shape == (5, 2)
    assert trace.nodes["x"]["value"].shape == (5, *tilted_flow(name).event_shape)
    assert trace.nodes["x_latent"]["log_prob"].shape == (5,)


def test_an_observed_flow_site_stays_as_it_is():
    value = torch.tensor([0.5, 1.5])

    def model():
        pyro.sample("x", tilted_flow("log normal"), obs=value)

    trace = poutine.trace(reparam(model)).get_trace()
    assert list(sites_of(trace)) == ["x"]
    truth = tilted_flow("log normal").log_prob(value)
    torch.testing.assert_close(trace.log_prob_sum(), truth)
    conditioned = poutine.condition(
        lambda: pyro.sample("x", tilted_flow("log normal")), {"x": value}
    )
    torch.testing.assert_close(
        poutine.trace(reparam(conditioned)).get_trace().log_prob_sum(), truth
    )


def grid_mean(log_density):
    ticks = torch.linspace(-8.0, 8.0, 1601)
    return (log_density(ticks).softmax(0) @ ticks).item()


@pytest.mark.slow
def test_nuts_before_and_after_a_flow_agree_with_a_grid():
    def model():
        x = pyro.sample("x", EnergyDistribution(lambda x: x, base=dist.LogNormal(0.0, 1.0)))
        pyro.sample("y", dist.Normal(x, 0.5), obs=torch.tensor(2.0))

    def log_density(z):
        x = z.exp()
        return -0.5 * z**2 - x - 2 * (x - 2.0) ** 2

    truth = torch.tensor([grid_mean(log_density)])
    for name, run in (("x_latent", reparam(model)), ("x", model)):
        mcmc = MCMC(NUTS(run), num_samples=2000, warmup_steps=200, disable_progbar=True)
        mcmc.run()
        z = mcmc.get_samples()[name]
        assert worst_z(z if name == "x_latent" else z.log(), truth) < 5


def test_a_nonlinear_generator_with_a_likelihood_equals_a_grid():
    """An energy on the curve (z, z^2) with a likelihood, the kernel's potential on a grid."""

    def model():
        prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        law = GeneralizedEBM(lambda z: torch.cat([z, z**2], -1), prior, lambda x: x[..., 1].cos())
        x = pyro.sample("x", law)
        pyro.sample("y", dist.Normal(x, 0.7).to_event(1), obs=torch.tensor([0.5, 1.0]))

    _, potential, _, _ = initialize_model(reparam(model))
    ticks = torch.linspace(-6.0, 6.0, 241)
    values = torch.stack([potential({"x_latent": z[None]}) for z in ticks])
    truth = 0.5 * ticks**2 + (ticks**2).cos()
    truth = truth + 0.5 / 0.49 * ((ticks - 0.5) ** 2 + (ticks**2 - 1.0) ** 2)
    torch.testing.assert_close(values - values[0], truth - truth[0])


# --- log Z ---------------------------------------------------------------------------------------


def test_log_z_goes_with_the_latent():
    estimate = LogNormalizer(torch.tensor(-0.5), torch.tensor(0.01))

    def model(**options):
        return lambda: pyro.sample("x", gebm(**options))

    for known in (0.3, torch.tensor(0.3), estimate, lambda: torch.tensor(0.3)):
        trace = poutine.trace(reparam(model(log_normalizer=known))).get_trace()
        assert trace.nodes["x_latent"]["fn"].log_normalizer is known
    assert not poutine.trace(reparam(model())).get_trace().nodes["x_latent"]["fn"].is_normalized


# --- refusals ------------------------------------------------------------------------------------


def test_an_observed_generalized_ebm_is_refused():
    def model():
        pyro.sample("x", gebm(), obs=torch.zeros(3))

    for refused in (model, poutine.condition(alone, {"x": torch.zeros(3)})):
        with pytest.raises(ValueError, match="'x' is observed.*KALE.*likelihood after it"):
            poutine.trace(reparam(refused)).get_trace()


@pytest.mark.parametrize("use", ["trace", "NUTS", "guide"])
def test_conditioning_from_outside_is_refused_with_a_sentence(use):
    model = poutine.condition(reparam(alone), {"x": torch.zeros(3)})

    def trace():
        poutine.trace(model).get_trace().compute_log_prob()

    def nuts():
        MCMC(NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True).run()

    def guide():
        SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()

    run = {"trace": trace, "NUTS": nuts, "guide": guide}[use]
    with pytest.raises(RuntimeError, match="condition on 'x_latent', or put a likelihood after"):
        run()


def test_conditioning_on_the_latent_is_the_way():
    z = torch.tensor([0.3, -0.4])
    trace = poutine.trace(poutine.condition(reparam(alone), {"x_latent": z})).get_trace()
    torch.testing.assert_close(trace.nodes["x"]["value"], generate(z))
    trace.compute_log_prob()


def test_the_point_mass_knows_its_value_after_expand():
    x = torch.randn(2, 3)
    delta = PushforwardDelta(x, event_dim=1, site="x")
    assert delta.log_prob(x).eq(0).all()
    assert delta.log_prob(x.clone()).shape == (2,)
    wide = delta.expand([5, 2])
    assert wide.log_prob(x).shape == (5, 2)
    assert wide.sample().shape == (5, 2, 3)
    with pytest.raises(RuntimeError, match="cannot be conditioned on another value"):
        delta.log_prob(x + 1)


@pytest.mark.parametrize(
    ("law", "match"),
    [
        (lambda: dist.Normal(0.0, 1.0), "'x' is Normal, not an energy-based distribution"),
        (
            lambda: EnergyDistribution(lambda x: x, base=dist.Normal(0.0, 1.0)),
            "base of EBM site 'x' is Normal; it must be a generator .* or a flow",
        ),
        (
            lambda: EnergyDistribution(lambda x: x**2, event_shape=()),
            "base of EBM site 'x' is None",
        ),
    ],
)
def test_sites_that_have_no_latent(law, match):
    with pytest.raises(ValueError, match=match):
        poutine.trace(reparam(lambda: pyro.sample("x", law()))).get_trace()


def test_several_sites_at_once():
    def model():
        x = pyro.sample("x", gebm())
        w = pyro.sample("w", tilted_flow("log normal"))
        pyro.sample("y", dist.Normal(x.sum(-1) * w.sum(-1), 1.0), obs=torch.tensor(1.0))

    both = poutine.reparam(model, {"x": LatentReparam(), "w": LatentReparam()})
    trace = poutine.trace(both).get_trace()
    assert list(sites_of(trace)) == ["x_latent", "x", "w_latent", "w", "y"]
    MCMC(NUTS(both), num_samples=3, warmup_steps=3, disable_progbar=True).run()


def test_a_constrained_prior_of_the_generator():
    """Latents on the positive reals: the kernel moves in their log."""

    def model():
        prior = dist.Gamma(2.0 * torch.ones(2), 1.0).to_event(1)
        pyro.sample("x", GeneralizedEBM(lambda z: z.log(), prior, lambda x: x.square().sum(-1)))

    trace = poutine.trace(reparam(model)).get_trace()
    assert trace.nodes["x_latent"]["fn"].support.check(torch.ones(2))
    assert not trace.nodes["x_latent"]["fn"].support.check(-torch.ones(2))
    _, potential, transforms, _ = initialize_model(reparam(model))
    u = torch.randn(2)
    gamma = dist.Gamma(2.0, torch.tensor(1.0))
    truth = -(gamma.log_prob(u.exp()) + u - u**2).sum()
    torch.testing.assert_close(potential({"x_latent": u}), truth)
    assert transforms["x_latent"].inv.codomain is not C.real
