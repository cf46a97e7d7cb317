"""What the tags and the OME-XML of a TIFF say: which of its pictures is the slide, its scale, what cannot be used."""

import math
from pathlib import Path
from xml.etree import ElementTree

import tifffile
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, PLANARCONFIG, PREDICTOR, RESUNIT

from hifusion.errors import InputError
from hifusion.imagefile.contract import (
    BILEVEL,
    DEEP,
    MAX_PIECE_BYTES,
    Level,
    Scale,
    level_shrink,
    refusal,
    refuse_turned,
    usable_scale,
)

# um per unit. OME's default is µm, with the micro sign; ImageJ may escape it; others write the Greek letter.
_UNITS_UM = {"m": 1e6, "cm": 1e4, "mm": 1e3, "nm": 1e-3, "Å": 1e-4}
_UNITS_UM |= dict.fromkeys(("µm", "μm", "um", "micron", "microns", "\\u00B5m"), 1.0)
_TAG_UNITS_UM = {RESUNIT.INCH: 25400.0, RESUNIT.CENTIMETER: 10000.0, RESUNIT.MILLIMETER: 1000.0}
_COMPRESSIONS = {
    *(COMPRESSION.NONE, COMPRESSION.LZW, COMPRESSION.ADOBE_DEFLATE, COMPRESSION.DEFLATE, COMPRESSION.PACKBITS),
    *(COMPRESSION.ZSTD, COMPRESSION.ZSTD_DEPRECATED, COMPRESSION.WEBP, COMPRESSION.JPEG),
    *(COMPRESSION.JPEG2000, COMPRESSION.JPEG_2000_LOSSY, COMPRESSION.APERIO_JP2000_RGB),
}
_SAMPLES: dict[int, tuple[int, ...]] = {
    PHOTOMETRIC.RGB: (3, 4),
    PHOTOMETRIC.YCBCR: (3,),
    PHOTOMETRIC.MINISBLACK: (1, 2),
    PHOTOMETRIC.MINISWHITE: (1, 2),
    PHOTOMETRIC.PALETTE: (1,),
}


def main_series(path: Path, tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """The largest picture of the file, the first of equals.

    Raises
    ------
    InputError
        It is a stack, or its colours are channels of their own.
    """
    pictures = [series for series in tiff.series if {"Y", "X"} <= set(series.axes) and series[0] is not None]
    if not pictures:
        raise InputError(f"{path}: not a readable image (it holds no picture); give an intact slide, TIFF, JPEG or PNG")
    series = max(pictures, key=lambda one: one.sizes["height"] * one.sizes["width"])
    for axis, length in zip(series.axes, series.shape, strict=True):
        if axis == "C" and length > 1:
            raise refusal(
                path, f"of {length} channels stored apart, as fluorescence is,", "write a stained section as RGB"
            )
        if axis not in "YXS" and length > 1:
            raise refusal(path, f"a stack of {length} images", "save the one that is the section")
    return series


def levels_of(tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> list[tuple[tifffile.TiffPage, Level]]:
    """The page of a series and all that show the same at a whole fraction of its size, the largest first.

    Only SubIFDs and pages that are called reduced count. The levels of tifffile would not do: it takes what shrinks
    by the same factor each, where many slides go 1, 4, 16, 32, and any page of such a size, be it a label.
    """
    full = _page(series)
    levels = {_size(full): (full, Level(_size(full)))}
    for other in (level for one in tiff.series for level in one.levels if len(level) == 1 and level[0] is not None):
        page = _page(other)
        reduced = (page.is_reduced or page.is_subifd) and not page.is_mask
        alike = (page.samplesperpixel, page.photometric) == (full.samplesperpixel, full.photometric)
        shrink = level_shrink(_size(full), _size(page))
        if reduced and alike and shrink:
            levels.setdefault(_size(page), (page, Level(_size(page), shrink)))
    return [levels[size] for size in sorted(levels, reverse=True)]


def _page(series: tifffile.TiffPageSeries) -> tifffile.TiffPage:
    page = series[0]
    assert page is not None  # those without were left out
    return page if isinstance(page, tifffile.TiffPage) else page.aspage()


def _size(page: tifffile.TiffPage) -> tuple[int, int]:
    return page.imagewidth, page.imagelength


def refuse_pixels(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    """Refuse a page whose pixels are no colours of 8 bits, cannot be decoded, or are not all there.

    Raises
    ------
    InputError
        Names what the page is.
    """
    if page.dtype != "uint8" or page.bitspersample != 8:
        kinds = {"bool": BILEVEL, "uint16": DEEP, "int16": DEEP}
        name = str(page.dtype)
        bits = page.bitspersample
        raise refusal(path, kinds.get(name, "of floating-point values" if "float" in name else f"of {bits}-bit values"))
    alpha = bool(page.extrasamples) and page.extrasamples[0] != EXTRASAMPLE.UNSPECIFIED
    samples, kind = page.samplesperpixel, page.photometric
    if samples > 4 or (kind in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE) and samples > 1 + alpha):
        raise refusal(path, f"of {samples} channels, as fluorescence is,", "write a stained section as RGB")
    if samples not in _SAMPLES.get(kind, ()):
        raise refusal(path, f"of colour kind {_name(PHOTOMETRIC, kind)} with {samples} samples")
    jpeg = page.compression == COMPRESSION.JPEG
    if kind == PHOTOMETRIC.YCBCR and (not jpeg or page.planarconfig == PLANARCONFIG.SEPARATE):
        raise refusal(path, "YCbCr without JPEG compression")
    if page.compression not in _COMPRESSIONS:
        raise refusal(
            path, f"compressed by {_name(COMPRESSION, page.compression)}", "save it with LZW, deflate or JPEG"
        )
    if page.predictor not in (PREDICTOR.NONE, PREDICTOR.HORIZONTAL):
        raise refusal(path, f"stored with predictor {page.predictor:d}", "save it with LZW, deflate or JPEG")
    if page.imagedepth > 1:
        raise refusal(path, f"a stack of {page.imagedepth} images", "save the one that is the section")
    refuse_turned(path, page.tags.valueof("Orientation", 1))
    _refuse_pieces(path, tiff, page)


def _refuse_pieces(path: Path, tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> None:
    if page.parent is not tiff:
        raise refusal(path, "a file whose pixels lie in another one", "save the image in one file")
    height, width, samples = piece_shape(page)
    if min(height, width, page.imagelength, page.imagewidth) < 1:
        raise InputError(f"{path}: not a readable image (it has no pixels); give an intact slide, TIFF, JPEG or PNG")
    if height * width * samples > MAX_PIECE_BYTES and not has_plain_rows(page):
        raise InputError(
            f"{path}: has tiles or strips of {width} x {height} px, more than {MAX_PIECE_BYTES >> 20} MB each; convert "
            "it to a pyramid TIFF with tiles of 256 or 512 px"
        )
    wanted = math.ceil(page.imagelength / height) * math.ceil(page.imagewidth / width) * n_planes(page)
    given = min(len(page.dataoffsets), len(page.databytecounts))
    if given < wanted:
        raise InputError(
            f"{path}: not a readable image (of the {wanted} pieces of {page.imagewidth} x {page.imagelength} px it "
            f"names {given}); give an intact slide"
        )


def n_planes(page: tifffile.TiffPage) -> int:
    """How many images of one sample the pixels are split into."""
    return page.samplesperpixel if page.planarconfig == PLANARCONFIG.SEPARATE else 1


def piece_shape(page: tifffile.TiffPage) -> tuple[int, int, int]:
    """(height, width, samples) of a tile or strip as it is decoded."""
    samples = page.samplesperpixel // n_planes(page)
    if page.is_tiled:
        return page.tilelength, page.tilewidth, samples
    return min(page.rowsperstrip, page.imagelength), page.imagewidth, samples


def has_plain_rows(page: tifffile.TiffPage) -> bool:
    """Whether pixels stand in the file as they are, row after row, so that any part of a strip can be read alone."""
    stored = page.compression == COMPRESSION.NONE and page.predictor == 1 and page.fillorder == 1
    return stored and not page.is_tiled and all(page.dataoffsets)


def scale_of(tiff: tifffile.TiffFile, page: tifffile.TiffPage) -> Scale:
    """um per pixel from OME-XML, ImageJ's description or the resolution tags, whichever comes first."""
    if tiff.ome_metadata:
        scale = _ome_scale(tiff.ome_metadata, page)
        if scale is not None:
            return scale
    resolution = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    if resolution[0] is None or resolution[1] is None:
        return Scale(None, "not in the file")
    unit_um, source = _TAG_UNITS_UM.get(page.tags.valueof("ResolutionUnit", RESUNIT.INCH)), "TIFF resolution tags"
    imagej_unit = (tiff.imagej_metadata or {}).get("unit")
    if imagej_unit in _UNITS_UM:
        unit_um, source = _UNITS_UM[imagej_unit], f"ImageJ's resolution in {imagej_unit}"
    if unit_um is None:
        return Scale(None, "not in the file")
    x, y = (unit_um * below / above if above else math.inf for above, below in resolution)
    return usable_scale(x, y, source)


def _ome_scale(xml: str, page: tifffile.TiffPage) -> Scale | None:
    """The physical size of the OME image that is as large as the page; None where there is none."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    size = str(page.imagewidth), str(page.imagelength)
    for pixels in root.iterfind(".//{*}Pixels"):
        if (pixels.get("SizeX"), pixels.get("SizeY")) == size and pixels.get("PhysicalSizeX"):
            units = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "XY"]
            unknown = [unit for unit in units if unit not in _UNITS_UM]
            if unknown:
                return Scale(None, f"OME-XML gives the pixel's size in {unknown[0]}, which is no length")
            x = pixels.get("PhysicalSizeX", "")
            x_um, y_um = (
                _number(text) * _UNITS_UM[unit]
                for text, unit in zip((x, pixels.get("PhysicalSizeY", x)), units, strict=True)
            )
            return usable_scale(x_um, y_um, "OME-XML PhysicalSizeX")
    return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _name(kind: type[COMPRESSION] | type[PHOTOMETRIC], value: int) -> str:
    return kind(value).name if value in set(kind) else f"number {value}"
