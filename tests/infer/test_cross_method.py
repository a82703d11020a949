"""One well-specified Gaussian, every consistent estimator: all agree with the truth and with each
other.

Each estimate is the minimizer of an objective with its draws frozen, found by Newton's method; or,
where draws follow the parameters, the root of an estimating equation with its random numbers frozen
(:mod:`estimating_equations`). Influence functions give the standard error of every estimate, and of
every difference of two, which share the data.

Two of them learn another law than that of the data, known in closed form, and are carried back:
denoising score matching the law blurred by its noise; contrastive divergence with Langevin steps
that are never rejected the law *for* which those steps keep that of the data, however many they
are. With kernels that keep p contrastive divergence has no bias here even at one step: where the
data's law is p the chain's is too.
"""

from __future__ import annotations

import math
import warnings
from functools import cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from estimates import Estimates, carried, disagreements, frozen, largest_z, minimize
from estimating_equations import equation, persistent, root
from gaussian_case import (
    NUM_ROWS,
    TRUTH,
    WAYMARK,
    aimed_at,
    blurred,
    by_bridges,
    by_game,
    by_pairs,
    data,
    ebm,
    exact_draws,
    exact_log_z,
    left_invariant,
    likelihood,
    recovered,
    start,
    total,
    true_bridges,
)

from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    KALE,
    NCE,
    ConditionalNCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    DonskerVaradhan,
    EnergyDiscrepancy,
    FlowContrastive,
    KernelStein,
    PersistentContrastiveDivergence,
    RankingNCE,
    RecoveryLikelihood,
    ScoreMatching,
    SelfNormalized,
    SlicedScoreMatching,
    TelescopingNCE,
)
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.mcmc import MALA, ULA

NOISE_STD = 0.7
STEP_SIZE = 0.6
OTHER_NOISE = dist.Normal(0.3 * torch.ones(2, dtype=torch.float64), 1.9).to_event(1)
NUM_PAIRED = 500


def by_loss(objective, x):
    rows = likelihood(x) if objective is None else frozen(objective, ebm, TRUTH, x)
    return minimize(rows, start(objective), len(TRUTH), NUM_ROWS)


def by_equation(objective, x):
    return root(equation(objective, ebm, x), TRUTH.clone())


def by_chains_that_go_on(objective, x):
    return persistent(objective, ebm, TRUTH + 0.1, x, num_averaged=20)


def by_blurred_law(objective, x):
    truth = blurred(TRUTH, NOISE_STD)
    found = minimize(frozen(objective, ebm, truth, x), truth, len(TRUTH), NUM_ROWS)
    return carried(partial(blurred, noise_std=-NOISE_STD), *found)


def by_rejecting_nothing(objective, x):
    found = root(equation(objective, ebm, x), aimed_at(TRUTH, STEP_SIZE))
    return carried(partial(left_invariant, step_size=STEP_SIZE), *found)


@cache
def bridges():
    return by_bridges(TelescopingNCE(2, waymarks=(WAYMARK, 1.0)), data())


@cache
def equilibrium():
    return by_game(FlowContrastive(), data())


def langevin(num_steps):
    kernel = partial(ULA, step_size=STEP_SIZE)
    return lambda: ContrastiveDivergence(num_steps, kernel=kernel)


OBJECTIVES = {
    "likelihood": (lambda: None, by_loss),
    "nce": (lambda: NCE(num_noise=3), by_loss),
    "ranking": (lambda: RankingNCE(num_noise=3), by_loss),
    "conditional nce": (lambda: ConditionalNCE(num_noise=3), by_loss),
    "telescoping nce": (
        lambda: TelescopingNCE(2, waymarks=(WAYMARK, 1.0)),
        lambda *_: carried(total, *bridges()),
    ),
    "flow contrastive": (FlowContrastive, lambda *_: equilibrium()[0]),
    "its flow": (FlowContrastive, lambda *_: equilibrium()[1]),
    "kale": (lambda: KALE(num_base=4 * NUM_ROWS), by_loss),
    "self-normalized": (lambda: SelfNormalized(num_noise=4, noise=OTHER_NOISE), by_loss),
    "ed": (lambda: EnergyDiscrepancy(time=1.0, num_negatives=4), by_loss),
    "recovery": (lambda: RecoveryLikelihood(1.0, sampler=recovered), by_equation),
    "score matching": (ScoreMatching, by_loss),
    "sliced score matching": (SlicedScoreMatching, by_loss),
    "denoising": (lambda: DenoisingScoreMatching(NOISE_STD, num_noise=2), by_blurred_law),
    "kernel stein": (KernelStein, partial(by_pairs, num_rows=NUM_PAIRED)),
    "cd, exact": (lambda: ContrastiveDivergence(transition=exact_draws), by_equation),
    "cd-2, mala": (
        lambda: ContrastiveDivergence(2, kernel=partial(MALA, step_size=0.9)),
        by_equation,
    ),
    "cd-1, langevin": (langevin(1), by_rejecting_nothing),
    "cd-4, langevin": (langevin(4), by_rejecting_nothing),
    "pcd, mala": (
        lambda: PersistentContrastiveDivergence(1, kernel=partial(MALA, step_size=0.9)),
        by_chains_that_go_on,
    ),
}
MAX_ERROR = {"kernel stein": 0.2, "cd-1, langevin": 0.08}


def estimate(make, solve, x):
    pyro.set_rng_seed(21)
    return solve(make(), x)


@pytest.fixture(scope="module")
def estimates():
    return Estimates(estimate, OBJECTIVES, data)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_estimate_is_the_truth(name, estimates):
    """Within four standard errors, none of which exceeds 0.03 but where few rows are used."""
    theta, influence = estimates[name]
    assert largest_z(theta - TRUTH, influence) < 4
    assert influence.std(0).max() / math.sqrt(NUM_ROWS) < MAX_ERROR.get(name, 0.03)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_estimates_agree(name, estimates):
    """With all others, within four standard errors of the difference."""
    assert not disagreements(name, estimates)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "likelihood"])
def test_none_is_more_precise_than_the_likelihood(name, estimates):
    best = estimates["likelihood"][1].var(0)
    assert (estimates[name][1].var(0) > 0.97 * best).all()


def test_score_matching_is_the_likelihood_on_gaussians(estimates):
    """Hyvarinen (2005): both are solved by the sample's mean and covariance, row for row."""
    for one, other in zip(estimates["likelihood"], estimates["score matching"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_every_bridge_is_the_truth():
    """Telescoping: the law of the waymark, and log Z, are known too, to four standard errors."""
    theta, influence = bridges()
    assert largest_z(theta - true_bridges(), influence) < 4
    log_z = carried(lambda t: (t[-1] + t[-2])[None], theta, influence)
    assert largest_z(log_z[0] - exact_log_z(TRUTH), log_z[1]) < 4


# --- what is known not to be the truth


def test_langevin_steps_without_rejection_learn_another_law(estimates):
    """The law for which they keep that of the data is far from that of the data."""
    aim = partial(aimed_at, step_size=STEP_SIZE)
    theta, influence = carried(aim, *estimates["cd-4, langevin"])
    assert largest_z(theta - aim(TRUTH), influence) < 4
    assert largest_z(theta - TRUTH, influence) > 8


def test_denoising_learns_the_blurred_law(estimates):
    """The data's law, blurred, is far from the data's law."""
    blur = partial(blurred, noise_std=NOISE_STD)
    theta, influence = carried(blur, *estimates["denoising"])
    assert largest_z(theta - blur(TRUTH), influence) < 4
    assert largest_z(theta - TRUTH, influence) > 8


# --- bounds on log Z, on small batches

BATCH = 4


def in_batches(objective, x):
    """The rows' losses where they are taken in small batches, each with draws of its own."""
    contrast = objective.draw(ebm(TRUTH).expand([len(x)]), x, None)
    batches = x.reshape(-1, BATCH, 2), contrast.points.reshape(-1, len(x) // BATCH, BATCH, 2)

    def of_one(theta, x, points):
        p = ebm(theta).expand([BATCH])
        return objective.per_datum(p, x, Contrast(points), theta[..., -1])

    def rows(theta):
        thetas = theta.expand(len(x), -1).reshape(-1, BATCH, theta.shape[-1])
        return torch.func.vmap(of_one, in_dims=(0, 0, 1))(thetas, *batches).reshape(-1)

    return rows


def on_small_batches(objective, x):
    pyro.set_rng_seed(21)
    with pyro.validation_enabled(is_validate=False):
        return minimize(in_batches(objective, x), start(objective), 5, NUM_ROWS)


def test_small_batches_do_no_harm_to_kale(estimates):
    """Its loss is linear in the draws' mean weight: batches of four give the estimate from all."""
    theta, influence = on_small_batches(KALE(num_base=4 * NUM_ROWS), data())
    torch.testing.assert_close(theta, estimates["kale"][0], rtol=0, atol=1e-7)
    torch.testing.assert_close(influence, estimates["kale"][1], rtol=0, atol=1e-6)


def test_small_batches_harm_donsker_varadhan():
    """The log of a mean over four draws is no mean of logs: far off, as its docstring says."""
    theta, influence = on_small_batches(DonskerVaradhan(num_base=NUM_ROWS), data())
    assert largest_z(theta - TRUTH, influence) > 8


def test_donsker_varadhan_is_kale_at_its_best_log_z(estimates):
    """The same draws give the same estimate: one maximizes over c what the other has as its log
    mean.
    """
    theta, _ = estimate(lambda: DonskerVaradhan(num_base=4 * NUM_ROWS), by_loss, data())
    torch.testing.assert_close(theta, estimates["kale"][0], rtol=0, atol=1e-6)


# --- what must fail


def without_noise_density():
    ranking = RankingNCE(num_noise=3)
    inner = ranking.draw
    ranking.draw = lambda *args: inner(*args)._replace(
        log_noise=torch.zeros(3, NUM_ROWS), log_noise_data=torch.zeros(NUM_ROWS)
    )
    return ranking


def with_small_weight():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        return EnergyDiscrepancy(time=1.0, num_negatives=4, stabilization=0.3)


def from_another_law():
    """A transition that keeps a law with a fifth more precision."""

    def move(p, x):
        return exact_draws(ebm(1.2 * p.energy_function.theta), x)

    return ContrastiveDivergence(transition=move)


WRONG = {without_noise_density: by_loss, with_small_weight: by_loss, from_another_law: by_equation}


@pytest.mark.parametrize("make", WRONG)
def test_an_inconsistent_objective_is_far_off(make, estimates):
    """The same comparison rejects a wrong one by more than twice its threshold."""
    theta, influence = estimate(make, WRONG[make], data())
    assert largest_z(theta - TRUTH, influence) > 8
    mle, others = estimates["likelihood"]
    assert largest_z(theta - mle, influence - others) > 8
