r"""A Pyro model whose every chain has data of its own: one batch of C posteriors.

Chain c of a run samples :math:`p(\theta \mid x_c)`. The potential is vectorized over positions and
data together, :math:`U_c(q_c)`, so that a thousand simulated data sets cost one run of a thousand
chains: what simulation-based calibration and Geweke's test are made of. What the chains share is
their tuning: step size and metric are pooled over all of them.

The data are read anew at every evaluation, also in a recorded graph: :meth:`EachChain.update`
changes them under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm.mcmc.targets.explain import name_of
from pyro_ebm.mcmc.targets.target import Values
from pyro_ebm.poutine.aside import aside


class EachChain:
    """A model conditioned, in chain c, on the c-th of many data sets.

    Give it to a kernel in the place of a model, and run as many chains as there are data sets.

    Args:
        model: A Pyro model; what it observes itself at these sites (``obs=``) is replaced.
        data: Site name to values, ``(C,)`` + the site's batch and event shape; copied.

    Raises:
        TypeError: If the model is not a function or a value is not a tensor.
        ValueError: If there is no data, or the numbers of data sets differ.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm.mcmc import HMC, MCMC
        >>> def model():
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 5):
        ...         pyro.sample("x", dist.Normal(m, 1.0))
        >>> each = EachChain(model, {"x": torch.randn(32, 5)})
        >>> mcmc = MCMC(HMC(each), 10, 10, num_chains=32, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["m"].shape
        torch.Size([32, 10])
    """

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Tensor]) -> None:
        if not callable(model):
            raise TypeError(f"EachChain needs a Pyro model, got {type(model).__name__}")
        self.model = model
        self.num_chains = _count(data)
        self.data: Values = {name: value.detach().clone() for name, value in data.items()}
        self._row: Values | None = None

    @property
    def __name__(self) -> str:
        """What messages call it."""
        return f"{getattr(self.model, '__name__', type(self.model).__name__)} in each chain"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model with the data of the chain that is evaluated, else of the first one."""
        row = self._first() if self._row is None else self._row
        return poutine.condition(self.model, row)(*args, **kwargs)

    def _first(self) -> Values:
        return {name: value[0] for name, value in self.data.items()}

    def update(self, data: Mapping[str, Tensor]) -> None:
        """Replaces the data of all chains, in place.

        Args:
            data: Every site's values, of the shapes that they have.

        Raises:
            ValueError: If a site is missing or a shape is another.
        """
        have = {name: tuple(value.shape) for name, value in self.data.items()}
        got = {name: tuple(value.shape) for name, value in data.items()}
        if have != got:
            raise ValueError(f"the data of EachChain have shapes {have}, got {got}: make a new one")
        for name, value in data.items():
            self.data[name].copy_(value)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises unless the data are values of sample sites of the model.

        Args:
            args: The model's arguments.
            kwargs: Its keyword arguments.

        Raises:
            ValueError: If a site does not exist or has another shape.
        """
        with aside(), _Given(set(self.data)) as given:
            poutine.trace(self).get_trace(*args, **kwargs)
        for name, value in self.data.items():
            if name not in given.shapes:
                raise ValueError(f"EachChain has data for {name!r}, no sample site of {self._of}")
            if tuple(value.shape[1:]) != given.shapes[name]:
                raise ValueError(
                    f"EachChain: the data of {name!r} have shape {tuple(value.shape)}, expected "
                    f"{(self.num_chains, *given.shapes[name])}: one value of the site per chain"
                )

    @property
    def _of(self) -> str:
        return name_of(self.model)

    def rows(self, num_rows: int) -> Values:
        """Returns the data for the positions of all chains.

        Args:
            num_rows: How many positions there are.

        Raises:
            ValueError: If there are not as many as data sets.
        """
        if num_rows != self.num_chains:
            raise ValueError(
                f"EachChain has data for {self.num_chains} chains, and {num_rows} are run: set "
                f"num_chains={self.num_chains}"
            )
        return self.data

    def held(self, fn: Callable[[Tensor], Any]) -> Callable[[Tensor, Values], Any]:
        """Returns a function of a position and a chain's data, which the model has meanwhile.

        Args:
            fn: A function of a position that runs the model.
        """

        def with_data(q: Tensor, row: Values) -> Any:
            def run(row: Values) -> Any:
                kinds = {name: value.dtype for name, value in self.data.items()}
                before, self._row = self._row, {n: v.to(kinds[n]) for n, v in row.items()}
                try:
                    return fn(q)
                finally:
                    self._row = before

            # Inside a level of differentiation Pyro may read the data under vmap, as the latents.
            real = {n: v if v.is_floating_point() else v.double() for n, v in row.items()}
            return torch.func.vjp(run, real)[0]

        return with_data


def over_rows(
    fn: Callable[[Tensor], Any], q: Tensor, each: EachChain | None, *, at_once: bool = True
) -> Any:
    """Returns a function's values at every position, where it runs a model.

    Args:
        fn: A function of one position ``(D,)``.
        q: Positions, ``(C, D)``.
        each: The model, if its data differ between chains.
        at_once: Whether by ``vmap``; else one after the other, for a function to one tensor.
    """
    if each is None:
        return torch.vmap(fn)(q) if at_once else torch.stack([fn(row) for row in q])
    with_data, data = each.held(fn), each.rows(len(q))
    if at_once:
        return torch.vmap(with_data)(q, data)
    rows = [{name: value[c] for name, value in data.items()} for c in range(len(q))]
    return torch.stack([with_data(*pair) for pair in zip(q, rows, strict=True)])


def _count(data: Mapping[str, Tensor]) -> int:
    if not data:
        raise ValueError("EachChain needs data for at least one site, got none")
    for name, value in data.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(
                f"EachChain: the data of {name!r} must be a tensor with one value per chain along "
                f"its first dim, got {got}"
            )
    counts = {name: len(value) for name, value in data.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"EachChain: all sites need data for as many chains, got {counts}")
    return next(iter(counts.values()))


class _Given(Messenger):
    """Notes the shapes of the sites that data are for, before they are conditioned."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            self.shapes[msg["name"]] = tuple(msg["fn"].batch_shape + msg["fn"].event_shape)
