"""Weights under the names their authors gave them, and how the authors trained, as data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hifusion.models.resnet import load_named


@dataclass(frozen=True)
class AuthorsRecipe:
    """How the authors trained a network: facts from their code, which nothing here acts upon by itself.

    Parameters
    ----------
    target
        Unit of the expression that is learned; `y` is a raw count, `ln` and `log10` say the base.
    panel
        How the authors chose the genes.
    optimiser, lr, momentum, weight_decay, schedule
        The optimiser; a schedule of "" is a constant rate.
    batch, epochs
        One training step, and passes over the training set.
    start
        Weights that training begins with.
    augmentation
        Random changes of the patches in training.
    protocol
        How the authors split train and test.
    """

    target: str
    panel: str
    optimiser: str
    lr: float
    batch: str
    epochs: int
    start: str
    augmentation: str
    protocol: str
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = ""


def unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Published name -> value, out of a checkpoint that nests or prefixes them.

    The values may lie under a key `state_dict` or `model`, beside an optimiser's state, and all names may begin with
    `module.` or `model.`, as wrappers for several GPUs and training frameworks leave them.
    """
    for key in ("state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    weights = dict(checkpoint)
    while weights and (found := re.match(r"module\.|model\.", next(iter(weights)))):
        prefix = found.group()
        if not all(name.startswith(prefix) for name in weights):
            break
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def published_names(module: nn.Module, rules: Mapping[str, str]) -> dict[str, str]:
    """Own name -> published name of every parameter and buffer of a module.

    Parameters
    ----------
    rules
        Regular expression for the beginning of an own name -> what stands there in the published one, applied one after
        another; a name that none of them matches is the same on both sides.
    """
    names = {}
    for own in module.state_dict():
        name = own
        for pattern, replacement in rules.items():
            name = re.sub(f"^(?:{pattern})", replacement, name)
        names[own] = name
    return names


def fill(module: nn.Module, weights: Mapping[str, Any], names: Mapping[str, str], dtype: torch.dtype) -> None:
    """Storage and published weights for a module that was built on the meta device, which draws no random numbers.

    Raises
    ------
    InputError
        Names that are missing, unexpected or of another shape.
    """
    module.to_empty(device="cpu").to(dtype)
    load_named(module, weights, names, "published weights")
