"""What a network costs on this machine, from a few seconds of real steps; nothing is written."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from hifusion import checkpoint, devices, memory
from hifusion.appearance import appearance
from hifusion.cohort import SectionView
from hifusion.configuration import Recipe
from hifusion.costs import peak_memory_mib
from hifusion.encoders import load_encoder
from hifusion.epochs import learn_batch
from hifusion.frozen_fit import fit_costs
from hifusion.inference import best_device, fast_network, resolve_precision
from hifusion.models import MODELS
from hifusion.optimisers import OPTIMISERS
from hifusion.ranks import ALONE
from hifusion.surroundings import Spots, Surroundings, predict_spots

BUDGET_S = 10.0
"""For the steps of one network; the two that tell anything are taken however long they last."""

_LOOKS = 8  # spots whose appearance is made
_WINDOWS = 8  # of which the frozen encoder's time is taken
_MIB = 1 << 20


class Probe(NamedTuple):
    """What one network costs."""

    train_s: float
    """Seconds a spot of a training step: patches read, gradients, optimiser."""
    predict_s: float
    """Seconds a spot of a prediction."""
    epoch_s: float
    """Seconds of an epoch for its state to be written."""
    features_s: float
    """Seconds for features of a frozen encoder that the store may hold already."""
    memory_mib: float
    """The most that this process has held, of the GPU where there is one."""
    run_mib: float
    """What the run folder holds in the end."""
    training_mib: float
    """What it holds at most while it is trained."""
    recomputed: bool
    """Whether the steps fitted only without kept activations (``hifusion.memory``)."""

    def seconds(
        self, recipe: Recipe, trained: Sequence[Spots], held_out: Sequence[Spots], tested: Sequence[Spots] = ()
    ) -> float:
        """Training, a validation after each epoch, the look at all spots in the end, and the tested sections.

        Without ``features_s``, which is spent once whatever the folds and seeds.
        """
        train, validation, test = (_seen(recipe, spots) for spots in (trained, held_out, tested))
        epochs = recipe.epochs * (train * self.train_s + validation * self.predict_s + self.epoch_s)
        return epochs + (train + validation + test) * self.predict_s


class _Dry(Surroundings):
    """Surroundings whose frozen features are made up, and counted."""

    windows: int = 0
    side_px: int = 0

    def features(self, view: SectionView, side_px: int, width: int, centres_px: np.ndarray | None = None) -> Tensor:
        places = view.centres_px if centres_px is None else centres_px
        self.windows, self.side_px = self.windows + len(places), max(self.side_px, side_px)
        return torch.zeros(len(places), width).normal_(generator=torch.Generator().manual_seed(0))


def probe(
    recipe: Recipe,
    trained: Sequence[Spots],
    held_out: Sequence[Spots],
    tested: Sequence[Spots] = (),
    *,
    budget_s: float = BUDGET_S,
) -> Probe:
    """Train a network for a few seconds with the batches of its recipe, predict a batch, and let it go.

    Parameters
    ----------
    recipe
        With a network of as many genes as the panel has.
    budget_s
        After which no further training step is begun; 0 takes one step beside the one that warms up.
    """
    if MODELS[recipe.network].fitted_at_once:
        return _probe_fit(recipe, trained, (*trained, *held_out, *tested))
    device = best_device()
    precision = resolve_precision(recipe.precision, device)
    fabric = devices.start(device, 1, 1, precision)
    surroundings = _Dry(recipe, trained)
    network: Any = MODELS[recipe.network].module(recipe.model)
    network = network.to(memory_format=network.config.memory_format)
    optimiser = OPTIMISERS[recipe.optimiser](network.parameters(), recipe)
    model, optimiser = fabric.setup(network, optimiser)
    train_s = _train_s(fabric, model, optimiser, surroundings, budget_s)
    if hasattr(network, "set_bank"):
        bank = np.concatenate([view.expression[rows] for view, rows in trained])
        network.set_bank(torch.from_numpy(bank).to(fabric.device))
    predict_s, embedding = _predict_s(network, surroundings, (*tested, *held_out)[0], precision)
    weights = {f"model.{name}": tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.optimiser_tensors(optimiser).items()
    }
    started = time.perf_counter()
    state_bytes = len(safetensors.torch.save(weights | state))
    epoch_s = 2 * (time.perf_counter() - started)  # put together, then written: taken to last as long
    surroundings.windows = 0
    surroundings._kept.clear()
    for view, rows in (*trained, *held_out, *tested) if surroundings.needs else ():
        next(surroundings.batches(view, rows))  # asks for what the whole section needs
    weight_bytes = sum(its.nbytes for its in weights.values())
    return Probe(
        train_s,
        predict_s,
        epoch_s,
        surroundings.windows * _window_s(surroundings) if surroundings.windows else 0.0,
        peak_memory_mib(),
        (weight_bytes + 4 * embedding * (embedding + 1)) / _MIB,
        (weight_bytes + 2 * state_bytes) / _MIB,  # the state beside the one it takes the place of
        memory.recomputes(network),
    )


def _probe_fit(recipe: Recipe, trained: Sequence[Spots], every: Sequence[Spots]) -> Probe:
    """What a network on a frozen trunk costs: its features, a few spots of which are made, and its fits, made short."""
    view = dataclasses.replace(trained[0][0], centres_px=trained[0][0].centres_px[:_LOOKS], cache=None)
    encoder, mpp = load_encoder(recipe.encoder), recipe.region_mpp
    assert mpp is not None
    appearance(view, encoder, recipe.model, mpp)
    started = time.perf_counter()
    appearance(view, encoder, recipe.model, mpp)
    features_s = (time.perf_counter() - started) / _LOOKS * sum(len(its.centres_px) for its, _ in every)
    spots = sum(len(rows) for _, rows in trained)
    seconds, weight_bytes = fit_costs(recipe, spots, len(trained))
    return Probe(
        seconds / spots, 0.0, 0.0, features_s, peak_memory_mib(), weight_bytes / _MIB, weight_bytes / _MIB, False
    )


def _seen(recipe: Recipe, spots: Sequence[Spots]) -> int:
    """Spots that go through the network: those asked for, or all of their sections where it takes these whole."""
    whole = MODELS[recipe.network].module.whole_section  # type: ignore[attr-defined]
    return sum(len(view.centres_px) if whole else len(rows) for view, rows in spots)


def _train_s(
    fabric: Any, model: Any, optimiser: torch.optim.Optimizer, surroundings: Surroundings, budget_s: float
) -> float:
    """Seconds a spot of real training steps; the first warms up and is not counted."""
    generator = torch.Generator().manual_seed(0)
    steps: list[tuple[float, int]] = []
    model.train()
    started = before = time.perf_counter()
    while len(steps) < 2 or before - started < budget_s:  # over all spots again where these are few
        for batch in surroundings.training_batches(generator):
            learn_batch(fabric, model, optimiser, batch.to(fabric.device), surroundings.recipe, ALONE)
            now = time.perf_counter()
            steps.append((now - before, batch.spots))
            before = now
            if len(steps) > 1 and now - started >= budget_s:
                break
    counted = steps[1:]
    return sum(seconds for seconds, _ in counted) / sum(spots for _, spots in counted)


def _predict_s(network: Any, surroundings: Surroundings, spots: Spots, precision: str) -> tuple[float, int]:
    """Seconds a spot of a batch predicted the second time, and the width of its embedding."""
    view, rows = spots[0], spots[1][: surroundings.recipe.batch_size]
    seconds, width, fast = 0.0, 0, fast_network(network, precision)
    for _ in range(2):
        started = time.perf_counter()
        width = predict_spots(fast, surroundings, view, rows, precision).embedding.shape[1]
        seconds = time.perf_counter() - started
    return seconds / _seen(surroundings.recipe, [(view, rows)]), width


def _window_s(surroundings: _Dry) -> float:
    windows = torch.zeros(_WINDOWS, 3, surroundings.side_px, surroundings.side_px, dtype=torch.uint8)
    surroundings.encoder(windows)
    started = time.perf_counter()
    surroundings.encoder(windows)
    return (time.perf_counter() - started) / _WINDOWS
