"""Gaussian process regression of a few components, each with a noise of its own: how much of it the picture tells.

The noise of a component is averaged over by its marginal likelihood, so that a component in which the training spots
show no order is not predicted at all. That is what shrinks genes that cannot be read from tissue towards their mean.
"""

from typing import NamedTuple

import numpy as np

NOISES = np.geomspace(0.05, 300, 24)
"""Noise variance in units of the signal's."""


class Regression(NamedTuple):
    """A fitted process: the mean at ``kernel`` ``(N, M)`` is ``kernel @ weights``."""

    weights: np.ndarray
    """``(M, R)``"""
    directions: np.ndarray
    """``(M, M)``; the prior variance less ``(kernel @ directions)^2 @ spectrum`` is what remains of it."""
    spectrum: np.ndarray
    """``(M, R)``"""
    signal: np.ndarray
    """``(R,)``, variance of each component where the kernel is 1."""


def fit_regression(kernel: np.ndarray, target: np.ndarray, noise: np.ndarray) -> Regression:
    """Fit every component.

    Parameters
    ----------
    kernel
        Between training spots, ``(M, M)``.
    target
        Components of their expression, ``(M, R)``, mean about 0.
    noise
        Relative noise variance of each spot, ``(M,)``, mean 1.
    """
    scale = np.sqrt(noise)
    values, vectors = np.linalg.eigh(kernel / scale[:, None] / scale)
    values = np.maximum(values, 0.0)
    along = vectors.T @ (target / scale[:, None])
    sums = values[:, None] + NOISES  # (M, noises)
    signal = np.einsum("mr,ma->ra", along**2, 1 / sums) / len(target)
    likelihood = -0.5 * (len(target) * np.log(np.maximum(signal, 1e-12)) + np.log(sums).sum(axis=0))
    share = np.exp(likelihood - likelihood.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    inverse = np.einsum("ra,ma->mr", share, 1 / sums)
    directions = vectors / scale[:, None]
    return Regression(directions @ (along * inverse), directions, inverse, (share * signal).sum(axis=1))
