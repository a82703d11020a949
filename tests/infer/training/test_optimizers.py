"""Optimizers of a fit: fused where torch can, with the same updates, and as they were asked for."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from pyro_ebm.infer.training.optimizers import new_optimizer


def moved(make, *, steps=5):
    weight = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    optimizer = make([{"params": [weight], "lr": 0.1}])
    for step in range(steps):
        optimizer.zero_grad()
        (weight.sin() * (step + 1.0)).sum().backward()
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("optim", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_updates_are_those_of_the_class(optim):
    fused, optimizer = moved(lambda groups: new_optimizer(optim, groups, 0.5))
    plain, _ = moved(lambda groups: optim(groups, lr=0.5))
    assert optimizer.defaults["fused"] is True
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "optim", [torch.optim.Adam, partial(torch.optim.SGD, fused=True), torch.optim.RMSprop]
)
def test_updates_are_versions(optim):
    """Fused or not; of tensors that rest nothing is counted."""
    weight, resting = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = new_optimizer(optim, [{"params": [weight, resting]}], 0.1)
    for _ in range(2):
        before = weight._version
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
        assert weight._version > before
    assert resting._version == 0


def test_a_partial_is_taken_as_it_is():
    _, optimizer = moved(lambda groups: new_optimizer(partial(torch.optim.Adam), groups, 0.5))
    assert not optimizer.defaults["fused"]


def test_classes_that_are_not_fused():
    """Fused SGD takes no sparse gradients, and torch has no fused RMSprop."""
    _, optimizer = moved(lambda groups: new_optimizer(torch.optim.RMSprop, groups, 0.5))
    assert "fused" not in optimizer.defaults
    table = torch.nn.Embedding(4, 2, sparse=True)
    sgd = new_optimizer(torch.optim.SGD, [{"params": [table.weight]}], 0.5)
    table(torch.tensor([1])).sum().backward()
    sgd.step()


def test_complex_parameters_are_not_fused():
    weight = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    optimizer = new_optimizer(torch.optim.Adam, [{"params": [weight]}], 0.1)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert weight.detach().real.tolist() == pytest.approx([0.9, 0.9])
