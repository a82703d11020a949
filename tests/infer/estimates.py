"""Estimates with their influence functions: what two files of consistency tests share."""

from __future__ import annotations

import math

import pyro
import torch

TOLERANCE = 1e-9  # largest entry of the gradient at a minimum


def frozen(objective, law, truth, x, guide=None):
    """The rows' losses as a function of theta, with log Z as its last entry where the objective
    learns one.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(truth), obs=x)

    held = objective.freeze(model, x, guide=guide)
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


def carried(function, theta, influence):
    """An estimate of ``function(theta)`` by the delta method."""
    slope = torch.autograd.functional.jacobian(function, theta)
    return function(theta), influence @ slope.T


def of_first_rows(theta, influence, num_rows):
    """The same estimate from the first of ``num_rows`` rows, beside estimates from all of them."""
    share = len(influence) / num_rows
    rest = influence.new_zeros(num_rows - len(influence), influence.shape[1])
    return theta, torch.cat([influence - influence.mean(0), rest]) / share


class Estimates:
    """Estimates by name, all from the same data, each computed when it is first asked for.

    An entry of ``objectives`` makes an objective, and solves for its estimate.
    """

    def __init__(self, estimate, objectives, data):
        self.estimate, self.objectives, self.data = estimate, objectives, data
        self.found = {}

    def __getitem__(self, name):
        if name not in self.found:
            self.found[name] = self.estimate(*self.objectives[name], self.data())
        return self.found[name]

    def __iter__(self):
        return iter(self.objectives)


def disagreements(name, estimates):
    """Who is four standard errors or more of the difference from ``name``, and by how many.

    Estimates that are the same row for row are left out: no error is there to compare with.
    """
    theta, influence = estimates[name]
    others = {other: estimates[other] for other in estimates}
    distances = {
        other: largest_z(theta - second, influence - rows)
        for other, (second, rows) in others.items()
        if not torch.allclose(influence, rows, rtol=0, atol=1e-6)
    }
    return {other: z for other, z in distances.items() if not z < 4}


def largest_z(difference, influence):
    """The largest entry of an error, in its standard errors."""
    stderr = influence.std(0) / math.sqrt(len(influence))
    return float((difference / stderr).abs().max())
