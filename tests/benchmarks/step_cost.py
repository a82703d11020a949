"""What a step of a sampler or of a training costs over the bare minimum, beside two libraries.

*Samplers.* Four settings: Langevin and HMC (ten leapfrog steps), on a network in 16 dimensions with
256 chains and on cheap energies in 2 dimensions with 1000 chains. *bare* is the processor time of
one gradient of the energy by autograd and nothing else; the other columns are the time of a step
divided by that of its gradients.

*Training.* A network 16-128-128-1 on batches of 256 rows. *hand* is the time of a step of the same
objective, written in torch with Adam and nothing else; the other columns are divided by it. *stock*
is that loss as a factor of a model under Pyro's ``SVI`` and ``Trace_ELBO``, *svi* the objective of
this package there, with Pyro's validation off or on, or with ``Captured`` around it and validation
off, and *own* what these take longer than the former, validation off: our share of a step.

All are medians over blocks that alternate between the columns, on one thread. Libraries that are
not installed, or do not have an objective, are left out (``make bench`` installs them).

    python tests/benchmarks/step_cost.py [--blocks 15] [--only training]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peers import training_steps
from torch import Tensor

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.mcmc import HMC, ULA
from pyro_ebm.mcmc.targets.captured import CapturedPotential

LEAPFROGS = 10
STEP = 0.01
Energy = Callable[[Tensor], Tensor]
SHARES = {"own": "svi, off", "own, capt": "svi, capt"}  # what they take longer than stock SVI


@dataclass(frozen=True)
class Setting:
    """One row: an energy, a number of chains, and which sampler."""

    name: str
    energy: Energy
    num_chains: int
    dim: int
    is_hmc: bool

    @property
    def num_gradients(self) -> int:
        """Gradients that one step needs."""
        return LEAPFROGS if self.is_hmc else 1


def settings() -> list[Setting]:
    """Returns the four rows."""
    network = MLPEnergy((16,), (64, 64, 64), confinement=1.0)
    angle = torch.arange(8) * math.pi / 4
    centres = 2.0 * torch.stack([angle.cos(), angle.sin()], 1)

    def mixture(x: Tensor) -> Tensor:
        return -torch.logsumexp(-8.0 * (x[..., None, :] - centres).square().sum(-1), -1)

    def wells(x: Tensor) -> Tensor:
        return (x.square() - 1.0).square().sum(-1)

    return [
        Setting("Langevin, network, 256 x 16", network, 256, 16, False),
        Setting("Langevin, 8 Gaussians, 1000 x 2", mixture, 1000, 2, False),
        Setting("HMC, network, 256 x 16", network, 256, 16, True),
        Setting("HMC, double well, 1000 x 2", wells, 1000, 2, True),
    ]


def bare(setting: Setting, x: Tensor) -> Callable[[], object]:
    """Returns one gradient and nothing else."""

    def gradient() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(setting.energy(leaf).sum(), leaf)[0]

    return gradient


def ours(setting: Setting, x: Tensor) -> Callable[[], object]:
    """Returns one step of this package's kernel."""
    law = EnergyDistribution(setting.energy, event_shape=(setting.dim,))
    length = LEAPFROGS * STEP
    kernel = (
        HMC(law, step_size=STEP, trajectory_length=length * 0.999, jitter=False)
        if setting.is_hmc
        else ULA(law, step_size=STEP)
    )
    potential = CapturedPotential(kernel.bind())
    state = kernel.init(potential, x)
    return lambda: kernel.step(potential, state)


def ebmkit(setting: Setting, x: Tensor) -> Callable[[], object]:
    """Returns one step of ebmkit."""
    library: Any = importlib.import_module("ebm")
    if setting.is_hmc:
        sampler = library.HMC(step_size=STEP, leapfrog_steps=LEAPFROGS, steps=1)
    else:
        sampler = library.LangevinDynamics(step_size=STEP**2 / 2, steps=1)
    return lambda: sampler.step(setting.energy, x)


def torchebm(setting: Setting, x: Tensor) -> Callable[[], object]:
    """Returns one step of torchebm."""
    core: Any = importlib.import_module("torchebm.core")
    samplers: Any = importlib.import_module("torchebm.samplers")

    class Model(core.BaseModel):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return setting.energy(x)

    if setting.is_hmc:
        sampler = samplers.HamiltonianMonteCarlo(Model(), STEP, LEAPFROGS)
    else:
        sampler = samplers.LangevinDynamics(Model(), STEP**2 / 2)
    return lambda: sampler.sample(x=x, n_steps=1)


def available() -> dict[str, Callable[[Setting, Tensor], Callable[[], object]]]:
    """Returns the samplers that can be run here."""
    found: dict[str, Any] = {"pyro_ebm": ours}
    for name, module, make in (("ebmkit", "ebm", ebmkit), ("torchebm", "torchebm", torchebm)):
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        found[name] = make
    return found


def seconds(call: Callable[[], object], num_calls: int) -> float:
    """Returns this thread's processor time per call."""
    start = time.thread_time()
    for _ in range(num_calls):
        call()
    return (time.thread_time() - start) / num_calls


def measure(setting: Setting, blocks: int) -> dict[str, float]:
    """Returns seconds of a bare gradient, and every sampler's step over its gradients."""
    x = torch.randn(setting.num_chains, setting.dim)
    steps = {name: make(setting, x) for name, make in available().items()}
    gradient, calls = bare(setting, x), 200 // setting.num_gradients
    times: dict[str, list[float]] = {name: [] for name in ("bare", *steps)}
    for _ in range(blocks):
        times["bare"].append(seconds(gradient, 200))
        for name, step in steps.items():
            times[name].append(seconds(step, calls) / setting.num_gradients / times["bare"][-1])
    return {name: float(torch.tensor(values).median()) for name, values in times.items()}


def training_columns(name: str, x: Tensor, *, compiles: bool) -> dict[str, Callable[[], object]]:
    """Returns the steps of one objective that can be run here, the loop by hand first."""
    steps: dict[str, Callable[[], object] | None] = {
        "hand": training_steps.by_hand(name, x),
        "module": training_steps.by_module(name, x),
        "fit": training_steps.by_fit(name, x),
        "stock": training_steps.by_stock_svi(name, x),
        "svi, off": training_steps.by_svi(name, x, validated=False),
        "svi, on": training_steps.by_svi(name, x, validated=True),
    }
    family = training_steps.FAMILIES[name]
    is_replayable = family.ours().is_replayable
    if is_replayable:
        steps["capture"] = training_steps.by_fit(name, x, capture=True)
        steps["svi, capt"] = training_steps.by_svi(name, x, validated=False, captured=True)
    if compiles and is_replayable:
        steps["compile"] = training_steps.by_fit(name, x, compile=True)
    if compiles and not family.is_differentiated_twice:  # which torch refuses
        steps["hand, comp"] = training_steps.by_hand(name, x, compiled=True)
    for label, module, make in (
        ("ebmkit", "ebm", training_steps.by_ebmkit),
        ("torchebm", "torchebm", training_steps.by_torchebm),
    ):
        if importlib.util.find_spec(module) is not None:
            steps[label] = make(name, x)
    return {label: step for label, step in steps.items() if step is not None}


def measure_training(name: str, blocks: int, *, compiles: bool) -> dict[str, float]:
    """Returns seconds of the step by hand, and all others over it."""
    steps = training_columns(name, torch.randn(256, 16), compiles=compiles)
    for step in steps.values():
        seconds(step, 20)  # graphs are recorded, and compiled, in the first steps
    calls = 2 if name.startswith("score") else 10
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(blocks):
        for label, step in steps.items():
            times[label].append(seconds(step, calls))
    hand = torch.tensor(times["hand"])
    ratios = {k: float((torch.tensor(v) / hand).median()) for k, v in times.items()}
    stock = torch.tensor(times["stock"])
    shares = {
        own: float((torch.tensor(times[label]) / stock).median()) - 1.0
        for own, label in SHARES.items()
        if label in times
    }
    return {**ratios, **shares, "hand": float(hand.median())}


def print_samplers(blocks: int) -> None:
    """Prints the table of samplers."""
    names = list(available())
    print(f"{'step / bare gradients':32s} {'bare, us':>9s} " + " ".join(f"{n:>9s}" for n in names))
    for setting in settings():
        found = measure(setting, blocks)
        ratios = " ".join(f"{found[n]:9.2f}" for n in names)
        print(f"{setting.name:32s} {1e6 * found['bare']:9.0f} {ratios}")


COLUMNS = ("module", "fit", "capture", "compile", "stock", "svi, off", "svi, on", "svi, capt")
OTHERS = ("hand, comp", "ebmkit", "torchebm")


def print_training(blocks: int, part: str, *, compiles: bool) -> None:
    """Prints the table of training steps."""
    labels = (*COLUMNS, *SHARES, *OTHERS)
    print(
        f"{'training step / by hand':24s} {'hand, us':>9s} " + " ".join(f"{n:>10s}" for n in labels)
    )
    for name in (name for name in training_steps.FAMILIES if part in name):
        found = measure_training(name, blocks, compiles=compiles)
        ratios = " ".join(f"{found[n]:10.2f}" if n in found else f"{'-':>10s}" for n in labels)
        print(f"{name:24s} {1e6 * found['hand']:9.0f} {ratios}", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--only", choices=("samplers", "training"))
    parser.add_argument("--objective", default="", help="only those with this in their name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.only != "training":
        print_samplers(args.blocks)
    if args.only != "samplers":
        print_training(args.blocks, args.objective, compiles=shutil.which("g++") is not None)


if __name__ == "__main__":
    main()
