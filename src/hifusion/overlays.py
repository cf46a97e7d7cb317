"""Over the picture of a slide, to be looked at: measured spots, tissue and lattice, predicted genes and novelty."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anndata import AnnData
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure

from hifusion.errors import plain
from hifusion.plots import CMAP, MARKERS, check_out, map_gene, save
from hifusion.slide import Slide
from hifusion.tissue import TissueMask

MOST_DRAWN = 50_000  # spots; of more, which would take minutes, only every second, third, ... is drawn
PICTURE_PX = 1600  # longest side of the slide's picture
DPI = 150
NOVELTY_CMAP = "RdYlBu_r"  # 1 in the middle; readable with any colour vision
_WIDTH, _FOOT, _LINE = 7.0, 0.45, 0.19  # inches
_GREEN, _RED = "#0a7d2c", "#b00020"


def draw_check(section: AnnData, slide: Slide | None, findings: Sequence[str], out: Path, *, dpi: int = DPI) -> Path:
    """Draw a section's spots at their true size over the whole slide, coloured by log counts; returns ``out``.

    Parameters
    ----------
    slide
        None: the spots alone.
    findings
        Lines above the picture; none says that nothing was found.
    out
        A .png, .svg or .pdf.
    """
    check_out(out, dpi)
    counts = None
    if "counts" in section.layers:
        counts = np.log1p(np.asarray(section.layers["counts"].sum(axis=1), dtype=np.float64).ravel())
    figure, ax = _page(section, slide, findings or ["nothing found"], _RED if findings else _GREEN)
    spots, every = _draw_spots(ax, section)
    if counts is None:
        spots.set(facecolors="none", edgecolors="black")
    else:
        spots.set(array=counts[::every], cmap=colormaps[CMAP], clim=np.percentile(counts, [1, 99]), edgecolors="white")
        bar = figure.colorbar(spots, cax=ax.inset_axes((1.02, 0.1, 0.03, 0.8)), extend="both")
        bar.set_label("log(1 + counts of all genes)", fontsize=8)
        bar.ax.tick_params(labelsize=7, length=2)
    return save(figure, out, dpi)


def draw_tissue(slide: Slide, tissue: TissueMask, section: AnnData | None, out: Path, *, dpi: int = DPI) -> Path:
    """Draw the outline of the tissue of a slide, and the spots of a section where one is given; returns ``out``."""
    check_out(out, dpi)
    told = [f"{tissue.mask.mean():.1%} of the slide is tissue ({plain(tissue.how)})"]
    if section is not None:
        pitch, diameter = (section.uns["hifusion"][fact] for fact in ("pitch_um", "spot_diameter_um"))
        told.append(f"{section.n_obs:,} spots of {diameter:g} µm, {pitch:g} µm apart")
    figure, ax = _page(section, slide, told, "0.2")
    if section is not None:
        _draw_spots(ax, section)[0].set(facecolors="none", edgecolors="black")
    if tissue.mask.any() and not tissue.mask.all():
        (right, down), (height, width) = tissue.shrink, tissue.mask.shape
        x, y = (np.arange(width) + 0.5) * right, (np.arange(height) + 0.5) * down
        ax.contour(x, y, tissue.mask.astype(np.float32), levels=[0.5], colors=[_GREEN], linewidths=1.2)
    return save(figure, out, dpi)


def draw_maps(section: AnnData, out: Path, genes: Sequence[str] | None = None) -> Path:
    """Draw genes of a predicted section side by side; by default the markers, or else the first genes, of its panel."""
    known = list(section.var_names)
    shown = genes or [gene for gene in MARKERS if gene in known] or known[: len(MARKERS)]
    figure, axes = _panels(section, len(shown))
    for ax, gene in zip(axes, shown, strict=True):
        map_gene(section, gene, ax=ax)
        _colour_bar(ax, section.uns["hifusion"]["normalisation"])
    return save(figure, out, DPI)


def draw_novelty(section: AnnData, out: Path) -> Path:
    """Draw how unlike the training spots each predicted spot is: blue is known ground, red is not."""
    values = section.obs["novelty"].to_numpy(dtype=np.float64)
    known = values[np.isfinite(values)]
    told = f"novelty: {(known > 1).mean():.0%} of {len(values):,} spots above 1" if known.size else "novelty: not known"
    figure, (ax,) = _panels(section, 1)
    map_gene(section, "novelty", ax=ax, cmap=NOVELTY_CMAP, vmin=0, vmax=2, title=told)
    _colour_bar(ax, "1: as unlike as 95 % of held-out spots")
    return save(figure, out, DPI)


def _panels(section: AnnData, count: int) -> tuple[Figure, list[Axes]]:
    """Panels of the shape of the section, at most four in a row."""
    width, height = np.ptp(section.obsm["spatial"], axis=0) + 1
    tall = float(np.clip(height / width, 0.4, 2.0))
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * tall * rows + 0.5), facecolor="white", layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in axes[count:]:
        spare.remove()
    return figure, list(axes[:count])


def _colour_bar(ax: Axes, label: str) -> None:
    spots = next(one for one in ax.collections if isinstance(one, EllipseCollection))
    bar = ax.figure.colorbar(spots, ax=ax, shrink=0.8, extend="both")
    bar.ax.tick_params(labelsize=7)
    bar.set_label(plain(label), fontsize=8, parse_math=False)


def _page(section: AnnData | None, slide: Slide | None, lines: Sequence[str], colour: str) -> tuple[Figure, Axes]:
    """A figure with ``lines`` above axes that show the whole slide, or all of the spots, in slide pixels."""
    width, height = slide.size_px if slide else (1, 1)
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    if section is not None:  # spots outside the slide are what a check is for
        facts, centres = section.uns["hifusion"], section.obsm["spatial"]
        margin = facts["pitch_um"] / facts["mpp"]
        (x0, y0), (x1, y1) = centres.min(axis=0) - margin, centres.max(axis=0) + margin
        left, top, right, bottom = (
            (min(left, x0), min(top, y0), max(right, x1), max(bottom, y1)) if slide else (x0, y0, x1, y1)
        )
    name = section.uns["hifusion"]["section"] if section is not None else slide.path.name if slide else ""
    wrapped = [piece for line in lines for piece in textwrap.wrap(line, 95)]
    panel = min(max((_WIDTH - 1.4) * (bottom - top) / (right - left), 1.5), 12.0)
    head = 0.5 + _LINE * len(wrapped)
    total = head + panel + _FOOT
    figure = Figure(figsize=(_WIDTH, total), facecolor="white")
    figure.text(0.05, 1 - 0.28 / total, plain(name), fontsize=12, fontweight="bold", parse_math=False)
    for number, line in enumerate(wrapped):
        at = 1 - (0.5 + _LINE * number) / total
        figure.text(0.05, at, plain(line, 200), fontsize=8.5, color=colour, parse_math=False)
    ax = figure.add_axes((0.05, _FOOT / total, (_WIDTH - 1.4) / _WIDTH, panel / total))
    if slide:
        ax.imshow(slide.thumbnail(PICTURE_PX), extent=(0, width, height, 0), zorder=0)
        figure.text(0.05, 0.15 / total, f"{width} x {height} px", fontsize=7, color="0.35")
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set(linewidth=0.4, color="0.7")
    return figure, ax


def _draw_spots(ax: Axes, section: AnnData) -> tuple[EllipseCollection, int]:
    """The spots at their true size, every n-th of them, and n."""
    facts = section.uns["hifusion"]
    every = -(-section.n_obs // MOST_DRAWN)
    centres = section.obsm["spatial"][::every]
    size = np.full(len(centres), facts["spot_diameter_um"] / facts["mpp"])
    spots = EllipseCollection(
        size, size, np.zeros(len(centres)), units="xy", offsets=centres, offset_transform=ax.transData
    )
    spots.set(linewidths=0.3, rasterized=True)
    ax.add_collection(spots, autolim=False)
    if every > 1:
        ax.set_xlabel(f"one spot in {every} is drawn", fontsize=7)
    return spots, every
