"""For each fold of a protocol: fit, predict, score; the nulls and the ceiling beside every model."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hifusion import checkpoint, files, metrics, reporting
from hifusion.baselines import BASELINES
from hifusion.cohort import Cohort, SectionView, mean_profile
from hifusion.errors import InputError
from hifusion.expression import GenePanel, normalisation, panel_counts
from hifusion.models import MODELS
from hifusion.prediction import predict_view
from hifusion.protocols import Fold, check_leak, protocol
from hifusion.recipes import Recipe
from hifusion.section import predicted_section, write_section
from hifusion.training import check_patches, fit

Progress = Callable[[str, int, int], None]
FORMAT = 1
SHUFFLED = "shuffled"  # the network once more, trained on targets dealt out anew over the spots
NULLS = (*BASELINES, SHUFFLED)


class Job(NamedTuple):
    """One model to fit in every fold."""

    model: str
    seed: int | None
    """None for models without random choices."""

    @property
    def label(self) -> str:
        """Folder and column name."""
        return self.model if self.seed is None else f"{self.model}-seed{self.seed}"


def evaluate(
    cohort: Cohort,
    protocol_name: str,
    models: Sequence[str],
    recipe: Recipe,
    out: Path | None = None,
    *,
    seeds: Sequence[int] = (0,),
    with_nulls: bool = True,
    with_shuffled: bool = True,
    leak_check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score models by a protocol, with every null and simple rival the data allow beside them.

    The panel, the normaliser, early stopping and the rivals' own choices see training and validation sections only; the
    test sections are predicted once, after selection. (``recipe.panel="paper"`` is the exception; the result says so.)

    Parameters
    ----------
    cohort
        A store, or a raw folder for models that look at counts only.
    models
        Names in ``hifusion.models.MODELS``, ``hifusion.baselines.BASELINES``, or ``"shuffled"``.
    recipe
        Panel and normalisation for all; network and training for those that need it.
    out
        Folder for ``metrics.json``, ``metrics.csv``, ``report.md``, predictions and runs; runs found there are gone on
        with. None writes nothing, and is possible only without networks.
    seeds
        A network is trained once for each.

    Returns
    -------
    dict
        What ``metrics.json`` holds; ``models[name]`` has the scores of :func:`hifusion.metrics.aggregate`.

    Raises
    ------
    InputError
        Unknown model or protocol, no section with the images a model needs, or a fold that leaks.
    """
    unknown = [name for name in models if name not in MODELS and name not in NULLS]
    if unknown or not models:
        raise InputError(f"model {', '.join(unknown) or '(none)'} is unknown; use {', '.join((*MODELS, *NULLS))}")
    rule = protocol(protocol_name)
    names, not_run = _usable_sections(cohort, models)
    infos = [info for info in cohort.infos if info.name in names]
    folds = rule.folds(infos)
    jobs = _jobs(models, seeds, with_nulls, with_shuffled, not_run)
    if out is None and any(job.seed is not None for job in jobs):
        raise InputError("a network leaves runs behind; give a folder for them with -o")
    if any(job.seed is not None for job in jobs):
        check_patches(recipe, cohort.store)

    gene_rows, section_rows, fold_facts = [], [], []
    for fold in folds:
        if leak_check:
            check_leak(fold, infos, cohort.image_digests, rule.same_patient)
        panel = cohort.panel(recipe.panel, recipe.panel_size, fold.outside_test)
        tested = cohort.views(fold.test, panel, recipe.normalisation)
        fitted_on = cohort.views(fold.outside_test, panel, recipe.normalisation)
        train_mean = mean_profile(fitted_on)
        ceilings = {view.name: _ceiling(cohort, view, recipe) for view in tested}
        for job in jobs:
            for view, predicted in _predict_fold(job, cohort, fold, panel, fitted_on, tested, recipe, out, progress):
                scores = metrics.score_section(
                    predicted,
                    view.expression,
                    train_mean,
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
                gene_rows.append(scores.genes.assign(**where))
                section_rows.append({**where, **scores.section})
                if out is not None:
                    _save_prediction(out, job, cohort, view, panel, recipe, predicted)
        fold_facts.append(
            {**asdict(fold), "panel_digest": panel.digest, "panel_rule": panel.rule, "n_genes": len(panel.genes)}
        )

    genes, sections = pd.concat(gene_rows, ignore_index=True), pd.DataFrame(section_rows)
    result = _plain(
        {
            "format": FORMAT,
            "protocol": {"name": protocol_name, "same_patient": rule.same_patient, "meaning": rule.meaning},
            "leak_check": leak_check,
            "sections": sorted(names),
            "left_out": sorted(set(cohort.sections) - set(names)),
            "folds": fold_facts,
            "recipe": asdict(recipe),
            "models": {
                model: _over_seeds(model, genes, sections) for model in dict.fromkeys(job.model for job in jobs)
            },
            "not_run": not_run,
            "versions": checkpoint.versions(),
        }
    )
    if out is not None:
        order = ["model", "seed", "label", "fold", "section", "patient", *metrics.GENE_COLUMNS]
        files.write_text(out / "metrics.csv", genes[order].to_csv(index=False))
        files.write_json(out / "metrics.json", result)
        files.write_text(out / "report.md", reporting.markdown(result, genes))
    return result


def _usable_sections(cohort: Cohort, models: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Sections to make folds of, and the rivals that cannot run on them, with the reason."""
    needs_images = [name for name in models if name not in BASELINES or BASELINES[name].needs_images]
    with_image = [name for name in cohort.sections if cohort.has_regions(name)]
    if needs_images:
        if not with_image:
            raise InputError(
                f"{cohort.root}: {', '.join(needs_images)} needs region patches and there are none; build a store with "
                "`hifusion prepare` and give that as --data"
            )
        return with_image, {}
    without = {
        name: "counts only: not every section has region patches" for name, its in BASELINES.items() if its.needs_images
    }
    return list(cohort.sections), {} if len(with_image) == len(cohort.sections) else without


def _jobs(
    models: Sequence[str], seeds: Sequence[int], with_nulls: bool, with_shuffled: bool, not_run: dict[str, str]
) -> list[Job]:
    networks = [name for name in models if name in MODELS]
    wanted = dict.fromkeys([*(BASELINES if with_nulls else ()), *models])
    if networks and with_nulls and with_shuffled:
        wanted[SHUFFLED] = None
    elif networks and SHUFFLED not in wanted:
        not_run[SHUFFLED] = "switched off by the user"
    first_nulls = [name for name in NULLS if name in wanted and name not in not_run]
    ordered = [*first_nulls, *networks]
    # The shuffled null is trained with the first seed only: it is there to show zero, at the cost of a whole training.
    return [Job(name, seed) for name in ordered for seed in _seeds_of(name, seeds)]


def _seeds_of(model: str, seeds: Sequence[int]) -> Sequence[int | None]:
    return [None] if model in BASELINES else seeds[:1] if model == SHUFFLED else seeds


def _predict_fold(
    job: Job,
    cohort: Cohort,
    fold: Fold,
    panel: GenePanel,
    fitted_on: Sequence[SectionView],
    tested: Sequence[SectionView],
    recipe: Recipe,
    out: Path | None,
    progress: Progress | None,
) -> Iterator[tuple[SectionView, np.ndarray]]:
    if job.seed is None:
        predict = BASELINES[job.model].fit(fitted_on)
        yield from ((view, predict(view)) for view in tested)
        return
    assert out is not None
    by_name = {view.name: view for view in fitted_on}
    run = fit(
        recipe,
        panel,
        [by_name[name] for name in fold.train],
        [by_name[name] for name in fold.validation],
        out / "runs" / fold.name / job.label,
        store=cohort.store,
        seed=job.seed,
        shuffle_targets=job.model == SHUFFLED,
        resume=True,
        progress=progress and (lambda what, done, total: progress(f"{fold.name} {job.label} {what}", done, total)),
    )
    yield from ((view, predict_view(run, view, progress)) for view in tested)


def _ceiling(cohort: Cohort, view: SectionView, recipe: Recipe) -> np.ndarray:
    counts = panel_counts(cohort.sections[view.name], view.genes)
    return metrics.ceiling(counts, view.total_counts, normalisation(recipe.normalisation).of)


def _save_prediction(
    out: Path, job: Job, cohort: Cohort, view: SectionView, panel: GenePanel, recipe: Recipe, predicted: np.ndarray
) -> None:
    section = predicted_section(
        cohort.sections[view.name],
        predicted,
        genes=panel.genes,
        normalisation=recipe.normalisation,
        panel_digest=panel.digest,
        run=job.label,
    )
    section.layers["measured"] = view.expression
    write_section(section, out / "predictions" / job.label / f"{view.name}.h5ad")


def _over_seeds(model: str, genes: pd.DataFrame, sections: pd.DataFrame) -> dict[str, Any]:
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
    baseline = BASELINES.get(model)
    return {
        "description": baseline.description
        if baseline
        else "targets dealt out anew over the spots"
        if model == SHUFFLED
        else "network",
        "null": model in NULLS,
        "oracle": bool(baseline and baseline.oracle),
        **scores,
        **{word: seeds[0][word] for word in words},
        "intervals": intervals,
        "by_seed": by_label if len(seeds) > 1 else {},
    }


def _mean(values: Sequence[Any]) -> Any:
    """Mean over seeds of a number or an interval; None where one of them is not defined."""
    return None if any(value is None for value in values) else np.mean(values, axis=0).tolist()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON: what is returned is what the file holds."""
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
    return plain
