"""Random walks on integers and spheres keep their laws."""

import pytest
import torch
from pyro.distributions import constraints as C
from torch.distributions import Binomial, Normal, Poisson

from pyro_ebm.ops import short_walks
from pyro_ebm.ops.short_kernel import metropolis
from pyro_ebm.ops.short_walks import IntegerWalk, SphereWalk

F64 = torch.float64
TOTAL = torch.tensor([3.0, 40.0], dtype=F64)
POISSON = Poisson(torch.tensor([4.5, 30.0], dtype=F64))
BINOMIAL = Binomial(TOTAL, torch.tensor([0.3, 0.8], dtype=F64))
LAWS = {
    "poisson": (POISSON, C.nonnegative_integer),
    "binomial": (BINOMIAL, C.integer_interval(0, TOTAL)),
}


def paired_z(start, end):
    change = torch.cat([end - start, end.square() - start.square()], -1)
    return float((change.mean(0) / change.std(0) * len(change) ** 0.5).abs().max())


def integer_z(name, num=20_000):
    law, support = LAWS[name]
    kernel, start = IntegerWalk(support, torch.Size([2])), law.sample((num,))

    def potential(x):
        return -law.log_prob(x).sum(-1)  # validates: raises outside the support

    point = kernel.start(potential, start)
    for _ in range(10):
        point, _ = kernel.step(potential, point)
    return paired_z(start, kernel.events(point))


def always(old, new, ratio):
    return metropolis(old, new, torch.where(ratio > -torch.inf, 0.0, ratio))


@pytest.mark.parametrize("name", LAWS)
def test_integers_from_an_exact_start_stay_exact(name):
    assert integer_z(name) < 5


@pytest.mark.parametrize("name", LAWS)
def test_integers_without_acceptance_drift(name, monkeypatch):
    monkeypatch.setattr(short_walks, "metropolis", always)
    assert integer_z(name) > 5


def test_jumps_adapt_to_each_coordinate():
    law = Normal(0.0, torch.tensor([1.0, 1000.0]))
    kernel = IntegerWalk(C.integer, torch.Size([2]))

    def potential(x):
        return -law.log_prob(x).sum(-1)

    point = kernel.start(potential, torch.zeros(64, 2))
    for _ in range(60):
        point, prob = kernel.step(potential, point, adapt=True)
    kernel.freeze()
    _, prob = kernel.step(potential, point)
    assert 0.3 < float(prob.mean()) < 0.6
    assert float(kernel._tuner.step_size[0, 1] / kernel._tuner.step_size[0, 0]) > 50


def test_integer_dtype_is_kept():
    kernel = IntegerWalk(C.nonnegative_integer, torch.Size([]))

    def potential(x):
        return 0.1 * x.double()

    point = kernel.start(potential, torch.zeros(10, dtype=torch.int64))
    for _ in range(20):
        point, _ = kernel.step(potential, point, adapt=True)
    assert kernel.events(point).dtype == torch.int64
    assert kernel.events(point).min() >= 0


def bingham(num):
    """Exact draws of exp(2 x_0^2) on the sphere in three dims, by rejection."""
    x = torch.randn(8 * num, 3, dtype=F64)
    x = x / x.norm(dim=-1, keepdim=True)
    kept = x[torch.rand(len(x), dtype=F64) < (2 * x[:, 0].square() - 2).exp()]
    return kept[:num]


def sphere_z(num=20_000):
    kernel, start = SphereWalk(torch.Size([3])), bingham(num)
    assert len(start) == num

    def potential(x):
        return -2 * x[..., 0].square()

    point = kernel.start(potential, start)
    for _ in range(10):
        point, _ = kernel.step(potential, point)
    assert (kernel.events(point).norm(dim=-1) - 1).abs().max() < 1e-12
    return paired_z(start, kernel.events(point))


def test_sphere_from_an_exact_start_stays_exact():
    assert sphere_z() < 5


def test_sphere_without_acceptance_drifts(monkeypatch):
    monkeypatch.setattr(short_walks, "metropolis", always)
    assert sphere_z() > 5


def test_step_on_the_sphere_adapts_to_concentration():
    kernel = SphereWalk(torch.Size([2, 5]))

    def potential(x):
        return -200 * x[..., 0].sum(-1)

    x = torch.zeros(64, 2, 5)
    x[..., 0] = 1
    point = kernel.start(potential, x)
    for _ in range(80):
        point, _ = kernel.step(potential, point, adapt=True)
    kernel.freeze()
    _, prob = kernel.step(potential, point)
    assert 0.25 < float(prob.mean()) < 0.55


def test_flat_sphere_does_not_blow_up():
    kernel = SphereWalk(torch.Size([4]))

    def flat(x):
        return torch.zeros(x.shape[:-1])

    point = kernel.start(flat, torch.eye(4))
    for _ in range(300):
        point, _ = kernel.step(flat, point, adapt=True)
    assert point.is_finite.all()
