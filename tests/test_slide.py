"""A patch is exactly the pixels around its centre, whatever file and level they come from; a scale is never guessed."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from fabricate import refused
from fabricate_slides import APERIO, shrunk, smooth_pixels, write_pyramid
from hifusion.errors import InputError
from hifusion.imagefile import plain_file
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
    monkeypatch.setattr(plain_file, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with refused("large.png", "40 x 30 px", "tiled pyramid TIFF"):
        Slide(tmp_path / "large.png")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_an_image_beyond_pillows_own_limit_opens(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert _write(tmp_path / "large.png", PIXELS).read_patch(5, 5, 4)[0].shape == (4, 4, 3)


# What a pyramid gives: the same as one level, only sooner.

BIG = smooth_pixels(903, 614)  # divides by neither 2 nor 4
NOISE = np.random.default_rng(1).integers(0, 255, BIG.shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def pyramids(tmp_path_factory):
    """Levels 1, 2, 4, 8 of a smooth and of a noisy picture, as pages, as SubIFDs, and as an Aperio slide."""
    root = tmp_path_factory.mktemp("pyramids")
    kinds = {
        "pages": {"subifds": False},
        "subifds": {"subifds": True},
        "aperio": {"description": APERIO.format(mpp=0.5), "compression": None},
    }
    return {
        (kind, name): Slide(write_pyramid(root / f"{kind}-{name}.svs", pixels, levels=4, tile=64, **options))
        for kind, options in kinds.items()
        for name, pixels in (("smooth", BIG), ("noise", NOISE))
    }


def _plain_average(pixels, left, top, side, size_px):
    """Area average of a square by hand, white outside: every pixel is cut into size_px equal parts each way."""
    far = side + 1000
    padded = np.pad(pixels, ((far, far), (far, far), (0, 0)), constant_values=255)
    square = padded[top + far : top + far + side, left + far : left + far + side].astype(float)
    rows = square.repeat(size_px, axis=0).reshape(size_px, side, side, 3).mean(axis=1)
    return rows.repeat(size_px, axis=1).reshape(size_px, size_px, side, 3).mean(axis=2)


@pytest.mark.parametrize("kind, reader", [("pages", "tifffile"), ("subifds", "tifffile"), ("aperio", "openslide")])
def test_every_kind_of_pyramid_shows_all_its_levels(kind, reader, pyramids):
    image = pyramids[kind, "smooth"].image
    assert image.reader == reader
    assert [level.size_px for level in image.levels] == [(903, 614), (451, 307), (225, 153), (112, 76)]
    assert [level.shrink for level in image.levels] == [(by, by) for by in (1.0, 2.0, 4.0, 8.0)]


@pytest.mark.parametrize("kind", ["pages", "subifds", "aperio"])
@settings(max_examples=25)
@given(x=st.integers(300, 600), y=st.integers(300, 310), size_px=st.integers(2, 24), shrink=st.floats(1, 12))
def test_a_shrunk_patch_of_a_pyramid_is_the_area_average_of_full_resolution(kind, x, y, size_px, shrink, pyramids):
    """The picture changes by up to 5 grey levels per pixel: 3 are less than a full-resolution pixel's shift.

    OpenSlide takes the corner of a region in whole full-resolution pixels: half of one more where levels do not divide.
    """
    side = round(size_px * shrink)
    patch, inside = pyramids[kind, "smooth"].read_patch(x, y, size_px, shrink)
    assert inside.tolist() == [0, 0, size_px, size_px]
    expected = _plain_average(BIG, x - side // 2, y - side // 2, side, size_px)
    np.testing.assert_allclose(patch, expected, atol=6 if kind == "aperio" else 3)


@pytest.mark.parametrize("kind", ["pages", "subifds", "aperio"])
@settings(max_examples=15)
@given(x=st.integers(-60, 950), y=st.integers(-60, 660), size_px=st.integers(2, 24), shrink=st.integers(4, 12))
def test_the_edge_of_a_pyramid_is_where_it_is_at_full_resolution(kind, x, y, size_px, shrink, pyramids):
    """White begins at pixel 903 and 614, though level 3 ends at 112 x 8 = 896 and 76 x 8 = 608."""
    side = size_px * shrink
    patch, _ = pyramids[kind, "smooth"].read_patch(x, y, size_px, shrink)
    np.testing.assert_allclose(patch, _plain_average(BIG, x - side // 2, y - side // 2, side, size_px), atol=16)


@pytest.mark.parametrize("shrink, level", [(2, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("kind", ["pages", "subifds"])
def test_an_aligned_patch_of_noise_is_the_level_itself(kind, shrink, level, pyramids):
    """Centre and side are multiples of the level's pixel: nothing is resampled, to the last bit."""
    patch, _ = pyramids[kind, "noise"].read_patch(40 * shrink, 32 * shrink, 16, shrink)
    np.testing.assert_array_equal(patch, shrunk(NOISE, shrink)[24:40, 32:48])


def test_a_patch_between_the_pixels_of_a_level_is_not_blurred(pyramids):
    """Moved by one full-resolution pixel at shrink 2: level 1 would average its neighbours, level 0 does not."""
    patch, _ = pyramids["pages", "noise"].read_patch(401, 301, 16, 2)
    np.testing.assert_allclose(patch.astype(int), shrunk(NOISE[285:317, 385:417], 2), atol=1)


@pytest.mark.parametrize("shrink", [1.0, 2.0, 4.0, 5.3, 8.0, 11.0])
@pytest.mark.parametrize("kind", ["pages", "aperio"])
def test_a_dot_stays_where_it_is_at_every_level(kind, shrink, tmp_path):
    """A dark dot, sigma 24 px, whose centre is (523.0, 311.0): it is found in each patch where arithmetic puts it."""
    y, x = np.mgrid[:640, :1024] + 0.5
    dot = np.exp(-((x - 523) ** 2 + (y - 311) ** 2) / (2 * 24**2))
    pixels = np.round(250 - 250 * dot).astype(np.uint8)[..., None].repeat(3, axis=2)
    options = {"description": APERIO.format(mpp=0.5), "compression": None} if kind == "aperio" else {}
    slide = Slide(write_pyramid(tmp_path / "dot.svs", pixels, levels=4, tile=64, **options))
    size_px = round(320 / shrink)
    side = round(size_px * shrink)
    for x, y in [(523, 311), (500, 330), (531, 300)]:
        patch, _ = slide.read_patch(x, y, size_px, shrink)
        dark = 250.0 - patch[..., 0]
        found = [(dark.sum(axis=axis) * (np.arange(size_px) + 0.5)).sum() / dark.sum() for axis in (0, 1)]
        expected = [(523 - (x - side // 2)) * size_px / side, (311 - (y - side // 2)) * size_px / side]
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_thumbnail_of_a_pyramid_is_the_area_average_of_the_whole(pyramids):
    for kind in ("pages", "subifds", "aperio"):
        slide = pyramids[kind, "smooth"]
        assert slide.thumbnail(100).shape == (68, 100, 3)
        np.testing.assert_array_equal(slide.thumbnail(2000), BIG)
        halves = slide.thumbnail(452).astype(int)[:-2, :-2]
        assert np.abs(halves - shrunk(BIG, 2)[: halves.shape[0], : halves.shape[1]]).mean() < 2


def test_a_patch_that_would_take_gigabytes_is_refused(slide, pyramids):
    with refused("noise.png", "too large to read at once"):
        slide.read_patch(0, 0, 100, shrink=1000.0)
    assert pyramids["pages", "smooth"].read_patch(0, 0, 10, shrink=5000.0)[0].shape == (10, 10, 3)


# Scale, processes, closing, facts.


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("nan"), float("inf"), 1e-4, 1000.0])
def test_an_impossible_mpp_from_the_user_is_refused(mpp, slide):
    with refused("--mpp", "0.01 to 100"):
        Slide(slide.path, mpp=mpp)


def test_the_users_mpp_stands_before_the_files(pyramids, slide):
    path = pyramids["aperio", "smooth"].path
    assert (Slide(path).mpp, Slide(path).mpp_source) == (0.5, "slide metadata (openslide.mpp)")
    assert (Slide(path, mpp=0.25).mpp, Slide(path, mpp=0.25).mpp_source) == (0.25, "given (--mpp)")
    with refused("noise.png", "a PNG has at most the dpi of a print", "--mpp"):
        slide.require_mpp()


def _mean_of_patch(slide):
    return slide.read_patch(300, 300, 64)[0].mean()


def test_a_forked_process_opens_the_file_for_itself(pyramids):
    """Processes that share an open file move each other's place in it; what was read here is open when they begin."""
    slides = list(pyramids.values())
    expected = [_mean_of_patch(slide) for slide in slides]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_mean_of_patch, slides) == expected


@pytest.mark.parametrize("kind", ["pages", "aperio"])
@settings(max_examples=60)
@given(
    x=st.integers(-60, 950),
    y=st.integers(-60, 660),
    step=st.integers(0, 120),
    spots=st.integers(1, 8),
    size_px=st.integers(2, 40),
    shrink=st.sampled_from([1.0, 1.4, 2.0, 3.5, 5.3]),
)
def test_patches_read_together_are_those_read_one_by_one(kind, x, y, step, spots, size_px, shrink, pyramids):
    slide = pyramids[kind, "noise"]
    centres = np.array([(x + step * number, y + number / 3) for number in range(spots)])
    alone = [slide.read_patch(*centre, size_px, shrink)[0] for centre in centres]
    np.testing.assert_array_equal(slide.read_patches(centres, size_px, shrink), alone)


def test_what_patches_cover_together_is_read_once_unless_they_lie_far_apart(pyramids, monkeypatch):
    slide, asked = pyramids["aperio", "noise"], []
    read = type(slide.image).read
    monkeypatch.setattr(type(slide.image), "read", lambda image, *box: asked.append(box) or read(image, *box))
    row = np.array([(300.0 + 20 * number, 300.0) for number in range(6)])
    slide.read_patches(row, 60)
    assert asked == [(0, 270, 270, 430, 330)]
    asked.clear()
    slide.read_patches(np.array([(100.0, 100.0), (700.0, 500.0)]), 60)
    assert len(asked) == 2


def test_damage_between_patches_is_nobodys(pyramids, monkeypatch):
    slide, read = pyramids["aperio", "noise"], type(pyramids["aperio", "noise"].image).read

    def broken(image, level, x0, y0, x1, y1):
        if x0 <= 400 < x1:
            raise InputError("a broken tile")
        return read(image, level, x0, y0, x1, y1)

    centres = np.array([(330.0, 300.0), (350.0, 300.0), (360.0, 300.0), (440.0, 300.0), (450.0, 300.0)])
    whole = slide.read_patches(centres, 60)
    monkeypatch.setattr(type(slide.image), "read", broken)
    np.testing.assert_array_equal(slide.read_patches(centres, 60), whole)
    with refused("a broken tile"):
        slide.read_patches(centres + [[20, 0]], 60)


def test_threads_read_what_one_thread_reads(pyramids):
    slides = [pyramids["pages", "noise"], pyramids["aperio", "noise"]]
    places = [(x, y) for x in range(50, 850, 90) for y in range(50, 600, 110)]
    for slide in slides:
        slide.close()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda at, slide=slide: slide.read_region(*at, 70, 60), places))
        for (x, y), region in zip(places, found, strict=True):
            np.testing.assert_array_equal(region[:14], NOISE[y : y + 14, x : x + 70][:, :70])


def test_a_copy_by_pickle_reads_the_same_and_a_closed_slide_opens_again(pyramids):
    with pyramids["subifds", "smooth"] as slide:
        patch, _ = slide.read_patch(300, 300, 64)
        copy = pickle.loads(pickle.dumps(slide))
    assert (copy.size_px, copy.mpp) == (slide.size_px, slide.mpp)
    for again in (copy, slide):
        np.testing.assert_array_equal(again.read_patch(300, 300, 64)[0], patch)


def test_facts_of_a_slide_are_plain_values(pyramids):
    facts = pyramids["pages", "smooth"].facts()
    assert facts == {
        "kind": "slide",
        "format": "BigTIFF",
        "reader": "tifffile",
        "size_px": [903, 614],
        "size_mm": [0.452, 0.307],
        "mpp": 0.5,
        "mpp_source": "TIFF resolution tags",
        "levels": [
            {"size_px": [903, 614], "shrink": 1.0},
            {"size_px": [451, 307], "shrink": 2.0},
            {"size_px": [225, 153], "shrink": 4.0},
            {"size_px": [112, 76], "shrink": 8.0},
        ],
        "associated_images": [],
    }


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
    with refused("openslide-unopenable.tiff", "compressed by number 52479", "save it with LZW, deflate or JPEG"):
        Slide(wsi / "openslide-unopenable.tiff")
    broken = Slide(wsi / "openslide-unreadable.svs")
    for read in (lambda: broken.read_patch(10, 10, 8), broken.facts):
        with refused("openslide-unreadable.svs", "not a readable image"):
            read()


def test_a_shrink_that_is_no_whole_number_weighs_pixels_by_the_part_covered(slide):
    """2.5 px to one: along each axis two whole pixels and half of the one between two neighbours."""
    patch, _ = slide.read_patch(20, 15, 4, shrink=2.5)
    weights = np.zeros((4, 10))
    for target in range(4):
        low, high = 2.5 * target, 2.5 * (target + 1)
        for pixel in range(10):
            weights[target, pixel] = max(0.0, min(pixel + 1, high) - max(pixel, low)) / 2.5
    expected = np.einsum("iy,jx,yxc->ijc", weights, weights, PIXELS[10:20, 15:25].astype(float))
    np.testing.assert_allclose(patch, expected, rtol=0, atol=0.51)
