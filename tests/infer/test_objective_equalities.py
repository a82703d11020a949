"""One loss in many guises: the ways to write a model do not change what is minimized.

With draws tied to rows, the loss and its gradient on the full data equal the mean over all
subsamples, the padded and masked data, nested plates, two half sites, a torch module, a fit's first
step and the formula written out by hand. Donsker-Varadhan takes the log of a mean over the draws of
all rows together: whatever keeps that pool together keeps the equality, splitting it can only lower
the loss.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import (
    KALE,
    NCE,
    ConditionalNCE,
    DonskerVaradhan,
    EnergyDiscrepancy,
    RankingNCE,
    SelfNormalized,
    TelescopingNCE,
    fit,
)
from pyro_ebm.poutine import surrogate

NUM_ROWS = 6
C = 0.3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return self.bridges(x).sum(0)

    def bridges(self, x):
        return torch.stack([self.layers(x).squeeze(-1), 0.1 * x.square().sum(-1)])


class Shifted:
    """A net's energy plus a value, which each of its two bridges shares."""

    def __init__(self, net, by):
        self.net, self.by = net, by

    def __call__(self, x):
        return self.net(x) + self.by

    def bridges(self, x):
        return self.net.bridges(x) + self.by / 2


def no_guide(*args, **kwargs):
    return None


class Setup:
    """A net, data, an objective with draws tied to rows, and the loss on full data."""

    def __init__(self, make, attach):
        self.net = Net()
        self.data = torch.randn(NUM_ROWS, 2)
        self.objective = make()
        self.whole = attach(self.objective, self.ebm().expand([NUM_ROWS]), self.data)
        self.loss, self.grads = self.evaluate(self.full)

    def ebm(self):
        base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        return EnergyDistribution(self.net, base=base, conditional=False)

    def full(self, x):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.ebm(), obs=x)

    def hold_c(self, *sites):
        """Gives the objective a log Z for each site, all with one value."""
        if self.objective.learns_log_normalizer:
            for site in sites:
                self.objective.log_normalizers[site] = nn.Parameter(torch.tensor(C))

    def evaluate(self, model, *args, guide=no_guide, sites=("x",)):
        """Returns the loss and the gradients to the net and to log Z, summed over sites."""
        self.hold_c(*sites)
        loss = self.objective.differentiable_loss(model, guide, *(args or (self.data,)))
        return loss.item(), self.gradients(loss, sites)

    def gradients(self, loss, sites=("x",)):
        own = list(self.net.parameters())
        held = [self.objective.log_normalizers[s] for s in sites if self.objective.log_normalizers]
        grads = torch.autograd.grad(loss, own + held, allow_unused=True)
        flat = torch.cat([g.flatten() for g in grads[: len(own)] if g is not None])
        return torch.cat([flat, torch.stack(grads[len(own) :]).sum()[None]]) if held else flat

    def check(self, loss, grads):
        assert loss == pytest.approx(self.loss, abs=1e-10)
        torch.testing.assert_close(grads, self.grads, rtol=0, atol=1e-10)


def stabilized():
    with pytest.warns(SurrogateWarning, match="biased"):
        return EnergyDiscrepancy(time=0.7, num_negatives=3, stabilization=0.5)


def shrunk(x):
    """A law of noisy copies that is not symmetric."""
    return dist.Normal(0.5 * x + 0.2, 1.1).to_event(1)


ADDITIVE = {
    "nce": lambda: NCE(num_noise=3),
    "nce, fractional": lambda: NCE(num_noise=1.5),
    "ranking": lambda: RankingNCE(num_noise=3),
    "conditional nce": lambda: ConditionalNCE(num_noise=3, unit=1.5),
    "conditional nce, law": lambda: ConditionalNCE(num_noise=3, noise=shrunk),
    "telescoping": lambda: TelescopingNCE(num_bridges=2),
    "self-normalized": lambda: SelfNormalized(num_noise=3, c_update="gradient"),
    "ed": lambda: EnergyDiscrepancy(time=0.7, num_negatives=3),
    "ed, times": lambda: EnergyDiscrepancy(time=(0.1, 2.0), num_negatives=2),
    "ed, stabilized": stabilized,
    "kale": lambda: KALE(c_update="gradient"),
    "kale, many draws": lambda: KALE(num_base=3 * NUM_ROWS, c_update="gradient"),
    "kale, penalty": lambda: KALE(gradient_penalty=0.5, c_update="gradient"),
}
POOLED = {
    "dv": lambda: DonskerVaradhan(num_base=2 * NUM_ROWS),
    "dv, penalty": lambda: DonskerVaradhan(gradient_penalty=0.5),
}


@pytest.fixture(params=ADDITIVE | POOLED)
def setup(request, attach):
    return Setup((ADDITIVE | POOLED)[request.param], attach)


@pytest.fixture(params=ADDITIVE)
def additive(request, attach):
    return Setup(ADDITIVE[request.param], attach)


# --- what holds for every objective


def by_hand(name, setup):
    """The total loss in nats, one row at a time."""
    net, x, contrast = setup.net, setup.data, setup.whole
    base = dist.Normal(torch.zeros(2), 1.5).to_event(1)

    def potential(z):
        return net(z) - base.log_prob(z)

    c = setup.objective.log_normalizers["x"] if setup.objective.log_normalizers else None
    total = torch.zeros(())
    for i in range(NUM_ROWS):
        draws = [points[i] for points in contrast.points]
        if name.startswith("nce"):
            nu = setup.objective.num_noise
            logit = [-net(z) - c - math.log(nu) for z in (x[i], *draws)]  # the base is the noise
            noise = sum(-torch.log1p(-torch.sigmoid(s)) for s in logit[1:]) / len(draws)
            total = total - torch.log(torch.sigmoid(logit[0])) + nu * noise
        elif name.startswith("conditional nce"):
            for z in draws:
                logit = potential(z) - potential(x[i])
                if name.endswith("law"):
                    logit = logit + shrunk(x[i]).log_prob(z) - shrunk(z).log_prob(x[i])
                total = total - torch.log(torch.sigmoid(logit)) / len(draws)
        elif name == "telescoping":
            for k, (before, after) in enumerate(itertools.pairwise([x[i], *draws])):
                near, far = (-net.bridges(z)[k] - c / 2 for z in (before, after))
                total = total - 0.5 * torch.log(torch.sigmoid(near) * torch.sigmoid(-far))
        elif name == "self-normalized":
            total = total + potential(x[i])
        elif name == "ranking":
            weights = torch.stack([torch.exp(-net(z)) for z in (x[i], *draws)])
            total = total - torch.log(weights[0] / weights.sum())
        elif name.startswith("ed"):
            ratios = [torch.exp(potential(x[i]) - potential(z)) for z in draws]
            w = setup.objective.stabilization
            total = total + torch.log(w / len(draws) + sum(ratios) / len(draws))
        else:
            total = total + net(x[i])
        if getattr(contrast, "between", None) is not None:
            z = contrast.between[i].clone().requires_grad_()
            (slope,) = torch.autograd.grad(net(z), z, create_graph=True)
            total = total + 0.5 * (slope**2).sum()
    masses = torch.exp(-net(contrast.points)).mean()  # the base is the proposal
    if name.startswith("kale") or name == "self-normalized":
        total = total + NUM_ROWS * (c + masses * torch.exp(-c) - 1)
    if name.startswith("dv"):
        total = total + NUM_ROWS * torch.log(masses)
    return total


@pytest.mark.parametrize("name", ADDITIVE | POOLED)
def test_formula_by_hand(name, attach):
    setup = Setup((ADDITIVE | POOLED)[name], attach)
    loss = by_hand(name, setup)
    setup.check(loss.item(), setup.gradients(loss))


def test_condition_instead_of_obs(setup):
    def model(x):
        pyro.module("net", setup.net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", setup.ebm())

    setup.check(*setup.evaluate(poutine.condition(model, {"x": setup.data})))


def test_expand_and_true_mask(setup):
    def model(x):
        pyro.module("net", setup.net)
        with pyro.plate("data", len(x)), poutine.mask(mask=True):
            pyro.sample("x", setup.ebm().expand([len(x)]).mask(True), obs=x)

    setup.check(*setup.evaluate(model))


def test_to_event(setup):
    def model(x):
        pyro.module("net", setup.net)
        pyro.sample("x", setup.ebm().expand([len(x)]).to_event(1), obs=x)

    setup.check(*setup.evaluate(model))


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_nested_plates(setup, shape):
    def model(x):
        pyro.module("net", setup.net)
        with pyro.plate("outer", shape[0], dim=-2), pyro.plate("inner", shape[1], dim=-1):
            pyro.sample("x", setup.ebm(), obs=x)

    setup.check(*setup.evaluate(model, setup.data.reshape(*shape, 2)))


@pytest.mark.parametrize("padding", [float("nan"), 1e3, 0.0])
@pytest.mark.parametrize("how", ["handler", "method", "both", "inside to_event"])
def test_masked_padding(setup, padding, how):
    """Padding is never looked at: not by the energy, not by what is pooled over rows."""
    x = torch.cat([setup.data, torch.full((4, 2), padding)])[torch.randperm(10)]
    mask = x[:, 0].isfinite() & (x[:, 0] != padding)
    half = torch.arange(10) < 5

    def model(x):
        pyro.module("net", setup.net)
        if how == "inside to_event":
            pyro.sample("x", setup.ebm().expand([10]).mask(mask).to_event(1), obs=x)
            return
        outer, inner = {"handler": (mask, True), "method": (True, mask)}.get(
            how, (mask | half, mask | ~half)
        )
        with pyro.plate("data", len(x)), poutine.mask(mask=outer):
            pyro.sample("x", setup.ebm().mask(inner), obs=x)

    setup.check(*setup.evaluate(model, x))


def test_masked_padding_does_not_change_the_diagnostics(setup):
    """Means are over the rows that count, and so is the share of weights that are effective."""
    x = torch.cat([setup.data, torch.full((4, 2), 7.0)])[torch.randperm(10)]

    def model(x):
        pyro.module("net", setup.net)
        with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] != 7.0):
            pyro.sample("x", setup.ebm(), obs=x)

    want = dict(setup.objective.diagnostics["x"])
    setup.objective.diagnostics.clear()
    setup.evaluate(model, x)
    assert want
    torch.testing.assert_close(setup.objective.diagnostics["x"], want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("vectorized", [False, True])
def test_particles(setup, vectorized):
    setup.objective.num_particles = 3
    setup.objective.vectorize_particles = vectorized
    setup.objective.max_plate_nesting = 2 if vectorized else math.inf
    setup.check(*setup.evaluate(setup.full))


def test_guessed_plate_nesting(setup):
    setup.objective.num_particles = 2
    setup.objective.vectorize_particles = True
    setup.check(*setup.evaluate(setup.full))
    assert setup.objective.max_plate_nesting == 2


def test_elbo_module(setup):
    setup.hold_c("x")
    loss = setup.objective(setup.full, no_guide)(setup.data)
    setup.check(loss.item(), setup.gradients(loss))


def test_loss_and_grads(setup):
    """What SVI calls: gradients are deposited, stale ones do not add up."""
    setup.hold_c("x")
    for p in setup.net.parameters():
        p.grad = torch.full_like(p, 7.0)
    loss = setup.objective.loss_and_grads(setup.full, no_guide, setup.data)
    held = [v.grad[None] for v in setup.objective.log_normalizers.values()]
    own = [p.grad.flatten() for p in setup.net.parameters() if p.grad is not None]
    setup.check(loss, torch.cat([*own, *held]))


def test_bare_handler_under_a_stock_elbo(setup):
    setup.hold_c("x")
    model = surrogate(setup.full, {"x": setup.objective})
    loss = Trace_ELBO().differentiable_loss(model, no_guide, setup.data)
    setup.check(loss.item(), setup.gradients(loss))


def test_first_step_of_fit(setup):
    """A step of plain gradient descent is the gradient per datum, tenfold for log Z."""
    setup.hold_c("x")
    before = torch.cat([p.detach().flatten().clone() for p in setup.net.parameters()])
    result = fit(
        setup.full,
        setup.data,
        setup.objective,
        optim=torch.optim.SGD,
        lr=0.5,
        num_steps=1,
        disable_progbar=True,
    )
    after = torch.cat([p.detach().flatten() for p in setup.net.parameters()])
    assert result.losses == [pytest.approx(setup.loss / NUM_ROWS, abs=1e-12)]
    moved = (before - after) / 0.5 * NUM_ROWS
    moved = moved[: len(setup.grads)]  # the last bias is a free constant of some objectives
    if setup.objective.log_normalizers:
        c = setup.objective.log_normalizers["x"].detach()
        moved = torch.cat([moved, ((C - c) / 5.0 * NUM_ROWS)[None]])
    torch.testing.assert_close(moved, setup.grads, rtol=0, atol=1e-10)


def test_evaluation_moves_nothing(setup):
    """Without gradients neither log Z nor the count of steps changes."""
    setup.hold_c("x")
    steps = int(setup.objective.num_steps_taken)
    svi = SVI(setup.full, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=setup.objective)
    assert svi.evaluate_loss(setup.data) == pytest.approx(setup.loss, abs=1e-10)
    assert int(setup.objective.num_steps_taken) == steps
    assert all(float(c.detach()) == C for c in setup.objective.log_normalizers.values())


def test_global_latent_keeps_its_elbo_terms(setup):
    """The loss is the surrogate at the guide's value, plus log q - log p of the latent."""
    shift = torch.tensor(0.4)

    def model(x):
        pyro.module("net", setup.net)
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(Shifted(setup.net, z - shift), base=setup.ebm().base)
            pyro.sample("x", ebm, obs=x)

    def guide(x):
        pyro.sample("z", dist.Delta(shift, log_density=torch.tensor(0.7)))

    loss, grads = setup.evaluate(model, guide=guide)
    prior = dist.Normal(0.0, 2.0).log_prob(shift).item()
    setup.check(loss + prior - 0.7, grads)


# --- what holds for sums over rows


@pytest.mark.parametrize("size", [1, 2, 4])
def test_mean_over_all_subsamples(additive, size):
    def model(x, rows):
        pyro.module("net", additive.net)
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", additive.ebm(), obs=x[rows])

    runs = [
        additive.evaluate(model, additive.data, torch.tensor(rows))
        for rows in itertools.combinations(range(NUM_ROWS), size)
    ]
    losses, grads = zip(*runs, strict=True)
    assert max(losses) - min(losses) > 1e-3
    additive.check(sum(losses) / len(losses), torch.stack(grads).mean(0))


@pytest.mark.parametrize("cut", [3, 2])
def test_two_sites(additive, cut):
    def model(x):
        pyro.module("net", additive.net)
        for site, part in {"left": x[:cut], "right": x[cut:]}.items():
            with pyro.plate(f"rows of {site}", len(part)):
                pyro.sample(site, additive.ebm(), obs=part)

    additive.check(*additive.evaluate(model, sites=("left", "right")))


def test_rows_in_a_python_loop(additive):
    def model(x):
        pyro.module("net", additive.net)
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"x{i}", additive.ebm(), obs=x[i])

    sites = [f"x{i}" for i in range(NUM_ROWS)]
    additive.check(*additive.evaluate(model, sites=sites))


def test_scale_multiplies_the_loss(additive):
    loss, grads = additive.evaluate(poutine.scale(additive.full, scale=0.5))
    additive.check(2 * loss, 2 * grads)


# --- what holds for a pool of draws


@pytest.mark.parametrize("name", POOLED)
def test_splitting_the_pool_lowers_the_bound_on_log_z(name, attach):
    """Jensen: a mean of logs of parts is below the log of the mean. So subsamples are biased, by
    design.
    """
    setup = Setup(POOLED[name], attach)

    def model(x, rows):
        pyro.module("net", setup.net)
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", setup.ebm(), obs=x[rows])

    losses = [
        setup.evaluate(model, setup.data, torch.tensor(rows))[0]
        for rows in itertools.combinations(range(NUM_ROWS), 2)
    ]
    assert sum(losses) / len(losses) < setup.loss - 1e-4


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("size", [1, 3])
def test_one_pool_for_every_subsample(name, size, attach):
    setup = Setup(POOLED[name], attach)
    if setup.whole.between is not None:
        setup.objective.gradient_penalty = 0.0
    whole = setup.whole.points

    def draw(p, x, noise):  # all draws beside every row
        rows = x.shape[:-1]
        pool = whole.reshape(-1, *(1,) * len(rows), 2).expand(-1, *rows, 2)
        return setup.whole._replace(points=pool)

    setup.objective.draw = draw
    setup.loss, setup.grads = setup.evaluate(setup.full)

    def model(x, rows):
        pyro.module("net", setup.net)
        with pyro.plate("data", NUM_ROWS, subsample=rows):
            pyro.sample("x", setup.ebm(), obs=x[rows])

    runs = [
        setup.evaluate(model, setup.data, torch.tensor(rows))
        for rows in itertools.combinations(range(NUM_ROWS), size)
    ]
    losses, grads = zip(*runs, strict=True)
    setup.check(sum(losses) / len(losses), torch.stack(grads).mean(0))


# --- the contrast that a guide holds


SHIFTED = [EnergyDiscrepancy, ConditionalNCE]  # by the guide's law, from the data


@pytest.mark.filterwarnings("ignore:.*noise does not cover the data")
@pytest.mark.parametrize("make", [NCE, RankingNCE, KALE, DonskerVaradhan, SelfNormalized, *SHIFTED])
def test_contrast_of_the_guide_follows_the_subsample(make):
    """Rows of the mini-batch meet the guide's parameters of the same rows, not others'."""
    centres = torch.arange(20.0) * 100.0
    data = centres + 1.0
    seen = []

    def model(x):
        with pyro.plate("data", 20, subsample_size=4) as rows:
            ebm = EnergyDistribution(lambda y: 0.5 * torch.tanh(y / 900) ** 2, event_shape=())
            seen.append(rows)
            pyro.sample("x", ebm, obs=x[rows])

    def guide(x):
        with pyro.plate("data", 20, subsample_size=4) as rows:
            pyro.sample("x", dist.Normal(centres[rows], 1e-3))

    objective = make()
    inner, contrasts = objective.draw, []

    def draw(p, x, noise):
        contrasts.append(inner(p, x, noise))
        return contrasts[-1]

    objective.draw = draw
    loss = objective.differentiable_loss(model, guide, data)
    assert loss.isfinite()
    (contrast,), rows = contrasts, seen[-1]
    want = data[rows] if make in SHIFTED else centres[rows]
    torch.testing.assert_close(
        contrast.points, want.expand(contrast.points.shape), rtol=0, atol=0.02
    )
    if make not in SHIFTED:
        log_q = dist.Normal(centres[rows], 1e-3).log_prob(contrast.points)
        torch.testing.assert_close(contrast.log_noise, log_q, rtol=0, atol=1e-10)


def test_contrast_of_the_guide_is_no_variational_factor(attach):
    """The density of the guide's own draw of the contrast is not in the loss."""
    data = torch.randn(5)
    objective = RankingNCE(num_noise=2)

    def model(x):
        with pyro.plate("data", 5):
            pyro.sample("x", EnergyDistribution(lambda y: y**2, event_shape=()), obs=x)

    def guide(x):
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(0.0, 2.0))

    noise = dist.Normal(0.0, 2.0)
    contrast = attach(
        objective, EnergyDistribution(lambda y: y**2, event_shape=()), data, noise=noise
    )
    loss = objective.differentiable_loss(model, guide, data)
    points = torch.cat([data[None], contrast.points])
    scores = -(points**2) - noise.log_prob(points)
    torch.testing.assert_close(loss, -torch.log_softmax(scores, 0)[0].sum(), rtol=0, atol=1e-10)


def test_guide_may_wrap_its_contrast_as_the_model_does():
    """``to_event`` on both sides: rows of the site are told from each other inside the event."""
    data = torch.randn(3)

    def model(x):
        ebm = EnergyDistribution(lambda y: 0.5 * y**2, event_shape=())
        pyro.sample("x", ebm.expand([3]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("x", dist.Normal(0.0, 1.5).expand([3]).to_event(1))

    nce = NCE(num_noise=4)
    inner, contrasts = nce.draw, []
    nce.draw = lambda *args: contrasts.append(inner(*args)) or contrasts[-1]
    nce.differentiable_loss(model, guide, data)
    assert contrasts[0].points.shape == (4, 3)
    assert contrasts[0].log_noise.shape == (4, 3)
