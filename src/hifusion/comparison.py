"""Which models a benchmark tells apart: paired differences, genes won, and what selection on the tested fold is worth.

Everything is built from the rows of scores that an evaluation leaves behind, and averaged as
:func:`hifusion.metrics.aggregate` does: an undefined correlation counts as 0.
"""

from collections.abc import Collection
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from hifusion.baselines import BASELINES
from hifusion.errors import InputError

# Metric -> its column, and whether it is in the rows of genes or in those of sections.
_METRICS = {"pcc_per_gene": "genes", "mse": "sections"}
ORACLES = frozenset(name for name, its in BASELINES.items() if its.oracle)
NOT_RANKED = ORACLES | {"shuffled"}

DIFFER, NOT_TOLD_APART, TOO_FEW = "differ", "not told apart", "too few"
# Five patients that all agree do so by chance in 2 of 32 cases: below six, neither a p value nor an interval that lies
# between the smallest and the largest of them can keep to 5 %.
FEWEST_UNITS = 6
SEED_ERRORS = 2.0
RESAMPLES = 5000
_ALL_FLIPS = 16  # units whose 2^16 sign flips are all tried; of more units as many are drawn
_TIE = 1e-12

PAIR_COLUMNS = (
    "model_a", "model_b", "metric", "a", "b", "difference", "low", "high", "over", "units", "seeds_a", "seeds_b",
    "seed_error", "p", "p_holm", "verdict",
)  # fmt: skip
GAP_SCORES = ("mse", "mae", "pcc_per_spot")


class _Scores(NamedTuple):
    """One metric of all models, on the units that are resampled."""

    by_model: pd.DataFrame
    """Seeds averaged: a row per (unit, gene), a column per model."""
    by_label: pd.Series
    """The one score of each label."""
    seeds: dict[str, list[str]]
    """Model -> its labels, in the order of the rows."""
    random: set[str]
    """Models that have seeds."""
    unit: str

    def of(self, model: str) -> float:
        """Mean over seeds."""
        return float(self.by_label[self.seeds[model]].mean())


def paired_differences(
    genes: pd.DataFrame,
    sections: pd.DataFrame,
    metric: str = "pcc_per_gene",
    *,
    left_out: Collection[str] = ORACLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Every pair of models and whether they are told apart, a row per pair.

    Scores are averaged over seeds, over the sections of a patient, over patients, and ``pcc_per_gene`` then over genes:
    it is the ``pcc_per_gene_mean`` of :func:`hifusion.metrics.aggregate`; ``mse`` is that of ``averaging="patients"``.

    Parameters
    ----------
    genes
        Rows of ``metrics.csv``.
    sections
        A row per label and section: ``model, seed, label, section, patient`` and the scores of a section.
    metric
        ``"pcc_per_gene"`` (from ``genes``) or ``"mse"`` (from ``sections``).
    left_out
        Models not compared: by default the oracles, which are no methods.
    seed
        Of the bootstrap, and of the sign flips where not all are tried.

    Returns
    -------
    DataFrame
        - ``model_a, model_b, metric, a, b, difference``: scores and ``a - b``; ``model_a`` has the better score.
        - ``low, high``: paired 95 % bootstrap interval of the difference; NaN with one unit. Units (patients; sections
          where there is one patient) are drawn with replacement, the same for both models. The percentiles are widened
          for few units as Hesterberg 2015 does ("expanded percentile": the normal probability of
          ``-sqrt(n / (n - 1)) t(.975, n - 1)`` in each tail): plain ones exclude 0 in 12 % of cases without a
          difference with 8 units and in 15 % with 6; these in 6 % and 8 %.
        - ``over, units``: ``"patients"`` or ``"sections"``, and how many.
        - ``seeds_a, seeds_b``: numbers of seeds, 0 for a model without random choices.
        - ``seed_error``: standard error of the difference over seeds,
          ``sqrt(var(a's seeds) / seeds_a + var(b's seeds) / seeds_b)``; a model without random choices adds 0, one
          with a single seed makes it NaN.
        - ``p, p_holm``: two-sided sign-flip permutation test on the units, exact up to 16 of them, and Holm's
          correction over all pairs; NaN below 6 units.
        - ``verdict``: ``"too few patients"`` or ``"too few sections"`` below 6 units; ``"not told apart"`` where the
          interval holds 0 or the difference is not above 2 ``seed_error``; ``"too few seeds"`` where the interval
          excludes 0 but ``seed_error`` is not known; else ``"differ"``. The verdict is that of one pair: of 20 pairs
          without a difference about one differs by chance, which ``p_holm`` allows for.

    Raises
    ------
    InputError
        Unknown metric, or labels that were not scored on the same sections and genes.
    """
    if metric not in _METRICS:
        raise InputError(f"metric={metric!r} is unknown; use one of {', '.join(_METRICS)}")
    rows = genes if _METRICS[metric] == "genes" else sections.assign(gene="")
    scores = _scores(rows[~rows["model"].isin(left_out)], metric)
    best_first = sorted(scores.seeds, key=scores.of, reverse=metric != "mse")
    found = [_compare(scores, a, b, seed) for a, b in combinations(best_first, 2)]
    pairs = pd.DataFrame(found, columns=[name for name in PAIR_COLUMNS if name not in ("metric", "p_holm", "verdict")])
    pairs["metric"], pairs["p_holm"] = metric, holm(pairs["p"].to_numpy(dtype=np.float64))
    pairs["verdict"] = [_verdict(row) for _, row in pairs.iterrows()]
    return pairs[list(PAIR_COLUMNS)]


def gene_wins(genes: pd.DataFrame, *, not_ranked: Collection[str] = NOT_RANKED) -> pd.DataFrame:
    """On how many genes each model is the best, and better than the simplest rivals, a row per model.

    Parameters
    ----------
    genes
        Rows of ``metrics.csv``.
    not_ranked
        Models that cannot win: by default the oracles and the shuffled null.

    Returns
    -------
    DataFrame
        ``model``; ``genes``, how many there are; ``wins``, on how many the model has the best mean ``pcc_per_gene``,
        models that tie sharing the gene (NaN for those that cannot win); ``beats_train_mean, beats_ridge``, on how many
        its mean MSE is below theirs (NaN for that rival itself, and where it was not run). A gene that every other
        model predicts with a correlation below 0 is won by a constant map, whose undefined one counts as 0.
    """
    correlation = _over_units(_scores(genes, "pcc_per_gene").by_model)
    ranked = correlation.drop(columns=list(not_ranked), errors="ignore")
    best = ranked.ge(ranked.max(axis=1) - _TIE, axis=0)
    error = _over_units(_scores(genes, "mse").by_model)
    wins = best.div(best.sum(axis=1), axis=0).sum()
    table = pd.DataFrame(
        {
            "genes": len(correlation),
            "wins": wins.reindex(correlation.columns),
            **{
                f"beats_{rival}": error.lt(error[rival] - _TIE, axis=0).sum().drop(rival).reindex(error.columns)
                if rival in error
                else np.nan
                for rival in ("train_mean", "ridge")
            },
        }
    )
    return table.rename_axis("model").reset_index()


def selection_gap(published_sections: pd.DataFrame, honest_sections: pd.DataFrame) -> pd.DataFrame:
    """What choosing the epoch on the tested fold is worth: both scores of each model, and the gap.

    Parameters
    ----------
    published_sections, honest_sections
        A row per label and section, as evaluated by the published habit and with the epoch chosen on other sections.

    Returns
    -------
    DataFrame
        ``model, score, published, honest, gap`` (published - honest), a row for each of :data:`GAP_SCORES`. Spots are
        pooled within a fold, then folds are averaged, then seeds, as in the table of an evaluation. Models that are in
        one of the tables only have no gap and are left out.

    Raises
    ------
    InputError
        No model is in both tables, or one was scored on other sections or with other seeds.
    """
    both = [name for name in honest_sections["model"].unique() if name in set(published_sections["model"])]
    if not both:
        raise InputError("no model is in both tables of sections; evaluate the same models in both ways")
    found = []
    for model in both:
        published, honest = (rows[rows["model"] == model] for rows in (published_sections, honest_sections))
        keys = [set(zip(rows["label"], rows["fold"], rows["section"], strict=True)) for rows in (published, honest)]
        if keys[0] != keys[1]:
            raise InputError(
                f"model {model}: the two tables differ in seeds, folds or sections, as in {min(keys[0] ^ keys[1])}; "
                "evaluate both ways with the same ones"
            )
        for score in GAP_SCORES:
            one, other = _over_folds(published, score), _over_folds(honest, score)
            found.append({"model": model, "score": score, "published": one, "honest": other, "gap": one - other})
    return pd.DataFrame(found)


def holm(p: np.ndarray) -> np.ndarray:
    """P values corrected for their number by Holm's step-down rule, ``(n,)``; NaN stays and does not count."""
    corrected = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


def _scores(rows: pd.DataFrame, column: str) -> _Scores:
    if rows.empty:
        raise InputError("there are no models to compare; give the rows of at least one that is no oracle")
    unit = "patient" if rows["patient"].nunique() > 1 else "section"
    by_cell = rows.fillna({"pcc_per_gene": 0.0}).groupby(["section", "gene", "label"])[column].mean().unstack("label")
    incomplete = by_cell.columns[by_cell.isna().any()]
    if len(incomplete):
        cell = by_cell.index[by_cell[incomplete[0]].isna()][0]
        raise InputError(
            f"{', '.join(map(str, incomplete))}: not scored on all sections and genes, as on section {cell[0]}; "
            "evaluate every model on the same ones, or leave those out"
        )
    unit_of = rows.drop_duplicates("section").set_index("section", drop=False)[unit]
    units = unit_of.loc[by_cell.index.get_level_values("section")].to_numpy()
    by_unit = by_cell.set_axis(pd.MultiIndex.from_arrays([units, by_cell.index.get_level_values("gene")]))
    by_unit = by_unit.rename_axis(["unit", "gene"]).groupby(["unit", "gene"]).mean()
    labels = rows.drop_duplicates("label")
    of_model = {str(model): list(its["label"]) for model, its in labels.groupby("model", sort=False)}
    return _Scores(
        by_model=pd.DataFrame({model: by_unit[its].mean(axis=1) for model, its in of_model.items()}),
        by_label=_over_units(by_unit).mean(),
        seeds=of_model,
        random=set(labels.loc[labels["seed"].notna(), "model"]),
        unit=unit,
    )


def _over_units(by_unit: pd.DataFrame) -> pd.DataFrame:
    """(unit, gene) -> gene, over the units that have the gene in their panel."""
    return by_unit.groupby("gene").mean()


def _over_folds(rows: pd.DataFrame, score: str) -> float:
    weighted = rows.assign(total=rows[score] * rows["n_spots"]).groupby(["label", "fold"])[["total", "n_spots"]].sum()
    return float((weighted["total"] / weighted["n_spots"]).groupby("label").mean().mean())


def _compare(scores: _Scores, a: str, b: str, seed: int) -> dict[str, object]:
    difference = (scores.by_model[a] - scores.by_model[b]).unstack("unit").to_numpy()  # (G, units)
    units = difference.shape[1]
    low, high = _interval(difference, seed) if units > 1 else (np.nan, np.nan)
    # What each unit adds to the difference: with equal panels a unit's mean over genes, divided by the units.
    parts = np.nan_to_num(difference / np.isfinite(difference).sum(axis=1, keepdims=True)).mean(axis=0)
    one, other = scores.of(a), scores.of(b)
    return {
        "model_a": a,
        "model_b": b,
        "a": one,
        "b": other,
        "difference": one - other,
        "low": low,
        "high": high,
        "over": f"{scores.unit}s",
        "units": units,
        **{f"seeds_{side}": _seeds(scores, model) for side, model in (("a", a), ("b", b))},
        "seed_error": float(np.sqrt(_seed_variance(scores, a) + _seed_variance(scores, b))),
        "p": _sign_flip(parts, seed) if units >= FEWEST_UNITS else np.nan,
    }


def _seeds(scores: _Scores, model: str) -> int:
    return len(scores.seeds[model]) if model in scores.random else 0


def _seed_variance(scores: _Scores, model: str) -> float:
    """Of the mean over seeds; NaN where one seed cannot tell."""
    number = _seeds(scores, model)
    return float(scores.by_label[scores.seeds[model]].var(ddof=1)) / number if number else 0.0


def _interval(difference: np.ndarray, seed: int) -> tuple[float, float]:
    """Expanded percentile interval of the mean over units, then over genes, of ``(G, units)``; NaN: not in a panel."""
    units = difference.shape[1]
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=RESAMPLES).T
    # Genes that the same units know have the same divisor in every draw, so their sum is all that is needed.
    patterns, which = np.unique(np.isfinite(difference), axis=0, return_inverse=True)
    together = np.zeros(patterns.shape)
    np.add.at(together, which.ravel(), np.nan_to_num(difference))
    times = patterns.astype(np.int64) @ draws  # (patterns, draws)
    drawn = times > 0
    means = np.divide(together @ draws, times, out=np.zeros(times.shape), where=drawn)
    per_draw = means.sum(axis=0) / (np.bincount(which.ravel()) @ drawn)
    tail = 100 * norm.cdf(-np.sqrt(units / (units - 1)) * t.ppf(0.975, units - 1))
    low, high = np.percentile(per_draw, [tail, 100 - tail])
    return float(low), float(high)


def _sign_flip(parts: np.ndarray, seed: int) -> float:
    """How often the sum is as far from 0 when the sign of each part is left to chance."""
    if len(parts) <= _ALL_FLIPS:
        sums = np.zeros(1)
        for part in parts:
            sums = np.concatenate([sums + part, sums - part])
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], (2**_ALL_FLIPS, len(parts)))
        sums = np.append(signs @ parts, parts.sum())  # the parts as they are count among the draws
    return float(np.mean(np.abs(sums) >= np.abs(parts.sum()) - _TIE))


def _verdict(row: pd.Series) -> str:
    if row["units"] < FEWEST_UNITS:
        return f"{TOO_FEW} {row['over']}"
    if row["low"] <= 0 <= row["high"] or abs(row["difference"]) <= SEED_ERRORS * row["seed_error"]:
        return NOT_TOLD_APART
    return f"{TOO_FEW} seeds" if np.isnan(row["seed_error"]) else DIFFER
