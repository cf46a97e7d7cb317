"""BLEEP against the published network's figures, its bank, its look-up, and what it refuses."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

import peers
from hifusion.errors import InputError
from hifusion.models.bleep import Bleep, BleepConfig, BleepOutput, bleep_loss, reference_names, retrieve
from hifusion.models.resnet import Bottleneck, ResNet

SMALL = {"n_genes": 5, "patch_px": 32, "width": 2, "embedding": 8, "neighbours": 3}


def small(bank: int = 7, **changes: Any) -> Bleep:
    """A network of some thousand weights with a bank, in evaluation mode, the same at every call.

    Its encoder has one block in each stage: the 16 blocks of ResNet-50 take their time however thin they are.
    """
    torch.manual_seed(0)
    model = Bleep(BleepConfig(**(SMALL | changes)))
    model.image_encoder = ResNet((1, 1, 1, 1), model.config.width, Bottleneck)
    if bank:
        model.set_bank(profiles(bank))
    return model.eval()


def profiles(spots: int, seed: int = 3) -> Tensor:
    return torch.randn(spots, 5, generator=torch.Generator().manual_seed(seed))


def pixels(batch: int = 4, side: int = 40) -> Tensor:
    return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# Golden figures


@pytest.fixture(scope="module")
def fabricate(golden_root: Path) -> ModuleType:
    return peers.fabricator(golden_root, "fabricate_classics")


@pytest.fixture(scope="module")
def expected(golden_root: Path) -> dict[str, Any]:
    return peers.figures(golden_root, "bleep")


def loaded(fabricate: ModuleType, seed: int, dtype: torch.dtype) -> Bleep:
    sizes = fabricate.CONFIGS["bleep"]
    config = BleepConfig(sizes["genes"], sizes["image"], embedding=sizes["projection"], dropout=0.0)
    model = Bleep.from_reference(peers.tensors(fabricate.state_dict("bleep", seed), dtype), config)
    return model.to(memory_format=model.config.memory_format).eval()


@pytest.fixture(scope="module")
def computed(fabricate, expected) -> dict[str, Any]:
    """What this package computes in float64, under the names of the golden file."""
    seed = peers.seed_of(expected, fabricate)
    model, inputs = loaded(fabricate, seed, torch.float64), peers.tensors(fabricate.bleep_inputs(seed))
    patch, measured = inputs["image"], inputs["expression"]
    features: list[Tensor] = []
    hook = model.image_projection.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    with torch.no_grad():
        out = model.forward_images(patch, measured=measured)
    hook.remove()
    found: dict[str, Any] = {
        "eval_image_feature": features[0],
        "eval_image_embedding": out.embedding,
        "eval_spot_embedding": out.measured_embedding,
    }
    trained = model.train().forward_images(patch, measured=measured)
    for temperature in (1, 16):
        found[f"eval_loss_temperature_{temperature}"] = bleep_loss(out, measured, temperature)["total"]
        loss = bleep_loss(trained, measured, temperature)["total"]
        found[f"train_loss_temperature_{temperature}"] = loss
        model.zero_grad()
        loss.backward(retain_graph=temperature == 1)
        found[f"gradients_{temperature}"] = peers.gradient_norms(model, reference_names(model))
    bank = peers.tensors(fabricate.bleep_retrieval_inputs(seed))
    for method in ("simple", "average", "weighted_average"):
        expression, rows = retrieve(bank["query"], bank["key"], bank["expression"], method)
        found |= {f"retrieved_{method}": expression, f"indices_{method}": rows}
    return found


FIGURES = (
    "eval_image_feature",
    "eval_image_embedding",
    "eval_spot_embedding",
    "eval_loss_temperature_1",
    "eval_loss_temperature_16",
    "train_loss_temperature_1",
    "train_loss_temperature_16",
    "retrieved_simple",
    "retrieved_average",
    "retrieved_weighted_average",
    "indices_simple",
    "indices_average",
    "indices_weighted_average",
)


@pytest.mark.parametrize("name", FIGURES)
def test_float64_agrees_with_the_published_network(expected, computed, name):
    peers.assert_same(computed[name], expected[name])


@pytest.mark.parametrize("temperature", [1, 16])
def test_every_gradient_norm_agrees_with_the_published_network(expected, computed, temperature):
    names, norms = (expected[f"grad_temperature_{temperature}_{what}"] for what in ("names", "norms"))
    peers.assert_same_gradients(computed[f"gradients_{temperature}"], names, norms)


def test_every_golden_figure_is_compared(expected):
    gradients = {f"grad_temperature_{t}_{what}" for t in (1, 16) for what in ("names", "norms")}
    assert set(expected) - {"seed"} == {*FIGURES, *gradients}


def test_float32_agrees_with_the_published_network(fabricate, expected):
    seed = peers.seed_of(expected, fabricate)
    model = loaded(fabricate, seed, torch.float32)
    assert model.spot_projection.fc.weight.dtype == torch.float32, "the weights' dtype is kept"
    inputs = peers.tensors(fabricate.bleep_inputs(seed), torch.float32)
    with torch.no_grad():
        out = model.forward_images(inputs["image"], measured=inputs["expression"])
    peers.assert_close(out.embedding, expected["eval_image_embedding"], 1e-4)
    peers.assert_close(out.measured_embedding, expected["eval_spot_embedding"], 1e-4)


def test_published_size_has_the_published_names_and_number_of_parameters(fabricate):
    with torch.device("meta"):
        model = Bleep(BleepConfig(n_genes=3467))
    assert sum(p.numel() for p in model.parameters()) == 25_052_992
    shapes = {name: list(model.state_dict()[own].shape) for own, name in reference_names(model).items()}
    assert len(shapes) == 330
    genes = fabricate.CONFIGS["bleep"]["genes"]
    published = fabricate.shapes("bleep")
    assert published.pop("spot_projection.projection.weight") == [256, genes]
    assert shapes.pop("spot_projection.projection.weight") == [256, 3467]
    assert shapes == published


# Published weights and saved ones


def whole() -> Bleep:
    """The network of `small`, with all of its encoder."""
    torch.manual_seed(0)
    return Bleep(BleepConfig(**SMALL))


def published(model: Bleep) -> dict[str, Any]:
    return {name: model.state_dict()[own] for own, name in reference_names(model).items()}


def test_published_weights_come_back_under_all_the_names_they_have_had():
    model = whole()
    weights = published(model)
    old = {f"module.{name.replace('spot_', 'well_')}": value.numpy() for name, value in weights.items()}
    state = torch.random.get_rng_state()
    for given in (weights, old):
        again = Bleep.from_reference(given, model.config)
        torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws no random numbers"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_projection.projection.weight": None}, "missing: image_projection.projection.weight"),
        ({"image_encoder.model.bn1.bias": None}, "missing: image_encoder.model.bn1.bias"),
        ({"extra": np.zeros(3)}, "unexpected: extra"),
        ({"spot_projection.projection.weight": np.zeros((8, 4))}, r"weight \(8, 4\), not \(8, 5\)"),
    ],
)
def test_published_weights_that_do_not_fit_are_named(change, message):
    weights = {name: value for name, value in (published(whole()) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Bleep.from_reference(weights, whole().config)


@pytest.mark.parametrize("before", [0, 2, 7])
def test_the_bank_is_saved_and_loaded_with_the_weights(before):
    """Whatever the bank that it takes the place of."""
    model, other = small(), small(bank=before)
    torch.nn.init.normal_(other.spot_projection.fc.weight)
    state = safetensors.torch.load(safetensors.torch.save(model.state_dict()))
    other.load_state_dict(state)
    torch.testing.assert_close(other(pixels()).expression, model(pixels()).expression, rtol=0, atol=0)
    assert torch.equal(other.bank_expression, profiles(7))


def test_an_empty_bank_is_saved_and_loaded_too():
    state = safetensors.torch.load(safetensors.torch.save(small(bank=0).state_dict()))
    model = small()
    model.load_state_dict(state)
    with pytest.raises(InputError, match="bank: it is empty; fill it"):
        model(pixels())


def test_a_bank_of_other_genes_is_refused():
    state = small().state_dict() | {"bank_expression": torch.zeros(7, 4)}
    with pytest.raises(RuntimeError, match="size mismatch for bank_expression"):
        small().load_state_dict(state)


# Look-up


def test_the_bank_is_embedded_without_dropout_and_in_pieces_as_at_once():
    model = small(bank=0, dropout=0.5).train()
    model.set_bank(profiles(7), batch=3)
    assert model.training and model.spot_projection.dropout.training
    in_pieces = model.bank_embedding
    model.set_bank(profiles(7))
    torch.testing.assert_close(in_pieces, model.bank_embedding)
    torch.testing.assert_close(in_pieces, model.eval().spot_projection(profiles(7)))


def test_a_prediction_is_the_mean_of_bank_profiles():
    model = small()
    out = model(pixels())
    _, rows = retrieve(out.embedding, model.bank_embedding, model.bank_expression, neighbours=3)
    torch.testing.assert_close(out.expression, profiles(7)[rows].mean(1))
    assert out.measured_embedding is None


def test_training_looks_nothing_up_and_prediction_reads_no_label():
    model = small()
    out = model(pixels(), measured=profiles(4))
    assert out.expression is None
    torch.testing.assert_close(out.embedding, model(pixels()).embedding)
    torch.testing.assert_close(out.measured_embedding, model.spot_projection(profiles(4)))


def test_predictions_follow_a_reordering_of_the_batch_and_not_that_of_the_bank():
    model, order = small(), torch.tensor([2, 0, 3, 1])
    expected = model(pixels()).expression
    torch.testing.assert_close(model(pixels()[order]).expression, expected[order])
    model.set_bank(profiles(7).flip(0))
    torch.testing.assert_close(model(pixels()).expression, expected)


def test_a_small_bank_is_used_whole_and_one_spot_is_always_found():
    expression = small(bank=2)(pixels()).expression
    torch.testing.assert_close(expression, profiles(2).mean(0).expand(4, 5))
    for method in ("simple", "average", "weighted_average"):
        torch.testing.assert_close(small(bank=1, retrieval=method)(pixels(1)).expression, profiles(1))


def test_ties_go_to_the_lower_row_and_length_does_not_count():
    keys = torch.tensor([[0.0, 1], [3, 0], [1, 0], [9, 0]])
    found, rows = retrieve(torch.tensor([[2.0, 0]]), keys, torch.eye(4), neighbours=2)
    assert rows.tolist() == [[1, 2]] and found.tolist() == [[0, 0.5, 0.5, 0]]


def test_weights_fall_with_the_squared_distance_over_the_temperature():
    keys = torch.tensor([[1.0, 0], [2, 0]])
    found, _ = retrieve(torch.tensor([[1.0, 0]]), keys, torch.eye(2), "weighted_average", temperature=2.0)
    assert (found[0, 1] / found[0, 0]).item() == pytest.approx(np.exp(-1 / 2))


@pytest.mark.parametrize("factor", [0.0, 1.0, 1e4])
def test_look_ups_are_finite_and_within_the_range_of_the_bank(factor):
    """At distances that overflow the release's weights, and for an embedding of length 0."""
    query, keys = factor * torch.randn(5, 8), factor * torch.randn(20, 8)
    expression = torch.randn(20, 3)
    for method in ("simple", "average", "weighted_average"):
        found, _ = retrieve(query, keys, expression, method, neighbours=6)
        low, high = expression.amin(0) - 1e-5, expression.amax(0) + 1e-5
        assert ((found >= low) & (found <= high)).all()


def test_uint8_regions_equal_the_centre_scaled_by_hand():
    model = small()
    patch = pixels()[:, :, 4:36, 4:36].double().numpy() / 255
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    by_hand = torch.tensor((patch - mean[:, None, None]) / std[:, None, None], dtype=torch.float32)
    torch.testing.assert_close(model(pixels()).embedding, model.forward_images(by_hand).embedding, rtol=1e-4, atol=1e-5)


# Loss, learning, configuration


def test_loss_of_two_spots_by_hand():
    images, spots = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[2.0, 0], [0, 1]])
    terms = bleep_loss(BleepOutput(None, images, spots), torch.zeros(2, 3))
    logits = np.array([[2.0, 0], [0, 1]])
    inner = np.array([[(1 + 4) / 2, 0], [0, 1]])
    targets = np.exp(inner) / np.exp(inner).sum(1, keepdims=True)
    by_rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    by_columns = logits - np.log(np.exp(logits).sum(0, keepdims=True))
    expected = {"spots": -(targets * by_rows).sum() / 4, "images": -(targets * by_columns).sum() / 4}
    expected["total"] = expected["spots"] + expected["images"]
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected)


def test_gradients_reach_both_sides_and_are_finite_for_equal_spots():
    model = small().train()
    measured = profiles(1).expand(4, 5)
    bleep_loss(model(pixels(), measured=measured), measured, temperature=16.0)["total"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.image_encoder.conv1.weight.grad.any() and model.spot_projection.projection.weight.grad is not None


def test_loss_needs_what_was_measured():
    model = small()
    with pytest.raises(InputError, match="measured: none for a target of 4"):
        bleep_loss(model(pixels()), profiles(4))
    with pytest.raises(InputError, match="measured: 4 for a target of 3"):
        bleep_loss(model(pixels(), measured=profiles(4)), profiles(3))


def test_trained_on_eight_spots_it_finds_each_of_them():
    model, target = small(dropout=0.0, retrieval="simple").train(), profiles(8)
    region = pixels(8)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(40):
        loss = bleep_loss(model(region, measured=target), target)["total"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.set_bank(target)  # batch statistics are kept: with so few steps the running ones are not there yet
    torch.testing.assert_close(model(region).expression, target)


def test_bfloat16_autocast_keeps_expression_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        out = small()(pixels())
    assert out.expression.dtype == out.embedding.dtype == torch.float32


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_genes": 0}, "n_genes: 0 is not a whole number of at least 1"),
        ({"neighbours": 0}, "neighbours: 0 is not a whole number of at least 1"),
        ({"dropout": -0.1}, r"dropout: -0.1 is outside \[0, 1\)"),
        ({"retrieval": "nearest"}, "retrieval: 'nearest' is unknown; use one of simple, average, weighted_average"),
        ({"retrieval_temperature": 0.0}, "retrieval_temperature: 0.0 is not above 0"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        BleepConfig(**({"n_genes": 250} | changes))


def test_inputs_that_do_not_fit_are_refused():
    model = small()
    with pytest.raises(InputError, match="region: dtype is torch.float32; give uint8"):
        model(pixels().float())
    with pytest.raises(InputError, match=r"measured: shape is \(3, 5\); give \(4, 5\)"):
        model(pixels(), measured=profiles(3))
    with pytest.raises(InputError, match=r"bank: shape is \(2, 4\); give \(M, 5\)"):
        model.set_bank(torch.zeros(2, 4))
    with pytest.raises(InputError, match="bank: no spot was given"):
        model.set_bank(torch.zeros(0, 5))
