"""Which genes of a prediction to trust: a word for each, measured on sections that were not trained on, or expected.

``green``: the map can be read; ``amber``: its broad pattern; ``red``: not at all. A run may bring a card of what it
expects (``trust.csv``), and its predictions a word in ``var["trust"]``; where there is none, the test gives the word.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from hifusion.evaluated import read_table
from hifusion.section import read_section

CARD = "trust.csv"
COLUMNS = ("gene", "pcc_per_gene", "pcc_low", "pcc_high", "of_ceiling", "coverage_90", "trust")
MEANINGS = {
    "green": "the map can be read",
    "amber": "its broad pattern can be read, single spots cannot",
    "red": "not to be read",
}
GREEN_PCC, GREEN_SHARE, AMBER_PCC = 0.4, 0.5, 0.2
RULE = (
    f"green: pcc_per_gene of at least {GREEN_PCC:g}, at least {100 * GREEN_SHARE:.0f} % of what counting noise leaves "
    "possible, and a smaller error than the constant in every tested section; "
    f"amber: at least {AMBER_PCC:g}, and a smaller error than the constant on average; red: all others"
)


def read_card(run: Path) -> pd.DataFrame | None:
    """What a run expects of each gene, with :data:`COLUMNS`; None for a run without a card."""
    path = Path(run) / CARD
    return read_table(path, COLUMNS, "train the run anew")[list(COLUMNS)] if path.exists() else None


def measured_trust(rows: pd.DataFrame, predictions: Iterable[Path], runs: Iterable[Path] = ()) -> pd.DataFrame:
    """How each gene was predicted on tested sections, and the word for it, best first.

    Parameters
    ----------
    rows
        Of ``metrics.csv``, of one model.
    predictions
        The model's prediction files; where they bring intervals, their coverage is measured, else it is NaN.
    runs
        The model's trainings. Where these or the predictions bring words for a gene the most cautious of them stands;
        else it follows :data:`RULE`.

    Returns
    -------
    DataFrame
        :data:`COLUMNS` (``pcc_low, pcc_high``: the worst and best section), ``ceiling``, and ``expected``: whether the
        word was brought along.
    """
    filled = rows.fillna({"pcc_per_gene": 0.0})
    sections = filled.groupby(["patient", "section", "gene"])[["pcc_per_gene", "ceiling", "r2"]].mean()
    mean = sections.groupby(["patient", "gene"]).mean().groupby("gene").mean()
    by_gene = sections.groupby("gene")
    found = mean.assign(
        pcc_low=by_gene["pcc_per_gene"].min(),
        pcc_high=by_gene["pcc_per_gene"].max(),
        of_ceiling=mean["pcc_per_gene"] / mean["ceiling"].where(mean["ceiling"] > 0),
    )
    # A gene without a known ceiling (nothing was counted) is held to the correlation alone.
    enough = found["of_ceiling"].fillna(1.0) >= GREEN_SHARE
    green = (found["pcc_per_gene"] >= GREEN_PCC) & enough & (by_gene["r2"].min() > 0)
    amber = (found["pcc_per_gene"] >= AMBER_PCC) & (found["r2"] > 0)
    found["trust"] = np.select([green, amber], ["green", "amber"], "red")
    brought = _brought(predictions, runs)
    words = brought["trust"].reindex(found.index)
    found = found.assign(expected=words.notna(), coverage_90=brought["coverage_90"].reindex(found.index))
    found["trust"] = words.fillna(found["trust"])
    best_first = found.sort_values("pcc_per_gene", ascending=False, kind="stable").rename_axis("gene").reset_index()
    return best_first[[*COLUMNS, "ceiling", "expected"]]


def _brought(predictions: Iterable[Path], runs: Iterable[Path]) -> pd.DataFrame:
    """Word of the runs and prediction files, and coverage of the intervals, by gene."""
    cards = [card for run in runs if (card := read_card(run)) is not None]
    parts = [card.set_index("gene")[["trust"]].assign(coverage_90=np.nan) for card in cards]
    for path in predictions:
        section = read_section(path)
        table = pd.DataFrame(index=section.var_names, columns=["trust", "coverage_90"], dtype=object)
        if "trust" in section.var:
            table["trust"] = section.var["trust"].astype(str)
        if {"lower_90", "upper_90", "measured"} <= set(section.layers):
            low, measured, high = (section.layers[name] for name in ("lower_90", "measured", "upper_90"))
            table["coverage_90"] = ((measured >= low) & (measured <= high)).mean(axis=0)
        parts.append(table)
    if not parts:
        return pd.DataFrame(columns=["trust", "coverage_90"])
    every = pd.concat(parts)
    caution = list(MEANINGS)
    worst = every["trust"].map({word: rank for rank, word in enumerate(caution)}).astype(float).groupby(level=0).max()
    return pd.DataFrame(
        {
            "trust": worst.map(lambda rank: caution[int(rank)], na_action="ignore"),
            "coverage_90": every["coverage_90"].astype(float).groupby(level=0).mean(),
        }
    )
