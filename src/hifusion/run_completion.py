"""What a run keeps when training ends: the weights of the selected epoch, novelty, the trust card, facts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hifusion import checkpoint, data, files, trust, trust_card
from hifusion.configuration import Recipe
from hifusion.expression import GenePanel
from hifusion.inference import SpotOutputs, fast_network
from hifusion.novelty import fit_novelty
from hifusion.surroundings import Spots, Surroundings, predict_spots


def selected(recipe: Recipe, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The epoch whose weights are kept: of those with the lowest validation MSE the first, or the last of all."""
    return log[-1] if recipe.selection == "last" else min(log, key=lambda row: row["validation_mse"])


def complete(
    out: Path,
    facts: dict[str, Any],
    network: nn.Module,
    panel: GenePanel,
    surroundings: Surroundings,
    held_out: Sequence[Spots],
    log: Sequence[dict[str, Any]],
) -> None:
    """Complete a run folder whose last epoch is done; the network is left with the weights that were selected."""
    best = selected(surroundings.recipe, log)
    weights, _ = checkpoint.load_tensors(out / "weights.safetensors")
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name != "train_mean"})
    said = _save_novelty(out, network, surroundings, held_out, facts["precision"])
    card = trust.card(held_out, panel.genes, surroundings.recipe.normalisation, {"known": _left_out(said, held_out)})
    trust_card.write_card(out, card)
    recomputed = [row["epoch"] for row in log if row.get("recomputed")]
    facts = facts | {
        "devices": sorted({row.get("devices", 1) for row in log}),
        "recomputed_from_epoch": recomputed[0] if recomputed else None,
        "train_seconds": round(sum(row["seconds"] for row in log), 3),
        "state": "complete",
        "best_epoch": best["epoch"] if best["epoch"] >= 0 else None,  # else the weights are those it began with
        "validation_mse": best["validation_mse"],
    }
    files.write_json(out / "run.json", facts)
    (out / "last.safetensors").unlink()


def _save_novelty(
    out: Path, network: nn.Module, surroundings: Surroundings, held_out: Sequence[Spots], precision: str
) -> SpotOutputs:
    """Fit and write the distance from the training spots; returns what the network says of the held-out ones."""
    fast = fast_network(network, precision)
    trained, told = (
        SpotOutputs.joined([predict_spots(fast, surroundings, view, rows, precision) for view, rows in spots])
        for spots in (surroundings.train, held_out)
    )
    checkpoint.save_novelty(out, fit_novelty(trained.embedding, told.embedding))
    return told


def _left_out(said: SpotOutputs, held_out: Sequence[Spots]) -> trust.LeftOut:
    """What the network says of the spots its epoch was selected on, with an error that is the same everywhere."""
    expression = said.expression.astype(np.float64)
    errors = np.concatenate([view.expression[rows] for view, rows in held_out]) - expression
    expected = np.tile(np.sqrt(np.square(errors).mean(axis=0)) + 1e-9, (len(errors), 1))
    blocks = np.concatenate([data.blocks(view)[rows] for view, rows in held_out])
    return trust.LeftOut(expression, expected, blocks % 2, np.ones(expression.shape[1]))
