"""Pictures of energies, fits and chains. Every helper draws into a given Axes and returns it.

Log densities, losses and energies are in nats. Colours are those of Okabe and Ito (Color universal
design, 2008), which colour-blind readers can tell apart; maps use matplotlib's ``viridis``, which
also survives printing in grey. Rank plots are those of Vehtari et al. (An improved R-hat, 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_ebm.chains.record import to_numpy
from pyro_ebm.infer import FitResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Bounds = tuple[tuple[float, float], tuple[float, float]]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_density(
    ax: Axes,
    density: TorchDistribution | Callable[[Tensor], Tensor],
    bounds: Bounds,
    *,
    resolution: int = 150,
    depth: float = 10.0,
    colorbar: bool = True,
) -> Axes:
    """Draws the map of a log density in the plane.

    Args:
        ax: Where to draw.
        density: A distribution with events of shape ``(2,)`` and no batch, or a function from
            points ``(N, 2)`` in the default dtype to log densities ``(N,)`` in nats.
        bounds: ``((left, right), (bottom, top))``.
        resolution: Grid points along each axis.
        depth: Nats below the maximum at which the colours end.
        colorbar: Whether to draw the colour bar.

    Raises:
        ValueError: If the density does not return one value per point.

    Example:
        >>> from matplotlib.figure import Figure
        >>> normal = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> ax = plot_density(Figure().subplots(), normal, ((-3, 3), (-3, 3)), resolution=50)
        >>> ax.get_ylabel()
        '$x_2$'
    """
    first, second = (torch.linspace(low, high, resolution) for low, high in bounds)
    points = torch.cartesian_prod(first, second)
    values = _log_density(density, points).reshape(resolution, resolution).T
    top = float(np.nanmax(values))
    axes = to_numpy(first), to_numpy(second)
    mesh = ax.pcolormesh(*axes, values, vmin=top - depth, vmax=top, rasterized=True)
    if colorbar:
        ax.figure.colorbar(mesh, ax=ax, label="log density (nats)", extend="min")
    ax.set(xlim=bounds[0], ylim=bounds[1], aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    return ax


def _log_density(density: Any, points: Tensor) -> NDArray[Any]:
    log_prob = getattr(density, "log_prob", density)
    with torch.no_grad():
        values = log_prob(points)
    if values.shape != points.shape[:1]:
        raise ValueError(
            f"density returned shape {tuple(values.shape)} for points of shape "
            f"{tuple(points.shape)}; expected ({len(points)},), one log density per point"
        )
    return to_numpy(values)


def plot_training(
    ax: Axes,
    result: FitResult,
    *,
    curve: str = "loss",
    smooth: int = 50,
    label: str | None = None,
    color: str = PALETTE[0],
) -> Axes:
    """Draws a curve of a fit, step by step (faint) and as a centred moving average.

    Args:
        ax: Where to draw.
        result: What :func:`pyro_ebm.fit` returned.
        curve: ``"loss"``, or one of ``result.diagnostics``, for example ``"x/log_z"``.
        smooth: Steps in the moving average.
        label: Name in the legend.
        color: Colour of the curve.

    Raises:
        KeyError: If there is no such curve.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from pyro_ebm.infer import FitResult
        >>> ax = plot_training(Figure().subplots(), FitResult(losses=[3.0, 2.0, 1.0]))
        >>> ax.get_ylabel()
        'loss per datum (nats)'
    """
    values = _curve(result, curve)
    # A diagnostic may turn up late, or only in the steps of one of two players.
    steps = np.asarray(result.diagnostic_steps.get(curve, _last_steps(result, len(values))))
    window = max(1, min(smooth, len(values)))
    average = np.convolve(values, np.full(window, 1.0 / window), mode="valid")
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
    ax.plot(steps[window // 2 :][: len(average)], average, color=color, linewidth=1.6, label=label)
    if curve == "loss" and result.validation:
        at, losses = zip(*result.validation, strict=True)
        ax.plot(at, losses, "o", color=PALETTE[1], markersize=3, label="validation")
    ax.set(xlabel="step", ylabel="loss per datum (nats)" if curve == "loss" else curve)
    return ax


def _last_steps(result: FitResult, count: int) -> NDArray[Any]:
    """Numbers of the last ``count`` steps of the run."""
    return np.arange(result.num_steps or count)[-count:] + 1


def _curve(result: FitResult, curve: str) -> NDArray[Any]:
    if curve == "loss":
        return np.asarray(result.losses)
    if curve not in result.diagnostics:
        known = sorted(result.diagnostics) or "none"
        raise KeyError(f"the fit has no curve {curve!r}; its diagnostics: {known}")
    return np.asarray(result.diagnostics[curve])


def plot_energy_histogram(
    ax: Axes, energies: Mapping[str, ArrayLike | Tensor], *, bins: int = 60
) -> Axes:
    """Draws histograms of energies over each other: they agree where data and draws do.

    Args:
        ax: Where to draw.
        energies: Name of a set (data, draws, noise) to its energies in nats, any shape.
        bins: Number of bins, common to all sets.

    Raises:
        ValueError: If a set is empty or has energies that are not finite.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_energy_histogram(Figure().subplots(), {"data": torch.randn(500) ** 2})
        >>> ax.get_xlabel()
        'energy (nats)'
    """
    sets = {name: to_numpy(values).ravel() for name, values in energies.items()}
    for name, values in sets.items():
        if not values.size or not np.isfinite(values).all():
            raise ValueError(
                f"energies of {name!r} must be finite numbers, at least one, got {values}"
            )
    edges = np.histogram_bin_edges(np.concatenate(list(sets.values())), bins=bins).tolist()
    for k, (name, values) in enumerate(sets.items()):
        color = PALETTE[k % len(PALETTE)]
        ax.hist(values, edges, density=True, histtype="stepfilled", color=color, alpha=0.2)
        ax.hist(values, edges, density=True, histtype="step", color=color, label=name)
    ax.set(xlabel="energy (nats)", ylabel="density (1/nat)")
    ax.legend()
    return ax


def plot_rank(ax: Axes, draws: ArrayLike | Tensor, *, bins: int = 20) -> Axes:
    """Draws each chain's histogram of ranks among all draws: flat where the chains agree.

    Args:
        ax: Where to draw.
        draws: Scalars of shape ``(chains, draws)``.
        bins: Number of bins.

    Raises:
        ValueError: If ``draws`` has not two axes.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_rank(Figure().subplots(), torch.randn(4, 500))
        >>> len(ax.get_yticks())
        4
    """
    ranks = _ranks(to_numpy(draws))
    edges = np.linspace(0.5, ranks.size + 0.5, bins + 1)
    counts = np.stack([np.histogram(row, edges)[0] for row in ranks])
    even = ranks.shape[1] / bins
    height = 1.1 * max(2 * even, counts.max())  # of a row of the picture, in draws
    rows = np.arange(len(ranks))
    for k, row in enumerate(counts / height):
        color = PALETTE[k % len(PALETTE)]
        ax.bar(edges[:-1], row, np.diff(edges), k, align="edge", color=color, alpha=0.6)
    ax.hlines(rows + even / height, edges[0], edges[-1], "black", "dashed", linewidth=0.8)
    ax.set_yticks(rows + even / height, [f"chain {k}" for k in rows])
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, len(ranks)), xlabel="rank among all draws")
    return ax


def _ranks(draws: NDArray[Any]) -> NDArray[Any]:
    """Ranks from 1 among all draws; equal draws share the average of theirs."""
    if draws.ndim != 2:
        raise ValueError(
            f"plot_rank takes one scalar, draws of shape (chains, draws), got {draws.shape}"
        )
    _, place, counts = np.unique(draws, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place.reshape(-1)].reshape(draws.shape)


def plot_images(ax: Axes, images: ArrayLike | Tensor, grid: tuple[int, int] | None = None) -> Axes:
    """Draws grey images side by side, on one common scale.

    Args:
        ax: Where to draw.
        images: Shape ``(N, height, width)``.
        grid: Rows and columns, as square as possible by default; images beyond it are left out.

    Raises:
        ValueError: If ``images`` has not three axes, or no images.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_images(Figure().subplots(), torch.rand(10, 8, 8), (2, 5))
        >>> ax.images[0].get_array().shape
        (17, 44)
    """
    pixels = to_numpy(images)
    if pixels.ndim != 3 or not len(pixels):
        raise ValueError(f"images must have shape (N, height, width), N > 0, got {pixels.shape}")
    columns = math.ceil(math.sqrt(len(pixels)))
    rows, columns = grid or (math.ceil(len(pixels) / columns), columns)
    ax.imshow(_tiled(pixels[: rows * columns], rows, columns), cmap="gray_r")
    ax.set_axis_off()
    return ax


def _tiled(pixels: NDArray[Any], rows: int, columns: int) -> NDArray[Any]:
    """One picture with a gap of one pixel between images; gaps and missing images are masked."""
    _, height, width = pixels.shape
    sheet = np.full((rows, height + 1, columns, width + 1), np.nan)
    for k, image in enumerate(pixels):
        sheet[k // columns, :height, k % columns, :width] = image
    whole = sheet.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]
    return np.ma.masked_invalid(whole)
