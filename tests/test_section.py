"""A section keeps its contract, on disk as in memory, and bad tables never become one."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from fabricate import MPP, contents, full_disk, lattice_section, refused
from hifusion.expression import log1p_cpm
from hifusion.section import build_section, predicted_section, read_section, validate_section, write_section

COUNTS = np.random.default_rng(0).poisson(2, (12, 5))
PICTURE = np.random.default_rng(1).integers(0, 256, (50, 100, 3), dtype=np.uint8)


def _build(counts=COUNTS, **changes):
    n_spots, n_genes = counts.shape
    facts = {
        "genes": [f"G{i}" for i in range(n_genes)],
        "spots": [f"{i}x1" for i in range(n_spots)],
        "centres_px": np.arange(2.0 * n_spots).reshape(-1, 2),
        "name": "C2",
        "patient": "C",
        "mpp": MPP,
        "spot_diameter_um": 100.0,
        "pitch_um": 200.0,
        "array_row": np.ones(n_spots, dtype=int),
        "array_col": np.arange(n_spots),
        "source": "table.tsv",
    }
    return build_section(counts, **(facts | changes))


@pytest.fixture
def section():
    return _build(thumbnail=PICTURE, full_size_px=(1000, 500))


def test_built_section_keeps_the_contract(section):
    assert list(section.obs.columns) == ["section", "patient", "in_tissue", "array_row", "array_col"]
    assert section.obs["in_tissue"].dtype == bool
    assert (section.obs["section"] == "C2").all() and (section.obs["patient"] == "C").all()
    counts = section.layers["counts"]
    assert isinstance(counts, sp.csr_matrix) and counts.dtype == np.int32
    np.testing.assert_array_equal(counts.toarray(), COUNTS)
    assert section.X.dtype == np.float32
    np.testing.assert_array_equal(section.X.toarray(), log1p_cpm(COUNTS, COUNTS.sum(axis=1)))
    assert section.obsm["spatial"].dtype == np.float64
    assert set(section.uns["hifusion"]) == {
        *("section", "patient", "mpp", "spot_diameter_um", "pitch_um", "normalisation"),
        *("panel_digest", "run", "image", "hifusion_version"),
    }
    assert section.uns["hifusion"]["normalisation"] == "log1p_cpm"


def test_sparse_and_dense_counts_build_the_same_section(section):
    for form in (sp.csr_matrix, sp.csc_matrix, sp.coo_matrix, lambda table: table.astype(float)):
        other = _build(form(COUNTS))
        assert (other.X != section.X).nnz == 0
        assert (other.layers["counts"] != section.layers["counts"]).nnz == 0
        assert other.layers["counts"].dtype == np.int32


def test_section_comes_back_from_h5ad(section, tmp_path):
    write_section(section, tmp_path / "C2.h5ad")
    back = read_section(tmp_path / "C2.h5ad")
    pd.testing.assert_frame_equal(back.obs, section.obs)
    assert list(back.var_names) == list(section.var_names)
    np.testing.assert_array_equal(back.X.toarray(), section.X.toarray())
    np.testing.assert_array_equal(back.layers["counts"].toarray(), COUNTS)
    assert back.X.dtype == np.float32 and back.layers["counts"].dtype == np.int32
    np.testing.assert_array_equal(back.obsm["spatial"], section.obsm["spatial"])
    assert back.uns["hifusion"] == section.uns["hifusion"]


def test_plain_anndata_finds_what_scanpy_draws(section, tmp_path):
    write_section(section, tmp_path / "C2.h5ad")
    entry = anndata.read_h5ad(tmp_path / "C2.h5ad").uns["spatial"]["C2"]
    np.testing.assert_array_equal(entry["images"]["hires"], PICTURE)
    assert entry["scalefactors"]["tissue_hires_scalef"] == pytest.approx(0.1)
    assert entry["scalefactors"]["spot_diameter_fullres"] == pytest.approx(100 / MPP)


def test_section_without_image_has_no_picture(tmp_path):
    write_section(_build(), tmp_path / "C2.h5ad")
    back = read_section(tmp_path / "C2.h5ad")
    assert back.uns["hifusion"]["image"] == ""
    assert back.uns["spatial"]["C2"]["images"] == {}


def test_same_section_has_the_same_bytes(section, tmp_path):
    for name in ("one", "two"):
        write_section(section, tmp_path / name)
    assert len(set(contents(tmp_path).values())) == 1


@pytest.mark.parametrize(
    "value, what", [(np.nan, "NaN"), (np.inf, "infinite"), (-1, "negative"), (0.5, "fractional"), (2.0**31, "above")]
)
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_what_is_no_count_is_refused_with_its_spot(value, what, form):
    counts = COUNTS.astype(float)
    counts[7, 2] = value
    with refused("table.tsv", "1 counts are", what, "spot 7x1", "before any normalisation"):
        _build(form(counts))


def test_names_that_stand_twice_are_refused():
    with refused("table.tsv", "1 spots", "3x1", "unique"):
        _build(spots=["3x1", *(f"{i}x1" for i in range(1, 12))])
    with refused("table.tsv", "1 genes", "MYC", "unique"):
        _build(genes=["MYC", "A", "MYC", "B", "C"])


@pytest.mark.parametrize("fact", ["mpp", "pitch_um", "spot_diameter_um"])
@pytest.mark.parametrize("value", [0.0001, -1.0, np.nan, np.inf])
def test_impossible_scales_are_refused(fact, value):
    if value == 0.0001:
        assert _build(**{fact: value}).uns["hifusion"][fact] == value
    else:
        with refused("table.tsv", f"{fact}={value}", "positive"):
            _build(**{fact: value})


def test_positions_must_be_finite():
    centres = np.zeros((12, 2))
    centres[3, 1] = np.nan
    with refused("table.tsv", "finite (x, y) pixels"):
        _build(centres_px=centres)


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda s: s.obs.pop("patient"), "patient"),
        (lambda s: s.obsm.pop("spatial"), "obsm['spatial']"),
        (lambda s: s.uns.pop("spatial"), "uns['spatial']"),
        (lambda s: s.uns.pop("hifusion"), "uns['hifusion']['mpp']"),
        (lambda s: s.uns["hifusion"].pop("pitch_um"), "uns['hifusion']['pitch_um']"),
        (lambda s: s.layers.update(counts=s.layers["counts"].toarray()), "csr_matrix"),
        (lambda s: setattr(s, "obs_names", ["1x1"] * s.n_obs), "1x1"),
        (lambda s: setattr(s, "var_names", ["MYC"] * s.n_vars), "MYC"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")
def test_a_broken_contract_is_named_and_never_written(spoil, named, section, tmp_path):
    spoil(section)
    with refused("given.h5ad", named):
        validate_section(section, "given.h5ad")
    with refused(str(tmp_path), named):
        write_section(section, tmp_path / "out.h5ad")
    assert contents(tmp_path) == {}


def test_empty_section_is_refused(section):
    with refused("0 spots"):
        validate_section(section[[]].copy())


def test_full_disk_keeps_the_old_section_and_leaves_no_part(section, tmp_path):
    path = tmp_path / "C2.h5ad"
    write_section(section, path)
    before = contents(tmp_path)
    with full_disk(5000), refused(str(path), "free some space"):
        write_section(_build(COUNTS + 1), path)
    assert contents(tmp_path) == before
    write_section(_build(COUNTS + 1), path)
    np.testing.assert_array_equal(read_section(path).layers["counts"].toarray(), COUNTS + 1)


def test_what_is_no_section_file_is_refused_in_one_line(section, tmp_path):
    path = tmp_path / "C2.h5ad"
    with refused(str(path), "no such file"):
        read_section(path)
    write_section(section, path)
    whole = path.read_bytes()
    for damaged in (b"", b"words", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with refused(str(path), "cannot be read as .h5ad"):
            read_section(path)
    anndata.AnnData(np.ones((2, 2), dtype=np.float32)).write_h5ad(path)
    with refused(str(path), "not a hifusion section", "hifusion prepare"):
        read_section(path)


def test_predicted_section_is_new_and_keeps_spots_positions_and_picture(section, tmp_path):
    before = section.copy()
    expression = np.arange(24, dtype=np.float64).reshape(12, 2)
    predicted = predicted_section(
        section, expression, genes=["G4", "G1"], normalisation="log_share", panel_digest="abc", run="run-1"
    )
    predicted.uns["hifusion"]["section"] = "other"
    predicted.obsm["spatial"][:] = 0
    assert section.uns["hifusion"] == before.uns["hifusion"]
    np.testing.assert_array_equal(section.obsm["spatial"], before.obsm["spatial"])
    write_section(predicted, tmp_path / "predicted.h5ad")
    back = read_section(tmp_path / "predicted.h5ad")
    np.testing.assert_array_equal(back.X, expression.astype(np.float32))
    assert list(back.var_names) == ["G4", "G1"] and "counts" not in back.layers
    assert list(back.obs_names) == list(section.obs_names)
    facts = {"normalisation": "log_share", "panel_digest": "abc", "run": "run-1", "mpp": MPP}
    assert {key: back.uns["hifusion"][key] for key in facts} == facts
    np.testing.assert_array_equal(back.uns["spatial"]["C2"]["images"]["hires"], PICTURE)


def test_lattice_section_of_the_tests_keeps_the_contract():
    section = lattice_section({"A": np.arange(12), "B": np.ones(12, int)})
    validate_section(section)
    assert section.uns["hifusion"]["pitch_um"] / section.uns["hifusion"]["mpp"] == pytest.approx(72)


def test_labels_are_kept_in_the_file_and_by_predictions_and_may_miss(tmp_path):
    labels = ["tumour", None] + ["stroma"] * 10
    write_section(_build(labels=labels), tmp_path / "C2.h5ad")
    section = read_section(tmp_path / "C2.h5ad")
    guess = np.zeros((12, 1), dtype=np.float32)
    made = predicted_section(section, guess, genes=["G0"], normalisation="log_share", panel_digest="d", run="r")
    for its in (section, made):
        assert isinstance(its.obs["label"].dtype, pd.CategoricalDtype)
        assert its.obs["label"].isna().tolist() == [label is None for label in labels]
        assert its.obs["label"].dropna().tolist() == [label for label in labels if label]


def test_a_section_that_nobody_labelled_has_no_column_for_it():
    assert "label" not in _build(labels=[None] * 12).obs
