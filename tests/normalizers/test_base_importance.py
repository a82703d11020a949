"""Log Z from held draws of a base: tilted normals, of which all is known, and a network."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import nn

from pyro_ebm import EnergyDistribution, GeneralizedEBM
from pyro_ebm.mcmc import HMC
from pyro_ebm.mcmc import MCMC as Chains
from pyro_ebm.normalizers.anchor_error import mcse_logz
from pyro_ebm.normalizers.base_importance import BaseImportance, base_importance

F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    pyro.set_rng_seed(2)
    torch.set_default_dtype(F64)


def base(dim=None):
    if dim is None:
        return dist.Normal(torch.tensor(0.0), 1.0)
    return dist.Normal(torch.zeros(dim), 1.0).to_event(1)


def tilted(tilt, batch_shape=()):
    """exp(-tilt x^2 / 2) on N(0, 1): log Z = -log(1 + tilt) / 2."""
    return EnergyDistribution(
        lambda x: 0.5 * tilt * x.square(), base(), event_shape=(), batch_shape=batch_shape
    )


def exact(tilt):
    return -0.5 * torch.log1p(tilt)


# --- values and slopes


@pytest.mark.parametrize("tilt", [0.0, 0.8, 3.0])
def test_value_slope_and_curvature_of_a_tilted_normal(tilt):
    """-log(1 + t) / 2, -1 / (2 (1 + t)), 1 / (2 (1 + t)^2); four standard errors, of 300 sets.

    A slope that left out the weights, the mean of -x^2 / 2 under the base, would be -1/2.
    """
    found = []
    for _ in range(300):
        t = torch.tensor(tilt, requires_grad=True)
        value = base_importance(base(), num_draws=400)(tilted(t))
        (slope,) = torch.autograd.grad(value, t, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, t)
        found.append(torch.stack([value, slope, curvature]).detach())
    have = torch.stack(found)
    wanted = torch.tensor([-0.5 * math.log1p(tilt), -0.5 / (1 + tilt), 0.5 / (1 + tilt) ** 2])
    error = have.std(0) / len(have) ** 0.5
    bias = 4.0 / 400  # of the order 1 / S
    assert bool(((have.mean(0) - wanted).abs() <= 4 * error + bias).all())
    assert float(error.max()) < 0.01


def test_the_standard_error_is_that_of_repeats():
    """sd(w) / (mean(w) sqrt S), in closed form: Z(2 t) / Z(t)^2 - 1 over S."""
    tilt, size = torch.tensor(1.5), 500
    told = [
        base_importance(base(), num_draws=size).log_normalizer(tilted(tilt)) for _ in range(400)
    ]
    wanted = math.sqrt(float(torch.expm1(exact(2 * tilt) - 2 * exact(tilt))) / size)
    assert float(torch.stack([z.value for z in told]).std()) == pytest.approx(wanted, rel=0.15)
    assert float(torch.stack([z.stderr for z in told]).mean()) == pytest.approx(wanted, rel=0.05)


def test_effective_size_in_closed_form():
    """S Z(t)^2 / Z(2 t), also of a batch of laws."""
    log_z, tilt = base_importance(base(), num_draws=20_000), torch.tensor([0.2, 1.0, 4.0])
    wanted = 20_000 * torch.exp(2 * exact(tilt) - exact(2 * tilt))
    assert log_z.effective_size(tilted(tilt, (3,))).tolist() == pytest.approx(
        wanted.tolist(), rel=0.03
    )


def test_a_base_with_parameters_and_a_proposal_with_heavier_tails():
    """N(m, 1) tilted by exp(-x^2 / 2): log Z = -m^2 / 4 - log(2) / 2; slope -m / 2."""
    wide = base_importance(dist.Normal(torch.tensor(0.0), 2.0), num_draws=40_000)
    m = torch.tensor(0.7, requires_grad=True)
    law = EnergyDistribution(lambda x: 0.5 * x.square(), dist.Normal(m, 1.0))
    value = wide(law)
    value.backward()
    assert float(value.detach()) == pytest.approx(-0.25 * 0.49 - 0.5 * math.log(2.0), abs=0.02)
    assert float(m.grad) == pytest.approx(-0.35, abs=0.02)


def test_a_generalized_ebm_is_its_law_over_latents():
    tilt = torch.tensor(0.6)
    law = GeneralizedEBM(lambda z: 2.0 * z, base(1), lambda x: tilt * x.square().sum(-1) / 8.0)
    log_z = base_importance(base(1), num_draws=40_000)
    assert float(log_z(law)) == pytest.approx(float(exact(tilt)), abs=0.01)


def test_a_network_gets_the_slope_of_its_own_draws():
    """The slope is minus the weighted mean slope of the energy, by hand."""
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    log_z = base_importance(base(2), num_draws=500)
    law = EnergyDistribution(lambda x: net(x).squeeze(-1), base(2))
    have = torch.autograd.grad(log_z(law), list(net.parameters()))
    energies = net(log_z.draws).squeeze(-1)
    weights = (-energies).detach().softmax(0)
    wanted = torch.autograd.grad(-(weights * energies).sum(), list(net.parameters()))
    for one, other in zip(have, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_dtype_is_that_of_the_draws():
    log_z = base_importance(dist.Normal(torch.tensor(0.0, dtype=torch.float32), 1.0))
    law = EnergyDistribution(lambda x: 0.1 * x.square(), log_z.base)
    assert log_z(law).dtype == torch.float32


# --- posteriors through it


def rows(y, known):
    """N(0, 1 / (1 + tilt)) as a tilt of N(0, 1)."""
    tilt = pyro.sample("tilt", dist.Gamma(torch.tensor(2.0), 1.0))
    law = tilted(tilt)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", law.with_log_normalizer(lambda: known(law)), obs=y)


def of_rows(y):
    """Mean and sd of the tilt by quadrature."""
    tilt = torch.linspace(1e-4, 20.0, 40_001)
    total = y.square().sum()
    log_p = tilt.log() - tilt - 0.5 * tilt * total - len(y) * exact(tilt)
    weights = log_p.softmax(0)
    mean = weights @ tilt
    return float(mean), float((weights @ (tilt - mean).square()).sqrt())


def known_exactly(law):
    """Reads the tilt off the energy."""
    return exact(2.0 * law.energy(torch.ones(())))


Y = torch.linspace(-1.3, 1.3, 30)


@pytest.mark.filterwarnings("ignore:log Z was asked of a law")  # by the first step size
def test_stock_nuts_has_the_posterior():
    """Within five Monte Carlo errors plus the displacement that the rule tells, .03 sds."""
    log_z = base_importance(base(), num_draws=40_000)
    log_z.check(tilted(torch.tensor(1.0)), len(Y), 1)
    mcmc = MCMC(NUTS(rows), 300, 100, disable_progbar=True)
    mcmc.run(Y, log_z)
    mean, sd = of_rows(Y)
    draws = mcmc.get_samples()["tilt"]
    off = float(log_z.displacement(tilted(torch.tensor(mean)), len(Y), 1))
    assert off < 0.05
    assert abs(float(draws.mean()) - mean) < sd * (5 / 100**0.5 + 3 * off)
    assert float(draws.std()) == pytest.approx(sd, rel=0.25)


def test_many_chains_have_it_too():
    log_z = base_importance(base(), num_draws=10_000)
    mean, sd = of_rows(Y)
    chains = Chains(HMC(rows), 40, 60, num_chains=32, disable_progbar=True)
    chains.run(Y, log_z)
    draws = chains.get_samples()["tilt"]
    error = float(draws.mean(1).std()) / 32**0.5
    off = float(log_z.displacement(tilted(torch.tensor(mean)), len(Y), 1))
    assert abs(float(draws.mean()) - mean) < 5 * error + 3 * off * sd
    assert error < 0.1 * sd


def test_its_error_is_told_by_resampling():
    """mcse_logz is the spread of posterior means between sets of draws; both by reweighting.

    The spread is of 100 sets, known to 7 %, and that of 100 replicates as well: gated at 35 %.
    """
    mean, sd = of_rows(Y)
    tilt = torch.linspace(1e-3, 12.0, 401)
    log_p = tilt.log() - tilt - 0.5 * tilt * Y.square().sum()

    def posterior_mean(log_z):
        return float((log_p - len(Y) * log_z).softmax(0) @ tilt)

    sets = [base_importance(base(), num_draws=1000) for _ in range(100)]
    spread = np.std([posterior_mean(one(tilted(tilt, (401,)))) for one in sets])
    weights = (log_p - len(Y) * exact(tilt)).softmax(0)
    draws = tilt[torch.multinomial(weights, 2000, replacement=True)]
    of_tilt = sets[0].by(lambda theta: tilted(theta[..., 0], theta.shape[:-1]), 1)
    error = mcse_logz(
        {"tilt": draws.reshape(4, 500)}, of_tilt, lambda d: d["tilt"][:, None], len(Y)
    )
    assert float(error.mcse["tilt"]["mean"]) == pytest.approx(spread, rel=0.35)
    size = float(sets[0].effective_size(tilted(torch.tensor(mean))))
    assert spread < 1.5 * sd * math.sqrt(len(Y) / size)


# --- what is refused


def test_beyond_its_reach_it_is_nan_and_says_so():
    log_z = base_importance(base(8), num_draws=1000)

    def law(tilt):
        return EnergyDistribution(lambda x: 0.5 * tilt * x.square().sum(-1), base(8))

    assert bool(log_z(law(torch.tensor(0.5))).isfinite())
    with pytest.warns(UserWarning, match="the draws of its base say nothing of"):
        assert bool(log_z(law(torch.tensor(30.0))).isnan())
    tilt = torch.tensor(0.5, requires_grad=True)
    (slope,) = torch.autograd.grad(log_z(law(tilt)), tilt)
    assert bool(slope.isfinite())
    with pytest.warns(UserWarning, match="NaN there with its slope"):
        (slope,) = torch.autograd.grad(log_z(law(60 * tilt)), tilt)
    assert bool(slope.isnan())


def test_the_check_asks_for_more_draws_or_another_way():
    few = base_importance(base(), num_draws=2000)
    with pytest.raises(ValueError, match="displace the posterior by about .* use .* times as many"):
        few.check(tilted(torch.tensor(1.0)), 1000, 1)
    few.check(tilted(torch.tensor(1.0)), 10, 1)
    wider = EnergyDistribution(lambda x: -0.49 * x.square(), base())  # infinite variance
    many = base_importance(base(), num_draws=20_000)
    with pytest.raises(ValueError, match=r"too far from the law .*Pareto tail index"):
        many.check(wider, 10, 1)


def test_draws_inside_of_a_model_are_refused():
    def model(y):
        rows(y, base_importance(base()))

    with pytest.raises(ValueError, match="called inside of a model"):
        MCMC(NUTS(model), 1, 1, disable_progbar=True).run(Y)


def test_energies_with_dims_of_their_own_are_refused():
    log_z, tilt = base_importance(base(), num_draws=100), torch.tensor([[0.1], [0.2]])
    with pytest.raises(ValueError, match=r"expected \(1,\)\): give the law batch_shape="):
        log_z(tilted(tilt))
    assert log_z(tilted(tilt, (2, 1))).shape == (2, 1)


def test_laws_on_other_sets_are_refused():
    positive = base_importance(dist.Exponential(torch.tensor(1.0)), num_draws=10)
    with pytest.raises(ValueError, match="mass outside would be missing"):
        positive(tilted(torch.tensor(0.1)))
    with pytest.raises(ValueError, match="event_shape"):
        BaseImportance(base(2), torch.randn(10, 2))(tilted(torch.tensor(0.1)))


@pytest.mark.filterwarnings("ignore:log Z was asked of a law that the draws")
def test_a_law_it_is_not_told_of_is_no_error():
    """Chains may begin where the tilt beats the base, and come to where they are told log Z."""
    log_z = base_importance(base(), num_draws=1000)
    assert log_z(tilted(torch.tensor(-8.0))).isnan()
    assert log_z(tilted(torch.tensor(0.1))).isfinite()


def test_its_rule_is_the_root_of_p_n_over_s():
    """Without a tilt all draws count: sqrt(3 * 50 / 2000)."""
    log_z = base_importance(base(), num_draws=2000)
    off = log_z.displacement(tilted(torch.tensor(0.0)), 50, 3)
    assert float(off) == pytest.approx(math.sqrt(150 / 2000))
