"""How well a section's spots lie on its slide, and whether another placement would fit better.

Spots that were kept lie on tissue, and counts follow the density of nuclei. Both are measured where the spots are and
where they would be if they were turned, mirrored, scaled or shifted; the difference is told in standard errors.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from scipy.spatial import KDTree
from scipy.stats import rankdata

from hifusion.slide import Slide
from hifusion.tissue import optical_density, small_picture, tissue_of

LEAST_SPOTS, LEAST_BLOCKS = 20, 5  # fewer say nothing reliable
LEAST_ERRORS = (0.001, 0.01)  # of the share of tissue and of the agreement: an error of nothing is too good to be true
SMALL_BIN_UM, BIN_UM = 50.0, 100.0  # bins smaller than a few nuclei are looked at in squares
EOSIN_RED = 0.3  # red density of eosin, as a part of its green density; what is above it is haematoxylin
BLOCK = 4.0  # side of the blocks of the jackknife, in pitches
STEPS = (1, 2, 4)  # pitches
WAYS = tuple((right, down) for right in (-1, 0, 1) for down in (-1, 0, 1) if right or down)
FACTORS = tuple(2.0 ** (k / 2) for k in range(-6, 7) if k)

TURNS = {
    "mirrored in x": ((-1, 0), (0, 1)),
    "mirrored in y": ((1, 0), (0, -1)),
    "rotated by 180 degrees": ((-1, 0), (0, -1)),
    "with x and y swapped": ((0, 1), (1, 0)),
    "rotated by 90 degrees clockwise": ((0, -1), (1, 0)),
    "rotated by 90 degrees anticlockwise": ((0, 1), (-1, 0)),
    "with x and y swapped and both mirrored": ((0, -1), (-1, 0)),
}


class Spots(NamedTuple):
    """What is tried on a slide: centres in slide pixels, log counts (None for positions alone), window, pitch."""

    centres_px: np.ndarray
    log_counts: np.ndarray | None
    window_px: float
    pitch_px: float


class Placement(NamedTuple):
    """One way to lay the spots on the slide.

    ``kind`` is the kind of fault it would mend (orientation, shift, scale), ``what`` says it in words; ``tissue`` is
    the mean share of tissue under the spots, ``agreement`` the correlation of counts with nuclei, ``evidence`` how much
    better than as given it fits, in standard errors.
    """

    kind: str
    what: str
    tissue: float
    agreement: float
    evidence: float


class Tried(NamedTuple):
    """The spots as given, the best other placement, and which spots lie on tissue as given, bool ``(N,)``."""

    given: Placement
    best: Placement
    on_tissue: np.ndarray


def try_placements(spots: Spots, slide: Slide, mpp: float) -> Tried | None:
    """Compare the spots as given with the other placements; None where they are too few to tell."""
    if len(spots.centres_px) < LEAST_SPOTS:
        return None
    cells = np.floor(spots.centres_px / (BLOCK * spots.pitch_px))
    block = np.unique(cells, axis=0, return_inverse=True)[1].ravel()
    if block.max() + 1 < LEAST_BLOCKS:
        return None
    layers, shrink = _layers_of(slide, mpp)
    near = _neighbour_means(spots)

    def under(centres_px: np.ndarray) -> list[np.ndarray]:
        return [_window_means(layer, centres_px / shrink, spots.window_px / shrink) for layer in layers]

    def score(tissue: np.ndarray, nuclei: np.ndarray) -> np.ndarray:
        return np.stack([_means(tissue, block), _agreement(nuclei, spots.log_counts, near, block)])

    here = under(spots.centres_px)
    given = score(*here)
    others = []
    for kind, what, centres_px in _others(spots, slide.size_px):
        other = score(*under(centres_px))
        evidence = sum(map(_in_errors, other - given, LEAST_ERRORS))
        others.append(Placement(kind, what, float(other[0, 0]), float(other[1, 0]), evidence))
    as_given = Placement("", "as given", float(given[0, 0]), float(given[1, 0]), 0.0)
    return Tried(as_given, max(others, key=lambda other: other.evidence), here[0] >= 0.5)


def spots_of(section: AnnData) -> Spots:
    """The spots on tissue; small bins put together in squares, since one holds hardly a nucleus."""
    facts, kept = section.uns["hifusion"], section.obs["in_tissue"].to_numpy(dtype=bool)
    centres, mpp = section.obsm["spatial"][kept], facts["mpp"]
    counts = None
    if "counts" in section.layers:
        counts = np.asarray(section.layers["counts"][kept].sum(axis=1), dtype=np.float64).ravel()
    window_um = facts["spot_diameter_um"]
    if facts["pitch_um"] < SMALL_BIN_UM:
        cells = np.floor(centres * mpp / BIN_UM)
        _, square, bins = np.unique(cells, axis=0, return_inverse=True, return_counts=True)
        square, window_um = square.ravel(), BIN_UM
        centres = np.column_stack([np.bincount(square, axis) / bins for axis in centres.T])
        counts = None if counts is None else np.bincount(square, counts) / bins
    pitch_px = (spacing(centres) if len(centres) >= LEAST_SPOTS else 0.0) or facts["pitch_um"] / mpp
    return Spots(centres, None if counts is None else np.log1p(counts), window_um / mpp, pitch_px)


def spacing(centres: np.ndarray) -> float:
    """Distance of nearest neighbours; its first quartile, since in a thinned section many neighbours are gone."""
    distances = np.asarray(KDTree(centres).query(centres, k=2)[0])
    return float(np.quantile(distances[:, 1], 0.25))


def _others(spots: Spots, size_px: tuple[int, int]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Other placements of the spots: the kind of fault each would mend, in words, centres."""
    centres, frame = spots.centres_px, np.array(size_px, dtype=np.float64) / 2
    middle = (centres.min(axis=0) + centres.max(axis=0)) / 2
    for what, matrix in TURNS.items():
        turn = np.array(matrix, dtype=np.float64)
        yield "orientation", what, (centres - middle) @ turn.T + middle
        # Positions of a turned image: its frame, not the spots' own, is what was turned.
        theirs = frame if turn[0, 0] else frame[::-1]
        yield "orientation", f"{what} with the image", (centres - theirs) @ turn.T + frame
    for steps, (right, down) in ((steps, way) for steps in STEPS for way in WAYS):
        words = " and ".join(filter(None, [("left", "", "right")[right + 1], ("up", "", "down")[down + 1]]))
        what = f"{steps} {'pitch' if steps == 1 else 'pitches'} {words}"
        yield "shift", what, centres + steps * spots.pitch_px * np.array([right, down])
    for factor in FACTORS:
        yield "scale", f"with positions times {factor:.3g}", centres * factor


def _layers_of(slide: Slide, mpp: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Running sums of tissue and of nuclear density over a small picture; slide pixels per its pixel along x and y."""
    picture, um = small_picture(slide, mpp)
    density = optical_density(picture)
    layers = (tissue_of(picture, um), density[..., 0] - EOSIN_RED * density[..., 1])
    sums = [np.pad(layer.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0))) for layer in layers]
    return sums, np.divide(slide.size_px, picture.shape[1::-1])


def _window_means(summed: np.ndarray, centres: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Mean in the window around each centre, all in pixels of the picture; what lies outside it counts as 0."""
    first = np.round(centres - window / 2)
    last = np.maximum(np.round(centres + window / 2), first + 1)
    most = np.array(summed.shape[::-1]) - 1
    (left, top), (right, bottom) = (np.clip(edge, 0, most).astype(np.int64).T for edge in (first, last))
    sums = summed[bottom, right] - summed[top, right] - summed[bottom, left] + summed[top, left]
    return sums / np.prod(last - first, axis=1)


def _neighbour_means(spots: Spots) -> sp.csr_matrix:
    """``(N, N)``: times values, the mean over each spot's neighbours up to the diagonal of a square lattice."""
    pairs = KDTree(spots.centres_px).query_pairs(1.6 * spots.pitch_px, output_type="ndarray")
    both = np.concatenate([pairs, pairs[:, ::-1]]).T
    count = len(spots.centres_px)
    near = sp.csr_matrix((np.ones(both.shape[1]), (both[0], both[1])), shape=(count, count))
    degree = np.asarray(near.sum(axis=1)).ravel()
    return sp.csr_matrix(sp.diags(1 / np.maximum(degree, 1)) @ near)


def _means(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Mean of all, then without each block in turn, ``(1 + blocks,)``."""
    return _left_out(values, block) / _left_out(np.ones(len(values)), block)


def _left_out(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Sum of all, then without each block in turn."""
    sums = np.bincount(block, values)
    return sums.sum() - np.concatenate([[0.0], sums])


def _agreement(nuclei: np.ndarray, log_counts: np.ndarray | None, near: sp.csr_matrix, block: np.ndarray) -> np.ndarray:
    """Mean of two Spearman correlations of counts with nuclear density, ``(1 + blocks,)``: as they are, and each
    against its neighbours' mean, which moves on by less than a pitch. Ranks are those of all spots throughout.
    """
    if log_counts is None:
        return np.zeros(block.max() + 2)
    ranks = [rankdata(values) for values in (nuclei, log_counts)]
    steps = [rankdata(rank - near @ rank) for rank in ranks]
    return (_correlations(ranks[0], ranks[1], block) + _correlations(steps[0], steps[1], block)) / 2


def _correlations(a: np.ndarray, b: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Pearson correlation of all, then without each block in turn; 0 where one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    mean_a, mean_b, aa, bb, ab = (_means(values, block) for values in (a, b, a * a, b * b, a * b))
    spread = np.sqrt(np.maximum((aa - mean_a**2) * (bb - mean_b**2), 0))
    known = spread > 1e-9
    return np.where(known, ab - mean_a * mean_b, 0) / np.where(known, spread, 1)


def _in_errors(gain: np.ndarray, least: float) -> float:
    """A gain over its standard error by the jackknife over blocks, at least ``least``."""
    without = gain[1:]
    error = np.sqrt((len(without) - 1) / len(without) * ((without - without.mean()) ** 2).sum())
    return float(gain[0] / max(error, least))
