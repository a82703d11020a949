"""Noise that follows the data or the model: what it is fitted to and when, and that log Z does not
notice.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer import NCE, RankingNCE
from pyro_ebm.ops.rng import rng_preserved


def no_guide(*args):
    return None


def model(x):
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("data", len(x)):
        p = EnergyDistribution(lambda y: 0.5 * a * (y - 2.0) ** 2, event_shape=())
        pyro.sample("x", p, obs=x)


def plane(x):
    with pyro.plate("data", len(x)):
        precision = torch.tensor([[2.0, 0.6], [0.6, 1.0]])
        p = EnergyDistribution(
            lambda y: 0.5 * ((y - 1.0) @ precision * (y - 1.0)).sum(-1), event_shape=(2,)
        )
        pyro.sample("x", p, obs=x)


def run(objective, batches, model=model):
    """Evaluates the loss on batches and returns the noise that each was compared with."""
    found = []
    for x in batches:
        objective.differentiable_loss(model, no_guide, x)
        found.append(objective.noise_of("x"))
    return found


@pytest.mark.parametrize("make", [NCE, RankingNCE])
def test_noise_is_fitted_to_every_nth_batch(make):
    """At steps 0, 2 and 4, to the moments of the batch at hand."""
    batches = [0.1 * k + torch.randn(50) for k in range(5)]
    laws = run(make(num_noise=2, noise="gaussian", refit_every=2), batches)
    for step, law in enumerate(laws):
        x = batches[step - step % 2]
        assert law.loc == x.mean()
        torch.testing.assert_close(law.scale, x.std())
    assert len({float(law.loc) for law in laws}) == 3
    once = run(make(num_noise=2, noise="gaussian"), batches)
    assert len({float(law.loc) for law in once}) == 1


@pytest.mark.parametrize("sites", [model, plane])
def test_noise_is_fitted_to_the_model(sites):
    """Moments of the present energy, not of the data: within a tenth with 40 000 draws."""
    event = () if sites is model else (2,)
    x = torch.randn(4000, *event) * 2.0 + 1.0
    objective = NCE(num_noise=10, noise="gaussian", refit_every=1, refit_to="model")
    law = run(objective, [x, x], sites)[1]
    if sites is model:
        assert float(law.loc) == pytest.approx(2.0, abs=0.1)
        assert float(law.scale) == pytest.approx(1.0, abs=0.1)
        return
    covariance = torch.linalg.inv(torch.tensor([[2.0, 0.6], [0.6, 1.0]]))
    torch.testing.assert_close(law.loc, torch.ones(2), rtol=0, atol=0.1)
    torch.testing.assert_close(law.covariance_matrix, covariance, rtol=0, atol=0.1)


def test_moments_are_importance_weighted():
    """By hand, with the same draws of the noise before."""
    x = torch.randn(30) + 1.0
    objective = NCE(num_noise=5, noise="gaussian", refit_every=1, refit_to="model")
    (old,) = run(objective, [x])
    with rng_preserved():
        y = old.expand([30]).sample((5,))
    new = run(objective, [x])[0]
    log_weights = -0.5 * (y - 2.0) ** 2 - old.log_prob(y)
    weights = torch.softmax(log_weights.flatten(), 0)
    mean = (weights * y.flatten()).sum()
    torch.testing.assert_close(new.loc, mean, rtol=0, atol=1e-12)
    variance = (weights * (y.flatten() - mean) ** 2).sum()
    torch.testing.assert_close(new.variance, variance, rtol=0, atol=1e-12)


def test_noise_far_from_the_model_is_kept():
    objective = NCE(num_noise=5, noise="gaussian", refit_every=1, refit_to="model")
    x = 0.1 * torch.randn(30) - 9.0
    run(objective, [x])
    with pytest.warns(SurrogateWarning, match="keeps its noise at step 1: .*too few"):
        run(objective, [x])
    assert float(objective.noise_of("x").loc) == pytest.approx(-9.0, abs=0.1)


# --- log Z


def log_z(a):
    return 0.5 * math.log(2 * math.pi / a)


@pytest.mark.parametrize("refit_to", ["data", "model"])
@pytest.mark.parametrize("c_update", ["gradient", "closed_form"])
def test_log_z_is_kept_while_noise_changes(refit_to, c_update):
    """A batch whose noise is new moves c no more than its own step would; training on, c ends at
    the energy's log Z.
    """
    x = torch.randn(1000) / math.sqrt(1.7) + 2.0
    objective = NCE(
        num_noise=5, noise="gaussian", refit_every=10, refit_to=refit_to, c_update=c_update
    )
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.03}), loss=objective)
    values = []
    for _ in range(120):
        svi.step(x)
        values.append(float(objective.log_normalizers["x"].detach()))
    jumps = [abs(now - before) for before, now in zip(values[50:], values[51:], strict=False)]
    assert max(jumps) < 0.05
    a = pyro.param("a").item()
    assert a == pytest.approx(1.7, abs=0.3)
    assert values[-1] == pytest.approx(log_z(a), abs=0.1)


def test_the_truth_is_stationary_under_both_noises():
    """Same energy, same c: five standard errors, which see an error of 0.05 in c."""
    x = torch.randn(40_000) + 2.0
    c = torch.tensor(log_z(1.0), requires_grad=True)
    p = EnergyDistribution(lambda y: 0.5 * (y - 2.0) ** 2, event_shape=())
    for noise in (dist.Normal(1.0, 3.0), dist.Normal(2.5, 1.2)):
        nce = NCE(num_noise=2, noise=noise)
        contrast = nce.draw(p.expand([len(x)]), x, None)
        at = c.expand(len(x)).clone().detach().requires_grad_()
        (scores,) = torch.autograd.grad(nce.per_datum(p, x, contrast, at).sum(), at)
        stderr = float(scores.std()) / math.sqrt(len(x))
        assert abs(float(scores.mean())) < 5 * stderr
        off = at.detach().add(0.05).requires_grad_()
        (scores,) = torch.autograd.grad(nce.per_datum(p, x, contrast, off).sum(), off)
        assert abs(float(scores.mean())) > 5 * stderr


# --- when it is not fitted


def test_evaluation_fits_nothing():
    objective = NCE(num_noise=2, noise="gaussian", refit_every=1)
    (law,) = run(objective, [torch.randn(50)])
    with torch.no_grad():
        objective.differentiable_loss(model, no_guide, torch.randn(50))
    assert torch.equal(objective.noise_of("x").loc, law.loc)


def test_every_site_is_refitted_to_its_own_data():
    def two(x):
        for name, part in {"left": x, "right": x + 50.0}.items():
            with pyro.plate(f"rows of {name}", len(x)):
                p = EnergyDistribution(lambda y: 0.01 * y**2, event_shape=())
                pyro.sample(name, p, obs=part)

    objective = NCE(num_noise=2, noise="gaussian", refit_every=1)
    for x in (torch.randn(40), torch.randn(40) + 1.0):
        objective.differentiable_loss(two, no_guide, x)
        assert objective.noise_of("left").loc == x.mean()
        assert objective.noise_of("right").loc == (x + 50.0).mean()


def test_particles_share_one_fit():
    """Once in a step: what the second particle is compared with is what the first was."""
    objective = NCE(num_noise=2, noise="gaussian", refit_every=1, num_particles=2)
    fits, fit = [], objective._fitted_to_data
    objective._fitted_to_data = lambda p, x: fits.append(x) or fit(p, x)
    run(objective, [torch.randn(40) for _ in range(3)])
    assert len(fits) == 3


def test_a_site_that_turns_up_late_is_fitted_to_its_data():
    """There is no noise before to sample the model from."""
    objective = NCE(num_noise=2, noise="gaussian", refit_every=1, refit_to="model")
    objective.num_steps_taken += 3
    x = torch.randn(40)
    (law,) = run(objective, [x])
    assert law.loc == x.mean()


def test_the_guides_noise_goes_first():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(2.0, 1.5))

    objective = NCE(num_noise=2, noise="gaussian", refit_every=1)
    for _ in range(2):
        objective.differentiable_loss(model, guide, torch.randn(50))
    assert not objective.fitted
    with pytest.raises(KeyError, match="x"):
        objective.noise_of("x")


def test_fitted_noise_is_saved():
    first = NCE(num_noise=2, noise="gaussian", refit_every=2)
    run(first, [torch.randn(50), torch.randn(50), torch.randn(50)])
    second = NCE(num_noise=2, noise="gaussian", refit_every=2)
    second.load_state_dict(first.state_dict())
    assert second.noise_of("x").loc == first.noise_of("x").loc
    assert int(second.num_steps_taken) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "gaussian", "refit_every": 0}, "refit_every must be a positive number"),
        ({"noise": dist.Normal(0.0, 1.0), "refit_every": 5}, "with noise='gaussian' to refit"),
        ({"noise": "gaussian", "refit_to": "flow"}, "refit_to must be one of data, model"),
    ],
)
def test_arguments(options, message):
    for make in (NCE, RankingNCE):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_losses_against_other_noise_do_not_compare():
    assert NCE(noise="gaussian").is_held_out_criterion
    assert not NCE(noise="gaussian", refit_every=5).is_held_out_criterion
