"""Do the spots of a measured section lie where they should on its slide? Scale, axes, orientation and place.

What was measured must fit what is seen. A ridge regression on colour and texture around each spot predicts the spot's
total counts and the two leading patterns of its expression, each block of spots from the others; how well it does is
the *agreement* of positions with slide. It is computed as given, and for every way positions usually go wrong: axes
swapped, mirrored, turned, moved by one pitch, scaled by two. Where another way agrees clearly better, that is told.

docs/slides.md says what was caught and what was not on the sections at hand.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.ndimage as ndi
from anndata import AnnData
from scipy.spatial import KDTree
from scipy.stats import rankdata

from hifusion import overlays
from hifusion.errors import InputError
from hifusion.slide import Slide

SAME_SCALE = 0.1  # scales and pitches that differ by less are one
LEAST_SPOTS = 60  # fewer do not tell: agreement is then mostly noise
# Of the agreement, over the root of the number of spots. On nine clean sections at hand no other way came within .04
# of the given one; of 105 injected faults the weakest showed by .035 (of 283 spots).
MARGIN = 0.5
LEAST_AGREEMENT = 0.2  # of the better way: below it nothing agrees with anything (clean sections at hand: .5 to .7)
_MAP_UM = 12.0
_GENES, _PATTERNS = 300, 2  # leading patterns of the 300 genes with most counts
_BLOCK_PITCHES, _FOLDS, _RIDGE = 4.0, 5, 10.0

_TURNS = {  # (axes swapped, mirrored in x, mirrored in y)
    (False, True, False): "mirrored left to right",
    (False, False, True): "mirrored top to bottom",
    (False, True, True): "turned by 180 degrees",
    (True, False, False): "with x and y swapped",
    (True, True, False): "turned by 90 degrees",
    (True, False, True): "turned by 270 degrees",
    (True, True, True): "with x and y swapped and turned by 180 degrees",
}


class Finding(NamedTuple):
    """One way in which positions and slide do not belong together."""

    kind: str
    """``outside``, ``pitch``, ``scale`` or ``place``."""
    message: str
    """What was found, in a few words."""
    value: float
    """The number behind it."""


def check_section(section: AnnData, slide: Slide) -> list[Finding]:
    """What speaks against the positions of a section on its slide; nothing where all is well.

    Only a measured section of at least :data:`LEAST_SPOTS` spots can be checked for orientation and place.
    """
    facts, centres = section.uns["hifusion"], section.obsm["spatial"]
    findings = []
    outside = float(((centres < 0) | (centres >= slide.size_px)).any(axis=1).mean())
    if outside:
        size = f"{slide.size_px[0]} x {slide.size_px[1]} px"
        findings.append(Finding("outside", f"{outside:.0%} of the spots lie outside the {size} image", outside))
    if len(centres) > 1:
        nearest = float(np.median(np.asarray(KDTree(centres).query(centres, k=2)[0])[:, 1]))
        apart = nearest * facts["mpp"] / facts["pitch_um"]
        if abs(apart - 1) > SAME_SCALE:
            told = f"spots lie {nearest * facts['mpp']:.0f} um apart, not {facts['pitch_um']:g}"
            findings.append(Finding("pitch", f"{told}, at {facts['mpp']:.4g} um per pixel", apart))
    if slide.mpp is not None and abs(slide.mpp / facts["mpp"] - 1) > SAME_SCALE:
        told = f"the slide says {slide.mpp:.4g} um per pixel, the section {facts['mpp']:.4g}"
        findings.append(Finding("scale", told, slide.mpp / facts["mpp"]))
    return findings + _check_place(section, slide)


def require_geometry(section: AnnData, slide: Slide, *, force: bool = False, picture: Path | None = None) -> None:
    """Refuse a section whose positions do not fit its slide.

    Parameters
    ----------
    force
        Only draw the picture, and go on.
    picture
        Where to draw the spots over the slide if anything was found.

    Raises
    ------
    InputError
        One line that lists the findings.
    """
    findings = check_section(section, slide)
    if not findings:
        return
    told = "; ".join(finding.message for finding in findings)
    if picture is not None:
        overlays.draw_check(section, slide, told, picture)
    if not force:
        where = f" (look at {picture})" if picture else ""
        raise InputError(
            f"section {section.uns['hifusion']['section']}: positions do not seem to fit {slide.path.name}: {told}"
            f"{where}; mend the positions, or go on with --force"
        )


def _check_place(section: AnnData, slide: Slide) -> list[Finding]:
    if "counts" not in section.layers or section.n_obs < LEAST_SPOTS:
        return []
    facts, centres = section.uns["hifusion"], section.obsm["spatial"]
    pitch_px = facts["pitch_um"] / facts["mpp"]
    seen = _seen_maps(slide, facts["mpp"], facts["spot_diameter_um"], facts["pitch_um"])
    measured, fold = _measured(section), _folds(centres, pitch_px)
    given = _agreement(_sample(seen, slide, centres), measured, fold)
    others = {
        way: _agreement(_sample(seen, slide, moved), measured, fold)
        for way, moved in _other_ways(centres, slide.size_px, pitch_px)
    }
    best = max(others, key=lambda way: others[way])
    gain = others[best] - given
    if gain <= MARGIN / np.sqrt(section.n_obs) or others[best] < LEAST_AGREEMENT:
        return []
    message = f"counts agree better with the slide {best} ({others[best]:.2f}) than as given ({given:.2f})"
    return [Finding("place", message, gain)]


def _other_ways(centres: np.ndarray, size_px: tuple[int, int], pitch_px: float) -> Iterator[tuple[str, np.ndarray]]:
    """Positions moved in every way they may have been moved by mistake, ``(N, 2)`` each."""
    middle = (centres.min(axis=0) + centres.max(axis=0)) / 2
    for (swapped, *mirrored), told in _TURNS.items():
        axes = [1, 0] if swapped else [0, 1]
        on_image = centres[:, axes]
        yield told, np.where(mirrored, np.array(size_px) - on_image, on_image)
        about = (centres - middle)[:, axes]
        yield f"{told} about their own middle", np.where(mirrored, -about, about) + middle
    for x, y in product((-1, 0, 1), repeat=2):
        if x or y:
            yield f"moved by one pitch ({x:+d}, {y:+d})", centres + np.array([x, y]) * pitch_px
    for factor in (0.5, 2.0):
        yield f"scaled by {factor:g}", centres * factor


def _seen_maps(slide: Slide, mpp: float, spot_um: float, pitch_um: float) -> np.ndarray:
    """Colour and texture of the slide at about 12 um a pixel, ``(features, h, w)``."""
    picture = slide.thumbnail(max(64, round(max(slide.size_px) * mpp / _MAP_UM)))
    um = max(slide.size_px) * mpp / max(picture.shape[:2])
    red, green, blue = -np.log10(np.maximum(picture.astype(np.float32), 1) / 255).transpose(2, 0, 1)
    spot, wide = max(1, round(spot_um / um)), max(3, round(2 * pitch_um / um))
    maps = []
    for channel in ((red + green + blue) / 3, green - (red + blue) / 2, red - blue):  # darkness, stain, hue
        mean = ndi.uniform_filter(channel, spot, mode="nearest")
        square = ndi.uniform_filter(channel * channel, spot, mode="nearest")
        spread = np.sqrt(np.maximum(square - mean * mean, 0))
        maps += [mean, spread, ndi.uniform_filter(channel, wide, mode="nearest")]
    return np.stack(maps)


def _sample(seen: np.ndarray, slide: Slide, centres: np.ndarray) -> np.ndarray:
    """The maps at positions of the slide, ``(N, features)``; outside it is glass."""
    shrink = np.array(slide.size_px) / seen.shape[:0:-1]
    x, y = (centres / shrink - 0.5).T
    return np.stack([ndi.map_coordinates(one, [y, x], order=1, mode="constant") for one in seen], axis=1)


def _measured(section: AnnData) -> np.ndarray:
    """Log total counts and leading patterns of expression, as standardised ranks ``(N, 1 + patterns)``."""
    counts = section.layers["counts"]
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    chosen = np.argsort(-np.asarray(counts.mean(axis=0)).ravel(), kind="stable")[:_GENES]
    expression = np.log1p(1e4 * counts[:, chosen].toarray() / np.maximum(total, 1)[:, None])
    left, scale, _ = np.linalg.svd(expression - expression.mean(axis=0), full_matrices=False)
    return _ranks(np.column_stack([total, (left * scale)[:, :_PATTERNS]]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Columns as ranks with mean 0 and variance 1; a constant column is 0."""
    ranks = rankdata(values, axis=0)
    ranks -= ranks.mean(axis=0)
    return np.asarray(ranks / np.maximum(ranks.std(axis=0), 1e-9))


def _folds(centres: np.ndarray, pitch_px: float) -> np.ndarray:
    """Number of the fold of each spot: neighbours stay together, so that none is predicted from the one beside it."""
    blocks = np.floor((centres - centres.min(axis=0)) / (_BLOCK_PITCHES * pitch_px)).astype(int)
    return np.asarray(np.unique(blocks, axis=0, return_inverse=True)[1]).ravel() % _FOLDS


def _agreement(seen: np.ndarray, measured: np.ndarray, fold: np.ndarray) -> float:
    """Mean correlation of what was measured with its prediction from what is seen, each fold from the others."""
    seen = _ranks(seen)
    predicted = np.zeros_like(measured)
    for number in range(_FOLDS):
        training, held_out = fold != number, fold == number
        mean, level = seen[training].mean(axis=0), measured[training].mean(axis=0)
        inputs = seen[training] - mean
        normal = inputs.T @ inputs + _RIDGE * np.eye(seen.shape[1])
        weights = np.linalg.solve(normal, inputs.T @ (measured[training] - level))
        predicted[held_out] = (seen[held_out] - mean) @ weights + level
    spread = predicted.std(axis=0) * measured.std(axis=0)
    together = ((predicted - predicted.mean(axis=0)) * (measured - measured.mean(axis=0))).mean(axis=0)
    return float(np.where(spread > 1e-9, together / np.maximum(spread, 1e-9), 0.0).mean())
