"""Particle flows: steps against autograd and closed forms, fixed points, limits."""

import math

import pytest
import torch
from scipy.special import lambertw

from pyro_ebm.infer.divergences.particle_flow import kale_flow, mmd_flow
from pyro_ebm.ops.kale_dual import kernel_kale
from pyro_ebm.ops.kernels import GaussianKernel, InverseMultiquadricKernel

KERNEL = GaussianKernel(1.0)


def flows(**options):
    return {
        "kale": lambda y, x, **kw: kale_flow(y, x, KERNEL, 0.3, **options, **kw),
        "mmd": lambda y, x, **kw: mmd_flow(y, x, KERNEL, **options, **kw),
    }


def divergence(name, y, x):
    if name == "kale":
        return kernel_kale(y, x, KERNEL, 0.3).value
    return 0.5 * (KERNEL(y, y).mean() + KERNEL(x, x).mean() - 2 * KERNEL(y, x).mean())


@pytest.mark.parametrize("name", ["kale", "mmd"])
def test_a_step_goes_down_the_gradient(name):
    """n times the gradient of the divergence in a particle, by finite differences."""
    y, x = torch.randn(5, 2), torch.randn(7, 2) + 1
    run = flows(tolerance=1e-18)[name] if name == "kale" else flows()[name]
    flow = run(y, x, step_size=0.1, num_steps=1)
    assert flow.values.item() == pytest.approx(divergence(name, y, x).item(), abs=1e-12)
    velocity = (y - flow.particles) / 0.1
    eps = 1e-5
    for i, j in [(0, 0), (3, 1)]:
        move = torch.zeros(5, 2)
        move[i, j] = eps
        slope = (divergence(name, y + move, x) - divergence(name, y - move, x)) / (2 * eps)
        assert velocity[i, j].item() == pytest.approx(5 * slope.item(), rel=1e-6)


def test_two_diracs():
    """h'(y) = (alpha/lambda) k (y - b), alpha the root of lambda log alpha + alpha = k(y, b)."""
    y, b, lam = 0.9, 0.0, 0.2
    k = math.exp(-((y - b) ** 2) / 2)
    alpha = lam * lambertw(math.exp(k / lam) / lam).real
    flow = kale_flow(
        torch.tensor([[y]]),
        torch.tensor([[b]]),
        KERNEL,
        lam,
        step_size=0.01,
        num_steps=1,
        tolerance=1e-20,
    )
    want = y - 0.01 * (1 + lam) * alpha / lam * k * (y - b)
    assert flow.particles.item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("name", ["kale", "mmd"])
def test_equal_samples_stay(name):
    """P = Q is a fixed point, noise or not: only the place of the gradient is perturbed."""
    x = torch.randn(6, 2)
    flow = flows()[name](x[torch.randperm(6)], x, step_size=1.0, num_steps=3, noise=0.5)
    torch.testing.assert_close(flow.trajectory[0], flow.particles, rtol=0, atol=1e-6)
    assert flow.values.abs().max() < 1e-12


@pytest.mark.parametrize("name", ["kale", "mmd"])
def test_noise_perturbs_the_place_of_the_gradient_alone(name):
    """Beside a flow without noise the step differs by the gradient's change, no more."""
    y, x = torch.randn(4, 2), torch.randn(4, 2) + 1
    run = flows()[name]
    torch.manual_seed(1)
    noisy = run(y, x, step_size=0.1, num_steps=1, noise=lambda step: 0.5 / (step + 1))
    torch.manual_seed(1)
    at = y + 0.5 * torch.randn_like(y)
    if name == "kale":
        field = kernel_kale(y, x, KERNEL, 0.3).witness.gradient(at) * 1.3
    else:
        leaf = at.clone().requires_grad_()
        value = (KERNEL(leaf, y).mean(1) - KERNEL(leaf, x).mean(1)).sum()
        (field,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(noisy.particles, y - 0.1 * field, rtol=0, atol=1e-4)
    assert not torch.allclose(noisy.particles, run(y, x, step_size=0.1, num_steps=1).particles)


def test_large_regularization_is_the_mmd_flow():
    """After 20 steps the two are apart by an error that falls as 1/lambda."""
    y, x = torch.randn(10, 2), torch.randn(8, 2) + 1
    plain = mmd_flow(y, x, KERNEL, step_size=0.3, num_steps=20)
    apart = []
    for lam in (1e3, 1e4):
        flow = kale_flow(y, x, KERNEL, lam, step_size=0.3, num_steps=20, tolerance=1e-16)
        apart.append((flow.particles - plain.particles).abs().max().item())
        torch.testing.assert_close(flow.values, plain.values, rtol=0, atol=2 / lam)
    assert apart[1] < 1e-4
    assert apart[0] / apart[1] == pytest.approx(10.0, rel=0.1)


def test_warm_starts_do_not_change_the_flow():
    y, x = torch.randn(6, 1), torch.randn(6, 1) + 2
    flow = kale_flow(y, x, KERNEL, 0.05, step_size=0.02, num_steps=10, tolerance=1e-16)
    for _ in range(10):
        y = y - 0.02 * 1.05 * kernel_kale(y, x, KERNEL, 0.05).witness.gradient(y)
    torch.testing.assert_close(flow.particles, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", [KERNEL, InverseMultiquadricKernel(1.0)])
def test_divergence_falls_and_gaps_stay_closed(kernel):
    y, x = torch.randn(30, 2), torch.randn(20, 2) + 1.5
    flow = kale_flow(y, x, kernel, 0.1, step_size=0.05, num_steps=80)
    assert (flow.values.diff() <= 1e-6).all()
    assert flow.values[-1] < 0.2 * flow.values[0]
    assert (flow.gaps <= 1e-6 * (1 + flow.values)).all()
    assert flow.gaps.shape == flow.values.shape == (80,)


@pytest.mark.parametrize("name", ["kale", "mmd"])
def test_snapshots_dtype_and_event_shape(name):
    y, x = torch.randn(3, 2, 2, dtype=torch.float32), torch.randn(4, 2, 2, dtype=torch.float32)
    run = flows()[name]
    flow = run(y, x, step_size=0.1, num_steps=10, snapshots=[0, 4, 10])
    assert flow.trajectory.shape == (3, 3, 2, 2)
    assert flow.steps.tolist() == [0, 4, 10]
    assert {t.dtype for t in (flow.trajectory, flow.values, flow.gaps)} == {torch.float32}
    torch.testing.assert_close(flow.trajectory[0], y)
    short = run(y, x, step_size=0.1, num_steps=4)
    torch.testing.assert_close(flow.trajectory[1], short.particles)
    assert run(y, x, step_size=0.1, num_steps=9, snapshots=4).steps.tolist() == [0, 3, 6, 9]


def test_progress_bar(capsys):
    x = torch.randn(3, 1)
    kale_flow(x, x + 1, KERNEL, 1.0, step_size=0.1, num_steps=2, disable_progbar=False)
    assert "divergence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"noise": -1.0}, "noise must not be negative, got -1.0 at step 0"),
        ({"snapshots": 1}, "snapshots must be at least 2"),
        ({"snapshots": [0, 11]}, "snapshots must be steps between 0 and 10"),
    ],
)
@pytest.mark.parametrize("name", ["kale", "mmd"])
def test_refuses(name, given, message):
    with pytest.raises(ValueError, match=message):
        flows()[name](
            torch.ones(2, 1), torch.zeros(2, 1), **({"step_size": 0.1, "num_steps": 10} | given)
        )


@pytest.mark.parametrize("name", ["kale", "mmd"])
def test_refuses_samples(name):
    run = flows()[name]
    with pytest.raises(ValueError, match="particles must be finite"):
        run(torch.tensor([[math.nan]]), torch.zeros(2, 1), step_size=0.1, num_steps=1)
    with pytest.raises(ValueError, match="one event shape, got {'particles': .1,., 'target': .2,."):
        run(torch.ones(2, 1), torch.zeros(2, 2), step_size=0.1, num_steps=1)


def test_runaway_particles_are_an_error():
    y, x = torch.zeros(1, 1), torch.ones(1, 1)
    with pytest.raises(RuntimeError, match="not finite after step 0: lower step_size"):
        mmd_flow(y, x, KERNEL, step_size=1.7e308, num_steps=1, noise=lambda step: math.inf)
