"""Devices, precision, and the forward pass over many region patches."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn


def best_device() -> torch.device:
    """CUDA, Apple's GPU or the CPU, whichever of them is there first."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``"auto"`` made definite: bfloat16 where the device computes in it, float32 where it would only emulate it."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if device.type == "cpu":
        # Without these instructions bfloat16 convolutions run many times slower than float32 ones.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16-mixed" if fast else "32-true"
    return "32-true"


@torch.inference_mode()
def predict_regions(
    model: nn.Module,
    regions: Iterable[Tensor],
    *,
    precision: str,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Expression of every region patch, float32 ``(N, G)``.

    Parameters
    ----------
    model
        A network of ``hifusion.models``; it is left in evaluation mode.
    regions
        Batches of uint8 ``(B, 3, R, R)``.
    precision
        ``"bf16-mixed"`` or ``"32-true"``.
    on_batch
        Called with the number of spots just done.
    """
    device = next(model.parameters()).device
    model.eval()
    parts = []
    for region in regions:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            output = model(region.to(device))
        parts.append(output.expression.float().cpu().numpy())
        if on_batch:
            on_batch(len(region))
    return np.concatenate(parts)
