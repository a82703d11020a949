"""What chains look like is told where they miss mass, and healthy short ones are left alone."""

import pytest
import torch

from pyro_ebm.chains import Record
from pyro_ebm.normalizers.chain_remarks import chain_remarks


def autoregressive(num_chains, length, *, memory=0.0, dim=1):
    z = torch.randn(length, num_chains, dim, dtype=torch.float64)
    for i in range(1, length):
        z[i] = memory * z[i - 1] + (1.0 - memory**2) ** 0.5 * z[i]
    return z.transpose(0, 1)


@pytest.mark.parametrize(("number", "is_told"), [(0, False), (5, False), (6, True)])
def test_trajectories_that_diverge_are_told_above_a_share(number, is_told):
    draws, diverging = torch.randn(10, 100), torch.arange(1000).reshape(10, 100) < number
    record = Record({"x": draws}, {"diverging": diverging})
    assert bool(chain_remarks(record)) is is_told
    assert chain_remarks(record, walled=True) == ()


@pytest.mark.parametrize(
    ("shape", "memory"),
    [((64, 250), 0.0), ((64, 250), 0.7), ((4, 1000), 0.7), ((4, 50), 0.0), ((1, 100), 0.0)],
)
def test_healthy_chains_are_left_alone(shape, memory):
    """Five coordinates at once; twenty times, where it is cheap."""
    for _ in range(20 if shape[0] < 64 else 2):
        assert chain_remarks({"x": autoregressive(*shape, memory=memory, dim=5)}) == ()


@pytest.mark.parametrize(("memory", "is_told"), [(0.7, False), (0.97, True)])
def test_draws_with_a_long_memory_are_told(memory, is_told):
    found = chain_remarks(
        {"steady": torch.ones(64, 250), "x": autoregressive(64, 250, memory=memory)}
    )
    assert [remark.startswith("rank R-hat of x is 1.") for remark in found] == [True] * is_told


def test_chains_of_a_few_draws_say_nothing():
    assert chain_remarks({"x": torch.arange(200.0)[:, None].expand(200, 19)}) == ()


def test_the_density_is_judged_like_a_coordinate():
    apart = torch.randn(64, 250) + torch.arange(64.0)[:, None]
    (found,) = chain_remarks(Record({"x": torch.randn(64, 250)}, {"lp": apart}))
    assert found.startswith("rank R-hat of lp is")


@pytest.mark.parametrize(("memory", "is_told"), [(0.7, False), (0.95, True)])
def test_momenta_that_are_too_short_are_told(memory, is_told):
    """BFMI is 2 (1 - memory), about: .6 and .1. A single chain of 64 is no remark."""
    energy = autoregressive(64, 250, memory=memory)[..., 0]
    energy[0] = torch.arange(250.0)
    found = chain_remarks(Record({"x": torch.randn(64, 250)}, {"energy": energy}))
    assert [remark.startswith("BFMI is 0.1") for remark in found] == [True] * is_told
