"""A spot unlike the training spots is told, one like them is not."""

import numpy as np
import pytest

from fabricate import refused
from hifusion.novelty import fit_novelty


def embeddings(spots: int, seed: int, channels: int = 24) -> np.ndarray:
    """Draws of one distribution with unequal, correlated channels."""
    mixing = np.random.default_rng(0).normal(size=(channels, channels)) * np.linspace(0.1, 3, channels)
    return (5 + np.random.default_rng(seed).normal(size=(spots, channels)) @ mixing).astype(np.float32)


def test_its_unit_is_the_95th_percentile_of_held_out_spots():
    held_out = embeddings(200, seed=2)
    novelty = fit_novelty(embeddings(300, seed=1), held_out).of(held_out)
    assert novelty.dtype == np.float32 and novelty.shape == (200,)
    assert np.quantile(novelty, 0.95) == pytest.approx(1, abs=1e-3)


def test_spots_of_the_same_kind_stay_below_one_and_others_do_not():
    fitted = fit_novelty(embeddings(300, seed=1), embeddings(100, seed=2))
    same, moved, noise = embeddings(200, seed=3), embeddings(200, seed=4) + 20, np.zeros((5, 24), np.float32)
    assert 0.85 < (fitted.of(same) < 1).mean() < 1
    assert (fitted.of(moved) > 1).all()
    assert (fitted.of(noise) > 1).all()


def test_with_many_channels_it_is_the_mahalanobis_distance():
    """With far more spots than channels the shrinkage vanishes: the classic distance, up to its unit."""
    training, probe = embeddings(20_000, seed=1, channels=4), embeddings(50, seed=2, channels=4)
    deviation = probe - training.mean(axis=0)
    classic = np.sqrt(np.einsum("ij,jk,ik->i", deviation, np.linalg.inv(np.cov(training.T)), deviation))
    found = fit_novelty(training, probe).of(probe)
    np.testing.assert_allclose(found / found.mean(), classic / classic.mean(), rtol=0.02)


def test_fewer_spots_than_channels_are_enough():
    """A direction in which no training spot varies still counts: a step along it is far."""
    training = np.zeros((30, 40), np.float32)
    training[:, :10] = embeddings(30, seed=1, channels=10)
    fitted = fit_novelty(training[:20], training[20:])
    step = training[20:21].copy()
    step[0, 30] += 10
    assert np.isfinite(fitted.of(step)).all()
    assert fitted.of(step)[0] > 2 * fitted.of(training[20:21])[0]


def test_features_that_never_vary_are_refused():
    with refused("20 training spots are the same"):
        fit_novelty(np.ones((20, 3), np.float32), np.ones((4, 3), np.float32))
