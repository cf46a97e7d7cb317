"""Checks of configurations and inputs that the networks share, and the centre patch of a region."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hifusion.errors import InputError

PixelScale = Literal["raw", "unit"]
"""What a network sees of a pixel: 0 to 255 as it is, or divided by 255."""


class PatchConfig:
    """A configuration of a network that takes a patch, the centre of the region."""

    patch_px: int

    @property
    def region_px(self) -> int:
        """Side of the smallest region patch the network takes."""
        return self.patch_px

    @property
    def memory_format(self) -> torch.memory_format:
        """Layout of weights and images: contiguous, where patches are cut or flattened."""
        return torch.contiguous_format


def check_whole_numbers(config: Any, *names: str) -> None:
    """Refuse a configuration whose named fields are not whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}: {value!r} is not a whole number of at least 1; give one")


def check_dropout(dropout: float) -> None:
    """Refuse a dropout probability outside [0, 1)."""
    if not 0 <= dropout < 1:
        raise InputError(f"dropout: {dropout} is outside [0, 1); use a share such as 0.1")


def check_sides(spot_px: int, region_px: int) -> None:
    """Refuse a region patch that cannot hold the spot patch at its centre."""
    if spot_px > region_px or (region_px - spot_px) % 2:
        raise InputError(
            f"region_px: {region_px} cannot hold spot_px={spot_px} exactly at its centre; "
            "use one at least as large, both even or both odd"
        )


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse a value that is none of the choices of a `Literal`."""
    allowed = get_args(choices)
    if value not in allowed:
        raise InputError(f"{name}: {value!r} is unknown; use one of {', '.join(allowed)}")


def check_shape(what: str, tensor: Tensor, *shape: int | str) -> None:
    """Refuse a tensor of another shape; a text stands for any size and is shown, such as "N"."""
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(isinstance(b, str) or a == b for a, b in zip(found, shape, strict=True))
    if not fits:
        raise InputError(f"{what}: shape is {found}; give ({', '.join(map(str, shape))})")


def check_floats(what: str, tensor: Tensor) -> None:
    """Refuse integer tensors where standardised floats are wanted."""
    if not tensor.is_floating_point():
        raise InputError(f"{what}: dtype is {tensor.dtype}; give floats, or uint8 regions to forward")


def check_position(position: Tensor, spots: int, positions: int) -> None:
    """Refuse array coordinates that are not whole numbers in [0, `positions`), one pair for each of `spots` > 0."""
    if not spots:
        raise InputError("region: it holds no spot; give at least one")
    check_shape("position", position, spots, 2)
    if position.is_floating_point() or position.dtype == torch.bool:
        raise InputError(f"position: dtype is {position.dtype}; give whole numbers, the array coordinates (x, y)")
    low, high = int(position.min()), int(position.max())
    if low < 0 or high >= positions:
        wrong = low if low < 0 else high
        raise InputError(f"position: {wrong} is outside 0 to {positions - 1}; shift them, or set positions higher")


def centre_patch(region: Tensor, patch_px: int) -> Tensor:
    """Centre of region patches: uint8 (B, 3, R, R) -> uint8 (B, 3, patch_px, patch_px).

    Raises
    ------
    InputError
        Another dtype or shape, a smaller region, or one whose centre falls between pixels.
    """
    check_shape("region", region, "B", 3, "R", "R")
    side = region.shape[-1]
    if region.dtype != torch.uint8:
        raise InputError(f"region: dtype is {region.dtype}; give uint8, or standardised floats to the method for them")
    if region.shape[-2] != side or side < patch_px or (side - patch_px) % 2:
        raise InputError(
            f"region: shape is {tuple(region.shape)}; give (B, 3, R, R) with R at least {patch_px} and "
            f"{'odd' if patch_px % 2 else 'even'}"
        )
    start = (side - patch_px) // 2
    return region[:, :, start : start + patch_px, start : start + patch_px]


def z_scored(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(pixel / 255 - mean) / std per channel: uint8 (B, 3, H, W) -> (B, 3, H, W) in the dtype of `mean`, `std` (3,)."""
    return (pixels.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]


def pixel_statistics(regions: Iterable[Tensor], patch_px: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixel / 255 per channel over all centre patches, each (3,) float64.

    Parameters
    ----------
    regions
        Batches of uint8 (B, 3, R, R): the training spots, each once. The sums are whole numbers, so neither order nor
        batch size changes the result.

    Raises
    ------
    InputError
        No patch at all, or a channel without any variation.
    """
    total, square, count = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0
    for region in regions:
        pixels = centre_patch(region, patch_px).transpose(0, 1).flatten(1).to(torch.int64)
        total, square = total + pixels.sum(1).cpu(), square + pixels.square().sum(1).cpu()
        count += pixels.shape[1]
    if not count:
        raise InputError("pixel statistics: no region patch was given; give those of the training spots")
    mean = total.double() / count
    variance = square.double() / count - mean.square()
    if not (variance > 0).all():
        raise InputError("pixel statistics: a channel has the same value everywhere; give patches that hold tissue")
    return mean / 255, variance.sqrt() / 255
