"""Small data sets: points in the plane made on the spot, and scikit-learn's 8 x 8 digits.

Every generator returns ``(num, 2)`` points in the default dtype, centred at or near the origin and
a few units wide. Randomness comes from torch's global generator, so ``pyro.set_rng_seed``
reproduces it, or from the ``torch.Generator`` that is given.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor


def two_moons(num: int, *, noise: float = 0.1, generator: Generator | None = None) -> Tensor:
    """Returns points on two interleaved half circles of radius one.

    Args:
        num: Number of points.
        noise: Standard deviation of the Gaussian noise around the arcs.
        generator: Source of randomness.

    Returns:
        Points of shape ``(num, 2)``.

    Example:
        >>> two_moons(100).shape
        torch.Size([100, 2])
    """
    angle = math.pi * torch.rand(num, generator=generator)
    sign = _signs(num, generator)
    arcs = torch.stack([sign * (angle.cos() - 0.5), sign * (angle.sin() - 0.25)], -1)
    return arcs + _normal(num, noise, generator)


def ring(
    num: int,
    *,
    radii: Sequence[float] = (2.0,),
    noise: float = 0.1,
    generator: Generator | None = None,
) -> Tensor:
    """Returns points on one or several concentric circles, each with the same number on average.

    Args:
        num: Number of points.
        radii: Radii of the circles.
        noise: Standard deviation of the Gaussian noise around the circles.
        generator: Source of randomness.

    Returns:
        Points of shape ``(num, 2)``.

    Example:
        >>> ring(100, radii=(1.0, 2.0), noise=0.0).norm(dim=-1).max()
        tensor(2.)
    """
    choice = torch.randint(len(radii), (num,), generator=generator)
    angle = 2 * math.pi * torch.rand(num, generator=generator)
    return _polar(torch.tensor(radii)[choice], angle) + _normal(num, noise, generator)


def eight_gaussians(
    num: int,
    *,
    radius: float = 2.0,
    std: float = 0.2,
    weights: Sequence[float] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Returns points from eight Gaussians on a circle, the first at ``(radius, 0)``.

    Args:
        num: Number of points.
        radius: Radius of the circle.
        std: Standard deviation of each Gaussian.
        weights: Eight positive mode weights that need not sum to one; equal by default.
        generator: Source of randomness.

    Returns:
        Points of shape ``(num, 2)``.

    Raises:
        ValueError: If there are not eight weights.

    Example:
        >>> eight_gaussians(100).shape
        torch.Size([100, 2])
    """
    angle = torch.arange(8) * (math.pi / 4)
    modes = _polar(torch.full((8,), radius), angle)
    return _mixture(num, modes, std, weights, generator)


def grid_of_gaussians(
    num: int,
    *,
    side: int = 5,
    spacing: float = 2.0,
    std: float = 0.1,
    weights: Sequence[float] | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Returns points from ``side * side`` Gaussians on a square grid centred at the origin.

    Args:
        num: Number of points.
        side: Modes along each axis.
        spacing: Distance of neighbouring modes.
        std: Standard deviation of each Gaussian.
        weights: Positive mode weights, first coordinate slowest, that need not sum to one; equal by
            default.
        generator: Source of randomness.

    Returns:
        Points of shape ``(num, 2)``.

    Raises:
        ValueError: If there is not one weight per mode.

    Example:
        >>> grid_of_gaussians(100, std=0.0).abs().max()
        tensor(4.)
    """
    ticks = (torch.arange(side, dtype=torch.get_default_dtype()) - (side - 1) / 2) * spacing
    return _mixture(num, torch.cartesian_prod(ticks, ticks), std, weights, generator)


def two_spirals(
    num: int, *, turns: float = 1.5, noise: float = 0.1, generator: Generator | None = None
) -> Tensor:
    """Returns points on two interleaved Archimedean spirals that end at radius 3.

    Args:
        num: Number of points.
        turns: Windings of each arm.
        noise: Standard deviation of the Gaussian noise around the arms.
        generator: Source of randomness.

    Returns:
        Points of shape ``(num, 2)``.

    Example:
        >>> two_spirals(100, noise=0.0).norm(dim=-1).max() <= 3.0
        tensor(True)
    """
    # The root spreads the points evenly along the arm, whose length grows with the radius squared.
    place = torch.rand(num, generator=generator).sqrt()
    arms = _polar(3.0 * place * _signs(num, generator), 2 * math.pi * turns * place)
    return arms + _normal(num, noise, generator)


def pinwheel(
    num: int,
    *,
    num_arms: int = 5,
    radial_std: float = 0.3,
    tangential_std: float = 0.1,
    rate: float = 0.25,
    generator: Generator | None = None,
) -> Tensor:
    """Returns points on the bent arms of a pinwheel.

    Args:
        num: Number of points.
        num_arms: Number of arms.
        radial_std: Standard deviation along an arm, in units of its distance from the centre.
        tangential_std: Standard deviation across an arm, in the same units.
        rate: How fast the arms bend with the distance from the centre.
        generator: Source of randomness.

    Returns:
        Points of shape ``(num, 2)``.

    References:
        Johnson et al., Composing graphical models with neural networks for structured
        representations and fast inference, NeurIPS 2016, arXiv:1603.06277.

    Example:
        >>> pinwheel(100).shape
        torch.Size([100, 2])
    """
    arm = torch.randint(num_arms, (num,), generator=generator)
    noise = torch.randn(num, 2, generator=generator) * torch.tensor([radial_std, tangential_std])
    along, across = 1.0 + noise[:, 0], noise[:, 1]
    bend = 2 * math.pi * arm / num_arms + rate * along.exp()
    cos, sin = bend.cos(), bend.sin()
    return 2.0 * torch.stack([along * cos - across * sin, along * sin + across * cos], -1)


def checkerboard(num: int, *, side: int = 4, generator: Generator | None = None) -> Tensor:
    """Returns points uniform on the dark squares of a board that covers ``[-side/2, side/2]^2``.

    Args:
        num: Number of points.
        side: Squares along each axis, even.
        generator: Source of randomness.

    Returns:
        Points of shape ``(num, 2)``.

    Raises:
        ValueError: If ``side`` is odd.

    Example:
        >>> (checkerboard(100).floor().sum(-1) % 2).unique()
        tensor([0.])
    """
    if side % 2:
        raise ValueError(f"side must be even, so that each row has side / 2 squares, got {side}")
    row = torch.randint(side, (num,), generator=generator)
    column = 2 * torch.randint(side // 2, (num,), generator=generator) + row % 2
    corner = torch.stack([row, column], -1) - side // 2
    return corner + torch.rand(num, 2, generator=generator)


class Digits(NamedTuple):
    """Scikit-learn's digits in three parts: images ``(N, 8, 8)``, labels ``(N,)``."""

    train: Tensor
    valid: Tensor
    test: Tensor
    train_labels: Tensor
    valid_labels: Tensor
    test_labels: Tensor


def digits(*, seed: int = 0, dequantize: bool = False) -> Digits:
    """Returns the 1797 handwritten digits of scikit-learn, 1197 + 300 + 300.

    The split is a permutation that depends on ``seed`` alone. Grey levels ``k`` of 0 to 16 become
    ``k / 16``, or ``(k + u) / 17`` with ``u`` uniform on ``[0, 1)`` where ``dequantize`` is set,
    which gives the data a density; both lie in ``[0, 1]``.

    Args:
        seed: Seed of the split and of the dequantization noise.
        dequantize: Whether to add uniform noise within each grey level.

    Returns:
        Images in the default dtype and integer labels.

    Raises:
        ImportError: If scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI repository, 1998.

    Example:
        >>> data = digits()
        >>> data.train.shape, data.test_labels.shape
        (torch.Size([1197, 8, 8]), torch.Size([300]))
    """
    generator = torch.Generator().manual_seed(seed)
    levels, labels = _load_digits()
    order = torch.randperm(len(levels), generator=generator)
    noise = torch.rand(levels.shape, generator=generator)
    images = (levels + noise) / 17.0 if dequantize else levels / 16.0
    sizes = (len(levels) - 600, 300, 300)
    return Digits(*images[order].split(sizes), *labels[order].split(sizes))


def _load_digits() -> tuple[Tensor, Tensor]:
    try:
        source = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError("digits() needs scikit-learn: pip install scikit-learn") from error
    bunch = source.load_digits()
    levels = torch.tensor(bunch.images, dtype=torch.get_default_dtype())
    return levels, torch.tensor(bunch.target, dtype=torch.long)


def _mixture(
    num: int,
    modes: Tensor,
    std: float,
    weights: Sequence[float] | None,
    generator: Generator | None,
) -> Tensor:
    if weights is not None and len(weights) != len(modes):
        raise ValueError(f"weights must hold one value per mode, {len(modes)}, got {len(weights)}")
    masses = torch.ones(len(modes)) if weights is None else torch.as_tensor(weights)
    choice = torch.multinomial(masses.to(modes), num, replacement=True, generator=generator)
    return modes[choice] + _normal(num, std, generator)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)


def _signs(num: int, generator: Generator | None) -> Tensor:
    return 2 * torch.randint(2, (num,), generator=generator) - 1


def _normal(num: int, std: float, generator: Generator | None) -> Tensor:
    return std * torch.randn(num, 2, generator=generator)
