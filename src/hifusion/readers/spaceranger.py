"""What Space Ranger writes beside a matrix: positions of the spots, scale factors, small pictures, sample folders."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hifusion import files
from hifusion.errors import InputError
from hifusion.readers import tenx
from hifusion.readers.assemble import Picture, as_picture
from hifusion.readers.lattice import VISIUM_FULLRES_UM, VISIUM_SPOT_UM
from hifusion.readers.tables import LEAST_MATCH, one_line
from hifusion.slide import Slide

SPATIAL = "spatial"
POSITIONS = ("tissue_positions.csv", "tissue_positions.parquet", "tissue_positions_list.csv")
COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
SCALEFACTORS = "scalefactors_json.json"
# Picture and the key of its scale; hires is 2000 px (6000 for HD), lowres 600 px.
PICTURES = (("tissue_hires_image.png", "tissue_hires_scalef"), ("tissue_lowres_image.png", "tissue_lowres_scalef"))
FACTORS = ("spot_diameter_fullres", "tissue_hires_scalef", "tissue_lowres_scalef", "microns_per_pixel", "bin_size_um")
SCALE_TOLERANCE = 0.1  # between the scale of the array and that of the file
# What spot_diameter_fullres may be by the array's pitch: 65 um as Space Ranger writes it, or the spot's own 55 um, and
# 10 % more or less. Otherwise positions and factors are of two images.
SPOT_UM = (0.9 * VISIUM_SPOT_UM, 1.1 * VISIUM_FULLRES_UM)


def sample_folders(root: Path, holds: Callable[[Path], bool]) -> dict[str, Path]:
    """Sample name -> the folder that holds its files.

    ``root`` may be that folder, have it as ``outs``, or hold one folder for each sample, which gives it its name.
    """
    for own in (root, root / "outs"):
        if holds(own):
            name, above = root.resolve().name, root.resolve().parent.name
            return {above if name in ("outs", "binned_outputs") else name: own}
    found = {}
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        for own in (folder, folder / "outs"):
            if folder.name not in found and not folder.name.startswith(".") and holds(own):
                found[folder.name] = own
    return found


def find_positions(folder: Path) -> Path | None:
    """The table of positions in ``folder/spatial``, or None; a sample's name may stand before the file's."""
    found = [path for name in POSITIONS for path in sorted((folder / SPATIAL).glob(f"*{name}"))]
    return found[0] if found else None


def matrix_and_positions(folder: Path) -> tuple[Path, Path]:
    """The two files that every section needs.

    Raises
    ------
    InputError
        One of them is not there.
    """
    matrix, positions = tenx.find_matrix(folder), find_positions(folder)
    if matrix is None or positions is None:
        lacking = tenx.MATRICES[0] if matrix is None else f"{SPATIAL}/{POSITIONS[0]}"
        raise InputError(f"{folder}: lacks {lacking}; give the whole folder that Space Ranger wrote")
    return matrix, positions


def read_positions(path: Path) -> pd.DataFrame:
    """Positions by barcode: ``in_tissue`` (bool), ``array_row``, ``array_col``, ``x``, ``y`` in full-resolution pixels.

    A CSV is read by what it holds: Space Ranger 2 writes a header, Space Ranger 1 none, and a file may have been
    renamed. ``x`` is ``pxl_col``, ``y`` is ``pxl_row``.

    Raises
    ------
    InputError
        The table cannot be read, lacks a column, or holds a value that is not allowed.
    """
    table = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputError(
            f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))[:100]}"
        )
    if table.empty:
        raise InputError(f"{path}: holds no position; get it anew")
    numbers = table[list(COLUMNS[1:])].apply(pd.to_numeric, errors="coerce")
    values = numbers.to_numpy(dtype=np.float64)
    barcodes = table["barcode"].astype(str).to_numpy(dtype=object)
    wrong = ~np.isfinite(values).all(axis=1) | ~np.isin(values[:, 0], (0, 1)) | (values[:, 1:3] % 1 != 0).any(axis=1)
    if wrong.any():
        raise InputError(
            f"{path}: {int(wrong.sum())} rows are not usable (first {str(barcodes[wrong][0])[:60]!r}); in_tissue is 0 "
            "or 1, array positions are whole numbers, pixels are numbers"
        )
    positions = pd.DataFrame(
        {
            "in_tissue": values[:, 0] == 1,
            "array_row": values[:, 1].astype(np.int64),
            "array_col": values[:, 2].astype(np.int64),
            "x": values[:, 4],
            "y": values[:, 3],
        },
        index=pd.Index(barcodes),
    )
    if positions.index.has_duplicates:
        twice = positions.index[positions.index.duplicated()][0]
        raise InputError(f"{path}: barcode {twice} stands more than once; each must be unique")
    return positions


def _read_csv(path: Path) -> pd.DataFrame:
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = next(csv.reader(io.StringIO(text)), [])
        headed = len(first) > 1 and not _is_number(first[1])
        table = pd.read_csv(
            io.StringIO(text),
            header=0 if headed else None,
            dtype=str,
            keep_default_na=False,
            index_col=False,
            skip_blank_lines=True,
        )
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table of positions ({one_line(error)}); get it anew") from error
    if not headed:
        if table.shape[1] != len(COLUMNS):
            raise InputError(
                f"{path}: rows have {table.shape[1]} values; without a header they are {', '.join(COLUMNS)}"
            )
        table.columns = pd.Index(COLUMNS)
    return table


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise InputError(f"{path}: Parquet needs pyarrow; run `pip install 'hifusion[parquet]'`") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({one_line(error)}); get it anew") from error


def under_tissue(
    matrix: tenx.Matrix, positions: pd.DataFrame, counts_file: Path, spotfile: Path
) -> tuple[np.ndarray, pd.DataFrame]:
    """Rows of the matrix that are spots under tissue, and the positions of these.

    The table of positions lists the whole array, so nearly every barcode must be there; and nearly every barcode of a
    filtered matrix must be under tissue, or the two are of different sections: all arrays share their barcodes.
    Positions without counts are left out.
    """
    at = positions.index.get_indexer(pd.Index(matrix.barcodes, dtype=object))
    tissue = (at >= 0) & positions["in_tissue"].to_numpy()[at]
    enough = LEAST_MATCH * len(at)
    if (at >= 0).sum() < enough or not tissue.any() or ("filtered" in counts_file.name and tissue.sum() < enough):
        raise InputError(
            f"{counts_file}: of {len(at)} barcodes {int((at >= 0).sum())} are in {spotfile.name}, "
            f"{int(tissue.sum())} of them under tissue; give the two files of one run"
        )
    return np.flatnonzero(tissue), positions.iloc[at[tissue]]


def read_scalefactors(folder: Path) -> dict[str, float]:
    """What ``scalefactors_json.json`` says; nothing where there is none."""
    found = sorted((folder / SPATIAL).glob(f"*{SCALEFACTORS}"))
    if not found:
        return {}
    factors = files.read_json(found[0])
    if not isinstance(factors, dict):
        raise InputError(f"{found[0]}: holds no scale factors by name; give the file Space Ranger wrote")
    wrong = [key for key in FACTORS if key in factors and not _is_scale(factors[key])]
    if wrong:
        raise InputError(f"{found[0]}: {', '.join(wrong)} is no number above 0; give the file Space Ranger wrote")
    return {key: float(factors[key]) for key in FACTORS if key in factors}


def _is_scale(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def read_picture(folder: Path, scalefactors: dict[str, float]) -> Picture | None:
    """The larger of the small pictures that has a scale, or None."""
    for name, key in PICTURES:
        found = sorted((folder / SPATIAL).glob(f"*{name}"))
        if found and key in scalefactors:
            slide = Slide(found[0])
            return as_picture(slide.read_region(0, 0, *slide.size_px), scalefactors[key])
    return None


def refuse_other_scale(mpp: float, scalefactors: dict[str, float], spotfile: Path) -> None:
    """Refuse positions in other pixels than the scale factors are for, such as those of the hires picture."""
    diameter = scalefactors.get("spot_diameter_fullres")
    if diameter is not None and not SPOT_UM[0] < mpp * diameter < SPOT_UM[1]:
        raise InputError(
            f"{spotfile}: by the array's pitch ({mpp:.4f} um per pixel) spot_diameter_fullres={diameter:.2f} of "
            f"{SCALEFACTORS} is {mpp * diameter:.0f} um, not {VISIUM_FULLRES_UM:.0f}; give the two files of one run"
        )
