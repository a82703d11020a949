"""The Gaussian of the cross-method test: its law, its data, and estimates of it in many ways."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from estimates import carried, frozen, minimize, of_first_rows
from estimating_equations import root

from pyro_ebm.distributions import EnergyDistribution

NUM_ROWS = 20_000
PRECISION = torch.tensor([[1.4, -0.5], [-0.5, 0.8]], dtype=torch.float64)
LINEAR = torch.tensor([0.4, -0.2], dtype=torch.float64)
TRUTH = torch.tensor([1.4, -0.5, 0.8, 0.4, -0.2], dtype=torch.float64)
BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.7).to_event(1)
EYE = torch.eye(2, dtype=torch.float64)


def potential(theta, x):
    """U(x) = x'Ax / 2 - b'x, for one theta or one per row."""
    a, off, d, b, c = theta[..., :5].unbind(-1)
    squares = 0.5 * (a * x[..., 0] ** 2 + d * x[..., 1] ** 2) + off * x[..., 0] * x[..., 1]
    return squares - b * x[..., 0] - c * x[..., 1]


class Quadratic:
    """The energy over the base."""

    def __init__(self, theta):
        self.theta = theta

    def __call__(self, x):
        return potential(self.theta, x) + BASE.log_prob(x)


def ebm(theta):
    return EnergyDistribution(Quadratic(theta), base=BASE)


def exact_log_z(theta):
    a, off, d, b, c = theta[..., :5].unbind(-1)
    det = a * d - off**2
    quadratic = (d * b**2 - 2 * off * b * c + a * c**2) / det
    return math.log(2 * math.pi) - 0.5 * det.log() + 0.5 * quadratic


def data():
    pyro.set_rng_seed(20)
    mean, cov = moments(TRUTH)
    return dist.MultivariateNormal(mean, cov).sample((NUM_ROWS,))


def likelihood(x):
    return lambda theta: potential(theta, x) + exact_log_z(theta)


def start(objective):
    known = objective is not None and objective.learns_log_normalizer
    return torch.cat([TRUTH, exact_log_z(TRUTH)[None]]) if known else TRUTH.clone()


# --- one parameter for another


def parts(theta):
    """A and b."""
    a, off, d = theta[:3]
    return torch.stack([a, off, off, d]).reshape(2, 2), theta[3:5]


def joined(precision, linear):
    return torch.cat([precision.reshape(4)[[0, 1, 3]], linear])


def moments(theta):
    """Mean and covariance."""
    precision, linear = parts(theta)
    cov = torch.linalg.inv(precision)
    return cov @ linear, cov


def of_moments(mean, cov):
    precision = torch.linalg.inv(cov)
    return joined(precision, precision @ mean)


def blurred(theta, noise_std):
    """The law of x + noise_std z; with ``-noise_std**2`` as the variance, the way back."""
    mean, cov = moments(theta)
    return of_moments(mean, cov + noise_std * abs(noise_std) * EYE)


def left_invariant(theta, step_size):
    """What Langevin steps without rejection keep, of which A - (step A)^2 / 4 is the precision."""
    precision, linear = parts(theta)
    kept = precision - 0.25 * step_size**2 * precision @ precision
    return joined(kept, kept @ torch.linalg.solve(precision, linear))


def aimed_at(theta, step_size):
    """The law whose Langevin steps keep that of ``theta``."""
    precision, linear = parts(theta)
    values, vectors = torch.linalg.eigh(precision)
    values = 2 / step_size**2 * (1 - (1 - step_size**2 * values).sqrt())
    aim = vectors @ torch.diag(values) @ vectors.T
    return joined(aim, aim @ torch.linalg.solve(precision, linear))


# --- draws that are exact


def exact_draws(p, x):
    """Draws of p as a transition, whatever the state."""
    mean, cov = moments(p.energy_function.theta)
    return mean + torch.randn_like(x) @ torch.linalg.cholesky(cov).T


def recovered(law, near):
    """Draws of the law of a datum given its noised copy, which is Gaussian."""
    at = torch.zeros_like(near).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(law.potential(at).sum(), at, create_graph=True)
        rows = [torch.autograd.grad(slope[..., k].sum(), at, retain_graph=True)[0] for k in (0, 1)]
    precision = torch.stack(rows, -2).reshape(-1, 2, 2)[0]
    mean = -torch.linalg.solve(precision, slope.detach().unsqueeze(-1))[..., 0]
    return mean + torch.randn_like(near) @ torch.linalg.cholesky(torch.linalg.inv(precision)).T


# --- telescoping: every bridge is a difference of quadratics, so that the model holds for each

WAYMARK = 0.6


class Bridges:
    """Two bridges: E_1 = U_1 + b, and E_2 = U_2 over the base."""

    def __init__(self, theta):
        self.theta = theta

    def bridges(self, x):
        first, second, constant = self.theta[..., :5], self.theta[..., 5:10], self.theta[..., 10]
        return torch.stack(
            [potential(first, x) + constant, potential(second, x) + BASE.log_prob(x)]
        )

    def __call__(self, x):
        return self.bridges(x).sum(0)


def bridged(theta):
    return EnergyDistribution(Bridges(theta), base=BASE)


def true_bridges():
    """Of data and waymark, and of waymark and base; the constant; log Z of both bridges."""
    (mean, cov), kept = moments(TRUTH), 1 - WAYMARK**2
    waymark = of_moments(math.sqrt(kept) * mean, kept * cov + WAYMARK**2 * 1.7**2 * EYE)
    log_z = exact_log_z(waymark)
    constant = exact_log_z(TRUTH) - 2 * log_z
    return torch.cat([TRUTH - waymark, waymark, constant[None], 2 * log_z[None]])


def by_bridges(objective, x):
    truth = true_bridges()
    rows = frozen(objective, bridged, truth, x)
    return minimize(rows, truth.clone(), len(truth), NUM_ROWS)


def total(theta):
    return theta[:5] + theta[5:10]


# --- flow contrastive estimation: a flow that can be the data's law, in equilibrium

NUM_ROUNDS = 2
GAME_SEED = 41  # the same draws of the flow at all parameters


def flow(alpha):
    """The Gaussian with mean ``alpha[:2]`` and log-diagonal and lower entry of its factor."""
    scale, low = alpha[..., 2:4].exp(), alpha[..., 4]
    zero = torch.zeros_like(low)
    factor = torch.stack([scale[..., 0], zero, low, scale[..., 1]], -1)
    return dist.MultivariateNormal(
        alpha[..., :2], scale_tril=factor.reshape(factor.shape[:-1] + (2, 2))
    )


def true_flow():
    mean, cov = moments(TRUTH)
    factor = torch.linalg.cholesky(cov)
    return torch.cat([mean, factor.diagonal().log(), factor[1, :1]])


def of_flow(alpha):
    return of_moments(alpha[:2], flow(alpha).covariance_matrix)


def flow_slopes(objective, theta, x):
    """The flow's g as a function of its parameters, the energy held."""

    def rows(alpha):
        pyro.set_rng_seed(GAME_SEED)
        apart = alpha.expand(len(x), -1).clone().requires_grad_()
        law = ebm(theta.detach()).expand([len(x)])
        losses = objective.second_player(law, x, flow(apart), theta[-1])
        return torch.autograd.grad(losses.sum(), apart)[0]

    return rows


def by_game(objective, x):
    """Energy and flow in turns, each solved for, until neither moves; both estimates."""
    alpha = true_flow() + 0.1
    for _ in range(NUM_ROUNDS):
        pyro.set_rng_seed(GAME_SEED)

        def guide(x, alpha=alpha):
            with pyro.plate("data", len(x)):
                pyro.sample("x", flow(alpha))

        rows = frozen(objective, ebm, TRUTH, x, guide)
        theta, influence = minimize(rows, start(objective), 6, NUM_ROWS)
        before = alpha
        alpha, flows = root(flow_slopes(objective, theta, x), alpha)
    assert ((alpha - before).abs() * math.sqrt(NUM_ROWS) < 0.1 * flows.std(0)).all()
    return (theta[:5], influence[:, :5]), carried(of_flow, alpha, flows)


# --- pairs of rows


def by_pairs(objective, x, num_rows):
    """From as many rows as their pairs allow, whose loss is quadratic.

    A row's influence is that of its pairs with all others.
    """
    rows = frozen(objective, ebm, TRUTH, x[:num_rows])
    at = TRUTH.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rows(at).mean(), at)
    inverse = torch.linalg.inv(torch.autograd.functional.hessian(lambda t: rows(t).mean(), at))
    theta = (at - inverse @ gradient).detach()
    steps = 0.1 * torch.eye(5, dtype=torch.float64)
    slopes = torch.stack([rows(theta + e) - rows(theta - e) for e in steps], -1) / 0.2
    return of_first_rows(theta, -objective.degree * slopes @ inverse, NUM_ROWS)
