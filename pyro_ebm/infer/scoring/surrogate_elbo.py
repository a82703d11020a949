"""An ELBO whose EBM sites are scored by objectives: one for all sites, or one per site."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.scoring import trace_checks
from pyro_ebm.infer.scoring.enumeration import EnumeratingELBO
from pyro_ebm.infer.scoring.latents import tell_of_weight
from pyro_ebm.infer.scoring.objective_module import ObjectiveModule
from pyro_ebm.infer.scoring.registration import check_registered
from pyro_ebm.ops.graph_recording import is_recording
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.poutine.surrogate import SurrogateMessenger


class SiteObjective(trace_checks.Member, Protocol):
    """What is asked of the objective of a site."""

    def judge(self, site: str, notes: Mapping[str, Tensor], *, trains: bool) -> None:
        """Judges a step by its diagnostics."""


class SurrogateELBO(EnumeratingELBO, nn.Module):
    """Base of what scores EBM sites by objectives: a loss for ``SVI``, a factory of ``ELBOModule``.

    Every other site keeps its ELBO term. Sites of the guide whose name is that of an observed EBM
    site hold its contrast and are no variational factors.

    Args:
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``, such as ``num_particles`` and
            ``vectorize_particles``.

    Attributes:
        diagnostics: ``{site: {name: detached 0-d tensor}}`` of the last evaluation, per datum.
        sites: The EBM of every site at its last evaluation; not part of the state.
        members: The objectives that it consists of, by site, if there are any.
        schedule: ``(first, second)`` numbers of steps of two players, or ``None``.
        optimized: Ids of parameters that an optimizer holds although no ``pyro.module`` names them.
        num_steps_taken: Training steps so far, a 0-d tensor.
        is_replayable: Whether every training step does the same operations.
        is_frozen: Whether the contrast is fixed, so that the surrogate is one function.
        is_likelihood: Flag; whether latents may be summed out of the exponential of the score.
        is_normalized: Flag; whether the score is the log density, log Z at all parameters included.
        is_held_out_criterion: Whether the loss on held-out data, with the contrast drawn alike, may
            be compared between steps: false where it says nothing of the model, as for contrastive
            divergence and adversaries.
    """

    is_held_out_criterion = True
    is_replayable = True
    is_frozen = False
    is_likelihood = False
    is_normalized = False
    schedule: tuple[int, int] | None = None
    members: Mapping[str, SurrogateELBO] = {}
    num_particles: int

    def __init__(self, **elbo: Any) -> None:
        nn.Module.__init__(self)
        EnumeratingELBO.__init__(self, **elbo)
        self.diagnostics: dict[str, Mapping[str, Tensor]] = {}
        self.num_steps_taken: Tensor
        self.register_buffer("num_steps_taken", torch.zeros((), dtype=torch.long))
        self.sites: dict[str, EnergyDistribution] = {}
        self.optimized: frozenset[int] = frozenset()
        self._told_of_weight: set[str] = set()

    @abstractmethod
    def site_log_prob(
        self,
        name: str,
        p: EnergyDistribution,
        x: Tensor,
        *,
        noise: Any = None,
        observed: bool = True,
        log_z: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns minus the loss per datum of an EBM site at ``x``, shape ``sample + batch``."""

    @abstractmethod
    def objective_of(self, site: str) -> SiteObjective:
        """Returns the objective that serves a site."""

    @abstractmethod
    def log_normalizer(self, site: str) -> LogNormalizer:
        """Returns the learned log Z of a site, in nats."""

    @property
    @abstractmethod
    def parameter_prefixes(self) -> tuple[str, ...]:
        """The prefixes of all parameters that belong to objectives rather than to the model."""

    def free_log_normalizers(self) -> Mapping[str, Any]:
        """Priors of log Z to be inferred: none, log Z is learned."""
        return {}

    def count_step(self) -> None:
        """Counts a training step."""
        self.num_steps_taken += 1

    def _guess_max_plate_nesting(self, model: Any, guide: Any, args: Any, kwargs: Any) -> None:
        """Counts plates without scoring: neither a contrast nor an EBM site need have a density."""
        with pyro.validation_enabled(is_validate=False):
            super()._guess_max_plate_nesting(model, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A guide trace without its contrast sites, and the model scored by surrogates."""
        trace_checks.guide(guide, type(self).__name__)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        contrasts = guide_trace.nodes
        handler = SurrogateMessenger(
            self,
            lambda name: contrasts[name]["fn"] if name in contrasts else None,
            fresh_noise=True,
        )
        model_trace = poutine.trace(poutine.replay(handler(model), trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        trace_checks.traces(model_trace, guide_trace, handler.used)
        for name in handler.used:
            if name in guide_trace.nodes and model_trace.nodes[name]["is_observed"]:
                guide_trace.remove_node(name)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        guide_trace = prune_subsample_sites(guide_trace)
        model_trace = prune_subsample_sites(model_trace)
        model_trace.compute_log_prob()
        guide_trace.compute_score_parts()
        trace_checks.shapes(model_trace, guide_trace, self.max_plate_nesting)  # type: ignore[arg-type]
        if not is_recording():  # a recorded step's loss is checked by its value
            trace_checks.finite(model_trace, handler.used, int(self.num_steps_taken))
        members = {name: self.objective_of(name) for name in handler.used}
        trace_checks.one_law(members, model_trace, guide_trace, (model, args, kwargs))
        tell_of_weight(members, model_trace, guide_trace, self._told_of_weight)
        used = {name: self.sites[name] for name in handler.used}
        check_registered(model_trace, used, self.optimized)
        return model_trace, guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the whole data set's loss in nats; gradients reach this step's player only."""
        loss = super().differentiable_loss(model, guide, *args, **kwargs)
        if torch.is_grad_enabled():
            self.count_step()
        return loss

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Returns the loss and deposits gradients.

        A resting player's stay ``None``, so that no optimizer moves it.
        """
        with poutine.trace(param_only=True) as capture:
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        for site in capture.trace.nodes.values():
            site["value"].unconstrained().grad = None
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def __getstate__(self) -> dict[str, Any]:
        """What was seen of the model stays behind: energies may be closures over graphs."""
        return {**self.__dict__, "sites": {}}

    def __call__(self, model: Any, guide: Any) -> ELBOModule:
        """Returns the loss as a module for a torch loop.

        Call it on data once before asking for ``parameters()``.
        """
        return ObjectiveModule(model, guide, self)
