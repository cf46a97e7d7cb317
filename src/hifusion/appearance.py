"""What a frozen encoder and hand-made statistics see of a spot, at every scale from inside it to far around it.

These are the inputs of :class:`hifusion.models.frozen.FrozenHiFusion`. Colour is absolute, not standardised image by
image: the stain of a spot against the rest of its section says much of what can be known about its expression. What two
scanners or stainings differ by is taken out section by section instead (:func:`context`).
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hifusion.cohort import SectionView
from hifusion.data import slide_patches
from hifusion.encoders import Encoder
from hifusion.errors import InputError
from hifusion.features import kept
from hifusion.frames import Frames
from hifusion.models.frozen import STATISTICS, TOKENS, FrozenConfig
from hifusion.models.fused import fast_dtype
from hifusion.models.hifusion import split_tiles, stitch_tiles
from hifusion.patch_statistics import neighbour_mean, of_region, standardise
from hifusion.processes import side_by_side
from hifusion.slide import Slide

Progress = Callable[[str, int, int], None]  # (what, spots done, spots in all)
BATCH_SIZE = 8
THREADS_A_GPU = 4  # that read for it
COLUMNS_AT_ONCE = 256  # in double precision
SAME_SCALE = 0.05  # a slide this close to the wanted scale is read pixel by pixel


class Appearance(NamedTuple):
    """What is seen of each spot of a section."""

    levels: np.ndarray
    """float32 ``(N, L, 4, C)``: each grid's map of the spot patch in four quarters."""
    whole: np.ndarray
    """float32 ``(N, F)``: means of the levels, mean and spread of each window's map, hand-made statistics."""


def appearance(
    view: SectionView, encoder: Encoder, config: FrozenConfig, mpp: float, progress: Progress | None = None
) -> Appearance:
    """What is seen of a section's spots, read from its slide and kept in the section's cache.

    Parameters
    ----------
    mpp
        um per pixel of the patches; the slide's own pixels are read where they are as wide, to 5 %.

    Raises
    ------
    InputError
        The section has no slide, or it cannot be read.
    """
    if view.image is None:
        raise InputError(f"section {view.name} has no slide to look at; prepare a store with its image and give that")
    image, shrink = view.image, mpp / view.mpp
    shrink = 1.0 if abs(shrink - 1) <= SAME_SCALE else shrink
    centres = np.ascontiguousarray(view.centres_px, dtype=np.float64)

    @cache
    def slide() -> Slide:
        opened = Slide(image)
        slide_patches(opened, centres[:1], 1, 1.0)  # a JPEG is decoded here, once, before several threads ask for it
        return opened

    def look(rows: slice) -> np.ndarray:
        region = slide_patches(slide(), centres[rows], config.region_px, shrink)
        start = (config.region_px - config.spot_px) // 2
        spot = region[:, :, start : start + config.spot_px, start : start + config.spot_px]
        parts = [_level(encoder, spot, grid).flatten(1) for grid in config.grids]
        for side, seen in config.windows:
            at = shrink * max(side / seen, 1.0)
            same = side == seen == config.region_px
            pixels = region if same else slide_patches(slide(), centres[rows], min(side, seen), at)
            parts.append(_window(encoder, pixels, seen))
        box = np.array([0, 0, config.region_px, config.region_px])
        by_hand = [of_region(pixels, box, view.name) for pixels in region.permute(0, 2, 3, 1).numpy()]
        return torch.cat([*parts, torch.tensor(by_hand)], dim=1).numpy()

    def batches(rows: slice) -> Iterator[np.ndarray]:
        slide()
        firsts = range(rows.start, rows.stop, BATCH_SIZE)
        threads = torch.get_num_threads() if encoder.device.type == "cpu" else THREADS_A_GPU
        return side_by_side(look, [slice(first, min(first + BATCH_SIZE, rows.stop)) for first in firsts], threads)

    looks = f"{config.grids} {config.windows} {config.spot_px} {config.region_px} {shrink!r}"
    what = f"appearance {encoder.id} {fast_dtype(encoder.device)} {looks}"
    found = kept(view, centres, what, encoder.id, _columns(config, encoder.channels), batches, progress)
    in_levels = len(config.grids) * TOKENS * encoder.channels
    levels = found[:, :in_levels].reshape(len(found), len(config.grids), TOKENS, encoder.channels)
    return Appearance(levels, np.concatenate([levels.mean(2).reshape(len(found), -1), found[:, in_levels:]], axis=1))


def _columns(config: FrozenConfig, channels: int) -> int:
    return (len(config.grids) * TOKENS + 2 * len(config.windows)) * channels + STATISTICS


def bytes_a_spot(config: FrozenConfig) -> tuple[int, int]:
    """Memory that a spot takes at most while its section is predicted, and disk until that is done."""
    disk = 4 * _columns(config, config.channels)
    in_half = 2 * len(config.grids) * TOKENS * config.channels
    in_single, around = 4 * config.features, 2 * (1 + len(config.radii_um)) * config.features
    return max(disk + 2 * in_half, in_half + 3 * in_single + around), disk


def seen_of(
    view: SectionView,
    encoder: Encoder,
    config: FrozenConfig,
    mpp: float,
    frames: Frames,
    progress: Progress | None = None,
    dtype: type[np.floating] = np.float32,
) -> dict[str, Tensor]:
    """What the network is given of a section's spots but whether their patient is known: a row a spot.

    Parameters
    ----------
    dtype
        Of all but the places: float16 where a section may be a slide of many thousand spots.
    """
    levels, whole = appearance(view, encoder, config, mpp, progress)
    found = {"levels": standard_levels(levels, dtype)}
    del levels  # the larger part of what was seen, before as much is made of the rest
    found["context"] = context(view, whole, config.radii_um, dtype)
    found |= {"whole": whole.astype(dtype), "place": frames.place(view)}
    return {name: torch.from_numpy(values) for name, values in found.items()}


def context(
    view: SectionView, seen: np.ndarray, radii_um: tuple[float, ...], dtype: type[np.floating] = np.float32
) -> np.ndarray:
    """What is seen of the spots and of their neighbourhoods, each column standardised within the section.

    Parameters
    ----------
    seen
        ``(N, F)``.
    radii_um
        Of the neighbourhoods, see :func:`hifusion.patch_statistics.neighbour_mean`.

    Returns
    -------
    np.ndarray
        ``(N, 1 + len(radii_um), F)``, the spots themselves first.
    """
    found = np.empty((len(seen), 1 + len(radii_um), seen.shape[1]), dtype)
    means = (neighbour_mean(view, seen, radius_um) for radius_um in radii_um)
    for at, values in enumerate(chain([seen], means)):
        for first in range(0, seen.shape[1], COLUMNS_AT_ONCE):
            some = values[:, first : first + COLUMNS_AT_ONCE].astype(np.float64)
            found[:, at, first : first + COLUMNS_AT_ONCE] = standardise(some)(some)
    return found


def standard_levels(levels: np.ndarray, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """Each grid's channels standardised over the quarters of all spots of the section, as ``levels`` is."""
    found = np.empty(levels.shape, dtype)
    for grid in range(levels.shape[1]):
        flat = levels[:, grid].reshape(-1, levels.shape[3])
        found[:, grid] = standardise(flat)(flat).reshape(len(levels), TOKENS, -1)
    return found


def _level(encoder: Encoder, spot: Tensor, grid: int) -> Tensor:
    """The spot patch in ``grid`` x ``grid`` tiles, each seen on its own: ``(B, 4, C)``, its quarters row by row."""
    maps = (stitch_tiles(layer, grid) for layer in encoder.maps(split_tiles(spot, grid)))
    return torch.cat([F.adaptive_avg_pool2d(layer, 2) for layer in maps], dim=1).flatten(2).transpose(1, 2)


def _window(encoder: Encoder, pixels: Tensor, seen_px: int) -> Tensor:
    """Mean and standard deviation over the maps of a window, ``(B, 2 C)``."""
    if pixels.shape[-1] != seen_px:
        pixels = F.interpolate(pixels.float(), (seen_px, seen_px), mode="bilinear", align_corners=False)
    found = []
    for layer in encoder.maps(pixels):
        places = layer.permute(0, 2, 3, 1).flatten(1, 2)  # along the memory of channels-last maps
        mean = places.mean(1, keepdim=True)
        found += [mean[:, 0], (places - mean).square().mean(1).sqrt()]
    return torch.cat(found, dim=1)
