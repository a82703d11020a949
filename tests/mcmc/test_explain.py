"""Models that cannot be set up, and entries that the density does not depend on."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MCMC, RecordingNUTS
from pyro_ebm.mcmc.vmap_safe import VmapSafe

Y = torch.linspace(-1.0, 1.0, 10)


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)


def run(model, *args, num_samples=5, warmup_steps=5, **kwargs):
    mcmc = MCMC(HMC(model), num_samples, warmup_steps, num_chains=8, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def discrete(y):
    n = pyro.sample("n", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(n, 1.0).expand([10]).to_event(1), obs=y)


def not_written_for_enumeration(y):
    n = pyro.sample("n", dist.Bernoulli(0.3))
    m = pyro.sample("m", dist.Normal(n, 1.0))
    pyro.sample("y", dist.Normal(m, 1.0).expand([10]).to_event(1), obs=y)


def improper(y):
    m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(m, 1.0).expand([10]).to_event(1), obs=y)


def on_a_sphere(y):
    pyro.sample("d", dist.ProjectedNormal(torch.ones(3)))


def delta(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("d", dist.Delta(2.0 * m))


def missing_data(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(m, 1.0).expand([10]).to_event(1), obs=y * torch.nan)


def noisy(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(m + torch.randn(10), 1.0).to_event(1), obs=y)


def moving_support(y):
    b = pyro.sample("b", dist.Uniform(0.0, 1.0))
    pyro.sample("x", dist.Uniform(0.0, b))


def moving_support_of_rows(y):
    b = pyro.sample("b", dist.HalfNormal(1.0))
    pyro.sample("x", dist.Uniform(torch.zeros(3), b * torch.ones(3)).to_event(1))


@pytest.mark.parametrize(
    ("model", "error", "sentence"),
    [
        (moving_support, ValueError, "site 'x': its support depends on other latents"),
        (moving_support_of_rows, ValueError, "site 'x': its support depends on other latents"),
        (discrete, TypeError, "site 'n' lives on IntegerGreaterThan.*no gradient to move along"),
        (not_written_for_enumeration, TypeError, "site 'n' lives on Boolean.*extra batch dim"),
        (improper, TypeError, r"site 'm' is ImproperUniform.*mask\(False\)"),
        (on_a_sphere, TypeError, "site 'd' lives on _?Sphere.*no bijection"),
        (delta, TypeError, "site 'd' is a latent Delta.*pyro.deterministic"),
        (missing_data, NonFiniteEnergyError, "no starting point of finite density.*NaN"),
        (noisy, ValueError, "two evaluations at one point"),
    ],
)
def test_one_sentence_each(model, error, sentence):
    with pytest.raises(error, match=sentence):
        run(model, Y)


def test_errors_of_the_model_stay_what_they_are():
    def model():
        pyro.sample("m", dist.Normal(0.0, 1.0))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(model)


def partly_flat(y):
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("n", 10):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(torch.arange(10) < 3))
        pyro.sample("y", dist.Normal(m + torch.where(torch.arange(10) < 3, z, 0.0), 1.0), obs=y)


def test_entries_without_density_are_said_and_kept_in_place():
    with pytest.warns(UserWarning, match="does not depend on some entries of z"):
        mcmc = run(partly_flat, Y, num_samples=200, warmup_steps=200)
    z = mcmc.get_samples(group_by_chain=False)["z"]
    assert float((z[:, 3:].std(0) - 1.0).abs().max()) < 0.15
    assert float(mcmc.diagnostics()["n_steps"].float().mean()) < 20


@pytest.mark.parametrize("total", [5.0, 0.0])
def test_multinomial_scores_are_those_of_torch(total):
    """Zeros in the data and in the probabilities included; batched parameters too."""
    probs = torch.tensor([[0.2, 0.3, 0.5, 0.0], [0.1, 0.1, 0.7, 0.1]])
    value = torch.tensor([total - 1.0 if total else 0.0, 1.0 if total else 0.0, 0.0, 0.0])
    law = dist.Multinomial(int(total), logits=probs.log())  # minus infinity is one of them
    with VmapSafe():
        safe = pyro.poutine.trace(lambda: pyro.sample("x", law, obs=value)).get_trace()
    torch.testing.assert_close(safe.nodes["x"]["fn"].log_prob(value), law.log_prob(value))


def test_multinomial_models_are_vectorized():
    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("n", 2):
            counts = torch.tensor([[1.0, 2.0, 3.0], [0.0, 6.0, 0.0]])
            pyro.sample("y", dist.Multinomial(6, p), obs=counts)

    mcmc = run(model, num_samples=100, warmup_steps=100)  # warnings are errors
    mean = mcmc.get_samples(group_by_chain=False)["p"].mean(0)
    torch.testing.assert_close(mean, torch.tensor([2.0, 9.0, 4.0]) / 15.0, atol=0.03, rtol=0)


def test_recording_kernels_refuse_moving_supports_too():
    """Pyro's own driver fixes the support at the first trace just the same."""
    mcmc = pyro.infer.MCMC(RecordingNUTS(moving_support), 5, 5, disable_progbar=True)
    with pytest.raises(ValueError, match="site 'x': its support depends on other latents"):
        mcmc.run(Y)


def test_an_observed_site_is_not_to_blame():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Poisson(3.0), obs=torch.tensor(2.0))
        pyro.sample("d", dist.Delta(2.0 * m))
        raise RuntimeError("some error of Pyro")

    with pytest.raises(TypeError, match="site 'd' is a latent Delta"):
        HMC(model).bind()
