"""Kernel regression: an ordinary Gaussian process, each component with the noise its order on training spots tells."""

import numpy as np

from hifusion.kernel_regression import NOISES, fit_regression


def problem(spots: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    places = random.uniform(0, 10, (spots, 1))
    kernel = np.exp(-((places - places.T) ** 2) / 2)
    return places[:, 0], kernel, random.normal(size=(spots, 2))


def test_what_has_order_is_predicted_and_what_has_none_is_shrunk_to_nothing():
    places, kernel, noise = problem()
    target = np.stack([np.sin(places) + 0.1 * noise[:, 0], noise[:, 1]], axis=1)
    fitted = fit_regression(kernel, target, np.ones(len(places)))
    said = kernel @ fitted.weights
    assert np.corrcoef(said[:, 0], np.sin(places))[0, 1] > 0.99
    assert said[:, 1].std() < 0.25 * target[:, 1].std()


def test_the_mean_is_that_of_a_gaussian_process_averaged_over_noises():
    """Against the textbook's formula, noise by noise, weighed by the marginal likelihood."""
    places, kernel, noise = problem(40)
    target, spread = (np.sin(places) + noise[:, 0])[:, None], np.linspace(0.5, 1.5, 40)
    said, weights = [], []
    for ratio in NOISES:
        full = kernel + ratio * np.diag(spread)
        inverse = np.linalg.inv(full)
        signal = float(target[:, 0] @ inverse @ target[:, 0]) / len(target)
        weights.append(-0.5 * (len(target) * np.log(signal) + np.linalg.slogdet(full)[1]))
        said.append(kernel @ inverse @ target[:, 0])
    share = np.exp(np.array(weights) - max(weights))
    expected = (share / share.sum()) @ np.array(said)
    fitted = fit_regression(kernel, target, spread)
    np.testing.assert_allclose((kernel @ fitted.weights)[:, 0], expected, atol=1e-6)


def test_variance_falls_from_the_signals_to_near_nothing_where_spots_lie():
    places, kernel, noise = problem()
    fitted = fit_regression(kernel, np.sin(places)[:, None] + 0.01 * noise[:, :1], np.ones(len(places)))
    near = 1 - (kernel @ fitted.directions) ** 2 @ fitted.spectrum
    far = 1 - (np.zeros((1, len(places))) @ fitted.directions) ** 2 @ fitted.spectrum
    assert (near > -1e-6).all() and near.mean() < 0.1
    assert far == 1
