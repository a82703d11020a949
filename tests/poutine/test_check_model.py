"""The check of a model before inference; the table of the guard runs it over all its models too."""

from __future__ import annotations

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import nn

from pyro_ebm import (
    EnergyDistribution,
    GeneralizedEBM,
    LogNormalizer,
    MissingNormalizerError,
    NonFiniteEnergyError,
    check_model,
    energy_factor,
)
from pyro_ebm.energies import Energy, GaussianEnergy, MLPEnergy, Quartic
from pyro_ebm.errors import EnergyShapeError, MissingNormalizerWarning
from pyro_ebm.poutine.gradient_check import GradientCheck

X = torch.linspace(-1.0, 1.0, 7)
GRID = torch.linspace(-12.0, 12.0, 2001)


def log_z_of(theta):
    """Log Z of exp(-theta x^2 / 2)."""
    return 0.5 * (2.0 * torch.pi / theta).log()


def scaled(theta, *, exact_draws=True, **kwargs):
    def draw(d, shape):
        return torch.randn(shape + d.batch_shape) * theta.detach().rsqrt()

    sampler = draw if exact_draws else None
    return EnergyDistribution(lambda x: theta * x**2 / 2, event_shape=(), sampler=sampler, **kwargs)


def given_theta(make):
    def model(x=X):
        p = make(pyro.sample("theta", dist.Gamma(4.0, 2.0)))
        with pyro.plate("n", len(x)):
            pyro.sample("x", p, obs=x)

    return model


def checked(model, *args, **kwargs):
    """The findings, without raising."""
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        return check_model(model, *args, **kwargs)


# --- parents


def test_missing_log_z_names_site_and_parent():
    with pytest.raises(MissingNormalizerError) as caught:
        check_model(given_theta(scaled))
    assert str(caught.value).startswith("EBM site 'x': log Z is unknown, but latent 'theta' would")


@pytest.mark.parametrize(
    "given",
    [0.3, torch.tensor(0.3), nn.Parameter(torch.tensor(0.3)), LogNormalizer(torch.tensor(0.3))],
)
def test_constant_log_z_is_named_as_such(given):
    model = given_theta(lambda t: scaled(t, log_normalizer=given))
    with pytest.raises(
        MissingNormalizerError, match="log Z was given as a constant, but latent 'th"
    ):
        check_model(model)


def test_stale_log_z_is_named_as_such():
    weight = nn.Parameter(torch.tensor(1.0))
    estimate = LogNormalizer(torch.tensor(0.3), parameters=(weight,))
    with torch.no_grad():
        weight.add_(1.0)
    model = given_theta(lambda t: scaled(t * weight, log_normalizer=estimate))
    with pytest.raises(MissingNormalizerError, match="log Z is stale.*but latent 'theta'"):
        check_model(model)


def test_detached_log_z_is_a_constant():
    model = given_theta(lambda t: scaled(t, log_normalizer=log_z_of(t.detach())))
    assert checked(model).sites["x"].uncovered == ("theta",)


def test_log_z_of_a_latent_that_the_energy_ignores():
    model = given_theta(
        lambda t: EnergyDistribution(torch.square, event_shape=(), log_normalizer=t)
    )
    with pytest.raises(
        MissingNormalizerError, match="depends on latent 'theta' but the energy does"
    ):
        check_model(model)


def test_all_findings_come_in_one_error():
    def model():
        t = pyro.sample("theta", dist.Gamma(4.0, 2.0))
        pyro.sample("x", scaled(t), obs=X[0])
        energy_factor("f", lambda x: t * x**2, X[0])

    with pytest.raises(MissingNormalizerError, match=r"(?s)EBM site 'x'.*\n.*energy_factor 'f'"):
        check_model(model)


def test_discrete_parents_are_seen_and_covered_alike():
    scales = torch.tensor([0.5, 2.0])

    def model(known):
        with pyro.plate("n", 7):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            log_z = log_z_of(scales[k]) if known else None
            pyro.sample("x", scaled(scales[k], log_normalizer=log_z), obs=X)

    assert checked(model, known=False).sites["x"].uncovered == ("k",)
    assert check_model(model, known=True).is_sound


def test_value_that_is_a_function_of_a_latent_hands_the_dependence_on():
    """An observed site is data only if its value is: here it is a function of z."""

    def model(latent):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        value = z.exp() if latent else torch.tensor(1.0)
        w = pyro.sample("w", dist.Normal(z, 1.0), obs=value)
        pyro.sample("x", scaled(1.0 + w**2), obs=X[0])

    assert checked(model, True).sites["x"].uncovered == ("z",)
    assert check_model(model, False).is_sound


def test_subsampled_plate_and_local_latents():
    def model():
        with pyro.plate("n", 7, subsample_size=3) as rows:
            t = pyro.sample("t", dist.Gamma(4.0, 2.0))
            pyro.sample("x", scaled(t, log_normalizer=lambda: log_z_of(t)), obs=X[rows])

    check = check_model(model)
    assert check.sites["x"].latents == ("t",)
    assert len(check.sites["x"].gradients) == 1


def test_generalized_ebm_is_judged_by_its_latent_law():
    def model(x):
        t = pyro.sample("theta", dist.Gamma(4.0, 2.0))
        p = GeneralizedEBM(lambda z: t * z, dist.Normal(0.0, 1.0), torch.square)
        pyro.sample("x", p, obs=x)

    assert checked(model, X[0]).sites["x"].uncovered == ("theta",)


# --- trained parameters are listed, not refused


def test_trained_parameters_are_listed():
    net = MLPEnergy((), (4,))

    def model():
        p = EnergyDistribution(pyro.module("net", net), event_shape=())
        pyro.sample("x", p.expand([7]).to_event(1), obs=X)

    check = check_model(model)
    assert len(check.sites["x"].parameters) == 4
    assert "trained without log Z" in str(check)


def test_learned_log_z_is_left_to_its_objective():
    def model(x=X):
        a, c = pyro.param("a", torch.tensor(2.0)), pyro.param("c", torch.tensor(0.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", scaled(a, log_normalizer=lambda: c), obs=x)

    check = check_model(model)
    assert check.sites["x"].parameters == ("param 'a'",)
    assert "of its own" in check.sites["x"].notes[0]


# --- the slope of log Z


def test_right_slope_passes():
    (check,) = (
        check_model(given_theta(lambda t: scaled(t, log_normalizer=lambda: log_z_of(t))))
        .sites["x"]
        .gradients
    )
    assert check.agrees
    assert check.name == "theta"
    assert abs(check.given - check.expected) < 5.0 * check.stderr


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_slope_wrong_by_a_factor_of_two_is_caught(factor):
    """Of 2048 draws the slope 1 / 2 theta has a relative standard error of 4 percent (12 of 5)."""
    model = given_theta(lambda t: scaled(t, log_normalizer=lambda: factor * log_z_of(t)))
    with pytest.raises(MissingNormalizerError, match="d log Z / d theta is .* expected .* ± "):
        check_model(model)


@pytest.mark.parametrize("exact_draws", [True, False])
def test_slopes_of_forty_right_and_wrong_normalizers(exact_draws):
    """No false alarm, no miss; also with the short chain that sample() runs by default."""
    for factor, sound in ((1.0, True), (1.6, False)):
        model = given_theta(
            lambda t, f=factor: scaled(
                t, exact_draws=exact_draws, log_normalizer=lambda: f * log_z_of(t)
            )
        )
        runs = 20 if exact_draws else 4
        found = [checked(model, at={"theta": torch.tensor(1.5)}).is_sound for _ in range(runs)]
        assert found == [sound] * runs


def test_covering_tensor_is_compared_too():
    assert check_model(given_theta(lambda t: scaled(t, log_normalizer=log_z_of(t)))).is_sound
    with pytest.raises(MissingNormalizerError, match="not the log Z of this energy"):
        check_model(given_theta(lambda t: scaled(t, log_normalizer=-log_z_of(t))))


@pytest.mark.parametrize("wrong", [False, True])
def test_one_wrong_entry_of_a_vector_is_found(wrong):
    def model():
        t = pyro.sample("t", dist.Gamma(4.0, 2.0).expand([10]).to_event(1))
        weights = torch.ones(10)
        weights[7] += wrong
        p = EnergyDistribution(
            lambda x: (t * x**2).sum(-1) / 2,
            event_shape=(10,),
            log_normalizer=lambda: (weights * log_z_of(t)).sum(),
            sampler=lambda d, s: torch.randn(*s, *d.batch_shape, 10) * t.detach().rsqrt(),
        )
        pyro.sample("x", p, obs=torch.zeros(10))

    assert checked(model).is_sound is not wrong


@pytest.mark.parametrize("wrong", [False, True])
def test_four_hundred_entries_are_one_test(wrong):
    """The direction fits the noise of its own draws, by 20 standard errors: others must judge it.

    Off by 30 percent in every entry, the slopes differ by as much again.
    """

    def model():
        t = pyro.sample("t", dist.Gamma(4.0, 2.0).expand([400]).to_event(1))
        p = EnergyDistribution(
            lambda x: (t * x**2).sum(-1) / 2,
            event_shape=(400,),
            log_normalizer=lambda: (1.3 if wrong else 1.0) * log_z_of(t).sum(),
            sampler=lambda d, s: torch.randn(*s, *d.batch_shape, 400) * t.detach().rsqrt(),
        )
        pyro.sample("x", p, obs=torch.zeros(400))

    assert [checked(model).is_sound for _ in range(5)] == [not wrong] * 5


@pytest.mark.parametrize("wrong", [False, True])
def test_weights_of_a_network_with_log_z_by_quadrature(wrong):
    net = MLPEnergy((), (8,), confinement=1.0)
    grid = GRID[GRID > 0.0] if wrong else GRID

    def log_z():
        return (-net(grid)).logsumexp(0) + (GRID[1] - GRID[0]).log()

    def model():
        p = EnergyDistribution(net, event_shape=(), log_normalizer=log_z, base=None)
        pyro.sample("x", p.expand([7]).to_event(1), obs=X)

    check = checked(model)
    assert len(check.sites["x"].gradients) == 4
    assert check.is_sound is not wrong


def test_function_that_returns_a_constant_is_caught_for_trained_weights():
    net = MLPEnergy((), (8,), confinement=1.0)

    def model():
        p = EnergyDistribution(net, event_shape=(), log_normalizer=lambda: torch.tensor(0.3))
        pyro.sample("x", p, obs=X[0])

    with pytest.raises(MissingNormalizerError, match="'net.0.weight' of the energy is 0, expected"):
        check_model(model)


def test_base_counts():
    def model(right):
        s = pyro.sample("s", dist.Gamma(9.0, 6.0))
        log_z = lambda: -0.5 * (1.0 + s**2).log() if right else torch.zeros(())  # noqa: E731
        p = EnergyDistribution(lambda x: x**2 / 2, dist.Normal(0.0, s), log_normalizer=log_z)
        pyro.sample("x", p, obs=X[0])

    assert check_model(model, True).is_sound
    assert not checked(model, False).is_sound


class WrongGaussian(GaussianEnergy):
    """Claims a log Z that grows twice as fast with its scale."""

    def log_normalizer(self):
        return 2.0 * super().log_normalizer()


def test_exact_energies_are_trusted_unless_asked():
    def model(energy):
        s = pyro.sample("s", dist.Gamma(9.0, 6.0))
        pyro.sample("x", EnergyDistribution(energy(s)), obs=X[0])

    def wrong(s):
        return WrongGaussian(0.0, s)

    assert check_model(model, wrong).is_sound
    with pytest.raises(MissingNormalizerError, match="d log Z / d s"):
        check_model(model, wrong, exact_energies=True)
    assert check_model(model, lambda s: GaussianEnergy(0.5, s), exact_energies=True).is_sound
    assert check_model(model, Quartic, exact_energies=True).is_sound


def test_draws_that_did_not_converge_decide_nothing():
    def model():
        t = pyro.sample("t", dist.Gamma(9.0, 6.0))
        p = EnergyDistribution(
            lambda x: t * (x**2 - 64.0) ** 2,
            dist.Normal(0.0, 10.0),
            log_normalizer=lambda: torch.zeros(()),
        )
        pyro.sample("x", p, obs=torch.tensor(8.0))

    (note,) = check_model(model).sites["x"].notes
    assert "not compared" in note


def test_no_draws_no_comparison():
    model = given_theta(lambda t: scaled(t, log_normalizer=lambda: 2.0 * log_z_of(t)))
    assert check_model(model, num_samples=0).sites["x"].gradients == ()


def test_agreement_is_within_five_errors_and_two_percent():
    assert GradientCheck("t", 1.0, 1.49, 0.1).agrees
    assert not GradientCheck("t", 1.0, 1.55, 0.1).agrees
    assert GradientCheck("t", 1.0, 1.019, 0.0).agrees
    assert not GradientCheck("t", 0.0, 0.1, 0.0).agrees


# --- what else it says


def test_energy_that_ignores_x():
    def model(support):
        p = EnergyDistribution(lambda x: torch.zeros(x.shape), support=support, sampler=None)
        pyro.sample("x", p, obs=torch.tensor(0.0))

    for support in (constraints.real, constraints.boolean):
        assert check_model(model, support).sites["x"].notes == ("the energy ignores x",)


def test_random_energy():
    class Dropout(Energy):
        def forward(self, x):
            return nn.functional.dropout(x**2, 0.5)

    def model():
        pyro.sample(
            "x", EnergyDistribution(Dropout(), event_shape=()).expand([7]).to_event(1), obs=X
        )

    assert "the energy is random" in check_model(model).sites["x"].notes[0]


def test_latent_on_a_discrete_support():
    def model(observed):
        p = EnergyDistribution(lambda x: 0.3 * x, support=constraints.boolean)
        pyro.sample("x", p, obs=torch.tensor(1.0) if observed else None)

    assert check_model(model, True).sites["x"].notes == ()
    assert "NUTS and HMC cannot sample it" in check_model(model, False).sites["x"].notes[0]


def test_function_that_does_not_depend_on_a_discrete_parent_is_noted():
    locs = torch.tensor([0.0, 1.0])

    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        p = EnergyDistribution(
            lambda x: (x - locs[k]) ** 2 / 2, event_shape=(), log_normalizer=lambda: 0.919
        )
        pyro.sample("x", p, obs=X[0])

    assert "log Z does not depend on 'k'" in check_model(model).sites["x"].notes[0]


def test_energy_that_is_not_finite():
    def model():
        pyro.sample("x", EnergyDistribution(torch.log, event_shape=()), obs=torch.tensor(-1.0))

    with pytest.raises(NonFiniteEnergyError, match="energy of site 'x' is not finite in 1 of 1"):
        check_model(model)


@pytest.mark.parametrize(("scale", "what"), [(1.0, "log Z of site 'x' is"), (math.nan, "energy")])
def test_log_z_that_is_not_finite_is_named(scale, what):
    """Where the energy is not either, that is the cause."""

    def model():
        theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        law = EnergyDistribution(
            lambda x: scale * theta * x**2, event_shape=(), log_normalizer=lambda: math.nan * theta
        )
        with pyro.plate("n", len(X)):
            pyro.sample("x", law, obs=X)

    with pytest.raises(NonFiniteEnergyError, match=f"check_model: (the )?{what}"):
        check_model(model)


def test_energy_of_a_wrong_shape():
    def model():
        p = EnergyDistribution(lambda x: x.sum(-1, keepdim=True), event_shape=(2,))
        pyro.sample("x", p.expand([7]).to_event(1), obs=torch.zeros(7, 2))

    with pytest.raises(EnergyShapeError, match="squeeze"):
        check_model(model)


def test_factors():
    def model(joint):
        t = pyro.sample("t", dist.Gamma(9.0, 6.0))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        energy_factor("latent", lambda x: t * x**2, x)
        energy_factor("data", lambda x: (t * x**2).sum(), X, joint=joint)

    check = checked(model, False)
    assert check.sites["latent"].problem is None
    assert check.sites["latent"].latents == ("t", "x")
    assert check.sites["data"].uncovered == ("t",)
    assert check_model(model, True).is_sound


def test_report_reads_well():
    model = given_theta(lambda t: scaled(t, log_normalizer=lambda: log_z_of(t)))
    first, second, third = str(check_model(model)).splitlines()
    assert first == "EBM site 'x': ok, log Z given as a function"
    assert second == "    depends on latent 'theta'"
    assert third.startswith("    d log Z / d theta is -")
    assert "PROBLEM, log Z unknown" in str(checked(given_theta(scaled)))
    assert str(check_model(lambda: None)) == "no EnergyDistribution site and no energy_factor"


# --- manners


def test_nothing_is_left_behind():
    def model():
        a = pyro.param("new", torch.tensor(2.0))
        random.random(), np.random.rand()  # noqa: NPY002
        t = pyro.sample("theta", dist.Gamma(4.0, 2.0))
        pyro.sample("x", scaled(a * t, log_normalizer=lambda: log_z_of(a * t)), obs=X[0])

    kept = pyro.param("kept", torch.tensor(1.0))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    with poutine.trace(param_only=True) as outer:
        check_model(model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002
    assert list(pyro.get_param_store().keys()) == ["kept"]
    assert pyro.param("kept") is kept
    assert kept.grad is None
    assert not any(site["type"] == "param" for site in outer.trace.nodes.values())


def test_setting():
    warns = pytest.warns(MissingNormalizerWarning, match="latent 'theta'")
    with pyro.settings.context(ebm_missing_normalizer="warn"), warns:
        check = check_model(given_theta(scaled))
    assert not check.is_sound
    assert not checked(given_theta(scaled)).is_sound


def test_values_to_check_at():
    model = given_theta(lambda t: scaled(t, log_normalizer=lambda: log_z_of(t)))
    (check,) = check_model(model, X, at={"theta": torch.tensor(5.0)}).sites["x"].gradients
    assert check.given == pytest.approx(-7 * 0.5 / 5.0)
    with pytest.raises(
        ValueError, match=r"at names \['thta'\]; the model's latents are \['theta'\]"
    ):
        check_model(model, at={"thta": torch.tensor(5.0)})
