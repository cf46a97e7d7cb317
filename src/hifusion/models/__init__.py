"""The published models: name -> its config, its module and its training step; and any of them made for inference."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from hifusion.models import steps
from hifusion.models.asign import Asign2d
from hifusion.models.asign3d import Asign3d
from hifusion.models.asign_core import AsignConfig
from hifusion.models.bleep import Bleep, BleepConfig
from hifusion.models.egn import EGN, EGNConfig
from hifusion.models.frozen import FrozenConfig, FrozenHiFusion
from hifusion.models.fused import for_inference
from hifusion.models.hifusion import HiFusion, HiFusionConfig
from hifusion.models.hist2st import Hist2ST, Hist2STConfig
from hifusion.models.histogene import HisToGene, HisToGeneConfig
from hifusion.models.stnet import STNet, STNetConfig
from hifusion.models.triplex import Triplex, TriplexConfig

__all__ = ["MODELS", "Model", "for_inference"]


class Model(NamedTuple):
    """What the training loop needs of a model.

    A module takes uint8 regions (B, 3, R, R) and, as keywords, what its class variable `needs` names; with
    `whole_section` a batch is all spots of a section. It returns a named output with `expression` (B, G) and
    `embedding` (B, C). It may have the methods `start_at(profile)`, `set_pixel_statistics(mean, std)` and
    `set_bank(expression)`, which the training loop then calls with facts of the training spots.
    """

    config: type[Any]
    """Frozen dataclass; raises `InputError` for values it cannot use."""
    module: Callable[..., nn.Module]
    """Config -> module."""
    step: Callable[..., dict[str, Tensor]]
    """(network, batch, options as keywords) -> named terms with `total`, see `hifusion.models.steps`."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Keywords of the forward pass beside the regions."""
        return self.module.needs  # type: ignore[attr-defined]

    @property
    def fitted_at_once(self) -> bool:
        """Whether it is fitted as a whole on a frozen trunk's features, not in epochs over region patches."""
        return not getattr(self.module, "reads_regions", True)

    @property
    def has_intervals(self) -> bool:
        """Whether its output has `lower` and `upper`."""
        return getattr(self.module, "has_intervals", False)

    @property
    def looks_at_training(self) -> bool:
        """Whether measured training spots are among what it needs to predict."""
        return not {"exemplar_target", "known_expression"}.isdisjoint(self.needs)


BY_SPOT = frozenset(
    (
        *("feature", "exemplar_feature", "exemplar_target", "neighbour_features", "neighbour_mask", "section_row"),
        *FrozenHiFusion.needs,
    )
)
"""Inputs with a row for each spot of a batch; all others are of the whole section."""

MODELS: dict[str, Model] = {
    "hifusion": Model(HiFusionConfig, HiFusion, steps.hifusion_step),
    "hifusion_frozen": Model(FrozenConfig, FrozenHiFusion, steps.frozen_step),
    "stnet": Model(STNetConfig, STNet, steps.stnet_step),
    "histogene": Model(HisToGeneConfig, HisToGene, steps.histogene_step),
    "hist2st": Model(Hist2STConfig, Hist2ST, steps.hist2st_step),
    "egn": Model(EGNConfig, EGN, steps.egn_step),
    "triplex": Model(TriplexConfig, Triplex, steps.triplex_step),
    "asign2d": Model(AsignConfig, Asign2d, steps.asign2d_step),
    "asign3d": Model(AsignConfig, Asign3d, steps.asign3d_step),
    "bleep": Model(BleepConfig, Bleep, steps.bleep_step),
}
