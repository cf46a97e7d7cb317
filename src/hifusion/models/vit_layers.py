"""Layers of the vision transformer that several rivals share: attention and MLP, each behind its layer norm."""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Layer norm, then multi-head self-attention over tokens, (..., T, D) -> (..., T, D), without the residual.

    Queries, keys and values have no bias; each is split into heads of `head_width` channels, which need not multiply
    to D. The scores of all pairs are never held at once where torch has a kernel for it, so sections of thousands of
    spots fit into memory.

    Parameters
    ----------
    width
        Channels D.
    heads, head_width
        The output projection is left out where one head already has width D.
    dropout
        On the output.
    """

    def __init__(self, width: int, heads: int, head_width: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        bare = heads == 1 and head_width == width
        self.out = nn.Identity() if bare else nn.Linear(heads * head_width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        batch = tokens if tokens.ndim > 2 else tokens[None]  # torch's economical kernels want a batch axis
        parts = self.qkv(self.norm(batch)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2)
        return self.dropout(self.out(attended)).view_as(tokens)


class MLP(nn.Module):
    """Layer norm, linear, exact GELU, linear: (..., D) -> (..., D), without the residual."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(F.gelu(self.expand(self.norm(x))))
        return self.dropout(self.contract(hidden))


class TransformerLayer(nn.Module):
    """Attention and MLP, each added to its input: (..., T, D) -> (..., T, D)."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, dropout: float):
        super().__init__()
        self.attention = Attention(width, heads, head_width, dropout)
        self.mlp = MLP(width, hidden, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.attention(tokens) + tokens
        return self.mlp(tokens) + tokens


PUBLISHED_ATTENTION = {
    r"(.*)\.attention\.norm\.": r"\1.{attention}.norm.",
    r"(.*)\.attention\.qkv\.": r"\1.{attention}.fn.to_qkv.",
    r"(.*)\.attention\.out\.": r"\1.{attention}.fn.to_out.0.",
    r"(.*)\.mlp\.norm\.": r"\1.{mlp}.norm.",
    r"(.*)\.mlp\.expand\.": r"\1.{mlp}.fn.net.0.",
    r"(.*)\.mlp\.contract\.": r"\1.{mlp}.fn.net.3.",
}


def published_layer(attention: str, mlp: str) -> dict[str, str]:
    """Rules of `published.published_names` for the layers here, given what a network calls the two halves."""
    return {own: name.format(attention=attention, mlp=mlp) for own, name in PUBLISHED_ATTENTION.items()}
