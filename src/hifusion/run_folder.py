"""A run folder while it is trained: started or taken up again, its log and the state to go on from."""

import csv
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hifusion import checkpoint, files
from hifusion.cohort import SectionView
from hifusion.configuration import Recipe, from_dict
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.metrics import lattice_weights


def begin(out: Path, facts: dict[str, Any], panel: GenePanel, resume: bool) -> bool:
    """Start a run folder, or check that the one there is this very run; True where that is already complete."""
    if not (out / "run.json").exists():
        (out / "last.safetensors").unlink(missing_ok=True)  # of a run whose run.json was deleted
        panel.save(out / "panel.json")
        files.write_json(out / "run.json", facts)  # last: a folder with it is a whole one
        return False
    if not resume:
        raise InputError(f"{out}: holds a run already; go on with --resume, or give another folder")
    before = files.read_json(out / "run.json")
    there, here = _settings({"data": facts["data"], **before}), _settings(facts)  # older runs do not tell their data
    changed = [f"{key} ({there.get(key)} there, {here.get(key)} given)" for key in here if there.get(key) != here[key]]
    if changed:
        raise InputError(
            f"{out}: the run there differs in {', '.join(changed)}; resume with the same settings, "
            "or give another folder"
        )
    if before["state"] != "complete":
        return False
    (out / "last.safetensors").unlink(missing_ok=True)  # of a run that was stopped while it ended
    return True


def first_facts(
    recipe: Recipe,
    panel: GenePanel,
    train: Sequence[SectionView],
    validation: Sequence[SectionView],
    *,
    trained: Sequence[tuple[SectionView, np.ndarray]],
    held_out: Sequence[tuple[SectionView, np.ndarray]],
    seed: int,
    shuffled: bool,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """What ``run.json`` says of every training from its beginning on.

    Parameters
    ----------
    trained, held_out
        Sections and the rows of their spots that are learned from, and that are held out.
    """
    return {
        "format": checkpoint.FORMAT,
        "state": "training",
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "shuffled": shuffled,
        "panel_digest": panel.digest,
        "train": [view.name for view in train],
        "validation": [view.name for view in validation],
        "data": digest([*train, *validation]),
        "train_spots": sum(len(rows) for _, rows in trained),
        "validation_spots": sum(len(rows) for _, rows in held_out),
        "spots": spot_facts(train),
        "precision": precision,
        "device": str(device),
        "versions": checkpoint.versions(),
    }


def digest(views: Sequence[SectionView]) -> str:
    """Of what was measured, and where."""
    parts = [part for view in views for part in (view.image_digest.encode(), view.expression, view.centres_px)]
    return files.digest(*(part if isinstance(part, bytes) else np.ascontiguousarray(part).data for part in parts))[:16]


def spot_facts(views: Sequence[SectionView]) -> dict[str, Any]:
    """Scale and spots of the training sections (medians): what a slide that was never measured is to be seen at."""
    neighbours = [np.median(np.diff(lattice_weights(view.centres_px, view.pitch_px).indptr)) for view in views]
    return {
        "lattice": "hexagonal" if np.median(neighbours) > 4 else "square",
        "mpp": float(np.median([view.mpp for view in views])),
        "pitch_um": float(np.median([view.pitch_px * view.mpp for view in views])),
        "spot_diameter_um": float(np.median([view.spot_diameter_um for view in views])),
    }


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    """What two trainings must share to be the same run; the recipe and its network value by value.

    Not the devices: how many learn together, and what they keep in memory, does not make it another run.
    """
    keys = ("seed", "shuffled", "panel_digest", "train", "validation", "precision", "data", "weights")
    # Through a recipe, so that one written by an older version has today's new values at their defaults.
    recipe = dataclasses.asdict(from_dict(facts["recipe"]))
    for group in ("model", "loss"):
        recipe |= {f"{group}.{key}": value for key, value in recipe.pop(group).items()}
    return {key: facts.get(key) for key in keys} | {f"recipe.{key}": value for key, value in recipe.items()}


def restore(out: Path, network: nn.Module, optimiser: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Put network and optimiser where the last finished epoch left them; returns the log up to there."""
    if not (out / "last.safetensors").exists():
        return []  # stopped within its first epoch
    tensors, facts = checkpoint.load_tensors(out / "last.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    network.load_state_dict(weights)
    checkpoint.restore_optimiser(optimiser, tensors)
    log: list[dict[str, Any]] = json.loads(facts["log"])
    return log


def write_log(path: Path, log: Sequence[dict[str, Any]]) -> None:
    """Write ``log.csv``; rows of an older version lack columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(log[-1]), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    files.write_text(path, text.getvalue())
