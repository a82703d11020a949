"""Estimates with their influence functions: what two files of consistency tests share."""

from __future__ import annotations

import math

import pyro
import torch

TOLERANCE = 1e-9  # largest entry of the gradient at a minimum


def frozen(objective, law, truth, x):
    """The rows' losses as a function of theta, with log Z as its last entry where the objective
    learns one.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(truth), obs=x)

    held = objective.freeze(model, x)
    contrast = None if held is objective else held.contrasts["x"]  # deterministic: nothing is held

    def rows(theta):
        c = theta[..., -1] if objective.learns_log_normalizer else torch.zeros(())
        return objective.per_datum(law(theta).expand([len(x)]), x, contrast, c)

    return rows


def minimize(rows, theta, size, num_rows, max_steps=20):
    """Returns the minimizer of the mean, ``size`` parameters of it, and every row's influence."""

    def mean(theta):
        return rows(theta).mean()

    for _ in range(max_steps):
        at = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(mean(at), at)
        hessian = torch.autograd.functional.hessian(mean, at)
        if gradient.abs().max() < TOLERANCE:
            break
        theta = (at - torch.linalg.solve(hessian, gradient)).detach()
    assert gradient.abs().max() < TOLERANCE
    apart = theta.expand(num_rows, -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(rows(apart).sum(), apart)
    return theta[:size], -(scores @ torch.linalg.inv(hessian))[:, :size]


def in_double(estimate, objectives, data):
    """Estimates by name, all from the same data; for fixtures of a module."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return {name: estimate(make(), data()) for name, make in objectives.items()}
    finally:
        torch.set_default_dtype(dtype)


def largest_z(difference, influence):
    """The largest entry of an error, in its standard errors."""
    stderr = influence.std(0) / math.sqrt(len(influence))
    return float((difference / stderr).abs().max())
