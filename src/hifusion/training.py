"""The one training loop."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from hifusion import checkpoint, data, devices, files, memory, run_folder
from hifusion.allocator import keep_freed_memory
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort, SectionView, mean_profile
from hifusion.configuration import Recipe
from hifusion.epochs import Progress, learn_epoch, refuse_diverged, validation_mse
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.frozen_training import fit_frozen
from hifusion.inference import best_device, resolve_precision
from hifusion.models import MODELS
from hifusion.models.inputs import pixel_statistics
from hifusion.optimisers import OPTIMISERS
from hifusion.published_weights import published_weights
from hifusion.ranks import asked
from hifusion.run_completion import complete, selected
from hifusion.store import Store
from hifusion.surroundings import Spots, Surroundings

_ACROSS_SPOTS = {
    "bleep": "the contrast between the spots of a batch",
    "egn": "the correlation over the spots of a batch",
}
"""Networks whose loss is no mean over spots, and what it is of."""


def train(
    cohort: Cohort,
    recipe: Recipe,
    out: Path,
    *,
    sections: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    device_count: int | str = 1,
    nodes: int = 1,
    recompute: bool = False,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train on sections of a cohort; the panel is chosen on them (on all of the cohort where the recipe says "paper").

    Parameters
    ----------
    sections
        Names to train on; all with an image, less ``validation``, where None.
    validation
        Sections to select the epoch on. None: blocks of spots of each training section.
    device_count, nodes
        See :func:`hifusion.ranks.asked`; as many as torchrun or srun has started where that started this process.

    Raises
    ------
    InputError
        A section without region patches, a store whose patches are not what the recipe needs, or devices that are not
        there.
    """
    wanted = asked(device_count, nodes, torch.cuda.device_count())
    return fit(
        recipe,
        *chosen(cohort, recipe, sections, validation),
        out,
        store=cohort.store,
        seed=seed,
        resume=resume,
        device_count=wanted[0],
        nodes=wanted[1],
        recompute=recompute,
        weights=weights,
        progress=progress,
    )


def chosen(
    cohort: Cohort, recipe: Recipe, sections: Sequence[str] | None, validation: Sequence[str]
) -> tuple[GenePanel, list[SectionView], list[SectionView]]:
    """Panel, training and validation sections of :func:`train`, whose arguments these are."""
    check_patches(recipe, cohort.store)
    with_image = [name for name in cohort.sections if cohort.has_regions(name)]
    names = list(sections) if sections is not None else [name for name in with_image if name not in validation]
    without = [name for name in (*names, *validation) if name not in with_image]
    if without or not names:
        raise InputError(
            f"{cohort.root}: no region patches for {', '.join(without) or 'any section'}; training needs sections with "
            "an image, in a store made by `hifusion prepare`"
        )
    twice = [name for name in names if name in validation]
    if twice:
        raise InputError(
            f"{', '.join(twice)}: given for training and for validation; a section can be only one of them"
        )
    panel = cohort.panel(recipe.panel, recipe.panel_size, [*names, *validation])
    views = cohort.views([*names, *validation], panel, recipe.normalisation)
    return panel, views[: len(names)], views[len(names) :]


def fit(
    recipe: Recipe,
    panel: GenePanel,
    train: Sequence[SectionView],
    validation: Sequence[SectionView],
    out: Path,
    *,
    store: Store | None,
    seed: int = 0,
    shuffle_targets: bool = False,
    resume: bool = False,
    device_count: int = 1,
    nodes: int = 1,
    recompute: bool = False,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train a network and leave a complete run folder.

    Every random choice of an epoch is drawn from the seed and the epoch's number, so that a run that was stopped and
    resumed is the same, bit for bit on a CPU, as one that never stopped.

    Parameters
    ----------
    train, validation
        Sections through ``panel``. Without validation sections, blocks of the training sections' spots are held out.
    shuffle_targets
        The ``shuffled`` null: each section's expression is dealt out anew over its spots before anything else.
    resume
        Go on with the run in ``out``; without it a folder that holds a run is refused.
    device_count, nodes
        Devices on each node, and nodes, that learn together; each takes its share of every batch. With more than one
        device this very command runs once more for each of them, see docs/devices.md.
    recompute
        Keep no activations of the trunk for the backward pass: less memory, the same result, about a third slower. It
        is switched on by itself where memory runs out.
    weights
        Weights under their published names to begin with, see :func:`hifusion.published_weights.published_weights`.
        They are scored as epoch -1, and kept where no epoch is better; with a recipe of 0 epochs they are the run.

    Raises
    ------
    InputError
        Patches that do not fit the recipe, a folder that holds another run, a loss that is no longer a number, or too
        little memory.
    """
    out = Path(out)
    if MODELS[recipe.network].fitted_at_once:
        if device_count * nodes > 1 or recompute or weights:
            options = "--devices, --nodes, --recompute and --weights"
            raise InputError(f"recipe {recipe.name} is fitted at once: leave {options} out")
        both = [*train, *validation]  # nothing is selected on a section: what is chosen is chosen by leaving some out
        both = shuffled(both, seed) if shuffle_targets else both
        return fit_frozen(
            recipe, panel, both, out, seed=seed, shuffled=shuffle_targets, resume=resume, progress=progress
        )
    check_patches(recipe, store)
    if not recipe.epochs and weights is None:
        raise InputError("epochs=0 is not possible: nothing would be learned; give a number above it, or --weights")
    if device_count * nodes > 1:
        _refuse_sharing(recipe, device_count * nodes)
    if shuffle_targets:
        train, validation = shuffled(train, seed), shuffled(validation, seed)
    sized = recipe.sized(len(panel.genes))
    given = published_weights(weights, recipe.network, sized.model) if weights else None
    trained, held_out = split(recipe, train, validation, seed)
    device = best_device()
    precision = resolve_precision(recipe.precision, device)
    facts = run_folder.first_facts(
        recipe,
        panel,
        train,
        validation,
        trained=trained,
        held_out=held_out,
        seed=seed,
        shuffled=shuffle_targets,
        precision=precision,
        device=device,
    )
    facts |= {
        "devices": [device_count * nodes],
        "weights": files.digest_file(weights)[:16] if weights else None,
    }
    fabric = devices.start(device, device_count, nodes, precision)
    with devices.ending_together(fabric):
        if not devices.by_first(fabric, lambda: run_folder.begin(out, facts, panel, resume)):
            keep_freed_memory()
            torch.manual_seed(seed)
            with fabric.rank_zero_first():  # it leaves the features of a frozen encoder in the store for the others
                surroundings = Surroundings(sized, trained)
                for view, rows in (*trained, *held_out) if surroundings.needs and fabric.world_size > 1 else ():
                    next(surroundings.batches(view, rows))
            network: Any = MODELS[recipe.network].module(sized.model)
            train_mean = mean_profile(train)
            if given:
                network.load_state_dict(given)
            _start(network, surroundings, None if given else train_mean)
            if recompute and not memory.recompute(network):
                raise InputError(f"--recompute: {recipe.network} has no trunk to compute anew; leave it out")
            network = network.to(memory_format=network.config.memory_format)
            network = devices.joint_statistics(network, fabric)
            log = _learn(fabric, network, surroundings, held_out, train_mean, out, facts, resume, progress)
            devices.by_first(fabric, lambda: complete(out, facts, network, panel, surroundings, held_out, log))
    return Run.open(out)


def _learn(
    fabric: Fabric,
    network: Any,
    surroundings: Surroundings,
    held_out: Sequence[Spots],
    train_mean: np.ndarray,
    out: Path,
    facts: dict[str, Any],
    resume: bool,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Every epoch, the state after each and the best weights written by the first rank; returns the log."""
    recipe, share, trained = surroundings.recipe, devices.share_of(fabric), surroundings.train
    n_train, seed, precision = sum(len(rows) for _, rows in trained), facts["seed"], facts["precision"]
    optimiser = OPTIMISERS[recipe.optimiser](network.parameters(), recipe)
    model, optimiser = fabric.setup(network, optimiser)
    log: list[dict[str, Any]] = run_folder.restore(out, network, optimiser) if resume else []
    if log and log[-1].get("recomputed"):
        memory.recompute(network)
    first = log[-1]["epoch"] + 1 if log else -1 if facts["weights"] else 0
    for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        shown = progress if share.rank == 0 else None
        terms = learn_epoch(fabric, model, optimiser, surroundings, seed, epoch, shown) if epoch >= 0 else {}
        seconds = time.perf_counter() - started
        devices.average_statistics(network, fabric)
        if hasattr(network, "set_bank"):
            bank = np.concatenate([view.expression[rows] for view, rows in trained])
            network.set_bank(torch.from_numpy(bank).to(fabric.device))
        row = {
            "epoch": epoch,
            "lr": optimiser.param_groups[0]["lr"],
            **terms,
            "validation_mse": validation_mse(fabric, network, surroundings, held_out, precision),
            "seconds": round(seconds, 3),
            "spots_per_s": round(n_train / seconds, 3) if epoch >= 0 else None,
            "devices": share.ranks,
            "recomputed": int(memory.recomputes(network)),
        }
        refuse_diverged(row["validation_mse"], "validation MSE", epoch, recipe.lr)
        log.append(row)
        devices.by_first(fabric, lambda: _save_epoch(out, network, optimiser, train_mean, log, recipe))
    return log


def _save_epoch(
    out: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    train_mean: np.ndarray,
    log: Sequence[dict[str, Any]],
    recipe: Recipe,
) -> None:
    if selected(recipe, log) is log[-1]:
        weights = {**network.state_dict(), "train_mean": torch.from_numpy(train_mean.astype(np.float32))}
        checkpoint.save_tensors(out / "weights.safetensors", weights, {"epoch": str(log[-1]["epoch"])})
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    state |= checkpoint.optimiser_tensors(optimiser)
    run_folder.write_log(out / "log.csv", log)
    # Last of the three: a run that is stopped anywhere before it does the epoch again, and writes the same files.
    checkpoint.save_tensors(out / "last.safetensors", state, {"log": json.dumps(log)})


def split(
    recipe: Recipe, train: Sequence[SectionView], validation: Sequence[SectionView], seed: int
) -> tuple[list[Spots], list[Spots]]:
    """Training and validation spots of :func:`fit`: whole sections, or blocks of spots of each training section."""
    if MODELS[recipe.network].fitted_at_once:
        return _whole([*train, *validation]), []
    if validation:
        return _whole(train), _whole(validation)
    splits = [(view, *data.split_spots(view, recipe.validation_fraction, seed)) for view in train]
    return [(view, rows) for view, rows, _ in splits], [(view, rows) for view, _, rows in splits]


def _whole(views: Sequence[SectionView]) -> list[Spots]:
    return [(view, np.arange(len(view.expression))) for view in views]


def check_patches(recipe: Recipe, store: Store | None) -> None:
    """Refuse a store whose region patches do not hold, at the same scale, those the recipe's network takes."""
    if MODELS[recipe.network].fitted_at_once:
        return  # it reads slides
    if store is None:
        raise InputError("training needs region patches; build a store with `hifusion prepare` first")
    wanted, found = recipe.model.region_px, store.region_px
    if store.mpp != recipe.region_mpp or found < wanted or (found - wanted) % 2:
        given, needed = (
            f"region_px={px}, mpp={'native' if mpp is None else mpp}"
            for px, mpp in ((found, store.mpp), (wanted, recipe.region_mpp))
        )
        scale = "" if recipe.region_mpp is None else f" --mpp {recipe.region_mpp}"
        command = f"hifusion prepare DATA NEW_STORE --recipe {recipe.name} --region-px {wanted}{scale}"
        raise InputError(f"{store.root}: holds patches of {given}, the recipe takes {needed}; run `{command}`")


def shuffled(views: Sequence[SectionView], seed: int) -> list[SectionView]:
    """The sections with what was measured dealt out anew over the spots of each: nothing left to learn but the mean."""
    rng = np.random.default_rng(seed)
    return [_dealt(view, rng.permutation(len(view.expression))) for view in views]


def _dealt(view: SectionView, order: np.ndarray) -> SectionView:
    """The section with the measurements of other spots: counts too, which some networks learn from."""
    counts = None if view.counts is None else view.counts[order]
    total = view.total_counts[order]
    return dataclasses.replace(view, expression=view.expression[order], counts=counts, total_counts=total)


def _refuse_sharing(recipe: Recipe, ranks: int) -> None:
    """Refuse several devices for a network of which one step cannot be shared out."""
    if MODELS[recipe.network].module.whole_section:  # type: ignore[attr-defined]
        reason = "takes whole sections a step"
    elif recipe.network in _ACROSS_SPOTS:
        reason = f"learns from {_ACROSS_SPOTS[recipe.network]}"
    else:
        return
    raise InputError(f"{recipe.network} {reason}, which {ranks} devices cannot share; train it on one (--devices 1)")


def _start(network: Any, surroundings: Surroundings, train_mean: np.ndarray | None) -> None:
    """What a network is told of its training spots before it learns; no mean where its weights know one."""
    recipe = surroundings.recipe
    if hasattr(network, "set_pixel_statistics"):
        spots = surroundings.train
        regions = (region for view, rows in spots for region, *_ in surroundings.batches(view, rows))
        network.set_pixel_statistics(*pixel_statistics(regions, recipe.model.patch_px))
    if recipe.start_at_mean and train_mean is not None:
        if not hasattr(network, "start_at"):
            raise InputError(
                f"start_at_mean=true is not possible: {recipe.network} has no output bias; set it to false"
            )
        network.start_at(torch.from_numpy(train_mean))
