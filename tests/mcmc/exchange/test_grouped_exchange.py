"""Exchange with groups accepted one by one: its terms, posteriors by quadrature, and refusals."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import Centre, Precision
from pyro import poutine

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.mcmc import MCMC, Exchange, Sweeps
from pyro_ebm.mcmc.exchange.exchange_target import exchange_target
from pyro_ebm.mcmc.exchange.group_terms import GroupTerms
from pyro_ebm.mcmc.exchange.grouped_exchange import GroupedExchange
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import simulation_based_calibration

F64 = torch.float64
ROWS, GROUPS = 12, 5


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(7)
    torch.set_default_dtype(F64)


@pytest.fixture
def x():
    """Rows of groups whose spreads differ, ``(ROWS, GROUPS)``."""
    return torch.randn(ROWS, GROUPS) * torch.linspace(0.4, 2.0, GROUPS)


def rate_of(one):
    return pyro.sample("rate", dist.Gamma(2.0 * one, 1.0))


def centred(x):
    rate = rate_of(x.new_ones(()))
    with pyro.plate("groups", x.shape[1], dim=-1):
        precision = pyro.sample("precision", dist.Gamma(3.0, rate))
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)


def non_centred(x):
    """The same law, with natural parameters that the shared rate moves as well."""
    rate = rate_of(x.new_ones(()))
    with pyro.plate("groups", x.shape[1], dim=-1):
        unit = pyro.sample("unit", dist.Gamma(3.0 * x.new_ones(()), 1.0))
        precision = pyro.deterministic("precision", unit / rate)
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)


def in_a_loop(x):
    """The same law again, in turns with sites of their own; its plate is looped over twice."""
    rate = rate_of(x.new_ones(()))
    groups = pyro.plate("groups", x.shape[1])
    precisions = [pyro.sample(f"precision_{g}", dist.Gamma(3.0, rate)) for g in groups]
    for g in groups:
        with pyro.plate(f"rows_{g}", len(x)):
            pyro.sample(f"x_{g}", EnergyDistribution(Precision(precisions[g])), obs=x[:, g])


def by_quadrature(x):
    """Mean and sd of the rate and of every precision: given the rate, all are conjugate."""
    rate = torch.linspace(1e-3, 12.0, 20_001)[:, None]
    shape, scale = 3.0 + 0.5 * len(x), rate + 0.5 * x.square().sum(0)
    log_density = (3.0 * rate.log() - shape * scale.log()).sum(1) + rate[:, 0].log() - rate[:, 0]
    weights = log_density.softmax(0)
    first = torch.cat([rate, shape / scale], 1)
    second = torch.cat([rate.square(), shape * (shape + 1.0) / scale.square()], 1)
    mean = weights @ first
    return mean, (weights @ second - mean.square()).sqrt()


def run(kernel, *args, num_chains=256, num_samples=300, warmup_steps=200):
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def check(draws, mean, sd):
    """Gates at five standard errors, from the spread of the chains' own means.

    The standard errors are at most a twentieth of an sd: a mean off by a fourth of one is seen.
    """
    for values, wanted, unit in ((draws, mean, sd), ((draws - mean).square(), sd**2, sd**2)):
        means = values.mean(1)
        error = means.std(0) / len(means) ** 0.5
        assert float(((means.mean(0) - wanted) / error).abs().max()) < 5
        assert float((error / unit).max()) < 0.05


SLOW_LOOP = pytest.param(in_a_loop, marks=pytest.mark.slow)


@pytest.mark.parametrize("model", [centred, non_centred, SLOW_LOOP])
def test_groups_and_what_they_share(model, x):
    mcmc = run(GroupedExchange(model, "groups"), x)
    draws = mcmc.get_samples()
    if model is in_a_loop:
        draws["precision"] = torch.stack([draws[f"precision_{g}"] for g in range(GROUPS)], -1)
    own = draws["unit"] / draws["rate"][..., None] if "unit" in draws else draws["precision"]
    mean, sd = by_quadrature(x)
    check(torch.cat([draws["rate"][..., None], own], -1), mean, sd)
    rates = mcmc.diagnostics()
    assert 0.25 < float(rates["group_acceptance_rate"].mean()) < 0.45
    assert 0.2 < float(rates["acceptance_rate"].mean()) < 0.4


def test_without_shared_parameters(x):
    """Groups that share nothing are posteriors of their own."""

    def model(x):
        with pyro.plate("groups", x.shape[1], dim=-1):
            precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
            with pyro.plate("rows", len(x), dim=-2):
                pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)

    exact = dist.Gamma(3.0 + 0.5 * len(x), 2.0 + 0.5 * x.square().sum(0))
    draws = run(GroupedExchange(model, "groups"), x).get_samples()["precision"]
    check(draws, exact.mean, exact.variance.sqrt())


def test_groups_of_different_sizes_under_a_mask(x):
    """Padded by NaN: means with conjugate posteriors of their own."""
    counts = torch.arange(GROUPS)  # the first group has no rows
    seen = torch.arange(ROWS)[:, None] >= ROWS - counts
    x[~seen] = torch.nan

    def model(x):
        with pyro.plate("groups", GROUPS, dim=-1):
            mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 1.0))
            with pyro.plate("rows", ROWS, dim=-2), poutine.mask(mask=seen):
                pyro.sample("x", EnergyDistribution(Centre(0.5 * mean.expand(ROWS, GROUPS))), obs=x)

    kernel = GroupedExchange(model, "groups", auxiliary=Sweeps(8))
    draws = run(kernel, x, num_samples=120, warmup_steps=120).get_samples()["mean"]
    precision = 1.0 + 0.25 * counts
    check(draws, 0.5 * x.nansum(0) / precision, precision.rsqrt())


def test_many_groups_move_where_one_decision_for_all_hardly_does():
    """Jumps of a whole posterior sd of every group: thirty decisions, or one."""
    x = torch.randn(ROWS, 30)
    shares = []
    for kernel in (
        GroupedExchange(centred, "groups", step_size=0.4, group_accept_prob=0.3),
        Exchange(centred, step_size=0.4, adapt_step_size=False, adapt_mass_matrix=False),
    ):
        mcmc = MCMC(kernel, 300, 0, num_chains=32, disable_progbar=True)
        mcmc.run(x)
        draws = mcmc.get_samples(100)["precision"]
        shares.append(float((draws.diff(dim=1) != 0).double().mean()))
    assert shares[0] > 0.2
    assert shares[1] < 0.02


# --- the terms


def vectors(x):
    """Groups with a constrained vector, a site made of events, a factor, and a mask."""
    scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
    hidden = torch.tensor([True, False, True, True, True])
    with pyro.plate("groups", x.shape[1], dim=-1):
        mix = pyro.sample("mix", dist.Dirichlet(x.new_ones(3)))
        shift = pyro.sample("shift", dist.Normal(0.0, scale).expand([2]).to_event(1))
        pyro.factor("pull", -shift.square().sum(-1))
        energy = Precision(mix.expand(x.shape[1], 3))
        law = EnergyDistribution(energy, batch_shape=(x.shape[1], 3)).to_event(1)
        pyro.sample("v", law, obs=x[:3].T)
        with poutine.mask(mask=hidden):
            pyro.sample("w", EnergyDistribution(Precision(mix[..., 0] + scale)), obs=x[4])
    pyro.sample("z", dist.Normal(scale, 1.0), obs=x[0, 0])


def two_plates(x):
    """Groups that stand left of another plate with latents of its own."""
    rate = rate_of(x.new_ones(()))
    with pyro.plate("groups", x.shape[0], dim=-2), pyro.plate("columns", x.shape[1], dim=-1):
        precision = pyro.sample("precision", dist.Gamma(3.0, rate))
        pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)


@pytest.mark.parametrize("model", [centred, non_centred, in_a_loop, vectors, two_plates])
def test_a_term_is_what_its_group_changes_u_by(model, x):
    target = exchange_target(model, (x,), {})
    groups = GroupTerms(target, "groups")
    q, to = target.draw_start(4), target.draw_start(4)
    potential = CapturedPotential(target).value
    u, terms = potential(q), groups(q)
    assert sorted(torch.cat([groups.blocks.flatten(), groups.shared])) == list(range(target.dim))
    for g in range(groups.size):
        moved = q.clone()
        moved[:, groups.blocks[g]] = to[:, groups.blocks[g]]
        change = groups(moved) - terms
        torch.testing.assert_close(change[:, g], u - potential(moved))
        assert (change.abs() > 1e-3).sum() == len(q)  # and no other group's


def test_sums_over_all_but_the_groups():
    x = torch.randn(ROWS, GROUPS)
    groups = GroupTerms(exchange_target(centred, (x,), {}), "groups")
    terms = torch.randn(3, ROWS, GROUPS)
    torch.testing.assert_close(groups.sums_of("x", terms), terms.sum(1))
    events = GroupTerms(exchange_target(vectors, (x,), {}), "groups")
    terms = torch.randn(3, GROUPS, 3)
    torch.testing.assert_close(events.sums_of("v", terms), terms.sum(-1))
    turns = GroupTerms(exchange_target(in_a_loop, (x,), {}), "groups")
    sums = turns.sums_of("x_3", torch.ones(3, ROWS))
    torch.testing.assert_close(sums, ROWS * torch.eye(GROUPS)[3].expand(3, -1))


def test_a_state_goes_on_as_it_was(x):
    kernel = GroupedExchange(centred, "groups")
    first = run(kernel, x, num_chains=8, num_samples=5, warmup_steps=20)
    again = GroupedExchange(centred, "groups")
    potential = CapturedPotential(again.bind(x))
    assert again.refreshed(potential, first.state) is first.state
    second = MCMC(again, 5, 20, num_chains=8, disable_progbar=True)
    second.run(x, initial_state=first.state)
    size = first.state.tuning["group_step_size"]
    assert torch.equal(second.state.tuning["group_step_size"], size)
    assert len(size.unique()) == GROUPS


def test_jumps_follow_the_metric(x):
    """The root of a group's own covariance, out of the root of all."""
    mcmc = run(GroupedExchange(vectors, "groups"), x, num_chains=64, warmup_steps=60)
    tuning = mcmc.state.tuning
    covariance = tuning["root"] @ tuning["root"].T
    block = mcmc.kernel.groups.blocks[2]
    root = tuning["group_root"][2]
    torch.testing.assert_close(root @ root.T, covariance[block][:, block])
    shared = mcmc.kernel.groups.shared
    torch.testing.assert_close(tuning["shared_root"].square(), covariance[shared][:, shared])


@pytest.mark.filterwarnings("ignore:.*does not depend on some entries")
def test_a_group_that_nothing_speaks_of(x):
    """A coordinate without density of its own is held by a normal one, in its group's term too."""

    def masked_away(x):
        with pyro.plate("groups", 3), poutine.mask(mask=torch.tensor([True, True, False])):
            level = pyro.sample("level", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", EnergyDistribution(Precision(level.exp())), obs=x[0, :3])

    target = exchange_target(masked_away, (x,), {})
    groups = GroupTerms(target, "groups")
    q = target.draw_start(5)
    torch.testing.assert_close(groups(q)[:, 2], -0.5 * q[:, 2].square())


# --- what is refused


def total_outside(x):
    with pyro.plate("groups", x.shape[1]):
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
        pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x[0])
    pyro.sample("total", dist.Normal(precision.sum(), 1.0), obs=x[0, 0])


def energy_outside(x):
    with pyro.plate("groups", x.shape[1]):
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
    law = EnergyDistribution(Precision(precision.sum()))
    pyro.sample("x", law, obs=0.0 * x[0, 0])  # E does not notice, Z would


def neighbours(x):
    """Elements of the plate that look at each other."""
    with pyro.plate("groups", x.shape[1]):
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
        law = EnergyDistribution(Precision(precision + precision.roll(1)))
        pyro.sample("x", law, obs=x[0])


def every_second(x):
    """Elements that look at the next but one: those that move with it do not show it."""
    with pyro.plate("groups", 4):
        precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
        law = EnergyDistribution(Precision(precision + precision.roll(2)))
        pyro.sample("x", law, obs=x[0, :4])


def uneven_loop(x):
    for g in pyro.plate("groups", 2):
        law = dist.Gamma(x.new_tensor(3.0), 2.0).expand([g + 1]).to_event(1)
        precision = pyro.sample(f"precision_{g}", law)
        pyro.sample(f"x_{g}", EnergyDistribution(Precision(precision.sum())), obs=x[0, g])


def nothing_inside(x):
    precision = pyro.sample("precision", dist.Gamma(x.new_tensor(3.0), 2.0))
    with pyro.plate("groups", x.shape[1]):
        pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x[0])


BAD = {
    "a site outside": (total_outside, "not independent given the rest"),
    "an energy outside": (energy_outside, "stands outside of plate 'groups'"),
    "neighbours": (neighbours, "not independent given the rest"),
    "every second": (every_second, "not independent given the rest"),
    "a loop": (uneven_loop, r"the turns of the loop 'groups' hold .* different sizes, \[1, 2\]"),
    "no latent": (nothing_inside, "holds no latent"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_each(case, x):
    model, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        run(GroupedExchange(model, "groups"), x, num_chains=4)


def test_a_plate_of_another_name(x):
    with pytest.raises(ValueError, match=r"has no plate 'villages'; it has \['groups', 'rows'\]"):
        run(GroupedExchange(centred, "villages"), x, num_chains=4)


def test_lattices_beside_a_field_shared_by_all():
    """A vector of natural parameters of which one is the group's, and one is shared."""

    def model(x):
        field = pyro.sample("field", dist.Normal(x.new_zeros(()), 0.3))
        with pyro.plate("groups", len(x)):
            coupling = pyro.sample("coupling", dist.Uniform(0.0 * field, 1.0))
            law = EnergyDistribution(_Hidden(coupling, (3, 3), field=field))
            pyro.sample("x", law, obs=x)

    x = torch.ones(2, 3, 3)
    x[0, 0, 0] = x[0, 1, 1] = x[1, 0, 0] = -1.0
    draws = run(GroupedExchange(model, "groups", num_shared_moves=1), x).get_samples()
    values = torch.cat([draws["field"][..., None], draws["coupling"]], -1)
    check(values, *_lattices_by_quadrature(x))


class _Hidden(Ising):
    is_tractable = False


def _lattices_by_quadrature(x):
    """Mean and sd of the field and both couplings, by sums over all states and a grid."""
    states = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 9).reshape(-1, 3, 3)
    family = Ising(0.0, (3, 3), field=0.0)
    rows, counts = family.statistics(states).unique(dim=0, return_counts=True)
    seen = family.statistics(x)
    field, coupling = torch.linspace(-1.8, 1.8, 361), torch.linspace(0.0, 1.0, 201)
    natural = torch.stack(torch.meshgrid(coupling, field, indexing="ij"), -1)
    log_z = torch.logsumexp(natural @ rows.T + counts.log(), -1)
    log_like = (natural @ seen.T - log_z[..., None]).movedim(-1, 0)  # groups, coupling, field
    ends = torch.ones_like(coupling)
    ends[[0, -1]] = 0.5
    log_like = log_like + ends.log()[:, None]
    each = torch.logsumexp(log_like, 1)
    weights = (each.sum(0) - 0.5 * (field / 0.3).square()).softmax(0)
    given = log_like.softmax(1)
    powers = [torch.einsum("gcf,c,f->g", given, coupling**k, weights) for k in (1, 2)]
    first = torch.cat([(weights @ field)[None], powers[0]])
    second = torch.cat([(weights @ field.square())[None], powers[1]])
    return first, (second - first.square()).sqrt()


@pytest.mark.slow
def test_simulation_based_calibration_of_a_hierarchy():
    """A thousand data sets: an sd wrong by a quarter, or a bias of a quarter of one, is seen."""

    def model():
        rate = rate_of(torch.ones(()))
        with pyro.plate("groups", 4, dim=-1):
            precision = pyro.sample("precision", dist.Gamma(3.0, rate))
            with pyro.plate("rows", 5, dim=-2):
                pyro.sample("x", EnergyDistribution(Precision(precision)))

    result = simulation_based_calibration(
        model, ["x"], lambda model: GroupedExchange(model, "groups"), num_simulations=1000
    )
    result.check(1e-4)
    seen = result.smallest_detectable(0.9)
    assert seen.too_wide < 1.25
    assert seen.bias < 0.25
