"""Diagnostics of inexact exchange: unbiased, silent on exact draws, loud on wrong ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyro_ebm import EnergyDistribution
from pyro_ebm.chains import Record, diagnose, to_arviz
from pyro_ebm.energies import Edges, ExponentialRandomGraph, Ising, Triangles
from pyro_ebm.mcmc import HMC, MCMC, ExactDraws, Exchange, Sweeps
from pyro_ebm.mcmc.exchange.auxiliary import Auxiliary
from pyro_ebm.mcmc.exchange.exchange_diagnostics import (
    ExchangeDiagnostics,
    _entries,
    _hotelling,
    _resolution,
    _signs,
    bartlett,
    exchange_diagnostics,
)
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.ops.kaufman import torus_log_normalizer
from pyro_ebm.ops.stein_kernel import imq_stein_kernel
from pyro_ebm.testing.statistics import assert_mean_close

F64 = torch.float64


class Lattice(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


class Checkerboard(Lattice):
    """A lattice without exact draws, moved by heat-bath sweeps of one color and then the other."""

    is_sampleable = False

    def sweep(self, x, num_sweeps):
        rows, columns = (torch.arange(size) for size in self.event_shape)
        odd = ((rows[:, None] + columns) % 2).bool()
        for _ in range(num_sweeps):
            for color in (odd, ~odd):
                around = sum(x.roll(shift, dim) for shift in (1, -1) for dim in (-1, -2))
                up = torch.sigmoid(2.0 * self.coupling[..., None, None] * around)
                x = torch.where(color, 2.0 * torch.bernoulli(up) - 1.0, x)
        return x


class SwendsenWang(Auxiliary):
    """Long runs of clusters, for lattices that are too large for exact draws."""

    is_exact = False

    def __init__(self, num_sweeps):
        self.num_sweeps = num_sweeps

    def draw(self, family, observed):
        start = observed.expand(family.batch_shape + family.event_shape)
        return Ising(family.coupling, family.event_shape).sweep(start, self.num_sweeps)


def one_lattice(family, x):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(family(coupling, x.shape[-2:])), obs=x)


def product(x):
    """Natural parameters that are not linear in two latents."""
    a = pyro.sample("a", dist.Normal(torch.tensor(0.5), 0.3))
    b = pyro.sample("b", dist.Normal(torch.tensor(0.4), 0.3))
    pyro.sample("x", EnergyDistribution(Lattice(a.square() * b.exp(), (4, 4))), obs=x)


def lattice():
    """Two spins turned: the sum over bonds is 16."""
    x = torch.ones(4, 4)
    x[0, 0] = x[-2, -2] = -1.0
    return x


def exact_draws(shape, scale=1.0):
    """Independent unconstrained draws for the 4 by 4 lattice, spread by a factor."""
    grid = torch.linspace(0.0, 1.0, 100_001)[1:-1]
    cumulative = (16.0 * grid - torus_log_normalizer(grid, (4, 4))).softmax(0).cumsum(0)
    which = torch.searchsorted(cumulative, torch.rand(shape)).clamp(max=len(grid) - 1)
    q = torch.logit(grid[which])
    return (q.mean() + scale * (q - q.mean())).unsqueeze(-1)


def finished(kernel, target, draws):
    """A run that has kept these draws."""
    mcmc = MCMC(kernel, draws.shape[1], 0, num_chains=draws.shape[0], disable_progbar=True)
    mcmc.target, mcmc._draws, mcmc._num_kept = target, draws, draws.shape[1]
    return mcmc


def judged(draws, **options):
    kernel = Exchange(one_lattice)
    return exchange_diagnostics(finished(kernel, kernel.bind(Lattice, lattice()), draws), **options)


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)
    torch.set_default_dtype(F64)


# --- what they are made of


def test_the_stein_kernel_is_that_of_its_definition():
    x, score = torch.randn(4, 3), torch.randn(4, 3)

    def base(a, b):
        return (1.0 + (a - b).square().sum()).rsqrt()

    found = imq_stein_kernel(x, score)
    for i in range(4):
        for j in range(4):
            to_a, to_b = torch.func.grad(base, (0, 1))(x[i], x[j])
            mixed = torch.func.jacrev(torch.func.grad(base, 0), 1)(x[i], x[j])
            wanted = score[i] @ score[j] * base(x[i], x[j])
            wanted = wanted + score[i] @ to_b + score[j] @ to_a + mixed.trace()
            torch.testing.assert_close(found[i, j], wanted)


def test_the_stein_kernel_has_mean_zero_over_the_law():
    """By quadrature over a Gaussian, at any other point and with any score there."""
    x = torch.linspace(-10.0, 10.0, 401)[:, None]
    weights = (-0.5 * x[:, 0].square()).softmax(0)
    assert abs(float(weights @ imq_stein_kernel(x, -x)[:, 150])) < 1e-10
    x = torch.cat([x, torch.tensor([[0.77]])])
    score = torch.where(x == 0.77, 7.0, -x)
    assert abs(float(weights @ imq_stein_kernel(x, score)[:-1, -1])) < 1e-10


@pytest.mark.parametrize("number", [2, 5])
def test_both_identities_are_unbiased_at_any_number_of_auxiliary_draws(number):
    """Against derivatives of the log posterior with Kaufman's formula in it.

    1500 estimates at each position: an error of a tenth of their spread is seen.
    """
    target = Exchange(product).bind(lattice())
    q = torch.tensor([[0.4, 0.3], [0.7, -0.2]])

    def log_posterior(q):
        coupling = q[0].square() * q[1].exp()
        prior = -0.5 * (((q - torch.tensor([0.5, 0.4])) / 0.3) ** 2).sum()
        return prior + 16.0 * coupling - torus_log_normalizer(coupling, (4, 4))

    for row in q:
        found = bartlett(target, row.expand(1500, 2), ExactDraws(), number)
        score = torch.func.grad(log_posterior)(row)
        second = torch.outer(score, score) + torch.func.jacrev(torch.func.grad(log_posterior))(row)
        assert_mean_close(found.score, score, what="score")
        assert_mean_close(found.second, second, what="second identity")


class Torn(ExactDraws):
    """Exact draws of which the first row is lost, of several lattices or of one."""

    def draw(self, family, observed):
        y = super().draw(family, observed)
        y[:, 0] = torch.nan
        return y


@pytest.mark.parametrize("auxiliary", [ExactDraws(), Sweeps(40), Torn()])
def test_masked_rows_do_not_count(auxiliary):
    """They are NaN, which sweeps would stop at."""
    x = torch.stack([torch.full((4, 4), torch.nan), lattice()])
    family = Checkerboard if isinstance(auxiliary, Sweeps) else Lattice

    def two(x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", 2), pyro.poutine.mask(mask=torch.tensor([False, True])):
            pyro.sample("x", EnergyDistribution(family(coupling, (4, 4))), obs=x)

    q = torch.full((1000, 1), -0.7)
    both = bartlett(Exchange(two).bind(x), q, auxiliary, 4)
    one = bartlett(Exchange(one_lattice).bind(Lattice, lattice()), q, ExactDraws(), 4)
    assert_mean_close(both.score - one.score, 0.0)
    assert_mean_close(both.second - one.second, 0.0)


def test_a_site_with_constant_parameters_counts_for_nothing():
    def two(x):
        one_lattice(Lattice, x)
        pyro.sample("old", EnergyDistribution(Lattice(torch.tensor(0.3), (4, 4))), obs=x)

    q = torch.full((1000, 1), -0.7)
    both = bartlett(Exchange(two).bind(lattice()), q, ExactDraws(), 4)
    one = bartlett(Exchange(one_lattice).bind(Lattice, lattice()), q, ExactDraws(), 4)
    assert_mean_close(both.score - one.score, 0.0)
    assert_mean_close(both.second - one.second, 0.0)


def test_hotelling_is_what_it_says():
    """T squared by its definition; for 400 Gaussian rows its bound is that of chi squared."""
    means = torch.randn(400, 3) @ torch.randn(3, 3) + 0.1
    centre, covariance = means.mean(0), means.T.cov()
    found, threshold = _hotelling(means, _signs(400, means))
    assert found == pytest.approx(float(400 * centre @ torch.linalg.solve(covariance, centre)))
    assert threshold == pytest.approx(11.34, rel=0.12)


def test_few_blocks_judge_fewer_entries():
    second = torch.arange(9.0).reshape(3, 3)
    assert _entries(second.expand(24, 3, 3))[0].tolist() == [0.0, 3.0, 4.0, 6.0, 7.0, 8.0]
    assert _entries(second.expand(12, 3, 3))[0].tolist() == [0.0, 4.0, 8.0]
    assert _entries(second.expand(11, 3, 3))[0].tolist() == [4.0]


# --- what they say


def test_exact_draws_are_hardly_ever_flagged():
    """10 sets of independent draws at two tests of level .01: more than 3 is one in 10^5.

    Chains of 10 draws: R-hat of independent ones passes 1.1 less than once in 500.
    """
    flagged = [judged(exact_draws((50, 10)), num_auxiliary=4).trusted for _ in range(10)].count(
        False
    )
    assert flagged <= 3


@pytest.mark.parametrize("scale", [1.4, 0.7])
def test_a_wrong_spread_is_flagged_by_both(scale):
    found = judged(exact_draws((60, 10), scale), num_auxiliary=4)
    assert found.acd > 2 * found.acd_threshold
    assert found.aiks_pvalue < 0.001
    assert not found.trusted
    assert "do not trust" in str(found)


def test_a_shift_is_flagged_by_the_stein_discrepancy():
    found = judged(exact_draws((60, 10)) + 0.5, num_auxiliary=4)
    assert found.aiks_pvalue < 0.001


def test_what_can_be_detected_is():
    """Spreads off by what is called detectable are seen about nine times in ten."""
    found = judged(exact_draws((60, 10)), num_auxiliary=4)
    seen = 0
    for _ in range(10):
        one = judged(exact_draws((60, 10), 1.0 + found.detectable), num_auxiliary=4)
        seen += one.acd > one.acd_threshold
    assert seen >= 5
    assert f"off by {found.detectable:.0%}" in found.sentence


def test_chains_that_have_not_met_are_blamed_before_their_sampler():
    """Two halves of the chains a standard deviation apart, beside chains that are too wide."""
    draws = exact_draws((60, 10))
    draws[:30] += 0.6
    draws[30:] -= 0.6
    found = judged(draws, num_auxiliary=2)
    assert found.r_hat > 1.1
    assert "do not trust these draws: the chains have not met, R-hat is" in found.sentence
    found = judged(exact_draws((60, 10), 1.4), num_auxiliary=2)
    assert found.r_hat < 1.1
    assert "Use an exact sampler of the energy" in found.sentence


def test_chains_that_have_not_met_are_not_trusted_where_their_law_is_right():
    """All chains sorted: the pool of draws is exact, and no chain has seen more than its place."""
    pool = exact_draws((600, 1)).flatten().sort().values.reshape(60, 10, 1)
    mixed = pool.flatten()[torch.randperm(600)].reshape(60, 10, 1)
    apart, met = (judged(draws, num_auxiliary=4) for draws in (pool, mixed))
    assert apart.r_hat > 2.0
    assert not apart.trusted
    assert "do not trust these draws: the chains have not met, R-hat is" in apart.sentence
    assert met.r_hat < 1.1
    assert met.trusted


def test_chains_too_short_for_r_hat_are_not_judged():
    found = judged(exact_draws((60, 3)), num_auxiliary=2)
    assert math.isnan(found.r_hat)
    assert not found.trusted
    assert "too few draws to judge: chains of under 4" in found.sentence
    assert judged(exact_draws((60, 4)), num_auxiliary=2).r_hat > 0


def test_scores_that_are_not_finite_are_called_so():
    """Whatever R-hat is; nothing is said of the posterior."""
    found = judged(exact_draws((50, 3)), auxiliary=Torn(), num_auxiliary=2)
    assert "these draws cannot be judged: their scores are not finite" in found.sentence
    assert not found.trusted


def test_a_verdict_that_hardly_anything_could_have_changed_is_none():
    coarse, fine = (ExchangeDiagnostics(1.0, 6.6, 0.0, 0.5, seen, 60, "") for seen in (14.7, 0.49))
    assert not coarse.trusted
    assert "too few draws to judge: a posterior standard deviation off by" in coarse.sentence
    assert "less than 1470% would probably have been missed" in coarse.sentence
    assert fine.trusted
    assert "nothing speaks against these draws" in fine.sentence


@pytest.mark.slow
def test_short_runs_of_a_network_are_not_trusted():
    """Sixteen nodes, triangles that few chains have moved along: R-hat of 1.9 and more."""

    def network(y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
        law = EnergyDistribution(ExponentialRandomGraph(theta, 16, [Edges(), Triangles()]))
        pyro.sample("y", law, obs=y)

    for seed in (2, 3, 4):
        pyro.set_rng_seed(seed)
        y = torch.rand(120) < 0.17
        kernel = Exchange(network, auxiliary=Sweeps(8))
        mcmc = MCMC(kernel, 20, 20, num_chains=16, disable_progbar=True)
        mcmc.run(y, initial_params={"theta": torch.tensor([-1.6, 0.0]) + 0.3 * torch.randn(16, 2)})
        found = exchange_diagnostics(mcmc, auxiliary=Sweeps(20), num_auxiliary=8, max_draws=256)
        assert not found.trusted
        assert "the chains have not met" in str(found)


# --- what is kept of them


def test_a_verdict_is_saved_with_the_draws(tmp_path):
    """As netCDF and as a record, numbers and the sentence, in the place of its absence."""
    mcmc = doubly_metropolized(lattice(), 5, 20)
    absence = "exchange_diagnostics has not been asked whether that shows"
    assert absence in str(diagnose(mcmc))
    found = exchange_diagnostics(mcmc, auxiliary=Sweeps(20), num_auxiliary=2, max_draws=64)
    record = found.attached_to(mcmc.record)
    assert absence not in str(diagnose(record))
    assert found.sentence in str(diagnose(record))
    assert absence in mcmc.record.attrs["bias"]
    to_arviz(record).to_netcdf(tmp_path / "draws.nc")
    record.save(tmp_path / "draws.npz")
    with xarray.open_dataset(tmp_path / "draws.nc", group="posterior") as saved:
        for attrs in (saved.attrs, Record.load(tmp_path / "draws.npz").attrs):
            assert attrs["exchange_acd"] == found.acd
            assert attrs["exchange_aiks_pvalue"] == found.aiks_pvalue
            assert attrs["exchange_r_hat"] == found.r_hat
            assert attrs["exchange_auxiliary"] == found.auxiliary
            assert attrs["exchange_verdict"] == found.sentence


def test_a_verdict_on_exact_chains_says_nothing_of_bias():
    mcmc = MCMC(Exchange(one_lattice), 10, 10, num_chains=8, disable_progbar=True)
    mcmc.run(Lattice, lattice())
    record = judged(exact_draws((60, 4)), num_auxiliary=2).attached_to(mcmc.record)
    assert "bias" not in record.attrs
    assert "exchange_verdict" in record.attrs


def test_draws_of_one_chain_are_cut_into_stretches():
    found = judged(exact_draws((1, 403)), num_auxiliary=4)
    assert found.num_draws == 400
    assert found.trusted


def test_draws_are_thinned():
    assert judged(exact_draws((50, 100)), max_draws=200, num_auxiliary=2).num_draws == 200
    assert judged(exact_draws((50, 3)), max_draws=40, num_auxiliary=2).num_draws == 40


def doubly_metropolized(x, num_sweeps, num_samples):
    kernel = Exchange(one_lattice, auxiliary=Sweeps(num_sweeps))
    mcmc = MCMC(kernel, num_samples, 80, num_chains=64, disable_progbar=True)
    mcmc.run(Checkerboard, x)
    return mcmc


def relative_spread(mcmc, x):
    """The chains' standard deviation over that of Kaufman's posterior."""
    grid = torch.linspace(0.0, 1.0, 4001)[1:-1]
    bonds = Lattice(0.0, x.shape).statistics(x)[0]
    weights = (bonds * grid - torus_log_normalizer(grid, x.shape)).softmax(0)
    variance = weights @ (grid - weights @ grid).square()
    return float(mcmc.get_samples()["coupling"].std() / variance.sqrt())


def test_double_metropolis_hastings_with_one_sweep_is_found_out():
    """12 by 12, one heat-bath sweep from the data: too wide by a third and more."""
    x = Lattice(0.35, (12, 12)).sweep(torch.ones(12, 12), 30)
    mcmc = doubly_metropolized(x, 1, 60)
    assert relative_spread(mcmc, x) > 1.3
    found = exchange_diagnostics(mcmc, auxiliary=Sweeps(60), num_auxiliary=4, max_draws=320)
    assert found.acd > found.acd_threshold
    assert found.aiks_pvalue < 0.01
    assert "4 auxiliary draws each by 60 sweeps from the data" in str(found)


@pytest.mark.slow
def test_the_lattice_of_a_thousand_sites_is_found_out_at_one_sweep():
    """32 by 32 near the critical coupling: one sweep is 1.4 times too wide and more."""
    x = Lattice(0.39, (32, 32)).sweep(torch.ones(32, 32), 60)
    mcmc = doubly_metropolized(x, 1, 200)
    assert relative_spread(mcmc, x) > 1.4
    found = exchange_diagnostics(mcmc, auxiliary=SwendsenWang(20), num_auxiliary=4, max_draws=320)
    assert found.acd > found.acd_threshold
    assert not found.trusted


def test_an_exact_chain_is_trusted():
    mcmc = MCMC(Exchange(one_lattice), 300, 60, num_chains=64, disable_progbar=True)
    mcmc.run(Lattice, lattice())
    found = exchange_diagnostics(mcmc, num_auxiliary=4)
    assert found.r_hat < 1.1
    assert found.trusted
    assert "nothing speaks against these draws" in str(found)
    assert "4 exact auxiliary draws each" in str(found)


def test_auxiliary_draws_of_energies_without_a_sampler_are_long_sweeps():
    kernel = Exchange(one_lattice)
    target = kernel.bind(Checkerboard, lattice())
    found = exchange_diagnostics(finished(kernel, target, exact_draws((40, 1))), num_auxiliary=2)
    assert "by 200 sweeps from the data" in found.auxiliary


def test_either_takes_the_trust_away():
    good = ExchangeDiagnostics(1.0, 6.6, 0.0, 0.5, 0.1, 1000, "")
    assert good.trusted
    assert not ExchangeDiagnostics(7.0, 6.6, 0.0, 0.5, 0.1, 1000, "").trusted
    assert not ExchangeDiagnostics(1.0, 6.6, 0.0, 0.005, 0.1, 1000, "").trusted


# --- what is refused


def test_other_runs_are_refused():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    mcmc = MCMC(HMC(model), 2, 2, num_chains=4, disable_progbar=True)
    mcmc.run()
    with pytest.raises(TypeError, match="judges a run of Exchange, got one of HMC"):
        exchange_diagnostics(mcmc)


def test_draws_of_different_posteriors_are_refused():
    kernel = Exchange(EachChain(one_lattice, {"x": torch.ones(40, 4, 4)}))
    target = kernel.bind(Lattice, lattice())
    with pytest.raises(ValueError, match="one posterior, got data for each chain"):
        exchange_diagnostics(finished(kernel, target, exact_draws((40, 1))))


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 40 draws of all chains together, got 39"):
        judged(exact_draws((3, 13)))


def test_chains_that_stand_still_are_refused():
    with pytest.raises(ValueError, match="stand still"):
        judged(torch.zeros(40, 2, 1))


def test_one_auxiliary_draw_has_no_covariance():
    with pytest.raises(ValueError, match="num_auxiliary must be a whole number of at least 2"):
        judged(exact_draws((40, 1)), num_auxiliary=1)


def test_the_resolution_is_that_of_a_standard_deviation():
    """N = 20 000 independent draws of N(0, 1) tell its sd to 1 / sqrt(2 N) of itself.

    The score is -x and its derivative -1. The spread of 400 blocks is known to 4 percent.
    """
    torch.manual_seed(0)
    x = torch.randn(400, 50, 1, dtype=torch.float64)
    means = (x.square() - 1).mean(1)[..., None]
    found = _resolution(means, -x.reshape(-1, 1))
    assert found == pytest.approx((2 * 20_000) ** -0.5, rel=0.15)
    scaled = _resolution(9.0 * means, -3.0 * x.reshape(-1, 1))  # in other units of the parameter
    assert scaled == pytest.approx(found)
