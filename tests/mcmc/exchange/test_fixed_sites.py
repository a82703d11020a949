"""Exchange where a latent moves the statistics or the mask of a site: refused, not wrong."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.infer.bayes.anchored_posterior import anchored_posterior
from pyro_ebm.infer.bayes.posterior import posterior
from pyro_ebm.mcmc import (
    MCMC,
    DirectionExchange,
    EachChain,
    Exchange,
    GroupedExchange,
    Resampled,
    SurrogateExchange,
)

F64 = torch.float64
HIGHEST = 6
DATA = torch.tensor([0.0, 1, 2, 2, 3, 6, 5, 4, 6, 6, 3, 6, 5, 6, 6], dtype=F64)


class Curved(ExponentialFamily):
    """Numbers from 0 to 6, with the statistic (1 - exp(-decay x)) / decay."""

    coefficients = ("rate",)
    is_sampleable = True

    def __init__(self, rate, decay):
        super().__init__((), dist.constraints.integer_interval(0, HIGHEST))
        self._set("rate", rate)
        self._set("decay", decay)

    def statistics(self, x):
        return ((1.0 - torch.exp(-self.decay * x)) / self.decay).unsqueeze(-1)

    def sample(self, shape=()):
        told = self.statistics(torch.arange(HIGHEST + 1.0, dtype=F64))[..., 0]
        law = dist.Categorical(logits=self.natural() * told)
        return law.sample(torch.Size(shape)).to(F64)


def number(value):
    return torch.tensor(value, dtype=F64)


def curved(x, *, decay=None, moved=lambda decay: decay):
    """Rows of the family, with a decay that is held, or is a latent between .3 and .9."""
    rate = pyro.sample("rate", dist.Normal(number(0.0), 1.0))
    if decay is None:
        decay = moved(pyro.sample("decay", dist.Uniform(number(0.3), 0.9)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(Curved(rate, decay)), obs=x)


def of_curved(x, decays):
    """Mean and sd of the rate by sums over a grid of rates, decays, and all seven values."""
    rate = torch.linspace(-5.0, 6.0, 1101, dtype=F64)[:, None]
    decay, values = decays[:, None], torch.arange(HIGHEST + 1.0, dtype=F64)
    told = (1.0 - torch.exp(-decay * values)) / decay
    log_p = (rate[..., None] * told).log_softmax(-1)
    weights = (log_p[..., x.long()].sum(-1) - 0.5 * rate.square()).flatten().softmax(0)
    weights = weights.reshape(log_p.shape[:-1]).sum(1)
    mean = weights @ rate[:, 0]
    return float(mean), float((weights @ (rate[:, 0] - mean).square()).sqrt())


def chosen(decay):
    """A decay that moves without a slope."""
    return torch.where(decay > 0.6, number(0.8), number(0.4))


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(4)
    torch.set_default_dtype(F64)


def run(kernel, *args, num_chains=128, num_samples=100, warmup_steps=100):
    mcmc = MCMC(kernel, num_samples, warmup_steps, num_chains=num_chains, disable_progbar=True)
    mcmc.run(*args)
    return mcmc.get_samples()


def pool():
    return Resampled(torch.randint(7, (50,)).to(F64), torch.zeros(1, dtype=F64))


KERNELS = {
    "exchange": Exchange,
    "directions": DirectionExchange,
    "surrogate": lambda model: SurrogateExchange(model, surrogate=lambda eta: eta[..., 0]),
    "pool": lambda model: Exchange(model, auxiliary=pool()),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_latent_in_the_statistics_is_refused(kernel):
    with pytest.raises(ValueError, match=r"'x': the statistics of its energy depend on a latent"):
        run(KERNELS[kernel](curved), DATA)


def test_it_is_refused_for_groups_and_by_every_way_to_a_posterior():
    def groups(x):
        decay = pyro.sample("decay", dist.Uniform(number(0.3), 0.9))
        with pyro.plate("groups", len(x)):
            rate = pyro.sample("rate", dist.Normal(number(0.0), 1.0))
            pyro.sample("x", EnergyDistribution(Curved(rate, decay)), obs=x)

    with pytest.raises(ValueError, match="statistics"):
        run(GroupedExchange(groups, "groups"), DATA)
    with pytest.raises(ValueError, match="statistics"):
        anchored_posterior(curved, DATA)
    with pytest.raises(ValueError, match="method='generalized'"):
        posterior(curved, DATA, method="exchange")


@pytest.mark.parametrize("x", [DATA, torch.zeros(5, dtype=F64)], ids=["data", "zeros"])
def test_it_is_refused_at_data_that_hide_it(x):
    """T(0) = 0 at every decay, while the draws it is compared with have others."""
    with pytest.raises(ValueError, match="statistics"):
        run(Exchange(curved), x)


def test_it_is_refused_without_a_slope():
    with pytest.raises(ValueError, match="statistics"):
        run(Exchange(lambda x: curved(x, moved=chosen)), DATA)


def test_it_is_refused_in_each_chain():
    data = {"x": DATA.expand(8, -1)}
    with pytest.raises(ValueError, match="statistics"):
        run(Exchange(EachChain(curved, data)), DATA, num_chains=8)


def test_a_decay_that_is_held_is_followed():
    """Against sums over a grid of rates; five standard errors, a tenth of an sd."""
    mean, sd = of_curved(DATA, number([0.6]))
    kernel = Exchange(lambda x: curved(x, decay=number(0.6)))
    rate = run(kernel, DATA, num_chains=64, num_samples=80, warmup_steps=60)["rate"]
    for values, wanted in ((rate, mean), ((rate - mean).square(), sd**2)):
        means = values.mean(1)
        error = means.std() / len(means) ** 0.5
        assert abs(float((means.mean() - wanted) / error)) < 5
        assert float(error) < 0.1 * sd


def test_weights_of_a_network_in_the_statistics_are_no_latents():
    trained = number(0.6).requires_grad_()
    run(Exchange(lambda x: curved(x, decay=trained)), DATA, num_samples=2, warmup_steps=2)


# --- masks


def change_point(x, *, scale=None):
    """Rows before a latent time are of the family, all others of a Poisson."""
    rate = pyro.sample("rate", dist.Normal(number(0.0), 1.0))
    at = pyro.sample("at", dist.Uniform(number(0.0), float(len(x))))
    rows = torch.arange(float(len(x)), dtype=F64)
    before = rows < at
    handler = poutine.mask(mask=before) if scale is None else poutine.scale(scale=scale(at))
    with pyro.plate("rows", len(x)), handler:
        pyro.sample("x", EnergyDistribution(Curved(rate, number(0.6))), obs=x)
    with pyro.plate("rest", len(x)), poutine.mask(mask=~before):
        pyro.sample("y", dist.Poisson(number(4.0)), obs=x)


def with_pool(model):
    return Exchange(model, auxiliary=pool())


@pytest.mark.parametrize("kernel", [Exchange, DirectionExchange, with_pool])
def test_a_mask_that_a_latent_moves_is_refused(kernel):
    """On the older code the rate was that of the rows that one draw of the prior had kept."""
    with pytest.raises(ValueError, match=r"'x': its mask or scale depends on a latent"):
        run(kernel(change_point), DATA)
    with pytest.raises(ValueError, match="mask or scale"):
        anchored_posterior(change_point, DATA)


@pytest.mark.parametrize("at", [0.01, 14.99])
def test_a_mask_that_moves_near_the_end_of_a_prior_is_seen(at):
    def model(x):
        rate = pyro.sample("rate", dist.Normal(number(0.0), 1.0))
        when = pyro.sample("when", dist.Uniform(number(0.0), 15.0))
        with pyro.plate("rows", len(x)), poutine.mask(mask=when > at):
            pyro.sample("x", EnergyDistribution(Curved(rate, number(0.6))), obs=x)

    with pytest.raises(ValueError, match="mask or scale"):
        run(Exchange(model), DATA)


def test_scales_that_move_or_are_not_one_are_refused():
    def moves(at):
        return torch.where(at > 14.0, 0.5, 1.0)

    with pytest.raises(ValueError, match=r"mask or scale depends|scaled by 0.5"):
        run(Exchange(lambda x: change_point(x, scale=moves)), DATA)
    with pytest.raises(ValueError, match=r"'x' is scaled by 3: exchange"):
        run(Exchange(lambda x: change_point(x, scale=lambda at: 3.0)), DATA)
