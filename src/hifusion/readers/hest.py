"""hest: HEST-1k, as published on Hugging Face (MahmoodLab/hest).

``st/<id>.h5ad`` (raw counts in ``X``, (x, y) full-resolution pixels in ``obsm['spatial']``), ``wsis/<id>.tif`` and
``metadata/<id>.json``, or a table ``HEST_*.csv`` beside them. ``patches/`` is not needed: regions are cut anew.

Three traps. Patient names repeat between data sets ("Patient 1"), so a patient is named with its data set. The scale is
``pixel_size_um_estimated``; ``pixel_size_um_embedded`` is what the image's maker wrote and may be a print's dpi. Visium
HD and Xenium are pooled into large squares while ``inter_spot_dist`` says 2 um or nothing, so the pitch is measured
wherever it disagrees.

Citation: Jaume et al., NeurIPS 2024, arXiv 2406.16192. Licences are those of the single data sets.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anndata import AnnData

from hifusion import files
from hifusion.errors import InputError
from hifusion.readers import annotated
from hifusion.readers.assemble import assemble, chosen
from hifusion.readers.lattice import pitch_px
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.readers.tables import only_image, read_table
from hifusion.section import read_h5ad

SECTIONS = Path("st")
SLIDES = Path("wsis")
METADATA = Path("metadata")
PITCH_TOLERANCE = 0.1  # of the pitch: neighbours measured on slightly turned or torn arrays agree far better


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    return "" if names(root) else f"needs {SECTIONS}/<id>.h5ad"


def names(root: Path) -> list[str]:
    """Ids of the sections that have an ``.h5ad``."""
    return sorted(path.stem for path in (root / SECTIONS).glob("[!.]*.h5ad"))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one; a section without a slide in ``wsis`` is read counts-only.

    Parameters
    ----------
    root
        Folder that holds ``st``.
    sections
        Ids to read; all of them where None.
    options
        ``images``, ``patients`` and ``mpp`` stand before what the layout says.

    Raises
    ------
    InputError
        Unknown section, or a file of it that cannot be used.
    """
    for name in chosen(names(root), sections, root):
        yield _read_section(root, name, options)


def _read_section(root: Path, name: str, options: ReadOptions) -> AnnData:
    path = root / SECTIONS / f"{name}.h5ad"
    data, facts = read_h5ad(path), _metadata(root, name)
    centres, tissue = annotated.centres_px(data, path), annotated.under_tissue(data.obs)
    if not tissue.any():
        raise InputError(f"{path}: none of {data.n_obs} spots is under tissue; at least one must have in_tissue 1")
    centres, obs = centres[tissue], data.obs[tissue]
    counts, genes = annotated.raw_counts(data, path)
    symbols, ids = annotated.gene_names(genes)
    entry = annotated.library(data, path)
    mpp = options.mpp or _mpp(facts, entry, path)
    step_px = pitch_px(centres, path)
    pitch_um, diameter_um = (
        annotated.positive(facts.get("inter_spot_dist")),
        annotated.positive(facts.get("spot_diameter")),
    )
    if pitch_um is None or diameter_um is None or abs(step_px * mpp / pitch_um - 1) > PITCH_TOLERANCE:
        pitch_um = diameter_um = step_px * mpp  # pooled into squares
    row, column = annotated.array_positions(obs, centres, step_px)
    return assemble(
        counts[tissue],
        name=name,
        options=options,
        source=path,
        spots=obs.index.tolist(),
        genes=symbols,
        gene_ids=ids,
        centres_px=centres,
        array_row=row,
        array_col=column,
        mpp=mpp,
        spot_diameter_um=diameter_um,
        pitch_um=pitch_um,
        patient=_patient(facts, name),
        image=only_image(list((root / SLIDES).glob(f"{name}.*")), name),
        picture=annotated.picture(entry),
    )


def _metadata(root: Path, name: str) -> dict[str, Any]:
    path = root / METADATA / f"{name}.json"
    if path.exists():
        facts = files.read_json(path)
        if not isinstance(facts, dict):
            raise InputError(f"{path}: holds no facts by name; get it anew")
        return facts
    for table in sorted(root.glob("HEST_*.csv")):
        rows = read_table(table, ("id",), "table of metadata", ",")
        of = rows[rows["id"].astype(str) == name]
        if len(of):
            return {str(key): value for key, value in of.iloc[0].to_dict().items()}
    return {}


def _mpp(facts: dict[str, Any], entry: Mapping[str, Any], path: Path) -> float:
    for key in ("pixel_size_um_estimated", "pixel_size_um_embedded"):
        if told := annotated.positive(facts.get(key)):
            return told
    diameter_um = annotated.positive(facts.get("spot_diameter"))
    diameter_px = annotated.spot_diameter_px(entry)
    if diameter_um and diameter_px:
        return diameter_um / diameter_px
    raise InputError(
        f"{path}: neither {METADATA / path.stem}.json nor a HEST_*.csv gives pixel_size_um_estimated; get one, or give "
        "the scale with --mpp"
    )


def _patient(facts: dict[str, Any], name: str) -> str:
    patient, title = (str(facts.get(key) or "") for key in ("patient", "dataset_title"))
    if patient in ("", "nan", "None"):
        return name
    return f"{title}: {patient}" if title not in ("", "nan") else patient
