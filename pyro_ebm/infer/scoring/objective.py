r"""The base of learning objectives: an ELBO in which EBM sites are scored by a tractable surrogate.

For an EBM site :math:`p(x) = e^{-U(x)}/Z` no likelihood can be computed. An objective replaces
:math:`-\log p(x)` by a loss per datum that has the same minimizer and needs no Z: draws of a
*contrast* (noise, base or perturbation) stand in for it. Every other site keeps its ELBO term.
Hence::

    svi = SVI(model, guide, optim, loss=NCE(num_noise=10))      # Pyro's own loop
    loss = NCE()(model, guide)                                  # an nn.Module for a torch loop
    MCMC(NUTS(surrogate(model, NCE().freeze(model, data))))     # Bayes over the parameters

The guide may hold the contrast: its site of the same name is used as a distribution, not as a
variational factor.

An *unobserved* EBM site (an energy-based prior) splits in two: to the latent, the true
:math:`-U(z)` with parameters held; to the parameters, the surrogate at the latent's value.

To write an objective, subclass :class:`Objective`, which says what there is to define.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.known_normalizer import parameters_of
from pyro_ebm.infer.scoring import conditional, degenerate, site_values, turns
from pyro_ebm.infer.scoring.contexts import ContextChecks
from pyro_ebm.infer.scoring.contrast import rows_of
from pyro_ebm.infer.scoring.coupled_energies import refuse_coupled
from pyro_ebm.infer.scoring.evaluation import Evaluation, evaluating
from pyro_ebm.infer.scoring.frozen import FrozenObjective, freeze
from pyro_ebm.infer.scoring.held import hold_parameters
from pyro_ebm.infer.scoring.known import (
    covers_parameters,
    log_normalizer_of_rows,
    shared_with_store,
)
from pyro_ebm.infer.scoring.newest_means import NewestMeans
from pyro_ebm.infer.scoring.separation import Separation
from pyro_ebm.infer.scoring.surrogate_elbo import SurrogateELBO
from pyro_ebm.ops.graph_recording import is_recording
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.powers_of_two import is_power_of_two
from pyro_ebm.ops.rng import rng_preserved

_instances = itertools.count()


class Objective(SurrogateELBO):
    """Base of objectives: a loss for ``SVI``, a factory of ``ELBOModule``, a surrogate for MCMC.

    A subclass says by class attributes what it is (the flags below, all of which have defaults),
    and defines ``per_datum`` and, unless it is deterministic, ``draw`` (random, no gradients). An
    objective that learns log Z adds ``initial_log_normalizer`` and, unless by gradient alone,
    ``update_log_normalizer``; one with a second player adds ``second_player``. There are hooks for
    what differs from the rest:

    * ``site_loss``: how the loss of a site is made of these, in every step;
    * ``check_unconditional``: what is asked of energy and rows when a site is checked;
    * ``keeps_log_normalizer``: whether a site may have one law only, whatever latents do;
    * ``pooled_by``: why rows may have no weights of their own;
    * ``judge``: what is said of a step by its diagnostics, when it is replayed, too.

    Beside the attributes named here it has those of
    :class:`~pyro_ebm.infer.scoring.surrogate_elbo.SurrogateELBO`.

    Args:
        schedule: ``(first, second)`` numbers of steps of the two players, for objectives that have
            two; ``None`` never moves the second.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``, such as ``num_particles`` and
            ``vectorize_particles``.

    Attributes:
        learns_log_normalizer: Flag; whether log Z enters the loss and is learned, as one number for
            all rows of a site that has none of its own.
        c_update: How it moves: ``"gradient"`` as a parameter, else by ``update_log_normalizer``.
        pools_rows: Flag; whether one log Z, learned or implied, is that of all rows of a site.
        needs_density: Flag; whether sites must have a density, unlike a ``GeneralizedEBM``.
        trains_energy: Flag; whether the energy is what is learned, rather than the law that draws.
        has_second_player: Flag; whether there is one, so that a ``schedule`` is taken.
        draws_noise: Flag; whether what it draws and weights is noise rather than draws of a base.
        counts_as_likelihood: Whether its gradients are those of minus the log likelihood, or tend
            to them with settings that are large enough, so that priors of latents have the weight
            that they should have.
        log_normalizers: Learned log Z by site, in nats.
        examples: The data of every site at its last evaluation; not part of the state.
        held_out_noise: Log density in nats of the noise at a site's data, ``sample + batch``, of
            its last evaluation without gradients, where its loss refers to a noise.
        fitted: What was fitted to the first batch of every site, by its name; part of the state.
        why_not_frozen: What speaks against fixing it and what to do instead, or ``None``.
    """

    learns_log_normalizer = False
    c_update = "gradient"
    pools_rows = False
    needs_density = True
    trains_energy = True
    has_second_player = False
    draws_noise = False
    counts_as_likelihood = False
    why_not_frozen: str | None = None

    def __init__(self, *, schedule: tuple[int, int] | None = None, **elbo: Any) -> None:
        super().__init__(**elbo)
        self.schedule = turns.schedule(schedule, self)
        self.log_normalizers = nn.ParameterDict()
        self.fitted: dict[str, Any] = {}
        self._name = f"{type(self).__name__}_{next(_instances)}"
        self.examples: dict[str, Tensor] = {}
        self.evaluation = Evaluation()
        self.held_out_noise: dict[str, Tensor] = {}
        self.separations: dict[str, Separation] = defaultdict(Separation)
        self.means: dict[str, NewestMeans] = defaultdict(NewestMeans)
        self._checked: dict[str, int] = {}
        self.contexts = ContextChecks()

    # --- what a subclass defines

    def draw(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Any:
        """Draws the contrast for data ``x``; ``None`` for deterministic objectives.

        It is called without gradients. ``per_datum`` gets what it returns, such as a
        :class:`~pyro_ebm.infer.scoring.contrast.Contrast`.

        Args:
            p: The EBM.
            x: The data, ``sample + batch + event``.
            noise: The law that the guide holds at the site, or ``None``.
        """
        return None

    @abstractmethod
    def per_datum(self, p: EnergyDistribution, x: Tensor, contrast: Any, log_z: Tensor) -> Tensor:
        """Returns the loss in nats, one value per datum, shape ``sample + batch`` of ``x``.

        ``log_z`` is zero where log Z is neither known nor learned.
        """

    def initial_log_normalizer(self, p: EnergyDistribution, x: Tensor, contrast: Any) -> Tensor:
        """Returns a first estimate of log Z in nats from one contrast.

        Raises:
            NotImplementedError: If the objective does not learn log Z.
        """
        raise NotImplementedError(f"{type(self).__name__} does not learn log Z")

    def second_player(self, p: EnergyDistribution, x: Tensor, noise: Any) -> Tensor:
        """Returns the second player's loss per datum, for objectives with a ``schedule``.

        Raises:
            NotImplementedError: If the objective has no second player.
        """
        raise NotImplementedError(f"{type(self).__name__} has no second player")

    def update_log_normalizer(
        self, log_z: Tensor, p: EnergyDistribution, x: Tensor, contrast: Any
    ) -> None:
        """Moves a log Z that is not learned by gradient; called once per training step."""

    def judge(self, site: str, notes: Mapping[str, Tensor], *, trains: bool) -> None:
        """Judges a step by its diagnostics, whether the model has run or a graph was replayed."""
        if trains:
            rows = rows_of(self.sites[site], self.examples[site])
            self.separations[site].see(notes, rows.numel())
            self.means[site].see(notes)

    # --- log Z

    def log_normalizer(self, site: str) -> LogNormalizer:
        """Returns the learned log Z of a site, in nats.

        Hand it on with ``distribution.with_log_normalizer``. It goes stale as soon as a parameter
        of the energy moves.

        Raises:
            KeyError: If nothing was learned for this site, or it was not evaluated since a copy or
                a load.
        """
        if _key(site) not in self.log_normalizers or site not in self.sites:
            known = sorted(self.sites) or "none"
            raise KeyError(
                f"no log Z was learned for site {site!r}; sites evaluated so far: {known}"
            )
        value = self.log_normalizers[_key(site)].detach().clone()
        moves = parameters_of(self.sites[site], self.examples[site])
        return LogNormalizer(value, method=type(self).__name__, parameters=moves)

    def log_normalizer_of(
        self, name: str, p: EnergyDistribution, x: Tensor, contrast: Any
    ) -> Tensor | None:
        """Returns the site's own log Z where it holds for all parameters, else the objective's.

        ``None`` where the loss does without. Here the site is checked, where that is due.

        Raises:
            ValueError: If rows need a log Z each and this objective has one for all.
        """
        learned = _key(name) in self.log_normalizers
        known = log_normalizer_of_rows(p, x) if covers_parameters(p, learned=learned) else None
        if self.is_check_due(name):
            with rng_preserved():  # of random energies, whose steps are those without a check
                self.check_unconditional(name, p, x, known)
        if known is not None or not self.learns_log_normalizer:
            return known
        key = _key(name)
        if key not in self.log_normalizers:
            with torch.no_grad():
                first = self.initial_log_normalizer(p, x, contrast).detach().reshape(()).clone()
            self.log_normalizers[key] = self._new_log_normalizer(first)
        value = self.log_normalizers[key]
        if value.requires_grad:
            return shared_with_store(self.parameter_prefix + key, value)
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.update_log_normalizer(value, p, x, contrast)
        return value.clone()

    def keeps_log_normalizer(self, site: str) -> bool:
        """Whether log Z of a site is one number that this objective has learned."""
        learned = _key(site) in self.log_normalizers
        return learned and not covers_parameters(self.sites[site], learned=True)

    def leaves_out_log_normalizer(self, site: str) -> bool:
        """Whether log Z of a site moves with what is trained, and is neither known nor learned."""
        p = self.sites[site]
        if _key(site) in self.log_normalizers or covers_parameters(p, learned=True):
            return False
        return any(t.requires_grad for t in parameters_of(p, self.examples[site]))

    def is_check_due(self, name: str) -> bool:
        """Whether to check a site: at first sight, then ever more rarely while training.

        An energy may become conditional as it learns. Counted in steps, which are saved: energies
        with a state of their own see the same calls after a resume. A step that is being recorded
        is compared with one that is not.
        """
        if is_recording():
            return False
        steps = int(self.num_steps_taken)
        first = name not in self._checked
        later = torch.is_grad_enabled() and is_power_of_two(steps)
        due = first or (later and self._checked[name] != steps)
        if due:
            self._checked[name] = steps
        return due

    def is_checked_now(self, site: str) -> bool:
        """Whether this step is one of those that look at a site closely."""
        return self._checked.get(site) == int(self.num_steps_taken)

    def check_unconditional(
        self, name: str, p: EnergyDistribution, x: Tensor, known: Tensor | None
    ) -> None:
        """Raises ``ValueError`` if rows need a log Z each and this objective has one for all."""
        if self.pools_rows or (self.learns_log_normalizer and known is None):
            conditional.check_rows(name, p, x, type(self).__name__)

    def pooled_by(self, site: str) -> str | None:
        """Says what takes all rows of a site alike and what does not, or ``None``.

        With weights of their own (``poutine.scale``) rows would be counted by them elsewhere only.
        """
        return None

    def objective_of(self, site: str) -> Objective:
        """Returns the objective that serves a site: this one."""
        return self

    def _new_log_normalizer(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(value, requires_grad=self.learns_by_gradient)

    @property
    def parameter_prefix(self) -> str:
        """What names of this objective's own parameters begin with in Pyro's parameter store."""
        return f"{self._name}."

    @property
    def parameter_prefixes(self) -> tuple[str, ...]:
        """The prefix of all parameters that belong to the objective rather than to the model."""
        return (self.parameter_prefix,)

    @property
    def learns_by_gradient(self) -> bool:
        """Whether log Z is a parameter for the optimizer."""
        return self.c_update == "gradient"

    # --- scoring a site (called by the surrogate handler)

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
        """Returns minus the loss per datum of an EBM site at ``x``, shape ``sample + batch``.

        Rows where ``mask`` is false take no part in anything that is pooled over rows.
        """
        data = p.broadcast_value(x.detach())
        if name not in self.sites:
            site_values.suits(name, p, data, observed=observed, objective=self)
        self.sites[name], self.examples[name] = p, data
        with evaluating(self, mask, name) as evaluation:
            loss = self.site_loss(name, p, data, noise, log_z)
            self._look_at(name, p, data, evaluation, observed=observed)
        if observed and not x.requires_grad:
            return -loss
        held = hold_parameters(p.unnormalized_log_prob, p.broadcast_value(x), len(p.event_shape))
        return held - self._given_or_learned(name, p, data) + (loss.detach() - loss)

    def _look_at(
        self, name: str, p: EnergyDistribution, x: Tensor, evaluation: Evaluation, *, observed: bool
    ) -> None:
        """Keeps what was noted of a site that was just scored, and judges it."""
        self.diagnostics[name] = evaluation.notes.after(self.diagnostics.get(name, {}))
        if not is_recording():  # else the replayed steps are judged
            self.judge(name, evaluation.notes, trains=evaluation.has_graph)
            if self.is_checked_now(name):
                if self.trains_energy:  # weights may have been zero
                    refuse_coupled(name, p, x)
                degenerate.not_degenerate(name, evaluation, self, self._checked[name])
        if evaluation.noise is not None and observed and not evaluation.has_graph:
            self.held_out_noise[name] = evaluation.noise()[0].detach()

    @torch.no_grad()
    def _given_or_learned(self, name: str, p: EnergyDistribution, x: Tensor) -> Tensor | float:
        """Log Z in nats as far as there is one, held: it moves no parameter, but makes values."""
        if _key(name) in self.log_normalizers and not covers_parameters(p, learned=True):
            return self.log_normalizers[_key(name)].clone()
        known = log_normalizer_of_rows(p, x)
        return 0.0 if known is None else known

    def site_loss(
        self, name: str, p: EnergyDistribution, x: Tensor, noise: Any, log_z: Tensor | None
    ) -> Tensor:
        """Returns the loss per datum of the player whose turn it is, in nats.

        Args:
            name: The site.
            p: The EBM.
            x: The data, ``sample + batch + event``.
            noise: The law that the guide holds at the site, or ``None``.
            log_z: Log Z in nats where it is inferred, else ``None``.
        """
        if self.is_second_players_turn:
            return self.second_player(p, x, noise)
        with torch.no_grad():
            contrast = self.draw(p, x, noise)
        if log_z is None:
            log_z = self.log_normalizer_of(name, p, x, contrast)
        return self.per_datum(p, x, contrast, torch.zeros(()) if log_z is None else log_z)

    @property
    def is_second_players_turn(self) -> bool:
        """Whether the step in progress is the second player's."""
        if self.schedule is None or not torch.is_grad_enabled():
            return False
        return turns.is_second(self.schedule, int(self.num_steps_taken))

    # --- Bayes

    def freeze(
        self, model: Callable[..., Any], *args: Any, guide: Any = None, **kwargs: Any
    ) -> FrozenObjective:
        """Returns this objective with contrasts drawn once.

        For MCMC over ``surrogate(model, frozen)``.

        Args:
            model: The model, with EBM sites; called once.
            *args: Its arguments, with the full data.
            guide: Holds the contrasts, as under SVI.
            **kwargs: Its keyword arguments.

        Raises:
            NotImplementedError: If ``why_not_frozen`` says so.
        """
        if self.why_not_frozen is not None:
            raise NotImplementedError(
                f"{type(self).__name__} cannot be frozen: {self.why_not_frozen}"
            )
        return freeze(self, model, guide, args, kwargs)

    # --- copies

    def get_extra_state(self) -> Any:
        """Returns what was fitted, which belongs to the state as the parameters do.

        Tensors, numbers, strings, dicts and tuples alone, which a safe load accepts.
        """
        return dict(self.fitted)

    def set_extra_state(self, state: Any) -> None:
        """Restores it."""
        self.fitted = dict(state)

    def __getstate__(self) -> dict[str, Any]:
        seen: dict[str, Any] = {"examples": {}, "evaluation": Evaluation()}
        seen |= {"contexts": ContextChecks(), "separations": defaultdict(Separation)}
        seen |= {"means": defaultdict(NewestMeans), "held_out_noise": {}}
        return {**super().__getstate__(), **seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Names a copy anew in the parameter store: it has parameters of its own."""
        super().__setstate__(state)
        self._name = f"{type(self).__name__}_{next(_instances)}"

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Makes room for the log Z of sites that this objective has not met yet."""
        prefix_of_values = f"{prefix}log_normalizers."
        for name, value in state_dict.items():
            key = name.removeprefix(prefix_of_values)
            if name.startswith(prefix_of_values) and key not in self.log_normalizers:
                self.log_normalizers[key] = self._new_log_normalizer(torch.zeros_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _key(site: str) -> str:
    """Names of modules may not contain dots; different sites have different keys."""
    return site.replace("%", "%25").replace(".", "%2E")
