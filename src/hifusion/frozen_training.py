"""Fit of :class:`hifusion.models.frozen.FrozenHiFusion`: features once, then everything else in minutes.

What is told by data is told by training spots that were left out: sections of a patient of which there are several,
blocks of spots of an only section (`known`); whole patients, where there are several (`new`). The share of the heads,
the strength of deviations in a new patient, the intervals and the trust card all come from these predictions.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hifusion import checkpoint, data, files, run_folder, trust
from hifusion.appearance import seen_of
from hifusion.checkpoint import Run
from hifusion.cohort import SectionView, mean_profile
from hifusion.configuration import Recipe
from hifusion.encoders import load_encoder
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.frames import Frames
from hifusion.kernel_regression import fit_regression
from hifusion.models.frozen import (
    HEAD_SHARE,
    STRENGTH,
    TOKENS,
    FrozenConfig,
    FrozenHead,
    FrozenHiFusion,
    gram,
    head_inputs,
)
from hifusion.models.steps import Batch, frozen_step
from hifusion.novelty import Novelty, fit_distance, in_units_of

Progress = Callable[[str, int, int], None]
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


def fit_frozen(
    recipe: Recipe,
    panel: GenePanel,
    train: Sequence[SectionView],
    out: Path,
    *,
    seed: int = 0,
    shuffled: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Fit the network to sections and leave a complete run folder; see :func:`hifusion.training.fit`.

    Raises
    ------
    InputError
        A section without a slide, too few spots, an encoder that cannot be had, or a folder that holds another run.
    """
    encoder = load_encoder(recipe.encoder)
    tested = [view.name for view in train if view.name in encoder.trained_on]
    if tested:
        raise InputError(f"encoder {recipe.encoder} was trained on section {', '.join(tested)}; give another encoder")
    probe = encoder.maps(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    model = dataclasses.replace(recipe.sized(len(panel.genes)).model, channels=sum(its.shape[1] for its in probe))
    recipe = dataclasses.replace(recipe, model=model)
    facts: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "state": "training",
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "shuffled": shuffled,
        "panel_digest": panel.digest,
        "train": [view.name for view in train],
        "patients": sorted({view.patient for view in train}),
        "validation": [],
        "data": run_folder.digest(train),
        "train_spots": sum(len(view.expression) for view in train),
        "validation_spots": 0,
        "spots": run_folder.spot_facts(train),
        "precision": "32-true",
        "device": str(encoder.device),
        "encoder": encoder.name,
        "versions": checkpoint.versions(),
    }
    if run_folder.begin(out, facts, panel, resume):
        return Run.open(out)
    started = time.perf_counter()
    frames = Frames.build(train, out)
    seen = look(train, encoder, frames, model, recipe.region_mpp, seed, progress)
    network, left_out, novelty = _fit_all(seen, recipe, seed, progress)
    weights = {**network.state_dict(), "train_mean": torch.from_numpy(mean_profile(train).astype(np.float32))}
    checkpoint.save_tensors(out / "weights.safetensors", weights, {})
    tensors = {"mean": torch.from_numpy(novelty.mean), "factor": torch.from_numpy(novelty.factor)}
    checkpoint.save_tensors(out / "novelty.safetensors", tensors, {})
    spots = [(view, np.arange(len(view.expression))) for view in train]
    card = trust.card(spots, panel.genes, recipe.normalisation, left_out)
    files.write_text(out / trust.FILE, card.to_csv(index=False))
    seconds = round(time.perf_counter() - started, 3)
    errors = left_out["known"].expression - seen.expression
    found = {
        "state": "complete",
        "train_seconds": seconds,
        "head_share": round(float(network.head_share), 4),
        "strength_in_new_patients": round(float(network.strength), 4),
        "validation_mse": float(np.square(errors).mean()),
        "best_epoch": 0,
    }
    files.write_json(out / "run.json", facts | found)
    return Run.open(out)


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
    fitted = _fit(
        seen, np.arange(spots), dataclasses.replace(short, model=dataclasses.replace(short.model, steps=1)), 0
    )
    once = time.perf_counter() - started
    started = time.perf_counter()
    _train_heads(seen, np.arange(spots), np.zeros((spots, config.components)) + 1.0, np.ones(spots), short, 0)
    heads = (time.perf_counter() - started) * config.members * config.steps / steps
    size = sum(its.nbytes for its in fitted.state.values())
    size += config.members * sum(its.nbytes for its in fitted.heads[0].state_dict().values())
    return (once + heads) * (1 + (FOLDS if sections == 1 else min(FOLDS, sections))), size


def look(
    train: Sequence[SectionView],
    encoder: Any,
    frames: Frames,
    config: FrozenConfig,
    mpp: float | None,
    seed: int,
    progress: Progress | None = None,
) -> Seen:
    """What is seen and known of the training spots, and how they are left out."""
    assert mpp is not None
    parts = [seen_of(view, encoder, config, mpp, frames, progress) for view in train]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    spots = [len(view.expression) for view in train]
    patients = list(dict.fromkeys(view.patient for view in train))
    patient = np.array([patients.index(view.patient) for view in train])
    known = []
    for number, view in enumerate(train):
        siblings = np.flatnonzero(patient == patient[number])
        if len(siblings) > 1:
            known.append(np.full(spots[number], int(np.flatnonzero(siblings == number)[0]) % FOLDS))
        else:
            known.append(_groups_of_blocks(view, seed))
    fold = np.concatenate(known)
    if len(np.unique(fold)) < 2:
        raise InputError(f"{train[0].name}: its {len(fold)} spots lie in one block; train on more spots")
    return Seen(
        np.repeat(np.arange(len(train)), spots),
        np.repeat(patient, spots),
        fold,
        np.repeat(patient % FOLDS, spots),
        np.concatenate([view.expression for view in train]).astype(np.float64),
        np.concatenate([view.total_counts for view in train]).astype(np.float64),
        **tensors,
    )


def _groups_of_blocks(view: SectionView, seed: int) -> np.ndarray:
    blocks = data.blocks(view)
    number = np.random.default_rng(seed).permutation(blocks.max() + 1) % FOLDS
    return np.asarray(number[blocks])


def _fit_all(
    seen: Seen, recipe: Recipe, seed: int, progress: Progress | None
) -> tuple[FrozenHiFusion, dict[str, trust.LeftOut], Novelty]:
    """The network fitted to all spots, what is said of those that were left out, and the distance from all of them."""
    config: FrozenConfig = recipe.model
    every = np.arange(len(seen.expression))
    several = {"known": len(np.unique(seen.section)) > len(np.unique(seen.patient)), "new": bool(seen.new_fold.any())}
    folds = {"known": seen.known_fold, "new": seen.new_fold if several["new"] else np.array([], dtype=int)}
    jobs = [(kind, fold) for kind, its in folds.items() for fold in np.unique(its)]
    # Of what is left out: kernel part, heads' part (components already turned into genes), expected error, offset.
    said = {kind: [np.full_like(seen.expression, np.nan) for _ in range(4)] for kind in folds}
    lengths = np.zeros(len(every))
    for done, (kind, fold) in enumerate(jobs):
        if progress:
            progress("leave out and fit", done, len(jobs) + 1)
        out = folds[kind] == fold
        fitted = _network(config, _fit(seen, every[~out], recipe, seed))
        for array, values in zip(said[kind], _parts(fitted, seen, every[out]), strict=True):
            array[out] = values
        if kind == "known":
            looks = fitted.embedding(seen.whole).numpy()
            lengths[out] = fit_distance(looks[~out]).of(looks[out])
    if progress:
        progress("leave out and fit", len(jobs), len(jobs) + 1)
    network = _network(config, _fit(seen, every, recipe, seed))

    kernel, heads, _, offset = said["known"]
    share = config.head_share
    if share is None:
        share = _least_squares(heads - kernel, seen.expression - offset - kernel) if several["known"] else HEAD_SHARE
    strength = config.strength
    if strength is None:
        strength = STRENGTH
        if several["new"]:
            kernel, heads, _, offset = said["new"]
            strength = _least_squares(kernel + share * (heads - kernel), seen.expression - offset)
    network.head_share.fill_(share)
    network.strength.fill_(strength)
    left_out = {}
    variance = np.stack([seen.expression[seen.section == number].var(axis=0) for number in np.unique(seen.section)])
    for row, (kind, factor) in enumerate((("known", 1.0), ("new", strength))):
        kernel, heads, spread, offset = said[kind if several[kind] or kind == "known" else "known"]
        expression = offset + factor * (kernel + share * (heads - kernel))
        if row == 0:
            rest = np.square(seen.expression - expression).mean(axis=0) - spread.mean(axis=0)
            network.residual.copy_(torch.from_numpy(np.maximum(rest, 0.1 * variance.mean(axis=0))))
        expected = np.sqrt(spread + network.residual.numpy())
        # What was never left out, a section or a patient, has an offset that was never seen: its usual size is added.
        more = 0.0 if several[kind] else trust.OFFSETS[kind]
        widened = np.sqrt(1 + more * variance.mean(axis=0) / np.square(expected).mean(axis=0))
        its = trust.LeftOut(expression, expected, folds[kind] if several[kind] else seen.known_fold, widened)
        network.quantiles[row].copy_(torch.from_numpy(its.quantiles(seen.expression)))
        if kind == "known" or several[kind]:
            left_out[kind] = its
    novelty = in_units_of(fit_distance(network.embedding(seen.whole).numpy()), lengths)
    return network.eval(), left_out, novelty


def _parts(network: FrozenHiFusion, seen: Seen, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Kernel part, heads' part and variance of what the network says of some spots, in genes, and its offset."""
    with torch.inference_mode():
        found = []
        for some in np.array_split(rows, max(1, len(rows) // 256)):
            mean, spread = network.regression(seen.context[some], seen.place[some])
            heads = network.from_heads(seen.levels[some], seen.context[some])
            found.append((mean @ network.axes, heads @ network.axes, spread @ network.axes.square()))
    arrays = [torch.cat(part).double().numpy() for part in zip(*found, strict=True)]
    return *arrays, np.tile(network.offset.double().numpy(), (len(rows), 1))


def _least_squares(along: np.ndarray, wanted: np.ndarray) -> float:
    """The share of ``along``, 0 to 1, that comes nearest to ``wanted``."""
    length = float(np.square(along).sum())
    return min(max(float((along * wanted).sum()) / length, 0.0), 1.0) if length else 0.0


def _network(config: FrozenConfig, fitted: Fitted) -> FrozenHiFusion:
    network = FrozenHiFusion(config)
    state = network.state_dict() | fitted.state
    state |= {
        f"heads.{number}.{name}": value
        for number, head in enumerate(fitted.heads)
        for name, value in head.state_dict().items()
    }
    network.load_state_dict(state)
    return network.eval()


def _fit(seen: Seen, rows: np.ndarray, recipe: Recipe, seed: int) -> Fitted:
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
    whole = seen.whole[rows]
    spread = whole.std(0).clamp(min=1e-6)
    _, _, looks = torch.pca_lowrank(((whole - whole.mean(0)) / spread), q=min(NOVELTY_AXES, len(rows) // 4), niter=4)
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
    """Every head from a beginning of its own, on batches mixed of pairs of spots."""
    config: FrozenConfig = recipe.model
    wanted = torch.from_numpy(target / max(float(target.std()), 1e-9)).float()
    weights, size = torch.from_numpy(weight).float(), min(recipe.batch_size, len(rows))
    given = head_inputs(seen.levels[rows], seen.context[rows], config)
    nothing = torch.empty(0, dtype=torch.uint8)  # heads see no pixels
    heads = []
    for member in range(config.members):
        generator = torch.Generator().manual_seed(1000 * seed + member)
        with torch.random.fork_rng(devices=[]):
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
