"""A run's trust card in its folder: what it says of each gene, a word and the skill that is expected."""

from pathlib import Path

import numpy as np
import pandas as pd

from hifusion import files

FILE = "trust.csv"
GREEN, AMBER = 0.3, 0.1
"""Least lower end of a gene's ``pcc_per_gene`` for either word."""
MEANINGS = {
    "green": "the map can be read",
    "amber": "its broad pattern can be read, single spots cannot",
    "red": "not to be read",
}


def write_card(folder: Path, card: pd.DataFrame) -> None:
    """Put a card, a row a gene, into a run folder."""
    files.write_text(folder / FILE, card.to_csv(index=False))


def read_card(folder: Path, known_patient: bool = True) -> pd.DataFrame | None:
    """The card of a run folder, indexed by gene, for patients it was trained on or for all others; None without one.

    Where patients were never left out, the card of a new patient knows nothing: NaN and red.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    table = pd.read_csv(path, index_col="gene", keep_default_na=False, na_values=[""])
    own = [str(name) for name in table if not str(name).endswith("_new_patient")]
    if known_patient:
        return table[own]
    if "trust_new_patient" not in table:
        unknown = table[own].assign(trust="red")
        unknown[[name for name in own if name != "trust"]] = np.nan
        return unknown
    return table[[f"{name}_new_patient" for name in own]].set_axis(own, axis=1)
