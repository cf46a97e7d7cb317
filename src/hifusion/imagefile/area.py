"""Exact area averages: every source pixel counts by the part of it that a target pixel covers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

_CHUNK_PIXELS = 2**21  # source pixels held as float32 at a time: about 25 MB


@dataclass(frozen=True)
class AxisCover:
    """Which source pixels each target pixel covers along one axis, and by how much of itself.

    Attributes
    ----------
    first, last
        Source pixels to read, ``last`` exclusive; both 0 where all lies outside the image.
    weights
        float32 CSR ``(targets, last - first)``: a row sums to 1, to less where a part of it lies outside the image.
    """

    first: int
    last: int
    weights: sparse.csr_array

    @classmethod
    def of(cls, start: float, extent: float, targets: int, whole: float, length: int) -> "AxisCover":
        """Cover of ``targets`` equal pieces of ``[start, start + extent)``, in source pixels.

        ``whole`` is where the image ends. It may differ from the ``length`` in pixels where the source is a level whose
        last pixel is cut off or reaches too far: then the last pixel stands for what is missing.
        """
        piece = extent / targets
        edges = np.clip(start + piece * np.arange(targets + 1), 0, whole)
        low, high = edges[:-1, None], edges[1:, None]
        most = math.ceil(float((high - low).max())) + 1
        pixel = np.floor(low).astype(np.int64) + np.arange(most)
        share = np.clip(np.minimum(pixel + 1, high) - np.maximum(pixel, low), 0, None) / piece
        target, tap = np.nonzero(share)
        source = np.minimum(pixel[target, tap], length - 1)
        first, last = (int(source.min()), int(source.max()) + 1) if source.size else (0, 0)
        weights = sparse.csr_array(
            (share[target, tap].astype(np.float32), (target, source - first)), shape=(targets, last - first)
        )
        return cls(first, last, weights)

    @property
    def n_read(self) -> int:
        """How many source pixels are needed."""
        return self.last - self.first


def area_average(
    read: Callable[[int, int, int, int], np.ndarray], columns: AxisCover, rows: AxisCover, background: int
) -> np.ndarray:
    """The average colour that each target pixel covers, read in bands so that memory stays flat.

    Parameters
    ----------
    read
        ``(x0, y0, x1, y1)`` -> uint8 ``(y1 - y0, x1 - x0, 3)``.
    columns, rows
        Covers of the two axes.
    background
        Value of what lies outside the image.

    Returns
    -------
    ndarray
        uint8 ``(rows, columns, 3)``.
    """
    height, width = rows.weights.shape[0], columns.weights.shape[0]
    out = np.full((height, width, 3), background, dtype=np.uint8)
    if not columns.n_read or not rows.n_read:
        return out
    chunk = max(1, _CHUNK_PIXELS // columns.n_read)  # source rows at a time
    band = max(1, chunk * height // rows.n_read)  # target rows at a time
    for top in range(0, height, band):
        weights = rows.weights[top : top + band]
        if not weights.nnz:
            continue
        of_rows = np.zeros((weights.shape[0], columns.n_read * 3), dtype=np.float32)
        last = int(weights.indices.max()) + 1
        for y in range(int(weights.indices.min()), last, chunk):
            stop = min(y + chunk, last)
            piece = read(columns.first, rows.first + y, columns.last, rows.first + stop)
            of_rows += weights[:, y:stop] @ piece.reshape(stop - y, -1).astype(np.float32)
        across = of_rows.reshape(-1, columns.n_read, 3).swapaxes(0, 1).reshape(columns.n_read, -1)
        averages = (columns.weights @ across).reshape(width, -1, 3).swapaxes(0, 1)
        outside = 1 - np.outer(weights.sum(axis=1), columns.weights.sum(axis=1))
        out[top : top + band] = np.floor(averages + background * outside[..., None] + 0.5)
    return out
