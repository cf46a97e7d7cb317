"""EfficientNet-Lite made for inference: batch norm folded into the convolutions, ReLU6 inside their kernels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.models.fused import at_once, folded, has_kernels

CENTRE, SCALE = 127.0, 128.0  # of pixels
_After = tuple[str, list[float], str]
_CLIP: _After = ("hardtanh", [0.0, 6.0], "")  # ReLU6 as oneDNN's kernels have it
_NOTHING: _After = ("none", [], "")

Layer = Callable[[Tensor], Tensor]


def lite_maps(network: Any, dtype: torch.dtype) -> Callable[[Tensor], list[Tensor]]:
    """The last maps at a sixteenth and at a thirty-second of a picture's side.

    Parameters
    ----------
    network
        An `EfficientNet` of the package efficientnet_lite_pytorch, on its device.
    dtype
        In which it computes.

    Returns
    -------
    Callable
        Pixels from 0 to 255, uint8 or float (B, 3, H, W) -> two maps, (B, C, ceil(H / 16), ceil(W / 16)) and as much
        at a thirty-second.
    """
    stem = _layer(network._conv_stem, network._bn0, dtype)
    blocks = []
    for block in network._blocks:
        wide = [_layer(block._expand_conv, block._bn0, dtype)] if hasattr(block, "_expand_conv") else []
        along = _layer(block._depthwise_conv, block._bn1, dtype)
        narrow = _layer(block._project_conv, block._bn2, dtype, clip=False)
        into = (block._expand_conv if wide else block._depthwise_conv).in_channels
        halves = block._depthwise_conv.stride[0] == 2
        blocks.append(([*wide, along, narrow], halves, not halves and into == block._project_conv.out_channels))
    last_halving = max(number for number, (_, halves, _) in enumerate(blocks) if halves)
    kept = (last_halving - 1, len(blocks) - 1)

    def some(images: Tensor) -> list[Tensor]:
        found = []
        images = stem(images)
        for number, (layers, _, residual) in enumerate(blocks):
            inner = images
            for layer in layers:
                inner = layer(inner)
            images = inner.add_(images) if residual else inner
            if number in kept:
                found.append(images)
        return found

    def maps(pixels: Tensor) -> list[Tensor]:
        # Whole numbers this small are exact in bfloat16, before and after they are scaled; others are scaled first.
        exact = dtype if pixels.dtype == torch.uint8 else torch.float32
        images = pixels.to(dtype=exact, memory_format=torch.channels_last).sub(CENTRE).div_(SCALE).to(dtype)
        parts = [some(part) for part in images.split(at_once(images))]  # on a CPU, what stays in its caches
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]

    return maps


def _layer(conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype, clip: bool = True) -> Layer:
    """Convolution with TensorFlow's padding, batch norm and ReLU6: one kernel on a CPU, plain operations elsewhere."""
    weight, bias = (its.to(device=conv.weight.device, dtype=dtype) for its in folded(conv, norm))
    step, groups = conv.stride[0], conv.groups
    if not has_kernels(weight):
        weight = weight.contiguous(memory_format=torch.channels_last)

        def plain(images: Tensor) -> Tensor:
            found = F.conv2d(_padded(images, weight.shape[-1], step), weight, bias, step, groups=groups)
            return found.clamp_(0, 6) if clip else found

        return plain
    if weight.shape[-1] == 1:
        return _product(weight.flatten(1), bias, clip)
    return _one_kernel(weight, bias, step, groups, clip)


def _product(weight: Tensor, bias: Tensor, clip: bool) -> Layer:
    """A convolution of single pixels: on small maps a product takes a quarter of the convolution's time."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def product(images: Tensor) -> Tensor:
        pixels = images.permute(0, 2, 3, 1)
        last = _CLIP if clip else _NOTHING
        found = torch.ops.mkldnn._linear_pointwise(pixels.reshape(-1, weight.shape[1]), packed, bias, *last)
        return found.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)

    return product


def _one_kernel(weight: Tensor, bias: Tensor, step: int, groups: int, clip: bool) -> Layer:
    size = weight.shape[-1]

    def kernel(weight: Tensor, padding: int) -> Layer:
        where = [padding, padding], [step, step], [1, 1], groups
        packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *where)
        last = _CLIP if clip else _NOTHING
        return lambda images: torch.ops.mkldnn._convolution_pointwise(images, packed, bias, *where, *last)

    symmetric = kernel(weight, size // 2)
    if step == 1:
        return symmetric
    # Where TensorFlow pads one less on the left and above, a kernel that is one larger there does so without a copy.
    shifted, unpadded = kernel(F.pad(weight, [1, 0, 1, 0]), size // 2), kernel(weight, 0)

    def strided(images: Tensor) -> Tensor:
        odd = {side % step for side in images.shape[-2:]}
        if groups == 1 or len(odd) == 2:  # few channels are padded faster than they meet a larger kernel
            return unpadded(_padded(images, size, step))
        return (symmetric if odd == {1} else shifted)(images)

    return strided


def _padded(images: Tensor, size: int, step: int) -> Tensor:
    """TensorFlow's padding: as many pixels as the last step needs, one more right and below where that is odd."""
    more = [max((-(-side // step) - 1) * step + size - side, 0) for side in images.shape[:1:-1]]
    return F.pad(images, [part for its in more for part in (its // 2, its - its // 2)])
