"""The three encoders of TRIPLEX: neighbour tiles, the whole section, and their fusion with the spot's own patch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.models.triplex_grid import NEIGHBOURS

_MASKED_SCORE = -65504.0  # of a tile off the slide: its weight is 0, and finite should all tiles be off


class SelfAttention(nn.Module):
    """Multi-head attention of tokens among themselves, (B, T, D) -> (B, T, D), without the residual.

    Parameters
    ----------
    interleaved
        Where the published weights keep query, key and value: fastest of all (the whole-section encoder), or as three
        blocks (the neighbour encoder).
    weight_dropout
        On the attention weights.
    relative
        Adds a learned bias for each distance between tiles, in rows and columns, to the scores.
    """

    def __init__(
        self, dim: int, heads: int, dropout: float, *, interleaved: bool, weight_dropout: float = 0.0, relative: bool
    ):
        super().__init__()
        self.heads, self.interleaved = heads, interleaved
        self.dropout, self.weight_dropout = dropout, weight_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(heads, NEIGHBOURS**2)) if relative else None

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """`keep`, bool (B, T): the tokens that are looked at; needs the relative bias."""
        qkv = self.qkv(tokens)
        if self.interleaved:
            q, k, v = qkv.unflatten(-1, (self.heads, -1, 3)).permute(4, 0, 2, 1, 3)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = None
        if self.bias is not None and keep is not None:
            relative = self.bias[:, _relative_index(self.bias.device)]
            scores = relative.masked_fill(~keep[:, None, None], _MASKED_SCORE)
        share = self.weight_dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=scores, dropout_p=share)
        return F.dropout(self.out(seen.transpose(1, 2).flatten(2)), self.dropout, self.training)


class CrossAttention(nn.Module):
    """Multi-head attention of one query token (B, 1, D) over tokens (B, T, D) -> (B, 1, D), without the residual."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, query: Tensor, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """`keep`, bool (B, T): the tokens that are looked at."""
        q = self.q(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = None
        if keep is not None:
            scores = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, _MASKED_SCORE)[:, None, None]
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return F.dropout(self.out(seen.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Block(nn.Module):
    """Attention and feed-forward, each with its norm before it and a residual: tokens (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, attention: SelfAttention, mlp: int, dropout: float):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), attention
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), _mlp(dim, mlp, dropout)

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens), keep)
        return tokens + self.mlp(self.mlp_norm(tokens))


class CrossBlock(nn.Module):
    """As `Block`, for a query (B, 1, D) over tokens (B, T, D); one norm serves both, and only the query moves on."""

    def __init__(self, dim: int, heads: int, mlp: int, dropout: float):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(dim), CrossAttention(dim, heads, dropout)
        self.mlp_norm, self.mlp = nn.LayerNorm(dim), _mlp(dim, mlp, dropout)

    def forward(self, query: Tensor, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        query = query + self.attention(self.attention_norm(query), self.attention_norm(tokens), keep)
        return query + self.mlp(self.mlp_norm(query))


class NeighbourEncoder(nn.Module):
    """Frozen features of the 5 x 5 tiles around a spot -> their tokens, (B, 25, D) -> (B, 25, D)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp: int, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, SelfAttention(dim, heads, dropout, interleaved=False, relative=True), mlp, dropout)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor, on_slide: Tensor) -> Tensor:
        for block in self.blocks:
            features = block(features, on_slide)
        return self.norm(features)


class SectionEncoder(nn.Module):
    """Frozen features of all spots of one section and their cells -> their tokens, (N, D), (N, 2) -> (N, D)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp: int, dropout: float):
        super().__init__()

        def block() -> Block:
            attention = SelfAttention(dim, heads, dropout, interleaved=True, weight_dropout=dropout, relative=False)
            return Block(dim, attention, mlp, dropout)

        self.first = block()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.rest = nn.ModuleList(block() for _ in range(depth - 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        tokens = self.first(features[None])[0]
        # No residual: spots of one cell leave with one token, as published.
        tokens = from_grid(self.position(on_grid(tokens, cells)), cells)[None]
        for block in self.rest:
            tokens = block(tokens)
        return self.norm(tokens)[0]


class Fusion(nn.Module):
    """A spot's section token looks at its patch and at its neighbours: (B, D), (B, T, D), (B, 25, D) -> (B, D)."""

    def __init__(self, dim: int, depth: int, heads: int, mlp: int, dropout: float):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, section: Tensor, patch: Tensor, neighbours: Tensor, on_slide: Tensor) -> Tensor:
        by_patch = by_neighbours = section[:, None]
        for block in self.blocks:  # the same weights for both views
            by_patch = block(by_patch, patch)
            by_neighbours = block(by_neighbours, neighbours, on_slide)
        return self.norm(by_patch + by_neighbours)[:, 0]


def on_grid(tokens: Tensor, cells: Tensor) -> Tensor:
    """Tokens (N, D) on the grid of their cells (column, row): (1, D, rows, columns), 0 where empty, else their mean."""
    columns, rows = (int(n) + 1 for n in cells.amax(0))
    flat = cells[:, 1] * columns + cells[:, 0]
    sums = tokens.new_zeros(rows * columns, tokens.shape[1]).index_add(0, flat, tokens)
    spots = tokens.new_zeros(rows * columns).index_add(0, flat, tokens.new_ones(len(flat)))
    return (sums / spots.clamp(min=1)[:, None]).T.reshape(1, -1, rows, columns)


def from_grid(grid: Tensor, cells: Tensor) -> Tensor:
    """What a grid (1, D, rows, columns) holds at the cells (column, row) of spots: (N, D)."""
    return grid[0][:, cells[:, 1], cells[:, 0]].T


def _relative_index(device: torch.device) -> Tensor:
    """Index of the bias for every pair of the 25 tiles, int64 (25, 25): 5 * |rows apart| + |columns apart|."""
    tiles = torch.arange(NEIGHBOURS**2, device=device)
    row, column = tiles // NEIGHBOURS, tiles % NEIGHBOURS
    return NEIGHBOURS * (row[:, None] - row).abs() + (column[:, None] - column).abs()


def _mlp(dim: int, ratio: int, dropout: float) -> nn.Sequential:
    inner, outer = nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
    return nn.Sequential(inner, nn.GELU(), nn.Dropout(dropout), outer, nn.Dropout(dropout))
