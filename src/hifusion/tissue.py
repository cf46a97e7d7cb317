"""Where the tissue of a slide lies: found on a thumbnail, or read from a mask that was corrected by hand.

Tissue is what is stained: haematoxylin and eosin absorb green most, whatever the glass looks like. The glass has no one
colour (eosin bleeds into a haze beside the tissue, the lamp and the camera shade it), so its colour is estimated place
by place, from what is smooth and pale. Pen, dirt, bubbles and fiducial rings are dark but not of that hue.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage as ndi
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from hifusion import files
from hifusion.errors import InputError
from hifusion.slide import Slide

MASK_UM = 8.0  # um per mask pixel
MOST_MASK_PX = 2500  # longest side of a mask: 20 mm at 8 um; a larger slide gets a coarser one, so memory stays bounded

# Lengths in um; optical densities are decadic, over the glass. Chosen on ten public sections whose spots tell where the
# tissue is; a third more or less of any costs at most 3 % of a section's spots (docs/geometry.md).
_BLUR_UM, _GRAIN_UM, _SHADE_UM = 16.0, 56.0, 384.0
_STAINED, _SURELY_STAINED = 0.012, 0.03  # mean density in green over that in red and blue
_SMOOTH, _PALE, _PALE_STAIN = 0.01, 0.12, 0.06  # glass: local spread of density, density, stain
_INK_DENSITY, _BLUE_INK, _GREY_INK = 0.2, 1.25, 0.06  # red over green, stain over mean density: H&E has < 1.24, > 0.1
_FLAT_INK, _FLAT_SPREAD = 0.4, 0.04  # as dark as a pen and as even: tissue that dark has nuclei in it
_INK_MARGIN_UM, _CLOSE_UM = 40.0, 40.0
_LEAST_HOLE_MM2, _LEAST_PIECE_MM2, _LEAST_PIECE = 0.05, 0.1, 0.02  # smaller holes are filled; smaller pieces are dust


@dataclass(frozen=True)
class TissueMask:
    """Which parts of a slide are tissue.

    Attributes
    ----------
    mask
        bool ``(h, w)`` over the whole slide.
    size_px
        (width, height) of the slide at full resolution.
    how
        How it was found, in a few words.
    """

    mask: np.ndarray
    size_px: tuple[int, int]
    how: str

    @property
    def shrink(self) -> tuple[float, float]:
        """Slide pixels per mask pixel along x and y; they differ by rounding only."""
        height, width = self.mask.shape
        return self.size_px[0] / width, self.size_px[1] / height


def find_tissue(slide: Slide, mpp: float | None = None) -> TissueMask:
    """The tissue of an H&E slide, found on a thumbnail of about 8 um a pixel; no tissue gives an empty mask.

    Parameters
    ----------
    mpp
        um per full-resolution pixel; the slide's own where None.
    """
    picture, um = small_picture(slide, mpp or slide.require_mpp())
    return TissueMask(tissue_of(picture, um), slide.size_px, f"stain over local glass at {um:.3g} um/px")


def small_picture(slide: Slide, mpp: float) -> tuple[np.ndarray, float]:
    """The slide at about 8 um a pixel, uint8 ``(h, w, 3)``, and its um per pixel; coarser where the slide is huge."""
    longest = max(slide.size_px)
    picture = slide.thumbnail(min(MOST_MASK_PX, max(1, round(longest * mpp / MASK_UM))))
    return picture, longest * mpp / max(picture.shape[:2])


def tissue_of(picture: np.ndarray, um: float) -> np.ndarray:
    """Tissue in a small picture, bool ``(h, w)``.

    Parameters
    ----------
    picture
        uint8 ``(h, w, 3)``.
    um
        um per pixel of it; made for 4 to 14, coarser ones lose pale tissue.
    """
    density = optical_density(picture)
    spread = _spread(density.mean(axis=2), _GRAIN_UM / um)
    smooth = spread < _SMOOTH
    blurred = ndi.gaussian_filter(density, (_BLUR_UM / um, _BLUR_UM / um, 0))
    # What is brighter than the brightest glass is glass too: padding, or a background that was whitened.
    glass = smooth & (blurred.mean(axis=2) < _PALE) & (_stain(blurred) < _PALE_STAIN)
    shade = _local_mean(density, glass, um)
    density -= shade
    blurred -= shade
    stain = _stain(blurred)
    stained = (stain > _STAINED) & ~(smooth & (stain < _PALE_STAIN))
    pieces, count = ndi.label(stained)
    sure = np.zeros(count + 1, dtype=bool)
    sure[pieces[stain > _SURELY_STAINED]] = True
    sure[0] = False
    return _tidy(sure[pieces] & ~_ink(density, blurred, spread, um), um)


def optical_density(picture: np.ndarray) -> np.ndarray:
    """Decadic optical density over the brightest glass, float32 ``(h, w, 3)``; the padding of a scan is no glass."""
    flat = picture.reshape(-1, 3)
    scanned = (flat.min(axis=1) < 255) & (flat.max(axis=1) > 0)
    if scanned.mean() < 0.05:
        scanned[:] = True
    # The brightest 1 % may be a label or a bubble's glint; what comes near to it is most of the glass.
    brightness = ndi.uniform_filter(picture.mean(axis=2, dtype=np.float32), 3).ravel()
    bright = scanned & (brightness >= 0.85 * np.percentile(brightness[scanned], 99))
    white = np.median(flat[bright if bright.any() else scanned], axis=0)
    levels = np.log10(np.maximum(np.arange(256), 1)).astype(np.float32)
    return np.log10(np.maximum(white, 1)).astype(np.float32) - levels[picture]


def _stain(density: np.ndarray) -> np.ndarray:
    return density[..., 1] - 0.5 * (density[..., 0] + density[..., 2])


def _spread(values: np.ndarray, width_px: float) -> np.ndarray:
    """Standard deviation in a window around each pixel."""
    size = max(3, 2 * int(width_px / 2) + 1)
    wide = values.astype(np.float64)
    variance = ndi.uniform_filter(wide**2, size) - ndi.uniform_filter(wide, size) ** 2
    return np.sqrt(np.maximum(variance, 0.0)).astype(np.float32)


def _local_mean(density: np.ndarray, where: np.ndarray, um: float) -> np.ndarray:
    """Mean of ``density`` over the pixels ``where``, around each pixel; from farther away where none are near."""
    block = max(1, round(_SHADE_UM / 3 / um))
    height, width = where.shape
    margins = ((0, -height % block), (0, -width % block))
    weight = np.pad(where, margins).astype(np.float32)
    values = np.pad(density, (*margins, (0, 0))) * weight[..., None]
    rows, columns = weight.shape[0] // block, weight.shape[1] // block
    weight = weight.reshape(rows, block, columns, block).mean(axis=(1, 3))
    values = values.reshape(rows, block, columns, block, 3).mean(axis=(1, 3))
    found = np.zeros_like(values)
    for reach in (48, 12, 3):  # blocks: from the whole slide to _SHADE_UM
        share = ndi.gaussian_filter(weight, reach, mode="nearest")[..., None]
        mean = ndi.gaussian_filter(values, (reach, reach, 0), mode="nearest") / np.maximum(share, 1e-6)
        trust = np.clip(share / 0.05, 0, 1)
        found = trust * mean + (1 - trust) * found
    wide = ndi.zoom(found, (block, block, 1), order=1, mode="nearest", grid_mode=True)
    return wide[:height, :width]


def _ink(density: np.ndarray, blurred: np.ndarray, spread: np.ndarray, um: float) -> np.ndarray:
    """Pen marks by hue (blue, green, black) or by being dark and even, with a margin for their faint edges."""
    fine = ndi.gaussian_filter(density, (_BLUR_UM / 2 / um, _BLUR_UM / 2 / um, 0))
    bluish, greyish = fine[..., 0] > _BLUE_INK * fine[..., 1], _stain(fine) < _GREY_INK * fine.mean(axis=2)
    hue = (fine.max(axis=2) > _INK_DENSITY) & (bluish | greyish)
    even = (blurred.mean(axis=2) > _FLAT_INK) & (spread < _FLAT_SPREAD)
    # Opened: single pixels of an odd hue are noise. An even pixel speaks for the whole window of its spread.
    core = ndi.binary_opening(hue, np.ones((3, 3), dtype=bool)) | ndi.binary_opening(even, _disc(_GRAIN_UM / 2 / um))
    return ndi.distance_transform_edt(~core) <= max(1.0, _INK_MARGIN_UM / um) if core.any() else core


def _disc(radius_px: float) -> np.ndarray:
    reach = max(1, round(radius_px))
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.hypot(x, y) <= reach + 0.3


def _tidy(mask: np.ndarray, um: float) -> np.ndarray:
    """Closed over small gaps, without small holes and specks."""
    reach = max(1, round(_CLOSE_UM / um))
    padded = np.pad(mask, reach)
    mask = mask | ndi.binary_closing(padded, _disc(reach))[reach:-reach, reach:-reach]
    pixel_mm2 = um**2 / 1e6
    holes, _ = ndi.label(~mask)
    small = np.bincount(holes.ravel()) * pixel_mm2 < _LEAST_HOLE_MM2
    small[0] = False
    mask |= small[holes]
    pieces, _ = ndi.label(mask)
    area = np.bincount(pieces.ravel()) * pixel_mm2
    area[0] = 0
    return (area >= max(min(_LEAST_PIECE_MM2, _LEAST_PIECE * area.max()), pixel_mm2))[pieces]


def write_mask(tissue: TissueMask, path: Path) -> None:
    """Write a mask as a PNG, tissue white on black, that a paint program can correct."""
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"{path}: a mask is written as .png; give a name that ends so")
    facts = PngImagePlugin.PngInfo()
    facts.add_text("hifusion:slide", f"{tissue.size_px[0]} x {tissue.size_px[1]} px")
    facts.add_text("hifusion:how", tissue.how)
    with files.replacing(Path(path)) as part:
        Image.fromarray(tissue.mask.astype(np.uint8) * 255).save(part, format="PNG", pnginfo=facts)


def read_mask(path: Path, slide: Slide) -> TissueMask:
    """Read a mask of ``slide``: a picture of any size over the whole slide, tissue where it is bright (128 to 255).

    Raises
    ------
    InputError
        No picture, or that of another slide: of another shape, or written for one of another size.
    """
    try:
        with Image.open(path) as image:
            written_for = str(image.info.get("hifusion:slide", ""))
            mask = np.asarray(image.convert("L")) >= 128
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such mask; give the tissue.png of a prediction, or none") from error
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture; give a mask as PNG") from error
    (width, height), (rows, columns) = slide.size_px, mask.shape
    ours = f"{width} x {height} px"
    # Both sides of a thumbnail are rounded: each may be half a pixel off.
    off = abs(columns * height - rows * width)
    if off > 0.5 * (width + height) + max(width, height) or (written_for and written_for != ours):
        theirs = written_for or f"of the shape {columns} x {rows}"
        raise InputError(
            f"{path}: belongs to another slide ({theirs}); {slide.path.name} has {ours}, give its own mask"
        )
    return TissueMask(mask, slide.size_px, f"read from {Path(path).name}")
