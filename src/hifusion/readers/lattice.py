"""Where an array's spots lie in pixels, and what that says of the scale."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial import KDTree

from hifusion.errors import InputError

MOST_ROWS = 20_000  # of a table used for a fit: millions of bins fix six numbers no better
LOOSEST_FIT = 0.25  # of a step: spots are placed on the array far better than this
# Visium: 55 um spots, 100 um apart, rows staggered, so neighbours in a row differ by 2 in array_col (10x Genomics,
# "Visium Spatial Gene Expression, slide layout"). Rows are nominally 86.6 um apart; in Space Ranger's own positions
# 0.5 % more, so the scale is taken along the rows, where it agrees with the scale factors to four digits.
VISIUM_SPOT_UM = 55.0
VISIUM_PITCH_UM = 100.0
VISIUM_COLUMN_UM = VISIUM_PITCH_UM / 2
VISIUM_FULLRES_UM = 65.0  # what scalefactors' spot_diameter_fullres stands for: 65 um, not the spot's 55 um


class Lattice(NamedTuple):
    """An affine map from array positions to pixels: ``origin + row * row_step + column * column_step``."""

    column_step: np.ndarray
    """(x, y) pixels per array column."""
    row_step: np.ndarray
    """(x, y) pixels per array row."""
    origin: np.ndarray
    """(x, y) pixels of array position (0, 0)."""

    def centres_px(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Pixels (x, y) of array positions, ``(N, 2)``."""
        return np.asarray(self.origin + np.outer(row, self.row_step) + np.outer(column, self.column_step))

    @property
    def column_px(self) -> float:
        """Pixels per array column."""
        return float(np.hypot(*self.column_step))

    @property
    def row_px(self) -> float:
        """Pixels per array row."""
        return float(np.hypot(*self.row_step))


def fit_lattice(row: np.ndarray, column: np.ndarray, centres_px: np.ndarray, source: Path) -> Lattice | None:
    """Fit pixels on array positions; None where the positions lie on one line, which fixes nothing.

    Raises
    ------
    InputError
        The pixels do not follow the array.
    """
    every = max(1, len(row) // MOST_ROWS)
    design = np.column_stack([column, row, np.ones(len(row))])[::every].astype(np.float64)
    pixels = np.asarray(centres_px, dtype=np.float64)[::every]
    steps, _, rank, _ = np.linalg.lstsq(design, pixels, rcond=None)
    if rank < 3:
        return None
    fit = Lattice(*steps)
    off = float(np.sqrt(np.square(pixels - design @ steps).sum(axis=1).mean()))
    if not off < LOOSEST_FIT * min(fit.column_px, fit.row_px):
        raise InputError(
            f"{source}: pixel positions do not follow the array (off by {off:.1f} px, a step is "
            f"{min(fit.column_px, fit.row_px):.1f} px); look whether columns are swapped or rows are mixed up"
        )
    return fit


def visium_mpp(row: np.ndarray, column: np.ndarray, centres_px: np.ndarray, source: Path) -> float | None:
    """um per pixel of a Visium section from the pitch of its array; None where too few positions fix it."""
    fit = fit_lattice(row, column, centres_px, source)
    return None if fit is None else VISIUM_COLUMN_UM / fit.column_px


def pitch_px(centres_px: np.ndarray, source: Path) -> float:
    """Median distance of a spot to its nearest neighbour, pixels.

    Raises
    ------
    InputError
        Fewer than two spots, or spots in one place.
    """
    if len(centres_px) > 1:
        nearest = np.asarray(KDTree(centres_px).query(centres_px, k=2)[0])[:, 1]
        if np.median(nearest) > 0:
            return float(np.median(nearest))
    raise InputError(f"{source}: {len(centres_px)} spots do not tell how far apart spots are; at least two are needed")
