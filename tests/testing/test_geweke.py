"""Kernels keep the joint law of parameters and data; planted bugs do not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import (
    BUGS,
    WithoutJacobian,
    WrongSign,
    conjugate,
    lattice,
    mixture,
    precisions,
)

from pyro_ebm.mcmc import HMC, NUTS, Exchange, RandomWalk
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.testing.geweke import _SHIFT, _WIDTH, _Comparison, geweke_test
from pyro_ebm.testing.simulator import Simulator

QUICK = {"num_chains": 300, "num_steps": 60, "warmup_steps": 50, "num_prior_draws": 2000}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def test_hmc_keeps_the_joint_law():
    """A drift of .4 sd would be seen; a quantity of the data is looked at as well."""
    asked = {"mean": lambda parameters, data: data["x"].mean()}
    result = geweke_test(conjugate, ["x"], HMC, quantities=asked, **QUICK)
    result.check()
    assert sorted(result.moments) == ["m", "mean"]
    assert result.share_moved > 0.5
    assert 6.2816 * result.moments["m"].location_stderr / 0.2821 < 0.4


def test_exchange_keeps_the_joint_law():
    result = geweke_test(precisions, ["x"], Exchange, **QUICK)
    result.check()
    assert "Exchange: 300 chains of 60 steps" in str(result)


def test_what_is_summed_out_is_drawn_anew():
    """m alone is moved, by its posterior without the latents. A drift of .4 sd would be seen."""
    few = QUICK | {"num_chains": 150, "num_steps": 30, "warmup_steps": 30}
    result = geweke_test(mixture, ["x"], RandomWalk, **few)
    result.check()
    assert list(result.moments) == ["m"]
    assert 6.2816 * result.moments["m"].location_stderr / 0.2821 < 0.4


def test_a_missing_jacobian_is_seen():
    with pytest.raises(AssertionError, match="does not keep the joint law"):
        geweke_test(precisions, ["x"], WithoutJacobian, **QUICK).check()


def too_high(each):
    """Takes data for .5 more than they are."""

    def moved():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.Normal(m - 0.5, 1.0))

    shifted = EachChain(moved, each.data)
    shifted.data = each.data  # goes on reading what the test writes
    return HMC(shifted)


def test_a_posterior_that_lies_too_high_is_named():
    """m given data that are .5 higher moves up at every step, towards 2.5 prior sds."""
    result = geweke_test(conjugate, ["x"], too_high, **QUICK)
    assert result.moments["m"].location > 20
    with pytest.raises(AssertionError, match="m: location z [0-9]"):
        result.check()


def test_the_spread_is_seen_alone():
    """A kernel that draws from N(0, 2^2), whatever the data: wide, not shifted."""

    class Wide(RandomWalk):
        def step(self, potential, state):
            new, info = super().step(potential, state)
            return type(state)(
                2.0 * torch.randn_like(new.position), new.potential, new.gradient, new.tuning
            ), info

    moments = geweke_test(conjugate, ["x"], Wide, **QUICK).moments["m"]
    assert moments.spread > 20
    assert abs(moments.location) < 5


def test_z_scores_of_independent_draws():
    """Few draws of the model: their error counts as much as that of the chains.

    The mean square of 400 z-scores is 1 within .07; without the model's own error it would be 2.
    """
    simulator, z = Simulator(conjugate, ["x"]), []
    for _ in range(400):
        against = _Comparison(simulator, {}, 100)
        against.add({"m": torch.randn(100)}, {})
        z.append(against.moments()["m"][:2])
    z = torch.tensor(z)
    assert bool((z.mean(0).abs() * 400**0.5 < 5).all())
    assert bool(((z.square().mean(0) - 1.0).abs() < 5 * 2**0.5 / 20).all())


def test_shifts_and_widths_have_the_stated_sizes():
    """N(.1, 1) and N(0, 1.1^2) against N(0, 1): z-scores are the stated slopes over the errors."""
    against = _Comparison(Simulator(conjugate, ["x"]), {}, 20_000)
    for shift, width in ((0.1, 1.0), (0.0, 1.1)):
        against._sums, against._count = {}, 0
        against.add({"m": shift + width * torch.randn(20_000)}, {})
        found = against.moments()["m"]
        location = shift * _SHIFT / found.location_stderr
        spread = (width - 1.0) * _WIDTH / found.spread_stderr
        assert abs(found.location - location) < 5
        assert abs(found.spread - spread) < 5
        assert location + spread > 6


def test_a_kernel_that_stands_still_has_not_been_tested():
    result = geweke_test(
        conjugate,
        ["x"],
        lambda each: RandomWalk(each, step_size=1e6, adapt_step_size=False),
        **QUICK,
    )
    with pytest.raises(AssertionError, match="nothing was tested"):
        result.check()


@pytest.mark.slow
def test_nuts_over_a_thousand_steps():
    geweke_test(conjugate, ["x"], NUTS).check()


@pytest.mark.slow
def test_exchange_over_a_thousand_steps():
    result = geweke_test(precisions, ["x"], Exchange)
    result.check()
    assert 6.2816 * result.moments["precision"].location_stderr / 0.2821 < 0.12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the density is NaN")  # where bugs lead to
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_are_dozens_of_standard_errors_off(bug):
    result = geweke_test(precisions, ["x"], bug)
    assert result.moments["precision"].worst > 30


@pytest.mark.slow
def test_exchange_on_a_lattice():
    geweke_test(lattice, ["x"], Exchange, num_steps=400).check()


@pytest.mark.slow
@pytest.mark.parametrize("bug", [WithoutJacobian, WrongSign])
def test_bugs_on_a_lattice(bug):
    result = geweke_test(lattice, ["x"], bug, num_steps=200)
    with pytest.raises(AssertionError, match="coupling"):
        result.check()
