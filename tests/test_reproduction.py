"""From raw data to the paper's table: what stands beside what, what is missing is said first, and nothing is hidden."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from fabricate import refused
from hifusion import api, cli_bench, expression, recipes, reproduction, studies, synth
from hifusion.cohort import Cohort
from hifusion.protocols import PROTOCOLS
from test_cli import run

GENES = 10
QUICKEST = {
    "sections": ["A1", "A2"],
    "models": ["histogene"],
    "recipe": "tiny",
    "overrides": ["epochs=1", "encoder=resnet18", "panel=paper", f"panel_size={GENES}"],
    "processes": 2,
}


class Stop(Exception):
    """What is said first ends the test: nothing was read or written before."""


def first_words(name: str, data: Path, **settings) -> str:
    """What a reproduction says before it does anything."""
    said = []

    def say(text: str) -> None:
        said.append(text)
        raise Stop

    with pytest.raises(Stop):
        reproduction.reproduce(name, data, data / "never", say=say, **settings)
    return said[0]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sections 1 and 2 of patients A and B; B2 has no image."""
    root = tmp_path_factory.mktemp("raw") / "her2st"
    synth.write_cohort(root, patients=2, sections_per_patient=2, spots_per_side=6)
    shutil.rmtree(root / "data/ST-imgs/B/B2")
    return root


@pytest.fixture(scope="module")
def done(raw: Path, tmp_path_factory: pytest.TempPathFactory):
    """A 3D reproduction on two sections; gives its folder, itself, and what was said."""
    out, said = tmp_path_factory.mktemp("out"), []
    found = reproduction.reproduce("her2st-3d", raw, out, say=said.append, **QUICKEST)
    return out, found, said


@pytest.mark.slow
def test_ours_are_the_figures_of_the_benchmark(done):
    out, _, _ = done
    table = pd.read_csv(out / "table1.csv").set_index("model")
    models = json.loads((out / "benchmark/metrics.json").read_text())["models"]
    assert {"histogene", "train_mean", "ridge", "kernel_ridge", "features_ridge", "shuffled", "depth"} <= set(models)
    for model, scores in models.items():
        for ours, key in (("mse", "mse"), ("mae", "mae"), ("pcc_per_gene", "pcc_per_gene_mean")):
            assert table.loc[model, f"ours_{ours}"] == pytest.approx(scores[key]), (model, ours)


@pytest.mark.slow
def test_difference_is_ours_less_the_published_figure(done):
    row = done[1].table.set_index("model").loc["histogene"]
    assert row["published_mse"] == 0.4851  # arXiv 2511.12969, Table 1
    assert row["difference_mse"] == row["ours_mse"] - 0.4851


@pytest.mark.slow
def test_rows_are_the_papers_in_its_order_then_nulls_then_oracles(done):
    methods = done[1].table["method"].tolist()
    assert methods[:8] == list(studies.METHODS.values())
    assert methods[8] == "train_mean" and methods[-3:] == ["shuffled", "own_mean", "depth"]


@pytest.mark.slow
def test_a_model_that_was_not_run_has_published_figures_only(done):
    row = done[1].table.set_index("model").loc["hifusion"]
    assert row["published_pcc_per_spot"] == 0.7492 and pd.isna(row["ours_pcc_per_spot"])


@pytest.mark.slow
def test_the_title_of_a_part_says_so_and_the_page_says_why(done):
    page = (done[0] / "table1.md").read_text()
    assert page.startswith("# Table 1, HER2+ 3D: partial, 2 of 36 sections\n")
    for said in (
        "**Not comparable with the published column:** only 2 of 36 sections; recipe tiny, not her2st_3d; "
        "changed values (epochs=1, encoder=resnet18, panel=paper, panel_size=10); another gene panel (paper).",
        "1 of 8 folds",
        "HisToGene 1.",
        "the published one is the best of all on the tested fold",
        "on the sections run here, tested ones included",
        "Same patient",
        "Not scored here: ST-Net, Hist2ST,",
        "Without an image (1): B2.",
        "Not asked for (1): B1.",
    ):
        assert said in page, said


@pytest.mark.slow
def test_what_is_missing_is_said_first_and_the_estimate_next(done):
    _, found, said = done
    assert "Missing from the data (32): A3, A4," in said[0] and "Without an image (1): B2." in said[0]
    assert said[2].startswith(f"0 of {found.estimate['jobs']} jobs are done; about ")


def test_the_panel_is_that_of_the_study_by_name(raw, monkeypatch, tmp_path):
    """The same on every machine, so that results say it and jobs find it."""
    asked = []

    def estimate(settings, *_, **__):
        asked.append(settings)
        raise Stop

    monkeypatch.setattr(reproduction, "estimate", estimate)
    with pytest.raises(Stop):
        reproduction.reproduce("her2st-3d", raw, tmp_path, **{**QUICKEST, "overrides": []})
    assert asked[0].panel == "her2st_paper"


@pytest.mark.slow
def test_called_again_from_elsewhere_nothing_is_done_again(done, raw, monkeypatch, tmp_path):
    out, before, _ = done
    stamps = {path: path.stat().st_mtime_ns for path in (out / "benchmark").glob("jobs/*/*.json")}
    monkeypatch.chdir(tmp_path)
    again = reproduction.reproduce("her2st-3d", raw, out, **QUICKEST)
    assert again.estimate["done"] == again.estimate["jobs"] == len(stamps) > 5
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    pd.testing.assert_frame_equal(again.table, before.table)


@pytest.mark.slow
def test_counts_alone_use_sections_without_image_and_a_panel_of_ones_own(raw, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    genes = expression.choose_panel(Cohort.open(raw).sections, "paper", GENES).genes
    Path("genes.txt").write_text("\n".join(genes))
    settings = {"models": ["train_mean"], "sections": ["B1", "B2"], "overrides": ["panel=genes.txt"]}
    found = reproduction.reproduce("her2st-3d", raw, Path("out"), recipe="tiny", **settings)
    assert found.title == "Table 1, HER2+ 3D: partial, 2 of 36 sections"
    assert "another gene panel" in found.notes[1] and "by the rule file" in found.notes[2]
    assert found.table.set_index("model").loc["train_mean", "ours_mse"] > 0


def test_a_dry_run_trains_nothing(raw, tmp_path):
    settings = {"models": ["train_mean"], "recipe": "tiny", "overrides": ["panel=top_mean"]}
    found = reproduction.reproduce("her2st-3d", raw, tmp_path / "out", dry_run=True, **settings)
    assert found.estimate["jobs"] > found.estimate["done"] == 0
    assert found.facts["table"] == []
    assert not (tmp_path / "out/benchmark").exists()


@pytest.mark.slow
def test_rows_of_the_published_habit_stand_below_their_method(done):
    result = json.loads((done[0] / "benchmark/metrics.json").read_text())
    result["models"]["histogene_test_epoch"] = result["models"]["histogene"]
    table = reproduction.table_of(studies.STUDIES["her2st-3d"], result)
    assert table["method"].tolist()[1:4] == ["HisToGene", "HisToGene, epoch selected on the test", "Hist2ST"]
    assert table.loc[2, "published_mse"] == 0.4851


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("her2st-2d", {"sections": ["A1", "A2"]}, ("A+E, B+F", "only A1, A2 can be used", "ask for others too (B1)")),
        ("her2st-3d", {"sections": ["B1"]}, ("two sections of one patient", "only B1")),
        ("her2st-3d", {"sections": ["A1", "B2"]}, ("B2 has no image", "hifusion download her2st -o FOLDER")),
        ("her2st-3d", {"sections": ["A1", "H1"]}, ("H1 is missing", "hifusion download her2st -o FOLDER")),
        ("her2st-3d", {"sections": ["Z1"]}, ("section 'Z1'", "the full table of her2st-3d")),
        ("her2st-3d", {"models": ["hifuson"]}, ("hifuson", "hifusion")),
        ("stdata-2d", {}, ("is not the layout of stdata", "_stdata.tsv.gz", "hifusion download stdata -o FOLDER")),
        ("her2st", {}, ("study 'her2st' is unknown", "her2st-2d")),
    ],
)
def test_what_cannot_be_is_one_line(name, settings, words, raw, tmp_path):
    with refused(*words):
        reproduction.reproduce(name, raw, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_no_image_at_all_tells_what_to_download(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw/data/ST-imgs")
    with refused("no section can be used", "4 have no image", "hifusion download her2st -o FOLDER"):
        reproduction.reproduce("her2st-3d", tmp_path / "raw", tmp_path / "out")


def test_stdata_is_the_first_three_sections_of_each_patient(tmp_path):
    names = ["BC1_C1", "BC1_C2", "BC1_D1", "BC1_E9", "BC2_A1", "BC2_A2"]
    for name in names:
        (tmp_path / f"{name}_stdata.tsv.gz").touch()
        (tmp_path / f"HE_{name.replace('BC', 'BT')}.jpg").touch()
    (tmp_path / "HE_BT2_A1.jpg").unlink()
    said = first_words("stdata-3d", tmp_path)
    assert "partial, 3 of 68 sections" in said and "E9" not in said
    assert "Without an image (1): BC2_A1." in said
    assert "Left out, the only section of its patient (1): BC2_A2." in said
    assert "63 of 68 sections, whose names are not known here" in said


def test_another_first_section_than_the_papers_is_told(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    data = tmp_path / "raw/data"
    for folder, ending in (("ST-cnts", ".tsv.gz"), ("ST-spotfiles", "_selection.tsv")):
        shutil.copy(data / folder / f"A2{ending}", data / folder / f"A3{ending}")
    shutil.copytree(data / "ST-imgs/A/A2", data / "ST-imgs/A/A3")
    shutil.rmtree(data / "ST-imgs/A/A1")
    assert "Trained on A2, not on A1 as published." in first_words("her2st-3d", tmp_path / "raw")


@pytest.mark.parametrize("name", studies.STUDIES)
def test_every_study_names_what_there_is(name):
    its = studies.STUDIES[name]
    assert its.protocol in PROTOCOLS and (its.recipe, "paper") in recipes.RECIPES
    assert set(its.published) == set(studies.METHODS) - ({"asign3d"} if name.endswith("2d") else set())
    assert min(its.published, key=lambda model: its.published[model].mse) == "hifusion"


def test_the_panel_is_in_the_package_and_whole():
    panel = expression.packaged_panel("her2st_paper")  # which checks the digest
    assert len(panel.genes) == 250 and len(panel.sections) == 36 and panel.rule == "paper"


def test_failed_jobs_are_exit_code_3(monkeypatch, capsys, tmp_path):
    broken = reproduction.Reproduction("title", [], {}, pd.DataFrame(), {"egn-seed0/A": "too little memory"})
    monkeypatch.setattr(api, "reproduce", lambda *words, **settings: broken)
    words = ["reproduce", "her2st-3d", "--data", tmp_path, "-o", tmp_path / "out", "--json"]
    assert run(*words, monkeypatch=monkeypatch) == cli_bench.INCOMPLETE == 3
    told = capsys.readouterr()
    assert json.loads(told.out)["failed"] == broken.failed
    assert "failed: egn-seed0/A: too little memory" in told.err


@pytest.mark.real
def test_the_31_real_images_that_are_missing_are_named_first(her2st_root):
    said = first_words("her2st-3d", her2st_root)
    missing = said.partition("Without an image (31): ")[2].partition(".")[0].split(", ")
    here = {"B4", "C2", "C3", "C4", "C5"}
    assert set(missing) == set(studies.STUDIES["her2st-3d"].sections([])) - here
    assert "partial, 4 of 36" in said and "only section of its patient (1): B4" in said


@pytest.mark.real
@pytest.mark.slow
def test_the_rule_over_the_36_real_sections_gives_the_packages_panel(her2st_root):
    sections = Cohort.open(her2st_root).sections
    panel = expression.choose_panel(sections, "paper", 250)
    assert panel.genes == expression.packaged_panel("her2st_paper").genes
    spots = {name: section.n_obs for name, section in sections.items()}
    assert sum(spots.values()) == studies.STUDIES["her2st-2d"].n_spots
    first = sum(spots[f"{patient}1"] for patient in "ABCDEFGH")
    assert sum(spots.values()) - first == studies.STUDIES["her2st-3d"].n_spots
