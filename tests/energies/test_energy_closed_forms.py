"""Normalizers and exact samplers of the analytic energies against independent numbers."""

from __future__ import annotations

import math
from types import MethodType

import pytest
import torch
from torch.func import functional_call, grad, vmap

from pyro_ebm.energies import (
    Banana,
    DoubleWell,
    Funnel,
    GaussianEnergy,
    GaussianMixtureEnergy,
    Quartic,
    even_product,
)

NUM = 20_000
PRECISION = [[2.0, 0.5], [0.5, 1.0]]


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def mixture(**changes):
    arguments = {
        "locs": torch.tensor([[0.0, 1.0], [2.0, 0.0], [-1.0, -1.0]]),
        "scales": torch.tensor([0.5, 1.0, 0.7]),
        "weights": torch.tensor([0.2, 0.5, 0.6]),
    }
    return GaussianMixtureEnergy(**{**arguments, **changes})


SCALAR = {
    "gaussian": lambda: GaussianEnergy(0.5, 2.0),
    "double well": lambda: DoubleWell(4.0),
    "flat double well": lambda: DoubleWell(0.01),
    "steep double well": lambda: DoubleWell(400.0),
    "quartic": lambda: Quartic(1.0),
    "two wells": lambda: Quartic(0.25, -0.5),
    "two deep wells": lambda: Quartic(0.5, -20.0),
    "almost a Gaussian": lambda: Quartic(1e-4, 3.0),
}
PLANE = {
    "diagonal": lambda: GaussianEnergy(torch.tensor([0.5, -1.0]), 0.8, event_dim=1),
    "full": lambda: GaussianEnergy(
        torch.tensor([0.5, -1.0]),
        torch.tensor([1.0, 2.0]),
        precision_matrix=torch.tensor(PRECISION),
    ),
    "mixture": mixture,
    "banana": lambda: Banana(0.3, 1.1),
    "two double wells": lambda: DoubleWell(2.0, event_shape=(2,)),
    "two quartics": lambda: Quartic(0.3, 0.2, event_shape=(2,)),
}
ALL = {**SCALAR, **PLANE, "funnel": lambda: Funnel(3, 1.2)}


def integral(energy):
    """The trapezoidal rule on a wide fine grid, exact to rounding for these smooth densities."""
    dims = len(energy.event_shape)
    ticks = torch.linspace(-25.0, 25.0, 100_001 if dims == 0 else 801)
    x = torch.cartesian_prod(ticks, ticks) if dims else ticks
    return torch.exp(-energy(x)).sum() * (ticks[1] - ticks[0]) ** (1 + dims)


@pytest.mark.parametrize("name", SCALAR | PLANE)
def test_log_normalizer_is_the_integral(name):
    energy = ALL[name]()
    torch.testing.assert_close(
        energy.log_normalizer(), integral(energy).log(), rtol=1e-10, atol=1e-10
    )


def test_funnel_is_the_integral_on_straightened_coordinates():
    energy = Funnel(2, 3.0)
    v, t = torch.linspace(-40.0, 40.0, 801), torch.linspace(-10.0, 10.0, 401)
    grid = torch.cartesian_prod(v, t)
    stretch = (0.5 * grid[:, 0]).exp()
    x = torch.stack([grid[:, 0], grid[:, 1] * stretch], -1)
    z = (torch.exp(-energy(x)) * stretch).sum() * (v[1] - v[0]) * (t[1] - t[0])
    torch.testing.assert_close(energy.log_normalizer(), z.log(), rtol=1e-10, atol=1e-10)


def test_known_normalizers():
    torch.testing.assert_close(
        DoubleWell(4.0).log_normalizer().exp().item(), 0.9478378330, rtol=0, atol=1e-10
    )
    assert Quartic(1.0).log_normalizer().exp().item() == pytest.approx(
        2 * math.gamma(1.25), abs=1e-12
    )
    assert Quartic(0.25, -0.5).log_normalizer().exp().item() == pytest.approx(
        3.9051371698572974, abs=1e-12
    )
    assert GaussianEnergy(event_dim=0).log_normalizer().item() == pytest.approx(
        0.9189385332046727, abs=1e-15
    )


def second_moment(height):
    """E x^2 from E (x^2 - 1)^2 needs a second parameter; a double well is also a quartic."""
    quadratic = torch.tensor(-2.0 * height, requires_grad=True)
    log_z = Quartic(torch.tensor(height), quadratic).log_normalizer()
    return -torch.autograd.grad(log_z, quadratic)[0].item()


def test_derivatives_of_log_z_are_the_known_moments():
    assert second_moment(4.0) == pytest.approx(0.9176708607, abs=1e-10)
    b = torch.tensor([0.0, -0.5], requires_grad=True)
    log_z = Quartic(torch.tensor([1.0, 0.25]), b).log_normalizer()
    (slope,) = torch.autograd.grad(log_z.sum(), b)
    expected = torch.tensor([0.3379891200, 1.0417972965])
    torch.testing.assert_close(-slope, expected, rtol=0, atol=1e-10)


def test_double_well_is_a_quartic():
    height = torch.logspace(-3, 5, 50)
    quartic = Quartic(height, -2.0 * height).log_normalizer() - height
    torch.testing.assert_close(
        DoubleWell(height).log_normalizer(), quartic, rtol=1e-9, atol=1e-10 * 1e5
    )


def test_quartic_scaling_law_over_twelve_decades():
    scale = torch.logspace(-6, 6, 49)
    for shape in (-8.0, -1.0, 0.0, 1.0, 8.0):
        scaled = Quartic(scale**4, shape * scale**2).log_normalizer() + scale.log()
        unit = Quartic(1.0, shape).log_normalizer()
        torch.testing.assert_close(scaled, unit.expand(49), rtol=1e-12, atol=1e-12)


def test_steep_double_well_approaches_two_gaussians():
    height = torch.tensor([1e3, 1e4, 1e5])
    laplace = math.log(2.0) + 0.5 * (math.pi / (4.0 * height)).log()
    gap = DoubleWell(height).log_normalizer() - laplace
    # First correction of Laplace's method: -E[h y^4] + E[(4 h y^3)^2] / 2 at variance 1 / 8h.
    torch.testing.assert_close(gap * height, torch.full((3,), 3 / 16), rtol=2e-2, atol=0)


@pytest.mark.parametrize("make", [DoubleWell, Quartic])
def test_quadrature_is_smooth_in_its_parameter(make):
    def log_z(theta):
        return make(theta).log_normalizer()

    theta = torch.tensor(2.0, requires_grad=True)
    assert torch.autograd.gradcheck(log_z, theta)
    assert torch.autograd.gradgradcheck(log_z, theta)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(log_z))(torch.tensor([2.0, 5.0])),
        torch.stack([torch.func.grad(log_z)(torch.tensor(t)) for t in (2.0, 5.0)]),
    )


def test_float32_quadrature_loses_only_rounding():
    single = DoubleWell(torch.tensor(4.0, dtype=torch.float32)).log_normalizer()
    assert single.item() == pytest.approx(math.log(0.9478378330), abs=2e-6)


def test_gaussian_equals_torch():
    loc, scale = torch.randn(3), torch.rand(3) + 0.5
    precision = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.0], [0.1, 0.0, 3.0]])
    x = torch.randn(4, 3)
    normal = torch.distributions.Normal(loc, scale)
    energy = GaussianEnergy(loc, scale)
    torch.testing.assert_close(-energy(x) - energy.log_normalizer(), normal.log_prob(x))
    full = GaussianEnergy(loc, precision_matrix=precision)
    mvn = torch.distributions.MultivariateNormal(loc, precision_matrix=precision)
    torch.testing.assert_close(-full(x) - full.log_normalizer(), mvn.log_prob(x))
    scaled = GaussianEnergy(loc, scale, precision_matrix=precision)
    inner = precision / scale / scale.unsqueeze(-1)
    mvn = torch.distributions.MultivariateNormal(loc, precision_matrix=inner)
    torch.testing.assert_close(-scaled(x) - scaled.log_normalizer(), mvn.log_prob(x))


def test_gaussian_log_z_in_the_precision():
    precision = torch.tensor(3.0, requires_grad=True)
    log_z = GaussianEnergy(0.0, precision.rsqrt()).log_normalizer()
    (first,) = torch.autograd.grad(log_z, precision, create_graph=True)
    (second,) = torch.autograd.grad(first, precision)
    assert log_z.item() == pytest.approx(0.5 * math.log(2 * math.pi / 3.0), abs=1e-14)
    assert first.item() == pytest.approx(-1 / 6, abs=1e-14)
    assert second.item() == pytest.approx(1 / 18, abs=1e-14)


def test_mixture_equals_torch_up_to_its_total_weight():
    energy = mixture()
    parts = torch.distributions.Independent(
        torch.distributions.Normal(energy.locs, energy.scales.unsqueeze(-1)), 1
    )
    mixed = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(energy.weights), parts
    )
    x = torch.randn(5, 2)
    torch.testing.assert_close(-energy(x) - energy.log_normalizer(), mixed.log_prob(x))
    assert energy.log_normalizer().item() == pytest.approx(math.log(1.3), abs=1e-14)


def test_ready_made_mixtures():
    ring = GaussianMixtureEnergy.ring_of_gaussians(num=6, radius=3.0, scale=0.2)
    torch.testing.assert_close(ring.locs.norm(dim=-1), torch.full((6,), 3.0))
    torch.testing.assert_close(ring.locs[0], torch.tensor([3.0, 0.0]))
    grid = GaussianMixtureEnergy.grid_of_gaussians()
    assert grid.locs.shape == (25, 2)
    assert grid.locs.unique().tolist() == [-4.0, -2.0, 0.0, 2.0, 4.0]
    for energy in (ring, grid):
        assert energy.log_normalizer().item() == pytest.approx(0.0, abs=1e-14)


# Exact samplers: identities between draws, energy and log Z, each with a planted error.


def z_score(values, mean):
    return ((values.mean(0) - mean) / (values.std(0) / len(values) ** 0.5)).abs().max().item()


def virial(energy, num=NUM):
    """E[(x - a) . grad E] = d for every centre a; with a = 0 and a = 1 both moments are used.

    With 20000 draws a sampler whose scale is 4 per cent off is some 8 standard errors away.
    """
    x = energy.sample((num,)).requires_grad_()
    (slope,) = torch.autograd.grad(energy(x).sum(), x)
    x, slope = x.detach().reshape(num, -1), slope.reshape(num, -1)
    return max(z_score((x - a) * slope, 1.0) for a in (0.0, 1.0))


@pytest.mark.parametrize("name", ALL)
def test_samples_satisfy_the_virial_identity(name):
    assert virial(ALL[name]()) < 5


@pytest.mark.parametrize("name", ALL)
def test_virial_identity_sees_a_wrong_scale(name):
    energy = ALL[name]()
    exact = energy.sample
    energy.sample = lambda shape: 1.06 * exact(shape)
    assert virial(energy) > 5


def slope_score(energy, name, num=NUM):
    """How far d log Z = -E[dE] is from holding for one argument, by exact draws."""
    value = getattr(energy, name).detach()

    def energy_at(value, x):
        return functional_call(energy, {name: value}, (x,))

    slopes = vmap(grad(energy_at), in_dims=(None, 0))(value, energy.sample((num,)))
    setattr(energy, name, value.requires_grad_())
    log_z = energy.log_normalizer() + 0.0 * value
    (exact,) = torch.autograd.grad(log_z, value)
    return z_score(-slopes, exact)


SCALARS = [
    (name, argument)
    for name in ("gaussian", "double well", "two wells", "banana", "two double wells", "funnel")
    for argument, _ in ALL[name]().named_buffers()
]


@pytest.mark.parametrize(("name", "argument"), SCALARS)
def test_slope_of_log_z_is_minus_the_mean_slope_of_the_energy(name, argument):
    assert slope_score(ALL[name](), argument) < 5


@pytest.mark.parametrize(("name", "argument"), SCALARS)
def test_slope_test_sees_a_wrong_normalizer(name, argument):
    energy = ALL[name]()
    exact = energy.log_normalizer
    energy.log_normalizer = lambda: exact() + 0.2 * getattr(energy, argument)
    assert slope_score(energy, argument) > 5


def test_double_well_sampler_needs_its_rejections(monkeypatch):
    """With four cells most of the work is done by rejection; without it the draws are wrong."""
    monkeypatch.setattr(even_product, "_CELLS", 4)
    energy = DoubleWell(4.0)
    x = energy.sample((NUM,))
    assert z_score(x.square(), 0.9176708607) < 5
    assert z_score(x, 0.0) < 5
    propose = DoubleWell._propose

    def careless(self, shape):
        x, accepted = propose(self, shape)
        return x, torch.ones_like(accepted)

    energy._propose = MethodType(careless, energy)
    assert z_score(energy.sample((NUM,)).square(), 0.9176708607) > 5


def test_double_well_draws_follow_their_distribution_function():
    """Kolmogorov-Smirnov distance below the 1e-6 quantile, about 2.7 / sqrt(n)."""
    energy = Quartic(0.25, -0.5)
    grid = torch.linspace(-8.0, 8.0, 40_001)
    cdf = torch.cumulative_trapezoid(torch.exp(-energy(grid) - energy.log_normalizer()), grid)
    x = energy.sample((NUM,)).sort().values
    at = torch.searchsorted(grid[1:], x).clamp(max=len(cdf) - 1)
    ranks = (torch.arange(NUM) + 0.5) / NUM
    assert (cdf[at] - ranks).abs().max() < 2.7 / NUM**0.5
    assert (cdf[(at * 1.02).long().clamp(max=len(cdf) - 1)] - ranks).abs().max() > 2.7 / NUM**0.5


def test_mixture_sampler_visits_the_modes_by_weight():
    weights = torch.tensor([0.1, 0.2, 0.7])
    locs = torch.tensor([[0.0, 10.0], [10.0, 0.0], [-10.0, 0.0]])
    energy = GaussianMixtureEnergy(locs, 0.5, weights=3.0 * weights)
    nearest = torch.cdist(energy.sample((NUM,)), locs).argmin(-1)
    hits = torch.nn.functional.one_hot(nearest, 3).double()
    assert z_score(hits, weights) < 5
    assert z_score(hits, torch.full((3,), 1 / 3)) > 5


def test_batched_parameters_sample_their_own_law():
    heights = torch.tensor([[1.0], [8.0]])
    x = DoubleWell(heights, event_shape=(3,)).sample((NUM // 10, 2))
    for i, height in enumerate((1.0, 8.0)):
        values = x[:, :, i].reshape(-1)
        assert z_score(values.square(), second_moment(height)) < 5
        assert z_score(values.square(), second_moment(9.0 - height)) > 5


# Arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianEnergy(0.0, -1.0), "scale must be positive, got -1.0"),
        (lambda: GaussianEnergy(0.0, float("nan")), "scale must be positive, got nan"),
        (lambda: GaussianEnergy(event_dim=1), r"give loc=torch.zeros\(d\)"),
        (lambda: GaussianEnergy(event_dim=-1), "event_dim=-1"),
        (lambda: GaussianEnergy(precision_matrix=torch.ones(2, 3)), r"\(\.\.\., d, d\)"),
        (
            lambda: GaussianEnergy(precision_matrix=torch.eye(2), event_dim=2),
            "events of one dim, got event_dim=2",
        ),
        (lambda: GaussianMixtureEnergy(torch.zeros(3)), r"\(\.\.\., K, d\), got \(3,\)"),
        (lambda: GaussianMixtureEnergy(torch.zeros(3, 2), 0.0), "scales must be positive, got 0.0"),
        (lambda: DoubleWell(0.0), "height must be positive, got 0.0"),
        (lambda: Quartic(-1.0), "quartic must be positive, got -1.0"),
        (lambda: Banana(1.0, 0.0), "scale must be positive, got 0.0"),
        (lambda: Funnel(1), "dim must be at least 2"),
        (lambda: Funnel(3, -1.0), "scale must be positive, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("height", [float("nan"), -1.0])
def test_sampler_refuses_parameters_out_of_range(height):
    with pytest.raises(ValueError, match="logits"):
        DoubleWell(torch.tensor(height)).sample((3,))
