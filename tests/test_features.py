"""Features of windows: the pixels they are of, what is kept on disk and when it is not trusted."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fabricate
from hifusion import store
from hifusion.cohort import Cohort, SectionView
from hifusion.encoders import Encoder
from hifusion.errors import InputError
from hifusion.features import spot_features, window_features
from hifusion.readers import her2st
from hifusion.readers.options import ReadOptions
from hifusion.slide import Slide

CPU = torch.device("cpu")
SIDE_PX = 24
REGION_PX = 48


def pixels_of(side_px: int, encoder_id: str = "pixels") -> Encoder:
    """An encoder whose features are the pixels themselves."""
    return Encoder(encoder_id, "pixels", 3 * side_px**2, (), CPU, lambda region: region.float().flatten(1))


def never(like: Encoder) -> Encoder:
    """The same encoder by its id, that must not be run."""

    def refuse(region: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the encoder was run")

    return replace(like, features=refuse)


def read_from(image: Path, centres_px: np.ndarray, side_px: int, shrink: float) -> np.ndarray:
    """Pixels of the windows as the slide gives them, ``(K, 3 side side)``."""
    with Slide(image) as slide:
        cut = [np.moveaxis(slide.read_patch(x, y, side_px, shrink)[0], -1, 0).ravel() for x, y in centres_px]
    return np.array(cut, dtype=np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate.write_her2st(tmp_path_factory.mktemp("features") / "raw")


@pytest.fixture
def view(root: Path, tmp_path: Path) -> SectionView:
    """Section A1 of a store at native scale, whose cache is empty."""
    return open_view(root, tmp_path / "store", "A1")


def open_view(root: Path, out: Path, name: str, mpp: float | None = None) -> SectionView:
    store.prepare(her2st.read(root, [name], ReadOptions()), out, region_px=REGION_PX, mpp=mpp)
    cohort = Cohort.open(out)
    return cohort.view(name, cohort.panel("top_mean", 5, [name]), "log_share")


def kept_files(view: SectionView) -> list[Path]:
    assert view.cache is not None
    return sorted(path for path in view.cache.rglob("*") if path.is_file())


CENTRES = np.array([[200.0, 180.4], [33.0, 50.0], [-300.0, 10.0], [398.0, 374.0]])


@pytest.mark.parametrize("shrink", [1.0, 1.7, 2.0])
def test_windows_are_what_the_slide_shows_there_white_outside(view: SectionView, shrink: float) -> None:
    view = replace(view, shrink=shrink)
    found = window_features(view, CENTRES, SIDE_PX, pixels_of(SIDE_PX), batch_size=3)
    np.testing.assert_array_equal(found, read_from(view.image, CENTRES, SIDE_PX, shrink))
    assert (found[2] == 255).all() and found.dtype == np.float32


@settings(max_examples=60)
@given(
    region_px=st.integers(1, 20).map(lambda half: 2 * half),
    side_px=st.integers(1, 40),
    shrink=st.one_of(st.sampled_from([1.0, 1.5, 2.0, 3.0, 0.5]), st.floats(0.5, 4)),
    data=st.data(),
)
def test_features_of_spots_are_those_of_the_windows_there(
    root: Path, region_px: int, side_px: int, shrink: float, data: st.DataObject
) -> None:
    """Whether they are cut from the regions or from the slide."""
    assume(round(side_px * shrink) >= 1)
    image = fabricate.image_file(root, "A1")
    places = st.tuples(st.floats(0, fabricate.SIZE_PX[0]), st.floats(0, fabricate.SIZE_PX[1]))
    centres = np.array(data.draw(st.lists(places, min_size=1, max_size=3)))
    with Slide(image) as slide:
        regions = np.stack([slide.read_patch(x, y, region_px, shrink)[0] for x, y in centres])
    view = bare_view(image, centres, regions, shrink)
    found = spot_features(view, pixels_of(side_px), side_px)
    np.testing.assert_array_equal(found, window_features(view, centres, side_px, pixels_of(side_px)))


def bare_view(image: Path | None, centres_px: np.ndarray, regions: np.ndarray | None, shrink: float) -> SectionView:
    return SectionView(
        name="A1",
        patient="A",
        genes=(),
        expression=np.zeros((len(centres_px), 0), dtype=np.float32),
        total_counts=np.ones(len(centres_px)),
        centres_px=centres_px,
        pitch_px=72.0,
        mpp=fabricate.MPP,
        spot_diameter_um=100.0,
        regions=regions,
        image=image,
        shrink=shrink,
    )


@pytest.mark.parametrize("shrink", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("side_px", [REGION_PX, REGION_PX // 2])
def test_the_slide_is_not_needed_where_regions_hold_the_window(shrink: float, side_px: int) -> None:
    regions = np.random.default_rng(0).integers(0, 256, (2, REGION_PX, REGION_PX, 3), dtype=np.uint8)
    view = bare_view(None, np.array([[100.0, 100.0], [200.0, 200.0]]), regions, shrink)
    found = spot_features(view, pixels_of(side_px), side_px)
    start = (REGION_PX - side_px) // 2
    inner = regions[:, start : start + side_px, start : start + side_px]
    np.testing.assert_array_equal(found, np.moveaxis(inner, -1, 1).reshape(2, -1))


def test_a_window_beyond_the_region_is_read_from_the_slide(view: SectionView) -> None:
    side_px = REGION_PX + 8
    found = spot_features(view, pixels_of(side_px), side_px)
    np.testing.assert_array_equal(found, read_from(view.image, view.centres_px, side_px, view.shrink))


def test_a_section_without_a_slide_is_refused(root: Path, tmp_path: Path) -> None:
    view = open_view(root, tmp_path / "store", fabricate.WITHOUT_IMAGE)
    for call in (lambda: window_features(view, CENTRES, 8, pixels_of(8)), lambda: spot_features(view, pixels_of(8), 8)):
        with pytest.raises(InputError, match="section B2 has no slide"):
            call()


def test_a_window_without_pixels_is_refused(view: SectionView) -> None:
    for call in (window_features, lambda v, _, side, enc: spot_features(v, enc, side)):
        with pytest.raises(InputError, match="side_px=0 is not possible"):
            call(view, CENTRES, 0, pixels_of(0))


def test_no_window_is_no_row(view: SectionView) -> None:
    assert window_features(view, np.empty((0, 2)), SIDE_PX, pixels_of(SIDE_PX)).shape == (0, 3 * SIDE_PX**2)


def test_progress_counts_up_to_all_windows(view: SectionView) -> None:
    seen: list[tuple[str, int, int]] = []
    window_features(view, CENTRES, 8, pixels_of(8), batch_size=3, progress=lambda *its: seen.append(its))
    assert seen == [("A1", 3, 4), ("A1", 4, 4)]


def test_what_was_computed_is_not_computed_again(view: SectionView) -> None:
    encoder = pixels_of(SIDE_PX)
    for compute in (
        lambda encoder: window_features(view, CENTRES, SIDE_PX, encoder),
        lambda encoder: spot_features(view, encoder, SIDE_PX),
    ):
        np.testing.assert_array_equal(compute(encoder), compute(never(encoder)))
    assert len(kept_files(view)) == 2


def test_windows_and_regions_at_the_spots_share_one_file(view: SectionView) -> None:
    encoder = pixels_of(SIDE_PX)
    found = spot_features(view, encoder, SIDE_PX)
    np.testing.assert_array_equal(window_features(view, view.centres_px, SIDE_PX, never(encoder)), found)


@pytest.mark.parametrize(
    "change",
    [
        lambda view: (view, CENTRES, SIDE_PX, pixels_of(SIDE_PX, "other")),
        lambda view: (view, CENTRES + [0, 1], SIDE_PX, pixels_of(SIDE_PX)),
        lambda view: (view, CENTRES, SIDE_PX + 1, pixels_of(SIDE_PX + 1)),
        lambda view: (replace(view, shrink=2.0), CENTRES, SIDE_PX, pixels_of(SIDE_PX)),
        lambda view: (replace(view, image_digest="0" * 64), CENTRES, SIDE_PX, pixels_of(SIDE_PX)),
    ],
    ids=["encoder", "centres", "side", "shrink", "image"],
)
def test_whatever_decides_the_features_decides_the_file(view: SectionView, change: Callable) -> None:
    window_features(view, CENTRES, SIDE_PX, pixels_of(SIDE_PX))
    window_features(*change(view))
    assert len(kept_files(view)) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 no array"),
        lambda path: path.write_bytes(b"no array at all"),
        lambda path: np.save(path, np.zeros((3, 5), dtype=np.float32)),
        lambda path: np.save(path, np.zeros((4, 3 * SIDE_PX**2))),
        lambda path: np.savez(path.open("wb"), a=np.zeros(3)),
    ],
    ids=["short", "header cut", "empty", "no zip", "text", "shape", "dtype", "zip"],
)
def test_a_spoilt_file_is_computed_anew(view: SectionView, spoil: Callable[[Path], object]) -> None:
    encoder = pixels_of(SIDE_PX)
    expected = window_features(view, CENTRES, SIDE_PX, encoder)
    (path,) = kept_files(view)
    whole = path.read_bytes()
    spoil(path)
    np.testing.assert_array_equal(window_features(view, CENTRES, SIDE_PX, encoder), expected)
    assert path.read_bytes() == whole


def test_writers_at_the_same_time_leave_one_whole_file(view: SectionView) -> None:
    encoder = pixels_of(SIDE_PX)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: window_features(view, CENTRES, SIDE_PX, encoder), range(16)))
    assert all(np.array_equal(one, found[0]) for one in found) and len(kept_files(view)) == 1


def test_without_a_store_nothing_is_written(view: SectionView) -> None:
    window_features(replace(view, cache=None), CENTRES, SIDE_PX, pixels_of(SIDE_PX))
    assert view.cache is not None and not view.cache.exists()


def test_a_store_with_kept_features_is_still_whole(root: Path, tmp_path: Path) -> None:
    view = open_view(root, tmp_path / "store", "A1")
    spot_features(view, pixels_of(SIDE_PX), SIDE_PX)
    assert open_view(root, tmp_path / "store", "A1").cache == view.cache
