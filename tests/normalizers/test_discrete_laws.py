"""Particles, bridges and ladders of discrete laws, against sums over all their states."""

import itertools
import math

import pyro.distributions as dist
import pytest
import torch
from lattices import all_lattices
from laws_with_log_z import check_estimates
from torch.distributions import constraints

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.mcmc import HMC
from pyro_ebm.normalizers import bridge, smc, stepping_stones, tempered, thermodynamic
from pyro_ebm.normalizers.discrete_bridge import SiteProduct, log_ratios
from pyro_ebm.normalizers.discrete_path import DiscretePath, draws_of_chains
from pyro_ebm.normalizers.discrete_smc import pilot_ladder, runs_on
from pyro_ebm.normalizers.estimate import estimate_log_normalizer
from pyro_ebm.normalizers.exact import States
from pyro_ebm.ops.constraints import spins
from pyro_ebm.ops.nan_energies import NaNCount

F64 = torch.float64
COUPLING, FIELD = 0.4, 0.2


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(F64)


# --- laws, each with all of its states and their potentials, summed here


def bonds_and_field(x):
    bonds = (x[..., 1:, :] * x[..., :-1, :]).sum((-2, -1))
    bonds = bonds + (x[..., :, 1:] * x[..., :, :-1]).sum((-2, -1))
    return -COUPLING * bonds - FIELD * x.sum((-2, -1))


def lattice():
    """Nine spins that move by Gibbs sweeps."""
    law = EnergyDistribution(bonds_and_field, support=spins, event_shape=(3, 3))
    x = all_lattices((3, 3))
    return law, x, bonds_and_field(x)


def family():
    """The same spins, which move by the sweeps of their family."""
    law = EnergyDistribution(
        Ising(torch.tensor(COUPLING), (3, 3), field=torch.tensor(FIELD), periodic=False)
    )
    return law, *lattice()[1:]


HEIGHTS = torch.tensor([-0.5, 0.1, 0.8])


def chain_of_colours(x):
    """Potts: neighbours like to be equal, and each colour has a height."""
    same = (x[..., 1:] == x[..., :-1]).to(HEIGHTS.dtype).sum(-1)
    return -0.6 * same + HEIGHTS[x.long()].sum(-1)


def every(num_values, num_sites):
    return torch.tensor(list(itertools.product(range(num_values), repeat=num_sites)), dtype=F64)


def colours():
    law = EnergyDistribution(
        chain_of_colours, support=constraints.integer_interval(0, 2), event_shape=(5,)
    )
    x = every(3, 5)
    return law, x, chain_of_colours(x)


PROBS = torch.tensor([0.2, 0.3, 0.5])


def colours_on_a_base():
    base = dist.Categorical(PROBS).expand([5]).to_event(1)
    x = every(3, 5).long()
    return (
        EnergyDistribution(chain_of_colours, base),
        x,
        chain_of_colours(x) - PROBS.log()[x].sum(-1),
    )


def one_hot():
    """Three one-hot vectors, the first two of which like to be equal."""

    def energy(x):
        return -0.9 * (x[..., 0, :] * x[..., 1, :]).sum(-1) + (x * HEIGHTS).sum((-2, -1))

    law = EnergyDistribution(energy, support=constraints.one_hot, event_shape=(3, 3))
    x = torch.eye(3)[every(3, 3).long()]
    return law, x, energy(x)


def counts():
    """Two counts without a bound, whose mass beyond 60 is below 1e-40."""

    def energy(x):
        return 0.3 * x.sum(-1) - 0.2 * x[..., 0] * (x[..., 1] > 2)

    rates = torch.tensor([3.0, 2.0])
    law = EnergyDistribution(energy, dist.Poisson(rates).to_event(1))
    x = every(61, 2)
    log_base = (x * rates.log() - rates - torch.lgamma(x + 1)).sum(-1)
    return law, x, energy(x) - log_base


FINITE = {
    "lattice": lattice,
    "family": family,
    "colours": colours,
    "colours on a base": colours_on_a_base,
    "one-hot": one_hot,
}
LAWS = {**FINITE, "counts": counts}


def log_z_of(potential):
    return float(torch.logsumexp(-potential, 0))


def exact_draws(x, potential, shape):
    which = torch.multinomial((-potential).softmax(0), math.prod(shape), replacement=True)
    return x[which].reshape(*shape, *x.shape[1:])


# --- the moves


@pytest.mark.parametrize("case", LAWS)
def test_sweeps_keep_the_law_at_a_temperature(case):
    """From exact draws at beta .6 the means of E and of its square stay as they are."""
    law, x, potential = LAWS[case]()
    heated = 0.6 * law.energy(x) + (potential - law.energy(x))  # U = E - log base
    start = exact_draws(x, heated, (10_000,)).to(law.energy(x).dtype)
    start = start.long() if case == "colours on a base" else start
    path = DiscretePath(law)
    path.freeze()
    moved = path.move(start, 0.6, 2)
    assert moved.dtype == start.dtype
    assert float((moved != start).double().mean()) > 0.05
    for power in (1, 2):
        change = law.energy(moved) ** power - law.energy(start) ** power
        assert abs(float(change.mean() / change.std())) * 10_000**0.5 < 5


@pytest.mark.parametrize("case", FINITE)
def test_the_start_is_the_base_or_uniform(case):
    law, x, potential = FINITE[case]()
    path = DiscretePath(law)
    drawn = path.draw(20_000)
    log_start = law.energy(x) - potential if law.base is not None else torch.zeros(len(x))
    wanted = (log_start.softmax(0) * law.energy(x)).sum()
    energy = path.energy(drawn)
    assert abs(float((energy.mean() - wanted) / energy.std())) * 20_000**0.5 < 5
    assert path.log_mass == pytest.approx(0.0 if law.base is not None else math.log(len(x)))


# --- particles


@pytest.mark.parametrize("case", LAWS)
def test_particles_are_unbiased_on_a_fixed_ladder(case):
    """1000 runs of 30 particles on five rungs: a bias of five per cent of Z would be seen."""
    law, _, potential = LAWS[case]()
    path = DiscretePath(law)
    pilot_ladder(path, 100)  # tunes walks
    ladder = torch.tensor([0.1, 0.25, 0.45, 0.7, 1.0])
    values = runs_on(path, ladder, num_runs=1000, num_particles=30, num_moves=1) + path.log_mass
    ratios = (values - log_z_of(potential)).exp()
    error = float(ratios.std()) / 1000**0.5
    assert abs(float(ratios.mean()) - 1.0) < 5 * error
    assert error < 0.01


@pytest.mark.parametrize("case", ["one-hot", "counts"])
def test_particles_cover(case):
    law, _, potential = LAWS[case]()
    estimates = [smc(law, num_particles=20, num_runs=10) for _ in range(20)]
    check_estimates(estimates, log_z_of(potential), coverage=0.7)
    assert estimates[0].start == ("uniform law" if law.base is None else "base")


def test_a_ladder_keeps_the_effective_size():
    law, _, _ = lattice()
    path = DiscretePath(law)
    coarse, fine = (pilot_ladder(path, 500, ess_share=share) for share in (0.5, 0.95))
    assert len(fine) > 1.5 * len(coarse)
    for ladder in (coarse, fine):
        assert float(ladder[-1]) == 1.0
        assert bool((ladder.diff() > 0).all())


# --- the bridge


@pytest.mark.parametrize("case", ["lattice", "colours on a base", "one-hot", "counts"])
def test_the_bridge_covers(case):
    law, x, potential = LAWS[case]()
    estimates = [bridge(law, exact_draws(x, potential, (10, 40))) for _ in range(40)]
    check_estimates(estimates, log_z_of(potential))


def test_the_proposal_is_normalized_and_leaves_no_state_out():
    law, x, potential = colours()
    states = States.finite(law)
    q = SiteProduct.fitted(states, torch.zeros(50, 5))
    assert float(torch.logsumexp(q.log_prob(x), 0)) == pytest.approx(0.0, abs=1e-12)
    assert bool(q.log_prob(x).isfinite().all())
    draws = exact_draws(x, potential, (4000,))
    fitted = SiteProduct.fitted(states, draws)
    share = (fitted.sample(20_000) == 0).double().mean(0) - (draws == 0).double().mean(0)
    assert float(share.abs().max()) < 5 * (0.25 / 20_000 + 1e-7) ** 0.5


def test_the_proposal_and_the_bridge_have_draws_of_their_own():
    """The first half of each chain decides the proposal alone, the other half is bridged."""
    law, x, potential = colours()
    draws = exact_draws(x, potential, (6, 10))
    ratios, _ = log_ratios(law, draws, NaNCount())
    counts = torch.stack([(draws[:, :5] == k).double().sum((0, 1)) for k in range(3)]) + 0.5
    log_q = (counts / counts.sum(0)).log()
    wanted = -law.energy(draws[:, 5:]) - sum(log_q[draws[:, 5:, i].long(), i] for i in range(5))
    torch.testing.assert_close(ratios, wanted)


def test_draws_of_another_law_are_seen_by_the_bridge():
    law, x, potential = lattice()
    assert not bridge(law, exact_draws(x, potential, (20, 100))).remarks
    found = bridge(law, exact_draws(x, 0.5 * potential, (20, 100)))
    assert any("the draws are not draws of this law" in doubt for doubt in found.doubts)


# --- ladders


@pytest.mark.parametrize("case", ["family", "colours on a base", "counts"])
def test_ladders_cover(case):
    """With errors of some hundredths of a nat."""
    law, _, potential = LAWS[case]()
    run = tempered(law, num_rungs=6, num_chains=64, num_samples=15, warmup_steps=10)
    assert run.energies.shape == (7, 64, 15)
    for estimate in (thermodynamic, stepping_stones):
        found = estimate(law, run)
        assert float(found.stderr) < 0.05
        assert abs(float(found.value) - log_z_of(potential)) < 5 * float(found.stderr)
        assert found.start == ("uniform law" if law.base is None else "base")


def test_single_precision_is_enough():
    torch.set_default_dtype(torch.float32)
    law = EnergyDistribution(bonds_and_field, support=spins, event_shape=(3, 3))
    x = all_lattices((3, 3))
    log_z = log_z_of(bonds_and_field(x))
    path = DiscretePath(law)
    drawn = draws_of_chains(path, num_chains=40, num_samples=30, burn_in=20)
    assert drawn.dtype == torch.float32
    estimates = [smc(law, num_particles=100, num_runs=10), bridge(law, drawn)]
    run = tempered(law, num_rungs=4, num_chains=40, num_samples=10, warmup_steps=6)
    for found in [*estimates, stepping_stones(law, run)]:
        assert abs(float(found.value) - log_z) < 5 * float(found.stderr)
        assert float(found.stderr) < 0.1


# --- the best way


def bits():
    """Bits on a base whose energies do not interact: log Z = sum of log(1 - p + p e^w)."""
    p, w = torch.linspace(0.2, 0.8, 22), torch.linspace(-1.0, 1.0, 22)
    law = EnergyDistribution(lambda x: -(w * x).sum(-1), dist.Bernoulli(p).to_event(1))
    return law, float((1 - p + p * w.exp()).log().sum())


@pytest.mark.slow
def test_too_many_states_to_sum_go_two_ways():
    law, log_z = bits()
    found = estimate_log_normalizer(law)
    assert "in agreement with" in found.method
    assert "from the same start" in found.method
    assert abs(float(found.value) - log_z) < 5 * float(found.stderr)


@pytest.mark.parametrize("method", ["smc", "bridge"])
def test_methods_by_name(method):
    law, _, potential = one_hot()
    found = estimate_log_normalizer(law, method)
    assert found.start.startswith("uniform law")
    assert abs(float(found.value) - log_z_of(potential)) < 5 * float(found.stderr)


# --- what is told and refused


def holes(x):
    """NaN where the first two bits are equal, as half of the states are."""
    return torch.where(x[..., 0] == x[..., 1], torch.nan, 0.0 * x.sum(-1))


@pytest.mark.parametrize("estimate", [smc, lambda law: bridge(law, two_bits())])
def test_nan_energies_are_counted_and_told(estimate):
    law = EnergyDistribution(holes, support=constraints.boolean, event_shape=(2,))
    found = estimate(law)
    assert abs(float(found.value) - math.log(2.0)) < 5 * float(found.stderr) + 1e-9
    assert any("energies are NaN and counted as infinite" in doubt for doubt in found.doubts)


def two_bits():
    first = torch.randint(2, (10, 100)).to(F64)
    return torch.stack([first, 1.0 - first], -1)


def test_parameters_that_move_make_estimates_stale():
    w = torch.ones((), requires_grad=True)
    law = EnergyDistribution(lambda x: w * x.sum(-1), support=spins, event_shape=(3,))
    run = tempered(law, num_rungs=2, num_chains=20, num_samples=4, warmup_steps=2)
    draws = draws_of_chains(DiscretePath(law), num_chains=10, num_samples=10, burn_in=5)
    found = [smc(law, num_particles=20, num_runs=2), bridge(law, draws), thermodynamic(law, run)]
    assert not any(z.is_stale for z in found)
    with torch.no_grad():
        w.add_(1.0)
    assert all(z.is_stale for z in found)


def unbounded():
    return EnergyDistribution(
        lambda x: x.sum(-1), support=constraints.nonnegative_integer, event_shape=(2,)
    )


def flat(value):
    return EnergyDistribution(
        lambda x: 0.0 * x.sum(-1) + value, support=constraints.boolean, event_shape=(3,)
    )


def antiferromagnet():
    return EnergyDistribution(Ising(-0.3, (3, 3)))


REFUSED = {
    "kernel": (lambda: smc(lattice()[0], kernel=HMC), ValueError, "leave kernel= out"),
    "kernel of a ladder": (
        lambda: tempered(lattice()[0], kernel=HMC),
        ValueError,
        "leave kernel= out",
    ),
    "no start": (lambda: smc(unbounded()), ValueError, "infinitely many states .* give base="),
    "no proposal": (
        lambda: bridge(unbounded(), torch.ones(4, 10, 2)),
        NotImplementedError,
        "infinitely many states .* give base=",
    ),
    "no way": (
        lambda: estimate_log_normalizer(unbounded()),
        NotImplementedError,
        "infinitely many states and no base",
    ),
    "batch": (lambda: smc(flat(0.0).expand((3,))), ValueError, r"batch_shape is \(3,\)"),
    "few": (lambda: bridge(flat(0.0), torch.ones(3, 2, 3)), ValueError, "are too few: half of"),
    "one each": (lambda: bridge(flat(0.0), torch.ones(30, 1, 3)), ValueError, "are too few: half"),
    "shape": (lambda: bridge(flat(0.0), torch.ones(30, 3)), ValueError, r"\(chains, draws\) \+"),
    "outside": (
        lambda: bridge(flat(0.0), 0.5 * torch.ones(4, 10, 3)),
        ValueError,
        "40 of 40 draws lie outside",
    ),
    "not one-hot": (
        lambda: bridge(one_hot()[0], torch.ones(4, 10, 3, 3)),
        ValueError,
        "are no states of the law's support",
    ),
    "infinite": (lambda: smc(flat(torch.inf)), NonFiniteEnergyError, "has finite energy"),
    "minus infinite": (lambda: smc(flat(-torch.inf)), NonFiniteEnergyError, "minus infinity"),
    "infinite at draws": (
        lambda: bridge(flat(torch.inf), torch.ones(4, 10, 3)),
        NonFiniteEnergyError,
        "not finite at a draw",
    ),
    "antiferromagnet": (lambda: smc(antiferromagnet()), ValueError, "couplings that are not neg"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_each(case):
    make, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        make()


# --- long runs


def intervals_of(estimate, law, x, potential):
    if estimate == "bridge":
        return bridge(law, exact_draws(x, potential, (20, 40)))
    if estimate == "smc":
        return smc(law, num_particles=60, num_runs=20)
    run = tempered(law, num_rungs=5, num_chains=40, num_samples=20, warmup_steps=10)
    return stepping_stones(law, run) if estimate == "stepping stones" else thermodynamic(law, run)


@pytest.mark.slow
@pytest.mark.parametrize("estimate", ["smc", "bridge", "stepping stones", "thermodynamic"])
@pytest.mark.parametrize("case", ["family", "colours on a base"])
def test_intervals_cover(case, estimate):
    """200 repeats: a coverage of 95 per cent that is 90 or less is seen, and one above 99."""
    law, x, potential = LAWS[case]()
    log_z = log_z_of(potential)
    runs = [intervals_of(estimate, law, x, potential) for _ in range(200)]
    assert all(run.is_trusted for run in runs)
    ends = [run.interval() for run in runs]
    share = sum(bool(low <= log_z <= high) for low, high in ends) / 200
    slack = 3 * (0.95 * 0.05 / 200) ** 0.5
    assert 0.95 - slack <= share <= 0.99 + slack
