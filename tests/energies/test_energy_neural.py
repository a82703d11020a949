"""Neural energies: shapes, confinement, activations, spectral norm."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm import GeneralizedEBM
from pyro_ebm.energies import ConvEnergy, MLPEnergy, RowWise

SMOOTH = ("silu", "softplus", "gelu", "tanh", "mish")


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("lead", [(), (5,), (3, 5), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("event_shape", [4, (4,), (2, 3), (), (1,)], ids=str)
def test_mlp_gives_one_value_per_event(event_shape, lead):
    energy = MLPEnergy(event_shape, (8, 8))
    assert energy(torch.randn(lead + tuple(energy.event_shape))).shape == lead


@pytest.mark.parametrize("lead", [(), (5,), (3, 2)], ids=str)
@pytest.mark.parametrize(
    "event_shape", [(8, 8), (1, 8, 8), (3, 9, 7), (28, 28), (1, 28, 28)], ids=str
)
def test_conv_gives_one_value_per_image(event_shape, lead):
    energy = ConvEnergy(event_shape, (4, 8))
    x = torch.rand(lead + event_shape)
    value = energy(x)
    assert value.shape == lead
    rows = torch.stack([energy(row) for row in x.reshape(-1, *event_shape)])
    torch.testing.assert_close(value.reshape(-1), rows)


def test_mlp_is_its_network():
    energy = MLPEnergy((2, 3), (8,))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(energy(x), energy.net(x.flatten(1)).squeeze(-1))


@pytest.mark.parametrize(
    "make",
    [lambda c: MLPEnergy((2, 3), confinement=c), lambda c: ConvEnergy((8, 8), confinement=c)],
)
def test_confinement_adds_half_the_squared_norm(make):
    torch.manual_seed(0)
    free = make(0.0)
    torch.manual_seed(0)
    confined = make(0.3)
    x = torch.randn(4, *free.event_shape)
    torch.testing.assert_close(confined(x) - free(x), 0.15 * x.flatten(1).square().sum(-1))


def test_confinement_may_be_a_parameter_at_zero():
    energy = MLPEnergy(2, confinement=nn.Parameter(torch.tensor(0.0)))
    x = torch.randn(4, 2)
    energy(x).sum().backward()
    torch.testing.assert_close(energy.confinement.grad, 0.5 * x.square().sum())


def test_confinement_makes_the_density_integrable():
    energy = MLPEnergy((), (16,), confinement=0.1)
    far = torch.tensor([-1e4, 1e4])
    assert (energy(far) > 1e6).all()


@pytest.mark.parametrize("activation", SMOOTH)
def test_activations_are_smooth(activation):
    energy = MLPEnergy((), (16, 16), activation=activation)
    x = torch.linspace(-3.0, 3.0, 2001)
    slope = vmap(grad(grad(energy)))(x)
    jumps = slope.diff().abs().max()
    assert jumps < 0.05 * max(1.0, slope.abs().max())


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "SiLU"])
@pytest.mark.parametrize(
    "make", [lambda a: MLPEnergy(2, activation=a), lambda a: ConvEnergy((8, 8), activation=a)]
)
def test_kinked_and_unknown_activations_are_refused(make, activation):
    with pytest.raises(
        ValueError, match=f"one of silu, .*, got '{activation}'.*kink, such as ReLU"
    ):
        make(activation)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="confinement must not be negative, got -1.0"):
        MLPEnergy(2, confinement=-1.0)
    with pytest.raises(ValueError, match=r"\(channels, height, width\), got \(64,\)"):
        ConvEnergy((64,))


# Spectral norm. The layers bound the slope by one when the activation does.


def normed():
    return {
        "mlp": MLPEnergy(2, (16, 16), activation="tanh", spectral_norm=True),
        "conv": ConvEnergy((8, 8), (4, 8), activation="tanh", spectral_norm=True),
    }


def test_spectral_norm_bounds_the_slope():
    energy = normed()["mlp"]
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.mul_(10.0)
    for _ in range(50):
        energy(torch.zeros(1, 2))
    slope = vmap(grad(energy.eval()))(3.0 * torch.randn(500, 2))
    assert slope.norm(dim=-1).max() < 1.01
    free = MLPEnergy(2, (16, 16), activation="tanh")
    with torch.no_grad():
        for parameter in free.parameters():
            parameter.mul_(10.0)
    assert vmap(grad(free))(3.0 * torch.randn(500, 2)).norm(dim=-1).max() > 1.5


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_spectral_norm_in_eval_mode_is_a_fixed_function(name):
    energy = normed()[name].eval()
    x = torch.randn(3, *energy.event_shape)
    assert torch.equal(energy(x), energy(x))
    slope = vmap(grad(energy))(x)
    graph = make_fx(lambda q: vmap(grad(energy))(q))(x)
    torch.testing.assert_close(graph(x), slope)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(energy(leaf).sum(), leaf)[0], slope)


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_spectral_norm_in_train_mode_moves_and_its_graph_goes_on_moving(name):
    energy = normed()[name]
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(3, *energy.event_shape)
    assert not torch.equal(energy(x), energy(x))
    assert vmap(grad(energy))(x).isfinite().all()
    graph = make_fx(lambda q: vmap(grad(energy))(q))(x)
    with pytest.raises(RuntimeError, match="out="):
        graph(x)
    with torch.no_grad():
        assert not torch.equal(graph(x), graph(x))


def test_spectral_norm_is_saved_and_restored():
    energy, other = normed()["mlp"].eval(), normed()["mlp"].eval()
    other.load_state_dict(energy.state_dict())
    x = torch.randn(3, 2)
    assert torch.equal(energy(x), other(x))


def test_an_ensemble_by_functional_call():
    energies = [MLPEnergy(2, (8,), confinement=0.1) for _ in range(3)]
    state = stack_module_state(energies)
    x = torch.randn(5, 2)
    values = vmap(lambda p, b: functional_call(energies[0], (p, b), (x,)))(*state)
    torch.testing.assert_close(values, torch.stack([e(x) for e in energies]))


def test_score_matching_loss_reaches_every_weight():
    energy = MLPEnergy(2, (8, 8), activation="softplus")
    x = torch.randn(4, 2)
    trace = vmap(lambda q: jacrev(grad(energy))(q).trace())(x)
    (trace.mean() + 0.5 * vmap(grad(energy))(x).square().sum(-1).mean()).backward()
    grads = {name: p.grad for name, p in energy.named_parameters()}
    silent = [name for name, g in grads.items() if g is None or not g.abs().sum() > 0]
    assert silent == ["net.4.bias"]  # a constant of the energy


# --- networks that want rows


def upsampler():
    network = nn.Sequential(
        nn.Linear(3, 16),
        nn.BatchNorm1d(16),
        nn.Unflatten(1, (4, 2, 2)),
        nn.ConvTranspose2d(4, 1, 4, 4),
    )
    return RowWise(network.double().eval(), event_dim=1)


def test_row_wise_keeps_leading_dims():
    generator, z = upsampler(), torch.randn(2, 4, 3, dtype=torch.float64)
    x = generator(z)
    assert x.shape == (2, 4, 1, 8, 8)
    torch.testing.assert_close(x[1, 2], generator(z[1, 2]))
    torch.testing.assert_close(x[1], generator.network(z[1]))
    with pytest.raises(ValueError, match="was given an input of shape"):
        generator(torch.tensor(1.0))


def test_a_convolutional_generator_works_with_chains_and_single_latents():
    prior = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    gebm = GeneralizedEBM(upsampler(), prior, ConvEnergy((1, 8, 8), channels=(4,)).double())
    z = prior.sample((6, 2))
    assert gebm.latent.log_prob(z).shape == (6, 2)
    torch.testing.assert_close(gebm.latent.log_prob(z)[3, 1], gebm.latent.log_prob(z[3, 1]))
