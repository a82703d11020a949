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

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.divergences.base_contrast import BaseContrast
from pyro_ebm.infer.scoring.contrast import Contrast
from pyro_ebm.ops.arguments import one_of, rate
from pyro_ebm.ops.log_space import log_mean_exp

CUpdate = Literal["gradient", "newton", "closed_form"]


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
            a parameter. The first two follow a mean over batches of logarithms or of inverses of
            S, the batch's mean weight: that is too low by about half of the relative variance of S,
            or by all of it, and the energy follows c. For data a width off a Gaussian base a slope
            of 1 comes out as .75 (closed form) or .65 (Newton) with one base draw a batch, as .83
            with two. On batches of few base draws take ``"gradient"``, which has no such error, or
            a larger ``num_base``.
        c_rate: Weight of the newest batch, in (0, 1]. c lags by what log Z changes in ``1 /
            c_rate`` steps, and S, the factor of the base draws in the energy's gradient, is off
            from 1 by that lag: it resists changes of log Z. Where log Z has far to go take 1, on
            batches of many base draws, or ``"gradient"``.
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
    counts_as_likelihood = True  # with many base draws

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
        self.c_update = one_of("c_update", c_update, get_args(CUpdate))
        self.c_rate = rate("c_rate", c_rate)

    def per_datum(
        self, p: EnergyDistribution, x: Tensor, contrast: Contrast, log_z: Tensor
    ) -> Tensor:
        """Returns minus the bound's terms for one datum, plus its penalty, in nats.

        Under one log Z draws of all rows are one sample. Where rows have a log Z each, a row has
        the mass of its own draws: it weighs as the datum does if rows weigh differently.
        """
        data, base = self.log_ratios(p, x, contrast)
        log_weights = base - log_z
        pooled = self.evaluation.log_mean_exp(log_weights)
        log_mass = log_mean_exp(log_weights) if log_z.dim() else pooled
        loss = -data + log_z + log_mass.exp() - 1.0
        held = loss.detach()
        self.evaluation.note(bound=lambda: -held, log_z=log_z, log_z_gap=-pooled)
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
    counts_as_likelihood = True  # with many base draws

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
