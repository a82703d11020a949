"""Small models that put a dependence of log Z in every place where one can hide.

Each public function builds a fresh :class:`Setup`: its name is the *position* of a row of the
table, its docstring the row's description. The data are 50 points of the density proportional to
``exp(-theta x^2 / 2)`` at ``theta = 3``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyro_ebm import (
    EnergyDistribution,
    GeneralizedEBM,
    LatentReparam,
    LogNormalizer,
    energy_factor,
)
from pyro_ebm.energies import GaussianEnergy, MLPEnergy, Quartic, ScaledEnergy, SumEnergy
from pyro_ebm.ops.constraints import spins

X = dist.Normal(0.0, 3.0**-0.5).icdf(torch.linspace(0.01, 0.99, 50))
Y = torch.tensor([0.4, -0.2, 1.0])
THETA = {"theta": torch.tensor(3.0)}


@dataclass
class Setup:
    """A model, what it is run on, and where and against what its log density is proved wrong.

    Attributes:
        model: The model as a user would write it.
        args: Its arguments.
        guide: A guide where an automatic one will not do.
        at: Values of the latents with respect to which gradients are compared.
        held: Values of the latents that are events of an EBM site themselves.
        uncovered: The latents (of a mixture, the site) that ``check_model`` must name; none where
            it must stay silent.
        scored: What holds the faulty density, if it is not the model (a guide).
        meant: The model that was meant, if it is not ``model`` with its log Z filled in.
        weights: Network weights, to freeze them.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    guide: Callable[..., Any] | None = None
    at: dict[str, Tensor] = field(default_factory=lambda: THETA)
    held: dict[str, Tensor] = field(default_factory=dict)
    uncovered: tuple[str, ...] = ()
    scored: Callable[..., Any] | None = None
    meant: Callable[..., Any] | None = None
    weights: tuple[Tensor, ...] = ()


def half_square(x: Tensor) -> Tensor:
    """The energy of a standard normal."""
    return 0.5 * x**2


def _draw(d: EnergyDistribution, shape: torch.Size) -> Tensor:
    """A stand-in for a chain: set-up needs a value, not a draw."""
    return 0.5 + 0.1 * torch.randn(shape + d.batch_shape + d.event_shape)


def _ebm(energy: Callable[[Tensor], Tensor], **kwargs: Any) -> EnergyDistribution:
    kwargs = kwargs if "base" in kwargs else {"event_shape": (), **kwargs}
    return EnergyDistribution(energy, sampler=_draw, **kwargs)


def _theta() -> Tensor:
    return pyro.sample("theta", dist.Gamma(2.0, 1.0))


def _likelihood(x: Tensor, y: Tensor) -> None:
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def _latent(make: Callable[[Tensor], Any], x: Tensor = X, **kwargs: Any) -> Setup:
    """The model ``theta ~ Gamma(2, 1), x_n ~ make(theta)`` with data ``x``."""

    def model(x: Tensor) -> None:
        p = make(_theta())
        with pyro.plate("n", len(x)):
            pyro.sample("x", p, obs=x)

    return Setup(model, (x,), **{"uncovered": ("theta",), **kwargs})


# --- a latent in the energy


def closure() -> Setup:
    """A latent in the closure of the energy."""
    return _latent(lambda t: _ebm(lambda x: t * half_square(x)))


def buffer() -> Setup:
    """A latent kept as a buffer of an energy module."""
    return _latent(lambda t: _ebm(ScaledEnergy(half_square, t)))


def nested_module() -> Setup:
    """A latent four modules deep."""

    def make(t: Tensor) -> EnergyDistribution:
        inner = ScaledEnergy(ScaledEnergy(half_square, t), 0.5)
        return _ebm(SumEnergy(torch.cos, SumEnergy(inner, half_square)))

    return _latent(make)


def callable_object() -> Setup:
    """A latent kept as an attribute of a callable object."""

    class Energy:
        def __init__(self, t: Tensor) -> None:
            self.t = t

        def __call__(self, x: Tensor) -> Tensor:
            return self.t * half_square(x)

    return _latent(lambda t: _ebm(Energy(t)))


def pyro_module() -> Setup:
    """A ``PyroSample`` attribute of a ``PyroModule`` model."""

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.theta = PyroSample(dist.Gamma(2.0, 1.0))

        def forward(self, x: Tensor) -> None:
            t = self.theta
            with pyro.plate("n", len(x)):
                pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

    return Setup(Model(), (X,), uncovered=("theta",))


def checkpointed() -> Setup:
    """A latent in an energy under (non-reentrant) gradient checkpointing."""

    def energy(x: Tensor, t: Tensor) -> Tensor:
        return t * half_square(x)

    return _latent(lambda t: _ebm(lambda x: checkpoint(energy, x, t, use_reentrant=False)))


def tempered() -> Setup:
    """An exact energy at a latent temperature."""
    return _latent(lambda t: EnergyDistribution(GaussianEnergy()).temper(t))


def tilted() -> Setup:
    """An exact energy tilted by a latent."""
    return _latent(lambda t: EnergyDistribution(GaussianEnergy()).tilt(lambda x: t * x**4))


def vector_latent() -> Setup:
    """A vector of latents in an energy of vectors."""

    def model(x: Tensor) -> None:
        t = pyro.sample("theta", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("n", len(x)):
            p = _ebm(lambda x: (t * half_square(x)).sum(-1), event_shape=(2,))
            pyro.sample("x", p, obs=x)

    data = torch.stack([X, X.flip(0)], -1)
    return Setup(model, (data,), at={"theta": torch.tensor([3.0, 2.0])}, uncovered=("theta",))


def row_wise() -> Setup:
    """One latent for every row of a plate."""

    def model(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            t = _theta()
            pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

    return Setup(model, (X,), at={"theta": torch.full((50,), 3.0)}, uncovered=("theta",))


# --- other supports


def positive_support() -> Setup:
    """A latent rate on the positive half line."""
    return _latent(lambda t: _ebm(lambda x: t * x, support=constraints.positive), X.abs())


def integers() -> Setup:
    """A latent slope on integers from 0 to 4."""
    support = constraints.integer_interval(0, 4)
    data = torch.tensor([0, 1, 0, 2, 0])
    at = {"theta": torch.tensor(0.7)}
    return _latent(lambda t: _ebm(lambda x: t * x.float(), support=support), data, at=at)


def spin_pair() -> Setup:
    """A latent coupling of two spins."""

    def make(t: Tensor) -> EnergyDistribution:
        return _ebm(lambda x: -t * x.prod(-1), support=spins, event_shape=(2,))

    data = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    return _latent(make, data, at={"theta": torch.tensor(0.7)})


# --- a latent in the base


def base_scale() -> Setup:
    """A latent scale of the base under a fixed energy."""
    return _latent(lambda t: _ebm(lambda x: x**4, base=dist.Normal(0.0, t)))


def base_loc() -> Setup:
    """A latent location of the base under a fixed energy."""
    return _latent(lambda t: _ebm(half_square, base=dist.Normal(t, 1.0)))


def base_flow() -> Setup:
    """A latent in a flow that is the base."""

    def make(t: Tensor) -> EnergyDistribution:
        stretch = dist.transforms.AffineTransform(0.0, t)
        flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [stretch])
        return _ebm(lambda x: x**4, base=flow)

    return _latent(make)


def base_ebm() -> Setup:
    """A latent in an exact EBM that serves as base of another."""

    def make(t: Tensor) -> EnergyDistribution:
        return EnergyDistribution(GaussianEnergy(0.0, t)).as_base(lambda x: x**4)

    return _latent(make)


# --- plates, to_event, masks


def to_event() -> Setup:
    """A latent; the site is ``expand(...).to_event(1)`` instead of a plate."""

    def model(x: Tensor) -> None:
        t = _theta()
        p = _ebm(lambda x: t * half_square(x)).expand([len(x)]).to_event(1)
        pyro.sample("x", p, obs=x)

    return Setup(model, (X,), uncovered=("theta",))


def masked() -> Setup:
    """A latent; half of the rows are masked by ``.mask``."""
    return _latent(lambda t: _ebm(lambda x: t * half_square(x)).expand([50]).mask(X > 0.0))


def handler_mask() -> Setup:
    """A latent; half of the rows are masked by ``poutine.mask``."""

    def model(x: Tensor) -> None:
        t = _theta()
        with pyro.plate("n", len(x)), poutine.mask(mask=x > 0):
            pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

    return Setup(model, (X,), uncovered=("theta",))


def masked_out() -> Setup:
    """A latent; the whole site is masked out."""
    return _latent(lambda t: _ebm(lambda x: t * half_square(x)).mask(False), uncovered=())


def subsampled() -> Setup:
    """A latent; the plate is subsampled."""

    def model(x: Tensor) -> None:
        t = _theta()
        with pyro.plate("n", len(x), subsample_size=5) as rows:
            pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x[rows])

    return Setup(model, (X,), uncovered=("theta",))


def nested_plates() -> Setup:
    """A latent; the site is in two plates."""

    def model(x: Tensor) -> None:
        t = _theta()
        with pyro.plate("b", x.shape[1], dim=-1), pyro.plate("a", x.shape[0], dim=-2):
            pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

    return Setup(model, (X.reshape(10, 5),), uncovered=("theta",))


# --- latent EBM sites


def latent_site() -> Setup:
    """A latent in the energy of an unobserved site that has a likelihood."""

    def model(y: Tensor) -> None:
        t = _theta()
        _likelihood(pyro.sample("x", _ebm(lambda x: t * half_square(x))), y)

    return Setup(model, (Y,), uncovered=("theta",))


def hierarchy() -> Setup:
    """An unobserved EBM site whose energy depends on an ordinary latent."""

    def model(y: Tensor) -> None:
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", _ebm(lambda z: (1.0 + z1**2) * half_square(z)))
        _likelihood(z2, y)

    return Setup(model, (Y,), at={"z1": torch.tensor(1.2)}, uncovered=("z1",))


def chain_of_ebms() -> Setup:
    """An EBM site whose base is centred at another EBM site."""

    def model(y: Tensor) -> None:
        z1 = pyro.sample("z1", _ebm(lambda z: z**4))
        z2 = pyro.sample("z2", _ebm(lambda z: z**4, base=dist.Normal(z1, 1.0)))
        _likelihood(z2, y)

    return Setup(model, (Y,), at={"z1": torch.tensor(0.8)}, uncovered=("z1",))


def two_sites() -> Setup:
    """A latent in two sites, of which one knows its log Z."""

    def model(x: Tensor) -> None:
        t = _theta()
        with pyro.plate("n", len(x)):
            pyro.sample("good", EnergyDistribution(GaussianEnergy(0.0, t)), obs=x)
            pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

    return Setup(model, (X,), uncovered=("theta",))


def _gebm(make: Callable[[Tensor], GeneralizedEBM], **kwargs: Any) -> Setup:
    def model(y: Tensor) -> None:
        _likelihood(pyro.sample("x", make(_theta())), y)

    reparam = poutine.reparam(model, {"x": LatentReparam()})
    at, held = {"theta": torch.tensor(0.7)}, {"x_latent": torch.tensor(0.6)}
    return Setup(reparam, (Y,), at=at, held=held, **{"uncovered": ("theta",), **kwargs})


_NORMAL = dist.Normal(0.0, 1.0)


def gebm_energy() -> Setup:
    """A latent in the energy of a generalized EBM, by ``LatentReparam``."""
    return _gebm(lambda t: GeneralizedEBM(torch.sinh, _NORMAL, lambda x: t * x**2))


def gebm_generator() -> Setup:
    """A latent in the generator of a generalized EBM, by ``LatentReparam``."""
    return _gebm(lambda t: GeneralizedEBM(lambda z: t * z, _NORMAL, half_square))


def gebm_prior() -> Setup:
    """A latent in the prior of a generalized EBM, by ``LatentReparam``."""
    return _gebm(lambda t: GeneralizedEBM(torch.sinh, dist.Normal(0.0, t), half_square))


def gebm_fixed() -> Setup:
    """A fixed generalized EBM, by ``LatentReparam``."""
    return _gebm(lambda t: GeneralizedEBM(torch.sinh, _NORMAL, half_square), uncovered=())


def ebm_after_gebm() -> Setup:
    """An EBM site whose energy depends on the output of a generalized EBM, by ``LatentReparam``."""

    def model(y: Tensor) -> None:
        x = pyro.sample("x", GeneralizedEBM(torch.sinh, _NORMAL, half_square))
        with pyro.plate("n", len(y)):
            pyro.sample("y", _ebm(lambda y: (1.0 + x**2) * half_square(y)), obs=y)

    reparam = poutine.reparam(model, {"x": LatentReparam()})
    return Setup(reparam, (Y,), at={"x_latent": torch.tensor(0.6)}, uncovered=("x_latent",))


def flow_reparam() -> Setup:
    """A latent in a flow base, by ``LatentReparam``."""

    def model(y: Tensor) -> None:
        stretch = dist.transforms.AffineTransform(0.0, _theta())
        flow = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [stretch])
        _likelihood(pyro.sample("x", _ebm(lambda x: x**4, base=flow)), y)

    reparam = poutine.reparam(model, {"x": LatentReparam()})
    at, held = {"theta": torch.tensor(0.7)}, {"x_latent": torch.tensor(0.6)}
    return Setup(reparam, (Y,), at=at, held=held, uncovered=("theta",))


# --- something was given as log Z


def _given(log_z: Callable[[Tensor], Any], **kwargs: Any) -> Setup:
    def make(t: Tensor) -> EnergyDistribution:
        return _ebm(lambda x: t * half_square(x), log_normalizer=log_z(t))

    return _latent(make, **kwargs)


def constant_float() -> Setup:
    """A latent in the energy, and log Z given as a number."""
    return _given(lambda t: 0.37)


def constant_tensor() -> Setup:
    """A latent in the energy, and log Z given as a tensor without a graph."""
    return _given(lambda t: torch.tensor(0.37))


def constant_parameter() -> Setup:
    """A latent in the energy, and log Z given as one ``nn.Parameter``."""
    c = nn.Parameter(torch.tensor(0.37))
    return _given(lambda t: c)


def constant_estimate() -> Setup:
    """A latent in the energy, and log Z given as an estimate with its error bar."""
    return _given(lambda t: LogNormalizer(torch.tensor(0.37), torch.tensor(0.01), "importance"))


def constant_detached() -> Setup:
    """A latent in the energy, and its true log Z given detached from the graph."""
    return _given(lambda t: -0.5 * t.detach().log())


def half_covered() -> Setup:
    """Latents in energy and base, and log Z given as a function of the first only."""

    def model(x: Tensor) -> None:
        t, s = _theta(), pyro.sample("s", dist.Gamma(2.0, 1.0))
        log_z = -0.5 * (1.0 + t).log()
        p = _ebm(lambda x: t * half_square(x), base=dist.Normal(0.0, s), log_normalizer=log_z)
        with pyro.plate("n", len(x)):
            pyro.sample("x", p, obs=x)

    return Setup(model, (X,), at={**THETA, "s": torch.tensor(0.6)}, uncovered=("s",))


def _covering(log_z: Callable[[Tensor], Any]) -> Setup:
    def make(t: Tensor) -> EnergyDistribution:
        return EnergyDistribution(
            lambda x: t * half_square(x),
            event_shape=(),
            log_normalizer=log_z(t),
            sampler=lambda d, shape: torch.randn(shape + d.batch_shape) * t.rsqrt(),
        )

    return _latent(make, uncovered=())


def covering_tensor() -> Setup:
    """A latent, and log Z given as a tensor computed from it."""
    return _covering(lambda t: 0.5 * (2.0 * torch.pi / t).log())


def covering_callable() -> Setup:
    """A latent, and log Z given as a function that returns it."""
    return _covering(lambda t: lambda: 0.5 * (2.0 * torch.pi / t).log())


def exact_gaussian() -> Setup:
    """A latent scale of an energy that knows its own log Z in closed form."""
    return _latent(lambda t: EnergyDistribution(GaussianEnergy(0.5, t.rsqrt())), uncovered=())


def exact_quartic() -> Setup:
    """A latent in an energy that knows its own log Z by quadrature."""
    return _latent(lambda t: EnergyDistribution(Quartic(t, -1.0)), uncovered=())


# --- trained parameters


def _a() -> Tensor:
    return pyro.param("a", torch.tensor(3.0), constraint=constraints.positive)


def _trained(make: Callable[[], EnergyDistribution], weights: tuple[Tensor, ...] = ()) -> Setup:
    def model(x: Tensor) -> None:
        p = make()
        with pyro.plate("n", len(x)):
            pyro.sample("x", p, obs=x)

    return Setup(model, (X,), lambda x: None, at={}, weights=weights)


def _net() -> MLPEnergy:
    return MLPEnergy((), (8,), confinement=1.0)


def param() -> Setup:
    """A ``pyro.param`` in the energy."""

    def make() -> EnergyDistribution:
        a = _a()
        return _ebm(lambda x: a * half_square(x))

    return _trained(make)


def param_in_base() -> Setup:
    """A ``pyro.param`` in the base."""
    return _trained(lambda: _ebm(lambda x: x**4, base=dist.Normal(0.0, _a())))


def param_constant() -> Setup:
    """A ``pyro.param`` in the energy, and log Z given as a number."""

    def make() -> EnergyDistribution:
        a = _a()
        return _ebm(lambda x: a * half_square(x), log_normalizer=0.37)

    return _trained(make)


def param_exact() -> Setup:
    """A ``pyro.param`` in an energy that knows its own log Z."""
    return _trained(lambda: EnergyDistribution(GaussianEnergy(0.5, _a())))


def network() -> Setup:
    """The weights of a network registered by ``pyro.module``."""
    net = _net()
    return _trained(lambda: _ebm(pyro.module("net", net)), tuple(net.parameters()))


def network_with_base() -> Setup:
    """The weights of a network on top of a normal base."""
    net = _net()

    def make() -> EnergyDistribution:
        return _ebm(pyro.module("net", net), base=dist.Normal(0.0, 1.0))

    return _trained(make, tuple(net.parameters()))


def network_in_base() -> Setup:
    """The weights of a network that computes the base's location."""
    net = nn.Linear(1, 1)

    def make() -> EnergyDistribution:
        loc = pyro.module("net", net)(torch.ones(1)).squeeze(-1)
        return _ebm(lambda x: x**4, base=dist.Normal(loc, 1.0))

    return _trained(make, tuple(net.parameters()))


def conditional_network() -> Setup:
    """The weights of a network that sees a covariate beside x."""
    net = MLPEnergy(2, (8,), confinement=1.0)
    context = torch.linspace(-1.0, 1.0, len(X))

    def make() -> EnergyDistribution:
        pyro.module("net", net)
        return _ebm(lambda x: net(torch.stack(torch.broadcast_tensors(x, context), -1)))

    return _trained(make, tuple(net.parameters()))


def pyro_param() -> Setup:
    """A ``PyroParam`` of a nested ``PyroModule``."""

    class Scale(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.a = PyroParam(torch.tensor(3.0), constraint=constraints.positive)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: Tensor) -> None:
            a = self.scale.a
            with pyro.plate("n", len(x)):
                pyro.sample("x", _ebm(lambda x: a * half_square(x)), obs=x)

    return Setup(Model(), (X,), lambda x: None, at={})


def free_constant() -> Setup:
    """A trained log Z beside a fixed energy."""
    return _trained(lambda: _ebm(half_square, log_normalizer=_c()))


def free_and_trained() -> Setup:
    """A trained log Z beside a trained energy."""

    def make() -> EnergyDistribution:
        a = _a()
        return _ebm(lambda x: a * half_square(x), log_normalizer=_c())

    return _trained(make)


def free_callable() -> Setup:
    """A trained log Z returned by a function, beside a fixed energy."""

    def make() -> EnergyDistribution:
        c = _c()
        return _ebm(half_square, log_normalizer=lambda: c)

    return _trained(make)


def _c() -> Tensor:
    return pyro.param("c", torch.tensor(0.0))


def stale() -> Setup:
    """An estimate of log Z at weights that have moved since."""
    setup, estimate = _estimated()
    with torch.no_grad():
        setup.weights[0].add_(0.5)
    assert estimate.is_stale
    return setup


def stale_latent() -> Setup:
    """An estimate of log Z at weights that have moved since, and a latent in the energy."""
    net = _net()
    estimate = LogNormalizer(torch.tensor(0.4), parameters=tuple(net.parameters()))
    with torch.no_grad():
        net.requires_grad_(False).confinement.add_(0.0)
        next(net.parameters()).add_(0.5)
    return _latent(lambda t: _ebm(ScaledEnergy(net, t), log_normalizer=estimate))


def stale_by_data() -> Setup:
    """An estimate of log Z at weights that were moved by assigning to ``.data``."""
    setup, estimate = _estimated()
    setup.weights[0].data = setup.weights[0].data + 0.5
    assert not estimate.is_stale
    for w in setup.weights:
        w.requires_grad_(False)
    return setup


def _estimated() -> tuple[Setup, LogNormalizer]:
    net = _net()
    weights = tuple(net.parameters())
    estimate = LogNormalizer(torch.tensor(0.4), parameters=weights)
    setup = _trained(lambda: _ebm(pyro.module("net", net), log_normalizer=estimate), weights)
    return setup, estimate


def _prior(*, registered: bool) -> Setup:
    net = _net()

    def model(y: Tensor) -> None:
        if registered:
            pyro.module("net", net)
        _likelihood(pyro.sample("z", _ebm(net, base=dist.Normal(0.0, 1.0))), y)

    held = {"z": torch.tensor(0.5)}
    return Setup(model, (Y,), at={}, held=held, weights=tuple(net.parameters()))


def trained_prior() -> Setup:
    """An energy-based prior whose weights are trained along with a guide."""
    return _prior(registered=True)


def pretrained_prior() -> Setup:
    """An energy-based prior, registered nowhere, its weights left at ``requires_grad=True``."""
    return _prior(registered=False)


def frozen_prior() -> Setup:
    """An energy-based prior whose weights are frozen."""
    setup = _prior(registered=True)
    for w in setup.weights:
        w.requires_grad_(False)
    return setup


def ebm_guide() -> Setup:
    """An unnormalized variational factor with a trained parameter."""

    def model() -> None:
        pyro.sample("z", dist.Normal(1.0, 1.0))

    def guide() -> None:
        a = _a()
        pyro.sample("z", _ebm(lambda z: a * half_square(z)))

    return Setup(model, (), guide, at={}, held={"z": torch.tensor(0.5)}, scored=guide)


# --- a fixed energy


def _over_x(make: Callable[[], Any]) -> Setup:
    def model() -> None:
        pyro.sample("x", make())

    return Setup(model, at={})


def fixed() -> Setup:
    """A fixed energy of a latent x."""
    return _over_x(lambda: _ebm(lambda x: x**4 - x**2))


def fixed_network() -> Setup:
    """A network with ``requires_grad=True`` as energy of a latent x."""
    net = _net()
    return _over_x(lambda: _ebm(net))


def fixed_registered() -> Setup:
    """A network registered by ``pyro.module`` as energy of a latent x."""
    net = _net()
    return _over_x(lambda: _ebm(pyro.module("net", net)))


def fixed_param() -> Setup:
    """A ``pyro.param`` in the energy of a latent x."""

    def make() -> EnergyDistribution:
        a = _a()
        return _ebm(lambda x: a * half_square(x))

    return _over_x(make)


def fixed_base() -> Setup:
    """A fixed energy on a fixed base."""
    return _over_x(lambda: _ebm(lambda x: x**4, base=dist.Normal(0.0, 1.0)))


def fixed_estimate() -> Setup:
    """A fixed energy with an estimate of its log Z."""
    return _over_x(lambda: _ebm(lambda x: x**4, log_normalizer=LogNormalizer(torch.tensor(0.6))))


def fixed_plate() -> Setup:
    """A network as energy of latents in a plate."""
    net = _net()

    def model() -> None:
        with pyro.plate("n", 3):
            pyro.sample("x", _ebm(net))

    return Setup(model, at={})


def function_of_latent() -> Setup:
    """A fixed energy that scores a function of a latent (``obs=f(z)``)."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", _ebm(lambda x: x**4), obs=torch.sinh(z))

    return Setup(model, at={"z": torch.tensor(0.5)})


def observed_parent() -> Setup:
    """An energy that depends on observed values only."""

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            w = pyro.sample("w", dist.Normal(loc, 1.0), obs=x)
            pyro.sample("x", _ebm(lambda x: (1.0 + w**2) * half_square(x)), obs=x)

    return Setup(model, (X,), at={"loc": torch.tensor(0.5)})


def latent_with_base() -> Setup:
    """A latent in the energy on top of a normal base."""

    def make(t: Tensor) -> EnergyDistribution:
        return _ebm(lambda x: t * half_square(x), base=dist.Normal(0.0, 1.0))

    return _latent(make)


# --- factors


def factor_of_data() -> Setup:
    """An ``energy_factor`` of data with a latent in its energy."""

    def model(x: Tensor, *, joint: bool = False) -> None:
        t = _theta()
        with pyro.plate("n", len(x)):
            energy_factor("x", lambda x: t * half_square(x), x, joint=joint)

    return Setup(model, (X,), meant=closure().model, uncovered=("theta",))


def factor_meant_jointly() -> Setup:
    """The same factor with ``joint=True``."""

    def model(x: Tensor) -> None:
        t = _theta()
        with pyro.plate("n", len(x)):
            energy_factor("x", lambda x: t * half_square(x), x, joint=True)

    return Setup(model, (X,))


def factor_trained() -> Setup:
    """An ``energy_factor`` of a latent with a ``pyro.param`` in its energy."""

    def model(y: Tensor, *, local: bool = False) -> None:
        a = _a()
        normal = dist.Normal(0.0, 1.0)
        if local:
            z = pyro.sample("z", _ebm(lambda z: a * half_square(z), base=normal))
        else:
            z = pyro.sample("z", normal)
            energy_factor("tilt", lambda z: a * half_square(z), z)
        _likelihood(z, y)

    def meant(y: Tensor) -> None:
        model(y, local=True)

    return Setup(model, (Y,), at={}, held={"z": torch.tensor(0.9)}, meant=meant)


def factor_of_latents() -> Setup:
    """An ``energy_factor`` of two latents with a fixed energy."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(0.0, 1.0))
        energy_factor("close", lambda x, y: (x - y) ** 2, x, y)

    return Setup(model, at={})


def factor_with_coupling() -> Setup:
    """An ``energy_factor`` of a latent with another latent as its coupling."""

    def model() -> None:
        t = _theta()
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        energy_factor("tilt", lambda x: t * half_square(x), x)

    return Setup(model)


def factor_of_enumerated() -> Setup:
    """An ``energy_factor`` of an enumerated latent with another latent as its coupling."""

    @config_enumerate
    def model() -> None:
        t = _theta()
        k = pyro.sample("k", dist.Bernoulli(0.5))
        energy_factor("tilt", lambda k: t * k, k)

    return Setup(model, guide=_guide_of_theta)


# --- dependences that gradients do not show

_SCALES = torch.tensor([0.3, 3.0])


def enumerated_beside() -> Setup:
    """A latent in the energy, beside an enumerated site that the energy does not see."""

    @config_enumerate
    def model(x: Tensor) -> None:
        t = _theta()
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(k, 1.0), obs=x)
            pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

    held = {"k": torch.zeros(50)}
    return Setup(model, (X,), _guide_of_theta, held=held, uncovered=("theta",))


def _guide_of_theta(*args: Any) -> None:
    rate = pyro.param("rate", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("theta", dist.Exponential(rate))


def enumerated_mixture() -> Setup:
    """A mixture whose enumerated component picks the energy."""

    @config_enumerate
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("n", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5)).long()
            pyro.sample("x", _ebm(lambda x: half_square(x / _SCALES[k])), obs=x)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=x)

    return Setup(model, (X,), at={}, uncovered=("k",))


def discrete_parent() -> Setup:
    """A discrete latent, with a Bernoulli guide, picks the energy."""

    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5)).long()
        with pyro.plate("n", len(x)):
            pyro.sample("x", _ebm(lambda x: half_square(x / _SCALES[k])), obs=x)

    def guide(x: Tensor) -> None:
        q = pyro.param("q", torch.tensor(0.5), constraint=constraints.unit_interval)
        pyro.sample("k", dist.Bernoulli(q), infer={"enumerate": "parallel"})

    return Setup(model, (X,), guide, at={}, uncovered=("k",))


def score_function_parent() -> Setup:
    """A count in the energy, with a Poisson guide, which has no ``rsample``."""

    def model(x: Tensor) -> None:
        k = pyro.sample("k", dist.Poisson(3.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", _ebm(lambda x: (1.0 + k) * half_square(x)), obs=x)

    def guide(x: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(3.0), constraint=constraints.positive)
        pyro.sample("k", dist.Poisson(rate))

    return Setup(model, (X,), guide, at={}, uncovered=("k",))


def mixture_weights() -> Setup:
    """A fixed EBM as component of a mixture whose weights are latent."""
    log_z = 0.5 * (2.0 * torch.pi * _SCALES**2).log()

    def made(log_normalizer: Tensor | None) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            w = pyro.sample("w", dist.Beta(1.0, 1.0))
            weights = dist.Categorical(torch.stack([w, 1.0 - w]))
            fits = _ebm(
                lambda x: half_square(x / _SCALES), batch_shape=(2,), log_normalizer=log_normalizer
            )
            with pyro.plate("n", len(x)):
                pyro.sample("x", dist.MixtureSameFamily(weights, fits), obs=x)

        return model

    at = {"w": torch.tensor(0.4)}
    return Setup(made(None), (X,), at=at, uncovered=("x",), meant=made(log_z))


def support_bound() -> Setup:
    """A latent bound of the support, under a fixed energy."""

    def made(*, known: bool) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            t = pyro.sample("theta", dist.Uniform(0.0, 1.0))
            above = constraints.greater_than(t)
            log_z = (lambda: -t) if known else None
            p = _ebm(lambda x: 1.0 * x, support=above, log_normalizer=log_z)
            with pyro.plate("n", len(x)):
                pyro.sample("x", p, obs=x)

        return model

    at = {"theta": torch.tensor(0.5)}
    return Setup(
        made(known=False), (1.0 + X.abs(),), at=at, uncovered=("theta",), meant=made(known=True)
    )


def known_support_bound() -> Setup:
    """A latent bound of the support, and log Z as a function of it."""
    setup = support_bound()
    return Setup(setup.meant, setup.args, at=setup.at)  # type: ignore[arg-type]


def latent_scale() -> Setup:
    """A fixed energy's term multiplied by a latent (``poutine.scale``)."""

    def model(x: Tensor) -> None:
        t = _theta()
        with poutine.scale(scale=t), pyro.plate("n", len(x)):
            pyro.sample("x", _ebm(half_square), obs=x)

    return Setup(model, (X,), uncovered=("theta",))


def _cut_parent(cut: Callable[[Tensor], Tensor]) -> Setup:
    def made(of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        def model(x: Tensor) -> None:
            t = of(_theta())
            with pyro.plate("n", len(x)):
                pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

        return model

    return Setup(made(cut), (X,), uncovered=("theta",), meant=made(lambda t: t))


def detached_parent() -> Setup:
    """A latent that enters the energy without its gradient (``theta.detach()``)."""
    return _cut_parent(lambda t: t.detach())


def branch_on_parent() -> Setup:
    """A latent that picks the energy (``torch.where(theta > 1, ...)``)."""
    return _cut_parent(lambda t: torch.where(t > 1.0, 1.0, 9.0))


def number_parent() -> Setup:
    """A latent that leaves torch on its way to the energy (``float(theta)``)."""

    def model(x: Tensor) -> None:
        t = float(_theta())
        with pyro.plate("n", len(x)):
            pyro.sample("x", _ebm(lambda x: t * half_square(x)), obs=x)

    return Setup(model, (X,))


def reentrant_checkpoint() -> Setup:
    """Weights inside a *reentrant* checkpoint, which runs a backward pass of its own."""
    net = _net()

    def make() -> EnergyDistribution:
        pyro.module("net", net)
        return _ebm(lambda x: checkpoint(net, x.clone().requires_grad_(), use_reentrant=True))

    return _trained(make, tuple(net.parameters()))
