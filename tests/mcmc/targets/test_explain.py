"""Models that cannot be set up, and entries that the density does not depend on."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import hmm
from pyro.ops import special

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.mcmc import HMC, MCMC, RecordingNUTS
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.vmap_safe import VmapSafe
from pyro_ebm.ops.constraints import spins
from pyro_ebm.poutine import surrogate
from pyro_ebm.testing import assert_mean_close

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


def of_classes(x, *, is_declared):
    """Rows of four spins, of which an enumerated class has the sign of the coupling."""
    k = pyro.sample("k", dist.Normal(torch.tensor(1.0), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        signed = k * (2 * z - 1)
        law = EnergyDistribution(
            lambda v: -signed * v.prod(-1),
            support=spins,
            event_shape=(4,),
            batch_shape=signed.shape if is_declared else (),
        )
        pyro.sample("x", law, obs=x)


def test_what_an_energy_said_is_not_lost_under_a_headline():
    """And what it says to do is done."""
    with pytest.raises(TypeError, match="site 'z' .* said: EBM site 'x' has .* give batch_shape="):
        HMC(surrogate(of_classes, Enumerated())).bind(torch.ones(5, 4), is_declared=False)
    target = HMC(surrogate(of_classes, Enumerated())).bind(torch.ones(5, 4), is_declared=True)
    k = torch.tensor([[-0.7], [0.0], [1.3]])
    wanted = 0.5 * (k[:, 0] - 1.0) ** 2  # either sign of the coupling is as likely
    with pyro.validation_enabled(is_validate=False):
        found = target.potential(k)
    torch.testing.assert_close(found - found[1], wanted - wanted[1])


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


# --- hidden Markov models, enumeration, mixtures


LOGITS = torch.tensor([[1.0, -0.5], [-0.3, 0.8]])
PATH = torch.tensor([1.9, 2.3, -1.5, -2.2, 1.1, 0.3])


def hidden_markov(y):
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    steps = dist.Normal(mu, 1.0)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), LOGITS, steps), obs=y)


def enumerated(y):
    mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z.long()], 1.0), obs=y)


def summed(model, mu, y):
    """The log density with the states summed out by hand."""
    prior = dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).log_prob(mu).sum()
    steps = dist.Normal(mu, 1.0).log_prob(y[:, None])
    if model is enumerated:
        weights = torch.tensor([0.7, 0.3]).log()
        return prior + torch.logsumexp(weights + steps, 1).sum()
    forward = torch.zeros(2).log_softmax(0)
    for step in steps:  # Pyro's model moves before its first observation
        forward = torch.logsumexp(forward[:, None] + LOGITS.log_softmax(1), 0) + step
    return prior + torch.logsumexp(forward, 0)


@pytest.mark.parametrize("model", [hidden_markov, enumerated])
def test_what_is_summed_out_is_vectorized(model):
    """No warning, and value and slope as by hand, also where a probability is zero."""
    target = HMC(model).bind(PATH)
    assert target.is_vectorized
    q = torch.cat([3.0 * torch.randn(4, 2), torch.tensor([[300.0, -300.0]])])
    u, gradient = CapturedPotential(target)(q)
    for row, value, slope in zip(q[:4], u, gradient, strict=False):
        at = row.clone().requires_grad_()
        wanted = -summed(model, at, PATH)
        torch.testing.assert_close(value, wanted.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(slope, torch.autograd.grad(wanted, at)[0], rtol=1e-3, atol=1e-3)
    assert gradient.isfinite().all()


def test_pyro_is_left_as_it_was():
    before = special._SafeLog, hmm._logmatmulexp
    HMC(hidden_markov).bind(PATH)
    assert (special._SafeLog, hmm._logmatmulexp) == before


def test_a_latent_mixture_lives_where_its_components_do():
    def model():
        parts = dist.Gamma(torch.tensor([2.0, 9.0]), 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))

    mcmc = MCMC(HMC(model), 100, 200, num_chains=256, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["x"].double()
    assert float(x.min()) > 0
    assert_mean_close(x.mean(1), 5.5)


def test_the_site_that_cannot_be_vectorized_is_named():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("rank", dist.OrderedLogistic(a, torch.tensor([-1.0, 1.0])), obs=torch.tensor(1))

    with pytest.warns(UserWarning, match="cannot be vectorized after site 'a', so its chains"):
        HMC(model).bind()

    class Noted(dist.Normal):
        def log_prob(self, value):
            return super().log_prob(value) if bool(value > -9.0) else value

    def own():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0), obs=torch.tensor(0.3))
        pyro.sample("c", Noted(0.0, 1.0))

    with pytest.warns(UserWarning, match="cannot be vectorized at site 'c', so its chains"):
        HMC(own).bind()


def test_a_run_under_no_grad():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    mcmc = MCMC(HMC(model), 5, 5, num_chains=4, disable_progbar=True)
    with torch.no_grad():
        mcmc.run()
    assert mcmc.get_samples()["a"].isfinite().all()


def test_a_string_is_no_list_of_names():
    with pytest.raises(TypeError, match="a list of names, got the string 'mu'"):
        MCMC(HMC(hidden_markov), 5, save_params="mu")


def test_handlers_do_not_hide_a_models_name():
    conditioned = poutine.scale(poutine.condition(discrete, {"m": Y}), scale=2.0)
    with pytest.raises(TypeError, match="model .discrete."):
        run(conditioned, Y)
