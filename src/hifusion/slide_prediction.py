"""A trained run and a slide that was never measured: plan, tissue, lattice, predictions, pictures, in one folder.

::

    plan.json        what was asked for and found: scale, lattice, spots, estimated cost
    tissue.png       the tissue mask; edit it in any paint program and give it back with --mask
    spots.csv        the lattice: name, centre, array position of every spot
    overlay.png      mask and lattice over the slide, to look at
    section.h5ad     the prediction, a section as every other
    maps.png         marker genes
    novelty.png      where the prediction should not be trusted
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from hifusion import files, overlays
from hifusion.checkpoint import Run
from hifusion.costs import host_peak_mib
from hifusion.errors import InputError
from hifusion.lattice import lattice_section
from hifusion.models import MODELS
from hifusion.prediction import bytes_a_spot, patch_shrink, predict_section, spot_outputs, values_a_spot
from hifusion.slide import Slide
from hifusion.tissue import TissueMask, find_tissue, read_mask, write_mask

Progress = Callable[[str, int, int], None]  # (what is going on, spots done, spots in all)
FINE_ENOUGH = 0.8  # slide pixels per patch pixel: below, a patch shows less than those of training did
PROBE_BATCHES = 1  # timed for the estimate, after one that warms up


@dataclass(frozen=True)
class SlidePlan:
    """What a prediction of a slide will do.

    Attributes
    ----------
    slide, mask, section
        The slide, its tissue, and the positions to predict, a section without genes.
    average_within_um
        Side of the square each prediction stands for, where the lattice is denser than that; else None.
    facts
        Plain values: what ``--dry-run`` prints and ``plan.json`` keeps.
    """

    slide: Slide
    mask: TissueMask
    section: AnnData
    average_within_um: float | None
    facts: dict[str, Any]

    def __repr__(self) -> str:
        its = self.facts
        return (
            f"SlidePlan({str(self.slide.path)!r}): {its['spots']:,} spots over {its['tissue_mm2']:g} mm2 of tissue at "
            f"{its['mpp']:.3g} um per pixel, {its['genes']} genes, about {its['minutes']:g} minutes"
        )


def plan_slide(
    run: Run,
    path: Path,
    *,
    mpp: float | None = None,
    mask: Path | None = None,
    lattice: str | None = None,
    stride_um: float | None = None,
    average_symmetries: bool = False,
    int8: bool = False,
    workers: int = 0,
) -> SlidePlan:
    """Find the tissue of a slide and place spots on it, as far apart as those the run was trained on; time a few.

    Parameters
    ----------
    mpp
        um per full-resolution pixel, where the file does not say it (or says it wrong).
    mask
        A tissue mask to use, as ``tissue.png`` of an earlier prediction.
    lattice
        ``"square"`` or ``"hexagonal"``; that of the training sections where None.
    stride_um
        Distance between spots instead of the training pitch: a dense map. Predictions whose spot patches overlap are
        averaged.
    average_symmetries, int8, workers
        As :func:`hifusion.prediction.predict_section`.

    Raises
    ------
    InputError
        A slide that cannot be read, of unknown scale or without tissue; a run that does not know its own scale.
    """
    spots = run.facts.get("spots")
    if spots is None:
        raise InputError(
            f"{run.root}: the run does not say how far apart its training spots were (made by an older version); "
            "train it anew"
        )
    if stride_um is not None and not 0 < stride_um <= spots["pitch_um"]:
        raise InputError(
            f"stride_um={stride_um} is not possible; give a distance of at most the training pitch, "
            f"{spots['pitch_um']:g} um"
        )
    slide = Slide(path, mpp)
    scale = slide.require_mpp()
    tissue = read_mask(mask, slide) if mask else find_tissue(slide, scale)
    section = lattice_section(
        slide,
        tissue,
        mpp=scale,
        pitch_um=stride_um or spots["pitch_um"],
        spot_diameter_um=min(spots["spot_diameter_um"], stride_um or spots["pitch_um"]),  # dense spots do not overlap
        kind=lattice or spots["lattice"],
    )
    shrink, genes = patch_shrink(run, section), len(run.panel.genes)
    patch_um = run.recipe.model.spot_px * shrink * scale
    rate = _spots_per_second(run, section, average_symmetries, int8, workers)
    held, kept = bytes_a_spot(run)
    table = 4 * values_a_spot(run)
    coarse = (
        f"the slide has {scale:.3g} um per pixel, training had {scale * shrink:.3g}: patches are enlarged and "
        "lack detail it relies on"
    )
    facts = {
        "run": run.id,
        "slide": str(slide.path),
        "size_px": list(slide.size_px),
        "mpp": scale,
        "mpp_source": slide.mpp_source,
        "warning": coarse if shrink < FINE_ENOUGH else "none",
        "tissue": tissue.how,
        "tissue_mm2": round(float(tissue.mask.mean() * np.prod(np.array(slide.size_px) * scale / 1000)), 3),
        "lattice": lattice or spots["lattice"],
        "pitch_um": stride_um or spots["pitch_um"],
        "patch_um": round(patch_um, 1),
        "averaged_overlaps": stride_um is not None,
        "averaged_symmetries": average_symmetries,
        "int8": int8,
        "spots": section.n_obs,
        "genes": genes,
        "spots_per_s": round(rate, 2),
        "minutes": round(section.n_obs / rate / 60, 1),
        # The table stands in memory three times while the file is built.
        "memory_gib": round(np.nan_to_num(host_peak_mib()) / 1024 + section.n_obs * max(held, 3 * table) / 2**30, 1),
        "disk_mib": round(section.n_obs * (2 * table + kept) / 2**20 + 2, 1),
    }
    return SlidePlan(slide, tissue, section, patch_um if stride_um is not None else None, facts)


def predict_slide(
    run: Run,
    plan: SlidePlan,
    out: Path,
    *,
    average_symmetries: bool = False,
    int8: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> AnnData:
    """Predict a slide as planned and leave a folder (see the head of this module); a stopped one goes on.

    Raises
    ------
    InputError
        ``out`` holds something else, or the disk is full.
    """
    out = Path(out)
    # Hidden files are no one's work: what an interrupted prediction kept, or an archive's note of attempts.
    if out.exists() and (not out.is_dir() or (_shown(out) and not (out / "plan.json").exists())):
        raise InputError(f"{out}: is not empty and holds no prediction of a slide; give a new folder")
    files.write_json(out / "plan.json", plan.facts)
    write_mask(plan.mask, out / "tissue.png")
    files.write_text(out / "spots.csv", _spot_table(plan.section).to_csv(index_label="spot", lineterminator="\n"))
    overlays.draw_tissue(plan.slide, plan.mask, plan.section, out / "overlay.png")
    predicted = predict_section(
        run,
        plan.section,
        average_symmetries=average_symmetries,
        average_within_um=plan.average_within_um,
        int8=int8,
        workers=workers,
        out=out / "section.h5ad",
        progress=progress,
    )
    overlays.draw_maps(predicted, out / "maps.png")
    overlays.draw_novelty(predicted, out / "novelty.png")
    return predicted


def _shown(folder: Path) -> bool:
    return any(not path.name.startswith(".") for path in folder.iterdir())


def _spot_table(section: AnnData) -> pd.DataFrame:
    x, y = section.obsm["spatial"].T
    return section.obs[["array_row", "array_col"]].assign(x_px=x, y_px=y)


def _spots_per_second(run: Run, section: AnnData, average_symmetries: bool, int8: bool, workers: int) -> float:
    """Reading and network together, on patches from the middle of the section."""
    # The first batch warms up; of a network that looks at a whole section, it waits for what is made for all of them.
    warm = 0 if MODELS[run.recipe.network].needs else 1
    some = section[section.n_obs // 2 :][: run.recipe.batch_size * (PROBE_BATCHES + warm)].copy()
    slide, shrink = Path(section.uns["hifusion"]["image"]), patch_shrink(run, section)
    started, spots, seconds = time.perf_counter(), [], []
    for batch in spot_outputs(
        run, some, slide, shrink, average_symmetries=average_symmetries, int8=int8, workers=workers
    ):
        spots.append(len(batch.expression))
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    warm = min(warm, len(spots) - 1)
    return sum(spots[warm:]) / sum(seconds[warm:])
