"""The handler: a site keeps everything but its density."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import Independent, constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.poutine import surrogate
from pyro_ebm.poutine.surrogate import SurrogateDistribution, SurrogateMessenger, _mask_of


class Recorder:
    """Scores every event by its first coordinate and remembers what it was asked."""

    is_likelihood = is_normalized = False

    def __init__(self, *, is_frozen=True, priors=None):
        self.is_frozen = is_frozen
        self.priors = priors or {}
        self.asked = []

    def free_log_normalizers(self):
        return self.priors

    def site_log_prob(self, name, p, x, **options):
        self.asked.append({"name": name, "p": p, "x": x, **options})
        rows = x.dim() - len(p.event_shape)
        return p.broadcast_value(x).flatten(rows)[..., 0] if p.event_shape else x


def vectors(**options):
    options = options or {"event_shape": (2,)}
    return EnergyDistribution(lambda x: x.square().sum(-1), **options)


def scalars():
    return EnergyDistribution(lambda x: x.square(), event_shape=())


def trace_of(model, *args, objective=None):
    handler = SurrogateMessenger(objective or Recorder())
    trace = poutine.trace(handler(model)).get_trace(*args)
    trace.compute_log_prob()
    return trace, handler


def test_only_the_density_changes():
    data = torch.arange(8.0).reshape(4, 2)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 20, subsample=torch.arange(4)), poutine.scale(scale=0.5):
            pyro.sample("x", vectors(), obs=data, infer={"key": 1})
        return z

    trace, handler = trace_of(model)
    raw = poutine.trace(model).get_trace()
    assert handler.used == ["x"]
    have, want = trace.nodes["x"], raw.nodes["x"]
    assert isinstance(have["fn"], SurrogateDistribution)
    for key in ("name", "scale", "mask", "is_observed", "infer", "cond_indep_stack"):
        assert have[key] == want[key], key
    assert have["value"] is want["value"]
    assert have["fn"].batch_shape == want["fn"].batch_shape == (4,)
    assert have["fn"].event_shape == want["fn"].event_shape == (2,)
    torch.testing.assert_close(have["unscaled_log_prob"], data[:, 0])
    torch.testing.assert_close(have["log_prob"], 2.5 * data[:, 0])
    assert isinstance(trace.nodes["z"]["fn"], dist.Normal)


@pytest.mark.parametrize("observed", [True, False])
def test_what_the_objective_is_told(observed):
    data = torch.ones(3)
    objective = Recorder(is_frozen=False)
    handler = SurrogateMessenger(objective, {"x": "the guide's law"}.get, fresh_noise=True)

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("x", scalars(), obs=data if observed else None)

    target = model if observed else poutine.condition(handler(model), {"x": data})
    poutine.trace(handler(model) if observed else target).get_trace().log_prob_sum()
    (asked,) = objective.asked
    assert asked["name"] == "x"
    assert asked["observed"] == observed
    assert asked["noise"] == ("the guide's law" if observed else None)
    assert asked["log_z"] is None
    assert asked["mask"] is None
    assert asked["p"].batch_shape == (3,)


def test_conditioned_from_inside_is_observed():
    objective = Recorder()

    def model():
        pyro.sample("x", scalars())

    trace_of(poutine.condition(model, {"x": torch.tensor(1.0)}), objective=objective)
    assert objective.asked[0]["observed"]


def wrappers():
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    first = x[..., 0]
    none = torch.zeros(())
    return {
        "plain": (lambda p: p, x, first),
        "to_event": (lambda p: p.to_event(1), x, first.sum(1)),
        "to_event twice": (lambda p: p.to_event(2), x, first.sum()),
        "mask": (lambda p: p.mask(mask), x, torch.where(mask, first, none)),
        "mask, to_event": (
            lambda p: p.mask(mask).to_event(1),
            x,
            torch.where(mask, first, none).sum(1),
        ),
        "to_event, mask": (
            lambda p: p.to_event(1).mask(mask[:, 0]),
            x,
            torch.where(mask[:, 0], first.sum(1), none),
        ),
        "two masks": (
            lambda p: p.mask(mask).to_event(1).mask(mask[:, 2]),
            x,
            torch.where(mask, first, none).sum(1),
        ),
        "true": (lambda p: p.mask(True), x, first),
        "false": (lambda p: p.mask(False), x, torch.zeros(2, 3)),
    }


@pytest.mark.parametrize("name", wrappers())
def test_wrappers_are_rebuilt(name):
    wrap, x, want = wrappers()[name]

    def model():
        fn = wrap(vectors().expand([2, 3]))
        with pyro.plate_stack("plates", fn.batch_shape):
            pyro.sample("x", fn, obs=x)

    trace, _ = trace_of(model)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], want)
    raw = poutine.trace(model).get_trace().nodes["x"]["fn"]
    assert type(trace.nodes["x"]["fn"]) is (SurrogateDistribution if name == "plain" else type(raw))


def test_masks_reach_the_objective():
    """Over the elements of the EBM, whatever said it."""
    inner = torch.tensor([[True, False, True], [False, True, True]])
    outer = torch.tensor([True, False])
    p = scalars().expand([2, 3])
    assert _mask_of(p, None) is None
    assert _mask_of(p.mask(True), None) is None
    assert torch.equal(_mask_of(p.mask(inner), None), inner)
    assert torch.equal(_mask_of(p, inner), inner)
    assert torch.equal(_mask_of(p.to_event(1), outer), outer[:, None])
    both = inner & outer[:, None]
    assert torch.equal(_mask_of(p.mask(inner).to_event(1), outer), both)
    assert torch.equal(_mask_of(p.mask(inner).to_event(1).mask(outer), True), both)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert _mask_of(p.mask(nothing), None).all()  # the handler's result is masked anyway


def test_padding_is_replaced_before_it_is_validated_or_scored():
    x = torch.tensor([[float("nan"), 1.0], [3.0, 4.0], [5.0, 6.0], [7.0, float("nan")]])
    mask = torch.tensor([False, False, True, False])
    objective = Recorder()

    def model():
        with pyro.plate("rows", 4), poutine.mask(mask=mask):
            pyro.sample("x", vectors(event_shape=(2,), validate_args=True), obs=x)

    trace, _ = trace_of(model, objective=objective)
    torch.testing.assert_close(objective.asked[0]["x"], x[2].expand(4, 2))
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], torch.tensor([0.0, 0.0, 5.0, 0.0]))
    assert torch.equal(trace.nodes["x"]["value"].isnan(), x.isnan())  # the trace keeps the data


def test_values_with_gradients_are_left_alone():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    mask = torch.tensor([True, False])
    law = SurrogateDistribution(scalars(), lambda p, x: x, mask)
    assert law.without_padding(x) is x
    assert law.without_padding(x.detach()).tolist() == [1.0, 1.0]


def test_distribution_is_the_ebms_in_all_but_density():
    p = EnergyDistribution(
        lambda x: x,
        event_shape=(),
        support=constraints.positive,
        sampler=lambda d, s: torch.ones(s),
    )
    law = SurrogateDistribution(p, lambda p, x: -x)
    assert law.support is p.support
    assert law.base_measure == p.base_measure
    assert law.sample((3,)).tolist() == [1.0, 1.0, 1.0]
    assert not law.has_rsample
    wide = law.expand([4, 2])
    assert isinstance(wide, SurrogateDistribution)
    assert wide.batch_shape == wide.p.batch_shape == (4, 2)
    assert wide.log_prob(torch.full((4, 2), 2.0)).tolist() == [[-2.0, -2.0]] * 4
    assert isinstance(wide.to_event(1), Independent)


def test_expanded_distribution_keeps_its_mask():
    p = EnergyDistribution(lambda x: x, event_shape=(), validate_args=True)
    mask = torch.tensor([True, False])
    wide = SurrogateDistribution(p.expand([2]), lambda p, x: -x, mask).expand([3, 2])
    assert wide.mask is mask
    x = torch.tensor([[1.0, float("nan")]] * 3)
    assert wide.log_prob(x).tolist() == [[-1.0, -1.0]] * 3


def test_validation_is_the_ebms():
    p = EnergyDistribution(
        lambda x: x, event_shape=(), support=constraints.positive, validate_args=True
    )
    with pytest.raises(ValueError, match="within the support"):
        SurrogateDistribution(p, lambda p, x: x).log_prob(torch.tensor(-1.0))


# --- many sites


def two_sites():
    pyro.sample("x", scalars(), obs=torch.tensor(1.0))
    pyro.sample("y", scalars(), obs=torch.tensor(2.0))


def test_a_mapping_routes_sites():
    objectives = {"x": Recorder(), "y": Recorder()}
    poutine.trace(surrogate(two_sites, objectives)).get_trace().log_prob_sum()
    assert [asked["name"] for asked in objectives["x"].asked] == ["x"]
    assert [asked["name"] for asked in objectives["y"].asked] == ["y"]


def test_a_site_without_an_entry():
    with pytest.raises(ValueError, match=r"no objective for EBM site 'y'; .*for \['x'\]"):
        surrogate(two_sites, {"x": Recorder()})()


def test_log_z_of_a_frozen_objective_is_drawn_once_outside_plates():
    objective = Recorder(priors={"x": dist.Normal(3.0, 1e-9), "y": dist.Normal(-3.0, 1e-9)})

    def model():
        with pyro.plate("rows", 4):
            pyro.sample("x", scalars(), obs=torch.ones(4))

    trace = poutine.trace(surrogate(model, objective)).get_trace()
    trace.log_prob_sum()
    assert trace.nodes["x_log_normalizer"]["value"].shape == ()
    assert objective.asked[0]["log_z"].item() == pytest.approx(3.0)


def test_every_member_brings_its_own_log_z_only():
    """An objective that froze the whole model knows of sites that another one serves."""
    everything = {site: dist.Normal(3.0, 1.0) for site in "xy"}
    objectives = {"x": Recorder(priors=everything), "y": Recorder()}
    nodes = poutine.trace(surrogate(two_sites, objectives)).get_trace().nodes
    assert "x_log_normalizer" in nodes
    assert "y_log_normalizer" not in nodes
    nodes = poutine.trace(
        surrogate(two_sites, {"x": Recorder(priors=everything), "y": Recorder(priors=everything)})
    )
    assert {"x_log_normalizer", "y_log_normalizer"} < set(nodes.get_trace().nodes)


def test_log_z_is_shared_by_the_rows_of_vectorized_draws():
    objective = Recorder(priors={"x": dist.Normal(0.0, 1.0)})

    def model():
        with pyro.plate("rows", 4):
            pyro.sample("x", scalars(), obs=torch.ones(4))

    with pyro.plate("draws", 3, dim=-2):
        surrogate(model, objective)()
        trace = poutine.trace(surrogate(model, objective)).get_trace()
    trace.log_prob_sum()
    assert objective.asked[-1]["log_z"].shape == (3, 1)


def test_handler_can_be_used_again():
    handler = SurrogateMessenger(Recorder())
    for _ in range(2):
        poutine.trace(handler(two_sites)).get_trace()
        assert handler.used == ["x", "y"]


# --- fresh noise


def test_unfrozen_objectives_are_refused_outside_an_elbo():
    trace = poutine.trace(surrogate(two_sites, Recorder(is_frozen=False))).get_trace()
    with pytest.raises(RuntimeError, match=r"'x' draws fresh noise .*objective\.freeze\(model"):
        trace.log_prob_sum()


def test_unfrozen_objectives_are_taken_inside_one():
    objective = Recorder(is_frozen=False)
    elbo = pyro.infer.Trace_ELBO()
    loss = elbo.loss(surrogate(two_sites, objective), lambda: None)
    assert loss == -3.0
    assert len(objective.asked) == 2


def test_latents_of_a_frozen_objective_keep_their_law():
    def model():
        pyro.sample("z", scalars(), infer={"key": 1})

    handler = SurrogateMessenger(Recorder())
    fn = poutine.trace(poutine.condition(handler(model), {"z": torch.ones(())})).get_trace()
    assert isinstance(fn.nodes["z"]["fn"], EnergyDistribution)
    assert handler.used == []
