"""The one training loop."""

import csv
import dataclasses
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from hifusion import checkpoint, data, files
from hifusion.allocator import keep_freed_memory
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort, SectionView, mean_profile
from hifusion.configuration import Recipe, from_dict
from hifusion.errors import InputError
from hifusion.expression import GenePanel
from hifusion.inference import best_device, fast_network, resolve_precision
from hifusion.metrics import lattice_weights
from hifusion.models import MODELS
from hifusion.models.inputs import pixel_statistics
from hifusion.novelty import fit_novelty
from hifusion.optimisers import OPTIMISERS, learning_rate
from hifusion.store import Store
from hifusion.surroundings import Spots, Surroundings, predict_spots

# Of a loss or MSE in squared units of expression, which itself stays below 15 in either normalisation.
DIVERGED = 1e6

Progress = Callable[[str, int, int], None]  # (what is going on, spots done, spots in all)


def train(
    cohort: Cohort,
    recipe: Recipe,
    out: Path,
    *,
    sections: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train on sections of a cohort; the panel is chosen on them (on all of the cohort where the recipe says "paper").

    Parameters
    ----------
    sections
        Names to train on; all with an image, less ``validation``, where None.
    validation
        Sections to select the epoch on. None: blocks of spots of each training section.

    Raises
    ------
    InputError
        A section without region patches, or a store whose patches are not what the recipe needs.
    """
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
    return fit(
        recipe,
        panel,
        views[: len(names)],
        views[len(names) :],
        out,
        store=cohort.store,
        seed=seed,
        resume=resume,
        progress=progress,
    )


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

    Raises
    ------
    InputError
        Patches that do not fit the recipe, a folder that holds another run, or a loss that is no longer a number.
    """
    out = Path(out)
    check_patches(recipe, store)
    if shuffle_targets:
        train, validation = shuffled(train, seed), shuffled(validation, seed)
    trained, held_out = split(recipe, train, validation, seed)
    n_train = sum(len(rows) for _, rows in trained)
    device = best_device()
    precision = resolve_precision(recipe.precision, device)
    facts = {
        "format": checkpoint.FORMAT,
        "state": "training",
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "shuffled": shuffle_targets,
        "panel_digest": panel.digest,
        "train": [view.name for view in train],
        "validation": [view.name for view in validation],
        "data": _digest([*train, *validation]),
        "train_spots": n_train,
        "validation_spots": sum(len(rows) for _, rows in held_out),
        "spots": _spot_facts(train),
        "precision": precision,
        "device": str(device),
        "versions": checkpoint.versions(),
    }
    if _open_folder(out, facts, panel, resume):
        return Run.open(out)

    keep_freed_memory()
    torch.manual_seed(seed)
    fabric = Fabric(accelerator=device.type, devices=1, precision=precision)  # type: ignore[arg-type]
    sized = recipe.sized(len(panel.genes))
    surroundings = Surroundings(sized, trained)
    network: Any = MODELS[recipe.network].module(sized.model)
    train_mean = mean_profile(train)
    _start(network, surroundings, train_mean)
    network = network.to(memory_format=network.config.memory_format)
    optimiser = OPTIMISERS[recipe.optimiser](network.parameters(), recipe)
    model, optimiser = fabric.setup(network, optimiser)

    log: list[dict[str, Any]] = _restore(out, network, optimiser) if resume else []
    for epoch in range(len(log), recipe.epochs):
        started = time.perf_counter()
        terms = _one_epoch(fabric, model, optimiser, surroundings, seed, epoch, progress)
        seconds = time.perf_counter() - started
        if hasattr(network, "set_bank"):
            bank = np.concatenate([view.expression[rows] for view, rows in trained])
            network.set_bank(torch.from_numpy(bank).to(device))
        row = {
            "epoch": epoch,
            "lr": optimiser.param_groups[0]["lr"],
            **terms,
            "validation_mse": _mse(network, surroundings, held_out, precision),
            "seconds": round(seconds, 3),
            "spots_per_s": round(n_train / seconds, 3),
        }
        _refuse_diverged(row["validation_mse"], "validation MSE", epoch, recipe.lr)
        log.append(row)
        if _selected(recipe, log) is row:
            weights = {**network.state_dict(), "train_mean": torch.from_numpy(train_mean.astype(np.float32))}
            checkpoint.save_tensors(out / "weights.safetensors", weights, {"epoch": str(epoch)})
        state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
        state |= checkpoint.optimiser_tensors(optimiser)
        _write_log(out / "log.csv", log)
        # Last of the three: a run that is stopped anywhere before it does the epoch again, and writes the same files.
        checkpoint.save_tensors(out / "last.safetensors", state, {"log": json.dumps(log)})

    best = _selected(recipe, log)
    selected, _ = checkpoint.load_tensors(out / "weights.safetensors")
    network.load_state_dict({name: tensor for name, tensor in selected.items() if name != "train_mean"})
    _save_novelty(out, network, surroundings, held_out, precision)
    facts |= {"train_seconds": round(sum(row["seconds"] for row in log), 3)}
    facts |= {"state": "complete", "best_epoch": best["epoch"], "validation_mse": best["validation_mse"]}
    files.write_json(out / "run.json", facts)
    (out / "last.safetensors").unlink()
    return Run.open(out)


def split(
    recipe: Recipe, train: Sequence[SectionView], validation: Sequence[SectionView], seed: int
) -> tuple[list[Spots], list[Spots]]:
    """Training and validation spots of :func:`fit`: whole sections, or blocks of spots of each training section."""
    if validation:
        return _whole(train), _whole(validation)
    splits = [(view, *data.split_spots(view, recipe.validation_fraction, seed)) for view in train]
    return [(view, rows) for view, rows, _ in splits], [(view, rows) for view, _, rows in splits]


def _whole(views: Sequence[SectionView]) -> list[Spots]:
    return [(view, np.arange(len(view.expression))) for view in views]


def _spot_facts(views: Sequence[SectionView]) -> dict[str, Any]:
    """Scale and spots of the training sections (medians): what a slide that was never measured is to be seen at."""
    neighbours = [np.median(np.diff(lattice_weights(view.centres_px, view.pitch_px).indptr)) for view in views]
    return {
        "lattice": "hexagonal" if np.median(neighbours) > 4 else "square",
        "mpp": float(np.median([view.mpp for view in views])),
        "pitch_um": float(np.median([view.pitch_px * view.mpp for view in views])),
        "spot_diameter_um": float(np.median([view.spot_diameter_um for view in views])),
    }


def check_patches(recipe: Recipe, store: Store | None) -> None:
    """Refuse a store whose region patches do not hold, at the same scale, those the recipe's network takes."""
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


def _start(network: Any, surroundings: Surroundings, train_mean: np.ndarray) -> None:
    """What a network is told of its training spots before it learns."""
    recipe = surroundings.recipe
    if hasattr(network, "set_pixel_statistics"):
        spots = surroundings.train
        regions = (region for view, rows in spots for region, *_ in surroundings.batches(view, rows))
        network.set_pixel_statistics(*pixel_statistics(regions, recipe.model.patch_px))
    if recipe.start_at_mean:
        if not hasattr(network, "start_at"):
            raise InputError(
                f"start_at_mean=true is not possible: {recipe.network} has no output bias; set it to false"
            )
        network.start_at(torch.from_numpy(train_mean))


def _one_epoch(
    fabric: Fabric,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    surroundings: Surroundings,
    seed: int,
    epoch: int,
    progress: Progress | None,
) -> dict[str, float]:
    """Train over every spot once; returns the mean of each loss term over the spots."""
    draw = np.random.SeedSequence([seed, epoch]).generate_state(2)
    torch.manual_seed(int(draw[0]))  # dropout
    generator = torch.Generator().manual_seed(int(draw[1]))  # order and turns
    model.train()
    recipe = surroundings.recipe
    step = MODELS[recipe.network].step
    sums: dict[str, float] = {}
    n_spots, done, learned = sum(len(rows) for _, rows in surroundings.train), 0, 0
    for batch in surroundings.training_batches(generator):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, epoch + done / n_spots)
        terms = step(model, batch.to(fabric.device), **recipe.loss)
        optimiser.zero_grad(set_to_none=True)
        fabric.backward(terms["total"])
        optimiser.step()
        spots = len(batch.target) if batch.scored is None else int(batch.scored.sum())
        done, learned = min(done + len(batch.target), n_spots), learned + spots
        for name, value in terms.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) * spots
        _refuse_diverged(float(terms["total"].detach()), "training loss", epoch, recipe.lr)
        if progress:
            what = f"epoch {epoch + 1}/{recipe.epochs} loss {sums['total'] / learned:.3f}"
            progress(what, epoch * n_spots + done, recipe.epochs * n_spots)
    return {name: value / learned for name, value in sums.items()}


def _refuse_diverged(value: float, what: str, epoch: int, lr: float) -> None:
    if not value < DIVERGED:  # NaN is not below anything
        raise InputError(
            f"the {what} is {value:.3g} in epoch {epoch}: training diverged; start anew in another folder with a lower "
            f"rate, for example --set lr={lr / 3:.0e}"
        )


def _selected(recipe: Recipe, log: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The epoch whose weights are kept: of those with the lowest validation MSE the first, or the last of all."""
    return log[-1] if recipe.selection == "last" else min(log, key=lambda row: row["validation_mse"])


def _mse(network: nn.Module, surroundings: Surroundings, held_out: Sequence[Spots], precision: str) -> float:
    errors, fast = [], fast_network(network, precision)
    for view, rows in held_out:
        predicted = predict_spots(fast, surroundings, view, rows, precision).expression
        errors.append((predicted - view.expression[rows]).ravel())
    return float(np.mean(np.square(np.concatenate(errors), dtype=np.float64)))


def _save_novelty(
    out: Path, network: nn.Module, surroundings: Surroundings, held_out: Sequence[Spots], precision: str
) -> None:
    fast = fast_network(network, precision)

    def embeddings(spots: Sequence[Spots]) -> np.ndarray:
        found = [predict_spots(fast, surroundings, view, rows, precision).embedding for view, rows in spots]
        return np.concatenate(found)

    fitted = fit_novelty(embeddings(surroundings.train), embeddings(held_out))
    tensors = {"mean": torch.from_numpy(fitted.mean), "factor": torch.from_numpy(fitted.factor)}
    checkpoint.save_tensors(out / "novelty.safetensors", tensors, {})


def _open_folder(out: Path, facts: dict[str, Any], panel: GenePanel, resume: bool) -> bool:
    """Start a run folder, or check that the one there is this very run; True where that is already complete."""
    if not (out / "run.json").exists():
        (out / "last.safetensors").unlink(missing_ok=True)  # of a run whose run.json was deleted
        panel.save(out / "panel.json")
        files.write_json(out / "run.json", facts)  # last: a folder with it is a whole one
        return False
    if not resume:
        raise InputError(f"{out}: holds a run already; go on with --resume, or give another folder")
    before = files.read_json(out / "run.json")
    there, here = _settings({"data": facts["data"], **before}), _settings(facts)  # older runs do not tell their data
    changed = [f"{key} ({there.get(key)} there, {here.get(key)} given)" for key in here if there.get(key) != here[key]]
    if changed:
        raise InputError(
            f"{out}: the run there differs in {', '.join(changed)}; resume with the same settings, "
            "or give another folder"
        )
    if before["state"] != "complete":
        return False
    (out / "last.safetensors").unlink(missing_ok=True)  # of a run that was stopped while it ended
    return True


def _digest(views: Sequence[SectionView]) -> str:
    """Of what was measured, and where."""
    parts = [part for view in views for part in (view.image_digest.encode(), view.expression, view.centres_px)]
    return files.digest(*(part if isinstance(part, bytes) else np.ascontiguousarray(part).data for part in parts))[:16]


def _settings(facts: dict[str, Any]) -> dict[str, Any]:
    """What two trainings must share to be the same run; the recipe and its network value by value."""
    keys = ("seed", "shuffled", "panel_digest", "train", "validation", "precision", "data")
    # Through a recipe, so that one written by an older version has today's new values at their defaults.
    recipe = dataclasses.asdict(from_dict(facts["recipe"]))
    for group in ("model", "loss"):
        recipe |= {f"{group}.{key}": value for key, value in recipe.pop(group).items()}
    return {key: facts.get(key) for key in keys} | {f"recipe.{key}": value for key, value in recipe.items()}


def _restore(out: Path, network: nn.Module, optimiser: torch.optim.Optimizer) -> list[dict[str, Any]]:
    if not (out / "last.safetensors").exists():
        return []  # stopped within its first epoch
    tensors, facts = checkpoint.load_tensors(out / "last.safetensors")
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    network.load_state_dict(weights)
    checkpoint.restore_optimiser(optimiser, tensors)
    log: list[dict[str, Any]] = json.loads(facts["log"])
    return log


def _write_log(path: Path, log: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(log[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(log)
    files.write_text(path, text.getvalue())
