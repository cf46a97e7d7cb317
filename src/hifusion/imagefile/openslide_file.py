"""Whole-slide formats read with OpenSlide: Aperio, Hamamatsu, Leica, MIRAX, Philips, Ventana, DICOM and others."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide

from hifusion.errors import InputError
from hifusion.imagefile.contract import (
    MAX_PIECE_BYTES,
    ImageFile,
    Level,
    Scale,
    level_shrink,
    on_white,
    readable,
    usable_scale,
)

_CACHE_BYTES = 2**26  # twice OpenSlide's own: the tiles across a slide of one level fit, for a thumbnail of it
_SIDES = ("width", "height")


class OpenSlideFile(ImageFile):
    """A slide that OpenSlide opens; it reads piecewise and keeps the tiles it decoded last."""

    reader = "openslide"

    def __init__(self, path: Path, vendor: str) -> None:
        super().__init__(path)
        self.format = vendor
        with readable(path):
            self._slide = openslide.OpenSlide(str(path))
            self._slide.set_cache(openslide.OpenSlideCache(_CACHE_BYTES))
            self.scale = _scale(self._slide.properties)
            self.associated = tuple(sorted(self._slide.associated_images))
            full, sizes = self._slide.dimensions, self._slide.level_dimensions
            shrinks = [
                level_shrink(full, size) or (by, by)
                for size, by in zip(sizes, self._slide.level_downsamples, strict=True)
            ]
            self.levels = tuple(Level(size, shrink) for size, shrink in zip(sizes, shrinks, strict=True))
            self._refuse_vast_tiles()

    def _refuse_vast_tiles(self) -> None:
        # OpenSlide ends the process when it cannot get the memory for a tile.
        properties = self._slide.properties
        for number in range(len(self.levels)):
            width, height = (int(properties.get(f"openslide.level[{number}].tile-{side}", 0)) for side in _SIDES)
            if 4 * width * height > MAX_PIECE_BYTES:
                raise InputError(
                    f"{self.path}: has tiles of {width} x {height} px, more than {MAX_PIECE_BYTES >> 20} MB each; "
                    "convert it to a pyramid TIFF with tiles of 256 or 512 px"
                )

    def read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels of a rectangle inside a level, uint8 ``(y1 - y0, x1 - x0, 3)``; what is transparent is white.

        OpenSlide takes the corner in whole full-resolution pixels: where those do not divide, what is read lies up to
        half a full-resolution pixel off.
        """
        with readable(self.path):
            by = self._slide.level_downsamples[level]
            corner = round(x0 * by), round(y0 * by)
            return np.asarray(on_white(self._slide.read_region(corner, level, (x1 - x0, y1 - y0))))

    def close(self) -> None:
        """Close the slide."""
        self._slide.close()


def _scale(properties: Mapping[str, str]) -> Scale:
    x, y = (properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y))
    if x is None and y is None:
        return Scale(None, "not in the slide's metadata")
    return usable_scale(float(x or y or "nan"), float(y or x or "nan"), "slide metadata (openslide.mpp)")
