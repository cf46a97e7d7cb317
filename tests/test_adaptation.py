"""A run adapted to measured spots: what is planted is found, what so few spots cannot tell is left alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hifusion import api
from hifusion.adaptation import chosen_spots, fit_adapter
from hifusion.checkpoint import Run
from hifusion.errors import InputError
from hifusion.section import read_section


def tissue(spots: int = 200, genes: int = 30, seed: int = 0) -> np.ndarray:
    """Predictions of three patterns."""
    random = np.random.default_rng(seed)
    return random.normal(size=(spots, 3)) @ random.normal(size=(3, genes)) + random.normal(size=genes)


def test_a_planted_offset_and_strength_are_found_from_fifty_spots():
    predicted = tissue()
    truth = predicted.mean(axis=0) + 2 * (predicted - predicted.mean(axis=0)) + np.linspace(-3, 3, 30)
    measured = truth + 0.3 * np.random.default_rng(1).normal(size=truth.shape)
    rows = np.arange(0, 200, 4)
    adapted = predicted + fit_adapter(predicted, measured, rows).change(predicted)
    rest = np.setdiff1d(np.arange(200), rows)
    before, after = (np.square(its - truth)[rest].mean() for its in (predicted, adapted))
    assert after < 0.02 * before


@given(st.integers(0, 1000))
def test_where_nothing_was_missed_next_to_nothing_is_changed(seed: int):
    predicted = tissue(seed=seed)
    measured = predicted + np.random.default_rng(seed).normal(size=predicted.shape)
    change = fit_adapter(predicted, measured, np.arange(50)).change(predicted)
    assert np.square(change).mean() < 0.12  # of noise of variance 1


@given(st.integers(2, 60), st.integers(0, 100))
def test_chosen_spots_are_so_many_different_ones_spread_over_the_section(count: int, seed: int):
    centres = np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), axis=-1).reshape(-1, 2)
    rows = chosen_spots(centres, count, seed)
    assert len(set(rows.tolist())) == count
    distance = np.linalg.norm(centres[:, None] - centres[rows][None], axis=2).min(axis=1)
    assert distance.max() <= 2 * 10 / np.sqrt(count) + 1


def test_too_few_spots_are_refused():
    with pytest.raises(InputError, match="at least 10"):
        fit_adapter(tissue(), tissue(), np.arange(9))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapt")
    api.synthesise(root / "raw", patients=2, sections_per_patient=1, spots_per_side=8, genes=20)
    api.prepare(root / "raw", root / "store", recipe="tiny")
    changes = ["panel_size=10", "epochs=4", "batch_size=16"]
    api.train(root / "store", root / "run", recipe="tiny", overrides=changes, sections=["A1"])
    return root


def test_an_adapted_run_predicts_the_other_patient_better_and_says_by_how_much(study: Path):
    section = study / "store" / "sections" / "B1.h5ad"
    gain = api.adapt(study / "run", section, study / "adapted", spots=20)
    assert gain["mse_after"] < gain["mse_before"]
    assert gain["spots"] == 20 and gain["scored_on"] == read_section(section).n_obs - 20
    run, plain = Run.open(study / "adapted"), Run.open(study / "run")
    assert run.id != plain.id and plain.adapter is None
    assert run.facts["adapted_to"] == gain and json.loads((study / "adapted" / "run.json").read_text())["adapted_from"]
    before, after = (api.predict(its.root, section) for its in (plain, run))
    change = run.adapter.change(np.asarray(before.X))
    np.testing.assert_allclose(after.X, before.X + change, atol=1e-4)
    errors = [np.square(np.asarray(its.X) - its.layers["measured"]).mean() for its in (before, after)]
    assert errors[1] < errors[0]
    assert api.info(run.root)["adapted_to"]["section"] == "B1"


def test_all_spots_are_scored_left_out_in_blocks(study: Path):
    section = study / "store" / "sections" / "B1.h5ad"
    gain = api.adapt(study / "run", section, study / "whole")
    assert gain["spots"] == gain["scored_on"] == read_section(section).n_obs


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"out": "run"}, "is there already"),
        ({"spots": 5}, "at least 10"),
        ({"spots": 1000}, "leaves none"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(study: Path, changes: dict, words: str):
    out = study / changes.pop("out", "new")
    there = out.exists()
    with pytest.raises(InputError, match=words):
        api.adapt(study / "run", study / "store" / "sections" / "B1.h5ad", out, **changes)
    assert out.exists() == there


def test_an_unmeasured_section_is_refused(study: Path):
    predicted = study / "B1-predicted.h5ad"
    api.predict(study / "run", study / "store" / "sections" / "B1.h5ad", predicted)
    with pytest.raises(InputError, match="no counts"):
        api.adapt(study / "run", predicted, study / "new")
