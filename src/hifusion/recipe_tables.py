"""The tables of recipes: one full configuration for each published, recommended or reduced run."""

import dataclasses
from dataclasses import replace
from typing import Any

from hifusion.configuration import Recipe
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
    optimiser="adamw",
    lr=2e-3,
    weight_decay=1e-2,
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
