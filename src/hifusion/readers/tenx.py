"""Count matrices of 10x Genomics: HDF5 of Cell Ranger 3 and later, HDF5 of before, and Matrix Market folders."""

import gzip
import io
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import scipy.io
import scipy.sparse as sp

from hifusion.errors import InputError
from hifusion.readers.assemble import unique_symbols
from hifusion.readers.tables import one_line

# Best first; a sample's name may stand before each. raw_probe_bc_matrix.h5 is none of them: it counts probes, and which
# probes of a gene Space Ranger adds up is in the probe set's file, not in the matrix.
MATRICES = (
    "filtered_feature_bc_matrix.h5",
    "raw_feature_bc_matrix.h5",
    "filtered_feature_bc_matrix",
    "raw_feature_bc_matrix",
)
PROBES = "raw_probe_bc_matrix.h5"
GENE_EXPRESSION = "Gene Expression"  # the others are antibodies, guides, custom features
_GZIP = b"\x1f\x8b"
_LEGACY = ("barcodes", "data", "indices", "indptr", "shape", "genes", "gene_names")
_MATRIX = (*_LEGACY[:5], "features/id", "features/name", "features/feature_type")


class Matrix(NamedTuple):
    """Counts of genes in barcodes."""

    counts: sp.csr_matrix
    """``(barcodes, genes)``, values as the file has them."""
    barcodes: list[str]
    genes: list[str]
    """Symbols, made unique as anndata does."""
    gene_ids: list[str]


def find_matrix(folder: Path) -> Path | None:
    """The best matrix of a folder, or None; filtered before raw, HDF5 before Matrix Market.

    Raises
    ------
    InputError
        Several of one kind.
    """
    for name in MATRICES:
        found = sorted(path for path in folder.glob(f"*{name}") if _is_matrix(path))
        if len(found) > 1:
            listed = ", ".join(path.name for path in found)
            raise InputError(f"{folder}: holds {len(found)} matrices of one kind ({listed}); keep one sample a folder")
        if found:
            return found[0]
    return None


def _is_matrix(path: Path) -> bool:
    return path.is_file() if path.suffix == ".h5" else any(path.glob("*matrix.mtx*"))


def read_matrix(path: Path) -> Matrix:
    """Read the gene expression of a matrix that :func:`find_matrix` gave.

    Raises
    ------
    InputError
        The matrix lacks a part, its parts do not fit, or a barcode stands twice.
    """
    matrix = _read_h5(path) if path.suffix == ".h5" else _read_folder(path)
    twice = [barcode for barcode, times in Counter(matrix.barcodes).items() if times > 1]
    if twice:
        raise InputError(f"{path}: barcode {twice[0]} stands more than once; each must be unique")
    return matrix


def _read_h5(path: Path) -> Matrix:
    try:
        with h5py.File(path, "r") as file:
            group = file["matrix"] if "matrix" in file else _only_genome(file, path)
            legacy = "features" not in group and group.name != "/matrix"
            parts = _datasets(group, _LEGACY if legacy else _MATRIX, path)
    except (OSError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({one_line(error)}); get it anew") from error
    shape = [int(size) for size in np.ravel(parts["shape"])]
    if parts["data"].dtype.kind not in "iuf" or len(shape) != 2:
        raise InputError(f"{path}: holds no table of counts (data of type {parts['data'].dtype}, shape {shape})")
    ids, names = (parts[name] for name in (("genes", "gene_names") if legacy else ("features/id", "features/name")))
    return _checked(
        (parts["data"], parts["indices"], parts["indptr"]),
        (shape[1], shape[0]),
        barcodes=_texts(parts["barcodes"]),
        names=_texts(names),
        ids=_texts(ids),
        kinds=None if legacy else _texts(parts["features/feature_type"]),
        path=path,
    )


def _only_genome(file: h5py.File, path: Path) -> h5py.Group:
    """The group of the one genome: before Cell Ranger 3 each genome had a matrix of its own."""
    genomes = [name for name, group in file.items() if isinstance(group, h5py.Group) and "barcodes" in group]
    if len(genomes) != 1:
        found = ", ".join(genomes or list(file)[:5]) or "nothing"
        raise InputError(
            f"{path}: needs the group `matrix` (Cell Ranger 3 and later) or that of one genome, holds {found}; "
            "give the matrix of one genome"
        )
    return file[genomes[0]]


def _datasets(group: h5py.Group, names: tuple[str, ...], path: Path) -> dict[str, np.ndarray]:
    missing = [name for name in names if not isinstance(group.get(name), h5py.Dataset)]
    if missing:
        raise InputError(f"{path}: not a complete 10x matrix, lacks {', '.join(missing)}; get it anew")
    return {name: np.asarray(group[name][()]) for name in names}


def _texts(values: np.ndarray) -> list[str]:
    return [
        value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        for value in np.ravel(values).tolist()
    ]


def _read_folder(folder: Path) -> Matrix:
    try:
        barcodes = _lines(folder, "barcodes.tsv")
        features = _lines(folder, "features.tsv", "genes.tsv")
        # The bytes are read first: some matrices are called .gz and are not.
        table = scipy.io.mmread(io.BytesIO(_unzipped(_part(folder, "matrix.mtx"))))
    except (OSError, EOFError, zlib.error, ValueError, OverflowError, StopIteration) as error:
        raise InputError(
            f"{folder}: cannot be read as a Matrix Market folder ({one_line(error)}); get it anew"
        ) from error
    columns = [[cell.strip('"') for cell in line.split("\t")] for line in features]
    if not sp.issparse(table) or any(len(cells) != len(columns[0]) for cells in columns):
        raise InputError(f"{folder}: is no sparse matrix with a table of features; get it anew")
    by_barcode = table.T.tocsr()
    return _checked(
        (by_barcode.data, by_barcode.indices, by_barcode.indptr),
        by_barcode.shape,
        barcodes=[line.split("\t")[0].strip('"') for line in barcodes],
        names=[cells[1 if len(cells) > 1 else 0] for cells in columns],
        ids=[cells[0] for cells in columns],
        kinds=[cells[2] for cells in columns] if columns and len(columns[0]) > 2 else None,
        path=folder,
    )


def _part(folder: Path, *names: str) -> Path:
    found = sorted(
        path for name in names for path in folder.glob(f"*{name}*") if path.name.endswith((name, f"{name}.gz"))
    )
    if len(found) != 1:
        raise InputError(f"{folder}: holds {len(found)} files {' or '.join(names)}[.gz]; exactly one is needed")
    return found[0]


def _lines(folder: Path, *names: str) -> list[str]:
    return _unzipped(_part(folder, *names)).decode().splitlines()


def _unzipped(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data.startswith(_GZIP) else data


def _checked(
    compressed: tuple[np.ndarray, np.ndarray, np.ndarray],
    shape: tuple[int, int],
    *,
    barcodes: list[str],
    names: list[str],
    ids: list[str],
    kinds: list[str] | None,
    path: Path,
) -> Matrix:
    """Put the parts together where they fit; only gene expression is kept."""
    for what, count, wanted in (
        ("barcodes", len(barcodes), shape[0]),
        ("feature names", len(names), shape[1]),
        ("feature ids", len(ids), shape[1]),
        ("feature types", shape[1] if kinds is None else len(kinds), shape[1]),
    ):
        if count != wanted:
            raise InputError(f"{path}: has {count} {what} for a matrix of {wanted}; the parts are not of one matrix")
    try:
        counts = sp.csr_matrix(compressed, shape=shape)
        counts.check_format(full_check=True)
    except ValueError as error:
        raise InputError(f"{path}: the matrix is damaged ({one_line(error)}); get it anew") from error
    counts.sum_duplicates()
    kept = np.array([kinds is None or kinds[i] == GENE_EXPRESSION for i in range(shape[1])], dtype=bool)
    if not kept.any():
        found = ", ".join(sorted(set(kinds or ()))) or "no feature"
        raise InputError(f"{path}: holds no feature of type {GENE_EXPRESSION!r} but {found}; give the gene matrix")
    rows = np.flatnonzero(kept)
    return Matrix(
        counts[:, rows] if len(rows) < shape[1] else counts,
        barcodes,
        unique_symbols([names[i] for i in rows]),
        [ids[i] for i in rows],
    )
