r"""A regression whose noise splits in two, by every objective that may learn it.

The law of y given x is an energy, of r = y - a x,

    U(y | x) = r^4 / 4 - (w0 + w1 x) r^2 / 2 - b x r,

which has one mode where w0 + w1 x is negative and two where it is large, the upper one likelier as
b x grows. Its log Z is an integral that differs from x to x. In one dimension quadrature knows it,
which gives a likelihood to compare with.

1. *log Z cancels*: ranking NCE, energy discrepancy, score matching.
2. *log Z(x) is learned*: NCE and KALE with a small network c(x) for it, `log_normalizer=`.
3. *One log Z for all x*: NCE refuses. Told that the energy is not conditional, it learns another
   law.

For every objective the table has the estimates, the nats per observation by which its law is worse
than the true one (a Kullback-Leibler divergence, by quadrature), and how far c(x) is from log Z(x).

Run it; the figure goes to results/conditional_regression::

    python examples/conditional_regression.py           # twenty seconds
    python examples/conditional_regression.py --smoke   # a few seconds, too few steps to trust
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from matplotlib.axes import Axes
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_ebm as ebm
from pyro_ebm.infer import KALE, NCE, EnergyDiscrepancy, RankingNCE, ScoreMatching
from pyro_ebm.plots import PALETTE

TRUTH = {"a": 0.8, "w0": 1.0, "w1": 1.5, "b": 0.2}
GRID = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64)
NODES = GRID[::2]  # on analytic functions the trapezoidal rule needs no more
SHOWN = torch.linspace(-2.0, 2.0, 81, dtype=torch.float64)
NOISE = dist.Normal(torch.zeros((), dtype=torch.float64), 2.2)


class Energy(nn.Module):
    """U(y | x) with its four parameters."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns U for every pair, in nats."""
        a, w0, w1, b = self.theta
        r = y - a * x
        return 0.25 * r**4 - 0.5 * (w0 + w1 * x) * r**2 - b * x * r

    def log_z(self, x: Tensor) -> Tensor:
        """Returns log Z(x) by the trapezoidal rule."""
        return torch.logsumexp(-self(x[:, None], NODES), -1) + (NODES[1] - NODES[0]).log()

    def log_densities(self, x: Tensor) -> Tensor:
        """Returns log p(y | x) on the grid, ``(len(x), len(GRID))``."""
        return -self(x[:, None], GRID) - self.log_z(x)[:, None]


def true_energy() -> Energy:
    """The energy that the data are drawn from."""
    energy = Energy(torch.tensor(list(TRUTH.values()), dtype=torch.float64))
    return energy.requires_grad_(requires_grad=False)


def simulate(num_rows: int) -> tuple[Tensor, Tensor]:
    """Draws x uniformly and y from the energy: a cell of the grid, and a place in it."""
    x = 4 * torch.rand(num_rows, dtype=torch.float64) - 2
    cell = dist.Categorical(logits=true_energy().log_densities(x)).sample()
    return x, GRID[cell] + (GRID[1] - GRID[0]) * (torch.rand_like(x) - 0.5)


# --- the model, and what learns it


class Regression(nn.Module):
    """A Pyro model of y given x; ``log_z`` says what is known of log Z."""

    def __init__(self, log_z: str) -> None:
        super().__init__()
        self.energy = Energy(torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64))
        self.c = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        self.known = {
            "by quadrature": self.energy.log_z,
            "learned": lambda x: self.c(x[:, None])[:, 0],
        }.get(log_z)
        self.conditional = False if log_z == "one for all" else None

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Observes y."""
        pyro.module("regression", self)
        known = self.known
        law = ebm.EnergyDistribution(
            lambda y: self.energy(x, y),
            event_shape=(),
            log_normalizer=None if known is None else lambda: known(x),
            conditional=self.conditional,
        )
        with pyro.plate("data", len(x)):
            pyro.sample("y", law, obs=y)


def noise(x: Tensor, y: Tensor) -> None:
    """The guide holds the noise."""
    with pyro.plate("data", len(x)):
        pyro.sample("y", NOISE)


@dataclass(frozen=True)
class Method:
    """An objective, and what its model knows of log Z."""

    objective: Callable[[], Trace_ELBO]
    log_z: str = "none"
    guide: Callable[..., Any] | None = None


METHODS = {
    "exact likelihood": Method(Trace_ELBO, "by quadrature"),
    "ranking NCE": Method(lambda: RankingNCE(num_noise=10), guide=noise),
    "energy discrepancy": Method(lambda: EnergyDiscrepancy(time=1.0, num_negatives=10)),
    "score matching": Method(ScoreMatching),
    "NCE with c(x)": Method(lambda: NCE(num_noise=10), "learned", noise),
    "KALE with c(x)": Method(lambda: KALE(num_base=10_000), "learned", noise),
    "NCE with one c": Method(lambda: NCE(num_noise=10), "one for all", noise),
}


@dataclass(frozen=True)
class Result:
    """A fitted model and what it took."""

    model: Regression
    log_z: Tensor | None
    seconds: float

    @torch.no_grad()
    def nats_lost(self) -> float:
        """The divergence from the truth, averaged over x."""
        log_p, log_q = true_energy().log_densities(SHOWN), self.model.energy.log_densities(SHOWN)
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean() * (GRID[1] - GRID[0]))

    @torch.no_grad()
    def off(self) -> float | None:
        """The largest error of the learned log Z, relative to that of the learned energy."""
        if self.log_z is None:
            return None
        return float((self.log_z - self.model.energy.log_z(SHOWN)).abs().max())


def learn(method: Method, data: tuple[Tensor, Tensor], num_steps: int, seed: int) -> Result:
    """Fits one model and keeps the average of its last steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, objective = Regression(method.log_z), method.objective()
    started = time.perf_counter()
    for lr, share in ((0.03, 2), (0.005, 1)):
        result = ebm.fit(
            model,
            data,
            objective,
            guide=method.guide,
            lr=lr,
            batch_size=1000,
            num_steps=share * num_steps // 3,
            ema=0.99,
            disable_progbar=True,
        )
    result.use_average()
    seconds = time.perf_counter() - started
    return Result(model, learned_log_z(method, model, objective), seconds)


@torch.no_grad()
def learned_log_z(method: Method, model: Regression, objective: Any) -> Tensor | None:
    """Returns log Z at the places shown, where it was learned."""
    if method.log_z == "one for all":
        return objective.log_normalizer("y").value.expand(SHOWN.shape)
    return model.known(SHOWN) if method.log_z == "learned" and model.known else None


def print_refusal(data: tuple[Tensor, Tensor]) -> None:
    """Prints what NCE says of a conditional energy without a log Z of its own."""
    model = Regression("none")
    with torch.no_grad():
        model.energy.theta.copy_(true_energy().theta)
    try:
        NCE().differentiable_loss(model, noise, *data)
    except ValueError as error:
        sentence = next(line for line in str(error).splitlines() if "EBM site" in line)
        print(f"NCE without c(x): {sentence}\n")


def print_table(results: dict[str, Result]) -> None:
    """Prints a row for every objective."""
    names = "".join(f"{name:>8}" for name in TRUTH)
    print(f"{'':<20}{names}{'nats lost':>11}{'c off':>8}")
    print(f"{'truth':<20}" + "".join(f"{value:>8.3f}" for value in TRUTH.values()))
    for name, result in results.items():
        cells = "".join(f"{value:>8.3f}" for value in result.model.energy.theta.tolist())
        off = result.off()
        shown = f"{off:>8.3f}" if off is not None else f"{'':>8}"
        print(f"{name:<20}{cells}{result.nats_lost():>11.5f}{shown}")
    took = ", ".join(f"{result.seconds:.1f} ({name})" for name, result in results.items())
    print(f"seconds of training: {took}")


# --- the figure


def draw_data(ax: Axes, data: tuple[Tensor, Tensor]) -> None:
    """Draws the true density and some of the data."""
    density = true_energy().log_densities(SHOWN).exp()
    ax.pcolormesh(SHOWN, GRID, density.T, rasterized=True)
    ax.plot(*(values[:400] for values in data), ".", color="white", ms=2, alpha=0.6)
    ax.set(xlabel="x", ylabel="y", ylim=(-4.5, 5.5), title="p(y | x), and 400 of the data")


def draw_slices(ax: Axes, results: dict[str, Result]) -> None:
    """Draws the laws of y at three places."""
    places = torch.tensor([-1.5, 0.5, 1.8], dtype=torch.float64)
    shift = torch.arange(3)[:, None]
    ax.set_yticks(shift[:, 0], [f"x = {x:.1f}" for x in places])
    for level, density in zip(shift, true_energy().log_densities(places).exp(), strict=True):
        ax.fill_between(GRID, level, level + density, color="lightgray")
    for k, (name, result) in enumerate(results.items()):
        density = result.model.energy.log_densities(places).detach().exp()
        style = "--" if name == "NCE with one c" else "-"
        ax.plot(GRID, (shift + density).T, style, color=PALETTE[k], lw=1.2)
        ax.plot([], [], style, color=PALETTE[k], label=name)
    ax.set(xlabel="y", xlim=(-4.5, 5.5), title="p(y | x) at three x; gray is the truth")
    ax.set_ylim(top=4.0)
    ax.legend(fontsize="small", loc="upper left", ncols=2)


def draw_log_z(ax: Axes, results: dict[str, Result]) -> None:
    """Draws what was learned of log Z."""
    ax.plot(SHOWN, true_energy().log_z(SHOWN), color="lightgray", lw=6, label="log Z(x)")
    for k, (name, result) in enumerate(results.items()):
        if result.log_z is not None:
            style = "--" if name == "NCE with one c" else "-"
            ax.plot(SHOWN, result.log_z, style, color=PALETTE[k], label=name)
    ax.set(xlabel="x", ylabel="nats", title="log Z, learned")
    ax.legend(fontsize="small")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/conditional_regression"))
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    return parser.parse_args()


def main() -> None:
    """Learns, prints and draws."""
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pyro.set_rng_seed(args.seed)
    data = simulate(2000 if args.smoke else 20_000)
    print_refusal(tuple(values[:100] for values in data))
    num_steps = 30 if args.smoke else 600
    results = {n: learn(method, data, num_steps, args.seed) for n, method in METHODS.items()}
    print_table(results)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    draw_data(axes[0], data)
    draw_slices(axes[1], results)
    draw_log_z(axes[2], results)
    figure.savefig(args.out / "conditional_regression.png", dpi=130)
    print(f"\nfigure: {args.out / 'conditional_regression.png'}")


if __name__ == "__main__":
    main()
