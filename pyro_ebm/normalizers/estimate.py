r"""Log Z by the routes that a distribution leaves open, and whether they agree.

Exact sums and quadrature come first. Else, and where no grid resolves the density (a network with
kinks, heavy tails), a route that starts from the base (annealing, or of a discrete law particles)
stands beside one that starts from draws of chains (bridge sampling). Two routes from one start miss
the same modes and agree on the wrong value, so that their agreement is called agreement, and no
more: chains that are started from the base as well share that start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers.ais import ais
from pyro_ebm.normalizers.bridge import bridge, least_draws
from pyro_ebm.normalizers.chain_remarks import chain_remarks
from pyro_ebm.normalizers.discrete_path import DiscretePath, draws_of_chains, is_discrete
from pyro_ebm.normalizers.exact import States, exact
from pyro_ebm.normalizers.from_uniform import from_uniform
from pyro_ebm.normalizers.held_nodes import MAX_DIM
from pyro_ebm.normalizers.importance import importance
from pyro_ebm.normalizers.laws import law_of, on_reals, single
from pyro_ebm.normalizers.quadrature import UnresolvedError, quadrature
from pyro_ebm.normalizers.smc import smc
from pyro_ebm.normalizers.thermodynamic import stepping_stones, thermodynamic
from pyro_ebm.ops.log_normalizer import LogNormalizer
from pyro_ebm.ops.spaces import UnconstrainedSpace

METHODS: dict[str, Callable[[EnergyDistribution], LogNormalizer]] = {
    "exact": exact,
    "quadrature": quadrature,
    "importance": importance,
    "ais": ais,
    "from_uniform": from_uniform,
    "smc": smc,
    "thermodynamic": thermodynamic,
    "stepping_stones": stepping_stones,
}
_MAX_STATES = 2**20
_THROUGH_CHAINS = " through chains"
_AGREE = 3.0  # standard errors of the difference


def estimate_log_normalizer(
    dist: EnergyDistribution, method: str = "auto", *, draws: Tensor | None = None
) -> LogNormalizer:
    """Returns log Z by the best way there is, or by the one that is named.

    Args:
        dist: The distribution.
        method: ``"auto"``, or ``"exact"``, ``"quadrature"``, ``"importance"``, ``"ais"``,
            ``"from_uniform"``, ``"smc"``, ``"thermodynamic"``, ``"stepping_stones"`` or
            ``"bridge"``, with their defaults.
        draws: Draws of the law for the bridge, ``(chains, draws) + event_shape``, by preference
            from chains that were started at data; drawn by 64 chains of HMC, of a discrete law by
            sweeps, if not given.
            Quadrature looks for modes there, too, and is compared with the bridge.

    Returns:
        ``LogNormalizer`` in nats. Where two routes disagree its value is that of the one with the
        smaller error, and :attr:`LogNormalizer.doubts` says so.

    Raises:
        ValueError: If the method is unknown, or the distribution does not allow for it.
        NotImplementedError: If no route is open.

    Example:
        >>> law = EnergyDistribution(lambda x: x**4, event_shape=())
        >>> print(estimate_log_normalizer(law).method)
        quadrature
    """
    if method == "bridge":
        return _bridged(dist, draws)
    if method == "quadrature":
        return quadrature(dist, draws=draws)
    if method in METHODS:
        return METHODS[method](dist)
    if method != "auto":
        raise ValueError(
            f"method must be 'auto', 'bridge' or one of {sorted(METHODS)}, got {method!r}"
        )
    return _by_the_best_way(dist, draws)


def _by_the_best_way(dist: EnergyDistribution, draws: Tensor | None) -> LogNormalizer:
    law = law_of(dist)
    states = States.finite(law)
    if law.is_exact_energy or (states is not None and states.number <= _MAX_STATES):
        return exact(dist)
    if is_discrete(law):
        return _of_states(dist, draws)
    on_reals(law, "estimate_log_normalizer")
    if UnconstrainedSpace.of(law.support, law.event_shape).size <= MAX_DIM:
        return _on_a_grid(dist, draws)
    return _from_draws(dist, draws)


def _on_a_grid(dist: EnergyDistribution, draws: Tensor | None) -> LogNormalizer:
    """Quadrature, beside the bridge where there are draws enough; without it where it fails."""
    law = law_of(dist)
    is_enough = draws is not None and draws.shape[:2].numel() >= least_draws(law)
    try:
        by_grid = quadrature(dist, draws=draws)
    except UnresolvedError:
        if law.batch_shape != ():
            raise
        found = _from_draws(dist, draws if is_enough else None)
        return replace(found, method=f"{found.method}, for a grid does not resolve the density")
    if draws is None or not is_enough or law.batch_shape != ():
        return by_grid
    return agreed(by_grid, bridge(dist, draws))


def _from_draws(dist: EnergyDistribution, draws: Tensor | None) -> LogNormalizer:
    """Bridge sampling, beside annealing where there is a base to start from."""
    law = single(dist, "estimate_log_normalizer")
    by_bridge = _bridged(dist, draws)
    if law.base is not None:
        return agreed(ais(dist), by_bridge)
    more = "a base" if draws is not None else "draws= from data, or a base,"
    return replace(by_bridge, method=f"{by_bridge.method}, one route only: give {more} for another")


def _of_states(dist: EnergyDistribution, draws: Tensor | None) -> LogNormalizer:
    """Annealing by a family's own sweeps, else particles beside a bridge."""
    law = single(dist, "estimate_log_normalizer")
    states = States.finite(law)
    if states is None and law.base is None:
        raise NotImplementedError(
            f"{dist!r} has infinitely many states and no base to start from: give base="
        )
    if law.energy_sweeps:
        return from_uniform(dist)
    return agreed(smc(dist), _bridged(dist, draws))


def agreed(one: LogNormalizer, other: LogNormalizer) -> LogNormalizer:
    """Returns the estimate with the smaller error, with a doubt where the two disagree."""
    best, second = sorted((one, other), key=_rank)
    error = (_variance(one) + _variance(other)) ** 0.5
    gap = float((one.value - other.value).abs())
    if gap <= _AGREE * error:
        alike = " from the same start" if _first_start(one) == _first_start(other) else ""
        return replace(best, method=f"{best.method}, in agreement with {second.method}{alike}")
    remark = f"{second.method} gives {float(second.value):.3f} ({gap / error:.0f} errors away)"
    return replace(best, remarks=(*best.remarks, remark))


def _rank(estimate: LogNormalizer) -> tuple[bool, float]:
    return (not estimate.is_trusted, _variance(estimate))


def _variance(estimate: LogNormalizer) -> float:
    return float("inf") if estimate.stderr is None else float(estimate.stderr) ** 2


def _first_start(estimate: LogNormalizer) -> str:
    return (estimate.start or "").removesuffix(_THROUGH_CHAINS)


def _bridged(dist: EnergyDistribution, draws: Tensor | None) -> LogNormalizer:
    if draws is not None:
        return bridge(dist, draws)
    law = single(dist, "bridge sampling")
    if is_discrete(law):
        path = DiscretePath(law)
        found, start = bridge(law, draws_of_chains(path)), path.start
    else:
        on_reals(law, "bridge sampling")
        found, start = _of_chains(dist), "support" if law.base is None else "base"
    return replace(found, start=f"{start}{_THROUGH_CHAINS}")


def _of_chains(dist: EnergyDistribution) -> LogNormalizer:
    mcmc = MCMC(HMC(dist), 250, 300, num_chains=64, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["x_latent" if isinstance(dist, GeneralizedEBM) else "x"]
    found = bridge(dist, draws)
    return replace(found, remarks=(*found.remarks, *chain_remarks(mcmc)))
