"""Discrete latents summed out beside an EBM site: the same loss and gradients as without them.

The comparison is a model in which the latent is summed out by hand, with the same draws of contrast
and guide. An EBM site that depends on an enumerated latent is refused; what would come of it is
shown.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, TraceEnum_ELBO, config_enumerate
from torch import nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import GaussianEnergy
from pyro_ebm.infer import (
    KALE,
    NCE,
    DonskerVaradhan,
    EnergyDiscrepancy,
    RankingNCE,
    ScoreMatching,
    fit,
)
from pyro_ebm.infer.bayes.enumerated import Enumerated
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.ops.constraints import spins
from pyro_ebm.poutine import surrogate

NUM_ROWS = 6
BASE = dist.Normal(0.0, 1.5)
PARALLEL = {"enumerate": "parallel"}

OBJECTIVES = {
    "nce": lambda: NCE(num_noise=3),
    "nce, as many points as states": lambda: NCE(num_noise=1),
    "ranking": lambda: RankingNCE(num_noise=3),
    "ed": lambda: EnergyDiscrepancy(time=0.7, num_negatives=3),
    "kale": lambda: KALE(c_update="gradient"),
    "dv": lambda: DonskerVaradhan(num_base=2 * NUM_ROWS),
    "score matching": ScoreMatching,
    "per site": lambda: PerSite({"x": NCE(num_noise=2)}),
}


def no_guide(*args):
    return None


class Parameters(nn.Module):
    """An energy, a mixture of two normals, and variational factors."""

    def __init__(self):
        super().__init__()
        self.curve = nn.Parameter(torch.tensor(0.3))
        self.logits = nn.Parameter(torch.tensor([0.2, -0.4]))
        self.locs = nn.Parameter(torch.tensor([-1.0, 1.5]))
        self.log_scale = nn.Parameter(torch.tensor(-0.2))
        self.means = nn.Parameter(torch.linspace(-1.0, 1.0, NUM_ROWS))
        self.assignments = nn.Parameter(torch.linspace(-1.0, 1.0, 2 * NUM_ROWS).reshape(-1, 2))

    def energy(self, x):
        return 0.1 * x**4 + self.curve * x

    def law(self):
        return EnergyDistribution(self.energy, base=BASE, conditional=False)

    def component(self, k):
        return dist.Normal(self.locs[k], self.log_scale.exp())

    def mixture(self):
        weights = dist.Categorical(logits=self.logits)
        return dist.MixtureSameFamily(weights, dist.Normal(self.locs, self.log_scale.exp()))


@pytest.fixture
def parameters():
    pyro.set_rng_seed(5)
    return Parameters()


@pytest.fixture
def data():
    pyro.set_rng_seed(6)
    return torch.randn(NUM_ROWS), torch.randn(NUM_ROWS)


def loss_and_gradients(objective, parameters, model, guide, *args):
    """With draws that a seed fixes, and after sites to be enumerated have been met."""
    objective.differentiable_loss(model, guide, *args)
    pyro.set_rng_seed(7)
    loss = objective.differentiable_loss(model, guide, *args)
    gradients = torch.autograd.grad(loss, list(parameters.parameters()), allow_unused=True)
    flat = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(parameters.parameters(), gradients, strict=True)
    ]
    return loss.item(), torch.cat([g.flatten() for g in flat])


def assert_same(one, other):
    assert one[0] == pytest.approx(other[0], abs=1e-10)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-10)


def two_ways(parameters, sites):
    """A model with an enumerated latent, and one without it."""

    def register():
        pyro.module("parameters", parameters)

    def enumerated(*args):
        register()
        sites(*args, summed_out=False)

    def by_hand(*args):
        register()
        sites(*args, summed_out=True)

    return enumerated, by_hand


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]


# --- equal to the latent summed out by hand


def test_a_latent_per_row(objective, parameters, data):
    def sites(x, y, *, summed_out):
        with pyro.plate("data", len(x)):
            pyro.sample("x", parameters.law(), obs=x)
            if summed_out:
                pyro.sample("y", parameters.mixture(), obs=y)
                return
            k = pyro.sample("k", dist.Categorical(logits=parameters.logits), infer=PARALLEL)
            pyro.sample("y", parameters.component(k), obs=y)

    ways = two_ways(parameters, sites)
    made = objective()
    losses = [loss_and_gradients(made, parameters, model, no_guide, *data) for model in ways]
    assert_same(*losses)
    assert losses[0][1][:6].abs().min() > 1e-4  # the gradient reaches energy and mixture


@pytest.mark.parametrize("rows", [[0, 3], [5, 1, 2]])
def test_subsamples_and_masks(objective, parameters, data, rows):
    """The scale stands outside of the log of the sum, the mask inside."""
    mask = torch.tensor([True, False, True, True, False, True])

    def sites(x, y, *, summed_out):
        with pyro.plate("data", NUM_ROWS, subsample=torch.tensor(rows)) as i:
            pyro.sample("x", parameters.law(), obs=x[i])
            if summed_out:
                pyro.sample("y", parameters.mixture().mask(mask[i]), obs=y[i])
                return
            k = pyro.sample("k", dist.Categorical(logits=parameters.logits), infer=PARALLEL)
            with poutine.mask(mask=mask[i]):
                pyro.sample("y", parameters.component(k), obs=y[i])

    made = objective()
    ways = two_ways(parameters, sites)
    assert_same(*(loss_and_gradients(made, parameters, m, no_guide, *data) for m in ways))


def log_likelihood_of_groups(parameters, y):
    """Log of the mixture of products over the rows of every group, ``(groups,)``."""
    terms = parameters.component(torch.arange(2)).log_prob(y.unsqueeze(-1)).sum(-2)
    return (parameters.logits.log_softmax(-1) + terms).logsumexp(-1)


def test_a_latent_per_group(objective, parameters, data):
    def sites(x, y, *, summed_out):
        groups, rows = pyro.plate("groups", 2, dim=-2), pyro.plate("rows", 3, dim=-1)
        with groups:
            if summed_out:
                pyro.factor("y", log_likelihood_of_groups(parameters, y).unsqueeze(-1))
            else:
                k = pyro.sample("k", dist.Categorical(logits=parameters.logits), infer=PARALLEL)
            with rows:
                pyro.sample("x", parameters.law(), obs=x)
                if not summed_out:
                    pyro.sample("y", parameters.component(k), obs=y)

    made = objective()
    ways = two_ways(parameters, sites)
    arguments = [values.reshape(2, 3) for values in data]
    assert_same(*(loss_and_gradients(made, parameters, m, no_guide, *arguments) for m in ways))


def test_one_latent_for_all_rows(objective, parameters, data):
    def sites(x, y, *, summed_out):
        if summed_out:
            pyro.factor("y", log_likelihood_of_groups(parameters, y))
        else:
            k = pyro.sample("k", dist.Categorical(logits=parameters.logits), infer=PARALLEL)
        with pyro.plate("data", len(x)):
            pyro.sample("x", parameters.law(), obs=x)
            if not summed_out:
                pyro.sample("y", parameters.component(k), obs=y)

    made = objective()
    ways = two_ways(parameters, sites)
    assert_same(*(loss_and_gradients(made, parameters, m, no_guide, *data) for m in ways))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "per site"])
def test_an_energy_prior_above_the_latent(name, parameters, data):
    """The latent k depends on z, which an energy governs; the guide knows z only."""

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(parameters.means, 0.3))

    def sites(y, *, summed_out):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", parameters.law())
            logits = torch.stack([torch.zeros_like(z), z], -1)
            if summed_out:
                components = dist.Normal(parameters.locs + z.unsqueeze(-1), 1.0)
                mixture = dist.MixtureSameFamily(dist.Categorical(logits=logits), components)
                pyro.sample("y", mixture, obs=y)
                return
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=PARALLEL)
            pyro.sample("y", dist.Normal(parameters.locs[k] + z, 1.0), obs=y)

    made = OBJECTIVES[name]()
    ways = two_ways(parameters, sites)
    losses = [loss_and_gradients(made, parameters, m, guide, data[1]) for m in ways]
    assert_same(*losses)
    assert losses[0][1][6 : 6 + NUM_ROWS].abs().min() > 1e-4  # and the guide


def test_a_latent_of_the_guide(objective, parameters, data):
    """All terms of the ELBO by hand, weighted with the guide's probabilities."""
    x, y = data

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=parameters.assignments), infer=PARALLEL)

    def model(x, y):
        pyro.module("parameters", parameters)
        with pyro.plate("data", len(x)):
            pyro.sample("x", parameters.law(), obs=x)
            k = pyro.sample("k", dist.Categorical(logits=parameters.logits))
            pyro.sample("y", parameters.component(k), obs=y)

    def without(x, y):
        pyro.module("parameters", parameters)
        with pyro.plate("data", len(x)):
            pyro.sample("x", parameters.law(), obs=x)
            log_q = parameters.assignments.log_softmax(-1)
            log_y = parameters.component(torch.arange(2)).log_prob(y.unsqueeze(-1))
            log_p = parameters.logits.log_softmax(-1) + log_y
            pyro.factor("elbo", (log_q.exp() * (log_p - log_q)).sum(-1))

    made = objective()
    losses = (
        loss_and_gradients(made, parameters, model, guide, x, y),
        loss_and_gradients(made, parameters, without, no_guide, x, y),
    )
    assert_same(*losses)


def test_an_ebm_of_rows_made_events(parameters, data):
    """The dims of its events are no dims of a latent."""

    def sites(x, y, *, summed_out):
        pyro.sample("x", parameters.law().expand([3, 2]).to_event(2), obs=x.reshape(3, 2))
        if summed_out:
            pyro.factor("y", log_likelihood_of_groups(parameters, y))
            return
        k = pyro.sample("k", dist.Categorical(logits=parameters.logits), infer=PARALLEL)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", parameters.component(k), obs=y)

    made = RankingNCE()
    ways = two_ways(parameters, sites)
    assert_same(*(loss_and_gradients(made, parameters, m, no_guide, *data) for m in ways))


# --- equal to Pyro's own estimator


def chain(parameters, y):
    """A hidden Markov model over the rows."""
    k = 0
    moves = torch.stack([parameters.logits, parameters.logits.flip(0)])
    for t in pyro.markov(range(len(y))):
        k = pyro.sample(f"k{t}", dist.Categorical(logits=moves[k]), infer=PARALLEL)
        pyro.sample(f"y{t}", parameters.component(k), obs=y[t])


def two_latents(parameters, y):
    """Two latents, one of them in a plate."""
    shift = pyro.sample("shift", dist.Bernoulli(0.3), infer=PARALLEL)
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(logits=parameters.logits), infer=PARALLEL)
        pyro.sample("y", dist.Normal(parameters.locs[k] + shift, 1.0), obs=y)


@pytest.mark.parametrize("rest", [chain, two_latents])
def test_what_an_ebm_site_adds_is_its_own_loss(objective, parameters, data, rest):
    """Apart from it the loss is that of ``TraceEnum_ELBO``."""

    def alone(x, y):
        pyro.module("parameters", parameters)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", parameters.law(), obs=x)

    def both(x, y):
        alone(x, y)
        rest(parameters, y)

    made, stock = objective(), TraceEnum_ELBO(max_plate_nesting=1)
    ebm = loss_and_gradients(made, parameters, alone, no_guide, *data)
    whole = loss_and_gradients(made, parameters, both, no_guide, *data)
    others = loss_and_gradients(
        stock, parameters, lambda x, y: rest(parameters, y), no_guide, *data
    )
    assert_same(whole, (ebm[0] + others[0], ebm[1] + others[1]))


def mixture_model(parameters):
    def model(x, y):
        pyro.module("parameters", parameters)
        with pyro.plate("data", len(x)):
            pyro.sample("x", parameters.law(), obs=x)
            k = pyro.sample("k", dist.Categorical(logits=parameters.logits), infer=PARALLEL)
            pyro.sample("y", parameters.component(k), obs=y)

    return model


class Tied:
    """An objective whose contrast is drawn once."""

    def __init__(self, parameters, data):
        self.objective = RankingNCE(num_noise=3)
        self.model, self.data = mixture_model(parameters), data
        with torch.no_grad():
            points = BASE.sample((3, NUM_ROWS))
        whole = Contrast(points, BASE.log_prob(points), BASE.log_prob(data[0]))
        self.objective.draw = lambda p, x, noise: whole
        self.want = loss_and_gradients(self.objective, parameters, self.model, no_guide, *data)


@pytest.fixture
def tied(parameters, data):
    return Tied(parameters, data)


def test_bare_handler_under_stock_enumeration(tied, parameters):
    model = surrogate(tied.model, tied.objective)
    stock = TraceEnum_ELBO(max_plate_nesting=1)
    assert_same(tied.want, loss_and_gradients(stock, parameters, model, no_guide, *tied.data))


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("nesting", [1, math.inf])
def test_particles(tied, parameters, vectorized, nesting):
    many = RankingNCE(
        num_noise=3, num_particles=4, vectorize_particles=vectorized, max_plate_nesting=nesting
    )

    def draw(p, x, noise):  # one contrast for all particles
        one = tied.objective.draw(p, x, noise)
        shape = (3, *x.shape)
        points, log_noise = (t.reshape(3, *(1,) * (x.dim() - 1), -1).expand(shape) for t in one[:2])
        return Contrast(points, log_noise, one.log_noise_data.expand(x.shape))

    many.draw = draw
    assert_same(tied.want, loss_and_gradients(many, parameters, tied.model, no_guide, *tied.data))


def test_the_first_step_is_like_the_others(tied, parameters):
    """It meets the sites; nothing is counted or learned twice."""
    fresh = RankingNCE(num_noise=3)
    fresh.draw = tied.objective.draw
    svi = SVI(tied.model, no_guide, pyro.optim.SGD({"lr": 0.0}), loss=fresh)
    losses = [svi.step(*tied.data) for _ in range(3)] + [svi.evaluate_loss(*tied.data)]
    assert losses == pytest.approx([tied.want[0]] * 4, abs=1e-10)
    assert int(fresh.num_steps_taken) == 3
    assert fresh(tied.model, no_guide)(*tied.data).item() == pytest.approx(tied.want[0], abs=1e-10)


def test_fit_scales_latents_in_the_plate(parameters, data):
    """The mean over all batches of one row is the loss of all rows."""
    losses = []
    for batch_size in (None, 1):
        objective = ScoreMatching()
        result = fit(
            mixture_model(parameters),
            data,
            objective,
            lr=1e-15,
            num_steps=NUM_ROWS,
            batch_size=batch_size,
            disable_progbar=True,
        )
        losses.append(sum(result.losses) / NUM_ROWS)
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)


def test_svi_learns_the_mixture_and_the_energy():
    """The weight of a component, and the precision of an energy beside it."""
    pyro.set_rng_seed(3)
    labels = dist.Bernoulli(0.3).sample((2000,))
    data = 0.5 * torch.randn(2000), 4 * labels + torch.randn(2000)

    def model(x, y):
        precision = pyro.param("precision", torch.tensor(1.0))
        weight = pyro.param("weight", torch.tensor(0.5), dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(weight), infer=PARALLEL)
            law = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
            pyro.sample("x", law, obs=x)
            pyro.sample("y", dist.Normal(4 * k, 1.0), obs=y)

    objective = NCE(num_noise=5, noise=dist.Normal(0.0, 0.7))
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=objective)
    for _ in range(120):
        svi.step(*data)
    assert float(pyro.param("weight").detach()) == pytest.approx(0.3, abs=0.045)  # 4 se and noise
    assert float(pyro.param("precision").detach()) == pytest.approx(4.0, abs=0.8)


# --- marginals


def test_marginals_are_bayes_theorem(parameters, data):
    objective = RankingNCE()
    found = objective.compute_marginals(mixture_model(parameters), no_guide, *data)
    joint = parameters.component(torch.arange(2)).log_prob(data[1].unsqueeze(-1))
    want = (parameters.logits + joint).softmax(-1)
    torch.testing.assert_close(found["k"].probs, want.detach(), rtol=0, atol=1e-12)
    assert int(objective.num_steps_taken) == 0


def test_observed_labels_are_not_summed_out(parameters, data):
    x, y = data
    labels = torch.tensor([0, 1, 1, 0, 1, 0])

    def model(given):
        def run(x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("x", parameters.law(), obs=x)
                weights = dist.Categorical(logits=parameters.logits)
                k = pyro.sample("k", weights, obs=labels, infer=given)
                pyro.sample("y", parameters.component(k), obs=y)

        return run

    made = RankingNCE()
    results = [
        loss_and_gradients(made, parameters, model(given), no_guide, x, y)
        for given in (None, PARALLEL)
    ]
    assert_same(*results)
    assert not made.enumerates


# --- the guide's contrast


def test_a_discrete_contrast_is_no_latent(parameters):
    """``config_enumerate`` marks every discrete site of a guide, the contrast among them."""
    table, x = torch.zeros(4, requires_grad=True), torch.tensor([0, 1, 2, 2])

    def model(x):
        law = EnergyDistribution(lambda x: table[x], base=dist.Categorical(torch.ones(4)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(torch.tensor([1.0, 2.0, 3.0, 4.0])))

    made, losses = NCE(num_noise=3), []
    for given in (guide, config_enumerate(guide)):
        made.differentiable_loss(model, given, x)
        pyro.set_rng_seed(0)
        losses.append(made.differentiable_loss(model, given, x).item())
    assert losses[0] == losses[1]
    assert not made.enumerates


# --- EBM sites that depend on an enumerated site


def mixture_of_ebms(kind, parameters):
    """Every way in which k may reach the EBM."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=PARALLEL)
            base = dist.Normal(parameters.locs[k] if kind == "base" else parameters.locs[0], 1.0)
            own = parameters.locs[k] if kind in ("energy", "to_event") else 0.0
            value = 0.1 * k * x if kind == "value" else x
            if kind == "to_event":
                own, value = own.unsqueeze(-1), x.unsqueeze(-1)
            law = EnergyDistribution(lambda x: (x - own) ** 2, base=base, conditional=False)
            if kind == "to_event":
                law = law.expand([len(x), 1]).to_event(1)
            pyro.sample("x", law, obs=value)

    return model


@pytest.mark.parametrize("kind", ["energy", "base", "to_event", "value"])
@pytest.mark.parametrize("num_noise", [1, 3])
def test_a_mixture_of_ebms_is_refused(kind, num_noise, parameters, data):
    """With one noise draw, data and noise are as many as values of k, and no shape clashes."""
    made = RankingNCE(num_noise=num_noise)
    model = mixture_of_ebms(kind, parameters)
    message = r"'k' is enumerated and EBM site 'x' depends on it.*a_k = log p\(k\) - log Z_k"
    with pytest.raises(NotImplementedError, match=message):
        made.differentiable_loss(model, no_guide, data[0])
    with pytest.raises(NotImplementedError, match=message), torch.no_grad():
        made.loss(model, no_guide, data[0])


@pytest.mark.parametrize("kind", ["energy", "base", "to_event", "value"])
@pytest.mark.parametrize("num_noise", [1, 3])
def test_stock_enumeration_refuses_a_mixture_too(kind, num_noise, parameters, data):
    """Around the bare handler it knows nothing of surrogates, and would drop every log Z_k."""
    model = surrogate(mixture_of_ebms(kind, parameters), RankingNCE(num_noise=num_noise))
    for stock in (TraceEnum_ELBO(max_plate_nesting=1), TraceEnum_ELBO()):  # which counts plates
        with pytest.raises(NotImplementedError, match="'k' is enumerated and EBM site 'x' depends"):
            stock.differentiable_loss(model, no_guide, data[0])


def test_nuts_refuses_a_mixture_too(parameters, data):
    """It sums out discrete latents by itself, over a frozen objective as over any other density."""
    mixture = mixture_of_ebms("energy", parameters)

    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        mixture(x)

    frozen = RankingNCE().freeze(model, data[0])
    kernel = NUTS(surrogate(model, frozen), max_plate_nesting=1)
    with pytest.raises(NotImplementedError, match="'k' is enumerated and EBM site 'x' depends"):
        MCMC(kernel, num_samples=1, warmup_steps=1, disable_progbar=True).run(data[0])


def test_a_mixture_may_be_summed_out_of_a_likelihood():
    """Spins with a field per component: with the exact log Z_k it is the mixture."""
    fields, logits = torch.tensor([-0.4, 1.1]), torch.tensor([0.2, -0.3])
    x = torch.tensor([1.0, -1.0, 1.0])

    def model(declares):
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=PARALLEL)
            batch = {"batch_shape": k.shape} if declares else {}
            law = EnergyDistribution(
                lambda x: -fields[k] * x, support=spins, event_shape=(), **batch
            )
            pyro.sample("x", law, obs=x)

    stock = TraceEnum_ELBO(max_plate_nesting=1)
    scored = surrogate(model, Enumerated())
    have = torch.tensor(stock.loss(scored, no_guide, True))
    per_component = fields * x.unsqueeze(-1) - (2 * fields.cosh()).log()
    want = -torch.logsumexp(logits.log_softmax(-1) + per_component, -1).sum()
    torch.testing.assert_close(have, want, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"energies of shape \(2, 3\).*batch_shape \(3,\)"):
        stock.loss(scored, no_guide, False)


def test_a_dependence_by_way_of_the_guide(parameters, data):
    """A component of the guide per value of k: then z, and the energy at z, differ with k."""

    def guide(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=PARALLEL)
            pyro.sample("z", dist.Normal(parameters.locs[k], 1.0))

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            z = pyro.sample("z", parameters.law())
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)

    with pytest.raises(NotImplementedError, match="'k' is enumerated and EBM site 'z' depends"):
        RankingNCE().differentiable_loss(model, guide, data[1])


def test_an_ebm_that_is_itself_enumerated(data):
    law = EnergyDistribution(
        lambda k: 0.3 * k, base=dist.Bernoulli(0.5), log_normalizer=lambda: torch.zeros(())
    )

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", law, infer=PARALLEL)
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    with pytest.raises(NotImplementedError, match="'k' is enumerated and EBM site 'k' depends"):
        RankingNCE().differentiable_loss(model, no_guide, data[1])


def test_one_value_after_the_other_is_refused(parameters, data):
    def guide(x, y):
        with pyro.plate("data", len(x)):
            weights = dist.Categorical(logits=parameters.assignments)
            pyro.sample("k", weights, infer={"enumerate": "sequential"})

    message = "'k' is enumerated one value after the other"
    for enumerates in (False, True):
        made = RankingNCE()
        made.enumerates = enumerates
        with pytest.raises(NotImplementedError, match=message):
            made.differentiable_loss(mixture_model(parameters), guide, *data)


# --- what a surrogate inside the log of a sum would do


CENTERS = torch.tensor([-1.0, 1.5], dtype=torch.float64)
PRECISIONS = torch.tensor([25.0, 0.25], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def draws_of_a_mixture(num):
    pyro.set_rng_seed(11)
    k = dist.Categorical(WEIGHTS).sample((num,))
    return dist.Normal(CENTERS[k], PRECISIONS[k] ** -0.5).sample()


def component_potentials(x, theta):
    """U_k without its constant, ``(..., 2)``; theta holds centers and log precisions."""
    return 0.5 * theta[..., 2:4].exp() * (x.unsqueeze(-1) - theta[..., :2]) ** 2


def largest_z(loss, theta):
    """Per-row losses at the truth: how far their mean gradient is from zero, in standard errors."""
    rows = theta.expand(len(loss(theta)), -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(loss(rows).sum(), rows)
    return (scores.mean(0) / (scores.std(0) / math.sqrt(len(rows)))).abs().max()


def mixture_law(theta):
    """The remedy that the error names: a mixture in one energy, with a learned weight."""

    def energy(x):
        a = torch.stack([torch.zeros_like(theta[..., 4]), theta[..., 4]], -1)
        return -torch.logsumexp(a - component_potentials(x, theta), -1)

    return EnergyDistribution(energy, event_shape=())


def component_law(theta, k):
    return EnergyDistribution(lambda x: component_potentials(x, theta)[..., k], event_shape=())


@pytest.mark.parametrize(
    "make",
    [
        lambda: RankingNCE(num_noise=2, noise=dist.Normal(0.0, 2.0)),
        lambda: EnergyDiscrepancy(time=1.0, num_negatives=2),
        ScoreMatching,
    ],
    ids=["ranking", "ed", "score matching"],
)
def test_only_a_mixture_in_the_energy_has_its_minimum_at_the_truth(make):
    """At the truth the mean gradient of the one loss is zero, that of the refused one is not."""
    x = draws_of_a_mixture(20_000)
    centers = torch.cat([CENTERS, PRECISIONS.log()])
    offset = WEIGHTS.log() + 0.5 * PRECISIONS.log()
    truth = torch.cat([centers, (offset[1] - offset[0])[None]])
    objective = make()
    contrast = objective.draw(mixture_law(truth).expand(x.shape), x, None)

    def losses(p):
        return objective.per_datum(p.expand(x.shape), x, contrast, torch.zeros(()))

    def refused(theta):
        terms = torch.stack([-losses(component_law(theta, k)) for k in range(2)], -1)
        return -torch.logsumexp(terms + WEIGHTS.log(), -1)

    assert largest_z(lambda theta: losses(mixture_law(theta)), truth) < 4
    assert largest_z(refused, centers) > 6


def test_a_normalized_energy_counts_as_an_ebm_site_too(data):
    """An objective scores it like the others, so that k may not enter it either."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer=PARALLEL)
            pyro.sample("x", EnergyDistribution(GaussianEnergy(CENTERS[k], 1.0)), obs=x)

    with pytest.raises(NotImplementedError, match="depends on it"):
        RankingNCE(noise=BASE).differentiable_loss(model, no_guide, data[0])


def test_the_error_is_raised_before_anything_is_scored(parameters, data, monkeypatch):
    made, drawn = RankingNCE(), []
    monkeypatch.setattr(made, "draw", lambda *args: drawn.append(args))
    with pytest.raises(NotImplementedError, match="depends on it"):
        made.differentiable_loss(mixture_of_ebms("energy", parameters), no_guide, data[0])
    assert not drawn


def test_looking_at_shapes_draws_nothing(data):
    """A random energy sees the numbers that it would see without a latent beside it."""
    x, y = data

    def energy(x):
        return 0.1 * x**4 + 0.1 * torch.randn(()) * x

    def model(*, latent):
        def run(x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("x", EnergyDistribution(energy, base=BASE, conditional=False), obs=x)
                if latent:
                    k = pyro.sample("k", dist.Bernoulli(0.5), infer=PARALLEL)
                    pyro.sample("y", dist.Normal(0.0 * k, 1.0), obs=y)

        return run

    losses = []
    for latent in (True, False):
        made = RankingNCE()
        made.loss(model(latent=latent), no_guide, x, y)
        pyro.set_rng_seed(0)
        losses.append(made.loss(model(latent=latent), no_guide, x, y))
    beside = dist.Normal(0.0, 1.0).log_prob(y).sum().item()
    assert losses[0] + beside == pytest.approx(losses[1], abs=1e-10)
