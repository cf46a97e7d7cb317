"""The verbs, on paths and names: what the command line calls, and a notebook can."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from anndata import AnnData

from hifusion import (
    adaptation,
    archive_prediction,
    benchmarking,
    describe,
    downloading,
    estimating,
    evaluation,
    exporting,
    figure_kinds,
    importing,
    labels,
    plots,
    prediction,
    preparing,
    recipes,
    registration,
    registration_picture,
    report_page,
    reproduction,
    slide_prediction,
    synth,
    training,
    viewer,
)
from hifusion.checkpoint import Run
from hifusion.cohort import Cohort
from hifusion.errors import InputError, refuse_unknown
from hifusion.readers.options import ReadOptions
from hifusion.section import read_section
from hifusion.slide_prediction import SlidePlan

Progress = Callable[[str, int, int], None]  # (what is going on, done, in all)

plot = plots.plot_genes
draw = figure_kinds.draw
map_gene = plots.map_gene
view = viewer.view
label_report = labels.label_report
report = report_page.report
export = exporting.export
info = describe.info
doctor = describe.doctor
synthesise = synth.write_cohort
prepare = preparing.prepare
BenchmarkSettings = benchmarking.Settings
benchmark = benchmarking.benchmark
estimate = benchmarking.estimate
reproduce = reproduction.reproduce
predict_archive = archive_prediction.predict_archive
plan_archive = archive_prediction.plan_archive


def register(data: Path, moving: str, fixed: str, out: Path, *, mirror: bool = False) -> dict[str, Any]:
    """Lay a section of a store over another and draw it; returns how far off that may be.

    Parameters
    ----------
    mirror
        Also try the moving section face down.
    """
    if moving == fixed:
        raise InputError(f"{moving}: is laid over itself; give two sections")
    cohort = Cohort.open(data, [moving, fixed])
    panel = cohort.panel("top_mean", 1, [moving, fixed])
    one, other = cohort.views([moving, fixed], panel, "log_share")
    found = registration.register(one, other, mirror=mirror)
    picture = registration_picture.draw_registration(found, one, other, Path(out))
    return {**asdict(found), "matrix": found.matrix.tolist(), "picture": str(picture)}


def train(
    data: Path,
    out: Path,
    *,
    recipe: str = "recommended",
    source: str | None = None,
    overrides: Sequence[str] = (),
    sections: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    seed: int = 0,
    resume: bool = False,
    devices: int | str = 1,
    nodes: int = 1,
    recompute: bool = False,
    weights: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train on a store and leave a run folder; see :func:`hifusion.training.train`.

    With several devices call it from a script or the command line, which then runs once for each of them.
    """
    wanted = recipes.recipe(recipe, source, overrides)
    return training.train(
        Cohort.open(data),
        wanted,
        Path(out),
        sections=sections,
        validation=validation,
        seed=seed,
        resume=resume,
        device_count=devices,
        nodes=nodes,
        recompute=recompute,
        weights=weights,
        progress=progress,
    )


def adapt(
    run: Path,
    section: Path,
    out: Path,
    *,
    image: Path | None = None,
    spots: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Adapt a run to a measured section file; see :func:`hifusion.adaptation.adapt`."""
    return adaptation.adapt(
        Run.open(run), read_section(section), Path(out), image=image, spots=spots, seed=seed, progress=progress
    )


def train_costs(
    data: Path,
    *,
    recipe: str = "recommended",
    source: str | None = None,
    overrides: Sequence[str] = (),
    sections: Sequence[str] | None = None,
    validation: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """What :func:`train` will cost, from ten seconds of real steps; see :func:`hifusion.estimating.training_costs`."""
    wanted = recipes.recipe(recipe, source, overrides)
    return estimating.training_costs(Cohort.open(data), wanted, sections=sections, validation=validation, seed=seed)


def evaluate(
    data: Path,
    out: Path | None = None,
    *,
    protocol: str,
    models: Sequence[str] = ("hifusion",),
    recipe: str = "recommended",
    source: str | None = None,
    overrides: Sequence[str] = (),
    panel: str | None = None,
    sections: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    with_nulls: bool = True,
    with_shuffled: bool = True,
    leak_check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score models by a protocol with the nulls beside them; see :func:`hifusion.evaluation.evaluate`.

    Parameters
    ----------
    panel
        Rule or gene list, instead of the recipe's.
    sections
        Sections to make folds of; all where None. A ``"paper"`` panel is chosen on these.
    """
    base = recipes.recipe_for("hifusion", recipe, source, overrides)
    return evaluation.evaluate(
        Cohort.open(data, sections),
        protocol,
        models,
        recipes.recipes_for(models, recipe, source, overrides),
        Path(out) if out else None,
        base=replace(base, panel=panel) if panel else base,
        seeds=seeds,
        with_nulls=with_nulls,
        with_shuffled=with_shuffled,
        leak_check=leak_check,
        progress=progress,
    )


def evaluate_costs(
    data: Path,
    *,
    protocol: str,
    models: Sequence[str] = ("hifusion",),
    recipe: str = "recommended",
    source: str | None = None,
    overrides: Sequence[str] = (),
    panel: str | None = None,
    sections: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    with_nulls: bool = True,
    with_shuffled: bool = True,
    leak_check: bool = True,
) -> dict[str, Any]:
    """What :func:`evaluate` will cost, from ten seconds of real steps of each network.

    See :func:`hifusion.estimating.evaluation_costs`.
    """
    asked = benchmarking.Settings(
        str(data),
        protocol,
        tuple(models),
        recipe,
        source,
        tuple(overrides),
        panel,
        tuple(sections) if sections is not None else None,
        tuple(seeds),
        with_nulls=with_nulls,
        with_shuffled=with_shuffled,
        leak_check=leak_check,
    )
    return estimating.evaluation_costs(asked.contest())


def download(
    name: str, out: Path, *, progress: Progress | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """Fetch a public study into the layout its reader knows; see :func:`hifusion.downloading.download`.

    Parameters
    ----------
    say
        Told the study's title, licence and citation before the first byte is fetched.
    """
    refuse_unknown("data set", [name], downloading.DATASETS, "the data sets that can be downloaded")
    study = downloading.DATASETS[name]
    if say:
        say(f"{study.title}\ndoi: {study.doi}\nlicence: {study.licence}\ncite: {study.citation}")
    return downloading.download(name, Path(out), progress=progress)


def import_sections(
    source: Path,
    out: Path,
    *,
    layout: str | None = None,
    sections: Sequence[str] | None = None,
    images: Mapping[str, Path] | None = None,
    patients: Mapping[str, str] | None = None,
    mpp: float | None = None,
    bin_um: float | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the sections of raw data in any known layout as ``.h5ad``; :func:`prepare` takes the folder.

    Parameters
    ----------
    layout
        Name in ``hifusion.readers.READERS``; recognised where None.
    images, patients
        Section name -> full-resolution slide, and -> patient, where the files do not say.
    mpp
        um per full-resolution pixel, instead of what the files say.
    bin_um
        Side of the squares that Visium HD bins are summed into, um.
    """
    options = ReadOptions(images or {}, patients or {}, mpp, bin_um)
    return importing.import_sections(
        Path(source), Path(out), layout=layout, sections=sections, options=options, progress=progress
    )


def plan(
    run: Path,
    slide: Path,
    *,
    mpp: float | None = None,
    mask: Path | None = None,
    lattice: str | None = None,
    stride_um: float | None = None,
    average_symmetries: bool = False,
    int8: bool = False,
    workers: int = 0,
) -> SlidePlan:
    """What predicting a slide will do and cost; see :func:`hifusion.slide_prediction.plan_slide`."""
    if Path(slide).suffix == ".h5ad":
        raise InputError(f"{slide}: is a section, which has its own positions; a plan is for a slide")
    return slide_prediction.plan_slide(
        Run.open(run),
        Path(slide),
        mpp=mpp,
        mask=mask,
        lattice=lattice,
        stride_um=stride_um,
        average_symmetries=average_symmetries,
        int8=int8,
        workers=workers,
    )


def predict(
    run: Path,
    source: Path,
    out: Path | None = None,
    *,
    image: Path | None = None,
    mpp: float | None = None,
    mask: Path | None = None,
    lattice: str | None = None,
    stride_um: float | None = None,
    average_symmetries: bool = False,
    int8: bool = False,
    workers: int = 0,
    progress: Progress | None = None,
) -> AnnData:
    """Predict with a trained run: the spots of a section file, or a slide that was never measured.

    Parameters
    ----------
    source
        A section ``.h5ad`` with positions, such as ``STORE/sections/C3.h5ad`` (counts are not needed); or a slide file.
    out
        For a section the ``.h5ad`` to write (nothing is written where None), for a slide the folder. What a stopped
        call has done is kept there.
    image
        The slide of a section, where the section does not name it.
    mpp, mask, lattice, stride_um
        For a slide, see :func:`hifusion.slide_prediction.plan_slide`.
    average_symmetries, int8, workers
        See :func:`hifusion.prediction.predict_section`.
    """
    source, trained = Path(source), Run.open(run)
    if source.suffix == ".h5ad":
        given = {"mpp": mpp, "mask": mask, "lattice": lattice, "stride_um": stride_um}
        needless = [name for name, value in given.items() if value is not None]
        if needless:
            raise InputError(f"{', '.join(needless)}: for a slide; {source} is a section and has its own positions")
        if out is not None and Path(out).resolve() == source.resolve():
            raise InputError(f"{out}: is the section itself, which is never overwritten; give another file")
        return prediction.predict_section(
            trained,
            read_section(source),
            image,
            average_symmetries=average_symmetries,
            int8=int8,
            workers=workers,
            out=Path(out) if out else None,
            progress=progress,
        )
    if image is not None:
        raise InputError(f"image: for a section; {source} is a slide itself")
    if out is None:
        raise InputError(f"{source}: predicting a slide leaves a folder; give one with out")
    planned = slide_prediction.plan_slide(
        trained,
        source,
        mpp=mpp,
        mask=mask,
        lattice=lattice,
        stride_um=stride_um,
        average_symmetries=average_symmetries,
        int8=int8,
        workers=workers,
    )
    return slide_prediction.predict_slide(
        trained,
        planned,
        Path(out),
        average_symmetries=average_symmetries,
        int8=int8,
        workers=workers,
        progress=progress,
    )
