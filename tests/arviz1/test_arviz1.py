"""The converter under ArviZ 1.x and NumPy alone: a saved run becomes a ``DataTree`` of use.

The files are loaded by path, since the package itself imports torch. What ArviZ 0.x computed from
the same run stands in ``expected.json``.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    az = pytest.importorskip("arviz", minversion="1.0")

HERE = Path(__file__).parent
CHAINS = HERE.parent.parent / "pyro_ebm" / "chains"


def load(name):
    """Imports one file of the package without the package."""
    spec = importlib.util.spec_from_file_location(f"alone_{name}", CHAINS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


core, records, runaway = load("_arviz_core"), load("record"), load("runaway")
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record():
    return records.Record.load(HERE / "record.npz")


def log_likelihood(record):
    theta, y = record.draws["group/theta"], np.array(record.attrs["y"])
    return -0.5 * ((y - theta) / 12.0) ** 2 - np.log(12.0) - 0.5 * np.log(2 * np.pi)


@pytest.fixture
def tree(record):
    groups = {
        "posterior": record.draws,
        "sample_stats": core.conventional_stats(record.sample_stats),
        "warmup_sample_stats": core.conventional_stats(record.warmup_stats),
        "warmup_posterior": {},
        "observed_data": {"y": np.array(record.attrs["y"])},
        "log_likelihood": {"y": log_likelihood(record)},
        "prior": {"mu": np.zeros((1, 5))},
    }
    own = {"sampler": record.sampler, "adjusted": 1}
    attrs = dict.fromkeys(("posterior", "sample_stats", "warmup_sample_stats"), own)
    dims = {"group/theta": ["group"], "y": ["group"]}
    return core.build(az, groups, attrs=attrs, dims=dims, coords={"group": list("abcdefgh")})


def test_neither_torch_nor_pyro_was_needed():
    assert "torch" not in sys.modules
    assert "pyro" not in sys.modules


def test_groups_dimensions_and_attributes(tree, record):
    assert set(tree.children) == {
        "posterior",
        "sample_stats",
        "warmup_sample_stats",
        "observed_data",
        "log_likelihood",
        "prior",
    }
    assert tree["posterior"]["group.theta"].dims == ("chain", "draw", "group")
    assert tree["observed_data"]["y"].dims == ("group",)
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "group")
    assert tree["warmup_sample_stats"]["step_size"].shape == (4, 100)
    assert tree["posterior"].attrs["sampler"] == "RecordingNUTS"
    assert tree["sample_stats"].attrs["adjusted"] == 1
    np.testing.assert_array_equal(tree["posterior"]["mu"], record.draws["mu"])


def test_summary_agrees_with_arviz_0(record):
    table = core.summary_table(az, record.draws)
    assert set(table.index) == set(EXPECTED["summary"])
    for label, row in EXPECTED["summary"].items():
        for column in set(row) - {"ess_tail"}:  # 1.x looks at other quantiles
            value = row[column]
            assert table.loc[label, column] == pytest.approx(value, rel=1e-6), (label, column)


def test_undefined_statistics_are_nan_and_silent():
    table = core.summary_table(az, {"still": np.ones((4, 50)), "short": np.zeros((4, 50))})
    assert table["r_hat"].isna().all()
    assert core.summary_table(az, {"x": np.ones((1, 50))})["r_hat"].isna().all()


def test_bfmi_and_loo_agree_with_arviz_0(tree, record):
    np.testing.assert_allclose(log_likelihood(record).sum(), EXPECTED["log_likelihood_total"])
    bfmi = np.ravel(az.bfmi(tree)["energy"] if "energy" in az.bfmi(tree) else az.bfmi(tree))
    np.testing.assert_allclose(bfmi, EXPECTED["bfmi"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert az.loo(tree).elpd == pytest.approx(EXPECTED["elpd_loo"], rel=1e-3)


def test_saturated_trees_are_found_under_arvizs_name(tree):
    assert int(tree["sample_stats"]["reached_max_treedepth"].sum()) > 0
    stats = tree["sample_stats"]
    np.testing.assert_array_equal(stats["reached_max_tree_depth"], stats["reached_max_treedepth"])


def test_arviz_diagnoses_the_run(tree, capsys):
    az.diagnose(tree)
    assert "R-hat" in capsys.readouterr().out


def test_files_come_back(tree, tmp_path):
    pytest.importorskip("h5netcdf")
    pytest.importorskip("h5py")
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    again = az.from_netcdf(str(tmp_path / "run.nc"))
    np.testing.assert_array_equal(again["posterior"]["mu"], tree["posterior"]["mu"])
    assert again["posterior"].attrs["adjusted"] == 1


def test_more_chains_than_draws_is_no_mistake():
    assert core.build(az, {"posterior": {"x": np.zeros((64, 5))}})["posterior"].sizes["chain"] == 64


def test_the_run_does_not_run_away(record):
    assert runaway.find_runaways(record.draws) == {}
