"""The published models: name -> its config, its module and its loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from hifusion.models.hifusion import HiFusion, HiFusionConfig, hifusion_loss


class Model(NamedTuple):
    """What the training loop needs of a model."""

    config: type[Any]
    """Frozen dataclass; raises `InputError` for values it cannot use."""
    module: Callable[..., nn.Module]
    """Config -> module; takes uint8 regions (B, 3, R, R) and returns an output with `expression` (B, G)."""
    loss: Callable[..., dict[str, Tensor]]
    """(output, target) -> named terms with `total`."""


MODELS: dict[str, Model] = {
    "hifusion": Model(HiFusionConfig, HiFusion, hifusion_loss),
}
