"""The trapezoidal rule against integrals in closed form."""

import math
import re

import pytest
import torch
from laws_with_log_z import three_modes
from torch.distributions import constraints as C

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers import Box, find_box, quadrature
from pyro_ebm.normalizers.quadrature import on_box

F64 = torch.float64


def law(energy, support=None, event_shape=(), **options):
    return EnergyDistribution(energy, event_shape=event_shape, support=support, **options)


def bessel_i(order, x):
    """The modified Bessel function by its series."""
    terms = (
        (x / 2) ** (2 * k + order) / (math.factorial(k) * math.gamma(k + order + 1))
        for k in range(30)
    )
    return sum(terms)


def two_modes(place, width, height):
    """A standard normal and a narrower mode, higher by some nats."""

    def energy(x):
        return -torch.logaddexp(-0.5 * x**2, -0.5 * ((x - place) / width) ** 2 + height)

    return law(energy)


CASES = {
    "quartic": (law(lambda x: x**4), math.log(2 * math.gamma(1.25))),
    "two humps": (
        law(lambda x: x**4 / 4 - x**2 / 2),
        math.log(math.pi / 2) + 0.125 + math.log(bessel_i(0.25, 0.125) + bessel_i(-0.25, 0.125)),
    ),
    "far from zero": (law(lambda x: 0.5 * (x - 900.0) ** 2), 0.5 * math.log(2 * math.pi)),
    "very wide": (
        law(lambda x: 0.5 * (x / 1e4) ** 2),
        0.5 * math.log(2 * math.pi) + math.log(1e4),
    ),
    "gamma": (
        law(lambda x: 2 * x - 2 * x.log(), C.positive),
        math.lgamma(3) - 3 * math.log(2),
    ),
    "beta": (
        law(lambda x: -1.5 * x.log() - 0.5 * torch.log1p(-x), C.unit_interval),
        math.lgamma(2.5) + math.lgamma(1.5) - math.lgamma(4.0),
    ),
    "dirichlet": (
        law(lambda x: -x.log().sum(-1), C.simplex, (3,)),
        3 * math.lgamma(2) - math.lgamma(6),
    ),
    "two kinds of columns": (
        law(
            lambda x: 0.5 * x[..., 0] ** 2 + x[..., 1],
            C.stack([C.real, C.positive], -1),
            (2,),
        ),
        0.5 * math.log(2 * math.pi),
    ),
    "three modes on a base": (three_modes(), 0.0),
    "very narrow": (
        law(lambda x: 0.5 * ((x - 0.3) / 1e-4) ** 2),
        0.5 * math.log(2 * math.pi) + math.log(1e-4),
    ),
    "a narrow mode beside a wide one": (
        two_modes(20.0, 0.1, 4.0),
        0.5 * math.log(2 * math.pi) + math.log(1.0 + 0.1 * math.exp(4.0)),
    ),
}


def test_draws_say_where_a_mode_is():
    """At 700 with a width of .002 no search comes near; one draw of it among others says where."""
    made, log_z = two_modes(700.0, 0.002, 8.0), 0.5 * math.log(2 * math.pi)
    assert float(quadrature(made).value) == pytest.approx(log_z, abs=1e-8)
    found = quadrature(made, draws=torch.cat([torch.randn(999), torch.tensor([700.001])])[:, None])
    assert float(found.value) == pytest.approx(
        log_z + math.log(1.0 + 0.002 * math.exp(8.0)), abs=1e-8
    )
    with pytest.raises(ValueError, match=r"draws must end in the event shape \(2,\), got \(3,\)"):
        quadrature(law(lambda x: (x**2).sum(-1), event_shape=(2,)), draws=torch.zeros(3))
    with pytest.raises(ValueError, match="1 of 3 draws are NaN: leave them out"):
        find_box(made, draws=torch.tensor([0.0, torch.nan, 1.0]))


def test_nan_nodes_are_told():
    """NaN beyond five standard deviations counts as nothing, and log Z is 6e-7 less."""
    found = quadrature(law(lambda x: torch.where(x.abs() < 5.0, 0.5 * x**2, torch.nan)))
    assert float(found.value) == pytest.approx(0.5 * math.log(2 * math.pi) - 5.7e-7, abs=1e-8)
    assert re.search(r"\d+ of \d+ energies are NaN and counted as infinite", found.doubts[0])


@pytest.mark.parametrize("graph", [True, False])
def test_tensors_that_a_function_holds_make_it_stale(graph):
    w = torch.ones((), requires_grad=True)
    made = law(lambda x: 0.5 * w * x**2)
    with torch.set_grad_enabled(graph):
        found = quadrature(made)
    assert found.parameters == (w,)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


@pytest.mark.parametrize("name", CASES)
def test_integrals_in_closed_form(name):
    made, log_z = CASES[name]
    estimate = quadrature(made)
    assert float(estimate.value) == pytest.approx(log_z, abs=1e-8)
    assert float(estimate.stderr) < 1e-8


def test_a_batch_and_its_slopes():
    precision = torch.tensor([1.0, 1.7], requires_grad=True)
    made = law(lambda x: 0.5 * precision * x**2, batch_shape=(2,))
    (slope,) = torch.autograd.grad(quadrature(made).value.sum(), precision)
    torch.testing.assert_close(slope, -0.5 / precision.detach())


def test_in_a_given_box_under_vmap():
    """Value, slope and curvature of log Z of a Gaussian in its precision."""
    box = find_box(law(lambda x: 0.15 * x**2)).refined().refined()

    def log_z(k):
        return quadrature(law(lambda x: 0.5 * k * x**2), box=box).value

    k = torch.tensor([0.5, 1.0, 1.7])
    torch.testing.assert_close(torch.vmap(log_z)(k), 0.5 * torch.log(2 * math.pi / k))
    torch.testing.assert_close(torch.vmap(torch.func.grad(log_z))(k), -0.5 / k)
    torch.testing.assert_close(torch.vmap(torch.func.grad(torch.func.grad(log_z)))(k), 0.5 / k**2)


def test_a_box_that_cuts_mass_off_has_that_much_less():
    """Half of a Gaussian is log 2 less: what is outside of a given box is not looked for."""
    box = Box(torch.tensor([0.0]), torch.tensor([10.0]), 4001)
    found = quadrature(law(lambda x: 0.5 * x**2), box=box)
    assert float(found.value) == pytest.approx(0.5 * math.log(math.pi / 2), abs=1e-3)
    assert found.stderr > math.log(2.0)
    assert found.doubts[0].endswith("use box.refined(), a wider box, infer.posterior")


# --- dtypes, and distributions inside of energies


@pytest.mark.parametrize("num_dims", [0, 1])
def test_parameters_in_double_precision_are_heard(num_dims):
    """Single nodes are .06 from each other at 1e6, and .04 nats too many came of them."""
    torch.set_default_dtype(torch.float32)
    place = torch.full((1,) * num_dims, 1e6, dtype=F64)
    made = law(lambda x: 0.5 * ((x - place) / 0.1) ** 2, batch_shape=place.shape)
    log_z = 0.5 * math.log(2 * math.pi) + math.log(0.1)
    found = quadrature(made)
    assert float(found.value) == pytest.approx(log_z, abs=1e-9)
    assert found.is_trusted
    assert find_box(made).low.dtype == F64


def test_energies_that_take_single_values_only_keep_single_nodes():
    torch.set_default_dtype(torch.float32)
    network = torch.nn.Linear(1, 1).requires_grad_(False)  # noqa: FBT003
    two = torch.tensor(2.0, dtype=F64)
    made = law(lambda x: (network(x).double() / two).square().sum(-1), event_shape=(1,))
    log_z = 0.5 * math.log(4 * math.pi) - float(network.weight.abs().log())
    assert float(quadrature(made).value) == pytest.approx(log_z, abs=1e-5)
    assert find_box(made).low.dtype == torch.float32


def test_a_mode_as_narrow_as_single_precision_is_told():
    torch.set_default_dtype(torch.float32)
    found = quadrature(law(lambda x: 0.5 * ((x - 1e6) / 0.1) ** 2))
    assert "hardly wider than torch.float32 resolves" in found.doubts[0]


@pytest.mark.parametrize("checks", [None, False])
def test_distributions_in_an_energy_do_not_check_nodes(checks):
    """Of the points that are searched, some come to lie at 0 or at infinity by rounding."""
    made = torch.distributions.LogNormal(torch.zeros(()), 5.0, validate_args=checks)
    found = quadrature(law(lambda x: -made.log_prob(x), C.positive))
    assert float(found.value) == pytest.approx(0.0, abs=1e-8)
    assert found.is_trusted


def test_one_that_insists_is_told_of():
    made = torch.distributions.LogNormal(torch.zeros(()), 5.0, validate_args=True)
    with pytest.raises(ValueError, match="refuses nodes that rounding .* give it validate_args"):
        quadrature(law(lambda x: -made.log_prob(x), C.positive))


# --- on a box that is held


def held(half, num_nodes, dim=1):
    return Box(torch.full((dim,), -half), torch.full((dim,), half), num_nodes)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("num_nodes", [17, 21, 29])
def test_the_error_of_smooth_laws_is_not_understated(dim, num_nodes):
    """By 21 nodes over 17 standard deviations log Z is right to 1e-7, and 1e-4 is promised."""
    value, error = on_box(
        law(lambda x: 0.5 * (x**2).sum(-1), event_shape=(dim,)), held(8.5, num_nodes, dim)
    )
    off = abs(float(value) - 0.5 * dim * math.log(2 * math.pi))
    assert off <= float(error)
    assert float(error) < {17: 0.02, 21: 1e-3, 29: 1e-6}[num_nodes] * dim


@pytest.mark.parametrize("num_nodes", [1001, 4001])
def test_the_error_of_a_kink_is_what_it_is(num_nodes):
    """|x| with a node at its kink: the error h^2 / 12 is stated to a tenth."""
    value, error = on_box(law(lambda x: x.abs()), held(40.0, num_nodes))
    assert float(error) == pytest.approx(float(value) - math.log(2.0), rel=0.1)


def test_mass_beyond_the_box_is_told():
    """Of N(0, 1) and of N(0, 9) on (-6, 6): 2e-9 and .046 of the mass are outside."""
    box, scale = held(6.0, 65), torch.tensor([1.0, 3.0])
    both = EnergyDistribution(lambda x: 0.5 * (x / scale) ** 2, event_shape=(), batch_shape=(2,))
    error = on_box(both, box)[1]
    assert 2e-9 < float(error[0]) < 1e-6
    assert float(error[1]) > 0.046


@pytest.mark.parametrize("support", [C.positive, C.greater_than(-0.3)])
def test_the_error_does_not_swing_with_the_parameters(support):
    """exp(-t x): the same law in log x, moved by log t, as the nodes are over 400 values of t.

    Its value swings about log Z = -log t + .3 t, by less than is told; what is told stands still.
    """
    low = 0.0 if support is C.positive else -0.3
    t = torch.linspace(-2.0, 2.0, 400, dtype=F64).exp()
    exponential = law(lambda x: t * x, support=support, batch_shape=(400,))
    value, error = on_box(exponential, Box(torch.tensor([-22.0]), torch.tensor([5.0]), 65))
    off = (value + t.log() + t * low).abs()
    assert bool((off <= error).all())
    assert float(error.max()) < 1.5 * float(error.min())


@pytest.mark.parametrize("place", [0.0, 0.1, 0.25, 0.4, 0.5])
def test_the_error_of_a_kink_between_nodes(place):
    """With its kink anywhere in a cell |x| errs by h^2 / 12 (1 - 6 p + 6 p^2): told to 1 / 7."""
    step = 0.1
    value, error = on_box(law(lambda x: (x - place * step).abs()), held(40.0, 801))
    off = float(value) - math.log(2.0)
    assert off == pytest.approx(step**2 / 12 * (1 - 6 * place + 6 * place**2), rel=1e-2, abs=1e-6)
    assert abs(off) / 7 < float(error) < 1.1 * step**2 / 12


BAD = {
    "five dims": (lambda x: x.square().sum(-1), (5,), ValueError, "up to 3 dimensions"),
    "flat": (lambda x: 0.0 * x, (), NonFiniteEnergyError, "is the energy proper?"),
    "upside down": (lambda x: -(x**2), (), NonFiniteEnergyError, "is the energy proper?"),
    "slowly falling": (
        lambda x: torch.log1p(x**2),  # a Cauchy: no box holds its mass
        (),
        RuntimeError,
        "tails too heavy, or modes too narrow, for a grid",
    ),
    "square root of that": (
        lambda x: 0.5 * torch.log1p(x**2),  # 1 / r: no Z
        (),
        NonFiniteEnergyError,
        "does not grow faster than .* is the energy proper?",
    ),
    "ridge": (
        lambda x: 0.5 * (x[..., 0] - x[..., 1]) ** 2,
        (2,),
        NonFiniteEnergyError,
        "does not grow faster than .* is the energy proper?",
    ),
    "jumps": (
        lambda x: torch.where(torch.sin(300 * x) > 0, x**2, x**2 + 1.0),
        (),
        RuntimeError,
        "too rough for quadrature in torch.float64: use an estimate",
    ),
    "nan": (lambda x: x * torch.nan, (), NonFiniteEnergyError, "no node has a finite energy"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    energy, event_shape, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        quadrature(law(energy, event_shape=event_shape))
