"""One fit of :class:`hifusion.models.frozen.FrozenHiFusion` to some of the training spots."""

import dataclasses
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hifusion.configuration import Recipe
from hifusion.kernel_regression import fit_regression
from hifusion.models.frozen import TOKENS, FrozenConfig, FrozenHead, FrozenHiFusion, gram, head_inputs
from hifusion.models.steps import Batch, frozen_step
from hifusion.processes import so_many_threads

FOLDS = 5  # at most; sections or patients beyond share one
NOVELTY_AXES = 16  # with 32 a section of the same tumour was less novel than held-out spots are
LEAST_COUNTS = 50.0  # spots with fewer are as noisy as this
_NOISE_FLOOR = 0.3  # of the mean noise: no spot counts more than three times the mean


class Seen(NamedTuple):
    """The training spots, one row each."""

    section: np.ndarray
    """Number of the section, ``(N,)``."""
    patient: np.ndarray
    """Number of the patient, ``(N,)``."""
    known_fold: np.ndarray
    """With which spots each is left out so that its patient stays in training, ``(N,)``."""
    new_fold: np.ndarray
    """With which patients it is left out, ``(N,)``; all 0 where there is one patient."""
    expression: np.ndarray
    totals: np.ndarray
    whole: Tensor
    levels: Tensor
    context: Tensor
    place: Tensor


class Fitted(NamedTuple):
    """Heads and kernel regression, fitted to some of the spots."""

    state: dict[str, Tensor]
    """Of the network, less its heads."""
    heads: list[FrozenHead]


def fit_some(seen: Seen, rows: np.ndarray, recipe: Recipe, seed: int) -> Fitted:
    """Fit to some of the training spots."""
    config: FrozenConfig = recipe.model
    sections = seen.section[rows]
    means = {number: seen.expression[rows[sections == number]].mean(axis=0) for number in np.unique(sections)}
    deviations = seen.expression[rows] - np.stack([means[number] for number in sections])
    noise = np.sqrt(np.median(seen.totals[rows]) / np.maximum(seen.totals[rows], LEAST_COUNTS))
    noise /= noise.mean()
    scale = _gene_noise(seen, rows, recipe.normalisation)
    _, _, axes = np.linalg.svd(deviations / scale / np.sqrt(noise + _NOISE_FLOOR)[:, None], full_matrices=False)
    axes = np.pad(axes[: config.components], ((0, max(0, config.components - len(axes))), (0, 0)))
    target = deviations / scale @ axes.T
    kept = np.linspace(0, len(rows) - 1, min(len(rows), config.max_spots)).astype(int)
    bank, place = seen.context[rows[kept]].flatten(1), seen.place[rows[kept]]
    kernel = gram(bank, place, bank, place, config).double().numpy()
    regression = fit_regression(kernel, target[kept], noise[kept])
    whole = seen.whole[rows[kept]]
    spread = whole.std(0).clamp(min=1e-6)
    scaled = (whole - whole.mean(0)) / spread
    _, directions = torch.linalg.eigh(scaled @ scaled.T)  # principal components by way of the spots, which are fewer
    looks = F.normalize(scaled.T @ directions[:, -min(NOVELTY_AXES, len(kept) // 4) :], dim=0)
    state = {
        "bank_context": bank.half(),
        "bank_place": place,
        **{name: torch.from_numpy(value).float() for name, value in regression._asdict().items()},
        "axes": torch.from_numpy(axes * scale).float(),
        "offset": torch.from_numpy(np.mean(list(means.values()), axis=0)).float(),
        "look_mean": whole.mean(0),
        "look_axes": looks / spread[:, None],
    }
    weight = 1 / (noise + _NOISE_FLOOR)
    heads = _train_heads(seen, rows, target, weight / weight.mean(), recipe, seed)
    return Fitted(state, heads)


def _gene_noise(seen: Seen, rows: np.ndarray, normalisation: str) -> np.ndarray:
    """Standard deviation that counting alone gives each gene at the median depth, ``(G,)``.

    Of log shares: the variance of the logarithm of a Poisson count is about one over its mean. Other units: their own
    spread, which leaves genes as they are against each other.
    """
    if normalisation != "log_share":
        return np.maximum(seen.expression[rows].std(axis=0), 1e-6)
    counts = np.exp(seen.expression[rows]) * np.median(seen.totals[rows])
    return np.asarray(np.sqrt((1 / np.maximum(counts, 1e-3)).mean(axis=0)))


def _train_heads(
    seen: Seen, rows: np.ndarray, target: np.ndarray, weight: np.ndarray, recipe: Recipe, seed: int
) -> list[FrozenHead]:
    """Every head from a beginning of its own, on batches mixed of pairs of spots.

    On one core: layers are too small to be shared out, and beside other work threads would wait for each other.
    """
    config: FrozenConfig = recipe.model
    wanted = torch.from_numpy(target / max(float(target.std()), 1e-9)).float()
    weights, size = torch.from_numpy(weight).float(), min(recipe.batch_size, len(rows))
    given = head_inputs(seen.levels[rows], seen.context[rows], config)
    nothing = torch.empty(0, dtype=torch.uint8)  # heads see no pixels
    heads = []
    for member in range(config.members):
        generator = torch.Generator().manual_seed(1000 * seed + member)
        with so_many_threads(1), torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + member)
            head = FrozenHead(config)
            optimiser = torch.optim.AdamW(head.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.lr, config.steps, pct_start=0.1)
            mixing = torch.distributions.Beta(config.mixup, config.mixup) if config.mixup else None
            order = torch.empty(0, dtype=torch.int64)
            for _ in range(config.steps):
                if len(order) < size:  # a new pass over the spots; what does not fill a batch is left out
                    order = torch.randperm(len(rows), generator=generator)
                some, order = order[:size], order[size:]
                parts = [part[some] for part in (*given.values(), wanted)]
                if mixing is not None:
                    share, other = mixing.sample((size,)), torch.randperm(size)
                    parts = [_mixed(part, other, share) for part in parts]
                its = dict(zip(given, parts, strict=False))
                batch = Batch(nothing, parts[-1], its, {"weight": weights[some]}, None, generator)
                optimiser.zero_grad()
                frozen_step(head, batch, **recipe.loss)["total"].backward()
                optimiser.step()
                schedule.step()
        head.head.weight.data *= target.std()
        head.head.bias.data *= target.std()
        heads.append(head.eval())
    return heads


def _mixed(part: Tensor, other: Tensor, share: Tensor) -> Tensor:
    share = share.view(-1, *[1] * (part.ndim - 1))
    return share * part + (1 - share) * part[other]


def network_of(config: FrozenConfig, fitted: Fitted) -> FrozenHiFusion:
    network = FrozenHiFusion(config)
    state = network.state_dict() | fitted.state
    state |= {
        f"heads.{number}.{name}": value
        for number, head in enumerate(fitted.heads)
        for name, value in head.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval()


def fit_costs(recipe: Recipe, spots: int, sections: int) -> tuple[float, int]:
    """Seconds of all fits, by a tenth of one on spots that are made up, and bytes of the weights."""
    config: FrozenConfig = recipe.model
    steps = max(1, config.steps // 10)
    short = dataclasses.replace(recipe, model=dataclasses.replace(config, members=1, steps=steps))
    random, ones = torch.Generator().manual_seed(0), np.zeros(spots, dtype=int)
    made = [
        torch.randn(spots, config.features, generator=random),
        torch.randn(spots, len(config.grids), TOKENS, config.channels, generator=random),
        torch.randn(spots, 1 + len(config.radii_um), config.features, generator=random),
        torch.randn(spots, 2, generator=random) * 1000,
    ]
    expression = np.random.default_rng(0).normal(-6, 1, (spots, config.n_genes))
    seen = Seen(ones, ones, ones, ones, expression, np.full(spots, 1000.0), *made)
    started = time.perf_counter()
    fitted = fit_some(
        seen, np.arange(spots), dataclasses.replace(short, model=dataclasses.replace(short.model, steps=1)), 0
    )
    once = time.perf_counter() - started
    started = time.perf_counter()
    _train_heads(seen, np.arange(spots), np.zeros((spots, config.components)) + 1.0, np.ones(spots), short, 0)
    heads = (time.perf_counter() - started) * config.members * config.steps / steps
    size = sum(its.nbytes for its in fitted.state.values())
    size += config.members * sum(its.nbytes for its in fitted.heads[0].state_dict().values())
    return (once + heads) * (1 + (FOLDS if sections == 1 else min(FOLDS, sections))), size
