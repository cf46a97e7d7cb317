"""For each fold of a protocol: fit, predict, score; the nulls and the ceiling beside every model."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hifusion import checkpoint, files, metrics, reporting
from hifusion.cohort import Cohort, SectionView
from hifusion.configuration import Recipe
from hifusion.contest import (
    ENDINGS,
    NULLS,
    SHUFFLED,
    TEST_EPOCH,
    Contest,
    FoldData,
    Job,
    Predicted,
    Progress,
)
from hifusion.errors import InputError
from hifusion.expression import normalisation, panel_counts
from hifusion.protocols import Fold
from hifusion.section import predicted_section, read_section, write_section
from hifusion.simple_models import simple_models

FORMAT = 2


class Scores(NamedTuple):
    """What an evaluation gives."""

    result: dict[str, Any]
    """What ``metrics.json`` holds; ``models[name]`` has the scores of :func:`hifusion.metrics.aggregate`."""
    genes: pd.DataFrame
    """A row for each model, seed, tested section and gene: ``metrics.csv``."""
    sections: pd.DataFrame
    """A row for each model, seed and tested section: ``sections.csv``."""
    costs: pd.DataFrame
    """A row for each model, seed and fold: ``costs.csv``."""


def evaluate(
    cohort: Cohort,
    protocol_name: str,
    models: Sequence[str],
    recipes: dict[str, Recipe],
    out: Path | None = None,
    *,
    base: Recipe,
    seeds: Sequence[int] = (0,),
    with_nulls: bool = True,
    with_shuffled: bool = True,
    leak_check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score models by a protocol, with every null and simple rival the data allow beside them.

    The panel, the normaliser, early stopping and the rivals' own choices see training and validation sections only; the
    test sections are predicted once, after selection. (``base.panel="paper"`` is the exception; the result says so.)
    Arguments are those of :meth:`hifusion.contest.Contest.plan`.

    Parameters
    ----------
    out
        Folder for the tables, ``report.md``, predictions and runs; runs found there are gone on with. None writes
        nothing, and is possible only without networks.

    Returns
    -------
    dict
        ``Scores.result``.

    Raises
    ------
    InputError
        Unknown model or protocol, no section with the images a model needs, or a fold that leaks.
    """
    contest = Contest.plan(
        cohort,
        protocol_name,
        models,
        recipes,
        base=base,
        seeds=seeds,
        with_nulls=with_nulls,
        with_shuffled=with_shuffled,
        leak_check=leak_check,
    )
    if out is None and any(job.seed is not None for job in contest.jobs):
        raise InputError("a network leaves runs behind; give a folder for them with -o")

    def results() -> Iterable[tuple[Fold, Job, Predicted]]:
        for fold in contest.folds:
            for job in contest.jobs:
                predicted = contest.run(job, fold, out, progress)
                if out is not None:
                    save_predictions(contest, job, fold, predicted, out)
                yield fold, job, predicted

    scores = score(contest, results())
    if out is not None:
        write_scores(scores, out)
    return scores.result


def score(contest: Contest, results: Iterable[tuple[Fold, Job, Predicted]]) -> Scores:
    """Scores of every model of a contest, from what it predicted in each fold."""
    gene_rows, section_rows, cost_rows = [], [], []
    ceilings: dict[str, np.ndarray] = {}
    for fold, job, predicted in results:
        its = contest.data_of(fold)
        for view in its.tested:
            if view.name not in ceilings:
                ceilings[view.name] = _ceiling(contest, view)
            found = metrics.score_section(
                predicted.sections[view.name],
                view.expression,
                its.train_mean,
                view.centres_px,
                view.pitch_px,
                view.genes,
                ceilings[view.name],
            )
            where = {
                **job._asdict(),
                "label": job.label,
                "fold": fold.name,
                "section": view.name,
                "patient": view.patient,
            }
            gene_rows.append(found.genes.assign(**where))
            coverage = np.nan
            if view.name in predicted.intervals:
                lower, upper = predicted.intervals[view.name]
                coverage = float(((view.expression >= lower) & (view.expression <= upper)).mean())
            section_rows.append({**where, **found.section, "coverage_90": coverage})
        cost_rows.append({**job._asdict(), "label": job.label, "fold": fold.name, **predicted.costs})
    genes, sections = pd.concat(gene_rows, ignore_index=True), pd.DataFrame(section_rows)
    scored = [job for job in contest.jobs if job.label in set(genes["label"])]
    models = list(dict.fromkeys(job.model for job in scored))
    result = {
        "format": FORMAT,
        "protocol": {
            "name": contest.protocol_name,
            "same_patient": contest.rule.same_patient,
            "meaning": contest.rule.meaning,
        },
        "leak_check": contest.leak_check,
        "sections": contest.sections,
        "left_out": sorted(set(contest.cohort.sections) - set(contest.sections)),
        "folds": [_fold_facts(fold, contest.data_of(fold)) for fold in contest.folds],
        "recipe": asdict(contest.base),
        "recipes": {name: asdict(contest.recipes[name]) for name in contest.recipes},
        "models": {model: _over_seeds(contest, model, genes, sections) for model in models},
        "not_run": contest.not_run,
        "versions": checkpoint.versions(),
    }
    return Scores(_plain(result), genes, sections, pd.DataFrame(cost_rows))


def write_scores(scores: Scores, out: Path) -> None:
    """Write the tables of an evaluation and its ``report.md``."""
    where = ["model", "seed", "label", "fold", "section", "patient"]
    files.write_text(out / "metrics.csv", scores.genes[[*where, *metrics.GENE_COLUMNS]].to_csv(index=False))
    files.write_text(out / "sections.csv", scores.sections.to_csv(index=False))
    files.write_text(out / "costs.csv", scores.costs.to_csv(index=False))
    files.write_json(out / "metrics.json", scores.result)
    files.write_text(out / "report.md", reporting.markdown(scores.result, scores.genes))


def save_predictions(contest: Contest, job: Job, fold: Fold, predicted: Predicted, out: Path) -> None:
    """Write the predicted sections of a fold, each with the measured expression beside it."""
    its = contest.data_of(fold)
    for view in its.tested:
        section = predicted_section(
            contest.cohort.sections[view.name],
            predicted.sections[view.name],
            genes=its.panel.genes,
            normalisation=contest.base.normalisation,
            panel_digest=its.panel.digest,
            run=job.label,
        )
        section.layers["measured"] = view.expression
        if view.name in predicted.intervals:
            section.layers["lower_90"], section.layers["upper_90"] = predicted.intervals[view.name]
        if view.name in predicted.novelty:
            section.obs["novelty"] = predicted.novelty[view.name]
        write_section(section, prediction_file(out, job, view.name))


def read_predictions(job: Job, fold: Fold, out: Path, costs: dict[str, float]) -> Predicted:
    """What :func:`save_predictions` wrote of a fold, but for what no score is made of."""
    read = {name: read_section(prediction_file(out, job, name)) for name in fold.test}
    intervals = {
        name: (section.layers["lower_90"], section.layers["upper_90"])
        for name, section in read.items()
        if "lower_90" in section.layers
    }
    return Predicted({name: section.X for name, section in read.items()}, costs, intervals)


def prediction_file(out: Path, job: Job, section: str) -> Path:
    """Where a predicted section lies in an evaluation's folder."""
    return out / "predictions" / job.label / f"{section}.h5ad"


def _fold_facts(fold: Fold, its: FoldData) -> dict[str, Any]:
    panel = its.panel
    return {**asdict(fold), "panel_digest": panel.digest, "panel_rule": panel.rule, "n_genes": len(panel.genes)}


def _ceiling(contest: Contest, view: SectionView) -> np.ndarray:
    counts = panel_counts(contest.cohort.sections[view.name], view.genes)
    return metrics.ceiling(counts, view.total_counts, normalisation(contest.base.normalisation).of)


def _over_seeds(contest: Contest, model: str, genes: pd.DataFrame, sections: pd.DataFrame) -> dict[str, Any]:
    """Scores of one model: the mean over its seeds, each seed's own beside it."""
    by_label = {
        label: metrics.aggregate(rows, sections[sections["label"] == label])
        for label, rows in genes[genes["model"] == model].groupby("label", sort=False)
    }
    seeds = list(by_label.values())
    words = ("averaging", "interval_over", "intervals")
    scores = (
        seeds[0]
        if len(seeds) == 1
        else {key: _mean([its[key] for its in seeds]) for key in seeds[0] if key not in words}
    )
    intervals = {key: _mean([its["intervals"][key] for its in seeds]) for key in seeds[0]["intervals"]}
    simple = simple_models(contest.base.encoder).get(model)
    return {
        "description": simple.baseline.description if simple else _description(model),
        "null": model in NULLS,
        "oracle": bool(simple and simple.baseline.oracle),
        "selected_on_test": model.endswith(TEST_EPOCH),
        **scores,
        **{word: seeds[0][word] for word in words},
        "intervals": intervals,
        "coverage_90": _known(sections.loc[sections["model"] == model, "coverage_90"].mean()),
        "by_seed": by_label if len(seeds) > 1 else {},
    }


def _description(model: str) -> str:
    if model == SHUFFLED:
        return "the first network, trained on targets dealt out anew over the spots"
    return next(means for ending, means in reversed(ENDINGS.items()) if model.endswith(ending))


def _mean(values: Sequence[Any]) -> Any:
    """Mean over seeds of a number or an interval; None where one of them is not defined."""
    return None if any(value is None for value in values) else np.mean(values, axis=0).tolist()


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON: what is returned is what the file holds."""
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    return plain
