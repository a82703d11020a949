"""The error that anchors add to a posterior, against that of repeats of the anchors."""

import json

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from anchor_repeats import PROBLEMS, SHAPE, z_of_repeats

from pyro_ebm.chains import Record, summary, to_arviz
from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.normalizers import anchored, base_importance
from pyro_ebm.normalizers.anchor_error import _quantile, _thinned, mcse_logz

# Posteriors are summed over grids that go on where the anchors say nothing.
pytestmark = pytest.mark.filterwarnings("ignore:log Z was asked")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_error_is_that_of_repeats(problem):
    """12 repeats, whose spread is known to a fifth: errors off by a factor of 2.5 would be seen."""
    z = z_of_repeats(problem, 12)
    assert bool((z.mean(0).abs() < 5 * z.std(0) / 12**0.5).all())
    assert bool(((z.std(0) > 0.4) & (z.std(0) < 2.0)).all())


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_error_covers_the_truth(problem):
    """Of 100 repeats, each error from 80 replicates; gated at four binomial errors."""
    covered = (z_of_repeats(problem, 100, num_replicates=80).abs() < 1.96).double().mean(0)
    assert bool((covered >= 0.95 - 4 * (0.95 * 0.05 / 100) ** 0.5).all())


def test_more_observations_and_fewer_draws_have_more_error():
    """The error in posterior standard deviations is sqrt(n / S): here .1 and .32."""
    seen = []
    for num, num_draws in ((10, 1000), (100, 1000)):
        k, sd = torch.tensor(0.25), (num * 30.0) ** -0.5
        log_z = anchored(Ising(0.0, SHAPE), k.reshape(1, 1), num_draws=num_draws)
        draws = {"k": k + sd * torch.randn(10, 50)}
        error = mcse_logz(draws, log_z, lambda d: d["k"][:, None], num)
        seen.append(float(error.mcse["k"]["mean"]) / sd)
    variance = float(Ising(k, SHAPE).statistics(Ising(k, SHAPE).sample((4000,))).var())
    scale = (variance / 30.0) ** 0.5
    assert seen == pytest.approx([0.1 * scale, 0.1**0.5 * scale], rel=0.35)


def test_groups_add_up():
    """Two groups with one parameter are one with twice the observations."""
    log_z = anchored(Ising(0.0, SHAPE), torch.tensor([[0.25]]), num_draws=1000)
    draws = {"k": 0.25 + 0.04 * torch.randn(10, 100)}
    seen = []
    for natural, num in (
        (lambda d: d["k"][:, None], 10),
        (lambda d: d["k"][:, None, None].expand(-1, 2, 1), torch.tensor([7.0, 3.0])),
    ):
        torch.manual_seed(1)
        seen.append(mcse_logz(draws, log_z, natural, num).mcse["k"]["mean"])
    np.testing.assert_allclose(*seen)


def test_an_error_that_is_too_large_is_doubted():
    """30 draws of the anchors for 200 lattices displace by 2.6 standard deviations."""
    log_z = anchored(Ising(0.0, SHAPE), torch.tensor([[0.25]]), num_draws=30)
    draws = {"k": 0.25 + 0.013 * torch.randn(10, 100)}
    error = mcse_logz(draws, log_z, lambda d: d["k"][:, None], 200)
    assert "reweighting leaves" in error.doubts[0]
    assert "reweighting leaves" in error.attached_to(draws).attrs["mcse_logz_doubts"]


def test_a_posterior_that_is_cut_off_is_doubted():
    """One that ends an sd above its mean; one far from there, and a narrow one near it, do not."""
    base = dist.Normal(0.0, 1.0)
    log_z = base_importance(base, num_draws=1000).by(
        lambda t: EnergyDistribution(
            lambda x: 0.5 * t[..., 0] * x**2, base=base, batch_shape=t.shape[:-1]
        ),
        1,
    )
    grid = torch.linspace(100.0, 3000.0, 300)
    edge = float(grid[log_z(grid[:, None]).isfinite()].max())
    seen = []
    for mean, sd in ((0.9, 0.1), (0.4, 0.05), (0.75, 0.005)):
        t = edge * (mean + sd * torch.randn(300))
        kept = t[log_z(t[:, None]).isfinite()][:200]
        error = mcse_logz({"t": kept[None]}, log_z, lambda d: d["t"][:, None], 5)
        seen.append(["the posterior is cut off there" in doubt for doubt in error.doubts])
    assert seen == [[True], [], []]


def test_a_weighted_quantile():
    """Of 1, 2, 3 with weights .25, .5, .25: the middles are at .125, .5 and .875."""
    weights = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]])
    ordered = torch.tensor([1.0, 2.0, 3.0])
    assert _quantile(ordered, weights, 0.5).tolist() == [2.0, 2.0]
    assert _quantile(ordered, weights, 0.05).tolist() == [1.0, 1.0]
    assert float(_quantile(ordered, weights, 0.6875)[0]) == pytest.approx(2.5)


def test_it_is_a_column_of_the_summary():
    log_z = anchored(Ising(0.0, SHAPE, field=0.0), torch.tensor([[0.2, 0.1]]), num_draws=500)
    draws = {
        "scope/k": 0.2 + 0.02 * torch.randn(4, 100, 1, 2),
        "which": torch.zeros(4, 100, dtype=torch.long),
    }
    record = Record(draws, attrs={"seen": 1})
    error = mcse_logz(record, log_z, lambda d: d["scope/k"][:, 0], 20)
    table = summary(error.attached_to(record))
    wanted = error.mcse["scope/k"]["mean"]
    assert table.loc["scope.k[0, 1]", "mcse_logz"] == float(wanted[0, 1]) > 0
    assert np.isnan(table.loc["which", "mcse_logz"])
    assert "mcse_logz" not in summary(record).columns
    data = to_arviz(error.attached_to(record))
    assert json.loads(data.posterior.attrs["mcse_logz"])["scope/k[0, 0]"] == float(wanted[0, 0])
    assert data.posterior.attrs["seen"] == 1


@pytest.mark.filterwarnings("ignore:log Z was asked at parameters")
def test_bad_input():
    log_z = anchored(Ising(0.0, (5, 5)), torch.tensor([[0.2]]), num_draws=300)
    draws = {"k": 0.2 + 0.02 * torch.randn(4, 50)}
    with pytest.raises(ValueError, match=r"natural must return \(200, ..., 1\)"):
        mcse_logz(draws, log_z, lambda d: d["k"], 5)
    with pytest.raises(ValueError, match="not told at some of the draws"):
        mcse_logz(draws, log_z, lambda d: 9.0 + d["k"][:, None], 5)
    with pytest.raises(ValueError, match="quantiles must lie strictly between"):
        mcse_logz(draws, log_z, lambda d: d["k"][:, None], 5, quantiles=(5,))


def test_a_share_of_the_draws_is_taken_from_all_chains():
    record = Record({"k": np.arange(1000.0).reshape(10, 100)})
    kept = _thinned(record, 100)["k"]
    assert len(kept) == 100
    assert bool((torch.bincount((kept / 100).long()) == 10).all())
    assert len(_thinned(record, 5000)["k"]) == 1000
