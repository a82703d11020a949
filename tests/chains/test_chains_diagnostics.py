"""Summaries and verdicts: ArviZ's numbers, and every way in which a run can be bad."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import MCMC
from scipy.signal import lfilter

from pyro_ebm.chains import Record, bfmi, diagnose, summary
from pyro_ebm.chains.arviz import import_arviz
from pyro_ebm.mcmc import RecordingNUTS

az = import_arviz()


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def autoregressive(rho, *shape):
    noise = normal(*shape)
    noise[:, 0] /= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=1)


def test_summary_holds_arviz_rank_normalized_values():
    x = autoregressive(0.7, 4, 300)
    table = summary({"x": x, "v": normal(4, 300, 2, 2)})
    assert list(table.columns) == ["mean", "sd", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]
    assert list(table.index) == ["x", "v[0, 0]", "v[0, 1]", "v[1, 0]", "v[1, 1]"]
    row = table.loc["x"]
    assert row["r_hat"] == az.rhat(x, method="rank")
    assert row["ess_bulk"] == az.ess(x, method="bulk")
    assert row["ess_tail"] == az.ess(x, method="tail")
    assert row["mcse_mean"] == pytest.approx(az.mcse(x, method="mean"))
    assert row["mean"] == pytest.approx(x.mean())


def test_bulk_ess_of_an_autoregression_is_the_known_one():
    rho = 0.8
    table = summary({"x": autoregressive(rho, 4, 4000)})
    assert table.loc["x", "ess_bulk"] == pytest.approx(16000 * (1 - rho) / (1 + rho), rel=0.15)


def test_good_draws_are_ok():
    found = diagnose({"x": normal(4, 1000, 2), "k": (normal(4, 1000) > 0).astype(int)})
    assert found.ok
    assert found.warnings == []
    assert found.bfmi == ()
    assert found.num_divergences is None
    assert str(found).startswith("4 chains of 1000 draws: ok")


def test_disagreeing_chains_are_not():
    found = diagnose({"x": normal(4, 500, 2) + np.arange(4.0)[:, None, None] * [0.0, 1.0]})
    assert not found.ok
    assert found.rhat.at == "x[1]"
    assert found.rhat.value > 1.3
    assert "R-hat" in str(found)
    assert "NOT ok" in str(found)


def test_short_runs_are_said_to_be_short():
    warnings = diagnose({"x": normal(4, 50)}).warnings
    assert [text.split(" ESS")[0] for text in warnings] == ["bulk", "tail"]


def test_tiny_runs_are_never_ok(caplog):
    found = diagnose({"x": normal(4, 3)})
    assert found.warnings == ["3 draws of each chain are too few for R-hat and ESS"]
    assert summary({"x": normal(1, 3)})["r_hat"].isna().all()
    assert caplog.records == []


def test_density_is_judged_like_a_coordinate():
    x = normal(4, 1000)
    lp = x + 5 * np.arange(4.0)[:, None]
    found = diagnose(Record({"x": x}, sample_stats={"lp": lp}))
    assert found.rhat.at == "lp"
    assert not found.ok


def test_one_chain_cannot_vouch_for_itself():
    found = diagnose({"x": normal(1, 2000)})
    assert found.warnings == [
        "one chain: R-hat compares chains, run at least four from spread starts"
    ]


def gaussian_run(dim, num_samples):
    kernel = RecordingNUTS(
        potential_fn=lambda z: 0.5 * (z["x"] ** 2).sum(), step_size=0.7, adapt_step_size=False
    )
    start = {"x": torch.randn(dim, dtype=torch.float64)}
    mcmc = MCMC(kernel, num_samples, 0, initial_params=start, disable_progbar=True)
    mcmc.run()
    return Record.from_mcmc(mcmc)


def test_bfmi_of_nuts_on_a_gaussian_is_about_one():
    pyro.set_rng_seed(0)
    record = gaussian_run(dim=5, num_samples=400)
    (value,) = bfmi(record.sample_stats["energy"])
    assert value == pytest.approx(1.0, abs=0.2)
    assert not any("BFMI" in text for text in diagnose(record).warnings)


def test_bfmi_agrees_with_arviz_and_sees_slow_energies():
    slow = autoregressive(0.95, 4, 500)
    np.testing.assert_allclose(bfmi(slow), az.bfmi(slow), rtol=1e-12)
    record = Record({"x": normal(4, 500)}, sample_stats={"energy": slow})
    found = diagnose(record)
    assert max(found.bfmi) < 0.3
    assert any("BFMI" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("name", "said"), [("diverging", "3 of 2000"), ("reached_max_treedepth", "hit the maximal")]
)
def test_divergences_and_saturated_trees_are_counted(name, said):
    flags = np.zeros((4, 500), dtype=bool)
    flags[1, :3] = True
    found = diagnose(Record({"x": normal(4, 500)}, sample_stats={name: flags}))
    assert (found.num_divergences or found.num_saturated) == 3
    assert len(found.warnings) == 1
    assert said in found.warnings[0]


def test_constant_sites_are_named_and_constant_coordinates_noted():
    factor = np.zeros((4, 500, 2, 2))
    factor[..., 0, 0] = 1
    factor[..., 1, :] = normal(4, 500, 2)
    found = diagnose({"x": normal(4, 500), "stuck": np.ones((4, 500)), "L": factor})
    assert found.warnings == ["stuck never moved: R-hat and ESS do not exist for a constant chain"]
    assert found.notes == ["some coordinates of L are constant and were left out"]
    assert found.rhat.value < 1.01


def test_chains_stuck_apart_never_moved():
    apart = np.arange(4.0)[:, None] * np.ones((4, 100))
    assert any("x never moved" in text for text in diagnose({"x": apart}).warnings)
    assert not diagnose({"x": np.ones((1, 100))}).ok


def test_everything_constant_is_undefined_and_not_ok():
    found = diagnose({"x": np.zeros((4, 100, 2))})
    assert not found.ok
    assert "undefined" in str(found)


def test_one_stuck_chain_among_moving_ones_shows_in_r_hat():
    x = normal(4, 500)
    x[2] = 3.0
    found = diagnose({"x": x})
    assert found.rhat.value > 1.1


def test_runaway_and_non_finite_draws_are_reported():
    walk = 1e9 * normal(4, 500).cumsum(axis=1)
    assert any("x spreads over" in text for text in diagnose({"x": walk}).warnings)
    broken = normal(4, 500)
    broken[0, 0] = np.nan
    found = diagnose({"x": broken, "y": normal(4, 500)})
    assert any("x 0% of its" in text or "not finite" in text for text in found.warnings)


def test_provenance_is_noted_but_is_no_fault():
    record = Record(
        {"x": normal(4, 500)},
        sampler="ULA",
        adjusted=False,
        approximate=True,
        inverse_temperature=0.5,
    )
    found = diagnose(record)
    assert found.ok
    text = str(found)
    for words in ("ULA is not adjusted", "approximate", "not the model"):
        assert words in text
    assert diagnose(Record({"x": normal(4, 500)}, inverse_temperature=1.0)).notes == []


def test_the_sampler_says_what_biases_its_draws_and_what_is_in_doubt():
    attrs = {"bias": "few sweeps", "doubts": "cut off at 3"}
    found = diagnose(Record({"x": normal(4, 500)}, sampler="E", adjusted=False, attrs=attrs))
    assert found.notes == ["E is not adjusted: few sweeps"]
    assert found.warnings == ["cut off at 3"]
