"""What is compared with what: leaks refused, what cannot run named, and what makes a finished job another one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabricate import refused, write_her2st
from hifusion import api, contest, protocols
from hifusion.cohort import Cohort
from hifusion.contest import SHUFFLED, Contest, Job
from hifusion.inference import SpotOutputs
from hifusion.protocols import Fold, Protocol
from hifusion.recipes import recipe_for, recipes_for
from hifusion.simple_models import SIMPLE

SMALL = (
    "panel_size=10",
    "epochs=1",
    "hist2st:model.piece_px=8",
    *(f"{name}:model.patch_px=32" for name in ("histogene", "hist2st", "asign3d")),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sections A1, A2 and B1 with images, B2 of counts alone."""
    root = tmp_path_factory.mktemp("contest")
    api.prepare(write_her2st(root / "raw"), root / "store", recipe="tiny", region_px=32)
    return root / "store"


@pytest.fixture
def cohort(store: Path) -> Cohort:
    """Opened for one test, which may change it."""
    return Cohort.open(store, ["A1", "A2", "B1"])


def plan(
    cohort: Cohort,
    protocol: str = "first_section",
    models: tuple[str, ...] = ("histogene",),
    overrides: tuple[str, ...] = (),
    panel: str = "top_mean",
    **changes: Any,
) -> Contest:
    overrides = (*SMALL, *overrides)
    base = replace(recipe_for("hifusion", "tiny", None, overrides), panel=panel)
    return Contest.plan(cohort, protocol, models, recipes_for(models, "tiny", None, overrides), base=base, **changes)


BETWEEN = "leave_one_patient_out"
NULL: dict[str, Any] = {"models": ("train_mean",), "with_nulls": False}


def test_counts_under_another_name_and_patient_are_refused_as_a_leak(cohort):
    cohort.sections["B1"].layers["counts"] = cohort.sections["A1"].layers["counts"].copy()
    with refused("A1", "B1", "same counts"):
        plan(cohort, BETWEEN, **NULL)
    assert plan(cohort, BETWEEN, **NULL, leak_check=False).leak_check is False


def test_an_image_under_another_name_and_patient_is_refused_as_a_leak(cohort):
    stored = cohort.store.manifest["sections"]
    stored["B1"]["image"] = stored["A1"]["image"]
    with refused("A1", "B1", "same image"):
        plan(cohort, BETWEEN, **NULL)


def test_a_section_twice_within_a_patient_is_a_leak_too(cohort):
    cohort.sections["A2"].layers["counts"] = cohort.sections["A1"].layers["counts"].copy()
    with refused("A1", "A2", "same counts"):
        plan(cohort, "first_section", **NULL)


def test_a_patient_on_both_sides_is_refused_where_the_protocol_is_between_patients(cohort, monkeypatch):
    folds = [Fold("A", ("A1", "B1"), (), ("A2",))]
    monkeypatch.setitem(protocols.PROTOCOLS, "leaky", Protocol(lambda _: folds, False, ""))
    monkeypatch.setitem(protocols.PROTOCOLS, "within", Protocol(lambda _: folds, True, ""))
    with refused("patient A is trained and tested on"):
        plan(cohort, "leaky", **NULL)
    assert plan(cohort, "within", **NULL).folds == folds


def test_what_carries_a_patients_expression_over_is_not_run_between_patients(cohort):
    found = plan(cohort, BETWEEN, ("histogene", "asign3d"), with_shuffled=True)
    for name in ("asign3d", "neighbour_section"):
        assert "no section of the tested patient is measured" in found.not_run[name]
    planned = [job.model for job in found.jobs]
    assert planned == [*(name for name in SIMPLE if name != "neighbour_section"), SHUFFLED, "histogene"]
    assert set(found.recipes) == {"histogene"}


def test_a_network_that_is_not_run_gives_no_shuffled_null(cohort):
    found = plan(cohort, BETWEEN, ("asign3d", "histogene"))
    shuffled = next(job for job in found.jobs if job.model == SHUFFLED)
    assert found.recipe_of(shuffled).network == "histogene"
    assert SHUFFLED not in [job.model for job in plan(cohort, BETWEEN, ("asign3d",)).jobs]


def test_within_patients_all_are_run(cohort):
    found = plan(cohort, "first_section", ("histogene", "asign3d"))
    assert found.not_run == {}
    assert [job.model for job in found.jobs] == [*SIMPLE, SHUFFLED, "histogene", "asign3d"]


def test_seeds_are_of_networks_and_the_shuffled_null_has_the_first(cohort):
    labels = [job.label for job in plan(cohort, seeds=(3, 5)).jobs]
    assert labels == [*SIMPLE, "shuffled-seed3", "histogene-seed3", "histogene-seed5"]


def key_of(its: Contest, job: Job = Job("histogene", 0)) -> str:  # noqa: B008
    return its.key(job, its.folds[0])


def _other_counts(cohort: Cohort) -> None:
    cohort.sections["A2"].layers["counts"].data[0] += 1


def _other_image(cohort: Cohort) -> None:
    cohort.store.manifest["sections"]["A1"]["image"] = "0" * 64


def _moved(cohort: Cohort) -> None:
    cohort.sections["A1"].obsm["spatial"] = cohort.sections["A1"].obsm["spatial"] + 1


@pytest.mark.parametrize("change", [_other_counts, _other_image, _moved])
def test_another_section_is_another_job(cohort: Cohort, change: Callable[[Cohort], None]):
    before = key_of(plan(cohort))
    change(cohort)
    assert key_of(plan(cohort)) != before


@pytest.mark.parametrize(
    "changes",
    [
        {"overrides": ("histogene:lr=0.1",)},
        {"overrides": ("histogene:model.layers=2",)},
        {"overrides": ("panel_size=9",)},
        {"panel": "highly_variable"},
        {"overrides": ("normalisation=log1p_cpm",)},
        {"protocol": BETWEEN},
    ],
    ids=str,
)
def test_another_recipe_panel_or_fold_is_another_job(cohort, changes):
    assert key_of(plan(cohort, **changes)) != key_of(plan(cohort))


def test_another_seed_or_model_is_another_job(cohort):
    found = plan(cohort, models=("histogene", "hist2st"), seeds=(0, 1), with_test_epoch=True)
    keys = [key_of(found, job) for job in found.jobs]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"models": ("hist2st", "histogene")},
        {"seeds": (4, 0)},
        {"with_nulls": False},
        {"with_test_epoch": True},
        {"leak_check": False},
        {"overrides": ("hist2st:lr=0.1",)},
    ],
    ids=str,
)
def test_what_else_is_compared_changes_no_job(cohort, changes):
    assert key_of(plan(cohort, **changes)) == key_of(plan(cohort))


def test_sections_of_other_folds_change_no_job(cohort):
    before = key_of(plan(cohort))
    cohort.sections["B1"].layers["counts"].data[0] += 1
    assert key_of(plan(cohort)) == before


def test_the_shuffled_null_looks_up_what_it_was_trained_on(cohort, tmp_path, monkeypatch):
    """Training spots that a network is given to predict carry the profiles that were dealt out, not their own."""
    its = plan(cohort)
    fold, given = its.folds[0], []

    def predict(network: Any, surroundings: Any, view: Any, *_: Any) -> SpotOutputs:
        given.append(surroundings.train)
        return SpotOutputs(np.zeros_like(view.expression), np.zeros((len(view.expression), 1), dtype=np.float32))

    monkeypatch.setattr(contest, "predict_all", predict)
    for job in (Job(SHUFFLED, 0), Job("histogene", 0)):
        its.run(job, fold, tmp_path)
    measured = its.data_of(fold).fitted_on[0].expression
    (dealt, _), (own, _) = given[0][0], given[-1][0]
    assert np.array_equal(own.expression, measured)
    assert not np.array_equal(dealt.expression, measured)
    assert sorted(map(tuple, dealt.expression)) == sorted(map(tuple, measured))


def test_a_run_of_other_measurements_is_not_taken_for_this_one(cohort, tmp_path):
    """The store was made anew with other counts: the finished run of its folder is refused, not predicted with."""
    its = plan(cohort)
    its.run(Job("histogene", 0), its.folds[0], tmp_path)
    cohort.sections["A1"].layers["counts"].data *= 2
    again = plan(cohort)
    with refused("differs in data", "another folder"):
        again.run(Job("histogene", 0), again.folds[0], tmp_path)
