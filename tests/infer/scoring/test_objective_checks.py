"""What an objective refuses, and in which words; and what it must let pass."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule
from torch import nn

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.energies import GaussianEnergy
from pyro_ebm.errors import NonFiniteEnergyError, UnregisteredParameterError
from pyro_ebm.infer import KALE, NCE, DonskerVaradhan, EnergyDiscrepancy, RankingNCE, fit
from pyro_ebm.infer.likelihood.contrastive_divergence import ContrastiveDivergence
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.noise.conditional_nce import ConditionalNCE
from pyro_ebm.poutine import surrogate

ALL = [NCE, RankingNCE, KALE, DonskerVaradhan, EnergyDiscrepancy]
ONE_LOG_Z = [NCE, KALE, DonskerVaradhan]
STANDARD = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def no_guide(*args):
    return None


def loss_of(objective, ebm, x, guide=no_guide):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    return objective.differentiable_loss(model, guide, x)


def quadratic(**options):
    return EnergyDistribution(lambda x: 0.5 * x**2, **(options or {"base": STANDARD}))


# --- conditional models


def regression(context, slope, **options):
    """x given context: E = -slope context x on a standard normal, log Z = (slope context)^2 / 2."""
    base = STANDARD.expand([len(context)])
    return EnergyDistribution(lambda x: -slope * context * x, base=base, **options)


def paired(num):
    context = torch.randn(num)
    return context, context + torch.randn(num)


@pytest.mark.parametrize("make", ONE_LOG_Z)
def test_one_log_z_for_unlike_rows_is_refused(make):
    context, x = paired(20)
    message = r"site 'x' depends on row-wise values.*RankingNCE.*conditional=False if this is wrong"
    with pytest.raises(ValueError, match=message):
        loss_of(make(), regression(context, 0.5), x)


@pytest.mark.parametrize("make", ONE_LOG_Z)
def test_a_weak_dependence_is_refused_too(make):
    """Permuting the rows changes no energy by more than a tenth of its value."""
    context, x = torch.linspace(-1.0, 1.0, 20), torch.randn(20)
    ebm = regression(context, 0.05)
    value, moved = (ebm.unnormalized_log_prob(rows) for rows in (x, x.roll(1)))
    assert ((moved - value.roll(1)) / value.roll(1)).abs().max() < 0.1
    with pytest.raises(ValueError, match="depends on row-wise values"):
        loss_of(make(), ebm, x)


@pytest.mark.parametrize("make", [RankingNCE, EnergyDiscrepancy])
def test_objectives_without_log_z_take_conditional_models(make):
    context, x = paired(20)
    assert loss_of(make(), regression(context, 0.5), x).isfinite()


@pytest.mark.parametrize("make", ONE_LOG_Z)
def test_the_user_has_the_last_word(make):
    context, x = paired(20)
    assert loss_of(make(), regression(context, 0.5, conditional=False), x).isfinite()
    with pytest.raises(ValueError, match="depends on row-wise values"):
        loss_of(make(), quadratic(base=STANDARD, conditional=True), x)


@pytest.mark.parametrize("make", ONE_LOG_Z)
def test_rows_of_a_batch_shape_are_told_apart(make):
    """A parameter for every group is a log Z for every group."""
    scale = torch.tensor([[1.0], [2.0]])

    def model(x):
        with pyro.plate("groups", 2, dim=-2), pyro.plate("rows", 5, dim=-1):
            base = STANDARD.expand([2, 5])
            pyro.sample("x", EnergyDistribution(lambda x: scale * x**2, base=base), obs=x)

    with pytest.raises(ValueError, match="depends on row-wise values"):
        make().differentiable_loss(model, no_guide, torch.randn(2, 5))


@pytest.mark.parametrize("make", ONE_LOG_Z)
def test_a_row_wise_base_is_conditional_too(make):
    base = dist.Normal(torch.arange(6.0), 1.0)
    with pytest.raises(ValueError, match="depends on row-wise values"):
        loss_of(make(), EnergyDistribution(lambda x: 0.1 * x**2, base=base), torch.randn(6))


def test_a_model_that_becomes_conditional_is_caught():
    """At slope 0 nothing can be seen; the question is asked again while the slope grows."""
    context, x = paired(200)

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", regression(context, slope), obs=x)

    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.05}), loss=NCE())
    svi.step(x)
    with pytest.raises(ValueError, match="depends on row-wise values"):
        svi.step(x)


def slope_learned(objective, num, **options):
    context, x = paired(num)
    log_normalizer = options.pop("log_normalizer", None)

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        known = log_normalizer(slope * context) if log_normalizer else None
        ebm = regression(context, slope, log_normalizer=known, **options)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98})
    svi = SVI(model, no_guide, optim, loss=objective)
    for _ in range(150):
        svi.step(x)
    return pyro.param("slope").item()


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (RankingNCE(num_noise=5), {}),
        (EnergyDiscrepancy(num_negatives=5), {}),
        (NCE(num_noise=5), {"log_normalizer": lambda m: lambda: 0.5 * m**2}),
        (NCE(num_noise=5), {"log_normalizer": lambda m: 0.5 * m**2}),
        pytest.param(
            KALE(num_base=10_000),
            {"log_normalizer": lambda m: lambda: 0.5 * m**2},
            marks=pytest.mark.filterwarnings("ignore:KALE .* effective sample size"),
        ),
    ],
    ids=["ranking", "ed", "nce, function", "nce, tensor", "kale"],
)
def test_slope_of_a_regression(objective, options):
    """The truth is 1; five standard errors of 2000 rows with learning noise are 0.15."""
    assert slope_learned(objective, 2000, **options) == pytest.approx(1.0, abs=0.15)


def test_one_log_z_bends_the_slope():
    """Why it is refused: with one c the slope of the same data is far from 1."""
    assert slope_learned(NCE(num_noise=5), 2000, conditional=False) < 0.8


def test_log_z_learned_as_a_function_of_the_context():
    """A module of the context takes the place of the scalar, and learns log Z(context) = context^2
    / 2.
    """
    context, x = paired(2000)
    shape = nn.Parameter(torch.zeros(2))

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        coefficients = pyro.param("shape", shape)
        features = torch.stack([torch.ones_like(context), context**2])
        ebm = regression(context, slope, log_normalizer=coefficients @ features)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.985})
    svi = SVI(model, no_guide, optim, loss=NCE(num_noise=5))
    for _ in range(250):
        svi.step(x)
    assert pyro.param("slope").item() == pytest.approx(1.0, abs=0.15)
    torch.testing.assert_close(shape.detach(), torch.tensor([0.0, 0.5]), rtol=0, atol=0.15)


# --- parameters nobody moves


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.slope * x


def test_an_unregistered_module_is_named():
    ebm = EnergyDistribution(Net(), base=STANDARD)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    for make in ALL:
        svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=make())
        with pytest.raises(
            UnregisteredParameterError, match=r"'x'.*'slope'.*pyro\.module\('energy'"
        ):
            svi.step(torch.randn(5))
        with pytest.raises(UnregisteredParameterError, match="'slope'"):
            fit(model, torch.randn(5), make(), num_steps=1, disable_progbar=True)
        assert make()(model, no_guide)(
            torch.randn(5)
        ).requires_grad  # a torch loop is its own master


class Registered(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[Net]()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(self.net, base=STANDARD), obs=x)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("how", ["pyro.module", "PyroModule", "frozen", "nothing to train"])
def test_registered_or_frozen_energies_pass(make, how):
    net = Net()
    if how == "frozen":
        net.requires_grad_(False)

    def model(x):
        if how == "pyro.module":
            pyro.module("net", net)
        energy = torch.cos if how == "nothing to train" else net
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(energy, base=STANDARD), obs=x)

    target = Registered() if how == "PyroModule" else model
    svi = SVI(target, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=make())
    assert math.isfinite(svi.step(torch.randn(5)))


def test_the_penaltys_points_are_nobodys_parameters():
    def model(x):
        net = pyro.module("net", Net())
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: net(x) ** 2, base=STANDARD), obs=x)

    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=KALE(gradient_penalty=0.1))
    svi.step(torch.randn(5))


# --- numbers that are not finite


@pytest.mark.parametrize("make", ALL)
@pytest.mark.filterwarnings("ignore:Encountered (NaN|inf)")
def test_nan_energies_name_the_site(make):
    ebm = EnergyDistribution(lambda x: (x - 100.0).log(), base=STANDARD)
    with pytest.raises(NonFiniteEnergyError, match="site 'x'.*not finite in 7 of 7 rows at step 0"):
        loss_of(make(), ebm, torch.randn(7))


@pytest.mark.parametrize("make", ALL)
@pytest.mark.filterwarnings("ignore:Encountered inf")
def test_an_infinite_energy_at_one_datum_names_the_site(make):
    ebm = EnergyDistribution(lambda x: torch.where(x == 0.5, torch.inf, 0.1 * x**2), base=STANDARD)
    x = torch.tensor([0.1, 0.5, -1.0])
    with pytest.raises(NonFiniteEnergyError, match="site 'x'.*not finite in 1 of 3 rows at step 0"):
        loss_of(make(), ebm, x)


@pytest.mark.filterwarnings("ignore:Encountered (NaN|inf)")
def test_the_step_is_counted():
    net = Net()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: net(x) + 0 * x.log().detach(), base=STANDARD)
            pyro.sample("x", ebm, obs=x)

    objective = EnergyDiscrepancy(time=1e-8)
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=objective)
    for _ in range(3):
        svi.step(torch.full((4,), 50.0))
    with pytest.raises(NonFiniteEnergyError, match="in 1 of 4 rows at step 3"):
        svi.step(torch.tensor([50.0, 50.0, -50.0, 50.0]))


@pytest.mark.parametrize("make", ALL)
def test_masked_rows_may_be_nan(make):
    """Neither the loss nor its gradient sees them: zero times the gradient of NaN would be NaN."""
    a = torch.tensor(1.5, requires_grad=True)
    positive = dist.LogNormal(torch.tensor(0.0), 1.0)
    x = torch.tensor([1.0, float("nan"), 2.0, -3.0])
    mask = torch.tensor([True, False, True, False])

    def model(x):
        base = positive.expand([4])
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            pyro.sample("x", EnergyDistribution(lambda x: a * x.log() ** 2, base=base), obs=x)

    loss = make().differentiable_loss(model, no_guide, x)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, a)[0].isfinite()


@pytest.mark.parametrize("make", ALL)
def test_all_rows_may_be_masked(make):
    x = torch.randn(4)

    def model(x):
        with pyro.plate("data", 4), poutine.mask(mask=torch.zeros(4, dtype=torch.bool)):
            pyro.sample("x", quadratic(), obs=x)

    assert make().differentiable_loss(model, no_guide, x).item() == 0.0


# --- contrasts


def held(law):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law)

    return guide


@pytest.mark.parametrize("make", [NCE, RankingNCE, KALE, DonskerVaradhan])
def test_no_contrast(make):
    message = "has no contrast for .*give the distribution a base=, let the guide hold one"
    with pytest.raises(ValueError, match=message):
        loss_of(make(), quadratic(event_shape=()), torch.randn(5))


@pytest.mark.parametrize("make", [NCE, RankingNCE, KALE, DonskerVaradhan])
@pytest.mark.parametrize("law", [dist.Uniform(-9.0, 9.0), dist.LogNormal(0.0, 1.0)])
def test_contrast_on_another_support(make, law):
    with pytest.raises(ValueError, match=r"lives on .*, the EBM on Real\(\): their supports"):
        loss_of(make(), quadratic(event_shape=()), torch.randn(5), guide=held(law))


@pytest.mark.parametrize("make", ALL)
def test_contrast_of_other_events(make):
    ebm = EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,))
    with pytest.raises(ValueError, match=r"has event_shape \(\).*\(2,\)"):
        loss_of(make(), ebm, torch.randn(5, 2), guide=held(dist.Normal(0.0, 1.0)))


@pytest.mark.parametrize("make", [NCE, RankingNCE, KALE, DonskerVaradhan])
def test_unnormalized_contrast(make):
    guide = held(quadratic(event_shape=()))
    with pytest.raises(ValueError, match="needs a normalized contrast, got EnergyDistribution"):
        loss_of(make(), quadratic(event_shape=()), torch.randn(5), guide=guide)


@pytest.mark.parametrize("make", [NCE, RankingNCE, KALE, DonskerVaradhan])
def test_an_energy_that_knows_its_log_z_may_be_the_contrast(make):
    guide = held(EnergyDistribution(GaussianEnergy(torch.tensor(0.0), 2.0)))
    assert loss_of(make(), quadratic(event_shape=()), torch.randn(5), guide=guide).isfinite()


@pytest.mark.parametrize("make", [NCE, RankingNCE, KALE, DonskerVaradhan])
def test_masked_contrast(make):
    """A mask on the guide's site is not a statement about the noise."""
    guide = held(dist.Normal(0.0, 1.0).mask(False))
    assert loss_of(make(), quadratic(event_shape=()), torch.randn(5), guide=guide).isfinite()


# --- models that do not fit


def test_no_ebm_in_the_model():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", STANDARD, obs=x)

    for make in ALL:
        with pytest.raises(
            ValueError, match=r"no EnergyDistribution site .*pyro\.infer\.Trace_ELBO"
        ):
            make().differentiable_loss(model, no_guide, torch.randn(5))


@pytest.mark.parametrize("make", [NCE, RankingNCE, EnergyDiscrepancy])
def test_objectives_on_densities_refuse_a_gebm(make):
    ebm = GeneralizedEBM(lambda z: 2 * z, STANDARD, lambda x: x**2)
    with pytest.raises(ValueError, match=f"{make.__name__} needs a density.*use KALE or Donsker"):
        loss_of(make(), ebm, torch.randn(5))


@pytest.mark.parametrize("make", ALL)
def test_a_latent_gebm_is_sent_to_its_latent(make):
    def model(x):
        z = pyro.sample("z", GeneralizedEBM(lambda z: 2 * z, STANDARD, lambda x: x**2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", STANDARD)

    with pytest.raises(ValueError, match="'z' is latent: .*LatentReparam"):
        make().differentiable_loss(model, guide, torch.randn(5))


def test_an_unnormalized_variational_factor():
    def model(x):
        z = pyro.sample("z", STANDARD)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: (x - z) ** 2, base=STANDARD), obs=x)

    def guide(x):
        pyro.sample("z", quadratic(event_shape=(), sampler=lambda d, shape: torch.zeros(shape)))

    for make in [RankingNCE, EnergyDiscrepancy]:
        with pytest.raises(ValueError, match="'z' .*: a variational factor must be normalized"):
            make().differentiable_loss(model, guide, torch.randn(5))


def test_a_normalized_energy_as_variational_factor():
    def model(x):
        z = pyro.sample("z", STANDARD)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: (x - z) ** 2, base=STANDARD), obs=x)

    def guide(x):
        pyro.sample("z", EnergyDistribution(GaussianEnergy(torch.tensor(0.0), 1.0)))

    assert RankingNCE().differentiable_loss(model, guide, torch.randn(5)).isfinite()


@pytest.mark.parametrize("make", ALL)
def test_enumerated_sites(make):
    scales = torch.tensor([0.5, 2.0])

    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: scales[k] * x**2, base=STANDARD)
            pyro.sample("x", ebm, obs=x)

    def guide(x, **options):
        pyro.sample("k", dist.Categorical(torch.ones(2)), **options)

    def enumerating(x):
        guide(x, infer={"enumerate": "parallel"})

    for given in (no_guide, enumerating):
        with pytest.raises(NotImplementedError, match="'k' is enumerated"):
            make().differentiable_loss(model, given, torch.randn(5))
    assert make().differentiable_loss(model, guide, torch.randn(5)).isfinite()


def test_discrete_data():
    """Histograms and counts have no gradient in x, and need none, but for energy discrepancy."""
    table = torch.zeros(4, requires_grad=True)
    ebm = EnergyDistribution(lambda x: table[x], base=dist.Categorical(torch.ones(4)))
    x = torch.tensor([0, 1, 2, 2])
    for make in [NCE, RankingNCE, KALE, DonskerVaradhan]:
        loss = loss_of(make(), ebm, x)
        assert torch.autograd.grad(loss, table)[0].abs().max() > 0
    with pytest.raises(NotImplementedError, match="perturbs continuous data"):
        loss_of(EnergyDiscrepancy(), ebm, x)
    counts = EnergyDistribution(lambda x: table[x.long().clamp(max=3)], base=dist.Poisson(2.0))
    assert loss_of(NCE(), counts, torch.tensor([0.0, 3.0])).isfinite()


@pytest.mark.parametrize("make", ALL)
def test_an_energy_cut_off_from_x(make):
    ebm = EnergyDistribution(lambda x: x.detach() ** 2, base=STANDARD)
    with pytest.raises(ValueError, match="'x': the energy does not depend on x"):
        loss_of(make(), ebm, torch.randn(5))


@pytest.mark.parametrize("make", ALL)
def test_batch_dims_without_a_plate(make):
    """As under Pyro's own ELBOs: an undeclared batch dim is a sentence, not a sum."""

    def model(x):
        pyro.sample("x", quadratic(base=STANDARD.expand([5])), obs=x)

    with pytest.raises(ValueError, match="invalid log_prob shape"):
        make().differentiable_loss(model, no_guide, torch.randn(5))


@pytest.mark.parametrize(
    "make", [*ALL, ContrastiveDivergence, PersistentContrastiveDivergence, ConditionalNCE]
)
def test_integer_data_on_a_continuous_support(make):
    """Otherwise noise is refused by torch, or the integers are taken for measurements."""
    message = r"data of EBM site 'x' as points of Real\(\).*floating point, got torch.int64"
    with pytest.raises(ValueError, match=message):
        loss_of(make(), quadratic(), torch.tensor([0, 1, 2, 2]))


# --- guides


def test_effect_style_guides():
    """They run the model themselves, so they are built on its surrogate."""

    def model(x):
        z = pyro.sample("z", STANDARD)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: (x - z) ** 2, base=STANDARD), obs=x)

    x = torch.randn(5)
    for make in [RankingNCE, EnergyDiscrepancy]:
        with pytest.raises(
            TypeError, match=r"AutoNormalMessenger is an effect-style guide.*surrogate"
        ):
            make().differentiable_loss(model, AutoNormalMessenger(model), x)
        scored = surrogate(model, make())
        loss = Trace_ELBO().differentiable_loss(scored, AutoNormalMessenger(scored), x)
        assert loss.isfinite()
        pyro.clear_param_store()


def with_latent(log_normalizer=None):
    def model(x):
        z = pyro.sample("z", STANDARD)
        known = None if log_normalizer is None else lambda: log_normalizer(z)
        ebm = EnergyDistribution(
            lambda x: 0.1 * (x - z) ** 2,
            base=STANDARD,
            conditional=False,
            log_normalizer=known,
        )
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    return model


def log_z_of_shift(z):
    """Log Z of 0.1 (x - z)^2 under a standard normal."""
    return -0.5 * math.log(1.2) - 0.1 * z**2 / 1.2


@pytest.mark.filterwarnings("ignore:.*as it was made is no likelihood")
@pytest.mark.parametrize("make", ALL)
def test_automatic_guides_on_the_raw_model(make):
    model = with_latent(log_z_of_shift)

    x, values = torch.randn(5), []
    for target in (model, surrogate(model, make())):
        pyro.clear_param_store()
        guide = AutoNormal(target)
        pyro.set_rng_seed(0)
        guide(x)
        pyro.set_rng_seed(1)
        values.append(make().differentiable_loss(model, guide, x).item())
    assert values[0] == values[1]


def test_dtypes_of_the_data_are_kept():
    for dtype in (torch.float32, torch.float64):
        a = torch.tensor(1.0, dtype=dtype, requires_grad=True)
        base = dist.Normal(torch.tensor(0.0, dtype=dtype), torch.tensor(1.0, dtype=dtype))
        ebm = EnergyDistribution(lambda x, a=a: a * x**2, base=base)
        for make in ALL:
            objective = make()
            loss = loss_of(objective, ebm, torch.randn(5, dtype=dtype))
            assert loss.dtype == dtype
            assert all(c.dtype == dtype for c in objective.log_normalizers.values())
