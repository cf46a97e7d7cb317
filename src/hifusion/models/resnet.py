"""ResNet-10, -18 and -50 trunks with torchvision's parameter names, and strict loading of named weights."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models.inputs import PatchConfig, z_scored
from hifusion.models.recomputation import recomputed

ENCODERS: dict[str, tuple[int, ...]] = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}
"""Encoder name -> basic blocks in each of the four stages."""

RESNET50: tuple[int, ...] = (3, 4, 6, 3)
"""Bottlenecks in each of the four stages of ResNet-50."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixel / 255 per channel: what torchvision's ImageNet weights were trained with."""

_NAMES_SHOWN = 6  # a wrong file may differ in every name: the message stays one readable line


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, (B, in, h, w) -> (B, out, h / stride, w / stride) (He et al. 2016)."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu_(self.bn1(_conv3x3(self.conv1, x)))
        return torch.relu_(self.bn2(_conv3x3(self.conv2, x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut, (B, in, h, w) -> (B, 4 * channels, h / stride, w / stride).

    The 3x3 convolution takes the stride, as torchvision's weights expect (the paper has it on the first 1x1).
    """

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu_(self.bn1(self.conv1(x)))
        x = torch.relu_(self.bn2(_conv3x3(self.conv2, x)))
        return torch.relu_(self.bn3(self.conv3(x)) + shortcut)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Projection of a block's input to its output's shape; None where they are the same already."""
    if stride == 1 and in_channels == out_channels:
        return None
    projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels))


def _conv3x3(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution; on maps of at most 2 x 2 as a matrix product, which leaves out the taps that meet padding alone.

    Same result, at up to a ninth of the work. And it keeps clear of a fault: in bfloat16 on a CPU (torch 2.13, oneDNN)
    the weight gradient of a 3x3 convolution with stride 2 on a 1x1 map comes back with memory that was never written.
    """
    if max(x.shape[-2:]) > 2:
        return cast(Tensor, conv(x))
    matrix, places = small_map_matrix(conv.weight.to(x.dtype), conv.stride[0], x.shape[-2:])
    return small_map_product(x, matrix, None, places)


def small_map_matrix(weight: Tensor, stride: int, size: torch.Size) -> tuple[Tensor, tuple[int, int]]:
    """A 3x3 convolution with padding 1 over maps of at most 2 x 2, as a matrix.

    Returns
    -------
    matrix
        (out height * out width * out channels, height * width * channels).
    places
        Out height and width.
    """
    height, width = size
    places = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    # Output place o meets input place i by tap i - o * stride + 1.
    firsts = [[1 - o * stride for o in range(number)] for number in places]
    taps = torch.stack([weight[:, :, first : first + height] for first in firsts[0]], 2)
    taps = torch.stack([taps[..., first : first + width] for first in firsts[1]], 3)
    return taps.permute(2, 3, 0, 4, 5, 1).reshape(places[0] * places[1] * len(weight), -1), places


def small_map_product(x: Tensor, matrix: Tensor, bias: Tensor | None, places: tuple[int, int]) -> Tensor:
    """(B, C, h, w) by a matrix of `small_map_matrix` -> (B, C', h', w'), channels last in memory."""
    y = F.linear(x.permute(0, 2, 3, 1).flatten(1), matrix, bias)
    return y.unflatten(1, (*places, -1)).permute(0, 3, 1, 2)


class ResNet(nn.Module):
    """Feature map of an image: (B, 3, H, W) -> (B, C, ceil(H / 32), ceil(W / 32)), C = 8 * width * block.expansion.

    Parameters
    ----------
    blocks
        Blocks in each of the four stages, see `ENCODERS` and `RESNET50`.
    width
        Channels of the stem and of the first stage's 3x3 convolutions; each later stage doubles them.
    block
        What the stages are made of: `BasicBlock`, or `Bottleneck` for ResNet-50.
    """

    recompute: bool = False
    """Keep no activations within stem and stages for the backward pass: less memory, the same gradients."""

    def __init__(
        self, blocks: tuple[int, ...], width: int = 64, block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        wide = width * block.expansion
        self.layer1 = _stage(block, width, width, blocks[0], stride=1)
        self.layer2 = _stage(block, wide, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(block, 2 * wide, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(block, 4 * wide, 8 * width, blocks[3], stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            x = recomputed(self._stem, images, [self.bn1])
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = recomputed(stage, x, [stage])
            return x
        return self.layer4(self.layer3(self.layer2(self.layer1(self._stem(images)))))

    def _stem(self, images: Tensor) -> Tensor:
        # The maximum first: the same values, and a quarter as many of them for the ReLU.
        return torch.relu_(self.maxpool(self.bn1(self.conv1(images))))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first, wide = block(in_channels, channels, stride), channels * block.expansion
    return nn.Sequential(first, *(block(wide, channels, 1) for _ in range(blocks - 1)))


def trunk_layout(width: int) -> torch.memory_format:
    """Layout of a trunk's weights and images: channels last, the fast one, where the width allows it.

    With channels that are no multiple of 16, oneDNN's 1x1 convolution on AVX-512 (torch 2.13) writes past its buffers
    in channels-last training: the process crashes sooner or later.
    """
    return torch.contiguous_format if width % 16 else torch.channels_last


class TrunkConfig(PatchConfig):
    """A configuration of a network whose patch goes through a trunk of so many channels."""

    width: int

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights and images."""
        return trunk_layout(self.width)


def imagenet_scaled(pixels: Tensor, like: Tensor) -> Tensor:
    """Pixels as torchvision's ImageNet weights want them: uint8 (B, 3, H, W) -> (B, 3, H, W) in the dtype of `like`."""
    return z_scored(pixels, like.new_tensor(IMAGENET_MEAN), like.new_tensor(IMAGENET_STD))


def load_torchvision(trunk: ResNet, state_dict: Mapping[str, Any]) -> None:
    """Weights of torchvision's ResNet copied into a trunk, in place.

    Parameters
    ----------
    trunk
        A ResNet of the same depth and width (torchvision's resnet18: `ENCODERS["resnet18"]`, width 64; its resnet50:
        `RESNET50`, width 64, `Bottleneck`).
    state_dict
        Name -> tensor or numpy array. The classifier `fc.*` is ignored. Batch counters
        (`*.num_batches_tracked`) may be absent, as they are from torchvision's older ImageNet files.

    Raises
    ------
    InputError
        Any other name is missing, unexpected or of another shape; the trunk is then unchanged.
    """
    own = trunk.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    trunk_weights = {name: value for name, value in state_dict.items() if not name.startswith("fc.")}
    load_named(trunk, counters | trunk_weights, {name: name for name in own}, "torchvision weights")


def load_named(module: nn.Module, state_dict: Mapping[str, Any], names: Mapping[str, str], what: str) -> None:
    """Weights with somebody else's names copied into a module, in place, all or nothing.

    Parameters
    ----------
    module
        Receives the values in its own dtype.
    state_dict
        Given name -> tensor or numpy array.
    names
        The module's own name -> given name, for its whole state.
    what
        What the weights are, for the error message.

    Raises
    ------
    InputError
        Names that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    expected = {given: tuple(own[name].shape) for name, given in names.items()}
    found = {name: tuple(getattr(value, "shape", ("not an array",))) for name, value in state_dict.items()}
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "wrong shape": [
            f"{name} {found[name]}, not {shape}" for name, shape in expected.items() if found.get(name, shape) != shape
        ],
    }
    problems = [f"{problem}: {_listed(entries)}" for problem, entries in differences.items() if entries]
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}; give weights of exactly this network")
    module.load_state_dict({name: as_tensor(state_dict[given]) for name, given in names.items()})


def as_tensor(value: Any) -> Tensor:
    """Tensor of a tensor or numpy array; arrays are copied, so read-only ones are welcome."""
    return value.detach() if isinstance(value, Tensor) else torch.tensor(value)


def _listed(entries: list[str]) -> str:
    rest = len(entries) - _NAMES_SHOWN
    return ", ".join(entries[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
