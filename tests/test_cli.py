"""The command line does the whole job, and says in one line what it cannot do."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from fabricate import contents, full_disk, write_her2st
from hifusion import api, cli
from hifusion.section import read_section
from test_evaluation import SMALL
from test_slide_prediction import draw_slide

SETTINGS = [word for override in SMALL for word in ("--set", override)]
RECIPE = ["--recipe", "tiny", *SETTINGS]
BENCHMARK = ["benchmark", "{work}/store", "-o", "{out}", "--protocol", "first_section", "--recipe", "tiny"]


def run(*words: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the program in this process; gives its exit code."""
    monkeypatch.setattr(sys, "argv", ["hifusion", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with raw data, a store and a trained run, made by the commands a user would give."""
    root = tmp_path_factory.mktemp("work")
    write_her2st(root / "raw")
    with pytest.MonkeyPatch.context() as patch:
        assert (
            run("prepare", root / "raw", root / "store", "--recipe", "tiny", "--region-px", "32", monkeypatch=patch)
            == 0
        )
        train = ["train", root / "store", "-o", root / "run", "--sections", "A1", *RECIPE]
        assert run(*train, monkeypatch=patch) == 0
    return root


@pytest.mark.parametrize("name", sorted(get_command(cli.app).commands))
def test_every_command_has_help_with_an_example(name, monkeypatch, capsys):
    assert run(name, "--help", monkeypatch=monkeypatch) == 0
    assert f"Example: hifusion {name}" in " ".join(capsys.readouterr().out.split()).replace("│ ", "")


def test_from_run_to_predicted_section_to_picture(work, tmp_path, monkeypatch, capsys):
    section, predicted, picture = work / "store/sections/A2.h5ad", tmp_path / "A2.h5ad", tmp_path / "maps.png"
    assert run("predict", work / "run", section, "-o", predicted, monkeypatch=monkeypatch) == 0
    found = read_section(predicted)
    assert found.shape == (26, 10)
    assert np.isfinite(found.X).all()
    assert "counts" not in found.layers
    assert run("plot", predicted, "-o", picture, monkeypatch=monkeypatch) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert (told["spots"], told["genes"], told["normalisation"]) == ("26", "10", "log_share")


def test_json_of_an_evaluation_has_the_asked_models_scores_at_the_top(work, monkeypatch, capsys):
    words = ["evaluate", "--data", work / "raw", "--protocol", "leave_one_patient_out", "--model", "train_mean"]
    assert (
        run(*words, "--recipe", "tiny", "--set", "panel_size=10", "--panel", "paper", "--json", monkeypatch=monkeypatch)
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "train_mean"
    assert result["mse"] == result["models"]["train_mean"]["mse"] > 0
    assert result["pcc_per_gene_mean"] == 0.0


@pytest.mark.parametrize(
    ("path", "kind"), [("raw", "raw data"), ("store", "store"), ("run", "run"), ("store/sections/A1.h5ad", "section")]
)
def test_info_tells_what_a_path_holds(work, path, kind, monkeypatch, capsys):
    assert run("info", work / path, "--json", monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == kind


def test_info_tells_the_size_of_a_slide(work, monkeypatch, capsys):
    image = next((work / "raw").rglob("*.jpg"))
    assert run("info", image, "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["size_px"], found["mpp"]) == ("slide", [400, 376], None)
    assert "dpi" in found["mpp_source"]


def test_raw_data_becomes_sections_and_they_a_store(work, tmp_path, monkeypatch, capsys):
    words = ["import", work / "raw", "-o", tmp_path / "sections", "--sections", "A1,B2", "--patient", "B2=Z"]
    assert run(*words, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "sections" / f"{name}.h5ad") for name in ("A1", "B2")]
    store = ["prepare", tmp_path / "sections", tmp_path / "store", "--recipe", "tiny", "--region-px", "32", "--json"]
    assert run(*store, monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["with_regions"] == ["A1"]
    assert json.loads((tmp_path / "store" / "store.json").read_text())["sections"]["B2"]["patient"] == "Z"


def test_a_dry_run_tells_the_plan_and_writes_nothing(work, tmp_path, monkeypatch, capsys):
    picture = draw_slide(tmp_path / "slide.png")
    words = ["predict", work / "run", picture, "--mpp", "5", "--dry-run", "--json"]
    assert run(*words, monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["spots"] > 50
    assert [path.name for path in tmp_path.iterdir()] == ["slide.png"]


def test_from_slide_to_prediction_to_other_programs(work, tmp_path, monkeypatch, capsys):
    picture, out = draw_slide(tmp_path / "slide.png"), tmp_path / "out"
    assert run("predict", work / "run", picture, "-o", out, "--mpp", "5", "--json", monkeypatch=monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["spots"] == read_section(out / "section.h5ad").n_obs
    table = tmp_path / "table.csv"
    assert run("export", out / "section.h5ad", "-o", table, "--genes", "GENE29", monkeypatch=monkeypatch) == 0
    assert len(table.read_text().splitlines()) == told["spots"] + 1


def test_doctor_names_versions_and_device(monkeypatch, capsys):
    assert run("doctor", "--json", monkeypatch=monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"torch", "hifusion", "python"} <= set(found["versions"])
    assert found["device"] in ("cpu", "cuda", "mps")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prepare", "{work}/nowhere", "{out}"], "no such file or folder"),
        (["prepare", "{work}/raw", "{out}", "--sections", "Z9"], "has no section Z9"),
        (["prepare", "{work}/raw", "{out}", "--recipe", "quik"], "did you mean 'quick'"),
        (["train", "{work}/store", "-o", "{out}", "--recipe", "tiny"], "takes region_px"),
        (["train", "{work}/store", "-o", "{out}", *RECIPE, "--sections", "B2"], "no region patches for B2"),
        (["train", "{work}/store", "-o", "{out}", *RECIPE, "--set", "epoch=3"], "did you mean 'epochs'"),
        (["train", "{work}/store", "-o", "{out}", *RECIPE, "--set", "panel={work}/none.txt"], "none.txt"),
        (["train", "{work}/store", "-o", "{out}", *RECIPE, "--weights", "{work}/gone.pth"], "gone.pth: no such file"),
        (["train", "{work}/store", "-o", "{work}/run", "--sections", "A1", *RECIPE], "--resume"),
        (["predict", "{work}/store", "{work}/store/sections/A2.h5ad", "-o", "{out}"], "no run folder"),
        (["predict", "{work}/run", "{work}/store/sections/B2.h5ad", "-o", "{out}"], "--image"),
        (["predict", "{work}/run", "{work}/store/store.json", "-o", "{out}"], "not a readable image"),
        (["evaluate", "--data", "{work}/store", "--protocol", "first_section", "--seeds", "one"], "--seeds"),
        (["plot", "{work}/raw", "-o", "{out}/maps.png"], "raw"),
        (
            ["plot", "{work}/raw", "-o", "{out}/x.png", "--kind", "skill", "--genes", "A"],
            "--genes is not for --kind skill",
        ),
        (["plot", "{work}/raw", "-o", "{out}/x.png", "--kind", "2d3d"], "1 given; give 2 evaluation folders"),
        (["labels", "{work}/raw"], "no predictions"),
        (["register", "{work}/store", "A1", "A1", "-o", "{out}/x.png"], "is laid over itself"),
        (["register", "{work}/store", "A1", "Z9", "-o", "{out}/x.png"], "has no section Z9"),
        (["evaluate", "--data", "{work}/store", "--protocol", "first_section", "--model", "stnett"], "is unknown; use"),
        ([*BENCHMARK, "--models", "ridge,stnett"], "model stnett is unknown; use hifusion, stnet"),
        ([*BENCHMARK, "--models", "ridge"], "panel_size=40 is not possible: 30 genes are common"),
        ([*BENCHMARK, "--models", "ridge", "--set", "eg:lr=1"], "model 'eg' is not in"),
        ([*BENCHMARK], "store: holds patches of region_px=32"),
        (["info", "{work}/nowhere"], "no such file"),
        (["import", "{work}/run", "-o", "{out}"], "visium: needs"),
        (["import", "{work}/raw", "-o", "{out}", "--format", "visum"], "use one of"),
        (["import", "{work}/raw", "-o", "{out}", "--image", "A1"], "NAME=VALUE"),
        (["download", "her2", "-o", "{out}"], "nearest"),
        (["export", "{work}/store/sections/A2.h5ad", "-o", "{out}/a.docx"], "no format"),
        (["export", "{work}/store/sections/A2.h5ad", "-o", "{out}/a.csv", "--genes", "GENE"], "nearest of 30: GENE29"),
        (["predict", "{work}/run", "{image}", "-o", "{out}"], "--mpp"),
        (["predict", "{work}/run", "{image}", "-o", "{out}", "--mpp", "-1"], "--mpp"),
        (["predict", "{work}/run", "{image}", "-o", "{out}", "--mpp", "2.8", "--lattice", "round"], "hexagonal"),
        (["predict", "{work}/run", "{image}", "--mpp", "2.8"], "-o"),
        (["predict", "{work}/run", "{work}/store/sections/A2.h5ad", "--dry-run"], "is for a slide"),
        (["predict", "{work}/run", "{work}/store/sections/A2.h5ad", "-o", "{out}", "--stride-um", "50"], "for a slide"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(work, tmp_path, words, said, monkeypatch, capsys):
    out = tmp_path / "out"
    before = contents(work)
    image = next((work / "raw").rglob("*.jpg"))
    words = [word.format(work=work, out=out, image=image) for word in words]
    assert run(*words, monkeypatch=monkeypatch) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("hifusion: ")
    assert said in lines[0]
    assert not out.exists()
    assert contents(work) == before


def test_a_section_is_never_overwritten_by_its_prediction(work, monkeypatch, capsys):
    section = work / "store/sections/A2.h5ad"
    before = section.read_bytes()
    assert run("predict", work / "run", section, "-o", section, monkeypatch=monkeypatch) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert section.read_bytes() == before


def test_a_panel_changed_after_training_is_refused(work, tmp_path, monkeypatch, capsys):
    shutil.copytree(work / "run", tmp_path / "run")
    panel = tmp_path / "run" / "panel.json"
    genes = json.loads(panel.read_text())
    genes["genes"] = genes["genes"][::-1]
    panel.write_text(json.dumps(genes))
    assert (
        run(
            "predict",
            tmp_path / "run",
            work / "store/sections/A2.h5ad",
            "-o",
            tmp_path / "x.h5ad",
            monkeypatch=monkeypatch,
        )
        == 2
    )
    assert "panel" in capsys.readouterr().err
    assert not (tmp_path / "x.h5ad").exists()


def test_a_full_disk_is_one_line_and_the_same_command_finishes_the_store_later(work, tmp_path, monkeypatch, capsys):
    words = ["prepare", work / "raw", tmp_path / "store", "--recipe", "tiny", "--region-px", "32"]
    with full_disk(40_000):
        assert run(*words, monkeypatch=monkeypatch) == 2
    assert "free some space" in capsys.readouterr().err
    assert run(*words, monkeypatch=monkeypatch) == 0
    kept = {path: data for path, data in contents(work / "store").items() if path.endswith(".npy")}
    assert kept
    assert kept.items() <= contents(tmp_path / "store").items()


def test_ctrl_c_says_how_to_go_on(work, tmp_path, monkeypatch, capsys):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "predict", stopped)
    words = ["predict", work / "run", work / "store/sections/A1.h5ad", "-o", tmp_path / "x.h5ad"]
    assert run(*words, monkeypatch=monkeypatch) == 130
    assert capsys.readouterr().err.splitlines() == [
        "hifusion: stopped; the same command goes on from what is complete (train: with --resume)"
    ]


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_debug", False)
    with pytest.raises(cli.InputError, match="no such file"):
        run("--debug", "info", "nowhere", monkeypatch=monkeypatch)
    cli._debug = False
