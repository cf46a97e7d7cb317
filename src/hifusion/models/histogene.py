"""HisToGene: expression of all spots of a section by a transformer over them (Pang et al., bioRxiv 2021.11.28.470212).

Written from a description of the paper and of the released code (maxpmx/HisToGene, 44ff75b). `RECIPE` says how the
authors trained. Differences from the release, and why:

- A section is (N, ...), without a batch axis of 1, and one spot is a section too.
- Array coordinates are checked; the release fails inside the look-up beyond 63. `positions` sizes the tables.
- Patches come from the store, white beyond the image's edge; the release does not assign spots near an edge.
- Pixels may be divided by 255 (`pixels="unit"`); "raw" is the published way.
- Memory does not grow with the square of the spots, see `vit_layers.Attention`; time does.
- Turns and mirrors, where wanted, act on each patch; the release turns the cSCC image and leaves the centres behind.
- Nothing reads a label at test time. Panel and folds are to go by patient; the release leaves out one section, with its
  siblings in training.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.inputs import (
    PatchConfig,
    PixelScale,
    centre_patch,
    check_choice,
    check_dropout,
    check_floats,
    check_position,
    check_shape,
    check_whole_numbers,
)
from hifusion.models.published import AuthorsRecipe, fill, published_names, unwrapped
from hifusion.models.resnet import as_tensor
from hifusion.models.vit_layers import TransformerLayer, published_layer

RECIPE = AuthorsRecipe(
    target="log10(1 + 10000 y / sum of y over the panel)",
    panel="785 genes (her2st), 171 (cSCC): most variable genes of each section, rarer ones dropped, over all sections",
    optimiser="Adam",
    lr=1e-5,
    batch="one section",
    epochs=100,
    start="random, torch's defaults",
    augmentation="none (her2st); colour jitter, flip and rotation of the whole image (cSCC)",
    protocol="leave one section out: 32 sections of her2st, 12 of cSCC",
)

HEAD_WIDTH = 64
"""Channels of an attention head, whatever the width of the network."""

_RULES = {
    "x_embedding": "x_embed",
    "y_embedding": "y_embed",
    "head_norm": "gene_head.0",
    "head": "gene_head.1",
    "layers": "vit.transformer.layers",
} | published_layer(attention="0", mlp="1")


@dataclass(frozen=True)
class HisToGeneConfig(PatchConfig):
    """Shape of a HisToGene.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    patch_px
        Side of a spot's patch, the centre of its region patch.
    width
        Channels D of a token.
    layers
        Transformer layers; 8 in the paper and the released commands, 4 by the released constructor.
    heads
        Attention heads, of 64 channels each.
    dropout
        In [0, 1).
    positions
        Array coordinates are 0 to `positions` - 1, on both axes.
    pixels
        "raw": 0 to 255, as published; "unit": divided by 255.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    patch_px: int = 112
    width: int = 1024
    layers: int = 8
    heads: int = 16
    dropout: float = 0.1
    positions: int = 64
    pixels: PixelScale = "raw"

    def __post_init__(self) -> None:
        check_whole_numbers(self, "n_genes", "patch_px", "width", "layers", "heads", "positions")
        check_dropout(self.dropout)
        check_choice("pixels", self.pixels, PixelScale)


class HisToGeneOutput(NamedTuple):
    """What a forward pass gives, one row a spot, in the order given."""

    expression: Tensor
    """(N, G)"""
    embedding: Tensor
    """(N, D), what the head reads."""


class HisToGene(nn.Module):
    """All patches of one section -> expression of the panel; a spot's prediction depends on the other spots."""

    needs: ClassVar[tuple[str, ...]] = ("position",)
    whole_section: ClassVar[bool] = True

    def __init__(self, config: HisToGeneConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = nn.Linear(3 * config.patch_px**2, width)
        self.x_embedding = nn.Embedding(config.positions, width)
        self.y_embedding = nn.Embedding(config.positions, width)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(width, config.heads, HEAD_WIDTH, 2 * width, config.dropout) for _ in range(config.layers)
        )
        self.head_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.n_genes)

    def forward(self, region: Tensor, *, position: Tensor) -> HisToGeneOutput:
        """Expression from raw pixels of all spots of one section.

        Parameters
        ----------
        region
            uint8 (N, 3, R, R); the patch is its centre.
        position
            Array coordinates (x, y), whole numbers (N, 2).

        Raises
        ------
        InputError
            Another dtype or shape, or coordinates that the tables do not hold.
        """
        patch = flat_patches(centre_patch(region, self.config.patch_px)).to(self.head.weight.dtype)
        return self.forward_patches(patch / 255 if self.config.pixels == "unit" else patch, position=position)

    def forward_patches(self, patch: Tensor, *, position: Tensor) -> HisToGeneOutput:
        """Expression from patches as floats in the order of `flat_patches`, (N, 3 * patch_px ** 2).

        Raises
        ------
        InputError
            As `forward`.
        """
        tokens = self.embed(patch, position)
        for layer in self.layers:
            tokens = layer(tokens)
        # bfloat16 would round the expression to two or three digits: leave autocast here.
        with torch.autocast(patch.device.type, enabled=False):
            embedding = tokens.to(self.head.weight.dtype)
            return HisToGeneOutput(self.head(self.head_norm(embedding)), embedding)

    def embed(self, patch: Tensor, position: Tensor) -> Tensor:
        """Token of each spot before the transformer, (N, D): its patch and its place."""
        check_shape("patch", patch, "N", 3 * self.config.patch_px**2)
        check_floats("patch", patch)
        check_position(position, len(patch), self.config.positions)
        x, y = position.long().unbind(1)
        return self.dropout(self.patch_embedding(patch) + self.x_embedding(x) + self.y_embedding(y))

    @torch.no_grad()
    def start_at(self, profile: Tensor) -> None:
        """Set the bias of the head to a mean profile (G,); the authors start at torch's default."""
        self.head.bias.copy_(profile)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Any], *, dropout: float = 0.1, pixels: PixelScale = "raw") -> Self:
        """Network with weights that carry the published names.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array (96 at 8 layers), or a checkpoint that holds them. All sizes and the
            dtype are taken from it.
        dropout, pixels
            What the weights do not say, see `HisToGeneConfig`.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape.
        """
        weights = unwrapped(state_dict)
        first = "vit.transformer.layers.0.0.fn.to_qkv.weight"
        told = ("gene_head.1.weight", "patch_embedding.weight", "x_embed.weight", first)
        absent = [name for name in told if name not in weights]
        if absent:
            raise InputError(f"published weights: missing: {', '.join(absent)}; give the checkpoint's own state dict")
        head, embedding, table, qkv = (as_tensor(weights[name]) for name in told)
        config = HisToGeneConfig(
            n_genes=head.shape[0],
            patch_px=math.isqrt(embedding.shape[1] // 3),
            width=embedding.shape[0],
            layers=sum(name.endswith(".fn.to_qkv.weight") for name in weights),
            heads=qkv.shape[0] // (3 * HEAD_WIDTH),
            dropout=dropout,
            positions=table.shape[0],
            pixels=pixels,
        )
        with torch.device("meta"):  # draws nothing: loading leaves the caller's random state alone
            model = cls(config)
        fill(model, weights, reference_names(model), head.dtype)
        return model


def histogene_loss(output: HisToGeneOutput, target: Tensor) -> dict[str, Tensor]:
    """Mean squared error over spots and genes, as `total`.

    Raises
    ------
    InputError
        `target` has another shape than the prediction, (N, G).
    """
    check_shape("target", target, *output.expression.shape)
    return {"total": F.mse_loss(output.expression, target)}


def flat_patches(patch: Tensor) -> Tensor:
    """Patches as the published network reads them: (N, 3, p, p), rows by columns -> (N, p * p * 3), x, y, channel.

    Channel runs fastest, then y, then x: the release transposes its images before it cuts them.
    """
    return patch.permute(0, 3, 2, 1).flatten(1)


def reference_names(model: HisToGene) -> dict[str, str]:
    """Own name -> published name of every parameter."""
    return published_names(model, _RULES)
