r"""A Langevin step that needs no setting: as long as the data are wide, and as the law allows.

With :math:`m_j, s_j` the mean and standard deviation of the unconstrained data along coordinate j,
over all batches so far, a step of MALA along it is

.. math:: \epsilon_j = r\, e^{\lambda} s_j, \qquad
    \lambda \leftarrow \min\{0,\ \lambda + t^{-0.6} (\bar\alpha_t - 0.574)\},

where :math:`\bar\alpha_t` is the mean acceptance probability at the t-th use, over all chains and
steps of whatever length. So training does not depend on the units of the data. Longer than the data
are wide no step becomes: an energy that is still flat accepts any. The gains of the adaptation go
to zero, so that the law of chains that persist is in the limit that of a fixed step; they add up to
infinity, so that the step follows an energy that goes on to sharpen.

The factor r is drawn for every chain and step, whatever its state, so that the kernel is a mixture
of kernels that leave the law invariant, and does so itself. It is 1 in seven steps of ten, and else
log-uniform between 1/64 and 1. A step that suits most chains overshoots where the energy is many
times steeper, as in a tail that is short in unconstrained coordinates. By one length alone a chain
that started there would stay for good, and an energy that is trained against it would learn to
explain the point where it stands, while mean acceptance and gap look well.

References:
    Andrieu, Thoms, A tutorial on adaptive MCMC, Statistics and Computing 18, 2008 (gains that go to
    zero); Roberts, Rosenthal, Optimal scaling of discrete approximations to Langevin diffusions,
    JRSS B 60, 1998 (the acceptance .574).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.likelihood.transitions import check_one_support
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.mala import MALA
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.spaces import UnconstrainedSpace

FIRST_SHARE = 0.5
DECAY = 0.6
FULL_STEPS = 0.7  # which share of them is not shortened
SHORTEST = 1 / 64


class ScaledMALA(MALA):
    """MALA with a length of its own for every coordinate; three steps of ten are shorter.

    Args:
        target: An ``EnergyDistribution``.
        share: The full step in these lengths, 0-d.
        lengths: In unconstrained units, ``(D,)``.
    """

    def __init__(self, target: EnergyDistribution, *, share: Tensor, lengths: Tensor) -> None:
        super().__init__(target, step_size=1.0)
        self.share, self.lengths = share, lengths

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns the share as step size, and the lengths as the metric's root."""
        own = {"step_size": self.share.to(q), "root": self.lengths.to(q)}
        return {**super().first_tuning(q), **own}

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain by a step whose length is drawn for it alone, whatever its state."""
        full = state.tuning["step_size"]
        drawn = state.with_tuning(step_size=full * _shortening(state.position[:, :1]))
        moved, info = super().step(potential, drawn)
        return moved.with_tuning(step_size=full), info


@dataclass
class AdaptedStep:
    r"""The step of one site, learned while that is trained.

    Its attributes are what is saved. They change in place, where steps that are recorded as a graph
    go on to find them.

    Args:
        share: :math:`e^\lambda`, the step in standard deviations of the data, in (0, 1].
        num_updates: t.
        num_rows: Data seen.
        mean: Of their unconstrained coordinates, ``(D,)``.
        squares: Sums of squared deviations from it, ``(D,)``.

    Example:
        >>> law = EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,))
        >>> step = AdaptedStep()
        >>> step.see(law, torch.randn(1000, 2) * torch.tensor([0.01, 100.0]))
        >>> step.lengths.log10().round()
        tensor([-2.,  2.])
        >>> step.adapt(torch.zeros(8))  # nothing was accepted
        >>> bool(step.share < 0.3)
        True
    """

    share: Tensor = field(default_factory=lambda: torch.tensor(FIRST_SHARE))
    num_updates: Tensor = field(default_factory=lambda: torch.tensor(0))
    num_rows: Tensor = field(default_factory=lambda: torch.tensor(0))
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    @torch.no_grad()
    def see(self, p: EnergyDistribution, rows: Tensor) -> None:
        """Adds data ``(R,) + event`` to mean and standard deviation.

        Rows on the border of the support, whose coordinates are not finite, are left out.

        Raises:
            NotImplementedError: If rows have supports of their own.
        """
        u = _space(p).to_unconstrained(rows)
        counts = u.isfinite().all(-1, keepdim=True)
        num = counts.sum()
        mean = torch.where(counts, u, 0.0).sum(0) / num.clamp(min=1)
        within = torch.where(counts, u - mean, 0.0).square().sum(0)
        held = self.num_rows.to(num)
        part = num.to(u) / (held + num).clamp(min=1)  # of all rows so far
        shift = mean - self.mean.to(u)
        between = shift.square() * held * part
        self.load(
            share=self.share.to(u),
            num_updates=self.num_updates.to(num),
            num_rows=held + num,
            mean=self.mean.to(u) + shift * part,
            squares=self.squares.to(u) + within + between,
        )

    def load(self, **values: Tensor) -> None:
        """Puts values into attributes: in place, unless shape, dtype or device differ."""
        for name, value in values.items():
            held = getattr(self, name)
            if (held.shape, held.dtype, held.device) == (value.shape, value.dtype, value.device):
                held.copy_(value)
            else:
                setattr(self, name, value.clone())

    @property
    def lengths(self) -> Tensor:
        """Standard deviations, ``(D,)``; where nothing varies, their root mean square, or one."""
        variance = self.squares / (self.num_rows - 1).clamp(min=1)
        known = variance > 0
        typical = torch.where(known.any(), variance.sum() / known.sum(), 1.0)
        return torch.where(known, variance, typical).sqrt()

    def kernel(self, law: EnergyDistribution) -> ScaledMALA:
        """Returns the kernel as it is now."""
        return ScaledMALA(law, share=self.share, lengths=self._lengths_of(law))

    def adapt(self, acceptance: Tensor) -> None:
        """Takes the acceptance probabilities of one use, means over steps of all lengths."""
        self.num_updates += 1
        gain = self.num_updates.to(self.share) ** -DECAY
        wrong = acceptance.mean().to(self.share) - MALA.best_accept_prob
        self.share *= (gain * wrong).exp()
        self.share.clamp_(max=1.0)

    @torch.no_grad()
    def spread(self, p: EnergyDistribution, points: Tensor) -> Tensor:
        """Returns points over two standard deviations of the data to either side.

        Args:
            p: The law.
            points: Spread by themselves, in any shape ``lead + event``: around zero and by about
                one in unconstrained coordinates.
        """
        space = _space(p)
        u = space.to_unconstrained(points)
        return space.to_support(self.mean.to(u) + self._lengths_of(p).to(u) * u)

    def _lengths_of(self, p: EnergyDistribution) -> Tensor:
        """The lengths for all coordinates, also where no row was finite."""
        return self.lengths.expand(_space(p).size)


def _shortening(like: Tensor) -> Tensor:
    """Draws the factors of step lengths: one, or log-uniform between the shortest and one."""
    beyond = (torch.rand_like(like) - FULL_STEPS) / (1.0 - FULL_STEPS)
    return SHORTEST ** beyond.clamp(min=0.0)


def _space(p: EnergyDistribution) -> UnconstrainedSpace:
    check_one_support(p)
    return UnconstrainedSpace.of(p.support, p.event_shape)
