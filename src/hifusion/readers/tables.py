"""Tables of the Spatial Transcriptomics layouts: spots by genes, spot positions, gene names; plain or gzipped."""

import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from hifusion.errors import InputError
from hifusion.readers.assemble import unique_symbols

# Sections share the array's coordinates, so those of another section match in part: by 94 % at most among the 36 of
# her2st, while a section's own two files match by 98 to 100 %.
LEAST_MATCH = 0.95
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")  # published as .jpg; a converted image is not passed over


def read_counts(path: Path) -> tuple[sp.csr_matrix, list[str], list[str]]:
    """Counts ``(N, genes)``, spot names and gene names of a table whose rows are spots ``XxY`` and columns genes."""
    kind = "gzipped count table" if path.suffix == ".gz" else "count table"
    try:
        header, _, body = _bytes_of(path).partition(b"\n")
        # The header is split by hand: pandas would rename a gene that stands twice instead of telling.
        genes = header.decode().rstrip("\r").split("\t")[1:]
        # In one piece: putting pieces of 15,000 columns together takes as long as reading them.
        table = pd.read_csv(
            io.BytesIO(body), sep="\t", header=None, index_col=0, dtype={0: str}, na_filter=True, low_memory=False
        )
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such count table; its folder lists the sections there are") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a {kind} ({one_line(error)}); get it anew") from error
    if table.shape[1] != len(genes):
        raise InputError(
            f"{path}: the header names {len(genes)} genes but rows have {table.shape[1]} values; the table is damaged, "
            "get it anew"
        )
    words = [genes[i] for i, dtype in enumerate(table.dtypes) if dtype.kind not in "iuf"]
    if words:
        raise InputError(f"{path}: gene {words[0]} has values that are not numbers; counts are whole numbers >= 0")
    return sp.csr_matrix(table.to_numpy()), [str(spot) for spot in table.index], genes


def read_positions(path: Path, columns: Sequence[str], what: str = "spotfile", separator: str = "\t") -> pd.DataFrame:
    """The numeric ``columns`` of a table of spots; where ``x`` and ``y`` are among them, rows are named ``XxY``."""
    table = read_table(path, columns, what, separator)
    table = table[list(columns)].apply(pd.to_numeric, errors="coerce")
    if not np.isfinite(table.to_numpy(dtype=np.float64)).all():
        raise InputError(f"{path}: a position is empty or not a number; every row needs {', '.join(columns)}")
    if {"x", "y"} <= set(columns):
        table.index = pd.Index([f"{x:.0f}x{y:.0f}" for x, y in zip(table["x"], table["y"], strict=True)])
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise InputError(f"{path}: spot {twice} stands more than once; each must be unique")
    return table


def read_table(path: Path, columns: Sequence[str], what: str, separator: str | None = "\t") -> pd.DataFrame:
    """A table with at least ``columns``; its separator is looked for where None.

    The first column is the index where the header leaves its name empty, as R and pandas write row names.
    """
    try:
        table = pd.read_csv(io.BytesIO(_bytes_of(path)), sep=separator, engine="python" if separator is None else "c")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such {what}; each count table needs one") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a {what} ({one_line(error)}); get it anew") from error
    if len(table.columns) and str(table.columns[0]).startswith("Unnamed"):
        table = table.set_index(table.columns[0])
    missing = [column for column in columns if column not in table]
    if missing:
        raise InputError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    return table


def match(spots: Sequence[str], positions: pd.DataFrame, of: int, counts_file: Path, spotfile: Path) -> list[bool]:
    """Which of the counted ``spots`` have a position; refused where that are too few of ``of``."""
    known = [spot in positions.index for spot in spots]
    if not any(known) or sum(known) < LEAST_MATCH * of:
        raise InputError(
            f"{spotfile}: only {sum(known)} spots stand both here (of {len(positions)}) and in {counts_file.name} (of "
            f"{len(spots)}), at least {LEAST_MATCH:.0%} must; give the two files of the same section and the same spots"
        )
    return known


def pitch_px(positions: pd.DataFrame, source: Path) -> float:
    """Pixels between neighbouring spots: slope of ``pixel_x`` and ``pixel_y`` against x and y, mean of both axes."""
    slopes = [
        np.polyfit(positions[axis], positions[f"pixel_{axis}"], deg=1)[0]
        for axis in ("x", "y")
        if positions[axis].nunique() > 1
    ]
    if not slopes or min(slopes) <= 0:
        raise InputError(
            f"{source}: pixel positions do not grow with x and y, so no spot pitch can be found; look whether axes are "
            "swapped or mirrored"
        )
    return float(np.mean(slopes))


def read_symbols(root: Path) -> dict[str, str]:
    """Gene id -> symbol from a table ``*genes.tsv[.gz]`` with ``gene_id`` and ``gene_name``; empty where there is none.

    Symbols that several ids share are made unique over the whole table, so that an id has one name in every section.
    """
    tables = sorted([*root.glob("*genes.tsv"), *root.glob("*genes.tsv.gz")])
    if not tables:
        return {}
    table = read_table(tables[0], ("gene_id", "gene_name"), "table of gene names").drop_duplicates("gene_id")
    return dict(zip(table["gene_id"].astype(str), unique_symbols(table["gene_name"].astype(str).tolist()), strict=True))


def only_image(images: Sequence[Path], name: str) -> Path | None:
    """The one image among some files, or None; several are refused."""
    images = sorted(path for path in images if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(images) > 1:
        raise InputError(f"{images[0].parent}: holds {len(images)} images; keep the one that belongs to section {name}")
    return images[0] if images else None


def one_line(error: Exception) -> str:
    """What a library says, on one line and not too long."""
    return " ".join(str(error).split())[:200]


def _bytes_of(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
