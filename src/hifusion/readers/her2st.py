"""her2st: HER2+ breast cancer, legacy Spatial Transcriptomics, the raw layout of github.com/almaan/her2st.

``data/ST-cnts/<section>.tsv.gz`` (rows are spots ``XxY``, columns genes), ``data/ST-spotfiles/<section>_selection.tsv``
(x, y, pixel_x, pixel_y in full-resolution pixels) and, where there is one, the image in
``data/ST-imgs/<patient>/<section>/``.

Citation: Andersson et al., Nature Communications 12:6012 (2021), doi 10.1038/s41467-021-26271-2. Licence CC BY 4.0.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.section import HIRES_PX, build_section
from hifusion.slide import Slide

# The array: 100 um spots, 200 um apart (Stahl et al., Science 2016). The images' dpi tag (72) is no scale.
SPOT_DIAMETER_UM = 100.0
PITCH_UM = 200.0
COUNTS = Path("data/ST-cnts")
SPOTFILES = Path("data/ST-spotfiles")
IMAGES = Path("data/ST-imgs")
SPOTFILE_COLUMNS = ("x", "y", "pixel_x", "pixel_y")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")  # published as .jpg; a converted image is not passed over
# Sections share the array's coordinates, so those of another section match in part: by 94 % at most among the 36,
# while a section's own two files match by 98 to 100 %.
LEAST_MATCH = 0.95


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
    counts, spots, genes = _read_counts(counts_file)
    spotfile = root / SPOTFILES / f"{name}_selection.tsv"
    positions = _read_spotfile(spotfile)
    known = [spot in positions.index for spot in spots]
    if sum(known) < LEAST_MATCH * max(len(spots), len(positions)):
        raise InputError(
            f"{spotfile}: only {sum(known)} spots stand both here (of {len(positions)}) and in {counts_file.name} (of "
            f"{len(spots)}), at least {LEAST_MATCH:.0%} must; give the two files of the same section and the same spots"
        )
    counts, spots = counts[known], [spot for spot, has in zip(spots, known, strict=True) if has]
    positions = positions.loc[spots]
    image = options.images.get(name) or _find_image(root, name)
    slide = Slide(image) if image else None
    return build_section(
        counts,
        genes=genes,
        spots=spots,
        centres_px=positions[["pixel_x", "pixel_y"]].to_numpy(),
        name=name,
        patient=options.patients.get(name, name[0]),
        mpp=options.mpp or PITCH_UM / _pitch_px(positions, spotfile),
        spot_diameter_um=SPOT_DIAMETER_UM,
        pitch_um=PITCH_UM,
        array_row=positions["y"].to_numpy(),
        array_col=positions["x"].to_numpy(),
        image=image,
        thumbnail=slide.thumbnail(HIRES_PX) if slide else None,
        full_size_px=slide.size_px if slide else None,
        source=str(counts_file),
    )


def _read_counts(path: Path) -> tuple[sp.csr_matrix, list[str], list[str]]:
    try:
        with gzip.open(path, "rb") as file:
            header, _, body = file.read().partition(b"\n")
        # The header is split by hand: pandas would rename a gene that stands twice instead of telling.
        genes = header.decode().rstrip("\r").split("\t")[1:]
        table = pd.read_csv(io.BytesIO(body), sep="\t", header=None, index_col=0, dtype={0: str}, na_filter=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such count table; `data/ST-cnts` lists the sections there are") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as a gzipped count table ({_one_line(error)}); get it anew"
        ) from error
    if table.shape[1] != len(genes):
        raise InputError(
            f"{path}: the header names {len(genes)} genes but rows have {table.shape[1]} values; the table is damaged, "
            "get it anew"
        )
    words = [genes[i] for i, kind in enumerate(table.dtypes) if kind.kind not in "iuf"]
    if words:
        raise InputError(f"{path}: gene {words[0]} has values that are not numbers; counts are whole numbers >= 0")
    return sp.csr_matrix(table.to_numpy()), [str(spot) for spot in table.index], genes


def _read_spotfile(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, sep="\t")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such spotfile; each count table needs one") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a spotfile ({_one_line(error)}); get it anew") from error
    missing = [column for column in SPOTFILE_COLUMNS if column not in table]
    if missing:
        raise InputError(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    table = table[list(SPOTFILE_COLUMNS)].apply(pd.to_numeric, errors="coerce")
    if not np.isfinite(table.to_numpy(dtype=np.float64)).all():
        raise InputError(f"{path}: a position is empty or not a number; every row needs {', '.join(SPOTFILE_COLUMNS)}")
    table.index = pd.Index([f"{x:.0f}x{y:.0f}" for x, y in zip(table["x"], table["y"], strict=True)])
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise InputError(f"{path}: spot {twice} stands more than once; each must be unique")
    return table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _pitch_px(positions: pd.DataFrame, source: Path) -> float:
    """Pixels between neighbouring spots: slope of pixel against array position, mean of both axes."""
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


def _find_image(root: Path, name: str) -> Path | None:
    folder = root / IMAGES / name[0] / name
    images = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(images) > 1:
        raise InputError(f"{folder}: holds {len(images)} images; keep the one that belongs to section {name}")
    return images[0] if images else None
