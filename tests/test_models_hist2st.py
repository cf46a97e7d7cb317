"""Hist2ST against the published network's figures, spots without neighbours, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import classics
from hifusion.errors import InputError
from hifusion.models.counts import nb_nll, size_factors, zinb_nll
from hifusion.models.hist2st import Hist2ST, Hist2STConfig, Hist2STOutput, reference_names
from hifusion.models.hist2st_training import hist2st_loss, random_view, view_outputs


def tiny(**changes: Any) -> Hist2ST:
    """A network of width 8 for 8 px patches and 5 genes, in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    settings = {"n_genes": 5, "patch_px": 8, "piece_px": 4, "channels": 16, "kernel": 3, "mixer_layers": 1}
    settings |= {"layers": 1, "graph_layers": 2, "heads": 2, "positions": 10} | changes
    return Hist2ST(Hist2STConfig(**settings)).eval()


def section(spots: int = 6, side: int = 10) -> dict[str, Tensor]:
    """A fabricated section: each spot has the two after it for neighbours."""
    generator = torch.Generator().manual_seed(1)
    ring = torch.eye(spots, dtype=torch.bool)
    return {
        "region": torch.randint(0, 256, (spots, 3, side, side), dtype=torch.uint8, generator=generator),
        "position": torch.randint(0, 10, (spots, 2), generator=generator),
        "adjacency": (ring.roll(1, 1) | ring.roll(2, 1)) & ~ring,
    }


def predict(model: Hist2ST, given: dict[str, Tensor]) -> Hist2STOutput:
    return model(given["region"], position=given["position"], adjacency=given["adjacency"])


# Golden figures


@pytest.fixture(scope="module")
def fabricated(golden_root: Path) -> dict[str, Any]:
    """Expected figures, weights and inputs; seed and spots are the file's own."""
    fabricate = classics.fabricator(golden_root)
    expected = classics.figures(golden_root, "hist2st")
    seed, spots = int(expected["seed"]), int(expected["spots"])
    genes, radius = fabricate.CONFIGS["hist2st"]["genes"], expected["section_patch"].shape[-1] // 2
    extra = json.loads((golden_root / "hist2st_nb_extra_shapes.json").read_text())
    return {
        "expected": expected,
        "inputs": fabricate.hist2st_inputs(seed, spots),
        "section": fabricate.section_inputs(seed, spots, genes, radius),
        "weights": fabricate.state_dict("hist2st", seed),
        "nb_weights": fabricate.state_dict("hist2st", seed, extra),
        "config": fabricate.CONFIGS["hist2st"],
    }


def figures(fabricated: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Everything the golden file holds of the network, computed by this package in the given dtype."""
    given, weights = (classics.tensors(fabricated[name], dtype) for name in ("inputs", "weights"))
    patch, place = given["patch"][0], {"position": given["position"][0], "adjacency": given["adjacency"].bool()}
    # The training figures were taken with dropout 0; in evaluation it is off anyway.
    model = Hist2ST.from_reference(weights, dropout=0.0).eval()
    assert model.head.weight.dtype == dtype, "the weights' dtype is kept"
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, given, result, name=name: seen.update({name: result}))
    with torch.no_grad():
        mixed, out = model.mix(patch), model.forward_patches(patch, **place)
        graph = torch.stack([seen[f"graph.{i}"] for i in range(len(model.graph))])
        transformed = seen["layers"]
        by_max = Hist2ST.from_reference(weights, policy="max").eval().forward_patches(patch, **place)
        zinb = zinb_nll(out.counts, given["count"], given["size_factor"])
    trained = model.train().forward_patches(patch, **place)
    loss = hist2st_loss(
        trained,
        given["target"],
        count=given["count"],
        size_factor=given["size_factor"],
        views=[model.forward_patches(copy, **place) for copy in given["augmented"]],
        count_weight=fabricated["config"]["lambda_zinb"],
        distillation_weight=fabricated["config"]["lambda_distill"],
    )
    loss["total"].backward()
    return {
        "eval_after_mixer": mixed.numpy(),
        "eval_after_transformer": transformed.numpy(),
        "eval_after_graph": graph.numpy(),
        "eval_hidden": out.embedding.numpy(),
        "eval_prediction": out.expression.numpy(),
        "eval_mean": out.counts.mean.numpy(),
        "eval_dispersion": out.counts.dispersion.numpy(),
        "eval_dropout": out.counts.dropout.numpy(),
        "eval_coefficient": out.coefficient.numpy(),
        "eval_prediction_max_policy": by_max.expression.numpy(),
        "zinb_loss_eval": zinb.item(),
        "train_loss": loss["total"].item(),
        "train_mse": loss["mse"].item(),
        "train_zinb": loss["zinb"].item(),
        "train_distillation": loss["distillation"].item(),
        "gradients": classics.gradient_norms(model, reference_names(model)),
    }


@pytest.fixture(scope="module")
def computed(fabricated) -> dict[torch.dtype, dict[str, Any]]:
    return {dtype: figures(fabricated, dtype) for dtype in (torch.float64, torch.float32)}


HEADS = ("eval_mean", "eval_dispersion", "eval_dropout", "eval_coefficient", "eval_prediction_max_policy")
STEPS = ("eval_after_mixer", "eval_after_transformer", "eval_after_graph", "eval_hidden", "eval_prediction")
LOSSES = ("zinb_loss_eval", "train_loss", "train_mse", "train_zinb", "train_distillation")


@pytest.mark.parametrize("name", STEPS + HEADS + LOSSES)
def test_float64_agrees_with_the_published_network(fabricated, computed, name):
    np.testing.assert_allclose(computed[torch.float64][name], fabricated["expected"][name], rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", STEPS + HEADS + LOSSES)
def test_float32_agrees_with_the_published_network(fabricated, computed, name):
    """Relative to the largest value: single entries near 0 lose digits to cancellation."""
    expected = fabricated["expected"][name]
    np.testing.assert_allclose(computed[torch.float32][name], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_every_gradient_norm_agrees_with_the_published_network(fabricated, computed):
    """Biases of convolutions before a batch norm, and of the softmax weights, have none: both sides hold rounding."""
    assert not classics.gradient_differences(computed[torch.float64]["gradients"], fabricated["expected"])


def test_the_negative_binomial_option_agrees_with_the_published_network(fabricated):
    unused = ("mean.", "disp.", "pi.")
    weights = {name: value for name, value in fabricated["nb_weights"].items() if not name.startswith(unused)}
    given, expected = classics.tensors(fabricated["inputs"]), fabricated["expected"]
    model = Hist2ST.from_reference(weights).eval()
    assert model.config.count_head == "nb"
    with torch.no_grad():
        out = model.forward_patches(
            given["patch"][0], position=given["position"][0], adjacency=given["adjacency"].bool()
        )
    np.testing.assert_allclose(out.counts.log_size, expected["nb_r"], rtol=1e-8, atol=0)
    np.testing.assert_allclose(out.counts.logit, expected["nb_p"], rtol=1e-8, atol=0)
    np.testing.assert_allclose(nb_nll(out.counts, given["count"]), expected["nb_loss"], rtol=1e-8, atol=0)


def test_patches_have_the_axes_of_the_published_data_set(fabricated):
    expected, cut = fabricated["expected"]["section_patch"], fabricated["section"]
    image, radius = torch.tensor(cut["image"]).permute(2, 0, 1), expected.shape[-1] // 2
    region = torch.stack([image[:, y - radius : y + radius, x - radius : x + radius] for x, y in cut["center"]])
    model = tiny(patch_px=2 * radius, piece_px=2 * radius)
    assert np.array_equal(model.patches(region), expected)
    straight = tiny(patch_px=2 * radius, piece_px=2 * radius, transposed=False, pixels="unit")
    torch.testing.assert_close(straight.patches(region), region / 255)


def test_size_factors_are_those_of_the_golden_inputs(fabricated):
    given = fabricated["inputs"]
    np.testing.assert_allclose(size_factors(torch.tensor(given["count"])), given["size_factor"], rtol=1e-12)
    with pytest.raises(InputError, match="half of the spots or more have no count"):
        size_factors(torch.tensor([[0.0], [0.0], [3.0]]))


def test_network_of_the_paper_has_the_published_names_shapes_and_size(golden_root):
    """At the reduced golden widths every name and shape; at the paper's the number of parameters."""
    expected = json.loads((golden_root / "hist2st_reference_shapes.json").read_text())
    model = Hist2ST.from_reference({name: torch.zeros(shape) for name, shape in expected.items()})
    names = reference_names(model)
    assert {names[own]: list(value.shape) for own, value in model.state_dict().items()} == expected
    with torch.device("meta"):
        paper = Hist2ST(Hist2STConfig(n_genes=785))
    assert len(paper.state_dict()) == 162 and sum(p.numel() for p in paper.parameters()) == 75_789_833


# A section


def test_another_order_of_spots_gives_the_same_predictions_in_that_order():
    model, given, order = tiny(), section(), torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {name: value[order] for name, value in given.items()} | {"adjacency": given["adjacency"][order][:, order]}
    before, after = predict(model, given), predict(model, moved)
    torch.testing.assert_close(after.expression, before.expression[order])
    assert not torch.allclose(before.expression[0], before.expression[1])


@pytest.mark.parametrize("policy", ["mean", "max"])
@pytest.mark.parametrize("isolated", ["self", "zero"])
def test_a_spot_without_neighbours_keeps_the_section_finite(policy, isolated):
    model, given = tiny(policy=policy, isolated=isolated).train(), section()
    given["adjacency"][2] = False
    out = predict(model, given)
    count = torch.ones(6, 5)
    hist2st_loss(out, torch.zeros(6, 5), count=count, size_factor=size_factors(count))["total"].backward()
    assert out.expression.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("policy", ["mean", "max"])
def test_one_spot_is_a_section_in_evaluation_and_training(policy):
    model, given = tiny(policy=policy).train(), section(1)
    out = predict(model, given)
    assert out.expression.shape == (1, 5)
    hist2st_loss(out, torch.zeros(1, 5), count_weight=0)["total"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert predict(model.eval(), given).expression.isfinite().all()


def test_a_mean_that_would_overflow_leaves_gradients_finite():
    model, given = tiny(), section()
    torch.nn.init.constant_(model.count_heads["mean"].bias, 1e4)
    out, count = predict(model, given), torch.ones(6, 5)
    torch.testing.assert_close(out.counts.mean, torch.full((6, 5), 1e6))
    zinb_nll(out.counts, count, size_factors(count)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_adjacency_decides_whose_features_are_pooled():
    model, given = tiny(layers=1), section()
    with torch.no_grad():  # no attention: spots meet in the graph only
        model.layers[0].attention.out.weight.zero_()
    given["adjacency"] = torch.zeros(6, 6, dtype=torch.bool)
    given["adjacency"][0, 1] = True
    before = predict(model, given).expression
    given["region"][1] = 255 - given["region"][1]
    changed = (predict(model, given).expression - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, True, False, False, False, False]


# Inputs


@pytest.mark.parametrize(
    "change, message",
    [
        ({"position": torch.full((6, 2), 10)}, "position: 10 is outside 0 to 9"),
        ({"position": torch.zeros(6, 2)}, "position: dtype is torch.float32; give whole numbers"),
        ({"adjacency": torch.zeros(5, 6, dtype=torch.bool)}, r"adjacency: shape is \(5, 6\); give \(6, 6\)"),
        ({"adjacency": torch.zeros(6, 6)}, "adjacency: dtype is torch.float32; give bool"),
        ({"region": torch.zeros(6, 3, 10, 10)}, "region: dtype is torch.float32; give uint8"),
        ({"region": torch.zeros(6, 3, 6, 6, dtype=torch.uint8)}, "with R at least 8 and even"),
        (
            {"region": torch.zeros(0, 3, 8, 8, dtype=torch.uint8), "position": torch.zeros(0, 2, dtype=torch.long)},
            "holds no spot",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        predict(tiny(), section() | change)


def test_bfloat16_autocast_keeps_expression_and_counts_in_float32():
    model = tiny(n_genes=50)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = predict(model, section())
    assert {out.expression.dtype, out.counts.mean.dtype, out.embedding.dtype} == {torch.float32}
    assert (out.expression != out.expression.bfloat16().float()).float().mean() > 0.9


# Configuration, weights


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"graph_layers": 0}, "graph_layers: 0 is not a whole number of at least 1"),
        ({"piece_px": 5}, "piece_px: 5 does not divide patch_px=112"),
        ({"channels": 12}, "channels: 12 is no multiple of 8"),
        ({"dropout": -0.1}, r"dropout: -0.1 is outside \[0, 1\)"),
        ({"count_head": "poisson"}, "count_head: 'poisson' is unknown; use one of zinb, nb, none"),
        ({"policy": "sum"}, "policy: 'sum' is unknown; use one of mean, max"),
        ({"isolated": "nan"}, "isolated: 'nan' is unknown; use one of self, zero"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        Hist2STConfig(**({"n_genes": 785} | changes))


def published(model: Hist2ST) -> dict[str, np.ndarray]:
    state = model.state_dict()
    return {name: state[own].numpy().copy() for own, name in reference_names(model).items()}


@pytest.mark.parametrize("changes", [{}, {"count_head": "nb"}, {"count_head": "none", "distil": False}])
def test_a_lightning_checkpoint_gives_the_same_network_and_draws_no_random_numbers(changes):
    model = tiny(**changes)
    state = torch.random.get_rng_state()
    loaded = Hist2ST.from_reference({"state_dict": {f"model.{n}": v for n, v in published(model).items()}}).eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.config == model.config
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(predict(loaded, section()).expression, predict(model, section()).expression)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_embed.weight": None}, "missing: x_embed.weight"),
        ({"extra": np.zeros(3)}, "unexpected: extra"),
        ({"pi.0.bias": np.zeros(4)}, r"wrong shape: pi.0.bias \(4,\), not \(5,\)"),
    ],
)
def test_published_weights_that_do_not_fit_are_named(change, message):
    weights = {name: value for name, value in (published(tiny()) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Hist2ST.from_reference(weights)


# Loss, copies, learning


def plain(expression: Tensor, coefficient: Tensor | None = None) -> Hist2STOutput:
    return Hist2STOutput(expression, None, coefficient, torch.zeros(len(expression), 8))


def test_distillation_mixes_the_copies_spot_by_spot_with_softmax_shares():
    # Spot 0: shares 1/4 and 3/4 of 0 and 4 give 3; spot 1: equal shares of 2 and 0 give 1. Predictions 1 and 1.
    views = [
        plain(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [5.0]])),
        plain(torch.tensor([[4.0], [0.0]]), torch.tensor([[np.log(3)], [5.0]])),
    ]
    terms = hist2st_loss(plain(torch.ones(2, 1)), torch.zeros(2, 1), views=views, distillation_weight=0.1)
    values = {name: value.item() for name, value in terms.items()}
    assert values == pytest.approx({"total": 1 + 0.1 * 2, "mse": 1, "distillation": ((3 - 1) ** 2 + 0) / 2})


def test_loss_refuses_what_does_not_fit():
    out = predict(tiny(), section())
    with pytest.raises(InputError, match=r"target: shape is \(6, 1\); give \(6, 5\)"):
        hist2st_loss(out, torch.zeros(6, 1))
    with pytest.raises(InputError, match="count, size_factor: not given; give both, or count_weight=0"):
        hist2st_loss(out, torch.zeros(6, 5))
    with pytest.raises(InputError, match=r"size_factor: shape is \(5,\); give \(6\)"):
        hist2st_loss(out, torch.zeros(6, 5), count=torch.ones(6, 5), size_factor=torch.ones(5))
    with pytest.raises(InputError, match="build it with distil=True"):
        hist2st_loss(out, torch.zeros(6, 5), count_weight=0, views=[out._replace(coefficient=None)])


def test_copies_repeat_with_their_generator_and_differ_from_each_other():
    model, given = tiny(), section()

    def copies() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        return [out.expression for out in view_outputs(model, **given, generator=generator, n_views=3)]

    first, again = copies(), copies()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize(
    "draw, change",
    [
        ((0.5, 0.5, 0.5), lambda x: x),
        ((0.5, 0.5, 0.1), lambda x: x.flip(3)),
        ((0.5, 1.0, 0.5), lambda x: x.rot90(1, (2, 3))),
        ((0.5, 0.0, 0.5), lambda x: x.rot90(-1, (2, 3))),
        ((0.05, 0.5, 0.5), lambda x: (0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).expand(2, 3, 6, 6)),
    ],
)
def test_a_draw_decides_the_change_of_all_patches(monkeypatch, draw, change):
    patch = torch.randn(2, 3, 6, 6)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor(draw))
    torch.testing.assert_close(random_view(patch, torch.Generator()), change(patch))


def test_a_half_turned_copy_is_zero_in_its_corners_and_holds_no_new_value(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.tensor([0.5, 0.75, 0.5]))
    patch = torch.arange(1.0, 82.0).view(1, 1, 9, 9).expand(1, 3, 9, 9)
    view = random_view(patch, torch.Generator())
    assert not view[0, 0, [0, 0, 8, 8], [0, 8, 0, 8]].any() and view[0, 0, 4, 4] == patch[0, 0, 4, 4]
    assert torch.isin(view[view != 0], patch).all()


def test_it_learns_a_section_by_heart():
    model, given, target = tiny(pixels="unit", dropout=0.0, channels=32).train(), section(), torch.randn(6, 5)
    left = classics.share_left(model, lambda: hist2st_loss(predict(model, given), target, count_weight=0)["total"])
    assert left < 0.05


def test_a_network_started_at_a_profile_has_it_as_its_bias():
    model, profile = tiny(n_genes=3), torch.tensor([-6.0, 0.0, 2.5])
    model.start_at(profile)
    torch.nn.init.zeros_(model.head.weight)
    torch.testing.assert_close(predict(model, section()).expression, profile.expand(6, 3))
