"""What ASIGN-2D and ASIGN-3D are made of: attention to tiles, graph blocks, and the transformer over their states."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["corrected", "published"]
LevelOrder = Literal["ordered", "released"]

LEVELS = 3
"""Graph blocks of each resolution, and so states of each node."""


class TileProjections(nn.Module):
    """Query of a spot, key and value of one of its tiles, and what is made of the value; each (N, D) -> (N, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))


class TileAttention(nn.Module):
    """What a spot takes from its 512 px and its 1024 px tile, three times (N, D) -> (N, D), without the residual.

    "corrected": one attention over both tiles. "published": one attention for each tile; its only key has weight 1
    whatever the spot looks like, so neither the spot nor query and key move anything.
    """

    def __init__(self, dim: int, heads: int, dropout: float, form: Form):
        super().__init__()
        self.heads, self.dropout, self.form = heads, dropout, form
        self.tile_512, self.tile_1024 = TileProjections(dim), TileProjections(dim)

    def forward(self, spot: Tensor, tile_512: Tensor, tile_1024: Tensor) -> Tensor:
        scales = ((self.tile_512, tile_512), (self.tile_1024, tile_1024))
        q = torch.stack([scale.query(spot) for scale, _ in scales]).unflatten(-1, (self.heads, -1))
        k = torch.stack([scale.key(tile) for scale, tile in scales]).unflatten(-1, (self.heads, -1))
        v = torch.stack([scale.value(tile) for scale, tile in scales]).unflatten(-1, (self.heads, -1))
        scores = (q * k).sum(-1, keepdim=True) / q.shape[-1] ** 0.5  # (2, N, heads, 1)
        weights = scores.softmax(0 if self.form == "corrected" else -1)
        seen = (F.dropout(weights, self.dropout, self.training) * v).flatten(-2)
        return self.tile_512.out(seen[0]) + self.tile_1024.out(seen[1])


class GraphBlock(nn.Module):
    """Nodes (N, D) and their graph (N, N), row looks at column -> states (N, D) of length 1, or 0.

    "corrected": a softmax over each node's neighbours and itself, by `score`; entries of the graph weigh them.
    "published": the plain mean of the neighbours, times a number of the node itself that the normalisation takes out
    again. A node without neighbours gets zeros there (the release divides by zero).
    """

    def __init__(self, dim: int, form: Form):
        super().__init__()
        self.form = form
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.score = nn.Parameter(torch.empty(dim, 1))
        nn.init.xavier_uniform_(self.weight)
        nn.init.xavier_uniform_(self.score)

    def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
        graph = graph.to(nodes.dtype)
        score = nodes @ self.score
        if self.form == "corrected":
            looped = graph.masked_fill(torch.eye(len(graph), dtype=torch.bool, device=graph.device), 1.0)
            weights = (score.T + looped.log()).softmax(1)
        else:
            total = graph.sum(1, keepdim=True)
            weights = score.softmax(0) * graph / total.masked_fill(total == 0, 1.0)
        return F.normalize(torch.relu(F.linear(weights @ nodes, self.weight)), dim=1)


class LevelTransformer(nn.Module):
    """The three states of every node, (3, N, D), seen together -> (N, D).

    "ordered": a node's three states are its sequence. "released": the stack is re-read as (N, 3, D) as it lies in
    memory, which mixes states of other nodes.
    """

    def __init__(self, dim: int, heads: int, layers: int, dropout: float, order: LevelOrder):
        super().__init__()
        self.order = order
        self.level = nn.Parameter(torch.randn(LEVELS, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.encoder(self.coded(states)).mean(1)

    def coded(self, states: Tensor) -> Tensor:
        """Sequences (N, 3, D) of the stack (3, N, D), with the level code."""
        nodes = states.shape[1]
        sequences = states.transpose(0, 1) if self.order == "ordered" else states.reshape(nodes, LEVELS, -1)
        return sequences + self.level
