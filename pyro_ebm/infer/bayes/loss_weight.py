r"""How often a loss counts against the prior, by what its own minimizer says.

A loss :math:`L` has no scale of its own: it changes with the unit of the data, and the balance with
the prior changes with it. With D coordinates and, at the minimizer of L alone,
:math:`H = \nabla^2 L` and :math:`J = \operatorname{Cov}(\nabla L)`,

.. math:: w = \frac{D}{\operatorname{tr}(H^{-1} J)}

gives w L the information that its minimizer has, :math:`H J^{-1} H`, on an average over directions;
for one parameter exactly. For c L it is w / c, it does not change with the units of the parameters,
and for a log likelihood, where J = H, it is 1. What single directions have too much or too little
is left to :mod:`~pyro_ebm.infer.bayes.calibration`. Directions along which no row's loss changes,
such as those of the parameters of a hierarchy, do not count.

A loss without a minimizer of its own has no such information; it counts as it is.

References:
    Pauli, Racugno, Ventura, Bayesian composite marginal likelihoods, Statistica Sinica 21, 2011;
    Lyddon, Holmes, Walker, General Bayesian updating and the loss-likelihood bootstrap, Biometrika
    106, 2019 (with :math:`\operatorname{tr}(H J^{-1} H) / \operatorname{tr} H`, the same for one
    parameter, which for several depends on their units).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_ebm.infer.bayes.damped_newton import scales_of
from pyro_ebm.infer.bayes.loss_of_model import ModelLoss, flatness
from pyro_ebm.infer.bayes.score_covariance import Choice, chosen, score_covariance


class LossWeight(NamedTuple):
    """What a loss is multiplied by before it is drawn from.

    Args:
        factor: The multiple; 1 where none is chosen.
        why: Whose weight this is, the end of a sentence.
        remarks: What to know before use, a sentence each.
        is_own: Whether the loss has a minimizer of its own, which has chosen it.
    """

    factor: float
    why: str = "as weight says"
    remarks: tuple[str, ...] = ()
    is_own: bool = False


def weight_of(
    loss: ModelLoss, *, choice: Choice, num_simulations: int, num_sweeps: int
) -> LossWeight:
    """Returns what a model's loss is to be multiplied by.

    Args:
        loss: The model's loss.
        choice: How it will be calibrated; if not at all, the factor is 1.
        num_simulations: Data sets drawn at its minimizer for ``"simulation"``.
        num_sweeps: Sweeps to each, where the energy has no exact sampler.

    Raises:
        ValueError: If there are too few rows or simulations.
    """
    kind = chosen(choice, loss.units, loss.target.dim)[0]
    if kind == "none":
        return LossWeight(1.0)
    minimum = loss.own_minimum()
    if minimum is None:
        return LossWeight(1.0, remarks=_NO_MINIMUM)
    j = score_covariance(loss, minimum.at, kind, num_simulations, num_sweeps)[0]
    hessian, felt = loss.hessians(minimum.at)[1], minimum.felt
    j, hessian = (m[felt][:, felt] for m in (j, hessian))
    factor, rank = magnitude(hessian, j, flatness(minimum.at))
    if not 0.0 < factor < torch.inf:
        return LossWeight(1.0, remarks=_NO_MINIMUM)
    why = "by the uncertainty of its own minimizer"
    remarks = _on_flat(loss.target.dim - rank, loss.target.dim)
    return LossWeight(factor, why, remarks, is_own=True)


def magnitude(hessian: Tensor, score_covariance: Tensor, flat: float) -> tuple[float, int]:
    r"""Returns :math:`D / \operatorname{tr}(H^{-1} J)` over directions that are not flat, and D.

    Args:
        hessian: H of the loss at its minimum, ``(D, D)``.
        score_covariance: J there, ``(D, D)``.
        flat: Curvatures up to this, of one along every coordinate, count as none.

    Example:
        >>> magnitude(torch.diag(torch.tensor([2.0, 0.0])), torch.eye(2), 1e-4)
        (2.0, 1)
    """
    scales = scales_of(hessian)
    both = scales[:, None] * scales
    values, vectors = torch.linalg.eigh(hessian / both)
    curved = values > flat
    spreads = (vectors.mT @ (score_covariance / both) @ vectors).diagonal()
    total = (spreads / values)[curved].sum()
    rank = int(curved.sum())
    return float(rank / total), rank


def _on_flat(num_flat: int, dim: int) -> tuple[str, ...]:
    if not num_flat:
        return ()
    return (
        f"The loss alone says nothing of {num_flat} of {dim} directions of the latents: its weight "
        "is by the others.",
    )


_NO_MINIMUM = (
    "The loss alone has no minimizer within the latents' support, so that nothing says how often "
    "it is to count against the prior: location and width depend on the unit of the data and on "
    "weight. Give more data, or try another weight.",
)
