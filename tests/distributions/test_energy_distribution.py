"""EnergyDistribution against closed forms, and the idioms of Pyro that a distribution must bear."""

from __future__ import annotations

import copy
import functools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints as C
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

from pyro_ebm import (
    EnergyDistribution,
    GeneralizedEBM,
    LatentReparam,
    LogNormalizer,
    MissingNormalizerError,
)
from pyro_ebm.energies import (
    Banana,
    DoubleWell,
    Energy,
    Funnel,
    GaussianEnergy,
    GaussianMixtureEnergy,
    MLPEnergy,
    Quartic,
)

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


# --- log_prob = -U - log Z -----------------------------------------------------------------------

LOC, SCALE = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([2.0, 0.3]).double()
PRECISION = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.8], dtype=torch.float64)
LOCS = torch.tensor([[0.0, 1.0], [2.0, -1.0]], dtype=torch.float64)


def mixture_truth():
    parts = dist.MultivariateNormal(LOCS, 0.25 * torch.eye(2))
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts)


CLOSED_FORMS = {
    "scalars": (lambda: GaussianEnergy(LOC, SCALE), lambda: dist.Normal(LOC, SCALE)),
    "vector": (
        lambda: GaussianEnergy(LOC, SCALE, event_dim=1),
        lambda: dist.Normal(LOC, SCALE).to_event(1),
    ),
    "precision": (
        lambda: GaussianEnergy(LOC, precision_matrix=PRECISION),
        lambda: dist.MultivariateNormal(LOC, precision_matrix=PRECISION),
    ),
    "mixture": (lambda: GaussianMixtureEnergy(LOCS, 0.5, 3.0 * WEIGHTS), mixture_truth),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_exact_energies_agree_with_pyro(name):
    energy, truth = (make() for make in CLOSED_FORMS[name])
    d, x = EnergyDistribution(energy), torch.randn(7, 2)
    assert d.is_normalized
    assert d.is_exact_energy
    assert d.has_exact_sample
    assert (d.batch_shape, d.event_shape) == (truth.batch_shape, truth.event_shape)
    torch.testing.assert_close(d.log_prob(x), truth.log_prob(x), rtol=1e-12, atol=1e-12)
    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(truth.log_prob(at).sum(), at)
    torch.testing.assert_close(d.score(x), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "energy",
    [
        DoubleWell(4.0),
        Quartic(1.0, -2.0),
        Banana(0.3, 1.1),
        GaussianMixtureEnergy.grid_of_gaussians(3),
    ],
    ids=lambda energy: type(energy).__name__,
)
def test_densities_integrate_to_one(energy):
    d = EnergyDistribution(energy.double())
    ticks = torch.linspace(-20.0, 20.0, 20_001 if not d.event_shape else 601)
    x = torch.cartesian_prod(ticks, ticks) if d.event_shape else ticks
    cell = (ticks[1] - ticks[0]) ** (1 + len(d.event_shape))
    torch.testing.assert_close(d.log_prob(x).exp().sum() * cell, torch.tensor(1.0))


def test_base_tilt_and_their_potentials():
    """A standard normal tilted by x^2 / 2 and then by -x is N(1/2, 1/2)."""
    d = EnergyDistribution(lambda x: 0.5 * x**2, base=dist.Normal(0.0, 1.0))
    x = torch.linspace(-2.0, 2.0, 5)
    torch.testing.assert_close(d.energy(x), 0.5 * x**2)
    torch.testing.assert_close(d.potential(x), x**2 + HALF_LOG_2PI)
    torch.testing.assert_close(d.score(x), -2 * x)
    tilted = d.tilt(lambda x: -x).with_log_normalizer(0.25 - 0.5 * math.log(2.0))
    torch.testing.assert_close(tilted.log_prob(x), dist.Normal(0.5, 0.5**0.5).log_prob(x))
    assert tilted.base is d.base
    assert not d.is_normalized
    torch.testing.assert_close(d.log_prob(x), d.unnormalized_log_prob(x))


def test_what_a_new_law_knows_of_log_z():
    exact = EnergyDistribution(GaussianEnergy(0.0, 2.0))
    based = EnergyDistribution(lambda x: x**2, dist.Normal(0.0, 1.0), log_normalizer=-0.5)
    assert not exact.tilt(torch.cos).is_normalized
    assert not exact.tilt(torch.cos).is_exact_energy
    assert exact.temper(1.0).is_normalized
    assert exact.temper(1).is_exact_energy
    assert not exact.temper(0.5).is_normalized
    assert not exact.temper(0.0).is_normalized  # a constant on the real line
    assert based.temper(1.0).log_normalizer == -0.5
    assert based.temper(0.0).log_normalizer == 0.0
    assert not based.temper(0.5).is_normalized
    assert not based.temper(torch.tensor(1.0)).is_normalized
    assert not based.with_log_normalizer(None).is_normalized
    assert exact.with_log_normalizer(None).is_normalized  # the energy still knows it


def test_temper_multiplies_the_energy_only():
    base, x = dist.Normal(1.0, 2.0), torch.randn(5)
    d = EnergyDistribution(lambda x: x**4, base)
    for beta in (0.0, 0.5, 1.0, torch.tensor(2.0)):
        torch.testing.assert_close(
            d.temper(beta).unnormalized_log_prob(x), base.log_prob(x) - beta * x**4
        )
    torch.testing.assert_close(d.temper(0.0).log_prob(x), base.log_prob(x))
    torch.testing.assert_close(d.temper(0.5).temper(4.0).energy(x), 2 * x**4)
    torch.testing.assert_close(d.temper(0.5).tilt(torch.cos).energy(x), 0.5 * x**4 + x.cos())


def test_as_base_puts_an_energy_on_top_of_a_normalized_law():
    d, x = EnergyDistribution(GaussianEnergy(0.0, 1.0)), torch.randn(5)
    top = d.as_base(lambda x: 0.5 * x**2)
    torch.testing.assert_close(top.energy(x), 0.5 * x**2)
    torch.testing.assert_close(top.potential(x), 0.5 * x**2 - dist.Normal(0.0, 1.0).log_prob(x))
    assert top.expand([3]).base.batch_shape == (3,)
    with pytest.raises(ValueError, match="as_base needs a normalized distribution"):
        d.tilt(torch.cos).as_base(torch.cos)


def test_an_exact_energy_on_part_of_its_support_is_not_exact():
    """exp(-x^2 / 2) on the positive reals has another log Z and other draws."""
    half = EnergyDistribution(GaussianEnergy(), support=C.positive)
    assert not half.is_normalized
    assert not half.has_exact_sample
    assert half.sample((20,)).min() > 0
    whole = EnergyDistribution(GaussianEnergy(), support=C.real, event_shape=())
    assert whole.is_exact_energy


# --- the kinds of log Z --------------------------------------------------------------------------


class Constant(nn.Module):
    def forward(self):
        return torch.tensor(HALF_LOG_2PI)


KINDS = {
    "float": lambda: HALF_LOG_2PI,
    "tensor": lambda: torch.tensor(HALF_LOG_2PI),
    "batched tensor": lambda: torch.full((3,), HALF_LOG_2PI),
    "parameter": lambda: nn.Parameter(torch.tensor(HALF_LOG_2PI)),
    "estimate": lambda: LogNormalizer(torch.tensor(HALF_LOG_2PI), torch.tensor(0.01), "by hand"),
    "function": lambda: lambda: torch.tensor(HALF_LOG_2PI),
    "function returning a float": lambda: lambda: HALF_LOG_2PI,
    "function returning an estimate": lambda: lambda: LogNormalizer(torch.tensor(HALF_LOG_2PI)),
    "module": Constant,
    "method": lambda: GaussianEnergy().log_normalizer,
    "partial": lambda: functools.partial(torch.tensor, HALF_LOG_2PI),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("late", [False, True])
def test_every_kind_of_log_normalizer(kind, late):
    known, x = KINDS[kind](), torch.randn(5, 3)
    arguments = {"event_shape": (), "batch_shape": (3,)}
    if late:
        d = EnergyDistribution(lambda x: 0.5 * x**2, **arguments).with_log_normalizer(known)
    else:
        d = EnergyDistribution(lambda x: 0.5 * x**2, log_normalizer=known, **arguments)
    assert d.is_normalized
    assert d.log_normalizer is known
    with torch.no_grad():
        value, truth = d.log_normalizer_value(), dist.Normal(0.0, 1.0).log_prob(x)
        torch.testing.assert_close(value.expand(3), torch.full((3,), HALF_LOG_2PI))
        torch.testing.assert_close(d.log_prob(x), truth, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(d.expand([5, 3]).log_prob(x), truth)


def test_a_stale_estimate_is_not_known():
    weight = nn.Parameter(torch.ones(()))
    estimate = LogNormalizer(torch.tensor(0.3), parameters=(weight,))
    d = EnergyDistribution(lambda x: weight * x**2, event_shape=(), log_normalizer=estimate)
    assert d.is_normalized
    with torch.no_grad():
        weight += 1.0
    assert not d.is_normalized
    assert d.log_normalizer_value() is None
    with torch.no_grad():
        assert d.log_prob(torch.tensor(1.0)) == -2.0


def test_log_z_carries_its_gradient():
    scale = torch.tensor(1.7, requires_grad=True)
    x = torch.randn(4)
    d = EnergyDistribution(GaussianEnergy(0.0, scale))
    (ours,) = torch.autograd.grad(d.log_prob(x).sum(), scale)
    (truth,) = torch.autograd.grad(dist.Normal(0.0, scale).log_prob(x).sum(), scale)
    torch.testing.assert_close(ours, truth)


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_dtype_in_is_dtype_out(default, dtype, shape):
    torch.set_default_dtype(default)
    x = torch.randn(shape, dtype=dtype)
    one = torch.ones((), dtype=dtype)
    mlp = MLPEnergy((), hidden=(4,), confinement=1.0).to(dtype)
    laws = [
        EnergyDistribution(lambda x: x**2, event_shape=(), log_normalizer=0.3),
        EnergyDistribution(lambda x: x**2, event_shape=(), log_normalizer=torch.tensor(0.3)),
        EnergyDistribution(lambda x: x**2, base=dist.Normal(0 * one, one)),
        EnergyDistribution(mlp, event_shape=()),
        EnergyDistribution(DoubleWell(4.0)),
        EnergyDistribution(GaussianEnergy(0.0, 2.0)),
        EnergyDistribution(GaussianEnergy(0.0, 2.0)).temper(0.5).tilt(torch.cos),
    ]
    for d in laws:
        assert d.log_prob(x).dtype == dtype
        assert d.energy(x).dtype == dtype
        assert d.score(x).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_take_the_dtype_of_base_or_parameters(dtype):
    one = torch.ones((), dtype=dtype)
    mlp = MLPEnergy((), hidden=(4,), confinement=1.0).to(dtype)
    assert EnergyDistribution(lambda x: x**2, dist.Normal(0 * one, one)).sample().dtype == dtype
    assert EnergyDistribution(mlp, event_shape=()).sample().dtype == dtype
    assert EnergyDistribution(GaussianEnergy(0 * one, one)).sample().dtype == dtype


def test_a_number_for_log_z_keeps_its_digits():
    torch.set_default_dtype(torch.float32)
    x = torch.tensor(0.7, dtype=torch.float64)
    d = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=(), log_normalizer=HALF_LOG_2PI)
    assert abs(d.log_prob(x).item() + 0.5 * 0.7**2 + HALF_LOG_2PI) < 1e-15


# --- score and derivatives -----------------------------------------------------------------------


def test_score_is_differentiable_in_x_and_in_parameters():
    net = MLPEnergy(2, hidden=(8,))
    d = EnergyDistribution(net, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    x = torch.randn(3, 2, requires_grad=True)

    def score_of(x):
        return d.score(x)

    assert torch.autograd.gradcheck(score_of, x)
    grads = torch.autograd.grad(d.score(x).square().sum(), [x, *list(net.parameters())[:-1]])
    assert all(g.isfinite().all() and (g != 0).any() for g in grads)
    assert x.grad is None


def test_score_matching_by_hand_finds_the_precision():
    """Hyvarinen's loss E[s'(x) + s(x)^2 / 2] has its minimum where the derivative here vanishes."""
    x = torch.randn(200_000) * 0.5
    precision = torch.tensor(1.0, requires_grad=True)
    d = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
    at = x.requires_grad_()
    score = d.score(at)
    (curvature,) = torch.autograd.grad(score.sum(), at, create_graph=True)
    loss = (curvature + 0.5 * score.square()).mean()
    (slope,) = torch.autograd.grad(loss, precision)
    torch.testing.assert_close(slope, -1 + x.square().mean().detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_score_without_grad_mode(mode):
    weight = nn.Parameter(torch.tensor(2.0))
    d = EnergyDistribution(lambda x: weight * x**2, event_shape=())
    with mode():
        score = d.score(torch.ones(3))
    assert not score.requires_grad
    torch.testing.assert_close(score, torch.full((3,), -4.0))
    with torch.inference_mode():
        x = torch.ones(3)
    torch.testing.assert_close(d.score(x), torch.full((3,), -4.0))
    assert weight.grad is None


# --- kinds of energies ---------------------------------------------------------------------------


def plain_function(x):
    return 0.5 * x.square().sum(-1)


class Callable_:
    def __call__(self, x):
        return plain_function(x)

    def method(self, x):
        return plain_function(x)


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.scale * x.square().sum(-1)


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.5), constraint=C.positive)

    def forward(self, x):
        return self.scale * x.square().sum(-1)


ENERGIES = {
    "function": lambda: plain_function,
    "lambda": lambda: lambda x: plain_function(x),
    "partial": lambda: functools.partial(torch.sum, dim=-1),
    "callable object": Callable_,
    "bound method": lambda: Callable_().method,
    "module": Module,
    "pyro module": Bayesian,
    "energy": lambda: GaussianEnergy(torch.zeros(2), event_dim=1) * 1.0,
    "sum": lambda: Module() + GaussianEnergy(torch.zeros(2), event_dim=1),
    "jit": lambda: torch.jit.script(Module()),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("kind", ENERGIES)
def test_any_callable_is_an_energy(kind):
    energy, x = ENERGIES[kind](), torch.randn(3, 2)
    d = EnergyDistribution(energy, base=dist.Normal(torch.zeros(2), 1.0).to_event(1))
    torch.testing.assert_close(d.energy(x), energy(x))
    assert d.energy_function is energy
    assert d.sample((4,)).shape == (4, 2)
    assert d.score(x).shape == (3, 2)
    assert "log Z unknown" in repr(d)


def test_a_pyro_module_energy_registers_in_the_model_and_nowhere_else():
    energy = Bayesian()

    def model():
        pyro.sample("x", EnergyDistribution(energy, event_shape=(2,)), obs=torch.ones(2))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert "x" in trace.nodes
    d = EnergyDistribution(energy, event_shape=(2,))
    assert not [name for name in poutine.trace(d.sample).get_trace().nodes if name[0] != "_"]


class Bayes(PyroModule):
    """w x^2 / 2 with w ~ Gamma(2, 1)."""

    def __init__(self):
        super().__init__()
        self.w = PyroSample(dist.Gamma(torch.tensor(2.0), 1.0))

    def forward(self, x):
        return 0.5 * self.w * x**2


class Whole(PyroModule):
    """The same inside a model that is a module itself."""

    def __init__(self):
        super().__init__()
        self.energy = Bayes()

    def forward(self, data):
        return gamma_model(self.energy)(data)


def gamma_model(energy):
    def model(data):
        def log_z():
            return HALF_LOG_2PI - 0.5 * energy.w.log()

        d = EnergyDistribution(energy, event_shape=(), log_normalizer=log_z)
        with pyro.plate("rows", len(data)):
            pyro.sample("x", d, obs=data)

    return model


@pytest.mark.parametrize(
    ("model", "name"), [(lambda: gamma_model(Bayes()), "w"), (Whole, "energy.w")]
)
def test_random_weights_are_latent_sites_of_the_model(model, name):
    """Pyro scores after the model has run: the weights must be those of the run, not new ones."""
    model, data = model(), torch.randn(20)
    trace = poutine.trace(model).get_trace(data)
    trace.compute_log_prob()
    w = trace.nodes[name]["value"]
    truth = dist.Normal(0.0, w**-0.5).log_prob(data)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], truth)
    _, potential, transforms, _ = initialize_model(model, (data,))
    at = torch.tensor(0.3, requires_grad=True)
    (slope,) = torch.autograd.grad(potential({name: at}), at)
    posterior = dist.Gamma(2 + len(data) / 2, 1 + 0.5 * data.square().sum())
    log_w = torch.tensor(0.3, requires_grad=True)
    (truth,) = torch.autograd.grad(-posterior.log_prob(log_w.exp()) - log_w, log_w)
    torch.testing.assert_close(slope, truth)


def test_random_weights_without_log_z_are_guarded_and_tempering_keeps_them():
    net = Bayes()

    def model(data):
        d = EnergyDistribution(net, event_shape=(), batch_shape=(20,))
        assert d.temper(0.5).tilt(torch.cos).expand([3, 20]).energy(data).shape == (3, 20)
        torch.testing.assert_close(d.temper(0.5).energy(data), 0.5 * d.energy(data))
        pyro.sample("x", d.to_event(1), obs=data)

    with pytest.raises(MissingNormalizerError, match="latent 'w'"):
        MCMC(NUTS(model), num_samples=1, warmup_steps=1, disable_progbar=True).run(torch.randn(20))


def test_random_weights_of_a_generator():
    class Generator(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroSample(dist.Gamma(torch.tensor(2.0), 1.0))

        def forward(self, z):
            return self.scale * z

    generator, energy = Generator(), Bayes()

    def model():
        prior = dist.Normal(torch.zeros(2), 1.0)
        return pyro.sample("x", GeneralizedEBM(generator, prior, energy))

    names = set(poutine.trace(model).get_trace().nodes) - {"_INPUT", "_RETURN"}
    assert names == {"w", "scale", "x"}
    trace = poutine.trace(poutine.reparam(model, {"x": LatentReparam()})).get_trace()
    trace.compute_log_prob()
    z, w, scale = (trace.nodes[name]["value"] for name in ("x_latent", "w", "scale"))
    torch.testing.assert_close(trace.nodes["x"]["value"], scale * z)
    truth = dist.Normal(0.0, 1.0).log_prob(z) - 0.5 * w * (scale * z) ** 2
    torch.testing.assert_close(trace.nodes["x_latent"]["log_prob"], truth)


def test_an_energy_that_draws_when_evaluated_is_refused():
    def energy(x):
        return pyro.sample("w", dist.Gamma(2.0, 1.0)) * x**2

    d = EnergyDistribution(energy, event_shape=())
    for use in (d.log_prob, d.energy, d.score):
        with pytest.raises(RuntimeError, match=r"executes pyro.sample\('w'\) when it is evaluated"):
            use(torch.tensor(1.0))
    with pytest.raises(RuntimeError, match="draw the value in the model"):
        d.sample()


# --- copies and wrappers -------------------------------------------------------------------------


class Special(EnergyDistribution):
    """A subclass with an attribute of its own."""

    extra = 3


def test_expand_keeps_the_class_and_the_rest():
    sampler = functools.partial(zeros_like_target)
    d = Special(
        plain_function, event_shape=(2,), log_normalizer=1.0, sampler=sampler, conditional=False
    )
    wide = d.expand([4, 3])
    assert type(wide) is Special
    assert wide.batch_shape == (4, 3)
    assert wide.shape() == (4, 3, 2)
    assert (wide.sampler, wide.conditional, wide.log_normalizer) == (sampler, False, 1.0)
    assert d.batch_shape == ()
    assert wide.sample((5,)).shape == (5, 4, 3, 2)
    assert wide.expand([7, 4, 3]).log_prob(torch.zeros(2)).shape == (7, 4, 3)
    assert type(d.expand_by([4])) is Special
    assert d(sample_shape=torch.Size([2])).shape == (2, 2)


def zeros_like_target(target, shape):
    return torch.zeros(shape + target.batch_shape + target.event_shape)


@pytest.mark.parametrize("shape", [[5], [], [3, 5], [2]])
def test_expand_refuses_what_does_not_broadcast(shape):
    d = EnergyDistribution(GaussianEnergy(torch.zeros(3)))
    with pytest.raises(ValueError, match="batch_shape"):
        d.expand(shape)


def test_to_event_mask_and_expand_score_like_a_normal():
    d, x = EnergyDistribution(GaussianEnergy(LOC, SCALE)), torch.randn(4, 2)
    truth = dist.Normal(LOC, SCALE)
    mask = torch.tensor([True, False, True, True])
    for wrap in (
        lambda d: d.to_event(1),
        lambda d: d.expand([4, 2]).to_event(1).mask(mask),
        lambda d: d.expand([4, 2]).mask(mask.unsqueeze(-1)),
        lambda d: d.mask(False),
        lambda d: d.expand([4, 2]).to_event(2),
        lambda d: d.to_event(1).expand([4]),
    ):
        torch.testing.assert_close(wrap(d).log_prob(x), wrap(truth).log_prob(x))
        assert wrap(d).sample().shape == wrap(truth).sample().shape


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda d: pickle.loads(pickle.dumps(d))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_are_the_same_law(copied):
    x = torch.rand(3, 2)
    base = dist.Gamma(torch.tensor([1.0, 2.0]), 1.0).to_event(1)
    for d in (
        EnergyDistribution(Module(), base=base, log_normalizer=0.3),
        EnergyDistribution(GaussianEnergy(LOC, SCALE, event_dim=1)),
        EnergyDistribution(plain_function, support=C.positive, event_shape=(2,)).expand([3]),
        EnergyDistribution(Module(), event_shape=(2,), log_normalizer=LogNormalizer(0.3)),
        EnergyDistribution(GaussianEnergy(LOC, SCALE)).to_event(1).mask(True),
    ):
        new = copied(d)
        assert new.shape() == d.shape()
        torch.testing.assert_close(new.log_prob(x), d.log_prob(x))
    assert new.sample((2,)).shape == (2, 2)


# --- what it cannot do, said ---------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["mean", "variance", "stddev"])
def test_moments_name_the_way_to_estimate_them(moment):
    with pytest.raises(NotImplementedError, match=r"estimate it from draws .* draws\.(mean|var)"):
        getattr(EnergyDistribution(GaussianEnergy()), moment)


def test_entropy_names_the_way_to_estimate_it():
    with pytest.raises(NotImplementedError, match=r"d\.potential\(draws\)\.mean\(0\) \+ log Z"):
        EnergyDistribution(GaussianEnergy()).entropy()


def test_no_kl_is_registered():
    d, q = EnergyDistribution(GaussianEnergy()), dist.Normal(0.0, 1.0)
    for pair in ((d, q), (q, d), (d, d)):
        with pytest.raises(NotImplementedError):
            torch.distributions.kl_divergence(*pair)


def test_enumeration_needs_a_known_log_z_and_a_finite_scalar():
    def energy(x):
        return x

    boolean = EnergyDistribution(energy, event_shape=(), support=C.boolean)
    assert not boolean.has_enumerate_support
    with pytest.raises(NotImplementedError, match="known log Z"):
        boolean.enumerate_support()
    known = boolean.with_log_normalizer(math.log1p(math.exp(-1.0)))
    assert known.has_enumerate_support
    torch.testing.assert_close(known.enumerate_support(), torch.tensor([0.0, 1.0]))
    assert not EnergyDistribution(GaussianEnergy()).has_enumerate_support
    counts = EnergyDistribution(
        energy, event_shape=(), support=C.nonnegative_integer, log_normalizer=0.4586751
    )
    assert not counts.has_enumerate_support


def test_enumerated_values_are_typed_as_the_base_types_them():
    base = dist.Categorical(torch.ones(3))
    d = EnergyDistribution(lambda k: 0.0 * k, base, log_normalizer=0.0)
    assert d.enumerate_support().dtype == torch.int64
    assert d.sample((20,)).dtype == torch.int64


# --- Pyro's handlers and guides ------------------------------------------------------------------


def ebm_prior_model(data):
    """A latent from an unnormalized law, N(1, 1/2) in truth, and unit-variance data around it."""
    energy = EnergyDistribution(lambda x: (x - 1.0) ** 2, event_shape=())
    x = pyro.sample("x", energy)
    with pyro.plate("rows", len(data)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=data)


DATA = torch.tensor([0.2, 1.0, -0.3, 0.8], dtype=torch.float64)
POSTERIOR = (2.0 + DATA.sum()) / 6.0, 6.0**-0.5  # precision 2 + 4


def test_condition_scores_the_given_value():
    trace = poutine.trace(poutine.condition(ebm_prior_model, {"x": torch.tensor(3.0)})).get_trace(
        DATA
    )
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"] == -4.0
    assert trace.nodes["x"]["is_observed"]


def test_do_and_replay_and_substitute_carry_values():
    guide_trace = poutine.trace(lambda data: pyro.sample("x", dist.Delta(torch.tensor(2.0))))
    model = poutine.replay(ebm_prior_model, trace=guide_trace.get_trace(DATA))
    assert poutine.trace(model).get_trace(DATA).nodes["x"]["value"] == 2.0
    done = poutine.do(ebm_prior_model, {"x": torch.tensor(5.0)})
    assert poutine.trace(done).get_trace(DATA).nodes["y"]["fn"].loc[0] == 5.0


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta, AutoMultivariateNormal])
def test_autoguides_find_the_posterior(guide):
    """The guide's own optimum is the posterior, whatever constant the EBM's density lacks."""
    guide = guide(ebm_prior_model)
    svi = SVI(ebm_prior_model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(100):
        svi.step(DATA)
    torch.testing.assert_close(guide.median(DATA)["x"], POSTERIOR[0], atol=0.15, rtol=0)


def test_the_elbo_of_a_latent_ebm_is_exact_up_to_log_z():
    """At the true posterior every particle gives log evidence + log Z, without noise."""

    def guide(data):
        pyro.sample("x", dist.Normal(POSTERIOR[0], POSTERIOR[1]))

    loss = [Trace_ELBO().loss(ebm_prior_model, guide, DATA) for _ in range(3)]
    marginal = dist.MultivariateNormal(torch.ones(4), torch.eye(4) + 0.5)
    truth = -marginal.log_prob(DATA) - 0.5 * math.log(math.pi)
    torch.testing.assert_close(torch.tensor(loss), truth.expand(3))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_prior_and_posterior(parallel):
    def model(rows=None):
        with pyro.plate("rows", 3):
            x = pyro.sample("x", EnergyDistribution(GaussianEnergy(LOC, SCALE, event_dim=1)))
            return pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=rows)

    prior = Predictive(model, num_samples=6, parallel=parallel)()
    assert prior["x"].shape == (6, 3, 2)
    assert prior["x"].flatten().unique().numel() == 36
    posterior = {"x": torch.arange(36.0).reshape(6, 3, 2)}
    after = Predictive(model, posterior_samples=posterior, parallel=parallel)()
    assert (after["y"] - posterior["x"]).abs().max() < 6
    assert set(after) == {"y"}


def test_svi_learns_a_parameter_through_a_tractable_energy():
    """Maximum likelihood of N(m, s) is the sample mean and standard deviation."""
    data = 2.0 + 0.5 * torch.randn(50)

    def model():
        m = pyro.param("m", torch.tensor(0.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("rows", 50):
            pyro.sample("x", EnergyDistribution(GaussianEnergy(m, s)), obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step()
    torch.testing.assert_close(pyro.param("m").detach(), data.mean(), atol=1e-3, rtol=0)
    torch.testing.assert_close(pyro.param("s").detach(), data.std(correction=0), atol=1e-3, rtol=0)


# --- parameters given as tensors -----------------------------------------------------------------


class Precision(Energy):
    """w x^2 / 2 on the reals, which knows its own log Z."""

    def __init__(self, w):
        super().__init__()
        self._set("w", w, positive=True)
        self.event_shape, self.support = torch.Size(), C.real

    def forward(self, x):
        return 0.5 * self._arg("w", x) * x**2

    def log_normalizer(self):
        return HALF_LOG_2PI - 0.5 * self.w.log()

    def sample(self, shape):
        return torch.randn(torch.Size(shape) + self.w.shape) / self.w.sqrt()


class WithoutLogZ(Precision):
    """The planted bug: log Z claimed, but as if it did not depend on the precision."""

    def log_normalizer(self):
        return HALF_LOG_2PI + 0.0 * self.w


def precision_model(energy, data):
    def model():
        w = pyro.sample("w", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("rows", len(data)):
            pyro.sample("x", EnergyDistribution(energy(w)), obs=data)

    return model


@pytest.mark.parametrize(("energy", "right"), [(Precision, True), (WithoutLogZ, False)])
def test_the_potential_over_a_parameter_is_the_conjugate_posterior(energy, right):
    """w ~ Gamma(2, 1) and 50 points of N(0, 1/3): Gamma(27, 1 + S), as NUTS sees it, in log w."""
    data = torch.randn(50) / 3**0.5
    _, potential, _, _ = initialize_model(precision_model(energy, data))
    log_w = torch.linspace(-1.0, 2.0, 7)
    values = torch.stack([potential({"w": u}).detach() for u in log_w])
    posterior = dist.Gamma(27.0, 1 + 0.5 * data.square().sum())
    truth = -posterior.log_prob(log_w.exp()) - log_w
    differences = (values - values[0]) - (truth - truth[0])
    assert (differences.abs().max() < 1e-10).item() is right


@pytest.mark.slow
@pytest.mark.parametrize(("energy", "right"), [(Precision, True), (WithoutLogZ, False)])
def test_nuts_over_a_parameter_finds_the_conjugate_posterior(energy, right):
    """The mean of Gamma(27, 1 + S); without log Z NUTS finds that of Gamma(2, 1 + S).

    Power: the planted bug moves the mean by a factor 13.5, hundreds of standard errors.
    """
    data = torch.randn(50) / 3**0.5
    mcmc = MCMC(
        NUTS(precision_model(energy, data)),
        num_samples=2500,
        warmup_steps=200,
        disable_progbar=True,
    )
    mcmc.run()
    z = z_of_mean(mcmc.get_samples()["w"], 27 / (1 + 0.5 * data.square().sum()))
    assert (abs(z) < 5) is right


def z_of_mean(draws, truth):
    import arviz as az

    chain = draws.numpy()[None]
    assert az.ess(chain).item() >= 400
    return float((draws.mean() - truth) / az.mcse(chain).item())


def test_funnel_as_a_prior_has_a_gradient_to_its_scale():
    scale = torch.tensor(2.0, requires_grad=True)
    d = EnergyDistribution(Funnel(3, scale))
    (slope,) = torch.autograd.grad(d.log_prob(torch.ones(3)), scale)
    assert slope.isfinite()
    assert slope != 0
