"""stnet: breast cancer, legacy Spatial Transcriptomics, the flat files of Mendeley Data 29ntw7sh4r.

For each section ``<section>_stdata.tsv.gz`` (rows are spots ``XxY`` of the whole array, columns Ensembl ids; genes
without a count are left out), ``spots_<section>.csv.gz`` (index ``XxY``, X and Y in pixels, spots under tissue only)
and ``HE_<section>.jpg``. The letters before a section's number differ between its files (BC23209_C1, BT23209_C1), so
the number and the replicate name it; ``metadata.csv`` (type, patient, replicate and the files' names) stands before
that. ``*_Coords.tsv.gz``, the tumour labels, is not read.

Citation: He et al., Nature Biomedical Engineering 4:827 (2020), doi 10.1038/s41551-020-0578-x. Licence CC BY 4.0.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers.assemble import assemble, chosen
from hifusion.readers.her2st import PITCH_UM, SPOT_DIAMETER_UM
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.readers.tables import match, only_image, pitch_px, read_counts, read_positions, read_symbols, read_table

COUNTS = re.compile(r"([A-Za-z]*\d+_\w+)_stdata\.tsv(\.gz)?")
LETTERS = re.compile(r"^[A-Za-z]*")
METADATA = "metadata.csv"
METADATA_COLUMNS = ("patient", "count_matrix", "spot_coordinates", "histology_image")
_SPOT = re.compile(r"(\d+)x(\d+)")


def _tables(root: Path) -> dict[str, Path]:
    found = ((COUNTS.fullmatch(path.name), path) for path in sorted(root.glob("[!.]*_stdata.tsv*")))
    return {match[1]: path for match, path in found if match}


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    return "" if _tables(root) else "needs <section>_stdata.tsv.gz"


def names(root: Path) -> list[str]:
    """Names of the sections that have a count table, such as ``BC23209_C1``."""
    return sorted(_tables(root))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one; a section without an image is read counts-only.

    Genes keep their Ensembl ids as names, unless a table ``*genes.tsv`` (gene_id, gene_name) lies beside them.

    Parameters
    ----------
    root
        Folder that holds the files.
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
        yield _read_section(root, name, tables[name], metadata.get(tables[name].name, {}), symbols, options)


def _metadata(root: Path) -> dict[str, dict[str, str]]:
    """Rows of the metadata by the name of their count table."""
    if not (root / METADATA).exists():
        return {}
    table = read_table(root / METADATA, METADATA_COLUMNS, "table of metadata", ",")
    rows = table[list(METADATA_COLUMNS)].astype(str).to_dict("records")
    return {row["count_matrix"]: {str(key): str(value) for key, value in row.items()} for row in rows}


def _read_section(
    root: Path, name: str, counts_file: Path, facts: dict[str, str], symbols: dict[str, str], options: ReadOptions
) -> AnnData:
    counts, spots, gene_ids = read_counts(counts_file)
    spotfiles = [root / facts["spot_coordinates"]] if facts else _companions(root, "spots_", name)
    spotfile = next(iter(spotfiles), root / f"spots_{name}.csv.gz")
    positions = _read_spots(spotfile)
    known = match(spots, positions, len(positions), counts_file, spotfile)
    spots = [spot for spot, has in zip(spots, known, strict=True) if has]
    positions = positions.loc[spots]
    images = [root / facts["histology_image"]] if facts else []
    return assemble(
        counts[known],
        name=name,
        options=options,
        source=counts_file,
        spots=spots,
        genes=[symbols.get(gene, gene) for gene in gene_ids],
        gene_ids=gene_ids,
        centres_px=positions[["pixel_x", "pixel_y"]].to_numpy(),
        array_row=positions["y"].to_numpy(),
        array_col=positions["x"].to_numpy(),
        mpp=options.mpp or PITCH_UM / pitch_px(positions, spotfile),
        spot_diameter_um=SPOT_DIAMETER_UM,
        pitch_um=PITCH_UM,
        patient=facts["patient"] if facts else name.split("_")[0],
        image=only_image([path for path in images if path.is_file()] or _companions(root, "HE_", name), name),
    )


def _companions(root: Path, before: str, name: str) -> list[Path]:
    """Files of the section, whatever letters stand before its number."""
    key = LETTERS.sub("", name)
    exact = re.compile(rf"{before}[A-Za-z]*{re.escape(key)}\.\w+(\.gz)?")
    return [path for path in sorted(root.glob(f"{before}*")) if exact.fullmatch(path.name)]


def _read_spots(path: Path) -> pd.DataFrame:
    pixels = read_positions(path, ("X", "Y"), separator=",")
    found = [_SPOT.fullmatch(str(spot)) for spot in pixels.index]
    if not all(found):
        wrong = str(pixels.index[found.index(None)])[:60]
        raise InputError(f"{path}: row {wrong!r} is not named as a spot; rows are named XxY, such as 10x12")
    array = np.array([[int(spot[1]), int(spot[2])] for spot in found if spot]).reshape(-1, 2)
    return pd.DataFrame(
        {"x": array[:, 0], "y": array[:, 1], "pixel_x": pixels["X"].to_numpy(), "pixel_y": pixels["Y"].to_numpy()},
        index=pixels.index.astype(str),
    )
