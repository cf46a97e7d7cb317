"""One training step of every network: a batch in, the named terms of its loss out."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hifusion.models.asign import asign_loss
from hifusion.models.asign3d import asign3d_loss
from hifusion.models.bleep import bleep_loss
from hifusion.models.egn import egn_loss
from hifusion.models.frozen import head_loss
from hifusion.models.hifusion import hifusion_loss
from hifusion.models.hist2st_training import hist2st_loss, view_outputs
from hifusion.models.histogene import histogene_loss
from hifusion.models.stnet import stnet_loss
from hifusion.models.triplex import triplex_loss


class Batch(NamedTuple):
    """What a training step is given: some spots, or all spots of a section."""

    region: Tensor
    """uint8 (B, 3, R, R), channels last in memory."""
    target: Tensor
    """(B, G). Rows that are not `scored` may hold what the step must not learn from."""
    inputs: Mapping[str, Tensor]
    """Keyword arguments of the network's forward pass."""
    beside: Mapping[str, Any]
    """What the loss is given beside output and target."""
    scored: Tensor | None
    """bool (B,), the spots to learn from; all where None."""
    generator: torch.Generator
    """On the CPU, for random copies."""
    of: int | None = None
    """Spots of the whole batch, where these are the share of one of several devices."""

    @property
    def spots(self) -> int:
        """Spots of the whole batch."""
        return len(self.target) if self.of is None else self.of

    def pinned(self) -> "Batch":
        """The regions and targets where a GPU fetches them while it computes."""
        return self._replace(region=self.region.pin_memory(), target=self.target.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on a device."""
        return self._replace(
            region=self.region.to(device, non_blocking=True),
            target=self.target.to(device, non_blocking=True),
            inputs={name: value.to(device) for name, value in self.inputs.items()},
            beside={name: value.to(device) for name, value in self.beside.items()},
            scored=None if self.scored is None else self.scored.to(device),
        )


# Each step takes (network, batch) and the options of its loss as keywords; a recipe's `loss` may name these.


def hifusion_step(network: Any, batch: Batch, *, align_weight: float = 1.0) -> dict[str, Tensor]:
    """See `hifusion_loss`."""
    return hifusion_loss(network(batch.region), batch.target, align_weight)


def stnet_step(network: Any, batch: Batch) -> dict[str, Tensor]:
    """See `stnet_loss`; the mean over the batch, so that the rate is the optimiser's alone."""
    return stnet_loss(network(batch.region), batch.target, "mean")


def histogene_step(network: Any, batch: Batch) -> dict[str, Tensor]:
    """See `histogene_loss`."""
    return histogene_loss(scored(network(batch.region, **batch.inputs), batch), scored(batch.target, batch))


def hist2st_step(
    network: Any, batch: Batch, *, views: int = 5, count_weight: float = 0.25, distillation_weight: float = 0.5
) -> dict[str, Tensor]:
    """See `hist2st_loss`; `views` changed copies of the section are distilled from."""
    output = network(batch.region, **batch.inputs)
    copies = view_outputs(network, batch.region, **batch.inputs, generator=batch.generator, n_views=int(views))
    return hist2st_loss(
        scored(output, batch),
        scored(batch.target, batch),
        count=scored(batch.beside["count"], batch),
        size_factor=scored(batch.beside["size_factor"], batch),
        views=[scored(copy, batch) for copy in copies],
        count_weight=count_weight,
        distillation_weight=distillation_weight,
    )


def egn_step(network: Any, batch: Batch, *, correlation_weight: float = 0.5) -> dict[str, Tensor]:
    """See `egn_loss`."""
    return egn_loss(network(batch.region, **batch.inputs), batch.target, correlation_weight)


def triplex_step(network: Any, batch: Batch, *, distil_weight: float = 0.3) -> dict[str, Tensor]:
    """See `triplex_loss`."""
    return triplex_loss(network(batch.region, **batch.inputs), batch.target, distil_weight)


def asign2d_step(network: Any, batch: Batch) -> dict[str, Tensor]:
    """See `asign_loss`."""
    return asign_loss(network(batch.region, **batch.inputs), batch.target, **batch.beside, scored=batch.scored)


def asign3d_step(network: Any, batch: Batch) -> dict[str, Tensor]:
    """See `asign3d_loss`; learns from spots whose expression the network was not given."""
    return asign3d_loss(network(batch.region, **batch.inputs), batch.target, **batch.beside, scored=batch.scored)


def bleep_step(network: Any, batch: Batch, *, temperature: float = 1.0) -> dict[str, Tensor]:
    """See `bleep_loss`."""
    return bleep_loss(network(batch.region, measured=batch.target), batch.target, temperature)


def frozen_step(
    network: Any, batch: Batch, *, align_weight: float = 0.1, level_weight: float = 1.0
) -> dict[str, Tensor]:
    """See `head_loss`: of one head, on components of expression."""
    return head_loss(network(**batch.inputs), batch.target, batch.beside["weight"], align_weight, level_weight)


def scored(value: Any, batch: Batch) -> Any:
    """The rows to learn from: of a tensor (B, ...), or of every tensor of a named output."""
    if batch.scored is None or value is None:
        return value
    if isinstance(value, Tensor):
        return value[batch.scored]
    return type(value)(*(scored(field, batch) for field in value))
