r"""Exchange: exact inference of :math:`\theta` where :math:`Z(\theta)` is out of reach.

A proposal :math:`\theta'` comes with a data set :math:`y \sim p_{\theta'}` of the same size as x,
and is accepted by

.. math::
    \log\alpha = \log\frac{\pi(\theta')}{\pi(\theta)}
        + \sum_i [E_\theta(x_i) - E_{\theta'}(x_i)] + \sum_i [E_{\theta'}(y_i) - E_\theta(y_i)],

in which every Z cancels. With exact y this is exact at any number of chains and draws. Bridging
carries y from :math:`\theta'` towards :math:`\theta` by reversible moves at K parameters between
them, and makes the last sum less noisy: acceptance rises towards that of Metropolis–Hastings with Z
known.

References:
    Murray, Ghahramani, MacKay, MCMC for doubly-intractable distributions, UAI 2006, arXiv:1206.6848
    (bridging: section 5); Møller, Pettitt, Reeves, Berthelsen, An efficient Markov chain Monte
    Carlo method for distributions with intractable normalising constants, Biometrika 93, 2006.
"""

from __future__ import annotations

from pyro_ebm.mcmc.exchange.exchange_kernel import ExchangeKernel
from pyro_ebm.mcmc.kernels.kernel import Info, State
from pyro_ebm.mcmc.kernels.random_walk import walked
from pyro_ebm.mcmc.targets.captured import CapturedPotential


class Exchange(ExchangeKernel):
    """Exchange by a random walk, many chains in one batch.

    Args:
        model: A Pyro model with observed EBM sites whose log Z is missing. Their energies are
            :class:`~pyro_ebm.energies.ExponentialFamily`; they may stand in plates, with parameters
            of their own for every group.
        auxiliary: How y is drawn; by the exact samplers of the energies if all have one, else at
            all sites by 20 sweeps that start at the data, which marks the chains as inexact.
        num_bridges: K, parameters between the two at which y is moved.
        **options: Those of :class:`~pyro_ebm.mcmc.kernels.tuned_kernel.TunedKernel`.

    Raises:
        TypeError: When run, if an energy is not an exponential family.
        NotCoupledError: When run, a ``RuntimeError``, if exact draws take too long at couplings
            that are proposed: give ``auxiliary=Sweeps()``.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.energies import Ising
        >>> from pyro_ebm.mcmc import MCMC
        >>> def model(image):
        ...     coupling = pyro.sample("coupling", dist.Uniform(0.0, 0.4))
        ...     field = pyro.sample("field", dist.Normal(0.0, 0.5))
        ...     law = EnergyDistribution(Ising(coupling, (13, 40), field=field, periodic=False))
        ...     pyro.sample("image", law, obs=image)
        >>> mcmc = MCMC(Exchange(model), 5, 5, num_chains=4, disable_progbar=True)
        >>> mcmc.run(Ising(0.2, (13, 40), field=0.3, periodic=False).sample())
        >>> mcmc.kernel.adjusted, mcmc.get_samples()["field"].shape
        (True, torch.Size([4, 5]))
    """

    def step(self, potential: CapturedPotential, state: State) -> tuple[State, Info]:
        """Moves the chains whose jumps are accepted."""
        return self.decided(potential, state, self.propose(potential, state))

    def propose(self, potential: CapturedPotential, state: State) -> State:
        """Returns a jump of every chain, with its natural parameters."""
        return self.at(potential, state, walked(state, state.tuning["step_size"]))
