"""The figures by the names that `hifusion plot --kind` gives them, each with the options it has."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hifusion.curves import plot_error_split
from hifusion.errors import InputError
from hifusion.figures import (
    plot_2d_against_3d,
    plot_gene_scatter,
    plot_moran_retention,
    plot_paper_figure3,
    plot_skill_distribution,
)
from hifusion.plots import plot_genes


def draw(
    kind: str,
    source: Sequence[Path],
    out: Path,
    *,
    genes: Sequence[str] | None = None,
    sections: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    over_image: bool = True,
) -> Path:
    """Draw one of the figures of an evaluation or benchmark folder; returns ``out``.

    Parameters
    ----------
    kind
        ``"maps"`` (:func:`hifusion.plots.plot_genes`), or of ``hifusion.figures``: ``"scatter"``, ``"skill"``,
        ``"moran"``, ``"error"``, ``"figure3"``, ``"2d3d"`` (two folders: between patients, then within).
    models
        Names or labels; ``"scatter"`` and ``"2d3d"`` show one.

    Raises
    ------
    InputError
        Options that this kind does not have, or what the figure itself refuses.
    """
    given: dict[str, Any] = {"genes": genes, "sections": sections, "models": models}
    allowed = _FIGURES[kind].options
    needless = [name for name, value in given.items() if value is not None and name not in allowed]
    if needless:
        raise InputError(f"--{needless[0]} is not for --kind {kind}; leave it out, it has {', '.join(allowed)}")
    folders = _FIGURES[kind].folders
    if folders and len(source) != folders:
        raise InputError(f"--kind {kind}: {len(source)} given; give {folders} evaluation folder{'s' * (folders > 1)}")
    options: dict[str, Any] = {
        allowed[name]: value[0] if allowed[name] in ("model", "section") else value
        for name, value in given.items()
        if value is not None
    }
    if _FIGURES[kind].over_image:
        options["over_image"] = over_image
    sources = source if folders else [source[0] if len(source) == 1 else source]
    path: Path = _FIGURES[kind].draw(*sources, out, **options)
    return path


class _Figure(NamedTuple):
    draw: Callable[..., Path]
    options: dict[str, str]
    """What can be chosen -> keyword of the function; for a single one the first name counts."""
    folders: int
    """Evaluation folders it takes; 0: any source of maps."""
    over_image: bool


_FIGURES: dict[str, _Figure] = {
    "maps": _Figure(plot_genes, {name: name for name in ("genes", "sections", "models")}, 0, True),
    "scatter": _Figure(plot_gene_scatter, {"genes": "genes", "sections": "sections", "models": "model"}, 1, False),
    "skill": _Figure(plot_skill_distribution, {"models": "models"}, 1, False),
    "moran": _Figure(plot_moran_retention, {"models": "models"}, 1, False),
    "error": _Figure(plot_error_split, {"models": "models"}, 1, False),
    "figure3": _Figure(plot_paper_figure3, {"genes": "genes", "sections": "section", "models": "models"}, 1, True),
    "2d3d": _Figure(plot_2d_against_3d, {"genes": "genes", "sections": "section", "models": "model"}, 2, True),
}
