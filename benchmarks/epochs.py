"""(e) Training end to end: an epoch over the store with its validation, against the training step alone."""

import shutil
from pathlib import Path

import torch

from benchmarks import ours
from benchmarks.clock import GFLOP, Row, in_turn, product, product_rates
from benchmarks.sections import run as bench_run
from hifusion.optimisers import OPTIMISERS


def run(work: Path) -> list[Row]:
    """Training spots a second of the run's only epoch, and of bare steps of the same batch right after it."""
    shutil.rmtree(work / "run", ignore_errors=True)
    trained = bench_run(work)
    recipe, facts = trained.sized_recipe, trained.facts
    network = trained.network(torch.device("cpu"))
    adam = OPTIMISERS[recipe.optimiser](network.parameters(), recipe)
    side, size = recipe.model.region_px, recipe.batch_size
    pixels, target = ours.regions(size, side), torch.randn(size, len(trained.panel.genes))
    products = {"float32": product(torch.float32), "bfloat16": product(torch.bfloat16)}
    seconds = in_turn({**products, "step": ours.step(network, pixels, target, adam)}, rounds=3)
    ceiling = max(product_rates(seconds, products).values()) / (3 * GFLOP)
    rate, bare = facts["train_spots"] / facts["train_seconds"], size / seconds["step"]
    return [
        Row("epoch", f"bare steps of {size} spots", round(bare, 2), "spots/s", f"{bare / ceiling:.0%} of the ceiling"),
        Row("epoch", "an epoch of the run", round(rate, 2), "spots/s", f"{rate / bare:.0%} of the bare steps"),
    ]
