"""One of the processes of a training on several devices; `tests/test_devices.py` starts it, by torchrun or alone.

Arguments: the run folder, and JSON of the settings below.
"""

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hifusion import devices, epochs, training
from hifusion.configuration import Recipe
from hifusion.models.resnet import ResNet
from views import RECIPE, fit_small


def without_statistics(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Batch norm that looks at no batch: then a share of one is learned from as the whole."""
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def recipe_for(*, batch_size: int, norm: bool) -> Recipe:
    """Two epochs without dropout, which each rank would draw for itself; slow ones where nothing tames the scale."""
    model = replace(RECIPE.model, dropout=0.0)
    return replace(RECIPE, batch_size=batch_size, epochs=2, lr=RECIPE.lr if norm else 1e-4, model=model)


def main(
    out: Path,
    *,
    batch_size: int,
    norm: bool,
    kill_at: int = 0,
    full_at: int = 0,
    resume: bool = False,
    ranks: int = 1,
) -> None:
    recipe = recipe_for(batch_size=batch_size, norm=norm)
    if not norm:
        nn.BatchNorm2d.forward = without_statistics  # type: ignore[method-assign]
    rank, steps, seen = int(os.environ.get("RANK", "0")), 0, []
    forward = ResNet.forward
    step, averaged = epochs.learn_batch, devices.average_statistics

    def counted(*given: object) -> dict[str, float]:
        nonlocal steps
        steps += 1
        if steps == kill_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*given)  # type: ignore[arg-type]

    def limited(trunk: ResNet, images: torch.Tensor) -> torch.Tensor:
        found = forward(trunk, images)
        if steps == full_at and rank == 1 and trunk.training and not trunk.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    def noted(network: nn.Module, fabric: object) -> None:
        averaged(network, fabric)  # type: ignore[arg-type]
        state = b"".join(value.numpy().tobytes() for value in network.state_dict().values())
        seen.append(hashlib.sha256(state).hexdigest())

    epochs.learn_batch = counted  # type: ignore[assignment]
    training.devices.average_statistics = noted
    ResNet.forward = limited  # type: ignore[method-assign]
    fit_small(out, recipe, device_count=ranks, resume=resume)
    out.with_name(f"{out.name}-rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
