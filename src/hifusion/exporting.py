"""A section, measured or predicted, written in what other tools open."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData

from hifusion.errors import InputError, refuse_unknown
from hifusion.export_raster import write_ome_tiff
from hifusion.export_spatialdata import write_spatialdata
from hifusion.export_spots import write_csv, write_geojson, write_parquet
from hifusion.section import read_section

FEW = 50  # genes that a viewer's list still shows at a glance


class Format(NamedTuple):
    """How a section is written: the suffixes that ask for it, the writer, and the most genes where none are chosen."""

    suffixes: tuple[str, ...]
    write: Callable[[AnnData, Path], None]
    most_genes: int | None = None


FORMATS: dict[str, Format] = {
    "spatialdata": Format((".zarr",), write_spatialdata),
    "geojson": Format((".geojson",), write_geojson, FEW),
    "ome-tiff": Format((".ome.tif", ".ome.tiff"), write_ome_tiff, FEW),
    "csv": Format((".csv", ".csv.gz"), write_csv),
    "parquet": Format((".parquet",), write_parquet),
}


def export(section_path: Path, out: Path, *, to: str | None = None, genes: Sequence[str] | None = None) -> Path:
    """Write a section for another tool, whole or not at all; gives ``out``.

    Parameters
    ----------
    section_path
        A section ``.h5ad``, measured or predicted.
    out
        The file (or ``.zarr`` folder) to write.
    to
        A name of :data:`FORMATS`; by the suffix of ``out`` where None.
    genes
        The genes to write, in this order. Where None: all; in ``geojson`` and ``ome-tiff`` at most the :data:`FEW`
        most variable ones.

    Raises
    ------
    InputError
        Unknown format or gene, an extra that is not installed, or a section or place that cannot be used.
    """
    out = Path(out)
    chosen = FORMATS[_format_of(out, to)]
    if out.is_dir() and ".zarr" not in chosen.suffixes:
        raise InputError(f"{out}: is a folder; give the file to write")
    section = read_section(section_path)
    if genes is not None:
        genes = list(dict.fromkeys(genes))
        refuse_unknown("gene", genes, section.var_names, str(section_path))
    elif chosen.most_genes is not None and section.n_vars > chosen.most_genes:
        genes = most_variable(section, chosen.most_genes)
    chosen.write(section if genes is None else section[:, genes].copy(), out)
    return out


def most_variable(section: AnnData, count: int) -> list[str]:
    """The ``count`` genes whose expression varies most over the spots, in the order of the section."""
    table: Any = section.X
    if isinstance(table, np.ndarray):
        variance = np.ma.masked_invalid(table.astype(np.float64)).var(axis=0).filled(0.0)
    else:
        mean, square = (np.asarray(power.mean(axis=0, dtype=np.float64)).ravel() for power in (table, table.power(2)))
        variance = square - mean**2
    best = np.sort(np.argsort(-variance, kind="stable")[:count])
    return section.var_names[best].to_list()


def _format_of(out: Path, to: str | None) -> str:
    if to is not None:
        if to not in FORMATS:
            raise InputError(f"format {to!r} is unknown; use one of {', '.join(FORMATS)}")
        return to
    for name, form in FORMATS.items():
        if out.name.lower().endswith(form.suffixes):
            return name
    suffixes = ", ".join(suffix for form in FORMATS.values() for suffix in form.suffixes)
    raise InputError(f"{out}: no format goes by this name; end it in {suffixes}, or say `--to`")
