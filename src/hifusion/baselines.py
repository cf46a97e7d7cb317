"""Null predictors and simple rivals: the floor that a model has to beat, beside every model (docs: evaluation)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hifusion.cohort import SectionView
from hifusion.errors import InputError
from hifusion.metrics import constant
from hifusion.patch_statistics import patch_statistics, standardise, with_neighbours

Predict = Callable[[SectionView], np.ndarray]

ALPHAS = (30.0, 50.0, 100.0, 200.0, 300.0, 500.0, 1000.0, 2000.0, 3000.0)
KERNEL_WIDTH = 0.1
KERNEL_ALPHA = 1.0
KERNEL_RANK = 20
# A kernel of 10,000 spots takes 0.8 GB and a minute; of more training spots, evenly spaced ones are kept.
KERNEL_SPOTS = 10_000


class Baseline(NamedTuple):
    """A way to predict without a network.

    Attributes
    ----------
    fit
        Training views -> predict; ``predict(view)`` gives float32 ``(N, G)``.
    needs_images
        Whether the views need region patches.
    oracle
        Whether ``predict`` looks at the tested section's own measurements: then it is a yardstick, not a method.
    description
        One line for tables.
    """

    fit: Callable[[Sequence[SectionView]], Predict]
    needs_images: bool
    oracle: bool
    description: str


def fit_train_mean(train: Sequence[SectionView]) -> Predict:
    """The mean profile of all training spots, the same for every spot."""
    mean = training_expression(train).mean(axis=0)
    return lambda view: _flat(mean, view)


def fit_own_mean(train: Sequence[SectionView]) -> Predict:
    """The tested section's own mean profile (oracle): what knowing the section's offset alone is worth."""
    training_expression(train)
    return lambda view: _flat(view.expression.mean(axis=0, dtype=np.float64), view)


def fit_depth(train: Sequence[SectionView]) -> Predict:
    """A line per gene on the log total counts of the tested spot (oracle), fitted on the training spots."""
    target = training_expression(train)
    depth = np.concatenate([_log_depth(view) for view in train])
    mean = target.mean(axis=0)
    centred = depth - depth.mean()
    # Equal depths leave nothing to fit but rounding.
    slope = np.zeros_like(mean) if constant(depth) else centred @ (target - mean) / (centred @ centred)
    return lambda view: (mean + np.outer(_log_depth(view) - depth.mean(), slope)).astype(np.float32)


def fit_ridge(train: Sequence[SectionView]) -> Predict:
    """Ridge regression on the 42 patch statistics, alpha chosen inside the training sections.

    Statistics are standardised on the training spots; the target is the deviation from the training mean. Alpha is the
    one of :data:`ALPHAS` with the lowest MSE when each training section in turn, or each quarter of the only one, is
    held out.
    """
    target = training_expression(train)
    statistics = np.concatenate([patch_statistics(view) for view in train])
    alpha = _choose_alpha(statistics, target, held_out_blocks(train))
    return _ridge_predict(statistics, target, alpha)


def fit_kernel_ridge(train: Sequence[SectionView]) -> Predict:
    """Kernel ridge regression on 126 statistics of the spot and its neighbours: the strong simple rival.

    Statistics are standardised within each section, which removes stain offset. Kernel ``exp(-0.1 x mean squared
    difference)``, alpha 1; deviations from the training mean are projected on their 20 leading right singular vectors.
    """
    target = training_expression(train)
    statistics = np.concatenate([_within_section(view) for view in train])
    if len(target) > KERNEL_SPOTS:
        kept = np.linspace(0, len(target) - 1, KERNEL_SPOTS).astype(int)
        statistics, target = statistics[kept], target[kept]
    mean = target.mean(axis=0)
    deviations = target - mean
    _, _, directions = np.linalg.svd(deviations, full_matrices=False)
    leading = directions[:KERNEL_RANK]
    kernel = _kernel(statistics, statistics)
    kernel[np.diag_indices_from(kernel)] += KERNEL_ALPHA
    weights = np.linalg.solve(kernel, deviations @ leading.T) @ leading
    return lambda view: (mean + _kernel(_within_section(view), statistics) @ weights).astype(np.float32)


BASELINES: dict[str, Baseline] = {
    "train_mean": Baseline(fit_train_mean, False, False, "mean profile of the training spots"),
    "own_mean": Baseline(fit_own_mean, False, True, "mean profile of the tested section itself (oracle)"),
    "depth": Baseline(fit_depth, False, True, "a line per gene on the tested spot's log total counts (oracle)"),
    "ridge": Baseline(fit_ridge, True, False, "ridge regression on 42 colour and texture statistics"),
    "kernel_ridge": Baseline(
        fit_kernel_ridge, True, False, "kernel ridge regression on 126 statistics of the spot and its neighbours"
    ),
}


def training_expression(train: Sequence[SectionView]) -> np.ndarray:
    """Expression of all training spots, float64 ``(sum of N, G)``."""
    if not train or not any(len(view.expression) for view in train):
        raise InputError("a baseline needs at least one training spot; none was given")
    panels = {view.genes for view in train}
    if len(panels) > 1:
        raise InputError("the training sections are seen through different gene panels; use one panel for all of them")
    return np.concatenate([view.expression for view in train]).astype(np.float64)


def _flat(profile: np.ndarray, view: SectionView) -> np.ndarray:
    return np.tile(profile.astype(np.float32), (len(view.expression), 1))


def _log_depth(view: SectionView) -> np.ndarray:
    return np.log1p(view.total_counts)


def held_out_blocks(train: Sequence[SectionView]) -> np.ndarray:
    """The part of the training data each spot is held out with: its section, or its quarter of the only section."""
    if len(train) > 1:
        return np.repeat(np.arange(len(train)), [len(view.expression) for view in train])
    centres = train[0].centres_px
    right = centres[:, 0] > np.median(centres[:, 0])
    lower = np.zeros(len(centres), dtype=bool)
    for side in (right, ~right):
        if side.any():
            lower[side] = centres[side, 1] > np.median(centres[side, 1])
    return 2 * right + lower


def _ridge_predict(statistics: np.ndarray, target: np.ndarray, alpha: float) -> Predict:
    scaled = standardise(statistics)
    mean = target.mean(axis=0)
    weights = next(_ridge_weights(scaled(statistics), target - mean, [alpha]))
    return lambda view: (mean + scaled(patch_statistics(view)) @ weights).astype(np.float32)


def _ridge_weights(features: np.ndarray, deviations: np.ndarray, alphas: Sequence[float]) -> Iterator[np.ndarray]:
    gram, cross = features.T @ features, features.T @ deviations
    for alpha in alphas:
        yield np.linalg.solve(gram + alpha * np.eye(len(gram)), cross)


def _choose_alpha(statistics: np.ndarray, target: np.ndarray, blocks: np.ndarray) -> float:
    """The alpha with the lowest squared error over held-out blocks; the largest where there is nothing to hold out."""
    names = np.unique(blocks)
    if len(names) < 2:
        return ALPHAS[-1]
    errors = np.zeros(len(ALPHAS))
    for name in names:
        held_out = blocks == name
        scaled = standardise(statistics[~held_out])
        mean = target[~held_out].mean(axis=0)
        tested = scaled(statistics[held_out])
        fits = _ridge_weights(scaled(statistics[~held_out]), target[~held_out] - mean, ALPHAS)
        errors += [np.square(mean + tested @ weights - target[held_out]).sum() for weights in fits]
    return ALPHAS[int(np.argmin(errors))]


def _within_section(view: SectionView) -> np.ndarray:
    statistics = with_neighbours(view, patch_statistics(view))
    return standardise(statistics)(statistics)


def _kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    squares = np.square(left).sum(axis=1)[:, None] + np.square(right).sum(axis=1) - 2 * left @ right.T
    return np.exp(-KERNEL_WIDTH / left.shape[1] * np.maximum(squares, 0.0))
