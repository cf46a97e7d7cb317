"""Optimisers and learning rates by name."""

import math
from collections.abc import Callable
from typing import Any

import torch

from hifusion.configuration import Recipe

OPTIMISERS: dict[str, Callable[[Any, Recipe], torch.optim.Optimizer]] = {
    "adam": lambda parameters, its: torch.optim.Adam(parameters, its.lr, weight_decay=its.weight_decay, fused=True),
    "adamw": lambda parameters, its: torch.optim.AdamW(parameters, its.lr, weight_decay=its.weight_decay, fused=True),
    "sgd": lambda parameters, its: torch.optim.SGD(
        parameters, its.lr, momentum=its.momentum, weight_decay=its.weight_decay, fused=True
    ),
}


def learning_rate(recipe: Recipe, passed: float) -> float:
    """The rate after so many epochs, as the recipe's ``schedule`` says; only restarts move within an epoch."""
    lr, low, epoch, epochs = recipe.lr, recipe.min_lr, math.floor(passed), recipe.epochs
    if recipe.schedule == "constant":
        return lr
    if recipe.schedule == "step":
        return lr * 0.9 ** (epoch // 50)
    if recipe.schedule == "polynomial":
        return low + (lr - low) * (1 - epoch / epochs) ** 0.9
    if recipe.schedule == "warm_restarts":
        return lr / 5 + (lr - lr / 5) * (1 + math.cos(math.pi * (2 * passed % 1))) / 2
    return low + (lr - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2
