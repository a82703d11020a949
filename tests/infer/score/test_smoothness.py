"""Which energies are refused for jumps of their slope, and which are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.divergences.kale import KALE
from pyro_ebm.infer.score.denoising import DenoisingScoreMatching
from pyro_ebm.infer.score.kernel_stein import KernelStein
from pyro_ebm.infer.score.score_matching import ScoreMatching
from pyro_ebm.infer.score.sliced import SlicedScoreMatching
from pyro_ebm.infer.score.smoothness import has_jumps
from pyro_ebm.infer.scoring.unconstrained import Unconstrained

BASES = {
    "normal": lambda: dist.Normal(0.0, 2.0).expand([2]).to_event(1),
    "student": lambda: dist.StudentT(3.0, 0.0, 2.0).expand([2]).to_event(1),
    "gamma": lambda: dist.Gamma(2.0, 1.0).expand([2]).to_event(1),
}


def network(*layers):
    net = nn.Sequential(*layers)
    return lambda x: net(x).square().sum(-1)


def hidden(activation, inner=None):
    return network(nn.Linear(2, 16), *(inner or []), activation, nn.Linear(16, 1))


def then_tanh():
    return network(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))


# Energies with a base of which none is piecewise quadratic.
JUMPING = {
    "absolute values": (lambda: lambda x: x.abs().sum(-1), "student"),
    "where the energy is flat": (lambda: lambda x: (100 * x**4 + 0.5 * x.abs()).sum(-1), "normal"),
    "relu on positive data": (lambda: lambda x: torch.relu(x - 1).sum(-1), "gamma"),
    "network of relus": (lambda: hidden(nn.ReLU()), "student"),
    "squared output": (lambda: hidden(nn.ReLU()), "normal"),
    "layer norm": (lambda: hidden(nn.ReLU(), [nn.LayerNorm(16)]), "normal"),
    "relu, then tanh": (then_tanh, "normal"),
    "leaky relu": (lambda: hidden(nn.LeakyReLU()), "student"),
    "selu": (lambda: hidden(nn.SELU()), "student"),
    "hard tanh": (lambda: lambda x: functional.hardtanh(x).sum(-1), "student"),
    "maximum": (lambda: lambda x: x.amax(-1), "student"),
    "where": (lambda: lambda x: torch.where(x > 0, x.sin(), x.expm1() / 2).sum(-1), "normal"),
    "mask": (lambda: lambda x: (x * (x > 0)).sum(-1) * x.cos().sum(-1), "normal"),
}
SMOOTH = {
    "silu": (lambda: hidden(nn.SiLU()), "student"),
    "gelu": (lambda: hidden(nn.GELU()), "normal"),
    "tanh": (lambda: hidden(nn.Tanh()), "normal"),
    "elu": (lambda: hidden(nn.ELU()), "student"),
    "steep softplus": (lambda: lambda x: functional.softplus(x, 1e3, 1e9).sum(-1), "normal"),
    "power": (lambda: lambda x: x.pow(4).sum(-1), "student"),
    "slope like a root": (lambda: lambda x: x.abs().pow(1.3).sum(-1), "normal"),
    "squared absolute values": (lambda: lambda x: x.abs().square().sum(-1), "student"),
    "squared relu": (lambda: lambda x: torch.relu(x).square().sum(-1), "student"),
    "huber": (
        lambda: lambda x: functional.smooth_l1_loss(x, 0 * x, reduction="none").sum(-1),
        "normal",
    ),
    "log-sum-exp": (lambda: lambda x: x.logsumexp(-1), "student"),
    "norm": (lambda: lambda x: x.norm(dim=-1), "student"),
    "a floor out of reach": (lambda: lambda x: -x.clamp_min(1e-8).log().sum(-1), "gamma"),
    "a mask out of reach": (
        lambda: lambda x: torch.where(x > -1e6, x, 0).square().sum(-1),
        "normal",
    ),
    "tilt": (lambda: lambda x: x.sum(-1), "normal"),
    "nothing but rounding": (lambda: lambda x: BASES["student"]().log_prob(x), "student"),
    "random": (lambda: hidden(nn.Tanh(), [nn.Dropout(0.5)]), "normal"),
}


def jumps(table, name, dtype):
    torch.set_default_dtype(dtype)  # undone after every test
    make, base = table[name]
    law = BASES[base]()
    space = Unconstrained(EnergyDistribution(make(), law), "ScoreMatching")
    with torch.no_grad():
        return has_jumps(space, space.coordinates(law.sample((200,))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", JUMPING)
def test_jumps_are_found_whatever_the_curvature_between(name, dtype):
    assert jumps(JUMPING, name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_what_does_not_jump_passes(name, dtype):
    """Slopes that are steep, bend, or have no derivative at a point among them."""
    assert not jumps(SMOOTH, name, dtype)


@pytest.mark.parametrize("rows", [(1, 2), (2,), (3, 4, 2)], ids=str)
def test_rows_of_any_number(rows):
    """One row is compared with its mirror image, here beyond the kink."""
    x = 1.1 + torch.rand(rows)
    x.view(-1, 2)[: x.numel() // 4] -= 1.1
    space = Unconstrained(EnergyDistribution(lambda x: (x - 1).abs().sum(-1), event_shape=(2,)), "")
    assert has_jumps(space, x)
    assert not has_jumps(space, 1.1 + torch.rand(4, 2))  # on one side


@pytest.mark.parametrize("name", ["network of relus", "norm"])
@pytest.mark.parametrize(
    "arrange",
    [lambda x: torch.cat([x, -x]), lambda x: torch.cat([x, x]), torch.round],
    ids=["mirrored", "copied", "whole"],
)
def test_the_order_and_symmetry_of_rows_do_not_matter(name, arrange):
    """Ways between mirror images would all meet at one point, those of copies go nowhere."""
    make, base = {**JUMPING, **SMOOTH}[name]
    x = arrange(torch.randn(100, 2))
    space = Unconstrained(EnergyDistribution(make(), BASES[base]()), "ScoreMatching")
    assert has_jumps(space, x) == (name in JUMPING)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
def test_networks_that_move_with_every_call_are_looked_at_standing_still(activation, seed):
    """Spectral norms in training: five of six smooth ones would be taken for ReLUs."""
    torch.manual_seed(seed)
    sizes = ((2, 64), (64, 64), (64, 1))
    layers = [part for a, b in sizes for part in (spectral_norm(nn.Linear(a, b)), activation())]
    net = nn.Sequential(*layers[:-1], nn.Flatten(-2)).train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    space = Unconstrained(EnergyDistribution(net, event_shape=(2,)), "ScoreMatching")
    with torch.no_grad():
        assert has_jumps(space, torch.randn(200, 2)) == (activation is nn.ReLU)
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def loss_of(objective, energy, x):
    def model(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(x.shape[1:], dtype=x.dtype), 1.5).to_event(x.dim() - 1)
            pyro.sample("x", EnergyDistribution(energy, base, conditional=False), obs=x)

    return objective.differentiable_loss(model, lambda x: None, x)


class OfWords(nn.Module):
    """The energy of sequences of five pairs by attention."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True).to(torch.float64)

    def forward(self, x):
        rows = x.reshape(-1, 5, 2)
        mixed = self.attention(rows, rows, rows, need_weights=False)[0]
        return mixed.square().sum((-2, -1)).reshape(x.shape[:-2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScoreMatching(trace="hutchinson"),
        SlicedScoreMatching,
        lambda: DenoisingScoreMatching(0.1),
        KernelStein,
        lambda: KALE(gradient_penalty=1.0),
    ],
    ids=["hutchinson", "sliced", "denoising", "stein", "gradient penalty"],
)
def test_attention_has_a_second_derivative_by_the_kernel_that_is_named(make):
    energy, x = OfWords(), torch.randn(40, 5, 2)
    with pytest.raises(NotImplementedError, match="'x': .*twice.*SDPBackend.MATH") as raised:
        loss_of(make(), energy, x)
    assert "aten::_scaled_dot_product" in str(raised.value.__cause__)
    with sdpa_kernel(SDPBackend.MATH):
        loss_of(make(), energy, x).backward()
    assert energy.attention.in_proj_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
def test_rounding_of_half_precision_is_no_jump(activation):
    """Under autocast slopes move by steps of the rounding; jumps are looked for without it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), activation(), nn.Linear(16, 1), nn.Flatten(-2)).float()
    x, half = torch.randn(50, 2, dtype=torch.float32), torch.autocast("cpu", torch.bfloat16)
    if activation is nn.ReLU:
        with half, pytest.raises(ValueError, match="jumps at kinks"):
            loss_of(ScoreMatching(), net, x)
        return
    with half:
        found = loss_of(ScoreMatching(), net, x)
    want = loss_of(ScoreMatching(), net, x)
    assert found.item() == pytest.approx(want.item(), rel=0.05)
    assert found.item() != want.item()


def test_weights_of_half_precision_are_named():
    torch.manual_seed(0)

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1)).bfloat16()

        def forward(self, x):
            return self.net(x.bfloat16()).float().squeeze(-1)

    x = torch.randn(50, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weights of torch.bfloat16 .* network.to\(torch.float32"):
        loss_of(ScoreMatching(), Half(), x)
