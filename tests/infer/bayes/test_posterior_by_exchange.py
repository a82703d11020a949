"""The way by exchange: groups in loops, draws that do not end, and what it says of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import Precision

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.infer.bayes import posterior_ways
from pyro_ebm.infer.bayes.data_structure import data_structure
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.infer.bayes.posterior_remarks import why_together
from pyro_ebm.mcmc.exchange import auxiliary

FEW = {"num_samples": 10, "warmup_steps": 10, "num_chains": 8}


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(3)


class Hidden(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


def lattices_in_a_loop(xs, *, uneven=False):
    """Lattices of different sizes, each with a coupling of its own."""
    mean = pyro.sample("mean", dist.Normal(torch.tensor(0.2), 0.1))
    for g in pyro.plate("nets", len(xs)):
        k = pyro.sample(f"k_{g}", dist.Normal(mean, 0.1))
        if uneven and g == 1:
            k = k + pyro.sample("more", dist.Normal(torch.tensor(0.0), 0.1))
        pyro.sample(f"x_{g}", EnergyDistribution(Hidden(k, xs[g].shape)), obs=xs[g])


SIZES = [torch.ones(3, 3), -torch.ones(4, 5)]


def test_groups_in_a_loop_are_accepted_one_by_one():
    found = posterior(lattices_in_a_loop, SIZES, **FEW)
    assert found.method == "exchange"
    assert "groups of plate 'nets' are accepted one by one." in found.reasons
    assert "group_acceptance_rate" in found.record.sample_stats


def test_uneven_turns_are_accepted_together():
    structure = data_structure(lattices_in_a_loop, SIZES, uneven=True)
    assert (structure.kind, structure.groups) == ("hierarchical", None)
    (told,) = why_together(structure)
    assert "the turns of loop 'nets' hold latents of different sizes" in told


# --- how rows could be accepted


def by_index(x, group):
    """Rows that pick the precision of their group."""
    with pyro.plate("groups", 3):
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(Precision(precision[group])), obs=x)


def inside(x, group):
    """The same, padded under a mask."""
    counts = group.bincount()
    padded = torch.nn.utils.rnn.pad_sequence([x[group == g] for g in range(3)])
    seen = torch.arange(len(padded))[:, None] < counts
    with pyro.plate("groups", 3, dim=-1):
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
        with pyro.plate("rows", len(padded), dim=-2), pyro.poutine.mask(mask=seen):
            pyro.sample("x", EnergyDistribution(Precision(precision)), obs=padded)


def test_rows_that_pick_are_told_of_their_plate():
    x, group = torch.randn(7), torch.tensor([0, 0, 1, 2, 2, 2, 1])
    told, *_ = posterior(by_index, x, group, method="exchange", **FEW).remarks
    assert "takes one element of plate 'groups'" in told
    assert "padded under a mask" in told
    assert data_structure(inside, x, group).groups == "groups"
    assert why_together(data_structure(inside, x, group)) == ()


# --- exact draws that do not end


def wide(x):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(Ising(coupling, (9, 9), field=0.1)), obs=x)


def test_draws_that_do_not_end_give_way_to_sweeps_for_the_whole_run(monkeypatch):
    monkeypatch.setattr(auxiliary, "PATIENCE", 4)
    monkeypatch.setattr(posterior_ways, "LONG_SWEEPS", 3)
    found = posterior(wide, torch.ones(9, 9), **FEW)
    assert found.method == "exchange by sweeps"
    assert any("take too long at some couplings" in reason for reason in found.reasons)
    assert any("by 3 sweeps from the data" in remark for remark in found.remarks)
    assert any("a prior that leaves out couplings" in remark for remark in found.remarks)
    saved = found.to_arviz().posterior.attrs
    assert saved["adjusted"] == 0
    assert any(saved["exchange_verdict"] in remark for remark in found.remarks)
    assert "by 3 sweeps from the data" in saved["exchange_auxiliary"]
    assert saved["exchange_acd_threshold"] > 0
    assert 0 < saved["exchange_aiks_pvalue"] <= 1
    assert "has not been asked" not in saved["bias"]


class WithoutSweeps(Ising):
    """Exact draws of a law that has no kernel."""

    has_sweep = False


def test_where_nothing_else_draws_it_is_an_error(monkeypatch):
    def model(x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        pyro.sample("x", EnergyDistribution(WithoutSweeps(coupling, (9, 9), field=0.1)), obs=x)

    monkeypatch.setattr(auxiliary, "PATIENCE", 4)
    with pytest.raises(RuntimeError, match="did not couple within 4 sweeps"):
        posterior(model, torch.ones(9, 9), **FEW)
