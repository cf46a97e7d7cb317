"""(a) The network alone: forward and training step, against the published recipe and against the matrix product."""

from pathlib import Path

import torch

from benchmarks import ours
from benchmarks.baseline import Published, published_loss
from benchmarks.clock import GFLOP, Row, in_turn, product, product_rates
from hifusion.allocator import keep_freed_memory
from hifusion.errors import InputError
from hifusion.models import for_inference
from hifusion.models.int8 import for_int8

BATCH, GENES = 8, 250


def run(work: Path, rounds: int = 5) -> list[Row]:
    """Forward first, then training, each beside the two products in the same rounds."""
    keep_freed_memory()
    torch.manual_seed(0)
    pixels = ours.regions(BATCH)
    images = torch.randn(BATCH, 3, 448, 448), torch.randn(BATCH, 3, 224, 224)
    return _forward(pixels, images, rounds) + _training(pixels, images, rounds)


def _forward(pixels: torch.Tensor, images: tuple[torch.Tensor, torch.Tensor], rounds: int) -> list[Row]:
    network, published = ours.network(GENES).eval(), Published(GENES).eval()
    candidates = {"published": lambda: published(*images)}
    for name, made in (("for_inference", for_inference), ("int8", lambda its: for_int8(its, [pixels]))):
        try:
            fast = made(network)
        except InputError:  # no 8-bit kernels here
            continue
        candidates[name] = lambda fast=fast: fast(pixels)
    with torch.inference_mode():
        return _rows("forward", candidates, rounds, GFLOP)


def _training(pixels: torch.Tensor, images: tuple[torch.Tensor, torch.Tensor], rounds: int) -> list[Row]:
    network, published, target = ours.network(GENES), Published(GENES).train(), torch.randn(BATCH, GENES)
    adam, plain_adam = (
        torch.optim.Adam(its.parameters(), 1e-4, weight_decay=1e-5, fused=fused)
        for its, fused in ((network, True), (published, False))
    )

    def published_step() -> None:
        loss = published_loss(published(*images), target)
        plain_adam.zero_grad(set_to_none=True)
        loss.backward()
        plain_adam.step()

    many = 32 // BATCH
    candidates = {
        "published": published_step,
        "hifusion": ours.step(network, pixels, target, adam),
        "hifusion, 32 spots": ours.step(network, pixels.repeat(many, 1, 1, 1), target.repeat(many, 1), adam),
    }
    return _rows("training step", candidates, rounds, 3 * GFLOP)


def _rows(part: str, candidates: dict, rounds: int, gflop: float) -> list[Row]:
    products = {"float32": product(torch.float32), "bfloat16": product(torch.bfloat16)}
    seconds = in_turn({**products, **candidates}, rounds)
    rates = product_rates(seconds, products)
    rows = [Row(part, f"{name} matrix product", round(rate), "GFLOP/s") for name, rate in rates.items()]
    ceiling = max(rates.values()) / gflop
    for name in candidates:
        spots = 32 if name.endswith("32 spots") else BATCH
        rate = spots / seconds[name]
        note = f"{rate / ceiling:.0%} of the ceiling, {ceiling:.1f}"
        if name != "published":
            note = f"{rate * seconds['published'] / BATCH:.2f}x published; " + note
        rows.append(Row(part, name, round(rate, 2), "spots/s", note))
    return rows
