"""Exchange by trajectories of a surrogate: exact with good, bad and partial surrogates."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import Precision

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc import MCMC, Sweeps
from pyro_ebm.mcmc.exchange.exchange_target import exchange_target
from pyro_ebm.mcmc.exchange.surrogate_exchange import SurrogateExchange, SurrogateTarget
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.normalizers.anchored import anchored
from pyro_ebm.ops.kaufman import torus_log_normalizer
from pyro_ebm.testing.statistics import assert_mean_close


class Lattice(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


def one_lattice(x):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(Lattice(coupling, x.shape[-2:])), obs=x)


def rows(x):
    precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)


def two_latents(x):
    """A coupling and a field that pull at each other."""
    coupling = pyro.sample("coupling", dist.Normal(torch.tensor(0.2), 0.1))
    field = pyro.sample("field", dist.Normal(torch.tensor(0.0), 0.3))
    pyro.sample("x", EnergyDistribution(Lattice(coupling, (3, 3), field=field)), obs=x)


def lattice():
    """Two spins turned: the sum over bonds is 16."""
    x = torch.ones(4, 4)
    x[0, 0] = x[-2, -2] = -1.0
    return x


def true(natural):
    return torus_log_normalizer(natural[..., 0], (4, 4))


def bad(natural):
    """Curvature a fifth too large, with the slope that the posterior's middle needs."""
    return 1.2 * true(natural) - 0.2 * 16.0 * natural[..., 0]


def partial(natural):
    """Known for half of the posterior only."""
    return torch.where(natural[..., 0] < 0.35, true(natural), torch.nan)


def of_two_latents(natural):
    return 9 * 0.7 + 9.0 * natural[..., 0].square() + 4.5 * natural[..., 1].square()


def exact_draws(number):
    """Independent unconstrained draws of the posterior of the lattice."""
    grid = torch.linspace(0.0, 1.0, 100_001)[1:-1]
    cumulative = (16.0 * grid - torus_log_normalizer(grid, (4, 4))).softmax(0).cumsum(0)
    which = torch.searchsorted(cumulative, torch.rand(number)).clamp(max=len(grid) - 1)
    return torch.logit(grid[which])[:, None]


def bound(kernel, q, *args):
    potential = CapturedPotential(kernel.bind(*args))
    return potential, kernel.init(potential, q)


def run(kernel, *args, num_samples=50, warmup_steps=40):
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=128, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)
    torch.set_default_dtype(torch.float64)


# --- the trajectory


def test_trajectories_are_reversible():
    kernel = SurrogateExchange(two_latents, surrogate=of_two_latents, step_size=0.1)
    q, p = torch.randn(20, 2), torch.randn(20, 2)
    potential, state = bound(kernel, 0.2 * q, torch.ones(3, 3))
    end, p_end = kernel.trajectory(state, p)
    back, p_back = kernel.trajectory(kernel.init(potential, end), -p_end)
    torch.testing.assert_close(back, state.position, atol=1e-10, rtol=0.0)
    torch.testing.assert_close(p_back, -p, atol=1e-10, rtol=0.0)
    assert float((end - state.position).abs().min()) > 1e-4


def test_trajectories_preserve_volume():
    """The determinant of the map by central differences, with an error of the order 1e-9."""
    kernel = SurrogateExchange(two_latents, surrogate=of_two_latents, step_size=0.1)
    z = torch.tensor([0.3, 0.1, 0.7, -0.4])
    shifted = torch.cat([z + 1e-5 * torch.eye(4), z - 1e-5 * torch.eye(4)])
    _, state = bound(kernel, shifted[:, :2], torch.ones(3, 3))
    ends = torch.cat(kernel.trajectory(state, shifted[:, 2:]), 1)
    jacobian = (ends[:4] - ends[4:]) / 2e-5
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-7)


def test_a_true_surrogate_is_followed_without_error():
    """U with log Z, by Kaufman: its Hamiltonian is conserved as the step goes to zero."""
    kernel = SurrogateExchange(one_lattice, surrogate=true, step_size=0.01, num_steps=20)
    _, state = bound(kernel, exact_draws(50), lattice())
    p = torch.randn(50, 1)
    end, p_end = kernel.trajectory(state, p)

    def hamiltonian(q, p):
        k = q.sigmoid()
        prior = -torch.log(k * (1.0 - k))
        u = prior - 16.0 * k + torus_log_normalizer(k, (4, 4))
        return (u + 0.5 * p.square())[:, 0]

    before, after = hamiltonian(state.position, p), hamiltonian(end, p_end)
    torch.testing.assert_close(after, before, atol=2e-4, rtol=0.0)
    assert float((end - state.position).abs().max()) > 0.2


def test_chains_walk_where_the_surrogate_is_not_known():
    """Without a share of walks elsewhere, none may leave from there: no walk leads back."""
    kernel = SurrogateExchange(one_lattice, surrogate=partial, step_size=0.3, random_walk_share=0.0)
    potential, state = bound(kernel, exact_draws(500), lattice())
    moved, info = kernel.step(potential, state)
    known, after = (torch.sigmoid(s.position[:, 0]) < 0.35 for s in (state, moved))
    assert torch.equal(known, after)
    assert bool(info["non_finite"].any())
    for part in (known, ~known):
        assert float((moved.position != state.position)[part].double().mean()) > 0.1


def test_chains_find_back_from_outside_of_what_is_known():
    kernel = SurrogateExchange(one_lattice, surrogate=partial)
    mcmc = MCMC(kernel, 60, 60, num_chains=64, disable_progbar=True)
    mcmc.run(lattice(), initial_params={"coupling": torch.full((64,), 1.5)})
    assert 0.2 < float((mcmc.get_samples()["coupling"] < 0.35).double().mean()) < 0.9


# --- the law


@pytest.mark.parametrize(("surrogate", "num_bridges"), [(bad, 0), (partial, 0), (bad, 2)])
def test_exact_draws_stay_exact(surrogate, num_bridges):
    """3000 chains: a drift of a tenth of a standard deviation is seen."""
    kernel = SurrogateExchange(
        one_lattice, surrogate=surrogate, step_size=0.35, num_bridges=num_bridges
    )
    potential, state = bound(kernel, exact_draws(3000), lattice())
    start = state.position
    for _ in range(4):
        state, _ = kernel.step(potential, state)
    moved = moments(state.position) - moments(start)
    assert float((moved[:, 0] != 0).double().mean()) > 0.25
    assert_mean_close(moved, 0.0)


def moments(q):
    return torch.cat([q, q.square(), q.sigmoid(), q.sigmoid().square()], 1)


def check(draws, mean, sd):
    """Gates at five standard errors, from the spread of the chains' own means."""
    for values, wanted in ((draws, mean), ((draws - mean).square(), sd**2)):
        assert_mean_close(values.mean(1), wanted)


def test_the_published_posterior():
    mcmc = run(SurrogateExchange(one_lattice, surrogate=bad), lattice())
    assert mcmc.kernel.adjusted
    check(mcmc.get_samples()["coupling"], 0.327236, 0.123620)


def test_rows_count_one_by_one():
    """Twenty rows of N(0, 1 / precision) under Gamma(2, 1): conjugate."""
    x = torch.randn(20) / 2.2**0.5
    kernel = SurrogateExchange(rows, surrogate=lambda n: -0.45 * n[..., 0].log())
    draws = run(kernel, x).get_samples()["precision"]
    exact = dist.Gamma(12.0, 1.0 + 0.5 * x.square().sum())
    check(draws, float(exact.mean), float(exact.variance.sqrt()))


def test_a_surrogate_need_not_know_masked_rows():
    x = torch.randn(5)

    def model(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=torch.arange(5) > 0):
            pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)

    def partial(natural):
        return torch.where(torch.arange(5) > 0, -0.5 * natural[..., 0].log(), torch.nan)

    def whole(natural):
        return -0.5 * natural[..., 0].log()

    target, q = exchange_target(model, (x,), {}), torch.randn(4, 1)
    known, wanted = (CapturedPotential(SurrogateTarget(target, f)) for f in (partial, whole))
    torch.testing.assert_close(known.value(q), wanted.value(q))


def test_an_anchored_surrogate_raises_the_acceptance_of_long_moves():
    """Trajectories of a quarter period against random-walk moves of the same tuning."""
    log_z = anchored(Ising(0.0, (4, 4)), torch.tensor([[0.2], [0.35], [0.5]]), num_draws=600)
    rates = []
    for walks in (0.0, 1.0):
        kernel = SurrogateExchange(
            one_lattice, surrogate=log_z, step_size=0.25, random_walk_share=walks
        )
        potential, state = bound(kernel, exact_draws(2000), lattice())
        rates.append(float(kernel.step(potential, state)[1]["acceptance_rate"].mean()))
    assert rates[0] > 1.1 * rates[1]


def test_surrogates_of_several_sites_go_by_name():
    def two(x):
        for name in ("one", "other"):
            coupling = pyro.sample(f"k_{name}", dist.Uniform(torch.tensor(0.0), 1.0))
            pyro.sample(name, EnergyDistribution(Lattice(coupling, (4, 4))), obs=x)

    kernel = SurrogateExchange(two, surrogate={"one": true, "other": bad}, step_size=0.35)
    q = torch.cat([exact_draws(2000), exact_draws(2000)], 1)
    potential, state = bound(kernel, q, lattice())
    for _ in range(3):
        state, _ = kernel.step(potential, state)
    assert_mean_close(moments(state.position) - moments(q), 0.0)
    with pytest.raises(ValueError, match="for each of \\['one', 'other'\\], got \\['one'\\]"):
        SurrogateExchange(two, surrogate=true).bind(lattice())


def test_the_longest_trajectory_is_a_quarter_of_a_period():
    kernel = SurrogateExchange(one_lattice, surrogate=true, num_steps=8, auxiliary=Sweeps(2))
    mcmc = run(kernel, lattice(), num_samples=2)
    assert 8 * float(mcmc.state.tuning["step_size"]) <= torch.pi / 2 + 1e-9
    assert not mcmc.kernel.adjusted


# --- what is refused


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="surrogate must be a function .* got float"):
        SurrogateExchange(one_lattice, surrogate=1.0)


def test_a_surrogate_of_another_shape_is_refused():
    kernel = SurrogateExchange(one_lattice, surrogate=lambda natural: natural)
    potential, state = bound(kernel, torch.zeros(4, 1), lattice())
    with pytest.raises(ValueError, match="site 'x' returned shape .*without the last dim"):
        kernel.step(potential, state)
