"""How long a training, an evaluation or a job of a benchmark will take, and what it needs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hifusion.cohort import Cohort
from hifusion.configuration import Recipe
from hifusion.contest import Contest, Job
from hifusion.inference import best_device, resolve_precision
from hifusion.probing import BUDGET_S, Probe, probe
from hifusion.protocols import Fold
from hifusion.surroundings import Spots
from hifusion.training import check_patches, chosen, split

_MIB = 1 << 20


def training_costs(
    cohort: Cohort,
    recipe: Recipe,
    *,
    sections: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    seed: int = 0,
    budget_s: float = BUDGET_S,
) -> dict[str, Any]:
    """What :func:`hifusion.training.train` with these arguments will cost on one device, from a few real steps.

    Returns
    -------
    dict
        ``seconds`` of the whole and ``seconds_per_epoch``; ``memory_mib`` at most, of the GPU where there is one;
        ``disk_mib`` of the run folder, and ``disk_while_training_mib`` at most; what it was taken for.
    """
    check_patches(recipe, cohort.store)
    panel, train, held = chosen(cohort, recipe, sections, validation)
    recipe = recipe.sized(len(panel.genes))
    trained, held_out = split(recipe, train, held, seed)
    found = probe(recipe, trained, held_out, budget_s=budget_s)
    seconds = found.seconds(recipe, trained, held_out)
    return {
        "recipe": recipe.name,
        "network": recipe.network,
        "train_spots": sum(len(rows) for _, rows in trained),
        "validation_spots": sum(len(rows) for _, rows in held_out),
        "epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "seconds": _rounded(seconds + found.features_s),
        "seconds_per_epoch": _rounded(seconds / recipe.epochs),
        "memory_mib": _rounded(found.memory_mib),
        "disk_mib": _rounded(found.run_mib),
        "disk_while_training_mib": _rounded(found.training_mib),
        "recomputed": found.recomputed,
        "device": str(best_device()),
        "precision": resolve_precision(recipe.precision, best_device()),
    }


def evaluation_costs(contest: Contest, *, budget_s: float = BUDGET_S) -> dict[str, Any]:
    """What the networks of an evaluation will cost one after the other, from a few real steps of each.

    Returns
    -------
    dict
        As :func:`training_costs`, with ``seconds_by_model``. Nulls and simple rivals are not counted: they take seconds
        to minutes, and of the disk only their predictions.
    """
    probes: dict[str, Probe] = {}
    seconds: dict[str, float] = {}
    disk = 0.0
    trainings = 0
    for fold in contest.folds:
        its = contest.data_of(fold)
        for job in contest.jobs:
            disk += sum(2 * view.expression.nbytes for view in its.tested) / _MIB  # predicted, measured beside
            if job.seed is None:
                continue
            recipe, parts = _parts(contest, job, fold)
            if recipe.network not in probes:
                probes[recipe.network] = probe(recipe, *parts, budget_s=budget_s)
                seconds[job.model] = probes[recipe.network].features_s
            found = probes[recipe.network]
            seconds[job.model] = seconds.get(job.model, 0.0) + found.seconds(recipe, *parts)
            disk, trainings = disk + found.run_mib, trainings + 1
    return {
        "folds": len(contest.folds),
        "trainings": trainings,
        "seconds": _rounded(sum(seconds.values())),
        "seconds_by_model": {model: _rounded(value) for model, value in seconds.items()},
        "memory_mib": _rounded(max((its.memory_mib for its in probes.values()), default=0.0)),
        "disk_mib": _rounded(disk),
        "recomputed": [network for network, its in probes.items() if its.recomputed],
        "device": str(best_device()),
        "not_counted": [job.model for job in contest.jobs if job.seed is None],
        "not_run": contest.not_run,
    }


def job_seconds(contest: Contest, job: Job, fold: Fold) -> float:
    """Estimated seconds of one network in one fold: training, validation after each epoch, the tested sections."""
    recipe, parts = _parts(contest, job, fold)
    found = probe(recipe, *parts, budget_s=0.0)
    return found.seconds(recipe, *parts) + found.features_s


def _parts(contest: Contest, job: Job, fold: Fold) -> tuple[Recipe, tuple[list[Spots], list[Spots], list[Spots]]]:
    """The sized recipe of a network, its training, validation and tested spots."""
    its = contest.data_of(fold)
    recipe = contest.recipe_of(job).sized(len(its.panel.genes))
    trained, held_out = split(recipe, *contest.parts(job, fold), job.seed or 0)
    return recipe, (trained, held_out, [(view, np.arange(len(view.centres_px))) for view in its.tested])


def _rounded(value: float) -> float:
    """To three figures, as much as such an estimate is worth."""
    return float(f"{value:.3g}")
