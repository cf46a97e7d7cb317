"""The recommended network: fitted on a frozen trunk, it finds what is planted and says how far it can be relied on."""

import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from hifusion import api, features, slide_prediction, trust_card
from hifusion.appearance import appearance, context
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort, SectionView
from hifusion.configuration import Recipe
from hifusion.encoders import load_encoder
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.inference import SpotOutputs
from hifusion.metrics import pcc_per_gene
from hifusion.models.frozen import FrozenConfig, FrozenHead, FrozenHiFusion, HeadOutput, head_loss
from hifusion.prediction import bytes_a_spot, predict_all, predict_section, predict_view, run_surroundings
from hifusion.recipes import recipe
from hifusion.section import read_section
from hifusion.training import fit

# The recipe made small: an untrained ResNet for a trunk, whose features still tell the drawn tissue's colours apart.
SMALL = recipe(
    "recommended",
    overrides=[
        "encoder=resnet18",
        "model.grids=[1,2]",
        "model.windows=[[96,96],[64,96]]",
        "model.radii_um=[300]",
        "model.spot_px=48",
        "model.region_px=96",
        "model.steps=15",
        "model.members=1",
        "model.components=8",
    ],
)


class Study(NamedTuple):
    root: Path
    cohort: Cohort
    panel: GenePanel
    views: dict[str, SectionView]
    recipe: Recipe


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Patients A, B and C with two drawn sections each, seen at the scale they were drawn at."""
    root = tmp_path_factory.mktemp("frozen")
    api.synthesise(root / "raw", patients=3, sections_per_patient=2, spots_per_side=8, genes=20)
    store = api.prepare(root / "raw", root / "store", recipe="tiny")
    cohort = Cohort.open(store.root)
    panel = cohort.panel("top_mean", 12, ["A1", "A2"])
    views = {view.name: view for view in cohort.views(list(cohort.sections), panel, "log_share")}
    return Study(root, cohort, panel, views, replace(SMALL, region_mpp=views["A1"].mpp))


def fitted(study: Study, names: str, out: str, **changes) -> Run:
    train = [study.views[name] for name in names.split()]
    its = changes.pop("recipe", study.recipe)
    return fit(its, study.panel, train, [], study.root / out, store=None, resume=True, **changes)


@pytest.fixture(scope="module")
def one(study: Study) -> Run:
    return fitted(study, "A1", "one")


@pytest.fixture(scope="module")
def several(study: Study) -> Run:
    return fitted(study, "A1 A2 B1 B2", "several")


def said(run: Run, view: SectionView) -> SpotOutputs:
    return predict_all(run.network(torch.device("cpu")), run_surroundings(run), view, "32-true")


def skill(run: Run, view: SectionView) -> float:
    return float(np.nan_to_num(pcc_per_gene(predict_view(run, view), view.expression)).mean())


def test_it_finds_the_planted_signal_on_another_section_and_none_in_shuffled_targets(study: Study, one: Run) -> None:
    null = fitted(study, "A1", "shuffled", shuffle_targets=True)
    assert skill(one, study.views["A2"]) > 0.4
    assert abs(skill(null, study.views["A2"])) < 0.15
    assert null.facts["shuffled"] and null.id != one.id


def test_a_run_is_whole_says_what_was_chosen_and_is_the_same_with_the_same_seed(study: Study, one: Run) -> None:
    again = fitted(study, "A1", "again")
    assert again.facts["head_share"] == 0.3 and again.facts["strength_in_new_patients"] == 0.5  # nothing tells them
    view = study.views["A2"]
    np.testing.assert_array_equal(predict_view(again, view), predict_view(one, view))
    assert not np.array_equal(predict_view(fitted(study, "A1", "other", seed=1), view), predict_view(one, view))
    with pytest.raises(InputError, match="--resume"):
        fit(study.recipe, study.panel, [view], [], study.root / "one", store=None)


def test_shares_are_told_by_what_is_left_out_where_there_is_something(several: Run, one: Run) -> None:
    assert several.facts["head_share"] != 0.3 and 0 <= several.facts["head_share"] <= 1
    assert 0 < several.facts["strength_in_new_patients"] <= 1
    assert "trust_new_patient" in pd.read_csv(several.root / trust_card.FILE)
    assert "trust_new_patient" not in pd.read_csv(one.root / trust_card.FILE)


def test_a_new_patient_gets_shrunk_deviations_wider_intervals_and_a_red_card(study: Study, one: Run) -> None:
    view, stranger = study.views["A2"], replace(study.views["A2"], patient="Z")
    own, other = said(one, view), said(one, stranger)
    offset = one.network(torch.device("cpu")).offset.numpy()
    assert np.abs(other.expression - offset).mean() < 0.8 * np.abs(own.expression - offset).mean()
    assert (other.upper - other.lower).mean() > 1.3 * (own.upper - own.lower).mean()
    card = one.trust(known_patient=False)
    assert set(card["trust"]) == {"red"} and card["pcc_per_gene"].isna().all()
    assert one.trust()["pcc_per_gene"].notna().all()


def test_intervals_cover_about_what_they_say_on_a_section_of_the_same_tumour(study: Study, several: Run) -> None:
    fresh = fitted(study, "A1 B1 B2", "fresh")
    outputs, measured = said(fresh, study.views["A2"]), study.views["A2"].expression
    inside = (measured >= outputs.lower) & (measured <= outputs.upper)
    assert 0.8 < inside.mean() < 0.99
    assert (outputs.lower < outputs.upper).all()
    assert several.trust()["coverage_90"].between(0.75, 1).all()


def test_places_lie_in_the_frame_of_the_patients_first_section(study: Study, several: Run) -> None:
    frames = several.frames
    assert frames.sections[0].patient == "A" and {"A", "B"} == {v.patient for v in frames.sections}
    first = study.views["A1"]
    np.testing.assert_allclose(frames.place(first), first.centres_px * first.mpp, atol=0.1)
    assert (frames.place(study.views["C1"]) < -1e6).all()  # a patient without a frame lies nowhere
    assert (frames.place(replace(first, patient="")) < -1e6).all()


def test_predicted_files_hold_intervals_and_what_to_expect_of_each_gene(study: Study, one: Run) -> None:
    section = study.root / "store" / "sections" / "A2.h5ad"
    predicted = api.predict(one.root, section, study.root / "A2.h5ad")
    np.testing.assert_allclose(predicted.X, predict_view(one, study.views["A2"]), atol=2e-3)
    kept = read_section(study.root / "A2.h5ad")
    assert {"lower_90", "upper_90", "measured"} <= set(kept.layers)
    assert set(kept.var["trust"]) <= {"green", "amber", "red"}
    np.testing.assert_allclose(kept.var["expected_pcc_per_gene"], one.trust().loc[kept.var_names, "pcc_per_gene"])
    assert (kept.obs["novelty"] > 0).all()


def test_a_prediction_that_was_stopped_while_it_looked_goes_on_from_there(
    study: Study, one: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third piece of 16 spots: two are kept, only the rest is looked at again, nothing stays behind."""
    monkeypatch.setattr(features, "PIECE", 16)
    section, out, told = study.cohort.sections["A2"], tmp_path / "A2.h5ad", []

    def stop(what: str, done: int, total: int) -> None:
        told.append(done)
        if done > 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_section(one, section, out=out, progress=stop)
    assert told[-1] == 40 and not out.exists()
    told.clear()
    predicted = predict_section(one, section, out=out, progress=lambda what, done, total: told.append(done))
    assert told[0] == 40  # in batches of 8
    np.testing.assert_array_equal(predicted.X, predict_section(one, section).X)
    assert [path.name for path in tmp_path.iterdir()] == ["A2.h5ad"]


def test_a_plan_times_more_than_one_batch_and_counts_what_is_held(study: Study, one: Run) -> None:
    """The features of all batches are made before the first: its time alone, or the second's, would tell nothing."""
    section = study.cohort.sections["A2"]
    small = replace(one, recipe=replace(one.recipe, batch_size=16))
    started = time.perf_counter()
    predict_section(small, section)
    seconds = time.perf_counter() - started
    rate = slide_prediction._spots_per_second(small, section, False, False, 0)
    assert section.n_obs / seconds / 10 < rate < section.n_obs / seconds * 10  # it was a hundred times too fast
    held, kept = bytes_a_spot(one)
    config = one.recipe.model
    assert kept == 4 * (config.channels * (2 * 4 + 2 * 2) + 42) and held > kept


def test_info_shows_the_card_in_short(one: Run) -> None:
    facts = api.info(one.root)
    assert sum(facts["trust"].values()) == 12 and facts["trust_in_new_patients"]["red"] == 12
    assert facts["network"] == "hifusion_frozen" and len(facts["most_trusted"]) == 10
    assert "best_epoch" not in facts and facts["head_share"] == 0.3
    assert "epoch" not in repr(one)


def test_what_has_no_meaning_for_a_frozen_trunk_is_refused(study: Study, one: Run) -> None:
    section = study.root / "store" / "sections" / "A2.h5ad"
    for asked in ({"int8": True}, {"average_symmetries": True}):
        with pytest.raises(InputError, match="frozen trunk"):
            api.predict(one.root, section, **asked)
    for asked in ({"device_count": 2}, {"recompute": True}):
        with pytest.raises(InputError, match="fitted at once"):
            fit(study.recipe, study.panel, [study.views["A1"]], [], study.root / "no", store=None, **asked)
    with pytest.raises(InputError, match="epochs is unknown"):
        recipe("recommended", overrides=["epochs=3"])
    with pytest.raises(InputError, match="has no slide"):
        fit(study.recipe, study.panel, [replace(study.views["A1"], image=None)], [], study.root / "no", store=None)
    assert not (study.root / "no" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"grids": (3,)}, "grids"),
        ({"windows": ((8, 8),)}, "windows"),
        ({"region_px": 100}, "region_px"),
        ({"heads": 5}, "heads"),
        ({"head_share": 1.5}, "head_share"),
        ({"mixup": -1.0}, "mixup"),
        ({"place_um": 0.0}, "place_um"),
        ({"dropout": 1.0}, "dropout"),
        ({"steps": 0}, "steps"),
    ],
)
def test_impossible_configurations_are_refused_by_name(changes: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        FrozenConfig(n_genes=5, **changes)


def test_a_network_that_was_not_fitted_says_so() -> None:
    config = replace(SMALL.model, n_genes=3, channels=8)
    network, wide = FrozenHiFusion(config), config.features
    with pytest.raises(InputError, match="not fitted"):
        network(
            torch.empty(2, 3, 0, 0),
            whole=torch.zeros(2, wide),
            levels=torch.zeros(2, 2, 4, 8),
            context=torch.zeros(2, 2, wide),
            place=torch.zeros(2, 2),
            patient_known=torch.ones(2, dtype=torch.bool),
        )


@pytest.mark.parametrize("windows, attention", [(((96, 96),), True), ((), True), (((96, 96),), False)])
def test_a_head_starts_at_the_mean_and_learns_with_and_without_windows_and_attention(windows, attention) -> None:
    config = replace(SMALL.model, n_genes=3, channels=8, windows=windows, attention=attention, dropout=0.0)
    torch.manual_seed(0)
    head = FrozenHead(config)
    given = {
        "levels": torch.randn(16, 2, 4, 8),
        "around": torch.randn(16, 16 * len(windows)),
        "statistics": torch.randn(16, 84),
    }
    assert not head(**given).components.any()
    target, optimiser = given["levels"].mean((1, 2)), torch.optim.Adam(head.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = head_loss(head(**given), target, torch.ones(16), 0.1, 1.0)["total"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_terms_of_the_loss_are_those_of_hifusion() -> None:
    """By hand: spots weighed 2 and 0; one level off by 1 from the first, so that alignment is its weight."""
    levels = torch.zeros(2, 2, 4, 3)
    levels[1] = 1.0
    output = HeadOutput(torch.tensor([[1.0], [5.0]]), torch.tensor([[[3.0], [0.0]], [[1.0], [0.0]]]), levels)
    terms = head_loss(output, torch.zeros(2, 1), torch.tensor([2.0, 0.0]), 0.1, 0.5)
    assert float(terms["final"]) == pytest.approx(1.0)
    assert float(terms["levels"]) == pytest.approx(0.5 * (2 * 9 + 2 * 1) / 4)
    assert float(terms["align"]) == pytest.approx(0.1)
    assert float(terms["total"]) == pytest.approx(sum(float(terms[name]) for name in ("final", "levels", "align")))


def test_appearance_does_not_depend_on_what_else_is_looked_at_and_is_kept(study: Study) -> None:
    view, encoder = study.views["A1"], load_encoder("resnet18")
    seen = appearance(view, encoder, study.recipe.model, view.mpp)
    some = replace(view, centres_px=view.centres_px[5:7], cache=None)
    alone = appearance(some, encoder, study.recipe.model, view.mpp)
    np.testing.assert_allclose(alone.whole, seen.whole[5:7], rtol=1e-3, atol=1e-4)
    assert seen.levels.shape[1:3] == (2, 4)
    np.testing.assert_allclose(seen.whole[:, : seen.levels.shape[-1]], seen.levels[:, 0].mean(1), rtol=1e-4, atol=1e-5)
    gone = replace(view, image=study.root / "gone.jpg")
    np.testing.assert_array_equal(appearance(gone, encoder, study.recipe.model, view.mpp).whole, seen.whole)


def test_context_is_standard_within_the_section_and_smooths_with_distance(study: Study) -> None:
    view = study.views["A1"]
    values = np.random.default_rng(0).normal(5, 3, (len(view.centres_px), 4))
    found = context(view, values, (1.0, 1e6))
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(found[:, 0].std(axis=0), 1, rtol=1e-4)
    np.testing.assert_allclose(found[:, 1], found[:, 0], atol=1e-4)  # no neighbour within three um
