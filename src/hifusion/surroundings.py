"""What networks see beside a spot's own patch: other spots of the section, the slide around it, measured spots.

Everything here comes from positions and pixels, and from expression of TRAINING spots alone; of a tested section no
measurement is looked at.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hifusion import data
from hifusion.appearance import Progress, seen_of
from hifusion.cohort import SectionView
from hifusion.configuration import Recipe
from hifusion.encoders import Encoder, load_encoder
from hifusion.errors import InputError
from hifusion.expression import normalisation
from hifusion.features import spot_features, window_features
from hifusion.frames import Frames
from hifusion.inference import SpotOutputs, forward_batches
from hifusion.models import BY_SPOT, MODELS
from hifusion.models.asign_graphs import nearest_graph, radius_graph, stack_graph, tile_sums, tiles_of
from hifusion.models.counts import size_factors
from hifusion.models.exemplars import nearest_exemplars
from hifusion.models.neighbours import neighbour_graph
from hifusion.models.steps import Batch
from hifusion.models.triplex_grid import NEIGHBOURS, grid_cells, neighbour_mask
from hifusion.ranks import ALONE, Share
from hifusion.registration import common_frame
from hifusion.slide import Slide

Spots = tuple[SectionView, np.ndarray]
"""Some spots of a section, by row."""

# Sides of ASIGN's tiles in spot patches of 224 px, and of the share of spots whose expression it is given in training.
TILE_SIDES = {"tile_512": 512 / 224, "tile_1024": 1024 / 224}
KNOWN_SHARE = 0.25
EXEMPLARS = 6


class Surroundings:
    """What one network is given, for the training and the tested sections of one fold.

    Parameters
    ----------
    recipe
        Names the network and the frozen encoder; the network's configuration has its final sizes.
    train
        The training spots.
    frames, patients
        Of the run, see :class:`hifusion.frames.Frames`, and whom it was trained on.

    Raises
    ------
    InputError
        The network looks at training spots, and there are none.
    """

    def __init__(
        self,
        recipe: Recipe,
        train: Sequence[Spots],
        frames: Frames | None = None,
        patients: Sequence[str] = (),
    ):
        self.recipe, self.config = recipe, recipe.model
        self.train, self.frames, self.patients = list(train), frames or Frames(()), tuple(patients)
        self.progress: Progress | None = None
        if MODELS[recipe.network].looks_at_training and not train:
            raise InputError(
                f"{recipe.network} predicts from the measured training spots, which a run folder does not hold; "
                "score it with `hifusion evaluate` or `hifusion benchmark`, or predict with another network"
            )
        module: Any = MODELS[recipe.network].module
        self.needs = MODELS[recipe.network].needs
        self.whole_section: bool = module.whole_section
        self.reads_regions = not MODELS[recipe.network].fitted_at_once
        self.whole_patient: bool = getattr(module, "whole_patient", False)
        self._kept: dict[tuple[str, ...], dict[str, Tensor]] = {}

    @cached_property
    def encoder(self) -> Encoder:
        """The frozen encoder of the recipe."""
        return load_encoder(self.recipe.encoder)

    def training_batches(self, generator: torch.Generator, share: Share = ALONE) -> Iterator[Batch]:
        """Every training spot once, in an order and with turns drawn from ``generator``.

        Parameters
        ----------
        share
            Which of the devices that learn together this is: it gets its own rows of every batch.
        """
        recipe = self.recipe
        views, rows = [view for view, _ in self.train], [rows for _, rows in self.train]
        if self.whole_section:
            stacks = self._stacks()
            for number in torch.randperm(len(stacks), generator=generator).tolist():
                yield self._section_batch(stacks[number], generator)
            return
        for spots in data.batches(
            views,
            rows,
            batch_size=recipe.batch_size,
            by_section=recipe.batches == "section" or bool(self.needs),
            augment=recipe.augment,
            generator=generator,
            region_px=self.config.region_px,
            share=share,
        ):
            inputs = self.inputs(*spots.parts[0]) if self.needs else {}
            # Not the generator of the order: batches may be made ahead of the one that is learned from.
            yield Batch(spots.region, spots.target, inputs, {}, None, torch.Generator(), spots.of)

    def batches(self, view: SectionView, rows: np.ndarray) -> Iterator[tuple[Tensor, dict[str, Tensor], np.ndarray]]:
        """Regions and inputs that predict some spots of a section, and which rows of the output they are."""
        if self.whole_section:
            stack = self._stack_of(view)
            first = sum(len(its.centres_px) for its in stack[:-1])
            yield self._regions(stack), self._inputs_of(stack), first + rows
            return
        size = self.recipe.batch_size
        for chunk in (rows[start : start + size] for start in range(0, len(rows), size)):
            region = (
                data.read_regions(view, chunk, self.config.region_px)
                if self.reads_regions
                else torch.empty(len(chunk), 3, 0, 0, dtype=torch.uint8)
            )
            yield region, self.inputs(view, chunk), np.arange(len(chunk))

    def sample(self, view: SectionView) -> tuple[Tensor, dict[str, Tensor]]:
        """Regions and inputs of a few spots, or of the whole section: one forward pass to count or to time."""
        region, inputs, _ = next(self.batches(view, np.arange(min(len(view.centres_px), 8))))
        return region, inputs

    def inputs(self, view: SectionView, rows: np.ndarray) -> dict[str, Tensor]:
        """Keyword arguments of the forward pass over some spots of one section."""
        if not self.needs:
            return {}
        chosen = torch.from_numpy(rows)
        found = self._kept_of((view,))
        return {name: value[chosen] if name in BY_SPOT else value for name, value in found.items()}

    def _kept_of(self, stack: Sequence[SectionView]) -> dict[str, Tensor]:
        key = tuple(view.name for view in stack)
        if key not in self._kept:
            self._kept[key] = _SUPPLIERS[self.recipe.network](self, *stack)
        return self._kept[key]

    def _rows(self, view: SectionView) -> np.ndarray:
        """Training spots of a section; none of a section that is not trained on."""
        return next((rows for its, rows in self.train if its.name == view.name), np.array([], dtype=np.int64))

    def _stacks(self) -> list[tuple[SectionView, ...]]:
        """Training sections that go through the network together."""
        views = [view for view, _ in self.train]
        if not self.whole_patient:
            return [(view,) for view in views]
        patients = dict.fromkeys(view.patient for view in views)
        return [tuple(view for view in views if view.patient == patient) for patient in patients]

    def _stack_of(self, view: SectionView) -> tuple[SectionView, ...]:
        """A section, behind the training sections of its patient where the network takes whole patients."""
        others = self._stacks() if self.whole_patient else []
        return (
            *(its for stack in others for its in stack if its.patient == view.patient and its.name != view.name),
            view,
        )

    def _regions(self, stack: Sequence[SectionView]) -> Tensor:
        side = self.config.region_px
        return torch.cat([data.read_regions(view, np.arange(len(view.centres_px)), side) for view in stack])

    def _training_mask(self, stack: Sequence[SectionView]) -> Tensor:
        return torch.cat([_mask(len(view.centres_px), self._rows(view)) for view in stack])

    def _inputs_of(self, stack: Sequence[SectionView], known: Tensor | None = None) -> dict[str, Tensor]:
        found = dict(self._kept_of(stack))
        if self.whole_patient:
            known = self._training_mask(stack) if known is None else known
            expression = torch.from_numpy(np.concatenate([view.expression for view in stack]))
            # Rows that are not known are made nothing here, so that none of them can be read by mistake.
            found |= {"known": known, "known_expression": torch.where(known[:, None], expression, torch.nan)}
        return found

    def _section_batch(self, stack: Sequence[SectionView], generator: torch.Generator) -> Batch:
        region = self._regions(stack)
        if self.recipe.augment:
            region = data.flip_and_turn(region, torch.rand(len(region), 3, generator=generator) < 0.5)
        trained = scored = self._training_mask(stack)
        known = None
        if self.whole_patient:
            known = trained & (torch.rand(len(trained), generator=generator) < KNOWN_SHARE)
            scored = trained & ~known
        target = torch.from_numpy(np.concatenate([view.expression for view in stack]))
        beside = _BESIDE.get(self.recipe.network, _nothing)(self, stack, trained)
        region = region.contiguous(memory_format=torch.channels_last)
        return Batch(region, target, self._inputs_of(stack, known), beside, scored, generator)

    def features(self, view: SectionView, side_px: int, width: int, centres_px: np.ndarray | None = None) -> Tensor:
        """Frozen features ``(K, width)`` of windows at the spots, or at other places of the slide.

        A fixed random map, which keeps distances nearly as they are (Johnson and Lindenstrauss) and is the same for
        every section, where the encoder has another width.
        """
        found = torch.from_numpy(
            spot_features(view, self.encoder, side_px)
            if centres_px is None
            else window_features(view, centres_px, side_px, self.encoder)
        )
        if found.shape[1] == width:
            return found
        projection = torch.randn(found.shape[1], width, generator=torch.Generator().manual_seed(0))
        return found @ projection / math.sqrt(width)

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor, list[str]]:
        """Features, targets and groups of the training spots, among which exemplars are looked for."""
        side, width = self.config.patch_px, self.config.feature_width
        feature = [self.features(view, side, width)[rows] for view, rows in self.train]
        target = np.concatenate([view.expression[rows] for view, rows in self.train])
        groups = [group for view, rows in self.train for group in np.array(self._groups(view))[rows]]
        return torch.cat(feature), torch.from_numpy(target), groups

    def _groups(self, view: SectionView) -> list[str]:
        """Whose spots may not be exemplars of each other: of one patient, section, or block of the only section."""
        spots = len(view.centres_px)
        if len({its.patient for its, _ in self.train}) > 1:
            return [f"patient {view.patient}"] * spots
        if len(self.train) > 1 or view.name != self.train[0][0].name:
            return [f"section {view.name}"] * spots
        return [f"block {number}" for number in data.blocks(view)]


def predict_spots(
    network: nn.Module,
    surroundings: Surroundings,
    view: SectionView,
    rows: np.ndarray,
    precision: str,
    on_batch: Callable[[int], None] | None = None,
) -> SpotOutputs:
    """What the network says of some spots of a section, in the order of ``rows``.

    Parameters
    ----------
    on_batch
        Called with the number of spots just done.
    """
    parts = []
    for outputs in spots_by_batch(network, surroundings, view, rows, precision):
        parts.append(outputs)
        if on_batch:
            on_batch(len(outputs.expression))
    return SpotOutputs.joined(parts)


def spots_by_batch(
    network: nn.Module, surroundings: Surroundings, view: SectionView, rows: np.ndarray, precision: str
) -> Iterator[SpotOutputs]:
    """As :func:`predict_spots`, batch by batch."""
    average = surroundings.recipe.average_symmetries
    for region, inputs, chosen in surroundings.batches(view, rows):
        (outputs,) = forward_batches(network, [(region, inputs)], precision=precision, average_symmetries=average)
        yield outputs.rows(chosen)


def _mask(spots: int, rows: np.ndarray) -> Tensor:
    mask = torch.zeros(spots, dtype=torch.bool)
    mask[torch.from_numpy(rows)] = True
    return mask


def _size_px(view: SectionView) -> tuple[int, int]:
    """Width and height of the slide in region pixels, the last of which may be there in part."""
    assert view.image is not None
    width, height = Slide(view.image).size_px
    return math.ceil(width / view.shrink), math.ceil(height / view.shrink)


def _seen(its: Surroundings, view: SectionView) -> dict[str, Tensor]:
    assert its.recipe.region_mpp is not None
    found = seen_of(view, its.encoder, its.config, its.recipe.region_mpp, its.frames, its.progress, np.float16)
    return found | {"patient_known": torch.full((len(view.centres_px),), view.patient in its.patients)}


def _position(its: Surroundings, view: SectionView) -> dict[str, Tensor]:
    return {"position": torch.from_numpy(view.array)}


def _position_and_graph(its: Surroundings, view: SectionView) -> dict[str, Tensor]:
    # In pitches, not array steps: on hexagonal arrays columns count by two.
    pitches = torch.from_numpy(view.centres_px / view.pitch_px)
    return _position(its, view) | {"adjacency": neighbour_graph(pitches)}


def _exemplars(its: Surroundings, view: SectionView) -> dict[str, Tensor]:
    feature = its.features(view, its.config.patch_px, its.config.feature_width)
    reference, target, groups = its.reference
    rows = nearest_exemplars(feature, its._groups(view), reference, groups, EXEMPLARS).rows
    return {"feature": feature, "exemplar_feature": reference[rows], "exemplar_target": target[rows]}


def _neighbourhood(its: Surroundings, view: SectionView) -> dict[str, Tensor]:
    side, width, spots = its.config.patch_px, its.config.feature_dim, len(view.centres_px)
    steps = np.arange(NEIGHBOURS) - NEIGHBOURS // 2
    offsets = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) * side * view.shrink  # row by row, (x, y)
    tiles = (view.centres_px[:, None] + offsets).reshape(-1, 2)
    in_regions = torch.from_numpy(view.centres_px / view.shrink)
    places = torch.from_numpy(view.array) if its.config.grid == "array" else in_regions
    return {
        "neighbour_features": its.features(view, side, width, tiles).unflatten(0, (spots, -1)),
        "neighbour_mask": neighbour_mask(in_regions, _size_px(view), side),
        "section_features": its.features(view, side, width),
        "section_cells": grid_cells(places, its.config.grid),
        "section_number": torch.zeros(spots, dtype=torch.int64),
        "section_row": torch.arange(spots),
    }


def _tiles(its: Surroundings, *stack: SectionView) -> dict[str, Tensor]:
    """Tiles of all sections, one behind the other, and the graphs among tiles of the same section."""
    found: dict[str, Tensor] = {}
    for kind, sides in TILE_SIDES.items():
        side = round(sides * its.config.patch_px)
        features, index, graphs, first = [], [], [], 0
        for view in stack:
            tiles, row = tiles_of(torch.from_numpy(view.centres_px / view.shrink), _size_px(view), side)
            centres = (tiles.numpy() + 0.5) * side * view.shrink
            features.append(its.features(view, side, its.config.feature_dim, centres))
            index.append(row + first)
            graphs.append(radius_graph(tiles))
            first += len(tiles)
        found[f"{kind}_features"], found[f"{kind}_index"] = torch.cat(features), torch.cat(index)
        found[f"{kind}_graph"] = torch.block_diag(*graphs)
    return found


def _tiles_and_nearest(its: Surroundings, view: SectionView) -> dict[str, Tensor]:
    return _tiles(its, view) | {"spot_graph": nearest_graph(torch.from_numpy(view.centres_px))}


def _tiles_and_stack(its: Surroundings, *stack: SectionView) -> dict[str, Tensor]:
    side, width = its.config.patch_px, its.config.feature_dim
    places = torch.from_numpy(np.concatenate(common_frame(stack)))
    section = torch.cat([torch.full((len(view.centres_px),), number) for number, view in enumerate(stack)])
    features = torch.cat([its.features(view, side, width) for view in stack])
    radius_um = side / 2 * stack[0].shrink * stack[0].mpp
    return _tiles(its, *stack) | {"spot_graph": stack_graph(places, section, features, radius_um)}


_SUPPLIERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "hifusion_frozen": _seen,
    "histogene": _position,
    "hist2st": _position_and_graph,
    "egn": _exemplars,
    "triplex": _neighbourhood,
    "asign2d": _tiles_and_nearest,
    "asign3d": _tiles_and_stack,
}


def _nothing(its: Surroundings, stack: Sequence[SectionView], trained: Tensor) -> dict[str, Tensor]:
    return {}


def _counts(its: Surroundings, stack: Sequence[SectionView], trained: Tensor) -> dict[str, Tensor]:
    count = torch.from_numpy(stack[0].counts)
    factor = torch.ones(len(count))
    factor[trained] = size_factors(count[trained])
    return {"count": count, "size_factor": factor}


def _tile_targets(its: Surroundings, stack: Sequence[SectionView], trained: Tensor) -> dict[str, Tensor]:
    """Expression of the tiles, made of the summed counts of their training spots."""
    inputs = its._kept_of(stack)
    count = torch.from_numpy(np.concatenate([view.counts for view in stack])) * trained[:, None]
    total = torch.from_numpy(np.concatenate([view.total_counts for view in stack])) * trained
    unit, found = normalisation(its.recipe.normalisation), {}
    for kind in TILE_SIDES:
        index, tiles = inputs[f"{kind}_index"], len(inputs[f"{kind}_features"])
        sums = tile_sums(count, index, tiles).numpy()
        totals = tile_sums(total[:, None], index, tiles).numpy().ravel()
        found[f"{kind}_target"] = torch.from_numpy(unit.of(sums, totals))
        found[f"{kind}_index"] = index
    return found


_BESIDE: dict[str, Callable[[Surroundings, Sequence[SectionView], Tensor], dict[str, Tensor]]] = {
    "hist2st": _counts,
    "asign2d": _tile_targets,
    "asign3d": _tile_targets,
}
