"""A posterior through log Z by draws at anchors, against the exact one by enumeration."""

from importlib import import_module

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.chains import Record
from pyro_ebm.energies import Ising
from pyro_ebm.errors import MissingNormalizerError
from pyro_ebm.infer.bayes.anchored_posterior import (
    WithLogNormalizer,
    _displacement,
    _Laws,
    anchored_posterior,
)
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.mcmc.exchange.exchange_target import exchange_target
from pyro_ebm.normalizers.anchor_error import AnchorError
from pyro_ebm.ops.kaufman import torus_log_normalizer


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(3)
    torch.set_default_dtype(torch.float64)


class Hidden(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


def lattices(x):
    """Some lattices that share a coupling."""
    coupling = pyro.sample("coupling", dist.Uniform(x.new_zeros(()), 0.6))
    with pyro.plate("lattices", len(x)):
        pyro.sample("x", EnergyDistribution(Hidden(coupling, x.shape[1:])), obs=x)


def two_sites(x):
    coupling = pyro.sample("coupling", dist.Uniform(x.new_zeros(()), 0.6))
    for name in ("x", "y"):
        pyro.sample(name, EnergyDistribution(Hidden(coupling, (4, 4))), obs=x)


def by_quadrature(x):
    k = torch.linspace(0.0, 0.6, 4001)
    bonds = Ising(0.0, x.shape[1:]).statistics(x).sum()
    weights = (k * bonds - len(x) * torus_log_normalizer(k, x.shape[1:])).softmax(0)
    mean = float(weights @ k)
    return mean, float((weights @ (k - mean).square()).sqrt())


SIZES = {"num_samples": 100, "warmup_steps": 100, "num_chains": 32}


@pytest.mark.slow
def test_lattices_that_share_a_coupling():
    x = Ising(0.3, (4, 4)).sample((5,))
    found = anchored_posterior(lattices, x, first=torch.tensor([0.25]), **SIZES)
    check(x, found)
    with pytest.raises(MissingNormalizerError, match="up to a constant only"):
        found.to_arviz(model=lattices, args=(x,), log_likelihood=True)


@pytest.mark.slow
def test_the_posterior_is_found_from_the_centre_of_the_space():
    x = Ising(0.3, (4, 4)).sample((5,))
    check(x, posterior(lattices, x, method="anchored", **SIZES))


def check(x, found):
    """Within five standard errors of chains and anchors; a mean a third of an sd off is seen."""
    row = found.summary().loc["coupling"]
    mean, sd = by_quadrature(x)
    error = (row["mcse_mean"] ** 2 + row["mcse_logz"] ** 2) ** 0.5
    assert abs(row["mean"] - mean) < 5 * error
    assert error < sd / 15
    assert abs(row["sd"] / sd - 1.0) < 0.1
    assert "anchored log Z" in str(found)
    assert f"by {row['mcse_logz'] / row['sd']:.2f} posterior sds at most" in str(found)


def test_a_site_is_scored_with_the_log_z_that_is_given():
    law = EnergyDistribution(Hidden(torch.tensor(0.3), (4, 4)))
    x = torch.ones(4, 4)
    scored = WithLogNormalizer(lambda natural: 7.0 * natural[..., 0]).site_log_prob("x", law, x)
    torch.testing.assert_close(scored, 0.3 * torch.tensor(32.0) - 2.1)
    known = EnergyDistribution(Ising(torch.tensor(0.3), (4, 4)))
    kept = WithLogNormalizer(lambda natural: 7.0 * natural[..., 0]).site_log_prob("x", known, x)
    torch.testing.assert_close(kept, known.log_prob(x))


def test_laws_are_counted_by_their_rows():
    """Two groups of rows with a coupling each, of which one row is masked."""

    def model(x):
        with pyro.plate("groups", 2, dim=-1):
            coupling = pyro.sample("coupling", dist.Uniform(x.new_zeros(()), 0.6))
            mask = torch.tensor([[True, True], [True, False], [True, True]])
            with pyro.plate("rows", 3, dim=-2), pyro.poutine.mask(mask=mask):
                pyro.sample("x", EnergyDistribution(Hidden(coupling, (3, 3))), obs=x)

    target = exchange_target(model, (torch.ones(3, 2, 3, 3),), {})
    laws = _Laws.of(target, "x")
    assert sorted(laws.counts.tolist()) == [2.0, 3.0]
    q = target.draw_start(4)
    natural = laws.of_rows(target.naturals(q)["x"])
    assert natural.shape == (4, 2, 1)
    wanted = target.constrain(q)["coupling"]
    torch.testing.assert_close(natural[..., 0].sort(-1).values, wanted.sort(-1).values)


def test_the_group_with_most_rows_sets_the_number_of_draws(monkeypatch):
    """log Z enters three times in one group and once in the other."""
    asked = []

    def noted(*args, **options):
        asked.append(options["num_observations"])
        raise RuntimeError("far enough")

    def model(x):
        with pyro.plate("groups", 2, dim=-1):
            coupling = pyro.sample("coupling", dist.Uniform(x.new_zeros(()), 0.6))
            mask = torch.tensor([[True, True], [True, False], [True, False]])
            with pyro.plate("rows", 3, dim=-2), pyro.poutine.mask(mask=mask):
                pyro.sample("x", EnergyDistribution(Hidden(coupling, (3, 3))), obs=x)

    monkeypatch.setattr(
        import_module("pyro_ebm.infer.bayes.anchored_posterior"), "anchored_to", noted
    )
    with pytest.raises(RuntimeError, match="far enough"):
        anchored_posterior(model, torch.ones(3, 2, 3, 3))
    assert asked == [3]


def test_the_largest_displacement_is_told():
    """Errors of log Z of .1 and 1.2 beside posterior sds of 1 and 2, and of .1 beside .2."""
    unit = np.array([[-1.0, 1.0]])
    record = Record({"a": np.stack([unit, 2 * unit], -1), "b": 0.2 * unit})
    mcse = {"a": {"mean": np.array([0.1, 1.2])}, "b": {"mean": np.array(0.1)}}
    sentence = _displacement(record, AnchorError(mcse, np.array([1.0]), 2))
    assert "displaces means by 0.60 posterior sds at most, that of 'a'" in sentence


def test_several_sites_are_refused():
    with pytest.raises(ValueError, match="anchors need one observed EBM site"):
        anchored_posterior(two_sites, torch.ones(4, 4))
