"""EGN's own layers: features brought to its width, the bridge from exemplars to tokens, and tiles cut into tokens."""

import torch
from torch import Tensor, nn

from hifusion.models.vit_layers import MLP


class Projector(nn.Module):
    """Features of tile and exemplars brought to the network's width, and mixed channel by channel."""

    def __init__(self, feature_width: int, n_genes: int, width: int, layers: int, dropout: float):
        super().__init__()
        self.query = nn.Linear(feature_width, width)
        self.key = nn.Linear(feature_width + n_genes, width)
        self.value = nn.Linear(n_genes, width)
        self.layers = nn.ModuleList(MLP(width, width, dropout) for _ in range(layers))

    def forward(
        self, feature: Tensor, exemplar_feature: Tensor, exemplar_target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, M), (B, K, M), (B, K, G) -> query (B, 1, D), keys (B, K, D), values (B, K, D)."""
        keys = self.key(torch.cat([exemplar_feature, exemplar_target], -1))
        both = torch.cat([self.query(feature)[:, None], keys], 1)
        for layer in self.layers:
            both = layer(both) + both
        return both[:, :1], both[:, 1:], self.value(exemplar_target)


class Bridge(nn.Module):
    """Exemplars refine the tile's feature, and that feature gates the tile's tokens.

    `last` leaves out what only a later bridge would read.
    """

    def __init__(self, width: int, heads: int, head_width: int, tokens: int, *, last: bool):
        super().__init__()
        self.heads = heads
        inner, hidden = heads * head_width, 4 * head_width
        self.gates = nn.Sequential(nn.Linear(2 * width, hidden), nn.SiLU(), nn.Linear(hidden, 2 * width))
        self.value = nn.Linear(width, width)
        self.key_norm = None if last else nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.query_in = nn.Linear(width, heads * tokens)
        self.token_norm = nn.LayerNorm(width)
        self.token_in = nn.Linear(width, inner)
        self.token_out = nn.Linear(inner, width, bias=False)
        self.query_out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D), query (B, 1, D), keys and values (B, K, D) -> new tokens, query and keys."""
        value = self.value(values)
        to_query, to_keys = self.gates(torch.cat([query - keys, keys], -1)).chunk(2, -1)
        refined = (to_query.sigmoid() * value).mean(1, keepdim=True) + query
        if self.key_norm is not None:
            keys = self.key_norm(to_keys.sigmoid() * value + keys)
        # One gate for each head and token: (B, h, T) -> (B, T, h, 1).
        gate = self.query_in(self.query_norm(refined)).unflatten(-1, (self.heads, -1)).squeeze(1).transpose(1, 2)
        gated = self.token_in(self.token_norm(tokens)).unflatten(-1, (self.heads, -1)) * gate.sigmoid()[..., None]
        gated = gated.flatten(2)
        tokens = self.token_out(gated) + tokens
        # The query goes on from what it was, not from `refined`, as the released code has it.
        return tokens, self.query_out(gated.mean(1, keepdim=True)) + query, keys


def flat_tokens(tile: Tensor, token_px: int) -> Tensor:
    """Pieces of tiles as the published network reads them: (B, 3, H, H) -> (B, T, token_px ** 2 * 3).

    Pieces go row by row; within a piece row, column, channel, channel fastest.
    """
    pieces = tile.unflatten(3, (-1, token_px)).unflatten(2, (-1, token_px))  # (B, 3, rows, p, columns, p)
    return pieces.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
