"""The verbs, on paths and names: what the command line calls, and a notebook can."""

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from anndata import AnnData

from hifusion import checkpoint, evaluation, files, inference, plots, prediction, recipes, store, synth, training
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort
from hifusion.errors import InputError
from hifusion.readers import find_reader
from hifusion.section import read_section
from hifusion.slide import Slide
from hifusion.store import Store

Progress = Callable[[str, int, int], None]  # (what is going on, done, in all)

plot = plots.plot_genes
synthesise = synth.write_cohort


def prepare(
    data: Path,
    out: Path,
    *,
    recipe: str = "her2st_2d",
    sections: Sequence[str] | None = None,
    region_px: int | None = None,
    mpp: float | None = None,
    progress: Progress | None = None,
) -> Store:
    """Build the patch store of a raw data folder, or finish an interrupted one.

    Parameters
    ----------
    data
        Raw folder in a layout of ``hifusion.readers``.
    recipe
        The patches are of the size and scale its network takes; ``region_px`` and ``mpp`` change single values.
    sections
        Names; all where None.
    """
    data, wanted = Path(data), recipes.recipe(recipe)
    reader = find_reader(data)
    known = reader.names(data)
    unknown = [name for name in sections or () if name not in known]
    if unknown:
        raise InputError(f"{data}: has no section {', '.join(unknown)}; it has {', '.join(known)}")
    return store.prepare(
        reader.read(data, sections),
        Path(out),
        region_px=region_px or wanted.model.region_px,
        mpp=mpp or wanted.region_mpp,
        progress=progress,
    )


def train(
    data: Path,
    out: Path,
    *,
    recipe: str = "quick",
    source: str | None = None,
    overrides: Sequence[str] = (),
    sections: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train on a store and leave a run folder; see :func:`hifusion.training.train`."""
    wanted = recipes.recipe(recipe, source, overrides)
    return training.train(
        Cohort.open(data),
        wanted,
        Path(out),
        sections=sections,
        validation=validation,
        seed=seed,
        resume=resume,
        progress=progress,
    )


def evaluate(
    data: Path,
    out: Path | None = None,
    *,
    protocol: str,
    models: Sequence[str] = ("hifusion",),
    recipe: str = "quick",
    source: str | None = None,
    overrides: Sequence[str] = (),
    panel: str | None = None,
    sections: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    with_nulls: bool = True,
    with_shuffled: bool = True,
    leak_check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score models by a protocol with the nulls beside them; see :func:`hifusion.evaluation.evaluate`.

    Parameters
    ----------
    panel
        Rule or gene list, instead of the recipe's.
    sections
        Sections to make folds of; all where None. A ``"paper"`` panel is chosen on these.
    """
    wanted = recipes.recipe(recipe, source, overrides)
    return evaluation.evaluate(
        Cohort.open(data, sections),
        protocol,
        models,
        replace(wanted, panel=panel) if panel else wanted,
        Path(out) if out else None,
        seeds=seeds,
        with_nulls=with_nulls,
        with_shuffled=with_shuffled,
        leak_check=leak_check,
        progress=progress,
    )


def predict(
    run: Path, section: Path, out: Path | None = None, *, image: Path | None = None, progress: Progress | None = None
) -> AnnData:
    """Predict the spots of a section file with a trained run; written to ``out`` where given.

    Parameters
    ----------
    section
        ``.h5ad`` with positions, such as ``STORE/sections/C3.h5ad``; counts are not needed.
    image
        The slide, where the section does not name it.
    """
    if out is not None and Path(out).resolve() == Path(section).resolve():
        raise InputError(f"{out}: is the section itself, which is never overwritten; give another file")
    return prediction.predict_section(
        Run.open(run), read_section(section), image, out=Path(out) if out else None, progress=progress
    )


def info(path: Path) -> dict[str, Any]:
    """What a path holds: a store, a run, an evaluation, raw data, a section or a slide; plain values."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        for mark, describe in _FOLDERS.items():
            if (path / mark).exists():
                return describe(path)
        reader = find_reader(path)
        return {"kind": "raw data", "layout": reader.__name__.rsplit(".", 1)[-1], "sections": reader.names(path)}
    return _section_info(path) if path.suffix == ".h5ad" else _slide_info(path)


def _store_info(path: Path) -> dict[str, Any]:
    manifest = Store.open(path).manifest
    entries = manifest["sections"]
    return {
        "kind": "store",
        "region_px": manifest["region_px"],
        "mpp": manifest["mpp"] or "native",
        "sections": len(entries),
        "spots": sum(entry["spots"] for entry in entries.values()),
        "with_regions": [name for name, entry in entries.items() if entry["image"]],
        "bytes": sum(kept["bytes"] for entry in entries.values() for kept in entry["files"].values()),
    }


def _run_info(path: Path) -> dict[str, Any]:
    run = Run.open(path)
    shown = (
        "seed",
        "shuffled",
        "train",
        "validation",
        "train_spots",
        "best_epoch",
        "validation_mse",
        "precision",
        "versions",
    )
    return {
        "kind": "run",
        "id": run.id,
        "recipe": run.recipe.name,
        "source": run.recipe.source,
        "normalisation": run.recipe.normalisation,
        "genes": len(run.panel.genes),
        "panel_rule": run.panel.rule,
        **{key: run.facts[key] for key in shown},
    }


def _evaluation_info(path: Path) -> dict[str, Any]:
    result = files.read_json(path / "metrics.json")
    shown = ("mse", "mae", "pcc_per_spot", "pcc_per_gene_mean")
    return {
        "kind": "evaluation",
        "protocol": result["protocol"]["name"],
        "recipe": result["recipe"]["name"],
        "models": {name: {key: scores[key] for key in shown} for name, scores in result["models"].items()},
    }


def _section_info(path: Path) -> dict[str, Any]:
    section = read_section(path)
    return {
        "kind": "section",
        "spots": section.n_obs,
        "genes": section.n_vars,
        "measured": "counts" in section.layers or "measured" in section.layers,
        **section.uns["hifusion"],
    }


def _slide_info(path: Path) -> dict[str, Any]:
    slide = Slide(path)
    return {"kind": "slide", "size_px": list(slide.size_px), "mpp": slide.mpp or "not in the file"}


_FOLDERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    store.MANIFEST: _store_info,
    "run.json": _run_info,
    "metrics.json": _evaluation_info,
}


def doctor() -> dict[str, Any]:
    """What this machine offers: versions, device, precision, cores, memory, disk."""
    device = inference.best_device()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "versions": checkpoint.versions(),
        "system": platform.platform(),
        "device": str(device),
        "precision": inference.resolve_precision("auto", device),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    }
