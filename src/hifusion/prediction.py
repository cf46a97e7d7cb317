"""A trained run and a section: expression at each of its spots."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from torch import Tensor

from hifusion.checkpoint import Run
from hifusion.cohort import SectionView
from hifusion.data import read_regions
from hifusion.errors import InputError
from hifusion.expression import normalisation, panel_counts, total_counts
from hifusion.inference import best_device, predict_regions
from hifusion.section import predicted_section
from hifusion.slide import Slide
from hifusion.store import refuse_outside, region_shrink

Progress = Callable[[str, int, int], None]  # (what is going on, spots done, spots in all)


def predict_view(run: Run, view: SectionView, progress: Progress | None = None) -> np.ndarray:
    """Expression of a section whose region patches are in a store, float32 ``(N, G)``."""
    rows = np.arange(len(view.centres_px))
    size = run.recipe.batch_size
    chunks = (read_regions(view, rows[start : start + size]) for start in range(0, len(rows), size))
    return _predict(run, chunks, view.name, len(rows), progress)


def predict_section(run: Run, section: AnnData, image: Path | None = None, progress: Progress | None = None) -> AnnData:
    """Predict a section from its image: a new section with expression ``X`` of the run's panel at the same spots.

    Where ``section`` is measured and has the panel's genes, its own expression in the run's unit goes along as
    ``layers["measured"]``.

    Parameters
    ----------
    image
        The slide; the path kept in the section where None.

    Raises
    ------
    InputError
        No image, one that cannot be read, or spots that lie outside it.
    """
    facts = section.uns["hifusion"]
    if image is None and not facts["image"]:
        raise InputError(f"section {facts['section']} names no image; give one with --image")
    slide = Slide(image or Path(facts["image"]))
    refuse_outside(section, slide)
    shrink = region_shrink(section, run.recipe.region_mpp)
    centres, size, side = section.obsm["spatial"], run.recipe.batch_size, run.recipe.model.region_px

    def regions() -> Iterator[Tensor]:
        for start in range(0, len(centres), size):
            cut = [slide.read_patch(x, y, side, shrink)[0] for x, y in centres[start : start + size]]
            yield torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2)

    expression = _predict(run, regions(), facts["section"], len(centres), progress)
    predicted = as_section(run.id, run, section, expression)
    predicted.uns["hifusion"]["image"] = str(
        slide.path.resolve()
    )  # the one that was read, which may have been given here
    return predicted


def as_section(name: str, run: Run, section: AnnData, expression: np.ndarray) -> AnnData:
    """Wrap predicted expression as a section, the measured one beside it where there is one."""
    unit, panel = run.recipe.normalisation, run.panel
    predicted = predicted_section(
        section, expression, genes=panel.genes, normalisation=unit, panel_digest=panel.digest, run=name
    )
    if "counts" in section.layers and set(panel.genes) <= set(section.var_names):
        counts = panel_counts(section, panel.genes)
        predicted.layers["measured"] = normalisation(unit).of(counts, total_counts(section))
    return predicted


def _predict(run: Run, regions: Iterator[Tensor], name: str, spots: int, progress: Progress | None) -> np.ndarray:
    done = 0

    def report(batch: int) -> None:
        nonlocal done
        done += batch
        if progress:
            progress(f"predict {name}", done, spots)

    return predict_regions(run.network(best_device()), regions, precision=run.facts["precision"], on_batch=report)
