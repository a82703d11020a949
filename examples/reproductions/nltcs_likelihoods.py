"""Exact test log-likelihoods of binary energies learned with and without log Z: one table.

    python examples/reproductions/nltcs_likelihoods.py --data nltcs.npz --seeds 5

NLTCS (National Long Term Care Survey: 16 yes/no questions, 16 181 / 2 157 / 3 236 rows) is part of
the density-estimation benchmark that probabilistic circuits are compared on. With 65 536 states
log Z is a sum, so that every objective of the library can be judged by the likelihood it reaches
with the same energy. ``--data`` is an ``.npz`` with arrays ``train``, ``valid`` and ``test`` of 0
and 1; the sets are in the public collection DEBD ("nltcs.*.data").

Energies: a pairwise Boltzmann machine, and the free energies of restricted Boltzmann machines with
16 and 32 hidden units. Settings (learning rates, steps) were chosen on the validation rows.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

import pyro_ebm as ebm
from pyro_ebm.infer import (
    NCE,
    DiscreteEnergyDiscrepancy,
    DiscreteFisher,
    MinimumProbabilityFlow,
    PersistentContrastiveDivergence,
    PseudoLikelihood,
    RatioMatching,
    fit,
)
from pyro_ebm.infer.site_perturbations import BernoulliFlips

SUPPORT = constraints.independent(constraints.boolean, 1)


class Pairwise(nn.Module):
    """E(x) = -b'x - x'Wx / 2 with a symmetric W without a diagonal."""

    def __init__(self, marginals: Tensor) -> None:
        super().__init__()
        num = len(marginals)
        self.bias = nn.Parameter(torch.logit(marginals))
        self.weight = nn.Parameter(torch.zeros(num * (num - 1) // 2))
        self.register_buffer("pairs", torch.triu_indices(num, num, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns E in nats, ``rows``."""
        upper = x.new_zeros(len(self.bias), len(self.bias))
        upper = upper.index_put(tuple(self.pairs), self.weight.to(x))
        return -x @ self.bias - ((x @ upper) * x).sum(-1)


class FreeEnergy(nn.Module):
    """F(v) = -b'v - sum_j softplus(c_j + v'W_j): the hidden units of an RBM summed out."""

    def __init__(self, marginals: Tensor, num_hidden: int) -> None:
        super().__init__()
        self.visible = nn.Parameter(torch.logit(marginals))
        self.hidden = nn.Linear(len(marginals), num_hidden)
        nn.init.normal_(self.hidden.weight, std=0.1)
        nn.init.zeros_(self.hidden.bias)

    def forward(self, v: Tensor) -> Tensor:
        """Returns F in nats, ``rows``."""
        return -v @ self.visible - softplus(self.hidden(v)).sum(-1)

    def block_gibbs(self, law: ebm.EnergyDistribution, v: Tensor) -> Tensor:
        """One sweep: all hidden units given the visible ones, and back."""
        h = torch.bernoulli(self.hidden(v).sigmoid())
        return torch.bernoulli((self.visible + h @ self.hidden.weight).sigmoid())


ENERGIES: dict[str, Callable[[Tensor], nn.Module]] = {
    "pairwise": Pairwise,
    "RBM 16": partial(FreeEnergy, num_hidden=16),
    "RBM 32": partial(FreeEnergy, num_hidden=32),
}


# --- the exact answer


def all_states(num: int) -> Tensor:
    """Returns all binary vectors, ``(2^num, num)``."""
    return (torch.arange(2**num)[:, None] >> torch.arange(num) & 1).to(torch.float32)


def log_likelihood(energy: nn.Module, x: Tensor, states: Tensor) -> Tensor:
    """Returns the mean log-likelihood of the rows in nats, differentiable."""
    return -energy(x).mean() - torch.logsumexp(-energy(states).double(), 0)


def maximize(energy: nn.Module, rows: dict[str, Tensor], states: Tensor, rounds: int) -> None:
    """Maximum likelihood by L-BFGS; keeps the parameters that the validation rows like best."""
    optimizer = torch.optim.LBFGS(
        energy.parameters(), max_iter=20, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -log_likelihood(energy, rows["train"], states)
        loss.backward()
        return loss

    best, kept = -float("inf"), {}
    for _ in range(rounds):
        optimizer.step(closure)
        with torch.no_grad():
            value = float(log_likelihood(energy, rows["valid"], states))
        if value > best:
            best, kept = value, {k: v.clone() for k, v in energy.state_dict().items()}
    energy.load_state_dict(kept)


# --- learning without log Z


def mixture_of_products(x: Tensor, num: int, steps: int = 200) -> dist.Distribution:
    """Returns a mixture of independent Bernoullis fitted by EM: noise with a density."""
    probs = (0.25 + 0.5 * torch.rand(num, x.shape[1])).to(x)
    weights = x.new_full((num,), 1 / num)

    def law() -> dist.Distribution:
        parts = dist.Bernoulli(probs, validate_args=False).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(weights), parts)

    for _ in range(steps):
        parts = law()
        joint = parts.component_distribution.log_prob(x[:, None]) + weights.log()
        share = joint.softmax(-1)
        weights = share.mean(0).clamp_min(1e-4)
        weights = weights / weights.sum()
        probs = ((share.T @ x + 1) / (share.sum(0)[:, None] + 2)).clamp(1e-3, 1 - 1e-3)
    return law()


class Settings(NamedTuple):
    """How objectives are run; chosen on the validation rows."""

    num_steps: int
    scale_lr: float
    flip_rate: float
    num_sweeps: int


def objectives(
    energy: nn.Module, x: Tensor, settings: Settings
) -> dict[str, tuple[Callable[[], object], float]]:
    """Returns makers of objectives with a learning rate each."""
    independent = dist.Bernoulli(x.mean(0), validate_args=False).to_event(1)
    sweep = {"transition": energy.block_gibbs} if hasattr(energy, "block_gibbs") else {}
    return {
        "pseudo-likelihood": (PseudoLikelihood, 0.01),
        "ratio matching": (RatioMatching, 0.01),
        "discrete Fisher": (DiscreteFisher, 0.003),
        "minimum probability flow": (MinimumProbabilityFlow, 0.01),
        "energy discrepancy": (
            partial(DiscreteEnergyDiscrepancy, BernoulliFlips(settings.flip_rate), 32),
            0.01,
        ),
        "NCE, independent noise": (partial(NCE, num_noise=32, noise=independent), 0.01),
        "NCE, mixture noise": (lambda: NCE(num_noise=32, noise=mixture_of_products(x, 12)), 0.01),
        "PCD": (partial(PersistentContrastiveDivergence, settings.num_sweeps, **sweep), 0.01),
    }


def learn(energy: nn.Module, rows: dict[str, Tensor], name: str, settings: Settings) -> None:
    """Trains an energy with an objective, the learning rate falling to nothing."""
    make, lr = objectives(energy, rows["train"], settings)[name]

    def model(x: Tensor) -> None:
        pyro.module("energy", energy)
        law = ebm.EnergyDistribution(energy, support=SUPPORT, event_shape=(x.shape[-1],))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", law, obs=x)

    falling = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=settings.num_steps)
    fit(
        model,
        rows["train"],
        make(),
        lr=lr * settings.scale_lr,
        lr_schedule=falling,
        batch_size=min(500, len(rows["train"])),
        num_steps=settings.num_steps,
        disable_progbar=True,
    )


# --- the table


def load(path: Path, device: str, *, smoke: bool) -> dict[str, Tensor]:
    """Returns the three sets as ``(rows, 16)``."""
    if not path.exists():
        sys.exit(f"{path} is not there: see the head of this script for where NLTCS is kept")
    arrays = np.load(path)
    rows = {k: torch.tensor(arrays[k], dtype=torch.float32) for k in ("train", "valid", "test")}
    if smoke:
        rows = {name: x[:1000, :8] for name, x in rows.items()}
    return {name: x.to(device) for name, x in rows.items()}


def evaluate(energy: nn.Module, rows: dict[str, Tensor], states: Tensor) -> float:
    """Returns the mean log-likelihood of the test rows in nats."""
    with torch.no_grad():
        return float(log_likelihood(energy, rows["test"], states))


class Table:
    """Lines that are printed as they come and saved at the end."""

    def __init__(self) -> None:
        self.lines = ["energy,learned_by,test_nats,behind"]
        print(f"{'energy':10s} {'learned by':26s} {'test nats':>9s}  behind exact, seed by seed")

    def add(self, energy: str, name: str, nats: float, behind: Sequence[float] = ()) -> None:
        """Prints a line."""
        print(f"{energy:10s} {name:26s} {nats:9.4f}", *(f"{b:7.4f}" for b in behind), flush=True)
        self.lines.append(f"{energy},{name},{nats},{' '.join(map(str, behind))}")

    def save(self, folder: Path) -> None:
        """Writes all lines."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nltcs_likelihoods.csv").write_text("\n".join(self.lines) + "\n")


def references(rows: dict[str, Tensor], table: Table) -> None:
    """Adds what normalized models reach."""
    independent = dist.Bernoulli(rows["train"].mean(0)).to_event(1)
    mixture = mixture_of_products(rows["train"], 12)
    for name, law in {"independent": independent, "mixture of 12": mixture}.items():
        table.add("", name, float(law.log_prob(rows["test"]).mean()))


def compare(
    energy_name: str,
    rows: dict[str, Tensor],
    states: Tensor,
    options: argparse.Namespace,
    table: Table,
) -> None:
    """Adds the exact likelihood of one energy, and what every objective reaches with it."""
    marginals = rows["train"].mean(0).clamp(0.01, 0.99)

    def new() -> nn.Module:
        return ENERGIES[energy_name](marginals).to(options.device)

    pyro.set_rng_seed(0)
    exact = new()
    maximize(exact, rows, states, options.rounds)
    best = evaluate(exact, rows, states)
    table.add(energy_name, "exact likelihood", best)
    settings = Settings(options.steps, options.scale_lr, options.flip_rate, options.sweeps)
    for name in objectives(exact, rows["train"], settings):
        if not any(part in name for part in options.objectives.split(",")):
            continue
        found = []
        for seed in range(options.seed_from, options.seed_from + options.seeds):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            energy = new()
            learn(energy, rows, name, settings)
            found.append(evaluate(energy, rows, states))
        table.add(energy_name, name, float(np.mean(found)), [best - value for value in found])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("nltcs.npz"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed-from", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=30, help="of 20 L-BFGS steps")
    parser.add_argument("--flip-rate", type=float, default=0.1, help="of energy discrepancy")
    parser.add_argument("--sweeps", type=int, default=5, help="of persistent chains, every step")
    parser.add_argument("--scale-lr", type=float, default=3.0, help="factor of all learning rates")
    parser.add_argument("--energy", default="", help="only energies with this in their name")
    parser.add_argument("--objectives", default="", help="only those with one of these, by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="also write the table to this folder")
    parser.add_argument("--smoke", action="store_true", help="8 questions, 1000 rows, few steps")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.rounds, options.seeds = 20, 3, 1
    rows = load(options.data, options.device, smoke=options.smoke)
    states = all_states(rows["train"].shape[1]).to(options.device)
    pyro.set_rng_seed(0)
    table = Table()
    references(rows, table)
    for name in ENERGIES:
        if options.energy in name:
            compare(name, rows, states, options, table)
    if options.out is not None:
        table.save(options.out)


if __name__ == "__main__":
    main()
