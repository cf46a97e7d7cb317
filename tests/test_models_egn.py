"""EGN against the published network's figures, what its exemplars do, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import classics
from hifusion.errors import InputError
from hifusion.models.egn import EGN, EGNConfig, EGNOutput, batch_correlation, egn_loss, reference_names
from hifusion.models.egn_layers import flat_tokens


def tiny(**changes: Any) -> EGN:
    """A network of width 8 for 8 px tiles of 4 tokens and 5 genes, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    settings = {"n_genes": 5, "patch_px": 8, "token_px": 4, "width": 8, "layers": 4, "heads": 2, "mlp_width": 16}
    settings |= {"bridge_heads": 2, "bridge_head_width": 4, "feature_width": 6, "projector_layers": 1} | changes
    return EGN(EGNConfig(**settings)).eval()


def batch(size: int = 4, exemplars: int = 3, side: int = 10) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "region": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator),
        "feature": torch.randn(size, 6, generator=generator),
        "exemplar_feature": torch.randn(size, exemplars, 6, generator=generator),
        "exemplar_target": torch.rand(size, exemplars, 5, generator=generator),
    }


# Golden figures


@pytest.fixture(scope="module")
def golden(golden_root: Path) -> tuple[dict[str, Any], dict[torch.dtype, dict[str, Any]]]:
    """Expected figures, and computed figures by dtype."""
    fabricate, expected = classics.fabricator(golden_root), classics.figures(golden_root, "egn")
    seed = int(expected["seed"])
    inputs, weights = fabricate.egn_inputs(seed), fabricate.state_dict("egn", seed)
    # The file's bridge figures are those of its first bridge.
    bridge = fabricate.CONFIGS["egn"]["bridge_every"] - 1
    return expected, {dtype: figures(weights, inputs, bridge, dtype) for dtype in (torch.float64, torch.float32)}


def figures(
    weights: dict[str, np.ndarray], inputs: dict[str, np.ndarray], bridge: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything the golden file holds of the network, computed by this package in the given dtype."""
    given = classics.tensors(inputs, dtype)
    tile, exemplars = given["image"], {"feature": given["feature"].squeeze(1)}
    exemplars |= {name: given[name] for name in ("exemplar_feature", "exemplar_target")}
    model = EGN.from_reference(classics.tensors(weights, dtype)).eval()
    assert model.head.weight.dtype == model.pixel_mean.dtype == dtype, "the weights' dtype is kept"
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, given, result, name=name: seen.update({name: result}))
    with torch.no_grad():
        tokens, out = model.embed(tile), model.forward_tile(tile, **exemplars)
        query, key, value = seen["projector"]
        bridge_tokens, bridge_query, bridge_key = seen[f"layers.{bridge}.bridge"]
        pooled = model.pool(seen[f"layers.{len(model.layers) - 1}"][0])
    loss = egn_loss(model.train().forward_tile(tile, **exemplars), given["target"])
    loss["total"].backward()
    return {
        "eval_query": query.numpy(),
        "eval_key": key.numpy(),
        "eval_value": value.numpy(),
        "eval_tokens": tokens[:1].numpy(),
        "eval_bridge_tokens": bridge_tokens[:1].numpy(),
        "eval_bridge_query": bridge_query.numpy(),
        "eval_bridge_key": bridge_key.numpy(),
        "eval_pooled": pooled.numpy(),
        "eval_feature": out.embedding.numpy(),
        "eval_prediction": out.expression.numpy(),
        "train_loss": loss["total"].item(),
        "train_mse": loss["mse"].item(),
        "train_correlation": loss["correlation"].item(),
        "gradients": classics.gradient_norms(model, reference_names(model)),
    }


FIGURES = ("eval_query", "eval_key", "eval_value", "eval_tokens", "eval_bridge_tokens", "eval_bridge_query")
FIGURES += ("eval_bridge_key", "eval_pooled", "eval_feature", "eval_prediction")
FIGURES += ("train_loss", "train_mse", "train_correlation")


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


def test_every_gradient_norm_agrees_with_the_published_network(golden):
    """Those the file marks as reached by no gradient are the parameters that do not exist here."""
    expected, computed = golden
    assert not classics.gradient_differences(computed[torch.float64]["gradients"], expected)


def is_unread(name: str, last: int) -> bool:
    """Whether nothing reads a published parameter, given the last layer with a bridge."""
    return ".1.to_out." in name or f"layers.{last}.1.update.norm." in name


def test_network_of_the_paper_has_the_published_names_shapes_and_size(golden_root):
    """At the reduced golden widths every name and shape that is read; at the paper's the number of parameters."""
    expected = json.loads((golden_root / "egn_reference_shapes.json").read_text())
    model = EGN.from_reference({name: torch.zeros(shape) for name, shape in expected.items()})
    names = reference_names(model)
    last = max(i for i, layer in enumerate(model.layers) if layer.bridge is not None)
    read = {name: shape for name, shape in expected.items() if not is_unread(name, last)}
    one, positions, width = read["pos_embedding"]
    read["pos_embedding"] = [one, positions - 1, width]
    assert {names[own]: list(p.shape) for own, p in model.named_parameters()} == read
    with torch.device("meta"):
        paper = EGN(EGNConfig(n_genes=250))
    unread = 4 * (512 * 1024 + 1024) + 2 * 1024 + 1024  # four to_out with bias, one layer norm, one position
    assert sum(p.numel() for p in paper.parameters()) == 133_356_794 - unread
    assert len(list(paper.parameters())) == 195 - (4 * 2 + 2)


# Exemplars and tokens


def test_the_order_of_exemplars_does_not_matter():
    model, given = tiny(), batch()
    turned = given | {name: given[name].flip(1) for name in ("exemplar_feature", "exemplar_target")}
    torch.testing.assert_close(model(**turned).expression, model(**given).expression)


def test_a_tile_is_predicted_alone_whatever_else_is_in_the_batch():
    model, given = tiny(), batch()
    alone = model(**{name: value[1:2] for name, value in given.items()})
    torch.testing.assert_close(model(**given).expression[1:2], alone.expression)


@pytest.mark.parametrize("name", ["region", "feature", "exemplar_feature", "exemplar_target"])
def test_every_input_reaches_the_prediction(name):
    model, given = tiny(), batch()
    changed = given | {name: given[name].flip(0)}
    assert not torch.allclose(model(**changed).expression, model(**given).expression)


def test_one_tile_with_one_exemplar_is_enough():
    model = tiny().train()
    out = model(**batch(1, exemplars=1))
    egn_loss(out, torch.zeros(1, 5))["total"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_tokens_go_row_by_row_with_channel_fastest():
    tile = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    tokens = flat_tokens(tile, 2)
    for b, row, column in ((0, 0, 2), (1, 2, 1)):
        piece = tile[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[b, 3 * row + column], piece.permute(1, 2, 0).flatten())


# Pixels and inputs


def test_region_equals_centre_crop_scaled_by_hand():
    model, given = tiny(), batch()
    model.set_pixel_statistics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.4, 0.3]))
    mean, std = (statistic[:, None, None] for statistic in (model.pixel_mean, model.pixel_std))
    tile = (given["region"][:, :, 1:9, 1:9].float() / 255 - mean) / std
    exemplars = {name: value for name, value in given.items() if name != "region"}
    torch.testing.assert_close(model.forward_tile(tile, **exemplars), model(**given))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"region": torch.zeros(4, 3, 10, 10)}, "region: dtype is torch.float32; give uint8"),
        ({"region": torch.zeros(4, 3, 9, 9, dtype=torch.uint8)}, "with R at least 8 and even"),
        ({"feature": torch.zeros(4, 1, 6)}, r"feature: shape is \(4, 1, 6\); give \(4, 6\)"),
        ({"exemplar_feature": torch.zeros(4, 3, 7)}, r"exemplar_feature: shape is \(4, 3, 7\); give \(4, K, 6\)"),
        ({"exemplar_target": torch.zeros(4, 2, 5)}, r"exemplar_target: shape is \(4, 2, 5\); give \(4, 3, 5\)"),
        (
            {"exemplar_feature": torch.zeros(4, 0, 6), "exemplar_target": torch.zeros(4, 0, 5)},
            "exemplar_feature: it holds no exemplar",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        tiny()(**(batch() | change))


def test_bfloat16_autocast_keeps_expression_in_float32():
    model = tiny()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**batch())
    assert {x.dtype for x in out} == {torch.float32}
    assert (out.expression != out.expression.bfloat16().float()).float().mean() > 0.9


# Configuration, weights


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 0}, "width: 0 is not a whole number of at least 1"),
        ({"token_px": 30}, "token_px: 30 does not divide patch_px=256; use a divisor"),
        ({"bridge_every": 9}, "bridge_every: 9 is above layers=8; use at most that"),
        ({"dropout": 2}, r"dropout: 2 is outside \[0, 1\)"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        EGNConfig(**({"n_genes": 250} | changes))


def published(model: EGN) -> dict[str, np.ndarray]:
    """A published state dict of the network, with a position that nothing reads."""
    state = model.state_dict()
    weights = {
        name: state[own].numpy().copy() for own, name in reference_names(model).items() if not own.startswith("pixel_")
    }
    return weights | {"pos_embedding": np.pad(weights["pos_embedding"], ((0, 0), (0, 1), (0, 0)))}


@pytest.mark.parametrize("changes", [{}, {"bridge_every": 3}, {"bridge_every": 1, "layers": 2, "bridge_heads": 3}])
def test_a_checkpoint_gives_the_same_network_and_draws_no_random_numbers(changes):
    model = tiny(**changes)
    state = torch.random.get_rng_state()
    loaded = EGN.from_reference({"model": {f"module.{n}": v for n, v in published(model).items()}}).eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.config == model.config
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_parameters_that_nothing_reads_are_ignored_in_published_weights():
    unread = {f"transformer.layers.{layer}.1.to_out.weight": np.ones((8, 8)) for layer in (1, 3)}
    unread |= {"transformer.layers.3.1.update.norm.bias": np.ones(8)}
    loaded = EGN.from_reference(published(tiny()) | unread).eval()
    torch.testing.assert_close(loaded(**batch()), tiny()(**batch()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mlp_head.1.weight": None}, "missing: mlp_head.1.weight"),
        ({"transformer.layers.1.1.update.norm.bias": None}, "missing: transformer.layers.1.1.update.norm.bias"),
        ({"extra": np.zeros(3)}, "unexpected: extra"),
        ({"transformer.pool.head.bias": np.zeros(3)}, r"wrong shape: transformer.pool.head.bias \(3,\), not \(8,\)"),
    ],
)
def test_published_weights_that_do_not_fit_are_named(change, message):
    weights = {name: value for name, value in (published(tiny()) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        EGN.from_reference(weights)


# Loss and learning


def test_loss_adds_the_weighted_correlation_term():
    # Gene 0 follows its target exactly, gene 1 runs against it: mean r is 0.
    expression, target = (
        torch.tensor([[0.0, 3.0], [1.0, 2.0], [2.0, 1.0]]),
        torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]),
    )
    out = EGNOutput(expression, torch.zeros(3, 4))
    terms = {name: value.item() for name, value in egn_loss(out, target, correlation_weight=1.0).items()}
    assert terms == pytest.approx({"total": 8 / 6 + 1, "mse": 8 / 6, "correlation": 1.0})
    assert egn_loss(out, target)["total"].item() == pytest.approx(8 / 6 + 0.5)  # the released weight
    with pytest.raises(InputError, match=r"target: shape is \(3, 1\); give \(3, 2\)"):
        egn_loss(out, target[:, :1])


@pytest.mark.parametrize("constant", ["predicted", "target"])
def test_a_gene_that_does_not_vary_correlates_by_0_with_zero_gradient(constant):
    torch.manual_seed(0)
    pair = {"predicted": torch.randn(7, 3), "target": torch.randn(7, 3)}
    pair[constant][:, 1] = 0.1  # its mean over seven is not exactly itself
    pair["predicted"].requires_grad_()
    r = batch_correlation(**pair)
    assert r[1] == 0
    r.sum().backward()
    gradient = pair["predicted"].grad
    assert gradient.isfinite().all() and not gradient[:, 1].any() and gradient[:, 0].any()
    expected = np.corrcoef(*(x[:, 2].detach().numpy() for x in pair.values()))[0, 1]
    assert r[2].item() == pytest.approx(expected, abs=1e-6)


def test_a_network_started_at_a_profile_has_it_as_its_bias():
    model, profile = tiny(), torch.tensor([-6.0, 0.0, 2.5, 1.0, -1.0])
    model.start_at(profile)
    torch.nn.init.zeros_(model.head.weight)
    torch.testing.assert_close(model(**batch()).expression, profile.expand(4, 5))


def test_it_learns_a_batch_by_heart():
    model, given, target = tiny().train(), batch(6), torch.rand(6, 5)
    assert classics.share_left(model, lambda: egn_loss(model(**given), target)["mse"]) < 0.02
