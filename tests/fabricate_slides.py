"""Slides made by code: pyramids of any size written with flat memory, and TIFFs tag by tag, however wrong."""

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

APERIO = "Aperio Image Library v1\r\n64x64 |AppMag = 20|MPP = {mpp}"

# A tile at (left, top) full-resolution pixels, `shrink` of them per pixel: uint8 (tile, tile, 3), or None where all of
# it is white.
Paint = Callable[[int, int, int], np.ndarray | None]


def smooth_pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured uint8 ``(height, width, 3)`` picture, never white."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (17 + c) + seed) + np.cos(y / (23 - c)) for c in range(3)]
    return (np.stack(waves, axis=-1) * 50 + 120).astype(np.uint8)


def shrunk(pixels: np.ndarray, by: int, fill_up: bool = False) -> np.ndarray:
    """Exact area averages of ``by`` x ``by`` blocks, halves rounded up; what does not divide is dropped or repeated."""
    height, width = pixels.shape[:2]
    if fill_up:
        pixels = np.pad(pixels, ((0, -height % by), (0, -width % by), (0, 0)), mode="edge")
    height, width = (side // by for side in pixels.shape[:2])
    blocks = pixels[: height * by, : width * by].reshape(height, by, width, by, -1)
    return np.floor(blocks.mean(axis=(1, 3)) + 0.5).astype(np.uint8)


def write_pyramid(
    path: Path,
    pixels: np.ndarray | Paint,
    *,
    size_px: tuple[int, int] | None = None,
    tile: int = 256,
    levels: int = 3,
    factor: int = 2,
    mpp: float | None = 0.5,
    compression: str | None = "zstd",
    subifds: bool = False,
    description: str | None = None,
) -> Path:
    """Write a tiled BigTIFF pyramid; gives ``path``.

    Parameters
    ----------
    pixels
        uint8 ``(height, width, 3)``, of which coarser levels are exact area averages, or a function that paints one
        tile: memory then stays flat, and tiles it leaves white cost a few bytes each.
    size_px
        (width, height) where ``pixels`` is a function.
    compression
        "zstd", "zlib", "lzw", "jpeg2k", "jpeg" (quality 90) or None.
    subifds
        Coarser levels as SubIFDs of the first page, instead of as pages of their own.
    description
        The first page's ImageDescription: `APERIO` makes an Aperio slide of it.
    """
    if isinstance(pixels, np.ndarray):
        size_px = pixels.shape[1], pixels.shape[0]
        pixels = _painter(pixels, tile, [factor**level for level in range(levels)])
    assert size_px is not None
    white = _encoded(np.full((tile, tile, 3), 255, dtype=np.uint8), compression)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in range(levels):
            shrink = factor**level
            width, height = (max(1, side // shrink) for side in size_px)
            tiff.write(
                _tiles(pixels, width, height, tile, shrink, compression, white),
                shape=(height, width, 3),
                dtype=np.uint8,
                tile=(tile, tile),
                photometric="ycbcr" if compression == "jpeg" else "rgb",
                subsampling=(2, 2) if compression == "jpeg" else None,
                compression={"zlib": "deflate", "jpeg2k": "jpeg2000"}.get(compression or "", compression),
                resolution=None if mpp is None else (10000 / mpp / shrink,) * 2,
                resolutionunit=None if mpp is None else "CENTIMETER",
                subifds=levels - 1 if subifds and level == 0 else None,
                subfiletype=int(level > 0),
                description=description if level == 0 else None,
                metadata=None,
            )
    return path


def tissue_painter(
    size_px: tuple[int, int], tile: int, tissue_px: int = 8000, texture: np.ndarray | None = None
) -> Paint:
    """A slide that is white but for a disc so wide in its middle, each tile of it ``texture``; levels agree but for
    that."""
    if texture is None:
        texture = smooth_pixels(tile, tile) // 16 * 16  # in steps, so that it compresses
    radius = tissue_px / 2

    def paint(left: int, top: int, shrink: int) -> np.ndarray | None:
        x = left + (np.arange(tile) + 0.5) * shrink - size_px[0] / 2
        y = top + (np.arange(tile) + 0.5) * shrink - size_px[1] / 2
        if np.abs(x).min() > radius or np.abs(y).min() > radius:
            return None
        inside = np.hypot(x[None, :], y[:, None]) < radius
        return texture if inside.all() else np.where(inside[..., None], texture, np.uint8(255))

    return paint


def _painter(pixels: np.ndarray, tile: int, shrinks: list[int]) -> Paint:
    pictures = {shrink: shrunk(pixels, shrink) for shrink in shrinks}

    def paint(left: int, top: int, shrink: int) -> np.ndarray:
        there = pictures[shrink][top // shrink :, left // shrink :][:tile, :tile]
        spare = [(0, tile - there.shape[0]), (0, tile - there.shape[1]), (0, 0)]
        return np.pad(there, spare, constant_values=255)

    return paint


def _tiles(
    paint: Paint, width: int, height: int, tile: int, shrink: int, compression: str | None, white: bytes | np.ndarray
) -> Iterator[bytes | np.ndarray]:
    last = None, white
    for row in range(math.ceil(height / tile)):
        for column in range(math.ceil(width / tile)):
            piece = paint(column * tile * shrink, row * tile * shrink, shrink)
            if piece is not None and piece is not last[0]:
                last = piece, _encoded(piece, compression)
            yield white if piece is None else last[1]


def _encoded(piece: np.ndarray, compression: str | None) -> bytes | np.ndarray:
    if compression is None:
        return piece
    if compression == "jpeg":
        return imagecodecs.jpeg8_encode(piece, level=90, colorspace="rgb", outcolorspace="ycbcr", subsampling="420")
    if compression == "jpeg2k":
        return imagecodecs.jpeg2k_encode(piece, level=0, codecformat="j2k")
    encode = {"zstd": imagecodecs.zstd_encode, "zlib": imagecodecs.zlib_encode, "lzw": imagecodecs.lzw_encode}
    return encode[compression](piece.tobytes())


PLAIN_TAGS = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 4096, 277: 1, 278: 16, 279: 256}
"""Tags of a grey picture of 16 x 16 px in one strip that is not compressed, at byte 4096."""


def raw_tiff(changes: Mapping[int, int | tuple[int, bytes] | None], data: bytes = bytes(256)) -> bytes:
    """A classic TIFF of `PLAIN_TAGS` with some changed (None leaves one out); ``data`` begins at byte 4096.

    A number is written as one LONG; a pair is (type number, bytes of the values).
    """
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 13: 4}
    tags = {tag: value for tag, value in sorted((PLAIN_TAGS | dict(changes)).items()) if value is not None}
    entries, spill, at = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, value in tags.items():
        kind, values = value if isinstance(value, tuple) else (4, struct.pack("<I", value))
        place = struct.pack("<I", at + len(spill)) if len(values) > 4 else values.ljust(4, b"\0")
        spill += values if len(values) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, len(values) // sizes[kind]) + place
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + spill
    assert len(head) <= 4096
    return head.ljust(4096, b"\0") + data
