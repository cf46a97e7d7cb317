"""A run folder: safetensors weights beside readable JSON, everything needed to predict or to go on.

::

    run.json             recipe, seed, sections, gene panel digest, versions, state
    panel.json           the gene panel
    log.csv              one row an epoch
    weights.safetensors  the network of the selected epoch, and `train_mean` (G,), mean profile of the training sections
    novelty.safetensors  what makes a spot's features unlike those of the training spots (hifusion.novelty)
    trust.csv            the trust card: a row a gene (hifusion.trust)
    frames/              pictures of the training sections, for networks that place spots (hifusion.frames)
    adapter.safetensors  the change of predictions that `hifusion adapt` has learned, if any
    last.safetensors     network and optimiser after the last finished epoch; gone when the run is complete
"""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hifusion import files
from hifusion.configuration import Recipe, from_dict
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.frames import Frames
from hifusion.models import MODELS
from hifusion.novelty import Novelty
from hifusion.trust_card import read_card

ADAPTER = "adapter.safetensors"
NOVELTY = "novelty.safetensors"
FORMAT = 2  # since 2 a recipe names its network
PACKAGES = ("hifusion", "torch", "lightning-fabric", "anndata", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's figures."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


class Adapter(NamedTuple):
    """A change of predictions: ``p + offset + (p - centre) @ directions @ slopes``."""

    centre: np.ndarray
    """``(G,)``, mean prediction of the section."""
    directions: np.ndarray
    """``(G, R)``, in which its predictions vary most, each of variance 1."""
    slopes: np.ndarray
    """``(R, G)``"""
    offset: np.ndarray
    """``(G,)``"""

    def change(self, predicted: np.ndarray) -> np.ndarray:
        """What is added to predictions ``(N, G)``."""
        return self.offset + (predicted - self.centre) @ self.directions @ self.slopes


@dataclass(frozen=True)
class Run:
    """A trained model as a run folder holds it.

    Attributes
    ----------
    root
        The folder.
    recipe, panel
        What was trained, on which genes.
    facts
        ``run.json``: seed, sections, best epoch, versions and the rest.
    """

    root: Path
    recipe: Recipe
    panel: GenePanel
    facts: dict[str, Any]

    @classmethod
    def open(cls, root: Path) -> "Run":
        """Open a complete run.

        Raises
        ------
        InputError
            No run, one that was not finished, or one whose panel is not the one it was trained with.
        """
        root = Path(root)
        if not (root / "run.json").is_file():
            raise InputError(f"{root}: is no run folder (no run.json); make one with `hifusion train`")
        facts = files.read_json(root / "run.json")
        if facts.get("format") != FORMAT:
            raise InputError(f"{root}: run format {facts.get('format')} is not {FORMAT}; train it anew")
        if facts["state"] != "complete":
            raise InputError(f"{root}: the run is not finished; go on with `hifusion train --resume`")
        panel = GenePanel.load(root / "panel.json")
        if panel.digest != facts["panel_digest"]:
            raise InputError(
                f"{root}: panel.json has digest {panel.digest}, but the run was trained on panel "
                f"{facts['panel_digest']}; put the run's own panel back"
            )
        return cls(root, from_dict(facts["recipe"]), panel, facts)

    def network(self, device: torch.device) -> nn.Module:
        """The trained network, in evaluation mode on ``device``."""
        model: Any = MODELS[self.recipe.network].module(self.sized_recipe.model)
        weights = self._weights()
        weights.pop("train_mean", None)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise InputError(
                f"{self.root}: weights do not fit the recipe ({reason}); put the run's own back"
            ) from error
        placed: nn.Module = model.to(device=device, memory_format=model.config.memory_format).eval()
        return placed

    def __repr__(self) -> str:
        facts, recipe = self.facts, self.recipe
        as_given = "published weights, " if facts.get("weights") else ""
        epoch = as_given if facts["best_epoch"] is None else f"epoch {facts['best_epoch']} of {recipe.epochs}, "
        return (
            f"Run({str(self.root)!r}): {recipe.network} by recipe {recipe.name}, {len(self.panel.genes)} genes from "
            f"{facts['train_spots']} spots of {', '.join(facts['train'])}; {epoch}"
            f"validation MSE {facts['validation_mse']:.4f}"
        )

    @property
    def sized_recipe(self) -> Recipe:
        """The recipe with a network of as many genes as the panel has."""
        return self.recipe.sized(len(self.panel.genes))

    @property
    def id(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of ``run.json``: names the run in every file it makes."""
        return files.digest_file(self.root / "run.json")[:12]

    @property
    def train_mean(self) -> np.ndarray:
        """Mean profile of its training sections, float32 ``(G,)``: what a model that sees nothing would say."""
        return self._weights()["train_mean"].numpy()

    @property
    def novelty(self) -> Novelty | None:
        """The distance from its training spots, or None for a run of a version that did not keep it."""
        path = self.root / NOVELTY
        if not path.exists():
            return None
        tensors, _ = load_tensors(path)
        return Novelty(tensors["mean"].numpy(), tensors["factor"].numpy())

    @property
    def frames(self) -> Frames:
        """Where its training sections lie in their patients' tissue; none for networks that do not ask."""
        return Frames.open(self.root)

    def trust(self, known_patient: bool = True) -> pd.DataFrame | None:
        """Its trust card, see :func:`hifusion.trust_card.read_card`; None for a run without one."""
        return read_card(self.root, known_patient)

    @property
    def adapter(self) -> Adapter | None:
        """The change of its predictions that `hifusion adapt` has learned; None for a run that was not adapted."""
        path = self.root / ADAPTER
        if not path.exists():
            return None
        return Adapter(**{name: its.numpy() for name, its in load_tensors(path)[0].items()})

    def _weights(self) -> dict[str, Tensor]:
        return load_tensors(self.root / "weights.safetensors")[0]


def save_novelty(root: Path, novelty: Novelty) -> None:
    """Put the distance from the training spots into a run folder."""
    tensors = {"mean": torch.from_numpy(novelty.mean), "factor": torch.from_numpy(novelty.factor)}
    save_tensors(root / NOVELTY, tensors, {})


def save_adapter(root: Path, adapter: Adapter) -> None:
    """Put an adapter into a run folder."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(its)).float() for name, its in adapter._asdict().items()}
    save_tensors(root / ADAPTER, tensors, {})


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write named tensors and a few texts as one safetensors file, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files.write_bytes(path, safetensors.torch.save(plain, metadata=facts))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_tensors` wrote.

    Raises
    ------
    InputError
        The file is missing, cut short or no safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; the run is not complete, train it anew") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: cannot be read as weights ({error}); put an intact file there, or train anew"
        ) from error


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as named tensors: ``optimiser.<parameter number>.<what>``."""
    return {
        f"optimiser.{number}.{what}": torch.as_tensor(value)
        for number, state in optimiser.state_dict()["state"].items()
        for what, value in state.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimiser_tensors` gave, each tensor laid out in memory as its parameter is.

    The file keeps no layout. Sums in another order of memory may round otherwise, and a resumed run is to be the same.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, number, what = name.split(".")
            like = parameters[int(number)]
            laid_out = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
            state.setdefault(int(number), {})[what] = laid_out
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
