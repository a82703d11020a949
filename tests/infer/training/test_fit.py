"""The training loop: same parameters as the other loops, mini-batches at the right scale, resuming
to the bit.
"""

from __future__ import annotations

import itertools
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Subset, TensorDataset

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.errors import NonFiniteEnergyError
from pyro_ebm.infer import (
    KALE,
    NCE,
    DonskerVaradhan,
    EnergyDiscrepancy,
    PerSite,
    RankingNCE,
    ScoreMatching,
    fit,
)
from pyro_ebm.infer.training import checkpoint, training_run
from pyro_ebm.infer.training.minibatch import PlateScale

BASE = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.5).to_event(1)
QUIET = {"disable_progbar": True}


def no_guide(*args):
    return None


def idle(*args):
    """A guide without latents that gives ``fit`` a parameter to train."""
    pyro.param("idle", torch.zeros(()))


def new_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 1), nn.Flatten(-2))


def model_of(net):
    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(net, base=BASE, conditional=False), obs=x)

    return model


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()


def test_further_training_makes_log_z_stale():
    """By the optimizer that ``fit`` takes by itself, which is fused."""
    net, data, objective = new_net(), torch.randn(9, 2), NCE()
    fit(model_of(net), data, objective, num_steps=2, **QUIET)
    log_z = objective.log_normalizer("x")
    assert not log_z.is_stale
    fit(model_of(net), data, objective, num_steps=1, **QUIET)
    assert log_z.is_stale


def test_an_autocast_around_the_fit_sees_every_weight():
    """Its casts of the first weights are not those of all steps: the loss falls as without it."""
    torch.set_default_dtype(torch.float32)

    def last_loss(context):
        pyro.clear_param_store()
        net = new_net()
        data = torch.randn(64, 2)
        base = dist.Normal(torch.zeros(2), 1.5).to_event(1)
        law = EnergyDistribution(net, base=base, conditional=False)

        def model(x):
            pyro.module("net", net)
            with pyro.plate("data", len(x)):
                pyro.sample("x", law, obs=x)

        pyro.set_rng_seed(0)
        with context:
            losses = fit(model, data, NCE(), lr=0.05, num_steps=60, **QUIET).losses
        return losses[0], sum(losses[-10:]) / 10

    first, plain = last_loss(nullcontext())
    _, cast = last_loss(torch.autocast("cpu", torch.bfloat16))
    assert plain < first - 0.02
    assert abs(cast - plain) < 0.1 * (first - plain)


# --- three loops

OBJECTIVES = {
    "ranking": RankingNCE,
    "ed": EnergyDiscrepancy,
    "dv": lambda: DonskerVaradhan(gradient_penalty=0.1),
    "kale": KALE,
    "nce": lambda: NCE(c_update="closed_form"),
    "nce, learned c": NCE,
}
STEPS, LR = 15, 0.03


def with_svi(make, data, optim):
    net, objective = new_net(), make()
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    svi = SVI(model_of(net), no_guide, optim({"lr": LR / len(data)}), loss=objective)
    losses = [svi.step(data) for _ in range(STEPS)]
    return flat(net), losses, objective


def with_torch(make, data, optim, boost=1.0):
    net, objective = new_net(), make()
    pyro.clear_param_store()
    module = objective(model_of(net), no_guide)
    pyro.set_rng_seed(7)
    with torch.no_grad():
        module(data)  # makes log Z from the draws that the first step will see
    groups = [
        {"params": list(net.parameters())},
        {"params": list(objective.parameters()), "lr": boost * LR / len(data)},
    ]
    optimizer = optim(groups, lr=LR / len(data))
    pyro.set_rng_seed(7)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = module(data)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return flat(net), losses, objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_svi_and_torch_reach_the_same_bits(name):
    data = torch.randn(12, 2)
    by_svi = with_svi(OBJECTIVES[name], data, pyro.optim.Adam)
    by_torch = with_torch(OBJECTIVES[name], data, torch.optim.Adam)
    assert torch.equal(by_svi[0], by_torch[0])
    assert by_svi[1] == by_torch[1]
    assert not torch.equal(by_svi[0], flat(new_net()))
    for key, c in by_svi[2].log_normalizers.items():
        assert c.item() == by_torch[2].log_normalizers[key].item()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fit_and_torch_reach_the_same_parameters(name):
    """Plain gradient descent: fit's loss is per datum, so its learning rate is N times larger."""
    data = torch.randn(12, 2)
    by_torch = with_torch(OBJECTIVES[name], data, torch.optim.SGD, boost=10.0)
    net, objective = new_net(), OBJECTIVES[name]()
    pyro.clear_param_store()
    result = fit(
        model_of(net),
        data,
        objective,
        optim=torch.optim.SGD,
        lr=LR,
        num_steps=STEPS,
        seed=7,
        **QUIET,
    )
    torch.testing.assert_close(flat(net), by_torch[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.tensor(result.losses) * 12, torch.tensor(by_torch[1]), rtol=0, atol=1e-9
    )
    for key, c in objective.log_normalizers.items():
        assert c.item() == pytest.approx(by_torch[2].log_normalizers[key].item(), abs=1e-12)


def test_a_seed_fixes_the_run():
    data, nets = torch.randn(20, 2), [new_net(), new_net()]
    for net in nets:
        fit(model_of(net), data, NCE(), batch_size=6, num_steps=8, seed=3, **QUIET)
        pyro.clear_param_store()
        torch.randn(5)
    assert torch.equal(flat(nets[0]), flat(nets[1]))


def test_modules_are_trained_without_a_pyro_module_statement():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = new_net()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", EnergyDistribution(self.net, base=BASE), obs=x)

    model = Model()
    result = fit(model, torch.randn(12, 2), RankingNCE(), num_steps=3, lr=0.1, **QUIET)
    assert not torch.equal(flat(model.net), flat(new_net()))
    assert "model.net.0.weight" in result.parameters


def test_nothing_to_train_is_told():
    """Frozen for sampling, and trained again: every step would be the same."""
    net, data = new_net(), torch.randn(9, 2)
    net.requires_grad_(False).eval()
    with pytest.raises(ValueError, match="nothing to train.*network frozen"):
        fit(model_of(net), data, ScoreMatching(), num_steps=3, **QUIET)
    objective = NCE(c_update="closed_form")  # of an energy that is given
    assert fit(model_of(net), data, objective, num_steps=3, **QUIET).parameters == {}
    assert objective.num_steps_taken == 3


def test_a_parameter_with_two_names_takes_one_step():
    """Of a PyroModule whose parts are announced once more."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = PyroModule[nn.Linear](2, 1)
            self.net.weight.data[:] = torch.tensor([[0.3, -0.2]])
            self.net.bias.data.zero_()

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", EnergyDistribution(self.energy, base=BASE), obs=x)

        def energy(self, x):
            return 0.5 * self.net(x).square().squeeze(-1)

    class Twice(Model):
        def forward(self, x):
            pyro.module("energy", self.net)
            super().forward(x)

    class Later(Model):
        calls = 0

        def forward(self, x):
            super().forward(x)
            self.calls += 1
            if self.calls > 1:
                pyro.module("energy", self.net)

    weights, names = [], []
    for make in (Model, Twice, Later):
        pyro.clear_param_store()
        options = {"optim": torch.optim.SGD, "lr": 0.1, "num_steps": 4, "seed": 0, **QUIET}
        model = make()
        result = fit(model, torch.ones(5, 2), ScoreMatching(), **options)
        weights.append(flat(model))
        names.append(list(result.parameters))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)
    own, announced = ["net.weight", "net.bias"], ["energy$$$weight", "energy$$$bias"]
    assert names == [own, announced, own]


def test_a_stock_elbo_is_taken_too():
    loc = torch.zeros((), requires_grad=True)

    def model(x):
        mean = pyro.param("mean", loc)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = torch.randn(50) + 2
    fit(model, x, Trace_ELBO(), lr=0.1, num_steps=200, batch_size=25, **QUIET)
    assert pyro.param("mean").item() == pytest.approx(x.mean().item(), abs=0.1)


# --- mini-batches


def hierarchy(seen):
    """A global latent, a local latent and a local EBM; ``seen`` gets the batches."""

    def model(x):
        seen.append(x)
        top = pyro.sample("top", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            local = pyro.sample("local", dist.Normal(top, 1.0))
            ebm = EnergyDistribution(lambda y: 0.3 * y.square(), event_shape=())
            pyro.sample("x", ebm, obs=x)
            pyro.sample("y", dist.Normal(local, 0.5), obs=x)

    def guide(x):
        idle()
        pyro.sample("top", dist.Delta(torch.tensor(0.7), log_density=torch.tensor(0.2)))
        with pyro.plate("data", len(x)):
            pyro.sample("local", dist.Delta(0.5 * x, log_density=torch.full_like(x, 0.1)))
            pyro.sample("x", dist.Normal(0.0, 1.5))

    return model, guide


def test_global_sites_keep_their_weight():
    """Local terms, of the guide too, count N / B times; what is outside the plate counts once."""
    seen = []
    model, guide = hierarchy(seen)
    objective = RankingNCE(num_noise=2)
    surrogates = []
    inner = objective.per_datum
    objective.per_datum = lambda *args: surrogates.append(inner(*args)) or surrogates[-1]
    data = torch.randn(30)
    result = fit(model, data, objective, guide=guide, batch_size=5, num_steps=4, **QUIET)
    batches = seen[2:]  # the first runs only looked for the plate
    for x, surrogate, loss in zip(batches, surrogates, result.losses, strict=True):
        assert len(x) == 5
        rows = surrogate - dist.Normal(0.7, 1.0).log_prob(0.5 * x)
        rows = rows - dist.Normal(0.5 * x, 0.5).log_prob(x) + 0.1
        top = dist.Normal(0.0, 2.0).log_prob(torch.tensor(0.7)) - 0.2
        want = (30 / 5 * rows.sum() - top) / 30
        assert loss == pytest.approx(want.item(), abs=1e-12)


def test_epochs_visit_every_row_once():
    seen = []
    data = torch.arange(10.0)
    model, guide = hierarchy(seen)
    fit(model, data, RankingNCE(), guide=guide, batch_size=3, num_steps=9, **QUIET)
    epochs = [torch.cat(seen[i : i + 3]) for i in (2, 5, 8)]  # the first two looked for the plate
    assert all(len(set(rows.tolist())) == 9 for rows in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_columns_of_data_stay_together():
    seen = []

    def model(x, y):
        seen.append((x, y))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", EnergyDistribution(lambda z: z.square(), base=dist.Normal(0.0, 1.0)), obs=x
            )

    x = torch.arange(12.0)
    fit(model, (x, 3 * x), RankingNCE(), guide=idle, batch_size=4, num_steps=3, **QUIET)
    assert all(torch.equal(3 * a, b) for a, b in seen)


def test_rows_in_a_python_loop_are_scaled():
    def model(x):
        for i in pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda z: z.square(), base=dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", ebm, obs=x[i])

    def constant(p, x, contrast, log_z):
        return torch.ones(())

    objective = RankingNCE()
    objective.per_datum = constant
    one_step = {"guide": idle, "batch_size": 4, "num_steps": 1}
    result = fit(model, torch.randn(12), objective, **one_step, **QUIET)
    assert result.losses == [pytest.approx(1.0)]


def scale_in(handler, *plates):
    """The scale of a site in nested plates, outermost first."""
    with handler, pyro.poutine.trace() as capture, ExitStack() as stack:
        for i, (name, size) in enumerate(plates):
            stack.enter_context(pyro.plate(name, size, dim=-len(plates) + i))
        pyro.sample("x", dist.Normal(torch.zeros(()), 1.0))
    return capture.trace.nodes["x"]["scale"]


def test_only_plates_over_rows_are_scaled():
    rows = frozenset({"data", "other"})
    assert scale_in(PlateScale(rows, 3.0), ("data", 4), ("columns", 4)) == 3.0
    assert scale_in(PlateScale(rows, 3.0), ("columns", 4)) == 1.0
    with pytest.raises(ValueError, match=r"plates \['data', 'other'\], which both follow the rows"):
        scale_in(PlateScale(rows, 3.0), ("data", 4), ("other", 4))


def ebm_in(plate):
    def model(x):
        with plate(x):
            pyro.sample("x", EnergyDistribution(lambda z: z**2, dist.Normal(0.0, 1.0)), obs=x[:3])

    return model


@pytest.mark.parametrize(
    ("plate", "message"),
    [
        (lambda x: pyro.plate("d", 12, subsample_size=len(x)), "'d' subsamples by itself"),
        (lambda x: pyro.plate("d", len(x) - 1), "plate 'd' of size 3 follows the rows"),
        (lambda x: pyro.plate("d", 3), "no site in a plate of that size"),
    ],
)
def test_plates_that_fit_cannot_scale_are_refused(plate, message):
    with pytest.raises(ValueError, match=message):
        fit(ebm_in(plate), torch.randn(12), RankingNCE(), batch_size=4, num_steps=1, **QUIET)


def test_a_model_made_for_one_batch_size_is_taken_at_its_word():
    def model(x):
        with pyro.plate("d", 4):
            assert len(x) == 4
            pyro.sample("x", EnergyDistribution(lambda z: z**2, dist.Normal(0.0, 1.0)), obs=x)

    objective = RankingNCE()
    objective.per_datum = lambda p, x, contrast, log_z: torch.ones(x.shape)
    one_step = {"guide": idle, "batch_size": 4, "num_steps": 1}
    result = fit(model, torch.randn(12), objective, **one_step, **QUIET)
    assert result.losses == [pytest.approx(1.0)]


def test_validation_with_a_point_estimate_of_a_latent():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda z: (z - a) ** 2, dist.Normal(0.0, 1.0))
            pyro.sample("x", ebm, obs=x)

    guide = pyro.infer.autoguide.AutoDelta(model)
    x = torch.randn(12)
    options = {"num_steps": 4, "validation": x, "validate_every": 2}
    assert len(fit(model, x, NCE(), guide=guide, **options, **QUIET).validation) == 2


def test_a_plate_that_has_the_batchs_size_by_chance():
    def model(x):
        with pyro.plate("columns", 4, dim=-1):
            pyro.sample("column", dist.Normal(torch.zeros(()), 1.0), obs=torch.zeros(4))
            with pyro.plate("data", len(x), dim=-2):
                ebm = EnergyDistribution(lambda z: z.square(), base=dist.Normal(0.0, 1.0))
                pyro.sample("x", ebm, obs=x)

    objective = RankingNCE()
    objective.per_datum = lambda p, x, contrast, log_z: torch.ones(x.shape)
    one_step = {"guide": idle, "batch_size": 4, "num_steps": 1}
    result = fit(model, torch.randn(12, 4), objective, **one_step, **QUIET)
    assert result.losses == [pytest.approx((12 * 4 + 2 * math.log(2 * math.pi)) / 12)]


def test_a_plate_that_subsamples_for_itself():
    def model(x):
        with pyro.plate("data", 20, subsample_size=5) as rows:
            ebm = EnergyDistribution(lambda z: z.square(), base=dist.Normal(0.0, 1.0))
            pyro.sample("x", ebm, obs=x[rows])

    objective = RankingNCE()
    objective.per_datum = lambda p, x, contrast, log_z: torch.ones(len(x))
    result = fit(model, torch.randn(20), objective, guide=idle, num_steps=1, **QUIET)
    assert result.losses == [pytest.approx(1.0)]


def test_a_batch_that_nothing_scales_is_refused():
    def model(x):
        ebm = EnergyDistribution(lambda z: z.square(), base=dist.Normal(0.0, 1.0))
        pyro.sample("x", ebm.expand([len(x)]).to_event(1), obs=x)

    with pytest.raises(ValueError, match="no site in a plate of that size"):
        fit(model, torch.randn(12), RankingNCE(), batch_size=4, num_steps=1, **QUIET)
    fit(model, torch.randn(12), RankingNCE(), guide=idle, num_steps=1, **QUIET)


# --- checkpoints


class Normed(nn.Module):
    """A network with buffers that training moves."""

    def __init__(self):
        super().__init__()
        self.inner = spectral_norm(nn.Linear(2, 4))
        self.outer = nn.Linear(4, 1)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x))).squeeze(-1)


def gebm_model(seed):
    torch.manual_seed(seed)
    energy, generator = Normed(), nn.Linear(2, 2)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model(x):
        pyro.module("energy", energy)
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            pyro.sample("x", GeneralizedEBM(generator, prior, energy), obs=x)

    return model, (energy, generator)


def plain_model(seed):
    net = new_net(seed)
    return model_of(net), (net,)


def two_site_model(seed):
    nets = (new_net(seed), new_net(seed + 1))

    def model(x):
        for name, net in zip("xy", nets, strict=True):
            pyro.module(name, net)
        with pyro.plate("data", len(x)):
            for name, net in zip("xy", nets, strict=True):
                pyro.sample(name, EnergyDistribution(net, base=BASE, conditional=False), obs=x)

    return model, nets


def test_arrays_are_data_and_what_is_not_is_refused():
    rows = torch.randn(20, 2)
    losses = []
    for data in (rows, rows.numpy(), [rows], (rows.numpy(),)):
        pyro.clear_param_store()
        losses.append(fit(model_of(new_net(0)), data, NCE(), num_steps=2, seed=0, **QUIET).losses)
    assert all(found == losses[0] for found in losses)
    run = partial(fit, model_of(new_net(0)), num_steps=2, **QUIET)
    with pytest.raises(TypeError, match="data must be a tensor or a sequence .* got dict"):
        run({"x": rows}, NCE())
    part = Subset(TensorDataset(rows), range(9))
    other = Subset(part, range(3))
    for given, remedy in (
        (TensorDataset(rows), "hand over dataset.tensors"),
        (part, r"hand over \[t\[subset.indices\] for t in subset.dataset.tensors\]"),
        (other, r"loss = objective\(model, guide\) on the batches"),
        (DataLoader(part), r"loss = objective\(model, guide\) on the batches"),
    ):
        with pytest.raises(TypeError, match=f"got {type(given).__name__}: .*{remedy}"):
            run(given, NCE())
    with pytest.raises(TypeError, match="validation must be a tensor .* got float"):
        run(rows, NCE(), validation=1.0)
    with pytest.raises(
        ValueError, match=r"data must have at least one row, got shapes \[\(0, 2\)\]"
    ):
        run(rows[:0], NCE())
    with pytest.raises(TypeError, match=r"got NCE: make one, NCE\(\)"):
        run(rows, NCE)
    with pytest.raises(TypeError, match=r"got TraceEnum_ELBO: train with it by pyro.infer.SVI"):
        run(rows, TraceEnum_ELBO())
    for made in (torch.optim.Adam(new_net(0).parameters()), pyro.optim.Adam({"lr": 0.1})):
        with pytest.raises(TypeError, match="optim must be a class of torch optimizers.*Got "):
            run(rows, NCE(), optim=made)
    with pytest.raises(ValueError, match="num_steps must be a positive number .* got 0"):
        run(rows, NCE(), num_steps=0)


def test_a_rate_in_the_optimizer_is_refused():
    """Every group gets the rate of fit, so that a partial's would say nothing."""
    optim = partial(torch.optim.SGD, lr=0.5)
    with pytest.raises(ValueError, match=r"optim has a learning rate.*call fit\(..., lr=0.5\)"):
        fit(model_of(new_net(0)), torch.randn(9, 2), NCE(), optim=optim, **QUIET)


def test_an_optimizer_takes_options():
    weights = []
    for optim in (torch.optim.SGD, partial(torch.optim.SGD, weight_decay=1.0)):
        pyro.clear_param_store()
        net = new_net(0)
        before = flat(net)
        fit(
            model_of(net),
            torch.randn(9, 2),
            NCE(),
            optim=optim,
            lr=0.1,
            num_steps=1,
            seed=0,
            **QUIET,
        )
        weights.append(flat(net))
    torch.testing.assert_close(weights[1], weights[0] - 0.1 * before)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    options = {"num_steps": 2, "checkpoint": tmp_path / "fit.pt", **QUIET}
    fit(model_of(new_net(0)), torch.randn(20, 2), NCE(), **options)
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="a fit to 20 rows, and data have 9"):
        fit(model_of(new_net(0)), torch.randn(9, 2), NCE(), **options)


RESUMED = {
    "nce": (plain_model, NCE),
    "nce, closed form": (plain_model, lambda: NCE(c_update="closed_form")),
    "nce, fitted noise": (plain_model, lambda: NCE(noise="gaussian")),
    "ed": (plain_model, lambda: EnergyDiscrepancy(time=(0.1, 1.0))),
    "gebm": (gebm_model, lambda: KALE(schedule=(3, 1), gradient_penalty=0.1)),
    "gebm, newton": (gebm_model, lambda: KALE(schedule=(2, 1), c_update="newton")),
    "per site": (two_site_model, lambda: PerSite({"x": NCE(), "y": KALE()})),
}


def test_a_run_whose_parameters_turned_up_one_after_the_other_is_resumed(tmp_path):
    """By then the model has all of them at its first step; Adam's moments find their owners."""
    data = torch.randn(50) + 1.0

    def run(path, *parts):
        pyro.clear_param_store()
        calls = itertools.count()

        def model(x):
            slope = pyro.param("slope", torch.tensor(0.3))
            tilt = (
                pyro.param("tilt", torch.tensor([0.1, 0.2])) if next(calls) > 2 else torch.zeros(2)
            )
            with pyro.plate("data", len(x)):
                energy = partial(
                    lambda x, s, t: 0.5 * (1 + s**2) * x**2 - t.sum() * x, s=slope, t=tilt
                )
                law = EnergyDistribution(energy, event_shape=(), conditional=False)
                pyro.sample("x", law, obs=x)

        noise = dist.Normal(0.5, 1.5)
        for number, steps in enumerate(parts):
            options = {"lr": 0.05, "checkpoint": path, "seed": number, **QUIET}
            fit(model, data, NCE(noise=noise), num_steps=steps, **options)
        return [pyro.param(name).detach() for name in ("slope", "tilt")]

    whole = run(None, 11)
    parts = run(tmp_path / "fit.pt", 6, 11)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_bit_equal(name, tmp_path):
    """6 + 7 steps in two processes, as it were, are the 13 steps of one: weights, curves, averages
    and log Z.
    """
    data = torch.randn(22, 2)
    make_model, make = RESUMED[name]
    options = {"batch_size": 5, "lr": 0.05, "ema": 0.9, "grad_clip": 10.0, "validation": data[:4]}
    options |= {"validate_every": 4, **QUIET}

    def run(steps, seed, path):
        pyro.clear_param_store()
        model, nets = make_model(seed)
        objective = make()
        result = fit(model, data, objective, num_steps=steps, seed=seed, checkpoint=path, **options)
        return result, torch.cat([flat(net) for net in nets]), objective.state_dict()

    whole, weights, state = run(13, 0, None)
    path = tmp_path / "runs" / "fit.pt"
    run(6, 0, path)
    resumed, weights_resumed, state_resumed = run(13, 99, path)
    assert torch.equal(weights, weights_resumed)
    for attribute in ("losses", "diagnostics", "diagnostic_steps", "validation", "num_steps"):
        assert getattr(whole, attribute) == getattr(resumed, attribute)
    assert resumed.num_steps == 13
    assert whole.averaged.keys() == resumed.averaged.keys()
    for key, value in whole.averaged.items():
        assert torch.equal(value, resumed.averaged[key])
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state_resumed[key]), key


def test_a_finished_run_is_not_prolonged(tmp_path):
    path, net = tmp_path / "fit.pt", new_net()
    fit(model_of(net), torch.randn(9, 2), NCE(), num_steps=3, checkpoint=path, **QUIET)
    before = flat(net)
    again = fit(model_of(net), torch.randn(9, 2), NCE(), num_steps=3, checkpoint=path, **QUIET)
    assert torch.equal(flat(net), before)
    assert again.num_steps == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    fit(model_of(new_net()), torch.randn(9, 2), NCE(), num_steps=1, checkpoint=path, **QUIET)
    content = path.read_bytes()
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="checkpoint of another model"):
        fit(small_model, torch.randn(9, 2), NCE(), num_steps=2, checkpoint=path, **QUIET)
    assert path.read_bytes() == content


def small_model(x):
    slope = pyro.param("slope", torch.ones(2))
    with pyro.plate("data", len(x)):
        law = EnergyDistribution(lambda y: -(slope * y).sum(-1), base=BASE, conditional=False)
        pyro.sample("x", law, obs=x)


@pytest.mark.parametrize(
    ("objective", "options", "match"),
    [
        (RankingNCE(3), {}, "objective = 'NCE', and this one has 'RankingNCE'"),
        (NCE(4), {}, "num_noise of the objective = 3, and this one has 4"),
        (NCE(3), {"lr": 1e-4}, "lr = 0.01, and this one has 0.0001"),
        (NCE(3), {"batch_size": 3}, "batch_size = 'all', and this one has 3"),
        (NCE(3), {"optim": torch.optim.SGD}, "optim = 'Adam', and this one has 'SGD'"),
        (
            NCE(3),
            {"optim": partial(torch.optim.Adam, betas=(0.5, 0.9))},
            r"betas of optim = 'its default', and this one has \(0.5, 0.9\)",
        ),
        (NCE(3), {"ema": 0.5}, "ema = 0.9, and this one has 0.5"),
        (NCE(3), {"ema": None}, "ema = 0.9, and this one has 'its default'"),
        (NCE(3), {"grad_clip": 2.0}, "grad_clip = 1.0, and this one has 2.0"),
        (NCE(3), {"criterion": lambda: 1.0}, "criterion = 'as_good', and .* has '<lambda>'"),
    ],
)
def test_a_run_goes_on_as_it_began(tmp_path, objective, options, match):
    def as_good():
        return 0.0

    shared = {"lr": 0.01, "checkpoint": tmp_path / "fit.pt", **QUIET}
    shared |= {"ema": 0.9, "grad_clip": 1.0, "criterion": as_good}
    data = torch.randn(9, 2)
    fit(small_model, data, NCE(3), num_steps=2, **shared)
    with pytest.raises(ValueError, match=match):
        fit(small_model, data, objective, num_steps=4, **{**shared, **options})


def test_settings_of_members_are_settings(tmp_path):
    shared = {"num_steps": 2, "checkpoint": tmp_path / "fit.pt", **QUIET}
    data = torch.randn(9, 2)
    fit(small_model, data, PerSite({"x": NCE(3)}), **shared)
    with pytest.raises(ValueError, match="num_noise of the objective of 'x' = 3, and this one"):
        fit(small_model, data, PerSite({"x": NCE(5)}), **shared)


def test_weight_decay_leaves_log_z_alone():
    """A potential of -20 at the data's mean: log Z is 20 + log sqrt(2 pi), and NCE learns it."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", EnergyDistribution(lambda y: 0.5 * y**2 - 20.0, event_shape=()), obs=x)

    objective, decayed = (
        NCE(10, dist.Normal(0.0, 1.5)),
        partial(torch.optim.AdamW, weight_decay=0.5),
    )
    fit(model, torch.randn(500), objective, optim=decayed, lr=0.01, num_steps=100, **QUIET)
    want = 20 + 0.5 * math.log(2 * math.pi)
    assert objective.log_normalizers["x"].item() == pytest.approx(want, abs=0.2)


def test_an_average_forgets_where_it_began():
    """The slope of two certain rows moves from 5 to 0 in 60 steps; an average of 1000 follows."""
    slope = torch.tensor(5.0)

    def model(x):
        value = pyro.param("slope", slope)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "x", EnergyDistribution(lambda y: 0.5 * (y - value) ** 2, event_shape=()), obs=x
            )

    options = {"optim": torch.optim.SGD, "lr": 0.5, "num_steps": 60, "ema": 0.999, **QUIET}
    result = fit(model, torch.zeros(2), ScoreMatching(), **options)
    exact = 5 * sum(0.999 ** (60 - k) * 0.5**k for k in range(1, 61))
    exact /= sum(0.999 ** (60 - k) for k in range(1, 61))
    assert result.averaged["slope"].item() == pytest.approx(exact, abs=1e-6)


def test_periodic_checkpoints(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        training_run, "save_checkpoint", lambda path, run: saved.append(run.result.num_steps)
    )
    options = {"checkpoint": tmp_path / "fit.pt", "checkpoint_every": 2, **QUIET}
    fit(model_of(new_net()), torch.randn(9, 2), NCE(), num_steps=5, **options)
    assert saved == [2, 4, 5]


# --- interruptions and failures


def failing_model(net, error, at):
    """Behaves for ``at`` runs, then raises or overflows."""
    runs = []
    inner = model_of(net)

    def model(x):
        runs.append(None)
        if len(runs) > at and error is not None:
            raise error
        inner(x if len(runs) <= at else x * 1e200)

    return model


@pytest.mark.parametrize("with_file", [False, True])
def test_interruption_keeps_what_was_learned(tmp_path, with_file):
    net, data = new_net(), torch.randn(9, 2)
    path = tmp_path / "fit.pt" if with_file else None
    model = failing_model(net, KeyboardInterrupt(), 5)
    result = fit(model, data, NCE(), num_steps=20, seed=1, checkpoint=path, **QUIET)
    assert result.interrupted
    assert result.num_steps == len(result.losses) == 5
    assert not torch.equal(flat(net), flat(new_net()))
    if with_file:
        resumed = fit(model_of(net), data, NCE(), num_steps=8, checkpoint=path, **QUIET)
        assert resumed.losses[:5] == result.losses
        assert resumed.num_steps == 8
        assert not resumed.interrupted


def interrupted_model(net, at, times=1):
    """Ctrl-C comes as often in the step ``at``."""
    steps, inner = [], model_of(net)

    def model(x):
        inner(x)
        if torch.is_grad_enabled():
            steps.append(None)
            for _ in range(times if len(steps) == at else 0):
                signal.raise_signal(signal.SIGINT)

    return model


def test_a_run_that_was_interrupted_in_a_step_is_resumed_to_the_bit(tmp_path):
    """Ctrl-C in the sixth step ends the run after it: the batch, its noise and counts are whole."""
    data, path = torch.randn(22, 2), tmp_path / "fit.pt"
    options = {"batch_size": 5, "lr": 0.05, "seed": 1, "validation": data[:4], **QUIET}
    options |= {"validate_every": 6}

    def run(make, num_steps, checkpoint=None):
        pyro.clear_param_store()
        net = new_net()
        result = fit(make(net), data, NCE(), num_steps=num_steps, checkpoint=checkpoint, **options)
        return result, flat(net)

    whole, weights = run(model_of, 11)
    interrupted, _ = run(partial(interrupted_model, at=6), 11, path)
    assert interrupted.interrupted
    assert interrupted.num_steps == 6
    resumed, same = run(model_of, 11, path)
    assert torch.equal(same, weights)
    assert resumed.losses == whole.losses
    assert resumed.validation == whole.validation
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interruption_acts_at_once():
    result = fit(
        interrupted_model(new_net(), 6, times=2), torch.randn(9, 2), NCE(), num_steps=9, **QUIET
    )
    assert result.interrupted
    assert result.num_steps == 5


def test_another_handler_of_interruptions_is_called_after_the_step():
    """One that does not raise lets the training go on."""
    steps, called = [], []
    options = {"criterion": lambda: float(len(steps.append(None) or steps)), "validate_every": 1}
    before = signal.signal(signal.SIGINT, lambda *args: called.append(len(steps)))
    try:
        model = interrupted_model(new_net(), 3)
        result = fit(model, torch.randn(9, 2), NCE(), num_steps=5, **options, **QUIET)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not result.interrupted
    assert (result.num_steps, called) == (5, [3])


def test_in_other_threads_interruptions_are_left_alone():
    kept = signal.getsignal(signal.SIGINT)
    with ThreadPoolExecutor(1) as pool:
        run = partial(fit, model_of(new_net()), torch.randn(9, 2), NCE(), num_steps=2, **QUIET)
        assert pool.submit(run).result().num_steps == 2
    assert signal.getsignal(signal.SIGINT) is kept


@pytest.mark.filterwarnings("ignore:.*noise does not cover the data")  # which are infinite
def test_non_finite_loss_raises_and_leaves_the_last_good_state(tmp_path):
    objective = EnergyDiscrepancy()
    net, data, path = new_net(), torch.randn(9, 2), tmp_path / "fit.pt"
    model = failing_model(net, None, 4)

    def unvalidated(x):
        with pyro.validation_enabled(False):
            model(x)

    with pyro.validation_enabled(False), pytest.raises(NonFiniteEnergyError, match="site 'x'"):
        fit(unvalidated, data, objective, num_steps=20, checkpoint=path, **QUIET)
    assert flat(net).isfinite().all()
    pyro.clear_param_store()
    resumed = fit(model_of(new_net(5)), data, objective, num_steps=4, checkpoint=path, **QUIET)
    assert resumed.num_steps == 4


def test_nothing_is_written_before_the_first_step(tmp_path):
    path = tmp_path / "fit.pt"
    with pytest.raises(ZeroDivisionError):
        fit(
            failing_model(new_net(), ZeroDivisionError(), 0),
            torch.randn(9, 2),
            NCE(),
            checkpoint=path,
            **QUIET,
        )
    assert not path.exists()


# --- extras


def test_moving_average():
    net, seen = new_net(), []

    class Watched(torch.optim.Adam):
        def step(self, *args):
            super().step(*args)
            seen.append(flat(net))

    result = fit(
        model_of(net), torch.randn(9, 2), RankingNCE(), optim=Watched, num_steps=6, ema=0.7, **QUIET
    )
    shares = torch.tensor([0.7**k for k in range(5, -1, -1)], dtype=torch.float64)
    want = (shares / shares.sum()) @ torch.stack(seen).double()
    want = want.to(seen[0].dtype)
    names = [f"net$$${name}" for name, _ in net.named_parameters()]
    have = torch.cat([result.averaged[name].flatten() for name in names])
    torch.testing.assert_close(have, want, rtol=0, atol=1e-12)
    result.use_average()
    torch.testing.assert_close(flat(net), want, rtol=0, atol=1e-12)


def test_average_must_have_been_asked_for():
    result = fit(model_of(new_net()), torch.randn(9, 2), RankingNCE(), num_steps=1, **QUIET)
    with pytest.raises(ValueError, match="no average was kept"):
        result.use_average()


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradient_clip(clip):
    steps = {}
    for grad_clip in (None, clip):
        net = new_net()
        pyro.clear_param_store()
        options = {"optim": torch.optim.SGD, "lr": 1.0, "num_steps": 1, "seed": 0, **QUIET}
        fit(model_of(net), torch.randn(9, 2), RankingNCE(), grad_clip=grad_clip, **options)
        steps[grad_clip] = flat(new_net()) - flat(net)
    want = steps[None] * min(1.0, clip / steps[None].norm())
    torch.testing.assert_close(steps[clip], want, rtol=1e-4, atol=1e-9)


def test_validation_curve():
    """Loss per validation datum at its steps, with nothing learned from it."""
    net, data = new_net(), torch.randn(12, 2)
    objective = KALE()
    counted = []
    inner = objective.update_log_normalizer
    objective.update_log_normalizer = lambda *args: counted.append(inner(*args))
    result = fit(
        model_of(net),
        data,
        objective,
        batch_size=4,
        num_steps=7,
        validation=data[:6],
        validate_every=3,
        **QUIET,
    )
    assert [step for step, _ in result.validation] == [3, 6]
    assert all(math.isfinite(value) for _, value in result.validation)
    assert len(counted) == 7
    assert int(objective.num_steps_taken) == 7
    assert all(len(curve) == 7 for curve in result.diagnostics.values())


def test_validation_is_per_datum():
    objective = RankingNCE()
    objective.per_datum = lambda p, x, contrast, log_z: torch.full(x.shape[:-1], 2.5)
    data = torch.randn(12, 2)
    result = fit(
        model_of(new_net()),
        data,
        objective,
        batch_size=3,
        num_steps=1,
        validation=data[:5],
        validate_every=1,
        **QUIET,
    )
    assert result.losses == [pytest.approx(2.5)]
    assert result.validation == [(1, pytest.approx(2.5))]


def test_log_z_learns_ten_times_faster():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, *args):
            seen.extend(group["lr"] for group in self.param_groups for _ in group["params"])
            super().step(*args)

    fit(model_of(new_net()), torch.randn(9, 2), NCE(), optim=Watched, lr=0.01, num_steps=1, **QUIET)
    assert sorted(set(seen)) == [0.01, pytest.approx(0.1)]
    assert seen.count(0.01) == 4


def test_log_z_of_a_member_learns_faster_too():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, *args):
            seen.extend(group["lr"] for group in self.param_groups for _ in group["params"])
            super().step(*args)

    objective = PerSite({"x": NCE()})
    fit(
        model_of(new_net()),
        torch.randn(9, 2),
        objective,
        optim=Watched,
        lr=0.01,
        num_steps=1,
        **QUIET,
    )
    assert max(seen) == pytest.approx(0.1)


def test_progress_bar_shows_the_diagnostics(capsys):
    fit(model_of(new_net()), torch.randn(9, 2), NCE(), num_steps=2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "fit NCE" in shown.err
    assert "accuracy" in shown.err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "batch_size must be between 1 and 9, got 0"),
        ({"batch_size": 10}, "batch_size must be between 1 and 9, got 10"),
        ({"schedule": (1, 1)}, "NCE has no second player"),
        ({"data": (torch.zeros(9, 2), torch.zeros(8))}, r"must have one length, got \[8, 9\]"),
        ({"lr_schedule": ReduceLROnPlateau}, "ReduceLROnPlateau needs a curve to watch"),
        ({"patience": 2, "criterion": float, "validate_every": 2}, "there is none in 1 steps"),
    ],
)
def test_bad_arguments(options, match):
    options = {"data": torch.randn(9, 2), **options}
    with pytest.raises(ValueError, match=match):
        fit(model_of(new_net()), options.pop("data"), NCE(), num_steps=1, **options, **QUIET)


@pytest.mark.parametrize("optim", [torch.optim.LBFGS, partial(torch.optim.LBFGS, max_iter=2)])
def test_an_optimizer_that_wants_a_closure(optim):
    with pytest.raises(TypeError, match="LBFGS evaluates a closure as often as it likes"):
        fit(model_of(new_net()), torch.randn(9, 2), NCE(), optim=optim, **QUIET)


# --- which plate is over the rows


def with_features(x):
    """A plate that has the batch's size by chance, before the plate over rows."""
    with pyro.plate("features", 4):
        pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.arange(4.0))
    base = dist.Normal(0.0, 1.0)
    with pyro.plate("data", len(x)):
        pyro.sample("x", EnergyDistribution(lambda x: 0.1 * x**2, base, log_normalizer=0.0), obs=x)


def test_a_plate_of_the_batchs_size_by_chance_is_not_scaled():
    data, objective = torch.randn(12), RankingNCE(num_noise=1)
    rows = []
    inner = objective.per_datum
    objective.per_datum = lambda *args: rows.append(inner(*args)) or rows[-1]
    two_steps = {"guide": idle, "batch_size": 4, "num_steps": 2}
    result = fit(with_features, data, objective, **two_steps, **QUIET)
    features = -dist.Normal(0.0, 1.0).log_prob(torch.arange(4.0)).sum()
    for per_datum, loss in zip(rows, result.losses, strict=True):
        assert loss == pytest.approx(((3 * per_datum.sum() + features) / 12).item(), abs=1e-6)


def test_plates_that_do_not_follow_the_rows_are_refused():
    def model(x):
        with pyro.plate("features", 4):
            pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.arange(4.0))
        with pyro.plate("data", 4):
            pyro.sample("x", EnergyDistribution(lambda x: x**2, dist.Normal(0.0, 1.0)), obs=x)

    with pytest.raises(ValueError, match=r"\['data', 'features'\] have that size and none follows"):
        fit(model, torch.randn(12), RankingNCE(), batch_size=4, num_steps=1, **QUIET)


def test_the_schedule_of_a_fit_is_not_kept():
    objective = KALE(schedule=(2, 1))

    def model(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            ebm = EnergyDistribution(lambda x: slope * x, base=dist.Normal(0.0, 1.0))
            pyro.sample("x", ebm, obs=x)

    fit(model, torch.randn(12), objective, schedule=(1, 0), num_steps=2, **QUIET)
    assert objective.schedule == (2, 1)
    with pytest.raises(TypeError, match="Trace_ELBO has no two players"):
        fit(model, torch.randn(12), Trace_ELBO(), schedule=(1, 1), num_steps=1, **QUIET)


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "fit.pt"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a checkpoint of fit, or is damaged"):
        fit(with_features, torch.randn(12), RankingNCE(), checkpoint=path, num_steps=1, **QUIET)


def test_generators_of_devices_are_saved_once_cuda_is_in_use(monkeypatch):
    """With numbers for generators; ``tests/test_devices.py`` resumes a run where there is one."""
    generators = [torch.tensor([1]), torch.tensor([2])]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(generators))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", generators.extend)
    saved = checkpoint._rng_state()
    generators.clear()
    checkpoint._set_rng_state(saved)
    assert [int(g) for g in generators] == [1, 2]


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    fit(small_model, torch.randn(9, 2), NCE(), checkpoint=path, num_steps=1, **QUIET)

    def refused(*args, **options):
        raise PermissionError("not yours")

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError, match="not yours"):
        fit(small_model, torch.randn(9, 2), NCE(), checkpoint=path, num_steps=2, **QUIET)
