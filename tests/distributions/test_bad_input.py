"""Bad input to distributions: one clear sentence, at the earliest moment, and nothing is lost.

Wrong shapes are in the file of the shape law, wrong generators beside the generator's law.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints as C
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from torch import nn

from pyro_ebm import (
    EnergyDistribution,
    GeneralizedEBM,
    LogNormalizer,
    NonFiniteEnergyError,
    diagnose,
    to_arviz,
)
from pyro_ebm.energies import GaussianEnergy
from pyro_ebm.errors import ImproperEnergyWarning
from pyro_ebm.mcmc import RecordingHMC, RecordingNUTS
from pyro_ebm.ops.constraints import sphere, spins


def square(x):
    return x**2


def summed(x):
    return x.square().sum(-1)


NORMAL = dist.Normal(0.0, 1.0)
UNNORMALIZED = EnergyDistribution(square, event_shape=())

CONSTRUCTION = {
    # --- kinds
    "energy is a tensor": (
        lambda: EnergyDistribution(torch.ones(3), NORMAL),
        TypeError,
        "energy must be callable, x -> E\\(x\\), got Tensor",
    ),
    "energy is None": (
        lambda: EnergyDistribution(None, NORMAL),
        TypeError,
        "energy must be callable, x -> E\\(x\\), got NoneType",
    ),
    "base is a number": (
        lambda: EnergyDistribution(square, 3.0),
        TypeError,
        "base must be a Pyro distribution, for example .*, got float",
    ),
    "base is a class": (
        lambda: EnergyDistribution(square, dist.Normal),
        TypeError,
        "base must be a Pyro distribution, for example .*, got Normal",
    ),
    "support is a string": (
        lambda: EnergyDistribution(square, event_shape=(), support="positive"),
        TypeError,
        "support must be a constraint such as constraints.positive, got str",
    ),
    "event_shape is a number": (
        lambda: EnergyDistribution(square, event_shape=2),
        TypeError,
        r"event_shape must be a tuple of integers, got 2; write \(2,\)",
    ),
    "batch_shape is a number": (
        lambda: EnergyDistribution(square, event_shape=(), batch_shape=3),
        TypeError,
        r"batch_shape must be a tuple of integers, got 3; write \(3,\)",
    ),
    "log_normalizer is a string": (
        lambda: EnergyDistribution(square, NORMAL, log_normalizer="0.3"),
        TypeError,
        "log_normalizer must be a number, a tensor, a LogNormalizer or a function .* got str",
    ),
    "log_normalizer is a list": (
        lambda: UNNORMALIZED.with_log_normalizer([0.3]),
        TypeError,
        "log_normalizer must be .* got list",
    ),
    "log_normalizer is complex": (
        lambda: UNNORMALIZED.with_log_normalizer(1j),
        TypeError,
        "log_normalizer must be .* got complex",
    ),
    "log_normalizer is infinite": (
        lambda: UNNORMALIZED.with_log_normalizer(float("inf")),
        ValueError,
        "log_normalizer must be finite, got inf: leave it out if log Z is unknown",
    ),
    # --- shapes and supports that contradict each other
    "nothing says the event shape": (
        lambda: EnergyDistribution(square),
        ValueError,
        r"needs base=, or support= and event_shape=.*event_shape=\(2,\)",
    ),
    "event_shape against the base": (
        lambda: EnergyDistribution(summed, NORMAL.expand([2]), event_shape=(2,)),
        ValueError,
        r"event_shape \(2,\) does not match the base's \(\); base.to_event\(n\)",
    ),
    "support against the base": (
        lambda: EnergyDistribution(square, NORMAL, support=C.positive),
        ValueError,
        "support .* does not match the base's Real",
    ),
    "batch_shape against the base": (
        lambda: EnergyDistribution(square, NORMAL.expand([3]), batch_shape=(4,)),
        ValueError,
        r"batch_shape \(4,\) does not broadcast with the base's \(3,\)",
    ),
    "batch_shape against the energy": (
        lambda: EnergyDistribution(GaussianEnergy(torch.zeros(3)), batch_shape=(4,)),
        ValueError,
        r"batch_shape \(4,\) does not broadcast with the energy's \(3,\)",
    ),
    "support without room in the event": (
        lambda: EnergyDistribution(summed, support=C.simplex),
        ValueError,
        "support .* has event_dim 1, but events have 0 dims; give event_shape",
    ),
    "unnormalized base": (
        lambda: EnergyDistribution(square, UNNORMALIZED),
        ValueError,
        r"base must be normalized: use base.tilt\(energy\)",
    ),
    "unnormalized base inside a wrapper": (
        lambda: EnergyDistribution(summed, UNNORMALIZED.expand([2]).to_event(1)),
        ValueError,
        r"base must be normalized: use base.tilt\(energy\)",
    ),
    "generator as base of a plain energy": (
        lambda: EnergyDistribution(
            square, GeneralizedEBM(torch.tanh, NORMAL, square, log_normalizer=0.1)
        ),
        ValueError,
        "has no density and cannot be a base",
    ),
}


@pytest.mark.parametrize("what", CONSTRUCTION)
def test_construction(what):
    make, error, match = CONSTRUCTION[what]
    with pytest.raises(error, match=match):
        make()


class NeedsContext(nn.Module):
    def forward(self, context):
        return context.sum()


@pytest.mark.parametrize(
    "function",
    [lambda theta: theta, NeedsContext(), UNNORMALIZED.energy, torch.tanh],
    ids=["lambda", "module", "an energy", "built-in"],
)
def test_a_log_normalizer_that_wants_arguments(function):
    d = UNNORMALIZED.with_log_normalizer(function)
    with pytest.raises(TypeError, match="log_normalizer must be callable without arguments"):
        d.log_prob(torch.tensor(1.0))


@pytest.mark.parametrize("value", [None, "0.3", (0.1, 0.2)])
def test_a_log_normalizer_that_returns_something_else(value):
    d = UNNORMALIZED.with_log_normalizer(lambda: value)
    with pytest.raises(TypeError, match="log_normalizer returned .*; expected a tensor"):
        d.log_prob(torch.tensor(1.0))


def test_errors_inside_a_log_normalizer_are_its_own():
    def broken():
        return len(3)

    with pytest.raises(TypeError, match="has no len"):
        UNNORMALIZED.with_log_normalizer(broken).log_prob(torch.tensor(1.0))


@pytest.mark.parametrize("value", [3.0, None, [1.0], GaussianEnergy])
def test_an_energy_that_returns_no_tensor(value):
    d = EnergyDistribution(lambda x: value, event_shape=(2,))
    with pytest.raises(TypeError, match="energy returned .*; expected a tensor of shape"):
        d.log_prob(torch.zeros(2))


def test_a_class_in_place_of_its_instance():
    with pytest.raises(TypeError, match="an object, x -> E.x., got the class GaussianEnergy"):
        EnergyDistribution(GaussianEnergy, NORMAL)


OUTSIDE = [
    (C.positive, (), -1.0),
    (C.unit_interval, (), 1.5),
    (C.simplex, (2,), [0.5, 0.6]),
    (C.boolean, (), 0.5),
    (C.integer_interval(0, 2), (), 3.0),
    (spins, (2,), [1.0, 0.0]),
    (sphere, (2,), [1.0, 1.0]),
    (C.real, (), float("nan")),
    (C.cat([C.real, C.boolean], -1, [1, 1]), (2,), [0.3, 0.3]),
]


@pytest.mark.parametrize(("support", "event_shape", "value"), OUTSIDE)
def test_observations_outside_the_support(support, event_shape, value):
    d = EnergyDistribution(lambda x: 0 * x, support=support, event_shape=event_shape)
    with pytest.raises(ValueError, match="to be within the support"):
        d.log_prob(torch.tensor(value))

    def model():
        pyro.sample("x", d, obs=torch.tensor(value))

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match="'x'|within the support"):
        svi.step()


# --- energies that are no laws -------------------------------------------------------------------


def run(kernel, num_samples=60, warmup=30):
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize(
    "energy",
    [lambda x: torch.zeros(x.shape), lambda x: x.detach() ** 2, lambda x: x.round().detach()],
    ids=["constant", "detached", "rounded"],
)
def test_an_energy_without_gradient_in_x(energy):
    with pytest.raises(ValueError, match="the energy does not depend on x"):
        EnergyDistribution(energy, event_shape=()).sample()


def nuts_on_reals(energy):
    """Two short chains, their trees kept small: on a flat potential they would double for ever."""
    torch.set_default_dtype(torch.float64)
    d = EnergyDistribution(energy, event_shape=(), sampler=lambda d, shape: torch.zeros(shape))

    def model():
        pyro.sample("x", d)

    chains = [run(RecordingNUTS(model, max_tree_depth=3), 60, 30) for _ in range(2)]
    return {"x": torch.stack([mcmc.get_samples()["x"] for mcmc in chains])}


@pytest.mark.parametrize("energy", [lambda x: 0 * x, lambda x: x], ids=["constant", "linear"])
def test_an_improper_energy_under_nuts_is_said_afterwards(energy):
    """NUTS itself raises nothing."""
    draws = nuts_on_reals(energy)
    with pytest.warns(ImproperEnergyWarning, match="site 'x' .* probably not integrable"):
        to_arviz(draws)
    assert any("probably not integrable" in text for text in diagnose(draws).warnings)


def test_an_energy_that_falls_without_bound_does_not_pass_for_a_law():
    """Its chains drift apart more slowly than a runaway is called one; R-hat sees them."""
    verdict = diagnose(nuts_on_reals(lambda x: -0.01 * x**2))
    assert not verdict.ok
    assert verdict.rhat.value > 1.5


def test_nan_energies_under_sampling():
    d = EnergyDistribution(lambda x: x * float("nan"), NORMAL)
    with pytest.raises(NonFiniteEnergyError, match="check the energy for NaN and infinities"):
        d.sample()


def test_nan_energies_under_nuts():
    """Pyro finds no starting point; the distribution's own prototype speaks first."""
    d = EnergyDistribution(lambda x: x * float("nan"), NORMAL)
    with pytest.raises(NonFiniteEnergyError, match="not finite at any"):
        run(NUTS(lambda: pyro.sample("x", d)))


def test_partly_infinite_energies_are_rejected_not_hidden():
    """An infinite wall: draws stay inside, and no step comes from the wall."""
    torch.set_default_dtype(torch.float64)
    d = EnergyDistribution(
        lambda x: torch.where(x > -0.5, 0.0, torch.inf), base=dist.Normal(0.0, 1.0)
    )
    draws = run(NUTS(lambda: pyro.sample("x", d)), 200, 100).get_samples()["x"]
    assert draws.min() > -0.5
    assert d.log_prob(torch.tensor(-1.0)) == -torch.inf


# --- kernels on sites that have no gradient ------------------------------------------------------

UNMOVABLE = {
    "boolean": (C.boolean, "Boolean"),
    "spins": (spins, "Spins"),
    "integers": (C.integer_interval(0, 3), "IntegerInterval"),
    "counts": (C.nonnegative_integer, "IntegerGreaterThan"),
    "sphere": (sphere, "Sphere"),
    "mixed": (C.cat([C.real, C.boolean], -1, [1, 2]), "Cat"),
}


def energy_on(name):
    support, _ = UNMOVABLE[name]
    return EnergyDistribution(summed, support=support, event_shape=(3,))


@pytest.mark.parametrize("kernel", [RecordingNUTS, RecordingHMC])
@pytest.mark.parametrize("name", UNMOVABLE)
def test_recording_kernels_name_the_site_and_its_support(name, kernel):
    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", energy_on(name))
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.0))

    with pytest.raises(TypeError, match=f"model 'model': site 'x' lives on .*{UNMOVABLE[name][1]}"):
        run(kernel(model))


@pytest.mark.parametrize("name", UNMOVABLE)
def test_stock_nuts_refuses_too(name):
    """In Pyro's own words: the site's name, or at least the constraint."""
    with pytest.raises(
        (ValueError, NotImplementedError), match="site 'x'|Cannot transform _Sphere"
    ):
        run(NUTS(lambda: pyro.sample("x", energy_on(name))))


def test_other_errors_of_a_model_pass_through_recording_kernels():
    def model():
        pyro.sample("x", NORMAL)
        raise ValueError("the user's own")

    with pytest.raises(ValueError, match="the user's own"):
        run(RecordingNUTS(model))


def test_a_normalized_finite_site_is_summed_out():
    energies = torch.tensor([0.0, 1.0, -0.5])
    d = EnergyDistribution(
        lambda k: energies[k.long()],
        support=C.integer_interval(0, 2),
        event_shape=(),
        log_normalizer=(-energies).logsumexp(0),
    )

    def model():
        m = pyro.sample("m", NORMAL)
        k = pyro.sample("k", d)
        pyro.sample("y", dist.Normal(m + k, 1.0), obs=torch.tensor(2.0))

    assert list(run(RecordingNUTS(model)).get_samples()) == ["m"]


# --- where a density is asked that is not there --------------------------------------------------


def test_a_generalized_ebm_under_nuts_names_latent_reparam():
    law = GeneralizedEBM(torch.tanh, NORMAL, square)
    with pytest.raises(NotImplementedError, match=r"reparam\(model, \{site: LatentReparam\(\)\}\)"):
        run(NUTS(lambda: pyro.sample("x", law)))


def test_a_stale_log_z_is_said_to_be_stale():
    weight = nn.Parameter(torch.ones(()))
    d = EnergyDistribution(
        lambda x: weight * x**2,
        event_shape=(),
        log_normalizer=LogNormalizer(torch.tensor(0.5), parameters=(weight,)),
    )
    with torch.no_grad():
        weight += 1.0
    with pytest.raises(RuntimeError, match="log Z is stale: parameters have changed"):
        d.log_prob(torch.tensor(1.0)).backward()


def test_nothing_is_lost_after_an_error():
    """The handler stack, the grad mode and the random state of the library are as before."""
    d = EnergyDistribution(lambda x: x.square().sum(-1, keepdim=True), event_shape=(2,))
    for use in (
        d.sample,
        lambda: d.log_prob(torch.zeros(3, 2)),
        lambda: d.score(torch.zeros(3, 2)),
    ):
        with pytest.raises(RuntimeError, match="squeeze"):
            use()
    assert torch.is_grad_enabled()
    trace = poutine.trace(lambda: pyro.sample("x", NORMAL)).get_trace()
    assert list(trace.nodes) == ["_INPUT", "x", "_RETURN"]
