"""What was found on a slide, drawn over it: measured spots that may be misplaced; tissue and the lattice on it."""

from pathlib import Path

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from hifusion.plots import CMAP, check_out, plain, save
from hifusion.slide import Slide
from hifusion.tissue import TissueMask

PICTURE_PX = 1500  # longest side of the slide's picture under the drawing
WIDTH_IN, DPI = 8.0, 150


def draw_check(section: AnnData, slide: Slide, told: str, out: Path) -> Path:
    """Draw the spots of a measured section over its slide, coloured by their counts, under what was found."""
    check_out(out, DPI)
    figure, ax = _over_slide(slide)
    spots = _spots(ax, section, filled=True)
    if "counts" in section.layers:
        spots.set(array=np.log10(1 + np.asarray(section.layers["counts"].sum(axis=1)).ravel()), cmap=CMAP)
        figure.colorbar(spots, ax=ax, shrink=0.6).set_label("log10 of total counts", fontsize=8)
    name = plain(section.uns["hifusion"]["section"])
    ax.set_title(f"{name}: {plain(told, 400)}", fontsize=8, wrap=True, parse_math=False)
    # Spots outside the image are part of what is to be seen.
    low, high = section.obsm["spatial"].min(axis=0), section.obsm["spatial"].max(axis=0)
    ax.set(xlim=(min(0, low[0]), max(slide.size_px[0], high[0])), ylim=(max(slide.size_px[1], high[1]), min(0, low[1])))
    return save(figure, out, DPI)


def draw_tissue(slide: Slide, tissue: TissueMask, section: AnnData, out: Path) -> Path:
    """Draw the tissue found on a slide and the spots to be predicted."""
    check_out(out, DPI)
    figure, ax = _over_slide(slide)
    if tissue.mask.any() and not tissue.mask.all():
        across, down = tissue.shrink
        rows, columns = tissue.mask.shape
        x, y = (np.arange(columns) + 0.5) * across, (np.arange(rows) + 0.5) * down
        ax.contour(x, y, tissue.mask, levels=[0.5], colors="#00a0ff", linewidths=0.8)
    _spots(ax, section, filled=False)
    facts = section.uns["hifusion"]
    spots = f"{section.n_obs:,} spots, {facts['pitch_um']:g} µm apart"
    title = f"{plain(slide.path.name)}: {tissue.mask.mean():.1%} tissue ({plain(tissue.how)}), {spots}"
    ax.set_title(title, fontsize=8, wrap=True, parse_math=False)
    return save(figure, out, DPI)


def _over_slide(slide: Slide) -> tuple[Figure, Axes]:
    width, height = slide.size_px
    tall = float(np.clip(height / width, 0.3, 2.5))
    figure = Figure(figsize=(WIDTH_IN, WIDTH_IN * tall + 0.6), facecolor="white", layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(slide.thumbnail(PICTURE_PX), extent=(0, width, height, 0))
    ax.set(xticks=[], yticks=[], aspect="equal")
    return figure, ax


def _spots(ax: Axes, section: AnnData, filled: bool) -> EllipseCollection:
    """Spots at their true size."""
    facts = section.uns["hifusion"]
    size = np.full(section.n_obs, facts["spot_diameter_um"] / facts["mpp"])
    spots = EllipseCollection(
        size,
        size,
        np.zeros(section.n_obs),
        units="xy",
        offsets=section.obsm["spatial"],
        offset_transform=ax.transData,
        facecolors=None if filled else "none",
        edgecolors="0.2" if filled else "black",
        linewidths=0.3,
        rasterized=True,
    )
    ax.add_collection(spots, autolim=False)
    return spots
