"""GeneralizedEBM: the latent law, its temperature, its draws, and the density it does not have."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn

from pyro_ebm import EnergyDistribution, GeneralizedEBM, LogNormalizer
from pyro_ebm.distributions.pushforward import PushforwardDistribution
from pyro_ebm.energies import GaussianEnergy

# z ~ N(0, I), x = A z, E = |x|^2 / 2 - h'x: the latent law is Gaussian with precision I + A'A
A = torch.tensor([[1.0, 0.0], [0.5, 1.0], [-0.3, 0.2]], dtype=torch.float64)
H = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
PRECISION = torch.eye(2, dtype=torch.float64) + A.T @ A
MEAN = torch.linalg.solve(PRECISION, A.T @ H)
LOG_Z = 0.5 * (A.T @ H) @ MEAN - 0.5 * torch.logdet(PRECISION)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def prior():
    return dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)


def generate(z):
    return z @ A.T


def energy(x):
    return 0.5 * x.square().sum(-1) - x @ H


def linear(**options):
    return GeneralizedEBM(generate, prior(), energy, **options)


def test_reference_values():
    assert abs(LOG_Z.item() + 0.49638443) < 1e-8
    torch.testing.assert_close(MEAN, torch.tensor([0.24235808, -0.49344978]), atol=1e-8, rtol=0)


def test_shapes_and_parts():
    model = linear()
    assert (model.batch_shape, model.event_shape) == ((), (3,))
    assert model.base_measure == "generator"
    assert isinstance(model.base, PushforwardDistribution)
    assert model.generator is generate
    assert model.energy_function is energy
    assert model.prior.event_shape == (2,)
    assert (model.latent.event_shape, model.latent.base_measure) == ((2,), "lebesgue")
    assert not model.is_normalized
    assert not model.has_exact_sample


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0, torch.tensor(2.0, dtype=torch.float64)])
def test_the_latent_law_is_prior_times_tempered_energy(beta):
    model, z = linear(inverse_temperature=beta), torch.randn(5, 2)
    x = generate(z)
    torch.testing.assert_close(model.energy(x), beta * energy(x))
    torch.testing.assert_close(model.unnormalized_log_prob(x), -beta * energy(x))
    torch.testing.assert_close(model.potential(x), beta * energy(x))
    torch.testing.assert_close(model.latent.energy(z), beta * energy(x))
    torch.testing.assert_close(
        model.latent.unnormalized_log_prob(z), prior().log_prob(z) - beta * energy(x)
    )
    assert model.is_tempered is not (isinstance(beta, float) and beta == 1.0)


def test_the_latent_density_with_log_z_is_the_gaussian():
    model, z = linear(log_normalizer=LOG_Z), torch.randn(5, 2)
    truth = dist.MultivariateNormal(MEAN, precision_matrix=PRECISION)
    assert model.is_normalized
    torch.testing.assert_close(model.latent.log_prob(z), truth.log_prob(z))
    torch.testing.assert_close(
        model.with_log_normalizer(LOG_Z).latent.log_prob(z), truth.log_prob(z)
    )


def test_what_is_known_of_log_z_after_tempering():
    model = linear(log_normalizer=LOG_Z)
    assert model.temper(1.0).log_normalizer is LOG_Z
    assert model.temper(0.0).log_normalizer == 0.0
    assert model.temper(0.0).latent.log_normalizer_value() == 0.0
    assert not model.temper(0.5).is_normalized
    assert not model.tilt(energy).is_normalized
    z = torch.randn(5, 2)
    torch.testing.assert_close(model.temper(0.0).latent.log_prob(z), prior().log_prob(z))


def test_temper_multiplies_and_tilt_adds():
    model, x = linear(inverse_temperature=0.5), torch.randn(5, 3)
    again = model.temper(4.0)
    assert type(again) is GeneralizedEBM
    assert again.inverse_temperature == 2.0
    assert model.inverse_temperature == 0.5
    torch.testing.assert_close(again.energy(x), 2 * energy(x))
    tilted = model.tilt(lambda x: x.sum(-1))
    torch.testing.assert_close(tilted.energy(x), 0.5 * energy(x) + x.sum(-1))
    torch.testing.assert_close(tilted.temper(3.0).energy(x), 3 * (0.5 * energy(x) + x.sum(-1)))
    plain = linear().tilt(lambda x: x.sum(-1))
    torch.testing.assert_close(plain.energy(x), energy(x) + x.sum(-1))
    assert not plain.is_tempered


def test_draws_are_the_generators_of_latent_draws():
    """Mean of x is A times the mean of z; 2000 independent chains, |z| < 5."""
    x = linear().sample((2000,))
    z = (x.mean(0) - A @ MEAN) / x.std(0) * 2000**0.5
    assert z.abs().max() < 5
    from_prior = generate(prior().sample((2000,)))
    assert ((from_prior.mean(0) - A @ MEAN) / x.std(0) * 2000**0.5).abs().max() > 5
    torch.testing.assert_close(x[:, 2], -0.4 * x[:, 0] + 0.2 * x[:, 1])  # on the generator's plane


def test_expand_and_plates():
    model = linear(log_normalizer=LogNormalizer(LOG_Z), inverse_temperature=2.0)
    wide = model.expand([4])
    assert type(wide) is GeneralizedEBM
    assert (wide.batch_shape, wide.latent.batch_shape, wide.prior.batch_shape) == ((4,),) * 3
    assert (wide.inverse_temperature, wide.is_normalized) == (2.0, True)
    draws = wide.sample((6,))
    assert draws.shape == (6, 4, 3)
    assert draws.unique(dim=0).shape[0] == 6
    with pyro.plate("rows", 4):
        assert pyro.sample("x", model).shape == (4, 3)
    scalars = GeneralizedEBM(torch.exp, dist.Normal(torch.zeros(4), 1.0), lambda x: x)
    assert scalars.to_event(1).sample().shape == (4,)


def test_predictive_in_one_batch():
    def model():
        with pyro.plate("rows", 3):
            x = pyro.sample("x", linear())
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1))

    draws = Predictive(model, num_samples=5, parallel=True)()
    assert draws["x"].shape == draws["y"].shape == (5, 3, 3)


def test_parameters_get_gradients_from_the_latent_energy():
    generator, net = nn.Linear(2, 3), nn.Linear(3, 1)
    beta = torch.tensor(0.7, requires_grad=True)
    model = GeneralizedEBM(
        generator, prior(), lambda x: net(x).squeeze(-1), inverse_temperature=beta
    )
    model.latent.unnormalized_log_prob(torch.randn(5, 2)).sum().backward()
    assert all(p.grad.ne(0).any() for p in [*generator.parameters(), *net.parameters(), beta])


@pytest.mark.parametrize("remedy", ["KALE", "DonskerVaradhan", "LatentReparam", "likelihood"])
def test_log_prob_names_the_remedies(remedy):
    with pytest.raises(NotImplementedError, match=remedy):
        linear(log_normalizer=LOG_Z).log_prob(torch.zeros(3))


def test_an_observed_site_has_no_density():
    def model():
        pyro.sample("x", linear(), obs=torch.zeros(3))

    with pytest.raises(NotImplementedError, match="no density in x"):
        poutine.trace(model).get_trace().compute_log_prob()


def test_it_cannot_be_a_base():
    normalized = linear(log_normalizer=LOG_Z)
    with pytest.raises(NotImplementedError, match="tilt"):
        normalized.as_base(energy)
    with pytest.raises(ValueError, match="has no density and cannot be a base"):
        EnergyDistribution(energy, base=normalized)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["deepcopy", "pickle"]
)
def test_copies(copied):
    model = GeneralizedEBM(nn.Linear(2, 3), prior(), nn.Bilinear(3, 3, 1), event_shape=(3,))
    assert copied(model.expand([4])).latent.batch_shape == (4,)
    new, z = copied(GeneralizedEBM(generate, prior(), energy, inverse_temperature=0.5)), MEAN
    torch.testing.assert_close(new.latent.energy(z), 0.5 * energy(generate(z)))


def test_an_energy_as_prior_must_be_normalized():
    """An exact energy serves as a latent prior; one without log Z does not."""
    exact = EnergyDistribution(GaussianEnergy(torch.zeros(2), event_dim=1))
    z = torch.randn(3, 2)
    model = GeneralizedEBM(generate, exact, energy)
    torch.testing.assert_close(
        model.latent.unnormalized_log_prob(z), linear().latent.unnormalized_log_prob(z)
    )
    with pytest.raises(ValueError, match="prior of a GeneralizedEBM must be normalized"):
        GeneralizedEBM(generate, exact.tilt(lambda z: z.sum(-1)), energy)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((3.0, prior(), energy), TypeError, "generator must be callable"),
        ((generate, 3.0, energy), TypeError, "prior must be a Pyro distribution"),
        ((generate, prior(), 3.0), TypeError, "energy must be callable"),
    ],
)
def test_bad_input(arguments, error, match):
    with pytest.raises(error, match=match):
        GeneralizedEBM(*arguments)


def test_a_tempered_normalizer_is_that_of_the_tempered_energy():
    """log Z(beta) of the linear model, against the mean of exp(-beta E) over the generator."""
    beta = 0.3
    x = generate(prior().sample((200_000,)))
    weight = (-linear(inverse_temperature=beta).energy(x)).exp()
    precision = torch.eye(2) + beta * A.T @ A
    log_z = 0.5 * beta**2 * (A.T @ H) @ torch.linalg.solve(precision, A.T @ H)
    log_z = log_z - 0.5 * torch.logdet(precision)
    z = (weight.mean() - log_z.exp()) / weight.std() * math.sqrt(len(weight))
    assert abs(z) < 5
