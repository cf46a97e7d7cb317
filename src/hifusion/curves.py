"""Learning curves, per-gene skill and the parts of the error, drawn from the tables that runs and evaluations leave."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hifusion import files
from hifusion.errors import plain, refuse_unknown
from hifusion.evaluated import oracles, rank, read_table
from hifusion.plots import axes_or_new, check_out, save

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito

NO_TERMS = ("epoch", "lr", "validation_mse", "seconds", "spots_per_s", "devices", "recomputed")
"""Columns of ``log.csv`` beside the loss terms."""


def plot_learning(run: Path, out: Path, *, dpi: int = 150) -> Path:
    """Draw what a run's ``log.csv`` holds against the epoch: the loss terms, and the validation MSE.

    Raises
    ------
    InputError
        No run folder, or one without a finished epoch.
    """
    check_out(out, dpi)
    figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    learning(run, ax=left)
    learning(run, validation=True, ax=right)
    return save(figure, out, dpi)


def learning(run: Path, *, validation: bool = False, ax: Axes | None = None) -> Axes:
    """Draw one half of :func:`plot_learning` on axes: the loss terms, or the validation MSE.

    Parameters
    ----------
    ax
        Axes to draw on; a new pyplot figure where None.
    """
    log = read_table(Path(run) / "log.csv", ("epoch", "validation_mse"), "train first, with `hifusion train`")
    names = ["validation_mse"] if validation else [name for name in log.columns if name not in NO_TERMS]
    ax = axes_or_new(ax)
    marker = "o" if len(log) == 1 and not validation else ""
    for name, colour in zip(names, LINES * len(names), strict=False):
        ax.plot(log["epoch"], log[name], color=colour, label=None if validation else name, lw=1.6, marker=marker)
    if (log[names].dropna() > 0).to_numpy().all():  # published weights have no terms before the first epoch
        ax.set_yscale("log")  # both fall by orders of magnitude within the first epochs
    if validation:
        facts = files.read_json(Path(run) / "run.json")
        best = facts.get("best_epoch")
        best = log["epoch"][log["validation_mse"].argmin()] if best is None else best
        kept = log[log["epoch"] == best]
        note = f"epoch {best}: {kept['validation_mse'].iloc[0]:.4f}" if len(kept) else "no epoch kept yet"
        ax.plot(kept["epoch"], kept["validation_mse"], "o", color=LINES[1], ms=7, label=note)
    ax.set_title("validation MSE" if validation else "training loss, mean over spots", fontsize=10)
    if names:
        ax.legend(fontsize=8, frameon=False)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plot_gene_skill(evaluation: Path, out: Path, *, dpi: int = 150) -> Path:
    """Draw ``pcc_per_gene`` of every gene, sorted, a curve per model, with the ceiling that counting noise leaves.

    Undefined correlations count as 0; a gene's value is the mean over sections, then patients, then seeds.

    Raises
    ------
    InputError
        No ``metrics.csv`` in the folder.
    """
    check_out(out, dpi)
    figure = Figure(figsize=(6.4, 4), layout="constrained", facecolor="white")
    gene_skill(evaluation, ax=figure.subplots())
    return save(figure, out, dpi)


def gene_skill(evaluation: Path, *, ax: Axes | None = None) -> Axes:
    """Draw on axes what :func:`plot_gene_skill` draws; on a new figure where ``ax`` is None."""
    skill = gene_means(Path(evaluation), ("pcc_per_gene", "ceiling"))
    shown = list(skill.index.unique("model"))
    ax = axes_or_new(ax)
    curves = [("ceiling", skill["ceiling"].groupby("gene").mean().dropna().to_numpy(), "0.6", "--")]
    curves += [
        (name, skill.loc[name, "pcc_per_gene"].to_numpy(), colour, "-")
        for name, colour in zip(shown, LINES * len(shown), strict=False)
    ]
    for name, values, colour, style in curves:
        if values.size:
            label = f"mean {values.mean():+.3f}  {plain(name)}"
            ax.plot(np.arange(1, values.size + 1), np.sort(values)[::-1], style, color=colour, lw=1.8, label=label)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.set(xlabel="genes, best predicted first (each curve sorted by itself)", ylabel="pcc_per_gene")
    ax.spines[["top", "right"]].set_visible(False)
    for text in ax.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
    return ax


def plot_error_split(evaluation: Path, out: Path, *, models: Sequence[str] | None = None, dpi: int = 150) -> Path:
    """Draw the MSE of every model as the sum of its offset and its pattern error, the floor first.

    Offset: the section's mean is wrong, which a known mean would mend. Pattern: high and low are in the wrong places.
    Oracles are left out where no ``models`` are named, as in :func:`gene_means`.

    Raises
    ------
    InputError
        No ``metrics.json`` in the folder, or a model that is not in it.
    """
    check_out(out, dpi)
    rows = len(_models_of(evaluation, models))
    figure = Figure(figsize=(7.2, 1.1 + 0.36 * rows), layout="constrained", facecolor="white")
    error_split(evaluation, models=models, ax=figure.subplots())
    return save(figure, out, dpi)


def error_split(evaluation: Path, *, models: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Draw on axes what :func:`plot_error_split` draws; on a new figure where ``ax`` is None."""
    scores = _models_of(evaluation, models)
    offset, pattern = (np.array([its[part] for its in scores.values()]) for part in ("mse_offset", "mse_pattern"))
    ax, rows = axes_or_new(ax), np.arange(len(scores))
    ax.barh(rows, pattern, 0.7, color=LINES[0], label="pattern: wrong places")
    ax.barh(rows, offset, 0.7, left=pattern, color=LINES[4], label="offset: whole section too high or low")
    for row, total in enumerate((offset + pattern).tolist()):
        ax.text(total, row, f" {total:.3f}", fontsize=8, va="center")
    ax.set_yticks(rows, [plain(name, 32) for name in scores], fontsize=9, parse_math=False)
    ax.set(ylim=(len(scores) - 0.4, -0.6), xlim=(0, 1.12 * float((offset + pattern).max()) or 1.0), xlabel="MSE")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    return ax


def _models_of(evaluation: Path, models: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Scores of the models to draw, the floor first."""
    result = files.read_json(Path(evaluation) / "metrics.json")["models"]
    refuse_unknown("model", models or (), result, str(evaluation))
    shown = models or [name for name in result if not result[name]["oracle"]] or result
    return {name: result[name] for name in sorted(shown, key=rank)}


def gene_means(evaluation: Path, columns: Sequence[str], models: Sequence[str] | None = None) -> pd.DataFrame:
    """Scores of every model and gene, rows (model, gene): the mean over sections, then patients, then seeds.

    Models stand in the order of tables, the floor first. A ``pcc_per_gene`` that is undefined counts as 0, any other
    score not at all.

    Parameters
    ----------
    columns
        Of :data:`hifusion.metrics.GENE_COLUMNS`.
    models
        Names, or labels to take a single seed of each; all that are no oracles where None.

    Raises
    ------
    InputError
        No ``metrics.csv`` in the folder, or a model that is not in it.
    """
    path = Path(evaluation) / "metrics.csv"
    needed = ("model", "label", "patient", "gene", *columns)
    table = read_table(path, needed, "`hifusion evaluate` writes it when it is done")
    if models:
        refuse_unknown("model", models, [*table["label"].unique(), *table["model"].unique()], str(path))
        table = table[table["label"].isin(models) | table["model"].isin(models)]
    else:
        hidden = oracles(Path(evaluation))
        table = table[~table["model"].isin(hidden)] if set(table["model"]) - hidden else table
    if "pcc_per_gene" in columns:
        table = table.assign(pcc_per_gene=table["pcc_per_gene"].fillna(0.0))
    by_patient = table.groupby(["model", "label", "patient", "gene"], sort=False)[list(columns)].mean()
    means = by_patient.groupby(["model", "label", "gene"]).mean().groupby(["model", "gene"]).mean()
    return pd.concat([means.loc[[name]] for name in sorted(means.index.unique("model"), key=rank)])
