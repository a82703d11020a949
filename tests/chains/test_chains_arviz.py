"""The ArviZ object: groups, names, attributes, and what is and is not data."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, Predictive, RandomWalkKernel
from pyro.infer.reparam import LocScaleReparam

from pyro_ebm.chains import Record, _arviz_core, summary, to_arviz
from pyro_ebm.chains.arviz import import_arviz
from pyro_ebm.distributions import EnergyDistribution, energy_factor
from pyro_ebm.energies import GaussianEnergy
from pyro_ebm.errors import ImproperEnergyWarning
from pyro_ebm.mcmc import RecordingHMC, RecordingNUTS

az = import_arviz()
SEQUENTIAL = "ignore:num_chains=.* is more than available_cpu"
DATA = torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 0.5], [0.0, -0.5]])


def busy_model(y):
    """Everything that Pyro calls observed, and one thing that is data."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    z = pyro.sample("z", dist.Normal(m, 1.0))
    pyro.deterministic("twice", 2 * m)
    pyro.sample("point", dist.Delta(torch.tensor(1.0)), obs=torch.tensor(1.0))
    pyro.factor("extra", -0.1 * m**2)
    energy_factor("close", lambda a, b: (a - b) ** 2, m, z)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0).expand([2]).to_event(1), obs=y)


def run(kernel, *args, num_samples=8, warmup=4, **options):
    mcmc = MCMC(kernel, num_samples, warmup, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def draws(chains=2, num=6, **shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(chains, num, *shape)) for name, shape in shapes.items()}


def test_only_true_observations_are_data():
    reparametrized = poutine.reparam(busy_model, {"z": LocScaleReparam(0.0)})
    for model in (busy_model, reparametrized):
        data = to_arviz(draws(m=(), z=()), model=model, args=(DATA,))
        assert list(data["observed_data"]) == ["y"]
        assert "log_likelihood" not in data.groups()
    np.testing.assert_array_equal(data["observed_data"]["y"], DATA)


def test_deterministic_sites_appear_only_if_drawn():
    without = to_arviz(draws(m=(), z=()), model=busy_model, args=(DATA,))
    assert set(without["posterior"]) == {"m", "z"}
    drawn = to_arviz(draws(m=(), z=(), twice=()), model=busy_model, kwargs={"y": DATA})
    assert set(drawn["posterior"]) == {"m", "z", "twice"}
    assert list(drawn["observed_data"]) == ["y"]


def test_pyro_runs_bring_their_model_and_arguments():
    mcmc = run(RecordingNUTS(busy_model), DATA)
    before = torch.get_rng_state()
    data = to_arviz(mcmc, warmup=True)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(data["observed_data"]["y"], DATA)
    stats = data["sample_stats"]
    expected = "lp energy diverging tree_depth n_steps acceptance_rate step_size energy_error"
    assert set(expected.split()) <= set(stats)
    np.testing.assert_array_equal(stats["reached_max_treedepth"], stats["reached_max_tree_depth"])
    assert data["warmup_sample_stats"]["step_size"].shape == (1, 4)
    assert data["posterior"].attrs["sampler"] == "RecordingNUTS"


def test_values_and_statistics_arrive_unchanged():
    mcmc = run(RecordingHMC(busy_model, num_steps=2), DATA)
    record = Record.from_mcmc(mcmc)
    data = to_arviz(record)
    assert "observed_data" not in data.groups()
    for name, values in record.draws.items():
        np.testing.assert_array_equal(data["posterior"][name], values)
    for name, values in record.sample_stats.items():
        np.testing.assert_array_equal(data["sample_stats"][name], values)


def test_kernels_without_divergences_convert():
    data = to_arviz(run(RandomWalkKernel(busy_model), DATA))
    assert "sample_stats" not in data.groups()
    assert data["posterior"]["m"].shape == (1, 8)


@pytest.mark.filterwarnings(SEQUENTIAL)
def test_divergences_stay_on_their_chain_with_more_than_ten_chains():
    start = torch.zeros(12, 1)
    start[2] = 3.0
    kernel = HMC(
        potential_fn=lambda z: 50.0 * (z["x"] ** 4).sum(),
        step_size=0.05,
        num_steps=2,
        adapt_step_size=False,
    )
    mcmc = run(kernel, num_samples=2, warmup=0, num_chains=12, initial_params={"x": start})
    diverging = to_arviz(mcmc)["sample_stats"]["diverging"].values
    np.testing.assert_array_equal(np.flatnonzero(diverging.any(axis=1)), [2])


def test_more_chains_than_draws_is_no_mistake():
    assert to_arviz(draws(64, 5, x=()))["posterior"].sizes == {"chain": 64, "draw": 5}


def test_attributes_say_how_the_draws_were_made(tmp_path):
    record = Record(draws(x=()), sampler="ULA", adjusted=False, inverse_temperature=0.5)
    attrs = to_arviz(record)["posterior"].attrs
    assert attrs["inference_library"] == "pyro_ebm"
    assert attrs["sampler"] == "ULA"
    assert attrs["adjusted"] == False  # noqa: E712 - 0 in a form that files can hold
    assert attrs["inverse_temperature"] == 0.5
    assert attrs["approximate"] == 0
    plain = to_arviz(draws(x=()))["posterior"].attrs
    assert "inverse_temperature" not in plain
    rough = to_arviz(Record(draws(x=()), approximate=True, seconds=2.0))["posterior"].attrs
    assert (rough["approximate"], rough["sampling_time"]) == (1, 2.0)
    to_arviz(record).to_netcdf(str(tmp_path / "run.nc"))
    stored = az.from_netcdf(str(tmp_path / "run.nc"))["posterior"].attrs
    assert stored["adjusted"] == 0


def test_names_and_labels():
    source = {"layer/w": np.zeros((2, 5, 3)), "b": np.zeros((2, 5))}
    dims, coords = {"layer/w": ["unit"]}, {"unit": ["p", "q", "r"]}
    posterior = to_arviz(source, dims=dims, coords=coords)["posterior"]
    assert posterior["layer.w"].dims == ("chain", "draw", "unit")
    assert list(posterior["unit"].values) == ["p", "q", "r"]
    with pytest.raises(ValueError, match="differ only by '/'"):
        to_arviz({"a/b": np.zeros((2, 5)), "a.b": np.zeros((2, 5))})


@pytest.mark.parametrize("name", ["chain", "draw", "y_dim_1"])
def test_names_of_dimensions_are_refused(name):
    """ArviZ takes such variables for labels, and they would be gone."""
    source = draws(y=(3, 3), **{name: ()})
    with pytest.raises(ValueError, match=rf"posterior: variables \['{name}'\] have names of dim"):
        to_arviz(source)
    assert [row for row in summary(source).index if "[" not in row] == [name]


def test_dimensions_may_have_other_names():
    source = draws(y=(3, 2), y_dim_0=(), row=())
    posterior = to_arviz(source, dims={"y": ["unit"]})["posterior"]
    assert set(posterior) == {"y", "y_dim_0", "row"}
    with pytest.raises(ValueError, match=r"variables \['row'\] have names of dimensions"):
        to_arviz(source, dims={"y": ["row"]})


def test_data_have_no_chains():
    """A data site may be called draw; of its log likelihood it is a dimension."""

    def model(numbers):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(numbers)):
            pyro.sample("draw", dist.Normal(m, 1.0), obs=numbers)

    data = to_arviz(draws(m=()), model=model, args=(DATA[:, 0],))
    np.testing.assert_array_equal(data["observed_data"]["draw"], DATA[:, 0])
    with pytest.raises(ValueError, match=r"log_likelihood: variables \['draw'\]"):
        to_arviz(draws(m=()), model=model, args=(DATA[:, 0],), log_likelihood=True)


def test_predictive_draws_keep_their_shape():
    posterior = draws(m=(), z=(1,))
    flat = {name: torch.tensor(x).reshape(-1) for name, x in posterior.items()}
    after = Predictive(busy_model, flat, return_sites=["y"])(DATA)
    before = {"m": torch.randn(9), "z": torch.randn(9, 1), "y": torch.randn(9, 4, 2)}
    data = to_arviz(posterior, prior=before, posterior_predictive=after)
    assert data["posterior_predictive"]["y"].shape == (2, 6, 4, 2)
    np.testing.assert_array_equal(data["posterior_predictive"]["y"][1, 0], after["y"][6])
    assert set(data["prior"]) == {"m", "z"}
    assert data["prior"]["z"].shape == (1, 9, 1)
    assert set(data["prior_predictive"]) == {"y"}
    with pytest.raises(ValueError, match=r"posterior_predictive\['y'\] has shape"):
        to_arviz(posterior, posterior_predictive={"y": after["y"][:5]})


def test_runaway_draws_are_announced():
    walk = 1e9 * np.random.default_rng(0).normal(size=(4, 100)).cumsum(axis=1)
    with pytest.warns(ImproperEnergyWarning, match="site 'x' spreads over"):
        to_arviz({"x": walk, "y": np.zeros((4, 100))})


def test_latent_energies_are_not_sampled_to_find_the_data():
    def never(shape):
        raise AssertionError("sampled")

    def model(y):
        energy = EnergyDistribution(lambda x: x**2, event_shape=(), sampler=never)
        x = pyro.sample("x", energy)
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    data = to_arviz(draws(x=()), model=model, args=(DATA[:, 0],))
    assert list(data["observed_data"]) == ["y"]


def test_subsampled_plates_are_not_data():
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4, subsample_size=2) as index:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[index])

    data = to_arviz(draws(m=()), model=model, args=(DATA[:, 0],))
    assert list(data["observed_data"]) == ["y"]


def test_arviz_1_is_handed_one_nested_dict():
    calls = []
    newer = types.SimpleNamespace(
        __version__="1.3.0", from_dict=lambda data, **options: calls.append((data, options))
    )
    groups = {"posterior": draws(x=()), "sample_stats": {}, "observed_data": {"y": np.zeros(3)}}
    _arviz_core.build(newer, groups, attrs={"posterior": {"sampler": "s"}}, dims={"x": ["d"]})
    (data, options) = calls[0]
    assert set(data) == {"posterior", "observed_data"}
    assert options["attrs"] == {"posterior": {"sampler": "s"}}
    assert options["dims"] == {"x": ["d"]}


@pytest.mark.parametrize("exact", [True, False])
def test_predictive_draws_of_short_chains_say_so(exact):
    def model(y=None):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        energy = GaussianEnergy(m, 1.0) if exact else lambda x: 0.5 * (x - m) ** 2
        with pyro.plate("rows", 4):
            pyro.sample("y", EnergyDistribution(energy, event_shape=()), obs=y)

    after = {"y": np.zeros((2, 6, 4))}
    source, options = draws(m=()), {"model": model, "args": (DATA[:, 0],)}
    attrs = to_arviz(source, posterior_predictive=after, **options)["posterior_predictive"].attrs
    assert attrs.get("approximate_draws") == (None if exact else "y")


def test_importing_the_package_does_not_import_arviz():
    code = "import sys, pyro_ebm.chains, pyro_ebm.mcmc; sys.exit('arviz' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_ignores_the_draws_is_still_read():
    def model(y):
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    data = to_arviz(draws(other=()), model=model, args=(DATA[:, 0],), log_likelihood=True)
    assert data["log_likelihood"]["y"].shape == (2, 6, 4)


def test_stock_nuts_converts():
    data = to_arviz(run(NUTS(busy_model), DATA))
    assert data["sample_stats"]["diverging"].shape == (1, 8)
    assert len(data["posterior"].attrs["pyro_acceptance_rate"]) == 1
