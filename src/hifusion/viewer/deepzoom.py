"""A slide as square JPEG tiles of halving size, numbered as DeepZoom numbers them."""

import io
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from PIL import Image

from hifusion.errors import InputError
from hifusion.imagefile.contract import ImageFile, Level, Scale
from hifusion.slide import Slide

TILE_PX, OVERLAP_PX = 510, 1  # a tile with its overlap is 512 px wide: neighbours share a pixel, so no seam shows
OVERVIEW_PX = 4096  # levels up to this size are cut from one picture in memory: the first view needs nothing else
_QUALITY = 85


class TilePyramid:
    """Tiles of one slide, read as they are asked for, from one thread at a time.

    Level ``finest`` has the slide's pixels, or every ``shrink``-th of them; each level below it half as many, down to
    one pixel at level 0.

    Parameters
    ----------
    slide
        What is opened; it is opened again where :meth:`close` closed it.
    per_px
        Pixels of ``slide`` per full-resolution pixel of the section: 1, less for the small picture inside a section.
    most_px
        Longest side of the finest level; finer ones are left out.
    """

    def __init__(self, slide: "Slide | _Picture", per_px: float = 1.0, most_px: int | None = None) -> None:
        self._slide = slide
        self._reading, self._shrinking = threading.Lock(), threading.Lock()
        self._overview: dict[int, np.ndarray] = {}  # level -> all its pixels, up to OVERVIEW_PX
        longest = max(slide.size_px)
        self.shrink = 2 ** max(0, math.ceil(math.log2(longest / most_px))) if most_px else 1
        self.per_px = per_px / self.shrink
        self.size_px = self._shrunk(slide.size_px, self.shrink)
        self.finest = math.ceil(math.log2(max(self.size_px)))

    @staticmethod
    def _shrunk(size_px: tuple[int, int], by: int) -> tuple[int, int]:
        return math.ceil(size_px[0] / by), math.ceil(size_px[1] / by)

    def facts(self) -> dict[str, Any]:
        """What the page needs to ask for tiles and to lay spots over them."""
        width, height = self.size_px
        return {
            "width": width,
            "height": height,
            "finest": self.finest,
            "tile": TILE_PX,
            "overlap": OVERLAP_PX,
            "per_px": self.per_px,
        }

    def level_size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level."""
        return self._shrunk(self.size_px, 2 ** (self.finest - level))

    def grid(self, level: int) -> tuple[int, int]:
        """(columns, rows) of tiles of a level."""
        width, height = self.level_size(level)
        return math.ceil(width / TILE_PX), math.ceil(height / TILE_PX)

    def tile(self, level: int, column: int, row: int) -> bytes | None:
        """One tile as JPEG; None where there is no such tile.

        Raises
        ------
        InputError
            The slide is damaged there.
        """
        if not 0 <= level <= self.finest:
            return None
        columns, rows = self.grid(level)
        if not (0 <= column < columns and 0 <= row < rows):
            return None
        width, height = self.level_size(level)
        x0, y0 = max(0, column * TILE_PX - OVERLAP_PX), max(0, row * TILE_PX - OVERLAP_PX)
        x1, y1 = (min((n + 1) * TILE_PX + OVERLAP_PX, end) for n, end in ((column, width), (row, height)))
        if level <= self._overview_level:
            pixels = self._overview_of()[level][y0:y1, x0:x1]
        else:
            with self._reading:
                pixels = self._read(level, x0, y0, x1, y1)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
        return buffer.getvalue()

    def warm(self) -> None:
        """Make what the first view needs, so that nobody waits for it."""
        self._overview_of()

    def close(self) -> None:
        """Free the slide's pixels and its overview; both are read again when asked for."""
        with self._reading, self._shrinking:
            self._slide.close()
            self._overview = {}

    def _read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        by = self.shrink * 2 ** (self.finest - level)
        image, wanted = self._slide.image, (x1 - x0, y1 - y0)
        return image.read_area(image.level_for(by), x0 * by, y0 * by, wanted[0] * by, wanted[1] * by, wanted)

    @property
    def _overview_level(self) -> int:
        return min(self.finest, int(math.log2(OVERVIEW_PX)))

    def _overview_of(self) -> dict[int, np.ndarray]:
        """The levels that are kept in memory, made when first asked for: apart from the slide, which may be busy."""
        with self._shrinking:
            if not self._overview:
                level = self._overview_level
                size = self.level_size(level)
                levels = {level: self._slide.image.thumbnail(size)}
                for lower in range(level - 1, -1, -1):
                    picture = Image.fromarray(levels[lower + 1])
                    levels[lower] = np.asarray(picture.resize(self.level_size(lower), Image.Resampling.BOX))
                self._overview = levels
            return self._overview


def pyramid_of(section: AnnData, most_px: int | None = None) -> tuple[TilePyramid | None, str]:
    """Tiles of a section's slide, and what the page should say of them.

    Where the slide cannot be opened they are of the small picture inside the section; None where there is none either.
    """
    facts = section.uns["hifusion"]
    missing = "The section names no slide"
    if facts["image"]:
        path = Path(facts["image"])
        try:
            return TilePyramid(Slide(path), most_px=most_px), ""
        except InputError:  # moved, or on another machine; its folders are nobody else's business
            missing = f"The slide {path.name} cannot be opened here"
    entry = section.uns["spatial"].get(facts["section"], {})
    picture = entry.get("images", {}).get("hires")
    per_px = float(entry.get("scalefactors", {}).get("tissue_hires_scalef", 0.0))
    if picture is None or not per_px > 0:
        return None, f"{missing}: spots alone."
    pyramid = TilePyramid(_Picture(_as_rgb(np.asarray(picture))), per_px, most_px)
    return pyramid, f"{missing}: this is the small picture inside the section."


def _as_rgb(picture: np.ndarray) -> np.ndarray:
    """uint8 ``(h, w, 3)``; scanpy keeps some pictures as fractions of one."""
    if picture.dtype != np.uint8:
        picture = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(picture[..., :3])


class _Pixels(ImageFile):
    """Pixels in memory, behind the contract of image files."""

    reader, format, scale = "memory", "picture inside the section", Scale(None, "not a slide")

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__(Path("picture inside the section"))
        self._pixels = pixels
        self.levels = (Level((pixels.shape[1], pixels.shape[0])),)

    def read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        return self._pixels[y0:y1, x0:x1]

    def close(self) -> None:
        """Nothing to close."""


class _Picture:
    """What :class:`TilePyramid` needs of a slide, for the small picture inside a section."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.image = _Pixels(pixels)
        self.size_px = self.image.levels[0].size_px

    def close(self) -> None:
        """The pixels stay: they are small."""
