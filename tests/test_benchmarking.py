"""A benchmark goes on where it was killed, does without what fails, and scores as an evaluation does."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from fabricate import refused, write_her2st
from hifusion import api, benchmarking
from hifusion.benchmarking import Settings, benchmark, estimate
from hifusion.simple_models import SIMPLE
from test_cli import run

OVERRIDES = (
    "panel_size=6", "epochs=1", "batch_size=8", "histogene:model.patch_px=32", "hist2st:model.patch_px=32",
    "hist2st:model.piece_px=8", "hist2st:lr=1e12", "hist2st:epochs=9",
)  # fmt: skip
NULLS = ("train_mean", "own_mean")
PATIENCE_S = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmark")
    api.prepare(write_her2st(root / "raw"), root / "store", recipe="tiny", region_px=32)
    return root / "store"


def settings_for(store: Path, *models: str) -> Settings:
    """Train on A1, test on A2: one fold, named A."""
    chosen = ("A1", "A2", "B1")
    return Settings(str(store), "first_section", models, "tiny", None, OVERRIDES, sections=chosen, with_nulls=False)


def finished(out: Path) -> dict[str, int]:
    """Markers and predictions of a folder: name -> when it was written."""
    found = [*out.glob("jobs/*/*.json"), *out.glob("predictions/*/*.h5ad")]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in found}


def children(pid: int) -> list[int]:
    """Processes that a process started, by Linux's own word."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # ended meanwhile
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_so) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


class Story(NamedTuple):
    """A benchmark of nulls, HisToGene and a Hist2ST that cannot be trained: killed, then done to its end."""

    out: Path
    left: list[int]
    """Processes that the killed one had started."""
    at_kill: dict[str, int]
    code: int
    stderr: str


@pytest.fixture(scope="module")
def story(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The nulls by hand, which is quick; killed when the first network was done, by SIGKILL; then gone on with."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("processes are looked up in /proc")
    out = tmp_path_factory.mktemp("story") / "out"
    settings_for(store, *NULLS).save(out / benchmarking.SETTINGS)
    benchmarking.main([str(out), "A", *NULLS])
    words = ["benchmark", store, "-o", out, "--protocol", "first_section", "--sections", "A1,A2,B1", "--no-nulls"]
    words += ["--models", ",".join((*NULLS, "histogene", "hist2st")), "--recipe", "tiny"]
    words += [word for override in OVERRIDES for word in ("--set", override)]
    program = [sys.executable, "-c", "from hifusion.cli import main; main()"]
    killed = subprocess.Popen([*program, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, second = (out / f"jobs/{name}-seed0" for name in ("histogene", "hist2st"))
    wait_until(lambda: killed.poll() is not None or ((first / "A.json").exists() and (second / "A.log").exists()))
    left = children(killed.pid)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not any(map(alive, left)))
    at_kill = finished(out)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(said):
        code = run(*words, monkeypatch=patch)
    return Story(out, left, at_kill, code, said.getvalue())


def test_processes_of_a_killed_benchmark_end_with_it(story):
    assert story.left and not any(map(alive, story.left))


def test_what_was_finished_when_it_was_killed_is_not_done_again(story):
    labels = (*NULLS, "histogene-seed0")
    assert set(story.at_kill) == {f"jobs/{label}/A.json" for label in labels} | {
        f"predictions/{label}/A2.h5ad" for label in labels
    }
    after = finished(story.out)
    assert {name: after[name] for name in story.at_kill} == story.at_kill


def test_a_job_that_fails_is_named_and_the_exit_code_says_so(story):
    assert story.code == 3
    failed = json.loads((story.out / "metrics.json").read_text())["failed"]
    assert list(failed) == ["hist2st-seed0/A"]
    assert "training diverged" in failed["hist2st-seed0/A"]
    line = next(line for line in story.stderr.splitlines() if line.startswith("failed: "))
    assert "hist2st-seed0/A" in line and "diverged" in line and "jobs/hist2st-seed0/A.log" in line
    assert "diverged" in (story.out / "jobs/hist2st-seed0/A.log").read_text()


def test_the_others_are_scored_and_ranked(story):
    board = pd.read_csv(story.out / "leaderboard.csv")
    assert set(board["model"]) == {*NULLS, "histogene"}
    result = json.loads((story.out / "metrics.json").read_text())
    assert list(result["models"]) == [*NULLS, "histogene"]
    assert set(pd.read_csv(story.out / "metrics.csv")["label"]) == {*NULLS, "histogene-seed0"}
    for name in ("leaderboard.html", "leaderboard.md", "comparison.csv", "sections.csv", "costs.csv", "report.md"):
        assert (story.out / name).is_file()


def test_an_evaluation_scores_the_same_models_alike(story, store, tmp_path):
    models = (*NULLS, "histogene")
    given = {"models": models, "recipe": "tiny", "overrides": OVERRIDES, "with_nulls": False}
    evaluated = api.evaluate(store, tmp_path / "out", protocol="first_section", **given)["models"]
    ranked = json.loads((story.out / "metrics.json").read_text())["models"]
    for name in models:
        for score in ("mse", "mae", "pcc_per_spot", "pcc_per_gene_mean"):
            assert evaluated[name][score] == pytest.approx(ranked[name][score], rel=1e-4, abs=1e-6), (name, score)


def test_a_job_done_by_hand_counts(store, tmp_path):
    """As a cluster's scheduler does it; the benchmark then starts no process of its own."""
    settings, out = settings_for(store, *NULLS), tmp_path / "out"
    settings.save(out / benchmarking.SETTINGS)
    assert estimate(settings, out)["done"] == 0
    for label in NULLS:
        benchmarking.main([str(out), "A", label])
    assert estimate(settings, out)["done"] == estimate(settings, out)["jobs"] == 2
    before = finished(out)
    found = benchmark(settings, out)
    assert found.failed == {} and set(found.leaderboard["model"]) == set(NULLS)
    assert finished(out) == before and not list(out.glob("jobs/*/*.log"))


def test_a_lost_prediction_or_another_panel_is_to_be_done_again(store, tmp_path):
    settings, out = settings_for(store, *NULLS), tmp_path / "out"
    settings.save(out / benchmarking.SETTINGS)
    benchmarking.main([str(out), "A", *NULLS])
    other = replace(settings, overrides=(*OVERRIDES, "panel_size=5"))
    assert estimate(other, out)["done"] == 0
    (out / "predictions/own_mean/A2.h5ad").unlink()
    assert estimate(settings, out)["done"] == 1


def test_what_a_benchmark_does_not_have_is_refused_in_one_line(store, tmp_path):
    with refused("holds no benchmark.json", "hifusion benchmark"):
        benchmarking.do_jobs(tmp_path, "A", ["train_mean"])
    settings_for(store, "train_mean").save(tmp_path / benchmarking.SETTINGS)
    with refused("no fold B", "it has A"):
        benchmarking.do_jobs(tmp_path, "B", ["train_mean"])
    with refused("no job ridge", "it has train_mean"):
        benchmarking.do_jobs(tmp_path, "A", ["ridge"])
    with refused("jobs=0", "at least 1"):
        benchmark(settings_for(store, "train_mean"), tmp_path, processes=0)


def test_a_benchmark_of_which_nothing_is_left_is_refused(store, tmp_path, monkeypatch):
    """Every job failed: the line names the first and what it said."""
    monkeypatch.setattr(benchmarking, "_work_off", lambda *_: {"train_mean/A": "no memory"})
    with refused("every job failed", "no memory"):
        benchmark(settings_for(store, "train_mean"), tmp_path)


def test_settings_survive_their_file(store, tmp_path):
    settings = replace(settings_for(store, *SIMPLE), seeds=(1, 2), sections=("A1", "A2"), with_test_epoch=True)
    settings.save(tmp_path / benchmarking.SETTINGS)
    assert Settings.load(tmp_path / benchmarking.SETTINGS) == settings
    (tmp_path / benchmarking.SETTINGS).write_text('{"format": 99}')
    with refused("this version"):
        Settings.load(tmp_path / benchmarking.SETTINGS)
