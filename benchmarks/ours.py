"""The package's network as the benchmarks time it: made, fed with noise, and trained by one step."""

from collections.abc import Callable

import torch
from torch import Tensor

from hifusion.inference import resolve_precision
from hifusion.models.hifusion import HiFusion, HiFusionConfig, hifusion_loss


def network(genes: int, device: str = "cpu") -> HiFusion:
    """HiFusion at its published size, weights by chance, in its memory format."""
    made = HiFusion(HiFusionConfig(n_genes=genes)).to(device)
    return made.to(memory_format=made.config.memory_format)


def regions(spots: int, side: int = 448, device: str = "cpu") -> Tensor:
    """Noise, uint8 (B, 3, side, side), channels last in memory as the store gives it."""
    return torch.randint(0, 256, (spots, side, side, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)


def step(its: HiFusion, pixels: Tensor, target: Tensor, adam: torch.optim.Optimizer | None) -> Callable[[], None]:
    """A training step, in bfloat16 where the device computes in it; without an optimiser up to the gradients."""
    device = pixels.device.type
    bf16 = resolve_precision("auto", pixels.device) == "bf16-mixed"

    def run() -> None:
        its.train()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = its(pixels)
        loss = hifusion_loss(output, target)["total"]
        its.zero_grad(set_to_none=True)
        loss.backward()
        if adam is not None:
            adam.step()

    return run
