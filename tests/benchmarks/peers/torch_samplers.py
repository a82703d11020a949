"""This package's samplers, Pyro's and ebmkit's, on one core.

python -m peers.torch_samplers TARGET METHOD NUM_CHAINS WARMUP DRAWS SEED OUT.npz
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from peers.outputs import Run, parsed

ARGS = parsed()

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
from pyro.infer.mcmc import MCMC as PyroMCMC  # noqa: E402
from pyro.infer.mcmc import NUTS as PyroNUTS  # noqa: E402
from torch import Tensor  # noqa: E402

from peers.targets import TARGETS, Target, torch_namespace, weights  # noqa: E402
from pyro_ebm import GeneralizedEBM, mcmc  # noqa: E402


def latent_law() -> GeneralizedEBM:
    """Returns the target ``latent`` as a user would write it."""
    w = {name: torch.tensor(value) for name, value in weights().items()}

    def generator(z: Tensor) -> Tensor:
        return torch.tanh(z @ w["g1"].T + w["gb1"]) @ w["g2"].T + w["gb2"]

    def energy(x: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(x @ w["e1"].T + w["eb1"])
        return (hidden @ w["e2"].T).squeeze(-1) + w["eb2"]

    base = dist.Normal(torch.zeros(w["g1"].shape[1]), 1.0).to_event(1)
    return GeneralizedEBM(generator, base, energy)


def potential(target: Target) -> Callable[[dict[str, Tensor]], Tensor]:
    """Returns the potential of a position under the name ``q``."""
    density = target.build(torch_namespace())
    return lambda values: -density(values["q"])


class WarmUp:
    """Counts the gradients of a kernel's warm-up and notes when it ended."""

    def __init__(self, kernel: Any) -> None:
        self.step, self.gradients, self.end = kernel.warm_step, torch.zeros(()), 0.0
        kernel.warm_step = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, info = self.step(*args, **kwargs)
        self.gradients += info["n_steps"].float().mean()
        self.end = time.process_time()
        return state, info


def ours(target: Target, name: str) -> Run:
    """A kernel of this package, its defaults."""
    make = getattr(mcmc, name)
    is_latent = target.name == "latent"
    begin = time.process_time()
    kernel = make(latent_law()) if is_latent else make(potential_fn=potential(target))
    warm = WarmUp(kernel)
    sampler = mcmc.MCMC(
        kernel, ARGS.draws, ARGS.warmup, num_chains=ARGS.num_chains, disable_progbar=True
    )
    start = torch.as_tensor(target.start(ARGS.num_chains, ARGS.seed))
    sampler.run(initial_params={"x_latent" if is_latent else "q": start})
    (draws,) = sampler.get_samples(unconstrained=True).values()
    end, stats = time.process_time(), sampler.diagnostics()
    return Run(
        draws=draws.numpy(),
        compile=0.0,
        warmup=warm.end - begin,
        sampling=end - warm.end,
        warmup_gradients=float(warm.gradients),
        draw_gradients=float(stats["n_steps"].float().mean()),
        step_size=float(stats["step_size"].mean()) if "step_size" in stats else float("nan"),
    )


class Counted:
    """A function that counts its calls, for libraries that do not."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.calls = fn, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.fn(*args)


def pyro_nuts(target: Target) -> Run:
    """Pyro's NUTS on a potential function, one chain."""
    energy = Counted(potential(target))
    begin = time.process_time()
    kernel = PyroNUTS(potential_fn=energy)
    marks: dict[str, Any] = {}

    def note(kernel: Any, _: Any, stage: str, i: int) -> None:
        if i == ARGS.warmup - 1 and "end" not in marks:
            marks.update(end=time.process_time(), calls=energy.calls)

    start = torch.as_tensor(target.start(1, ARGS.seed))[0]
    sampler = PyroMCMC(
        kernel,
        ARGS.draws,
        ARGS.warmup,
        initial_params={"q": start},
        hook_fn=note,
        disable_progbar=True,
    )
    sampler.run()
    end = time.process_time()
    return Run(
        draws=sampler.get_samples(group_by_chain=True)["q"].numpy(),
        compile=0.0,
        warmup=marks["end"] - begin,
        sampling=end - marks["end"],
        warmup_gradients=marks["calls"],
        draw_gradients=(energy.calls - marks["calls"]) / ARGS.draws,
        step_size=float(kernel.step_size),
    )


def ebmkit_nuts(target: Target) -> Run:
    """Ebmkit's NUTS on many chains; an energy is given as code, so only ``latent``."""
    import ebm

    if target.name != "latent":
        raise ValueError("ebmkit's NUTS is run on the target 'latent' only")
    law, prior = latent_law(), 0.5
    energy = Counted(lambda z: law.energy(law.generator(z)) + prior * z.square().sum(-1))
    sampler = ebm.NUTS(warmup=ARGS.warmup)
    start = torch.as_tensor(target.start(ARGS.num_chains, ARGS.seed))
    begin = time.process_time()
    z, calls = sampler.sample(energy, start, steps=0), energy.calls
    middle, calls = time.process_time(), energy.calls
    sampler.warmup = 0
    draws = sampler.sample(energy, z, steps=ARGS.draws, return_trajectory=True)[1:]
    return Run(
        draws=draws.transpose(0, 1).numpy(),
        compile=0.0,
        warmup=middle - begin,
        sampling=time.process_time() - middle,
        warmup_gradients=calls,
        draw_gradients=(energy.calls - calls) / ARGS.draws,
        step_size=sampler.step_size,
    )


METHODS: dict[str, Callable[[Target], Run]] = {
    "ChEESHMC": partial(ours, name="ChEESHMC"),
    "EllipticalSlice": partial(ours, name="EllipticalSlice"),
    "HMC": partial(ours, name="HMC"),
    "NUTS": partial(ours, name="NUTS"),
    "pyro_nuts": pyro_nuts,
    "ebmkit_nuts": ebmkit_nuts,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(ARGS.seed)
    pyro.set_rng_seed(ARGS.seed)
    METHODS[ARGS.method](TARGETS[ARGS.target]()).save(ARGS.out)
