"""Tissue is found whatever the glass looks like, ink and padding are not tissue; masks can be corrected by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.ndimage as ndi
from PIL import Image, ImageDraw

from fabricate import full_disk, refused
from hifusion.slide import Slide
from hifusion.tissue import TissueMask, find_tissue, read_mask, small_picture, tissue_of, write_mask
from stained import GLASS, HEIGHT, MPP, WIDTH, outline, picture, write_picture

PENS = {"blue": (35, 60, 165), "light blue": (80, 120, 200), "green": (30, 120, 70), "black": (25, 25, 30)}


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union."""
    return float((found & truth).sum() / (found | truth).sum())


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return Slide(write_picture(tmp_path_factory.mktemp("tissue") / "egg.png", picture()), MPP)


@pytest.fixture(scope="module")
def plain_mask() -> np.ndarray:
    """The tissue of the picture as it is."""
    return tissue_of(picture(), MPP)


@pytest.mark.parametrize(
    "glass, haze",
    [(GLASS, 0.0), (GLASS, 0.4), (np.array([236.0, 219.0, 235.0]), 0.4), (np.array([128.0, 131.0, 126.0]), 0.0)],
    ids=["clear", "pink haze", "pink glass and haze", "grey glass"],
)
def test_tissue_is_found_on(glass, haze):
    assert overlap(tissue_of(picture(glass, haze), MPP), outline()) > 0.88


def test_a_background_that_was_made_purely_white_is_glass(plain_mask):
    white = np.where(outline()[..., None], picture() * 0.8, 255).astype(np.uint8)
    assert overlap(tissue_of(white, MPP), plain_mask) > 0.95


def test_uneven_light_changes_nothing(plain_mask):
    """A lamp that loses a third towards one corner."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    light = 1 - 0.33 * (x / WIDTH + y / HEIGHT)[..., None] / 2
    lit = tissue_of((picture() * light).astype(np.uint8), MPP)
    assert overlap(lit, plain_mask) > 0.99


@pytest.mark.parametrize("value", [0, 255])
def test_the_padding_of_a_scan_is_no_tissue_and_moves_nothing(value, plain_mask):
    padded = np.pad(picture(), ((90, 30), (0, 120), (0, 0)), constant_values=value)
    found = tissue_of(padded, MPP)
    inside = found[90:-30, :-120]
    assert found.sum() == inside.sum()
    assert overlap(inside, plain_mask) > 0.99


@pytest.mark.parametrize("colour", PENS.values(), ids=PENS)
def test_pen_beside_the_tissue_is_no_tissue(colour, plain_mask):
    drawn = Image.fromarray(picture())
    ImageDraw.Draw(drawn).line([(500, 60), (590, 200), (560, 470)], fill=colour, width=60)
    found = tissue_of(np.asarray(drawn), MPP)
    assert not found[:, 500:].any()
    assert overlap(found, plain_mask) > 0.99


def test_a_slide_without_tissue_has_an_empty_mask(tmp_path):
    noise = np.random.default_rng(0).normal(0, 2, (HEIGHT, WIDTH, 3))
    blank = Slide(write_picture(tmp_path / "blank.png", (GLASS - 3 + noise).clip(0, 255).astype(np.uint8)), MPP)
    assert not find_tissue(blank).mask.any()


def test_the_mask_covers_the_whole_slide_at_about_8_um(slide):
    tissue = find_tissue(slide)
    assert tissue.size_px == (WIDTH, HEIGHT)
    assert tissue.shrink == pytest.approx((2, 2), rel=0.01)
    assert overlap(tissue.mask, outline()[::2, ::2]) > 0.85


def test_without_a_scale_tissue_is_not_looked_for(slide):
    with refused("egg.png", "--mpp"):
        find_tissue(Slide(slide.path))


def test_the_picture_of_a_huge_slide_is_bounded():
    class Huge:
        size_px = (400_000, 100_000)

        def thumbnail(self, longest_px: int) -> np.ndarray:
            return np.zeros((longest_px // 4, longest_px, 3), dtype=np.uint8)

    shown, um = small_picture(Huge(), 0.25)
    assert shown.shape == (625, 2500, 3)
    assert um == pytest.approx(40)


def test_a_written_mask_is_read_back(slide, tmp_path):
    tissue = find_tissue(slide)
    write_mask(tissue, tmp_path / "mask.png")
    again = read_mask(tmp_path / "mask.png", slide)
    np.testing.assert_array_equal(again.mask, tissue.mask)
    assert again.size_px == tissue.size_px
    assert again.how == "read from mask.png"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "L"])
def test_a_mask_from_a_paint_program_is_read(mode, slide, tmp_path):
    """Of another size than ours, in any mode, without our notes; bright is tissue."""
    drawn = Image.new("L", (321, 261), 0)
    ImageDraw.Draw(drawn).rectangle((100, 50, 199, 149), fill=255)
    drawn.convert(mode).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png", slide).mask
    assert mask[50:150, 100:200].all() and mask.sum() == 100 * 100


def test_a_mask_of_another_slide_is_refused(slide, tmp_path):
    write_picture(tmp_path / "turned.png", np.zeros((320, 260), dtype=np.uint8))
    with refused("turned.png", "260 x 320", "640 x 520 px"):
        read_mask(tmp_path / "turned.png", slide)
    write_mask(TissueMask(np.zeros((130, 160), dtype=bool), (1280, 1040), "by hand"), tmp_path / "twice.png")
    with refused("twice.png", "1280 x 1040 px", "egg.png"):
        read_mask(tmp_path / "twice.png", slide)


def test_what_is_no_mask_is_refused(slide, tmp_path):
    (tmp_path / "text.png").write_text("mask")
    with refused("text.png", "cannot be read"):
        read_mask(tmp_path / "text.png", slide)
    with refused("none.png", "no such mask"):
        read_mask(tmp_path / "none.png", slide)
    with refused("mask.jpg", ".png"):
        write_mask(find_tissue(slide), tmp_path / "mask.jpg")


def test_a_mask_on_a_full_disk_leaves_nothing(slide, tmp_path):
    with full_disk(100), refused("mask.png", "free some space"):
        write_mask(find_tissue(slide), tmp_path / "mask.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["B4", "C2", "C3", "C4", "C5"])
def test_the_measured_spots_of_her2st_lie_on_tissue_and_little_tissue_lies_elsewhere(name, her2st_root):
    """At least 99 % of the spots, on pink glass too; at most 1 % of a mask is more than a pitch from any spot."""
    spots = pd.read_csv(her2st_root / "data" / "ST-spotfiles" / f"{name}_selection.tsv", sep="\t")
    (image,) = (her2st_root / "data" / "ST-imgs" / name[0] / name).glob("*.jpg")
    tissue = find_tissue(Slide(image), 0.687)  # 200 um of the array are 291 px
    x, y = (spots[["pixel_x", "pixel_y"]].to_numpy() / tissue.shrink).astype(int).T
    share = ndi.uniform_filter(tissue.mask.astype(float), round(100 / 8))[y, x]
    assert (share >= 0.5).mean() >= 0.99
    away = np.ones(tissue.mask.shape, dtype=bool)
    away[y, x] = False
    far = ndi.distance_transform_edt(away) * 8 > 200
    assert (tissue.mask & far).sum() < 0.01 * tissue.mask.sum()


@pytest.mark.real
def test_four_biopsies_are_four_pieces(data_root):
    tissue = find_tissue(Slide(data_root / "wsi" / "RationAI-CMU-1-small.tiff"))
    assert ndi.label(tissue.mask)[1] == 4


@pytest.mark.real
def test_fiducial_rings_are_no_tissue(data_root):
    """Visium's frame: its rings lie within 60 px of the edges of this picture, the tissue does not."""
    image = data_root / "v1_adult_mouse_brain" / "outs" / "spatial" / "tissue_lowres_image.png"
    tissue = find_tissue(Slide(image, 14.3))
    height, width = tissue.mask.shape
    rings = np.ones_like(tissue.mask)
    rings[60 : height - 80, 60 : width - 60] = False
    assert tissue.mask[rings].mean() < 0.02
    assert 0.3 < tissue.mask.mean() < 0.5
