r"""Generators that know the row are refused where draws of all rows are pooled.

For x | z with base N(z, 1) and energy :math:`q x^2 / 2` the truth q = 1 gives N(z/2, 1/2). Pooled
over z ~ N(0, 1), data are N(0, 3/4) and the base is N(0, 2), and q comes out as 4/3 - 1/2.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, PushforwardDistribution
from pyro_ebm.infer.divergences.kale import KALE, DonskerVaradhan
from pyro_ebm.infer.divergences.kernel_kale import KernelKALE
from pyro_ebm.infer.divergences.mmd import MMD
from pyro_ebm.infer.divergences.wasserstein import WassersteinCritic

OBJECTIVES = {
    "kale": KALE,
    "dv": DonskerVaradhan,
    "critic": lambda: WassersteinCritic(schedule=(1, 1)),
    "mmd": MMD,
    "kernel kale": KernelKALE,
}
CONTEXT = torch.linspace(-1.0, 1.0, 12)
SHIFT = torch.tensor(0.1, requires_grad=True)
GENERATORS = {
    "generator": (lambda e: e + CONTEXT + SHIFT, dist.Normal(torch.zeros(12), 1.0)),
    "prior": (lambda e: e + SHIFT, dist.Normal(CONTEXT, 1.0)),
}


def no_guide(*args):
    return None


def loss_of(objective, x, law, held=None):
    """The loss of data at a site, with what the guide holds there."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", held)

    return objective.differentiable_loss(model, no_guide if held is None else guide, x)


def square(x):
    return 0.5 * x**2


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("place", GENERATORS)
@pytest.mark.parametrize("in_guide", [False, True])
def test_one_law_for_all_rows(name, place, in_guide):
    generator, prior = GENERATORS[place]
    held = PushforwardDistribution(generator, prior, event_shape=()) if in_guide else None

    def law(**options):
        if in_guide:
            return EnergyDistribution(square, event_shape=(), **options)
        return GeneralizedEBM(generator, prior, square, event_shape=(), **options)

    who = type(OBJECTIVES[name]()).__name__
    message = f"generator of EBM site 'x' depends on row-wise .* latent, but {who} pools"
    with pytest.raises(ValueError, match=message):
        loss_of(OBJECTIVES[name](), torch.randn(12), law(), held)
    told = loss_of(OBJECTIVES[name](), torch.randn(12), law(conditional=False), held)
    assert told.isfinite()


def test_pooled_draws_of_many_laws_bend_the_energy():
    """By the slope of Donsker-Varadhan in q, of standard error .0016: 0 there, .042 at 1."""
    torch.manual_seed(0)
    z = torch.randn(200_000, dtype=torch.float64)
    x = z / 2 + torch.randn_like(z) / 2**0.5

    def slope(at):
        q = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        prior = dist.Normal(torch.zeros_like(z), 1.0)
        law = GeneralizedEBM(lambda e: z + e, prior, lambda x: q * square(x), conditional=False)
        return torch.autograd.grad(loss_of(DonskerVaradhan(), x, law) / len(x), q)[0].item()

    assert abs(slope(4 / 3 - 1 / 2)) < 0.01
    assert slope(1.0) > 0.03


def test_laws_of_rows_and_contexts_together():
    """A critic that sees the context compares pairs, and a log Z of every row weighs each."""
    generator, prior = GENERATORS["generator"]
    x = torch.randn(12)
    sees = GeneralizedEBM(generator, prior, lambda x: square(x - CONTEXT), event_shape=())
    assert loss_of(WassersteinCritic(schedule=(1, 1)), x, sees).isfinite()
    known = GeneralizedEBM(
        generator, prior, square, event_shape=(), log_normalizer=lambda: square(CONTEXT)
    )
    assert loss_of(KALE(), x, known).isfinite()
    with pytest.raises(ValueError, match="but DonskerVaradhan pools all rows"):
        loss_of(DonskerVaradhan(), x, known)


def test_when_frozen():
    generator, prior = GENERATORS["generator"]

    def model(x):
        q = pyro.sample("q", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            law = GeneralizedEBM(generator, prior, lambda x: q * square(x), event_shape=())
            pyro.sample("x", law, obs=x)

    with pytest.raises(ValueError, match="but KALE pools all rows"):
        KALE().freeze(model, torch.randn(12))
