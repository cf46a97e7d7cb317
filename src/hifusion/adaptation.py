"""A run adapted to a section of which some spots were measured: offset and a few directions learned anew.

What differs most between patients is every gene's mean, and then how strongly the few large patterns show. Both are
learned from what the run's prediction misses at the measured spots, and shrunk by what so few spots can tell: the
offset of a gene towards 0 by the spread of its errors, the directions by a penalty chosen on spots left out.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from hifusion import files
from hifusion.checkpoint import Adapter, Run, save_adapter
from hifusion.data import block_numbers
from hifusion.errors import InputError
from hifusion.metrics import pcc_per_gene
from hifusion.prediction import predict_section

Progress = Callable[[str, int, int], None]
DIRECTIONS = 10
FOLDS = 5
PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, np.inf)  # infinite: the offset alone
LEAST_SPOTS = 10


def fit_adapter(predicted: np.ndarray, measured: np.ndarray, rows: np.ndarray) -> Adapter:
    """Learn the change from some measured spots of a section.

    Parameters
    ----------
    predicted
        Of all its spots, ``(N, G)``: the directions are those of the whole section.
    measured
        ``(N, G)``; only ``rows`` are looked at.
    rows
        The measured spots, at least :data:`LEAST_SPOTS`.

    Raises
    ------
    InputError
        Too few spots.
    """
    if len(rows) < LEAST_SPOTS:
        raise InputError(f"{len(rows)} measured spots are too few to adapt to; give at least {LEAST_SPOTS}")
    centre = predicted.mean(axis=0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(predicted - centre, full_matrices=False)
    real = sizes > 1e-6 * max(float(sizes[0]), 1e-12)
    count = min(DIRECTIONS, int(real.sum()), len(rows) // 4)
    directions = axes[:count].T / sizes[:count] * np.sqrt(len(predicted))
    scores, errors = (predicted[rows] - centre) @ directions, measured[rows].astype(np.float64) - predicted[rows]
    middle, mean = scores.mean(axis=0), errors.mean(axis=0)
    slopes = _slopes(scores - middle, errors - mean)
    noise = (errors - mean - (scores - middle) @ slopes).var(axis=0) / len(rows)
    between = max(float(np.mean(mean**2 - noise)), 0.0)
    kept = between / (between + noise) if between else np.zeros_like(noise)
    return Adapter(centre, directions, slopes, kept * mean - middle @ slopes)


def _slopes(scores: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Ridge regression with the penalty of :data:`PENALTIES` that predicts left-out spots best."""
    best, least = np.zeros((scores.shape[1], errors.shape[1])), np.inf
    for penalty in PENALTIES:
        if np.isinf(penalty):
            slopes, missed = np.zeros_like(best), errors
        else:
            inverse = np.linalg.inv(scores.T @ scores + penalty * np.eye(scores.shape[1]))
            slopes = inverse @ scores.T @ errors
            # The error at a spot left out, without fitting again (Allen, Technometrics 16, 1974).
            weight = np.einsum("nr,rs,ns->n", scores, inverse, scores) + 1 / len(scores)
            missed = (errors - scores @ slopes) / np.maximum(1 - weight, 1e-3)[:, None]
        error = float(np.square(missed).mean())
        if error < least:
            best, least = slopes, error
    return best


def chosen_spots(centres_px: np.ndarray, count: int, seed: int) -> np.ndarray:
    """So many spots spread over a section: each the farthest from those before it, the first drawn from the seed."""
    rows = [int(np.random.default_rng(seed).integers(len(centres_px)))]
    away = np.linalg.norm(centres_px - centres_px[rows[0]], axis=1)
    while len(rows) < min(count, len(centres_px)):
        rows.append(int(away.argmax()))
        away = np.minimum(away, np.linalg.norm(centres_px - centres_px[rows[-1]], axis=1))
    return np.sort(rows)


def adapt(
    run: Run,
    section: AnnData,
    out: Path,
    *,
    image: Path | None = None,
    spots: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Adapt a run to a measured section and leave a new run folder; returns the gain on spots it did not see.

    Parameters
    ----------
    section
        A measured section with the genes of the run's panel.
    image
        Its slide, where the section does not name it.
    spots
        How many of its spots to look at, spread over it, so that the others tell the gain. None: all of them; the gain
        is then that on blocks of spots left out in turn.

    Raises
    ------
    InputError
        A folder that is there already, a section without measurements of the panel, or too few spots.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: is there already; give a new folder for the adapted run")
    if run.adapter is not None:
        raise InputError(f"{run.root}: was adapted already; adapt the run that it was made from")
    predicted = predict_section(run, section, image, progress=progress)
    name = section.uns["hifusion"]["section"]
    if "measured" not in predicted.layers:
        raise InputError(f"section {name} has no counts of the run's {len(run.panel.genes)} genes; give a measured one")
    before, measured = np.asarray(predicted.X, dtype=np.float64), np.asarray(predicted.layers["measured"])
    centres, pitch_px = predicted.obsm["spatial"], section.uns["hifusion"]["pitch_um"] / section.uns["hifusion"]["mpp"]
    every = np.arange(len(before))
    rows = every if spots is None else chosen_spots(centres, spots, seed)
    if spots is None:
        folds = block_numbers(centres, pitch_px) % FOLDS
        parts = [(every[folds != fold], every[folds == fold]) for fold in np.unique(folds)]
    else:
        parts = [(rows, np.setdiff1d(every, rows))]
    after, rest = before.copy(), np.concatenate([left for _, left in parts])
    for seen, left in parts:
        after[left] += fit_adapter(before, measured, seen).change(before[left])
    if not len(rest):
        raise InputError(f"spots={spots}: leaves none of the {len(every)} spots to tell the gain; give fewer, or none")
    adapter = fit_adapter(before, measured, rows)
    gain = {
        "section": name,
        "patient": section.uns["hifusion"]["patient"],
        "spots": len(rows),
        "scored_on": len(rest),
        "mse_before": float(np.square(before - measured)[rest].mean()),
        "mse_after": float(np.square(after - measured)[rest].mean()),
        "pcc_per_gene_before": float(np.nan_to_num(pcc_per_gene(before[rest], measured[rest])).mean()),
        "pcc_per_gene_after": float(np.nan_to_num(pcc_per_gene(after[rest], measured[rest])).mean()),
    }
    with files.replacing_folder(out) as part:
        shutil.copytree(run.root, part, dirs_exist_ok=True)
        save_adapter(part, adapter)
        files.write_json(part / "run.json", run.facts | {"adapted_to": gain, "adapted_from": run.id})
    return gain
