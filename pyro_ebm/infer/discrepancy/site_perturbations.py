r"""Perturbations of discrete sites: flips, one site at a time, and walks by heat kernels.

They work in numbers of values, 0 to S - 1, whatever the values are. With probabilities of the way
there and back, per site:

- :class:`BernoulliFlips`: :math:`\varepsilon` for the other of two values;
- :class:`SiteFlip`: one site of d, uniformly, takes another value, uniformly;
- :class:`MaskedSite`: one site is hidden, and drawn uniformly on the way back;
- :class:`HeatKernel`: :math:`e^{tR}` for rates R of a graph of values.

References:
    Schröder, Ou, Li and Duncan, Training discrete EBMs with energy discrepancy, 2023,
    arXiv:2307.07595, and Energy-based modelling for discrete and mixed data via heat equations on
    structured spaces, NeurIPS 2024, arXiv:2412.01019.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.infer.discrepancy.perturbations import Times, draw_times, float_of, times_of
from pyro_ebm.infer.discrepancy.perturbed_space import Layout, Sites
from pyro_ebm.ops.heat_kernels import Structure, heat_kernel, rates

__all__ = ["BernoulliFlips", "HeatKernel", "MaskedSite", "SiteFlip"]


class _Changed(NamedTuple):
    """A perturbed row, as numbers of values, ``rows + (d,)``.

    Args:
        numbers: The values.
        sites: What they can be, with flat sites ``(d,)``.
        like: The data, for shape and dtype.
    """

    numbers: Tensor
    sites: Sites
    like: Tensor

    @classmethod
    def of(cls, x: Tensor, layout: Layout, who: str) -> _Changed:
        """Reads data, unchanged so far."""
        if layout.sites is None or layout.num_real:
            raise NotImplementedError(
                f"{who} changes discrete sites, but there are real coordinates; use "
                "EnergyDiscrepancy, or MixedColumns for tables of both"
            )
        sites = layout.sites.to(x.device)
        numbers = sites.numbers(x).reshape((*layout.rows(x), sites.num.numel()))
        return cls(numbers, Sites(*(part.flatten() for part in sites)), x)

    def values(self, numbers: Tensor) -> Tensor:
        """Returns draws ``(M,) + rows + (d,)`` as events."""
        values = self.sites.value(numbers, self.like)
        return values.reshape((len(numbers), *self.like.shape))


def _copies(numbers: Tensor, num: int) -> Tensor:
    return numbers.expand((num, *numbers.shape))


class BernoulliFlips:
    r"""Flips every site of two values with probability :math:`\varepsilon`.

    At :math:`\varepsilon = 1/2`, with ever more negatives, energy discrepancy is minus the log
    likelihood, less d log 2.

    Args:
        rate: :math:`\varepsilon`.

    Raises:
        ValueError: If the rate is not in (0, 1/2].
    """

    def __init__(self, rate: float = 0.1) -> None:
        if not 0 < rate <= 0.5:
            raise ValueError(
                f"rate must be in (0, 1/2], the chance that a site flips, got {rate!r}"
            )
        self.rate = rate

    def there(self, x: Tensor, layout: Layout) -> _Changed:
        """Draws y.

        Raises:
            NotImplementedError: If a site has another number of values than two.
        """
        start = _Changed.of(x, layout, "BernoulliFlips")
        if bool((start.sites.num != 2).any()):
            raise NotImplementedError(
                "BernoulliFlips flips sites of two values, but some have another number; use "
                "HeatKernel('uniform', time) or MaskedSite"
            )
        return start._replace(numbers=self._flipped(start.numbers))

    def back(self, y: _Changed, num_draws: int, layout: Layout) -> Tensor:
        """Flips y."""
        return y.values(self._flipped(_copies(y.numbers, num_draws)))

    def log_mass(self, y: _Changed, layout: Layout) -> None:
        """Returns ``None``: the kernel is symmetric."""

    def _flipped(self, numbers: Tensor) -> Tensor:
        return numbers ^ (torch.rand(numbers.shape, device=numbers.device) < self.rate).long()


class SiteFlip:
    """Gives one random site another value, in each direction: a walk on the graph of neighbors.

    With two values a negative differs from its datum at two sites or none. The loss is then blind
    to the relative mass of events with an even and with an odd number of ones, unless the energy's
    form ties them; :class:`MaskedSite` is not.
    """

    def there(self, x: Tensor, layout: Layout) -> _Changed:
        """Draws y.

        Raises:
            ValueError: If events are one site of two values.
        """
        start = _Changed.of(x, layout, "SiteFlip")
        if start.sites.num.tolist() == [2]:
            raise ValueError(
                "SiteFlip on events of one site of two values always comes back to the datum, so "
                "that nothing is compared; use BernoulliFlips"
            )
        return start._replace(numbers=self._moved(start.numbers, start.sites))

    def back(self, y: _Changed, num_draws: int, layout: Layout) -> Tensor:
        """Draws neighbors of y."""
        return y.values(self._moved(_copies(y.numbers, num_draws), y.sites))

    def log_mass(self, y: _Changed, layout: Layout) -> None:
        """Returns ``None``: the kernel is symmetric."""

    @staticmethod
    def _moved(numbers: Tensor, sites: Sites) -> Tensor:
        at = _one_site(numbers)
        by = 1 + _draw_below(sites.num[at] - 1)
        return numbers.scatter(-1, at, (numbers.gather(-1, at) + by) % sites.num[at])


class MaskedSite:
    """Hides one random site; on the way back its value is drawn uniformly.

    With ever more negatives this is the pseudo-likelihood, divided by the number of sites, of which
    :class:`~pyro_ebm.infer.discrete.pseudo_likelihood.PseudoLikelihood` is the version without
    draws.
    """

    def there(self, x: Tensor, layout: Layout) -> tuple[_Changed, Tensor]:
        """Draws which site is hidden."""
        start = _Changed.of(x, layout, "MaskedSite")
        return start, _one_site(start.numbers)

    def back(self, y: tuple[_Changed, Tensor], num_draws: int, layout: Layout) -> Tensor:
        """Draws values of the hidden site."""
        start, hidden = y
        at = _copies(hidden, num_draws)
        drawn = _draw_below(start.sites.num[at])
        return start.values(_copies(start.numbers, num_draws).scatter(-1, at, drawn))

    def log_mass(self, y: tuple[_Changed, Tensor], layout: Layout) -> Tensor:
        """Returns the log of how many values the hidden site can have."""
        start, hidden = y
        return start.sites.num[hidden][..., 0].to(float_of(start.like)).log()


def _one_site(numbers: Tensor) -> Tensor:
    """Which site of every row, at random, ``rows + (1,)``."""
    shape = (*numbers.shape[:-1], 1)
    return torch.randint(numbers.shape[-1], shape, device=numbers.device)


def _draw_below(num: Tensor) -> Tensor:
    """Integers from 0 to ``num - 1``, shaped as ``num``."""
    return (torch.rand(num.shape, dtype=torch.double, device=num.device) * num).long()


class HeatKernel:
    r"""Walks on a graph of a site's values for a time t, :math:`q_t = e^{tR}`, at every site.

    Args:
        structure: ``"uniform"``, ``"cyclic"``, ``"ordinal"`` or ``"absorbing"``
            (:mod:`~pyro_ebm.ops.heat_kernels`), or rates R, ``(S, S)``, of a graph of one's own,
            not necessarily symmetric; all sites then have its S values.
        time: t; or ``(low, high)`` to draw it per row, log-uniformly. On a ring or path it counts
            in units of :math:`S^2`: the standard deviation of a walk is :math:`\sqrt{2 t}` times
            the number of values, the same share of columns of any size.

    Raises:
        ValueError: If a time is not positive, the structure is not known, or rates are no square
            matrix whose rows sum to zero, with nothing negative beside the diagonal.

    Example:
        >>> from pyro.distributions import constraints
        >>> layout = Layout(1, 0, Sites.of(constraints.integer_interval(0, 4), (3,), "A test"))
        >>> walk = HeatKernel("ordinal", time=0.001)
        >>> y = walk.there(torch.tensor([[0.0, 2.0, 4.0]]), layout)
        >>> walk.back(y, 8, layout).shape
        torch.Size([8, 1, 3])
    """

    def __init__(self, structure: Structure | Tensor = "uniform", time: Times = 1.0) -> None:
        if isinstance(structure, Tensor):
            _check_rates(structure)
        else:
            rates(structure, 2)
        self.structure = structure
        self.times = times_of(time)

    def there(self, x: Tensor, layout: Layout) -> tuple[_Changed, Tensor]:
        """Draws y; the row's time stays with it.

        An absorbed site has one value more than data can have.
        """
        start = _Changed.of(x, layout, "HeatKernel")
        time, numbers = draw_times(self.times, x, layout), torch.empty_like(start.numbers)
        for num, columns in _by_size(start.sites):
            law = _rows_at(self._kernel(num, time), start.numbers[..., columns])
            numbers[..., columns] = _draw_from(law, 1)[0]
        return start._replace(numbers=numbers), time

    def back(self, y: tuple[_Changed, Tensor], num_draws: int, layout: Layout) -> Tensor:
        """Draws where y may have come from."""
        changed, time = y
        numbers = torch.empty_like(_copies(changed.numbers, num_draws))
        for num, columns in _by_size(changed.sites):
            kernel = self._kernel(num, time)
            origin = (kernel / kernel.sum(-2, keepdim=True)).mT
            law = _rows_at(origin, changed.numbers[..., columns])
            numbers[..., columns] = _draw_from(law, num_draws)
        return changed.values(numbers)

    def log_mass(self, y: tuple[_Changed, Tensor], layout: Layout) -> Tensor | None:
        """Returns the log of the kernel's column sums, added up over sites."""
        if isinstance(self.structure, str) and self.structure != "absorbing":
            return None
        changed, time = y
        masses = []
        for num, columns in _by_size(changed.sites):
            log_sums = self._kernel(num, time).sum(-2).log()
            masses.append(torch.take_along_dim(log_sums, changed.numbers[..., columns], -1))
        return torch.cat(masses, -1).sum(-1)

    def _kernel(self, num: int, time: Tensor) -> Tensor:
        """The kernel from the S values that data can have, ``time.shape + (S, S or S + 1)``."""
        if isinstance(self.structure, Tensor):
            if num != len(self.structure):
                raise ValueError(
                    f"the rates of HeatKernel are for {len(self.structure)} values, but a site has "
                    f"{num}; use a structure by name, which fits sites of any size"
                )
            return torch.matrix_exp(time[..., None, None] * self.structure.to(time))
        if self.structure in ("cyclic", "ordinal"):
            time = time * num**2
        return heat_kernel(self.structure, num, time)[..., :num, :]


def _check_rates(matrix: Tensor) -> None:
    is_square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] > 1
    if is_square:
        beside = matrix - torch.diag(matrix.diagonal())
        largest = float(matrix.abs().max())
        is_rates = bool((beside >= 0).all()) and bool((matrix.sum(1).abs() <= 1e-5 * largest).all())
    if not is_square or not is_rates:
        raise ValueError(
            "rates must be a square matrix whose rows sum to zero, with nothing negative beside "
            f"the diagonal, got {matrix!r}; from weights W of edges take W - diag(W.sum(1))"
        )


def _by_size(sites: Sites) -> Iterator[tuple[int, Tensor]]:
    """Yields every number of values and the sites that have it."""
    for num in sites.num.unique().tolist():
        yield num, (sites.num == num).nonzero()[:, 0]


def _rows_at(kernel: Tensor, numbers: Tensor) -> Tensor:
    """Returns rows of kernels, ``rows + (d, S)``, for ``numbers``, ``rows + (d,)``."""
    return torch.take_along_dim(kernel, numbers[..., None], -2)


def _draw_from(law: Tensor, num_draws: int) -> Tensor:
    """Draws numbers of values from probabilities ``(..., S)``, shape ``(num_draws, ...)``."""
    share = torch.rand((num_draws, *law.shape[:-1], 1), dtype=law.dtype, device=law.device)
    return (share >= law.cumsum(-1)[..., :-1]).sum(-1)
