"""Metrics: coordinates in which a target is whitened, and their estimates, by closed forms."""

from __future__ import annotations

import pytest
import torch

from pyro_ebm import EnergyDistribution
from pyro_ebm.mcmc import HMC, MALA, RandomWalk
from pyro_ebm.mcmc.kernels.hamiltonian import leapfrog
from pyro_ebm.mcmc.kernels.kernel import State
from pyro_ebm.mcmc.kernels.metric import MetricEstimate, pulled_back, resolved, stretched, whitened
from pyro_ebm.mcmc.targets.captured import CapturedPotential
from pyro_ebm.testing import PROBLEMS, assert_detailed_balance, assert_invariant

ROOT = torch.tensor([[2.0, 0.0, 0.0], [0.7, 0.5, 0.0], [-1.0, 0.3, 1.5]], dtype=torch.float64)
DIAGONAL = torch.tensor([2.0, 0.5, 1.5], dtype=torch.float64)


@pytest.mark.parametrize("root", [ROOT, DIAGONAL], ids=["dense", "diagonal"])
def test_helpers_are_products_with_the_root(root):
    matrix = root if root.dim() == 2 else root.diag()
    x = torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(stretched(x, root), torch.stack([matrix @ row for row in x]))
    torch.testing.assert_close(pulled_back(x, root), torch.stack([matrix.T @ row for row in x]))
    torch.testing.assert_close(whitened(stretched(x, root), root), x)


def quartic(x):
    bent = x[..., 0] * x[..., 1] + 0.3 * x[..., 2]
    return 0.5 * x.square().sum(-1) + bent.square() + 0.1 * x.pow(4).sum(-1)


def start(energy, q, root):
    law = EnergyDistribution(energy, event_shape=(3,))
    kernel = HMC(law)
    potential = CapturedPotential(kernel.bind(), capture=False)
    return potential, kernel.init(potential, q).with_tuning(root=root)


@pytest.mark.parametrize("root", [ROOT, DIAGONAL], ids=["dense", "diagonal"])
@pytest.mark.parametrize("per_chain", [False, True])
def test_a_metric_is_a_change_of_coordinates(root, per_chain):
    """Leapfrog of U with the root R is that of U(Rz) without a metric, point by point."""
    z, p = torch.randn(2, 6, 3, dtype=torch.float64)
    step = torch.tensor(0.2, dtype=torch.float64)
    step = torch.linspace(0.05, 0.2, 6, dtype=torch.float64)[:, None] if per_chain else step
    potential, state = start(quartic, stretched(z, root), root)
    end, p_end = leapfrog(potential, state, p, step, 5)
    one = torch.ones(3, dtype=torch.float64)
    potential, plain = start(lambda z: quartic(stretched(z.reshape(-1, 3), root)), z, one)
    wanted, p_wanted = leapfrog(potential, plain, p, step, 5)
    torch.testing.assert_close(whitened(end.position, root), wanted.position)
    torch.testing.assert_close(p_end, p_wanted)
    torch.testing.assert_close(end.potential, wanted.potential)


def with_root(kernel, root):
    first = type(kernel).first_tuning
    kernel.first_tuning = lambda q: first(kernel, q) | {"root": root}
    return kernel


TILTED = torch.tensor([[0.8, 0.0], [0.6, 0.3]], dtype=torch.float64)


@pytest.mark.parametrize("root", [TILTED, TILTED.diagonal()], ids=["dense", "diagonal"])
@pytest.mark.parametrize("make", [MALA, RandomWalk])
def test_ratios_balance_under_a_metric(make, root):
    for name in ("dirichlet", "banana"):
        made = PROBLEMS[name]()
        assert_detailed_balance(with_root(make(made.dist, step_size=0.4), root), made)


@pytest.mark.parametrize("make", [HMC, MALA, RandomWalk])
def test_a_dense_metric_keeps_the_target(make):
    made = PROBLEMS["dirichlet"]()
    kernel = with_root(make(made.dist, step_size=0.8), TILTED)
    assert_invariant(kernel, made, num_chains=8000, num_steps=5)


def test_jumps_have_the_covariance_that_the_metric_says():
    """The ratio of a symmetric jump would hide a wrong one."""
    law = EnergyDistribution(quartic, event_shape=(3,))
    kernel = with_root(RandomWalk(law, step_size=0.3), ROOT)
    potential = CapturedPotential(kernel.bind(), capture=False)
    state = kernel.init(potential, torch.zeros(5, 3, dtype=torch.float64))
    torch.manual_seed(3)
    noise = torch.randn(5, 3, dtype=torch.float64)
    torch.manual_seed(3)
    jumped = kernel.propose(potential, state).position
    torch.testing.assert_close(jumped, 0.3 * torch.stack([ROOT @ row for row in noise]))


# --- estimates


def seen(metric, positions, gradients):
    """The estimate after two batches of states."""
    estimate = MetricEstimate(metric)
    for q, g in zip(positions.chunk(2), gradients.chunk(2), strict=True):
        estimate.update(State(q, q[:, 0], g))
    return estimate.root(positions)


def states(num=8):
    positions = torch.randn(num, 3, dtype=torch.float64) @ ROOT.T + 5.0
    return positions, torch.randn(num, 3, dtype=torch.float64) * DIAGONAL


@pytest.mark.parametrize("num", [8, 400])
def test_estimates_are_shrunk_towards_a_thousandth(num):
    """n / (n + 5) of what was seen and 5 / (n + 5) of a thousandth, as for Stan's windows."""
    q, g = states(num)
    share, rest = num / (num + 5.0), 1e-3 * 5.0 / (num + 5.0)
    dense = seen("dense", q, g)
    wanted = share * torch.cov(q.T) + rest * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(dense @ dense.T, wanted)
    assert torch.equal(dense, dense.tril())
    torch.testing.assert_close(seen("diagonal", q, g).square(), share * q.var(0) + rest)
    fisher = (q.var(0) / g.var(0)).sqrt()
    torch.testing.assert_close(seen("fisher", q, g).square(), share * fisher + rest)


def test_directions_in_which_nothing_moves_leave_a_finite_metric():
    q, g = states()
    q[:, 2] = 1.0
    for metric in ("dense", "diagonal", "fisher"):
        root = seen(metric, q, g)
        assert torch.isfinite(root).all()
        assert (root.diagonal() if metric == "dense" else root).min() > 0
    q[:, 1] = torch.nan
    root = seen("dense", q, g)
    assert torch.isfinite(root).all()
    assert torch.equal(root, root.diagonal().diag())


@pytest.mark.parametrize(
    ("metric", "num_chains", "dim", "wanted"),
    [
        ("auto", 64, 64, "dense"),
        ("auto", 64, 65, "diagonal"),
        ("auto", 1000, 256, "dense"),
        ("auto", 1000, 257, "diagonal"),
        ("auto", 64, 1, "diagonal"),
        ("diagonal", 64, 3, "diagonal"),
        ("dense", 2, 3, "dense"),
        ("fisher", 64, 3, "fisher"),
    ],
)
def test_what_auto_means(metric, num_chains, dim, wanted):
    assert resolved(metric, num_chains, dim) == wanted


def test_a_direction_in_which_nothing_moves_keeps_a_scale():
    estimate = MetricEstimate("dense")
    q = torch.randn(50, 3, dtype=torch.float64)
    q[:, 1] = 2.0
    q[:, 2] = torch.inf
    estimate.update(State(q, q[:, 0], q))
    root = estimate.root(q)
    assert bool((root.diagonal() > 0.9).all())  # of variance one, as all that is known
    assert root.isfinite().all()
