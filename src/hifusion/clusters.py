"""Workers by the name of who lends them: this machine, a dask scheduler that is there, or SLURM.

A worker of this machine is started as ``python -m hifusion.clusters ADDRESS``. Between its own processes dask pickles
what it sends, here paths and plain values: whoever reaches a scheduler or a worker can run code there.
"""

import asyncio
import importlib.util
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hifusion.errors import InputError, plain, refuse_unknown
from hifusion.processes import cores, end_with_starter, gpus, shared_environment

SCHEDULERS = "local, slurm, or the address of a dask scheduler, tcp://host:port"
ADDRESSES = ("tcp://", "tls://")
# What --set-cluster may say, and what is asked for where it does not; dask's own configuration file has the rest.
SLURM_OPTIONS: dict[str, str | None] = {
    "queue": None,
    "account": None,
    "walltime": "24:00:00",
    "cores": "4",
    "memory": "8GiB",
    "gres": None,
    "interface": None,
    "prologue": None,
}
_LOOPBACK = "127.0.0.1"
_CONNECT_S = 5.0
_SHORT_LIFE_S = 10.0
_MOST_SHORT_LIVES = 3


@dataclass(frozen=True)
class Cluster:
    """A scheduler with workers.

    Attributes
    ----------
    address
        Of the scheduler.
    mend
        To be called now and then: starts workers anew that have ended.
    """

    address: str
    mend: Callable[[], None] = field(default=lambda: None)


class Lost(Exception):
    """A scheduler that does not answer, or answers no more."""


@contextmanager
def opened(scheduler: str, *, workers: int | None = None, options: Sequence[str] = (), logs: Path) -> Iterator[Cluster]:
    """The cluster of that name while the block lasts.

    Parameters
    ----------
    scheduler
        One of ``SCHEDULERS``.
    workers
        Processes to start, or jobs to ask SLURM for; :func:`default_workers` where None.
    options
        ``key=value`` of ``SLURM_OPTIONS``.
    logs
        Folder for what workers say.

    Raises
    ------
    InputError
        As :func:`check`; workers that cannot start.
    """
    check(scheduler, workers, options)
    if scheduler.startswith(ADDRESSES):
        yield Cluster(scheduler)
        return
    start = {"local": _local, "slurm": _slurm}[scheduler]
    with start(workers or default_workers(scheduler), options, logs) as cluster:
        yield cluster


def check(scheduler: str, workers: int | None = None, options: Sequence[str] = ()) -> None:
    """Refuse a scheduler that there is not, and what it does not take.

    Raises
    ------
    InputError
        An unknown scheduler or option; a number of workers for a scheduler that has its own; the extra is missing.
    """
    if scheduler not in ("local", "slurm") and not (scheduler.startswith(ADDRESSES) and scheduler[6:]):
        raise InputError(f"scheduler {plain(scheduler)!r} is unknown; give {SCHEDULERS}")
    if workers is not None and workers < 1:
        raise InputError(f"jobs={workers} is not possible; use at least 1")
    if workers is not None and scheduler.startswith(ADDRESSES):
        raise InputError(f"jobs={workers}: {scheduler} has workers of its own; start more there, or leave -j out")
    if options and scheduler != "slurm":
        raise InputError(f"--set-cluster is for --scheduler slurm; {scheduler} takes none")
    slurm_options(options)
    # Looked for and not imported: importing dask_jobqueue takes over Ctrl-C.
    if any(importlib.util.find_spec(package) is None for package in ("distributed", "dask_jobqueue")):
        raise InputError(
            "--slides needs dask distributed and dask-jobqueue, which are not installed; run `pip install "
            "'hifusion[cluster]'`"
        )


def default_workers(scheduler: str) -> int:
    """One worker a GPU, or a core where there is no GPU; one job of SLURM."""
    return 1 if scheduler == "slurm" else gpus() or cores()


def slurm_options(options: Sequence[str]) -> dict[str, str | None]:
    """``key=value`` texts over the defaults.

    Raises
    ------
    InputError
        Not ``key=value``, or an unknown key.
    """
    found = dict(SLURM_OPTIONS)
    for text in options:
        key, _, value = text.partition("=")
        if not (key and value):
            raise InputError(f"--set-cluster {plain(text)!r} is not key=value; write for example queue=normal")
        refuse_unknown("option", [key], SLURM_OPTIONS, "what --set-cluster takes")
        if key == "cores" and not (value.isdecimal() and int(value)):
            raise InputError(f"--set-cluster cores={plain(value)} is not possible; give a whole number above 0")
        found[key] = value
    return found


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """A client of the scheduler there.

    Raises
    ------
    Lost
        Nobody answers.
    """
    from distributed import Client

    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # a lost scheduler is told in one line here
    try:
        client = Client(address, timeout=_CONNECT_S, set_as_default=False)
    except OSError as error:
        raise Lost(address) from error
    try:
        yield client
    finally:
        client.close(timeout=_CONNECT_S)


def workers_of(client: Any) -> int:
    """Worker processes that a client's scheduler has; none where it was lost this moment."""
    return int(client.scheduler_info(n_workers=0).get("n_workers", 0))


def count_workers(address: str) -> int:
    """Worker processes of the scheduler there.

    Raises
    ------
    InputError
        Nobody answers.
    """
    try:
        with connected(address) as client:
            return workers_of(client)
    except Lost as error:
        raise InputError(f"{address}: no dask scheduler answers there; start one with `dask scheduler`") from error


@contextmanager
def _local(workers: int, options: Sequence[str], logs: Path) -> Iterator[Cluster]:
    """A scheduler in this process, heard on this machine only, and worker processes that end with it."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=0, processes=True, host=_LOOPBACK, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as scheduler:
        pool = _Pool(scheduler.scheduler_address, workers, logs)
        try:
            pool.mend()
            yield Cluster(scheduler.scheduler_address, pool.mend)
        finally:
            pool.end()


class _Pool:
    """Worker processes of this machine, each with its part of cores and GPUs."""

    def __init__(self, address: str, workers: int, logs: Path) -> None:
        self.address, self.workers, self.logs = address, workers, logs
        self.running: dict[int, tuple[subprocess.Popen[bytes], float]] = {}
        self.short_lives = 0
        logs.mkdir(parents=True, exist_ok=True)

    def mend(self) -> None:
        for slot in range(self.workers):
            process, since = self.running.get(slot, (None, 0.0))
            if process is None or process.poll() is not None:
                if process is not None:
                    self._refuse_short_lives(process, time.monotonic() - since, slot)
                self.running[slot] = self._start(slot), time.monotonic()

    def _refuse_short_lives(self, process: "subprocess.Popen[bytes]", lived_s: float, slot: int) -> None:
        """A worker that ends by itself as soon as it is started would be started for ever."""
        by_itself = (process.returncode or 0) >= 0
        self.short_lives = self.short_lives + 1 if by_itself and lived_s < _SHORT_LIFE_S else 0
        if self.short_lives >= _MOST_SHORT_LIVES:
            words = self._log(slot).read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise InputError(
                f"a worker process cannot start; the last it said: {plain(words[-1], 200)} ({self._log(slot)})"
            )

    def _log(self, slot: int) -> Path:
        return self.logs / f"worker-{slot}.log"

    def _start(self, slot: int) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "hifusion.clusters", self.address]
        environment = shared_environment(self.workers, slot)
        with self._log(slot).open("ab") as said:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment)

    def end(self) -> None:
        for process, _ in self.running.values():
            process.kill()
        for process, _ in self.running.values():
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


@contextmanager
def _slurm(workers: int, options: Sequence[str], logs: Path) -> Iterator[Cluster]:
    """A scheduler in this process and a job of SLURM for each worker; a job that ends is asked for again."""
    if shutil.which("sbatch") is None:
        raise InputError("--scheduler slurm: there is no sbatch here; run this where jobs are submitted to SLURM")
    with _slurm_cluster(options, logs) as cluster:
        cluster.adapt(minimum_jobs=workers, maximum_jobs=workers)  # scale() would not replace a job that has ended
        yield Cluster(cluster.scheduler_address)


def slurm_script(options: Sequence[str], logs: Path) -> str:
    """What is submitted to SLURM for one worker; SLURM need not be there."""
    # The folder of logs is made at once; where nothing is to be written it is another.
    with tempfile.TemporaryDirectory() as elsewhere, _slurm_cluster(options, Path(elsewhere)) as cluster:
        return str(cluster.job_script()).replace(elsewhere, str(logs))


def _slurm_cluster(options: Sequence[str], logs: Path) -> Any:
    interrupted = signal.getsignal(signal.SIGINT)
    from dask_jobqueue import SLURMCluster

    signal.signal(signal.SIGINT, interrupted)  # dask_jobqueue 0.9 makes Ctrl-C end a program as if all were well
    its = slurm_options(options)
    threads = int(its["cores"] or 1)
    return SLURMCluster(
        n_workers=0,
        queue=its["queue"],
        account=its["account"],
        walltime=its["walltime"],
        cores=1,  # slides at a time in a job; its network takes all the cores of the job
        processes=1,
        job_cpu=threads,
        memory=its["memory"],
        interface=its["interface"],
        job_extra_directives=[f"--gres={its['gres']}"] if its["gres"] else [],
        job_script_prologue=[
            *([its["prologue"]] if its["prologue"] else []),
            f"export OMP_NUM_THREADS={threads}",  # a worker of dask has one thread otherwise
        ],
        log_directory=str(logs),
        silence_logs=logging.CRITICAL,
        scheduler_options={"dashboard": False, "dashboard_address": f"{_LOOPBACK}:0"},
    )


async def _work(address: str) -> None:
    from distributed import Worker

    # One slide at a time, and no limit of memory: the machine's own is the limit, and nothing is kept in a worker.
    worker = Worker(address, nthreads=1, host=_LOOPBACK, memory_limit=0, dashboard=False)
    async with worker:
        await worker.finished()


def main(arguments: Sequence[str]) -> None:
    """What ``python -m hifusion.clusters ADDRESS`` does: work for a scheduler on this machine until it is gone."""
    end_with_starter()
    from hifusion import slide_jobs  # noqa: F401  # loaded before the first slide comes

    asyncio.run(_work(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
