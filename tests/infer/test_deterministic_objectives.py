"""One loss in many guises, for objectives without a contrast: plates, masks, scale, MCMC."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.infer import PerSite
from pyro_ebm.infer.discrete.discrete_fisher import DiscreteFisher
from pyro_ebm.infer.discrete.pseudo_likelihood import PseudoLikelihood
from pyro_ebm.infer.discrete.ratio_matching import RatioMatching
from pyro_ebm.infer.score.kernel_stein import KernelStein
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.ops.constraints import spins
from pyro_ebm.poutine import surrogate

NUM_ROWS = 6
MAKERS = {
    "sm": ScoreMatching,
    "ksd": lambda: KernelStein(length_scale=1.2),
    "pl": PseudoLikelihood,
    "rm": RatioMatching,
    "dfd": DiscreteFisher,
}
CONTINUOUS = {"sm", "ksd"}
POOLED = {"ksd"}
SUMS = [name for name in MAKERS if name not in POOLED]


def no_guide(*args):
    return None


class Setup:
    """An energy with two parameters, rows of data, and the loss on all of them."""

    def __init__(self, name):
        self.name, self.objective = name, MAKERS[name]()
        self.theta = torch.tensor([0.4, -0.3], requires_grad=True)
        x = torch.randn(NUM_ROWS, 3)
        self.data = x if name in CONTINUOUS else x.sign()
        self.rows = self.objective.row_losses(self.law(), self.data)
        self.loss, self.grads = self.valued(self.rows.sum())

    def law(self, theta=None):
        theta = self.theta if theta is None else theta
        if self.name in CONTINUOUS:
            return EnergyDistribution(
                lambda x: theta[0] * torch.cos(x).sum(-1) + theta[1] * x.prod(-1),
                base=dist.Normal(torch.zeros(3), 1.5).to_event(1),
            )
        return EnergyDistribution(
            lambda x: -theta[0] * (x * x.roll(1, -1)).sum(-1) - theta[1] * x.sum(-1),
            event_shape=(3,),
            support=spins,
        )

    def full(self, x):
        theta = pyro.param("theta", lambda: self.theta)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.law(theta), obs=x)

    def valued(self, loss):
        return loss.item(), torch.autograd.grad(loss, self.theta)[0]

    def check(self, model, *args, times=1.0):
        loss = self.objective.differentiable_loss(model, no_guide, *(args or (self.data,)))
        self.compare(self.valued(loss), times)

    def compare(self, got, times=1.0):
        assert got[0] == pytest.approx(times * self.loss, abs=1e-10)
        torch.testing.assert_close(got[1], times * self.grads, rtol=0, atol=1e-10)


@pytest.fixture(params=MAKERS)
def setup(request):
    return Setup(request.param)


def test_full_batch(setup):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", setup.law(), obs=x)

    setup.check(model)


def test_nested_plates_and_to_event(setup):
    def nested(x):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("x", setup.law(), obs=x)

    def event(x):
        pyro.sample("x", setup.law().expand([len(x)]).to_event(1), obs=x)

    setup.check(nested, setup.data.reshape(2, 3, 3))
    setup.check(event)


@pytest.mark.parametrize("padding", [float("nan"), 7.0])
def test_masked_padding(setup, padding):
    order = torch.randperm(10)
    x = torch.cat([setup.data, torch.full((4, 3), padding)])[order]

    def model(x):
        with pyro.plate("data", 10), poutine.mask(mask=order < NUM_ROWS):
            pyro.sample("x", setup.law(), obs=x)

    setup.check(model, x)
    loss = -poutine.trace(surrogate(model, setup.objective)).get_trace(x).log_prob_sum()
    setup.compare(setup.valued(loss))


def test_scale(setup):
    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
            pyro.sample("x", setup.law(), obs=x)

    setup.check(model, times=0.5)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("size", [1, 4])
def test_mean_over_all_subsamples(name, size):
    setup, got = Setup(name), []

    def model(x, rows):
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", setup.law(), obs=x[rows])

    for rows in itertools.combinations(range(NUM_ROWS), size):
        rows = torch.tensor(rows)
        loss = setup.objective.differentiable_loss(model, no_guide, setup.data, rows)
        got.append(setup.valued(loss))
    mean = sum(loss for loss, _ in got) / len(got)
    setup.compare((mean, torch.stack([grad for _, grad in got]).mean(0)))


@pytest.mark.parametrize("name", SUMS)
def test_two_sites_and_one_objective_each(name):
    setup = Setup(name)

    def model(x):
        for site, part in {"left": x[:2], "right": x[2:]}.items():
            with pyro.plate(f"rows of {site}", len(part)):
                pyro.sample(site, setup.law(), obs=part)

    setup.check(model)
    setup.objective = PerSite({"left": MAKERS[name](), "right": MAKERS[name]()})
    setup.check(model)


def test_bare_handler_inside_and_outside_an_elbo(setup):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", setup.law(), obs=x)

    scored = surrogate(model, {"x": setup.objective})
    inside = Trace_ELBO().differentiable_loss(scored, no_guide, setup.data)
    setup.compare(setup.valued(inside))
    outside = -poutine.trace(scored).get_trace(setup.data).log_prob_sum()
    setup.compare(setup.valued(outside))


def test_module_and_svi(setup):
    loss = setup.objective(setup.full, no_guide)(setup.data)
    assert loss.item() == pytest.approx(setup.loss, abs=1e-10)
    svi = SVI(setup.full, no_guide, pyro.optim.Adam({"lr": 0.05}), loss=setup.objective)
    losses = [svi.step(setup.data) for _ in range(20)]
    assert losses[0] == pytest.approx(setup.loss, abs=1e-10)
    assert losses[-1] < losses[0]


def bayesian(setup, mask=None):
    mask = torch.ones(NUM_ROWS, dtype=torch.bool) if mask is None else mask

    def model(x):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", setup.law(theta), obs=x)

    return model


def test_gradients_and_captured_graphs(setup):
    """vmap over parameters and a captured graph give what one evaluation at a time gives."""
    model = bayesian(setup, torch.arange(NUM_ROWS) < 4)
    law = setup.objective

    def potential(theta):
        run = poutine.condition(surrogate(model, law), {"theta": theta})
        return poutine.trace(run).get_trace(setup.data).log_prob_sum()

    points = torch.tensor([[0.5, 0.1], [-1.3, 0.2], [0.2, -0.3]])
    want = dist.Normal(0.0, 1.0).log_prob(points).sum(-1) - torch.stack(
        [law.row_losses(setup.law(t), setup.data[:4]).sum() for t in points]
    )
    one = [torch.func.grad_and_value(potential)(theta) for theta in points]
    torch.testing.assert_close(torch.stack([v for _, v in one]), want, rtol=0, atol=1e-10)
    batch = torch.func.vmap(torch.func.grad_and_value(potential))
    with pyro.validation_enabled(False):
        captured = make_fx(lambda theta: batch(theta))(points[[2, 0, 1]])
        many = [batch(points), captured(points)]
    for grads, values in many:
        torch.testing.assert_close(grads, torch.stack([g for g, _ in one]), rtol=0, atol=1e-10)
        torch.testing.assert_close(values, want, rtol=0, atol=1e-10)


def test_it_freezes_to_itself_and_serves_our_mcmc(setup):
    """Warnings are errors: the chains run in one batch, as a graph."""
    assert setup.objective.freeze(bayesian(setup), setup.data) is setup.objective
    target = surrogate(bayesian(setup), setup.objective)
    kernel = HMC(target, step_size=0.05, trajectory_length=0.2, adapt_step_size=False)
    mcmc = MCMC(kernel, 5, 0, num_chains=4, disable_progbar=True)
    mcmc.run(setup.data, initial_params={"theta": torch.zeros(4, 2)})
    assert mcmc.get_samples()["theta"].shape == (4, 5, 2)
    assert mcmc.target.is_vectorized
    assert not setup.objective.diagnostics  # nothing of a chain is kept


def test_stock_nuts_runs_it():
    setup = Setup("pl")
    kernel = pyro.infer.NUTS(surrogate(bayesian(setup), setup.objective), max_tree_depth=3)
    mcmc = pyro.infer.MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(setup.data)
    assert mcmc.get_samples()["theta"].shape == (3, 2)


@pytest.mark.parametrize("name", sorted(CONTINUOUS))
def test_data_computed_from_a_latent_receive_gradient(name):
    setup, shift = Setup(name), torch.zeros((), requires_grad=True)
    loss = setup.objective.row_losses(setup.law(), setup.data + shift).sum()
    (slope,) = torch.autograd.grad(loss, shift)
    step = 1e-5
    up, down = (
        setup.objective.row_losses(setup.law(), setup.data + d).sum() for d in (step, -step)
    )
    assert slope.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-6)


def test_latent_sites_are_learned_by_the_loss_and_sampled_by_their_energy():
    """Under the objective's own ELBO the parameters of a latent EBM see the surrogate only."""
    theta = torch.tensor(1.3, requires_grad=True)
    z = torch.tensor([0.4, -0.2])

    def model():
        with pyro.plate("rows", 2):
            pyro.sample("z", EnergyDistribution(lambda z: 0.5 * theta * z**2, event_shape=()))

    def guide():
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.Delta(z))

    loss = ScoreMatching().differentiable_loss(model, guide)
    (slope,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(slope, (theta * z**2 - 1).sum().detach())
    handled = poutine.trace(surrogate(model, ScoreMatching())).get_trace()
    assert isinstance(handled.nodes["z"]["fn"], EnergyDistribution)


def test_diagnostics_name_the_largest_ratio():
    setup = Setup("dfd")
    setup.objective.differentiable_loss(setup.full, no_guide, setup.data)
    flips = torch.stack([setup.data * (1 - 2 * torch.eye(3)[j]) for j in range(3)])
    law = setup.law()
    ratios = (law.energy(setup.data) - law.energy(flips)).abs()
    noted = setup.objective.diagnostics["x"]["largest_log_ratio"]
    torch.testing.assert_close(noted, ratios.max().detach())


@pytest.mark.parametrize("name", MAKERS)
def test_implicit_models_are_refused(name):
    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    law = GeneralizedEBM(lambda z: z, prior, lambda x: x.sum(-1))
    with pytest.raises(NotImplementedError, match="got"):
        MAKERS[name]().row_losses(law, torch.zeros(3))
