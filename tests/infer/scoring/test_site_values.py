"""Values that no objective can learn from are refused in one sentence, whatever validates them."""

from __future__ import annotations

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS, SVI
from torch import nn
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import EnergyShapeError, NonFiniteEnergyError
from pyro_ebm.infer.bayes.generalized_bayes import generalized_posterior
from pyro_ebm.infer.discrepancy.discrete_energy_discrepancy import DiscreteEnergyDiscrepancy
from pyro_ebm.infer.discrepancy.energy_discrepancy import EnergyDiscrepancy
from pyro_ebm.infer.discrepancy.perturbations import GaussianNoise, MixedColumns
from pyro_ebm.infer.discrepancy.site_perturbations import HeatKernel
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.divergences.kale import KALE
from pyro_ebm.infer.divergences.mmd import MMD
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.noise.conditional_nce import ConditionalNCE
from pyro_ebm.infer.noise.nce import NCE, RankingNCE
from pyro_ebm.infer.noise.telescoping import BridgeEnergy, TelescopingNCE
from pyro_ebm.infer.score.denoising import DenoisingScoreMatching
from pyro_ebm.infer.score.kernel_stein import KernelStein
from pyro_ebm.infer.score.recovery_likelihood import RecoveryLikelihood
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.score.sliced import SlicedScoreMatching
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.infer.training.fit import fit
from pyro_ebm.poutine.surrogate import surrogate

STANDARD = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
OBJECTIVES = {
    "nce": NCE,
    "nce, fitted noise": lambda: NCE(noise="gaussian"),
    "ranking": RankingNCE,
    "kale": KALE,
    "cd": ContrastiveDivergence,
    "pcd": PersistentContrastiveDivergence,
    "score matching": ScoreMatching,
    "ed": EnergyDiscrepancy,
    "per site": lambda: PerSite({"x": ScoreMatching()}),
}


def no_guide(*args):
    return None


def model_of(energy):
    def model(x):
        a = pyro.param("a", torch.tensor(2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: a * energy(x), base=STANDARD), obs=x)

    return model


MODEL = model_of(lambda x: 0.5 * x**2)


# --- a site that nobody gives a value


def forgotten(x):
    """The data enter nothing."""
    a = pyro.param("a", torch.tensor(2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", EnergyDistribution(lambda x: 0.5 * a * x**2, base=STANDARD))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_obs_forgotten(name):
    with pytest.raises(ValueError, match="'x' is neither observed nor in the guide.*pass obs="):
        OBJECTIVES[name]().differentiable_loss(forgotten, no_guide, torch.randn(8))


def test_a_guide_for_another_site_does_not_help():
    def guide(x):
        pyro.sample("z", STANDARD)

    with pytest.raises(ValueError, match="give the guide a sample site of this name"):
        NCE()(forgotten, guide)(torch.randn(8))


@pytest.mark.parametrize("name", ["nce", "kale", "cd", "score matching"])
def test_a_prior_with_a_guide_is_learned(name):
    """And so is a site whose value is given by a condition."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.3, 0.5))

    pyro.set_rng_seed(0)
    for model, held in (
        (forgotten, guide),
        (poutine.condition(forgotten, {"x": -1.0 * torch.ones(8)}), no_guide),
    ):
        pyro.clear_param_store()
        OBJECTIVES[name]().loss_and_grads(model, held, torch.randn(8))
        assert pyro.param("a").grad.abs() > 1e-6


# --- data that are not finite


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_are_not_finite(name, validates, bad):
    """One line, without the table of shapes that Pyro adds to errors of a log density."""
    x = torch.randn(8)
    x[[2, 5]] = bad
    with (
        pyro.validation_enabled(validates),
        pytest.raises(ValueError, match="EBM site 'x'") as error,
    ):
        OBJECTIVES[name]().differentiable_loss(MODEL, no_guide, x)
    assert str(error.value) == (
        "EBM site 'x': 2 of 8 rows of the data are NaN or infinite, not points of the support "
        "Real(): leave these out, or mask them by poutine.mask"
    )


@pytest.mark.parametrize("name", ["nce", "score matching", "ed"])
def test_data_that_are_no_tensor(name):
    with pytest.raises(TypeError, match=r"EBM site 'x': .* got ndarray: give torch.as_tensor"):
        OBJECTIVES[name]().differentiable_loss(MODEL, no_guide, np.zeros(3))


@pytest.mark.parametrize("name", ["nce", "cd", "score matching"])
def test_data_off_the_support(name):
    """Where validation is on, as Pyro has it; in one line as well."""

    def model(x):
        base = dist.Exponential(torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: 0.1 * x**2, base=base), obs=x)

    with pytest.raises(
        ValueError, match="EBM site 'x': 1 of 3 rows of the data are not points"
    ) as e:
        OBJECTIVES[name]().differentiable_loss(model, no_guide, torch.tensor([1.0, -1.0, 2.0]))
    assert len(str(e.value).splitlines()) == 1


def test_rows_are_counted_not_numbers():
    def model(x):
        law = EnergyDistribution(
            lambda x: x.square().sum(-1), base=STANDARD.expand([3]).to_event(1)
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    x = torch.randn(8, 3)
    x[4] = float("nan")
    with pytest.raises(ValueError, match="1 of 8 rows of the data are NaN"):
        NCE().differentiable_loss(model, no_guide, x)


def test_rows_that_are_masked_may_be():
    x = torch.tensor([1.0, float("nan"), 2.0])

    def model(x):
        with poutine.mask(mask=x.isfinite()):
            MODEL(x)

    assert NCE().differentiable_loss(model, no_guide, x).isfinite()


def test_under_fit():
    x = torch.randn(20)
    x[7] = float("nan")
    options = {"batch_size": 4, "num_steps": 5, "disable_progbar": True}
    with pytest.raises(ValueError, match="1 of 4 rows of the data are NaN"):
        fit(MODEL, x, NCE(), **options)


# --- dtypes of the data


def network_model(dtype):
    """With a base of the network's dtype, and a network that takes no other."""
    network = nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 1), nn.Flatten(-2))
    network.to(dtype)
    base = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(network, base=base), obs=x)

    return model


@pytest.mark.parametrize("name", OBJECTIVES)
def test_data_in_the_digits_of_numpy(name):
    """Arrays are double precision, networks usually single."""
    for has, takes in itertools.permutations((torch.float32, torch.float64)):
        remedy = rf"x.to\({takes}\), or network.to\({has}\)"
        message = f"EBM site 'x': the data are {has} and the energy takes {takes}: call {remedy}"
        objective, data = OBJECTIVES[name](), np.zeros((4, 2), str(has)[6:])
        with pytest.raises(TypeError, match=message):
            fit(network_model(takes), data, objective, num_steps=1, disable_progbar=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integers_are_to_become_what_the_network_takes(dtype):
    with pytest.raises(ValueError, match=f"got torch.int64: call x.to\\({dtype}\\) if the data"):
        NCE().differentiable_loss(network_model(dtype), no_guide, torch.ones(4, 2).long())


def test_what_fails_in_every_dtype_says_why_itself():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        NCE().differentiable_loss(model_of(nn.Linear(3, 1)), no_guide, torch.randn(4))


# --- shapes of energies


@pytest.mark.parametrize("name", OBJECTIVES)
def test_energies_with_a_dim_in_front(name):
    """(1, 8) for (8,): draws beside the rows would be taken for the data."""
    message = r"EBM site 'x': energy returned shape \(1, 8\) for input \(8,\); expected \(8,\)"
    with pytest.raises(EnergyShapeError, match=message):
        OBJECTIVES[name]().differentiable_loss(
            model_of(lambda x: (x**2).unsqueeze(0)), no_guide, torch.randn(8)
        )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_energies_with_a_dim_behind(name):
    message = r"energy returned shape \(8, 1\) for input \(8,\).*Did you forget .squeeze\(-1\)"
    with pytest.raises(EnergyShapeError, match=message):
        OBJECTIVES[name]().differentiable_loss(
            model_of(lambda x: (x**2).unsqueeze(-1)), no_guide, torch.randn(8)
        )


def test_energies_of_bits_with_a_dim_in_front():
    def model(x):
        law = EnergyDistribution(
            lambda x: x.sum(-1)[None], event_shape=(3,), support=constraints.boolean
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    with pytest.raises(EnergyShapeError, match=r"shape \(1, 5\) for input \(5, 3\)"):
        PseudoLikelihood().differentiable_loss(model, no_guide, torch.ones(5, 3))


def test_nan_is_told_when_an_objective_is_frozen():
    def model(x):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", EnergyDistribution(lambda y: 0.5 * a * y**2, event_shape=()), obs=x)

    with pytest.raises(ValueError, match="1 of 3 rows of the data are NaN or infinite"):
        NCE(2, dist.Normal(0.0, 1.0)).freeze(model, torch.tensor([0.0, float("nan"), 1.0]))


@pytest.mark.parametrize(
    "make",
    [
        ScoreMatching,
        SlicedScoreMatching,
        lambda: DenoisingScoreMatching(0.1),
        KernelStein,
        ConditionalNCE,
        lambda: TelescopingNCE(1),
    ],
)
def test_data_on_the_border_have_no_coordinates(make):
    """Exact zeros are points of the support, and minus infinity in its coordinates."""
    energy = BridgeEnergy(lambda x: 0.5 * x.unsqueeze(-1), 1)

    def model(x):
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(energy, dist.Exponential(1.0)), obs=x)

    x = torch.rand(20) + 0.1
    assert make().differentiable_loss(model, no_guide, x).isfinite()
    message = f"2 of 20 rows of the data lie on the border .*{type(make()).__name__} takes"
    with pytest.raises(ValueError, match=message):
        make().differentiable_loss(model, no_guide, torch.cat([x[:18], torch.zeros(2)]))
    assert NCE().differentiable_loss(model, no_guide, torch.cat([x, torch.zeros(2)])).isfinite()


TAKES_COORDINATES = {
    "score matching": ScoreMatching,
    "hutchinson": lambda: ScoreMatching(trace="hutchinson"),
    "sliced": SlicedScoreMatching,
    "denoising": lambda: DenoisingScoreMatching(0.1),
    "kernel stein": KernelStein,
    "recovery": lambda: RecoveryLikelihood(0.5, num_steps=2),
    "ed": EnergyDiscrepancy,
    "conditional nce": ConditionalNCE,
    "telescoping": lambda: TelescopingNCE(1, dist.Beta(1.0, 1.0)),
    "per site": lambda: PerSite({"x": DenoisingScoreMatching(0.1)}),
}


def proportions(x, mask=None):
    energy = BridgeEnergy(lambda x: 0.5 * x.unsqueeze(-1), 1)
    law = EnergyDistribution(energy, event_shape=(), support=constraints.unit_interval)
    pyro.module("energy", energy)
    with pyro.plate("data", len(x)), poutine.mask(mask=True if mask is None else mask):
        pyro.sample("x", law, obs=x)


@pytest.mark.parametrize("name", TAKES_COORDINATES)
def test_data_at_an_end_whose_coordinate_torch_clamps(name):
    """They would enter at u = 16; what is next to the end is inside, and masked rows are not."""
    objective, x = TAKES_COORDINATES[name](), torch.rand(20)
    x[3] = 1 - 2**-24
    for _ in range(3):  # not at the steps alone at which sites are checked
        assert objective.differentiable_loss(proportions, no_guide, x).isfinite()
    x[:2] = torch.tensor([1.0, 0.0])
    for trained in (objective, TAKES_COORDINATES[name]()):
        with pytest.raises(ValueError, match="2 of 20 rows of the data lie on the border .* NCE"):
            trained.differentiable_loss(proportions, no_guide, x)
    counts = torch.arange(20) >= 2
    assert objective.differentiable_loss(proportions, no_guide, x, counts).isfinite()


def test_a_composition_whose_last_part_is_zero():
    def model(x):
        law = EnergyDistribution(
            lambda x: x.square().sum(-1), event_shape=(3,), support=constraints.simplex
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    x = dist.Dirichlet(torch.ones(3)).sample((20,))
    x[4] = torch.tensor([0.4, 0.6, 0.0])
    with pytest.raises(ValueError, match="1 of 20 rows of the data lie on the border"):
        ScoreMatching().differentiable_loss(model, no_guide, x)


def test_a_proportion_at_its_end_in_a_table():
    support = constraints.cat([constraints.boolean, constraints.unit_interval], -1, [1, 1])

    def model(x):
        law = EnergyDistribution(lambda x: x.sum(-1), event_shape=(2,), support=support)
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    objective = DiscreteEnergyDiscrepancy(MixedColumns(GaussianNoise(1.0), HeatKernel()))
    x = torch.stack([torch.ones(20), torch.rand(20)], -1)
    assert objective.differentiable_loss(model, no_guide, x).isfinite()
    x[7, 1] = 1.0
    with pytest.raises(ValueError, match="1 of 20 rows of the data lie on the border"):
        objective.differentiable_loss(model, no_guide, x)


@pytest.mark.parametrize("name", ["score matching", "kernel stein"])
def test_losses_without_a_contrast_look_at_no_values(name):
    """Scored outside of training they follow vmap, which has none."""
    p = EnergyDistribution(lambda x: x.square(), event_shape=(), support=constraints.unit_interval)
    objective, x = TAKES_COORDINATES[name](), torch.rand(3, 20)
    found = torch.vmap(lambda x: objective.row_losses(p, x))(x)
    torch.testing.assert_close(found[1], objective.row_losses(p, x[1]))


@pytest.mark.parametrize("name", ["score matching", "denoising"])
def test_ends_are_told_before_mcmc(name):
    """By the sandwich's loss, which looks at values once, or by the freezing."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            law = EnergyDistribution(
                lambda x: a * x, event_shape=(), support=constraints.unit_interval
            )
            pyro.sample("x", law, obs=x)

    x = torch.rand(20).index_fill(0, torch.tensor([3]), 1.0)
    with pytest.raises(ValueError, match="1 of 20 rows of the data lie on the border"):
        generalized_posterior(model, x, loss=TAKES_COORDINATES[name](), num_chains=2)


@pytest.mark.parametrize(
    "objective", [NCE(3, dist.Beta(1.0, 1.0)), ContrastiveDivergence()], ids=["nce", "cd"]
)
def test_a_base_without_density_at_data_is_named(objective):
    """torch's Uniform excludes its upper end; energies that overflow are told as such."""

    def model(x, divisor):
        with pyro.plate("data", len(x)):
            base = dist.Uniform(0.0, 1.0)
            pyro.sample("x", EnergyDistribution(lambda x: x / divisor, base=base), obs=x)

    x = torch.cat([torch.ones(2), torch.rand(18)])
    message = "density of the base is not finite in 2 of 20 rows of the data: give a base that"
    with pytest.raises(NonFiniteEnergyError, match=message):
        objective.differentiable_loss(model, no_guide, x, 1.0)
    with pytest.raises(NonFiniteEnergyError, match=r"Look for overflow in the energy|chains ran"):
        objective.differentiable_loss(model, no_guide, x[2:], 0.0)


# --- supports that are inferred


def cut_off(upper):
    """Rows below a bound that moves as ``upper()`` says, in a support made of other ones."""

    def model(x):
        low, high = constraints.greater_than(0.0), constraints.interval(0.0, upper())
        law = EnergyDistribution(
            lambda x: x.sum(-1), event_shape=(2,), support=constraints.cat([low, high], -1, [1, 1])
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    return model


@pytest.mark.parametrize("name", ["cd", "score matching", "ed", "per site"])
def test_bounds_that_are_learned(name):
    """No datum is lost by a wider support, and none lies in it: log Z alone would tell."""
    model, x = cut_off(lambda: pyro.param("hi", torch.tensor(3.0))), torch.rand(8, 2) + 0.1
    with pytest.raises(ValueError, match="the support of EBM site 'x' depends on what is inferred"):
        SVI(model, no_guide, pyro.optim.Adam({}), OBJECTIVES[name]()).step(x)
    held = cut_off(lambda: pyro.param("hi", torch.tensor(3.0)).detach())
    assert OBJECTIVES[name]().differentiable_loss(held, no_guide, x).isfinite()


def test_bounds_that_are_latents():
    """By MCMC, where a loss without noise is scored by tensor operations alone, and frozen."""

    def bounded(x):
        return cut_off(lambda: pyro.sample("hi", dist.Uniform(2.0, 6.0)))(x)

    x = torch.rand(8, 2) + 0.1
    for run in (
        lambda: NUTS(surrogate(bounded, ScoreMatching())).setup(1, x),
        lambda: generalized_posterior(bounded, x, loss=ScoreMatching()),
        lambda: SlicedScoreMatching().freeze(bounded, x),
    ):
        with pytest.raises(ValueError, match="'x' depends on what is inferred, and .*: detach its"):
            run()


def test_a_law_that_draws_may_learn_its_bounds():
    """MMD compares draws with data, and KALE's second player may be the base."""

    def model(x):
        base = dist.Uniform(0.0, pyro.param("hi", torch.tensor(3.0)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: 0.5 * x**2, base=base), obs=x)

    for objective in (MMD(), KALE(schedule=(1, 1))):
        assert objective.differentiable_loss(model, no_guide, torch.rand(8)).isfinite()
