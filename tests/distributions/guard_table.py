"""The table of what the guard of log Z does: model x inference, in stock Pyro.

``python tests/distributions/guard_table.py`` prints the table as it stands in ``docs/guard.rst``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import guard_models as models
import pyro
import torch
from pyro import infer, poutine
from pyro.infer import autoguide
from pyro.infer.mcmc.api import _MultiSampler
from pyro.infer.mcmc.util import initialize_model
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_ebm import EnergyDistribution, unwrap
from pyro_ebm.distributions.wrappers import rewrap
from pyro_ebm.infer import NCE
from pyro_ebm.mcmc import RecordingNUTS
from pyro_ebm.ops.autograd_graph import leaves_of
from pyro_ebm.ops.constraints import finite_values
from pyro_ebm.poutine import surrogate

Setup = models.Setup
Run = Callable[[Any], object]


# --- inferences, all of them stock Pyro or torch unless they say otherwise

INFERENCES: dict[str, tuple[str, Run]] = {}


def inference(label: str) -> Callable[[Run], Run]:
    """Registers a way to run a setup under its function's name."""

    def register(run: Run) -> Run:
        INFERENCES[run.__name__] = (label, run)
        return run

    return register


def mcmc(setup: Setup, kernel: Any) -> None:
    infer.MCMC(kernel, 2, 1, disable_progbar=True).run(*setup.args)


def svi(setup: Setup, guide: Any, loss: Any, steps: int = 2) -> None:
    step = infer.SVI(setup.model, guide, Adam({"lr": 0.01}), loss).step
    for _ in range(steps):
        step(*setup.args)


def guide_of(setup: Setup) -> Any:
    return setup.guide or autoguide.AutoNormal(setup.model)


@inference("NUTS")
def nuts(setup: Setup) -> None:
    mcmc(setup, infer.NUTS(setup.model, max_tree_depth=3))


@inference("HMC")
def hmc(setup: Setup) -> None:
    mcmc(setup, infer.HMC(setup.model, num_steps=2))


@inference("RandomWalkKernel")
def random_walk(setup: Setup) -> None:
    mcmc(setup, infer.RandomWalkKernel(setup.model))


@inference("NUTS(jit_compile=True)")
def jit_nuts(setup: Setup) -> None:
    mcmc(setup, infer.NUTS(setup.model, jit_compile=True, ignore_jit_warnings=True))


@inference("RecordingNUTS")
def recording_nuts(setup: Setup) -> None:
    mcmc(setup, RecordingNUTS(setup.model, max_tree_depth=3))


@inference("NUTS in two worker processes")
def two_workers(setup: Setup) -> None:
    kernel = infer.NUTS(setup.model)
    run = infer.MCMC(kernel, 2, 1, num_chains=2, disable_progbar=True)
    run.sampler = _MultiSampler(kernel, 2, 1, 2, None, disable_progbar=True)
    run.run(*setup.args)


@inference("SVI, AutoNormal")
def auto_normal(setup: Setup) -> None:
    svi(setup, autoguide.AutoNormal(setup.model), infer.Trace_ELBO())


@inference("SVI, AutoDelta")
def auto_delta(setup: Setup) -> None:
    svi(setup, autoguide.AutoDelta(setup.model), infer.Trace_ELBO())


@inference("SVI, AutoMultivariateNormal")
def auto_mvn(setup: Setup) -> None:
    svi(setup, autoguide.AutoMultivariateNormal(setup.model), infer.Trace_ELBO())


@inference("SVI, AutoLaplaceApproximation")
def auto_laplace(setup: Setup) -> None:
    svi(setup, autoguide.AutoLaplaceApproximation(setup.model), infer.Trace_ELBO())


@inference("SVI, AutoIAFNormal")
def auto_flow(setup: Setup) -> None:
    svi(setup, autoguide.AutoIAFNormal(setup.model), infer.Trace_ELBO())


@inference("SVI, AutoNormalMessenger")
def auto_messenger(setup: Setup) -> None:
    svi(setup, autoguide.AutoNormalMessenger(setup.model), infer.Trace_ELBO())


@inference("SVI, Trace_ELBO")
def trace_elbo(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.Trace_ELBO())


@inference("SVI, vectorized particles")
def particles(setup: Setup) -> None:
    elbo = infer.Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    svi(setup, guide_of(setup), elbo)


@inference("SVI, TraceEnum_ELBO")
def trace_enum(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.TraceEnum_ELBO(max_plate_nesting=2))


@inference("SVI, TraceMeanField_ELBO")
def trace_mean_field(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.TraceMeanField_ELBO())


@inference("SVI, TraceGraph_ELBO")
def trace_graph(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.TraceGraph_ELBO())


@inference("SVI, RenyiELBO")
def renyi(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.RenyiELBO(num_particles=2))


@inference("SVI, TraceTMC_ELBO")
def trace_tmc(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.TraceTMC_ELBO(max_plate_nesting=2))


@inference("SVI, JitTrace_ELBO")
def jit_trace(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.JitTrace_ELBO(ignore_jit_warnings=True))


@inference("ReweightedWakeSleep")
def wake_sleep(setup: Setup) -> None:
    svi(setup, guide_of(setup), infer.ReweightedWakeSleep(num_particles=2))


@inference("SVGD")
def svgd(setup: Setup) -> None:
    steps = infer.SVGD(
        setup.model, infer.RBFSteinKernel(), Adam({}), num_particles=3, max_plate_nesting=1
    )
    steps.step(*setup.args)


@inference("ELBOModule and backward()")
def elbo_module(setup: Setup) -> None:
    infer.Trace_ELBO()(setup.model, guide_of(setup))(*setup.args).backward()


@inference("hand-written loop over trace.log_prob_sum()")
def hand_loop(setup: Setup) -> None:
    trace = poutine.trace(setup.model).get_trace(*setup.args)
    (-trace.log_prob_sum()).backward()


def potential_of(setup: Setup) -> Callable[[Tensor], Tensor]:
    """The potential of the unconstrained latent theta, as Pyro's MCMC uses it."""
    start = {"theta": torch.tensor(1.0)}
    with pyro.validation_enabled(False):
        _, potential, _, _ = initialize_model(setup.model, setup.args, initial_params=start)
    return lambda t: potential({"theta": t})


@inference("torch.autograd.grad at an intermediate value")
def grad_of_intermediate(setup: Setup) -> None:
    t = torch.tensor(1.0, requires_grad=True) * 2.0
    torch.autograd.grad(potential_of(setup)(t), t)


@inference("torch.func.grad")
def func_grad(setup: Setup) -> None:
    torch.func.grad(potential_of(setup))(torch.tensor(1.0))


@inference("torch.func.vmap(grad)")
def vmap_grad(setup: Setup) -> None:
    with pyro.validation_enabled(False):
        torch.func.vmap(torch.func.grad(potential_of(setup)))(torch.ones(3))


@inference("torch.func.hessian")
def func_hessian(setup: Setup) -> None:
    with pyro.validation_enabled(False):
        torch.func.hessian(potential_of(setup))(torch.tensor(1.0))


@inference("torch.autograd.functional.hessian")
def autograd_hessian(setup: Setup) -> None:
    torch.autograd.functional.hessian(potential_of(setup), torch.tensor(1.0))


@inference("torch.func.jvp (forward mode)")
def forward_mode(setup: Setup) -> None:
    one = torch.tensor(1.0)
    torch.func.jvp(potential_of(setup), (one,), (one,))


@inference("torch.compile of the user's loop")
def compiled(setup: Setup) -> None:
    a = torch.tensor(3.0, requires_grad=True)
    x = models.X

    def loss(a: Tensor) -> Tensor:
        return -EnergyDistribution(lambda x: a * 0.5 * x**2, event_shape=()).log_prob(x).sum()

    torch.compile(loss, backend="eager")(a).backward()


@inference("Importance")
def importance(setup: Setup) -> None:
    infer.Importance(setup.model, num_samples=3).run(*setup.args)


class _Once:
    """A model for ``SMCFilter`` that is all in its first step."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def init(self, state: Any, *args: Any) -> None:
        self.model(*args)


@inference("SMCFilter")
def smc_filter(setup: Setup) -> None:
    proposal = poutine.block(setup.model, hide=["x"])
    smc = infer.SMCFilter(_Once(setup.model), _Once(proposal), 4, max_plate_nesting=1)
    smc.init(*setup.args)


@inference("log_prob without a gradient")
def scored(setup: Setup) -> None:
    poutine.trace(setup.model).get_trace(*setup.args).log_prob_sum()


@inference("SVI.evaluate_loss")
def evaluated(setup: Setup) -> None:
    guide = guide_of(setup)
    infer.SVI(setup.model, guide, Adam({}), infer.Trace_ELBO()).evaluate_loss(*setup.args)


@inference("set-up of AutoGuides")
def guide_set_up(setup: Setup) -> None:
    for kind in (autoguide.AutoNormal, autoguide.AutoDelta, autoguide.AutoMultivariateNormal):
        kind(setup.model)(*setup.args)


@inference("Predictive, sequential")
def predictive(setup: Setup) -> None:
    infer.Predictive(setup.model, num_samples=2)(*setup.args)


@inference("Predictive, parallel")
def predictive_parallel(setup: Setup) -> None:
    infer.Predictive(setup.model, num_samples=2, parallel=True)(*setup.args)


@inference("SVI, NCE")
def nce(setup: Setup) -> None:
    svi(setup, guide_of(setup), NCE(num_noise=5))


@inference("NUTS over a frozen NCE surrogate")
def nuts_surrogate(setup: Setup) -> None:
    frozen = NCE(num_noise=5).freeze(setup.model, *setup.args)
    mcmc(setup, infer.NUTS(surrogate(setup.model, frozen), max_tree_depth=3))


# --- the rows

Result = Literal["raises", "silent", "not caught"]


@dataclass(frozen=True)
class Row:
    """One model under one inference, with what must happen and why."""

    position: str
    inference: str
    result: Result
    why: str

    @property
    def id(self) -> str:
        return f"{self.position}-{self.inference}".replace("_", "-")

    @property
    def case(self) -> str:
        return str(getattr(models, self.position).__doc__).partition("\n")[0]

    def setup(self) -> Setup:
        return getattr(models, self.position)()

    def run(self) -> None:
        INFERENCES[self.inference][1](self.setup())


def rows(result: Result, why: str, cases: dict[str, str]) -> Iterator[Row]:
    """Yields the rows of ``{position: "inference inference ..."}``."""
    for position, names in cases.items():
        for name in names.split():
            yield Row(position, name, result, why)


ROWS: tuple[Row, ...] = (
    *rows(
        "raises",
        "the latent receives gradient through an unknown log Z",
        {
            "closure": "nuts hmc random_walk jit_nuts recording_nuts two_workers auto_normal "
            "auto_delta auto_mvn auto_laplace auto_flow auto_messenger particles trace_enum "
            "trace_mean_field trace_graph renyi trace_tmc jit_trace svgd elbo_module "
            "grad_of_intermediate func_grad vmap_grad func_hessian autograd_hessian",
            "buffer": "nuts auto_normal",
            "nested_module": "nuts auto_normal",
            "callable_object": "nuts auto_normal",
            "pyro_module": "nuts auto_normal",
            "checkpointed": "nuts auto_normal",
            "tempered": "nuts",
            "tilted": "nuts",
            "vector_latent": "nuts auto_mvn",
            "row_wise": "nuts auto_normal",
            "positive_support": "nuts",
            "integers": "nuts auto_normal",
            "spin_pair": "nuts",
            "to_event": "nuts auto_normal",
            "masked": "nuts auto_normal",
            "handler_mask": "nuts auto_normal",
            "subsampled": "auto_normal",
            "nested_plates": "nuts particles",
            "latent_site": "nuts auto_normal",
            "hierarchy": "nuts auto_normal",
            "chain_of_ebms": "nuts",
            "two_sites": "nuts",
            "gebm_energy": "nuts",
            "gebm_generator": "auto_normal",
            "ebm_after_gebm": "nuts",
            "enumerated_beside": "nuts trace_enum",
        },
    ),
    *rows(
        "raises",
        "log Z depends on the base too",
        {
            "base_scale": "nuts auto_delta",
            "base_loc": "nuts",
            "base_flow": "nuts",
            "base_ebm": "nuts",
            "gebm_prior": "nuts",
            "flow_reparam": "nuts",
        },
    ),
    *rows(
        "raises",
        "what was given as log Z holds at one value of the latent only",
        {
            "constant_float": "nuts auto_normal",
            "constant_tensor": "nuts",
            "constant_parameter": "nuts auto_normal",
            "constant_estimate": "nuts auto_normal",
            "constant_detached": "nuts",
            "half_covered": "nuts auto_normal auto_mvn auto_flow",
        },
    ),
    *rows(
        "raises",
        "the estimate was made at other weights, so log Z is unknown",
        {"stale": "trace_elbo elbo_module", "stale_latent": "nuts"},
    ),
    *rows(
        "raises",
        "the parameter would be trained through an unknown log Z",
        {
            "param": "trace_elbo elbo_module trace_enum jit_trace",
            "param_in_base": "trace_elbo",
            "param_constant": "trace_elbo",
            "network": "trace_elbo trace_mean_field renyi elbo_module hand_loop",
            "network_in_base": "trace_elbo",
            "conditional_network": "trace_elbo",
            "pyro_param": "trace_elbo elbo_module",
            "trained_prior": "auto_normal auto_delta",
            "fixed_registered": "auto_normal",
            "ebm_guide": "trace_elbo",
        },
    ),
    *rows(
        "raises",
        "torch deposits gradient in the weights and cannot know that no optimizer holds them: "
        "freeze them",
        {"pretrained_prior": "elbo_module"},
    ),
    *rows(
        "raises",
        "a mixture weighs its components by their log Z",
        {"mixture_weights": "nuts auto_normal importance"},
    ),
    *rows(
        "raises",
        "log Z depends on the bounds of the support",
        {"support_bound": "nuts auto_normal"},
    ),
    *rows(
        "raises",
        "log Z would weigh the scale",
        {"latent_scale": "nuts auto_normal"},
    ),
    *rows(
        "raises",
        "RecordingNUTS runs check_model when it is set up",
        {
            "enumerated_mixture": "recording_nuts",
            "detached_parent": "recording_nuts",
            "branch_on_parent": "recording_nuts",
        },
    ),
    *rows(
        "raises",
        "a likelihood would send a free log Z to minus infinity",
        {
            "free_constant": "trace_elbo elbo_module",
            "free_and_trained": "trace_elbo",
            "free_callable": "trace_elbo",
        },
    ),
    *rows(
        "raises",
        "a factor of data has no latent to normalize over",
        {"factor_of_data": "nuts auto_normal"},
    ),
    *rows(
        "raises",
        "the normalizer of the joint density depends on the parameter",
        {"factor_trained": "auto_normal"},
    ),
    *rows(
        "silent",
        "log Z is constant in everything that is inferred",
        {
            "fixed": "nuts hmc random_walk recording_nuts auto_normal",
            "fixed_network": "nuts random_walk",
            "fixed_registered": "nuts",
            "fixed_param": "nuts",
            "fixed_base": "nuts auto_normal",
            "fixed_estimate": "nuts",
            "fixed_plate": "nuts auto_normal",
            "function_of_latent": "nuts auto_normal",
            "observed_parent": "nuts auto_normal",
            "frozen_prior": "auto_normal nuts elbo_module",
            "gebm_fixed": "nuts",
            "masked_out": "nuts auto_normal",
        },
    ),
    *rows(
        "silent",
        "SVI moves only parameters that it knows of, and these weights are not among them",
        {"pretrained_prior": "auto_normal auto_delta"},
    ),
    *rows(
        "silent",
        "log Z is known for the latent",
        {
            "exact_gaussian": "nuts auto_normal auto_delta vmap_grad",
            "exact_quartic": "nuts auto_normal",
            "covering_tensor": "nuts auto_normal elbo_module func_hessian",
            "covering_callable": "nuts auto_normal",
            "known_support_bound": "nuts auto_normal",
        },
    ),
    *rows("silent", "log Z is known for the parameter", {"param_exact": "trace_elbo elbo_module"}),
    *rows(
        "silent",
        "nothing asks for a gradient",
        {
            "closure": "scored evaluated guide_set_up predictive predictive_parallel",
            "network": "scored evaluated",
        },
    ),
    *rows(
        "silent",
        "the objective needs no log Z",
        {"network_with_base": "nce", "latent_with_base": "nuts_surrogate"},
    ),
    *rows(
        "silent",
        "a factor is normalized over its latent inputs, and joint=True says that this is meant",
        {
            "factor_of_latents": "nuts auto_normal",
            "factor_with_coupling": "nuts auto_normal",
            "factor_of_enumerated": "nuts trace_enum",
            "factor_meant_jointly": "nuts auto_normal",
        },
    ),
    *rows(
        "not caught",
        "a discrete value has no gradient; check_model sees the dependence",
        {
            "enumerated_mixture": "nuts",
            "discrete_parent": "trace_elbo trace_graph trace_enum",
            "score_function_parent": "trace_elbo trace_graph",
        },
    ),
    *rows(
        "not caught",
        "weights of particles are no gradients; check_model sees the dependence",
        {"closure": "importance smc_filter wake_sleep"},
    ),
    *rows(
        "not caught",
        "forward mode runs no backward pass; check_model sees the dependence",
        {"closure": "forward_mode"},
    ),
    *rows(
        "not caught",
        "hooks do not exist in compiled code, so the guard stays out of it",
        {"param": "compiled"},
    ),
    *rows("not caught", "a Python number remembers nothing", {"number_parent": "nuts"}),
    *rows(
        "not caught",
        "no gradient reaches the latent; check_model sees the dependence",
        {"detached_parent": "nuts auto_normal", "branch_on_parent": "nuts"},
    ),
    *rows(
        "not caught",
        "the inner backward pass is not part of the graph: checkpoint(use_reentrant=False) is",
        {"reentrant_checkpoint": "trace_elbo"},
    ),
    *rows(
        "not caught",
        "assigning to .data does not count as a change: update weights in place",
        {"stale_by_data": "trace_elbo"},
    ),
)

SLOW = {"param-compiled"}


# --- the proof: without the guard the answer is wrong


class ExactNormalizers(Messenger):
    """Gives every EBM site its log Z by quadrature or enumeration of its own potential."""

    def _pyro_sample(self, msg: Any) -> None:
        if unwrap(msg["fn"]) is not None:
            msg["fn"] = rewrap(msg["fn"], lambda p: p.with_log_normalizer(lambda: log_z_on_grid(p)))


def log_z_on_grid(p: EnergyDistribution) -> Tensor:
    """Log Z in nats on events of one or two dims, shape ``batch``."""
    values = finite_values(p.support)
    if values is None:
        low = 0.0 if p.support.__class__.__name__ == "_GreaterThan" else -15.0
        values = torch.linspace(low, 15.0, 3001 if not p.event_shape else 301)
    log_step = 0.0 if finite_values(p.support) is not None else (values[1] - values[0]).log()
    points, num_dims = values, 1
    if p.event_shape:
        num_dims = p.event_shape.numel()
        points = torch.cartesian_prod(*[values] * num_dims).reshape(-1, *p.event_shape)
    points = points.reshape((len(points),) + (1,) * len(p.batch_shape) + p.event_shape)
    return p.unnormalized_log_prob(points).logsumexp(0) + num_dims * log_step


def wrongness(position: str) -> float:
    """Relative error of the gradient of the model's log density if the guard is switched off.

    The gradient is with respect to everything that may be inferred, at fixed values; the truth is
    the gradient of that density with log Z(theta) by quadrature, or of the model that was meant.
    """
    setup = getattr(models, position)()
    model = setup.scored or setup.model
    latents = [value.clone().requires_grad_() for value in setup.at.values()]
    values = setup.held | dict(zip(setup.at, latents, strict=True))
    with pyro.settings.context(ebm_missing_normalizer="ignore"):
        faulty = log_density(model, setup, values)
        exact = log_density(ExactNormalizers()(setup.meant or model), setup, values)
    parameters = {id(t): t for t in (*latents, *leaves_of(faulty))}.values()
    g, truth = (gradient(value, [*parameters]) for value in (faulty, exact))
    return float((g - truth).norm() / truth.norm()) if truth.norm() > 0.0 else math.inf


def log_density(model: Any, setup: Setup, values: dict[str, Tensor]) -> Tensor:
    pyro.set_rng_seed(0)
    conditioned = poutine.condition(model, data=values)
    return poutine.trace(conditioned).get_trace(*setup.args).log_prob_sum()


def gradient(value: Tensor, leaves: list[Tensor]) -> Tensor:
    if not value.requires_grad:
        return torch.zeros(sum(t.numel() for t in leaves))
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return torch.cat([(torch.zeros_like(t) if g is None else g).flatten() for g, t in pairs])


# --- the table for users

RESULTS = {"raises": "raises", "silent": "silent", "not caught": "*not caught*"}


def as_rst() -> str:
    """Returns the table in reStructuredText."""
    lines = [
        ".. list-table::",
        "   :header-rows: 1",
        "   :widths: 22 34 22 10 32",
        "",
        "   * - Row",
        "     - Case",
        "     - Inference",
        "     - Result",
        "     - Why",
    ]
    for row in ROWS:
        lines += [
            f"   * - {row.id}",
            f"     - {row.case}",
            f"     - {INFERENCES[row.inference][0]}",
            f"     - {RESULTS[row.result]}",
            f"     - {row.why}",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_rst(), end="")
