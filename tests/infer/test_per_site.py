"""One objective per site: the loss is the sum, and nothing is shared by accident."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_ebm import EnergyDistribution
from pyro_ebm.infer import KALE, NCE, EnergyDiscrepancy, PerSite


def quadratic(name):
    precision = pyro.param(name, torch.tensor(2.0, dtype=torch.float64))
    return EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())


def model(x, y):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", quadratic("a"), obs=x)
        pyro.sample("y", quadratic("b"), obs=y)


def guide(x, y):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros((), dtype=x.dtype), 1.5))


@pytest.fixture
def data():
    return torch.randn(2, 200, dtype=torch.float64)


def test_loss_is_the_sum_of_the_members(data):
    noise = dist.Normal(torch.zeros((), dtype=torch.float64), 1.5)
    nce, discrepancy = NCE(5, noise), EnergyDiscrepancy(0.5)
    total = PerSite({"x": nce, "y": discrepancy})
    pyro.set_rng_seed(1)
    together = total.loss(model, lambda x, y: None, *data)
    pyro.set_rng_seed(1)
    apart = -sum(
        objective.site_log_prob(name, quadratic(param), values).sum()
        for objective, name, param, values in (
            (nce, "x", "a", data[0]),
            (discrepancy, "y", "b", data[1]),
        )
    )
    torch.testing.assert_close(together, float(apart.detach()), rtol=1e-10, atol=0.0)


def test_guide_may_hold_one_contrast(data):
    loss = PerSite({"x": NCE(5), "y": EnergyDiscrepancy(1.0)})
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=loss)
    for _ in range(300):
        svi.step(*data)
    for param, values in zip(("a", "b"), data, strict=True):
        # The precision's maximum likelihood estimate has a relative standard error of .1 here.
        assert abs(float(pyro.param(param).detach() * values.square().mean()) - 1) < 0.25
    assert loss.log_normalizer("x").value.isfinite()
    assert sorted(loss.diagnostics) == ["x", "y"]


def test_members_count_steps(data):
    kale = KALE(schedule=(2, 1))
    noise = dist.Normal(torch.zeros((), dtype=torch.float64), 1.5)
    loss = PerSite({"x": NCE(2, noise), "y": kale})
    svi = SVI(model, both_guides, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    svi.step(*data)
    svi.step(*data)
    assert int(kale.num_steps_taken) == 2


def both_guides(x, y):
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(torch.zeros((), dtype=x.dtype), 1.5))


def test_a_site_without_an_objective_is_named(data):
    loss = PerSite({"x": NCE(2, dist.Normal(torch.zeros((), dtype=torch.float64), 1.5))})
    with pytest.raises(ValueError, match="no objective for EBM site 'y'"):
        loss.loss(model, lambda x, y: None, *data)


def test_freeze_says_how():
    with pytest.raises(NotImplementedError, match="freeze each objective"):
        PerSite({"x": NCE()}).freeze(model)
