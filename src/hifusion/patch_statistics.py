"""Simple colour and texture statistics of patches: what the simple rivals of a network look at."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from scipy.spatial import KDTree

from hifusion.cohort import SectionView
from hifusion.errors import InputError

# Each region is looked at whole and at a half and a quarter of its side, around the spot: 448, 224 and 112 px for
# regions of 448 px.
SHRINKS = (4, 2, 1)
DENSITY_PERCENTILES = (10, 50, 90, 97)
DENSE = 1.2
BRIGHT = 0.85
PER_SIZE = 14
COUNT = PER_SIZE * len(SHRINKS)

# 300 and 700 px at the 0.688 um/px of HER2+ sections B-H, kept in micrometres so that another scanner means the same.
NEIGHBOUR_RADII_UM = (206.4, 481.6)
# exp(-(distance / r)^2) beyond three radii is below 2e-4 of the spot's own weight.
REACH = 3.0
SPOTS_AT_ONCE = 512  # of which the neighbours are known at a time: on a dense map each spot has thousands

# Optical density of a byte: -ln of the value in [0, 1], black counted as 1/255.
_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)
_LOWEST_BRIGHT = int(np.floor(BRIGHT * 255)) + 1

# By digest of the pixels, since each fold makes new views of the same section. A section takes 0.3 kB a spot.
_known: dict[str, np.ndarray] = {}


def patch_statistics(view: SectionView) -> np.ndarray:
    """Colour and texture of each spot's surroundings at three sizes, float64 ``(N, 42)``, read-only.

    For each size (quarter, half and whole side of the region, without what lies outside the image): mean and standard
    deviation of R, G, B in [0, 1] (six); with optical density ``d = sum over channels of -ln(max(v, 1/255))``: its
    10th, 50th, 90th and 97th percentiles, the fraction of pixels with ``d > 1.2``, the mean absolute difference of
    ``d`` along y and along x; the fraction of pixels whose lowest channel is above 0.85.

    Results are kept in memory by the digest of the pixels.

    Raises
    ------
    InputError
        The section has no region patches, or one of them lies outside the image.
    """
    if view.regions is None or view.inside is None:
        raise InputError(
            f"section {view.name} has no region patches; prepare a store with its image, "
            "or use a baseline that needs none"
        )
    key = _digest(view.regions, view.inside)
    if key not in _known:
        # numpy lets go of the interpreter in the heavy calls, so threads help.
        with ThreadPoolExecutor() as pool:
            rows = list(pool.map(partial(of_region, section=view.name), view.regions, view.inside))
        found = np.array(rows, dtype=np.float64).reshape(-1, COUNT)
        found.setflags(write=False)
        _known[key] = found
    return _known[key]


def _digest(regions: np.ndarray, inside: np.ndarray) -> str:
    sha = hashlib.sha256(repr((regions.shape, inside.tolist())).encode())
    for region in regions:
        sha.update(np.ascontiguousarray(region).data)
    return sha.hexdigest()


def of_region(region: np.ndarray, box: np.ndarray, section: str) -> list[float]:
    """The statistics of one region, uint8 ``(R, R, 3)``, of which ``box`` lies inside the image of ``section``."""
    side = region.shape[0]
    channels = np.ascontiguousarray(np.moveaxis(region, -1, 0))
    density = _DENSITY[channels[0]] + _DENSITY[channels[1]] + _DENSITY[channels[2]]
    values: list[float] = []
    for shrink in SHRINKS:
        size = max(side // shrink, 1)
        start = (side - size) // 2
        left, top = np.maximum(box[:2], start)
        right, bottom = np.minimum(box[2:], start + size)
        if right <= left or bottom <= top:
            raise InputError(f"section {section}: a spot's patch lies outside the image; remove that spot")
        values += _of_patch(channels[:, top:bottom, left:right], density[top:bottom, left:right])
    return values


def _of_patch(channels: np.ndarray, density: np.ndarray) -> list[float]:
    # Mean and spread from the 256 byte counts: exact, and no float copy of the pixels.
    shares = np.array([np.bincount(channel.ravel(), minlength=256) for channel in channels]) / density.size
    levels = np.arange(256) / 255.0
    mean = shares @ levels
    spread = np.sqrt(np.maximum(shares @ levels**2 - mean**2, 0.0))
    return [
        *mean,
        *spread,
        *_percentiles(density.ravel()),
        np.mean(density > DENSE),
        *(np.abs(np.diff(density, axis=axis)).mean() if density.shape[axis] > 1 else 0.0 for axis in (0, 1)),
        np.mean(channels.min(axis=0) >= _LOWEST_BRIGHT),
    ]


def _percentiles(values: np.ndarray) -> np.ndarray:
    """np.percentile of :data:`DENSITY_PERCENTILES`, at a third of its time."""
    ranks = np.array(DENSITY_PERCENTILES) / 100 * (values.size - 1)
    below = ranks.astype(int)
    above = np.minimum(below + 1, values.size - 1)
    ordered = np.partition(values, np.unique([below, above]))
    return ordered[below] + (ranks - below) * (ordered[above] - ordered[below])


def with_neighbours(view: SectionView, statistics: np.ndarray) -> np.ndarray:
    """Statistics of each spot followed by their means over its neighbourhood at each radius, float64 ``(N, 3 K)``.

    The mean of radius ``r`` weighs every spot of the section, the spot itself included, by ``exp(-(distance / r)^2)``.

    Parameters
    ----------
    statistics
        ``(N, K)``, one row per spot of ``view``.
    """
    means = [neighbour_mean(view, statistics, radius_um) for radius_um in NEIGHBOUR_RADII_UM]
    return np.concatenate([statistics, *means], axis=1)


def neighbour_mean(view: SectionView, values: np.ndarray, radius_um: float) -> np.ndarray:
    """Mean of values ``(N, K)`` over each spot's neighbourhood, itself included, ``exp(-(distance / r)^2)`` each."""
    tree, radius_px = KDTree(view.centres_px), radius_um / view.mpp
    found = np.empty_like(values)
    for first in range(0, len(values), SPOTS_AT_ONCE):
        some = slice(first, first + SPOTS_AT_ONCE)
        away = KDTree(view.centres_px[some]).sparse_distance_matrix(tree, REACH * radius_px, output_type="coo_matrix")
        near = away.tocsr()
        near.data = np.exp(-((near.data / radius_px) ** 2)).astype(values.dtype)
        found[some] = (near @ values) / np.asarray(near.sum(axis=1))
    return found


def standardise(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function that gives columns the scale in which ``values`` have mean 0 and standard deviation 1.

    A column that does not vary is only centred.
    """
    mean, spread = values.mean(axis=0), values.std(axis=0)
    spread = np.where(spread > 1e-9 * np.abs(mean), spread, 1.0)
    return lambda others: (others - mean) / spread
