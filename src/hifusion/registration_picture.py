"""A registration drawn: the moving section over the fixed one's slide, as it lay and as it was moved."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hifusion.cohort import SectionView
from hifusion.errors import plain
from hifusion.plots import check_out, save
from hifusion.registration import Registration, positions_um
from hifusion.slide import Slide
from hifusion.tissue import find_tissue

PICTURE_PX = 1200  # longest side of the slide's picture
_GREEN, _BLACK, _RED = "#0a7d2c", "black", "#b00020"
_WIDTH, _LINE = 11.0, 0.2  # inches


def draw_registration(
    found: Registration, moving: SectionView, fixed: SectionView, out: Path, *, dpi: int = 150
) -> Path:
    """Draw the moving section's spots and outline over the fixed slide before and after, side by side; returns ``out``.

    Parameters
    ----------
    found
        ``register(moving, fixed)``.
    out
        A .png, .svg or .pdf.
    """
    check_out(out, dpi)
    spots, goal = positions_um(moving), positions_um(fixed)
    # Identity before; the outline is drawn through the same map as the spots.
    ways = {"as they lie on their slides": np.eye(2, 3), f"after: {plain(found.method, 100)}": found.matrix}
    corners = np.concatenate([goal, *(_through(matrix, spots) for matrix in ways.values())])
    margin_um = 2 * fixed.pitch_px * fixed.mpp
    (left, top), (right, bottom) = corners.min(axis=0) - margin_um, corners.max(axis=0) + margin_um
    told = [piece for line in _told(found) for piece in textwrap.wrap(line, 150)]
    panel = float(np.clip(_WIDTH / 2 * (bottom - top) / (right - left), 2.0, 10.0))
    high = 0.8 + _LINE * len(told) + panel
    figure = Figure(figsize=(_WIDTH, high), facecolor="white")
    title = f"{plain(moving.name)} (green) laid on {plain(fixed.name)} (black)"
    figure.text(0.02, 1 - 0.25 / high, title, fontsize=12, fontweight="bold", parse_math=False)
    for number, line in enumerate(told):
        doubted = number >= len(told) - len(found.doubts) and bool(found.doubts)
        at = 1 - (0.48 + _LINE * number) / high
        figure.text(0.02, at, line, fontsize=8.5, color=_RED if doubted else "0.2", parse_math=False)
    axes = figure.subplots(1, 2)
    figure.subplots_adjust(0.02, 0.02, 0.98, panel / high, wspace=0.04)
    for ax, (what, matrix) in zip(axes, ways.items(), strict=True):
        _lay_slide(ax, fixed)
        ax.scatter(*goal.T, s=5, color=_BLACK, linewidths=0)
        ax.scatter(*_through(matrix, spots).T, s=14, facecolors="none", edgecolors=_GREEN, linewidths=0.9)
        _outline(ax, moving, matrix)
        ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set(linewidth=0.4, color="0.7")
        ax.set_title(what, fontsize=9, loc="left", parse_math=False)
    return save(figure, out, dpi)


def _told(found: Registration) -> list[str]:
    """The figures in words, the doubts last."""
    there, near = found.there_and_back_um, found.nearest_spot_um
    same = "" if np.isnan(found.similarity.after) else "; their densities correlate by "
    same += "" if not same else f"{found.similarity.before:.2f} before, {found.similarity.after:.2f} after"
    return [
        f"the tissues overlap by a Dice of {found.dice.before:.2f} before, {found.dice.after:.2f} after{same}",
        f"a moved spot is {near.median:.0f} µm from the nearest fixed one (95 %: {near.most:.0f} µm); there and back "
        f"moves it by {there.median:.0f} µm (95 %: {there.most:.0f} µm), a floor of the error",
        *found.doubts,
    ]


def _through(matrix: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.asarray(positions @ matrix[:, :2].T + matrix[:, 2])


def _lay_slide(ax: Axes, view: SectionView) -> None:
    if view.image is None:
        return
    with Slide(view.image, view.mpp) as slide:
        width, height = (side * view.mpp for side in slide.size_px)
        ax.imshow(slide.thumbnail(PICTURE_PX), extent=(0, width, height, 0), zorder=0)


def _outline(ax: Axes, view: SectionView, matrix: np.ndarray) -> None:
    if view.image is None:
        return
    with Slide(view.image, view.mpp) as slide:
        tissue = find_tissue(slide, view.mpp)
    if not tissue.mask.any() or tissue.mask.all():
        return
    height, width = tissue.mask.shape
    each = np.array(tissue.shrink) * view.mpp
    at = (np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1) + 0.5) * each
    x, y = np.moveaxis(_through(matrix, at), -1, 0)
    ax.contour(x, y, tissue.mask.astype(np.float32), levels=[0.5], colors=[_GREEN], linewidths=1.2)
