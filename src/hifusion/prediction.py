"""A trained run and a section, measured or only placed on its slide: expression at each of its spots."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from scipy.spatial import KDTree
from torch import Tensor, nn

from hifusion import appearance, files
from hifusion.checkpoint import Run
from hifusion.cohort import SectionView
from hifusion.data import slide_regions
from hifusion.errors import InputError
from hifusion.expression import normalisation, panel_counts, total_counts
from hifusion.inference import SpotOutputs, best_device, fast_network, forward_regions, resolve_precision
from hifusion.models import MODELS
from hifusion.models.int8 import for_int8
from hifusion.section import predicted_section, write_section
from hifusion.slide import Slide
from hifusion.store import refuse_outside, region_shrink
from hifusion.surroundings import Spots, Surroundings, predict_spots, spots_by_batch

CALIBRATION_SPOTS = 64  # whose patches tell what values 8 bits have to hold
TRUST_COLUMNS = {
    "pcc_per_gene": "expected_pcc_per_gene",
    "of_ceiling": "expected_of_ceiling",
    "coverage_90": "expected_coverage_90",
    "trust": "trust",
}
"""Column of the trust card -> column of a prediction's ``var``."""
SAME_SCALE = 0.05  # scales this close are one: a run trained on native pixels then reads native pixels

Progress = Callable[[str, int, int], None]  # (what is going on, spots done, spots in all)


def predict_view(
    run: Run, view: SectionView, trained: Sequence[Spots] = (), progress: Progress | None = None
) -> np.ndarray:
    """Expression of a section whose region patches are in a store, float32 ``(N, G)``.

    Parameters
    ----------
    trained
        The run's training spots (:func:`hifusion.training.split`), for networks that look at them: EGN and ASIGN-3D.

    Raises
    ------
    InputError
        The network looks at training spots, and none are given.
    """
    surroundings, precision = run_surroundings(run, trained), run_precision(run)
    network = fast_network(run.network(best_device()), precision)
    return predict_all(network, surroundings, view, precision, progress).expression


def run_surroundings(run: Run, trained: Sequence[Spots] = ()) -> Surroundings:
    """What the run's network is given beside a spot's own patch; ``trained`` as for :func:`predict_view`."""
    return Surroundings(run.sized_recipe, trained, run.frames, run.facts.get("patients", ()))


def run_precision(run: Run) -> str:
    """In which precision a run predicts on this machine, which may be another than the one it was trained on."""
    return resolve_precision(run.recipe.precision, best_device())


def predict_all(
    network: nn.Module, surroundings: Surroundings, view: SectionView, precision: str, progress: Progress | None = None
) -> SpotOutputs:
    """What an opened network says of every spot of a section."""
    rows, done = np.arange(len(view.centres_px)), 0

    def report(batch: int) -> None:
        nonlocal done
        done += batch
        if progress:
            progress(f"predict {view.name}", done, len(rows))

    return predict_spots(network, surroundings, view, rows, precision, report)


def predict_section(
    run: Run,
    section: AnnData,
    image: Path | None = None,
    *,
    average_symmetries: bool = False,
    average_within_um: float | None = None,
    int8: bool = False,
    workers: int = 0,
    out: Path | None = None,
    progress: Progress | None = None,
) -> AnnData:
    """Predict a section from its image: a new section with expression ``X`` of the run's panel at the same spots.

    ``obs["novelty"]`` tells how unlike the training spots each one is (:mod:`hifusion.novelty`: above 1 is more than
    95 % of held-out spots; NaN for a run that does not know). A network with intervals gives ``layers["lower_90"]``
    and ``layers["upper_90"]``, within which 90 % of measurements are to lie; a run with a trust card
    (:mod:`hifusion.trust`) gives columns of ``var``, for a patient it was trained on or for a new one. Where
    ``section`` is measured and has the panel's genes, its own expression in the run's unit goes along as
    ``layers["measured"]``.

    Parameters
    ----------
    image
        The slide; the path kept in the section where None.
    average_symmetries
        Mean of the predictions for the eight flips and turns of a patch, at eight times the cost.
    average_within_um
        Side of the square that a prediction stands for: spots closer than that are averaged, so that each becomes the
        mean of all predictions whose square covers it. None: every spot keeps its own.
    int8
        Compute in 8-bit whole numbers, on a CPU: :func:`hifusion.models.int8.for_int8`, calibrated on
        :data:`CALIBRATION_SPOTS` spots spread over the section.
    workers
        Processes that read patches ahead; 0 reads in this one.
    out
        File to write the result to. Predictions, and before them what a frozen encoder sees, are kept beside it as they
        are made, and a call that was stopped goes on from there.

    Raises
    ------
    InputError
        No image, one that cannot be read, or spots that lie outside it; a disk that is full.
    """
    facts = section.uns["hifusion"]
    if image is None and not facts["image"]:
        raise InputError(f"section {facts['section']} names no image; give one with --image")
    path = Path(image or facts["image"])
    refuse_outside(section, Slide(path))
    centres, batch_size = section.obsm["spatial"], run.recipe.batch_size
    shrink = patch_shrink(run, section)

    seen = Path(out).with_name(f".{Path(out).name}.seen") if out else None
    genes, columns = len(run.panel.genes), values_a_spot(run) + 1

    def rows_from(first: int) -> Iterator[np.ndarray]:
        """Expression, its intervals if any, and novelty of the spots from ``first`` on, float32 ``(B, columns)``."""
        novelty, adapter, done = run.novelty, run.adapter, first
        for outputs in spot_outputs(
            run,
            section,
            path,
            shrink,
            first=first,
            average_symmetries=average_symmetries,
            int8=int8,
            workers=workers,
            seen=seen,
            progress=progress,
        ):
            unlike = novelty.of(outputs.embedding) if novelty else np.full(len(outputs.expression), np.nan)
            done += len(unlike)
            if progress:
                progress(f"predict {facts['section']}", done, len(centres))
            change = adapter.change(outputs.expression) if adapter else 0.0
            values = [its + change for its in (outputs.expression, outputs.lower, outputs.upper) if its is not None]
            yield np.column_stack([*values, unlike]).astype(np.float32)

    def finished(rows: np.ndarray) -> AnnData:
        values = rows[:, :-1]
        if average_within_um is not None:
            values = average_overlaps(values, centres, average_within_um / facts["mpp"])
        predicted = as_section(run.id, run, section, values[:, :genes])
        if values.shape[1] > genes:
            predicted.layers["lower_90"], predicted.layers["upper_90"] = (
                values[:, genes:].reshape(-1, 2, genes).swapaxes(0, 1)
            )
        predicted.obs["novelty"] = rows[:, -1]
        card = run.trust(facts["patient"] in run.facts.get("patients", ()))
        if card is not None:
            card = card.loc[list(run.panel.genes)]
            for column, name in TRUST_COLUMNS.items():
                predicted.var[name] = card[column].to_numpy()
        predicted.uns["hifusion"]["image"] = str(path.resolve())  # the one that was read, which may have been given
        return predicted

    if out is None:
        return finished(np.concatenate(list(rows_from(0))))
    of = [run.id, *_file_as_it_is(path), shrink, average_symmetries, int8, run_precision(run)]
    key = files.digest(json.dumps(of).encode(), np.ascontiguousarray(centres).data)
    with files.growing(out, key, 4 * columns, batch_size) as (file, done):
        for rows in rows_from(done):
            file.write(rows.tobytes())
        file.seek(0)
        predicted = finished(np.frombuffer(file.read(), dtype=np.float32).reshape(-1, columns))
        write_section(predicted, out)
    if seen:
        shutil.rmtree(seen, ignore_errors=True)
    return predicted


def _file_as_it_is(path: Path) -> tuple[str, int, int]:
    """What tells a file from another one, and from itself after a change."""
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def spot_outputs(
    run: Run,
    section: AnnData,
    slide: Path,
    shrink: float,
    *,
    first: int = 0,
    average_symmetries: bool,
    int8: bool = False,
    workers: int,
    seen: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[SpotOutputs]:
    """What the run's network says of a section's spots from ``first`` on, batch by batch.

    In the folder ``seen``, where one is given, the features of a frozen encoder are kept. Other arguments are those of
    :func:`predict_section`. What a network needs beside a spot's patch is made of the whole section before the first
    batch; patches are then all in memory, but for a network that reads the slide itself.
    """
    recipe, precision = run.sized_recipe, run_precision(run)
    centres, its = section.obsm["spatial"], MODELS[recipe.network]

    def regions_at(places: np.ndarray, workers: int) -> Iterator[Tensor]:
        return slide_regions(
            slide,
            places,
            region_px=recipe.model.region_px,
            shrink=shrink,
            batch_size=recipe.batch_size,
            workers=workers,
        )

    if its.fitted_at_once and (int8 or average_symmetries):
        raise InputError(
            f"{run.root}: --int8 and --average-symmetries are for networks that learn to see; {recipe.network} has a "
            "frozen trunk: leave them out"
        )
    network = run.network(best_device())
    if int8:
        spread = np.unique(np.linspace(0, len(centres) - 1, CALIBRATION_SPOTS).round().astype(int))
        network = for_int8(network, regions_at(centres[spread], 0))
    else:
        network = fast_network(network, precision)
    average_symmetries = average_symmetries or recipe.average_symmetries
    if not its.needs:
        regions = regions_at(centres[first:], workers)
        yield from forward_regions(network, regions, precision=precision, average_symmetries=average_symmetries)
        return
    pixels = None  # of a slide that the network's inputs are read from
    if not its.fitted_at_once:
        pixels = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in regions_at(centres, workers)])
    surroundings = run_surroundings(replace(run, recipe=replace(run.recipe, average_symmetries=average_symmetries)))
    surroundings.progress = progress
    view = _view(run, section, slide, shrink, pixels, seen)
    yield from spots_by_batch(network, surroundings, view, np.arange(first, section.n_obs), precision)


def values_a_spot(run: Run) -> int:
    """Numbers that a prediction has for a spot: expression, and both ends of its intervals where there are any."""
    return len(run.panel.genes) * (3 if MODELS[run.recipe.network].has_intervals else 1)


def bytes_a_spot(run: Run) -> tuple[int, int]:
    """Memory that a spot takes at most beside its prediction, and disk until the whole is written; 0 where little."""
    its, config = MODELS[run.recipe.network], run.sized_recipe.model
    if its.fitted_at_once:
        return appearance.bytes_a_spot(config)
    return (2 * 3 * config.region_px**2 if its.needs else 0), 0  # patches, and the batches they came in


def _view(
    run: Run, section: AnnData, slide: Path, shrink: float, regions: np.ndarray | None, cache: Path | None
) -> SectionView:
    """A section of which positions and pixels are known, as a network's surroundings want it."""
    facts, nothing = section.uns["hifusion"], np.zeros((section.n_obs, len(run.panel.genes)), dtype=np.float32)
    return SectionView(
        name=facts["section"],
        patient=facts["patient"],
        genes=run.panel.genes,
        expression=nothing,
        total_counts=nothing[:, 0].astype(np.float64),
        centres_px=section.obsm["spatial"],
        pitch_px=facts["pitch_um"] / facts["mpp"],
        mpp=facts["mpp"],
        spot_diameter_um=facts["spot_diameter_um"],
        regions=regions,
        array=section.obs[["array_col", "array_row"]].to_numpy(dtype=np.int64),
        image=slide,
        image_digest=files.digest(json.dumps(_file_as_it_is(slide)).encode()) if cache else "",
        cache=cache,
        shrink=shrink,
    )


def patch_shrink(run: Run, section: AnnData) -> float:
    """Slide pixels per region pixel that show a section at the scale the run was trained at.

    A run of native pixels (the paper's) is kept to the um/px of its training sections, unless the two are the same to
    5 %: its network has seen no other scale.
    """
    trained_at = run.recipe.region_mpp or run.facts.get("spots", {}).get("mpp")
    shrink = region_shrink(section, trained_at)
    return 1.0 if run.recipe.region_mpp is None and abs(shrink - 1) <= SAME_SCALE else shrink


def average_overlaps(expression: np.ndarray, centres_px: np.ndarray, side_px: float) -> np.ndarray:
    """Mean at each position over the predictions whose square covers it, float32 ``(N, G)``.

    Parameters
    ----------
    expression
        One prediction for each position, ``(N, G)``.
    centres_px
        Middles of their squares, ``(N, 2)``.
    side_px
        Side of a square.
    """
    half = side_px / 2 * (1 + 1e-9)  # a square covers its own edge, whatever rounding says
    pairs = KDTree(centres_px).query_pairs(half, p=np.inf, output_type="ndarray")
    near = sp.coo_matrix((np.ones(len(pairs), dtype=np.float32), pairs.T), shape=(len(centres_px),) * 2).tocsr()
    near = near + near.T + sp.identity(len(centres_px), dtype=np.float32, format="csr")
    return np.asarray(near @ expression / np.diff(near.indptr)[:, None], dtype=np.float32)


def as_section(name: str, run: Run, section: AnnData, expression: np.ndarray) -> AnnData:
    """Wrap predicted expression as a section, the measured one beside it where there is one."""
    unit, panel = run.recipe.normalisation, run.panel
    predicted = predicted_section(
        section, expression, genes=panel.genes, normalisation=unit, panel_digest=panel.digest, run=name
    )
    if "counts" in section.layers and set(panel.genes) <= set(section.var_names):
        counts = panel_counts(section, panel.genes)
        predicted.layers["measured"] = normalisation(unit).of(counts, total_counts(section))
    return predicted
