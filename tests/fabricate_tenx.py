"""Space Ranger's folders in small, made by code: matrices in every form, positions, Visium and Visium HD."""

import gzip
import io
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

from fabricate_truth import IDS, SIZE_PX, SYMBOLS, Change, Truth, barcode, counts_like, same, write_slide


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
