r"""Perturbations :math:`q(y \mid x)` of data, and the ways back.

A perturbation takes data there, :math:`y \sim q(\cdot \mid x)`, once for a row, and M times back,

.. math:: x' \sim \rho_y(x') = q(y \mid x') / c(y), \qquad c(y) = \sum_{x'} q(y \mid x').

For symmetric q the way back is q itself and :math:`c = 1`; otherwise :math:`\rho_y` is normalized
over where y may have come from, and c(y) is the importance ratio :math:`q / \rho_y`. What is drawn
besides, such as a row's time or which site is hidden, is independent of the data; q, y and c are
meant given it.

Here: the protocol, noise on real coordinates, and tables of both kinds of columns. Discrete sites
are perturbed in :mod:`~pyro_ebm.infer.discrepancy.site_perturbations`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_ebm.infer.discrepancy.perturbed_space import Layout

__all__ = ["GaussianNoise", "LawNoise", "MixedColumns", "Perturbation"]

Times = float | tuple[float, float]


class Perturbation(Protocol):
    """A random way there and back."""

    def there(self, x: Tensor, layout: Layout) -> Any:
        """Draws y, in whatever form ``back`` likes.

        Args:
            x: Coordinates of the data, ``rows + event``.
            layout: Which of them are real and which discrete.

        Raises:
            NotImplementedError: If the perturbation does not apply to such coordinates.
        """

    def back(self, y: Any, num_draws: int, layout: Layout) -> Tensor:
        """Draws from the normalized way back, ``(num_draws,) + rows + event``."""

    def log_mass(self, y: Any, layout: Layout) -> Tensor | None:
        """Returns log c(y) in nats, shape of the rows; ``None`` where it is 0."""


def times_of(time: Times) -> tuple[float, float]:
    """Returns bounds of times.

    Raises:
        ValueError: If they are not positive and in order.
    """
    times = time if isinstance(time, tuple) else (time, time)
    if len(times) != 2 or not 0 < times[0] <= times[1] < math.inf:
        raise ValueError(
            f"time must be positive, or (low, high) with 0 < low <= high, got {time!r}"
        )
    return times


def draw_times(times: tuple[float, float], x: Tensor, layout: Layout) -> Tensor:
    """Returns a log-uniform time for every row of ``x``; one that broadcasts if there is one."""
    low, high = (math.log(t) for t in times)
    rows = layout.rows(x) if low < high else torch.Size([1] * len(layout.rows(x)))
    share = torch.rand(rows, dtype=float_of(x), device=x.device)
    return torch.exp(low + (high - low) * share)


def float_of(x: Tensor) -> torch.dtype:
    """Returns the dtype of numbers that go with ``x``, whose own may be integers."""
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


class GaussianNoise:
    r"""Adds :math:`\sqrt t\,\xi` to real coordinates.

    Args:
        time: t, the variance; or ``(low, high)`` to draw it per row, log-uniformly.

    Raises:
        ValueError: If a time is not positive.
    """

    def __init__(self, time: Times = 1.0) -> None:
        self.times = times_of(time)

    def there(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Draws y; the row's standard deviation stays with it."""
        check_real(layout, "GaussianNoise")
        scale = layout.beside_event(draw_times(self.times, x, layout)).sqrt()
        return x + scale * torch.randn_like(x), scale

    def back(self, y: tuple[Tensor, Tensor], num_draws: int, layout: Layout) -> Tensor:
        """Draws around y."""
        mean, scale = y
        shape = (num_draws, *mean.shape)
        return mean + scale * torch.randn(shape, dtype=mean.dtype, device=mean.device)

    def log_mass(self, y: Any, layout: Layout) -> None:
        """Returns ``None``: the kernel is symmetric."""


class LawNoise:
    """Adds draws of a law to real coordinates, and takes others away on the way back.

    Args:
        law: Its events are those of the coordinates, its batch the rows.
    """

    def __init__(self, law: Any) -> None:
        self.law = law

    def there(self, x: Tensor, layout: Layout) -> Tensor:
        """Draws y.

        Raises:
            ValueError: If the law's events are not those of the coordinates.
        """
        event = x.shape[x.dim() - layout.event_dim :]
        if self.law.event_shape != event:
            raise ValueError(
                "the guide's law of the perturbation has event_shape "
                f"{tuple(self.law.event_shape)}; the unconstrained coordinates of an event have "
                f"{tuple(event)}"
            )
        noise: Tensor = self.law.expand(layout.rows(x)).sample()
        return x + noise

    def back(self, y: Tensor, num_draws: int, layout: Layout) -> Tensor:
        """Draws where y may have come from."""
        law = self.law.expand(layout.rows(y))
        return y - law.sample(torch.Size((num_draws,)))

    def log_mass(self, y: Any, layout: Layout) -> None:
        """Returns ``None``: a shift loses no mass."""


def check_real(layout: Layout, who: str) -> None:
    """Raises ``NotImplementedError`` if some coordinates are discrete."""
    if layout.sites is not None:
        raise NotImplementedError(
            f"{who} moves real coordinates, but there are discrete sites; use HeatKernel or "
            "another perturbation of sites, or MixedColumns for tables of both"
        )


class _Parts(NamedTuple):
    real: Any
    sites: Any


class MixedColumns:
    """Perturbs the real and the discrete columns of a table, each in their own way.

    Args:
        real: For columns of real numbers, on their unconstrained coordinates. For standardized
            columns a standard deviation of .05 to .1 is common, ``GaussianNoise(0.01)``.
        sites: For booleans, spins and categories.

    Example:
        >>> from pyro.distributions import constraints
        >>> from pyro_ebm.infer.discrepancy.perturbed_space import Sites
        >>> from pyro_ebm.infer.discrepancy.site_perturbations import HeatKernel
        >>> layout = Layout(1, 2, Sites.of(constraints.boolean, torch.Size([1]), "A test"))
        >>> both = MixedColumns(GaussianNoise(0.01), HeatKernel("uniform", 1.0))
        >>> both.back(both.there(torch.tensor([0.3, -1.2, 1.0]), layout), 4, layout).shape
        torch.Size([4, 3])
    """

    def __init__(self, real: Perturbation, sites: Perturbation) -> None:
        self.real = real
        self.sites = sites

    def there(self, x: Tensor, layout: Layout) -> _Parts:
        """Draws y, column by column."""
        of_real, of_sites = _apart(layout)
        num = layout.num_real
        return _Parts(
            self.real.there(x[..., :num], of_real), self.sites.there(x[..., num:], of_sites)
        )

    def back(self, y: _Parts, num_draws: int, layout: Layout) -> Tensor:
        """Draws the columns' ways back."""
        of_real, of_sites = _apart(layout)
        real = self.real.back(y.real, num_draws, of_real)
        return torch.cat([real, self.sites.back(y.sites, num_draws, of_sites)], -1)

    def log_mass(self, y: _Parts, layout: Layout) -> Tensor | None:
        """Returns the sum of the two, where they are not 0."""
        of_real, of_sites = _apart(layout)
        masses = self.real.log_mass(y.real, of_real), self.sites.log_mass(y.sites, of_sites)
        known = [mass for mass in masses if mass is not None]
        return torch.stack(known).sum(0) if known else None


def _apart(layout: Layout) -> tuple[Layout, Layout]:
    if layout.sites is None or not layout.num_real:
        raise NotImplementedError(
            "MixedColumns perturbs tables with real and discrete columns, but there is one kind "
            "only; give the perturbation of that kind by itself"
        )
    return Layout(1), Layout(1, 0, layout.sites)
