"""HisToGene against the published network's figures, its symmetry over spots, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import classics
from hifusion.errors import InputError
from hifusion.models.histogene import (
    HisToGene,
    HisToGeneConfig,
    HisToGeneOutput,
    flat_patches,
    histogene_loss,
    reference_names,
)


def tiny(**changes: Any) -> HisToGene:
    """A network for 4 px patches and 5 genes, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    settings = {"n_genes": 5, "patch_px": 4, "width": 16, "layers": 2, "heads": 2, "positions": 10} | changes
    return HisToGene(HisToGeneConfig(**settings)).eval()


def section(spots: int = 6, side: int = 6) -> tuple[Tensor, Tensor]:
    """(region, position) of a fabricated section."""
    generator = torch.Generator().manual_seed(1)
    region = torch.randint(0, 256, (spots, 3, side, side), dtype=torch.uint8, generator=generator)
    return region, torch.randint(0, 10, (spots, 2), generator=generator)


# Golden figures


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """Expected figures, computed figures by dtype, and the fabricated section."""
    fabricate = classics.fabricator(golden_root)
    expected = classics.figures(golden_root, "histogene")
    seed, spots = int(expected["seed"]), int(expected["spots"])
    inputs, weights = fabricate.histogene_inputs(seed, spots), fabricate.state_dict("histogene", seed)
    computed = {dtype: figures(weights, inputs, dtype) for dtype in (torch.float64, torch.float32)}
    radius = math.isqrt(expected["section_patch"].shape[1] // 3) // 2
    cut = fabricate.section_inputs(seed, spots, radius=radius)
    return expected, computed, cut


def figures(weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Any]:
    """Everything the golden file holds of the network; its arrays have a leading axis of one section."""
    patch, position, target = (classics.tensors(inputs, dtype)[name][0] for name in ("patch", "position", "target"))
    # The training figures were taken with dropout 0; in evaluation it is off anyway.
    model = HisToGene.from_reference(classics.tensors(weights, dtype), dropout=0.0).eval()
    assert model.head.weight.dtype == dtype, "the weights' dtype is kept"
    with torch.no_grad():
        embedded = model.embed(patch, position)
        after_first, out = model.layers[0](embedded), model.forward_patches(patch, position=position)
    loss = histogene_loss(model.train().forward_patches(patch, position=position), target)["total"]
    loss.backward()
    return {
        "eval_embedded": embedded.numpy(),
        "eval_after_layer_1": after_first.numpy(),
        "eval_hidden": out.embedding.numpy(),
        "eval_prediction": out.expression.numpy(),
        "train_loss": loss.item(),
        "gradients": classics.gradient_norms(model, reference_names(model)),
    }


FIGURES = ("eval_embedded", "eval_after_layer_1", "eval_hidden", "eval_prediction", "train_loss")


@pytest.mark.parametrize("name", FIGURES)
def test_float64_agrees_with_the_published_network(golden, name):
    expected, computed, _ = golden
    np.testing.assert_allclose(computed[torch.float64][name], expected[name], rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", FIGURES)
def test_float32_agrees_with_the_published_network(golden, name):
    """Relative to the largest value: single entries near 0 lose digits to cancellation."""
    expected, computed, _ = golden
    scale = np.abs(expected[name]).max()
    np.testing.assert_allclose(computed[torch.float32][name], expected[name], rtol=0, atol=1e-4 * scale)


def test_every_gradient_norm_agrees_with_the_published_network(golden):
    expected, computed, _ = golden
    assert not classics.gradient_differences(computed[torch.float64]["gradients"], expected)


def test_patches_are_flattened_as_the_published_data_set_does(golden):
    expected, _, cut = golden
    image = torch.tensor(cut["image"]).permute(2, 0, 1)
    radius = math.isqrt(expected["section_patch"].shape[1] // 3) // 2
    patch = torch.stack([image[:, y - radius : y + radius, x - radius : x + radius] for x, y in cut["center"]])
    assert np.array_equal(flat_patches(patch), expected["section_patch"])
    assert np.array_equal(cut["position"], expected["section_position"])


def test_network_of_the_paper_has_the_published_names_shapes_and_size(golden_root):
    """At the reduced golden widths every name and shape; at the paper's the number of parameters."""
    expected = json.loads((golden_root / "histogene_reference_shapes.json").read_text())
    zeros = {name: torch.zeros(shape) for name, shape in expected.items()}
    model = HisToGene.from_reference(zeros)
    names = reference_names(model)
    assert {names[own]: list(value.shape) for own, value in model.state_dict().items()} == expected
    with torch.device("meta"):
        paper = HisToGene(HisToGeneConfig(n_genes=785))
    assert len(paper.state_dict()) == 96 and sum(p.numel() for p in paper.parameters()) == 106_648_337


# A section


def test_another_order_of_spots_gives_the_same_predictions_in_that_order():
    model, (region, position) = tiny(), section()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    before, after = (
        model(region, position=position).expression,
        model(region[order], position=position[order]).expression,
    )
    torch.testing.assert_close(after, before[order])
    assert not torch.allclose(before[0], before[1])


def test_a_prediction_depends_on_the_other_spots():
    model, (region, position) = tiny(), section()
    whole, part = model(region, position=position), model(region[:3], position=position[:3])
    assert not torch.allclose(whole.expression[:3], part.expression)


def test_one_spot_is_a_section_in_evaluation_and_training():
    model, (region, position) = tiny().train(), section(1)
    out = model(region, position=position)
    assert out.expression.shape == (1, 5)
    histogene_loss(out, torch.zeros(1, 5))["total"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_column_0_of_the_position_feeds_the_x_table():
    model, (region, position) = tiny(), section()
    with torch.no_grad():
        model.x_embedding.weight.zero_()
    moved = position.clone()
    moved[:, 0] = (moved[:, 0] + 1) % 10
    torch.testing.assert_close(model(region, position=moved), model(region, position=position), rtol=0, atol=0)
    assert not torch.allclose(
        model(region, position=moved.flip(1)).expression, model(region, position=moved).expression
    )


def test_attention_is_softmax_of_scaled_products_head_by_head():
    attention = tiny().layers[0].attention
    tokens = torch.randn(6, 16)
    q, k, v = attention.qkv(attention.norm(tokens)).detach().split(2 * 64, dim=1)
    heads = []
    for head in (slice(0, 64), slice(64, 128)):
        scores = (q[:, head] @ k[:, head].T) / 8  # the root of 64
        heads.append(scores.softmax(1) @ v[:, head])
    torch.testing.assert_close(attention(tokens), attention.out(torch.cat(heads, 1)))


def test_a_single_head_of_the_networks_width_has_no_output_projection():
    names = reference_names(tiny(width=64, heads=1)).values()
    assert not any("to_out" in name for name in names)
    assert any("to_out" in name for name in reference_names(tiny(width=64, heads=2)).values())


# Pixels and inputs


@pytest.mark.parametrize("pixels, scale", [("raw", 1), ("unit", 255)])
def test_region_equals_centre_patch_flattened_by_hand(pixels, scale):
    model, (region, position) = tiny(pixels=pixels), section(side=8)
    by_hand = [
        [float(region[i, c, y, x]) / scale for x in range(2, 6) for y in range(2, 6) for c in range(3)]
        for i in range(len(region))
    ]
    expected = model.forward_patches(torch.tensor(by_hand), position=position)
    torch.testing.assert_close(model(region, position=position), expected)


@pytest.mark.parametrize(
    "position, message",
    [
        (torch.tensor([[0, 10]] * 6), "position: 10 is outside 0 to 9; shift them, or set positions higher"),
        (torch.tensor([[-1, 0]] * 6), "position: -1 is outside 0 to 9"),
        (torch.zeros(6, 2), "position: dtype is torch.float32; give whole numbers"),
        (torch.zeros(5, 2, dtype=torch.long), r"position: shape is \(5, 2\); give \(6, 2\)"),
    ],
)
def test_positions_that_the_tables_do_not_hold_are_refused(position, message):
    with pytest.raises(InputError, match=message):
        tiny()(section()[0], position=position)


def test_regions_and_patches_that_do_not_fit_are_refused():
    model, (region, position) = tiny(), section()
    with pytest.raises(InputError, match="give uint8"):
        model(region.float(), position=position)
    with pytest.raises(InputError, match="R at least 4 and even"):
        model(region[:, :, :5, :5], position=position)
    with pytest.raises(InputError, match=r"patch: shape is \(6, 47\); give \(N, 48\)"):
        model.forward_patches(torch.zeros(6, 47), position=position)
    with pytest.raises(InputError, match="patch: dtype is torch.uint8; give floats"):
        model.forward_patches(torch.zeros(6, 48, dtype=torch.uint8), position=position)
    with pytest.raises(InputError, match="holds no spot"):
        model(region[:0], position=position[:0])


def test_bfloat16_autocast_keeps_expression_in_float32():
    model, (region, position) = tiny(n_genes=50), section()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(region, position=position)
    assert out.expression.dtype == torch.float32
    assert (out.expression != out.expression.bfloat16().float()).float().mean() > 0.9


# Configuration, weights, loss


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": 0}, "layers: 0 is not a whole number of at least 1"),
        ({"width": 2.5}, "width: 2.5 is not a whole number"),
        ({"dropout": 1.0}, r"dropout: 1.0 is outside \[0, 1\)"),
        ({"pixels": "z"}, "pixels: 'z' is unknown; use one of raw, unit"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        HisToGeneConfig(**({"n_genes": 785} | changes))


def published(model: HisToGene) -> dict[str, np.ndarray]:
    state = model.state_dict()
    return {name: state[own].numpy().copy() for own, name in reference_names(model).items()}


def test_a_lightning_checkpoint_gives_the_same_network_and_draws_no_random_numbers():
    model, state = tiny(), torch.random.get_rng_state()
    loaded = HisToGene.from_reference({"state_dict": {f"model.{n}": v for n, v in published(model).items()}}).eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.config == model.config
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_embed.weight": None}, "missing: x_embed.weight"),
        ({"extra": np.zeros(3)}, "unexpected: extra"),
        ({"y_embed.weight": np.zeros((9, 16))}, r"wrong shape: y_embed.weight \(9, 16\), not \(10, 16\)"),
    ],
)
def test_published_weights_that_do_not_fit_are_named(change, message):
    weights = {name: value for name, value in (published(tiny()) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        HisToGene.from_reference(weights)


def test_loss_is_the_mean_squared_error_and_refuses_a_target_that_would_broadcast():
    out = HisToGeneOutput(torch.tensor([[1.0, 3.0], [0.0, 2.0]]), torch.zeros(2, 8))
    assert histogene_loss(out, torch.zeros(2, 2))["total"].item() == pytest.approx((1 + 9 + 0 + 4) / 4)
    with pytest.raises(InputError, match=r"target: shape is \(2, 1\); give \(2, 2\)"):
        histogene_loss(out, torch.zeros(2, 1))


def test_a_network_started_at_a_profile_has_it_as_its_bias():
    model, (region, position), profile = tiny(n_genes=3), section(), torch.tensor([-6.0, 0.0, 2.5])
    model.start_at(profile)
    torch.nn.init.zeros_(model.head.weight)
    torch.testing.assert_close(model(region, position=position).expression, profile.expand(6, 3))


def test_it_learns_a_section_by_heart():
    model, (region, position), target = tiny(pixels="unit", dropout=0.0).train(), section(), torch.randn(6, 5)
    left = classics.share_left(model, lambda: histogene_loss(model(region, position=position), target)["total"])
    assert left < 0.05
