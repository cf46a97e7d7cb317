"""Batches, augmentation and the split of a section's spots."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hifusion.data import BLOCK_PITCHES, SpotBatch, ahead, batches, flip_and_turn, read_regions, split_spots
from hifusion.errors import InputError
from views import array_px, make_view, numbered_views


def draw(sizes: list[int], batch_size: int, by_section: bool, augment: bool, seed: int) -> list[SpotBatch]:
    generator = torch.Generator().manual_seed(seed)
    return list(
        batches(
            numbered_views(sizes),
            [np.arange(spots) for spots in sizes],
            batch_size=batch_size,
            by_section=by_section,
            augment=augment,
            generator=generator,
        )
    )


def planted(batch: SpotBatch) -> np.ndarray:
    """The number that the pixels of each region carry (hifusion tests: `views.numbered_views`)."""
    pixel = batch.region[:, :, 0, 0].numpy().astype(int)
    return 100 * pixel[:, 0] + pixel[:, 1]


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    batch_size=st.integers(2, 9),
    by_section=st.booleans(),
    augment=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_spot_comes_once_with_its_own_target(
    sizes: list[int], batch_size: int, by_section: bool, augment: bool, seed: int
) -> None:
    drawn = draw(sizes, batch_size, by_section, augment, seed)
    expected = sorted(100 * place + row for place, spots in enumerate(sizes) for row in range(spots))
    assert sorted(np.concatenate([planted(batch) for batch in drawn])) == expected
    for batch in drawn:
        assert (planted(batch) == batch.target[:, 0].numpy()).all()


@settings(max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=4), batch_size=st.integers(2, 9), seed=st.integers(0, 99)
)
def test_batches_by_section_hold_one_section_and_never_leave_a_spot_alone(
    sizes: list[int], batch_size: int, seed: int
) -> None:
    alone = 0
    sections = []
    for batch in draw(sizes, batch_size, by_section=True, augment=False, seed=seed):
        places = set(planted(batch) // 100)
        assert len(places) == 1
        sections.append(places.pop())
        assert len(batch.target) <= batch_size + 1
        alone += len(batch.target) == 1
    assert alone == sizes.count(1)  # only a section of one spot makes a batch of one
    changes = np.count_nonzero(np.diff(sections))
    assert changes == len(sizes) - 1  # a section is finished before the next begins


@pytest.mark.parametrize("spots, sizes", [(16, [8, 8]), (17, [8, 9]), (18, [8, 8, 2]), (1, [1]), (9, [9])])
def test_a_last_single_spot_joins_the_batch_before(spots: int, sizes: list[int]) -> None:
    assert [len(batch.target) for batch in draw([spots], 8, False, False, 0)] == sizes


def test_only_the_chosen_rows_are_used() -> None:
    views = numbered_views([6, 5])
    rows = [np.array([1, 4]), np.array([0, 3, 2])]
    drawn = batches(
        views, rows, batch_size=8, by_section=False, augment=True, generator=torch.Generator().manual_seed(0)
    )
    assert sorted(np.concatenate([planted(batch) for batch in drawn])) == [1, 4, 100, 102, 103]


def test_order_and_turns_follow_the_generator() -> None:
    views = [make_view("A1", 20)]

    def regions(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = batches(views, [np.arange(20)], batch_size=8, by_section=False, augment=True, generator=generator)
        return [batch.region for batch in drawn]

    first, again, other = regions(1), regions(1), regions(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_mixed_batches_hold_several_sections() -> None:
    drawn = draw([12, 12], 12, by_section=False, augment=False, seed=0)
    assert all(len(set(planted(batch) // 100)) == 2 for batch in drawn)


def test_batches_are_channels_last_bytes_and_single_precision_targets() -> None:
    batch = draw([4], 4, False, True, 0)[0]
    assert batch.region.dtype == torch.uint8 and batch.target.dtype == torch.float32
    assert batch.region.shape == (4, 3, 2, 2) and batch.target.shape == (4, 1)
    assert batch.region.is_contiguous(memory_format=torch.channels_last)


def test_regions_come_in_the_order_asked_for() -> None:
    view = make_view("A1", 9)
    rows = np.array([7, 0, 3, 3])
    assert view.regions is not None
    assert np.array_equal(read_regions(view, rows).permute(0, 2, 3, 1).numpy(), view.regions[rows])


def test_a_counts_only_section_has_no_regions_to_read() -> None:
    with pytest.raises(InputError, match="A1 has no region patches"):
        read_regions(make_view("A1", 4, regions=None), np.arange(2))


CHOICES = torch.tensor([[bool(i & 1), bool(i & 2), bool(i & 4)] for i in range(8)])


def test_flips_and_turns_cover_the_eight_symmetries_of_a_square() -> None:
    patch = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(1, 3, 4, 4)
    turned = flip_and_turn(patch.expand(8, -1, -1, -1), CHOICES)
    square = [patch[0].rot90(turns, (1, 2)) for turns in range(4)]
    symmetries = {tuple(side.flatten().tolist()) for one in square for side in (one, one.flip(2))}
    assert len(symmetries) == 8
    assert {tuple(one.flatten().tolist()) for one in turned} == symmetries


def test_flips_and_turns_do_what_their_column_says() -> None:
    patch = torch.arange(3 * 4 * 4, dtype=torch.uint8).reshape(1, 3, 4, 4)
    left_right, up_down, turn = (flip_and_turn(patch, choice[None]) for choice in torch.eye(3, dtype=torch.bool))
    assert torch.equal(left_right, patch.flip(3))
    assert torch.equal(up_down, patch.flip(2))
    assert torch.equal(turn, patch.rot90(1, (2, 3)))


def test_flips_and_turns_commute_with_the_centre_crop() -> None:
    """So the spot patch, which the network crops, turns with its region."""
    region = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8)
    assert torch.equal(flip_and_turn(region, CHOICES)[:, :, 3:9, 3:9], flip_and_turn(region[:, :, 3:9, 3:9], CHOICES))


def test_turning_leaves_the_given_regions_alone() -> None:
    region = torch.randint(0, 256, (8, 3, 6, 6), dtype=torch.uint8)
    before = region.clone()
    flip_and_turn(region, CHOICES)
    assert torch.equal(region, before)


@settings(max_examples=50)
@given(
    spots=st.integers(20, 120),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 1000),
    jitter=st.floats(0, 8),
)
def test_a_split_is_complete_disjoint_near_the_fraction_and_by_whole_blocks(
    spots: int, fraction: float, seed: int, jitter: float
) -> None:
    centres = array_px(spots, side=10) + np.random.default_rng(seed).uniform(-jitter, jitter, (spots, 2))
    view = replace(make_view("A1", 4), centres_px=centres)
    training, validation = split_spots(view, fraction, seed)
    assert sorted([*training, *validation]) == list(range(spots))
    assert len(training) and len(validation)
    assert (np.diff(training) > 0).all() and (np.diff(validation) > 0).all()

    block = np.floor((centres - centres.min(axis=0)) / (BLOCK_PITCHES * view.pitch_px)).astype(int)
    of_training, of_validation = ({tuple(b) for b in block[rows]} for rows in (training, validation))
    assert not of_training & of_validation
    largest = np.unique(block, axis=0, return_counts=True)[1].max()
    assert len(validation) <= max(fraction * spots, largest)
    assert len(validation) > fraction * spots - largest  # one block more would be too many


def test_a_split_follows_its_seed() -> None:
    view = make_view("A1", 36, centres_px=array_px(100, side=10))
    same = [split_spots(view, 0.2, seed=5)[1] for _ in range(2)]
    assert np.array_equal(*same)
    assert len({tuple(split_spots(view, 0.2, seed)[1]) for seed in range(8)}) > 4


def test_a_section_of_one_block_cannot_be_split() -> None:
    with pytest.raises(InputError, match="A1: its 9 spots lie in one block and cannot be split; give a validation"):
        split_spots(make_view("A1", 9, centres_px=array_px(9, side=3)), 0.2, 0)


def test_items_made_ahead_are_the_same_in_the_same_order() -> None:
    made: list[int] = []

    def making() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    items = ahead(making(), 2)
    assert next(items) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:  # two wait, the third is at the door
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4
    assert list(items) == list(range(1, 20))


def test_what_goes_wrong_while_items_are_made_ahead_is_raised_in_its_turn() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise InputError("the slide is gone")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(InputError, match="the slide is gone"):
        next(items)


def test_no_thread_is_left_where_items_made_ahead_are_not_all_taken() -> None:
    before = threading.active_count()
    items = ahead(iter(range(1000)))
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
