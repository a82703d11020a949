"""Telescoping NCE: bridges between Gaussians are known, across a chasm of a thousand too."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError, SurrogateWarning
from pyro_ebm.infer import NCE
from pyro_ebm.infer.noise.telescoping import BridgeEnergy, TelescopingNCE
from pyro_ebm.infer.noise.waymarks import Waymarks, equal_steps

BASE = dist.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
NO_C = torch.zeros((), dtype=torch.float64)
SPREAD = 1e-3  # of the data; the base's is one


def no_guide(*args):
    return None


class Squares(nn.Module):
    """Bridges E_k = a_k u_k x^2 + b_k, the shapes a_k in units u_k that make them one."""

    def __init__(self, theta, units):
        super().__init__()
        self.theta, self.units = theta, units

    def bridges(self, x):
        a, b = self.theta.unflatten(-1, (2, -1)).unbind(-2)
        return (a * self.units * x.unsqueeze(-1) ** 2 + b).movedim(-1, 0)

    def forward(self, x):
        return self.bridges(x).sum(0)


def truth(waymarks, spread=SPREAD):
    """Units and parameters of the exact bridges between N(0, spread^2) and N(0, 1)."""
    a = waymarks.square()
    variances = torch.cat([torch.tensor([spread**2]), (1 - a) * spread**2 + a])
    units = 0.5 * (1 / variances[:-1] - 1 / variances[1:])
    constants = 0.5 * (variances[:-1] / variances[1:]).log()
    return units, torch.cat([torch.ones_like(units), constants]), variances


def squares(theta, units, **options):
    return EnergyDistribution(Squares(theta, units), **(options or {"base": BASE}))


# --- the minimum


@pytest.mark.parametrize("num_bridges", [1, 2, 5])
def test_exact_bridges_are_stationary(num_bridges):
    """By the trapezoid rule: every term of the loss is an expectation at one waymark."""
    objective = TelescopingNCE(num_bridges, waymarks=torch.linspace(0, 1, num_bridges + 1)[1:])
    units, theta, variances = truth(objective.waymarks, spread=0.3)
    z = torch.linspace(-10.0, 10.0, 801)
    x, points = variances[0].sqrt() * z, variances[1:, None].sqrt() * z
    before = x if num_bridges == 1 else points[-2]
    contrast = Waymarks(points, BASE.log_prob(torch.stack([before, points[-1]])))
    for shift, is_stationary in ((0.0, True), (0.1, False)):
        at = (theta + shift).requires_grad_()
        c = torch.tensor(0.0, requires_grad=True)
        rows = objective.per_datum(squares(at, units), x, contrast, c)
        loss = (torch.softmax(-0.5 * z**2, 0) * rows).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (at, c))])
        assert (gradient.abs().max() < 1e-9) == is_stationary


def test_log_z_is_what_the_constants_leave():
    """Constants taken from the energy and given to c change nothing: it is log Z."""
    objective = TelescopingNCE(3, waymarks=(0.2, 0.6, 1.0))
    units, theta, _ = truth(objective.waymarks, spread=0.3)
    x = 0.3 * torch.randn(50)
    contrast = objective.draw(squares(theta, units).expand([50]), x, None)
    shifted = theta.clone()
    shifted[3:] += 0.7
    losses = [
        objective.per_datum(squares(t, units), x, contrast, c)
        for t, c in ((theta, NO_C), (shifted, torch.tensor(-2.1)))
    ]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def estimate(num_bridges, num_rows, change=lambda contrast: contrast):
    """Newton's minimizer over all bridges.

    Returns:
        The estimate of log p(0), its error, and its standard error from influence functions.
    """
    x = SPREAD * torch.randn(num_rows)
    objective = TelescopingNCE(num_bridges)
    untold = EnergyDistribution(lambda x: x, base=BASE).expand([num_rows])
    contrast = change(objective.draw(untold, x, None))
    units, theta, _ = truth(objective.fitted[""])  # drawn outside of any site

    def rows(theta):
        return objective.per_datum(squares(theta, units), x, contrast, NO_C)

    for _ in range(20):
        at = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(rows(at).mean(), at)
        hessian = torch.autograd.functional.hessian(lambda t: rows(t).mean(), at)
        if gradient.abs().max() < 1e-9:
            break
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    apart = theta.detach().expand(num_rows, -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(apart).sum(), apart)
    influence = (scores @ torch.linalg.inv(hessian))[:, num_bridges:].sum(-1)
    error = -theta[num_bridges:].sum() + math.log(SPREAD)
    return float(error.detach()), float(influence.std() / math.sqrt(num_rows)), objective


def test_a_chasm_is_crossed():
    """Data N(0, 1e-6), noise N(0, 1): log p(0) within four standard errors of 0.25 nats."""
    error, stderr, objective = estimate(8, 2000)
    assert stderr < 0.25
    assert abs(error) < 4 * stderr
    found = [float(objective.evaluation.notes[f"accuracy_{k}"]) for k in range(1, 9)]
    assert all(0.6 < accuracy < 0.8 for accuracy in found)


def test_one_bridge_falls_into_the_chasm():
    """With 300 rows a draw of noise or none lies among the data: log p(0) is off by tens of nats
    in some data set, where eight bridges are off by less than four of their standard errors.
    """
    alone, bridged = [], []
    for seed in range(5):
        pyro.set_rng_seed(seed)
        alone.append(abs(estimate(1, 300)[0]))
        error, stderr, _ = estimate(8, 300)
        bridged.append(abs(error) / stderr)
        assert stderr < 0.8
    assert max(alone) > 10
    assert max(bridged) < 4


def test_the_chasms_test_sees_a_bug():
    """The planted bug: noise eight times as wide as its density says."""

    def widened(contrast):
        width = torch.ones(8, 1)
        width[-1] = 8.0
        return contrast._replace(points=width * contrast.points)

    error, stderr, _ = estimate(8, 2000, widened)
    assert abs(error) > 8 * stderr


# --- what it is in other words


def test_one_bridge_is_nce():
    x, theta = torch.randn(30), torch.tensor([0.4, 0.1], requires_grad=True)
    p = squares(theta, torch.ones(1), event_shape=())
    noise, c = dist.Normal(torch.tensor(0.3), 1.4), torch.tensor(0.9)
    losses = []
    for objective in (TelescopingNCE(1, noise=noise), NCE(num_noise=1, noise=noise)):
        pyro.set_rng_seed(2)
        losses.append(objective.per_datum(p, x, objective.draw(p.expand([30]), x, None), c))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_noise_that_is_no_base_is_the_last_bridges():
    """The same model without a base: its last bridge holds minus log q."""
    theta = torch.tensor([0.4, 0.1, -0.3, 0.2])
    x = torch.randn(20)

    class WithNoise(Squares):
        def bridges(self, x):
            bridges = super().bridges(x)
            return torch.stack([bridges[0], bridges[1] - BASE.log_prob(x)])

    on_base = squares(theta, torch.ones(2))
    without = EnergyDistribution(WithNoise(theta, torch.ones(2)), event_shape=())
    losses = []
    for p, noise in ((on_base, None), (without, BASE)):
        pyro.set_rng_seed(1)
        objective = TelescopingNCE(2, noise=noise)
        losses.append(objective.per_datum(p, x, objective.draw(p.expand([20]), x, None), NO_C))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)


def test_constrained_supports_are_mixed_unconstrained():
    """Log-normal data and noise: the waymarks are exponentials, ratios do not change."""
    theta = torch.tensor([0.4, 0.1, -0.3, 0.2])

    class OfLogs(Squares):
        def bridges(self, x):
            return super().bridges(x.log())

    u = 0.5 * torch.randn(40)
    positive = EnergyDistribution(
        OfLogs(theta, torch.ones(2)), base=dist.LogNormal(BASE.loc, BASE.scale)
    )
    losses = []
    for p, x in ((positive, u.exp()), (squares(theta, torch.ones(2)), u)):
        pyro.set_rng_seed(1)
        objective = TelescopingNCE(2)
        losses.append(objective.per_datum(p, x, objective.draw(p.expand([40]), x, None), NO_C))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)


# --- waymarks


@pytest.mark.parametrize("spread", [1e-3, 0.5])
def test_waymarks_of_centred_gaussians_are_geometric(spread):
    """Equal ratios of variances are equal Fisher-Rao steps."""
    z = torch.randn(500)
    z = (z - z.mean()) / z.std()
    weights = equal_steps(spread * z, z, 6)
    variances = spread ** (2 - torch.arange(1.0, 7.0) / 3)
    exact = ((variances - spread**2) / (1 - spread**2)).sqrt()
    torch.testing.assert_close(weights, exact, rtol=5e-3, atol=0)
    assert weights[-1] == 1


def test_waymarks_between_shifted_gaussians():
    """With unit variances throughout, only the mean moves, in proportion to the weight."""
    z = torch.randn(500)
    z = (z - z.mean()) / z.std()
    weights = equal_steps(z, z + 8.0, 4)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.5, 0.75, 1.0]), rtol=0, atol=2e-3)


def test_waymarks_where_one_mean_and_another_variance_move():
    """The speed squared is m^2 + (v' / v)^2 / 2: integrated here by the trapezoid rule."""
    shift, spread = 3.0, 0.1
    z = torch.randn(500, 2)
    z = z / z.std(0)
    start = z * torch.tensor([1.0, spread]) - (z * torch.tensor([1.0, spread])).mean(0)
    end = (z - z.mean(0)) + torch.tensor([shift, 0.0])
    weights = equal_steps(start, end, 4)
    a = torch.linspace(0, 1, 100_001)
    log_slope = 2 * a * (1 - spread**2) / (spread**2 + (1 - spread**2) * a**2)
    length = torch.cumulative_trapezoid((shift**2 + 0.5 * log_slope**2).sqrt(), a)
    at = length[torch.searchsorted(a[1:], weights.clamp_max(1.0))]
    torch.testing.assert_close(at / length[-1], torch.arange(1, 5) / 4.0, rtol=0, atol=2e-3)


def fitted(objective, energy, x, mask=True):
    def model(x):
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
            pyro.sample("x", EnergyDistribution(energy, base=BASE), obs=x)

    return objective.differentiable_loss(model, no_guide, x)


def network(num_bridges=3):
    return BridgeEnergy(Columns(num_bridges), num_bridges)


class Columns(nn.Module):
    def __init__(self, num):
        super().__init__()
        self.linear = nn.Linear(2, num)

    def forward(self, x):
        return self.linear(torch.stack([x, x**2], -1))


def test_waymarks_are_fitted_once_and_kept():
    first, energy = TelescopingNCE(3), network()
    fitted(first, energy, 0.1 * torch.randn(100))
    kept = first.fitted["x"]
    fitted(first, energy, torch.randn(100))
    assert first.fitted["x"] is kept
    second = TelescopingNCE(3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.fitted["x"], kept)


class Constants:
    """Bridges that are constant: the model is the base, and log Z minus their sum."""

    def __init__(self, values):
        self.values = torch.tensor(values)

    def bridges(self, x):
        return self.values.reshape((-1,) + (1,) * x.dim()).expand((-1, *x.shape))

    def __call__(self, x):
        return self.bridges(x).sum(0)


@pytest.mark.parametrize("values", [[0.7], [1.5, -0.4, 2.0]])
def test_the_first_log_z_is_that_of_constant_bridges(values):
    objective = TelescopingNCE(len(values))
    p, x = EnergyDistribution(Constants(values), base=BASE).expand([20]), torch.randn(20)
    contrast = objective.draw(p, x, None)
    found = objective.initial_log_normalizer(p, x, contrast)
    torch.testing.assert_close(found, -torch.tensor(sum(values)), rtol=0, atol=1e-12)


def test_masked_rows_have_no_say():
    x, mask = 0.1 * torch.randn(90), torch.arange(90) % 3 != 0
    padded = torch.where(mask, x, torch.tensor(50.0))
    objective, energy = TelescopingNCE(3), network()
    pyro.set_rng_seed(0)
    noise = BASE.expand([90]).sample()
    pyro.set_rng_seed(0)
    fitted(objective, energy, padded, mask)
    torch.testing.assert_close(objective.fitted["x"], equal_steps(x[mask], noise[mask], 3))


def test_dtype_is_kept():
    energy = network().to(torch.float32)
    base = dist.Normal(torch.tensor(0.0, dtype=torch.float32), 1.0)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(energy, base=base), obs=x)

    x = torch.randn(20, dtype=torch.float32)
    loss = TelescopingNCE(3).differentiable_loss(model, no_guide, x)
    assert loss.dtype == torch.float32


# --- what is said


def test_diagnostics():
    objective = TelescopingNCE(3)
    fitted(objective, network(), 0.1 * torch.randn(400))
    found = objective.diagnostics["x"]
    assert set(found) == {"log_z", "accuracy", "accuracy_1", "accuracy_2", "accuracy_3"}
    assert found["accuracy"] == max(found[f"accuracy_{k}"] for k in (1, 2, 3))


def test_too_few_bridges_are_told():
    """One bridge over a chasm of ten thousand: no draw of noise is ever among the data."""

    def model(x):
        theta = pyro.param("theta", torch.tensor([1e9, -5.0]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", squares(theta, torch.ones(1)), obs=x)

    def train(objective):
        svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
        for _ in range(130):
            svi.step(1e-7 * torch.randn(20))

    objective = TelescopingNCE(1)
    objective.log_normalizers["x"] = nn.Parameter(torch.tensor(0.0))
    with pytest.warns(SurrogateWarning, match="TelescopingNCE .*told apart without error"):
        train(objective)


# --- what is refused


@pytest.mark.parametrize(
    "waymarks", [(0.5,), (0.5, 0.4, 1.0), (0.2, 0.4, 0.9), (0.0, 0.5, 1.0), (-0.1, 0.5, 1.0)]
)
def test_waymarks_must_ascend_to_one(waymarks):
    with pytest.raises(ValueError, match=r"3 ascending numbers in \(0, 1\], the last one 1"):
        TelescopingNCE(3, waymarks=waymarks)


def test_numbers_of_bridges():
    with pytest.raises(ValueError, match="num_bridges must be a whole number of at least 1, got 0"):
        TelescopingNCE(0)
    with pytest.raises(ValueError, match="num_bridges must be a whole number of at least 1, got 0"):
        BridgeEnergy(torch.cos, 0)
    with pytest.raises(ValueError, match=r"'x' has 3 bridges, .*num_bridges=4\) needs 4"):
        fitted(TelescopingNCE(4, waymarks=(0.1, 0.2, 0.5, 1.0)), network(3), torch.randn(9))
    with pytest.raises(ValueError, match=r"last dim must hold one value for each of the 2 bridges"):
        fitted(TelescopingNCE(2), BridgeEnergy(Columns(3), 2), torch.randn(9))


def test_energies_without_bridges():
    with pytest.raises(TypeError, match="sum of bridges.*got Tanh: use BridgeEnergy"):
        fitted(TelescopingNCE(2), nn.Tanh(), torch.randn(9))


class NoSum(Squares):
    def forward(self, x):
        return self.bridges(x)[0]


def test_energies_that_are_not_the_sum():
    energy = NoSum(torch.ones(4), torch.ones(2))
    with pytest.raises(ValueError, match=r"not the sum of its bridges.*self\.bridges\(x\)\.sum"):
        fitted(TelescopingNCE(2), energy, torch.randn(9))


def test_one_row_spaces_no_waymarks():
    with pytest.raises(ValueError, match="which has one row only: give waymarks="):
        fitted(TelescopingNCE(3), network(), torch.randn(1))
    assert fitted(TelescopingNCE(3, waymarks=(0.1, 0.5, 1)), network(), torch.randn(1)).isfinite()


def test_rows_that_are_not_finite_space_no_waymarks():
    """As where Pyro's validation is off, which tells of them otherwise."""
    rows = torch.tensor([[0.0], [1.0], [float("nan")]])
    with pytest.raises(ValueError, match="look for NaN in the data, or give waymarks="):
        equal_steps(rows, torch.randn(3, 1), 3)


def test_discrete_supports():
    bits = dist.Bernoulli(torch.tensor(0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(network(2), base=bits), obs=x)

    with pytest.raises(NotImplementedError, match="continuous support, got Boolean.*use NCE"):
        TelescopingNCE(2).differentiable_loss(model, no_guide, torch.tensor([0.0, 1.0]))


def test_conditional_energies():
    """One log Z for all rows, as with NCE."""
    context = torch.randn(20)

    class Regression(Squares):
        def bridges(self, x):
            return super().bridges(x) + context * x

    energy = Regression(torch.ones(4), torch.ones(2))
    with pytest.raises(ValueError, match="depends on row-wise values.*RankingNCE"):
        fitted(TelescopingNCE(2), energy, torch.randn(20))


@pytest.mark.filterwarnings("ignore:Encountered (NaN|inf)")
def test_numbers_that_are_not_finite():
    class Logs(Squares):
        def bridges(self, x):
            return (x - 100.0).log().expand(2, *x.shape)

    energy = Logs(torch.ones(4), torch.ones(2))
    with pytest.raises(NonFiniteEnergyError, match="site 'x'.*not finite in 7 of 7 rows"):
        fitted(TelescopingNCE(2), energy, torch.randn(7))
    with pytest.raises(ValueError, match="support"):
        fitted(TelescopingNCE(3), network(), torch.tensor([0.0, float("nan")]))
    positive = EnergyDistribution(network(), support=constraints.positive)
    with pytest.raises(ValueError, match="support"):
        TelescopingNCE(3).differentiable_loss(
            lambda x: pyro.sample("x", positive.expand([2]).to_event(1), obs=x),
            no_guide,
            torch.tensor([1.0, -1.0]),
        )
