"""What TRIPLEX needs of positions: the cell of every spot on a grid, and which neighbour tiles lie on the slide."""

from typing import Literal

import torch
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models.inputs import check_shape

GridRule = Literal["published", "pitch", "array"]

NEIGHBOURS = 5
"""Tiles per side around a spot; the spot's own is in the middle."""


def grid_cells(positions: Tensor, rule: GridRule = "published") -> Tensor:
    """Cell (column, row) of every spot of one section, int64 (N, 2), each axis from 0.

    Parameters
    ----------
    positions
        (N, 2). Pixels (x, y) of spot centres for "published" and "pitch"; array (column, row) for "array".
    rule
        "published": as many columns as there are values of round(x / 20), rows likewise, and the spots spread over
        them; a jittered or turned lattice gets many cells, most of them empty. "pitch": distances in units of the mean
        distance between adjacent spots; for upright square lattices. "array": the array's own columns and rows; columns
        are halved where each row uses every other one, as in Visium, so that all six neighbours are adjacent cells.

    Raises
    ------
    InputError
        Another shape, no spot, or positions that are not finite.
    """
    check_shape("positions", positions, "N", 2)
    if not len(positions) or not positions.isfinite().all():
        raise InputError(f"positions: {len(positions)} spots, not all finite; give (x, y) of at least one spot")
    places = positions.to(torch.float64)
    offset = places - places.amin(0)
    if rule == "published":
        values = torch.tensor([axis.unique().numel() for axis in (places / 20).round().T], device=places.device)
        return (offset / (offset.amax(0) + 1e-5) * (values - 1)).round().to(torch.int64)
    if rule == "pitch":
        return (offset / _pitch(places)).round().to(torch.int64)
    column, row = offset.round().to(torch.int64).T
    in_order = torch.argsort(row * (column.amax() + 1) + column)
    step = column[in_order].diff()[row[in_order].diff() == 0]
    step = step[step > 0]
    every = int(step.amin()) if len(step) else 1
    return torch.stack([column // every, row], dim=1)


def _pitch(places: Tensor) -> float:
    """Mean distance between adjacent places of a square lattice; 1 where all lie in one place.

    Adjacent: at most 1.25 times as far as the median place is from its nearest. That median alone is too short on a
    jittered lattice, by enough to lose a column over a wide section.
    """
    nearest, total, pairs = [], 0.0, 0
    chunks = places.split(1024)  # bounds the memory of a large section
    for chunk in chunks:
        nearest.append(_apart(chunk, places).amin(1))
    found = torch.cat(nearest)
    found = found[found.isfinite()]
    if not len(found):
        return 1.0
    reach = 1.25 * float(found.median())
    for chunk in chunks:
        distance = _apart(chunk, places)
        adjacent = distance[distance <= reach]
        total, pairs = total + float(adjacent.sum()), pairs + len(adjacent)
    return total / pairs


def _apart(some: Tensor, places: Tensor) -> Tensor:
    """Distances between places; infinite where they are the same."""
    distance = torch.cdist(some, places, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.masked_fill(distance == 0, torch.inf)


def neighbour_mask(centres_px: Tensor, size_px: tuple[int, int], tile_px: float = 224.0) -> Tensor:
    """Which of the 5 x 5 tiles around each spot lie on the slide: bool (B, 25), row by row, the spot's own at 12.

    A line of tiles that reaches past the edge is off the slide as a whole. The middle line and column never are.

    Parameters
    ----------
    centres_px
        (B, 2), pixels (x, y).
    size_px
        Width and height of the slide.
    tile_px
        Side of a tile on the slide; at another resolution than the encoder's, not the encoder's 224.
    """
    check_shape("centres_px", centres_px, "B", 2)
    lines = []
    for axis, size in enumerate(size_px):
        centre = centres_px[:, axis, None].to(torch.float64)
        reach = tile_px / 2 * torch.tensor([5.0, 3.0], dtype=torch.float64, device=centre.device)
        low, high = centre - reach >= 0, centre + reach <= size
        lines.append(torch.cat([low, torch.ones_like(low[:, :1]), high.flip(1)], dim=1))
    columns, rows = lines
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)
