"""Known answers through Pyro's kernels in latent space: a linear generator and three modes.

Statistical checks: |z| < 5 with ArviZ's standard error and an effective sample size of at least 400
per statistic; the planted bugs (the energy at another temperature, the prior counted twice) shift
the means by more than ten such errors.
"""

from __future__ import annotations

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS

from pyro_ebm import ApproximateSampleWarning, GeneralizedEBM, LatentReparam, diagnose, to_arviz
from pyro_ebm.mcmc import RecordingHMC, RecordingNUTS
from pyro_ebm.ops.log_space import log_mean_exp


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


F64 = torch.float64
A = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.2]], dtype=F64)
H = torch.tensor([1.0, -1.0, 0.5], dtype=F64)
MEAN = torch.tensor([0.24235808, -0.49344978], dtype=F64)
COVARIANCE = torch.tensor([[0.44541485, -0.09606987], [-0.09606987, 0.51091703]], dtype=F64)
LOG_Z = -0.49638443


def standard_normal():
    return dist.Normal(torch.zeros(2), 1.0).to_event(1)


def linear(beta=1.0, prior=None):
    return GeneralizedEBM(
        lambda z: z @ A.T,
        prior or standard_normal(),
        lambda x: 0.5 * x.square().sum(-1) - x @ H,
        inverse_temperature=beta,
    )


def in_latent_space(law):
    return poutine.reparam(lambda: pyro.sample("x", law), {"x": LatentReparam()})


def run(kernel, num_samples, *, num_chains=1, initial=None, warmup=200):
    mcmc = MCMC(
        kernel,
        num_samples=num_samples,
        warmup_steps=warmup,
        num_chains=num_chains,
        initial_params=initial,
        disable_progbar=True,
    )
    mcmc.run()
    return mcmc


def statistics(draws):
    """First and second moments, ``(chains, draws, 5)``."""
    x, y = draws.unbind(-1)
    return torch.stack([x, y, x * x, y * y, x * y], -1)


MOMENTS = torch.stack(
    [
        *MEAN,
        COVARIANCE[0, 0] + MEAN[0] ** 2,
        COVARIANCE[1, 1] + MEAN[1] ** 2,
        COVARIANCE[0, 1] + MEAN[0] * MEAN[1],
    ]
)


def worst_z(draws):
    """Against the linear model's moments; ``draws`` are ``(chains, draws, 2)``."""
    worst = 0.0
    for values, truth in zip(statistics(draws).unbind(-1), MOMENTS, strict=True):
        values = values.numpy()
        assert az.ess(values).item() >= 400
        worst = max(worst, abs(values.mean() - truth.item()) / az.mcse(values).item())
    return worst


def test_the_reference_values_solve_the_linear_model():
    precision = torch.eye(2) + A.T @ A
    torch.testing.assert_close(torch.linalg.inv(precision), COVARIANCE, atol=1e-8, rtol=0)
    torch.testing.assert_close(COVARIANCE @ A.T @ H, MEAN, atol=1e-7, rtol=0)
    log_z = 0.5 * MEAN @ A.T @ H - 0.5 * torch.logdet(precision)
    assert abs(log_z - LOG_Z) < 1e-7


def test_recording_nuts_on_the_linear_model():
    mcmc = run(RecordingNUTS(in_latent_space(linear())), 1000)
    assert worst_z(mcmc.get_samples(group_by_chain=True)["x_latent"]) < 5
    stats = mcmc.diagnostics()["sample_stats"]["chain 0"]
    assert not stats["diverging"].any()
    z = mcmc.get_samples()["x_latent"][-1]
    torch.testing.assert_close(
        torch.tensor(stats["lp"][-1]), linear().latent.unnormalized_log_prob(z)
    )


def test_short_chains_on_the_linear_model():
    """3000 independent chains: the standard error of a mean is sd / sqrt(3000)."""
    values = statistics(linear().latent.sample((3000,)))
    z = (values.mean(0) - MOMENTS) / values.std(0) * 3000**0.5
    assert z.abs().max() < 5
    wrong = statistics(linear(beta=1.5).latent.sample((3000,)))
    assert ((wrong.mean(0) - MOMENTS) / wrong.std(0) * 3000**0.5).abs().max() > 5


def test_log_z_of_the_linear_model_over_its_generator():
    z = standard_normal().sample((50_000,))
    weights = -linear().latent.energy(z)
    estimate = log_mean_exp(weights)
    error = weights.exp().std() / weights.exp().mean() / 50_000**0.5
    assert abs(estimate - LOG_Z) < 5 * error


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [NUTS, RecordingNUTS])
def test_four_chains_on_the_linear_model_and_their_report(kernel):
    mcmc = run(kernel(in_latent_space(linear())), 800, num_chains=4)
    assert worst_z(mcmc.get_samples(group_by_chain=True)["x_latent"]) < 5
    data, verdict = to_arviz(mcmc), diagnose(mcmc)
    assert verdict.rhat.value < 1.01
    assert verdict.num_divergences == 0
    assert data.posterior["x_latent"].shape == (4, 800, 2)
    assert "x" not in data.posterior
    if kernel is RecordingNUTS:
        assert verdict.ok
        assert min(verdict.bfmi) > 0.5
        assert {"lp", "energy", "diverging", "tree_depth"} <= set(data.sample_stats)


@pytest.mark.slow
def test_hmc_on_the_linear_model():
    kernel = RecordingHMC(in_latent_space(linear()), trajectory_length=2.0)
    assert worst_z(run(kernel, 2000).get_samples(group_by_chain=True)["x_latent"]) < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "law",
    [
        lambda: linear(beta=1.5),
        lambda: linear(prior=dist.Normal(torch.zeros(2), 0.5**0.5).to_event(1)),
    ],
    ids=["another temperature", "prior counted twice"],
)
def test_planted_bugs_are_noticed(law):
    mcmc = run(NUTS(in_latent_space(law())), 1500)
    assert worst_z(mcmc.get_samples(group_by_chain=True)["x_latent"]) > 5


# --- three modes ---------------------------------------------------------------------------------

CENTRES = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]], dtype=F64)
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
MASSES = torch.tensor([0.49793, 0.29975, 0.20231], dtype=F64)


def tilt(z):
    """The standard normal tilted by this is the mixture of N(a_k, I) with weights v_k; Z = 1."""
    return -torch.logsumexp(WEIGHTS.log() + z @ CENTRES.T - 0.5 * CENTRES.square().sum(-1), -1)


def three_modes():
    return GeneralizedEBM(lambda z: z, standard_normal(), tilt, log_normalizer=0.0)


def masses(z):
    nearest = (z.unsqueeze(-2) - CENTRES).square().sum(-1).argmin(-1)
    return torch.bincount(nearest.flatten(), minlength=3) / nearest.numel()


def test_the_latent_law_is_the_mixture():
    parts = dist.MultivariateNormal(CENTRES, torch.eye(2))
    truth = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts)
    z = 3 * torch.randn(50, 2)
    torch.testing.assert_close(three_modes().latent.log_prob(z), truth.log_prob(z))
    drawn = masses(truth.sample((40_000,)))
    assert ((drawn - MASSES).abs() < 5 * (MASSES * (1 - MASSES) / 40_000).sqrt()).all()


def test_short_chains_find_all_modes_and_say_that_they_have_not_mixed():
    """Chains spread from the base get the masses to .05, though each stays where it is."""
    with pytest.warns(ApproximateSampleWarning, match="has not converged"):
        z = three_modes().latent.sample((3000,))
    assert (masses(z) - MASSES).abs().max() < 0.05


def test_chains_that_each_know_one_mode_are_diagnosed():
    """Three short NUTS runs, one from each centre: R-hat sees what no single chain could."""
    model = in_latent_space(three_modes())
    chains = []
    for centre in CENTRES:
        initial = {"x_latent": centre.clone()}
        mcmc = run(RecordingNUTS(model), 50, initial=initial, warmup=20)
        chains.append(mcmc.get_samples()["x_latent"])
    verdict = diagnose({"x_latent": torch.stack(chains)})
    assert not verdict.ok
    assert verdict.rhat.value > 1.1
    assert "chains disagree" in str(verdict)


def test_importance_sampling_from_the_prior_looks_better_than_it_is():
    """The tilt lies 3 to 4 standard deviations away: a few of 20000 draws carry all the weight."""
    weights = -tilt(standard_normal().sample((20_000,)))
    share = (weights - weights.logsumexp(0)).exp()
    assert 1 / share.square().sum() / 20_000 < 0.05


@pytest.mark.slow
def test_long_nuts_runs_cross_between_the_modes():
    """With 4 x 4000 draws the crossings are many enough for the masses, and the report agrees."""
    mcmc = run(RecordingNUTS(in_latent_space(three_modes())), 4000, num_chains=4, warmup=200)
    z = mcmc.get_samples(group_by_chain=True)["x_latent"]
    nearest = (z.unsqueeze(-2) - CENTRES).square().sum(-1).argmin(-1)
    for k in range(3):
        inside = (nearest == k).double().numpy()
        error = az.mcse(inside).item()
        assert abs(inside.mean() - MASSES[k].item()) < 5 * error
        assert error < 0.05
