"""A benchmark's leaderboard: one row a model, what its figures mean, and its standing against the best one."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from hifusion.comparison import gene_wins, paired_differences


class Column(NamedTuple):
    """How a column of the leaderboard is shown; ``decimals`` None for text."""

    title: str
    decimals: int | None
    meaning: str


COLUMNS: dict[str, Column] = {
    "model": Column("model", None, ""),
    "kind": Column(
        "kind",
        None,
        "null: knows nothing of the image; simple rival: no network; oracle: looks at the tested section's own "
        "measurements, a yardstick and no method, so it is listed last and ranks nowhere",
    ),
    "mse": Column("MSE", 4, "mean squared error, averaged as the evaluation says; lower is better"),
    "mae": Column("MAE", 4, "mean absolute error, averaged alike; lower is better"),
    "pcc_per_spot": Column(
        "pcc_per_spot", 4, "correlation across genes at each spot; a mean profile alone makes it high"
    ),
    "pcc_per_gene": Column(
        "pcc_per_gene",
        3,
        "correlation across spots for each gene, mean over genes: what the table is sorted by; an undefined one (a "
        "constant map or gene) counts as 0; in brackets a 95 % bootstrap interval of the model alone",
    ),
    "pcc_per_gene_median": Column("median", 3, "the same, median over genes"),
    "fraction_of_ceiling": Column("of ceiling", 3, "share of the correlation that counting noise leaves possible"),
    "wins": Column("wins", 1, "genes on which no other honest model has a higher pcc_per_gene; ties share a gene"),
    "seeds": Column("seeds", 0, "trainings that are averaged; none for a model without random choices"),
    "against_best": Column("against the best", None, "verdict of the paired comparison with the first row"),
    "parameters_m": Column("parameters, M", 2, "weights of the network, millions"),
    "gflop_per_spot": Column("GFLOP / spot", 2, "of one forward pass, in matrix products and convolutions"),
    "train_seconds": Column("training, s", 0, "mean over folds and seeds"),
    "train_spots_per_s": Column("training, spots/s", 1, "mean over folds and seeds"),
    "predict_spots_per_s": Column("prediction, spots/s", 1, "mean over folds and seeds"),
    "peak_memory_mib": Column("peak memory, MiB", 0, "largest over folds and seeds"),
}
COSTS = (
    "parameters", "gflop_per_spot", "train_seconds", "train_spots_per_s", "predict_spots_per_s", "peak_memory_mib",
)  # fmt: skip
COST_COLUMNS = ("parameters_m", *COSTS[1:])
# Column -> key of a model's scores in the result.
_SCORES = {
    "mse": "mse",
    "mae": "mae",
    "pcc_per_spot": "pcc_per_spot",
    "pcc_per_gene": "pcc_per_gene_mean",
    "pcc_per_gene_median": "pcc_per_gene_median",
    "fraction_of_ceiling": "fraction_of_ceiling",
}
_NULLS = ("train_mean", "shuffled")


def leaderboard(
    result: dict[str, Any], genes: pd.DataFrame, sections: pd.DataFrame, costs: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row a model: honest ones by falling ``pcc_per_gene``, then the oracles likewise.

    Parameters
    ----------
    result
        What ``metrics.json`` holds.
    genes, sections
        Rows of scores, as :func:`hifusion.comparison.paired_differences` takes them.
    costs
        A row per label and fold: ``model`` and :data:`COSTS`, NaN where a figure does not apply; other columns are
        ignored. A model's figures are means, its peak memory the largest. None leaves them NaN.

    Returns
    -------
    DataFrame
        The keys of :data:`COLUMNS`, and ``pcc_per_gene_low, pcc_per_gene_high`` behind ``pcc_per_gene``. ``kind`` is
        ``"null"``, ``"oracle"``, ``"simple rival"`` or ``"network"``. ``against_best`` is the verdict against the
        first row, ``"best"`` for that row itself and ``""`` for oracles.
    """
    models = result["models"]
    table = pd.DataFrame(
        [
            {
                "model": name,
                "kind": _kind(name, scores),
                **{column: scores[key] for column, key in _SCORES.items()},
                **dict(zip(("pcc_per_gene_low", "pcc_per_gene_high"), _interval(scores), strict=True)),
            }
            for name, scores in models.items()
        ]
    )
    scores = table.columns.drop(["model", "kind"])
    table[scores] = table[scores].astype(np.float64)
    table["seeds"] = table["model"].map(genes.groupby("model")["seed"].nunique())
    table["wins"] = table["model"].map(gene_wins(genes).set_index("model")["wins"])
    table = table.join(_costs(costs), on="model")
    # False sorts before True; a score that is not defined goes last of its group.
    table = table.assign(oracle=table["kind"] == "oracle").sort_values(
        ["oracle", "pcc_per_gene"], ascending=[True, False], kind="stable", ignore_index=True
    )
    table["against_best"] = _against_best(table, paired_differences(genes, sections))
    order = list(COLUMNS)
    after = order.index("pcc_per_gene") + 1
    return table[[*order[:after], "pcc_per_gene_low", "pcc_per_gene_high", *order[after:]]]


def _kind(name: str, scores: dict[str, Any]) -> str:
    if scores["oracle"]:
        return "oracle"
    return "network" if not scores["null"] else "null" if name in _NULLS else "simple rival"


def _interval(scores: dict[str, Any]) -> list[float]:
    return scores["intervals"]["pcc_per_gene_mean"] or [np.nan, np.nan]


def _costs(costs: pd.DataFrame | None) -> pd.DataFrame:
    """Costs of each model, indexed by its name."""
    given = pd.DataFrame({"model": pd.Series(dtype=object)}) if costs is None else costs
    by_model = given.reindex(columns=["model", *COSTS]).astype(dict.fromkeys(COSTS, np.float64)).groupby("model")
    found = by_model.mean().assign(peak_memory_mib=by_model["peak_memory_mib"].max())
    return found.assign(parameters_m=found["parameters"] / 1e6).drop(columns="parameters")


def _against_best(table: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    best = table["model"].iloc[0]
    verdicts = {
        frozenset(pair): verdict
        for *pair, verdict in pairs[["model_a", "model_b", "verdict"]].itertuples(index=False, name=None)
    }
    return [
        "best" if model == best and not oracle else verdicts.get(frozenset((best, model)), "")
        for model, oracle in zip(table["model"], table["oracle"], strict=True)
    ]
