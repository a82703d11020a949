"""The Wasserstein critic: its definition, closed forms on a line, and what it refuses."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.infer.divergences.wasserstein import WassersteinCritic
from pyro_ebm.infer.scoring.contrast import Contrast

NUM_ROWS = 6
ZERO = torch.zeros(())


def no_guide(*args):
    return None


class Setup:
    """A critic of the plane, data, and draws that belong to the data's rows."""

    def __init__(self, centre, attach):
        self.weight = torch.randn(2, requires_grad=True)
        self.data = torch.randn(NUM_ROWS, 2)
        self.objective = WassersteinCritic(3 * NUM_ROWS, gradient_penalty=0.7, centre=centre)
        self.whole = attach(self.objective, self.ebm().expand([NUM_ROWS]), self.data)
        self.loss, self.grad = self.evaluate(self.full, self.data)

    def energy(self, x):
        return torch.tanh(x @ self.weight) + 0.1 * x.square().sum(-1)

    def ebm(self):
        return EnergyDistribution(self.energy, base=dist.Normal(torch.zeros(2), 1.5).to_event(1))

    def full(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.ebm(), obs=x)

    def evaluate(self, model, *args):
        loss = self.objective.differentiable_loss(model, no_guide, *args)
        return loss.item(), torch.autograd.grad(loss, self.weight)[0]

    def check(self, loss, grad):
        assert loss == pytest.approx(self.loss, abs=1e-10)
        torch.testing.assert_close(grad, self.grad, rtol=0, atol=1e-10)


@pytest.fixture(params=[0, 1])
def setup(request, attach):
    return Setup(request.param, attach)


def test_definition(setup):
    """mean f(y) - mean f(x) plus the penalty, f = -E, row by row."""
    total = torch.zeros(())
    for i in range(NUM_ROWS):
        draws = setup.whole.points[:, i]
        z = setup.whole.between[i].clone().requires_grad_()
        (slope,) = torch.autograd.grad(-setup.energy(z), z, create_graph=True)
        penalty = (slope.square().sum().sqrt() - setup.objective.centre) ** 2
        total = total + setup.energy(setup.data[i]) - setup.energy(draws).mean() + 0.7 * penalty
    setup.check(total.item(), torch.autograd.grad(total, setup.weight)[0])


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_nested_plates(setup, shape):
    def model(x):
        with pyro.plate("outer", shape[0], dim=-2), pyro.plate("inner", shape[1], dim=-1):
            pyro.sample("x", setup.ebm(), obs=x)

    setup.check(*setup.evaluate(model, setup.data.reshape(*shape, 2)))


@pytest.mark.parametrize("padding", [math.nan, 1e3])
def test_masked_padding(setup, padding):
    x = torch.cat([setup.data, torch.full((4, 2), padding)])[torch.randperm(10)]

    def model(x):
        mask = x[:, 0].isfinite() & (x[:, 0] != padding)
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", setup.ebm(), obs=x)

    setup.check(*setup.evaluate(model, x))


@pytest.mark.parametrize("size", [1, 4])
def test_mean_over_all_subsamples(setup, size):
    def model(x, rows):
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", setup.ebm(), obs=x[rows])

    runs = [
        setup.evaluate(model, setup.data, torch.tensor(rows))
        for rows in itertools.combinations(range(NUM_ROWS), size)
    ]
    losses, grads = zip(*runs, strict=True)
    setup.check(sum(losses) / len(losses), torch.stack(grads).mean(0))


def test_two_sites_particles_and_module(setup):
    def model(x):
        for site, part in {"left": x[:2], "right": x[2:]}.items():
            with pyro.plate(f"rows of {site}", len(part)):
                pyro.sample(site, setup.ebm(), obs=part)

    setup.check(*setup.evaluate(model, setup.data))
    loss = setup.objective(setup.full, no_guide)(setup.data)
    setup.check(loss.item(), torch.autograd.grad(loss, setup.weight)[0])
    setup.objective.num_particles = 3
    setup.objective.vectorize_particles = True
    setup.objective.max_plate_nesting = 2
    setup.check(*setup.evaluate(setup.full, setup.data))


# --- closed forms


@pytest.mark.parametrize("lam", [0.3, 10.0, 1e3])
@pytest.mark.parametrize("centre", [0, 1])
def test_optimal_slope_between_two_diracs(centre, lam):
    """Data at 1, base at 0, f = s x: -s + lambda (s - c)^2 is least at s = c + 1 / (2 lambda)."""
    best = centre + 1 / (2 * lam)
    slope = torch.tensor(best, requires_grad=True)
    p = EnergyDistribution(lambda x: -slope * x, base=dist.Normal(0.0, 1.0))
    x = torch.ones(5)
    contrast = Contrast(torch.zeros(1, 5), between=torch.rand(5))
    objective = WassersteinCritic(gradient_penalty=lam, centre=centre)
    loss = objective.per_datum(p, x, contrast, ZERO).mean()
    assert abs(torch.autograd.grad(loss, slope)[0]) < 1e-10
    # With WGAN-GP the bound tends to the distance, 1; with the other it has no units of distance.
    assert -loss.item() == pytest.approx(centre + 1 / (4 * lam), rel=1e-12)


def test_a_lipschitz_critic_bounds_the_distance_of_shifted_laws():
    """W1 of N(0.8, 1) and N(0, 1) is 0.8, and f = x attains it: within 4.5 standard errors."""
    p = EnergyDistribution(lambda x: -x, base=dist.Normal(0.0, 1.0))
    x = torch.randn(20_000) + 0.8
    objective = WassersteinCritic()
    values = -objective.per_datum(p, x, objective.draw(p, x, None), ZERO)
    assert abs(values.mean() - 0.8) < 4.5 * math.sqrt(2 / 20_000)
    assert values.std().item() == pytest.approx(math.sqrt(2), rel=0.05)


@pytest.mark.parametrize("centre", [0, 1])
def test_a_flat_critic_has_a_gradient(centre):
    """Length has no derivative at zero: its subgradient 0 is taken, and not NaN."""
    weight = torch.zeros(2, requires_grad=True)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    p = EnergyDistribution(lambda x: x @ weight, base=base)
    x = torch.randn(4, 2)
    objective = WassersteinCritic(centre=centre)
    loss = objective.per_datum(p, x, objective.draw(p, x, None), ZERO).sum()
    assert torch.autograd.grad(loss, weight)[0].isfinite().all()


def test_density_of_the_guides_contrast_is_not_used():
    p = EnergyDistribution(lambda x: x**2, event_shape=())
    contrast = WassersteinCritic().draw(p, torch.randn(3), dist.Normal(0.0, 1.0))
    assert contrast.log_noise is None
    assert contrast.points.shape == (1, 3)


# --- the generator


def test_generator_lowers_the_energy_of_its_draws():
    """Its gradient is that of the mean energy; the critic's parameters receive none."""
    weight = torch.tensor(0.7, requires_grad=True)
    shift = torch.tensor(0.2, requires_grad=True)
    p = GeneralizedEBM(lambda z: z + shift, dist.Normal(0.0, 1.0), lambda x: weight * x**2)
    objective = WassersteinCritic(num_base=8, schedule=(0, 1))
    torch.manual_seed(3)
    loss = objective.second_player(p, torch.randn(4), None).mean()
    torch.manual_seed(3)
    torch.randn(4)
    draws = torch.randn(2, 4) + 0.2
    assert loss.item() == pytest.approx(0.7 * draws.square().mean().item(), abs=1e-12)
    to_shift, to_weight = torch.autograd.grad(loss, [shift, weight], allow_unused=True)
    assert to_shift.item() == pytest.approx(2 * 0.7 * draws.mean().item(), abs=1e-12)
    assert to_weight is None


def test_players_take_turns():
    def model(x):
        weight = pyro.param("weight", torch.tensor(0.1))
        shift = pyro.param("shift", torch.tensor(0.0))
        ebm = GeneralizedEBM(lambda z: z + shift, dist.Normal(0.0, 1.0), lambda x: -weight * x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    svi = SVI(
        model, no_guide, pyro.optim.Adam({"lr": 0.05}), loss=WassersteinCritic(schedule=(2, 1))
    )
    state, moved = {"weight": 0.1, "shift": 0.0}, []
    for _ in range(6):
        svi.step(torch.randn(50) + 2)
        now = {name: pyro.param(name).item() for name in state}
        moved.append([name for name in state if now[name] != state[name]])
        state = now
    assert moved == [["weight"], ["weight"], ["shift"]] * 2


# --- what it refuses


def test_has_no_log_normalizer_to_hand_on():
    with pytest.raises(NotImplementedError, match="not a log ratio .* no log Z of site 'x'"):
        WassersteinCritic().log_normalizer("x")
    with pytest.raises(NotImplementedError, match="not a log ratio .* posterior"):
        WassersteinCritic().freeze(lambda: None)
    assert not WassersteinCritic.is_held_out_criterion
    assert not WassersteinCritic.learns_log_normalizer


@pytest.mark.parametrize("given", [{"gradient_penalty": 0.0}, {"centre": 2}, {"num_base": 0}])
def test_refuses(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be"):
        WassersteinCritic(**given)
