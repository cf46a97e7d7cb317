"""Recipes by name, and checked changes of single values."""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any

from hifusion.configuration import Recipe, from_dict, loss_options
from hifusion.errors import InputError, refuse_unknown
from hifusion.models import MODELS
from hifusion.recipe_tables import NETWORKS, RECIPES, RIVALS

__all__ = ["NETWORKS", "RECIPES", "RIVALS", "Recipe", "recipe", "recipe_for", "recipes_for"]

_NOT_AT_ONCE = (
    *("epochs", "schedule", "min_lr", "batches", "augment", "average_symmetries", "selection", "start_at_mean"),
    *("optimiser", "momentum", "validation_fraction", "precision", "model.channels"),
)
"""What a network that is fitted at once does not look at."""


def recipe(name: str, source: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Look a recipe up, and change single values of it.

    Parameters
    ----------
    name
        One of the names in :data:`RECIPES`.
    source
        ``"paper"`` or ``"code"`` for the published ones (default: paper).
    overrides
        ``key=value`` texts; keys of the network are written ``model.key``. Values are JSON, or plain words.

    Raises
    ------
    InputError
        Unknown name, source or key (with the nearest known one), or a value of the wrong kind.
    """
    sources = [its for known, its in RECIPES if known == name]
    if not sources:
        raise InputError(f"recipe {name!r} is unknown{_nearest(name, [known for known, _ in RECIPES])}")
    if source is not None and source not in sources:
        raise InputError(f"recipe {name} has no source {source!r}; it has {', '.join(sources)}")
    values = dataclasses.asdict(RECIPES[name, source or sources[0]])
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override!r} is not key=value; write for example epochs=10 or model.grids=[1,2]")
        _set(values, key.strip(), _parse(text.strip()))
    return from_dict(values)


def recipe_for(model: str, preset: str, source: str | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of one contender of a comparison.

    Parameters
    ----------
    model
        ``"hifusion"``, or one of :data:`RIVALS`.
    preset
        Recipe of HiFusion. Rivals have one of their own beside ``quick`` and ``tiny``, that of ``quick`` beside
        ``recommended``; beside every other they are trained as their authors do.
    source
        Of HiFusion's recipe.
    overrides
        As for :func:`recipe`, for all contenders alike; ``NAME:key=value`` is for the one of that name.

    Raises
    ------
    InputError
        As for :func:`recipe`, or an unknown model.
    """
    refuse_unknown("model", [model], NETWORKS, "the models with a recipe")
    own = [override.removeprefix(f"{model}:") for override in overrides if _is_for(model, override)]
    if model == "hifusion":
        return recipe(preset, source, own)
    recipe(preset, source)  # an unknown preset is refused for rivals too
    preset = {"recommended": "quick"}.get(preset, preset)
    return recipe(f"{model}_{preset}" if (f"{model}_{preset}", "hifusion") in RECIPES else model, None, own)


def recipes_for(
    models: Sequence[str], preset: str, source: str | None = None, overrides: Sequence[str] = ()
) -> dict[str, Recipe]:
    """Recipes of those of the models that are networks; arguments as for :func:`recipe_for`.

    Raises
    ------
    InputError
        As for :func:`recipe_for`, or a change for a model there is not.
    """
    for override in overrides:
        name, colon, _ = override.partition("=")[0].rpartition(":")
        if colon:
            refuse_unknown("model", [name], NETWORKS, f"the models that --set {override} can be for")
    return {name: recipe_for(name, preset, source, overrides) for name in models if name in NETWORKS}


def _is_for(model: str, override: str) -> bool:
    key = override.partition("=")[0]
    return ":" not in key or key.startswith(f"{model}:")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    if key == "model.n_genes":
        raise InputError("--set model.n_genes is not possible: the network follows the panel; set panel_size or panel")
    known = [name for name in values if name not in ("name", "source", "network", "model", "loss")]
    known += [f"model.{name}" for name in values["model"] if name != "n_genes"]
    known += [f"loss.{name}" for name in loss_options(values["network"])]
    if MODELS[values["network"]].fitted_at_once:
        known = [name for name in known if name not in _NOT_AT_ONCE]
    if key not in known:
        raise InputError(f"--set {key} is unknown{_nearest(key, known)}")
    group, dot, name = key.partition(".")
    (values[group] if dot else values)[name if dot else key] = value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text.lower() in ("none", "native") else text


def _nearest(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    listed = ", ".join(dict.fromkeys(known))
    return f"; did you mean {near[0]!r}? ({listed})" if near else f"; use one of {listed}"
