"""Tiles and graphs of ASIGN: which tile holds a spot, who is a neighbour, and who is when all are equally near."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peers
from hifusion.errors import InputError
from hifusion.models.asign_graphs import circle_overlap, nearest_graph, radius_graph, stack_graph, tiles_of

PLACES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=15)


@given(places=PLACES, k=st.integers(1, 9), radius=st.floats(0.5, 4))
def test_graphs_are_the_fabricators_own(golden_root: Path, places, k, radius):
    """On whole numbers, where ties are the rule."""
    fabricate = peers.fabricator(golden_root, "fabricate_peers")
    positions = np.array(places, dtype=np.float64)
    k = min(k, len(places) - 1)
    np.testing.assert_array_equal(nearest_graph(torch.tensor(positions), k), fabricate.knn(positions, k))
    np.testing.assert_array_equal(
        radius_graph(torch.tensor(positions), radius), fabricate.radius_graph(positions, radius)
    )


def test_ties_go_to_the_lower_index():
    """Four corners around a middle spot, all equally far from it."""
    positions = torch.tensor([[0, 0], [2, 0], [1, 1], [0, 2], [2, 2]])
    assert nearest_graph(positions, 2)[2].tolist() == [True, True, False, False, False]


def test_spots_have_as_many_neighbours_as_there_are():
    assert nearest_graph(torch.zeros(1, 2)).tolist() == [[False]]
    graph = nearest_graph(torch.tensor([[0.0, 0], [1, 0], [9, 9]]))
    assert torch.equal(graph, ~torch.eye(3).bool())


def test_a_tile_within_has_twelve_neighbours():
    tiles = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    assert radius_graph(tiles).sum(1)[24].item() == 12


def test_tiles_hold_their_spots_and_lie_row_by_row():
    centres = torch.tensor([[600.0, 10], [10, 600], [511.9, 0], [520, 500]])
    tiles, row = tiles_of(centres, (1024, 1024), 512)
    assert tiles.tolist() == [[0, 0], [1, 0], [0, 1]]
    assert row.tolist() == [1, 2, 0, 1]


def test_a_spot_past_the_last_full_tile_gets_the_nearest():
    centres = torch.tensor([[1100.0, 100], [1199, 700]])
    tiles, row = tiles_of(centres, (1200, 800), 512)
    assert tiles.tolist() == [[1, 0]] and row.tolist() == [0, 0]
    assert tiles_of(centres, (1200, 800), 1024).tiles.tolist() == [[0, 0]]


@given(
    places=st.lists(st.tuples(st.floats(0, 3000), st.floats(0, 2000)), min_size=1, max_size=20),
    tile_px=st.integers(1, 4000),
)
def test_every_spot_has_a_full_tile_of_the_slide(places, tile_px):
    tiles, row = tiles_of(torch.tensor(places), (3000, 2000), tile_px)
    assert len(row) == len(places) and sorted(set(row.tolist())) == list(range(len(tiles)))
    if tile_px <= 2000:
        assert ((tiles + 1) * tile_px <= torch.tensor([3000, 2000])).all() and (tiles >= 0).all()
    else:
        assert tiles[:, 1].tolist() == [0] * len(tiles)


def test_a_spot_outside_the_slide_is_named():
    with pytest.raises(InputError, match=r"centres_px: \(5, 900\) is outside the slide of 100 x 800 px"):
        tiles_of(torch.tensor([[1.0, 2], [5, 900]]), (100, 800), 512)


@given(distance=st.floats(0, 5))
def test_overlap_is_that_of_two_circles(distance):
    """Against the share of points of a fine grid that lie in both, of those in either."""
    axis = torch.linspace(-1, 6, 701)
    x, y = torch.meshgrid(axis, axis[:201], indexing="ij")
    a, b = x**2 + y**2 <= 1, (x - distance) ** 2 + y**2 <= 1
    expected = (a & b).sum() / (a | b).sum()
    assert circle_overlap(torch.tensor(distance), 1.0).item() == pytest.approx(expected.item(), abs=0.01)


def test_a_stack_joins_spots_to_the_nearest_within_and_the_most_alike_across():
    positions = torch.tensor([[0.0, 0], [1, 0], [5, 0], [0, 0], [1, 0], [5, 0]])
    section = torch.tensor([7, 7, 7, 2, 2, 2])
    # All alike but the last spot of each section, which is alike only to the other section's first.
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]])
    graph = stack_graph(positions, section, features, radius=2.0, across=1, within=1)
    assert torch.equal(graph, graph.T) and not graph.diagonal().any()
    within = {(i, j) for i in range(6) for j in range(i) if graph[i, j] and section[i] == section[j]}
    across = {(i, j) for i in range(6) for j in range(i) if graph[i, j] and section[i] != section[j]}
    assert within == {(1, 0), (2, 1), (4, 3), (5, 4)}
    # 0, 1 and 4 are alike and overlap. 2 is alike to 3, and lies on 5: a tie. So do 3, with 2 and 0, and 5, with all.
    assert across == {(4, 0), (4, 1), (3, 2), (3, 0), (5, 0)}


@given(places=PLACES, sections=st.integers(1, 3), seed=st.integers(0, 100))
def test_a_stack_is_symmetric_and_every_spot_that_can_has_neighbours(places, sections, seed):
    positions = torch.tensor(places, dtype=torch.float64)
    section = torch.arange(len(places)) % sections
    features = torch.randn(len(places), 3, generator=torch.Generator().manual_seed(seed))
    graph = stack_graph(positions, section, features, 1.0)
    assert torch.equal(graph, graph.T) and not graph.diagonal().any()
    assert (graph.sum(1) > 0).all() == (len(places) > 1)
