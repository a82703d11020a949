"""One objective per site: the loss is the sum, and nothing is shared by accident."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.infer import (
    KALE,
    NCE,
    ContrastiveDivergence,
    DonskerVaradhan,
    EnergyDiscrepancy,
    PerSite,
    fit,
)


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


@pytest.mark.parametrize("given", [NCE, pyro.infer.Trace_ELBO()], ids=["a class", "an ELBO"])
def test_what_is_no_objective_is_told(given):
    with pytest.raises(TypeError, match=r"an objective per site, such as NCE\(\), got {'x'"):
        PerSite({"x": given})


def test_freeze_says_how():
    with pytest.raises(NotImplementedError, match="freeze each objective"):
        PerSite({"x": NCE()}).freeze(model)


# --- what members decide is decided for all


def test_a_loss_that_ranks_nothing_makes_the_sum_rank_nothing():
    assert PerSite({"x": NCE(), "y": EnergyDiscrepancy(1.0)}).is_held_out_criterion
    assert not PerSite({"x": NCE(), "y": ContrastiveDivergence(1)}).is_held_out_criterion
    assert not PerSite({"x": NCE(), "y": KALE(schedule=(2, 1))}).is_held_out_criterion


def test_members_that_cannot_be_replayed_are_not_replayed(data):
    noise = NCE(5, "gaussian", refit_every=7, refit_to="model")
    loss = PerSite({"x": noise, "y": EnergyDiscrepancy(0.5)})
    with pytest.raises(ValueError, match="decides from step to step"):
        fit(model, tuple(data), loss, capture=True, num_steps=5, disable_progbar=True)


def test_a_players_turn_is_replayed_as_such():
    """The generator's steps are 5 of 6, where no comparison with the model falls."""
    x = torch.randn(40, 1) * 0.5 + 1.0

    def trained(capture):
        pyro.clear_param_store()
        torch.manual_seed(0)
        generator = nn.Linear(1, 1)
        network = nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 1), nn.Flatten(-2))
        prior = dist.Normal(torch.zeros(1), 1.0).to_event(1)

        def game(x):
            pyro.module("generator", generator)
            pyro.module("network", network)
            with pyro.plate("data", len(x)):
                pyro.sample("x", GeneralizedEBM(generator, prior, network), obs=x)

        start = generator.weight.item()
        loss = PerSite({"x": DonskerVaradhan(schedule=(5, 1))})
        fit(game, x, loss, num_steps=40, seed=1, capture=capture, disable_progbar=True)
        return start, generator.weight.item()

    (start, plain), (_, captured) = trained(False), trained(True)
    assert captured == pytest.approx(plain, abs=1e-6)
    assert abs(plain - start) > 1e-3
