"""Rows of scores as an evaluation leaves them, with figures that a test chooses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hifusion import metrics
from hifusion.baselines import BASELINES

GENES = ("ERBB2", "CD74")


def rows(
    scores: Mapping[tuple[str, int | None], np.ndarray],
    patients: Sequence[str] | None = None,
    genes: Sequence[str] = GENES,
    mse: Mapping[str, float] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of genes and of sections.

    Parameters
    ----------
    scores
        (model, seed) -> ``pcc_per_gene``, ``(sections, genes)``.
    patients
        Of each section; by default each section is of a patient of its own.
    mse
        Model -> MSE of every gene; by default 1 - ``pcc_per_gene``.
    """
    gene_rows, section_rows = [], []
    for (model, seed), values in scores.items():
        patient_of = patients or [f"P{i}" for i in range(len(values))]
        for number, (patient, correlations) in enumerate(zip(patient_of, values, strict=True)):
            where = {
                "model": model,
                "seed": seed,
                "label": model if seed is None else f"{model}-seed{seed}",
                "fold": patient,
                "section": f"{patient}-{number}",
                "patient": patient,
            }
            errors = 1 - np.nan_to_num(correlations) if mse is None else np.full(len(genes), mse[model])
            table = pd.DataFrame(dict.fromkeys(metrics.GENE_COLUMNS, 0.5), index=range(len(genes)))
            gene_rows.append(table.assign(gene=list(genes), pcc_per_gene=correlations, mse=errors, **where))
            section = dict.fromkeys(metrics.SECTION_COLUMNS, 0.5) | {"n_spots": 100, "mse": float(errors.mean())}
            section_rows.append({**where, **section, "n_undefined_spots": 0})
    found = pd.concat(gene_rows, ignore_index=True)
    return found, pd.DataFrame(section_rows)


def result_of(genes: pd.DataFrame, sections: pd.DataFrame) -> dict[str, Any]:
    """What metrics.json holds of rows, with the scores of each model's first seed for a model with several."""
    models = {}
    for model, its in genes.groupby("model", sort=False):
        labels = list(dict.fromkeys(its["label"]))
        baseline = BASELINES.get(str(model))
        models[model] = {
            "null": model == "shuffled" or baseline is not None,
            "oracle": bool(baseline and baseline.oracle),
            "by_seed": {label: {} for label in labels} if len(labels) > 1 else {},
            **metrics.aggregate(its[its["label"] == labels[0]], sections[sections["label"] == labels[0]], resamples=50),
        }
    return {
        "protocol": {"name": "leave_one_patient_out", "same_patient": False, "meaning": "each patient in turn"},
        "leak_check": True,
        "left_out": [],
        "folds": [{"name": fold, "panel_rule": "top_mean"} for fold in genes["fold"].unique()],
        "recipe": {"normalisation": "log_share", "panel": "top_mean"},
        "models": models,
        "not_run": {},
    }
