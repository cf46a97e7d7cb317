"""The viewer's tiles: numbered as DeepZoom numbers them, showing what the slide shows, of what there is to show."""

from io import BytesIO

import numpy as np
import openslide
import pytest
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from fabricate_views import SIZE_PX, measured, write_slide
from hifusion.slide import Slide
from hifusion.viewer.deepzoom import TilePyramid, pyramid_of


@pytest.mark.parametrize("size", [(1300, 700), (511, 510), (510, 1), (1, 1), (2049, 1021)])
def test_tiles_are_numbered_and_sized_as_openslides_own_deepzoom_does(size, tmp_path):
    picture = Image.effect_noise(size, 60).convert("RGB")
    picture.save(tmp_path / "slide.png")
    theirs = DeepZoomGenerator(openslide.ImageSlide(picture), tile_size=510, overlap=1)
    ours = TilePyramid(Slide(tmp_path / "slide.png"))
    assert ours.finest == theirs.level_count - 1
    for level in range(theirs.level_count):
        assert ours.level_size(level) == theirs.level_dimensions[level]
        assert ours.grid(level) == theirs.level_tiles[level]
        columns, rows = ours.grid(level)
        tile = Image.open(BytesIO(ours.tile(level, columns - 1, rows - 1)))
        assert tile.size == theirs.get_tile_dimensions(level, (columns - 1, rows - 1))


def test_tiles_beyond_the_overview_are_read_from_the_slide(tmp_path, monkeypatch):
    """Every level shows the same picture: area averages of the finest, to what JPEG loses."""
    monkeypatch.setattr("hifusion.viewer.deepzoom.OVERVIEW_PX", 256)
    slide = Slide(write_slide(tmp_path / "slide.png", discs=False))  # smooth, as JPEG keeps it
    pyramid = TilePyramid(slide)
    for level in range(pyramid.finest - 3, pyramid.finest + 1):
        width, height = pyramid.level_size(level)
        whole = np.zeros((height, width, 3), dtype=np.uint8)
        columns, rows = pyramid.grid(level)
        for x, y in ((x, y) for x in range(columns) for y in range(rows)):
            tile = np.asarray(Image.open(BytesIO(pyramid.tile(level, x, y))))
            left, top = max(0, 510 * x - 1), max(0, 510 * y - 1)
            whole[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
        by = 2 ** (pyramid.finest - level)
        few = (SIZE_PX[1] // by, SIZE_PX[0] // by)  # rows and columns of whole pixels
        pixels = slide.read_region(0, 0, few[1] * by, few[0] * by)
        cut = pixels.reshape(few[0], by, few[1], by, 3).mean(axis=(1, 3))
        assert np.abs(whole[: few[0], : few[1]] - cut).mean() < 3


def test_there_are_no_tiles_beside_the_slide(tmp_path):
    pyramid = TilePyramid(Slide(write_slide(tmp_path / "slide.png")))
    for place in ((-1, 0, 0), (99, 0, 0), (pyramid.finest, -1, 0), (pyramid.finest, 2, 0), (0, 0, 1)):
        assert pyramid.tile(*place) is None


def test_a_closed_pyramid_reads_again(tmp_path):
    pyramid = TilePyramid(Slide(write_slide(tmp_path / "slide.png")))
    before = pyramid.tile(pyramid.finest, 0, 0)
    pyramid.close()
    assert pyramid.tile(pyramid.finest, 0, 0) == before


def test_a_copy_may_leave_the_finest_levels_out(tmp_path):
    pyramid = TilePyramid(Slide(write_slide(tmp_path / "slide.png")), most_px=500)
    assert pyramid.facts() | {"tile": 0, "overlap": 0} == {
        "width": SIZE_PX[0] // 2,
        "height": SIZE_PX[1] // 2,
        "finest": 9,
        "tile": 0,
        "overlap": 0,
        "per_px": 0.5,
    }


def test_where_the_slide_is_gone_the_picture_inside_the_section_is_shown(tmp_path):
    section = measured(tmp_path / "private" / "gone.svs")
    pyramid, note = pyramid_of(section)
    assert pyramid is not None
    assert (pyramid.size_px, pyramid.per_px) == ((SIZE_PX[0] // 4, SIZE_PX[1] // 4), 0.25)
    assert "gone.svs" in note and "private" not in note
    section.uns["spatial"]["A1"]["images"] = {}
    assert pyramid_of(section) == (None, "The slide gone.svs cannot be opened here: spots alone.")
