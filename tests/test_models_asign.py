"""ASIGN-2D and -3D against the published networks' figures; what the corrected form sees and what it must not see."""

import copy
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peers
from hifusion.errors import InputError
from hifusion.models.asign import Asign2d, AsignWeights, asign_loss, pearson_loss
from hifusion.models.asign3d import Asign3d, asign3d_loss, propagate
from hifusion.models.asign_blocks import GraphBlock
from hifusion.models.asign_core import UNUSED, AsignConfig, AsignOutput, AsignSections, reference_names
from hifusion.models.asign_graphs import nearest_graph, radius_graph, stack_graph, tile_sums, tiles_of
from hifusion.models.resnet import Bottleneck, ResNet

GENES, DIM = 5, 16
NETWORKS = {"asign2d": (Asign2d, asign_loss), "asign3d": (Asign3d, asign3d_loss)}


def small(network: type = Asign2d, **changes: Any) -> Any:
    """A network of some ten thousand weights, in evaluation mode and float64, the same at every call.

    Its encoder has one block in each stage: the 16 blocks of ResNet-50 take their time however thin they are.
    """
    torch.manual_seed(0)
    settings = {"n_genes": GENES, "feature_dim": DIM, "patch_px": 32, "width": 2, "heads": 4, "layers": 1} | changes
    model = network(AsignConfig(**settings))
    model.encoder = ResNet((1, 1, 1, 1), model.config.width, Bottleneck)
    return model.double().eval()


def section(spots: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """All that ASIGN-2D needs of one section of `spots` on a lattice, beside its regions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.stack([torch.arange(spots) % 4, torch.arange(spots) // 4], 1) * 400.0 + 100
    size = (2000, 2000)
    by_512, by_1024 = tiles_of(centres, size, 512), tiles_of(centres, size, 1024)
    return {
        "region": torch.randint(0, 256, (spots, 3, 36, 36), dtype=torch.uint8, generator=generator),
        "tile_512_features": torch.randn(len(by_512.tiles), DIM, generator=generator).double(),
        "tile_1024_features": torch.randn(len(by_1024.tiles), DIM, generator=generator).double(),
        "tile_512_index": by_512.row,
        "tile_1024_index": by_1024.row,
        "tile_512_graph": radius_graph(by_512.tiles),
        "tile_1024_graph": radius_graph(by_1024.tiles),
        "spot_graph": nearest_graph(centres, 3),
    }


def patient(known: int = 4) -> dict[str, Tensor]:
    """Two sections side by side in one graph, the first `known` spots measured; all that ASIGN-3D needs."""
    both = beside(section(6, 1), section(5, 2))
    places = torch.rand(11, 2, generator=torch.Generator().manual_seed(3)) * 300
    number = torch.tensor([0] * 6 + [1] * 5)
    features = torch.randn(11, DIM, generator=torch.Generator().manual_seed(4))
    return both | {
        "spot_graph": stack_graph(places, number, features, 112.0, across=2, within=2),
        "known_expression": torch.randn(11, GENES, generator=torch.Generator().manual_seed(5)).double() - 5.5,
        "known": torch.arange(11) < known,
    }


def beside(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two sections as one batch, without an edge between them."""
    out = {}
    for name in a:
        if name.endswith("graph"):
            out[name] = torch.block_diag(a[name].double(), b[name].double()).bool()
        elif name.endswith("index"):
            tiles = len(a[name.replace("index", "features")])
            out[name] = torch.cat([a[name], b[name] + tiles])
        else:
            out[name] = torch.cat([a[name], b[name]])
    return out


def targets(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keywords of the loss."""
    generator = torch.Generator().manual_seed(6)
    return {
        "tile_512_target": torch.randn(len(given["tile_512_features"]), GENES, generator=generator).double(),
        "tile_1024_target": torch.randn(len(given["tile_1024_features"]), GENES, generator=generator).double(),
        "tile_512_index": given["tile_512_index"],
        "tile_1024_index": given["tile_1024_index"],
    }


# Golden figures


@pytest.fixture(scope="module")
def fabricate(golden_root: Path) -> ModuleType:
    return peers.fabricator(golden_root, "fabricate_peers")


def loaded(fabricate: ModuleType, model: str, size: str, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """The published network with fabricated weights, as the figures were taken: without dropout."""
    table = fabricate.shapes(f"{model}_{size}")
    genes, dim = table["gene_head_250.1.weight"]
    weights = peers.tensors(fabricate.state_dict(table, seed, -5.5), dtype)
    side = inspect.signature(fabricate.asign_batch).parameters["image"].default
    config = AsignConfig(genes, dim, side, form="published", dropout=0.0)
    network = NETWORKS[model][0].from_reference(weights, config)
    return network.to(memory_format=config.memory_format).eval()


def batch(fabricate: ModuleType, network: Any, seed: int, spots: int) -> dict[str, Any]:
    """Fabricated inputs of a network, under our names."""
    dim, genes, three_d = network.config.feature_dim, network.config.n_genes, isinstance(network, Asign3d)
    arrays = fabricate.asign_batch(seed, dim, genes, spots, three_d=three_d)
    given: dict[str, Any] = peers.tensors(arrays, network.head.weight.dtype)
    sections = AsignSections(
        given["graph_512"],
        given["graph_1024"],
        given["idx_512"],
        given["idx_1024"],
        given["adj_512"],
        given["adj_1024"],
        given["adj"],
    )
    # A row was known in the release where its label sum is not 0.
    known = (given["known"], given["known"].sum(1) != 0) if "known" in given else ()
    return given | {"sections": sections, "known": known}


@pytest.fixture(scope="module")
def golden(golden_root: Path, fabricate: ModuleType):
    """Per (network, order): expected figures, and what this package computes in float64 under the same names."""
    found = {}
    for model, (_, loss) in NETWORKS.items():
        expected = peers.figures(golden_root, model)
        seed, spots = peers.seed_of(expected, fabricate), len(expected["ordered_eval_224"])
        fresh = loaded(fabricate, model, "reduced", seed)
        given = batch(fabricate, fresh, seed, spots)
        for order in ("released", "ordered"):
            network = copy.deepcopy(fresh)
            network.transformer.order = order
            sections, known = given["sections"], given["known"]
            seen: list[Tensor] = []
            hook = network.encoder_head.register_forward_hook(lambda *call, to=seen: to.append(call[-1]))
            with torch.no_grad():
                out = network.forward_images(given["image"], sections, *known)
                nodes = network.spot_nodes(seen[0], sections)
            hook.remove()
            terms = loss(
                network.train().forward_images(given["image"], sections, *known),
                given["label"],
                tile_512_target=given["y_512"],
                tile_1024_target=given["y_1024"],
                tile_512_index=given["idx_512"],
                tile_1024_index=given["idx_1024"],
            )
            terms["total"].backward()
            computed = {
                f"{order}_eval_224": out.expression,
                f"{order}_eval_512": out.tile_512_expression,
                f"{order}_eval_1024": out.tile_1024_expression,
                f"{order}_train_mse": terms["mse"],
                f"{order}_train_pcc": terms["pearson"],
                f"{order}_train_other": terms["tiles"],
                f"{order}_train_cons": terms["consistency"],
                f"{order}_train_loss": terms["total"],
                "encoder_features": seen[0],
                "spot_node_features": nodes,
                "spot_graph_features_0": network.spot_blocks[0](nodes, sections.spot_graph),
            }
            if known:
                computed["label_propagation"] = propagate(*known, sections.spot_graph, "published")
            gradients = peers.gradient_norms(network, reference_names(network))
            found[model, order] = (expected, computed, gradients)
    return found


CASES = [(model, order) for model in NETWORKS for order in ("released", "ordered")]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_published_form_agrees_with_the_published_network_in_float64(golden, case):
    expected, computed, _ = golden[case]
    for name, figure in computed.items():
        peers.assert_same(figure, expected[name])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_gradient_norm_agrees_with_the_published_network(golden, case):
    """-1 stands for weights that no gradient reaches: those we do not have.

    The spot's encoder, query, key and graph scores have gradient 0 there but for rounding: hence the floor.
    """
    expected, _, gradients = golden[case]
    norms = expected[f"{case[1]}_grad_norms"]
    norms = np.where(norms < 0, np.nan, norms)
    peers.assert_same_gradients(gradients, expected["grad_names"], norms)
    unreached = expected["grad_names"][np.isnan(norms)]
    assert len(unreached) and all(str(name).startswith(UNUSED) for name in unreached)


@pytest.mark.parametrize("model", NETWORKS)
def test_every_golden_figure_is_compared(golden, model):
    names = {"grad_names", "released_grad_norms", "ordered_grad_norms"}
    names |= {"full_released_eval_224", "full_ordered_eval_224"}  # in the slow test
    for order in ("released", "ordered"):
        names |= set(golden[model, order][1])
    assert set(golden[model, "ordered"][0]) - {"seed"} == names


@pytest.mark.parametrize("model", NETWORKS)
def test_float32_agrees_with_the_published_network(golden_root, fabricate, model):
    expected = peers.figures(golden_root, model)
    seed = peers.seed_of(expected, fabricate)
    network = loaded(fabricate, model, "reduced", seed, torch.float32)
    assert network.head.weight.dtype == torch.float32, "the weights' dtype is kept"
    given = batch(fabricate, network, seed, len(expected["ordered_eval_224"]))
    with torch.no_grad():
        out = network.forward_images(given["image"], given["sections"], *given["known"])
    peers.assert_close(out.expression, expected["ordered_eval_224"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORKS)
def test_released_size_agrees_with_the_published_network(golden_root, fabricate, model):
    expected = peers.figures(golden_root, model)
    seed = peers.seed_of(expected, fabricate)
    network = loaded(fabricate, model, "reference", seed)
    given = batch(fabricate, network, seed, len(expected["full_ordered_eval_224"]))
    for order in ("released", "ordered"):
        network.transformer.order = order
        with torch.no_grad():
            out = network.forward_images(given["image"], given["sections"], *given["known"])
        peers.assert_same(out.expression, expected[f"full_{order}_eval_224"])


@pytest.mark.parametrize("model, parameters", [("asign2d", 111_405_870), ("asign3d", 94_612_520)])
def test_released_size_has_the_published_names_and_shapes_but_for_unused_weights(fabricate, model, parameters):
    table = fabricate.shapes(f"{model}_reference")
    with torch.device("meta"):
        network = NETWORKS[model][0](AsignConfig(n_genes=250))
    names = reference_names(network)
    ours = {names[name]: list(value.shape) for name, value in network.state_dict().items()}
    assert ours == {name: shape for name, shape in table.items() if not name.startswith(UNUSED)}
    unused = sum(int(np.prod(shape)) for name, shape in table.items() if name.startswith(UNUSED))
    assert sum(p.numel() for p in network.parameters()) + unused == parameters


# Published weights


def whole(network: type = Asign2d) -> Any:
    """The network of `small`, with all of its encoder."""
    torch.manual_seed(0)
    return network(small(network).config)


def published(network: Any) -> dict[str, Any]:
    return {name: network.state_dict()[own] for own, name in reference_names(network).items()}


@pytest.mark.parametrize("network", [Asign2d, Asign3d])
def test_published_weights_come_back_with_or_without_what_is_unused(network):
    model = whole(network)
    weights = published(model)
    state = torch.random.get_rng_state()
    for given in (weights, {"state_dict": {f"model.{name}": v for name, v in weights.items()}}):
        again = network.from_reference(given, model.config)
        torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    network.from_reference(weights | {"gene_head_512.1.bias": np.zeros(7)}, model.config)
    assert torch.equal(torch.random.get_rng_state(), state), "loading draws no random numbers"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gene_head_250.1.weight": None}, "missing: gene_head_250.1.weight"),
        ({"cross_attention_512.key_proj.bias": None}, "missing: cross_attention_512.key_proj.bias"),
        ({"extra": np.zeros(3)}, "unexpected: extra"),
        ({"gat_layer_224.0.att_weight": np.zeros((4, 1))}, r"gat_layer_224.0.att_weight \(4, 1\), not \(16, 1\)"),
    ],
)
def test_published_weights_that_do_not_fit_are_named(change, message):
    weights = {name: value for name, value in (published(whole()) | change).items() if value is not None}
    with pytest.raises(InputError, match=message):
        Asign2d.from_reference(weights, small().config)


# What the network sees


def moved_rows(network: Any, given: dict[str, Tensor], change: dict[str, Tensor]) -> list[bool]:
    """Which spots' predictions a change of inputs moves."""
    before, after = network(**given).expression, network(**(given | change)).expression
    return ((before - after).abs() > 1e-12).any(1).tolist()


def other_image(given: dict[str, Tensor], spot: int) -> dict[str, Tensor]:
    region = given["region"].clone()
    region[spot] = 255 - region[spot]
    return {"region": region}


@pytest.mark.parametrize("network, given", [(Asign2d, section()), (Asign3d, patient())], ids=["2d", "3d"])
def test_a_spots_image_moves_its_prediction_in_the_corrected_form_only(network, given):
    change = other_image(given, 8)
    assert moved_rows(small(network), given, change)[8]
    assert not any(moved_rows(small(network, form="published"), given, change))


def test_a_spots_image_moves_itself_and_those_that_look_at_it():
    given = section()
    given["spot_graph"] = torch.zeros(9, 9).bool()
    given["spot_graph"][2, 4] = True
    assert [i for i, moved in enumerate(moved_rows(small(), given, other_image(given, 4))) if moved] == [2, 4]


@pytest.mark.parametrize("network, given", [(Asign2d, section()), (Asign3d, patient())], ids=["2d", "3d"])
def test_encoder_and_scores_get_gradients_in_the_corrected_form_only(network, given):
    for form, reached in (("corrected", True), ("published", False)):
        model = small(network, form=form).train()
        target = torch.randn(len(given["region"]), GENES, generator=torch.Generator().manual_seed(2)).double()
        scored = ~given["known"] if "known" in given else None
        asign_loss(model(**given), target, **targets(given), scored=scored)["total"].backward()
        for part in (model.encoder.conv1.weight, model.tile_attention.tile_512.key.weight, model.spot_blocks[0].score):
            assert (part.grad.norm().item() > 1e-9) == reached


@pytest.mark.parametrize("form", ["corrected", "published"])
@pytest.mark.parametrize("network, given", [(Asign2d, section()), (Asign3d, patient())], ids=["2d", "3d"])
def test_predictions_follow_a_reordering_of_spots(network, given, form):
    model = small(network, form=form)
    order = torch.randperm(len(given["region"]), generator=torch.Generator().manual_seed(7))
    spots = ("region", "tile_512_index", "tile_1024_index", "known_expression", "known")
    turned = {name: value[order] if name in spots else value for name, value in given.items()}
    turned["spot_graph"] = given["spot_graph"][order][:, order]
    torch.testing.assert_close(model(**turned).expression, model(**given).expression[order])


def test_released_order_does_not_follow_a_reordering_of_spots():
    """Why it is there for parity only."""
    model, given = small(form="published", level_order="released"), section()
    turned = {name: value.flip(0) if name.endswith("index") else value for name, value in given.items()}
    turned["spot_graph"] = given["spot_graph"].flip(0, 1)
    assert not torch.allclose(model(**turned).expression, model(**given).expression.flip(0), atol=1e-3)


@pytest.mark.parametrize("form", ["corrected", "published"])
def test_a_section_is_predicted_alike_alone_and_beside_another(form):
    model, a, b = small(form=form), section(9, 1), section(6, 2)
    both = model(**beside(a, b)).expression
    torch.testing.assert_close(both, torch.cat([model(**a).expression, model(**b).expression]))


def test_a_section_is_encoded_alike_in_pieces_and_at_once():
    given = section()
    once, pieces = small(), small(encoder_batch=4)
    torch.testing.assert_close(pieces(**given), once(**given))
    for model in (once, pieces):  # in evaluation mode: batch statistics are of a piece
        model(**given).expression.square().sum().backward()
    torch.testing.assert_close(pieces.encoder.conv1.weight.grad, once.encoder.conv1.weight.grad)


@pytest.mark.parametrize("form", ["corrected", "published"])
def test_a_section_of_one_spot_has_a_finite_prediction(form):
    given = section(1)
    assert not given["spot_graph"].any() and not given["tile_512_graph"].any()
    assert all(x.isfinite().all() for x in small(form=form)(**given))


@pytest.mark.parametrize("form", ["corrected", "published"])
def test_nodes_without_neighbours_have_finite_predictions_and_gradients(form):
    model, given = small(form=form).train(), section()
    given = {name: torch.zeros_like(x) if name.endswith("graph") else x for name, x in given.items()}
    asign_loss(model(**given), torch.zeros(9, GENES).double(), **targets(given))["total"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_spot_of_the_corrected_form_sees_its_tiles_in_3d():
    """The three resolutions inform each other in its transformer: here the graphs of spots carry nothing."""
    given = patient(known=0)
    model = small(Asign3d)
    model.tile_attention = _Nothing()
    tile = given["tile_1024_features"].clone()
    tile[given["tile_1024_index"][0]] += 1
    moved = moved_rows(model, given, {"tile_1024_features": tile})
    assert moved[0] and not all(moved)


class _Nothing(torch.nn.Module):
    def forward(self, spot: Tensor, tile_512: Tensor, tile_1024: Tensor) -> Tensor:
        return torch.zeros_like(spot)


def test_attention_weighs_the_neighbours():
    """One node of two neighbours follows the one that its score prefers; edge weights enter as factors."""
    block = GraphBlock(2, "corrected").double()
    with torch.no_grad():
        block.weight.copy_(torch.eye(2))
        block.score.copy_(torch.tensor([[2.0], [0.0]]))
    nodes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    graph = torch.tensor([[0.0, 1.0, 3.0], [0, 0, 0], [0, 0, 0]]).double()
    found = block(nodes, graph)
    e = np.exp(2.0)
    assert (found[0, 0] / found[0, 1]).item() == pytest.approx(e / 3.0)
    assert found[1].tolist() == [1, 0] and found[2].tolist() == [0, 1], "a lone node keeps its self loop"


# Propagation


def test_no_unknown_label_is_read():
    given = patient()
    hidden = given["known_expression"].clone()
    hidden[~given["known"]] = float("nan")
    model = small(Asign3d)
    torch.testing.assert_close(model(**(given | {"known_expression": hidden})), model(**given), rtol=0, atol=0)


def test_a_known_label_moves_the_spots_linked_to_it():
    given = patient()
    changed = given["known_expression"].clone()
    changed[0] += 1
    moved = moved_rows(small(Asign3d), given, {"known_expression": changed})
    assert moved[0] and all(moved[i] for i in range(11) if given["spot_graph"][i, 0] and not given["known"][i])


def test_propagation_keeps_known_rows_and_takes_the_mean_of_neighbours():
    """A chain known at its ends: 20 rounds take the middle to the straight line, up to 0.5^(20/2) of the start."""
    chain = torch.zeros(4, 4)
    for i, j in ((0, 1), (1, 2), (2, 3)):
        chain[i, j] = chain[j, i] = 1.0
    labels = torch.tensor([[-6.0], [9.0], [9.0], [-3.0]]).double()
    known = torch.tensor([True, False, False, True])
    found = propagate(labels, known, chain, "corrected")[:, 0]
    assert found[known].tolist() == [-6, -3]
    torch.testing.assert_close(found, torch.tensor([-6.0, -5, -4, -3]).double(), rtol=0, atol=1e-5)


def test_unknown_spots_start_at_the_mean_of_known_ones_or_at_zero():
    labels, known = torch.tensor([[-6.0], [-4.0], [0.0]]), torch.tensor([True, True, False])
    lone = torch.zeros(3, 3)
    assert propagate(labels, known, lone, "corrected").flatten().tolist() == [-6, -4, -5]
    assert propagate(labels, known, lone, "published").flatten().tolist() == [-6, -4, 0]


def test_with_nothing_known_the_prediction_is_the_networks_own():
    given, model = patient(known=0), small(Asign3d)
    out = model(**given)
    torch.testing.assert_close(out.expression, model.expression(out.embedding))
    assert out.expression.isfinite().all()


# Loss, learning, configuration


def test_loss_terms_by_hand():
    """Rows with correlations of 1 and -1, and one constant row that counts as 0."""
    up, down, flat = [1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [1.0, 1.0, 1.0]
    out = AsignOutput(torch.tensor([up, up]), torch.tensor([up, flat]), torch.tensor([down]), torch.zeros(2, 4))
    keywords = {
        "tile_512_target": torch.tensor([up, up]),
        "tile_1024_target": torch.tensor([up]),
        "tile_512_index": torch.tensor([0, 1]),
        "tile_1024_index": torch.tensor([0, 0]),
    }
    target = torch.tensor([down, up])
    terms = asign_loss(out, target, **keywords, weights=AsignWeights(1.0, 10.0, 100.0, 1000.0))
    # mse (4 + 0 + 4) / 6; pearson (2 + 0) / 2; tiles (0 + 1) / 2 + 2; consistency (2 + 1) / 2 + (0 + 2) / 2
    expected = {"mse": 8 / 6, "pearson": 1, "tiles": 2.5, "consistency": 2.5}
    expected["total"] = 8 / 6 + 10 + 250 + 2500
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected)
    second = asign_loss(out, target, **keywords, scored=torch.tensor([False, True]))
    assert second["mse"].item() == 0 and second["pearson"].item() == pytest.approx(0, abs=1e-6)


def test_rows_that_are_not_scored_are_not_read():
    out = small()(**(given := section()))
    target = torch.randn(9, GENES).double()
    scored = torch.arange(9) < 4
    hidden = torch.where(scored[:, None], target, float("nan"))
    expected = asign_loss(out, target, **targets(given), scored=scored)
    torch.testing.assert_close(asign_loss(out, hidden, **targets(given), scored=scored), expected)
    with pytest.raises(InputError, match="scored: it leaves no spot to learn from"):
        asign_loss(out, target, **targets(given), scored=scored & False)


def test_a_constant_row_has_a_finite_gradient():
    flat = torch.full((2, 4), 3.0, requires_grad=True)
    pearson_loss(flat, torch.full((2, 4), 1.0)).backward()
    assert flat.grad.isfinite().all()


def test_loss_refuses_targets_that_would_broadcast():
    out = small()(**(given := section()))
    with pytest.raises(InputError, match=r"target: shape is \(9, 1\); give \(9, 5\)"):
        asign_loss(out, torch.zeros(9, 1), **targets(given))
    with pytest.raises(InputError, match="tile_512_target: shape is"):
        asign_loss(out, torch.zeros(9, 5), **(targets(given) | {"tile_512_target": torch.zeros(1, 5)}))


def test_it_learns_more_than_the_best_constant():
    model, given = small(dropout=0.0).train(), section()
    target = torch.randn(9, GENES, generator=torch.Generator().manual_seed(2)).double() - 5.5
    model.start_at(target.mean(0))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(50):
        terms = asign_loss(model(**given), target, **targets(given), weights=AsignWeights(1, 0, 0, 0))
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
    assert terms["mse"] < 0.5 * target.var(0, correction=0).mean()


@pytest.mark.parametrize("network, given", [(Asign2d, section()), (Asign3d, patient())], ids=["2d", "3d"])
def test_needs_are_the_keywords_of_forward_and_of_the_loss(network, given):
    assert set(given) - {"region"} == set(network.needs)
    assert set(targets(given)) == set(network.loss_needs)
    assert network.whole_section


def test_a_network_started_at_a_profile_differs_from_it_only_by_what_its_features_add():
    model, profile = small(), torch.tensor([-6.0, 0.0, 2.5, 1.0, -1.0]).double()
    model.start_at(profile)
    torch.nn.init.zeros_(model.head.weight)
    torch.testing.assert_close(model(**section()).expression, profile.expand(9, 5))


def test_bfloat16_autocast_keeps_expression_in_float32():
    model, given = small().float().train(), section()
    model.start_at(torch.full((GENES,), -6.0))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**given)
    assert {x.dtype for x in out} == {torch.float32}
    assert (out.expression != out.expression.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_genes": 0}, "n_genes: 0 is not a whole number of at least 1"),
        ({"heads": 7}, "heads: 7 does not divide feature_dim=1024"),
        ({"dropout": 1.0}, r"dropout: 1.0 is outside \[0, 1\)"),
        ({"form": "fixed"}, "form: 'fixed' is unknown; use one of corrected, published"),
        ({"level_order": "mixed"}, "level_order: 'mixed' is unknown; use one of ordered, released"),
        ({"level_order": "released"}, "level_order: 'released' mixes nodes up; use it with form='published' only"),
    ],
)
def test_bad_configuration_says_what_is_allowed(changes, message):
    with pytest.raises(InputError, match=message):
        AsignConfig(**({"n_genes": 250} | changes))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"region": torch.zeros(9, 3, 36, 36)}, "region: dtype is torch.float32; give uint8"),
        ({"spot_graph": torch.zeros(8, 8)}, r"spot_graph: shape is \(8, 8\); give \(9, 9\)"),
        ({"tile_512_features": torch.zeros(4, 8)}, r"tile_512_features: shape is \(4, 8\); give \(M512, 16\)"),
        ({"tile_1024_index": torch.zeros(4, dtype=torch.int64)}, r"tile_1024_index: shape is \(4,\); give \(9\)"),
    ],
)
def test_inputs_of_another_dtype_or_shape_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        small()(**(section() | change))


def test_a_tiles_counts_are_the_sum_over_its_spots():
    counts = torch.tensor([[1, 0], [2, 5], [4, 1]])
    assert tile_sums(counts, torch.tensor([1, 0, 1]), 3).tolist() == [[2, 5], [5, 1], [0, 0]]
