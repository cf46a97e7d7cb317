"""A section as one row per spot (CSV, Parquet) or one tile per spot (GeoJSON for QuPath)."""

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from hifusion import files
from hifusion.errors import InputError
from hifusion.section import OBS_COLUMNS


def dense(section: AnnData) -> np.ndarray:
    """Expression of all genes of ``section``, float32 ``(N, G)``, however it is stored."""
    return np.asarray(section.to_df().to_numpy(), dtype=np.float32)


def write_csv(section: AnnData, out: Path) -> None:
    """Write :func:`spot_table` as CSV, gzipped where ``out`` ends in ``.gz``; the same section gives the same bytes."""
    text = spot_table(section).to_csv(index=False, lineterminator="\n").encode()
    files.write_bytes(out, gzip.compress(text, mtime=0) if out.name.lower().endswith(".gz") else text)


def write_parquet(section: AnnData, out: Path) -> None:
    """Write :func:`spot_table` as Parquet."""
    buffer = io.BytesIO()
    try:
        spot_table(section).to_parquet(buffer, engine="pyarrow", index=False)
    except ImportError as error:
        raise InputError(f"{out}: Parquet needs pyarrow; pip install 'hifusion[parquet]'") from error
    files.write_bytes(out, buffer.getbuffer())


def spot_table(section: AnnData) -> pd.DataFrame:
    """One row per spot: its name, its centre in px and um, its place on the array, what else is known, its genes.

    A column of ``obs`` or a gene that has the name of a column before it gets ``obs_`` or ``gene_`` in front.
    """
    centres, mpp = section.obsm["spatial"], section.uns["hifusion"]["mpp"]
    place = pd.DataFrame(
        {
            "spot": section.obs_names,
            "x_px": centres[:, 0],
            "y_px": centres[:, 1],
            "x_um": centres[:, 0] * mpp,
            "y_um": centres[:, 1] * mpp,
            "array_row": section.obs["array_row"].to_numpy(),
            "array_col": section.obs["array_col"].to_numpy(),
        }
    )
    known = section.obs.drop(columns=["array_row", "array_col"]).reset_index(drop=True)
    known.columns = pd.Index(_distinct(known.columns, place.columns, "obs_"), dtype=object)
    names = _distinct(section.var_names, [*place.columns, *known.columns], "gene_")
    genes = pd.DataFrame(dense(section), columns=pd.Index(names, dtype=object))
    return pd.concat([place, known, genes], axis=1)


def write_geojson(section: AnnData, out: Path) -> None:
    """Write a GeoJSON FeatureCollection that QuPath (0.4 and later) reads: a tile per spot, its genes as measurements.

    A tile is the square of one pitch around a spot, in full-resolution pixels of the slide. What is not a finite number
    is left out, as JSON has no word for it. Numbers of ``obs``, such as ``novelty``, are measurements too.
    """
    files.write_bytes(out, "".join(geojson(section)).encode())


def geojson(section: AnnData) -> Iterator[str]:
    """The text of :func:`write_geojson`, piece by piece."""
    facts = section.uns["hifusion"]
    half = facts["pitch_um"] / facts["mpp"] / 2
    corners = half * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)])
    extra = section.obs.drop(columns=list(OBS_COLUMNS)).select_dtypes("number")
    names = [*extra.columns, *_distinct(section.var_names, extra.columns, "gene_")]
    table = np.hstack([extra.to_numpy(dtype=np.float64), dense(section)])
    yield '{"type": "FeatureCollection", "features": [\n'
    for n, (spot, centre, values) in enumerate(zip(section.obs_names, section.obsm["spatial"], table, strict=True)):
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [np.round(centre + corners, 2).tolist()]},
            "properties": {
                "objectType": "tile",
                "name": spot,
                "measurements": {
                    name: float(f"{value:.6g}")  # float32 holds no more digits, and a browser or QuPath reads fewer
                    for name, value in zip(names, values, strict=True)
                    if np.isfinite(value)
                },
            },
        }
        yield (",\n" if n else "") + json.dumps(feature, allow_nan=False)
    yield "\n]}\n"


def _distinct(names: Iterable[str], taken: Iterable[str], prefix: str) -> list[str]:
    """``names``, each with ``prefix`` in front as often as it takes to differ from ``taken`` and from the others."""
    names, taken = [str(name) for name in names], set(taken)
    others = set(names)
    distinct = []
    for name in names:
        new = name
        while new in taken or (new != name and new in others):
            new = prefix + new
        taken.add(new)
        distinct.append(new)
    return distinct
