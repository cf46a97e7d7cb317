"""The AnnData contract of one tissue section: build, validate, read, write."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from anndata._io.specs.registry import IORegistryError  # the one error of anndata that is of no builtin kind

from hifusion import files
from hifusion.errors import InputError
from hifusion.expression import sparse_log1p_cpm

OBS_COLUMNS = ("section", "patient", "in_tissue", "array_row", "array_col")
LABEL = "label"  # one more, where spots were labelled: the region each lies in, missing where nobody said
FACTS = ("section", "patient", "mpp", "spot_diameter_um", "pitch_um", "normalisation", "panel_digest", "run", "image")
# What anndata, h5py, zarr and their decoders raise on a damaged or foreign file.
UNREADABLE = (OSError, RuntimeError, KeyError, IndexError, ValueError, TypeError, AttributeError, IORegistryError)
_UNSAFE = re.compile(r"[/\\\x00-\x1f]")
HIRES_PX = 1000  # longest side of the picture kept inside a section, enough for scanpy's and squidpy's maps


def build_section(
    counts: sp.csr_matrix | None,
    *,
    spots: Sequence[str],
    centres_px: np.ndarray,
    name: str,
    patient: str,
    mpp: float,
    spot_diameter_um: float,
    pitch_um: float,
    array_row: np.ndarray,
    array_col: np.ndarray,
    genes: Sequence[str] = (),
    gene_ids: Sequence[str] | None = None,
    in_tissue: np.ndarray | None = None,
    labels: Sequence[str | None] | None = None,
    image: Path | None = None,
    thumbnail: np.ndarray | None = None,
    full_size_px: tuple[int, int] | None = None,
    source: str = "section",
) -> AnnData:
    """Build and validate a section: a measured one, or positions alone, which a run can predict.

    Parameters
    ----------
    counts
        Raw UMI counts ``(N, genes)``, whole numbers; None for positions alone (no genes, ``X`` of shape ``(N, 0)``).
    genes, gene_ids
        Gene symbols, unique; their Ensembl ids where known, which need not be.
    in_tissue
        bool ``(N,)``; all of them where None.
    labels
        Region of each spot, such as a pathologist's, None where a spot has none; no column ``label`` where all are.
    centres_px
        Spot centres (x, y) in full-resolution pixels, ``(N, 2)``.
    mpp
        um per full-resolution pixel.
    thumbnail, full_size_px
        A small uint8 ``(h, w, 3)`` picture of the slide and the slide's (width, height): scanpy and squidpy draw on it.
    source
        What a message calls the input: a file name.

    Raises
    ------
    InputError
        Duplicate spots or genes, counts that are NaN, negative or fractional, or positions that are not finite.
    """
    refuse_unsafe_name(name, source)
    _refuse_duplicates(spots, "spots", source)
    _refuse_duplicates(genes, "genes", source)
    layers = {}
    if counts is not None:
        counts = sp.csr_matrix(counts)
        _refuse_non_counts(counts, spots, source)
        layers["counts"] = counts.astype(np.int32)
    section = AnnData(
        X=sparse_log1p_cpm(layers["counts"]) if layers else np.zeros((len(spots), 0), dtype=np.float32),
        obs=pd.DataFrame(
            {
                "section": pd.Categorical([name] * len(spots)),
                "patient": pd.Categorical([patient] * len(spots)),
                "in_tissue": True if in_tissue is None else np.asarray(in_tissue, dtype=bool),
                "array_row": np.asarray(array_row),
                "array_col": np.asarray(array_col),
            },
            index=pd.Index(list(spots), dtype=object),
        ),
        var=pd.DataFrame(
            {} if gene_ids is None else {"gene_ids": list(gene_ids)}, index=pd.Index(list(genes), dtype=object)
        ),
        layers=layers,
        obsm={"spatial": np.asarray(centres_px, dtype=np.float64)},
    )
    if labels is not None and any(label is not None for label in labels):
        section.obs[LABEL] = pd.Categorical(np.array(labels, dtype=object))
    section.uns["hifusion"] = {
        "section": name,
        "patient": patient,
        "mpp": float(mpp),
        "spot_diameter_um": float(spot_diameter_um),
        "pitch_um": float(pitch_um),
        "normalisation": "log1p_cpm" if layers else "",
        "panel_digest": "",
        "run": "",
        "image": str(Path(image).resolve()) if image else "",
        "hifusion_version": version("hifusion"),
    }
    section.uns["spatial"] = {name: _spatial_entry(spot_diameter_um / mpp, thumbnail, full_size_px)}
    validate_section(section, source)
    return section


def refuse_unsafe_name(name: str, source: str) -> None:
    """Refuse the name of a section that could not be the name of a file: it becomes one, and never a path."""
    if not name.strip(". ") or name.startswith(".") or _UNSAFE.search(name):
        raise InputError(f"{source}: section {name!r} cannot be a file name; rename it, without / or a leading dot")


def _spatial_entry(
    spot_diameter_px: float, thumbnail: np.ndarray | None, full_size_px: tuple[int, int] | None
) -> dict[str, Any]:
    """What scanpy and squidpy look for.

    Without a picture they draw the spots alone, where told that there is none: ``scanpy.pl.spatial(..., img_key=None)``
    and ``squidpy.pl.spatial_scatter(..., img=False)``, which wants a scale all the same.
    """
    images: dict[str, np.ndarray] = {}
    scalefactors = {"spot_diameter_fullres": float(spot_diameter_px), "tissue_hires_scalef": 1.0}
    if thumbnail is not None and full_size_px is not None:
        images["hires"] = thumbnail
        scalefactors["tissue_hires_scalef"] = thumbnail.shape[1] / full_size_px[0]
    return {"images": images, "scalefactors": scalefactors, "metadata": {}}


def _refuse_duplicates(names: Iterable[str], what: str, source: str) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        listed = ", ".join(twice[:3])
        raise InputError(f"{source}: {len(twice)} {what} stand more than once ({listed}); each must be unique")


def _refuse_non_counts(counts: sp.csr_matrix, spots: Sequence[str], source: str) -> None:
    values = counts.data
    for wrong, what in (
        (~np.isfinite(values), "NaN or infinite"),
        (values < 0, "negative"),
        (values != np.floor(values), "fractional"),
        (values > np.iinfo(np.int32).max, "above 2^31 - 1"),
    ):
        if wrong.any():
            row = int(np.searchsorted(counts.indptr, np.flatnonzero(wrong)[0], side="right")) - 1
            raise InputError(
                f"{source}: {int(wrong.sum())} counts are {what} (first in spot {spots[row]}); raw counts are whole "
                "numbers >= 0, so give the table before any normalisation"
            )


def validate_section(section: AnnData, source: str = "section") -> None:
    """Check that ``section`` keeps the contract; what it lacks is named in one :class:`InputError`."""
    missing = [column for column in OBS_COLUMNS if column not in section.obs]
    missing += [] if "spatial" in section.obsm else ["obsm['spatial']"]
    missing += [] if "spatial" in section.uns else ["uns['spatial']"]
    facts = section.uns.get("hifusion", {})
    missing += [f"uns['hifusion']['{fact}']" for fact in FACTS if fact not in facts]
    if missing:
        lacks = ", ".join(missing)
        raise InputError(f"{source}: not a hifusion section, lacks {lacks}; make it with `hifusion prepare`")
    if section.n_obs == 0 or ("counts" in section.layers and section.n_vars == 0):
        raise InputError(
            f"{source}: has {section.n_obs} spots and {section.n_vars} genes; at least one of each is needed"
        )
    _refuse_duplicates(section.obs_names, "spots", source)
    _refuse_duplicates(section.var_names, "genes", source)
    if "counts" in section.layers and not isinstance(section.layers["counts"], sp.csr_matrix):
        kind = type(section.layers["counts"]).__name__
        raise InputError(f"{source}: layers['counts'] is a {kind}; it must be a scipy.sparse.csr_matrix of raw counts")
    positions = section.obsm["spatial"]
    if positions.shape != (section.n_obs, 2) or not np.isfinite(positions).all():
        raise InputError(f"{source}: obsm['spatial'] must hold finite (x, y) pixels for each of {section.n_obs} spots")
    for fact in ("mpp", "spot_diameter_um", "pitch_um"):
        if not (np.isfinite(facts[fact]) and facts[fact] > 0):
            raise InputError(f"{source}: {fact}={facts[fact]} is not possible; it must be a positive number of um")


def write_section(section: AnnData, path: Path) -> None:
    """Write a section as ``.h5ad``, whole or not at all.

    HDF5 is built in memory first: on a full disk the library may abort the process while closing a file, which a plain
    write of bytes never does.
    """
    validate_section(section, str(path))
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        # gzip gives the same bytes for the same section; LZF's depend on what its table found in memory.
        compression = {"compression": "gzip", "compression_opts": 1}
        anndata.io.write_elem(file, "/", section, dataset_kwargs=compression)
    files.write_bytes(path, buffer.getbuffer())


def read_h5ad(path: Path) -> AnnData:
    """Any ``.h5ad``; one that this anndata cannot read is refused in one line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        data = anndata.read_h5ad(path)
        refuse_damaged(data)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]  # the libraries write many lines
        raise InputError(
            f"{path}: cannot be read as .h5ad by anndata {version('anndata')} ({reason}); give an intact file, or "
            "write an old one anew with the anndata that made it"
        ) from error
    return data


def refuse_damaged(data: AnnData) -> None:
    """Raise ValueError where a sparse matrix points outside itself: to compute with one would kill the process."""
    for values in (data.X, None if data.raw is None else data.raw.X, *data.layers.values()):
        if isinstance(values, sp.csr_matrix | sp.csc_matrix | sp.csr_array | sp.csc_array):
            values.check_format(full_check=True)


def read_section(path: Path) -> AnnData:
    """Read a section that :func:`write_section` wrote, and check it.

    Raises
    ------
    InputError
        The file is missing, is no ``.h5ad``, or does not keep the contract.
    """
    section = read_h5ad(Path(path))
    validate_section(section, str(path))
    return section


def predicted_section(
    section: AnnData, expression: np.ndarray, *, genes: Sequence[str], normalisation: str, panel_digest: str, run: str
) -> AnnData:
    """A new section with predicted expression at the spots of ``section``, which itself stays as it is.

    Parameters
    ----------
    section
        Measured or predicted; its spots, labels, positions and picture are taken over.
    expression
        float32 ``(N, G)`` in ``normalisation``, for the panel ``genes`` with digest ``panel_digest``.
    run
        What made the prediction: a run's id, or a simple model's name.
    """
    predicted = AnnData(
        X=np.asarray(expression, dtype=np.float32),
        obs=section.obs[[*OBS_COLUMNS, *section.obs.columns.intersection([LABEL])]].copy(),
        var=pd.DataFrame(index=pd.Index(list(genes), dtype=object)),
        obsm={"spatial": section.obsm["spatial"].copy()},
        uns={"spatial": section.uns["spatial"], "hifusion": dict(section.uns["hifusion"])},
    )
    predicted.uns["hifusion"] |= {
        "normalisation": normalisation,
        "panel_digest": panel_digest,
        "run": run,
        "hifusion_version": version("hifusion"),
    }
    validate_section(predicted)
    return predicted
