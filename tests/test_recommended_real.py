"""The recommended recipe on real sections: what README and docs/results.md say of it, in one seed."""

from pathlib import Path

import numpy as np
import pytest

from hifusion import api
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort
from hifusion.trust import OFFSETS

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_offsets_that_were_never_seen_are_as_large_as_other_patients_say(her2st_root: Path) -> None:
    """On counts of the patients without an image here: twice the variance of means, in units of that within sections.

    Their sections and patients differ (the median over patients of .06, and 1.1): the figures are rounded.
    """
    cohort = Cohort.open(her2st_root)
    patient_of = {info.name: info.patient for info in cohort.infos if info.patient not in "BC"}
    panel = cohort.panel("top_mean", 250, list(patient_of))
    views = cohort.views(list(patient_of), panel, "log_share")
    within = {view.name: view.expression.var(axis=0).mean() for view in views}
    of_patient: dict[str, list[np.ndarray]] = {}
    for view in views:
        of_patient.setdefault(view.patient, []).append(view.expression.mean(axis=0))
    between = [
        np.var(means, axis=0, ddof=1).mean() / np.mean([within[its] for its in within if patient_of[its] == patient])
        for patient, means in of_patient.items()
    ]
    assert OFFSETS["known"] == pytest.approx(2 * np.median(between), rel=0.2)
    means = [np.mean(its, axis=0) for its in of_patient.values()]
    patients = np.var(means, axis=0, ddof=1).mean() / np.mean(list(within.values()))
    assert OFFSETS["new"] == pytest.approx(2 * patients, rel=0.2)


def test_it_stands_before_every_simple_rival_and_covers_what_it_says(her2st_root: Path, tmp_path: Path) -> None:
    """Trained on C2, tested on C3 and C4; and a run of C2 is red and humble on patient B."""
    api.prepare(her2st_root, tmp_path / "store", recipe="quick", sections=["B4", "C2", "C3", "C4"])
    found = api.evaluate(
        tmp_path / "store",
        tmp_path / "out",
        protocol="first_section",
        sections=["C2", "C3", "C4"],
        recipe="recommended",
        with_shuffled=False,
    )["models"]
    own = found.pop("hifusion")
    rivals = [its for its in found.values() if not its["oracle"]]
    assert own["mse"] < min(its["mse"] for its in rivals) - 0.01
    for score in ("pcc_per_gene_mean", "pcc_per_gene_median"):
        assert own[score] > max(its[score] for its in rivals) + 0.03
    assert 0.87 < own["coverage_90"] < 0.94
    run = Run.open(tmp_path / "out" / "runs" / "C" / "hifusion-seed0")
    new = api.predict(run.root, tmp_path / "store" / "sections" / "B4.h5ad")
    assert set(new.var["trust"]) == {"red"}
    measured = new.layers["measured"]
    assert np.square(new.X - measured).mean() < 1.02 * np.square(run.train_mean - measured).mean()
    assert (new.obs["novelty"] > 1).mean() > 0.1
