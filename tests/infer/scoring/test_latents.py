"""Latents behind the energy of data: which losses weigh them against their priors as data do."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    KALE,
    NCE,
    ConditionalNCE,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    DonskerVaradhan,
    EnergyDiscrepancy,
    PersistentContrastiveDivergence,
    PerSite,
    RankingNCE,
    ScoreMatching,
    SelfNormalized,
    fit,
)
from pyro_ebm.poutine import surrogate

WIDE = dist.Normal(torch.zeros((), dtype=torch.float64), 2.0)
NO_LIKELIHOOD = "depends on latent 'a', and {} as it was made is no likelihood"
OTHERS = {
    "score": ScoreMatching,
    "denoising": lambda: DenoisingScoreMatching(0.1),
    "ed": EnergyDiscrepancy,
    "conditional nce": ConditionalNCE,
    "ranking, few": lambda: RankingNCE(2, WIDE),
    "cd, short": ContrastiveDivergence,
}
LIKELIHOODS = {
    "ranking": lambda: RankingNCE(10, WIDE),
    "cd": lambda: ContrastiveDivergence(10),
    "dv": DonskerVaradhan,
}
OF_POINTS = {  # one log Z, or chains of one law: latents that are drawn are refused
    "nce": lambda: NCE(10, WIDE),
    "kale": KALE,
    "snl": lambda: SelfNormalized(10, WIDE),
    "pcd": lambda: PersistentContrastiveDivergence(1),
}


def model(x, base=WIDE):
    a = pyro.sample("a", dist.Gamma(50.0, 50.0))
    with pyro.plate("rows", len(x)):
        law = EnergyDistribution(lambda v: 0.5 * a * v**2, base, conditional=False)
        pyro.sample("x", law, obs=x)


def step(objective, guide, of=model):
    objective.differentiable_loss(of, guide, torch.randn(40))


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoDelta])
@pytest.mark.parametrize("name", OTHERS)
def test_losses_that_are_no_likelihoods_say_so_once(name, make_guide):
    objective, guide = OTHERS[name](), make_guide(surrogate(model, RankingNCE()))
    with pytest.warns(SurrogateWarning, match=NO_LIKELIHOOD.format(type(objective).__name__)):
        step(objective, guide)
    for _ in range(2):
        step(objective, guide)


@pytest.mark.parametrize("name", [*LIKELIHOODS, *OF_POINTS])
def test_those_that_tend_to_one_say_nothing(name):
    make = (LIKELIHOODS | OF_POINTS)[name]
    guides = (AutoNormal, AutoDelta) if name in LIKELIHOODS else (AutoDelta,)
    for make_guide in guides:
        step(make(), make_guide(surrogate(model, RankingNCE())))


def test_parameters_have_no_prior():
    def of(x):
        a = pyro.param("a", torch.tensor(1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))  # of other data
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(lambda v: 0.5 * a * v**2, WIDE), obs=x)
            pyro.sample("y", dist.Normal(b, 1.0), obs=x)

    step(ScoreMatching(), AutoNormal(surrogate(of, RankingNCE())), of)


def test_the_objective_of_the_site_is_named():
    objective = PerSite({"x": ScoreMatching()})
    with pytest.warns(SurrogateWarning, match=NO_LIKELIHOOD.format("ScoreMatching")):
        step(objective, AutoDelta(surrogate(model, RankingNCE())))


@pytest.mark.parametrize("name", ["score", "cd"])
def test_point_estimates_under_a_prior(name):
    r"""U = a x^2 / 2 under Gamma(50, 50), 40 rows with S = \sum x^2.

    By Bayes' rule a = (49 + 20) / (50 + S / 2); score matching, \sum a^2 x^2 / 2 - a, minimizes
    S a^2 / 2 + 10 a - 49 log a. CD with 2000 chains errs by less than .02.
    """
    x = torch.randn(40)
    x = x * (40 / 2.2 / x.square().sum()).sqrt()
    total = float(x.square().sum())
    exact = (49 + 20) / (50 + total / 2)
    by_score = (-10 + (100 + 4 * total * 49) ** 0.5) / (2 * total)
    objective = ScoreMatching() if name == "score" else ContrastiveDivergence(10, num_negatives=50)
    pyro.set_rng_seed(3)

    def flat(x):
        a = pyro.sample("a", dist.Gamma(50.0, 50.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(lambda v: 0.5 * a * v**2, event_shape=()), obs=x)

    guide = AutoDelta(surrogate(flat, RankingNCE(1, WIDE)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurrogateWarning)
        fit(flat, x, objective, guide=guide, lr=0.02, num_steps=200, disable_progbar=True)
    assert abs(by_score - exact) > 0.2
    want = by_score if name == "score" else exact
    assert abs(float(guide.median()["a"]) - want) < 0.02
