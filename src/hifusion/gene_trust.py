"""Which genes of an evaluation to trust: by what the test measured, and by what the model expected beforehand.

A model with a trust card brings a word for each gene: ``green``, the map can be read; ``amber``, its broad pattern;
``red``, not at all. The test gives each gene a word too, by the same thresholds.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from hifusion.section import read_section
from hifusion.trust_card import AMBER, GREEN, MEANINGS, read_card

RULE = (
    f"green: pcc_per_gene of at least {GREEN:g} and a smaller error than the constant in every tested section; "
    f"amber: at least {AMBER:g} in every one, and a smaller error than the constant on average; red: all others"
)


def measured_trust(
    rows: pd.DataFrame, predictions: Iterable[Path], runs: Iterable[Path] = (), *, known_patient: bool = True
) -> pd.DataFrame:
    """How each gene was predicted on tested sections, and the words for it, best first.

    Parameters
    ----------
    rows
        Of ``metrics.csv``, of one model.
    predictions
        The model's prediction files, with ``layers["lower_90"]`` and ``["upper_90"]`` where it tells intervals.
    runs
        The model's trainings, with a trust card where its recipe makes one.
    known_patient
        Whether it was trained on other sections of the tested patients.

    Returns
    -------
    DataFrame
        ``gene, pcc_per_gene, ceiling, of_ceiling``; ``pcc_low, pcc_high``: worst and best section; ``coverage_90``:
        share of measurements within the intervals, NaN without them; ``tested``: word by :data:`RULE`; ``expected``:
        word of the cards, the most cautious of them, None without one; ``trust``: ``expected``, else ``tested``.
    """
    filled = rows.fillna({"pcc_per_gene": 0.0})
    sections = filled.groupby(["patient", "section", "gene"])[["pcc_per_gene", "ceiling", "r2"]].mean()
    mean = sections.groupby(["patient", "gene"]).mean().groupby("gene").mean()
    by_gene = sections.groupby("gene")
    found = mean.assign(
        pcc_low=by_gene["pcc_per_gene"].min(),
        pcc_high=by_gene["pcc_per_gene"].max(),
        of_ceiling=mean["pcc_per_gene"] / mean["ceiling"].where(mean["ceiling"] > 0),
        coverage_90=_coverage(predictions).reindex(mean.index),
    )
    green = (found["pcc_low"] >= GREEN) & (by_gene["r2"].min() > 0)
    amber = (found["pcc_low"] >= AMBER) & (found["r2"] > 0)
    found["tested"] = np.select([green, amber], ["green", "amber"], "red")
    cards = [card["trust"] for run in runs if (card := read_card(run, known_patient)) is not None]
    found["expected"] = _most_cautious(cards).reindex(found.index)
    found["trust"] = found["expected"].fillna(found["tested"])
    return found.sort_values("pcc_per_gene", ascending=False, kind="stable").rename_axis("gene").reset_index()


def _coverage(predictions: Iterable[Path]) -> pd.Series:
    """Share of each gene's measurements within the intervals, mean over the files that have them."""
    parts = [pd.Series(dtype=np.float64)]
    for path in predictions:
        section = read_section(path)
        if {"lower_90", "upper_90", "measured"} <= set(section.layers):
            low, measured, high = (section.layers[name] for name in ("lower_90", "measured", "upper_90"))
            parts.append(pd.Series(((measured >= low) & (measured <= high)).mean(axis=0), index=section.var_names))
    return pd.concat(parts).groupby(level=0).mean()


def _most_cautious(words: Iterable["pd.Series[str]"]) -> pd.Series:
    """Gene -> the worst word of any card."""
    order = list(MEANINGS)
    every = pd.concat([pd.Series(dtype=object), *words])
    worst = every.map({word: rank for rank, word in enumerate(order)}).astype(np.float64).groupby(level=0).max()
    return worst.map(lambda rank: order[int(rank)], na_action="ignore").astype(object)
