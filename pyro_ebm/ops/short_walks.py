r"""Random-walk Metropolis where neither gradients nor lists of values help.

Integers without two shared bounds move by :math:`\pm k` with :math:`k` geometric; points of the
sphere move to :math:`(x + \epsilon\xi) / \lVert x + \epsilon\xi\rVert`. Both proposals are
symmetric, the latter with respect to the surface measure because its density depends on
:math:`x \cdot x'` only, so the acceptance ratio is that of the target alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_ebm.ops.adaptation import DualAveraging
from pyro_ebm.ops.short_kernel import FlatKernel, Point, Potential, metropolis

__all__ = ["IntegerWalk", "SphereWalk"]

MAX_JUMP = 1e6
"""Cap on the mean jump of an integer walk; a flat target would make it grow without end."""

MAX_TURN = 100.0
"""Cap on the sphere's step size; beyond it proposals are uniform on the sphere anyway."""


class _TunedWalk(FlatKernel):
    """A walk whose step size is found by dual averaging, one for each batch element."""

    _tuner: DualAveraging | None = None

    def freeze(self) -> None:
        """Fixes the step size at the average of those tried."""
        if self._tuner is not None:
            self._tuner.freeze()


class IntegerWalk(_TunedWalk):
    """One step proposes a jump for one coordinate after the other.

    Jumps have length ``1 + floor(s t)``, ``t`` exponential, and ``s`` is tuned for each coordinate
    and batch element to 44 % acceptance. Proposals outside the support are rejected unseen.

    Args:
        support: An elementwise integer constraint.
        event_shape: The shape of one event.

    Example:
        >>> import torch
        >>> from pyro.distributions import constraints
        >>> _ = torch.manual_seed(0)
        >>> kernel = IntegerWalk(constraints.nonnegative_integer, torch.Size([2]))
        >>> steep = lambda x: 100 * x.sum(-1)
        >>> point = kernel.start(steep, torch.zeros(3, 2))
        >>> bool(kernel.events(kernel.step(steep, point)[0]).any())
        False
    """

    def __init__(self, support: Constraint, event_shape: torch.Size) -> None:
        super().__init__(event_shape)
        self.support = support

    def step(
        self, potential: Potential, point: Point, *, adapt: bool = False
    ) -> tuple[Point, Tensor]:
        """Proposes one jump per coordinate; costs one energy call each."""
        tuner = self._tuner = self._tuner or self._new_tuner(point)
        scale, accepted = tuner.step_size, []
        for site in range(point.position.shape[-1]):
            point, prob = self._move(potential, point, site, scale[..., site])
            accepted.append(prob)
        probs = torch.stack(accepted, -1)
        if adapt:
            tuner.update(probs.mean(0, keepdim=True))
        return point, probs.mean(-1)

    def _move(
        self, potential: Potential, point: Point, site: int, scale: Tensor
    ) -> tuple[Point, Tensor]:
        jump = (torch.empty_like(point.target).exponential_() * scale).floor() + 1
        sign = 1 - 2 * torch.randint_like(jump, 2)
        position = point.position.clone()
        position[..., site] += (sign * jump).to(position.dtype)
        inside = self._inside(position)
        # Energies are asked inside the support only: validating distributions raise elsewhere.
        position = torch.where(inside[..., None], position, point.position)
        new = Point(position, potential(self.events(Point(position, point.target))))
        ratio = torch.where(inside, point.target - new.target, -torch.inf)
        return metropolis(point, new, ratio)

    def _inside(self, position: Tensor) -> Tensor:
        valid = self.support.check(self.events(Point(position, position)))
        return valid.reshape(position.shape).all(-1)

    def _new_tuner(self, point: Point) -> DualAveraging:
        scale = torch.ones_like(point.position[:1], dtype=point.target.dtype)
        return DualAveraging(scale, target=0.44, largest=MAX_JUMP)


class SphereWalk(_TunedWalk):
    """One step perturbs all unit vectors of an event together, tuned to 40 % acceptance.

    Args:
        event_shape: The shape of one event; its last dim holds the unit vectors.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> kernel = SphereWalk(torch.Size([3]))
        >>> flat = lambda x: torch.zeros(x.shape[:-1])
        >>> point = kernel.start(flat, torch.eye(3))
        >>> kernel.events(kernel.step(flat, point)[0]).norm(dim=-1).round(decimals=3)
        tensor([1., 1., 1.])
    """

    def step(
        self, potential: Potential, point: Point, *, adapt: bool = False
    ) -> tuple[Point, Tensor]:
        """Proposes once per chain; costs one energy call."""
        tuner = self._tuner = self._tuner or self._new_tuner(point)
        x, step_size = self.events(point), tuner.step_size
        moved = x + step_size.reshape(step_size.shape + self._ones) * torch.randn_like(x)
        new = self.start(potential, moved / moved.norm(dim=-1, keepdim=True))
        point, prob = metropolis(point, new, point.target - new.target)
        if adapt:
            tuner.update(prob.mean(0, keepdim=True))
        return point, prob

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * len(self.event_shape)

    def _new_tuner(self, point: Point) -> DualAveraging:
        step_size = torch.full_like(point.target[:1], self.event_shape[-1] ** -0.5)
        return DualAveraging(step_size, target=0.4, largest=MAX_TURN)
