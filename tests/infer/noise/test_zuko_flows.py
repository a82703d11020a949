"""Flows of zuko as contrasts: torch distributions without a support, wrapped by Pyro.

A stand-in with their interface is compared with the same flow as a ``TransformedDistribution``;
where zuko is installed, its own flows are trained against a known law.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI
from torch import nn
from torch.distributions import Distribution, constraints, transforms

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer import NCE, RankingNCE
from pyro_ebm.infer.noise.flow_contrastive import FlowContrastive

FLOW_TURN = {"schedule": (0, 1), "mle_weight": 0.5}
BOTH = {"simultaneous": True, "mle_weight": 0.5}


class NormalizingFlow(Distribution):
    """What zuko has by this name: ``transform`` goes from x to z, and there is no support."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, transform, base):
        self.transform, self.base = transform, base
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape):
        return NormalizingFlow(self.transform, self.base.expand(batch_shape))

    def rsample(self, shape=()):
        return self.transform.inv(self.base.rsample(shape))

    def log_prob(self, x):
        z = self.transform(x)
        return self.base.log_prob(z) + self.transform.log_abs_det_jacobian(x, z)

    def rsample_and_log_prob(self, shape=()):
        x = self.rsample(shape)
        return x, self.log_prob(x)


class StandIn(nn.Module):
    """A module that makes a flow when it is called, as zuko's are."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.5, -0.3]))
        self.log_scale = nn.Parameter(torch.tensor([0.2, 0.4]))

    def to_x(self):
        return transforms.AffineTransform(self.loc, self.log_scale.exp(), event_dim=1)

    def start(self):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def forward(self):
        return NormalizingFlow(self.to_x().inv, self.start())

    def as_pyro_has_it(self):
        return dist.TransformedDistribution(self.start(), [self.to_x()])


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.precision = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, x):
        return 0.5 * (self.precision * x**2).sum(-1)


def model_of(energy):
    def model(x):
        pyro.module("energy", energy)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(energy, event_shape=(2,)), obs=x)

    return model


def guide_of(flow, law):
    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", law())

    return guide


def no_guide(x):
    return None


def loss_and_gradients(objective, guide, flow, energy):
    pyro.set_rng_seed(3)
    data = torch.randn(20, 2)
    loss = objective.differentiable_loss(model_of(energy), guide, data)
    players = [*energy.parameters(), *flow.parameters()]
    return loss, torch.autograd.grad(loss, players, allow_unused=True)


# --- the same numbers as with Pyro's own flow


@pytest.mark.parametrize("options", [{}, FLOW_TURN, BOTH], ids=["energy", "flow", "both"])
def test_a_wrapped_flow_is_the_flow(options):
    """Loss and both players' gradients."""
    flow, energy = StandIn(), Quadratic()
    laws = (lambda: ZukoToPyro(flow()), flow.as_pyro_has_it)
    have, want = (
        loss_and_gradients(FlowContrastive(**options), guide_of(flow, law), flow, energy)
        for law in laws
    )
    torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
    assert have[1][1 if options else 0].abs().min() > 1e-3


@pytest.mark.parametrize("make", [NCE, RankingNCE])
def test_noise_that_is_held(make):
    """In the guide or given to the objective, wrapped or as zuko makes it."""
    flow, energy = StandIn(), Quadratic()
    wrapped = guide_of(flow, lambda: ZukoToPyro(flow()))
    ways = [(None, wrapped), (flow(), no_guide), (ZukoToPyro(flow()), no_guide)]
    found = [loss_and_gradients(make(3, noise), g, flow, energy) for noise, g in ways]
    own = make(3, flow.as_pyro_has_it())
    want = loss_and_gradients(own, no_guide, flow, energy)
    for (_, guide), have in zip(ways, found, strict=True):
        if guide is no_guide:  # a guide's own draw moves the generator on
            torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
        assert all(g is None for g in have[1][1:])


# --- what is refused


def scored(law, p=None):
    p = p or EnergyDistribution(Quadratic(), event_shape=(2,))
    with torch.no_grad():
        return NCE(2, law).draw(p, torch.ones(3, 2), None)


def test_a_module_is_no_distribution():
    with pytest.raises(TypeError, match=r"NCE must be a distribution, got StandIn.*call.*flow\(\)"):
        scored(StandIn())


def test_the_support_is_where_the_transform_starts():
    start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    to_reals = transforms.ComposeTransform([transforms.ExpTransform().inv])
    on_positives = NormalizingFlow(transforms.IndependentTransform(to_reals, 1), start)
    with pytest.raises(ValueError, match=r"lives on .*GreaterThan.*, the EBM on .*Real"):
        scored(on_positives)
    support = constraints.independent(constraints.positive, 1)
    p = EnergyDistribution(Quadratic(), support=support, event_shape=(2,))
    assert (scored(on_positives, p).points > 0).all()


def test_no_support_at_all():
    """Neither a transform, nor one that the base fills."""
    half = NormalizingFlow(StandIn().to_x().inv, dist.HalfNormal(torch.ones(2)).to_event(1))
    alone = StandIn()()
    del alone.transform
    for law in (half, alone):
        with pytest.raises(ValueError, match="NormalizingFlow, has no support.*property support"):
            scored(law)


# --- zuko itself


@pytest.fixture
def zuko(monkeypatch):
    """Importing zuko changes torch's distributions for the whole process: undone after the test."""
    monkeypatch.setattr(Distribution, "_validate_args", False)
    monkeypatch.setattr(Distribution, "arg_constraints", {})
    return pytest.importorskip("zuko")


@pytest.mark.slow  # half a minute: flows of zuko are networks of some depth
@pytest.mark.parametrize("options", [{"mle_weight": 0.2}, {"simultaneous": True}])
def test_a_flow_of_zuko_and_an_energy_learn_from_each_other(zuko, options):
    """Data from N(0, diag(1, 0.36)): the precisions and log Z, and the flow's likelihood."""
    torch.manual_seed(1)
    flow, energy = zuko.flows.MAF(2, transforms=1, hidden_features=(8,)), Quadratic()
    data = torch.randn(500, 2) * torch.tensor([1.0, 0.6])
    objective = FlowContrastive(c_update="closed_form", c_rate=0.2, **options)
    guide = guide_of(flow, lambda: ZukoToPyro(flow()))
    svi = SVI(model_of(energy), guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    before = flow().log_prob(data).mean().item()
    for _ in range(150):
        svi.step(data)
    assert flow().log_prob(data).mean().item() > before + 0.1  # of 0.19
    found = energy.precision.detach()
    torch.testing.assert_close(found, 1 / data.square().mean(0), rtol=0.25, atol=0)
    log_z = torch.log(2 * torch.pi / found.prod().sqrt())
    torch.testing.assert_close(objective.log_normalizer("x").value, log_z, rtol=0, atol=0.15)
