"""Kernels that Pyro's own driver can run as well."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pyro_ebm.mcmc.kernels.kernel import Kernel
from pyro_ebm.mcmc.kernels.one_chain import OneChain


class PyroKernel(Kernel):
    """A kernel with the verbs that :class:`pyro.infer.MCMC` and ``StreamingMCMC`` ask for.

    They move one chain at a time; our own driver moves all of them in one batch. Args as
    :class:`Kernel`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm.mcmc import HMC
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> mcmc = pyro.infer.MCMC(HMC(model), 20, 10, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["x"].shape
        torch.Size([20])
    """

    transforms: ClassVar[dict[str, Any]] = {}  # none are left to do: values are on their supports
    _first_params: dict[str, Tensor] | None = None
    _chain: OneChain

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Makes ready one chain for :class:`pyro.infer.MCMC`.

        Args:
            warmup_steps: Transitions that tune the kernel.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.
        """
        self._chain = OneChain(self, warmup_steps, args, kwargs, self._first_params)

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain is, on the supports; to be set, before a run, to unconstrained values."""
        return self._chain.values()

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._first_params = params

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Moves the chain and returns the values of its sites, on their supports.

        Args:
            params: What was returned last: the chain knows where it is.
        """
        self._chain.move()
        return self._chain.values()

    def logging(self) -> dict[str, str]:
        """Returns what the driver's progress bar says."""
        return self._chain.shown()

    def diagnostics(self) -> dict[str, Any]:
        """Returns the chain's statistics, as ``RecordingNUTS`` does."""
        return self._chain.diagnostics()

    def cleanup(self) -> None:
        """Forgets the chain and where it was to start; Pyro's driver asks twice."""
        for name in ("_chain", "_first_params"):
            self.__dict__.pop(name, None)
