"""Visium: every variant Space Ranger writes gives one section, and files that do not belong together are refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from fabricate import refused
from fabricate_tenx import (
    NOT_UNDER_TISSUE,
    POSITION_COLUMNS,
    VISIUM_MPP,
    position_lines,
    visium_array,
    write_csv,
    write_h5,
    write_legacy_h5,
    write_mtx,
    write_visium,
)
from fabricate_truth import IDS, SIZE_PX, UNIQUE, write_slide
from hifusion.errors import InputError
from hifusion.readers import find_reader, spaceranger, tenx, visium
from hifusion.readers.assemble import as_picture
from hifusion.readers.options import ReadOptions


@pytest.fixture
def root(tmp_path):
    """A folder of samples ``one`` and ``two``."""
    write_visium(tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def outs(root):
    return root / "one" / "outs"


def _read(root, name="one", **told):
    return next(iter(visium.read(root, [name], ReadOptions(**told))))


def _barcodes_and_counts(outs):
    matrix = tenx.read_matrix(outs / "filtered_feature_bc_matrix.h5")
    return matrix.barcodes, matrix.counts.toarray()


def _equal(section, other):
    assert list(section.obs_names) == list(other.obs_names) and list(section.var_names) == list(other.var_names)
    assert list(section.var["gene_ids"]) == list(other.var["gene_ids"])
    np.testing.assert_array_equal(section.layers["counts"].toarray(), other.layers["counts"].toarray())
    np.testing.assert_array_equal(section.obsm["spatial"], other.obsm["spatial"])


def test_samples_an_outs_folder_and_a_folder_that_holds_one_are_all_known(root):
    assert visium.names(root) == ["one", "two"]
    assert visium.names(root / "one") == visium.names(root / "one" / "outs") == ["one"]
    _equal(_read(root / "one"), _read(root / "one" / "outs"))


@pytest.mark.parametrize("variant", ["gzipped", "plain", "old", "not gzipped in spite of its name"])
def test_matrix_market_gives_the_section_of_hdf5(variant, outs):
    by_h5 = _read(outs)
    barcodes, counts = _barcodes_and_counts(outs)
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    folder = outs / "filtered_feature_bc_matrix"
    write_mtx(folder, counts, barcodes, zipped=variant == "gzipped", old=variant == "old")
    if variant.startswith("not"):
        for path in list(folder.iterdir()):
            path.rename(path.with_name(f"{path.name}.gz"))
    _equal(_read(outs), by_h5)


def test_the_layout_of_one_genome_before_cell_ranger_3_is_read(outs):
    by_v3 = _read(outs)
    barcodes, counts = _barcodes_and_counts(outs)
    write_legacy_h5(outs / "filtered_feature_bc_matrix.h5", counts, barcodes)
    _equal(_read(outs), by_v3)


def test_filtered_is_read_before_raw_and_of_raw_only_spots_under_tissue(outs):
    filtered = _read(outs)
    positions = pd.read_csv(outs / "spatial/tissue_positions_list.csv", header=None)[0].tolist()
    write_h5(outs / "raw_feature_bc_matrix.h5", np.full((len(positions), len(IDS)), 2), positions)
    _equal(_read(outs), filtered)
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    raw = _read(outs)
    assert list(raw.obs_names) == positions[:-NOT_UNDER_TISSUE]
    assert (raw.layers["counts"].toarray() == 2).all()


@pytest.mark.parametrize("file", ["tissue_positions_list.csv", "tissue_positions.csv", "tissue_positions.parquet"])
@pytest.mark.parametrize("header", [True, False])
def test_positions_are_read_by_what_they_hold_whatever_their_file_is_called(file, header, outs):
    """A renamed table with or without header keeps its first barcode."""
    before = _read(outs)
    old = outs / "spatial/tissue_positions_list.csv"
    table = pd.read_csv(old, header=None, names=list(POSITION_COLUMNS))
    old.unlink()
    if file.endswith("parquet"):
        table.to_parquet(outs / "spatial" / file, engine="pyarrow")
    else:
        table.to_csv(outs / "spatial" / file, header=header, index=False)
    positions = spaceranger.read_positions(outs / "spatial" / file)
    assert list(positions.index) == table["barcode"].tolist()
    _equal(_read(outs), before)


def test_file_names_may_begin_with_the_sample(outs):
    before = _read(outs)
    for path in [outs / "filtered_feature_bc_matrix.h5", *(outs / "spatial").iterdir()]:
        path.rename(path.with_name(f"GSM7_{path.name}"))
    section = _read(outs)
    _equal(section, before)
    assert section.uns["spatial"]["one"]["images"]["hires"].shape == (100, 140, 3)


def test_two_matrices_of_one_kind_are_refused(outs):
    data = (outs / "filtered_feature_bc_matrix.h5").read_bytes()
    (outs / "B_filtered_feature_bc_matrix.h5").write_bytes(data)
    with refused(str(outs), "2 matrices", "B_filtered_feature_bc_matrix.h5", "one sample a folder"):
        _read(outs)


def test_a_probe_matrix_is_not_taken_for_genes(outs):
    (outs / "filtered_feature_bc_matrix.h5").rename(outs / "raw_probe_bc_matrix.h5")
    with refused("visium: needs filtered_feature_bc_matrix.h5", "raw_probe_bc_matrix.h5 counts probes, not genes"):
        find_reader(outs)


def test_only_gene_expression_is_kept_and_symbols_are_made_unique(outs):
    section = _read(outs)
    assert tuple(section.var_names) == UNIQUE and tuple(section.var["gene_ids"]) == IDS
    assert section.layers["counts"].max() < 1000  # the antibody has 1000 everywhere


def test_a_matrix_without_genes_is_refused(outs):
    import h5py

    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "r+") as file:
        file["matrix/features/feature_type"][:] = b"Antibody Capture"
    with refused("filtered_feature_bc_matrix.h5", "'Gene Expression'", "Antibody Capture"):
        _read(outs)


@pytest.mark.parametrize("lost", ["matrix/shape", "matrix/features/id", "matrix/features"])
def test_a_matrix_that_lacks_a_part_names_it(lost, outs):
    import h5py

    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "r+") as file:
        del file[lost]
    with refused("filtered_feature_bc_matrix.h5", "not a complete 10x matrix", lost.removeprefix("matrix/")):
        _read(outs)


@pytest.mark.parametrize(
    "part, spoil, words",
    [
        ("indices", lambda v: v + 100, "damaged"),
        ("indptr", lambda v: v[::-1], "damaged"),
        ("barcodes", lambda v: v[:-1], "barcodes for a matrix of"),
        ("shape", lambda v: v + 1, "for a matrix of"),
        ("data", lambda v: v[:-2], "damaged"),
        ("data", lambda v: np.array([b"many"] * len(v)), "no table of counts"),
    ],
)
def test_parts_that_do_not_fit_are_refused(part, spoil, words, outs):
    import h5py

    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "r+") as file:
        values = file[f"matrix/{part}"][()]
        del file[f"matrix/{part}"]
        file[f"matrix/{part}"] = spoil(values)
    with refused("filtered_feature_bc_matrix.h5", words):
        _read(outs)


@pytest.mark.parametrize("file", ["matrix.mtx", "barcodes.tsv", "features.tsv"])
@pytest.mark.parametrize(
    "data", [b"", b"words", b"\xff\xfe\x00", b"%%MatrixMarket matrix array real general\n2 1\n1\n2\n"]
)
def test_a_damaged_matrix_market_file_is_one_line(file, data, outs):
    barcodes, counts = _barcodes_and_counts(outs)
    (outs / "filtered_feature_bc_matrix.h5").unlink()
    write_mtx(outs / "filtered_feature_bc_matrix", counts, barcodes, zipped=False)
    (outs / "filtered_feature_bc_matrix" / file).write_bytes(data)
    with refused(str(outs / "filtered_feature_bc_matrix")):
        _read(outs)
    (outs / "filtered_feature_bc_matrix" / file).unlink()
    with refused(str(outs)):
        _read(outs)


def test_scale_comes_from_the_pitch_where_there_are_no_scale_factors(outs):
    (outs / "spatial/scalefactors_json.json").unlink()
    section = _read(outs)
    assert section.uns["hifusion"]["mpp"] == pytest.approx(VISIUM_MPP, rel=1e-4)
    assert section.uns["spatial"]["one"]["images"] == {}


def test_scale_of_a_turned_array_is_that_of_the_upright_one(outs):
    """Scanners turn slides: the pitch is a length, not a slope of x on columns."""
    path = outs / "spatial/tissue_positions_list.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    write_csv(path, [[*line[:4], line[5], f"{300 - float(line[4]):.3f}"] for line in lines])
    assert _read(outs).uns["hifusion"]["mpp"] == pytest.approx(VISIUM_MPP, rel=1e-4)


def test_positions_in_pixels_of_the_small_picture_are_refused(outs):
    path = outs / "spatial/tissue_positions_list.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    write_csv(path, [[*line[:4], *(str(float(pixel) / 3) for pixel in line[4:])] for line in lines])
    with refused(str(path), "7.5000 um per pixel", "is 195 um, not 65", "one run"):
        _read(outs)


def test_positions_that_do_not_follow_the_array_are_refused(outs):
    path = outs / "spatial/tissue_positions_list.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    pixels = [line[4:] for line in lines][::-1]
    moved = pixels[::2] + pixels[1::2]
    write_csv(path, [[*line[:4], *pixel] for line, pixel in zip(lines, moved, strict=True)])
    with refused(str(path), "do not follow the array"):
        _read(outs)


def test_two_spots_take_the_scale_of_the_scale_factors(outs):
    path = outs / "spatial/tissue_positions_list.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()][:2]
    write_csv(path, lines)
    write_h5(outs / "filtered_feature_bc_matrix.h5", np.ones((2, 6), int), [line[0] for line in lines])
    assert _read(outs).uns["hifusion"]["mpp"] == pytest.approx(VISIUM_MPP)
    (outs / "spatial/scalefactors_json.json").unlink()
    with refused(str(path), "--mpp"):
        _read(outs)
    assert _read(outs, mpp=0.7).uns["hifusion"]["mpp"] == 0.7


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"spot_diameter_fullres": "wide"}', '{"tissue_hires_scalef": -1}'])
def test_bad_scale_factors_are_one_line(text, outs):
    (outs / "spatial/scalefactors_json.json").write_text(text)
    with refused("scalefactors_json.json"):
        _read(outs)


def test_a_slide_of_another_size_is_refused(outs, tmp_path):
    slide = write_slide(tmp_path / "half.png", (SIZE_PX[0] // 2, SIZE_PX[1] // 2))
    with refused("half.png", "210 x 150 px", "420 x 300 px", "full resolution"):
        _read(outs, images={"one": slide})


def test_a_damaged_picture_is_one_line(outs):
    picture = outs / "spatial/tissue_hires_image.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with refused("tissue_hires_image.png", "not a readable image"):
        _read(outs)


def test_the_small_picture_stands_in_where_the_larger_is_missing(outs):
    (outs / "spatial/tissue_hires_image.png").unlink()
    write_slide(outs / "spatial/tissue_lowres_image.png", (42, 30))
    entry = _read(outs).uns["spatial"]["one"]
    assert entry["images"]["hires"].shape == (30, 42, 3)
    assert entry["scalefactors"]["tissue_hires_scalef"] == pytest.approx(0.1)


def test_positions_of_another_section_are_known_by_its_tissue(outs):
    """All arrays share their barcodes, so only the tissue tells sections apart."""
    path = outs / "spatial/tissue_positions_list.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    write_csv(path, [[line[0], str(i % 2), *line[2:]] for i, line in enumerate(lines)])
    with refused("filtered_feature_bc_matrix.h5", "under tissue", "one run"):
        _read(outs)


def test_few_barcodes_without_a_position_are_left_out(outs):
    whole = _read(outs)
    path = outs / "spatial/tissue_positions_list.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    section = _read(outs)
    assert section.n_obs == whole.n_obs - 1 and set(section.obs_names) < set(whole.obs_names)
    path.write_text("".join(lines[4:]))
    with refused("of 40 barcodes 36 are in tissue_positions_list.csv"):
        _read(outs)


def test_visium_hd_bins_are_not_read_as_visium(outs):
    path = outs / "spatial/scalefactors_json.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bin_size_um": 8.0}))
    with refused("Visium HD bins of 8 um", "visium_hd"):
        _read(outs)


POSITIONS = st.lists(
    st.tuples(
        st.text("ACGT", min_size=1, max_size=6),
        st.booleans(),
        st.integers(0, 300),
        st.integers(0, 300),
        st.floats(-1e6, 1e6, width=32),
        st.floats(-1e6, 1e6, width=32),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[0],
)


@settings(max_examples=40)
@given(rows=POSITIONS, header=st.booleans(), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_every_row_of_a_table_of_positions_comes_back(rows, header, end, bom, tmp_path_factory):
    path = tmp_path_factory.mktemp("positions") / "tissue_positions.csv"
    lines = [",".join([b, str(int(t)), str(r), str(c), repr(y), repr(x)]) for b, t, r, c, y, x in rows]
    text = end.join([",".join(POSITION_COLUMNS), *lines] if header else lines) + end
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    positions = spaceranger.read_positions(path)
    assert list(positions.index) == [row[0] for row in rows]
    expected = np.array([(t, r, c, x, y) for _, t, r, c, y, x in rows], dtype=float)
    np.testing.assert_allclose(positions.to_numpy(dtype=float), expected, rtol=1e-12)


@settings(max_examples=60)
@given(text=st.text('01A,.-\t\n\r" eN', max_size=40), data=st.data())
def test_any_text_in_a_table_of_positions_is_read_or_refused_in_one_line(text, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("positions") / "tissue_positions.csv"
    spots = [f"A{i}" for i in range(len(visium_array()[0]))]
    intact = "\n".join(",".join(line) for line in position_lines(spots, header=data.draw(st.booleans()))[:4])
    at = data.draw(st.integers(0, len(intact)))
    path.write_text(intact[:at] + text + intact[at:])
    message = ""
    try:
        positions = spaceranger.read_positions(path)
        assert positions.index.is_unique and np.isfinite(positions[["x", "y"]].to_numpy()).all()
    except InputError as error:
        message = str(error)
    assert "\n" not in message


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, len(IDS))),
    seed=st.integers(0, 99),
    form=st.sampled_from(["v3", "legacy", "mtx"]),
)
def test_any_sparse_table_comes_back_from_every_form(shape, seed, form, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    counts = sp.random(shape[0], len(IDS), 0.4, random_state=seed, data_rvs=lambda n: np.arange(1, n + 1)).toarray()
    counts = counts.astype(int)
    barcodes = [f"B{i}" for i in range(shape[0])]
    path = folder / ("filtered_feature_bc_matrix" + ("" if form == "mtx" else ".h5"))
    if form == "mtx":
        write_mtx(path, counts, barcodes)
    else:
        (write_h5 if form == "v3" else write_legacy_h5)(path, counts, barcodes)
    assert tenx.find_matrix(folder) == Path(path)
    matrix = tenx.read_matrix(path)
    np.testing.assert_array_equal(matrix.counts.toarray(), counts)
    assert matrix.barcodes == barcodes and tuple(matrix.genes) == UNIQUE and tuple(matrix.gene_ids) == IDS


@pytest.mark.parametrize(
    "pixels, expected",
    [
        (np.full((2, 4), 7, np.uint8), 7),
        (np.full((2, 4, 1), 7, np.uint8), 7),
        (np.full((2, 4, 3), 0.4), 102),
        (np.full((2, 4, 3), 102.0), 102),
        (np.full((2, 4, 3), 257 * 9, np.uint16), 9),
        (np.dstack([np.zeros((2, 4, 3), np.uint8), np.full((2, 4), 255, np.uint8)]), 0),
        (np.zeros((2, 4, 4), np.uint8), 255),  # transparent is white, as on a slide
    ],
)
def test_pictures_of_any_kind_become_rgb_bytes(pixels, expected):
    picture = as_picture(pixels, 0.5)
    assert picture.pixels.dtype == np.uint8 and picture.pixels.shape == (2, 4, 3)
    assert (picture.pixels == expected).all()
    assert picture.full_size_px == (8, 4)


def test_a_large_picture_is_made_smaller_and_keeps_the_slides_size():
    picture = as_picture(np.zeros((500, 2000, 3), np.uint8), 0.1)
    assert picture.pixels.shape == (250, 1000, 3) and picture.full_size_px == (20_000, 5_000)
