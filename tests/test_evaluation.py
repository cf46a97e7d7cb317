"""An evaluation fits on one side, scores the other, and shows its nulls."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fabricate import WITHOUT_IMAGE, counts_file, counts_of, edit_table, image_file, refused, write_her2st
from hifusion import api, metrics, recipes
from hifusion.section import read_section
from hifusion.simple_models import SIMPLE

# A network of a few hundred parameters on 32 px regions: seconds for everything below.
SMALL = (
    "model.region_px=32", "model.spot_px=16", "model.grids=[1,2]", "model.width=2", "model.heads=2",
    "epochs=1", "batch_size=8", "panel_size=10", "precision=32-true",
)  # fmt: skip
WITH_IMAGE = ["A1", "A2", "B1"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_her2st(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def store(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "store"
    api.prepare(raw, out, recipe="tiny", region_px=32)
    return out


@pytest.fixture(scope="module")
def evaluated(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    return out, api.evaluate(store, out, protocol="first_section", recipe="tiny", overrides=SMALL, seeds=(0, 1))


def test_train_mean_scores_what_is_worked_out_by_hand_from_counts_alone(raw):
    result = api.evaluate(
        raw,
        protocol="leave_one_patient_out",
        models=["train_mean"],
        recipe="tiny",
        overrides=["panel_size=30"],
        panel="paper",
    )
    log_share = {
        name: np.log((c := counts_of(name) + 1.0) / c.sum(axis=1, keepdims=True))
        for name in (*WITH_IMAGE, WITHOUT_IMAGE)
    }
    patients = {"A": ("A1", "A2"), "B": ("B1", "B2")}
    folds = []
    for tested, trained in (("A", "B"), ("B", "A")):
        mean = np.concatenate([log_share[name] for name in patients[trained]]).mean(axis=0)
        folds.append(np.square(np.concatenate([log_share[name] for name in patients[tested]]) - mean).mean())
    assert result["models"]["train_mean"]["mse"] == pytest.approx(np.mean(folds), rel=1e-5)
    assert set(result["models"]) == {"train_mean", "own_mean", "depth"}
    assert {"ridge", "kernel_ridge", "features_ridge"} <= set(result["not_run"])


def test_every_null_stands_beside_the_network_and_oracles_are_named(evaluated):
    _, result = evaluated
    assert list(result["models"]) == [*SIMPLE, "shuffled", "hifusion"]
    assert result["not_run"] == {}
    assert {name for name, its in result["models"].items() if its["oracle"]} == {"own_mean", "depth"}
    assert {name for name, its in result["models"].items() if not its["null"]} == {"hifusion"}


def test_result_on_disk_has_one_row_per_gene_section_and_label_and_is_plain_json(evaluated):
    out, result = evaluated
    assert json.loads((out / "metrics.json").read_text()) == result
    rows = pd.read_csv(out / "metrics.csv")
    labels = {*SIMPLE, "shuffled-seed0", "hifusion-seed0", "hifusion-seed1"}
    assert set(rows["label"]) == labels
    assert len(rows) == len(labels) * 10  # first_section tests A2 alone: one section, ten genes
    assert set(metrics.GENE_COLUMNS) <= set(rows.columns)
    for label in labels:
        section = read_section(out / "predictions" / label / "A2.h5ad")
        assert section.shape == (26, 10)
        assert section.layers["measured"].shape == (26, 10)


def test_several_seeds_are_averaged_and_each_is_kept(evaluated):
    _, result = evaluated
    scores = result["models"]["hifusion"]
    seeds = scores["by_seed"]
    assert list(seeds) == ["hifusion-seed0", "hifusion-seed1"]
    assert scores["mse"] == pytest.approx(np.mean([its["mse"] for its in seeds.values()]))
    assert seeds["hifusion-seed0"]["mse"] != seeds["hifusion-seed1"]["mse"]


def test_evaluating_again_trains_nothing_again_and_gives_the_same_figures(evaluated, store):
    out, result = evaluated
    weights = sorted(out.glob("runs/*/*/weights.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    again = api.evaluate(store, out, protocol="first_section", recipe="tiny", overrides=SMALL, seeds=(0, 1))
    assert len(weights) == 3
    assert [path.stat().st_mtime_ns for path in weights] == before
    assert again == result


def test_other_settings_in_the_same_folder_are_refused(evaluated, store):
    out, _ = evaluated
    with refused("recipe", "another folder"):
        api.evaluate(store, out, protocol="first_section", recipe="tiny", overrides=[*SMALL, "lr=0.5"])


def test_report_says_same_patient_and_which_sections_were_left_out(evaluated):
    out, _ = evaluated
    text = (out / "report.md").read_text()
    assert "Same patient" in text
    assert f"Not used (1 sections without region patches): {WITHOUT_IMAGE}" in text
    assert "oracle" in text
    assert "chosen on all sections" not in text


def test_panel_does_not_see_the_tested_sections_unless_it_is_the_papers(raw, tmp_path):
    """A gene that only the tested patient expresses is in the paper's panel and in no other."""
    root = tmp_path / "raw"
    shutil.copytree(raw, root)
    for name in ("B1", "B2"):
        edit_table(counts_file(root, name), lambda table: [row.__setitem__(1, "90") for row in table[1:]])
    for panel, seen in (("top_mean", False), ("paper", True)):
        api.evaluate(
            root,
            tmp_path / panel,
            protocol="leave_one_patient_out",
            models=["train_mean"],
            recipe="tiny",
            overrides=["panel_size=5"],
            panel=panel,
        )
        rows = pd.read_csv(tmp_path / panel / "metrics.csv")
        assert ("GENE00" in set(rows.loc[rows["patient"] == "B", "gene"])) == seen


@pytest.mark.slow
def test_same_image_under_another_name_is_refused_as_a_leak(raw, tmp_path):
    root, out = tmp_path / "raw", tmp_path / "store"
    shutil.copytree(raw, root)
    shutil.copy(image_file(root, "A1"), image_file(root, "B1"))
    api.prepare(root, out, recipe="tiny", region_px=32)
    ask = {"protocol": "leave_one_patient_out", "models": ["ridge"], "recipe": "tiny", "overrides": ["panel_size=10"]}
    with refused("A1", "B1", "same image"):
        api.evaluate(out, **ask)
    result = api.evaluate(out, tmp_path / "unchecked", leak_check=False, **ask)
    assert result["leak_check"] is False
    assert "leak check was switched off" in (tmp_path / "unchecked" / "report.md").read_text()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"models": ["hifusion"]}, ("region patches", "prepare")),
        ({"models": ["ridge"]}, ("region patches", "prepare")),
        ({"models": ["oracle"]}, ("oracle", "train_mean")),
        ({"models": ["train_mean"], "protocol": "k_fold"}, ("k_fold", "patient_folds")),
        ({"models": ["train_mean"], "panel": "best"}, ("best", "top_mean")),
        ({"models": ["train_mean"], "overrides": ["normalisation=tpm"]}, ("tpm", "log_share")),
        ({"models": ["train_mean"], "sections": ["Z9"]}, ("Z9", "A1")),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(raw, ask, words):
    with refused(*words):
        api.evaluate(raw, **{"protocol": "leave_one_patient_out", "recipe": "tiny", **ask})


def test_a_network_without_a_folder_for_its_runs_is_refused(store):
    with refused("-o"):
        api.evaluate(store, protocol="first_section", recipe="tiny", overrides=SMALL)


def test_store_of_other_patches_than_the_recipe_takes_is_refused(store, tmp_path):
    with refused("region_px=32", "hifusion prepare"):
        api.evaluate(store, tmp_path / "out", protocol="first_section", recipe="tiny")


@pytest.mark.slow
@pytest.mark.real
def test_the_constant_scores_its_published_figures_over_all_36_sections(her2st_root):
    """MSE .57953, MAE .58965, pcc_per_spot .45727 in the 2D protocol, from counts alone."""
    recipe = recipes.recipe("her2st_2d")
    assert recipe.panel == "paper"
    scores = api.evaluate(
        her2st_root, protocol="patient_folds", models=["train_mean"], recipe="her2st_2d", with_nulls=False
    )
    found = [scores["models"]["train_mean"][key] for key in ("mse", "mae", "pcc_per_spot")]
    assert found == pytest.approx([0.57953, 0.58965, 0.45727], abs=2e-5)
