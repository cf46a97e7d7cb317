"""Figures of an evaluation: predicted against measured, skill and spatial pattern by model, maps of many models.

Everything is read from the folder that `hifusion evaluate` leaves; nothing here runs a model.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hifusion import files, metrics
from hifusion.curves import LINES, gene_means
from hifusion.errors import InputError, plain, refuse_unknown
from hifusion.evaluated import ORDER, Names, base_name, choose_models, find_predictions, natural, rank
from hifusion.plots import Map, axes_or_new, check_out, choose_genes, draw_blocks, read_maps, save
from hifusion.section import read_section

PAPER_GENES = ("ERBB2", "KRT19", "CD74")
GENES_2D_3D = ("ERBB2", "KRT19", "TMSB10")
MOST_COLUMNS = 4  # panels side by side; more go into further rows
CEILING = "ceiling"
MOST_LEGEND = 12  # sections named in a legend; of more only the number is told


def plot_gene_scatter(
    folder: Path,
    out: Path,
    *,
    model: str | None = None,
    genes: Names = None,
    sections: Names = None,
    dpi: int = 150,
) -> Path:
    """Draw predicted against measured expression of every spot, a panel per gene, coloured by section.

    The titles tell the MSE over all spots and ``pcc_per_gene``, its mean over sections (undefined counts as 0).

    Parameters
    ----------
    model
        Label, or name (its first seed); the last of the evaluation's models where None: a network where there is one.
    genes
        The markers that all panels have where None; without any, the first three genes.
    sections
        All that the model predicted where None.

    Raises
    ------
    InputError
        No predictions, or a gene, section or model that is not there.
    """
    check_out(out, dpi)
    its = _read_spots(folder, model, genes, sections)
    shown = list(map(str, next(iter(its.truth.values()))))
    figure, axes = _grid(len(shown), 2.8, 3.05)
    for ax, gene in zip(axes, shown, strict=True):
        _scatter(ax, gene, its)
    figure.supxlabel(f"measured ({its.unit})", fontsize=9, parse_math=False)
    figure.supylabel(f"predicted ({its.unit})", fontsize=9, parse_math=False)
    figure.suptitle(
        f"{plain(its.label)}  ·  {_number(len(its.truth), 'section')}", fontsize=10, fontweight="bold", parse_math=False
    )
    if len(its.truth) <= MOST_LEGEND:
        _legend(figure, axes[0])
    return save(figure, out, dpi)


def gene_scatter(
    folder: Path, color: str, *, model: str | None = None, sections: Names = None, ax: Axes | None = None
) -> Axes:
    """Draw one panel of :func:`plot_gene_scatter` on axes.

    Parameters
    ----------
    color
        The gene.
    ax
        Axes to draw on; a new pyplot figure where None.
    """
    its = _read_spots(folder, model, [color], sections)
    ax = axes_or_new(ax)
    _scatter(ax, color, its)
    ax.set_xlabel(f"measured ({its.unit})", parse_math=False)
    ax.set_ylabel(f"predicted ({its.unit})", parse_math=False)
    return ax


class _Spots(NamedTuple):
    """What one model says of some genes, by section."""

    label: str
    truth: dict[str, pd.DataFrame]
    guess: dict[str, pd.DataFrame]
    unit: str


def _read_spots(folder: Path, model: str | None, genes: Names, sections: Names) -> _Spots:
    folder = Path(folder)
    found = find_predictions(folder)
    labels = sorted({label for _, label in found}, key=rank)
    label = choose_models(labels, [model], folder)[0] if model else choose_models(labels, None, folder)[-1]
    predicted = sorted((name for name, its in found if its == label), key=natural)
    refuse_unknown("section", sections or (), predicted, f"the predictions of {plain(label)}")
    chosen = list(dict.fromkeys(sections)) if sections else predicted
    blocks = {name: [Map(label, read_section(found[name, label]))] for name in chosen}
    shown = choose_genes(blocks, genes)
    tables = {name: maps[0].section[:, shown] for name, maps in blocks.items()}
    for name, table in tables.items():
        if "measured" not in table.layers:
            raise InputError(f"section {plain(name)}: nothing was measured in {folder}; give a folder of an evaluation")
    truth = {name: table.to_df("measured") for name, table in tables.items()}
    guess = {name: table.to_df() for name, table in tables.items()}
    return _Spots(label, truth, guess, plain(next(iter(tables.values())).uns["hifusion"]["normalisation"]))


def _scatter(ax: Axes, gene: str, its: _Spots) -> None:
    size = float(np.clip(4000 / sum(map(len, its.truth.values())), 1.5, 14))
    for name, colour in zip(its.truth, _colours(len(its.truth)), strict=True):
        truth, guess = its.truth[name][gene], its.guess[name][gene]
        ax.scatter(truth, guess, s=size, color=colour, alpha=0.65, lw=0, label=plain(name))
    x, y = (np.concatenate([table[gene] for table in side.values()]) for side in (its.truth, its.guess))
    own = [
        metrics.pcc_per_gene(its.guess[name][[gene]].to_numpy(), its.truth[name][[gene]].to_numpy())[0]
        for name in its.truth
    ]
    _identity(ax, np.concatenate([x, y]))
    _title(ax, gene, f"pcc_per_gene {np.nan_to_num(own).mean():+.2f}   MSE {np.square(y - x).mean():.3f}")


def plot_skill_distribution(folder: Path, out: Path, *, models: Names = None, dpi: int = 150) -> Path:
    """Draw how ``pcc_per_gene`` is spread over genes: a row per model, the floor first, the ceiling last.

    A gene is a point: the mean over sections, then patients, then seeds, an undefined correlation counted as 0. The
    dashed line is the mean ceiling that counting noise leaves.

    Raises
    ------
    InputError
        No ``metrics.csv`` in the folder, or a model that is not in it.
    """
    check_out(out, dpi)
    rows = _skill_rows(folder, models)
    figure = Figure(figsize=(7.2, 1.1 + 0.42 * len(rows)), layout="constrained", facecolor="white")
    _draw_skill(figure.subplots(), rows)
    return save(figure, out, dpi)


def skill_distribution(folder: Path, *, models: Names = None, ax: Axes | None = None) -> Axes:
    """Draw on axes what :func:`plot_skill_distribution` draws; on a new figure where ``ax`` is None."""
    rows = _skill_rows(folder, models)
    ax = axes_or_new(ax)
    _draw_skill(ax, rows)
    return ax


def _skill_rows(folder: Path, models: Names) -> dict[str, np.ndarray]:
    """Correlation of every gene, by model, and at last the ceiling where it is known."""
    skill = gene_means(folder, ("pcc_per_gene", "ceiling"), models)
    rows = {name: skill.loc[name, "pcc_per_gene"].to_numpy() for name in skill.index.unique("model")}
    ceiling = skill["ceiling"].groupby("gene").mean().dropna().to_numpy()
    return rows | ({CEILING: ceiling} if ceiling.size else {})


def _draw_skill(ax: Axes, rows: dict[str, np.ndarray]) -> None:
    ceiling = rows.get(CEILING, np.empty(0))
    jitter = np.random.default_rng(0)
    for row, (name, values) in enumerate(rows.items()):
        colour = "0.45" if name == CEILING else LINES[2] if _null(name) else LINES[0]
        if np.ptp(values) > 0:
            drawn = ax.violinplot(values, [row], orientation="horizontal", widths=0.8, showextrema=False)
            drawn["bodies"][0].set(facecolor=colour, alpha=0.25, linewidth=0)  # type: ignore[index]
        ax.scatter(values, row + jitter.uniform(-0.16, 0.16, values.size), s=5, color=colour, alpha=0.5, lw=0)
        low, middle, high = np.percentile(values, [25, 50, 75])
        ax.plot([low, high], [row, row], color=colour, lw=4, solid_capstyle="butt")
        ax.plot([middle], [row], "o", color="white", mec=colour, ms=5)
        text = f"{values.mean():+.3f}"
        ax.text(1.01, row, text, transform=ax.get_yaxis_transform(), fontsize=8, va="center", clip_on=False)
    ax.text(1.01, -0.85, "mean", transform=ax.get_yaxis_transform(), fontsize=8, va="center", color="0.35")
    if ceiling.size:
        ax.axvline(ceiling.mean(), color="0.45", ls="--", lw=1, zorder=0)
    ax.axvline(0, color="0.8", lw=0.8, zorder=0)
    ax.set_yticks(range(len(rows)), [plain(name, 32) for name in rows], fontsize=9, parse_math=False)
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"pcc_per_gene of {_number(max(map(len, rows.values())), 'gene')}")
    ax.spines[["top", "right"]].set_visible(False)


def plot_moran_retention(folder: Path, out: Path, *, models: Names = None, dpi: int = 150) -> Path:
    """Draw Moran's I of each gene's predicted map against that of the measured one, a panel per model.

    Above the line a map is smoother than what was measured, below it more scattered. Means as in
    :func:`plot_skill_distribution`; constant maps have no Moran's I and are counted in the titles.

    Raises
    ------
    InputError
        No ``metrics.csv`` in the folder, or a model that is not in it.
    """
    check_out(out, dpi)
    moran = gene_means(folder, ("moran_truth", "moran_prediction"), models)
    names = list(moran.index.unique("model"))
    known = moran.to_numpy()[np.isfinite(moran.to_numpy())]
    figure, axes = _grid(len(names), 2.4, 2.4)
    for ax, name in zip(axes, names, strict=True):
        its = moran.loc[name]
        both = its.dropna()
        colour = LINES[2] if _null(name) else LINES[0]
        ax.scatter(both["moran_truth"], both["moran_prediction"], s=9, color=colour, alpha=0.6, lw=0)
        _identity(ax, known)
        undefined = f"{len(its) - len(both)} of {len(its)} maps constant"
        means = f"mean {both['moran_truth'].mean():.2f} → {both['moran_prediction'].mean():.2f}" if len(both) else ""
        _title(ax, name, "   ".join(filter(None, [means, undefined if len(both) < len(its) else ""])))
    figure.supxlabel("Moran's I of the measured map", fontsize=9)
    figure.supylabel("Moran's I of the predicted map", fontsize=9)
    return save(figure, out, dpi)


def plot_paper_figure3(
    folder: Path,
    out: Path,
    *,
    section: str | None = None,
    genes: Names = PAPER_GENES,
    models: Names = None,
    over_image: bool = True,
    dpi: int = 150,
) -> Path:
    """Draw maps as in the paper's third figure: a row per gene; measured, then networks, then nulls and simple rivals.

    Everything else is as in :func:`hifusion.plots.plot_genes`.

    Parameters
    ----------
    section
        The first of the evaluation where None.
    genes
        All must be in the panel; None takes the markers that are.

    Raises
    ------
    InputError
        Nothing to draw, or a gene, section or model that is not there.
    """
    check_out(out, dpi)
    name, maps = next(iter(read_maps(folder, [section] if section else None, models).items()))
    blocks = {name: [its for its in maps if not _null(its.title)]}
    blocks[name] += [its._replace(title=f"null: {its.title}") for its in maps if _null(its.title)]
    return save(draw_blocks(blocks, choose_genes(blocks, genes), over_image), out, dpi)


def plot_2d_against_3d(
    folder_2d: Path,
    folder_3d: Path,
    out: Path,
    *,
    genes: Names = GENES_2D_3D,
    model: str = "hifusion",
    section: str | None = None,
    over_image: bool = True,
    dpi: int = 150,
) -> Path:
    """Draw the same section measured, predicted from other patients, and predicted from sections of the same patient.

    Parameters
    ----------
    folder_2d, folder_3d
        Evaluations by a protocol between patients, and by one within them. Where their panels make another expression
        of the same counts, the second one's is shown too.
    genes
        All must be in both panels; None takes the markers that are.
    model
        Label, or name (its first seed in each folder).
    section
        The first one that both have tested where None.

    Raises
    ------
    InputError
        A protocol of the other kind, no section that both have tested, or a gene, section or model that is not there.
    """
    check_out(out, dpi)
    tested = []
    for folder, same_patient in ((folder_2d, False), (folder_3d, True)):
        _refuse_protocol(Path(folder), same_patient)
        found = find_predictions(folder)
        label = choose_models(sorted({its for _, its in found}, key=rank), [model], folder)[0]
        tested.append({name: path for (name, its), path in found.items() if its == label})
    common = sorted(set(tested[0]) & set(tested[1]), key=natural)
    if not common:
        lists = [", ".join(sorted(map(plain, its), key=natural)) for its in tested]
        raise InputError(
            f"no section is tested both in {folder_2d} ({lists[0]}) and in {folder_3d} ({lists[1]}); evaluate both "
            "protocols on the same sections"
        )
    refuse_unknown("section", [section] if section else (), common, "both evaluations")
    name = section or common[0]
    first, second = (read_section(its[name]) for its in tested)
    maps = [Map("measured", first, "measured"), Map("from other patients", first), Map("from the same patient", second)]
    shown = choose_genes({name: maps}, genes)
    if not np.allclose(first[:, shown].to_df("measured"), second[:, shown].to_df("measured")):
        maps.insert(2, Map("measured, second panel", second, "measured"))
    return save(draw_blocks({name: maps}, shown, over_image), out, dpi)


def _refuse_protocol(folder: Path, same_patient: bool) -> None:
    """Refuse an evaluation whose protocol is not of the kind that is wanted, by its own word."""
    protocol = files.read_json(folder / "metrics.json").get("protocol", {})
    if protocol.get("same_patient") is not same_patient:
        kinds = {True: "within patients", False: "between patients"}
        raise InputError(
            f"{folder}: protocol {plain(protocol.get('name', 'unknown'))} is not {kinds[same_patient]}; give the "
            "evaluation between patients first, then the one within patients"
        )


def _null(label: str) -> bool:
    return base_name(label) in ORDER


def _grid(n: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``n`` panels of that size in inches, at most :data:`MOST_COLUMNS` side by side."""
    columns = min(n, MOST_COLUMNS)
    rows = -(-n // columns)
    size = (max(columns * width + 0.4, 3.6), rows * height + 0.4)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[n:]:
        ax.remove()
    return figure, axes[:n]


def _title(ax: Axes, name: str, score: str) -> None:
    ax.set_title(f"{plain(name, 28)}\n{score}", fontsize=8.5, linespacing=1.3, parse_math=False)


def _identity(ax: Axes, values: np.ndarray) -> None:
    """Both axes over the range of ``values``, and the line on which prediction and measurement are equal."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.5
    ends = (low - margin, high + margin)
    ax.plot(ends, ends, color="0.6", lw=0.9, ls="--", zorder=0)
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.locator_params(nbins=5)
    ax.tick_params(labelsize=7.5)
    ax.spines[["top", "right"]].set_visible(False)


def _colours(n: int) -> list[Any]:
    """A colour for each section: those told apart with any kind of colour vision while they suffice."""
    return list(LINES[:n]) if n <= len(LINES) else list(colormaps["turbo"](np.linspace(0.05, 0.95, n)))


def _legend(figure: Figure, ax: Axes) -> None:
    """A legend of what ``ax`` shows, right of all panels and never over them."""
    handles, names = ax.get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside right center", fontsize=8, frameon=False, handletextpad=0.1)
    for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
        handle.set(sizes=[22], alpha=1)  # type: ignore[union-attr]
        text.set_parse_math(False)


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
