"""AnnData, HEST-1k and SpatialData: where counts, scale and patients are found, and what is said where they are not."""

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from fabricate import lattice_section, refused
from fabricate_layouts import grid_anndata, write_hest, write_spatialdata
from fabricate_tenx import VISIUM_MPP, visium_array
from fabricate_truth import IDS, SIZE_PX, UNIQUE, barcode, grid_centres, write_slide
from hifusion.readers import anndata_file, find_reader, hest, spatialdata_store
from hifusion.readers.options import ReadOptions
from hifusion.section import predicted_section, write_section

pytestmark = pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")


def _read(path, **told):
    return next(iter(anndata_file.read(path, None, ReadOptions(**told))))


@pytest.fixture
def write(tmp_path):
    """Write the 5 x 7 grid as one file after a change; gives its path."""

    def of(change=lambda data: None):
        data, _ = grid_anndata(0)
        data.uns["spatial"] = {"S": {"images": {}, "scalefactors": {"microns_per_pixel": 5.0}}}
        changed = change(data)
        path = tmp_path / "S.h5ad"
        (data if changed is None else changed).write_h5ad(path)
        return path

    return of


COUNTS = grid_anndata(0)[1]


def _scaled(data):
    data.layers["counts"] = data.X.copy()
    data.X = data.X * 0.5


def _scaled_with_raw(data):
    data.raw = data.copy()
    data.X = data.X.toarray() - 1


@pytest.mark.parametrize(
    "change",
    [
        lambda data: None,
        _scaled,
        _scaled_with_raw,
        lambda data: setattr(data, "X", data.X.toarray()),
        lambda data: setattr(data, "X", sp.csc_matrix(data.X)),
        lambda data: setattr(data, "X", data.X.astype(np.int64)),
    ],
    ids=["X", "layers", "raw", "dense", "csc", "int64"],
)
def test_counts_are_found_wherever_whole_numbers_are(change, write):
    np.testing.assert_array_equal(_read(write(change)).layers["counts"].toarray(), COUNTS)


def test_raw_of_more_genes_brings_its_genes(write):
    def fewer(data):
        few = data[:, :3].copy()
        few.raw = data
        few.X = few.X * 0.1
        return few

    section = _read(write(fewer))
    assert tuple(section.var_names) == UNIQUE and tuple(section.var["gene_ids"]) == IDS


def test_what_was_found_instead_of_counts_is_named(write):
    def log(data):
        data.layers["counts"] = data.X * 0.5
        data.raw = anndata.AnnData(-data.X, obs=data.obs, var=data.var)
        data.X = data.X.toarray() + np.nan

    words = ["layers['counts'] has fractional values", "raw.X has negative values", "X has NaN or infinite values"]
    with refused("S.h5ad", "no raw counts", *words):
        _read(write(log))
    with refused("X has non-numeric values"):
        _read(write(lambda data: setattr(data, "X", data.X.toarray() > 1)))
    with refused("X is not there"):
        _read(write(lambda data: anndata.AnnData(obs=data.obs, var=data.var, obsm=data.obsm)))


def test_positions_that_are_missing_or_flat_are_named(write):
    with refused("lacks obsm['spatial']", "holds nothing"):
        _read(write(lambda data: data.obsm.clear()))
    with refused("obsm['spatial'] is float64 (34, 1)"):
        _read(write(lambda data: data.obsm.update(spatial=grid_centres()[:, :1])))


def test_scale_that_is_missing_asks_for_mpp(write):
    path = write(lambda data: data.uns.clear())
    with refused("S.h5ad", "--mpp"):
        _read(path)
    facts = _read(path, mpp=0.5).uns["hifusion"]
    assert facts["mpp"] == 0.5 and facts["pitch_um"] == 20.0  # 40 px


def _visium(data, **entry):
    """34 spots of a Visium array with its barcodes."""
    row, column, centres = (axis[: data.n_obs] for axis in visium_array())
    data.obs_names = [barcode(i) for i in range(data.n_obs)]
    data.obs["array_row"], data.obs["array_col"] = row, column
    data.obsm["spatial"] = centres
    data.uns["spatial"] = {"S": {"images": {}, **entry}}


def test_visium_is_known_by_its_barcodes_and_measured_by_its_array(write):
    facts = _read(write(_visium)).uns["hifusion"]
    assert facts["mpp"] == pytest.approx(VISIUM_MPP, rel=1e-4)
    assert (facts["spot_diameter_um"], facts["pitch_um"]) == (55, 100)


def test_spot_diameter_of_visium_stands_for_65_um(write):
    def plain(data):
        _visium(data, scalefactors={"spot_diameter_fullres": 26.0}, metadata={"software_version": "spaceranger-1.0.0"})
        data.obs = data.obs[["in_tissue"]]
        data.obs_names = [f"spot{i}" for i in range(data.n_obs)]

    assert _read(write(plain)).uns["hifusion"]["mpp"] == pytest.approx(2.5)


def test_single_cell_barcodes_alone_are_not_visium(write):
    def cells(data):
        _visium(data)
        data.obs = data.obs[["in_tissue"]]

    path = write(cells)
    with refused("--mpp"):
        _read(path)
    assert _read(path, mpp=0.5).uns["hifusion"]["pitch_um"] == pytest.approx(20.0)  # 40 px, not 100 um


def test_bins_of_visium_hd_are_known_by_their_names(write):
    def bins(data):
        data.obs_names = [f"s_008um_{i:05d}_00000-1" for i in range(data.n_obs)]
        data.uns.clear()

    facts = _read(write(bins)).uns["hifusion"]
    assert (facts["mpp"], facts["pitch_um"]) == (pytest.approx(8 / 40), pytest.approx(8.0))


def test_spots_outside_the_tissue_are_left_out(write):
    def under(data, values):
        data.obs["in_tissue"] = values

    assert _read(write(lambda data: under(data, np.arange(data.n_obs) % 2))).n_obs == 17
    with refused("none of 34 spots is under tissue"):
        _read(write(lambda data: under(data, 0)))


def test_array_positions_that_are_not_told_are_the_nearest_on_a_lattice(write):
    section = _read(write(lambda data: setattr(data, "obs", data.obs[[]])))
    told = _read(write())
    for axis in ("array_row", "array_col"):
        np.testing.assert_array_equal(section.obs[axis], told.obs[axis] - told.obs[axis].min())


def test_several_sections_in_a_file_are_refused(write):
    with refused("holds 2 sections", "one section a file"):
        _read(write(lambda data: data.uns.update(spatial={"a": {}, "b": {}})))


def test_symbols_are_taken_where_genes_are_named_by_ids(write):
    def cellxgene(data):
        data.var = pd.DataFrame({"feature_name": ["A", "A", "B", "C", "D", "E"]}, index=pd.Index(IDS))

    section = _read(write(cellxgene))
    assert list(section.var_names) == ["A", "A-1", "B", "C", "D", "E"]
    assert tuple(section.var["gene_ids"]) == IDS


def test_a_picture_in_the_file_is_kept(write):
    picture = np.random.default_rng(0).random((30, 42, 4), dtype=np.float32)
    picture[..., 3] = 1
    entry = {"images": {"lowres": picture}, "scalefactors": {"tissue_lowres_scalef": 0.1, "microns_per_pixel": 5.0}}
    section = _read(write(lambda data: data.uns.update(spatial={"x": entry})))
    kept = section.uns["spatial"]["S"]
    assert kept["images"]["hires"].shape == (30, 42, 3)
    assert np.abs(kept["images"]["hires"] - 255.0 * picture[..., :3]).max() <= 1
    assert kept["scalefactors"]["tissue_hires_scalef"] == pytest.approx(0.1)


def test_a_section_of_hifusion_comes_back_as_it_was(tmp_path):
    section = lattice_section({"A": np.arange(12), "B": np.ones(12, int)}, "C2")
    section.uns["hifusion"]["z"] = 120.0
    section.obs["in_tissue"] = np.arange(12) > 2
    write_section(section, tmp_path / "C2.h5ad")
    back = _read(tmp_path / "C2.h5ad")
    assert back.uns["hifusion"] == section.uns["hifusion"]
    pd.testing.assert_frame_equal(back.obs, section.obs)
    np.testing.assert_array_equal(back.layers["counts"].toarray(), section.layers["counts"].toarray())


def test_positions_alone_are_a_section_and_a_prediction_is_not(tmp_path):
    section = lattice_section({"A": np.arange(12)}, "C2")
    predicted = predicted_section(
        section, np.ones((12, 1)), genes=["A"], normalisation="log_share", panel_digest="d", run="run-1"
    )
    write_section(predicted, tmp_path / "C2.h5ad")
    with refused("C2.h5ad", "is a prediction by run-1"):
        _read(tmp_path / "C2.h5ad")
    alone = section[:, []].copy()
    del alone.layers["counts"]
    write_section(alone, tmp_path / "C2.h5ad")
    back = _read(tmp_path / "C2.h5ad")
    assert back.shape == (12, 0) and "counts" not in back.layers


def test_a_matrix_that_points_outside_itself_is_refused_before_it_is_used(write):
    """To compute with such a matrix kills the process."""
    import h5py

    path = write()
    with h5py.File(path, "r+") as file:
        file["X/indices"][3] = 2**30
    with refused("S.h5ad", "cannot be read as .h5ad"):
        _read(path)


# HEST-1k


@pytest.fixture
def study(tmp_path):
    write_hest(tmp_path / "hest")
    return tmp_path / "hest"


def _hest(root, **told):
    return next(iter(hest.read(root, ["SPA1"], ReadOptions(**told))))


def _tell(root, **facts):
    path = root / "metadata/SPA1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_the_estimated_pixel_size_stands_before_the_embedded_one(study):
    assert _hest(study).uns["hifusion"]["mpp"] == 5.0
    _tell(study, pixel_size_um_estimated=None)
    assert _hest(study).uns["hifusion"]["mpp"] == pytest.approx(352.8)  # a print's dpi, all that is left
    _tell(study, pixel_size_um_embedded=float("nan"))
    assert _hest(study).uns["hifusion"]["mpp"] == pytest.approx(100 / 20)  # spot_diameter over spot_diameter_fullres
    _tell(study, spot_diameter=None)
    with refused("SPA1.h5ad", "pixel_size_um_estimated", "--mpp"):
        _hest(study)


@pytest.mark.parametrize("told", [2.0, None, float("nan")])
def test_pooled_squares_have_the_pitch_they_are_measured_at(told, study):
    """Visium HD is pooled while its metadata say 2 um, Xenium while they say nothing."""
    _tell(study, inter_spot_dist=told, spot_diameter=told)
    facts = _hest(study).uns["hifusion"]
    assert facts["pitch_um"] == facts["spot_diameter_um"] == pytest.approx(200.0)


def test_patients_of_two_data_sets_are_two_though_both_are_patient_1(study):
    path = study / "metadata/SPA2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset_title": "Other"}))
    patients = [section.uns["hifusion"]["patient"] for section in hest.read(study)]
    assert patients == ["Study: Patient 1", "Other: Patient 1"]
    _tell(study, patient=None)
    assert _hest(study).uns["hifusion"]["patient"] == "SPA1"


def test_metadata_may_be_one_table(study):
    shutil.rmtree(study / "metadata")
    with refused("SPA1.h5ad", "HEST_*.csv"):
        _hest(study)
    (study / "HEST_v1_1_0.csv").write_text(
        'dataset_title,id,patient,inter_spot_dist,spot_diameter,pixel_size_um_estimated\n"A, b",SPA1,P3,200,100,4.5\n'
    )
    facts = _hest(study, mpp=None).uns["hifusion"]
    assert (facts["mpp"], facts["patient"]) == (4.5, "A, b: P3")


def test_metadata_that_are_no_json_are_one_line(study):
    (study / "metadata/SPA1.json").write_text("{")
    with refused("SPA1.json", "not a JSON file"):
        _hest(study)
    (study / "metadata/SPA1.json").write_text("[1]")
    with refused("SPA1.json", "no facts by name"):
        _hest(study)


def test_a_section_without_its_slide_is_counts_only(study):
    shutil.rmtree(study / "wsis")
    section = _hest(study)
    assert section.uns["hifusion"]["image"] == ""
    assert section.uns["spatial"]["SPA1"]["images"]["hires"].shape == (100, 140, 3)


def test_hest_is_known_before_a_folder_of_anndata(study):
    assert find_reader(study) is hest and find_reader(study / "st") is anndata_file


# SpatialData


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("spatialdata")
    return root, write_spatialdata(root)


def test_a_store_itself_and_a_folder_of_stores_are_known(store):
    root, truths = store
    assert spatialdata_store.names(root / "store.zarr") == spatialdata_store.names(root) == sorted(truths)


def test_positions_are_scaled_up_to_a_larger_scan_of_the_stored_image(store, tmp_path):
    root, truths = store
    slide = write_slide(tmp_path / "scan.png", (4 * SIZE_PX[0], 4 * SIZE_PX[1]))
    section = next(iter(spatialdata_store.read(root, ["store_a"], ReadOptions(images={"store_a": slide}))))
    np.testing.assert_allclose(section.obsm["spatial"], 4 * truths["store_a"].centres, atol=0.01)
    assert section.uns["hifusion"]["mpp"] == pytest.approx(VISIUM_MPP / 4, rel=1e-4)
    told = ReadOptions(images={"store_a": slide}, mpp=0.5)
    assert next(iter(spatialdata_store.read(root, ["store_a"], told))).uns["hifusion"]["mpp"] == 0.5
    other = write_slide(tmp_path / "other.png", (4 * SIZE_PX[0], 3 * SIZE_PX[1]))
    with refused("other.png", "of other proportions"):
        next(iter(spatialdata_store.read(root, ["store_a"], ReadOptions(images={"store_a": other}))))


def test_a_store_whose_shapes_are_gone_is_one_line(store, tmp_path):
    root = shutil.copytree(store[0], tmp_path / "copy")
    shutil.rmtree(root / "store.zarr/shapes/a")
    with refused("store.zarr", "shapes a", "one shape for each row"):
        next(iter(spatialdata_store.read(root, ["store_a"])))


def test_the_extra_that_is_missing_is_named(store, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "spatialdata", None)
    with refused("pip install 'hifusion[spatialdata]'"):
        next(iter(spatialdata_store.read(store[0])))


def _labelled(data):
    data.obs["label"] = ["tumour", None] + ["stroma"] * (data.n_obs - 2)


def _numbered(data):
    data.obs["label"] = np.arange(data.n_obs)


def test_words_that_label_spots_are_kept_and_numbers_are_none(write):
    labels = _read(write(_labelled)).obs["label"]
    assert labels.iloc[[0, -1]].tolist() == ["tumour", "stroma"] and labels.isna().sum() == 1
    assert "label" not in _read(write(_numbered)).obs
