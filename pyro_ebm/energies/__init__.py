"""Energies: callables ``x -> E(x)`` in nats, lower meaning likelier."""

from __future__ import annotations

from pyro_ebm.energies.banana import Banana
from pyro_ebm.energies.base import Energy, ScaledEnergy, SumEnergy
from pyro_ebm.energies.checks import check_energy_shape
from pyro_ebm.energies.conway_maxwell_poisson import ConwayMaxwellPoisson
from pyro_ebm.energies.double_well import DoubleWell
from pyro_ebm.energies.exponential_family import ExponentialFamily
from pyro_ebm.energies.funnel import Funnel
from pyro_ebm.energies.gaussian import GaussianEnergy
from pyro_ebm.energies.graph_dyads import adjacency_of, dyads, ties_of
from pyro_ebm.energies.graph_goodness_of_fit import (
    degree_counts,
    distance_counts,
    shared_partner_counts,
)
from pyro_ebm.energies.graph_statistics import (
    GWESP,
    Dependence,
    DyadStatistic,
    Edges,
    GraphStatistic,
    GWDegree,
    NodeCovariate,
    NodeMatch,
    Stars,
    Triangles,
)
from pyro_ebm.energies.ising import Ising
from pyro_ebm.energies.mixture import GaussianMixtureEnergy
from pyro_ebm.energies.neural import ConvEnergy, MLPEnergy
from pyro_ebm.energies.quartic import Quartic
from pyro_ebm.energies.random_graph import ExponentialRandomGraph
from pyro_ebm.energies.row_wise import RowWise

__all__ = [
    "GWESP",
    "Banana",
    "ConvEnergy",
    "ConwayMaxwellPoisson",
    "Dependence",
    "DoubleWell",
    "DyadStatistic",
    "Edges",
    "Energy",
    "ExponentialFamily",
    "ExponentialRandomGraph",
    "Funnel",
    "GWDegree",
    "GaussianEnergy",
    "GaussianMixtureEnergy",
    "GraphStatistic",
    "Ising",
    "MLPEnergy",
    "NodeCovariate",
    "NodeMatch",
    "Quartic",
    "RowWise",
    "ScaledEnergy",
    "Stars",
    "SumEnergy",
    "Triangles",
    "adjacency_of",
    "check_energy_shape",
    "degree_counts",
    "distance_counts",
    "dyads",
    "shared_partner_counts",
    "ties_of",
]
