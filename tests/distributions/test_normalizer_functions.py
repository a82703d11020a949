"""Functions for log Z that cannot be right: random ones, and ones without their slope."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from pyro_ebm import EnergyDistribution, MissingNormalizerError
from pyro_ebm.distributions import guard_schedule, normalizer_functions
from pyro_ebm.normalizers import importance

Y = torch.linspace(-1.2, 1.2, 20)


@pytest.fixture(autouse=True)
def first_use(monkeypatch):
    pyro.set_rng_seed(1)
    monkeypatch.setattr(normalizer_functions, "_seen", {})
    monkeypatch.setattr(guard_schedule, "_calls", {})


def tilted(log_z):
    """N(0, 1) tilted by exp(-t x^2 / 2), with log Z by a function of t and of the bare law."""

    def model(y):
        t = pyro.sample("t", dist.Gamma(2.0, 1.0))
        law = EnergyDistribution(lambda x: 0.5 * t * x**2, dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            known = law.with_log_normalizer(lambda: log_z(t, law))
            pyro.sample("y", known, obs=y)

    return model


def located(log_z):
    """N(m, s) with a latent m: log Z is a constant of m."""

    def model(y, scale=1.0):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        known = EnergyDistribution(
            lambda x: 0.5 * ((x - m) / scale) ** 2,
            event_shape=(),
            log_normalizer=lambda: log_z(scale),
        )
        with pyro.plate("rows", len(y)):
            pyro.sample("y", known, obs=y)

    return model


def exact(t, law):
    return -0.5 * torch.log1p(t)


def by_fresh_draws(t, law):
    return importance(law, num_samples=50).value


def by_fresh_draws_with_a_slope(t, law):
    return torch.logsumexp(-law.energy(torch.randn(50)), 0) - math.log(50)


def by_seeded_draws(t, law):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return importance(law, num_samples=50).value


def without_gradients(t, law):
    with torch.no_grad():
        return exact(t, law)


def nuts(model, *args):
    MCMC(NUTS(model, max_tree_depth=3), 10, 20, disable_progbar=True).run(*args)


def svi(model, *args):
    pyro.clear_param_store()
    loop = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(20):
        loop.step(*args)


@pytest.mark.parametrize("infer", [nuts, svi])
@pytest.mark.parametrize("function", [by_fresh_draws, by_fresh_draws_with_a_slope])
def test_random_functions_are_refused(function, infer):
    with pytest.raises(MissingNormalizerError, match="'y': log_normalizer returned two values"):
        infer(tilted(function), Y)


@pytest.mark.parametrize("infer", [nuts, svi])
@pytest.mark.parametrize("function", [by_seeded_draws, without_gradients])
def test_functions_without_their_slope_are_refused(function, infer):
    with pytest.raises(MissingNormalizerError, match="moves with latent 't' and no gradient"):
        infer(tilted(function), Y)


@pytest.mark.parametrize("infer", [nuts, svi])
def test_smooth_functions_are_not(infer):
    infer(tilted(exact), Y)


@pytest.mark.parametrize("infer", [nuts, svi])
def test_a_constant_is_right_for_a_location(infer):
    def constant(scale):
        return torch.tensor(0.5 * math.log(2.0 * math.pi)) + math.log(scale)

    infer(located(constant), Y)
    infer(located(constant), Y, 2.0)  # at the same data, another constant


def test_constants_of_other_rows_are_not_taken_for_slopes():
    """Rows with scales of their own, in mini-batches: log Z differs, and not by the latent."""

    def of_rows(scale):
        return torch.log(scale) + 0.5 * math.log(2.0 * math.pi)

    model, scales = located(of_rows), torch.linspace(0.5, 2.0, 20)
    pyro.clear_param_store()
    loop = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(40):
        rows = torch.randperm(20)[:10]  # copies, in memory that was used before
        loop.step(Y[rows], scales[rows])


def test_batches_of_one_sum_in_one_place_are_not_one_batch():
    """Rows that are put into memory of their predecessors, with another log Z and the same sums."""

    def of_rows(scale):
        return torch.log(scale)

    rows, scales = (torch.from_numpy(np.array(v)) for v in ([0.0, 1.0, 2.0], [1.0, 1.5, 2.0]))
    model = located(of_rows)
    loop = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO())
    for change in (0.0, 0.1, 0.1):
        for values in (rows.numpy(), scales.numpy()):  # which torch does not see
            values[:2] += (-change, change)
        loop.step(rows, scales)


def test_it_warns_where_the_setting_says_so():
    with (
        pyro.settings.context(ebm_missing_normalizer="warn"),
        pytest.warns(UserWarning, match="log_normalizer returned two values"),
    ):
        nuts(tilted(by_fresh_draws_with_a_slope), Y)


def test_random_numbers_are_not_used_up():
    """The second call of a function leaves the generator where the first has left it."""
    draws = []
    for _ in range(normalizer_functions.REPEATED + 1):  # in the last run it is called once
        pyro.set_rng_seed(3)
        t = torch.tensor(1.0, requires_grad=True)
        law = EnergyDistribution(lambda x, t=t: t * x**2, event_shape=())
        law = law.with_log_normalizer(lambda t=t: 0.5 * torch.log(math.pi / t) + 0 * torch.rand(()))
        law.log_prob(Y)
        draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[-1])


def test_only_the_first_evaluations_are_looked_at():
    calls = []

    def counted(t, law):
        calls.append(t)
        return exact(t, law)

    model = tilted(counted)
    for value in torch.linspace(0.5, 1.5, 40):
        t = value.clone().requires_grad_()
        pyro.poutine.trace(pyro.poutine.condition(model, {"t": t})).get_trace(Y).log_prob_sum()
    assert len(calls) == 40 + normalizer_functions.REPEATED
