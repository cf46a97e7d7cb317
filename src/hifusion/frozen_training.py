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

from hifusion import checkpoint, data, files, run_folder, trust, trust_card
from hifusion.appearance import seen_of
from hifusion.checkpoint import Run
from hifusion.cohort import SectionView, mean_profile
from hifusion.configuration import Recipe
from hifusion.encoders import load_encoder
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.frames import Frames
from hifusion.frozen_fit import FOLDS, Seen, fit_some, network_of
from hifusion.models.frozen import HEAD_SHARE, STRENGTH, FrozenConfig, FrozenHiFusion
from hifusion.novelty import Novelty, fit_distance, in_units_of

Progress = Callable[[str, int, int], None]


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
    model = dataclasses.replace(recipe.sized(len(panel.genes)).model, channels=encoder.channels)
    recipe = dataclasses.replace(recipe, model=model)
    spots = [(view, np.arange(len(view.expression))) for view in train]
    facts = run_folder.first_facts(
        recipe,
        panel,
        train,
        [],
        trained=spots,
        held_out=[],
        seed=seed,
        shuffled=shuffled,
        precision="32-true",
        device=encoder.device,
    )
    facts |= {"patients": sorted({view.patient for view in train}), "encoder": encoder.name}
    if run_folder.begin(out, facts, panel, resume):
        return Run.open(out)
    started = time.perf_counter()
    frames = Frames.build(train, out)
    seen = look(train, encoder, frames, model, recipe.region_mpp, seed, progress)
    network, left_out, novelty = _fit_all(seen, recipe, seed, progress)
    weights = {**network.state_dict(), "train_mean": torch.from_numpy(mean_profile(train).astype(np.float32))}
    checkpoint.save_tensors(out / "weights.safetensors", weights, {})
    checkpoint.save_novelty(out, novelty)
    trust_card.write_card(out, trust.card(spots, panel.genes, recipe.normalisation, left_out))
    seconds = round(time.perf_counter() - started, 3)
    errors = left_out["known"].expression - seen.expression
    found = {
        "state": "complete",
        "train_seconds": seconds,
        "head_share": round(float(network.head_share), 4),
        "strength_in_new_patients": round(float(network.strength), 4),
        "validation_mse": float(np.square(errors).mean()),
        "best_epoch": None,  # it has no epochs
    }
    files.write_json(out / "run.json", facts | found)
    return Run.open(out)


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
    folds = {"known": seen.known_fold} | ({"new": seen.new_fold} if seen.new_fold.any() else {})
    told = {name for name in folds if name == "new" or len(np.unique(seen.section)) > len(np.unique(seen.patient))}
    parts, lengths = _leave_out(seen, folds, recipe, seed, progress)
    network = network_of(config, fit_some(seen, np.arange(len(seen.expression)), recipe, seed))
    known, new = parts["known"], parts.get("new", parts["known"])
    share, strength = config.head_share, config.strength
    if share is None:
        wanted = seen.expression - known.offset - known.kernel
        share = _least_squares(known.heads - known.kernel, wanted) if "known" in told else HEAD_SHARE
    if strength is None:
        strength = _least_squares(new.deviations(share), seen.expression - new.offset) if "new" in told else STRENGTH
    network.head_share.fill_(share)
    network.strength.fill_(strength)
    variance = np.mean([seen.expression[seen.section == its].var(axis=0) for its in np.unique(seen.section)], axis=0)
    rest = np.square(seen.expression - known.offset - known.deviations(share)) - known.spread
    residual = np.maximum(rest.mean(axis=0), 0.1 * variance)
    network.residual.copy_(torch.from_numpy(residual))
    left_out = {}
    for row, (kind, its, factor) in enumerate((("known", known, 1.0), ("new", new, strength))):
        expected = np.sqrt(its.spread + residual)
        # What was never left out, a section or a patient, has an offset that was never seen: its usual size is added.
        more = 0.0 if kind in told else trust.OFFSETS[kind]
        widened = np.sqrt(1 + more * variance / np.square(expected).mean(axis=0))
        said = its.offset + factor * its.deviations(share)
        found = trust.LeftOut(said, expected, folds.get(kind, seen.known_fold), widened)
        network.quantiles[row].copy_(torch.from_numpy(found.quantiles(seen.expression)))
        if kind in folds:
            left_out[kind] = found
    novelty = in_units_of(fit_distance(network.embedding(seen.whole).numpy()), lengths)
    return network.eval(), left_out, novelty


class Parts(NamedTuple):
    """What is said of spots, all ``(N, G)``."""

    kernel: np.ndarray
    """Deviations from the offset by the kernel regression."""
    heads: np.ndarray
    """Deviations by the heads."""
    spread: np.ndarray
    """Variance of those by the kernel regression."""
    offset: np.ndarray

    def deviations(self, head_share: float) -> np.ndarray:
        """The two blended."""
        return self.kernel + head_share * (self.heads - self.kernel)


def _leave_out(
    seen: Seen, folds: dict[str, np.ndarray], recipe: Recipe, seed: int, progress: Progress | None
) -> tuple[dict[str, Parts], np.ndarray]:
    """What fits that did not see them say of all spots, for each way to leave out, and how far off these lie."""
    every, lengths = np.arange(len(seen.expression)), np.zeros(len(seen.expression))
    said = {kind: Parts(*(np.empty_like(seen.expression) for _ in Parts._fields)) for kind in folds}
    jobs = [(kind, fold) for kind, its in folds.items() for fold in np.unique(its)]
    for done, (kind, fold) in enumerate(jobs):
        if progress:
            progress("leave out and fit", done, len(jobs) + 1)
        out = folds[kind] == fold
        fitted = network_of(recipe.model, fit_some(seen, every[~out], recipe, seed))
        for array, values in zip(said[kind], _parts(fitted, seen, every[out]), strict=True):
            array[out] = values
        if kind == "known":
            looks = fitted.embedding(seen.whole).numpy()
            lengths[out] = fit_distance(looks[~out]).of(looks[out])
    if progress:
        progress("leave out and fit", len(jobs), len(jobs) + 1)
    return said, lengths


def _parts(network: FrozenHiFusion, seen: Seen, rows: np.ndarray) -> Parts:
    """What a network says of some spots."""
    found = []
    with torch.inference_mode():
        for some in np.array_split(rows, max(1, len(rows) // 256)):
            mean, spread = network.regression(seen.context[some], seen.place[some])
            heads = network.from_heads(seen.levels[some], seen.context[some])
            found.append((mean @ network.axes, heads @ network.axes, spread @ network.axes.square()))
    arrays = [torch.cat(part).double().numpy() for part in zip(*found, strict=True)]
    return Parts(arrays[0], arrays[1], arrays[2], np.tile(network.offset.double().numpy(), (len(rows), 1)))


def _least_squares(along: np.ndarray, wanted: np.ndarray) -> float:
    """The share of ``along``, 0 to 1, that comes nearest to ``wanted``."""
    length = float(np.square(along).sum())
    return min(max(float((along * wanted).sum()) / length, 0.0), 1.0) if length else 0.0
