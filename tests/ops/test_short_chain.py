"""The sampler behind sample(): moments on every kind of support, and what it promises around them.

Statistical checks use 2000 chains whose starts are independent, so the last states are too and a
mean has standard error sd / sqrt(2000): |z| < 5 notices a shift of a ninth of a standard deviation.
"""

import itertools
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints as C

from pyro_ebm.errors import EnergyShapeError, NonFiniteEnergyError
from pyro_ebm.ops import short_walks
from pyro_ebm.ops.constraints import sphere, spins
from pyro_ebm.ops.initial_points import initial_points
from pyro_ebm.ops.short_blocks import Block, blocks_of
from pyro_ebm.ops.short_chain import _Chains, short_chain
from pyro_ebm.ops.short_gibbs import GibbsSweep
from pyro_ebm.ops.short_kernel import metropolis
from pyro_ebm.ops.short_langevin import Langevin
from pyro_ebm.ops.short_walks import IntegerWalk, SphereWalk
from pyro_ebm.ops.spaces import UnconstrainedSpace

F64 = torch.float64
NUM = 2000


def name_of(value):
    """Ids without addresses, so that every worker collects the same tests."""
    return "start" if callable(value) and not hasattr(value, "check") else str(value)


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def sample(potential, support, event_shape, *, num_steps=100, num=NUM, batch=()):
    event_shape = torch.Size(event_shape)
    init = initial_points(support, torch.Size((num, *batch)), event_shape, dtype=F64)
    return short_chain(potential, support, init, event_dim=len(event_shape), num_steps=num_steps)


def largest_z(draws, mean, variance):
    """The z of the first two moments, their standard errors taken from the draws."""
    draws = draws.reshape(len(draws), -1)
    deviation = draws - mean
    stacked = torch.cat([deviation, deviation.square() - variance], -1)
    return float((stacked.mean(0) / stacked.std(0) * len(draws) ** 0.5).abs().max())


# --- continuous supports -------------------------------------------------------------------------


def truncated_normal_moments(low, high):
    grid = torch.linspace(low, high, 20_001, dtype=F64)
    weight = (-0.5 * grid.square()).exp()
    mean = torch.trapezoid(grid * weight, grid) / torch.trapezoid(weight, grid)
    second = torch.trapezoid(grid.square() * weight, grid) / torch.trapezoid(weight, grid)
    return mean, second - mean.square()


def dirichlet_moments(alpha):
    total = alpha.sum()
    mean = alpha / total
    return mean, mean * (1 - mean) / (total + 1)


ALPHA = tensor(0.8, 2.0, 3.5)

# With respect to Lebesgue measure: name -> potential, support, event shape, mean, variance
CONTINUOUS = {
    "gamma": (
        lambda x: 3 * x - 1.5 * x.log(),
        C.positive,
        (),
        tensor(2.5 / 3),
        tensor(2.5 / 9),
    ),
    "beta": (
        lambda x: -(x.log() + 3 * (1 - x).log()),
        C.unit_interval,
        (),
        tensor(1 / 3),
        tensor(2 / 63),
    ),
    "dirichlet": (
        lambda x: -((ALPHA - 1) * x.log()).sum(-1),
        C.simplex,
        (3,),
        *dirichlet_moments(ALPHA),
    ),
    "truncated normal": (
        lambda x: 0.5 * x.square(),
        C.interval(0.5, 2.0),
        (),
        *truncated_normal_moments(0.5, 2.0),
    ),
    "uniform": (
        lambda x: torch.zeros_like(x),
        C.interval(-1.0, 3.0),
        (),
        tensor(1.0),
        tensor(16 / 12),
    ),
    "half normal": (
        lambda x: 0.5 * x.square().sum(-1),
        C.independent(C.nonnegative, 1),
        (2,),
        tensor((2 / math.pi) ** 0.5),
        tensor(1 - 2 / math.pi),
    ),
}


def continuous_z(name):
    potential, support, event_shape, mean, variance = CONTINUOUS[name]
    result = sample(potential, support, event_shape)
    assert result.rhat < 1.2
    return largest_z(result.draws, mean, variance)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_moments_on_continuous_supports(name):
    assert continuous_z(name) < 5


@pytest.mark.parametrize("name", [name for name in CONTINUOUS if name != "uniform"])
def test_missing_jacobian_gives_other_moments(name, monkeypatch):
    """Without it, and with the uniform law, the chains would even have no stationary law at all."""

    def without(self, u):
        x = self.to_support(u)
        return x, 1e-9 * u.square().sum(-1)

    monkeypatch.setattr(UnconstrainedSpace, "with_log_det", without)
    potential, support, event_shape, mean, variance = CONTINUOUS[name]
    draws = sample(potential, support, event_shape).draws
    assert largest_z(draws, mean, variance) > 5


def test_correlated_and_ill_scaled_gaussian():
    scale = tensor(0.01, 1.0, 100.0)
    correlation = torch.eye(3, dtype=F64) * 0.5 + 0.5
    law = dist.MultivariateNormal(torch.zeros(3, dtype=F64), scale[:, None] * correlation * scale)
    init = scale * torch.randn(NUM, 3, dtype=F64)
    result = short_chain(lambda x: -law.log_prob(x), C.real_vector, init, event_dim=1)
    assert result.rhat < 1.1
    assert 0.45 < result.accept_prob < 0.7
    assert largest_z(result.draws, 0.0, scale.square()) < 5


def test_batch_elements_of_very_different_scale():
    """Step sizes are per batch element: one problem does not slow down the next."""
    scale = tensor(1e-3, 1.0, 1e3)

    def potential(x):
        return 0.5 * (x / scale[:, None]).square().sum(-1)

    init = torch.randn(NUM, 3, 2, dtype=F64) * scale[:, None] * 2
    result = short_chain(potential, C.real_vector, init, event_dim=1)
    assert result.draws.shape == (NUM, 3, 2)
    assert result.rhat < 1.1
    variance = scale.square()[:, None].expand(3, 2).reshape(-1)
    assert largest_z(result.draws, 0.0, variance) < 5


# --- discrete supports ---------------------------------------------------------------------------

EDGES = [(r * 3 + c, r * 3 + c + 1) for r in range(3) for c in range(2)]
EDGES += [(r * 3 + c, r * 3 + c + 3) for r in range(2) for c in range(3)]


def agreement(s):
    return sum(s[..., i] * s[..., j] for i, j in EDGES)


def ising(s):
    return -0.4 * agreement(s) - 0.2 * s[..., 0]


def as_boolean(potential):
    return lambda x: potential(2 * x - 1)


def ising_z(potential, support):
    states = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)), dtype=F64)
    weight = torch.softmax(-ising(states), 0)
    draws = sample(potential, support, (9,), num_steps=20).draws
    s = draws if support is spins else 2 * draws - 1
    mean, seen = (weight * agreement(states)).sum(), agreement(s)
    variance = (weight * (agreement(states) - mean).square()).sum()
    magnet = (weight[:, None] * states).sum(0)
    return max(
        largest_z(seen, mean, variance), largest_z(s[:, 1:], magnet[1:], 1 - magnet[1:].square())
    )


def test_ising_lattice_agrees_with_enumeration():
    assert ising_z(ising, spins) < 5
    assert ising_z(as_boolean(ising), C.boolean) < 5


def test_edges_counted_twice_are_noticed():
    assert ising_z(lambda s: 2 * ising(s), spins) > 5


def test_ising_value_of_the_literature():
    """E[S] of the free 3 x 3 lattice at coupling .4 is 5.44089773, its variance 15.89208023."""
    draws = sample(lambda s: -0.4 * agreement(s), spins, (9,), num_steps=20).draws
    assert largest_z(agreement(draws), 5.44089773, 15.89208023) < 5


def poisson_tilt_z(base, tilt):
    """Poisson(base) tilted by exp(tilt x) is Poisson(base * exp(tilt))."""
    law, rate = dist.Poisson(tensor(base)), base * math.exp(tilt)

    def potential(x):
        return (-law.log_prob(x) - tilt * x).sum(-1)

    init = law.sample((NUM,))
    result = short_chain(potential, C.nonnegative_integer, init, event_dim=1)
    assert result.rhat < 1.2
    return largest_z(result.draws, rate, rate)


@pytest.mark.parametrize(("base", "tilt"), [(3.0, 0.4), (60.0, -0.5)])
def test_tilted_poisson(base, tilt):
    assert poisson_tilt_z(base, tilt) < 5


def always(old, new, ratio):
    return metropolis(old, new, torch.where(ratio > -1.0, 0.0, ratio))


def test_lax_acceptance_of_integers_is_noticed(monkeypatch):
    monkeypatch.setattr(short_walks, "metropolis", always)
    assert poisson_tilt_z(3.0, 0.4) > 5


def test_binomials_with_totals_of_their_own():
    total, p = tensor(2.0, 30.0), tensor(0.7, 0.2)
    law = dist.Binomial(total, p).to_event(1)
    result = short_chain(
        lambda x: -law.log_prob(x), law.support, law.sample((NUM,)) * 0, event_dim=1, num_steps=100
    )
    assert largest_z(result.draws, total * p, total * p * (1 - p)) < 5


def test_one_hot_categories():
    law = dist.OneHotCategorical(logits=tensor(0.0, 1.0, 2.0))
    result = short_chain(
        lambda x: -law.log_prob(x), law.support, law.sample((NUM,)), event_dim=1, num_steps=8
    )
    assert largest_z(result.draws, law.probs, law.probs * (1 - law.probs)) < 5


# --- spheres and mixed tables --------------------------------------------------------------------


def von_mises_fisher_z(assumed):
    """The mean resultant of exp(k mu'x) on the sphere in three dims is coth(k) - 1 / k."""
    result = sample(lambda x: -3.0 * x[..., 2], sphere, (3,))
    assert result.rhat < 1.2
    along = 1 / math.tanh(assumed) - 1 / assumed
    variance = 1 - 2 * along / assumed - along**2
    return largest_z(result.draws[:, 2], along, variance)


def test_von_mises_fisher():
    assert von_mises_fisher_z(3.0) < 5


def test_another_concentration_is_noticed():
    assert von_mises_fisher_z(3.5) > 5


MIXED = C.cat([C.real, C.boolean, C.positive], -1, [1, 1, 1])


def mixed(x):
    """z ~ Bernoulli(.3), x | z ~ Normal(4z - 2, 1 + z), y | z ~ Exponential(1 + 2z)."""
    real, z, positive = x.unbind(-1)
    z = z.clamp(0, 1)
    prior = -dist.Bernoulli(tensor(0.3)[0]).log_prob(z)
    location = -dist.Normal(1.5 * z - 1, 1 + z).log_prob(real)
    return prior + location - dist.Exponential(1 + 2 * z).log_prob(positive)


def mixed_z():
    result = sample(mixed, MIXED, (3,))
    x, z, y = result.draws.unbind(-1)
    assert C.boolean.check(z).all()
    mean_x = 0.7 * -1 + 0.3 * 0.5
    var_x = 0.7 * (1 + 1) + 0.3 * (4 + 0.25) - mean_x**2
    mean_y = 0.7 + 0.3 / 3
    var_y = 0.7 * 2 + 0.3 * 2 / 9 - mean_y**2
    return max(largest_z(z, 0.3, 0.21), largest_z(x, mean_x, var_x), largest_z(y, mean_y, var_y))


def test_mixed_table():
    assert mixed_z() < 5


def test_blocks_that_remember_stale_energies_are_noticed(monkeypatch):
    def forgetful(self, i, *, adapt):
        block = self.blocks[i]
        conditional = block.conditional(self.potential, self.x)
        self.points[i], prob = block.kernel.step(conditional, self.points[i], adapt=adapt)
        self.x = block.put(self.x, block.kernel.events(self.points[i]))
        return prob

    monkeypatch.setattr(_Chains, "_move", forgetful)
    assert mixed_z() > 5


def test_mixed_columns_in_any_order_with_batch():
    support = C.cat(
        [C.boolean, C.simplex, sphere, C.real, C.nonnegative_integer], -1, [2, 3, 2, 1, 1]
    )

    def potential(x):
        return 0.5 * x.square().sum(-1) + x[..., 0] * x[..., 7]

    result = sample(potential, support, (9,), num=20, batch=(3,), num_steps=40)
    x = result.draws
    assert x.shape == (20, 3, 9)
    assert C.boolean.check(x[..., :2]).all()
    assert C.simplex.check(x[..., 2:5]).all()
    assert (x[..., 5:7].norm(dim=-1) - 1).abs().max() < 1e-12
    assert C.nonnegative_integer.check(x[..., 8]).all()


@pytest.mark.parametrize(
    ("support", "event_shape", "kernels"),
    [
        (C.independent(C.positive, 1), (2,), [Langevin]),
        (C.independent(spins, 2), (2, 2), [GibbsSweep]),
        (C.integer_interval(0, 255), (), [GibbsSweep]),
        (C.integer_interval(0, 256), (), [IntegerWalk]),
        (C.nonnegative_integer, (), [IntegerWalk]),
        (C.one_hot, (3,), [GibbsSweep]),
        (sphere, (3,), [SphereWalk]),
        (C.cat([C.real, C.positive], -1), (2,), [Langevin]),
        (C.cat([C.real, spins, C.positive, sphere], -1, [1, 1, 1, 2]), (5,), None),
    ],
    ids=name_of,
)
def test_support_decides_the_kernel(support, event_shape, kernels):
    blocks = blocks_of(support, torch.Size(event_shape))
    assert [type(block.kernel) for block in blocks] == (
        kernels or [Langevin, GibbsSweep, SphereWalk]
    )


def test_block_replaces_its_own_columns_only():
    block = Block(GibbsSweep(tensor(0.0, 1.0), torch.Size([2])), torch.tensor([0, 2]))
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(block.take(x), x[:, [0, 2]])
    candidates = torch.randn(5, 2, 2)
    replaced = block.put(x, candidates.flatten(0, 1)).view(5, 2, 3)
    assert torch.equal(replaced[..., 1], x[:, 1].expand(5, 2))
    assert torch.equal(replaced[..., [0, 2]], candidates)


# --- promises ------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)
        )
        self.layers[0].bias.requires_grad_(False)

    def forward(self, x):
        return self.layers(x).squeeze(-1) + 0.5 * x.square().sum(-1)


MODES = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}
SMALL = [
    (C.real_vector, lambda: torch.randn(16, 2)),
    (C.boolean, lambda: torch.zeros(16, 2)),
    (C.nonnegative_integer, lambda: torch.zeros(16, 2)),
    (sphere, lambda: torch.eye(2).repeat(8, 1)),
    (C.cat([C.real, C.boolean], -1), lambda: torch.zeros(16, 2)),
]


@pytest.mark.parametrize(("support", "start"), SMALL, ids=name_of)
def test_same_draws_in_every_gradient_mode(support, start):
    torch.manual_seed(0)
    net, init, draws = Net(), start(), {}
    for mode, context in MODES.items():
        torch.manual_seed(1)
        with context():
            result = short_chain(net, support, init.clone(), event_dim=1, num_steps=20)
        draws[mode] = result.draws
        assert not result.draws.requires_grad
        assert not result.draws.is_inference()
    assert torch.equal(draws["plain"], draws["no_grad"])
    assert torch.equal(draws["plain"], draws["inference"])


@pytest.mark.parametrize(("support", "start"), SMALL, ids=name_of)
def test_parameters_are_not_touched(support, start):
    net = Net()
    flags = [p.requires_grad for p in net.parameters()]
    short_chain(net, support, start(), event_dim=1, num_steps=10)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(("support", "start"), SMALL, ids=name_of)
def test_starting_points_are_not_modified(support, start):
    init = start()
    before = init.clone()
    short_chain(Net(), support, init, event_dim=1, num_steps=10)
    assert torch.equal(init, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "support", [C.positive, C.unit_interval, C.boolean, C.nonnegative_integer], ids=name_of
)
def test_float_dtypes_are_kept(support, dtype):
    init = initial_points(support, torch.Size([16]), torch.Size([]), dtype=dtype)
    assert short_chain(torch.square, support, init, event_dim=0).draws.dtype == dtype


@pytest.mark.parametrize("support", [C.boolean, spins, C.nonnegative_integer], ids=name_of)
def test_integer_dtypes_are_kept(support):
    init = initial_points(support, torch.Size([16]), torch.Size([]), dtype=torch.int64)
    draws = short_chain(lambda x: 0.5 * x.double(), support, init, event_dim=0, num_steps=8).draws
    assert draws.dtype == torch.int64


def test_two_modes_that_do_not_mix_have_a_large_rhat():
    init = torch.randn(16, 2, dtype=F64) * 4
    result = short_chain(
        lambda x: (x.square() - 16).square().sum(-1), C.real_vector, init, event_dim=1
    )
    assert result.rhat > 1.2


def test_disagreement_in_one_batch_element_is_seen():
    height = tensor(0.0, 8.0)

    def potential(x):
        return 0.5 * x.square() + height * (x.square() - 1).square()

    init = torch.randn(32, 2, dtype=F64)
    assert short_chain(potential, C.real, init, event_dim=0).rhat > 1.2
    only_first = short_chain(lambda x: 0.5 * x.square(), C.real, init, event_dim=0)
    assert only_first.rhat < 1.2


def test_quantities_that_never_vary_do_not_alarm():
    init = torch.zeros(16, 3)
    steep = short_chain(lambda x: 1e4 * x.sum(-1), C.boolean, init, event_dim=1, num_steps=8)
    assert steep.rhat == 1.0
    assert not steep.draws.any()
    assert steep.accept_prob == 1.0


def test_many_coordinates_are_thinned_before_ranking():
    init = torch.randn(8, 20, 300)
    result = short_chain(lambda x: 0.5 * x.square().sum(-1), C.real_vector, init, event_dim=1)
    assert math.isfinite(result.rhat)


def test_chains_outside_the_domain_restart_from_others():
    def potential(x):
        return torch.where(x[..., 0] > 0, x.square().sum(-1), torch.nan)

    init = torch.randn(64, 3, 2, dtype=F64)
    result = short_chain(potential, C.real_vector, init, event_dim=1, num_steps=40)
    assert (result.draws[..., 0] > 0).all()


@pytest.mark.parametrize("support", [C.real_vector, C.boolean], ids=name_of)
def test_no_finite_start_at_all(support):
    with pytest.raises(NonFiniteEnergyError, match="any of the 16 starting points; check"):
        short_chain(lambda x: x.sum(-1) * torch.nan, support, torch.zeros(16, 2), event_dim=1)


def test_no_finite_start_in_a_batch_element():
    factor = torch.tensor([1.0, torch.inf])
    with pytest.raises(NonFiniteEnergyError, match="of some batch element"):
        short_chain(lambda x: factor * x.square(), C.real, torch.randn(16, 2), event_dim=0)


def test_energy_with_a_trailing_dim():
    with pytest.raises(EnergyShapeError, match=r"shape \(16, 1\) .* expected \(16,\).*squeeze"):
        short_chain(torch.nn.Linear(2, 1), C.real_vector, torch.randn(16, 2), event_dim=1)


def test_energy_without_x():
    with pytest.raises(ValueError, match="does not depend on x"):
        short_chain(lambda x: torch.zeros(16), C.real_vector, torch.randn(16, 2), event_dim=1)


@pytest.mark.parametrize("support", [C.lower_cholesky, C.multinomial(3)], ids=name_of)
def test_support_without_kernel(support):
    with pytest.raises(NotImplementedError, match=r"no default sampler .*sampler="):
        short_chain(lambda x: x.sum((-2, -1)), support, torch.zeros(4, 2, 2), event_dim=2)


def test_arguments():
    with pytest.raises(ValueError, match=r"\(chains, \*batch, \*event\) with 1 event dims"):
        short_chain(torch.square, C.real, torch.zeros(3), event_dim=1)
    with pytest.raises(ValueError, match="at least 8, got 5"):
        short_chain(torch.square, C.real, torch.zeros(3), event_dim=0, num_steps=5)


def test_one_chain_works():
    result = short_chain(torch.square, C.real, torch.zeros(1), event_dim=0)
    assert result.draws.shape == (1,)
    assert math.isfinite(result.rhat)


def test_result_pickles():
    result = short_chain(torch.square, C.real, torch.zeros(4), event_dim=0, num_steps=8)
    assert torch.equal(pickle.loads(pickle.dumps(result)).draws, result.draws)
