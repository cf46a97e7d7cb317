"""Open a slide, know its size and scale, read a patch centred at (x, y)."""

import copy
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from hifusion.errors import InputError
from hifusion.imagefile import ImageFile, open_image
from hifusion.imagefile.contract import BACKGROUND, MAX_MPP, MAX_PIXELS
from hifusion.imagefile.held import HeldPart

__all__ = ["BACKGROUND", "MAX_MPP", "MAX_PIXELS", "Slide", "clipped_box"]

_GIVEN_MPP = (0.01, 100.0)  # um per pixel: no light microscope sees finer, and a spot is a pixel where it is coarser
_PROBE_PX = 64
_WORTH_HOLDING = 0.7  # pixels of a rectangle around patches, of those in all patches
_MOST_HELD = 2**25  # pixels
_PROBE_THUMBNAIL_PX = 256


class Slide:
    """An image file of tissue, behind one way of reading it.

    Whole-slide formats and tiled TIFFs are read piecewise; JPEG and PNG are decoded whole, when first read. What is
    transparent in a file is white here.

    A slide can be pickled and used in other processes and threads: each process opens the file for itself when it
    first reads. Used in a ``with`` statement it is closed at the end; reading it again opens it again.

    Attributes
    ----------
    path
        The file.
    size_px
        (width, height) at full resolution.
    mpp
        um per full-resolution pixel: what was given, else as the file's own metadata say, or None. A dpi tag is not a
        scale.
    mpp_source
        Where ``mpp`` comes from, or why there is none.
    """

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.path = Path(path)
        if mpp is not None and not _GIVEN_MPP[0] <= mpp <= _GIVEN_MPP[1]:
            raise InputError(
                f"{self.path}: --mpp {mpp:g} cannot be the um of a pixel; give {_GIVEN_MPP[0]:g} to {_GIVEN_MPP[1]:g}, "
                "for example 0.5"
            )
        image = self._open()
        self.size_px: tuple[int, int] = image.levels[0].size_px
        self.mpp: float | None = mpp or image.scale.mpp
        self.mpp_source: str = "given (--mpp)" if mpp else image.scale.source

    def _open(self) -> ImageFile:
        self._image: ImageFile | None = open_image(self.path)
        self._opened_by = os.getpid()
        return self._image

    @property
    def image(self) -> ImageFile:
        """The opened file. A process forked from another opens its own: they would move each other's place in it."""
        return self._image if self._image is not None and self._opened_by == os.getpid() else self._open()

    def close(self) -> None:
        """Close the file and free its pixels."""
        if self._image is not None:
            self._image.close()
            self._image = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_image": None}

    def require_mpp(self) -> float:
        """um per full-resolution pixel.

        Raises
        ------
        InputError
            The file does not say it and none was given.
        """
        if self.mpp is None:
            raise InputError(
                f"{self.path}: does not say how many um a pixel is ({self.mpp_source}); give it with --mpp, for "
                "example 0.5"
            )
        return self.mpp

    def facts(self) -> dict[str, Any]:
        """What the file is, as plain values, after having read a part of its middle and a thumbnail.

        Raises
        ------
        InputError
            It cannot be read.
        """
        image, (width, height) = self.image, self.size_px
        self.read_patch(width / 2, height / 2, _PROBE_PX)
        self.thumbnail(_PROBE_THUMBNAIL_PX)
        return {
            "kind": "slide",
            "format": image.format,
            "reader": image.reader,
            "size_px": [width, height],
            "size_mm": None if self.mpp is None else [round(side * self.mpp / 1000, 3) for side in self.size_px],
            "mpp": self.mpp,
            "mpp_source": self.mpp_source,
            "levels": [
                {"size_px": list(level.size_px), "shrink": round(sum(level.shrink) / 2, 3)} for level in image.levels
            ],
            "associated_images": list(image.associated),
        }

    def read_region(self, left: int, top: int, width: int, height: int) -> np.ndarray:
        """Pixels of a rectangle at full resolution, uint8 ``(height, width, 3)``; white outside the slide.

        Raises
        ------
        InputError
            The file is damaged there, or the rectangle is beyond ``MAX_PIXELS``.
        """
        if width * height > MAX_PIXELS:
            raise InputError(f"{self.path}: a region of {width} x {height} px is too large to read at once; read parts")
        out = np.full((height, width, 3), BACKGROUND, dtype=np.uint8)
        x0, y0, x1, y1 = clipped_box(left, top, width, height, self.size_px)
        if x1 > x0 and y1 > y0:
            out[y0 - top : y1 - top, x0 - left : x1 - left] = self.image.read(0, x0, y0, x1, y1)
        return out

    def read_patch(self, x: float, y: float, size_px: int, shrink: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Read a square patch centred at (x, y).

        Parameters
        ----------
        x, y
            Centre in full-resolution pixels.
        size_px
            Side of the patch that is returned.
        shrink
            Full-resolution pixels per patch pixel; 1 is native. Other values are resampled by area averaging, from the
            coarsest level of the file that holds all that the patch can show.

        Returns
        -------
        patch
            uint8 ``(size_px, size_px, 3)``.
        inside
            int32 ``(left, top, right, bottom)``, right and bottom exclusive: the part of the patch inside the slide.
        """
        side = round(size_px * shrink)
        left, top = round(x) - side // 2, round(y) - side // 2
        x0, y0, x1, y1 = clipped_box(left, top, side, side, self.size_px)
        inside = np.clip([x0 - left, y0 - top, x1 - left, y1 - top], 0, side).astype(np.float64)
        level = self.image.sharp_level_for(side / size_px, left, top)
        if level or (side > size_px and side % size_px):  # Pillow's box filter takes whole pixels only
            patch = self.image.read_area(level, left, top, side, side, (size_px, size_px))
        else:
            patch = self.read_region(left, top, side, side)
            if side != size_px:
                patch = np.asarray(Image.fromarray(patch).resize((size_px, size_px), Image.Resampling.BOX))
        if side != size_px:
            inside = np.round(inside * size_px / side)
        return patch, inside.astype(np.int32)

    def read_patches(self, centres_px: np.ndarray, size_px: int, shrink: float = 1.0) -> np.ndarray:
        """Square patches as :meth:`read_patch` gives them, uint8 ``(N, size_px, size_px, 3)``.

        Where they overlap, what they cover together is decoded once.

        Parameters
        ----------
        centres_px
            (x, y) in full-resolution pixels, ``(N, 2)``.
        """
        side = round(size_px * shrink)
        corners = np.array([(round(x) - side // 2, round(y) - side // 2) for x, y in centres_px])
        (left, top), (right, bottom) = corners.min(axis=0).tolist(), (corners.max(axis=0) + side).tolist()
        x0, y0, x1, y1 = clipped_box(left, top, right - left, bottom - top, self.size_px)
        together = max(x1 - x0, 0) * max(y1 - y0, 0)
        finest = not any(self.image.sharp_level_for(side / size_px, *corner) for corner in corners.tolist())
        slide = self
        if finest and 0 < together < min(len(corners) * side**2 * _WORTH_HOLDING, _MOST_HELD):
            with suppress(InputError):  # damage between the patches is nobody's
                held = HeldPart(self.image, (x0, y0, x1, y1))
                slide = copy.copy(self)
                slide._image = held
        return np.stack([slide.read_patch(x, y, size_px, shrink)[0] for x, y in centres_px])

    def thumbnail(self, longest_px: int) -> np.ndarray:
        """The whole slide, uint8 ``(h, w, 3)``, its longest side at most ``longest_px``."""
        shrink = max(1.0, max(self.size_px) / longest_px)
        size = max(1, round(self.size_px[0] / shrink)), max(1, round(self.size_px[1] / shrink))
        return self.image.thumbnail(size)


def clipped_box(left: int, top: int, width: int, height: int, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part (x0, y0, x1, y1) of a rectangle that lies inside an image of ``size_px``; empty boxes have x1 <= x0."""
    return max(left, 0), max(top, 0), min(left + width, size_px[0]), min(top + height, size_px[1])
