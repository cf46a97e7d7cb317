"""Every real folder is imported with the spots and genes it holds, or refused with the reason, as scanpy reads it."""

import gzip
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from fabricate import refused
from hifusion.expression import total_counts
from hifusion.readers import READERS, find_reader, spaceranger, tenx
from hifusion.readers.options import ReadOptions
from hifusion.section import read_section, validate_section, write_section

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore:Moving element from:FutureWarning")]


@dataclass(frozen=True)
class Folder:
    """A real folder and what comes of it."""

    root: str
    layout: str = ""
    sections: dict[str, tuple[int, int]] = field(default_factory=dict)
    mpp: float = 0.0
    refusal: tuple[str, ...] = ()
    bin_um: float | None = None


# Spots under tissue x genes, and um/px (0.3 % apart from the README's where that is rounded), from the READMEs.
FIXTURES = "visium_fixtures"
TABLE = [
    Folder("v1_adult_mouse_brain", "visium", {"v1_adult_mouse_brain": (2702, 100)}, 0.7267),
    Folder("v1_adult_mouse_brain/outs", "visium", {"v1_adult_mouse_brain": (2702, 100)}, 0.7267),
    Folder(
        "mob_stutility",
        "st_tables",
        {"MOB1": (379, 1000), "MOB2": (407, 1000), "MOB3": (438, 1000), "MOB4": (403, 1000)},
        4.419,
    ),
    Folder(f"{FIXTURES}/SFE_sample01", "visium", {"SFE_sample01": (12, 5)}, 0.3444),
    Folder(f"{FIXTURES}/SpatialExperiment_10xVisium", "visium", {"section1": (22, 50)}, 0.7267),
    Folder(f"{FIXTURES}/VisiumIO/10xVisium", "visium", {"section1": (22, 49), "section2": (22, 49)}, 0.7267),
    Folder(f"{FIXTURES}/scanpy/1.0.0", "visium", {"1.0.0": (100, 100)}, 0.7268),
    Folder(f"{FIXTURES}/seurat_visium", "visium", {"seurat_visium": (2695, 100)}, 0.7264),
    Folder(
        f"{FIXTURES}/VisiumIO",
        "visium_hd",
        refusal=("square_002um", "filtered_feature_bc_matrix.h5", "all counts of 10 spots are zero"),
        bin_um=2.0,
    ),
    Folder(
        f"{FIXTURES}/seurat_visium_hd",
        "visium_hd",
        refusal=("square_016um", "of 2695 barcodes 642 are in tissue_positions.parquet"),
        bin_um=16.0,
    ),
    Folder(
        f"{FIXTURES}/seurat_visium_hd",
        "visium_hd",
        refusal=("square_008um", "bins lie 16.00 um apart", "folder of 8 um bins"),
        bin_um=8.0,
    ),
    Folder(
        f"{FIXTURES}/scanpy/2.1.0",
        refusal=(
            "no known data layout",
            "visium: needs spatial/tissue_positions.csv",
            "raw_probe_bc_matrix.h5 counts probes",
        ),
    ),
    Folder(f"{FIXTURES}/xfuse_visium", refusal=("no known data layout", "visium: needs spatial/tissue_positions.csv")),
    Folder(f"{FIXTURES}/squidpy", "anndata", refusal=("test_data.h5ad", "no raw counts", "X has fractional values")),
    Folder(f"{FIXTURES}/squidpy/test_img.jpg", refusal=("no known data layout",)),
    *(
        Folder(
            f"{FIXTURES}/anndata_versions/v{version}.h5ad", "anndata", refusal=("lacks obsm['spatial']", f"v{version}")
        )
        for version in ("0.5.0", "0.7.0", "0.7.8", "0.11.4")
    ),
]


@pytest.mark.parametrize("folder", TABLE, ids=lambda folder: f"{folder.root}-{folder.bin_um}")
def test_folder_is_imported_or_refused(folder, data_root, tmp_path):
    root, options = data_root / folder.root, ReadOptions(bin_um=folder.bin_um)
    if folder.refusal:
        with refused(*folder.refusal):
            list(find_reader(root).read(root, None, options))
        return
    reader = find_reader(root)
    assert reader is READERS[folder.layout] and reader.names(root) == list(folder.sections)
    for section in reader.read(root, None, options):
        name = section.uns["hifusion"]["section"]
        assert section.shape == folder.sections[name]
        assert section.uns["hifusion"]["mpp"] == pytest.approx(folder.mpp, abs=2e-3 * folder.mpp)
        path = tmp_path / f"{name}.h5ad"
        write_section(section, path)
        validate_section(read_section(path))


def test_the_table_names_every_folder_that_holds_counts(data_root):
    """A folder of counts that the table does not name would go untested."""
    named = [data_root / folder.root for folder in TABLE]
    found = [data_root / "v1_adult_mouse_brain", data_root / "mob_stutility"]
    for kind in ("*.h5", "*.h5ad", "matrix.mtx*"):
        found += (data_root / FIXTURES).rglob(kind)
    assert len(found) > 15
    lost = [path for path in found if not any(path.is_relative_to(root) for root in named)]
    assert lost == []


def test_a_matrix_that_lacks_parts_names_them(data_root):
    with refused("data.h5", "not a complete 10x matrix", "features/id, features/feature_type"):
        tenx.read_matrix(data_root / FIXTURES / "xfuse_visium/data.h5")


@pytest.mark.parametrize(
    "file",
    [
        "v1_adult_mouse_brain/outs/filtered_feature_bc_matrix.h5",
        "v1_adult_mouse_brain/outs/raw_feature_bc_matrix.h5",
        f"{FIXTURES}/scanpy/1.0.0/filtered_feature_bc_matrix.h5",
        f"{FIXTURES}/seurat_visium/filtered_feature_bc_matrix.h5",
        f"{FIXTURES}/VisiumIO/10xVisium/section1/outs/raw_feature_bc_matrix.h5",
        f"{FIXTURES}/VisiumIO/10xVisium/section2/outs/raw_feature_bc_matrix.h5",
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
def test_scanpy_reads_the_same_hdf5(file, data_root):
    scanpy = pytest.importorskip("scanpy")
    theirs, ours = scanpy.read_10x_h5(data_root / file), tenx.read_matrix(data_root / file)
    theirs.var_names_make_unique()
    np.testing.assert_array_equal(ours.counts.toarray(), theirs.X.toarray())
    assert ours.barcodes == theirs.obs_names.tolist() and ours.genes == theirs.var_names.tolist()
    assert ours.gene_ids == theirs.var["gene_ids"].tolist()


@pytest.mark.parametrize(
    "folder",
    [
        "SFE_sample01/outs/filtered_feature_bc_matrix",
        "SpatialExperiment_10xVisium/section1/outs/raw_feature_bc_matrix",
        "VisiumIO/10xVisium/section2/outs/raw_feature_bc_matrix",
    ],
)
def test_scanpy_reads_the_same_matrix_market(folder, data_root, tmp_path):
    """Scanpy wants the files gzipped; a copy of them is."""
    scanpy = pytest.importorskip("scanpy")
    for path in (data_root / FIXTURES / folder).iterdir():
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    theirs = scanpy.read_10x_mtx(tmp_path)
    ours = tenx.read_matrix(data_root / FIXTURES / folder)
    np.testing.assert_array_equal(ours.counts.toarray(), theirs.X.toarray())
    assert ours.barcodes == theirs.obs_names.tolist() and ours.genes == theirs.var_names.tolist()
    assert ours.gene_ids == theirs.var["gene_ids"].tolist()


@pytest.mark.filterwarnings("ignore:Use `squidpy.read.visium` instead:FutureWarning")
@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
@pytest.mark.parametrize("root", [f"{FIXTURES}/scanpy/1.0.0", f"{FIXTURES}/seurat_visium"])
def test_scanpy_reads_the_same_section(root, data_root):
    scanpy = pytest.importorskip("scanpy")
    theirs = scanpy.read_visium(data_root / root, library_id="any")
    ours = next(iter(READERS["visium"].read(data_root / root)))
    theirs.var_names_make_unique()
    theirs = theirs[theirs.obs["in_tissue"] == 1]
    assert ours.obs_names.tolist() == theirs.obs_names.tolist()
    np.testing.assert_array_equal(ours.obsm["spatial"], theirs.obsm["spatial"])
    np.testing.assert_array_equal(ours.layers["counts"].toarray(), theirs.X.toarray())
    for axis in ("array_row", "array_col"):
        np.testing.assert_array_equal(ours.obs[axis], theirs.obs[axis])


def test_scale_of_v1_is_the_one_of_its_scale_factors(data_root):
    """89.44 px are 65 um: 0.7267 um per pixel, by the file and by the array alike."""
    outs = data_root / "v1_adult_mouse_brain/outs"
    section = next(iter(READERS["visium"].read(outs)))
    factors = spaceranger.read_scalefactors(outs)
    assert section.uns["hifusion"]["mpp"] == pytest.approx(65 / factors["spot_diameter_fullres"], rel=1e-4)


def _darkness(section, half_px):
    """Mean darkness of the picture at each spot."""
    entry = section.uns["spatial"][section.uns["hifusion"]["section"]]
    picture = entry["images"]["hires"].mean(axis=2)
    column, row = np.rint(section.obsm["spatial"] * entry["scalefactors"]["tissue_hires_scalef"]).astype(int).T
    return [
        -picture[r - half_px : r + half_px, c - half_px : c + half_px].mean() for r, c in zip(row, column, strict=True)
    ]


@pytest.mark.parametrize(
    "name, published, patient, depth",
    [("MOB1", 0.70, "1", 100), ("MOB2", 0.67, "1", 120), ("MOB3", 0.50, "2", 130), ("MOB4", 0.58, "2", 140)],
)
def test_mob_spots_are_dark_where_counts_are_many(name, published, patient, depth, data_root):
    """Rank correlation as the README gives it, well above that of swapped axes; patients, depths, symbols, images."""
    section = next(iter(READERS["st_tables"].read(data_root / "mob_stutility", [name])))
    counts = total_counts(section)
    found = scipy.stats.spearmanr(_darkness(section, 6), counts).statistic
    assert found == pytest.approx(published, abs=0.1)
    turned = section.copy()
    turned.obsm["spatial"] = turned.obsm["spatial"][:, ::-1]
    assert scipy.stats.spearmanr(_darkness(turned, 6), counts).statistic < found - 0.2
    facts = section.uns["hifusion"]
    assert (facts["patient"], facts["z"], Path(facts["image"]).name) == (patient, depth, f"{name}.jpg")
    symbols = dict(zip(section.var["gene_ids"], section.var_names, strict=True))
    assert symbols["ENSMUSG00000064339.1"] == "mt-Rnr2"
