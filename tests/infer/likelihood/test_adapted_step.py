"""The step that chains take when no kernel was given: it follows the data and the acceptance."""

from __future__ import annotations

import io
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from one_site import loss_per_datum as loss_of
from torch import nn
from torch.autograd.functional import hessian
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.likelihood.adapted_step import AdaptedStep, ScaledMALA
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.training.fit import fit
from pyro_ebm.mcmc import MALA
from pyro_ebm.testing import assert_mean_close

QUIET = {"disable_progbar": True}
NUM_ROWS = 2000


# --- what is learned, whatever the units


def standard(scale, place, log_width):
    """N(place, width) in units of ``scale``; its base would be Lebesgue."""
    return EnergyDistribution(
        lambda x: 0.5 * ((x / scale - place) * torch.exp(-log_width)) ** 2, event_shape=()
    )


def descended(objective, scale, x, num_steps=40):
    """Gradient descent from (0, .7) on both parameters; the mean of the second half."""
    theta, total = torch.tensor([0.0, 0.7]), torch.zeros(2)
    for i in range(num_steps):
        at = theta.clone().requires_grad_()
        loss = loss_of(objective, standard(scale, *at), x)
        theta = theta - 0.4 * torch.autograd.grad(loss, at)[0]
        total += theta if i >= num_steps // 2 else 0.0
    return total / (num_steps - num_steps // 2)


OBJECTIVES = {
    "cd": partial(ContrastiveDivergence, 3),
    "pcd": partial(PersistentContrastiveDivergence, 3),
    "short-run": partial(ContrastiveDivergence, 4, start="base"),
}


@pytest.mark.parametrize("name", ["cd", "pcd"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_mean_and_width_of_a_gaussian(name, scale):
    """Within four standard errors of the truth, and of the likelihood's maximum by one.

    1/sqrt(n) of the mean, 1/sqrt(2n) of the log width.
    """
    pyro.set_rng_seed(5)
    x = scale * (0.5 + torch.randn(NUM_ROWS))
    found = descended(OBJECTIVES[name](), scale, x)
    stderr = torch.tensor([1.0, math.sqrt(0.5)]) / math.sqrt(NUM_ROWS)
    best = torch.stack([x.mean(), x.std()]) / scale
    best[1].log_()
    assert ((found - torch.tensor([0.5, 0.0])).abs() < 4 * stderr).all()
    assert ((found - best).abs() < stderr).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_does_not_know_the_units(name):
    """Powers of two: the same numbers, to the last bit."""
    found = []
    for scale in (1.0, 2.0**-9, 2.0**9):
        pyro.set_rng_seed(0)
        x = scale * (0.5 + torch.randn(40))
        found.append(descended(OBJECTIVES[name](), scale, x, num_steps=10))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_coordinates_of_different_width():
    """Each moves by its own width: .003 and 300 at once."""
    widths = torch.tensor([0.003, 300.0])
    p = EnergyDistribution(lambda x: 0.5 * (x / widths).square().sum(-1), event_shape=(2,))
    x = widths * torch.randn(4000, 2)
    objective = ContrastiveDivergence(3)
    points = objective.draw(p, x, None).points[0] / widths
    moved = (points - x / widths).square().mean(0).sqrt()
    assert (moved > 0.5).all()
    for column in points.T:
        assert_mean_close(column, torch.tensor(0.0))
        assert_mean_close(column.square(), torch.tensor(1.0))


# --- the rule


def test_the_acceptance_comes_to_what_was_wanted():
    """Two coordinates of correlation .995: the widths alone would let half of the steps fail."""
    factor = torch.tensor([[1.0, 0.0], [0.995, math.sqrt(1 - 0.995**2)]])
    law = dist.MultivariateNormal(torch.zeros(2), scale_tril=factor)
    p = EnergyDistribution(lambda x: -law.log_prob(x), event_shape=(2,))
    objective, rates = ContrastiveDivergence(2), []
    for _ in range(50):
        loss_of(objective, p, law.sample((500,)))
        rates.append(float(objective.diagnostics["x"]["acceptance"]))
    assert rates[0] < 0.4
    assert sum(rates[-20:]) / 20 == pytest.approx(0.574, abs=0.03)


def test_a_flat_energy_does_not_lengthen_steps_beyond_the_data():
    p = EnergyDistribution(lambda x: 0.0 * x, event_shape=())
    objective = ContrastiveDivergence(1)
    for _ in range(30):
        objective.draw(p, 50.0 * torch.randn(100), None)
    step = objective.steps[""]
    assert step.share == 1.0
    assert step.num_updates == 30
    assert float(step.lengths) == pytest.approx(50.0, rel=0.1)


def test_gains_go_to_zero():
    """log share falls by .574 (1 + 2^-.6 + 3^-.6) if nothing is accepted."""
    step = AdaptedStep()
    for _ in range(3):
        step.adapt(torch.zeros(4))
    fall = 0.574 * sum(t**-0.6 for t in (1, 2, 3))
    assert math.log(step.share) == pytest.approx(math.log(0.5) - fall, abs=1e-12)


def test_moments_over_batches_are_those_of_all_rows():
    p = EnergyDistribution(
        lambda x: x.log().square().sum(-1), event_shape=(3,), support=constraints.positive
    )
    x, step = torch.rand(60, 3) + 0.1, AdaptedStep()
    for part in x.split([1, 9, 50]):
        step.see(p, part)
    torch.testing.assert_close(step.mean, x.log().mean(0))
    torch.testing.assert_close(step.lengths, x.log().std(0))


def test_coordinates_that_do_not_vary_and_rows_on_the_border():
    """A constant coordinate moves as the others do; coordinates at infinity do not count."""
    p = EnergyDistribution(lambda x: x.sum(-1), event_shape=(2,), support=constraints.positive)
    step = AdaptedStep()
    step.see(p, torch.zeros(3, 2))
    assert torch.equal(step.kernel(p).lengths, torch.ones(2))
    step.see(p, torch.stack([torch.exp(torch.tensor([1.0, 3.0, 0.0])), torch.ones(3)], -1))
    step.see(p, torch.tensor([[0.0, 1.0]]))
    assert step.num_rows == 3
    torch.testing.assert_close(step.lengths, torch.tensor([1.0, 3.0, 0.0]).std().expand(2))


def test_lengths_are_the_metric():
    """The steps are those on coordinates divided by the lengths."""
    lengths = torch.tensor([0.5, 3.0])
    wide = EnergyDistribution(lambda x: 0.5 * (x / lengths).square().sum(-1), event_shape=(2,))
    unit = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), event_shape=(2,))
    x, ends = torch.randn(30, 2), []
    for p, widths, start in ((wide, lengths, x * lengths), (unit, torch.ones(2), x)):
        kernel = partial(ScaledMALA, share=torch.tensor(0.9), lengths=widths)
        pyro.set_rng_seed(1)
        ends.append(ContrastiveDivergence(2, kernel=kernel).draw(p, start, None).points[0])
    torch.testing.assert_close(ends[0] / lengths, ends[1], rtol=0, atol=1e-12)


# --- steps that are shorter


def test_three_steps_of_ten_are_shorter():
    """Eight steps of a random walk, as every one is accepted: 8 r^2 of the full length's square.

    E r^2 = .7 + .3 (1 - 64^-2) / (2 log 64) = .736. The square's standard deviation is about 1.5 of
    it, so that of 10 000 chains 1.5%: full steps alone, 36% more, are noticed, and lengths that
    shrink from step to step.
    """
    p = EnergyDistribution(lambda x: 0.0 * x, event_shape=())
    kernel = partial(ScaledMALA, share=torch.tensor(0.5), lengths=torch.tensor([3.0]))
    x = torch.zeros(10_000)
    ends = ContrastiveDivergence(8, kernel=kernel).draw(p, x, None).points
    squares = ends.square() / (8 * 1.5**2)
    expected = 0.7 + 0.3 * (1 - 64**-2) / (2 * math.log(64))
    assert_mean_close(squares.flatten(), torch.tensor(expected))


def test_no_chain_stays_where_the_energy_is_steep():
    """A half-normal law in log x, at x = 5: a full step goes to log x = -30 and cannot come back.

    Steps below .18 of it are stable, 17% of all: in 200 steps none of a thousand chains stays.
    """
    p = EnergyDistribution(lambda x: 2 * x**2, event_shape=(), support=constraints.positive)
    kernel = partial(ScaledMALA, share=torch.tensor(1.0), lengths=torch.tensor([0.8]))
    objective = ContrastiveDivergence(200, kernel=kernel)
    ends = objective.draw(p, torch.full((1000,), 5.0), None).points
    assert (ends < 3.0).all()


def test_a_law_with_a_tail_that_is_short_in_the_coordinates():
    """A normal law cut off at zero, in the logarithm: within half a standard error of the MLE.

    Chains at the outer starts cannot take a full step: by full steps alone the estimate is 2.7 and
    4.7 standard errors off. The Monte Carlo error is about a tenth (six seeds: at most 0.2).
    """
    pyro.set_rng_seed(0)
    u = torch.distributions.Uniform(0.354, 1.0).sample((1000,))  # 0.354 = Phi(-0.3 / 0.8)
    x = 0.3 + 0.8 * torch.distributions.Normal(0.0, 1.0).icdf(u)
    best, stderr = cut_off_mle(x)
    theta = nn.Parameter(torch.zeros(2))

    def model(x):
        pyro.module("theta", nn.ParameterList([theta]))
        energy = lambda v: 0.5 * theta[1].exp() * (v - theta[0]) ** 2  # noqa: E731
        p = EnergyDistribution(energy, event_shape=(), support=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", p, obs=x)

    objective = PersistentContrastiveDivergence(3)
    schedule = partial(CosineAnnealingLR, T_max=300)
    fit(model, x, objective, lr=0.05, num_steps=300, lr_schedule=schedule, **QUIET)
    assert ((theta.detach() - best).abs() < 0.5 * stderr).all()


def cut_off_mle(x):
    """Location and log precision of a normal law cut off at zero, and their standard errors."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def loss(t):
        root = (0.5 * t[1]).exp()
        log_prob = normal.log_prob(root * (x - t[0])) + 0.5 * t[1]
        return (normal.cdf(root * t[0]).log() - log_prob).sum()

    at = torch.zeros(2)
    for _ in range(20):
        curvature = hessian(loss, at)
        at = at - torch.linalg.solve(curvature, torch.func.grad(loss)(at))
    return at, torch.linalg.inv(curvature).diag().sqrt()


# --- starts


@pytest.mark.parametrize("support", [constraints.real, constraints.positive])
def test_starts_without_a_base_are_as_wide_as_the_data(support):
    """Uniform within two widths of the mean: standard deviation 2/sqrt(3) = 1.155 widths."""
    p = EnergyDistribution(lambda x: 0.0 * x, event_shape=(), support=support)
    u = 5.0 + 0.2 * torch.randn(4000)
    x = u if support is constraints.real else u.exp()
    points = ContrastiveDivergence(start="base").fresh(p, x, None, 2)
    z = ((points if support is constraints.real else points.log()) - 5.0) / 0.2
    assert z.abs().max() < 2.2
    assert float(z.std()) == pytest.approx(2 / math.sqrt(3), rel=0.05)


# --- who adapts, and what is saved


def test_evaluation_adapts_nothing():
    p, objective = standard(1.0, torch.tensor(0.0), torch.tensor(0.0)), ContrastiveDivergence(2)
    with torch.no_grad():
        loss_of(objective, p, 9.0 * torch.randn(20))
    assert not objective.steps
    loss_of(objective, p, torch.randn(20))
    before = dict(vars(objective.steps["x"]))
    with torch.no_grad():
        loss_of(objective, p, 9.0 * torch.randn(20))
    after = vars(objective.steps["x"])
    assert (after["num_updates"], after["num_rows"]) == (1, 20)
    assert after["share"] == before["share"]


def test_a_kernel_that_was_given_keeps_its_step():
    p = standard(1.0, torch.tensor(0.0), torch.tensor(0.0))
    objective = ContrastiveDivergence(2, kernel=partial(MALA, step_size=0.3))
    loss_of(objective, p, torch.randn(20))
    assert not objective.steps
    assert "step_size" not in objective.diagnostics["x"]


def test_state_is_saved_with_the_objective():
    p, x = standard(1.0, torch.tensor(0.0), torch.tensor(0.3)), torch.randn(20)
    first = ContrastiveDivergence(2)
    for _ in range(3):
        loss_of(first, p, x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = ContrastiveDivergence(2)
    second.load_state_dict(torch.load(file, weights_only=True))
    values = []
    for objective in (first, second):
        pyro.set_rng_seed(3)
        values.append(loss_of(objective, p, x))
    assert torch.equal(*values)
    assert first.steps["x"].share == second.steps["x"].share


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resumed_fit_is_bit_equal(name, tmp_path):
    """The step goes on from where it was, and so do the windows that are watched."""
    data = 30.0 * torch.randn(22)

    def run(steps, seed, path):
        pyro.clear_param_store()
        objective = OBJECTIVES[name]()

        def model(x):
            theta = pyro.param("theta", torch.tensor([0.0, 0.7]))
            with pyro.plate("data", len(x)):
                pyro.sample("x", standard(30.0, *theta), obs=x)

        options = {"batch_size": 5, "lr": 0.05, "checkpoint": path, "seed": seed, **QUIET}
        return fit(model, data, objective, num_steps=steps, **options), objective

    whole, objective = run(13, 0, None)
    run(6, 0, tmp_path / "fit.pt")
    resumed, same = run(13, 99, tmp_path / "fit.pt")
    assert whole.losses == resumed.losses
    assert whole.diagnostics == resumed.diagnostics
    assert objective.steps["x"].share == same.steps["x"].share
    assert objective.watches["x"] == same.watches["x"]
