"""The graph of neighbouring spots of a section, and the layer that pools over it (Hist2ST's)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.models.inputs import check_choice, check_shape

NeighbourPolicy = Literal["mean", "max"]
Isolated = Literal["self", "zero"]
Pruning = Literal["grid", "none", "std"]

_ROWS = 1024  # of the distance matrix at a time: 5,000 spots then cost 40 MB, not 200


def neighbour_graph(position: Tensor, k: int = 4, pruning: Pruning = "grid", radius: float = 2.0) -> Tensor:
    """Neighbours of each spot: bool (N, N), row i marks those of spot i; directed, never the spot itself.

    Candidates are the k nearest other spots; of equal distances the lower index comes first.

    Parameters
    ----------
    position
        Coordinates (N, 2), whole numbers or floats. On the square lattice of ST these are array coordinates; on
        hexagonal arrays, whose columns count by two, give distances in units of the pitch instead.
    pruning
        "grid" (Hist2ST on her2st): those candidates within `radius`, so a spot can have none. "none" (cSCC): all.
        "std": those within the mean plus one (population) standard deviation of the k distances.

    Raises
    ------
    InputError
        Another shape, or an unknown pruning.
    """
    check_shape("position", position, "N", 2)
    check_choice("pruning", pruning, Pruning)
    place, n = position.to(torch.float64), len(position)
    k = min(k, n - 1)
    graph = torch.zeros(n, n, dtype=torch.bool, device=position.device)
    for start in range(0, n, _ROWS):
        rows = torch.arange(start, min(start + _ROWS, n), device=position.device)
        square = (place[rows, None] - place[None]).square().sum(-1)
        square[rows - start, rows] = math.inf
        ordered, candidate = square.sort(stable=True, dim=1)
        distance = ordered[:, :k].sqrt()
        if pruning == "grid":
            kept = distance <= radius
        elif pruning == "std":
            kept = distance <= (distance.mean(1) + distance.std(1, correction=0))[:, None]
        else:
            kept = torch.ones_like(distance, dtype=torch.bool)
        graph[rows[:, None], candidate[:, :k]] = kept
    return graph


class GraphLayer(nn.Module):
    """Neighbours pooled, transformed and scaled to length 1: (N, D) -> (N, D) (GraphSAGE without the spot itself).

    Parameters
    ----------
    width
        Channels D.
    policy
        How neighbours are pooled.
    isolated
        What a spot without neighbours has for their pool: its own feature, or zero.
    """

    def __init__(self, width: int, policy: NeighbourPolicy = "mean", isolated: Isolated = "self"):
        super().__init__()
        self.policy, self.isolated = policy, isolated
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Features (N, D) and adjacency bool (N, N) -> (N, D)."""
        degree = adjacency.sum(1, keepdim=True)
        if self.policy == "mean":
            pooled = adjacency.to(x.dtype) @ x / degree.clamp(min=1)
        else:
            # Neighbours first in each row: (N, most neighbours, D) instead of all (N, N, D) pairs.
            known, neighbour = adjacency.to(torch.uint8).sort(stable=True, dim=1, descending=True)
            most = max(int(degree.max()), 1)
            pooled = x[neighbour[:, :most]].masked_fill(known[:, :most, None] == 0, -math.inf).amax(1)
        pooled = torch.where(degree > 0, pooled, x if self.isolated == "self" else torch.zeros_like(x))
        return F.normalize(self.linear(pooled).relu(), dim=1, eps=1e-12)
