"""What every opened image file offers, whatever it is read with: levels, rectangles of pixels, a scale."""

import math
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from hifusion.errors import InputError
from hifusion.imagefile.area import AxisCover, area_average

BACKGROUND = 255  # what lies outside a slide is white, as empty glass is
MAX_PIXELS = 2**30  # read at once, or decoded whole: 7 GB while a plain image of this size is being decoded
MAX_PIECE_BYTES = 2**28  # one decoded tile or strip; those of real slides hold a few MB
MIN_MPP = 0.01  # finer than any light microscope
MAX_MPP = 20.0  # coarser "scales" are the dpi of a print (300 dpi = 85 um, 72 dpi = 353 um), not of a scan
SHARP = 2.0  # pixels of a level per pixel of a patch from which on it does not matter where between them it lies
MAX_ANISOTROPY = 0.05  # pixels longer than wide by more than this cannot be cut as squares

BILEVEL = "black and white (1 bit)"
DEEP = "16-bit, of which it does not say what part of the range holds the tissue,"

# What the imaging libraries raise on damaged and foreign files, most of it undocumented; MemoryError stands for a
# header that promises more than there is. TypeError and AttributeError come from tags that hold what they should not.
_DAMAGE = (
    *(openslide.OpenSlideError, OSError, EOFError, MemoryError, SyntaxError),
    *(ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, AttributeError),
    *(Image.DecompressionBombError, struct.error, zlib.error),
)
_REASONS: dict[type, str] = {
    UnidentifiedImageError: "its content is of no format that is known here",
    MemoryError: "it takes more memory than there is",
}


@dataclass(frozen=True)
class Level:
    """One resolution of an image: (width, height), and full-resolution pixels per pixel in x and in y."""

    size_px: tuple[int, int]
    shrink: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Scale:
    """um per full-resolution pixel, None where the file gives none that can be used, and whence or why not."""

    mpp: float | None
    source: str


class ImageFile(ABC):
    """An image file that stands open.

    Attributes
    ----------
    reader
        The library that decodes it.
    format
        What the file is, in a word or two.
    levels
        Resolutions, the finest first.
    scale
        um per pixel as the file's own metadata give it; a dpi tag is not a scale.
    associated
        Names of further pictures in the file (label, macro photograph).
    """

    reader: ClassVar[str]
    format: str
    levels: tuple[Level, ...]
    scale: Scale
    associated: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels of a rectangle inside a level, uint8 ``(y1 - y0, x1 - x0, 3)``; what is transparent is white.

        Raises
        ------
        InputError
            The file is damaged there.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file and forget its pixels."""

    def level_for(self, shrink: float) -> int:
        """The coarsest level that is no coarser than ``shrink`` full-resolution pixels per pixel."""
        fine_enough = [number for number, level in enumerate(self.levels) if max(level.shrink) <= shrink]
        return max(fine_enough, key=lambda number: self.levels[number].shrink, default=0)

    def sharp_level_for(self, shrink: float, left: int, top: int) -> int:
        """The coarsest level that gives a grid of pixels, its corner at (left, top), without blurring it.

        A grid that lies between the pixels of a level averages neighbours: at the level's own size a quarter of the
        local contrast is gone, more or less of it by where the grid happens to lie; at twice its size a tenth.
        """
        for number in range(self.level_for(shrink), 0, -1):
            by = max(self.levels[number].shrink)
            if by * SHARP <= shrink or all(value % by == 0 for value in (left, top, shrink)):
                return number
        return 0

    def read_area(
        self, level: int, left: int, top: int, width: int, height: int, size_px: tuple[int, int]
    ) -> np.ndarray:
        """A rectangle of full-resolution pixels shrunk to ``size_px`` by area averaging.

        Parameters
        ----------
        level
            The level to read.
        left, top, width, height
            The rectangle in full-resolution pixels; what lies outside the image is white.
        size_px
            (width, height) of what is returned.

        Returns
        -------
        ndarray
            uint8 ``(size_px[1], size_px[0], 3)``.

        Raises
        ------
        InputError
            The file is damaged, or so much would have to be read that it wants a pyramid.
        """
        full, of = self.levels[0].size_px, self.levels[level]
        columns, rows = (
            AxisCover.of(start / shrink, extent / shrink, count, whole / shrink, length)
            for start, extent, count, whole, shrink, length in zip(
                (left, top), (width, height), size_px, full, of.shrink, of.size_px, strict=True
            )
        )
        if columns.n_read * rows.n_read > MAX_PIXELS:
            raise InputError(
                f"{self.path}: {width} x {height} px at {size_px[0]} x {size_px[1]} would be averaged over "
                f"{columns.n_read * rows.n_read / 1e6:.0f} megapixels; convert it to a tiled pyramid TIFF"
            )
        return area_average(lambda x0, y0, x1, y1: self.read(level, x0, y0, x1, y1), columns, rows, BACKGROUND)

    def thumbnail(self, size_px: tuple[int, int]) -> np.ndarray:
        """The whole image at (width, height) no larger than its own, uint8 ``(height, width, 3)``."""
        width, height = self.levels[0].size_px
        level = self.level_for(min(width / size_px[0], height / size_px[1]))
        return self.read_area(level, 0, 0, width, height, size_px)


def level_shrink(full: tuple[int, int], size: tuple[int, int]) -> tuple[float, float] | None:
    """Whole pixels per pixel of a level of ``size``, the same in x and y; None where no whole number explains both.

    Writers of pyramids drop or fill up what does not divide: 718 px at a quarter are 179 or 180, not 179.5. Taking the
    ratio of the sizes would stretch such a level by up to a pixel.
    """
    if not min(*full, *size) > 0:
        return None
    ratio = (full[0] / size[0] + full[1] / size[1]) / 2
    for shrink in (2 ** round(math.log2(ratio)), round(ratio)):
        if all(abs(whole / shrink - part) < 1 for whole, part in zip(full, size, strict=True)):
            return float(shrink), float(shrink)
    return None


def usable_scale(x: float, y: float, source: str) -> Scale:
    """The scale that a file states as (x, y) um per pixel, or why it cannot be one."""
    if not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0):
        return Scale(None, f"{source} says {x:g} x {y:g} um, which is no size of a pixel")
    if max(x, y) > MAX_MPP:
        dpi = f", the {25400 / x:.0f} dpi of a screen or a print"
        return Scale(None, f"{source} says {x:.4g} um{dpi}, too coarse for a scan")
    if min(x, y) < MIN_MPP:
        return Scale(None, f"{source} says {min(x, y):.3g} um, finer than light can show")
    if abs(x - y) > MAX_ANISOTROPY * min(x, y):
        return Scale(None, f"{source} says {x:.4g} um across and {y:.4g} um down: pixels are not square")
    return Scale((x + y) / 2, source)


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, what is transparent in it white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, (BACKGROUND,) * 3)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the imaging libraries raise on a damaged or foreign file into one line."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        known = _REASONS.get(type(error))
        reason = known or " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason}); give an intact slide, TIFF, JPEG or PNG") from error


def refusal(path: Path, what: str, todo: str = "save it as 8-bit RGB") -> InputError:
    """The error that says what kind of image is not taken, and what to do about it."""
    return InputError(f"{path}: is {what} and cannot be used as a slide; {todo}")


def refuse_turned(path: Path, orientation: int) -> None:
    """Refuse an image that is stored turned or mirrored.

    Some programs turn such an image before they show it and others do not, so positions on it have two meanings.
    """
    if orientation not in (0, 1):  # 0 is no orientation: some cameras write it for "not known"
        raise refusal(
            path, f"stored turned or mirrored (orientation tag {orientation})", "save it upright, with orientation 1"
        )
