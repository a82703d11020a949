"""What holds for every energy and every argument: shapes, dtypes, gradients, vmap, tracing."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_ebm.energies import (
    Banana,
    ConvEnergy,
    DoubleWell,
    Energy,
    Funnel,
    GaussianEnergy,
    GaussianMixtureEnergy,
    MLPEnergy,
    Quartic,
    ScaledEnergy,
    check_energy_shape,
)
from pyro_ebm.typing import Tractable


class Case(NamedTuple):
    """How to build an energy, example arguments of one batch element, and its event shape."""

    build: object
    arguments: dict
    event_shape: tuple
    tractable: bool = True


CASES = {
    "gaussian, scalar": Case(GaussianEnergy, {"loc": 0.5, "scale": 2.0}, ()),
    "gaussian, diagonal": Case(
        lambda **args: GaussianEnergy(**args, event_dim=1),
        {"loc": [0.5, -1.0, 0.0], "scale": [1.0, 2.0, 0.5]},
        (3,),
    ),
    "gaussian, full": Case(
        GaussianEnergy,
        {"loc": [0.5, -1.0], "scale": [1.0, 2.0], "precision_matrix": [[2.0, 0.5], [0.5, 1.0]]},
        (2,),
    ),
    "mixture": Case(
        GaussianMixtureEnergy,
        {
            "locs": [[0.0, 1.0], [2.0, 0.0], [-1.0, -1.0]],
            "scales": [0.5, 1.0, 0.7],
            "weights": [0.2, 0.5, 0.6],
        },
        (2,),
    ),
    "double well, scalar": Case(DoubleWell, {"height": 3.0}, ()),
    "double well, matrix": Case(
        lambda **args: DoubleWell(**args, event_shape=(2, 3)), {"height": 3.0}, (2, 3)
    ),
    "quartic, scalar": Case(Quartic, {"quartic": 0.7, "quadratic": -1.2}, ()),
    "quartic, vector": Case(
        lambda **args: Quartic(**args, event_shape=(3,)), {"quartic": 0.7, "quadratic": 0.4}, (3,)
    ),
    "banana": Case(Banana, {"curvature": 0.7, "scale": 1.5}, (2,)),
    "funnel": Case(lambda **args: Funnel(4, **args), {"scale": 2.0}, (4,)),
    "scaled": Case(
        lambda scale: ScaledEnergy(Funnel(3), scale), {"scale": 0.3}, (3,), tractable=False
    ),
    "mlp": Case(
        lambda **args: MLPEnergy((2, 3), (8,), **args),
        {"confinement": 0.2},
        (2, 3),
        tractable=False,
    ),
    "mlp, scalar": Case(
        lambda **args: MLPEnergy((), (8,), **args), {"confinement": 0.2}, (), tractable=False
    ),
    "conv": Case(
        lambda **args: ConvEnergy((8, 8), (4, 8), **args),
        {"confinement": 0.2},
        (8, 8),
        tractable=False,
    ),
}
ARGUMENTS = [(name, arg) for name, case in CASES.items() for arg in case.arguments]
TRACTABLE = [name for name, case in CASES.items() if case.tractable]
NETWORKS = ("mlp", "mlp, scalar", "conv")
BATCHES = ((), (3,), (5, 1), (5, 1, 1))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def arguments(case: Case, batch: tuple = ()) -> dict[str, Tensor]:
    """Returns the example arguments as tensors under batch dims, every element a bit different."""
    values = {}
    for name, value in case.arguments.items():
        tensor = torch.tensor(value)
        factor = 1.0 + 0.1 * torch.rand(batch)
        values[name] = tensor * factor.reshape(batch + (1,) * tensor.dim())
    return values


def build(name: str, batch: tuple = ()) -> Energy:
    return CASES[name].build(**arguments(CASES[name], batch))


def points(name: str, batch: tuple) -> Tensor:
    return torch.randn(batch + CASES[name].event_shape)


def with_argument(name: str, arg: str, value: Tensor) -> Energy:
    return CASES[name].build(**{**arguments(CASES[name]), arg: value})


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_batched_parameters_broadcast_from_the_right(name, batch):
    energy = build(name, batch)
    for x_batch in ((), (3,), (1,), (5, 3), (5, 1), (5, 5, 3)):
        x = points(name, x_batch)
        value = energy(x)
        assert value.shape == torch.broadcast_shapes(batch, x_batch)
        assert check_energy_shape(value, x, len(CASES[name].event_shape), energy=energy) is value


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_batch_equals_loop(name, batch):
    case = CASES[name]
    full = arguments(case, batch)
    torch.manual_seed(0)
    energy = case.build(**full)
    x = points(name, (5, 3))
    values = energy(x).expand(torch.broadcast_shapes(batch, (5, 3)))
    flat = {arg: v.reshape(-1, *torch.tensor(case.arguments[arg]).shape) for arg, v in full.items()}
    index = torch.arange(max(1, torch.Size(batch).numel())).reshape(batch)
    index = index.expand(values.shape)
    for i in range(index.max() + 1):
        torch.manual_seed(0)
        single = case.build(**{arg: v[i] for arg, v in flat.items()})
        torch.testing.assert_close(
            values[index == i], single(x).expand(values.shape)[index == i], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("name", "arg"), ARGUMENTS)
def test_tensor_is_kept_and_gradient_reaches_it(name, arg):
    leaf = arguments(CASES[name])[arg].requires_grad_()
    latent = leaf * 1.0
    energy = with_argument(name, arg, latent)
    assert getattr(energy, arg) is latent
    assert arg not in dict(energy.named_parameters())
    (slope,) = torch.autograd.grad(energy(points(name, (6,))).sum(), leaf)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize(("name", "arg"), ARGUMENTS)
def test_parameter_is_registered_and_gradient_reaches_it(name, arg):
    parameter = nn.Parameter(arguments(CASES[name])[arg])
    energy = with_argument(name, arg, parameter)
    assert dict(energy.named_parameters())[arg] is parameter
    energy(points(name, (6,))).sum().backward()
    assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "arg"), ARGUMENTS)
def test_functorch_sees_the_argument(name, arg):
    x, value = points(name, (6,)), arguments(CASES[name])[arg]

    def total(value):
        torch.manual_seed(0)
        return with_argument(name, arg, value)(x).sum()

    torch.manual_seed(1)
    others = arguments(CASES[name])
    del others[arg]

    def at(value):
        torch.manual_seed(0)
        return CASES[name].build(**others, **{arg: value})(x).sum()

    stack = torch.stack([value, 1.1 * value])
    values = [at(v) for v in stack]
    slopes = [torch.autograd.functional.jacobian(at, v) for v in stack]
    if name in NETWORKS:  # making weights draws random numbers, which vmap refuses by default
        torch.testing.assert_close(grad(at)(value), slopes[0])
    else:
        torch.testing.assert_close(vmap(at)(stack), torch.stack(values))
        torch.testing.assert_close(vmap(grad(at))(stack), torch.stack(slopes))


def test_the_contract_sees_a_parameter_that_cuts_the_graph():
    class Cut(Energy):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            self.scale = nn.Parameter(scale)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x.square()

    leaf = torch.tensor(2.0, requires_grad=True)
    energy = Cut(leaf * 1.0)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(energy(torch.ones(3)).sum(), leaf)


NUMBERS = {
    "gaussian": lambda: GaussianEnergy(0.5, 2.0),
    "mixture": lambda: GaussianMixtureEnergy(torch.zeros(3, 2), 0.5),
    "double well": lambda: DoubleWell(3.0),
    "quartic": lambda: Quartic(0.7, 0.2),
    "banana": lambda: Banana(0.7, 1.5),
    "funnel": lambda: Funnel(2, 3.0),
    "scaled": lambda: 0.5 * Banana(0.7, 1.5),
    "sum": lambda: Banana(0.7, 1.5) + Funnel(2),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_follow_the_dtype_of_x(name, default, dtype):
    torch.set_default_dtype(torch.float32 if name == "mixture" else default)
    energy = NUMBERS[name]()
    event_shape = energy.event_shape
    for batch in ((), (4,)):
        x = torch.ones(batch + event_shape, dtype=dtype)
        assert energy(x).dtype == dtype
        if event_shape == ():
            assert vmap(energy)(torch.ones(3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", TRACTABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_closed_forms_follow_the_dtype_of_tensors(name, dtype):
    energy = build(name).to(dtype)
    assert energy(points(name, (3,)).to(dtype)).dtype == dtype
    assert energy.log_normalizer().dtype == dtype
    assert energy.sample((2,)).dtype == dtype


def test_numbers_become_buffers_of_the_default_dtype():
    energy = DoubleWell(3)
    assert dict(energy.named_buffers())["height"].dtype == torch.float64
    assert not list(energy.parameters())


@pytest.mark.parametrize("name", CASES)
def test_vmap_of_the_gradient_and_its_graph(name):
    energy = build(name)
    x = points(name, (5,))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(leaf).sum(), leaf)
    torch.testing.assert_close(vmap(grad(energy))(x), expected, rtol=1e-10, atol=1e-10)
    graph = make_fx(lambda q: vmap(grad(energy))(q))(x)
    fresh = points(name, (5,))
    torch.testing.assert_close(graph(fresh), vmap(grad(energy))(fresh), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_energies_are_twice_differentiable(name):
    x = points(name, ())
    curvature = jacrev(grad(build(name)))(x)
    assert curvature.shape == x.shape + x.shape
    assert curvature.isfinite().all()
    assert curvature.abs().sum() > 0


@pytest.mark.parametrize("name", CASES)
def test_tractable_says_so(name):
    energy = build(name)
    assert isinstance(energy, Tractable) == CASES[name].tractable
    if CASES[name].tractable:
        assert energy.event_shape == torch.Size(CASES[name].event_shape)
        assert energy.support.event_dim == len(energy.event_shape)
        assert not isinstance(energy.support, type(constraints.positive))


@pytest.mark.parametrize("name", TRACTABLE)
def test_algebra_drops_the_closed_forms(name):
    energy = build(name)
    for result in (energy + energy, energy + torch.sin, 2.0 * energy, energy / 2.0):
        assert not isinstance(result, Tractable)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", TRACTABLE)
def test_closed_forms_have_the_shape_of_the_batch(name, batch):
    energy = build(name, batch)
    assert energy.log_normalizer().shape == batch
    for shape in ((), (2,), torch.Size((2, 3))):
        assert energy.sample(shape).shape == (*shape, *batch, *energy.event_shape)


@pytest.mark.parametrize("name", TRACTABLE)
def test_samples_carry_no_graph_and_repeat_under_a_seed(name):
    energy = build(name).requires_grad_()
    torch.manual_seed(1)
    first = energy.sample((3,))
    torch.manual_seed(1)
    assert torch.equal(first, energy.sample((3,)))
    assert not first.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_wrong_event_shape_is_an_error(name):
    event_shape = CASES[name].event_shape
    if not event_shape:
        return
    with pytest.raises(ValueError, match=r"takes inputs of shape \(\.\.\., .*, got \(7, 1\)"):
        build(name)(torch.zeros(7, 1))


@pytest.mark.parametrize("name", CASES)
def test_state_dict_and_deepcopy(name):
    energy, other = build(name), build(name)
    other.load_state_dict(energy.state_dict())
    x = points(name, (3,))
    assert torch.equal(other(x), energy(x))
    assert torch.equal(copy.deepcopy(energy)(x), energy(x))


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name):
    assert build(name)(points(name, (0, 3))).shape == (0, 3)
