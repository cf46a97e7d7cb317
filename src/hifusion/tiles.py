"""A run as a tile model of LazySlide: the slide is tiled there, the expression of each tile is predicted here.

LazySlide is not imported: its ``tl.tile_prediction`` takes any object with the attributes and methods of its
``TilePredictionModelProtocol`` (as of lazyslide 0.13.0 and lazyslide-models 0.1.0).
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from hifusion.checkpoint import Run
from hifusion.errors import InputError
from hifusion.inference import best_device, predict_regions, resolve_precision
from hifusion.models import MODELS

SAME_SCALE = 0.01  # a scale may be given rounded; a region 1 % too wide is 2 px of 224
REMEDY = "cut them with lazyslide.pp.tile_tissues(wsi, **tiling(run))"


class TileSpec(Protocol):
    """What is read of LazySlide's ``wsi.tile_spec("tiles")``: sides in px, and um per such px."""

    width: int
    height: int
    mpp: float | None


def tiling(run: Run, pitch_um: float | None = None) -> dict[str, Any]:
    """Keywords of ``lazyslide.pp.tile_tissues`` that cut a slide into the region patches of a run.

    The expression of a tile is that of the spot at its centre. Tiles overlap where the spots are closer together than
    a region is wide.

    Parameters
    ----------
    pitch_um
        Distance between the centres of neighbouring tiles; that of the training spots where None.

    Returns
    -------
    dict
        ``tile_px`` and ``stride_px`` in pixels of a tile, and ``mpp``, um per such pixel.

    Raises
    ------
    InputError
        The run does not say its scale or its pitch, or the pitch is not possible.
    """
    mpp = region_mpp(run)
    if mpp is None:
        raise InputError(
            f"{run.root}: was trained on native pixels and does not say how wide they are; train it anew, or give "
            f"lazyslide.pp.tile_tissues(wsi, {run.recipe.model.region_px}, mpp=...) the um per px of its slides"
        )
    if pitch_um is None:
        pitch_um = run.facts.get("spots", {}).get("pitch_um")
    if pitch_um is None:
        raise InputError(f"{run.root}: does not say how far apart its spots are; give pitch_um, for example 200")
    if not mpp <= pitch_um < math.inf:
        raise InputError(f"pitch_um={pitch_um} is not possible; use at least the {mpp} um of one pixel")
    return {"tile_px": run.recipe.model.region_px, "stride_px": round(pitch_um / mpp), "mpp": mpp}


def region_mpp(run: Run) -> float | None:
    """um per pixel of the regions a run reads; for native pixels those of its training slides, None where not kept."""
    return run.recipe.region_mpp or run.facts.get("spots", {}).get("mpp")


class TilePredictor:
    """The model to hand to ``lazyslide.tl.tile_prediction``: a column of expression for each gene of the run's panel.

    Values are in the run's normalisation, and computed in the run's precision whatever LazySlide's ``amp`` says.

    Parameters
    ----------
    run
        A complete run.
    tiles
        ``wsi.tile_spec("tiles")``. Without it a wrong scale goes unseen: pixels do not tell it.

    Attributes
    ----------
    model
        The network.
    name, columns
        What LazySlide calls the model, and its columns: gene symbols.

    Raises
    ------
    InputError
        The tiles are not of the size and scale that the run reads.
    """

    name = "hifusion"

    def __init__(self, run: Run, tiles: TileSpec | None = None) -> None:
        if MODELS[run.recipe.network].needs:
            raise InputError(f"{run.root}: {run.recipe.network} needs more than a tile; use a run of hifusion or stnet")
        if run.adapter is not None:
            raise InputError(
                f"{run.root}: was adapted to a section; use the run it was made from, or `hifusion predict`"
            )
        self._region_px = run.recipe.model.region_px
        self._precision = resolve_precision(run.recipe.precision, best_device())
        if tiles is not None:
            self._refuse_size(tiles.width, tiles.height)
            mpp = region_mpp(run)
            if mpp is not None and not math.isclose(tiles.mpp or math.nan, mpp, rel_tol=SAME_SCALE):
                raise InputError(f"tiles have {tiles.mpp} um per px, the run reads {mpp}; {REMEDY}")
        self.columns: tuple[str, ...] = run.panel.genes
        self.model: nn.Module = run.network(torch.device("cpu"))

    def get_transform(self) -> Callable[[np.ndarray], Tensor]:
        """What turns a tile, uint8 ``(R, R, 3)``, into uint8 ``(3, R, R)``; the network standardises it."""
        return _channels_first

    def to(self, device: torch.device | str) -> Self:
        """Move the network to a device."""
        self.model.to(device)
        return self

    def try_compile(self, **compile_kws: Any) -> None:
        """Compile the network, with the keywords of ``torch.compile``; called where LazySlide is asked to compile."""
        self.model.compile(**compile_kws)

    def predict(self, image: Tensor) -> dict[str, np.ndarray]:
        """Expression of tiles, uint8 ``(B, 3, R, R)``: gene -> float32 ``(B,)``.

        Raises
        ------
        InputError
            Tiles of another size, or pixels that another transform has changed.
        """
        if image.dtype != torch.uint8:
            raise InputError(f"tiles are {image.dtype}, the run reads uint8 pixels; leave `transform` out")
        self._refuse_size(image.shape[-1], image.shape[-2])
        expression = predict_regions(self.model, [image], precision=self._precision)
        return dict(zip(self.columns, expression.T, strict=True))

    def _refuse_size(self, width: int, height: int) -> None:
        side = self._region_px
        if (width, height) != (side, side):
            raise InputError(f"tiles are {width} x {height} px, the run reads {side} x {side}; {REMEDY}")


def _channels_first(tile: np.ndarray) -> Tensor:
    # Of the module, so that loader processes can be sent it; a copy, as some readers' pixels cannot be written to.
    return torch.tensor(tile).permute(2, 0, 1)
