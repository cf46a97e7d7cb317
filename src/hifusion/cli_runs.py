"""Commands that train, score, predict and draw. Imports stay inside commands: --help is instant."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hifusion.console import INCOMPLETE, Json, Recipe, Sections, Set, Source, listed, numbers, progress_bar, show
from hifusion.errors import InputError
from hifusion.ranks import is_first

app = typer.Typer()
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Only say what it will cost: time, memory, disk. Ten seconds of real steps each."),
]


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Patch store.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run folder.")] = None,
    recipe: Recipe = "recommended",
    source: Source = None,
    overrides: Set = None,
    sections: Sections = None,
    validation: Annotated[
        str | None, typer.Option(help="Sections to select the epoch on. Default: blocks of spots.")
    ] = None,
    seed: int = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    devices: Annotated[
        str, typer.Option(help="Devices a node that share every batch: a number, or auto for every GPU.")
    ] = "1",
    nodes: Annotated[int, typer.Option(help="Nodes, each started by torchrun or srun (docs/devices.md).")] = 1,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory, a third slower, the same result. On by itself if need be.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(help="Published weights to begin with; as they are with --set epochs=0 (docs/weights.md)."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a network on a store and leave a self-contained run folder.

    Example: `hifusion train store -o run --sections C2,C3`
    """
    from hifusion import api

    asked: dict[str, Any] = {
        "recipe": recipe,
        "source": source,
        "overrides": overrides or (),
        "sections": listed(sections),
        "validation": listed(validation) or (),
        "seed": seed,
    }
    if dry_run:
        if (devices, nodes) != ("1", 1):
            raise InputError("--dry-run tries one device; leave --devices and --nodes out")
        show(api.train_costs(data, **asked), as_json)
        return
    if out is None:
        raise InputError("train needs a place for the run; give one with -o")
    asked |= {"resume": resume, "devices": devices, "nodes": nodes, "recompute": recompute, "weights": weights}
    with progress_bar() as report:
        run = api.train(data, out, **asked, progress=report)
    if is_first():
        show(api.info(run.root), as_json)


@app.command()
def adapt(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    section: Annotated[Path, typer.Argument(help="A measured section (.h5ad) of the tissue to adapt to.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the adapted run.")],
    spots: Annotated[
        int | None, typer.Option(help="Look at so many of its spots; the others tell the gain. Default: all.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Its slide, where the section does not name it.")] = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Adapt a run to a measured section, or to some spots of one, and say what it gained on the rest.

    Example: `hifusion adapt run store/sections/B4.h5ad -o run-b4 --spots 50`
    """
    from hifusion import api

    with progress_bar() as report:
        gain = api.adapt(run, section, out, image=image, spots=spots, seed=seed, progress=report)
    show({key: round(value, 4) if isinstance(value, float) else value for key, value in gain.items()}, as_json)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Option(help="Patch store; or a raw data folder, for models that see counts only.")],
    protocol: Annotated[
        str, typer.Option(help="patient_folds, first_section, leave_one_section_out or leave_one_patient_out.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(help="hifusion, a rival such as stnet, or a null such as ridge. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for metrics, report, predictions and runs.")
    ] = None,
    recipe: Recipe = "recommended",
    source: Source = None,
    overrides: Set = None,
    panel: Annotated[
        str | None, typer.Option(help="top_mean, highly_variable, moran, paper, or a gene list file.")
    ] = None,
    sections: Sections = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the networks, separated by commas.")] = "0",
    nulls: Annotated[bool, typer.Option(help="Score the nulls and simple rivals too.")] = True,
    shuffled: Annotated[
        bool, typer.Option(help="Train the shuffled null too (as long as one seed of the network).")
    ] = True,
    leak_check: Annotated[bool, typer.Option(help="Refuse folds that leak.")] = True,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Score models by a protocol, with every null beside them.

    Example: `hifusion evaluate --data her2st --protocol patient_folds --model train_mean --panel paper --json`
    """
    from hifusion import api, reporting

    models = model or ["hifusion"]
    asked: dict[str, Any] = {
        "protocol": protocol,
        "models": models,
        "recipe": recipe,
        "source": source,
        "overrides": overrides or (),
        "panel": panel,
        "sections": listed(sections),
        "seeds": numbers("--seeds", seeds),
        "with_nulls": nulls,
        "with_shuffled": shuffled,
        "leak_check": leak_check,
    }
    if dry_run:
        show(api.evaluate_costs(data, **asked), as_json)
        return
    with progress_bar() as report:
        result = api.evaluate(data, out, **asked, progress=report)
    if as_json:
        # The scores of the first model asked for stand at the top, so that a script need not dig for them.
        typer.echo(json.dumps({"model": models[0], **result["models"][models[0]], **result}, indent=2))
    else:
        typer.echo(reporting.table(result, reporting.BRIEF))
        if out:
            typer.echo(f"\n{out}/report.md")


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    source: Annotated[
        Path | None, typer.Argument(help="A slide, or a section with spot positions (.h5ad); none with --slides.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for a slide's prediction; .h5ad for a section's.")
    ] = None,
    slides: Annotated[
        Path | None,
        typer.Option(
            help="Many slides: CSV with a column slide, and name, mpp, mask, lattice, stride_um where wanted."
        ),
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help="With --slides: local, slurm, or tcp://host:port of a dask scheduler.")
    ] = "local",
    jobs: Annotated[
        int | None,
        typer.Option("-j", "--jobs", help="With --slides: workers. Default: one a GPU, else a core.", min=1),
    ] = None,
    set_cluster: Annotated[
        list[str] | None,
        typer.Option(
            "--set-cluster",
            help="With --scheduler slurm, key=value: queue, account, walltime, cores, memory, gres, interface, "
            "prologue. Repeatable.",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="The slide of a section that does not name it.")] = None,
    mpp: Annotated[
        float | None, typer.Option(help="um per full-resolution pixel of a slide that does not say it.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Tissue mask to use: tissue.png of an earlier prediction.")] = None,
    lattice: Annotated[str | None, typer.Option(help="square or hexagonal. Default: as the training spots.")] = None,
    stride_um: Annotated[
        float | None, typer.Option(help="Dense map: spots so close, overlapping predictions averaged.")
    ] = None,
    symmetries: Annotated[
        bool, typer.Option("--symmetries", help="Average over the 8 flips and turns of a patch: 8 times the cost.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in 8-bit whole numbers: faster on a CPU, slightly less exact.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read patches ahead. Default: 1; with --slides 0 in each worker.", min=0),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many spots, how long and how much memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict the expression of slides that were never measured, or of a section's spots. Stopped, it goes on.

    Example: `hifusion predict run slide.svs -o prediction`

    Many slides: `hifusion predict run --slides manifest.csv -o archive -j 8`
    """
    from hifusion import api

    given = {"image": image, "mpp": mpp, "mask": mask, "lattice": lattice, "stride_um": stride_um, "SOURCE": source}
    if slides is not None:
        needless = [name for name, value in given.items() if value is not None]
        if needless:
            raise InputError(f"{', '.join(needless)}: is not for --slides; write it into the manifest, slide by slide")
        how: dict[str, Any] = {
            "scheduler": scheduler,
            "jobs": jobs,
            "options": set_cluster or (),
            "average_symmetries": symmetries,
            "int8": int8,
            "workers": workers or 0,
        }
        if dry_run:
            show(api.plan_archive(run, slides, out, **how), as_json)
        else:
            _predict_archive(run, slides, out, how, as_json)
        return
    if source is None:
        raise InputError("predict needs a slide or a section; name one, or give a list of slides with --slides")
    if scheduler != "local" or jobs is not None or set_cluster:
        raise InputError("--scheduler, -j and --set-cluster are for many slides; give them with --slides")
    asked: dict[str, Any] = {
        "mpp": mpp,
        "mask": mask,
        "lattice": lattice,
        "stride_um": stride_um,
        "average_symmetries": symmetries,
        "int8": int8,
        "workers": 1 if workers is None else workers,
    }
    if dry_run:
        show(api.plan(run, source, **asked).facts, as_json)
        return
    if out is None:
        raise InputError("predict needs a place for the result; give one with -o")
    with progress_bar() as report:
        predicted = api.predict(run, source, out, image=image, **asked, progress=report)
    novel = predicted.obs["novelty"]
    facts = {
        "out": str(out),
        "spots": predicted.n_obs,
        "genes": predicted.n_vars,
        "normalisation": predicted.uns["hifusion"]["normalisation"],
        "novel_spots": "not known to this run" if novel.isna().all() else f"{(novel > 1).mean():.0%}",
    }
    show(facts, as_json)


def _predict_archive(run: Path, slides: Path, out: Path | None, how: dict[str, Any], as_json: bool) -> None:
    """What ``predict --slides`` does; exits with 3 where slides failed, naming them."""
    from hifusion import api

    if out is None:
        raise InputError("predict needs a folder for the results; give one with -o")
    with progress_bar() as report:
        found = api.predict_archive(run, slides, out, **how, progress=report)
    spots = int(found.table["spots"].sum())
    done = len(found.table) - len(found.failed)
    show({"out": str(out / "index.html"), "done": done, "failed": len(found.failed), "spots": spots}, as_json)
    for name, reason in found.failed.items():
        typer.echo(f"failed: {name}: {reason}", err=True)
    if found.failed:
        raise typer.Exit(INCOMPLETE)


@app.command()
def export(
    section: Annotated[Path, typer.Argument(help="Section, measured or predicted (.h5ad).")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help=".zarr (SpatialData), .geojson (QuPath), .ome.tif, .csv, .csv.gz, .parquet."),
    ],
    to: Annotated[str | None, typer.Option(help="Format, where the suffix does not say it.")] = None,
    genes: Annotated[str | None, typer.Option(help="Names, separated by commas. Default: the format's choice.")] = None,
) -> None:
    """Write a section for other programs: SpatialData, QuPath, OME-TIFF, tables.

    Example: `hifusion export prediction/section.h5ad -o spots.geojson --genes ERBB2,CD74`
    """
    from hifusion import api

    typer.echo(str(api.export(section, out, to=to, genes=listed(genes))))
