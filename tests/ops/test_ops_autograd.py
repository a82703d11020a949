"""Gradients with respect to x leave everything else as it was."""

import pytest
import torch

from pyro_ebm.ops.autograd import grad_of


def net():
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return module.double()


def energy_of(module):
    return lambda x: module(x).squeeze(-1)


def reference(module, x):
    x = x.clone().requires_grad_()
    value = energy_of(module)(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


MODES = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
def test_value_and_gradient_in_every_mode(mode):
    module, x = net(), torch.randn(5, 3, dtype=torch.float64)
    expected = reference(module, x)
    with MODES[mode]():
        value, grad = grad_of(energy_of(module), x)
    assert torch.equal(value, expected[0])
    assert torch.equal(grad, expected[1])
    assert not value.requires_grad
    assert not grad.requires_grad
    assert not grad.is_inference()


@pytest.mark.parametrize("mode", MODES)
def test_mode_is_restored(mode):
    with MODES[mode]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        grad_of(torch.square, torch.ones(2))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


def test_parameters_are_left_alone():
    module = net()
    module[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in module.parameters()]
    grad_of(energy_of(module), torch.randn(2, 3, dtype=torch.float64))
    assert [p.requires_grad for p in module.parameters()] == flags
    assert all(p.grad is None for p in module.parameters())


def test_input_is_left_alone():
    leaf = torch.ones(2, requires_grad=True)
    inner = leaf * 2
    grad_of(torch.square, inner)
    assert inner.requires_grad
    assert leaf.grad is None
    plain = torch.ones(2)
    grad_of(torch.square, plain)
    assert not plain.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_latents_drawn_under_inference_mode_may_parametrize_the_energy(mode):
    with torch.inference_mode():
        theta = torch.tensor([2.0, 3.0])
        module = net()
    x = torch.ones(4, 2)
    with MODES[mode]():
        _, grad = grad_of(lambda x: (theta * x.square()).sum(-1), x)
        grad_of(energy_of(module), torch.ones(1, 3, dtype=torch.float64))
    assert torch.equal(grad, (2 * theta).expand(4, 2))


def test_input_made_under_inference_mode():
    with torch.inference_mode():
        x = torch.tensor([3.0])
    assert grad_of(torch.square, x)[1].item() == 6.0


@pytest.mark.parametrize(
    "energy",
    [
        lambda x: torch.zeros(len(x)),
        lambda x: torch.ones(len(x), requires_grad=True),
        lambda x: x.detach().sum(-1),
        lambda x: x.round().detach().sum(-1) * torch.ones((), requires_grad=True),
    ],
)
def test_energy_without_x_says_so(energy):
    with pytest.raises(ValueError, match="the energy does not depend on x"):
        grad_of(energy, torch.ones(2, 3))


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        grad_of(energy_of(net()), torch.ones(2, 5, dtype=torch.float64))
