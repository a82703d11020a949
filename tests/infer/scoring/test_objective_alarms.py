"""Silent ways to learn nothing, or something else: each is told in words."""

from __future__ import annotations

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import KALE, NCE, DonskerVaradhan, EnergyDiscrepancy, RankingNCE, fit
from pyro_ebm.infer.divergences.self_normalized import SelfNormalized
from pyro_ebm.infer.likelihood.persistent import PersistentContrastiveDivergence
from pyro_ebm.infer.scoring.conditional import depends_on_rows
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.infer.scoring.separation import Separation
from pyro_ebm.poutine import surrogate

ONE_LOG_Z = {"nce": NCE, "kale": partial(KALE, 64), "dv": partial(DonskerVaradhan, 64)}
STANDARD = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def no_guide(*args):
    return None


# --- comparisons that teach nothing


def test_an_energy_that_ignores_x_is_told():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: 0.0 * x, base=STANDARD), obs=x)

    with pytest.warns(SurrogateWarning, match="Does it use x?"):
        NCE().differentiable_loss(model, no_guide, torch.randn(5))


def train(objective, model, data, steps):
    optimizer = pyro.optim.Adam({"lr": 0.1})
    svi = pyro.infer.SVI(model, no_guide, optimizer, objective)
    for _ in range(steps):
        svi.step(data)


def located(base):
    """The unit normal energy at a trained place, on top of a base."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: 0.5 * (x - loc) ** 2, base, event_shape=())
            pyro.sample("x", ebm, obs=x)

    return model


@pytest.mark.parametrize("make", [NCE, RankingNCE, SelfNormalized])
def test_noise_that_does_not_cover_the_data_is_told_at_once(make):
    """Noise of a third of the data's spread: a third of the data lie beyond 500 draws of it."""
    data = torch.randn(50)
    loss = make(10, noise=dist.Normal(0.0, 1 / 3)).differentiable_loss
    with pytest.warns(SurrogateWarning, match=r"noise does not cover the data: [2-4]\d% of them"):
        loss(located(STANDARD), no_guide, data)


@pytest.mark.parametrize("make", [NCE, RankingNCE, SelfNormalized])
def test_one_noise_draw_per_row_tells_noise_that_does_not_cover(make):
    """Of 64 rows four sds off at least 20 lie beyond 64 draws: 2^-20 of the chance of noise."""
    data = 4.0 + torch.randn(64)
    loss = make(1, noise=dist.Normal(0.0, 1.5)).differentiable_loss
    with pytest.warns(SurrogateWarning, match=r"noise does not cover the data"):
        loss(located(STANDARD), no_guide, data)


def test_noise_of_the_data_is_seldom_told():
    """Of 64 rows and 64 draws of one law: by chance once in 10^4 batches, here in none of 1000."""
    objective = RankingNCE(1, noise=STANDARD)
    for _ in range(1000):
        objective.differentiable_loss(located(STANDARD), no_guide, torch.randn(64))
        objective._checked.clear()


@pytest.mark.parametrize("make", [NCE, RankingNCE, SelfNormalized])
def test_noise_that_covers_the_data_is_not_told(make):
    """As wide as the data, or one level for all states; and where there are too few to say."""
    for draws, sd, num_rows in ((10, 1.0, 50), (1, 1.0, 64), (1, 0.1, 6)):
        objective = make(draws, noise=dist.Normal(0.0, sd))
        objective.differentiable_loss(located(STANDARD), no_guide, torch.randn(num_rows))

    def model(x):
        weight = pyro.param("weight", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            base = dist.Bernoulli(torch.full((3,), 0.5)).to_event(1)
            pyro.sample("x", EnergyDistribution(lambda x: weight * x.sum(-1), base), obs=x)

    make(10).differentiable_loss(model, no_guide, torch.ones(50, 3))


@pytest.mark.parametrize("make", [NCE, RankingNCE])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_truth_values_and_counts_have_noise(make, dtype):
    """They give the losses of the same data in floating point."""
    probs = torch.full((3,), 0.4)
    data = torch.bernoulli(probs.expand(40, 3))

    def model(x):
        with pyro.plate("data", len(x)):
            base = dist.Bernoulli(probs).to_event(1)
            energy = EnergyDistribution(lambda x: 0.3 * x.float().sum(-1), base, conditional=False)
            pyro.sample("x", energy, obs=x)

    losses = []
    for values in (data, data.to(dtype)):
        pyro.set_rng_seed(0)
        losses.append(make(5).differentiable_loss(model, no_guide, values))
    assert torch.equal(losses[0], losses[1])


@pytest.mark.filterwarnings("ignore:.*noise does not cover the data")
def test_noise_far_from_the_data_is_told():
    objective = NCE(noise=dist.Normal(60.0, 1.0))
    with pytest.warns(SurrogateWarning, match="told apart without error"):
        train(objective, located(STANDARD), torch.randn(50), 140)


@pytest.mark.parametrize("objective", [RankingNCE(5), EnergyDiscrepancy(0.5)])
def test_few_rows_that_are_told_right_are_no_alarm(objective):
    """At the mode all contrasts have more energy: of 30 rows it says little, of 120 enough."""
    for step, num_rows in ((128, 1), (256, 30)):
        objective.num_steps_taken.fill_(step)
        objective.differentiable_loss(located(STANDARD), no_guide, torch.zeros(num_rows))
    objective.num_steps_taken.fill_(512)
    with pytest.warns(SurrogateWarning, match="step 512: data and contrast are told apart"):
        objective.differentiable_loss(located(STANDARD), no_guide, torch.zeros(120))


@pytest.mark.parametrize("capture", [False, True])
def test_rows_that_are_all_told_right_are_an_alarm(capture):
    """One at a time, a hundred in a row; replayed steps count."""
    options = {"batch_size": 1, "num_steps": 130, "lr": 1e-9, "capture": capture}
    with pytest.warns(SurrogateWarning, match="step 128: data and contrast are told apart"):
        fit(located(STANDARD), torch.zeros(9), RankingNCE(1), disable_progbar=True, **options)


def test_separation_asks_the_newest_rows_of_each_comparison():
    """120 rows in three steps of 40, of which the oldest falls out at the fourth."""
    separation = Separation()
    for first, second in ((0.9, 1.0), (1.0, 0.8), (1.0, 1.0)):
        notes = {"accuracy": first, "accuracy_1": first, "accuracy_2": second}
        separation.see({name: torch.tensor(value) for name, value in notes.items()}, 40)
    assert not separation.is_complete()
    separation.see({"accuracy_1": torch.ones(()), "accuracy_2": torch.zeros(())}, 40)
    assert (separation.num_rows, separation.is_complete()) == (120, True)
    separation.see({"log_z": torch.ones(())}, 40)
    assert separation.num_rows == 120


@pytest.mark.filterwarnings("ignore:.*noise does not cover the data")
def test_noise_that_does_not_cover_the_model_is_told():
    """At the edge of the data and narrow: some are taken for noise, but log Z hangs on its tail."""
    objective = NCE(noise=dist.Normal(2.0, 0.2))
    with pytest.warns(SurrogateWarning, match="noise does not cover the model"):
        train(objective, located(STANDARD), torch.randn(2000), 140)


def test_weights_that_are_worth_few_draws_are_told():
    """Data where the base has no mass: the weights fall on the draw that is nearest to it."""
    data = 9.0 + 0.01 * torch.randn(400)
    with pytest.warns(SurrogateWarning, match="effective sample size of the base draws"):
        train(DonskerVaradhan(), tilted(STANDARD), data, 140)


def settled(objective, data, *slopes):
    """As many steps as are judged together, of which the last is looked at."""
    objective.num_steps_taken.fill_(129 - len(slopes))
    for slope in slopes:
        pyro.get_param_store()["slope"] = torch.tensor(slope)
        objective.differentiable_loss(tilted(STANDARD), no_guide, data)


def test_weights_that_are_worth_few_of_64_draws_are_told():
    """A tilt by 4 makes weights of relative variance e^16: two draws or so count."""
    with pytest.warns(SurrogateWarning, match=r"step 128: the effective .* is [12]\.\d of 64"):
        settled(DonskerVaradhan(), 4.0 + torch.randn(64), *[4.0] * 16)


@pytest.mark.parametrize("make", [KALE, DonskerVaradhan])
def test_one_batch_of_poor_weights_is_no_alarm(make):
    """Tilted by 1.2 about 17 of 64 weights count, and in the last of 16 steps a single one."""
    objective = make()
    settled(objective, 1.2 + torch.randn(64), *[1.2] * 15, 9.0)
    assert 64 * objective.diagnostics["x"]["weight_ess"] < 2


@pytest.mark.parametrize("make", [KALE, DonskerVaradhan])
@pytest.mark.parametrize("far", [False, True])
def test_a_bound_that_base_draws_cannot_support_is_told(make, far, recwarn):
    """The energy falls between base draws and data, by more than 64 draws can tell, or by less.

    A step of h nats at 4 leaves all weights alike, so that the bound is h of any number of draws.
    """
    height = 9.0 if far else 6.0

    def model(x):
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: -height * scale * (20 * (x - 7)).sigmoid(), STANDARD)
            pyro.sample("x", ebm, obs=x)

    objective = make()
    objective.num_steps_taken.fill_(128)
    objective.differentiable_loss(model, no_guide, 10.0 + 0.1 * torch.randn(64))
    told = [str(w.message) for w in recwarn if "64 base draws support" in str(w.message)]
    assert len(told) == far


def beside_the_data(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1e-4))


@pytest.mark.parametrize("make", [KALE, DonskerVaradhan])
def test_a_bound_on_the_density_is_no_divergence(make):
    """Against a contrast of known density it is the mean log density, of any size: here 7.8."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        ebm = EnergyDistribution(lambda x: 0.5 * ((x - loc) / 1e-4).square(), event_shape=())
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    objective = make()
    objective.num_steps_taken.fill_(128)
    objective.differentiable_loss(model, beside_the_data, 1e-4 * torch.randn(64))
    assert objective.diagnostics["x"]["bound"] > 7.4


@pytest.mark.parametrize("make", [KALE, DonskerVaradhan])
def test_a_contrast_of_the_guide_that_does_not_cover_the_data_is_told(make):
    with pytest.warns(SurrogateWarning, match="noise does not cover the data: 100% of them"):
        make().differentiable_loss(located(None), beside_the_data, 1.0 + 0.1 * torch.randn(64))


def tilted(base):
    def model(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda x: -slope * x, base), obs=x)

    return model


def test_good_comparisons_are_not_told(recwarn):
    train(NCE(), located(STANDARD), 0.3 + torch.randn(50), 140)
    assert not [w for w in recwarn if issubclass(w.category, SurrogateWarning)]


# --- one row at a time


def regression(x, z):
    """One row: the context enters by an argument of its own."""
    ebm = EnergyDistribution(lambda y: 0.5 * y**2 - z * y, base=STANDARD)
    pyro.sample("x", ebm, obs=x)


@pytest.mark.parametrize("name", ONE_LOG_Z)
def test_a_context_is_found_with_one_row_at_a_time(name):
    make = ONE_LOG_Z[name]
    x, z = torch.tensor(0.3), torch.tensor(1.0)
    with pytest.raises(ValueError, match="row-wise values other than x .argument 1.*one log Z"):
        make().differentiable_loss(regression, no_guide, x, z)


@pytest.mark.parametrize("make", [RankingNCE, EnergyDiscrepancy])
def test_a_context_is_no_matter_without_log_z(make):
    make().differentiable_loss(regression, no_guide, torch.tensor(0.3), torch.tensor(1.0))


@pytest.mark.parametrize("name", ONE_LOG_Z)
def test_one_row_without_a_context_is_fine(name):
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("x", EnergyDistribution(lambda y: 0.5 * (y - loc) ** 2, base=STANDARD), obs=x)

    ONE_LOG_Z[name]().differentiable_loss(model, no_guide, torch.tensor(0.3))


def test_what_cannot_be_checked_with_one_row_is_told():
    def model(x, z):
        if type(z) is not torch.Tensor:
            raise TypeError("plain tensors only")
        regression(x, z)

    with pytest.warns(SurrogateWarning, match="say conditional=True or False"):
        NCE().differentiable_loss(model, no_guide, torch.tensor(0.3), torch.tensor(1.0))


# --- latents behind one learned log Z


def with_latent(x):
    z = pyro.sample("z", STANDARD)
    ebm = EnergyDistribution(lambda x: 0.1 * (x - z) ** 2, base=STANDARD, conditional=False)
    with pyro.plate("data", len(x)):
        pyro.sample("x", ebm, obs=x)


def point(x):
    pyro.sample("z", dist.Delta(pyro.param("z_map", torch.tensor(0.1))))


@pytest.mark.parametrize("make", [NCE, KALE])
def test_one_learned_log_z_and_a_latent(make):
    model, x = with_latent, torch.randn(5)
    guide = AutoNormal(surrogate(model, make()))
    with pytest.raises(ValueError, match="depends on latent 'z'.*would bend the posterior"):
        make().differentiable_loss(model, guide, x)
    make().differentiable_loss(model, point, x)  # a point estimate is a parameter


@pytest.mark.parametrize("per_site", [False, True])
def test_chains_of_one_law_and_a_latent(per_site):
    """No log Z is learned, and the sentence names whoever serves the site."""
    chains = PersistentContrastiveDivergence(1)
    objective = PerSite({"x": chains}) if per_site else chains
    guide = AutoNormal(surrogate(with_latent, RankingNCE()))
    message = "'z', but PersistentContrastiveDivergence keeps the chains of one law"
    with pytest.raises(ValueError, match=message):
        objective.differentiable_loss(with_latent, guide, torch.randn(5))


@pytest.mark.filterwarnings("ignore:.*as it was made is no likelihood")
@pytest.mark.parametrize("make", [RankingNCE, EnergyDiscrepancy, DonskerVaradhan])
def test_no_learned_log_z_and_a_latent(make):
    model = with_latent
    make().differentiable_loss(model, AutoNormal(surrogate(model, make())), torch.randn(5))


def test_few_base_draws_are_told():
    """The log of a mean of four weights is biased by their relative variance over eight."""
    with pytest.warns(SurrogateWarning, match="4 base draws a step are few"):
        train(DonskerVaradhan(), tilted(STANDARD), 0.1 * torch.randn(4), 140)


@pytest.mark.parametrize("make", [KALE, DonskerVaradhan, partial(KALE, c_update="newton")])
def test_one_base_draw_is_told_at_the_first_step(make):
    with pytest.warns(SurrogateWarning, match="1 base draw a step is few.*Give num_base=256"):
        make().differentiable_loss(tilted(STANDARD), no_guide, torch.randn(1))


def test_where_log_z_is_a_parameter_few_base_draws_do_not_bend_it(recwarn):
    """The gradient of a mean of weights has no bias, however few there are."""
    objective = KALE(c_update="gradient")
    for steps in (0, 128):
        objective.num_steps_taken.fill_(steps)
        objective.differentiable_loss(tilted(STANDARD), no_guide, torch.randn(1))
    assert not recwarn


def test_few_noise_draws_are_told():
    """The self-normalized likelihood has no num_base: its remedy is another one."""
    objective = SelfNormalized(num_noise=2)
    message = "8 noise draws a step are few.*Raise num_noise or"
    with pytest.warns(SurrogateWarning, match=message):
        train(objective, tilted(STANDARD), 0.1 * torch.randn(4), 140)


def test_a_random_energy_is_not_called_conditional():
    def model(x):
        ebm = EnergyDistribution(lambda y: 0.5 * y**2 * torch.rand_like(y), base=STANDARD)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ebm, obs=x)

    with pytest.warns(SurrogateWarning, match="is random .dropout"):
        NCE().differentiable_loss(model, no_guide, torch.randn(5))


@pytest.mark.parametrize("seed", range(3))
def test_a_spectral_norm_is_not_called_random(seed):
    """Its vectors move with every call in training; any warning is an error here."""
    torch.manual_seed(seed)
    net = spectral_norm(nn.Linear(64, 64)).train()
    p = EnergyDistribution(lambda y: net(y).sum(-1), event_shape=(64,))
    assert not depends_on_rows(p, torch.randn(40, 64))
