r"""Looking over a model before inference: does every log Z cover what its energy depends on?

For :math:`p(x\mid\theta) = e^{-U(x,\theta)} / Z(\theta)` the guard in ``log_prob`` raises when a
gradient with respect to :math:`\theta` meets a log Z that does not account for it. Some inferences
send no gradient: enumerated and other discrete parents, score functions, weights of particles,
forward mode. This check needs none. It runs the model on tensors that remember which sample sites
they were computed from (Pyro's provenance), and names the parents.

It cannot see a value that leaves torch on its way (``float(theta)``, ``if theta > 0``). A dependence
on *observed* values is harmless: log Z is then constant. Trained parameters are only listed, since
learning them is legitimate under an objective made for unnormalized models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.util import site_is_subsample
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM, unwrap
from pyro_ebm.distributions.known_normalizer import problem_with
from pyro_ebm.distributions.normalizer_guard import REMEDIES, leaves_of, names_of, report
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.ops.autograd import grad_of
from pyro_ebm.poutine.gradient_check import GradientCheck, check_gradients

Model = Callable[..., Any]


@dataclass(frozen=True)
class SiteCheck:
    """What is known of one EBM site or energy factor.

    Attributes:
        kind: ``"EBM site"`` or ``"energy_factor"``.
        log_normalizer: How log Z was given, in words.
        latents: The latent sites that its energy or base depends on.
        uncovered: Those among them that log Z does not account for.
        parameters: Trained parameters that log Z does not account for.
        gradients: Comparisons of the slope of log Z with draws.
        notes: Anything else worth knowing.
        problem: What :func:`check_model` reports, or ``None``.
    """

    kind: str
    log_normalizer: str
    latents: tuple[str, ...] = ()
    uncovered: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    gradients: tuple[GradientCheck, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`check_model` found, by site; ``str()`` of it is a report to read."""

    sites: Mapping[str, SiteCheck] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        """Whether no site has a problem."""
        return all(site.problem is None for site in self.sites.values())

    def __str__(self) -> str:
        if not self.sites:
            return "no EnergyDistribution site and no energy_factor"
        return "\n".join(line for name, site in self.sites.items() for line in _lines(name, site))


def check_model(
    model: Model,
    *args: Any,
    at: Mapping[str, Tensor] | None = None,
    num_samples: int = 2048,
    exact_energies: bool = False,
    **kwargs: Any,
) -> ModelCheck:
    """Checks that every EBM site's log Z covers the latents that its energy and base depend on.

    The model is run three times, without gradients to its parameters; random state and parameter
    store are left as they were. Where log Z is a function or a tensor with a graph, its slope is
    compared with draws of the distribution (two percent and five standard errors are allowed).

    Args:
        model: A Pyro model, with or without ``poutine.reparam`` and other handlers around it.
        *args: Its arguments.
        at: Values of latents at which to check; by default a draw from the prior.
        num_samples: Draws for the comparison of slopes; 0 leaves it out.
        exact_energies: Whether to compare the slopes also of energies that know their own log Z.
        **kwargs: The model's keyword arguments; for one called like an option above pass a
            ``functools.partial``.

    Returns:
        A :class:`ModelCheck` with one entry per EBM site and energy factor.

    Raises:
        MissingNormalizerError: If a latent would be inferred through an unknown, constant, stale or
            wrong log Z (a warning or nothing, as the setting ``ebm_missing_normalizer`` says).
        NonFiniteEnergyError: If an energy is not finite at its own site's value.
        ValueError: If ``at`` names a site that is not a latent of the model.

    Example:
        >>> def model(x):
        ...     theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
        ...     log_z = lambda: 0.5 * (2 * torch.pi / theta).log()
        ...     p = EnergyDistribution(lambda x: theta * x**2 / 2, event_shape=(), log_normalizer=log_z)
        ...     with pyro.plate("n", len(x)):
        ...         pyro.sample("x", p, obs=x)
        >>> check_model(model, torch.randn(20)).is_sound
        True
    """
    with _undisturbed():
        run = _Run(model, args, kwargs)
        values = run.prior_values(dict(at or {}))
        tracked = run.trace({k: ProvenanceTensor(v, frozenset({k})) for k, v in values.items()})
        leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in values.items()}
        trace = run.scored_trace(leaves)
        sites = {}
        for name in _checked_sites(trace):
            pair = _Pair(name, tracked.nodes[name], trace.nodes[name], leaves)
            is_factor = pair.site["infer"].get("energy_factor")
            wanted = num_samples if not is_factor else 0
            sites[name] = (
                _check_factor(pair) if is_factor else _check_ebm(pair, wanted, exact_energies)
            )
    problems = [site.problem for site in sites.values() if site.problem is not None]
    if problems:
        report("\n".join(problems))
    return ModelCheck(sites)
