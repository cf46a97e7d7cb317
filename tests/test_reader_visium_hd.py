"""Visium HD: bins are summed into squares, each once, and squares lie where their bins lie."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from fabricate import refused
from fabricate_tenx import HD_MPP, hd_centres, write_visium_hd
from fabricate_truth import UNIQUE
from hifusion.readers import find_reader, visium, visium_hd
from hifusion.readers.options import ReadOptions
from hifusion.readers.visium_hd import sum_bins


@pytest.fixture
def root(tmp_path):
    write_visium_hd(tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def binned(root):
    return root / "hd1" / "outs" / "binned_outputs"


def _read(root, bin_um=None, **told):
    return next(iter(visium_hd.read(root, ["hd1"], ReadOptions(bin_um=bin_um, **told))))


def test_small_bins_summed_are_the_large_bins(root, binned):
    """Space Ranger's own 8 um bins and the 2 um bins summed by 4 x 4 are one section."""
    by_8um = _read(root, 8.0)
    (binned / "square_008um").rename(binned / "of_8um")
    by_2um = _read(root, 8.0)
    assert list(by_2um.obs_names) == list(by_8um.obs_names)
    assert by_2um.obs_names[0] == "s_008um_00001_00002-1"
    np.testing.assert_array_equal(by_2um.layers["counts"].toarray(), by_8um.layers["counts"].toarray())
    np.testing.assert_allclose(by_2um.obsm["spatial"], by_8um.obsm["spatial"], atol=1e-6)
    assert by_2um.uns["hifusion"] == by_8um.uns["hifusion"]


@pytest.mark.parametrize("bin_um, folder", [(2.0, "square_002um"), (6.0, "square_002um"), (24.0, "square_008um")])
def test_the_coarsest_bins_that_fill_a_square_are_read(bin_um, folder, root, binned):
    for other in binned.iterdir():
        if other.name != folder:
            (other / "filtered_feature_bc_matrix.h5").write_bytes(b"words")
    section = _read(root, bin_um)
    facts = section.uns["hifusion"]
    assert facts["spot_diameter_um"] == facts["pitch_um"] == bin_um
    row, column = section.obs["array_row"].to_numpy(), section.obs["array_col"].to_numpy()
    np.testing.assert_allclose(section.obsm["spatial"], hd_centres(row, column, int(bin_um)), atol=1e-6)
    whole = _read(root, 8.0) if folder == "square_008um" else section
    assert section.layers["counts"].sum() == whole.layers["counts"].sum()


def test_the_default_is_64_um(root):
    section = _read(root)
    assert section.uns["hifusion"]["pitch_um"] == visium_hd.DEFAULT_BIN_UM == 64
    assert section.n_obs == 2  # 48 um x 64 um that begin at (8, 16) um


@pytest.mark.parametrize("bin_um", [3.0, 2.5, 0.5, -8.0])
def test_squares_that_no_bins_fill_are_refused(bin_um, root):
    with refused("hd1", f"bin_um={bin_um:g}", "2, 8 um"):
        _read(root, bin_um)


def test_roots_may_be_binned_outputs_or_what_holds_it(root, binned):
    for place, name in ((root / "hd1", "hd1"), (root / "hd1" / "outs", "hd1"), (binned, "outs")):
        assert find_reader(place) is visium_hd
        assert visium_hd.names(place) == [name]
    assert visium_hd.names(root) == ["hd1", "hd2"]


def test_a_single_folder_of_bins_is_not_taken_for_visium(binned):
    with refused("Visium HD bins of 8 um", "read it as visium_hd"):
        next(iter(visium.read(binned / "square_008um")))


def test_bins_outside_the_tissue_are_not_summed(root, binned):
    import pandas as pd

    path = binned / "square_008um/spatial/tissue_positions.parquet"
    table = pd.read_parquet(path)
    table["in_tissue"] = (table["barcode"] != "s_008um_00001_00002-1").astype(int)
    table.to_parquet(path)
    assert "s_008um_00001_00002-1" not in _read(root, 8.0).obs_names
    assert _read(root, 8.0).n_obs == 47


def test_bins_that_lie_farther_apart_than_their_folder_says_are_refused(binned, root):
    (binned / "square_008um").rename(binned / "square_004um")
    with refused("square_004um", "bins lie 8.00 um apart", "folder of 4 um bins"):
        _read(root, 4.0)


def test_scale_comes_from_the_array_where_no_file_tells_it(binned, root):
    (binned / "square_008um/spatial/scalefactors_json.json").unlink()
    assert _read(root, 8.0).uns["hifusion"]["mpp"] == pytest.approx(HD_MPP)


def test_a_folder_without_its_files_says_what_it_lacks(binned, root):
    (binned / "square_008um/filtered_feature_bc_matrix.h5").unlink()
    with refused("square_008um", "lacks filtered_feature_bc_matrix.h5"):
        _read(root, 8.0)


def test_halves_that_would_sum_to_a_whole_are_refused(tmp_path):
    write_visium_hd(tmp_path, counts=lambda counts: counts + 0.5)
    with refused("fractional", "whole numbers"):
        _read(tmp_path, 16.0)


BINS = st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=30, unique=True)


@settings(max_examples=60)
@given(bins=BINS, factor=st.integers(1, 5), seed=st.integers(0, 999))
def test_each_bin_counts_once_in_the_square_it_lies_in(bins, factor, seed):
    row, column = np.array(bins).T
    counts = np.random.default_rng(seed).poisson(1.0, (len(bins), 3))
    squares = sum_bins(sp.csr_matrix(counts), row, column, factor)
    expected: dict[tuple[int, int], np.ndarray] = {}
    for r, c, values in zip(row // factor, column // factor, counts, strict=True):
        expected[r, c] = expected.get((r, c), 0) + values
    assert list(zip(squares.row, squares.column, strict=True)) == sorted(expected)
    np.testing.assert_array_equal(squares.counts.toarray(), [expected[key] for key in sorted(expected)])
    assert sp.issparse(squares.counts) and squares.counts.sum() == counts.sum()


@settings(max_examples=60)
@given(bins=BINS, first=st.integers(1, 4), second=st.integers(1, 4), seed=st.integers(0, 999))
def test_squares_summed_again_are_larger_squares(bins, first, second, seed):
    row, column = np.array(bins).T
    counts = sp.csr_matrix(np.random.default_rng(seed).poisson(1.0, (len(bins), 3)))
    once = sum_bins(counts, row, column, first * second)
    half = sum_bins(counts, row, column, first)
    twice = sum_bins(half.counts, half.row, half.column, second)
    np.testing.assert_array_equal(twice.counts.toarray(), once.counts.toarray())
    np.testing.assert_array_equal(twice.row, once.row)
    np.testing.assert_array_equal(twice.column, once.column)


@given(bins=BINS)
def test_squares_of_one_bin_are_the_bins_sorted(bins):
    row, column = np.array(bins).T
    counts = np.arange(1, len(bins) + 1)[:, None]
    squares = sum_bins(sp.csr_matrix(counts), row, column, 1)
    np.testing.assert_array_equal(squares.counts.toarray().ravel(), counts.ravel()[np.lexsort((column, row))])


def test_genes_of_squares_are_those_of_the_matrix(root):
    assert tuple(_read(root, 16.0).var_names) == UNIQUE
