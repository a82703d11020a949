"""Everything stays on the device of the data and the parameters; torch's default device is not it.

The tests need an accelerator and are skipped without one. ``PYRO_EBM_TEST_DEVICE=cpu`` runs them on
the processor, where they only show that the paths work.
"""

from __future__ import annotations

import math
import os
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch.distributions import constraints

from pyro_ebm import infer, mcmc, normalizers
from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, PushforwardDistribution
from pyro_ebm.energies import (
    Edges,
    ExponentialRandomGraph,
    GaussianEnergy,
    GaussianMixtureEnergy,
    Ising,
    MLPEnergy,
    Triangles,
)
from pyro_ebm.ops.constraints import spins
from pyro_ebm.poutine import surrogate

DEVICE = torch.device(os.environ.get("PYRO_EBM_TEST_DEVICE", "cuda"))

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no accelerator here"
)


def on_device(tensor):
    return tensor.device.type == DEVICE.type


class WithoutLogZ(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


def gaussian():
    """A correlated Gaussian on a base: log Z is known in closed form."""
    base = dist.Normal(torch.zeros(2, device=DEVICE), 1.5).to_event(1)
    precision = torch.tensor([[1.0, 0.4], [0.4, 0.6]], device=DEVICE)
    return EnergyDistribution(lambda x: 0.5 * torch.einsum("...i,ij,...j", x, precision, x), base)


def exact_log_z():
    base = torch.eye(2, dtype=torch.float64) / 1.5**2
    tilt = torch.tensor([[1.0, 0.4], [0.4, 0.6]], dtype=torch.float64)
    return float(0.5 * (torch.logdet(base) - torch.logdet(base + tilt)))


def covariance():
    tilt = torch.tensor([[1.0, 0.4], [0.4, 0.6]], dtype=torch.float64)
    return torch.linalg.inv(tilt + torch.eye(2, dtype=torch.float64) / 1.5**2)


def exact_draws(num):
    law = dist.MultivariateNormal(torch.zeros(2, device=DEVICE), covariance().float().to(DEVICE))
    return law.sample((10, num // 10))


KERNELS = {
    "hmc": mcmc.HMC,
    "nuts": mcmc.NUTS,
    "chees": mcmc.ChEESHMC,
    "mala": mcmc.MALA,
    "random walk": mcmc.RandomWalk,
    "elliptical slice": mcmc.EllipticalSlice,
    "pcn": mcmc.PCN,
    "pcnl": mcmc.PCNL,
    "tempering": mcmc.ParallelTempering,
    "ula": partial(mcmc.ULA, step_size=0.2),
    "kinetic": partial(mcmc.KineticLangevin, step_size=0.2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name):
    pyro.set_rng_seed(0)
    run = mcmc.MCMC(KERNELS[name](gaussian()), 300, 300, num_chains=64, disable_progbar=True)
    run.run()
    draws = run.get_samples()["x"]
    assert on_device(draws)
    found = torch.cov(draws.reshape(-1, 2).double().cpu().T)
    assert torch.allclose(found, covariance(), atol=0.15)


ESTIMATORS = {
    "importance": lambda p: normalizers.importance(p, num_samples=20_000),
    "ais": lambda p: normalizers.ais(p),
    "smc": lambda p: normalizers.smc(p),
    "bridge": lambda p: normalizers.bridge(p, exact_draws(5000)),
    "quadrature": lambda p: normalizers.quadrature(p),
    "thermodynamic": lambda p: normalizers.thermodynamic(p),
    "stepping stones": lambda p: normalizers.stepping_stones(p),
    "auto": lambda p: normalizers.estimate_log_normalizer(p),
    "nce": lambda p: normalizers.nce(p, exact_draws(5000).reshape(-1, 2)),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_normalizers(name):
    pyro.set_rng_seed(0)
    found = ESTIMATORS[name](gaussian())
    assert abs(float(found.value) - exact_log_z()) < 0.1
    assert math.isfinite(
        float(gaussian().with_log_normalizer(found).log_prob(exact_draws(10))[0, 0])
    )


def test_annealing_of_a_lattice_and_its_exact_sum():
    pyro.set_rng_seed(0)
    law = EnergyDistribution(WithoutLogZ(torch.tensor(0.2, device=DEVICE), (3, 3)))
    exact = Ising(torch.tensor(0.2, device=DEVICE), (3, 3)).log_normalizer()
    assert abs(float(normalizers.exact(law).value - exact)) < 1e-4
    assert abs(float(normalizers.from_uniform(law).value - exact)) < 0.1


def test_evidence():
    """Of one draw of N(0, 2)."""
    pyro.set_rng_seed(0)
    y = torch.tensor(1.0, device=DEVICE)

    def model(y):
        m = pyro.sample("m", dist.Normal(torch.zeros((), device=DEVICE), 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    exact = float(dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0)))
    for method in ("bridge", "stepping_stones"):
        assert abs(float(normalizers.evidence(model, y, method=method).value) - exact) < 0.1


OBJECTIVES = {
    "nce": partial(infer.NCE, num_noise=4),
    "ranking": partial(infer.RankingNCE, num_noise=4),
    "energy discrepancy": partial(infer.EnergyDiscrepancy, num_negatives=4),
    "kale": infer.KALE,
    "donsker-varadhan": infer.DonskerVaradhan,
    "score matching": infer.ScoreMatching,
    "kernel stein": infer.KernelStein,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    pyro.set_rng_seed(0)
    net = MLPEnergy((2,), (16,), confinement=0.1).to(DEVICE)
    base = dist.Normal(torch.zeros(2, device=DEVICE), 2.0).to_event(1)
    data = torch.randn(128, 2, device=DEVICE)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(net, base, conditional=False), obs=x)

    objective = OBJECTIVES[name]()
    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    first = [svi.step(data) for _ in range(3)]
    result = infer.fit(model, data, objective, num_steps=5, batch_size=64, disable_progbar=True)
    assert all(math.isfinite(v) for v in first + result.losses)
    assert all(on_device(p) for p in net.parameters())


def test_a_fit_is_resumed_bit_for_bit(tmp_path):
    """Its noise is drawn by the device's own generator."""

    def fitted(num_steps, checkpoint=None):
        scale = torch.tensor(2.0, device=DEVICE)
        pyro.clear_param_store()
        noise = dist.Normal(torch.zeros((), device=DEVICE), 2.0)

        def model(x):
            a = pyro.param("a", scale)
            with pyro.plate("data", len(x)):
                pyro.sample("x", EnergyDistribution(lambda y: a * y**2, event_shape=()), obs=x)

        options = {"seed": 3, "checkpoint": checkpoint, "disable_progbar": True}
        return infer.fit(model, data, infer.NCE(4, noise), num_steps=num_steps, **options).losses

    data = torch.linspace(-2.0, 2.0, 32, device=DEVICE)
    fitted(3, tmp_path / "fit.pt")
    torch.randn(5, device=DEVICE)
    assert fitted(6, tmp_path / "fit.pt") == fitted(6)


@pytest.mark.parametrize(
    "make", [infer.PseudoLikelihood, infer.RatioMatching, infer.DiscreteFisher]
)
def test_discrete_objectives(make):
    pyro.set_rng_seed(0)
    coupling = torch.nn.Parameter(torch.zeros(4, 4, device=DEVICE))
    data = 2.0 * torch.randint(0, 2, (64, 4), device=DEVICE) - 1.0

    def energy(x):
        return -0.5 * torch.einsum("...i,ij,...j", x, coupling, x)

    def model(x):
        pyro.param("coupling", coupling)
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(
                energy, event_shape=(4,), support=constraints.independent(spins, 1)
            )
            pyro.sample("x", ebm, obs=x)

    losses = infer.fit(model, data, make(), num_steps=3, disable_progbar=True).losses
    assert all(math.isfinite(v) for v in losses)


def test_the_short_sampler_and_gibbs_sweeps():
    assert on_device(gaussian().sample((64,)))
    lattice = EnergyDistribution(Ising(torch.tensor(0.3, device=DEVICE), (4, 4)))
    assert on_device(lattice.sample((8,)))


def test_tractable_energies():
    for energy in (
        GaussianEnergy(torch.zeros((), device=DEVICE), 2.0),
        GaussianMixtureEnergy(torch.zeros(2, 2, device=DEVICE), torch.ones(2, device=DEVICE)),
    ):
        law = EnergyDistribution(energy.to(DEVICE))
        x = law.sample((5,))
        assert on_device(x)
        assert on_device(law.log_prob(x))


def rates(data):
    """One latent precision with the exact log Z of a Gaussian."""
    precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0, device=DEVICE), 1.0))
    ebm = EnergyDistribution(
        lambda x: 0.5 * precision * x**2,
        event_shape=(),
        log_normalizer=lambda: 0.5 * torch.log(2 * math.pi / precision),
    )
    with pyro.plate("data", len(data)):
        pyro.sample("x", ebm, obs=data)


def test_posteriors_over_parameters():
    pyro.set_rng_seed(0)
    data = torch.randn(50, device=DEVICE) / 3**0.5
    exact = 27.0 / (1.0 + 0.5 * float(data.square().sum()))
    run = mcmc.MCMC(mcmc.HMC(rates), 400, 300, num_chains=32, disable_progbar=True)
    run.run(data)
    draws = run.get_samples()["precision"]
    assert on_device(draws)
    assert abs(float(draws.mean()) - exact) < 0.05 * exact
    stock = pyro.infer.MCMC(pyro.infer.NUTS(rates), 200, 200, disable_progbar=True)
    stock.run(data)
    assert abs(float(stock.get_samples()["precision"].mean()) - exact) < 0.1 * exact


def test_exchange():
    """Beside HMC through an exact log Z."""
    pyro.set_rng_seed(0)
    spins_seen = 2.0 * torch.randint(0, 2, (4, 4), device=DEVICE) - 1.0

    def model(image, energy):
        coupling = pyro.sample("coupling", dist.Uniform(torch.zeros((), device=DEVICE), 0.3))
        pyro.sample("image", EnergyDistribution(energy(coupling)), obs=image)

    def coupling_of(kernel, energy):
        run = mcmc.MCMC(kernel, 300, 200, num_chains=64, disable_progbar=True)
        run.run(spins_seen, energy)
        return run.get_samples()["coupling"]

    exact = coupling_of(mcmc.HMC(model), lambda c: Ising(c, (4, 4)))
    found = coupling_of(mcmc.Exchange(model), lambda c: WithoutLogZ(c, (4, 4)))
    assert on_device(exact)
    assert on_device(found)
    assert abs(float(exact.mean() - found.mean())) < 0.02


def test_grouped_exchange():
    pyro.set_rng_seed(0)
    images = 2.0 * torch.randint(0, 2, (3, 4, 4), device=DEVICE) - 1.0

    def groups(images):
        mean = pyro.sample("mean", dist.Normal(torch.tensor(-1.5, device=DEVICE), 0.2))
        with pyro.plate("groups", len(images)):
            coupling = pyro.sample("coupling", dist.LogNormal(mean, 0.1))
            law = EnergyDistribution(WithoutLogZ(coupling, (4, 4)))
            pyro.sample("image", law, obs=images)

    run = mcmc.MCMC(
        mcmc.GroupedExchange(groups, "groups", auxiliary=mcmc.Sweeps(5)),
        20,
        20,
        num_chains=8,
        disable_progbar=True,
    )
    run.run(images)
    assert on_device(run.get_samples()["coupling"])


def test_diagnostics_of_exchange():
    pyro.set_rng_seed(0)
    image = 2.0 * torch.randint(0, 2, (4, 4), device=DEVICE) - 1.0

    def model(image):
        coupling = pyro.sample("coupling", dist.Uniform(torch.zeros((), device=DEVICE), 0.4))
        pyro.sample("image", EnergyDistribution(WithoutLogZ(coupling, (4, 4))), obs=image)

    run = mcmc.MCMC(mcmc.Exchange(model), 100, 100, num_chains=8, disable_progbar=True)
    run.run(image)
    assert math.isfinite(mcmc.exchange_diagnostics(run, max_draws=100).acd)


def tilted(data):
    """Rows of a base tilted by an unknown precision, log Z unknown."""
    precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0, device=DEVICE), 1.0))
    base = dist.Normal(torch.zeros((), device=DEVICE), 2.0)
    with pyro.plate("data", len(data)):
        law = EnergyDistribution(lambda x: 0.5 * precision * x**2, base)
        pyro.sample("x", law, obs=data)


@pytest.mark.parametrize("method", ["auto", "nce", "generalized"])
def test_ways_to_a_posterior(method):
    pyro.set_rng_seed(0)
    data = torch.randn(200, device=DEVICE) / 1.25**0.5
    if method == "generalized":
        options = {"loss": infer.ScoreMatching(), "num_samples": 100}
        found = infer.generalized_posterior(tilted, data, **options)
    else:
        options = {"num_samples": 60, "warmup_steps": 100, "num_chains": 8}
        found = infer.posterior(tilted, data, method=method, **options)
    assert abs(float(found.record.draws["precision"].mean()) - 1.0) < 0.4


def test_frozen_objectives_under_mcmc():
    pyro.set_rng_seed(0)
    data = torch.randn(100, device=DEVICE)

    def model(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0, device=DEVICE), 1.0))
        base = dist.Normal(torch.zeros((), device=DEVICE), 2.0)
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(lambda x: 0.5 * precision * x**2, base)
            pyro.sample("x", law, obs=x)

    frozen = infer.NCE(num_noise=5).freeze(model, data)
    run = mcmc.MCMC(
        mcmc.HMC(surrogate(model, frozen)), 100, 200, num_chains=16, disable_progbar=True
    )
    run.run(data)
    assert on_device(run.get_samples()["precision"])


def test_generalized_ebm_in_latent_space():
    pyro.set_rng_seed(0)
    prior = dist.Normal(torch.zeros(2, device=DEVICE), 1.0).to_event(1)
    generator = torch.nn.Linear(2, 3).to(DEVICE)
    law = GeneralizedEBM(generator, prior, lambda x: 0.1 * x.square().sum(-1))
    run = mcmc.MCMC(mcmc.HMC(law), 50, 100, num_chains=8, disable_progbar=True)
    run.run()
    assert on_device(run.get_samples()["x"])
    assert on_device(PushforwardDistribution(generator, prior).sample((3,)))


def test_replay_buffer():
    law = gaussian()
    buffer = mcmc.ReplayBuffer(partial(mcmc.ULA, step_size=0.3), size=50, num_steps=3)
    assert on_device(buffer(law, (20,)))
    assert on_device(buffer(law, (20,)))


def test_an_anchored_log_z():
    pyro.set_rng_seed(0)
    anchor = torch.tensor([[0.2]], device=DEVICE)
    family = Ising(torch.tensor(0.0, device=DEVICE), (4, 4))
    log_z = normalizers.anchored(family, anchor, num_draws=2000)
    to = torch.tensor([0.22], device=DEVICE)
    exact = [Ising(k.reshape(()), (4, 4)).log_normalizer() for k in (to, anchor)]
    found = log_z(to) - log_z(anchor[0])
    assert abs(float(found - (exact[0] - exact[1]))) < 0.05
    assert len(log_z.bootstrap(3)) == 3


def test_random_graphs():
    pyro.set_rng_seed(0)
    coef = torch.tensor([-1.0, 0.1], device=DEVICE).expand(5, 2)
    family = ExponentialRandomGraph(coef, 8, [Edges(), Triangles()])
    assert on_device(family.sweep(torch.zeros(5, 28, device=DEVICE), 3))
