"""Heat kernels against the exponential of their rates, and against walks."""

import math

import pytest
import torch

from pyro_ebm.ops.heat_kernels import heat_kernel, rates

STRUCTURES = ["uniform", "cyclic", "ordinal", "absorbing"]
TIMES = torch.tensor([[0.0, 1e-6, 0.03], [0.7, 3.0, 40.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double_precision(fresh_state):
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("num", [2, 3, 7, 16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_is_the_exponential_of_its_rates(structure, num):
    want = torch.matrix_exp(TIMES[..., None, None] * rates(structure, num))
    torch.testing.assert_close(heat_kernel(structure, num, TIMES), want, rtol=0, atol=1e-12)


def slow_rates(structure, num):
    """Edge by edge; the mask is the last value, and a ring of two has two edges between them."""
    edges = {
        "uniform": [(i, j, 1 / num) for i in range(num) for j in range(num) if i != j],
        "cyclic": [(i, (i + step) % num, 1.0) for i in range(num) for step in (-1, 1)],
        "ordinal": [(i, j, 1.0) for i in range(num) for j in (i - 1, i + 1) if 0 <= j < num],
        "absorbing": [(i, num, 1.0) for i in range(num)],
    }
    r = torch.zeros(num + (structure == "absorbing"), num + (structure == "absorbing"))
    for i, j, rate in edges[structure]:
        r[i, j] += rate
        r[i, i] -= rate
    return r


@pytest.mark.parametrize("num", [2, 3, 5])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_rates_edge_by_edge(structure, num):
    torch.testing.assert_close(rates(structure, num), slow_rates(structure, num))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_rows_are_laws_and_times_add_up(structure):
    one, two = (heat_kernel(structure, 5, torch.tensor(t)) for t in (0.4, 1.1))
    torch.testing.assert_close(one.sum(-1), torch.ones(len(one)), rtol=0, atol=1e-14)
    assert one.min() > -1e-15
    both = heat_kernel(structure, 5, torch.tensor(1.5))
    torch.testing.assert_close(one @ two, both, rtol=0, atol=1e-13)


@pytest.mark.parametrize("structure", ["cyclic", "ordinal"])
def test_variance_of_a_walk(structure):
    """2 t, from the middle of a graph whose ends are far."""
    row = heat_kernel(structure, 101, torch.tensor(3.0))[50]
    steps = torch.arange(101) - 50.0
    assert float(row @ steps) == pytest.approx(0.0, abs=1e-12)
    assert float(row @ steps**2) == pytest.approx(6.0, abs=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_long_times_forget_the_start(structure):
    kernel = heat_kernel(structure, 4, torch.tensor(200.0))
    want = torch.full((4, 4), 0.25)
    if structure == "absorbing":
        want = torch.eye(5)[4].expand(5, 5)
    torch.testing.assert_close(kernel, want, rtol=0, atol=1e-14)


def test_small_times_keep_their_digits():
    """Off the diagonal t / S, to relative precision."""
    kernel = heat_kernel("uniform", 3, torch.tensor(1e-13))
    assert float(kernel[0, 1]) == pytest.approx(1e-13 / 3, rel=1e-10)
    mask = heat_kernel("absorbing", 3, torch.tensor(1e-13))[0, 3]
    assert float(mask) == pytest.approx(1e-13, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_dtype_of_the_time(structure, dtype):
    kernel = heat_kernel(structure, 3, torch.tensor([0.2, 0.5], dtype=dtype))
    assert kernel.dtype is dtype
    assert kernel.shape[0] == 2


def test_what_is_refused():
    with pytest.raises(ValueError, match="structure must be one of .* got 'grid'"):
        heat_kernel("grid", 3, torch.tensor(1.0))
    with pytest.raises(ValueError, match="num_values must be at least 2"):
        rates("cyclic", 1)


def test_flip_probability_of_two_values():
    """(1 - e^-t) / 2 where uniform; (1 - e^-4t) / 2 on the ring, whose two edges are one."""
    t = torch.tensor(0.3)
    assert float(heat_kernel("uniform", 2, t)[0, 1]) == pytest.approx((1 - math.exp(-0.3)) / 2)
    assert float(heat_kernel("cyclic", 2, t)[0, 1]) == pytest.approx((1 - math.exp(-1.2)) / 2)
    assert float(heat_kernel("ordinal", 2, t)[0, 1]) == pytest.approx((1 - math.exp(-0.6)) / 2)
