"""ASIGN-3D: registered sections of one patient in one graph, along which what is measured of some spots is passed on.

Paper, code and forms as for ASIGN-2D, see `hifusion.models.asign`; `RECIPE` says what the authors did otherwise. In the
corrected form, beside what is said there:

- Each spot's states are seen together with those of its two tiles. In the release they are joined along the nodes: they
  do not meet, or meet at random in the "released" order.
- Propagation starts unknown spots at the mean of the known ones, not at zero, which lies far above any label; a spot
  without neighbours stays there. Where nothing is known the prediction is the network's own.

In both forms which spots are known is said by a mask, `known`, and not read off the labels, whose unknown rows are not
looked at; there are no random edges; sections are told apart by number, not by order. Train on hidden spots only: the
`scored` of `asign3d_loss` is then `~known`.
"""

import dataclasses
import functools
from typing import ClassVar

import torch
from torch import Tensor, nn

from hifusion.models.asign import RECIPE as RECIPE_2D
from hifusion.models.asign import AsignWeights, asign_loss
from hifusion.models.asign_blocks import LEVELS, Form, LevelTransformer
from hifusion.models.asign_core import AsignConfig, AsignCore, AsignOutput, AsignSections
from hifusion.models.inputs import check_shape

RECIPE = dataclasses.replace(
    RECIPE_2D,
    batch="128 spots of any section of a patient; in training a random 25 % of them are known",
    epochs=51,  # the last is kept
    protocol="4 folds of patients; at test the first section's spots of the same batch are known, the others predicted",
)

WEIGHTS_3D = AsignWeights(0.75, 0.25, 0.125, 0.125)
"""The paper's, for ASIGN-3D."""

asign3d_loss = functools.partial(asign_loss, weights=WEIGHTS_3D)
"""`asign_loss` with the weights of ASIGN-3D."""

ROUNDS = 20
"""Of propagation."""


class Asign3d(AsignCore):
    """Spots and tiles of all sections of one patient, some measured -> expression of the panel."""

    needs: ClassVar[tuple[str, ...]] = (*AsignSections._fields, "known_expression", "known")
    whole_patient: ClassVar[bool] = True
    """The batch is all sections of a patient, their tiles and graphs put one behind the other."""

    def __init__(self, config: AsignConfig):
        super().__init__(config)
        self.alpha = nn.Parameter(torch.full((config.n_genes,), 0.5))

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
        known_expression: Tensor,
        known: Tensor,
    ) -> AsignOutput:
        """Expression from raw pixels of all spots of the patient.

        Parameters
        ----------
        region
            uint8 (N, 3, R, R).
        tile_512_features, tile_1024_features, tile_512_index, tile_1024_index, tile_512_graph, tile_1024_graph
            See `AsignSections`.
        spot_graph
            (N, N), see `hifusion.models.asign_graphs.stack_graph`.
        known_expression
            (N, G); rows that are not known may hold anything.
        known
            bool (N,), the spots whose expression is given.

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
        return self.forward_images(self.patches(region), sections, known_expression, known)

    def forward_images(
        self, patch: Tensor, sections: AsignSections, known_expression: Tensor, known: Tensor
    ) -> AsignOutput:
        """Expression from standardised floats (N, 3, patch_px, patch_px).

        Raises
        ------
        InputError
            Integer pixels or another shape.
        """
        sections = self.checked(len(patch), sections)
        check_shape("known_expression", known_expression, len(patch), self.config.n_genes)
        check_shape("known", known, len(patch))
        known = known.to(torch.bool)
        encoded = self.encode(patch)
        # bfloat16 would round log shares near -6 to steps of 0.03: leave autocast here.
        with torch.autocast(patch.device.type, enabled=False):
            states = self.states(encoded, sections)
            if self.config.form == "corrected":
                spot, tile_512, tile_1024 = _seen_with_tiles(self.transformer, states, sections)
            else:
                spot, tile_512, tile_1024 = _joined(self.transformer, states)
            own = self.expression(spot)
            passed_on = propagate(known_expression.to(own.dtype), known, sections.spot_graph, self.config.form)
            share = self.alpha.sigmoid()
            if self.config.form == "corrected":
                share = share * known.any()
            expression = share * passed_on + (1 - share) * own
            return AsignOutput(expression, self.expression(tile_512), self.expression(tile_1024), spot)


def propagate(expression: Tensor, known: Tensor, graph: Tensor, form: Form, rounds: int = ROUNDS) -> Tensor:
    """Expression passed along a graph from known spots to the others, (N, G).

    In each round an unknown spot takes the mean of its neighbours, weighed by the graph.

    Parameters
    ----------
    expression
        (N, G), of which only known rows are read.
    known
        bool (N,).
    graph
        (N, N), row takes from column.
    form
        "corrected": unknown spots start at the mean of the known ones, and stay there without neighbours. "published":
        both at zero.
    """
    given = expression[known]
    start = given.mean(0) if form == "corrected" and len(given) else expression.new_zeros(expression.shape[1])
    passed_on = torch.where(known[:, None], expression, start)
    fixed = passed_on
    graph = graph.to(expression.dtype)
    total = graph.sum(1, keepdim=True)
    shares = graph / total.clamp(min=1e-10)
    keeps = known[:, None] | (total == 0) if form == "corrected" else known[:, None]
    for _ in range(rounds):
        passed_on = torch.where(keeps, fixed, shares @ passed_on)
    return passed_on


def _seen_with_tiles(
    transformer: LevelTransformer, states: tuple[Tensor, Tensor, Tensor], sections: AsignSections
) -> tuple[Tensor, Tensor, Tensor]:
    """Spots, of which each sees the states of its two tiles before its own, and tiles by themselves."""
    spot, tile_512, tile_1024 = (transformer.coded(its) for its in states)
    sequences = torch.cat([tile_1024[sections.tile_1024_index], tile_512[sections.tile_512_index], spot], dim=1)
    return (
        transformer.encoder(sequences)[:, -LEVELS:].mean(1),
        transformer.encoder(tile_512).mean(1),
        transformer.encoder(tile_1024).mean(1),
    )


def _joined(transformer: LevelTransformer, states: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As the release: each resolution's nodes behind those of the coarser one, of which the finer ones are kept.

    In the "released" order the level code was added in place, so the 1024 px states carry it twice in the second pass.
    In the "ordered" one a node sees none but its own states, whatever stands before it.
    """
    spot, tile_512, tile_1024 = states
    coarse = transformer(tile_1024)
    if transformer.order == "ordered":
        return transformer(spot), transformer(tile_512), coarse
    again = transformer.coded(tile_1024).reshape(tile_1024.shape)
    return (
        transformer(torch.cat([tile_512, spot], dim=1))[-spot.shape[1] :],
        transformer(torch.cat([again, tile_512], dim=1))[-tile_512.shape[1] :],
        coarse,
    )
