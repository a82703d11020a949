"""Exchange against posteriors by quadrature: one lattice, rows, groups; and what it refuses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from calibrated_models import Centre, Precision
from torus_cases import Lattice, lattice_with, moments, of_lattice, one_lattice

from pyro_ebm import EnergyDistribution, diagnose
from pyro_ebm.energies import ConwayMaxwellPoisson, GaussianEnergy, Ising
from pyro_ebm.mcmc import (
    HMC,
    MCMC,
    DirectionExchange,
    ExactDraws,
    Exchange,
    GroupedExchange,
    SurrogateExchange,
    Sweeps,
)
from pyro_ebm.mcmc.exchange import auxiliary
from pyro_ebm.mcmc.kernels.metropolis import MetropolisKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential

F64 = torch.float64


def run(kernel, *args, num_chains=256, num_samples=150, warmup_steps=150):
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def check(draws, mean, sd):
    """Gates at five standard errors, from the spread of the chains' own means.

    256 chains and a few thousand effective draws: a mean off by a fifteenth of an sd is seen.
    """
    for values, wanted in ((draws, mean), ((draws - mean).square(), sd**2)):
        means = values.mean(1)
        error = means.std() / len(means) ** 0.5
        assert abs(float((means.mean() - wanted) / error)) < 5
        assert float(error / (sd if values is draws else sd**2)) < 0.05


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(5)
    torch.set_default_dtype(F64)


def test_quadrature_gives_the_published_posterior():
    assert of_lattice(16) == pytest.approx((0.327236, 0.123620), abs=2e-6)


@pytest.mark.parametrize(("bonds", "num_bridges"), [(16, 0), (2, 0), (10, 0), (2, 3)])
def test_one_lattice(bonds, num_bridges):
    mcmc = run(Exchange(one_lattice, num_bridges=num_bridges), lattice_with(bonds))
    assert mcmc.kernel.adjusted
    check(mcmc.get_samples()["coupling"], *of_lattice(bonds))


def test_bridges_raise_the_acceptance():
    rates = []
    for num_bridges in (0, 8):
        kernel = Exchange(
            one_lattice, num_bridges=num_bridges, step_size=2.0, adapt_step_size=False
        )
        mcmc = run(kernel, lattice_with(2), num_samples=50, warmup_steps=30)
        rates.append(float(mcmc.diagnostics()["acceptance_rate"].mean()))
    assert rates[1] > 1.1 * rates[0]


def test_few_sweeps_are_too_wide_and_say_that_they_are_not_exact():
    """Double Metropolis-Hastings: one sweep from the data is far off, twenty are not."""
    wide = run(Exchange(one_lattice, auxiliary=Sweeps(1)), lattice_with(2), num_samples=60)
    assert not wide.kernel.adjusted
    (note,) = diagnose(wide).notes
    assert "sweeps from the data" in note
    assert "step size" not in note
    _, sd = of_lattice(2)
    assert float(wide.get_samples()["coupling"].std()) > 1.3 * sd
    many = run(Exchange(one_lattice, auxiliary=Sweeps(20)), lattice_with(2), num_samples=60)
    check(many.get_samples()["coupling"], *of_lattice(2))


def test_rows_are_drawn_one_by_one():
    """n = 20 rows of N(0, 1 / precision) under Gamma(2, 1): conjugate."""
    x = torch.randn(20) / 2.2**0.5

    def model(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(Precision(precision)), obs=x)

    exact = dist.Gamma(2.0 + 10.0, 1.0 + 0.5 * x.square().sum())
    draws = run(Exchange(model), x).get_samples()["precision"]
    check(draws, float(exact.mean), float(exact.variance.sqrt()))


def test_groups_have_parameters_of_their_own():
    """Three lattices, the last one masked: its coupling keeps the prior."""
    x = torch.ones(3, 3, 3)
    x[0, 0, 0] = x[0, 1, 1] = x[1, 0, 0] = -1.0  # sums over bonds of 2, 10 and 18
    seen = torch.tensor([True, True, False])

    def model(x):
        with pyro.plate("groups", 3):
            coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
            with pyro.poutine.mask(mask=seen):
                pyro.sample("x", EnergyDistribution(Lattice(coupling, (3, 3))), obs=x)

    draws = run(Exchange(model), x, num_samples=300, warmup_steps=300).get_samples()["coupling"]
    check(draws[..., 0], *of_lattice(2))
    check(draws[..., 1], *of_lattice(10))
    check(draws[..., 2], 0.5, 1.0 / 12.0**0.5)


class Torn(Sweeps):
    """Sweeps that lose a row."""

    def draw(self, family, observed):
        y = super().draw(family, observed)
        y[..., 0] = torch.nan
        return y


@pytest.mark.parametrize("auxiliary", [Sweeps(8), Torn(8)])
def test_missing_rows_are_nothing_whatever_stands_there(auxiliary):
    """NaN where sweeps would start, and in auxiliary draws; a conjugate slope."""
    z, x = torch.linspace(-1.0, 2.0, 8), torch.linspace(2.0, 1.0, 8)
    x[[0, 5]] = torch.nan
    seen = ~x.isnan()

    def model(z, x):
        slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", len(x)), pyro.poutine.mask(mask=seen):
            pyro.sample("x", EnergyDistribution(Centre(slope * z)), obs=x)

    mcmc = run(Exchange(model, auxiliary=auxiliary), z, x)
    precision = 1.0 + float(z[seen].square().sum())
    mean = float((z * x)[seen].sum()) / precision
    check(mcmc.get_samples()["slope"], mean, precision**-0.5)
    assert torch.equal(mcmc.target.observed["x"][seen], x[seen])


def test_two_sites_share_a_parameter_and_one_of_them_knows_its_log_z():
    x = torch.ones(3, 3)
    x[0, 0] = x[1, 1] = -1.0

    def model(x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        for name, energy in (("x", Lattice), ("y", Ising), ("z", Lattice)):
            pyro.sample(name, EnergyDistribution(energy(coupling, (3, 3))), obs=x)

    draws = run(Exchange(model), x, num_samples=200).get_samples()["coupling"]
    check(draws, *of_lattice(3 * 2, num=3))


def test_natural_parameters_follow_the_latents():
    target = Exchange(one_lattice).bind(lattice_with(16))
    q = torch.randn(5, 1)
    torch.testing.assert_close(target.naturals(q)["x"], q.sigmoid())


class WithoutLogZ(ConwayMaxwellPoisson):
    is_tractable = False


def of_counts(prior, y):
    rate = pyro.sample("rate", prior)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", EnergyDistribution(WithoutLogZ(rate, 1.0)), obs=y)


def test_an_ebm_as_the_prior_of_a_parameter_is_no_data():
    """The energy of a normal law, without its log Z, gives the posterior that the law does."""
    y = torch.tensor([2.0, 3, 1, 0, 4, 2])
    prior = EnergyDistribution(lambda v: 0.5 * v**2, event_shape=())
    rate = torch.linspace(-6.0, 6.0, 4001, dtype=torch.float64)
    weights = (y.sum() * rate - len(y) * rate.exp() - 0.5 * rate**2).softmax(0)
    mean = float(weights @ rate)
    sd = float((weights @ (rate - mean).square()).sqrt())
    check(run(Exchange(of_counts), prior, y).get_samples()["rate"], mean, sd)


def regression(covariate, x):
    slope = pyro.sample("slope", dist.Uniform(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(Lattice(slope * covariate, (3, 3))), obs=x)


def test_a_state_is_taken_over_with_the_natural_parameters_of_the_new_run():
    """What multiplies the slope has changed, and so has every natural parameter."""
    x = lattice_with(2)
    first = run(Exchange(regression), torch.tensor(1.0), x, num_chains=8, num_samples=3)
    kernel = Exchange(regression)
    potential = CapturedPotential(kernel.bind(torch.tensor(0.5), x))
    fresh = kernel.refreshed(potential, first.state)
    torch.testing.assert_close(fresh.extra["x"], 0.5 * first.state.extra["x"])
    torch.testing.assert_close(fresh.potential, potential.value(fresh.position))
    assert kernel.refreshed(potential, fresh) is fresh


def test_the_auxiliary_draws_are_chosen_for_every_run():
    """A kernel that has run on what is drawn exactly must not take the next for it."""

    class Hidden(Lattice):
        is_sampleable = False

    def model(family, x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        pyro.sample("x", EnergyDistribution(family(coupling, (3, 3))), obs=x)

    kernel = Exchange(model)
    kernel.bind(Lattice, lattice_with(2))
    assert kernel.adjusted
    kernel.bind(Hidden, lattice_with(2))
    assert not kernel.adjusted


class Bent(Lattice):
    def forward(self, x):
        return 1.1 * super().forward(x)


class Diagonal(Ising):
    """Bonds along diagonals as well; log Z, draws and sweeps are inherited from another law."""

    def statistics(self, x):
        falling = (x[..., 1:, 1:] * x[..., :-1, :-1]).sum((-1, -2))
        return super().statistics(x) + falling.unsqueeze(-1)


class InField(Lattice):
    """With a field of its own, and a kernel for it."""

    def forward(self, x):
        return super().forward(x) - x.sum((-2, -1))

    def sweep(self, x, num_sweeps):
        return Ising(self.coupling, (3, 3), field=torch.tensor(1.0)).sample().expand_as(x)


@pytest.mark.parametrize(
    ("family", "error", "sentence"),
    [
        (Bent, ValueError, "terms beside -natural . statistics of its energy depend on a latent"),
        (Diagonal, TypeError, "of its energy does not draw from its law"),
    ],
)
def test_draws_and_sweeps_of_another_energy_are_refused(family, error, sentence):
    def model(family, x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        pyro.sample("x", EnergyDistribution(family(coupling, (3, 3))), obs=x)

    target = Exchange(model).bind(Lattice, lattice_with(2))
    assert target.draws_are_exact
    for kernel in (Exchange(model), Exchange(model, auxiliary=ExactDraws())):
        with pytest.raises(error, match=sentence):
            kernel.bind(family, lattice_with(2))


class Fine(Lattice):
    """Evaluates in more digits than its statistics have."""

    def forward(self, x):
        return -(self.statistics(x).double() * self.natural().double()).sum(-1)

    sweep = Ising.sweep


def test_energies_with_more_digits_than_their_statistics():
    def model(x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        pyro.sample("x", EnergyDistribution(Fine(coupling / 3, (3, 3))), obs=x)

    torch.set_default_dtype(torch.float32)
    assert Exchange(model).bind(lattice_with(10).float()).without_sweeps == []


def test_a_field_that_no_latent_moves_is_left_out():
    def model(x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        pyro.sample("x", EnergyDistribution(InField(coupling, (3, 3))), obs=x)

    def log_density(k):
        field = torch.ones_like(k)
        return k * bonds - Ising(k, (3, 3), field=field).log_normalizer()

    x = lattice_with(2)
    bonds = float(Ising(0.0, (3, 3)).statistics(x))
    mcmc = run(Exchange(model), x)
    check(mcmc.get_samples()["coupling"], *moments(log_density, 0.0, 1.0, num=501))


def test_sweeps_on_another_support_are_refused():
    """Counts from 1 on: the family's own draws are from 0 on, and nothing would tell."""

    def model(y):
        rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0), 1.0))
        law = EnergyDistribution(
            ConwayMaxwellPoisson(rate, 1.0), support=dist.constraints.positive_integer
        )
        with pyro.plate("rows", len(y)):
            pyro.sample("y", law, obs=y)

    with pytest.raises(TypeError, match="of another support than the distribution's"):
        Exchange(model).bind(torch.tensor([1.0, 2.0, 1.0]))


class OneForAll(Precision):
    """Its sampler returns one draw for all rows, which would be broadcast."""

    is_sampleable = True

    def sample(self, shape=()):
        draws = super().sample(shape)
        return draws[..., :1]


def test_one_draw_for_all_rows_is_refused():
    def model(x):
        precision = pyro.sample("precision", dist.Gamma(torch.tensor(2.0), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(OneForAll(precision)), obs=x)

    with pytest.raises(ValueError, match=r"sample\(\) of OneForAll returned shape .*, expected"):
        run(Exchange(model), torch.randn(5), num_chains=4, num_samples=2, warmup_steps=2)


def test_draws_that_do_not_couple_are_given_up(monkeypatch):
    """And the next draws outside of exchange have all the time that they had."""

    def model(x):
        coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
        law = EnergyDistribution(Ising(coupling, (13, 13), periodic=False))
        pyro.sample("x", law, obs=x)

    monkeypatch.setattr(auxiliary, "PATIENCE", 2)
    with pytest.raises(RuntimeError, match=r"within 2 sweeps, .* exchange auxiliary=Sweeps\(\)"):
        run(Exchange(model), torch.ones(13, 13), num_chains=4, num_samples=2, warmup_steps=2)
    assert Ising(0.2, (13, 13), periodic=False).sample().shape == (13, 13)


# --- what is refused


def scaled_model(x):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    with pyro.poutine.scale(scale=5.0):
        pyro.sample("x", EnergyDistribution(Lattice(coupling, (4, 4))), obs=x)


def plain_energy(x):
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0), 1.0))
    pyro.sample("x", EnergyDistribution(lambda v: v**4 * scale, event_shape=()), obs=x)


def known(x):
    scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0), 1.0))
    pyro.sample("x", EnergyDistribution(GaussianEnergy(0.0, scale)), obs=x)


def without_a_plate(x):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(Lattice(coupling, (4, 4))), obs=x)


def latent(x):
    coupling = pyro.sample("coupling", dist.Uniform(torch.tensor(0.0), 1.0))
    pyro.sample("x", EnergyDistribution(Lattice(coupling, (4, 4))))


X = torch.tensor(0.3)
BAD = {
    "scaled": (scaled_model, torch.ones(4, 4), ValueError, "exchange needs all .* subsamples away"),
    "no family": (plain_energy, X, TypeError, "derive the energy from ExponentialFamily"),
    "rows": (
        without_a_plate,
        torch.ones(3, 4, 4),
        ValueError,
        r"'x': data of shape \(3, 4, 4\) for one law of event shape \(4, 4\): .* pyro.plate",
    ),
    "known": (known, X, ValueError, "no observed EBM site without log Z: use HMC or NUTS"),
    "latent": (latent, X, TypeError, "site 'x' lives on"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_sentence_each(case):
    model, x, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        run(Exchange(model), x, num_chains=4)


def test_a_distribution_is_no_model():
    with pytest.raises(TypeError, match="put the distribution at an observed site"):
        run(Exchange(EnergyDistribution(Ising(0.1, (4, 4)))), num_chains=4)


@pytest.mark.parametrize("kind", [Exchange, DirectionExchange, GroupedExchange, SurrogateExchange])
def test_what_is_accepted_by_auxiliary_draws_promises_no_proposal_density(kind):
    """A ratio with noise of its own is not that of two densities, point by point."""
    assert not issubclass(kind, MetropolisKernel)


def test_auxiliary_draws_of_other_kernels_are_not_taken():
    with pytest.raises(TypeError, match="auxiliary"):
        HMC(one_lattice, auxiliary=ExactDraws())


def test_data_off_the_support_are_refused():
    """Zeros and ones where spins are -1 and 1 would give a posterior of something else."""
    with pytest.raises(ValueError, match="16 of 16 data of EBM site 'x' lie outside|1 of 1 data"):
        run(Exchange(one_lattice), torch.zeros(4, 4), num_chains=4)
