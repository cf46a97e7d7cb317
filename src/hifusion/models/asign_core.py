"""What ASIGN-2D and ASIGN-3D share: configuration, inputs, output, and the way from pixels to the states of nodes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hifusion.errors import InputError
from hifusion.models.asign_blocks import LEVELS, Form, GraphBlock, LevelOrder, LevelTransformer, TileAttention
from hifusion.models.inputs import (
    centre_patch,
    check_choice,
    check_dropout,
    check_floats,
    check_shape,
    check_whole_numbers,
)
from hifusion.models.published import fill, published_names, unwrapped
from hifusion.models.resnet import RESNET50, Bottleneck, ResNet, TrunkConfig, as_tensor, imagenet_scaled

UNUSED = ("transformer.encoder_layer.", "gene_head_512.", "gene_head_1024.", "lstm_512.")
"""Beginnings of published names whose weights move no prediction."""

_RULES = {
    r"encoder_head\.": "encoder.fc.",
    r"tile_attention\.tile_(\d+)\.(\w+)\.": r"cross_attention_\1.\2_proj.",
    r"spot_blocks\.": "gat_layer_224.",
    r"tile_(\d+)_blocks\.": r"gat_layer_\1.",
    r"(gat_layer_\d+\.\d)\.score": r"\1.att_weight",
    r"transformer\.level$": "transformer.positional_encoding",
    r"transformer\.encoder\.": "transformer.transformer_encoder.",
    r"norm\.": "gene_head_250.0.",
    r"head\.": "gene_head_250.1.",
}
"""Own names -> published ones; the head is called so whatever the number of genes."""


@dataclass(frozen=True)
class AsignConfig(TrunkConfig):
    """Shape of an ASIGN network, 2D or 3D.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    feature_dim
        Width D of the frozen features and of all else behind the encoder.
    patch_px
        Side of the spot patch, the centre of the region patch.
    form
        "corrected", or "published" for what the released code computes, see `hifusion.models.asign`.
    level_order
        "ordered", or "released": see `hifusion.models.asign_blocks.LevelTransformer`; only for the published form.
    width
        Channels of the encoder's first stage; 64 in the paper.
    heads
        Attention heads of tiles and transformer; divides D.
    layers
        Of the transformer.
    dropout
        In [0, 1).
    encoder_batch
        Spots that the encoder sees at once. A larger section goes through in pieces, whose activations are computed
        again for the gradients, so that a section of any size can be trained on. Batch statistics are then of a piece,
        and enter the running ones twice.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    feature_dim: int = 1024
    patch_px: int = 224
    form: Form = "corrected"
    level_order: LevelOrder = "ordered"
    width: int = 64
    heads: int = 8
    layers: int = 3
    dropout: float = 0.1
    encoder_batch: int = 128

    def __post_init__(self) -> None:
        check_whole_numbers(self, "n_genes", "feature_dim", "patch_px", "width", "heads", "layers", "encoder_batch")
        check_dropout(self.dropout)
        check_choice("form", self.form, Form)
        check_choice("level_order", self.level_order, LevelOrder)
        if self.feature_dim % self.heads:
            raise InputError(f"heads: {self.heads} does not divide feature_dim={self.feature_dim}; use a divisor")
        if self.form == "corrected" and self.level_order == "released":
            raise InputError("level_order: 'released' mixes nodes up; use it with form='published' only")


class AsignOutput(NamedTuple):
    """What a forward pass gives, in the order of the inputs."""

    expression: Tensor
    """(N, G)"""
    tile_512_expression: Tensor
    """(M512, G), for auxiliary supervision."""
    tile_1024_expression: Tensor
    """(M1024, G), likewise."""
    embedding: Tensor
    """(N, D), what the head reads."""


class AsignSections(NamedTuple):
    """What is known of a section (ASIGN-2D) or of all sections of a patient (3D) beside its pixels."""

    tile_512_features: Tensor
    """(M512, D), frozen features of the tiles that hold a spot."""
    tile_1024_features: Tensor
    """(M1024, D)"""
    tile_512_index: Tensor
    """int64 (N,), the tile of each spot, see `hifusion.models.asign_graphs.tiles_of`."""
    tile_1024_index: Tensor
    """int64 (N,)"""
    tile_512_graph: Tensor
    """(M512, M512), see `radius_graph` there; true, or a weight above 0, where the row looks at the column."""
    tile_1024_graph: Tensor
    """(M1024, M1024)"""
    spot_graph: Tensor
    """(N, N), see `nearest_graph` there, or `stack_graph` for 3D."""


class AsignCore(nn.Module):
    """From patches and tiles to the three states of every node of each resolution."""

    loss_needs: ClassVar[tuple[str, ...]] = (
        "tile_512_target",
        "tile_1024_target",
        "tile_512_index",
        "tile_1024_index",
    )
    """Keywords of the loss, beside the optional `scored`."""
    whole_section: ClassVar[bool] = True

    def __init__(self, config: AsignConfig):
        super().__init__()
        self.config = config
        dim, form = config.feature_dim, config.form
        self.encoder = ResNet(RESNET50, config.width, Bottleneck)
        self.encoder_head = nn.Linear(32 * config.width, dim)
        self.tile_attention = TileAttention(dim, config.heads, config.dropout, form)
        self.spot_blocks, self.tile_512_blocks, self.tile_1024_blocks = (
            nn.ModuleList(GraphBlock(dim, form) for _ in range(LEVELS)) for _ in range(3)
        )
        self.transformer = LevelTransformer(dim, config.heads, config.layers, config.dropout, config.level_order)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.n_genes)

    def patches(self, region: Tensor) -> Tensor:
        """Standardised centre of uint8 regions (N, 3, R, R)."""
        patch = imagenet_scaled(centre_patch(region, self.config.patch_px), self.head.weight)
        return patch.to(memory_format=self.config.memory_format)

    def encode(self, patch: Tensor) -> Tensor:
        """Features (N, D) of standardised patches (N, 3, patch_px, patch_px)."""
        check_shape("patch", patch, "N", 3, self.config.patch_px, self.config.patch_px)
        check_floats("patch", patch)
        pieces = patch.tensor_split(math.ceil(len(patch) / self.config.encoder_batch))
        if len(pieces) > 1 and torch.is_grad_enabled():
            encoded = [checkpoint(self.encoder, piece, use_reentrant=False) for piece in pieces]
        else:
            encoded = [self.encoder(piece) for piece in pieces]
        with torch.autocast(patch.device.type, enabled=False):
            return self.encoder_head(torch.cat(encoded).to(self.head.weight.dtype).mean((-2, -1)))

    def spot_nodes(self, encoded: Tensor, sections: AsignSections) -> Tensor:
        """Nodes (N, D) of the spot graph: encoded patches joined with what their tiles say."""
        tile_512 = sections.tile_512_features[sections.tile_512_index]
        tile_1024 = sections.tile_1024_features[sections.tile_1024_index]
        seen = self.tile_attention(encoded, tile_512, tile_1024)
        return encoded + seen if self.config.form == "corrected" else seen

    def states(self, encoded: Tensor, sections: AsignSections) -> tuple[Tensor, Tensor, Tensor]:
        """States (3, nodes, D) of spots, 512 px tiles and 1024 px tiles: one of each graph block, side by side."""
        resolutions = (
            (self.spot_blocks, self.spot_nodes(encoded, sections), sections.spot_graph),
            (self.tile_512_blocks, sections.tile_512_features, sections.tile_512_graph),
            (self.tile_1024_blocks, sections.tile_1024_features, sections.tile_1024_graph),
        )
        spot, tile_512, tile_1024 = (
            torch.stack([block(nodes, graph) for block in blocks]) for blocks, nodes, graph in resolutions
        )
        return spot, tile_512, tile_1024

    def expression(self, embedding: Tensor) -> Tensor:
        """(nodes, D) -> (nodes, G); one head for all resolutions."""
        return self.head(self.norm(embedding))

    def checked(self, spots: int, sections: AsignSections) -> AsignSections:
        """Inputs in the network's dtype.

        Raises
        ------
        InputError
            Another shape.
        """
        dim, dtype = self.config.feature_dim, self.head.weight.dtype
        check_shape("tile_512_features", sections.tile_512_features, "M512", dim)
        check_shape("tile_1024_features", sections.tile_1024_features, "M1024", dim)
        tiles_512, tiles_1024 = len(sections.tile_512_features), len(sections.tile_1024_features)
        check_shape("tile_512_index", sections.tile_512_index, spots)
        check_shape("tile_1024_index", sections.tile_1024_index, spots)
        check_shape("tile_512_graph", sections.tile_512_graph, tiles_512, tiles_512)
        check_shape("tile_1024_graph", sections.tile_1024_graph, tiles_1024, tiles_1024)
        check_shape("spot_graph", sections.spot_graph, spots, spots)
        return sections._replace(
            tile_512_features=sections.tile_512_features.to(dtype),
            tile_1024_features=sections.tile_1024_features.to(dtype),
        )

    @torch.no_grad()
    def start_at(self, profile: Tensor) -> None:
        """Set the bias of the head to a mean profile (G,): training then starts near the constant, not at zero."""
        self.head.bias.copy_(profile)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Any], config: AsignConfig) -> Self:
        """Network with weights that carry the published names.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array, or a checkpoint that holds them. What is `UNUSED` is left
            out, and may be absent. The dtype is taken from it.
        config
            The shape the weights were made with; heads, form and order cannot be read off the weights.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape.
        """
        weights = {name: value for name, value in unwrapped(state_dict).items() if not name.startswith(UNUSED)}
        head = "gene_head_250.1.weight"
        if head not in weights:
            raise InputError(f"published weights: missing: {head}; give the checkpoint's own state dict")
        with torch.device("meta"):  # draws nothing: loading leaves the caller's random state alone
            model = cls(config)
        fill(model, weights, reference_names(model), as_tensor(weights[head]).dtype)
        return model


def reference_names(model: AsignCore) -> dict[str, str]:
    """Own name -> published name of every parameter and buffer."""
    return published_names(model, _RULES)
