"""JPEG and PNG, decoded whole with Pillow when first read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL import ImageFile as PillowFile

from hifusion.errors import InputError
from hifusion.imagefile.contract import (
    BILEVEL,
    DEEP,
    MAX_PIXELS,
    ImageFile,
    Level,
    Scale,
    on_white,
    readable,
    refusal,
    refuse_turned,
)

_FORMATS = ("JPEG", "PNG")
_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA")
_MOST_PIXELS_PER_BYTE = 8256  # 1-bit pixels in a PNG; without this, a small file could have gigabytes of grey decoded
_BAND_ROWS = 1024
_KINDS = {"1": BILEVEL, "CMYK": "CMYK, for print,"}


class PlainFile(ImageFile):
    """A picture without tiles or levels. Its only notion of size is the dpi of a print, so it has no scale."""

    reader = "pillow"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with readable(path), _opened(path) as image:
            # Pillow has names of its own for some JPEGs: MPO where a preview follows the picture.
            self.format = "PNG" if image.format == "PNG" else "JPEG"
            self.levels = (Level(image.size),)
            _refuse_what_is_no_photograph(path, image)
        self.scale = Scale(None, f"not in the file: a {self.format} has at most the dpi of a print")

    @cached_property
    def _pixels(self) -> np.ndarray:
        width, height = self.levels[0].size_px
        with readable(self.path), _opened(self.path) as image:
            image.load()
            pixels = np.empty((height, width, 3), dtype=np.uint8)
            for y in range(0, height, _BAND_ROWS):  # converting all of a large one at once would take its memory thrice
                band = (0, y, width, min(y + _BAND_ROWS, height))
                pixels[band[1] : band[3]] = np.asarray(on_white(image.crop(band)))
            return pixels

    def read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels of a rectangle, uint8 ``(y1 - y0, x1 - x0, 3)``; what is transparent is white."""
        return self._pixels[y0:y1, x0:x1]

    def thumbnail(self, size_px: tuple[int, int]) -> np.ndarray:
        """The whole image at (width, height), uint8 ``(height, width, 3)``, without keeping its pixels."""
        with readable(self.path), _opened(self.path) as image:
            image.draft("RGB", size_px)  # JPEG decodes at 1/2, 1/4 or 1/8 at a fraction of the cost
            return np.asarray(on_white(image).resize(size_px, Image.Resampling.BOX))

    def close(self) -> None:
        """Forget the pixels."""
        self.__dict__.pop("_pixels", None)


def _refuse_what_is_no_photograph(path: Path, image: PillowFile.ImageFile) -> None:
    if image.mode.startswith("I") or any("16" in str(tile.args) for tile in image.tile):
        # Pillow gives a 16-bit RGB PNG as 8-bit, its low bytes dropped: dark where a camera filled 12 of the 16 bits.
        raise refusal(path, DEEP)
    if image.mode not in _MODES:
        raise refusal(path, _KINDS.get(image.mode, f"of mode {image.mode}"))
    refuse_turned(path, image.getexif().get(ExifTags.Base.Orientation, 1))


@contextmanager
def _opened(path: Path) -> Iterator[PillowFile.ImageFile]:
    # Pillow refuses from 179 megapixels on, which a large section photograph exceeds; the limit here is our own.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: {image.width} x {image.height} px are too many to decode whole; convert it to a tiled "
                    "pyramid TIFF"
                )
            n_bytes = path.stat().st_size
            if image.width * image.height > _MOST_PIXELS_PER_BYTE * n_bytes:
                raise InputError(
                    f"{path}: not a readable image (it states {image.width} x {image.height} px and holds {n_bytes} "
                    "bytes); give an intact slide, TIFF, JPEG or PNG"
                )
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit
