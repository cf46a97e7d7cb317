"""What ASIGN needs of positions: tiles and which of them holds a spot, and the graphs of tiles, spots and stacks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models.inputs import check_shape


class Tiles(NamedTuple):
    """Tiles of one section that hold a spot."""

    tiles: Tensor
    """int64 (M, 2), (column, row) in tile sides from the slide's upper left corner, row by row."""
    row: Tensor
    """int64 (N,), the row in `tiles` of each spot's tile."""


def tiles_of(centres_px: Tensor, size_px: tuple[int, int], tile_px: int) -> Tiles:
    """Full tiles of a regular grid that hold spots; a spot in the strip left over at an edge gets the nearest tile.

    Parameters
    ----------
    centres_px
        (N, 2), pixels (x, y).
    size_px
        Width and height of the slide. One smaller than a tile has that one tile.
    tile_px
        Side of a tile: 512 and 1024 in the paper, whatever the slide's resolution.

    Raises
    ------
    InputError
        Another shape, or a spot outside the slide.
    """
    check_shape("centres_px", centres_px, "N", 2)
    size = torch.tensor(size_px, dtype=torch.float64, device=centres_px.device)
    inside = (centres_px >= 0) & (centres_px <= size)
    if not inside.all():
        x, y = centres_px[~inside.all(1)][0].tolist()
        raise InputError(
            f"centres_px: ({x:g}, {y:g}) is outside the slide of {size_px[0]} x {size_px[1]} px; give (x, y)"
        )
    last = (size / tile_px).floor().clamp(min=1) - 1
    tile = torch.minimum((centres_px / tile_px).floor().to(torch.float64), last).to(torch.int64)
    # One number per tile, so that the order of tiles is row by row.
    width = int(last[0]) + 1
    numbers, index = (tile[:, 1] * width + tile[:, 0]).unique(return_inverse=True)
    return Tiles(torch.stack([numbers % width, numbers // width], dim=1), index)


def tile_sums(values: Tensor, index: Tensor, tiles: int) -> Tensor:
    """Sum over the spots of each tile, (N, G) -> (M, G): a tile's target is made of its spots' RAW counts so summed."""
    return values.new_zeros(tiles, values.shape[1]).index_add(0, index, values)


def radius_graph(tiles: Tensor, radius: float = 2.1) -> Tensor:
    """Pairs of tiles nearer than `radius` tile sides, bool (M, M), symmetric, without self loops."""
    check_shape("tiles", tiles, "M", 2)
    graph = _distances(tiles) < radius
    return graph.fill_diagonal_(False)


def nearest_graph(positions: Tensor, k: int = 8) -> Tensor:
    """The `k` nearest spots of each spot, bool (N, N), row looks at column; directed, no self loops.

    Ties go to the lower index. Where there are fewer spots, all others are neighbours.
    """
    check_shape("positions", positions, "N", 2)
    return _best(-_distances(positions), k)


def stack_graph(
    positions: Tensor, section: Tensor, features: Tensor, radius: float, across: int = 12, within: int = 4
) -> Tensor:
    """Graph over all spots of a patient's registered sections, bool (N, N), symmetric, without self loops.

    Every spot is joined to its `within` nearest spots of its own section and to the `across` spots of other sections
    with the largest sum of overlap and cosine similarity. Ties go to the lower index.

    Parameters
    ----------
    positions
        (N, 2), spot centres in one common frame.
    section
        int64 (N,), which section each spot belongs to, in any numbering.
    features
        (N, D), from which similarity is computed.
    radius
        Of a spot, in the frame's units; 112 px in the paper. Overlap is that of two circles of it over their union.
    """
    check_shape("positions", positions, "N", 2)
    check_shape("section", section, len(positions))
    check_shape("features", features, len(positions), "D")
    distance = _distances(positions)
    same = section[:, None] == section
    unit = torch.nn.functional.normalize(features.to(torch.float64), dim=1)
    score = circle_overlap(distance, radius) + unit @ unit.T
    graph = _best((-distance).masked_fill(~same, -torch.inf), within) | _best(
        score.masked_fill(same, -torch.inf), across
    )
    return graph | graph.T


def circle_overlap(distance: Tensor, radius: float) -> Tensor:
    """Intersection over union of two circles of one radius, from the distance of their centres."""
    half = (distance / (2 * radius)).clamp(max=1)
    shared = (2 / math.pi) * (half.acos() - half * (1 - half.square()).sqrt())  # of one circle's area
    return shared / (2 - shared)


def _distances(positions: Tensor) -> Tensor:
    """Between all pairs, by differences: equal distances of a lattice then stay equal, and ties are ties."""
    places = positions.to(torch.float64)
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")


def _best(score: Tensor, k: int) -> Tensor:
    """The `k` highest scores of each row but its own, bool (N, N); -inf is never chosen."""
    score = score.clone().fill_diagonal_(-torch.inf)
    best = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True) & (score > -torch.inf)
