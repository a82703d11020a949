"""Persistent chains: the right law at rest, fresh chains at a restart share of one."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_cases import scaled

from pyro_ebm import EnergyDistribution
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.mcmc import HMC, MALA, ULA, KineticLangevin, ReplayBuffer
from pyro_ebm.mcmc.kernels.kernel import finite_start
from pyro_ebm.mcmc.runs import replay_buffer
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import PROBLEMS, assert_mean_close


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(6)


def settled(kernel, problem, **options):
    """Every slot after many uses."""
    buffer = ReplayBuffer(kernel, size=4000, num_steps=10, **options)
    for _ in range(10):
        buffer(problem.dist, (4000,))
    return buffer


@pytest.mark.parametrize("name", ["tilted gaussian", "gamma", "linear gebm"])
def test_slots_have_the_law(name):
    """One draw a slot, independent of each other: a bias of an eighth of a deviation is seen."""
    problem = PROBLEMS[name]()
    buffer = settled(partial(MALA, step_size=0.8), problem)
    target = MALA(problem.dist).bind()
    x = target.constrain(buffer.positions)["x_latent" if name == "linear gebm" else "x"]
    assert_mean_close(x, problem.mean)
    assert_mean_close((x - problem.mean).square(), problem.variance)


def test_unadjusted_slots_have_its_bias_and_no_other():
    problem = PROBLEMS["gaussian"]()
    q = settled(partial(ULA, step_size=0.3), problem).positions
    variance = problem.variance
    assert_mean_close(q.square(), variance / (1.0 - 0.09 / (4.0 * variance)))


def test_restarting_always_is_a_fresh_chain():
    problem = PROBLEMS["tilted gaussian"]()
    buffer = ReplayBuffer(partial(ULA, step_size=0.3), size=50, num_steps=7, restart_prob=1.0)
    buffer(problem.dist, (50,))
    pyro.set_rng_seed(9)
    ours = buffer(problem.dist, (30,))
    pyro.set_rng_seed(9)
    torch.randperm(50), torch.rand(30)  # which slots, and which of them restart
    kernel = ULA(problem.dist, step_size=0.3)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, finite_start(potential.target, potential.value, 30))
    for _ in range(7):
        state, _ = kernel.step(potential, state)
    assert torch.equal(ours, state.position)


def test_no_slot_is_used_twice_and_ages_count_steps(monkeypatch):
    law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    buffer = ReplayBuffer(size=40, num_steps=3, restart_prob=0.0)
    for _ in range(5):
        buffer(law, (20,))
    assert int(buffer.ages.sum()) == 5 * 20 * 3
    assert int(buffer.ages.max()) <= 15
    buffer(law, (40,))
    assert int((buffer.ages > 0).sum()) == 40


def test_draws_are_written_back_to_their_own_slots():
    law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    buffer = ReplayBuffer(size=100, num_steps=2)
    draws = buffer(law, (30,))
    assert not draws.requires_grad
    moved = buffer.ages > 0
    assert torch.equal(buffer.positions[moved, 0].sort().values, draws.sort().values)


def test_chains_that_run_off_are_restarted_and_said():
    law = EnergyDistribution(lambda x: 0.5 * x**4, event_shape=())
    buffer = ReplayBuffer(partial(ULA, step_size=3.0), size=100, num_steps=20)
    with pytest.warns(ApproximateSampleWarning, match="ran off to where the energy"):
        x = buffer(law, (100,))
    assert torch.isfinite(x).all()
    assert buffer.num_lost > 0


def test_the_law_may_change_between_uses():
    weight = torch.tensor(1.0)
    law = EnergyDistribution(lambda x: 0.5 * weight * x**2, event_shape=())
    buffer = ReplayBuffer(partial(HMC, step_size=0.5), size=2000, num_steps=10)
    buffer(law, (2000,))
    weight.fill_(16.0)
    for _ in range(3):
        x = buffer(law, (2000,))
    assert abs(float(x.std()) - 0.25) < 0.03


def test_saved_and_loaded():
    law = EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())
    first = ReplayBuffer(size=50)
    first(law, (20,))
    second = ReplayBuffer(size=50)
    second.load_state_dict(first.state_dict())
    pyro.set_rng_seed(1)
    a = first(law, (20,))
    pyro.set_rng_seed(1)
    assert torch.equal(a, second(law, (20,)))
    with pytest.raises(ValueError, match="10 slots cannot load 50"):
        ReplayBuffer(size=10).load_state_dict(first.state_dict())


def test_as_the_sampler_of_a_distribution():
    buffer = ReplayBuffer(partial(KineticLangevin, step_size=0.3), size=64)
    law = EnergyDistribution(lambda x: 0.5 * (x**2).sum(-1), event_shape=(2,), sampler=buffer)
    assert law.sample((8, 4)).shape == (8, 4, 2)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda law: ReplayBuffer(size=0), "size must be a whole number"),
        (lambda law: ReplayBuffer(restart_prob=1.5), "restart_prob must lie between 0 and 1"),
        (lambda law: ReplayBuffer(size=10)(law, (11,)), "11 draws were asked of 10 slots"),
        (lambda law: ReplayBuffer()(law.expand((3,)), (5,)), "keeps the chains of one law"),
    ],
)
def test_bad_input(act, sentence):
    with pytest.raises(ValueError, match=sentence):
        act(EnergyDistribution(lambda x: 0.5 * x**2, event_shape=()))


def test_lost_chains_are_not_returned(monkeypatch):
    """The planted bug: what ran off is kept."""
    monkeypatch.setattr(replay_buffer, "_restarted", lambda target, potential, q, which: q)
    with pytest.raises(AssertionError):
        test_chains_that_run_off_are_restarted_and_said()


def buffered(law, step_size, **options):
    return ReplayBuffer(partial(ULA, step_size=step_size), num_steps=3, **options), law


def test_slots_keep_their_own_chains():
    """Steps too small to move anything: what is written back is where it was."""
    buffer, law = buffered(scaled().dist, 1e-9, size=40, restart_prob=0.0)
    buffer(law, (40,))
    before = buffer.positions.clone()
    buffer(law, (25,))
    torch.testing.assert_close(buffer.positions, before, atol=1e-6, rtol=0)
    assert torch.equal(buffer.state_dict()["ages"], buffer.ages)
    assert sorted(buffer.ages.tolist()) == [3] * 15 + [6] * 25


def test_restarted_slots_are_young():
    buffer, law = buffered(scaled().dist, 0.1, size=40, restart_prob=1.0)
    for _ in range(3):
        buffer(law, (40,))
    assert (buffer.ages == 3).all()


def test_where_the_energy_is_infinite_a_chain_is_lost():
    edge = EnergyDistribution(
        lambda x: torch.where(x.abs() < 1.0, 0.5 * x**2, torch.inf), dist.Normal(0.0, 0.1)
    )
    buffer, law = buffered(edge, 1.0, size=100, restart_prob=0.0)
    with pytest.warns(ApproximateSampleWarning, match="ran off"):
        x = buffer(law, (100,))
    assert (x.abs() < 1.0).all()


def test_a_buffer_is_of_one_law():
    buffer = ReplayBuffer(partial(ULA, step_size=0.3), size=10, num_steps=1)
    buffer(EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,)), (3,))
    with pytest.raises(ValueError, match="give every law a buffer of its own"):
        buffer(EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(3,)), (3,))
    tempered = ReplayBuffer(partial(ULA, step_size=0.3, inverse_temperature=2.0), size=10)
    with pytest.raises(ValueError, match=r"give it dist.temper\(beta\)"):
        tempered(EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,)), (3,))


def test_single_steps_are_of_all_lengths(monkeypatch):
    """One step a use: the sequence of trajectory lengths is entered anywhere."""
    seen = set()
    num_steps = HMC.num_steps

    def noted(self, state):
        seen.add(num_steps(self, state))
        return num_steps(self, state)

    monkeypatch.setattr(HMC, "num_steps", noted)
    law = EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,))
    buffer = ReplayBuffer(partial(HMC, step_size=0.1), size=10, num_steps=1)
    for _ in range(10):
        buffer(law, (3,))
    assert len(seen) > 5
