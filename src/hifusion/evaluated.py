"""What an evaluation folder holds: its prediction files, and its models in the order of tables and panels."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hifusion import files
from hifusion.errors import InputError, refuse_unknown

# Models in the order of tables and panels: the floor first, networks (all other names) last.
ORDER = (
    *("train_mean", "own_mean", "depth", "ridge", "kernel_ridge", "features_ridge", "neighbour_section"),
    "shuffled",
)
Names = Sequence[str] | None  # None: the default choice


def find_predictions(folder: Path) -> dict[tuple[str, str], Path]:
    """(section, label of the model) -> prediction file of an evaluation folder; refused where there is none."""
    found = list_predictions(folder)
    if not found:
        raise InputError(f"{folder}: no predictions, so nothing to draw or score; give what `hifusion evaluate` wrote")
    return found


def list_predictions(folder: Path) -> dict[tuple[str, str], Path]:
    """(section, label of the model) -> prediction file: what is there, which may be nothing."""
    return {(path.stem, path.parent.name): path for path in sorted(Path(folder).glob("predictions/*/*.h5ad"))}


def choose_models(labels: Sequence[str], models: Names, folder: Path | None) -> list[str]:
    """The labels to draw: those asked for by label or by name, else the first seed of each that is no oracle."""
    if models:
        refuse_unknown("model", models, [*labels, *map(base_name, labels)], str(folder or "the files"))
        return [label for label in labels if label in models or base_name(label) in models]
    hidden = oracles(folder) if folder else set()
    first = {base_name(label): label for label in reversed(labels)}
    return [label for base, label in reversed(first.items()) if base not in hidden] or list(labels)


def oracles(folder: Path) -> set[str]:
    """Names of the models that look at the answer, by the evaluation's own word."""
    result = files.read_json(folder / "metrics.json")
    models = result.get("models", {}) if isinstance(result, dict) else {}
    return {name for name, scores in models.items() if scores.get("oracle")}


def base_name(label: str) -> str:
    """Name of the model of a label: ``hifusion-seed0`` -> ``hifusion``."""
    return re.sub(r"-seed\d+$", "", label)


def rank(label: str) -> tuple[Any, ...]:
    """Sort key of labels by :data:`ORDER`, then by name and seed."""
    base = base_name(label)
    return ORDER.index(base) if base in ORDER else len(ORDER), natural(label)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key with numbers by size: C2 before C10."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d{1,18})|(\D+)", name)]


def read_table(path: Path, columns: Sequence[str], advice: str) -> pd.DataFrame:
    """Read a table that a run or an evaluation left.

    Parameters
    ----------
    columns
        That it has to have.
    advice
        What a user does who lacks the table.

    Raises
    ------
    InputError
        No such file, one that is no table, or one without rows or without one of the columns.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; {advice}")
    try:
        table = pd.read_csv(path, dtype={"label": str, "model": str, "patient": str, "gene": str}, keep_default_na=True)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from error
    missing = [column for column in columns if column not in table]
    if missing or table.empty:
        raise InputError(f"{path}: {'lacks ' + ', '.join(missing) if missing else 'has no row'}; {advice}")
    return table
