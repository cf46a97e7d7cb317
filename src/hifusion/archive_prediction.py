"""A run and an archive of slides: each predicted once by the workers of a cluster, into one folder.

::

    archive.json      what was asked for
    slides/<name>/    a slide's prediction and its state (hifusion.slide_jobs)
    slides.csv        a row a slide: state, reason, spots, tissue, novelty, time
    index.html        the same to look at, failed slides first
    thumbnails/       its pictures
    logs/             what workers said

The same command goes on: it does what is not done, and what failed it tries again.
"""

import itertools
import random
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hifusion import clusters, files
from hifusion.archive_page import archive_table, write_page
from hifusion.checkpoint import Run
from hifusion.errors import InputError, plain
from hifusion.manifest import read_manifest
from hifusion.processes import so_many_threads, threads_each
from hifusion.slide import Slide
from hifusion.slide_jobs import (
    ARCHIVE,
    BUSY,
    FAILED,
    UNFIT,
    SlideJob,
    attempts,
    do_slide,
    give_up,
    is_done,
    read_state,
    run_key,
    values,
)

PATIENCE_S = 300.0  # a scheduler that is started anew on another machine takes minutes
_FIRST_PATIENCE_S = 20.0  # where nobody ever answered, the address is wrong
_POLL_S = 0.2
_GATHER_S = 10.0
_ASKED_EACH = 2  # slides at a worker: one in work, one that waits
_BUSY_S = 2.0  # before a slide that another process has is asked for again
_PROBES_S = 10.0
_PICTURES_S = 1.5  # drawing and writing, which the probes leave out; measured on small slides

Progress = Callable[[str, int, int], None]  # (what is going on, slides done, slides in all)


class Outcome(NamedTuple):
    """What came of an archive."""

    table: pd.DataFrame
    """From :func:`hifusion.archive_page.archive_table`."""
    failed: dict[str, str]
    """Name -> reason."""


def predict_archive(
    run: Path,
    manifest: Path,
    out: Path,
    *,
    scheduler: str = "local",
    jobs: int | None = None,
    options: Sequence[str] = (),
    average_symmetries: bool = False,
    int8: bool = False,
    workers: int = 0,
    most_attempts: int = 3,
    patience_s: float = PATIENCE_S,
    progress: Progress | None = None,
) -> Outcome:
    """Predict every slide of a manifest that is not yet predicted, and leave a folder (see the head of this module).

    Parameters
    ----------
    manifest
        See :func:`hifusion.manifest.read_manifest`.
    out
        Folder. It, the run and the slides have to be seen by the workers under the same paths.
    scheduler, jobs, options
        See :func:`hifusion.clusters.opened`.
    average_symmetries, int8, workers
        See :func:`hifusion.prediction.predict_section`.
    most_attempts
        How often a slide may take its worker down with it, or end in an error that is not the slide's, before it is
        marked as failed.
    patience_s
        How long a scheduler that was lost is waited for.

    Raises
    ------
    InputError
        A run, manifest or folder that cannot be used; a worker that does not see them; a scheduler that is gone.
    """
    clusters.check(scheduler, jobs, options)
    out = Path(out)
    slides = archive_jobs(run, manifest, out, average_symmetries=average_symmetries, int8=int8, workers=workers)
    _refuse_foreign(out)
    files.write_json(out / ARCHIVE, {"format": 1, "run": str(run), "manifest": str(manifest)})
    done = {job.name: read_state(job) or {} for job in slides if is_done(job)}
    work = _Work(
        {job.name: job for job in slides if job.name not in done}, done, secrets.token_hex(4), most_attempts, progress
    )
    try:
        _work_off(work, patience_s, scheduler, jobs, options, out / "logs")
    finally:  # stopped or not, what there is can be looked at
        work.look()
        table = archive_table(slides, work.states)
        write_page(out, table, Run.open(run).id)
    failed = table[table["state"] == FAILED]
    return Outcome(table, dict(zip(failed["name"], failed["reason"], strict=True)))


def archive_jobs(
    run: Path, manifest: Path, out: Path, *, average_symmetries: bool = False, int8: bool = False, workers: int = 0
) -> list[SlideJob]:
    """The slides of a manifest as jobs; arguments as :func:`predict_archive`.

    Raises
    ------
    InputError
        A run or a manifest that cannot be used.
    """
    spots = Run.open(run).facts.get("spots")
    if spots is None:
        raise InputError(f"{run}: the run does not say how far apart its training spots were; train it anew")
    key = run_key(Path(run))
    return [
        SlideJob(
            run=str(Path(run).absolute()),
            run_key=key,
            out=str(Path(out).absolute()),
            name=row.name,
            slide=str(row.slide),
            mpp=row.mpp,
            mask=str(row.mask) if row.mask else None,
            lattice=row.lattice,
            stride_um=row.stride_um,
            average_symmetries=average_symmetries,
            int8=int8,
            workers=workers,
        )
        for row in read_manifest(manifest, spots["pitch_um"])
    ]


def _refuse_foreign(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ARCHIVE).exists())):
        raise InputError(f"{out}: is not empty and holds no archive of slides; give a new folder")


@dataclass
class _Work:
    """What is left to do for one command, and what came of the rest."""

    left: dict[str, SlideJob]
    states: dict[str, dict[str, Any]]
    command: str
    most_attempts: int
    progress: Progress | None
    errors: dict[str, int] = field(default_factory=dict)
    heard: float | None = None  # when the scheduler was last there

    def end(self, name: str, state: dict[str, Any]) -> None:
        self.states[name] = state
        del self.left[name]

    def look(self) -> None:
        """Take in what was done unheard: the scheduler was lost with the word of it."""
        for name, job in list(self.left.items()):
            if is_done(job):
                self.end(name, read_state(job) or {})

    def report(self, what: str) -> None:
        if self.progress:
            self.progress(what, len(self.states), len(self.states) + len(self.left))


def _work_off(
    work: _Work, patience_s: float, scheduler: str, jobs: int | None, options: Sequence[str], logs: Path
) -> None:
    """Until nothing is left; a scheduler that is lost is waited for, and given the rest again."""
    began = time.monotonic()
    while work.left:
        try:
            with (
                clusters.opened(scheduler, workers=jobs, options=options, logs=logs) as cluster,
                clusters.connected(cluster.address) as client,
            ):
                _follow(work, cluster, client)
        except clusters.Lost as error:
            work.look()
            since, patience = (work.heard, patience_s) if work.heard else (began, min(patience_s, _FIRST_PATIENCE_S))
            if time.monotonic() - since > patience:
                raise InputError(
                    f"{scheduler}: no dask scheduler has answered there for {patience:g} s, {len(work.left)} slides "
                    "are left; start it again, with workers, then the same command goes on"
                ) from error
            work.report("waiting for the scheduler")
            time.sleep(_POLL_S)


def _follow(work: _Work, cluster: clusters.Cluster, client: Any) -> None:
    """Ask for what is left and take in what comes of it, while the scheduler is there."""
    asked: dict[str, Any] = {}
    not_before: dict[str, float] = {}
    while work.left:
        cluster.mend()
        now = time.monotonic()
        workers = clusters.workers_of(client)
        # Few more than can be done: a worker that is killed puts all that waits for it under suspicion.
        room = _ASKED_EACH * max(1, workers) - len(asked)
        ready = (name for name in work.left if name not in asked and now >= not_before.get(name, 0.0))
        for name in list(itertools.islice(ready, max(0, room))):
            key = f"slide-{work.command}-{name}-{secrets.token_hex(4)}"
            given = values(work.left[name]), work.command, work.most_attempts
            asked[name] = client.submit(do_slide, *given, key=key, pure=False)
        for name in [name for name, future in asked.items() if future.status != "pending"]:
            future = asked.pop(name)
            if future.status == "finished":
                not_before[name] = now + _BUSY_S if _take_in(work, name, future) == BUSY else now
            elif future.status == "error":
                _take_in_error(work, name, future.exception(timeout=_GATHER_S))
            # Else it is cancelled or lost: the scheduler was, or is asked again.
        if client.status != "running":
            raise clusters.Lost(cluster.address)
        work.heard = now
        work.report(f"slides, {workers} workers" if workers else "slides, no worker is there yet")
        time.sleep(_POLL_S)


def _take_in(work: _Work, name: str, future: Any) -> str:
    """What a worker said of a slide; its word."""
    try:
        state: dict[str, Any] = future.result(timeout=_GATHER_S)
    except (OSError, CancelledError):  # the worker was lost with its answer, or is slow to give it
        return BUSY
    if state["state"] == UNFIT:
        raise InputError(
            f"{plain(state['reason'], 400)}; every worker has to see the run, the slides and the results under the "
            "same paths as this command, and to have the same hifusion"
        )
    if state["state"] != BUSY:
        work.end(name, state)
    return str(state["state"])


def _take_in_error(work: _Work, name: str, error: BaseException) -> None:
    """A slide that took its worker down, or broke for a reason that is not its own: asked for again, a few times."""
    from distributed import KilledWorker

    if isinstance(error, InputError):  # of the place where results go, not of the slide
        raise error
    work.errors[name] = work.errors.get(name, 0) + 1
    tried = max(work.errors[name], attempts(work.left[name], work.command))
    if tried >= work.most_attempts:
        killed = isinstance(error, KilledWorker)
        said = "too little memory?" if killed else f"{type(error).__name__}: {error}"
        how = "its process was ended from outside" if killed else "it ended in an error"
        state = give_up(work.left[name], work.command, plain(f"{how} {tried} times; {said}", 400))
        if state["state"] != BUSY:
            work.end(name, state)


def plan_archive(
    run: Path,
    manifest: Path,
    out: Path | None = None,
    *,
    scheduler: str = "local",
    jobs: int | None = None,
    options: Sequence[str] = (),
    average_symmetries: bool = False,
    int8: bool = False,
    workers: int = 0,
) -> dict[str, Any]:
    """What an archive will cost, from about ten seconds of planning some of its slides; nothing is written.

    Every slide is opened, which reads its header. Arguments as :func:`predict_archive`.

    Returns
    -------
    dict
        Counts of slides, those that cannot be opened, and for what is left: ``minutes`` with so many workers,
        ``memory_gib_each`` (of a worker) and ``disk_gib``; ``job_script`` where SLURM is asked.

    Raises
    ------
    InputError
        A run or manifest that cannot be used; a scheduler that does not answer.
    """
    clusters.check(scheduler, jobs, options)
    place = Path(out) if out else Path("archive")
    slides = archive_jobs(run, manifest, place, average_symmetries=average_symmetries, int8=int8, workers=workers)
    left = [job for job in slides if not is_done(job)]
    areas, broken = _areas_mm2(left)
    there = scheduler.startswith(clusters.ADDRESSES)
    count = clusters.count_workers(scheduler) if there else jobs or clusters.default_workers(scheduler)
    threads = threads_each(count) if scheduler == "local" else int(clusters.slurm_options(options)["cores"] or 1)
    with so_many_threads(1 if there else threads):
        probes = _probe([job for job in left if job.name in areas], broken)
    probed = sum(areas[name] for name in probes)
    scale = sum(area for name, area in areas.items() if name not in broken) / probed if probed else 0.0
    told = {
        "slides": len(slides),
        "done": len(slides) - len(left),
        "left": len(left),
        "fail_now": [f"{name} ({reason})" for name, reason in broken.items()],
        "workers": count,
        "probed": len(probes),
        "spots": round(scale * sum(facts["spots"] for _, facts in probes.values())),
        "minutes": round(scale * sum(seconds for seconds, _ in probes.values()) / 60 / max(1, count), 2),
        "memory_gib_each": max((facts["memory_gib"] for _, facts in probes.values()), default=0.0),
        "disk_gib": round(scale * sum(facts["disk_mib"] for _, facts in probes.values()) / 1024, 2),
        "free_disk_gib": round(shutil.disk_usage(_existing(place)).free / 2**30, 1),
    }
    if scheduler == "slurm":
        told["job_script"] = clusters.slurm_script(options, place / "logs")
    return told


def _areas_mm2(slides: Iterable[SlideJob]) -> tuple[dict[str, float], dict[str, str]]:
    """By name: the area of every slide that opens, and why others do not."""
    areas, broken = {}, {}
    for job in slides:
        try:
            with Slide(Path(job.slide), job.mpp) as slide:
                areas[job.name] = slide.size_px[0] * slide.size_px[1] * (slide.require_mpp() / 1000) ** 2
        except InputError as error:
            broken[job.name] = plain(error, 200)
    return areas, broken


def _probe(slides: list[SlideJob], broken: dict[str, str]) -> dict[str, tuple[float, dict[str, Any]]]:
    """Seconds and plan of some slides in an order by chance, by name; one that cannot be planned joins ``broken``."""
    probes: dict[str, tuple[float, dict[str, Any]]] = {}
    until = time.monotonic() + _PROBES_S
    for job in random.Random(0).sample(slides, len(slides)):
        if time.monotonic() >= until:
            break
        started = time.monotonic()
        try:
            facts = job.plan().facts
        except InputError as error:
            broken[job.name] = plain(error, 200)
            continue
        planning = time.monotonic() - started
        probes[job.name] = planning + facts["spots"] / facts["spots_per_s"] + _PICTURES_S, facts
    return probes


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
