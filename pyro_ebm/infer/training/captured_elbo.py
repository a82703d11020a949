"""An objective whose steps under stock ``pyro.infer.SVI`` are replayed from a graph.

``SVI`` runs model and guide through Pyro's handlers in every step. This loss does so in a few of
them and replays the others, as ``fit(capture=True)`` does. Nothing tells it when a training ends or
what is done between two steps, so that a graph is compared with the step that it stands for at
every hundredth one, beside the powers of two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn

import pyro
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.elbo import ELBO
from torch import Tensor, nn

from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.infer.scoring.surrogate_elbo import SurrogateELBO
from pyro_ebm.infer.training.captured_step import CapturedStep, Pass, check_replayable
from pyro_ebm.infer.training.run_modules import modules_of
from pyro_ebm.ops.module_calls import noting_calls

COMPARE_EVERY = 100  # steps
MANY_IN_VAIN = 10


class Captured(ELBO):
    """Replays an objective's steps under ``pyro.infer.SVI`` without Python.

    The numbers are those of the steps themselves. Parameters and buffers are live, Python numbers
    are frozen: where one of them changes, a warning says so at the next comparison, and steps are
    taken one by one from there on. Diagnostics and log Z are read from the objective as before.

    Args:
        objective: The loss.
        compile: Whether to hand the graphs to ``torch.compile``, which takes seconds to minutes.

    Raises:
        TypeError: If ``objective`` is none.
        ValueError: If its steps are of several kinds (``refit_every``, ``throttle``).

    Example:
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro.infer import SVI
        >>> from pyro_ebm.distributions import EnergyDistribution
        >>> from pyro_ebm.infer import Captured, ScoreMatching
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         law = EnergyDistribution(lambda y: 0.5 * precision * y**2, event_shape=())
        ...         pyro.sample("x", law, obs=x)
        >>> loss = Captured(ScoreMatching())
        >>> svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> data = torch.tensor([-0.5, 0.5])
        >>> losses = [svi.step(data) for _ in range(400)]
        >>> round(pyro.param("precision").item(), 2)  # one over the mean square
        4.0
    """

    def __init__(self, objective: SurrogateELBO, *, compile: bool = False) -> None:  # noqa: A002
        who = type(self).__name__
        _check_objective(objective, who)
        check_replayable(objective, who)
        super().__init__(num_particles=objective.num_particles)
        self.objective, self.compile = objective, compile
        self.model: Callable[..., Any] | None = None
        self.guide: Callable[..., Any] | None = None
        self.parameters: dict[str, Tensor] = {}
        self.called: list[nn.Module] = []
        self._steps: CapturedStep | None = None
        self._num_in_vain = 0  # times that it began since a step was replayed

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Returns the objective's loss in nats, and deposits no gradients."""
        return self.objective.loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Returns the loss in nats and deposits gradients, as the objective itself would.

        Raises:
            TypeError: If an argument of the model is no tensor: it would be frozen in the graph.
        """
        self._check_arguments(args, kwargs)
        if model is not self.model or guide is not self.guide or not self._are_stored():
            self._begin(model, guide)
        steps = self._steps
        if steps is None:
            return self._taken(model, guide, args)
        if int(self.objective.num_steps_taken) % COMPARE_EVERY == 0:
            steps.look_again()
        replayed = steps.replay(args, self.parameters)
        if replayed is not None:
            self._num_in_vain = 0
            return self._deposited(replayed)
        with steps.compared(args, nullcontext(), self.parameters, modules_of(self)) as taken:
            loss = taken.loss = self._taken(model, guide, args)
        return loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.objective._get_trace(model, guide, args, kwargs)

    def __call__(self, model: Any, guide: Any) -> Any:
        """Raises ``NotImplementedError``: a loop over a module takes its steps itself."""
        self._refuse_loop("(model, guide)")

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        """Raises ``NotImplementedError``: a replayed step has its gradients already."""
        self._refuse_loop(".differentiable_loss(model, guide, ...)")

    def _refuse_loop(self, call: str) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__} replays whole steps of pyro.infer.SVI: for a torch loop call "
            f"{type(self.objective).__name__}(...){call}, or use fit(capture=True)"
        )

    # --- one step

    def _begin(self, model: Any, guide: Any) -> None:
        """Starts with the next step, on a model or parameters that are new."""
        self._num_in_vain += 1
        if self._num_in_vain == MANY_IN_VAIN:
            warnings.warn(
                f"{type(self).__name__} has begun {MANY_IN_VAIN} times without replaying a step: "
                f"models, guides or stored parameters were new. Make a {type(self).__name__} for "
                "each SVI, and model and guide once, outside of the loop",
                SurrogateWarning,
                stacklevel=4,
            )
        self.model, self.guide, self._steps = model, guide, None
        self.parameters, self.called = {}, []

    def _are_stored(self) -> bool:
        """Whether the store has the parameters of the graphs, and not others of their names."""
        stored = dict(pyro.get_param_store().named_parameters())
        return all(stored.get(name) is p for name, p in self.parameters.items())

    def _taken(self, model: Any, guide: Any, args: tuple[Tensor, ...]) -> float:
        """Takes a step as it is, and notes what it trains."""
        watched = noting_calls(self.called) if self._steps is None else nullcontext()
        with poutine.trace(param_only=True) as capture, watched:
            loss = self.objective.loss_and_grads(model, guide, *args)
        sites = capture.trace.nodes
        found = {name: site["value"].unconstrained() for name, site in sites.items()}
        self.parameters.clear()  # in place: steps under comparison look whether they are the same
        self.parameters.update(found)
        if self._steps is None:
            self._steps = self._new_steps(model, guide)
        return loss

    def _new_steps(self, model: Any, guide: Any) -> CapturedStep:
        return CapturedStep(
            self.objective,
            model,
            guide,
            1,  # the loss of SVI is that of all rows
            called=self.called,
            compile=self.compile,
            user=type(self).__name__,
            instead=f"{type(self.objective).__name__} itself as the loss",
        )

    def _deposited(self, found: Pass) -> float:
        """Deposits gradients, and tells ``SVI`` of the parameters by reading them."""
        for (name, p), grad in zip(self.parameters.items(), found.grads, strict=True):
            pyro.param(name)
            p.grad = grad
        return float(found.loss)

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
        others = [name for name, value in given.items() if not isinstance(value, Tensor)]
        if others or kwargs:
            raise TypeError(
                f"{type(self).__name__} replays steps whose arguments are tensors, in their order; "
                f"{', '.join(others or kwargs)} would be frozen in the graph. Bind what does not "
                "change: model = functools.partial(model, name=value)"
            )


def _check_objective(objective: object, user: str) -> None:
    """Raises ``TypeError`` for what is no objective of ours."""
    if isinstance(objective, SurrogateELBO):
        return
    kind = objective if isinstance(objective, type) else type(objective)
    made = f"make one, {kind.__name__}()" if kind is objective else "give an Objective"
    hint = "use it as the loss as it is" if isinstance(objective, Trace_ELBO) else made
    raise TypeError(f"{user} replays the steps of an Objective, got {kind.__name__}: {hint}")
