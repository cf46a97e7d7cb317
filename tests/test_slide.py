"""A patch is exactly the pixels around its centre, whatever file they come from."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from fabricate import refused
from hifusion import slide as slide_module
from hifusion.errors import InputError
from hifusion.slide import Slide, clipped_box

WIDTH, HEIGHT = 40, 30
PIXELS = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)  # never 255: white is outside
FAR = 200
PADDED = np.pad(PIXELS, ((FAR, FAR), (FAR, FAR), (0, 0)), constant_values=255)


def _write(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return Slide(path)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("slide") / "noise.png", PIXELS)


@pytest.mark.parametrize("size_px", [2, 3, 8, 9])
def test_the_centre_of_a_patch_is_the_pixel_asked_for(size_px, tmp_path):
    """One red pixel at (x, y) = (23, 7) lands at row and column size // 2."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[7, 23] = (255, 0, 0)
    patch, _ = _write(tmp_path / "dot.png", pixels).read_patch(23, 7, size_px)
    assert np.argwhere(patch[..., 0] == 255).tolist() == [[size_px // 2, size_px // 2]]


@given(x=st.floats(-60, 100), y=st.floats(-60, 100), size_px=st.integers(1, 64))
def test_patch_equals_a_plain_crop_of_the_padded_image(x, y, size_px, slide):
    left, top = round(x) - size_px // 2 + FAR, round(y) - size_px // 2 + FAR
    patch, _ = slide.read_patch(x, y, size_px)
    assert patch.dtype == np.uint8
    np.testing.assert_array_equal(patch, PADDED[top : top + size_px, left : left + size_px])


@given(x=st.integers(-60, 100), y=st.integers(-60, 100), size_px=st.integers(1, 64))
def test_inside_holds_all_of_the_image_and_no_more(x, y, size_px, slide):
    """Image pixels are never pure white here: those of a patch that are not white are the inside box, filled."""
    patch, (left, top, right, bottom) = slide.read_patch(x, y, size_px)
    assert 0 <= left <= right <= size_px and 0 <= top <= bottom <= size_px
    expected = np.zeros((size_px, size_px), dtype=bool)
    expected[top:bottom, left:right] = True
    np.testing.assert_array_equal((patch != 255).all(axis=2), expected)
    x0, y0 = x - size_px // 2, y - size_px // 2
    if expected.any():
        crop = PIXELS[y0 + top : y0 + bottom, x0 + left : x0 + right]
        np.testing.assert_array_equal(patch[top:bottom, left:right], crop)


@given(
    box=st.tuples(st.integers(-50, 50), st.integers(-50, 50), st.integers(0, 60), st.integers(0, 60)),
    size_px=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_clipped_box_holds_the_points_of_both(box, size_px):
    left, top, width, height = box
    x0, y0, x1, y1 = clipped_box(left, top, width, height, size_px)
    both_x = set(range(left, left + width)) & set(range(size_px[0]))
    both_y = set(range(top, top + height)) & set(range(size_px[1]))
    assert set(range(x0, x1)) == both_x
    assert set(range(y0, y1)) == both_y


def test_shrinking_averages_areas(tmp_path):
    """2 x 2 blocks of a checkerboard of 0 and 200 become 100; a patch of 6 reads 12 px, centred as before."""
    board = (np.indices((HEIGHT, WIDTH)).sum(axis=0) % 2 * 200).astype(np.uint8)
    patch, inside = _write(tmp_path / "board.png", np.stack([board] * 3, axis=-1)).read_patch(20, 15, 6, shrink=2.0)
    np.testing.assert_array_equal(patch, np.full((6, 6, 3), 100))
    assert inside.tolist() == [0, 0, 6, 6]


def test_shrunk_patch_tells_its_inside_in_its_own_pixels(slide):
    """Read 24 px around (0, 0), keep 12: the image begins at 12 / 2 = 6 in both directions."""
    patch, inside = slide.read_patch(0, 0, 12, shrink=2.0)
    assert inside.tolist() == [6, 6, 12, 12] and inside.dtype == np.int32
    assert (patch[:6] == 255).all() and (patch[:, :6] == 255).all()
    assert (patch[6:, 6:] < 255).all()


def test_enlarging_repeats_pixels(slide):
    patch, _ = slide.read_patch(20, 15, 8, shrink=0.5)
    np.testing.assert_array_equal(patch, PIXELS[13:17, 18:22].repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize("mirrored_axis", [0, 1])
def test_patch_of_a_mirrored_slide_is_the_mirrored_patch(mirrored_axis, slide, tmp_path):
    """Odd sizes, which have a middle pixel: reading and flipping commute, at the edge too."""
    mirrored = _write(tmp_path / "mirrored.png", np.flip(PIXELS, mirrored_axis).copy())
    for x, y in [(3, 28), (20, 15), (39, 0)]:
        at = (x, HEIGHT - 1 - y) if mirrored_axis == 0 else (WIDTH - 1 - x, y)
        patch, inside = slide.read_patch(x, y, 15)
        other, other_inside = mirrored.read_patch(*at, 15)
        np.testing.assert_array_equal(other, np.flip(patch, mirrored_axis))
        low, high = (1, 3) if mirrored_axis == 0 else (0, 2)
        assert (other_inside[low], other_inside[high]) == (15 - inside[high], 15 - inside[low])


def test_thumbnail_keeps_the_shape_and_never_enlarges(slide, tmp_path):
    assert slide.thumbnail(20).shape == (15, 20, 3)
    np.testing.assert_array_equal(slide.thumbnail(1000), PIXELS)
    halves = np.zeros((300, 800, 3), dtype=np.uint8)
    halves[:, 400:] = 200
    small = _write(tmp_path / "halves.jpg", halves, quality=95).thumbnail(100)
    assert small.shape == (38, 100, 3)
    assert small[:, :45].max() < 10 and abs(small[:, 55:].astype(int) - 200).max() < 10


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_dpi_tag_is_no_scale(name, tmp_path):
    plain = _write(tmp_path / name, PIXELS, dpi=(72, 72))
    assert plain.mpp is None
    assert plain.size_px == (WIDTH, HEIGHT)


def test_transparent_is_white_and_grey_is_rgb(tmp_path):
    alpha = np.full((HEIGHT, WIDTH, 1), 255, dtype=np.uint8)
    alpha[:10] = 0
    clear = _write(tmp_path / "clear.png", np.concatenate([PIXELS, alpha], axis=-1))
    whole = clear.read_region(0, 0, WIDTH, HEIGHT)
    assert (whole[:10] == 255).all()
    np.testing.assert_array_equal(whole[10:], PIXELS[10:])
    np.testing.assert_array_equal(clear.thumbnail(WIDTH), whole)
    grey = _write(tmp_path / "grey.png", PIXELS[..., 0])
    np.testing.assert_array_equal(grey.read_region(0, 0, WIDTH, HEIGHT), PIXELS[..., :1].repeat(3, axis=2))


def test_missing_foreign_and_truncated_images_are_one_line(tmp_path):
    with refused("gone.jpg", "no such image"):
        Slide(tmp_path / "gone.jpg")
    (tmp_path / "words.jpg").write_text("not an image")
    with refused("words.jpg", "not a readable image"):
        Slide(tmp_path / "words.jpg")
    _write(tmp_path / "cut.jpg", PIXELS.repeat(8, axis=0).repeat(8, axis=1))
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    cut = Slide(tmp_path / "cut.jpg")  # its head is whole
    for read in (lambda: cut.read_patch(5, 5, 4), lambda: cut.thumbnail(10)):
        with refused("cut.jpg", "not a readable image", "intact"):
            read()


@settings(max_examples=60)
@given(kind=st.sampled_from(["png", "jpeg", "tiff"]), keep=st.floats(0, 1), places=st.lists(st.floats(0, 1)))
def test_damaged_images_are_read_or_refused_in_one_line(kind, keep, places, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / f"image.{kind}"
    Image.fromarray(PIXELS).save(path)
    data = bytearray(path.read_bytes())
    for place in places:
        data[int(place * (len(data) - 1))] ^= 0x5A
    path.write_bytes(data[: int(keep * len(data))])
    message = f"{path} could be read"
    try:
        found = Slide(path)
        assume(found.size_px[0] * found.size_px[1] < 10**6)
        assert found.read_patch(5, 5, 4)[0].shape == (4, 4, 3)
        assert max(found.thumbnail(10).shape) <= 10
    except InputError as error:
        message = str(error)
    assert str(path) in message and "\n" not in message


def test_an_image_too_large_to_decode_whole_is_refused_and_pillows_limit_stays(tmp_path, monkeypatch):
    _write(tmp_path / "large.png", PIXELS)
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(slide_module, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with refused("large.png", "40 x 30 px", "tiled pyramid TIFF"):
        Slide(tmp_path / "large.png")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_an_image_beyond_pillows_own_limit_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert _write(tmp_path / "large.png", PIXELS).read_patch(5, 5, 4)[0].shape == (4, 4, 3)


@pytest.fixture
def wsi(data_root):
    if not (data_root / "wsi").is_dir():
        pytest.skip(f"{data_root / 'wsi'} is not a folder; HIFUSION_DATA names the folder that holds wsi")
    return data_root / "wsi"


@pytest.mark.real
def test_aperio_slide_knows_its_scale_and_is_read_piecewise(wsi):
    svs = Slide(wsi / "CMU-1-Small-Region.svs")
    assert svs.size_px == (2220, 2967)
    assert svs.mpp == pytest.approx(0.499)
    region = svs.read_region(1000, 1200, 300, 200)
    patch, inside = svs.read_patch(1100, 1300, 100)
    np.testing.assert_array_equal(patch, region[50:150, 50:150])
    assert inside.tolist() == [0, 0, 100, 100]
    assert 100 < region.mean() < 250
    corner, inside = svs.read_patch(2219, 2966, 10)
    assert inside.tolist() == [0, 0, 6, 6]
    assert (corner[6:] == 255).all() and (corner[:, 6:] == 255).all()
    assert svs.thumbnail(300).shape in [(299, 224, 3), (300, 224, 3)]


@pytest.mark.real
@pytest.mark.parametrize(
    "name, mpp", [("RationAI-CMU-1-small.tiff", 3.19), ("small_HE_levels.tiff", None), ("kidney-48-5.tif", None)]
)
def test_resolution_tags_count_only_where_they_can_be_a_scan(name, mpp, wsi):
    """small_HE_levels.tiff says 353 um per pixel, which is the 72 dpi of a screen."""
    assert Slide(wsi / name).mpp == (mpp and pytest.approx(mpp, abs=0.01))


@pytest.mark.real
def test_broken_slides_are_one_line(wsi):
    with refused("openslide-unopenable.tiff", "not a readable image"):
        Slide(wsi / "openslide-unopenable.tiff")
    with refused("openslide-unreadable.svs", "not a readable image"):
        Slide(wsi / "openslide-unreadable.svs").read_patch(10, 10, 8)
