"""Ridge regression on the features of a frozen encoder: the simple rival that sees what a network sees."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

from hifusion.baselines import Predict, held_out_blocks, training_expression
from hifusion.cohort import SectionView
from hifusion.encoders import Encoder, load_encoder
from hifusion.errors import InputError
from hifusion.features import spot_features
from hifusion.patch_statistics import standardise, with_neighbours

COMPONENTS = (8, 16, 32, 64, 128)
ALPHAS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
# Components of 4,000 spots take 10 s a fold and core; of more training spots, evenly spaced ones are kept.
SPOTS = 4_000
FOLDS = 5


class _Ridge(NamedTuple):
    """Ridge regression on principal components, the first ``k`` of them for any ``k``."""

    centre: np.ndarray
    """Mean features ``(F,)``."""
    axes: np.ndarray
    """``(F, K)``: scores ``(features - centre) @ axes`` have variance 1 on the training spots."""
    mean: np.ndarray
    """Mean profile ``(G,)``."""
    slopes: np.ndarray
    """``(K, G)``, least squares slopes of the deviations from the mean profile on the scores."""
    strength: np.ndarray
    """``(K,)``, sum of squares of each component on the training spots where that of one spot of the first is 1."""

    def predict(self, features: np.ndarray, components: int, alpha: float) -> np.ndarray:
        # Components are orthogonal, so the penalty only shortens their slopes, those of weak components most.
        shares = (self.strength / (self.strength + alpha))[:components, None]
        return np.asarray(
            self.mean + (features - self.centre) @ self.axes[:, :components] @ (shares * self.slopes[:components])
        )


def fit_features_ridge(train: Sequence[SectionView], encoder: str) -> Predict:
    """Ridge regression on an encoder's features of the spot's surroundings, chosen inside the training sections.

    Features of the whole region and of its centre half, each with its neighbour means (as ``kernel_ridge`` has them of
    the patch statistics), are standardised within each section, which removes stain offset, and turned into principal
    components of the training spots, the first of them of variance 1; the target is the deviation from the training
    mean. The number of components and the penalty are those of :data:`COMPONENTS` and :data:`ALPHAS` with the lowest
    MSE when each training section in turn, each of :data:`FOLDS` groups of more sections, or each quarter of the only
    one, is held out.

    Parameters
    ----------
    encoder
        See :func:`hifusion.encoders.load_encoder`.

    Returns
    -------
    callable
        ``predict(view)`` gives float32 ``(N, G)``. It raises InputError for a section whose measurements the encoder
        was trained on.

    Raises
    ------
    InputError
        No training spot, several panels, a section without region patches, or an encoder that cannot be had.
    """
    target = training_expression(train)
    frozen = load_encoder(encoder)
    blocks = held_out_blocks(train)
    if len(train) > FOLDS:
        blocks = blocks * FOLDS // len(train)
    kept = np.linspace(0, len(target) - 1, min(SPOTS, len(target))).astype(int)
    features = _features_of(train, frozen, kept)
    target, blocks = target[kept], blocks[kept]
    components, alpha = _choose(features, target, blocks)
    ridge = _fit(features, target)

    def predict(view: SectionView) -> np.ndarray:
        if view.name in frozen.trained_on:
            raise InputError(
                f"encoder {encoder} was trained on section {view.name}; use one that was not, or test other sections"
            )
        return ridge.predict(_within_section(view, frozen), components, alpha).astype(np.float32)

    return predict


def _features_of(train: Sequence[SectionView], encoder: Encoder, kept: np.ndarray) -> np.ndarray:
    """Features of the ``kept`` among all training spots, one section in memory at a time."""
    parts, first = [], 0
    for view in train:
        its = kept[(kept >= first) & (kept < first + len(view.expression))] - first
        parts.append(_within_section(view, encoder)[its])
        first += len(view.expression)
    return np.concatenate(parts)


def _within_section(view: SectionView, encoder: Encoder) -> np.ndarray:
    """Features at two fields of view and their neighbour means, standardised within the section, ``(N, 6 C)``."""
    if view.regions is None:
        raise InputError(f"section {view.name} has no region patches; prepare a store with its image and give that")
    side_px = view.regions.shape[1]
    fields = [spot_features(view, encoder, side) for side in (side_px, side_px // 2)]
    features = with_neighbours(view, np.concatenate(fields, axis=1).astype(np.float64))
    return standardise(features)(features)


def _fit(features: np.ndarray, target: np.ndarray) -> _Ridge:
    centre, mean = features.mean(axis=0), target.mean(axis=0)
    centred, spots = features - centre, len(features)
    first = max(spots - COMPONENTS[-1], 0)
    squares, left = scipy.linalg.eigh(centred @ centred.T, subset_by_index=[first, spots - 1])
    real = squares > 1e-9 * max(float(squares[-1]), 1.0)  # what is zero but for rounding is no component
    squares, left = squares[real][::-1], left[:, real][:, ::-1]
    scores = left * np.sqrt(spots)
    strength = spots * squares / squares[:1]
    return _Ridge(centre, centred.T @ (scores / squares), mean, scores.T @ (target - mean) / spots, strength)


def _choose(features: np.ndarray, target: np.ndarray, blocks: np.ndarray) -> tuple[int, float]:
    """Components and penalty with the lowest squared error over held-out blocks; the most cautious without any."""
    names = np.unique(blocks)
    choices = [(components, alpha) for components in COMPONENTS for alpha in ALPHAS]
    if len(names) < 2:
        return COMPONENTS[0], ALPHAS[-1]
    errors = np.zeros(len(choices))
    for name in names:
        held_out = blocks == name
        ridge = _fit(features[~held_out], target[~held_out])
        errors += [np.square(ridge.predict(features[held_out], *choice) - target[held_out]).sum() for choice in choices]
    return choices[int(np.argmin(errors))]
