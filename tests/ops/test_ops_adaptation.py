"""Step sizes settle where acceptance is as wanted; variances pool exactly."""

import pytest
import torch

from pyro_ebm.ops.adaptation import DualAveraging, PooledVariance


def acceptance(step_size, scale):
    """A noise-free acceptance curve: falls from one to zero around ``scale``."""
    return torch.exp(-step_size / scale)


def tuned(first, scale, *, steps=100, target=0.574):
    tuner = DualAveraging(first, target=target)
    for _ in range(steps):
        tuner.update(acceptance(tuner.step_size, scale))
    tuner.freeze()
    return tuner


@pytest.mark.parametrize("first", [1e-2, 1.0, 1e2])
def test_finds_the_step_size_of_the_target(first):
    scale = torch.tensor([0.01, 1.0, 30.0])
    tuner = tuned(torch.full((3,), first), scale)
    assert acceptance(tuner.step_size, scale).sub(0.574).abs().max() < 0.1


def test_batch_elements_do_not_mix():
    scale = torch.tensor([0.1, 10.0])
    together = tuned(torch.ones(2), scale)
    apart = [tuned(torch.ones(1), scale[i : i + 1]) for i in range(2)]
    assert torch.equal(together.step_size, torch.cat([t.step_size for t in apart]))


def test_responds_without_swinging():
    """The usual gamma of .05 overshoots when acceptance carries no noise."""
    tuner = DualAveraging(torch.ones(()), target=0.574)
    seen = []
    for _ in range(60):
        seen.append(float(tuner.step_size))
        tuner.update(acceptance(tuner.step_size, 1.8))
    late = torch.tensor(seen[-20:])
    assert late.max() / late.min() < 1.2


def test_bound_holds_where_everything_is_accepted():
    tuner = DualAveraging(torch.ones(()), target=0.4, largest=100.0)
    for _ in range(200):
        tuner.update(torch.ones(()))
    assert float(tuner.step_size) == 100.0


def test_freezing_takes_the_average():
    tuner = tuned(torch.ones(()), torch.tensor(1.0), steps=7)
    frozen = tuner.step_size
    tuner.freeze()
    assert torch.equal(tuner.step_size, frozen)


def test_pooled_variance_is_the_variance_of_all_rows():
    x = torch.randn(90, 2, 3, dtype=torch.float64) * 3 + 1e4
    pooled = PooledVariance()
    for chunk in x.split([16, 50, 1, 23]):
        pooled.update(chunk)
    assert pooled.variance.shape == (1, 2, 3)
    torch.testing.assert_close(pooled.variance[0], x.var(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rows", [torch.ones(5, 2), torch.randn(1, 2), torch.full((3, 2), 1e38)])
def test_variance_without_information_is_one(rows):
    pooled = PooledVariance()
    pooled.update(rows)
    assert torch.equal(pooled.variance, torch.ones(1, 2))
