"""A section as a pyramidal OME-TIFF: one channel per gene, on a raster that keeps every spot in a pixel of its own."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from anndata import AnnData
from scipy.spatial import cKDTree

from hifusion import files
from hifusion.errors import InputError
from hifusion.export_spots import dense

FINEST = 16  # pixels per pitch, at most
REACH = 0.75  # of a pitch: to the corner between four spots it is 0.71
MOST_BYTES = 2**32
TILE_PX = 256
SMALLEST_PX = 64  # longest side of the coarsest level


class Raster(NamedTuple):
    """Which spot each pixel shows.

    Attributes
    ----------
    spot
        int ``(height, width)``: a spot's row in the section, -1 where there is none.
    left_px, top_px
        The raster's corner in full-resolution pixels of the slide.
    step_px
        Side of a raster pixel, likewise.
    """

    spot: np.ndarray
    left_px: float
    top_px: float
    step_px: float


def write_ome_tiff(section: AnnData, out: Path) -> None:
    """Write the genes of ``section`` as float32 channels ``(C, Y, X)``, NaN where there is no spot.

    A pixel is as wide as the pitch where the lattice allows it, else half, a quarter and so on (:func:`rasterise`).
    Physical sizes are in um; where the raster lies on the slide is in ``PositionX`` and ``PositionY`` (um) and, in
    full-resolution pixels, in the annotations ``left_px``, ``top_px`` and ``step_px``.

    Raises
    ------
    InputError
        The section has no genes, two spots at one place, or more genes than fit the memory.
    """
    if not section.n_vars:
        raise InputError(
            f"{out}: the section has positions but no genes, so there is nothing to draw; predict it first"
        )
    facts = section.uns["hifusion"]
    raster = rasterise(section.obsm["spatial"], facts["pitch_um"] / facts["mpp"], section.obs_names.to_list())
    if raster.spot.size * section.n_vars * 4 > MOST_BYTES:
        fit = MOST_BYTES // (raster.spot.size * 4)
        raise InputError(f"{out}: {section.n_vars} genes are too many for a raster of this size; choose at most {fit}")
    # One row more than there are spots: -1, where there is no spot, is the last one.
    values = np.vstack([dense(section), np.full(section.n_vars, np.nan, dtype=np.float32)])
    levels = [np.ascontiguousarray(np.moveaxis(values[raster.spot], -1, 0))]
    while max(levels[-1].shape[1:]) > SMALLEST_PX:
        levels.append(_halved(levels[-1]))
    step_um = raster.step_px * facts["mpp"]
    count = section.n_vars
    metadata = {
        "axes": "CYX",
        "Name": _xml(facts["section"]),
        "PhysicalSizeX": step_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": step_um,
        "PhysicalSizeYUnit": "µm",
        "Channel": {"Name": [_xml(gene) for gene in section.var_names]},
        "Plane": {
            "PositionX": [raster.left_px * facts["mpp"]] * count,
            "PositionXUnit": ["µm"] * count,
            "PositionY": [raster.top_px * facts["mpp"]] * count,
            "PositionYUnit": ["µm"] * count,
        },
        "MapAnnotation": {
            **{key: repr(getattr(raster, key)) for key in ("left_px", "top_px", "step_px")},
            **{key: _xml(facts[key]) for key in ("section", "normalisation", "run")},
        },
    }
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "compression": "zlib",
        "tile": (TILE_PX, TILE_PX),
        "dtype": np.float32,
    }
    with (
        files.replacing(out) as part,
        tifffile.TiffWriter(part, ome=True, bigtiff=levels[0].nbytes > MOST_BYTES // 4) as tiff,
    ):
        tiff.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, metadata=None, **options)


def rasterise(centres_px: np.ndarray, pitch_px: float, spots: list[str]) -> Raster:
    """The coarsest raster, of a pitch or a half, a quarter ... of it a pixel, that has each spot in a pixel of its own.

    A pixel shows the spot whose centre lies in it, else the nearest one up to :data:`REACH` pitches away.

    Parameters
    ----------
    centres_px
        Spot centres (x, y) in full-resolution pixels, ``(N, 2)``.
    spots
        Their names, for messages.
    """
    parts = 1
    while True:
        step = pitch_px / parts
        # Pixel centres go to where most spots are, modulo a step: a jittered lattice then keeps clear of the edges.
        phase = np.angle(np.exp(2j * np.pi * centres_px / step).mean(axis=0)) / (2 * np.pi) * step
        cells = np.round((centres_px - phase) / step).astype(np.int64)
        corner = cells.min(axis=0)
        _, first, times = np.unique(cells, axis=0, return_index=True, return_counts=True)
        if times.max() == 1:
            break
        if parts == FINEST:
            same = np.flatnonzero((cells == cells[first[times.argmax()]]).all(axis=1))
            raise InputError(f"spots {spots[same[0]]} and {spots[same[1]]} stand at one place; keep one of them")
        parts *= 2
    width, height = cells.max(axis=0) - corner + 1
    x, y = (np.arange(size) * step + start for size, start in zip((width, height), corner * step + phase, strict=True))
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    spot = cKDTree(centres_px).query(grid, distance_upper_bound=REACH * pitch_px)[1].reshape(height, width)
    spot[spot == len(centres_px)] = -1
    spot[tuple((cells - corner).T[::-1])] = np.arange(len(centres_px))
    left, top = corner * step + phase - step / 2
    return Raster(spot, float(left), float(top), float(step))


def _halved(level: np.ndarray) -> np.ndarray:
    """Mean of each 2 x 2 pixels of ``(C, Y, X)``; NaN counts only where all four are."""
    high, wide = level.shape[1:]
    padded = np.pad(level, ((0, 0), (0, high % 2), (0, wide % 2)), constant_values=np.nan)
    blocks = padded.reshape(len(level), (high + 1) // 2, 2, (wide + 1) // 2, 2)
    known = np.isfinite(blocks).sum(axis=(2, 4))
    total = np.nansum(blocks, axis=(2, 4))
    return np.where(known, total / np.maximum(known, 1), np.nan).astype(np.float32)


def _xml(text: str) -> str:
    """``text`` without the control characters that XML forbids; what only needs escaping, tifffile escapes."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", str(text))
