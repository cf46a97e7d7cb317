"""Processes that share a machine have their part of it, and none is left behind."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from archives_of_slides import environment, wait_until
from hifusion import locks, processes


@pytest.mark.parametrize(("cores", "many", "threads"), [(8, 1, "8"), (8, 3, "2"), (2, 4, "1")])
def test_cores_are_shared_out(monkeypatch, cores: int, many: int, threads: str) -> None:
    monkeypatch.setattr(processes, "cores", lambda: cores)
    found = processes.shared_environment(many, 0)
    assert found["OMP_NUM_THREADS"] == threads
    assert many == 1 or found["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(("gpus", "seen"), [(0, [None] * 3), (1, [None] * 3), (2, ["0", "1", "0"])])
def test_gpus_are_taken_in_turn_where_there_are_several(monkeypatch, gpus: int, seen: list[str | None]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes, "gpus", lambda: gpus)
    assert [processes.shared_environment(3, slot).get("CUDA_VISIBLE_DEVICES") for slot in range(3)] == seen


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with processes.so_many_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("watched", [True, False])
def test_a_process_ends_with_its_starter_where_that_wants_it(watched: bool) -> None:
    command = "from hifusion.processes import end_with_starter; import time; end_with_starter(); time.sleep(3)"
    given = {**environment(), **({processes.WATCH: "1"} if watched else {})}
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE, env=given)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=60) == (1 if watched else 0)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = (
        "import sys, time; from pathlib import Path; from hifusion.locks import held\n"
        "with held(Path(sys.argv[1])): time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "x")], env=environment())

    def taken() -> bool:
        with locks.held(tmp_path / "x") as log:
            return log is None

    wait_until(taken)
    holder.kill()
    holder.wait()
    assert not taken()
