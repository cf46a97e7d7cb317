"""One full configuration: everything that decides a run, apart from its data and its seed."""

import inspect
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from hifusion.errors import InputError, refuse_unknown
from hifusion.models import MODELS

Schedule = Literal["cosine", "constant", "step", "polynomial", "warm_restarts"]


@dataclass(frozen=True)
class Recipe:
    """One full configuration.

    Attributes
    ----------
    name, source
        Which recipe, and whose values it has: the paper's text, its released code, or this package's own.
    network, model
        Name in ``hifusion.models.MODELS``, and the network's own configuration. ``n_genes`` follows the panel at
        training time.
    loss
        Options of the network's training step (``hifusion.models.steps``), by name; what is not named stays at its
        default there.
    encoder
        Frozen encoder for networks that take features of the surroundings, see ``hifusion.encoders``.
    region_mpp
        um per pixel of the region patches; None keeps the slide's native pixels (the paper).
    panel, panel_size
        How the gene panel is chosen (see ``hifusion.expression.choose_panel``), or the path of a gene list.
    normalisation
        Unit of the expression that is learned.
    epochs, batch_size
        Passes over the training spots, 0 for published weights as they are; spots a batch. Networks that see whole
        sections take one section a batch.
    batches
        "section": the spots of a batch come from one section (the paper); "mixed": from all of them.
    optimiser, lr, min_lr, weight_decay, momentum
        The optimiser; its rate goes from ``lr`` towards ``min_lr`` as ``schedule`` says. ``momentum`` is SGD's.
    schedule
        "cosine": half a cosine over the epochs; "constant"; "step": 0.9 of it after every 50 epochs; "polynomial":
        power 0.9 of what is left; "warm_restarts": half a cosine from ``lr`` to a fifth of it, twice an epoch.
    start_at_mean
        Start the output biases at the training mean, so that no epoch is spent on learning it; the paper starts at 0.
    augment
        Horizontal flip, vertical flip and quarter turn, each with probability 0.5.
    average_symmetries
        Test sections are predicted as the mean over the eight flips and turns of a patch.
    validation_fraction
        Share of each training section's spots held out in blocks, where the protocol sets no section apart.
    selection
        "validation": keep the epoch with the lowest validation MSE; "last": keep the last.
    precision
        "auto": bfloat16 mixed precision where the device computes in it, float32 elsewhere.
    """

    name: str
    source: Literal["paper", "code", "hifusion"]
    model: Any
    network: str = "hifusion"
    loss: dict[str, int | float] = field(default_factory=dict)
    encoder: str = "efficientnet_lite0"
    region_mpp: float | None = None
    panel: str = "top_mean"
    panel_size: int = 250
    normalisation: Literal["log_share", "log1p_cpm"] = "log_share"
    epochs: int = 50
    batch_size: int = 32
    batches: Literal["section", "mixed"] = "section"
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 3e-4
    min_lr: float = 1e-6
    weight_decay: float = 1e-5
    momentum: float = 0.9
    schedule: Schedule = "cosine"
    start_at_mean: bool = False
    augment: bool = True
    average_symmetries: bool = False
    validation_fraction: float = 0.2
    selection: Literal["validation", "last"] = "validation"
    precision: Literal["auto", "bf16-mixed", "32-true"] = "auto"

    def sized(self, n_genes: int) -> "Recipe":
        """The recipe with a network of so many genes."""
        return replace(self, model=replace(self.model, n_genes=n_genes))

    def __post_init__(self) -> None:
        for name, allowed in (("epochs", 0), ("batch_size", 2), ("panel_size", 1)):
            if getattr(self, name) < allowed:
                raise InputError(f"{name}={getattr(self, name)} is not possible; use at least {allowed}")
        for name in ("lr", "region_mpp"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name}={value} is not possible; use a number above 0")
        for name in ("min_lr", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name}={value} is not possible; use 0 or a number above it")
        for name, share, low in (
            ("validation_fraction", self.validation_fraction, self.validation_fraction > 0),
            ("momentum", self.momentum, self.momentum >= 0),
        ):
            if not (low and share < 1):
                raise InputError(f"{name}={share} is not possible; use a share between 0 and 1")
        refuse_unknown("network", [self.network], MODELS, "the networks there are")
        known = loss_options(self.network)
        for name, value in self.loss.items():
            if name not in known:
                raise InputError(
                    f"loss.{name} is unknown to {self.network}; use {', '.join(known) or 'none: it has none'}"
                )
            if not 0 <= value < math.inf:
                raise InputError(f"loss.{name}={value} is not possible; use 0 or a number above it")


def loss_options(network: str) -> dict[str, int | float]:
    """Options of a network's training step: name -> default."""
    parameters = inspect.signature(MODELS[network].step).parameters.values()
    return {its.name: its.default for its in parameters if its.kind is its.KEYWORD_ONLY}


_ADAPTER = TypeAdapter(Recipe)


def from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe from plain values (as :func:`dataclasses.asdict` gives them), checking each."""
    network = values.get("network", "hifusion")
    if network in MODELS:  # else the recipe itself refuses it
        model = _checked(TypeAdapter(MODELS[network].config), values["model"], "model.")
        values = {**values, "model": model}
    recipe: Recipe = _checked(_ADAPTER, values, "")
    return recipe


def _checked(adapter: TypeAdapter[Any], values: dict[str, Any], prefix: str) -> Any:
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":  # not a line of ours, which names its field itself
            key = prefix + ".".join(str(part) for part in first["loc"])
            message = f"recipe value {key}={first['input']!r} is not possible: {message}"
        raise InputError(message) from error
