"""Contrastive divergence against exact sums over states, closed forms, and its own limits."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.energies import ConwayMaxwellPoisson, Ising
from pyro_ebm.errors import (
    ApproximateSampleWarning,
    DivergedTrainingError,
    NonFiniteEnergyError,
    SurrogateWarning,
)
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.likelihood.tempered_langevin import TemperedLangevin
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.infer.training.fit import fit
from pyro_ebm.mcmc import HMC, MALA, NUTS, PCN, ULA, EllipticalSlice, ParallelTempering, RandomWalk
from pyro_ebm.ops.constraints import sphere
from pyro_ebm.testing import assert_mean_close

QUIET = {"disable_progbar": True}
SMALL_MALA = partial(MALA, step_size=0.1)
TEMPERED = partial(TemperedLangevin, anneal_steps=2)


def no_guide(*args):
    return None


def states(d, values=(0.0, 1.0)):
    return torch.tensor(list(itertools.product(values, repeat=d)), dtype=torch.float64)


def loss_of(objective, p, x, guide=no_guide):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    return objective.differentiable_loss(model, guide, x)


def gaussian(a, m=0.0, **options):
    return EnergyDistribution(lambda x: 0.5 * a * (x - m) ** 2, event_shape=(), **options)


# --- a Gaussian


def test_gradient_with_exact_moments():
    """Draws m +- 1/sqrt(a) have the law's two moments: dL/da = (E(x-m)^2 - 1/a) / 2."""
    a, m = torch.tensor(1.7, requires_grad=True), torch.tensor(0.4, requires_grad=True)
    x = torch.randn(6)

    def pair(p, x):
        sides = torch.tensor([1.0, -1.0]).repeat(3)
        return (m + sides / a.sqrt()).expand(x.shape)

    objective = ContrastiveDivergence(3, transition=pair)
    loss = loss_of(objective, gaussian(a, m), x) / 6
    to_a, to_m = torch.autograd.grad(loss, [a, m])
    with torch.no_grad():
        want_a = 0.5 * ((x - m).square().mean() - 1 / a)
        want_m = -a * (x.mean() - m)
    torch.testing.assert_close(to_a, want_a, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_m, want_m, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "gradients"),
    [(ULA, 3), (TEMPERED, 3), (SMALL_MALA, 4)],
)
def test_langevin_takes_one_gradient_a_step(kernel, gradients):
    """Of three steps; without an accept step nobody reads the slope where the last one ends."""
    found = []

    def energy(x):
        if x.requires_grad:
            x.register_hook(found.append)
        return 0.5 * x.square()

    p, x = EnergyDistribution(energy, event_shape=()), torch.randn(6)
    for _ in range(2):  # the first evaluation looks at the energy
        found.clear()
        torch.manual_seed(7)
        objective = ContrastiveDivergence(3, kernel=kernel)
        moved = objective.move(p, x).x
    assert len(found) == gradients
    if kernel is ULA:  # q - step^2/2 q + step xi
        torch.manual_seed(7)
        for _ in range(3):
            x = (1 - 0.5 * 0.1**2) * x + 0.1 * torch.randn(6, 1)[:, 0]
        torch.testing.assert_close(moved, x, rtol=0, atol=1e-6)


class TwiceHalf(ULA):
    """Two gradients a step."""

    def step(self, potential, state):
        for _ in range(2):
            state, info = super().step(potential, state)
        return state, info


def test_a_step_of_ones_own_has_all_its_gradients():
    """One at the start and two in each of two steps."""
    found = []

    def energy(x):
        if x.requires_grad:
            x.register_hook(found.append)
        return 0.5 * x.square()

    p = EnergyDistribution(energy, event_shape=())
    moved = ContrastiveDivergence(2, kernel=TwiceHalf).move(p, torch.randn(6))
    assert not moved.lost.any()
    assert len(found) == 5


def test_gradient_with_exact_draws():
    """The same with 40 000 draws; an error of a twentieth of 1/a would be seen."""
    a, x = torch.tensor(1.7, requires_grad=True), torch.randn(40)

    def exact(p, x):
        return torch.randn_like(x) / a.sqrt()

    objective = ContrastiveDivergence(transition=exact, num_negatives=1000)
    (slope,) = torch.autograd.grad(loss_of(objective, gaussian(a), x) / 40, a)
    with torch.no_grad():
        stderr = 0.5 * math.sqrt(2.0) / a / math.sqrt(40_000)
        assert abs(slope - 0.5 * (x.square().mean() - 1 / a)) < 4 * stderr


def test_one_langevin_step_is_score_matching(monkeypatch):
    """With noise +-1: dL/da = s (a x^2 - 1 - s a^2 x^2 / 2), s = eps^2 / 2; score matching's is a
    x^2 - 1.
    """
    a, x = torch.tensor(1.3, requires_grad=True), torch.tensor([0.7, -0.2])
    s = 0.02
    monkeypatch.setattr(torch, "randn_like", lambda q: torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]))
    kernel = partial(ULA, step_size=math.sqrt(2 * s))
    objective = ContrastiveDivergence(kernel=kernel, num_negatives=2)
    (slope,) = torch.autograd.grad(loss_of(objective, gaussian(a), x), a)
    square = x.square()
    want = s * (a * square - 1 - 0.5 * s * a**2 * square).sum()
    torch.testing.assert_close(slope, want.detach(), rtol=0, atol=1e-12)


# --- enumerated: a Boltzmann machine of five units and an RBM


def boltzmann(theta):
    """U = -b'x - sum J_ij x_i x_j, theta = (b, J above the diagonal)."""
    above = torch.triu_indices(5, 5, 1)

    def energy(x):
        return -x @ theta[:5] - (x[..., above[0]] * x[..., above[1]]) @ theta[5:]

    return EnergyDistribution(energy, event_shape=(5,), support=constraints.boolean)


def free_energy(theta):
    """F(v) = -b'v - sum_j softplus(c_j + v'W_j) of an RBM with three hidden units."""
    weight, b, c = theta[:15].reshape(5, 3), theta[15:20], theta[20:23]

    def energy(v):
        return -v @ b - nn.functional.softplus(c + v @ weight).sum(-1)

    return EnergyDistribution(energy, event_shape=(5,), support=constraints.boolean)


FAMILIES = {"boltzmann": (boltzmann, 15), "rbm": (free_energy, 23)}
ALL = states(5)


def law_of(p):
    return torch.softmax(-p.potential(ALL).detach(), 0)


def flip_matrix(p, site):
    """Draws one site from its conditional: ``(32, 32)``, rows sum to one."""
    flipped = ALL.clone()
    flipped[:, site] = 1 - flipped[:, site]
    to = (flipped @ (2.0 ** torch.arange(4, -1, -1))).long()
    stay = torch.sigmoid(p.potential(flipped) - p.potential(ALL)).detach()
    matrix = torch.diag(stay)
    matrix[torch.arange(32), to] = 1 - stay
    return matrix


def systematic_scan(p):
    return torch.linalg.multi_dot([flip_matrix(p, site) for site in range(5)])


def random_scan(p):
    return sum(flip_matrix(p, site) for site in range(5)) / 5


def expected_loss(objective, p, data_law, matrix):
    """The objective's own loss, summed over all data and all negatives by their probabilities."""
    rows = [objective.per_datum(p, ALL, Contrast(y.expand(1, 32, 5)), 0.0) for y in ALL]
    return (data_law * (matrix * torch.stack(rows, 1)).sum(1)).sum()


@pytest.fixture(params=FAMILIES)
def family(request):
    make, size = FAMILIES[request.param]
    theta = torch.randn(size).requires_grad_()
    return make, theta, torch.softmax(torch.randn(32), 0)


def exact_gradient(make, theta, data_law):
    """Autograd of the exact negative log-likelihood."""
    potential = make(theta).potential(ALL)
    nll = (data_law * potential).sum() + torch.logsumexp(-potential, 0)
    return torch.autograd.grad(nll, theta)[0]


def gradient(make, theta, data_law, matrix):
    loss = expected_loss(ContrastiveDivergence(), make(theta), data_law, matrix)
    return torch.autograd.grad(loss, theta)[0]


def test_with_exact_draws_it_is_the_likelihoods_gradient(family):
    make, theta, data_law = family
    exact = law_of(make(theta)).expand(32, 32)
    want = exact_gradient(make, theta, data_law)
    torch.testing.assert_close(gradient(make, theta, data_law, exact), want, rtol=0, atol=1e-12)


def test_gradient_of_an_rbm_by_finite_differences():
    """Of the exact likelihood, one weight moved by 1e-5 either way."""
    theta, data_law = torch.randn(23), torch.softmax(torch.randn(32), 0)

    def nll(at):
        potential = free_energy(at).potential(ALL)
        return (data_law * potential).sum() + torch.logsumexp(-potential, 0)

    step = torch.zeros(23)
    step[7] = 1e-5
    want = (nll(theta + step) - nll(theta - step)) / 2e-5
    theta.requires_grad_()
    exact = law_of(free_energy(theta)).expand(32, 32)
    found = gradient(free_energy, theta, data_law, exact)[7]
    torch.testing.assert_close(found, want, rtol=0, atol=1e-8)


def test_many_sweeps_are_maximum_likelihood(family):
    """CD-k with the exact matrix of a sweep: the error falls with k, at last to rounding."""
    make, theta, data_law = family
    want = exact_gradient(make, theta, data_law)
    sweep = systematic_scan(make(theta))
    powers = [torch.linalg.matrix_power(sweep, k) for k in (1, 10, 10_000)]
    errors = [float((gradient(make, theta, data_law, t) - want).norm()) for t in powers]
    assert errors[0] > 2 * errors[1] > 0
    assert errors[2] < 1e-10


@pytest.mark.parametrize("scan", [random_scan, systematic_scan])
def test_one_step_is_energy_discrepancy(family, scan):
    """ED_q = E_d U(x) - E_d E_q U_q(y), U_q(y) = -log sum_x' q(y | x') e^-U(x'), with q the
    kernel.
    """
    make, theta, data_law = family
    p = make(theta.detach())
    potential, matrix = p.potential(ALL), scan(p)
    contrastive = -torch.logsumexp(matrix.log() - potential[:, None], 0)
    want = (data_law * (potential - matrix @ contrastive)).sum()
    found = expected_loss(ContrastiveDivergence(), p, data_law, matrix)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)


def test_a_kernel_of_another_law_is_not_energy_discrepancy(family):
    """What the identity sees: the same sum with the kernel of a law at half the energy."""
    make, theta, data_law = family
    p = make(theta.detach())
    potential, matrix = p.potential(ALL), random_scan(p.temper(0.5))
    contrastive = -torch.logsumexp(matrix.log() - potential[:, None], 0)
    other = (data_law * (potential - matrix @ contrastive)).sum()
    assert abs(expected_loss(ContrastiveDivergence(), p, data_law, matrix) - other) > 1e-3


# --- what moves the states


def test_a_sweep_is_the_product_of_its_conditionals():
    """Frequencies of all 32 states after one sweep from each; five standard errors of 4 000."""
    p, num = boltzmann(torch.randn(15)), 4000
    want = systematic_scan(p)
    objective = ContrastiveDivergence(1, num_negatives=num)
    ends = objective.draw(p, ALL, None).points
    index = (ends @ (2.0 ** torch.arange(4, -1, -1))).long()
    found = nn.functional.one_hot(index, 32).double().mean(0)
    stderr = (want * (1 - want) / num).sqrt()
    assert ((found - want).abs() <= 5 * stderr + 1e-12).all()


def test_integers_keep_their_dtype():
    p = EnergyDistribution(
        lambda x: 0.3 * x.double().sum(-1),
        event_shape=(4,),
        support=constraints.integer_interval(0, 2),
    )
    x = torch.randint(3, (5, 4))
    points = ContrastiveDivergence(2).draw(p, x, None).points
    assert points.dtype == x.dtype
    assert points.shape == (1, 5, 4)


def test_counts_stay_in_law():
    """No list of values: a walk, from exact draws of a Poisson law of rate 3."""
    p = EnergyDistribution(ConwayMaxwellPoisson(math.log(3.0), 1.0))
    x = torch.poisson(torch.full((20_000,), 3.0))
    points = ContrastiveDivergence(5).draw(p, x, None).points[0]
    assert_mean_close(points, torch.tensor(3.0))
    assert_mean_close((points - 3.0).square(), torch.tensor(3.0))
    assert (points != x).double().mean() > 0.5


def test_directions_stay_on_their_sphere():
    p = EnergyDistribution(lambda x: -x[..., 0], event_shape=(3,), support=sphere)
    x = dist.ProjectedNormal(torch.zeros(3)).sample((400,))
    points = ContrastiveDivergence(3).draw(p, x, None).points[0]
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(400), rtol=0, atol=1e-6)
    assert (points != x).any(-1).double().mean() > 0.5


KERNELS = {
    "mala": partial(MALA, step_size=0.9),
    "hmc": partial(HMC, step_size=0.6),
    "nuts": partial(NUTS, step_size=0.6),
    "random walk": partial(RandomWalk, step_size=1.0),
    "elliptical": EllipticalSlice,
    "pcn": partial(PCN, step_size=0.5),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_row_is_a_chain_of_its_own_law(name):
    """From exact draws of N(c / 2, 1 / 2), c another in every row, to draws of the same."""
    c = torch.linspace(-3.0, 3.0, 4000)
    base = dist.Normal(torch.zeros(4000), 1.0)
    p = EnergyDistribution(lambda x: 0.5 * (x - c) ** 2, base=base)
    x = 0.5 * c + torch.randn(4000) * math.sqrt(0.5)
    objective = ContrastiveDivergence(4, kernel=KERNELS[name], num_negatives=2)
    points = objective.draw(p, x, None).points
    centred = points - 0.5 * c
    assert (points != x).double().mean() > 0.3
    for one in centred:  # the two chains beside a row share their start
        assert_mean_close(one, torch.tensor(0.0))
        assert_mean_close(one * c, torch.tensor(0.0))
        assert_mean_close(one.square(), torch.tensor(0.5))


@pytest.mark.parametrize("support", ["positive", "simplex"])
def test_constrained_supports_keep_their_jacobian(support):
    """Gamma(2, 1) and a Dirichlet law, from exact draws: without the Jacobian the mean moves."""
    if support == "positive":
        p = EnergyDistribution(lambda x: x - x.log(), event_shape=(), support=constraints.positive)
        law, mean = dist.Gamma(torch.tensor(2.0), 1.0), torch.tensor(2.0)
    else:
        alpha = torch.tensor([1.5, 2.0, 3.0])
        law, mean = dist.Dirichlet(alpha), alpha / alpha.sum()
        p = EnergyDistribution(
            lambda x: -((alpha - 1) * x.log()).sum(-1), event_shape=(3,), support=law.support
        )
    objective = ContrastiveDivergence(10, kernel=partial(MALA, step_size=0.9))
    assert_mean_close(objective.draw(p, law.sample((8000,)), None).points[0], mean)


def test_unadjusted_chains_have_their_bias():
    """Far from the start: the stationary variance of ULA is v / (1 - eps^2 / 4v)."""
    objective = ContrastiveDivergence(60, kernel=partial(ULA, step_size=0.8))
    points = objective.draw(gaussian(1.0), torch.zeros(20_000), None).points[0]
    assert_mean_close(points.square(), torch.tensor(1 / (1 - 0.64 / 4)))


def test_what_was_never_accepted_stays_to_the_last_bit():
    """Although exp(log x) rounds."""
    p = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=(), support=constraints.positive)
    x = 100.0 * (torch.rand(200) + 0.5)
    assert not torch.equal(x.log().exp(), x)
    kernel = partial(MALA, step_size=1e6)
    points = ContrastiveDivergence(2, kernel=kernel).draw(p, x, None).points[0]
    assert torch.equal(points, x)


def test_block_gibbs_of_an_rbm():
    """The user's transition: from exact draws it keeps the law of the free energy."""
    theta = torch.randn(23)
    weight, b, c = theta[:15].reshape(5, 3), theta[15:20], theta[20:23]

    def block_gibbs(p, v):
        h = torch.bernoulli(torch.sigmoid(c + v @ weight))
        return torch.bernoulli(torch.sigmoid(b + h @ weight.T))

    p, num = free_energy(theta), 40_000
    law = law_of(p)
    x = ALL[torch.multinomial(law, num, replacement=True)]
    ends = ContrastiveDivergence(3, transition=block_gibbs).draw(p, x, None).points[0]
    index = (ends @ (2.0 ** torch.arange(4, -1, -1))).long()
    found = torch.bincount(index, minlength=32) / num
    assert ((found - law).abs() < 5 * (law * (1 - law) / num).sqrt()).all()
    assert (ends != x).any(-1).double().mean() > 0.3


# --- where chains start


def test_chains_start_at_the_data():
    x = torch.randn(5)
    kernel = partial(ULA, step_size=1e-9)
    points = ContrastiveDivergence(kernel=kernel, num_negatives=3).draw(gaussian(1.0), x, None)
    torch.testing.assert_close(points.points, x.expand(3, 5), rtol=0, atol=1e-6)


FAR = dist.Normal(torch.tensor(50.0), 0.1)


@pytest.mark.parametrize("held_by", ["guide", "objective", "base"])
def test_chains_start_at_a_law(held_by):
    x, options = torch.randn(7), {"kernel": partial(ULA, step_size=1e-9), "max_gap": math.inf}
    start = {"guide": "data", "objective": FAR, "base": "base"}[held_by]
    p = EnergyDistribution(lambda x: 0.1 * x**2, base=FAR)
    if held_by != "base":
        p = gaussian(0.1)
    objective = ContrastiveDivergence(start=start, **options)
    inner, contrasts = objective.draw, []
    objective.draw = lambda *args: contrasts.append(inner(*args)) or contrasts[-1]

    def guide(x):
        if held_by == "guide":
            with pyro.plate("data", len(x)):
                pyro.sample("x", FAR)

    assert loss_of(objective, p, x, guide).isfinite()
    assert contrasts[0].points.shape == (1, 7)
    assert (contrasts[0].points - 50.0).abs().max() < 1.0


@pytest.mark.parametrize("support", [constraints.boolean, constraints.positive])
def test_without_a_base_starts_are_spread_over_the_support(support):
    p = EnergyDistribution(lambda x: 0.0 * x, event_shape=(), support=support)
    x = torch.ones(400)
    points = ContrastiveDivergence(start="base").draw(p, x, None).points
    assert support.check(points).all()
    assert points.std() > 0.3


def test_a_long_short_run_forgets_its_start():
    """400 steps from N(50, .1) are draws of N(0, 1): the variance to four standard errors."""
    objective = ContrastiveDivergence(100, kernel=partial(HMC, step_size=0.5), start=FAR)
    points = objective.draw(gaussian(1.0), torch.zeros(5000), None).points[0]
    assert_mean_close(points, torch.tensor(0.0))
    assert_mean_close(points.square(), torch.tensor(1.0))


# --- the energy penalty


def test_the_penalty_is_on_the_energy_and_not_on_the_base():
    base = dist.Normal(torch.tensor(1.0), 2.0)
    p = EnergyDistribution(lambda x: 0.3 * x**2 - 0.1, base=base)
    x, y = torch.randn(5), torch.randn(2, 5)
    plain = ContrastiveDivergence(num_negatives=2).per_datum(p, x, Contrast(y), 0.0)
    penal = ContrastiveDivergence(num_negatives=2, energy_penalty=0.7)
    energy = lambda z: 0.3 * z**2 - 0.1  # noqa: E731
    want = plain + 0.7 * (energy(x) ** 2 + (energy(y) ** 2).mean(0))
    torch.testing.assert_close(penal.per_datum(p, x, Contrast(y), 0.0), want, rtol=0, atol=1e-12)
    potential = lambda z: energy(z) - base.log_prob(z)  # noqa: E731
    torch.testing.assert_close(plain, potential(x) - potential(y).mean(0), rtol=0, atol=1e-12)


def test_a_learned_base_enters_both_terms():
    """dL/dm of a base N(m, 1), -(x - m) + mean(y - m), is the energy's own as well."""
    m, x, y = torch.tensor(0.3, requires_grad=True), torch.randn(5), torch.randn(2, 5)
    p = EnergyDistribution(lambda x: 0.1 * x**2, base=dist.Normal(m, 1.0))
    loss = ContrastiveDivergence(num_negatives=2).per_datum(p, x, Contrast(y), 0.0)
    (slope,) = torch.autograd.grad(loss.sum(), m)
    torch.testing.assert_close(slope, (y.mean(0) - x).sum(), rtol=0, atol=1e-12)


def test_a_latent_prior():
    """To the energy it is the loss at the guide's z; to z, the energy's own slope."""
    a, loc = torch.tensor(1.3, requires_grad=True), torch.tensor(0.8, requires_grad=True)

    def model(x):
        z = pyro.sample("z", gaussian(a))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Delta(loc))

    objective = ContrastiveDivergence(transition=lambda p, z: torch.full_like(z, 0.5))
    loss = objective.differentiable_loss(model, guide, torch.tensor(2.0))
    to_a, to_loc = torch.autograd.grad(loss, [a, loc])
    torch.testing.assert_close(to_a, torch.tensor(0.5 * (0.8**2 - 0.5**2)))
    torch.testing.assert_close(to_loc, torch.tensor(1.3 * 0.8 - (2.0 - 0.8)))


# --- the equalities of every objective


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return self.layers(x).squeeze(-1) + 0.1 * x.square().sum(-1)


BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.5).to_event(1)
GUISES = {
    "cd": lambda: ContrastiveDivergence(2, num_negatives=2),
    "cd, penalty": lambda: ContrastiveDivergence(energy_penalty=0.3),
    "short-run": lambda: ContrastiveDivergence(3, start="base", num_negatives=3),
    "pcd": lambda: PersistentContrastiveDivergence(2),
    "pcd, penalty": lambda: PersistentContrastiveDivergence(2, num_negatives=2, energy_penalty=0.3),
}


class Setup:
    """Negatives tied to rows: the loss and its gradient on full data, and by hand."""

    def __init__(self, name, attach):
        self.net, self.data = Net(), torch.randn(6, 2)
        self.objective = GUISES[name]()
        self.whole = attach(self.objective, self.ebm().expand([6]), self.data)
        self.loss, self.grads = self.by_hand()

    def ebm(self):
        return EnergyDistribution(self.net, base=BASE, conditional=False)

    def by_hand(self):
        total, alpha = torch.zeros(()), self.objective.energy_penalty
        for i, x in enumerate(self.data):
            draws = self.whole.points[:, i]
            total = total + self.net(x) - BASE.log_prob(x) + alpha * self.net(x) ** 2
            for y in draws:
                potential = self.net(y) - BASE.log_prob(y) - alpha * self.net(y) ** 2
                total = total - potential / len(draws)
        return total.item(), self.gradients(total)

    def gradients(self, loss):
        found = torch.autograd.grad(loss, list(self.net.parameters()))
        return torch.cat([g.flatten() for g in found])

    def evaluate(self, model, *args):
        loss = self.objective.differentiable_loss(model, no_guide, *(args or (self.data,)))
        return loss.item(), self.gradients(loss)

    def check(self, loss, grads):
        assert loss == pytest.approx(self.loss, abs=1e-10)
        torch.testing.assert_close(grads, self.grads, rtol=0, atol=1e-10)

    def rows(self, x):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.ebm(), obs=x)


@pytest.fixture(params=GUISES)
def setup(request, attach):
    return Setup(request.param, attach)


def test_full_data_is_the_formula_by_hand(setup):
    setup.check(*setup.evaluate(setup.rows))


def test_mean_over_subsamples_is_the_full_data(setup):
    def model(x, rows):
        pyro.module("net", setup.net)
        with pyro.plate("data", 6, subsample=rows):
            pyro.sample("x", setup.ebm(), obs=x[rows])

    pairs = [torch.tensor(rows) for rows in itertools.combinations(range(6), 2)]
    runs = [setup.evaluate(model, setup.data, rows) for rows in pairs]
    losses, grads = zip(*runs, strict=True)
    setup.check(sum(losses) / len(losses), torch.stack(grads).mean(0))


@pytest.mark.parametrize("padding", [float("nan"), 1e3])
def test_masked_padding(setup, padding):
    x = torch.cat([setup.data, torch.full((4, 2), padding)])[torch.randperm(10)]
    mask = x[:, 0].isfinite() & (x[:, 0] != padding)

    def model(x):
        pyro.module("net", setup.net)
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", setup.ebm(), obs=x)

    setup.check(*setup.evaluate(model, x))


def test_nested_plates_and_to_event(setup):
    def nested(x):
        pyro.module("net", setup.net)
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("x", setup.ebm(), obs=x)

    def as_event(x):
        pyro.module("net", setup.net)
        pyro.sample("x", setup.ebm().expand([len(x)]).to_event(1), obs=x)

    setup.check(*setup.evaluate(nested, setup.data.reshape(2, 3, 2)))
    setup.check(*setup.evaluate(as_event))


def test_two_half_sites(setup):
    def model(x):
        pyro.module("net", setup.net)
        for site, part in {"left": x[:2], "right": x[2:]}.items():
            with pyro.plate(f"rows of {site}", len(part)):
                pyro.sample(site, setup.ebm(), obs=part)

    setup.check(*setup.evaluate(model))


def test_as_a_torch_module_and_by_particles(setup):
    loss = setup.objective(setup.rows, no_guide)(setup.data)
    setup.check(loss.item(), setup.gradients(loss))
    setup.objective.num_particles, setup.objective.vectorize_particles = 3, True
    setup.objective.max_plate_nesting = 2
    setup.check(*setup.evaluate(setup.rows))


# --- what is learned


def test_fit_of_a_regression():
    """log Z depends on the context: slope 1 within five standard errors of 2000 rows, .15."""
    context = torch.randn(2000)
    x = context + torch.randn(2000)

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        base = dist.Normal(torch.zeros(len(x)), 1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: -slope * context * x, base=base), obs=x)

    objective = ContrastiveDivergence(2, kernel=partial(MALA, step_size=0.8))
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=objective)
    for _ in range(80):
        svi.step(x)
    assert pyro.param("slope").item() == pytest.approx(1.0, abs=0.15)


def test_the_state_holds_what_was_fitted():
    objective, other = ContrastiveDivergence(2), ContrastiveDivergence(2)
    objective.fitted["x"] = torch.tensor(0.7)
    other.load_state_dict(objective.state_dict())
    assert float(other.fitted["x"]) == pytest.approx(0.7)


def test_its_value_is_no_criterion():
    """At the truth it is near zero, far below the entropy; the class says so."""
    assert not ContrastiveDivergence.is_held_out_criterion
    assert not PersistentContrastiveDivergence.is_held_out_criterion
    objective = ContrastiveDivergence(20, kernel=partial(HMC, step_size=0.5))
    loss = loss_of(objective, gaussian(1.0), torch.randn(2000)) / 2000
    assert abs(float(loss)) < 0.1 < 1.4 < 0.5 * math.log(2 * math.pi * math.e)


# --- diagnostics and alarms


def test_diagnostics():
    objective = ContrastiveDivergence(3, kernel=partial(MALA, step_size=1.5))
    loss = loss_of(objective, gaussian(1.0), torch.randn(4000))
    notes = objective.diagnostics["x"]
    assert notes.keys() == {"energy_gap", "energy_spread", "acceptance", "lost", "moved"}
    assert float(notes["energy_gap"]) == pytest.approx(float(loss) / 4000, abs=1e-12)
    assert 0.5 < float(notes["acceptance"]) < 0.99
    assert float(notes["lost"]) == 0.0


def test_chains_that_run_off_are_put_back_and_said():
    """A fifth of the rows start where a large step overshoots an energy of degree four."""
    p = EnergyDistribution(lambda x: x**4, event_shape=())
    x = torch.cat([torch.full((20,), 1e40), torch.zeros(80)])
    objective = ContrastiveDivergence(40, kernel=partial(ULA, step_size=0.1))
    points = objective.draw(p, x, None).points[0]
    assert torch.equal(points[:20], x[:20])
    assert points.isfinite().all()
    with pytest.warns(ApproximateSampleWarning, match=r"20\.0% of the chains ran off"):
        loss_of(objective, p, x)
    with pytest.raises(NonFiniteEnergyError, match=r"100\.0% of the chains ran off"):
        loss_of(objective, p, x[:20])


def test_divergence_is_an_error():
    p, x = gaussian(1.0), torch.randn(10)

    def away(p, x):
        return torch.full_like(x, 1000.0)

    message = r"site 'x', step 0: the mean .* beyond max_gap=10000"
    with pytest.raises(DivergedTrainingError, match=message):
        loss_of(ContrastiveDivergence(transition=away), p, x)
    loss = loss_of(ContrastiveDivergence(transition=away, max_gap=math.inf), p, x)
    assert loss < -1e6
    poles = EnergyDistribution(lambda x: 1 / (x - 1000.0), event_shape=())
    with pytest.raises(NonFiniteEnergyError, match="energies of data or chains are not finite"):
        loss_of(ContrastiveDivergence(transition=away), poles, x)


def test_masked_rows_do_not_count_as_divergence():
    p, x = gaussian(1.0), torch.randn(4)

    def away(p, x):
        return x.clone().index_fill(-1, torch.tensor([3]), 1e6)

    def model(x):
        with pyro.plate("data", 4), poutine.mask(mask=torch.tensor([True, True, True, False])):
            pyro.sample("x", p, obs=x)

    objective = ContrastiveDivergence(transition=away)
    assert objective.differentiable_loss(model, no_guide, x).abs() < 1e-12


def test_a_kernel_that_never_moves_is_said():
    a = torch.tensor(1.0, requires_grad=True)
    objective = ContrastiveDivergence(kernel=partial(MALA, step_size=100.0))
    loss_of(objective, gaussian(a), torch.randn(50))
    objective.num_steps_taken.fill_(256)
    with pytest.warns(SurrogateWarning, match=r"accepted 0\.\d\d% of its proposals"):
        loss_of(objective, gaussian(a), torch.randn(50))


def test_divergence_under_fit_keeps_the_checkpoint(tmp_path):
    """An energy unbounded below: chains run downhill, and the fit says so instead of going on."""

    def model(x):
        slope = pyro.param("slope", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: slope * x, event_shape=()), obs=x)

    objective = PersistentContrastiveDivergence(50, kernel=partial(ULA, step_size=1.0))
    path = tmp_path / "fit.pt"
    with pytest.raises(RuntimeError, match="training has diverged"):
        fit(model, torch.randn(20), objective, lr=0.5, num_steps=500, checkpoint=path, **QUIET)
    assert path.exists()


# --- what is refused


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: ContrastiveDivergence(0), ValueError, "num_steps must be a whole number"),
        (lambda: ContrastiveDivergence(num_negatives=0), ValueError, "num_negatives must be"),
        (lambda: ContrastiveDivergence(start="noise"), ValueError, "start must be 'data', 'base'"),
        (lambda: ContrastiveDivergence(energy_penalty=-1.0), ValueError, "must not be negative"),
        (lambda: ContrastiveDivergence(max_gap=0.0), ValueError, "max_gap must be positive"),
        (lambda: ContrastiveDivergence(kernel=MALA, transition=abs), ValueError, "not both"),
        (lambda: ContrastiveDivergence(kernel=MALA(abs)), TypeError, "kernel must be a function"),
        (lambda: ContrastiveDivergence(transition=3), TypeError, "transition must be a function"),
        (lambda: ContrastiveDivergence(schedule=(1, 1)), ValueError, "has no second player"),
    ],
)
def test_bad_arguments(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def draw(p=None, x=None, **options):
    p = gaussian(1.0) if p is None else p
    return ContrastiveDivergence(**options).draw(p, torch.ones(3) if x is None else x, None)


def test_kernels_that_do_not_fit():
    lattice = EnergyDistribution(Ising(0.2, (3, 3)))
    with pytest.raises(TypeError, match="kernel needs a continuous support.*Gibbs sweeps"):
        draw(lattice, torch.ones(2, 3, 3), kernel=partial(MALA, step_size=0.1))
    with pytest.raises(ValueError, match=r"bind a step size, as by .*HMC, step_size=0\.1"):
        draw(kernel=HMC)
    with pytest.raises(ValueError, match="inverse_temperature 2"):
        draw(kernel=partial(ULA, inverse_temperature=2.0))
    with pytest.raises(TypeError, match="ContrastiveDivergence keeps positions"):
        draw(kernel=ParallelTempering)
    message = (
        r"kernel of pyro_ebm\.mcmc.*partial\(pyro_ebm\.mcmc\.NUTS.*got pyro\.infer\.mcmc\.nuts"
    )
    with pytest.raises(TypeError, match=message):
        draw(kernel=pyro.infer.NUTS)
    mixed = EnergyDistribution(
        lambda x: x.sum(-1),
        event_shape=(2,),
        support=constraints.cat([constraints.real, constraints.boolean], -1, [1, 1]),
    )
    with pytest.raises(NotImplementedError, match="mixed support .*give transition="):
        draw(mixed, torch.ones(3, 2))


@pytest.mark.parametrize("kernel", [None, partial(MALA, step_size=0.1)])
def test_rows_cut_off_at_bounds_of_their_own(kernel):
    """A function may move them; bounds of columns are those of all rows."""
    low = torch.linspace(0.0, 1.0, 3)
    x = low + torch.rand(3)
    rows = gaussian(1.0, support=constraints.greater_than(low))
    with pytest.raises(NotImplementedError, match=r"shape \(3,\), .*use ScoreMatching or Energy"):
        draw(rows, x, kernel=kernel)
    assert draw(rows, x, transition=lambda p, x: x + 1.0).points.shape == (1, 3)
    columns = EnergyDistribution(
        lambda x: x.sum(-1), event_shape=(3,), support=constraints.greater_than(low)
    )
    assert draw(columns, x.expand(5, 3), kernel=kernel).points.shape == (1, 5, 3)


def test_transitions_that_return_something_else():
    with pytest.raises(ValueError, match=r"transition must return events .*\(1, 3\)"):
        draw(transition=lambda p, x: x[:, :2])
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        draw(transition=lambda p, x: (x, x))


def test_energies_with_dims_that_rows_do_not_show():
    p = EnergyDistribution(lambda x: torch.ones(4, 1) * x**2, event_shape=())
    with pytest.raises(ValueError, match=r"one energy per row \(1, 3\), got \(4, 3\)"):
        draw(p)


def test_a_start_on_another_support():
    with pytest.raises(ValueError, match="supports must be the same"):
        draw(start=dist.Gamma(2.0, 1.0))


def test_a_generalized_ebm_has_no_density():
    p = GeneralizedEBM(lambda z: 2 * z, dist.Normal(torch.tensor(0.0), 1.0), lambda x: x**2)
    with pytest.raises(ValueError, match="ContrastiveDivergence needs a density"):
        loss_of(ContrastiveDivergence(), p, torch.randn(3))


def test_it_cannot_be_frozen():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", gaussian(1.0), obs=x)

    for objective in (ContrastiveDivergence(), PersistentContrastiveDivergence()):
        with pytest.raises(NotImplementedError, match="cannot be frozen: .*unbounded below"):
            objective.freeze(model, torch.randn(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(dtype):
    a = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    for objective in (ContrastiveDivergence(), PersistentContrastiveDivergence(2)):
        assert loss_of(objective, gaussian(a), torch.randn(5, dtype=dtype)).dtype == dtype
