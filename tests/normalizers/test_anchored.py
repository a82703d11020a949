"""Log Z as a function, from draws at anchors, against the sum over all lattices."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers import Anchored, anchored
from pyro_ebm.ops.held_draws import asked

F64 = torch.float64
SHAPE = (4, 4)


class Hidden(Ising):
    """Knows neither log Z nor how to draw."""

    is_tractable = False
    is_sampleable = False


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


def lattice(field=None):
    return Ising(0.0, SHAPE, field=field)


def exact(natural):
    field = natural[..., 1] if natural.shape[-1] == 2 else None
    return Ising(natural[..., 0], SHAPE, field=field).log_normalizer()


def grid(*values):
    return torch.tensor(values, dtype=F64)[:, None]


def error_of(function, natural):
    """The spread of log Z less that at the first anchor, over resampled chains."""
    copies = function.bootstrap(30)
    values = torch.stack([f(natural) - f(function.anchors[0]) for f in copies])
    return values.std(0)


@pytest.mark.parametrize("anchors", [grid(0.25), grid(0.1, 0.25, 0.4)])
def test_values_between_the_anchors(anchors):
    log_z = anchored(lattice(), anchors, num_draws=4000)
    at = grid(0.2, 0.25, 0.3)
    error = error_of(log_z, at)
    assert float(error.max()) < 0.03
    assert bool(((log_z(at) - exact(at)).abs() < 5 * error + 1e-9).all())


def test_two_parameters_and_their_slopes():
    """The slope of log Z is the mean of the statistics, its curvature their covariance."""
    log_z = anchored(lattice(0.0), torch.tensor([[0.2, 0.0], [0.2, 0.2]]), num_draws=20_000)
    at = torch.tensor([0.22, 0.1])
    slopes = [torch.func.grad(f)(at) for f in (log_z, exact)]
    torch.testing.assert_close(*slopes, rtol=0, atol=0.25)
    curvatures = [torch.func.jacrev(torch.func.grad(f))(at) for f in (log_z, exact)]
    torch.testing.assert_close(*curvatures, rtol=0.1, atol=2.0)
    values = torch.vmap(log_z)(at.expand(3, 2))
    torch.testing.assert_close(values, log_z(at).expand(3))


def test_resampled_functions_keep_the_constant():
    function = anchored(Ising(0.0, SHAPE), grid(0.1), num_draws=2000)
    (copy,) = function.bootstrap(1)
    assert not copy.is_relative
    assert float(copy(grid(0.1)[0])) == pytest.approx(float(function(grid(0.1)[0])), abs=1e-9)


def test_errors_of_repeats_are_those_of_the_bootstrap():
    """20 repeats: their spread is within a factor of two of what one says of itself."""
    at = grid(0.32)
    runs = [anchored(lattice(), grid(0.2, 0.3), num_draws=500) for _ in range(20)]
    seen = torch.stack([f(at) - f(f.anchors[0]) - (exact(at) - exact(grid(0.2))) for f in runs])
    said = torch.stack([error_of(f, at) for f in runs[:5]]).mean()
    assert 0.5 < float(seen.std() / said) < 2.0
    assert abs(float(seen.mean() / (seen.std() / 20**0.5))) < 5


def test_slow_chains_count_by_their_effective_draws():
    exact_draws = anchored(lattice(), grid(0.4), num_draws=4000)
    chains = anchored(
        Hidden(0.0, SHAPE), grid(0.4), num_draws=4000, num_chains=40, start=torch.ones(SHAPE)
    )
    assert float(exact_draws.effective_size(torch.tensor([0.4]))) > 3000
    assert float(chains.effective_size(torch.tensor([0.4]))) < 3500
    gap, wanted = (f(grid(0.42)) - f(grid(0.4)) for f in (chains, exact))
    assert abs(float(gap - wanted)) < 0.05


def test_far_from_all_anchors_it_is_not_told():
    log_z = anchored(lattice(), grid(0.1), num_draws=500)
    with pytest.warns(UserWarning, match="the anchors say nothing of"):
        assert log_z(grid(0.1, 3.0)).isnan().tolist() == [False, True]


def test_enough_draws_for_many_observations():
    log_z = anchored(lattice(), grid(0.3), num_draws=1000)
    here = torch.tensor([[0.3]])
    assert float(log_z.displacement(here, 10)) == pytest.approx(0.1, rel=0.1)
    log_z.check(here, 10)
    with pytest.raises(ValueError, match="12 times as many, or anchors nearer"):
        log_z.check(here, 1000)


def test_each_parameter_asks_for_draws_of_its_own():
    """Of a thousand two parameters given n rows take n / 500: 45 rows displace by 0.3."""
    log_z, here = anchored(lattice(0.0), torch.tensor([[0.2, 0.1]]), num_draws=1000), [[0.2, 0.1]]
    log_z.check(torch.tensor(here), 40)
    with pytest.raises(ValueError, match="displace the posterior by about 0.3[0-9] .*2 times as"):
        log_z.check(torch.tensor(here), 50)


@pytest.mark.parametrize("slow", [0, 1])
def test_draws_count_by_the_slower_of_two_statistics(slow):
    """Of 8000 draws with a memory of 0.9 a nineteenth, give or take a tenth, are independent."""
    torch.manual_seed(0)
    statistics = torch.randn(1, 40, 200, 2)
    for i in range(1, 200):
        statistics[:, :, i, slow] *= 0.19**0.5
        statistics[:, :, i, slow] += 0.9 * statistics[:, :, i - 1, slow]
    size = Anchored(torch.zeros(1, 2), statistics).effective_size(torch.zeros(2))
    assert float(size) == pytest.approx(8000 / 19, rel=0.3)


def test_it_makes_a_model_that_hmc_may_sample():
    """One lattice with a uniform prior: the posterior is that by quadrature."""
    x = torch.ones(SHAPE)
    x[0, 0] = x[2, 2] = -1.0  # a sum over bonds of 16
    log_z = anchored(lattice(), grid(0.1, 0.3, 0.5, 0.7), num_draws=4000)

    def model(x):
        coupling = pyro.sample("coupling", dist.Uniform(0.0, torch.tensor(0.8)))
        energy = Hidden(coupling, SHAPE)
        law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
        pyro.sample("x", law, obs=x)

    mcmc = MCMC(HMC(model), 200, 200, num_chains=64, disable_progbar=True)
    mcmc.run(x)
    draws = mcmc.get_samples()["coupling"]
    theta = torch.linspace(0.0, 0.8, 4001)
    weights = (theta * 16 - exact(theta[:, None])).softmax(0)
    mean = (weights * theta).sum()
    sd = (weights * (theta - mean).square()).sum().sqrt()
    assert abs(float((draws.mean() - mean) / sd)) < 0.05
    assert float(draws.std() / sd) == pytest.approx(1.0, abs=0.05)
    log_z.check(draws.flatten()[:100, None], 1)


def test_sweeps_of_another_law_are_refused():
    class Twice(Hidden):
        def statistics(self, x):
            return 2 * super().statistics(x)

    with pytest.raises(TypeError, match="neither an exact sampler nor sweeps of its own law"):
        anchored(Twice(0.0, SHAPE), grid(0.1), start=torch.ones(SHAPE))


def test_bad_input():
    with pytest.raises(ValueError, match=r"must be \(K, chains, draws, p\)"):
        Anchored(torch.zeros(2, 1), torch.zeros(2, 10, 1))
    with pytest.raises(ValueError, match="give start=, such as the data"):
        anchored(Hidden(0.0, SHAPE), grid(0.1))
    with pytest.raises(ValueError, match="the anchors do not overlap"):
        anchored(Ising(0.0, (30, 30)), grid(0.05, 0.3), num_draws=200)


def test_parameters_beyond_the_anchors_are_said_ever_more_seldom():
    log_z = anchored(Ising(0.0, (4, 4)), torch.tensor([[0.1]], dtype=torch.float64), num_draws=200)
    sentence = "log Z was asked at parameters that the anchors say"
    couplings = torch.linspace(2.0, 2.5, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match=sentence) as said:
        values = [float(log_z(coupling[None])) for coupling in couplings]
    assert values == pytest.approx([float("nan")] * 9, nan_ok=True)
    assert len(said) == 4


@pytest.mark.filterwarnings("ignore:log Z was asked at parameters")
def test_beyond_the_anchors_there_is_no_slope_to_follow():
    """Otherwise optimizers would follow that of the energy alone."""
    log_z = anchored(Ising(0.0, (4, 4)), torch.tensor([[0.1]]), num_draws=200)
    natural = torch.tensor([[0.1], [2.0]], requires_grad=True)
    log_z(natural).sum().backward()
    assert natural.grad.isnan().flatten().tolist() == [False, True]


def test_functions_that_are_asked_are_listed_inside_only():
    draws = torch.randn(1, 20, 50, 1)
    one, other = (Anchored(torch.zeros(1, 1), draws) for _ in range(2))
    with asked() as outer:
        one(torch.zeros(1))
        with asked() as inner:
            other(torch.zeros(1))
    one(torch.zeros(1))
    assert outer == [one, other]
    assert inner == [other]


FIELDS = torch.tensor(
    [[0.2, f] for f in (-1.0, -0.8, -0.6, -0.4, -0.2)] + [[k, -0.6] for k in (0.25, 0.15, 0.3, 0.1)]
)


@pytest.mark.parametrize("seed", range(3))
def test_anchors_whose_log_z_are_tens_of_nats_apart(seed):
    """Nine in a field: until log Z is in, every draw is by far the likeliest at one of them.

    The log Z of 1000 draws are within .3 nats of the exact ones, of which some differ by 20.
    """
    family = Ising(0.0, (6, 16), field=0.0, periodic=False)
    exact = family.with_natural(FIELDS).log_normalizer().double()
    assert float(exact.max() - exact.min()) > 20.0
    torch.manual_seed(seed)
    log_z = anchored(family, FIELDS, num_draws=1000)
    found = log_z.log_normalizers - log_z.log_normalizers[0]
    assert float((found - (exact - exact[0])).abs().max()) < 0.3
    copies = torch.stack([copy.log_normalizers for copy in log_z.bootstrap(10)])
    assert float((copies - log_z.log_normalizers).abs().max()) < 0.6
