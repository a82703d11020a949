"""An energy-based prior of latents: the latent feels -U, the parameters feel the surrogate, neither
both.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import KALE, NCE, DonskerVaradhan, EnergyDiscrepancy, RankingNCE
from pyro_ebm.infer.scoring.contrast import Contrast

OBJECTIVES = [NCE, RankingNCE, EnergyDiscrepancy, KALE, DonskerVaradhan]
PRIOR = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
DECODER = torch.tensor([[1.0, 0.4], [-0.3, 0.8]], dtype=torch.float64)
NOISE = 0.5


def prior(theta):
    """E(z) = z'(A - I) z / 2 on a standard normal base: z is N(0, A^-1)."""
    return EnergyDistribution(
        lambda z: 0.5 * ((theta - 1.0) * z.square()).sum(-1), base=PRIOR, conditional=False
    )


def model_of(theta, decoder=DECODER):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(theta))
            pyro.sample("x", dist.Normal(z @ decoder.mT, NOISE).to_event(1), obs=x)

    return model


def guide_of(loc, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


@pytest.mark.parametrize("make", OBJECTIVES)
def test_gradients_by_hand(make):
    """To the guide: the ELBO's gradient with the energy held. To the energy: the surrogate's with z
    held.
    """
    theta = torch.tensor([1.7, 0.6], requires_grad=True)
    loc = torch.randn(5, 2, requires_grad=True)
    scale = torch.full((5, 2), 0.3, requires_grad=True)
    x = torch.randn(5, 2)
    objective = make()
    draws, latents = [], []
    inner, evaluate = objective.draw, objective.per_datum
    objective.draw = lambda *args: draws.append(inner(*args)) or draws[-1]

    def per_datum(p, z, contrast, c):
        latents.append((p, z, contrast, c))
        return evaluate(p, z, contrast, c)

    objective.per_datum = per_datum
    pyro.set_rng_seed(5)
    loss = objective.differentiable_loss(model_of(theta), guide_of(loc, scale), x)
    got = torch.autograd.grad(loss, [theta, loc, scale])

    pyro.set_rng_seed(5)
    q = dist.Normal(loc, scale).to_event(1)
    z = q.rsample()
    held = 0.5 * (theta.detach() * z.square()).sum(-1) + math.log(2 * math.pi)
    likelihood = dist.Normal(z @ DECODER.mT, NOISE).to_event(1).log_prob(x)
    negative_elbo = (held - likelihood + q.log_prob(z)).sum()
    _, at, contrast, c = latents[-1]  # c is zero where log Z is not learned
    torch.testing.assert_close(loss, negative_elbo + len(x) * c, rtol=0, atol=1e-10)
    assert not at.requires_grad
    torch.testing.assert_close(at, z.detach())
    surrogate = evaluate(prior(theta).expand([5]), at, contrast, c.detach()).sum()
    want = [
        *torch.autograd.grad(surrogate, [theta]),
        *torch.autograd.grad(negative_elbo, [loc, scale]),
    ]
    for have, expected in zip(got, want, strict=True):
        torch.testing.assert_close(have, expected, rtol=0, atol=1e-10)


def posterior(theta, x):
    """The exact posterior of z and its Cholesky factor."""
    precision = torch.diag(theta) + DECODER.mT @ DECODER / NOISE**2
    cov = torch.linalg.inv(precision)
    return dist.MultivariateNormal(x @ DECODER @ cov / NOISE**2, cov)


def simulate(theta, num):
    z = torch.randn(num, 2) / theta.sqrt()
    return z, z @ DECODER.mT + NOISE * torch.randn(num, 2)


def scores(make, theta, at, num=30_000):
    """Gradients of every row's loss with respect to its own copy of the energy and decoder
    parameters.
    """
    _, x = simulate(theta, num)
    rows = at.expand(num, 2).clone().requires_grad_()
    decoders = DECODER.expand(num, 2, 2).clone().requires_grad_()

    def model(x):
        with pyro.plate("data", num):
            z = pyro.sample("z", prior(rows))
            mean = (decoders @ z[..., None]).squeeze(-1)
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", num):
            pyro.sample("z", posterior(at, x))

    objective = make()
    if objective.learns_log_normalizer:
        log_z = torch.tensor(-0.5 * float(at.log().sum()))
        objective.log_normalizers["z"] = torch.nn.Parameter(log_z, requires_grad=False)
        objective.update_log_normalizer = lambda *args: None
    loss = objective.differentiable_loss(model, guide, x)
    grads = torch.autograd.grad(loss, [rows, decoders])
    return torch.cat([g.reshape(num, -1) for g in grads], 1)


@pytest.mark.parametrize("make", [NCE, RankingNCE, EnergyDiscrepancy])
def test_truth_is_stationary(make):
    """At the true prior, with the exact posterior as guide, energy and decoder gradients vanish in
    expectation.

    Five standard errors see an energy gradient of 0.035; a prior 20 percent off is seen in the same
    way.
    """
    truth = torch.tensor([2.0, 0.7])
    rows = scores(make, truth, truth)
    stderr = rows.std(0) / math.sqrt(len(rows))
    assert stderr[:2].max() < 0.007
    assert (rows.mean(0).abs() / stderr).max() < 5
    off = scores(make, truth, truth * 1.2)[:, :2]
    assert (off.mean(0).abs() / (off.std(0) / math.sqrt(len(off)))).max() > 8


def test_likelihood_of_the_latent_alone_would_not_be():
    """Without the surrogate the energy's gradient is E[dU], which is nowhere near zero at the
    truth.
    """
    truth = torch.tensor([2.0, 0.7])
    z, _ = simulate(truth, 20_000)
    naive = 0.5 * z.square()
    assert (naive.mean(0) / (naive.std(0) / math.sqrt(20_000))).min() > 50


def test_prior_is_recovered():
    """One dimension, precision 2 under a decoder of slope 1: an amortized guide learns beside the
    energy.

    With 4000 rows the precision is known to 0.1 (variance .75 of x, less .25 of noise).
    """
    a = torch.tensor(1.0, requires_grad=True)
    x = torch.randn(4000) * math.sqrt(0.5) + NOISE * torch.randn(4000)

    def model(x):
        precision = pyro.param("precision", a)
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.tensor(0.0), 1.0)
            ebm = EnergyDistribution(lambda z: 0.5 * (precision - 1.0) * z**2, base=base)
            z = pyro.sample("z", ebm)
            pyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    objective = EnergyDiscrepancy(time=1.0, num_negatives=4)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.995}), loss=objective)
    for _ in range(300):
        svi.step(x)
    assert pyro.param("precision").item() == pytest.approx(2.0, abs=0.4)
    assert pyro.param("slope").item() == pytest.approx(2 / 3, abs=0.08)
    assert pyro.param("scale").item() == pytest.approx(math.sqrt(1 / 6), abs=0.05)


def test_latent_without_reparametrization():
    """A guide that is scored, not differentiated through: the site's value is -U, its gradient the
    surrogate's.
    """
    theta = torch.tensor([1.7, 0.6], requires_grad=True)

    class Scored(dist.Normal):
        has_rsample = False

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Scored(torch.zeros(2), 1.0).to_event(1))

    objective = RankingNCE()
    model_trace, _ = objective._get_trace(model_of(theta), guide, (torch.randn(4, 2),), {})
    node = model_trace.nodes["z"]
    want = prior(theta).unnormalized_log_prob(node["value"])
    torch.testing.assert_close(node["log_prob"], want)
    (got,) = torch.autograd.grad(node["log_prob"].sum(), theta)
    (naive,) = torch.autograd.grad(want.sum(), theta)
    assert got.abs().max() > 0
    assert not torch.allclose(got, naive)


def test_data_that_carry_gradients_are_treated_alike():
    """Features computed by a trained map are scored by -U with the energy held; the energy meets
    them detached.
    """
    theta = torch.tensor([1.7, 0.6], requires_grad=True)
    features = torch.randn(6, 2, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior(theta), obs=x)

    objective = RankingNCE()
    loss = objective.differentiable_loss(model, lambda x: None, features)
    got = torch.autograd.grad(loss, features)[0]
    want = torch.autograd.grad(prior(theta.detach()).potential(features).sum(), features)[0]
    torch.testing.assert_close(got, want)


def test_masked_latents_count_for_nothing():
    theta = torch.tensor([1.7, 0.6], requires_grad=True)
    x = torch.randn(5, 2)
    grads = []
    for padding in (0, 3):
        rows = torch.cat([torch.arange(5), torch.zeros(padding, dtype=torch.long)])
        mask = torch.arange(5 + padding) < 5
        loc = torch.linspace(-1.0, 1.0, 5)[rows, None].expand(-1, 2)
        objective = DonskerVaradhan()
        pool = torch.linspace(-2.0, 2.0, 10).reshape(1, 5, 2)
        objective.draw = lambda *args, rows=rows, pool=pool: Contrast(pool[:, rows])

        def model(x, mask):
            with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
                z = pyro.sample("z", prior(theta))
                pyro.sample("x", dist.Normal(z @ DECODER.mT, NOISE).to_event(1), obs=x)

        def guide(x, mask, loc=loc):
            with pyro.plate("data", len(x)), pyro.poutine.mask(mask=mask):
                pyro.sample("z", dist.Delta(loc, event_dim=1))

        loss = objective.differentiable_loss(model, guide, x[rows], mask)
        grads.append(torch.autograd.grad(loss, theta)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)
