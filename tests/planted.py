"""Two sections of one tissue made by code, the second one turned, moved and stretched by a map that is known."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi

import stained
from hifusion.cohort import SectionView
from views import make_view

SIDE_PX = 840  # the stained picture with glass around it, so that no turn cuts the tissue
PITCH_PX = stained.PITCH_UM / stained.MPP


@dataclass(frozen=True)
class Planted:
    """A section, its copy elsewhere, and the map ``(2, 3)`` in um from the copy (moving) to the section (fixed)."""

    fixed: SectionView
    moving: SectionView
    matrix: np.ndarray

    def true_um(self) -> np.ndarray:
        """Where the moving section's spots belong."""
        spots = self.moving.centres_px * stained.MPP
        return spots @ self.matrix[:, :2].T + self.matrix[:, 2]


def plant(
    folder: Path, degrees: float, shift_um: tuple[float, float] = (0.0, 0.0), scale: float = 1.0, flip: bool = False
) -> Planted:
    """A section and its copy, with pictures: the copy turned about the middle, moved, stretched, stained darker."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turn = scale * turn @ np.diag([-1.0 if flip else 1.0, 1.0])
    middle = np.full(2, SIDE_PX / 2)
    offset = middle - turn @ middle + np.array(shift_um) / stained.MPP
    picture = np.tile(stained.GLASS, (SIDE_PX, SIDE_PX, 1))
    top, left = (SIDE_PX - stained.HEIGHT) // 2, (SIDE_PX - stained.WIDTH) // 2
    picture[top : top + stained.HEIGHT, left : left + stained.WIDTH] = stained.picture()
    tissue = np.zeros((SIDE_PX, SIDE_PX), dtype=bool)
    tissue[top : top + stained.HEIGHT, left : left + stained.WIDTH] = stained.outline()
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX]
    at = np.stack([x, y], axis=-1) + 0.5
    seen = np.moveaxis(at @ turn.T + offset - 0.5, -1, 0)[::-1]
    copy = np.stack([ndi.map_coordinates(c, seen, order=1, mode="nearest") for c in np.moveaxis(picture, -1, 0)], -1)
    copy = 245 * (copy / 245) ** 1.2 + np.random.default_rng(4).normal(0, 4, copy.shape)
    folder.mkdir(parents=True, exist_ok=True)
    views = []
    for name, pixels, mask in (
        ("P1", picture, tissue),
        ("P2", copy, ndi.map_coordinates(tissue.astype(float), seen, order=1) > 0.5),
    ):
        path = stained.write_picture(folder / f"{name}.png", np.clip(pixels, 0, 255).astype(np.uint8))
        views.append(_view(name, mask, path))
    matrix = np.column_stack([turn, offset * stained.MPP])
    return Planted(views[0], views[1], matrix)


def without_pictures(planted: Planted) -> Planted:
    """The same sections as positions alone."""
    return replace(planted, fixed=replace(planted.fixed, image=None), moving=replace(planted.moving, image=None))


def _view(name: str, mask: np.ndarray, image: Path) -> SectionView:
    steps = np.arange(PITCH_PX / 2, SIDE_PX, PITCH_PX)
    centres = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    centres = centres[mask[centres[:, 1].astype(int), centres[:, 0].astype(int)]]
    facts = {"centres_px": centres, "pitch_px": PITCH_PX, "mpp": stained.MPP, "spot_diameter_um": stained.DIAMETER_UM}
    return make_view(name, len(centres), regions=None, image=image, **facts)
