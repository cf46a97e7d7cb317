"""A part of an image held in memory, for patches that overlap."""

from typing import ClassVar

import numpy as np

from hifusion.imagefile.contract import ImageFile


class HeldPart(ImageFile):
    """An image of which a rectangle of the finest level was read ahead; everything else is read when asked for.

    Parameters
    ----------
    box
        (x0, y0, x1, y1), inside the image.
    """

    reader: ClassVar[str] = "memory"

    def __init__(self, image: ImageFile, box: tuple[int, int, int, int]) -> None:
        super().__init__(image.path)
        self.format, self.levels, self.scale = image.format, image.levels, image.scale
        self._image, self._box, self._pixels = image, box, image.read(0, *box)

    def read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels of a rectangle inside a level; see :meth:`ImageFile.read`."""
        left, top, right, bottom = self._box
        if level == 0 and left <= x0 and top <= y0 and x1 <= right and y1 <= bottom:
            return self._pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        return self._image.read(level, x0, y0, x1, y1)

    def close(self) -> None:
        """Nothing: the image is another's to close."""
