"""Open a slide, know its size and scale, read a patch centred at (x, y)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from hifusion.errors import InputError

BACKGROUND = 255  # what lies outside a slide is white, as empty glass is
MAX_PIXELS = 2**31  # a plain image is decoded whole: beyond this it would need 6 GB
MAX_MPP = 20.0  # coarser "scales" are the dpi of a print (300 dpi = 85 um, 72 dpi = 353 um), not of a scan


class Slide:
    """An image file of tissue, behind one way of reading it.

    OpenSlide opens whole-slide formats and reads them piecewise; JPEG, PNG and plain TIFF are decoded whole, when first
    read. What is transparent in a file is white here.

    Attributes
    ----------
    path
        The file.
    size_px
        (width, height) at full resolution.
    mpp
        um per full-resolution pixel as the file's own metadata give it, or None. A dpi tag is not a scale.
    """

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.path = Path(path)
        self.mpp: float | None = None
        self._openslide: openslide.OpenSlide | None = None
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such image; give the path of a slide file")
        with _readable(self.path):
            if openslide.OpenSlide.detect_format(str(self.path)):
                self._openslide = openslide.OpenSlide(str(self.path))
                self.size_px: tuple[int, int] = self._openslide.dimensions
                mpp = float(self._openslide.properties.get(openslide.PROPERTY_NAME_MPP_X, "nan"))
                self.mpp = mpp if 0 < mpp <= MAX_MPP else None
            else:
                with _open_plain(self.path) as image:
                    self.size_px = image.size
        self.mpp = mpp or self.mpp

    def require_mpp(self) -> float:
        """um per full-resolution pixel.

        Raises
        ------
        InputError
            The file does not say it and none was given.
        """
        if self.mpp is None:
            raise InputError(f"{self.path}: does not say how many um a pixel is; give it with --mpp, for example 0.5")
        return self.mpp

    @cached_property
    def _pixels(self) -> np.ndarray:
        with _readable(self.path), _open_plain(self.path) as image:
            return np.asarray(_on_white(image))

    def read_region(self, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Pixels of a rectangle at full resolution, uint8 ``(height, width, 3)``; white outside the slide."""
        out = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
        x0, y0, x1, y1 = clipped_box(left, top, width, height, self.size_px)
        if x1 > x0 and y1 > y0:
            out[y0 - top : y1 - top, x0 - left : x1 - left] = self._read_inside(x0, y0, x1, y1)
        return out

    def _read_inside(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        if self._openslide is None:
            return self._pixels[y0:y1, x0:x1]
        with _readable(self.path):
            return np.asarray(_on_white(self._openslide.read_region((x0, y0), 0, (x1 - x0, y1 - y0))))

    def read_patch(self, x: float, y: float, size_px: int, shrink: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Read a square patch centred at (x, y).

        Parameters
        ----------
        x, y
            Centre in full-resolution pixels.
        size_px
            Side of the patch that is returned.
        shrink
            Full-resolution pixels per patch pixel; 1 is native. Other values are resampled by area averaging.

        Returns
        -------
        patch
            uint8 ``(size_px, size_px, 3)``.
        inside
            int32 ``(left, top, right, bottom)``, right and bottom exclusive: the part of the patch inside the slide.
        """
        side = round(size_px * shrink)
        left, top = round(x) - side // 2, round(y) - side // 2
        patch = self.read_region(left, top, side, side)
        x0, y0, x1, y1 = clipped_box(left, top, side, side, self.size_px)
        inside = np.clip([x0 - left, y0 - top, x1 - left, y1 - top], 0, side).astype(np.float64)
        if side != size_px:
            patch = np.asarray(Image.fromarray(patch).resize((size_px, size_px), Image.Resampling.BOX))
            inside = np.round(inside * size_px / side)
        return patch, inside.astype(np.int32)

    def thumbnail(self, longest_px: int) -> np.ndarray:
        """The whole slide, uint8 ``(h, w, 3)``, its longest side at most ``longest_px``."""
        shrink = max(1.0, max(self.size_px) / longest_px)
        size = max(1, round(self.size_px[0] / shrink)), max(1, round(self.size_px[1] / shrink))
        with _readable(self.path):
            if self._openslide is not None:
                return np.asarray(self._openslide.get_thumbnail(size).convert("RGB"))
            with _open_plain(self.path) as image:
                image.draft("RGB", size)  # JPEG decodes at 1/2, 1/4 or 1/8 at a fraction of the cost
                return np.asarray(_on_white(image).resize(size, Image.Resampling.BOX))


def clipped_box(left: int, top: int, width: int, height: int, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part (x0, y0, x1, y1) of a rectangle that lies inside an image of ``size_px``; empty boxes have x1 <= x0."""
    return max(left, 0), max(top, 0), min(left + width, size_px[0]), min(top + height, size_px[1])


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    flat = Image.new("RGB", image.size, (BACKGROUND,) * 3)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the imaging libraries raise on a damaged or foreign file into one line."""
    try:
        yield
    except (openslide.OpenSlideError, UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InputError(f"{path}: not a readable image ({error}); give an intact slide, JPEG, PNG or TIFF") from error


@contextmanager
def _open_plain(path: Path) -> Iterator[Image.Image]:
    # Pillow refuses from 179 megapixels on, which a large section photograph exceeds; the limit here is our own.
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: {image.width} x {image.height} px are too many to decode whole; convert it to a tiled "
                    "pyramid TIFF"
                )
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit
