"""The driver: Pyro models and distributions in one batch, resumed, interrupted, refused."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS

import pyro_ebm as ebm
from pyro_ebm.chains import diagnose
from pyro_ebm.energies import GaussianEnergy, MLPEnergy
from pyro_ebm.errors import ApproximateSampleWarning, NonFiniteEnergyError
from pyro_ebm.mcmc import HMC, MALA, MCMC, ULA, ChEESHMC, RandomWalk
from pyro_ebm.mcmc.kernels.adaptation import window_ends
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import PROBLEMS

Y = torch.tensor([0.3, 1.2, -0.4, 2.0, 0.9])


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(3)


def run(kernel, *args, num_samples=200, warmup_steps=200, num_chains=64, **kwargs):
    options = {k: kwargs.pop(k) for k in ("thinning", "save_params") if k in kwargs}
    mcmc = MCMC(
        kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True, **options
    )
    mcmc.run(*args, **kwargs)
    return mcmc


def close(mcmc, name, mean, sd):
    """Mean and standard deviation within five MCSE, at an ESS of 400 or more."""
    table = mcmc.summary()
    rows = table[table.index.str.startswith(name)]
    assert (rows["ess_bulk"] > 400).all()
    mcse = rows["mcse_mean"].to_numpy()
    assert (np.abs(rows["mean"].to_numpy() - np.asarray(mean)) < 5.0 * mcse).all()
    relative = 5.0 / np.sqrt(2.0 * rows["ess_tail"].to_numpy())
    assert (np.abs(rows["sd"].to_numpy() / np.asarray(sd) - 1.0) < relative).all()


# --- known posteriors of ordinary models


def normal(y):
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def shares(y):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Categorical(p), obs=y)


@pytest.mark.parametrize("make", [HMC, ChEESHMC, MALA, RandomWalk])
def test_conjugate_normal(make):
    mcmc = run(make(normal), Y, num_samples=400)
    variance = 1.0 / (0.25 + 5.0)
    close(mcmc, "m", variance * float(Y.sum()), math.sqrt(variance))


def test_conjugate_gamma():
    y = torch.tensor([1.0, 3.0, 2.0, 4.0])
    close(run(ChEESHMC(counts), y), "rate", 12.0 / 5.0, math.sqrt(12.0) / 5.0)


def test_conjugate_dirichlet():
    y = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    exact = dist.Dirichlet(torch.tensor([2.0, 4.0, 7.0]))
    mcmc = run(ChEESHMC(shares), y)
    close(mcmc, "p", exact.mean.numpy(), exact.variance.sqrt().numpy())
    assert torch.allclose(mcmc.get_samples()["p"].sum(-1), torch.ones(()), atol=1e-5)


def test_hierarchy_with_an_energy():
    """An exact EBM in a plate below a latent is the Gaussian that it is."""

    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 2.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", ebm.EnergyDistribution(GaussianEnergy(m, 1.0)), obs=y)

    variance = 1.0 / (0.25 + 5.0)
    close(run(HMC(model), Y), "m", variance * float(Y.sum()), math.sqrt(variance))


def test_missing_log_z_raises_before_the_first_draw():
    def model(y):
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        with pyro.plate("n", len(y)):
            p = ebm.EnergyDistribution(lambda x: theta * x**2, event_shape=())
            pyro.sample("y", p, obs=y)

    with pytest.raises(ebm.MissingNormalizerError, match="latent 'theta'"):
        run(HMC(model), Y)


def test_a_detached_parent_raises_too():
    def model(y):
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0)).detach()
        with pyro.plate("n", len(y)):
            p = ebm.EnergyDistribution(lambda x: theta * x**2, event_shape=())
            pyro.sample("y", p, obs=y)

    with pytest.raises(ebm.MissingNormalizerError, match="latent 'theta'"):
        run(HMC(model), Y)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in ("three modes", "wall")])
def test_distributions(name):
    """Of three modes HMC finds the masses by luck alone; tempering and SMC are tested on them."""
    made = PROBLEMS[name]()
    mcmc = run(ChEESHMC(made.dist), num_chains=128)
    site = "x_latent" if name == "linear gebm" else "x"
    close(mcmc, site, made.mean.numpy(), made.variance.sqrt().numpy())


def test_potential_fn():
    start = {"a": torch.randn(64), "b": torch.randn(64, 2)}

    def potential(q):
        return 0.5 * q["a"] ** 2 + 2.0 * (q["b"] ** 2).sum()

    mcmc = run(HMC(potential_fn=potential), initial_params=start)
    close(mcmc, "a", 0.0, 1.0)
    close(mcmc, "b", 0.0, 0.5)


def test_a_model_that_vmap_cannot_follow_runs_chain_by_chain():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if float(x.detach()) > 100.0:
            pyro.factor("never", torch.tensor(-1.0))

    with pytest.warns(UserWarning, match="model 'model' cannot be vectorized.*one after another"):
        mcmc = run(HMC(model), num_chains=2, num_samples=20, warmup_steps=10)
    assert mcmc.get_samples()["x"].shape == (2, 20)


# --- what a run leaves behind


def test_shapes_names_and_statistics():
    mcmc = run(HMC(PROBLEMS["linear gebm"]().dist), num_samples=20, num_chains=8)
    draws = mcmc.get_samples()
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        "x_latent": (8, 20, 2),
        "x": (8, 20, 3),
    }
    assert mcmc.get_samples(5, group_by_chain=False)["x"].shape == (40, 3)
    stats = mcmc.diagnostics()
    assert set(stats) == {
        "lp",
        "energy",
        "energy_error",
        "acceptance_rate",
        "diverging",
        "n_steps",
        "step_size",
    }
    assert all(v.shape == (8, 20) for v in stats.values())
    data = ebm.to_arviz(mcmc)
    assert data["sample_stats"]["energy"].shape == (8, 20)
    assert data["posterior"].attrs["sampler"] == "HMC"


def test_lp_is_minus_the_unconstrained_potential():
    made = PROBLEMS["gamma"]()
    mcmc = run(HMC(made.dist), num_samples=10, num_chains=4)
    u = mcmc.get_samples(unconstrained=True)["x"]
    want = -made.dist.potential(u.exp()) + u
    torch.testing.assert_close(mcmc.diagnostics()["lp"], want.to(u.dtype), rtol=1e-5, atol=1e-5)


def test_thinning_and_save_params():
    pyro.set_rng_seed(0)
    every = run(HMC(shares), torch.tensor([0, 1]), num_samples=12, warmup_steps=5, num_chains=4)
    pyro.set_rng_seed(0)
    third = run(
        HMC(shares), torch.tensor([0, 1]), num_samples=4, warmup_steps=5, num_chains=4, thinning=3
    )
    assert torch.equal(every.get_samples()["p"][:, 2::3], third.get_samples()["p"])
    saved = run(HMC(normal), Y, num_samples=4, num_chains=4, save_params=["m"])
    assert list(saved.get_samples()) == ["m"]


def test_unadjusted_chains_are_marked():
    mcmc = run(ULA(PROBLEMS["gaussian"]().dist), num_samples=8, num_chains=4)
    assert ebm.to_arviz(mcmc)["posterior"].attrs["adjusted"] == 0


def test_a_state_goes_on_bit_for_bit(tmp_path):
    """100 draws are 50 draws, a file, and 50 more in a kernel that knows nothing of the first."""
    pyro.set_rng_seed(1)
    whole = run(ChEESHMC(normal), Y, num_samples=60, num_chains=8)
    pyro.set_rng_seed(1)
    first = run(ChEESHMC(normal), Y, num_samples=30, warmup_steps=200, num_chains=8)
    first.state.save(tmp_path / "state.pt")
    torch.randn(17)
    state = ebm.mcmc.State.load(tmp_path / "state.pt")
    state.restore_rng()
    second = run(ChEESHMC(normal), Y, num_samples=30, num_chains=8, initial_state=state)
    joined = torch.cat([first.get_samples()["m"], second.get_samples()["m"]], 1)
    assert torch.equal(joined, whole.get_samples()["m"][:, : joined.shape[1]])


def test_interrupting_keeps_what_was_drawn(monkeypatch):
    kernel, steps = HMC(normal), []
    step = kernel.step

    def interrupted(potential, state):
        steps.append(1)
        if len(steps) == 25:
            raise KeyboardInterrupt
        return step(potential, state)

    monkeypatch.setattr(kernel, "step", interrupted)
    mcmc = run(kernel, Y, num_samples=50, warmup_steps=10, num_chains=4)
    assert mcmc.interrupted
    assert mcmc.get_samples()["m"].shape == (4, 14)
    assert ebm.to_arviz(mcmc)["posterior"]["m"].shape == (4, 14)


def test_training_does_not_make_the_graph_stale():
    net = MLPEnergy((2,), (8,), confinement=1.0)
    target = HMC(ebm.EnergyDistribution(net, event_shape=(2,))).bind()
    potential, q = CapturedPotential(target), torch.randn(5, 2)
    before = potential(q)[0]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    torch.testing.assert_close(potential(q)[0], target.potential(q).detach())
    assert not torch.allclose(potential(q)[0], before)


def test_adaptation_reaches_its_target_and_is_frozen():
    mcmc = run(HMC(PROBLEMS["gaussian"]().dist), num_chains=128)
    stats = mcmc.diagnostics()
    assert abs(float(stats["acceptance_rate"].mean()) - 0.8) < 0.05
    assert stats["step_size"].unique().numel() == 1
    root = mcmc.state.tuning["root"]
    torch.testing.assert_close(
        (root @ root.T).diagonal(), torch.tensor([1.0, 0.25]).to(root), rtol=0.1, atol=0
    )


def test_windows_double_and_end_before_the_last_stretch():
    ends = window_ends(1000)
    lengths = [b - a for a, b in zip([150, *ends], ends, strict=False)]
    assert lengths[:4] == [10, 20, 40, 80]
    assert ends[-1] == 850
    assert window_ends(5) == []


# --- bad input


BAD = {
    "chains": (lambda: MCMC(HMC(normal), 10, num_chains=0), ValueError, "num_chains must be a wh"),
    "samples": (lambda: MCMC(HMC(normal), 0), ValueError, "num_samples must be a whole number"),
    "stock": (lambda: MCMC(NUTS(normal), 10), TypeError, "run Pyro's kernels.*pyro.infer.MCMC"),
    "target": (lambda: HMC(3), TypeError, "must be a Pyro model, an EnergyDistribution or a Gene"),
    "both": (lambda: HMC(normal, potential_fn=normal), TypeError, "and not both"),
    "step": (lambda: HMC(normal, step_size=-1.0), ValueError, "step_size must be positive"),
    "accept": (lambda: HMC(normal, target_accept_prob=1.0), ValueError, "strictly between 0 and 1"),
    "early": (lambda: MCMC(HMC(normal), 10).get_samples(), RuntimeError, "call run.. first"),
    "start": (
        lambda: run(HMC(normal), Y, initial_params={"m": torch.zeros(3)}),
        ValueError,
        "num_chains = 64 as its first dim, got \\(3,\\)",
    ),
    "name": (
        lambda: run(HMC(normal), Y, initial_params={"mu": torch.zeros(64)}),
        ValueError,
        r"values for \['m'\] are needed, got \['mu'\]",
    ),
    "another name": (
        lambda: run(HMC(normal), Y, initial_params={"m": torch.zeros(64), "s": torch.zeros(64)}),
        ValueError,
        r"values for \['m'\] are needed, got \['m', 's'\]",
    ),
    "nan": (
        lambda: run(HMC(normal), Y, initial_params={"m": torch.full((64,), torch.nan)}),
        NonFiniteEnergyError,
        "not finite where 64 of 64 chains start",
    ),
    "discrete": (
        lambda: run(
            HMC(
                ebm.EnergyDistribution(
                    lambda x: x.sum(-1), event_shape=(2,), support=ebm.ops.constraints.spins
                )
            )
        ),
        TypeError,
        "no real coordinates to move along",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        make()


# --- a density that is NaN


def cut_off(beyond):
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.factor("edge", torch.where(m < 1.0, 0.0, beyond))

    return model


def test_a_posterior_that_ends_where_the_density_is_nan_is_doubted():
    """A normal cut off at one sd. By minus infinity it is cut off on purpose."""
    with pytest.warns(ApproximateSampleWarning, match="the posterior may be cut off"):
        mcmc = run(HMC(cut_off(math.nan)), num_samples=50, warmup_steps=50, num_chains=8)
    assert "the posterior may be cut off" in "".join(diagnose(mcmc).warnings)
    on_purpose = run(HMC(cut_off(-math.inf)), num_samples=50, warmup_steps=50, num_chains=8)
    assert on_purpose.doubts() == []
