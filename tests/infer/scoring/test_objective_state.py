"""What an objective keeps: log Z and when it is out of date, copies of itself, its place in a torch
loop.
"""

from __future__ import annotations

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyro_ebm.distributions import EnergyDistribution, GeneralizedEBM
from pyro_ebm.energies import GaussianEnergy
from pyro_ebm.errors import MissingNormalizerError, SurrogateWarning
from pyro_ebm.infer import KALE, NCE, EnergyDiscrepancy, PerSite, RankingNCE

NOISE = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.5)


def no_guide(*args):
    return None


class Precision(nn.Module):
    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return 0.5 * self.value * x**2


def site(x, ebm):
    with pyro.plate("data", len(x)):
        pyro.sample("x", ebm, obs=x)


def with_module(x, net):
    pyro.module("net", net)
    site(x, EnergyDistribution(net, event_shape=()))


def with_closure(x, net):
    precision = pyro.param("precision", torch.tensor(2.0), constraint=dist.constraints.positive)
    site(x, EnergyDistribution(lambda x: 0.5 * precision * x**2, event_shape=()))


def with_tensor_in_a_module(x, net):
    loc = pyro.param("loc", torch.tensor(0.3))
    site(x, EnergyDistribution(GaussianEnergy(loc) + (lambda x: 0.0 * x), event_shape=()))


def with_learned_base(x, net):
    loc = pyro.param("loc", torch.tensor(0.3))
    base = dist.Normal(loc, 1.0)
    site(x, EnergyDistribution(lambda x: 0.1 * x**2, base=base))


def with_generator(x, net):
    shift = pyro.param("shift", torch.tensor(0.3))
    slope = pyro.param("slope", torch.tensor(0.2))
    prior = dist.Normal(torch.tensor(0.0), 1.0)
    ebm = GeneralizedEBM(lambda z: z + shift, prior, lambda x: slope * x**2, event_shape=())
    site(x, ebm)


MODELS = [with_module, with_closure, with_tensor_in_a_module, with_learned_base]


def svi_for(model, objective, net):
    return SVI(lambda x: model(x, net), no_guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)


@pytest.mark.parametrize("without_gradients", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_log_z_goes_stale_with_a_step(model, without_gradients):
    objective, x = NCE(num_noise=3, noise=NOISE), torch.randn(40)
    svi = svi_for(model, objective, Precision())
    svi.step(x)
    with torch.set_grad_enabled(not without_gradients):
        z = objective.log_normalizer("x")
    assert not z.is_stale
    assert z.method == "NCE"
    svi.evaluate_loss(x)
    assert not z.is_stale
    svi.step(x)
    assert z.is_stale
    assert not objective.log_normalizer("x").is_stale


@pytest.mark.parametrize("turn", [(1, 0), (0, 1)])
def test_log_z_of_a_gebm_goes_stale_with_its_generator(turn):
    objective, x = KALE(schedule=(1, 0)), torch.randn(40)
    svi = svi_for(with_generator, objective, None)
    svi.step(x)
    z = objective.log_normalizer("x")
    objective.schedule = turn
    svi.step(x)
    assert z.is_stale


def test_frozen_parameters_count_too():
    """Thawed later, they move what was estimated."""
    net, x = Precision().eval(), torch.randn(40)
    net.value.requires_grad_(False)
    objective = NCE(num_noise=3, noise=NOISE)
    objective.differentiable_loss(lambda x: with_module(x, net), no_guide, x)
    z = objective.log_normalizer("x")
    with torch.no_grad():
        net.value.add_(1.0)
    assert z.is_stale


def test_log_z_is_handed_on_to_the_distribution():
    net, x = Precision(), torch.randn(2000)
    objective = NCE(num_noise=10, noise=NOISE)
    svi = svi_for(with_module, objective, net)
    for _ in range(150):
        svi.step(x)
    ebm = EnergyDistribution(net, event_shape=())
    known = ebm.with_log_normalizer(objective.log_normalizer("x"))
    assert known.is_normalized
    exact = dist.Normal(0.0, net.value.detach() ** -0.5).log_prob(x)
    assert (known.log_prob(x) - exact).abs().max() < 0.1
    with pytest.raises(MissingNormalizerError, match="constant"):
        known.log_prob(x).sum().backward()
    svi.step(x)
    assert not known.is_normalized


def test_unknown_sites_are_named():
    objective = NCE(noise=NOISE)
    with pytest.raises(KeyError, match="no log Z was learned for site 'x'; .*none"):
        objective.log_normalizer("x")
    objective.differentiable_loss(lambda x: with_module(x, Precision()), no_guide, torch.randn(5))
    with pytest.raises(KeyError, match=r"'y'; sites evaluated so far: \['x'\]"):
        objective.log_normalizer("y")
    with pytest.raises(KeyError, match="no log Z was learned"):
        RankingNCE().log_normalizer("x")


def test_sites_with_dots_in_their_names():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("block.x", EnergyDistribution(Precision(), event_shape=()), obs=x)

    objective = NCE(noise=NOISE)
    objective.differentiable_loss(model, no_guide, torch.randn(5))
    assert objective.log_normalizer("block.x").value.isfinite()


# --- whose log Z is used


def precision_learned_with(log_normalizer, objective):
    x = 1.0 * torch.randn(4000)
    x = x / x.std()
    pyro.set_rng_seed(0)

    def model(x):
        a = pyro.param("a", torch.tensor(1.5))
        ebm = EnergyDistribution(
            lambda x: 0.5 * a * x**2, event_shape=(), log_normalizer=log_normalizer(a)
        )
        site(x, ebm)

    svi = SVI(model, no_guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    for _ in range(150):
        svi.step(x)
    return pyro.param("a").item()


def exact(a):
    return 0.5 * torch.log(2 * torch.pi / a)


@pytest.mark.parametrize(
    "log_normalizer",
    [
        lambda a: 0.0,
        lambda a: torch.tensor(0.0),
        lambda a: exact(a.detach()),
        lambda a: lambda: exact(a),
        exact,
        lambda a: None,
    ],
    ids=["number", "tensor", "detached", "function", "graph", "none"],
)
def test_constants_do_not_bend_the_energy(log_normalizer):
    """Data of precision 1. Believing log Z = 0 would find the precision 2 pi; a constant is never
    believed.
    """
    objective = NCE(num_noise=5, noise=NOISE)
    assert precision_learned_with(log_normalizer, objective) == pytest.approx(1.0, abs=0.1)


def test_a_function_is_taken_at_its_word():
    """A function that says log Z = 0 makes a self-normalized model, with another precision than the
    data's.
    """
    objective = NCE(num_noise=5, noise=NOISE)
    found = precision_learned_with(lambda a: lambda: torch.zeros(()), objective)
    assert abs(found - 1.0) > 0.3
    assert not objective.log_normalizers


def test_own_log_z_is_trained_with_the_site():
    c = torch.tensor(0.3, requires_grad=True)
    ebm = EnergyDistribution(Precision(), event_shape=(), log_normalizer=c)
    objective = NCE(num_noise=5, noise=NOISE)
    loss = objective.differentiable_loss(lambda x: site(x, ebm), no_guide, torch.randn(20))
    assert torch.autograd.grad(loss, c)[0].abs() > 0
    assert not objective.log_normalizers


def test_validation_without_gradients_uses_the_sites_graph():
    """Under no_grad no tensor has a graph; that does not make the site's log Z a constant."""
    c = torch.tensor(0.3, requires_grad=True)

    def model(x):
        ebm = EnergyDistribution(Precision(), event_shape=(), log_normalizer=2 * c)
        site(x, ebm)

    losses = []
    for enabled in (True, False):
        pyro.set_rng_seed(0)
        objective = NCE(num_noise=5, noise=NOISE)
        with torch.set_grad_enabled(enabled):
            loss = objective.differentiable_loss(model, no_guide, torch.ones(20))
        losses.append(loss.item())
        assert not objective.log_normalizers
    assert losses[0] == losses[1]


# --- torch loops


def test_parameters_of_the_module_have_log_z():
    net, x = Precision(), torch.randn(30)
    model = Wrapped(net)
    objective = NCE(noise=NOISE)
    module = objective(model, no_guide)
    before = dict(module.named_parameters())
    with pytest.warns(SurrogateWarning, match="site 'x'.* on data once before parameters"):
        module(x)
    after = dict(module.named_parameters())
    assert set(after) - set(before) == {"elbo.log_normalizers.x"}
    assert after["elbo.log_normalizers.x"] is objective.log_normalizers["x"]


class Based(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        site(x, EnergyDistribution(self.net, base=NOISE))


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        site(x, EnergyDistribution(self.net, event_shape=()))


@pytest.mark.parametrize(
    "objective",
    [
        RankingNCE(),
        KALE(),
        EnergyDiscrepancy(),
        NCE(c_update="closed_form"),
        PerSite({"x": RankingNCE()}),
    ],
    ids=lambda o: type(o).__name__,
)
def test_no_warning_where_no_log_z_is_trained(objective):
    module = objective(Based(Precision()), no_guide)
    assert dict(module.named_parameters())
    module(torch.randn(50))


def test_warning_of_a_member():
    module = PerSite({"x": NCE(noise=NOISE)})(Wrapped(Precision()), no_guide)
    list(module.parameters())
    with pytest.warns(SurrogateWarning, match="site 'x'.*log Z is never optimized"):
        module(torch.randn(5))


class WithOwnLogZ(Wrapped):
    def __init__(self):
        super().__init__(Precision())
        self.c = nn.Parameter(torch.tensor(0.1))

    def forward(self, x):
        site(x, EnergyDistribution(self.net, event_shape=(), log_normalizer=lambda: self.c))


def test_no_warning_where_the_site_has_its_own_log_z():
    """Nothing is created, so nothing can be missing from the optimizer."""
    module = NCE(noise=NOISE)(WithOwnLogZ(), no_guide)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    module(torch.randn(30)).backward()
    optimizer.step()
    assert module.model.c.item() != pytest.approx(0.1, abs=1e-6)


def test_no_warning_after_a_first_call():
    """Evaluated once, or listed anew after the first list was too early."""
    module, x = NCE(noise=NOISE)(Wrapped(Precision()), no_guide), torch.randn(30)
    list(module.parameters())
    with torch.no_grad():
        module(x)
    assert "elbo.log_normalizers.x" in dict(module.named_parameters())
    module(x)


# --- copies and files


def trained(objective, x):
    objective.differentiable_loss(lambda x: with_closure(x, None), no_guide, x)
    return objective


def test_a_copy_has_a_log_z_of_its_own():
    """The copy's gradient and step are its own, although one parameter store knows both."""
    x = torch.randn(20)
    first = trained(NCE(num_noise=3, noise=NOISE), x)
    second = copy.deepcopy(first)
    before = first.log_normalizers["x"].item()
    with pytest.raises(KeyError, match="'x'; sites evaluated so far: none"):
        second.log_normalizer("x")
    svi = svi_for(with_closure, second, None)
    svi.step(x)
    assert first.log_normalizers["x"].item() == before
    assert second.log_normalizers["x"].item() != before
    assert second.log_normalizer("x").value.item() == second.log_normalizers["x"].item()


def test_a_copy_does_not_take_over_the_firsts_log_z_from_the_store():
    x = torch.randn(20)
    first = NCE(num_noise=3, noise=NOISE)
    svi_for(with_closure, first, None).step(x)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.log_normalizers["x"].fill_(9.0)
    svi_for(with_closure, second, None).step(x)
    svi_for(with_closure, first, None).step(x)
    assert second.log_normalizers["x"].item() == pytest.approx(9.0, abs=0.06)
    assert first.log_normalizers["x"].item() < 8.0
    names = {objective.parameter_prefix + "x" for objective in (first, second)}
    assert len(names) == 2
    assert names <= set(pyro.get_param_store())


def test_state_dict_into_a_new_objective():
    x = torch.randn(20)
    first = trained(NCE(num_noise=3, noise=NOISE), x)
    with torch.no_grad():
        first.log_normalizers["x"].fill_(7.0)
    second = NCE(num_noise=3, noise=NOISE)
    second.load_state_dict(first.state_dict())
    assert int(second.num_steps_taken) == 1
    trained(second, x)
    assert second.log_normalizers["x"].item() == 7.0
    module = second(with_closure, no_guide)
    assert [p for _, p in module.named_parameters()] == [second.log_normalizers["x"]]


def test_fitted_noise_is_part_of_the_state():
    first = NCE(noise="gaussian")

    def model(x):
        ebm = EnergyDistribution(lambda x: x.square().sum(-1), event_shape=(2,))
        site(x, ebm)

    first.differentiable_loss(model, no_guide, torch.randn(50, 2) + 3)
    second = NCE(noise="gaussian")
    second.load_state_dict(first.state_dict())
    laws = [objective.noise_of("x") for objective in (first, second)]
    assert torch.equal(laws[0].loc, laws[1].loc)
    assert torch.equal(laws[0].scale_tril, laws[1].scale_tril)
    assert list(first.state_dict()["_extra_state"]) == ["x"]
    assert NCE(noise=NOISE).state_dict()["_extra_state"] == {}


def test_a_loaded_parameter_store_is_respected():
    """The store's value is what is trained and reported."""
    x, objective = torch.randn(20), NCE(num_noise=3, noise=NOISE)
    svi = svi_for(with_closure, objective, None)
    svi.step(x)
    store = pyro.get_param_store()
    with torch.no_grad():
        objective.log_normalizers["x"].fill_(5.0)
    buffer = io.BytesIO()
    torch.save(store.get_state(), buffer)
    with torch.no_grad():
        objective.log_normalizers["x"].fill_(-5.0)
    buffer.seek(0)
    store.set_state(torch.load(buffer, weights_only=False))
    svi.step(x)
    assert objective.log_normalizer("x").value.item() == pytest.approx(5.0, abs=0.06)
    assert objective.log_normalizers["x"].item() != 5.0


def test_clearing_the_parameter_store_keeps_log_z():
    x, objective = torch.randn(20), NCE(num_noise=3, noise=NOISE)
    svi_for(with_closure, objective, None).step(x)
    before = objective.log_normalizers["x"].item()
    pyro.clear_param_store()
    svi_for(with_closure, objective, None).step(x)
    assert objective.log_normalizers["x"].item() == pytest.approx(before, abs=0.06)


def test_two_objectives_do_not_share_a_log_z():
    x = torch.randn(20)
    first, second = (NCE(num_noise=3, noise=NOISE) for _ in range(2))
    svi_for(with_closure, first, None).step(x)
    svi_for(with_closure, second, None).step(x)
    assert first.log_normalizers["x"] is not second.log_normalizers["x"]
    assert first.parameter_prefix != second.parameter_prefix
