"""The record: shapes, chain order, round trips, and what stock Pyro's runs give."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, RandomWalkKernel
from pyro.infer.mcmc import StreamingMCMC

from pyro_ebm.chains import Record, as_record
from pyro_ebm.mcmc import RecordingHMC

SEQUENTIAL = "ignore:num_chains=.* is more than available_cpu"


def model():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("s", dist.HalfNormal(1.0))


def steep(z):
    return 50.0 * (z["x"] ** 4).sum()


def full_record():
    rng = np.random.default_rng(0)
    return Record(
        {"x": rng.normal(size=(2, 5, 3)), "scope/k": rng.integers(0, 9, size=(2, 5))},
        sample_stats={"lp": rng.normal(size=(2, 5)), "diverging": rng.random((2, 5)) < 0.5},
        warmup_draws={"x": rng.normal(size=(2, 4, 3)).astype(np.float32)},
        warmup_stats={"step_size": rng.random((2, 4))},
        sampler="ULA",
        adjusted=False,
        inverse_temperature=0.5,
        approximate=True,
        seconds=1.25,
        attrs={"note": "cold", "rates": [0.5, 0.25]},
    )


def test_saved_records_come_back_exactly(tmp_path):
    record = full_record()
    path = tmp_path / "run.record"
    record.save(path)
    loaded = Record.load(path)
    assert loaded.metadata() == record.metadata()
    for group in ("draws", "sample_stats", "warmup_draws", "warmup_stats"):
        before, after = getattr(record, group), getattr(loaded, group)
        assert list(before) == list(after)
        for name, values in before.items():
            assert after[name].dtype == values.dtype
            np.testing.assert_array_equal(after[name], values)


def test_tensors_become_arrays_and_counts_are_read_off():
    record = Record({"x": torch.zeros(3, 7, 2, requires_grad=True)})
    assert isinstance(record.draws["x"], np.ndarray)
    assert (record.num_chains, record.num_samples) == (3, 7)


@pytest.mark.parametrize(
    ("draws", "stats"),
    [
        ({}, {}),
        ({"x": np.zeros(5)}, {}),
        ({"x": np.zeros((2, 5)), "y": np.zeros((2, 6))}, {}),
        ({"x": np.zeros((2, 5))}, {"lp": np.zeros((2, 4))}),
    ],
)
def test_shapes_that_disagree_are_refused(draws, stats):
    with pytest.raises(ValueError, match="Record: "):
        Record(draws, sample_stats=stats)


@pytest.mark.filterwarnings(SEQUENTIAL)
def test_twelve_chains_stay_in_their_numeric_order():
    # Every chain starts, and with a vanishing step stays, at its own number.
    start = {"x": torch.arange(12.0)[:, None]}
    for kernel in (HMC, RecordingHMC):
        sampler = kernel(
            potential_fn=lambda z: 1e-3 * z["x"].sum(),
            step_size=1e-6,
            num_steps=1,
            adapt_step_size=False,
        )
        mcmc = MCMC(sampler, 3, 0, num_chains=12, initial_params=start, disable_progbar=True)
        mcmc.run()
        record = as_record(mcmc)
        np.testing.assert_allclose(record.draws["x"][:, 0, 0], np.arange(12.0), atol=1e-4)
    np.testing.assert_allclose(record.sample_stats["lp"][:, 0], -1e-3 * np.arange(12), atol=1e-6)


@pytest.mark.filterwarnings(SEQUENTIAL)
def test_divergences_of_stock_kernels_are_on_their_own_chain():
    # Only chain 10 starts where the potential is steep: sorted as text it would be third.
    start = torch.zeros(12, 1)
    start[10] = 3.0
    sampler = NUTS(potential_fn=steep, step_size=0.05, adapt_step_size=False)
    options = {"num_chains": 12, "initial_params": {"x": start}, "disable_progbar": True}
    mcmc = MCMC(sampler, 4, 0, **options)
    mcmc.run()
    diverging = as_record(mcmc).sample_stats["diverging"]
    assert diverging.shape == (12, 4)
    np.testing.assert_array_equal(np.flatnonzero(diverging.any(axis=1)), [10])


def test_stock_runs_give_what_they_have():
    mcmc = MCMC(NUTS(model), 6, 4, disable_progbar=True)
    mcmc.run()
    record = Record.from_mcmc(mcmc)
    assert record.sampler == "NUTS"
    assert record.adjusted
    assert set(record.sample_stats) == {"diverging"}
    assert record.draws["x"].shape == (1, 6, 2)
    assert (record.draws["s"] > 0).all()
    assert record.attrs["pyro_acceptance_rate"] == [
        mcmc.diagnostics()["acceptance rate"]["chain 0"]
    ]


def test_kernels_without_divergences_are_read():
    mcmc = MCMC(RandomWalkKernel(model), 6, 4, disable_progbar=True)
    mcmc.run()
    record = Record.from_mcmc(mcmc)
    assert record.sample_stats == {}
    assert record.num_samples == 6


def test_sources_are_told_apart():
    record = full_record()
    assert as_record(record) is record

    class Driver:
        def __init__(self):
            self.record = record

    assert as_record(Driver()) is record
    assert as_record({"x": np.zeros((1, 4))}).num_samples == 4
    with pytest.raises(TypeError, match="got float"):
        as_record(1.0)


def test_runs_without_draws_are_refused():
    with pytest.raises(ValueError, match=r"call run\(\)"):
        as_record(MCMC(NUTS(model), 2, 0))
    with pytest.raises(TypeError, match="StreamingMCMC keeps no draws"):
        as_record(StreamingMCMC(NUTS(model), 2, 0))
