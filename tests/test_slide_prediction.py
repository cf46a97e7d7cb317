"""A run and a slide that was never measured give a folder with a section that other tools open."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fabricate import contents, refused
from hifusion import api, slide_prediction
from hifusion.checkpoint import Run
from hifusion.section import read_section
from hifusion.slide import Slide
from views import PITCH_PX, fit_small

MPP = 5.0
SIZE_PX = (900, 640)
CENTRE_PX, RADIUS_PX = (420, 320), 240


def draw_slide(path: Path) -> Path:
    """One round piece of purple, grainy tissue on glass."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE_PX[1], : SIZE_PX[0]]
    tissue = np.hypot(x - CENTRE_PX[0], y - CENTRE_PX[1]) < RADIUS_PX
    pixels = np.where(tissue[..., None], [150, 80, 150], [240, 236, 240]) + rng.normal(0, 1, (*tissue.shape, 3))
    nuclei = (rng.random((SIZE_PX[1] // 4, SIZE_PX[0] // 4)) < 0.3).repeat(4, axis=0).repeat(4, axis=1)
    pixels[tissue & nuclei] -= 60
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, a slide and its prediction."""
    root = tmp_path_factory.mktemp("slide")
    fit_small(root / "run")
    draw_slide(root / "slide.png")
    api.predict(root / "run", root / "slide.png", root / "out", mpp=MPP)
    return root


def test_the_folder_holds_all_that_its_description_says(folder: Path) -> None:
    named = {line.split()[0] for line in (slide_prediction.__doc__ or "").splitlines() if line.startswith("    ")}
    assert {path.name for path in (folder / "out").iterdir()} == named
    for name in ("overlay.png", "maps.png", "novelty.png", "tissue.png"):
        with Image.open(folder / "out" / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 1, name


def test_spots_lie_on_the_tissue_at_the_training_pitch(folder: Path) -> None:
    predicted = read_section(folder / "out" / "section.h5ad")
    centres = predicted.obsm["spatial"]
    from_middle = np.hypot(*(centres - CENTRE_PX).T)
    assert from_middle.max() < RADIUS_PX + PITCH_PX
    expected = np.pi * RADIUS_PX**2 / PITCH_PX**2
    assert predicted.n_obs == pytest.approx(expected, rel=0.15)
    assert np.unique(np.round(np.diff(np.unique(centres[:, 0])), 3)).tolist() == [PITCH_PX]
    assert predicted.uns["hifusion"]["pitch_um"] == pytest.approx(200)
    assert np.isfinite(predicted.X).all()
    assert predicted.obs["novelty"].notna().all()


def test_the_section_says_where_its_picture_lies(folder: Path) -> None:
    predicted = read_section(folder / "out" / "section.h5ad")
    (entry,) = predicted.uns["spatial"].values()
    shrink = entry["scalefactors"]["tissue_hires_scalef"]
    assert entry["images"]["hires"].shape[1] == pytest.approx(SIZE_PX[0] * shrink, abs=1)
    assert Path(predicted.uns["hifusion"]["image"]) == (folder / "slide.png").resolve()


def test_the_table_of_spots_is_that_of_the_section(folder: Path) -> None:
    table = pd.read_csv(folder / "out" / "spots.csv", index_col="spot")
    predicted = read_section(folder / "out" / "section.h5ad")
    assert list(table.index) == list(predicted.obs_names)
    np.testing.assert_allclose(table[["x_px", "y_px"]], predicted.obsm["spatial"])


def test_a_mask_that_was_edited_decides_where_spots_lie(folder: Path, tmp_path: Path) -> None:
    """The left half of the tissue painted black: no spot is left of the middle."""
    with Image.open(folder / "out" / "tissue.png") as image:
        mask = np.array(image)
    mask[:, : mask.shape[1] * CENTRE_PX[0] // SIZE_PX[0]] = 0
    Image.fromarray(mask).save(tmp_path / "mine.png")
    plan = api.plan(folder / "run", folder / "slide.png", mpp=MPP, mask=tmp_path / "mine.png")
    assert 0 < plan.section.n_obs < read_section(folder / "out" / "section.h5ad").n_obs
    assert plan.section.obsm["spatial"][:, 0].min() > CENTRE_PX[0] - PITCH_PX / 2


def test_a_plan_tells_spots_time_and_memory_and_writes_nothing(folder: Path) -> None:
    before = contents(folder)
    facts = api.plan(folder / "run", folder / "slide.png", mpp=MPP).facts
    assert facts["spots"] == read_section(folder / "out" / "section.h5ad").n_obs
    assert facts["spots_per_s"] > 0 and facts["minutes"] >= 0 and facts["memory_gib"] > 0
    assert facts["tissue_mm2"] == pytest.approx(np.pi * (RADIUS_PX * MPP / 1000) ** 2, rel=0.1)
    json.dumps(facts, allow_nan=False)
    assert contents(folder) == before


def test_a_dense_map_has_more_spots_and_is_smoother(folder: Path, tmp_path: Path) -> None:
    """At half the patch's side each position is covered by nine patches, of which it is the mean."""
    dense = api.predict(folder / "run", folder / "slide.png", tmp_path / "dense", mpp=MPP, stride_um=40)
    sparse = read_section(folder / "out" / "section.h5ad")
    assert dense.n_obs == pytest.approx(sparse.n_obs * 25, rel=0.15)
    assert (np.asarray(dense.X).std(axis=0) < sparse.X.std(axis=0)).all()
    facts = json.loads((tmp_path / "dense" / "plan.json").read_text())
    assert facts["averaged_overlaps"] and facts["pitch_um"] == 40


def test_hexagonal_spots_have_six_neighbours(folder: Path) -> None:
    centres = api.plan(folder / "run", folder / "slide.png", mpp=MPP, lattice="hexagonal").section.obsm["spatial"]
    distance = np.hypot(*(centres[:, None] - centres).T)
    assert np.bincount((np.abs(distance - PITCH_PX) < 1).sum(axis=0)).argmax() == 6


def test_a_killed_prediction_goes_on_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    """Killed outright, in another process: the next call makes the same section and leaves nothing else behind."""
    command = (
        "import time; from hifusion import api; told = []\n"
        "def slow(what, done, total): time.sleep(0.2)\n"
        f"api.predict({str(folder / 'run')!r}, {str(folder / 'slide.png')!r}, {str(tmp_path / 'out')!r}, mpp={MPP}, "
        "progress=slow)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob(".section.h5ad.*.rows")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "section.h5ad").exists()
    (rows,) = (tmp_path / "out").glob(".section.h5ad.*.rows")
    assert rows.stat().st_size >= 0
    told: list[int] = []
    api.predict(
        folder / "run", folder / "slide.png", tmp_path / "out", mpp=MPP, progress=lambda *what: told.append(what[1])
    )
    again, whole = (read_section(root / "out" / "section.h5ad") for root in (tmp_path, folder))
    np.testing.assert_array_equal(again.X, whole.X)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_slide_of_unknown_scale_says_how_to_give_it(folder: Path, tmp_path: Path) -> None:
    with refused("slide.png", "--mpp"):
        api.predict(folder / "run", folder / "slide.png", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_slide_without_tissue_is_refused(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((300, 300, 3), 240, np.uint8)).save(tmp_path / "glass.png")
    with refused("glass.png", "tissue"):
        api.predict(folder / "run", tmp_path / "glass.png", tmp_path / "out", mpp=MPP)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with refused("is not empty"):
        api.predict(folder / "run", folder / "slide.png", tmp_path, mpp=MPP)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("stride_um", [0.0, -5.0, 201.0, float("nan")])
def test_a_stride_beyond_the_pitch_is_refused(folder: Path, stride_um: float) -> None:
    with refused("stride_um", "200 um"):
        api.plan(folder / "run", folder / "slide.png", mpp=MPP, stride_um=stride_um)


def test_a_run_that_does_not_know_its_spots_cannot_place_any(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    del facts["spots"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts))
    with refused("does not say how far apart"):
        slide_prediction.plan_slide(Run.open(tmp_path / "run"), folder / "slide.png", mpp=MPP)


def test_options_of_a_slide_are_refused_for_a_section_and_the_other_way(folder: Path, tmp_path: Path) -> None:
    with refused("stride_um: for a slide"):
        api.predict(folder / "run", folder / "out" / "section.h5ad", tmp_path / "x.h5ad", stride_um=50)
    with refused("image: for a section"):
        api.predict(folder / "run", folder / "slide.png", tmp_path / "out", mpp=MPP, image=folder / "slide.png")


def test_a_predicted_section_of_a_slide_is_predicted_again_the_same(folder: Path) -> None:
    """Positions, scale and slide all come back from the file."""
    section = folder / "out" / "section.h5ad"
    np.testing.assert_array_equal(api.predict(folder / "run", section).X, read_section(section).X)
    assert Slide(folder / "slide.png").size_px == SIZE_PX


@pytest.mark.real
@pytest.mark.parametrize(
    ("slide", "mpp"),
    [
        ("wsi/CMU-1-Small-Region.svs", None),
        ("wsi/RationAI-CMU-1-small.tiff", None),
        ("mob_stutility/MOB1.jpg", 4.42),
        ("her2st/data/ST-imgs/C/C3/5714_HE_BT_D1.jpg", 0.69),
    ],
)
def test_a_real_slide_is_predicted_and_scanpy_draws_it_at_once(
    folder: Path, data_root: Path, tmp_path: Path, slide: str, mpp: float | None
) -> None:
    """One gene over the slide's picture; a spot is drawn where its centre lies on the picture."""
    import scanpy as sc

    if not (data_root / slide).exists():
        pytest.skip(f"{data_root / slide} is not there")
    api.predict(folder / "run", data_root / slide, tmp_path / "out", mpp=mpp)
    section = sc.read_h5ad(tmp_path / "out" / "section.h5ad")
    assert section.n_obs > 10
    (axes,) = sc.pl.spatial(section, color=section.var_names[0], show=False)
    (entry,) = section.uns["spatial"].values()
    outlines = [path.vertices for path in axes.collections[0].get_paths()]
    drawn = np.vstack([(outline.min(axis=0) + outline.max(axis=0)) / 2 for outline in outlines])
    expected = section.obsm["spatial"] * entry["scalefactors"]["tissue_hires_scalef"]
    low, high = np.percentile(drawn, [0, 100], axis=0)
    np.testing.assert_allclose([low, high], [expected.min(axis=0), expected.max(axis=0)], atol=2)
