"""An archive of slides is predicted once each, whatever is killed, and says what could not be predicted."""

import base64
import contextlib
import hashlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import pytest

from archives_of_slides import (
    BROKEN,
    draw_archive,
    environment,
    finished,
    free_port,
    log_of,
    wait_until,
)
from fabricate import contents, full_disk, refused
from hifusion import api, archive_page, clusters, locks, slide_jobs
from hifusion.archive_prediction import archive_jobs
from hifusion.section import read_section
from hifusion.slide_jobs import ARCHIVE, BUSY, DONE, FAILED, LOG, STATE, UNFIT, SlideJob, do_slide, values
from test_cli import run
from test_slide_prediction import MPP
from views import fit_small


class Archive(NamedTuple):
    """A run, three good slides and four broken ones, predicted by two workers of this machine."""

    root: Path
    outcome: api.archive_prediction.Outcome
    listening: list[str]
    """Addresses that this process and its workers were heard at."""
    told: list[tuple[str, int, int]]

    @property
    def out(self) -> Path:
        return self.root / "out"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_small(tmp_path_factory.mktemp("trained") / "run").root


@pytest.fixture(scope="module")
def archive(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Archive:
    root = tmp_path_factory.mktemp("archive")
    manifest = draw_archive(root, good=3, broken=4)
    listening: set[str] = set()
    told: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        this = psutil.Process()
        for process in [this, *this.children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                listening.update(its.laddr.ip for its in process.net_connections("inet") if its.status == "LISTEN")

    found = api.predict_archive(trained, manifest, root / "out", jobs=2, progress=progress)
    return Archive(root, found, sorted(listening), told)


@pytest.fixture
def job(trained: Path, tmp_path: Path) -> SlideJob:
    """One slide of an archive that nobody has begun with."""
    (first,) = archive_jobs(trained, draw_archive(tmp_path, good=1), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ARCHIVE).write_text("{}")
    return first


def do(job: SlideJob, command: str = "first", most_attempts: int = 3) -> dict:
    return do_slide(values(job), command, most_attempts)


def test_good_slides_are_done_and_broken_ones_named_with_their_reason(archive: Archive) -> None:
    assert archive.outcome.failed.keys() == BROKEN.keys()
    for name, reason in BROKEN.items():
        assert reason in archive.outcome.failed[name]
    table = archive.outcome.table.set_index("name")
    assert list(table.index[table["state"] == DONE]) == ["good0", "good1", "good2"]
    assert (table["attempts"] == 1).all()  # what is the slide's fault is not tried again
    assert archive.told[-1][1:] <= (7, 7) and max(done for _, done, _ in archive.told) > 0


def test_a_slides_folder_is_what_predict_leaves(archive: Archive, trained: Path, tmp_path: Path) -> None:
    slide = archive.root / "slides" / "good1.png"
    alone = api.predict(trained, slide, tmp_path / "alone", mpp=MPP)
    mine, its = contents(archive.out / "slides" / "good1"), contents(tmp_path / "alone")
    assert mine.keys() - its.keys() == {STATE, LOG}
    same = its.keys() - {"plan.json", "section.h5ad"}  # which tell the speed, and when they were made
    assert {name: mine[name] for name in same} == {name: its[name] for name in same}
    np.testing.assert_array_equal(read_section(archive.out / "slides/good1/section.h5ad").X, alone.X)


def test_the_table_tells_what_the_predictions_are(archive: Archive) -> None:
    table = pd.read_csv(archive.out / "slides.csv").set_index("name")
    assert list(table.columns) == [name for name in archive_page.COLUMNS if name != "name"]
    predicted = read_section(archive.out / "slides/good0/section.h5ad")
    row = table.loc["good0"]
    assert (row["spots"], row["genes"], row["mpp"]) == (*predicted.shape, MPP)
    assert row["novel_share"] == pytest.approx((predicted.obs["novelty"] > 1).mean(), abs=1e-4)
    assert row["tissue_mm2"] > 0 and row["spots_per_s"] > 0 and row["seconds"] > 0
    assert Path(row["slide"]) == archive.root / "slides" / "good0.png"
    assert table.loc["broken0", ["spots", "novel_share"]].isna().all()


def test_what_is_done_is_not_done_again(archive: Archive, trained: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(archive.out, tmp_path / "out"))
    before = finished(out)
    manifest = archive.root / "good.csv"
    manifest.write_text("slide,mpp\n" + "".join(f"slides/good{number}.png,{MPP}\n" for number in range(3)))
    found = api.predict_archive(trained, manifest, out, jobs=1)
    assert found.failed == {} and list(found.table["state"]) == [DONE] * 3
    assert finished(out) == before and len(before) == 3
    assert all(log_of(out, name) == ["begun", DONE] for name in before)


def test_workers_and_scheduler_are_heard_on_this_machine_only(archive: Archive) -> None:
    assert archive.listening == ["127.0.0.1"]


def test_the_page_needs_no_network_and_links_every_picture(archive: Archive) -> None:
    page = (archive.out / "index.html").read_text()
    assert "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page
    links = re.findall(r'(?:href|src)="([^"]*)"', page)
    assert len(links) == 7 + 2 * 2 * 3
    assert all((archive.out / link).exists() for link in links)
    order = re.findall(r'<tr class="(\w+)">', page)
    assert order == [FAILED] * 4 + [DONE] * 3


def test_names_and_reasons_are_text_on_the_page() -> None:
    evil = "<script>alert(1)</script>&\"'%#?"
    job = SlideJob(run="", run_key="", out="", name=evil, slide=f"/{evil}")
    failed = {evil: {"state": FAILED, "reason": "<img src=x onerror=alert(1)>"}}
    done = {evil: {"state": DONE, "reason": "", "spots": 1, "warning": evil}}
    for states in (failed, done, {}):
        page = archive_page.to_html(archive_page.archive_table([job], states), "<b>run</b>")
        body = page.partition("<main>")[2].partition("<script>")[0]
        assert "<script" not in body and "<img src=x" not in body and "<b>" not in body
        assert all(set(link) <= set(re.sub("[^ -~]|[<>#?\"' ]", "", link)) for link in re.findall('href="(.*?)"', body))


def test_the_policy_allows_the_pages_own_style_and_script_alone() -> None:
    page = archive_page.to_html(archive_page.archive_table([], {}), "run")
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in page
    assert not re.search(r' (?:on\w+|style)="', page)


def test_a_slide_that_another_process_has_is_left_to_it(job: SlideJob) -> None:
    with locks.held(job.folder / LOG) as log:
        assert log is not None
        assert do(job) == {"state": BUSY}
    assert not (job.folder / STATE).exists()


def test_a_slide_killed_too_often_is_given_up_by_this_command_only(job: SlideJob) -> None:
    job.folder.mkdir(parents=True)
    (job.folder / LOG).write_text("begun first there:1\n" * 3)
    state = do(job)
    assert (state["state"], state["attempts"]) == (FAILED, 3)
    assert "ended from outside 3 times" in state["reason"]
    assert do(job) == state  # a task that comes twice
    assert do(job, "second")["state"] == DONE
    assert log_of(Path(job.out), job.name) == ["begun"] * 3 + [FAILED, "begun", DONE]


def test_a_slide_that_was_changed_is_done_again_and_leaves_nothing_old(job: SlideJob) -> None:
    assert do(job)["state"] == DONE
    slide = Path(job.slide)
    slide.write_bytes(slide.read_bytes()[:5000])
    assert not slide_jobs.is_done(job)
    assert "not a readable image" in do(job, "second")["reason"]
    assert {path.name for path in job.folder.iterdir()} == {STATE, LOG}
    assert not list(Path(job.out).glob("thumbnails/*"))


@pytest.mark.parametrize("change", [{"run_key": "other"}, {"mpp": 4.0}, {"stride_um": 100.0}, {"lattice": "hexagonal"}])
def test_whatever_decides_the_result_is_in_the_key(job: SlideJob, change: dict) -> None:
    assert replace(job, **change).key() != job.key()


def test_a_prediction_that_lacks_a_file_is_done_again(job: SlideJob) -> None:
    assert do(job)["state"] == DONE
    (job.folder / "maps.png").unlink()
    assert not slide_jobs.is_done(job)
    assert do(job, "second")["state"] == DONE and (job.folder / "maps.png").exists()


def test_a_machine_that_does_not_see_run_or_archive_blames_no_slide(job: SlideJob, tmp_path: Path) -> None:
    assert do(replace(job, run=str(tmp_path / "elsewhere")))["state"] == UNFIT
    assert do(replace(job, out=str(tmp_path / "elsewhere")))["state"] == UNFIT
    assert do(replace(job, version="0.0.1"))["state"] == UNFIT
    assert not (tmp_path / "elsewhere").exists() and not job.folder.exists()


def test_a_full_disk_is_no_slides_fault(job: SlideJob) -> None:
    with full_disk(20_000), refused("cannot be written", "the same command again"):
        do(job)
    assert slide_jobs.read_state(job) is None
    assert do(job)["state"] == DONE


def test_a_damaged_state_is_none(job: SlideJob) -> None:
    job.folder.mkdir(parents=True)
    (job.folder / STATE).write_text('{"state": "do')
    assert do(job)["state"] == DONE


@pytest.mark.slow
def test_killed_amid_a_slide_it_goes_on_to_the_same_prediction(job: SlideJob, tmp_path: Path) -> None:
    """Killed by SIGKILL when half of the rows are on disk; both with a lattice of three thousand spots."""
    job = replace(job, stride_um=40.0)
    command = (
        "import json, sys, time; from hifusion import prediction, slide_jobs\n"
        "plain = prediction.spot_outputs\n"
        "def slow(*given, **named):\n"
        "    for number, batch in enumerate(plain(*given, **named)):\n"
        "        time.sleep(0.05 if number > 50 else 0)\n"
        "        yield batch\n"
        "prediction.spot_outputs = slow\n"
        "slide_jobs.do_slide(json.loads(sys.argv[1]), 'first', 3)"
    )
    process = subprocess.Popen([sys.executable, "-c", command, json.dumps(values(job))], env=environment())
    wait_until(lambda: any(path.stat().st_size > 400 * 16 for path in job.folder.glob(".section.h5ad.*.rows")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (rows,) = job.folder.glob(".section.h5ad.*.rows")
    assert not (job.folder / STATE).exists() and rows.stat().st_size >= 400 * 16
    state = do(job)
    assert (state["state"], state["attempts"]) == (DONE, 2)
    undisturbed = replace(job, name="undisturbed")
    assert do(undisturbed)["attempts"] == 1
    again, whole = (read_section(its.folder / "section.h5ad") for its in (job, undisturbed))
    np.testing.assert_array_equal(again.X, whole.X)
    np.testing.assert_array_equal(again.obs["novelty"], whole.obs["novelty"])


def test_a_dry_run_counts_opens_and_probes_and_writes_nothing(trained: Path, tmp_path: Path) -> None:
    manifest = draw_archive(tmp_path, good=2, broken=4)
    before = contents(tmp_path)
    facts = api.plan_archive(trained, manifest, tmp_path / "out", jobs=2)
    assert (facts["slides"], facts["left"], facts["workers"], facts["probed"]) == (6, 6, 2, 2)
    assert {text.split()[0] for text in facts["fail_now"]} == BROKEN.keys()
    assert facts["minutes"] > 0 and facts["memory_gib_each"] > 0 and facts["free_disk_gib"] > 0
    assert 150 < facts["spots"] < 350
    json.dumps(facts, allow_nan=False)
    assert contents(tmp_path) == before


def test_a_job_script_is_shown_without_slurm(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    manifest = draw_archive(tmp_path, good=1)
    words = ["predict", trained, "--slides", manifest, "-o", tmp_path / "out", "--scheduler", "slurm", "--dry-run"]
    given = ["queue=gpu", "cores=8", "memory=32GiB", "walltime=02:00:00", "gres=gpu:1", "prologue=module load python"]
    words += [word for text in given for word in ("--set-cluster", text)]
    interrupted = signal.getsignal(signal.SIGINT)
    assert run(*words, "--json", monkeypatch=monkeypatch) == 0
    script = json.loads(capsys.readouterr().out)["job_script"].splitlines()
    assert {"#SBATCH -p gpu", "#SBATCH --cpus-per-task=8", "#SBATCH --mem=32G", "#SBATCH -t 02:00:00"} <= set(script)
    assert {"#SBATCH --gres=gpu:1", "module load python", "export OMP_NUM_THREADS=8"} <= set(script)
    assert any("dask_worker tcp://" in line and "--nthreads 1" in line for line in script)
    assert any(line.startswith(f"#SBATCH -o {tmp_path}/out/logs/") for line in script)
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is interrupted  # dask_jobqueue would have Ctrl-C exit with 0


def test_slurm_that_is_not_here_is_said(trained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with refused("no sbatch here"):
        api.predict_archive(trained, draw_archive(tmp_path, good=1), tmp_path / "out", scheduler="slurm")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheduler": "pbs"}, ["scheduler 'pbs'", "local, slurm", "tcp://"]),
        ({"scheduler": "tcp://"}, ["scheduler 'tcp://'"]),
        ({"scheduler": "tcp://127.0.0.1:1", "jobs": 2}, ["jobs=2", "workers of its own"]),
        ({"jobs": 0}, ["jobs=0", "at least 1"]),
        ({"options": ["queue=x"]}, ["--set-cluster is for --scheduler slurm"]),
        ({"scheduler": "slurm", "options": ["que=x"]}, ["option 'que'", "queue"]),
        ({"scheduler": "slurm", "options": ["queue"]}, ["not key=value"]),
        ({"scheduler": "slurm", "options": ["cores=many"]}, ["cores=many"]),
    ],
)
def test_a_scheduler_that_there_is_not_is_refused(trained: Path, tmp_path: Path, given: dict, said: list[str]) -> None:
    with refused(*said):
        api.predict_archive(trained, tmp_path / "none.csv", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_scheduler_that_does_not_answer_is_said(trained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(clusters, "_CONNECT_S", 0.5)
    address = f"tcp://127.0.0.1:{free_port()}"
    manifest = draw_archive(tmp_path, good=1)
    with refused(address, "no dask scheduler", "1 slides are left", "the same command goes on"):
        api.predict_archive(trained, manifest, tmp_path / "out", scheduler=address, patience_s=0.1)
    assert list(pd.read_csv(tmp_path / "out" / "slides.csv")["state"]) == ["left"]
    with refused(address, "no dask scheduler answers"):
        api.plan_archive(trained, manifest, scheduler=address)


def test_a_missing_extra_is_named(trained: Path, tmp_path: Path, monkeypatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dask_jobqueue" else there(name))
    with refused("hifusion[cluster]"):
        api.predict_archive(trained, tmp_path / "none.csv", tmp_path / "out")


def test_workers_that_cannot_start_are_said_and_not_started_for_ever(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with refused("a worker process cannot start"), clusters.opened("local", workers=1, logs=tmp_path) as cluster:
        wait_until(lambda: cluster.mend() is not None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slide.png", "--slides", "{manifest}"], "SOURCE"),
        (["--slides", "{manifest}", "--mpp", "5"], "write it into the manifest"),
        (["--slides", "{manifest}"], "-o"),
        (["--slides", "none.csv"], "no such manifest"),
        ([], "--slides"),
        (["slide.png", "-j", "2"], "--slides"),
    ],
)
def test_words_that_do_not_belong_together_are_refused(
    trained: Path, tmp_path, words, said, monkeypatch, capsys
) -> None:
    manifest = draw_archive(tmp_path, good=1)
    out = [] if said == "-o" else ["-o", tmp_path / "out"]
    told = [word.format(manifest=manifest) for word in words]
    assert run("predict", trained, *told, *out, monkeypatch=monkeypatch) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(trained: Path, tmp_path: Path) -> None:
    manifest = draw_archive(tmp_path / "a", good=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with refused("holds no archive"):
        api.predict_archive(trained, manifest, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
