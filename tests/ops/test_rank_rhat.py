"""R-hat in torch agrees with ArviZ and sees what plain R-hat misses."""

import arviz
import numpy as np
import pytest
import torch

from pyro_ebm.ops import rank_rhat as module
from pyro_ebm.ops.rank_rhat import rank_rhat


def normal(shape):
    return torch.randn(shape, dtype=torch.float64)


def shifted(shape):
    return normal(shape) + torch.arange(shape[1], dtype=torch.float64)


def cauchy(shape):
    return normal(shape) / normal(shape)


def counts(shape):
    return torch.poisson(torch.full(shape, 2.0, dtype=torch.float64))


def coins(shape):
    return (normal(shape) > 0.7).double()


@pytest.mark.parametrize("draw", [normal, shifted, cauchy, counts, coins])
@pytest.mark.parametrize("shape", [(100, 4), (51, 2), (7, 3), (40, 2)])
def test_agrees_with_arviz(draw, shape):
    x = draw(shape)
    expected = arviz.rhat(np.asarray(x.T), method="rank")
    assert float(rank_rhat(x)) == pytest.approx(float(expected), abs=1e-10)


def test_trailing_dims_are_separate_quantities():
    x = normal((60, 4, 2, 3))
    together = rank_rhat(x)
    assert together.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], rank_rhat(x[:, :, i, j]))


def test_monotone_maps_do_not_matter_for_location():
    x = shifted((50, 4))
    assert float(rank_rhat(x)) == pytest.approx(float(rank_rhat(x.exp())), rel=0.05)


def spread():
    """Chains with one location and different scales."""
    return normal((400, 4)) * torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)


def test_difference_in_scale_is_seen():
    assert float(rank_rhat(spread())) > 1.1


def test_without_folding_it_is_not(monkeypatch):
    monkeypatch.setattr(torch, "fmax", lambda bulk, folded: bulk)
    assert float(rank_rhat(spread())) < 1.02


def test_trend_within_chains_is_seen():
    trend = torch.linspace(0, 3, 200, dtype=torch.float64)[:, None]
    assert float(rank_rhat(normal((200, 4)) + trend)) > 1.1


def test_without_splitting_it_is_not(monkeypatch):
    monkeypatch.setattr(module, "_split", lambda x: x.movedim((1, 0), (-2, -1)))
    trend = torch.linspace(0, 3, 200, dtype=torch.float64)[:, None]
    assert float(rank_rhat(normal((200, 4)) + trend)) < 1.02


def test_frozen_chains_at_different_places_disagree_without_bound():
    x = torch.arange(4.0).expand(20, 4)
    assert float(rank_rhat(x)) == torch.inf


def test_constant_is_nan_as_in_arviz():
    assert rank_rhat(torch.ones(20, 4)).isnan()


def test_two_values_equally_often_are_fine():
    x = torch.tensor([-1.0, 1.0]).repeat(20)[:, None].expand(40, 4)
    assert float(rank_rhat(x)) < 1.01


def test_too_few_draws():
    with pytest.raises(ValueError, match="at least 4 draws per chain, got 3"):
        rank_rhat(torch.zeros(3, 4))
