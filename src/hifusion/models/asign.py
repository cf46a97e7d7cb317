"""ASIGN-2D: spot patches and the 512 px and 1024 px tiles around them, in graphs (CVPR 2025, arXiv 2412.03026).

Written from a description of the paper and of the released code (hrlblab/ASIGN, a98c5d6), which was not copied.
`RECIPE` says how the authors trained. `form="published"` computes what the release computes; measured on it, the spot's
own image then has no effect at all, nor have the graphs' attention weights, and a spot is left out of its own
neighbourhood. `form="corrected"`, the default, is what the paper means:

- A spot keeps its own features and attends to both of its tiles; before, each tile was the only key, with weight 1.
- Graphs have self loops, and attention weighs the neighbours; before, it scaled a whole row, which was normalised away.
- `level_order="released"` re-reads the stack of states with its axes mixed up; "ordered" swaps them first.

In both forms, unlike the release: a node without neighbours is finite; a spot's tile is found by position, not by the
label nearest to its own; graphs span whole sections in stored order, not a shuffled batch; no label is read to predict;
frozen features come from one encoder of width D, not from a map drawn anew for every section and scale. Weights that
move nothing there (`lstm_512`, `transformer.encoder_layer`, two of three heads) do not exist here.
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models.asign_core import AsignCore, AsignOutput, AsignSections
from hifusion.models.inputs import check_shape
from hifusion.models.published import AuthorsRecipe

RECIPE = AuthorsRecipe(
    target="ln((y + 1) / sum of (y + 1) over the panel); of a tile, with y summed over its spots",
    panel="genes in every section, first 250 by mean count, test sections included",
    optimiser="SGD",
    lr=1e-3,
    momentum=0.9,
    schedule="polynomial decay, power 0.9, over 25,000 steps",
    batch="130 spots, with the graph of the batch's own spots",
    epochs=100,  # the last is kept
    start="ImageNet weights for the encoder and the frozen features",
    augmentation="flips and a quarter turn, at test time too",
    protocol="4 folds of patients; sections 2 and 3 of the test patients, whose section 1 is trained on",
)


class Asign2d(AsignCore):
    """Spots and tiles of one whole section -> expression of the panel."""

    needs: ClassVar[tuple[str, ...]] = AsignSections._fields

    def forward(
        self,
        region: Tensor,
        *,
        tile_512_features: Tensor,
        tile_1024_features: Tensor,
        tile_512_index: Tensor,
        tile_1024_index: Tensor,
        tile_512_graph: Tensor,
        tile_1024_graph: Tensor,
        spot_graph: Tensor,
    ) -> AsignOutput:
        """Expression from raw pixels, uint8 (N, 3, R, R) of all spots of the section; for the rest, `AsignSections`.

        Raises
        ------
        InputError
            Another dtype or shape.
        """
        sections = AsignSections(
            tile_512_features,
            tile_1024_features,
            tile_512_index,
            tile_1024_index,
            tile_512_graph,
            tile_1024_graph,
            spot_graph,
        )
        return self.forward_images(self.patches(region), sections)

    def forward_images(self, patch: Tensor, sections: AsignSections) -> AsignOutput:
        """Expression from standardised floats (N, 3, patch_px, patch_px).

        Raises
        ------
        InputError
            Integer pixels or another shape.
        """
        sections = self.checked(len(patch), sections)
        encoded = self.encode(patch)
        # bfloat16 would round log shares near -6 to steps of 0.03: leave autocast here.
        with torch.autocast(patch.device.type, enabled=False):
            spot, tile_512, tile_1024 = (self.transformer(states) for states in self.states(encoded, sections))
            return AsignOutput(self.expression(spot), self.expression(tile_512), self.expression(tile_1024), spot)


class AsignWeights(NamedTuple):
    """Weights of the terms of `asign_loss`."""

    mse: float
    pearson: float
    tiles: float
    consistency: float


WEIGHTS_2D = AsignWeights(0.75, 0.1, 0.1, 0.1)
"""The paper's, for ASIGN-2D."""


def asign_loss(
    output: AsignOutput,
    target: Tensor,
    *,
    tile_512_target: Tensor,
    tile_1024_target: Tensor,
    tile_512_index: Tensor,
    tile_1024_index: Tensor,
    scored: Tensor | None = None,
    weights: AsignWeights = WEIGHTS_2D,
) -> dict[str, Tensor]:
    """Named terms of the training loss, each a scalar without its weight, and `total`, their weighted sum.

    Parameters
    ----------
    output
        Of `Asign2d` or `Asign3d`.
    target
        Measured expression of the spots, (N, G).
    tile_512_target, tile_1024_target
        Expression of the tiles, (M512, G) and (M1024, G), made of their spots' summed counts.
    tile_512_index, tile_1024_index
        int64 (N,), the tile of each spot.
    scored
        bool (N,), the spots to learn from; all where None. In 3D these are the hidden ones: the propagated value of a
        known spot is its own label. Rows of the others are not read.

    Returns
    -------
    dict
        `mse`; `pearson`: 1 - correlation across genes, mean over spots; `tiles`: the same of both kinds of tiles,
        summed; `consistency`: the same of the prediction of each spot's tile against the spot, summed over both kinds.

    Raises
    ------
    InputError
        A target of another shape, or no spot to learn from.
    """
    check_shape("target", target, *output.expression.shape)
    check_shape("tile_512_target", tile_512_target, *output.tile_512_expression.shape)
    check_shape("tile_1024_target", tile_1024_target, *output.tile_1024_expression.shape)
    rows = torch.arange(len(target), device=target.device)
    rows = rows if scored is None else rows[scored]
    if not len(rows):
        raise InputError("scored: it leaves no spot to learn from; mark at least one")
    expression, target = output.expression[rows], target[rows]
    by_512 = output.tile_512_expression[tile_512_index[rows]]
    by_1024 = output.tile_1024_expression[tile_1024_index[rows]]
    terms = {
        "mse": F.mse_loss(expression, target),
        "pearson": pearson_loss(expression, target),
        "tiles": pearson_loss(output.tile_512_expression, tile_512_target)
        + pearson_loss(output.tile_1024_expression, tile_1024_target),
        "consistency": pearson_loss(by_512, target) + pearson_loss(by_1024, target),
    }
    total = torch.stack([weight * terms[name] for name, weight in weights._asdict().items()]).sum()
    return {"total": total, **terms}


def pearson_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - correlation of two (N, G) across genes, mean over rows; a constant row counts as uncorrelated."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norm = (a.square().sum(1) * b.square().sum(1) + 1e-8).sqrt()
    return 1 - ((a * b).sum(1) / norm).mean()
