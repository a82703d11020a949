"""Damped Newton descent: minima, saddles, units and functions without a minimum."""

import torch

from pyro_ebm.infer.bayes.damped_newton import damped_newton, derivatives


def tolerance(q):
    return torch.tensor(1e-12)


def test_a_saddle_is_left_downhill():
    """(q^2 - 1)^2 has curvature -4 at 0."""
    found = damped_newton(lambda q: ((q**2 - 1) ** 2).sum(), torch.tensor([0.1, -0.3]), tolerance)
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0]), rtol=0, atol=1e-6)


def test_units_of_coordinates_do_not_matter():
    units = torch.tensor([1e-7, 1.0, 1e7])

    def value(q):
        z = q / units - 1.0
        return z.square().sum() + (z.sum() ** 4) + z[0] * z[1]

    found = damped_newton(value, torch.zeros(3), tolerance)
    torch.testing.assert_close(found / units, torch.ones(3), rtol=0, atol=1e-6)


def test_what_is_near_enough_follows_the_function():
    """At the start, 5e5, a hundred thousandth of the function is far more than all of its minimum.

    It is e^-4q m / 2 - e^-2q, and -1 / 2m at e^2q = m.
    """
    m = torch.tensor(1e6)

    def terms(q):
        return torch.cat([0.5 * m * torch.exp(-4 * q), -torch.exp(-2 * q)])

    found = damped_newton(
        lambda q: terms(q).sum(), torch.zeros(1), lambda q: 1e-5 * terms(q).abs().sum()
    )
    torch.testing.assert_close(found, 0.5 * m.log()[None], rtol=0, atol=0.01)


def test_flat_directions_are_allowed_where_they_are_asked_for():
    def value(q):
        return (q.sum() - 3.0) ** 2

    found = damped_newton(value, torch.zeros(2), tolerance, flat=1e-8)
    torch.testing.assert_close(found.sum(), torch.tensor(3.0))
    assert damped_newton(lambda q: -q.sum(), torch.zeros(1), tolerance) is None


def test_derivatives_are_those_of_a_quadratic():
    a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    hessian, gradient = derivatives(lambda q: 0.5 * q @ a @ q, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(hessian, a)
    torch.testing.assert_close(gradient, torch.tensor([4.0, 7.0]))


def test_curvature_that_overflows_is_no_minimum():
    """-e^40s falls for ever, and its curvature is beyond single precision from a sum of 2 on."""
    falls = lambda q: -torch.exp(40.0 * q.sum())  # noqa: E731
    assert damped_newton(falls, torch.full((3,), 0.7, dtype=torch.float32), tolerance) is None
