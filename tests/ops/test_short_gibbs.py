"""Gibbs sweeps: the whole transition matrix keeps the law, and the draws follow the matrix."""

import itertools

import pytest
import torch

from pyro_ebm.ops import short_gibbs
from pyro_ebm.ops.short_gibbs import GibbsSweep, conditional_potentials

F64 = torch.float64
VALUES = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
SHAPE = torch.Size([3])
STATES = torch.tensor(list(itertools.product(VALUES.tolist(), repeat=3)), dtype=F64)
COUPLING = torch.tensor([[0.2, 0.5, -0.3], [0.0, -0.1, 0.4], [0.0, 0.0, 0.3]], dtype=F64)


def potential(x):
    return torch.einsum("...i,ij,...j->...", x, COUPLING, x) + 0.3 * x[..., 0] * x[..., 1].exp()


def law():
    return torch.softmax(-potential(STATES), 0)


def site_matrix(site):
    """The transition matrix of one coordinate's update, from the shipped conditionals."""
    energies = conditional_potentials(potential, STATES[..., None], site, VALUES[:, None], SHAPE)
    weights = torch.softmax(-energies, 0)
    matrix = torch.zeros(len(STATES), len(STATES), dtype=F64)
    for k, value in enumerate(VALUES):
        to = STATES.clone()
        to[:, site] = value
        index = (to[:, None] == STATES).all(-1).double().argmax(-1)
        matrix[torch.arange(len(STATES)), index] += weights[k]
    return matrix


def sweep_matrix():
    return site_matrix(0) @ site_matrix(1) @ site_matrix(2)


def test_conditional_potentials_are_those_of_the_changed_states():
    energies = conditional_potentials(potential, STATES[..., None], 1, VALUES[:, None], SHAPE)
    assert energies.shape == (3, 27)
    for k, value in enumerate(VALUES):
        changed = STATES.clone()
        changed[:, 1] = value
        assert torch.equal(energies[k], potential(changed))


def test_sweep_keeps_the_law_exactly():
    matrix, pi = sweep_matrix(), law()
    assert (matrix.sum(1) - 1).abs().max() < 1e-12
    assert (pi @ matrix - pi).abs().max() < 1e-12


def test_every_site_update_is_reversible():
    for site in range(3):
        flow = law()[:, None] * site_matrix(site)
        assert (flow - flow.T).abs().max() < 1e-12


def z_of_one_sweep(num=100_000):
    """Largest z between where one sweep lands and the row of the matrix that it started from."""
    kernel = GibbsSweep(VALUES, SHAPE)
    point = kernel.start(potential, STATES[7].expand(num, 3))
    point, accepted = kernel.step(potential, point)
    assert (accepted == 1).all()
    assert torch.equal(point.target, potential(kernel.events(point)))
    landed = (kernel.events(point)[:, None] == STATES).all(-1).double().mean(0)
    row = sweep_matrix()[7]
    return float(((landed - row) / (row * (1 - row) / num).sqrt()).abs().max())


def test_sweeps_land_where_the_matrix_says():
    assert z_of_one_sweep() < 5


def test_draws_with_the_wrong_sign_are_noticed(monkeypatch):
    draw = short_gibbs.draw_by_weight
    monkeypatch.setattr(short_gibbs, "draw_by_weight", lambda weights: draw(-weights))
    assert z_of_one_sweep() > 5


def test_forbidden_values_are_never_drawn():
    def gated(x):
        return torch.where(x.sum(-1) > 1, torch.nan, x.sum(-1))

    kernel = GibbsSweep(torch.tensor([0.0, 1.0]), torch.Size([4]))
    point = kernel.start(gated, torch.zeros(500, 4))
    for _ in range(3):
        point, _ = kernel.step(gated, point)
    assert point.position.sum(-1).max() == 1


def test_one_hot_sites():
    logits = torch.tensor([0.0, 1.0, -1.0])
    kernel = GibbsSweep(torch.eye(3), torch.Size([2, 3]))
    start = torch.eye(3)[torch.zeros(20_000, 2, dtype=torch.long)]

    def energy(x):
        return -(x @ logits).sum(-1)

    point, _ = kernel.step(energy, kernel.start(energy, start))
    x = kernel.events(point)
    assert torch.equal(x.sum(-1), torch.ones(20_000, 2))
    torch.testing.assert_close(x.mean((0, 1)), logits.softmax(0), rtol=0, atol=0.015)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_dtype_and_leading_dims(dtype):
    """An image energy that takes rows and nothing else sees candidates as rows."""
    net = torch.nn.Conv2d(1, 1, 2)

    def energy(x):
        assert x.dtype == dtype
        return net(x.float()).sum((-3, -2, -1))

    kernel = GibbsSweep(torch.tensor([0.0, 1.0]), torch.Size([1, 3, 3]))
    with torch.no_grad():
        point = kernel.start(energy, torch.zeros(4, 1, 3, 3, dtype=dtype))
        point, _ = kernel.step(energy, point)
    assert kernel.events(point).shape == (4, 1, 3, 3)
    assert kernel.events(point).dtype == dtype
