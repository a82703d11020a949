r"""A posterior over the parameters of unnormalized models, by the way that the data leave open.

In this order, exact ways first:

1. *log Z known* in closed form, a sum over few states, or an integral over at most two dims, or
   three if ``method="exact"`` asks for it: Hamiltonian Monte Carlo;
2. *exact draws of the model*: exchange, group by group in a hierarchy;
3. *a kernel for the model*: exchange with auxiliary draws by sweeps, judged by ACD and AIKS;
4. *independent rows of few continuous dims*, or directions: the NCE posterior;
5. *anything else*: a generalized posterior by score matching or pseudo-likelihood, calibrated by
   the rows, or by simulation where there is but one dependent observation.

Contrastive ways need rows: of one lattice or network there is nothing to tell from noise, and one
log Z for all rows is wrong where every row has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyro_ebm.errors import ConditionalEnergyError
from pyro_ebm.infer.bayes.data_structure import DataStructure, SiteStructure, data_structure
from pyro_ebm.infer.bayes.posterior_remarks import mixing_remarks, of_sites, structure_of
from pyro_ebm.infer.bayes.posterior_result import Posterior
from pyro_ebm.infer.bayes.posterior_ways import MAX_TERMS, WAYS, Run
from pyro_ebm.infer.bayes.properness import check_proper
from pyro_ebm.normalizers.held_nodes import MAX_DIM

MAX_NODES = 2**15  # of an integral for log Z that is taken unasked
MAX_UNASKED_DIM = 2  # of such an integral: in three dims chains take hours
MAX_NOISE_DIM = 10  # of an event that noise is told from
_CHECKED = ("nce", "generalized")  # ways that look for improper energies themselves


def posterior(
    model: Callable[..., Any],
    *args: Any,
    method: str = "auto",
    num_samples: int = 500,
    warmup_steps: int = 500,
    num_chains: int = 64,
    disable_progbar: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Returns draws of a model's latents, with the reasons for how they were made.

    Args:
        model: A Pyro model with observed EBM sites.
        *args: Its arguments, with the full data.
        method: ``"auto"``, or ``"exact"``, ``"exchange"``, ``"anchored"``, ``"nce"`` or
            ``"generalized"``; each of them has more options where it is at home:
            :class:`~pyro_ebm.mcmc.HMC`, :class:`~pyro_ebm.mcmc.Exchange`,
            :func:`anchored_posterior`, :func:`nce_posterior`, :func:`generalized_posterior`.
        num_samples: Draws of a chain.
        warmup_steps: Iterations of a chain before them.
        num_chains: Chains, all in one batch.
        disable_progbar: Hides the progress bar.
        **kwargs: Keyword arguments of the model.

    Returns:
        A :class:`Posterior`; printed, it explains itself.

    Raises:
        TypeError: If it is no model, or data on a continuous support are whole numbers.
        ValueError: If the model observes no EBM, an energy is improper, or the method is unknown or
            cannot serve these data; the sentence says which can.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro_ebm import EnergyDistribution
        >>> from pyro_ebm.ops.constraints import spins
        >>> def model(x):
        ...     pull = pyro.sample("pull", dist.Normal(torch.tensor(0.0), 1.0))
        ...     law = EnergyDistribution(lambda s: -pull * s.prod(-1), support=spins,
        ...                              event_shape=(3,))
        ...     with pyro.plate("rows", len(x)):
        ...         pyro.sample("x", law, obs=x)
        >>> x = torch.ones(20, 3)
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <...>
        >>> print(posterior(model, x, num_samples=100, warmup_steps=100))
        exact log Z: 64 chains of 100 draws
          because: the data of site 'x' are independent rows (20) of one law.
          because: log Z of site 'x' is a sum over 8 states.
    """
    run = Run(model, args, kwargs, num_samples, warmup_steps, num_chains, disable_progbar)
    structure = data_structure(model, *args, **kwargs)
    if method != "auto" and method not in WAYS:
        raise ValueError(f"method must be 'auto' or one of {sorted(WAYS)}, got {method!r}")
    name = route_of(structure) if method == "auto" else method
    doubts = () if name in _CHECKED else check_proper(model, args, kwargs)
    limits = (MAX_NODES, MAX_UNASKED_DIM) if method == "auto" else (MAX_TERMS, MAX_DIM)
    integrals = run.integrals(structure, *limits) if name == "exact" else None
    if method == "auto" and integrals is None and structure.is_integral:
        name = route_of(structure, can_integrate=False)
    run = replace(run, nodes=integrals)
    try:
        found = WAYS[name](run, structure)
    except ConditionalEnergyError:  # seen at draws of the posterior, and not of the prior
        if method != "auto":
            raise
        structure = structure.as_conditional()
        name = route_of(structure, can_integrate=False)
        found = WAYS[name](run, structure)
    if name in _CHECKED:
        doubts = ()
    told = of_sites("the data of", structure.sites, structure_of)
    # Of an NCE posterior R-hat contains what the noise sets change, of which it speaks itself.
    mixing = () if name == "nce" else mixing_remarks(found)
    return replace(
        found,
        reasons=told + found.reasons,
        remarks=found.remarks + mixing + doubts,
        call=(model, args, kwargs),
    )


def route_of(structure: DataStructure, *, can_integrate: bool = True) -> str:
    """Returns the method that ``"auto"`` takes for data of this structure.

    Args:
        structure: The structure.
        can_integrate: Whether there are nodes for log Z of sites of few dims.
    """
    sites = structure.sites
    summed = [s for s in sites if not (can_integrate and s.can_be_integrated)]
    if sum(site.num_terms for site in summed) <= MAX_TERMS:
        return "exact"
    if all(site.can_be_exchanged for site in sites):
        return "exchange"
    return "nce" if len(sites) == 1 and _is_for_noise(sites[0]) else "generalized"


def _is_for_noise(site: SiteStructure) -> bool:
    has_density = site.measure != "counting" and site.dim <= MAX_NOISE_DIM
    return has_density and site.has_noise and site.kind == "independent rows"
