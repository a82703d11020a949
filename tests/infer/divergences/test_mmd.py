"""MMD as a loss: its definition, its expectation in closed form, and the ways to write a model."""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_ebm.chains.two_sample import mmd2
from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, PushforwardDistribution
from pyro_ebm.infer.divergences.mmd import MMD
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.ops.kernels import GaussianKernel, InverseMultiquadricKernel

NUM_ROWS = 6
LENGTH = 0.9
PRIOR = dist.Normal(0.0, 1.0)


def energy(x):
    return 0.5 * x.square()


def no_guide(*args):
    return None


class Site:
    """A generator z -> scale z + shift on the plane, data, and a pool of latents to draw from."""

    def __init__(self, num_base=2 * NUM_ROWS):
        self.shift = torch.tensor([0.3, -0.2], requires_grad=True)
        self.scale = torch.tensor(1.2, requires_grad=True)
        self.data = torch.randn(NUM_ROWS, 2) + 1
        self.pool = torch.randn(num_base, 2)
        self.objective = MMD(GaussianKernel(LENGTH))
        self.objective.draw = self.draw
        self.loss, self.grads = self.evaluate(self.full, self.data)

    def generator(self, z):
        return self.scale * z + self.shift

    def ebm(self):
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        return GeneralizedEBM(self.generator, prior, lambda x: x.square().sum(-1))

    def draw(self, p, x, noise):
        """The whole pool, beside whatever rows there are."""
        return Contrast(self.generator(self.pool).reshape((-1, *x.shape)))

    def full(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.ebm(), obs=x)

    def evaluate(self, model, *args):
        loss = self.objective.differentiable_loss(model, no_guide, *args)
        return loss.item(), torch.autograd.grad(loss, [self.shift, self.scale])

    def check(self, loss, grads):
        assert loss == pytest.approx(self.loss, abs=1e-10)
        torch.testing.assert_close(grads, self.grads, rtol=0, atol=1e-10)


@pytest.fixture
def site():
    return Site()


def test_definition(site):
    """Term by term: no point is paired with itself."""

    def k(a, b):
        return torch.exp(-(a - b).square().sum() / (2 * LENGTH**2))

    def among(points):
        pairs = itertools.permutations(points, 2)
        return sum(k(a, b) for a, b in pairs) / (len(points) * (len(points) - 1))

    draws = site.generator(site.pool)
    cross = sum(k(a, b) for a in site.data for b in draws) / (len(site.data) * len(draws))
    total = NUM_ROWS * (among(site.data) + among(draws) - 2 * cross)
    site.check(total.item(), torch.autograd.grad(total, [site.shift, site.scale]))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_nested_plates(site, shape):
    def model(x):
        with pyro.plate("outer", shape[0], dim=-2), pyro.plate("inner", shape[1], dim=-1):
            pyro.sample("x", site.ebm(), obs=x)

    site.check(*site.evaluate(model, site.data.reshape(*shape, 2)))


def test_to_event(site):
    def model(x):
        pyro.sample("x", site.ebm().expand([len(x)]).to_event(1), obs=x)

    site.check(*site.evaluate(model, site.data))


@pytest.mark.parametrize("padding", [math.nan, 1e3])
def test_masked_padding(site, padding):
    """Neither padding nor the draws beside it are looked at."""
    x = torch.cat([site.data, torch.full((4, 2), padding)])
    order = torch.randperm(10)
    draws = torch.cat([site.pool.reshape(2, NUM_ROWS, 2), torch.full((2, 4, 2), 7.0)], 1)
    site.objective.draw = lambda p, x, noise: Contrast(site.generator(draws[:, order]))

    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=order < NUM_ROWS):
            pyro.sample("x", site.ebm(), obs=x)

    site.check(*site.evaluate(model, x[order]))


def test_particles(site):
    site.objective.num_particles = 3
    site.check(*site.evaluate(site.full, site.data))
    site.objective.vectorize_particles = True
    site.objective.max_plate_nesting = 2
    with pytest.raises(ValueError, match="MMD pools the rows .* say vectorize_particles=False"):
        site.evaluate(site.full, site.data)


def test_scale_and_module(site):
    loss, grads = site.evaluate(poutine.scale(site.full, scale=0.5), site.data)
    site.check(2 * loss, [2 * g for g in grads])
    loss = site.objective(site.full, no_guide)(site.data)
    site.check(loss.item(), torch.autograd.grad(loss, [site.shift, site.scale]))


@pytest.mark.parametrize("size", [2, 3])
def test_mean_over_all_subsamples(site, size):
    """A U-statistic of a subset is unbiased for that of the whole."""

    def model(x, rows):
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", site.ebm(), obs=x[rows])

    runs = [
        site.evaluate(model, site.data, torch.tensor(rows))
        for rows in itertools.combinations(range(NUM_ROWS), size)
    ]
    losses, grads = zip(*runs, strict=True)
    assert max(losses) - min(losses) > 1e-3
    mean = [torch.stack(g).mean(0) for g in zip(*grads, strict=True)]
    site.check(sum(losses) / len(losses), mean)


def test_same_estimate_as_between_samples():
    """The default kernel is that of ``mmd2`` with the data for the reference."""
    data = torch.randn(30, 2)
    site = Site(num_base=30)
    site.objective.kernel = None
    site.evaluate(site.full, data)
    want = mmd2(site.generator(site.pool), data)
    torch.testing.assert_close(site.objective.diagnostics["x"]["mmd2"], want.detach())


# --- closed forms


def squared_mmd(shift, length=LENGTH):
    """Of N(shift, 1) and N(0, 1), by the convolution of Gaussians."""
    s2 = length**2 + 2
    return 2 * length / math.sqrt(s2) * (1 - math.exp(-(shift**2) / (2 * s2)))


def slope_of_squared_mmd(shift, length=LENGTH):
    s2 = length**2 + 2
    return 2 * length / s2**1.5 * shift * math.exp(-(shift**2) / (2 * s2))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_unbiased_with_unbiased_gradient(shift):
    """Over 250 batches of 8 the value and the slope are within 4.5 standard errors of the truth.

    With the diagonals kept the value would be off by 2 (1 - E k) / 8, more than ten errors.
    """
    found, slopes = [], []
    at = torch.tensor(shift, requires_grad=True)
    p = GeneralizedEBM(lambda z: z + at, PRIOR, energy)
    objective = MMD(GaussianKernel(LENGTH))
    for _ in range(250):
        x = torch.randn(8)
        loss = objective.per_datum(p, x, objective.draw(p, x, None), torch.zeros(())).mean()
        found.append(loss.detach())
        slopes.append(torch.autograd.grad(loss, at)[0])
    wanted = (squared_mmd(shift), slope_of_squared_mmd(shift))
    for values, want in zip((torch.stack(found), torch.stack(slopes)), wanted, strict=True):
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - want) < 4.5 * error
        assert error < 0.0155


def test_recovers_a_location():
    """Within 4.5 standard errors, these by the influence function of both samples.

    psi(x) = d/dx E k(x, y) under the truth, and the estimate errs by the difference of its means
    over data and latents, divided by minus its mean slope.
    """
    n, truth = 700, 0.8
    latents, data = torch.randn(n), torch.randn(n) + truth
    theta = torch.tensor(0.5, requires_grad=True)
    objective = MMD(GaussianKernel(LENGTH))
    p = EnergyDistribution(energy, event_shape=())
    for _ in range(6):
        loss = objective.per_datum(p, data, Contrast((latents + theta)[None]), torch.zeros(()))
        (slope,) = torch.autograd.grad(loss.mean(), theta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, theta)
        with torch.no_grad():
            theta -= slope / curvature
    s2 = LENGTH**2 + 1
    x = torch.randn(200_000)
    psi = -LENGTH / s2**1.5 * x * torch.exp(-(x**2) / (2 * s2))
    mean_slope = LENGTH / (LENGTH**2 + 2) ** 1.5
    error = math.sqrt(2 / n) * psi.std() / mean_slope
    assert abs(theta.item() - truth) < 4.5 * error
    assert error < 0.06


# --- in a model


@pytest.mark.parametrize("in_guide", [False, True])
def test_trains_the_generator_and_not_the_energy(in_guide):
    weight = torch.nn.Parameter(torch.tensor(1.0))
    data = torch.randn(100) + 2
    prior = dist.Normal(0.0, 1.0)

    def generator(z):
        return z + pyro.param("shift", torch.tensor(0.0))

    def model(x):
        learned = pyro.param("weight", weight)
        with pyro.plate("data", len(x)):
            if in_guide:
                ebm = EnergyDistribution(lambda x: learned * x**2, event_shape=())
            else:
                ebm = GeneralizedEBM(generator, prior, lambda x: learned * x**2)
            pyro.sample("x", ebm, obs=x)

    def guide(x):
        if in_guide:
            with pyro.plate("data", len(x)):
                pyro.sample("x", PushforwardDistribution(generator, prior))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.15}), loss=MMD(num_base=200))
    for _ in range(30):
        svi.step(data)
    # The estimate's standard error is about sqrt(1.5 (1/100 + 1/200)).
    assert pyro.param("shift").item() == pytest.approx(2.0, abs=4.5 * 0.15)
    assert pyro.param("weight").item() == 1.0


def test_a_generator_alone_is_a_gebm_without_energy():
    """Nothing is said of an energy that is constant: it takes no part."""
    shift = torch.tensor(0.5, requires_grad=True)
    p = GeneralizedEBM(lambda z: z + shift, PRIOR, torch.zeros_like)
    loss = run(p, torch.randn(20))
    assert torch.autograd.grad(loss, shift)[0] != 0


def test_a_base_with_parameters_is_trained():
    loc = torch.tensor(0.5, requires_grad=True)
    p = EnergyDistribution(energy, base=dist.Normal(loc, 1.0))
    objective = MMD(GaussianKernel(1.0))
    x = torch.randn(20)
    loss = objective.per_datum(p, x, objective.draw(p, x, None), torch.zeros(())).mean()
    assert torch.autograd.grad(loss, loc)[0] != 0


def test_number_of_draws():
    p = GeneralizedEBM(lambda z: z, PRIOR, energy)
    with torch.no_grad():
        shapes = [MMD(num_base=m).draw(p, torch.randn(4), None).points.shape for m in (None, 3, 9)]
    assert shapes == [(1, 4), (1, 4), (3, 4)]


def test_fitted_kernel_is_part_of_the_state():
    p = GeneralizedEBM(lambda z: z, PRIOR, energy)
    objective, other = MMD(), MMD()
    x = torch.tensor([0.0, 1.0, 3.0])
    with torch.no_grad():
        objective.per_datum(p, x, objective.draw(p, x, None), torch.zeros(()))
    assert objective.kernel_for(torch.zeros(3, 1)).lengthscales == (1.0, 2.0, 4.0)
    other.load_state_dict(copy.deepcopy(objective.state_dict()))
    assert other.kernel_for(torch.zeros(3, 1)).lengthscales == (1.0, 2.0, 4.0)
    assert MMD(InverseMultiquadricKernel(1.0)).get_extra_state() == {}


def test_is_a_held_out_criterion():
    assert MMD.is_held_out_criterion
    assert not MMD.learns_log_normalizer


# --- what it refuses


def run(ebm, x, objective=None):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    return (objective or MMD(GaussianKernel(1.0))).differentiable_loss(model, no_guide, x)


SHIFT = torch.tensor(0.0, requires_grad=True)


@pytest.mark.parametrize(
    ("ebm", "x", "error", "message"),
    [
        (GeneralizedEBM(lambda z: z + SHIFT, PRIOR, energy), torch.ones(1), ValueError, "1 data"),
        (GeneralizedEBM(lambda z: z, PRIOR, energy), torch.ones(3), ValueError, "no parameters"),
        (
            EnergyDistribution(lambda x: x.double(), dist.Poisson(3.0)),
            torch.ones(3),
            ValueError,
            "Poisson cannot draw with gradients: use a PushforwardDistribution",
        ),
        (
            EnergyDistribution(energy, event_shape=()),
            torch.ones(3),
            ValueError,
            "MMD has no contrast",
        ),
        (
            GeneralizedEBM(
                lambda z: z * torch.arange(1.0, 4.0) + SHIFT, PRIOR, energy, event_shape=()
            ),
            torch.randn(3),
            ValueError,
            "generator of EBM site 'x' depends on row-wise values",
        ),
    ],
)
def test_refuses(ebm, x, error, message):
    with pytest.raises(error, match=message):
        run(ebm, x)


def test_refuses_a_kernel_that_cannot_be_fitted():
    ebm = GeneralizedEBM(lambda z: z + SHIFT, PRIOR, energy)
    with pytest.raises(ValueError, match="MMD fits its kernel .* pass kernel="):
        run(ebm, torch.ones(4), MMD())


def test_refuses_whole_numbers():
    ebm = GeneralizedEBM(lambda z: z + SHIFT, PRIOR, energy)
    with pytest.raises(TypeError, match=r"by their distances, got torch\.int64"):
        MMD().draw(ebm, torch.arange(4), None)


@pytest.mark.parametrize("given", [{"kernel": "rbf"}, {"num_base": 0}])
def test_refuses_arguments(given):
    with pytest.raises((TypeError, ValueError), match="kernel must be|num_base must be"):
        MMD(**given)


def test_refuses_to_be_frozen():
    with pytest.raises(NotImplementedError, match="MMD cannot be frozen"):
        MMD().freeze(lambda x: None, torch.ones(3))
