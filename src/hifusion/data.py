"""Batches of region patches and their expression, augmentation, and the split of a section's spots."""

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hifusion.cohort import SectionView
from hifusion.errors import InputError
from hifusion.ranks import ALONE, Share
from hifusion.slide import Slide

T = TypeVar("T")

# Side of a validation block: wider than a region patch reaches, so that most of a block sees no training pixel.
BLOCK_PITCHES = 3.0


class SpotBatch(NamedTuple):
    """Spots of one training step."""

    region: Tensor
    """uint8 ``(B, 3, R, R)``, channels last in memory."""
    target: Tensor
    """float32 ``(B, G)``."""
    parts: list[tuple[SectionView, np.ndarray]]
    """Sections and rows of the spots, in order."""
    of: int
    """Spots of the whole batch, of which these may be a share."""


def read_regions(view: SectionView, rows: np.ndarray, region_px: int | None = None) -> Tensor:
    """Region patches of some spots, uint8 ``(B, 3, R, R)``, channels last in memory as they are on disk.

    Parameters
    ----------
    region_px
        Side R of the middle to take of patches that are larger; their whole where None.
    """
    if view.regions is None:
        raise InputError(f"section {view.name} has no region patches; only counts-based models can use it")
    side = view.regions.shape[1] if region_px is None else region_px
    start = (view.regions.shape[1] - side) // 2
    # One row at a time in file order: the memory map then reads each page once.
    pixels = np.empty((len(rows), side, side, 3), dtype=np.uint8)
    for to in np.argsort(rows):
        pixels[to] = view.regions[rows[to], start : start + side, start : start + side]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class _SlidePatches(Dataset[Tensor | str]):
    """Batches of region patches around positions of a slide, read in the process that asks for them."""

    def __init__(self, slide: Slide, batches: Sequence[np.ndarray], region_px: int, shrink: float) -> None:
        self.slide, self.batches, self.region_px, self.shrink = slide, batches, region_px, shrink

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor | str:
        # What goes wrong in a worker comes back as the message: raised there, torch would wrap it in a traceback.
        try:
            return slide_patches(self.slide, self.batches[index], self.region_px, self.shrink)
        except InputError as error:
            return str(error)


def slide_patches(slide: Slide, centres_px: np.ndarray, side_px: int, shrink: float) -> Tensor:
    """Patches around a few positions of a slide, uint8 ``(B, 3, side_px, side_px)``, channels last in memory.

    Parameters
    ----------
    centres_px
        (x, y) in full-resolution pixels, ``(B, 2)``.
    shrink
        Full-resolution pixels per patch pixel.
    """
    return torch.from_numpy(slide.read_patches(centres_px, side_px, shrink)).permute(0, 3, 1, 2)


def slide_regions(
    slide: Path | Slide, centres_px: np.ndarray, *, region_px: int, shrink: float, batch_size: int, workers: int = 0
) -> Iterator[Tensor]:
    """Region patches around positions of a slide, in order: batches of uint8 ``(B, 3, R, R)``, channels last in memory.

    Parameters
    ----------
    slide
        Its file; or a slide, which then is not decoded anew for each kind of region that is read of it.
    centres_px
        (x, y) in full-resolution pixels, ``(N, 2)``.
    shrink
        Full-resolution pixels per region pixel.
    workers
        Processes that read ahead, two batches each; 0 reads in this one, as is done in any case with a slide that is
        decoded whole (JPEG, PNG): a patch then costs next to nothing.

    Raises
    ------
    InputError
        The slide cannot be read.
    """
    groups = [centres_px[start : start + batch_size] for start in range(0, len(centres_px), batch_size)]
    opened = slide if isinstance(slide, Slide) else Slide(slide)
    patches = _SlidePatches(opened, groups, region_px, shrink)
    decoded_whole = opened.image.reader == "pillow"
    for region in DataLoader(patches, batch_size=None, num_workers=0 if decoded_whole else workers):
        if isinstance(region, str):
            raise InputError(region)
        yield region


def batches(
    views: Sequence[SectionView],
    rows: Sequence[np.ndarray],
    *,
    batch_size: int,
    by_section: bool,
    augment: bool,
    generator: torch.Generator,
    region_px: int | None = None,
    share: Share = ALONE,
) -> Iterator[SpotBatch]:
    """Every chosen spot once, in an order and with turns drawn from ``generator``.

    Parameters
    ----------
    views
        Sections with region patches.
    rows
        For each view, the spots to use.
    by_section
        Keep the spots of a batch within one section, sections in random order; else mix them.
    region_px
        See :func:`read_regions`.
    share
        Whose rows of every batch are wanted, of those who draw the same batches; only these are read.
    """
    owner = np.concatenate([np.full(len(chosen), i) for i, chosen in enumerate(rows)])
    spot = np.concatenate(rows)
    order = torch.randperm(len(spot), generator=generator).numpy()
    if by_section:
        rank = torch.randperm(len(views), generator=generator).numpy()
        order = order[np.argsort(rank[owner[order]], kind="stable")]
        groups = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    else:
        groups = [order]
    for group in groups:
        for chosen in _chunks(group, batch_size):
            of = len(chosen)
            choice = torch.rand(of, 3, generator=generator) < 0.5 if augment else None
            own = share.rows(of)
            chosen = chosen[np.argsort(owner[chosen], kind="stable")][own]
            parts = [(views[i], spot[chosen][owner[chosen] == i]) for i in np.unique(owner[chosen])]
            region = torch.cat([read_regions(view, its, region_px) for view, its in parts])
            target = np.concatenate([view.expression[its] for view, its in parts])
            if choice is not None:
                region = flip_and_turn(region, choice[own])
            yield SpotBatch(region.contiguous(memory_format=torch.channels_last), torch.from_numpy(target), parts, of)


def ahead(items: Iterable[T], count: int = 2) -> Iterator[T]:
    """The same items, up to ``count`` of them made ahead by a thread while the one before is worked on.

    What making one raises is raised here, in its turn.
    """
    made: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return made.put((item, error), timeout=0.1)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item, None)
                if stopped.is_set():
                    return
            put(None, StopIteration())
        except Exception as error:  # noqa: BLE001  # raised in the thread that works
            put(None, error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    """Pieces of ``size``; a last piece of one spot joins the one before, since batch norm cannot learn from one."""
    pieces = [order[start : start + size] for start in range(0, len(order), size)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [np.concatenate(pieces[-2:])]
    return pieces


def flip_and_turn(region: Tensor, choice: Tensor) -> Tensor:
    """Flip left-right, flip up-down, turn by 90 degrees: each patch as ``choice`` (bool ``(B, 3)``) says.

    Any of them commutes with the centre crop, so the spot patch turns with its region.
    """
    turned = torch.empty_like(region)
    # One patch at a time: it stays in the processor's caches, and the time of a selection by mask is not spent.
    for patch, out, (left_right, up_down, quarter) in zip(region, turned, choice.tolist(), strict=True):
        patch = patch.flip(2) if left_right else patch
        patch = patch.flip(1) if up_down else patch
        out.copy_(patch.rot90(1, (1, 2)) if quarter else patch)
    return turned


def split_spots(view: SectionView, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split one section into training and validation spots, block by block.

    Regions of neighbouring spots share pixels, so single spots drawn at random would be validated on what was seen in
    training. Blocks of :data:`BLOCK_PITCHES` pitches are drawn until ``fraction`` of the spots is reached.

    Returns
    -------
    training, validation
        Sorted row numbers; neither is empty.

    Raises
    ------
    InputError
        The section is too small to be split.
    """
    block = blocks(view)
    order = np.random.default_rng(seed).permutation(block.max() + 1)
    sizes = np.bincount(block)[order]
    taken = order[: max(1, int(np.searchsorted(np.cumsum(sizes), fraction * len(block), side="right")))]
    held_out = np.isin(block, taken)
    if held_out.all():
        raise InputError(
            f"section {view.name}: its {len(block)} spots lie in one block and cannot be split; "
            "give a validation section"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def blocks(view: SectionView) -> np.ndarray:
    """The square block of :data:`BLOCK_PITCHES` pitches that each spot lies in, numbered from 0, int64 ``(N,)``."""
    return block_numbers(view.centres_px - view.centres_px.min(axis=0), view.pitch_px)


def block_numbers(positions_px: np.ndarray, pitch_px: float) -> np.ndarray:
    """As :func:`blocks`, of positions ``(N, 2)`` counted from wherever the first block is to begin."""
    cells = np.floor(positions_px / (BLOCK_PITCHES * pitch_px)).astype(int)
    return np.unique(cells, axis=0, return_inverse=True)[1].ravel()
