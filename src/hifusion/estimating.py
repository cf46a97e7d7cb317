"""How long a benchmark will take: a few real steps of each network, multiplied up."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hifusion.cohort import SectionView
from hifusion.contest import Contest, Job
from hifusion.inference import best_device, fast_network, forward_batches, resolve_precision
from hifusion.models import MODELS
from hifusion.protocols import Fold
from hifusion.surroundings import Spots, Surroundings
from hifusion.training import split

_WINDOWS = 8  # of which the frozen encoder's time is taken


class _Dry(Surroundings):
    """Surroundings whose frozen features are made up, and counted."""

    windows: int = 0
    side_px: int = 0

    def features(self, view: SectionView, side_px: int, width: int, centres_px: np.ndarray | None = None) -> Tensor:
        places = view.centres_px if centres_px is None else centres_px
        self.windows, self.side_px = self.windows + len(places), max(self.side_px, side_px)
        return torch.zeros(len(places), width).normal_(generator=torch.Generator().manual_seed(0))


def job_seconds(contest: Contest, job: Job, fold: Fold) -> float:
    """Estimated seconds of one network in one fold: training, validation after each epoch, the tested sections."""
    its, recipe = contest.data_of(fold), contest.recipe_of(job)
    recipe = recipe.sized(len(its.panel.genes))
    trained, held_out = split(recipe, *contest.parts(job, fold), job.seed or 0)
    tested = [(view, np.arange(len(view.centres_px))) for view in its.tested]
    surroundings = _Dry(recipe, trained)
    network: Any = MODELS[recipe.network].module(recipe.model)
    network = network.to(device=best_device(), memory_format=network.config.memory_format)
    train_s, predict_s = _probe(network, surroundings, its.tested[0])
    for view, rows in (*trained, *tested):
        next(surroundings.batches(view, rows))  # asks for what the whole section needs
    windows_s = surroundings.windows * _window_s(surroundings) if surroundings.windows else 0.0
    return recipe.epochs * (_n(trained) * train_s + _n(held_out) * predict_s) + _n(tested) * predict_s + windows_s


def _n(spots: Sequence[Spots]) -> int:
    return sum(len(rows) for _, rows in spots)


def _probe(network: Any, surroundings: Surroundings, view: SectionView) -> tuple[float, float]:
    """Seconds a spot of a training step and of a prediction; the second of two counts, the first warms up."""
    device = best_device()
    precision = resolve_precision(surroundings.recipe.precision, device)
    batch = next(surroundings.training_batches(torch.Generator().manual_seed(0))).to(device)
    network.train()
    train_s = predict_s = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            terms = MODELS[surroundings.recipe.network].step(network, batch, **surroundings.recipe.loss)
        terms["total"].backward()
        train_s = (time.perf_counter() - started) / len(batch.target)
    if hasattr(network, "set_bank"):
        network.set_bank(batch.target)
    region, inputs = surroundings.sample(view)
    fast = fast_network(network, precision)
    for _ in range(2):
        started = time.perf_counter()
        next(forward_batches(fast, [(region, inputs)], precision=precision))
        predict_s = (time.perf_counter() - started) / len(region)
    return train_s, predict_s * (8 if surroundings.recipe.average_symmetries else 1)


def _window_s(surroundings: _Dry) -> float:
    windows = torch.zeros(_WINDOWS, 3, surroundings.side_px, surroundings.side_px, dtype=torch.uint8)
    surroundings.encoder(windows)
    started = time.perf_counter()
    surroundings.encoder(windows)
    return (time.perf_counter() - started) / _WINDOWS
