"""TRIPLEX: a spot's own patch, the tiles around it and the whole section, fused (Chung et al., CVPR 2024, 2403.07592).

Written from a description of the paper and of the released code (NEXGEM/TRIPLEX, 4750051), whose outputs are clamped at
zero since April 2025; the paper's figures are older. `RECIPE` says how the authors trained. Differences from the
release, and why:

- The grid is computed for each section; the release keeps the first section's grid for all others.
- Dropout acts in training only; in the release the whole-section encoder drops at random in prediction too.
- The relative bias is read from the parameter at every pass; the release may keep one from before weights were loaded.
- Mask and tiles both run row by row; the release builds the mask with the axes swapped.
- Frozen features are inputs of one width, `feature_dim`; the release swaps in another set in evaluation.
- A section of one spot works. A section's spots share one pass of the whole-section encoder, `encode_sections`.
- The clamp can be left out (`clamp`): it is of use only for targets that are never negative.
- Nothing reads a label at test time: epoch, panel and smoothing are of training sections, in the release of test ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.inputs import (
    centre_patch,
    check_choice,
    check_dropout,
    check_floats,
    check_shape,
    check_whole_numbers,
)
from hifusion.models.published import AuthorsRecipe, fill, published_names, unwrapped
from hifusion.models.resnet import ENCODERS, ResNet, TrunkConfig, as_tensor, imagenet_scaled
from hifusion.models.triplex_blocks import Fusion, NeighbourEncoder, SectionEncoder
from hifusion.models.triplex_grid import NEIGHBOURS, GridRule

RECIPE = AuthorsRecipe(
    target="ln(1 + 1e4 y / sum of y over the 1000 panel genes), then the mean over the 3 x 3 array neighbourhood",
    panel="genes in every slide and in 10 % of spots, first 250 by total count, test slides included",
    optimiser="AdamW",
    lr=1e-4,
    weight_decay=0.01,
    schedule="x0.1 after 10 epochs without a better Pearson correlation on the test fold; stop after 20",
    batch="128 spots of any slides, mixed precision",
    epochs=1000,  # at most
    start="trunk and frozen features: ResNet-18 of Ciga et al., self-supervised on histology",
    augmentation="spot patch only: flips and a quarter turn, each with probability 0.5",
    protocol="8 folds by patient; the epoch is chosen on the test fold",
)

_RULES = {
    r"patch_encoder\.(conv1|bn1|layer\d)": r"target_encoder.\1",
    r"target_encoder\.conv1": "target_encoder.0",
    r"target_encoder\.bn1": "target_encoder.1",
    r"target_encoder\.layer1": "target_encoder.4",
    r"target_encoder\.layer2": "target_encoder.5",
    r"target_encoder\.layer3": "target_encoder.6",
    r"target_encoder\.layer4": "target_encoder.7",
    r"patch_proj\.": "target_linear.",
    r"head\.": "fc.",
    r"patch_head\.": "fc_target.",
    r"neighbour_head\.": "fc_neighbor.",
    r"section_head\.": "fc_global.",
    r"neighbour_encoder\.blocks\.": "neighbor_encoder.layer.layers.",
    r"neighbour_encoder\.": "neighbor_encoder.",
    r"section_encoder\.first\.": "global_encoder.layer1.layers.0.",
    r"section_encoder\.rest\.": "global_encoder.layer2.layers.",
    r"section_encoder\.position\.": "global_encoder.pos_layer.proj.",
    r"section_encoder\.": "global_encoder.",
    r"fusion\.blocks\.": "fusion_encoder.fusion_layer.layers.",
    r"fusion\.": "fusion_encoder.",
    r"(.*)\.attention_norm\.": r"\1.0.norm.",
    r"(.*)\.attention\.out\.": r"\1.0.fn.to_out.0.",
    r"(.*)\.attention\.bias$": r"\1.0.fn.attention_biases",
    r"(.*)\.attention\.": r"\1.0.fn.to_",
    r"(.*)\.mlp_norm\.": r"\1.1.norm.",
    r"(.*)\.mlp\.": r"\1.1.fn.net.",
}
"""Own names -> published ones."""


@dataclass(frozen=True)
class TriplexConfig(TrunkConfig):
    """Shape of a TRIPLEX network; the defaults are the authors' for HER2+.

    Parameters
    ----------
    n_genes
        Genes in the panel, G.
    feature_dim
        Width D of the frozen features, of which there is no projection: 512 or 1024 in the release.
    patch_px
        Side of the spot patch, the centre of the region patch.
    width
        Channels of the trunk's first stage; 64 in the paper.
    fusion_depth, section_depth, neighbour_depth
        Attention blocks of each encoder.
    fusion_heads, section_heads, neighbour_heads
        Attention heads; each divides D.
    fusion_mlp, section_mlp, neighbour_mlp
        Hidden width of the feed-forward, in units of D.
    fusion_dropout, section_dropout, neighbour_dropout
        Each in [0, 1).
    clamp
        Predictions are cut at zero, as the release does since 2025; False for targets that can be negative.
    grid
        How the caller makes `section_cells`, see `hifusion.models.triplex_grid.grid_cells`.

    Raises
    ------
    InputError
        A value is outside its range.
    """

    n_genes: int
    feature_dim: int = 512
    patch_px: int = 224
    width: int = 64
    fusion_depth: int = 1
    section_depth: int = 3
    neighbour_depth: int = 3
    fusion_heads: int = 4
    section_heads: int = 16
    neighbour_heads: int = 16
    fusion_mlp: int = 4
    section_mlp: int = 4
    neighbour_mlp: int = 1
    fusion_dropout: float = 0.2
    section_dropout: float = 0.1
    neighbour_dropout: float = 0.3
    clamp: bool = True
    grid: GridRule = "published"

    def __post_init__(self) -> None:
        encoders = ("fusion", "section", "neighbour")
        whole = [f"{encoder}_{what}" for encoder in encoders for what in ("depth", "heads", "mlp")]
        check_whole_numbers(self, "n_genes", "feature_dim", "patch_px", "width", *whole)
        for encoder in encoders:
            heads = getattr(self, f"{encoder}_heads")
            if heads == 1 or self.feature_dim % heads:
                raise InputError(
                    f"{encoder}_heads: {heads} heads for feature_dim={self.feature_dim}; use a divisor of it above 1"
                )
            check_dropout(getattr(self, f"{encoder}_dropout"))
        check_choice("grid", self.grid, GridRule)


class TriplexOutput(NamedTuple):
    """What a forward pass gives."""

    expression: Tensor
    """(B, G)"""
    patch_expression: Tensor
    """(B, G), from the spot's own patch alone; this and the next two are for auxiliary supervision."""
    neighbour_expression: Tensor
    """(B, G), from the tiles around the spot alone."""
    section_expression: Tensor
    """(B, G), from the spot's token among those of its section alone."""
    embedding: Tensor
    """(B, D), the fused token, which the head reads."""


class Triplex(nn.Module):
    """Spot patch, 5 x 5 neighbour tiles and all spots of the section -> expression of the panel.

    A batch may hold any spots of any sections. `forward` encodes the sections that it is given; to predict a section in
    several batches, call `encode_sections` once and `forward_images` for each batch.
    """

    needs: ClassVar[tuple[str, ...]] = (
        "neighbour_features",
        "neighbour_mask",
        "section_features",
        "section_cells",
        "section_number",
        "section_row",
    )
    whole_section: ClassVar[bool] = False

    def __init__(self, config: TriplexConfig):
        super().__init__()
        self.config = config
        dim, c = config.feature_dim, config
        self.patch_encoder = ResNet(ENCODERS["resnet18"], c.width)
        self.patch_proj = nn.Linear(8 * c.width, dim)
        self.neighbour_encoder = NeighbourEncoder(
            dim, c.neighbour_depth, c.neighbour_heads, c.neighbour_mlp, c.neighbour_dropout
        )
        self.section_encoder = SectionEncoder(dim, c.section_depth, c.section_heads, c.section_mlp, c.section_dropout)
        self.fusion = Fusion(dim, c.fusion_depth, c.fusion_heads, c.fusion_mlp, c.fusion_dropout)
        self.head, self.patch_head, self.neighbour_head, self.section_head = (
            nn.Linear(dim, c.n_genes) for _ in range(4)
        )

    def forward(
        self,
        region: Tensor,
        *,
        neighbour_features: Tensor,
        neighbour_mask: Tensor,
        section_features: Tensor,
        section_cells: Tensor,
        section_number: Tensor,
        section_row: Tensor,
    ) -> TriplexOutput:
        """Expression from raw pixels and frozen features; the spot patch is the centre of the region.

        Parameters
        ----------
        region
            uint8 (B, 3, R, R).
        neighbour_features
            (B, 25, D), the 5 x 5 tiles centred on the spot, row by row.
        neighbour_mask
            (B, 25), true (or 1) where the tile lies on the slide, see `hifusion.models.triplex_grid.neighbour_mask`.
        section_features
            (N, D), the spot patches of ALL spots of every section in the batch, section after section.
        section_cells
            int64 (N, 2), cell (column, row) of each in its section, see `hifusion.models.triplex_grid.grid_cells`.
        section_number
            int64 (N,), which section each belongs to, in any numbering; all 0 for one section.
        section_row
            int64 (B,), the row of each spot of the batch in `section_features`.

        Raises
        ------
        InputError
            Another dtype or shape.
        """
        patch = imagenet_scaled(centre_patch(region, self.config.patch_px), self.head.weight)
        tokens = self.encode_sections(section_features, section_cells, section_number)
        return self.forward_images(
            patch.to(memory_format=self.config.memory_format),
            neighbour_features=neighbour_features,
            neighbour_mask=neighbour_mask,
            section_token=tokens[section_row],
        )

    def forward_images(
        self, patch: Tensor, *, neighbour_features: Tensor, neighbour_mask: Tensor, section_token: Tensor
    ) -> TriplexOutput:
        """Expression from standardised floats (B, 3, patch_px, patch_px) and the spots' section tokens (B, D).

        Raises
        ------
        InputError
            Integer pixels or another shape.
        """
        check_shape("patch", patch, "B", 3, self.config.patch_px, self.config.patch_px)
        check_floats("patch", patch)
        spots, tiles, dim = len(patch), NEIGHBOURS**2, self.config.feature_dim
        check_shape("neighbour_features", neighbour_features, spots, tiles, dim)
        check_shape("neighbour_mask", neighbour_mask, spots, tiles)
        check_shape("section_token", section_token, spots, dim)
        features = self.patch_encoder(patch)
        # Past the trunk all is small, and bfloat16 would round log shares to steps of 0.03: leave autocast here.
        with torch.autocast(patch.device.type, enabled=False):
            patch_tokens = self.patch_proj(features.to(self.head.weight.dtype).flatten(2).transpose(1, 2))
            on_slide = neighbour_mask.to(torch.bool)
            neighbour_tokens = self.neighbour_encoder(neighbour_features.to(self.head.weight.dtype), on_slide)
            fused = self.fusion(section_token, patch_tokens, neighbour_tokens, on_slide)
            return TriplexOutput(
                self._cut(self.head(fused)),
                self._cut(self.patch_head(patch_tokens.mean(1))),
                self._cut(self.neighbour_head(neighbour_tokens.mean(1))),
                self._cut(self.section_head(section_token)),
                fused,
            )

    def encode_sections(self, features: Tensor, cells: Tensor, number: Tensor) -> Tensor:
        """Token of every spot among those of its own section, (N, D); see `forward` for the parameters.

        Raises
        ------
        InputError
            Another shape.
        """
        check_shape("section_features", features, "N", self.config.feature_dim)
        check_shape("section_cells", cells, len(features), 2)
        check_shape("section_number", number, len(features))
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.head.weight.dtype)
            rows = [(number == section).nonzero()[:, 0] for section in number.unique()]
            tokens = [self.section_encoder(features[its], cells[its]) for its in rows]
            return torch.cat(tokens)[torch.cat(rows).argsort()]

    def _cut(self, expression: Tensor) -> Tensor:
        return expression.clamp(min=0) if self.config.clamp else expression

    @torch.no_grad()
    def start_at(self, profile: Tensor) -> None:
        """Set the bias of all four heads to a mean profile (G,): training then starts at the constant, not at zero."""
        for head in (self.head, self.patch_head, self.neighbour_head, self.section_head):
            head.bias.copy_(profile)

    @classmethod
    def from_reference(cls, state_dict: Mapping[str, Any], config: TriplexConfig) -> Self:
        """Network with weights that carry the published names.

        Parameters
        ----------
        state_dict
            Published name -> tensor or numpy array, or a checkpoint that holds them. The dtype is taken from it.
        config
            The shape the weights were made with; heads and dropout cannot be read off the weights.

        Raises
        ------
        InputError
            Names that are missing, unexpected or of another shape.
        """
        weights = unwrapped(state_dict)
        if "fc.weight" not in weights:
            raise InputError("published weights: missing: fc.weight; give the checkpoint's own state dict")
        with torch.device("meta"):  # draws nothing: loading leaves the caller's random state alone
            model = cls(config)
        fill(model, weights, reference_names(model), as_tensor(weights["fc.weight"]).dtype)
        return model


def triplex_loss(output: TriplexOutput, target: Tensor, distil_weight: float = 0.3) -> dict[str, Tensor]:
    """Named terms of the training loss, each a scalar, with `total` = `fused` + `views` + `distil`.

    Parameters
    ----------
    output
        Of `Triplex`.
    target
        Measured expression, (B, G).
    distil_weight
        Share a of distillation. The terms already contain it.

    Returns
    -------
    dict
        `fused`: MSE of the prediction. `views`: (1 - a) x MSE of the three views, summed. `distil`: a x MSE between the
        prediction and each view, summed, with gradient into both sides. Where a prediction is clamped it has none.

    Raises
    ------
    InputError
        `target` has another shape than the prediction.
    """
    check_shape("target", target, *output.expression.shape)
    views = (output.patch_expression, output.neighbour_expression, output.section_expression)
    terms = {
        "fused": F.mse_loss(output.expression, target),
        "views": (1 - distil_weight) * torch.stack([F.mse_loss(view, target) for view in views]).sum(),
        "distil": distil_weight * torch.stack([F.mse_loss(output.expression, view) for view in views]).sum(),
    }
    return {"total": terms["fused"] + terms["views"] + terms["distil"], **terms}


def reference_names(model: Triplex) -> dict[str, str]:
    """Own name -> published name of every parameter and buffer."""
    return published_names(model, _RULES)
