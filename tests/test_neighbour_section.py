"""Expression carried over between sections of a patient: from the right place, and from training sections only."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stained
from fabricate import refused
from hifusion import metrics, neighbour_section, registration
from hifusion.cohort import SectionView
from hifusion.neighbour_section import BANDWIDTHS_UM, fit_neighbour_section
from hifusion.registration import positions_um
from planted import Planted, plant
from views import make_view


def expressed(view: SectionView, true_um: np.ndarray, seed: int) -> SectionView:
    """Genes that follow the place in the tissue (0: a slope, 1: a wave) and one that is noise."""
    rng = np.random.default_rng(seed)
    x, y = (true_um - 1700).T / 400
    signal = np.stack([x, np.sin(2 * y + x), np.zeros(len(x))], axis=1)
    return replace(view, expression=(signal + rng.normal(0, 0.3, signal.shape)).astype(np.float32))


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> list[SectionView]:
    planted: Planted = plant(tmp_path_factory.mktemp("planted"), 35.0, (150.0, -60.0))
    fixed = expressed(planted.fixed, positions_um(planted.fixed), 0)
    moving = expressed(planted.moving, planted.true_um(), 1)
    return [fixed, moving]


def test_expression_is_carried_to_the_same_place_of_a_turned_section(sections):
    train, tested = sections
    prediction = fit_neighbour_section([train])(tested)
    assert prediction.shape == tested.expression.shape and prediction.dtype == np.float32
    assert (metrics.pcc_per_gene(prediction, tested.expression)[:2] > 0.85).all()
    constant = np.square(tested.expression - train.expression.mean(axis=0)).mean(axis=0)
    assert (np.square(prediction - tested.expression).mean(axis=0)[:2] < 0.4 * constant[:2]).all()


def test_noise_is_shrunk_towards_the_mean(sections):
    train, tested = sections
    spread = fit_neighbour_section([train])(tested).std(axis=0) / train.expression.std(axis=0)
    assert spread[2] < 0.35 < 0.6 < spread[:2].min()


def test_measurements_of_the_tested_section_are_not_looked_at(sections):
    train, tested = sections
    blind = replace(
        tested,
        expression=np.zeros_like(tested.expression),
        counts=np.ones_like(tested.expression),
        total_counts=np.zeros(len(tested.total_counts)),
    )
    np.testing.assert_array_equal(fit_neighbour_section([train])(blind), fit_neighbour_section([train])(tested))
    registration._known.clear()  # nor by the registration itself
    np.testing.assert_array_equal(fit_neighbour_section([train])(blind), fit_neighbour_section([train])(tested))


def test_another_patient_gets_the_mean_of_all_training_spots_and_needs_no_registration(sections, monkeypatch):
    monkeypatch.setattr(registration, "register", None)
    other = make_view("Q1", 12)
    train = [sections[0], make_view("R1", 20)]
    expected = np.concatenate([view.expression for view in train]).mean(axis=0)
    np.testing.assert_allclose(fit_neighbour_section(train)(other), np.tile(expected, (12, 1)), rtol=1e-5)


def test_sections_of_other_patients_change_nothing(sections):
    train, tested = sections
    alone, among = (fit_neighbour_section(views)(tested) for views in ([train], [train, make_view("R1", 20)]))
    np.testing.assert_array_equal(alone, among)


def test_two_sections_without_pictures_predict_a_third(sections):
    train, tested = (replace(view, image=None) for view in sections)
    second = replace(train, name="P3", expression=train.expression[:, ::-1].copy())
    second = replace(second, expression=expressed(second, positions_um(second), 3).expression)
    prediction = fit_neighbour_section([train, second])(tested)
    assert (metrics.pcc_per_gene(prediction, tested.expression)[:2] > 0.8).all()


def test_every_spot_of_an_only_section_is_left_out_once(sections):
    train = sections[0]
    parts = neighbour_section._left_out([train])
    left_out = np.concatenate([part.spots_um for part in parts])
    assert sorted(map(tuple, left_out)) == sorted(map(tuple, positions_um(train)))
    for part in parts:
        assert not set(map(tuple, part.positions_um)) & set(map(tuple, part.spots_um))
        np.testing.assert_array_equal(train.expression[part.rows], part.target)


def test_what_is_said_of_left_out_spots_looks_at_the_others_only(sections):
    """A section of two: changing its own expression changes what is said of the other one, and not of itself."""
    one, other = sections[:2]
    changed = replace(other, expression=other.expression[::-1].copy())
    before, after = (neighbour_section.predict_left_out(train) for train in ([one, other], [one, changed]))
    assert not np.array_equal(before[0], after[0])
    # The bandwidth and the shares are chosen on both sections, so they are the same only by hand.
    assert [part.shape for part in before] == [one.expression.shape, other.expression.shape]


def test_the_bandwidth_is_wide_for_what_varies_slowly_and_narrow_for_what_varies_fast():
    column, row = np.meshgrid(np.arange(16), np.arange(16))
    at = np.stack([column.ravel(), row.ravel()], axis=1)
    noise = np.random.default_rng(0).normal(size=(256, 3))
    facts = {"centres_px": at * 25.0, "pitch_px": 25.0, "mpp": stained.MPP}
    chosen = []
    for wavelength, level in ((6.0, 0.05), (60.0, 1.0)):
        signal = np.sin(2 * np.pi * at @ np.array([0.8, 0.6]) / wavelength)[:, None] + level * noise
        view = make_view("P1", 256, regions=None, expression=signal.astype(np.float32), **facts)
        chosen.append(neighbour_section._choose(neighbour_section._left_out([view]), 3)[0])
    assert chosen[0] == BANDWIDTHS_UM[0] < chosen[1]


def test_a_patient_of_one_spot_is_predicted_by_its_mean():
    train = make_view("P1", 1)
    prediction = fit_neighbour_section([train])(make_view("P2", 3))
    np.testing.assert_allclose(prediction, np.tile(train.expression, (3, 1)), rtol=1e-6)


@given(st.integers(0, 1000), st.sampled_from(BANDWIDTHS_UM), st.floats(0, 1e6))
def test_means_stay_within_what_was_measured_however_far_away(seed, bandwidth_um, far_um):
    rng = np.random.default_rng(seed)
    sources, expression, spots = rng.uniform(0, 2000, (30, 2)), rng.normal(size=(30, 2)), rng.uniform(0, 2000, (9, 2))
    (means,) = neighbour_section._around(sources, expression, spots + far_um, [bandwidth_um])
    assert (means >= expression.min(axis=0) - 1e-9).all() and (means <= expression.max(axis=0) + 1e-9).all()


def test_bad_training_sections_are_one_line():
    with refused("none was given"):
        fit_neighbour_section([])
    with refused("different gene panels"):
        fit_neighbour_section([make_view("P1", 4), make_view("P2", 4, genes=("a", "b", "c"))])
