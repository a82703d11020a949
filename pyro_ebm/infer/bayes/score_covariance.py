r"""The covariance J of a total loss's gradient: from the data's rows, or from simulated data sets.

With N independent rows of loss :math:`\ell_i`

.. math::
    J = \operatorname{Cov}\Big(\sum_i \nabla w \ell_i\Big) = N \operatorname{Cov}(\nabla w \ell_i).

Rows of several sites count by the unit that they share
(:mod:`pyro_ebm.infer.bayes.independent_units`). Of one lattice or network there are no rows to take
a covariance over, and neighbours that depend on each other are no rows: there J is the covariance
of the gradient over data sets drawn from the model at the parameters where J is wanted.

References:
    Bouranis, Friel, Maire, Efficient Bayesian inference for exponential random graph models by
    correcting the pseudo-posterior distribution, Social Networks 50, 2017 (simulation).
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.energies import ExponentialFamily
from pyro_ebm.errors import ApproximateSampleWarning
from pyro_ebm.infer.bayes.independent_units import Units
from pyro_ebm.infer.bayes.loss_of_model import ModelLoss, law_of

Choice = Literal["auto", "sandwich", "simulation", "none"]

MIN_ROWS = 2  # per coordinate, for a covariance of full rank
ENOUGH_ROWS = 10
MIN_SIMULATIONS = 10


def covariance_of_sum(gradients: Tensor) -> Tensor:
    """Returns the covariance of the sum of N independent rows, ``(D, D)``, from rows ``(N, D)``."""
    return len(gradients) * torch.cov(gradients.T).reshape(2 * gradients.shape[-1:])


# --- which way


def chosen(choice: Choice, units: Units | None, dim: int) -> tuple[str, str]:
    """Returns the kind of calibration that was chosen or is possible, and why.

    Args:
        choice: What was asked for.
        units: The data's independent units; ``None`` if no rows are independent of all others.
        dim: D, the number of coordinates.

    Raises:
        ValueError: If ``"sandwich"`` was asked for and there are no rows, or too few.
    """
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
    least = MIN_ROWS if choice == "sandwich" else ENOUGH_ROWS
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
            f"calibration='sandwich' needs at least {MIN_ROWS} rows for each of {dim} "
            f"unconstrained coordinates, got {num_rows} rows: use calibration='simulation'"
        )
    if not enough:
        return "simulation", (
            f"{num_rows} rows are too few for the covariance of {dim} coordinates: J is from "
            "simulated data."
        )
    return "sandwich", f"The data are {num_rows} rows, taken as independent: J is from the rows."


def score_covariance(
    loss: ModelLoss, at: Tensor, kind: str, num_simulations: int, num_sweeps: int
) -> tuple[Tensor, tuple[str, ...]]:
    """Returns J, ``(D, D)``, and what to know of it.

    Args:
        loss: The model's loss.
        at: Where, ``(D,)``.
        kind: ``"sandwich"`` or ``"simulation"``, as :func:`chosen`.
        num_simulations: Data sets drawn for ``"simulation"``.
        num_sweeps: Sweeps to each, where the energy has no exact sampler.

    Raises:
        ValueError: If there are too few simulations, or a coordinate moves fewer than two rows.
    """
    if kind == "sandwich":
        return from_rows(loss, at)
    check_simulations(num_simulations, len(at))
    return from_simulation(loss, at, num_simulations, num_sweeps)


def from_rows(loss: ModelLoss, mode: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Returns J, ``(D, D)``, over the data's independent units, and what to know of it.

    Args:
        loss: The model's loss, of data with independent units.
        mode: Where, ``(D,)``.

    Raises:
        ValueError: If a coordinate moves one row alone, or none moves any.
    """
    units = loss.units
    assert units is not None
    gradients = units.sums(loss.row_gradients(mode))
    num_rows = len(gradients)
    touched = (gradients != 0).sum(0)
    touched = touched[touched > 0]  # parameters of a hierarchy move no row
    fewest = int(touched.min()) if len(touched) else 0
    if fewest < MIN_ROWS:
        raise ValueError(
            f"a coordinate of the latents moves the loss of fewer than {MIN_ROWS} rows, of "
            "which there is no covariance: for latents of single rows use calibration='simulation'"
        )
    remarks: tuple[str, ...] = ()
    if min(fewest, num_rows / len(touched)) < ENOUGH_ROWS:
        remarks = (
            f"There are {num_rows} rows for {len(touched)} coordinates, and {fewest} that move "
            "the least known of them: the calibrated widths are rough.",
        )
    parts = [covariance_of_sum(loss.degree * part) for part in units.components(gradients)]
    return torch.stack(parts).sum(0), remarks


def check_simulations(num_simulations: int, dim: int) -> None:
    """Raises ``ValueError`` if there are too few simulations for as many coordinates."""
    if num_simulations < MIN_SIMULATIONS * dim:
        raise ValueError(
            f"num_simulations must be at least {MIN_SIMULATIONS} for each of {dim} coordinates, "
            f"got {num_simulations}"
        )


def from_simulation(
    loss: ModelLoss, mode: Tensor, num_simulations: int, num_sweeps: int
) -> tuple[Tensor, tuple[str, ...]]:
    """Returns J, ``(D, D)``, over simulated data sets, and what to know of them.

    Args:
        loss: The model's loss.
        mode: Where, ``(D,)``.
        num_simulations: How many data sets.
        num_sweeps: Sweeps to each, where the energy has no exact sampler.
    """
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
    if isinstance(energy, ExponentialFamily) and law.energy_sweeps:
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
