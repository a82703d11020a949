"""An error of log Z counts for each row that it is subtracted for; that of too many rows is told.

Displacements are held against the rule itself, sqrt(p n / S), with n counted by hand and S by the
function's own :meth:`effective_size`.
"""

import math
import sys
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers import anchored, base_importance, evidence, gauss_hermite
from pyro_ebm.normalizers.held_nodes import MAX_ERROR, MAX_SUM
from pyro_ebm.ops.watch import WINDOW, Watch, listening

SHAPE = (4, 4)
TOLD = "displace the posterior of so many rows"
NUM_ROWS = 2000  # of which 2000 draws say too little, and of twenty more than enough
BEYOND = "ignore:log Z was asked"  # chains may look further than draws hold


@pytest.fixture(autouse=True)
def fresh(fresh_state):
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)


def held():
    return anchored(Ising(0.0, SHAPE), torch.tensor([[0.2], [0.3]]), num_draws=1000)


def lattices(log_z, x):
    k = pyro.sample("k", dist.Normal(0.25, 0.05))
    energy = Ising(k, SHAPE)
    law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", law, obs=x)


def by_pyro(model, *args):
    PyroMCMC(NUTS(model), 60, 60, disable_progbar=True).run(*args)


def by_ours(model, *args):
    MCMC(HMC(model), 60, 60, num_chains=4, disable_progbar=True).run(*args)


def by_svi(model, *args):
    guide = AutoNormal(model, init_scale=0.01)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), Trace_ELBO())
    for _ in range(WINDOW + 50):
        svi.step(*args)


@pytest.mark.filterwarnings(BEYOND, "ignore:R-hat", "ignore:.*bulk ESS")
@pytest.mark.parametrize("run", [by_pyro, by_ours, by_svi])
def test_too_many_rows_are_told_however_log_z_is_used(run):
    with pytest.warns(UserWarning, match=TOLD):
        run(partial(lattices, held()), Ising(0.25, SHAPE).sample((NUM_ROWS,)))


@pytest.mark.filterwarnings(BEYOND, "ignore:R-hat", "ignore:.*bulk ESS")
@pytest.mark.parametrize("run", [by_pyro, by_ours, by_svi])
def test_few_rows_are_let_pass(run):
    run(partial(lattices, held()), Ising(0.25, SHAPE).sample((20,)))


def displacements(law, x):
    with listening() as heard:
        law.log_prob(x)
    (values,) = heard.values()
    return values


@pytest.mark.parametrize("lead", [(), (1,), (50,)])
def test_rows_of_one_law_are_counted(lead):
    """Whether the plate has expanded its parameters or not."""
    log_z, x = held(), Ising(0.25, SHAPE).sample((50,))
    energy = Ising(torch.full(lead, 0.25), SHAPE)
    law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
    size = float(log_z.effective_size(torch.tensor([0.25])))
    assert displacements(law, x) == pytest.approx([math.sqrt(50 / size)], rel=1e-9)


def test_rows_of_a_group_are_counted_and_not_those_of_others():
    log_z, x = held(), Ising(0.25, SHAPE).sample((50, 2))
    energy = Ising(torch.tensor([0.25, 0.22]), SHAPE)
    law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
    size = float(log_z.effective_size(torch.tensor([0.25])))
    assert displacements(law, x) == pytest.approx([math.sqrt(50 / size)], rel=1e-9)


def test_all_parameters_are_counted():
    log_z = anchored(Ising(0.0, SHAPE, field=0.0), torch.tensor([[0.2, 0.0]]), num_draws=500)
    energy = Ising(0.2, SHAPE, field=0.0)
    law = EnergyDistribution(energy, log_normalizer=lambda: log_z(energy.natural()))
    size = float(log_z.effective_size(energy.natural()))
    found = displacements(law, energy.sample((50,)))
    assert found == pytest.approx([math.sqrt(2 * 50 / size)], rel=1e-9)


def tilted(t, base):
    return EnergyDistribution(lambda x: 0.5 * t * x**2, base)


def test_draws_of_a_base_are_told_of():
    base = dist.Normal(0.0, 1.0)
    log_z = base_importance(base, num_draws=500)
    bare = tilted(0.5, base)
    law = bare.with_log_normalizer(lambda: log_z(bare))
    found = displacements(law, torch.zeros(30))
    assert found == pytest.approx([math.sqrt(30 / float(log_z.effective_size(bare)))], rel=1e-9)


@pytest.mark.parametrize(("num_rows", "is_told"), [(10_000, True), (10, False)])
def test_what_nodes_are_off_is_summed_over_rows(num_rows, is_told, monkeypatch):
    """An error of 3e-4 nats a row passes in a model, and is 3 nats in ten thousand rows."""
    nodes = sys.modules["pyro_ebm.normalizers.gauss_hermite"]._NODES
    monkeypatch.setattr(nodes, "_served", Watch(MAX_SUM, nodes._sentence))
    law = tilted(6.0, dist.Normal(0.0, 1.0))
    log_z = gauss_hermite(law, num_nodes=40)
    assert 1e-4 < float(log_z.stderr) < MAX_ERROR
    law, x = law.with_log_normalizer(log_z), torch.zeros(num_rows)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(WINDOW):
            law.log_prob(x)
    assert ["in the sum over all rows" in str(w.message) for w in told] == [True] * is_told


@pytest.mark.filterwarnings(BEYOND)
def test_evidence_tells_the_error_itself():
    """It resamples the draws: a warning of each of its steps would be about no posterior."""
    log_z, x = held(), Ising(0.25, SHAPE).sample((5,))
    with listening() as heard:
        evidence(partial(lattices, log_z), x, method="stepping_stones")
    assert not heard


def fed(watch, *values):
    """Warnings of a watch that sees each of these values for a window."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for value in values:
            for _ in range(WINDOW):
                watch.take(torch.tensor(value))
    return [str(w.message) for w in told]


def test_warnings_come_again_only_where_it_is_much_worse():
    found = fed(Watch(0.3, "off by {}".format), 0.2, 1.0, 1.5, 5.0, 5.0, 0.2)
    assert found == ["off by 1.0", "off by 5.0"]


def test_the_middle_is_what_counts():
    """A chain looks at places far off, and its posterior is none of them."""
    watch = Watch(0.3, "off by {}".format)
    for i in range(WINDOW):
        watch.take(torch.tensor(5.0 if i < WINDOW // 3 else 0.2))
    watch.take(torch.tensor(math.nan))
    assert watch.num_warnings == 0
