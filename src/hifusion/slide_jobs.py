"""One slide of an archive, done once: locked, predicted, its state written last. In a worker, or as plain function.

The slide's folder holds what the prediction of a slide leaves (:mod:`hifusion.slide_prediction`), and::

    state.json     what came of it: done, or failed and why; written last
    .attempts.log  a line for every attempt that began or ended; who holds its lock works on the slide
"""

import errno
import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from hifusion import __version__, files, locks, slide_prediction
from hifusion.checkpoint import Run
from hifusion.errors import InputError, plain

ARCHIVE = "archive.json"  # marks the folder of an archive, which a worker has to see
STATE, LOG = "state.json", ".attempts.log"
LEAVES = ("plan.json", "tissue.png", "spots.csv", "overlay.png", "section.h5ad", "maps.png", "novelty.png")
PICTURES = ("overlay", "novelty")
DONE, FAILED, LEFT = "done", "failed", "left"
BUSY, UNFIT = "busy", "unfit"  # another process has the slide; this machine does not see run or archive
_FORMAT = 1
_THUMBNAIL_PX = 160
_ONE_AT_A_TIME = threading.Lock()  # a worker with many threads still has the memory and cores for one slide


@dataclass(frozen=True)
class SlideJob:
    """A slide to predict, in plain values that mean the same in every process of a cluster.

    Attributes
    ----------
    run, out, slide, mask
        Absolute paths: the run's folder, the archive's, the slide, its mask.
    run_key
        From :func:`run_key`.
    name, mpp, lattice, stride_um
        See :class:`hifusion.manifest.SlideRow`.
    average_symmetries, int8, workers
        See :func:`hifusion.prediction.predict_section`.
    version
        Of hifusion where the job was made: another one may predict otherwise.
    """

    run: str
    run_key: str
    out: str
    name: str
    slide: str
    mpp: float | None = None
    mask: str | None = None
    lattice: str | None = None
    stride_um: float | None = None
    average_symmetries: bool = False
    int8: bool = False
    workers: int = 0
    version: str = __version__

    @property
    def folder(self) -> Path:
        """Where the slide's prediction is left."""
        return Path(self.out) / "slides" / self.name

    def key(self) -> str:
        """Digest of all that decides the result: run, slide, mask, options and version."""
        slide, mask = Path(self.slide), Path(self.mask) if self.mask else None
        stat = slide.stat() if slide.is_file() else None
        of = [
            *(_FORMAT, self.version, self.run_key),
            *(self.slide, stat and stat.st_size, stat and stat.st_mtime_ns),
            *(self.mask, files.digest_file(mask) if mask and mask.is_file() else None),
            *(self.mpp, self.lattice, self.stride_um, self.average_symmetries, self.int8),
        ]
        return files.digest(json.dumps(of).encode())[:16]

    def plan(self) -> slide_prediction.SlidePlan:
        """What its prediction will do."""
        return slide_prediction.plan_slide(
            Run.open(Path(self.run)),
            Path(self.slide),
            mpp=self.mpp,
            mask=Path(self.mask) if self.mask else None,
            lattice=self.lattice,
            stride_um=self.stride_um,
            average_symmetries=self.average_symmetries,
            int8=self.int8,
            workers=self._readers,
        )

    @property
    def _readers(self) -> int:
        # A process that a nanny of dask started may start none itself.
        return 0 if multiprocessing.current_process().daemon else self.workers


def run_key(run: Path) -> str:
    """Digest of a run by content: its description, panel, weights and novelty."""
    names = ("run.json", "panel.json", "weights.safetensors", "novelty.safetensors")
    digests = [files.digest_file(run / name) if (run / name).is_file() else "" for name in names]
    return files.digest(json.dumps(digests).encode())[:16]


def read_state(job: SlideJob) -> dict[str, Any] | None:
    """What came of the slide when it was last ended; None where nothing did, or its results are not all there."""
    path = job.folder / STATE
    if not path.is_file():
        return None
    try:
        state = files.read_json(path)
    except InputError:  # damaged: as if it were not there
        return None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        return None
    return state if state["state"] != DONE or all((job.folder / name).is_file() for name in LEAVES) else None


def is_done(job: SlideJob) -> bool:
    """Whether the slide as it lies there now was predicted by the run as it is now."""
    state = read_state(job)
    return state is not None and state["state"] == DONE and state["key"] == job.key()


def do_slide(values: Mapping[str, Any], command: str, most_attempts: int) -> dict[str, Any]:
    """Predict a slide unless that is done, and give its state. A slide that cannot be predicted is a state too.

    Parameters
    ----------
    values
        Those of a :class:`SlideJob`, by name.
    command
        Names the command on whose behalf this is: a slide that failed is tried again by another.
    most_attempts
        How often one command may begin with the slide: each time but the last its process was ended from outside.

    Returns
    -------
    dict
        Plain values. Its ``state`` is ``DONE`` or ``FAILED``, as in the file; or ``BUSY`` where another process has the
        slide, or ``UNFIT`` where this machine does not see the archive or the run, or has another version; nothing was
        written then.

    Raises
    ------
    InputError
        The disk is full, or has no locks: what no slide is to blame for.
    """
    job = SlideJob(**values)
    if job.version != __version__:
        return {"state": UNFIT, "reason": f"{_here()} has hifusion {__version__}, not {job.version}"}
    if not (Path(job.out) / ARCHIVE).is_file():
        return {"state": UNFIT, "reason": f"{job.out}: is not there on {_here()}"}
    try:
        Run.open(Path(job.run))
    except InputError as error:
        return {"state": UNFIT, "reason": f"{error} (said by {_here()})"}
    with _ONE_AT_A_TIME, locks.held(job.folder / LOG) as log:
        if log is None:
            return {"state": BUSY}
        key, state = job.key(), read_state(job)
        # A task may come twice: its worker was thought lost, or was lost with the answer.
        if state and state["key"] == key and (state["state"] == DONE or state["command"] == command):
            return state
        begun = _begun(log)
        if begun.count(command) >= most_attempts:
            return _end(job, key, command, log, reason=_ended(most_attempts))
        _note(log, "begun", command)
        _clear(job, state, key)
        started = time.perf_counter()
        reason, facts = "", {}
        try:
            facts = _predict(job)
        except InputError as error:
            if _no_space(error):  # not the slide's fault, and every other slide's fate
                raise
            reason = plain(error, 400)
        return _end(job, key, command, log, reason, time.perf_counter() - started, facts)


def _no_space(error: InputError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def give_up(job: SlideJob, command: str, reason: str) -> dict[str, Any]:
    """Mark a slide as failed from outside; its state as it is where another process has it or it is done."""
    with locks.held(job.folder / LOG) as log:
        state = read_state(job)
        if log is None or (state and state["state"] == DONE and state["key"] == job.key()):
            return state or {"state": BUSY}
        return _end(job, job.key(), command, log, reason=reason)


def attempts(job: SlideJob, command: str) -> int:
    """How often a command began with the slide."""
    path = job.folder / LOG
    return path.read_bytes().count(f"begun {command} ".encode()) if path.is_file() else 0


def _ended(times: int) -> str:
    return f"its process was ended from outside {times} times; too little memory?"


def _here() -> str:
    return f"{platform.node()}:{os.getpid()}"


def _note(log: BinaryIO, what: str, command: str) -> None:
    log.write(f"{what} {command} {_here()}\n".encode())
    log.flush()


def _begun(log: BinaryIO) -> list[str]:
    """Commands that began with the slide since it last ended, one an attempt."""
    log.seek(0)
    found: list[str] = []
    for line in log.read().decode(errors="replace").splitlines():
        word, _, rest = line.partition(" ")
        found = [*found, rest.split(" ")[0]] if word == "begun" else []
    return found


def _clear(job: SlideJob, state: dict[str, Any] | None, key: str) -> None:
    """Take away what an earlier state stands for: of another slide or run it would be taken for this one's."""
    if state and state["key"] != key:
        for name in LEAVES:
            (job.folder / name).unlink(missing_ok=True)
        for what in PICTURES:
            (Path(job.out) / thumbnail(job.name, what)).unlink(missing_ok=True)
    (job.folder / STATE).unlink(missing_ok=True)


def _predict(job: SlideJob) -> dict[str, Any]:
    plan = job.plan()
    try:
        predicted = slide_prediction.predict_slide(
            Run.open(Path(job.run)),
            plan,
            job.folder,
            average_symmetries=job.average_symmetries,
            int8=job.int8,
            workers=job._readers,
        )
    finally:
        plan.slide.close()
    novelty = predicted.obs["novelty"]
    for what in PICTURES:
        _write_thumbnail(job.folder / f"{what}.png", Path(job.out) / thumbnail(job.name, what))
    told = {name: plan.facts[name] for name in ("spots", "genes", "tissue_mm2", "mpp", "spots_per_s")}
    return {
        **told,
        "novel_share": None if novelty.isna().all() else round(float((novelty > 1).mean()), 4),
        "warning": "" if plan.facts["warning"] == "none" else plan.facts["warning"],
    }


def thumbnail(name: str, what: str) -> str:
    """Place of a slide's thumbnail within the archive."""
    return f"thumbnails/{name}.{what}.jpg"


def _write_thumbnail(picture: Path, path: Path) -> None:
    data = BytesIO()
    with Image.open(picture) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    small.save(data, "JPEG", quality=80)
    files.write_bytes(path, data.getvalue())


def _end(
    job: SlideJob,
    key: str,
    command: str,
    log: BinaryIO,
    reason: str = "",
    seconds: float = 0.0,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    state = {
        "format": _FORMAT,
        "state": FAILED if reason else DONE,
        "reason": reason,
        **(facts or {}),
        "seconds": round(seconds, 2),
        "attempts": len(_begun(log)),
        "worker": _here(),
        "command": command,
        "key": key,
    }
    files.write_json(job.folder / STATE, state)
    _note(log, state["state"], command)
    return state


def values(job: SlideJob) -> dict[str, Any]:
    """What :func:`do_slide` takes."""
    return asdict(job)
