"""What an objective fits to its first batch is fitted to every site by itself, kept and saved."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.infer.divergences.mmd import MMD
from pyro_ebm.infer.noise.conditional_nce import ConditionalNCE
from pyro_ebm.infer.noise.nce import NCE, RankingNCE
from pyro_ebm.infer.noise.telescoping import BridgeEnergy, TelescopingNCE
from pyro_ebm.infer.scoring.per_site import PerSite
from pyro_ebm.infer.training.fit import fit

TIMES = 100.0  # how much wider the second site's data are
BASE = dist.Normal(0.0, 1.0)
SHIFT = torch.tensor(0.1, requires_grad=True)
BRIDGES = BridgeEnergy(lambda x: torch.stack([x, x**2], -1), num_bridges=2)


def quadratic() -> EnergyDistribution:
    return EnergyDistribution(lambda x: 0.5 * x**2, event_shape=())


@dataclass
class Case:
    """An objective that fits, the law it serves, and what is fitted in proportion to the data.

    ``size`` reads that from ``objective.fitted[site]``.
    """

    make: Callable[[], Any]
    law: Callable[[], EnergyDistribution]
    size: Callable[[Any], Any]


CASES = {
    "nce": Case(lambda: NCE(num_noise=2, noise="gaussian"), quadratic, lambda found: found[1]),
    "ranking": Case(
        lambda: RankingNCE(num_noise=2, noise="gaussian"), quadratic, lambda found: found[1]
    ),
    "cnce": Case(lambda: ConditionalNCE(), quadratic, lambda found: found[1]),
    "mmd": Case(
        lambda: MMD(),
        lambda: GeneralizedEBM(lambda z: z + SHIFT, BASE, lambda x: x**2),
        lambda found: found[1],
    ),
}


def two_sites(law: Callable[[], EnergyDistribution]) -> Callable[[Tensor, Tensor], None]:
    def model(first: Tensor, second: Tensor) -> None:
        for name, x in {"first": first, "second": second}.items():
            with pyro.plate(f"rows of {name}", len(x)):
                pyro.sample(name, law(), obs=x)

    return model


def no_guide(*args: Tensor) -> None:
    return None


def loss_of(objective: Any, law: Any, *data: Tensor) -> Tensor:
    return objective.differentiable_loss(two_sites(law), no_guide, *data)


@pytest.mark.parametrize("name", CASES)
def test_two_sites_of_different_scale_are_fitted_each(name):
    """The second site's data are a hundred times the first's, and so is what is fitted to them."""
    case, x = CASES[name], torch.randn(60)
    objective = case.make()
    loss_of(objective, case.law, x, TIMES * x)
    first, second = (case.size(objective.fitted[site]) for site in ("first", "second"))
    torch.testing.assert_close(torch.as_tensor(second), torch.as_tensor(TIMES * first))


@pytest.mark.parametrize("name", CASES)
def test_what_is_fitted_is_that_of_the_site_alone(name):
    """The order of the sites does not count, nor whether there is another one."""
    case, x = CASES[name], torch.randn(60)
    both, alone = case.make(), case.make()
    loss_of(both, case.law, 0.01 * x + 3.0, x)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("second", case.law(), obs=x)

    alone.differentiable_loss(model, no_guide, x)
    wanted, have = (torch.as_tensor(case.size(o.fitted["second"])) for o in (alone, both))
    assert torch.equal(wanted, have)


def test_waymarks_are_spaced_on_every_site():
    """The nearer the data to a point, the earlier the first of two geometric steps ends."""
    objective = TelescopingNCE(2)
    x = torch.randn(200)
    loss_of(objective, lambda: EnergyDistribution(BRIDGES, base=BASE), 0.3 * x, 0.003 * x)
    first, second = (float(objective.fitted[site][0]) for site in ("first", "second"))
    assert second == pytest.approx(first / 10, rel=0.3)  # geometric: as the root of the spread


def test_the_loss_is_the_sum_of_two_objectives():
    """One objective for both sites is one for each, with the draws shared."""
    x, y = torch.randn(40), 30.0 + 9.0 * torch.randn(40)
    losses = []
    for objective in (
        RankingNCE(noise="gaussian"),
        PerSite({site: RankingNCE(noise="gaussian") for site in ("first", "second")}),
    ):
        pyro.set_rng_seed(3)
        losses.append(loss_of(objective, quadratic, x, y))
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", CASES)
def test_both_sites_are_saved(name):
    """Through a file that is read safely; the new objective fits nothing anew."""
    case, x = CASES[name], torch.randn(60)
    first, second = case.make(), case.make()
    loss_of(first, case.law, x, TIMES * x)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    losses = []
    for objective in (first, second):
        pyro.set_rng_seed(5)
        losses.append(loss_of(objective, case.law, 1.1 * x, x))
    assert torch.equal(*losses)
    assert set(second.fitted) == {"first", "second"}


@pytest.mark.parametrize("noise", ["gaussian", None], ids=["nce", "cnce"])
def test_resumed_fit_is_bit_equal(noise, tmp_path):
    """Two sites with noise of their own: 3 + 4 steps are the 7 steps of one run."""
    data = torch.randn(30), TIMES * torch.randn(30)

    def run(steps: int, path: Any) -> tuple[list[float], Tensor]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        net = nn.Linear(1, 1)

        def law() -> EnergyDistribution:
            pyro.module("net", net)
            return EnergyDistribution(lambda x: net(x[..., None])[..., 0] ** 2, event_shape=())

        objective = NCE(num_noise=2, noise=noise) if noise else ConditionalNCE(2)
        options = {"lr": 0.01, "num_steps": steps, "seed": 1, "disable_progbar": True}
        result = fit(two_sites(law), data, objective, checkpoint=path, batch_size=9, **options)
        return result.losses, net.weight.detach().clone()

    whole, weight = run(7, None)
    run(3, tmp_path / "fit.pt")
    resumed, weight_resumed = run(7, tmp_path / "fit.pt")
    assert whole == resumed
    assert torch.equal(weight, weight_resumed)
