"""A training loop: one torch optimizer for all that model, guide and objective register.

Pyro's ``SVI`` works with every objective; ``fit`` adds what training an energy usually wants:
mini-batches, a validation curve and early stopping, an average of the weights, gradient clipping, a
learning-rate schedule, checkpoints, and a progress bar with the objective's diagnostics.
Interrupting it (Ctrl-C) keeps what was learned; what diverges is reported and never averaged away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pyro_ebm.infer.scoring import turns
from pyro_ebm.infer.training.checkpoint import load_checkpoint
from pyro_ebm.infer.training.early_stopping import check_criterion
from pyro_ebm.infer.training.fit_options import Options, check_numbers
from pyro_ebm.infer.training.fit_result import FitResult
from pyro_ebm.infer.training.minibatch import Batches
from pyro_ebm.infer.training.stock_elbo import Loss, StockELBO, as_given, as_loss
from pyro_ebm.infer.training.training_run import TrainingRun

Data = Tensor | Sequence[Tensor]


def fit(
    model: Callable[..., Any],
    data: Data,
    objective: Trace_ELBO,
    *,
    guide: Callable[..., Any] | None = None,
    optim: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    lr: float = 1e-3,
    lr_schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    batch_size: int | None = None,
    num_steps: int = 1000,
    ema: float | None = None,
    grad_clip: float | None = None,
    schedule: tuple[int, int] | None = None,
    validation: Data | None = None,
    validate_every: int = 100,
    criterion: Callable[[], Any] | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    seed: int | None = None,
    capture: bool = False,
    compile: bool = False,  # noqa: A002
    disable_progbar: bool = False,
) -> FitResult:
    """Learns a model's parameters with an objective.

    Args:
        model: Called as ``model(*batch)``; its plates should have the batch's size (``len(x)``), or
            with ``batch_size=None`` subsample for themselves.
        data: A tensor or a sequence of tensors with a common first dim N, passed to model and
            guide.
        objective: An :class:`Objective` (or any ``Trace_ELBO``).
        guide: Latents' variational factors and the objective's contrasts.
        optim: A torch optimizer class, or one with options, such as ``partial(torch.optim.AdamW,
            weight_decay=0.01)``; the learning rate is ``lr``. Adam and AdamW without options are
            fused, which is faster.
        lr: Learning rate; ten times as much for a log Z learned by gradient.
        lr_schedule: Makes a torch scheduler from the optimizer, for example ``lambda optimizer:
            CosineAnnealingLR(optimizer, 1000)``. It moves at every step, ``ReduceLROnPlateau`` at
            every validation point.
        batch_size: Rows per step, drawn without replacement in each epoch. Sites in the plate over
            rows, found by running the model on one row more, are scaled by N / batch_size.
        num_steps: Steps to do, those of the checkpoint included.
        ema: Decay of the moving average of parameters, for example 0.999.
        grad_clip: Largest gradient norm over all parameters.
        schedule: Overrides the objective's ``(energy steps, generator steps)``.
        validation: Data for the validation curve: the loss per datum as if they were all of the
            training's, with the same draws at all points and modules in evaluation mode.
        validate_every: Steps between its points.
        criterion: A function without arguments for the curve instead, called without gradients;
            smaller is better.
        patience: After so many points without a new minimum the training ends. Whether it or
            ``num_steps`` ends it, parameters, averages and log Z of the best point are restored.
        checkpoint: File to save to (every ``checkpoint_every`` steps, at the end and on failure)
            and to resume from, bit for bit, with the same settings.
        checkpoint_every: Steps between saves.
        seed: Seeds Pyro at the start.
        capture: Whether to replay most steps from a graph of tensor operations, without Pyro's
            handlers in between: the same numbers in less time, for models that do the same
            operations at every step. Python numbers are frozen in the graph. Steps 2, 3, 5, 9, ...,
            those after validation points and the last are taken as they are and compared with it.
        compile: Whether to hand that graph to ``torch.compile``, which takes seconds at the start
            and needs a C++ compiler.
        disable_progbar: Hides the progress bar.

    Returns:
        Curves, averages and timings.

    Raises:
        TypeError: If ``data`` are no tensors, ``objective`` is none or ``optim`` is no class.
        ValueError: If arguments are out of range, ``data`` have no rows or differ in length, a
            checkpoint is of other data, there is nothing to train, the guide keeps latents for the
            rows of one batch, ``patience`` or ``ReduceLROnPlateau`` would go by a loss that does
            not distinguish better from worse, or ``validation`` is given where no plate tells the
            terms of rows from others.
        NonFiniteEnergyError: If a surrogate, the loss or a gradient is not finite; names site and
            step. The parameters of the last good step are in the checkpoint, if any.

    Warns:
        SurrogateWarning: If the loss runs away, or steps cannot be captured.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_ebm.distributions import EnergyDistribution
        >>> from pyro_ebm.infer import NCE
        >>> def model(x):
        ...     precision = pyro.param("precision", torch.tensor(2.0))
        ...     with pyro.plate("data", len(x)):
        ...         ebm = EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=())
        ...         pyro.sample("x", ebm, obs=x)
        >>> noise = dist.Normal(0.0, 1.5)
        >>> options = {"lr": 0.05, "num_steps": 150, "disable_progbar": True}
        >>> result = fit(model, torch.randn(500), NCE(noise=noise), **options)
        >>> abs(pyro.param("precision").item() - 1.0) < 0.3
        True
    """
    _check_objective(objective, optim)
    options = Options(
        optim=optim,
        lr=lr,
        lr_schedule=lr_schedule,
        ema=ema,
        grad_clip=grad_clip,
        validation=None if validation is None else _as_tuple(validation, "validation"),
        criterion=criterion,
        validate_every=validate_every,
        patience=patience,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        disable_progbar=disable_progbar,
        capture=capture,
        compile=compile,
    )
    check_numbers(options)
    if num_steps < 1:
        raise ValueError(f"num_steps must be a positive number of steps in all, got {num_steps!r}")
    if seed is not None:
        pyro.set_rng_seed(seed)
    batches = Batches(_as_tuple(data, "data"), batch_size)
    loss = as_loss(objective)
    with _scheduled(loss, schedule):
        run = TrainingRun(model, guide or _no_guide, loss, batches, options)
        if patience is not None:
            _check_points(options, num_steps)
            check_criterion(loss, options, "patience")
        if options.checkpoint is not None and options.checkpoint.exists():
            load_checkpoint(options.checkpoint, run)
        _train(run, num_steps)
    return run.result


def _check_points(options: Options, num_steps: int) -> None:
    if options.validate_every > num_steps:
        raise ValueError(
            f"patience counts validation points, and with validate_every={options.validate_every} "
            f"there is none in {num_steps} steps: lower validate_every"
        )


def _train(run: TrainingRun, num_steps: int) -> None:
    """Runs the loop; what it has reached is saved however it ends."""
    started = time.perf_counter()
    try:
        run.loop(num_steps)
    except KeyboardInterrupt:
        run.result.interrupted = True
    finally:
        run.result.seconds = time.perf_counter() - started
        run.save()
    run.finish()


@contextmanager
def _scheduled(loss: Loss, schedule: tuple[int, int] | None) -> Iterator[None]:
    """Lets an objective's players take turns as asked, for this fit only."""
    if schedule is None:
        yield
        return
    if isinstance(loss, StockELBO):
        raise TypeError(f"{type(as_given(loss)).__name__} has no two players and takes no schedule")
    own, loss.schedule = loss.schedule, turns.schedule(schedule, loss)
    try:
        yield
    finally:
        loss.schedule = own


def _as_tuple(data: Any, name: str) -> tuple[Tensor, ...]:
    """Returns data as tensors; arrays of NumPy become tensors of their own dtype."""
    parts = (data,) if isinstance(data, (Tensor, np.ndarray)) else data
    if not isinstance(parts, Sequence) or not all(
        isinstance(part, (Tensor, np.ndarray)) for part in parts
    ):
        raise TypeError(
            f"{name} must be a tensor or a sequence of tensors with one row per datum, got "
            f"{type(data).__name__}: {_tensors_in(data)}"
        )
    tensors = tuple(torch.as_tensor(part) for part in parts)
    if not tensors or any(not t.dim() or not len(t) for t in tensors):
        shapes = [tuple(t.shape) for t in tensors]
        raise ValueError(f"{name} must have at least one row, got shapes {shapes}")
    return tensors


def _tensors_in(data: Any) -> str:
    """Says where the tensors are in what torch loads data with."""
    if isinstance(data, TensorDataset):
        return "hand over dataset.tensors"
    if isinstance(data, Subset) and isinstance(data.dataset, TensorDataset):
        return "hand over [t[subset.indices] for t in subset.dataset.tensors]"
    if isinstance(data, (DataLoader, Dataset)):
        return (
            "hand over the tensors that it reads, or call loss = objective(model, guide) on the "
            "batches in a loop of your own"
        )
    return "hand over what the model takes, in its order"


def _check_objective(objective: Any, optim: Any) -> None:
    """Raises for a class of objectives, an optimizer in place of its class, or with its own lr."""
    if not isinstance(objective, Trace_ELBO):
        kind = objective if isinstance(objective, type) else type(objective)
        got, hint = kind.__name__, ""
        if issubclass(kind, ELBO) and not issubclass(kind, Trace_ELBO):
            hint = ": train with it by pyro.infer.SVI. Objectives sum out enumerated sites, too"
        elif kind is objective:
            hint = f": make one, {got}()"
        raise TypeError(f"objective must be an Objective or a Trace_ELBO, got {got}{hint}")
    if not callable(optim) or isinstance(optim, (torch.optim.Optimizer, PyroOptim)):
        raise TypeError(
            "optim must be a class of torch optimizers, such as torch.optim.Adam, or a partial of "
            "one: fit makes it with the rate lr once the parameters are known. Got "
            f"{type(optim).__name__}"
        )
    made = optim.func if isinstance(optim, partial) else optim
    if isinstance(optim, partial) and "lr" in optim.keywords:
        rate = optim.keywords["lr"]
        raise ValueError(
            f"optim has a learning rate of its own, lr={rate!r}, beside that of fit, which every "
            f"group of parameters gets: call fit(..., lr={rate!r}) and take it out of the partial"
        )
    if isinstance(made, type) and issubclass(made, torch.optim.LBFGS):
        raise TypeError(
            "fit takes one step per batch, and LBFGS evaluates a closure as often as it likes: use "
            "optim=torch.optim.Adam, or LBFGS in a loop of your own over objective(model, guide)"
        )


def _no_guide(*args: Any, **kwargs: Any) -> None:
    return None
