"""Ridge regression on an encoder's features: what it computes, what it refuses, and that it finds a planted pattern."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hifusion import features_ridge, metrics, store
from hifusion.baselines import fit_train_mean
from hifusion.cohort import Cohort, SectionView
from hifusion.encoders import Encoder
from hifusion.errors import InputError
from hifusion.features import spot_features
from hifusion.features_ridge import FOLDS, fit_features_ridge
from hifusion.patch_statistics import with_neighbours
from hifusion.readers import her2st
from views import fit_small

REGION_PX = 32
MPP = 0.69
PITCH_PX = 200 / MPP


def section(seed: int, n_spots: int = 60, stain: float = 0.0) -> SectionView:
    """A section whose spots are dark where a planted pattern is high; genes 0 and 1 follow the pattern, 2 is noise."""
    random = np.random.default_rng(seed)
    grid = np.stack(np.divmod(np.arange(n_spots), 8), axis=1)
    pattern = np.sin(grid @ np.array([0.9, 0.4]) + random.uniform(0, 6))
    expression = np.stack([pattern, -2 * pattern, 0 * pattern], axis=1) + random.normal(0, 0.2, (n_spots, 3)) - 4
    pixels = 170 - 40 * pattern[:, None, None, None] - stain + random.normal(0, 12, (n_spots, REGION_PX, REGION_PX, 3))
    return SectionView(
        name=f"S{seed}",
        patient="P",
        genes=("a", "b", "c"),
        expression=expression.astype(np.float32),
        total_counts=np.full(n_spots, 1000.0),
        centres_px=grid * PITCH_PX,
        pitch_px=PITCH_PX,
        mpp=MPP,
        spot_diameter_um=100.0,
        regions=np.clip(pixels, 0, 255).astype(np.uint8),
    )


def colours(trained_on: tuple[str, ...] = ()) -> Encoder:
    """A quick encoder: mean, spread and extremes of each channel."""

    def features(region: torch.Tensor) -> torch.Tensor:
        pixels = region.float().flatten(2)
        return torch.cat([pixels.mean(2), pixels.std(2), pixels.amin(2), pixels.amax(2)], dim=1)

    return Encoder("colours", "colours", 12, trained_on, torch.device("cpu"), features)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder named "colours" is known."""
    monkeypatch.setattr(features_ridge, "load_encoder", lambda spec: colours())


def mse(train: Sequence[SectionView], view: SectionView, encoder: str = "colours") -> float:
    return float(np.square(fit_features_ridge(train, encoder)(view) - view.expression).mean())


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("seeds", [[0], [0, 1], range(3, 4 + FOLDS)], ids=["one", "two", "more than the folds"])
def test_it_finds_a_planted_pattern_in_another_section(seeds: list[int]) -> None:
    train, view = [section(seed) for seed in seeds], section(2, 45)
    prediction = fit_features_ridge(train, "colours")(view)
    assert prediction.shape == (45, 3) and prediction.dtype == np.float32
    assert (metrics.pcc_per_gene(prediction, view.expression)[:2] > 0.8).all()
    assert mse(train, view) < 0.5 * np.square(fit_train_mean(train)(view) - view.expression).mean()


@pytest.mark.slow
def test_an_untrained_network_finds_it_too() -> None:
    view = section(2, 45)
    assert (metrics.pcc_per_gene(fit_features_ridge([section(0)], "resnet18")(view), view.expression)[:2] > 0.6).all()


@pytest.mark.usefixtures("quick")
def test_it_does_not_look_at_the_tested_measurements() -> None:
    view = section(2)
    predict = fit_features_ridge([section(0)], "colours")
    blind = replace(view, expression=np.zeros_like(view.expression), total_counts=np.zeros_like(view.total_counts))
    np.testing.assert_array_equal(predict(blind), predict(view))


@pytest.mark.usefixtures("quick")
def test_a_darker_stain_does_not_mislead_it() -> None:
    train = [section(0), section(1)]
    assert mse(train, section(2, stain=45.0)) < 1.3 * mse(train, section(2))


def textbook(train: Sequence[SectionView], view: SectionView, components: int, alpha: float) -> np.ndarray:
    """The same by singular values and least squares with the penalty as extra rows."""

    def standardised(its: SectionView) -> np.ndarray:
        fields = [spot_features(its, colours(), side) for side in (REGION_PX, REGION_PX // 2)]
        values = with_neighbours(its, np.concatenate(fields, axis=1).astype(np.float64))
        return (values - values.mean(axis=0)) / values.std(axis=0)

    x, y = (np.concatenate(parts) for parts in ([standardised(its) for its in train], [v.expression for v in train]))
    _, sizes, axes = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    axes = axes[:components].T / sizes[0] * np.sqrt(len(x))
    scores, k = (x - x.mean(axis=0)) @ axes, axes.shape[1]
    rows = np.vstack([scores, np.sqrt(alpha) * np.eye(k)])
    slopes = np.linalg.lstsq(rows, np.vstack([y - y.mean(axis=0), np.zeros((k, 3))]), rcond=None)[0]
    return y.mean(axis=0) + (standardised(view) - x.mean(axis=0)) @ axes @ slopes


@pytest.mark.usefixtures("quick")
def test_it_is_ridge_regression_on_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    train, view = [section(0), section(1)], section(2)
    for components, alpha in ((8, 30.0), (64, 300.0)):
        monkeypatch.setattr(features_ridge, "COMPONENTS", (components,))
        monkeypatch.setattr(features_ridge, "ALPHAS", (alpha,))
        expected = textbook(train, view, components, alpha)
        np.testing.assert_allclose(fit_features_ridge(train, "colours")(view), expected, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("quick")
def test_it_shrinks_to_the_mean_where_images_tell_nothing() -> None:
    real, order = section(0), np.random.default_rng(0).permutation(60)
    shuffled = replace(real, expression=real.expression[order])
    spread = [fit_features_ridge([its], "colours")(section(2))[:, :2].std(axis=0).mean() for its in (real, shuffled)]
    assert spread[1] < 0.3 * spread[0]


@pytest.mark.usefixtures("quick")
def test_of_many_training_spots_evenly_spaced_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    train = [section(0), section(1)]
    all_spots = fit_features_ridge(train, "colours")(section(2))
    monkeypatch.setattr(features_ridge, "SPOTS", 50)
    some = fit_features_ridge(train, "colours")(section(2))
    assert not np.array_equal(some, all_spots)
    assert (metrics.pcc_per_gene(some, section(2).expression)[:2] > 0.7).all()


@pytest.mark.usefixtures("quick")
def test_one_training_spot_gives_its_own_profile() -> None:
    one = section(0, 1)
    np.testing.assert_allclose(fit_features_ridge([one], "colours")(section(2)), np.tile(one.expression, (60, 1)), 1e-6)


@pytest.mark.usefixtures("quick")
def test_bad_training_sections_are_one_line() -> None:
    with pytest.raises(InputError, match="none was given"):
        fit_features_ridge([], "colours")
    with pytest.raises(InputError, match="different gene panels"):
        fit_features_ridge([section(0), replace(section(1), genes=("a", "b", "d"))], "colours")
    with pytest.raises(InputError, match="section S0 has no region patches"):
        fit_features_ridge([replace(section(0), regions=None)], "colours")


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(InputError, match="encoder 'colours' is unknown"):
        fit_features_ridge([section(0)], "colours")


def test_a_section_the_encoder_was_trained_on_is_not_predicted(tmp_path: Path) -> None:
    run = str(fit_small(tmp_path / "run").root)
    predict = fit_features_ridge([section(0)], run)
    assert np.isfinite(predict(section(2))).all()
    for name in ("A1", "C1"):
        with pytest.raises(InputError, match=f"was trained on section {name}"):
            predict(replace(section(2), name=name))


@pytest.mark.slow
@pytest.mark.real
def test_it_beats_the_training_mean_across_a_real_tumour(her2st_root: Path, tmp_path: Path) -> None:
    """Trained on the left half of C3 by an untrained network, tested on the right half."""
    store.prepare(her2st.read(her2st_root, ["C3"]), tmp_path / "store", region_px=96)
    cohort = Cohort.open(tmp_path / "store", verify=False)
    view = cohort.view("C3", cohort.panel("top_mean", 250, ["C3"]), "log_share")
    right = view.centres_px[:, 0] > np.median(view.centres_px[:, 0])
    train, test = (_part(view, rows) for rows in (~right, right))
    assert mse([train], test, "resnet18") < np.square(fit_train_mean([train])(test) - test.expression).mean()


def _part(view: SectionView, rows: np.ndarray) -> SectionView:
    return replace(view, expression=view.expression[rows], centres_px=view.centres_px[rows], regions=view.regions[rows])
