"""Gene maps, measured beside predicted, drawn from files: nothing here runs a model.

Names of genes, sections and models are shown as plain text, never read as markup and never used as paths.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from hifusion import files, metrics
from hifusion.errors import InputError, plain, refuse_unknown
from hifusion.evaluated import Names, choose_models, find_predictions, natural, rank
from hifusion.section import read_section

MARKERS = ("ERBB2", "KRT19", "CD74", "TMSB10")  # the genes of the paper's maps
CMAP = "magma"  # even steps of lightness, and readable with any kind of colour vision
# Formats by suffix, and what keeps the date out of the file: the same input gives the same bytes.
FORMATS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
MOST_PX = 30_000  # longest side; Agg draws up to 65,536, but such a picture fills the memory
MOST_ACROSS = 7  # maps side by side; a gene's further ones go into more lines, so that titles stay readable in print
MOST_VECTORS = 3000  # spots drawn as vectors in SVG and PDF; more are drawn as pixels

# Layout, in inches.
_PANEL, _GAP, _LEFT, _RIGHT, _HEAD, _TITLE, _FOOT = 2.4, 0.14, 0.42, 0.95, 0.42, 0.42, 0.3


class Map(NamedTuple):
    """What one panel shows of a section: a model's ``X``, or the layer of what was measured."""

    title: str
    section: AnnData
    layer: str | None = None


class _Backdrop(NamedTuple):
    """Under the spots: view (left, right, bottom, top) in full-resolution pixels, y down; pale picture, its extent."""

    view: tuple[float, float, float, float]
    picture: np.ndarray | None
    extent: tuple[float, float, float, float]


def plot_genes(
    source: Path | Sequence[Path],
    out: Path,
    *,
    genes: Names = None,
    sections: Names = None,
    models: Names = None,
    over_image: bool = True,
    cmap: str = CMAP,
    dpi: int = 150,
) -> Path:
    """Draw gene maps to a .png, .svg or .pdf, whole or not at all: :func:`gene_figure` says what; returns ``out``."""
    check_out(out, dpi)
    figure = gene_figure(source, genes=genes, sections=sections, models=models, over_image=over_image, cmap=cmap)
    return save(figure, out, dpi)


def gene_figure(
    source: Path | Sequence[Path],
    *,
    genes: Names = None,
    sections: Names = None,
    models: Names = None,
    over_image: bool = True,
    cmap: str = CMAP,
) -> Figure:
    """A block per section, a row per gene: what was measured, then each model's prediction with its scores.

    A row has one colour scale: the 1st to 99th percentile of the measured values (of all predicted ones where nothing
    was measured). Scores (MAE, pcc_per_gene) are of that gene in that section; a constant map's correlation is "n/a".

    Parameters
    ----------
    source
        The folder of an evaluation, or prediction files (.h5ad).
    genes
        The paper's markers that are in every panel where None; without any of them, the first three genes.
    sections
        At most the first two where None.
    models
        Labels (``hifusion-seed1``) or names (``hifusion``: all its seeds). Where None: all that are no oracles, the
        first seed of each.
    over_image
        Spots at their true size over the dimmed picture of the slide; False: bare, each spot as wide as the pitch.

    Raises
    ------
    InputError
        Nothing to draw, or a gene, section or model that is not there.
    """
    blocks = read_maps(source, sections, models)
    return draw_blocks(blocks, choose_genes(blocks, genes), over_image, cmap)


def draw_blocks(
    blocks: Mapping[str, Sequence[Map]], shown: Sequence[str], over_image: bool, cmap: str = CMAP
) -> Figure:
    """Draw a block per section of its maps side by side, a row for each gene ``shown``."""
    backdrops = [_backdrop(maps[0].section, over_image) for maps in blocks.values()]
    panels = [_PANEL * min(max((low - high) / (right - left), 0.4), 2.0) for (left, right, low, high), *_ in backdrops]
    lines = [-(-len(maps) // MOST_ACROSS) for maps in blocks.values()]
    across = [-(-len(maps) // n) for maps, n in zip(blocks.values(), lines, strict=True)]  # lines of even length
    width = max(_LEFT + max(across) * (_PANEL + _GAP) + _RIGHT, 4.4)
    rows = [len(shown) * n for n in lines]
    height = _FOOT + sum(_HEAD + n * (_TITLE + panel + _GAP) for n, panel in zip(rows, panels, strict=True))
    figure = Figure(figsize=(width, height), facecolor="white")
    y = height
    for (name, maps), backdrop, panel, columns in zip(blocks.items(), backdrops, panels, across, strict=True):
        section = maps[0].section
        patient, spots = plain(section.uns["hifusion"]["patient"]), f"{section.n_obs:,} spots"
        y -= _HEAD
        heading = f"Section {plain(name)}  ·  patient {patient}  ·  {spots}"
        figure.text(_LEFT / width, (y + 0.14) / height, heading, fontsize=12, fontweight="bold", parse_math=False)
        for gene in shown:
            axes = []
            for i in range(len(maps)):
                y -= (_TITLE + panel + _GAP) if i % columns == 0 else 0
                left = _LEFT + i % columns * (_PANEL + _GAP)
                axes.append(figure.add_axes((left / width, (y + _GAP) / height, _PANEL / width, panel / height)))
            _draw_row(axes, gene, maps, backdrop, over_image, cmap)
    note = (
        "Each gene has one colour scale: 1st to 99th percentile of what was measured (or else of what was predicted)."
    )
    figure.text(_LEFT / width, 0.1 / height, note, fontsize=7, color="0.35")
    return figure


def map_gene(
    section: AnnData,
    color: str,
    *,
    layer: str | None = None,
    ax: Axes | None = None,
    cmap: str = CMAP,
    vmin: float | None = None,
    vmax: float | None = None,
    over_image: bool = True,
    title: str | None = None,
) -> Axes:
    """Draw one gene, or a column of ``obs``, of one section, measured or predicted, and return the axes.

    Parameters
    ----------
    color
        A gene, or a column of ``obs`` with numbers such as ``"novelty"``; as :func:`scanpy.pl.spatial` takes it.
    layer
        Of a gene, such as ``"measured"``; ``X`` where None.
    ax
        Axes to draw on; a new pyplot figure with a colour bar where None.
    vmin, vmax
        Ends of the colour scale; the 1st and 99th percentile of the values where None.
    over_image
        As in :func:`gene_figure`.
    title
        ``color`` where None.

    Raises
    ------
    InputError
        The section lacks the gene and the column, or the layer.
    """
    facts = section.uns["hifusion"]
    its_columns = [name for name in section.obs if pd.api.types.is_numeric_dtype(section.obs[name])]
    refuse_unknown("gene", [color], [*section.var_names, *its_columns], f"section {plain(facts['section'])}")
    refuse_unknown("layer", [layer] if layer else [], section.layers, f"section {plain(facts['section'])}")
    of_gene = color in section.var_names
    values = _column(section, color, layer) if of_gene else section.obs[color].to_numpy(dtype=np.float64)
    low, high = _colour_range(values)
    scale = Normalize(low if vmin is None else vmin, high if vmax is None else vmax)
    drawn = axes_or_new(ax)
    backdrop = _backdrop(section, over_image)
    spots = _draw_map(drawn, section, values, backdrop, scale, over_image, cmap)
    _scale_bar(drawn, section, backdrop)
    drawn.set_title(plain(color) if title is None else title, parse_math=False)
    if ax is None:
        bar = drawn.figure.colorbar(spots, ax=drawn, shrink=0.7, extend="both")
        bar.set_label(plain(facts["normalisation"]) if of_gene else "", parse_math=False)
    return drawn


def axes_or_new(ax: Axes | None) -> Axes:
    """``ax``, or the axes of a new pyplot figure, which a notebook shows."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt  # here only: files need no pyplot

    new: Axes = plt.subplots(layout="constrained")[1]
    return new


def _draw_row(
    axes: Sequence[Axes], gene: str, maps: Sequence[Map], backdrop: _Backdrop, over_image: bool, cmap: str
) -> None:
    """One gene of one section on an axes per map, the colour bar beside the rightmost of the first line."""
    columns = [_column(its.section, gene, its.layer) for its in maps]
    scale = Normalize(*_colour_range(columns[0] if maps[0].layer else np.concatenate(columns)))
    for ax, its, values in zip(axes, maps, columns, strict=True):
        spots = _draw_map(ax, its.section, values, backdrop, scale, over_image, cmap)
        if its.layer:
            score = f"mean {values.mean():.2f}  sd {values.std():.2f}"
        elif "measured" in its.section.layers:
            score = _score_text(values, _column(its.section, gene, "measured"))
        else:
            score = "not measured"
        ax.set_title(f"{plain(its.title, 28)}\n{score}", fontsize=8.5, linespacing=1.3, pad=4, parse_math=False)
    _scale_bar(axes[0], maps[0].section, backdrop)
    axes[0].set_ylabel(plain(gene, 20), fontsize=11, fontweight="bold", parse_math=False)
    rightmost = max(axes, key=lambda ax: ax.get_position().x1)
    bar = axes[0].figure.colorbar(spots, cax=rightmost.inset_axes((1.06, 0.1, 0.05, 0.8)), extend="both")
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label(plain(maps[0].section.uns["hifusion"]["normalisation"]), fontsize=8, parse_math=False)


def _draw_map(
    ax: Axes, section: AnnData, values: np.ndarray, backdrop: _Backdrop, scale: Normalize, over_image: bool, cmap: str
) -> EllipseCollection:
    if cmap not in colormaps:
        raise InputError(f"cmap={cmap!r} is unknown; use a name of matplotlib such as magma, viridis or cividis")
    facts = section.uns["hifusion"]
    size = np.full(section.n_obs, facts["spot_diameter_um" if over_image else "pitch_um"] / facts["mpp"])
    if backdrop.picture is not None:
        ax.imshow(backdrop.picture, extent=backdrop.extent, zorder=0)
    spots = EllipseCollection(
        size, size, np.zeros(section.n_obs), units="xy", offsets=section.obsm["spatial"], offset_transform=ax.transData
    )
    spots.set(cmap=colormaps[cmap].with_extremes(bad="0.75"), norm=scale, array=np.ma.masked_invalid(values))
    spots.set(linewidths=0.15 if over_image else 0, edgecolors="0.2" if over_image else "none")
    spots.set_rasterized(section.n_obs > MOST_VECTORS)
    ax.add_collection(spots, autolim=False)
    left, right, bottom, top = backdrop.view
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set(linewidth=0.4, color="0.7")
    return spots


def _backdrop(section: AnnData, over_image: bool) -> _Backdrop:
    """View of a section's spots with a pitch around and room for the scale bar below; the picture, made pale."""
    facts, centres = section.uns["hifusion"], section.obsm["spatial"]
    pitch = facts["pitch_um"] / facts["mpp"]
    (left, top), (right, bottom) = centres.min(axis=0) - pitch, centres.max(axis=0) + pitch
    view = (left, right, bottom + 0.09 * max(bottom - top, right - left), top)
    entry = section.uns.get("spatial", {}).get(facts["section"], {})
    picture = entry.get("images", {}).get("hires")
    shrink = entry.get("scalefactors", {}).get("tissue_hires_scalef")
    if not over_image or picture is None or not shrink:
        return _Backdrop(view, None, view)
    # Half the colour and half the darkness: tissue stays readable and does not compete with the spots.
    colour = picture[..., :3].astype(np.float32)
    pale = 255 - (255 - 0.5 * (colour + colour.mean(axis=2, keepdims=True))) * 0.5
    return _Backdrop(view, pale.astype(np.uint8), (0, picture.shape[1] / shrink, picture.shape[0] / shrink, 0))


def _scale_bar(ax: Axes, section: AnnData, backdrop: _Backdrop) -> None:
    """A bar of a round length, at most 30 % of the width, in the lower left corner."""
    left, right, bottom, top = backdrop.view
    mpp = section.uns["hifusion"]["mpp"]
    most_um = 0.3 * (right - left) * mpp
    power = 10.0 ** np.floor(np.log10(most_um))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= most_um)
    start, y = left + 0.04 * (right - left), bottom - 0.035 * (bottom - top)
    end = start + length_um / mpp
    halo = [withStroke(linewidth=2, foreground="white")]
    ax.plot([start, end], [y, y], color="black", lw=1.8, solid_capstyle="butt", path_effects=halo)
    ax.text(end, y, f"  {length_um:g} µm", fontsize=6.5, va="center", path_effects=halo)


def _score_text(predicted: np.ndarray, measured: np.ndarray) -> str:
    if not (np.isfinite(predicted).all() and np.isfinite(measured).all()):
        return "MAE n/a  pcc_per_gene n/a"
    pcc = metrics.pcc_per_gene(predicted[:, None], measured[:, None])[0]
    return f"MAE {np.abs(predicted - measured).mean():.2f}  pcc_per_gene {'n/a' if np.isnan(pcc) else f'{pcc:.2f}'}"


def _column(section: AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    """Expression of one gene, float64 ``(N,)``."""
    return section[:, [gene]].to_df(layer).to_numpy(dtype=np.float64).ravel()


def _colour_range(values: np.ndarray) -> tuple[float, float]:
    """1st and 99th percentile; the ends where those are equal; half a unit around a constant."""
    known = values[np.isfinite(values)]
    for low, high in (np.percentile(known, [1, 99]), (known.min(), known.max())) if known.size else ():
        if high > low:
            return float(low), float(high)
    middle = float(known[0]) if known.size else 0.0
    return middle - 0.5, middle + 0.5


def read_maps(source: Path | Sequence[Path], sections: Names, models: Names) -> dict[str, list[Map]]:
    """Section -> its maps, floor first; names given by the user only choose among what was found."""
    paths = [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]
    folder = paths[0] if len(paths) == 1 and not paths[0].is_file() else None
    found = find_predictions(folder) if folder else _by_run(paths)
    where = str(folder or "the files")
    labels = choose_models(sorted({label for _, label in found}, key=rank), models, folder)
    names = sorted({name for name, label in found if label in labels}, key=natural)
    refuse_unknown("section", sections or (), names, where)
    blocks = {}
    for name in dict.fromkeys(sections) if sections else names[:2]:
        maps = [Map(label, read_section(found[name, label])) for label in labels if (name, label) in found]
        truth = [Map("measured", its.section, "measured") for its in maps if "measured" in its.section.layers]
        blocks[name] = truth[:1] + maps
    return blocks


def _by_run(paths: Sequence[Path]) -> dict[tuple[str, str], Path]:
    """(section, run) -> file: a prediction file counts as the model that its ``run`` names."""
    if not paths:
        raise InputError(
            "no files, so nothing to draw; give an evaluation folder, or .h5ad files of `hifusion predict`"
        )
    found: dict[tuple[str, str], Path] = {}
    for path in paths:
        facts = read_section(path).uns["hifusion"]
        key = (facts["section"], facts["run"])
        if not facts["run"]:
            raise InputError(f"{path}: is a measured section, not a prediction; make one with `hifusion predict`")
        if key in found:
            raise InputError(f"{path}: the same section and run as {found[key]}; give one of them")
        found[key] = path
    return found


def choose_genes(blocks: dict[str, list[Map]], genes: Names) -> list[str]:
    """The genes to draw: those asked for if every panel has them, else the markers or the first of the panels."""
    for name, maps in blocks.items():
        units = sorted({its.section.uns["hifusion"]["normalisation"] for its in maps})
        if len(units) > 1:
            raise InputError(f"section {plain(name)}: units {', '.join(map(plain, units))} differ; draw one at a time")
        for its in maps:
            refuse_unknown("gene", genes or (), its.section.var_names, f"the panel of section {plain(name)}")
    panels = [its.section.var_names for maps in blocks.values() for its in maps]
    common = [gene for gene in panels[0] if all(gene in panel for panel in panels)]
    if not common:
        raise InputError(f"sections {', '.join(map(plain, blocks))} share no gene; draw one section or model at a time")
    return list(dict.fromkeys(genes)) if genes else [gene for gene in MARKERS if gene in common] or common[:3]


def check_out(out: Path, dpi: int) -> None:
    """Refuse a file that cannot become a picture, before anything is read."""
    if Path(out).suffix.lower() not in FORMATS or Path(out).is_dir():
        raise InputError(f"{out}: cannot be drawn to; give a file that ends in {', '.join(FORMATS)}")
    if not 20 <= dpi <= 1200:
        raise InputError(f"dpi={dpi} is not possible; use 20 to 1200")


def save(figure: Figure, out: Path, dpi: int) -> Path:
    """Write a figure in the format of the suffix, whole or not at all; the same figure gives the same bytes."""
    wide, high = figure.get_size_inches() * dpi
    if max(wide, high) > MOST_PX:
        raise InputError(f"{out}: {wide:.0f} x {high:.0f} px, at most {MOST_PX} a side; draw fewer genes or lower dpi")
    kind = Path(out).suffix.lower()
    with files.replacing(Path(out)) as part, rc_context({"svg.hashsalt": "hifusion"}):
        figure.savefig(part, format=kind[1:], dpi=dpi, metadata=FORMATS[kind])
    return Path(out)
