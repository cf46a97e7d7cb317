"""Archives of small slides made by code, and processes that are killed while they predict them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from hifusion.slide_jobs import LOG, STATE
from test_slide_prediction import MPP, draw_slide

PATIENCE_S = 240
# Name -> what is said of it: cut short, no image, of unknown scale, without tissue.
BROKEN = {
    "broken0": "not a readable image",
    "broken1": "not a readable image",
    "broken2": "does not say how many um a pixel is",
    "broken3": "tissue",
}
PROGRAM = [sys.executable, "-c", "from hifusion.cli import main; main()"]


def environment() -> dict[str, str]:
    """As this process's, with the source under test found by others too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def draw_archive(root: Path, good: int, broken: int = 0, stride_um: float | None = None) -> Path:
    """A manifest of ``good<N>`` and of ``broken<N>``, in turn as those of ``BROKEN``."""
    (root / "slides").mkdir(parents=True)
    first = draw_slide(root / "slides" / "good0.png")
    stride = "" if stride_um is None else f"{stride_um:g}"
    lines = ["slide,mpp,stride_um"]
    for number in range(good):
        if number:
            shutil.copy(first, root / "slides" / f"good{number}.png")
        lines.append(f"slides/good{number}.png,{MPP},{stride}")
    for number in range(broken):
        path, kind = root / "slides" / f"broken{number}.png", number % 4
        if kind == 0:
            path.write_bytes(first.read_bytes()[:5000])
        elif kind == 1:
            path.write_text("a letter, no slide")
        elif kind == 2:
            shutil.copy(first, path)
        else:
            Image.fromarray(np.full((300, 300, 3), 240, np.uint8)).save(path)
        # Broken ones stand between the good ones, where they could do harm.
        lines.insert(1 + number * (1 + good // broken), f"slides/{path.name},{'' if kind == 2 else MPP},{stride}")
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root / "manifest.csv"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def log_of(out: Path, name: str) -> list[str]:
    """First words of a slide's log: begun, done, failed."""
    path = out / "slides" / name / LOG
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """Slide -> when its section and its state were written."""
    return {
        state.parent.name: (state.stat().st_mtime_ns, (state.parent / "section.h5ad").stat().st_mtime_ns)
        for state in out.glob(f"slides/*/{STATE}")
        if (state.parent / "section.h5ad").exists()
    }


def busy(out: Path) -> dict[str, int]:
    """Slide -> process that works on it now, where that is the first or second to do so."""
    found = {}
    for path in out.glob(f"slides/*/{LOG}"):
        lines = path.read_text().splitlines()
        if lines and lines[-1].startswith("begun") and len(lines) <= 2:
            pid = int(lines[-1].rpartition(":")[2])
            if alive(pid):
                found[path.parent.name] = pid
    return found


@contextmanager
def killing(out: Path, every: int) -> Iterator[list[str]]:
    """Kill a process that works on a slide each time that so many more are done; gives the slides that were hit.

    By slides and not by seconds: a busy machine would otherwise do nothing but start workers.
    """
    hit: list[str] = []
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(0.1):
            if len(finished(out)) >= every * (len(hit) + 1):
                for name, pid in list(busy(out).items())[:1]:
                    hit.append(name)
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield hit
    finally:
        stop.set()
        thread.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


@contextmanager
def scheduler_with_worker(port: int) -> Iterator[None]:
    """What a hospital would have: ``dask scheduler`` and ``dask worker``, both killed outright at the end."""
    words = (
        [
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--no-dashboard",
            "--dashboard-address",
            "127.0.0.1:0",
        ],
        ["worker", f"tcp://127.0.0.1:{port}", "--nthreads", "2", "--no-dashboard", "--host", "127.0.0.1"],
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dask", *its],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the worker's nanny and its process end together
        )
        for its in words
    ]
    try:
        wait_until(lambda: answers(port))
        yield
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
