"""Named full configurations, one for each published or recommended run, and checked changes of single values."""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hifusion.configuration import Recipe, from_dict, loss_options
from hifusion.errors import InputError, refuse_unknown
from hifusion.models.asign_core import AsignConfig
from hifusion.models.bleep import BleepConfig
from hifusion.models.egn import EGNConfig
from hifusion.models.frozen import FrozenConfig
from hifusion.models.hifusion import HiFusionConfig
from hifusion.models.hist2st import Hist2STConfig
from hifusion.models.histogene import HisToGeneConfig
from hifusion.models.stnet import STNetConfig
from hifusion.models.triplex import TriplexConfig

_PAPER = Recipe(
    name="paper",
    source="paper",
    model=HiFusionConfig(n_genes=250, level_resize="bilinear"),
    loss={"align_weight": 1.0},
    panel="paper",
)
# What this package trains unless told otherwise: chosen on training sections that were left out (docs/results.md).
_RECOMMENDED = Recipe(
    name="recommended",
    source="hifusion",
    network="hifusion_frozen",
    model=FrozenConfig(n_genes=250),
    region_mpp=0.688,
    epochs=1,  # it has none: model.steps says how long its heads learn
    batch_size=64,
    batches="mixed",
    optimiser="adamw",
    lr=2e-3,
    weight_decay=1e-2,
    start_at_mean=True,
    augment=False,
    precision="32-true",  # past the frozen trunk, which computes as fast as the processor allows
)
_CODE = replace(
    _PAPER,
    source="code",
    model=HiFusionConfig(n_genes=250, level_resize="max"),
    loss={"align_weight": 0.5},
    lr=1e-3,
)

# Where text and code differ (level_resize, align_weight, lr), `source` tells whose value stands. The released code's
# rate for the 3D protocol of ST-Data is not known: its 2D value is used.
_PUBLISHED = [
    *(replace(recipe, name=name) for name in ("her2st_2d", "her2st_3d") for recipe in (_PAPER, _CODE)),
    *(replace(recipe, name=name, lr=3e-4) for name in ("stdata_2d", "stdata_3d") for recipe in (_PAPER, _CODE)),
]

# Half the resolution and half the width, and no epochs spent on the mean: minutes on two CPU cores.
_QUICK = Recipe(
    name="quick",
    source="hifusion",
    model=HiFusionConfig(n_genes=250, spot_px=112, region_px=224, width=32, level_resize="bilinear"),
    region_mpp=1.376,
    epochs=12,
    batch_size=16,
    batches="mixed",
    lr=1e-3,
    start_at_mean=True,
)
# Seconds: for tests and the synthetic cohort, whose spots are 36 px wide at its native scale.
_TINY = Recipe(
    name="tiny",
    source="hifusion",
    model=HiFusionConfig(
        n_genes=40,
        grids=(1, 2),
        spot_px=48,
        region_px=96,
        width=8,
        heads=4,
        level_resize="bilinear",
        spot_encoder="resnet10",
    ),
    panel_size=40,
    epochs=10,
    batch_size=32,
    batches="mixed",
    lr=5e-3,
    start_at_mean=True,
    precision="32-true",  # at this width bfloat16 only adds conversions
)

# The rivals as their authors train them (`RECIPE` in each model's file has what words are needed for), but for what
# the harness decides for all alike: panel and unit of expression, and the epoch, which is selected on validation spots
# unless the authors keep the last. Weights start at random and frozen features are those of `encoder`.
_AUTHORS = [
    Recipe(
        name="stnet",
        source="code",
        network="stnet",
        model=STNetConfig(n_genes=250),
        batches="mixed",
        optimiser="sgd",
        lr=3.2e-5,  # 1e-6 for the loss summed over 32 tiles
        weight_decay=0.0,
        schedule="constant",
        start_at_mean=True,
        average_symmetries=True,
    ),
    Recipe(
        name="histogene",
        source="code",
        network="histogene",
        model=HisToGeneConfig(n_genes=250),
        epochs=100,
        lr=1e-5,
        weight_decay=0.0,
        schedule="constant",
        augment=False,
    ),
    Recipe(
        name="hist2st",
        source="code",
        network="hist2st",
        model=Hist2STConfig(n_genes=250),
        epochs=350,
        lr=1e-5,
        weight_decay=0.0,
        schedule="step",
        augment=False,
        selection="last",
    ),
    Recipe(
        name="egn",
        source="code",
        network="egn",
        model=EGNConfig(n_genes=250),
        optimiser="adamw",
        lr=5e-4,
        weight_decay=1e-4,
        schedule="warm_restarts",
        augment=False,
    ),
    Recipe(
        name="triplex",
        source="code",
        network="triplex",
        model=TriplexConfig(n_genes=250, clamp=False),  # log shares are negative
        epochs=100,  # the authors stop when the test fold no longer improves
        batch_size=128,
        optimiser="adamw",
        lr=1e-4,
        weight_decay=0.01,
        schedule="constant",
    ),
    *(
        Recipe(
            name=name,
            source="code",
            network=network,
            model=model,
            epochs=epochs,
            optimiser="sgd",
            lr=1e-3,
            weight_decay=0.0,
            schedule="polynomial",
            selection="last",
        )
        for name, network, model, epochs in (
            ("asign2d", "asign2d", AsignConfig(n_genes=250), 100),
            ("asign2d_released", "asign2d", AsignConfig(n_genes=250, form="published", level_order="released"), 100),
            ("asign3d", "asign3d", AsignConfig(n_genes=250), 51),
        )
    ),
    Recipe(
        name="bleep",
        source="code",
        network="bleep",
        model=BleepConfig(n_genes=250),
        epochs=4,
        batch_size=256,
        batches="mixed",
        optimiser="adamw",
        lr=1e-3,
        weight_decay=1e-3,
        schedule="constant",
    ),
]

RIVALS = tuple(recipe.name for recipe in _AUTHORS)
"""Names under which rivals are trained; the authors' recipes have these names."""

NETWORKS = ("hifusion", *RIVALS)
"""All that has a recipe in every preset."""


def _reduced(preset: Recipe, size: dict[str, Any]) -> list[Recipe]:
    """The rivals at a preset's resolution and with its optimiser and start: smaller networks, fewer epochs.

    ``size`` has, by name, the network's configuration and what else of the preset is changed.
    """
    shared = {"model", "name", "network", "loss"}
    values = {its.name: getattr(preset, its.name) for its in dataclasses.fields(preset) if its.name not in shared}
    by_name = {recipe.name: recipe for recipe in _AUTHORS}
    return [
        Recipe(
            **{**values, **changes},
            name=f"{name}_{preset.name}",
            network=by_name[name].network,
            model=replace(by_name[name].model, n_genes=preset.model.n_genes, **model),
        )
        for name, (model, changes) in size.items()
    ]


_ASIGN_QUICK: Any = (
    {"patch_px": 112, "width": 16, "feature_dim": 256, "heads": 4, "layers": 2, "encoder_batch": 1024},
    {"epochs": 30, "lr": 2e-3},
)
_RIVALS_QUICK = _reduced(
    _QUICK,
    {
        "stnet": ({"patch_px": 112}, {"lr": 3e-4}),
        "histogene": (
            {"patch_px": 56, "width": 256, "layers": 4, "heads": 4, "pixels": "unit"},
            {"epochs": 300, "lr": 1e-3, "augment": False},
        ),
        "hist2st": (
            {"patch_px": 56, "layers": 4, "graph_layers": 2, "heads": 4, "pixels": "unit"},
            {"epochs": 100, "lr": 1e-3, "augment": False, "loss": {"views": 2}},
        ),
        "egn": (
            {"patch_px": 128, "token_px": 16, "width": 128, "layers": 4, "heads": 4, "mlp_width": 256},
            {"lr": 3e-4, "batch_size": 32, "epochs": 20},
        ),
        "triplex": (
            {
                "patch_px": 112,
                "width": 32,
                "feature_dim": 256,
                "section_depth": 1,
                "neighbour_depth": 1,
                "grid": "array",
            },
            {"lr": 3e-4, "batch_size": 32, "epochs": 20},
        ),
        "asign2d": _ASIGN_QUICK,
        "asign2d_released": _ASIGN_QUICK,
        "asign3d": _ASIGN_QUICK,
        "bleep": ({"patch_px": 112, "width": 16}, {"batch_size": 64, "epochs": 20, "start_at_mean": False}),
    },
)

_ASIGN_TINY: Any = ({"patch_px": 48, "width": 8, "feature_dim": 32, "heads": 4, "layers": 1}, {"lr": 2e-3})
_RIVALS_TINY = _reduced(
    replace(_TINY, encoder="resnet18"),
    {
        "stnet": ({"patch_px": 48}, {"lr": 1e-3, "epochs": 4}),
        "histogene": ({"patch_px": 48, "width": 32, "layers": 1, "heads": 2, "pixels": "unit"}, {"lr": 1e-3}),
        "hist2st": (
            {
                "patch_px": 48,
                "piece_px": 12,
                "channels": 16,
                "mixer_layers": 1,
                "layers": 1,
                "graph_layers": 2,
                "heads": 2,
                "pixels": "unit",
            },
            {"lr": 1e-3, "loss": {"views": 1}},
        ),
        "egn": (
            {"patch_px": 48, "token_px": 12, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64, "bridge_heads": 2},
            {"lr": 1e-3},
        ),
        "triplex": (
            {
                "patch_px": 48,
                "width": 8,
                "feature_dim": 32,
                "section_depth": 1,
                "neighbour_depth": 1,
                "section_heads": 4,
                "neighbour_heads": 4,
                "grid": "array",
            },
            {"lr": 1e-3},
        ),
        "asign2d": _ASIGN_TINY,
        "asign2d_released": _ASIGN_TINY,
        "asign3d": _ASIGN_TINY,
        "bleep": (
            {"patch_px": 48, "width": 8, "embedding": 32},
            {"lr": 1e-3, "start_at_mean": False},
        ),
    },
)

_ALL = (*_PUBLISHED, _RECOMMENDED, _QUICK, _TINY, *_AUTHORS, *_RIVALS_QUICK, *_RIVALS_TINY)
RECIPES: dict[tuple[str, str], Recipe] = {(recipe.name, recipe.source): recipe for recipe in _ALL}


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
