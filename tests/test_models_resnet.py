"""The trunks take torchvision's weights by name, and give maps of the expected size."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models.resnet import (
    ENCODERS,
    RESNET50,
    BasicBlock,
    Bottleneck,
    ResNet,
    _conv3x3,
    imagenet_scaled,
    load_torchvision,
)


def torchvision_resnet18() -> dict[str, Tensor]:
    """torchvision's resnet18 state dict with random values, names and shapes written out from its published form."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}
    norms = {"bn1": 64}
    for layer, c_in, c_out in ((1, 64, 64), (2, 64, 128), (3, 128, 256), (4, 256, 512)):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            shapes[f"{name}.conv1.weight"] = (c_out, c_out if block else c_in, 3, 3)
            shapes[f"{name}.conv2.weight"] = (c_out, c_out, 3, 3)
            norms |= {f"{name}.bn1": c_out, f"{name}.bn2": c_out}
        if layer > 1:
            shapes[f"layer{layer}.0.downsample.0.weight"] = (c_out, c_in, 1, 1)
            norms[f"layer{layer}.0.downsample.1"] = c_out
    for name, channels in norms.items():
        shapes |= {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    assert len(shapes) == 122  # 20 convolutions, 20 batch norms of 5 entries, the classifier's 2
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def torchvision_weights() -> dict[str, Tensor]:
    return torchvision_resnet18()


def test_resnet18_takes_torchvisions_names_with_or_without_batch_counters(torchvision_weights):
    older = {name: value for name, value in torchvision_weights.items() if not name.endswith("num_batches_tracked")}
    for weights in (torchvision_weights, older):
        trunk = ResNet(ENCODERS["resnet18"])
        load_torchvision(trunk, weights)
        for name, value in trunk.named_parameters():
            assert torch.equal(value, weights[name]), name
        assert torch.equal(trunk.layer4[1].bn2.running_var, weights["layer4.1.bn2.running_var"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer2.0.downsample.0.weight": None}, "missing: layer2.0.downsample.0.weight"),
        ({"layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}, "unexpected: layer1.2.conv1.weight"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"conv1.weight \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"),
    ],
)
def test_torchvision_weights_that_do_not_fit_are_named_and_change_nothing(torchvision_weights, change, message):
    weights = {name: value for name, value in (torchvision_weights | change).items() if value is not None}
    trunk = ResNet(ENCODERS["resnet18"])
    before = trunk.bn1.running_mean.clone()
    with pytest.raises(InputError, match=message):
        load_torchvision(trunk, weights)
    assert torch.equal(trunk.bn1.running_mean, before)


def test_resnet10_has_too_few_blocks_for_resnet18_weights(torchvision_weights):
    with pytest.raises(InputError, match=r"unexpected: layer1.1.conv1.weight.* and \d+ more"):
        load_torchvision(ResNet(ENCODERS["resnet10"]), torchvision_weights)


@pytest.mark.parametrize("side", [1, 31, 32, 33, 112])
def test_trunk_gives_a_map_of_a_32nd_of_the_side_rounded_up(side):
    trunk = ResNet((1, 1, 1, 1), width=2).eval()
    assert trunk(torch.zeros(1, 3, side, side)).shape == (1, 16, math.ceil(side / 32), math.ceil(side / 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_and_right_where_maps_shrink_to_one_pixel(dtype):
    """In bfloat16 on a CPU torch leaves this gradient partly unwritten; junk is put into memory to make it show."""
    torch.manual_seed(0)
    block = BasicBlock(64, 128, stride=2).to(memory_format=torch.channels_last)
    x = torch.randn(32, 64, 1, 1)
    expected = torch.autograd.grad(
        F.conv2d(x, block.conv1.weight, stride=2, padding=1).square().sum(), block.conv1.weight
    )[0]
    for _ in range(3):
        junk = [torch.full((1 << 16,), float("nan"), dtype=dtype) for _ in range(20)]
        del junk
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            y = _conv3x3(block.conv1, x)
        found = torch.autograd.grad(y.float().square().sum(), block.conv1.weight)[0]
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_resnet50_has_the_names_and_size_of_torchvisions(golden_root: Path):
    """BLEEP's published image encoder is a ResNet-50 without its classifier: 25,557,032 - 2,049,000 parameters."""
    table = json.loads((golden_root / "bleep_reference_shapes.json").read_text())
    prefix = "image_encoder.model."
    expected = {name.removeprefix(prefix): shape for name, shape in table.items() if name.startswith(prefix)}
    with torch.device("meta"):
        trunk = ResNet(RESNET50, block=Bottleneck)
    assert {name: list(value.shape) for name, value in trunk.state_dict().items()} == expected
    assert sum(p.numel() for p in trunk.parameters()) == 23_508_032


def test_a_bottleneck_trunk_takes_torchvisions_weights_and_gives_four_times_the_channels():
    trunk = ResNet((1, 1, 1, 1), 2, Bottleneck).eval()
    weights = {name: torch.rand(value.shape) for name, value in trunk.state_dict().items() if "num_batches" not in name}
    load_torchvision(trunk, weights | {"fc.weight": torch.zeros(1000, 64)})
    assert torch.equal(trunk.layer3[0].downsample[0].weight, weights["layer3.0.downsample.0.weight"])
    assert trunk(torch.zeros(1, 3, 65, 33)).shape == (1, 64, 3, 2)


def test_a_bottlenecks_3x3_convolution_takes_the_stride():
    """Pixels that the first 1x1 convolution would skip, had it the stride, reach the branch."""
    block = Bottleneck(4, 1, stride=2).eval()
    torch.nn.init.ones_(block.conv2.weight)
    torch.nn.init.ones_(block.conv1.weight)
    torch.nn.init.ones_(block.conv3.weight)
    torch.nn.init.zeros_(block.downsample[0].weight)
    x = torch.zeros(1, 4, 4, 4)
    x[:, :, 1, 1] = 1.0
    assert block(x).shape == (1, 4, 2, 2) and (block(x)[0, 0] > 0).all()


def test_imagenet_scaling_is_by_channel_and_in_the_networks_dtype():
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = imagenet_scaled(pixels, torch.zeros(1, dtype=torch.float64))
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)
