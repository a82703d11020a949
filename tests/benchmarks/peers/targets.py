"""Log densities of the targets, written once over a namespace that is torch or jax.numpy.

A target is a density of one chain's unconstrained position ``(D,)``, with observables whose true
means and standard deviations are known. All but ``latent``, ``gaussian`` and ``banana`` are models
of Inference Gym: its data and its ground truth are read from where it is installed, by path, for
the package itself imports TensorFlow.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Array = Any
Namespace = Any
LAYERS = [("g1", (128, 16), 3.0), ("g2", (64, 128), 3.0)]
LAYERS += [("e1", (128, 64), 4.0), ("e2", (1, 128), 4.0)]
SHARED = ("exp", "log", "log1p", "tanh", "sum", "matmul", "concatenate", "diagonal")


@dataclass(frozen=True)
class Target:
    """A density to sample.

    Args:
        name: What the tables call it.
        dim: D.
        build: From a namespace to the log density of one position ``(D,)``, up to a constant.
        observables: From positions ``lead + (D,)`` to values ``lead + (K,)``, in numpy.
        mean: Their true means, ``(K,)``; empty if a reference run has to tell.
        sd: Their true standard deviations, ``(K,)``.
    """

    name: str
    dim: int
    build: Callable[[Namespace], Callable[[Array], Array]]
    observables: Callable[[np.ndarray], np.ndarray]
    mean: np.ndarray
    sd: np.ndarray

    def start(self, num_chains: int, seed: int) -> np.ndarray:
        """Draws uniformly from (-2, 2) in every coordinate, ``(C, D)``."""
        draws = np.random.default_rng(seed).uniform(-2.0, 2.0, (num_chains, self.dim))
        return draws.astype(np.float32)


def torch_namespace() -> Namespace:
    """Returns what the densities need, of torch."""
    import torch

    def cholesky(a: Array) -> Array:
        root, failed = torch.linalg.cholesky_ex(a)
        return torch.where(failed > 0, torch.nan, root)

    def solve_lower(a: Array, b: Array) -> Array:
        return torch.linalg.solve_triangular(a, b[:, None], upper=False)[:, 0]

    return SimpleNamespace(
        **{name: getattr(torch, name) for name in SHARED},
        softplus=torch.nn.functional.softplus,
        sigmoid=torch.sigmoid,
        cholesky=cholesky,
        solve_lower=solve_lower,
        array=lambda a: torch.as_tensor(np.asarray(a), dtype=torch.float32),
    )


def jax_namespace() -> Namespace:
    """Returns what the densities need, of JAX."""
    import jax
    import jax.numpy as jnp

    return SimpleNamespace(
        **{name: getattr(jnp, name) for name in SHARED},
        softplus=jax.nn.softplus,
        sigmoid=jax.nn.sigmoid,
        cholesky=jnp.linalg.cholesky,
        solve_lower=functools.partial(jax.scipy.linalg.solve_triangular, lower=True),
        array=lambda a: jnp.asarray(a, dtype=jnp.float32),
    )


# --- posterior of a generator's latent under an energy


def latent() -> Target:
    """z ~ N(0, I), x = g2 tanh(g1 z + gb1) + gb2, E(x) = e2 silu(e1 x + eb1) + eb2."""

    def build(xp: Namespace) -> Callable[[Array], Array]:
        w = {name: xp.array(value) for name, value in weights().items()}

        def log_density(z: Array) -> Array:
            hidden = xp.tanh(xp.matmul(w["g1"], z) + w["gb1"])
            x = xp.matmul(w["g2"], hidden) + w["gb2"]
            h = xp.matmul(w["e1"], x) + w["eb1"]
            return -0.5 * xp.sum(z**2) - xp.sum(w["e2"][0] * h * xp.sigmoid(h))

        return log_density

    nothing = np.empty(0)
    return Target("latent", weights()["g1"].shape[1], build, np.asarray, nothing, nothing)


def weights() -> dict[str, np.ndarray]:
    """Returns the weights of ``latent``: from the file that BENCH_WEIGHTS names, or drawn here.

    Those drawn here are uniform, three times as wide in the generator and four times in the energy
    as a linear layer of torch starts with: an energy with several wells.
    """
    path = os.environ.get("BENCH_WEIGHTS", "")
    if path:
        return dict(np.load(path))
    rng, found = np.random.default_rng(0), {}
    for name, (out, into), gain in LAYERS:
        bound = 1.0 / math.sqrt(into)
        found[name] = rng.uniform(-gain * bound, gain * bound, (out, into)).astype(np.float32)
        bias = name[0] + "b" + name[1]
        found[bias] = rng.uniform(-bound, bound, out).astype(np.float32)
    return found


# --- known in closed form


def gaussian() -> Target:
    """100 dimensions; eigenvalues of the covariance inverse-gamma, randomly rotated."""
    rng, dim = np.random.RandomState(10), 100
    eigenvalues = 1.0 / np.sort(rng.gamma(shape=0.5, scale=1.0, size=dim))
    q, r = np.linalg.qr(rng.randn(dim, dim))
    q *= np.sign(np.diag(r))
    whiten = (q / np.sqrt(eigenvalues)).T
    sd = np.sqrt(np.square(q) @ eigenvalues)

    def build(xp: Namespace) -> Callable[[Array], Array]:
        matrix = xp.array(whiten)
        return lambda x: -0.5 * xp.sum(xp.matmul(matrix, x) ** 2)

    return Target("gaussian", dim, build, np.asarray, np.zeros(dim), sd)


def banana() -> Target:
    """x0 ~ N(0, 10), x1 ~ N(.03 (x0^2 - 100), 1)."""

    def build(xp: Namespace) -> Callable[[Array], Array]:
        def log_density(x: Array) -> Array:
            return -0.5 * (x[0] / 10.0) ** 2 - 0.5 * (x[1] - 0.03 * (x[0] ** 2 - 100.0)) ** 2

        return log_density

    sd = np.array([10.0, math.sqrt(1.0 + 2.0 * 0.03**2 * 1e4)])
    return Target("banana", 2, build, np.asarray, np.zeros(2), sd)


# --- models of Inference Gym


def eight_schools() -> Target:
    """Eight schools, every coordinate standard normal under the prior."""
    effects = np.array([28, 8, -3, 7, -1, 1, 18, 12])
    stddevs = np.array([15, 10, 16, 11, 9, 11, 10, 18])

    def build(xp: Namespace) -> Callable[[Array], Array]:
        y, sigma = xp.array(effects), xp.array(stddevs)

        def log_density(q: Array) -> Array:
            school = 10.0 * q[0] + xp.exp(5.0 + q[1]) * q[2:]
            return -0.5 * xp.sum(q**2) - 0.5 * xp.sum(((y - school) / sigma) ** 2)

        return log_density

    def observables(q: np.ndarray) -> np.ndarray:
        average, log_stddev = 10.0 * q[..., :1], 5.0 + q[..., 1:2]
        school = average + np.exp(log_stddev) * q[..., 2:]
        return np.concatenate([average, log_stddev, school], -1)

    names = ("avg_effect", "log_stddev", "school_effects")
    return Target("eight_schools", 10, build, observables, *_truth("eight_schools", names))


def brownian_motion() -> Target:
    """30 noisily observed steps of a walk, the middle 10 unobserved, both scales unknown."""
    name = "brownian_motion_missing_middle_observations"
    observed = _gym(f"internal/datasets/{name}.py").OBSERVED_LOC
    seen = ~np.isnan(observed)

    def build(xp: Namespace) -> Callable[[Array], Array]:
        y, mask, zero = xp.array(np.where(seen, observed, 0.0)), xp.array(seen), xp.array([0.0])

        def log_density(q: Array) -> Array:
            scales, locs = xp.softplus(q[:2]), q[2:]
            logs = xp.log(scales)
            prior = xp.sum(-logs - 0.5 * (logs / 2.0) ** 2 - xp.softplus(-q[:2]))
            steps = (locs - xp.concatenate([zero, locs[:-1]])) / scales[0]
            errors = mask * (y - locs) / scales[1]
            squares = -0.5 * xp.sum(steps**2) - 0.5 * xp.sum(errors**2)
            return prior + squares - len(observed) * logs[0] - int(seen.sum()) * logs[1]

        return log_density

    def observables(q: np.ndarray) -> np.ndarray:
        return np.concatenate([np.logaddexp(q[..., :2], 0.0), q[..., 2:]], -1)

    truth = walk_moments(observed, seen)
    return Target("brownian_motion", 2 + len(observed), build, observables, *truth)


def walk_moments(observed: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments of the scales and the walk, by quadrature over the scales.

    Given the scales all is Gaussian. Inference Gym's values are not those of the model that it
    states: its observation noise, for one, is a quarter of a standard deviation lower.
    """
    logs = np.linspace(-7.0, 1.0, 120)
    inner, outer = np.exp(np.stack(np.meshgrid(logs, logs, indexing="ij")))
    steps = 1.0 + np.arange(len(observed))
    walk = np.minimum(steps[:, None], steps)
    of_seen = inner[..., None, None] ** 2 * walk[np.ix_(seen, seen)]
    root = np.linalg.cholesky(of_seen + outer[..., None, None] ** 2 * np.eye(int(seen.sum())))
    white = np.linalg.solve(root, np.broadcast_to(observed[seen, None], (*root.shape[:-1], 1)))
    gain = np.linalg.solve(root, inner[..., None, None] ** 2 * walk[seen])
    log_weight = -0.5 * np.square(white).sum((-2, -1))
    log_weight -= np.log(np.diagonal(root, axis1=-2, axis2=-1)).sum(-1)
    log_weight -= (np.log(inner) ** 2 + np.log(outer) ** 2) / 8.0
    weight = np.exp(log_weight - log_weight.max())
    means = (gain * white).sum(-2)
    variances = inner[..., None] ** 2 * np.diag(walk) - np.square(gain).sum(-2)
    first = np.concatenate([inner[..., None], outer[..., None], means], -1)
    second = np.square(first)
    second[..., 2:] += variances
    mean, square = np.tensordot(weight / weight.sum(), [first, second], ((0, 1), (1, 2)))
    return mean, np.sqrt(square - mean**2)


def item_response() -> Target:
    """400 students answer 100 questions, each pair with probability 3/4."""
    data = _gym("internal/datasets/synthetic_item_response_theory.py")
    right, asked = np.zeros((400, 100)), np.zeros((400, 100))
    right[data.STUDENT_IDS, data.QUESTION_IDS] = data.CORRECT
    asked[data.STUDENT_IDS, data.QUESTION_IDS] = 1.0

    def build(xp: Namespace) -> Callable[[Array], Array]:
        mask, by_student, by_question = map(xp.array, (asked, right.sum(1), right.sum(0)))

        def log_density(q: Array) -> Array:
            mean, ability, difficulty = q[0], q[1:401], q[401:]
            prior = -0.5 * ((mean - 0.75) ** 2 + xp.sum(q[1:] ** 2))
            logits = (mean + ability)[:, None] - difficulty
            score = xp.sum((mean + ability) * by_student) - xp.sum(difficulty * by_question)
            return prior + score - xp.sum(mask * xp.softplus(logits))

        return log_density

    names = ("mean_student_ability", "centered_student_ability", "question_difficulty")
    truth = _truth("synthetic_item_response_theory", names)
    return Target("item_response", 501, build, np.asarray, *truth)


def stochastic_volatility() -> Target:
    """100 days of returns of an index; log volatility is a first-order autoregression."""
    prices = _gym("internal/datasets/sp500_closing_prices.py").CLOSING_PRICES
    returns = np.diff(prices)[-100:]
    returns = returns - returns.mean()

    def build(xp: Namespace) -> Callable[[Array], Array]:
        squares = xp.array(returns**2)

        def log_density(q: Array) -> Array:
            u, mean, scale, x = q[0], q[1], xp.softplus(q[2]), q[3:] - q[1]
            log_share, log_rest = -xp.softplus(-u), -xp.softplus(u)
            persistence = 2.0 * xp.exp(log_share) - 1.0
            prior = 20.0 * log_share + 1.5 * log_rest - xp.log1p((mean / 5.0) ** 2)
            prior = prior - xp.log1p((scale / 2.0) ** 2) - xp.softplus(-q[2])
            log_keep = math.log(4.0) + log_share + log_rest  # of 1 - persistence^2
            steps = xp.sum((x[1:] - persistence * x[:-1]) ** 2) + xp.exp(log_keep) * x[0] ** 2
            walk = 0.5 * log_keep - len(returns) * xp.log(scale) - 0.5 * steps / scale**2
            return prior + walk - 0.5 * xp.sum(q[3:] + squares * xp.exp(-q[3:]))

        return log_density

    def observables(q: np.ndarray) -> np.ndarray:
        persistence = np.tanh(0.5 * q[..., :1])
        scale = np.logaddexp(q[..., 2:3], 0.0)
        return np.concatenate([persistence, q[..., 1:2], scale, q[..., 3:]], -1)

    names = ("persistence_of_volatility", "mean_log_volatility", "white_noise_shock_scale")
    truth = _truth("stochastic_volatility_sp500_small", (*names, "log_volatility"))
    return Target("stochastic_volatility", 103, build, observables, *truth)


def cox_process() -> Target:
    """Counts on a 10 by 10 grid; the log intensity is a Matern-3/2 process of unknown scales."""
    data = _gym("internal/datasets/synthetic_log_gaussian_cox_process.py")
    order = np.arange(len(data.COUNTS))
    np.random.RandomState(1337).shuffle(order)
    places, extents, counts = (a[order] for a in (data.LOCATIONS, data.EXTENTS, data.COUNTS))
    distances = np.sqrt(3.0 * np.square(places[:, None] - places[None]).sum(-1))
    level = float(np.mean(np.log(counts) - np.log(extents)))

    def build(xp: Namespace) -> Callable[[Array], Array]:
        far, area, n = xp.array(distances), xp.array(extents), xp.array(counts)
        jitter = xp.array(1e-6 * np.eye(len(counts)))

        def log_density(q: Array) -> Array:
            amplitude, length = xp.exp(q[0]) + 0.001, xp.exp(q[1]) + 0.001
            prior = -0.5 * (((q[0] + 1.0) / 0.5) ** 2 + (q[1] + 1.0) ** 2)
            kernel = amplitude**2 * (1.0 + far / length) * xp.exp(-far / length)
            root = xp.cholesky(kernel + jitter)
            white = xp.solve_lower(root, q[2:] - level)
            walk = -0.5 * xp.sum(white**2) - xp.sum(xp.log(xp.diagonal(root)))
            return prior + walk + xp.sum(n * q[2:] - area * xp.exp(q[2:]))

        return log_density

    def observables(q: np.ndarray) -> np.ndarray:
        return np.concatenate([np.exp(q[..., :2]), q[..., 2:]], -1)

    names = ("amplitude", "length_scale", "log_intensity")
    truth = _truth("synthetic_log_gaussian_cox_process", names)
    return Target("cox_process", 102, build, observables, *truth)


TARGETS: dict[str, Callable[[], Target]] = {
    make.__name__: make
    for make in (
        latent,
        gaussian,
        banana,
        eight_schools,
        brownian_motion,
        item_response,
        stochastic_volatility,
        cox_process,
    )
}


def gym_folder() -> Path:
    """Returns where Inference Gym is installed.

    Raises:
        ModuleNotFoundError: If it is not, or ``BENCH_GYM`` does not name it.
    """
    if "BENCH_GYM" in os.environ:
        return Path(os.environ["BENCH_GYM"])
    spec = importlib.util.find_spec("inference_gym")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("inference_gym is not installed")
    return Path(spec.origin).parent


def _gym(relative: str) -> ModuleType:
    path = gym_folder() / relative
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _truth(name: str, observables: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations, from long runs of Stan."""
    module = _gym(f"targets/ground_truth/{name}.py")

    def joined(suffix: str) -> np.ndarray:
        parts = (getattr(module, f"IDENTITY_{n.upper()}_{suffix}") for n in observables)
        return np.concatenate([np.ravel(part) for part in parts])

    return joined("MEAN"), joined("STANDARD_DEVIATION")
