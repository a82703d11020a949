"""The networks of the benchmark of random graphs, and the models ergmx writes as formulas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

FORMULAS = {
    "flomarriage": "edges + triangle",
    "zach": "edges + gwesp(0.2, fixed=TRUE)",
    "faux.mesa.high": "edges + nodematch('Grade') + gwesp(0.5, fixed=TRUE)",
}
PRIOR_SCALE = 10.0  # what ergmx takes: Normal(0, 100 I)


@dataclass
class Network:
    """A network as ergmx ships it."""

    name: str
    graph: Any  # as igraph

    @property
    def num_nodes(self) -> int:
        """n."""
        return int(self.graph.vcount())

    def adjacency(self) -> np.ndarray:
        """Returns the symmetric matrix of 0 and 1, ``(n, n)``."""
        matrix = np.zeros((self.num_nodes, self.num_nodes), dtype=bool)
        for i, j in self.graph.get_edgelist():
            matrix[i, j] = matrix[j, i] = True
        return matrix

    def labels(self, name: str) -> list[Any]:
        """Returns an attribute of the nodes."""
        return list(self.graph.vs[name])


def load(name: str) -> Network:
    """Returns a network of ergmx's collection."""
    from ergmx import datasets

    return Network(name, datasets.load(name))
