"""Trunks that compute in 8-bit whole numbers on a CPU: twice as fast as bfloat16, at a small and measurable loss."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.fused import FusedBlock, FusedConv, FusedTrunk, at_once, for_inference, max_pool
from hifusion.models.resnet import ResNet

# Of the values at a place of the network, over the calibration patches, the share that its 8 bits reach to; the rest
# is clipped. Without clipping a few bright specks decide the step of all.
_REACHED = 0.9999
_SAMPLED = 1 << 16  # values of one batch at one place that the share is taken of
_LEVELS = 255


def for_int8(model: nn.Module, regions: Iterable[Tensor]) -> nn.Module:
    """The network with trunks in 8-bit whole numbers, as `hifusion.models.for_inference` makes one in bfloat16.

    Weights have a scale for each output channel, activations one for each place of the network: static quantisation,
    calibrated on patches.

    Parameters
    ----------
    model
        A network of `hifusion.models` on the CPU; it stays as it is.
    regions
        Batches of regions, uint8 (B, 3, R, R), such as those of a few hundred training spots.

    Raises
    ------
    InputError
        No calibration patch, a network without a trunk, on another device, or a processor or torch without the kernels.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or not _kernels():
        raise InputError(
            f"int8 on {device.type} is not possible; it needs a CPU and a torch with oneDNN's quantised kernels: "
            "leave int8 out"
        )
    if not any(isinstance(part, ResNet) for part in model.modules()):
        raise InputError("int8: the network has no ResNet trunk, which is what is made 8-bit; leave int8 out")
    fast = for_inference(model, torch.float32)
    seen = 0
    with _watched(fast) as reach, torch.inference_mode():
        for region in regions:
            fast(region)
            seen += len(region)
    if not seen:
        raise InputError("int8: no patch to calibrate on was given; give those of some training spots")
    for name, part in list(fast.named_modules()):
        if isinstance(part, FusedTrunk):
            fast.set_submodule(name, Int8Trunk(part, reach))
    return fast


def _kernels() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")


@contextmanager
def _watched(fast: nn.Module) -> Iterator[dict[nn.Module, list[float]]]:
    """Note the lowest and highest value that matters at the input of each trunk and the output of each convolution."""
    reach: dict[nn.Module, list[float]] = {}

    def note(module: nn.Module, values: Tensor) -> None:
        values = values.flatten()
        some = values[:: max(1, len(values) // _SAMPLED)].float()
        low, high = torch.quantile(some, torch.tensor([1 - _REACHED, _REACHED])).tolist()
        before = reach.get(module, [0.0, 0.0])
        reach[module] = [min(before[0], low), max(before[1], high)]

    hooks = []
    for part in fast.modules():
        if isinstance(part, FusedTrunk):
            hooks.append(part.register_forward_pre_hook(lambda its, given: note(its, given[0])))
        if isinstance(part, FusedConv):
            hooks.append(part.register_forward_hook(lambda its, given, found: note(its, found)))
    try:
        yield reach
    finally:
        for hook in hooks:
            hook.remove()


class _Steps:
    """Which value the whole numbers 0 to 255 at one place of the network stand for: (number - zero) * step."""

    def __init__(self, low: float, high: float):
        self.step = max(high - low, 1e-6) / _LEVELS
        self.zero = round(-low / self.step)


class Int8Trunk(nn.Module):
    """As `FusedTrunk`, in 8-bit whole numbers between images and map, both float32."""

    def __init__(self, trunk: FusedTrunk, reach: dict[nn.Module, list[float]]):
        super().__init__()
        self.given = _Steps(*reach[trunk])
        self.stem = Int8Conv(trunk.stem, self.given, reach)
        before, self.blocks = self.stem.found, nn.ModuleList()
        for block in trunk.blocks:
            self.blocks.append(made := Int8Block(cast(FusedBlock, block), before, reach))
            before = made.found
        self.found = before

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._run(some) for some in images.split(at_once(images))])

    def _run(self, images: Tensor) -> Tensor:
        numbers = images.to(torch.float32).div(self.given.step).add_(self.given.zero).round_().clamp_(0, _LEVELS)
        x = max_pool(self.stem(numbers.to(torch.uint8).contiguous(memory_format=torch.channels_last)))
        for block in self.blocks:
            x = block(x)
        return (x.to(torch.float32) - self.found.zero) * self.found.step


class Int8Block(nn.Module):
    """As `FusedBlock`, between uint8 maps."""

    def __init__(self, block: FusedBlock, given: _Steps, reach: dict[nn.Module, list[float]]):
        super().__init__()
        self.shortcut = None if block.shortcut is None else Int8Conv(block.shortcut, given, reach)
        beside = given if self.shortcut is None else self.shortcut.found
        self.convs, numbers = nn.ModuleList(), given
        for conv in block.convs:
            last = conv is block.convs[-1]
            self.convs.append(made := Int8Conv(conv, numbers, reach, beside if last else None))
            numbers = made.found
        self.found = numbers

    def forward(self, x: Tensor) -> Tensor:
        # The last convolution adds into the shortcut's memory, which nobody else reads any more by then.
        shortcut = x if self.shortcut is None else self.shortcut(x, relu=False)
        *first, last = self.convs
        for conv in first:
            x = conv(x)
        return cast(Tensor, last(x, shortcut))


class Int8Conv(nn.Module):
    """As `FusedConv`, between uint8 maps: one kernel of oneDNN."""

    def __init__(
        self, conv: nn.Module, given: _Steps, reach: dict[nn.Module, list[float]], beside: _Steps | None = None
    ):
        super().__init__()
        conv = cast(FusedConv, conv)
        self.given, self.found, self.beside = given, _Steps(*reach[conv]), beside
        self.stride, self.padding, self.bias = conv.stride, conv.padding, conv.bias.float()
        weight = conv.weight.float().contiguous()
        self.scale = (weight.abs().amax((1, 2, 3)) / 127).clamp_(min=1e-12)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        whole = (weight / self.scale.view(-1, 1, 1, 1)).round_().clamp_(-127, 127).to(torch.int8)
        self.packed = self._packed(whole, self.padding)
        # On maps of one pixel only the kernel's centre meets anything but padding.
        middle = whole.shape[-1] // 2
        self.centre = self._packed(whole[:, :, middle : middle + 1, middle : middle + 1].contiguous(), [0, 0])

    def _packed(self, whole: Tensor, padding: list[int]) -> Tensor:
        step, zero = self.given.step, self.given.zero
        return torch.ops.onednn.qconv_prepack(whole, self.scale, step, zero, self.stride, padding, [1, 1], 1, None)

    def forward(self, x: Tensor, add: Tensor | None = None, relu: bool = True) -> Tensor:
        alone = x.shape[-2:] == (1, 1)
        packed, padding = (self.centre, [0, 0]) if alone else (self.packed, self.padding)
        inputs = (x, self.given.step, self.given.zero, packed, self.scale, self.zeros)
        place = (self.stride, padding, [1, 1], 1, self.found.step, self.found.zero, torch.uint8)
        last = "relu" if relu else "none"
        if add is None:
            return cast(Tensor, torch.ops.onednn.qconv2d_pointwise(*inputs, self.bias, *place, last, [], ""))
        assert self.beside is not None
        summed: tuple[Any, ...] = (self.beside.step, self.beside.zero, "sum", 1.0, last, [], "")
        return cast(Tensor, torch.ops.onednn.qconv2d_pointwise.binary(*inputs, add, self.bias, *place, *summed))
