"""anndata: any ``.h5ad`` with ``obsm['spatial']``, or a folder of them; a file is a section, named as the file.

Raw counts come from ``layers['counts']``, ``raw.X`` or ``X``, whichever holds whole numbers first. Sections that
hifusion wrote keep what ``uns['hifusion']`` says; those without genes are positions alone. In other files the scale
comes from ``uns['spatial']`` (``microns_per_pixel``, or ``spot_diameter_fullres`` of Visium) or from ``options.mpp``.
Words in ``obs['label']`` are kept: the regions that spots lie in.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers import annotated
from hifusion.readers.assemble import assemble, chosen
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.section import read_h5ad, validate_section

SUFFIX = ".h5ad"


def _files(root: Path) -> dict[str, Path]:
    found = [root] if root.is_file() else sorted(root.glob(f"[!.]*{SUFFIX}"))
    return {path.name.removesuffix(SUFFIX): path for path in found if path.name.endswith(SUFFIX)}


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    return "" if _files(root) else f"needs {SUFFIX} files"


def names(root: Path) -> list[str]:
    """Names of the files without ``.h5ad``."""
    return sorted(_files(root))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one.

    Parameters
    ----------
    root
        An ``.h5ad`` file or a folder of them.
    sections
        Names to read; all of them where None.
    options
        ``images``, ``patients`` and ``mpp`` stand before what the files say.

    Raises
    ------
    InputError
        Unknown section, no positions, no raw counts (the message says what was found), or no scale.
    """
    files = _files(root)
    for name in chosen(sorted(files), sections, root):
        data = read_h5ad(files[name])
        yield (_own_section if "hifusion" in data.uns else _any_section)(data, name, files[name], options)


def _own_section(data: AnnData, name: str, path: Path, options: ReadOptions) -> AnnData:
    validate_section(data, str(path))
    facts = data.uns["hifusion"]
    if facts["run"]:
        raise InputError(f"{path}: is a prediction by {facts['run']} and holds no counts; give a measured section")
    counts, genes = annotated.raw_counts(data, path) if data.n_vars else (None, data.var)
    symbols, ids = annotated.gene_names(genes)
    section = assemble(
        counts,
        name=name,
        options=options,
        source=path,
        spots=data.obs_names.tolist(),
        genes=symbols,
        gene_ids=ids,
        centres_px=data.obsm["spatial"],
        array_row=data.obs["array_row"].to_numpy(),
        array_col=data.obs["array_col"].to_numpy(),
        mpp=options.mpp or facts["mpp"],
        spot_diameter_um=facts["spot_diameter_um"],
        pitch_um=facts["pitch_um"],
        patient=facts["patient"],
        in_tissue=data.obs["in_tissue"].to_numpy(),
        labels=annotated.labels(data.obs),
        image=Path(facts["image"]) if facts["image"] else None,
        picture=annotated.picture(annotated.library(data, path)),
    )
    section.uns["hifusion"] |= {key: value for key, value in facts.items() if key not in section.uns["hifusion"]}
    return section


def _any_section(data: AnnData, name: str, path: Path, options: ReadOptions) -> AnnData:
    centres, tissue = annotated.centres_px(data, path), annotated.under_tissue(data.obs)
    if not tissue.any():
        raise InputError(f"{path}: none of {data.n_obs} spots is under tissue; at least one must have in_tissue 1")
    counts, genes = annotated.raw_counts(data, path)
    symbols, ids = annotated.gene_names(genes)
    entry = annotated.library(data, path)
    centres, obs = centres[tissue], data.obs[tissue]
    scale = annotated.scale_of(obs, centres, path, told_mpp=options.mpp, entry=entry)
    row, column = annotated.array_positions(obs, centres, scale.pitch_um / scale.mpp)
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
        mpp=scale.mpp,
        spot_diameter_um=scale.spot_diameter_um,
        pitch_um=scale.pitch_um,
        labels=annotated.labels(obs),
        picture=annotated.picture(entry),
    )
