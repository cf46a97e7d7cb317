"""visium: 10x Genomics Visium, the ``outs`` folder of Space Ranger 1, 2 and later, CytAssist included.

``filtered_feature_bc_matrix.h5`` (else the raw one, else the Matrix Market folders) with
``spatial/tissue_positions[_list].csv``, ``scalefactors_json.json`` and small pictures. The spots are those under
tissue. The full-resolution slide is not in ``outs``: ``options.images`` gives it, and without it a section is
counts-only. Positions are in pixels of the image Space Ranger was given as ``--image`` (with CytAssist the
microscope's, where there was one, else the CytAssist image itself). ``raw_probe_bc_matrix.h5`` counts probes, not
genes, and is not read.

The scale comes from the array: spots of a row are 100 um apart. It is compared with ``spot_diameter_fullres``, which
stands for 65 um, not for the spot's 55 um.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers import spaceranger, tenx
from hifusion.readers.assemble import assemble, chosen
from hifusion.readers.lattice import VISIUM_FULLRES_UM, VISIUM_PITCH_UM, VISIUM_SPOT_UM, visium_mpp
from hifusion.readers.options import NOTHING_TOLD, ReadOptions


def _holds(folder: Path) -> bool:
    return spaceranger.find_positions(folder) is not None and tenx.find_matrix(folder) is not None


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    if spaceranger.sample_folders(root, _holds):
        return ""
    near = [root, root / "outs"]
    missing = []
    if not any(map(spaceranger.find_positions, near)):
        missing.append("spatial/tissue_positions.csv")
    if not any(map(tenx.find_matrix, near)):
        probes = any(path for folder in near for path in folder.glob(f"*{tenx.PROBES}"))
        missing.append(tenx.MATRICES[0] + (f" ({tenx.PROBES} counts probes, not genes)" if probes else ""))
    return f"needs {' and '.join(missing)}" if missing else "needs both files in one folder"


def names(root: Path) -> list[str]:
    """Names of the samples: those of their folders."""
    return sorted(spaceranger.sample_folders(root, _holds))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one; a section is counts-only unless ``options.images`` names its slide.

    Parameters
    ----------
    root
        An ``outs`` folder, a folder that holds one, or a folder of samples.
    sections
        Names to read; all of them where None.
    options
        ``images``, ``patients`` and ``mpp`` stand before what the layout says.

    Raises
    ------
    InputError
        Unknown section, or a file of it that cannot be used.
    """
    folders = spaceranger.sample_folders(root, _holds)
    for name in chosen(sorted(folders), sections, root):
        yield _read_section(folders[name], name, options)


def _read_section(folder: Path, name: str, options: ReadOptions) -> AnnData:
    counts_file, spotfile = spaceranger.matrix_and_positions(folder)
    factors = spaceranger.read_scalefactors(folder)
    if "bin_size_um" in factors:
        raise InputError(f"{folder}: holds Visium HD bins of {factors['bin_size_um']:g} um; read it as visium_hd")
    matrix = tenx.read_matrix(counts_file)
    positions = spaceranger.read_positions(spotfile)
    mpp = options.mpp or _mpp(positions, factors, spotfile)
    rows, positions = spaceranger.under_tissue(matrix, positions, counts_file, spotfile)
    return assemble(
        matrix.counts[rows],
        name=name,
        options=options,
        source=counts_file,
        spots=positions.index.tolist(),
        genes=matrix.genes,
        gene_ids=matrix.gene_ids,
        centres_px=positions[["x", "y"]].to_numpy(),
        array_row=positions["array_row"].to_numpy(),
        array_col=positions["array_col"].to_numpy(),
        mpp=mpp,
        spot_diameter_um=VISIUM_SPOT_UM,
        pitch_um=VISIUM_PITCH_UM,
        picture=spaceranger.read_picture(folder, factors),
    )


def _mpp(positions: pd.DataFrame, factors: dict[str, float], spotfile: Path) -> float:
    mpp = visium_mpp(
        positions["array_row"].to_numpy(),
        positions["array_col"].to_numpy(),
        positions[["x", "y"]].to_numpy(),
        spotfile,
    )
    if mpp is not None:
        spaceranger.refuse_other_scale(mpp, factors, spotfile)
        return mpp
    if "spot_diameter_fullres" in factors:
        return VISIUM_FULLRES_UM / float(factors["spot_diameter_fullres"])
    raise InputError(f"{spotfile}: {len(positions)} positions on one line do not tell the scale; give it with --mpp")
