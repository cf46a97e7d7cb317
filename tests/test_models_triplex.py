"""TRIPLEX against the published network's figures, its three views, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peers
from hifusion.errors import InputError
from hifusion.models.triplex import Triplex, TriplexConfig, TriplexOutput, reference_names, triplex_loss
from hifusion.models.triplex_grid import grid_cells

SMALL = {
    "n_genes": 5,
    "feature_dim": 16,
    "patch_px": 32,
    "width": 4,
    "section_depth": 2,
    "neighbour_depth": 1,
    "section_heads": 4,
    "neighbour_heads": 2,
    "section_mlp": 1,
    "clamp": False,
}


def small(**changes: Any) -> Triplex:
    """A network of a few thousand weights, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    return Triplex(TriplexConfig(**(SMALL | changes))).eval()


def inputs(spots: int = 4, sections: tuple[int, ...] = (6, 3)) -> dict[str, Tensor]:
    """A batch of spots dealt over sections of the given sizes, for the network of `small`."""
    generator = torch.Generator().manual_seed(1)
    total = sum(sections)
    return {
        "region": torch.randint(0, 256, (spots, 3, 40, 40), dtype=torch.uint8, generator=generator),
        "neighbour_features": torch.randn(spots, 25, 16, generator=generator),
        "neighbour_mask": torch.rand(spots, 25, generator=generator) < 0.7,
        "section_features": torch.randn(total, 16, generator=generator),
        "section_cells": torch.randint(0, 4, (total, 2), generator=generator),
        "section_number": torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(sections)),
        "section_row": torch.randint(0, total, (spots,), generator=generator),
    }


# Golden figures


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> dict[str, Any]:
    """Expected figures, inputs, weights, and the authors' configuration as far as the weights do not say it."""
    fabricate = peers.fabricator(golden_root, "fabricate_peers")
    expected = peers.figures(golden_root, "triplex")
    shapes = fabricate.shapes("triplex_reference")
    seed = peers.seed_of(expected, fabricate)
    batch = peers.tensors(fabricate.triplex_batch(seed, *reversed(shapes["fc.weight"])))
    sizes = [len(batch[f"global_{k}"]) for k in (0, 1)]
    batch["features"] = torch.cat([batch["global_0"], batch["global_1"]])
    batch["number"] = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))
    batch["row"] = batch["sid"] + torch.tensor([0, sizes[0]])[batch["pid"]]
    return {
        "expected": expected,
        "batch": batch,
        "shapes": shapes,
        "weights": fabricate.state_dict(shapes, seed, 1.0),
        "sizes": sizes,
    }


def loaded(golden: dict[str, Any], dtype: torch.dtype) -> Triplex:
    """The authors' HER2+ network without dropout, as the figures were taken."""
    genes, dim = golden["shapes"]["fc.weight"]
    side = golden["batch"]["image"].shape[-1]
    config = TriplexConfig(genes, dim, side, fusion_dropout=0.0, section_dropout=0.0, neighbour_dropout=0.0)
    model = Triplex.from_reference(peers.tensors(golden["weights"], dtype), config)
    return model.to(memory_format=model.config.memory_format).eval()


def passed(model: Triplex, batch: dict[str, Tensor]) -> tuple[Tensor, TriplexOutput]:
    """Tokens of all spots of both slides, and the output for the batch."""
    cells = torch.cat([grid_cells(batch[f"position_{k}"], model.config.grid) for k in (0, 1)])
    tokens = model.encode_sections(batch["features"], cells, batch["number"])
    output = model.forward_images(
        batch["image"],
        neighbour_features=batch["neighbor"],
        neighbour_mask=batch["mask"],
        section_token=tokens[batch["row"]],
    )
    return tokens, output


@pytest.fixture(scope="module")
def computed(golden) -> dict[str, Any]:
    """What this package computes in float64, under the names of the golden file."""
    model, batch = loaded(golden, torch.float64), golden["batch"]
    with torch.no_grad():
        tokens, out = passed(model, batch)
        patch = model.patch_proj(model.patch_encoder(batch["image"]).flatten(2).transpose(1, 2))
        neighbour = model.neighbour_encoder(batch["neighbor"], batch["mask"].bool())
        figures = {
            "eval_prediction": out.expression,
            "eval_raw": model.head(out.embedding),
            "eval_fusion_token": out.embedding,
            "eval_global_token": tokens[batch["row"]],
            "eval_target_token_mean": patch.mean(1),
            "eval_target_token_first": patch[:, :, :4],
            "eval_neighbor_token_mean": neighbour.mean(1),
            "eval_neighbor_token_first": neighbour[:, :, :4],
            "eval_slide0_tokens_first": tokens[: golden["sizes"][0], :8],
            "eval_aux": torch.stack([out.patch_expression, out.neighbour_expression, out.section_expression]),
            "eval_loss": triplex_loss(out, batch["label"])["total"],
        }
    _, trained = passed(model.train(), batch)
    loss = triplex_loss(trained, batch["label"])["total"]
    loss.backward()
    gradients = peers.gradient_norms(model, reference_names(model))
    return figures | {"train_prediction": trained.expression, "train_loss": loss, "gradients": gradients}


FIGURES = (
    "eval_prediction",
    "eval_raw",
    "eval_fusion_token",
    "eval_global_token",
    "eval_target_token_mean",
    "eval_target_token_first",
    "eval_neighbor_token_mean",
    "eval_neighbor_token_first",
    "eval_slide0_tokens_first",
    "eval_aux",
    "eval_loss",
    "train_prediction",
    "train_loss",
)


@pytest.mark.parametrize("name", FIGURES)
def test_float64_agrees_with_the_published_network(golden, computed, name):
    peers.assert_same(computed[name], golden["expected"][name])


def test_every_gradient_norm_agrees_with_the_published_network(golden, computed):
    expected = golden["expected"]
    peers.assert_same_gradients(computed["gradients"], expected["grad_names"], expected["grad_norms"])


def test_every_golden_figure_is_compared(golden):
    assert set(golden["expected"]) - {"seed"} == {*FIGURES, "grad_names", "grad_norms", "eval_grid"}


def test_float32_agrees_with_the_published_network(golden):
    model = loaded(golden, torch.float32)
    assert model.head.weight.dtype == torch.float32, "the weights' dtype is kept"
    with torch.no_grad():
        _, out = passed(model, {name: x.float() if x.is_floating_point() else x for name, x in golden["batch"].items()})
    peers.assert_close(out.expression, golden["expected"]["eval_prediction"], 1e-4)
    peers.assert_close(out.embedding, golden["expected"]["eval_fusion_token"], 1e-4)


def test_default_network_has_the_published_names_and_shapes(golden):
    with torch.device("meta"):
        model = Triplex(TriplexConfig(golden["shapes"]["fc.weight"][0]))
    names = reference_names(model)
    assert {names[name]: list(value.shape) for name, value in model.state_dict().items()} == golden["shapes"]


@pytest.mark.parametrize(
    "changes, parameters",
    [
        ({}, 29_294_296),
        (
            {"fusion_depth": 2, "section_depth": 2, "neighbour_depth": 4, "fusion_heads": 8, "section_mlp": 1},
            27_722_344,
        ),
        (
            {
                "fusion_depth": 3,
                "section_depth": 3,
                "neighbour_depth": 4,
                "fusion_heads": 16,
                "section_heads": 8,
                "neighbour_heads": 8,
                "section_mlp": 2,
                "neighbour_mlp": 4,
            },
            40_320_840,
        ),
        (
            {
                "n_genes": 300,
                "feature_dim": 1024,
                "section_depth": 2,
                "neighbour_depth": 2,
                "fusion_heads": 8,
                "fusion_mlp": 2,
                "section_mlp": 2,
                "neighbour_mlp": 2,
            },
            54_933_008,
        ),
    ],
    ids=["andersson", "andrew", "bryan", "GSE240429"],
)
def test_the_authors_configurations_have_the_published_number_of_parameters(changes, parameters):
    with torch.device("meta"):
        model = Triplex(TriplexConfig(**({"n_genes": 250} | changes)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.patch_encoder.parameters()) == 11_176_512


# Published weights


def published(model: Triplex) -> dict[str, Any]:
    return {name: model.state_dict()[own] for own, name in reference_names(model).items()}


def test_published_weights_come_back_bare_or_as_a_training_checkpoint_keeps_them():
    model = small()
    weights = published(model)
    state = torch.random.get_rng_state()
    for given in (weights, {"state_dict": {f"model.{name}": value for name, value in weights.items()}, "epoch": 3}):
        loaded = Triplex.from_reference(given, model.config)
        torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws no random numbers"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fc.weight": None}, "missing: fc.weight"),
        ({"global_encoder.pos_layer.proj.bias": None}, "missing: global_encoder.pos_layer.proj.bias"),
        ({"extra": np.zeros(3)}, "unexpected: extra"),
        ({"fc_global.bias": np.zeros(4)}, r"wrong shape: fc_global.bias \(4,\), not \(5,\)"),
    ],
)
def test_published_weights_that_do_not_fit_are_named(change, message):
    weights = {name: value for name, value in (published(small()) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Triplex.from_reference(weights, small().config)


# Pixels and views


def test_uint8_regions_equal_the_centre_scaled_by_hand():
    model, given = small(), inputs()
    pixels = given["region"][:, :, 4:36, 4:36].double().numpy() / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    patch = torch.tensor((pixels - mean[:, None, None]) / std[:, None, None], dtype=torch.float32)
    tokens = model.encode_sections(given["section_features"], given["section_cells"], given["section_number"])
    by_hand = model.forward_images(
        patch,
        neighbour_features=given["neighbour_features"],
        neighbour_mask=given["neighbour_mask"],
        section_token=tokens[given["section_row"]],
    )
    torch.testing.assert_close(model(**given), by_hand, rtol=1e-4, atol=1e-5)


def test_needs_are_the_keywords_of_forward():
    assert set(inputs()) - {"region"} == set(Triplex.needs)


def test_predictions_follow_a_reordering_of_the_batch():
    model, given, order = small(), inputs(), torch.tensor([2, 0, 3, 1])
    spots = ("region", "neighbour_features", "neighbour_mask", "section_row")
    turned = model(**(given | {name: given[name][order] for name in spots}))
    torch.testing.assert_close(list(turned), [x[order] for x in model(**given)])


def test_predictions_do_not_depend_on_the_order_of_a_sections_spots():
    """Sections may even be mixed row by row."""
    model, given = small(), inputs()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    changed = {name: given[name][order] for name in ("section_features", "section_cells", "section_number")}
    turned = model(**(given | changed | {"section_row": order.argsort()[given["section_row"]]}))
    torch.testing.assert_close(turned, model(**given))


def test_a_section_is_predicted_alike_alone_and_beside_another():
    model, given = small(), inputs(sections=(6, 3)) | {"section_row": torch.tensor([0, 2, 5, 5])}
    alone = {name: given[name][:6] for name in ("section_features", "section_cells", "section_number")}
    torch.testing.assert_close(model(**(given | alone)), model(**given))


def test_a_section_of_one_spot_has_a_finite_prediction():
    given = inputs(spots=1, sections=(1,))
    assert all(x.isfinite().all() for x in small()(**given))


def test_a_window_wholly_off_the_slide_has_finite_predictions_and_gradients():
    model = small().train()
    out = model(**(inputs() | {"neighbour_mask": torch.zeros(4, 25)}))
    triplex_loss(out, torch.zeros(4, 5))["total"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_spots_of_one_cell_share_their_section_token():
    model, given = small(), inputs(sections=(6,))
    cells = given["section_cells"].clone()
    cells[4] = cells[1]
    tokens = model.encode_sections(given["section_features"], cells, given["section_number"])
    torch.testing.assert_close(tokens[4], tokens[1])
    assert not torch.allclose(tokens[2], tokens[1])


def test_tiles_off_the_slide_do_not_move_the_prediction():
    model, given = small(), inputs()
    with torch.no_grad():  # the relative bias starts at zero, where a mistake in its place would not show
        model.neighbour_encoder.blocks[0].attention.bias.normal_()
    outside = ~given["neighbour_mask"][:, :, None]
    features = torch.where(outside, 7.0, given["neighbour_features"])
    moved = model(**(given | {"neighbour_features": features}))
    torch.testing.assert_close(moved.expression, model(**given).expression)
    inside = torch.where(outside, given["neighbour_features"], 7.0)
    assert not torch.allclose(moved.expression, model(**(given | {"neighbour_features": inside})).expression)


def test_dropout_acts_in_training_only():
    model, given = small(section_dropout=0.5, fusion_dropout=0.0, neighbour_dropout=0.0), inputs()
    sections = [given[name] for name in ("section_features", "section_cells", "section_number")]
    assert torch.equal(model.encode_sections(*sections), model.encode_sections(*sections))
    model.train()
    assert not torch.equal(model.encode_sections(*sections), model.encode_sections(*sections))


def test_clamp_cuts_all_four_predictions_at_zero_and_nothing_else():
    given = inputs()
    free, cut = small()(**given), small(clamp=True)(**given)
    for mine, theirs in zip(cut[:4], free[:4], strict=True):
        assert (theirs < 0).any()
        torch.testing.assert_close(mine, theirs.clamp(min=0))
    torch.testing.assert_close(cut.embedding, free.embedding)


def test_a_network_started_at_a_profile_differs_from_it_only_by_what_its_features_add():
    model, profile = small(), torch.tensor([-6.0, 0.0, 2.5, 1.0, -1.0])
    model.start_at(profile)
    for head in (model.head, model.patch_head, model.neighbour_head, model.section_head):
        torch.nn.init.zeros_(head.weight)
    torch.testing.assert_close(list(model(**inputs())[:4]), [profile.expand(4, 5)] * 4)


def test_bfloat16_autocast_keeps_expression_in_float32():
    model = small().train()
    with torch.no_grad():
        model.head.bias.fill_(-6.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs())
    assert {x.dtype for x in out} == {torch.float32}
    assert (out.expression != out.expression.bfloat16().float()).float().mean() > 0.9


# Loss, learning, configuration


def test_loss_terms_follow_the_paper_and_sum_to_the_total():
    values = (2.0, 1.0, 0.0, -1.0)
    out = TriplexOutput(*(torch.full((2, 3), value) for value in values), torch.zeros(2, 8))
    terms = {name: value.item() for name, value in triplex_loss(out, torch.zeros(2, 3), 0.25).items()}
    # fused 2^2; views 0.75 x (1 + 0 + 1); distil 0.25 x (1 + 4 + 9)
    assert terms == pytest.approx({"total": 4 + 1.5 + 3.5, "fused": 4, "views": 1.5, "distil": 3.5})


def test_loss_refuses_a_target_that_would_broadcast():
    with pytest.raises(InputError, match=r"target: shape is \(4, 1\); give \(4, 5\)"):
        triplex_loss(small()(**inputs()), torch.zeros(4, 1))


def test_it_overfits_eight_spots():
    model = small(fusion_dropout=0.0, section_dropout=0.0, neighbour_dropout=0.0).train()
    given, target = inputs(spots=8), torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        terms = triplex_loss(model(**given), target)
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
        history.append(terms["fused"].item())
    assert history[-1] < 0.02 * history[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_genes": 0}, "n_genes: 0 is not a whole number of at least 1"),
        ({"fusion_heads": 7}, "fusion_heads: 7 heads for feature_dim=512; use a divisor of it above 1"),
        ({"section_heads": 1}, "section_heads: 1 heads for"),
        ({"neighbour_dropout": 1.0}, r"dropout: 1.0 is outside \[0, 1\)"),
        ({"grid": "hexagonal"}, "grid: 'hexagonal' is unknown; use one of published, pitch, array"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        TriplexConfig(**({"n_genes": 250} | changes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"region": torch.zeros(4, 3, 40, 40)}, "region: dtype is torch.float32; give uint8"),
        (
            {"neighbour_features": torch.zeros(4, 9, 16)},
            r"neighbour_features: shape is \(4, 9, 16\); give \(4, 25, 16\)",
        ),
        ({"neighbour_mask": torch.zeros(4, 5, 5)}, r"neighbour_mask: shape is \(4, 5, 5\); give \(4, 25\)"),
        ({"section_features": torch.zeros(9, 32)}, r"section_features: shape is \(9, 32\); give \(N, 16\)"),
        ({"section_row": torch.zeros(3, dtype=torch.int64)}, r"section_token: shape is \(3, 16\); give \(4, 16\)"),
    ],
)
def test_inputs_of_another_dtype_or_shape_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        small()(**(inputs() | change))
