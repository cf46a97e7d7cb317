"""One pass over the training spots, alone or shared with other devices, and the validation error after it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from hifusion import data, devices, memory
from hifusion.configuration import Recipe
from hifusion.errors import InputError
from hifusion.inference import fast_network
from hifusion.models import MODELS
from hifusion.models.steps import Batch
from hifusion.optimisers import learning_rate
from hifusion.ranks import Share
from hifusion.surroundings import Spots, Surroundings, predict_spots

# Of a loss or MSE in squared units of expression, which itself stays below 15 in either normalisation.
DIVERGED = 1e6

Progress = Callable[[str, int, int], None]  # (what is going on, spots done, spots in all)


def learn_epoch(
    fabric: Fabric,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    surroundings: Surroundings,
    seed: int,
    epoch: int,
    progress: Progress | None,
) -> dict[str, float]:
    """Train over every spot once; returns the mean of each loss term over the spots."""
    share = devices.share_of(fabric)
    # Dropout of each rank's own; of the first as of one device alone, since a last 0 changes no SeedSequence.
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, share.rank]).generate_state(1)[0]))
    order_seed = np.random.SeedSequence([seed, epoch]).generate_state(2)[1]
    generator = torch.Generator().manual_seed(int(order_seed))  # order and turns, the same on every rank
    model.train()
    recipe = surroundings.recipe
    sums: dict[str, float] = {}
    n_spots, done, learned = sum(len(rows) for _, rows in surroundings.train), 0, 0
    batches = surroundings.training_batches(generator, share)
    if fabric.device.type == "cuda" and not surroundings.needs:  # a CPU has no time to spare while it computes
        batches = data.ahead(batch.pinned() for batch in batches)
    for batch in batches:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, epoch + done / n_spots)
        terms = learn_batch(fabric, model, optimiser, batch.to(fabric.device), recipe, share)
        spots = batch.spots if batch.scored is None else int(batch.scored.sum())
        done, learned = min(done + batch.spots, n_spots), learned + spots
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + value * spots
        refuse_diverged(terms["total"], "training loss", epoch, recipe.lr)
        if progress:
            what = f"epoch {epoch + 1}/{recipe.epochs} loss {sums['total'] / learned:.3f}"
            progress(what, epoch * n_spots + done, recipe.epochs * n_spots)
    return {name: value / learned for name, value in sums.items()}


def learn_batch(
    fabric: Fabric, model: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch, recipe: Recipe, share: Share
) -> dict[str, float]:
    """Learn from one batch together; returns its loss terms."""
    weight = share.weight(batch.spots)
    waits = devices.waits_in_forward(model)

    def attempt() -> dict[str, torch.Tensor]:
        optimiser.zero_grad(set_to_none=True)
        terms: dict[str, torch.Tensor] = MODELS[recipe.network].step(model, batch, **recipe.loss)
        fabric.backward(terms["total"] if share.ranks == 1 else terms["total"] * weight)
        return {name: value.detach() for name, value in terms.items()}

    def agree(failed: bool) -> bool:
        if waits and failed:  # the others wait for this rank within their forward pass, and cannot be told
            raise InputError(
                f"out of memory on device {share.rank} of {share.ranks}; go on with --resume --recompute, or on more "
                "devices"
            )
        return failed if waits else devices.any_rank(fabric, failed)

    terms = memory.learn(
        model,
        attempt,
        device=fabric.device,
        generator=batch.generator,
        agree=agree,
        advice=f"lower the spots of a batch, for example with --set batch_size={max(2, recipe.batch_size // 2)}, "
        "or use a device with more memory",
    )
    devices.add_gradients(fabric, model.parameters())
    optimiser.step()
    return devices.summed(fabric, terms, weight)


def refuse_diverged(value: float, what: str, epoch: int, lr: float) -> None:
    if not value < DIVERGED:  # NaN is not below anything
        raise InputError(
            f"the {what} is {value:.3g} in epoch {epoch}: training diverged; start anew in another folder with a lower "
            f"rate, for example --set lr={lr / 3:.0e}"
        )


def validation_mse(
    fabric: Fabric, network: nn.Module, surroundings: Surroundings, held_out: Sequence[Spots], precision: str
) -> float:
    """Mean squared error of the validation spots, each rank looking at its own."""
    share, errors = devices.share_of(fabric), [np.empty(0, dtype=np.float32)]
    fast = fast_network(network, precision)
    for view, rows in held_out:
        own = rows[share.rank :: share.ranks]
        if len(own):
            predicted = predict_spots(fast, surroundings, view, own, precision).expression
            errors.append((predicted - view.expression[own]).ravel())
    squares = np.square(np.concatenate(errors), dtype=np.float64)
    if share.ranks == 1:
        return float(np.mean(squares))
    found = {"sum": torch.tensor(squares.sum()), "count": torch.tensor(float(len(squares)))}
    total = devices.summed(fabric, {name: value.to(fabric.device) for name, value in found.items()}, 1.0)
    return total["sum"] / total["count"]
