"""Sections in the hands of others: scanpy and squidpy draw them in place, spatialdata opens what was exported."""

import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
import scanpy
import spatialdata
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from PIL import Image
from spatialdata.transformations import get_transformation

from fabricate import full_disk, refused
from hifusion import export_spatialdata
from hifusion.exporting import export
from hifusion.section import build_section, predicted_section, read_section, write_section
from hifusion.slide import Slide

with warnings.catch_warnings():  # of its own dependency docrep, on import
    warnings.simplefilter("ignore", SyntaxWarning)
    import squidpy

SIZE_PX = (2000, 1500)  # of the slide; its thumbnail is half as large
PITCH_PX, DIAMETER_PX, MPP = 200.0, 100.0, 1.0
COLUMNS, ROWS = 8, 6
N = COLUMNS * ROWS
MARKED = 13  # the one spot with white under it


def centres() -> np.ndarray:
    row, column = np.divmod(np.arange(N), COLUMNS)
    return np.stack([300 + PITCH_PX * column, 250 + PITCH_PX * row], axis=1)


def picture() -> np.ndarray:
    """A black slide with a white square exactly under the marked spot."""
    pixels = np.zeros((SIZE_PX[1], SIZE_PX[0], 3), dtype=np.uint8)
    x, y = centres()[MARKED].astype(int)
    pixels[y - 50 : y + 50, x - 50 : x + 50] = 255
    return pixels


def section_of(image: Path | None) -> AnnData:
    """A measured section over ``image``; without a picture where None."""
    row, column = np.divmod(np.arange(N), COLUMNS)
    slide = Slide(image) if image else None
    return build_section(
        np.random.default_rng(0).poisson(3, (N, 4)),
        genes=["ERBB2", "KRT8", "CD74", "A/B"],
        spots=[f"{x}x{y}" for x, y in zip(column, row, strict=True)],
        centres_px=centres(),
        name="S 1",  # spatialdata has no such names for its elements
        patient="P",
        mpp=MPP,
        spot_diameter_um=DIAMETER_PX * MPP,
        pitch_um=PITCH_PX * MPP,
        array_row=row,
        array_col=column,
        image=image,
        thumbnail=slide.thumbnail(1000) if slide else None,
        full_size_px=SIZE_PX if slide else None,
    )


@pytest.fixture
def slide_file(tmp_path):
    path = tmp_path / "slide.png"
    Image.fromarray(picture()).save(path)
    return path


@pytest.fixture
def section_file(tmp_path, slide_file):
    write_section(section_of(slide_file), tmp_path / "s.h5ad")
    return tmp_path / "s.h5ad"


@pytest.fixture
def axes():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def draw_with_scanpy(section: AnnData, ax: Axes, colour: str, picture: bool = True) -> None:
    with warnings.catch_warnings():  # scanpy recommends squidpy
        warnings.simplefilter("ignore", FutureWarning)
        scanpy.pl.spatial(section, color=colour, ax=ax, show=False, **({} if picture else {"img_key": None}))


def draw_with_squidpy(section: AnnData, ax: Axes, colour: str, picture: bool = True) -> None:
    squidpy.pl.spatial_scatter(section, color=colour, ax=ax, **({} if picture else {"img": False}))


DRAWERS = pytest.mark.parametrize("draw", [draw_with_scanpy, draw_with_squidpy])


def drawn_boxes(ax: Axes) -> np.ndarray:
    """(x0, y0, x1, y1) of each drawn spot, in the axes' own coordinates, ``(N, 4)``."""
    (spots,) = [found for found in ax.collections if isinstance(found, PatchCollection)]
    return np.array([path.get_extents().extents for path in spots.get_paths()])


def under(ax: Axes, x: float, y: float) -> int:
    """The picture's red value at a place of the axes."""
    (image,) = ax.images
    return int(np.asarray(image.get_array())[round(y), round(x), 0])


@DRAWERS
def test_spots_are_drawn_on_the_right_pixels(draw, section_file, axes):
    draw(anndata.read_h5ad(section_file), axes, "ERBB2")
    boxes = drawn_boxes(axes)
    assert len(boxes) == N
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    white = [under(axes, x, y) > 128 for x, y in middles]
    assert sorted(np.flatnonzero(white)) == [np.argmin(np.abs(middles - centres()[MARKED] / 2).sum(axis=1))]
    assert sum(white) == 1
    np.testing.assert_allclose(np.sort(middles, axis=0), np.sort(centres() / 2, axis=0), atol=0.5)


@DRAWERS
def test_spots_are_drawn_at_their_size(draw, section_file, axes):
    draw(anndata.read_h5ad(section_file), axes, "ERBB2")
    boxes = drawn_boxes(axes)
    np.testing.assert_allclose(boxes[:, 2] - boxes[:, 0], DIAMETER_PX / 2, rtol=0.02)


@DRAWERS
def test_a_column_of_obs_is_drawn_too(draw, section_file, axes):
    section = read_section(section_file)
    section.obs["novelty"] = np.linspace(0, 1, N)
    draw(section, axes, "novelty")
    (spots,) = [found for found in axes.collections if isinstance(found, PatchCollection)]
    np.testing.assert_allclose(np.sort(spots.get_array()), np.linspace(0, 1, N))


@DRAWERS
def test_a_section_without_a_picture_is_drawn_in_full_resolution(draw, axes):
    draw(section_of(None), axes, "KRT8", picture=False)
    boxes = drawn_boxes(axes)
    np.testing.assert_allclose(np.sort((boxes[:, 0] + boxes[:, 2]) / 2), np.sort(centres()[:, 0]))


@DRAWERS
def test_positions_alone_are_drawn(draw, section_file, axes):
    draw(read_section(section_file)[:, []].copy(), axes, "array_row")
    assert len(drawn_boxes(axes)) == N


def test_squidpy_finds_the_four_neighbours_of_a_spot(section_file):
    section = anndata.read_h5ad(section_file)
    squidpy.gr.spatial_neighbors_radius(section, radius=PITCH_PX * 1.1)
    degree = np.asarray(section.obsp["spatial_connectivities"].sum(axis=1)).ravel()
    assert degree[:COLUMNS].tolist() == [2] + [3] * (COLUMNS - 2) + [2]
    assert degree[COLUMNS + 1] == 4


def white_centre(image: np.ndarray) -> np.ndarray:
    """Centre (x, y) of what is white in a ``(c, y, x)`` picture, in its own pixels from its corner."""
    y, x = np.nonzero(image[0] > 128)
    return np.array([x.mean(), y.mean()]) + 0.5


@pytest.mark.parametrize("whole", [True, False], ids=["slide", "thumbnail"])
def test_spatialdata_lines_up_picture_and_spots(whole, section_file, tmp_path, monkeypatch):
    if not whole:
        monkeypatch.setattr(export_spatialdata, "MOST_PX", 100)
    opened = spatialdata.read_zarr(export(section_file, tmp_path / "s.zarr"))
    level = opened["he"]["scale0"].image if whole else opened["he"]
    assert level.shape == ((3, 1500, 2000) if whole else (3, 750, 1000))
    to_global = get_transformation(opened["he"], "global").to_affine_matrix(("x", "y"), ("x", "y"))
    x, y, _ = to_global @ [*white_centre(level.to_numpy()), 1]
    spot = opened["spots"].iloc[MARKED]
    np.testing.assert_allclose([spot.geometry.x, spot.geometry.y], [x, y], atol=2)
    assert spot.radius == DIAMETER_PX / 2


def test_spatialdata_keeps_the_pyramid_in_place(section_file, tmp_path, monkeypatch):
    monkeypatch.setattr(export_spatialdata, "CHUNK_PX", 500)
    opened = spatialdata.read_zarr(export(section_file, tmp_path / "s.zarr"))
    levels = list(opened["he"].children)
    assert [opened["he"][level].image.shape[1:] for level in levels] == [(1500, 2000), (750, 1000), (375, 500)]
    for level in levels:
        to_global = get_transformation(opened["he"][level].image, "global").to_affine_matrix(("x", "y"), ("x", "y"))
        x, y, _ = to_global @ [*white_centre(opened["he"][level].image.to_numpy()), 1]
        np.testing.assert_allclose([x, y], centres()[MARKED], atol=3)


def test_spatialdata_table_annotates_the_spots(section_file, tmp_path):
    section = read_section(section_file)
    section.obs["novelty"] = np.linspace(0, 1, N)
    section.layers["measured"] = section.X.copy()
    write_section(section, section_file)
    opened = spatialdata.read_zarr(export(section_file, tmp_path / "s.zarr"))
    table = opened["table"]
    assert table.uns["spatialdata_attrs"] == {"region": "spots", "region_key": "region", "instance_key": "spot"}
    assert table.obs["spot"].tolist() == opened["spots"].index.tolist() == section.obs_names.tolist()
    np.testing.assert_array_equal(table.to_df(), section.to_df())
    np.testing.assert_array_equal(table.to_df("measured"), section.to_df("measured"))
    np.testing.assert_array_equal(table.layers["counts"].toarray(), section.layers["counts"].toarray())
    np.testing.assert_allclose(table.obs["novelty"], np.linspace(0, 1, N))
    joined = spatialdata.join_spatialelement_table(sdata=opened, spatial_element_names="spots", table_name="table")[1]
    assert joined.n_obs == N


def test_spatialdata_says_where_it_comes_from(section_file, tmp_path):
    opened = spatialdata.read_zarr(export(section_file, tmp_path / "s.zarr"))
    said = opened.attrs["hifusion"]
    assert said["section"] == "S 1" and said["mpp"] == MPP and said["normalisation"] == "log1p_cpm"
    assert "image" not in said, "a path of this machine would travel with the data"


def test_a_prediction_without_a_picture_is_circles_and_a_table(tmp_path):
    values = np.random.default_rng(1).normal(size=(N, 2)).astype(np.float32)
    made = predicted_section(
        section_of(None), values, genes=["G1", "G2"], normalisation="log_share", panel_digest="d", run="r"
    )
    write_section(made, tmp_path / "p.h5ad")
    opened = spatialdata.read_zarr(export(tmp_path / "p.h5ad", tmp_path / "p.zarr", genes=["G2"]))
    assert not opened.images
    np.testing.assert_array_equal(opened["table"].X, values[:, 1:])


def test_a_slide_that_is_gone_leaves_the_thumbnail(section_file, slide_file, tmp_path):
    slide_file.unlink()
    opened = spatialdata.read_zarr(export(section_file, tmp_path / "s.zarr"))
    assert opened["he"].shape == (3, 750, 1000)


def test_an_older_store_of_ours_is_replaced(section_file, tmp_path):
    out = tmp_path / "s.zarr"
    export(section_file, out)
    export(section_file, out, genes=["KRT8"])
    assert spatialdata.read_zarr(out)["table"].var_names.tolist() == ["KRT8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.h5ad", "s.zarr", "slide.png"]


@pytest.mark.parametrize("theirs", ["folder", "file", "store"])
def test_what_we_did_not_write_is_never_replaced(theirs, section_file, tmp_path):
    out = tmp_path / "s.zarr"
    if theirs == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("years")
    elif theirs == "file":
        out.write_text("years")
    else:
        spatialdata.SpatialData().write(out)
    before = sorted(out.rglob("*")), out.stat().st_mtime_ns
    with refused(str(out), "was not written by hifusion", "choose another name"):
        export(section_file, out)
    assert (sorted(out.rglob("*")), out.stat().st_mtime_ns) == before


def test_a_full_disk_leaves_the_older_store_as_it_was(section_file, tmp_path):
    out = tmp_path / "s.zarr"
    export(section_file, out, genes=["KRT8"])
    with full_disk(2000), refused(str(out), "cannot be written", "file too large"):
        export(section_file, out)
    assert spatialdata.read_zarr(out)["table"].var_names.tolist() == ["KRT8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.h5ad", "s.zarr", "slide.png"]
