"""Runaway draws: seen on improper energies under stock kernels, not on proper ones however slow."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS
from scipy.signal import lfilter

from pyro_ebm.chains import find_runaways, runaway

SEQUENTIAL = "ignore:num_chains=.* is more than available_cpu"


def draws_of(potential, num_samples=80, warmup=60, seed=1):
    pyro.set_rng_seed(seed)
    kernel = NUTS(potential_fn=lambda z: potential(z["x"]), max_tree_depth=4)
    start = {"x": torch.randn(2, 2, dtype=torch.float64)}
    options = {"num_chains": 2, "initial_params": start, "disable_progbar": True}
    mcmc = MCMC(kernel, num_samples, warmup, **options)
    mcmc.run()
    return {name: x.numpy() for name, x in mcmc.get_samples(group_by_chain=True).items()}


IMPROPER = {
    "flat": (lambda x: 0.0 * x.sum(), "spreads over"),
    "linear": (lambda x: x.sum(), "spreads over"),
    "negative quadratic": (lambda x: -0.5 * (x**2).sum(), "moves outward"),
    "one bad direction": (lambda x: 0.5 * x[0] ** 2 - 0.5 * x[1] ** 2, "moves outward"),
}


@pytest.mark.filterwarnings(SEQUENTIAL)
@pytest.mark.parametrize("name", IMPROPER)
def test_improper_energies_under_stock_nuts_are_seen(name):
    potential, how = IMPROPER[name]
    assert how in find_runaways(draws_of(potential))["x"]


@pytest.mark.filterwarnings(SEQUENTIAL)
@pytest.mark.parametrize("power", [1, 2, 4])
def test_proper_energies_under_stock_nuts_are_not(power):
    assert find_runaways(draws_of(lambda x: (x.abs() ** power).sum())) == {}


def autoregressive(rho, rng, shape):
    chains, draws, dim = shape
    noise = rng.normal(size=(chains, draws + 1000, dim))
    return lfilter([1.0], [1.0, -rho], noise, axis=1)[:, 1000:]


PROPER = {
    "gaussian": lambda rng, shape: rng.normal(size=shape),
    "student t, 3 df": lambda rng, shape: rng.standard_t(3, size=shape),
    "cauchy": lambda rng, shape: rng.standard_cauchy(size=shape),
    "log-normal, sd 5": lambda rng, shape: np.exp(5 * rng.normal(size=shape)),
    "AR(.9)": lambda rng, shape: autoregressive(0.9, rng, shape),
    "AR(.99)": lambda rng, shape: autoregressive(0.99, rng, shape),
    "AR(.999)": lambda rng, shape: autoregressive(0.999, rng, shape),
    "random walk": lambda rng, shape: rng.normal(size=shape).cumsum(axis=1),
    "large units, mixed": lambda rng, shape: 1e9 * rng.normal(size=shape),
    "far from the origin": lambda rng, shape: 2e9 + autoregressive(0.99, rng, shape),
}


@pytest.mark.parametrize("shape", [(1, 100), (4, 200), (4, 1000)])
@pytest.mark.parametrize("name", PROPER)
def test_hundreds_of_proper_sites_raise_no_alarm(name, shape):
    draws = PROPER[name](np.random.default_rng(5), (*shape, 300))
    sites = {str(i): draws[..., i] for i in range(draws.shape[-1])}
    assert find_runaways(sites) == {}


def test_a_chain_on_its_way_to_a_distant_mode_is_not_called_improper():
    t = np.arange(200.0)
    noise = 0.01 * np.random.default_rng(0).normal(size=(4, 200))
    assert find_runaways({"x": 100 * (1 - np.exp(-t / 100)) + noise}) == {}


@pytest.mark.parametrize("units", [1.0, 1e-9, 1e12])
def test_a_million_is_huge_where_chains_disagree(units):
    """Two chains at plus and minus c have the median distance c; noise keeps them in place."""
    noise = np.random.default_rng(0).normal(size=(2, 200))
    centres = units * np.array([[-1e6], [1e6]])
    below, above = (share * centres + noise * units for share in (0.99, 1.01))
    assert ("x" in find_runaways({"x": above})) is (units >= 1.0)
    assert ("x" in find_runaways({"x": below})) is (units > 1.0)
    assert find_runaways({"x": above - 1.01 * centres}) == {}  # both chains in one place


def test_values_that_are_not_finite_are_reported():
    x = np.zeros((2, 10, 2))
    x[0, 3, 1] = np.inf
    x[1, 4, 0] = np.nan
    assert find_runaways({"x": x}) == {"x": "5% of its values are not finite"}


def test_single_precision_does_not_overflow_the_rule():
    walk = np.random.default_rng(0).normal(size=(4, 100)).cumsum(axis=1)
    assert "spreads over" in find_runaways({"x": (1e37 * walk).astype(np.float32)})["x"]


def test_integers_and_tiny_runs_are_left_alone():
    assert find_runaways({"k": np.arange(400).reshape(4, 100), "x": np.zeros((2, 1))}) == {}


def test_split_rhat_is_the_textbook_one():
    x = np.random.default_rng(0).normal(size=(3, 50, 2)) + np.arange(3.0)[:, None, None]
    halves = np.concatenate([x[:, :25], x[:, 25:]])
    within = halves.var(axis=1, ddof=1).mean(axis=0)
    between = 25 * halves.mean(axis=1).var(axis=0, ddof=1)
    expected = np.sqrt((24 / 25 * within + between / 25) / within)
    np.testing.assert_allclose(runaway._split_rhat(x), expected, rtol=1e-12)


def test_draws_up_to_the_largest_number_run_away():
    """Medians of two of them have no number; the chains stand at places of their own."""
    places = np.array([1e300, 1.2e308, 1.5e308, 1.7e308])[:, None]
    found = find_runaways({"nu": places * np.linspace(0.9, 1.0, 150)})
    assert "spreads over" in found["nu"]
