"""The Ising lattice: its sums, what is exact of it, and where it says that nothing is."""

import itertools

import pytest
import torch
from lattices import all_lattices, cell_of
from torch import nn

from pyro_ebm import EnergyDistribution
from pyro_ebm.energies import Ising
from pyro_ebm.ops import coupling_from_the_past
from pyro_ebm.ops.coupling_from_the_past import ferromagnet
from pyro_ebm.ops.swendsen_wang import swendsen_wang

F64 = torch.float64
SHAPES = [((3, 3), True), ((4, 3), True), ((3, 3), False), ((2, 4), False), ((1, 5), False)]
FIELDS = [None, 0.3, -0.8]


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def made(shape, periodic, field, couplings=(0.4, -0.2)):
    field = None if field is None else torch.tensor(field, dtype=F64)
    return Ising(numbers(*couplings), shape, field=field, periodic=periodic)


def by_hand(x, coupling, field, periodic):
    """The energy by a loop over bonds, each counted once."""
    n, m = x.shape
    total = 0.0
    for i in range(n):
        for j in range(m):
            if periodic or j + 1 < m:
                total -= coupling * x[i, j] * x[i, (j + 1) % m]
            if periodic or i + 1 < n:
                total -= coupling * x[i, j] * x[(i + 1) % n, j]
            total -= field * x[i, j]
    return total


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("shape", "periodic"), SHAPES)
def test_every_bond_counts_once(shape, periodic, field):
    x = torch.randint(0, 2, (5, *shape)).double() * 2 - 1
    energy = Ising(0.7, shape, field=field, periodic=periodic)(x)
    want = torch.stack([by_hand(row, 0.7, field or 0.0, periodic) for row in x])
    torch.testing.assert_close(energy, want)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("shape", "periodic"), SHAPES)
def test_log_normalizer_is_the_sum_over_all_lattices(shape, periodic, field):
    energy = made(shape, periodic, field)
    want = torch.logsumexp(-energy(all_lattices(shape)[:, None]), 0)
    torch.testing.assert_close(energy.log_normalizer(), want, rtol=1e-12, atol=1e-12)


def chi_square(x, energy, which):
    """Pearson's statistic of draws over all lattices, as standard deviations above its mean."""
    states = all_lattices(energy.event_shape)
    p = (-energy(states[:, None])[:, which]).softmax(0)
    seen = torch.bincount(cell_of(x), minlength=len(states))
    chi = ((seen - len(x) * p).square() / (len(x) * p)).sum()
    # Rare cells make the variance larger than that of a chi square.
    variance = 2.0 * (len(p) - 1) + (1.0 / p).sum() / len(x)
    return float((chi - (len(p) - 1)) / variance.sqrt())


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("shape", "periodic"), SHAPES)
def test_draws_by_the_transfer_matrix_are_exact(shape, periodic, field):
    energy = made(shape, periodic, field)
    x = energy.sample((20_000,))
    assert x.shape == (20_000, 2, *shape)
    for which in range(2):
        assert abs(chi_square(x[:, which], energy, which)) < 5


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("shape", "periodic"), SHAPES)
def test_draws_from_the_past_are_exact(shape, periodic, field):
    energy = made(shape, periodic, field)
    coupling = numbers(0.4).expand(5000)
    h = torch.tensor(field or 0.0, dtype=coupling.dtype)
    x = ferromagnet(coupling, h, torch.Size(shape), periodic=periodic)
    assert abs(chi_square(x, energy, 0)) < 5


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("shape", "periodic"), [case for case in SHAPES if min(case[0]) > 1])
def test_cluster_sweeps_keep_exact_draws(shape, periodic, field):
    energy = made(shape, periodic, field)
    x = energy.sample((20_000,))[:, 0]
    h = None if field is None else numbers(field)[0]
    moved = swendsen_wang(x, numbers(0.4)[0], h, periodic=periodic, num_sweeps=2)
    assert abs(chi_square(moved, energy, 0)) < 5
    assert bool((moved != x).any())
    other = swendsen_wang(x, numbers(0.45)[0], h, periodic=periodic, num_sweeps=2)
    assert abs(drift(other, x, energy)) > 5  # a coupling off by an eighth is seen
    assert abs(drift(moved, x, energy)) < 5


def largest_shift(x, energy, which):
    """Of the mean statistics against the sum over all lattices, in standard errors."""
    states = all_lattices(energy.event_shape)
    p, t = (-energy(states[:, None])[:, which]).softmax(0), energy.statistics(states)
    mean = p @ t
    variance = p @ (t - mean).square()
    return float(((energy.statistics(x).mean(0) - mean) / (variance / len(x)).sqrt()).abs().max())


EVEN = [case for case in SHAPES if not case[1] or all(size % 2 == 0 for size in case[0])]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(("shape", "periodic"), [*EVEN, ((4, 4), True)])
def test_antiferromagnets_are_drawn_and_swept_beside_ferromagnets(
    shape, periodic, field, monkeypatch
):
    monkeypatch.setattr(Ising, "_is_narrow", False)  # else by the transfer matrix
    energy = Ising(numbers(-0.3, 0.2), shape, field=field, periodic=periodic)
    x = energy.sample((10_000,))
    moved = energy.sweep(x, 2)
    for which in range(2):
        assert abs(chi_square(x[:, which], energy, which)) < 5
        assert abs(chi_square(moved[:, which], energy, which)) < 5
        assert largest_shift(x[:, which], energy, which) < 5
        assert largest_shift(moved[:, which], energy, which) < 5
    assert bool((moved != x).any())


def drift(moved, x, energy):
    """By how many standard errors the mean sum over bonds has moved."""
    change = (energy.statistics(moved) - energy.statistics(x))[:, 0]
    return float(change.mean() / (change.std() / len(x) ** 0.5))


def test_draws_of_another_coupling_are_seen():
    energy = made((3, 3), True, None)
    x = made((3, 3), True, None, couplings=(0.44, -0.22)).sample((20_000,))
    assert chi_square(x[:, 0], energy, 0) > 5


def test_a_wide_lattice_has_the_moments_of_the_formula():
    """Mean and variance of the sum over bonds, 400 draws at each of two couplings."""
    coupling = numbers(0.2, 0.35).requires_grad_()
    energy = Ising(coupling, (16, 16))
    (mean,) = torch.autograd.grad(energy.log_normalizer().sum(), coupling, create_graph=True)
    (variance,) = torch.autograd.grad(mean.sum(), coupling)
    s = energy.statistics(energy.sample((400,)))[..., 0].detach()
    z = (s.mean(0) - mean.detach()) / (variance / 400).sqrt()
    assert float(z.abs().max()) < 5
    ratio = s.var(0) / variance
    assert float((ratio - 1).abs().max()) < 5 * (2 / 400) ** 0.5


# --- what is known where


def test_parameters_keep_their_graph():
    coupling = nn.Parameter(torch.tensor(0.3))
    field = torch.tensor([0.1, 0.2], requires_grad=True)
    energy = Ising(coupling, (3, 4), field=field)
    assert [name for name, _ in energy.named_parameters()] == ["coupling"]
    energy(torch.ones(3, 4)).sum().backward()
    torch.testing.assert_close(coupling.grad, torch.tensor(-48.0))
    torch.testing.assert_close(field.grad, torch.tensor([-12.0, -12.0]))


def test_other_natural_parameters_leave_the_first_ones_alone():
    energy = Ising(nn.Parameter(torch.tensor(0.3)), (3, 4), field=0.5)
    other = energy.with_natural(torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
    assert other.batch_shape == (2,)
    torch.testing.assert_close(other.coupling, torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(energy.natural(), torch.tensor([0.3, 0.5]))
    assert not list(other.parameters())


@pytest.mark.parametrize(
    ("options", "known", "drawn"),
    [
        ({"shape": (32, 32)}, True, True),
        ({"shape": (32, 32), "field": 0.1}, False, True),
        ({"shape": (32, 32), "periodic": False}, False, True),
        ({"shape": (12, 90), "periodic": False, "field": 0.1}, True, True),
        ({"shape": (8, 90), "field": 0.1}, True, True),
        ({"shape": (9, 90), "field": 0.1}, False, True),
    ],
)
def test_what_is_known_where(options, known, drawn):
    law = EnergyDistribution(Ising(0.2, **options))
    assert law.is_normalized is known
    assert law.has_exact_sample is drawn


def test_a_distribution_of_a_batch_of_lattices():
    law = EnergyDistribution(Ising(numbers(0.1, 0.2, 0.3), (20, 20), field=numbers(0.1)[0]))
    assert law.batch_shape == (3,)
    assert law.expand((5, 3)).sample((2,)).shape == (2, 5, 3, 20, 20)


BAD = {
    "one side": (lambda: Ising(0.1, (4,)), ValueError, r"shape must be \(n, m\)"),
    "small torus": (lambda: Ising(0.1, (2, 4)), ValueError, "smaller lattices need periodic=False"),
    "wrong event": (
        lambda: Ising(0.1, (3, 3))(torch.ones(3, 4)),
        ValueError,
        r"inputs of shape \(..., 3, 3\)",
    ),
    "a field at every spin": (
        lambda: Ising(0.1, (3, 4), field=torch.randn(5, 3, 4)),
        ValueError,
        r"one of shape \(5, 3, 4\) would make a batch of lattices",
    ),
    "unknown": (
        lambda: Ising(0.1, (20, 20), field=0.1).log_normalizer(),
        NotImplementedError,
        "known on a torus without a field only",
    ),
    "negative": (
        lambda: Ising(-0.1, (20, 21)).sample(),
        ValueError,
        "couplings that are not negative",
    ),
    "negative past": (
        lambda: ferromagnet(-torch.ones(1), torch.zeros(()), torch.Size([4, 4]), periodic=True),
        ValueError,
        "couplings that are not negative: turn every other spin",
    ),
    "negative cluster sweeps": (
        lambda: swendsen_wang(torch.ones(4, 4), -torch.ones(()), periodic=True),
        ValueError,
        "couplings that are not negative: turn every other spin",
    ),
    "negative clusters": (
        lambda: Ising(-0.1, (21, 20)).sweep(torch.ones(21, 20), 1),
        ValueError,
        "couplings that are not negative",
    ),
    "frozen": (
        lambda: ferromagnet(
            torch.tensor([2.0]), torch.zeros(()), torch.Size([20, 20]), periodic=True, most=64
        ),
        RuntimeError,
        "1 of 1 lattices did not couple within 64 sweeps, couplings up to 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence):
        make()


def test_the_past_is_the_same_past(monkeypatch):
    """Every further run replays the numbers of those before it: fresh ones would favour lattices
    that meet soon."""
    seen, run = [], coupling_from_the_past._HeatBath.run

    def noted(self, which, seeds):
        seen.append(list(seeds))
        return run(self, which, seeds)

    monkeypatch.setattr(coupling_from_the_past._HeatBath, "run", noted)
    coupling = numbers(0.5).expand(20)
    ferromagnet(coupling, torch.zeros(()), torch.Size([4, 4]), periodic=True)
    assert len(seen) > 3
    assert all(later[: len(sooner)] == sooner for sooner, later in itertools.pairwise(seen))


def test_lattices_that_have_met_stay_where_they_are():
    """More past leads to the same present."""
    coupling, shape = numbers(0.3).expand(50), torch.Size([4, 4])
    colors = coupling_from_the_past._colors(shape, periodic=True)
    bath = coupling_from_the_past._HeatBath(
        coupling, torch.zeros(50, *shape, dtype=F64), colors, periodic=True
    )
    met, state = bath.run(torch.arange(50), [1, 2, 3, 4])
    also, further = bath.run(torch.arange(50), [1, 2, 3, 4, 5])
    assert int(met.sum()) > 0
    assert bool(also[met].all())
    assert torch.equal(state[met], further[met])


class Transformed(Ising):
    """A family whose statistics have a parameter of their own."""

    def __init__(self):
        super().__init__(nn.Parameter(torch.tensor(0.3)), (3, 4))
        self.exponent = nn.Parameter(torch.tensor(2.0))

    def statistics(self, x):
        return super().statistics(x).sign() * super().statistics(x).abs() ** self.exponent


def test_parameters_of_statistics_go_along():
    other = Transformed().with_natural(torch.tensor([0.1]))
    assert [name for name, _ in other.named_parameters()] == ["exponent"]
    torch.testing.assert_close(other(torch.ones(3, 4)), torch.tensor(-0.1 * 24.0**2))


class Diagonal(Ising):
    """Bonds along one diagonal as well."""

    def statistics(self, x):
        falling = (x[..., 1:, 1:] * x[..., :-1, :-1]).sum((-1, -2))
        return super().statistics(x) + falling.unsqueeze(-1)


class Twice(Ising):
    def natural(self):
        return 2 * super().natural()


class Known(Diagonal):
    """Says log Z of its own again."""

    is_tractable = True

    def log_normalizer(self):
        return (-self(all_lattices((3, 3)))).logsumexp(0)


@pytest.mark.parametrize("family", [Diagonal, Twice])
def test_another_law_has_not_inherited_what_is_known_of_the_first(family):
    energy = family(numbers(0.3)[0], (3, 3))
    law = EnergyDistribution(energy)
    assert not any((energy.is_tractable, energy.is_sampleable, energy.has_sweep))
    assert not any((law.is_normalized, law.has_exact_sample, law.energy_sweeps))
    assert Ising(0.3, (3, 3)).has_sweep


class Swept(Diagonal):
    """With a kernel for its law."""

    def sweep(self, x, num_sweeps):
        return x


def test_a_kernel_may_come_later():
    assert Swept(0.3, (3, 3)).has_sweep
    assert not Diagonal(0.3, (3, 3)).has_sweep


def test_another_law_may_say_what_it_knows():
    law = EnergyDistribution(Known(numbers(0.3)[0], (3, 3)))
    states = all_lattices((3, 3))
    assert law.is_normalized
    torch.testing.assert_close(law.log_prob(states).exp().sum(), numbers(1.0)[0])
