"""A lattice of spots over the tissue of a slide: where a slide that was never measured is predicted."""

from typing import NamedTuple

import numpy as np
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.section import HIRES_PX, build_section
from hifusion.slide import Slide
from hifusion.tissue import TissueMask

MOST_PLACES = 20_000_000  # about 3 GB of positions and names


class Lattice(NamedTuple):
    """Spots row by row: ``centres_px`` (x, y) float64 ``(N, 2)``, ``array_row`` and ``array_col`` int64 ``(N,)``."""

    centres_px: np.ndarray
    array_row: np.ndarray
    array_col: np.ndarray


def lattice(
    tissue: TissueMask,
    mpp: float,
    *,
    pitch_um: float,
    kind: str = "square",
    min_tissue: float = 0.5,
    window_um: float | None = None,
) -> Lattice:
    """Places of a lattice over the slide whose window holds enough tissue.

    The lattice starts half a pitch from the slide's upper left corner, so that the same array position is the same
    place whatever the mask. Dense maps are the same with a small pitch.

    Parameters
    ----------
    mpp
        um per full-resolution pixel.
    pitch_um
        Distance between neighbours.
    kind
        ``hexagonal`` is laid out as Visium: rows ``pitch * sqrt(3) / 2`` apart, every other one shifted by half a
        pitch; ``array_col`` counts half pitches, so that it and ``array_row`` are both even or both odd.
    min_tissue
        Least share of the window that is tissue, above 0 and up to 1; what lies outside the slide is none.
    window_um
        Side of the square around a centre, such as the spots' diameter; the pitch where None.

    Raises
    ------
    InputError
        No place has enough tissue, or a number is not possible.
    """
    window_um = pitch_um if window_um is None else window_um
    _refuse_impossible(mpp, pitch_um, kind, min_tissue, window_um)
    step = pitch_um / mpp
    across, down = (step, step) if kind == "square" else (step / 2, step * np.sqrt(3) / 2)
    width, height = tissue.size_px
    columns = np.arange(max(0, np.ceil((width - step / 2) / across)), dtype=np.int64)
    rows = np.arange(max(0, np.ceil((height - step / 2) / down)), dtype=np.int64)
    if (places := len(columns) * len(rows) // (2 if kind == "hexagonal" else 1)) > MOST_PLACES:
        raise InputError(
            f"pitch_um={pitch_um:g} gives {places:,} places on this slide, at most {MOST_PLACES:,} are possible; "
            "give a larger one"
        )
    summed = np.pad(tissue.mask.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    shares = _shares(summed, tissue, step / 2 + columns * across, step / 2 + rows * down, window_um / mpp)
    if kind == "hexagonal":
        shares[(rows[:, None] + columns) % 2 == 1] = -1.0
    row, column = np.nonzero(shares >= min_tissue)
    if not row.size:
        raise InputError(
            f"no place has {min_tissue:.0%} tissue in its {window_um:g} um ({tissue.mask.mean():.1%} of the slide is "
            f"tissue, {tissue.how}); lower the share, or correct the mask in a paint program and give it back"
        )
    return Lattice(np.stack([step / 2 + column * across, step / 2 + row * down], axis=1), row, column)


def _refuse_impossible(mpp: float, pitch_um: float, kind: str, min_tissue: float, window_um: float) -> None:
    for name, value in (("mpp", mpp), ("pitch_um", pitch_um), ("window_um", window_um)):
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{name}={value:g} is not possible; give a positive number of um")
    if kind not in ("square", "hexagonal"):
        raise InputError(f"kind={kind!r} is unknown; use square or hexagonal")
    if not 0 < min_tissue <= 1:
        raise InputError(f"min_tissue={min_tissue:g} is not possible; give a share above 0 and up to 1")


def _shares(summed: np.ndarray, tissue: TissueMask, x: np.ndarray, y: np.ndarray, window_px: float) -> np.ndarray:
    """Share of tissue in the window around each crossing of ``x`` and ``y``, ``(len(y), len(x))``."""
    (left, right, wide), (top, bottom, high) = (
        _window(centres, window_px, shrink, pixels)
        for centres, shrink, pixels in zip((x, y), tissue.shrink, tissue.mask.shape[::-1], strict=True)
    )
    strips = summed[bottom] - summed[top]
    return (strips[:, right] - strips[:, left]) / (high[:, None] * wide)


def _window(centres: np.ndarray, window_px: float, shrink: float, pixels: int) -> tuple[np.ndarray, ...]:
    """First and last + 1 mask pixel of windows along one axis, within the mask, and how many pixels they have in all.

    A pixel belongs to a window that holds its middle; the pixel under the centre always does.
    """
    under = np.floor(centres / shrink)
    first = np.minimum(np.ceil((centres - window_px / 2) / shrink - 0.5), under).astype(np.int64)
    last = np.maximum(np.ceil((centres + window_px / 2) / shrink - 0.5), under + 1).astype(np.int64)
    return np.clip(first, 0, pixels), np.clip(last, 0, pixels), last - first


def lattice_section(
    slide: Slide,
    tissue: TissueMask,
    *,
    mpp: float,
    pitch_um: float,
    spot_diameter_um: float,
    kind: str = "square",
    min_tissue: float = 0.5,
    name: str | None = None,
    patient: str | None = None,
) -> AnnData:
    """A section of positions alone over the tissue of a slide, spots named ``<array_col>x<array_row>``.

    Parameters
    ----------
    mpp, pitch_um, kind, min_tissue
        As for :func:`lattice`; the window is the spot's diameter.
    name, patient
        The file's name without its suffix where None; a patient of its own.
    """
    try:
        places = lattice(tissue, mpp, pitch_um=pitch_um, kind=kind, min_tissue=min_tissue, window_um=spot_diameter_um)
    except InputError as error:
        raise InputError(f"{slide.path}: {error}") from error
    name = name or slide.path.stem
    return build_section(
        None,
        spots=[f"{column}x{row}" for column, row in zip(places.array_col, places.array_row, strict=True)],
        centres_px=places.centres_px,
        name=name,
        patient=patient or name,
        mpp=mpp,
        spot_diameter_um=spot_diameter_um,
        pitch_um=pitch_um,
        array_row=places.array_row,
        array_col=places.array_col,
        image=slide.path,
        thumbnail=slide.thumbnail(HIRES_PX),
        full_size_px=slide.size_px,
        source=str(slide.path),
    )
