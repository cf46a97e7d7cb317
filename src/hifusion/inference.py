"""Devices, precision, and the forward pass over many region patches."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from hifusion.errors import InputError

# oneDNN, as torch 2.13 has it, leaves the bfloat16 weight gradient of a 3x3 convolution with stride 2 uninitialised
# where its input is one pixel wide: seen as NaN, or as 1e33. A tile this small is one pixel before a ResNet's last stage.
WRONG_IN_BF16_PX = 16


def best_device() -> torch.device:
    """CUDA, Apple's GPU or the CPU, whichever of them is there first."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device, patch_px: int = 32) -> str:
    """``"auto"`` made definite: bfloat16 where the device computes in it, float32 where it would only emulate it.

    Parameters
    ----------
    patch_px
        Side of the smallest patch or tile that goes through an encoder; 32 in the published recipes.

    Raises
    ------
    InputError
        ``"bf16-mixed"`` on a CPU for tiles that it computes wrong gradients of.
    """
    wrong = device.type == "cpu" and patch_px <= WRONG_IN_BF16_PX
    if precision == "bf16-mixed" and wrong:
        raise InputError(
            f"precision=bf16-mixed gives wrong gradients on a CPU for tiles of {patch_px} px (spot_px / largest grid); "
            f"use precision=auto, or tiles above {WRONG_IN_BF16_PX} px"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if device.type == "cpu" and not wrong:
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
            output = model(region.to(device, memory_format=torch.channels_last))
        parts.append(output.expression.float().cpu().numpy())
        if on_batch:
            on_batch(len(region))
    return np.concatenate(parts)
