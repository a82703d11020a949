"""Layers of a distribution, the masks in them, and the parts of mixtures."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.distributions.layers import innermost, is_normalized, mask_of, num_reinterpreted

INNER = torch.tensor([[True, False], [True, True], [False, False]])
OUTER = torch.tensor([True, True, False])


def normal():
    return dist.Normal(torch.zeros(3, 2), 1.0)


def test_innermost():
    fn = normal()
    assert innermost(fn.to_event(1).mask(OUTER)) is fn


@pytest.mark.parametrize(
    ("fn", "mask", "want"),
    [
        (normal(), None, True),
        (normal().mask(True), None, True),
        (normal().mask(INNER), None, INNER),
        (normal().mask(INNER).to_event(1), None, INNER),
        (normal().to_event(1).mask(OUTER), None, OUTER[:, None].expand(3, 2)),
        (normal().mask(INNER).to_event(1), OUTER, INNER & OUTER[:, None]),
        (normal().mask(INNER).to_event(1).mask(OUTER), None, INNER & OUTER[:, None]),
        (normal().to_event(2), torch.tensor(True), torch.ones(1, 1, dtype=torch.bool)),
        (normal().mask(False), None, False),
    ],
)
def test_mask_of(fn, mask, want):
    found = mask_of(fn, mask)
    if isinstance(want, bool):
        assert found is want
    else:
        assert torch.equal(torch.broadcast_to(found, want.shape), want)


def test_num_reinterpreted_counts_all_layers():
    assert num_reinterpreted(normal().to_event(1).to_event(1).mask(True)) == 2


def unknown(batch=()):
    return EnergyDistribution(lambda x: x**2, event_shape=(), batch_shape=batch)


@pytest.mark.parametrize(
    "fn",
    [
        unknown(),
        unknown().expand([3]).to_event(1).mask(True),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), unknown((2,))),
        dist.TransformedDistribution(unknown(), [dist.transforms.ExpTransform()]),
        dist.MaskedMixture(torch.tensor(True), dist.Normal(0.0, 1.0), unknown()),
    ],
)
def test_an_ebm_anywhere_in_it_must_know_its_log_z(fn):
    assert not is_normalized(fn)
    with pytest.raises(ValueError, match="base must be normalized"):
        EnergyDistribution(lambda x: x**2, base=fn)


def test_what_holds_no_ebm_is_normalized():
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0)
    )
    assert is_normalized(mixture.expand([3]).to_event(1))
