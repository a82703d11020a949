"""One training step of a network energy, written by hand, by this package, and by two others.

Every builder returns a function that takes one step of Adam on one batch and returns the loss.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_ebm import EnergyDistribution, infer
from pyro_ebm.energies import MLPEnergy
from pyro_ebm.infer.training.fit_options import Options
from pyro_ebm.infer.training.minibatch import Batches
from pyro_ebm.infer.training.training_run import TrainingRun
from pyro_ebm.mcmc import ULA

DIM, BATCH, RATE = 16, 256, 1e-3
NUM_NOISE, NUM_NEGATIVES = 10, 16
NUM_LANGEVIN, LANGEVIN_STEP, NUM_CHAINS = 10, 0.1, 4096
NOISE_STD = 0.1
Step = Callable[[], object]
Loss = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


_numbers = itertools.count()


def new_energy() -> MLPEnergy:
    """Returns the network 16-128-128-1."""
    return MLPEnergy(DIM, (128, 128))


def standard() -> Any:
    """Returns the base of a tilt, and the noise."""
    return dist.Normal(torch.zeros(DIM), 1.0).to_event(1)


# --- by hand


def nce(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
    """Noise-contrastive estimation with standard Gaussian noise and a learned log Z."""
    points = torch.cat([x, torch.randn(NUM_NOISE * len(x), DIM)])
    log_noise = -0.5 * points.square().sum(-1) - 0.5 * DIM * math.log(2 * math.pi)
    logits = -energy(points) - log_noise - log_z - math.log(NUM_NOISE)
    data, noise = logits[: len(x)], logits[len(x) :]
    return softplus(-data).mean() + NUM_NOISE * softplus(noise).mean()


def energy_discrepancy(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
    """Gaussian energy discrepancy at t = 1."""
    noisy = x + torch.randn_like(x) + torch.randn(NUM_NEGATIVES, *x.shape)
    values = energy(torch.cat([x.unsqueeze(0), noisy]))
    differences = torch.cat([values[:1] - values[1:], torch.zeros(1, len(x))])
    return torch.logsumexp(differences, 0).mean() - math.log(NUM_NEGATIVES)


def score_matching(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
    """Half the squared score plus its divergence, by one backward pass per coordinate."""
    at = x.clone().requires_grad_()
    score = -torch.autograd.grad(energy(at).sum(), at, create_graph=True)[0]
    trace = torch.zeros(len(x))
    for i in range(DIM):
        trace = trace + torch.autograd.grad(score[:, i].sum(), at, create_graph=True)[0][:, i]
    return (0.5 * score.square().sum(-1) + trace).mean()


def kale(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
    """KALE with as many base draws as rows and log Z moved a tenth of the way to the batch's."""
    values = -energy(torch.cat([x, torch.randn_like(x)]))
    data, base = values[: len(x)], values[len(x) :]
    with torch.no_grad():
        log_z += 0.1 * (torch.logsumexp(base, 0) - math.log(len(x)) - log_z)
    return -data.mean() + log_z + (base - log_z).exp().mean() - 1.0


def slope(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The score with a graph behind it, and the leaf that it is differentiated at."""
    at = x.clone().requires_grad_()
    return -torch.autograd.grad(energy(at).sum(), at, create_graph=True)[0], at


def denoising(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
    """Denoising score matching at one level."""
    noise = torch.randn_like(x)
    score, _ = slope(energy, x + NOISE_STD * noise)
    return 0.5 * (score + noise / NOISE_STD).square().sum(-1).mean()


def sliced(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
    """Sliced score matching with one sign vector per datum and the exact squared score."""
    score, at = slope(energy, x)
    signs = torch.randint(0, 2, x.shape) * 2.0 - 1.0
    along = torch.autograd.grad((score * signs).sum(), at, create_graph=True)[0]
    return (0.5 * score.square().sum(-1) + (along * signs).sum(-1)).mean()


def langevin(energy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Ten steps of unadjusted Langevin."""
    for _ in range(NUM_LANGEVIN):
        at = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(at).sum(), at)
        x = x - 0.5 * LANGEVIN_STEP**2 * gradient + LANGEVIN_STEP * torch.randn_like(x)
    return x.detach()


def contrast(energy: Callable[[Tensor], Tensor], x: Tensor, negatives: Tensor) -> Tensor:
    """Mean energy of the data less that of the negatives."""
    values = energy(torch.cat([x, negatives]))
    return values[: len(x)].mean() - values[len(x) :].mean()


def divergence(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
    """CD-10 with Langevin steps from the data."""
    return contrast(energy, x, langevin(energy, x))


def persistent() -> Loss:
    """Returns PCD with a buffer of chains, of which a batch's worth moves at every step."""
    buffer = torch.randn(NUM_CHAINS, DIM)

    def loss(energy: Callable[[Tensor], Tensor], log_z: Tensor, x: Tensor) -> Tensor:
        slots = torch.randperm(NUM_CHAINS)[: len(x)]
        buffer[slots] = langevin(energy, buffer[slots])
        return contrast(energy, x, buffer[slots])

    return loss


class Family(NamedTuple):
    """One objective: by hand, ours, and as the others have it."""

    by_hand: Callable[[], Loss]
    ours: Callable[[], Any]
    ebmkit: Callable[[Any], Any] | None = None
    torchebm: Callable[[Any, Any], Any] | None = None
    tilts: bool = False
    learns_log_z: bool = False
    is_differentiated_twice: bool = False


def ours_moved(objective: Any, **options: int) -> Callable[[], Any]:
    """Returns the builder of one of our objectives with the same chains."""
    kernel = partial(ULA, step_size=LANGEVIN_STEP)
    return lambda: objective(NUM_LANGEVIN, kernel=kernel, **options)


def ebmkit_moved(library: Any, *, is_persistent: bool) -> Any:
    """ebmkit's contrastive divergence with the same chains."""
    sampler = library.LangevinDynamics(step_size=LANGEVIN_STEP**2 / 2, steps=NUM_LANGEVIN)
    buffer = library.ReplayBuffer(NUM_CHAINS, (DIM,), 0.0) if is_persistent else None
    return library.ContrastiveDivergence(sampler, buffer)


def torchebm_moved(losses: Any, model: Any, *, is_persistent: bool) -> Any:
    """torchebm's contrastive divergence with the same chains; its value comes first."""
    samplers: Any = importlib.import_module("torchebm.samplers")
    loss_of = losses.ContrastiveDivergence(
        model,
        samplers.LangevinDynamics(model, LANGEVIN_STEP**2 / 2),
        k_steps=NUM_LANGEVIN,
        persistent=is_persistent,
        buffer_size=NUM_CHAINS,
        new_sample_ratio=0.0,
        energy_reg_weight=0.0,
    )
    return lambda x: loss_of(x)[0]


FAMILIES = {
    "NCE, 10 noise": Family(
        lambda: nce,
        lambda: infer.NCE(NUM_NOISE, standard()),
        ebmkit=lambda library: library.NoiseContrastiveEstimation(noise_ratio=NUM_NOISE),
        learns_log_z=True,
    ),
    "energy discrepancy, 16": Family(
        lambda: energy_discrepancy,
        lambda: infer.EnergyDiscrepancy(1.0, NUM_NEGATIVES),
        ebmkit=lambda library: library.EnergyDiscrepancy(1.0, NUM_NEGATIVES),
    ),
    "score matching, exact": Family(
        lambda: score_matching,
        infer.ScoreMatching,
        ebmkit=lambda library: library.ExactScoreMatching(),
        torchebm=lambda losses, model: losses.ScoreMatching(model, hessian_method="exact"),
        is_differentiated_twice=True,
    ),
    "sliced score matching": Family(
        lambda: sliced,
        infer.SlicedScoreMatching,
        ebmkit=lambda library: library.SlicedScoreMatching(),
        torchebm=lambda losses, model: losses.SlicedScoreMatching(model, n_projections=1),
        is_differentiated_twice=True,
    ),
    "denoising": Family(
        lambda: denoising,
        lambda: infer.DenoisingScoreMatching(NOISE_STD),
        ebmkit=lambda library: library.DenoisingScoreMatching(NOISE_STD),
        torchebm=lambda losses, model: losses.DenoisingScoreMatching(model, NOISE_STD),
        is_differentiated_twice=True,
    ),
    "KALE, 256 base": Family(lambda: kale, infer.KALE, tilts=True),
    "CD, 10 Langevin": Family(
        lambda: divergence,
        ours_moved(infer.ContrastiveDivergence),
        ebmkit=partial(ebmkit_moved, is_persistent=False),
        torchebm=partial(torchebm_moved, is_persistent=False),
    ),
    "PCD, 10 Langevin": Family(
        persistent,
        ours_moved(infer.PersistentContrastiveDivergence, size=NUM_CHAINS),
        ebmkit=partial(ebmkit_moved, is_persistent=True),
        torchebm=partial(torchebm_moved, is_persistent=True),
    ),
}


def by_hand(name: str, x: Tensor, *, compiled: bool = False) -> Step:
    """Returns a loop of torch; ``compiled`` hands the energy to ``torch.compile``."""
    loss_of = FAMILIES[name].by_hand()
    module = new_energy()
    energy: Any = torch.compile(module) if compiled else module
    log_z = torch.zeros((), requires_grad=FAMILIES[name].learns_log_z)
    learned = [*module.parameters(), *([log_z] if log_z.requires_grad else [])]
    optimizer = torch.optim.Adam(learned, lr=RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(energy, log_z, x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_stock_svi(name: str, x: Tensor) -> Step:
    """Returns the step of Pyro's ``SVI`` with its own ``Trace_ELBO``: by hand, as a factor."""
    family, energy = FAMILIES[name], new_energy()
    loss_of, label = family.by_hand(), f"by hand {next(_numbers)}"
    held = torch.zeros(())

    def model(x: Tensor) -> None:
        pyro.module(label, energy)
        log_z = pyro.param(f"{label} log_z", torch.zeros(())) if family.learns_log_z else held
        pyro.factor("loss", -len(x) * loss_of(energy, log_z, x))

    return svi_step(model, Trace_ELBO(), x, validated=False)


def svi_step(model: Callable[[Tensor], None], loss: Any, x: Tensor, *, validated: bool) -> Step:
    """Returns the step of Pyro's ``SVI`` of a model without latents."""
    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": RATE}), loss=loss)

    def step() -> float:
        with pyro.validation_enabled(validated):
            return svi.step(x)

    return step


# --- by this package


def model_of(name: str) -> tuple[Callable[[Tensor], None], nn.Module]:
    """Returns a model in Pyro and its network."""
    energy, tilts = new_energy(), FAMILIES[name].tilts
    label = f"energy {next(_numbers)}"  # the parameter store is one for all

    def model(x: Tensor) -> None:
        pyro.module(label, energy)
        with pyro.plate("data", len(x)):
            shape = None if tilts else (DIM,)
            law = EnergyDistribution(
                energy, base=standard() if tilts else None, event_shape=shape, conditional=False
            )
            pyro.sample("x", law, obs=x)

    return model, energy


def no_guide(x: Tensor) -> None:
    """There are no latents."""


def by_module(name: str, x: Tensor) -> Step:
    """Returns the step of ``objective(model, guide)`` in a loop of torch."""
    model, energy = model_of(name)
    objective = FAMILIES[name].ours()
    module = objective(model, no_guide)
    module(x)
    learned = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam([*energy.parameters(), *learned], lr=RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = module(x) / len(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_svi(name: str, x: Tensor, *, validated: bool, captured: bool = False) -> Step:
    """Returns the step of stock ``SVI``, with the objective or with what replays its steps."""
    objective = FAMILIES[name].ours()
    loss = infer.Captured(objective) if captured else objective
    return svi_step(model_of(name)[0], loss, x, validated=validated)


def by_fit(name: str, x: Tensor, **options: bool) -> Step:
    """Returns the step that ``fit`` takes, with ``capture`` or ``compile``."""
    shared = {"optim": torch.optim.Adam, "lr": RATE, "disable_progbar": True}
    absent = (
        "lr_schedule",
        "ema",
        "grad_clip",
        "validation",
        "criterion",
        "patience",
        "checkpoint",
    )
    every = {"validate_every": 100, "checkpoint_every": 1000}
    chosen = Options(**shared, **dict.fromkeys(absent), **every, **options)  # type: ignore[arg-type]
    model, objective = model_of(name)[0], FAMILIES[name].ours()
    return TrainingRun(model, no_guide, objective, Batches((x,), None), chosen).step


# --- by others


def by_ebmkit(name: str, x: Tensor) -> Step | None:
    """Returns the step with a loss of ebmkit, where it has it."""
    library: Any = importlib.import_module("ebm")
    make = FAMILIES[name].ebmkit
    if make is None:
        return None
    energy, loss_of = new_energy(), make(library)
    optimizer = torch.optim.Adam([*energy.parameters(), *loss_of.parameters()], lr=RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(energy, x).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_torchebm(name: str, x: Tensor) -> Step | None:
    """Returns the step with a loss of torchebm, where it has it."""
    make = FAMILIES[name].torchebm
    if make is None:
        return None
    core: Any = importlib.import_module("torchebm.core")
    losses: Any = importlib.import_module("torchebm.losses")

    class Model(core.BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.energy = new_energy()

        def forward(self, y: Tensor) -> Tensor:
            return self.energy(y)

    model = Model()
    loss_of = make(losses, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
