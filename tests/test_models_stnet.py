"""ST-Net against the published network's figures, its start, its eight symmetries, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import classics
from hifusion.errors import InputError
from hifusion.models.inputs import pixel_statistics, z_scored
from hifusion.models.published import unwrapped
from hifusion.models.stnet import STNet, STNetConfig, STNetOutput, reference_names, stnet_loss
from hifusion.models.symmetries import eight_symmetries, mean_over_symmetries

pytest.importorskip("monai", reason="ST-Net's DenseNet comes from MONAI; pip install 'hifusion[rivals]'")


@pytest.fixture(scope="module")
def small() -> STNet:
    """A network for 32 px tiles and 5 genes, in evaluation mode. Tests that change it change it back."""
    torch.manual_seed(0)
    return STNet(STNetConfig(n_genes=5, patch_px=32)).eval()


def pixels(batch: int = 2, side: int = 40) -> Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# Golden figures


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> dict[str, Any]:
    """Expected figures, inputs, weights."""
    fabricate = classics.fabricator(golden_root)
    expected = classics.figures(golden_root, "stnet")
    seed = int(expected["seed"])
    return {
        "expected": expected,
        "inputs": classics.tensors(fabricate.stnet_inputs(seed)),
        "weights": fabricate.state_dict("stnet", seed),
        "window": fabricate.CONFIGS["stnet"]["window"],
    }


def loaded(golden: dict[str, Any], dtype: torch.dtype) -> STNet:
    weights = classics.tensors(golden["weights"], dtype)
    model = STNet.from_reference(weights, patch_px=golden["window"]).eval()
    model.set_pixel_statistics(golden["inputs"]["mean"], golden["inputs"]["std"])
    assert model.classifier.weight.dtype == model.pixel_mean.dtype == dtype, "the weights' dtype is kept"
    return model


@pytest.fixture(scope="module")
def computed(golden) -> dict[str, Any]:
    """What this package computes in float64; all of it takes seconds, so it is done once."""
    model, inputs = loaded(golden, torch.float64), golden["inputs"]
    with torch.no_grad():
        out = model.forward_tile(inputs["tile"])
    loss = stnet_loss(model.train().forward_tile(inputs["tile"]), inputs["target"])["total"]
    loss.backward()
    return {
        "eval_prediction": out.expression.numpy(),
        "eval_feature": out.embedding.numpy(),
        "train_loss": loss.item(),
        "gradients": classics.gradient_norms(model.network, reference_names(model)),
    }


@pytest.mark.parametrize("name", ["eval_prediction", "eval_feature", "train_loss"])
def test_float64_agrees_with_the_published_network(golden, computed, name):
    np.testing.assert_allclose(computed[name], golden["expected"][name], rtol=1e-8, atol=0)


def test_every_gradient_norm_agrees_with_the_published_network(golden, computed):
    assert not classics.gradient_differences(computed["gradients"], golden["expected"])


def photo(golden: dict[str, Any]) -> Tensor:
    return golden["inputs"]["photo"].permute(0, 3, 1, 2)


def test_symmetries_come_in_the_published_order_and_handedness(golden):
    mean, std = golden["inputs"]["mean"], golden["inputs"]["std"]
    corners = [z_scored(image, mean, std)[:, :, 0, :3] for image in eight_symmetries(photo(golden))]
    expected = golden["expected"]["symmetry_corner"]
    np.testing.assert_allclose(torch.stack(corners, 1), expected, rtol=1e-8, atol=0)


def test_symmetric_predictions_agree_in_float32(golden):
    """From raw pixels, the first photo. Relative to the largest value, 1e-3 as the golden figures' notes suggest."""
    model = loaded(golden, torch.float32)
    with torch.no_grad():
        ours = model(torch.cat(list(eight_symmetries(photo(golden)[:1])))).expression
    for value, name in ((ours, "symmetry_prediction"), (ours.mean(0), "average_prediction")):
        expected = golden["expected"][name][0]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_symmetric_predictions_agree_in_float64(golden):
    model = loaded(golden, torch.float64)
    with torch.no_grad():
        ours = torch.stack([model(image).expression for image in eight_symmetries(photo(golden))], 1)
    for value, name in ((ours, "symmetry_prediction"), (ours.mean(1), "average_prediction")):
        np.testing.assert_allclose(value, golden["expected"][name], rtol=1e-8, atol=0)


def test_default_network_has_the_published_names_and_shapes(golden_root):
    expected = json.loads((golden_root / "stnet_reference_shapes.json").read_text())
    model = STNet(STNetConfig(n_genes=expected["classifier.weight"][0]))
    names, state = reference_names(model), model.network.state_dict()
    assert {names[own]: list(value.shape) for own, value in state.items()} == expected


def test_network_of_the_paper_has_the_published_size():
    model = STNet(STNetConfig(n_genes=250))
    assert len(model.network.state_dict()) == 727 and sum(p.numel() for p in model.parameters()) == 7_210_106


# Start and symmetries


def test_every_prediction_is_the_bias_to_begin_with(small):
    profile = torch.tensor([-7.0, 0.0, 2.5, 1.0, -1.0])
    small.start_at(profile)
    assert torch.equal(small(pixels()).expression, profile.expand(2, 5))
    fresh = STNet(STNetConfig(n_genes=3, patch_px=32)).eval()
    assert torch.equal(fresh(pixels()).expression, fresh.classifier.bias.expand(2, 3))


@pytest.fixture
def learned(small) -> STNet:
    torch.manual_seed(1)
    torch.nn.init.normal_(small.classifier.weight)
    yield small
    torch.nn.init.zeros_(small.classifier.weight)


@pytest.mark.parametrize("change", [lambda x: x.rot90(1, (2, 3)), lambda x: x.flip(3), lambda x: x.flip(2)])
def test_a_turned_tile_has_the_same_eight_predictions_in_another_order(learned, change):
    images = pixels(1, 32)
    with torch.no_grad():
        before, after = (
            learned(torch.cat(list(eight_symmetries(given)))).expression for given in (images, change(images))
        )
    distance = torch.cdist(before, after)
    match = distance.argmin(1).tolist()
    assert sorted(match) == list(range(8)) and match != list(range(8))
    assert distance.min(1).values.max() < 1e-4 < distance.median()
    torch.testing.assert_close(before.mean(0), after.mean(0))


def test_eight_symmetries_of_a_square_are_all_different_and_the_first_is_itself():
    image = torch.arange(9).view(1, 1, 3, 3)
    copies = list(eight_symmetries(image))
    assert torch.equal(copies[0], image)
    assert len({tuple(copy.flatten().tolist()) for copy in copies}) == 8


def test_mean_over_symmetries_averages_the_predictions_not_the_images():
    images = torch.arange(4.0).view(1, 1, 2, 2)
    mean = mean_over_symmetries(lambda x: x[:, :, 0, 0].square(), images)
    assert mean.item() == pytest.approx((0 + 1 + 4 + 9) / 4)  # each corner comes to the first pixel twice


# Pixels


def test_region_equals_centre_crop_scaled_by_hand(small):
    region = pixels(side=40)
    mean, std = (statistic[:, None, None] for statistic in (small.pixel_mean, small.pixel_std))
    tile = (region[:, :, 4:36, 4:36].float() / 255 - mean) / std
    torch.testing.assert_close(small(region).embedding, small.forward_tile(tile).embedding, rtol=1e-4, atol=1e-5)


def test_pixel_statistics_are_those_of_all_centre_pixels_whatever_the_batches():
    region = pixels(5, 40)
    values = region[:, :, 4:36, 4:36].double() / 255
    for batches in ([region], region.split(2)):
        mean, std = pixel_statistics(batches, 32)
        torch.testing.assert_close(mean, values.mean((0, 2, 3)))
        torch.testing.assert_close(std, values.std((0, 2, 3), correction=0))


def test_pixel_statistics_travel_with_the_weights(small):
    assert {"pixel_mean", "pixel_std"} <= set(small.state_dict())


@pytest.mark.parametrize(
    "regions, message",
    [([], "no region patch was given"), ([torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)], "a channel has the same")],
)
def test_pixel_statistics_need_varied_pixels(regions, message):
    with pytest.raises(InputError, match=message):
        pixel_statistics(regions, 32)


def test_flat_region_gives_finite_gradients(learned):
    learned.train()
    out = learned(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8))
    stnet_loss(out, torch.zeros(2, 5))["total"].backward()
    assert all(p.grad.isfinite().all() for p in learned.parameters())
    learned.eval().zero_grad()


@pytest.mark.parametrize(
    "region, message",
    [
        (torch.zeros(2, 3, 40, 40), "region: dtype is torch.float32; give uint8"),
        (torch.zeros(2, 40, 40, 3, dtype=torch.uint8), r"region: shape is \(2, 40, 40, 3\); give \(B, 3, R, R\)"),
        (torch.zeros(2, 3, 30, 30, dtype=torch.uint8), "with R at least 32 and even"),
        (torch.zeros(2, 3, 41, 41, dtype=torch.uint8), "with R at least 32 and even"),
        (torch.zeros(2, 3, 40, 44, dtype=torch.uint8), "with R at least 32"),
    ],
)
def test_regions_of_another_dtype_or_shape_are_refused(small, region, message):
    with pytest.raises(InputError, match=message):
        small(region)


def test_tiles_of_integers_or_another_side_are_refused(small):
    with pytest.raises(InputError, match="tile: dtype is torch.uint8; give floats"):
        small.forward_tile(pixels(2, 32))
    with pytest.raises(InputError, match=r"tile: shape is \(2, 3, 40, 40\); give \(B, 3, 32, 32\)"):
        small.forward_tile(torch.zeros(2, 3, 40, 40))


def test_bfloat16_autocast_keeps_expression_in_float32(learned):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = learned(pixels())
    assert {x.dtype for x in out} == {torch.float32}
    assert (out.expression != out.expression.bfloat16().float()).any()


# Configuration, weights, loss


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_genes": 0}, "n_genes: 0 is not a whole number of at least 1"),
        ({"patch_px": 28}, "patch_px: 28 is too small for DenseNet; use at least 29"),
        ({"patch_px": 64.0}, "patch_px: 64.0 is not a whole number"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        STNetConfig(**({"n_genes": 250} | changes))


def published(model: STNet) -> dict[str, Any]:
    state = model.network.state_dict()
    return {name: state[own].numpy().copy() for own, name in reference_names(model).items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": {f"module.{n}": v for n, v in weights.items()}, "optim": {}, "epoch": 3},
        lambda weights: {"state_dict": {f"model.module.{n}": v for n, v in weights.items()}},
    ],
)
def test_weights_come_out_of_a_checkpoint_however_they_are_wrapped(wrap):
    weights = {"features.conv0.weight": 1, "classifier.bias": 2}
    assert unwrapped(wrap(weights)) == weights


def test_a_prefix_that_only_some_names_have_is_a_part_of_them():
    assert unwrapped({"model.a": 1, "b": 2}) == {"model.a": 1, "b": 2}


def test_published_weights_give_the_same_network_and_draw_no_random_numbers(small):
    state = torch.random.get_rng_state()
    model = STNet.from_reference({"model": {f"module.{n}": v for n, v in published(small).items()}}, patch_px=32)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config == small.config
    torch.testing.assert_close(dict(model.state_dict()), dict(small.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classifier.weight": None}, "missing: classifier.weight"),
        (
            {"features.norm5.weight": None, "extra": np.zeros(3), "classifier.bias": np.zeros(4)},
            r"missing: features.norm5.weight; unexpected: extra; wrong shape: classifier.bias \(4,\), not \(5,\)",
        ),
    ],
)
def test_published_weights_that_do_not_fit_are_named(small, change, message):
    weights = {name: value for name, value in (published(small) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        STNet.from_reference(weights)


def test_imagenet_weights_fill_all_but_the_classifier(small):
    """Names as torchvision's file has them: `norm.1` for `norm1`, no batch counters, a classifier of 1000 classes."""
    weights = {name: value + 1 for name, value in published(small).items() if not name.endswith("num_batches_tracked")}
    weights = {name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for name, v in weights.items()}
    weights |= {"classifier.weight": np.zeros((1000, 1024)), "classifier.bias": np.zeros(1000)}
    model = STNet(STNetConfig(n_genes=2, patch_px=32))
    before = model.classifier.bias.clone()
    model.load_imagenet(weights)
    conv = "features.denseblock1.denselayer1.{}conv2.weight"
    assert torch.equal(
        model.network.state_dict()[conv.format("layers.")], small.network.state_dict()[conv.format("layers.")] + 1
    )
    assert torch.equal(model.classifier.bias, before)
    with pytest.raises(InputError, match="ImageNet weights: missing: features.conv0.weight"):
        model.load_imagenet({name: value for name, value in weights.items() if name != "features.conv0.weight"})


def test_loss_sums_over_the_batch_or_averages_over_it():
    out = STNetOutput(torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.zeros(2, 1024))
    target = torch.zeros(2, 2)  # squared errors: (1 + 9) / 2 and (0 + 4) / 2
    assert stnet_loss(out, target)["total"].item() == pytest.approx(5 + 2)
    assert stnet_loss(out, target, reduction="mean")["total"].item() == pytest.approx(3.5)
    with pytest.raises(InputError, match=r"target: shape is \(2, 1\); give \(2, 2\)"):
        stnet_loss(out, torch.zeros(2, 1))


def test_a_missing_monai_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(InputError, match=r"MONAI is not installed; run `pip install 'hifusion\[rivals\]'`"):
        STNet(STNetConfig(n_genes=1))
