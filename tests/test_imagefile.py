"""Every reader gives the pixels that were written and the scale that the file states, or says why not."""

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fabricate import refused
from fabricate_slides import raw_tiff, shrunk, smooth_pixels, write_pyramid
from hifusion.imagefile import open_image
from hifusion.imagefile.area import AxisCover, area_average
from hifusion.imagefile.contract import level_shrink, usable_scale
from hifusion.imagefile.lzw import decode_lzw

WIDTH, HEIGHT = 75, 52
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GREY = PIXELS[..., 0]


def _whole(path, level=0):
    image = open_image(path)
    return image.read(level, 0, 0, *image.levels[level].size_px)


def _write(path, pixels, **options):
    tifffile.imwrite(path, pixels, **options)
    return path


# TIFF: layouts.


@settings(max_examples=50)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    tile=st.sampled_from([16, 32, 64]),
    factors=st.lists(st.sampled_from([2, 3, 4, 8]), max_size=3),
    compression=st.sampled_from([None, "deflate", "lzw", "zstd", "packbits"]),
    predictor=st.booleans(),
    planar=st.booleans(),
    subifds=st.booleans(),
    bigtiff=st.booleans(),
    big_endian=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pyramids_hold_what_was_written(
    size, tile, factors, compression, predictor, planar, subifds, bigtiff, big_endian, seed, tmp_path_factory
):
    """At every level, whole and in part, however levels shrink and tiles are stored."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    shrinks = [by for by in np.cumprod([1, *factors]) if by == 1 or min(size) >= 16 * by]
    levels = [shrunk(pixels, int(by)) for by in shrinks]
    path = tmp_path_factory.mktemp("pyramid") / "slide.tif"
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=">" if big_endian else "<") as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                np.moveaxis(level, 2, 0) if planar else level,
                photometric="rgb",
                planarconfig="separate" if planar else "contig",
                tile=(tile, tile),
                compression=compression,
                predictor=2 if predictor and compression in ("deflate", "lzw", "zstd") else None,
                subfiletype=int(number > 0),
                subifds=len(levels) - 1 if subifds and number == 0 and len(levels) > 1 else None,
                metadata=None,
            )
    image = open_image(path)
    assert image.reader == "tifffile"
    assert [level.shrink[0] for level in image.levels] == shrinks
    for number, level in enumerate(levels):
        height, width = level.shape[:2]
        np.testing.assert_array_equal(image.read(number, 0, 0, width, height), level)
        (x0, x1), (y0, y1) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in (width, height))
        np.testing.assert_array_equal(image.read(number, x0, y0, x1, y1), level[y0:y1, x0:x1])


@pytest.mark.parametrize("rows", [1, 7, 52])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
@pytest.mark.parametrize("short", [1, 2**16])
def test_strips_hold_what_was_written(rows, planar, compression, short, tmp_path, monkeypatch):
    monkeypatch.setattr("hifusion.imagefile.tiff_file._SHORT_ROW_BYTES", short)
    pixels = np.moveaxis(PIXELS, 2, 0) if planar == "separate" else PIXELS
    path = _write(
        tmp_path / "a.tif", pixels, photometric="rgb", planarconfig=planar, rowsperstrip=rows, compression=compression
    )
    image = open_image(path)
    np.testing.assert_array_equal(_whole(path), PIXELS)
    np.testing.assert_array_equal(image.read(0, 10, 5, 60, 45), PIXELS[5:45, 10:60])


@pytest.mark.parametrize("compression, off", [("jpeg", 20), ("jpeg2000", 0), ("webp", 60), ("zstd", 0)])
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_photographic_compressions_are_decoded(compression, off, tile, tmp_path):
    pixels = smooth_pixels(200, 150)
    path = _write(tmp_path / "a.tif", pixels, photometric="rgb", compression=compression, tile=tile)
    assert np.abs(_whole(path).astype(int) - pixels).max() <= off


@pytest.mark.parametrize("compression", ["zstd", "zlib", "lzw", "jpeg2k", None])
def test_pyramids_of_the_helper_are_exact_and_jpeg_is_near(compression, tmp_path):
    pixels = smooth_pixels(300, 200)
    path = write_pyramid(tmp_path / "a.tif", pixels, tile=64, compression=compression)
    for level in range(3):
        np.testing.assert_array_equal(_whole(path, level), shrunk(pixels, 2**level))
    near = _whole(write_pyramid(tmp_path / "b.tif", pixels, tile=64, compression="jpeg"))
    assert np.abs(near.astype(int) - pixels).mean() < 2


def test_tiles_that_the_file_leaves_out_are_white(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiles = iter([np.full((16, 16, 3), 9, dtype=np.uint8), None])
        tiff.write(tiles, shape=(16, 32, 3), dtype=np.uint8, tile=(16, 16), photometric="rgb", compression="zlib")
    whole = _whole(tmp_path / "a.tif")
    assert (whole[:, :16] == 9).all() and (whole[:, 16:] == 255).all()


def test_the_largest_picture_is_the_slide_and_others_are_named(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(GREY[:10, :10], metadata=None)
        tiff.write(PIXELS, photometric="rgb", metadata=None)
        tiff.write(PIXELS[:26, :37], photometric="rgb", metadata=None)  # half the size, but not called reduced
    image = open_image(tmp_path / "a.tif")
    assert [level.size_px for level in image.levels] == [(WIDTH, HEIGHT)]
    assert image.associated[0].endswith("(10 x 10 px)")


# TIFF: colours.


def test_kinds_of_grey_and_palette_become_rgb(tmp_path):
    expected = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(_whole(_write(tmp_path / "black.tif", GREY)), expected)
    np.testing.assert_array_equal(
        _whole(_write(tmp_path / "white.tif", GREY, photometric="miniswhite")), 255 - expected
    )
    colours = np.random.default_rng(1).integers(0, 2**16, (3, 256), dtype=np.uint16)
    palette = _whole(_write(tmp_path / "palette.tif", GREY, photometric="palette", colormap=colours))
    np.testing.assert_array_equal(palette, (colours >> 8).T[GREY])


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparent_is_white_in_a_tiff(kind, tmp_path):
    """Ink 100 at opacity 0, 128 and 255 on white; associated alpha stores ink x opacity."""
    alpha = np.array([[0, 128, 255]], dtype=np.uint8)
    ink = np.full((1, 3, 3), 100, dtype=np.uint8)
    stored = np.round(ink * (alpha[..., None] / 255)).astype(np.uint8) if kind == "assocalpha" else ink
    pixels = np.concatenate([stored, alpha[..., None]], axis=2)
    whole = _whole(_write(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=[kind]))
    assert whole[0, :, 0].tolist() == [255, 177, 100]


def test_a_fourth_sample_that_is_no_opacity_is_left_out(tmp_path):
    pixels = np.concatenate([PIXELS, np.zeros_like(PIXELS[..., :1])], axis=2)
    path = _write(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    np.testing.assert_array_equal(_whole(path), PIXELS)


# Scale.


@pytest.mark.parametrize(
    "x, y, mpp, words",
    [
        (0.25, 0.25, 0.25, "there"),
        (0.50, 0.51, 0.505, "there"),
        (0.5, 0.6, None, "pixels are not square"),
        (0.0, 0.0, None, "no size of a pixel"),
        (-0.5, -0.5, None, "no size of a pixel"),
        (float("nan"), 0.5, None, "no size of a pixel"),
        (float("inf"), float("inf"), None, "no size of a pixel"),
        (352.8, 352.8, None, "72 dpi"),
        (84.67, 84.67, None, "300 dpi"),
        (1e-5, 1e-5, None, "finer than light"),
    ],
)
def test_a_scale_is_used_or_refused_with_its_reason(x, y, mpp, words):
    scale = usable_scale(x, y, "there")
    assert scale.mpp == (mpp and pytest.approx(mpp))
    assert words in scale.source and "there" in scale.source


@pytest.mark.parametrize(
    "resolution, unit, mpp, words",
    [
        ((20000, 20000), "CENTIMETER", 0.5, "TIFF resolution tags"),
        ((50800, 50800), "INCH", 0.5, "TIFF resolution tags"),
        ((72, 72), "INCH", None, "72 dpi"),
        ((20000, 10000), "CENTIMETER", None, "not square"),
        ((0, 0), "CENTIMETER", None, "no size of a pixel"),
        ((20000, 20000), "NONE", None, "not in the file"),
        (None, None, None, "not in the file"),
    ],
)
def test_resolution_tags(resolution, unit, mpp, words, tmp_path):
    options = {"resolution": resolution, "resolutionunit": unit} if resolution else {}
    scale = open_image(_write(tmp_path / "a.tif", PIXELS, photometric="rgb", **options)).scale
    assert scale.mpp == (mpp and pytest.approx(mpp))
    assert words in scale.source


@pytest.mark.parametrize("unit, mpp", [("um", 0.25), ("micron", 0.25), ("mm", None), ("pixel", None)])
def test_imagej_states_its_scale_in_its_own_way(unit, mpp, tmp_path):
    """Four pixels per unit; a quarter of a millimetre is no scale of a scan."""
    path = _write(
        tmp_path / "a.tif", PIXELS, photometric="rgb", imagej=True, resolution=(4, 4), metadata={"unit": unit}
    )
    assert open_image(path).scale.mpp == mpp


@pytest.mark.parametrize(
    "size, unit, mpp, words",
    [
        (0.25, None, 0.25, "OME-XML"),
        (0.25, "µm", 0.25, "OME-XML"),
        (250.0, "nm", 0.25, "OME-XML"),
        (0.00025, "mm", 0.25, "OME-XML"),
        (1.0, "pixel", None, "in pixel, which is no length"),
        (0.0, "µm", None, "no size of a pixel"),
        (-1.0, "µm", None, "no size of a pixel"),
        (None, None, None, "not in the file"),
    ],
)
def test_ome_tiff_states_its_scale_with_its_unit(size, unit, mpp, words, tmp_path):
    metadata = {"axes": "YXS"}
    for axis in "XY":
        metadata |= {f"PhysicalSize{axis}": size} if size is not None else {}
        metadata |= {f"PhysicalSize{axis}Unit": unit} if unit else {}
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(PIXELS, photometric="rgb", tile=(16, 16), subifds=1, metadata=metadata)
        tiff.write(shrunk(PIXELS, 2), photometric="rgb", tile=(16, 16), subfiletype=1)
    image = open_image(path)
    assert (image.format, image.reader) == ("OME-TIFF", "tifffile")
    assert [level.size_px for level in image.levels] == [(WIDTH, HEIGHT), (WIDTH // 2, HEIGHT // 2)]
    assert image.scale.mpp == (mpp and pytest.approx(mpp))
    assert words in image.scale.source


def test_a_tag_of_numbers_over_nothing_is_no_scale(tmp_path):
    """XResolution 1/0: infinitely many pixels per centimetre."""
    rational = (1).to_bytes(4, "little") + bytes(4)
    path = tmp_path / "a.tif"
    path.write_bytes(raw_tiff({282: (5, rational), 283: (5, rational), 296: 3}))
    assert open_image(path).scale.mpp is None


# Levels and area averages.


@pytest.mark.parametrize(
    "full, size, shrink",
    [
        ((718, 514), (179, 128), 4.0),
        ((718, 514), (180, 129), 4.0),
        ((46000, 32914), (11500, 8228), 4.0),
        ((300, 250), (37, 31), 8.0),
        ((10000, 5000), (625, 312), 16.0),
        ((900, 600), (300, 200), 3.0),
        ((1000, 1000), (400, 400), None),
        ((1000, 1000), (500, 250), None),
    ],
)
def test_levels_shrink_by_whole_numbers_where_those_explain_their_size(full, size, shrink):
    assert level_shrink(full, size) == (shrink and (shrink, shrink))


@settings(max_examples=80)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 30)),
    start=st.tuples(st.integers(-80, 160), st.integers(-80, 120)),
    extent=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    targets=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    chunk=st.sampled_from([1, 30, 10**6]),
)
def test_area_average_is_the_integral_over_each_target(size, start, extent, targets, chunk):
    """Quarters of a pixel: by hand, every pixel is cut into 4 x targets parts each way."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    covers = [
        AxisCover.of(first / 4, long / 4, count, side, side)
        for first, long, count, side in zip(start, extent, targets, size, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hifusion.imagefile.area._CHUNK_PIXELS", chunk)
        found = area_average(lambda x0, y0, x1, y1: pixels[y0:y1, x0:x1], *covers, 255)
    far = 100
    expected = np.pad(pixels, ((far, far), (far, far), (0, 0)), constant_values=255).astype(float)
    for axis, (first, long, count) in enumerate(zip(start[::-1], extent[::-1], targets[::-1], strict=True)):
        quarters = expected.repeat(4, axis=axis).take(range(4 * far + first, 4 * far + first + long), axis=axis)
        parts = quarters.repeat(count, axis=axis)
        expected = np.stack(np.split(parts, count, axis=axis)).mean(axis=axis + 1)
        expected = np.moveaxis(expected, 0, axis)
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_lzw_of_every_length_is_decoded():
    """Data that libtiff decodes as the strip of a grey image; cut data are an error, not the end of the process."""
    imagecodecs = pytest.importorskip("imagecodecs")
    data = PIXELS[:20].tobytes()
    whole = imagecodecs.lzw_encode(data)
    np.testing.assert_array_equal(decode_lzw(whole, 20, WIDTH * 3, 1).ravel(), np.frombuffer(data, np.uint8))
    for keep in range(0, len(whole) - 10, 97):
        with pytest.raises((RuntimeError, ValueError)):
            decode_lzw(whole[:keep], 20, WIDTH * 3, 1)


# Plain images.


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_plain_images_of_many_bands_are_decoded_whole(name, tmp_path, monkeypatch):
    monkeypatch.setattr("hifusion.imagefile.plain_file._BAND_ROWS", 10)
    Image.fromarray(PIXELS).save(tmp_path / name)
    np.testing.assert_array_equal(_whole(tmp_path / name), np.asarray(Image.open(tmp_path / name)))


def test_palette_and_half_transparent_png(tmp_path):
    Image.fromarray(PIXELS).quantize(16).save(tmp_path / "palette.png")
    expected = np.asarray(Image.open(tmp_path / "palette.png").convert("RGB"))
    np.testing.assert_array_equal(_whole(tmp_path / "palette.png"), expected)
    Image.new("LA", (1, 1), (100, 128)).save(tmp_path / "half.png")
    assert _whole(tmp_path / "half.png").tolist() == [[[177, 177, 177]]]


def test_the_content_tells_the_format_not_the_name(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.svs", format="PNG")
    assert open_image(tmp_path / "a.svs").format == "PNG"
    with refused("is a folder"):
        open_image(tmp_path)
