"""Anchors that find the posterior, against quadrature."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import Precision

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers import anchored, anchoring
from pyro_ebm.normalizers.anchor_error import mcse_logz
from pyro_ebm.normalizers.anchored import NoOverlapError
from pyro_ebm.normalizers.anchoring import _Cloud, _places, _Rough, _spread, anchored_to
from pyro_ebm.normalizers.displacement import MAX_DISPLACEMENT, draws_wanted

# Posteriors are summed over grids that go on where the anchors say nothing.
pytestmark = pytest.mark.filterwarnings("ignore:log Z was asked at parameters")

SHAPE = (4, 4)


class Hidden(Ising):
    """Knows neither log Z nor how to draw."""

    is_tractable = False
    is_sampleable = False


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def natural(draws):
    return draws["k"][:, None]


def lattices(log_z, x):
    k = pyro.sample("k", dist.Uniform(0.0, torch.tensor(1.0)))
    energy = Ising(k, SHAPE)
    law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
    with pyro.plate("n", len(x)):
        pyro.sample("x", law, obs=x)


def ten_lattices():
    """Whose sums over bonds add up to 200."""
    x = torch.ones(10, *SHAPE)
    x[:, 0, 0] = -1.0  # 24 of 32 each
    x[:5, 2, 2] = -1.0  # 16 each
    return x


EXACT = 0.376676, 0.034783  # by enumeration and quadrature: mean and sd, for a uniform prior


def check_posterior(log_z, mean, sd, low=0.0, high=1.0, num=10, total=200.0):
    """On a grid; by the rule the mean is off by a third of a standard deviation at most."""
    k = torch.linspace(low, high, 2001)
    weights = (k * total - num * log_z(k[:, None])).nan_to_num(-torch.inf).softmax(0)
    seen = (weights * k).sum()
    assert abs(float(seen) - mean) < 0.3 * sd
    assert float((weights * (k - seen).square()).sum().sqrt()) == pytest.approx(sd, rel=0.15)
    ends = torch.tensor([[mean - 2 * sd], [mean], [mean + 2 * sd]])
    assert float(log_z.displacement(ends, num).max()) < 0.35


def test_ten_lattices():
    log_z = anchored_to(
        lattices,
        ten_lattices(),
        family=Ising(0.0, SHAPE),
        natural=natural,
        first=torch.tensor([0.35]),
        num_observations=10,
    )
    check_posterior(log_z, *EXACT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:whether every log Z covers")  # at a draw of the wide prior
@pytest.mark.parametrize("family", [Ising(0.0, SHAPE), Hidden(0.0, SHAPE)], ids=["exact", "sweeps"])
def test_from_afar_and_through_hmc(family):
    """From no coupling at all; the error of the mean is its own and that of log Z."""
    x = ten_lattices()
    log_z = anchored_to(
        lattices,
        x,
        family=family,
        natural=natural,
        first=torch.zeros(1),
        num_observations=10,
        start=torch.ones(SHAPE),
    )
    check_posterior(log_z, *EXACT)
    mcmc = MCMC(HMC(lattices), 200, 200, num_chains=64, disable_progbar=True)
    mcmc.run(log_z, x, initial_params=near(EXACT[0]))
    error = mcse_logz(mcmc, log_z, natural, 10).mcse["k"]["mean"]
    gap = float(mcmc.get_samples()["k"].mean()) - EXACT[0]
    assert abs(gap) < 5 * (float(error) ** 2 + (EXACT[1] / 20.0) ** 2) ** 0.5


def near(k, num_chains=64):
    return {"k": torch.logit(torch.tensor(k)).expand(num_chains)}


def precision(log_z, x):
    k = pyro.sample("k", dist.Gamma(2.0, torch.tensor(1.0)))
    energy = Precision(k)
    law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
    with pyro.plate("n", len(x)):
        pyro.sample("x", law, obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0.3, 12.0])
def test_a_precision_from_both_sides(first):
    """Conjugate: Gamma(2 + n / 2, 1 + S)."""
    x = torch.randn(50) / 3**0.5
    log_z = anchored_to(
        precision,
        x,
        family=Precision(1.0),
        natural=natural,
        first=torch.tensor([first]),
        num_observations=50,
    )
    a, b = 27.0, 1.0 + float(x.square().sum()) / 2
    k = torch.linspace(0.01, 4 * a / b, 2001)
    prior = k.log() - k
    weights = (prior - k * (b - 1.0) - 50 * log_z(k[:, None])).nan_to_num(-torch.inf).softmax(0)
    assert abs(float((weights * k).sum()) - a / b) < 0.3 * a**0.5 / b


def in_groups(log_z, x):
    with pyro.plate("groups", 2):
        k = pyro.sample("k", dist.Uniform(0.0, torch.tensor(1.0)))
        energy = Ising(k, SHAPE)
        law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
        with pyro.plate("n", len(x), dim=-2):
            pyro.sample("x", law, obs=x)


@pytest.mark.slow
def test_groups_are_covered_together():
    """One group of ordered lattices and one of disordered ones."""
    x = torch.stack([ten_lattices(), ten_lattices()], 1)
    x[:, 1, ::2] = -1.0  # stripes
    x[:, 1, 0] = 1.0
    log_z = anchored_to(
        in_groups,
        x,
        family=Ising(0.0, SHAPE),
        natural=lambda draws: draws["k"][..., None],
        first=torch.tensor([0.2]),
        num_observations=10,
    )
    totals = Ising(0.0, SHAPE).statistics(x).sum((0, -1))
    for total in totals.tolist():
        k = torch.linspace(0.0, 1.0, 2001)
        exact = (k * total - 10 * Ising(k, SHAPE).log_normalizer()).softmax(0)
        mean = float((exact * k).sum())
        sd = float((exact * (k - mean).square()).sum().sqrt())
        seen = (k * total - 10 * log_z(k[:, None])).nan_to_num(-torch.inf).softmax(0)
        assert abs(float((seen * k).sum()) - mean) < 0.4 * sd


def test_draws_are_added_until_the_rule_is_met(monkeypatch):
    """A first guess of a quarter of the draws, under the posterior that is known in closed form."""
    num, a = 800, 2.0 + 800 / 2
    rows = dist.Gamma(a, torch.tensor(a / 3.0)).sample((1000, 1))
    cloud = _Cloud(rows, torch.tensor([[1.0 / 18]]))  # x^2 / 2 at a precision of 3
    monkeypatch.setattr(anchoring._Loop, "search", lambda *_: cloud)
    monkeypatch.setattr(anchoring._Loop, "posterior", lambda *_, **__: cloud)
    monkeypatch.setattr(anchoring, "draws_wanted", lambda p, n: draws_wanted(p, n) / 4)
    made = []

    def kept(*args, **options):
        made.append(anchored(*args, **options))
        return made[-1]

    monkeypatch.setattr(anchoring, "anchored", kept)
    log_z = anchored_to(
        precision,
        family=Precision(1.0),
        natural=natural,
        first=torch.tensor([3.0]),
        num_observations=num,
    )
    off = [float(z.displacement(_places(cloud), num).max()) for z in made]
    assert made[-1] is log_z
    assert off[-1] <= MAX_DISPLACEMENT < off[0]
    first, second = (z.statistics[..., 0].numel() for z in made[:2])
    assert second >= 1.5 * first * (off[0] / MAX_DISPLACEMENT) ** 2


# --- its parts


def test_the_rough_log_z_has_the_right_slope_and_curvature():
    centre = torch.tensor([[0.2, 0.1]])
    family = Ising(0.0, SHAPE, field=0.0)
    rough = _Rough(anchored(family, centre, num_draws=20_000))

    def exact(natural):
        return Ising(natural[0], SHAPE, field=natural[1]).log_normalizer()

    slopes = [torch.func.grad(f) for f in (rough, exact)]
    curvatures = [torch.func.jacrev(slope) for slope in slopes]
    for (seen, wanted), tolerance in ((slopes, 0.25), (curvatures, 3.0)):
        torch.testing.assert_close(seen(centre[0]), wanted(centre[0]), rtol=0, atol=tolerance)


def test_anchors_are_draws_and_near_enough_to_overlap():
    """Four standard deviations of a statistic from the mean: two between."""
    rows = 2.0 * torch.special.ndtri((torch.arange(2001) + 0.5) / 2001)[:, None]
    cloud = _Cloud(rows, torch.eye(1))
    sd = float(rows.std())
    assert float(_places(cloud)[-1]) == pytest.approx(2 * sd, abs=0.02)
    anchors = _spread(cloud)
    assert float(anchors.diff(dim=0).max()) <= anchoring.REACH + 0.02
    assert len(anchors) == 7
    assert all(float((rows - a).abs().min()) == 0.0 for a in anchors)


def test_what_does_not_come_about_is_said(monkeypatch):
    options = {"family": Ising(0.0, SHAPE), "natural": natural, "num_observations": 10}
    near, far = torch.tensor([0.37]), torch.tensor([0.0])
    with pytest.raises(ValueError, match=r"natural parameters \(p,\), got \(1, 1\)"):
        anchored_to(lattices, ten_lattices(), first=near[None], **options)
    with pytest.raises(RuntimeError, match="and max_draws is 500: allow for more, or use"):
        anchored_to(lattices, ten_lattices(), first=near, max_draws=500, **options)
    monkeypatch.setattr(anchoring, "_MAX_SEARCH", 1)
    with pytest.raises(RuntimeError, match=r"was not found from first=\[0.0\] in 1 steps"):
        anchored_to(lattices, ten_lattices(), first=far, **options)


def test_a_degenerate_phase_is_named(monkeypatch):
    """Where neighbouring anchors have nothing in common, which the caller did not place."""

    def apart(family, anchors, **options):
        if len(anchors) > 1:
            raise NoOverlapError("the anchors do not overlap")
        return anchored(family, anchors, **options)

    monkeypatch.setattr(anchoring, "anchored", apart)
    with pytest.raises(RuntimeError, match="reaches a degenerate phase.* tighter prior, or mcmc"):
        anchored_to(
            lattices,
            ten_lattices(),
            family=Ising(0.0, SHAPE),
            natural=natural,
            first=torch.tensor([0.3]),
            num_observations=10,
        )
