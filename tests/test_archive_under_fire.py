"""An archive of slides under fire: workers killed, schedulers lost, slides broken; each is done once all the same."""

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import pytest

from archives_of_slides import (
    BROKEN,
    PROGRAM,
    draw_archive,
    environment,
    finished,
    free_port,
    killing,
    log_of,
    scheduler_with_worker,
    wait_until,
)
from fabricate import refused
from hifusion import api
from hifusion.section import read_section
from hifusion.slide_jobs import DONE, FAILED, LOG
from test_slide_prediction import MPP
from views import fit_small

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_small(tmp_path_factory.mktemp("trained") / "run").root


class Chaos(NamedTuple):
    """Sixty slides of which six are broken, and a worker killed for every four that are done."""

    root: Path
    code: int
    said: str
    hit: list[str]


@pytest.fixture(scope="module")
def chaos(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    root = tmp_path_factory.mktemp("chaos")
    manifest = draw_archive(root, good=54, broken=6, stride_um=80.0)
    words = ["predict", str(trained), "--slides", str(manifest), "-o", str(root / "out"), "-j", "2"]
    with killing(root / "out", every=4) as hit:
        done = subprocess.run([*PROGRAM, *words], env=environment(), capture_output=True, text=True, check=False)
    return Chaos(root, done.returncode, done.stderr, hit)


def test_under_fire_every_good_slide_is_done_once_and_every_broken_one_named(chaos: Chaos) -> None:
    assert chaos.code == 3
    table = pd.read_csv(chaos.root / "out" / "slides.csv").set_index("name")
    assert len(table) == 60
    good = [name for name in table.index if name.startswith("good")]
    assert (table.loc[good, "state"] == DONE).all()
    for number in range(6):
        assert table.loc[f"broken{number}", "state"] == FAILED
        assert f"failed: broken{number}: " in chaos.said
        assert BROKEN[f"broken{number % 4}"] in table.loc[f"broken{number}", "reason"]
    assert len(chaos.hit) >= 10
    for name in good:
        assert log_of(chaos.root / "out", name) == ["begun"] * (1 + chaos.hit.count(name)) + [DONE], name
        assert table.loc[name, "attempts"] == 1 + chaos.hit.count(name)


def test_under_fire_predictions_are_those_of_peace(chaos: Chaos) -> None:
    """All good slides are one picture: those that were killed amid it have the rows of those that were not."""
    out = chaos.root / "out"
    (first, *others) = (read_section(out / "slides" / f"good{number}" / "section.h5ad").X for number in range(54))
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert not list(out.glob("slides/*/.section*"))


def test_a_slide_corrupted_between_two_runs_is_the_only_one_touched(chaos: Chaos, trained: Path) -> None:
    out, before = chaos.root / "out", finished(chaos.root / "out")
    slide = chaos.root / "slides" / "good7.png"
    slide.write_bytes(slide.read_bytes()[:5000])
    found = api.predict_archive(trained, chaos.root / "manifest.csv", out, jobs=1)
    assert "not a readable image" in found.failed["good7"] and len(found.failed) == 7
    assert finished(out) == {name: when for name, when in before.items() if name != "good7"}


def test_a_slide_that_takes_every_worker_down_is_named_and_the_others_done(trained: Path, tmp_path: Path) -> None:
    """Its mask is a pipe nobody writes to: whoever opens it hangs, and is killed."""
    manifest = draw_archive(tmp_path, good=2)
    os.mkfifo(tmp_path / "mask.png")
    lines = manifest.read_text().splitlines()
    manifest.write_text("slide,mpp,mask\n" + "".join(f"{line.rstrip(',')},\n" for line in lines[1:]))
    with manifest.open("a") as file:
        file.write(f"slides/poison.png,{MPP},mask.png\n")
    shutil.copy(tmp_path / "slides/good0.png", tmp_path / "slides/poison.png")
    log = tmp_path / "out/slides/poison" / LOG

    def kill(stop: threading.Event) -> None:
        while not stop.wait(1.0):
            lines = log.read_text().splitlines() if log.exists() else []
            if lines and lines[-1].startswith("begun"):
                pid = int(lines[-1].rpartition(":")[2])
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)

    stop = threading.Event()
    thread = threading.Thread(target=kill, args=(stop,))
    thread.start()
    try:
        found = api.predict_archive(trained, manifest, tmp_path / "out", jobs=2)
    finally:
        stop.set()
        thread.join()
    assert found.failed.keys() == {"poison"} and "ended from outside 3 times" in found.failed["poison"]
    assert (found.table["state"] == DONE).sum() == 2


def test_a_scheduler_restarted_amid_the_work_gets_the_rest(trained: Path, tmp_path: Path) -> None:
    """A real scheduler and worker of dask, killed when two slides are done; started again, under the same address."""
    manifest, port = draw_archive(tmp_path, good=6, broken=1, stride_um=40.0), free_port()
    words = ["predict", str(trained), "--slides", str(manifest), "-o", str(tmp_path / "out")]
    out = tmp_path / "out"
    with scheduler_with_worker(port):
        program = subprocess.Popen([*PROGRAM, *words, "--scheduler", f"tcp://127.0.0.1:{port}"], env=environment())
        wait_until(lambda: len(finished(out)) >= 2 or program.poll() is not None)
    before = finished(out)
    assert program.poll() is None and len(before) < 6
    with scheduler_with_worker(port):
        assert program.wait(timeout=200) == 3
    after = finished(out)
    assert len(after) == 6 and {name: after[name] for name in before} == before
    assert all(log_of(out, name).count(DONE) == 1 for name in after)


def test_a_scheduler_that_stays_away_ends_the_command_and_the_same_goes_on(trained: Path, tmp_path: Path) -> None:
    manifest, port, out = draw_archive(tmp_path, good=4, stride_um=40.0), free_port(), tmp_path / "out"
    address = f"tcp://127.0.0.1:{port}"
    said: list[BaseException] = []

    def predict() -> None:
        try:
            api.predict_archive(trained, manifest, out, scheduler=address, patience_s=3.0)
        except Exception as error:  # noqa: BLE001  # handed to the test's own thread
            said.append(error)

    thread = threading.Thread(target=predict)
    with scheduler_with_worker(port):
        thread.start()
        wait_until(lambda: len(finished(out)) >= 1 or not thread.is_alive())
    thread.join(timeout=60)
    before = finished(out)
    with refused(address, "no dask scheduler has answered", "the same command goes on"):
        raise said[0]
    states = list(pd.read_csv(out / "slides.csv")["state"])
    assert 0 < states.count("left") < 4
    assert api.predict_archive(trained, manifest, out, jobs=1).failed == {}
    after = finished(out)
    assert len(after) == 4 and {name: after[name] for name in before} == before


def test_jobs_of_slurm_do_the_work_and_are_asked_for_again(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Not SLURM itself: an `sbatch` that runs the very job script here. The first job is ended amid the work."""
    tools = {  # the script is read at once: dask_jobqueue deletes it when sbatch has answered
        "sbatch": 'job=$(cat "$1"); setsid bash -c "$job" >/dev/null 2>&1 &\necho "Submitted batch job $!"\n'
        f"echo $! >>{tmp_path}/jobs",
        "scancel": 'for job in "$@"; do kill -9 -- -$job; done',
    }
    for name, text in tools.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    manifest, out = draw_archive(tmp_path, good=5, broken=1, stride_um=40.0), tmp_path / "out"

    def end_first_job() -> None:
        wait_until(lambda: len(finished(out)) >= 2)
        os.killpg(int((tmp_path / "jobs").read_text().split()[0]), signal.SIGKILL)

    thread = threading.Thread(target=end_first_job)
    thread.start()
    found = api.predict_archive(
        trained, manifest, out, scheduler="slurm", jobs=1, options=["memory=4GiB", "cores=1", "interface=lo"]
    )
    thread.join()
    assert found.failed.keys() == {"broken0"}
    assert len((tmp_path / "jobs").read_text().split()) >= 2
    assert all(log_of(out, f"good{number}").count(DONE) == 1 for number in range(5))
