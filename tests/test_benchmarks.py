"""The yardstick of the benchmarks is the network it is said to be."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import Published, published_loss
from benchmarks.clock import GFLOP, in_turn
from hifusion.models.hifusion import HiFusion, HiFusionConfig

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def published() -> Published:
    return Published(250).eval()


def test_the_published_recipe_has_the_weights_and_the_work_of_the_network(published: Published) -> None:
    ours = HiFusion(HiFusionConfig(n_genes=250))
    assert sum(its.numel() for its in published.parameters()) == sum(its.numel() for its in ours.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        published(torch.randn(1, 3, 448, 448), torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() / 1e9 == pytest.approx(GFLOP, rel=2e-3)


def test_its_levels_are_the_tiles_of_a_spot_seen_on_their_own(published: Published) -> None:
    spot = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = published._level(spot, 7)
        spot[:, :, :32, 32:64] += 1
        moved = (published._level(spot, 7) != before).any(1)[0]
    assert before.shape == (1, 512, 7, 7)
    assert moved.nonzero().tolist() == [[0, 1]]


def test_its_loss_is_that_of_the_released_code() -> None:
    expression, levels, maps = torch.ones(2, 3), torch.zeros(3, 2, 3), torch.arange(3.0).view(3, 1, 1, 1, 1)
    assert published_loss((expression, levels, maps), torch.zeros(2, 3)) == pytest.approx(1 + 0 + 0.5 * (1 + 2))


def test_candidates_take_turns() -> None:
    order: list[str] = []
    in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3


def test_an_unknown_part_is_named_with_those_there_are() -> None:
    command = [sys.executable, "-m", "benchmarks", "--parts", "network,engine"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no part engine; there are network, data" in done.stderr
