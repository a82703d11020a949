"""Conway-Maxwell-Poisson: log Z against sums of many digits, draws by chi square, known answers."""

import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ConwayMaxwellPoisson, conway_maxwell_poisson
from pyro_ebm.mcmc import HMC, MCMC, Exchange

F64 = torch.float64
DISPERSIONS = [0.05, 0.1, 0.3, 0.5, 0.9, 1.0, 1.5, 3.0, 8.0, 20.0]
MODES = [1e-4, 0.1, 0.9, 1.0, 2.0, 7.3, 30.0, 100.0, 300.0, 1000.0, 1e4]


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def grid():
    """Log rate and dispersion for every dispersion (rows) and mode (columns)."""
    nu, mode = numbers(*DISPERSIONS)[:, None], numbers(*MODES)
    return torch.broadcast_tensors(nu * mode.log(), nu)


def log_z_of(log_rate, dispersion, **options):
    return ConwayMaxwellPoisson(log_rate, dispersion, **options).log_normalizer()


def terms(log_rate, dispersion, num=20_000):
    """Logs of the first terms along a new last dim: at these parameters the others are nothing."""
    j = torch.arange(num, dtype=F64)
    return log_rate.unsqueeze(-1) * j - dispersion.unsqueeze(-1) * torch.lgamma(j + 1)


def log_probs(log_rate, dispersion, num=20_000):
    return torch.log_softmax(terms(log_rate, dispersion, num), -1)


# --- log Z


@pytest.mark.parametrize("dispersion", range(len(DISPERSIONS)))
def test_log_normalizer_is_the_sum_of_many_terms(dispersion):
    log_rate, nu = (t[dispersion] for t in grid())
    want = torch.logsumexp(terms(log_rate, nu), -1)
    torch.testing.assert_close(log_z_of(log_rate, nu), want, rtol=1e-14, atol=1e-14)


def derivatives(log_rate, dispersion, **options):
    """Log Z with its gradient (2,) and Hessian (2, 2)."""
    at = torch.stack([log_rate, dispersion]).requires_grad_()
    log_z = log_z_of(at[0], at[1], **options)
    (slope,) = torch.autograd.grad(log_z, at, create_graph=True)
    rows = [torch.autograd.grad(s, at, retain_graph=True)[0] for s in slope]
    return log_z.detach(), slope.detach(), torch.stack(rows)


def by_many_digits(log_rate, dispersion, num):
    """The same by term ratios in 40 digits: means and covariances of (x, -log x!)."""
    with mpmath.workdps(40):
        eta, nu = mpmath.mpf(float(log_rate)), mpmath.mpf(float(dispersion))
        term, log_factorial = mpmath.mpf(1), mpmath.mpf(0)
        sums = [mpmath.mpf(1)] + [mpmath.mpf(0)] * 5
        for j in range(1, num):
            log_j = mpmath.log(j)
            term *= mpmath.exp(eta - nu * log_j)
            log_factorial -= log_j
            x, y = j * term, log_factorial * term
            parts = (term, x, y, j * x, j * y, log_factorial * y)
            sums = [one + other for one, other in zip(sums, parts, strict=True)]
        z, x, y, xx, xy, yy = sums
        x, y, xx, xy, yy = (s / z for s in (x, y, xx, xy, yy))
        cov = [[xx - x * x, xy - x * y], [xy - x * y, yy - y * y]]
        return (
            numbers(float(mpmath.log(z)))[0],
            numbers(float(x), float(y)),
            torch.stack([numbers(*map(float, row)) for row in cov]),
        )


@pytest.mark.parametrize(
    ("mode", "dispersion", "num"),
    [(1e4, 20.0, 10_300), (7.3, 0.05, 600), (150.0, 0.3, 600), (2.0, 1.5, 60), (0.3, 8.0, 20)],
)
def test_value_slope_and_curvature_have_their_digits(mode, dispersion, num):
    nu = numbers(dispersion)[0]
    log_rate = nu * math.log(mode)
    ours, exact = derivatives(log_rate, nu), by_many_digits(log_rate, nu, num)
    for got, want, digits in zip(ours, exact, (1e-14, 1e-12, 1e-9), strict=True):
        torch.testing.assert_close(got, want, rtol=digits, atol=1e-14)


@pytest.mark.parametrize("dispersion", [0.05, 0.45, 1.0, 4.0])
@pytest.mark.parametrize("mode", [1e4, 1e5])
def test_cells_of_many_integers_give_the_same(mode, dispersion):
    """Windows of up to 24 000 integers in 512 terms, and one by one."""
    nu = numbers(dispersion)[0]
    log_rate = nu * math.log(mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_ebm.ops.series.MAX_TERMS", 512)
        coarse = derivatives(log_rate, nu)
    fine = derivatives(log_rate, nu, num_terms=50_000)
    for got, want, digits in zip(coarse, fine, (1e-14, 1e-12, 1e-8), strict=True):
        torch.testing.assert_close(got, want, rtol=digits, atol=1e-14)


@pytest.mark.parametrize("num_terms", [16, 32, 64, 128])
def test_few_terms_are_right_or_refused(num_terms):
    nu = torch.logspace(-2, 3, 40, dtype=F64)[:, None]
    modes = torch.logspace(-4, 5, 150, dtype=F64)
    at = [t.flatten() for t in torch.broadcast_tensors(nu * modes.log(), nu)]
    found = torch.vmap(lambda a, b: log_z_of(a, b, num_terms=num_terms))(*at)
    known = found.isfinite()
    assert 0.1 < float(known.double().mean()) < 0.9
    want = log_z_of(*(t[known] for t in at), num_terms=512)
    torch.testing.assert_close(found[known], want, rtol=1e-13, atol=2e-12)


def test_dispersion_one_is_poisson():
    rate = numbers(0.01, 0.5, 1.0, 3.7, 40.0, 1e4, 1e6)
    torch.testing.assert_close(
        log_z_of(rate.log(), torch.ones_like(rate)), rate, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("rate", [1e-6, 0.3, 0.9, 0.999])
def test_dispersion_zero_is_geometric(rate):
    log_z, slope, _ = derivatives(numbers(math.log(rate))[0], numbers(0.0)[0])
    assert float(log_z) == pytest.approx(-math.log1p(-rate), rel=1e-12)
    assert float(slope[0]) == pytest.approx(rate / (1 - rate), rel=1e-9)


def test_a_large_dispersion_is_bernoulli():
    rate = numbers(0.01, 1.0, 20.0, 1e6)
    log_z = log_z_of(rate.log(), numbers(400.0)[0])
    torch.testing.assert_close(log_z, torch.log1p(rate), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("dispersions", "num_terms"), [((0.05, 0.07, 0.1, 20.0), 512), ((0.25, 0.4, 1.0, 8.0), 256)]
)
def test_under_vmap_the_terms_do_what_the_docstring_says(dispersions, num_terms):
    """For modes up to a million."""
    modes = torch.logspace(-4, 6, 200, dtype=F64)
    nu = numbers(*dispersions)[:, None]
    at = [t.flatten() for t in torch.broadcast_tensors(nu * modes.log(), nu)]
    found = torch.vmap(lambda a, b: log_z_of(a, b, num_terms=num_terms))(*at)
    torch.testing.assert_close(found, log_z_of(*at, num_terms=5000), rtol=1e-13, atol=1e-13)


def test_gradients_go_through_vmap_and_graphs():
    log_rate, nu = (t[:, ::2].flatten() for t in grid())
    by_vmap = torch.vmap(torch.func.grad(log_z_of, argnums=(0, 1)))(log_rate, nu)
    ours = log_rate.clone().requires_grad_(), nu.clone().requires_grad_()
    by_graph = torch.autograd.grad(log_z_of(*ours).sum(), ours)
    for one, other in zip(by_vmap, by_graph, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    recorded = make_fx(lambda a, b: torch.vmap(torch.func.grad(log_z_of))(a, b))(log_rate, nu)
    again = recorded(log_rate.flip(0), nu.flip(0)).flip(0)
    torch.testing.assert_close(again, by_vmap[0])


IMPROPER = {
    "negative dispersion": (-1.0, -0.1),
    "geometric of rate 1": (0.0, 0.0),
    "geometric beyond": (0.1, 0.0),
    "a mean of e^40": (4.0, 0.1),
    "a mean past all numbers": (10.0, 0.01),
    "too wide for 8192 terms": (1e-5 * math.log(5000.0), 1e-5),
    "not a number": (math.nan, 1.0),
    "rounding": (math.log(1e10), 1.0),
}


@pytest.mark.parametrize("case", IMPROPER)
def test_what_is_not_known_is_not_a_number(case):
    log_rate, dispersion = numbers(*IMPROPER[case])
    assert log_z_of(log_rate, dispersion).isnan()
    both = numbers(0.5, float(log_rate)), numbers(1.0, float(dispersion))
    assert log_z_of(*both).isnan().tolist() == [False, True]
    assert torch.vmap(log_z_of)(*both).isnan().tolist() == [False, True]


@pytest.mark.parametrize("case", [c for c in IMPROPER if c != "too wide for 8192 terms"])
def test_draws_of_what_is_not_known_are_not_numbers(case):
    log_rate, dispersion = numbers(*IMPROPER[case])
    both = numbers(float(log_rate), 0.5), numbers(float(dispersion), 1.0)
    assert ConwayMaxwellPoisson(*both).sample((5,)).isnan().tolist() == [[True, False]] * 5


def test_single_precision_keeps_its_digits():
    log_rate, nu = (t[:, :8].float() for t in grid())
    found = log_z_of(log_rate, nu)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, log_z_of(log_rate.double(), nu.double()).float())


# --- the law


def test_the_energy_is_that_of_the_formula():
    energy = ConwayMaxwellPoisson(numbers(0.5, -1.0), 2.0)
    want = numbers(-4 * 0.5 + 2 * math.log(24), 4 + 2 * math.log(24))
    torch.testing.assert_close(energy(numbers(4.0)[0]), want)
    torch.testing.assert_close(energy(torch.tensor(4)), want)
    assert energy.batch_shape == (2,)


def test_probabilities_are_those_of_poisson():
    rate = numbers(0.3, 4.0, 250.0)
    x = torch.arange(400, dtype=F64)[:, None]
    law = EnergyDistribution(ConwayMaxwellPoisson(rate.log(), 1.0))
    torch.testing.assert_close(
        law.log_prob(x), dist.Poisson(rate).log_prob(x), rtol=1e-10, atol=1e-10
    )


def test_what_a_distribution_knows_of_it():
    law = EnergyDistribution(ConwayMaxwellPoisson(numbers(0.1, 0.2, 0.3), 2.0))
    assert law.is_normalized
    assert law.has_exact_sample
    assert law.batch_shape == (3,)
    assert law.expand((5, 3)).sample((2,)).shape == (2, 5, 3)
    assert law.support.check(numbers(1.0, -1.0, 0.5)).tolist() == [True, False, False]


def test_parameters_keep_their_graph():
    log_rate, nu = nn.Parameter(numbers(1.0, 2.0)), numbers(1.5)[0].requires_grad_()
    energy = ConwayMaxwellPoisson(log_rate, nu)
    assert [name for name, _ in energy.named_parameters()] == ["log_rate"]
    (energy(numbers(3.0, 2.0)).sum() + energy.log_normalizer().sum()).backward()
    p = log_probs(log_rate.detach(), nu.detach().expand(2), 200).exp()
    mean = (p * torch.arange(200)).sum(-1)
    torch.testing.assert_close(log_rate.grad, mean - numbers(3.0, 2.0))
    log_factorials = torch.lgamma(torch.arange(200, dtype=F64) + 1)
    seen = torch.lgamma(numbers(4.0, 3.0)) - p @ log_factorials
    torch.testing.assert_close(nu.grad, seen.sum())


def test_other_natural_parameters_sum_as_finely():
    energy = ConwayMaxwellPoisson(0.5, 2.0, num_terms=32)
    other = energy.with_natural(numbers(0.1, 1.0)[None])
    assert other.num_terms == 32
    torch.testing.assert_close(other.log_normalizer(), numbers(math.exp(0.1)))


# --- draws


PAIRS = [(4.0, 1.0), (12.6, 5.8), (0.7, 20.0), (1.3, 1.01), (9.0, 0.5), (60.0, 0.9), (2.0, 0.05)]
GEOMETRIC = [(math.log(0.8), 0.0), (math.log(0.5), 0.01), (-3.0, 0.6)]  # log rate, dispersion


def natural_pairs():
    pairs = [(nu * math.log(mode), nu) for mode, nu in PAIRS] + GEOMETRIC
    return numbers(*(p[0] for p in pairs)), numbers(*(p[1] for p in pairs))


def cells_of(expected, least=20.0):
    """Runs of counts that expect at least so many draws; the last one takes the rest."""
    cell, held, cells = 0, 0.0, []
    for count in expected.tolist():
        if held >= least:
            cell, held = cell + 1, 0.0
        held += count
        cells.append(cell)
    last = cell - 1 if held < least else cell
    return torch.tensor(cells).clamp(max=max(last, 0))


def chi_square(x, log_rate, dispersion):
    """Pearson's statistic in cells of at least 20 expected draws, as sd's above its mean."""
    counts = len(x) * log_probs(log_rate, dispersion, 2000).exp()
    cell = cells_of(counts)
    expected = torch.zeros(int(cell.max()) + 1, dtype=F64).index_add(0, cell, counts)
    seen = torch.bincount(cell[x.long()], minlength=len(expected))
    chi = ((seen - expected).square() / expected).sum()
    # Rare cells make the variance larger than that of a chi square.
    variance = 2.0 * (len(expected) - 1) + (1.0 / expected).sum()
    return float((chi - (len(expected) - 1)) / variance.sqrt())


def test_draws_are_exact_in_one_batch():
    log_rate, nu = natural_pairs()
    x = ConwayMaxwellPoisson(log_rate, nu).sample((20_000,))
    assert x.shape == (20_000, len(nu))
    assert x.dtype == F64
    for which in range(len(nu)):
        assert abs(chi_square(x[:, which], log_rate[which], nu[which])) < 5


def test_every_draw_has_the_parameters_of_its_place():
    """Among draws of other laws, and after some have been accepted and others not."""
    log_rate = numbers(0.5, 9.0, 40.0).log()[:, None] * numbers(0.4, 3.0)
    nu = numbers(0.4, 3.0)
    x = ConwayMaxwellPoisson(log_rate, nu).sample((4000,))
    mean = (log_probs(*torch.broadcast_tensors(log_rate, nu), 2000).exp() * torch.arange(2000)).sum(
        -1
    )
    z = (x.mean(0) - mean) / (x.std(0) / 4000**0.5)
    assert float(z.abs().max()) < 5


@pytest.mark.parametrize(("mode", "dispersion"), [(1e4, 0.05), (1e4, 0.9), (1e4, 20.0)])
def test_draws_of_large_means_have_their_moments(mode, dispersion):
    nu = numbers(dispersion)[0]
    log_rate = nu * math.log(mode)
    x = ConwayMaxwellPoisson(log_rate, nu).sample((2000,))
    _, slope, hessian = derivatives(log_rate, nu)
    z = (x.mean() - slope[0]) / (hessian[0, 0] / len(x)).sqrt()
    assert abs(float(z)) < 5
    assert abs(float(x.var() / hessian[0, 0]) - 1) < 5 * (2 / len(x)) ** 0.5


def test_the_envelope_lies_above_everywhere_and_touches():
    log_rate, nu = natural_pairs()
    envelope = conway_maxwell_poisson._Envelope(log_rate, nu)
    y = torch.arange(3000, dtype=F64)
    for row in range(len(nu)):
        ratio = envelope.log_ratio(torch.full_like(y, row, dtype=torch.long), y)
        assert float(ratio.max()) == pytest.approx(0.0, abs=1e-12)


def test_a_factor_of_the_envelope_that_is_too_small_is_seen():
    """Its bound taken some counts beside the top: too low by .66, .6 and .3 nats."""
    log_rate, nu = natural_pairs()
    for which, shift in ((1, 2.0), (4, 6.0), (6, 17.0)):
        alike = log_rate[which].expand(20_000), nu[which].expand(20_000)
        envelope = conway_maxwell_poisson._Envelope(*alike)
        envelope.top = envelope.top + shift
        assert chi_square(envelope.sample(), log_rate[which], nu[which]) > 5


@pytest.mark.parametrize("num_sweeps", [1, 5])
def test_sweeps_keep_exact_draws(num_sweeps):
    log_rate, nu = natural_pairs()
    energy = ConwayMaxwellPoisson(log_rate, nu)
    x = energy.sample((20_000,))
    moved = energy.sweep(x, num_sweeps)
    assert moved.shape == x.shape
    assert bool((moved != x).any(0).all())
    assert float((moved - x).abs().max()) == num_sweeps
    for which in range(len(nu)):
        assert abs(chi_square(moved[:, which], log_rate[which], nu[which])) < 5


def test_a_sweep_is_as_likely_as_its_reverse():
    """Moves between neighbors, of 200 000 exact draws; sweeps of another law are seen."""
    log_rate, nu = numbers(1.5)[0], numbers(0.8)[0]
    energy = ConwayMaxwellPoisson(log_rate, nu)
    x = energy.sample((200_000,))
    moved = energy.sweep(x, 1)
    lower = torch.minimum(x, moved)
    up, down = (torch.bincount(lower[way].long(), minlength=30) for way in (moved > x, moved < x))
    z = (up - down) / (up + down).clamp(min=1).sqrt()
    assert float(z.abs().max()) < 5
    assert int((up + down > 100).sum()) > 8
    other = ConwayMaxwellPoisson(log_rate + 0.1, nu).sweep(x[:20_000], 40)
    assert chi_square(other, log_rate, nu) > 5


@pytest.mark.parametrize("dispersion", [1e3, 1e12, 1e17, 1e100, 1e308])
def test_huge_dispersions_are_drawn_as_the_bernoulli_law_that_they_are(dispersion):
    """Odds lambda, also where the mode and 1 are the same number."""
    log_rate = numbers(-3.0, 0.5, 14.0)
    x = ConwayMaxwellPoisson(log_rate, numbers(dispersion)[0]).sample((20_000,))
    wanted = torch.sigmoid(log_rate)
    error = (wanted * (1.0 - wanted) / 20_000).sqrt() + 1e-5
    assert bool(((x.mean(0) - wanted).abs() < 5 * error).all())
    assert float(x.max()) == 1.0


# Laws far wider than Poisson, whose dispersion is nearly nothing: mode, dispersion, and a count.
WIDE = [(2.0, 0.015, 1000.0), (2.0, 0.015, 1.0), (1.5, 0.004, 400.0), (40.0, 0.01, 10.0)]


@pytest.mark.parametrize(("mode", "dispersion", "at"), WIDE)
def test_steps_of_wide_laws_are_accepted_as_their_terms_say(mode, dispersion, at):
    """200 000 steps from one count: ways up and down half of the time each, times min(1, ratio)."""
    nu = numbers(dispersion)[0]
    log_rate = nu * math.log(mode)
    x = torch.full((200_000,), at, dtype=F64)
    moved = ConwayMaxwellPoisson(log_rate, nu).sweep(x, 1)
    up, down = (moved == at + 1).double().mean(), (moved == at - 1).double().mean()
    log_terms = terms(log_rate, nu, 1100)
    for share, to in ((up, at + 1), (down, at - 1)):
        wanted = 0.5 * float((log_terms[int(to)] - log_terms[int(at)]).clamp(max=0.0).exp())
        assert abs(float(share) - wanted) < 5 * (wanted * (1 - wanted) / 200_000) ** 0.5


@pytest.mark.parametrize(("mode", "dispersion"), [(2.0, 0.01), (1.5, 0.004), (0.9, 0.02)])
def test_wide_laws_have_their_draws_and_their_sum(mode, dispersion):
    nu = numbers(dispersion)[0]
    log_rate = nu * math.log(mode)
    energy = ConwayMaxwellPoisson(log_rate, nu)
    assert abs(chi_square(energy.sample((20_000,)), log_rate, nu)) < 5
    wanted = torch.logsumexp(terms(log_rate, nu), -1)
    torch.testing.assert_close(energy.log_normalizer(), wanted, rtol=1e-12, atol=1e-12)


def test_sweeps_start_at_whole_numbers_of_any_kind():
    energy = ConwayMaxwellPoisson(numbers(0.1, 0.2), 1.0)
    x = energy.sweep(torch.zeros(3, 2, dtype=torch.long), 4)
    assert x.dtype == torch.long
    assert x.shape == (3, 2)
    assert bool((x >= 0).all())


# --- regression

COUNTS = numbers(16, 9, 17, 12, 22, 13, 8, 15, 19, 11)
TRANSFERS = numbers(1, 0, 2, 0, 3, 1, 0, 1, 2, 0)


def freight_loss(at):
    """Minus log likelihood at (log mode, slope, log dispersion)."""
    nu = at[2].exp()
    law = EnergyDistribution(ConwayMaxwellPoisson(nu * (at[0] + at[1] * TRANSFERS), nu))
    return -law.log_prob(COUNTS).sum()


def test_freight_damage_has_its_published_estimate():
    """Log rate 13.8247 + 1.4838 x, dispersion 5.7818, log likelihood -18.6449."""
    at = numbers(2.5, 0.0, 0.0).requires_grad_()
    optimizer = torch.optim.LBFGS([at], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = freight_loss(at)
        loss.backward()
        return loss

    optimizer.step(closure)
    at = at.detach()
    nu = at[2].exp()
    found = torch.stack([nu * at[0], nu * at[1], nu, -freight_loss(at)])
    torch.testing.assert_close(found, numbers(13.8247, 1.4838, 5.7818, -18.6449), rtol=0, atol=1e-4)


class Counts(ConwayMaxwellPoisson):
    """Counts that keep their log Z to themselves."""

    is_tractable = False


def freight(family, counts):
    """The dispersion alone is inferred, in logs."""
    log_nu = pyro.sample("log_nu", dist.Normal(numbers(0.0)[0], 1.0))
    nu = log_nu.exp()
    with pyro.plate("rows", len(counts)):
        law = EnergyDistribution(family(nu * (2.4 + 0.26 * TRANSFERS), nu, num_terms=256))
        pyro.sample("y", law, obs=counts)


def log_density(log_nu):
    """Of the posterior, by long sums, for log dispersions of shape (n,)."""
    nu = log_nu.exp()[:, None]
    log_rate = nu * (2.4 + 0.26 * TRANSFERS)
    log_p = log_probs(log_rate, nu.expand_as(log_rate), 600)
    seen = log_p.gather(-1, COUNTS.long().expand_as(log_rate).unsqueeze(-1))
    return seen.sum((1, 2)) - 0.5 * log_nu.square()


def test_a_model_is_vectorized_over_chains():
    target = HMC(freight).bind(ConwayMaxwellPoisson, COUNTS)
    assert target.is_vectorized
    q = torch.linspace(-1.2, 3.0, 9, dtype=F64).requires_grad_()
    want = -log_density(q)
    (slope,) = torch.autograd.grad(want.sum(), q)
    with pyro.validation_enabled(is_validate=False):
        u, gradient = target.potential_and_grad(q.detach()[:, None])
    torch.testing.assert_close(u - u[0], (want - want[0]).detach())
    torch.testing.assert_close(gradient[:, 0], slope)


def test_exchange_finds_the_posterior_by_quadrature():
    """With errors of the mean of a twelfth of an sd at most."""
    log_nu = torch.linspace(-3, 5, 201, dtype=F64)
    weights = log_density(log_nu).softmax(0)
    mean = float(weights @ log_nu)
    sd = float(weights @ (log_nu - mean).square()) ** 0.5
    mcmc = MCMC(Exchange(freight), 40, 40, num_chains=128, disable_progbar=True)
    mcmc.run(Counts, COUNTS)
    assert mcmc.kernel.adjusted
    draws = mcmc.get_samples()["log_nu"]
    for values, wanted in ((draws, mean), ((draws - mean).square(), sd**2)):
        means = values.mean(1)
        error = means.std() / len(means) ** 0.5
        assert abs(float((means.mean() - wanted) / error)) < 5
        assert float(error / (sd if values is draws else sd**2)) < 1 / 12


# --- what is refused

BAD = {
    "negative": (lambda: ConwayMaxwellPoisson(0.1, -1.0), ValueError, "must not be negative, got"),
    "not a number": (lambda: ConwayMaxwellPoisson(0.1, math.nan), ValueError, "got nan"),
    "improper": (lambda: ConwayMaxwellPoisson(0.1, 0.0), ValueError, "log_rate must be negative"),
    "no terms": (
        lambda: ConwayMaxwellPoisson(0.1, 1.0, num_terms=1),
        ValueError,
        "at least 2, got 1",
    ),
    "events": (
        lambda: EnergyDistribution(ConwayMaxwellPoisson(0.1, 1.0), event_shape=(2,)).log_prob(
            torch.ones(3)
        ),
        ValueError,
        "must match event_shape",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        make()


def test_draws_that_take_too_long_say_so(monkeypatch):
    monkeypatch.setattr(conway_maxwell_poisson, "_MAX_ROUNDS", 2)
    energy = ConwayMaxwellPoisson(0.9 * numbers(1e4).log(), 0.9)
    with pytest.raises(RuntimeError, match=r"of 2000 draws were not accepted within 2 rounds"):
        energy.sample((2000,))
