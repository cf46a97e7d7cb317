"""(e) Training end to end: an epoch over the store with its validation, against the training step alone."""

import shutil
from pathlib import Path

import torch

from benchmarks.clock import GFLOP, Row, in_turn, product, product_rates
from benchmarks.sections import run as bench_run
from hifusion.inference import resolve_precision
from hifusion.models.hifusion import hifusion_loss
from hifusion.optimisers import OPTIMISERS


def run(work: Path) -> list[Row]:
    """Training spots a second of the run's only epoch, and of bare steps of the same batch right after it."""
    shutil.rmtree(work / "run", ignore_errors=True)
    trained = bench_run(work)
    recipe, facts = trained.sized_recipe, trained.facts
    network = trained.network(torch.device("cpu")).train()
    adam = OPTIMISERS[recipe.optimiser](network.parameters(), recipe)
    side, size = recipe.model.region_px, recipe.batch_size
    pixels = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    target = torch.randn(size, len(trained.panel.genes))
    bf16 = resolve_precision(recipe.precision, torch.device("cpu")) == "bf16-mixed"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = hifusion_loss(network(pixels), target)["total"]
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    products = {"float32": product(torch.float32), "bfloat16": product(torch.bfloat16)}
    seconds = in_turn({**products, "step": step}, rounds=3)
    ceiling = max(product_rates(seconds, products).values()) / (3 * GFLOP)
    rate, bare = facts["train_spots"] / facts["train_seconds"], size / seconds["step"]
    return [
        Row("epoch", f"bare steps of {size} spots", round(bare, 2), "spots/s", f"{bare / ceiling:.0%} of the ceiling"),
        Row("epoch", "an epoch of the run", round(rate, 2), "spots/s", f"{rate / bare:.0%} of the bare steps"),
    ]
