r"""KALE and Donsker–Varadhan: learning an energy relative to a base that need not have a density.

For data :math:`P` and base :math:`Q`,

.. math::
    F(E, c) = -E_P[E + c] - E_Q[e^{-E-c}] + 1 \;\le\; -E_P[E] - \log E_Q[e^{-E}] \;\le\;
    \mathrm{KL}(P \| Q).

The first bound (KALE) has unbiased gradients and is tight at :math:`c = \log E_Q e^{-E} = \log Z`;
the second (Donsker–Varadhan) is biased upwards on minibatches. Maximizing either is maximum
likelihood for :math:`dp = e^{-E} dQ / Z`, even where P and Q are singular.

A generator is the second player: it minimizes the same bound at fixed energy. By the envelope
theorem its gradient is that of :math:`-\log E_z e^{-E(G(z))}`. The penalty :math:`\lambda |\nabla_x
E|^2`, centred at zero, is what keeps the energy smooth enough for the bound to stay finite.

With a contrast that has a density :math:`q` of its own (a guide site), U and :math:`\log q` take
the place of E: the self-normalized likelihood.

Arbel, Zhou and Gretton, Generalized Energy-Based Models, ICLR 2021, arXiv:2003.05033; Glaser, Arbel
and Gretton, KALE flow, NeurIPS 2021, arXiv:2106.08929.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_ebm.distributions import (
    EnergyDistribution,
    GeneralizedEBM,
    PushforwardDistribution,
)
from pyro_ebm.distributions.layers import innermost
from pyro_ebm.infer import checks
from pyro_ebm.infer.contrast import Contrast, contrast_law, rows_of
from pyro_ebm.infer.held import hold_parameters
from pyro_ebm.infer.objective import Objective

CUpdate = Literal["gradient", "newton", "closed_form"]


class BaseContrast(Objective):
    """What KALE and Donsker–Varadhan share: base draws, gradient penalty, the generator's step."""

    needs_density = False
    has_second_player = True

    def __init__(
        self,
        num_base: int | None,
        gradient_penalty: float,
        schedule: tuple[int, int] | None,
        **elbo: Any,
    ) -> None:
        super().__init__(schedule=schedule, **elbo)
        if num_base is not None and num_base < 1:
            raise ValueError(
                f"num_base must be a positive number of draws or None, got {num_base!r}"
            )
        if gradient_penalty < 0:
            raise ValueError(f"gradient_penalty must not be negative, got {gradient_penalty!r}")
        self.num_base = num_base
        self.gradient_penalty = gradient_penalty

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Contrast:
        """Draws from the base, as many points as rows or more, pooled over the rows."""
        law = self._law(p, x, noise)
        points = law.sample(torch.Size((self._draws_per_row(p, x),)))
        between = self._between(p, x, points[0]) if self.gradient_penalty else None
        if noise is None or not _has_density(law):
            return Contrast(points, between=between)
        return Contrast(points, law.log_prob(points), between=between)

    def _law(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Any:
        has_density = noise is not None and _has_density(noise)
        if has_density and isinstance(p, GeneralizedEBM):
            raise ValueError(
                f"the guide holds {type(noise).__name__} for {p!r}, whose energy refers to its "
                "generator's law: take the site out of the guide, or let it hold a "
                "PushforwardDistribution"
            )
        return contrast_law(noise, p, x, needs_density=has_density, who=type(self).__name__)

    @staticmethod
    def _between(p: EnergyDistribution, x: Tensor, points: Tensor) -> Tensor:
        share = torch.rand(rows_of(p, x), dtype=x.dtype, device=x.device)
        share = share.reshape(share.shape + (1,) * len(p.event_shape))
        return torch.lerp(x, points.to(x.dtype), share)

    def _draws_per_row(self, p: EnergyDistribution, x: Tensor) -> int:
        rows = max(1, rows_of(p, x).numel())
        return 1 if self.num_base is None else math.ceil(self.num_base / rows)

    def log_ratios(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast
    ) -> tuple[Tensor, Tensor]:
        """Returns minus the energy, at data ``rows`` and base draws ``(M,) + rows``, in one call.

        Relative to the base; with a contrast of known density, minus U and over that density.
        """
        values = self.evaluation.once("log_ratios", lambda: _log_ratios(p, x, contrast))
        self.evaluation.note(weight_ess=self.evaluation.relative_ess(values[1:].detach()))
        return values[0], values[1:]

    def penalty(self, p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor | float:
        """Returns the penalty per datum on the energy's squared gradient.

        It is taken at points between data and base draws.
        """
        if not self.gradient_penalty:
            return 0.0
        squared = self._slope(p, x, contrast).square().sum(-1)
        self.evaluation.note(gradient_norm=squared.sqrt())
        return self.gradient_penalty * squared

    @staticmethod
    def _slope(p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
        """The energy's gradient at the points between data and base, ``rows + (d,)``."""
        # Unlike autograd.grad, this leaves no leaf that would look like a lost parameter.
        slope = torch.func.grad(lambda at: p.energy(at).sum())(contrast.between)
        return slope.reshape((*rows_of(p, x), -1))

    def second_player(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Tensor:
        """Returns the generator's loss: minus the log mean weight of its draws, energy held."""
        values = self._values_of_generator(p, x, noise)
        loss = -self.evaluation.log_mean_exp(values)
        self.evaluation.note(generator_loss=loss)
        return loss.expand(rows_of(p, x))

    def _values_of_generator(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Tensor:
        """Minus the energy at fresh base draws, ``(M,) + rows``, with gradient to them alone."""
        law = self._law(p, x, noise)
        if not law.has_rsample:
            raise ValueError(
                f"{type(self).__name__}(schedule={self.schedule}) trains a generator, but the base "
                f"{type(law).__name__} cannot draw with gradients: use a PushforwardDistribution"
            )
        points = law.rsample(torch.Size((self._draws_per_row(p, x),)))
        return hold_parameters(lambda y: -p.energy(y), points, len(p.event_shape))


def _log_ratios(p: EnergyDistribution, x: Tensor, contrast: Contrast) -> Tensor:
    points = torch.cat([x.unsqueeze(0), contrast.points])
    if contrast.log_noise is None:
        return -p.energy(points)
    noise = torch.cat([torch.zeros_like(contrast.log_noise[:1]), contrast.log_noise])
    return p.unnormalized_log_prob(points) - noise


def _has_density(law: Any) -> bool:
    return not isinstance(innermost(law), PushforwardDistribution)


class KALE(BaseContrast):
    r"""KL approximate lower bound estimation: the GEBM objective.

    Args:
        num_base: Base draws per batch, rounded up to a multiple of its rows; ``None`` draws as many
            as there are rows.
        gradient_penalty: :math:`\lambda \ge 0` of the zero-centred penalty, in nats times squared
            units of x. With two players start at 1: without it the bound of two laws on different
            supports is infinite.
        schedule: ``(energy steps, generator steps)``, for example ``(5, 1)``; ``None`` leaves the
            generator alone.
        c_update: ``"closed_form"`` moves log Z towards the batch's :math:`\log E_Q e^{-E}` by
            ``c_rate``, ``"newton"`` by a Newton step :math:`c - (1 - S)/S`, ``"gradient"`` makes it
            a parameter.
        c_rate: Weight of the newest batch, in (0, 1].
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> def model(data):
        ...     slope = pyro.param("slope", torch.tensor(0.0))
        ...     with pyro.plate("data", len(data)):
        ...         ebm = EnergyDistribution(lambda x: slope * x, base=dist.Normal(0.7, 1.0))
        ...         pyro.sample("x", ebm, obs=data)
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.02}), loss=KALE())
        >>> losses = [svi.step(torch.randn(2000)) for _ in range(200)]
        >>> abs(pyro.param("slope").item() - 0.7) < 0.15
        True
    """

    learns_log_normalizer = True

    def __init__(
        self,
        num_base: int | None = None,
        *,
        gradient_penalty: float = 0.0,
        schedule: tuple[int, int] | None = None,
        c_update: CUpdate = "closed_form",
        c_rate: float = 0.1,
        **elbo: Any,
    ) -> None:
        super().__init__(num_base, gradient_penalty, schedule, **elbo)
        if c_update not in ("gradient", "newton", "closed_form"):
            raise ValueError(
                f"c_update must be 'gradient', 'newton' or 'closed_form', got {c_update!r}"
            )
        self.c_update = c_update
        self.c_rate = checks.rate("c_rate", c_rate)

    @property
    def learns_by_gradient(self) -> bool:
        """Whether log Z is a parameter for the optimizer."""
        return self.c_update == "gradient"

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns minus the bound's terms for one datum, plus its penalty, in nats."""
        data, base = self.log_ratios(p, x, contrast)
        log_mass = self.evaluation.log_mean_exp(base - log_z)
        loss = -data + log_z + log_mass.exp() - 1.0
        self.evaluation.note(bound=-loss, log_z=log_z, log_z_gap=-log_mass)
        return loss + self.penalty(p, x, contrast)

    def initial_log_normalizer(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast
    ) -> Tensor:
        """Returns the batch estimate of log Z."""
        return self.evaluation.log_mean_exp(self.log_ratios(p, x, contrast)[1])

    def update_log_normalizer(
        self, log_z: Tensor, p: EnergyDistribution, x: Tensor, contrast: Contrast
    ) -> None:
        """Moves log Z by one step of the chosen rule."""
        ratios = self.log_ratios(p, x, contrast)[1].detach()
        log_mass = self.evaluation.log_mean_exp(ratios) - log_z
        if self.c_update == "newton":
            log_z += self.c_rate * (1.0 - torch.exp(-log_mass))
        else:
            log_z += self.c_rate * log_mass


class DonskerVaradhan(BaseContrast):
    r"""The Donsker–Varadhan bound, KALE with log Z maximized out on every batch.

    Its minibatch value is biased upwards by about :math:`\mathrm{Var}(e^{-E})/(2BZ^2)`; use many
    base draws.

    Args:
        num_base: As for :class:`KALE`.
        gradient_penalty: As for :class:`KALE`.
        schedule: As for :class:`KALE`.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Example:
        >>> DonskerVaradhan(num_base=4096).learns_log_normalizer
        False
    """

    pools_rows = True

    def __init__(
        self,
        num_base: int | None = None,
        *,
        gradient_penalty: float = 0.0,
        schedule: tuple[int, int] | None = None,
        **elbo: Any,
    ) -> None:
        super().__init__(num_base, gradient_penalty, schedule, **elbo)

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns minus the bound's terms for one datum, plus its penalty, in nats."""
        data, base = self.log_ratios(p, x, contrast)
        log_z = self.evaluation.log_mean_exp(base)
        loss = log_z - data
        self.evaluation.note(bound=-loss, log_z=log_z)
        return loss + self.penalty(p, x, contrast)
