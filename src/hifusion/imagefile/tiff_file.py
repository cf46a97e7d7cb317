"""TIFF read with tifffile and imagecodecs: plain, tiled, pyramids by pages or by SubIFDs, BigTIFF, OME-TIFF."""

import io
import logging
import math
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from hifusion.errors import InputError
from hifusion.imagefile.contract import BACKGROUND, ImageFile, readable
from hifusion.imagefile.lzw import decode_lzw
from hifusion.imagefile.tiff_facts import (
    has_plain_rows,
    levels_of,
    main_series,
    n_planes,
    piece_shape,
    refuse_pixels,
    scale_of,
)

# tifffile logs what it finds wrong; without a handler Python would print that beside the one line that we raise.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

MAX_PAGES = 4096  # a slide has a dozen; a file that names millions would be walked for minutes
_CACHE_BYTES, _MOST_CACHE_BYTES = 2**26, 2**28  # decoded tiles kept: a row of them across the image, if that fits
_SHORT_ROW_BYTES = 2**16  # rows that are not compressed: short ones are read whole, many at once
_READ_BYTES = 2**22
_STATES_ITS_SIZE = {7: "JPEG", 33004: "JPEG2000", 33005: "JPEG2000", 34712: "JPEG2000"}


class TiffFile(ImageFile):
    """A TIFF of which only the tiles or strips that a rectangle touches are read."""

    reader = "tifffile"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with readable(path):
            self._tiff = tifffile.TiffFile(path)
        try:
            with readable(path):
                self._describe()
        except InputError:
            self._tiff.close()
            raise
        self._lock = threading.Lock()

    def _describe(self) -> None:
        if _has_page(self._tiff, MAX_PAGES):
            raise InputError(f"{self.path}: names more than {MAX_PAGES} pages, which no slide has; give one image")
        series = main_series(self.path, self._tiff)
        self.format = "OME-TIFF" if self._tiff.is_ome else "BigTIFF" if self._tiff.is_bigtiff else "TIFF"
        self.associated = tuple(
            f"{other.name or 'series'} ({other.sizes['width']} x {other.sizes['height']} px)"
            for other in self._tiff.series
            if other is not series and {"width", "height"} <= other.sizes.keys()
        )
        levels = levels_of(self._tiff, series)
        self._pages = [page for page, _ in levels]
        self.levels = tuple(level for _, level in levels)
        for page in self._pages:
            refuse_pixels(self.path, self._tiff, page)
        self.scale = scale_of(self._tiff, self._pages[0])
        self._piece = lru_cache(max(_n_kept(page) for page in self._pages))(self._decoded)

    def read(self, level: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels of a rectangle inside a level, uint8 ``(y1 - y0, x1 - x0, 3)``; what is transparent is white."""
        page = self._pages[level]
        samples = np.zeros((y1 - y0, x1 - x0, page.samplesperpixel), dtype=np.uint8)
        missing = []
        with readable(self.path):
            if has_plain_rows(page):
                self._read_rows(page, x0, y0, samples)
                return _as_rgb(page, samples)
            for row, column, plane, index in _pieces(page, x0, y0, x1, y1):
                height, width, _ = piece_shape(page)
                top, left = max(row * height, y0), max(column * width, x0)
                bottom, right = min(row * height + height, y1), min(column * width + width, x1)
                there = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
                piece = self._piece(level, index)
                if piece is None:
                    missing.append(there)
                    continue
                cut = piece[top - row * height : bottom - row * height, left - column * width : right - column * width]
                samples[(*there, np.s_[plane : plane + piece.shape[2]])] = cut
            pixels = _as_rgb(page, samples)
        for there in missing:
            pixels[there] = BACKGROUND
        return pixels

    def _bytes(self, offset: int, count: int) -> bytes:
        with self._lock:
            self._tiff.filehandle.seek(offset)
            data = self._tiff.filehandle.read(count)
        if len(data) < count:
            raise InputError(f"{self.path}: not a readable image (it ends too early); give an intact slide")
        return data

    def _decoded(self, level: int, index: int) -> np.ndarray | None:
        """A tile or strip, uint8 ``(height, width, samples)``; None where the file leaves it out."""
        page = self._pages[level]
        count = page.databytecounts[index]
        if not count or not page.dataoffsets[index]:
            return None
        data = self._bytes(page.dataoffsets[index], min(count, self._tiff.filehandle.size + 1))
        if page.compression in _STATES_ITS_SIZE:
            self._refuse_other_size(page, data)
        if page.compression == tifffile.COMPRESSION.LZW:
            return _decoded_lzw(page, data, index)
        piece, _, _ = page.decode(data, index, jpegtables=page.jpegtables, _fullsize=page.is_tiled)
        return None if piece is None else piece[0]

    def _refuse_other_size(self, page: tifffile.TiffPage, data: bytes) -> None:
        # Tiles of these kinds state their own size and would be decoded to it, however large.
        with Image.open(io.BytesIO(data), formats=(_STATES_ITS_SIZE[page.compression],)) as image:
            width, height = image.size
        if width * height > 2 * math.prod(piece_shape(page)[:2]):
            raise InputError(f"{self.path}: not a readable image (a piece of it states {width} x {height} px)")

    def _read_rows(self, page: tifffile.TiffPage, x0: int, y0: int, out: np.ndarray) -> None:
        """Fill ``out`` from strips that are not compressed: of long rows only the bytes that are needed are read."""
        per_pixel, (height, width, _) = page.samplesperpixel // n_planes(page), out.shape
        row_bytes, strips = page.imagewidth * per_pixel, math.ceil(page.imagelength / page.rowsperstrip)
        short = row_bytes <= _SHORT_ROW_BYTES
        first, length = (0, page.imagewidth) if short else (x0, width)
        for plane in range(n_planes(page)):
            y = 0
            while y < height:
                strip, row = divmod(y0 + y, page.rowsperstrip)
                count = min(page.rowsperstrip - row, height - y, _READ_BYTES // row_bytes) if short else 1
                start = page.dataoffsets[plane * strips + strip] + row * row_bytes + first * per_pixel
                data = self._bytes(start, count * length * per_pixel)
                lines = np.frombuffer(data, dtype=np.uint8).reshape(count, length, per_pixel)
                out[y : y + count, :, plane : plane + per_pixel] = lines[:, x0 - first : x0 - first + width]
                y += count

    def close(self) -> None:
        """Close the file and forget its tiles."""
        self._piece.cache_clear()
        self._tiff.close()


def _has_page(tiff: tifffile.TiffFile, number: int) -> bool:
    try:  # their count would take a walk through all of them
        tiff.pages.get(number)
    except IndexError:
        return False
    return True


def _pieces(page: tifffile.TiffPage, x0: int, y0: int, x1: int, y1: int) -> Iterator[tuple[int, int, int, int]]:
    """(row, column, first sample, number in the file) of the tiles or strips that a rectangle touches."""
    height, width, _ = piece_shape(page)
    across, down = math.ceil(page.imagewidth / width), math.ceil(page.imagelength / height)
    for plane in range(n_planes(page)):
        for row in range(y0 // height, math.ceil(y1 / height)):
            for column in range(x0 // width, math.ceil(x1 / width)):
                yield row, column, plane, (plane * down + row) * across + column


def _n_kept(page: tifffile.TiffPage) -> int:
    piece_bytes = math.prod(piece_shape(page))
    across = math.ceil(page.imagewidth / piece_shape(page)[1]) * n_planes(page)
    return max(_CACHE_BYTES // piece_bytes, min(across + 1, _MOST_CACHE_BYTES // piece_bytes), 1)


def _decoded_lzw(page: tifffile.TiffPage, data: bytes, index: int) -> np.ndarray:
    height, width, samples = piece_shape(page)
    if not page.is_tiled:  # the last strip may be shorter
        height = min(height, page.imagelength - index % math.ceil(page.imagelength / height) * height)
    piece = decode_lzw(data, height, width * samples, page.fillorder).reshape(height, width, samples)
    return np.cumsum(piece, axis=1, dtype=np.uint8) if page.predictor == tifffile.PREDICTOR.HORIZONTAL else piece


def _as_rgb(page: tifffile.TiffPage, samples: np.ndarray) -> np.ndarray:
    """Samples as they are stored to RGB on white."""
    kinds = tifffile.PHOTOMETRIC
    if page.photometric == kinds.PALETTE:
        colormap = np.asarray(page.colormap)  # 16 bits; some writers fill the low ones only
        colormap = colormap >> 8 if colormap.max() > 255 else colormap
        return colormap.astype(np.uint8).T[samples[..., 0]]
    colours = 1 if page.photometric in (kinds.MINISBLACK, kinds.MINISWHITE) else 3
    rgb, alpha = samples[..., :colours], samples[..., colours : colours + 1]
    if page.photometric == kinds.MINISWHITE:
        rgb = 255 - rgb
    kind = page.extrasamples[0] if page.extrasamples else tifffile.EXTRASAMPLE.UNSPECIFIED
    if kind != tifffile.EXTRASAMPLE.UNSPECIFIED:
        opacity = alpha.astype(np.uint32)
        ink = rgb * (np.uint32(255) if kind == tifffile.EXTRASAMPLE.ASSOCALPHA else opacity)
        rgb = np.minimum((ink + BACKGROUND * (255 - opacity) + 127) // 255, 255).astype(np.uint8)
    return np.ascontiguousarray(rgb) if colours == 3 else rgb.repeat(3, axis=2)
