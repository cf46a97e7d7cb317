"""Named full configurations: everything that decides a run, apart from its data and its seed."""

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from hifusion.errors import InputError
from hifusion.models.hifusion import HiFusionConfig


@dataclass(frozen=True)
class Recipe:
    """One full configuration.

    Attributes
    ----------
    name, source
        Which recipe, and whose values it has: the paper's text, its released code, or this package's own.
    model
        The network. ``n_genes`` follows the panel at training time.
    region_mpp
        um per pixel of the region patches; None keeps the slide's native pixels (the paper).
    panel, panel_size
        How the gene panel is chosen (see ``hifusion.expression.choose_panel``), or the path of a gene list.
    normalisation
        Unit of the expression that is learned.
    epochs, batch_size
        Passes over the training spots; spots a batch.
    batches
        "section": the spots of a batch come from one section (the paper); "mixed": from all of them.
    lr, min_lr, weight_decay
        Adam; the rate falls from ``lr`` to ``min_lr`` by a half cosine over the epochs.
    align_weight
        Weight of the alignment loss.
    start_at_mean
        Start the output biases at the training mean, so that no epoch is spent on learning it; the paper starts at 0.
    augment
        Horizontal flip, vertical flip and quarter turn, each with probability 0.5.
    validation_fraction
        Share of each training section's spots held out in blocks, where the protocol sets no section apart.
    selection
        "validation": keep the epoch with the lowest validation MSE; "last": keep the last.
    precision
        "auto": bfloat16 mixed precision where the device computes in it, float32 elsewhere.
    """

    name: str
    source: Literal["paper", "code", "hifusion"]
    model: HiFusionConfig
    region_mpp: float | None = None
    panel: str = "top_mean"
    panel_size: int = 250
    normalisation: Literal["log_share", "log1p_cpm"] = "log_share"
    epochs: int = 50
    batch_size: int = 32
    batches: Literal["section", "mixed"] = "section"
    lr: float = 3e-4
    min_lr: float = 1e-6
    weight_decay: float = 1e-5
    align_weight: float = 1.0
    start_at_mean: bool = False
    augment: bool = True
    validation_fraction: float = 0.2
    selection: Literal["validation", "last"] = "validation"
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"

    def __post_init__(self) -> None:
        for field, allowed in (("epochs", 1), ("batch_size", 2), ("panel_size", 1)):
            if getattr(self, field) < allowed:
                raise InputError(f"{field}={getattr(self, field)} is not possible; use at least {allowed}")
        for field in ("lr", "region_mpp"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{field}={value} is not possible; use a number above 0")
        for field in ("min_lr", "weight_decay", "align_weight"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise InputError(f"{field}={value} is not possible; use 0 or a number above it")
        share = self.validation_fraction
        if not 0 < share < 1:
            raise InputError(f"validation_fraction={share} is not possible; use a share between 0 and 1")


_PAPER = Recipe(name="paper", source="paper", model=HiFusionConfig(n_genes=250, level_resize="bilinear"), panel="paper")
_CODE = replace(_PAPER, source="code", model=HiFusionConfig(n_genes=250, level_resize="max"), align_weight=0.5, lr=1e-3)

# Where text and code differ (level_resize, align_weight, lr), `source` tells whose value stands. The released code's
# rate for the 3D protocol of ST-Data is not known: its 2D value is used.
_PUBLISHED = [
    *(replace(recipe, name=name) for name in ("her2st_2d", "her2st_3d") for recipe in (_PAPER, _CODE)),
    *(replace(recipe, name=name, lr=3e-4) for name in ("stdata_2d", "stdata_3d") for recipe in (_PAPER, _CODE)),
]

_OWN = [
    # Half the resolution and half the width, and no epochs spent on the mean: minutes on two CPU cores.
    Recipe(
        name="quick",
        source="hifusion",
        model=HiFusionConfig(n_genes=250, spot_px=112, region_px=224, width=32, level_resize="bilinear"),
        region_mpp=1.376,
        epochs=12,
        batch_size=16,
        batches="mixed",
        lr=1e-3,
        start_at_mean=True,
    ),
    # Seconds: for tests and the synthetic cohort, whose spots are 36 px wide at its native scale.
    Recipe(
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
    ),
]

RECIPES: dict[tuple[str, str], Recipe] = {(recipe.name, recipe.source): recipe for recipe in (*_PUBLISHED, *_OWN)}
_ADAPTER = TypeAdapter(Recipe)


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


def from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values (as :func:`dataclasses.asdict` gives them), checking each."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":  # not a line of ours, which names its field itself
            key = ".".join(str(part) for part in first["loc"])
            message = f"recipe value {key}={first['input']!r} is not possible: {message}"
        raise InputError(message) from error


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    if key == "model.n_genes":
        raise InputError("--set model.n_genes is not possible: the network follows the panel; set panel_size or panel")
    known = [name for name in values if name not in ("name", "source", "model")]
    known += [f"model.{name}" for name in values["model"] if name != "n_genes"]
    if key not in known:
        raise InputError(f"--set {key} is unknown{_nearest(key, known)}")
    if key.startswith("model."):
        values["model"][key.removeprefix("model.")] = value
    else:
        values[key] = value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text.lower() in ("none", "native") else text


def _nearest(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    listed = ", ".join(dict.fromkeys(known))
    return f"; did you mean {near[0]!r}? ({listed})" if near else f"; use one of {listed}"
