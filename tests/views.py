"""Sections and networks small enough to train in a moment, made in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hifusion import training
from hifusion.checkpoint import Run
from hifusion.cohort import SectionView
from hifusion.expression import GenePanel
from hifusion.models.hifusion import HiFusionConfig
from hifusion.recipes import Recipe
from hifusion.store import Store

GENES = ("ERBB2", "CD74", "KRT19")
PANEL = GenePanel(GENES, "file")
PITCH_PX = 40.0
NETWORK = HiFusionConfig(
    n_genes=3,
    grids=(1, 2),
    spot_px=16,
    region_px=32,
    width=8,
    heads=4,
    spot_encoder="resnet10",
    level_resize="bilinear",
)
RECIPE = Recipe(
    name="tiny",
    source="hifusion",
    model=NETWORK,
    panel_size=3,
    epochs=3,
    batch_size=8,
    batches="mixed",
    lr=5e-3,
    precision="32-true",
)


def array_px(spots: int, side: int = 6) -> np.ndarray:
    """Centres (x, y) of the first spots of a square array, row by row, ``(spots, 2)``."""
    row, column = np.divmod(np.arange(spots), side)
    return np.stack([column, row], axis=1) * PITCH_PX + 50.0


def make_view(name: str, spots: int, region_px: int = 32, seed: int = 0, **changes: Any) -> SectionView:
    """A section with noise for regions and for expression; ``changes`` replace single values."""
    rng = np.random.default_rng([seed, *name.encode()])
    view = SectionView(
        name=name,
        patient=name[0],
        genes=GENES,
        expression=rng.normal(size=(spots, len(GENES))).astype(np.float32),
        total_counts=np.full(spots, 1000.0),
        centres_px=array_px(spots),
        pitch_px=PITCH_PX,
        mpp=200.0 / PITCH_PX,
        spot_diameter_um=100.0,
        regions=rng.integers(0, 256, (spots, region_px, region_px, 3), dtype=np.uint8),
    )
    return replace(view, **changes)


def numbered_views(sizes: list[int]) -> list[SectionView]:
    """Sections whose every spot carries its own number, in each pixel of its region and as expression.

    The number of a spot is 100 x its section's place + its row, as (section, row, 0) in the colours.
    """
    views = []
    for place, spots in enumerate(sizes):
        regions = np.zeros((spots, 2, 2, 3), dtype=np.uint8)
        regions[..., 0], regions[..., 1] = place, np.arange(spots)[:, None, None]
        number = (100.0 * place + np.arange(spots)).astype(np.float32)[:, None]
        views.append(make_view(f"{'ABCDEFG'[place]}1", spots, regions=regions, expression=number, genes=("NUMBER",)))
    return views


def make_store(region_px: int = 32, mpp: float | None = None) -> Store:
    """A store of which nothing but its settings is looked at."""
    return Store(Path("store"), {"region_px": region_px, "mpp": mpp, "sections": {}})


TRAIN = [make_view("A1", 20), make_view("B1", 15)]
VALIDATION = [make_view("C1", 10)]


def fit_small(out: Path, recipe: Recipe = RECIPE, **changes: Any) -> Run:
    """A training of a second or less; ``changes`` are arguments of :func:`hifusion.training.fit`."""
    given = {"panel": PANEL, "train": TRAIN, "validation": VALIDATION, "store": make_store(recipe.model.region_px)}
    given |= changes
    return training.fit(
        recipe,
        given.pop("panel"),
        given.pop("train"),
        given.pop("validation"),
        out,
        **given,  # type: ignore[arg-type]
    )
