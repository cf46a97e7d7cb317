"""What the benchmarks run on: real sections, or a synthetic cohort where there are none; a store and a run of them."""

import os
from pathlib import Path

from hifusion import api
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort, SectionView

REAL = Path(os.environ.get("HIFUSION_DATA", "../shared/data")) / "her2st"
SECTIONS = ["C2", "C3"]


def raw(work: Path) -> Path:
    """A folder of raw data in the her2st layout."""
    if REAL.is_dir():
        return REAL
    made = work / "synthetic"
    if not made.exists():
        api.synthesise(made, patients=1, genes=300)
    return made


def store(work: Path) -> Path:
    """A patch store for the published network: 448 native pixels a spot."""
    made = work / "store"
    if not (made / "store.json").exists():
        prepare(work, made)
    return made


def prepare(work: Path, out: Path) -> None:
    """Build the store from raw data."""
    data = raw(work)
    api.prepare(data, out, recipe="her2st_2d", sections=SECTIONS if data == REAL else None)


def views(work: Path) -> list[SectionView]:
    """Its sections."""
    cohort = Cohort.open(store(work), verify=False)
    names = list(cohort.sections)
    return cohort.views(names, cohort.panel("top_mean", 250, names), "log_share")


def run(work: Path) -> Run:
    """The published network after one epoch on the first section: its figures mean nothing, its speed does."""
    out = work / "run"
    first = views(work)[0].name
    return api.train(
        store(work), out, recipe="her2st_2d", overrides=["epochs=1"], sections=[first], resume=out.exists()
    )
