"""her2st: HER2+ breast cancer, legacy Spatial Transcriptomics, the raw layout of github.com/almaan/her2st.

``data/ST-cnts/<section>.tsv.gz`` (rows are spots ``XxY``, columns genes), ``data/ST-spotfiles/<section>_selection.tsv``
(x, y, pixel_x, pixel_y in full-resolution pixels) and, where there are such, the image in
``data/ST-imgs/<patient>/<section>/`` and a pathologist's labels in
``data/ST-pat/lbl/<section>_labeled_coordinates.tsv``: its x and y are to be rounded, some are empty, and its pixels are
of another image, upside down.

Citation: Andersson et al., Nature Communications 12:6012 (2021), doi 10.1038/s41467-021-26271-2. Licence CC BY 4.0.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers.assemble import assemble
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.readers.tables import LEAST_MATCH, match, only_image, pitch_px, read_counts, read_positions, read_table

# The array: 100 um spots, 200 um apart (Stahl et al., Science 2016). The images' dpi tag (72) is no scale.
SPOT_DIAMETER_UM = 100.0
PITCH_UM = 200.0
COUNTS = Path("data/ST-cnts")
SPOTFILES = Path("data/ST-spotfiles")
IMAGES = Path("data/ST-imgs")
LABELS = Path("data/ST-pat/lbl")
SPOTFILE_COLUMNS = ("x", "y", "pixel_x", "pixel_y")


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    missing = [str(folder) for folder in (COUNTS, SPOTFILES) if not (root / folder).is_dir()]
    return f"needs {' and '.join(missing)}" if missing else ""


def names(root: Path) -> list[str]:
    """Names of the sections that have a count table."""
    return sorted(path.name.removesuffix(".tsv.gz") for path in (root / COUNTS).glob("*.tsv.gz"))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one; a section without an image is read counts-only.

    Parameters
    ----------
    root
        Folder that holds ``data/``.
    sections
        Names to read; all of them where None.
    options
        ``images``, ``patients`` and ``mpp`` stand before what the layout says.

    Raises
    ------
    InputError
        Unknown section, or a file of it that cannot be used.
    """
    for name in names(root) if sections is None else sections:
        yield _read_section(root, name, options)


def _read_section(root: Path, name: str, options: ReadOptions) -> AnnData:
    counts_file = root / COUNTS / f"{name}.tsv.gz"
    counts, spots, genes = read_counts(counts_file)
    spotfile = root / SPOTFILES / f"{name}_selection.tsv"
    positions = read_positions(spotfile, SPOTFILE_COLUMNS)
    known = match(spots, positions, max(len(spots), len(positions)), counts_file, spotfile)
    counts, spots = counts[known], [spot for spot, has in zip(spots, known, strict=True) if has]
    positions = positions.loc[spots]
    return assemble(
        counts,
        name=name,
        options=options,
        source=counts_file,
        genes=genes,
        spots=spots,
        centres_px=positions[["pixel_x", "pixel_y"]].to_numpy(),
        array_row=positions["y"].to_numpy(),
        array_col=positions["x"].to_numpy(),
        mpp=options.mpp or PITCH_UM / pitch_px(positions, spotfile),
        spot_diameter_um=SPOT_DIAMETER_UM,
        pitch_um=PITCH_UM,
        labels=_labels(root / LABELS / f"{name}_labeled_coordinates.tsv", spots),
        patient=name[0],
        image=only_image(list((root / IMAGES / name[0] / name).glob("[!.]*")), name),
    )


def _labels(path: Path, spots: Sequence[str]) -> list[str | None] | None:
    """Label of each spot, None where it has none; None where the section was not labelled."""
    if not path.exists():
        return None
    table = read_table(path, ("x", "y", "label"), "table of labels")
    xy = table[["x", "y"]].apply(pd.to_numeric, errors="coerce").round()
    told = np.isfinite(xy).all(axis=1) & table["label"].notna()
    labels = table.loc[told, "label"].astype(str)
    labels.index = pd.Index([f"{int(x)}x{int(y)}" for x, y in xy[told].to_numpy()])
    if labels.index.has_duplicates:
        twice = labels.index[labels.index.duplicated()][0]
        raise InputError(f"{path}: spot {twice} is labelled more than once (x and y rounded); each spot has one label")
    counted = int(labels.index.isin(spots).sum())
    if counted < LEAST_MATCH * len(labels):
        raise InputError(
            f"{path}: only {counted} of {len(labels)} labelled spots were counted, at least {LEAST_MATCH:.0%} must be; "
            "give the labels of this very section, or take the file away"
        )
    found = labels.reindex(spots)
    return found.where(found.notna(), None).tolist()
