"""A column of the paper's Table 1, from raw data in one call: store, benchmark, and the published figures beside ours.

::

    store/                  region patches at the recipe's scale
    benchmark/              as hifusion.benchmarking leaves it
    table1.csv, table1.md   published, ours, difference; and how far the two can be compared
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hifusion import files, preparing, recipes, studies
from hifusion.benchmarking import Progress, Settings, benchmark, estimate
from hifusion.contest import CONTENDERS
from hifusion.errors import InputError, refuse_unknown
from hifusion.protocols import Fold, SectionInfo, protocol
from hifusion.reproduction_table import comparability, table_of, to_markdown
from hifusion.simple_models import simple_models
from hifusion.studies import METHODS, STUDIES, Study

__all__ = ["STUDIES", "Reproduction", "reproduce"]


@dataclass(frozen=True)
class Reproduction:
    """What a reproduction gives.

    Attributes
    ----------
    title
        Has the word "partial" where fewer sections were run than the paper's.
    notes
        How far the figures can be compared with the published ones, a sentence of Markdown each.
    estimate
        Of what was left to do at the start, see :func:`hifusion.benchmarking.estimate`.
    table
        Rows of ``table1.csv``; empty after a dry run.
    failed
        Jobs that failed, with the reason.
    """

    title: str
    notes: list[str]
    estimate: dict[str, Any]
    table: pd.DataFrame
    failed: dict[str, str]

    @property
    def markdown(self) -> str:
        """What ``table1.md`` holds."""
        return to_markdown(self.title, self.notes, self.table)

    @property
    def facts(self) -> dict[str, Any]:
        """All of it that JSON can hold."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict("records")
        return {**vars(self), "table": rows}


class _Found(NamedTuple):
    """What a raw folder has for a study."""

    used: list[str]
    notes: list[str]
    """What of the full table is not used, and why."""


def reproduce(
    study: str,
    data: Path,
    out: Path,
    *,
    sections: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    recipe: str | None = None,
    source: str | None = None,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    processes: int = 1,
    with_test_epoch: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Reproduction:
    """A column of the paper's Table 1 from raw data, as far as data and settings go. Stopped, the same call goes on.

    Parameters
    ----------
    study
        A name of :data:`STUDIES`.
    data
        What `hifusion download` made.
    sections
        Names, of those of the full table; all that can be used where None.
    models
        As for a benchmark; the methods of the paper's column where None. Nulls are always scored.
    recipe, source, overrides
        See :func:`hifusion.recipes.recipe_for`; the study's own recipe where None. ``panel`` among the overrides stands
        before the study's panel.
    seeds, processes, with_test_epoch
        As for a benchmark.
    dry_run
        Build the store, estimate, and train nothing.
    say
        Told what is missing before anything is done, and the estimate before anything is trained.

    Raises
    ------
    InputError
        A folder of another layout, sections of which no fold can be made, or what a benchmark refuses.
    """
    its, data, out = studies.study(study), Path(data).resolve(), Path(out).resolve()
    models, preset = tuple(models or its.published), recipe or its.recipe
    overrides = tuple(overrides)
    base = recipes.recipe_for("hifusion", preset, source, overrides)
    found = _survey(study, its, data, sections, models, base.encoder)
    title = _title(its, found)
    if say:
        say("\n".join([title, *found.notes]))
    preparing.prepare(
        data,
        out / "store",
        recipe=preset,
        sections=found.used,
        region_px=base.model.region_px,
        mpp=base.region_mpp,
        progress=progress,
    )
    own_panel = any(override.partition("=")[0].strip() in ("panel", "hifusion:panel") for override in overrides)
    settings = Settings(
        data=str(out / "store"),
        protocol=its.protocol,
        models=models,
        recipe=preset,
        source=source,
        overrides=overrides,
        panel=None if own_panel else its.panel,
        sections=tuple(found.used),
        seeds=tuple(seeds),
        with_test_epoch=with_test_epoch,
    )
    if say:
        say("estimating how long the rest takes, from a few steps of each network")
    expected = estimate(settings, out / "benchmark", processes=processes)
    if say:
        say(_spelt(expected, processes))
    if dry_run:
        return Reproduction(title, found.notes, expected, pd.DataFrame(), {})
    outcome = benchmark(settings, out / "benchmark", processes=processes, progress=progress)
    result = outcome.scores.result
    notes = [*comparability(its, result, its.panel, overrides, outcome.failed), *found.notes]
    done = Reproduction(title, notes, expected, table_of(its, result), outcome.failed)
    files.write_text(out / "table1.csv", done.table.to_csv(index=False))
    files.write_text(out / "table1.md", done.markdown)
    return done


def _title(its: Study, found: _Found) -> str:
    partial = "partial, " if len(found.used) < its.n_sections else ""
    return f"Table 1, {its.title}: {partial}{len(found.used)} of {its.n_sections} sections"


def _survey(
    name: str, its: Study, data: Path, sections: Sequence[str] | None, models: Sequence[str], encoder: str
) -> _Found:
    """Which sections can be used and which not, from names alone: nothing is read yet."""
    layout, download = its.layout, f"`hifusion download {its.dataset} -o FOLDER`"
    if lacks := layout.reader.lacks(data):
        raise InputError(f"{data}: is not the layout of {its.dataset} ({lacks}); {download} makes it")
    known = layout.reader.names(data)
    full = its.sections(known)
    refuse_unknown("section", sections or (), full, f"the full table of {name}")
    refuse_unknown("model", models, CONTENDERS, "the models there are")
    simple = simple_models(encoder)
    with_images = any(model not in simple or simple[model].baseline.needs_images for model in models)
    missing = [section for section in full if section not in known]
    blind = [section for section in full if with_images and section in known and not layout.has_image(data, section)]
    usable = [section for section in full if section not in (*missing, *blind)]
    for why, cannot in (("is missing", missing), ("has no image", blind)):
        if asked := [section for section in sections or () if section in cannot]:
            raise InputError(f"{data}: {asked[0]} {why}; leave it out, or get it with {download}")
    asked = [section for section in usable if sections is None or section in sections]
    others = [section for section in usable if section not in asked]
    try:
        folds = protocol(its.protocol).folds([SectionInfo(section, layout.patient(section)) for section in asked])
    except InputError as error:
        there = f"only {', '.join(asked)} can be used" if asked else "no section can be used"
        why = f"{len(missing)} are missing and {len(blind)} have no image in {data}; {download} gets them"
        hint = f"ask for others too ({', '.join(others)})" if others else why
        raise InputError(f"{name}: needs {its.needs}, and {there}; {hint}") from error
    used = [section for section in asked if any(section in (*fold.outside_test, *fold.test) for fold in folds)]
    unused = {
        "Missing from the data": missing,
        "Without an image": blind,
        "Not asked for": others,
        "Left out, the only section of its patient": [section for section in asked if section not in used],
    }
    notes = [f"{why} ({len(those)}): {', '.join(those)}." for why, those in unused.items() if those]
    if unnamed := its.n_sections - len(full):
        notes.append(f"Missing from the data: {unnamed} of {its.n_sections} sections, whose names are not known here.")
    return _Found(used, notes + (_other_firsts(its, full, folds) if protocol(its.protocol).same_patient else []))


def _other_firsts(its: Study, full: Sequence[str], folds: Sequence[Fold]) -> list[str]:
    """Patients that are trained on another section than the paper's first one."""
    first = {its.layout.patient(section): section for section in reversed(full)}
    others = {fold.train[0]: first[its.layout.patient(fold.train[0])] for fold in folds}
    return [f"Trained on {ours}, not on {theirs} as published." for ours, theirs in others.items() if ours != theirs]


def _spelt(expected: dict[str, Any], processes: int) -> str:
    """An estimate in words."""
    models = ", ".join(f"{METHODS.get(one, one)} {_time(its)}" for one, its in expected["seconds_by_model"].items())
    left = f"about {_time(expected['seconds'])} left, {processes} at a time"
    return f"{expected['done']} of {expected['jobs']} jobs are done; {left}{f' ({models})' if models else ''}."


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
