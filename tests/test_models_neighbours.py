"""The neighbour graph against the published one, its ties, and its size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import classics
from hifusion.errors import InputError
from hifusion.models import neighbours
from hifusion.models.neighbours import GraphLayer, neighbour_graph


@pytest.mark.parametrize("pruning, name", [("none", "graph_na"), ("grid", "graph_grid"), ("std", "graph_std")])
def test_graph_agrees_with_the_published_code(golden_root, pruning, name):
    fabricate, expected = classics.fabricator(golden_root), classics.figures(golden_root, "hist2st")
    seed, spots, radius = int(expected["seed"]), int(expected["spots"]), expected["section_patch"].shape[-1] // 2
    cut = fabricate.section_inputs(seed, spots, radius=radius)
    graph = neighbour_graph(torch.tensor(cut["loose"]), k=4, pruning=pruning)
    assert np.array_equal(graph, expected[name].astype(bool))


def test_inner_spots_of_a_square_lattice_have_their_four_neighbours():
    x, y = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    graph = neighbour_graph(torch.stack([x.ravel(), y.ravel()], 1))
    assert graph[12].nonzero().ravel().tolist() == [7, 11, 13, 17]


def test_equal_distances_are_taken_by_index_and_a_twin_is_not_the_spot_itself():
    square = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    assert neighbour_graph(square, k=1).nonzero()[:, 1].tolist() == [1, 0, 0, 1]
    twins = torch.tensor([[3, 3], [3, 3], [9, 9]])
    assert neighbour_graph(twins, k=1).tolist() == [[False, True, False], [True, False, False], [False] * 3]


def test_grid_keeps_what_lies_within_the_radius_and_may_keep_none():
    line = torch.tensor([[0, 0], [2, 0], [5, 0]])
    assert neighbour_graph(line).tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert neighbour_graph(line, radius=3.0).sum(1).tolist() == [1, 2, 1]


@given(
    places=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20),
    k=st.integers(1, 6),
)
def test_every_spot_has_k_nearest_others(places, k):
    position = torch.tensor(places)
    graph, n = neighbour_graph(position, k=k, pruning="none"), len(places)
    assert graph.shape == (n, n) and not graph.diagonal().any()
    assert (graph.sum(1) == min(k, n - 1)).all()
    distance = torch.cdist(position.double(), position.double()).fill_diagonal_(torch.inf)
    for row, chosen in zip(distance, graph, strict=True):
        if chosen.any():
            left = row[~chosen]
            assert row[chosen].max() <= left.min()


def test_rows_are_done_in_pieces_without_a_change(monkeypatch):
    position = torch.randint(0, 30, (50, 2), generator=torch.Generator().manual_seed(0))
    whole = neighbour_graph(position)
    monkeypatch.setattr(neighbours, "_ROWS", 7)
    assert torch.equal(neighbour_graph(position), whole)


@pytest.mark.parametrize(
    "position, pruning, message",
    [
        (torch.zeros(3), "grid", r"position: shape is \(3,\); give \(N, 2\)"),
        (torch.zeros(3, 2), "NA", "pruning: 'NA' is unknown; use one of grid, none, std"),
    ],
)
def test_what_is_no_section_or_no_pruning_is_refused(position, pruning, message):
    with pytest.raises(InputError, match=message):
        neighbour_graph(position, pruning=pruning)


@pytest.mark.parametrize("policy", ["mean", "max"])
def test_layer_pools_neighbours_only_and_scales_to_length_1(policy):
    layer = GraphLayer(2, policy)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(2))
    x = torch.tensor([[8.0, 1.0], [1.0, 4.0], [5.0, 2.0]])
    adjacency = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    first = [3.0, 3.0] if policy == "mean" else [5.0, 4.0]
    expected = torch.nn.functional.normalize(torch.tensor([first, [8.0, 1.0], [5.0, 2.0]]))
    torch.testing.assert_close(layer(x, adjacency), expected)
    layer.isolated = "zero"
    assert not layer(x, adjacency)[2].any()
