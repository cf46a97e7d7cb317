"""Every network goes through the one training loop: it leaves a run that predicts, resumes and sees what is planted."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from hifusion import api, surroundings
from hifusion.checkpoint import Run, load_tensors
from hifusion.cohort import Cohort, SectionView
from hifusion.configuration import Recipe
from hifusion.encoders import Encoder
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.prediction import predict_section, predict_view
from hifusion.recipes import NETWORKS, recipe_for
from hifusion.store import Store
from hifusion.training import fit, shuffled, split
from test_training import Stopped, assert_same_run, read_log


class Study(NamedTuple):
    """A drawn cohort of patients A and B with two sections each, trained on A1 and B1."""

    store: Store
    cohort: Cohort
    panel: GenePanel
    train: list[SectionView]
    tested: SectionView


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("study")
    api.synthesise(root / "raw", patients=2, sections_per_patient=2, spots_per_side=5, genes=20)
    store = api.prepare(root / "raw", root / "store", recipe="tiny")
    cohort = Cohort.open(store.root)
    panel = cohort.panel("top_mean", 8, ["A1", "B1"])
    *train, tested = cohort.views(["A1", "B1", "A2"], panel, "log_share")
    return Study(store, cohort, panel, train, tested)


def short(name: str, epochs: int = 2) -> Recipe:
    """The tiny preset of a network for so many epochs, on the smallest tile that DenseNet takes."""
    recipe = replace(recipe_for(name, "tiny"), epochs=epochs, batch_size=16)
    return replace(recipe, model=replace(recipe.model, patch_px=32)) if name == "stnet" else recipe


def fit_short(name: str, study: Study, out: Path, **changes) -> Run:
    recipe = changes.pop("recipe", None) or short(name, changes.pop("epochs", 2))
    return fit(recipe, study.panel, study.train, [], out, store=study.store, **changes)


def predicted(run: Run, study: Study) -> np.ndarray:
    return predict_view(run, study.tested, split(run.recipe, study.train, [], run.facts["seed"])[0])


def stop_in_the_second_epoch(what: str, *_: int) -> None:
    """A progress callback."""
    if what.startswith("epoch 2/"):
        raise Stopped


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen encoder of which there is no waiting: mean and spread of each colour of a window."""

    def features(region: torch.Tensor) -> torch.Tensor:
        return torch.cat([its / 50 for its in torch.std_mean(region.float(), (2, 3))], dim=1)

    encoder = Encoder("c0", "colours", 6, (), torch.device("cpu"), features)
    monkeypatch.setattr(surroundings, "load_encoder", lambda _: encoder)


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_leaves_a_complete_run_that_predicts(name, study, tmp_path):
    """Opened again, the run says the same; ST-Net, whose DenseNet is large, trains for one epoch."""
    epochs = 1 if name == "stnet" else 2
    run = fit_short(name, study, tmp_path / "run", epochs=epochs)
    files = {"run.json", "panel.json", "log.csv", "weights.safetensors", "novelty.safetensors", "trust.csv"}
    assert {path.name for path in run.root.iterdir()} == files
    log = read_log(run.root)
    assert len(log) == epochs and all(np.isfinite(float(value)) for row in log for value in row.values())
    again = Run.open(run.root)
    assert (again.recipe.network, again.facts["state"]) == (short(name).network, "complete")
    expression = predicted(run, study)
    assert expression.shape == study.tested.expression.shape and np.isfinite(expression).all()
    np.testing.assert_array_equal(predicted(again, study), expression)


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("name", ["hist2st", "egn", "asign3d", "bleep"])
def test_a_run_stopped_after_an_epoch_resumes_to_the_same_bit_for_bit(name, study, tmp_path):
    whole = fit_short(name, study, tmp_path / "whole").root
    with pytest.raises(Stopped):
        fit_short(name, study, tmp_path / "run", progress=stop_in_the_second_epoch)
    assert (tmp_path / "run" / "last.safetensors").exists()
    assert_same_run(fit_short(name, study, tmp_path / "run", resume=True).root, whole)


def test_shuffled_targets_take_all_that_was_measured_of_a_spot_with_them(study):
    """Counts are targets too, of Hist2ST and of ASIGN's tiles."""
    for before, after in zip(study.train, shuffled(study.train, 0), strict=True):
        order = [int(np.flatnonzero((before.expression == row).all(axis=1))[0]) for row in after.expression]
        assert order != sorted(order)
        np.testing.assert_array_equal(after.counts, before.counts[order])
        np.testing.assert_array_equal(after.total_counts, before.total_counts[order])


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("name", ["histogene", "triplex", "asign2d"])
def test_from_the_slide_a_network_says_what_it_says_from_the_store(name, study, tmp_path):
    """Though it looks at more than patches: all of that is made of positions and pixels."""
    run = fit_short(name, study, tmp_path / "run", epochs=1)
    section = predict_section(run, study.cohort.sections["A2"])
    np.testing.assert_allclose(section.X, predicted(run, study), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("name", ["egn", "asign3d"])
def test_a_slide_alone_is_refused_by_a_network_that_looks_at_training_spots(name, study, tmp_path):
    run = fit_short(name, study, tmp_path / "run", epochs=1)
    with pytest.raises(InputError, match=f"{name} predicts from the measured training spots") as caught:
        predict_section(run, study.cohort.sections["A2"])
    assert "\n" not in str(caught.value)


def test_the_bank_of_bleep_is_the_training_spots(study, tmp_path):
    run = fit_short("bleep", study, tmp_path / "run")
    bank = load_tensors(run.root / "weights.safetensors")[0]["bank_expression"].numpy()
    trained, _ = split(run.recipe, study.train, [], 0)
    np.testing.assert_array_equal(bank, np.concatenate([view.expression[rows] for view, rows in trained]))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the drawn cohort whose expression is what the picture shows: three patients, two sections each."""
    root = tmp_path_factory.mktemp("planted")
    api.synthesise(root / "raw", patients=3, sections_per_patient=2, spots_per_side=10)
    api.prepare(root / "raw", root / "store", recipe="tiny")
    return root / "store"


# Measured: error as a share of the training mean's, and what longer training or a higher rate made of it.
_NOT_AT_TINY_SIZE = {
    "histogene": "1.02; 0.99 after 60 epochs: one linear map of raw pixels, a section a step",
    "hist2st": "1.05; 1.00 after 40 epochs: likewise",
    "asign2d": "1.00, after 20 epochs at 5e-3 too: a ResNet-50 of width 8 with a section a step",
    "asign2d_released": "1.00: the released form does not see the spot's own image",
    "bleep": "1.06: what is looked up is noisier than the mean where images and profiles are hardly aligned",
}
_PLANTED = [
    pytest.param(name, marks=pytest.mark.xfail(reason=_NOT_AT_TINY_SIZE[name])) if name in _NOT_AT_TINY_SIZE else name
    for name in NETWORKS
]


@pytest.mark.slow
@pytest.mark.parametrize("name", _PLANTED)
def test_a_network_beats_the_training_mean_on_what_is_planted(name, planted, tmp_path):
    """On the second section of each patient, trained on the first ones of all."""
    cohort, recipe = Cohort.open(planted), recipe_for(name, "tiny")
    panel = cohort.panel(recipe.panel, recipe.panel_size, ["A1", "B1", "C1"])
    train = cohort.views(["A1", "B1", "C1"], panel, recipe.normalisation)
    run = fit(recipe, panel, train, [], tmp_path / "run", store=cohort.store)
    trained, _ = split(recipe, train, [], 0)
    won = []
    for view in cohort.views(["A2", "B2", "C2"], panel, recipe.normalisation):
        error, floor = (
            np.square(said - view.expression).mean() for said in (predict_view(run, view, trained), run.train_mean)
        )
        won.append(error / floor)
    assert np.mean(won) < 0.95
