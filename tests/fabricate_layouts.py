"""Every raw layout in small, made by code, with the truth that its reader must give back.

Two sections each (a file or store of one for some), 5 x 7 spots or so, wider than high, so that swapped axes show.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

from fabricate import write_table
from fabricate_tenx import VISIUM_MPP, visium_array, write_visium, write_visium_hd
from fabricate_truth import (
    IDS,
    SIZE_PX,
    SYMBOLS,
    UNIQUE,
    Change,
    Truth,
    barcode,
    counts_like,
    grid,
    grid_centres,
    same,
    write_slide,
)


@dataclass(frozen=True)
class Layout:
    """One layout: ``write(root, counts, spots)`` writes it and gives the truth by section."""

    write: Callable[..., dict[str, Truth]]
    needed: tuple[str, ...]
    """Files of the section ``needed_by`` that its reader cannot do without, below the root."""
    needed_by: str
    bin_um: float | None = None


# Spatial Transcriptomics tables


def grid_spots() -> list[str]:
    return [f"{x}x{y}" for x, y in zip(*grid(), strict=True)]


def count_rows(spots: list[str], genes: tuple[str, ...], counts: np.ndarray) -> list[list[str]]:
    return [["", *genes], *([spot, *map(str, row)] for spot, row in zip(spots, counts.tolist(), strict=True))]


def spot_rows(pixels: np.ndarray, selected: int = 1) -> list[list[str]]:
    head = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
    rows = zip(*grid(), pixels, strict=True)
    return [head, *([str(v) for v in (x, y, x, y, u, w, selected)] for x, y, (u, w) in rows)]


def write_her2st(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    truths = {}
    for seed, name in enumerate(("A1", "B1")):
        table = counts_like(len(grid()[0]), seed)
        for folder in ("ST-cnts", "ST-spotfiles"):
            (root / "data" / folder).mkdir(parents=True, exist_ok=True)
        write_table(root / f"data/ST-cnts/{name}.tsv.gz", count_rows(list(spots(grid_spots())), UNIQUE, counts(table)))
        write_table(root / f"data/ST-spotfiles/{name}_selection.tsv", spot_rows(grid_centres()))
        write_slide(root / f"data/ST-imgs/{name[0]}/{name}/he.png")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, name[0], gene_ids=None)
    return truths


def write_stnet(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """The table of counts holds off-tissue spots too; the letters before the number differ between files."""
    truths = {}
    root.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("BC23209_C1", "BC23377_D2")):
        table = counts_like(len(grid()[0]), seed)
        measured = count_rows(["1x1", *spots(grid_spots())], IDS, np.vstack([np.ones((1, 6), int), counts(table)]))
        write_table(root / f"{name}_stdata.tsv.gz", measured)
        places = zip(grid_spots(), grid_centres(), strict=True)
        lines = [["", "X", "Y"], *([spot, f"{x}", f"{y}"] for spot, (x, y) in places)]
        text = "".join(",".join(line) + "\n" for line in lines).encode()
        (root / f"spots_BT{name[2:]}.csv.gz").write_bytes(gzip.compress(text, 1))
        write_slide(root / f"HE_BT{name[2:]}.png")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, name.split("_")[0], genes=IDS)
    return truths


STAGGERED_PX = (20.0, 20.0 * (6600 / 62) / (6200 / 65))  # per column and row: the shape of a 2k array
STAGGERED_MPP = 6200 / 65 / 20.0


def staggered() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, rows and centres of a part of a 2k array."""
    column, row = np.array([(x, y) for y in range(3, 10) for x in range(2, 16) if (x + y) % 2 == 0]).T
    return column, row, np.column_stack([column * STAGGERED_PX[0] + 11, row * STAGGERED_PX[1] + 5])


def write_st_tables(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """2k arrays whose last four spots are not selected; individuals, depths and symbols are told."""
    truths = {}
    root.mkdir(parents=True, exist_ok=True)
    column, row, centres = staggered()
    kept = len(row) - 4
    for seed, name in enumerate(("MOB1", "MOB2")):
        names = [f"{x}x{y}" for x, y in zip(column, row, strict=True)]
        table = counts_like(len(row), seed)
        write_table(root / f"{name}.tsv.gz", count_rows(list(spots(names)), IDS, counts(table)))
        head = ["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]
        values = zip(column, row, centres, strict=True)
        lines = [[str(v) for v in (x, y, x, y, u, w, int(i < kept))] for i, (x, y, (u, w)) in enumerate(values)]
        write_table(root / f"alignment_table_{name}.tsv", [head, *lines])
        write_slide(root / f"{name}.png")
        pitch = float(np.hypot(6200 / 65, 6600 / 62))
        truths[name] = Truth(names[:kept], centres[:kept], table[:kept], STAGGERED_MPP, pitch, f"mouse{seed}")
    lines = [f"/Users/someone/counts/{name}.tsv;{100 + 20 * i};mouse{i}" for i, name in enumerate(truths)]
    (root / "metaData.csv").write_text("samples;z;individual\n" + "".join(f"{line}\n" for line in lines))
    write_table(root / "some_genes.tsv.gz", [["gene_id", "gene_name"], *map(list, zip(IDS, SYMBOLS, strict=True))])
    return truths


# AnnData and SpatialData


def grid_anndata(seed: int, counts: Change = same, spots: Change = same) -> tuple[anndata.AnnData, np.ndarray]:
    """Spots on the 5 x 7 grid with raw counts in ``X``, and those counts as they should be."""
    column, row = grid()
    table = counts_like(len(row), seed)
    data = anndata.AnnData(
        sp.csr_matrix(counts(table).astype(np.float32)),
        obs=pd.DataFrame(
            {"in_tissue": 1, "array_row": row, "array_col": column}, index=pd.Index(list(spots(grid_spots())))
        ),
        var=pd.DataFrame({"gene_ids": IDS}, index=pd.Index(UNIQUE)),
        obsm={"spatial": grid_centres()},
    )
    return data, table


def write_hest(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    truths = {}
    for folder in ("st", "metadata", "wsis"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(("SPA1", "SPA2")):
        data, table = grid_anndata(seed, counts, spots)
        scalefactors = {"spot_diameter_fullres": 20.0, "tissue_downscaled_fullres_scalef": 1 / 3}
        picture = np.full((SIZE_PX[1] // 3, SIZE_PX[0] // 3, 3), 200, dtype=np.uint8)
        data.uns["spatial"] = {"ST": {"images": {"downscaled_fullres": picture}, "scalefactors": scalefactors}}
        data.write_h5ad(root / f"st/{name}.h5ad")
        facts = {
            "id": name,
            "dataset_title": "Study",
            "patient": "Patient 1",
            "st_technology": "Spatial Transcriptomics",
        }
        facts |= {"inter_spot_dist": 200.0, "spot_diameter": 100.0, "pixel_size_um_estimated": 5.0}
        (root / f"metadata/{name}.json").write_text(json.dumps(facts | {"pixel_size_um_embedded": 352.8}))
        write_slide(root / f"wsis/{name}.tif")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, "Study: Patient 1")
    return truths


def write_anndata(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    root.mkdir(parents=True, exist_ok=True)
    truths = {}
    for seed, name in enumerate(("left", "right")):
        data, table = grid_anndata(seed, counts, spots)
        data.uns["spatial"] = {name: {"images": {}, "scalefactors": {"microns_per_pixel": 5.0}}}
        data.write_h5ad(root / f"{name}.h5ad")
        truths[name] = Truth(grid_spots(), grid_centres(), table, 5.0, 200.0, name, has_image=False)
    return truths


def write_spatialdata(root: Path, counts: Change = same, spots: Change = same) -> dict[str, Truth]:
    """One store of two regions: circles in another system than the image's pixels, an image in two scales.

    The rows of the table stand in another order than the shapes.
    """
    import spatialdata
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Affine, Identity

    tables, shapes, truths = [], {}, {}
    for seed, region in enumerate(("a", "b")):
        data, table = grid_anndata(seed, counts, spots)
        order = np.random.default_rng(seed).permutation(data.n_obs)
        barcodes = [barcode(1000 * seed + i) for i in range(data.n_obs)]
        # Visium by its barcodes and an array of 20 px and 34.6 px steps, turned by 90 degrees inside its own system.
        row, column, centres = (axis[: data.n_obs] for axis in visium_array())
        data.obs_names = barcodes
        data.obs_names = list(spots(barcodes))
        data.obs["array_row"], data.obs["array_col"] = row, column
        data.obs["region"], data.obs["instance"] = pd.Categorical([region] * data.n_obs), np.arange(data.n_obs)
        own = np.column_stack([centres[:, 1], -centres[:, 0]]) / 2
        turn = Affine([[0, -2, 0], [2, 0, 0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y"))
        shapes[region] = ShapesModel.parse(
            own, geometry=0, radius=65 / VISIUM_MPP / 4, transformations={"global": turn}
        )
        tables.append(data[order])
        named = [barcodes[i] for i in order]
        truths[f"store_{region}"] = Truth(
            named, centres[order], table[order], VISIUM_MPP, 100.0, f"store_{region}", has_image=False
        )
    joined = anndata.concat(tables, merge="same")
    joined.obs["region"] = joined.obs["region"].astype("category")
    pixels = np.random.default_rng(0).integers(0, 255, (3, SIZE_PX[1], SIZE_PX[0]), dtype=np.uint8)
    image = Image2DModel.parse(pixels, dims=("c", "y", "x"), scale_factors=[2], transformations={"global": Identity()})
    spatialdata.SpatialData(
        images={"he": image},
        shapes=shapes,
        tables={"table": TableModel.parse(joined, region=["a", "b"], region_key="region", instance_key="instance")},
    ).write(root / "store.zarr")
    return truths


LAYOUTS = {
    "visium": Layout(
        write_visium,
        ("one/outs/spatial/tissue_positions_list.csv", "one/outs/filtered_feature_bc_matrix.h5"),
        "one",
    ),
    "visium_hd": Layout(
        write_visium_hd,
        tuple(
            f"hd1/outs/binned_outputs/square_008um/{file}"
            for file in ("spatial/tissue_positions.parquet", "filtered_feature_bc_matrix.h5")
        ),
        "hd1",
        bin_um=8.0,
    ),
    "hest": Layout(write_hest, ("st/SPA1.h5ad",), "SPA1"),
    "her2st": Layout(write_her2st, ("data/ST-cnts/A1.tsv.gz", "data/ST-spotfiles/A1_selection.tsv"), "A1"),
    "stnet": Layout(write_stnet, ("BC23209_C1_stdata.tsv.gz", "spots_BT23209_C1.csv.gz"), "BC23209_C1"),
    "st_tables": Layout(write_st_tables, ("MOB1.tsv.gz", "alignment_table_MOB1.tsv"), "MOB1"),
    "spatialdata": Layout(
        write_spatialdata,
        ("store.zarr/shapes/a/shapes.parquet", "store.zarr/tables/table/X/zarr.json", "store.zarr/zarr.json"),
        "store_a",
    ),
    "anndata": Layout(write_anndata, ("left.h5ad",), "left"),
}
