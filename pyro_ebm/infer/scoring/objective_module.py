"""An objective as a torch module, for a torch or Lightning loop, on one process or several."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyro_ebm.distributions.normalizer_guard import names_of
from pyro_ebm.errors import SurrogateWarning
from pyro_ebm.ops.autograd_graph import leaves_of


class Unlisted(NamedTuple):
    """What a loss depends on and its module does not hold, until it is seen whether it is trained.

    Args:
        held: The module's own parameters, with their values.
        others: The loss's further leaves, with theirs.
    """

    held: list[tuple[Tensor, Tensor]]
    others: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, loss: Tensor, held: Iterable[Tensor]) -> Unlisted:
        """Notes the leaves of ``loss`` that are not among ``held``."""
        mine = {id(p): p for p in held}
        others = [t for t in leaves_of(loss) if id(t) not in mine]
        return cls(_with_values(mine.values()), _with_values(others))

    def has_stepped(self) -> bool:
        """Whether an optimizer has moved one of the module's own since."""
        return any(_has_moved(p, value) for p, value in self.held)

    def left_behind(self, loss: Tensor) -> list[Tensor]:
        """Returns those that are leaves of a later ``loss`` again, unless one of them has moved."""
        again = set(map(id, leaves_of(loss)))
        still = [(t, value) for t, value in self.others if id(t) in again]
        return [] if any(_has_moved(t, value) for t, value in still) else [t for t, _ in still]


def _with_values(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Values rather than versions: fused optimizers leave these as they were."""
    return [(t, t.detach().clone()) for t in tensors if t.requires_grad]


def _has_moved(tensor: Tensor, value: Tensor) -> bool:
    return not torch.equal(tensor.detach(), value)


class ObjectiveModule(ELBOModule):
    """An objective bound to a model and a guide, as ``ELBO.__call__`` returns.

    Its value is in nats for the whole data set: divide it by the number of rows before calling
    ``backward`` if learning rates are to mean the same at every size.

    ``parameters()`` has those of the model and the guide where these are modules, and log Z. What a
    function calls is not among them, by ``pyro.module`` or not: write the model as an ``nn.Module``
    that holds its networks, or give the optimizer ``network.parameters()`` too.

    **Lightning.** Make the module an attribute of the ``LightningModule``, return
    ``self.loss(batch) / len(batch)`` from ``training_step`` and ``self.loss.parameters()`` goes to
    the optimizer. If log Z is learned, call the module on a batch first, under ``no_grad``.

    **Data parallelism** (``torchrun``). Wrap the module, not the model::

        module = objective(model, guide)
        with torch.no_grad():
            module(rows)                                # log Z must exist; rank 0's is taken
        parallel = DistributedDataParallel(module, find_unused_parameters=True)
        (parallel(rows) / len(rows)).backward()         # rows: as many in every process

    Gradients are synchronised in this ``backward``, those of losses that differentiate the energy
    in x included. ``find_unused_parameters`` is needed because a score has no gradient in the
    energy's constants and a resting player none at all. Every process must draw noise of its own:
    seed it with its rank. What is a mean over rows, or over draws beside rows, is then the loss of
    one process with all rows. Two things are not: ``DonskerVaradhan`` takes the logarithm of a mean
    over the draws of one process, so that its bias is that of the smaller batch; and a log Z that
    is not learned by gradient (``c_update="closed_form"``) is a running average of the process's
    own rows: take ``"gradient"``.
    """

    _listed: frozenset[str] | None = None  # what the last list held of the objective itself
    _unlisted: Unlisted | None = None  # noted once, and judged after an optimizer's first step
    _is_judged = False

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yields the parameters of model, guide and objective that exist by now."""
        self._listed = frozenset(name for name, _ in self.elbo.named_parameters())
        return super().named_parameters(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss in nats for the whole data set.

        Warns:
            SurrogateWarning: If log Z of a site exists only now that training has begun, so that an
                optimizer made of ``parameters()`` leaves it out; or if its parameters were moved
                and those of networks that it does not hold were not.
        """
        loss = super().forward(*args, **kwargs)
        if self._listed is not None and torch.is_grad_enabled():
            self._warn_of_late(self._listed)
            self._listed = None
        if not self._is_judged and loss.requires_grad:
            self._judge(loss)
        return loss

    def _judge(self, loss: Tensor) -> None:
        """Warns, after the first step of an optimizer, of what it leaves out."""
        if self._unlisted is None:
            self._unlisted = Unlisted.of(loss, (p for _, p in super().named_parameters()))
            self._is_judged = not self._unlisted.others
        elif self._unlisted.has_stepped():
            self._is_judged = True
            if left := self._unlisted.left_behind(loss):
                warnings.warn(
                    f"{type(self.elbo).__name__}(model, guide) has been optimized without "
                    f"{names_of(left, None)}: parameters() has those of the model and the guide "
                    "only where these are modules. Write the model as an nn.Module that holds its "
                    "networks, give the optimizer network.parameters() too, or freeze what is "
                    "fixed by requires_grad_(False)",
                    SurrogateWarning,
                    stacklevel=5,
                )
        if self._is_judged:
            self._unlisted = None

    def _warn_of_late(self, listed: frozenset[str]) -> None:
        own = self.elbo.named_parameters()
        late = [name for name, p in own if p.requires_grad and name not in listed]
        if late:
            sites = ", ".join(repr(name.rsplit(".", 1)[-1]) for name in late)
            warnings.warn(
                f"{type(self.elbo).__name__} creates its log Z at the first batch, and that of EBM "
                f"site {sites} was not yet in parameters() when they were asked for: call the "
                "module on data once before parameters(), or log Z is never optimized",
                SurrogateWarning,
                stacklevel=3,
            )
