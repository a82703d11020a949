"""Ordinary Pyro models with posterior moments that do not come from sampling.

Each row is a model, its arguments, and a reference: the mean and the mean square of what is
compared, in float64, by conjugacy or by Gauss-Legendre quadrature with priors written out by hand.
Gaussian sites are integrated out in closed form, given the two or three parameters on the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor
from torch import distributions as law

F64 = torch.float64
Moments = dict[str, tuple[Tensor, Tensor]]
"""Name to the means and mean squares of what is compared."""


@dataclass(frozen=True)
class Row:
    """A model and the moments of its posterior.

    Args:
        name: What tests call it.
        model: The Pyro model.
        reference: The model's arguments, in float64, to the exact moments.
        args: The model's arguments.
        kwargs: Its keyword arguments.
        compared: Draws by site to what is compared; the sites themselves by default.
        options: What its run needs, such as ``num_samples``.
        warning: What its run warns of, if it does.
    """

    name: str
    model: Callable[..., Any]
    reference: Callable[..., Moments]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    compared: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    options: dict[str, Any] = field(default_factory=dict)
    warning: str | None = None

    def moments(self) -> Moments:
        args = tuple(_double(a) for a in self.args)
        return self.reference(*args, **{k: _double(v) for k, v in self.kwargs.items()})


def _double(value):
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_real else value


# --- exact moments


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def moments_of(distribution):
    """Mean and mean square of a distribution's coordinates."""
    mean, variance = distribution.mean, distribution.variance
    return mean, variance + mean.square()


def gaussian_moments(mean, covariance):
    return mean, covariance.diagonal(dim1=-2, dim2=-1) + mean.square()


class Grid:
    """The tensor product of Gauss-Legendre nodes on intervals ``(low, high, number of nodes)``."""

    def __init__(self, *axes):
        nodes, weights = zip(*(_gauss_legendre(*axis) for axis in axes), strict=True)
        self.points = [x.reshape(-1) for x in torch.meshgrid(*nodes, indexing="ij")]
        self.log_weight = sum(w.log().reshape(-1) for w in torch.meshgrid(*weights, indexing="ij"))

    def expect(self, log_density, **functions):
        """Name to the moments under a density; a function is its values, or (mean, mean square)."""
        p = torch.softmax(log_density + self.log_weight, 0)
        return {name: _weighted(p, f) for name, f in functions.items()}


def _gauss_legendre(low, high, count):
    x, w = np.polynomial.legendre.leggauss(count)
    half = 0.5 * (high - low)
    return torch.as_tensor(low + half * (x + 1.0)), torch.as_tensor(half * w)


def _weighted(p, values):
    first, second = values if isinstance(values, tuple) else (values, values.square())
    return torch.tensordot(p, first, 1), torch.tensordot(p, second, 1)


def half_cauchy(x, scale):
    return -torch.log1p((x / scale).square())


def linear_gaussian(design, noise, y, prior_mean, prior_precision):
    """The posterior of w in ``y ~ N(design w, noise^2)``, and the log evidence; batched in front.

    ``prior_precision`` is a matrix; of its determinant only the part that varies is kept.
    """
    scaled = design / noise[..., None]
    precision = prior_precision + scaled.mT @ scaled
    chol = torch.linalg.cholesky(precision)
    right = prior_precision @ prior_mean[..., None] + scaled.mT @ (y / noise)[..., None]
    mean = torch.cholesky_solve(right, chol)[..., 0]
    residual = y - (design @ mean[..., None])[..., 0]
    shift = (mean - prior_mean)[..., None]
    prior_quadratic = (shift.mT @ prior_precision @ shift)[..., 0, 0]
    log_evidence = (
        -0.5 * (residual / noise).square().sum(-1)
        - noise.log().sum(-1)
        - 0.5 * prior_quadratic
        + 0.5 * torch.linalg.slogdet(prior_precision).logabsdet
        - 0.5 * torch.linalg.slogdet(precision).logabsdet
    )
    return mean, torch.cholesky_inverse(chol), log_evidence


# --- data, the same in every run


def rng(seed):
    return np.random.default_rng(seed)


def single(x):
    return torch.as_tensor(np.asarray(x), dtype=torch.float32)


NORMAL = single(1.3 + 0.8 * rng(1).normal(size=12))
DESIGN = single(np.c_[np.ones(15), rng(2).normal(size=(15, 2))])
RESPONSE = single(DESIGN.numpy() @ np.array([0.7, -1.2, 0.4]) + 0.6 * rng(3).normal(size=15))
BINARY = single(rng(4).random(25) < 1.0 / (1.0 + np.exp(-0.4 - 1.3 * rng(5).normal(size=25))))
BINARY_X = single(rng(5).normal(size=25))
COUNT_X = single(rng(6).normal(size=18))
COUNT = single(rng(7).poisson(np.exp(0.8 + 0.5 * COUNT_X.numpy())))
SCHOOLS = single([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_SD = single([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
GROUPS = single(
    0.5 + rng(8).normal(size=(1, 5)) + 0.7 * rng(9).normal(size=(4, 5))
)  # observations, groups


# --- conjugate models


def normal_inverse_gamma(y):
    variance = pyro.sample("variance", dist.InverseGamma(4.0, 3.0))
    mean = pyro.sample("mean", dist.Normal(0.5, (variance / 2.0).sqrt()))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)


def normal_inverse_gamma_moments(y):
    n, k = len(y), 2.0 + len(y)
    centre = (2.0 * 0.5 + y.sum()) / k
    shape = 4.0 + 0.5 * n
    rate = 3.0 + 0.5 * (y.square().sum() + 2.0 * 0.5**2 - k * centre.square())
    variance = rate / (shape - 1.0)
    return {
        "mean": (centre, centre.square() + variance / k),
        "variance": (variance, rate.square() / ((shape - 1.0) * (shape - 2.0))),
    }


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 0.6), obs=y)


def regression_moments(x, y):
    mean, covariance, _ = linear_gaussian(
        x, torch.full_like(y, 0.6), y, torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64) / 4.0
    )
    return {"w": gaussian_moments(mean, covariance)}


def regression_with_unknown_noise(x, y):
    precision = pyro.sample("precision", dist.Gamma(3.0, 2.0))
    sd = precision.rsqrt()
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0 * sd).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, sd), obs=y)


def regression_with_unknown_noise_moments(x, y):
    precision = torch.eye(3, dtype=F64) / 4.0 + x.T @ x
    mean = torch.linalg.solve(precision, x.T @ y)
    shape = 3.0 + 0.5 * len(y)
    rate = 2.0 + 0.5 * (y.square().sum() - mean @ precision @ mean)
    covariance = torch.linalg.inv(precision) * rate / (shape - 1.0)
    return {
        "w": gaussian_moments(mean, covariance),
        "precision": moments_of(law.Gamma(shape, rate)),
    }


def beta_binomial(successes):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(successes)):
        pyro.sample("successes", dist.Binomial(10, p), obs=successes)


def beta_binomial_moments(successes):
    total = successes.sum()
    return {"p": moments_of(law.Beta(2.0 + total, 3.0 + 10.0 * len(successes) - total))}


def gamma_poisson(counts):
    with pyro.plate("group", 3):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)


def gamma_poisson_moments(counts):
    return {"rate": moments_of(law.Gamma(2.0 + counts.sum(0), 1.0 + tensor(len(counts))))}


def dirichlet_multinomial(counts):
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.5, 1.0, 2.0, 3.0])))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), p), obs=counts)


def dirichlet_multinomial_moments(counts):
    return {"p": moments_of(law.Dirichlet(tensor(0.5, 1.0, 2.0, 3.0) + counts))}


# --- regressions without a closed form


def logistic_regression(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=a + b * x), obs=y)


def logistic_regression_moments(x, y):
    grid = Grid((-6.0, 6.0, 120), (-6.0, 9.0, 120))
    a, b = grid.points
    eta = a[:, None] + b[:, None] * x
    like = (y * eta - torch.nn.functional.softplus(eta)).sum(-1)
    return grid.expect(like - (a.square() + b.square()) / 8.0, a=a, b=b)


def poisson_regression(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson((w[..., 0] + w[..., 1] * x).exp()), obs=y)


def poisson_regression_moments(x, y):
    grid = Grid((-2.0, 3.0, 150), (-2.0, 3.0, 150))
    a, b = grid.points
    eta = a[:, None] + b[:, None] * x
    like = (y * eta - eta.exp()).sum(-1)
    return grid.expect(like - (a.square() + b.square()) / 2.0, w=torch.stack([a, b], -1))


def robust_location(y):
    """A Student-t likelihood with an outlier, unknown scale."""
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(4.0, loc, scale), obs=y)


def robust_location_moments(y):
    grid = Grid((-3.0, 5.0, 160), (1e-6, 8.0, 200))
    loc, scale = grid.points
    t = law.StudentT(tensor(4.0), loc[:, None], scale[:, None])
    log_p = t.log_prob(y).sum(-1) - loc.square() / 50.0 + half_cauchy(scale, 1.0)
    return grid.expect(log_p, loc=loc, scale=scale)


def gaussian_process(x, y):
    lengthscale = pyro.sample("lengthscale", dist.LogNormal(0.0, 0.7))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(2.0))
    distance = (x[:, None] - x) / lengthscale
    covariance = amplitude**2 * (-0.5 * distance**2).exp() + 0.09 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def gaussian_process_moments(x, y):
    grid = Grid((-4.5, 4.5, 90), (1e-6, 9.0, 90))
    log_length, amplitude = grid.points
    distance = (x[:, None] - x) / log_length.exp()[:, None, None]
    covariance = amplitude[:, None, None] ** 2 * (-0.5 * distance**2).exp()
    covariance = covariance + 0.09 * torch.eye(len(x), dtype=F64)
    like = law.MultivariateNormal(torch.zeros(len(x), dtype=F64), covariance).log_prob(y)
    prior = -0.5 * (log_length / 0.7).square() - amplitude.square() / 8.0
    return grid.expect(like + prior, log_lengthscale=log_length, amplitude=amplitude)


def gaussian_process_compared(draws):
    return {"log_lengthscale": draws["lengthscale"].log(), "amplitude": draws["amplitude"]}


# --- hierarchies


def schools_centred(y, sd):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def schools_noncentred(y, sd):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


schools_reparam = poutine.reparam(schools_centred, {"theta": LocScaleReparam(centered=0.0)})


def schools_moments(y, sd):
    # tau = 5 tan(a) makes the prior of a flat on (0, pi/2).
    grid = Grid((-25.0, 30.0, 100), (1e-9, math.pi / 2.0 - 1e-9, 400))
    mu, angle = grid.points
    tau = 5.0 * angle.tan()
    spread = (tau[:, None] ** 2 + sd**2).sqrt()
    like = law.Normal(mu[:, None], spread).log_prob(y).sum(-1)
    precision = tau[:, None] ** -2 + sd**-2
    mean = (mu[:, None] * tau[:, None] ** -2 + y * sd**-2) / precision
    return grid.expect(
        like - mu.square() / 50.0,
        mu=mu,
        log_tau=tau.log(),
        theta=(mean, mean.square() + 1.0 / precision),
    )


def schools_compared(draws):
    mu, tau = draws["mu"], draws["tau"]
    if "theta" in draws:
        theta = draws["theta"]
    else:
        z = draws["z"] if "z" in draws else draws["theta_decentered"]
        theta = mu[..., None] + tau[..., None] * z
    return {"mu": mu, "log_tau": tau.log(), "theta": theta}


def nested_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    tau = pyro.sample("tau", dist.InverseGamma(3.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", y.shape[1]):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("observations", y.shape[0]):
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def nested_plates_moments(y):
    n, groups = y.shape
    grid = Grid((-4.0, 5.0, 120), (0.05, 4.0, 80))
    log_tau, sigma = grid.points
    tau = log_tau.exp()
    centre = y.mean(0)
    within = (y - centre).square().sum()
    design = torch.ones(groups, 1, dtype=F64)
    noise = (tau.square() + sigma.square() / n).sqrt()[:, None].expand(-1, groups)
    prior = tensor(1.0 / 9.0)[:, None]
    mean, covariance, evidence = linear_gaussian(design, noise, centre, tensor(0.0), prior)
    log_p = evidence - 0.5 * within / sigma.square() - (n - 1) * groups * sigma.log()
    log_p = log_p - 3.0 * log_tau - 2.0 / tau - 0.5 * sigma.square()
    share = (tau.square() / noise[:, 0].square())[:, None]  # of the group's own mean in theta
    theta = mean + share * (centre - mean)
    variance = (1.0 - share) * tau[:, None] ** 2 + (1.0 - share) ** 2 * covariance[:, 0]
    return grid.expect(
        log_p,
        log_tau=log_tau,
        sigma=sigma,
        mu=(mean[:, 0], mean[:, 0].square() + covariance[:, 0, 0]),
        theta=(theta, theta.square() + variance),
    )


def nested_plates_compared(draws):
    rest = {name: draws[name] for name in ("mu", "sigma", "theta")}
    return rest | {"log_tau": draws["tau"].log()}


# --- time series


def autoregression(y):
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("time", len(y) - 1):
        pyro.sample("y", dist.Normal(phi * y[:-1], sigma), obs=y[1:])


def autoregression_moments(y):
    grid = Grid((-1.0, 1.0, 200), (0.05, 4.0, 200))
    phi, sigma = grid.points
    error = y[1:] - phi[:, None] * y[:-1]
    like = -0.5 * error.square().sum(-1) / sigma.square() - (len(y) - 1) * sigma.log()
    return grid.expect(like - 0.5 * sigma.square(), phi=phi, sigma=sigma)


def autoregression_data(phi=0.9, count=25):
    noise, y = rng(10).normal(size=count), np.zeros(count)
    for t in range(1, count):
        y[t] = phi * y[t - 1] + 0.7 * noise[t]
    return single(y)


def local_level(y):
    """A random walk seen through noise, by its steps."""
    drift = pyro.sample("drift", dist.LogNormal(-0.7, 0.3))
    noise = pyro.sample("noise", dist.LogNormal(-0.7, 0.3))
    steps = pyro.sample("steps", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    level = drift * steps.cumsum(-1)
    pyro.sample("y", dist.Normal(level, noise).to_event(1), obs=y)


def local_level_loop(y):
    """The same law, one site a time, with Markov dependence."""
    drift = pyro.sample("drift", dist.LogNormal(-0.7, 0.3))
    noise = pyro.sample("noise", dist.LogNormal(-0.7, 0.3))
    level = torch.zeros(())
    for t in pyro.markov(range(len(y))):
        level = pyro.sample(f"level_{t}", dist.Normal(level, drift))
        pyro.sample(f"y_{t}", dist.Normal(level, noise), obs=y[t])


def local_level_moments(y):
    grid = Grid((-3.0, 1.5, 50), (-3.0, 1.5, 50))  # logarithms
    log_drift, log_noise = grid.points
    drift, noise = log_drift.exp(), log_noise.exp()
    sums = torch.ones(len(y), len(y), dtype=F64).tril()
    mean, covariance, evidence = linear_gaussian(
        drift[:, None, None] * sums,
        noise[:, None].expand(-1, len(y)),
        y,
        torch.zeros(len(y), dtype=F64),
        torch.eye(len(y), dtype=F64),
    )
    scale = drift[:, None, None] * sums
    level = (scale @ mean[..., None])[..., 0]
    variance = (scale @ covariance @ scale.mT).diagonal(dim1=-2, dim2=-1)
    prior = -0.5 * ((log_drift + 0.7).square() + (log_noise + 0.7).square()) / 0.3**2
    return grid.expect(
        evidence + prior, drift=drift, noise=noise, level=(level, level.square() + variance)
    )


def local_level_compared(draws):
    if "steps" in draws:
        level = draws["drift"][..., None] * draws["steps"].cumsum(-1)
    else:
        level = torch.stack([draws[f"level_{t}"] for t in range(len(draws) - 2)], -1)
    return {"drift": draws["drift"], "noise": draws["noise"], "level": level}


LEVELS = single(np.cumsum(0.5 * rng(11).normal(size=10)) + 0.4 * rng(12).normal(size=10))


# --- mixtures


def ordered_mixture(y):
    """Two components with unknown weight; the means are ordered, or their labels would switch."""
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    ordered = dist.TransformedDistribution(base, dist.transforms.OrderedTransform())
    means = pyro.sample("means", ordered)
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    mixing = dist.Categorical(torch.stack([weight, 1.0 - weight], -1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(mixing, dist.Normal(means, 0.5)), obs=y)


def ordered_mixture_moments(y):
    # The transform is (x, x + exp(z)) of two standard normals x and z.
    grid = Grid((-4.0, 4.0, 70), (-5.0, 4.0, 70), (0.0, 1.0, 40))
    first, z, weight = grid.points
    second = first + z.exp()
    parts = torch.stack([weight, 1.0 - weight], -1).log()
    like = 0.0
    for value in y:
        error = value - torch.stack([first, second], -1)
        like = like + torch.logsumexp(parts - 2.0 * error.square(), -1)
    prior = -0.5 * (first.square() + z.square()) + parts.sum(-1)
    return grid.expect(like + prior, means=torch.stack([first, second], -1), weight=weight)


CLUSTERS = single(np.r_[rng(13).normal(-0.8, 0.5, 9), rng(14).normal(1.1, 0.5, 14)])


@config_enumerate
def enumerated_mixture(y):
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    gap = pyro.sample("gap", dist.HalfNormal(2.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(k * gap - 0.8, 0.5), obs=y)


def enumerated_mixture_moments(y):
    grid = Grid((0.0, 1.0, 100), (0.0, 12.0, 300))
    weight, gap = grid.points
    zero = (1.0 - weight[:, None]).log() - 2.0 * (y + 0.8).square()
    one = weight[:, None].log() - 2.0 * (y + 0.8 - gap[:, None]).square()
    like = torch.logaddexp(zero, one).sum(-1)
    prior = weight.log() + (1.0 - weight).log() - gap.square() / 8.0
    return grid.expect(like + prior, weight=weight, gap=gap)


# --- supports


def scales(y):
    with pyro.plate("groups", 2):
        wide = pyro.sample("wide", dist.HalfCauchy(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, wide), obs=y[:, None].expand(-1, 2))


def scales_moments(y):
    grid = Grid((1e-6, 12.0, 400))
    (scale,) = grid.points
    like = -0.5 * y.square().sum() / scale.square() - len(y) * scale.log()
    (mean, square) = grid.expect(like + half_cauchy(scale, 1.0), wide=scale)["wide"]
    return {"wide": (mean.expand(2), square.expand(2))}


def bounded(y):
    """The likelihood presses against an end of the interval."""
    rate = pyro.sample("rate", dist.Uniform(1.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


def bounded_moments(y):
    grid = Grid((1.0, 3.0, 100))
    (rate,) = grid.points
    return grid.expect(len(y) * rate.log() - rate * y.sum(), rate=rate)


def correlations():
    pyro.sample("cholesky", dist.LKJCholesky(3, 2.0))


def correlations_moments():
    # (r + 1) / 2 is Beta(a, a) with a = concentration - 1 + dim / 2
    variance = 1.0 / (2.0 * 2.5 + 1.0)
    return {"r": (torch.zeros(3, dtype=F64), torch.full((3,), variance, dtype=F64))}


def correlations_compared(draws):
    matrix = draws["cholesky"] @ draws["cholesky"].mT
    rows, columns = torch.tril_indices(3, 3, -1)
    return {"r": matrix[..., rows, columns]}


def covariance(y):
    cholesky = pyro.sample("cholesky", dist.LKJCholesky(2, 1.5))
    sd = pyro.sample("sd", dist.HalfNormal(2.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        factor = sd[..., None] * cholesky
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor), obs=y)


def covariance_moments(y):
    grid = Grid((-1.0, 1.0, 80), (0.05, 6.0, 60), (0.05, 6.0, 60))
    r, a, b = grid.points
    rest = 1.0 - r.square()
    square = y.T @ y
    quadratic = square[0, 0] / a**2 + square[1, 1] / b**2 - 2.0 * r * square[0, 1] / (a * b)
    like = -0.5 * quadratic / rest - len(y) * (a.log() + b.log() + 0.5 * rest.log())
    prior = 0.5 * rest.log() - (a**2 + b**2) / 8.0
    return grid.expect(like + prior, r=r, sd=torch.stack([a, b], -1))


def covariance_compared(draws):
    matrix = draws["cholesky"] @ draws["cholesky"].mT
    return {"r": matrix[..., 1, 0], "sd": draws["sd"]}


PAIRS = single(rng(15).multivariate_normal([0, 0], [[1.0, 0.9], [0.9, 1.5]], 12))


# --- features of Pyro


def statements(y, weight=1.0, *, mask=None):
    """A parameter, a factor, a deterministic site, a scale, a mask and keyword arguments."""
    offset = pyro.param("offset", torch.tensor(0.5))
    m = pyro.sample("m", dist.Normal(offset, 2.0))
    pyro.deterministic("twice", 2.0 * m)
    pyro.factor("pull", -0.5 * (m - 1.0) ** 2)
    with pyro.plate("data", len(y)), poutine.scale(scale=weight), poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def statements_moments(y, weight=1.0, *, mask):
    precision = 0.25 + 1.0 + weight * mask.sum()
    mean = (0.25 * 0.5 + 1.0 + weight * y[mask].sum()) / precision
    return {"m": (mean, mean.square() + 1.0 / precision)}


MASK = torch.arange(12) % 3 > 0


def missing_values(y, mask):
    """Values that are not seen are latent, in a site of full shape that is masked to them."""
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y, obs_mask=mask)


def missing_values_moments(y, mask):
    precision = 0.25 + mask.sum()
    mean = y[mask].sum() / precision
    square = mean.square() + 1.0 / precision
    size = int((~mask).sum())  # given m, the missing ones are N(m, 1)
    rest = torch.zeros(int(mask.sum()), dtype=F64)  # no part of the density: standard normal
    return {
        "m": (mean, square),
        "missing": (mean.expand(size), (square + 1.0).expand(size)),
        "masked": (rest, rest + 1.0),
    }


def missing_values_compared(draws):
    y = draws["y_unobserved"]
    return {"m": draws["m"], "missing": y[..., ~MASK], "masked": y[..., MASK]}


class BayesianLinear(PyroModule):
    """A linear layer with Gaussian weights: a Gaussian posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](3, 2, bias=False)
        prior = dist.Normal(0.0, 1.5).expand([2, 3]).to_event(2)
        self.linear.weight = PyroSample(prior)

    def forward(self, x, y):
        mean = self.linear(x)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.6).to_event(1), obs=y)


def bayesian_linear_moments(x, y):
    eye = torch.eye(3, dtype=F64)
    rows = [
        gaussian_moments(
            *linear_gaussian(
                x, torch.full_like(column, 0.6), column, torch.zeros(3, dtype=F64), eye / 1.5**2
            )[:2]
        )
        for column in y.T
    ]
    means, squares = zip(*rows, strict=True)
    return {"linear.weight": (torch.stack(means), torch.stack(squares))}


def double(y):
    """Float64 by its arguments alone."""
    zero = torch.zeros((), dtype=F64)
    m = pyro.sample("m", dist.Normal(zero, 2.0))
    s = pyro.sample("s", dist.HalfNormal(zero + 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, s), obs=y)


def double_moments(y):
    grid = Grid((-4.0, 5.0, 120), (0.1, 4.0, 120))
    m, s = grid.points
    like = -0.5 * (y - m[:, None]).square().sum(-1) / s.square() - len(y) * s.log()
    return grid.expect(like - m.square() / 8.0 - s.square() / 2.0, m=m, s=s)


def mixed_dtypes(y):
    """A float32 and a float64 latent."""
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.HalfNormal(torch.ones((), dtype=F64)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, s), obs=y)


def shapes(y):
    """Scalar, (1,) by event, (1,) by plate, and (2, 3)."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    with pyro.plate("one", 1):
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 3), pyro.plate("rows", 2):
        d = pyro.sample("d", dist.Normal(0.0, 1.0))
    total = a + b.sum(-1) + c.sum(-1) + d.sum((-1, -2))
    pyro.sample("y", dist.Normal(total, 1.0), obs=y)


def shapes_moments(y):
    # Nine standard normals, their sum seen with unit noise.
    mean, variance = y / 10.0, 1.0 - 1.0 / 10.0
    sizes = {"a": (), "b": (1,), "c": (1,), "d": (2, 3)}
    square = mean.square() + variance
    return {name: (mean.expand(size), square.expand(size)) for name, size in sizes.items()}


def flat_priors(x, y):
    """Improper flat priors by ``mask(False)``; the flat prior of the scale is on the scale."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False))
    sd = pyro.sample("sd", dist.HalfNormal(1.0).mask(False))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w, sd), obs=y)


def flat_priors_moments(x, y):
    # variance ~ InverseGamma(a, b), w a Student-t about the least squares
    square = x.T @ x
    mean = torch.linalg.solve(square, x.T @ y)
    shape = 0.5 * (len(y) - 3 - 1)
    rate = 0.5 * (y - x @ mean).square().sum()
    variance = rate / (shape - 1.0)
    sd = rate.sqrt() * math.exp(math.lgamma(shape - 0.5) - math.lgamma(shape))
    return {"w": gaussian_moments(mean, torch.linalg.inv(square) * variance), "sd": (sd, variance)}


ROWS = [
    Row("normal inverse gamma", normal_inverse_gamma, normal_inverse_gamma_moments, (NORMAL,)),
    Row("regression", regression, regression_moments, (DESIGN, RESPONSE)),
    Row(
        "regression, unknown noise",
        regression_with_unknown_noise,
        regression_with_unknown_noise_moments,
        (DESIGN, RESPONSE),
    ),
    Row("beta binomial", beta_binomial, beta_binomial_moments, (single([3, 7, 4, 5]),)),
    Row(
        "gamma poisson",
        gamma_poisson,
        gamma_poisson_moments,
        (single([[0, 2, 9], [1, 3, 7], [0, 1, 12]]),),
    ),
    Row(
        "dirichlet multinomial",
        dirichlet_multinomial,
        dirichlet_multinomial_moments,
        (single([0, 3, 9, 4]),),
    ),
    Row(
        "logistic regression",
        logistic_regression,
        logistic_regression_moments,
        (BINARY_X, BINARY),
    ),
    Row("poisson regression", poisson_regression, poisson_regression_moments, (COUNT_X, COUNT)),
    Row(
        "student-t likelihood",
        robust_location,
        robust_location_moments,
        (single([0.1, 0.5, -0.3, 1.2, 0.8, 0.4, 14.0, 0.9, 0.2]),),
    ),
    Row(
        "gaussian process",
        gaussian_process,
        gaussian_process_moments,
        (single(np.linspace(-2, 2, 9)), single(np.sin(2 * np.linspace(-2, 2, 9)))),
        compared=gaussian_process_compared,
    ),
    Row(
        "schools, centred",
        schools_centred,
        schools_moments,
        (SCHOOLS, SCHOOLS_SD / 4.0),
        compared=schools_compared,
        options={"num_samples": 400},
    ),
    Row(
        "schools, non-centred",
        schools_noncentred,
        schools_moments,
        (SCHOOLS, SCHOOLS_SD),
        compared=schools_compared,
        options={"num_samples": 400},
    ),
    Row(
        "schools, reparam",
        schools_reparam,
        schools_moments,
        (SCHOOLS, SCHOOLS_SD),
        compared=schools_compared,
        options={"num_samples": 400},
    ),
    Row(
        "nested plates",
        nested_plates,
        nested_plates_moments,
        (GROUPS,),
        compared=nested_plates_compared,
    ),
    Row("autoregression", autoregression, autoregression_moments, (autoregression_data(),)),
    Row(
        "local level",
        local_level,
        local_level_moments,
        (LEVELS,),
        compared=local_level_compared,
        options={"num_samples": 400},
    ),
    Row(
        "local level, loop",
        local_level_loop,
        local_level_moments,
        (LEVELS,),
        compared=local_level_compared,
        options={"num_samples": 400},
    ),
    Row("ordered mixture", ordered_mixture, ordered_mixture_moments, (CLUSTERS,)),
    Row(
        "enumerated mixture",
        enumerated_mixture,
        enumerated_mixture_moments,
        (CLUSTERS,),
    ),
    Row("half-cauchy scales", scales, scales_moments, (NORMAL,)),
    Row("uniform", bounded, bounded_moments, (single([0.1, 0.3, 0.2, 0.15, 0.6]),)),
    Row("lkj prior", correlations, correlations_moments, compared=correlations_compared),
    Row("lkj covariance", covariance, covariance_moments, (PAIRS,), compared=covariance_compared),
    Row("statements", statements, statements_moments, (NORMAL,), {"weight": 0.5, "mask": MASK}),
    Row(
        "missing values",
        missing_values,
        missing_values_moments,
        (NORMAL, MASK),
        compared=missing_values_compared,
        warning="does not depend on some entries of y_unobserved",
    ),
    Row(
        "pyro module",
        BayesianLinear(),
        bayesian_linear_moments,
        (DESIGN, torch.stack([RESPONSE, -RESPONSE + 0.3], -1)),
    ),
    Row("flat priors", flat_priors, flat_priors_moments, (DESIGN, RESPONSE)),
    Row("float64", double, double_moments, (NORMAL.double(),)),
    Row("mixed dtypes", mixed_dtypes, double_moments, (NORMAL,)),
    Row("shapes", shapes, shapes_moments, (torch.tensor(4.0),)),
]
