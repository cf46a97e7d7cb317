"""her2st: HER2+ breast cancer, legacy Spatial Transcriptomics, the raw layout of github.com/almaan/her2st.

``data/ST-cnts/<section>.tsv.gz`` (rows are spots ``XxY``, columns genes), ``data/ST-spotfiles/<section>_selection.tsv``
(x, y, pixel_x, pixel_y in full-resolution pixels) and, where there is one, the image in
``data/ST-imgs/<patient>/<section>/``.

Citation: Andersson et al., Nature Communications 12:6012 (2021), doi 10.1038/s41467-021-26271-2. Licence CC BY 4.0.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from anndata import AnnData

from hifusion.readers.assemble import assemble
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.readers.tables import match, only_image, pitch_px, read_counts, read_positions

# The array: 100 um spots, 200 um apart (Stahl et al., Science 2016). The images' dpi tag (72) is no scale.
SPOT_DIAMETER_UM = 100.0
PITCH_UM = 200.0
COUNTS = Path("data/ST-cnts")
SPOTFILES = Path("data/ST-spotfiles")
IMAGES = Path("data/ST-imgs")
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
        patient=name[0],
        image=only_image(list((root / IMAGES / name[0] / name).glob("[!.]*")), name),
    )
