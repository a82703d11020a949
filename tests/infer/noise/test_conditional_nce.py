"""Conditional NCE: its minimum by quadrature and enumeration, its two limits, the scale of its
noise, and what it refuses.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import NonFiniteEnergyError, SurrogateWarning
from pyro_ebm.infer import EnergyDiscrepancy
from pyro_ebm.infer.discrepancy.perturbation_contrast import Negatives
from pyro_ebm.infer.noise.conditional_nce import ConditionalNCE, NoisyCopies, doubled_scale
from pyro_ebm.poutine import surrogate

NO_C = torch.zeros(())


def no_guide(*args):
    return None


def nodes(num=401):
    """Points and weights of a standard normal's expectation, by the trapezoid rule."""
    z = torch.linspace(-8.5, 8.5, num)
    return z, torch.softmax(-0.5 * z**2, 0)


def gaussian(precision):
    return EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())


class Fixed(dist.Normal):
    """A normal law whose draws are quadrature nodes."""

    def sample(self, sample_shape=()):
        z, _ = nodes()
        return self.loc + self.scale * z.expand(*sample_shape, len(z), len(z))

    def expand(self, batch_shape, _instance=None):
        return self


def expected(objective, p, x, w, noise=None):
    """The expected loss of one copy per datum, data at nodes ``x`` with weights ``w``."""
    z, v = nodes()
    rows = x[:, None].expand(-1, len(z))
    contrast = objective.draw(p, rows, noise)
    return (w[:, None] * v * objective.per_datum(p, rows, contrast, NO_C)).sum()


def with_nodes(monkeypatch):
    z, _ = nodes()
    monkeypatch.setattr(torch, "randn", lambda shape, **_: z.expand(shape))


# --- the minimum is at the truth


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_truth_is_stationary(scale, monkeypatch):
    """At any range of Gaussian noise; to the accuracy of the quadrature."""
    with_nodes(monkeypatch)
    objective = ConditionalNCE(num_noise=1, scale=scale, unit=1.0)
    for precision, tolerance in ((1.0, 1e-9), (1.1, None)):
        a = torch.tensor(precision, requires_grad=True)
        (slope,) = torch.autograd.grad(expected(objective, gaussian(a), *nodes()), a)
        assert abs(slope) < tolerance if tolerance else abs(slope) > 1e-4


def biased(x):
    """A law of copies with a way back that is not as likely as the way there."""
    return Fixed(0.5 * x + 0.3, 0.6 + 0.3 * torch.sigmoid(x))


@pytest.mark.parametrize("forgets", [False, True])
def test_laws_that_are_not_symmetric_enter(forgets):
    """The truth is stationary with both log densities, and is not if they are left out."""
    objective = ConditionalNCE(num_noise=1, noise=biased)
    if forgets:
        inner = objective.draw
        objective.draw = lambda *args: NoisyCopies(inner(*args).points, NO_C)
    a = torch.tensor(1.0, requires_grad=True)
    loss = expected(objective, gaussian(a), *nodes())
    (slope,) = torch.autograd.grad(loss, a)
    assert abs(slope) > 1e-2 if forgets else abs(slope) < 1e-9


def test_jacobian_of_a_constrained_support(monkeypatch):
    """x log-normal, noise added to log x: the loss is that of log x, a normal."""
    with_nodes(monkeypatch)
    z, w = nodes()
    a = torch.tensor(1.0, requires_grad=True)
    positive = EnergyDistribution(
        lambda x: 0.5 * a * x.log() ** 2 + x.log(), support=constraints.positive
    )
    objective = ConditionalNCE(num_noise=1, scale=0.7, unit=1.0)
    loss = expected(objective, positive, z.exp(), w)
    torch.testing.assert_close(loss, expected(objective, gaussian(a), z, w), rtol=0, atol=1e-10)
    (slope,) = torch.autograd.grad(loss, a)
    assert abs(slope) < 1e-9


def flips(x):
    """Bits flip with probabilities that depend on their value: up with 0.3, down with 0.6."""
    return dist.Bernoulli(torch.where(x > 0, 0.4, 0.3)).to_event(1)


def test_states_enumerated():
    """Three bits and a law of flips that is not symmetric: nothing is approximated."""
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    w = torch.tensor([0.4, -0.7, 0.2, 1.1], requires_grad=True)
    p = EnergyDistribution(
        lambda x: x @ w[:3] + w[3] * x[..., 0] * x[..., 1],
        support=constraints.independent(constraints.boolean, 1),
        event_shape=(3,),
    )
    pairs = torch.tensor(list(itertools.product(range(8), range(8))))
    x, y = states[pairs[:, 0]], states[pairs[:, 1]]
    forth, back = flips(x).log_prob(y), flips(y).log_prob(x)
    law = torch.softmax(p.unnormalized_log_prob(states), 0).detach()
    weight = law[pairs[:, 0]] * forth.exp()
    objective = ConditionalNCE(num_noise=1, noise=flips)
    contrast = NoisyCopies(y[None], (forth - back)[None])
    loss = (weight * objective.per_datum(p, x, contrast, NO_C)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, w)[0], torch.zeros(4), rtol=0, atol=1e-14)
    drawn = objective.draw(p, x, None)
    forth, back = flips(x).log_prob(drawn.points[0]), flips(drawn.points[0]).log_prob(x)
    torch.testing.assert_close(drawn.log_ratio[0], forth - back, rtol=0, atol=1e-14)


# --- limits


def test_small_noise_is_score_matching(monkeypatch):
    """U = x^4 / 4 + x^2 / 2 under normal data: E[U'^2 / 2 - U''] = 23/2 - 4 = 7.5."""
    with_nodes(monkeypatch)
    quartic = EnergyDistribution(lambda x: 0.25 * x**4 + 0.5 * x**2, event_shape=())
    exact = 0.5 * (15 + 2 * 3 + 1) - (3 + 1)
    errors = []
    for t in (1e-3, 1e-4, 1e-5):
        objective = ConditionalNCE(num_noise=1, scale=math.sqrt(2 * t), unit=1.0)
        loss = expected(objective, quartic, *nodes())
        errors.append(abs(float(loss - math.log(2)) * 2 / t - exact))
    assert errors[-1] < 1e-2 * exact
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize("num_rows", [7, 40])
def test_is_energy_discrepancy_with_one_negative(num_rows):
    """With the guide's law of the perturbation and the same seed, to rounding."""
    law, x = dist.Normal(0.0, math.sqrt(0.8)), torch.randn(num_rows)
    p = EnergyDistribution(lambda x: 0.3 * x**4 - torch.cos(x), event_shape=())
    losses = []
    for objective in (ConditionalNCE(num_noise=1), EnergyDiscrepancy(num_negatives=1)):
        pyro.set_rng_seed(3)
        losses.append(objective.per_datum(p, x, objective.draw(p, x, law), NO_C))
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-12)


def test_its_own_noise_has_the_same_law(monkeypatch):
    """Variance 2t: the expected loss of energy discrepancy with M = 1 at time t, by quadrature."""
    with_nodes(monkeypatch)
    t, (z, w) = 0.5, nodes()
    p = gaussian(1.3)
    conditional = ConditionalNCE(num_noise=1, scale=math.sqrt(2 * t), unit=1.0)
    x, step = (part.flatten() for part in torch.meshgrid(z, z, indexing="ij"))
    rows = EnergyDiscrepancy(time=t, num_negatives=1).per_datum(
        p, x, Negatives((x + math.sqrt(2 * t) * step)[None]), NO_C
    )
    discrepancy = (torch.outer(w, w).flatten() * rows).sum()
    loss = expected(conditional, p, z, w)
    torch.testing.assert_close(loss, discrepancy, rtol=0, atol=1e-12)


def test_value_without_information():
    p = EnergyDistribution(lambda x: 0.0 * x + 3.0, event_shape=())
    objective = ConditionalNCE(num_noise=4)
    x = torch.randn(10)
    loss = objective.per_datum(p, x, objective.draw(p, x, None), NO_C)
    torch.testing.assert_close(loss, torch.full((10,), math.log(2)))


# --- estimates


TRUTH = torch.tensor([1.4, -0.5, 0.8], dtype=torch.float64)


def plane(theta):
    def energy(x):
        a, b, d = theta[..., :3].unbind(-1)
        return 0.5 * (a * x[..., 0] ** 2 + d * x[..., 1] ** 2) + b * x[..., 0] * x[..., 1]

    return EnergyDistribution(energy, event_shape=(2,))


def estimate(num_rows, change=lambda contrast: contrast):
    """The minimizer of the frozen loss by Newton's method, with its standard errors."""
    precision = torch.stack([TRUTH[:2], TRUTH[1:]])
    x = dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision).sample((num_rows,))
    objective = ConditionalNCE(num_noise=3)
    contrast = change(objective.draw(plane(TRUTH), x, None))

    def rows(theta):
        return objective.per_datum(plane(theta), x, contrast, NO_C)

    theta = TRUTH.clone()
    for _ in range(12):
        at = theta.requires_grad_()
        (gradient,) = torch.autograd.grad(rows(at).mean(), at)
        hessian = torch.autograd.functional.hessian(lambda t: rows(t).mean(), at)
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < 1e-9
    apart = theta.expand(num_rows, 3).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(apart).sum(), apart)
    bread = torch.linalg.inv(hessian)
    return theta, (bread @ torch.cov(scores.T) @ bread / num_rows).diagonal().sqrt()


def test_estimates_are_the_truth():
    """Within four standard errors, which see 0.13 in each of the three."""
    theta, stderr = estimate(20_000)
    assert 4 * stderr.max() < 0.13
    assert ((theta - TRUTH) / stderr).abs().max() < 4


def test_estimates_see_a_wrong_ratio():
    """The planted bug: copies shrunk towards the origin, their law taken for symmetric."""

    def shrunk(contrast):
        return contrast._replace(points=0.8 * contrast.points)

    theta, stderr = estimate(20_000, shrunk)
    assert ((theta - TRUTH) / stderr).abs().max() > 8


def test_slope_of_a_regression():
    """log Z depends on the context and cancels; five standard errors of 2000 rows are 0.15."""
    context = torch.randn(2000)
    x = context + torch.randn(2000)

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda y: 0.5 * y**2 - slope * context * y, event_shape=())
            pyro.sample("x", ebm, obs=x)

    svi = SVI(
        model, no_guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98}), loss=ConditionalNCE()
    )
    for _ in range(150):
        svi.step(x)
    assert pyro.param("slope").item() == pytest.approx(1.0, abs=0.15)


# --- the scale


def loss_at(scale, rows=None):
    """The loss of N(0, 1) against copies at a scale, over log 2, by quadrature."""
    z, w = nodes()
    logit = scale * z[:, None] * z + 0.5 * scale**2 * z**2
    return float((w[:, None] * w * softplus(-logit)).sum() / math.log(2))


def test_scale_is_doubled_until_the_loss_leaves_log_two():
    assert loss_at(1.0) > 0.76
    assert loss_at(2.0) < 0.74
    assert doubled_scale(torch.randn(20_000, 1), torch.ones(1)) == 2.0


def test_scale_is_in_units():
    """Coordinates' units and correlations do not matter; a sixteenth of a unit is 16 doublings."""
    x = torch.randn(20_000, 3)
    mixed = x @ torch.tensor([[100.0, 0.0, 0.0], [0.0, 1.0, 0.99], [0.0, 0.0, 0.1]])
    alone = doubled_scale(x, x.std(0))
    assert doubled_scale(100.0 * x, 100.0 * x.std(0)) == alone
    assert doubled_scale(x, x.std(0) / 4) == 4 * alone
    assert doubled_scale(mixed, mixed.std(0)) < alone


@pytest.mark.parametrize(
    ("unit", "nearest", "sentence"),
    [(1e6, 2.0**-12, "already told.*give a unit="), (1e-6, 16.0, "not yet told.*give a unit=")],
)
def test_a_unit_far_from_the_spread_is_told(unit, nearest, sentence):
    with pytest.warns(SurrogateWarning, match=sentence):
        assert doubled_scale(torch.randn(500, 2), torch.full((2,), unit)) == nearest


def test_few_rows_count_as_independent_coordinates():
    """Twelve rows know nothing of a covariance in ten dimensions."""
    assert 0.25 <= doubled_scale(torch.randn(12, 10), torch.ones(10)) <= 1.0


def scored(objective, x, mask=True):
    def model(x):
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            p = EnergyDistribution(lambda y: 0.5 * y.square().sum(-1), event_shape=(2,))
            pyro.sample("x", p, obs=x)

    return objective.differentiable_loss(model, no_guide, x)


def test_noise_is_measured_once_and_kept():
    x = torch.randn(400, 2) * torch.tensor([1.0, 5.0])
    first = ConditionalNCE()
    scored(first, x)
    torch.testing.assert_close(first.fitted["x"][1], x.std(0))
    scored(first, 10.0 * x)
    torch.testing.assert_close(first.fitted["x"][1], x.std(0))
    second = ConditionalNCE()
    second.load_state_dict(first.state_dict())
    assert second.fitted["x"][0] == first.fitted["x"][0]
    assert torch.equal(second.fitted["x"][1], first.fitted["x"][1])


def test_masked_rows_have_no_say():
    x, mask = torch.randn(60, 2), torch.arange(60) % 3 != 0
    objective = ConditionalNCE()
    scored(objective, torch.where(mask[:, None], x, 1e3), mask)
    torch.testing.assert_close(objective.fitted["x"][1], x[mask].std(0), rtol=0, atol=1e-12)


def test_dtype_is_kept():
    objective = ConditionalNCE()
    assert scored(objective, torch.randn(30, 2, dtype=torch.float32)).dtype == torch.float32


def test_accuracy_is_that_of_the_order():
    """Of standard normal data, from copies at two units: three quarters, the chance that two
    normals of correlation 1 / sqrt(2) have the same sign.
    """
    objective = ConditionalNCE(scale=2.0, unit=1.0)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(1.0), obs=x)

    objective.differentiable_loss(model, no_guide, torch.randn(20_000))
    assert float(objective.diagnostics["x"]["accuracy"]) == pytest.approx(0.75, abs=0.01)


def test_frozen_noise_makes_one_function():
    a = torch.tensor(1.2)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(a), obs=x)

    x = torch.randn(30)
    frozen = ConditionalNCE().freeze(model, x)
    assert not frozen.free_log_normalizers()
    values = [
        pyro.poutine.trace(surrogate(model, frozen)).get_trace(x).log_prob_sum() for _ in range(2)
    ]
    assert values[0] == values[1]


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_noise": 0}, "num_noise must be a whole number of at least 1, got 0"),
        ({"num_noise": 1.5}, "num_noise must be a whole number of at least 1"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"unit": torch.tensor([1.0, -1.0])}, "unit must be positive"),
        ({"noise": flips, "scale": 1.0}, "give them or noise, not both"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ConditionalNCE(**options)


@pytest.mark.parametrize("x", [torch.ones(1, 2), torch.ones(5, 2)])
def test_a_batch_without_spread(x):
    with pytest.raises(ValueError, match=r"row\(s\) do not vary in every coordinate: give unit="):
        scored(ConditionalNCE(), x)
    assert scored(ConditionalNCE(unit=1.0, scale=1.0), x).isfinite()


def site(ebm, x, objective=None, guide=no_guide):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    return (objective or ConditionalNCE()).differentiable_loss(model, guide, x)


def test_discrete_data_need_a_law():
    bits = EnergyDistribution(
        lambda x: x.sum(-1),
        support=constraints.independent(constraints.boolean, 1),
        event_shape=(3,),
    )
    x = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    with pytest.raises(NotImplementedError, match="give noise=, a function from x .*or use NCE"):
        site(bits, x)
    assert site(bits, x, ConditionalNCE(noise=flips)).isfinite()


def test_coordinates_fewer_than_an_events_dims():
    """Cholesky factors of correlations are matrices of three coordinates in a vector."""
    tilt = torch.tensor(0.5, requires_grad=True)
    law = EnergyDistribution(
        lambda x: -tilt * x.diagonal(dim1=-2, dim2=-1)[..., 1:].log().sum(-1),
        event_shape=(3, 3),
        support=constraints.corr_cholesky,
    )
    x = dist.LKJCholesky(3, 1.25).sample((2000,))  # density of 2 (eta - 1) log diagonal, and once
    objective = ConditionalNCE(2)
    assert site(law, x, objective).isfinite()
    assert objective.fitted["x"][1].shape == (3,)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 0.3).to_event(1))

    assert site(law, x, guide=guide).isfinite()


def test_nan_and_values_outside_the_support():
    positive = EnergyDistribution(lambda x: x, support=constraints.positive)
    with pytest.raises(ValueError, match="support"):
        site(positive, torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(ValueError, match="support"):
        site(gaussian(1.0), torch.tensor([1.0, float("nan"), 2.0]))


@pytest.mark.filterwarnings("ignore:Encountered (NaN|inf)")
def test_energies_that_are_not_finite():
    ebm = EnergyDistribution(lambda x: (x - 100.0).log(), event_shape=())
    with pytest.raises(NonFiniteEnergyError, match="site 'x'.*not finite in 7 of 7 rows"):
        site(ebm, torch.randn(7))


def test_laws_of_other_events():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    plane_of_two = EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,))
    with pytest.raises(ValueError, match=r"event_shape \(\); the unconstrained .*have \(2,\)"):
        site(plane_of_two, torch.randn(4, 2), guide=guide)
    far = ConditionalNCE(noise=lambda x: dist.LogNormal(x, 1.0))
    with pytest.raises(ValueError, match="lives on .*, the EBM on Real"):
        site(gaussian(1.0), torch.randn(4), far)


def test_a_gebm_has_no_density():
    ebm = GeneralizedEBM(lambda z: 2 * z, dist.Normal(NO_C, 1.0), lambda x: x**2)
    with pytest.raises(ValueError, match="ConditionalNCE needs a density.*use KALE"):
        site(ebm, torch.randn(5))
