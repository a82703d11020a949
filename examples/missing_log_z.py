r"""The trap of a missing log Z: perfect diagnostics, wrong answer.

Fifty points come from p(x | theta) = exp(-theta x^2 / 2) / Z(theta) at theta = 3; theta has a
Gamma(2, 1) prior. The normalizer is Z(theta) = (2 pi / theta)^(1/2), so with S = sum of x^2 / 2

    theta | x ~ Gamma(27, 1 + S)    is the posterior,
    theta | x ~ Gamma( 2, 1 + S)    is what is left if log Z is forgotten.

NUTS samples the second as happily as the first, and no diagnostic of a sampler can tell which one
was meant. A sample site can: it knows that its density is unnormalized, and raises before a draw.

Run it; the figure goes to results/missing_log_z::

    python examples/missing_log_z.py            # under a minute
    python examples/missing_log_z.py --smoke    # a few seconds, few draws
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from torch import Tensor

import pyro_ebm as ebm
from pyro_ebm.mcmc import RecordingNUTS
from pyro_ebm.plots import PALETTE

# On a machine with few cores Pyro runs the chains one after the other, and says so every time.
warnings.filterwarnings("ignore", "num_chains=")

TRUE_THETA = 3.0
Model = Callable[[Tensor], None]


def plain_pyro(x: Tensor) -> None:
    """What one writes in any probabilistic language: the unnormalized log density as a factor."""
    theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
    pyro.factor("x", -(0.5 * theta * x**2).sum())


def without_log_z(x: Tensor) -> None:
    """The same density as a sample site, which says that x is what is distributed."""
    theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        p = ebm.EnergyDistribution(lambda x: 0.5 * theta * x**2, event_shape=())
        pyro.sample("x", p, obs=x)


def with_log_z(x: Tensor) -> None:
    """The same site with its log Z as a function of theta."""
    theta = pyro.sample("theta", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        p = ebm.EnergyDistribution(
            lambda x: 0.5 * theta * x**2,
            event_shape=(),
            log_normalizer=lambda: 0.5 * torch.log(2 * math.pi / theta),
        )
        pyro.sample("x", p, obs=x)


def run_nuts(model: Model, x: Tensor, args: argparse.Namespace) -> MCMC:
    """Runs four chains; the same seed for every model."""
    pyro.set_rng_seed(args.seed)
    mcmc = MCMC(
        RecordingNUTS(model),
        num_samples=50 if args.smoke else 600,
        warmup_steps=75 if args.smoke else 200,
        num_chains=4,
        disable_progbar=args.smoke,
    )
    mcmc.run(x)
    return mcmc


def print_row(name: str, mean: float, sd: float, mcmc: MCMC | None = None) -> None:
    """Prints one line of the table; the exact rows have no sampler to diagnose."""
    line = f"{name:<36} {mean:>6.3f} {sd:>6.3f}"
    if mcmc is not None:
        found = ebm.diagnose(mcmc)
        line += (
            f" {found.rhat.value:>7.3f} {found.num_divergences:>7d} {found.ess_bulk.value:>6.0f}"
        )
    print(line)


def print_nuts(name: str, mcmc: MCMC) -> None:
    """Prints mean, standard deviation and diagnostics of a run."""
    theta = mcmc.get_samples()["theta"]
    print_row(name, float(theta.mean()), float(theta.std()), mcmc)


def print_exact(name: str, posterior: dist.Gamma) -> None:
    """Prints the closed form."""
    print_row(name, float(posterior.mean), float(posterior.stddev))


def draw_figure(path: Path, runs: dict[str, tuple[dist.Gamma, MCMC]]) -> None:
    """Draws what NUTS returned over the closed forms, with the true value."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for color, (name, (exact, mcmc)) in zip(PALETTE[1::-1], runs.items(), strict=True):
        theta = torch.linspace(1e-3, float(exact.mean + 5 * exact.stddev), 400)
        draws = mcmc.get_samples()["theta"]
        ax.hist(draws, 40, density=True, color=color, alpha=0.3, label=f"NUTS {name}")
        ax.plot(theta, exact.log_prob(theta).exp(), color=color, label=f"closed form {name}")
    ax.axvline(TRUE_THETA, color="black", linestyle="--", label=r"$\theta$ of the data")
    ax.set(xlabel=r"$\theta$", ylabel="posterior density", xlim=(0.0, None))
    ax.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/missing_log_z"))
    parser.add_argument("--smoke", action="store_true", help="a few seconds, few draws")
    return parser.parse_args()


def main() -> None:
    """Runs the four models, prints them beside the closed forms and draws them."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    x = torch.randn(50) / math.sqrt(TRUE_THETA)
    s = 0.5 * float(x.square().sum())
    wrong, right = dist.Gamma(2.0, 1.0 + s), dist.Gamma(27.0, 1.0 + s)

    plain, known = run_nuts(plain_pyro, x, args), run_nuts(with_log_z, x, args)

    print(f"{'':<36} {'mean':>6} {'sd':>6} {'R-hat':>7} {'diverg.':>7} {'ESS':>6}")
    print_nuts("plain Pyro, pyro.factor", plain)
    print_exact("  what it samples: Gamma(2, 1+S)", wrong)
    print_nuts("EnergyDistribution with log Z(theta)", known)
    print_exact("  the posterior: Gamma(27, 1+S)", right)

    try:
        run_nuts(without_log_z, x, args)
    except ebm.MissingNormalizerError as error:
        print(f"\nEnergyDistribution without log Z:\nMissingNormalizerError: {error}")
    draw_figure(
        args.out / "posterior.png", {"without log Z": (wrong, plain), "with log Z": (right, known)}
    )
    print(f"\nfigure: {args.out / 'posterior.png'}")


if __name__ == "__main__":
    main()
