"""The kernel KALE against its primal, closed forms and its two limits."""

import math

import pytest
import torch
from scipy.optimize import minimize
from scipy.special import lambertw

from pyro_ebm.ops.kale_dual import DualProblem, kernel_kale, solve_dual
from pyro_ebm.ops.kernels import GaussianKernel, InverseMultiquadricKernel

KERNEL = GaussianKernel(1.0)


@pytest.fixture(autouse=True)
def double_precision(fresh_state):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(20)


def samples(m=12, n=9, dim=2):
    return torch.randn(m, dim) + 0.8, torch.randn(n, dim)


def primal(h, p, q, lam):
    """(1 + lambda) {1 + E_P h - E_Q e^h - lambda/2 |h|^2}."""
    value = 1 + h(p).mean() - h(q).exp().mean() - 0.5 * lam * h.squared_norm()
    return (1 + lam) * value


@pytest.mark.parametrize("lam", [1e-3, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("kernel", [KERNEL, InverseMultiquadricKernel(0.7)])
def test_primal_is_dual_and_weights_are_those_of_the_witness(lam, kernel):
    p, q = samples()
    result = kernel_kale(p, q, kernel, lam, tolerance=1e-22)
    value = primal(result.witness, p, q, lam)
    torch.testing.assert_close(result.value, value, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.alpha, result.witness(q).exp() / len(q), rtol=0, atol=1e-8)
    assert 0 <= result.gap < 1e-12
    assert result.value > 0


@pytest.mark.parametrize("lam", [0.05, 1.0])
def test_primal_solved_by_other_means(lam):
    """Quasi-Newton over all functions on the points of both samples finds nothing higher."""
    p, q = samples(5, 4)
    points = torch.cat([p, q])
    gram = KERNEL(points, points)

    def loss(w):
        h = gram @ w
        value = 1 + h[:5].mean() - h[5:].exp().mean() - 0.5 * lam * w @ gram @ w
        return -(1 + lam) * value

    def with_gradient(w):
        grad, value = torch.func.grad_and_value(loss)(torch.tensor(w))
        return value.item(), grad.numpy()

    found = minimize(with_gradient, [0.0] * 9, jac=True, options={"gtol": 1e-9})
    assert kernel_kale(p, q, KERNEL, lam).value.item() == pytest.approx(-found.fun, abs=1e-8)


@pytest.mark.parametrize("lam", [1e-2, 1.0, 1e3])
def test_equal_samples(lam):
    q = torch.randn(8, 2)
    result = kernel_kale(q[torch.randperm(8)], q, KERNEL, lam, tolerance=1e-22)
    assert result.value.abs() < 1e-12
    torch.testing.assert_close(result.alpha, torch.full((8,), 1 / 8), rtol=0, atol=1e-10)
    assert result.witness(torch.randn(20, 2)).abs().max() < 1e-7 / lam


@pytest.mark.parametrize("lam", [0.05, 0.5, 5.0, 500.0])
def test_two_diracs(lam):
    """alpha = lambda W(e^{k/lambda} / lambda), the root of lambda log alpha + alpha = k."""
    distance = 0.9
    p, q = torch.zeros(1, 1), torch.full((1, 1), distance)
    k = math.exp(-(distance**2) / 2)
    alpha = lam * lambertw(math.exp(k / lam) / lam).real
    dual = alpha * math.log(alpha) - alpha + (alpha**2 - 2 * k * alpha + 1) / (2 * lam)
    result = kernel_kale(p, q, KERNEL, lam, tolerance=1e-22)
    assert result.alpha.item() == pytest.approx(alpha, rel=1e-10)
    assert result.value.item() == pytest.approx((1 + lam) * (1 + dual), rel=1e-9)


def test_large_regularization_is_half_the_squared_mmd():
    """The error falls as 1/lambda."""
    p, q = samples()
    mmd2 = KERNEL(p, p).mean() + KERNEL(q, q).mean() - 2 * KERNEL(p, q).mean()
    errors = [kernel_kale(p, q, KERNEL, lam).value - 0.5 * mmd2 for lam in (1e3, 1e4)]
    assert abs(errors[1]) < 1e-4
    assert (errors[0] / errors[1]).item() == pytest.approx(10.0, rel=0.02)


def test_small_regularization_is_kullback_leibler():
    """Laws on the same three points: the error falls as lambda."""
    points = torch.tensor([[0.0], [1.0], [2.5]])
    p, q = points[[0, 0, 0, 1, 2, 2]], points[[0, 1, 1, 2]]
    kl = sum(a * math.log(a / b) for a, b in [(3 / 6, 1 / 4), (1 / 6, 2 / 4), (2 / 6, 1 / 4)])
    errors = [kl - kernel_kale(p, q, KERNEL, lam).value.item() / (1 + lam) for lam in (1e-3, 1e-4)]
    assert 0 < errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("spread", [0.5, 1.0, 2.5])
def test_steps_are_few_however_small_the_regularization(spread):
    """Values are rounded by 1 / lambda as much, which must not be taken for a step gone wrong."""
    points = spread * torch.tensor([[0.0], [1.0], [2.5]])
    p, q = points[[0, 0, 0, 1, 2, 2]], points[[0, 1, 1, 2]]
    lams = torch.logspace(-5, -1, 41).tolist()
    assert max(kernel_kale(p, q, KERNEL, lam).num_steps for lam in lams) <= 12


def test_gap_of_any_weights():
    """What is reported is the dual value minus the primal of the same weights' witness."""
    p, q = samples()
    problem = DualProblem(KERNEL(q, q), KERNEL(q, p).mean(1), KERNEL(p, p).mean(), 0.3)
    start = 0.3 * torch.randn(len(q))
    loose = solve_dual(problem, start, tolerance=1e3)
    assert loose.num_steps == 0
    h_at_q = problem.witness(start)
    alpha = start.exp() / len(q)
    mean_under_p = (problem.square - problem.mean @ alpha) / 0.3
    norm = (problem.square - 2 * problem.mean @ alpha + alpha @ problem.gram @ alpha) / 0.3**2
    below = 1.3 * (1 + mean_under_p - h_at_q.exp().mean() - 0.15 * norm)
    torch.testing.assert_close(loose.gap, loose.value - below, rtol=0, atol=1e-12)
    assert loose.gap > 1e-3


def test_open_gap_is_an_error():
    p, q = samples()
    with pytest.raises(RuntimeError, match=r"gap of .* after 1 Newton steps.*Raise max_steps"):
        kernel_kale(p, q, KERNEL, 1e-2, max_steps=1)


def test_warm_start():
    p, q = samples(60, 60)
    problem = DualProblem(KERNEL(q, q), KERNEL(q, p).mean(1), KERNEL(p, p).mean(), 1e-3)
    cold = solve_dual(problem)
    again = solve_dual(problem, cold.log_weights)
    assert cold.num_steps > 3
    assert again.num_steps == 0


def test_singular_laws_and_far_points():
    """No overflow where a witness of unit norm could not be more than lambda^-1 large."""
    result = kernel_kale(torch.full((3, 2), 40.0), torch.zeros(3, 2), KERNEL, 1e-3)
    assert result.value.isfinite()
    assert result.gap < 1e-6 * result.value


def test_dtype_and_event_shape():
    p, q = torch.randn(5, 2, 2, dtype=torch.float32), torch.randn(4, 2, 2, dtype=torch.float32)
    result = kernel_kale(p, q, KERNEL, 0.5)
    want = kernel_kale(p.reshape(5, 4).double(), q.reshape(4, 4).double(), KERNEL, 0.5)
    assert {t.dtype for t in (result.value, result.alpha, result.gap)} == {torch.float32}
    assert result.witness(p.reshape(5, 4)).dtype == torch.float32
    torch.testing.assert_close(result.value, want.value.float())


@pytest.mark.parametrize(
    ("p", "q", "lam", "error", "message"),
    [
        (torch.ones(2, 1), torch.ones(2, 2), 1.0, ValueError, "one event shape"),
        (torch.ones(2, 1), torch.ones(0, 1), 1.0, ValueError, "q must hold at least one row"),
        (torch.tensor([[math.nan]]), torch.ones(2, 1), 1.0, ValueError, "p must be finite"),
        (torch.ones(2, 1).long(), torch.ones(2, 1), 1.0, TypeError, "floating dtype"),
        (torch.ones(2, 1), torch.ones(2, 1), 0.0, ValueError, "regularization must be positive"),
    ],
)
def test_bad_input(p, q, lam, error, message):
    with pytest.raises(error, match=message):
        kernel_kale(p, q, KERNEL, lam)
