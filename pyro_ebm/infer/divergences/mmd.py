r"""MMD: a generator trained by comparing its draws with the data, without an adversary.

For data :math:`x_i`, draws :math:`y_l` of a generator and a kernel k the loss is the U-statistic

.. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{M(M-1)} \sum_{l \ne k} k(y_l, y_k)
    - \frac{2}{nM} \sum_{il} k(x_i, y_l),

unbiased for :math:`\mathrm{MMD}^2 \ge 0`, so that it may come out negative; so are its gradients on
mini-batches.

What is trained is *the law that draws*: the guide's site of the same name (a
``PushforwardDistribution``, or any law with ``rsample``), else the base of the EBM, which for a
``GeneralizedEBM`` is its generator. The energy takes no part and receives no gradient: a
generator may be fitted by MMD first and its energy by KALE after, on one model. The loss is in
units of the kernel, not in nats: it is no likelihood, nor does it learn log Z.

References:
    Li, Swersky, Zemel, Generative moment matching networks, ICML 2015, arXiv:1502.02761;
    Gretton, Borgwardt, Rasch, Schoelkopf, Smola, A kernel two-sample test, JMLR 13, 2012.
"""

from __future__ import annotations

from torch import Tensor

from pyro_ebm.infer.divergences.sample_comparison import SampleComparison


class MMD(SampleComparison):
    r"""The squared maximum mean discrepancy as a loss for a generator.

    Args:
        kernel: The kernel; ``None`` fits a sum of Gaussians to the first batch, with lengths of
            half, once and twice its median distance. Large data sets of one kind want one fixed
            kernel.
        num_base: Draws per batch, rounded up to a multiple of its rows; ``None`` draws as many as
            there are rows.
        **elbo: Arguments of ``pyro.infer.Trace_ELBO``.

    Raises:
        ValueError: If a batch has one row, or the law that draws has no gradients.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_ebm.distributions import GeneralizedEBM
        >>> def model(data):
        ...     shift = pyro.param("shift", torch.tensor(0.0))
        ...     gebm = GeneralizedEBM(lambda z: z + shift, dist.Normal(0.0, 1.0), lambda x: x**2)
        ...     with pyro.plate("data", len(data)):
        ...         pyro.sample("x", gebm, obs=data)
        >>> data = torch.randn(300) + 2
        >>> svi = SVI(model, lambda data: None, pyro.optim.Adam({"lr": 0.1}), loss=MMD())
        >>> losses = [svi.step(data) for _ in range(100)]
        >>> abs(pyro.param("shift").item() - 2) < 0.3
        True
    """

    def compare(self, data: Tensor, draws: Tensor) -> Tensor:
        """Returns the terms of the U-statistic, in units of the kernel.

        Raises:
            ValueError: If there are fewer than two data or draws.
        """
        if min(len(data), len(draws)) < 2:
            raise ValueError(
                f"MMD compares rows with each other, got {len(data)} data and {len(draws)} draws: "
                "put the data in a plate, or use a larger batch"
            )
        kernel = self.kernel_for(data)
        values = _mean_of_others(kernel(data, data)) - 2.0 * kernel(data, draws).mean(1)
        values = values + _mean_of_others(kernel(draws, draws)).mean()
        self.evaluation.note(mmd2=values.mean())
        return values


def _mean_of_others(gram: Tensor) -> Tensor:
    """The mean of every row without its diagonal: the kernel of a point with itself is no pair."""
    return (gram.sum(1) - gram.diagonal()) / (len(gram) - 1)
