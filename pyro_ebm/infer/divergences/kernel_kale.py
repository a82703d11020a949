r"""Kernel KALE: a generator trained by a divergence whose adversary is solved for on every batch.

For data P and draws Q of a generator the loss is

.. math:: \mathrm{KALE}_\lambda(P \| Q) = (1 + \lambda) \max_{h \in H} \big\{ 1 + E_P h - E_Q e^h
    - \tfrac{\lambda}{2} \lVert h \rVert_H^2 \big\},

with h in the space of a kernel, where the maximum is a convex problem
(:mod:`pyro_ebm.ops.kale_dual`). By the envelope theorem the gradient to the generator is that of
:math:`-(1 + \lambda) E_Q e^h` with h held: draws that lie where data are missing move towards them,
the more so the larger :math:`e^h`. Small :math:`\lambda` is near Kullback-Leibler, large near
:math:`\tfrac12 \mathrm{MMD}^2`.

As under :class:`~pyro_ebm.infer.divergences.mmd.MMD`, the law that draws is trained and the energy
takes no part. The value on a batch is biased upwards, since h is fitted to the batch: compare
values of batches of one size. To *learn an energy* in the kernel's space take ``kernel_kale(data,
base_draws, ...).witness``, which is minus an energy with log Z near zero.

References:
    Glaser, Arbel, Gretton, KALE flow, NeurIPS 2021, arXiv:2106.08929; Arbel, Zhou, Gretton,
    Generalized Energy-Based Models, ICLR 2021, arXiv:2003.05033.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_ebm.infer.divergences.sample_comparison import SampleComparison
from pyro_ebm.ops.arguments import positive
from pyro_ebm.ops.kale_dual import kernel_kale
from pyro_ebm.ops.kernels import RadialKernel


class KernelKALE(SampleComparison):
    r"""KALE with the energy in a kernel's space, as a loss for a generator.

    A step costs a few Cholesky factors of the number of draws: a thousand are comfortable.

    Args:
        kernel: The kernel; ``None`` fits a sum of Gaussians to the first batch.
        num_base: Draws per batch, rounded up to a multiple of its rows; ``None`` draws as many as
            there are rows.
        regularization: :math:`\lambda > 0`.
        tolerance: The largest duality gap, in nats and relative to 1 + the value.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If lambda is not positive, the law that draws has no gradients, or rows have
            weights of their own.
        RuntimeError: If the dual of a batch could not be solved.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro.infer import SVI
        >>> from pyro_ebm.distributions import GeneralizedEBM
        >>> def model(data):
        ...     shift = pyro.param("shift", torch.tensor(0.0))
        ...     gebm = GeneralizedEBM(lambda z: z + shift, dist.Normal(0.0, 1.0), lambda x: x**2)
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("x", gebm, obs=data)
        >>> data = torch.randn(200) + 2
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.1}), loss=KernelKALE())
        >>> losses = [svi.step(data) for _ in range(60)]
        >>> abs(pyro.param("shift").item() - 2) < 0.4
        True
    """

    def __init__(
        self,
        kernel: RadialKernel | None = None,
        num_base: int | None = None,
        *,
        regularization: float = 0.1,
        tolerance: float = 1e-8,
        **elbo: Any,
    ) -> None:
        super().__init__(kernel, num_base, **elbo)
        self.regularization = positive("regularization", regularization)
        self.tolerance = positive("tolerance", tolerance)

    def pooled_by(self, site: str) -> str | None:
        """Says that the dual takes all rows of a site alike."""
        return "solves for h with all rows alike: use MMD, or repeat rows as often as they count"

    def compare(self, data: Tensor, draws: Tensor) -> Tensor:
        """Returns the divergence's terms in nats, one value per datum."""
        lam, kernel = self.regularization, self.kernel_for(data)
        data, exact = data.double(), draws.double()
        result = kernel_kale(data, exact, kernel, lam, tolerance=self.tolerance)
        h = result.witness  # its centres are detached: h is held
        mass = h(exact).exp().mean()
        values = (1 + lam) * (1.0 + h(data) - mass - 0.5 * lam * h.squared_norm())
        self.evaluation.note(kernel_kale=result.value, duality_gap=result.gap, mass=mass)
        return values.to(draws.dtype)
