r"""What every group of a plate adds to the log density of a model.

Inside a plate the elements are independent given the rest, so that

.. math:: -U(\phi, \theta_1, \dots, \theta_G) = \ell_0(\phi) + \sum_{g=1}^G \ell_g(\phi, \theta_g)

with :math:`\theta_g` the latents of element g and :math:`\phi` all others. The terms
:math:`\ell_g` are read off the sites inside the plate, and their change under a move of one
:math:`\theta_g` is the change of -U. A model may break the promise of its plate, by a site outside
that depends on the latents inside; then the sum does not hold, which is checked. Groups are the
elements of a context, ``with pyro.plate(...)``, along its dim, or the turns of a loop,
``for g in pyro.plate(...)``, with sites of their own whose sizes may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_ebm.distributions.layers import num_reinterpreted
from pyro_ebm.mcmc.exchange.exchange_target import ExchangeTarget
from pyro_ebm.mcmc.targets.captured import CapturedFunction
from pyro_ebm.ops.rng import rng_preserved
from pyro_ebm.poutine.aside import aside

_NUM_CHECKED = 16  # pairs of positions that the sum is checked at
_NUM_EPS = 1e4  # units in the last place of U that it may be off


class GroupTerms:
    """The log density of every group, with the coordinates that are its own.

    Args:
        target: The model.
        plate: The name of the plate.

    Attributes:
        blocks: The flat coordinates of every group, ``(G, k)``.
        shared: All other coordinates, ``(m,)``.

    Raises:
        ValueError: If the model has no such plate, no latent inside it, latents of different sizes
            in turns of a loop, or breaks its promise.
    """

    blocks: Tensor
    shared: Tensor

    def __init__(self, target: ExchangeTarget, plate: str) -> None:
        self.target = target
        self.plate = plate
        self._read(_seen(target, plate))
        self._captured = CapturedFunction(self._terms, target.name, compile=False, capture=True)
        self._check_sum()

    def _read(self, seen: _Layout) -> None:
        self._places = seen.places
        self.site_places = {n: p for n, p in seen.innermost.items() if n in self.target.energies}
        self.size = seen.size
        self.blocks = torch.stack(self._own_coordinates())
        inside = torch.zeros(self.target.dim, dtype=torch.bool, device=self.target.device)
        inside[self.blocks.flatten()] = True
        self.shared = (~inside).nonzero()[:, 0]

    def _own_coordinates(self) -> list[Tensor]:
        """The coordinates of every group, of one length."""
        parts = self.target.split(torch.arange(self.target.dim, device=self.target.device))
        own: list[list[Tensor]] = [[] for _ in range(self.size)]
        for name in (n for n in parts if n in self._places):
            for group, index in self._places[name].parts(parts[name]):
                own[group].append(index)
        lengths = {sum(map(len, indices)) for indices in own}
        if lengths == {0}:
            raise ValueError(
                f"plate {self.plate!r} of {self.target.name} holds no latent: its groups have "
                "nothing of their own to move, use Exchange"
            )
        if len(lengths) > 1:
            raise ValueError(
                f"the turns of the loop {self.plate!r} hold latents of different sizes, "
                f"{sorted(lengths)} numbers: use Exchange, which moves all at once"
            )
        return [torch.cat(indices) for indices in own]

    def __call__(self, q: Tensor) -> Tensor:
        """Returns the log density of every group in nats, ``(C, G)``, at positions ``(C, D)``."""
        return self._captured(q)[0]

    def sums_of(self, name: str, terms: Tensor) -> Tensor:
        """Returns sums of what stands for the elements of a site, ``(C,) + B``, by group."""
        return self.site_places[name].sums(terms, self.size, lead=1)

    def joined(self, moves: Tensor, new: Tensor, old: Tensor) -> Tensor:
        """Returns ``new`` in the coordinates of groups that move, ``(C, G)``, else ``old``."""
        which = torch.zeros_like(old, dtype=torch.bool)
        which[:, self.blocks.flatten()] = moves.repeat_interleave(self.blocks.shape[1], 1)
        return torch.where(which, new, old)

    # --- the terms

    def _terms(self, q: Tensor) -> tuple[Tensor]:
        flat = self.target.flat_terms(q)
        terms = self.target.over_rows(lambda row: torch.func.vjp(self._terms_of_one, row)[0], q)
        return (terms + flat[:, self.blocks].sum(-1),)

    def _terms_of_one(self, row: Tensor) -> Tensor:
        free = self.target.split(row)
        values, volumes = self.target.with_volumes(free)
        with poutine.block(), _Terms(self.plate) as found:
            self.target.score(values)
        inside = [p.sums(volumes[n], self.size) for n, p in self._places.items() if n in volumes]
        return torch.stack([found.total.expand(self.size), *inside]).sum(0)

    def _check_sum(self) -> None:
        """Moves any half of the groups at once, which must change U by the sum of their terms."""
        number = self.target.num_rows(_NUM_CHECKED)
        with rng_preserved():
            one, two = (self.target.draw_start(number) for _ in range(2))
            moves = torch.rand(number, self.size, device=one.device) < 0.5
        two[:, self.shared] = one[:, self.shared]
        mixed = self.joined(moves, two, one)
        terms = [self(q) for q in (one, two)]
        u, u_mixed = self._potentials(one), self._potentials(mixed)
        told = torch.where(moves, terms[1], terms[0])
        good = torch.isfinite(u) & torch.isfinite(u_mixed)
        size = torch.stack([u.abs(), u_mixed.abs(), terms[0].abs().sum(1)]).amax(0) + 1.0
        off = ((u - u_mixed) - (told - terms[0]).sum(1)).abs()
        eps = max(torch.finfo(dtype).eps for dtype in (u.dtype, terms[0].dtype))
        if not bool((off <= _NUM_EPS * eps * size)[good].all()):
            raise ValueError(
                f"the groups of plate {self.plate!r} are not independent given the rest: a site "
                "outside of it depends on latents inside. Use Exchange, which moves all at once"
            )
        self._check_naturals(one, mixed)

    def _potentials(self, q: Tensor) -> Tensor:
        with pyro.validation_enabled(is_validate=False):  # a check of values stops vmap
            return self.target.potential(q).detach()

    def _check_naturals(self, one: Tensor, mixed: Tensor) -> None:
        """Log Z of a site outside must not depend on the groups, for no group answers for it."""
        before, after = self.target.naturals(one), self.target.naturals(mixed)
        for name in self.target.energies.keys() - self.site_places.keys():
            if not torch.equal(before[name], after[name]):
                raise ValueError(
                    f"EBM site {name!r} stands outside of plate {self.plate!r} and depends on "
                    "latents inside it: use Exchange, which moves all at once"
                )


def _seen(target: ExchangeTarget, plate: str) -> _Layout:
    with torch.no_grad(), aside(), _Layout(plate) as seen:
        target.score(target.constrain(target.draw_start(1)[0]))
    if seen.size == 0:
        raise ValueError(f"{target.name} has no plate {plate!r}; it has {sorted(seen.others)}")
    return seen


def _frame(msg: Any, plate: str) -> Any:
    if site_is_subsample(msg):
        return None
    return next((f for f in msg["cond_indep_stack"] if f.name == plate), None)


def turn_of(frame: Any) -> int:
    """Returns which turn of a loop a plate's frame is of; a second loop over it counts on."""
    return int(frame.counter - 1) % int(frame.size)


class _Place(NamedTuple):
    """Where groups lie in a tensor: along a dim, or all of it is of one turn of a loop.

    Args:
        dim: Counted from the left, or if negative from the right.
        turn: Of the loop, where there is no dim.
    """

    dim: int | None
    turn: int

    @classmethod
    def of(cls, frame: Any, dim_zero: int) -> _Place:
        """The place that a plate's frame says, its dims counted from ``dim_zero``."""
        if frame.dim is None:
            return cls(None, turn_of(frame))
        return cls(dim_zero + frame.dim, 0)

    def parts(self, value: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields groups with what is theirs, flat."""
        if self.dim is None:
            yield self.turn, value.flatten()
        else:
            value = value.movedim(self.dim, 0)
            yield from enumerate(value.reshape(len(value), -1))

    def sums(self, terms: Tensor, size: int, *, lead: int = 0) -> Tensor:
        """Returns sums for every group; the first ``lead`` dims are kept, ``lead + (G,)``."""
        if self.dim is not None:
            return _summed_but(terms, self.dim, lead=lead)
        total = terms.reshape(*terms.shape[:lead], -1).sum(-1, keepdim=True)
        return torch.where(torch.arange(size, device=terms.device) == self.turn, total, 0.0)


def _summed_but(terms: Tensor, dim: int, *, lead: int) -> Tensor:
    """Sums over all dims but one; the first ``lead`` are kept."""
    keep = {*range(lead), dim if dim >= 0 else terms.dim() + dim}
    others = [d for d in range(terms.dim()) if d not in keep]
    return terms.sum(others) if others else terms


class _Layout(Messenger):
    """Finds out which sites stand in a plate, and where its groups are in their values."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.size = 0
        self.places: dict[str, _Place] = {}
        self.innermost: dict[str, _Place] = {}
        self.others: set[str] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.others |= {frame.name for frame in msg["cond_indep_stack"]}
        frame = _frame(msg, self.plate)
        if frame is None:
            return
        self.size = frame.size
        self.places[msg["name"]] = _Place.of(frame, len(msg["fn"].batch_shape))
        self.innermost[msg["name"]] = _Place.of(frame, -num_reinterpreted(msg["fn"]))


class _Terms(Messenger):
    """Adds up the log densities of a plate's sites by its elements."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.total = torch.zeros(())

    def _pyro_post_sample(self, msg: Any) -> None:
        frame = _frame(msg, self.plate)
        if frame is not None:
            log_prob = msg["fn"].log_prob(msg["value"])
            counted = scale_and_mask(log_prob, msg["scale"], msg["mask"])
            self.total = self.total + _Place.of(frame, 0).sums(counted, frame.size)
