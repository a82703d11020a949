r"""Calibration: giving a generalized posterior the width of its estimator's own uncertainty.

On unconstrained coordinates, at the mode :math:`\hat q` of the potential :math:`U = w L + R` (R:
prior, Jacobian, likelihoods), with

.. math:: H = \nabla^2 U, \qquad J = \operatorname{Cov}(\nabla w L), \qquad
    V = H^{-1} \big(J + \nabla^2 R\big) H^{-1},

the draws, of covariance about :math:`H^{-1}`, are mapped to :math:`\hat q + C (q - \hat q)`,

.. math:: C = \operatorname{chol}(V)\, \operatorname{chol}(H^{-1})^{-1}, \qquad C H^{-1} C^\top = V,

so that they have the covariance V and stay on their supports. Without a prior V is the sandwich
:math:`H^{-1} J H^{-1}`. What is not loss enters as if it were right: a log likelihood, for which
:math:`J = \nabla^2 L`, is left alone whatever the prior. The map changes width, not location, and V
is the uncertainty of the loss's own minimizer: where a loss discards information, calibrated draws
are wider than the posterior by Bayes' rule.

J comes from independent rows (*sandwich*), or from data sets drawn at the mode (*simulation*): of
one lattice or network there are no rows to take a covariance over, and neighbours that depend on
each other are no rows. Rows of several sites count by the unit that they share
(:mod:`pyro_ebm.infer.independent_units`).

References:
    Ribatet, Cooley, Davison, Bayesian inference from composite likelihoods, Statistica Sinica 22,
    2012 (affine map); Bouranis, Friel, Maire, Efficient Bayesian inference for exponential random
    graph models by correcting the pseudo-posterior distribution, Social Networks 50, 2017
    (simulation).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.infer.independent_units import Units
from pyro_ebm.infer.loss_of_model import ModelLoss, law_of

Choice = Literal["auto", "sandwich", "simulation", "none"]

FEWEST_ROWS = 2  # per coordinate, for a covariance of full rank
ENOUGH_ROWS = 10
FEWEST_SIMULATIONS = 10
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


def covariance_of_sum(gradients: Tensor) -> Tensor:
    """Returns the covariance of the sum of N independent rows, ``(D, D)``, from rows ``(N, D)``."""
    return len(gradients) * torch.cov(gradients.T).reshape(2 * gradients.shape[-1:])


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
    kind, reason = _chosen(choice, loss.units, loss.target.dim)
    if kind == "none":
        return Calibration(kind, (reason,), _UNCALIBRATED)
    if kind == "simulation":
        _check_simulations(num_simulations, loss.target.dim)
    mode = loss.mode()
    if kind == "sandwich":
        j, remarks = _from_rows(loss, mode)
    else:
        j, remarks = _from_simulation(loss, mode, num_simulations, num_sweeps)
    hessian, of_loss = loss.hessians(mode)
    factor = affine_factor(hessian, sandwich(hessian, j, hessian - of_loss))
    remarks += _on_scales(loss.scaled_sites(mode))
    return Calibration(kind, (reason,), remarks, mode, hessian, factor)


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


def _chosen(choice: Choice, units: Units | None, dim: int) -> tuple[str, str]:
    """The kind of calibration, and a sentence that says why."""
    if choice == "none":
        return "none", "Calibration was switched off."
    if choice == "simulation":
        return "simulation", "Calibration by data sets simulated at the mode was asked for."
    if units is None and choice == "sandwich":
        raise ValueError(
            "calibration='sandwich' takes a covariance over independent units, and EBM sites share "
            "plates crosswise, so that no rows are independent of all others: use "
            "calibration='simulation'"
        )
    if units is None:
        return "simulation", "EBM sites share plates crosswise: J is from simulated data."
    return _by_number(choice, units.num_independent, dim)


def _by_number(choice: Choice, num_rows: int, dim: int) -> tuple[str, str]:
    """The kind of calibration that so many independent units allow for, and why."""
    least = FEWEST_ROWS if choice == "sandwich" else ENOUGH_ROWS
    enough = num_rows >= least * dim
    if choice == "sandwich" and num_rows == 1:
        raise ValueError(
            "calibration='sandwich' takes a covariance over independent rows, and the data, or "
            "those of a site, are one dependent observation: use calibration='simulation'"
        )
    if num_rows == 1:
        return "simulation", (
            "The data, or those of a site, are one dependent observation: J is from simulated data."
        )
    if choice == "sandwich" and not enough:
        raise ValueError(
            f"calibration='sandwich' needs at least {FEWEST_ROWS} rows for each of {dim} "
            f"unconstrained coordinates, got {num_rows} rows: use calibration='simulation'"
        )
    if not enough:
        return "simulation", (
            f"{num_rows} rows are too few for the covariance of {dim} coordinates: J is from "
            "simulated data."
        )
    return "sandwich", f"The data are {num_rows} rows, taken as independent: J is from the rows."


def _from_rows(loss: ModelLoss, mode: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    units = loss.units
    assert units is not None
    gradients = units.sums(loss.row_gradients(mode))
    num_rows = len(gradients)
    touched = int((gradients != 0).sum(0).min())
    if touched < FEWEST_ROWS:
        raise ValueError(
            f"a coordinate of the latents moves the loss of fewer than {FEWEST_ROWS} rows, of "
            "which there is no covariance: for latents of single rows use calibration='simulation'"
        )
    remarks: tuple[str, ...] = ()
    if min(touched, num_rows / len(mode)) < ENOUGH_ROWS:
        remarks = (
            f"There are {num_rows} rows for {len(mode)} coordinates, and {touched} that move the "
            "least known of them: the calibrated widths are rough.",
        )
    parts = [covariance_of_sum(loss.degree * part) for part in units.components(gradients)]
    return torch.stack(parts).sum(0), remarks


def _check_simulations(num_simulations: int, dim: int) -> None:
    if num_simulations < FEWEST_SIMULATIONS * dim:
        raise ValueError(
            f"num_simulations must be at least {FEWEST_SIMULATIONS} for each of {dim} coordinates, "
            f"got {num_simulations}"
        )


def _from_simulation(
    loss: ModelLoss, mode: Tensor, num_simulations: int, num_sweeps: int
) -> tuple[Tensor, tuple[str, ...]]:
    data, notes = {}, [_size_of_error(num_simulations)]
    for name, site in loss.sites(mode).items():
        data[name], note = simulate(law_of(site), site["value"], num_simulations, num_sweeps)
        notes += [f"Site {name!r}: {note}"] if note else []
    gradients = loss.simulated_gradients(mode, data)
    return torch.cov(gradients.T).reshape(2 * mode.shape), tuple(notes)


def _size_of_error(num_simulations: int) -> str:
    return (
        f"Widths carry the error of {num_simulations} simulations, about "
        f"{(0.5 / num_simulations) ** 0.5:.1%}."
    )


@torch.no_grad()
def simulate(
    law: EnergyDistribution, x: Tensor, num_simulations: int, num_sweeps: int
) -> tuple[Tensor, str]:
    """Returns data sets of a law, ``(R,) + batch + event``, and what is wrong with them, if so.

    Exact where the energy can, by the distribution's sampler if there is one, by the energy's own
    kernel from the data if there is one, else by the short chains of ``law.sample``.

    Args:
        law: The EBM.
        x: The data.
        num_simulations: R.
        num_sweeps: Sweeps of the energy's own kernel.
    """
    shape, energy = torch.Size((num_simulations,)), law.energy_function
    if law.has_exact_sample:
        return law.sample(shape).to(x.dtype), ""
    if law.sampler is not None:
        return law.sample(shape).to(x.dtype), (
            "simulated data are by the distribution's sampler, which does not say that its draws "
            "are exact (draws_are_exact)."
        )
    start = x.expand(shape + law.batch_shape + law.event_shape)
    if law.base is None and isinstance(energy, ExponentialFamily) and energy.has_sweep:
        natural = energy.natural()
        family = energy.with_natural(natural.expand(shape + law.batch_shape + natural.shape[-1:]))
        return family.sweep(start, num_sweeps), (
            f"simulated data are {num_sweeps} sweeps from the observed: too few make draws too "
            "narrow, double num_sweeps until widths stay."
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ApproximateSampleWarning)
        draws = law.sample(shape).to(x.dtype)
    what = "which had not converged" if caught else "which seem to have converged"
    return draws, f"simulated data are the ends of short chains, {what}."
