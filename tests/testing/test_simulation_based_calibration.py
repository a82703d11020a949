"""Right kernels are calibrated, planted bugs are not, and power is what is stated."""

import functools
import itertools
import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import (
    BUGS,
    WrongSign,
    conjugate,
    lattice,
    log_likelihood_of_lattice,
    mixture,
    precisions,
)
from pyro import poutine

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import HMC, Exchange, RandomWalk, Sweeps
from pyro_ebm.mcmc.kernels.kernel import Kernel
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.testing.calibration_power import (
    detection_probability,
    rank_law,
    smallest_detectable,
)
from pyro_ebm.testing.simulation_based_calibration import (
    CalibrationResult,
    _effective,
    _lag,
    _ranks,
    _warmed_up,
    simulation_based_calibration,
)
from pyro_ebm.testing.simulator import Simulator, scalars
from pyro_ebm.testing.uniformity import chi_square_pvalue, shape_in_words, uniformity

QUICK = {"num_simulations": 400, "num_draws": 15, "warmup_steps": 60}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def test_many_quantities_share_the_level():
    """A right kernel fails as often with ten quantities as with one."""
    even, ranks = torch.arange(400) % 8, torch.arange(400) % 8
    ranks[:80] = torch.arange(80) % 4
    alone = CalibrationResult({"m": ranks}, 7, 1, 7.0, "HMC", has_log_likelihood=False)
    p = alone.pvalues["m"]
    assert 1e-6 < p < 0.01
    with pytest.raises(AssertionError, match="m: p "):
        alone.check(level=5 * p)
    many = replace(alone, ranks={"m": ranks, **{f"other {i}": even for i in range(9)}})
    many.check(level=5 * p)
    with pytest.raises(AssertionError, match="m: p "):
        many.check(level=11 * p)


# --- kernels


@functools.cache
def of_hmc():
    """With a quantity of two values."""
    asked = {"sign": lambda parameters, data: (parameters["m"] > 0).double()}
    return simulation_based_calibration(
        conjugate, ["x"], HMC, thinning=4, quantities=asked, **QUICK
    )


def test_hmc_is_calibrated():
    """400 simulations see an sd off by a half, and a bias of .4 sd."""
    result = of_hmc()
    result.check()
    assert sorted(result.ranks) == ["log likelihood", "m", "sign"]
    assert result.smallest_detectable().too_wide < 1.5
    assert result.smallest_detectable().bias < 0.4


def scaled(scale):
    def kernel(each):
        return HMC(EachChain(poutine.scale(conjugate, scale), each.data))

    return kernel


def shifted(each):
    return HMC(EachChain(conjugate, {"x": each.data["x"] + 0.5}))


WRONG = {
    "too narrow": (scaled(5.0), "∪ shape: the posterior is too narrow, its sd is about 0.[3-5]"),
    "too wide": (scaled(0.2), "∩ shape: it is too wide, its sd is about [12]"),
    "too high": (shifted, r"m: .*slope: the draws lie too high, by about (0.9|1|1.1) posterior sd"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_posterior_is_named(case):
    """Likelihoods counted five times, a fifth of a time, and data moved by 1.02 sd."""
    kernel, sentence = WRONG[case]
    result = simulation_based_calibration(conjugate, ["x"], kernel, thinning=4, **QUICK)
    with pytest.raises(AssertionError, match=sentence):
        result.check()


def test_exchange_is_calibrated():
    result = simulation_based_calibration(precisions, ["x"], Exchange, thinning=12, **QUICK)
    result.check()
    assert "the log likelihood was not ranked: its log Z is not known" in str(result)


@pytest.mark.filterwarnings("ignore:the density is NaN")  # a wrong sign drives chains to infinity
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_exchange_is_seen(bug):
    result = simulation_based_calibration(precisions, ["x"], bug, thinning=12, **QUICK)
    with pytest.raises(AssertionError, match=f"{bug.__name__} is not calibrated"):
        result.check()


def test_the_thinning_is_found():
    """A random walk needs some steps; far fewer are remarked on."""
    few = {"num_simulations": 100, "num_draws": 15, "warmup_steps": 60}
    found = simulation_based_calibration(conjugate, ["x"], RandomWalk, **few)
    assert 5 <= found.thinning <= 40
    assert found.effective_draws > 10
    close = simulation_based_calibration(conjugate, ["x"], RandomWalk, thinning=1, **few)
    assert close.effective_draws < 6
    assert "draws of a chain are correlated" in str(close)


class Slow(Kernel):
    """An AR(1) with coefficient .98, whose correlation falls to .05 after 148 steps."""

    needs_gradient = False

    def step(self, potential, state):
        q = 0.98 * state.position + (1 - 0.98**2) ** 0.5 * torch.randn_like(state.position)
        return replace(state, position=q, potential=potential.value(q)), {}


def test_the_pilot_run_grows_with_the_thinning():
    """A hundred steps of such chains look correlated for 20 only, by their own longest lags."""
    made = Slow(EachChain(conjugate, Simulator(conjugate, ["x"]).joint(200)[1]))
    assert 110 < _warmed_up(made, 200, 300, None)[1] < 190


def test_correlated_draws_are_inconclusive():
    """Where ranks crowd at the ends by correlation alone, the kernel is not to blame."""
    ranks = {"m": torch.arange(400) % 2 * 7}
    alone = CalibrationResult(ranks, 7, 1, 7.0, "HMC", has_log_likelihood=True)
    with pytest.raises(AssertionError, match="HMC is not calibrated"):
        alone.check()
    with pytest.raises(AssertionError, match=r"(?s)HMC: inconclusive.*set thinning="):
        replace(alone, effective_draws=4.8).check()


def test_sizes_that_last_are_seen_where_signs_forget():
    """Independent signs of a size that follows an AR(1) with coefficient .9: only squares show it.

    Squares of such an AR(1) are correlated by .81 to the power of the lag.
    """
    torch.manual_seed(0)
    size = [torch.randn(200)]
    for _ in range(199):
        size.append(0.9 * size[-1] + (1 - 0.81) ** 0.5 * torch.randn(200))
    signs = 2.0 * torch.randint(0, 2, (200, 200)) - 1.0
    draws = {"m": torch.stack(size, 1).abs() * signs}
    assert 5 <= _lag(draws) <= 40
    assert _lag({"m": torch.randn(200, 200)}) == 1


def autoregressive(coefficient, shape):
    """Draws of stationary AR(1) chains, ``shape``."""
    x = [torch.randn(shape[0])]
    for _ in range(shape[1] - 1):
        x.append(coefficient * x[-1] + (1 - coefficient**2) ** 0.5 * torch.randn(shape[0]))
    return torch.stack(x, 1)


@pytest.mark.parametrize("coefficient", [0.0, 0.5, 0.8])
def test_draws_of_a_chain_are_worth_what_an_autoregression_says(coefficient):
    """L (1 - r) / (1 + r); the coordinate that remembers longest decides, whatever its unit."""
    slow = autoregressive(coefficient, (500, 120))
    wanted = 120 * (1 - coefficient) / (1 + coefficient)
    assert _effective({"m": slow}) == pytest.approx(wanted, rel=0.15)
    quick = 1000.0 * torch.randn(500, 120, 3)
    assert _effective({"a": 0.001 * slow, "b": quick}) == pytest.approx(wanted, rel=0.15)


def test_chains_of_narrow_posteriors_count_as_much_as_those_of_wide_ones():
    """Half of the chains follow an AR(1) with .8, in the others draws are new and far apart."""
    draws = torch.cat([autoregressive(0.8, (300, 120)), 1000.0 * torch.randn(300, 120)])
    assert _effective({"m": draws}) == pytest.approx(120 * (1 - 0.4) / (1 + 0.4), rel=0.15)


def test_draws_that_come_back_are_seen_behind_those_that_do_not():
    """Chains that go to and fro between two places: next draws have nothing in common."""
    places = torch.randn(1000, 2).repeat(1, 20)
    assert _lag({"m": places + 0.1 * torch.randn(1000, 40)}) > 1


def test_ranks_of_what_never_varies_are_uniform():
    """All draws tie with the truth: every rank from none to all of them is as likely."""
    truth = {"m": torch.ones(8000)}
    ranks = _ranks(truth, {}, {"m": torch.ones(8000, 7)}, {})["m"]
    counts = torch.bincount(ranks, minlength=8)
    assert len(counts) == 8
    assert float((counts - 1000).abs().max()) < 5 * (1000 * 7 / 8) ** 0.5


def test_ties_are_added_to_what_lies_below():
    """Of seven draws two lie below, and three tie: ranks from two to five."""
    draws = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0]).expand(4000, 7)
    ranks = _ranks({"m": torch.ones(4000)}, {}, {"m": draws}, {})["m"]
    counts = torch.bincount(ranks)
    assert counts[:2].tolist() == [0, 0]
    assert float((counts[2:] - 1000).abs().max()) < 5 * (1000 * 3 / 4) ** 0.5
    assert len(counts) == 6


def test_ties_are_broken_at_random():
    """Of a quantity of two values; without it, ranks would lie at the ends or be few."""
    assert of_hmc().ranks["sign"].unique().numel() == 16


# --- simulation


def test_parameters_and_data_are_drawn_together():
    """Cov(m, mean of x) = 1 and Var(mean of x) = 1 + 1 / 5; the rows differ."""
    simulator = Simulator(conjugate, ["x"])
    parameters, data = simulator.joint(20_000)
    m, mean = parameters["m"], data["x"].mean(1)
    for values, wanted in ((m * mean, 1.0), (mean.square(), 1.2), (m.square(), 1.0)):
        assert abs(float((values.mean() - wanted) / values.std())) * 20_000**0.5 < 5
    given = simulator.data({"m": torch.linspace(-50.0, 50.0, 1000)})["x"].mean(1)
    assert float((given - torch.linspace(-50.0, 50.0, 1000)).abs().max()) < 3


def waits():
    rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0), 1.0))
    pyro.sample("x", dist.Exponential(rate))


def flips():
    rate = pyro.sample("rate", dist.Beta(torch.tensor(2.0), 1.0))
    with pyro.plate("rows", 30):
        pyro.sample("x", dist.Bernoulli(rate))


@pytest.mark.parametrize(
    ("model", "at_once", "mean"),
    [(conjugate, True, 0.0), (waits, True, 0.5), (flips, False, 2 / 3)],
)
def test_draws_have_their_law_at_once_or_one_by_one(model, at_once, mean):
    """vmap does not follow Beta. The means of 1000 draws; no two rows are alike."""
    simulator = Simulator(model, ["x"])
    parameters, data = simulator.joint(1000)
    assert simulator._at_once == {"_all": at_once}
    x = data["x"].reshape(1000, -1).mean(1)
    assert abs(float((x.mean() - mean) / x.std())) * 1000**0.5 < 5
    for value in parameters.values():
        assert value.unique().numel() == 1000
        assert abs(float(torch.corrcoef(torch.stack([value, x]))[0, 1])) > 0.2


def test_the_log_likelihood_is_that_of_the_data_sites():
    simulator = Simulator(conjugate, ["x"])
    x = torch.randn(5)
    got = simulator.log_likelihood({"m": torch.tensor(0.3)}, {"x": x})
    torch.testing.assert_close(got, dist.Normal(0.3, 1.0).log_prob(x).sum())


def of_another_share(each):
    return RandomWalk(EachChain(lambda: mixture(0.8), each.data))


@pytest.mark.parametrize(("kernel", "is_right"), [(RandomWalk, True), (of_another_share, False)])
def test_what_is_summed_out_is_not_ranked(kernel, is_right):
    """The posterior of m alone. Taking .8 for .4 moves it by more than an sd, and .7 are seen."""
    few = {"num_simulations": 150, "num_draws": 7, "warmup_steps": 40, "thinning": 12}
    result = simulation_based_calibration(mixture, ["x"], kernel, **few)
    assert list(result.ranks) == ["m"]
    assert "or latents are summed out" in str(result)
    assert result.smallest_detectable().bias < 0.7
    assert (result.pvalues["m"] > 1e-4) is is_right


def test_what_is_summed_out_is_drawn_with_the_data():
    """Var(mean of x) = 1 + (1 + 9 * .4 * .6) / 5, and given m without the first term."""
    simulator = Simulator(mixture, ["x"])
    drawn = simulator.joint(4000)[1]["x"].mean(1)
    given = simulator.data({"m": torch.zeros(4000)})["x"].mean(1)
    for mean, variance in ((drawn, 1.632), (given, 0.632)):
        assert abs(float(mean.mean()) - 1.2) < 5 * (variance / 4000) ** 0.5
        assert float(mean.var()) == pytest.approx(variance, rel=5 * (2 / 4000) ** 0.5)


def test_deterministic_sites_are_no_parameters():
    def model():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0))
        twice = pyro.deterministic("twice", 2.0 * m)
        pyro.sample("x", dist.Normal(twice, 1.0))

    assert Simulator(model, ["x"]).parameters == ("m",)


def test_scalars_have_names():
    named = scalars({"a": torch.arange(2.0), "b": torch.arange(8.0).reshape(2, 2, 2)})
    assert list(named) == ["a", "b[0,0]", "b[0,1]", "b[1,0]", "b[1,1]"]
    assert named["b[1,0]"].tolist() == [2.0, 6.0]


# --- uniformity


def test_chi_square_of_known_counts():
    """Bins of 40 and 60: the square is (10^2 + 10^2) / 50 = 4, one degree of freedom."""
    ranks = torch.cat([torch.zeros(40), torch.ones(60)]).long()
    assert uniformity(ranks, 1).chi_square == pytest.approx(math.erfc(2.0**0.5), rel=1e-9)


def test_the_ecdf_test_is_exact():
    """All 256 samples of four ranks 0..3: p is the share of samples at least as far out."""

    def binomial(k, n, p):
        return math.comb(n, k) * p**k * (1 - p) ** (n - k)

    def farthest(ranks):
        tails = []
        for step in (1, 2, 3):
            below = sum(r < step for r in ranks)
            terms = [binomial(k, 4, step / 4) for k in range(5)]
            tails.append(min(1.0, 2 * min(sum(terms[: below + 1]), sum(terms[below:]))))
        return min(tails)

    every = list(itertools.product(range(4), repeat=4))
    gammas = torch.tensor([farthest(ranks) for ranks in every])
    for ranks, gamma in zip(every[::7], gammas[::7], strict=True):
        wanted = float((gammas <= gamma * (1 + 1e-9)).double().mean())
        assert uniformity(torch.tensor(ranks), 3).ecdf == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("ratio", "bias"), [(1.4, 0.0), (0.7, 0.0), (1.0, 0.4), (1.0, -0.4)])
def test_the_shape_is_read_off_the_ranks(ratio, bias):
    """20 000 ranks among few draws tell the ratio and the bias to two digits."""
    truth = torch.randn(20_000, 1)
    ranks = (bias + ratio * torch.randn(20_000, 15) < truth).sum(1)
    said = shape_in_words(ranks, 15)
    number = float(said.split("about ")[1].split(" ")[0])
    assert number == pytest.approx(abs(bias) or ratio, rel=0.06)
    words = (
        {1.4: "too wide", 0.7: "too narrow"} if bias == 0 else {1.0: "low" if bias < 0 else "high"}
    )
    assert words[ratio] in said


# --- power


@pytest.mark.parametrize(("ratio", "bias"), [(1.0, 0.0), (1.5, 0.0), (0.5, 0.0), (1.3, 0.7)])
def test_the_law_of_ranks(ratio, bias):
    """Of one draw, Phi(-bias / sqrt(1 + ratio^2)) lies below; of two, an arcsine of both do."""
    below = 0.5 * math.erfc(bias / math.sqrt(2.0 * (1.0 + ratio**2)))
    assert rank_law(1, sd_ratio=ratio, bias=bias)[1] == pytest.approx(below, abs=1e-5)
    if bias == 0.0:
        both = 0.25 + math.asin(1.0 / (1.0 + ratio**2)) / (2.0 * math.pi)
        assert rank_law(2, sd_ratio=ratio)[2] == pytest.approx(both, abs=1e-5)


def test_the_power_is_that_of_the_test():
    """400 calibrations of 1000 simulations with an sd 1.15 times the right one."""
    stated = detection_probability(1000, 63, 1e-3, sd_ratio=1.15)
    assert 0.3 < stated < 0.9
    hits = 0
    for _ in range(400):
        below = torch.special.ndtr(torch.randn(1000) / 1.15)
        ranks = torch.binomial(torch.full((1000,), 63.0), below)
        counts = torch.bincount(ranks.long(), minlength=64).numpy()
        hits += chi_square_pvalue(counts) < 1e-3
    assert abs(hits / 400 - stated) < 5 * math.sqrt(stated * (1 - stated) / 400)


def test_ten_thousand_simulations_see_six_percent():
    assert smallest_detectable(10_000, 63, 1e-4, 0.9).too_wide == pytest.approx(1.06, abs=0.004)
    assert detection_probability(2000, 63, 1e-4, sd_ratio=1.06) < 0.1
    assert smallest_detectable(20, 63, 1e-4, 0.9).too_wide == math.inf


def test_the_level_is_shared_by_all_quantities():
    result = of_hmc()
    alone = smallest_detectable(400, 15, 1e-4 / 6, 0.5)
    assert result.smallest_detectable(power=0.5) == alone
    assert str(alone) in str(result)


# --- what is refused


def observes():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(m, 1.0), obs=torch.tensor(0.0))
    pyro.sample("x", dist.Normal(m, 1.0))


def observes_its_data():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(m, 1.0), obs=torch.tensor(0.0))


def weighs():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.factor("extra", -m)
    pyro.sample("x", dist.Normal(m, 1.0))


def short_chains():
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(lambda x: scale * x**4, event_shape=()))


def by_a_sampler():
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 1.0))
    draw = lambda law, shape: torch.zeros(shape + law.batch_shape)  # noqa: E731
    law = EnergyDistribution(lambda x: scale * x**4, event_shape=(), sampler=draw)
    pyro.sample("x", law)


BAD = {
    "observes": (observes, ["x"], "site 'y' is observed in model 'observes' itself"),
    "its data": (observes_its_data, ["x"], "site 'x' is observed in model"),
    "weighs": (weighs, ["x"], "factor 'extra' changes the law of model 'weighs'"),
    "no site": (conjugate, ["y"], r"model 'conjugate' has no site \['y'\]"),
    "none": (conjugate, [], "has no site"),
    "short chains": (short_chains, ["x"], "EBM site 'x' is drawn by short chains"),
    "a sampler": (by_a_sampler, ["x"], "or by a sampler that does not say that it is exact"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore::pyro_ebm.errors.ApproximateSampleWarning")
def test_one_sentence_each(case):
    model, sites, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        simulation_based_calibration(model, sites)


# --- long runs


@pytest.mark.slow
def test_ten_thousand_simulations_of_hmc():
    """An sd off by a fifteenth would be seen, and a bias of .08 sd."""
    result = simulation_based_calibration(conjugate, ["x"], HMC, num_simulations=10_000)
    result.check()
    assert result.smallest_detectable().too_wide < 1.07
    assert result.smallest_detectable().bias < 0.08


@pytest.mark.slow
def test_ten_thousand_simulations_of_exchange():
    """An sd off by a sixteenth would be seen, and a bias of .075 sd, nine times in ten."""
    result = simulation_based_calibration(precisions, ["x"], Exchange, num_simulations=10_000)
    result.check()
    assert result.smallest_detectable().too_wide < 1.063
    assert result.smallest_detectable().too_narrow > 0.94
    assert result.smallest_detectable().bias < 0.075


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the density is NaN")  # where bugs lead to
@pytest.mark.parametrize("bug", BUGS)
def test_bugs_in_exchange_have_tiny_pvalues(bug):
    result = simulation_based_calibration(
        precisions, ["x"], bug, num_simulations=2000, num_draws=31, thinning=10
    )
    assert result.pvalues["precision"] < 1e-12


@pytest.mark.slow
def test_exchange_on_a_lattice():
    """The log likelihood, with Kaufman's log Z, is ranked as well."""
    result = simulation_based_calibration(
        lattice,
        ["x"],
        Exchange,
        num_simulations=1000,
        num_draws=31,
        quantities={"log likelihood": log_likelihood_of_lattice},
    )
    result.check()
    assert result.smallest_detectable().too_wide < 1.26


def one_sweep(each):
    """Double Metropolis-Hastings with one sweep: too wide."""
    return Exchange(each, auxiliary=Sweeps(1))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [WrongSign, one_sweep])
def test_bugs_on_a_lattice(kernel):
    result = simulation_based_calibration(
        lattice, ["x"], kernel, num_simulations=3000, num_draws=15, thinning=10
    )
    assert result.pvalues["coupling"] < 1e-6
