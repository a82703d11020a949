"""MALA keeps its target: pointwise detailed balance, exact starts, and bugs that both notice."""

import pytest
import torch
from pyro.distributions import constraints as C
from torch.distributions import Gamma, Normal

from pyro_ebm.ops import short_langevin
from pyro_ebm.ops.short_kernel import metropolis
from pyro_ebm.ops.short_langevin import Langevin, log_accept, propose
from pyro_ebm.ops.spaces import UnconstrainedSpace

F64 = torch.float64


def quartic(x):
    return (0.3 * x.pow(4) + x).sum(-1) + 0.5 * (x[..., 0] - x[..., 1]).square()


def vector_kernel(step_size, variance):
    space = UnconstrainedSpace.of(C.real, torch.Size([3]))
    return Langevin(space, step_size=step_size, variance=variance)


def proposal(x, step_size, variance):
    """The law of the proposal from one point, written out once more."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(quartic(leaf).sum(), leaf)
    scale = step_size * variance.sqrt()
    drift = torch.clamp(-scale * grad / 2, -2.0, 2.0)
    return Normal(x + scale * drift, scale)


def test_detailed_balance_holds_pointwise():
    step_size, variance = torch.tensor([0.7], dtype=F64), torch.tensor([[0.5, 1.0, 2.0]]).to(F64)
    kernel = vector_kernel(step_size, variance)
    x, y = torch.randn(2, 20, 3, dtype=F64) * 1.5  # steep enough that some drifts are truncated
    a, b = kernel.start(quartic, x), kernel.start(quartic, y)
    there = proposal(x, step_size, variance).log_prob(y).sum(-1)
    back = proposal(y, step_size, variance).log_prob(x).sum(-1)
    ratio = log_accept(a, b, step_size, variance)
    torch.testing.assert_close(ratio, quartic(x) - quartic(y) + back - there, rtol=0, atol=1e-10)
    flow = -quartic(x) + there + ratio.clamp(max=0)
    reverse = -quartic(y) + back + log_accept(b, a, step_size, variance).clamp(max=0)
    torch.testing.assert_close(flow, reverse, rtol=0, atol=1e-10)


def test_proposals_have_the_law_that_the_ratio_assumes():
    step_size, variance = torch.tensor([0.7], dtype=F64), torch.tensor([[0.5, 1.0, 2.0]]).to(F64)
    point = vector_kernel(step_size, variance).start(quartic, torch.full((1, 3), 1.5, dtype=F64))
    law, noise = proposal(point.position, step_size, variance), torch.randn(1, 3, dtype=F64)
    to = propose(point, noise, step_size, variance)
    torch.testing.assert_close((to - law.mean) / law.stddev, noise, rtol=0, atol=1e-12)


def test_target_carries_the_jacobian():
    kernel = Langevin(UnconstrainedSpace.of(C.positive, torch.Size([])))
    x = torch.rand(6, dtype=F64) + 0.1
    point = kernel.start(torch.square, x)
    torch.testing.assert_close(point.target, x.square() - x.log())
    torch.testing.assert_close(point.gradient[:, 0], 2 * x.square() - 1)
    torch.testing.assert_close(kernel.potential(point), x.square())
    torch.testing.assert_close(kernel.events(point), x)


class Problem:
    """Exact draws of a law and its potential; statistics whose means a kernel must not move."""

    def __init__(self, support, event_shape, draw, potential, step_size):
        self.space = UnconstrainedSpace.of(support, torch.Size(event_shape))
        self.draw, self.potential, self.step_size = draw, potential, step_size

    def statistics(self, x):
        return torch.cat([x, x.square(), self.potential(x)[:, None]], -1)

    def largest_z(self, num=20_000, steps=10):
        """The paired z over chains that start exactly at the law: standard normal if it is kept."""
        kernel = Langevin(
            self.space,
            step_size=torch.full((1,), self.step_size, dtype=F64),
            variance=torch.ones(1, self.space.size, dtype=F64),
        )
        start = self.draw(num)
        point = kernel.start(self.potential, start)
        for _ in range(steps):
            point, _ = kernel.step(self.potential, point)
        change = self.statistics(kernel.events(point)) - self.statistics(start)
        return float((change.mean(0) / change.std(0) * num**0.5).abs().max())


def gaussian_problem():
    scale = torch.tensor([1.0, 0.5], dtype=F64)
    law = Normal(torch.zeros(2, dtype=F64), scale)
    return Problem(
        C.real,
        (2,),
        lambda n: law.sample((n,)),
        lambda x: 0.5 * (x / scale).square().sum(-1),
        0.8,
    )


def gamma_problem():
    law = Gamma(torch.full((1,), 2.0, dtype=F64), torch.full((1,), 3.0, dtype=F64))
    return Problem(
        C.positive,
        (1,),
        lambda n: law.sample((n,)),
        lambda x: (3 * x - x.log()).sum(-1),
        1.2,
    )


PROBLEMS = {"gaussian": gaussian_problem, "gamma": gamma_problem}


@pytest.mark.parametrize("name", PROBLEMS)
def test_exact_start_stays_exact(name):
    assert PROBLEMS[name]().largest_z() < 5


@pytest.mark.parametrize("name", PROBLEMS)
def test_accepting_everything_is_noticed(name, monkeypatch):
    def always(old, new, ratio):
        return metropolis(old, new, torch.zeros_like(ratio))

    monkeypatch.setattr(short_langevin, "metropolis", always)
    assert PROBLEMS[name]().largest_z() > 5


@pytest.mark.parametrize("name", PROBLEMS)
def test_noise_of_another_size_is_noticed(name, monkeypatch):
    def louder(point, noise, step_size, variance):
        return propose(point, 2**0.5 * noise, step_size, variance)

    monkeypatch.setattr(short_langevin, "propose", louder)
    assert PROBLEMS[name]().largest_z() > 5


def test_missing_jacobian_is_noticed(monkeypatch):
    def without(self, u):
        return self.to_support(u), torch.zeros_like(u[..., 0])

    monkeypatch.setattr(UnconstrainedSpace, "with_log_det", without)
    assert gamma_problem().largest_z() > 5


def test_chains_come_down_from_steep_slopes():
    """Untruncated drift overshoots at x = 20 by 16 000 and is rejected for ever."""
    kernel = Langevin(UnconstrainedSpace.of(C.real, torch.Size([])), step_size=torch.ones(1))
    point = kernel.start(lambda x: x.pow(4), torch.full((50,), 20.0))
    for _ in range(60):
        point, _ = kernel.step(lambda x: x.pow(4), point)
    assert kernel.events(point).abs().max() < 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_proposals_without_a_finite_potential_are_rejected(bad):
    def holed(x):
        return torch.where(x > 0, bad, 1.0) * x.square().add(1)

    kernel = Langevin(UnconstrainedSpace.of(C.real, torch.Size([])))
    point = kernel.start(holed, torch.full((200,), -0.1))
    for _ in range(5):
        point, prob = kernel.step(holed, point)
        assert prob.isfinite().all()
    assert (kernel.events(point) <= 0).all()
    assert point.is_finite.all()


def test_variance_is_learnt_only_with_enough_chains():
    def potential(x):
        return 0.5 * (x * torch.tensor([10.0, 0.1])).square().sum(-1)

    space = UnconstrainedSpace.of(C.real, torch.Size([2]))
    for chains, learns in ((15, False), (64, True)):
        kernel = Langevin(space, num_warmup=100)
        point = kernel.start(potential, torch.randn(chains, 2))
        for _ in range(100):
            point, _ = kernel.step(potential, point, adapt=True)
        ratio = (kernel.variance[0, 1] / kernel.variance[0, 0]).sqrt()
        assert (float(ratio) > 20) == learns
