"""visium_hd: 10x Genomics Visium HD, the ``binned_outputs`` of Space Ranger 3 and later.

``binned_outputs/square_XXXum/`` with a matrix as Visium has it and ``spatial/tissue_positions.parquet``. Bins under
tissue are summed into squares of ``options.bin_um``; the folder that is read is the coarsest whose bins fill such a
square. The default, 64 um, is near a Visium spot (55 um): a section then has some 10,000 squares with thousands of
counts each, while 16 um bins are 165,000 with a region patch for each (100 GB), and 8 um bins four times that.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers import spaceranger, tenx
from hifusion.readers.annotated import flaw
from hifusion.readers.assemble import assemble, chosen
from hifusion.readers.lattice import fit_lattice
from hifusion.readers.options import NOTHING_TOLD, ReadOptions

DEFAULT_BIN_UM = 64.0
_SQUARE = re.compile(r"square_(\d+)um")


def _squares(folder: Path) -> dict[int, Path]:
    """Side of the bins in um -> their folder."""
    for binned in (folder / "binned_outputs", folder):
        found = {
            int(size[1]): path
            for path in sorted(binned.glob("square_*um"))
            if (size := _SQUARE.fullmatch(path.name)) and int(size[1]) > 0 and path.is_dir()
        }
        if found:
            return found
    return {}


def _holds(folder: Path) -> bool:
    return bool(_squares(folder))


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    return "" if spaceranger.sample_folders(root, _holds) else "needs binned_outputs/square_XXXum"


def names(root: Path) -> list[str]:
    """Names of the samples: those of their folders."""
    return sorted(spaceranger.sample_folders(root, _holds))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one; a section is counts-only unless ``options.images`` names its slide.

    Parameters
    ----------
    root
        A folder that holds ``binned_outputs`` (in ``outs`` or not), that folder itself, or a folder of samples.
    sections
        Names to read; all of them where None.
    options
        ``bin_um``, a multiple of the side of bins there are; :data:`DEFAULT_BIN_UM` where None. ``images``,
        ``patients`` and ``mpp`` stand before what the layout says.

    Raises
    ------
    InputError
        Unknown section, a ``bin_um`` that no bins fill, or a file that cannot be used.
    """
    folders = spaceranger.sample_folders(root, _holds)
    for name in chosen(sorted(folders), sections, root):
        yield _read_section(folders[name], name, options)


def _read_section(root: Path, name: str, options: ReadOptions) -> AnnData:
    bin_um = DEFAULT_BIN_UM if options.bin_um is None else options.bin_um
    squares = _squares(root)
    fitting = [side for side in squares if bin_um > 0 and bin_um % side == 0]
    if not fitting:
        sides = ", ".join(map(str, sorted(squares)))
        raise InputError(
            f"{root}: bin_um={bin_um:g} is no multiple of the bins there are ({sides} um); give one that is"
        )
    side = max(fitting)
    folder = squares[side]
    counts_file, spotfile = spaceranger.matrix_and_positions(folder)
    matrix = tenx.read_matrix(counts_file)
    wrong = flaw(matrix.counts.data)
    if wrong:  # before bins are summed: afterwards two halves would make a whole
        raise InputError(f"{counts_file}: some counts are {wrong}; raw counts are whole numbers >= 0")
    positions = spaceranger.read_positions(spotfile)
    factors = spaceranger.read_scalefactors(folder)
    lattice = fit_lattice(
        positions["array_row"].to_numpy(), positions["array_col"].to_numpy(), positions[["x", "y"]].to_numpy(), spotfile
    )
    if lattice is None:
        raise InputError(f"{spotfile}: {len(positions)} positions on one line do not fix the array; get it anew")
    by_array = 2 * side / (lattice.column_px + lattice.row_px)
    by_file = factors.get("microns_per_pixel", by_array)
    if abs(by_array / by_file - 1) > spaceranger.SCALE_TOLERANCE:
        raise InputError(
            f"{spotfile}: bins lie {side * by_file / by_array:.2f} um apart by microns_per_pixel={by_file:.4f}, in a "
            f"folder of {side} um bins; give the files of one run"
        )
    rows, positions = spaceranger.under_tissue(matrix, positions, counts_file, spotfile)
    factor = round(bin_um) // side
    binned = sum_bins(
        matrix.counts[rows].astype(np.int64),
        positions["array_row"].to_numpy(),
        positions["array_col"].to_numpy(),
        factor,
    )
    to_centre = (factor - 1) / 2  # of a square, in bins from its first bin
    return assemble(
        binned.counts,
        name=name,
        options=options,
        source=counts_file,
        spots=[
            f"s_{round(bin_um):03d}um_{row:05d}_{column:05d}-1"
            for row, column in zip(binned.row, binned.column, strict=True)
        ],
        genes=matrix.genes,
        gene_ids=matrix.gene_ids,
        centres_px=lattice.centres_px(binned.row * factor + to_centre, binned.column * factor + to_centre),
        array_row=binned.row,
        array_col=binned.column,
        mpp=options.mpp or by_file,
        spot_diameter_um=bin_um,
        pitch_um=bin_um,
        picture=spaceranger.read_picture(folder, factors),
    )


class Binned(NamedTuple):
    """Bins summed into squares, sorted by row, then column."""

    counts: sp.csr_matrix
    """``(squares, genes)``."""
    row: np.ndarray
    column: np.ndarray


def sum_bins(counts: sp.csr_matrix, row: np.ndarray, column: np.ndarray, factor: int) -> Binned:
    """Sum bins into squares of ``factor`` x ``factor`` bins; each bin counts once, squares without a bin are left out.

    Parameters
    ----------
    counts
        ``(bins, genes)``; never made dense.
    row, column
        Array positions of the bins, ``(bins,)``.
    """
    squares, of = np.unique(np.column_stack([row // factor, column // factor]), axis=0, return_inverse=True)
    of = of.ravel()
    members = sp.csr_matrix((np.ones(len(of), dtype=counts.dtype), (of, np.arange(len(of)))), (len(squares), len(of)))
    return Binned(sp.csr_matrix(members @ counts), squares[:, 0], squares[:, 1])
