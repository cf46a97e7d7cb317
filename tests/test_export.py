"""Exports: every format is opened again by what it is for, and shows the section's own values in the right place."""

import gzip
import json
import sys
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tifffile
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import Point, shape

from fabricate import MPP, PITCH_PX, full_disk, lattice_section, refused
from hifusion import export_raster
from hifusion.export_raster import rasterise
from hifusion.exporting import FEW, FORMATS, export, most_variable
from hifusion.readers import her2st
from hifusion.section import predicted_section, read_section, write_section

N, COLUMNS = 24, 6
GENES = ("KRT8", "ERBB2", 'a"b\\c', "Ünïcödé\u2028")
EACH_FILE = ["s.csv", "s.csv.gz", "s.parquet", "s.geojson", "s.ome.tif"]


def predicted(values: np.ndarray, genes: tuple[str, ...] = GENES) -> AnnData:
    """A predicted section on the lattice of ``lattice_section``."""
    section = lattice_section({"ANY": np.ones(N, dtype=int)}, "A1", COLUMNS)
    return predicted_section(section, values, genes=genes, normalisation="log_share", panel_digest="d", run="r")


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(N, len(GENES))).astype(np.float32)


@pytest.fixture
def section(values):
    return predicted(values)


@pytest.fixture
def path(section, tmp_path):
    write_section(section, tmp_path / "s.h5ad")
    return tmp_path / "s.h5ad"


# Tables


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz", "s.parquet"])
def test_a_table_has_one_row_per_spot_with_its_places_and_genes(name, path, section, values, tmp_path):
    out = export(path, tmp_path / name)
    table = pd.read_parquet(out) if name.endswith("parquet") else pd.read_csv(out, dtype={"spot": str})
    places = ["spot", "x_px", "y_px", "x_um", "y_um", "array_row", "array_col", "section", "patient", "in_tissue"]
    assert table.columns.tolist() == [*places, *GENES]
    assert table["spot"].tolist() == section.obs_names.tolist()
    np.testing.assert_array_equal(table[["x_px", "y_px"]], section.obsm["spatial"])
    np.testing.assert_allclose(table[["x_um", "y_um"]], section.obsm["spatial"] * MPP)
    np.testing.assert_array_equal(table["array_col"], section.obs["array_col"])
    np.testing.assert_array_equal(table[list(GENES)].to_numpy(dtype=np.float32), values)


def test_a_measured_sparse_section_is_written_as_it_is(tmp_path):
    measured = lattice_section({"A": np.arange(N), "B": np.arange(N)[::-1]})
    assert sp.issparse(measured.X)
    write_section(measured, tmp_path / "m.h5ad")
    table = pd.read_csv(export(tmp_path / "m.h5ad", tmp_path / "m.csv"))
    np.testing.assert_array_equal(table[["A", "B"]].to_numpy(dtype=np.float32), measured.X.toarray())


def test_columns_of_obs_stand_before_the_genes(section, tmp_path):
    section.obs["novelty"] = np.linspace(0, 1, N)
    section.layers["sd"] = np.ones((N, len(GENES)), dtype=np.float32)
    write_section(section, tmp_path / "s.h5ad")
    table = pd.read_csv(export(tmp_path / "s.h5ad", tmp_path / "s.csv"))
    assert table.columns.tolist().index("novelty") < table.columns.tolist().index("KRT8")
    np.testing.assert_allclose(table["novelty"], np.linspace(0, 1, N))


def test_a_gene_named_like_a_column_is_prefixed(values, tmp_path):
    made = predicted(values, ("spot", "gene_spot", "x_px", "novelty"))
    made.obs["novelty"] = 0.5
    made.obs["x_um"] = "mine"
    write_section(made, tmp_path / "s.h5ad")
    table = pd.read_csv(export(tmp_path / "s.h5ad", tmp_path / "s.csv"))
    assert table.columns[-6:].tolist() == [
        *("novelty", "obs_x_um"),
        *("gene_gene_spot", "gene_spot", "gene_x_px", "gene_novelty"),
    ]
    np.testing.assert_array_equal(table["gene_gene_spot"].to_numpy(dtype=np.float32), values[:, 0])


def test_the_same_section_gives_the_same_bytes(path, tmp_path):
    for name in ("s.csv.gz", "s.geojson"):
        assert export(path, tmp_path / name).read_bytes() == export(path, tmp_path / f"b{name}").read_bytes()


def test_a_gzipped_table_is_the_plain_one(path, tmp_path):
    plain, packed = export(path, tmp_path / "s.csv"), export(path, tmp_path / "s.csv.gz")
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


# GeoJSON


def features(path) -> list[dict]:
    collection = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert collection["type"] == "FeatureCollection"
    return collection["features"]


def test_geojson_has_a_tile_of_one_pitch_around_each_spot(path, section, tmp_path):
    tiles = features(export(path, tmp_path / "s.geojson"))
    assert [tile["properties"]["name"] for tile in tiles] == section.obs_names.tolist()
    for tile, (x, y) in zip(tiles, section.obsm["spatial"], strict=True):
        square = shape(tile["geometry"])
        assert square.is_valid and square.bounds == pytest.approx((x - 36, y - 36, x + 36, y + 36))
        assert square.area == pytest.approx(PITCH_PX**2)


def test_geojson_holds_what_qupath_reads(path, values, tmp_path):
    for tile, row in zip(features(export(path, tmp_path / "s.geojson")), values, strict=True):
        assert tile["type"] == "Feature" and tile["properties"]["objectType"] == "tile"
        assert tile["properties"]["measurements"] == {
            gene: pytest.approx(float(value), rel=1e-5) for gene, value in zip(GENES, row, strict=True)
        }


def test_geojson_rings_are_closed_and_wind_one_way(path, tmp_path):
    for tile in features(export(path, tmp_path / "s.geojson")):
        (ring,) = tile["geometry"]["coordinates"]
        assert ring[0] == ring[-1] and len(ring) == 5
        assert shape(tile["geometry"]).exterior.is_ccw  # RFC 7946: as x and y grow, whichever way y is drawn


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_geojson_leaves_out_what_is_not_a_number(missing, values, tmp_path):
    values[3, 1] = missing
    write_section(predicted(values), tmp_path / "s.h5ad")
    tiles = features(export(tmp_path / "s.h5ad", tmp_path / "s.geojson"))
    assert "ERBB2" not in tiles[3]["properties"]["measurements"]
    assert len(tiles[3]["properties"]["measurements"]) == len(GENES) - 1
    assert all(len(tile["properties"]["measurements"]) == len(GENES) for tile in tiles[:3])


def test_geojson_measures_numbers_of_obs_and_no_words(section, tmp_path):
    section.obs["novelty"] = np.linspace(0, 1, N)
    section.obs["label"] = "tumour"
    write_section(section, tmp_path / "s.h5ad")
    tiles = features(export(tmp_path / "s.h5ad", tmp_path / "s.geojson", genes=["KRT8"]))
    assert list(tiles[-1]["properties"]["measurements"]) == ["novelty", "KRT8"]
    assert tiles[-1]["properties"]["measurements"]["novelty"] == 1.0


def test_positions_alone_are_tiles_without_measurements(section, tmp_path):
    write_section(section[:, []].copy(), tmp_path / "s.h5ad")
    tiles = features(export(tmp_path / "s.h5ad", tmp_path / "s.geojson"))
    assert len(tiles) == N and all(tile["properties"]["measurements"] == {} for tile in tiles)


# OME-TIFF


def pixel_of(raster_facts: dict[str, float], centres: np.ndarray) -> np.ndarray:
    """(row, column) of the raster pixel that holds each place of the slide."""
    corner = [raster_facts["left_px"], raster_facts["top_px"]]
    return np.floor((centres - corner) / raster_facts["step_px"]).astype(int)[:, ::-1]


def facts_in(tiff: tifffile.TiffFile) -> dict[str, float]:
    entries = tifffile.xml2dict(tiff.ome_metadata)["OME"]["StructuredAnnotations"]["MapAnnotation"]["Value"]["M"]
    known = {entry["K"]: entry["value"] for entry in entries if "value" in entry}
    return {key: float(known[key]) for key in ("left_px", "top_px", "step_px")}


def test_ome_tiff_shows_every_spot_in_its_pixel(path, section, values, tmp_path):
    with tifffile.TiffFile(export(path, tmp_path / "s.ome.tif")) as tiff:
        assert tiff.is_ome and tiff.series[0].axes == "CYX"
        image, facts = tiff.asarray(), facts_in(tiff)
    assert image.dtype == np.float32 and image.shape == (len(GENES), N // COLUMNS, COLUMNS)
    row, column = pixel_of(facts, section.obsm["spatial"]).T
    np.testing.assert_array_equal(image[:, row, column].T, values)


def test_ome_tiff_names_channels_sizes_and_its_place(path, section, tmp_path):
    with tifffile.TiffFile(export(path, tmp_path / "s.ome.tiff", genes=GENES[:3])) as tiff:
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        facts = facts_in(tiff)
    assert [channel["Name"] for channel in pixels["Channel"]] == list(GENES[:3])
    assert pixels["PhysicalSizeX"] == pytest.approx(200) and pixels["PhysicalSizeYUnit"] == "µm"
    assert facts == {"left_px": pytest.approx(-36), "top_px": pytest.approx(-36), "step_px": pytest.approx(72)}
    assert pixels["Plane"][0]["PositionX"] == pytest.approx(-36 * MPP)


def test_ome_tiff_is_nan_where_there_is_no_spot(section, values, tmp_path):
    gone = 8  # inside the lattice
    write_section(section[np.arange(N) != gone].copy(), tmp_path / "s.h5ad")
    image = tifffile.imread(export(tmp_path / "s.h5ad", tmp_path / "s.ome.tif"))
    hole = np.isnan(image[0])
    assert np.argwhere(hole).tolist() == [list(divmod(gone, COLUMNS))]


def test_ome_tiff_keeps_names_that_xml_forbids_readable(values, tmp_path):
    write_section(predicted(values, ("<b>&", "tab\x01", "C", "D")), tmp_path / "s.h5ad")
    with tifffile.TiffFile(export(tmp_path / "s.h5ad", tmp_path / "s.ome.tif")) as tiff:
        channels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]["Channel"]
    assert [channel["Name"] for channel in channels] == ["<b>&", "tab?", "C", "D"]


def test_ome_tiff_has_a_pyramid_of_means(tmp_path):
    side = 150
    numbers = np.random.default_rng(0).poisson(5, side * side)
    write_section(lattice_section({"A": numbers, "B": numbers + 1}, columns=side), tmp_path / "s.h5ad")
    with tifffile.TiffFile(export(tmp_path / "s.h5ad", tmp_path / "s.ome.tif")) as tiff:
        assert len(tiff.pages) == 2, "the levels are SubIFDs of the channels, not channels"
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert [level.shape for level in levels] == [(2, 150, 150), (2, 75, 75), (2, 38, 38)]
    for fine, coarse in pairwise(levels):
        fine = fine[:, : fine.shape[1] // 2 * 2, : fine.shape[2] // 2 * 2]
        means = fine.reshape(2, fine.shape[1] // 2, 2, fine.shape[2] // 2, 2).mean(axis=(2, 4))
        np.testing.assert_allclose(coarse[:, : means.shape[1], : means.shape[2]], means, rtol=1e-5)


def test_a_coarse_pixel_is_nan_only_where_all_four_are():
    level = np.array([[[1, np.nan, np.nan], [3, np.nan, np.nan], [np.nan, 5, 7]]], dtype=np.float32)
    np.testing.assert_array_equal(export_raster._halved(level), [[[2, np.nan], [5, 7]]])


@st.composite
def lattices(draw):
    """Spots of a square or hexagonal lattice, turned, jittered, some of them gone; their pitch."""
    pitch = draw(st.floats(5, 400))
    row, column = np.divmod(np.arange(draw(st.integers(2, 60))), draw(st.integers(1, 9)))
    places = np.stack([column, row], axis=1).astype(float)
    if draw(st.booleans()):
        places = np.stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2], axis=1)
    angle = draw(st.floats(0, np.pi))
    turned = places @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    jittered = turned + rng.uniform(-0.1, 0.1, turned.shape)
    kept = rng.random(len(jittered)) < draw(st.sampled_from([0.5, 1.0]))
    kept[0] = True
    return jittered[kept] * pitch + draw(st.floats(-1e4, 1e5)), pitch


@given(lattices())
def test_any_lattice_keeps_each_spot_in_a_pixel_of_its_own(lattice):
    centres, pitch = lattice
    raster = rasterise(centres, pitch, [str(i) for i in range(len(centres))])
    row, column = pixel_of(raster._asdict(), centres).T
    np.testing.assert_array_equal(raster.spot[row, column], np.arange(len(centres)))
    # Every pixel shows a spot that is near, or none.
    high, wide = raster.spot.shape
    y, x = np.mgrid[:high, :wide]
    middle = np.stack([x, y], axis=-1) * raster.step_px + raster.step_px / 2 + [raster.left_px, raster.top_px]
    shown = raster.spot >= 0
    away = np.linalg.norm(middle[shown] - centres[raster.spot[shown]], axis=1)
    assert away.max() <= export_raster.REACH * pitch * 1.001


def test_a_straight_lattice_takes_one_pixel_per_spot_and_a_hexagonal_one_four_at_most():
    row, column = np.divmod(np.arange(100), 10)
    square = np.stack([column, row], axis=1) * 72.5 + 1000.25
    hexagonal = np.stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2], axis=1) * 72.5
    names = [str(i) for i in range(100)]
    assert rasterise(square, 72.5, names).spot.shape == (10, 10)
    assert rasterise(hexagonal, 72.5, names).step_px == 72.5 / 2


def test_two_spots_at_one_place_are_refused():
    centres = np.array([[0, 0], [100, 0], [100, 0]], dtype=float)
    with refused("spots b and c", "one place"):
        rasterise(centres, 100, ["a", "b", "c"])


def test_ome_tiff_of_positions_alone_is_refused(section, tmp_path):
    write_section(section[:, []].copy(), tmp_path / "s.h5ad")
    with refused("no genes", "predict it first"):
        export(tmp_path / "s.h5ad", tmp_path / "s.ome.tif")


def test_a_raster_that_fills_the_memory_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.setattr(export_raster, "MOST_BYTES", 2 * N * 4)
    with refused("4 genes are too many", "at most 2"):
        export(path, tmp_path / "s.ome.tif")


# What is chosen, what is refused


@pytest.mark.parametrize("name", EACH_FILE)
def test_chosen_genes_come_in_the_order_asked_for_and_once(name, path, values, tmp_path):
    out = export(path, tmp_path / name, genes=["ERBB2", "KRT8", "ERBB2"])
    if name.endswith("geojson"):
        assert list(features(out)[0]["properties"]["measurements"]) == ["ERBB2", "KRT8"]
    elif name.endswith("tif"):
        np.testing.assert_array_equal(tifffile.imread(out)[:, 0, 0], values[0, [1, 0]])
    else:
        table = pd.read_parquet(out) if name.endswith("parquet") else pd.read_csv(out)
        assert table.columns[-2:].tolist() == ["ERBB2", "KRT8"]


def test_of_many_genes_a_viewer_gets_the_most_variable(tmp_path):
    spread = np.linspace(0.1, 3, FEW + 10)
    values = (np.random.default_rng(0).permutation(np.linspace(-1, 1, N))[:, None] * spread).astype(np.float32)
    names = tuple(f"G{i}" for i in range(FEW + 10))
    write_section(predicted(values, names), tmp_path / "s.h5ad")
    tile = features(export(tmp_path / "s.h5ad", tmp_path / "s.geojson"))[0]
    assert list(tile["properties"]["measurements"]) == list(names[10:])
    assert len(pd.read_csv(export(tmp_path / "s.h5ad", tmp_path / "s.csv")).columns) == 10 + FEW + 10


def test_variable_genes_are_the_same_sparse_and_dense():
    counts = np.random.default_rng(0).poisson(np.linspace(0, 9, 40), (N, 40))
    sparse = lattice_section({f"G{i}": column for i, column in enumerate(counts.T)})
    dense = sparse.copy()
    dense.X = sparse.X.toarray()
    assert most_variable(sparse, 7) == most_variable(dense, 7)


def test_a_gene_that_is_not_a_number_everywhere_is_not_the_most_variable(values):
    values[:, 0] = np.nan
    values[0, 1] = np.inf
    assert most_variable(predicted(values * [1, 2, 3, 4]), 3) == list(GENES[1:])


def test_an_unknown_gene_is_told_with_the_nearest(path, tmp_path):
    with refused("gene 'ERB2' is not in", "the nearest of 4: ERBB2, KRT8"):
        export(path, tmp_path / "s.csv", genes=["KRT8", "ERB2"])
    assert not (tmp_path / "s.csv").exists()


def test_an_unknown_gene_of_positions_alone_is_told_plainly(section, tmp_path):
    write_section(section[:, []].copy(), tmp_path / "s.h5ad")
    with refused("gene 'ERBB2'", "the nearest of 0: none"):
        export(tmp_path / "s.h5ad", tmp_path / "s.csv", genes=["ERBB2"])


@pytest.mark.parametrize("name", ["s.xlsx", "s.tif", "s"])
def test_a_suffix_that_says_no_format_is_told_with_all_that_do(name, path, tmp_path):
    with refused(name, ".zarr, .geojson, .ome.tif, .ome.tiff, .csv, .csv.gz, .parquet", "--to"):
        export(path, tmp_path / name)


def test_a_format_can_be_named(path, tmp_path):
    assert len(features(export(path, tmp_path / "tiles.json", to="geojson"))) == N
    with refused("format 'excel' is unknown", ", ".join(FORMATS)):
        export(path, tmp_path / "s.xlsx", to="excel")


def test_a_suffix_counts_in_capitals_too(path, tmp_path):
    assert pd.read_csv(export(path, tmp_path / "S.CSV.GZ"), compression="gzip").shape[0] == N


def test_a_folder_is_no_file_to_write(path, tmp_path):
    (tmp_path / "s.csv").mkdir()
    with refused("s.csv", "is a folder"):
        export(path, tmp_path / "s.csv")


@pytest.mark.parametrize(
    "module, name, extra", [("pyarrow", "s.parquet", "parquet"), ("spatialdata", "s.zarr", "spatialdata")]
)
def test_a_missing_extra_is_named(module, name, extra, path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with refused(f"pip install 'hifusion[{extra}]'"):
        export(path, tmp_path / name)


@pytest.mark.parametrize("name", EACH_FILE)
def test_a_full_disk_leaves_nothing_new_and_the_old_file_whole(name, path, tmp_path):
    (tmp_path / name).write_bytes(b"older")
    with full_disk(200), refused(name, "cannot be written"):
        export(path, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"older"
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted([name, "s.h5ad"])


@pytest.fixture(scope="module")
def real_file(her2st_root, tmp_path_factory):
    path = tmp_path_factory.mktemp("real") / "C3.h5ad"
    write_section(next(her2st.read(her2st_root, ["C3"])), path)
    return path


@pytest.mark.real
def test_real_section_keeps_every_spot_on_the_raster(real_file, tmp_path):
    section, genes = read_section(real_file), ["ERBB2", "KRT19"]
    with tifffile.TiffFile(export(real_file, tmp_path / "C3.ome.tif", genes=genes)) as tiff:
        image, facts = tiff.asarray(), facts_in(tiff)
    row, column = pixel_of(facts, section.obsm["spatial"]).T
    np.testing.assert_array_equal(image[:, row, column].T, section[:, genes].to_df())
    assert np.isfinite(image[0]).sum() == section.n_obs, "one pixel per spot, none twice"


@pytest.mark.real
def test_real_tiles_cover_the_tissue(real_file, tmp_path):
    tiles = features(export(real_file, tmp_path / "C3.geojson"))
    centres = read_section(real_file).obsm["spatial"]
    assert len(tiles) == len(centres) and len(tiles[0]["properties"]["measurements"]) == FEW
    for tile, centre in zip(tiles, centres, strict=True):
        assert shape(tile["geometry"]).contains(Point(centre))
