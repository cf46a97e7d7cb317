"""HiFusion against the published network's figures, and what its configuration, inputs and weights allow."""

import importlib.util
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hifusion.errors import InputError
from hifusion.models import MODELS, for_inference
from hifusion.models.hifusion import (
    HiFusion,
    HiFusionConfig,
    HiFusionOutput,
    hifusion_loss,
    reference_names,
    split_tiles,
    standardise,
    stitch_tiles,
)
from hifusion.models.steps import Batch


def tiny(**changes: Any) -> HiFusion:
    """A network of a few thousand weights for 64 px regions, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    settings = {"n_genes": 5, "grids": (1, 2), "spot_px": 32, "region_px": 64, "width": 4, "heads": 4} | changes
    return HiFusion(HiFusionConfig(**settings)).eval()


def pixels(batch: int = 2, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# Golden figures


def figures(weights: dict[str, np.ndarray], grids: tuple[int, ...], images: tuple[np.ndarray, ...], dtype: torch.dtype):
    """Everything the golden file holds, computed by this package in the given dtype."""
    given = {name: torch.tensor(value).to(dtype) if value.ndim else value for name, value in weights.items()}
    # The training figures were taken with attention dropout 0; in evaluation it is off anyway.
    model = HiFusion.from_reference(given, grids=grids, dropout=0.0)
    assert model.head.weight.dtype == dtype, "the weights' dtype is kept"
    region, spot, target = (torch.tensor(image, dtype=dtype) for image in images)
    with torch.no_grad():
        out = model.eval().forward_images(region, spot)
        fast = for_inference(model, dtype).forward_images(region, spot)
        rough = for_inference(model.to(memory_format=torch.channels_last), torch.bfloat16).forward_images(region, spot)
    trained = model.train().forward_images(region, spot)
    loss = hifusion_loss(trained, target, align_weight=0.5)
    loss["total"].backward()
    names = reference_names(model)
    gradients = {names[name]: p.grad.double().norm().item() for name, p in model.named_parameters()}
    return {
        "eval_prediction": out.expression.numpy(),
        "eval_level_predictions": out.level_expression.numpy(),
        "eval_feature_mean": out.level_features.mean((-2, -1)).numpy(),
        "eval_feature_first": out.level_features[:, :, :8].numpy(),
        "fast_prediction": fast.expression.numpy(),
        "rough_prediction": rough.expression.numpy(),
        "train_mse_final": loss["final"].item(),
        "train_mse_levels": (trained.level_expression - target).square().mean((1, 2)).detach().numpy(),
        "train_mse_levels_mean": loss["levels"].item(),
        "train_align": loss["align"].item(),
        "train_loss": loss["total"].item(),
        # The published head is named after a number of genes: compare what is under it.
        "gradients": {re.sub(r"gene_head_\d+", "gene_head", name): norm for name, norm in gradients.items()},
    }


def pieces_per_side(stored: np.ndarray) -> tuple[int, ...]:
    """Grids of a golden file. The released code counts tiles (1, 4, 49): squares that do not all divide the 224 px."""
    grids = tuple(int(grid) for grid in stored)
    return grids if all(224 % grid == 0 for grid in grids) else tuple(math.isqrt(tiles) for tiles in grids)


@pytest.fixture(scope="module")
def fabricate(golden_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_fabricate", golden_root / "fabricate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden(golden_root: Path, fabricate: ModuleType):
    """(expected figures, computed figures by dtype); seed, grids, batch and genes are the file's own."""
    with np.load(golden_root / "hifusion_expected.npz") as file:
        expected: dict[str, Any] = dict(file)
    names = [re.sub(r"gene_head_\d+", "gene_head", name) for name in expected.pop("grad_names")]
    expected["gradients"] = dict(zip(names, expected.pop("grad_norms"), strict=True))
    expected["train_mse_levels_mean"] = expected["train_mse_levels"].mean()
    seed, size, grids = int(expected["seed"]), int(expected["batch_size"]), pieces_per_side(expected["grids"])
    genes = expected["eval_prediction"].shape[1]
    changed = {"fusion.weights": [len(grids)]}
    for name, shape in fabricate.shapes().items():
        if name.startswith(("fc.", "gene_head_")) and ".0." not in name:
            changed[name] = [genes, *shape[1:]]
    weights = fabricate.state_dict(seed, changed)
    images = fabricate.batch(seed, size, genes)
    return expected, {dtype: figures(weights, grids, images, dtype) for dtype in (torch.float64, torch.float32)}


EVALUATED = ("eval_prediction", "eval_level_predictions", "eval_feature_mean", "eval_feature_first")
TRAINED = ("train_mse_final", "train_mse_levels", "train_mse_levels_mean", "train_align", "train_loss")
FIGURES = EVALUATED + TRAINED


@pytest.mark.parametrize("name", FIGURES)
def test_float64_agrees_with_the_published_network(golden, name):
    expected, computed = golden
    np.testing.assert_allclose(computed[torch.float64][name], expected[name], rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", FIGURES)
def test_float32_agrees_with_the_published_network(golden, name):
    """Relative to the largest value: single entries near 0 lose digits to cancellation."""
    expected, computed = golden
    scale = np.abs(expected[name]).max()
    np.testing.assert_allclose(computed[torch.float32][name], expected[name], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_the_network_made_for_inference_agrees_with_the_published_one(golden, dtype, tolerance):
    expected, computed = golden
    scale = np.abs(expected["eval_prediction"]).max()
    np.testing.assert_allclose(
        computed[dtype]["fast_prediction"], expected["eval_prediction"], rtol=0, atol=tolerance * scale
    )


def test_bfloat16_trunks_agree_with_the_published_network_to_a_fiftieth_of_the_spread(golden):
    expected, computed = golden
    error = computed[torch.float32]["rough_prediction"] - expected["eval_prediction"]
    assert 0 < np.sqrt(np.square(error).mean()) < expected["eval_prediction"].std() / 50


def test_every_gradient_norm_agrees_with_the_published_network(golden):
    """In float64. The key bias has no gradient (softmax ignores a shift): both sides hold rounding, hence the floor."""
    expected, computed = golden
    norms, ours = expected["gradients"], computed[torch.float64]["gradients"]
    assert sorted(ours) == sorted(norms)
    total = math.hypot(*norms.values())
    wrong = {n: (ours[n], norms[n]) for n in norms if abs(ours[n] - norms[n]) > 1e-8 * norms[n] + 1e-9 * total}
    assert not wrong
    assert sum(norm < 1e-9 * total for norm in norms.values()) <= 1, "the floor hides more than the key bias"


def test_tile_counts_are_read_as_grids():
    assert pieces_per_side(np.array([1, 4, 49])) == (1, 2, 7) == pieces_per_side(np.array([1, 2, 7]))


def test_default_network_has_the_published_names_and_shapes(fabricate):
    with torch.device("meta"):
        model = HiFusion(HiFusionConfig(n_genes=250))
    names = reference_names(model)
    assert {names[name]: list(value.shape) for name, value in model.state_dict().items()} == fabricate.shapes()
    assert sum(p.numel() for p in model.parameters()) == 17_390_455


# Published weights


def published(model: HiFusion) -> dict[str, np.ndarray]:
    return {name: model.state_dict()[own].numpy().copy() for own, name in reference_names(model).items()}


def test_published_weights_as_arrays_or_tensors_give_the_same_network():
    model = tiny(spot_px=224, region_px=448)
    arrays = published(model)
    for array in arrays.values():
        array.setflags(write=False)
    state = torch.random.get_rng_state()
    for weights in (arrays, {name: torch.tensor(array) for name, array in arrays.items()}):
        loaded = HiFusion.from_reference(weights, grids=(1, 2), heads=4).eval()
        assert loaded.config == HiFusionConfig(n_genes=5, grids=(1, 2), heads=4, width=4)
        torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws no random numbers"
    torch.testing.assert_close(loaded(pixels(1, 448)), model(pixels(1, 448)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ccf.key_proj.bias": None}, "missing: ccf.key_proj.bias"),
        ({"fc.weight": None}, "missing: fc.weight"),
        ({"extra": np.zeros(3)}, "unexpected: extra"),
        ({"fusion.weights": np.zeros(4)}, r"wrong shape: fusion.weights \(4,\), not \(2,\)"),
        ({"region_encoder.4.0.bn1.running_var": np.zeros(5)}, r"region_encoder.4.0.bn1.running_var \(5,\), not \(4,\)"),
        ({"spot_encoder.1.num_batches_tracked": None}, "missing: spot_encoder.1.num_batches_tracked"),
    ],
)
def test_published_weights_that_do_not_fit_are_named(change, message):
    weights = {name: value for name, value in (published(tiny()) | change).items() if value is not None}
    with pytest.raises(InputError, match=message) as error:
        HiFusion.from_reference(weights, grids=(1, 2), heads=4)
    assert "\n" not in str(error.value)


# Pixels


def test_uint8_regions_equal_centre_crop_standardised_by_hand():
    model, region = tiny(), pixels()

    def by_hand(images: np.ndarray) -> Tensor:
        flat = images.reshape(*images.shape[:2], -1)
        mean, std = flat.mean(-1)[..., None, None], flat.std(-1, ddof=1)[..., None, None]
        return torch.tensor((images - mean) / std, dtype=torch.float32)

    values = region.double().numpy()
    expected = model.forward_images(by_hand(values), by_hand(values[:, :, 16:48, 16:48]))
    torch.testing.assert_close(model(region), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0, 77, 255])
@pytest.mark.parametrize("side", [64, 333])
def test_flat_image_is_exactly_zero_once_standardised(value, side):
    assert not standardise(torch.full((1, 3, side, side), value, dtype=torch.uint8)).any()


def test_flat_region_gives_finite_expression_and_gradients():
    model = tiny().train()
    loss = hifusion_loss(model(torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)), torch.zeros(2, 5))["total"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and loss.isfinite()


@pytest.mark.parametrize("spot_px, region_px", [(32, 64), (31, 45), (32, 32)])
def test_flips_and_quarter_turns_commute_with_the_crop(spot_px, region_px, monkeypatch):
    model = tiny(spot_px=spot_px, region_px=region_px, grids=(1,))
    monkeypatch.setattr(model, "forward_images", lambda region, spot: (region, spot))
    region = pixels(side=region_px)
    for turns in range(4):
        for flip in ((), (-1,), (-2,)):
            seen = [torch.rot90(x, turns, (-2, -1)).flip(flip) for x in model(region)]
            turned = model(torch.rot90(region, turns, (-2, -1)).flip(flip))
            torch.testing.assert_close(list(turned), seen, rtol=1e-5, atol=1e-6)


@given(
    grid=st.integers(1, 5),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    channels_last=st.booleans(),
)
def test_tiles_lie_row_by_row_and_stitch_back_to_the_image(grid, shape, channels_last):
    b, c, h, w = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.arange(b * c * h * w * grid**2).reshape(b, c, h * grid, w * grid).contiguous(memory_format=layout)
    tiles = split_tiles(images, grid)
    for i in range(b):
        for row in range(grid):
            for column in range(grid):
                piece = images[i, :, row * h : (row + 1) * h, column * w : (column + 1) * w]
                assert torch.equal(tiles[(i * grid + row) * grid + column], piece)
    if h > 1:  # tiles one row high may be a view of the image, in neither layout
        assert tiles.is_contiguous(memory_format=layout)
    assert torch.equal(stitch_tiles(tiles, grid), images)


def test_channels_last_pixels_stay_channels_last_and_change_no_figure():
    model, region = tiny(), pixels()
    expected = model(region)
    region = region.contiguous(memory_format=torch.channels_last)
    assert standardise(region[:, :, 16:48, 16:48]).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(region), expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_keeps_pixels_and_expression_in_float32():
    model, region = tiny(n_genes=50).train(), pixels(8)
    with torch.no_grad():
        model.head.bias.fill_(-6.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert standardise(region).dtype == torch.float32
            out = model(region)
    assert {x.dtype for x in out} == {torch.float32}
    rounded = out.expression.bfloat16().float()
    assert (out.expression != rounded).float().mean() > 0.9, "expression was computed in bfloat16"


def test_tiles_are_seen_on_their_own():
    """A change in one of four tiles leaves the other three quarters of that level's map as they were."""
    model = tiny(spot_px=64, grids=(2,))
    region, spot = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)
    before = model.forward_images(region, spot).level_features
    spot[:, :, :32, 32:] += 1
    moved = (model.forward_images(region, spot).level_features != before).any(2)[0, 0]
    assert moved.tolist() == [[False, True], [False, False]]


# Configurations


@pytest.mark.parametrize(
    "changes",
    [
        {"grids": (1,)},
        {"grids": (1, 2, 4)},
        {"grids": (32, 1)},
        {"grids": [1, 7], "spot_px": 112, "region_px": 224, "width": 16, "heads": 8},
        {"grids": (1, 3, 5), "spot_px": 45, "region_px": 75},
        {"grids": (1, 2, 7), "spot_px": 224, "region_px": 224},
        {"grids": (1, 2, 4), "level_resize": "bilinear"},
        {"n_genes": 1},
        {"n_genes": 20_000},
        {"spot_encoder": "resnet10", "region_encoder": "resnet18"},
    ],
)
def test_any_grids_sizes_and_panels_train(changes):
    model = tiny(**changes).train()
    config = model.config
    out = model(pixels(2, config.region_px))
    levels, side = len(config.grids), config.grids[0] * math.ceil(config.spot_px / config.grids[0] / 32)
    assert out.expression.shape == (2, config.n_genes)
    assert out.level_expression.shape == (levels, 2, config.n_genes)
    assert out.level_features.shape == (levels, 2, config.channels, side, side)
    hifusion_loss(out, torch.ones(2, config.n_genes))["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("resize", ["max", "bilinear"])
def test_levels_are_resized_to_the_first_by_the_named_rule(resize):
    model = tiny(spot_px=64, grids=(1, 4), level_resize=resize)
    spot = torch.randn(1, 3, 64, 64)
    fine = model.spot_encoder(split_tiles(spot, 4)).reshape(4, 4, 32).permute(2, 0, 1)[None]
    expected = F.adaptive_max_pool2d(fine, 2) if resize == "max" else F.interpolate(fine, (2, 2), mode="bilinear")
    torch.testing.assert_close(model.forward_images(spot, spot).level_features[1], expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"grids": (1, 5)},
            r"grids: 5 does not divide spot_px=224; use one of 1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 112, 224",
        ),
        ({"grids": (0,)}, "grids: 0 does not divide"),
        ({"grids": (2.0,)}, "grids: 2.0 does not divide"),
        ({"grids": ()}, r"grids: \(\) is not a list of grids"),
        ({"grids": (1, 1)}, r"grids: \(1, 1\) is not a list of grids, each once"),
        ({"grids": 7}, "grids: 7 is not a list of grids"),
        ({"n_genes": 0}, "n_genes: 0 is not a whole number of at least 1"),
        ({"n_genes": 2.5}, "n_genes: 2.5 is not a whole number"),
        ({"region_px": 200}, "region_px: 200 cannot hold spot_px=224"),
        ({"region_px": 447}, "both even or both odd"),
        ({"heads": 7}, "heads: 7 does not divide 512 channels"),
        ({"dropout": 1.0}, r"dropout: 1.0 is outside \[0, 1\)"),
        ({"level_resize": "nearest"}, "level_resize: 'nearest' is unknown; use one of max, bilinear"),
        ({"spot_encoder": "resnet50"}, "spot_encoder: 'resnet50' is unknown; use one of resnet10, resnet18"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        HiFusionConfig(**({"n_genes": 250} | changes))


@pytest.mark.parametrize(
    "region, message",
    [
        (torch.zeros(2, 3, 64, 64), "region: dtype is torch.float32; give uint8"),
        (torch.zeros(2, 64, 64, 3, dtype=torch.uint8), r"region: shape is \(2, 64, 64, 3\); give \(B, 3, 64, 64\)"),
        (torch.zeros(3, 64, 64, dtype=torch.uint8), r"give \(B, 3, 64, 64\)"),
    ],
)
def test_regions_of_another_dtype_or_shape_are_refused(region, message):
    with pytest.raises(InputError, match=message):
        tiny()(region)


def test_image_pairs_that_do_not_fit_are_refused():
    model, region, spot = tiny(), torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match=r"spot: shape is \(2, 3, 64, 64\); give \(B, 3, 32, 32\)"):
        model.forward_images(region, region)
    with pytest.raises(InputError, match="spot: 1 patches for 2 regions"):
        model.forward_images(region, spot[:1])
    with pytest.raises(InputError, match="give floats"):
        model.forward_images(region.byte(), spot.byte())


# Loss and learning


def test_loss_terms_follow_the_paper_and_sum_to_the_total():
    features = torch.tensor([1.0, 4.0, -1.0]).view(3, 1, 1, 1, 1).expand(3, 2, 1, 1, 1)
    out = HiFusionOutput(
        torch.full((2, 4), 2.0), torch.arange(3.0).view(3, 1, 1).expand(3, 2, 4), features, torch.zeros(2, 8)
    )
    terms = {name: value.item() for name, value in hifusion_loss(out, torch.zeros(2, 4), align_weight=0.1).items()}
    # final 2^2; levels (0 + 1 + 4) / 3; align 0.1 x (|4 - 1| + |-1 - 1|)
    assert terms == pytest.approx({"total": 4 + 5 / 3 + 0.5, "final": 4, "levels": 5 / 3, "align": 0.5})


def test_loss_refuses_a_target_that_would_broadcast():
    out = tiny()(pixels())
    with pytest.raises(InputError, match=r"target: shape is \(2, 1\); give \(B, G\) = \(2, 5\)"):
        hifusion_loss(out, torch.zeros(2, 1))


def test_registered_model_overfits_eight_spots():
    config, module, step = MODELS["hifusion"]
    torch.manual_seed(0)
    model = module(config(n_genes=5, grids=(1, 2), spot_px=32, region_px=64, width=4, heads=4, dropout=0.0))
    region, target = pixels(8), torch.randn(8, 5)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        terms = step(model, Batch(region, target, {}, {}, None, torch.Generator()))
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
        history.append(terms["final"].item())
    assert history[-1] < 0.02 * history[0]


def test_a_network_started_at_a_profile_differs_from_it_only_by_what_its_features_add():
    model = tiny(n_genes=3)
    profile = torch.tensor([-6.0, 0.0, 2.5])
    model.start_at(profile)
    for head in (model.head, model.level_head):
        torch.nn.init.zeros_(head.weight)
    output = model(pixels())
    torch.testing.assert_close(output.expression, profile.expand(2, 3))
    torch.testing.assert_close(output.level_expression, profile.expand(2, 2, 3))


def test_narrow_networks_stay_out_of_the_layout_that_corrupts_memory():
    """Channels last only where every map has a multiple of 16 channels; the reason stands with the property."""
    assert HiFusionConfig(n_genes=1, width=8).memory_format == torch.contiguous_format
    assert HiFusionConfig(n_genes=1, width=48).memory_format == torch.channels_last
    seen = []
    model = tiny()  # width 4
    model.spot_encoder.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    model(pixels().contiguous(memory_format=torch.channels_last))
    assert seen == [True, True]
