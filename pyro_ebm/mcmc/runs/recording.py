r"""Pyro's own NUTS and HMC, keeping the statistics of every transition.

Stock Pyro keeps of a run the draws and the places of divergences. The two kernels here run the same
code in the same order, consume the same random numbers and return bit-identical draws; on the way
they note, with :math:`H(z, r) = U(z) + K(r)` on the unconstrained space,

* ``lp``: :math:`-U(z)` at the draw, the log density *including* the Jacobian of the transforms;
* ``energy``: :math:`H` at the start of the transition, after the momentum was drawn;
* ``energy_error``: :math:`H - H_{start}` at the new draw (NUTS; 0 if it stays where it was) or at
  the proposal, accepted or not (HMC);
* ``acceptance_rate``: the Metropolis probability of the proposal, for NUTS averaged over the tree;
* ``n_steps``: leapfrog steps; ``tree_depth``: doublings begun; ``reached_max_treedepth``: the last
  permitted doubling ended without a turn or a divergence;
* ``step_size`` and ``diverging``.

They leave worker processes through :meth:`diagnostics`, the one thing that Pyro sends home.

References:
    Betancourt, Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo, 2016.
    arXiv:1604.00695.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyro.infer import HMC, NUTS
from torch import Tensor

from pyro_ebm.mcmc.targets.explain import explained
from pyro_ebm.mcmc.targets.fixed_supports import check_fixed_supports
from pyro_ebm.poutine.check_model import check_structure, has_energies

__all__ = ["RecordingHMC", "RecordingNUTS"]

Row = dict[str, float | int | bool]

# Pyro leaves out divergences of the warm-up, and so do we: adaptation is there to end them.
_NOT_IN_WARMUP = ("diverging", "energy_error", "reached_max_treedepth")


class _Recorder(HMC):
    """What both kernels share: bookkeeping around ``sample``, nothing inside it is changed."""

    _mean_accept_prob: float

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        # Before Pyro's own set-up, which already evaluates kinetic energies; not in __init__, since
        # sequential chains share one kernel.
        self._warmup_rows: list[Row] = []
        self._rows: list[Row] = []
        self._begin_transition()
        try:
            super().setup(warmup_steps, *args, **kwargs)
        except (ValueError, NotImplementedError) as error:
            better = explained(error, self.model, args, kwargs) if self.model else error
            if better is error:
                raise
            raise better from error
        if self.model is not None:
            check_fixed_supports(self.model, args, kwargs)
        if self._prototype_trace is not None and has_energies(self._prototype_trace):
            check_structure(self.model, args, kwargs)

    def _begin_transition(self) -> None:
        self._kinetic: list[Tensor] = []

    def _kinetic_energy(self, r_unscaled: dict[Any, Tensor]) -> Tensor:
        value = super()._kinetic_energy(r_unscaled)
        if not self._kinetic:
            self._energy_at_start = value + self._potential_energy_last
        self._kinetic.append(value)
        return value

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        warming = self._t < self._warmup_steps
        # Adaptation changes both at the end of the transition.
        before: Row = {"step_size": float(self.step_size), "n_steps": self.num_steps}
        start = params if self._z_last is None else self._z_last
        divergences = len(self._divergences)
        mean: float = self._mean_accept_prob
        self._begin_transition()
        self._mean_accept_prob = 0.0
        draw = super().sample(params)
        accept = self._restore_mean_accept_prob(mean)
        row = before | self._common_row(accept) | self._row(accept, moved=self._z_last is not start)
        row["diverging"] = len(self._divergences) > divergences
        self._keep(row, warming=warming)
        return draw

    def _restore_mean_accept_prob(self, mean: float) -> float:
        """Reads this transition's probability off Pyro's running mean, then puts the mean right.

        The mean was zeroed, so that the update ``mean + (p - mean) / n`` left ``p / n``: free of
        the cancellation that a difference of two means would suffer for small ``p``.
        """
        if not self._kinetic:  # a model without latent sites: nothing was sampled
            return 1.0
        n = self._t if self._t <= self._warmup_steps else self._t - self._warmup_steps
        accept = min(1.0, float(self._mean_accept_prob) * n)
        self._mean_accept_prob = mean + (accept - mean) / n
        return accept

    def _common_row(self, accept: float) -> Row:
        lp = -float(self._potential_energy_last)
        energy = float(self._energy_at_start) if self._kinetic else -lp
        return {"lp": lp, "energy": energy, "acceptance_rate": accept}

    def _row(self, accept: float, *, moved: bool) -> Row:
        raise NotImplementedError

    def _keep(self, row: Row, *, warming: bool) -> None:
        if warming:
            self._warmup_rows.append({k: v for k, v in row.items() if k not in _NOT_IN_WARMUP})
        else:
            self._rows.append(row)

    def diagnostics(self) -> dict[str, Any]:
        """Returns Pyro's own entries, and arrays under ``sample_stats`` and ``warmup_stats``."""
        recorded = {
            "sample_stats": _columns(self._rows),
            "warmup_stats": _columns(self._warmup_rows),
        }
        return {**super().diagnostics(), **recorded}


class RecordingHMC(_Recorder):
    """Pyro's :class:`~pyro.infer.HMC` with per-draw statistics; takes the same arguments.

    The number of leapfrog steps follows Pyro's rule: ``num_steps`` fixes the *length*
    ``step_size * num_steps`` of the trajectory, so it changes with the adapted step size.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import MCMC
        >>> def model():
        ...     pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
        >>> kernel = RecordingHMC(model, step_size=0.5, num_steps=4)
        >>> mcmc = MCMC(kernel, num_samples=20, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run()
        >>> sorted(mcmc.diagnostics()["sample_stats"]["chain 0"])
        ['acceptance_rate', 'diverging', 'energy', 'energy_error', 'lp', 'n_steps', 'step_size']
    """

    def _row(self, accept: float, *, moved: bool) -> Row:
        if not self._kinetic:
            return {"n_steps": 0, "energy_error": 0.0}
        if moved:
            end = self._potential_energy_last + self._kinetic[1]
            return {"energy_error": float(end - self._energy_at_start)}
        # The potential of a rejected proposal is not kept by Pyro, its acceptance probability is.
        return {"energy_error": -math.log(accept) if accept > 0.0 else math.inf}


class RecordingNUTS(_Recorder, NUTS):
    """Pyro's :class:`~pyro.infer.NUTS` with per-draw statistics; takes the same arguments.

    Example:
        >>> import pyro, torch
        >>> from pyro.infer import MCMC
        >>> def model():
        ...     pyro.sample("x", pyro.distributions.Normal(0.0, 1.0))
        >>> mcmc = MCMC(RecordingNUTS(model), num_samples=20, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.diagnostics()["sample_stats"]["chain 0"]["energy"].shape
        (20,)
    """

    def _begin_transition(self) -> None:
        super()._begin_transition()
        self._doublings = 0
        self._leapfrogs = 0
        self._saturated = False
        self._energy_errors: dict[int, Tensor] = {}

    def _build_tree(
        self,
        z: Any,
        r: Any,
        z_grads: Any,
        log_slice: Any,
        direction: int,
        tree_depth: int,
        energy_current: Any,
    ) -> Any:
        tree = super()._build_tree(z, r, z_grads, log_slice, direction, tree_depth, energy_current)
        # The k-th doubling of a transition asks for depth k, its recursion for smaller depths only.
        if tree_depth == self._doublings:
            self._doublings += 1
            self._leapfrogs += tree.num_proposals
            last = self._doublings == self._max_tree_depth
            self._saturated = last and not (tree.turning or tree.diverging)
        return tree

    def _build_basetree(
        self, z: Any, r: Any, z_grads: Any, log_slice: Any, direction: int, energy_current: Any
    ) -> Any:
        leaf = super()._build_basetree(z, r, z_grads, log_slice, direction, energy_current)
        # Keyed by identity: the point that wins lives until it is looked up, so its key is its own.
        error = leaf.z_proposal_pe + self._kinetic[-1] - energy_current
        self._energy_errors[id(leaf.z_proposal)] = error
        return leaf

    def _row(self, accept: float, *, moved: bool) -> Row:
        error = float(self._energy_errors[id(self._z_last)]) if moved else 0.0
        return {
            "energy_error": error,
            "n_steps": self._leapfrogs,
            "tree_depth": self._doublings,
            "reached_max_treedepth": bool(self._saturated),
        }


def _columns(rows: list[Row]) -> dict[str, NDArray[Any]]:
    """Turns one dict a draw into one array a statistic."""
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else {})}
