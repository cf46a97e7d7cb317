"""Protocol x models x seeds, each job in a process of its own, into one folder that goes on where it was stopped.

::

    benchmark.json              what was asked for
    jobs/<label>/<fold>.json    a finished job: what it was made from and what it cost; <fold>.log: what it said
    predictions/, runs/         as an evaluation leaves them
    metrics.csv, sections.csv, costs.csv, metrics.json, report.md
    leaderboard.csv, .md, .html, comparison.csv, selection_gap.csv

A process is started as ``python -m hifusion.benchmarking FOLDER FOLD LABEL...``, as a cluster's scheduler may do too.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hifusion import files, recipes
from hifusion.cohort import Cohort
from hifusion.comparison import gene_wins, paired_differences, selection_gap
from hifusion.contest import TEST_EPOCH, Contest, Job, Predicted
from hifusion.errors import InputError, plain
from hifusion.estimating import job_seconds
from hifusion.evaluation import Scores, prediction_file, read_predictions, save_predictions, score, write_scores
from hifusion.leaderboard import leaderboard
from hifusion.leaderboard_page import to_html, to_markdown
from hifusion.processes import end_with_starter, shared_environment
from hifusion.protocols import Fold

SETTINGS = "benchmark.json"
FORMAT = 1
_POLL_S = 0.2
Progress = Callable[[str, int, int], None]  # (what is going on, jobs done, jobs in all)


@dataclass(frozen=True)
class Settings:
    """What a benchmark is asked for.

    Attributes
    ----------
    data
        Patch store.
    protocol
        Name in ``hifusion.protocols.PROTOCOLS``.
    models
        ``"hifusion"``, rivals (``hifusion.recipes.RIVALS``) and nulls.
    recipe, source, overrides
        Preset, see :func:`hifusion.recipes.recipe_for`: ``quick`` and ``tiny`` have reduced rivals of their own; beside
        any other recipe of HiFusion the rivals are trained as their authors do.
    panel, sections
        See :func:`hifusion.api.evaluate`.
    seeds, with_nulls, with_shuffled, with_test_epoch, with_registered, leak_check
        See :meth:`hifusion.contest.Contest.plan`.
    """

    data: str
    protocol: str
    models: tuple[str, ...] = recipes.NETWORKS
    recipe: str = "recommended"
    source: str | None = None
    overrides: tuple[str, ...] = ()
    panel: str | None = None
    sections: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    with_nulls: bool = True
    with_shuffled: bool = True
    with_test_epoch: bool = False
    with_registered: bool = False
    leak_check: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", str(Path(self.data).resolve()))
        if self.panel and Path(self.panel).is_file():  # a job may be done from another folder
            object.__setattr__(self, "panel", str(Path(self.panel).resolve()))
        for name in ("models", "overrides", "sections", "seeds"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))  # JSON gives lists

    def contest(self, verify: bool = True) -> Contest:
        """The folds and jobs."""
        base = recipes.recipe_for("hifusion", self.recipe, self.source, self.overrides)
        return Contest.plan(
            Cohort.open(Path(self.data), self.sections, verify),
            self.protocol,
            self.models,
            recipes.recipes_for(self.models, self.recipe, self.source, self.overrides),
            base=replace(base, panel=self.panel) if self.panel else base,
            seeds=self.seeds,
            with_nulls=self.with_nulls,
            with_shuffled=self.with_shuffled,
            with_test_epoch=self.with_test_epoch,
            with_registered=self.with_registered,
            leak_check=self.leak_check,
        )

    def save(self, path: Path) -> None:
        """Write as readable JSON."""
        files.write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Read what :meth:`save` wrote."""
        if not path.is_file():
            raise InputError(f"{path.parent}: holds no {path.name}; make a benchmark with `hifusion benchmark`")
        values = files.read_json(path)
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
            raise InputError(f"{path}: does not describe a benchmark of this version; make it anew")
        return cls(**values)


class Outcome(NamedTuple):
    """What a benchmark gives."""

    scores: Scores
    leaderboard: pd.DataFrame
    """A row a model."""
    failed: dict[str, str]
    """``label/fold`` -> the last line its process said."""


class _Task(NamedTuple):
    """Jobs of one fold that one process does one after the other."""

    fold: Fold
    jobs: tuple[Job, ...]


@dataclass
class _Running:
    task: _Task
    slot: int
    process: "subprocess.Popen[bytes]"
    log: Path


def benchmark(settings: Settings, out: Path, *, processes: int = 1, progress: Progress | None = None) -> Outcome:
    """Do what is not yet done of a benchmark, then score and rank everything.

    Parameters
    ----------
    out
        Folder. A job that is finished there, and was made from the same data and recipe, is not done again.
    processes
        Jobs at a time; the processor's cores are shared out among them, and GPUs are taken in turn.

    Raises
    ------
    InputError
        Settings that cannot run, or no job that succeeded.
    """
    out = Path(out)
    if processes < 1:
        raise InputError(f"jobs={processes} is not possible; use at least 1")
    contest = settings.contest()
    settings.save(out / SETTINGS)
    failed = _work_off(contest, out, processes, progress)
    results = list(_finished(contest, out, failed))
    if not results:
        raise InputError(f"{out}: every job failed; the first: {next(iter(failed.items()), '')}")
    scores = score(contest, results)
    scores.result["failed"] = failed
    write_scores(scores, out)
    return Outcome(scores, _write_leaderboard(scores, out), failed)


def _write_leaderboard(scores: Scores, out: Path) -> pd.DataFrame:
    board = leaderboard(scores.result, scores.genes, scores.sections, scores.costs)
    pairs, wins = paired_differences(scores.genes, scores.sections), gene_wins(scores.genes)
    gap = _selection_gap(scores.sections)
    for name, table in (("leaderboard", board), ("comparison", pairs), ("selection_gap", gap)):
        if table is not None:
            files.write_text(out / f"{name}.csv", table.to_csv(index=False))
    files.write_text(out / "leaderboard.html", to_html(scores.result, board, pairs, wins, gap))
    files.write_text(out / "leaderboard.md", to_markdown(scores.result, board, pairs, wins, gap))
    return board


def _selection_gap(sections: pd.DataFrame) -> pd.DataFrame | None:
    """What selecting the epoch on the test is worth; None where no network was trained so."""
    on_test = sections["model"].str.endswith(TEST_EPOCH)
    if not on_test.any():
        return None
    published = sections[on_test].assign(
        **{name: sections[name].str.replace(TEST_EPOCH, "") for name in ("model", "label")}
    )
    return selection_gap(published, sections[~on_test & sections["label"].isin(published["label"])])


def _tasks(contest: Contest, out: Path) -> list[_Task]:
    """What is left to do: a process for each run of a network, one for all simple models of a fold."""
    tasks = []
    for fold in contest.folds:
        together: dict[str, list[Job]] = {}
        for job in contest.jobs:
            if not _done(contest, job, fold, out):
                together.setdefault("" if job.seed is None else job.run_label, []).append(job)
        tasks += [_Task(fold, tuple(jobs)) for jobs in together.values()]
    return tasks


def estimate(settings: Settings, out: Path, *, processes: int = 1) -> dict[str, Any]:
    """What is left of a benchmark and about how long it takes, from a few real steps of each network in each fold.

    Returns
    -------
    dict
        ``jobs`` and ``done``; ``seconds`` of all that is left with so many processes on a machine that has the cores
        for them, ``seconds_by_model`` one after the other. Simple models are not counted: they take seconds.
    """
    contest = settings.contest()
    tasks = _tasks(contest, Path(out))
    seconds: dict[str, float] = {}
    probed: dict[tuple[str, str], float] = {}  # seeds cost the same
    for task in tasks:
        job = task.jobs[0]
        if job.seed is not None:
            key = (job.model, task.fold.name)
            probed[key] = probed.get(key) or job_seconds(contest, job, task.fold)
            seconds[job.model] = seconds.get(job.model, 0.0) + probed[key]
    left = sum(len(task.jobs) for task in tasks)
    total = len(contest.folds) * len(contest.jobs)
    return {
        "jobs": total,
        "done": total - left,
        "seconds": round(sum(seconds.values()) / processes),
        "seconds_by_model": {model: round(its) for model, its in seconds.items()},
        "not_run": contest.not_run,
    }


def _work_off(contest: Contest, out: Path, processes: int, progress: Progress | None) -> dict[str, str]:
    queue, failed = _tasks(contest, out), {}
    running: list[_Running] = []
    total = len(contest.folds) * len(contest.jobs)
    done = total - sum(len(task.jobs) for task in queue)
    try:
        while queue or running:
            while queue and len(running) < processes:
                running.append(_start(queue.pop(0), out, processes, slot=_free_slot(running, processes)))
            if progress:
                ahead = sum(_done(contest, job, its.task.fold, out) for its in running for job in its.task.jobs)
                what = ", ".join(f"{its.task.fold.name} {its.task.jobs[0].label}" for its in running)
                progress(what, done + ahead, total)
            time.sleep(_POLL_S)
            for its in [its for its in running if its.process.poll() is not None]:
                running.remove(its)
                left = [job for job in its.task.jobs if not _done(contest, job, its.task.fold, out)]
                done += len(its.task.jobs) - len(left)
                if left:  # the first of them broke its process; the others are still to be tried
                    failed[f"{left[0].label}/{its.task.fold.name}"] = _last_words(its)
                    done += 1
                    queue = ([_Task(its.task.fold, tuple(left[1:]))] if left[1:] else []) + queue
    finally:
        for its in running:
            its.process.kill()
    return failed


def _free_slot(running: Sequence[_Running], processes: int) -> int:
    return min(set(range(processes)) - {its.slot for its in running})


def _start(task: _Task, out: Path, processes: int, slot: int) -> _Running:
    """A process for a task. It ends when this one does: its standard input is then closed."""
    log = _job_file(out, task.jobs[0], task.fold, ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = shared_environment(processes, slot)
    command = [
        sys.executable,
        "-m",
        "hifusion.benchmarking",
        str(out),
        task.fold.name,
        *(job.label for job in task.jobs),
    ]
    with log.open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment)
    return _Running(task, slot, process, log)


def _last_words(its: _Running) -> str:
    lines = its.log.read_text(errors="replace").strip().splitlines()
    code = its.process.returncode
    outside = f"its process was ended from outside (signal {-code}); too little memory?"
    return outside if code < 0 or not lines else plain(lines[-1], 300)


def do_jobs(out: Path, fold_name: str, labels: Sequence[str]) -> None:
    """Do jobs of a benchmark's folder in this process: fit, predict, write, and mark each as finished.

    Raises
    ------
    InputError
        No benchmark, or a fold or label that it does not have.
    """
    contest = Settings.load(out / SETTINGS).contest(verify=False)
    folds = {fold.name: fold for fold in contest.folds}
    jobs = {job.label: job for job in contest.jobs}
    for what, given, known in (("fold", [fold_name], folds), ("job", labels, jobs)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"{out}: the benchmark has no {what} {unknown[0]}; it has {', '.join(known)}")
    fold = folds[fold_name]
    for label in labels:
        job = jobs[label]
        predicted = contest.run(job, fold, out)
        save_predictions(contest, job, fold, predicted, out)
        marker = {"key": contest.key(job, fold), "costs": predicted.costs}
        files.write_json(_job_file(out, job, fold, ".json"), marker)


def _job_file(out: Path, job: Job, fold: Fold, suffix: str) -> Path:
    return out / "jobs" / job.label / f"{fold.name}{suffix}"


def _done(contest: Contest, job: Job, fold: Fold, out: Path) -> bool:
    marker = _job_file(out, job, fold, ".json")
    if not marker.is_file() or files.read_json(marker)["key"] != contest.key(job, fold):
        return False
    return all(prediction_file(out, job, name).is_file() for name in fold.test)


def _finished(contest: Contest, out: Path, failed: dict[str, str]) -> Iterator[tuple[Fold, Job, Predicted]]:
    """Predictions of the jobs that are finished in every fold: others would be scored on other sections."""
    broken = {key.rpartition("/")[0] for key in failed}
    for fold in contest.folds:
        for job in contest.jobs:
            if job.label not in broken:
                costs = files.read_json(_job_file(out, job, fold, ".json"))["costs"]
                yield fold, job, read_predictions(job, fold, out, costs)


def main(arguments: Sequence[str]) -> None:
    """What ``python -m hifusion.benchmarking FOLDER FOLD LABEL...`` does."""
    end_with_starter()
    try:
        do_jobs(Path(arguments[0]), arguments[1], arguments[2:])
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
