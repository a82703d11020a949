"""What a run refuses or says, where it would otherwise bend an answer in silence."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc import (
    HMC,
    MALA,
    MCMC,
    NUTS,
    PCN,
    SMC,
    ULA,
    EllipticalSlice,
    KineticLangevin,
    ParallelTempering,
    RandomWalk,
    ReplayBuffer,
    sample,
)
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import PROBLEMS, assert_invariant


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(8)


def run(kernel, *args, num_samples=20, warmup_steps=20, num_chains=32, **kwargs):
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*args, **kwargs)
    return mcmc


def line(x, y):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Normal(b * x, 0.1), obs=y)


@pytest.mark.parametrize("kernel", [HMC, NUTS, MALA, RandomWalk])
def test_a_state_goes_on_with_new_data(kernel):
    """What it remembers of the old data's potential would freeze every chain."""
    x = torch.linspace(0.5, 1.5, 20)
    first = run(kernel(line), x, 2.0 * x, warmup_steps=100)
    second = run(kernel(line), x, 2.05 * x, initial_state=first.state, num_samples=200)
    draws = second.get_samples(100)["b"]
    assert abs(float(draws.mean()) - 2.05) < 0.01
    assert (draws.std(1) > 0.005).all()


@pytest.mark.parametrize("kernel", [PCN, EllipticalSlice, ParallelTempering])
def test_a_state_goes_on_with_a_trained_energy(kernel):
    weight = torch.tensor(1.0)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    law = EnergyDistribution(lambda x: 0.5 * weight * x.square().sum(-1), base)
    state = run(kernel(law), warmup_steps=50).state
    weight.fill_(9.0)
    draws = run(kernel(law), initial_state=state, num_samples=400).get_samples(200)["x"]
    assert abs(float(draws.var()) - 0.1) < 0.015


def test_a_state_of_the_same_target_is_left_as_it_is():
    kernel = HMC(PROBLEMS["gamma"]().dist)
    state = run(kernel).state
    state.restore_rng()
    a = run(kernel, initial_state=state).get_samples()["x"]
    state.restore_rng()
    assert torch.equal(a, run(kernel, initial_state=state).get_samples()["x"])


def test_a_density_that_is_flat_in_the_middle_keeps_its_tails():
    """A hinge at 3: the variance is that of the plateau with exponential flanks."""
    law = {"x": torch.zeros(64)}
    kernel = HMC(potential_fn=lambda q: 5.0 * torch.relu(q["x"].abs() - 3.0))
    mcmc = run(kernel, initial_params=law, num_samples=300, warmup_steps=200, num_chains=64)
    plateau, flank = 6.0, 2.0 / 5.0
    second = 3.0**2 * plateau / 3.0 + 2.0 * (9.0 / 5.0 + 2.0 * 3.0 / 25.0 + 2.0 / 125.0)
    assert float(mcmc.get_samples()["x"].var()) == pytest.approx(
        second / (plateau + flank), rel=0.08
    )


def test_noise_in_an_energy():
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    law = EnergyDistribution(lambda x: net(x).squeeze(-1) + x.square().sum(-1), event_shape=(2,))
    with pytest.raises(ValueError, match="put dropout in eval mode"):
        run(HMC(law))
    net.eval()
    run(HMC(law))


@pytest.mark.parametrize(
    "sampler", [lambda law: run(HMC(law)), lambda law: SMC(law).run()], ids=["hmc", "smc"]
)
def test_chains_that_see_each_other(sampler):
    """Batch statistics of 32 chains: a law of all chains together, of which none has a part."""
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match="changes with the positions of others"):
        sampler(EnergyDistribution(lambda x: net(x).squeeze(-1), base))
    run(HMC(EnergyDistribution(lambda x: net.eval()(x).squeeze(-1), base)))


@pytest.mark.parametrize("kernel", [ULA, KineticLangevin])
def test_unadjusted_chains_that_run_off(kernel):
    law = EnergyDistribution(lambda x: x**4, event_shape=())
    with pytest.warns(ApproximateSampleWarning, match="nothing held them back"):
        mcmc = run(kernel(law, step_size=3.0))
    assert mcmc.diagnostics()["diverging"].any()
    with pytest.warns(ApproximateSampleWarning) as said:
        sample(law, (40,), kernel=lambda d: kernel(d, step_size=3.0))
    assert any("do not agree" in str(warning.message) for warning in said)


def test_the_midpoint_of_aboba_is_not_given_out_as_lp():
    law = PROBLEMS["gaussian"]().dist
    assert "lp" in run(KineticLangevin(law)).diagnostics()
    assert "lp" not in run(KineticLangevin(law, scheme="ABOBA")).diagnostics()


def test_without_a_warm_up_a_step_size_is_found_all_the_same():
    law = EnergyDistribution(lambda x: 0.5 * (1000.0 * x).square().sum(-1), event_shape=(3,))
    start = {"x": 0.001 * torch.randn(32, 3)}
    mcmc = run(HMC(law), warmup_steps=0, initial_params=start)
    assert float(mcmc.diagnostics()["acceptance_rate"].mean()) > 0.5


def test_interrupted_before_the_first_draw(monkeypatch):
    kernel = HMC(PROBLEMS["gaussian"]().dist)
    step, calls = kernel.step, []

    def interrupt(potential, state):
        calls.append(0)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return step(potential, state)

    monkeypatch.setattr(kernel, "step", interrupt)
    mcmc = run(kernel)
    assert mcmc.interrupted
    assert mcmc.state is None
    with pytest.raises(RuntimeError, match="nothing was drawn"):
        mcmc.get_samples()


def test_a_kernel_that_moves_nothing_does_not_pass():
    problem = PROBLEMS["gaussian"]()
    with pytest.raises(AssertionError, match="moved 0.0% of the chains"):
        assert_invariant(MALA(problem.dist, step_size=1e6), problem, num_chains=100)


def gebm():
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return GeneralizedEBM(lambda z: z, prior, lambda x: 0.5 * (x**2).sum(-1))


@pytest.mark.parametrize(
    ("act", "error", "sentence"),
    [
        (lambda: run(HMC(gebm()), 1, 2), TypeError, "takes no arguments"),
        (lambda: run(HMC(gebm()), initial_state="x"), TypeError, "must be a State, got str"),
        (
            lambda: run(HMC(gebm()), initial_state=run(NUTS(gebm())).state),
            ValueError,
            "initial_state was tuned for NUTS, and this is HMC",
        ),
        (
            lambda: run(HMC(gebm()), initial_params={"x_latent": 3.0}),
            ValueError,
            "num_chains = 32 as its first dim, got float",
        ),
        (
            lambda: run(HMC(gebm()), initial_params={"x_latent": torch.zeros(5, 2)}),
            ValueError,
            r"num_chains = 32 as its first dim, got \(5, 2\)",
        ),
        (lambda: run(HMC(gebm())).get_samples(1000), ValueError, "1000 draws of a chain"),
        (lambda: run(HMC(gebm())).get_samples(0), ValueError, "whole number of at least 1"),
        (lambda: HMC(gebm(), step_size=float("inf")), ValueError, "positive and finite"),
        (lambda: MCMC(HMC(gebm()), 10, num_chains=None), ValueError, "num_chains must be a whole"),
        (
            lambda: MCMC(HMC(gebm()), 10, 10, save_params=["y"], disable_progbar=True).run(),
            ValueError,
            r"save_params names \['y'\]",
        ),
        (
            lambda: SMC(gebm(), kernel=ULA, disable_progbar=True).run(),
            TypeError,
            "SMC needs a kernel that keeps its target from any position",
        ),
        (lambda: HMC(line, inverse_temperature=2.0), TypeError, "poutine.scale"),
        (lambda: HMC(gebm(), metric="full"), ValueError, "metric must be one of auto, diagonal"),
    ],
)
def test_one_sentence_each(act, error, sentence):
    with pytest.raises(error, match=sentence):
        act()


def test_integers_to_start_from():
    start = {"x_latent": torch.zeros(32, 2, dtype=torch.long)}
    assert run(HMC(gebm()), initial_params=start).get_samples()["x"].is_floating_point()


@pytest.mark.parametrize("metric", ["auto", "diagonal", "fisher", "dense"])
@pytest.mark.parametrize("kernel", [HMC, NUTS])
def test_every_metric_gives_the_moments(metric, kernel):
    """A valley off the axes, tuned by 200 iterations: means within .15, variances within .2."""
    problem = PROBLEMS["correlated gaussian"]()
    mcmc = run(kernel(problem.dist, metric=metric), num_samples=400, warmup_steps=200)
    draws = mcmc.get_samples(group_by_chain=False)["x"].double()
    assert float((draws.mean(0) - problem.mean).abs().max()) < 0.15
    assert float((draws.var(0) - problem.variance).abs().max()) < 0.2


def test_a_dense_metric_rounds_the_valley():
    problem = PROBLEMS["correlated gaussian"]()
    steps = {
        metric: run(HMC(problem.dist, metric=metric), warmup_steps=200).state.tuning["step_size"]
        for metric in ("diagonal", "dense")
    }
    assert steps["dense"] > 2.0 * steps["diagonal"]


def test_the_inverse_temperature_is_marked():
    prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    law = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), prior)
    mcmc = run(HMC(law, inverse_temperature=3.0), num_samples=300, warmup_steps=100)
    assert abs(float(mcmc.get_samples()["x"].var()) - 0.25) < 0.03
    assert mcmc.record.inverse_temperature == 3.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, within
def test_a_compiled_graph_gives_the_same_numbers():
    """Needs a C++ compiler; the answer is that of the graph to rounding."""
    kernel = HMC(PROBLEMS["gamma"]().dist)
    q = torch.randn(64, 1, dtype=torch.float64)
    graph, compiled = (CapturedPotential(kernel.bind(), compile=c)(q) for c in (False, True))
    for a, b in zip(graph, compiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(("num_chains", "dim"), [(100_000, 2), (256, 10_000)])
def test_many_chains_and_many_dimensions(num_chains, dim):
    """Moments at sizes where one copy too many would show; 5 sd of the means."""
    law = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), event_shape=(dim,))
    start = {"x": torch.randn(num_chains, dim)}
    mcmc = MCMC(HMC(law, step_size=0.1), 5, 5, num_chains=num_chains, disable_progbar=True)
    mcmc.run(initial_params=start)
    last = mcmc.get_samples(1)["x"][:, 0]
    assert abs(float(last.var()) - 1.0) < 5.0 * (2.0 / last.numel()) ** 0.5


def test_a_box_without_slope_stays_a_box():
    """Nothing is added to a potential of the user's own."""
    kernel = RandomWalk(
        potential_fn=lambda q: torch.where(q["x"].abs() < 5.0, 0.0 * q["x"], torch.inf)
    )
    mcmc = run(kernel, initial_params={"x": torch.zeros(256)}, num_chains=256, num_samples=300)
    assert float(mcmc.get_samples(100)["x"].var()) == pytest.approx(25.0 / 3.0, rel=0.1)
    assert mcmc.diagnostics()["non_finite"].any()
    assert "diverging" not in mcmc.diagnostics()


def test_a_potential_too_large_for_its_dtype():
    kernel = HMC(potential_fn=lambda q: 0.5 * q["x"] ** 2 + 1e9)
    with pytest.warns(UserWarning, match="use float64, or take off a constant"):
        run(kernel, initial_params={"x": torch.randn(32)})


def test_tempering_remembers_more_than_positions():
    with pytest.raises(TypeError, match="ParallelTempering does not"):
        SMC(gebm(), kernel=ParallelTempering, disable_progbar=True).run()
    with pytest.raises(TypeError, match="ParallelTempering remembers more"):
        ReplayBuffer(ParallelTempering)(gebm(), (5,))


def test_a_buffer_does_not_tune():
    with pytest.raises(ValueError, match="bind a step size"):
        ReplayBuffer(HMC)(gebm(), (5,))


def test_divergences_between_kept_draws_are_counted():
    """With thinning, an iteration that is not kept may be the one that diverged: here the third."""
    calls = []

    class Marked(RandomWalk):
        def step(self, potential, state):
            calls.append(0)
            state, info = super().step(potential, state)
            return state, {**info, "diverging": torch.full((32,), len(calls) == 3)}

    mcmc = MCMC(Marked(gebm()), 2, 0, thinning=5, num_chains=32, disable_progbar=True)
    mcmc.run()
    assert mcmc.diagnostics()["diverging"][0].tolist() == [True, False]


def test_noise_in_an_energy_under_smc():
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    law = EnergyDistribution(lambda x: net(x).squeeze(-1), base)
    with pytest.raises(ValueError, match="put dropout in eval mode"):
        SMC(law, disable_progbar=True).run()


def test_smc_tunes_only_what_may_be_tuned():
    def fixed(law):
        return HMC(law, step_size=0.3, adapt_step_size=False, adapt_mass_matrix=False)

    smc = SMC(gebm(), 200, kernel=fixed, disable_progbar=True)
    smc.run()
    for tuning in smc.plan.tunings:
        assert float(tuning["step_size"]) == pytest.approx(0.3)
        assert (tuning["root"] == 1.0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: HMC(lambda: None, step_size=0.0),
        lambda: HMC(lambda: None, step_size=math.nan),
        lambda: HMC(lambda: None, target_accept_prob=0.0),
        lambda: HMC(lambda: None, target_accept_prob=math.nan),
        lambda: NUTS(lambda: None, max_tree_depth=True),
        lambda: NUTS(lambda: None, max_tree_depth=2.5),
        lambda: ReplayBuffer(restart_prob=math.nan),
        lambda: RandomWalk(lambda: None, metric="fisher"),
    ],
)
def test_numbers_out_of_range(make):
    with pytest.raises(ValueError, match="must (be|lie)"):
        make()


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5)])
def test_starting_values_without_chains(value):
    kernel = HMC(potential_fn=lambda q: 0.5 * q["x"] ** 2)
    with pytest.raises(ValueError, match=r"initial_params\['x'\] must be a tensor with num_chains"):
        run(kernel, initial_params={"x": value})
