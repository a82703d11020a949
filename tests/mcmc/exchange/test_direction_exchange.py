"""Exchange along differences of other chains: two half-steps that keep the posterior."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc import MCMC
from pyro_ebm.mcmc.exchange.direction_exchange import DirectionExchange
from pyro_ebm.mcmc.exchange.exchange_diagnostics import exchange_diagnostics
from pyro_ebm.mcmc.exchange.surrogate_exchange import SurrogateExchange
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.mcmc.targets.each_chain import EachChain
from pyro_ebm.testing.statistics import assert_mean_close

PRIOR = (torch.tensor([0.2, 0.0]), torch.tensor([0.1, 0.2]))


class Lattice(Ising):
    """A lattice that keeps its log Z to itself."""

    is_tractable = False


def model(x):
    """A coupling and a field that pull at each other."""
    coupling = pyro.sample("coupling", dist.Normal(torch.tensor(0.2), 0.1))
    field = pyro.sample("field", dist.Normal(torch.tensor(0.0), 0.2))
    pyro.sample("x", EnergyDistribution(Lattice(coupling, (3, 3), field=field)), obs=x)


def lattice():
    x = torch.ones(3, 3)
    x[0, 0] = x[1, 1] = -1.0
    return x


def exact_draws(number):
    """Draws of the posterior by its density on a grid, spread within the cells."""
    axes = [m + s * torch.linspace(-5.0, 5.0, 201) for m, s in zip(*PRIOR, strict=True)]
    coupling, field = torch.meshgrid(*axes, indexing="ij")
    statistics = Lattice(0.0, (3, 3), field=0.0).statistics(lattice())
    log_density = coupling * statistics[0] + field * statistics[1]
    log_density = log_density - Ising(coupling, (3, 3), field=field).log_normalizer()
    for value, loc, scale in zip((coupling, field), *PRIOR, strict=True):
        log_density = log_density - 0.5 * ((value - loc) / scale).square()
    which = torch.multinomial(log_density.flatten().softmax(0), number, replacement=True)
    q = torch.stack([coupling.flatten()[which], field.flatten()[which]], 1)
    return q + (torch.rand(number, 2) - 0.5) * PRIOR[1] / 20.0


def bound(kernel, q):
    potential = CapturedPotential(kernel.bind(lattice()))
    return potential, kernel.init(potential, q)


def moments(q):
    return torch.cat([q, q.square(), q.prod(1, keepdim=True)], 1)


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)
    torch.set_default_dtype(torch.float64)


def test_exact_draws_stay_exact():
    """3000 chains: a drift of a tenth of a standard deviation is seen in five steps."""
    kernel = DirectionExchange(model, step_size=1.2)
    potential, state = bound(kernel, exact_draws(3000))
    start = state.position
    for _ in range(5):
        state, info = kernel.step(potential, state)
    assert info["acceptance_rate"].shape == (3000,)
    assert float((state.position != start).any(1).double().mean()) > 0.5
    assert_mean_close(moments(state.position) - moments(start), 0.0)


def test_the_posterior_from_dispersed_starts():
    """128 chains of 60 draws: a mean off by a tenth of a standard deviation is seen."""
    mcmc = MCMC(DirectionExchange(model), 60, 100, num_chains=128, disable_progbar=True)
    mcmc.run(lattice())
    assert mcmc.kernel.adjusted
    assert mcmc.diagnostics()["acceptance_rate"].shape == (128, 60)
    draws = torch.stack([mcmc.get_samples()[name] for name in ("coupling", "field")], -1)
    wanted = moments(exact_draws(200_000)).mean(0)
    found = moments(draws.flatten(0, 1)).reshape(128, 60, -1).mean(1)
    assert_mean_close(found, wanted)


def rough(natural):
    """Log Z at high temperature, about."""
    return 9.0 * (0.7 + natural[..., 0].square() + 0.5 * natural[..., 1].square())


def mixed(direction_share, **options):
    return SurrogateExchange(model, surrogate=rough, direction_share=direction_share, **options)


@pytest.mark.parametrize("direction_share", [0.3, 1.0])
def test_directions_mixed_with_trajectories_keep_exact_draws(direction_share):
    """6000 chains: a drift of .07 standard deviations is seen in twelve steps."""
    kernel = mixed(direction_share, step_size=0.25)
    potential, state = bound(kernel, exact_draws(6000))
    state, start = state.with_tuning(root=PRIOR[1]), state.position
    for _ in range(12):
        state, _ = kernel.step(potential, state)
    assert float((state.position != start).any(1).double().mean()) > 0.5
    assert_mean_close(moments(state.position) - moments(start), 0.0)


def test_the_posterior_by_directions_mixed_with_trajectories():
    """128 chains of 60 draws: a mean off by a tenth of a standard deviation is seen."""
    mcmc = MCMC(mixed(0.4), 60, 100, num_chains=128, disable_progbar=True)
    mcmc.run(lattice())
    draws = torch.stack([mcmc.get_samples()[name] for name in ("coupling", "field")], -1)
    wanted = moments(exact_draws(200_000)).mean(0)
    assert_mean_close(moments(draws.flatten(0, 1)).reshape(128, 60, -1).mean(1), wanted)
    with pytest.raises(TypeError, match="those of this SurrogateExchange move by each other"):
        exchange_diagnostics(mcmc)


def test_a_share_of_the_iterations_leads_along_differences(monkeypatch):
    """200 iterations: the share is known to .035."""
    kernel = mixed(0.3, step_size=0.3)
    potential, state = bound(kernel, exact_draws(12))
    seen, plain = [], kernel._jumps
    monkeypatch.setattr(kernel, "_jumps", lambda *of: seen.append(len(seen)) or plain(*of))
    for _ in range(200):
        state, _ = kernel.step(potential, state)
    assert len(seen) / 2 / 200 == pytest.approx(0.3, abs=0.12)
    assert not SurrogateExchange(model, surrogate=rough).couples_chains


def test_jumps_lead_along_differences_of_the_resting_half():
    """All of them on a line, but for the noise, with twice its covariance."""
    kernel = DirectionExchange(model, step_size=0.7, noise=1e-9)
    _, state = bound(kernel, torch.zeros(4000, 2))
    resting = torch.randn(60, 1) * torch.tensor([1.0, 2.0])
    jumps = kernel.jumps(state, resting)
    torch.testing.assert_close(jumps[:, 1], 2.0 * jumps[:, 0], atol=1e-7, rtol=0.0)
    assert float(jumps[:, 0].abs().min()) > 1e-6  # never a point and itself
    wanted = 0.49 * resting[:, 0].var()
    assert_mean_close(jumps[:, 0].square(), wanted)
    assert_mean_close(jumps[:, 0], 0.0)


def test_noise_has_the_shape_of_the_metric():
    kernel = DirectionExchange(model, step_size=2.0, noise=0.5)
    _, state = bound(kernel, torch.zeros(4000, 2))
    state = state.with_tuning(root=torch.tensor([1.0, 3.0]))
    jumps = kernel.jumps(state, torch.zeros(10, 2))
    assert_mean_close(jumps.square(), torch.tensor([1.0, 9.0]))


def test_the_second_half_moves_by_where_the_first_has_come(monkeypatch):
    kernel = DirectionExchange(model, step_size=1.0)
    potential, state = bound(kernel, exact_draws(41))
    seen, plain = [], kernel.jumps

    def watched(part, resting):
        seen.append((len(part.position), resting))
        return plain(part, resting)

    monkeypatch.setattr(kernel, "jumps", watched)
    moved, _ = kernel.step(potential, state)
    assert [number for number, _ in seen] == [20, 21]
    assert torch.equal(seen[0][1], state.position[20:])
    assert torch.equal(seen[1][1], moved.position[:20])
    assert not torch.equal(moved.position[:20], state.position[:20])


def test_a_state_keeps_what_belongs_together():
    """Potentials and natural parameters are those of the positions, after steps of both halves."""
    kernel = DirectionExchange(model, step_size=1.0)
    potential, state = bound(kernel, exact_draws(40))
    state = state.with_tuning(step_size=torch.ones(40, 1))  # one for each, as early in warm-up
    for _ in range(3):
        state, _ = kernel.step(potential, state)
    torch.testing.assert_close(state.potential, potential.value(state.position))
    torch.testing.assert_close(state.extra["x"], state.position)
    assert state.tuning["step_size"].shape == (40, 1)


def test_too_few_chains_are_refused():
    mcmc = MCMC(DirectionExchange(model), 2, 2, num_chains=7, disable_progbar=True)
    with pytest.raises(ValueError, match="at least 8 chains for 2 .* got num_chains = 7"):
        mcmc.run(lattice())
    with pytest.raises(ValueError, match="at least 8 chains for 2 .* got num_chains = 7"):
        bound(mixed(0.1), torch.zeros(7, 2))


def test_chains_of_different_posteriors_are_refused():
    each = EachChain(model, {"x": torch.ones(12, 3, 3)})
    with pytest.raises(ValueError, match="one posterior, got data for each chain"):
        DirectionExchange(each).bind(lattice())
    with pytest.raises(ValueError, match="one posterior, got data for each chain"):
        SurrogateExchange(each, surrogate=rough, direction_share=0.1).bind(lattice())
