"""What an AnnData of unknown making says of a section: raw counts, genes, spots under tissue, picture, scale."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers.assemble import Picture, as_picture, unique_symbols
from hifusion.readers.lattice import (
    VISIUM_FULLRES_UM,
    VISIUM_PITCH_UM,
    VISIUM_SPOT_UM,
    pitch_px,
    visium_mpp,
)
from hifusion.section import LABEL

PICTURES = ("hires", "downscaled_fullres", "lowres")
ID_COLUMNS = ("gene_ids", "gene_id", "ensembl_id", "ensembl")
SYMBOL_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "symbol")
_ENSEMBL = re.compile(r"ENS[A-Z]*G\d+")
_VISIUM_BARCODE = re.compile(r"[ACGT]{16}-\d+")
_BIN = re.compile(r"s_(\d+)um_\d+_\d+-\d+")  # Visium HD names bins by their side
NO_NUMBERS = "non-numeric"
_UNKNOWN_SPOT = VISIUM_SPOT_UM / VISIUM_PITCH_UM  # of a pitch, where nothing tells how large spots are


class Scale(NamedTuple):
    """What is needed to turn pixels into um."""

    mpp: float
    spot_diameter_um: float
    pitch_um: float


def flaw(values: np.ndarray) -> str:
    """What keeps values from being raw counts, in one word; "" where nothing does."""
    if values.dtype.kind not in "iuf":
        return NO_NUMBERS
    for wrong, what in (
        (~np.isfinite(values), "NaN or infinite"),
        (values < 0, "negative"),
        (values != np.floor(values), "fractional"),
    ):
        if wrong.any():
            return what
    return ""


def raw_counts(data: AnnData, source: Path) -> tuple[sp.csr_matrix, pd.DataFrame]:
    """Raw counts ``(N, genes)`` and the table of their genes: ``layers['counts']``, else ``raw.X``, else ``X``.

    Raises
    ------
    InputError
        None of them holds whole numbers >= 0; the message says what each holds.
    """
    places = {
        "layers['counts']": (data.layers.get("counts"), data.var),
        "raw.X": (None if data.raw is None else data.raw.X, None if data.raw is None else data.raw.var),
        "X": (data.X, data.var),
    }
    found = {}
    for place, (values, genes) in places.items():
        if values is None:
            found[place] = "not there"
            continue
        numbers = values.dtype.kind in "iuf"  # sparse matrices take nothing else
        stored = sp.csr_matrix(values if numbers else values.shape)
        found[place] = flaw(stored.data) if numbers else NO_NUMBERS
        if not found[place]:
            return stored, genes
    listed = ", ".join(
        f"{place} is {what}" if what == "not there" else f"{place} has {what} values" for place, what in found.items()
    )
    raise InputError(f"{source}: holds no raw counts ({listed}); put whole numbers >= 0 into layers['counts']")


def gene_names(genes: pd.DataFrame) -> tuple[list[str], list[str] | None]:
    """Unique symbols, and Ensembl ids where the table has them."""
    index = genes.index.astype(str).tolist()
    ids = next((genes[column].astype(str).tolist() for column in ID_COLUMNS if column in genes), None)
    if index and all(map(_ENSEMBL.match, index)):
        symbols = next((genes[column].astype(str).tolist() for column in SYMBOL_COLUMNS if column in genes), index)
        return unique_symbols(symbols), index
    return unique_symbols(index), ids


def centres_px(data: AnnData, source: Path) -> np.ndarray:
    """Spot centres (x, y), ``(N, 2)``."""
    if "spatial" not in data.obsm:
        held = ", ".join(data.obsm) or "nothing"
        raise InputError(f"{source}: lacks obsm['spatial'] (obsm holds {held}); spots need (x, y) pixels there")
    values = np.asarray(data.obsm["spatial"])
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "iuf":
        raise InputError(
            f"{source}: obsm['spatial'] is {values.dtype} {values.shape}; it must be numbers (x, y) per spot"
        )
    return values[:, :2].astype(np.float64)


def under_tissue(obs: pd.DataFrame) -> np.ndarray:
    """Rows under tissue, bool ``(N,)``; all of them where ``in_tissue`` is not told."""
    if "in_tissue" not in obs:
        return np.ones(len(obs), dtype=bool)
    return obs["in_tissue"].astype(str).isin(("1", "1.0", "True", "true")).to_numpy()


def labels(obs: pd.DataFrame) -> list[str | None] | None:
    """What a column of words named ``label`` says of each spot; None where there is none, or where it holds numbers."""
    if LABEL not in obs or pd.api.types.is_numeric_dtype(obs[LABEL].dtype):
        return None
    return [None if pd.isna(value) else str(value) for value in obs[LABEL]]


def array_positions(obs: pd.DataFrame, centres: np.ndarray, step_px: float) -> tuple[np.ndarray, np.ndarray]:
    """Array rows and columns as told, else the nearest ones on a square lattice of ``step_px``."""
    told = [pd.to_numeric(obs[name], errors="coerce") for name in ("array_row", "array_col") if name in obs]
    if len(told) == 2 and not any(values.isna().any() for values in told):
        return told[0].to_numpy(), told[1].to_numpy()
    column, row = np.rint((centres - centres.min(axis=0)) / step_px).astype(np.int64).T
    return row, column


def positive(value: Any) -> float | None:
    """A number above 0, or None where a file holds anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if 0 < number < np.inf else None


def _part(entry: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = entry.get(name)
    return part if isinstance(part, Mapping) else {}


def library(data: AnnData, source: Path) -> Mapping[str, Any]:
    """The one entry of ``uns['spatial']``, empty where there is none; several sections in a file are refused."""
    entries = data.uns.get("spatial", {})
    entries = entries if isinstance(entries, Mapping) else {}
    if len(entries) > 1 and not {"images", "scalefactors"} & set(entries):
        raise InputError(
            f"{source}: holds {len(entries)} sections (uns['spatial'] names {', '.join(map(str, list(entries)[:3]))}); "
            "write one section a file"
        )
    entry = entries if "scalefactors" in entries else next(iter(entries.values()), {})
    return entry if isinstance(entry, Mapping) else {}


def picture(entry: Mapping[str, Any]) -> Picture | None:
    """The picture of an entry of ``uns['spatial']`` that has a scale, or None."""
    images, factors = _part(entry, "images"), _part(entry, "scalefactors")
    for key in PICTURES:
        scale = positive(factors.get(f"tissue_{key}_scalef"))
        if key in images and scale:
            pixels = np.asarray(images[key])
            if pixels.ndim in (2, 3) and pixels.size and pixels.dtype.kind in "iuf":
                return as_picture(pixels, scale)
    return None


def spot_diameter_px(entry: Mapping[str, Any]) -> float | None:
    """``spot_diameter_fullres`` of an entry of ``uns['spatial']``, or None."""
    return positive(_part(entry, "scalefactors").get("spot_diameter_fullres"))


def scale_of(
    obs: pd.DataFrame,
    centres: np.ndarray,
    source: Path,
    *,
    told_mpp: float | None,
    entry: Mapping[str, Any],
    drawn_diameter_px: float | None = None,
) -> Scale:
    """The scale that is told, else what the file says of it, else what a known array says.

    Parameters
    ----------
    obs, centres
        Of the spots. Visium is known by Space Ranger's name in ``entry['metadata']``, or by its barcodes where array
        positions or a spot diameter stand beside them; Visium HD by the names of its bins.
    entry
        Of ``uns['spatial']``.
    drawn_diameter_px
        Of the spots as shapes, where ``entry`` does not tell it.

    Raises
    ------
    InputError
        Nothing tells the scale.
    """
    factors, metadata = _part(entry, "scalefactors"), _part(entry, "metadata")
    diameter_px = spot_diameter_px(entry) or drawn_diameter_px
    mpp = told_mpp or positive(factors.get("microns_per_pixel")) or positive(metadata.get("microns_per_pixel"))
    names, has_array = obs.index.astype(str)[:50], {"array_row", "array_col"} <= set(obs)
    bins = [found for found in map(_BIN.fullmatch, names) if found]
    visium = "spaceranger" in str(metadata.get("software_version", "")) and not bins
    visium |= (has_array or diameter_px is not None) and all(map(_VISIUM_BARCODE.fullmatch, names))
    if not mpp and bins:
        mpp = float(bins[0][1]) / pitch_px(centres, source)
    if not mpp and visium and has_array:
        mpp = visium_mpp(*array_positions(obs, centres, 1.0), centres, source)
    if not mpp and visium and diameter_px:
        mpp = VISIUM_FULLRES_UM / diameter_px
    if not mpp:
        raise InputError(f"{source}: nothing in it says how many um a pixel is; give it with --mpp, for example 0.5")
    if visium:
        return Scale(mpp, VISIUM_SPOT_UM, VISIUM_PITCH_UM)
    pitch_um = pitch_px(centres, source) * mpp
    diameter_um = diameter_px * mpp if diameter_px else _UNKNOWN_SPOT * pitch_um
    return Scale(mpp, diameter_um, pitch_um)
