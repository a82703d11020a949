"""Recording kernels: stock draws bit for bit, and statistics that satisfy their identities."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc import api

from pyro_ebm.chains import Record
from pyro_ebm.mcmc import RecordingHMC, RecordingNUTS

PAIRS = {
    "nuts": (NUTS, RecordingNUTS, {}),
    "nuts-slice": (NUTS, RecordingNUTS, {"use_multinomial_sampling": False, "full_mass": True}),
    "hmc": (HMC, RecordingHMC, {"step_size": 0.3, "num_steps": 4}),
}
COMMON = {"lp", "energy", "energy_error", "acceptance_rate", "n_steps", "step_size", "diverging"}


def hierarchical(y):
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(pyro.sample("mean", dist.Normal(0.0, scale)), 1.0), obs=y)


def gaussian(z):
    return 0.5 * (z["x"] ** 2).sum()


def run(kernel, *args, num_samples=40, warmup=20, seed=3, **options):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(kernel, num_samples, warmup, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def run_gaussian(kernel_class, dim=4, num_samples=60, warmup=0, seed=3, **options):
    start = {"x": torch.zeros(dim, dtype=torch.float64)}
    kernel = kernel_class(
        potential_fn=gaussian, adapt_step_size=False, adapt_mass_matrix=False, **options
    )
    return run(kernel, num_samples=num_samples, warmup=warmup, seed=seed, initial_params=start)


def stats_of(mcmc, chain=0):
    return mcmc.diagnostics()["sample_stats"][f"chain {chain}"]


@pytest.mark.parametrize("name", PAIRS)
def test_draws_are_those_of_the_stock_kernel(name):
    stock, recording, options = PAIRS[name]
    y = torch.tensor([0.3, -1.0, 2.0])
    a, state_a = run(stock(hierarchical, **options), y), torch.get_rng_state()
    b, state_b = run(recording(hierarchical, **options), y), torch.get_rng_state()
    for site, draws in a.get_samples().items():
        assert torch.equal(draws, b.get_samples()[site])
    assert torch.equal(state_a, state_b)
    for key in ("divergences", "acceptance rate"):
        assert a.diagnostics()[key] == b.diagnostics()[key]
    assert set(stats_of(b)) >= COMMON


@pytest.mark.parametrize("name", PAIRS)
def test_lp_is_minus_the_potential_of_the_unconstrained_draw(name):
    _, recording, options = PAIRS[name]
    seen = []

    def note(kernel, params, stage, i):
        seen.append(-kernel.potential_fn(params).item())

    kernel = recording(hierarchical, **options)
    mcmc = run(kernel, torch.zeros(3), warmup=10, hook_fn=note)
    recorded = Record.from_mcmc(mcmc)
    np.testing.assert_array_equal(seen[:10], recorded.warmup_stats["lp"][0])
    np.testing.assert_array_equal(seen[10:], recorded.sample_stats["lp"][0])


@pytest.mark.parametrize("kernel", [RecordingHMC, RecordingNUTS])
def test_energy_is_the_hamiltonian_at_the_start(kernel):
    dim, n = 4, 300
    mcmc = run_gaussian(kernel, dim, n, step_size=0.5)
    stats = stats_of(mcmc)
    # Fresh momenta are standard normal and independent of everything before: K is chi2(dim) / 2.
    kinetic = stats["energy"] + np.concatenate([[0.0], stats["lp"][:-1]])
    assert kinetic.min() > 0
    z = (kinetic.mean() - dim / 2) / math.sqrt(dim / 2 / n)
    assert abs(z) < 5
    # The power: a Hamiltonian that lacks half a degree of freedom would be seen.
    assert abs(z - 0.5 / math.sqrt(dim / 2 / n)) > 5
    # The end of the trajectory has a kinetic energy too.
    moved = np.diff(stats["lp"], prepend=0.0) != 0
    assert (stats["energy"] + stats["energy_error"] + stats["lp"])[moved].min() > 0


@pytest.mark.parametrize("warmup", [0, 7])
def test_hmc_acceptance_follows_from_the_energy_error(warmup):
    stats = stats_of(run_gaussian(RecordingHMC, warmup=warmup, step_size=1.7, num_steps=3))
    expected = np.minimum(1.0, np.exp(-stats["energy_error"]))
    np.testing.assert_allclose(stats["acceptance_rate"], expected, rtol=1e-9, atol=0)
    moved = np.diff(stats["lp"]) != 0
    assert (stats["acceptance_rate"][1:][~moved] < 1).all()
    assert 0 < moved.mean() < 1


@pytest.mark.parametrize("warmup", [0, 9])
@pytest.mark.parametrize("kernel", [RecordingHMC, RecordingNUTS])
def test_running_mean_of_the_progress_bar_is_left_right(kernel, warmup):
    """It starts anew after the warm-up."""
    shown = []
    mcmc = run(
        kernel(potential_fn=gaussian, step_size=1.5, adapt_step_size=False),
        warmup=warmup,
        initial_params={"x": torch.zeros(4, dtype=torch.float64)},
        hook_fn=lambda k, *_: shown.append(k._mean_accept_prob),
    )
    found = mcmc.diagnostics()
    for stage, means in (("warmup_stats", shown[:warmup]), ("sample_stats", shown[warmup:])):
        acceptance = found[stage]["chain 0"].get("acceptance_rate", np.ones(0))
        np.testing.assert_allclose(means, np.cumsum(acceptance) / np.arange(1, len(means) + 1))
    assert acceptance.min() < 0.9


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(RecordingNUTS, {}), (RecordingHMC, {"num_steps": 5})],
)
def test_n_steps_counts_the_gradients(kernel, options):
    calls, at_draw = [0], []

    def counted(z):
        calls[0] += 1
        return gaussian(z)

    run(
        kernel(potential_fn=counted, step_size=0.3, adapt_step_size=False, **options),
        num_samples=15,
        warmup=0,
        initial_params={"x": torch.ones(2, dtype=torch.float64)},
        hook_fn=lambda k, *_: at_draw.append((calls[0], k._rows[-1]["n_steps"])),
    )
    evaluations, steps = np.array(at_draw).T
    np.testing.assert_array_equal(np.diff(evaluations), steps[1:])


def test_tree_depth_bounds_the_steps_and_saturation_is_seen():
    free = stats_of(run_gaussian(RecordingNUTS, step_size=0.3))
    assert (free["n_steps"] <= 2.0 ** free["tree_depth"] - 1).all()
    assert (free["n_steps"] >= 2.0 ** (free["tree_depth"] - 1)).all()
    assert not free["reached_max_treedepth"].any()
    cut = stats_of(run_gaussian(RecordingNUTS, step_size=1e-3, max_tree_depth=3))
    assert cut["reached_max_treedepth"].all()
    assert (cut["n_steps"] == 7).all()


@pytest.mark.parametrize("kernel", [RecordingNUTS, RecordingHMC])
def test_step_size_is_the_one_of_the_transition(kernel):
    """Not the one that adaptation leaves for the next."""
    after = []
    mcmc = run(
        kernel(potential_fn=gaussian),
        num_samples=5,
        warmup=30,
        initial_params={"x": torch.zeros(4, dtype=torch.float64)},
        hook_fn=lambda k, *_: after.append(float(k.step_size)),
    )
    found = mcmc.diagnostics()
    warming, sampling = (found[f"{stage}_stats"]["chain 0"] for stage in ("warmup", "sample"))
    recorded = np.concatenate([warming["step_size"], sampling["step_size"]])
    np.testing.assert_array_equal(recorded[1:], after[:-1])
    assert (np.diff(after[:30]) != 0).sum() > 20


@pytest.mark.parametrize("depth", [1, 3])
def test_a_divergence_in_the_last_doubling_is_no_saturation(depth):
    """A step of length 1000 gains far more energy than Pyro allows, at the first leaf."""
    wild = stats_of(
        run_gaussian(RecordingNUTS, num_samples=10, step_size=1e3, max_tree_depth=depth)
    )
    assert wild["diverging"].all()
    assert not wild["reached_max_treedepth"].any()


@pytest.mark.parametrize("kernel", [RecordingNUTS, RecordingHMC])
def test_diverging_marks_the_divergences_pyro_lists(kernel):
    def steep(z):
        return 50.0 * (z["x"] ** 4).sum()

    sampler = kernel(potential_fn=steep, step_size=0.9, adapt_step_size=False)
    mcmc = run(sampler, warmup=5, initial_params={"x": torch.full((3,), 0.2)})
    listed = mcmc.diagnostics()["divergences"]["chain 0"]
    assert listed
    np.testing.assert_array_equal(np.flatnonzero(stats_of(mcmc)["diverging"]), listed)


def test_warmup_is_kept_apart_and_chains_do_not_share():
    mcmc = run(RecordingNUTS(hierarchical), torch.zeros(3), num_samples=7, warmup=5, num_chains=1)
    record = Record.from_mcmc(mcmc)
    assert record.sample_stats["lp"].shape == (1, 7)
    assert record.warmup_stats["step_size"].shape == (1, 5)
    assert "diverging" not in record.warmup_stats
    assert len(np.unique(record.warmup_stats["step_size"])) > 1
    assert len(np.unique(record.sample_stats["step_size"])) == 1


@pytest.mark.filterwarnings("ignore:num_chains=2 is more than available_cpu")
def test_a_kernel_serves_chains_one_after_the_other():
    mcmc = run(RecordingNUTS(hierarchical), torch.zeros(3), num_samples=6, warmup=4, num_chains=2)
    record = Record.from_mcmc(mcmc)
    assert record.sample_stats["lp"].shape == (2, 6)
    assert (record.sample_stats["lp"][0] != record.sample_stats["lp"][1]).any()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_statistics_come_home_from_worker_processes(monkeypatch):
    y = torch.zeros(3)
    alone = run(RecordingNUTS(hierarchical), y, num_samples=12, warmup=8)
    monkeypatch.setattr(api.mp, "cpu_count", lambda: 3)
    options = {"num_chains": 2, "mp_context": "fork"}
    parallel = run(RecordingNUTS(hierarchical), y, num_samples=12, warmup=8, **options)
    assert isinstance(parallel.sampler, api._MultiSampler)
    for name, values in stats_of(alone).items():
        np.testing.assert_array_equal(values, stats_of(parallel, 0)[name])
    assert (stats_of(parallel, 0)["lp"] != stats_of(parallel, 1)["lp"]).any()
    assert Record.from_mcmc(parallel).sample_stats["energy"].shape == (2, 12)


def test_a_model_without_latents_is_recorded():
    def observed_only():
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    kernel = RecordingNUTS(observed_only)
    kernel.setup(0)
    assert kernel.sample(kernel.initial_params) == {}
    row = kernel.diagnostics()["sample_stats"]
    assert row["acceptance_rate"] == 1
    assert row["n_steps"] == 0
    assert row["lp"] == pytest.approx(-0.5 * (1 + math.log(2 * math.pi)))


def test_pyro_still_has_the_fields_that_are_read():
    fields = {
        "_t",
        "_warmup_steps",
        "_mean_accept_prob",
        "_divergences",
        "_z_last",
        "_potential_energy_last",
    }
    nuts = NUTS(potential_fn=gaussian)
    assert fields <= set(vars(nuts))
    assert isinstance(nuts._max_tree_depth, int)
    tree = ["z", "r", "z_grads", "log_slice", "direction", "tree_depth", "energy_current"]
    leaf = [name for name in tree if name != "tree_depth"]
    assert list(inspect.signature(NUTS._build_tree).parameters) == ["self", *tree]
    assert list(inspect.signature(NUTS._build_basetree).parameters) == ["self", *leaf]
    assert list(inspect.signature(HMC._kinetic_energy).parameters) == ["self", "r_unscaled"]
    mcmc = MCMC(NUTS(hierarchical), 1, 0)
    assert {"_diagnostics", "_args", "_kwargs"} <= set(vars(mcmc))
