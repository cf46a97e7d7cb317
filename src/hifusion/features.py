"""Features of square windows of a section's slide by a frozen encoder, computed once and kept on disk."""

import io
import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from hifusion import files
from hifusion.cohort import SectionView
from hifusion.data import read_regions, slide_regions
from hifusion.encoders import Encoder
from hifusion.errors import InputError
from hifusion.slide import Slide

Progress = Callable[[str, int, int], None]  # (what, windows done, windows in all)
FOLDER = "features"
BATCH_SIZE = 32
PIECE = 1024  # rows that are kept in one file, so that no more are lost when a process is stopped


def window_features(
    view: SectionView,
    centres_px: np.ndarray,
    side_px: int,
    encoder: Encoder,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> np.ndarray:
    """Features of square windows of a section's slide, float32 ``(K, C)``; white outside the image.

    They are kept in the folder ``features`` of ``view.cache``, where the view has one, under a digest of encoder,
    image, scale and positions, :data:`PIECE` rows a file. A file that is cut short or of another shape is made anew.

    Parameters
    ----------
    centres_px
        (x, y) of the windows in full-resolution pixels, ``(K, 2)``.
    side_px
        Side of a window in pixels of the store, each ``view.shrink`` pixels of the slide wide.

    Raises
    ------
    InputError
        The section has no slide, the slide cannot be read, or the features cannot be written.
    """
    centres_px = np.ascontiguousarray(centres_px, dtype=np.float64).reshape(-1, 2)
    if round(side_px * view.shrink) < 1:
        raise InputError(f"side_px={side_px} is not possible; use at least 1, and no less than a pixel of the slide")
    image = view.image
    if image is None:
        raise InputError(
            f"section {view.name} has no slide to cut windows from; prepare a store with its image and give that"
        )

    slide = cache(lambda: Slide(image))  # opened if need be, and then for all pieces

    def windows(rows: slice) -> Iterator[Tensor]:
        return slide_regions(slide(), centres_px[rows], region_px=side_px, shrink=view.shrink, batch_size=batch_size)

    return _of_windows(view, centres_px, side_px, encoder, windows, progress)


def spot_features(
    view: SectionView,
    encoder: Encoder,
    side_px: int,
    *,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> np.ndarray:
    """Features of the windows at a section's spots, float32 ``(N, C)``: what :func:`window_features` gives there.

    They are cut from the section's region patches where these hold the very same pixels; the slide is opened otherwise.
    """
    start = _offset(view, side_px)
    if view.regions is None or start is None:
        return window_features(view, view.centres_px, side_px, encoder, batch_size=batch_size, progress=progress)
    inner = slice(start, start + side_px)

    def windows(rows: slice) -> Iterator[Tensor]:
        for first in range(rows.start, rows.stop, batch_size):
            yield read_regions(view, np.arange(first, min(first + batch_size, rows.stop)))[:, :, inner, inner]

    centres_px = np.ascontiguousarray(view.centres_px, dtype=np.float64)
    return _of_windows(view, centres_px, side_px, encoder, windows, progress)


def _of_windows(
    view: SectionView,
    centres_px: np.ndarray,
    side_px: int,
    encoder: Encoder,
    windows: Callable[[slice], Iterator[Tensor]],
    progress: Progress | None,
) -> np.ndarray:
    def batches(rows: slice) -> Iterator[np.ndarray]:
        return (encoder(region).numpy() for region in windows(rows))

    return kept(view, centres_px, f"{encoder.id} {side_px}", encoder.id, encoder.width, batches, progress)


def _offset(view: SectionView, side_px: int) -> int | None:
    """Where in a region the window of the same centre begins; None where its pixels are not among the region's.

    ``Slide.read_patch`` rounds the side of a patch to whole pixels of the slide and starts half of that before the
    centre. A region holds the window's pixels only where both come to the same pixel size and grid.
    """
    region_px = 0 if view.regions is None else view.regions.shape[1]
    region_side, side = round(region_px * view.shrink), round(side_px * view.shrink)
    if side < 1 or side_px > region_px:
        return None
    start, rest = divmod((region_side // 2 - side // 2) * region_px, region_side)
    return start if rest == 0 and region_side * side_px == side * region_px else None


def kept(
    view: SectionView,
    centres_px: np.ndarray,
    what: str,
    folder: str,
    width: int,
    batches: Callable[[slice], Iterable[np.ndarray]],
    progress: Progress | None,
) -> np.ndarray:
    """Features, float32 ``(K, width)``: from the section's cache, where it has one, else computed and put there.

    Parameters
    ----------
    what
        All that decides the features, beside the slide and the places: a kept file is for these words alone.
    folder
        Where in the cache.
    batches
        Computes some of the rows, batch by batch.
    """
    found = np.empty((len(centres_px), width), dtype=np.float32)
    for first in range(0, len(found), PIECE):
        rows = slice(first, min(first + PIECE, len(found)))
        path = None
        if view.cache is not None and view.image_digest:
            key = files.digest(f"{what} {view.image_digest} {view.shrink!r}".encode(), centres_px[rows].tobytes())
            path = view.cache / FOLDER / folder / f"{view.name}-{key[:16]}.npy"
        piece = _read(path, found[rows].shape) if path else None
        if piece is not None:
            found[rows] = piece
            continue
        done = first
        for batch in batches(rows):
            found[done : done + len(batch)] = batch
            done += len(batch)
            if progress:
                progress(view.name, done, len(found))
        if path:
            _write(path, found[rows])
    return found


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Features kept in a file; None where there is none, or not the whole of them."""
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _write(path: Path, features: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    # Each writer has a file of its own: two that compute the same features would else write into each other's.
    own = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.npy")
    files.write_bytes(own, buffer.getvalue())
    own.replace(path)
