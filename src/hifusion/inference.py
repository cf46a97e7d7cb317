"""Devices, precision, and the forward pass over many region patches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hifusion.memory import in_pieces
from hifusion.models import for_inference
from hifusion.models.fused import fast_dtype
from hifusion.models.symmetries import eight_symmetries


class SpotOutputs(NamedTuple):
    """What the network says of the spots of one batch."""

    expression: np.ndarray
    """float32 ``(B, G)``."""
    embedding: np.ndarray
    """float32 ``(B, C)``, the features the head read."""
    lower: np.ndarray | None = None
    """float32 ``(B, G)``: 5 % of measurements are to lie below; None for networks without intervals."""
    upper: np.ndarray | None = None
    """float32 ``(B, G)``: 5 % are to lie above; None likewise."""

    def rows(self, chosen: np.ndarray) -> "SpotOutputs":
        """What is said of some of the spots."""
        return SpotOutputs(**{name: values[chosen] for name, values in self._asdict().items() if values is not None})

    @classmethod
    def joined(cls, parts: "Sequence[SpotOutputs]") -> "SpotOutputs":
        """Batches of one network, one after the other."""
        known = [name for name, values in parts[0]._asdict().items() if values is not None]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in known})


def best_device() -> torch.device:
    """CUDA, Apple's GPU or the CPU, whichever of them is there first."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``"auto"`` made definite: bfloat16 where the device computes in it, float32 where it would only emulate it."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if fast_dtype(device) == torch.bfloat16 else "32-true"


def fast_network(network: nn.Module, precision: str) -> nn.Module:
    """The network as it predicts fastest in ``"bf16-mixed"`` or ``"32-true"``; the one given stays as it is."""
    return for_inference(network, torch.bfloat16 if precision == "bf16-mixed" else torch.float32)


def forward_regions(
    model: nn.Module, regions: Iterable[Tensor], *, precision: str, average_symmetries: bool = False
) -> Iterator[SpotOutputs]:
    """Run a network that needs nothing else over batches of region patches, uint8 ``(B, 3, R, R)``, one by one.

    Other arguments are those of :func:`forward_batches`.
    """
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]] = ((region, {}) for region in regions)
    return forward_batches(model, batches, precision=precision, average_symmetries=average_symmetries)


@torch.inference_mode()
def forward_batches(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Mapping[str, Tensor]]],
    *,
    precision: str,
    average_symmetries: bool = False,
) -> Iterator[SpotOutputs]:
    """Run the network over batches, one by one.

    Parameters
    ----------
    model
        A network of ``hifusion.models``; it is left in evaluation mode.
    batches
        Region patches, uint8 ``(B, 3, R, R)``, and what else the network needs by name.
    precision
        ``"bf16-mixed"`` or ``"32-true"``.
    average_symmetries
        Mean over the eight flips and turns of a patch, at eight times the cost: tissue has no up or left.
    """
    device = next(model.parameters()).device
    model.eval()
    for region, inputs in batches:
        region = region.to(device)
        given = {name: value.to(device) for name, value in inputs.items()}
        views = list(eight_symmetries(region)) if average_symmetries else [region]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            outputs = [in_pieces(model, view, given) for view in views]
        given_names = [name for name in SpotOutputs._fields if hasattr(outputs[0], name)]
        yield SpotOutputs(**{name: _mean([getattr(output, name) for output in outputs]) for name in given_names})


def _mean(values: list[Tensor]) -> np.ndarray:
    return torch.stack([value.float() for value in values]).mean(0).cpu().numpy()


def predict_regions(
    model: nn.Module,
    regions: Iterable[Tensor],
    *,
    precision: str,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Expression of every region patch, float32 ``(N, G)``; arguments as :func:`forward_regions`.

    Parameters
    ----------
    on_batch
        Called with the number of spots just done.
    """
    parts = []
    for outputs in forward_regions(model, regions, precision=precision):
        parts.append(outputs.expression)
        if on_batch:
            on_batch(len(outputs.expression))
    return np.concatenate(parts)
