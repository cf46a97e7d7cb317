"""What a file or folder holds, and what this machine offers, as plain values."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hifusion import checkpoint, files, inference, store, trust_card
from hifusion.checkpoint import Run
from hifusion.errors import InputError
from hifusion.readers import READERS, find_reader
from hifusion.section import read_section
from hifusion.slide import Slide
from hifusion.store import Store

_SOMETIMES = ("head_share", "strength_in_new_patients", "weights")


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
        layout = next(name for name, known in READERS.items() if known is reader)
        return {"kind": "raw data", "layout": layout, "sections": reader.names(path)}
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
        "network": run.recipe.network,
        "source": run.recipe.source,
        "normalisation": run.recipe.normalisation,
        "genes": len(run.panel.genes),
        "panel_rule": run.panel.rule,
        **{key: run.facts[key] for key in shown if run.facts[key] is not None},
        **{key: run.facts[key] for key in _SOMETIMES if run.facts.get(key) is not None},
        **_trust_info(run),
        **({"adapted_to": run.facts["adapted_to"]} if "adapted_to" in run.facts else {}),
        "devices": run.facts.get("devices", [1]),  # runs of earlier versions had one
    }


def _trust_info(run: Run) -> dict[str, Any]:
    """What its trust card says, in short."""
    card = run.trust()
    if card is None:
        return {}
    best = card.sort_values("pcc_per_gene", ascending=False)
    new = run.trust(known_patient=False)
    assert new is not None
    return {
        "trust": {mark: int((card["trust"] == mark).sum()) for mark in trust_card.MEANINGS},
        "trust_in_new_patients": {mark: int((new["trust"] == mark).sum()) for mark in trust_card.MEANINGS},
        "expected_pcc_per_gene": _rounded(card["pcc_per_gene"].mean()),
        "expected_of_ceiling": _rounded(card["of_ceiling"].mean()),
        "coverage_90": _rounded(card["coverage_90"].mean()),
        "most_trusted": {str(gene): _rounded(value) for gene, value in best["pcc_per_gene"].head(10).items()},
        "trust_card": str(run.root / trust_card.FILE),
    }


def _rounded(value: float) -> float | None:
    return round(float(value), 3) if np.isfinite(value) else None


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
    with Slide(path) as slide:
        return slide.facts()


_FOLDERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    store.MANIFEST: _store_info,
    "run.json": _run_info,
    "metrics.json": _evaluation_info,
}


# Extra -> the package that tells whether it is installed.
EXTRAS = {
    "parquet": "pyarrow",
    "spatialdata": "spatialdata",
    "rivals": "monai",
    "encoders": "transformers",
    "registration": "SimpleITK",
    "labels": "sklearn",
    "download": "pooch",
    "cluster": "dask_jobqueue",
    "viewer": "fastapi",
}


def doctor() -> dict[str, Any]:
    """What this machine offers: versions, extras, device, precision, cores, memory, disk."""
    device = inference.best_device()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "versions": checkpoint.versions(),
        "system": platform.platform(),
        "extras": {extra: importlib.util.find_spec(package) is not None for extra, package in EXTRAS.items()},
        "device": str(device),
        "precision": inference.resolve_precision("auto", device),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
    }
