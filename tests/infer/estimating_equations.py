"""Estimates by objectives whose draws follow the parameters, with their influence functions.

Such an objective has no loss to minimize: its estimate is where the mean over rows of

    g(x; theta) = dU/dtheta (x) - dU/dtheta (x-(x; theta))

is zero. With the same random numbers at every theta this is a fixed function of it, whose slope
counts what the draws owe to theta. Where they are accepted or rejected it jumps, by 1 / n a time.
"""

from __future__ import annotations

import math

import pyro
import torch

SEED = 40
CLOSE = 0.1  # of a standard error, to which equations are solved
NUM_FIRST = 5  # full Newton steps, for chains to forget their start


def slopes(objective, law, x, contrast, theta):
    """The gradient in theta of every row's loss, draws held, ``(rows, size)``."""
    apart = theta.expand(len(x), -1).clone().requires_grad_()
    losses = objective.per_datum(law(apart).expand([len(x)]), x, contrast, torch.zeros(()))
    return torch.autograd.grad(losses.sum(), apart)[0]


def equation(objective, law, x):
    """Every row's g as a function of theta."""

    def rows(theta):
        pyro.set_rng_seed(SEED)
        with torch.no_grad():
            contrast = objective.draw(law(theta).expand([len(x)]), x, None)
        return slopes(objective, law, x, contrast, theta)

    return rows


def root(rows, theta, step=0.02, max_steps=12):
    """Returns where the mean of ``rows`` is zero, near ``theta``, and every row's influence."""
    sides = [
        rows(theta + e).mean(0) - rows(theta - e).mean(0) for e in step * torch.eye(len(theta))
    ]
    inverse = torch.linalg.inv(torch.stack(sides, -1) / (2 * step))
    for _ in range(max_steps):
        values = rows(theta)
        influence = -values @ inverse.T
        move = influence.mean(0)
        if (move.abs() * math.sqrt(len(values)) < CLOSE * influence.std(0)).all():
            return theta, influence
        theta = theta + move
    raise AssertionError(f"no root within {max_steps} steps, the last one {move}")


def persistent(objective, law, theta, x, num_averaged):
    """Newton steps with chains that go on, their sizes falling as 1 / t.

    Returns the last theta and every row's influence: its own, and that of the chain in the slot of
    its number, averaged over the steps whose noise theta averages too.
    """

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law(theta), obs=x)

    def statistics(at):
        apart = theta.detach().expand(len(at), -1).clone().requires_grad_()
        return torch.autograd.grad(law(apart).expand([len(at)]).potential(at).sum(), apart)[0]

    pyro.set_rng_seed(SEED)
    own, chains = statistics(x), torch.zeros(len(x), len(theta))
    inverse = torch.linalg.inv(torch.cov(own.T))  # of the information
    sizes = [1.0] * NUM_FIRST + [1.0 / t for t in range(1, num_averaged + 1)]
    for count, size in enumerate(sizes):
        theta = theta.detach().requires_grad_()
        loss = objective.differentiable_loss(model, lambda x: None, x)
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = theta - size * inverse @ gradient / len(x)
        if count >= NUM_FIRST:
            chains += statistics(objective.chains["x"].positions) / num_averaged
    return theta.detach(), (chains - own) @ inverse
