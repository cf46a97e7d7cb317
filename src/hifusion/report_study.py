"""What a report on an evaluation speaks of: its scores, one of its models, the rival beside it, genes and a section."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from hifusion import files
from hifusion.comparison import paired_differences
from hifusion.errors import InputError, refuse_unknown
from hifusion.evaluated import base_name, list_predictions, natural, read_table
from hifusion.gene_trust import measured_trust
from hifusion.leaderboard import leaderboard
from hifusion.plots import MARKERS

MOST_GENES = 6  # maps of one page; more become too small to be looked at


class Study(NamedTuple):
    """An evaluation as a report speaks of it."""

    folder: Path
    result: dict[str, Any]
    """What ``metrics.json`` holds."""
    board: pd.DataFrame
    """From :func:`hifusion.leaderboard.leaderboard`, by model."""
    pairs: pd.DataFrame
    model: str
    label: str
    """Of the model's first seed, whose maps are shown."""
    rival: str | None
    """The best of the simple rivals, which need no network; None where there is none beside the model."""
    trust: pd.DataFrame
    """From :func:`hifusion.gene_trust.measured_trust`."""
    section: str
    """Whose maps are shown."""
    genes: list[str]
    """Whose maps are shown."""

    runs: list[Path]
    """Of the model, those of its first seed first."""
    predictions: dict[str, Path]
    """Label -> prediction file of the section shown, where it was kept."""

    @property
    def scores(self) -> dict[str, Any]:
        """Of the model."""
        its: dict[str, Any] = self.result["models"][self.model]
        return its


def open_study(
    folder: Path, model: str | None = None, genes: Sequence[str] | None = None, section: str | None = None
) -> Study:
    """Read an evaluation or benchmark folder.

    Parameters
    ----------
    model
        Of which the report speaks; where None the network with the highest ``pcc_per_gene``, else a simple rival.
    genes
        Whose maps are shown, of those in the panel of every tested section; the markers where None, or else the three
        best predicted.
    section
        Whose maps are shown; where None the one in the middle by the model's ``pcc_per_gene``.

    Raises
    ------
    InputError
        No evaluation, one of another version, or a model, gene or section that is not in it.
    """
    result = files.read_json(folder / "metrics.json")
    advice = "evaluate anew with this version"
    if not isinstance(result, dict) or not {"models", "protocol", "folds", "recipe", "versions"} <= set(result):
        raise InputError(f"{folder}/metrics.json: is not what `hifusion evaluate` writes; {advice}")
    where = ("model", "label", "seed", "section", "patient")
    rows = read_table(folder / "metrics.csv", (*where, "gene", "pcc_per_gene", "ceiling", "r2", "mse"), advice)
    sections = read_table(folder / "sections.csv", (*where, "mse", "mse_offset", "mse_pattern"), advice)
    costs = read_table(folder / "costs.csv", ("model",), advice) if (folder / "costs.csv").exists() else None
    board = leaderboard(result, rows, sections, costs).set_index("model", drop=False)
    if model is not None:
        refuse_unknown("model", [model], board.index, str(folder))
    chosen = model or _leader(result, board)
    its = rows[rows["model"] == chosen]
    tested = its.fillna({"pcc_per_gene": 0.0}).groupby("section")["pcc_per_gene"].mean().sort_values(kind="stable")
    if section is not None:
        refuse_unknown("section", [section], tested.index, f"the tested sections of {folder}")
    labels = sorted(its["label"].unique(), key=natural)
    # Names from tables only choose among the files that are there: none of them ever becomes a path.
    kept = list_predictions(folder)
    runs = _runs_of(folder, chosen, labels[0])
    predictions = [path for (_, label), path in kept.items() if label in labels]
    trust = measured_trust(its, predictions, runs, known_patient=bool(result["protocol"]["same_patient"]))
    shown = section or str(tested.index[len(tested) // 2])
    everywhere = set.intersection(*(set(names) for _, names in its.groupby("section")["gene"]))
    known = [gene for gene in trust["gene"] if gene in everywhere]
    refuse_unknown("gene", genes or (), known, f"the panels of all tested sections of {folder}")
    markers = [gene for gene in MARKERS if gene in known]
    simple = board[(board["kind"] == "simple rival") & (board.index != chosen)]
    return Study(
        folder=folder,
        result=result,
        board=board,
        pairs=paired_differences(rows, sections),
        model=chosen,
        label=labels[0],
        rival=str(simple.index[0]) if len(simple) else None,
        trust=trust,
        section=shown,
        genes=list(dict.fromkeys(genes))[:MOST_GENES] if genes else markers or known[:3],
        runs=runs,
        predictions={label: path for (name, label), path in kept.items() if name == shown},
    )


def _leader(result: dict[str, Any], board: pd.DataFrame) -> str:
    """The best network whose epoch was not chosen on the test; else the best simple rival, else the best there is."""
    fair = board[[not result["models"][name].get("selected_on_test") for name in board.index]]
    for kind in ("network", "simple rival"):
        if (fair["kind"] == kind).any():
            return str(fair.index[fair["kind"] == kind][0])
    return str(board.index[0])


def _runs_of(folder: Path, model: str, first: str) -> list[Path]:
    """Folders of the model's trainings, those with the label ``first`` first."""
    found = [path.parent for path in folder.glob("runs/*/*/run.json") if base_name(path.parent.name) == model]
    return sorted(found, key=lambda run: (run.name != first, natural(run.parent.name), natural(run.name)))
