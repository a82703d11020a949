"""The mechanism of the guard: what it names, when it looks, what it spares, what it keeps."""

from __future__ import annotations

import gc
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer
from pyro.infer import autoguide
from pyro.optim import Adam
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm import EnergyDistribution, MissingNormalizerError, check_model
from pyro_ebm.distributions import guard_schedule
from pyro_ebm.distributions import normalizer_guard as guard
from pyro_ebm.energies import GaussianEnergy, MLPEnergy
from pyro_ebm.errors import MissingNormalizerWarning
from pyro_ebm.ops import autograd_graph

X = torch.linspace(-1.0, 1.0, 5)


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    monkeypatch.setattr(guard_schedule, "_calls", {})


def scaled(theta, **kwargs):
    """The density proportional to exp(-theta x^2 / 2)."""
    return EnergyDistribution(lambda x: theta * x**2 / 2, event_shape=(), **kwargs)


def leaf(value=2.0):
    return torch.tensor(value, requires_grad=True)


def nuts(model, *args):
    infer.MCMC(infer.NUTS(model), 1, 1, disable_progbar=True).run(*args)


def model_with(make):
    def model(x):
        p = make()
        with pyro.plate("n", len(x)):
            pyro.sample("x", p, obs=x)

    return model


def step(model, guide=None):
    guide = guide or (lambda x: None)
    return infer.SVI(model, guide, Adam({}), infer.Trace_ELBO()).step(X)


# --- what the message says


def test_message_names_site_latent_and_remedy():
    model = model_with(lambda: scaled(pyro.sample("theta", dist.Gamma(2.0, 1.0))))
    with pytest.raises(MissingNormalizerError) as caught:
        nuts(model, X)
    text = str(caught.value)
    assert text.startswith("EBM site 'x': log Z is unknown, but latent 'theta' would be inferred")
    for remedy in ("log_normalizer=", "NCE", "requires_grad_(False)"):
        assert remedy in text


@pytest.mark.parametrize("wrap", [lambda p: p.mask(X > 0).to_event(1), lambda p: p.to_event(1)])
def test_message_names_a_wrapped_site(wrap):
    def model(x):
        theta = pyro.param("theta", leaf)
        pyro.sample("inside", wrap(scaled(theta).expand([5])), obs=x)

    with pytest.raises(MissingNormalizerError, match="EBM site 'inside'.* param 'theta'"):
        step(model)


def test_message_names_parameters_of_the_energy():
    net = MLPEnergy((), (4,))
    log_p = EnergyDistribution(net, event_shape=()).log_prob(X)
    with pytest.raises(MissingNormalizerError, match=r"parameter 'net\.0\.weight' of the energy"):
        log_p.sum().backward()


def test_message_counts_what_it_does_not_name():
    net = MLPEnergy((), (4, 4, 4))
    log_p = EnergyDistribution(net, event_shape=()).log_prob(X)
    with pytest.raises(MissingNormalizerError, match=" and 4 more would be"):
        log_p.sum().backward()


def test_message_without_a_site():
    theta = torch.ones(5, requires_grad=True)
    with pytest.raises(MissingNormalizerError, match=r"^an Energy.* a value of shape \(5,\)"):
        scaled(theta).log_prob(X).sum().backward()


def test_message_of_an_intermediate_value():
    theta = 2.0 * leaf()
    with pytest.raises(MissingNormalizerError, match="an intermediate value"):
        torch.autograd.grad(scaled(theta).log_prob(X).sum(), theta)


def test_error_survives_pyro_and_pickle():
    """Pyro rewraps ValueErrors, swallows errors on singular matrices, and pickles for workers."""
    error = MissingNormalizerError(guard.REMEDIES)
    assert isinstance(error, RuntimeError)
    assert not isinstance(error, ValueError)
    assert "singular" not in str(error)
    assert "positive-definite" not in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is MissingNormalizerError
    assert str(again) == str(error)


# --- which gradients count


def test_gradient_in_x_alone_is_fine():
    theta, x = leaf(), X.clone().requires_grad_()
    (g,) = torch.autograd.grad(scaled(theta).log_prob(x).sum(), x)
    assert torch.allclose(g, -2.0 * X)


def test_one_graph_is_silent_in_x_and_raises_in_theta():
    theta, x = leaf(), X.clone().requires_grad_()
    total = scaled(theta).log_prob(x).sum()
    torch.autograd.grad(total, x, retain_graph=True)
    with pytest.raises(MissingNormalizerError):
        torch.autograd.grad(total, theta)


def test_gradient_through_x_into_what_made_it_is_fine():
    z = leaf()
    scaled(torch.tensor(3.0)).log_prob(z.sinh()).backward()
    assert z.grad is not None


def test_gradient_through_x_and_past_it_raises():
    z = leaf()
    with pytest.raises(MissingNormalizerError):
        scaled(1.0 + z**2).log_prob(z.sinh()).backward()


def test_x_that_is_not_a_leaf_is_fine():
    x = 2.0 * X.clone().requires_grad_()
    (g,) = torch.autograd.grad(scaled(leaf()).log_prob(x).sum(), x)
    assert torch.allclose(g, -2.0 * x)


def test_double_backward_raises_for_theta_only():
    theta, x = leaf(), X.clone().requires_grad_()
    log_p = scaled(theta).log_prob(x).sum()
    (score,) = torch.autograd.grad(log_p, x, create_graph=True)
    score.sum().backward()  # the score needs no log Z: its gradient in theta is legitimate
    assert theta.grad is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_no_hook(mode):
    with mode():
        assert guard_schedule.turn_of(None, None, X, None) is None
        scaled(leaf()).log_prob(X)


def test_covering_tensor_is_fine_at_leaves_and_intermediate_values():
    u = leaf()
    theta = u.exp()
    log_z = 0.5 * (2.0 * torch.pi / theta).log()
    total = scaled(theta, log_normalizer=log_z).log_prob(X).sum()
    torch.autograd.grad(total, theta, retain_graph=True)
    torch.autograd.grad(total, u)


def test_constant_is_named_as_such():
    theta = leaf()
    with pytest.raises(MissingNormalizerError, match="log Z was given as a constant, but"):
        scaled(theta, log_normalizer=0.3).log_prob(X).sum().backward()


def test_free_log_z_raises_but_not_for_x():
    c, x = leaf(), X.clone().requires_grad_()
    total = scaled(torch.tensor(1.0), log_normalizer=c).log_prob(x).sum()
    torch.autograd.grad(total, x, retain_graph=True)
    with pytest.raises(MissingNormalizerError, match="minus infinity"):
        total.backward()


def test_exact_energy_is_fine_whatever_log_z_does_not_depend_on():
    """Log Z of a Gaussian does not contain its mean; the energy's word is taken for that."""
    loc = leaf()
    EnergyDistribution(GaussianEnergy(loc, 2.0)).log_prob(X).sum().backward()
    assert loc.grad is not None


def test_svi_counts_only_the_parameters_that_it_moves():
    net = MLPEnergy((), (4,))
    prior = EnergyDistribution(net, base=dist.Normal(0.0, 1.0), sampler=lambda d, s: torch.zeros(s))

    def model(x, registered):
        if registered:
            pyro.module("net", net)
        z = pyro.sample("z", prior)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def svi(registered):
        guide = autoguide.AutoNormal(model)
        infer.SVI(model, guide, Adam({}), infer.Trace_ELBO()).step(X, registered)

    svi(False)
    with pytest.raises(MissingNormalizerError):
        svi(True)


# --- the setting


def test_warn_warns_and_goes_on():
    theta = leaf()
    total = scaled(theta).log_prob(X).sum()
    warns = pytest.warns(MissingNormalizerWarning, match="log Z is unknown")
    with pyro.settings.context(ebm_missing_normalizer="warn"), warns:
        total.backward()
    assert torch.allclose(theta.grad, -0.5 * (X**2).sum())


def test_ignore_ignores():
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        scaled(leaf()).log_prob(X).sum().backward()


def test_setting_is_read_in_the_backward_pass_too():
    log_p = scaled(leaf()).log_prob(X).sum()
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        log_p.backward()


def test_setting_is_validated():
    with pytest.raises(ValueError, match="'error', 'warn' or 'ignore', got 'raise'"):
        pyro.settings.set(ebm_missing_normalizer="raise")


# --- memory


class _Token:
    """Something that a graph holds."""


class _HoldToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token):
        ctx.token = token
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("covered", [False, True])
def test_graph_is_freed_with_its_result(covered):
    token = _Token()
    alive, theta = weakref.ref(token), leaf()
    theta_held = _HoldToken.apply(theta, token)
    log_z = -0.5 * theta_held.log() if covered else None
    x = X.clone().requires_grad_()
    gc.disable()
    try:
        log_p = scaled(theta_held, log_normalizer=log_z).log_prob(x)
        del token, theta_held, log_z
        assert alive() is not None
        del log_p
        assert alive() is None
    finally:
        gc.enable()


# --- transforms of functions


def density(theta, x):
    return scaled(theta).log_prob(x).sum()


def test_func_grad_and_vmap_are_silent_in_x_and_raise_in_theta():
    xs, thetas = X.expand(3, 5).clone(), torch.ones(3)
    with pyro.validation_enabled(False):
        torch.func.vmap(torch.func.grad(density, argnums=1), (None, 0))(leaf(), xs)
        with pytest.raises(MissingNormalizerError):
            torch.func.vmap(torch.func.grad(density))(thetas, xs)


def test_captured_graph_holds_no_hook():
    def score(x):
        return torch.func.grad(density, argnums=1)(torch.tensor(2.0), x)

    with pyro.validation_enabled(False):
        graph = make_fx(score)(X)
        with pyro.settings.context(ebm_missing_normalizer="ignore"):
            plain = make_fx(score)(X)
    assert torch.allclose(graph(X), -2.0 * X)
    assert graph.code == plain.code


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_raises_while_tracing():
    """Hooks do not survive a trace, so every leaf but x counts there."""
    with pyro.validation_enabled(False), pytest.raises(MissingNormalizerError):
        torch.jit.trace(density, (leaf(), X))


def test_without_it_the_guard_is_off_and_nothing_breaks(monkeypatch):
    monkeypatch.setattr(autograd_graph, "_engine_will_run", None)
    assert not autograd_graph.can_see_running_nodes()
    scaled(leaf()).log_prob(X).sum().backward()


# --- mixtures


WELLS = torch.tensor([0.5, 4.0])


def components(**kwargs):
    """Two Gaussians of precision ``WELLS``, as energies."""
    return EnergyDistribution(
        lambda x: WELLS * x**2 / 2, event_shape=(), batch_shape=(2,), **kwargs
    )


MIXTURES = {
    "plain": lambda p: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), p),
    "wrapped": lambda p: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), p.expand([3, 2]).mask(True)
    ),
    "event": lambda p: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(3)), p.expand([3, 2]).to_event(1)
    ),
    "transformed": lambda p: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)),
        dist.TransformedDistribution(p, [dist.transforms.AffineTransform(0.0, 2.0)]),
    ),
    "zero_inflated": lambda p: dist.ZeroInflatedDistribution(p, gate=torch.tensor(0.2)),
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_needs_log_z_even_over_x(kind):
    mixture = MIXTURES[kind](components())
    x = torch.zeros(mixture.batch_shape + mixture.event_shape)
    with torch.no_grad(), pytest.raises(MissingNormalizerError, match="weighs its components"):
        mixture.log_prob(x)


def test_a_mixture_of_known_log_z_is_the_mixture():
    log_z = 0.5 * (2.0 * torch.pi / WELLS).log()
    ours = MIXTURES["plain"](components(log_normalizer=log_z)).log_prob(X)
    normal = dist.Normal(0.0, WELLS.rsqrt())
    assert torch.allclose(ours, MIXTURES["plain"](normal).log_prob(X))


def test_without_the_check_the_mixture_is_wrong():
    """The components' log Z differ by one nat, and with them the weights that they get."""
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        ours = MIXTURES["plain"](components()).log_prob(X)
    wrong = ours - MIXTURES["plain"](dist.Normal(0.0, WELLS.rsqrt())).log_prob(X)
    assert wrong.max() - wrong.min() > 0.1


def test_mixture_with_latent_weights_is_named_under_nuts():
    """No gradient reaches the components here, only the weights: the hook alone would be silent."""

    def model(x):
        weights = dist.Categorical(pyro.sample("w", dist.Dirichlet(torch.ones(2))))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(weights, components()), obs=x)

    with pytest.raises(MissingNormalizerError, match="site 'x'.*MixtureSameFamily"):
        nuts(model, X)


# --- variational factors and scales


def test_a_fixed_ebm_in_the_guide_needs_log_z():
    """No gradient is wrong there, but the value of the ELBO is off by log Z."""
    normal = dist.Normal(0.0, 1.0)

    def guide_of(**kwargs):
        p = EnergyDistribution(lambda z: z**2 / 2, event_shape=(), sampler=draw, **kwargs)
        return lambda: pyro.sample("z", p)

    def draw(p, shape):
        return normal.sample(shape)

    def model():
        pyro.sample("z", normal)

    log_z = 0.5 * math.log(2.0 * math.pi)
    loss = infer.Trace_ELBO().loss(model, guide_of(log_normalizer=log_z))
    assert loss == pytest.approx(0.0, abs=1e-6)
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        assert infer.Trace_ELBO().loss(model, guide_of()) == pytest.approx(log_z, abs=1e-6)
    with pytest.raises(MissingNormalizerError, match="a variational factor must be normalized"):
        infer.SVI(model, guide_of(), Adam({}), infer.Trace_ELBO()).step()


def test_a_vector_latent_counts_as_one():
    """Its parts are not told apart: log Z of the first part passes, and check_model names it."""
    theta = torch.tensor([2.0, 3.0], requires_grad=True)
    p = EnergyDistribution(
        lambda x: theta.prod() * x**2, event_shape=(), log_normalizer=-0.5 * theta[0].log()
    )
    p.log_prob(X).sum().backward()

    def model():
        t = pyro.sample("t", dist.Gamma(torch.tensor([4.0, 5.0]), 2.0).to_event(1))
        base = dist.Normal(0.0, 2.0)
        q = EnergyDistribution(lambda x: t.prod() * x**2, base, log_normalizer=-0.5 * t[0].log())
        pyro.sample("x", q, obs=torch.tensor(0.3))

    with pytest.raises(MissingNormalizerError, match="not the log Z of this energy"):
        check_model(model)


def test_subclass_with_another_energy_has_another_log_z():
    class Quartically(GaussianEnergy):
        def forward(self, x):
            return super().forward(x) + 0.1 * x**4

    class Shifted(GaussianEnergy):
        def forward(self, x):
            return super().forward(x) + 3.0

        def log_normalizer(self):
            return super().log_normalizer() - 3.0

    assert EnergyDistribution(GaussianEnergy(0.0, 1.0)).is_normalized
    assert EnergyDistribution(Shifted(0.0, 1.0)).is_normalized
    assert not EnergyDistribution(Shifted(0.0, 1.0)).has_exact_sample
    assert not EnergyDistribution(Quartically(0.0, 1.0), event_shape=()).is_normalized


def test_a_leaf_that_is_asked_for_by_name_counts():
    theta = leaf()
    with pytest.raises(MissingNormalizerError, match=r"but a value of shape \(\) would"):
        torch.autograd.grad(scaled(theta).log_prob(X).sum(), theta)
