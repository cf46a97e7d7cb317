"""Every raw layout in small, made by code, with the truth that its reader must give back.

Two sections each (a file or store of one for some), 5 x 7 spots or so, wider than high, so that swapped axes show.
"""

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from PIL import Image

from fabricate import write_table

SIZE_PX = (420, 300)  # (width, height) of every slide
SYMBOLS = ("ACTB", "TBCE", "TBCE", "GAPDH", "KRT8", "MYC")  # TBCE stands twice, as in 10x references
UNIQUE = ("ACTB", "TBCE", "TBCE-1", "GAPDH", "KRT8", "MYC")
IDS = tuple(f"ENSG{i:011d}" for i in range(len(SYMBOLS)))
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Truth:
    """What a reader must give of one section."""

    spots: list[str]
    centres: np.ndarray
    counts: np.ndarray
    mpp: float
    pitch_um: float
    patient: str
    genes: tuple[str, ...] = UNIQUE
    gene_ids: tuple[str, ...] | None = IDS
    has_image: bool = True


@dataclass(frozen=True)
class Layout:
    """One layout: ``write(root, counts, spots)`` writes it and gives the truth by section."""

    write: Callable[..., dict[str, Truth]]
    needed: tuple[str, ...]
    """Files of the section ``needed_by`` that its reader cannot do without, below the root."""
    needed_by: str
    bin_um: float | None = None


def same(values):
    """Leaves counts or spot names as they are."""
    return values


def counts_like(n_spots: int, seed: int, n_genes: int = len(SYMBOLS)) -> np.ndarray:
    return np.random.default_rng(seed).poisson(np.linspace(1, 9, n_genes), (n_spots, n_genes))


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Array columns and rows of 5 x 7 spots, the first corner missing."""
    row, column = (axis.ravel()[1:] for axis in np.mgrid[10:15, 4:11])
    return column, row


def grid_centres() -> np.ndarray:
    """40 px apart; x from 30 to 270, y from 40 to 200."""
    column, row = grid()
    return np.column_stack([30.0 + 40 * (column - 4), 40.0 + 40 * (row - 10)])


def barcode(number: int) -> str:
    return "".join("ACGT"[number >> 2 * place & 3] for place in range(16)) + "-1"


def write_slide(path: Path, size_px: tuple[int, int] = SIZE_PX) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size_px[1], : size_px[0]]
    Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8)).save(path)
    return path


# 10x Genomics


def write_h5(path: Path, counts: np.ndarray, barcodes: list[str], extra: bool = True) -> None:
    """Cell Ranger 3 HDF5; ``extra`` adds an antibody with large counts, which is no gene."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.column_stack([counts, np.full(len(counts), 1000)]) if extra else counts
    matrix = sp.csr_matrix(table)
    features = {
        "id": [*IDS, "AB1"],
        "name": [*SYMBOLS, "CD3"],
        "feature_type": [*["Gene Expression"] * len(IDS), "Antibody Capture"],
        "genome": ["GRCh38"] * (len(IDS) + 1),
    }
    with h5py.File(path, "w") as file:
        for name, values in (
            ("barcodes", np.array(barcodes, dtype="S")),
            ("data", matrix.data),
            ("indices", matrix.indices.astype(np.int64)),
            ("indptr", matrix.indptr.astype(np.int64)),
            ("shape", np.array(table.shape[::-1], dtype=np.int32)),
        ):
            file[f"matrix/{name}"] = values
        for name, texts in features.items():
            file[f"matrix/features/{name}"] = np.array(texts[: table.shape[1]], dtype="S")


def write_legacy_h5(path: Path, counts: np.ndarray, barcodes: list[str]) -> None:
    """Cell Ranger 2 HDF5: a group for the genome, no feature types."""
    matrix = sp.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        for name, values in (
            ("barcodes", np.array(barcodes, dtype="S")),
            ("genes", np.array(IDS, dtype="S")),
            ("gene_names", np.array(SYMBOLS, dtype="S")),
            ("data", matrix.data),
            ("indices", matrix.indices),
            ("indptr", matrix.indptr),
            ("shape", np.array(counts.shape[::-1])),
        ):
            file[f"GRCh38/{name}"] = values


def write_mtx(folder: Path, counts: np.ndarray, barcodes: list[str], zipped: bool = True, old: bool = False) -> None:
    """Matrix Market folder; ``old`` names the features ``genes.tsv`` and gives no types."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.BytesIO()
    scipy.io.mmwrite(text, sp.coo_matrix(counts.T))
    lines = [f"{i}\t{s}" + ("" if old else "\tGene Expression") for i, s in zip(IDS, SYMBOLS, strict=True)]
    for name, data in (
        ("matrix.mtx", text.getvalue()),
        ("barcodes.tsv", "".join(f"{one}\n" for one in barcodes).encode()),
        ("genes.tsv" if old else "features.tsv", "".join(f"{line}\n" for line in lines).encode()),
    ):
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(data, 1) if zipped else data)


POSITION_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
VISIUM_MPP = 2.5
NOT_UNDER_TISSUE = 3


def visium_array() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns (of one parity) and (x, y) centres of a staggered array, 20 px a column, 34.6 px a row."""
    row, column = np.array([(r, c) for r in range(5) for c in range(17) if (r + c) % 2 == 0]).T
    return row, column, np.column_stack([30 + 20.0 * column, 40 + 20 * 3**0.5 * row])


def position_lines(spots: list[str], header: bool) -> list[list[str]]:
    row, column, centres = visium_array()
    lines = [
        [spot, str(int(i < len(spots) - NOT_UNDER_TISSUE)), str(row[i]), str(column[i]), f"{y:.3f}", f"{x:.3f}"]
        for i, (spot, (x, y)) in enumerate(zip(spots, centres, strict=True))
    ]
    return [list(POSITION_COLUMNS), *lines] if header else lines


def write_csv(path: Path, lines: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(line) + "\n" for line in lines))


def write_spatial(folder: Path, spot_diameter_px: float, **more: float) -> None:
    """Scale factors and a hires picture of a third of the slide's size."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = {"spot_diameter_fullres": spot_diameter_px, "tissue_hires_scalef": 1 / 3, "tissue_lowres_scalef": 0.1}
    (folder / "scalefactors_json.json").write_text(json.dumps(factors | more))
    write_slide(folder / "tissue_hires_image.png", (SIZE_PX[0] // 3, SIZE_PX[1] // 3))


def write_visium(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """Sample ``one`` as Space Ranger 1 writes it (no header), ``two`` as Space Ranger 2 does."""
    truths = {}
    row, _, centres = visium_array()
    under = len(row) - NOT_UNDER_TISSUE
    for seed, (name, file, header) in enumerate(
        [("one", "tissue_positions_list.csv", False), ("two", "tissue_positions.csv", True)]
    ):
        outs = root / name / "outs"
        barcodes = [barcode(7 + 31 * i) for i in range(len(row))]
        table = counts_like(under, seed)
        order = np.random.default_rng(seed).permutation(under)  # a matrix has barcodes in an order of its own
        write_csv(outs / "spatial" / file, position_lines(barcodes, header))
        write_spatial(outs / "spatial", 65 / VISIUM_MPP)
        matrix_spots = [barcodes[i] for i in order]
        write_h5(outs / "filtered_feature_bc_matrix.h5", counts(table), list(spots(matrix_spots)))
        truths[name] = Truth(matrix_spots, centres[order], table, VISIUM_MPP, 100.0, name, has_image=False)
    return truths


HD_MPP = 0.5


def hd_centres(row: np.ndarray, column: np.ndarray, side: int) -> np.ndarray:
    """Centres of bins of ``side`` um; x falls as the column grows, as on real arrays."""
    step = side / HD_MPP
    return np.column_stack([400 - step * (column + 0.5), 20 + step * (row + 0.5)])


def write_hd_square(
    folder: Path,
    side: int,
    row: np.ndarray,
    column: np.ndarray,
    counts: np.ndarray,
    spots: list[str],
    matrix_spots: list[str] | None = None,
) -> None:
    x, y = hd_centres(row, column, side).T
    (folder / "spatial").mkdir(parents=True)
    table = dict(zip(POSITION_COLUMNS, (spots, np.int32(1), row, column, y, x), strict=True))
    pd.DataFrame(table).to_parquet(folder / "spatial" / "tissue_positions.parquet", engine="pyarrow")
    write_spatial(folder / "spatial", side / HD_MPP, microns_per_pixel=HD_MPP, bin_size_um=float(side))
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts, matrix_spots or spots)


def write_visium_hd(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """24 x 32 bins of 2 um, and the same summed into 6 x 8 bins of 8 um."""
    truths = {}
    for seed, name in enumerate(("hd1", "hd2")):
        row, column = (axis.ravel() for axis in np.mgrid[4:28, 8:40])
        table = counts_like(len(row), seed)
        fine = [f"s_002um_{r:05d}_{c:05d}-1" for r, c in zip(row, column, strict=True)]
        squares = np.unique(np.column_stack([row // 4, column // 4]), axis=0)
        coarse = [f"s_008um_{r:05d}_{c:05d}-1" for r, c in squares]
        summed = np.array([table[(row // 4 == r) & (column // 4 == c)].sum(axis=0) for r, c in squares])
        outs = root / name / "outs" / "binned_outputs"
        write_hd_square(outs / "square_002um", 2, row, column, table, fine)
        write_hd_square(outs / "square_008um", 8, *squares.T, counts(summed), coarse, list(spots(coarse)))
        truths[name] = Truth(coarse, hd_centres(*squares.T, 8), summed, HD_MPP, 8.0, name, has_image=False)
    return truths


# Spatial Transcriptomics tables


def grid_spots() -> list[str]:
    return [f"{x}x{y}" for x, y in zip(*grid(), strict=True)]


def count_rows(spots: list[str], genes: tuple[str, ...], counts: np.ndarray) -> list[list[str]]:
    return [["", *genes], *([spot, *map(str, row)] for spot, row in zip(spots, counts.tolist(), strict=True))]


def spot_rows(pixels: np.ndarray, selected: int = 1) -> list[list[str]]:
    head = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
    rows = zip(*grid(), pixels, strict=True)
    return [head, *([str(v) for v in (x, y, x, y, u, w, selected)] for x, y, (u, w) in rows)]


def write_her2st(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    truths = {}
    for seed, name in enumerate(("A1", "B1")):
        table = counts_like(len(grid()[0]), seed)
        for folder in ("ST-cnts", "ST-spotfiles"):
            (root / "data" / folder).mkdir(parents=True, exist_ok=True)
        write_table(root / f"data/ST-cnts/{name}.tsv.gz", count_rows(list(spots(grid_spots())), UNIQUE, counts(table)))
        write_table(root / f"data/ST-spotfiles/{name}_selection.tsv", spot_rows(grid_centres()))
        write_slide(root / f"data/ST-imgs/{name[0]}/{name}/he.png")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, name[0], gene_ids=None)
    return truths


def write_stnet(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """The table of counts holds off-tissue spots too; the letters before the number differ between files."""
    truths = {}
    root.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("BC23209_C1", "BC23377_D2")):
        table = counts_like(len(grid()[0]), seed)
        measured = count_rows(["1x1", *spots(grid_spots())], IDS, np.vstack([np.ones((1, 6), int), counts(table)]))
        write_table(root / f"{name}_stdata.tsv.gz", measured)
        places = zip(grid_spots(), grid_centres(), strict=True)
        lines = [["", "X", "Y"], *([spot, f"{x}", f"{y}"] for spot, (x, y) in places)]
        text = "".join(",".join(line) + "\n" for line in lines).encode()
        (root / f"spots_BT{name[2:]}.csv.gz").write_bytes(gzip.compress(text, 1))
        write_slide(root / f"HE_BT{name[2:]}.png")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, name.split("_")[0], genes=IDS)
    return truths


STAGGERED_PX = (20.0, 20.0 * (6600 / 62) / (6200 / 65))  # per column and row: the shape of a 2k array
STAGGERED_MPP = 6200 / 65 / 20.0


def staggered() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, rows and centres of a part of a 2k array."""
    column, row = np.array([(x, y) for y in range(3, 10) for x in range(2, 16) if (x + y) % 2 == 0]).T
    return column, row, np.column_stack([column * STAGGERED_PX[0] + 11, row * STAGGERED_PX[1] + 5])


def write_st_tables(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """2k arrays whose last four spots are not selected; individuals, depths and symbols are told."""
    truths = {}
    root.mkdir(parents=True, exist_ok=True)
    column, row, centres = staggered()
    kept = len(row) - 4
    for seed, name in enumerate(("MOB1", "MOB2")):
        names = [f"{x}x{y}" for x, y in zip(column, row, strict=True)]
        table = counts_like(len(row), seed)
        write_table(root / f"{name}.tsv.gz", count_rows(list(spots(names)), IDS, counts(table)))
        head = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
        values = zip(column, row, centres, strict=True)
        lines = [[str(v) for v in (x, y, x, y, u, w, int(i < kept))] for i, (x, y, (u, w)) in enumerate(values)]
        write_table(root / f"alignment_table_{name}.tsv", [head, *lines])
        write_slide(root / f"{name}.png")
        pitch = float(np.hypot(6200 / 65, 6600 / 62))
        truths[name] = Truth(names[:kept], centres[:kept], table[:kept], STAGGERED_MPP, pitch, f"mouse{seed}")
    lines = [f"/Users/someone/counts/{name}.tsv;{100 + 20 * i};mouse{i}" for i, name in enumerate(truths)]
    (root / "metaData.csv").write_text("samples;z;individual\n" + "".join(f"{line}\n" for line in lines))
    write_table(root / "some_genes.tsv.gz", [["gene_id", "gene_name"], *map(list, zip(IDS, SYMBOLS, strict=True))])
    return truths


# AnnData and SpatialData


def grid_anndata(seed: int, counts: Change = same, spots: Change = same) -> tuple[anndata.AnnData, np.ndarray]:
    """Spots on the 5 x 7 grid with raw counts in ``X``, and those counts as they should be."""
    column, row = grid()
    table = counts_like(len(row), seed)
    data = anndata.AnnData(
        sp.csr_matrix(counts(table).astype(np.float32)),
        obs=pd.DataFrame(
            {"in_tissue": 1, "array_row": row, "array_col": column}, index=pd.Index(list(spots(grid_spots())))
        ),
        var=pd.DataFrame({"gene_ids": IDS}, index=pd.Index(UNIQUE)),
        obsm={"spatial": grid_centres()},
    )
    return data, table


def write_hest(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    truths = {}
    for folder in ("st", "metadata", "wsis"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(("SPA1", "SPA2")):
        data, table = grid_anndata(seed, counts, spots)
        scalefactors = {"spot_diameter_fullres": 20.0, "tissue_downscaled_fullres_scalef": 1 / 3}
        picture = np.full((SIZE_PX[1] // 3, SIZE_PX[0] // 3, 3), 200, dtype=np.uint8)
        data.uns["spatial"] = {"ST": {"images": {"downscaled_fullres": picture}, "scalefactors": scalefactors}}
        data.write_h5ad(root / f"st/{name}.h5ad")
        facts = {
            "id": name,
            "dataset_title": "Study",
            "patient": "Patient 1",
            "st_technology": "Spatial Transcriptomics",
        }
        facts |= {"inter_spot_dist": 200.0, "spot_diameter": 100.0, "pixel_size_um_estimated": 5.0}
        (root / f"metadata/{name}.json").write_text(json.dumps(facts | {"pixel_size_um_embedded": 352.8}))
        write_slide(root / f"wsis/{name}.tif")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, "Study: Patient 1")
    return truths


def write_anndata(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    root.mkdir(parents=True, exist_ok=True)
    truths = {}
    for seed, name in enumerate(("left", "right")):
        data, table = grid_anndata(seed, counts, spots)
        data.uns["spatial"] = {name: {"images": {}, "scalefactors": {"microns_per_pixel": 5.0}}}
        data.write_h5ad(root / f"{name}.h5ad")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, name, has_image=False)
    return truths


def write_spatialdata(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """One store of two regions: circles in another system than the image's pixels, an image in two scales.

    The rows of the table stand in another order than the shapes.
    """
    import spatialdata
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Identity

    tables, shapes, truths = [], {}, {}
    for seed, region in enumerate(("a", "b")):
        data, table = grid_anndata(seed, counts, spots)
        order = np.random.default_rng(seed).permutation(data.n_obs)
        barcodes = [barcode(1000 * seed + i) for i in range(data.n_obs)]
        # Visium by its barcodes and an array of 20 px and 34.6 px steps, turned by 90 degrees inside its own system.
        row, column, centres = (axis[: data.n_obs] for axis in visium_array())
        data.obs_names = barcodes
        data.obs_names = list(spots(barcodes))
        data.obs["array_row"], data.obs["array_col"] = row, column
        data.obs["region"], data.obs["instance"] = pd.Categorical([region] * data.n_obs), np.arange(data.n_obs)
        own = np.column_stack([centres[:, 1], -centres[:, 0]]) / 2
        turn = Affine([[0, -2, 0], [2, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
        shapes[region] = ShapesModel.parse(
            own, geometry=0, radius=65 / VISIUM_MPP / 4, transformations={"global": turn}
        )
        tables.append(data[order])
        named = [barcodes[i] for i in order]
        truths[f"store_{region}"] = Truth(
            named, centres[order], table[order], VISIUM_MPP, 100.0, f"store_{region}", has_image=False
        )
    joined = anndata.concat(tables, merge="same")
    joined.obs["region"] = joined.obs["region"].astype("category")
    pixels = np.random.default_rng(0).integers(0, 255, (3, SIZE_PX[1], SIZE_PX[0]), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2], transformations={"global": Identity()})
    spatialdata.SpatialData(
        images={"he": image},
        shapes=shapes,
        tables={"table": TableModel.parse(joined, region=["a", "b"], region_key="region", instance_key="instance")},
    ).write(root / "store.zarr")
    return truths


LAYOUTS = {
    "visium": Layout(
        write_visium,
        ("one/outs/spatial/tissue_positions_list.csv", "one/outs/filtered_feature_bc_matrix.h5"),
        "one",
    ),
    "visium_hd": Layout(
        write_visium_hd,
        tuple(
            f"hd1/outs/binned_outputs/square_008um/{file}"
            for file in ("spatial/tissue_positions.parquet", "filtered_feature_bc_matrix.h5")
        ),
        "hd1",
        bin_um=8.0,
    ),
    "hest": Layout(write_hest, ("st/SPA1.h5ad",), "SPA1"),
    "her2st": Layout(write_her2st, ("data/ST-cnts/A1.tsv.gz", "data/ST-spotfiles/A1_selection.tsv"), "A1"),
    "stnet": Layout(write_stnet, ("BC23209_C1_stdata.tsv.gz", "spots_BT23209_C1.csv.gz"), "BC23209_C1"),
    "st_tables": Layout(write_st_tables, ("MOB1.tsv.gz", "alignment_table_MOB1.tsv"), "MOB1"),
    "spatialdata": Layout(
        write_spatialdata,
        ("store.zarr/shapes/a/shapes.parquet", "store.zarr/tables/table/X/zarr.json", "store.zarr/zarr.json"),
        "store_a",
    ),
    "anndata": Layout(write_anndata, ("left.h5ad",), "left"),
}
