"""Positions that do not fit their slide are told, those that do are not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

from fabricate import refused
from hifusion import api, synth
from hifusion.guard import check_section, require_geometry
from hifusion.readers import her2st, st_tables
from hifusion.section import write_section
from hifusion.slide import Slide

Moves = dict[str, np.ndarray]


def wrong_positions(section: AnnData, slide: Slide) -> Moves:
    """Positions of a section gone wrong in the usual ways, in the frame of the image and about their own middle."""
    centres, (width, height) = section.obsm["spatial"], slide.size_px
    pitch = section.uns["hifusion"]["pitch_um"] / section.uns["hifusion"]["mpp"]
    middle = (centres.min(axis=0) + centres.max(axis=0)) / 2
    x, y = centres.T
    off_x, off_y = (centres - middle).T
    moves = {
        "axes swapped": np.column_stack([y, x]),
        "mirrored in x": np.column_stack([width - x, y]),
        "mirrored in y": np.column_stack([x, height - y]),
        "turned by 90": np.column_stack([height - y, x]),
        "turned by 180": np.column_stack([width - x, height - y]),
        "turned by 270": np.column_stack([y, width - x]),
        "axes swapped about the middle": np.column_stack([off_y, off_x]) + middle,
        "mirrored in x about the middle": np.column_stack([-off_x, off_y]) + middle,
        "mirrored in y about the middle": np.column_stack([off_x, -off_y]) + middle,
        "turned by 90 about the middle": np.column_stack([-off_y, off_x]) + middle,
        "turned by 180 about the middle": np.column_stack([-off_x, -off_y]) + middle,
        "scale doubled": centres * 2,
        "scale halved": centres / 2,
    }
    steps = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]
    return moves | {f"shifted by {step}": centres + np.array(step) * pitch for step in steps}


def moved(section: AnnData, centres: np.ndarray, mpp: float | None = None) -> AnnData:
    other = section.copy()
    other.obsm["spatial"] = centres
    if mpp is not None:
        other.uns["hifusion"]["mpp"] = mpp
    return other


def slide_of(section: AnnData) -> Slide:
    return Slide(Path(section.uns["hifusion"]["image"]))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[AnnData]:
    """Measured sections whose counts were drawn from what is seen."""
    root = tmp_path_factory.mktemp("guard") / "raw"
    synth.write_cohort(root, patients=1, sections_per_patient=2)
    return list(her2st.read(root))


@pytest.fixture(scope="module")
def real_sections(her2st_root: Path, data_root: Path) -> list[AnnData]:
    """All measured sections with an image that are at hand."""
    sections = list(her2st.read(her2st_root, ["B4", "C2", "C3", "C4", "C5"]))
    return sections + list(st_tables.read(data_root / "mob_stutility"))


def test_clean_sections_raise_no_alarm(cohort: list[AnnData]) -> None:
    for section in cohort:
        assert check_section(section, slide_of(section)) == []


def test_a_mirrored_section_is_told_with_the_way_back(cohort: list[AnnData]) -> None:
    section, slide = cohort[0], slide_of(cohort[0])
    (finding,) = check_section(moved(section, wrong_positions(section, slide)["mirrored in x"]), slide)
    assert finding.kind == "place"
    assert "better with the slide mirrored left to right (" in finding.message


def test_counts_that_follow_nothing_raise_no_alarm(cohort: list[AnnData]) -> None:
    """Shuffled over the spots, counts agree with no position: there is nothing to be told from them."""
    section = cohort[0].copy()
    section.layers["counts"] = section.layers["counts"][np.random.default_rng(0).permutation(section.n_obs)]
    assert check_section(section, slide_of(section)) == []


def test_pitch_scale_and_spots_outside_are_each_told(cohort: list[AnnData]) -> None:
    section, slide = cohort[0], slide_of(cohort[0])
    mpp = section.uns["hifusion"]["mpp"]
    kinds = [finding.kind for finding in check_section(moved(section, section.obsm["spatial"], mpp * 2), slide)]
    assert "pitch" in kinds
    kinds = [finding.kind for finding in check_section(section, Slide(slide.path, mpp=mpp * 1.5))]
    assert kinds == ["scale"]
    kinds = [finding.kind for finding in check_section(moved(section, section.obsm["spatial"] * 2, mpp / 2), slide)]
    assert "outside" in kinds


def test_an_alarm_is_one_line_with_a_picture_and_force_goes_on(cohort: list[AnnData], tmp_path: Path) -> None:
    section, slide = cohort[0], slide_of(cohort[0])
    wrong = moved(section, wrong_positions(section, slide)["mirrored in y"])
    picture = tmp_path / "checks" / "A1.png"
    with refused("positions do not seem to fit", "mirrored top to bottom", str(picture), "--force"):
        require_geometry(wrong, slide, picture=picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    require_geometry(wrong, slide, force=True, picture=picture)
    assert picture.exists()
    require_geometry(section, slide, picture=tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_prepare_refuses_before_the_store_is_built(cohort: list[AnnData], tmp_path: Path) -> None:
    """Imported, moved, prepared: refused; the picture stays; with force it is built, in the same folder."""
    section = cohort[0]
    wrong = wrong_positions(section, slide_of(section))["mirrored in x"]
    write_section(moved(section, wrong), tmp_path / "sections" / "A1.h5ad")
    with refused("positions do not seem to fit"):
        api.prepare(tmp_path / "sections", tmp_path / "store", recipe="tiny")
    assert [path.name for path in (tmp_path / "store").rglob("*.*")] == ["A1.png"]
    built = api.prepare(tmp_path / "sections", tmp_path / "store", recipe="tiny", force=True)
    assert list(built.manifest["sections"]) == ["A1"]


def test_few_spots_are_not_judged_by_their_counts(cohort: list[AnnData]) -> None:
    section, slide = cohort[0], slide_of(cohort[0])
    few = moved(section, wrong_positions(section, slide)["mirrored in x"])[:50].copy()
    assert check_section(few, slide) == []


def faults(sections: list[AnnData]) -> Iterator[tuple[str, str, list[str]]]:
    """(section, fault, kinds found) of every injected fault."""
    for section in sections:
        slide = slide_of(section)
        for fault, centres in wrong_positions(section, slide).items():
            found = [finding.kind for finding in check_section(moved(section, centres), slide)]
            yield section.uns["hifusion"]["section"], fault, found


@pytest.mark.real
def test_real_sections_raise_no_alarm(real_sections: list[AnnData]) -> None:
    assert len(real_sections) == 9
    for section in real_sections:
        assert check_section(section, slide_of(section)) == [], section.uns["hifusion"]["section"]


@pytest.mark.real
@pytest.mark.slow
def test_at_least_95_percent_of_faults_on_real_sections_are_told(real_sections: list[AnnData]) -> None:
    told = list(faults(real_sections))
    missed = [(section, fault) for section, fault, kinds in told if not kinds]
    assert len(told) == 9 * 21
    assert len(missed) <= 0.05 * len(told), missed


@pytest.mark.real
def test_faults_of_one_real_section_are_told_by_its_counts_alone(real_sections: list[AnnData]) -> None:
    """C5, whose darkness follows its counts least: the place itself is told wrong, not only spots outside."""
    c5 = [section for section in real_sections if section.uns["hifusion"]["section"] == "C5"]
    missed = [fault for _, fault, kinds in faults(c5) if "place" not in kinds]
    assert len(missed) <= 1, missed
