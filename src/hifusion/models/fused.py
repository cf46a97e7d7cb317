"""Networks made for inference: batch norm folded into the convolutions, fused kernels, no work that is thrown away."""

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.models.resnet import ResNet, small_map_matrix, small_map_product, trunk_layout

# Pixels that go through a trunk at once on a CPU. Maps then stay in its caches, and below the size from which the
# allocator gives memory back and takes it anew each time (32 MB with glibc).
_PIXELS_AT_ONCE = 2 * 448 * 448


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, float32 where it would only emulate it."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Without these instructions bfloat16 convolutions run many times slower than float32 ones.
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if fast else torch.float32


def for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The network as it predicts fastest; the one given stays as it is.

    Trunks are replaced by `FusedTrunk`; everything else is copied. HiFusion leaves out what only its loss looks at:
    `level_expression` and `level_features` have no level (L = 0).

    Parameters
    ----------
    model
        A network of `hifusion.models`, on its device. The result is neither trained, saved nor moved.
    dtype
        In which trunks compute: bfloat16, float32 or float64; the fastest of the device, `fast_dtype`, where None.
    """
    device = next(model.parameters()).device
    dtype = fast_dtype(device) if dtype is None else dtype
    trunks = {id(part): FusedTrunk(part, dtype) for part in model.modules() if isinstance(part, ResNet)}
    fast = copy.deepcopy(model, cast(dict[int, Any], trunks)).eval().requires_grad_(False)
    for name, value in (("keep_levels", False), ("image_dtype", dtype)):
        if hasattr(fast, name):  # its kind can make use of being for inference
            setattr(fast, name, value)
    return fast


def at_once(images: Tensor) -> int:
    """How many images go through a trunk at once: all, but on a CPU."""
    return max(1, _PIXELS_AT_ONCE // images[0, 0].numel()) if images.device.type == "cpu" else len(images)


class FusedTrunk(nn.Module):
    """A `ResNet` in evaluation mode: (B, 3, H, W) -> (B, C, ceil(H / 32), ceil(W / 32)) in `dtype`."""

    def __init__(self, trunk: ResNet, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.layout = dtype, trunk_layout(trunk.conv1.out_channels)
        self.stem = FusedConv(trunk.conv1, trunk.bn1, dtype, self.layout)
        stages = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
        self.blocks = nn.ModuleList(FusedBlock(block, dtype, self.layout) for stage in stages for block in stage)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(dtype=self.dtype, memory_format=self.layout)
            return torch.cat([self._run(some) for some in images.split(at_once(images))])

    def _run(self, images: Tensor) -> Tensor:
        x = max_pool(self.stem(images))
        for block in self.blocks:
            x = block(x)
        return x


class FusedBlock(nn.Module):
    """A `BasicBlock` or `Bottleneck` in evaluation mode."""

    def __init__(self, block: nn.Module, dtype: torch.dtype, layout: torch.memory_format):
        super().__init__()
        numbers = [number for number in (1, 2, 3) if hasattr(block, f"conv{number}")]
        parts = [(getattr(block, f"conv{number}"), getattr(block, f"bn{number}")) for number in numbers]
        self.convs = nn.ModuleList(FusedConv(conv, norm, dtype, layout) for conv, norm in parts)
        self.shortcut = None
        if block.downsample is not None:
            conv, norm = cast(Iterable[Any], block.downsample)
            self.shortcut = FusedConv(conv, norm, dtype, layout)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x, relu=False)
        *first, last = self.convs
        for conv in first:
            x = conv(x)
        return cast(Tensor, last(x, shortcut))


class FusedConv(nn.Module):
    """Convolution, batch norm, sum with a shortcut and ReLU as one operation.

    On a CPU in bfloat16 or float32 they are one kernel of oneDNN, with the weights in its own layout: what
    `torch.compile` makes of them too, without a compiler.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, dtype: torch.dtype, layout: torch.memory_format):
        super().__init__()
        weight, bias = folded(conv, norm)
        self.weight = weight.to(device=conv.weight.device, dtype=dtype, memory_format=layout)
        self.bias = bias.to(device=conv.weight.device, dtype=dtype)
        self.stride, self.padding = list(conv.stride), [int(its) for its in conv.padding]
        self.packed = self._pack() if self._one_kernel(layout) else None
        self.matrices: dict[torch.Size, tuple[Tensor, Tensor, tuple[int, int]]] = {}

    def forward(self, x: Tensor, add: Tensor | None = None, relu: bool = True) -> Tensor:
        if max(x.shape[-2:]) <= 2 and self.weight.shape[-1] == 3:
            return self._as_product(x, add, relu)
        if self.packed is None:
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
            x = x if add is None else x.add_(add)
            return x.relu_() if relu else x
        place = (self.padding, self.stride, [1, 1], 1)
        last = "relu" if relu else "none"
        if add is None:
            return cast(
                Tensor, torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *place, last, [], "")
            )
        return cast(
            Tensor,
            torch.ops.mkldnn._convolution_pointwise.binary(
                x, add, self.packed, self.bias, *place, "add", 1.0, last if relu else None, [], None
            ),
        )

    def _one_kernel(self, layout: torch.memory_format) -> bool:
        return layout == torch.channels_last and has_kernels(self.weight)

    def _pack(self) -> Tensor:
        return torch._C._nn.mkldnn_reorder_conv2d_weight(self.weight.to_mkldnn(), self.padding, self.stride, [1, 1], 1)

    def _as_product(self, x: Tensor, add: Tensor | None, relu: bool) -> Tensor:
        size = x.shape[-2:]
        if size not in self.matrices:
            matrix, places = small_map_matrix(self.weight, self.stride[0], size)
            self.matrices[size] = matrix, self.bias.repeat(places[0] * places[1]), places
        y = small_map_product(x, *self.matrices[size])
        y = y if add is None else y.add_(add)
        return y.relu_() if relu else y


def has_kernels(weight: Tensor) -> bool:
    """Whether oneDNN can compute a layer with these weights and what follows it in one kernel: on most CPUs."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.bfloat16, torch.float32)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does a convolution and its batch norm in evaluation mode.

    In float64 on the CPU, since Apple's GPU has no such numbers.
    """
    assert norm.running_var is not None and norm.running_mean is not None
    weight, gain, shift, mean, variance = (
        its.detach().cpu().double()
        for its in (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = gain / (variance + norm.eps).sqrt()
    return weight * scale.view(-1, 1, 1, 1), shift - mean * scale


def max_pool(x: Tensor) -> Tensor:
    """The maximum of 3 x 3 with stride 2 and padding 1, (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
    if x.device.type != "cpu" or x.shape[-1] % 2 or x.shape[-2] % 2:
        return F.max_pool2d(x, 3, 2, 1)
    # Three rows at a time, then three columns: a fraction of the kernel's time in channels-last bfloat16 (torch 2.13).
    rows = torch.maximum(x[..., 0::2, :], x[..., 1::2, :])
    torch.maximum(rows[..., 1:, :], x[..., 1:-1:2, :], out=rows[..., 1:, :])
    found = torch.maximum(rows[..., 0::2], rows[..., 1::2])
    torch.maximum(found[..., 1:], rows[..., 1:-1:2], out=found[..., 1:])
    return found
