"""Discrete energy discrepancy: its identities by sums over all states, the truth as its minimizer,
and one loss in many guises.

A negative may carry an importance ratio: with log_ratio = log q - log rho the loss averages
q e^-U / rho. Given all states, that average is the sum over them, and M is infinite.
"""

from __future__ import annotations

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import PseudoLikelihood, RankingNCE, fit
from pyro_ebm.infer.discrepancy.discrete_energy_discrepancy import DiscreteEnergyDiscrepancy
from pyro_ebm.infer.discrepancy.perturbation_contrast import Negatives
from pyro_ebm.infer.discrepancy.perturbations import GaussianNoise, MixedColumns
from pyro_ebm.infer.discrepancy.site_perturbations import (
    BernoulliFlips,
    HeatKernel,
    MaskedSite,
    SiteFlip,
)
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.ops.constraints import sphere

NO_C = torch.zeros(())
TINY = 1e-280  # the weight of the datum itself: none


def make(perturbation, num_negatives=1, weight=1.0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        return DiscreteEnergyDiscrepancy(perturbation, num_negatives, stabilization=weight)


def states(num_values, d):
    return torch.tensor(list(itertools.product(range(num_values), repeat=d)), dtype=torch.float64)


def by_table(table, num_values, d):
    """The EBM whose potential is looked up."""
    strides = num_values ** torch.arange(d - 1, -1, -1)
    support = constraints.integer_interval(0, num_values - 1)
    return EnergyDistribution(
        lambda x: table[(x.long() * strides).sum(-1)], event_shape=(d,), support=support
    )


def laws(num):
    """A law of the data and a potential, both random."""
    pyro.set_rng_seed(3)
    return torch.softmax(torch.randn(num), 0), torch.randn(num)


def flips(rate, d):
    one = torch.tensor([[1 - rate, rate], [rate, 1 - rate]])
    whole = torch.ones(1, 1)
    for _ in range(d):
        whole = torch.kron(whole, one)
    return whole


def neighbors(num_values, d):
    """One site, another value, uniformly."""
    x = states(num_values, d)
    apart = (x[:, None] != x).sum(-1)
    return (apart == 1).double() / (d * (num_values - 1))


def asymmetric(num):
    """Rows that sum to one and columns that do not, some entries zero."""
    pyro.set_rng_seed(4)
    kernel = torch.rand(num, num) ** 2 * (torch.rand(num, num) < 0.7) + torch.eye(num)
    return kernel / kernel.sum(1, keepdim=True)


def exact(kernel, potential, x):
    """U(x) - U_q(y) for all pairs (x, y), by the shipped loss with all states as negatives."""
    num, d = x.shape
    p = by_table(potential, round(num ** (1 / d)), d)
    pairs = x[:, None].expand(num, num, d)
    points = x[:, None, None].expand(num, num, num, d)  # (M,) + rows (x, y)
    log_ratio = (num * kernel).log()[:, None, :].expand(num, num, num)
    contrast = Negatives(points, log_ratio, torch.zeros(num, num))
    objective = make(SiteFlip(), num, TINY)
    return objective.per_datum(p, pairs, contrast, NO_C)


def discrepancy(law, kernel, potential, x):
    return float((law[:, None] * kernel * exact(kernel, potential, x)).sum())


def entropy(law):
    return -float((law * law.log()).sum())


def kl(one, other):
    return float((one * (one.log() - other.log())).sum())


# --- identities


def test_flips_at_one_half_give_the_likelihood():
    """NLL - d log 2, to rounding."""
    x = states(2, 4)
    law, potential = laws(16)
    nll = float(law @ potential) + float(torch.logsumexp(-potential, 0))
    value = discrepancy(law, flips(0.5, 4), potential, x)
    assert value == pytest.approx(nll - 4 * math.log(2), abs=1e-12)
    other = discrepancy(law, flips(0.4, 4), potential, x)
    assert abs(other - nll + 4 * math.log(2)) > 1e-3


@pytest.mark.parametrize("num_values", [2, 3, 5])
def test_all_values_of_a_masked_site_give_the_pseudo_likelihood(num_values):
    """Divided by d, row by row and to rounding: K negatives in turn, with the shipped mass."""
    d = 3
    x = states(num_values, d)
    num = len(x)
    p = by_table(laws(num)[1], num_values, d)
    hidden = torch.eye(d, dtype=torch.bool)[:, None]  # (d, 1, d)
    values = torch.arange(float(num_values))[:, None, None, None]
    points = torch.where(hidden, values, x)
    mass = make(MaskedSite()).draw(p, x, None).log_mass
    torch.testing.assert_close(mass, torch.full((num,), math.log(num_values)), rtol=0, atol=1e-12)
    mass = mass.expand(d, num)
    contrast = Negatives(points, mass.expand(num_values, d, num), mass)
    objective = make(MaskedSite(), num_values, TINY)
    rows = objective.per_datum(p, x.expand(d, num, d), contrast, NO_C).mean(0)
    torch.testing.assert_close(rows, PseudoLikelihood().row_losses(p, x) / d, rtol=0, atol=1e-12)


def test_many_masked_draws_come_near_the_pseudo_likelihood():
    """By its own draws: five standard errors, and Var(e^-U) / (2 M ...) < 0.005, see 0.02."""
    x = states(3, 3)
    law, potential = laws(27)
    p = by_table(potential, 3, 3)
    pyro.set_rng_seed(0)
    data = x[torch.multinomial(law, 15_000, replacement=True)]
    objective = make(MaskedSite(), 200, 1e-12)
    rows = objective.per_datum(p, data, objective.draw(p, data, None), NO_C)
    rows = rows - PseudoLikelihood().row_losses(p, data) / 3
    stderr = float(rows.std()) / math.sqrt(15_000)
    assert 5 * stderr < 0.02
    assert abs(float(rows.mean())) < 5 * stderr + 0.005


def test_kernels_that_keep_the_model_give_contrastive_divergence():
    """U_q is U itself: E U(x) - E U(y), y one Gibbs step from x. To rounding."""
    x = states(2, 3)
    law, potential = laws(8)
    model = torch.softmax(-potential, 0)
    moves = (neighbors(2, 3) > 0).double() / 3
    gibbs = moves * (model / (model + model[:, None]))
    gibbs = gibbs + torch.diag(1 - gibbs.sum(1))
    torch.testing.assert_close(model[:, None] * gibbs, (model[:, None] * gibbs).T)
    cd = float(law @ potential - (law @ gibbs) @ potential)
    assert discrepancy(law, gibbs, potential, x) == pytest.approx(cd, abs=1e-12)


@pytest.mark.parametrize("which", ["flips", "neighbors", "asymmetric"])
def test_is_a_contraction_of_divergences(which):
    """KL(d | p) - KL(qd | qp), plus a term of the data's: for kernels of any kind."""
    x = states(2, 3)
    law, potential = laws(8)
    kernel = {"flips": flips(0.2, 3), "neighbors": neighbors(2, 3), "asymmetric": asymmetric(8)}[
        which
    ]
    model = torch.softmax(-potential, 0)
    moved, model_moved = law @ kernel, model @ kernel
    want = kl(law, model) - kl(moved, model_moved) + entropy(law) - entropy(moved)
    assert discrepancy(law, kernel, potential, x) == pytest.approx(want, abs=1e-12)


def test_the_way_back_is_normalized_and_weighed():
    """Draws by rho_y with the ratio c(y), all of them weighed by rho_y: the exact value again.

    Without the ratio the value is another one.
    """
    x, kernel = states(2, 3), asymmetric(8)
    law, potential = laws(8)
    mass = kernel.sum(0)
    rho = (kernel / mass).T
    mean = rho @ torch.exp(-potential)  # e^-U averaged over the way back
    value = float(law @ potential + (law @ kernel) @ (mass * mean).log())
    assert value == pytest.approx(discrepancy(law, kernel, potential, x), abs=1e-12)
    assert abs(value - float(law @ potential + (law @ kernel) @ mean.log())) > 1e-2


@pytest.mark.parametrize("num", [1, 7])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_value_of_a_constant(num, weight):
    """log((w + M) / M), and a masked site's log K: nothing is known of how it was hidden."""
    p = EnergyDistribution(lambda x: torch.full(x.shape[:-1], 3.0), event_shape=(4,),
                           support=constraints.integer_interval(0, 2))  # fmt: skip
    x = torch.randint(3, (50, 4)).double()
    for perturbation, mass in (
        (SiteFlip(), 0.0),
        (HeatKernel("ordinal", 0.1), 0.0),
        (MaskedSite(), math.log(3)),
    ):
        objective = make(perturbation, num, weight)
        rows = objective.per_datum(p, x, objective.draw(p, x, None), NO_C)
        want = torch.full((50,), math.log((weight + num) / num) + mass)
        torch.testing.assert_close(rows, want, rtol=0, atol=1e-12)


def test_is_ranking_among_exchangeable_points():
    """The same contrast in ranking NCE, less log M and the log ratio of the datum."""
    p = by_table(laws(27)[1], 3, 3)
    x = states(3, 3)
    objective = make(HeatKernel("absorbing", 0.7), 6)
    contrast = objective.draw(p, x, None)
    noise = Contrast(contrast.points, -contrast.log_ratio, -contrast.log_mass)
    ranking = RankingNCE(num_noise=6).per_datum(p, x, noise, NO_C)
    want = ranking - math.log(6) + contrast.log_mass
    torch.testing.assert_close(objective.per_datum(p, x, contrast, NO_C), want, rtol=0, atol=1e-12)


# --- where it leads


def expected_with_one_negative(kernel, law, potential, x, weight):
    """E over x, y, x' of the shipped loss for M = 1, with the ratio of an asymmetric kernel."""
    num, d = x.shape
    mass = kernel.sum(0)
    rho = (kernel / mass).T
    p = by_table(potential, round(num ** (1 / d)), d)
    data = x[:, None, None].expand(num, num, num, d)
    negatives = x.expand(num, num, num, d)[None]
    log_mass = mass.log()[None, :, None].expand(num, num, num)
    contrast = Negatives(negatives, log_mass[None], log_mass)
    rows = make(SiteFlip(), 1, weight).per_datum(p, data, contrast, NO_C)
    weights = law[:, None, None] * kernel[:, :, None] * rho[None]
    return (weights * rows).sum()


def minimizer(kernel, law, x, weight):
    """The law that Newton's method ends at, the potential's free constant held."""
    free = torch.zeros(len(law) - 1)

    def loss(free):
        potential = torch.cat([torch.zeros(1), free])
        return expected_with_one_negative(kernel, law, potential, x, weight)

    for _ in range(60):
        at = free.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(at), at)
        step = torch.linalg.solve(torch.autograd.functional.hessian(loss, at), slope)
        free = free - step * min(1.0, 1.0 / float(step.abs().max()))
        if step.abs().max() < 1e-11:
            break
    assert slope.abs().max() < 1e-9
    return torch.softmax(-torch.cat([torch.zeros(1), free]), 0)


KERNELS = {
    "flips": lambda: flips(0.2, 3),
    "far flips": lambda: flips(0.5, 3),
    "asymmetric": lambda: asymmetric(8),
}


@pytest.mark.parametrize("name", KERNELS)
def test_one_negative_and_weight_one_find_the_law(name):
    """To 1e-9, with every kernel; weights .3 and 3 are off by more than 0.02 in a probability."""
    x, law = states(2, 3), laws(8)[0]
    kernel = KERNELS[name]()
    found = {w: minimizer(kernel, law, x, w) for w in (0.3, 1.0, 3.0)}
    torch.testing.assert_close(found[1.0], law, rtol=0, atol=1e-9)
    assert (found[0.3] - law).abs().max() > 0.02
    assert (found[3.0] - law).abs().max() > 0.02


def test_single_flips_do_not_see_the_mass_of_even_and_odd_events():
    """A number added to the potential of odd events changes nothing; of a masked site, it does."""
    x = states(2, 3)
    potential = laws(8)[1]
    odd = potential + 2.0 * (x.sum(-1) % 2)
    pyro.set_rng_seed(0)
    for perturbation, is_blind in ((SiteFlip(), True), (MaskedSite(), False)):
        objective = make(perturbation, 8)
        rows = []
        for table in (potential, odd):
            p = by_table(table, 2, 3)
            pyro.set_rng_seed(0)
            rows.append(objective.per_datum(p, x, objective.draw(p, x, None), NO_C))
        assert bool((rows[0] - rows[1]).abs().max() < 1e-12) is is_blind


def couplings(theta, x):
    """Four categories of three values: fields and a coupling of equal neighbors."""
    field, coupling = theta[..., 0, None], theta[..., 1, None]
    equal = (x == x.roll(1, -1)).double()
    return (field * x - coupling * equal).sum(-1)


def category_ebm(theta):
    support = constraints.integer_interval(0, 2)
    return EnergyDistribution(lambda x: couplings(theta, x), event_shape=(4,), support=support)


def mixed_potential(theta, x):
    """A real number whose mean follows a bit: a x^2 / 2 - b x s + c s."""
    a, b, c = theta.unbind(-1)
    return 0.5 * a * x[..., 0] ** 2 - b * x[..., 0] * x[..., 1] + c * x[..., 1]


def mixed_ebm(theta):
    support = constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[1, 1])
    return EnergyDistribution(
        lambda x: mixed_potential(theta, x), event_shape=(2,), support=support
    )


def category_data(num):
    x = states(3, 4)
    weights = torch.softmax(-couplings(torch.tensor([0.2, 0.5]), x), 0)
    return x[torch.multinomial(weights, num, replacement=True)]


def mixed_data(num):
    """p(s = 1) / p(s = 0) = exp(b^2 / (2 a) - c), x given s ~ N(b s / a, 1 / a)."""
    a, b, c = MIXED.tolist()
    s = torch.bernoulli(torch.full((num,), 1 / (1 + math.exp(c - b**2 / (2 * a)))))
    return torch.stack([b * s / a + torch.randn(num) / math.sqrt(a), s], -1)


CATEGORIES = torch.tensor([0.2, 0.5], dtype=torch.float64)
MIXED = torch.tensor([1.3, 0.9, 0.4], dtype=torch.float64)
RECOVERIES = {
    "flip": (category_ebm, category_data, CATEGORIES, SiteFlip()),
    "mask": (category_ebm, category_data, CATEGORIES, MaskedSite()),
    "uniform": (category_ebm, category_data, CATEGORIES, HeatKernel("uniform", 0.4)),
    "cyclic": (category_ebm, category_data, CATEGORIES, HeatKernel("cyclic", (0.01, 0.1))),
    "ordinal": (category_ebm, category_data, CATEGORIES, HeatKernel("ordinal", 0.05)),
    "absorbing": (category_ebm, category_data, CATEGORIES, HeatKernel("absorbing", (0.1, 2.0))),
    "table": (
        mixed_ebm,
        mixed_data,
        MIXED,
        MixedColumns(GaussianNoise(1.0), BernoulliFlips(0.3)),
    ),
    "table, absorbing": (
        mixed_ebm,
        mixed_data,
        MIXED,
        MixedColumns(GaussianNoise((0.1, 4.0)), HeatKernel("absorbing", 0.5)),
    ),
}


def estimate(name, weight, num=20_000):
    """The minimizer with draws frozen, minus the truth, and the standard errors of its entries."""
    ebm, draw_data, truth, perturbation = RECOVERIES[name]
    pyro.set_rng_seed(5)
    data = draw_data(num)
    objective = make(perturbation, 3, weight)
    contrast = objective.draw(ebm(truth), data, None)

    def rows(theta):
        return objective.per_datum(ebm(theta), data, contrast, NO_C)

    theta = truth.clone()
    for _ in range(30):
        at = theta.requires_grad_()
        (slope,) = torch.autograd.grad(rows(at).mean(), at)
        hessian = torch.autograd.functional.hessian(lambda t: rows(t).mean(), at)
        theta = (at - torch.linalg.solve(hessian, slope)).detach()
        if slope.abs().max() < 1e-9:
            break
    apart = theta.expand(num, -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(apart).sum(), apart)
    influence = scores @ torch.linalg.inv(hessian)
    return theta - truth, influence.std(0) / math.sqrt(num)


@pytest.mark.parametrize("name", RECOVERIES)
def test_estimate_is_the_truth(name):
    """Within four standard errors, none above 0.1, by its own draws and three negatives."""
    off, stderr = estimate(name, 1.0)
    assert stderr.max() < 0.1
    assert (off / stderr).abs().max() < 4


@pytest.mark.parametrize("name", ["mask", "absorbing", "table"])
def test_another_weight_leads_elsewhere(name):
    """The same comparison rejects weight 0.2 by twice its threshold."""
    off, stderr = estimate(name, 0.2)
    assert (off / stderr).abs().max() > 8


# --- one loss in many guises


NUM_ROWS = 6


class Setup:
    """An energy with parameters, data of its kind, and draws tied to rows."""

    def __init__(self, kind, perturbation, attach):
        pyro.set_rng_seed(6)
        self.weights = torch.nn.Parameter(torch.randn(4, 4))
        self.support, self.data = kind(NUM_ROWS)
        self.objective = make(perturbation, 3)
        self.whole = attach(self.objective, self.ebm().expand([NUM_ROWS]), self.data)
        self.loss, self.grads = self.evaluate(self.full)

    def energy(self, x):
        return torch.tanh((x @ self.weights) * x).sum(-1)

    def ebm(self):
        return EnergyDistribution(self.energy, event_shape=(4,), support=self.support)

    def full(self, x):
        pyro.param("weights", self.weights)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.ebm(), obs=x)

    def evaluate(self, model, *args):
        loss = self.objective.differentiable_loss(model, lambda *_: None, *(args or (self.data,)))
        return loss.item(), torch.autograd.grad(loss, self.weights)[0]

    def check(self, loss, grads):
        assert loss == pytest.approx(self.loss, abs=1e-10)
        torch.testing.assert_close(grads, self.grads, rtol=0, atol=1e-10)


def bits(num):
    return constraints.boolean, states(2, 4)[torch.randperm(16)[:num]]


def categories(num):
    return constraints.integer_interval(0, 2), states(3, 4)[torch.randperm(81)[:num]]


def columns(num):
    support = constraints.cat(
        [constraints.boolean, constraints.positive, constraints.integer_interval(0, 2)],
        dim=-1,
        lengths=[1, 2, 1],
    )
    x = torch.cat([torch.bernoulli(torch.full((num, 1), 0.5)), torch.rand(num, 2) + 0.1,
                   torch.randint(3, (num, 1)).double()], -1)  # fmt: skip
    return support, x


SETUPS = {
    "flips": (bits, BernoulliFlips(0.3)),
    "flip": (categories, SiteFlip()),
    "mask": (categories, MaskedSite()),
    "absorbing": (categories, HeatKernel("absorbing", (0.2, 2.0))),
    "columns": (columns, MixedColumns(GaussianNoise(0.3), MaskedSite())),
}


@pytest.fixture(params=SETUPS)
def setup(request, attach):
    return Setup(*SETUPS[request.param], attach)


def test_formula_by_hand(setup):
    """One row at a time: log of c (w + sum e^(U(x) - U(x'))) / M, with Jacobians."""
    is_table = isinstance(setup.support, constraints.cat)

    def potential(z):
        if not is_table:
            return setup.energy(z)
        x = torch.stack([z[2], z[0].exp(), z[1].exp(), z[3]])  # log scale first in points
        return setup.energy(x) - z[0] - z[1]

    total = torch.zeros(())
    for i, x in enumerate(setup.data):
        z = torch.stack([x[1].log(), x[2].log(), x[0], x[3]]) if is_table else x
        ratios = [torch.exp(potential(z) - potential(y[i])) for y in setup.whole.points]
        log_mass = setup.whole.log_mass
        c = 1.0 if log_mass is None else torch.exp(log_mass[i])
        total = total + torch.log(c * (1 + sum(ratios)) / 3)
    setup.check(total.item(), torch.autograd.grad(total, setup.weights)[0])


@pytest.mark.parametrize("size", [1, 2])
def test_mean_over_all_subsamples(setup, size):
    def model(x, rows):
        pyro.param("weights", setup.weights)
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", setup.ebm(), obs=x[rows])

    runs = [
        setup.evaluate(model, setup.data, torch.tensor(rows))
        for rows in itertools.combinations(range(NUM_ROWS), size)
    ]
    losses, grads = zip(*runs, strict=True)
    setup.check(sum(losses) / len(losses), torch.stack(grads).mean(0))


@pytest.mark.parametrize("padding", [float("nan"), 7.0])
def test_masked_padding(setup, padding):
    x = torch.cat([setup.data, torch.full((4, 4), padding)])[torch.randperm(10)]
    mask = x[:, 0].isfinite() & (x[:, 0] != padding)

    def model(x):
        pyro.param("weights", setup.weights)
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", setup.ebm(), obs=x)

    setup.check(*setup.evaluate(model, x))


def test_nested_plates(setup):
    def model(x):
        pyro.param("weights", setup.weights)
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("x", setup.ebm(), obs=x)

    setup.check(*setup.evaluate(model, setup.data.reshape(2, 3, 4)))


def test_two_half_sites(setup):
    def model(x):
        pyro.param("weights", setup.weights)
        for site, part in {"left": x[:3], "right": x[3:]}.items():
            with pyro.plate(f"rows of {site}", 3):
                pyro.sample(site, setup.ebm(), obs=part)

    setup.check(*setup.evaluate(model))


def test_to_event(setup):
    def model(x):
        pyro.param("weights", setup.weights)
        pyro.sample("x", setup.ebm().expand([len(x)]).to_event(1), obs=x)

    setup.check(*setup.evaluate(model))


def test_particles(setup):
    setup.objective.num_particles = 3
    setup.objective.vectorize_particles = True
    setup.objective.max_plate_nesting = 2
    setup.check(*setup.evaluate(setup.full))


def test_elbo_module_and_fit(setup):
    loss = setup.objective(setup.full, lambda *_: None)(setup.data)
    setup.check(loss.item(), torch.autograd.grad(loss, setup.weights)[0])
    before = setup.weights.detach().clone()
    options = {"optim": torch.optim.SGD, "lr": 0.5, "num_steps": 1, "disable_progbar": True}
    fit(setup.full, setup.data, setup.objective, **options)
    moved = (before - pyro.param("weights").detach()) / 0.5 * NUM_ROWS
    torch.testing.assert_close(moved, setup.grads, rtol=0, atol=1e-10)


def test_one_call_of_the_energy():
    calls = []

    def energy(x):
        calls.append(x.shape)
        return x.sum(-1)

    p = EnergyDistribution(energy, event_shape=(4,), support=constraints.boolean)
    x = states(2, 4)
    objective = make(BernoulliFlips(), 5)
    objective.per_datum(p, x, objective.draw(p, x, None), NO_C)
    assert calls == [(6, 16, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_base_and_dtype(dtype):
    """U includes the base, whose categories are integers; the loss is in the energy's dtype."""
    base = dist.Categorical(torch.tensor([0.2, 0.3, 0.5], dtype=dtype))
    p = EnergyDistribution(lambda x: 0.1 * x.to(dtype), base=base)
    x = torch.tensor([0, 1, 2, 2])
    objective = make(MaskedSite(), 4)
    contrast = objective.draw(p, x, None)
    rows = objective.per_datum(p, x, contrast, NO_C)
    points = contrast.points
    u = -base.log_prob(points) + 0.1 * points
    here = -base.log_prob(x) + 0.1 * x
    want = math.log(3) + torch.log((1 + torch.exp(here - u).sum(0)) / 4)
    torch.testing.assert_close(rows.double(), want.double(), rtol=0, atol=1e-6)


# --- what is refused, and what is said


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"methods there, back and log_mass.*got 0.1"):
        DiscreteEnergyDiscrepancy(0.1)
    with pytest.raises(TypeError, match="perturbation must be an object"):
        DiscreteEnergyDiscrepancy(BernoulliFlips)
    with pytest.raises(ValueError, match="num_negatives and stabilization must be positive"):
        DiscreteEnergyDiscrepancy(BernoulliFlips(), 0)
    with pytest.warns(SurrogateWarning, match="DiscreteEnergyDiscrepancy is biased .* got 0.5"):
        DiscreteEnergyDiscrepancy(BernoulliFlips(), stabilization=0.5)


def test_a_contrast_in_the_guide_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: x, event_shape=(), support=constraints.boolean)
            pyro.sample("x", ebm, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match="takes its perturbation as an argument"):
        make(BernoulliFlips()).differentiable_loss(model, guide, torch.zeros(3))


def test_a_sphere_and_a_table_of_matrices_are_refused():
    on_sphere = EnergyDistribution(lambda x: x.sum(-1), event_shape=(3,), support=sphere)
    with pytest.raises(NotImplementedError, match="perturbs discrete sites"):
        make(SiteFlip()).draw(on_sphere, torch.tensor([[1.0, 0.0, 0.0]]), None)
    both = constraints.cat([constraints.real, constraints.boolean], dim=-1, lengths=[1, 1])
    p = EnergyDistribution(
        lambda x: x.sum((-1, -2)), event_shape=(2, 2), support=constraints.independent(both, 1)
    )
    with pytest.raises(NotImplementedError, match="columns of vectors"):
        make(SiteFlip()).draw(p, torch.zeros(3, 2, 2), None)
