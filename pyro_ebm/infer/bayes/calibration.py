r"""Calibration: giving a generalized posterior the width of its estimator's own uncertainty.

On unconstrained coordinates, at the mode :math:`\hat q` of the potential :math:`U = w L + R` (R:
prior, Jacobian, likelihoods), with

.. math:: H = \nabla^2 U, \qquad J = \operatorname{Cov}(\nabla w L), \qquad
    V = H^{-1} \big(J + \nabla^2 R\big) H^{-1},

the draws, of covariance about :math:`H^{-1}`, are mapped to :math:`\hat q + C (q - \hat q)`,

.. math:: C = \operatorname{chol}(V)\, \operatorname{chol}(H^{-1})^{-1}, \qquad C H^{-1} C^\top = V,

so that they have the covariance V and stay on their supports. Without a prior V is the sandwich
:math:`H^{-1} J H^{-1}`. What is not loss enters as if it were right: a log likelihood, for which
:math:`J = \nabla^2 L`, is left alone whatever the prior. The map changes width, not location:
how much the prior moves the mode is up to w, which :mod:`~pyro_ebm.infer.bayes.loss_weight`
chooses. V is the uncertainty of the loss's own minimizer: where a loss discards information,
calibrated draws are wider than the posterior by Bayes' rule.

J comes from independent rows (*sandwich*), or from data sets drawn at the mode (*simulation*): see
:mod:`pyro_ebm.infer.bayes.score_covariance`.

References:
    Ribatet, Cooley, Davison, Bayesian inference from composite likelihoods, Statistica Sinica 22,
    2012.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_ebm.infer.bayes.loss_of_model import ModelLoss
from pyro_ebm.infer.bayes.score_covariance import (
    Choice,
    chosen,
    score_covariance,
)

_OVERDISPERSED = 2.0


@dataclass(frozen=True, eq=False)
class Calibration:
    """How the draws of a generalized posterior are to be moved, and why so.

    Args:
        kind: ``"sandwich"``, ``"simulation"`` or ``"none"``.
        reasons: Why this kind, a sentence each.
        remarks: What to know before use, a sentence each.
        mode: The mode on unconstrained coordinates, ``(D,)``; ``None`` where nothing is moved.
        hessian: H there, ``(D, D)``.
        factor: The matrix C, ``(D, D)``.
    """

    kind: str
    reasons: tuple[str, ...]
    remarks: tuple[str, ...]
    mode: Tensor | None = None
    hessian: Tensor | None = None
    factor: Tensor | None = None

    def __call__(self, q: Tensor) -> Tensor:
        """Returns calibrated positions for unconstrained positions ``(..., D)``."""
        if self.mode is None or self.factor is None:
            return q
        return self.mode + (q - self.mode) @ self.factor.mT

    def starts(self, num_chains: int) -> Tensor | None:
        """Draws starting positions ``(C, D)`` about the mode, twice as wide as the posterior."""
        if self.mode is None or self.hessian is None:
            return None
        root = torch.linalg.cholesky(torch.linalg.inv(self.hessian))
        normal = torch.randn(num_chains, len(self.mode), dtype=root.dtype, device=root.device)
        return self.mode + _OVERDISPERSED * normal @ root.mT


# --- matrices


def sandwich(hessian: Tensor, score_covariance: Tensor, prior: Tensor | None = None) -> Tensor:
    r"""Returns :math:`H^{-1} (J + R) H^{-1}`, ``(D, D)``.

    Args:
        hessian: H, of the whole potential, positive definite.
        score_covariance: J, of the gradient of the total loss.
        prior: R, the part of H that is not the loss's; zero if not given.

    Example:
        >>> sandwich(torch.eye(1) * 2.0, torch.eye(1) * 8.0)
        tensor([[2.]])
    """
    middle = score_covariance if prior is None else score_covariance + prior
    inverse = torch.linalg.inv(hessian)
    v = inverse @ middle @ inverse
    return 0.5 * (v + v.mT)


def affine_factor(hessian: Tensor, covariance: Tensor) -> Tensor:
    r"""Returns the lower triangular C with :math:`C H^{-1} C^\top` equal to ``covariance``.

    Raises:
        ValueError: If either matrix is not positive definite.

    Example:
        >>> affine_factor(torch.eye(1) * 4.0, torch.eye(1))
        tensor([[2.]])
    """
    wanted, bad_wanted = torch.linalg.cholesky_ex(covariance)
    had, bad_had = torch.linalg.cholesky_ex(torch.linalg.inv(hessian))
    for matrix, bad in (("the calibrated covariance", bad_wanted), ("the Hessian", bad_had)):
        if bool(bad):
            raise ValueError(
                f"{matrix} of the loss at the mode is not positive definite, so that there is no "
                "map to it: some direction is not identified by the loss. Give it a prior, or more "
                "data or simulations"
            )
    return torch.linalg.solve_triangular(had, wanted, upper=False, left=False)


# --- of a model


def calibration_of(
    loss: ModelLoss,
    *,
    choice: Choice = "auto",
    num_simulations: int = 1000,
    num_sweeps: int = 20,
) -> Calibration:
    """Returns how draws over a model's loss are to be calibrated; nothing is sampled for it.

    Args:
        loss: The model's loss.
        choice: How, ``"auto"`` by the structure of the data.
        num_simulations: Data sets drawn for ``"simulation"``.
        num_sweeps: Sweeps to each, where the energy has no exact sampler.

    Raises:
        ValueError: If there are too few rows or simulations, or no mode.
    """
    kind, reason = chosen(choice, loss.units, loss.target.dim)
    if kind == "none":
        return Calibration(kind, (reason,), _UNCALIBRATED)
    mode = loss.mode()
    j, remarks = score_covariance(loss, mode, kind, num_simulations, num_sweeps)
    hessian, of_loss = loss.hessians(mode)
    factor = affine_factor(hessian, sandwich(hessian, j, hessian - of_loss))
    remarks += _on_scales(loss.scaled_sites(mode))
    return Calibration(kind, (reason,), remarks, mode, hessian.to(mode), factor.to(mode))


def _on_scales(names: list[str]) -> tuple[str, ...]:
    """A sentence on sites under poutine.scale: :math:`H^{-1} J H^{-1}` does not change with it."""
    if not names:
        return ()
    return (
        f"EBM sites {names} are under poutine.scale, which calibrated widths do not follow: they "
        "are those of the rows that there are, and do not shrink as if there were more.",
    )


_UNCALIBRATED = (
    "The width of these draws is that of the loss at its weight: intervals do not cover what they "
    "say.",
)
