"""Sections laid on each other: maps that are known are found again, the error is told, and what cannot be is said."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stained
from fabricate import refused
from hifusion import registration
from hifusion.cohort import Cohort, SectionView
from hifusion.registration import SCALES, Registration, common_frame, positions_um, register
from hifusion.registration_picture import draw_registration
from planted import PITCH_PX, Planted, plant, without_pictures
from views import make_view

# (degrees, shift in um, scale)
MAPS = {"turned": (25.0, (120.0, -80.0), 1.0), "stretched": (-100.0, (-60.0, 40.0), 1.06)}


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("turned"), *MAPS["turned"])


@pytest.fixture(scope="module")
def found(turned: Planted) -> Registration:
    return register(turned.moving, turned.fixed)


def errors_um(found: Registration, planted: Planted) -> np.ndarray:
    return np.linalg.norm(found.moved(positions_um(planted.moving)) - planted.true_um(), axis=1)


@pytest.mark.parametrize("name", MAPS)
def test_a_known_map_is_found_to_a_pixel_of_the_registration(name, tmp_path):
    planted = plant(tmp_path, *MAPS[name])
    found = register(planted.moving, planted.fixed)
    assert errors_um(found, planted).max() < registration.FINE_UM
    assert found.doubts == ()


def test_two_runs_give_the_same_map(turned, found):
    again = register(turned.moving, turned.fixed)
    np.testing.assert_array_equal(again.matrix, found.matrix)
    assert again.there_and_back_um == found.there_and_back_um


def test_expression_is_not_looked_at(turned, found):
    blank = {"expression": np.zeros((1, 3)), "counts": None, "total_counts": np.zeros(1)}
    again = register(replace(turned.moving, **blank), replace(turned.fixed, **blank))
    np.testing.assert_array_equal(again.matrix, found.matrix)


def test_the_error_is_told(found):
    assert found.dice.before < 0.9 < 0.97 < found.dice.after
    assert found.similarity.after > 0.8 > found.similarity.before
    assert found.there_and_back_um.median <= found.there_and_back_um.most < 20
    # No place is farther than half a diagonal of the lattice from its nearest spot, but at the edge.
    assert 0 < found.nearest_spot_um.median < PITCH_PX * stained.MPP / np.sqrt(2)
    assert found.off_tissue_um.median == 0
    assert (found.moving, found.fixed) == ("P2", "P1") and "optical density" in found.method


def test_positions_alone_are_registered_by_their_outline(turned):
    outlines = without_pictures(turned)
    found = register(outlines.moving, outlines.fixed)
    assert np.median(errors_um(found, outlines)) < 0.5 * stained.PITCH_UM
    assert "outline" in found.method and np.isnan(found.similarity.after)
    assert found.dice.after > 0.9


def test_one_picture_and_one_section_without_are_registered_by_outline(turned):
    found = register(replace(turned.moving, image=None), turned.fixed)
    assert np.median(errors_um(found, turned)) < 0.5 * stained.PITCH_UM
    assert "outline" in found.method


def test_a_section_face_down_is_found_only_where_asked_for(tmp_path):
    planted = plant(tmp_path, 40.0, flip=True)
    assert errors_um(register(planted.moving, planted.fixed, mirror=True), planted).max() < registration.FINE_UM
    assert np.linalg.det(register(planted.moving, planted.fixed).matrix[:, :2]) > 0


def test_a_scale_beyond_the_limits_is_refused_and_said(tmp_path):
    planted = plant(tmp_path, 0.0, scale=1.5)
    found = register(planted.moving, planted.fixed)
    np.testing.assert_allclose(np.linalg.svd(found.matrix[:, :2], compute_uv=False), 1, atol=1e-6)
    assert "rigid map, since the affine one scales by" in found.method
    assert planted.matrix[0, 0] > SCALES[1]
    assert any("overlap" in doubt for doubt in found.doubts)


def test_tissues_of_other_shapes_are_doubted():
    row, block = np.stack([np.arange(36), np.zeros(36)], axis=1), np.stack(np.divmod(np.arange(36), 6), axis=1)
    views = [make_view(f"P{i}", 36, regions=None, centres_px=at * 40.0) for i, at in enumerate((row, block))]
    found = register(*views)
    assert any("overlap" in doubt for doubt in found.doubts)


@pytest.mark.parametrize("spots", [1, 2])
def test_few_spots_give_a_map_all_the_same(spots):
    for mpp in (5.0, 0.2):  # spots 200 and 8 um apart
        found = register(*(make_view(name, spots, regions=None, mpp=mpp) for name in ("P1", "P2")))
        assert np.isfinite(found.matrix).all()


def test_the_common_frame_is_the_first_sections(turned):
    first, second = common_frame([turned.fixed, turned.moving])
    np.testing.assert_array_equal(first, positions_um(turned.fixed))
    assert np.linalg.norm(second - turned.true_um(), axis=1).max() < registration.FINE_UM


def test_a_common_frame_of_nothing_is_refused():
    with refused("at least one section"):
        common_frame([])


def test_a_missing_simpleitk_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with refused("SimpleITK", "pip install 'hifusion[registration]'"):
        register(make_view("P1", 4), make_view("P2", 4))


@given(st.floats(-180, 180), st.floats(-5000, 5000), st.floats(-5000, 5000))
def test_fit_is_perfect_under_the_true_map_and_the_same_for_any_frame(degrees, right, down):
    """A picture against itself, moved: the map that brings it back has Dice 1, whatever the frame."""
    rng = np.random.default_rng(0)
    mask = np.zeros((20, 30), dtype=bool)
    mask[4:15, 5:22] = True
    grey = rng.random(mask.shape).astype(np.float32)
    here = registration._Picture(mask, grey, np.full(2, 64.0), np.zeros(2))
    there = replace(here, first_um=np.array([right, down]))
    back = np.array([[1, 0, right], [0, 1, down], [0, 0, 1.0]])
    dice, similarity = registration._fit(here, there, back)
    assert dice == pytest.approx(1) and similarity == pytest.approx(1)
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    assert registration._fit(here, here, turn)[0] <= 1 + 1e-9


def test_a_registration_is_drawn(turned, found, tmp_path):
    out = draw_registration(found, turned.moving, turned.fixed, tmp_path / "laid.png")
    assert out.stat().st_size > 10_000
    outlines = without_pictures(turned)
    assert draw_registration(found, outlines.moving, outlines.fixed, tmp_path / "spots.svg").exists()
    with refused("cannot be drawn to"):
        draw_registration(found, turned.moving, turned.fixed, tmp_path / "laid.txt")


@pytest.mark.slow
@pytest.mark.real
def test_consecutive_sections_of_a_tumour_are_brought_together(her2st_root):
    names = ["C2", "C3", "C5"]
    cohort = Cohort.open(her2st_root, names)
    panel = cohort.panel("top_mean", 5, names)

    def view(name: str) -> SectionView:
        image = Path(cohort.sections[name].uns["hifusion"]["image"])
        return replace(cohort.view(name, panel, "log_share"), image=image)

    moving = view("C2")
    for name in names[1:]:
        found = register(moving, view(name))
        assert found.doubts == ()
        assert found.dice.before < 0.3 and found.dice.after > 0.95
        assert found.there_and_back_um.most < 50  # a quarter of the pitch
        assert found.nearest_spot_um.most < 200
