r"""How much structure do four answers have? Maximum entropy models small enough to enumerate.

Coleman asked 3398 schoolboys twice, half a year apart, whether they belonged to the leading crowd
and whether to be of it one must sometimes go against one's principles (Introduction to Mathematical
Sociology, 1964). Of all laws of x in {-1, +1}^4 that share the means of products over the subsets
of up to k answers, the one of greatest entropy is

    p(x | w) = exp(sum_A w_A prod_{i in A} x_i) / Z(w),    |A| <= k:

independence for k = 1, a Boltzmann machine for k = 2, any table for k = 4. Z is a sum of 16 terms.

1. *Bayes* by HMC, w ~ Normal(0, 1), beside maximum likelihood by iterative proportional fitting.
2. *How large a k?* Leave-one-out cross-validation by ArviZ, with log Z at every draw, beside
   Akaike's criterion, to which it is asymptotically equal. One row is one boy: the model is sampled
   with 16 patterns that count as often as they occur, and compared on 3398 rows.
3. *Does it fit?* Tables of new boys beside theirs.

Run it; the figure and the draws, for ArviZ, go to results/maximum_entropy::

    python examples/maximum_entropy.py            # under a minute
    python examples/maximum_entropy.py --smoke    # seconds, few draws, every tenth boy in step 2
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from pyro import poutine
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.mcmc import HMC, MCMC
from pyro_ebm.normalizers import exact
from pyro_ebm.ops.constraints import spins
from pyro_ebm.plots import PALETTE

# Rows: member and attitude at first, + +, + -, - +, - -. Columns: the same half a year later.
TABLE = [[458, 140, 110, 49], [171, 182, 56, 87], [184, 75, 531, 281], [85, 97, 338, 554]]
COUNTS = torch.tensor(TABLE, dtype=torch.float64).flatten()
PATTERNS = torch.tensor(list(itertools.product((1.0, -1.0), repeat=4)), dtype=torch.float64)
QUESTIONS = ("member", "attitude", "member later", "attitude later")
ORDERS = {1: "independent", 2: "pairwise", 4: "any table"}


def subsets(order: int) -> list[tuple[int, ...]]:
    """Returns the sets of answers whose product has a weight."""
    sizes = range(1, order + 1)
    return [subset for size in sizes for subset in itertools.combinations(range(4), size)]


def products(x: Tensor, order: int) -> Tensor:
    """Returns the sufficient statistics, ``(..., p)``."""
    return torch.stack([x[..., list(subset)].prod(-1) for subset in subsets(order)], -1)


# --- the model


def law(weights: Tensor, order: int) -> ebm.EnergyDistribution:
    """The maximum entropy law, with log Z summed over its 16 states."""
    p = ebm.EnergyDistribution(
        lambda x: -(products(x, order) * weights).sum(-1),
        support=spins,
        event_shape=(4,),
        batch_shape=weights.shape[:-1],
    )
    return p.with_log_normalizer(exact(p))


def model(order: int, answers: Tensor, counts: Tensor) -> None:
    """Rows of answers, each of which counts so many times."""
    prior = dist.Normal(torch.zeros(len(subsets(order)), dtype=torch.float64), 1.0)
    weights = pyro.sample("weights", prior.to_event(1))
    with pyro.plate("rows", len(answers)), poutine.scale(scale=counts):
        pyro.sample("answers", law(weights, order), obs=answers)


def sample_posterior(order: int, *, smoke: bool) -> MCMC:
    """Runs HMC on the 16 patterns."""
    num = 25 if smoke else 400
    mcmc = MCMC(HMC(model), num, num, num_chains=8, disable_progbar=True)
    mcmc.run(order, PATTERNS, COUNTS)
    return mcmc


def probabilities(weights: Tensor, order: int) -> Tensor:
    """Returns those of the 16 patterns, ``(S, 16)`` for draws ``(S, p)``."""
    return law(weights[:, None], order).log_prob(PATTERNS).exp()


# --- maximum likelihood


def iterative_proportional_fit(order: int) -> Tensor:
    """Returns expected counts ``(16,)`` whose margins of ``order`` answers are those observed."""
    observed = COUNTS.reshape(1, 2, 2, 2, 2)
    fitted = torch.full_like(observed, float(COUNTS.mean()))
    for _ in range(200):
        for kept in itertools.combinations(range(1, 5), order):
            others = [dim for dim in range(5) if dim not in kept]
            ratio = observed.sum(others, keepdim=True) / fitted.sum(others, keepdim=True)
            fitted = fitted * ratio
    return fitted.flatten()


def deviance(counts: Tensor, expected: Tensor) -> Tensor:
    """Twice the log likelihood that a table of its own would gain, of the last dim."""
    return 2.0 * torch.special.xlogy(counts, counts / expected).sum(-1)


def maximum_likelihood(order: int) -> tuple[Tensor, Tensor]:
    """Returns weights and their standard errors."""
    expected, statistics = iterative_proportional_fit(order), products(PATTERNS, order)
    # Products are orthogonal over the 16 patterns.
    weights = statistics.mT @ expected.log() / len(PATTERNS)
    centered = statistics - expected @ statistics / expected.sum()
    information = (centered * expected[:, None]).mT @ centered
    return weights, information.inverse().diagonal().sqrt()


# --- what is printed


def print_weights(mcmc: MCMC) -> None:
    """Prints the posterior of the pairwise weights beside maximum likelihood."""
    table, (weights, errors) = mcmc.summary(), maximum_likelihood(2)
    print(f"{'pairwise weights':<32} {'ML':>7} {'error':>6} {'mean':>8} {'sd':>6} {'R-hat':>6}")
    for row, subset, weight, error in zip(
        table.itertuples(), subsets(2), weights, errors, strict=True
    ):
        name = ", ".join(QUESTIONS[i] for i in subset)
        print(f"{name:<32} {weight:>7.3f} {error:>6.3f} ", end="")
        print(f"{row.mean:>8.3f} {row.sd:>6.3f} {row.r_hat:>6.3f}")


def with_log_likelihood(mcmc: MCMC, order: int, every: int = 1) -> Any:
    """Returns draws for ArviZ, with the log likelihood of every single boy, or every tenth."""
    boys = PATTERNS.repeat_interleave(COUNTS.long(), 0)[::every]
    args = (order, boys, torch.ones(len(boys)))
    return ebm.to_arviz(mcmc, model=model, args=args, log_likelihood=True)


def print_comparison(runs: dict[int, MCMC], *, smoke: bool) -> None:
    """Prints fit and predictive accuracy of all orders."""
    every = 10 if smoke else 1
    data = {ORDERS[order]: with_log_likelihood(mcmc, order, every) for order, mcmc in runs.items()}
    table = az.compare(data)
    elpd = "elpd_loo" if "elpd_loo" in table else "elpd"  # ArviZ 0.x, 1.x
    print(f"\n{'nats':<12} {'weights':>7} {'deviance':>9} {'-AIC / 2':>9} {'LOO':>9} ", end="")
    print(f"{'behind':>7} {'+-':>5}")
    for order, name in ORDERS.items():
        expected = iterative_proportional_fit(order)
        size, row = len(subsets(order)), table.loc[name]
        log_likelihood = float(COUNTS @ (expected / expected.sum()).log())
        print(f"{name:<12} {size:>7} {deviance(COUNTS, expected):>9.2f} ", end="")
        print(f"{log_likelihood - size:>9.1f} {row[elpd]:>9.1f} ", end="")
        print(f"{row['elpd_diff']:>7.1f} {row['dse']:>5.1f}")


def new_tables(probability: Tensor) -> Tensor:
    """Returns a table of as many new boys for every draw, ``(S, 16)``."""
    return dist.Multinomial(int(COUNTS.sum()), probability).sample()


def print_check(order: int, probability: Tensor, tables: Tensor) -> None:
    """Prints how often new tables are farther from the model than the one observed."""
    expected = COUNTS.sum() * probability
    farther = (deviance(tables, expected) >= deviance(COUNTS, expected)).double().mean()
    low, high = ((side(tables, COUNTS)).double().mean(0) for side in (torch.le, torch.ge))
    outside = int((torch.minimum(low, high) < 0.025).sum())
    print(
        f"{ORDERS[order]:<12} new tables farther from the law than the boys': {farther:.3f}; ",
        end="",
    )
    print(f"counts outside the middle 95 %: {outside} of 16")


# --- the figure


def draw_tables(ax: Axes, tables: dict[int, Tensor]) -> None:
    """Draws intervals of new counts beside those observed."""
    at = torch.arange(16)
    levels = torch.tensor([0.025, 0.975], dtype=torch.float64)
    for shift, color, (order, counts) in zip((-0.2, 0.2), PALETTE, tables.items(), strict=False):
        low, high = torch.quantile(counts, levels, dim=0)
        ax.vlines(at + shift, low, high, color=color, linewidth=5, label=f"new, {ORDERS[order]}")
    ax.plot(at, COUNTS, "k_", markersize=14, label="observed")
    names = ["".join("+" if x > 0 else "−" for x in pattern) for pattern in PATTERNS]
    ax.set_xticks(at, names, rotation=90, family="monospace")
    ax.set(ylabel="boys", title="posterior predictive, 95 %")
    ax.set(xlabel="member, attitude, member later, attitude later")
    ax.legend()


def draw_weights(ax: Axes, mcmc: MCMC) -> None:
    """Draws posterior and maximum likelihood of the pairwise weights."""
    draws = mcmc.get_samples()["weights"].flatten(0, 1)
    weights, errors = maximum_likelihood(2)
    at = torch.arange(len(weights))
    ax.errorbar(
        draws.mean(0), at + 0.15, xerr=2 * draws.std(0), fmt="o", color=PALETTE[0], label="HMC"
    )
    ax.errorbar(
        weights, at - 0.15, xerr=2 * errors, fmt="o", color=PALETTE[1], label="maximum likelihood"
    )
    ax.set_yticks(at, [", ".join(QUESTIONS[i] for i in subset) for subset in subsets(2)])
    ax.axvline(0.0, color="black", linestyle=":")
    ax.set(xlabel="weight, two standard deviations", title="pairwise model")
    ax.legend()


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/maximum_entropy"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Samples all orders, compares, checks and draws them."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    runs = {order: sample_posterior(order, smoke=args.smoke) for order in ORDERS}
    print_weights(runs[2])
    print_comparison(runs, smoke=args.smoke)

    print()
    tables = {}
    for order in (1, 2):
        draws = runs[order].get_samples(group_by_chain=False)["weights"]
        probability = probabilities(draws, order)
        tables[order] = new_tables(probability)
        print_check(order, probability, tables[order])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    draw_tables(axes[0], tables)
    draw_weights(axes[1], runs[2])
    figure.savefig(args.out / "maximum_entropy.png", dpi=130)
    with_log_likelihood(runs[2], 2).to_netcdf(args.out / "draws.nc")
    print(f"\nfigure: {args.out / 'maximum_entropy.png'}")
    print(f"draws for ArviZ: {args.out / 'draws.nc'}")


if __name__ == "__main__":
    main()
