r"""Kinetic (underdamped) Langevin dynamics by splitting, without a Metropolis step.

:math:`dz = v\,dt,\; dv = -\nabla U\,dt - \gamma v\,dt + \sqrt{2\gamma}\,dW` is split into

* A: :math:`z \leftarrow z + \tau v`,
* B: :math:`v \leftarrow v - \tau \nabla U(z)`,
* O: :math:`v \leftarrow c v + \sqrt{1 - c^2}\, \xi,\; c = e^{-\gamma\tau}`,

and the order decides the bias: on a harmonic potential of frequency :math:`\omega`, with
:math:`a = h^2\omega^2/4`, the stationary variance of z is exact under BAOAB and ABOBA and
:math:`\omega^{-2}/(1 - a)` under OBABO. ABOBA is the sampler of the paper on generalized EBMs.

References:
    Leimkuhler, Matthews, Rational construction of stochastic numerical methods for molecular
    sampling, AMRX 2013; Bussi, Parrinello, Accurate sampling using Langevin dynamics, PRE 75, 2007;
    Arbel, Zhou, Gretton, Generalized Energy-Based Models, ICLR 2021, arXiv:2003.05033.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Info, State, ran_off
from pyro_ebm.mcmc.kernels.pyro_kernel import PyroKernel
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.ops.arguments import one_of, positive

SCHEMES = ("BAOAB", "ABOBA", "OBABO")


class KineticLangevin(PyroKernel):
    r"""Kinetic Langevin; its chains are marked ``adjusted=False``.

    Args:
        target: A Pyro model, an ``EnergyDistribution`` or a ``GeneralizedEBM``.
        step_size: h; stable while h times the highest frequency is below 2.
        friction: :math:`\gamma`: low values travel far, high ones forget their velocity.
        scheme: ``"BAOAB"``, ``"ABOBA"`` or ``"OBABO"``.
        **options: Those of :class:`Kernel`: ``potential_fn``, ``inverse_temperature``.

    Example:
        >>> KineticLangevin(lambda: None, scheme="ABOBA").step_size
        0.1
    """

    adjusted = False

    def __init__(
        self,
        target: Any = None,
        *,
        step_size: float = 0.1,
        friction: float = 1.0,
        scheme: str = "BAOAB",
        **options: Any,
    ) -> None:
        super().__init__(target, **options)
        self.step_size = positive("step_size", step_size)
        self.friction = positive("friction", friction)
        self.scheme = one_of("scheme", scheme, SCHEMES)
        self.knows_potential = scheme != "ABOBA"

    def first_tuning(self, q: Tensor) -> dict[str, Tensor]:
        """Returns step size and friction, which are not adapted."""
        return {"step_size": q.new_tensor(self.step_size), "friction": q.new_tensor(self.friction)}

    def init(self, potential: CapturedPotential, q: Tensor) -> State:
        """Returns the first state, with velocities from N(0, I)."""
        return replace(super().init(potential, q), extra={"velocity": torch.randn_like(q)})

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves every chain; one gradient."""
        move = getattr(self, f"_{self.scheme.lower()}")
        moved = move(potential, state, state.tuning["step_size"])
        return moved, {"diverging": ran_off(moved)}

    def _baoab(self, potential: CapturedPotential, state: State, h: Tensor) -> State:
        v = state.extra["velocity"] - 0.5 * h * state.gradient
        q = state.position + 0.5 * h * v
        v = self._refresh(v, state, h)
        q = q + 0.5 * h * v
        u, gradient = potential(q)
        return _moved(state, q, v - 0.5 * h * gradient, u, gradient)

    def _aboba(self, potential: CapturedPotential, state: State, h: Tensor) -> State:
        middle = state.position + 0.5 * h * state.extra["velocity"]
        u, gradient = potential(middle)
        v = state.extra["velocity"] - 0.5 * h * gradient
        v = self._refresh(v, state, h) - 0.5 * h * gradient
        return _moved(state, middle + 0.5 * h * v, v, u, gradient)

    def _obabo(self, potential: CapturedPotential, state: State, h: Tensor) -> State:
        v = self._refresh(state.extra["velocity"], state, 0.5 * h)
        v = v - 0.5 * h * state.gradient
        q = state.position + h * v
        u, gradient = potential(q)
        v = self._refresh(v - 0.5 * h * gradient, state, 0.5 * h)
        return _moved(state, q, v, u, gradient)

    @staticmethod
    def _refresh(v: Tensor, state: State, tau: Tensor) -> Tensor:
        keep = torch.exp(-state.tuning["friction"] * tau)
        return keep * v + (1.0 - keep.square()).sqrt() * torch.randn_like(v)


def _moved(state: State, q: Tensor, v: Tensor, u: Tensor, gradient: Tensor) -> State:
    """The next state; under ABOBA, U and its gradient are those of the midpoint."""
    return replace(state, position=q, potential=u, gradient=gradient, extra={"velocity": v})
