"""A section that lies as it should passes; each way it can lie wrong is found, in synthetic and in real sections."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from fabricate import refused
from hifusion import api, placement, synth
from hifusion.guard import check_section, require_geometry
from hifusion.placement import TURNS, WAYS
from hifusion.readers import her2st
from hifusion.section import build_section, write_section
from hifusion.slide import Slide
from stained import GLASS, HEIGHT, MPP, PITCH_UM, WIDTH, measured, picture, write_picture


@pytest.fixture(scope="module", autouse=True)
def _each_picture_is_looked_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_layers_of", lru_cache(maxsize=16)(placement._layers_of))
        yield


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Slide:
    return Slide(write_picture(tmp_path_factory.mktemp("guard") / "egg.png", picture()))


def kinds(section: AnnData, slide: Slide | None = None) -> list[str]:
    return [finding.kind for finding in check_section(section, slide)]


def moved(section: AnnData, centres: np.ndarray) -> AnnData:
    other = section.copy()
    other.obsm["spatial"] = np.asarray(centres, dtype=float)
    return other


def faults(section: AnnData, size_px: tuple[int, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Every wrong placement that must be found: turns about the spots and with the image, scales, shifts by a pitch."""
    centres, frame = section.obsm["spatial"], np.array(size_px) / 2
    middle = (centres.min(axis=0) + centres.max(axis=0)) / 2
    for name, matrix in TURNS.items():
        turn = np.array(matrix, dtype=float)
        yield name, (centres - middle) @ turn.T + middle
        yield f"image {name}", (centres - frame) @ turn.T + (frame if turn[0, 0] else frame[::-1])
    yield "doubled", centres * 2
    yield "halved", centres / 2
    pitch_px = section.uns["hifusion"]["pitch_um"] / section.uns["hifusion"]["mpp"]
    for way in WAYS:
        yield f"shifted by {way}", centres + pitch_px * np.array(way)


def test_a_section_in_its_place_passes(slide):
    assert check_section(measured(slide.path), slide) == []


def test_every_fault_of_a_synthetic_section_is_found_and_named(slide):
    section = measured(slide.path)
    wanted = {"image": "orientation", "doubled": "scale", "halved": "scale", "shifted": "shift"}
    for name, centres in faults(section, slide.size_px):
        assert wanted.get(name.split()[0], "orientation") in kinds(moved(section, centres), slide), name


def test_positions_of_another_resolution_are_found_though_the_section_agrees_with_itself(slide):
    """All in pixels of a picture twice as large: neighbours are still a pitch apart."""
    section = measured(slide.path, mpp=MPP / 2)
    twice = moved(section, section.obsm["spatial"] * 2)
    assert kinds(twice, slide) == ["outside", "scale"]
    assert "times 0.5" in check_section(twice, slide)[1].message


def test_a_pitch_that_is_not_the_declared_one_is_found(slide):
    assert kinds(measured(slide.path, pitch_um=PITCH_UM * 1.3), slide) == ["pitch"]


def test_a_slide_of_another_scale_is_found(slide):
    assert kinds(measured(slide.path), Slide(slide.path, MPP * 1.2)) == ["scale"]
    assert kinds(measured(slide.path), Slide(slide.path, MPP * 1.05)) == []


def test_spots_of_another_table_are_found(slide):
    """Array positions that do not belong to the pixel positions: a join that went wrong."""
    section = measured(slide.path)
    order = np.random.default_rng(0).permutation(section.n_obs)
    section.obs["array_row"], section.obs["array_col"] = (
        section.obs[column].to_numpy()[order] for column in ("array_row", "array_col")
    )
    assert kinds(section, slide) == ["array"]


def test_one_spot_outside_the_image_is_found(slide):
    section = measured(slide.path)
    section.obsm["spatial"][0] = (WIDTH, 10.0)
    finding = check_section(section, slide)[0]
    assert finding.kind == "outside"
    assert finding.message == f"1 of {section.n_obs} spots lie outside the {WIDTH} x {HEIGHT} px image"


def test_an_empty_slide_is_found(tmp_path):
    blank = write_picture(tmp_path / "blank.png", np.broadcast_to(GLASS, (HEIGHT, WIDTH, 3)).astype(np.uint8))
    (finding,) = check_section(measured(blank))
    assert finding.kind == "tissue" and "0% of the spots" in finding.message


def test_spots_off_tissue_are_not_looked_at(slide):
    """The left half of the array moved onto glass, and said to be off tissue."""
    section = measured(slide.path)
    left = section.obsm["spatial"][:, 0] < 290
    section.obs["in_tissue"] = ~left
    section.layers["counts"][left] = 0
    assert kinds(section, slide) == []


def test_without_an_image_only_the_array_is_checked(slide):
    section = measured(slide.path)
    section.uns["hifusion"]["image"] = ""
    assert check_section(moved(section, section.obsm["spatial"][:, ::-1])) == []
    assert kinds(moved(section, section.obsm["spatial"] * 2)) == ["pitch"]


def test_positions_alone_and_few_spots_pass(slide):
    section = measured(slide.path)
    assert check_section(section[:15].copy(), slide) == []
    del section.layers["counts"]
    assert check_section(section, slide) == []


def test_small_bins_are_looked_at_in_squares():
    """8 um bins with 1 count each: squares of 100 um, their counts a mean over the bins they hold."""
    row, column = np.mgrid[:50, :50].reshape(2, -1)
    section = build_section(
        sp.csr_matrix(np.ones((2500, 1), dtype=int)),
        genes=["ALL"],
        spots=[str(number) for number in range(2500)],
        centres_px=np.stack([column, row], axis=1) * 16.0 + 8,
        name="HD",
        patient="P",
        mpp=0.5,
        spot_diameter_um=8,
        pitch_um=8,
        array_row=row,
        array_col=column,
    )
    spots = placement.spots_of(section)
    assert len(spots.centres_px) == 16
    assert spots.window_px == 200
    np.testing.assert_allclose(spots.log_counts, np.log(2))


def test_findings_stop_in_one_line_after_the_picture_is_drawn(slide, tmp_path):
    section = measured(slide.path)
    wrong = moved(section, section.obsm["spatial"] * 2)
    with refused("section S1", "200 um apart", "times 0.5", "look.png", "--force"):
        require_geometry(wrong, picture=tmp_path / "look.png")
    assert (tmp_path / "look.png").stat().st_size > 1000


def test_force_goes_on_and_tells_what_was_found(slide):
    section = measured(slide.path)
    wrong = moved(section, section.obsm["spatial"] * 2)
    assert require_geometry(wrong, force=True) == check_section(wrong)


def test_nothing_found_draws_nothing(slide, tmp_path):
    assert require_geometry(measured(slide.path), picture=tmp_path / "look.png") == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def tumours(her2st_root) -> dict[str, tuple[AnnData, Slide]]:
    """The five her2st sections that have an image."""
    sections = her2st.read(her2st_root, ["B4", "C2", "C3", "C4", "C5"])
    return {section.uns["hifusion"]["section"]: (section, slide_of(section)) for section in sections}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["B4", "C2", "C3", "C4", "C5"])
def test_every_fault_of_a_real_section_is_found(name, tumours):
    section, slide = tumours[name]
    missed = [fault for fault, centres in faults(section, slide.size_px) if not kinds(moved(section, centres), slide)]
    assert missed == []


@pytest.mark.real
def test_no_tumour_raises_an_alarm_whole_or_thinned(tumours):
    assert [name for name, (section, slide) in tumours.items() if alarms(section, slide)] == []


@pytest.mark.real
@pytest.mark.parametrize("name", ["MOB1", "MOB3"])
def test_no_olfactory_bulb_raises_an_alarm_whole_or_thinned(name, data_root):
    """One of each animal; their array is staggered."""
    section = olfactory_bulb(data_root / "mob_stutility", name)
    assert not alarms(section, slide_of(section))


def slide_of(section: AnnData) -> Slide:
    return Slide(section.uns["hifusion"]["image"])


def alarms(section: AnnData, slide: Slide) -> list[str]:
    """Findings on all of a section's spots, and on a half and a third of them drawn at random."""
    rng = np.random.default_rng(0)
    drawn = [
        np.sort(rng.choice(section.n_obs, int(part * section.n_obs), replace=False)) for part in (1, 0.5, 0.5, 0.3)
    ]
    return [kind for spots in drawn for kind in kinds(section[spots].copy(), slide)]


def olfactory_bulb(root: Path, name: str) -> AnnData:
    """A mouse olfactory bulb, spots under tissue only; 4.41 um/px from the array's size."""
    table = pd.read_csv(root / f"alignment_table_{name}.tsv", sep="\t").query("selected == 1")
    table.index = table["x"].astype(str) + "x" + table["y"].astype(str)
    counts = pd.read_csv(root / f"{name}.tsv.gz", sep="\t", index_col=0).loc[table.index]
    return build_section(
        sp.csr_matrix(counts.to_numpy()),
        genes=list(counts.columns),
        spots=list(table.index),
        centres_px=table[["pixel_x", "pixel_y"]].to_numpy(),
        name=name,
        patient="mouse",
        mpp=4.41,
        spot_diameter_um=100,
        pitch_um=143,
        array_row=table["y"].to_numpy(),
        array_col=table["x"].to_numpy(),
        image=root / f"{name}.jpg",
    )


def test_prepare_refuses_a_mirrored_section_and_goes_on_by_force(tmp_path):
    """Before a store is built; the picture stays, and by force the store is built in the same folder."""
    synth.write_cohort(tmp_path / "raw", patients=1, sections_per_patient=1)
    section = next(her2st.read(tmp_path / "raw"))
    width, _ = Slide(Path(section.uns["hifusion"]["image"])).size_px
    mirrored = moved(section, section.obsm["spatial"] * [-1, 1] + [width, 0])
    write_section(mirrored, tmp_path / "sections" / "A1.h5ad")
    with refused("section A1", "fit the slide better mirrored in x", "--force"):
        api.prepare(tmp_path / "sections", tmp_path / "store", recipe="tiny")
    assert [path.name for path in (tmp_path / "store").rglob("*.*")] == ["A1.png"]
    built = api.prepare(tmp_path / "sections", tmp_path / "store", recipe="tiny", force=True)
    assert list(built.manifest["sections"]) == ["A1"]
