"""Overlays show the slide, the spots at their true size and place, and what was found, as plain text."""

import numpy as np
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from PIL import Image

from fabricate import full_disk, refused
from hifusion import overlays
from hifusion.lattice import lattice_section
from hifusion.overlays import draw_check, draw_tissue
from hifusion.slide import Slide
from hifusion.tissue import TissueMask, find_tissue
from stained import DIAMETER_UM, HEIGHT, MPP, WIDTH, measured, picture, write_picture


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return Slide(write_picture(tmp_path_factory.mktemp("overlays") / "egg.png", picture()), MPP)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures as they are saved."""
    seen: list[Figure] = []
    save = overlays.save
    monkeypatch.setattr(overlays, "save", lambda figure, out, dpi: seen.append(figure) or save(figure, out, dpi))
    return seen


def spots_in(figure: Figure) -> list[EllipseCollection]:
    return [part for part in figure.axes[0].collections if isinstance(part, EllipseCollection)]


def test_spots_are_drawn_at_their_place_and_size_coloured_by_log_counts(slide, figures, tmp_path):
    section = measured(slide.path)
    draw_check(section, slide, [], tmp_path / "check.png", dpi=40)
    (spots,) = spots_in(figures[0])
    np.testing.assert_array_equal(spots.get_offsets(), section.obsm["spatial"])
    np.testing.assert_allclose(spots.get_widths(), DIAMETER_UM / MPP)
    counts = section.layers["counts"].toarray().sum(axis=1)
    np.testing.assert_allclose(spots.get_array(), np.log1p(counts))
    left, right, bottom, top = figures[0].axes[0].axis()
    assert (left, right, bottom, top) == (0, WIDTH, HEIGHT, 0)


def test_findings_stand_above_as_plain_text(slide, figures, tmp_path):
    draw_check(measured(slide.path), slide, ["scale $x^2$ is off " * 8, "two"], tmp_path / "check.png", dpi=40)
    texts = [text.get_text() for text in figures[0].texts]
    assert texts[0] == "S1" and "two" in texts
    assert " ".join(texts[1:3]).startswith("scale $x^2$ is off")
    assert max(map(len, texts)) <= 95
    assert not any(text.get_parse_math() for text in figures[0].texts[:-1])


def test_spots_outside_the_slide_are_in_view(slide, figures, tmp_path):
    section = measured(slide.path)
    section.obsm["spatial"] *= 2
    draw_check(section, slide, ["outside"], tmp_path / "check.png", dpi=40)
    _, right, bottom, _ = figures[0].axes[0].axis()
    assert right > section.obsm["spatial"][:, 0].max() and bottom > section.obsm["spatial"][:, 1].max()


def test_a_section_without_slide_or_counts_is_drawn(slide, tmp_path):
    section = measured(slide.path)
    del section.layers["counts"]
    draw_check(section, None, ["pitch"], tmp_path / "check.svg")
    assert (tmp_path / "check.svg").read_text().count("<svg") == 1


def test_the_outline_of_the_tissue_and_the_lattice_are_drawn(slide, tmp_path):
    """Green lines stand on the picture of the tissue and nowhere near the corner."""
    tissue = find_tissue(slide)
    section = lattice_section(slide, tissue, mpp=MPP, pitch_um=100, spot_diameter_um=55)
    draw_tissue(slide, tissue, section, tmp_path / "tissue.png", dpi=60)
    pixels = np.asarray(Image.open(tmp_path / "tissue.png").convert("RGB")).astype(int)
    green = (pixels[..., 1] > pixels[..., 0] + 60) & (pixels[..., 1] > pixels[..., 2] + 40)
    assert green.sum() > 100
    assert not green[-80:].any()


@pytest.mark.parametrize("whole", [False, True])
def test_a_mask_without_an_outline_is_drawn(whole, slide, tmp_path):
    tissue = TissueMask(np.full((65, 80), whole), slide.size_px, "by hand")
    assert draw_tissue(slide, tissue, None, tmp_path / "tissue.png", dpi=40).is_file()


def test_of_too_many_spots_some_are_drawn_and_that_is_told(slide, figures, tmp_path, monkeypatch):
    monkeypatch.setattr(overlays, "MOST_DRAWN", 50)
    section = measured(slide.path)
    draw_check(section, slide, [], tmp_path / "check.png", dpi=40)
    (spots,) = spots_in(figures[0])
    np.testing.assert_array_equal(spots.get_offsets(), section.obsm["spatial"][::3])
    assert len(spots.get_array()) == len(spots.get_offsets())
    assert figures[0].axes[0].get_xlabel() == "one spot in 3 is drawn"


def test_what_cannot_be_drawn_to_is_refused_and_nothing_is_left(slide, tmp_path):
    with refused("check.bmp", ".png"):
        draw_check(measured(slide.path), slide, [], tmp_path / "check.bmp")
    with full_disk(1000), refused("check.png", "free some space"):
        draw_check(measured(slide.path), slide, [], tmp_path / "check.png", dpi=40)
    assert list(tmp_path.iterdir()) == []
