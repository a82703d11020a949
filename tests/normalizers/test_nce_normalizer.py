"""NCE's log Z: the errors of theory, intervals that cover, and what it does not believe."""

import math

import pyro.distributions as dist
import pytest
import torch
from laws_with_log_z import check_estimates, draws_of_tilted, tilted

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.normalizers.nce import nce, nce_covariance

F64 = torch.float64


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def gaussian(precision):
    return EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())


def wide():
    return dist.Normal(torch.tensor(0.0), 1.5)


# --- the covariance of parameter and c: N(0, 1) told from N(0, 1.5^2)


def covariance_by_quadrature(ratio):
    """n times the covariance of precision and c: the inverse information, its corner corrected."""
    x = torch.linspace(-12.0, 12.0, 20_001)
    p, q = dist.Normal(0.0, 1.0).log_prob(x).exp(), wide().log_prob(x).exp()
    slopes = torch.stack([-0.5 * x**2, -torch.ones_like(x)])
    weights = ratio * q / (p + ratio * q) * p * (x[1] - x[0])
    inverse = torch.linalg.inv((slopes * weights) @ slopes.T)
    inverse[1, 1] -= 1.0 + 1.0 / ratio
    return inverse


PUBLISHED = {1: (2.978, -1.886, 1.338), 10: (2.112, -1.099, 0.591)}


@pytest.mark.parametrize("ratio", [1, 10])
def test_the_covariance_is_that_of_theory(ratio):
    """Over 50 000 data its elements are known to about 2 per cent; 10 are seen."""
    want = covariance_by_quadrature(ratio)
    elements = (float(want[0, 0]), float(want[0, 1]), float(want[1, 1]))
    assert elements == pytest.approx(PUBLISHED[ratio], abs=1e-3)
    precision = torch.tensor(1.0, requires_grad=True)
    points = wide().sample((50_000 * ratio,))
    data = torch.randn(50_000)
    seen = nce_covariance(gaussian(precision), data, points, wide(), fitted=[precision])
    torch.testing.assert_close(50_000 * seen, want, rtol=0.1, atol=0.0)


def fitted_jointly(data, points, num_steps=12):
    """Newton's method on the logistic loss of (precision, c), a batch of repeats at once."""
    x = torch.cat([data, points], 1)
    is_data = torch.arange(x.shape[1]) < data.shape[1]
    offset = -wide().log_prob(x) - math.log(points.shape[1] / data.shape[1])
    slopes = torch.stack([-0.5 * x**2, -torch.ones_like(x)], -1)
    theta = torch.tensor([1.0, 0.9]).expand(len(x), 2)
    for _ in range(num_steps):
        prob = torch.sigmoid((slopes @ theta[..., None]).squeeze(-1) + offset)
        grad = ((is_data.double() - prob)[..., None] * slopes).sum(1)
        weighted = slopes * (prob * (1 - prob))[..., None]
        theta = theta + torch.linalg.solve(weighted.mT @ slopes, grad)
    return theta


def check_covariance_over_repeats(ratio, num_repeats, num_data=500):
    """An element over R repeats errs by about sqrt(2/R) of itself; five of that are allowed."""
    data = torch.randn(num_repeats, num_data)
    points = wide().sample((num_repeats, num_data * ratio))
    theta = fitted_jointly(data, points)
    seen = num_data * torch.cov(theta.T)
    said = []
    for i in range(20):
        precision = theta[i, 0].clone().requires_grad_()
        law = gaussian(precision)
        said.append(nce_covariance(law, data[i], points[i], wide(), fitted=[precision]))
    allowed = 5 * (2 / num_repeats) ** 0.5
    for want in (num_data * torch.stack(said).mean(0), covariance_by_quadrature(ratio)):
        torch.testing.assert_close(seen, want, rtol=allowed, atol=0.0)


def test_the_covariance_is_that_over_repeats():
    check_covariance_over_repeats(1, 300)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 10])
def test_the_covariance_is_that_over_many_repeats(ratio):
    check_covariance_over_repeats(ratio, 1000)


# --- log Z of a law whose draws one has


def test_intervals_cover():
    law, log_z = tilted(dim=2, factor=2.0)
    check_estimates([nce(law, draws_of_tilted((300,), 2, 2.0)) for _ in range(40)], log_z)


def test_discrete_laws():
    """Four spins in a chain, enumerated."""
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)

    def energy(x):
        return -1.5 * (x[..., :-1] * x[..., 1:]).sum(-1)

    law = EnergyDistribution(energy, dist.Bernoulli(torch.full((4,), 0.5)).to_event(1))
    log_z = float((-energy(states)).exp().mean().log())
    picks = torch.multinomial((-energy(states)).exp(), 40 * 400, replacement=True).view(40, 400)
    check_estimates([nce(law, states[pick]) for pick in picks], log_z)


def test_noise_may_fall_where_the_law_has_no_mass():
    """Half of the noise is below zero, where the energy is infinite; Z is a half of the normal."""

    def energy(x):
        return torch.where(x > 0, 0.5 * x**2, torch.inf)

    law = EnergyDistribution(energy, event_shape=())
    estimates = [nce(law, torch.randn(400).abs(), wide()) for _ in range(40)]
    check_estimates(estimates, 0.5 * math.log(math.pi / 2))


# --- log Z at parameters that were fitted to the same data


def fitted_with_exact_noise(data, ratio, num_steps=12):
    """NCE with the noise's expectations by quadrature: the limit of new noise at every step."""
    grid = torch.linspace(-9.0, 9.0, 301)
    density = wide().log_prob(grid).exp() * (grid[1] - grid[0]) * ratio

    def terms(x, theta):
        slopes = torch.stack([-0.5 * x**2, -torch.ones_like(x)], -1)
        logits = (slopes @ theta[..., None]).squeeze(-1) - wide().log_prob(x) - math.log(ratio)
        return slopes, torch.sigmoid(logits)

    theta = torch.tensor([1.0, 0.9]).expand(len(data), 2)
    for _ in range(num_steps):
        slopes, prob = terms(data, theta)
        at_grid, prob_grid = terms(grid.expand(len(data), -1), theta)
        grad = ((1 - prob)[..., None] * slopes).mean(1)
        grad = grad - ((density * prob_grid)[..., None] * at_grid).sum(1)
        curvature = (slopes * (prob * (1 - prob))[..., None]).mT @ slopes / data.shape[1]
        weights = density * prob_grid * (1 - prob_grid)
        curvature = curvature + (at_grid * weights[..., None]).mT @ at_grid
        theta = theta + torch.linalg.solve(curvature, grad)
    return theta[:, 0]


def test_the_error_is_about_the_fitted_parameters():
    """Over 300 repeats a standard error that is off by a fifth is seen; that of the true
    parameters is three times as large.
    """
    data = torch.randn(300, 200)
    scores, theirs = [], []
    for x, fit in zip(data, fitted_with_exact_noise(data, 1), strict=True):
        precision = fit.clone().requires_grad_()
        seen = nce(gaussian(precision), x, wide(), num_noise=1, fitted=[precision])
        scores.append((seen.value - 0.5 * (2 * math.pi / fit).log()) / seen.stderr)
        theirs.append(seen.stderr)
    scores = torch.stack(scores)
    assert abs(float(scores.mean())) < 5 / 300**0.5
    assert float(scores.std()) == pytest.approx(1.0, abs=5 / 600**0.5)
    of_truth = (float(covariance_by_quadrature(1)[1, 1]) / 200) ** 0.5
    assert of_truth > 3 * float(torch.stack(theirs).mean())


# --- doubts and refusals


def test_data_of_another_law_are_noticed():
    """Importance sampling from the same noise needs no data, and disagrees."""
    seen = nce(gaussian(1.0), 1.2 * torch.randn(5000), wide())
    assert not seen.is_trusted
    assert "the data are not draws of this law" in str(seen)
    assert nce(gaussian(1.0), torch.randn(5000), wide()).is_trusted


def test_noise_that_is_told_perfectly_is_not_to_be_trusted():
    """Forty dimensions: of 200 data and 2000 noise draws only a few overlap."""
    law = EnergyDistribution(lambda x: 2.0 * x.square().sum(-1), event_shape=(40,))
    noise = dist.Normal(torch.zeros(40), 1.0).to_event(1)
    seen = nce(law, 0.5 * torch.randn(200, 40), noise)
    assert not seen.is_trusted
    assert seen.ess < 100


def test_it_goes_stale_with_its_parameters():
    module = torch.nn.Linear(1, 1, bias=False)
    law = EnergyDistribution(Squared(module), dist.Normal(torch.zeros(1), 1.0).to_event(1))
    seen = nce(law, torch.randn(50, 1), fitted=list(module.parameters()))
    assert not seen.is_stale
    with torch.no_grad():
        module.weight.add_(1.0)
    assert seen.is_stale


class Squared(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).square().sum(-1)


def test_what_is_not_identified_is_refused():
    a, b = torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)
    law = EnergyDistribution(lambda x: 0.5 * (a + b) * x**2, event_shape=())
    with pytest.raises(ValueError, match="2 elements are not identified"):
        nce(law, torch.randn(50), wide(), fitted=[a, b])
    with pytest.raises(ValueError, match="1 elements are not identified"):
        nce(gaussian(1.0 + a), torch.randn(50), wide(), fitted=[b])
    with pytest.raises(ValueError, match="must require gradients"):
        nce(gaussian(a), torch.randn(50), wide(), fitted=[torch.ones(())])
    assert nce(law, torch.randn(50), wide(), fitted=[a]).stderr > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nce(gaussian(1.0), torch.randn(9)), "no base to take for the noise: give noise="),
        (lambda: nce(gaussian(1.0), torch.randn(9, 2), wide()), r"data must be \(N,\) \+ \(\)"),
        (lambda: nce(gaussian(1.0), torch.randn(1), wide()), "N of at least 2"),
        (lambda: nce(gaussian(1.0), torch.randn(9), wide().expand([3])), r"batch_shape \(3,\)"),
        (lambda: nce(gaussian(1.0), torch.randn(9), gaussian(2.0)), "normalized distribution"),
        (lambda: nce(gaussian(1.0), torch.randn(9), wide(), num_noise=0), "num_noise"),
        (
            lambda: nce(gaussian(1.0), torch.rand(9), dist.Exponential(1.0)),
            "noise lives on .* must be the same, or that of the noise larger",
        ),
        (
            lambda: nce(gaussian(1.0), torch.tensor([0.0, torch.nan, 1.0]), wide()),
            "1 of 3 data are NaN: leave them out",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_energies_that_are_not_finite_are_named():
    law = EnergyDistribution(lambda x: torch.where(x > 0, x, torch.inf), event_shape=())
    with pytest.raises(NonFiniteEnergyError, match="not finite at a datum"):
        nce(law, -torch.ones(5), wide())
    below = dist.Normal(torch.tensor(-5.0), 0.1)
    with pytest.raises(NonFiniteEnergyError, match="none of 50 noise draws has finite energy"):
        nce(law, torch.ones(5), below)
