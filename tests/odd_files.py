"""Bytes of image files that are odd, broken or hostile, by name, and what is to be said of each."""

import io
import struct
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from fabricate_slides import APERIO, raw_tiff, smooth_pixels, write_pyramid

DAMAGED = "not a readable image"
PIXELS = smooth_pixels(400, 300)
GREY = PIXELS[..., 0].copy()
CHANNELS = np.stack([GREY] * 5)
NO_STRIPS = dict.fromkeys((273, 278, 279))
RGB_8 = (3, struct.pack("<3H", 8, 8, 8))


def _saved(kind: str, mode: str = "RGB", orientation: int | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    Image.fromarray(PIXELS).convert(mode).save(out, format=kind, **options)
    return out.getvalue()


def _tiff(pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, **{"photometric": "minisblack" if pixels.ndim == 2 else "rgb", **options})
    return out.getvalue()


def _ome(pixels: np.ndarray = PIXELS, axes: str = "YXS", **metadata: object) -> bytes:
    photometric = "rgb" if axes[-1] == "S" else "minisblack"
    return _tiff(pixels, ome=True, photometric=photometric, metadata={"axes": axes, **metadata})


def _ome_of(xml: bytes) -> bytes:
    """A grey picture whose description is this text."""
    return raw_tiff({270: (2, xml + b"\0")})


def _pyramid(folder: Path, **options: object) -> bytes:
    return write_pyramid(folder / "pyramid.tif", PIXELS, tile=64, **options).read_bytes()


def _png_of(width: int, height: int) -> bytes:
    """A PNG whose pixels end after the header."""
    parts = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG whose header states another size."""
    data = bytearray(_saved("JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _one_tile(compression: int, data: bytes, side: int = 256, tile: int = 256, **more: object) -> bytes:
    """A TIFF that holds one tile, whatever it says of its size."""
    tags = {256: side, 257: side, 258: RGB_8, 259: compression, 262: 2, 277: 3, 322: tile, 323: tile, 324: 4096}
    description = {270: (2, APERIO.format(mpp=0.5).encode() + b"\0")} if more.get("aperio") else {}
    return raw_tiff(NO_STRIPS | tags | description | {325: len(data)}, data)


def _chain(pages: int) -> bytes:
    """A TIFF of so many directories without tags, one leading to the next."""
    return b"II*\0\x08\0\0\0" + b"".join(struct.pack("<HI", 0, 14 + 6 * number) for number in range(pages))


def _counts(tag: int, count: int) -> bytes:
    """A TIFF that states another number of values of a tag."""
    return raw_tiff({}).replace(struct.pack("<HHI", tag, 4, 1), struct.pack("<HHI", tag, 4, count))


def _loop() -> bytes:
    """A TIFF whose only directory names itself as the next one."""
    data = bytearray(raw_tiff({}))
    end = 10 + 12 * struct.unpack_from("<H", data, 8)[0]
    data[end : end + 4] = struct.pack("<I", 8)
    return bytes(data)


def _entities(depth: int) -> bytes:
    """OME-XML that would be a hundred times as long with each entity in it written out."""
    entities = [b'<!ENTITY e0 "0123456789">']
    entities += [b'<!ENTITY e%d "%b">' % (number, b"&e%d;" % (number - 1) * 100) for number in range(1, depth)]
    return b'<?xml version="1.0"?><!DOCTYPE OME [' + b"".join(entities) + b"]><OME>&e%d;</OME>" % (depth - 1)


def refused_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """File name -> (bytes, words of the one line that refuses it)."""
    deep = PIXELS.astype(np.uint16) * 16
    jp2 = imagecodecs.jpeg2k_encode(np.zeros((2000, 2000, 3), np.uint8), codecformat="j2k")
    aperio = _pyramid(folder, description=APERIO.format(mpp=0.5), compression="jpeg")
    whole = {
        "jpg": (_saved("JPEG"), (1, 10, 200, 700, 3000)),
        "png": (_saved("PNG"), (4, 20, 40, 3000)),
        "deflate.tif": (_tiff(compression="deflate"), (4, 8, 100, 300, 3000)),
        "raw.tif": (_tiff(), (300, 300000)),
        "pyramid.tif": (_pyramid(folder), (16, 500, 10000)),
        "svs": (aperio, (16, 300, 2000, len(aperio) // 2)),
    }
    cut = {f"cut-{kind}-at-{end}": (data[:end], DAMAGED) for kind, (data, ends) in whole.items() for end in ends}
    foreign = {
        "empty.jpg": (b"", "it is empty"),
        "empty.svs": (b"", "it is empty"),
        "words.svs": (b"not an image, but a few words\n" * 100, DAMAGED),
        "zeros.tif": (bytes(10000), DAMAGED),
        "page.pdf": (b"%PDF-1.7\n" + bytes(2000), DAMAGED),
        "moving.gif": (_saved("GIF"), DAMAGED),
        "drawing.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", DAMAGED),
    }
    other_pixels = {
        "print.jpg": (_saved("JPEG", "CMYK"), "CMYK"),
        "print.tif": (_saved("TIFF", "CMYK"), "SEPARATED"),
        "lab.tif": (_saved("TIFF", "LAB"), "CIELAB"),
        "ink.png": (_saved("PNG", "1"), "1 bit"),
        "ink.tif": (_tiff(GREY > 100), "1 bit"),
        "fax.tif": (_saved("TIFF", "1", compression="group4"), "1 bit"),
        "deep-grey.png": (imagecodecs.png_encode(deep[..., 0].copy()), "16-bit"),
        "deep-rgb.png": (imagecodecs.png_encode(deep), "16-bit"),
        "deep-grey.tif": (_tiff(deep[..., 0]), "16-bit"),
        "deep-rgb.tif": (_tiff(deep, tile=(64, 64)), "16-bit"),
        "float.tif": (_tiff(GREY.astype(np.float32)), "floating-point"),
        "float-rgb.tif": (_tiff(PIXELS.astype(np.float32)), "floating-point"),
        "labels.tif": (_tiff(GREY.astype(np.uint32)), "32-bit"),
        "two.tif": (_tiff(PIXELS[..., :2], photometric="minisblack", planarconfig="contig"), "2 channels"),
        "five.tif": (_tiff(CHANNELS, photometric="minisblack", planarconfig="separate"), "5 channels"),
        "five.ome.tif": (_ome(CHANNELS, "CYX"), "5 channels stored apart"),
        "apart.ome.tif": (_ome(CHANNELS[:3], "CYX"), "3 channels stored apart"),
        "focus.ome.tif": (_ome(np.stack([PIXELS] * 4), "ZYXS"), "a stack of 4 images"),
        "stack.tif": (_tiff(np.stack([PIXELS] * 3)), "a stack of 3 images"),
        "turned.jpg": (_saved("JPEG", orientation=6), "orientation tag 6"),
        "turned.png": (_saved("PNG", orientation=3), "orientation tag 3"),
        "turned.tif": (raw_tiff({274: 8}), "orientation tag 8"),
        "turned-somehow.tif": (raw_tiff({274: 77}), "orientation tag 77"),
    }
    vast = {
        "vast.png": (_png_of(2**31 - 1, 2**31 - 1), "2147483647 x 2147483647 px are too many"),
        "vast.jpg": (_jpeg_of(65535, 65535), "65535 x 65535 px are too many"),
        "promising.png": (_png_of(32000, 32000), "it states 32000 x 32000 px and holds"),
        "promising.jpg": (_jpeg_of(32000, 32000), "it states 32000 x 32000 px and holds"),
        "vast.tif": (raw_tiff({256: 2**31, 257: 2**31}), DAMAGED),
        "long.tif": (raw_tiff({256: 1, 257: 2**30, 278: 2**30}), "it states 1 x 1073741824 px"),
        "vast-strip.tif": (raw_tiff({256: 2**15, 257: 2**17, 278: 2**17, 259: 5}), "more than 256 MB"),
        "many-tiles.tif": (_one_tile(1, bytes(99), side=2**31), "it names 1"),
        "vast-tile.tif": (_one_tile(8, bytes(99), side=2**20, tile=2**20), "more than 256 MB"),
        "vast-tile.svs": (_one_tile(7, bytes(99), side=2**16, tile=2**16, aperio=True), "more than 256 MB"),
        "jpeg-bomb.tif": (_one_tile(7, _jpeg_of(60000, 60000)), DAMAGED),
        "jpeg2000-bomb.tif": (_one_tile(34712, jp2), "states 2000 x 2000 px"),
        "zstd-bomb.tif": (_one_tile(50000, imagecodecs.zstd_encode(bytes(2**28))), DAMAGED),
        "many-pages.tif": (_chain(300_000), "more than 4096 pages"),
        "vast-tag.tif": (_counts(273, 2**31), DAMAGED),
    }
    wrong = {
        "lzw-rubbish.tif": (_one_tile(5, b"\xff\x80\x12" * 900), DAMAGED),
        "zstd-rubbish.tif": (_one_tile(50000, b"\xff\x80\x12" * 900), DAMAGED),
        "jpeg-rubbish.tif": (_one_tile(7, b"\xff\x80\x12" * 900), DAMAGED),
        "jpeg-rubbish.svs": (_one_tile(7, b"\xff\x80\x12" * 900, aperio=True), DAMAGED),
        "no-tags.tif": (b"II*\0" + struct.pack("<IHI", 8, 0, 0), DAMAGED),
        "endless-tags.tif": (b"II*\0" + struct.pack("<IH", 8, 65535) + b"\x01" * 70000, DAMAGED),
        "loop.tif": (_loop(), "more than 4096 pages"),
        "no-rows.tif": (raw_tiff({278: 0}), DAMAGED),
        "no-width.tif": (raw_tiff({256: 0}), DAMAGED),
        "no-tile.tif": (_one_tile(1, bytes(99), tile=0), DAMAGED),
        "no-bits.tif": (raw_tiff({258: 0}), "cannot be used"),
        "many-samples.tif": (raw_tiff({277: 60000}), "cannot be used"),
        "odd-compression.tif": (raw_tiff({259: 12345}), "compressed by number 12345"),
        "odd-colour.tif": (raw_tiff({262: 12345}), "colour kind number 12345"),
        "strip-beyond.tif": (raw_tiff({273: 2**31}), DAMAGED),
        "strip-endless.tif": (raw_tiff({259: 8, 279: 2**32 - 1}), DAMAGED),
    }
    return cut | foreign | other_pixels | vast | wrong


def taken_files(folder: Path) -> dict[str, tuple[bytes, float | None, str]]:
    """File name -> (bytes, um per pixel, words of where that is from or why there is none)."""
    um = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    pixels = b'<Pixels SizeX="16" SizeY="16" PhysicalSizeX="%b" PhysicalSizeY="0.5"/>'
    return {
        "whole.jpg": (_saved("JPEG", dpi=(300, 300)), None, "a JPEG has at most the dpi of a print"),
        "whole.png": (_saved("PNG", dpi=(300, 300)), None, "a PNG has at most the dpi of a print"),
        "upright.jpg": (_saved("JPEG", orientation=1), None, "a JPEG"),
        "grey.jpg": (_saved("JPEG", "L"), None, "a JPEG"),
        "progressive.jpg": (_saved("JPEG", progressive=True), None, "a JPEG"),
        "palette.png": (_saved("PNG", "P"), None, "a PNG"),
        "alpha.png": (_saved("PNG", "RGBA"), None, "a PNG"),
        "pixel.png": (imagecodecs.png_encode(PIXELS[:1, :1].copy()), None, "a PNG"),
        "pixel.jpg": (imagecodecs.jpeg8_encode(PIXELS[:1, :1].copy()), None, "a JPEG"),
        "pixel.tif": (_tiff(PIXELS[:1, :1]), None, "not in the file"),
        "line.tif": (_tiff(PIXELS[:1]), None, "not in the file"),
        "pillow.tif": (_saved("TIFF", dpi=(72, 72)), None, "the 72 dpi"),
        "lzw.tif": (_saved("TIFF", compression="tiff_lzw"), None, "not in the file"),
        "scan.tif": (_tiff(resolution=(20000, 20000), resolutionunit="CENTIMETER"), 0.5, "TIFF resolution tags"),
        "print.tif": (_tiff(resolution=(28.346, 28.346), resolutionunit="CENTIMETER"), None, "352.8 um, the 72 dpi"),
        "stretched.tif": (_tiff(resolution=(20000, 10000), resolutionunit="CENTIMETER"), None, "not square"),
        "zero-over-zero.tif": (raw_tiff({282: (5, bytes(8)), 283: (5, bytes(8)), 296: 3}), None, "no size of a pixel"),
        "scan.svs": (_pyramid(folder, description=APERIO.format(mpp=0.25)), 0.25, "openslide.mpp"),
        "unscaled.svs": (_pyramid(folder, description=APERIO.split("|MPP")[0], mpp=None), None, "not in the slide"),
        "zero.svs": (_pyramid(folder, description=APERIO.format(mpp=0)), None, "no size of a pixel"),
        "nan.svs": (_pyramid(folder, description=APERIO.format(mpp="nan")), None, "not in the slide"),
        "negative.svs": (_pyramid(folder, description=APERIO.format(mpp=-0.5)), None, "no size of a pixel"),
        "words.svs": (_pyramid(folder, description=APERIO.format(mpp="half")), None, "not in the slide"),
        "scan.ome.tif": (_ome(**um), 0.25, "OME-XML"),
        "nan.ome.tif": (_ome_of(b"<OME>" + pixels % b"NaN" + b"</OME>"), None, "no size of a pixel"),
        "words.ome.tif": (_ome_of(b"<OME>" + pixels % b"half" + b"</OME>"), None, "no size of a pixel"),
        "broken.ome.tif": (_ome_of(b"<?xml <OME><Pixels </OME>"), None, "not in the file"),
        "entities.ome.tif": (_ome_of(_entities(5)), None, "not in the file"),
        "own-child.tif": (raw_tiff({330: (13, struct.pack("<I", 8))}), None, "not in the file"),
    }
