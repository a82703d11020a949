"""Our kernels under Pyro's own driver: one chain at a time, the same posteriors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC
from pyro.infer.mcmc.api import StreamingMCMC
from torus_cases import lattice_with, of_lattice, one_lattice

from pyro_ebm.chains import as_record, to_arviz
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MALA, NUTS, DirectionExchange, Exchange, RandomWalk, Sweeps

Y = torch.tensor([0.5, 1.0, 2.0, -0.3, 1.1], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(2)
    torch.set_default_dtype(torch.float64)


def rate_model(y):
    """A conjugate one: the posterior of a positive rate is a gamma distribution."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


def run(kernel, *args, num_samples, warmup_steps, **options):
    mcmc = MCMC(kernel, num_samples, warmup_steps, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def check(draws, mean, sd, least_ess):
    """Means and squares within five standard errors, by batches of draws."""
    for values, wanted in ((draws, mean), ((draws - mean).square(), sd**2)):
        batches = values.reshape(20, -1).mean(1)
        error = batches.std() / 20**0.5
        assert abs(float((batches.mean() - wanted) / error)) < 5
        assert float(values.std() / error) > least_ess**0.5


def test_exchange_draws_the_exact_posterior():
    mcmc = run(Exchange(one_lattice), lattice_with(16), num_samples=600, warmup_steps=200)
    check(mcmc.get_samples()["coupling"], *of_lattice(16), least_ess=40)


@pytest.mark.parametrize(
    "kernel",
    [HMC, RandomWalk, *(pytest.param(k, marks=pytest.mark.slow) for k in (MALA, NUTS))],
)
def test_kernels_draw_a_conjugate_posterior(kernel):
    y = Y.abs()
    mcmc = run(kernel(rate_model), y, num_samples=800, warmup_steps=200)
    exact = dist.Gamma(3.0 + len(y), 2.0 + y.sum())
    rates = mcmc.get_samples()["rate"]
    check(rates, float(exact.mean), float(exact.stddev), least_ess=40)
    assert as_record(mcmc).adjusted
    assert float(rates.min()) > 0


def test_warm_up_tunes_and_ends():
    kernel, seen = HMC(rate_model), []
    run(
        kernel,
        Y.abs(),
        num_samples=30,
        warmup_steps=60,
        hook_fn=lambda kernel, params, stage, i: seen.append(kernel.logging()["step size"]),
    )
    assert len(set(seen[:60])) > 30
    assert len(set(seen[60:])) == 1


def test_statistics_reach_arviz():
    mcmc = run(HMC(rate_model), Y.abs(), num_samples=20, warmup_steps=10, num_chains=2)
    assert set(mcmc.diagnostics()["sample_stats"]) == {"chain 0", "chain 1"}
    data = to_arviz(mcmc)
    assert data.posterior["rate"].shape == (2, 20)
    assert {"lp", "acceptance_rate", "step_size", "diverging"} <= set(data.sample_stats)


def test_inexact_draws_stay_marked():
    kernel = Exchange(one_lattice, auxiliary=Sweeps(2))
    assert as_record(run(kernel, lattice_with(16), num_samples=5, warmup_steps=5)).adjusted is False


def test_chains_of_other_processes_stay_marked():
    """There the driver's own kernel was never bound, and does not know."""
    kernel = Exchange(one_lattice, auxiliary=Sweeps(2))
    mcmc = run(kernel, lattice_with(16), num_samples=5, warmup_steps=5)
    kernel.adjusted, kernel.bias = True, ""
    found = as_record(mcmc)
    assert found.adjusted is False
    assert "sweeps" in found.attrs["bias"]


def test_streaming_driver():
    mcmc = StreamingMCMC(HMC(rate_model), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run(Y.abs())
    exact = dist.Gamma(3.0 + len(Y), 2.0 + Y.abs().sum())
    mean = float(mcmc.get_statistics()[(0, "rate")]["mean"])
    assert mean == pytest.approx(float(exact.mean), abs=5 * float(exact.stddev) / 30**0.5)


def test_starts_are_unconstrained_and_of_one_run():
    kernel = RandomWalk(rate_model, step_size=1e-6, adapt_step_size=False)
    start = {"rate": torch.tensor(3.0)}
    mcmc = run(kernel, Y.abs(), num_samples=2, warmup_steps=0, initial_params=start)
    torch.testing.assert_close(
        mcmc.get_samples()["rate"], torch.full((2,), 3.0).exp(), rtol=1e-3, atol=0
    )
    mcmc = run(kernel, Y.abs(), num_samples=2, warmup_steps=0)
    assert float(mcmc.get_samples()["rate"][0]) < 8


def test_what_cannot_be_run_is_refused():
    def nowhere():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.where(x > -10.0, -torch.inf, 0.0))

    with pytest.raises(NonFiniteEnergyError, match="starting point"):
        run(HMC(nowhere), num_samples=2, warmup_steps=2)
    with pytest.raises(ValueError, match="use more, or Exchange"):
        run(DirectionExchange(one_lattice), lattice_with(16), num_samples=2, warmup_steps=2)
