"""Samplers of NumPyro and BlackJAX, on one core; run by a Python that has them.

python -m peers.jax_samplers TARGET METHOD NUM_CHAINS WARMUP DRAWS SEED OUT.npz
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from peers.outputs import Run, parsed

ARGS = parsed()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import blackjax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import numpyro.infer  # noqa: E402
import optax  # noqa: E402
from blackjax import eca  # noqa: E402
from blackjax.adaptation import laps as laps_module  # noqa: E402
from blackjax.mcmc import adjusted_mclmc_dynamic as mclmc_dynamic  # noqa: E402

from peers.targets import TARGETS, Target, jax_namespace  # noqa: E402

LEARNING_RATE, FIRST_STEP = 0.1, 0.1  # of ChEES; of rates .02, .025, .1 and .5 the best on latent
MCLMC_ACCEPT = 0.9
MCLACHLAN_GRADIENTS = 2  # per step of the integrator of McLachlan


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """Returns the result of a compiled call, seconds of compiling and of running."""
    begin = time.process_time()
    compiled = jax.jit(fn).lower(*args).compile()
    middle = time.process_time()
    result = jax.block_until_ready(compiled(*args))
    return result, middle - begin, time.process_time() - middle


def two_phases(warm: Callable[..., Any], sample: Callable[..., Any], q: jax.Array) -> Run:
    """Runs ``warm(key, q) -> state, gradients, step`` and ``sample(key, state)``, both compiled."""
    first, second = jax.random.split(jax.random.key(ARGS.seed))
    (state, warm_grads, step), compile_warm, warmup = timed(warm, first, q)
    (draws, grads), compile_sample, sampling = timed(sample, second, state)
    return Run(
        draws=np.swapaxes(np.asarray(draws), 0, 1),
        compile=compile_warm + compile_sample,
        warmup=warmup,
        sampling=sampling,
        warmup_gradients=float(warm_grads),
        draw_gradients=float(np.mean(grads)),
        step_size=float(np.mean(step)),
    )


def numpyro_nuts(target: Target) -> Run:
    """NumPyro's NUTS, its defaults, vectorized: every chain tunes itself."""
    density = target.build(jax_namespace())
    kernel = numpyro.infer.NUTS(potential_fn=lambda q: -density(q))

    def step(state: Any, _: Any) -> tuple[Any, Any]:
        state = kernel.sample(state, (), {})
        return state, (state.z, state.num_steps.mean())

    def warm(key: jax.Array, q: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, ARGS.num_chains)
        state = kernel.init(keys, ARGS.warmup, q, model_args=(), model_kwargs={})
        state, (_, grads) = jax.lax.scan(step, state, length=ARGS.warmup)
        return state, grads.sum(), state.adapt_state.step_size

    def sample(key: jax.Array, state: Any) -> Any:
        return jax.lax.scan(step, state, length=ARGS.draws)[1]

    return two_phases(warm, sample, jnp.asarray(target.start(ARGS.num_chains, ARGS.seed)))


def blackjax_chees(target: Target, mass: str | None = None) -> Run:
    """BlackJAX's ChEES-HMC, then dynamic HMC with what it found."""
    density = target.build(jax_namespace())
    adaptation = blackjax.chees_adaptation(
        density,
        ARGS.num_chains,
        adaptation_info_fn=lambda state, info, _: info.num_integration_steps.mean(),
        mass_matrix_estimation=mass,
    )
    functions: dict[str, Any] = {}  # of the tuned kernel, which cannot leave jit

    def warm(key: jax.Array, q: jax.Array) -> tuple[Any, ...]:
        optimizer = optax.adam(LEARNING_RATE)
        (states, tuned), info = adaptation.run(
            key, q, FIRST_STEP, optimizer, ARGS.warmup, max_sampling_steps=ARGS.draws
        )
        functions.update({k: tuned.pop(k) for k in list(tuned) if k.endswith("_fn")})
        return (states, tuned), info._wrapped_info.sum(), tuned["step_size"]

    def sample(key: jax.Array, state: Any) -> Any:
        states, tuned = state
        kernel = jax.vmap(blackjax.dynamic_hmc(density, **functions, **tuned).step)

        def step(states: Any, key: jax.Array) -> tuple[Any, Any]:
            states, info = kernel(jax.random.split(key, ARGS.num_chains), states)
            return states, (states.position, info.num_integration_steps.mean())

        return jax.lax.scan(step, states, jax.random.split(key, ARGS.draws))[1]

    return two_phases(warm, sample, jnp.asarray(target.start(ARGS.num_chains, ARGS.seed)))


def blackjax_mclmc(target: Target) -> Run:
    """BlackJAX's adjusted MCLMC; every chain tunes itself, all share the numbers of steps."""
    density = target.build(jax_namespace())
    kernel = mclmc_dynamic.build_kernel(mclmc_dynamic.make_random_trajectory_length_fn(True))
    tune = partial(
        blackjax.adjusted_mclmc_find_L_and_step_size,
        kernel,
        density,
        ARGS.warmup,
        target=MCLMC_ACCEPT,
        frac_tune1=0.334,  # it is run twice, so that the three parts make the whole
        frac_tune2=0.334,
    )

    def warm(key: jax.Array, q: jax.Array) -> tuple[Any, ...]:
        shared = jax.random.key(ARGS.seed)
        states = jax.vmap(lambda x: mclmc_dynamic.init(x, density, shared))(q)
        keys = jax.random.split(key, ARGS.num_chains)
        states, tuned, grads = jax.vmap(tune)(state=states, rng_key=keys)
        return (states, tuned), MCLACHLAN_GRADIENTS * grads.mean(), tuned.step_size

    def sample(key: jax.Array, state: Any) -> Any:
        states, tuned = state

        def one(key: jax.Array, state: Any, tuned: Any) -> tuple[Any, Any]:
            return kernel(
                key,
                state,
                density,
                tuned.step_size,
                inverse_mass_matrix=tuned.inverse_mass_matrix,
                integration_steps_params=(tuned.L / tuned.step_size,),
            )

        def step(states: Any, key: jax.Array) -> tuple[Any, Any]:
            states, info = jax.vmap(one)(jax.random.split(key, ARGS.num_chains), states, tuned)
            grads = MCLACHLAN_GRADIENTS * info.num_integration_steps.mean()
            return states, (states.position, grads)

        return jax.lax.scan(step, states, jax.random.split(key, ARGS.draws))[1]

    return two_phases(warm, sample, jnp.asarray(target.start(ARGS.num_chains, ARGS.seed)))


def compiled_shard_map(*args: Any, shard_map: Any = eca.shard_map, **kwargs: Any) -> Any:
    """Is compiled as a whole, and does not take the positions of all chains for a mistake."""
    return jax.jit(shard_map(*args, check_vma=False, **kwargs))


class Stopwatch:
    """Times the two phases of LAPS, and its compilation apart; keeps the second one's draws."""

    def __init__(self) -> None:
        self.inner, self.phases, self.compiling = laps_module.run_eca, [], 0.0
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, seconds: float, **_: Any) -> None:
        if "/core/compile/" in event:
            self.compiling += seconds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.phases:
            args = (*args[:8], lambda position: position)
        begin, compiled = time.process_time(), self.compiling
        result = jax.block_until_ready(self.inner(*args, **kwargs))
        compiled = self.compiling - compiled
        self.phases.append((time.process_time() - begin - compiled, result[2]))
        return result


def blackjax_laps(target: Target) -> Run:
    """BlackJAX's LAPS: unadjusted until it is near, then adjusted; both phases by its own rules."""
    laps_module.run_eca = watch = Stopwatch()
    eca.shard_map = compiled_shard_map
    steps, num_grads = 15, MCLACHLAN_GRADIENTS if target.dim <= 200 else 5
    begin = time.process_time()
    laps_module.laps(
        target.build(jax_namespace()),
        partial(jax.random.uniform, shape=(target.dim,), minval=-2.0, maxval=2.0),
        target.dim,
        ARGS.warmup,
        ARGS.draws * steps * num_grads,
        ARGS.num_chains,
        jax.sharding.Mesh(jax.devices()[:1], "chains"),
        jax.random.key(ARGS.seed),
        steps_per_sample=steps,
    )
    total = time.process_time() - begin
    (warmup, first), (sampling, second) = watch.phases
    return Run(
        draws=np.swapaxes(np.asarray(second["all_chains_info"]), 0, 1),
        compile=total - warmup - sampling,
        warmup=warmup,
        sampling=sampling,
        warmup_gradients=len(first["step_size"]),
        draw_gradients=steps * num_grads,
        step_size=second["step_size"][-1],
    )


METHODS: dict[str, Callable[[Target], Run]] = {
    "numpyro_nuts": numpyro_nuts,
    "blackjax_chees": blackjax_chees,
    "blackjax_chees_diagonal": partial(blackjax_chees, mass="diagonal"),
    "blackjax_mclmc": blackjax_mclmc,
    "blackjax_laps": blackjax_laps,
}

if __name__ == "__main__":
    jax.block_until_ready(jnp.ones(2) + 1.0)  # the backend starts
    METHODS[ARGS.method](TARGETS[ARGS.target]()).save(ARGS.out)
