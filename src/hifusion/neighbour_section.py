"""Expression carried over from registered sections of the same patient: the honest null of same-patient protocols.

Sections of one block look alike and lie on each other. What a model gains on the next section of a patient it has
seen, over the tissue's own expression at the same place, is what it reads from the picture.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from hifusion.cohort import SectionView, mean_profile
from hifusion.errors import InputError
from hifusion.registration import positions_um, registered

BANDWIDTHS_UM = (100.0, 150.0, 200.0, 300.0, 400.0, 600.0, 800.0)
BLOCK = 2  # pitches: side of the blocks of spots left out of a patient's only section


def fit_neighbour_section(train: Sequence[SectionView]) -> Callable[[SectionView], np.ndarray]:
    """At each spot the expression of the patient's training sections around its place; else the training mean.

    The sections are registered to the tested one by their pictures and positions. The prediction is ``m + s (k - m)``
    for each gene: ``k`` the mean over the patient's training spots, weighed by ``exp(-(distance / b)^2 / 2)``, ``m``
    their plain mean. The bandwidth ``b`` of :data:`BANDWIDTHS_UM` and the share ``s`` of each gene, 0 to 1, are those
    with the least squared error where each of the patient's training sections in turn is predicted from the others, or
    each block of :data:`BLOCK` pitches of the only one from its other spots.

    Returns
    -------
    predict
        ``predict(view)`` gives float32 ``(N, G)``; it looks at the picture and the positions of ``view`` only.

    Raises
    ------
    InputError
        No training spot, different panels, or, when predicting a patient seen in training, no SimpleITK.
    """
    if not train or not any(len(view.expression) for view in train):
        raise InputError("neighbour_section needs at least one training spot; none was given")
    if len({view.genes for view in train}) > 1:
        raise InputError("the training sections are seen through different gene panels; use one panel for all of them")
    mean = mean_profile(train)
    chosen: dict[str, tuple[float, np.ndarray]] = {}

    def predict(view: SectionView) -> np.ndarray:
        sources = [one for one in train if one.patient == view.patient]
        if not sources:
            return np.tile(mean.astype(np.float32), (len(view.centres_px), 1))
        if view.patient not in chosen:
            chosen[view.patient] = _choose(_left_out(sources), len(view.genes))
        bandwidth_um, share = chosen[view.patient]
        own_mean = mean_profile(sources)
        around = _around(_laid_on(sources, view), _expression(sources), positions_um(view), [bandwidth_um])[0]
        return (own_mean + share * (around - own_mean)).astype(np.float32)

    return predict


def predict_left_out(train: Sequence[SectionView]) -> list[np.ndarray]:
    """What :func:`fit_neighbour_section` says of its own training spots when they are left out, ``(N, G)`` a section.

    A section is predicted from the others of its patient, a patient's only section block by block from its other spots.
    """
    found = {view.name: np.zeros(view.expression.shape, dtype=np.float32) for view in train}
    for patient in dict.fromkeys(view.patient for view in train):
        sources = [view for view in train if view.patient == patient]
        parts = _left_out(sources)
        bandwidth_um, share = _choose(parts, len(sources[0].genes))
        for part in parts:
            mean = part.expression.mean(axis=0)
            around = _around(part.positions_um, part.expression, part.spots_um, [bandwidth_um])[0]
            found[part.name][part.rows] = mean + share * (around - mean)
    return [found[view.name] for view in train]


def _expression(views: Sequence[SectionView]) -> np.ndarray:
    return np.concatenate([view.expression for view in views]).astype(np.float64)


def _laid_on(sources: Sequence[SectionView], view: SectionView) -> np.ndarray:
    """Positions of all spots of some sections in um of another's slide, ``(sum of N, 2)``."""
    return np.concatenate([registered(source, view).moved(positions_um(source)) for source in sources])


def _around(
    sources_um: np.ndarray, expression: np.ndarray, spots_um: np.ndarray, bandwidths_um: Sequence[float]
) -> list[np.ndarray]:
    """Gaussian-weighted mean of the sources' expression at each spot, float64 ``(N, G)`` for each bandwidth."""
    squares = cdist(spots_um, sources_um, "sqeuclidean")
    # From the nearest spot on: far from all of them its weight is still 1, not 0 / 0.
    squares -= squares.min(axis=1, keepdims=True)
    means = []
    for bandwidth_um in bandwidths_um:
        weights = np.exp(-squares / (2 * bandwidth_um**2))
        means.append(weights @ expression / weights.sum(axis=1, keepdims=True))
    return means


def _choose(parts: Sequence["_Part"], n_genes: int) -> tuple[float, np.ndarray]:
    """The bandwidth in um, and each gene's share ``(G,)``, that predict left-out training spots of a patient best."""
    along, length, energy = (np.zeros((len(BANDWIDTHS_UM), n_genes)) for _ in range(3))
    for part in parts:
        mean = part.expression.mean(axis=0)
        for row, around in enumerate(_around(part.positions_um, part.expression, part.spots_um, BANDWIDTHS_UM)):
            along[row] += ((part.target - mean) * (around - mean)).sum(axis=0)
            length[row] += np.square(around - mean).sum(axis=0)
            energy[row] += np.square(part.target - mean).sum(axis=0)
    shares = np.clip(along / np.maximum(length, 1e-12), 0.0, 1.0)
    # |t - s a|^2 = |t|^2 - 2 s t.a + s^2 |a|^2, over all left-out spots and genes.
    errors = (energy - 2 * shares * along + shares**2 * length).sum(axis=1)
    best = int(np.argmin(errors))
    return BANDWIDTHS_UM[best], shares[best]


class _Part(NamedTuple):
    """Spots that are left out of a patient's training spots, and the others."""

    name: str
    """Of the section of the left-out spots."""
    positions_um: np.ndarray
    expression: np.ndarray
    spots_um: np.ndarray
    target: np.ndarray
    rows: np.ndarray


def _left_out(sources: Sequence[SectionView]) -> list[_Part]:
    """Each section left out in turn, or each block of the only one."""
    if len(sources) > 1:
        return [
            _Part(
                view.name,
                _laid_on(others, view),
                _expression(others),
                positions_um(view),
                _expression([view]),
                np.arange(len(view.expression)),
            )
            for view in sources
            if (others := [one for one in sources if one is not view])
        ]
    view = sources[0]
    spots, expression = positions_um(view), _expression(sources)
    cell = np.floor((view.centres_px - view.centres_px.min(axis=0)) / (BLOCK * view.pitch_px) + 1e-6)
    _, blocks = np.unique(cell, axis=0, return_inverse=True)
    parts = [blocks.ravel() == block for block in range(blocks.max() + 1)]
    return [
        _Part(view.name, spots[~part], expression[~part], spots[part], expression[part], np.flatnonzero(part))
        for part in parts
        if not part.all()
    ]
