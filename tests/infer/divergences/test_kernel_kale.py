"""Kernel KALE as a loss: its value, its gradient by the envelope theorem, its limit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.infer.divergences.kernel_kale import KernelKALE
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.ops.kale_dual import kernel_kale
from pyro_ebm.ops.kernels import GaussianKernel

KERNEL = GaussianKernel(0.8)
NUM_ROWS = 6
ZERO = torch.zeros(())


def no_guide(*args):
    return None


class Site:
    """A generator z -> scale z + shift, data on the plane, and a fixed pool of latents."""

    def __init__(self, lam):
        self.shift = torch.tensor([0.3, -0.2], requires_grad=True)
        self.scale = torch.tensor(1.2, requires_grad=True)
        self.data, self.pool = torch.randn(NUM_ROWS, 2) + 1, torch.randn(2 * NUM_ROWS, 2)
        self.lam = lam
        self.objective = KernelKALE(KERNEL, regularization=lam, tolerance=1e-20)
        self.objective.draw = lambda p, x, noise: Contrast(
            self.draws(self.shift, self.scale).reshape((-1, *x.shape))
        )

    def draws(self, shift, scale):
        return scale * self.pool + shift

    def ebm(self):
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        return GeneralizedEBM(lambda z: z, prior, lambda x: x.square().sum(-1))

    def full(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.ebm(), obs=x)

    def evaluate(self, model, x):
        loss = self.objective.differentiable_loss(model, no_guide, x)
        return loss.item(), torch.autograd.grad(loss, [self.shift, self.scale])

    def value(self, shift, scale):
        draws = self.draws(shift, scale).detach()
        return kernel_kale(self.data, draws, KERNEL, self.lam, tolerance=1e-20).value


@pytest.mark.parametrize("lam", [1e-2, 1.0, 100.0])
def test_value_and_gradient(lam):
    """The loss is the divergence times the rows; its gradient that of finite differences."""
    site = Site(lam)
    loss, (to_shift, to_scale) = site.evaluate(site.full, site.data)
    shift, scale = site.shift.detach(), site.scale.detach()
    assert loss == pytest.approx(NUM_ROWS * site.value(shift, scale).item(), abs=1e-10)
    eps = 1e-5
    for found, move in [
        (to_shift[0], (torch.tensor([eps, 0.0]), 0.0)),
        (to_shift[1], (torch.tensor([0.0, eps]), 0.0)),
        (to_scale, (torch.zeros(2), eps)),
    ]:
        up = site.value(shift + move[0], scale + move[1])
        down = site.value(shift - move[0], scale - move[1])
        want = NUM_ROWS * (up - down).item() / (2 * eps)
        assert found.item() == pytest.approx(want, rel=1e-6, abs=1e-7)


def test_gradient_at_large_regularization_is_that_of_half_the_squared_mmd():
    site = Site(1e6)
    _, grads = site.evaluate(site.full, site.data)
    draws = site.draws(site.shift, site.scale)
    biased = KERNEL(draws, draws).mean() - 2 * KERNEL(draws, site.data).mean()
    want = torch.autograd.grad(NUM_ROWS * 0.5 * biased, [site.shift, site.scale])
    torch.testing.assert_close(grads, want, rtol=1e-4, atol=1e-6)


def test_ways_to_write_a_model():
    """Nested plates, masked padding and a torch module are one loss."""
    site = Site(0.1)
    want = site.evaluate(site.full, site.data)

    def nested(x):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("x", site.ebm(), obs=x)

    torch.testing.assert_close(site.evaluate(nested, site.data.reshape(2, 3, 2)), want)
    loss = site.objective(site.full, no_guide)(site.data)
    found = (loss.item(), torch.autograd.grad(loss, [site.shift, site.scale]))
    torch.testing.assert_close(found, want)

    def masked(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=x.isfinite().all(-1)):
            pyro.sample("x", site.ebm(), obs=x)

    def padded(p, x, noise):
        draws = site.draws(site.shift, site.scale).reshape(2, NUM_ROWS, 2)
        return Contrast(torch.cat([torch.full((2, 3, 2), 9.0), draws], 1))

    site.objective.draw = padded
    x = torch.cat([torch.full((3, 2), math.nan), site.data])
    torch.testing.assert_close(site.evaluate(masked, x), want)


def test_minimum_is_at_the_truth():
    """Laws that agree: the mean slope over 60 batches is within 4.5 standard errors of zero.

    A shift by half a standard deviation is seen at more than ten errors.
    """
    objective = KernelKALE(KERNEL, regularization=0.1)
    for truth in (0.0, 0.5):
        shift = torch.tensor(truth, requires_grad=True)
        p = GeneralizedEBM(lambda z, s=shift: z + s, dist.Normal(0.0, 1.0), lambda x: x**2)
        slopes = []
        for _ in range(60):
            x = torch.randn(40)
            loss = objective.per_datum(p, x, objective.draw(p, x, None), ZERO).mean()
            slopes.append(torch.autograd.grad(loss, shift)[0])
        z = torch.stack(slopes).mean() / (torch.stack(slopes).std() / math.sqrt(60))
        assert abs(z) < 4.5 if truth == 0 else z > 10


def test_trains_a_generator_in_single_precision():
    torch.set_default_dtype(torch.float32)

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        ebm = GeneralizedEBM(lambda z: z + shift, dist.Normal(0.0, 1.0), lambda x: x**2)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    data = torch.randn(100) + 2
    objective = KernelKALE(regularization=0.1)
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=objective)
    for _ in range(60):
        svi.step(data)
    assert pyro.param("shift").item() == pytest.approx(2.0, abs=4.5 * math.sqrt(2 * 1.5 / 100))
    assert set(objective.diagnostics["x"]) == {"kernel_kale", "duality_gap", "mass"}
    assert objective.diagnostics["x"]["duality_gap"] < 1e-7


def test_witness_is_an_energy():
    """Minus the witness on the base of Q: the mean of P, and log Z within the noise of Q of zero.

    P = N(1, 1), Q = N(0, 1), 400 points each; the mean of P errs by .05, the rest is lambda's.
    """
    p, q = torch.randn(400, 1) + 1, torch.randn(400, 1)
    h = kernel_kale(p, q, GaussianKernel(2.0), 1e-2).witness
    ebm = EnergyDistribution(lambda x: -h(x), base=dist.Normal(torch.zeros(1), 1.0).to_event(1))
    grid = torch.linspace(-8, 8, 2001)[:, None]
    density = ebm.unnormalized_log_prob(grid).exp()
    mass = density.sum() * 16 / 2000
    assert abs(mass.log()) < 0.2
    assert (grid[:, 0] @ density / density.sum()).item() == pytest.approx(1.0, abs=0.2)


def test_traits():
    assert KernelKALE.is_held_out_criterion
    with pytest.raises(NotImplementedError, match="KernelKALE cannot be frozen"):
        KernelKALE().freeze(lambda: None)


@pytest.mark.parametrize("given", [{"regularization": 0.0}, {"tolerance": math.inf}])
def test_refuses(given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be positive and finite"):
        KernelKALE(**given)
