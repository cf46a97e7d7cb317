"""How far a spot's features lie from those a run was trained on: where its predictions should not be trusted.

Of what was tried on a run trained on one her2st section (Mahalanobis distance, distance to the nearest training spots,
either on all features or on 16 principal components; the fused embedding, the level means, or both), the Mahalanobis
distance of the embedding separated best: docs/slides.md has the table.
"""

from dataclasses import dataclass

import numpy as np
import torch

from hifusion.errors import InputError

HELD_OUT_SHARE = 0.95  # of held-out spots of the training sections have a novelty below 1


@dataclass(frozen=True)
class Novelty:
    """A distance from the training spots, scaled to held-out spots of the same sections.

    Attributes
    ----------
    mean
        float32 ``(C,)``, mean embedding of the training spots.
    factor
        float32 ``(C, C)``: the novelty of an embedding is the length of its deviation from ``mean`` times this.
    """

    mean: np.ndarray
    factor: np.ndarray

    def of(self, embedding: np.ndarray) -> np.ndarray:
        """Novelty of each spot, ``(N, C)`` -> float32 ``(N,)``: at most 1 for 95 % of held-out spots, no upper end."""
        # By torch: numpy's threads would go on spinning beside those of the network, and slow it by a tenth.
        along = torch.from_numpy(embedding - self.mean) @ torch.from_numpy(self.factor)
        return along.norm(dim=1).numpy().astype(np.float32)


def fit_novelty(training: np.ndarray, held_out: np.ndarray) -> Novelty:
    """Fit the distance to training embeddings ``(N, C)`` and set its unit by held-out ones ``(M, C)``.

    Raises
    ------
    InputError
        The embeddings of the training spots do not vary.
    """
    distance = fit_distance(training)
    return in_units_of(distance, distance.of(held_out))


def fit_distance(training: np.ndarray) -> Novelty:
    """The distance to training embeddings ``(N, C)`` in no particular unit; raises as :func:`fit_novelty`.

    The covariance is shrunk towards a multiple of the identity (Ledoit and Wolf, J. Multivariate Analysis 88, 2004):
    with fewer spots than channels it could not be inverted, and a direction no training spot varies in counts most.
    """
    mean = training.mean(axis=0, dtype=np.float64)
    values, directions = np.linalg.eigh(_shrunk_covariance(training - mean))
    if values[0] <= 0:
        raise InputError(
            f"the features of all {len(training)} training spots are the same: the network died; train anew with a "
            "lower learning rate"
        )
    return Novelty(mean.astype(np.float32), (directions / np.sqrt(values)).astype(np.float32))


def in_units_of(distance: Novelty, lengths: np.ndarray) -> Novelty:
    """The distance in the unit that :data:`HELD_OUT_SHARE` of the lengths of held-out spots stay below."""
    unit = np.float32(np.quantile(lengths, HELD_OUT_SHARE))
    return Novelty(distance.mean, distance.factor / unit)


def _shrunk_covariance(deviations: np.ndarray) -> np.ndarray:
    """Ledoit-Wolf estimate from centred rows ``(N, C)``."""
    n, channels = deviations.shape
    sample = deviations.T @ deviations / n
    target = np.trace(sample) / channels * np.eye(channels)
    distance = np.square(sample - target).sum()
    noise = (np.square(deviations).T @ np.square(deviations) / n - np.square(sample)).sum() / n
    share = 1.0 if distance == 0 else min(noise / distance, 1.0)
    return (1 - share) * sample + share * target
