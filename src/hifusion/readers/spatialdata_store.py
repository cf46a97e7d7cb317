"""spatialdata: a SpatialData Zarr store, or a folder of them; each region that a table annotates is a section.

Needs the extra ``spatialdata``. Counts come from the table, positions from the centroids of its shapes (circles or
polygons), carried through the transformations into the pixels of the largest image they share a coordinate system with.
An image inside a store is no file: a section is counts-only unless ``options.images`` names its slide, with a picture
taken from a coarse scale of the image. Where that slide is a larger scan of the stored image, positions are scaled up.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from anndata import AnnData

from hifusion.errors import InputError
from hifusion.readers import annotated
from hifusion.readers.assemble import SIZE_TOLERANCE, Picture, as_picture, assemble, chosen
from hifusion.readers.options import NOTHING_TOLD, ReadOptions
from hifusion.readers.tables import one_line
from hifusion.section import HIRES_PX, UNREADABLE, refuse_damaged
from hifusion.slide import Slide

_MARKS = ("zarr.json", ".zgroup", ".zattrs")
_TABLES = ("tables", "table")


def _stores(root: Path) -> list[Path]:
    return [root] if _is_store(root) else [path for path in sorted(root.glob("[!.]*")) if _is_store(path)]


def _is_store(path: Path) -> bool:
    return any((path / mark).is_file() for mark in _MARKS) and any((path / table).is_dir() for table in _TABLES)


def lacks(root: Path) -> str:
    """What ``root`` lacks of this layout; "" where it holds it."""
    return "" if _stores(root) else "needs a SpatialData .zarr with tables"


class _Part(NamedTuple):
    """One region of one table of one store."""

    store: Path
    table: str
    region: str


def _parts(root: Path) -> dict[str, _Part]:
    """Section name -> what it is: the store's name, with the region's where a store has several."""
    found = {}
    for store in _stores(root):
        parts = [_Part(store, table, region) for table, regions in _regions(store).items() for region in regions]
        tables = {part.table for part in parts}
        for part in parts:
            name = store.resolve().name.removesuffix(".zarr")
            if len(parts) > 1:
                name += f"_{part.region}" if len(tables) == 1 else f"_{part.table}_{part.region}"
            found[name] = part
    return found


def _regions(store: Path) -> dict[str, list[str]]:
    """Tables and the regions they annotate, from their attributes alone."""
    found = {}
    for table in sorted(path for tables in _TABLES for path in (store / tables).glob("[!.]*") if path.is_dir()):
        attributes: dict[str, Any] = {}
        try:
            if (table / "zarr.json").is_file():  # zarr 3
                attributes = json.loads((table / "zarr.json").read_text()).get("attributes", {})
            elif (table / ".zattrs").is_file():  # zarr 2
                attributes = json.loads((table / ".zattrs").read_text())
        except (ValueError, AttributeError) as error:
            raise InputError(f"{table}: its attributes cannot be read ({one_line(error)}); get it anew") from error
        region = attributes.get("region")
        regions = region if isinstance(region, list) else [region]
        found[table.name] = sorted(str(each) for each in regions if each)
    return found


def names(root: Path) -> list[str]:
    """Names of the stores without ``.zarr``; with the region behind where a store holds several."""
    return sorted(_parts(root))


def read(root: Path, sections: Sequence[str] | None = None, options: ReadOptions = NOTHING_TOLD) -> Iterator[AnnData]:
    """Read sections one by one.

    Parameters
    ----------
    root
        A store or a folder of them.
    sections
        Names to read; all of them where None.
    options
        ``images``, ``patients`` and ``mpp`` stand before what the store says.

    Raises
    ------
    InputError
        Unknown section, an element that is missing or damaged, no raw counts, or no scale.
    """
    parts = _parts(root)
    if not parts:
        raise InputError(f"{root}: no table annotates a region; a section needs a table and its shapes")
    for name in chosen(sorted(parts), sections, root):
        yield _read_section(parts[name], name, options)


def _read_section(part: _Part, name: str, options: ReadOptions) -> AnnData:
    try:
        import spatialdata
        from spatialdata.models import get_table_keys
    except ImportError as error:
        raise InputError(
            f"{part.store}: SpatialData needs an extra; run `pip install 'hifusion[spatialdata]'`"
        ) from error
    try:
        stored = spatialdata.read_zarr(part.store)
        table, shapes = stored.tables[part.table], stored.shapes[part.region]
        refuse_damaged(table)
        _, region_key, instance_key = get_table_keys(table)
        table = table[(table.obs[region_key].astype(str) == part.region).to_numpy()]
        instances = table.obs[instance_key]
        shapes = shapes.loc[instances]
    except UNREADABLE as error:
        raise InputError(
            f"{part.store}: table {part.table} and shapes {part.region} cannot be read together ({one_line(error)}); "
            "both are needed, with one shape for each row"
        ) from error
    tissue = annotated.under_tissue(table.obs)
    if not tissue.any():
        raise InputError(f"{part.store}: none of {table.n_obs} spots is under tissue; at least one must be")
    table, shapes = table[tissue], shapes[tissue]
    counts, genes = annotated.raw_counts(table, part.store)
    symbols, ids = annotated.gene_names(genes)
    try:
        frame = _image_frame(stored, part)
    except UNREADABLE as error:
        raise InputError(f"{part.store}: its images cannot be read ({one_line(error)}); get it anew") from error
    centres = _affine(np.column_stack([shapes.geometry.centroid.x, shapes.geometry.centroid.y]), frame.to_pixels)
    diameter_px = float(_diameters(shapes).mean() * np.sqrt(abs(np.linalg.det(frame.to_pixels[:2, :2]))))
    larger = _larger(options.images.get(name), frame.picture, part.store)
    scale = annotated.scale_of(
        table.obs,
        centres,
        part.store,
        told_mpp=options.mpp * larger if options.mpp else None,  # told of the slide's pixels
        entry={},
        drawn_diameter_px=diameter_px,
    )
    picture = frame.picture
    if picture is not None:
        width, height = picture.full_size_px
        picture = Picture(picture.pixels, (round(width * larger), round(height * larger)))
    row, column = annotated.array_positions(table.obs, centres, scale.pitch_um / scale.mpp)
    return assemble(
        counts,
        name=name,
        options=options,
        source=part.store,
        spots=table.obs_names.tolist(),
        genes=symbols,
        gene_ids=ids,
        centres_px=centres * larger,
        array_row=row,
        array_col=column,
        mpp=scale.mpp / larger,
        spot_diameter_um=scale.spot_diameter_um,
        pitch_um=scale.pitch_um,
        picture=picture,
    )


class _Frame(NamedTuple):
    """The pixels that positions are told in."""

    to_pixels: np.ndarray
    """Affine ``(3, 3)`` from the shapes' own coordinates (x, y)."""
    picture: Picture | None


def _image_frame(stored: Any, part: _Part) -> _Frame:
    """Pixels of the largest image in a coordinate system of the shapes; the shapes' own system where there is none."""
    from spatialdata.transformations import get_transformation

    axes = ("x", "y")
    of_shapes = get_transformation(stored.shapes[part.region], get_all=True)
    best, size, to_pixels = None, 0, np.eye(3)
    for image in stored.images.values():
        of_image = get_transformation(image, get_all=True)
        shared = sorted(set(of_shapes) & set(of_image), key=lambda system: (system != "global", system))
        scale0 = _levels(image)[0]
        pixels = scale0.sizes["x"] * scale0.sizes["y"]
        if shared and pixels > size:
            to_shared = of_shapes[shared[0]].to_affine_matrix(axes, axes)
            of_pixels = of_image[shared[0]].to_affine_matrix(axes, axes)
            best, size, to_pixels = image, pixels, np.linalg.solve(of_pixels, to_shared)
    return _Frame(to_pixels, None if best is None else _picture(best))


def _levels(image: Any) -> list[Any]:
    """The scales of an image, finest first."""
    if not hasattr(image, "children"):  # a single scale is the array itself
        return [image]
    levels = [next(iter(level.data_vars.values())) for level in image.children.values()]
    return sorted(levels, key=lambda level: -level.sizes["x"])


def _picture(image: Any) -> Picture:
    """From the coarsest scale that is large enough; from a single large scale every so many pixels are read."""
    levels = _levels(image)
    full = levels[0]
    level = next((one for one in reversed(levels) if max(one.sizes["x"], one.sizes["y"]) >= HIRES_PX), full)
    step = max(1, max(level.sizes["x"], level.sizes["y"]) // HIRES_PX)
    pixels = level.transpose("y", "x", "c")[::step, ::step].to_numpy()
    picture = as_picture(pixels, pixels.shape[1] / full.sizes["x"])
    return picture._replace(full_size_px=(full.sizes["x"], full.sizes["y"]))


def _affine(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.asarray(points @ matrix[:2, :2].T + matrix[:2, 2])


def _diameters(shapes: Any) -> np.ndarray:
    """Diameters of circles, or sides of squares as large as the polygons, in the shapes' own coordinates."""
    return np.asarray(2 * shapes["radius"] if "radius" in shapes else np.sqrt(shapes.geometry.area), dtype=np.float64)


def _larger(told: Path | None, picture: Picture | None, store: Path) -> float:
    """How many pixels of the told slide a pixel of the stored image is: the store may hold a downscaled copy."""
    if told is None or picture is None:
        return 1.0
    slide = Slide(told)
    across, down = (a / b for a, b in zip(slide.size_px, picture.full_size_px, strict=True))
    if abs(across / down - 1) > SIZE_TOLERANCE:
        raise InputError(
            f"{told}: is {slide.size_px[0]} x {slide.size_px[1]} px, of other proportions than the image in {store} "
            f"({picture.full_size_px[0]} x {picture.full_size_px[1]} px); give the scan that image was made from"
        )
    return across
