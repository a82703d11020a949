"""KALE as a divergence: zero for equal laws only, finite for singular ones, unbiased gradients."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.infer import KALE, DonskerVaradhan
from pyro_ebm.infer.scoring.contrast import Contrast


def tabular(table):
    return EnergyDistribution(lambda x: table[x], base=dist.Categorical(torch.ones(len(table))))


def bound(table, c, data, base, objective=None):
    """F(E, c) for rows of two laws of the same size."""
    loss = (objective or KALE()).per_datum(tabular(table), data, Contrast(base[None]), c)
    return -loss.mean()


def maximize(function, *parameters):
    """Returns the largest value found by L-BFGS."""
    optim = torch.optim.LBFGS(
        parameters, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-13
    )

    def closure():
        optim.zero_grad()
        loss = -function()
        loss.backward()
        return loss

    optim.step(closure)
    return -float(closure().detach())


def rows(*counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


# --- equal laws


def test_is_zero_for_equal_laws():
    """No energy and no c do better than 0, and a constant with c = -E reaches it."""
    data = rows(4, 2, 1, 1)
    shuffled = data[torch.randperm(8)]
    for _ in range(20):
        table, c = torch.randn(4), torch.randn(())
        assert bound(table, c, data, shuffled) < 0
    flat = torch.full((4,), 0.7)
    assert float(bound(flat, torch.tensor(-0.7), data, shuffled)) == pytest.approx(0, abs=1e-14)
    table, c = torch.randn(4, requires_grad=True), torch.zeros((), requires_grad=True)
    assert maximize(lambda: bound(table, c, data, shuffled), table, c) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_is_positive_for_unequal_laws(moved):
    """One of a thousand rows elsewhere: the supremum is the divergence, 1e-7 or more above 0."""
    counts = [500, 300, 200]
    base = rows(*counts)
    counts[moved] -= 1
    counts[(moved + 1) % 3] += 1
    data = rows(*counts)
    p, q = (torch.bincount(r).double() / 1000 for r in (data, base))
    divergence = float((p * (p / q).log()).sum())
    assert divergence > 1e-7
    table, c = torch.zeros(3, requires_grad=True), torch.zeros((), requires_grad=True)
    best = maximize(lambda: bound(table, c, data, base), table, c)
    assert best == pytest.approx(divergence, rel=1e-3)


# --- singular laws


def lines(slope, distance, length=2.0, num=64):
    """Data on the line x = 0, a generator onto the line x = distance, E(x) = slope x."""
    ticks = torch.linspace(0.0, length, num)
    prior = dist.Uniform(torch.zeros(1), length).to_event(1)
    p = GeneralizedEBM(
        lambda z: torch.cat([torch.full_like(z, distance), z], -1),
        prior,
        lambda x: slope * x[..., 0],
    )
    data = torch.stack([torch.zeros(num), ticks], -1)
    base = torch.stack([torch.full((num,), distance), ticks], -1)
    return p, data, Contrast(base[None], between=0.5 * (data + base))


@pytest.mark.parametrize(("penalty", "distance"), [(0.1, 1.0), (1.0, 0.3), (0.5, 2.0)])
def test_is_finite_for_singular_laws(penalty, distance):
    """Between parallel lines the penalized supremum is d^2 / (4 lambda), at slope d / (2 lambda)
    and c = -slope d.
    """
    slope, c = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
    kale = KALE(gradient_penalty=penalty)

    def value():
        p, data, contrast = lines(slope, distance)
        return -kale.per_datum(p, data, contrast, c).mean()

    best = maximize(value, slope, c)
    assert best == pytest.approx(distance**2 / (4 * penalty), rel=1e-9)
    assert slope.item() == pytest.approx(distance / (2 * penalty), rel=1e-5)
    assert c.item() == pytest.approx(-(distance**2) / (2 * penalty), abs=1e-4)


def test_singular_laws_without_a_penalty():
    """The divergence is infinite: the bound grows with the slope without end."""
    values = []
    for slope in (1.0, 10.0, 100.0):
        p, data, contrast = lines(torch.tensor(slope), 0.5)
        values.append(-float(KALE().per_datum(p, data, contrast, torch.tensor(-0.5 * slope))[0]))
    assert values == pytest.approx([0.5, 5.0, 50.0])


def test_is_at_most_the_transport_cost():
    """For an energy of slope at most L it is at most L W_1, here L times the lines' distance."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        direction = torch.randn(2, generator=generator, dtype=torch.float64)
        direction = 3 * direction / direction.norm()
        _, data, contrast = lines(torch.tensor(0.0), 0.4)
        p = GeneralizedEBM(
            lambda z: torch.cat([z, z], -1),
            dist.Uniform(torch.zeros(1), 1.0).to_event(1),
            lambda x, w=direction: (x * w).sum(-1),
        )
        log_z = DonskerVaradhan().per_datum(p, data, contrast, torch.zeros(()))
        assert -float(log_z.mean()) <= 3 * 0.4


# --- gradients of minibatches

TABLE = torch.tensor([0.2, 1.3], dtype=torch.float64)
BASE = torch.tensor([0.4, 0.6], dtype=torch.float64)
C = -0.5


def expected_gradient(objective, num):
    """The gradient in (E_0, E_1, c), in expectation over all batches of a base of two atoms; the
    datum is atom 0.
    """
    total = torch.zeros(3)
    for k in range(num + 1):
        table, c = TABLE.clone().requires_grad_(), torch.tensor(C, requires_grad=True)
        base = (torch.arange(num) < k).long()
        value = -objective.per_datum(
            tabular(table), torch.zeros(1, dtype=torch.long), Contrast(base[:, None]), c
        )
        parts = torch.autograd.grad(value.sum(), [table, c], allow_unused=True)
        flat = torch.cat([parts[0], (torch.zeros(()) if parts[1] is None else parts[1])[None]])
        total += dist.Binomial(num, BASE[1]).log_prob(torch.tensor(float(k))).exp() * flat
    return total


@pytest.mark.parametrize("num", [1, 3, 16])
def test_gradient_of_kale_is_unbiased(num):
    """-P + Q e^(-E - c) in the energy and -1 + E_Q e^(-E - c) in c, from batches of any size."""
    mass = BASE * torch.exp(-TABLE - C)
    exact = torch.stack([mass[0] - 1, mass[1], mass.sum() - 1])
    torch.testing.assert_close(expected_gradient(KALE(), num), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("num", "tolerance"), [(8, 0.35), (32, 0.08), (128, 0.02)])
def test_gradient_of_donsker_varadhan_is_biased(num, tolerance):
    """By the ratio estimator's -(Cov(N, Z) - R Var(Z)) / (B Z^2), to higher order in 1 / B."""
    weights = torch.exp(-TABLE)
    z = (BASE * weights).sum()
    exact = BASE * weights / z - torch.tensor([1.0, 0.0])
    bias = expected_gradient(DonskerVaradhan(), num)[:2] - exact
    variance = (BASE * weights**2).sum() - z**2
    parts = BASE * weights
    covariance = BASE * weights**2 - parts * z
    predicted = -(covariance - parts / z * variance) / (num * z**2)
    assert bias.abs().min() > 1e-4
    torch.testing.assert_close(bias / predicted, torch.ones(2), rtol=0, atol=tolerance)


def test_unbiasedness_sees_a_batchs_own_log_z():
    """KALE at the log Z of each batch is Donsker-Varadhan, bias and all."""

    class Wrong(KALE):
        def per_datum(self, p, x, contrast, log_z):
            own = torch.logsumexp(-p.energy(contrast.points), 0) - math.log(len(contrast.points))
            return super().per_datum(p, x, contrast, own)

    mass = BASE * torch.exp(-TABLE)
    exact = mass / mass.sum() - torch.tensor([1.0, 0.0])
    assert (expected_gradient(Wrong(), 8)[:2] - exact).abs().max() > 5e-3


def test_a_step_of_the_whole_objective_is_unbiased():
    """Drawn by the objective itself in a Pyro model with c held: five standard errors see 0.05."""
    pyro.set_rng_seed(0)
    kale = KALE(c_update="gradient")
    kale.log_normalizers["x"] = torch.nn.Parameter(torch.tensor(C))
    num = 20_000
    table = TABLE.clone().requires_grad_()

    def model(x):
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: table[x.long()], base=dist.Categorical(BASE))
            pyro.sample("x", ebm, obs=x)

    loss = kale.differentiable_loss(model, lambda x: None, torch.zeros(num, dtype=torch.long))
    (gradient,) = torch.autograd.grad(-loss / num, table)
    mass = torch.exp(-TABLE - C)
    stderr = mass * (BASE * (1 - BASE) / num).sqrt()
    exact = BASE * mass - torch.tensor([1.0, 0.0])
    assert 5 * stderr.max() < 0.05
    assert ((gradient - exact) / stderr).abs().max() < 5
