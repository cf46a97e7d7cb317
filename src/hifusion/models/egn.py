"""EGN: expression of a spot from its tile and the most similar measured spots (Yang et al., WACV 2023, pp. 5028-5037).

Written from a description of the paper and of the released code, first version (Yan98/EGN, bae8f05). `RECIPE` says how
the authors trained; `exemplars.py` finds the similar spots. Differences from the release, and why:

- Exemplars of the query's own patient are refused (`exemplars.nearest_exemplars`): with the authors' slides, some of
  which are one image twice, the nearest exemplar can carry the answer.
- The token grid and the panel may have any size; the release has 8 x 8 tokens and 250 genes written into it.
- Parameters that no gradient reaches (each bridge's `to_out`, the last bridge's norm, the last position) do not exist
  here; they are accepted and ignored in published weights.
- The correlation of a gene that does not vary in the batch is 0 with zero gradient; the release has NaN, counted as -1.
- The loss weighs the correlation by 0.5, as the release; the paper says 1: an argument of `egn_loss`.
- Nothing reads the label of the spot that is predicted. Panel, scaling and epoch are to come from training patients.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.egn_layers import Bridge, Projector, flat_tokens
from hifusion.models.inputs import (
    PatchConfig,
    centre_patch,
    check_dropout,
    check_floats,
    check_shape,
    check_whole_numbers,
    z_scored,
)
from hifusion.models.published import AuthorsRecipe, fill, published_names, unwrapped
from hifusion.models.resnet import as_tensor
from hifusion.models.vit_layers import MLP, Attention, published_layer

RECIPE = AuthorsRecipe(
    target="(u - low) / (high - low + 1e-8) of u = log10(1 + y); low, high: each gene's extremes over training slides",
    panel="250 genes of largest mean raw count over all slides, test slides included, sorted by name",
    optimiser="AdamW",  # betas 0.9, 0.999
    lr=5e-4,
    weight_decay=1e-4,
    schedule="cosine with warm restarts every half epoch, 100 warm-up steps, floor lr / 5, stepped every batch",
    batch="32 tiles, an incomplete batch dropped; 6 exemplars a tile",
    epochs=50,  # the released code keeps the epoch of best test correlation
    start="random",
    augmentation="none",
    protocol="four folds of the ST-Net cohort; three folds of six Visium slides",
)

PIXEL_MEAN, PIXEL_STD = (0.5476, 0.5218, 0.6881), (0.2461, 0.2101, 0.1649)
"""The authors' statistics of pixel / 255."""

HEAD_WIDTH = 64
"""Channels of an attention head, whatever the width of the network."""

_RULES = {
    "token_embedding": "to_patch_embedding.1",
    "position": "pos_embedding",
    "head_norm": "mlp_head.0",
    "head": "mlp_head.1",
    "pool_head": "transformer.pool.head",
    r"projector\.query": "transformer.encoder.proq",
    r"projector\.key": "transformer.encoder.proe",
    r"projector\.value": "transformer.encoder.to_v",
    r"projector\.layers\.(\d+)\.norm": r"transformer.encoder.layers.\1.norm",
    r"projector\.layers\.(\d+)\.expand": r"transformer.encoder.layers.\1.fn.net.0",
    r"projector\.layers\.(\d+)\.contract": r"transformer.encoder.layers.\1.fn.net.3",
    r"layers\.(\d+)\.": r"transformer.layers.\1.",
    r"(.*)\.bridge\.gates\.": r"\1.1.update.query.",
    r"(.*)\.bridge\.value\.": r"\1.1.update.value.",
    r"(.*)\.bridge\.key_norm\.": r"\1.1.update.norm.",
    r"(.*)\.bridge\.token_norm\.": r"\1.1.to_x.0.",
    r"(.*)\.bridge\.token_in\.": r"\1.1.to_x.1.",
    r"(.*)\.bridge\.query_norm\.": r"\1.1.to_k.0.",
    r"(.*)\.bridge\.query_in\.": r"\1.1.to_k.1.",
    r"(.*)\.bridge\.token_out\.": r"\1.1.to_v.1.",
    r"(.*)\.bridge\.query_out\.": r"\1.1.to_n.1.",
} | published_layer(attention="0", mlp="2")


@dataclass(frozen=True)
class EGNConfig(PatchConfig):
    """Shape of an EGN; the defaults are those of the released command.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    patch_px
        Side of the tile, the centre of the region patch.
    token_px
        Side of the pieces that become tokens, T of them; divides `patch_px`.
    width
        Channels D of a token.
    layers, heads, mlp_width
        Transformer layers, attention heads (of 64 channels each) and hidden width of the MLPs.
    bridge_every
        A bridge to the exemplars stands in every so manieth layer.
    bridge_heads, bridge_head_width
        Heads and channels of a head in a bridge.
    feature_width
        Channels M of the frozen features of tile and exemplars.
    projector_layers
        MLPs that the features go through before the first layer.
    dropout
        In [0, 1).

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    patch_px: int = 256
    token_px: int = 32
    width: int = 1024
    layers: int = 8
    heads: int = 16
    mlp_width: int = 4096
    bridge_every: int = 2
    bridge_heads: int = 8
    bridge_head_width: int = 64
    feature_width: int = 2048
    projector_layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        sizes = ("n_genes", "patch_px", "token_px", "width", "layers", "heads", "mlp_width", "feature_width")
        check_whole_numbers(self, *sizes, "bridge_every", "bridge_heads", "bridge_head_width", "projector_layers")
        check_dropout(self.dropout)
        if self.patch_px % self.token_px:
            raise InputError(f"token_px: {self.token_px} does not divide patch_px={self.patch_px}; use a divisor")
        if self.bridge_every > self.layers:
            raise InputError(f"bridge_every: {self.bridge_every} is above layers={self.layers}; use at most that")

    @property
    def tokens(self) -> int:
        """Tokens T of a tile."""
        return (self.patch_px // self.token_px) ** 2


class EGNOutput(NamedTuple):
    """What a forward pass gives."""

    expression: Tensor
    """(B, G)"""
    embedding: Tensor
    """(B, 2 D), what the head reads: pooled tokens and the refined feature, after the layer norm."""


class EGNLayer(nn.Module):
    """Attention over the tokens, a bridge to the exemplars in some layers, MLP."""

    def __init__(self, config: EGNConfig, number: int):
        super().__init__()
        self.attention = Attention(config.width, config.heads, HEAD_WIDTH, config.dropout)
        last = number + config.bridge_every > config.layers
        self.bridge: Bridge | None = None
        if number % config.bridge_every == 0:
            sizes = (config.width, config.bridge_heads, config.bridge_head_width, config.tokens)
            self.bridge = Bridge(*sizes, last=last)
        self.mlp = MLP(config.width, config.mlp_width, config.dropout)

    def forward(
        self, tokens: Tensor, position: Tensor, query: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T, D), query (B, 1, D), keys and values (B, K, D) -> new tokens, query and keys."""
        tokens = self.attention(tokens + position) + tokens  # the residual is without the position
        if self.bridge is not None:
            tokens, query, keys = self.bridge(tokens, query, keys, values)
        return self.mlp(tokens) + tokens, query, keys


class EGN(nn.Module):
    """A tile, its feature, and features and targets of similar measured spots -> expression of the panel."""

    needs: ClassVar[tuple[str, ...]] = ("feature", "exemplar_feature", "exemplar_target")
    whole_section: ClassVar[bool] = False

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: EGNConfig):
        super().__init__()
        self.config = config
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN))
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD))
        self.token_embedding = nn.Linear(3 * config.token_px**2, config.width)
        self.position = nn.Parameter(torch.randn(1, config.tokens, config.width))
        self.projector = Projector(
            config.feature_width, config.n_genes, config.width, config.projector_layers, config.dropout
        )
        self.layers = nn.ModuleList(EGNLayer(config, number) for number in range(1, config.layers + 1))
        self.pool_head = nn.Linear(config.width, config.width)
        self.head_norm = nn.LayerNorm(2 * config.width)
        self.head = nn.Linear(2 * config.width, config.n_genes)

    def forward(
        self, region: Tensor, *, feature: Tensor, exemplar_feature: Tensor, exemplar_target: Tensor
    ) -> EGNOutput:
        """Expression from raw pixels and exemplars.

        Parameters
        ----------
        region
            uint8 (B, 3, R, R); the tile is its centre.
        feature
            Frozen feature of each tile, (B, M).
        exemplar_feature, exemplar_target
            Features (B, K, M) and targets (B, K, G) of the K most similar spots of other patients, see `exemplars`. The
            order of the K does not matter.

        Raises
        ------
        InputError
            Another dtype or shape.
        """
        tile = z_scored(centre_patch(region, self.config.patch_px), self.pixel_mean, self.pixel_std)
        return self.forward_tile(
            tile, feature=feature, exemplar_feature=exemplar_feature, exemplar_target=exemplar_target
        )

    def forward_tile(
        self, tile: Tensor, *, feature: Tensor, exemplar_feature: Tensor, exemplar_target: Tensor
    ) -> EGNOutput:
        """Expression from z-scored floats (B, 3, patch_px, patch_px) and exemplars.

        Raises
        ------
        InputError
            As `forward`.
        """
        tokens = self.embed(tile)
        batch, exemplars = len(tile), exemplar_feature.shape[1] if exemplar_feature.ndim > 1 else 0
        check_shape("feature", feature, batch, self.config.feature_width)
        check_shape("exemplar_feature", exemplar_feature, batch, "K", self.config.feature_width)
        check_shape("exemplar_target", exemplar_target, batch, exemplars, self.config.n_genes)
        if not exemplars:
            raise InputError("exemplar_feature: it holds no exemplar; give at least one a tile")
        query, keys, values = self.projector(feature, exemplar_feature, exemplar_target)
        for layer in self.layers:
            tokens, query, keys = layer(tokens, self.position, query, keys, values)
        # bfloat16 would round the expression to two or three digits: leave autocast here.
        with torch.autocast(tile.device.type, enabled=False):
            dtype = self.head.weight.dtype
            pooled = self.pool(tokens.to(dtype))
            embedding = self.head_norm(torch.cat([pooled, query.squeeze(1).to(dtype)], 1))
            return EGNOutput(self.head(embedding), embedding)

    def embed(self, tile: Tensor) -> Tensor:
        """Tokens of tiles with their positions: (B, 3, patch_px, patch_px) -> (B, T, D)."""
        check_shape("tile", tile, "B", 3, self.config.patch_px, self.config.patch_px)
        check_floats("tile", tile)
        return self.token_embedding(flat_tokens(tile, self.config.token_px)) + self.position

    def pool(self, tokens: Tensor) -> Tensor:
        """One vector of the tokens, (B, T, D) -> (B, D): their mean and, at half weight, a mean that attends."""
        scores = self.pool_head(tokens)
        attended = ((0.1 * scores).softmax(1) * scores).sum(1)
        return scores.mean(1) + 0.5 * attended

    @torch.no_grad()
    def start_at(self, profile: Tensor) -> None:
        """Set the bias of the head to a mean profile (G,); the authors start at torch's default."""
        self.head.bias.copy_(profile)

    @torch.no_grad()
    def set_pixel_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set mean and standard deviation (3,) of pixel / 255, those of the training tiles; else the authors' stand."""
        self.pixel_mean.copy_(mean)
        self.pixel_std.copy_(std)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Any], *, dropout: float = 0.0) -> Self:
        """Network with weights that carry the published names.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array (195 at the defaults), or a checkpoint that holds them. All sizes
            and the dtype are taken from it; what nothing reads is ignored, there or not.
        dropout
            See `EGNConfig`.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape.
        """
        weights = unwrapped(state_dict)
        bridges = sorted(int(name.split(".")[2]) for name in weights if name.endswith(".1.update.value.weight"))
        first = f"transformer.layers.{bridges[0] if bridges else 1}.1"
        told = ["mlp_head.1.weight", "pos_embedding", "to_patch_embedding.1.weight", "transformer.encoder.proq.weight"]
        told += ["transformer.layers.0.0.fn.to_qkv.weight", "transformer.layers.0.2.fn.net.0.weight"]
        told += [f"{first}.to_x.1.weight", f"{first}.update.query.0.weight"]
        absent = [name for name in told if name not in weights]
        if absent:
            raise InputError(f"published weights: missing: {', '.join(absent)}; give the checkpoint's own state dict")
        head, position, embedding, feature, qkv, mlp, inner, gates = (as_tensor(weights[name]) for name in told)
        token_px, bridge_head_width = math.isqrt(embedding.shape[1] // 3), gates.shape[0] // 4
        config = EGNConfig(
            n_genes=head.shape[0],
            patch_px=token_px * math.isqrt(position.shape[1] - 1),
            token_px=token_px,
            width=embedding.shape[0],
            layers=sum(name.endswith(".0.fn.to_qkv.weight") for name in weights),
            heads=qkv.shape[0] // (3 * HEAD_WIDTH),
            mlp_width=mlp.shape[0],
            bridge_every=bridges[0] + 1,
            bridge_heads=inner.shape[0] // bridge_head_width,
            bridge_head_width=bridge_head_width,
            feature_width=feature.shape[1],
            projector_layers=sum(
                name.startswith("transformer.encoder.layers.") and name.endswith(".norm.weight") for name in weights
            ),
            dropout=dropout,
        )
        unread = [f"transformer.layers.{number}.1.to_out." for number in bridges]
        unread += [f"transformer.layers.{bridges[-1]}.1.update.norm."]
        weights = {name: value for name, value in weights.items() if not name.startswith(tuple(unread))}
        weights |= {"pos_embedding": position[:, :-1]}
        weights |= {"pixel_mean": torch.tensor(PIXEL_MEAN), "pixel_std": torch.tensor(PIXEL_STD)}
        with torch.device("meta"):  # draws nothing: loading leaves the caller's random state alone
            model = cls(config)
        fill(model, weights, reference_names(model), head.dtype)
        return model


def egn_loss(output: EGNOutput, target: Tensor, correlation_weight: float = 0.5) -> dict[str, Tensor]:
    """Named terms of the training loss, each a scalar, with `total` = `mse` + `correlation_weight` x `correlation`.

    Parameters
    ----------
    output
        Of `EGN`.
    target
        Measured expression, (B, G).
    correlation_weight
        0.5 in the released code, 1 in the paper.

    Returns
    -------
    dict
        `mse`, and `correlation`: 1 - mean over genes of Pearson's r over the batch.

    Raises
    ------
    InputError
        `target` has another shape than the prediction.
    """
    check_shape("target", target, *output.expression.shape)
    terms = {
        "mse": F.mse_loss(output.expression, target),
        "correlation": 1 - batch_correlation(output.expression, target).mean(),
    }
    return {"total": terms["mse"] + correlation_weight * terms["correlation"], **terms}


def batch_correlation(predicted: Tensor, target: Tensor) -> Tensor:
    """Pearson's r of each gene over the batch, (B, G) twice -> (G,); 0 without gradient where a gene does not vary."""
    a, b = predicted - predicted.mean(0), target - target.mean(0)
    product = a.square().sum(0) * b.square().sum(0)
    varies = (predicted.amax(0) > predicted.amin(0)) & (target.amax(0) > target.amin(0)) & (product > 0)
    # The root of 0 has an infinite slope, and NaN would come of it even where `where` leaves it out.
    scale = torch.where(varies, product, 1.0).sqrt()
    return torch.where(varies, (a * b).sum(0) / (scale + 1e-8), 0.0)


def reference_names(model: EGN) -> dict[str, str]:
    """Own name -> published name of every parameter; the pixel statistics keep their own."""
    return published_names(model, _RULES)
