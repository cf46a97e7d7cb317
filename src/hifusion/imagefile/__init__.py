"""Image files of tissue, one reader per family of formats, all under one contract (`contract.ImageFile`)."""

from pathlib import Path

import openslide

from hifusion.errors import InputError
from hifusion.imagefile.contract import ImageFile, readable
from hifusion.imagefile.openslide_file import OpenSlideFile
from hifusion.imagefile.plain_file import PlainFile
from hifusion.imagefile.tiff_file import TiffFile

_GENERIC = "generic-tiff"  # OpenSlide's word for any tiled TIFF: of those it misses SubIFDs, OME-XML and odd pixels
MAX_SIDE_PX = 2**21  # half a metre of 0.25 um pixels
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_image(path: Path) -> ImageFile:
    """The opened image file, by the reader that its content asks for; the name's ending does not matter.

    Raises
    ------
    InputError
        It is missing, empty, damaged, or of a kind that no reader takes.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give the path of a slide file")
    if not path.is_file():
        raise InputError(f"{path}: no such image; give the path of a slide file")
    with readable(path):
        with path.open("rb") as file:
            head = file.read(4)
        vendor = openslide.OpenSlide.detect_format(str(path))
    if not head:
        raise InputError(f"{path}: not a readable image (it is empty); give an intact slide, TIFF, JPEG or PNG")
    image: ImageFile
    if vendor not in (None, _GENERIC):
        image = OpenSlideFile(path, vendor)
    else:
        image = TiffFile(path) if head in _TIFF_HEADS else PlainFile(path)
    width, height = image.levels[0].size_px
    if max(width, height) > MAX_SIDE_PX:
        image.close()
        raise InputError(f"{path}: not a readable image (it states {width} x {height} px); give an intact slide")
    return image
