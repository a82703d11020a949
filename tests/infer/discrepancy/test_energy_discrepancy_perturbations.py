"""Perturbations of energy discrepancy: what is drawn has the law that matrices say.

Transition matrices are written out here over all states of small events; the shipped draws are
counted against them, the two negatives of a row jointly, which sees whether they share y.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from torch.distributions import constraints

from pyro_ebm.distributions import EnergyDistribution
from pyro_ebm.infer.discrepancy.discrete_energy_discrepancy import DiscreteEnergyDiscrepancy
from pyro_ebm.infer.discrepancy.perturbations import GaussianNoise, MixedColumns
from pyro_ebm.infer.discrepancy.perturbed_space import Layout, PerturbedSpace, Sites
from pyro_ebm.infer.discrepancy.site_perturbations import (
    BernoulliFlips,
    HeatKernel,
    MaskedSite,
    SiteFlip,
)
from pyro_ebm.ops.constraints import spins
from pyro_ebm.ops.heat_kernels import rates

SKEWED = torch.tensor([[-1.0, 0.7, 0.3], [0.1, -0.1, 0.0], [0.0, 2.0, -2.0]], dtype=torch.float64)


def interval(*sizes):
    """Categories 0 to K - 1, each column with its own K."""
    high = torch.tensor(sizes) - 1
    return constraints.independent(constraints.integer_interval(torch.zeros_like(high), high), 1)


def numbers(sizes):
    """All states as numbers of values, ``(N, d)``."""
    return torch.tensor(list(itertools.product(*map(range, sizes))))


def product(kernels):
    """The kernel of sites that move by themselves."""
    whole = torch.ones(1, 1)
    for kernel in kernels:
        whole = torch.kron(whole, kernel)
    return whole


def one_at_a_time(sizes, there):
    """(1 / d) sum over sites of a kernel of that site alone."""
    parts = []
    for j in range(len(sizes)):
        parts.append(product([there(k) if i == j else torch.eye(k) for i, k in enumerate(sizes)]))
    return sum(parts) / len(sizes)


def exponential(structure, time):
    def kernel(k):
        scale = k**2 if structure in ("cyclic", "ordinal") else 1
        matrix = structure if isinstance(structure, torch.Tensor) else rates(structure, k)
        return torch.matrix_exp(time * scale * matrix)[:k]

    return kernel


# Each: a perturbation, the sizes of sites, and the kernels q(y | x) of its ways there, one of which
# is taken at random: which site is masked is known on the way back.
WAYS = {
    "bernoulli": (
        BernoulliFlips(0.2),
        (2, 2, 2),
        [product([torch.tensor([[0.8, 0.2], [0.2, 0.8]], dtype=torch.float64)] * 3)],
    ),
    "flip of bits": (
        SiteFlip(),
        (2, 2, 2),
        [one_at_a_time((2, 2, 2), lambda k: 1 - torch.eye(k, dtype=torch.float64))],
    ),
    "flip of categories": (
        SiteFlip(),
        (3, 2),
        [one_at_a_time((3, 2), lambda k: (1 - torch.eye(k, dtype=torch.float64)) / (k - 1))],
    ),
    "mask": (
        MaskedSite(),
        (3, 2),
        [
            product([torch.ones(3, 1), torch.eye(2)]).double(),
            product([torch.eye(3), torch.ones(2, 1)]).double(),
        ],
    ),
} | {
    name: (HeatKernel(structure, time), sizes, (structure, time))
    for name, structure, time, sizes in (
        ("uniform", "uniform", 0.5, (4, 2)),
        ("cyclic", "cyclic", 0.015, (4, 3)),
        ("ordinal", "ordinal", 0.03, (3, 4)),
        ("absorbing", "absorbing", 0.6, (3, 2)),
        ("own rates", SKEWED, 0.4, (3, 3)),
    )
}


@pytest.fixture
def way(request, double_precision):
    perturbation, sizes, kernels = WAYS[request.param]
    if isinstance(kernels, tuple):
        kernels = [product([exponential(*kernels)(k) for k in sizes])]
    return perturbation, sizes, kernels


def back_of(kernel):
    return (kernel / kernel.sum(0)).T


def joint_of(kernels, start):
    """The law of (y, x'_1, x'_2) given x, summed over y: ``(N, N)``."""
    total = torch.zeros(())
    for kernel in kernels:
        rho = back_of(kernel)
        total = total + torch.einsum("y,ya,yb->ab", kernel[start], rho, rho) / len(kernels)
    return total


def worst_z(counts, law):
    """The largest deviation of counts, in standard errors; impossible cells must be empty."""
    num = counts.sum()
    possible = law > 1e-12
    assert counts[~possible].sum() == 0
    return float(((counts - num * law) / (num * law * (1 - law)).sqrt())[possible].abs().max())


def counted(perturbation, sizes, start, num=40_000):
    """Pairs of negatives of one datum, as a table over all pairs of states."""
    layout = Layout(1, 0, Sites.of(interval(*sizes), torch.Size([len(sizes)]), "A test"))
    x = numbers(sizes)[start].double().expand(num, -1)
    pairs = perturbation.back(perturbation.there(x, layout), 2, layout).long()
    strides = torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])
    at = (pairs * strides).sum(-1)
    size = math.prod(sizes)
    return torch.bincount(at[0] * size + at[1], minlength=size**2).reshape(size, size).double()


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("start", [0, 3])
def test_negatives_have_the_law_of_the_matrices(way, start):
    """Pairs from one y. Five standard errors of 40 000 draws see 0.012 in any cell."""
    perturbation, sizes, kernels = way
    pyro.set_rng_seed(0)
    table = counted(perturbation, sizes, start)
    assert worst_z(table, joint_of(kernels, start)) < 5


@pytest.mark.parametrize("way", [name for name in WAYS if name != "mask"], indirect=True)
def test_the_count_sees_negatives_that_do_not_share_y(way):
    """The product of the margins is rejected: except for a mask, which is no y by itself."""
    perturbation, sizes, kernels = way
    pyro.set_rng_seed(0)
    margin = joint_of(kernels, 0).sum(1)
    apart = torch.outer(margin, margin)
    table = counted(perturbation, sizes, 0)
    z = (table - 40_000 * apart) / (40_000 * apart).sqrt().clamp_min(1.0)
    assert z.abs().max() > 20


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_mass_of_the_way_back(way):
    """E c(y) given x, over the draws, is sum_y q(y|x) sum_x' q(y|x'); c is 1 where q is symmetric.

    Times five standard errors; without the mask's value it would be off by more.
    """
    perturbation, sizes, kernels = way
    pyro.set_rng_seed(0)
    layout = Layout(1, 0, Sites.of(interval(*sizes), torch.Size([len(sizes)]), "A test"))
    x = numbers(sizes)[1].double().expand(20_000, -1)
    log_mass = perturbation.log_mass(perturbation.there(x, layout), layout)
    exact = sum(kernel[1] @ kernel.sum(0) for kernel in kernels) / len(kernels)
    if log_mass is None:
        for kernel in kernels:
            torch.testing.assert_close(kernel, kernel.T, rtol=0, atol=1e-12)
        return
    masses = log_mass.exp()
    assert masses.shape == (20_000,)
    stderr = float(masses.std()) / math.sqrt(20_000)
    assert abs(float(masses.mean()) - float(exact)) < 5 * stderr + 1e-12
    assert abs(float(exact) - 1) > 10 * stderr


def test_a_flip_is_a_walk_on_two_values():
    """epsilon = (1 - e^-t) / 2 makes the two perturbations one."""
    t = 0.5
    kernel = torch.matrix_exp(t * rates("uniform", 2).double())
    assert float(kernel[0, 1]) == pytest.approx(0.5 * (1 - math.exp(-t)), abs=1e-12)
    pyro.set_rng_seed(0)
    for perturbation in (BernoulliFlips(0.5 * (1 - math.exp(-t))), HeatKernel("uniform", t)):
        table = counted(perturbation, (2, 2), 1)
        assert worst_z(table, joint_of([product([kernel, kernel])], 1)) < 5


def test_times_of_rows():
    """Log-uniform, one per row: the share of sites that moved gives it away."""
    size, num = 5, 3000
    layout = Layout(1, 0, Sites.of(interval(*[size] * num), torch.Size([num]), "A test"))
    walk = HeatKernel("uniform", (0.02, 1.0))
    pyro.set_rng_seed(0)
    x = torch.zeros(400, num)
    moved = (walk.back(walk.there(x, layout), 1, layout)[0] != 0).double().mean(-1)
    times = -torch.log1p(-moved * size / (size - 1)) / 2  # there and back
    assert times.min() > 0.013
    assert times.max() < 1.3
    width = math.log(50)
    logs = times.log()
    middle = 0.5 * math.log(0.02)
    assert logs.mean().item() == pytest.approx(middle, abs=5 * width / math.sqrt(12 * 400))
    assert logs.std().item() == pytest.approx(width / math.sqrt(12), rel=0.1)


@pytest.mark.parametrize(
    ("support", "values"),
    [
        (constraints.boolean, (0.0, 1.0)),
        (spins, (-1.0, 1.0)),
        (constraints.integer_interval(2, 5), (2.0, 3.0, 4.0, 5.0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("perturbation", [SiteFlip(), MaskedSite(), HeatKernel("ordinal", 0.1)])
def test_values_and_dtypes_of_supports(perturbation, support, values, dtype):
    """Any numbers, any event shape, scalars too; all values come up, no others do."""
    for shape in ((3,), (2, 2)) if isinstance(perturbation, SiteFlip) else ((), (3,), (2, 2)):
        p = EnergyDistribution(lambda x: 0.0 * x, support=support, event_shape=shape)
        space = PerturbedSpace(p, "A test")
        x = torch.full((200, 4, *shape), values[1], dtype=dtype)
        y = perturbation.there(space.coordinates(x), space.layout)
        points = perturbation.back(y, 3, space.layout)
        assert points.dtype is dtype
        assert points.shape == (3, *x.shape)
        assert sorted(set(points.flatten().tolist())) == list(values)
        mass = perturbation.log_mass(y, space.layout)
        assert mass is None or mass.shape == (200, 4)
        assert mass is None or mass.dtype is (dtype if dtype.is_floating_point else torch.float64)


def test_matrices_of_sites_are_not_mixed_up():
    """Only the second of two columns moves where only it is masked."""
    pyro.set_rng_seed(0)
    layout = Layout(1, 0, Sites.of(interval(2, 7), torch.Size([2]), "A test"))
    x = torch.zeros(2000, 2)
    points = MaskedSite().back(MaskedSite().there(x, layout), 40, layout)
    first, second = (points[..., 0] != 0).any(0), (points[..., 1] != 0).any(0)
    assert not (first & second).any()
    assert (first | second).double().mean() > 0.99
    assert points[..., 0].max() == 1
    assert points[..., 1].max() == 6


# --- tables


def table():
    """Columns: a positive number, a spin, two reals, a category of 1 to 3, a simplex of none."""
    support = constraints.cat(
        [
            constraints.positive,
            spins,
            constraints.real,
            constraints.integer_interval(1, 3),
        ],
        dim=-1,
        lengths=[1, 1, 2, 1],
    )
    weights = torch.tensor([0.3, -0.2, 0.5, 1.1, -0.4])
    return EnergyDistribution(
        lambda x: (x * weights).sum(-1) ** 2, event_shape=(5,), support=support
    )


def rows_of_table(num):
    real = torch.randn(num, 2)
    spin = 2.0 * torch.randint(2, (num, 1)) - 1
    return torch.cat([torch.rand(num, 1) + 0.1, spin, real, 1.0 + torch.randint(3, (num, 1))], -1)


def test_coordinates_of_a_table():
    """Real ones first, log x for the positive column; the potential has its Jacobian."""
    p, x = table(), rows_of_table(20)
    space = PerturbedSpace(p, "A test")
    u = space.coordinates(x)
    want = torch.stack([x[:, 0].log(), x[:, 2], x[:, 3], x[:, 1], x[:, 4]], -1)
    torch.testing.assert_close(u, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        space.potential(u), p.potential(x) - x[:, 0].log(), rtol=0, atol=1e-12
    )


def test_columns_of_a_table_are_perturbed_by_themselves():
    """Real steps have variance 2 t and covariance t between negatives; categories their own law."""
    p = table()
    space = PerturbedSpace(p, "A test")
    both = MixedColumns(GaussianNoise(0.25), MaskedSite())
    pyro.set_rng_seed(0)
    x = rows_of_table(40_000)
    u = space.coordinates(x)
    y = both.there(u, space.layout)
    points = both.back(y, 2, space.layout)
    assert points.shape == (2, 40_000, 5)
    steps = (points - u)[..., :3]
    cov = torch.cov(torch.cat([steps[0].T, steps[1].T]))
    want = torch.kron(torch.tensor([[0.5, 0.25], [0.25, 0.5]]), torch.eye(3))
    torch.testing.assert_close(cov, want, rtol=0, atol=0.02)
    moved = (points[0] != u)[:, 3:].double().mean(0)
    assert moved[0].item() == pytest.approx(0.5 * 0.5, abs=0.013)
    assert moved[1].item() == pytest.approx(0.5 * 2 / 3, abs=0.013)
    masses = both.log_mass(y, space.layout)
    assert set(masses.tolist()) <= {math.log(2), math.log(3)}
    assert len(set(masses.tolist())) == 2


def test_a_table_without_masses():
    p = table()
    space = PerturbedSpace(p, "A test")
    both = MixedColumns(GaussianNoise(0.25), HeatKernel("uniform", 0.3))
    y = both.there(space.coordinates(rows_of_table(4)), space.layout)
    assert both.log_mass(y, space.layout) is None


# --- what is refused


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1/2\].*got 0.7"):
        BernoulliFlips(0.7)
    with pytest.raises(ValueError, match="time must be positive"):
        HeatKernel("uniform", 0.0)
    with pytest.raises(ValueError, match="structure must be one of"):
        HeatKernel("torus", 1.0)
    with pytest.raises(ValueError, match="rows sum to zero"):
        HeatKernel(torch.ones(3, 3), 1.0)
    with pytest.raises(ValueError, match="rows sum to zero"):
        HeatKernel(torch.zeros(3), 1.0)


def contrast(perturbation, support, shape, x):
    p = EnergyDistribution(lambda x: 0.0 * x.sum(-1), support=support, event_shape=shape)
    return DiscreteEnergyDiscrepancy(perturbation).draw(p, x, None)


def test_a_perturbation_that_does_not_fit_is_refused():
    three = interval(3, 3)
    with pytest.raises(NotImplementedError, match=r"BernoulliFlips flips .*HeatKernel"):
        contrast(BernoulliFlips(), three, (2,), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one site of two values .* comes back"):
        contrast(SiteFlip(), constraints.boolean, (1,), torch.zeros(4, 1))
    with pytest.raises(NotImplementedError, match="GaussianNoise moves real .*MixedColumns"):
        contrast(GaussianNoise(), three, (2,), torch.zeros(4, 2))
    with pytest.raises(NotImplementedError, match="MixedColumns perturbs tables .*one kind"):
        contrast(MixedColumns(GaussianNoise(), SiteFlip()), three, (2,), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="rates of HeatKernel are for 3 values, but a site has 2"):
        contrast(HeatKernel(SKEWED), interval(3, 2), (2,), torch.zeros(4, 2))
    mixed = table().support
    with pytest.raises(NotImplementedError, match=r"SiteFlip changes discrete .*MixedColumns"):
        contrast(SiteFlip(), mixed, (5,), rows_of_table(3))


def test_supports_that_have_no_list_of_values_are_refused():
    with pytest.raises(NotImplementedError, match=r"finite list .*DiscreteFisher.*one-hot"):
        contrast(SiteFlip(), constraints.nonnegative_integer, (2,), torch.zeros(4, 2))
    with pytest.raises(NotImplementedError, match="finite list"):
        contrast(SiteFlip(), constraints.one_hot, (2,), torch.tensor([[1.0, 0.0]]))
    per_row = constraints.integer_interval(0, torch.tensor([1, 2, 3, 4]))
    with pytest.raises(NotImplementedError, match="the same in all rows"):
        contrast(SiteFlip(), per_row, (), torch.zeros(4))
    with pytest.raises(NotImplementedError, match="use EnergyDiscrepancy"):
        contrast(SiteFlip(), constraints.real, (2,), torch.zeros(4, 2))


@pytest.mark.parametrize("bad", [float("nan"), 0.5, 3.0, -1.0])
def test_observations_off_the_support_are_refused(bad):
    x = torch.zeros(4, 2)
    x[2, 1] = bad
    with pytest.raises(ValueError, match="lie in the support"):
        contrast(HeatKernel(), interval(3, 3), (2,), x)
