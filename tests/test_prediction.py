"""A trained run and a section: predictions from the store and from the image, and what goes along with them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hifusion import store, training
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort
from hifusion.errors import InputError
from hifusion.expression import log_share, panel_counts
from hifusion.prediction import as_section, average_overlaps, patch_shrink, predict_section, predict_view
from hifusion.recipes import Recipe
from hifusion.section import build_section, read_section, validate_section, write_section
from views import RECIPE, array_px

GENES = tuple(f"GENE{i}" for i in range(6))
MPP = 5.0
SIDE_PX = 300
SCALES = (None, 8.0)  # native pixels, and 1.6 of them to a patch pixel


def make_section(folder: Path, name: str, spots: int = 20) -> AnnData:
    """A measured section; its outermost regions reach over the edge of its image."""
    rng = np.random.default_rng(list(name.encode()))
    image = folder / f"{name}.png"
    noise = rng.integers(0, 256, (SIDE_PX // 10, SIDE_PX // 10, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(image)
    return build_section(
        sp.csr_matrix(rng.poisson(20, (spots, len(GENES)))),
        genes=GENES,
        spots=[f"spot{i}" for i in range(spots)],
        centres_px=array_px(spots) - 40.0,
        name=name,
        patient=name[0],
        mpp=MPP,
        spot_diameter_um=100.0,
        pitch_um=200.0,
        array_row=np.arange(spots),
        array_col=np.arange(spots),
        image=image,
    )


def recipe_at(mpp: float | None) -> Recipe:
    return replace(RECIPE, region_mpp=mpp, panel_size=4, epochs=1)


@pytest.fixture(scope="module", params=SCALES, ids=["native", "8 um per pixel"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Cohort]:
    """A run trained on A1 and B1 of a store that holds C1 too."""
    folder = tmp_path_factory.mktemp("prediction")
    recipe = recipe_at(request.param)
    sections = [make_section(folder, name) for name in ("A1", "B1", "C1")]
    built = store.prepare(sections, folder / "store", region_px=recipe.model.region_px, mpp=recipe.region_mpp)
    cohort = Cohort.open(built.root)
    return training.train(cohort, recipe, folder / "run", sections=["A1"], validation=["B1"]), cohort


def test_a_prediction_from_the_image_is_the_one_from_the_store_bit_for_bit(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    from_store = predict_view(run, cohort.view("C1", run.panel, run.recipe.normalisation))
    from_image = predict_section(run, cohort.sections["C1"])
    assert from_store.shape == (20, 4) and from_store.dtype == np.float32
    assert np.array_equal(from_image.X, from_store)
    assert from_store.std(axis=0).min() > 0


def test_regions_are_read_at_the_scale_of_the_run(trained: tuple[Run, Cohort]) -> None:
    """The same network on regions of another scale says something else."""
    run, cohort = trained
    other_scale = replace(run, recipe=replace(run.recipe, region_mpp=12.0))
    section = cohort.sections["C1"]
    assert not np.array_equal(predict_section(run, section).X, predict_section(other_scale, section).X)


def test_a_predicted_section_keeps_the_contract_and_says_what_made_it(
    trained: tuple[Run, Cohort], tmp_path: Path
) -> None:
    run, cohort = trained
    section = cohort.sections["C1"]
    predicted = predict_section(run, section)
    validate_section(predicted)
    assert tuple(predicted.var_names) == run.panel.genes
    assert list(predicted.obs_names) == list(section.obs_names)
    assert np.array_equal(predicted.obsm["spatial"], section.obsm["spatial"])
    facts = predicted.uns["hifusion"]
    assert (facts["normalisation"], facts["run"]) == ("log_share", run.id)
    assert facts["panel_digest"] == run.panel.digest
    assert (facts["section"], facts["patient"], facts["mpp"]) == ("C1", "C", MPP)
    assert "counts" not in predicted.layers
    write_section(predicted, tmp_path / "predicted.h5ad")
    assert np.array_equal(read_section(tmp_path / "predicted.h5ad").X, predicted.X)


def test_the_measured_section_is_left_as_it_was_and_goes_along_in_the_runs_unit(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    section = cohort.sections["C1"]
    before = section.copy()
    predicted = predict_section(run, section)
    assert (section.X != before.X).nnz == 0
    assert (section.layers["counts"] != before.layers["counts"]).nnz == 0
    assert section.uns["hifusion"] == before.uns["hifusion"]
    measured = log_share(panel_counts(section, run.panel.genes), np.zeros(0))
    assert np.array_equal(predicted.layers["measured"], measured)
    assert not np.array_equal(predicted.X, predicted.layers["measured"])


def test_a_section_without_counts_or_without_the_genes_is_predicted_alone(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    section = cohort.sections["C1"]
    expected = predict_section(run, section).X
    unmeasured = predict_section(run, section)  # a predicted section has positions and an image, and no counts
    lacking = section[:, [gene for gene in GENES if gene != run.panel.genes[0]]].copy()
    for one in (unmeasured, lacking):
        predicted = predict_section(run, one)
        assert "measured" not in predicted.layers
        assert np.array_equal(predicted.X, expected)


def test_a_simple_models_expression_is_wrapped_the_same_way(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    wrapped = as_section("train_mean", run, cohort.sections["C1"], np.tile(run.train_mean, (20, 1)))
    assert wrapped.uns["hifusion"]["run"] == "train_mean"
    assert np.array_equal(wrapped.X[7], run.train_mean)


def test_an_image_that_is_given_stands_before_the_one_in_the_section(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    other = Path(cohort.sections["A1"].uns["hifusion"]["image"])
    predicted = predict_section(run, cohort.sections["C1"], other)
    assert predicted.uns["hifusion"]["image"] == str(other.resolve())
    assert np.array_equal(predicted.X, predict_section(run, cohort.sections["A1"]).X)  # same positions


def refused(run: Run, section: AnnData, image: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        predict_section(run, section, image)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_image_that_is_missing_or_not_one_is_named(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    run, cohort = trained
    section = cohort.sections["C1"].copy()
    assert "nowhere.png: no such image" in refused(run, section, tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png: not a readable image" in refused(run, section, tmp_path / "text.png")
    section.uns["hifusion"]["image"] = ""
    assert refused(run, section) == "section C1 names no image; give one with --image"


def test_spots_outside_the_image_are_refused(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    section = cohort.sections["C1"].copy()
    section.obsm["spatial"][3] = (SIDE_PX + 5.0, 10.0)
    assert "1 of 20 spots lie outside the 300 x 300 px image" in refused(run, section)


def test_a_counts_only_section_cannot_be_predicted_from_a_store(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    view = replace(cohort.view("C1", run.panel, "log_share"), regions=None)
    with pytest.raises(InputError, match="C1 has no region patches"):
        predict_view(run, view)


def test_progress_tells_spots_done_of_all(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    told: list[tuple[str, int, int]] = []
    predict_section(run, cohort.sections["C1"], progress=lambda *what: told.append(what))
    assert told == [("predict C1", 8, 20), ("predict C1", 16, 20), ("predict C1", 20, 20)]


def test_a_run_is_predicted_in_the_precision_of_its_recipe_not_of_the_machine_that_trained_it(
    trained: tuple[Run, Cohort], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cohort = trained
    used: list[bool] = []
    autocast = torch.autocast

    def watched(device: str, *given: object, enabled: bool = True) -> torch.autocast:
        used.append(enabled)
        return autocast(device, *given, enabled=enabled)  # type: ignore[arg-type]

    monkeypatch.setattr("hifusion.inference.torch.autocast", watched)
    view = cohort.view("C1", run.panel, "log_share")
    predict_view(run, view)
    assert not any(used)
    used.clear()
    predict_view(replace(run, facts={**run.facts, "precision": "bf16-mixed"}), view)
    assert not any(used)
    predict_view(replace(run, recipe=replace(run.recipe, precision="bf16-mixed")), view)
    assert any(used)


def test_training_names_sections_that_cannot_be_used(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    run, cohort = trained
    with pytest.raises(InputError, match="no region patches for Z9; training needs sections with an image"):
        training.train(cohort, run.recipe, tmp_path / "run", sections=["A1", "Z9"])
    with pytest.raises(InputError, match="A1: given for training and for validation"):
        training.train(cohort, run.recipe, tmp_path / "run", sections=["A1", "B1"], validation=["A1"])
    assert not (tmp_path / "run").exists()


def test_training_takes_all_sections_but_those_for_validation(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    _, cohort = trained
    run = training.train(
        cohort, recipe_at(cohort.store.mpp if cohort.store else None), tmp_path / "run", validation=["B1"]
    )
    assert (run.facts["train"], run.facts["validation"]) == (["A1", "C1"], ["B1"])
    assert run.panel.sections == ("A1", "C1", "B1")  # of the sections it may look at, and no other


def test_patches_read_ahead_by_workers_give_the_same_prediction(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    section = cohort.sections["C1"]
    assert np.array_equal(predict_section(run, section, workers=2).X, predict_section(run, section).X)


def test_what_a_worker_cannot_read_is_one_line(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    run, cohort = trained
    image = tmp_path / "cut.png"
    whole = Path(cohort.sections["C1"].uns["hifusion"]["image"]).read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.png: not a readable image") as caught:
        predict_section(run, cohort.sections["C1"], image, workers=1)
    assert "\n" not in str(caught.value)


def test_a_prediction_that_was_stopped_goes_on_and_ends_the_same(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    """Stopped after two of three batches of 8, 8 and 4: only the last is made again, and nothing is left behind."""
    run, cohort = trained
    section, out = cohort.sections["C1"], tmp_path / "C1.h5ad"
    told: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        told.append(done)
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_section(run, section, out=out, progress=stop)
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1
    told.clear()
    predicted = predict_section(run, section, out=out, progress=lambda what, done, total: told.append(done))
    assert told == [20]
    assert np.array_equal(predicted.X, predict_section(run, section).X)
    assert [path.name for path in tmp_path.iterdir()] == ["C1.h5ad"]
    assert np.array_equal(read_section(out).X, predicted.X)


def test_what_was_begun_with_another_setting_is_begun_anew(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    run, cohort = trained

    def stop(what: str, done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_section(run, cohort.sections["C1"], out=tmp_path / "x.h5ad", progress=stop)
    averaged = predict_section(run, cohort.sections["C1"], out=tmp_path / "x.h5ad", average_symmetries=True)
    assert np.array_equal(averaged.X, predict_section(run, cohort.sections["C1"], average_symmetries=True).X)


def test_every_spot_is_told_how_novel_it_is(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    """The spots of B1 chose the epoch and so set the unit: 95 % of them, 19 of 20, are at most 1."""
    run, cohort = trained
    predicted = predict_section(run, cohort.sections["B1"], out=tmp_path / "B1.h5ad")
    novelty = read_section(tmp_path / "B1.h5ad").obs["novelty"].to_numpy()
    assert np.array_equal(novelty, predicted.obs["novelty"])
    assert (novelty <= 1).sum() == 19


def test_a_run_that_kept_no_features_predicts_without_novelty(trained: tuple[Run, Cohort], tmp_path: Path) -> None:
    run, cohort = trained
    shutil.copytree(run.root, tmp_path / "run")
    (tmp_path / "run" / "novelty.safetensors").unlink()
    predicted = predict_section(Run.open(tmp_path / "run"), cohort.sections["C1"])
    assert np.isnan(predicted.obs["novelty"]).all()
    assert np.isfinite(predicted.X).all()


def test_a_section_of_positions_alone_is_predicted_like_the_measured_one(trained: tuple[Run, Cohort]) -> None:
    run, cohort = trained
    measured = cohort.sections["C1"]
    facts = measured.uns["hifusion"]
    positions = build_section(
        None,
        spots=measured.obs_names,
        centres_px=measured.obsm["spatial"],
        name="C1",
        patient="C",
        **{key: facts[key] for key in ("mpp", "spot_diameter_um", "pitch_um")},
        array_row=measured.obs["array_row"],
        array_col=measured.obs["array_col"],
        image=Path(facts["image"]),
    )
    assert positions.n_vars == 0
    assert np.array_equal(predict_section(run, positions).X, predict_section(run, measured).X)


@pytest.mark.parametrize(("times", "native"), [(1.04, True), (2.0, False)])
def test_a_run_of_native_pixels_is_kept_to_the_scale_it_was_trained_at(
    trained: tuple[Run, Cohort], times: float, native: bool
) -> None:
    run, cohort = trained
    section = cohort.sections["C1"].copy()
    section.uns["hifusion"]["mpp"] = MPP * times
    wanted = run.recipe.region_mpp or MPP
    keeps_native = run.recipe.region_mpp is None and native
    assert patch_shrink(run, section) == pytest.approx(1.0 if keeps_native else wanted / (MPP * times))


def test_overlapping_predictions_are_averaged_over_the_squares_that_cover_a_position() -> None:
    """Spots at 0, 10 and 25 with squares of 20: the first two cover each other's centres, the third stands alone."""
    centres = np.array([[0.0, 0], [10, 0], [25, 0]])
    averaged = average_overlaps(np.array([[1.0], [3], [8]], np.float32), centres, side_px=20)
    np.testing.assert_allclose(averaged[:, 0], [2, 2, 8])


@given(seed=st.integers(0, 99), side=st.floats(0.1, 60))
def test_averaging_overlaps_equals_the_plain_mean(seed: int, side: float) -> None:
    rng = np.random.default_rng(seed)
    centres, expression = rng.uniform(0, 50, (30, 2)), rng.normal(size=(30, 3)).astype(np.float32)
    covers = (np.abs(centres[:, None] - centres).max(axis=2) <= side / 2)[..., None]
    expected = (covers * expression).sum(axis=1) / covers.sum(axis=1)
    np.testing.assert_allclose(average_overlaps(expression, centres, side), expected, rtol=0, atol=1e-5)
