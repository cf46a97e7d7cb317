"""st_tables: Spatial Transcriptomics arrays as tables of the ST spot detector, as STutility takes them.

For each section ``NAME.tsv[.gz]`` (rows are spots ``XxY`` of the whole array, columns genes),
``alignment_table_NAME.tsv`` (x, y, pixel_x, pixel_y, selected) and, where there is one, the image ``NAME.jpg``. Spots
are those with selected 1.
``metaData.csv`` (samples, z, individual) tells patients and depths; ``*genes.tsv[.gz]`` tells gene symbols.

Scale: on an array of 1,007 spots (the square one) spots are 200 um apart; the 1,934 of the "2k" array are staggered (x
and y of one parity, 66 columns and 63 rows) over the same 6.2 mm x 6.6 mm (Stahl et al., Science 353:78, 2016). That is
95.4 um a column and 106.5 um a row, so neighbours are 143 um apart; the maker rounds it to 150 um. Spots of both are
100 um across.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np
import pandas as pd
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers.assemble import assemble, chosen
from hifusion.readers.her2st import PITCH_UM, SPOT_DIAMETER_UM
from hifusion.readers.lattice import fit_lattice
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.readers.tables import match, only_image, read_counts, read_positions, read_symbols, read_table

SPOTFILE = "alignment_table_"
SPOTFILE_COLUMNS = ("x", "y", "pixel_x", "pixel_y", "selected")
METADATA = "metaData.csv"
STAGGERED_COLUMN_UM = 6200.0 / (66 - 1)
STAGGERED_ROW_UM = 6600.0 / (63 - 1)
AXES_TOLERANCE = 0.03  # the two axes of the four public 2k sections give scales that differ by 0.4 %


def _tables(root: Path) -> dict[str, Path]:
    found = {path.stem.removeprefix(SPOTFILE): path for path in root.glob(f"{SPOTFILE}*.tsv")}
    return {name: path for name, path in found.items() if _counts_file(root, name)}


def _counts_file(root: Path, name: str) -> Path | None:
    return next((path for path in (root / f"{name}.tsv.gz", root / f"{name}.tsv") if path.is_file()), None)


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    return "" if _tables(root) else f"needs NAME.tsv.gz and {SPOTFILE}NAME.tsv"


def names(root: Path) -> list[str]:
    """Names of the sections that have both tables."""
    return sorted(_tables(root))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one; a section without an image is read counts-only.

    A depth told by the metadata is kept as ``uns['hifusion']['z']``, in the metadata's unit.

    Parameters
    ----------
    root
        Folder that holds the tables.
    sections
        Names to read; all of them where None.
    options
        ``images``, ``patients`` and ``mpp`` stand before what the layout says.

    Raises
    ------
    InputError
        Unknown section, or a file of it that cannot be used.
    """
    tables, metadata, symbols = _tables(root), _metadata(root), read_symbols(root)
    for name in chosen(sorted(tables), sections, root):
        facts = metadata.get(name, {})
        section = _read_section(root, name, tables[name], facts.get("individual"), symbols, options)
        if facts.get("z"):
            section.uns["hifusion"]["z"] = float(facts["z"])
        yield section


def _metadata(root: Path) -> dict[str, dict[str, str]]:
    """What is told of each section; its samples are paths on the computer of whoever wrote it."""
    if not (root / METADATA).exists():
        return {}
    table = read_table(root / METADATA, ("samples",), "table of metadata", None)
    facts = {}
    for row in table.astype(str).to_dict("records"):
        name = PureWindowsPath(row["samples"]).name.removesuffix(".gz").removesuffix(".tsv")  # takes / and \
        facts[name] = {str(key): value for key, value in row.items() if value != "nan"}
    for name, told in facts.items():
        if not told.get("z", "0").replace(".", "", 1).removeprefix("-").isdigit():
            raise InputError(f"{root / METADATA}: z of {name} is {told['z'][:40]!r}; it must be a number")
    return facts


def _read_section(
    root: Path, name: str, spotfile: Path, patient: str | None, symbols: dict[str, str], options: ReadOptions
) -> AnnData:
    counts_file = _counts_file(root, name) or root / f"{name}.tsv.gz"
    counts, spots, gene_ids = read_counts(counts_file)
    positions = read_positions(spotfile, SPOTFILE_COLUMNS)
    tissue = positions[positions["selected"] == 1]
    known = match(spots, tissue, len(tissue), counts_file, spotfile)
    spots = [spot for spot, has in zip(spots, known, strict=True) if has]
    mpp, pitch_um = _scale(positions, spotfile, options)
    tissue = tissue.loc[spots]
    return assemble(
        counts[known],
        name=name,
        options=options,
        source=counts_file,
        spots=spots,
        genes=[symbols.get(gene, gene) for gene in gene_ids],
        gene_ids=gene_ids,
        centres_px=tissue[["pixel_x", "pixel_y"]].to_numpy(),
        array_row=tissue["y"].to_numpy(),
        array_col=tissue["x"].to_numpy(),
        mpp=mpp,
        spot_diameter_um=SPOT_DIAMETER_UM,
        pitch_um=pitch_um,
        patient=patient,
        image=only_image(list(root.glob(f"{name}.*")), name),
    )


def _scale(positions: pd.DataFrame, spotfile: Path, options: ReadOptions) -> tuple[float, float]:
    """um per pixel and um between neighbours, from the whole array."""
    row, column = positions["y"].to_numpy(), positions["x"].to_numpy()
    staggered = len(np.unique((row + column) % 2)) == 1
    pitch_um = float(np.hypot(STAGGERED_COLUMN_UM, STAGGERED_ROW_UM)) if staggered else PITCH_UM
    if options.mpp:
        return options.mpp, pitch_um
    lattice = fit_lattice(row, column, positions[["pixel_x", "pixel_y"]].to_numpy(), spotfile)
    if lattice is None:
        raise InputError(f"{spotfile}: {len(positions)} spots on one line do not tell the scale; give it with --mpp")
    by_column = (STAGGERED_COLUMN_UM if staggered else PITCH_UM) / lattice.column_px
    by_row = (STAGGERED_ROW_UM if staggered else PITCH_UM) / lattice.row_px
    if abs(by_column / by_row - 1) > AXES_TOLERANCE:
        raise InputError(
            f"{spotfile}: columns say {by_column:.3f} um per pixel, rows {by_row:.3f}, so it is no known array; "
            "give the scale with --mpp"
        )
    return (by_column + by_row) / 2, pitch_um
