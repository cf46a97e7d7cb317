"""Labelled regions: a planted pattern is told apart where it was not learned, a constant and a shuffled one are not."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fabricate import lattice_section, refused
from hifusion import synth
from hifusion.baselines import BASELINES
from hifusion.cohort import Cohort
from hifusion.labels import clustering, label_report, separation
from hifusion.section import predicted_section, write_section

GENES = ("G1", "G2", "G3", "G4")
N, COLUMNS = 72, 12
KINDS = ("invasive cancer", "connective tissue", "adipose tissue")


def regions(n: int = N) -> np.ndarray:
    """Labels of a lattice of twelve columns: three upright bands."""
    return np.array(KINDS, dtype=object)[np.arange(n) % COLUMNS // 4]


def planted(labels: np.ndarray, seed: int = 0, noise: float = 0.3) -> np.ndarray:
    """Expression of four genes, each high in one kind of region, but the last, which is noise."""
    own = np.array([[label == kind for kind in (*KINDS, "none")] for label in labels], dtype=float)
    return (own + np.random.default_rng(seed).normal(0, noise, own.shape)).astype(np.float32)


def row(table: pd.DataFrame, name: str) -> pd.Series:
    return table.set_index("model").loc[name]


def test_a_planted_pattern_is_found_in_groups_left_out_and_nothing_in_noise_or_a_constant():
    labels, groups = np.tile(regions(), 3), np.repeat(["A", "B", "C"], N)
    values = planted(labels)
    shuffled = np.random.default_rng(1).permutation(values)
    table = separation(
        {"measured": values, "constant": np.full((3 * N, 2), -3.3), "shuffled": shuffled}, labels, groups
    )
    assert list(table["model"]) == ["measured", "constant", "shuffled", "majority"]
    assert (table[["n_spots", "n_labels", "n_folds"]] == [3 * N, 3, 3]).all().all()
    assert row(table, "measured")[["balanced_accuracy", "macro_f1", "macro_auc"]].min() > 0.9
    for null in ("constant", "majority"):
        assert row(table, null)["balanced_accuracy"] == pytest.approx(1 / 3)
        assert row(table, null)["macro_auc"] == 0.5
    assert row(table, "shuffled")["balanced_accuracy"] < 0.45
    assert 0.4 < row(table, "shuffled")["macro_auc"] < 0.6


def test_what_only_tells_groups_apart_does_not_tell_labels_apart():
    """Each group has its own level, and one label in three quarters of it: spots dealt out singly would score .75."""
    groups = np.repeat(["A", "B", "C"], N)
    common = np.repeat(KINDS, N).astype(object)
    labels = np.where(np.arange(3 * N) % 4 == 0, np.roll(common, N), common)
    level = np.repeat([0.0, 1.0, 2.0], N)[:, None] + np.random.default_rng(0).normal(0, 0.01, (3 * N, 1))
    assert row(separation({"m": level}, labels, groups), "m")["balanced_accuracy"] < 0.5


def test_the_scores_of_a_null_are_those_counted_by_hand():
    """Two groups of 6 a, 4 b: the majority says a: recall 1 and 0; F1 of a is 2 * .6 / 1.6 = .75."""
    labels = np.array((["a"] * 6 + ["b"] * 4) * 2, dtype=object)
    table = separation({"flat": np.zeros((20, 1))}, labels, np.repeat(["A", "B"], 10))
    majority = row(table, "majority")
    assert majority["balanced_accuracy"] == 0.5
    assert majority["macro_f1"] == pytest.approx(0.375)


def test_spots_that_cannot_be_scored_are_left_out():
    """Without a label, undetermined, of a label with four spots, and of a label that stands in one group."""
    labels, groups = np.tile(regions(), 2), np.repeat(["A", "B"], N)
    labels[:3], labels[3:8], labels[8:10], labels[-2:] = None, "undetermined", "rare", "rare"
    labels[10:20] = "of one group"
    table = separation({"m": planted(labels)}, labels, groups)
    assert row(table, "m")["n_spots"] == 2 * N - 22
    assert row(table, "m")["n_labels"] == 3


def test_clusters_agree_with_planted_regions_section_by_section_and_a_constant_with_nothing():
    labels, sections = np.tile(regions(), 2), np.repeat(["A1", "B1"], N)
    values = planted(labels, noise=0.1) + np.repeat([0.0, 50.0], N)[:, None]
    assert clustering(values, labels, sections) == pytest.approx((1.0, 1.0))
    assert clustering(np.full((2 * N, 3), 7.0), labels, sections) == (0.0, 0.0)
    assert max(np.abs(clustering(np.random.default_rng(2).permutation(values[:N]), labels[:N], sections[:N]))) < 0.15
    assert np.isnan(clustering(values, ["one"] * (2 * N), sections)).all()


@pytest.mark.parametrize(
    "expression, labels, groups, words",
    [
        (np.zeros((4, 2)), ["a"] * 3, ["A"] * 4, ["(4, 2) for 3 labels"]),
        (np.full((4, 2), np.nan), ["a"] * 4, ["A"] * 4, ["finite"]),
        (planted(regions()), regions(), ["A"] * N, ["no two labels stand in two groups"]),
        (planted(regions()), [None] * N, ["A", "B"] * (N // 2), ["no two labels stand in two groups"]),
    ],
)
def test_what_cannot_be_scored_is_refused(expression, labels, groups, words):
    with refused(*words):
        separation({"m": expression}, labels, groups)


def write_evaluation(root: Path, sections: dict[str, np.ndarray | None], genes: dict[str, tuple[str, ...]]) -> Path:
    """Predictions of a good model and of a constant for sections with these labels (None: not labelled)."""
    for name, labels in sections.items():
        measured = lattice_section({gene: np.ones(N, dtype=int) for gene in GENES}, name, COLUMNS)
        if labels is not None:
            measured.obs["label"] = pd.Categorical(labels)
        shown = genes.get(name, GENES)
        values = planted(regions())[:, [GENES.index(gene) for gene in shown]]
        # A patient's own level and scale, as batches have: no label is to be read from it.
        for label, its in (
            ("good-seed0", values * 2 + ord(name[0])),
            ("train_mean", np.full_like(values, ord(name[0]))),
        ):
            made = predicted_section(
                measured, its, genes=shown, normalisation="log_share", panel_digest=name, run=label
            )
            made.layers["measured"] = values
            write_section(made, root / "predictions" / label / f"{name}.h5ad")
    return root


def test_a_report_holds_out_patients_where_two_are_labelled_and_passes_over_sections_without_labels(tmp_path):
    folder = write_evaluation(
        tmp_path, {"A1": regions(), "B1": regions(), "C1": None}, {"B1": GENES[:3], "C1": GENES[3:]}
    )
    table = label_report(folder)
    assert list(table["model"]) == ["measured", "train_mean", "good-seed0", "majority"]
    assert (table["folds"] == "patients").all() and (table["n_folds"] == 2).all()
    assert (table[["n_sections", "n_spots", "n_genes"]] == [2, 2 * N, 3]).all().all()
    assert row(table, "good-seed0")["of_measured"] == pytest.approx(1.0)
    assert row(table, "train_mean")["of_measured"] == pytest.approx(0.0, abs=1e-9)
    assert row(table, "train_mean")["ari"] == row(table, "majority")["nmi"] == 0.0
    pd.testing.assert_frame_equal(pd.read_csv(folder / "labels.csv"), table)


@pytest.mark.parametrize("names, folds, n_folds", [(("A1", "A2"), "sections", 2), (("A1",), "blocks", 8)])
def test_a_report_of_one_patient_holds_out_sections_and_of_one_section_blocks(tmp_path, names, folds, n_folds):
    table = label_report(write_evaluation(tmp_path, dict.fromkeys(names, regions()), {}))
    assert (table["folds"] == folds).all() and (table["n_folds"] == n_folds).all()
    assert row(table, "measured")["balanced_accuracy"] > 0.9 > 0.4 > row(table, "train_mean")["balanced_accuracy"]


def test_a_folder_without_labels_or_predictions_is_refused_and_nothing_is_written(tmp_path):
    with refused("no predictions"):
        label_report(tmp_path)
    with refused("none of its sections is labelled"):
        label_report(write_evaluation(tmp_path, {"A1": None, "B1": np.full(N, "undetermined", dtype=object)}, {}))
    assert not (tmp_path / "labels.csv").exists()


def test_the_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with refused("pip install 'hifusion[labels]'"):
        label_report(tmp_path)


def test_the_synthetic_cohort_measured_is_told_apart_and_its_nulls_are_not(tmp_path):
    """Its genes follow the cell types, so patients left out are labelled well; a constant and the depth say little."""
    synth.write_cohort(
        tmp_path / "raw", patients=2, sections_per_patient=1, spots_per_side=10, pitch_px=40, margin_px=20
    )
    cohort = Cohort.open(tmp_path / "raw")
    panel = cohort.panel("top_mean", 30, list(cohort.sections))
    for view in cohort.views(list(cohort.sections), panel, "log_share"):
        others = cohort.views([name for name in cohort.sections if name != view.name], panel, "log_share")
        for model in ("train_mean", "depth"):
            values = BASELINES[model].fit(others)(view)
            made = predicted_section(
                cohort.sections[view.name],
                values,
                genes=panel.genes,
                normalisation="log_share",
                panel_digest=panel.digest,
                run=model,
            )
            made.layers["measured"] = view.expression
            write_section(made, tmp_path / "evaluation" / "predictions" / model / f"{view.name}.h5ad")
    table = label_report(tmp_path / "evaluation")
    assert row(table, "measured")["balanced_accuracy"] > 0.8 and row(table, "measured")["macro_auc"] > 0.9
    assert row(table, "train_mean")["balanced_accuracy"] == pytest.approx(1 / row(table, "majority")["n_labels"])
    assert row(table, "depth")["of_measured"] < 0.5
