"""A lattice has its pitch, lies on tissue, and leaves out no place that has enough."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree

from fabricate import refused
from hifusion.errors import InputError
from hifusion.lattice import lattice, lattice_section
from hifusion.section import read_section, write_section
from hifusion.slide import Slide
from hifusion.tissue import TissueMask, find_tissue
from stained import MPP, picture, write_picture

KINDS = ("square", "hexagonal")
SIZE_PX = (900, 700)
ALL = TissueMask(np.ones((70, 90), dtype=bool), SIZE_PX, "all of it")


def blobs(seed: int, shape: tuple[int, int] = (35, 45)) -> TissueMask:
    rng = np.random.default_rng(seed)
    mask = np.kron(rng.random((5, 5)) < 0.5, np.ones((7, 9))).astype(bool)[: shape[0], : shape[1]]
    return TissueMask(mask, SIZE_PX, "blobs")


def direct_share(tissue: TissueMask, x: float, y: float, window_px: float) -> float:
    """Share of tissue among the mask pixels whose middle is in the window, or of the one under the centre."""
    (across, down), (height, width) = tissue.shrink, tissue.mask.shape
    columns = (np.arange(-width, 2 * width) + 0.5) * across
    rows = (np.arange(-height, 2 * height) + 0.5) * down
    wide = np.pad(tissue.mask, ((height, height), (width, width)))
    inside = (
        (rows >= y - window_px / 2) & (rows < y + window_px / 2),
        (columns >= x - window_px / 2) & (columns < x + window_px / 2),
    )
    inside[0][height + int(y // down)] = inside[1][width + int(x // across)] = True
    return float(wide[np.ix_(*inside)].mean())


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    pitch_um=st.floats(20, 150),
    window_um=st.floats(1, 200),
    min_tissue=st.floats(0.05, 1),
)
def test_the_lattice_is_every_place_with_enough_tissue_by_direct_count(seed, kind, pitch_um, window_um, min_tissue):
    tissue, step = blobs(seed), pitch_um / 0.5
    try:
        found = lattice(tissue, 0.5, pitch_um=pitch_um, kind=kind, min_tissue=min_tissue, window_um=window_um)
        kept = set(zip(found.array_col.tolist(), found.array_row.tolist(), strict=True))
    except InputError:
        kept = set()
    across, down = (step, step) if kind == "square" else (step / 2, step * 3**0.5 / 2)
    for row in range(int(SIZE_PX[1] / down) + 1):
        for column in range(int(SIZE_PX[0] / across) + 1):
            x, y = step / 2 + column * across, step / 2 + row * down
            if x >= SIZE_PX[0] or y >= SIZE_PX[1] or (kind == "hexagonal" and (row + column) % 2):
                assert (column, row) not in kept
                continue
            share = direct_share(tissue, x, y, window_um / 0.5)
            assume(abs(share - min_tissue) > 1e-9)
            assert ((column, row) in kept) == (share >= min_tissue)


@given(kind=st.sampled_from(KINDS), pitch_um=st.floats(15, 150), mpp=st.floats(0.3, 0.7))
def test_nearest_neighbours_are_a_pitch_apart(kind, pitch_um, mpp):
    found = lattice(ALL, mpp, pitch_um=pitch_um, kind=kind)
    assume(len(found.array_row) > 1 and max(found.array_row.max(), found.array_col.max()) > 1)
    distances = KDTree(found.centres_px).query(found.centres_px, k=2)[0][:, 1] * mpp
    np.testing.assert_allclose(distances, pitch_um, rtol=1e-6)


def test_a_place_of_a_hexagonal_lattice_has_six_neighbours_at_a_pitch():
    found = lattice(ALL, 1.0, pitch_um=50, kind="hexagonal")
    inner = ((found.centres_px > 60) & (found.centres_px < np.array(SIZE_PX) - 60)).all(axis=1)
    distances = KDTree(found.centres_px).query(found.centres_px[inner], k=8)[0]
    np.testing.assert_allclose(distances[:, 1:7], 50)
    assert (distances[:, 7] > 80).all()


def test_hexagonal_array_positions_are_as_in_visium():
    """Rows and columns are both even or both odd, and columns of a row step by 2."""
    found = lattice(ALL, 1.0, pitch_um=50, kind="hexagonal")
    assert ((found.array_row + found.array_col) % 2 == 0).all()
    first_row = found.array_col[found.array_row == 0]
    assert {after - before for before, after in pairwise(first_row.tolist())} == {2}


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_position_is_the_same_place_whatever_the_mask(kind):
    places = {}
    for tissue in (ALL, blobs(1), blobs(2)):
        found = lattice(tissue, 0.5, pitch_um=40, kind=kind)
        for column, row, centre in zip(found.array_col, found.array_row, found.centres_px.tolist(), strict=True):
            assert places.setdefault((column, row), centre) == centre


def test_a_dense_lattice_of_a_large_slide_is_made_whole():
    """100,000 px a side at 0.25 um and a stride of 8 um: 3125 x 3125 places, a quarter of them on tissue."""
    mask = np.zeros((500, 500), dtype=bool)
    mask[:250, 250:] = True
    found = lattice(TissueMask(mask, (100_000, 100_000), "a quarter"), 0.25, pitch_um=8, min_tissue=1.0)
    assert len(found.array_row) == pytest.approx(3125**2 / 4, rel=0.01)
    assert found.centres_px[:, 0].min() >= 50_000 and found.centres_px[:, 1].max() < 50_000


def test_no_tissue_is_told_in_one_line():
    empty = TissueMask(np.zeros((70, 90), dtype=bool), SIZE_PX, "read from mask.png")
    with refused("no place has 50% tissue", "0.0% of the slide", "mask.png"):
        lattice(empty, 1.0, pitch_um=50)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"pitch_um": 0}, "pitch_um=0"),
        ({"pitch_um": float("nan")}, "pitch_um=nan"),
        ({"window_um": -1}, "window_um=-1"),
        ({"min_tissue": 0}, "min_tissue=0"),
        ({"min_tissue": 1.5}, "min_tissue=1.5"),
        ({"kind": "round"}, "kind='round'"),
        ({"pitch_um": 0.1}, "places on this slide"),
    ],
)
def test_what_is_not_possible_is_refused(wrong, words):
    with refused(words):
        lattice(ALL, 1.0, **{"pitch_um": 50, **wrong})


def test_a_lattice_section_keeps_the_contract_and_can_be_written(tmp_path):
    slide = Slide(write_picture(tmp_path / "egg.png", picture()), MPP)
    section = lattice_section(slide, find_tissue(slide), mpp=MPP, pitch_um=100, spot_diameter_um=55, kind="hexagonal")
    write_section(section, tmp_path / "egg.h5ad")
    section = read_section(tmp_path / "egg.h5ad")
    assert section.n_vars == 0 and section.n_obs > 90
    assert section.obs_names[0] == f"{section.obs['array_col'].iloc[0]}x{section.obs['array_row'].iloc[0]}"
    facts = section.uns["hifusion"]
    assert (facts["section"], facts["patient"], facts["pitch_um"]) == ("egg", "egg", 100)
    assert facts["image"] == str(slide.path.resolve())
    assert section.uns["spatial"]["egg"]["scalefactors"]["spot_diameter_fullres"] == pytest.approx(55 / MPP)
