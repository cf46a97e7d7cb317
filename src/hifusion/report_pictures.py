"""The pictures of a report: drawn as elsewhere, then carried in the page itself."""

import base64
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from hifusion.curves import plot_error_split, plot_learning
from hifusion.errors import plain
from hifusion.figures import plot_gene_scatter, plot_skill_distribution
from hifusion.overlays import draw_novelty
from hifusion.pages import Picture
from hifusion.plots import plot_genes
from hifusion.report_study import Study
from hifusion.section import read_section

DPI = 110
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
MOST_VECTORS = 6000  # points of a figure drawn as vectors; a page of more would be slow to open


def carried(draw: Callable[[Path], object], suffix: str, shows: str, caption: str = "", wide: bool = False) -> Picture:
    """A picture that the page carries: ``draw`` writes it to the path it is given."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"picture{suffix}"
        draw(path)
        data = base64.b64encode(path.read_bytes()).decode()
    return Picture(f"data:{_TYPES[suffix]};base64,{data}", shows, caption, wide)


def learning(runs: Sequence[Path], of: str) -> Picture:
    """Learning curves of the first of some runs."""
    more = f" One of {len(runs)} trainings; the others lie in runs/." if len(runs) > 1 else ""
    return carried(
        lambda out: plot_learning(runs[0], out),
        ".svg",
        f"Learning curves of {of}: loss of the training and error on held-out spots, by epoch",
        "Left: what was minimised, on the spots that were learned from. Right: squared error on spots held out of the "
        f"training; the epoch with the dot was kept.{more}",
    )


def maps(study: Study) -> list[Picture]:
    """Measured and predicted maps of the section shown; none where no predictions were kept."""
    labels = [label for label in (study.rival, study.label) if label in study.predictions]
    if study.label not in labels or not study.genes:
        return []
    shown = ", ".join(map(plain, study.genes))
    word = study.trust.set_index("gene")["trust"]
    return [
        carried(
            lambda out: plot_genes(
                study.folder, out, genes=study.genes, sections=[study.section], models=labels, dpi=DPI
            ),
            ".png",
            f"Maps of {shown} in section {plain(study.section)}: measured, and predicted by {' and '.join(labels)}",
            f"Section {plain(study.section)}: what was measured, then what was predicted, over the H&E where it is at "
            "hand. Predicted maps are smoother than measured ones: part of what looks like grain in a measurement is "
            "counting noise. "
            f"Trust: {', '.join(f'{plain(gene)} {word[gene]}' for gene in study.genes)}.",
            wide=True,
        )
    ]


def scatter(study: Study) -> list[Picture]:
    """Predicted against measured, gene by gene; none where no predictions were kept."""
    if study.label not in study.predictions or not study.genes:
        return []
    few = study.scores["n_spots"] * len(study.genes) <= MOST_VECTORS
    return [
        carried(
            lambda out: plot_gene_scatter(study.folder, out, model=study.label, genes=study.genes, dpi=DPI),
            ".svg" if few else ".png",
            f"Predicted against measured expression of {', '.join(map(plain, study.genes))}, a point a spot",
            "A point is a spot, a colour a section. On the dashed line prediction and measurement are equal; a flat "
            "cloud is a prediction that keeps near the mean.",
            wide=True,
        )
    ]


def skill(study: Study) -> Picture:
    """How the correlation is spread over genes, method by method."""
    return carried(
        lambda out: plot_skill_distribution(study.folder, out),
        ".svg",
        "Correlation of every gene's map with the measured one, a row for each method, the ceiling last",
        "A point is a gene. White dot: median; bar: the middle half; dashed line: the mean ceiling.",
        wide=True,
    )


def error_split(study: Study) -> Picture:
    return carried(
        lambda out: plot_error_split(study.folder, out),
        ".svg",
        "Mean squared error of each method, split into pattern and offset",
        "Offset is what knowing the section's mean would mend; pattern is what makes a map wrong.",
        wide=True,
    )


def novelty(study: Study) -> list[Picture]:
    """Novelty of the spots of the section shown; none where the model does not tell it."""
    if study.label not in study.predictions:
        return []
    section = read_section(study.predictions[study.label])
    if "novelty" not in section.obs or section.obs["novelty"].isna().all():
        return []
    return [
        carried(
            lambda out: draw_novelty(section, out),
            ".png",
            f"Novelty of the spots of section {plain(study.section)}",
            "Blue: ground that the training knew. Red: more unlike the training spots than 95 % of held-out ones, and "
            "there a prediction has nothing to rest on.",
        )
    ]


def learning_of(study: Study) -> list[Picture]:
    """Learning curves of the model; none where no run of it was trained epoch by epoch."""
    logged = [run for run in study.runs if (run / "log.csv").exists()]
    return [learning(logged, plain(study.model))] if logged else []
