"""A section as a SpatialData zarr: the picture, the spots as circles, the expression as a table on them."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData

from hifusion import files
from hifusion.errors import InputError
from hifusion.slide import Slide

MOST_PX = 120_000_000  # a slide up to so many pixels goes in whole, a larger one as the section's thumbnail
CHUNK_PX = 1024
IMAGE, SPOTS, TABLE = "he", "spots", "table"
MARK = "hifusion"  # attribute of the zarr group that says who wrote it, so that nothing else is ever overwritten


def write_spatialdata(section: AnnData, out: Path) -> None:
    """Write ``section`` as a SpatialData zarr folder, whole or not at all.

    Elements: image ``he`` (where there is one), shapes ``spots`` (circles, radius in pixels), table ``table``, all in
    the coordinate system ``global``: full-resolution pixels of the slide. The slide itself goes in where its file is at
    hand and has at most :data:`MOST_PX` pixels; otherwise the section's thumbnail, scaled into place.

    Raises
    ------
    InputError
        ``spatialdata`` is not installed, or ``out`` is something that this function did not write.
    """
    try:
        import spatialdata as sd
        from spatialdata.models import Image2DModel, ShapesModel, TableModel
        from spatialdata.transformations import Identity, Scale
    except ImportError as error:
        raise InputError(
            f"{out}: a SpatialData store needs spatialdata; pip install 'hifusion[spatialdata]'"
        ) from error
    facts = section.uns["hifusion"]
    picture, shrink = _picture(section)
    images = {}
    if picture is not None:
        scale = Scale([1 / shrink, 1 / shrink], axes=("x", "y")) if shrink != 1 else Identity()
        images[IMAGE] = Image2DModel.parse(
            np.moveaxis(picture, -1, 0),
            dims=("c", "y", "x"),
            c_coords=["r", "g", "b"],
            transformations={"global": scale},
            scale_factors=[2] * int(np.ceil(np.log2(max(1, max(picture.shape) / CHUNK_PX)))) or None,
            chunks=(3, CHUNK_PX, CHUNK_PX),
        )
    table = section.copy()
    table.uns.pop("spatial", None)  # the picture is an element now
    table.obs["region"] = pd.Categorical([SPOTS] * section.n_obs)
    table.obs["spot"] = section.obs_names.to_numpy(dtype=object)
    data = sd.SpatialData(
        images=images,
        shapes={
            SPOTS: ShapesModel.parse(
                section.obsm["spatial"],
                geometry=0,
                radius=facts["spot_diameter_um"] / facts["mpp"] / 2,
                index=pd.Index(section.obs_names, name="spot"),
                transformations={"global": Identity()},
            )
        },
        tables={TABLE: TableModel.parse(table, region=SPOTS, region_key="region", instance_key="spot")},
        attrs={MARK: {key: value for key, value in facts.items() if key != "image"}},
    )
    # One file per chunk: anndata is about to change its default, and warns until it is told (from 0.12.12 on).
    one_file_per_chunk = {"auto_shard_zarr_v3": False} if hasattr(anndata.settings, "auto_shard_zarr_v3") else {}
    _refuse_what_is_not_ours(out)
    with files.replacing_folder(out) as part, anndata.settings.override(**one_file_per_chunk):
        data.write(part)


def _picture(section: AnnData) -> tuple[np.ndarray | None, float]:
    """The picture that goes in, uint8 ``(h, w, 3)`` or None, and its pixels per full-resolution pixel."""
    facts = section.uns["hifusion"]
    if facts["image"] and Path(facts["image"]).is_file():
        slide = Slide(Path(facts["image"]))
        width, height = slide.size_px
        if width * height <= MOST_PX:
            return slide.read_region(0, 0, width, height), 1.0
    entry: dict[str, Any] = section.uns["spatial"].get(facts["section"], {})
    picture = entry.get("images", {}).get("hires")
    if picture is None:
        return None, 1.0
    return picture[..., :3], float(entry["scalefactors"]["tissue_hires_scalef"])


def _refuse_what_is_not_ours(path: Path) -> None:
    if path.exists() and not _is_ours(path):
        raise InputError(f"{path}: exists and was not written by hifusion; move it away or choose another name")


def _is_ours(path: Path) -> bool:
    try:
        return MARK in json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
    except (OSError, ValueError, LookupError):
        return False
