"""The grid that TRIPLEX puts a section's spots on, and the mask of the tiles around a spot."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peers
from hifusion.errors import InputError
from hifusion.models.triplex_blocks import from_grid, on_grid
from hifusion.models.triplex_grid import grid_cells, neighbour_mask

PLACES = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 4000)), min_size=1, max_size=30)


def test_published_grids_have_the_published_sizes(golden_root: Path):
    fabricate = peers.fabricator(golden_root, "fabricate_peers")
    expected = peers.figures(golden_root, "triplex")
    batch = fabricate.triplex_batch(peers.seed_of(expected, fabricate))
    for k, (columns, rows) in enumerate(expected["eval_grid"]):
        cells = grid_cells(torch.tensor(batch[f"position_{k}"]))
        assert cells.amax(0).tolist() == [columns - 1, rows - 1]


@given(places=PLACES)
def test_published_cells_follow_the_published_rule(places):
    """Columns: distinct values of round(x / 20); place in them by the share of the width, rounded half to even."""
    positions = np.array(places, dtype=np.float64)
    offset = positions - positions.min(0)
    values = np.array([len(np.unique(np.round(axis / 20))) for axis in positions.T])
    expected = np.round(offset / (np.ptp(positions, axis=0) + 1e-5) * (values - 1)).astype(int)
    np.testing.assert_array_equal(grid_cells(torch.tensor(positions)), expected)


@pytest.mark.parametrize("rule", ["published", "pitch", "array"])
@given(places=PLACES)
def test_cells_start_at_zero_and_follow_a_reordering_of_spots(rule, places):
    positions = torch.tensor(places)
    cells = grid_cells(positions, rule)
    assert cells.dtype == torch.int64 and cells.amin(0).tolist() == [0, 0]
    assert torch.equal(grid_cells(positions.flip(0), rule), cells.flip(0))


def test_pitch_finds_the_lattice_under_jitter_and_an_offset():
    rng = np.random.default_rng(0)
    lattice = np.stack(np.meshgrid(np.arange(60), np.arange(5)), -1).reshape(-1, 2)
    places = torch.tensor(1000 + 280.0 * lattice + rng.uniform(-20, 20, lattice.shape))
    places[0], places[59] = torch.tensor([1000.0, 1000.0]), torch.tensor([1000.0 + 280 * 59, 1000.0])
    np.testing.assert_array_equal(grid_cells(places, "pitch"), lattice)
    assert grid_cells(places).amax() > 59, "the published rule finds more columns than there are"


def test_visium_columns_are_halved_so_that_six_neighbours_are_adjacent():
    column, row = np.array([(c, r) for r in range(6) for c in range(r % 2, 12, 2)]).T
    cells = grid_cells(torch.tensor(np.stack([column + 10, row + 3], 1)), "array").numpy()
    assert cells.max(0).tolist() == [5, 5]
    at = {(c, r): cell for c, r, cell in zip(column, row, cells, strict=True)}
    for dc, dr in ((2, 0), (-2, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)):
        assert np.abs(at[6, 2] - at[6 + dc, 2 + dr]).max() == 1


def test_a_full_array_keeps_its_columns():
    places = torch.tensor([[3, 1], [4, 1], [6, 1], [3, 2]])
    assert grid_cells(places, "array").tolist() == [[0, 0], [1, 0], [3, 0], [0, 1]]


@pytest.mark.parametrize("rule", ["published", "pitch", "array"])
def test_spots_in_one_place_share_one_cell(rule):
    assert grid_cells(torch.tensor([[70.0, 90.0]] * 3), rule).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize(
    "positions", [torch.zeros(0, 2), torch.tensor([[0.0, float("nan")]])], ids=["no spot", "not finite"]
)
def test_positions_without_a_grid_are_refused(positions):
    with pytest.raises(InputError, match=r"positions: \d spots, not all finite"):
        grid_cells(positions)


def test_tokens_of_one_cell_are_averaged_and_read_back():
    cells = torch.tensor([[0, 0], [2, 1], [2, 1]])  # (column, row)
    tokens = torch.tensor([[1.0, -1.0], [2.0, 5.0], [4.0, 7.0]])
    grid = on_grid(tokens, cells)
    assert grid.shape == (1, 2, 2, 3)
    assert grid[0, 0].tolist() == [[1, 0, 0], [0, 0, 3]]
    assert from_grid(grid, cells).tolist() == [[1, -1], [3, 6], [3, 6]]


def mask_of(x: float, y: float, **settings: float) -> list[list[int]]:
    return neighbour_mask(torch.tensor([[x, y]]), (2000, 1500), **settings).view(5, 5).int().tolist()


def test_a_window_inside_the_slide_is_all_on_it():
    assert mask_of(1000, 750) == [[1] * 5] * 5


def test_lines_of_tiles_past_an_edge_are_off_the_slide():
    """Tiles of 224 px: the outer line reaches 560 px from the centre, the inner one 336 px."""
    assert mask_of(559, 750) == [[0, 1, 1, 1, 1]] * 5
    assert mask_of(560, 750) == [[1] * 5] * 5
    assert mask_of(335, 750) == [[0, 0, 1, 1, 1]] * 5
    assert mask_of(1441, 750) == [[1, 1, 1, 1, 0]] * 5
    assert mask_of(1000, 400) == [[0] * 5] + [[1] * 5] * 4
    assert mask_of(1000, 1165) == [[1] * 5] * 3 + [[0] * 5] * 2


@given(x=st.floats(-100, 2100), y=st.floats(-100, 1600), tile=st.floats(1, 2000))
def test_the_spots_own_tile_is_never_masked(x, y, tile):
    assert mask_of(x, y, tile_px=tile)[2][2] == 1


def test_half_the_scale_is_half_the_reach():
    assert mask_of(279, 750, tile_px=112) == [[0, 1, 1, 1, 1]] * 5
    assert mask_of(280, 750, tile_px=112) == [[1] * 5] * 5
